"""log.jsonl, rollouts.jsonl, the printed line, and what a resumed run keeps of them."""

import json
import math
import sys
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import strict_records

from engine import arguments
from engine.log import Log


@dataclass
class Args(arguments.Common):
    alpha: float = arguments.option(0.5, "a weight")


def records(file):
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_log(tmp_path, capsys):
    args = Args(policy="p", out=str(tmp_path / "run"), steps=4)
    log = Log(args.out, args, show=("loss", "gap"))
    for step in (1, 2, 3):
        log.step(step, {"loss": 1.0 / step, "n": step, "empty": math.nan, "most": math.inf})
    path = Path(args.out, "log.jsonl")
    header, *steps = strict_records(path)
    assert header["args"]["alpha"] == 0.5
    assert {"commit", "versions", "hardware"} <= set(header)
    assert [record["step"] for record in steps] == [1, 2, 3]
    assert steps[1]["loss"] == 0.5
    assert steps[0]["empty"] is None
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3
    assert len({len(line) for line in lines}) == 1  # aligned
    assert "loss 0.5" in lines[1] and "gap nan" in lines[1]
    assert Path(args.out, "test_log.py").read_text() == Path(__file__).read_text()

    with pytest.raises(SystemExit, match="--resume"):
        Log(args.out, args)
    with open(path, "a") as file:
        file.write('{"step": 4, "lo')  # killed while writing
    args.resume = True
    Log(args.out, args, done=2).step(3, {"loss": 9.0})
    found = records(path)
    assert [record.get("step") for record in found] == [None, 1, 2, None, 3]
    assert found[-1]["loss"] == 9


@pytest.mark.parametrize("block", [1 << 20, 600])
def test_other_readers_open_it(tmp_path, block):
    """pyarrow, and with it datasets and pandas, wants strict JSON and columns of one type: also
    where it reads the file in several blocks, some of them without a value."""
    reader = pytest.importorskip("pyarrow.json")
    args = Args(policy="p", out=str(tmp_path / "run"), steps=9)
    log = Log(args.out, args)
    for step in range(9):
        log.step(step, {"loss": math.nan if step < 5 else 0.5, "skipped": 0})
        log.rollouts(step, {"advantage": [math.nan if step < 5 else 0.5], "reference_scores": {}})
    Log(args.out, Args(policy="p", out=args.out, steps=9, resume=True), done=8)
    options = reader.ReadOptions(block_size=block)
    table = reader.read_json(Path(args.out, "rollouts.jsonl"), options)
    assert table["advantage"].to_pylist()[4:6] == [[None], [0.5]]
    options = reader.ReadOptions(block_size=max(block, 2000))  # a header is one line
    table = reader.read_json(Path(args.out, "log.jsonl"), options)
    assert table["loss"].to_pylist()[5:8] == [None, 0.5, 0.5]


def test_seconds_are_those_of_a_step(tmp_path, monkeypatch):
    times = iter([10.0, 11.0, 13.0])
    clock = SimpleNamespace(perf_counter=lambda: next(times), time=lambda: 0.0)
    monkeypatch.setattr("engine.log.time", clock)
    args = Args(policy="p", out=str(tmp_path / "run"), steps=2)
    log = Log(args.out, args)
    for step in (1, 2):
        log.step(step, {})
    _, *steps = records(Path(args.out, "log.jsonl"))
    assert [record["seconds"] for record in steps] == [1.0, 2.0]


def test_printed_lines(tmp_path, capsys):
    """Every --log_every steps and at the end, under labels of their own; log.jsonl has all."""
    args = Args(policy="p", out=str(tmp_path / "run"), steps=5, log_every=2)
    log = Log(args.out, args, show=("grad_norm grad",))
    for step in range(1, 6):
        log.step(step, {"grad_norm": step})
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["2/5", "4/5", "5/5"]
    assert "| grad 2 " in lines[0]
    assert len(records(Path(args.out, "log.jsonl"))) == 6


def test_a_validation_has_a_line_of_its_own(tmp_path, capsys):
    """Whatever --log_every is; step 0, before the first update, has no other. A run that begins
    again makes it anew, one that goes on keeps it."""
    args = Args(policy="p", out=str(tmp_path / "run"), steps=9, log_every=5)
    log = Log(args.out, args, show=("loss",))
    log.step(0, {"eval/accuracy": 0.25})
    log.step(1, {"loss": 2.0})
    log.step(2, {"loss": 1.0, "eval/accuracy": 0.5, "eval/items": math.nan})
    lines = capsys.readouterr().out.splitlines()
    assert [" ".join(line.split()) for line in lines] == [
        "0/9 | eval/accuracy 0.25",
        "2/9 | eval/accuracy 0.5 | eval/items nan",
    ]
    args.resume = True
    for done, kept in ((2, [0, 1, 2]), (1, [0, 1]), (0, [])):
        Log(args.out, args, done=done)
        found = [record for record in records(Path(args.out, "log.jsonl")) if "step" in record]
        assert [record["step"] for record in found] == kept


def test_a_missing_package_is_named(tmp_path, monkeypatch):
    asked = {"wandb": {"wandb": "project"}, "tensorboard": {"tensorboard": True}}
    for package, flag in asked.items():
        monkeypatch.setitem(sys.modules, package, None)
        with pytest.raises(SystemExit, match=f"pip install {package}"):
            Log(tmp_path / package, Args(policy="p", out="o", **flag))
        assert not (tmp_path / package).exists()  # so that the next start finds no log in its way


def test_tensorboard_gets_every_scalar(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    args = Args(policy="p", out="o", tensorboard=True, resume=True)
    # The second goes on from a checkpoint of step 2.
    for done, steps in ((0, (1, 2, 3)), (2, (3, 4))):
        log = Log(tmp_path, args, done=done)
        for step in steps:
            log.step(step, {"a/loss": done + step / 2, "gap": math.nan})
        log.board.close()
    found = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    losses = [(event.step, event.value) for event in found.Scalars("a/loss")]
    assert losses == [(1, 0.5), (2, 1.0), (3, 3.5), (4, 4.0)]
    assert all(math.isnan(event.value) for event in found.Scalars("gap"))


def test_resume_drops_later_rollouts(tmp_path):
    args = Args(policy="p", out="o", resume=True)
    log = Log(tmp_path, args)
    file = tmp_path / "rollouts.jsonl"
    assert not file.exists()  # stage 1 has none
    for step in (1, 2, 3):
        log.rollouts(step, {"advantage": [math.nan, 1.5]})
    with open(file, "a") as end:
        end.write('{"step": 1, "te')  # killed while writing
    Log(tmp_path, args, done=2).rollouts(3, {"advantage": []})
    kept = [(record["step"], record["stage"], record["advantage"]) for record in records(file)]
    assert kept == [
        (1, "test_log", [None, 1.5]),
        (2, "test_log", [None, 1.5]),
        (3, "test_log", []),
    ]
