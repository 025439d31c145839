"""runs/: the embedded world's settings fit the stages, and tiny.sh overwrites nobody's run."""

import json
import re
import subprocess

import pytest
from conftest import ROOT

import align
import rlvr
import sft
from engine.arguments import parse

STAGES = {"sft": sft, "align": align, "rlvr": rlvr}


@pytest.mark.parametrize("name", STAGES)
def test_the_settings_are_arguments_of_the_stage(name, monkeypatch):
    monkeypatch.chdir(ROOT)
    settings = json.loads((ROOT / f"runs/tiny-{name}.json").read_text())
    flags = ["--config", f"runs/tiny-{name}.json", "--policy", "p", "--seed", "3"]
    args = parse(STAGES[name].Args, [*flags, "--data", "mine.jsonl"], with_paths=False)
    assert (args.data, args.seed) == ("mine.jsonl", 3)  # flags win
    assert settings["data"].startswith("data/tiny/")
    for argument, value in settings.items():
        assert argument == "data" or getattr(args, argument) == value


@pytest.fixture
def leave(tmp_path):
    """tiny.sh's function `leave` alone, in a folder with a run in out/run."""
    script = (ROOT / "runs/tiny.sh").read_text()
    functions = re.findall(r"^\w+\(\) \{$.*?^\}$", script, re.MULTILINE | re.DOTALL)

    def write_run(text):
        last = tmp_path / "out/run/last"
        (last / "resume").mkdir(parents=True, exist_ok=True)
        (last / "model.safetensors").write_text(text)
        (tmp_path / "out/run/log.jsonl").write_text("{}\n")

    def call(stage, text):
        write_run(text)
        command = "\n".join(["set -euo pipefail", *functions, f"leave out/run {stage}"])
        done = subprocess.run(["bash", "-c", command], cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout

    return call


def test_weights_are_left_where_a_run_of_ones_own_may_start(leave, tmp_path):
    leave("sft", "first")
    assert leave("sft", "second") == ""  # what it left itself it replaces
    stage = tmp_path / "ckpt/sft"
    assert [path.name for path in stage.iterdir()] == ["last"]  # no log: a run may start here
    assert (stage / "last/model.safetensors").read_text() == "second"
    assert not (stage / "last/resume").exists()


@pytest.mark.parametrize("case", ["begun", "saved", "from elsewhere", "empty"])
def test_a_run_of_ones_own_stays(leave, tmp_path, case):
    stage = tmp_path / "ckpt/align"
    if case in ("begun", "saved"):
        leave("align", "tiny")
        (stage / "log.jsonl").write_text("{}\n")
    if case in ("saved", "from elsewhere"):  # a checkpoint replaces last/ with the mark in it
        (stage / "last/.from-tiny").unlink(missing_ok=True)
        (stage / "last").mkdir(parents=True, exist_ok=True)
        (stage / "last/model.safetensors").write_text("mine")
    stage.mkdir(parents=True, exist_ok=True)
    before = {path: path.is_file() and path.read_text() for path in stage.rglob("*")}
    assert "ckpt/align stays as it is" in leave("align", "new")
    after = {path: path.is_file() and path.read_text() for path in stage.rglob("*")}
    assert after == before
