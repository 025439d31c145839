"""tools/report.py: what the runs left becomes one page that shows it, escapes it, loads nothing."""

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
from engine.rollouts import Group, show_rollouts
from engine.sampler import Rollout
from tools import report

ARGS = {"sft": {"batch": 8}, "align": {"disc": "moe"}, "rlvr": {"algo": "grpo"}}
HOSTILE = (
    "</script><script>document.title = 'owned'</script>"
    "<img src=x onerror=\"document.title = 'owned'\"> {{data}} \u2028"
)
IMAGE = (
    "data:image/png;base64,iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mP8z8BQDwAEhQGA"
    "hKmMIQAAAABJRU5ErkJggg=="
)
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
        "scores": {"accuracy": 1.0, "format": 1.0, "perception": None, **scores},
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


def write_lines(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def make(folder, stage, steps, groups=()):
    """A run folder, with the metrics of each step."""
    folder.mkdir(parents=True, exist_ok=True)
    hardware = {"ranks": 1, "cores": 2, "gpu": None}
    header = {"args": ARGS[stage], "commit": "0123456789ab", "hardware": hardware}
    records = [{"step": n, "seconds": 6.0, **step} for n, step in enumerate(steps, 1)]
    write_lines(folder / "log.jsonl", [header, *records])
    if groups:
        write_lines(folder / "rollouts.jsonl", groups)
    return folder


def a_run(stage, steps, name="run"):
    return report.Run(name, stage, header={}, steps=steps, groups=[])


def write_page(folder, *runs, results=()):
    """The command as it is typed -> (page, its data). It writes the page and nothing else."""
    command = [sys.executable, ROOT / "tools/report.py", *runs]
    if results:
        command += ["--eval", *results]
    command += ["--out", folder / "page.html"]
    before = set(folder.rglob("*"))
    done = subprocess.run(command, capture_output=True, text=True, cwd=folder)
    assert done.returncode == 0, done.stderr
    assert set(folder.rglob("*")) - before == {folder / "page.html"}
    text = (folder / "page.html").read_text()
    assert f"{len(text.encode()):,} bytes" in done.stdout
    data = re.search(r'<script id="data" type="application/json">(.*?)</script>', text, re.DOTALL)
    return text, json.loads(data[1])


def write_results(path, *results):
    path.write_text(json.dumps({"results": results}))
    return path


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
    greedy = {
        "policy": "out/sft/last",
        "data": "d/hard.jsonl",
        "mode": "greedy",
        "prompts": 100,
        "accuracy": 0.9,
    }
    sampled = greedy | {"mode": "T=1", "accuracy": math.nan}
    results = write_results(tmp_path / "eval.json", greedy, sampled)
    text, data = write_page(tmp_path, *runs, results=[results])
    # sqrt(.9 * .1 / 100)
    assert '<th scope="row">sft</th><td>90.0 <small>± 3.0</small></td><td>no data</td>' in text
    assert '<th scope="col">hard, greedy</th>' in text
    charts = [(c["stage"], c["title"], [s["label"] for s in c["series"]]) for c in data["charts"]]
    assert charts == [
        ("sft", "loss", ["loss"]),
        ("warm-up", "acc", ["perception"]),
        ("warm-up", "loss", ["loss"]),
        ("align", "acc", ["perception"]),
        ("rlvr", "reward", ["reward"]),
    ]
    assert data["charts"][0]["series"][0]["points"] == [[1, 2.0], [2, 1.0]]
    groups = [(g["run"], g["stage"]) for g in data["groups"]]
    assert groups == [("align", "align"), ("align-grpo", "rlvr")]
    cells = ("warm-up", "1", "0.1", "1 × 2 CPU cores")
    row = "".join(f"<td>{cell}</td>" for cell in cells)
    assert f'<th scope="row">align warm-up</th>{row}' in text


def test_any_spans_are_read_from_the_log(tmp_path):
    """One span, or three: in the order in which the log has them, each with its colour."""
    three = {"plan/acc": 0.7, "perception/acc": 0.8, "reasoning/acc": 0.9, "plan/leak": 0.5}
    runs = [a_run("align", [{"step": 1, **three}], "a"), a_run("warm-up", [], "b")]
    assert report.span_names(runs[0]) == ["plan", "perception", "reasoning"]
    first, second = report.charts(runs)
    assert [(s["label"], s["colour"]) for s in first["series"]] == [
        ("plan", 0),
        ("perception", 1),
        ("reasoning", 2),
    ]
    assert (second["title"], [s["label"] for s in second["series"]]) == ("leak", ["plan"])
    whole = a_run("align", [{"step": 1, "whole/acc": 0.5, "whole/leak": 0.7}])
    figures = {finding.light.name: finding.figures for finding in report.lights(whole)}
    assert figures["Leak probe"] == "whole 0.7"


def test_loads_nothing_and_escapes_everything(tmp_path):
    """
    The page is of text that a model wrote: none of it may end an element, run, fetch, or fill a
    slot of the template.
    """
    run = make(tmp_path / "<b>run", "align", [{"loss": 1.0}], [group(1, text=HOSTILE)])
    result = {
        "policy": HOSTILE,
        "data": "<i>.jsonl",
        "mode": "greedy",
        "prompts": 4,
        "accuracy": 0.5,
    }
    results = write_results(tmp_path / "eval.json", result)
    text, data = write_page(tmp_path, run, results=[results])
    assert data["groups"][0]["rollouts"][0]["text"] == HOSTILE
    assert data["groups"][0]["run"] == "<b>run"
    for piece in ("owned'</script>", "<img", "<b>run", "<i>.jsonl"):
        assert piece not in text
    assert text.count("<script") == text.count("</script>") == 2
    # a name, never fetched
    assert re.findall(r"https?://[\w./]+", text) == ["http://www.w3.org/2000/svg"]
    assert "default-src 'none'" in text
    loading = r"<link|@import|url\(|src=|fetch\("
    assert not re.search(loading, text.replace("src=x", ""))


def test_nan_is_a_gap_and_long_logs_are_thinned(tmp_path):
    steps = []
    for n in range(24_000):
        loss = 1.0 if n % 2 else 3.0
        steps.append({"loss": math.nan if 3000 <= n < 6000 else loss})
    run = make(tmp_path / "run", "sft", steps)
    text, data = write_page(tmp_path, run)
    points = data["charts"][0]["series"][0]["points"]
    assert len(points) <= report.POINTS
    assert points[0] == [100, 2.0]
    assert points[-1][0] == 24_000
    assert [value for _, value in points[29:61]] == [2.0] + [None] * 30 + [2.0]
    assert "the mean of up to 100 steps" in text
    assert len(text) < 40_000


def test_what_is_logged_now_and_then_is_joined_without_gaps():
    steps = []
    for n in range(1, 32):
        steps.append({"step": n, "leak": 0.5} if n % 10 == 1 else {"step": n})
    points = report.points(a_run("align", steps), "leak")
    assert points == [[1, 0.5], [11, 0.5], [21, 0.5], [31, 0.5]]


def test_validation_is_drawn(tmp_path):
    """From step 0, which is no step of the run."""
    steps = [{"step": 0, "eval/accuracy": 0.25}, {"step": 1, "reward": 0.5}]
    steps.append({"step": 2, "reward": 0.6, "eval/accuracy": 0.5})
    runs = [a_run("rlvr", steps), a_run("sft", [{"step": 0, "eval/loss": 2.0}])]
    loss, accuracy, _ = report.charts(runs)
    assert (loss["stage"], loss["title"]) == ("sft", "eval/loss")
    assert (accuracy["title"], accuracy["series"][0]["label"]) == ("eval/accuracy", "eval/accuracy")
    assert accuracy["series"][0]["points"] == [[0, 0.25], [2, 0.5]]
    two = report.charts([a_run("rlvr", steps, "a"), a_run("rlvr", steps, "b")])
    assert [series["label"] for series in two[0]["series"]] == ["a", "b"]
    table = report.runs_table([a_run("rlvr", [{"seconds": 1.0, **step} for step in steps])])
    assert "<td>rlvr</td><td>2</td>" in table


def test_a_run_has_its_colour_in_each_chart():
    first = a_run("align", [{"step": 1, "format": 0.5}], "a")
    second = a_run("align", [{"step": 1, "disc_loss": 0.5}], "b")
    colours = [[s["colour"] for s in c["series"]] for c in report.charts([first, second])]
    assert colours == [[0], [1]]


def test_many_groups_are_thinned_evenly_and_the_page_says_so(tmp_path):
    run = make(tmp_path / "run", "align", [{"loss": 1.0}], [group(step) for step in range(1, 101)])
    text, data = write_page(tmp_path, run)
    steps = [g["step"] for g in data["groups"]]
    assert len(steps) == report.GROUPS
    assert steps == sorted(set(steps))
    assert steps[0] == 1 and steps[-1] > 95
    assert "60 more groups" in text


def test_cut_and_broken_lines(tmp_path, capsys):
    run = make(tmp_path / "run", "sft", [{"loss": 1.0}])
    path = run / "log.jsonl"
    whole = path.read_text()
    path.write_text(whole + '{"step": 2, "lo')
    (found,) = report.read_runs(run, "run")
    assert [record["step"] for record in found.steps] == [1]
    assert "log.jsonl:3: left out" in capsys.readouterr().out
    for broken in ('{"step": 2, "lo\n', "7\n"):
        path.write_text(whole + broken + '{"step": 3}\n')
        with pytest.raises(SystemExit, match=r"log\.jsonl:3: not a JSON object"):
            report.read_runs(run, "run")


def test_what_is_no_run_and_no_result_is_named(tmp_path):
    with pytest.raises(SystemExit, match="no log.jsonl there: name run folders"):
        report.read_runs(tmp_path / "nowhere", "nowhere")
    for text in ("", "[]", '{"args": {}}', '{"results": [{"accuracy": 1}]}'):
        (tmp_path / "eval.json").write_text(text)
        with pytest.raises(SystemExit, match="eval.json: not a file of results"):
            report.read_results([tmp_path / "eval.json"])
    make(tmp_path / "run/warmup", "align", [{"loss": 1.0}])  # --warmup_only
    assert [run.stage for run in report.read_runs(tmp_path / "run", "run")] == ["warm-up"]


def test_names_are_short_and_unique(tmp_path):
    assert report.short_names(["out/a/sft", "out/a/align/last"]) == ["sft", "align"]
    steps = ["out/rlvr/step-000200", "out/rlvr/best", "out/rlvr/last"]
    assert report.short_names(steps) == ["rlvr step-000200", "rlvr best", "rlvr"]
    paths = ["seed0/sft", "seed1/sft", "base"]
    assert report.short_names(paths) == paths
    result = {"policy": "base", "data": "d", "mode": "greedy", "prompts": 1, "accuracy": 1.0}
    files = [write_results(tmp_path / name, result) for name in "ab"]
    labels = [result["label"] for result in report.read_results(files)]
    assert labels == [f"base ({tmp_path / 'a'})", f"base ({tmp_path / 'b'})"]


HEALTHY_STEP = {
    "step": 1,
    "perception/acc": 0.7,
    "reasoning/acc": 0.7,
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
    healthy = report.lights(a_run("align", [HEALTHY_STEP] * 20))
    assert len(healthy) == 8
    assert {finding.colour for finding in healthy} == {"green"}

    worse_step = HEALTHY_STEP | worse
    steps = [HEALTHY_STEP] * 10 + [worse_step] * 10
    if colour == "grey":
        steps = [worse_step] * 20
    findings = report.lights(a_run("align", steps))
    colours = {finding.light.name: finding.colour for finding in findings}
    assert colours.pop(name) == colour
    assert set(colours.values()) == {"green"}


def test_what_is_drawn_is_what_the_stages_log():
    files = [*ROOT.glob("*.py"), *ROOT.glob("engine/*.py")]
    sources = "".join(path.read_text() for path in files)
    metrics = [chart.metric for chart in report.CHARTS]
    for light in report.LIGHTS:
        metrics += light.metrics
    assert {"eval/accuracy", "eval/format", "eval/length", "eval/items", "eval/steps"} <= {*metrics}
    for metric in metrics:
        key = metric.removeprefix("*/")
        assert re.search(rf'["/]{key}"', sources), f"no stage logs {key}"
    stages = {stage for record in [*report.CHARTS, *report.LIGHTS] for stage in record.stages}
    assert stages == set(report.STAGES)


def test_rollouts_from_the_loop_to_the_page(tmp_path, capsys):
    """
    A group of a step, a malformed rollout in it, becomes a line that resuming drops and the page
    shows.
    """
    noise = torch.randint(0, 256, (720_000,)).to(torch.uint8).numpy().tobytes()
    large = Image.frombytes("RGB", (600, 400), noise)
    example = SimpleNamespace(
        where="d.jsonl:4",
        answer="3",
        messages=[
            {"role": "system", "content": "s"},
            {"role": "user", "content": "<image>how many?"},
        ],
        response=TEXT,
        images=[large, large.crop((0, 0, 9, 9))],
    )
    made = Group(
        SimpleNamespace(example=example),
        rollouts=[Rollout([5, 1], [-0.1, -0.2], "end"), Rollout([5], [-0.1], "length")],
        texts=[TEXT, "oops"],
        advantage=torch.tensor([1.0, -1.0]),
    )
    scores = {"perception": torch.tensor([1.23456, math.nan]), "format": torch.tensor([1.0, 0.0])}
    args = Args(policy="p", data="d", out=str(tmp_path), resume=True)
    log = Log(tmp_path, args)
    for step in (1, 2):
        log.step(step, {"loss": 0.0})
        show_rollouts(log, step, made, scores, {"perception": math.inf, "reasoning": None})
    assert capsys.readouterr().out.count("how many") == 0
    assert not (tmp_path / "rollouts.new").exists()

    Log(tmp_path, args, done=1)
    (line,) = (tmp_path / "rollouts.jsonl").read_text().splitlines()
    record = json.loads(line, parse_constant=pytest.fail)
    assert (record["step"], record["stage"]) == (1, "test_report")
    assert record["question"] == "<image>how many?"
    assert record["reference"] == TEXT
    assert record["reference_scores"] == {"perception": None, "reasoning": None}
    good, bad = record["rollouts"]
    assert good == {
        "text": TEXT,
        "tokens": 2,
        "stop": "end",
        "advantage": 1.0,
        "scores": {"perception": 1.2346, "format": 1.0},
    }
    assert bad["stop"] == "length"
    assert bad["scores"] == {"perception": None, "format": 0.0}
    first, second = record["images"]
    assert first.startswith("data:image/jpeg;base64,")
    assert second.startswith("data:image/png")
    assert large.size == (600, 400)
    assert len(first) < 200_000


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("chromium"), reason="needs chromium, to run the page's script")
def test_the_page_in_a_browser(tmp_path):
    groups = [group(1), group(2, text=HOSTILE, format=0.0), group(3, accuracy=0.0)]
    steps = [{"format": value} for value in (1.0, math.nan, 0.5)]
    text, _ = write_page(tmp_path, make(tmp_path / "run", "align", steps, groups))
    clicks = """<p id="said"></p><script>
    const say = x => { document.getElementById("said").textContent += x + "|"; };
    const press = key =>
      document.body.dispatchEvent(new KeyboardEvent("keydown", {key, bubbles: true}));
    const place = () => say(document.getElementById("place").textContent);
    place();
    press("j");
    place();
    say(document.querySelector("#group ol").textContent.includes("document.title"));
    document.querySelector("[value=malformed]").click();
    place();
    press("j");
    place();
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
        (tmp_path / "clicks.html").as_uri(),
    ]
    dom = subprocess.run(command, capture_output=True, text=True)
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
