"""
How many tokens runs have generated, and how many updates of another run generate as many.

    python tools/budget.py out/a/align out/a/align-grpo
    python tools/budget.py out/a/align out/a/align-grpo --as_updates_of out/a/sft-grpo

The first prints the tokens that runs of alignment and RLVR have sampled, all together. Alignment's
warm-up logs no lengths: its rollouts, which are of the policy that the game begins with, are taken
to be as long as those of the game's first step. They are those of its updates, and those of the
held-out rows that it samples once before them: a tenth of the rows of its --data, at most 64. The
log does not say how many rows that file has: of a .jsonl file that is still there the lines are
counted, else 64 held-out rows are assumed. The second prints the number of updates after which the
run named last has generated as many, or would have, had it gone on as in its last 20 updates.
"""

import argparse
import math
import signal
import sys
from itertools import accumulate
from pathlib import Path
from statistics import mean

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from tools.compare import json_object, number  # noqa: E402

LAST = 20  # updates by which a run is continued
HELD_OUT = 64  # align.py's: rows of the warm-up's data, at most, that it is never trained on


def read_log(path):
    """Return a log's arguments and the metrics of its steps. Raises ValueError, or OSError."""
    records = []
    for n, line in enumerate(Path(path).read_bytes().splitlines(), start=1):
        records.append(json_object(line, f"{path}:{n}"))
    args = next((record["args"] for record in records if "args" in record), None)
    steps = [record for record in records if "step" in record]
    if not isinstance(args, dict) or not steps:
        raise ValueError(f"{path}: no arguments, or no step: it is no log of a run")
    return args, steps


def tokens_per_update(run):
    """Return the tokens that each update of a run has sampled, a list. Raises ValueError where the
    run is of SFT, which samples none, or where its log lacks a number; OSError without a log.

    The last of several lines of one step counts: a run that was resumed may have two.
    """
    log = Path(run) / "log.jsonl"
    args, steps = read_log(log)
    if "group_size" not in args:
        raise ValueError(f"{run}: its log has no groups of rollouts: SFT samples nothing")
    by_step = {step["step"]: step for step in steps if "length" in step}
    if not by_step:
        raise ValueError(
            f"{log}: no step has a length: name the folder of a run, not its warm-up's"
        )
    tokens = []
    for step, metrics in sorted(by_step.items()):
        where = f"{log}, step {step}"
        length = number(metrics, "length", where)
        if "sampled" in metrics:
            groups = number(metrics, "sampled", where)
        else:
            groups = number(args, "prompts_per_step", log)  # alignment draws once
        tokens.append(length * groups * number(args, "group_size", log))
    return tokens


def warmup_tokens(run):
    """Return the tokens of alignment's warm-up, estimated as said above; 0 for other runs."""
    log = Path(run) / "warmup/log.jsonl"
    if not log.exists():
        return 0
    args, steps = read_log(log)
    for name in ("pairs", "spans", "data"):
        if name not in args:
            raise ValueError(f"{log}: its arguments have no {name}: it is no log of a warm-up")
    if args["pairs"]:
        return 0  # they were read, not sampled
    group_size = number(args, "group_size", log)
    spans = 1 if args["spans"] == "whole" else 2
    rows_per_update = max(1, number(args, "warmup_pairs", log) // (spans * group_size))
    rows = rows_per_update * number(steps[-1], "step", log) + held_out_rows(args["data"])
    per_update = number(args, "prompts_per_step", log) * group_size  # rollouts of the game
    length = tokens_per_update(run)[0] / per_update
    return rows * group_size * length


def held_out_rows(data):
    """Return how many rows of its data file a warm-up holds out, at most HELD_OUT; HELD_OUT where
    their number is not known."""
    path = Path(data)
    if path.suffix != ".jsonl" or not path.is_file():
        return HELD_OUT
    with path.open("rb") as file:
        rows = sum(1 for line in file if line.strip())
    return max(1, min(HELD_OUT, rows // 10))


def generated(runs):
    """Return the tokens that runs have sampled in all. Raises ValueError for a run named twice."""
    folders = [Path(run).resolve() for run in runs]
    for i, folder in enumerate(folders):
        if folder in folders[:i]:
            raise ValueError(f"{runs[i]} is named twice: a run counts once")
    return sum(sum(tokens_per_update(run)) + warmup_tokens(run) for run in runs)


def updates_for(tokens, of_run):
    """Return the least number of updates with which a run generates so many tokens. Raises
    ValueError where it never does.

    of_run: tokens of each of its updates. Beyond them the mean of the last 20 is taken.
    """
    for updates, total in enumerate(accumulate(of_run), start=1):
        if total >= tokens:
            return updates
    last = mean(of_run[-LAST:])
    if last == 0:
        raise ValueError(
            f"the run that is to generate as many sampled nothing in its last {LAST} updates: "
            f"going on like that it never reaches {tokens:.0f} tokens"
        )
    missing = tokens - sum(of_run)
    return len(of_run) + math.ceil(missing / last)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="+", help="run folders of alignment and RLVR")
    parser.add_argument("--as_updates_of", default="", help="a run folder of RLVR")
    args = parser.parse_args()
    try:
        tokens = generated(args.runs)
        if args.as_updates_of:
            tokens = updates_for(tokens, tokens_per_update(args.as_updates_of))
    except (OSError, ValueError) as error:
        sys.exit(f"budget.py: {error}")
    print(round(tokens))


if __name__ == "__main__":
    # `| head` ends this command as it ends others, without a traceback.
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    main()
