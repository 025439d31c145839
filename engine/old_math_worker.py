"""Math-Verify in a process of its own, since SymPy can hang or swell on hostile text.

A worker process (`python engine/math_worker.py`, JSON lines over pipes) forks a child per question,
with limits on time and memory. That needs no signals in the caller, so any thread or notebook may
ask. POSIX; the worker alone imports Math-Verify.
"""

import functools
import importlib.util
import json
import os
import re
import resource
import signal
import subprocess
import sys
import threading
import warnings

SECONDS = 1.5  # of a question
MEMORY = 1 << 30  # bytes of a question

_lock = threading.Lock()
_process = None


def _forget():
    """A fork gets a worker and a lock of its own, not its parent's pipes."""
    global _lock, _process
    _lock = threading.Lock()
    _process = None


os.register_at_fork(after_in_child=_forget)


@functools.lru_cache(maxsize=1 << 14)
def math_verify(pred, gold):
    """The worker's verdict on two texts; False without Math-Verify and at a limit.

    A worker that somebody ended is replaced.
    """
    global _process
    if importlib.util.find_spec("math_verify") is None:
        warnings.warn(
            "Math-Verify is missing (extra `math`): answers are compared as texts and numbers",
            stacklevel=1,
        )
        return False
    with _lock:
        process = _process
        _process = None  # so that after an interrupt nobody reads another question's answer
        if process is None or process.poll() is not None:
            process = start()
        process.stdin.write(json.dumps([pred, gold]).encode() + b"\n")
        line = process.stdout.readline()
        if not line:
            raise RuntimeError(
                "the Math-Verify worker ended: `python engine/math_worker.py` shows why"
            )
        _process = process
        return json.loads(line)


def start():
    command = [sys.executable, "-P", __file__]  # -P: `import math_verify` must not look in here
    pipe = subprocess.PIPE
    return subprocess.Popen(command, bufsize=0, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL)


def serve():
    """The worker: a line [pred, gold] in, a verdict out.

    Each comes from a child of its own, which may hang, swell or crash.
    """
    warm_up = ("\\frac{1}{2}", "0.5")  # fills the parser's tables before the forks
    judge(*warm_up)
    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            answer_and_exit(*json.loads(line))
        status = os.waitpid(child, 0)[1]
        print(json.dumps(status == 0), flush=True)


def answer_and_exit(pred, gold):
    try:
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
        signal.setitimer(signal.ITIMER_REAL, SECONDS)  # its signal ends the child, whatever it does
        equal = judge(pred, gold)
        os._exit(0 if equal else 1)
    finally:
        os._exit(1)


def judge(pred, gold):
    from math_verify import verify

    return verify(read(gold), read(pred), timeout_seconds=None)


# No formula: a word of prose, a delimiter, a box, a foreign letter, a number alone.
NO_FORMULA = re.compile(
    r"(?<![\\{A-Za-z])(?!sqrt)[A-Za-z]{4,}|\$|\\[(\[]|\\boxed|[^\0-\x7f]|^[-\d.,]+$"
)


def read(text):
    """As a formula where nothing in it says prose, else by Math-Verify's extraction."""
    from math_verify import parse

    text = text.replace("\\$", "")
    if not NO_FORMULA.search(text):
        found = parse(f"${text}$", parsing_timeout=None)
        if found:
            return found
    return parse(text, parsing_timeout=None)


if __name__ == "__main__":
    serve()
