r"""Neighbouring answers of each kind, equal ones and others: tests/verifier_cases.txt.

A line without indent is a reference, in a section (`# kind`); below it, indented, what a careful
grader says about answers, decided before the code ran:

    # percent
    50%
      = 0.5                what is equal
      ≠ 5%                 what is not
    B
      options 12 | 15      where the row has options

The conventions, where graders differ, are a table in engine/answers.py: each of its rows has a
section `# convention: ...` of its own.
"""

import re
from typing import NamedTuple

import pytest
from conftest import ROOT
from test_rewards import MATH_VERIFY, no_math_verify  # noqa: F401  (a fixture)

from engine import answers
from engine.answers import equivalent
from engine.spelling import COMMANDS, SPACING, WORDING


class Case(NamedTuple):
    line: int
    kind: str
    gold: str
    pred: str
    options: tuple
    expected: bool


def read_cases():
    kind = gold = ""
    options = ()
    lines = (ROOT / "tests/verifier_cases.txt").read_text(encoding="utf-8").split("\n")
    for number, line in enumerate(lines, start=1):
        if line.startswith("# "):
            kind = line[2:]
        elif line.startswith("  "):
            mark, text = line[2:].split(" ", 1)
            if mark == "options":
                options = tuple(text.split(" | "))
            else:
                assert mark in "=≠", f"line {number}: {mark}"
                text = text.replace("LONG", "5" + " " * answers.MAX_CHARS)
                yield Case(number, kind, gold, text, options, mark == "=")
        elif line:
            gold = line
            options = ()


CASES = list(read_cases())
KINDS = list(dict.fromkeys(case.kind for case in CASES))
ALGEBRA = ("formulas", "equations", "roots")  # where most cases cost a question to the worker
FIFTH = 5


def wrong(cases):
    return [
        case for case in cases if equivalent(case.pred, case.gold, case.options) != case.expected
    ]


needs_math_verify = pytest.mark.skipif(MATH_VERIFY is None, reason="extra `math` is not installed")


@needs_math_verify
@pytest.mark.parametrize("kind", KINDS)
def test_each_kind(kind):
    cases = [case for case in CASES if case.kind == kind]
    assert wrong(cases[::FIFTH] if kind in ALGEBRA else cases) == []


@pytest.mark.slow
@needs_math_verify
@pytest.mark.parametrize("kind", ALGEBRA)
def test_each_kind_of_algebra(kind):
    assert wrong([case for case in CASES if case.kind == kind]) == []


def test_each_gold_equals_itself():
    assert [case for case in CASES if not equivalent(case.gold, case.gold, case.options)] == []


@pytest.mark.filterwarnings("ignore:Math-Verify is missing")
def test_without_algebra_no_answer_is_wrongly_equal(no_math_verify):  # noqa: F811
    """And of the equal ones, those stay that need no algebra."""
    refused = wrong(CASES)
    assert [case for case in refused if not case.expected] == []
    assert len(refused) < 0.04 * len(CASES)


def test_each_convention_is_held():
    """The table of engine/answers.py, row by row, each with its reason: an equal and an unequal
    case for each."""
    rows = re.findall(r"^\| (.+?) \| .+ \| .+ \|$", answers.__doc__, re.MULTILINE)
    assert len(rows) == answers.__doc__.count("\n| ")
    assert rows[0] == "what"
    sections = {
        case.kind.removeprefix("convention: ") for case in CASES if "convention: " in case.kind
    }
    assert sections == set(rows[1:])
    for row in rows[1:]:
        verdicts = {case.expected for case in CASES if case.kind == f"convention: {row}"}
        assert verdicts == {True, False}, row


@pytest.mark.parametrize("rule", SPACING + COMMANDS + WORDING, ids=lambda rule: rule.what)
def test_each_rewrite_does_what_its_example_says(rule):
    assert re.sub(rule.pattern, rule.by, rule.before).strip() == rule.after.strip()
