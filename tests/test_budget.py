"""Tokens that runs have generated, and the updates of another run that generate as many, against
values worked out by hand; and what is said of runs that have no such number."""

import importlib
import json
import sys

import pytest

from tools import budget

RLVR = {"prompts_per_step": 2, "group_size": 4}
ALIGN = {"prompts_per_step": 3, "group_size": 4}
WARMUP = {"pairs": "", "spans": "both", "warmup_pairs": 16, "data": "", **ALIGN}


def write_log(folder, args, *steps):
    """A run's log.jsonl: its arguments, then a line per step -> the folder."""
    folder.mkdir(parents=True)
    lines = [{"args": args}]
    lines += [{"step": number} | metrics for number, metrics in enumerate(steps, 1)]
    (folder / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def write_alignment(folder, updates=3, **warmup):
    """A run of alignment whose first rollouts are of 5 tokens, the next of 10; 12 in an update."""
    write_log(folder, ALIGN, {"length": 5.0}, {"length": 10.0})
    write_log(folder / "warmup", WARMUP | warmup, *[{"loss": 1.0}] * updates)
    return folder


# ----------------------------------------------------------------------------- in numbers
def test_tokens_are_length_times_rollouts(tmp_path):
    """DAPO has drawn 5 groups for its first update, and none for its second."""
    drawn = [{"length": 10.0, "sampled": 5}, {"length": 8.0, "sampled": 0}, {"length": 2.5}]
    run = write_log(tmp_path / "dapo", RLVR, *drawn)
    assert budget.tokens_per_update(run) == [10 * 5 * 4, 0, 2.5 * 2 * 4]


def test_of_a_step_that_was_made_again_the_last_counts(tmp_path):
    run = write_log(tmp_path / "grpo", RLVR, {"length": 10.0}, {"length": 20.0})
    with (run / "log.jsonl").open("a") as file:
        file.write(json.dumps({"args": {}}) + "\n")
        file.write(json.dumps({"step": 2, "length": 30.0}) + "\n")
    assert budget.tokens_per_update(run) == [80, 240]


@pytest.mark.parametrize(
    "rows, warmup, rollouts",
    [
        # 16 pairs in 2 spans are 2 rows of 4 rollouts; of 3 updates they are 24.
        (None, {}, 24 + 64 * 4),  # the file is not there
        (20, {}, 24 + 2 * 4),
        (1500, {}, 24 + 64 * 4),
        (5, {}, 24 + 1 * 4),  # at least one row is held out
        (20, {"spans": "whole"}, 48 + 2 * 4),
        (20, {"warmup_pairs": 7}, 12 + 2 * 4),  # at least one row
        (20, {"pairs": "pairs.jsonl"}, 0),  # read, not sampled
    ],
)
def test_warmup_is_its_updates_and_the_rows_held_out(tmp_path, rows, warmup, rollouts):
    """Each as long as the game's first rollouts, 5 tokens."""
    data = tmp_path / "align.jsonl"
    if rows:
        data.write_text("{}\n" * rows)
    run = write_alignment(tmp_path / "align", data=str(data), **warmup)
    assert budget.warmup_tokens(run) == 5 * rollouts


def test_rows_of_other_files_are_not_counted(tmp_path):
    (tmp_path / "align.json").write_text("[]\n" * 20)
    assert budget.held_out_rows(str(tmp_path / "align.json")) == 64


def test_as_many_rows_are_held_out_as_alignment_holds_out():
    assert budget.HELD_OUT == importlib.import_module("align").HELD_OUT


def test_runs_are_added_up(tmp_path):
    align = write_alignment(tmp_path / "align")
    grpo = write_log(tmp_path / "grpo", RLVR, {"length": 10.0})
    of_warmup = 5 * (24 + 256)
    assert budget.generated([align]) == of_warmup + 60 + 120
    assert budget.generated([align, grpo]) == of_warmup + 60 + 120 + 80
    with pytest.raises(ValueError, match="grpo is named twice: a run counts once"):
        budget.generated([align, grpo, f"{tmp_path}/align/../grpo"])


def test_updates_within_the_run():
    """After 1, 2 and 3 updates it has generated 100, 150 and 250."""
    of_run = [100, 50, 100]
    assert budget.updates_for(100, of_run) == 1
    assert budget.updates_for(101, of_run) == 2
    assert budget.updates_for(150, of_run) == 2
    assert budget.updates_for(150.5, of_run) == 3
    assert budget.updates_for(250, of_run) == 3
    assert budget.updates_for(0, of_run) == 1


def test_updates_beyond_the_run_are_as_its_last_twenty():
    """The mean of 20 is told apart from that of 19 and that of 21."""
    # One of 1000, then twenty of 10: 1200 in all, and 10 more with each further update
    of_run = [1000] + [10] * 20
    assert budget.updates_for(1200, of_run) == 21
    assert budget.updates_for(1201, of_run) == 22
    assert budget.updates_for(1210, of_run) == 22
    assert budget.updates_for(1211, of_run) == 23
    # 29.5 is the mean of the last 20, 10 that of the last 19, and 76 that of all 21.
    of_run = [1000, 400] + [10] * 19
    assert budget.updates_for(sum(of_run) + 29.5, of_run) == 22
    assert budget.updates_for(sum(of_run) + 59, of_run) == 23
    assert budget.updates_for(sum(of_run) + 60, of_run) == 24


# ----------------------------------------------------------------------------- the command
@pytest.fixture
def run(monkeypatch, capsys):
    """The command, in this process: run(*arguments) -> what it prints, or what it ends with."""

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["budget.py", *map(str, arguments)])
        try:
            budget.main()
        except SystemExit as end:
            assert isinstance(end.code, str)  # which python prints, and exits with 1
            return end.code
        return capsys.readouterr().out

    return call


def test_the_command_prints_tokens_or_updates(tmp_path, run):
    align = write_alignment(tmp_path / "align")
    grpo = write_log(tmp_path / "grpo", RLVR, *[{"length": 50.0}] * 3)  # 400 an update
    assert run(align) == "1580\n"
    assert run(align, "--as_updates_of", grpo) == "4\n"


@pytest.mark.parametrize(
    "args, steps, says",
    [
        ({"epochs": 1}, [{"loss": 1.0}], "run: its log has no groups of rollouts"),
        (RLVR, [], "log.jsonl: no arguments, or no step"),
        (["a"], [{"length": 5}], "log.jsonl: no arguments, or no step"),
        (RLVR, [{"loss": 1.0}], "log.jsonl: no step has a length"),
        (RLVR, [{"length": 5}, {"length": None}], "log.jsonl, step 2: length is null"),
        (RLVR, [{"length": 5, "sampled": None}], "log.jsonl, step 1: sampled is null"),
        (RLVR, [{"length": "5"}], "log.jsonl, step 1: length is '5', not a number"),
        ({"group_size": 4}, [{"length": 5}], "log.jsonl: there is no prompts_per_step"),
    ],
)
def test_a_run_without_numbers_is_named(tmp_path, run, args, steps, says):
    folder = write_log(tmp_path / "run", args, *steps)
    said = run(folder)
    assert said.startswith("budget.py: ") and says in said


def test_a_broken_log_is_named(tmp_path, run):
    folder = write_log(tmp_path / "run", RLVR, {"length": 5})
    for broken in ('{"step": 2, "len', "[1, 2]"):
        (folder / "log.jsonl").write_text(json.dumps({"args": RLVR}) + "\n" + broken)
        assert "run/log.jsonl:2: " in run(folder)
    assert "nowhere/log.jsonl" in run(tmp_path / "nowhere")


def test_a_run_that_generates_nothing_never_gets_there(tmp_path, run):
    align = write_alignment(tmp_path / "align")
    silent = write_log(tmp_path / "grpo", RLVR, *[{"length": 0.0}] * 3)
    said = run(align, "--as_updates_of", silent)
    assert "sampled nothing in its last 20 updates" in said and "1580 tokens" in said


@pytest.mark.parametrize("name", ["pairs", "spans", "data", "warmup_pairs", "group_size"])
def test_a_warmup_without_its_arguments_is_named(tmp_path, run, name):
    align = write_alignment(tmp_path / "align")
    log = align / "warmup/log.jsonl"
    header, *steps = log.read_text().splitlines(keepends=True)
    args = {key: value for key, value in WARMUP.items() if key != name}
    log.write_text(json.dumps({"args": args}) + "\n" + "".join(steps))
    said = run(align)
    assert "warmup/log.jsonl: " in said and name in said
