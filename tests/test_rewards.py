"""The verifier: format, the rules, Math-Verify's worker, hostile input, and the rate on other
projects' test cases."""

import json
import os
import random
import subprocess
import sys
import threading
import time
import warnings

import pytest
from conftest import ROOT, SHARED
from verifier_table import AS_SOURCE, OTHERWISE, SLOW, comparable

from data import parts, split_spans
from engine import math_worker
from rewards import equivalent, score

CASES = SHARED / "data" / "verifier"
needs_cases = pytest.mark.skipif(not CASES.exists(), reason="../shared/data/verifier is not here")
GOOD = "<caption>\n- a dog\n</caption>\n<think>\n1. look\n</think>\n<answer>\nB\n</answer>"


@pytest.fixture
def no_math_verify(monkeypatch):
    math_worker._verdicts.clear()
    monkeypatch.setattr(math_worker.importlib.util, "find_spec", lambda name: None)
    yield
    math_worker._verdicts.clear()


# ----------------------------------------------------------------------------- format
def test_parts_and_spans_are_canonical():
    tight = "<caption>- a dog</caption><think> 1. look</think>  <answer>B</answer>\n"
    assert parts(GOOD) == parts(tight) == {"caption": "- a dog", "think": "1. look", "answer": "B"}
    assert split_spans(GOOD) == split_spans(tight)
    assert split_spans(tight) == (
        "<caption>\n- a dog\n</caption>",
        "<think>\n1. look\n</think>\n<answer>\nB\n</answer>",
    )


@pytest.mark.parametrize(
    "bad",
    [
        "",
        "B",
        None,
        5,
        ["<caption>"],
        GOOD + "x",
        "x" + GOOD,
        GOOD + GOOD,
        GOOD.replace("<think>", "x<think>"),
        GOOD.replace("</answer>", ""),
        GOOD.replace("1. look", "<answer>A</answer>"),
        GOOD.replace("B", "B</answer>"),
        GOOD.replace("1. look", "<think>"),
        GOOD.replace("- a dog", "</caption>"),
        GOOD.replace("think", "THINK"),
        "<think>a</think><caption>b</caption><answer>B</answer>",
        "<answer>B</answer>",
        GOOD.replace("<think>", "< think>"),
        "<caption>a<think>b</caption>c</think><answer>B</answer>",
    ],
)
def test_malformed(bad):
    assert parts(bad) is None and split_spans(bad) is None
    assert score(bad, "B") == {"accuracy": 0.0, "format": 0.0, "reward": 0.0}


def test_score():
    assert score(GOOD, "B") == {"accuracy": 1.0, "format": 1.0, "reward": 1.0}
    assert score(GOOD, "A") == {"accuracy": 0.0, "format": 1.0, "reward": 0.2}
    assert score(GOOD, "the dog", ("the cat", "the dog"))["accuracy"] == 1
    assert score(GOOD, "A", (), ("C", "B"))["accuracy"] == 1
    assert score(GOOD, "A", equivalent_answers=None)["accuracy"] == 0
    hack = GOOD.replace("1. look", "<answer>A</answer>")  # the first of two answers was taken
    assert score(hack, "A")["reward"] == 0


def test_format_takes_linear_time():
    for text in (
        "<answer>" * 200_000,
        GOOD[:-9] * 20_000,
        "<caption>" + " " * 1_000_000,
        "<" * 1_000_000,
    ):
        begin = time.process_time()
        assert parts(text) is None
        assert time.process_time() - begin < 1


# (reference, equal ones, others)
RULES = [
    # what METHOD.md lists as wrong in the released verifier
    ("2(x+3)", ["2x+6"], ["2x+3"]),
    ("x=1.5", ["1.5", "x = 3/2"], ["x=15", "15"]),
    (r"\frac{1}{23}", ["1/23"], [r"\frac{12}{3}"]),
    ("(5/2, 3)", ["(2.5, 3)", "5/2, 3"], ["(1/2, 3)", "(3, 5/2)"]),
    ("5 kg", ["5", "5 kilograms", r"5\text{ kg}", "5kg"], ["5 lb", "6 kg", "5 kg/m", "kg"]),
    ("[1, 2)", [r"\left[1,2\right)"], ["(1, 2]", "(1, 2)", "[1, 2]"]),
    ("1234", ["1,234", r"1{,}234", "1 234", "1234.0"], ["1.234", "1,2,3,4", "1,235"]),
    ("1,234", ["1234"], ["1"]),
    ("x=7", ["7", "x = 7.0", "$x=7$"], ["y=7", "x=8"]),
    ("7", ["x=7"], ["-7"]),
    ("x=1, x=2", ["x=2, x=1", "1, 2", "{2, 1}"], ["x=1", "1, 3"]),
    (
        "A. the dog",
        ["A", "(A)", "the dog", "(A) the dog"],
        ["B", "B. the dog", "A. the cat", "the cat"],
    ),
    ("1/2", ["0.5", r"\frac12", ".5", "2:4"], ["1/2 + 1/2", "1/2, 1/3", "0.05"]),
    ("1000", ["10^3", "1e3"], ["10^2"]),
    # letters, words, truth
    (
        "B",
        [
            "b",
            "(B)",
            "B.",
            "**B**",
            r"\boxed{B}",
            r"$\text{B}$",
            "The answer is (B).",
            "Option B",
            "B) a dog",
        ],
        [
            "A",
            "B, C",
            "A or B",
            "ABCD",
            "(A) (B)",
            "Bob",
            "B and C",
            "E = mc^2",
            "All of the above",
        ],
    ),
    ("yes", ["Yes.", "true", "Yes, there are three"], ["no", "yes and no", "not yes", "eyes"]),
    (
        "False",
        ["no", "No, it is not", "The statement is false."],
        ["true", "true or false", "none", "not false"],
    ),
    ("the dog", ["The Dog!", "dog"], ["the red dog", "cat", "7"]),
    ("red and blue", ["blue, red"], ["red", "red and pink"]),
    # numbers, units, percentages
    ("-5", ["−5", "- 5", "-5.0"], ["5"]),
    ("5/2", [r"2\frac{1}{2}", "2 1/2", "2.5"], ["21/2"]),
    ("2/3", ["0.666667", "0.6666666666"], ["0.67", "0.666"]),
    ("0.000001", ["1e-6"], ["0.0000012", "0"]),
    ("9007199254740993", ["9007199254740993.0"], ["9007199254740992"]),
    ("1000000", [], ["1000000.1", "1000001"]),
    ("12:05", ["12:05"], ["12:5", "1:05", "13:05"]),
    ("1:2", [r"\frac{1}{2}", "2:4"], ["2:1"]),
    ("0:30", [], ["0:45"]),
    ("50%", ["50", "0.5", "1/2", r"50\%", "50 percent"], ["5%", "0.05"]),
    ("0.5", ["50%"], ["0.5%", "5%"]),
    ("$10", ["10", r"\$10", "10 dollars"], ["€10", "$100"]),
    ("5", ["5 apples", "5."], ["5 million", "3x", "5 or 6"]),
    ("5 m²", ["5 square meters", r"5\,\mathrm{m}^2"], ["5 m", "5 cm²"]),
    (r"90^\circ", ["90", "90°", "90 degrees"], ["45°"]),
    ("60 km/h", ["60 kilometers per hour"], ["60 km", "60 m/s"]),
    ("5 apples", ["5"], ["5 pears"]),
    # tuples, intervals, sets, several parts
    ("(1,2)", ["1, 2"], ["(2,1)", "[1,2]", "(1,2,3)"]),
    (r"\{1,2\}", ["{2,1}", "2 and 1"], ["1", r"\{1,2,3\}"]),
    ("57", [], ["56, 57, 58", "57 or 58", "[0, 100]", "570", "57, 58"]),
    ("3, 4 and 5", ["5, 4, 3"], ["3, 4", "3, 4, 6"]),
    ("x=1, y=2", ["y=2, x=1", "1, 2", "(1, 2)"], ["2, 1", "x=2, y=1"]),
    ("(p,q)=(3,2)", ["p=3, q=2"], ["p=2, q=3"]),
    # Math-Verify: formulas, relations, prose
    (r"\sqrt{8}", [r"2\sqrt{2}", "2√2"], ["8", r"\sqrt{2}"]),
    ("x^2-1", ["(x-1)(x+1)"], ["x^2+1"]),
    ("x > 3", ["3 < x"], ["x < 3"]),
    (r"(-\infty, 3)", ["(-∞,3)"], [r"(-\infty, 3]"]),
    (r"[1,\sqrt{2})", [], [r"(1,\sqrt{2}]"]),
    (r"2\pi\text{ cm}", [r"2\pi"], [r"2\pi\text{ in}", "2"]),
    (r"3 \pm \sqrt{2}", [r"3+\sqrt{2}, 3-\sqrt{2}"], ["3"]),
    (
        "42",
        ["I count 40 and then 2 more, so 42", "The answer is 42."],
        ["The answer is 43.", "forty"],
    ),
]
FORMULAS = 8  # the last rows need Math-Verify


@pytest.mark.parametrize(
    "gold,same,other", RULES, ids=lambda value: value if isinstance(value, str) else ""
)
def test_rules(gold, same, other):
    assert equivalent(gold, gold)
    assert [pred for pred in same if not equivalent(pred, gold)] == []
    assert [pred for pred in other if equivalent(pred, gold)] == []


CHOICES = ("the cat", "the dog", "12 cm", "$\\frac{1}{2}$")


@pytest.mark.parametrize(
    "gold,pred,choices,expected",
    [
        ("B", "the dog", CHOICES, True),
        ("the dog", "B", CHOICES, True),
        ("B", "(B) the dog", CHOICES, True),
        ("the dog", "b)", CHOICES, True),
        ("D", "0.5", CHOICES, True),
        ("D", "D. $\\frac12$", CHOICES, True),
        ("C", "12", CHOICES, True),
        ("C", "12 m", CHOICES, False),
        ("B", "(B) the cat", CHOICES, False),
        ("B", "A", CHOICES, False),
        ("B", "the cat", CHOICES, False),
        ("B", "the cat or the dog", CHOICES, False),
        ("B", "A or B", CHOICES, False),
        ("B", "12", ("10 cm", "12 cm", "12 m"), False),
        ("A", "yes", ("yes", "no"), True),
        ("D", "E", ("A", "B", "C", "E", "none"), False),
        ("E", "(E) G", ("A", "B", "D", "F", "G"), True),
        ("7", "B", ["6", "7"], True),
        ("C", "(C) C", "ABCDE", True),
        ("B", "b", None, True),
    ],
)
def test_choices(gold, pred, choices, expected):
    assert equivalent(pred, gold, choices) is expected


@pytest.mark.parametrize(
    "pred,gold",
    [
        ("", ""),
        ("", "5"),
        (" ", " "),
        (None, None),
        (None, "5"),
        (["5"], "5"),
        (True, "1"),
        (5, "5"),
        ("5", None),
        (b"5", "5"),
        ("x" * 4001, "x" * 4001),
    ],
)
def test_no_text_is_never_right(pred, gold):
    assert equivalent(pred, gold) is False


def test_rules_take_bounded_time(monkeypatch):
    """Without the worker: 4000 characters of anything, whatever the reference, and no exception.

    Time of this process, so that other work on the machine changes nothing."""
    monkeypatch.setattr(math_worker, "ask", lambda *question: False)
    pieces = [
        "1,",
        "(",
        "a ",
        "\\boxed{",
        "}",
        "1 ",
        "=",
        "$",
        "\\",
        "[1,2],",
        "m/",
        "1/",
        "\\frac{1}{",
        "or",
        "the ",
        "^",
        "°",
        "answer: ",
        "(A) ",
        "is ",
        "\\text{",
        "5 cm ",
        "...",
        "\\approx",
        "{,}",
        "((1,2),",
        "{{1},",
        "10^",
        "\n",
        "one hundred and ",
        "half past ",
        "January 1, ",
        "3:",
        "√",
        "°N ",
        "\\pm ",
        "P(1,",
        "\\{",
        "1' 2\" ",
        "I choose ",
        "Total: ",
        "1 to ",
        "[[1],",
        "选",
        "①",
        "1s2 ",
        "|",
    ]
    draw = random.Random(0)
    texts = [(piece * 4000)[:3999] + end for piece in pieces for end in ("", "!")]
    texts += ["".join(draw.choices(pieces, k=500))[:4000] for _ in range(60)]
    for text in texts:
        for gold in ("7", "(1, x)", text[::-1]):
            begin = time.process_time()
            assert not equivalent(text, gold) or gold == text[::-1]
            assert time.process_time() - begin < 1


# ----------------------------------------------------------------------------- Math-Verify's worker
MATH_VERIFY = math_worker.importlib.util.find_spec("math_verify")
MOST_SECONDS = 1 + math_worker.PATIENCE * math_worker.SECONDS  # of an answer, by the clock
needs_math_verify = pytest.mark.skipif(MATH_VERIFY is None, reason="extra `math` is not installed")


@needs_math_verify
def test_worker_in_threads():
    math_worker._verdicts.clear()
    found = {}

    def ask(n):
        found[n] = (
            equivalent(rf"\sqrt{{{4 * n}}}", rf"2\sqrt{{{n}}}"),
            equivalent(rf"\sqrt{{{n}}}", rf"2\sqrt{{{n}}}"),
        )

    threads = [threading.Thread(target=ask, args=(n,)) for n in (2, 3, 5, 7, 11, 13)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert set(found.values()) == {(True, False)} and len(found) == 6


@needs_math_verify
def test_worker_is_bounded_and_survives():
    assert equivalent(r"\sqrt{8}", r"2\sqrt{2}")
    workers = [*math_worker._idle]
    for hostile in (r"10^{10^{10}}", r"99999999!!"):
        begin = time.perf_counter()
        assert not equivalent(hostile, "1")
        assert time.perf_counter() - begin < MOST_SECONDS
    math_worker._verdicts.clear()
    assert equivalent(r"\sqrt{8}", r"2\sqrt{2}") and math_worker._idle == workers


@needs_math_verify
def test_worker_is_replaced():
    assert equivalent(r"\sqrt{12}", r"2\sqrt{3}")
    for worker in math_worker._idle:
        worker.kill()
        worker.wait()
    assert equivalent(r"\sqrt{20}", r"2\sqrt{5}")


@needs_math_verify
def test_worker_is_not_shared_with_a_fork():
    assert equivalent(r"\sqrt{12}", r"2\sqrt{3}")
    with warnings.catch_warnings():
        warnings.simplefilter(
            "ignore", DeprecationWarning
        )  # Python 3.12 dislikes forks of threaded processes
        child = os.fork()
    if child == 0:
        os._exit(0 if math_worker._idle == [] and equivalent(r"\sqrt{28}", r"2\sqrt{7}") else 1)
    assert os.waitpid(child, 0)[1] == 0
    assert equivalent(r"\sqrt{44}", r"2\sqrt{11}")


@pytest.mark.slow
@needs_math_verify
def test_worker_ends_with_its_caller():
    code = r"""
from engine import math_worker
import rewards
rewards.equivalent(r'\sqrt{8}', r'2\sqrt{2}')
print(math_worker._idle[0].pid)
"""
    done = subprocess.run(
        [sys.executable, "-"], input=code, cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0 and done.stderr == ""
    for _ in range(100):
        if not os.path.exists(f"/proc/{done.stdout.strip()}"):
            return
        time.sleep(0.05)
    pytest.fail("the worker outlived the process that asked it")


@needs_math_verify
def test_worker_that_cannot_start_is_an_error(monkeypatch):
    monkeypatch.setattr(math_worker, "__file__", str(ROOT / "no_such_file.py"))
    monkeypatch.setattr(math_worker, "_idle", [])
    math_worker._verdicts.clear()
    with pytest.raises((RuntimeError, BrokenPipeError)):
        equivalent(r"\sqrt{8}", r"2\sqrt{2}")


def test_without_math_verify(no_math_verify):
    with pytest.warns(UserWarning, match="extra `math`"):
        assert not equivalent(r"\sqrt{8}", r"2\sqrt{2}")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for gold, same, other in RULES[:-FORMULAS]:
            if gold != "2(x+3)":  # its equal is a formula
                assert [pred for pred in same if not equivalent(pred, gold)] == []
            assert [pred for pred in other if equivalent(pred, gold)] == []


@pytest.mark.slow
def test_that_math_verify_is_missing_is_said_once():
    code = (
        r"import rewards; from engine import math_worker"
        r"; math_worker.importlib.util.find_spec = lambda name: None"
        + r"; rewards.equivalent('2*(x+1)', '2*x+2')"
        * 3
    )
    code += r"; rewards.equivalent('2*(x+2)', '2*x+4')"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert done.stderr.count("UserWarning: Math-Verify is missing") == 1


def test_imports_the_standard_library_only():
    code = (
        "import sys; old = set(sys.modules); import engine.answers; "
        "print(*{m.partition('.')[0] for m in set(sys.modules) - old})"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert set(done.stdout.split()) - {"engine"} <= sys.stdlib_module_names


# ----------------------------------------------------------------------------- others' cases
def load(name):
    return [json.loads(line) for line in (CASES / name).read_text(encoding="utf-8").splitlines()]


def wrong(rows):
    found = []
    for row in rows:
        options = row.get("options")
        choices = (options.get("choices") or ()) if isinstance(options, dict) else ()
        found += (
            [row["id"]] if equivalent(row["pred"], row["gold"], choices) != row["expected"] else []
        )
    return found


EXTENT = pytest.mark.parametrize(
    "every", [5, pytest.param(1, marks=pytest.mark.slow)], ids=["sample", "all"]
)


@needs_cases
@needs_math_verify
@EXTENT
def test_rate_on_comparable_cases(every):
    """Right on 98 %, at most 1 % of the unequal pairs accepted."""
    rows = [row for row in load("cases.jsonl") if comparable(row)][::every]
    bad = wrong(rows)
    assert len(rows) * every > 200
    assert len(bad) <= 0.02 * len(rows), bad
    assert sum(not row["expected"] for row in rows if row["id"] in bad) <= 0.01 * sum(
        not row["expected"] for row in rows
    )


@needs_cases
@needs_math_verify
@EXTENT
def test_each_other_case_is_decided(every):
    rows = {row["id"]: row for row in load("cases.jsonl") if not comparable(row)}
    ours = {name: decided for group in OTHERWISE.values() for name, decided in group.items()}
    shared = {name for group in AS_SOURCE.values() for name in group}
    assert (
        {name for name, row in rows.items() if row.get("policy")} <= set(ours) | shared <= set(rows)
    )
    assert not set(ours) & shared and all(ours[name] != rows[name]["expected"] for name in ours)
    decided = [row | {"expected": ours.get(name, row["expected"])} for name, row in rows.items()][
        ::every
    ]
    assert [name for name in wrong(decided) if name not in SLOW] == []


@needs_cases
@needs_math_verify
@EXTENT
def test_hostile_cases(every):
    def text(row, side):
        return (
            row[side]
            if side in row
            else "".join(piece * count for piece, count in row[side + "_gen"])
        )

    assert equivalent(r"\sqrt{8}", r"2\sqrt{2}")  # the worker is up
    rows = load("hostile.jsonl")
    for row in rows[::every]:
        begin = time.perf_counter()
        assert equivalent(text(row, "pred"), text(row, "gold")) is row["expect"], row["id"]
        assert time.perf_counter() - begin < MOST_SECONDS, row["id"]
    assert len(rows) > 100 and not os.path.exists("/tmp/pwned")
