"""The promises about the repository's shape: sizes, arguments, manuals, style. They rot where no test holds them."""

import ast
import importlib
import json
import re
import subprocess
import sys
import tomllib
from dataclasses import fields

import pytest
from conftest import ROOT

from engine.arguments import Common, parse

CAPS = {  # lines of each file; what is not named may not exist
    "sft.py": 260,
    "align.py": 480,
    "rlvr.py": 360,
    "eval.py": 200,
    "model.py": 240,
    "files.py": 140,
    "packs.py": 320,
    "logprob.py": 140,
    "sampler.py": 260,
    "groups.py": 100,
    "data.py": 360,
    "rows.py": 260,
    "rewards.py": 260,
    "health.py": 160,
    "common.py": 260,
    "checkpoint.py": 120,
    "ranks.py": 130,
    "init.py": 120,
    "memory.py": 110,
    "benchmarks.py": 60,
    "tools/scenes.py": 240,
    "tools/curate.py": 240,
    "tools/report.py": 260,
}
TOTAL = 4000  # of the method's own files; the three tools are beside it, each under its own cap
STAGES = ("sft", "align", "rlvr")
SCRIPTS = (*STAGES, "eval")


def sources():
    return sorted([*ROOT.glob("*.py"), *ROOT.glob("tools/*.py")])


def lines(path):
    return len(path.read_text(encoding="utf-8").splitlines())


def tree(name):
    return ast.parse((ROOT / f"{name}.py").read_text(encoding="utf-8"))


def read_of(node, *objects):
    """Names of the attributes that `node` reads of the objects, such as "args"."""
    found = [
        n
        for n in ast.walk(node)
        if isinstance(n, ast.Attribute) and ast.unparse(n.value) in objects
    ]
    return {n.attr for n in found if isinstance(n.ctx, ast.Load)}


def args_class(name):
    return next(n for n in tree(name).body if isinstance(n, ast.ClassDef) and n.name == "Args")


# ----------------------------------------------------------------------------- size and shape
@pytest.mark.parametrize("path", sources(), ids=lambda path: path.name)
def test_file_is_within_its_cap(path):
    name = path.relative_to(ROOT).as_posix()
    assert name in CAPS, (
        f"{name} has no cap: a file more is a decision, note it in CAPS and in the README's file tree"
    )
    assert lines(path) <= CAPS[name]


def test_all_together_are_within_the_total():
    assert sum(lines(path) for path in sources() if path.parent == ROOT) <= TOTAL


@pytest.mark.parametrize("name", STAGES)
def test_main_is_one_readable_function(name):
    (main,) = [
        node
        for node in tree(name).body
        if isinstance(node, ast.FunctionDef) and node.name == "main"
    ]
    assert main.end_lineno - main.lineno < 180
    assert not [n for n in ast.walk(main) if isinstance(n, ast.FunctionDef) and n is not main], (
        "no closures in a loop"
    )


@pytest.mark.parametrize("name", STAGES)
def test_comments_and_docstrings_are_reasons_enough(name):
    """Teaching code: at least every tenth line explains."""
    text = (ROOT / f"{name}.py").read_text(encoding="utf-8")
    strings = [
        n
        for n in ast.walk(ast.parse(text))
        if isinstance(n, ast.Expr) and isinstance(n.value, ast.Constant)
    ]
    explained = sum(n.end_lineno - n.lineno + 1 for n in strings) + sum(
        "# " in line for line in text.splitlines()
    )
    assert explained / len(text.splitlines()) > 0.1


@pytest.mark.parametrize("name", SCRIPTS)
def test_manual_names_the_commands(name):
    """The docstring is the manual: what it does, and how it is run on one process and on several."""
    manual = importlib.import_module(name).__doc__
    assert (
        f"python {name}.py" in manual
        and "torchrun" in manual
        and f" {name}.py" in manual.split("torchrun")[1]
    )
    assert "1. " in manual and (name == "eval" or "Differs from" in manual)


# ----------------------------------------------------------------------------- arguments
@pytest.mark.parametrize("name", SCRIPTS)
def test_every_argument_is_read(name):
    """No dead knob: what a script accepts is read as args.<field>, by itself or by what it hands its `args` to."""
    known = {f.name for f in fields(importlib.import_module(name).Args)}
    takers = ["common", "checkpoint", "memory", "model", "ranks", "groups"]
    takers += ["rlvr"] if name == "align" else []  # which updates the policy
    elsewhere = set().union(*(read_of(tree(taker), "args", "self.args") for taker in takers))
    here = read_of(tree(name), "args")
    assert known - here - elsewhere - read_of(args_class(name), "self") == set()


@pytest.mark.parametrize("name", SCRIPTS)
def test_no_argument_is_misspelt(name):
    """What is read of `args` is a field of it, or set by its __post_init__."""
    known = {f.name for f in fields(importlib.import_module(name).Args)}
    stored = [
        n
        for n in ast.walk(args_class(name))
        if isinstance(n, ast.Attribute) and isinstance(n.ctx, ast.Store)
    ]
    assert read_of(tree(name), "args") - known - {n.attr for n in stored} == set()


@pytest.mark.parametrize("name", SCRIPTS)
def test_arguments_are_few_explained_and_in_the_help(name, capsys):
    module = importlib.import_module(name)
    own = {f.name for f in fields(module.Args)} - {f.name for f in fields(Common)}
    assert len(own) <= 30
    with pytest.raises(SystemExit):
        parse(module.Args, ["--help"])
    options = capsys.readouterr().out.split("\n  --")[1:]  # flag, value, explanation (default: ..)
    options = [re.sub(r"\(default:.*", "", option, flags=re.DOTALL).split() for option in options]
    assert {f.name for f in fields(module.Args)} == {
        words[0].rstrip(",") for words in options if len(words) > 3
    }


@pytest.mark.parametrize("path", sources(), ids=lambda path: path.name)
def test_importing_runs_nothing(path):
    """Tests and notebooks import the algorithm: a module's body defines, it does not do (nor read the command line)."""
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        guard = isinstance(node, ast.If) and "__name__" in ast.unparse(node.test)
        calls = {ast.unparse(n.func) for n in ast.walk(node) if isinstance(n, ast.Call)} & {
            "main",
            "parse",
            "setup",
        }
        defines = isinstance(node, ast.FunctionDef | ast.ClassDef)
        assert guard or defines or not calls, f"{path.name}:{node.lineno} runs {calls} on import"
    """Tests and notebooks import the algorithm: a module's body defines, it does not do, nor read the command line."""


# ----------------------------------------------------------------------------- hygiene
def tracked():
    skip = {
        ".venv",
        ".git",
        ".scratch",
        "data",
        "ckpt",
        "out",
        "__pycache__",
        ".pytest_cache",
        ".ruff_cache",
    }
    return [
        p for p in ROOT.rglob("*") if p.is_file() and not skip & set(p.relative_to(ROOT).parts[:-1])
    ]


def test_no_private_paths_or_unsafe_loading():
    home = re.compile(r"/(?:home|root|Users|work)/\w")
    unsafe = re.compile(
        r"torch\.load\((?!.*weights_only=True)|trust_remote_code\s*=\s*True|pickle\.load"
    )
    for path in tracked():
        if path.suffix in {".py", ".sh", ".md", ".toml", ".txt"} and path.name != "test_repo.py":
            text = path.read_text(encoding="utf-8")
            assert not home.search(text), f"{path}: a path of somebody's machine"
            assert path.suffix != ".py" or not unsafe.search(text), (
                f"{path}: loads more than weights"
            )


def test_style_and_versions_are_set():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    ruff = project["tool"]["ruff"]
    assert ruff["line-length"] <= 128 and {"E", "F", "I", "B", "UP", "W"} <= set(
        ruff["lint"]["select"]
    )
    pins = dict(
        re.findall(r"^([\w.-]+)==(\S+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    )
    wanted = sum(
        project["project"]["optional-dependencies"].values(), project["project"]["dependencies"]
    )
    for requirement in wanted:
        name = re.split(r"[<>=\[]", requirement)[0]
        assert name in pins, f"{name} has no exact version in constraints.txt"
    assert "+" not in pins["torch"]  # a local build's version is on no index


def test_scripts_are_valid_bash():
    scripts = [*ROOT.glob("runs/*.sh"), ROOT / ".ci/run"]
    assert len(scripts) > 2
    for script in scripts:
        assert subprocess.run(["bash", "-n", script]).returncode == 0
        assert script.name == "env.sh" or "set -euo pipefail" in script.read_text(), script


@pytest.mark.slow
@pytest.mark.parametrize(
    "case", ["check.py --device cpu", "logprob.py --tokens 64 --vocabulary 2000 --repeat 1"]
)
def test_bench_scripts_run_and_print_one_line(case):
    script, *flags = case.split()
    done = subprocess.run(
        [sys.executable, ROOT / "bench" / script, *flags], capture_output=True, text=True, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert len(done.stdout.splitlines()) == 1 and json.loads(done.stdout)
