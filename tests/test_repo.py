"""The promises about the repository's shape: sizes, arguments, manuals, style. They rot where no
test holds them."""

import ast
import importlib
import io
import json
import re
import runpy
import subprocess
import sys
import tokenize
import tomllib
from dataclasses import fields

import pytest
import torch
from conftest import ROOT

from engine.arguments import Common, make_parser

STAGES = ("sft", "align", "rlvr")
SCRIPTS = (*STAGES, "eval")


def sources():
    return sorted([*ROOT.glob("*.py"), *ROOT.glob("engine/*.py"), *ROOT.glob("tools/*.py")])


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


# ----------------------------------------------------------------------------- shape
def imported(path):
    """Names of this repository's modules that a file imports, inside functions too."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module in ("engine", "tools"):
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add(node.module)
    return found & set(modules())


def modules():
    """{name: file} of every module of the repository that is not a test or a benchmark."""
    return {
        path.relative_to(ROOT).with_suffix("").as_posix().replace("/", "."): path
        for path in sources()
    }


LAYERS = {  # what each may import, besides engine's own modules among themselves
    **{stage: {"model", "data", "rewards", "engine"} for stage in SCRIPTS},
    "model": {"data", "engine"},
    "rewards": {"data", "engine"},
    "data": {"engine"},
}


@pytest.mark.parametrize("name", modules())
def test_imports_run_one_way(name):
    """Stages -> model, data, rewards -> engine: never up, no stage from a stage, none from a tool.
    Tools are commands and import what they need."""
    if name.startswith("tools."):
        return
    may = LAYERS.get(name, {"engine"})
    wrong = {other for other in imported(modules()[name]) if other.split(".")[0] not in may}
    assert not wrong, f"{name} imports {wrong}"


def test_imports_have_no_circle():
    waiting = {name: imported(path) for name, path in modules().items()}
    while waiting:
        free = [name for name, needs in waiting.items() if not needs & waiting.keys()]
        assert free, f"a circle among {sorted(waiting)}"
        for name in free:
            del waiting[name]


def test_the_root_is_the_method():
    at_root = {path.name for path in ROOT.glob("*.py")}
    assert at_root == {f"{name}.py" for name in (*SCRIPTS, "model", "data", "rewards")}
    assert (ROOT / "engine/__init__.py").read_text().count("\n") == 4  # a docstring, no re-exports


@pytest.mark.parametrize("path", sources(), ids=lambda path: path.name)
def test_code_is_not_dense(path):
    """At most six expressions a line of code: one statement does one thing (nanochat's chat_rl.py
    has 5.1, GRPO-Zero 4.0)."""
    text = path.read_text(encoding="utf-8")
    assert "fmt: " + "skip" not in text
    tree = ast.parse(text)
    expressions = sum(isinstance(node, ast.expr) for node in ast.walk(tree))
    documented = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            documented |= set(range(node.lineno, node.end_lineno + 1))
    code = set()
    layout = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT}
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type not in layout | {tokenize.ENDMARKER}:
            code |= set(range(token.start[0], token.end[0] + 1))
    assert expressions <= 6 * max(1, len(code - documented))


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
    """The docstring is the manual: what it does, and how it is run on one process and on
    several."""
    manual = importlib.import_module(name).__doc__
    assert f"python {name}.py" in manual
    assert f" {name}.py" in manual.partition("torchrun")[2]
    assert "1. " in manual and (name == "eval" or "Differs from" in manual)


# ----------------------------------------------------------------------------- arguments
@pytest.mark.parametrize("name", SCRIPTS)
def test_every_argument_is_read(name):
    """No dead knob: what a script accepts is read as args.<field>, by itself or by what it hands
    its `args` to."""
    known = {f.name for f in fields(importlib.import_module(name).Args)}
    read = read_of(tree(name), "args") | read_of(args_class(name), "self")
    engine = ["arguments", "checkpoint", "evaluation", "log", "ranks", "rollouts"]
    if name == "eval":
        engine += ["api", "grader"]
    for taker in (*(f"engine/{name}" for name in engine), "model"):
        read |= read_of(tree(taker), "args", "self.args")
    if name == "rlvr":  # chosen_algorithm reads all fields of a preset
        read |= {f.name for f in fields(importlib.import_module(name).Algorithm)}
    assert known - read <= {"config"}  # which parse reads from the command line


@pytest.mark.parametrize("name", SCRIPTS)
def test_no_argument_is_misspelt(name):
    """What is read of `args` is a field of it."""
    known = {f.name for f in fields(importlib.import_module(name).Args)}
    assert read_of(tree(name), "args") - known == set()


@pytest.mark.parametrize("name", SCRIPTS)
def test_arguments_are_few_and_explained(name):
    module = importlib.import_module(name)
    own = {f.name for f in fields(module.Args)} - {f.name for f in fields(Common)}
    assert len(own) <= 30
    text = " ".join(make_parser(module.Args).format_help().split())
    for f in fields(module.Args):
        assert f"--{f.name}" in text and f.metadata["help"].split()[0] in text, f.name


@pytest.mark.parametrize("path", sources(), ids=lambda path: path.name)
def test_importing_runs_nothing(path):
    """Tests and notebooks import the algorithm: a module's body defines, it does not do, nor read
    the command line."""
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        guard = isinstance(node, ast.If) and "__name__" in ast.unparse(node.test)
        defines = isinstance(node, ast.FunctionDef | ast.ClassDef)
        calls = {ast.unparse(n.func) for n in ast.walk(node) if isinstance(n, ast.Call)}
        runs = calls & {"main", "parse", "setup"}
        assert guard or defines or not runs, f"{path.name}:{node.lineno} runs {runs} on import"


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
    ours = ("test_repo.py", "test_reference_ranks.py")  # the second reads what it wrote itself
    for path in tracked():
        if path.suffix in {".py", ".sh", ".md", ".toml", ".txt"} and path.name not in ours:
            text = path.read_text(encoding="utf-8")
            assert not home.search(text), f"{path}: a path of somebody's machine"
            assert path.suffix != ".py" or not unsafe.search(text), (
                f"{path}: loads more than weights"
            )


def test_style_and_versions_are_set():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    ruff = project["tool"]["ruff"]
    assert ruff["line-length"] == 100 and {"E", "F", "I", "B", "UP", "W"} <= set(
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


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_bench_scripts_say_that_there_is_no_gpu(monkeypatch, capsys):
    monkeypatch.syspath_prepend(ROOT / "bench")
    monkeypatch.setattr(sys, "argv", ["check.py"])
    with pytest.raises(SystemExit, match="2"):
        runpy.run_path(str(ROOT / "bench/check.py"), run_name="__main__")
    assert "finds no CUDA here; --device cpu" in capsys.readouterr().err


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
