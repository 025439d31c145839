"""
Draw a pack of twelve tokens, as engine/packs.py makes it, and write it as SVG to standard output.

    python docs/draw_pack.py > docs/pack.svg

Ids, segments, positions, what predicts what and who attends to whom are read off the Pack itself,
so that the picture cannot say anything else than the code does.
"""

import sys
from pathlib import Path
from types import SimpleNamespace

import torch
from transformers import AutoConfig, AutoModelForImageTextToText

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from engine.packs import Tree, build_pack  # noqa: E402

WORDS = ["image", "<end>", "count", "red", "so", "2", "3"]  # a word's place is its id
IMAGE = WORDS.index("image")
PROMPT = "image image image image count red"  # an image of 2 x 2 tokens, and a question
ROLLOUTS = ["so 2 <end>", "so 3 <end>"]

SUBTITLE = "A prompt (an image of 2 × 2 tokens, a question), computed once, and two rollouts of it."
RULE = (
    "A token attends to its own segment up to itself, and to all of its segment’s ancestors "
    "(rows: who attends; columns: to whom):"
)

CELL = 56  # width of a token's column
ROW = 27
LEFT = 262  # width of the labels in front of the columns
TOP = 148  # room for the title and the arcs
STYLE = """
  text { font: 13px ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; fill: #1f2328 }
  .label { font: 13px system-ui, -apple-system, "Segoe UI", Helvetica, Arial, sans-serif }
  .title { font-weight: 600; font-size: 15px }
  .note { fill: #59636e }
  .page { fill: #ffffff; stroke: #d1d9e0 }
  .empty { fill: #f3f5f7 }
  .segment0 { fill: #bfdcf5 } .segment1 { fill: #fbd39b } .segment2 { fill: #d9c7f4 }
  .arc { fill: none; stroke-width: 1.8 }
  .arc1 { stroke: #c46a00 } .arc2 { stroke: #7c4bd1 }
  .head1 { fill: #c46a00 } .head2 { fill: #7c4bd1 }
  @media (prefers-color-scheme: dark) {
    text { fill: #e6edf3 }
    .note { fill: #9198a1 }
    .page { fill: #0d1117; stroke: #3d444d }
    .empty { fill: #1a2029 }
    .segment0 { fill: #1f4e79 } .segment1 { fill: #7a4a0c } .segment2 { fill: #523487 }
    .arc1 { stroke: #f0a24a } .arc2 { stroke: #b795f5 }
    .head1 { fill: #f0a24a } .head2 { fill: #b795f5 }
  }
"""


def ids_of(text):
    return [WORDS.index(word) for word in text.split()]


def example_prompt():
    """A prompt as data.Encoder makes it; its rotary positions are those of Qwen3-VL's own code."""
    config = AutoConfig.from_pretrained(ROOT / "runs/tiny.json")
    config.image_token_id = IMAGE
    with torch.device("meta"):  # no weights: get_rope_index reads the configuration alone
        model = AutoModelForImageTextToText.from_config(config).model
    ids = torch.tensor(ids_of(PROMPT))
    merged = config.vision_config.spatial_merge_size
    grid = torch.tensor([[1, 2 * merged, 2 * merged]])
    kinds = (ids == IMAGE).int()
    positions, _ = model.get_rope_index(
        ids[None], mm_token_type_ids=kinds[None], image_grid_thw=grid
    )
    return SimpleNamespace(
        ids=ids,
        positions=positions[:, 0],
        next_position=int(positions.max()) + 1,
        images={},
        blocks=None,
    )


def example_pack():
    tree = Tree(example_prompt(), [ids_of(text) for text in ROLLOUTS])
    return build_pack([tree], [(0, [0, 1])])


# ----------------------------------------------------------------------------- the pieces
def text(x, y, content, kind="", anchor="middle"):
    content = content.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return f'<text x="{x}" y="{y}" text-anchor="{anchor}" class="{kind}">{content}</text>'


def box(column, y, kind, height=ROW - 3):
    x = LEFT + column * CELL + 2
    return f'<rect x="{x}" y="{y}" width="{CELL - 4}" height="{height}" rx="4" class="{kind}"/>'


def middle(column):
    """x of the middle of a token's column."""
    return LEFT + column * CELL + CELL / 2


def arc(source, target, segment):
    """An arrow over the tokens, from the one that predicts to the one that is predicted."""
    x1 = middle(source) + 7
    x2 = middle(target) - 7
    base = TOP - 4
    height = base - 16 - 19 * (target - source)
    head = f"{x2 - 4},{base - 9} {x2 + 4},{base - 9} {x2},{base - 1}"
    return [
        f'<path d="M {x1} {base} C {x1} {height}, {x2} {height}, {x2} {base - 8}" '
        f'class="arc arc{segment}"/>',
        f'<polygon points="{head}" class="head{segment}"/>',
    ]


def table(pack):
    """A row of the table for each tensor of the pack: (what it is, its name, a value per token).
    None: the tensor says nothing of this token."""
    time, height, width = pack.positions.tolist()
    sequence = [None] * len(time)
    for place, number in zip(target_places(pack), pack.sequence.tolist(), strict=True):
        sequence[place] = number
    score = [None] * len(time)
    for place in pack.ends.tolist():
        score[place] = "score"
    return [
        ("token", "", [WORDS[i] for i in pack.ids.tolist()]),
        ("its id", "ids", pack.ids.tolist()),
        ("its segment", "segment", pack.segment.tolist()),
        ("position in time", "positions[0]", time),
        ("position in height", "positions[1]", height),
        ("position in width", "positions[2]", width),
        ("log-prob of rollout", "sequence", sequence),
        ("where D reads a score", "ends", score),
    ]


def draw(pack):
    """The picture of `pack` as SVG."""
    segment = pack.segment.tolist()
    tokens = len(segment)
    sees = pack.sees()[pack.segment][:, pack.segment].tril().tolist()  # (T, T) query, key
    words = [WORDS[i] for i in pack.ids.tolist()]
    width = LEFT + tokens * CELL + 16
    shapes = [
        text(16, 28, f"One pack of T = {tokens} tokens", "label title", "start"),
        text(16, 48, SUBTITLE, "label note", "start"),
        text(16, TOP - 14, "what predicts what", "label", "start"),
        text(LEFT - 10, TOP - 14, "source", "note", "end"),
    ]
    # 1) what predicts what
    for source, target in zip(pack.source.tolist(), target_places(pack), strict=True):
        shapes += arc(source, target, segment[target])
    # 2) the tensors
    y = TOP
    for label, name, values in table(pack):
        shapes.append(text(16, y + 17, label, "label", "start"))
        shapes.append(text(LEFT - 10, y + 17, name, "note", "end"))
        for column, value in enumerate(values):
            if value is None:
                shapes.append(box(column, y, "empty"))
            else:
                shapes.append(box(column, y, f"segment{segment[column]}"))
                shapes.append(text(middle(column), y + 17, str(value)))
        y += ROW
    # 3) who attends to whom
    y += 34
    shapes.append(text(16, y - 10, RULE, "label", "start"))
    for query in range(tokens):
        shapes.append(text(LEFT - 10, y + 16, words[query], "", "end"))
        for key in range(tokens):
            kind = f"segment{segment[key]}" if sees[query][key] else "empty"
            shapes.append(box(key, y, kind, ROW - 5))
        y += ROW - 2
    height = y + 14
    page = f'<rect x="0.5" y="0.5" width="{width - 1}" height="{height - 1}" rx="8" class="page"/>'
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
        f'width="{width}" height="{height}" role="img">'
    )
    return "\n".join([head, f"<style>{STYLE}</style>", page, *shapes, "</svg>"])


def target_places(pack):
    """(S,) where in the row each scored token stands: children's tokens are scored in order."""
    return (pack.kind >= 0).nonzero().flatten().tolist()


if __name__ == "__main__":
    print(draw(example_pack()))
