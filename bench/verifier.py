"""
How often the verifier is right on other projects' test cases: one JSON line.

    python bench/verifier.py ../shared/data/verifier/cases.jsonl

Comparable rows compare two answers; the others (conventions, search in free text) are decided in
tests/verifier_table.py. right: share of the rows with the expected verdict. false_positives: of the
unequal pairs, taken for equal; false_negatives: of the equal ones, refused. rules_alone: without
algebra (the extra `math`).
"""

import argparse
import importlib.metadata
import json
import sys
import time
from pathlib import Path
from unittest import mock

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from verifier_table import comparable  # noqa: E402

from engine import math_worker  # noqa: E402
from engine.answers import equivalent  # noqa: E402


def combined(pred, gold, choices):
    return equivalent(pred, gold, choices)


def rules_alone(pred, gold, choices):
    with mock.patch("engine.math_worker.ask", return_value=False):
        return equivalent(pred, gold, choices)


def rate(rows, verdict):
    math_worker._verdicts.clear()
    start = time.perf_counter()
    found = [(row["expected"], verdict(row["pred"], row["gold"], choices_of(row))) for row in rows]
    seconds = time.perf_counter() - start
    share = lambda values: round(sum(values) / len(values), 4) if values else None  # noqa: E731
    return {
        "right": share([e == v for e, v in found]),
        "false_positives": share([v for e, v in found if not e]),
        "false_negatives": share([not v for e, v in found if e]),
        "ms_per_row": round(1000 * seconds / len(rows), 2),
    }


def choices_of(row):
    options = row.get("options")
    return (options.get("choices") or ()) if isinstance(options, dict) else ()


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("cases", help="JSONL of {pred, gold, expected, kind, policy?}")
    rows = [
        json.loads(line)
        for line in Path(parser.parse_args().cases).read_text(encoding="utf-8").splitlines()
    ]
    rows = [row for row in rows if comparable(row)]
    table = {f.__name__: rate(rows, f) for f in (combined, rules_alone)}
    version = importlib.metadata.version("math-verify")
    print(
        json.dumps(
            {
                "rows": len(rows),
                "equal": sum(row["expected"] for row in rows),
                **table,
                "math_verify": version,
            }
        )
    )


if __name__ == "__main__":
    main()
