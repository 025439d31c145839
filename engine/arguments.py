"""
Arguments: a stage's dataclass becomes its command line.

Batch sizes on the command line are global (prompts or pairs of one step over all ranks), the same at any number of
ranks; only `--pack_tokens` is per device, it bounds memory and changes no result.
"""

import argparse
import difflib
import inspect
import json
import re
import sys
from dataclasses import MISSING, dataclass, fields, is_dataclass
from pathlib import Path
from typing import Literal, get_args, get_origin, get_type_hints


@dataclass(kw_only=True)
class Common:
    """Arguments of every stage; its `Args` inherits them. The comment behind a field is its help text."""

    policy: str  # checkpoint to start from: a Qwen3-VL folder in transformers layout, as an earlier stage's <out>/last
    data: str  # the rows to train on: JSON, JSONL or parquet
    out: str  # run folder: log and checkpoints
    seed: int = 0  # of weights, order of the data and rollouts
    steps: int = 500  # updates in all
    lr: float = 1e-6  # peak learning rate of the policy
    weight_decay: float = 0.01  # AdamW's, on matrices only
    schedule: Literal["constant", "cosine"] = (
        "constant"  # of the learning rate after its warm-up; cosine ends at 0
    )
    warmup: float = (
        0.0  # of the learning rate, linear: below 1 a share of all steps, else a number of steps
    )
    grad_clip: float = 1.0  # largest global gradient norm
    max_prompt: int = (
        2048  # tokens, image tokens included; longer prompts are left out and counted, never cut
    )
    max_response: int = 6144  # tokens, end token included
    max_pixels: int | None = (
        None  # of one image, larger ones are scaled down; none: the image processor's own limit
    )
    pack_tokens: int = 16384  # of one model call, per device
    log_every: int = 1  # steps between printed lines; log.jsonl gets every step
    sample_every: int = (
        50  # steps between rollouts that are printed, and kept in rollouts.jsonl; 0: never
    )
    max_bad: int = 100  # rows that cannot be used; with more of them the run stops
    image_root: str | None = (
        None  # folder that image paths are relative to and stay in; none: the data file's
    )
    save_every: int = 100  # steps between checkpoints; 0: only the last
    resume: bool = False  # continue from the checkpoint in --out; starts afresh where there is none
    wandb: str = ""  # Weights & Biases project to log to as well
    tensorboard: bool = False  # write the scalars to <out>/tensorboard as well
    config: str = ""  # JSON file of arguments, as a run's last/meta.json, which is run again; flags given here win
    checkpointing: bool = (
        False  # compute activations again in the backward pass: less memory, a third more time
    )
    offload: bool = False  # keep parameters and optimiser on the CPU between uses: less memory on the device, slow
    nodes: int = 0  # FSDP shards within a node and replicates over nodes; 0: as many as torchrun's; 1: shards over all ranks
    dry_run: bool = False  # print the memory that a rank of WORLD_SIZE needs, and end; of --policy only config.json is read
    device: Literal["auto", "cpu", "cuda"] = "auto"  # auto: cuda where there is one
    dtype: Literal["float32", "bfloat16"] = (
        "float32"  # of matrix products; parameters and optimiser stay float32
    )

    def __post_init__(self):
        for name, value in vars(self).items():
            least = (
                1
                if name in ("steps", "max_prompt", "max_response", "pack_tokens", "log_every")
                else 0
            )
            if isinstance(value, int | float) and not value >= least:
                raise ValueError(f"--{name} is {value}: it must be {least} or more")


def _option(kind):
    """Type of a field -> what add_argument needs for it."""
    inner = [k for k in get_args(kind) if k not in (type(None), Ellipsis)]
    if get_origin(kind) is Literal:
        return {"choices": inner, "type": type(inner[0])}
    if get_origin(kind) is tuple:
        return {"type": inner[0], "nargs": len(inner) if len(inner) > 1 else "+"}
    if inner in ([int], [float], [str]):  # or None
        return {
            "type": lambda text: None if text.lower() == "none" else inner[0](text),
            "metavar": inner[0].__name__,
        }
    if kind is bool:
        return {"action": argparse.BooleanOptionalAction}
    return _option(inner[0]) if inner else {"type": kind}


def parse(Args, argv=None):
    """Command line (`argv`, or the process's own) -> `Args`. Wrong flags, values, combinations end in a usage error."""
    style = type(
        "_", (argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter), {}
    )
    parser = argparse.ArgumentParser(formatter_class=style, allow_abbrev=False)
    parser.description = sys.modules[Args.__module__].__doc__
    own, shared = (
        parser.add_argument_group("of this script"),
        parser.add_argument_group("of every stage"),
    )
    sources = [inspect.getsource(base) for base in reversed(Args.__mro__) if is_dataclass(base)]
    comments = dict(
        re.findall(r"^    (\w+): .*?  # (.+)$", "\n".join(sources), re.MULTILINE)
    )  # redeclared: the last
    common = [f.name for f in fields(Common)] if issubclass(Args, Common) else []
    kinds = get_type_hints(Args)
    for f in fields(Args):
        option = _option(kinds[f.name]) | {"help": comments.get(f.name, "").replace("%", "%%")}
        option |= {"required": True} if f.default is MISSING else {"default": f.default}
        (shared if f.name in common else own).add_argument(f"--{f.name}", **option)
    argv = sys.argv[1:] if argv is None else argv
    first = argparse.ArgumentParser(prog=parser.prog, add_help=False, allow_abbrev=False)
    first.add_argument("--config")
    args = first.parse_known_args(argv)[0]
    if args.config and "config" in kinds:
        argv = [*_flags(args.config, Args, parser), *argv]  # of two flags the last counts
        parser.prog += f" --config {args.config}"  # leads each error message
    flags = list(parser._option_string_actions)
    for flag in [
        a.split("=")[0] for a in argv if a.startswith("--") and a.split("=")[0] not in flags
    ]:
        near = difflib.get_close_matches(flag, flags, 1) or ["--help"]
        parser.error(
            f"there is no {flag}: did you mean {near[0]}?"
        )  # before argparse complains about anything else
    try:
        return Args(
            **{
                k: tuple(v) if isinstance(v, list) else v
                for k, v in vars(parser.parse_args(argv)).items()
            }
        )
    except ValueError as error:
        parser.error(str(error))


def _flags(path, Args, parser):
    """The arguments in the file of --config as flags; what is at its default needs none. Any fault is a usage error."""
    try:
        config = json.loads(Path(path).read_text())
        config = dict(config.get("args", config))  # of a meta.json
    except (OSError, ValueError, TypeError, AttributeError) as error:
        parser.error(
            f"--config {path}: not a JSON file of arguments, as a run's last/meta.json is ({error})"
        )
    defaults, flags = {f.name: f.default for f in fields(Args)}, []
    if odd := [name for name in config if name not in defaults]:
        near = [f"did you mean {x}?" for x in difflib.get_close_matches(odd[0], defaults, 1)] or [
            "is it of another script?"
        ]
        parser.error(f"--config {path}: {parser.prog} has no {', '.join(odd)}: {near[0]}")
    for name, value in config.items():
        value = value if isinstance(value, list) else [value]
        if tuple(value) not in ((defaults[name],), defaults[name]):
            switch = any(isinstance(v, bool) for v in value)
            flags += (
                [f"--{'' if value[0] else 'no-'}{name}"]
                if switch
                else [f"--{name}", *map(str, value)]
            )
    return flags
