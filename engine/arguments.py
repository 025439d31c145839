"""
The fields of a stage's dataclass become its command line: `option` declares one, `parse` reads
them.

Batch sizes on the command line are global (prompts or pairs of one step over all ranks), the same
at any number of ranks; only `--pack_tokens` is per device, it bounds memory and changes no result.
"""

import argparse
import difflib
import glob
import inspect
import json
import math
import os
import signal
import sys
import time
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Literal, get_args, get_origin, get_type_hints

USAGE_ERROR = 2  # exit status, as argparse's


def option(default=MISSING, help="", least=0, above=None):
    """A field of an `Args`: without a default it is required. `check` holds numbers to `least` or
    more, or `above`."""
    return field(default=default, metadata={"help": help, "least": least, "above": above})


def check(args):
    """Raise ValueError for the first number in the dataclass `args` that is not finite or not
    within its bounds."""
    for f in fields(args):
        value = getattr(args, f.name)
        least = f.metadata.get("least", 0)
        above = f.metadata.get("above")
        for number in value if isinstance(value, tuple) else (value,):
            if not isinstance(number, int | float):
                continue
            if not math.isfinite(number):
                raise ValueError(f"--{f.name} is {number}: it must be a finite number")
            if above is not None and number <= above:
                raise ValueError(f"--{f.name} is {number}: it must be above {above}")
            if number < least:
                raise ValueError(f"--{f.name} is {number}: it must be {least} or more")


def changes(before, args):
    """In words, which values of the dataclass `args` are not those of the dict `before`, as a
    checkpoint's meta.json has it; --resume and --config, which say how to begin, do not count.
    """
    now = json.loads(json.dumps(vars(args)))  # as JSON has it: a tuple is a list
    words = []
    for name, value in now.items():
        if name not in ("resume", "config") and before.get(name) != value:
            words.append(f"--{name} {value} (was {before.get(name)})")
    return ", ".join(words)


@dataclass(kw_only=True)
class Common:
    """The arguments of every stage; its `Args` inherits them, and redeclares what has another
    default there."""

    GROUP = "of every stage"  # their heading in --help

    policy: str = option(
        help="checkpoint to start from: a folder in transformers layout (docs/models.md), as an "
        "earlier stage's <out>/last, a run folder, or a hub name"
    )
    data: str = option("", "the rows to train on: JSON, JSONL or parquet; none: the embedded world")
    out: str = option("", "run folder: log and checkpoints; none: ckpt/<stage>")
    seed: int = option(0, "of weights, order of the data and rollouts")
    steps: int = option(500, "updates in all", least=1)
    lr: float = option(1e-6, "peak learning rate of the policy")
    weight_decay: float = option(0.01, "AdamW's, on matrices only")
    schedule: Literal["constant", "cosine"] = option(
        "constant", "of the learning rate after its warm-up; cosine ends at 0"
    )
    warmup: float = option(
        0.0, "of the learning rate, linear: below 1 a share of all steps, else a number of steps"
    )
    grad_clip: float = option(1.0, "largest global gradient norm", above=0)
    max_prompt: int = option(
        2048,
        "tokens, image tokens included; longer prompts are left out and counted, never cut",
        least=1,
    )
    max_response: int = option(6144, "tokens, end token included", least=1)
    max_pixels: int | None = option(
        None,
        "of one image, larger ones are scaled down; none: the image processor's own limit",
        least=1,
    )
    max_side: int | None = option(
        None, "pixels, of one image's longer side; larger ones are scaled down", least=1
    )
    pack_tokens: int = option(16384, "of one model call, per device", least=1)
    log_every: int = option(1, "steps between printed lines; log.jsonl gets every step", least=1)
    sample_every: int = option(
        50, "steps between rollouts that are printed, and kept in rollouts.jsonl; 0: never"
    )
    max_bad: int = option(100, "rows that cannot be used; with more of them the run stops")
    image_root: str | None = option(
        None, "folder that image paths are relative to and stay in; none: the data file's"
    )
    workers: int = option(
        2,
        "threads per process that read and encode the next step's rows, and as many that verify "
        "rollouts, while the device computes; 0: the main thread does it in between",
    )
    freeze_vision: bool = option(False, "train neither the vision tower nor its mergers")
    eval_data: str = option(
        "", "rows that are not trained on, to validate on while training; none: no validation"
    )
    eval_every: int = option(
        50, "steps between validations; there is one before the first and after the last step too"
    )
    eval_rows: int = option(200, "rows of --eval_data, from its start; 0: all")
    save_every: int = option(100, "steps between checkpoints; 0: only the last")
    keep_every: int = option(
        0, "steps between checkpoints that stay, in <out>/step-000200 and so on; 0: none"
    )
    keep_best: Literal["eval/accuracy", "eval/format"] | None = option(
        None, "metric of the validation: the checkpoint with its best value stays in <out>/best"
    )
    keep_resume: bool = option(
        False, "keep the optimiser with the checkpoints that stay: they take four times the room"
    )
    resume: bool = option(
        False, "continue from the checkpoint in --out; starts afresh where there is none"
    )
    wandb: str = option("", "Weights & Biases project to log to as well")
    tensorboard: bool = option(False, "write the scalars to <out>/tensorboard as well")
    config: str = option(
        "",
        "JSON file of arguments, as a run's last/meta.json, to run it again; flags given here win",
    )
    checkpointing: bool = option(
        False, "compute activations again in the backward pass: less memory, a third more time"
    )
    offload: bool = option(
        False,
        "keep parameters and optimiser on the CPU between uses: less memory on the device, slow",
    )
    nodes: int = option(
        0,
        "FSDP shards within a node and replicates over nodes; 0: as many as torchrun's; "
        "1: shards over all ranks",
    )
    device: Literal["auto", "cpu", "cuda"] = option("auto", "auto: cuda where there is one")
    dtype: Literal["float32", "bfloat16"] = option(
        "float32", "of matrix products; parameters and optimiser stay float32"
    )

    def __post_init__(self):
        self.out = self.out or f"ckpt/{stage_file(type(self)).stem}"
        check(self)
        if self.keep_best and not self.eval_data:
            raise ValueError(f"--keep_best {self.keep_best} needs --eval_data to validate on")


def stage_file(Args):
    """The file that an `Args` is written in: its stem is the stage's name."""
    return Path(inspect.getfile(Args))


def parse(Args, argv=None, with_paths=True):
    """Read the command line (`argv`, or the process's own) as an `Args`.

    A wrong flag, value or combination of values (ValueError of `Args`) ends the process with one
    message, see `end`. Without --data and --config a stage takes the embedded world's arguments,
    runs/tiny-<stage>.json beside it. with_paths: whether a stage's files are looked for; where
    only its settings matter they need not be there.
    """
    argv = sys.argv[1:] if argv is None else list(argv)
    parser = make_parser(Args)
    refuse_unknown_flags(parser, argv)
    config, embedded = find_config(Args, argv)
    if config:
        if not embedded:
            parser.source = f" --config {config}"
        argv = [*flags_in(config, Args, parser), *argv]  # of two flags the last one counts
    given = vars(parser.parse_args(argv))
    for name, value in given.items():
        if isinstance(value, list):
            given[name] = tuple(value)
    if config:
        given["config"] = config
    try:
        args = Args(**given)
        if isinstance(args, Common) and with_paths:
            look_at_paths(args, embedded)
    except ValueError as error:
        parser.error(str(error))
    if embedded and is_first_rank():
        where = f"the embedded world, {args.data}, with the sizes of {args.config}"
        print(f"no --data: {where}", flush=True)
    return args


# ---------------------------------------------------------------------------------- the parser
class Parser(argparse.ArgumentParser):
    """One message per fault and one manual, however many processes there are."""

    source = ""  # of the arguments, where they are in a file too

    def error(self, message):
        end(f"{self.prog}{self.source}: {message}")

    def print_help(self, file=None):
        if is_first_rank():
            super().print_help(file)


def make_parser(Args):
    """An argparse parser of the fields of `Args`, with the docstring of its file as manual. What
    is not given on the command line is not in the parsed namespace either: it keeps the default of
    the field."""
    parser = Parser(
        prog=stage_file(Args).name,
        description=sys.modules[Args.__module__].__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,
    )
    groups = {}
    for title in ("of this script", *[base.GROUP for base in shared_by(Args)]):
        groups[title] = parser.add_argument_group(title)
    kinds = get_type_hints(Args)
    for f in fields(Args):
        group = groups["of this script"]
        for base in shared_by(Args):
            if f.name in base.__dataclass_fields__:
                group = groups[base.GROUP]
        settings = settings_of(kinds[f.name])
        group.add_argument(
            f"--{f.name}", help=help_of(f), required=f.default is MISSING, **settings
        )
    return parser


def shared_by(Args):
    """The dataclasses that `Args` inherits arguments from: Common, or another with a GROUP."""
    return [base for base in Args.__mro__[1:] if hasattr(base, "GROUP")]


def help_of(f):
    text = f.metadata.get("help", "")
    if f.default not in (MISSING, None, "", ()):
        default = " ".join(map(str, f.default)) if isinstance(f.default, tuple) else f.default
        text = f"{text} (default: {default})"
    return text.replace("%", "%%")


def settings_of(kind):
    """What argparse's add_argument needs for a field of the type `kind`."""
    may_be_none = type(None) in get_args(kind)
    if may_be_none:
        (kind,) = [one for one in get_args(kind) if one is not type(None)]
    if kind is bool:
        return {"action": argparse.BooleanOptionalAction}
    if get_origin(kind) is Literal:
        choices = get_args(kind)
        return {"choices": choices, "type": type(choices[0])}
    if get_origin(kind) is tuple:
        inner = get_args(kind)
        number = "+" if inner[-1] is Ellipsis else len(inner)
        return {"type": inner[0], "nargs": number, "metavar": inner[0].__name__}
    return {"type": or_none(kind) if may_be_none else kind, "metavar": kind.__name__}


def or_none(kind):
    """The type `kind` for argparse, with the word "none" for None."""

    def read(text):
        return None if text.lower() == "none" else kind(text)

    read.__name__ = kind.__name__  # argparse's messages have it
    return read


def refuse_unknown_flags(parser, argv):
    """Before argparse complains about anything else: most often a flag is misspelt. Abbreviations
    are refused too: a later flag could change what they mean."""
    known = list(parser._option_string_actions)
    for word in argv:
        flag = word.split("=")[0]
        if flag.startswith("--") and flag not in known:
            near = difflib.get_close_matches(flag, known, 1)
            mend = f": did you mean {near[0]}?" if near else ""
            parser.error(f"there is no {flag}{mend} (--help lists all)")


# -------------------------------------------------------------------------------------- --config
def find_config(Args, argv):
    """The file of arguments to read, or "" -> (path, whether it is the embedded world's)."""
    stage = stage_file(Args)
    tiny = stage.parent / "runs" / f"tiny-{stage.stem}.json"
    first = Parser(prog=stage.name, add_help=False)
    first.add_argument("--config", default="")
    first.add_argument("--data", nargs="*")
    known = first.parse_known_args(argv)[0]
    if known.config or known.data is not None:
        return known.config, False
    if issubclass(Args, Common) and tiny.exists():
        return os.path.relpath(tiny), True
    return "", False


def flags_in(path, Args, parser):
    """The arguments in the file of --config as flags, so that they are checked as flags are. What
    is at its default needs none."""
    try:
        values = json.loads(Path(path).read_text(encoding="utf-8"))
        values = dict(values.get("args", values))  # a meta.json holds more than the arguments
    except (OSError, ValueError, TypeError, AttributeError) as error:
        parser.error(f"not a JSON file of arguments, as a run's last/meta.json is ({error})")
    defaults = {f.name: f.default for f in fields(Args)}
    unknown = [name for name in values if name not in defaults]
    if unknown:
        near = difflib.get_close_matches(unknown[0], defaults, 1)
        mend = f"did you mean {near[0]}?" if near else "is it of another script or version?"
        parser.error(f"{stage_file(Args).name} has no {', '.join(unknown)}: {mend}")
    flags = []
    for name, value in values.items():
        if isinstance(value, list):
            value = tuple(value)
        if value != defaults[name]:
            flags += flags_of(name, value)
    return flags


def flags_of(name, value):
    if isinstance(value, bool):
        return [f"--{name}" if value else f"--no-{name}"]
    if isinstance(value, tuple):
        return [f"--{name}", *map(str, value)]
    return [f"--{name}={value}"]


# --------------------------------------------------------------------------------------- paths
HUB_DATA = "hf://datasets/"  # begins a data file's name on the hub, as other tools write it


def look_at_paths(args, embedded):
    """ValueError for what a stage would only find out once its model is loaded, or after its
    warm-up: a file or a folder that is not there, an --out that holds a run already."""
    if not args.data:
        raise ValueError("--data is missing: the rows to train on")
    if embedded and not Path(args.data).exists():
        raise ValueError(f"{args.data} is not there: `bash runs/tiny.sh` makes it; or give --data")
    if args.image_root is not None and not Path(args.image_root).is_dir():
        raise ValueError(f"--image_root {args.image_root}: no such folder")
    for name in ("policy", "disc_init", "disc_path"):
        path = getattr(args, name, "")  # the last two are align.py's
        if path and not Path(path).exists() and not may_be_on_the_hub(path):
            raise ValueError(f"--{name} {path}: no such folder (and no model on the hub)")
    for name in ("data", "eval_data", "pairs"):
        path = getattr(args, name, "")
        if path and is_missing(path):
            raise ValueError(f"--{name} {path}: no such file")
    for folder in (args.out, f"{args.out}/warmup"):
        if overwrites(folder, args.resume):
            raise ValueError(overwrites(folder, args.resume))


def is_missing(path):
    """Whether no data file is there under this name, as engine.files.find_data reads it. The hub's
    are not asked for."""
    if path.startswith(HUB_DATA):
        return False
    return not Path(path).exists() and not ("*" in path and glob.glob(path))


def may_be_on_the_hub(path):
    """Names of models there have at most one slash: owner/name."""
    return not str(path).startswith((".", "/", "ckpt")) and str(path).count("/") <= 1


def overwrites(folder, resume):
    """Why a run may not write its log to that folder, or "" where it may."""
    log = Path(folder, "log.jsonl")
    if resume or not log.exists():
        return ""
    return f"{log} exists: continue that run with --resume, remove it, or change --out"


# ------------------------------------------------------------------------------------- the end
def is_first_rank():
    """Before there is a process group: the environment says it."""
    return os.environ.get("RANK", "0") == "0"


def end(message):
    """Print `message` to stderr, once, whatever the number of processes, and end with the status
    of a usage error.

    Under torchrun all processes find the same error. Its agent, their parent, would tell that they
    failed in fifty lines, below which nobody sees the one that matters; no exit status of a
    process and no signal that the agent handles keeps it from that. So the first process on each
    node ends the agent with SIGKILL, after the message is out. The others say nothing, and wait
    for that: a process that ended before would have the agent end them all, the one with the
    message too.
    """
    if is_first_rank():
        print(message, file=sys.stderr, flush=True)
    if os.environ.get("LOCAL_RANK", "0") != "0":
        while is_torchrun(os.getppid()):
            time.sleep(0.1)
    elif is_torchrun(os.getppid()) and shares_our_terminal(os.getppid()):
        os.kill(os.getppid(), signal.SIGKILL)
    sys.exit(USAGE_ERROR)


def is_torchrun(pid):
    """Whether a parent process is torchrun itself, and no shell or notebook in between. False where
    the system has no /proc."""
    command = Path(f"/proc/{pid}/cmdline")
    if "TORCHELASTIC_RUN_ID" not in os.environ or not command.exists():
        return False
    words = command.read_text().split("\0")
    return any(Path(word).name in ("torchrun", "torch.distributed.run") for word in words)


def shares_our_terminal(pid):
    """False where our messages pass through that process, as through torchrun with --tee: it would
    be ended before it has shown them."""
    return os.path.samefile(f"/proc/{pid}/fd/2", "/proc/self/fd/2")
