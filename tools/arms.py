"""
The arms of the comparison, over seeds of an embedded world: what does an alignment stage buy?

    bash runs/miniature.sh                         the main table on seed 0 of the world "miniature"
    bash runs/miniature.sh --seeds 0-9 --jobs 2    ten seeds, two at a time, a core each
    bash runs/miniature.sh --world tiny            the world of runs/tiny.sh (tools/scenes.py)
    bash runs/miniature.sh --table cost            another table, see below
    bash runs/miniature.sh --arms align-dense      some arms, with those that they begin with
    bash runs/miniature.sh --own_bases             each seed behind a base of its own
    bash runs/miniature.sh --show                  print what is still to be run, and run nothing

An arm of a seed is a run folder with an eval.json in it, out/arms-WORLD-SEED/ARM. What is there is
not made again, so the same command goes on after a stop, and a table uses what another one made. A
run with other settings than its arm has today is an error, and so is one that is older than the
run it begins with; after a change of the code or of a world, remove the folders that it concerns.
One base (runs/base.sh), from seed 0, serves all seeds of a world, so that what they have in common
may be that base's. With --own_bases each begins from one of its own seed, which is evaluated as the
arm `base`, and its runs are in out/arms-WORLD-own-SEED.

How long it will take is printed first (beside the base, about 8 minutes); what a seed's runs print
is in its log.txt. At the end come the tables of tools/compare.py: each
arm's mean, and paired differences with their intervals.

An arm's name says what follows what:

    sft               SFT on many terse and partly wrong demonstrations and a few of the teacher's
    sft-grpo          then GRPO
    sft-grpo-tokens   the same run, on until it has generated as many tokens as align and align-grpo
    align             alignment behind SFT
    align-grpo        then GRPO
    refs              the rival: SFT on alignment's references
    refs-grpo         then GRPO
    refs-align        SFT on the references, then alignment
    refs-align-grpo   then GRPO
    rubric            RLVR on the references' prompts with a rubric as the reward (tools/rubric.py)
    rubric-grpo       then GRPO

Behind SFT, alignment and its rivals take 40 updates of the policy each (align-short 20, align-long
120), and RLVR what is left of 140; -dapo and -gspo are other algorithms in GRPO's place. `base` in
the place of SFT begins without it, `half` with half of it (base-refs, half-align-grpo). The
variants of alignment are in VARIANTS: align-dense, say. Other references are in REFERENCES:
align-50 and refs-50 learn from the first 50 of all 1,500; with --world tiny align-reversed and
refs-reversed learn from references that go through the objects from below, align-mixed and
refs-mixed from half and half.

The tables: main; algorithms (DAPO, GSPO); ablations (of the paper, and the rubric); rivals (SFT on
the references at lower rates: refs-slow, refs-slower, for as long as alignment takes: refs-time,
and for longer: refs-long; RLVR behind them has as many updates as alignment's) and rivals-reversed
(--world tiny); cost (settings of alignment, before RLVR); and one factor at a time, for
tools/factors.py: number (of references), manner (their order, --world tiny), drift (how much of SFT
came before).
"""

import argparse
import difflib
import fcntl
import importlib
import json
import math
import os
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, fields
from pathlib import Path
from threading import Event, Lock

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from engine.arguments import parse  # noqa: E402
from tools import budget, compare  # noqa: E402
from tools.scenes import WORLDS  # noqa: E402

BASE = "base"  # what the first arms begin with
UPDATES = 140  # of the policy behind SFT, in every arm that ends with RLVR
EACH = 40  # of a stage before RLVR
# Arguments of a stage that say where files are, or that a log has in another form.
PATHS = ("policy", "data", "out", "disc_init", "config", "resume")
REFERENCES = {  # other than all of align.jsonl: a file of the seed's data
    "50": "align_50.jsonl",
    "300": "align_300.jsonl",
    "mixed": "align_mixed.jsonl",
    "reversed": "align_reversed.jsonl",
}
FIRST = (50, 300)  # so many rows of align.jsonl are a file of their own
TESTS = 1000  # rows of each test
MAX_RESPONSE = "160"  # tokens

VARIANTS = {  # of alignment: what they change
    "dense": ("--disc", "dense"),
    "experts": ("--disc", "experts"),
    "blind": ("--disc_blind",),
    "whole": ("--spans", "whole"),
    "sum": ("--normalize", "sum"),
    "alpha0": ("--alpha", "0"),
    "alpha1": ("--alpha", "1"),
    "constant": ("--schedule", "constant", "--std_floor", "0"),
    "nodecay": ("--schedule", "constant"),
    "nofloor": ("--std_floor", "0"),
    "slow": ("--lr", "5e-5"),
    "group16": ("--group_size", "16", "--prompts_per_step", "8"),
    "clip": ("--score_clip", "1"),
    "discslow": ("--disc_lr", "1.5e-4"),
    "discfast": ("--disc_lr", "1.5e-3"),
    "disc2": ("--disc_updates", "2"),
    "short": (),  # LENGTHS says how many updates
    "long": (),
}
LENGTHS = {"short": 20, "long": 120}  # updates of a variant, where not EACH
RIVALS = {  # variants of SFT on the references: what they change (else --lr is 1e-3)
    "slow": ("--lr", "3e-4"),
    "slower": ("--lr", "1e-4"),
    "time": (),  # RIVAL_LENGTHS says how many updates
    "long": (),
}
# 250 updates of SFT take as long as alignment: its 40, with their rollouts and its warm-up (75 s on
# a core of an Intel Xeon).
RIVAL_LENGTHS = {"time": 250, "long": 400}
RUBRIC = "tools/rubric.py"  # RLVR with another reward
ALGORITHMS = {
    "grpo": ("--algo", "grpo"),
    "dapo": ("--algo", "dapo", "--overlong", "32", "--prompts_per_draw", "48"),
    "gspo": ("--algo", "gspo"),
}


@dataclass(frozen=True)
class Arm:
    """One run of a stage."""

    script: str  # of the stage
    start: str  # the arm that it begins with, or BASE
    data: str  # a file of the seed's data
    updates: int  # of the policy; SFT itself is not counted
    flags: tuple[str, ...] = ()
    more: bool = False  # the run `start` itself, on for as many updates as the tokens allow

    @property
    def counted(self):
        """Of `updates`, those that RLVR behind it has fewer: SFT on the references for as long as
        alignment takes counts as alignment does."""
        return min(self.updates, EACH) if self.script == "sft.py" else self.updates

    @property
    def stage(self):
        """Of the settings in runs/tiny-STAGE.json."""
        return "rlvr" if self.script == RUBRIC else self.script.removesuffix(".py")


def make_arms():
    """Return {name: Arm} of all arms that there are, each behind the one that it begins with."""
    arms = {
        "sft": Arm("sft.py", BASE, "sft.json", 0),
        "half": Arm("sft.py", BASE, "sft.json", 0, ("--epochs", "0.5")),
    }
    for start, name in (("sft", "refs"), (BASE, "base-refs"), ("half", "half-refs")):
        arms[name] = Arm("sft.py", start, "align.jsonl", EACH)
    for start, name in (
        ("sft", "align"),
        ("refs", "refs-align"),
        (BASE, "base-align"),
        ("half", "half-align"),
    ):
        arms[name] = Arm("align.py", start, "align.jsonl", EACH)
    for references, file in REFERENCES.items():
        arms[f"refs-{references}"] = Arm("sft.py", "sft", file, EACH)
        arms[f"align-{references}"] = Arm("align.py", "sft", file, EACH)
    for name in ("refs", "refs-reversed", "refs-50", "refs-300"):
        for variant, flags in RIVALS.items():
            updates = RIVAL_LENGTHS.get(variant, EACH)
            arms[f"{name}-{variant}"] = Arm("sft.py", "sft", arms[name].data, updates, flags)
    for variant, flags in VARIANTS.items():
        updates = LENGTHS.get(variant, EACH)
        arms[f"align-{variant}"] = Arm("align.py", "sft", "align.jsonl", updates, flags)
    # As many rollouts a step as alignment has, and its schedule. RLVR has no --std_floor.
    like_alignment = ("--prompts_per_step", "16", "--group_size", "8", "--schedule", "cosine")
    arms["rubric"] = Arm(RUBRIC, "sft", "align.jsonl", EACH, like_alignment)
    for name in [BASE, *arms]:
        left = UPDATES - counted_behind_sft(arms, name)
        for algorithm, flags in ALGORITHMS.items():
            arms[f"{name}-{algorithm}"] = Arm("rlvr.py", name, "rl.jsonl", left, flags)
    arms["sft-grpo-tokens"] = Arm("rlvr.py", "sft-grpo", "rl.jsonl", 0, ALGORITHMS["grpo"], True)
    return arms


def counted_behind_sft(arms, name):
    """Return the updates that count of an arm and of those that it begins with, in all."""
    total = 0
    while name != BASE:
        total += arms[name].counted
        name = arms[name].start
    return total


ARMS = make_arms()
ABLATED = ("dense", "blind", "experts", "whole", "sum", "alpha0", "alpha1")
COST = (
    "constant",
    "nodecay",
    "nofloor",
    "short",
    "long",
    "slow",
    "group16",
    "clip",
    "discslow",
    "discfast",
    "disc2",
)


@dataclass(frozen=True)
class Table:
    arms: tuple[str, ...]
    pairs: tuple[str, ...]  # as tools/compare.py takes them


def table_of_references(*kinds):
    """Return the table of the main arms with all references and with those of REFERENCES."""
    arms = ["sft-grpo", "align-grpo", "refs-grpo"]
    pairs = ["align-grpo:sft-grpo", "align-grpo:refs-grpo"]
    for kind in kinds:
        arms += [f"align-{kind}-grpo", f"refs-{kind}-grpo"]
        pairs += [f"align-{kind}-grpo:sft-grpo", f"align-{kind}-grpo:refs-{kind}-grpo"]
        if f"refs-{kind}-time" in ARMS:
            arms += [f"refs-{kind}-time-grpo"]
            pairs += [f"align-{kind}-grpo:refs-{kind}-time-grpo"]
    return Table(tuple(arms), tuple(pairs))


def table_of_rivals(references):
    """Return the table of SFT on some references at other rates and for longer. references: a word
    of REFERENCES, or none for all."""
    refs, align = (f"{name}-{references}" if references else name for name in ("refs", "align"))
    variants = [refs, *(f"{refs}-{variant}" for variant in RIVALS)]
    return Table(
        arms=("sft", "sft-grpo", f"{align}-grpo", *(f"{variant}-grpo" for variant in variants)),
        pairs=tuple(f"{align}-grpo:{variant}-grpo" for variant in variants),
    )


TABLES = {
    "main": Table(compare.ARMS[1:], compare.PAIRS),
    "algorithms": Table(
        arms=tuple(f"{arm}-{a}" for arm in ("sft", "align", "refs") for a in ("dapo", "gspo")),
        pairs=tuple(
            f"align-{a}:{other}-{a}" for a in ("dapo", "gspo") for other in ("sft", "refs")
        ),
    ),
    "ablations": Table(
        arms=(
            "align",
            "align-grpo",
            "base-align-grpo",
            "half-align-grpo",
            *(f"align-{variant}-grpo" for variant in ABLATED),
            "rubric-grpo",
        ),
        pairs=(
            "base-align-grpo:align-grpo",
            "half-align-grpo:align-grpo",
            *(f"align-{variant}:align" for variant in ABLATED),
            *(f"align-{variant}-grpo:align-grpo" for variant in ABLATED),
            "rubric:align",
            "rubric-grpo:align-grpo",
        ),
    ),
    # The rival's rate and length, not only alignment's settings, were chosen by somebody.
    "rivals": table_of_rivals(""),
    "rivals-reversed": table_of_rivals("reversed"),
    "cost": Table(
        arms=("align", *(f"align-{variant}" for variant in COST)),
        pairs=("align:sft", *(f"align-{variant}:align" for variant in COST)),
    ),
    # One factor at a time, for tools/factors.py: the references' number, their manner (in the
    # world `tiny`), how far SFT has gone.
    "number": table_of_references("50", "300"),
    "manner": table_of_references("mixed", "reversed"),
    "drift": Table(
        arms=(
            *("base-grpo", "base-align-grpo", "base-refs-grpo"),
            *("half-grpo", "half-align-grpo", "half-refs-grpo"),
            *("sft-grpo", "align-grpo", "refs-grpo"),
        ),
        pairs=(
            *("base-align-grpo:base-grpo", "base-align-grpo:base-refs-grpo"),
            *("half-align-grpo:half-grpo", "half-align-grpo:half-refs-grpo"),
            *("align-grpo:sft-grpo", "align-grpo:refs-grpo"),
        ),
    ),
}


def with_starts(names):
    """Return the arms with all that they begin with, each once and behind those. Raises ValueError
    for an arm that there is not."""
    found = {}
    for name in names:
        if name not in ARMS:
            near = difflib.get_close_matches(name, ARMS, 3, 0)
            raise ValueError(
                f"there is no arm {name}; nearest are {', '.join(near)} (all: see --help)"
            )
        chain = [name]
        while ARMS[chain[-1]].start != BASE:
            chain.append(ARMS[chain[-1]].start)
        if ARMS[name].more:  # its length follows from these
            chain[1:1] = ["align-grpo", "align"]
        found |= dict.fromkeys(reversed(chain))
    return [*found]


def expect_references(arms, world):
    """Raise ValueError for an arm whose references a world has not."""
    there = [f"align_{number}.jsonl" for number in FIRST]
    there += [f"{name}.jsonl" for name in WORLDS[world].from_below]
    for name in arms:
        file = ARMS[name].data
        if file in REFERENCES.values() and file not in there:
            raise ValueError(f"the world {world} has no {file}, which {name} learns from")


# -------------------------------------------------------------------------------------- one seed
class Stopped(Exception):
    """The whole comparison is to stop."""


class Runner:
    """Runs commands, several threads at a time, and stops all of them together."""

    def __init__(self):
        self.stopping = Event()
        self.lock = Lock()
        self.processes = set()

    def run(self, command, log):
        """Run a command, its output at the end of the file `log`. Raises CalledProcessError where
        it fails, Stopped where everything stops."""
        with open(log, "a") as out:
            print(f"=== {shlex.join(command)}", file=out, flush=True)
            with self.lock:
                if self.stopping.is_set():
                    raise Stopped
                # A group of its own, so that what a shell script has begun is stopped with it.
                process = subprocess.Popen(
                    command, stdout=out, stderr=subprocess.STDOUT, process_group=0
                )
                self.processes.add(process)
            code = process.wait()
        with self.lock:
            self.processes.discard(process)
        if self.stopping.is_set():
            raise Stopped
        if code:
            raise subprocess.CalledProcessError(code, command)

    def stop(self, *_):
        """Let no command begin, and ask those that run to end. Also a signal's handler."""
        with self.lock:  # the main thread, which handles signals, never holds it already
            self.stopping.set()
            for process in self.processes:
                with suppress(ProcessLookupError):  # it has just ended
                    os.killpg(process.pid, signal.SIGTERM)


@dataclass
class Seed:
    """A seed of a world: its folders, and what is run in them."""

    number: int
    args: argparse.Namespace
    run: Callable  # a command -> None

    @property
    def data(self):
        return Path(f"data/arms-{self.args.world}-{self.number}")

    @property
    def out(self):
        own = "own-" if self.args.own_bases else ""
        return Path(f"out/arms-{self.args.world}-{own}{self.number}")

    @property
    def base(self):
        """The base's folder, as runs/base.sh names it."""
        suffix = f"-{self.number}" if self.args.own_bases and self.number else ""
        return f"ckpt/base-{self.args.world}{suffix}"

    def missing(self, arms):
        """Return those of the arms that have no evaluation with these settings. Raises ValueError
        where a run is not what its arm is today."""
        for name in arms:
            headers = headers_of(self.out / name / "log.jsonl")
            for header in headers:
                self.expect_settings(name, header["args"])
            start = headers_of(self.out / ARMS[name].start / "log.jsonl")
            if headers and start and headers[0]["time"] < start[0]["time"]:
                raise ValueError(
                    f"{self.out / name} is older than {ARMS[name].start}, which it begins with: "
                    "remove it, so that it is made again"
                )
        return [arm for arm in arms if not is_evaluated(self.out / arm, self.args.limit)]

    def expect_settings(self, name, args):
        """Raise ValueError where a run's arguments are not those of the arm today. An argument that
        the run did not know counts as at its default."""
        arm = ARMS[name]
        stage = importlib.import_module(arm.script.removesuffix(".py").replace("/", "."))
        words = self.command(name, steps="1" if arm.more else None)[2:]
        today = json.loads(json.dumps(vars(parse(stage.Args, words, with_paths=False))))
        defaults = {field.name: field.default for field in fields(stage.Args)}
        for setting, value in today.items():
            if setting in PATHS or (arm.more and setting == "steps"):  # the tokens say how many
                continue
            had = args.get(setting, defaults[setting])
            if had != value:
                raise ValueError(
                    f"{self.out / name}: its log has --{setting} {had}, the arm has {value} today: "
                    "remove the folder, and those of arms that begin with it"
                )

    def expect_data(self, arms):
        """Raise ValueError where a file that an arm learns from is not there."""
        for name in arms:
            file = self.data / ARMS[name].data
            if not file.exists():
                raise ValueError(
                    f"{file} is missing, an older tools/scenes.py made its folder: remove "
                    f"{self.data}, it is made again (worlds are the same rows from the same seed)"
                )

    def make(self, arms):
        """Make the seed's base where it has one of its own, and its data, then run and evaluate
        each arm that is missing."""
        if self.args.own_bases:
            self.run(["bash", "runs/base.sh", self.args.world, str(self.number)])
        if not (self.data / "words.json").exists():  # it comes last
            world = ["--world", self.args.world, "--tests", str(TESTS)]
            seed = ["--out", str(self.data), "--seed", str(self.number)]
            self.run([sys.executable, "tools/scenes.py", *world, *seed])
        if not self.args.show:
            write_first_references(self.data)
            self.expect_data(arms)
        if self.args.own_bases:
            self.evaluate_base()
        for arm in self.missing(arms):
            self.run(self.command(arm))
            self.run(self.evaluation(arm))

    def evaluate_base(self):
        """Evaluate the seed's own base as an arm of that name: what an arm gains depends on it."""
        link = self.out / BASE
        if not self.args.show:
            link.unlink(missing_ok=True)
            link.symlink_to(Path(self.base).resolve())
        if not is_evaluated(link, self.args.limit):
            self.run(self.evaluation(BASE))

    def command(self, name, steps=None):
        """Return the command that runs an arm's stage. All take --resume: what a stop cut short
        goes on. steps: where another arm's tokens decide, so many and no look at them."""
        arm = ARMS[name]
        start = ARMS[arm.start].start if arm.more else arm.start
        command = [sys.executable, arm.script]
        command += ["--policy", self.base if start == BASE else str(self.out / start)]
        command += ["--config", f"runs/tiny-{arm.stage}.json", "--data", str(self.data / arm.data)]
        command += ["--out", str(self.out / name), "--seed", str(self.number), "--device", "cpu"]
        command += ["--max_response", MAX_RESPONSE, "--save_every", "0", "--resume", *arm.flags]
        if arm.stage == "align":
            command += ["--disc_init", self.base]
        if arm.more:
            command += ["--steps", steps or self.as_many_tokens(name)]
        elif arm.updates:
            command += ["--steps", str(arm.updates)]
        return command

    def as_many_tokens(self, name):
        """Return the --steps with which GRPO behind SFT generates as many tokens as alignment and
        the GRPO behind it. The folder `name` becomes a copy of the run that is to go on, unless
        that has gone further already."""
        if self.args.show:
            return "AS_THE_TOKENS_ALLOW"
        before = self.out / ARMS[name].start
        tokens = budget.generated([self.out / "align", self.out / "align-grpo"])
        of_run = budget.tokens_per_update(before)
        updates = budget.updates_for(tokens, of_run)
        if updates > len(of_run) and not (self.out / name).exists():
            part = self.out / f".{name}.part"
            shutil.rmtree(part, ignore_errors=True)
            shutil.copytree(before, part, ignore=shutil.ignore_patterns("eval.json"))
            part.rename(self.out / name)
        return str(updates)

    def evaluation(self, name):
        tests = [str(self.data / f"test_{test}.jsonl") for test in ("id", "hard", "ood")]
        command = [sys.executable, "eval.py", "--policy", str(self.out / name), "--data", *tests]
        command += ["--limit", str(self.args.limit), "--samples", "1", "--device", "cpu"]
        command += ["--max_response", MAX_RESPONSE]
        command += ["--out", str(self.out / name / "eval.json")]
        return command


def headers_of(log):
    """Return the headers of a run's log, one for each time that it was begun or gone on with; none
    where there is no log, or a stop came before its first line was whole."""
    if not log.exists():
        return []
    headers = []
    for line in log.read_text().splitlines():
        try:
            record = json.loads(line)
        except ValueError:  # a stop cut it short: the stage goes on before it
            continue
        if isinstance(record, dict) and "args" in record:
            headers.append(record)
    return headers


def is_evaluated(folder, limit):
    """Whether a run was evaluated on the first `limit` rows of each test."""
    file = folder / "eval.json"
    if not file.exists():
        return False
    if not headers_of(folder / "log.jsonl"):
        raise ValueError(f"{folder}: an eval.json without the run's log.jsonl: remove the folder")
    args = compare.read_json(file).get("args")
    if not isinstance(args, dict):
        raise ValueError(f"{file}: no arguments of eval.py in it: remove it")
    return args.get("limit") == limit


def write_first_references(data):
    """Write the first rows of align.jsonl, as many as FIRST says, as files of their own. Raises
    ValueError where there are fewer."""
    rows = (data / "align.jsonl").read_text().splitlines(keepends=True)
    if len(rows) < max(FIRST):
        raise ValueError(f"{data}/align.jsonl has {len(rows)} rows, {max(FIRST)} are needed")
    for number in FIRST:
        (data / f"align_{number}.jsonl").write_text("".join(rows[:number]))


def make_seed(number, args, arms, runner):
    """Make a seed whole. Returns the reason where it failed, else None."""
    seed = Seed(number, args, run=None)
    seed.out.mkdir(parents=True, exist_ok=True)
    log = seed.out / "log.txt"
    seed.run = lambda command: runner.run(command, log)
    with open(seed.out / ".lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return f"another process is at work in {seed.out}"
        try:
            seed.make(arms)
        except Stopped:
            return "stopped"
        except subprocess.CalledProcessError as error:
            script = error.cmd[1]
            last = log.read_text().splitlines()[-1]
            return f"{script} ended with {error.returncode}: {last} (more in {log})"
        except (OSError, ValueError) as error:
            return str(error)
    return None


# -------------------------------------------------------------------------------- all of them
def minutes(seeds, arms, args):
    """Return about how many minutes what is missing will take, from runs on a core of an AMD EPYC:
    0.8 s an update of RLVR, 1.5 s one of alignment, a warm-up 30 s, an evaluation 30 s; about 1.5
    times as long in the worlds with a foreign teacher, whose responses are longer."""
    seconds = 0
    for seed in seeds:
        if args.own_bases and not Path(seed.base, "whole").exists():
            seconds += 510
        for name in seed.missing(arms):
            arm = ARMS[name]
            seconds += 30
            if arm.more:
                seconds += 200
            elif arm.stage == "align":
                seconds += 30 + 1.5 * arm.updates
            elif arm.stage == "rlvr":
                seconds += arm.updates * (2 if "dapo" in arm.flags else 0.8)
            else:
                seconds += 60 if arm.data == "sft.json" else 10
    longer = 1.5 if WORLDS[args.world].places else 1
    return math.ceil(longer * seconds / 60 / min(args.jobs, len(seeds)))


def seeds_of(text):
    """Return the seeds that "0-3,7" names, each once."""
    seeds = set()
    for part in text.split(","):
        first, _, last = part.partition("-")
        if not first.isdigit() or not (last or first).isdigit():
            raise argparse.ArgumentTypeError("write 0-9 or 0,3,5-7")
        seeds |= {*range(int(first), int(last or first) + 1)}
    if not seeds:
        raise argparse.ArgumentTypeError(f"{text} names no seed")
    return sorted(seeds)


def one_or_more(text):
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError("write a number, 1 or more")
    return int(text)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--world", choices=WORLDS, default="miniature")
    parser.add_argument("--seeds", type=seeds_of, default=[0], help="0-9 or 0,3,5-7")
    parser.add_argument("--jobs", type=one_or_more, default=1, help="seeds at a time")
    parser.add_argument("--table", choices=TABLES, default="main")
    parser.add_argument("--arms", nargs="+", default=[], help="in the place of a table")
    parser.add_argument("--own_bases", action="store_true", help="a base per seed")
    parser.add_argument("--limit", type=one_or_more, default=TESTS, help="rows of each test")
    parser.add_argument("--show", action="store_true", help="print what is still to be run")
    args = parser.parse_args()
    table = TABLES[args.table]
    if args.arms:
        table = Table(tuple(args.arms), ())
    try:
        arms = with_starts(table.arms)
        expect_references(arms, args.world)
    except ValueError as error:
        parser.error(str(error))
    seeds = [Seed(number, args, run=print_command) for number in args.seeds]
    try:
        about = minutes(seeds, arms, args)
        if args.show:
            # `| head` ends this as it ends other commands, without a traceback.
            signal.signal(signal.SIGPIPE, signal.SIG_DFL)
            for seed in seeds:
                seed.make(arms)
            return
    except (OSError, ValueError) as error:
        sys.exit(f"arms.py: {error}")
    if not args.own_bases and subprocess.run(["bash", "runs/base.sh", args.world]).returncode:
        sys.exit(f"arms.py: runs/base.sh {args.world} failed: the same command goes on")
    print(f"=== about {about} minutes; what happens is in {seeds[0].out}/log.txt ..", flush=True)
    run_all(args, arms)
    folders = [str(seed.out) for seed in seeds]
    pairs = ["--pairs", *table.pairs] if table.pairs else []
    if args.own_bases:
        arms = [BASE, *arms]
    command = [sys.executable, "tools/compare.py", *folders, "--arms", *arms, *pairs]
    sys.exit(subprocess.run(command).returncode)


def print_command(command):
    program = "bash" if command[0] == "bash" else "python"
    print(shlex.join([program, *command[1:]]))


def run_all(args, arms):
    """Make all seeds, `--jobs` at a time. Ends the process where one fails: the others go on to
    their end before that."""
    runner = Runner()
    signal.signal(signal.SIGTERM, runner.stop)
    signal.signal(signal.SIGINT, runner.stop)
    failed = False
    with ThreadPoolExecutor(args.jobs) as pool:
        made = [pool.submit(make_seed, number, args, arms, runner) for number in args.seeds]
        for number, seed in zip(args.seeds, made, strict=True):
            if reason := seed.result():
                print(f"seed {number}: {reason}", file=sys.stderr, flush=True)
                failed = True
    if failed:
        sys.exit("not all seeds are whole: the same command goes on")


if __name__ == "__main__":
    main()
