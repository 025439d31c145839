"""
How many tokens runs have generated, and how many updates of another run generate as many.

    python tools/budget.py out/a/align out/a/align-grpo
    python tools/budget.py out/a/align out/a/align-grpo --as_updates_of out/a/sft-grpo

The first prints the tokens that runs of alignment and RLVR have sampled, all together. Alignment's
warm-up logs no lengths: its rollouts, which are of the policy that the game begins with, are taken
to be as long as those of the game's first step. The second prints the number of updates after which
the run named last has generated as many, or would have, had it gone on as in its last 20 updates.
"""

import argparse
import json
import math
import sys
from itertools import accumulate
from pathlib import Path
from statistics import mean

LAST = 20  # updates by which a run is continued


def read_log(path):
    """Return a log's arguments and the metrics of its steps. Raises ValueError."""
    lines = [json.loads(line) for line in Path(path).read_text().splitlines()]
    args = next((line["args"] for line in lines if "args" in line), None)
    steps = [line for line in lines if "step" in line]
    if args is None or not steps:
        raise ValueError(f"{path}: no arguments, or no step: it is no log of a run")
    return args, steps


def tokens_per_update(run):
    """Return the tokens that each update of a run has sampled, a list. Raises ValueError where the
    run is of SFT, which samples none.

    The last of several lines of one step counts: a run that was resumed may have two.
    """
    args, steps = read_log(Path(run) / "log.jsonl")
    if "group_size" not in args:
        raise ValueError(f"{run}: its log has no groups of rollouts: SFT samples nothing")
    by_step = {step["step"]: step for step in steps if "length" in step}
    tokens = []
    for _, metrics in sorted(by_step.items()):
        groups = metrics.get("sampled", args.get("prompts_per_step"))  # alignment draws once
        tokens.append(metrics["length"] * groups * args["group_size"])
    return tokens


def warmup_tokens(run):
    """Return the tokens of alignment's warm-up, estimated as said above; 0 for other runs."""
    log = Path(run) / "warmup/log.jsonl"
    if not log.exists():
        return 0
    args, steps = read_log(log)
    if args["pairs"]:
        return 0  # they were read, not sampled
    spans = 1 if args["spans"] == "whole" else 2
    rows = max(1, args["warmup_pairs"] // (spans * args["group_size"]))
    rollouts = rows * args["group_size"] * steps[-1]["step"]
    first = tokens_per_update(run)[0] / (args["prompts_per_step"] * args["group_size"])
    return rollouts * first


def generated(runs):
    """Return the tokens that runs have sampled in all."""
    return sum(sum(tokens_per_update(run)) + warmup_tokens(run) for run in runs)


def updates_for(tokens, of_run):
    """Return the least number of updates with which a run generates so many tokens.

    of_run: tokens of each of its updates. Beyond them the mean of the last 20 is taken.
    """
    for updates, total in enumerate(accumulate(of_run), start=1):
        if total >= tokens:
            return updates
    missing = tokens - sum(of_run)
    return len(of_run) + math.ceil(missing / mean(of_run[-LAST:]))


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
    main()
