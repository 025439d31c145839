"""The command line of a stage: types, help, files of arguments, one message for what is wrong."""

import json
import os
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import pytest
from conftest import ROOT

import align
import rlvr
from engine import arguments
from engine.arguments import option


@dataclass
class Args(arguments.Common):
    seed: int = option(0, "another help than of every stage")
    words: tuple[str, ...] = option((), "of any number")
    alpha: float = option(0.5, "weight of perception, 1 is 100 %")
    temperature: float = option(1.0, "of sampling", above=0)
    blind: bool = option(False, "no images")
    greedy: bool = option(True, "decode greedily too")
    band: tuple[float, float] = option((0.0, 1.0), "pass rates")
    scaled: bool | None = option(None, "none: the preset's")
    ratio: Literal["token", "sequence"] | None = option(None, "none: the preset's")

    def __post_init__(self):
        super().__post_init__()
        if self.alpha > 1:
            raise ValueError(f"--alpha is {self.alpha}: it is a share, at most 1")


NEEDED = ["--policy", "p", "--data", "d"]


@pytest.fixture(autouse=True)
def in_a_folder_with_data(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("d").touch()


def refused(capsys, line, Args=Args):
    """Parse what has to be refused -> the message, of one line."""
    with pytest.raises(SystemExit) as stop:
        arguments.parse(Args, list(map(str, line)))
    assert stop.value.code == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.count("\n") == 1
    return said.err


def test_types():
    line = "--words a b --no-blind --no-greedy --max_pixels 5 --band 0.1 0.9"
    args = arguments.parse(Args, [*NEEDED, *line.split(), "--schedule", "cosine", "--lr", "1e-3"])
    assert args.words == ("a", "b")
    assert args.blind is False and args.greedy is False
    assert args.max_pixels == 5
    assert args.band == (0.1, 0.9)
    assert (args.schedule, args.lr, args.alpha, args.policy) == ("cosine", 1e-3, 0.5, "p")
    assert arguments.parse(Args, [*NEEDED, "--max_pixels", "none", "--blind"]).max_pixels is None
    assert (args.scaled, args.ratio) == (None, None)
    args = arguments.parse(Args, [*NEEDED, "--resume", "--no-scaled", "--ratio", "token"])
    assert (args.resume, args.scaled, args.ratio, args.greedy) == (True, False, "token", True)
    assert arguments.parse(Args, [*NEEDED, "--scaled"]).scaled is True


def test_help_lists_every_flag_with_its_help_and_default(capsys):
    with pytest.raises(SystemExit) as stop:
        arguments.parse(Args, ["--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert stop.value.code == 0
    assert "one message for what is wrong" in text  # the docstring of the file is the manual
    for flag in Args.__dataclass_fields__:
        assert f"--{flag}" in text
    assert "weight of perception, 1 is 100 % (default: 0.5)" in text
    assert "decode greedily too (default: True)" in text
    assert "pass rates (default: 0.0 1.0)" in text
    assert "(default: )" not in text and "(default: None)" not in text
    assert "another help than of every stage" in text
    assert "of weights, order of the data and rollouts" not in text  # the redeclared field's


@pytest.mark.parametrize(
    "line, says",
    [
        ("--aplha 0.1", "there is no --aplha: did you mean --alpha? (--help lists all)"),
        ("--group-sise=3", "there is no --group-sise"),
        # No abbreviations: a later flag could change their meaning.
        ("--pol p", "did you mean --policy?"),
        ("--dtype fp8", "invalid choice: 'fp8'"),
        ("--steps 0", "--steps is 0: it must be 1 or more"),
        ("--lr -1", "--lr is -1.0: it must be 0 or more"),
        ("--lr nan", "--lr is nan: it must be a finite number"),
        ("--lr inf", "--lr is inf: it must be a finite number"),
        ("--temperature 0", "--temperature is 0.0: it must be above 0"),
        ("--grad_clip 0", "--grad_clip is 0.0: it must be above 0"),
        ("--max_pixels 0", "--max_pixels is 0: it must be 1 or more"),
        ("--image_root nowhere", "--image_root nowhere: no such folder"),
        ("--band 0 -2", "--band is -2.0"),
        ("--steps 1.5", "invalid int value"),
        ("--alpha 2", "at most 1"),
        ("--alpha 1 ckpt/sft", "unrecognized arguments: ckpt/sft"),
    ],
)
def test_what_is_wrong_is_one_line_with_its_mend(line, says, capsys):
    message = refused(capsys, [*NEEDED, *line.split()])
    assert says in message
    assert message.startswith("test_arguments.py: ")


def test_missing_arguments(capsys):
    assert "--policy" in refused(capsys, ["--data", "d"])
    assert "--data is missing" in refused(capsys, ["--policy", "p"])


def test_the_run_folder_has_the_stage_s_name():
    assert arguments.parse(Args, NEEDED).out == "ckpt/test_arguments"
    assert align.Args(policy="p").out == "ckpt/align"
    assert rlvr.Args(policy="p", out="mine").out == "mine"


# ----------------------------------------------------------------------------- files of arguments
def test_config_repeats_a_run_and_flags_win(tmp_path):
    """What a checkpoint's meta.json says of the arguments is, as --config, the same run again, in
    every stage."""
    own = ["--words", "a b", "c", "--band", "0.1", "0.9", "--no-scaled", "--no-greedy"]
    given = {
        align.Args: "--alpha 0.25 --disc_blind --steps 7 --max_pixels 99".split(),
        rlvr.Args: "--algo dapo --max_response 9000 --no-scale_by_std --lr 3e-05".split(),
        Args: [*own, "--max_pixels", "none"],
    }
    for Kind, line in given.items():
        was = arguments.parse(Kind, [*NEEDED, *line])
        path = tmp_path / "meta.json"
        path.write_text(json.dumps({"step": 3, "args": vars(was)}))
        again = arguments.parse(Kind, ["--config", str(path)])
        assert again.config == str(path)
        assert replace(again, config="") == was
        # A repeated run's, and without what is around the arguments.
        path.write_text(json.dumps(vars(again)))
        more = arguments.parse(Kind, ["--out", "elsewhere", f"--config={path}", "--seed", "5"])
        assert more == replace(was, config=str(path), out="elsewhere", seed=5)


def test_config_holds_arguments_not_what_follows_from_them(tmp_path):
    """Another algorithm comes with its own presets; what was given beside it stays."""
    path = tmp_path / "meta.json"
    was = arguments.parse(rlvr.Args, [*NEEDED, "--algo", "dapo", "--overlong", "99"])
    path.write_text(json.dumps({"args": vars(was)}))
    again = arguments.parse(rlvr.Args, ["--config", str(path), "--algo", "gspo"])
    other = arguments.parse(rlvr.Args, [*NEEDED, "--algo", "gspo", "--overlong", "99"])
    assert replace(again, config="") == other
    assert rlvr.chosen_algorithm(again) == rlvr.chosen_algorithm(other)
    assert rlvr.chosen_algorithm(again).clip_high == 4e-4


@pytest.mark.parametrize(
    "line, says",
    [
        ("--dual_clip 1", "--dual_clip is 1.0: a bound of |advantage| or less"),
        ("--algo dapo --max_response 96", "--overlong 4096, as --algo dapo has it, must be below"),
        ("--overlong 96 --max_response 96", "--overlong 96 must be below --max_response 96: give"),
    ],
)
def test_what_is_wrong_in_rlvr(line, says, capsys):
    assert says in refused(capsys, [*NEEDED, *line.split()], rlvr.Args)


@pytest.mark.parametrize(
    "config, says",
    [
        ({"aplha": 1}, "has no aplha: did you mean alpha?"),
        ({"algo": "grpo", "overlong": 3}, "has no algo, overlong: is it of another script"),
        ({"alpha": "half"}, "run.json: argument --alpha: invalid float value: 'half'"),
        ({"steps": 2.5}, "invalid int value: '2.5'"),
        ({"steps": True}, "argument --steps: expected one argument"),
        ({"blind": "yes"}, "--blind"),
        ({"schedule": "linear"}, "invalid choice: 'linear'"),
        ({"alpha": 2}, "run.json: --alpha is 2.0: it is a share, at most 1"),
        ({"band": [0.1]}, "argument --band: expected 2 arguments"),
        ([1], "not a JSON file of arguments"),
        ("{", "not a JSON file of arguments"),
        (None, "No such file"),
    ],
)
def test_config_errors_name_file_and_mend(config, says, tmp_path, capsys):
    path = tmp_path / "run.json"
    if config is not None:
        path.write_text(config if isinstance(config, str) else json.dumps(config))
    message = refused(capsys, [*NEEDED, "--config", path])
    assert says in message and str(path) in message


# ----------------------------------------------------------------------------- without --data
STAGE = '''"""A stage."""
import os, sys, time
sys.path.insert(0, {root!r})
from dataclasses import dataclass
from engine.arguments import Common, option, parse

@dataclass(kw_only=True)
class Args(Common):
    alpha: float = option(0.5, "a weight")

if os.environ.get("LATE") == os.environ.get("RANK", "0"):
    time.sleep(1)
args = parse(Args)
sys.stdout.write(f"ran {{args.data}} {{args.out}} {{args.alpha}} {{args.steps}}\\n")  # at once
'''


@pytest.fixture
def stage(tmp_path):
    """A stage in a folder of its own, with settings of the embedded world -> what runs it."""
    (tmp_path / "toy.py").write_text(STAGE.format(root=str(ROOT)))
    (tmp_path / "runs").mkdir()
    tiny = {"data": "data/toy.jsonl", "alpha": 0.25, "steps": 7}
    (tmp_path / "runs/tiny-toy.json").write_text(json.dumps(tiny))

    def run(*line, ranks=0, options=(), env=None):
        command = [sys.executable]
        if ranks:
            torchrun = str(Path(sys.executable).with_name("torchrun"))
            command = [torchrun, f"--nproc_per_node={ranks}", *options]
        environment = os.environ | {"OMP_NUM_THREADS": "1"} | (env or {})
        return subprocess.run(
            [*command, "toy.py", *line],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
            timeout=120,
        )

    return run


EMBEDDED = "no --data: the embedded world, data/toy.jsonl, with the sizes of runs/tiny-toy.json\n"


def test_without_data_the_settings_are_those_of_the_embedded_world(stage, tmp_path):
    done = stage("--policy", "p")
    assert (done.returncode, done.stdout) == (2, "")
    assert "data/toy.jsonl is not there: `bash runs/tiny.sh` makes it" in done.stderr
    assert "--config" not in done.stderr  # nobody gave one
    (tmp_path / "data").mkdir()
    (tmp_path / "data/toy.jsonl").touch()
    done = stage("--policy", "p", "--steps", "3")
    assert done.stdout == f"{EMBEDDED}ran data/toy.jsonl ckpt/toy 0.25 3\n", done.stderr
    (tmp_path / "mine").touch()
    done = stage("--policy", "p", "--data", "mine")  # then the defaults are the stage's own
    assert done.stdout == "ran mine ckpt/toy 0.5 500\n"
    (tmp_path / "mine.json").write_text('{"data": "mine", "alpha": 1}')
    done = stage("--policy", "p", "--config", "mine.json")
    assert done.stdout == "ran mine ckpt/toy 1.0 500\n"


# ----------------------------------------------------------------------------- several processes
@pytest.mark.parametrize("ranks, late", [(2, "0"), pytest.param(8, "1", marks=pytest.mark.slow)])
def test_a_wrong_flag_under_torchrun_is_one_message(stage, ranks, late):
    """Whichever process comes first; and torchrun's own report, of fifty lines, is not there."""
    done = stage("--policy", "p", "--aplha", "1", ranks=ranks, env={"LATE": late})
    message = "toy.py: there is no --aplha: did you mean --alpha? (--help lists all)\n"
    assert (done.stdout, done.stderr) == ("", message)
    assert done.returncode != 0


@pytest.mark.parametrize(
    "line, says",
    [
        ("--policy ckpt/nowhere --data d", "--policy ckpt/nowhere: no such folder"),
        ("--policy p --data nowhere.jsonl", "--data nowhere.jsonl: no such file"),
        ("--policy p --data d --eval_data nowhere", "--eval_data nowhere: no such file"),
        ("--policy p --data d --pairs nowhere", "--pairs nowhere: no such file"),
        ("--policy p --data d --disc_path ./x", "--disc_path ./x: no such folder"),
        ("--policy p --data d --out old", "old/log.jsonl exists: continue that run with"),
        ("--policy p --data d --out warm", "warm/warmup/log.jsonl exists: continue that run"),
    ],
)
def test_wrong_paths_are_found_before_anything_is_loaded(line, says, capsys):
    for folder in ("old", "warm/warmup"):
        Path(folder).mkdir(parents=True)
        Path(folder, "log.jsonl").touch()
    arguments.parse(align.Args, [*"--policy p --data d --out warm --resume".split()])
    for data in ("hf://datasets/owner/name/rows.parquet", "*d"):
        arguments.parse(align.Args, ["--policy", "p", "--data", data])
    assert refused(capsys, line.split(), align.Args).startswith(f"align.py: {says}")


def test_torchrun_reports_where_our_message_passes_through_it(stage):
    """With --tee it would be lost if torchrun was ended before it had shown it."""
    done = stage("--policy", "p", "--lr", "nan", ranks=2, options=["--tee", "3"])
    said = done.stdout + done.stderr
    assert said.count("--lr is nan: it must be a finite number") == 1
    assert "ChildFailedError" in said


def test_first_line_is_said_once(stage, tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data/toy.jsonl").touch()
    done = stage("--policy", "p", ranks=2)
    assert done.stdout.count("no --data: the embedded world") == 1
    assert done.stdout.count(" data/toy.jsonl ckpt/toy 0.25 7") == 2  # two may print at once


def test_the_manual_is_printed_once(monkeypatch, capsys):
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(SystemExit):
        arguments.parse(Args, ["--help"])
    assert capsys.readouterr().out == ""
