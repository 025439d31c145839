"""
One HTML page of runs, to be looked at anywhere: results with errors, health of the game, curves, a browser of rollouts.

    python tools/report.py out/sft out/align out/align-grpo --eval out/eval.json --out report.html

Reads of each run folder log.jsonl, warmup/log.jsonl and rollouts.jsonl; needs nothing but Python. The page loads nothing: no
network, no fonts, no libraries. Curves are means over at most POINTS stretches of steps, and of the groups in
rollouts.jsonl at most GROUPS of a run are taken, evenly over the steps; the page says so. NaN is a gap in a curve. A last
line that a kill cut short is left out; whatever else cannot be read ends in an error that names file and line.
"""

import argparse
import json
import math
import re
from collections import Counter
from html import escape
from pathlib import Path

POINTS, GROUPS, LATE = 240, 40, 10  # LATE: steps that a light's figure is the mean of
CHARTS = {  # of each stage; */ stands for perception/ and reasoning/
    "sft": "loss grad_norm lr",
    "warm-up": "*/acc */held_out */margin loss",
    "align": "*/acc */margin */saturated */group_std */length_corr */leak accuracy format length entropy disc_loss grad_norm",
    "rlvr": "reward accuracy format length entropy informative truncated grad_norm",
}
GLOSS = {
    "loss": "of the stage",
    "grad_norm": "before clipping",
    "lr": "learning rate",
    "acc": "pairs ordered rightly",
    "held_out": "pairs never trained on",
    "margin": "reference − rollout",
    "saturated": "pairs with σ(margin) > 0.99",
    "group_std": "of scores in a group",
    "length_corr": "score against length",
    "leak": "probe of the last token",
    "accuracy": "the verifier's",
    "format": "well-formed",
    "length": "tokens per rollout",
    "entropy": "nats per token",
    "disc_loss": "Bradley-Terry",
    "reward": "0.8 accuracy + 0.2 format",
    "informative": "groups with mixed rewards",
    "truncated": "cut at --max_response",
}


def late(values):
    return sum(values[-LATE:]) / len(values[-LATE:])


def change(values):  # from the first steps to the last
    n = min(LATE, max(1, len(values) // 2))
    return late(values[-n:]) - late(values[:n])


LIGHTS = [  # stages, name, metrics, figure, what is bad about it (small is good), green up to, amber up to, meaning, mend
    (
        "warm-up",
        "Warmed up",
        "*/held_out",
        late,
        lambda v: 0.9 - v,
        0,
        0.2,
        "The discriminator must tell pairs it never saw apart before its scores mean anything.",
        "Raise --warmup_steps or --warmup_lr, or look at the references.",
    ),
    (
        "warm-up align",
        "Leak probe",
        "*/leak",
        late,
        lambda v: abs(v - 0.5),
        0.05,
        0.1,
        "A probe that sees only the token where the score is read should guess, 0.5.",
        "The two sides' spans end differently: make both by encode_spans.",
    ),
    (
        "align",
        "Saturated pairs",
        "*/saturated",
        late,
        abs,
        0.5,
        0.9,
        "Where σ(margin) > 0.99 the discriminator has won and learns no more.",
        "Lower --disc_lr, shorten its warm-up, or raise --score_l2 and --lr.",
    ),
    (
        "align",
        "Flat groups",
        "*/flat_groups",
        late,
        abs,
        0.05,
        0.2,
        "Groups with almost equal scores: divided by their std, noise becomes advantage.",
        "Set --std_floor near the usual group_std, or raise --group_size.",
    ),
    (
        "align",
        "Score and length",
        "*/length_corr",
        late,
        abs,
        0.5,
        0.8,
        "Within groups, scores should follow content, not length.",
        "Compare references' and rollouts' lengths; read rollouts of both ends below.",
    ),
    (
        "align rlvr",
        "Canary: format",
        "format",
        late,
        lambda v: 1 - v,
        0.1,
        0.3,
        "Share of rollouts with the three parts.",
        "Lower --lr, in alignment raise --malformed_penalty; read the malformed ones below.",
    ),
    (
        "align",
        "Canary: accuracy",
        "accuracy",
        change,
        lambda v: -v,
        0.05,
        0.15,
        "Change since the first steps; the verifier is not trained on in this stage.",
        "Some cost is usual before stage 3; a collapse is not: fewer --steps or a lower --lr.",
    ),
    (
        "align rlvr",
        "Cut rollouts",
        "truncated",
        late,
        abs,
        0.05,
        0.2,
        "Rollouts that hit the limit of tokens.",
        "Raise --max_response, or see below whether they repeat themselves.",
    ),
    (
        "rlvr",
        "Informative groups",
        "informative",
        late,
        lambda v: 0.3 - v,
        0,
        0.2,
        "Groups whose rewards differ: only they teach.",
        "Filter the prompts by pass rate (eval.py --filter), or use --algo dapo.",
    ),
    (
        "sft align rlvr",
        "Skipped updates",
        "skipped disc_skipped",
        sum,
        abs,
        0,
        2,
        "Updates left out for a loss or gradient that was not finite.",
        "Lower --lr (--disc_lr); three in a row stop the run.",
    ),
]


# ----------------------------------------------------------------------------- what the runs left
def read_lines(path):
    """Records of a JSONL file. SystemExit names a broken line; the last one may have been cut short: it is left out."""
    records, lines = [], path.read_text(encoding="utf-8").split("\n")
    for n, line in enumerate(lines, 1):
        try:
            records += [dict(json.loads(line))] if line.strip() else []
        except (ValueError, TypeError) as error:
            if n < len(lines):
                raise SystemExit(
                    f"{path}:{n}: not a JSON object ({error}). Mend the line or take it out."
                ) from None
            print(f"{path}:{n}: left out, cut short while it was written")
    return records


def read_run(folder, name):
    """The logs of a run folder, its warm-up's first: {"name", "stage", "header", "steps", "groups"} each."""
    found = []
    for path, more in ((folder / "warmup/log.jsonl", " warm-up"), (folder / "log.jsonl", "")):
        if path.is_file():
            records = read_lines(path)
            header = next((r for r in records if "args" in r), {"args": {}})
            kind = (
                "rlvr"
                if "algo" in header["args"]
                else "align"
                if "disc" in header["args"]
                else "sft"
            )
            rollouts = path.with_name("rollouts.jsonl")
            groups = read_lines(rollouts) if rollouts.is_file() else []
            found.append(
                {
                    "name": name + more,
                    "stage": "warm-up" if more else kind,
                    "header": header,
                    "groups": groups,
                    "steps": [r for r in records if "step" in r],
                }
            )
    if not found:
        raise SystemExit(
            f"{folder}: no log.jsonl there: name run folders, the --out of sft.py, align.py or rlvr.py"
        )
    return found


def names(paths):
    """Short names: the last part of each path, the whole path where that names two."""
    short = [
        Path(p).parent.name if Path(p).name == "last" else Path(p).name for p in map(str, paths)
    ]
    return [
        s if s and Counter(short)[s] == 1 else str(p) for s, p in zip(short, paths, strict=True)
    ]


def metrics(keys):
    return [
        k.replace("*", kind)
        for k in keys.split()
        for kind in ("perception", "reasoning")[: 1 + ("*" in k)]
    ]


def measured(run, key):
    return [
        r[key]
        for r in run["steps"]
        if isinstance(r.get(key), int | float) and math.isfinite(r[key])
    ]


def points(run, key, most=POINTS):
    """[step, value] of a metric, where it was logged: means over stretches of steps, None where all of one are NaN."""
    logged = [(r["step"], r[key]) for r in run["steps"] if isinstance(r.get(key), int | float)]
    size, thinned = max(1, math.ceil(len(logged) / most)), []
    for part in (logged[i : i + size] for i in range(0, len(logged), size)):
        values = [v for _, v in part if math.isfinite(v)]
        thinned.append([part[-1][0], float(f"{sum(values) / len(values):.4g}") if values else None])
    return thinned


def charts(runs):
    """[{"stage", "title", "gloss", "series": [{"label", "colour", "points"}]}], runs of one stage in one chart."""
    found = []
    for stage, wanted in CHARTS.items():
        mine = [run for run in runs if run["stage"] == stage]
        for title in wanted.split():
            series = []
            for run in mine:
                for key in metrics(title):
                    label = " ".join(
                        [run["name"]] * (len(mine) > 1)
                        + [key.split("/")[0]] * (len(mine) == 1 or "/" in key)
                    )
                    series.append(
                        {"label": label, "colour": len(series), "points": points(run, key)}
                    )
            series = [s for s in series if any(v is not None for _, v in s["points"])]
            title = title.removeprefix("*/")
            if series:
                found.append(
                    {"stage": stage, "title": title, "gloss": GLOSS[title], "series": series}
                )
    return found


def lights(run):
    """[(colour, name, figures, meaning, mend)] of a run: the worst of a light's metrics decides; no data is grey."""
    found = []
    for stages, name, keys, figure, bad, green, amber, meaning, mend in LIGHTS:
        if run["stage"] in stages.split():
            values = {key: figure(v) for key in metrics(keys) if (v := measured(run, key))}
            worst = max((bad(v) + 0.0 for v in values.values()), default=math.nan)
            colour = (
                "grey"
                if not values
                else "green"
                if worst <= green
                else "amber"
                if worst <= amber
                else "red"
            )
            shown = [
                (f"{k.split('/')[0]} " if "/" in k or len(values) > 1 else "") + f"{v:.3g}"
                for k, v in values.items()
            ]
            found.append((colour, name, ", ".join(shown) or "not measured", meaning, mend))
    return found


def read_results(paths):
    """The results of eval.py's files, each with `label`: the policy's name, with the file's where it is in several."""
    found, needed = [], ("policy", "data", "mode", "prompts", "accuracy")
    for path in paths:
        try:
            results = json.loads(path.read_text(encoding="utf-8"))["results"]
            found += [{k: r[k] for k in needed} | r | {"file": str(path)} for r in results]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise SystemExit(
                f"{path}: not a file of results, as eval.py --out writes it ({error!r})"
            ) from None
    policies = list(dict.fromkeys(r["policy"] for r in found))
    label, files = (
        dict(zip(policies, names(policies), strict=True)),
        {(r["policy"], r["file"]) for r in found},
    )
    several = {p for p, n in Counter(p for p, _ in files).items() if n > 1}
    return [
        r | {"label": label[r["policy"]] + (f" ({r['file']})" if r["policy"] in several else "")}
        for r in found
    ]


# ----------------------------------------------------------------------------- the page
def table(caption, head, rows):
    """An HTML table; the first cell of each row heads it. Cells: any text, a float, or (percentage, its standard error)."""

    def cell(x):
        if isinstance(x, tuple):
            return f"{x[0]:.1f} <small>± {x[1]:.1f}</small>"
        return escape(f"{x:.3f}" if isinstance(x, float) else str(x))

    head = "".join(f'<th scope="col">{escape(h)}</th>' for h in head)
    rows = (
        f'<tr><th scope="row">{cell(x)}</th>{"".join(f"<td>{cell(y)}</td>" for y in more)}</tr>'
        for x, *more in rows
    )
    return (
        f'<p class="dim">{escape(caption)}</p><div class="wide" tabindex="0" role="region" aria-label="{escape(caption)}">'
        f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table></div>"
    )


def results_section(results):
    """Accuracy of each policy on each file in each mode; below, folded, whatever else eval.py has measured."""
    if not results:
        return ""
    columns = list(dict.fromkeys((Path(r["data"]).stem, r["mode"]) for r in results))
    rows = {r["label"]: {} for r in results}
    for r in results:  # samples of one prompt are not independent: the error counts prompts
        p, n = r["accuracy"], r["prompts"]
        known = isinstance(p, float | int) and math.isfinite(p) and n
        rows[r["label"]][Path(r["data"]).stem, r["mode"]] = (
            (100 * p, 100 * math.sqrt(p * (1 - p) / n)) if known else "no data"
        )
    title = "Accuracy in %, with its binomial standard error over the prompts"
    main = table(
        title,
        ["policy", *map(", ".join, columns)],
        [[k, *(v.get(c, "–") for c in columns)] for k, v in rows.items()],
    )
    keys = [
        k
        for k in dict.fromkeys(k for r in results for k in r)
        if k not in ("label", "policy", "file", "left_out")
    ]
    more = table(
        "All figures",
        ["policy", *keys],
        [[r["label"], *(r.get(k, "–") for k in keys)] for r in results],
    )
    return f'<section id="results"><h2>Results</h2>{main}<details><summary>All figures</summary>{more}</details></section>'


def health_section(runs):
    """The lights of each run, with what they mean and what to do."""
    blocks, word = [], {"green": "healthy", "amber": "watch", "red": "act", "grey": "no data"}
    for run in runs:
        blocks.append(f'<h3>{escape(run["name"])}</h3><ul class="lights">')
        for colour, name, shown, means, mend in lights(run):
            mend = re.sub(r"(--\w+)", r'<span class="flag">\1</span>', escape(mend))
            blocks.append(
                f'<li class="{colour}"><b>{name} <i>● {word[colour]}</i></b><br><small>{escape(shown)}</small>'
                f'<p>{escape(means)} <span class="mend">{mend}</span></p></li>'
            )
        blocks.append("</ul>")
    figures = f'<p class="dim">Means of the last {LATE} steps that have the figure; skipped updates: all.</p>'
    return f'<section id="health"><h2>Health</h2>{figures}{"".join(blocks)}</section>'


def page(runs, results):
    """The whole page, from report.html beside this file."""
    rows = []
    for run in runs:
        hardware, seconds = run["header"].get("hardware", {}), sum(measured(run, "seconds"))
        device = hardware.get("gpu") or f"{hardware.get('cores', '?')} CPU cores"
        rows.append(
            [
                run["name"],
                run["stage"],
                len(run["steps"]),
                f"{seconds / 60:.1f}",
                f"{hardware.get('ranks', '?')} × {device}",
                run["header"].get("commit", "?")[:10],
            ]
        )
    groups = []
    for run in runs:
        have = run["groups"]
        kept = [
            have[i * len(have) // min(GROUPS, len(have))] for i in range(min(GROUPS, len(have)))
        ]
        groups += [{**group, "run": run["name"]} for group in kept]
    data = json.dumps(
        {"charts": charts(runs), "groups": groups}, separators=(",", ":"), allow_nan=False
    )
    longest = max(len(run["steps"]) for run in runs)
    thinned = (
        f"Each point is the mean of up to {math.ceil(longest / POINTS)} steps."
        if longest > POINTS
        else ""
    )
    left = sum(len(run["groups"]) for run in runs) - len(groups)
    pieces = {
        "results": results_section(results),
        "health": health_section(runs),
        "thinned": thinned,
        "left": f"{left} more groups are in the runs' rollouts.jsonl." if left else "",
        "runs": table("What ran", ["run", "stage", "steps", "minutes", "on", "commit"], rows),
        "data": data.replace("<", "\\u003c"),  # no text of a rollout can end the script element
    }
    template = Path(__file__).with_name("report.html").read_text(encoding="utf-8")
    return re.sub(r"\{\{(\w+)\}\}", lambda slot: pieces[slot[1]], template)


def main():
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form)
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
    args = parser.parse_args()
    runs = [
        run
        for folder, name in zip(args.runs, names(args.runs), strict=True)
        for run in read_run(folder, name)
    ]
    text = page(runs, read_results(args.eval))
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(text, encoding="utf-8", errors="replace")
    print(f"{args.out}: {args.out.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
