"""What threads do beside the main one changes nothing but when it is done."""

import signal
import subprocess
import sys
import threading
import time
import weakref
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT
from test_data import (
    byte_tokenizer,
    encoder_of,
    every_third_is_bad,
    folder,  # noqa: F401  (a fixture)
    verl,
    write,
)
from test_rewards import needs_math_verify

from data import read
from engine import math_worker, rollouts, rows
from engine.answers import equivalent
from engine.rows import Order
from engine.sampler import Rollout
from engine.workers import Workers

THREADS = [0, 1, 3]
PATIENCE = 20.0  # s that a test waits for another thread before it fails


def slowly(example):
    """Rows take unequal time: threads end them in another order than they begin them."""
    time.sleep(0.001 * (7 * example.row % 5))
    return example.row


# ----------------------------------------------------------------------------------------- workers
def test_a_call_is_made_once_and_its_error_is_the_caller_s():
    calls = []

    def call(n):
        calls.append(n)
        if n == 3:
            raise LookupError(f"number {n}")
        return n * n

    for number in THREADS:
        calls.clear()
        workers = Workers(number)
        jobs = [workers.begin(call, n) for n in range(6)]
        assert [job.result() for job in jobs[:3]] == [0, 1, 4]
        for _ in range(2):  # as often as it is asked for
            with pytest.raises(LookupError, match="number 3"):
                jobs[3].result()
        assert jobs[5].result() == 25 and jobs[4].result() == 16
        assert sorted(calls) == list(range(6))
    assert calls != [] and len(workers.threads) == 3


def test_without_threads_a_call_waits_until_its_result_is_asked_for():
    calls = []
    jobs = [Workers(0).begin(calls.append, n) for n in range(3)]
    assert calls == []
    jobs[1].result()
    assert calls == [1]


def test_threads_end_with_their_workers():
    begun, may_end = threading.Event(), threading.Event()
    calls = []

    def wait():
        begun.set()
        may_end.wait(PATIENCE)
        calls.append("made")

    workers = Workers(1)
    workers.begin(wait)
    workers.begin(calls.append, "dropped")
    (thread,) = workers.threads
    assert begun.wait(PATIENCE)
    threading.Timer(0.05, may_end.set).start()
    del workers  # waits for the call that is being made
    assert not thread.is_alive() and calls == ["made"]


def test_only_the_threads_have_one_torch_thread():
    torch.set_num_threads(2)
    try:
        workers = Workers(1)
        job = workers.begin(torch.get_num_threads)
        assert job.done.wait(PATIENCE) and job.result() == 1
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(1)


def test_the_threads_do_not_keep_what_they_made():
    """A row's pixels would stay in memory until the next row comes."""
    workers = Workers(1)
    job = workers.begin(torch.zeros, 3)
    assert job.done.wait(PATIENCE)
    kept = weakref.ref(job.result())
    del job
    for _ in range(100):
        if kept() is None:
            return
        time.sleep(0.01)
    pytest.fail("a thread holds its last result")


# -------------------------------------------------------------------------------------------- rows
@pytest.mark.parametrize("number", THREADS)
def test_what_is_drawn_does_not_depend_on_threads(folder, number):  # noqa: F811
    """Rows, account and state of the order, after each call, of calls of unequal sizes."""
    sizes = [4, 4, 1, 7, 4, 4, 20]

    def account(workers):
        found = read(every_third_is_bad(folder), "rl", workers=workers)
        order = found.order(seed=1)
        seen = []
        for k in sizes:
            drawn = found.draw(order, k, slowly)
            seen.append((drawn, dict(found.bad), order.state(), order.take(0)))
        return seen

    assert account(number) == account(0)


def draws_until_an_error(path, number, build, **options):
    """(draws of two rows before the one that fails, the error's message)"""
    found = read(path, "rl", workers=number, **options)
    order = found.order(seed=1)
    for draws in range(20):
        try:
            found.draw(order, 2, build)
        except (OSError, ValueError) as error:
            return draws, str(error)
        time.sleep(0.01)  # the next rows are built by now
    return pytest.fail("no draw failed")


@pytest.mark.parametrize("number", THREADS)
def test_a_draw_fails_where_it_would_without_threads(folder, number):  # noqa: F811
    """Too many bad rows, and an error of another kind, end the very draw that needs the row."""
    path = every_third_is_bad(folder)

    def build(example):
        if example.row == 10:
            raise OSError("the disk is gone")
        return example.row

    good = [i for _, i in Order(12, seed=1).take(40) if i % 3]
    expected = (good.index(10) // 2, "the disk is gone")
    assert draws_until_an_error(path, number, build) == expected
    draws, message = draws_until_an_error(path, number, slowly, max_bad=2)
    assert (draws, message) == draws_until_an_error(path, 0, slowly, max_bad=2)
    assert draws > 0 and "3 of 12 rows are bad" in message


def test_no_more_than_one_call_is_built_ahead(folder):  # noqa: F811
    path = write(folder, *[verl()] * 40)
    built = []

    def build(example):
        built.append(example.row)
        return example.row

    found = read(path, "rl", workers=2)
    order = found.order(seed=0)
    expected = [i for _, i in Order(40, seed=0).take(40)]
    for n in (1, 2, 3):
        drawn = found.draw(order, 5, build)
        assert drawn == expected[5 * n - 5 : 5 * n] and order.taken == 5 * n
        for job in found.ahead.values():
            assert job.done.wait(PATIENCE)
        assert sorted(built) == sorted(expected[: 5 * n + 5])  # each row once


@pytest.mark.parametrize("number", THREADS)
def test_ranks_build_their_own_rows_ahead(folder, number, monkeypatch):  # noqa: F811
    path = write(folder, *[verl()] * 40)
    monkeypatch.setattr(rows, "gather", lambda item: [item])
    built = []

    def build(example):
        built.append(example.row)
        return example.row

    rank = SimpleNamespace(rank=1, world=3)
    found = read(path, "rl", workers=number)
    order = found.order(seed=0)
    expected = [i for _, i in Order(40, seed=0).take(40)]
    for n in (0, 1, 2):
        assert found.share(order, 7, build, rank) == expected[7 * n : 7 * n + 7][1::3]
        assert order.taken == 7 * n + 7
    for job in found.ahead.values():
        job.result()
    parts = [expected[7 * n : 7 * n + 7][1::3] for n in range(4 if number else 3)]
    assert sorted(built) == sorted(i for part in parts for i in part)


@pytest.mark.parametrize("number", THREADS)
def test_an_error_that_is_no_bad_row_names_the_row(folder, number):  # noqa: F811
    def build(example):
        if example.row == 1:
            raise KeyError("a field of one's own")
        return example.row

    path = write(folder, verl(), verl(), verl())
    with pytest.raises(KeyError) as caught:
        read(path, "rl", workers=number).fetch(range(3), build)
    assert caught.value.__notes__ == [f"in {path}:2"]


@pytest.mark.parametrize("number", THREADS)
def test_a_bad_row_is_read_once(folder, number):  # noqa: F811
    """Later epochs, and threads ahead of them, leave it alone."""
    built = []

    def build(example):
        built.append(example.row)
        if example.row == 1:
            raise rows.BadRow(example.where, "bad", "mend it")
        return example.row

    data = read(write(folder, verl(), verl(), verl()), "rl", workers=number)
    for _ in range(3):
        assert data.fetch(range(3), build) == [0, 2]
    assert sorted(built) == [0, 0, 0, 1, 2, 2, 2]


@pytest.mark.parametrize("number", THREADS)
def test_a_row_that_is_drawn_twice_is_built_twice(folder, number):  # noqa: F811
    """As where a step takes more rows than a file has: what is built holds the step's rollouts."""
    data = read(write(folder, verl(), verl()), "rl", workers=number)
    order = data.order(seed=0)
    for _ in range(3):
        drawn = data.draw(order, 5, lambda example: [example.row])
        assert sorted(row for (row,) in drawn) in ([0, 0, 0, 1, 1], [0, 0, 1, 1, 1])
        assert len({id(one) for one in drawn}) == 5


def test_rows_are_built_side_by_side(folder):  # noqa: F811
    """Two threads meet in two rows of one call: neither would come to its end alone."""
    both = threading.Barrier(2)

    def build(example):
        both.wait(PATIENCE)
        return example.row

    assert read(write(folder, verl(), verl()), "rl", workers=2).fetch(range(2), build) == [0, 1]


def test_threads_share_a_tokenizer():
    """Prompts and responses differ in a setting of the tokenizer, which is one for all threads."""
    encoder = encoder_of(byte_tokenizer())
    text = f"a {encoder.tokenizer.eos_token} b"
    expected = (encoder._ids(text), encoder._ids(text, split=True))
    assert expected[0] != expected[1]

    def both():
        return [(encoder._ids(text), encoder._ids(text, split=True)) for _ in range(300)]

    workers = Workers(3)
    jobs = [workers.begin(both) for _ in range(4)]
    assert {str(pair) for job in jobs for pair in job.result()} == {str(expected)}


# ---------------------------------------------------------------------------------------- verifier
def sampled(monkeypatch, number, generate, verify):
    """sample_groups with a sampler of the test's own -> the groups."""
    monkeypatch.setattr(rollouts, "generate", generate)
    encoder = SimpleNamespace(eos_ids=(1,), banned=(), decode=lambda ids: f"text {ids[0]}")
    args = SimpleNamespace(
        group_size=2, temperature=1.0, max_response=9, slots=3, pack_tokens=50, workers=number
    )
    examples = [SimpleNamespace(where=f"file:{g + 1}") for g in range(3)]
    groups = [rollouts.Group(SimpleNamespace(example=example)) for example in examples]
    rollouts.sample_groups(None, encoder, groups, verify, args, (0,))
    return groups


def ends_in_turn(hf, prompts, rows, max_tokens, on_end, **_):
    """Rollouts end in another order than their rows stand."""
    found = [Rollout([row], [0.0], "end") for row in range(len(rows))]
    for row in (3, 0, 5, 1, 4, 2):
        on_end(row, found[row])
    return found


@pytest.mark.parametrize("number", THREADS)
def test_verdicts_stand_by_their_rollouts(monkeypatch, number):
    seen = []

    def verify(text, example):
        time.sleep(0.01 * (int(text[-1]) % 3))
        seen.append((text, example.where))
        return {"reward": float(text[-1])}

    groups = sampled(monkeypatch, number, ends_in_turn, verify)
    for g, group in enumerate(groups):
        assert group.texts == [f"text {2 * g}", f"text {2 * g + 1}"]
        assert group.verdicts["reward"].tolist() == [2 * g, 2 * g + 1]
    assert sorted(seen) == [(f"text {row}", f"file:{row // 2 + 1}") for row in range(6)]


def test_rollouts_are_verified_while_others_are_sampled(monkeypatch):
    verified = threading.Event()

    def generate(hf, prompts, rows, max_tokens, on_end, **_):
        found = [Rollout([row], [0.0], "end") for row in range(len(rows))]
        on_end(0, found[0])
        assert verified.wait(PATIENCE), "the first is verified when all are sampled"
        for row in range(1, len(rows)):
            on_end(row, found[row])
        return found

    def verify(text, example):
        verified.set()
        return {"reward": 1.0}

    sampled(monkeypatch, 2, generate, verify)


@pytest.mark.parametrize("number", THREADS)
def test_an_error_of_the_verifier_ends_the_step(monkeypatch, number):
    def verify(text, example):
        raise ZeroDivisionError(f"a reward of one's own, {text}")

    with pytest.raises(ZeroDivisionError, match="one's own, text 0") as caught:
        sampled(monkeypatch, number, ends_in_turn, verify)
    assert caught.value.__notes__ == ["of a response to file:1: 'text 0'"]


def test_without_workers_the_main_thread_verifies(monkeypatch):
    def verify(text, example):
        assert threading.current_thread() is threading.main_thread()
        return {"reward": 1.0}

    sampled(monkeypatch, 0, ends_in_turn, verify)


@needs_math_verify
def test_threads_with_one_question_ask_it_once(monkeypatch):
    """The rollouts of a group often have the same answer."""
    math_worker._verdicts.clear()
    asked = []

    def exchange(question, seconds):
        asked.append(question)
        time.sleep(0.05)
        return True, 0.01

    monkeypatch.setattr(math_worker, "exchange", exchange)
    workers = Workers(3)
    jobs = [workers.begin(equivalent, r"\sqrt{52}", r"2\sqrt{13}") for _ in range(6)]
    assert all(job.result() for job in jobs)
    assert len(asked) == 1
    math_worker._verdicts.clear()


@needs_math_verify
def test_threads_ask_side_by_side(monkeypatch):
    both = threading.Barrier(2)

    def exchange(question, seconds):
        both.wait(PATIENCE)
        return True, 0.01

    math_worker._verdicts.clear()
    monkeypatch.setattr(math_worker, "exchange", exchange)
    workers = Workers(2)
    jobs = [workers.begin(equivalent, rf"\sqrt{{{4 * n}}}", rf"2\sqrt{{{n}}}") for n in (17, 19)]
    assert all(job.result() for job in jobs)
    math_worker._verdicts.clear()


# --------------------------------------------------------------------------------- the process ends
SLOW_ROWS = """
import signal, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it
sys.path.insert(0, {root!r})
from engine.rows import Data

def build(example):
    time.sleep(1.0)
    return example

data = Data({path!r}, lambda row, where, index: index, workers=2)
order = data.order(seed=0)
data.draw(order, 2, build)
data._begin_ahead(range(100), build)
print("begun", flush=True)
{waits}
"""


@pytest.mark.parametrize("how", ["interrupted", pytest.param("at its end", marks=pytest.mark.slow)])
def test_a_process_ends_at_once_and_quietly(folder, how):  # noqa: F811
    """100 rows of a second wait for two threads, or for the main one too: they are dropped."""
    path = write(folder, *[verl()] * 200)
    waits = "data.draw(order, 100, build)" if how == "interrupted" else ""
    code = SLOW_ROWS.format(root=str(ROOT), path=str(path), waits=waits)
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout.readline() == "begun\n"
        if how == "interrupted":
            time.sleep(0.3)
            process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=PATIENCE)  # the rows would take 33 s or 50
    finally:
        process.kill()
    if how == "interrupted":
        assert process.returncode == -signal.SIGINT
        assert errors.rstrip().endswith("KeyboardInterrupt") and errors.count("Traceback") == 1
    else:
        assert (process.returncode, errors) == (0, "")
