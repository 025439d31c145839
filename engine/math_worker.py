"""Math-Verify in a process of its own, since SymPy can hang or swell on hostile formulas.

`ask(pred, gold)` takes two trees of engine/formula.py. A worker process (`python
engine/math_worker.py`, JSON lines over pipes) forks a child per question, with limits on time and
memory. That needs no signals in the caller, so any thread or notebook may ask; threads that ask at
the same time have a worker each. POSIX; the worker alone imports Math-Verify.
"""

import contextvars
import functools
import importlib.util
import json
import os
import resource
import signal
import subprocess
import sys
import threading
import warnings

# Of all the questions about one answer: seconds of a processor, so that a verdict does not hang on
# what else the machine does.
SECONDS = 1.5
PATIENCE = 4  # times as long it may take by the clock, for a busy machine or one that waits
MEMORY = 1 << 30  # bytes of a question

MAX_REMEMBERED = 1 << 14  # verdicts

_left = contextvars.ContextVar("seconds left", default=SECONDS)
_verdicts = {}  # by question
_idle = []  # workers that nobody asks just now
# Of threads with the same question one asks, and the others find its verdict.
_locks = [threading.Lock() for _ in range(64)]


def _forget():
    """A fork gets workers and locks of its own, not its parent's pipes."""
    _idle.clear()
    _locks[:] = [threading.Lock() for _ in _locks]


os.register_at_fork(after_in_child=_forget)


def new_answer():
    """From here on there are SECONDS for questions; an answer can need several, as a list does."""
    _left.set(SECONDS)


def ask(pred, gold, tolerance=0):
    """Are two trees equal, or two numbers at most `tolerance` apart? False where time runs out."""
    if importlib.util.find_spec("math_verify") is None:
        warnings.warn(
            "Math-Verify is missing (extra `math`): answers are compared as texts and numbers",
            stacklevel=1,
        )
        return False
    question = json.dumps([pred, gold, str(tolerance)])
    with _locks[hash(question) % len(_locks)]:
        return _answer(question)


def _answer(question):
    known = _verdicts.get(question)  # asked once: another thread may forget all in between
    if known is not None:
        return known
    left = _left.get()
    if left <= 0:
        return False
    verdict, seconds = exchange(question, left)
    _left.set(left - seconds)
    if verdict is None and left < SECONDS:
        return False  # other questions took its time: not to be remembered
    if len(_verdicts) >= MAX_REMEMBERED:
        _verdicts.clear()
    _verdicts[question] = bool(verdict)
    return bool(verdict)


def exchange(question, seconds):
    """(verdict, None at a limit; seconds) of a worker. One that somebody ended is replaced."""
    # It is no longer idle: after an interrupt nobody reads another question's answer from it.
    try:
        process = _idle.pop()
    except IndexError:
        process = None
    if process is None or process.poll() is not None:
        process = start()
    process.stdin.write(json.dumps([question, seconds]).encode() + b"\n")
    line = process.stdout.readline()
    if not line:
        raise RuntimeError("the Math-Verify worker ended: `python engine/math_worker.py` shows why")
    _idle.append(process)
    return json.loads(line)


def start():
    command = [sys.executable, "-P", __file__]  # -P: `import math_verify` must not look in here
    pipe = subprocess.PIPE
    return subprocess.Popen(command, bufsize=0, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL)


# -------------------------------------------------------------- in the worker
EQUAL, UNEQUAL = 10, 11  # exit codes of a child; any other: it hung, swelled or crashed


def serve():
    """A line [question, seconds] in, [verdict, seconds] out, each from a child of its own."""
    warm_up()
    for line in sys.stdin:
        question, seconds = json.loads(line)
        child = os.fork()
        if child == 0:
            answer_and_exit(question, seconds)
        _, status, used = os.wait4(child, 0)
        verdict = {EQUAL: True, UNEQUAL: False}.get(os.waitstatus_to_exitcode(status))
        print(json.dumps([verdict, used.ru_utime + used.ru_stime]), flush=True)


def warm_up():
    """Imports, and fills SymPy's caches, once instead of in every child: 20 ms for 400."""
    x = ["symbol", "x"]
    root = ["sqrt", ["+", x, "2"]]
    judge(["sqrt", "8"], ["*", "2", ["sqrt", "3"]], "0")
    judge(["^", ["sin", x], "2"], ["+", "1", root], "0")
    judge(["log", "2", "10"], ["+", ["constant", "pi"], ["ln", "2"]], "0")
    judge(["<", x, "1"], [">", ["-", x], "1"], "0")


def answer_and_exit(question, seconds):
    try:
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
        # Their signals end the child, whatever it does.
        signal.setitimer(signal.ITIMER_PROF, seconds)
        signal.setitimer(signal.ITIMER_REAL, PATIENCE * seconds)
        equal = judge(*json.loads(question))
        os._exit(EQUAL if equal else UNEQUAL)
    finally:
        os._exit(1)


RELATIONS = {"=", "!=", "<", ">", "<=", ">="}
FLIPPED = {"<": ">", ">": "<", "<=": ">=", ">=": "<=", "=": "=", "!=": "!="}


def judge(pred, gold, tolerance):
    if pred[0] in RELATIONS and gold[0] in RELATIONS:
        return same_relation(pred, gold)
    if pred[0] in RELATIONS or gold[0] in RELATIONS:
        return False
    return same_value(build(pred), build(gold), tolerance)


def same_relation(pred, gold):
    """Is one a multiple of the other? `x <= 3` and `6 >= 2x`, `2x + 4y = 3` and `y = 3/4 - x/2`."""
    import sympy

    p_difference = build(pred[1]) - build(pred[2])
    g_difference = build(gold[1]) - build(gold[2])
    factor = sympy.simplify(p_difference / g_difference)
    if not factor.is_number or factor.is_zero or not factor.is_finite:
        return False
    operator = pred[0] if factor.is_positive else FLIPPED[pred[0]]
    return operator == gold[0]


def same_value(pred, gold, tolerance):
    """Math-Verify's verdict, where the values at one point do not speak against it.

    It rounds to some decimals, and would take any two tiny numbers for equal. And it is slow to
    find two formulas unequal: their values are not.
    """
    from math_verify import verify
    from sympy import Rational

    symbols = sorted(pred.free_symbols | gold.free_symbols, key=str)
    point = {symbol: Rational(7 * i + 11, 13) for i, symbol in enumerate(symbols)}
    p_value = pred.subs(point).evalf(30)
    g_value = gold.subs(point).evalf(30)
    if p_value.is_number and g_value.is_number and p_value != g_value:
        distance = abs(p_value - g_value)
        if not distance.is_finite:
            return False
        if not symbols and distance < Rational(tolerance):
            return True
        if distance > abs(g_value) / 10**12:
            return False
    return verify(gold, pred, timeout_seconds=None)


def build(tree):
    """The SymPy expression of a tree."""
    import sympy

    if isinstance(tree, str):
        return sympy.Rational(tree)
    operator, *operands = tree
    if operator == "symbol":
        return sympy.Symbol(operands[0], real=True)
    if operator == "constant":
        constants = {"pi": sympy.pi, "e": sympy.E, "i": sympy.I, "infinity": sympy.oo}
        return constants[operands[0]]
    if operator == "call":
        return sympy.Function(operands[0])(build(operands[1]))
    values = [build(operand) for operand in operands]
    return operations()[operator](*values)


@functools.cache
def operations():
    import operator

    import sympy

    named = (
        "sin cos tan cot sec csc sinh cosh tanh exp binomial floor ceiling sqrt root log".split()
    )
    return {name: getattr(sympy, name) for name in named} | {
        "+": operator.add,
        "*": operator.mul,
        "/": operator.truediv,
        "^": operator.pow,
        "-": operator.neg,
        "!": sympy.factorial,
        "°": sympy.rad,
        "abs": sympy.Abs,
        "ln": sympy.log,
        "arcsin": sympy.asin,
        "arccos": sympy.acos,
        "arctan": sympy.atan,
    }


if __name__ == "__main__":
    serve()
