"""runs/: the embedded world's settings fit the stages, tiny.sh overwrites nobody's run, and the
commands of the scripts for real checkpoints run, on small files."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import released_files
from conftest import ROOT

import align
import eval as evaluation
import rlvr
import sft
from engine import files
from engine.arguments import parse
from engine.rows import Rows
from tools import memory

STAGES = {"sft": sft, "align": align, "rlvr": rlvr}
SCRIPTS = {f"{name}.py": stage for name, stage in STAGES.items()} | {"eval.py": evaluation}


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


# --------------------------------------------------------- scripts for what is released, on a CPU
# Every command that they give is run with these flags more. Few tokens: random weights never end.
FLAGS = {
    "FLAGS": "--device cpu --dtype float32 --max_response 12",
    "SFT_FLAGS": "--steps 2 --batch 2 --max_response 64",
    "ALIGN_FLAGS": "--steps 1 --prompts_per_step 2 --group_size 2 --warmup_steps 1 "
    "--warmup_pairs 8 --max_response 64",
    "RLVR_FLAGS": "--steps 1 --prompts_per_step 2 --group_size 2",
}
SHIM = """#!{python} -S
import json, os, sys
command = [os.path.basename(sys.argv[0]), *sys.argv[1:]]
with open({log!r}, "a") as log:
    print(json.dumps([command, os.environ.get("WORLD_SIZE", "1")]), file=log)
"""


@pytest.fixture(scope="module")
def mirror(tmp_path_factory):
    pytest.importorskip("pyarrow")
    folder = tmp_path_factory.mktemp("mirror")
    released_files.build(folder)
    return folder


@pytest.fixture
def project(tmp_path):
    """A copy of the scripts, in whose environment programs are only written down, in commands."""
    project = tmp_path / "project"
    shutil.copytree(ROOT / "runs", project / "runs")
    for name in ("pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, project)
    programs = project / ".venv/bin"
    programs.mkdir(parents=True)
    for name in ("pip", "python", "torchrun", "hf"):
        shim = SHIM.format(python=sys.executable, log=str(project / "commands"))
        (programs / name).write_text(shim)
        (programs / name).chmod(0o755)
    pretend_installed(project)
    return project


def pretend_installed(project):
    """As env.sh leaves it behind."""
    lists = "cat pyproject.toml constraints.txt | cksum"
    stamp = subprocess.run(lists, shell=True, cwd=project, capture_output=True, text=True).stdout
    for extra in ("", "math", "parquet"):
        (project / f".venv/installed-{extra}").write_text(stamp)


def commands(project, script, *arguments, **variables):
    """What the script would run -> [(words, WORLD_SIZE)]."""
    done = subprocess.run(
        ["bash", f"runs/{script}", *map(str, arguments)],
        cwd=project,
        env=os.environ | {name: str(value) for name, value in variables.items()},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    lines = (project / "commands").read_text().splitlines()
    (project / "commands").unlink()
    return [json.loads(line) for line in lines]


def run_here(found, monkeypatch):
    """Run the commands in this process, by the names of their scripts."""
    for (program, *words), ranks in found:
        if program == "torchrun":
            assert words.pop(0) == "--nproc_per_node=1"
        script, *flags = words
        if script in SCRIPTS:
            stage = SCRIPTS[script]
            stage.main(parse(stage.Args, flags))
        else:
            assert script == "tools/memory.py"
            with monkeypatch.context() as patch:
                patch.setenv("WORLD_SIZE", ranks)
                memory.main(flags)


def stages_of(found):
    return [words[2] for words, _ in found if words[0] == "torchrun"]


def flag(command, name):
    """The value of a flag where it stands first: a script's own."""
    words, _ = command
    return words[words.index(f"--{name}") + 1]


def test_released_from_a_mirror(mirror, project, tmp_path, monkeypatch, capsys):
    settings = {"MIRROR": mirror, "GPUS": 1} | FLAGS
    out = tmp_path / "out"
    found = commands(project, "released.sh", out, **settings)
    assert stages_of(found) == ["align.py", "rlvr.py", "eval.py"]
    assert flag(found[1], "data").endswith("filtered_2k.parquet")
    assert all("--offload" in words for words, _ in found[:2])  # of 4B, on one GPU
    run_here(found, monkeypatch)
    assert last_line(out / "align")["left_out"] == 0
    assert last_line(out / "rlvr-grpo")["left_out"] == 0
    results = json.loads((out / "eval.json").read_text())["results"]
    assert len(results) == 3 * 2  # policies, benchmarks
    assert [result["left_out"] for result in results] == [{}] * len(results)


def last_line(run):
    return json.loads((run / "log.jsonl").read_text().splitlines()[-1])


def test_released_with_a_warm_up_of_ones_own(mirror, project, tmp_path, monkeypatch):
    """On the pairs, whose images come out of the archive; at 8B, by another algorithm."""
    settings = {"MIRROR": mirror, "GPUS": 1, "WARMUP": "own", "SIZE": "8B", "ALGO": "gspo"}
    out = tmp_path / "out"
    found = commands(project, "released.sh", out, **settings, **FLAGS)
    assert stages_of(found) == ["align.py", "align.py", "rlvr.py", "eval.py"]
    assert flag(found[2], "data").endswith("10k.parquet") and flag(found[2], "algo") == "gspo"
    assert len(list((out / "images").rglob("*.png"))) == 20
    run_here(found[:2], monkeypatch)
    warm_up = last_line(out / "warmup/warmup")
    assert warm_up["left_out"] == 0 and warm_up["perception/acc"] >= 0
    assert (out / "align/last/discriminator/config.json").exists()


def test_released_from_the_aligned_checkpoint(mirror, project, tmp_path):
    settings = {"MIRROR": mirror, "FROM": "prism", "GPUS": 4}
    found = commands(project, "released.sh", tmp_path / "out", **settings)
    assert stages_of(found) == ["rlvr.py", "eval.py"]
    assert flag(found[0], "policy").endswith("4B-Instruct-SFT-PRISM")
    assert not any("--offload" in words for words, _ in found)


def test_released_dry_run(mirror, project, monkeypatch, capsys):
    """What is downloaded, by the names on the hub; then the accounts."""
    found = commands(project, "released.sh", "--dry_run")
    asked = [words for words, _ in found if words[0] == "hf"]
    assert len(asked) == 6 and all("--dry-run" in words for words in asked)
    assert "prism-vlm/Qwen3-VL-4B-Instruct-SFT" in asked[0]
    assert ["--include", "rl_training_data_5.9k.parquet"] == asked[2][5:7]
    found = commands(project, "released.sh", "--dry_run", MIRROR=mirror)
    assert [ranks for _, ranks in found] == ["1", "1", "4", "4", "8", "8"]
    run_here(found, monkeypatch)
    assert capsys.readouterr().out.count("fits in 80 GB: yes") == 6


def test_released_in_another_size(project):
    done = subprocess.run(
        ["bash", "runs/released.sh"],
        cwd=project,
        env=os.environ | {"SIZE": "2B"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2 and "of 4B and 8B" in done.stderr


@pytest.mark.slow
def test_released_by_the_hub_s_names(mirror, project, tmp_path):
    """The whole script with real programs, under torchrun, against a hub on this machine."""
    for name in ("python", "torchrun", "hf"):
        real = Path(sys.executable).with_name(name)  # a link to it would not be in its environment
        (project / ".venv/bin" / name).write_text(f'#!/bin/sh\nexec {real} "$@"\n')
    for path in ROOT.iterdir():
        if path.name not in ("runs", ".venv", ".git", "pyproject.toml", "constraints.txt"):
            (project / path.name).symlink_to(path)
    out = tmp_path / "out"
    with released_files.served(mirror) as address:
        hub = {"HF_ENDPOINT": address, "HF_HOME": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "0"}
        for argument in ("--dry_run", out):
            done = subprocess.run(
                ["bash", "runs/released.sh", argument],
                cwd=project,
                env=os.environ | hub | {"GPUS": "1"} | FLAGS,
                capture_output=True,
                text=True,
            )
            assert done.returncode == 0, done.stderr[-3000:]
            if argument == "--dry_run":
                assert done.stdout.count("Will download") == 6
                assert done.stdout.count("fits in 80 GB: yes") == 6
    results = json.loads((out / "eval.json").read_text())["results"]
    assert [result["data"].split("/")[3] for result in results[:2]] == ["AI4Math", "MathLLMs"]


@pytest.fixture
def data(mirror, tmp_path):
    """What paper.sh takes, of the released rows; images of JSON beside it."""
    folder = tmp_path / "data"
    rows = mirror / "prism-vlm/rl_dataset/rl_training_data_5.9k.parquet"
    shutil.copytree(mirror / "prism-vlm/qwen3_vl_moe_warmup_pairwise_120k", folder)
    (folder / "warmup_pairwise.jsonl").rename(folder / "pairs.jsonl")
    subprocess.run(["tar", "-xzf", "images.tar.gz"], cwd=folder, check=True)
    for name in ("align", "rl", "rl_10k"):
        shutil.copy(rows, folder / f"{name}.parquet")
    turns = [*Rows(rows)[0]["prompt"], {"role": "assistant", "content": released_files.RESPONSE}]
    demonstrations = [{"messages": turns, "images": [f"images/{n}.png"]} for n in range(4)]
    (folder / "sft.json").write_text(json.dumps(demonstrations))
    return folder


def test_paper(mirror, data, project, tmp_path, monkeypatch, capsys):
    policy = mirror / "prism-vlm/Qwen3-VL-4B-Instruct-SFT"
    settings = {"POLICY": policy, "DISC": mirror / "Qwen/Qwen3-VL-2B-Instruct", "GPUS": 1}
    # Random weights solve nothing: here all rows are kept.
    evaluation_flags = {"EVAL_FLAGS": "--samples 2 --filter 0 1"}
    out = tmp_path / "out"
    found = commands(project, "paper.sh", data, out, **settings, **FLAGS, **evaluation_flags)
    names = ["sft.py", "align.py", "align.py", "eval.py", "rlvr.py", "rlvr.py"]
    assert stages_of(found) == names
    filtering, ours, baseline = found[-3:]
    words, _ = filtering
    assert words[words.index("--filter") :][:3] == ["--filter", "0.2", "0.8"]
    assert flag(filtering, "samples") == "16"
    steps = [int(flag(command, "steps")) for command in (found[-4], ours, baseline)]
    assert steps == [500, 1500, 2000]
    assert flag(ours, "data") == flag(baseline, "data") == flag(filtering, "filter_out")
    assert flag(baseline, "policy") == flag(found[-5], "policy") == str(out / "sft")
    run_here(found, monkeypatch)
    for run in ("sft", "warmup/warmup", "align", "rlvr-grpo", "sft-rlvr-grpo"):
        assert last_line(out / run)["left_out"] == 0, run
    assert len(Rows(out / "rl.parquet")) == 12


def test_paper_at_8b(data, project, tmp_path):
    """The 10K rows, which a filter has left already; without the baseline."""
    settings = {"POLICY": "Qwen/Qwen3-VL-8B-Instruct", "ALGO": "dapo", "BASELINE": ""}
    found = commands(project, "paper.sh", data, tmp_path / "out", **settings)
    assert stages_of(found) == ["sft.py", "align.py", "align.py", "rlvr.py"]
    assert flag(found[-1], "data") == str(data / "rl_10k.parquet")
    assert flag(found[-1], "algo") == "dapo"


# ------------------------------------------------------------------------------- data on the hub
def test_a_data_file_s_name(mirror, tmp_path):
    folder = mirror / "MathLLMs/MathVision/data"
    assert files.find_data(folder / "test-*.parquet").endswith("test-00000-of-00001-3532b8.parquet")
    with pytest.raises(ValueError, match=r"2 files match \(test-.*, testmini-.*name one of them"):
        files.find_data(f"{folder}/*.parquet")
    with pytest.raises(FileNotFoundError, match="val-.*no such file"):
        files.find_data(f"{folder}/val-*.parquet")
    odd = tmp_path / "a*.jsonl"  # a name is a name where there is such a file
    odd.write_text("{}\n")
    assert files.find_data(odd) == str(odd)
    with pytest.raises(ValueError, match="no file is named, as in hf://datasets/OWNER/NAME/FILE"):
        files.find_data("hf://datasets/some/rows")


def test_a_data_file_from_the_hub(mirror, monkeypatch):
    asked = []

    def fetch(name, **rest):
        asked.append((name, rest))
        return str(mirror / name)

    monkeypatch.setattr("huggingface_hub.snapshot_download", fetch)
    path = files.find_data("hf://datasets/MathLLMs/MathVision/data/testmini-*.parquet")
    assert Rows(path)[0]["answer"] == "A"
    pattern = {"repo_type": "dataset", "allow_patterns": ["data/testmini-*.parquet"]}
    assert asked == [("MathLLMs/MathVision", pattern)]
    with pytest.raises(FileNotFoundError, match="hf://datasets/MathLLMs/MathVision/x.parquet: no"):
        files.find_data("hf://datasets/MathLLMs/MathVision/x.parquet")


def test_a_base_is_whole_only_where_all_its_parts_are(project):
    """A stop in the last part leaves last/, too: the same command has to go on."""
    (project / "data/tiny").mkdir(parents=True)
    (project / "data/tiny/words.json").write_text("[]")
    base = project / "ckpt/base-tiny"
    (base / "last").mkdir(parents=True)
    scripts = [words[1] for words, _ in commands(project, "base.sh", "tiny")]
    assert scripts == ["tools/init.py", *["sft.py", "eval.py"] * 3]
    assert (base / "whole").exists()
    subprocess.run(["bash", "runs/base.sh", "tiny"], cwd=project, check=True)
    assert not (project / "commands").exists()


def test_a_base_of_a_seed(project):
    """Weights, rows and order are the seed's, and it has folders of its own; 0 is the first one."""
    (project / "data/tiny").mkdir(parents=True)
    (project / "data/tiny/words.json").write_text("[]")
    for base in ("base-tiny", "base-tiny-3"):
        (project / "ckpt" / base).mkdir(parents=True)
    found = commands(project, "base.sh", "tiny", "3")
    assert [words[1] for words, _ in found[:2]] == ["tools/scenes.py", "tools/init.py"]
    for command in found:
        if command[0][1] != "eval.py":
            assert flag(command, "seed") == "3"
    assert flag(found[0], "out") == "data/tiny-3"
    assert flag(found[-2], "data") == "data/tiny-3/base.jsonl"
    assert flag(found[-2], "out") == "ckpt/base-tiny-3"
    found = commands(project, "base.sh", "tiny", "0")
    assert {flag(command, "seed") for command in found if command[0][1] != "eval.py"} == {"0"}
    assert flag(found[-2], "out") == "ckpt/base-tiny"
