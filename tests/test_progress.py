"""Progress of long work: seen on the first rank's terminal, and nowhere else."""

import io
import json
import re
import sys
from types import SimpleNamespace

from test_eval import arguments, place  # noqa: F401 (a fixture)

from data import read
from engine import checkpoint, evaluation, progress
from engine.packs import Tree, packs_of_own
from model import load
from rewards import measure


class Terminal(io.StringIO):
    def isatty(self):
        return True


def open_terminal(monkeypatch):
    """What a person sees from here on, without the patience. (Between a fixture and its test pytest
    would take stderr back.)"""
    screen = Terminal()
    monkeypatch.setattr(sys, "stderr", screen)
    monkeypatch.setattr(progress, "DELAY", 0)
    monkeypatch.setattr(progress, "INTERVAL", 0)
    return screen


def evaluate(place):  # noqa: F811
    policy = load(place / "model")
    policy.encoder.eos_ids = ()  # all rows end at the limit
    data = read(place / "rows.jsonl", "eval")
    ranks = SimpleNamespace(rank=0, world=1)
    evaluation.evaluate(policy.hf, policy.encoder, data, measure, arguments(place), ranks)


def test_evaluation_encoding_and_sampling_are_shown(place, monkeypatch):  # noqa: F811
    terminal = open_terminal(monkeypatch)
    evaluate(place)
    shown = terminal.getvalue()
    assert re.search(r"evaluating rows.jsonl: 100%.* 5/5 \[", shown)
    assert re.search(r"encoding: +60%.* 3/5 \[.*<.*row", shown)
    assert re.search(r"sampling: +0%.* 0/4 \[.* tokens/s\]", shown)  # while no row has ended
    assert re.search(r"sampling: +100%.* 4/4 \[.* tokens/s\]", shown)
    assert "left out: " in shown
    assert re.search(r"\r +\r$", shown)  # it is wiped


def test_nothing_is_shown_where_nobody_looks(place, monkeypatch):  # noqa: F811
    terminal = open_terminal(monkeypatch)
    with monkeypatch.context() as patched:
        patched.setattr(progress, "is_main", lambda: False)
        evaluate(place)
    file = io.StringIO()
    monkeypatch.setattr(sys, "stderr", file)
    evaluate(place)
    for text in (terminal.getvalue(), file.getvalue()):
        assert text.count("\n") == len(text.splitlines()) == 1 and text.startswith("left out: ")


def test_nothing_is_shown_of_short_work(place, monkeypatch):  # noqa: F811
    terminal = open_terminal(monkeypatch)
    monkeypatch.setattr(progress, "DELAY", 100)
    evaluate(place)
    for row in progress.progress([1], "one"):
        assert row == 1
    assert not re.search("evaluating|encoding|sampling|one", terminal.getvalue())


def test_saving_is_shown(tmp_path, monkeypatch):
    terminal = open_terminal(monkeypatch)
    checkpoint.save(tmp_path / "last", lambda folder: None, {"step": 1})
    assert json.loads((tmp_path / "last/meta.json").read_text())["step"] == 1
    assert re.search(r"saving .*last: +33%.* 1/3 \[", terminal.getvalue())
    assert re.search(r"saving .*last: +67%.* 2/3 \[", terminal.getvalue())


def test_packs_are_shown(place, monkeypatch):  # noqa: F811
    terminal = open_terminal(monkeypatch)
    policy = load(place / "model")
    prompts = read(place / "rows.jsonl", "eval").fetch([0, 1, 3], policy.encoder.prompt)
    packs = packs_of_own([Tree(prompt) for prompt in prompts], 1, "cpu")
    assert len(list(packs)) == 3
    assert re.search(r"packs: +67%.* 2/3 \[.*pack", terminal.getvalue())
