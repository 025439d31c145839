"""The documentation keeps its word: recipes apply and take effect, pictures and one_step.md are
what their scripts make, names and numbers are those of the code."""

import contextlib
import importlib
import json
import re
import runpy
import shutil
import subprocess
import sys
import threading
from dataclasses import fields
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from conftest import ROOT, tiny_config
from safetensors.torch import load_file
from test_stages import COMMON, build_world, leave_no_group, records  # noqa: F401 (a fixture)

import align
import rlvr
import sft
from data import SPANS
from engine.attention import AttentionInterface, image_attention, pack_attention

DOCS = ROOT / "docs"
RECIPES = DOCS / "recipes"
PAGES = sorted(path for path in [ROOT / "README.md", *DOCS.rglob("*.md")])
SOURCES = ("*.py", "engine/*.py", "tools/*.py")
OURS = {path.stem for path in ROOT.glob("*.py")} | {"engine", "tools"}
GAME = COMMON | dict(
    steps=2,
    lr=1e-3,
    disc_lr=1e-3,
    warmup_steps=0,
    max_response=32,
    prompts_per_step=4,
    group_size=4,
    sample_every=1,
)
RLVR = COMMON | dict(
    steps=2, lr=1e-3, max_response=32, prompts_per_step=4, group_size=4, sample_every=1
)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return build_world(tmp_path_factory.mktemp("world"))


# ----------------------------------------------------------------------------- recipes
@contextlib.contextmanager
def modules_of(folder):
    """Inside, `import align` and the like mean the files of `folder`."""
    ours = {name: m for name, m in sys.modules.items() if name.split(".")[0] in OURS}
    for name in ours:
        del sys.modules[name]
    sys.path.insert(0, str(folder))
    importlib.invalidate_caches()
    try:
        yield importlib.import_module
    finally:
        sys.path.remove(str(folder))
        for name in [name for name in sys.modules if name.split(".")[0] in OURS]:
            del sys.modules[name]
        sys.modules.update(ours)
        AttentionInterface.register("packs", pack_attention)
        AttentionInterface.register("images-like-flash", image_attention)


@pytest.fixture
def recipe(request, tmp_path):
    """A copy of the repository with the patch of this test's name: test_recipe_NAME."""
    name = request.node.originalname.removeprefix("test_recipe_")
    copy = tmp_path / "copy"
    for pattern in SOURCES:
        for path in ROOT.glob(pattern):
            target = copy / path.relative_to(ROOT)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, target)
    apply = ["git", "apply", "--verbose", RECIPES / f"{name}.patch"]
    done = subprocess.run(apply, cwd=copy, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    with modules_of(copy) as load_module:
        yield load_module


def groups_of(folder):
    lines = Path(folder, "rollouts.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def play(stage, world, out, **more):
    """Two steps of `stage` -> its logged groups."""
    is_game = stage.__name__ == "align"
    options = (GAME if is_game else RLVR) | more
    data = options.pop("data", world.align if is_game else world.rl)
    stage.main(stage.Args(policy=world.sft, data=data, out=str(out), **options))
    assert [record["step"] for record in records(out)] == [1, 2]
    assert all(record["skipped"] == 0 for record in records(out))
    return groups_of(out)


def test_every_recipe_is_tested_and_says_why():
    names = {path.stem for path in RECIPES.glob("*.patch")}
    tested = {name.removeprefix("test_recipe_") for name in globals() if "test_recipe_" in name}
    assert names == tested and len(names) >= 8
    changing = (DOCS / "changing.md").read_text()
    for path in RECIPES.glob("*.patch"):
        head, _, patch = path.read_text().partition("--- a/")
        assert 60 < len(head.strip()) and patch, path
        assert f"recipes/{path.name}" in changing


def test_recipe_reward(recipe, world, tmp_path):
    groups = play(recipe("rlvr"), world, tmp_path / "out")
    price = recipe("rewards").WORD_PRICE
    parts = recipe("data").parts
    rewards = set()
    for rollout in (rollout for group in groups for rollout in group["rollouts"]):
        found = parts(rollout["text"])
        plain = 0.8 * rollout["scores"]["accuracy"] + 0.2 * rollout["scores"]["format"]
        words = len(found["think"].split()) if found else 0
        assert rollout["scores"]["reward"] == pytest.approx(plain - price * words, abs=1e-4)
        rewards.add(rollout["scores"]["reward"])
    assert rewards - {0.0, 0.2, 1.0}


def test_recipe_alpha_over_time(recipe, world, tmp_path):
    groups = play(recipe("align"), world, tmp_path / "out", group_size=8)
    for group, alpha in zip(groups, (1.0, 0.5), strict=True):
        rollouts = group["rollouts"]
        well_formed = torch.tensor([rollout["scores"]["format"] == 1 for rollout in rollouts])
        assert well_formed.sum() >= 2
        scores = []
        for name in ("perception", "reasoning"):
            of_span = [rollout["scores"][name] for rollout in rollouts]
            scores.append(torch.tensor([0.0 if s is None else s for s in of_span]))
        expected = align.alignment_advantage(*scores, well_formed, len(rollouts), alpha=alpha)
        found = torch.tensor([rollout["advantage"] for rollout in rollouts])
        # scores are logged with four digits
        torch.testing.assert_close(found, expected, rtol=0.02, atol=0.02)
    play(recipe("align"), world, tmp_path / "whole", spans="whole")  # still one span of weight 1


def test_recipe_cispo(recipe, world, tmp_path):
    stage = recipe("rlvr")
    play(stage, world, tmp_path / "out", algo="cispo", minibatches=2, clip_high=0.01)
    play(stage, world, tmp_path / "on policy", algo="cispo")
    logp = torch.tensor([[-1.0, -0.5], [-2.0, -0.1]], requires_grad=True)
    old_logp = torch.tensor([[-2.0, -0.6], [-1.0, -0.1]])
    advantage = torch.tensor([1.0, -1.0])
    batch = (logp, old_logp, advantage, torch.ones(2, 2))
    loss, _ = stage.policy_loss(*batch, ratio="weight", clip_low=0.2, clip_high=0.2)
    loss.backward()
    ratio = (logp - old_logp).exp().clamp(max=1.2).detach()
    # GRPO's gradient is 0 where the ratio of a good token is above 1.2; here none is lost
    torch.testing.assert_close(logp.grad, -advantage[:, None] * ratio / 4)
    grpo, _ = stage.policy_loss(*batch, clip_low=0.2, clip_high=0.2)
    plain, _ = rlvr.policy_loss(*batch, clip_low=0.2, clip_high=0.2)
    assert grpo == plain


def with_plan(file):
    """The rows of a file, with a plan in each response, written beside it -> the new file."""
    text = Path(file).read_text().replace("<think>", "<plan>\\ncount\\n</plan>\\n<think>")
    new = Path(file).with_name("plan-" + Path(file).name)
    new.write_text(text)
    return str(new)


@pytest.mark.slow
def test_recipe_third_span(recipe, world, tmp_path):
    """From random weights: a policy that knows the new tag, then the game on three spans."""
    curated = with_plan(world.curated)
    (tmp_path / "config.json").write_text(json.dumps(tiny_config().to_dict()))
    start = recipe("tools.init").init(tmp_path / "config.json", tmp_path / "init", [curated])
    stage = recipe("sft")
    out = str(tmp_path / "sft")
    options = COMMON | dict(steps=60, batch=8, lr=0.01, warmup=3)
    stage.main(stage.Args(policy=str(start), data=curated, out=out, **options))
    world = type(world)(sft=out, align=with_plan(world.align))
    for disc in ("moe", "experts"):
        out = tmp_path / disc
        groups = play(recipe("align"), world, out, disc=disc, max_response=40)
        record = records(out)[-1]
        assert record["format"] > 0
        for name in ("perception", "plan", "reasoning"):
            assert 0 <= record[f"{name}/acc"] <= 1
            assert name in groups[0]["reference_scores"]
    assert "<plan>" in recipe("data").SYSTEM_PROMPT


def test_recipe_top_p(recipe, world, tmp_path):
    logprob = recipe("engine.logprob")
    logprob.TOP_P = 0.5
    play(recipe("align"), world, tmp_path / "game")
    play(recipe("rlvr"), world, tmp_path / "out", minibatches=2, kl=0.1)
    for folder in ("game", "out"):
        for record in records(tmp_path / folder):
            assert record["logp_diff_max"] < 1e-4  # scored as it is sampled
            assert 0 <= record["entropy"] < 0.7  # at most two ids are in a nucleus of a half
    hidden = torch.eye(4)[:1]  # no id is banned
    weight = torch.tensor([[0.4, 0.3, 0.2, 0.1]]).log().T.expand(4, 4)
    assert logprob.token_logps(hidden, weight, torch.tensor([0])).exp().item() > 0.5
    x = torch.tensor([[0.4, 0.3, 0.2, 0.1]]).log()
    assert logprob.nucleus(x.clone()).isfinite().tolist() == [[True, True, False, False]]
    kept = logprob.nucleus(x.clone(), torch.tensor([3])).isfinite()
    assert kept.tolist() == [[True, True, False, True]]


def test_recipe_entropy_bonus(recipe, world, tmp_path):
    stage = recipe("rlvr")
    entropies = {}
    for bonus in (0.0, 5.0):
        out = tmp_path / str(bonus)
        play(stage, world, out, entropy_bonus=bonus)
        entropies[bonus] = [record["entropy"] for record in records(out)]
    assert entropies[0.0][0] == pytest.approx(entropies[5.0][0], abs=1e-5)  # the start policy's
    assert entropies[5.0][1] > entropies[0.0][1] + 0.01


def test_recipe_discriminator_head(recipe, world, tmp_path):
    stage = recipe("align")
    play(stage, world, tmp_path / "out")
    folder = tmp_path / "out/last/discriminator"
    state = {}
    for file in folder.glob("*.safetensors"):
        state |= load_file(file)
    assert {"v_head.0.0.weight", "v_head.0.0.bias", "v_head.1.weight"} <= state.keys()
    assert state["v_head.0.0.bias"].abs().sum() > 0
    play(stage, world, tmp_path / "again", disc_path=str(folder))
    first = groups_of(tmp_path / "again")[0]
    assert first["reference_scores"]["perception"] is not None


class Judge(BaseHTTPRequestHandler):
    """An API that grants two of four criteria."""

    questions = []

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.questions.append(body["messages"][0]["content"])
        answer = {"choices": [{"message": {"content": "[true, true, false, false]"}}]}
        self.send_response(200)
        self.end_headers()
        self.wfile.write(json.dumps(answer).encode())

    def log_message(self, *_):
        pass


def test_recipe_rubric(recipe, world, tmp_path, monkeypatch):
    server = ThreadingHTTPServer(("127.0.0.1", 0), Judge)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("PRISM_BASE_URL", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setenv("PRISM_JUDGE", "a judge")
    Judge.questions.clear()
    try:
        groups = play(recipe("rlvr"), world, tmp_path / "out", data=world.align)
    finally:
        server.shutdown()
    rewards = set()
    for rollout in (rollout for group in groups for rollout in group["rollouts"]):
        assert rollout["scores"]["reward"] == 0.5 * rollout["scores"]["format"]
        rewards.add(rollout["scores"]["reward"])
    assert rewards == {0.0, 0.5}
    sampled = 4 * 4 * sum(record["format"] for record in records(tmp_path / "out"))
    assert len(Judge.questions) == pytest.approx(sampled)
    assert groups[0]["reference"] in "".join(Judge.questions)


# ----------------------------------------------------------------------------- scripts of docs/
def test_the_drawn_pack_is_the_code_s(capsys):
    runpy.run_path(str(DOCS / "draw_pack.py"), run_name="__main__")
    assert capsys.readouterr().out == (DOCS / "pack.svg").read_text()


def test_rollouts_are_drawn(world, tmp_path, capsys, monkeypatch):
    play(align, world, tmp_path / "out")
    file = str(tmp_path / "out/rollouts.jsonl")
    script = str(DOCS / "draw_rollout.py")
    groups = groups_of(tmp_path / "out")
    assert 0 < sum(rollout["scores"]["format"] for rollout in groups[0]["rollouts"]) < 4
    capsys.readouterr()
    monkeypatch.setattr(sys, "argv", [script, file, "--step", "1"])
    runpy.run_path(script, run_name="__main__")
    picture = capsys.readouterr().out
    assert picture.startswith("<svg") and picture.rstrip().endswith("</svg>")
    assert "perception" in picture and "malformed" in picture  # the best, and the worst
    for name in SPANS:
        scores = [rollout["scores"][name] for rollout in groups[0]["rollouts"]]
        given = [score for score in scores if score is not None]
        floored = torch.tensor([min(given) - 1 if x is None else x for x in scores])
        middle = f"{floored.mean():+.2f}".replace("-", "−")
        assert f">{name} {middle} ± {floored.std():.2f}<" in picture
    style = re.compile(r"<style>.*</style>", re.DOTALL)
    assert style.findall(picture) == style.findall((DOCS / "rollout.svg").read_text())


def test_one_step_runs_and_is_what_is_committed(world, tmp_path, capsys, monkeypatch):
    """On another world the numbers differ, not what is shown."""
    (tmp_path / "ckpt").mkdir()
    shutil.copytree(world.sft, tmp_path / "ckpt/sft")
    shutil.copytree(world.folder, tmp_path / "data/tiny")
    warm_up = GAME | dict(warmup_steps=1, warmup_pairs=8, warmup_only=True)
    out = str(tmp_path / "out/tiny-0/align")
    align.main(align.Args(policy=world.sft, data=world.align, out=out, **warm_up))
    monkeypatch.chdir(tmp_path)
    capsys.readouterr()
    runpy.run_path(str(DOCS / "one_step.py"), run_name="__main__")
    torch.set_printoptions(profile="default")
    made = capsys.readouterr().out
    committed = (DOCS / "one_step.md").read_text()
    for pattern in (r"(?m)^## .*$", r"(?m)^\*\*`.*`\*\* [^\d\n]*"):
        assert re.findall(pattern, made) == re.findall(pattern, committed)


# ----------------------------------------------------------------------------- what pages say
def test_readme_is_short():
    assert len((ROOT / "README.md").read_text().split()) <= 1500


def test_readme_s_patch_is_the_recipe():
    (block,) = re.findall(r"```diff\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert block in (RECIPES / "alpha_over_time.patch").read_text()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
        if not target.startswith("http"):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_names_exist(page):
    """`align.span_advantage` and the like are names of the code, `--flag` a flag of a script."""
    text = page.read_text()
    scripts = {path.stem for path in ROOT.glob("*.py")}
    names = re.findall(r"`((?:engine\.)?\w+)\.(\w+)(?:\.(\w+))?[`(]", text)
    for line in text.splitlines():
        if line.startswith("    "):  # formulas, their function behind them
            names += re.findall(r"  ((?:engine\.)?\w+)\.(\w+)()$", line)
    for module, name, inner in names:
        if module not in scripts and not module.startswith("engine."):
            continue
        if name in ("py", "md"):
            continue
        found = getattr(importlib.import_module(module), name)
        if inner:
            known = (
                {f.name for f in fields(found)} if hasattr(found, "__dataclass_fields__") else {}
            )
            assert inner in known or hasattr(found, inner), f"{module}.{name}.{inner}"


def test_hyper_parameters_are_the_defaults():
    text = (DOCS / "method.md").read_text()
    table = text.split("## Hyper-parameters")[1].split("\n## ")[0]
    rows = re.findall(r"(?m)^\| `--(\w+)` \|(.*)\|(.*)\|(.*)\|$", table)
    assert len(rows) > 15
    for name, *cells in rows:
        for stage, cell in zip((sft, align, rlvr), map(str.strip, cells), strict=True):
            defaults = {f.name: f.default for f in fields(stage.Args)}
            if cell in ("one epoch", "by algorithm"):
                assert defaults[name] is None
            elif cell:
                kind = type(defaults[name])
                assert kind(cell) == defaults[name], f"{stage.__name__} --{name}"


def test_every_metric_is_explained(world, tmp_path):
    text = (DOCS / "method.md").read_text()
    table = text.split("## What is logged")[1]
    explained = set(re.findall(r"`((?:eval/)?\w+)`", table))
    warm_up = dict(warmup_steps=1, warmup_pairs=8)
    play(align, world, tmp_path / "game", probe_every=1, **warm_up)
    play(rlvr, world, tmp_path / "rlvr")
    validation = dict(eval_data=world.align, eval_rows=2, eval_rollouts=True, max_response=32)
    validation |= COMMON | dict(policy=world.sft, data=world.curated, steps=1, batch=2)
    sft.main(sft.Args(**validation, out=str(tmp_path / "sft")))
    for folder in ("game", "game/warmup", "rlvr", "sft"):
        for record in records(tmp_path / folder):
            keys = [k if k.startswith("eval/") else k.split("/")[-1] for k in record]
            logged = {re.sub(r"^expert_\d+$", "expert_0", key) for key in keys}
            assert logged - explained - {"step"} == set(), folder
