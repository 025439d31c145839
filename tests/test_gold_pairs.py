"""bench/gold_pairs.py: which different references the verifier takes for equal.

tests/gold_pairs.txt has those of the files in ../shared/data, in a section for each file; each pair
was looked at, and is right.
"""

import json
import subprocess
import sys

import pytest
from conftest import ROOT, SHARED
from test_rewards import needs_math_verify

sys.path.insert(0, str(ROOT / "bench"))
from gold_pairs import choices_of, compare, gold_of, written  # noqa: E402

DATA = SHARED / "data"


def known_pairs():
    """{file: the lines of its section}."""
    pairs = {}
    for line in (ROOT / "tests/gold_pairs.txt").read_text(encoding="utf-8").splitlines():
        if line.startswith("# "):
            file = pairs.setdefault(line[2:], set())
        elif line:
            file.add(line)
    return pairs


@pytest.mark.slow
@needs_math_verify
@pytest.mark.parametrize("file", known_pairs())
def test_the_pairs_called_equal_are_the_known_ones(file):
    if not (DATA / file).exists():
        pytest.skip(f"../shared/data/{file} is not here")
    among_golds, among_options, _ = compare(DATA / file)
    assert {written(*pair) for pair in among_golds + among_options} == known_pairs()[file]


def test_golds_of_each_format():
    response = "<caption>a</caption><think>b</think><answer> 7 </answer>"
    rows = [
        {"gold": "7"},
        {"answer": "7", "choices": ["6", "7"]},
        {"reward_model": {"ground_truth": "7"}},
        {"messages": [{"content": "What?"}, {"content": response}]},
        {"conversations": [{"value": "What?"}, {"value": response}]},
    ]
    assert [gold_of(row) for row in rows] == ["7"] * 5
    assert [choices_of(row) for row in rows[:2]] == [[], ["6", "7"]]
    assert gold_of({"question": "What?"}) is None


@pytest.mark.slow
def test_the_script_prints_each_pair_and_counts(tmp_path):
    rows = [{"answer": "1/2"}, {"answer": "0.5"}, {"answer": "3", "choices": ["3", "4"]}]
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    command = [sys.executable, ROOT / "bench/gold_pairs.py", file]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    *pairs, summary = done.stdout.splitlines()
    assert pairs == ["0.5 = 1/2", "1/2 = 0.5"]
    counts = {"golds": 3, "pairs": 6, "equal": 2, "option_pairs": 2, "option_equal": 0}
    assert json.loads(summary) == {"file": str(file), **counts}
