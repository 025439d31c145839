"""
One HTML page of runs, to be looked at anywhere: results with their errors, lights for the health of
the game, curves, and a browser of rollouts.

    python tools/report.py out/sft out/align out/align-grpo --eval out/eval.json --out report.html
    python tools/report.py out/tiny-*/align out/tiny-*/rlvr --mean --eval out/tiny-*/eval.json

Of each run folder it reads log.jsonl, warmup/log.jsonl and rollouts.jsonl. It needs nothing but
Python, and the page loads nothing: no network, no fonts, no libraries.

With --mean, runs of one arm, whose arguments differ in the seed and in its number in paths alone,
are drawn as one curve, their mean with its 95 % interval (Student's t over the runs); so are their
results, where --eval names their folders as the command line does.

A curve is drawn through at most POINTS means over stretches of steps, and of a run's rollouts.jsonl
at most --groups groups are taken, evenly over the steps; the page says so. A gap in a curve is
where there was no data (null, or NaN). A last line that a kill cut short is left out; whatever else
cannot be read ends in an error that names file and line.
"""

import argparse
import json
import math
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from html import escape
from math import inf
from pathlib import Path
from statistics import mean, stdev

POINTS = 240  # of a curve, at most
GROUPS = 100  # of a run, at most, by default
MANY = 4  # runs, of which all lights are shown at once
LATE = 10  # steps that a light's figure is the mean of

STAGES = ("sft", "warm-up", "align", "rlvr")  # warm-up: of stage 2's discriminator


@dataclass(frozen=True)
class Chart:
    """One chart for each of its stages, with the curves of all runs of that stage."""

    metric: str  # its key in log.jsonl; "*/acc" is that of every span, "perception/acc" and so on
    gloss: str
    stages: tuple[str, ...]  # that have it


CHARTS = [  # in the order of the page
    Chart("eval/accuracy", "of --eval_data, greedy", ("sft", "align", "rlvr")),
    Chart("eval/format", "of --eval_data, greedy", ("sft", "align", "rlvr")),
    Chart("eval/length", "tokens, greedy", ("sft", "align", "rlvr")),
    Chart("eval/items", "per caption, greedy", ("sft", "align", "rlvr")),
    Chart("eval/steps", "of reasoning, greedy", ("sft", "align", "rlvr")),
    Chart("eval/loss", "of --eval_data", ("sft",)),
    Chart("*/acc", "pairs ordered rightly", ("warm-up", "align")),
    Chart("*/auc", "right rollouts above wrong ones", ("align",)),
    Chart("*/held_out", "pairs never trained on", ("warm-up",)),
    Chart("*/margin", "reference − rollout", ("warm-up", "align")),
    Chart("loss", "of the stage", ("sft", "warm-up")),
    Chart("*/saturated", "pairs with σ(margin) > 0.99", ("align",)),
    Chart("*/group_std", "of scores in a group", ("align",)),
    Chart("*/length_corr", "score against length", ("align",)),
    Chart("*/leak", "probe of the last token", ("align",)),
    Chart("reward", "0.8 accuracy + 0.2 format", ("rlvr",)),
    Chart("accuracy", "the verifier's", ("align", "rlvr")),
    Chart("format", "well-formed", ("align", "rlvr")),
    Chart("length", "tokens per rollout", ("align", "rlvr")),
    Chart("entropy", "nats per token", ("align", "rlvr")),
    Chart("informative", "groups with mixed rewards", ("rlvr",)),
    Chart("truncated", "cut at --max_response", ("rlvr",)),
    Chart("disc_loss", "Bradley-Terry", ("align",)),
    Chart("grad_norm", "before clipping", ("sft", "align", "rlvr")),
    Chart("lr", "learning rate", ("sft",)),
]


def mean_of_last(values):
    late = values[-LATE:]
    return sum(late) / len(late)


def larger_of_all_and_last(values):
    """Return the mean of the last steps, or that of all where it is larger: a run that was bad for
    long is not good because it ended well."""
    return max(mean_of_last(values), sum(values) / len(values))


def change(values):
    """Return how far the mean of the last steps is from the mean of the first, as many of each."""
    n = min(LATE, max(1, len(values) // 2))
    return mean_of_last(values[-n:]) - mean_of_last(values[:n])


@dataclass(frozen=True)
class Light:
    """
    One question about a run's health. The figure of each metric is green in one range, amber in a
    wider one, else red; the worst metric decides.
    """

    name: str
    stages: tuple[str, ...]  # that have it
    metrics: tuple[str, ...]  # as in CHARTS
    green: tuple[float, float]  # lowest and highest healthy figure
    amber: tuple[float, float]  # lowest and highest that is not yet bad
    meaning: str
    mend: str  # what to do where it is not green
    figure: Callable = mean_of_last  # of a metric's values, oldest first


LIGHTS = [
    Light(
        "Warmed up",
        stages=("warm-up",),
        metrics=("*/held_out",),
        green=(0.9, inf),
        amber=(0.7, inf),
        meaning="The discriminator must tell pairs it never saw apart before its scores mean "
        "anything.",
        mend="Raise --warmup_steps or --warmup_lr, or look at the references.",
    ),
    Light(
        "Leak probe",
        stages=("warm-up", "align"),
        metrics=("*/leak",),
        green=(0.45, 0.55),
        amber=(0.4, 0.6),
        meaning="A probe that sees only the token where the score is read should guess, 0.5.",
        mend="The two sides' spans end differently: make both by the same function.",
    ),
    Light(
        "Saturated pairs",
        stages=("align",),
        metrics=("*/saturated",),
        figure=larger_of_all_and_last,
        green=(0, 0.5),
        amber=(0, 0.9),
        meaning="Where σ(margin) > 0.99 the discriminator has won and learns no more. Of all steps "
        "and the last ones the larger mean.",
        mend="Lower --disc_lr, shorten its warm-up, or raise --score_l2 and --lr.",
    ),
    Light(
        "Flat groups",
        stages=("align",),
        metrics=("*/flat_groups",),
        green=(0, 0.05),
        amber=(0, 0.2),
        meaning="Groups with almost equal scores: divided by their std, noise becomes advantage.",
        mend="Set --std_floor near the usual group_std and --schedule cosine (Adam makes full "
        "steps of small gradients, too), or raise --group_size.",
    ),
    Light(
        "Score and length",
        stages=("align",),
        metrics=("*/length_corr",),
        green=(-0.5, 0.5),
        amber=(-0.8, 0.8),
        meaning="Within groups, scores should follow content, not length.",
        mend="Compare references' and rollouts' lengths; read rollouts of both ends below.",
    ),
    Light(
        "Canary: format",
        stages=("align",),
        metrics=("format",),
        green=(0.9, inf),
        amber=(0.7, inf),
        meaning="Share of rollouts with all parts in their order.",
        mend="Lower --lr or raise --malformed_penalty; read the malformed ones below.",
    ),
    Light(
        "Format",
        stages=("rlvr",),
        metrics=("format",),
        green=(0.9, inf),
        amber=(0.7, inf),
        meaning="Share of rollouts with all parts in their order; others get no reward at all.",
        mend="Read the malformed ones below. Cut ones need --max_response, others a policy that "
        "has learned the form: longer SFT, or a lower --lr.",
    ),
    Light(
        "Canary: accuracy",
        stages=("align",),
        metrics=("accuracy",),
        figure=change,
        green=(-0.05, inf),
        amber=(-0.15, inf),
        meaning="Change since the first steps; the verifier is not trained on in this stage.",
        mend="Some cost is usual before stage 3; a collapse is not: fewer --steps or a lower --lr; "
        "where pair accuracy is at 0.5, --schedule cosine and --std_floor.",
    ),
    Light(
        "Cut rollouts",
        stages=("align", "rlvr"),
        metrics=("truncated",),
        green=(0, 0.05),
        amber=(0, 0.2),
        meaning="Rollouts that hit the limit of tokens.",
        mend="Raise --max_response, or see below whether they repeat themselves.",
    ),
    Light(
        "Informative groups",
        stages=("rlvr",),
        metrics=("informative",),
        green=(0.3, inf),
        amber=(0.1, inf),
        meaning="Groups whose rewards differ: only they teach.",
        mend="Filter the prompts by pass rate (eval.py --filter), or use --algo dapo.",
    ),
    Light(
        "Skipped updates",
        stages=("sft", "align", "rlvr"),
        metrics=("skipped", "disc_skipped"),
        figure=sum,
        green=(0, 0),
        amber=(0, 2),
        meaning="Updates left out for a loss or gradient that was not finite.",
        mend="Lower --lr (--disc_lr); three in a row stop the run.",
    ),
]


# ----------------------------------------------------------------------------- what the runs left
@dataclass
class Run:
    name: str
    stage: str  # one of STAGES
    header: dict  # the first record of log.jsonl: arguments, commit, hardware
    steps: list[dict]  # log.jsonl's other records: {"step", metrics ..}
    groups: list[dict]  # rollouts.jsonl's records
    folder: Path = Path()


@dataclass
class Arm:
    """Runs whose curves are drawn as one, their mean; without --mean each run is one by itself."""

    name: str
    stage: str
    runs: list[Run]


def read_lines(path):
    """
    Return the records of a JSONL file. Raises SystemExit that names a broken line. The last line
    may have been cut short by a kill, it is left out.
    """
    records = []
    lines = path.read_text(encoding="utf-8").split("\n")
    for n, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            records.append(dict(json.loads(line)))
        except (ValueError, TypeError) as error:
            if n < len(lines):
                mend = "Mend the line or take it out."
                raise SystemExit(f"{path}:{n}: not a JSON object ({error}). {mend}") from None
            print(f"{path}:{n}: left out, cut short while it was written")
    return records


def read_runs(folder, name):
    """Return what a run folder holds: its warm-up where there was one, and the run itself."""
    runs = []
    if (folder / "warmup/log.jsonl").is_file():
        runs.append(read_run(folder / "warmup", f"{name} warm-up", "warm-up"))
    if (folder / "log.jsonl").is_file():
        runs.append(read_run(folder, name))
    if not runs:
        mend = "name run folders, the --out of sft.py, align.py or rlvr.py"
        raise SystemExit(f"{folder}: no log.jsonl there: {mend}")
    return runs


def read_run(folder, name, stage=None):
    """Return the Run of one log.jsonl and the rollouts.jsonl beside it, if there is one."""
    header = {"args": {}}
    steps = []
    for record in read_lines(folder / "log.jsonl"):
        if "step" in record:
            steps.append(record)
        elif "args" in record and not header["args"]:
            header = record  # a resumed run has several: the first counts
    groups = []
    if (folder / "rollouts.jsonl").is_file():
        groups = read_lines(folder / "rollouts.jsonl")
    return Run(name, stage or stage_of(header["args"]), header, steps, groups, folder)


def stage_of(args):
    if "algo" in args:
        return "rlvr"
    if "disc" in args:
        return "align"
    return "sft"


def arms_of(runs, as_means):
    """Return the Arms of the runs, in their order."""
    if not as_means:
        return [Arm(run.name, run.stage, [run]) for run in runs]
    found = {}
    for run in runs:
        found.setdefault((run.stage, settings_of(run)), []).append(run)
    arms = []
    for (stage, _), members in found.items():
        arms.append(Arm(common_name([run.name for run in members]), stage, members))
    return arms


def settings_of(run):
    """Return as text the arguments that all seeds of an arm share: those of a run but for the seed
    and --out, and with * for the seed's number in paths ("tiny-3/sft/last" of seed 3)."""
    settings = dict(run.header["args"])
    seed = settings.pop("seed", None)
    for name in ("out", "config", "resume"):
        settings.pop(name, None)
    for name, value in settings.items():
        if isinstance(value, str):
            settings[name] = re.sub(rf"(?<!\d){seed}(?!\d)", "*", value)
    return json.dumps(settings, sort_keys=True)


def common_name(names):
    """Return one name for several: "a-0/x" and "a-1/x" are "a-*/x, mean of 2"."""
    if len(names) == 1:
        return names[0]
    in_parts = [re.split(r"(\d+)", name) for name in names]
    if len({len(parts) for parts in in_parts}) > 1:
        return f"{names[0]} .., mean of {len(names)}"
    common = ""
    for alike in zip(*in_parts, strict=True):
        common += alike[0] if len(set(alike)) == 1 else "*"
    return f"{common}, mean of {len(names)}"


def short_names(paths):
    """
    Return a name for each path: as many of its last parts as tell it from the others, without
    "last" (a checkpoint's folder), with the run's name before another checkpoint's.
    """
    named = []
    for path in map(Path, paths):
        if path.name == "last":
            named.append(path.parent)
        elif path.name == "best" or path.name.startswith("step-"):
            named.append(path.parent.with_name(f"{path.parent.name} {path.name}"))
        else:
            named.append(path)
    names = []
    for path in named:
        others = [other for other in named if other != path]
        names.append(shortest_end(path, others))
    return names


def shortest_end(path, others):
    for length in range(1, len(path.parts) + 1):
        end = path.parts[-length:]
        if all(other.parts[-length:] != end for other in others):
            return str(Path(*end))
    return str(path)


def read_results(paths):
    """
    Return the results of eval.py's files, each with its `file` and a `label`: the policy's name,
    with the file's where the policy is in several files.
    """
    results = []
    for path in paths:
        try:
            for result in json.loads(path.read_text(encoding="utf-8"))["results"]:
                needed = ("policy", "data", "mode", "prompts", "accuracy")
                first = {key: result[key] for key in needed}
                results.append({**first, **result, "file": str(path)})
        except (OSError, ValueError, KeyError, TypeError) as error:
            what = "not a file of results, as eval.py --out writes it"
            raise SystemExit(f"{path}: {what} ({error!r})") from None
    files = {}  # policy -> files that have it
    for result in results:
        files.setdefault(result["policy"], set()).add(result["file"])
    labels = dict(zip(files, short_names(list(files)), strict=True))
    for result in results:
        label = labels[result["policy"]]
        if len(files[result["policy"]]) > 1:
            label += f" ({result['file']})"
        result["label"] = label
    return results


# ----------------------------------------------------------------------------- figures of a run
def span_names(run):
    """Return the names of the run's spans: each has a metric "<name>/acc"."""
    keys = dict.fromkeys(key for record in run.steps for key in record)
    return [key.removesuffix("/acc") for key in keys if key.endswith("/acc")]


def keys_of(run, metric):
    """Return the names under which the log has `metric`: "*/acc" is one for each span."""
    if metric.startswith("*/"):
        return [f"{span}/{metric.removeprefix('*/')}" for span in span_names(run)]
    return [metric]


def logged(run, key):
    """Return [(step, value)] of a metric where it was logged; a value may be NaN, which the file
    has as null."""
    found = []
    for record in run.steps:
        value = record.get(key, "")
        if value is None:
            value = math.nan
        if isinstance(value, int | float):
            found.append((record["step"], value))
    return found


def measured(run, key):
    """Return the values of a metric without NaN and infinity."""
    return [value for _, value in logged(run, key) if math.isfinite(value)]


# Student's t that 2.5 % of the values exceed, by degrees of freedom from 1.
T_QUANTILES = (
    *(12.71, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160),
    *(2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056),
    *(2.052, 2.048, 2.045, 2.042),
)


def half_interval(values):
    """Return the half width of the mean's 95 % interval; None of a single value."""
    if len(values) < 2:
        return None
    freedom = len(values) - 1
    if freedom <= len(T_QUANTILES):
        t = T_QUANTILES[freedom - 1]
    else:
        t = 1.96 + 2.4 / freedom  # right to 0.005
    return t * stdev(values) / math.sqrt(len(values))


def points(runs, key, most=POINTS):
    """
    Return ([[step, value]], [[step, low, high]]) of a metric, at most `most` of each: the means of
    the runs' means over stretches of the steps that all of them have, None where all of a stretch
    are NaN; and the means' intervals, where there are several.
    """
    curves = [dict(logged(run, key)) for run in runs]
    steps = [step for step in curves[0] if all(step in curve for curve in curves)]
    stretch = max(1, math.ceil(len(steps) / most))
    thinned = []
    band = []
    for begin in range(0, len(steps), stretch):
        part = steps[begin : begin + stretch]
        means = []  # of each run
        for curve in curves:
            finite = [curve[step] for step in part if math.isfinite(curve[step])]
            if finite:
                means.append(mean(finite))
        middle = rounded(mean(means)) if means else None
        thinned.append([part[-1], middle])
        half = half_interval(means)
        if half is not None:
            band.append([part[-1], rounded(middle - half), rounded(middle + half)])
    return thinned, band


def rounded(value):
    return float(f"{value:.4g}")


def charts(arms):
    """Return what the page draws, with the arms of one stage in one chart."""
    found = []
    for stage in STAGES:
        same_stage = [arm for arm in arms if arm.stage == stage]
        for chart in CHARTS:
            if stage not in chart.stages:
                continue
            series = series_of(same_stage, chart.metric)
            title = chart.metric.removeprefix("*/")
            if series:
                drawn = {"stage": stage, "title": title, "gloss": chart.gloss, "series": series}
                found.append(drawn)
    return found


def series_of(arms, metric):
    """Return the curves of one chart. An arm has the same colours in each chart of its stage."""
    series = []
    colour = 0
    for arm in arms:
        for key in dict.fromkeys(key for run in arm.runs for key in keys_of(run, metric)):
            curve, band = points(arm.runs, key)
            if any(value is not None for _, value in curve):
                label = curve_label(arm, key, several=len(arms) > 1 or len(arm.runs) > 1)
                drawn = {"label": label, "colour": colour, "points": curve, "band": band}
                series.append(drawn)
            colour += 1
    return series


def curve_label(arm, key, several):
    of_span = "/" in key and not key.startswith("eval/")
    name = key.split("/")[0] if of_span else key
    if not several:
        return name
    if of_span:
        return f"{arm.name} {name}"
    return arm.name


WORDS = {"green": "healthy", "amber": "watch", "red": "act", "grey": "no data"}
SEVERITY = ["grey", "green", "amber", "red"]


@dataclass
class Finding:
    """How a light stands in a run."""

    light: Light
    colour: str  # green, amber, red; grey: no data
    figures: str


def lights(run):
    """Return the Findings of all lights that the run's stage has."""
    return [examine(run, light) for light in LIGHTS if run.stage in light.stages]


def examine(run, light):
    figures = {}
    for metric in light.metrics:
        for key in keys_of(run, metric):
            values = measured(run, key)
            if values:
                figures[key] = light.figure(values)
    if not figures:
        return Finding(light, "grey", "not measured")
    colours = [colour_of(light, figure) for figure in figures.values()]
    worst = max(colours, key=SEVERITY.index)
    shown = []
    for key, figure in figures.items():
        name = key.split("/")[0] + " " if "/" in key or len(figures) > 1 else ""
        shown.append(f"{name}{figure:.3g}")
    return Finding(light, worst, ", ".join(shown))


def colour_of(light, figure):
    for colour, (low, high) in (("green", light.green), ("amber", light.amber)):
        if low <= figure <= high:
            return colour
    return "red"


# ----------------------------------------------------------------------------- sections of the page
def table(caption, head, rows):
    """
    Return an HTML table; the first cell of each row heads it. A cell is any text, a float, or a
    pair (percentage, its standard error).
    """
    caption = escape(caption)
    columns = "".join(f'<th scope="col">{escape(name)}</th>' for name in head)
    lines = []
    for first, *others in rows:
        cells = "".join(f"<td>{cell(value)}</td>" for value in others)
        lines.append(f'<tr><th scope="row">{cell(first)}</th>{cells}</tr>')
    body = f"<thead><tr>{columns}</tr></thead><tbody>{''.join(lines)}</tbody>"
    box = f'<div class="wide" tabindex="0" role="region" aria-label="{caption}">'
    return f'<p class="dim">{caption}</p>{box}<table>{body}</table></div>'


def cell(value):
    if isinstance(value, tuple):
        percentage, error = value
        return f"{percentage:.1f} <small>± {error:.1f}</small>"
    if isinstance(value, float):
        return f"{value:.3f}"
    return escape(str(value))


def results_section(results, arms):
    """
    Return the accuracy of each policy, or arm, on each file in each mode; below, folded, whatever
    else eval.py has measured.
    """
    if not results:
        return ""
    accuracies = accuracy_table(merge_results(results, arms))
    more = f"<details><summary>All figures</summary>{all_figures_table(results)}</details>"
    return f'<section id="results"><h2>Results</h2>{accuracies}{more}</section>'


def merge_results(results, arms):
    """
    Return the results with those of an arm's runs, of each file and mode, as one: their mean. Which
    run a policy is of is known by its folder.
    """
    arm_of = {}
    for arm in arms:
        for run in arm.runs:
            if len(arm.runs) > 1:
                arm_of[run.folder.resolve()] = arm.name
    merged = {}
    for number, result in enumerate(results):
        policy = Path(result["policy"])
        checkpoint = "last"
        if policy.name in ("last", "best") or policy.name.startswith("step-"):
            checkpoint = policy.name
            policy = policy.parent
        arm = arm_of.get(policy.resolve())
        of = (arm, checkpoint, Path(result["data"]).stem, result["mode"]) if arm else number
        merged.setdefault(of, []).append(result)
    found = []
    for of, same in merged.items():
        if isinstance(of, int):
            found.append(same[0])
        else:
            arm, checkpoint, _, _ = of
            label = arm if checkpoint == "last" else f"{arm} {checkpoint}"
            found.append({**same[0], "label": label, "of_runs": same})
    return found


def accuracy_table(results):
    columns = []
    rows = {}  # label -> {column: cell}
    for result in results:
        column = f"{Path(result['data']).stem}, {result['mode']}"
        if column not in columns:
            columns.append(column)
        rows.setdefault(result["label"], {})[column] = percentage(result)
    lines = []
    for label, cells in rows.items():
        lines.append([label, *(cells.get(column, "–") for column in columns)])
    title = "Accuracy in %, with its binomial standard error over the prompts"
    if any("of_runs" in result for result in results):
        title += "; of several runs their mean, with its 95 % interval over the runs"
    return table(title, ["policy", *columns], lines)


def percentage(result):
    """
    Return (accuracy, standard error) in %. Samples of one prompt are not independent: the error
    counts prompts.
    """
    if "of_runs" in result:
        return mean_percentage([one["accuracy"] for one in result["of_runs"]])
    p = result["accuracy"]
    n = result["prompts"]
    if not isinstance(p, float | int) or not math.isfinite(p) or not n:
        return "no data"
    return 100 * p, 100 * math.sqrt(p * (1 - p) / n)


def mean_percentage(accuracies):
    """Return (mean, half of its interval) in %; the mean alone where there is a single one."""
    finite = [one for one in accuracies if isinstance(one, float | int) and math.isfinite(one)]
    if not finite:
        return "no data"
    half = half_interval(finite)
    middle = 100 * mean(finite)
    return f"{middle:.1f}" if half is None else (middle, 100 * half)


def all_figures_table(results):
    keys = dict.fromkeys(key for result in results for key in result)
    for key in ("label", "policy", "file", "left_out"):
        keys.pop(key, None)
    lines = []
    for result in results:
        cells = [result.get(key) for key in keys]
        lines.append([result["label"], *("–" if value is None else value for value in cells)])
    return table("All figures", ["policy", *keys], lines)


def health_section(runs):
    """
    Return the lights of each run, with what they mean and what to do. Of many runs those in which
    all is well are folded.
    """
    blocks = []
    for run in runs:
        findings = lights(run)
        items = "".join(light_item(finding) for finding in findings)
        worst = max((finding.colour for finding in findings), key=SEVERITY.index, default="grey")
        opened = " open" if len(runs) <= MANY or worst in ("amber", "red") else ""
        title = f"{escape(run.name)} <small>{counts_of(findings)}</small>"
        cards = f'<ul class="lights">{items}</ul>'
        blocks.append(f"<details{opened}><summary><h3>{title}</h3></summary>{cards}</details>")
    note = (
        f"Means of the last {LATE} steps that have the figure, where nothing else is said; skipped "
        "updates: all."
    )
    title = f'<h2>Health</h2><p class="dim">{note}</p>'
    return f'<section id="health">{title}{"".join(blocks)}</section>'


def counts_of(findings):
    """Return in words how many of the lights have each colour: `7 healthy, 1 act`."""
    count = Counter(finding.colour for finding in findings)
    return ", ".join(f"{count[colour]} {WORDS[colour]}" for colour in WORDS if count[colour])


def light_item(finding):
    light = finding.light
    title = f"<b>{light.name} <i>● {WORDS[finding.colour]}</i></b>"
    # a flag is not broken over two lines
    mend = re.sub(r"(--\w+)", r'<span class="flag">\1</span>', escape(light.mend))
    advice = f'<p>{escape(light.meaning)} <span class="mend">{mend}</span></p>'
    figures = f"<br><small>{escape(finding.figures)}</small>"
    return f'<li class="{finding.colour}">{title}{figures}{advice}</li>'


def runs_table(runs):
    lines = []
    for run in runs:
        minutes = sum(measured(run, "seconds")) / 60
        hardware = run.header.get("hardware", {})
        device = hardware.get("gpu") or f"{hardware.get('cores', '?')} CPU cores"
        where = f"{hardware.get('ranks', '?')} × {device}"
        commit = run.header.get("commit", "?")[:10]
        steps = sum(record["step"] > 0 for record in run.steps)  # 0 is a validation alone
        lines.append([run.name, run.stage, steps, f"{minutes:.1f}", where, commit])
    return table("What ran", ["run", "stage", "steps", "minutes", "on", "commit"], lines)


def some_groups(run, most):
    """Return at most `most` of the run's groups, evenly over the steps, with the run's name."""
    count = min(most, len(run.groups))
    chosen = [run.groups[i * len(run.groups) // count] for i in range(count)]
    return [{**group, "run": run.name} for group in chosen]


def page(runs, results, as_means=False, most_groups=GROUPS):
    """Return the whole page: report.html beside this file, its {{slots}} filled."""
    arms = arms_of(runs, as_means)
    groups = []
    for run in runs:
        groups += some_groups(run, most_groups)
    left = sum(len(run.groups) for run in runs) - len(groups)
    longest = max(len(run.steps) for run in runs)
    content = {"charts": charts(arms), "groups": groups}
    data = json.dumps(content, separators=(",", ":"), allow_nan=False)
    pieces = {
        "results": results_section(results, arms),
        "health": health_section(runs),
        "thinned": "",
        "left": "",
        "runs": runs_table(runs),
        "data": data.replace("<", "\\u003c"),  # no text of a rollout can end the script element
    }
    if longest > POINTS:
        stretch = math.ceil(longest / POINTS)
        pieces["thinned"] = f"Each point is the mean of up to {stretch} steps."
    if any(len(arm.runs) > 1 for arm in arms):
        pieces["thinned"] += " The band around the mean of several runs is its 95 % interval."
    if left:
        pieces["left"] = f"{left} more groups are in the runs' rollouts.jsonl."
    template = Path(__file__).with_name("report.html").read_text(encoding="utf-8")
    # in one go: a {{slot}} in the text of a rollout stays as it is
    return re.sub(r"\{\{(\w+)\}\}", lambda slot: pieces[slot[1]], template)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "runs", nargs="+", type=Path, metavar="RUN_FOLDER", help="the --out of a stage"
    )
    parser.add_argument(
        "--eval",
        nargs="+",
        type=Path,
        default=[],
        metavar="FILE",
        help="results that eval.py --out wrote",
    )
    parser.add_argument(
        "--out", type=Path, default=Path("report.html"), help="the page (default: report.html)"
    )
    parser.add_argument(
        "--mean", action="store_true", help="draw runs that differ in their seed as their mean"
    )
    parser.add_argument(
        "--groups",
        type=int,
        default=GROUPS,
        metavar="N",
        help=f"groups of rollouts of each run, at most (default: {GROUPS})",
    )
    args = parser.parse_args()
    runs = []
    for folder, name in zip(args.runs, short_names(args.runs), strict=True):
        runs += read_runs(folder, name)
    text = page(runs, read_results(args.eval), args.mean, args.groups)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(text, encoding="utf-8", errors="replace")
    print(f"{args.out}: {args.out.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
