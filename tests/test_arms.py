"""The comparison of arms over seeds: what it runs and in which order, budgets, stops and failures.
No stage runs here: commands are written down, and what they would leave is put in its place."""

import argparse
import itertools
import json
import random
import runpy
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import ROOT

import align
import rlvr
import sft
from engine.arguments import parse
from tools import arms, compare, rubric, scenes
from tools.init import init

STAGES = {"sft.py": sft, "align.py": align, "rlvr.py": rlvr, "tools/rubric.py": rubric}


def seed_of(run, *, show=False, number=7, own_bases=False):
    args = argparse.Namespace(world="tiny", limit=1000, show=show, own_bases=own_bases)
    return arms.Seed(number, args, run)


def flags_of(command, name):
    return command[command.index(f"--{name}") + 1]


@pytest.fixture
def project(tmp_path, monkeypatch):
    """An empty project, and a `run` that leaves what the commands of a seed would leave."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").symlink_to(ROOT / "runs")
    commands = []
    clock = itertools.count(1)

    def run(command):
        commands.append(command)
        if command[1] == "runs/base.sh":
            base = Path("-".join(["ckpt/base", *command[2:]]))
            base.mkdir(parents=True, exist_ok=True)
            (base / "log.jsonl").write_text(json.dumps({"args": {}, "time": 0}) + "\n")
            return
        out = Path(flags_of(command, "out"))
        if command[1] == "tools/scenes.py":
            out.mkdir(parents=True)
            rows = [json.dumps({"row": row}) for row in range(1500)]
            (out / "align.jsonl").write_text("\n".join(rows) + "\n")
            others = ("words.json", "sft.json", "rl.jsonl", "align_mixed.jsonl")
            for name in (*others, "align_reversed.jsonl"):
                (out / name).write_text("[]")
        elif command[1] == "eval.py":
            limit = int(flags_of(command, "limit"))
            out.write_text(json.dumps({"args": {"limit": limit}, "results": []}))
        else:
            out.mkdir(parents=True, exist_ok=True)
            steps = range(1, 1 + int(flags_of(command, "steps")) if "--steps" in command else 2)
            args = parse(STAGES[command[1]].Args, command[2:], with_paths=False)
            logged = [{"args": vars(args), "time": next(clock)}]
            logged += [{"step": step, "length": 40.0} for step in steps]
            (out / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in logged))

    run.commands = commands
    return run


# ------------------------------------------------------------------------------------- the arms
def test_every_arm_s_command_is_one_of_its_stage():
    """All flags go through the stages' own arguments; what ends with RLVR makes 140 updates."""
    seed = seed_of(run=None, show=True)
    for name, arm in arms.ARMS.items():
        _, script, *words = seed.command(name)
        stage = "rlvr" if name == "rubric" else STAGES[script].__name__
        assert flags_of(words, "config") == f"runs/tiny-{stage}.json"
        if arm.more:
            words = words[: words.index("--steps")]
        args = parse(STAGES[script].Args, words, with_paths=False)
        assert args.out == f"out/arms-tiny-7/{name}"
        assert (args.seed, args.max_response, args.resume) == (7, 160, True)
        if name == "rubric":
            assert (args.steps, args.prompts_per_step, args.group_size) == (40, 16, 8)
            assert (args.schedule, args.data) == ("cosine", "data/arms-tiny-7/align.jsonl")
        if script == "rlvr.py" and not arm.more:
            assert arms.counted_behind_sft(arms.ARMS, name) == 140
            assert args.steps == arm.updates and name.endswith(f"-{args.algo}")
        if script == "align.py":
            assert args.disc_init == "ckpt/base-tiny"


def test_what_arms_begin_with():
    commands = {name: seed_of(run=None, show=True).command(name) for name in arms.ARMS}
    for name, policy in {
        "sft": "ckpt/base-tiny",
        "half": "ckpt/base-tiny",
        "base-grpo": "ckpt/base-tiny",
        "base-align": "ckpt/base-tiny",
        "align": "out/arms-tiny-7/sft",
        "align-dense-grpo": "out/arms-tiny-7/align-dense",
        "refs-align": "out/arms-tiny-7/refs",
        "half-align": "out/arms-tiny-7/half",
        "sft-grpo-tokens": "out/arms-tiny-7/sft",  # the run itself, on
    }.items():
        assert flags_of(commands[name], "policy") == policy
    steps = {name: flags_of(commands[name], "steps") for name in ("align-short", "refs-align-grpo")}
    assert steps == {"align-short": "20", "refs-align-grpo": "60"}
    assert flags_of(commands["align-short-grpo"], "steps") == "120"
    assert flags_of(commands["base-grpo"], "steps") == "140"
    kinds = {"": "align", "-50": "align_50", "-300": "align_300"}
    kinds |= {"-mixed": "align_mixed", "-reversed": "align_reversed"}
    for kind, file in kinds.items():
        for arm in ("align", "refs"):
            data = flags_of(commands[f"{arm}{kind}"], "data")
            assert data == f"data/arms-tiny-7/{file}.jsonl"


def test_the_rival_s_variants():
    """Lower rates, and as long as alignment takes: RLVR behind it has what it has behind that."""
    files = {"": "align", "-reversed": "align_reversed", "-50": "align_50", "-300": "align_300"}
    for kind, file in files.items():
        seen = {}
        for variant in ("", "-slow", "-slower", "-time", "-long"):
            command = seed_of(run=None, show=True).command(f"refs{kind}{variant}")
            args = parse(sft.Args, command[2:], with_paths=False)
            assert (args.data, args.schedule) == (f"data/arms-tiny-7/{file}.jsonl", "cosine")
            assert args.policy == "out/arms-tiny-7/sft"
            behind = seed_of(run=None, show=True).command(f"refs{kind}{variant}-grpo")
            assert flags_of(behind, "policy") == f"out/arms-tiny-7/refs{kind}{variant}"
            seen[variant] = args.lr, args.steps, flags_of(behind, "steps")
        assert seen == {
            "": (1e-3, 40, "100"),
            "-slow": (3e-4, 40, "100"),
            "-slower": (1e-4, 40, "100"),
            "-time": (1e-3, 250, "100"),
            "-long": (1e-3, 400, "100"),
        }
    assert "align-reversed-grpo:refs-reversed-slow-grpo" in arms.TABLES["rivals-reversed"].pairs
    assert "align-grpo:refs-long-grpo" in arms.TABLES["rivals"].pairs
    assert "align-50-grpo:refs-50-time-grpo" in arms.TABLES["number"].pairs
    assert "refs-50-time-grpo" in arms.TABLES["number"].arms


def test_variants_change_what_they_say():
    seed = seed_of(run=None, show=True)

    def args_of(name):
        return parse(align.Args, seed.command(name)[2:], with_paths=False)

    plain = args_of("align")
    assert (plain.schedule, plain.std_floor, plain.disc) == ("cosine", 0.5, "moe")
    changed = {}
    for variant in arms.VARIANTS:
        args = args_of(f"align-{variant}")
        changed[variant] = {
            field: value
            for field, value in vars(args).items()
            if value != getattr(plain, field) and field != "out"
        }
    assert changed == {
        "dense": {"disc": "dense"},
        "experts": {"disc": "experts"},
        "blind": {"disc_blind": True},
        "whole": {"spans": "whole"},
        "sum": {"normalize": "sum"},
        "alpha0": {"alpha": 0.0},
        "alpha1": {"alpha": 1.0},
        "constant": {"schedule": "constant", "std_floor": 0.0},
        "nodecay": {"schedule": "constant"},
        "nofloor": {"std_floor": 0.0},
        "slow": {"lr": 5e-5},
        "group16": {"group_size": 16, "prompts_per_step": 8},
        "clip": {"score_clip": 1.0},
        "discslow": {"disc_lr": 1.5e-4},
        "discfast": {"disc_lr": 1.5e-3},
        "disc2": {"disc_updates": 2},
        "short": {"steps": 20},
        "long": {"steps": 120},
    }


def test_tables_compare_arms_that_they_have():
    assert ("base", *arms.TABLES["main"].arms) == compare.ARMS
    for table in arms.TABLES.values():
        there = arms.with_starts(table.arms)
        for pair in table.pairs:
            assert set(pair.split(":")) <= set(there)
        for place, name in enumerate(there):  # what an arm begins with comes before it
            assert arms.ARMS[name].start in ["base", *there[:place]]
    assert arms.with_starts(["sft-grpo-tokens"])[-1] == "sft-grpo-tokens"
    assert {"align", "align-grpo"} < set(arms.with_starts(["sft-grpo-tokens"]))
    for wrong in ("foo-grpo", "align-x", "refs-align-dense-grpo", "refs-grpo-tokens"):
        with pytest.raises(ValueError, match=f"there is no arm {wrong}"):
            arms.with_starts([wrong])


def test_a_rubric_is_scored_by_the_reference():
    def response(caption, think, answer):
        return (
            f"<caption>\n{caption}\n</caption>\n<think>\n{think}\n</think>\n"
            f"<answer>\n{answer}\n</answer>"
        )

    reference = response("tl red circle ; br blue square", "tl red circle 1 . so 1 .", 1)
    example = SimpleNamespace(
        response=reference, answer="1", choices=(), equivalent=(), where="f:1"
    )
    cases = {
        reference: (1, 1, 1),
        reference.replace(" ; ", "  ;\n").replace(" . ", "\n."): (1, 1, 1),  # white space alone
        response("br blue square ; tl red circle", "so 1 .", 1): (1, 1 / 2, 1),
        response("tl red circle ; tc red circle", "so 2 .", 2): (1 / 3, 0, 0),
        response("tl red circle ; tl red circle ; br blue square", "so 1 .", 2): (2 / 3, 1 / 2, 0),
        "no form": (0, 0, 0),
    }
    for text, (caption, reasoning, answer) in cases.items():
        verdict = rubric.judge(text, example)
        assert verdict["caption"] == pytest.approx(caption)
        assert verdict["reasoning"] == pytest.approx(reasoning)
        assert verdict["accuracy"] == answer
        assert verdict["reward"] == pytest.approx((caption + reasoning + answer) / 3)
    assert rubric.common([" "], []) == 1  # nothing in either


def test_the_rubric_is_the_reward_of_rlvr(monkeypatch, tmp_path):
    """A step is made with it, its shares are logged, and the log says what the reward was."""
    scene = (None,) * 8 + (("red", "circle"),)
    reference = scenes.good(scene, "count red")
    row = {"image": "a.png", "prompt": "count red", "answer": "1", "teacher_response": reference}
    scenes.paint(scene, random.Random(0), scenes.WORLDS["tiny"]).save(tmp_path / "a.png")
    data = tmp_path / "align.jsonl"
    data.write_text(json.dumps(row) + "\n")
    words = tmp_path / "words.json"
    words.write_text(json.dumps([{"text": scenes.vocabulary(scenes.WORLDS["tiny"])}]))
    init(ROOT / "runs/tiny.json", tmp_path / "init", [words])
    monkeypatch.setattr(rlvr, "verify", rlvr.verify)  # put back behind this test
    flags = ["--policy", str(tmp_path / "init"), "--data", str(data), "--steps", "1"]
    flags += ["--out", str(tmp_path / "out"), "--device", "cpu", "--max_response", "8"]
    flags += ["--prompts_per_step", "1", "--group_size", "2", "--save_every", "0"]
    monkeypatch.setattr(sys, "argv", ["rubric.py", *flags])
    runpy.run_path(str(ROOT / "tools/rubric.py"), run_name="__main__")
    header, step = [json.loads(line) for line in (tmp_path / "out/log.jsonl").open()]
    assert header["args"]["reward"] == "rubric"
    assert (step["caption"], step["reasoning"], step["reward"]) == (0, 0, 0)
    del row["teacher_response"]
    data.write_text(json.dumps(row) + "\n")
    monkeypatch.setattr(sys, "argv", ["rubric.py", *flags, "--out", str(tmp_path / "other")])
    with pytest.raises(SystemExit, match="rubric.py: .*align.jsonl:1: the reference is not"):
        runpy.run_path(str(ROOT / "tools/rubric.py"), run_name="__main__")


# -------------------------------------------------------------------------------------- one seed
def scripts(commands):
    return [(command[1], Path(flags_of(command, "out")).name) for command in commands]


def test_a_seed_is_made_in_order_and_only_what_is_missing(project):
    seed = seed_of(project)
    seed.make(["sft", "align"])
    assert scripts(project.commands) == [
        ("tools/scenes.py", "arms-tiny-7"),
        ("sft.py", "sft"),
        ("eval.py", "eval.json"),
        ("align.py", "align"),
        ("eval.py", "eval.json"),
    ]
    evaluation = project.commands[2]
    assert flags_of(evaluation, "policy") == "out/arms-tiny-7/sft"
    assert flags_of(evaluation, "limit") == "1000"
    assert flags_of(project.commands[0], "tests") == "1000"
    project.commands.clear()
    seed.make(["sft", "align", "refs"])
    assert scripts(project.commands) == [("sft.py", "refs"), ("eval.py", "eval.json")]
    # A broken one is named; one of other rows does not count.
    broken = Path("out/arms-tiny-7/refs/eval.json")
    broken.write_text("{")
    with pytest.raises(ValueError, match="arms-tiny-7/refs/eval.json: not JSON"):
        seed.missing(["refs"])
    project.commands.clear()
    seed.args.limit = 500
    assert seed.missing(["sft", "align"]) == ["sft", "align"]


def test_each_seed_behind_a_base_of_its_own(project):
    """The base is made first, and is where SFT and the discriminator begin; other runs than those
    behind the common base."""
    seed = seed_of(project, own_bases=True)
    seed.out.mkdir(parents=True)
    seed.make(["sft", "align"])
    first, *rest = project.commands
    assert first == ["bash", "runs/base.sh", "tiny", "7"]
    assert scripts(rest)[0] == ("tools/scenes.py", "arms-tiny-7")
    of_base, sft_run, align_run = rest[1], rest[2], rest[4]
    # It is evaluated as an arm, by a name that is the same at all seeds, and once.
    assert flags_of(of_base, "policy") == "out/arms-tiny-own-7/base"
    assert Path("out/arms-tiny-own-7/base").resolve() == Path("ckpt/base-tiny-7").resolve()
    project.commands.clear()
    seed.make(["sft", "align"])
    assert project.commands == [["bash", "runs/base.sh", "tiny", "7"]]
    assert flags_of(sft_run, "policy") == flags_of(align_run, "disc_init") == "ckpt/base-tiny-7"
    assert flags_of(sft_run, "out") == flags_of(align_run, "policy") == "out/arms-tiny-own-7/sft"
    assert seed_of(None, own_bases=True, number=0).base == "ckpt/base-tiny"  # of seed 0, too
    # The base's time counts until it is whole.
    other = seed_of(project, own_bases=True, number=8)
    args = argparse.Namespace(world="tiny", jobs=1, own_bases=True)
    assert arms.minutes([other], ["sft"], args) == 10  # 510 + 90 s
    Path("ckpt/base-tiny-8").mkdir(parents=True)
    Path("ckpt/base-tiny-8/whole").touch()
    assert arms.minutes([other], ["sft"], args) == 2


def test_few_references_are_the_first_rows(project):
    seed_of(project).make([])
    rows = Path("data/arms-tiny-7/align.jsonl").read_text().splitlines()
    for number in (50, 300):
        first = Path(f"data/arms-tiny-7/align_{number}.jsonl").read_text().splitlines()
        assert first == rows[:number]


def test_references_that_a_world_has_not_are_named():
    arms.expect_references(["sft", "align-50", "align-mixed"], "tiny")
    arms.expect_references(["sft", "align-50", "refs-300-grpo"], "known")
    with pytest.raises(ValueError, match="known has no align_mixed.jsonl, which refs-mixed"):
        arms.expect_references(["sft", "refs-mixed"], "known")


def test_the_run_at_equal_tokens_goes_on_from_a_copy(project, monkeypatch):
    seed = seed_of(project)
    seed.make(["sft", "sft-grpo", "align", "align-grpo"])
    monkeypatch.setattr(arms.budget, "generated", lambda runs: 150 * 24 * 8 * 40)
    out = Path("out/arms-tiny-7")
    project.commands.clear()

    def fail(source, to, **_):
        to.mkdir()
        raise OSError("no space")

    with monkeypatch.context() as patch:
        patch.setattr(arms.shutil, "copytree", fail)
        with pytest.raises(OSError, match="no space"):
            seed.make(["sft-grpo-tokens"])
    assert not (out / "sft-grpo-tokens").exists() and not project.commands
    seed.make(["sft-grpo-tokens"])  # what the failure left is not in its way
    command = project.commands[0]
    assert flags_of(command, "steps") == "150"
    assert flags_of(command, "policy") == "out/arms-tiny-7/sft"
    assert not list(out.glob(".*part"))
    # A run that has gone too far already begins anew.
    monkeypatch.setattr(arms.budget, "generated", lambda runs: 100 * 24 * 8 * 40)
    arms.shutil.rmtree(out / "sft-grpo-tokens")
    assert flags_of(seed.command("sft-grpo-tokens"), "steps") == "100"
    assert not (out / "sft-grpo-tokens").exists()


def test_a_copy_is_the_run_without_its_evaluation(project, monkeypatch):
    seed = seed_of(project)
    seed.make(["sft", "sft-grpo", "align", "align-grpo"])
    monkeypatch.setattr(arms.budget, "generated", lambda runs: 150 * 24 * 8 * 40)
    seed.command("sft-grpo-tokens")
    left = [path.name for path in Path("out/arms-tiny-7/sft-grpo-tokens").iterdir()]
    assert left == ["log.jsonl"]


def test_a_run_with_other_settings_is_no_arm_of_today(project):
    """After a change of settings an old run would be one arm among new ones."""
    seed = seed_of(project)
    names = ["sft", "align", "align-slow", "align-grpo", "sft-grpo", "base-grpo", "rubric"]
    names.append("sft-grpo-tokens")  # of which the tokens say how many updates
    seed.make(names)
    assert seed.missing(names) == []
    log = Path("out/arms-tiny-7/align-slow/log.jsonl")
    whole = log.read_text()
    for old, new, why in (
        ('"lr": 5e-05', '"lr": 0.00015', "--lr 0.00015, the arm has 5e-05 today"),
        ('"std_floor": 0.5', '"std_floor": 0.0', "--std_floor 0.0, the arm has 0.5"),
        ('"disc": "moe"', '"disc": "dense"', "--disc dense, the arm has moe"),  # by its default
        ('"steps": 40', '"steps": 41', "--steps 41"),
        ('"seed": 7', '"seed": 8', "--seed 8"),
    ):
        assert old in whole
        log.write_text(whole.replace(old, new))
        with pytest.raises(ValueError, match=f"align-slow: its log has {why}"):
            seed.missing(["sft", "align-slow"])
        assert seed.missing(["sft", "align"]) == []
    log.write_text(whole.replace('"balance": 0.01, ', ""))  # a run before the flag was there
    assert seed.missing(["align-slow"]) == []


def test_what_a_stop_left_of_a_log_is_gone_on_with(project):
    """A header without a step, half a header, half a step: the stage mends them with --resume."""
    seed = seed_of(project)
    seed.make(["sft", "align"])
    log = Path("out/arms-tiny-7/align/log.jsonl")
    header, first, *_ = log.read_text().splitlines()
    Path("out/arms-tiny-7/align/eval.json").unlink()
    for left in (f"{header}\n", header[:50], f"{header}\n{first[:5]}", ""):
        log.write_text(left)
        assert seed.missing(["sft", "align"]) == ["align"]


def test_an_arm_older_than_its_start_is_an_error(project):
    seed = seed_of(project)
    seed.make(["sft", "align"])
    log = Path("out/arms-tiny-7/sft/log.jsonl")
    header, *steps = log.read_text().splitlines()
    later = json.dumps(json.loads(header) | {"time": 2e9})
    log.write_text("\n".join([later, *steps]))
    with pytest.raises(ValueError, match="arms-tiny-7/align is older than sft"):
        seed.missing(["sft", "align"])
    assert seed.missing(["sft"]) == []


def test_files_that_an_arm_needs_are_named(project):
    seed = seed_of(project)
    seed.make(["sft"])
    Path("data/arms-tiny-7/align_mixed.jsonl").unlink()
    with pytest.raises(ValueError, match="align_mixed.jsonl is missing.*remove data/arms-tiny-7"):
        seed.make(["sft", "refs-mixed"])
    Path("out/arms-tiny-7/sft/log.jsonl").unlink()
    with pytest.raises(ValueError, match="sft: an eval.json without the run's log.jsonl"):
        seed.missing(["sft"])
    few = Path("data/arms-tiny-7/align.jsonl")
    few.write_text("{}\n" * 299)
    with pytest.raises(ValueError, match="align.jsonl has 299 rows, 300 are needed"):
        seed.make([])


def test_the_expected_time_is_of_what_is_missing(project):
    seed = seed_of(project)
    args = argparse.Namespace(world="tiny", jobs=1, own_bases=False)
    # An evaluation is 30 s, SFT 60 s, alignment 30 s and 1.5 s an update, GRPO 0.8 s an update.
    assert arms.minutes([seed], ["sft"], args) == 2
    assert arms.minutes([seed], ["sft", "align", "align-grpo"], args) == 6  # 90 + 120 + 110 s
    assert arms.minutes([seed], ["sft-grpo-tokens"], args) == 4
    args.world = "known"
    assert arms.minutes([seed], ["sft", "align", "align-grpo"], args) == 8
    seed.make(["sft"])
    args.world = "tiny"
    assert arms.minutes([seed], ["sft", "align", "align-grpo"], args) == 4


# -------------------------------------------------------------------------------- all of them
def test_what_fails_is_named_with_its_last_line(project, tmp_path):
    args = argparse.Namespace(world="tiny", limit=1000, show=False, own_bases=False)
    Path("sft.py").write_text("import sys\nprint('not enough')\nsys.exit(3)\n")
    (tmp_path / "tools").mkdir()
    making = "import pathlib, sys\nout = pathlib.Path(sys.argv[sys.argv.index('--out') + 1])\n"
    making += "out.mkdir(parents=True)\n(out / 'align.jsonl').write_text('{}\\n' * 1500)\n"
    making += "(out / 'sft.json').write_text('[]')\n"
    Path("tools/scenes.py").write_text(making + "(out / 'words.json').write_text('[]')\n")
    reason = arms.make_seed(3, args, ["sft", "align"], arms.Runner())
    assert reason == "sft.py ended with 3: not enough (more in out/arms-tiny-3/log.txt)"


def test_a_seed_belongs_to_one_process(project):
    args = argparse.Namespace(world="tiny", limit=1000, show=False, own_bases=False)
    folder = Path("out/arms-tiny-3")
    folder.mkdir(parents=True)
    with open(folder / ".lock", "w") as lock:
        arms.fcntl.flock(lock, arms.fcntl.LOCK_EX)
        reason = arms.make_seed(3, args, [], arms.Runner())
    assert reason == "another process is at work in out/arms-tiny-3"


def test_a_stop_ends_what_runs_and_begins_nothing(tmp_path):
    runner = arms.Runner()
    log = tmp_path / "log.txt"
    timer = threading.Timer(0.3, runner.stop)
    timer.start()
    begin = time.monotonic()
    with pytest.raises(arms.Stopped):
        runner.run([sys.executable, "-c", "import time; time.sleep(60)"], log)
    assert time.monotonic() - begin < 30
    with pytest.raises(arms.Stopped):
        runner.run([sys.executable, "-c", "print('begun')"], log)
    assert "\nbegun" not in log.read_text()


def test_a_stop_ends_what_a_script_has_begun(tmp_path):
    """runs/base.sh runs stages: they end with it."""
    pid = tmp_path / "pid"
    script = f"{sys.executable} -c 'import time; time.sleep(60)' & echo $! > {pid}; wait"
    runner = arms.Runner()
    threading.Timer(0.3, runner.stop).start()
    begin = time.monotonic()
    with pytest.raises(arms.Stopped):
        runner.run(["bash", "-c", script], tmp_path / "log.txt")
    assert time.monotonic() - begin < 30
    state = ["ps", "-o", "stat=", "-p", pid.read_text().strip()]
    deadline = time.monotonic() + 10
    while subprocess.run(state, capture_output=True, text=True).stdout.strip("Z+\n "):
        assert time.monotonic() < deadline, "what the script has begun still runs"
        time.sleep(0.02)


def test_the_script_from_the_shell(tmp_path, monkeypatch, capsys):
    """--show runs nothing; a broken file or a wrong value is one message."""

    def run(*arguments):
        command = [sys.executable, str(ROOT / "tools/arms.py"), *arguments]
        return subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)

    done = run("--show", "--world", "tiny", "--seeds", "0-2,5,1", "--arms", "refs")
    assert done.returncode == 0, done.stderr
    runs = [line.split("--out ")[1].split()[0] for line in done.stdout.splitlines()]
    assert [line for line in runs if line.endswith("/refs")] == [
        f"out/arms-tiny-{seed}/refs" for seed in (0, 1, 2, 5)
    ]
    assert not list(tmp_path.iterdir())
    broken = tmp_path / "out/arms-tiny-9/sft/eval.json"
    broken.parent.mkdir(parents=True)
    broken.write_text("{")
    (tmp_path / "runs").symlink_to(ROOT / "runs")
    words = seed_of(None, show=True, number=9).command("sft")[2:]
    args = vars(parse(sft.Args, words, with_paths=False))
    (broken.parent / "log.jsonl").write_text(json.dumps({"args": args, "time": 1}) + "\n")
    done = run("--show", "--world", "tiny", "--seeds", "9", "--arms", "sft")
    assert done.returncode == 1 and "sft/eval.json: not JSON" in done.stderr
    assert "Traceback" not in done.stderr
    for wrong, why in (
        (("--seeds", "x"), "write 0-9"),
        (("--seeds", "3-1"), "3-1 names no seed"),
        (("--jobs", "0"), "1 or more"),
        (("--world", "x"), "invalid choice"),
        (("--arms", "x"), "there is no arm x"),
        (("--world", "known", "--arms", "align-mixed"), "has no align_mixed.jsonl"),
    ):
        monkeypatch.setattr(sys, "argv", ["arms.py", *wrong])
        with pytest.raises(SystemExit) as end:
            arms.main()
        assert end.value.code == 2 and why in capsys.readouterr().err.splitlines()[-1]


def test_jobs_share_the_seeds_and_a_failure_is_the_exit_status(project, monkeypatch, capsys):
    made = []

    def make_seed(number, args, names, runner):
        made.append((number, threading.active_count()))
        time.sleep(0.05)
        return "no luck" if number == 1 else None

    monkeypatch.setattr(arms, "make_seed", make_seed)
    before = {name: signal.getsignal(name) for name in (signal.SIGTERM, signal.SIGINT)}
    try:
        with pytest.raises(SystemExit, match="not all seeds are whole"):
            arms.run_all(argparse.Namespace(jobs=2, seeds=[0, 1, 2, 3]), ["sft"])
    finally:
        for name, handler in before.items():
            signal.signal(name, handler)
    assert sorted(number for number, _ in made) == [0, 1, 2, 3]
    assert "seed 1: no luck" in capsys.readouterr().err


def test_the_shell_script_hands_its_flags_over():
    text = (ROOT / "runs/miniature.sh").read_text()
    assert 'exec python tools/arms.py "$@"' in text
