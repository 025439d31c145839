"""
Draw the figures of the comparison of arms, over seeds, as SVG files.

    python tools/figures.py out/tiny-* --out docs/figures/tiny
    python tools/figures.py out/tiny-* --out docs/figures/tiny --arms sft sft-grpo align align-grpo

Each argument is a seed's folder, with a folder per arm in it, as runs/miniature.sh leaves them: its
log.jsonl, and the eval.json that eval.py wrote. An arm is there when it has its eval.json, which is
made last. What ends in .log is passed over. Into the folder --out go

    accuracy.svg   greedy accuracy of each arm on each test
    gap.svg        alignment's reward gap (the references' mean score less the rollouts') of each
                   span, and the share of pairs that the discriminator orders rightly
    drift.svg      items per caption and steps of reasoning of each arm, as a multiple of the
                   references', on the test `hard`, sampled at temperature 1 (else greedy)
    tokens.svg     accuracy of RLVR's rollouts against updates, and against generated tokens, both
                   counted from the SFT policy on, through all stages that led there; tokens as
                   tools/budget.py counts them, those of alignment's warm-up estimated; a line
                   goes as far as all seeds do

Of several seeds each figure shows the mean and its 95 % interval (Student's t over the seeds). An
arm that only some of the seeds have is an error: --arms says which to draw. Where a figure lacks a
number of an arm (it is null: nothing was measured), the arm is left out of it, and a figure of
which there is nothing to draw is left out too; a line says so. The figures that an earlier command
left in --out go. The same runs give the same bytes (with the same matplotlib, the extra `plot`).
"""

import argparse
import math
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from itertools import accumulate
from pathlib import Path
from statistics import mean
from textwrap import fill

try:
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D
except ImportError:
    matplotlib = None  # main says what to do; what is drawn can be computed without it

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from tools.budget import tokens_per_update, warmup_tokens  # noqa: E402
from tools.compare import (  # noqa: E402
    NotMeasured,
    Result,
    name_of,
    names_in,
    number,
    read_seeds,
    without_logs,
)
from tools.report import half_interval, points, read_run, span_names, stage_of  # noqa: E402

START = "sft"  # the arm that all others begin with
ALIGNMENT = "align"  # the arm whose game is drawn
SMOOTHING = 10  # updates that a point of tokens.svg is the mean of
POINTS = 45  # of a curve, at most
DRIFT_TEST = "hard"
DRIFT_MODES = ("T=1", "greedy")  # the first that there is

TEST_NAMES = {
    "id": "id: as in SFT's data",
    "hard": "hard: as in GRPO's data",
    "ood": "ood: more objects",
}
# Colours that the colour-blind can tell apart (Okabe and Ito's): light before GRPO, dark after it.
ARM_COLOURS = {
    "sft": "#999999",
    "sft-grpo": "#333333",
    "sft-grpo-tokens": "#CC79A7",
    "align": "#E69F00",
    "align-grpo": "#D55E00",
    "refs": "#56B4E9",
    "refs-grpo": "#0072B2",
    "refs-align": "#77CDB0",
    "refs-align-grpo": "#009E73",
}
# Of arms of other names, again and again (Paul Tol's "muted")
OTHER_COLOURS = ("#332288", "#CC6677", "#117733", "#DDCC77", "#882255", "#88CCEE", "#44AA99")
SPAN_STYLES = {  # colour and dashes: none of the arms' colours
    "perception": ("#AA4499", "-"),
    "reasoning": ("#222222", "--"),
    "whole": ("#222222", "-"),
}
STYLE = {
    "font.size": 9.5,
    "font.sans-serif": ["DejaVu Sans", "Verdana", "Arial"],  # of the reader: the first there is
    "axes.titlesize": 10,
    "figure.titlesize": 11,
    "xtick.labelsize": 9,
    "ytick.labelsize": 9.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#E4E4E4",
    "legend.frameon": False,
    "svg.fonttype": "none",  # text stays text
    "svg.hashsalt": "prism",  # names of clipping paths are the same in each run
}
MOST_PERCENT = 102  # that is shown: an interval may reach further, no share does
LABEL = 26  # characters in a line of a row's label
WIDTH = 8.6  # inches: about as wide as a page of GitHub


# ----------------------------------------------------------------------------- what is compared
@dataclass(frozen=True)
class Comparison:
    seeds: list[Path]  # folders
    arms: list[str]  # that each of them has, in the order of compare.ARMS
    results: list[dict[tuple, Result]]  # of each seed, by (arm, test, mode)


def comparison_of(folders, asked=()):
    """Return the Comparison of the seeds' folders. asked: the arms to draw; empty: all. Raises
    ValueError for what is no folder, and as compare.read_seeds does."""
    seeds = [Path(folder) for folder in without_logs(folders)]
    for seed in seeds:
        if not seed.is_dir():
            raise ValueError(f"{seed}: not a folder; name seeds' folders, such as out/tiny-0")
    results = read_seeds(seeds, asked)
    return Comparison(seeds, names_in(results[0], 0), results)


def unfinished(seeds):
    """Return the runs' folders that have a log, but no eval.json yet."""
    logs = [log for seed in seeds for log in sorted(seed.glob("*/log.jsonl"))]
    return [log.parent for log in logs if not (log.parent / "eval.json").is_file()]


@cache
def run_of(seed, arm):
    """Return report.py's Run of an arm. Raises ValueError where its log is missing or headless."""
    folder = seed / arm
    if not (folder / "log.jsonl").is_file():
        raise ValueError(f"{folder}: no log.jsonl there, which the curves need")
    run = read_run(folder, arm)
    if not run.header["args"]:
        raise ValueError(f"{folder}/log.jsonl: no line of it has the run's arguments")
    return run


# ----------------------------------------------------------------------------- figures in numbers
# Each figure's numbers come with a list of what is left out of it, a line for each.
@dataclass(frozen=True)
class Estimate:
    """One number over the seeds."""

    of_seeds: list[float]
    mean: float
    half: float | None  # of the 95 % interval; None of a single seed


def estimate(of_seeds):
    return Estimate(of_seeds, mean(of_seeds), half_interval(of_seeds))


def accuracies(comparison):
    """Return ({test: {arm: Estimate of greedy accuracy in %}}, what is left out)."""
    panels = {}
    left_out = []
    for key in comparison.results[0]:
        arm, test, mode = key
        if mode != "greedy":
            continue
        try:
            of_seeds = [100 * results[key].value("accuracy") for results in comparison.results]
        except NotMeasured as error:
            left_out.append(f"{arm} on {test}: {error}")
            continue
        panels.setdefault(test, {})[arm] = estimate(of_seeds)
    return panels, left_out


def drift(comparison):
    """Return ({"items": {arm: Estimate}, "steps": ..}, what is left out), the estimates as a
    multiple of the references' in the same evaluation, on DRIFT_TEST; {} where that is not among
    the tests."""
    mode = drift_mode(comparison)
    if mode is None:
        return {}, []
    panels = {"items": {}, "steps": {}}
    left_out = []
    for arm in comparison.arms:
        key = (arm, DRIFT_TEST, mode)
        if key not in comparison.results[0]:
            left_out.append(f"{arm}: there is no result of {' '.join(key)}")
            continue
        for metric, panel in panels.items():
            try:
                of_seeds = [multiple(results[key], metric) for results in comparison.results]
            except NotMeasured as error:
                left_out.append(f"{metric} of {arm}: {error}")
                continue
            panel[arm] = estimate(of_seeds)
    return (panels if any(panels.values()) else {}), left_out


def multiple(result, metric):
    """Return a metric of a Result as a multiple of the references'. Raises NotMeasured."""
    ours = result.value(metric)
    theirs = result.value(f"reference_{metric}")
    if theirs == 0:
        raise NotMeasured(f"{result.file}: reference_{metric} is 0, of which there is no multiple")
    return ours / theirs


def drift_mode(comparison):
    """Return the mode of DRIFT_MODES that drift is measured in; None where there is none."""
    known = {mode for _, test, mode in comparison.results[0] if test == DRIFT_TEST}
    return next((mode for mode in DRIFT_MODES if mode in known), None)


@dataclass(frozen=True)
class Curve:
    """A mean over the seeds along x; low and high, its 95 % interval, are empty of one seed. NaN is
    where nothing was measured."""

    x: list[float]
    mean: list[float]
    low: list[float]
    high: list[float]


def reward_gaps(comparison):
    """Return ({"margin": {span: Curve over the steps}, "acc": ..} of the alignment, what is left
    out); {} where it is not among the arms. What is null is a gap in a curve."""
    if ALIGNMENT not in comparison.arms:
        return {}, []
    runs = [run_of(seed, ALIGNMENT) for seed in comparison.seeds]
    panels = {}
    for metric in ("margin", "acc"):
        panels[metric] = {}
        for span in span_names(runs[0]):
            panels[metric][span] = curve_of_steps(runs, f"{span}/{metric}")
    return panels, []


def curve_of_steps(runs, key):
    """Return the Curve of a metric that the runs logged."""
    middle, band = points(runs, key, POINTS)
    intervals = {step: (low, high) for step, low, high in band}
    missing = (math.nan, math.nan)
    x = []
    means = []
    low = []
    high = []
    for step, value in middle:
        x.append(step)
        means.append(math.nan if value is None else value)
        if len(runs) > 1:
            ends = intervals.get(step, missing)
            low.append(ends[0])
            high.append(ends[1])
    return Curve(x, means, low, high)


def chain_of(seed, arm):
    """
    Return the arms whose runs lead from the SFT policy to an arm, in their order: ["align",
    "align-grpo"]. Each run's log says what it began with. None where the arm goes back to something
    else, such as the base model. Raises ValueError where a run's log is missing.
    """
    chain = []
    while arm != START:
        if arm in chain:
            raise ValueError(f"{seed}: {' and '.join(chain)} began with each other")
        chain.insert(0, arm)
        policy = run_of(seed, arm).header["args"].get("policy")
        if not isinstance(policy, str):
            raise ValueError(f"{seed / arm}/log.jsonl: its arguments have no policy")
        began_with = Path(policy)
        if began_with.name == "last":
            began_with = began_with.parent
        if not (seed / began_with.name / "log.jsonl").is_file():
            if began_with.parent.name != seed.name:
                return None
            raise ValueError(
                f"{seed / arm} began with {began_with}, of which {seed} has no log.jsonl: what led "
                f"there cannot be counted; --arms leaves {chain[-1]} out"
            )
        arm = began_with.name
    return chain


def updates_of(run):
    """Return the log's records of the updates 1, 2, .. in their order. Raises ValueError where some
    are missing: sums would be too small."""
    by_step = {record["step"]: record for record in run.steps if record["step"] > 0}
    steps = sorted(by_step)
    if not steps or steps != list(range(1, len(steps) + 1)):
        raise ValueError(f"{run.folder}/log.jsonl: the updates in it are not 1, 2, 3 ..")
    return [by_step[step] for step in steps]


def logged(run, record, name):
    """Return a metric of an update. Raises NotMeasured where it is null, ValueError where there is
    none."""
    return number(record, name, f"{run.folder}/log.jsonl, step {record['step']}")


def generated_tokens(run):
    """Return how many tokens the policy generated for each of the run's updates; SFT generates
    none."""
    records = updates_of(run)
    if stage_of(run.header["args"]) == "sft":
        return [0] * len(records)
    for record in records:
        logged(run, record, "length")
    return tokens_per_update(run.folder)


def smoothed(values):
    """Return the mean of each value and those before it, SMOOTHING in all, fewer at the start."""
    return [mean(values[max(0, i + 1 - SMOOTHING) : i + 1]) for i in range(len(values))]


@dataclass(frozen=True)
class Training:
    """The last stage of a chain in one seed, update by update."""

    updates: list[int]  # of the policy since SFT, those of the stages before included
    tokens: list[float]  # generated since SFT, those of the stages before included
    accuracy: list[float]  # of this stage's rollouts, in %, smoothed


def training_of(seed, arm):
    """Return the Training of an arm that ends in RLVR."""
    updates = 0
    tokens = 0
    *before, last = [run_of(seed, name) for name in chain_of(seed, arm)]
    for run in before:
        updates += len(updates_of(run))
        tokens += sum(generated_tokens(run)) + warmup_tokens(run.folder)
    records = updates_of(last)
    in_percent = [100 * logged(last, record, "accuracy") for record in records]
    sums = list(accumulate(generated_tokens(last), initial=tokens))
    since_sft = [updates + record["step"] for record in records]
    return Training(since_sft, sums[1:], smoothed(in_percent))


def arms_of_rlvr(comparison):
    """Return (arms that end in RLVR and began with SFT, those that end in it and did not)."""
    since_sft = []
    others = []
    for arm in comparison.arms:
        logs = [seed / arm / "log.jsonl" for seed in comparison.seeds]
        if arm == START or not any(log.is_file() for log in logs):
            continue
        if stage_of(run_of(comparison.seeds[0], arm).header["args"]) != "rlvr":
            continue
        if all(chain_of(seed, arm) for seed in comparison.seeds):
            since_sft.append(arm)
        else:
            others.append(arm)
    return since_sft, others


def training_curves(comparison):
    """
    Return ({"updates": {arm: Curve of accuracy in %}, "tokens": ..}, what is left out) of the arms
    that end in RLVR and began with SFT; {} where there is none. Along tokens a point has the seeds'
    mean number.
    """
    since_sft, others = arms_of_rlvr(comparison)
    left_out = [f"{arm}, which did not begin with {START}" for arm in others]
    panels = {"updates": {}, "tokens": {}}
    for arm in since_sft:
        try:
            trainings = [training_of(seed, arm) for seed in comparison.seeds]
        except NotMeasured as error:
            left_out.append(f"{arm}: {error}")
            continue
        first = trainings[0].updates[0]
        for seed, training in zip(comparison.seeds, trainings, strict=True):
            if training.updates[0] != first:
                raise ValueError(
                    f"{seed / arm} begins {training.updates[0] - 1} updates behind SFT, in "
                    f"{comparison.seeds[0]} it is {first - 1}: they have no mean"
                )
        panels["updates"][arm] = curve_of_seeds(trainings, "updates")
        panels["tokens"][arm] = curve_of_seeds(trainings, "tokens")
    return (panels if panels["updates"] else {}), left_out


def curve_of_seeds(trainings, along):
    """Return the Curve of accuracy as far as all seeds go, at most POINTS points of it, the last
    among them."""
    count = min(len(training.updates) for training in trainings)
    stride = math.ceil(count / POINTS)
    curve = Curve([], [], [], [])
    for i in range((count - 1) % stride, count, stride):
        of_seeds = [training.accuracy[i] for training in trainings]
        point = estimate(of_seeds)
        curve.x.append(mean(getattr(training, along)[i] for training in trainings))
        curve.mean.append(point.mean)
        if point.half is not None:
            curve.low.append(point.mean - point.half)
            curve.high.append(point.mean + point.half)
    return curve


# ----------------------------------------------------------------------------- drawing
def label_of(arm):
    """Return an arm's name in lines of at most LABEL characters, none of which ends in an arrow."""
    tied = name_of(arm).replace("→ ", "→\N{NO-BREAK SPACE}")
    return fill(tied, LABEL).replace("\N{NO-BREAK SPACE}", " ")


def colours_of(arms):
    """Return {arm: colour}: an arm of ARM_COLOURS has the same one in all figures of all runs."""
    others = [arm for arm in arms if arm not in ARM_COLOURS]
    colours = dict(ARM_COLOURS)
    for i, arm in enumerate(others):
        colours[arm] = OTHER_COLOURS[i % len(OTHER_COLOURS)]
    return colours


def seeds_text(comparison):
    count = len(comparison.seeds)
    if count == 1:
        return "one seed"
    return f"mean of {count} seeds with its 95 % interval"


def dots_text(comparison):
    """Return what a title says of draw_rows' small dots."""
    return " (small dots: the seeds)" if len(comparison.seeds) > 1 else ""


def new_figure(title, panels, height, share=None):
    """Return a Figure and its axes, `panels` beside each other. share: "y" where they have one
    vertical axis."""
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    figure.suptitle(title)
    axes = figure.subplots(1, panels, sharey=share == "y", squeeze=False)[0]
    return figure, list(axes)


def draw_accuracy(comparison, panels):
    """Return the Figure of accuracies(): a panel per test, a row per arm."""
    title = f"Greedy accuracy of each arm: {seeds_text(comparison)}{dots_text(comparison)}"
    arms = arms_drawn(comparison, panels)
    figure, axes = new_figure(title, len(panels), rows_height(arms), share="y")
    for ax, (test, estimates) in zip(axes, panels.items(), strict=True):
        draw_rows(ax, arms, colours_of(comparison.arms), estimates)
        ax.set_title(TEST_NAMES.get(test, test))
        ax.set_xlabel("%")
        ax.margins(x=0.08)
        ax.set_xlim(right=min(ax.get_xlim()[1], MOST_PERCENT))
    return figure


def draw_drift(comparison, panels):
    """Return the Figure of drift(): a panel for the caption and one for the reasoning."""
    mode = drift_mode(comparison)
    how = "greedy" if mode == "greedy" else "sampled at temperature 1"
    title = f"How much is written, beside the references (test {DRIFT_TEST}, {how}):\n"
    title += seeds_text(comparison) + dots_text(comparison)
    arms = arms_drawn(comparison, panels)
    figure, axes = new_figure(title, len(panels), rows_height(arms) + 0.2, share="y")
    titles = {"items": "items per caption", "steps": "steps per reasoning"}
    for ax, (metric, estimates) in zip(axes, panels.items(), strict=True):
        ax.axvline(1, color="#222222", linewidth=1, linestyle=":")
        draw_rows(ax, arms, colours_of(comparison.arms), estimates)
        ax.set_title(titles[metric])
        ax.set_xlabel("1 (dotted): as many as the references")
        ax.set_xlim(left=0)
    return figure


def arms_drawn(comparison, panels):
    """Return the arms that any of the panels {name: {arm: Estimate}} has, in their order."""
    return [arm for arm in comparison.arms if any(arm in panel for panel in panels.values())]


def rows_height(arms):
    """Return the height in inches of a figure with a row per arm."""
    return 1.1 + 0.36 * len(arms)


def draw_rows(ax, arms, colours, estimates):
    """Draw estimates {arm: Estimate} as a row per arm: the mean with its interval, and below it a
    small dot per seed. An arm that another panel alone has leaves its row empty."""
    for row, arm in enumerate(arms):
        if arm not in estimates:
            continue
        draw_estimate(ax, row, estimates[arm], colours[arm], below=0.27)
    ax.set_yticks(range(len(arms)), [label_of(arm) for arm in arms])
    ax.set_ylim(len(arms) - 0.4, -0.6)  # the first arm on top
    ax.tick_params(axis="y", length=0)


def draw_estimate(ax, height, found, colour, below):
    """Draw an Estimate: the mean with its interval, and so much below it a small dot per seed."""
    if found.half is not None:
        ends = (found.mean - found.half, found.mean + found.half)
        ax.plot(ends, (height, height), color=colour, linewidth=1.8)
        heights = [height + below] * len(found.of_seeds)
        ax.plot(found.of_seeds, heights, ".", color=colour, markersize=3.5)
    ax.plot(found.mean, height, "o", color=colour, markersize=5.5)


def draw_gap(comparison, panels):
    """Return the Figure of reward_gaps(): the margin, and beside it the pair accuracy."""
    title = f"Alignment, seen by its discriminator: {seeds_text(comparison)}"
    figure, axes = new_figure(title, 2, 3.4)
    titles = {
        "margin": "reward gap: references' score − rollouts'",
        "acc": "pairs ordered rightly",
    }
    baselines = {"margin": 0, "acc": 50}  # no difference; a coin's
    scales = {"margin": 1, "acc": 100}
    for ax, (metric, curves) in zip(axes, panels.items(), strict=True):
        ax.axhline(baselines[metric], color="#222222", linewidth=1, linestyle=":")
        for span, curve in curves.items():
            colour, dashes = SPAN_STYLES.get(span, ("#332288", "-."))
            draw_curve(ax, curve, colour, dashes, scales[metric])
        ax.set_title(titles[metric])
        ax.set_xlabel("alignment step")
    axes[0].set_ylabel("score (dotted: no difference)")
    axes[1].set_ylabel("% (dotted: guessing)")
    axes[1].set_ylim(top=min(axes[1].get_ylim()[1], MOST_PERCENT))
    names = []
    lines = []
    for span in panels["margin"]:
        colour, dashes = SPAN_STYLES.get(span, ("#332288", "-."))
        names.append(f"{span} span")
        lines.append(Line2D([], [], color=colour, linestyle=dashes))
    figure.legend(lines, names, loc="outside lower center", ncols=len(names))
    return figure


def draw_tokens(comparison, panels):
    """Return the Figure of training_curves(): against updates, and against tokens."""
    title = f"Accuracy of RLVR's rollouts on its training prompts: {seeds_text(comparison)}\n"
    title += (
        f"(each point: the mean of the last {SMOOTHING} updates; a line begins where RLVR does)"
    )
    figure, axes = new_figure(title, 2, 4.1, share="y")
    arms = list(panels["updates"])
    labels = {
        "updates": "updates of the policy since SFT",
        "tokens": "tokens generated since SFT, in millions",
    }
    if any(warmed_up(comparison, arm) for arm in arms):
        labels["tokens"] += "\n(of the discriminator's warm-up: estimated)"
    scales = {"updates": 1, "tokens": 1e-6}
    colours = colours_of(comparison.arms)
    for ax, (along, curves) in zip(axes, panels.items(), strict=True):
        # the first on top: sft-grpo-tokens goes on from where sft-grpo ended
        for arm, curve in reversed(curves.items()):
            x = [scales[along] * value for value in curve.x]
            draw_curve(ax, Curve(x, curve.mean, curve.low, curve.high), colours[arm])
        ax.set_xlabel(labels[along])
        ax.set_xlim(left=0)
    axes[0].set_ylabel("accuracy, %")
    axes[0].set_ylim(top=min(axes[0].get_ylim()[1], MOST_PERCENT))
    lines = [Line2D([], [], color=colours[arm], linewidth=2) for arm in arms]
    names = [name_of(arm) for arm in arms]
    figure.legend(lines, names, loc="outside lower center", ncols=2)
    return figure


def warmed_up(comparison, arm):
    """Return whether a discriminator was warmed up on the way to an arm."""
    chain = chain_of(comparison.seeds[0], arm)
    return any((comparison.seeds[0] / name / "warmup").is_dir() for name in chain)


def draw_curve(ax, curve, colour, dashes="-", scale=1):
    """Draw a Curve, its interval shaded."""
    if curve.low:
        low = [scale * value for value in curve.low]
        high = [scale * value for value in curve.high]
        ax.fill_between(curve.x, low, high, color=colour, alpha=0.18, linewidth=0)
    middle = [scale * value for value in curve.mean]
    ax.plot(curve.x, middle, color=colour, linestyle=dashes, linewidth=1.6)


@dataclass(frozen=True)
class Drawing:
    """One of the figures."""

    name: str
    compute: Callable  # of a Comparison: ({panel: what is in it}, lines on what is left out)
    draw: Callable  # of a Comparison and that: a Figure
    needs: str  # without which there is nothing


DRAWINGS = (
    Drawing("accuracy", accuracies, draw_accuracy, "greedy results"),
    Drawing("gap", reward_gaps, draw_gap, f"arm {ALIGNMENT}"),
    Drawing("drift", drift, draw_drift, f"results on the test {DRIFT_TEST}"),
    Drawing("tokens", training_curves, draw_tokens, "arm that goes from SFT to RLVR"),
)


def draw_all(comparison, out):
    """Write the figures into the folder `out`, from which earlier ones go, and print a line about
    each, and about what is left out of it."""
    computed = [drawing.compute(comparison) for drawing in DRAWINGS]
    # No error in the runs can come any more: a folder never has figures of two states.
    out.mkdir(parents=True, exist_ok=True)
    paths = [out / f"{drawing.name}.svg" for drawing in DRAWINGS]
    for path in paths:
        path.unlink(missing_ok=True)
    with matplotlib.rc_context():
        matplotlib.rcdefaults()  # not what this machine's matplotlibrc says
        matplotlib.rcParams.update(STYLE)
        for path, drawing, (panels, left_out) in zip(paths, DRAWINGS, computed, strict=True):
            for line in left_out:
                print(f"{path}: without {line}")
            if not panels:
                print(f"{path}: not drawn, there is no {drawing.needs}")
                continue
            figure = drawing.draw(comparison, panels)
            # without the date
            figure.savefig(path, metadata={"Date": None, "Creator": None})
            print(f"{path}: {path.stat().st_size:,} bytes")


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("seeds", nargs="+", help="folders, one per seed, with a folder per arm")
    parser.add_argument("--out", type=Path, required=True, help="folder for the SVG files")
    parser.add_argument("--arms", nargs="+", default=[], help="to draw; by default all")
    args = parser.parse_args()
    if matplotlib is None:
        sys.exit("figures.py: figures need `pip install matplotlib` (the extra `plot`)")
    try:
        comparison = comparison_of(args.seeds, args.arms)
        for folder in unfinished(comparison.seeds):
            print(f"{folder}: left out, it has no eval.json yet")
        draw_all(comparison, args.out)
    except (OSError, ValueError) as error:
        sys.exit(f"figures.py: {error}")


if __name__ == "__main__":
    # `| head` ends this command as it ends others, without a traceback.
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    main()
