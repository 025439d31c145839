"""
Which different references of a data file the verifier takes for equal, each against each.

    python bench/gold_pairs.py ../shared/data/mathvision/testmini.jsonl ...

Prints each such pair, as `prediction = reference`, and one JSON line a file: golds, the distinct
references; pairs, of two of them, in both directions; equal, those called equal. The options of
each question are compared in the same way: option_pairs, option_equal. A pair called equal has to
be right, as 1/2 and 0.5 are, or the verifier is wrong: somebody has to look.
"""

import argparse
import itertools
import json
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from engine.answers import equivalent  # noqa: E402
from engine.rows import Rows  # noqa: E402

LONGEST = 60  # characters of a text that are printed
ANSWER = re.compile(r"<answer>\s*(.*?)\s*</answer>", re.DOTALL)


def gold_of(row):
    """The reference of a row, in whatever format; None where it has none."""
    reward_model = row.get("reward_model") or {}
    for text in (row.get("gold"), row.get("answer"), reward_model.get("ground_truth")):
        if isinstance(text, str):
            return text
    for turn in reversed(row.get("messages") or row.get("conversations") or []):
        written = ANSWER.search(turn.get("content") or turn.get("value") or "")
        if written:
            return written[1]
    return None


def choices_of(row):
    choices = row.get("choices")
    return [text for text in choices if isinstance(text, str)] if choices is not None else []


def equal_pairs(texts, choices=()):
    """The (prediction, reference) among different texts that the verifier calls equal."""
    distinct = sorted(set(texts))
    pairs = itertools.permutations(distinct, 2)
    return [(pred, gold) for pred, gold in pairs if equivalent(pred, gold, choices)]


def written(pred, gold):
    """The pair as one short line."""
    return f"{shortened(pred)} = {shortened(gold)}"


def shortened(text):
    line = " ".join(text.split())
    return line if len(line) <= LONGEST else line[: LONGEST - 3] + "..."


def compare(path):
    """(equal pairs of references, equal pairs of options, the summary) of a file."""
    rows = Rows(path)
    rows = [rows[index] for index in range(len(rows))]
    golds = {gold_of(row) for row in rows} - {None}
    option_sets = {tuple(choices_of(row)) for row in rows}
    among_golds = equal_pairs(golds)
    among_options = []
    for options in sorted(option_sets):
        among_options += equal_pairs(options, options)
    summary = {
        "file": str(path),
        "golds": len(golds),
        "pairs": len(golds) * (len(golds) - 1),
        "equal": len(among_golds),
        "option_pairs": sum(len(set(o)) * (len(set(o)) - 1) for o in option_sets),
        "option_equal": len(among_options),
    }
    return among_golds, among_options, summary


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("files", nargs="+", help="JSON, JSONL or parquet, in any row format")
    for path in parser.parse_args().files:
        among_golds, among_options, summary = compare(path)
        for pred, gold in among_golds + among_options:
            print(written(pred, gold))
        print(json.dumps(summary))


if __name__ == "__main__":
    main()
