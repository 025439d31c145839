"""tools/report.py: what the runs left becomes one page that shows it, escapes it, loads nothing."""

import importlib
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


def write_page(folder, *runs, results=(), flags=()):
    """The command as it is typed -> (page, its data). It writes the page and nothing else."""
    command = [sys.executable, ROOT / "tools/report.py", *runs, *flags]
    if results:
        command += ["--eval", *results]
    command += ["--out", folder / "page.html"]
    (folder / "page.html").unlink(missing_ok=True)
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
    first, second = report.charts(report.arms_of(runs, False))
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
    points, band = report.points([a_run("align", steps)], "leak")
    assert points == [[1, 0.5], [11, 0.5], [21, 0.5], [31, 0.5]]
    assert band == []  # of a single run


def test_null_is_a_gap_as_nan_is():
    steps = [{"step": 1, "leak": 0.5}, {"step": 2, "leak": None}, {"step": 3, "leak": math.nan}]
    assert report.points([a_run("align", steps)], "leak")[0] == [[1, 0.5], [2, None], [3, None]]


# ----------------------------------------------------------------------------- several seeds
def seeds_of(folder, arm, accuracies, **arguments):
    """Runs <folder>/tiny-<seed>/<arm>, each of its seed's SFT, with one accuracy in all steps."""
    runs = []
    for seed, accuracy in enumerate(accuracies):
        run = make(folder / f"tiny-{seed}/{arm}", "rlvr", [{"accuracy": accuracy}] * 3)
        header, *steps = (run / "log.jsonl").read_text().splitlines()
        header = json.loads(header)
        header["args"] |= {"seed": seed, "out": str(run), "policy": f"out/tiny-{seed}/sft/last"}
        header["args"] |= arguments
        write_lines(run / "log.jsonl", [header, *map(json.loads, steps)])
        runs.append(run)
    return runs


def test_seeds_are_drawn_as_their_mean_with_its_interval(tmp_path):
    """Of one arm are runs whose arguments differ in seed, --out and the seed's number in paths."""
    grpo = seeds_of(tmp_path, "grpo", [0.4, 0.5, 0.6])
    prism = seeds_of(tmp_path, "align-grpo", [0.7, 0.8], policy="out/align/last")
    greedy = {"data": "d/hard.jsonl", "mode": "greedy", "prompts": 100}
    results = []
    for run, accuracy in zip(grpo, (0.3, 0.4, 0.5), strict=True):
        results.append(greedy | {"policy": f"{run}/last", "accuracy": accuracy})
    results.append(greedy | {"policy": "base", "accuracy": 0.1})
    file = write_results(tmp_path / "eval.json", *results)
    text, data = write_page(tmp_path, *grpo, *prism, results=[file], flags=["--mean"])
    (chart,) = data["charts"]
    first, second = chart["series"]
    assert first["label"].endswith("tiny-*/grpo, mean of 3")
    assert second["label"].endswith("tiny-*/align-grpo, mean of 2")
    assert first["points"] == [[1, 0.5], [2, 0.5], [3, 0.5]]
    # Student's t of 2 degrees of freedom, 4.303, times 0.1 / sqrt(3)
    assert first["band"][0] == [1, 0.2516, 0.7484]
    assert second["band"][0] == [1, 0.1145, 1.386]  # 12.71 * 0.0707 / sqrt(2) around 0.75
    row = r"tiny-\*/grpo, mean of 3</th><td>40.0 <small>± 24.8</small></td>"
    assert re.search(row, text)
    assert '<th scope="row">base</th><td>10.0 <small>± 3.0</small></td>' in text
    assert "its 95 % interval" in text
    # What is not asked for is not done.
    _, data = write_page(tmp_path, *grpo, *prism)
    assert len(data["charts"][0]["series"]) == 5


@pytest.mark.parametrize(
    "freedom, quantile",
    [(1, 12.71), (2, 4.303), (9, 2.262), (30, 2.042)]
    + [(31, 2.040), (40, 2.021), (60, 2.000), (120, 1.980)],
)
def test_intervals_are_students_of_any_number_of_seeds(freedom, quantile):
    """Against the quantiles in tables. As many values are -1 as are 1; one is 0 if they are odd."""
    count = freedom + 1
    values = [-1.0] * (count // 2) + [1.0] * (count // 2) + [0.0] * (count % 2)
    squares = 2 * (count // 2)
    half = quantile * math.sqrt(squares / freedom / count)
    assert report.half_interval(values) == pytest.approx(half, rel=0.005 / 2)
    assert report.half_interval([1.0]) is None


def test_steps_that_not_all_seeds_have_are_left_out():
    short = a_run("rlvr", [{"step": 1, "reward": 0.0}, {"step": 2, "reward": 0.5}], "a")
    long = a_run("rlvr", [{"step": n, "reward": 1.0} for n in (1, 2, 3)], "b")
    points, band = report.points([short, long], "reward")
    assert points == [[1, 0.5], [2, 0.75]]
    assert [step for step, _, _ in band] == [1, 2]


def test_of_many_runs_only_what_needs_a_look_is_unfolded(tmp_path):
    runs = []
    for seed, truncated in enumerate((0.0, 0.0, 0.5, 0.0, 0.0)):
        steps = [{"truncated": truncated, "format": 1.0}]
        runs.append(make(tmp_path / f"run{seed}", "rlvr", steps))
    text, _ = write_page(tmp_path, *runs)
    opened = re.findall(r"<details( open)?><summary><h3>(\w+) <small>(.*?)</small>", text)
    assert opened[1] == ("", "run1", "2 healthy, 2 no data")
    assert opened[2] == (" open", "run2", "1 healthy, 1 act, 2 no data")
    assert [bool(is_open) for is_open, *_ in opened] == [False, False, True, False, False]
    text, _ = write_page(tmp_path, *runs[:2])
    assert text.count("<details open>") == 2


def test_names_of_arms():
    assert report.common_name(["a"]) == "a"
    assert report.common_name(["out/x-0/a", "out/x-11/a"]) == "out/x-*/a, mean of 2"
    assert report.common_name(["a 1", "b"]) == "a 1 .., mean of 2"


def test_validation_is_drawn(tmp_path):
    """From step 0, which is no step of the run."""
    steps = [{"step": 0, "eval/accuracy": 0.25}, {"step": 1, "reward": 0.5}]
    steps.append({"step": 2, "reward": 0.6, "eval/accuracy": 0.5})
    runs = [a_run("rlvr", steps), a_run("sft", [{"step": 0, "eval/loss": 2.0}])]
    loss, accuracy, _ = report.charts(report.arms_of(runs, False))
    assert (loss["stage"], loss["title"]) == ("sft", "eval/loss")
    assert (accuracy["title"], accuracy["series"][0]["label"]) == ("eval/accuracy", "eval/accuracy")
    assert accuracy["series"][0]["points"] == [[0, 0.25], [2, 0.5]]
    arms = report.arms_of([a_run("rlvr", steps, "a"), a_run("rlvr", steps, "b")], False)
    two = report.charts(arms)
    assert [series["label"] for series in two[0]["series"]] == ["a", "b"]
    table = report.runs_table([a_run("rlvr", [{"seconds": 1.0, **step} for step in steps])])
    assert "<td>rlvr</td><td>2</td>" in table


def test_a_run_has_its_colour_in_each_chart():
    first = a_run("align", [{"step": 1, "format": 0.5}], "a")
    second = a_run("align", [{"step": 1, "disc_loss": 0.5}], "b")
    charts = report.charts(report.arms_of([first, second], False))
    colours = [[s["colour"] for s in chart["series"]] for chart in charts]
    assert colours == [[0], [1]]


def test_many_groups_are_thinned_evenly_and_the_page_says_so(tmp_path):
    run = make(tmp_path / "run", "align", [{"loss": 1.0}], [group(step) for step in range(1, 301)])
    text, data = write_page(tmp_path, run)
    steps = [g["step"] for g in data["groups"]]
    assert len(steps) == report.GROUPS
    assert steps == sorted(set(steps))
    assert steps[0] == 1 and steps[-1] > 290
    assert "200 more groups" in text
    text, data = write_page(tmp_path, run, flags=["--groups", "1000"])
    assert len(data["groups"]) == 300 and "more groups" not in text


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
    paths = ["/a/out/seed0/sft", "/a/out/seed1/sft/last", "/a/base"]
    assert report.short_names(paths) == ["seed0/sft", "seed1/sft", "base"]
    paths = ["out/0/sft/best", "out/1/sft/best", "sft", "sft"]
    assert report.short_names(paths) == ["0/sft best", "1/sft best", "sft", "sft"]
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


def test_a_game_that_was_saturated_for_long_is_not_healthy_because_it_ended_well():
    steps = [HEALTHY_STEP | {"reasoning/saturated": 1.0}] * 90 + [HEALTHY_STEP] * 10
    findings = {f.light.name: f for f in report.lights(a_run("align", steps))}
    assert findings["Saturated pairs"].colour == "red"
    assert findings["Saturated pairs"].figures == "perception 0.1, reasoning 0.92"


@pytest.mark.parametrize("light", report.LIGHTS, ids=lambda light: light.name)
def test_lights_name_flags_that_their_stage_has(light):
    stages = {"warm-up": "align"}
    for flag in re.findall(r"--(\w+)", light.mend.replace("eval.py --filter", "")):
        for stage in light.stages:
            args = importlib.import_module(stages.get(stage, stage)).Args
            # A light of several stages may say of which flag which stage has it, in brackets.
            named = f"(--{flag})" in light.mend
            assert flag in args.__dataclass_fields__ or named, (stage, flag)


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


def in_a_browser(folder, page, script):
    """What the script says on the page, with `say(..)`."""
    page = page.replace("</body>", f'<p id="said"></p><script>{SAY}{script}</script></body>')
    (folder / "clicks.html").write_text(page)
    command = [
        "chromium",
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        f"--user-data-dir={folder / 'profile'}",
        "--window-size=500,800",
        "--virtual-time-budget=2000",
        "--dump-dom",
        (folder / "clicks.html").as_uri(),
    ]
    dom = subprocess.run(command, capture_output=True, text=True)
    return re.search(r'<p id="said">(.*?)</p>', dom.stdout)[1].strip("|").split("|")


SAY = """
    const say = x => { document.getElementById("said").textContent += x + "|"; };
    const place = () => say(document.getElementById("place").textContent);
"""
needs_a_browser = pytest.mark.skipif(
    not shutil.which("chromium"), reason="needs chromium, to run the page's script"
)


@pytest.mark.slow
@needs_a_browser
def test_two_runs_beside_each_other(tmp_path):
    """Groups of the same prompt, of several the one nearest in steps; only prompts of both."""
    ours = [group(1), group(9, text="a"), group(20)]
    theirs = [group(3, accuracy=0.0), group(18), group(9, text="b")]
    runs = [make(tmp_path / "a", "align", [{"format": 1.0}], ours)]
    runs.append(make(tmp_path / "b", "align", [{"format": 0.5}], theirs))
    text, _ = write_page(tmp_path, *runs)
    script = """
    const pick = (id, value) => { at(id).value = value; at(id).onchange(); };
    pick("run", "a");
    place();
    pick("beside", "b");
    place();
    const heads = () => say([...document.querySelectorAll("#group > div")].slice(1)
      .map(side => side.firstChild.textContent).join(" / "));
    heads();
    say(document.querySelectorAll("#group ol").length);
    show(1);
    heads();
    say(document.documentElement.scrollWidth <= innerWidth);
    pick("beside", "a");
    place();
    """
    assert in_a_browser(tmp_path, text, script) == [
        "a, step 1 (1 of 3)",
        "a, step 1 (1 of 2)",
        "a, step 1 1 right, 0 wrong, 0 malformed / b, step 3 0 right, 1 wrong, 0 malformed",
        "2",
        "a, step 20 1 right, 0 wrong, 0 malformed / b, step 18 1 right, 0 wrong, 0 malformed",
        "true",
        "no such rollouts",
    ]


@pytest.mark.slow
@needs_a_browser
def test_the_page_in_a_browser(tmp_path):
    groups = [group(1), group(2, text=HOSTILE, format=0.0), group(3, accuracy=0.0)]
    steps = [{"format": value} for value in (1.0, math.nan, 0.5)]
    text, _ = write_page(tmp_path, make(tmp_path / "run", "align", steps, groups))
    script = """
    const press = key =>
      document.body.dispatchEvent(new KeyboardEvent("keydown", {key, bubbles: true}));
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
    """
    assert in_a_browser(tmp_path, text, script) == [
        "run, step 1 (1 of 3)",
        "run, step 2 (2 of 3)",
        "true",
        "run, step 1 (1 of 2)",
        "run, step 3 (2 of 2)",
        "2",
        "true",
        "PRISM runs",
    ]
