"""
Draw two rollouts of one prompt with their spans and scores, as a run of align.py has logged them,
and write the picture as SVG to standard output.

    python docs/draw_rollout.py out/tiny-0/align/rollouts.jsonl --step 11 > docs/rollout.svg

They are the one with the largest and the one with the smallest advantage of the step's group. On
the left stand mean and std of each span's scores in the group, by which the advantage normalises.
"""

import argparse
import json
import sys
import textwrap
from pathlib import Path
from statistics import mean, stdev

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from data import SPANS, split_spans  # noqa: E402

WIDTH = 860
LEFT = 190  # the column of the image
TEXT = 64  # characters of a line
LINE = 18
STYLE = """
  text { font: 12.5px ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; fill: #1f2328 }
  .label { font: 13px system-ui, -apple-system, "Segoe UI", Helvetica, Arial, sans-serif }
  .strong { font-weight: 600 }
  .note { fill: #59636e }
  .page { fill: #ffffff; stroke: #d1d9e0 }
  .span0 { fill: #cfe8f3 } .span1 { fill: #fde3b8 } .span2 { fill: #e2d5f7 }
  image { image-rendering: pixelated }
  @media (prefers-color-scheme: dark) {
    text { fill: #e6edf3 }
    .note { fill: #9198a1 }
    .page { fill: #0d1117; stroke: #3d444d }
    .span0 { fill: #174a5e } .span1 { fill: #634210 } .span2 { fill: #452d70 }
  }
"""


def text(x, y, content, kind="", anchor="start"):
    content = content.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return f'<text x="{x}" y="{y}" text-anchor="{anchor}" class="{kind}">{content}</text>'


def signed(number):
    return f"{number:+.2f}".replace("-", "−")


def moments(rollouts, name):
    """Mean and std of a span's scores in a group, as the advantage normalises them: a malformed
    rollout, which has none, counts as one below the lowest (align.floor_malformed)."""
    scores = [rollout["scores"][name] for rollout in rollouts]
    given = [score for score in scores if score is not None]
    floor = min(given, default=0.0) - 1
    floored = [floor if score is None else score for score in scores]
    return mean(floored), stdev(floored)


def draw_rollout(y, rollout, references):
    """The shapes of one rollout, from `y` on -> (shapes, y below them)."""
    advantage = signed(rollout["advantage"])
    verdict = "right" if rollout["scores"]["accuracy"] else "wrong"
    right = WIDTH - 16
    shapes = [
        text(LEFT, y + 12, f"advantage {advantage}", "label strong"),
        text(
            right, y + 12, f"the answer is {verdict}: logged, not trained on", "label note", "end"
        ),
    ]
    y += 22
    spans = split_spans(rollout["text"])
    names = list(SPANS)
    if spans is None:
        spans = [rollout["text"]]
        names = ["malformed"]
    for number, (name, span) in enumerate(zip(names, spans, strict=True)):
        lines = textwrap.wrap(" ".join(span.split()), TEXT)
        height = LINE * max(2, len(lines)) + 10
        shapes.append(
            f'<rect x="{LEFT}" y="{y}" width="{right - LEFT}" height="{height}" rx="6" '
            f'class="span{number}"/>'
        )
        for i, line in enumerate(lines):
            shapes.append(text(LEFT + 10, y + 19 + i * LINE, line))
        label = name
        if name in SPANS:
            label = f"{name} {signed(rollout['scores'][name])}"
            reference = f"reference {signed(references[name])}"
            shapes.append(text(right - 10, y + 19 + LINE, reference, "label note", "end"))
        shapes.append(text(right - 10, y + 19, label, "label strong", "end"))
        y += height + 5
    return shapes, y + 13


def draw(group):
    """The picture of a group of rollouts.jsonl as SVG."""
    rollouts = sorted(group["rollouts"], key=lambda rollout: rollout["advantage"])
    question = group["question"].replace("<image>", "").strip()
    side = LEFT - 32
    shapes = [
        f'<image x="16" y="16" width="{side}" height="{side}" href="{group["images"][0]}"/>',
        text(16, side + 42, question),
        text(16, side + 62, f"answer: {group['answer']}"),
        text(16, side + 90, f"step {group['step']} of the game:", "label note"),
        text(16, side + 108, f"2 of {len(rollouts)} rollouts", "label note"),
        text(16, side + 136, "the group's scores:", "label note"),
    ]
    below = side + 136
    for name in SPANS:
        below += LINE
        middle, spread = moments(rollouts, name)
        line = f"{name} {signed(middle)} ± {spread:.2f}"
        shapes.append(text(16, below, line, "label note"))
    y = 16
    for rollout in (rollouts[-1], rollouts[0]):
        drawn, y = draw_rollout(y, rollout, group["reference_scores"])
        shapes += drawn
    height = max(y, below + 16)
    page = f'<rect x="0.5" y="0.5" width="{WIDTH - 1}" height="{height - 1}" rx="8" class="page"/>'
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" '
        f'width="{WIDTH}" height="{height}" role="img">'
    )
    return "\n".join([head, f"<style>{STYLE}</style>", page, *shapes, "</svg>"])


def main():
    parser = argparse.ArgumentParser(description=__doc__.strip().splitlines()[0])
    parser.add_argument("file", help="rollouts.jsonl of a run of align.py")
    parser.add_argument("--step", type=int, default=11)
    args = parser.parse_args()
    groups = [json.loads(line) for line in open(args.file, encoding="utf-8")]
    print(draw(next(group for group in groups if group["step"] == args.step)))


if __name__ == "__main__":
    main()
