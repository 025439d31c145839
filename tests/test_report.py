"""tools/report.py: what the runs left becomes one page that shows it, escapes it and loads nothing."""

import importlib.util
import json
import math
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT
from PIL import Image

from engine.arguments import Common
from engine.log import Log
from engine.rollouts import Group, show_rollout
from engine.sampler import Rollout

spec = importlib.util.spec_from_file_location("report", ROOT / "tools/report.py")
report = importlib.util.module_from_spec(spec)
spec.loader.exec_module(report)

ARGS = {"sft": {"batch": 8}, "align": {"disc": "moe"}, "rlvr": {"algo": "grpo"}}
HOSTILE = "</script><script>document.title = 'owned'</script><img src=x onerror=\"document.title = 'owned'\"> {{data}} \u2028"
IMAGE = "data:image/png;base64,iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mP8z8BQDwAEhQGAhKmMIQAAAABJRU5ErkJggg=="
TEXT = "<caption>\na < b\n</caption>\n<think>\nso 3\n</think>\n<answer>\n3\n</answer>"


@dataclass
class Args(Common):
    """Of a stage whose file is this one."""


def group(step, stage="align", text=TEXT, **scores):
    rollout = {
        "text": text,
        "tokens": 12,
        "stop": "end",
        "advantage": 0.5,
        "scores": {"accuracy": 1.0, "format": 1.0, "perception": None} | scores,
    }
    return {
        "step": step,
        "stage": stage,
        "where": "a.jsonl:3",
        "question": f"<image>how many {text}?",
        "answer": "3",
        "reference": TEXT,
        "reference_scores": {"perception": 2.5},
        "images": [IMAGE],
        "rollouts": [rollout],
    }


def make(folder, stage, steps, groups=()):
    folder.mkdir(parents=True, exist_ok=True)
    records = [
        {
            "args": ARGS[stage],
            "commit": "0123456789ab",
            "hardware": {"ranks": 1, "cores": 2, "gpu": None},
        }
    ]
    records += [{"step": n, "seconds": 6.0, **step} for n, step in enumerate(steps, 1)]
    (folder / "log.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    if groups:
        (folder / "rollouts.jsonl").write_text("".join(json.dumps(g) + "\n" for g in groups))
    return folder


def write_page(folder, *runs, results=()):
    """The command as it is typed -> (page, its data)."""
    command = [
        sys.executable,
        ROOT / "tools/report.py",
        *runs,
        *(["--eval", *results] if results else []),
    ]
    before = {p for p in folder.rglob("*")}
    done = subprocess.run(
        [*command, "--out", folder / "page.html"], capture_output=True, text=True, cwd=folder
    )
    assert done.returncode == 0, done.stderr
    assert {p for p in folder.rglob("*")} - before == {folder / "page.html"}
    text = (folder / "page.html").read_text()
    assert f"{len(text.encode()):,} bytes" in done.stdout
    return text, json.loads(
        re.search(r'<script id="data" type="application/json">(.*?)</script>', text, re.DOTALL)[1]
    )


def test_a_page_of_three_stages(tmp_path):
    runs = [
        make(tmp_path / "sft", "sft", [{"loss": 2.0}, {"loss": 1.0}]),
        make(
            tmp_path / "align",
            "align",
            [{"perception/acc": 0.9, "reasoning/acc": math.nan}],
            [group(1)],
        ),
        make(tmp_path / "align-grpo", "rlvr", [{"reward": 0.5}], [group(1, "rlvr")]),
    ]
    make(tmp_path / "align/warmup", "align", [{"perception/acc": 0.6, "loss": 1.4}])
    result = {
        "policy": "out/sft/last",
        "data": "d/hard.jsonl",
        "mode": "greedy",
        "prompts": 100,
        "accuracy": 0.9,
    }
    (tmp_path / "eval.json").write_text(
        json.dumps({"results": [result, result | {"mode": "T=1", "accuracy": math.nan}]})
    )
    text, data = write_page(tmp_path, *runs, results=[tmp_path / "eval.json"])
    assert (
        '<th scope="row">sft</th><td>90.0 <small>± 3.0</small></td><td>no data</td>' in text
    )  # sqrt(.9 * .1 / 100)
    assert '<th scope="col">hard, greedy</th>' in text
    assert [
        (c["stage"], c["title"], [s["label"] for s in c["series"]]) for c in data["charts"]
    ] == [
        ("sft", "loss", ["loss"]),
        ("warm-up", "acc", ["perception"]),
        ("warm-up", "loss", ["loss"]),
        ("align", "acc", ["perception"]),
        ("rlvr", "reward", ["reward"]),
    ]
    assert data["charts"][0]["series"][0]["points"] == [[1, 2.0], [2, 1.0]]
    assert [(g["run"], g["stage"]) for g in data["groups"]] == [
        ("align", "align"),
        ("align-grpo", "rlvr"),
    ]
    assert (
        '<th scope="row">align warm-up</th><td>warm-up</td><td>1</td><td>0.1</td><td>1 × 2 CPU cores</td>'
        in text
    )


def test_loads_nothing_and_escapes_everything(tmp_path):
    """The page is of text that a model wrote: none of it may end an element, run, fetch, or fill a slot of the template."""
    run = make(tmp_path / "<b>run", "align", [{"loss": 1.0}], [group(1, text=HOSTILE)])
    result = {
        "policy": HOSTILE,
        "data": "<i>.jsonl",
        "mode": "greedy",
        "prompts": 4,
        "accuracy": 0.5,
    }
    (tmp_path / "eval.json").write_text(json.dumps({"results": [result]}))
    text, data = write_page(tmp_path, run, results=[tmp_path / "eval.json"])
    assert (
        data["groups"][0]["rollouts"][0]["text"] == HOSTILE and data["groups"][0]["run"] == "<b>run"
    )
    assert (
        "owned'</script>" not in text
        and "<img" not in text
        and "<b>run" not in text
        and "<i>.jsonl" not in text
    )
    assert text.count("<script") == text.count("</script>") == 2
    assert re.findall(r"https?://[\w./]+", text) == [
        "http://www.w3.org/2000/svg"
    ]  # a name, never fetched
    assert "default-src 'none'" in text and not re.search(
        r"<link|@import|url\(|src=|fetch\(", text.replace("src=x", "")
    )


def test_nan_is_a_gap_and_long_logs_are_thinned(tmp_path):
    steps = [
        {"loss": math.nan if 3000 <= n < 6000 else 1.0 if n % 2 else 3.0} for n in range(24_000)
    ]
    run = make(tmp_path / "run", "sft", steps)
    text, data = write_page(tmp_path, run)
    points = data["charts"][0]["series"][0]["points"]
    assert len(points) <= report.POINTS and points[0] == [100, 2.0] and points[-1][0] == 24_000
    assert [v for _, v in points[29:61]] == [2.0] + [None] * 30 + [2.0]
    assert "the mean of up to 100 steps" in text and len(text) < 40_000
    sparse = {
        "steps": [{"step": n, **({"leak": 0.5} if n % 10 == 1 else {})} for n in range(1, 32)]
    }
    both = [
        {"name": n, "stage": "align", "steps": [{"step": 1, k: 0.5}]}
        for n, k in (("a", "format"), ("b", "disc_loss"))
    ]
    assert [[s["colour"] for s in c["series"]] for c in report.charts(both)] == [
        [0],
        [1],
    ]  # a run's own, in each chart
    assert report.points(sparse, "leak") == [
        [1, 0.5],
        [11, 0.5],
        [21, 0.5],
        [31, 0.5],
    ]  # joined, not gaps


def test_many_groups_are_thinned_evenly_and_the_page_says_so(tmp_path):
    run = make(tmp_path / "run", "align", [{"loss": 1.0}], [group(step) for step in range(1, 101)])
    text, data = write_page(tmp_path, run)
    steps = [g["step"] for g in data["groups"]]
    assert (
        len(steps) == report.GROUPS
        and steps == sorted(set(steps))
        and steps[0] == 1
        and steps[-1] > 95
    )
    assert "60 more groups" in text


def test_cut_and_broken_lines(tmp_path, capsys):
    run = make(tmp_path / "run", "sft", [{"loss": 1.0}])
    path, whole = run / "log.jsonl", (run / "log.jsonl").read_text()
    path.write_text(whole + '{"step": 2, "lo')
    (found,) = report.read_run(run, "run")
    assert [r["step"] for r in found["steps"]] == [
        1
    ] and "log.jsonl:3: left out" in capsys.readouterr().out
    for broken in ('{"step": 2, "lo\n', "7\n"):
        path.write_text(whole + broken + '{"step": 3}\n')
        with pytest.raises(SystemExit, match=r"log\.jsonl:3: not a JSON object"):
            report.read_run(run, "run")


def test_what_is_no_run_and_no_result_is_named(tmp_path):
    with pytest.raises(SystemExit, match="no log.jsonl there: name run folders"):
        report.read_run(tmp_path / "nowhere", "nowhere")
    for text in ("", "[]", '{"args": {}}', '{"results": [{"accuracy": 1}]}'):
        (tmp_path / "eval.json").write_text(text)
        with pytest.raises(SystemExit, match="eval.json: not a file of results"):
            report.read_results([tmp_path / "eval.json"])
    make(tmp_path / "run/warmup", "align", [{"loss": 1.0}])  # --warmup_only
    assert [r["stage"] for r in report.read_run(tmp_path / "run", "run")] == ["warm-up"]


def test_names_are_short_and_unique(tmp_path):
    assert report.names(["out/a/sft", "out/a/align/last"]) == ["sft", "align"]
    assert report.names(["seed0/sft", "seed1/sft", "base"]) == ["seed0/sft", "seed1/sft", "base"]
    result = {"policy": "base", "data": "d", "mode": "greedy", "prompts": 1, "accuracy": 1.0}
    for name in "ab":
        (tmp_path / name).write_text(json.dumps({"results": [result]}))
    labels = [r["label"] for r in report.read_results([tmp_path / "a", tmp_path / "b"])]
    assert labels == [f"base ({tmp_path / 'a'})", f"base ({tmp_path / 'b'})"]


HEALTHY = {
    "perception/leak": 0.52,
    "perception/saturated": 0.1,
    "reasoning/saturated": 0.2,
    "perception/flat_groups": 0.0,
    "reasoning/length_corr": -0.2,
    "format": 0.97,
    "accuracy": 0.7,
    "truncated": 0.0,
    "skipped": 0,
}


@pytest.mark.parametrize(
    "name, worse, colour",
    [
        ("Leak probe", {"perception/leak": 0.58}, "amber"),
        ("Leak probe", {"perception/leak": 0.3}, "red"),
        ("Saturated pairs", {"reasoning/saturated": 0.95}, "red"),
        ("Flat groups", {"perception/flat_groups": 0.1}, "amber"),
        ("Score and length", {"reasoning/length_corr": -0.9}, "red"),
        ("Canary: format", {"format": 0.6}, "red"),
        ("Canary: accuracy", {"accuracy": 0.6}, "amber"),
        ("Cut rollouts", {"truncated": 0.1}, "amber"),
        ("Skipped updates", {"disc_skipped": 1}, "red"),
        ("Leak probe", {"perception/leak": math.nan}, "grey"),
    ],
)
def test_lights(name, worse, colour):
    run = {"stage": "align", "steps": [HEALTHY] * 20}
    assert {c for c, *_ in report.lights(run)} == {"green"} and len(report.lights(run)) == 8
    steps = [HEALTHY | worse] * 20 if colour == "grey" else [HEALTHY] * 10 + [HEALTHY | worse] * 10
    found = {light[1]: light[0] for light in report.lights({"stage": "align", "steps": steps})}
    assert found.pop(name) == colour and set(found.values()) == {"green"}


def test_what_is_drawn_is_what_the_stages_log():
    sources = "".join(path.read_text() for path in ROOT.glob("*.py"))
    keys = (
        " ".join([*report.CHARTS.values(), *(light[2] for light in report.LIGHTS)])
        .replace("*/", "")
        .split()
    )
    assert [k for k in keys if not re.search(rf'["/]{k}"', sources)] == []
    assert set(" ".join(report.CHARTS.values()).replace("*/", "").split()) == set(report.GLOSS)


def test_rollouts_from_the_loop_to_the_page(tmp_path, capsys):
    """A group of a step, a malformed rollout in it, becomes a line that resuming drops and the page shows."""
    noise = Image.frombytes(
        "RGB", (600, 400), torch.randint(0, 256, (720_000,)).to(torch.uint8).numpy().tobytes()
    )
    messages = [{"role": "system", "content": "s"}, {"role": "user", "content": "<image>how many?"}]
    images = [noise, noise.crop((0, 0, 9, 9))]
    example = SimpleNamespace(
        where="d.jsonl:4", answer="3", messages=messages, response=TEXT, images=images
    )
    rollouts = [Rollout([5, 1], [-0.1, -0.2], "end"), Rollout([5], [-0.1], "length")]
    scores = {"perception": torch.tensor([1.23456, math.nan]), "format": torch.tensor([1.0, 0.0])}
    made = Group(
        SimpleNamespace(example=example),
        rollouts,
        [TEXT, "oops"],
        scores,
        torch.tensor([1.0, -1.0]),
    )
    args = Args(policy="p", data="d", out=str(tmp_path), resume=True)
    log = Log(tmp_path, args)
    for step in (1, 2):
        log.step(step, {"loss": 0.0})
        show_rollout(log, step, made, {"perception": math.inf, "reasoning": None})
    assert (
        capsys.readouterr().out.count("how many") == 0 and not (tmp_path / "rollouts.new").exists()
    )
    Log(tmp_path, args, done=1)
    (line,) = (tmp_path / "rollouts.jsonl").read_text().splitlines()
    record = json.loads(line, parse_constant=pytest.fail)
    assert (record["step"], record["stage"], record["question"]) == (
        1,
        "test_report",
        "<image>how many?",
    )
    assert record["reference"] == TEXT and record["reference_scores"] == {
        "perception": None,
        "reasoning": None,
    }
    good, bad = record["rollouts"]
    assert good == {
        "text": TEXT,
        "tokens": 2,
        "stop": "end",
        "advantage": 1.0,
        "scores": {"perception": 1.2346, "format": 1.0},
    }
    assert bad["stop"] == "length" and bad["scores"] == {"perception": None, "format": 0.0}
    assert record["images"][0].startswith("data:image/jpeg;base64,") and record["images"][
        1
    ].startswith("data:image/png")
    assert noise.size == (600, 400) and len(record["images"][0]) < 200_000


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("chromium"), reason="needs chromium, to run the page's script")
def test_the_page_in_a_browser(tmp_path):
    groups = [group(1), group(2, text=HOSTILE, format=0.0), group(3, accuracy=0.0)]
    text, _ = write_page(
        tmp_path,
        make(tmp_path / "run", "align", [{"format": v} for v in (1.0, math.nan, 0.5)], groups),
    )
    clicks = """<p id="said"></p><script>
    const say = x => { document.getElementById("said").textContent += x + "|"; };
    const press = key => document.body.dispatchEvent(new KeyboardEvent("keydown", {key, bubbles: true}));
    const place = () => say(document.getElementById("place").textContent);
    place(); press("j"); place(); say(document.querySelector("#group ol").textContent.includes("document.title"));
    document.querySelector("[value=malformed]").click(); place(); press("j"); place();
    say(document.querySelector("svg path").getAttribute("d").match(/M/g).length);
    say(document.documentElement.scrollWidth <= innerWidth);
    setTimeout(() => say(document.title), 500);  // an onerror would have fired by then
    </script>"""
    (tmp_path / "clicks.html").write_text(text.replace("</body>", clicks + "</body>"))
    command = [
        "chromium",
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        f"--user-data-dir={tmp_path / 'profile'}",
        "--window-size=500,800",
        "--virtual-time-budget=2000",
        "--dump-dom",
    ]
    dom = subprocess.run(
        [*command, (tmp_path / "clicks.html").as_uri()], capture_output=True, text=True
    )
    said = re.search(r'<p id="said">(.*?)</p>', dom.stdout)[1].strip("|").split("|")
    assert said == [
        "run, step 1 (1 of 3)",
        "run, step 2 (2 of 3)",
        "true",
        "run, step 1 (1 of 2)",
        "run, step 3 (2 of 2)",
        "2",
        "true",
        "PRISM runs",
    ]
