"""
Data: what a row is, and how it becomes what the model sees. A row of a file is read into an
Example, turns and images; the Encoder makes a Prompt of it, ids and pixels. A bad row is named with
file, row and mend, left out and counted.

The response's form stands in SPANS: three parts in tags, two spans that the discriminator scores.
The formats that rows come in have a function each, `from_..`, which says what fields it reads; all
hold images under `images` or `image`, as paths, bytes or {bytes, path}. An image's path is relative
to the file's folder, or to `image_root`, and must not lead out of it.

    python data.py check FILE [--kind sft|align|rl|pairs|eval] [--model CHECKPOINT]
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import sys
import unicodedata
from dataclasses import dataclass, field
from functools import partial

import torch
from tqdm import tqdm
from transformers import AutoConfig, AutoImageProcessor, AutoModelForImageTextToText, AutoTokenizer

from engine.answers import MAX_CHARS
from engine.benchmarks import (
    FIELDS,
    is_among,
    name_pictures,
    pictures,
    refuse_fields,
    refuse_in_turn,
    refuse_marks,
    standard,
    unlettered,
    unwrap,
)
from engine.files import find
from engine.rows import BadRow, Data, find_image, open_image

SYSTEM_PROMPT = """You are a helpful scientific assistant.
Answer the user's question based on the image provided.

Your output must strictly follow this XML format:

<caption>
- [Briefly describe the image style, key objects, and text using bullet points]
</caption>
<think>
[Reason step-by-step to solve the problem]
</think>
<answer>
[Final answer ONLY]
</answer>
"""

# The parts of a response, in their order, and the spans that they form: each is scored by itself.
SPANS = {"perception": ("caption",), "reasoning": ("think", "answer")}
# The ablation of one score for the whole response.
WHOLE = {"whole": tuple(part for parts in SPANS.values() for part in parts)}
PARTS = WHOLE["whole"]
TAGS = [tag for part in PARTS for tag in (f"<{part}>", f"</{part}>")]

# What a file's rows are for. "rl" and "eval" take rows of any format that hold answers.
KINDS = ("sft", "align", "rl", "pairs", "eval")


@dataclass
class Example:
    messages: list  # [{"role", "content"}], up to the user's last turn; of SFT the assistant's
    images: list = field(repr=False)  # paths, bytes or PIL images, in the order of `<image>`
    where: str = ""  # "file:row", rows from 1
    row: int = -1  # index in the file, from 0
    response: str | None = None  # the reference
    answer: str | None = None
    choices: tuple = ()  # the options' texts
    equivalent: tuple = ()  # other right answers
    source: str = ""


@dataclass
class PairExample:
    example: Example
    pairs: dict  # {span: (the reference's text, the policy's text)}, over SPANS


@dataclass
class Prompt:
    ids: torch.Tensor  # (T,) int64
    positions: torch.Tensor  # (3, T) int64, multimodal rotary
    next_position: int  # where a child segment goes on
    pixel_values: torch.Tensor | None  # (P, C) float32, the patches of all images
    grid_thw: torch.Tensor | None  # (n, 3) int64, each image's patches in time, height, width
    image_mask: torch.Tensor  # (T,) bool
    example: Example


def read(path, kind=None, image_root=None, max_bad=100) -> Data:
    """Open a data file: data[i] is an Example, of kind "pairs" a PairExample.

    kind: one of KINDS; None: as each row's fields suggest. Links are followed in an `image_root`
    that the user names, not in the file's own folder. Raises what Rows and Data raise.
    """
    if kind not in (None, *KINDS):
        raise ValueError(f"kind is one of {', '.join(KINDS)}, not {kind!r}")
    root = os.path.abspath(image_root or os.path.dirname(path) or ".")
    parse = partial(to_example, kind=kind, root=root, links=bool(image_root))
    return Data(path, parse, max_bad)


# ------------------------------------------------------------------------------ the response's form
# Characters that nobody sees: marks of direction and joining, a byte-order mark, controls.
INVISIBLE = re.compile(
    "[\x00-\x08\x0e-\x1b\x7f\u00ad\u034f\u061c\u180b-\u180e\u200b-\u200f\u202a-\u202e"
    "\u2060-\u206f\ufe00-\ufe0f\ufeff\ufff9-\ufffb]"
)


def canonical(text):
    """A text with one spelling of its white space, so that this gives nothing away.

    Lines hold neither blanks at their ends nor two in a row, no line is empty, all end in "\\n";
    letters are composed with their accents, and characters that nobody sees are gone.
    """
    text = unicodedata.normalize("NFC", INVISIBLE.sub("", text))
    lines = [" ".join(line.split()) for line in text.splitlines()]
    return "\n".join(line for line in lines if line)


def parts(response):
    """{"caption": text, "think": text, "answer": text} of a response, canonical.

    None where it is malformed: every tag has to occur exactly once, in order, nothing outside.
    """
    if not isinstance(response, str):
        return None
    pieces = re.split(f"({'|'.join(TAGS)})", response)
    texts = [canonical(piece) for piece in pieces[0::2]]
    outside = texts[0::2]
    inside = texts[1::2]
    if pieces[1::2] != TAGS or any(outside):
        return None
    if any(tag in text for text in inside for tag in TAGS):  # spelt with invisible characters
        return None
    return dict(zip(PARTS, inside, strict=True))


def split_spans(response, spans=SPANS):
    """The texts of a response's spans in the table's order, as the discriminator reads them.

    Rollouts and references both go through here: equal texts have equal ids. None where malformed.
    """
    found = parts(response)
    if found is None:
        return None
    texts = []
    for names in spans.values():
        texts.append("\n".join(f"<{name}>\n{found[name]}\n</{name}>" for name in names))
    return tuple(texts)


# ----------------------------------------------------------------------------------- rows -> examples
def to_example(row, where="", index=-1, kind=None, root=".", links=True):
    """A row of any format as an Example, of kind "pairs" as a PairExample. Raises BadRow."""
    if not isinstance(row, dict):
        raise BadRow(where, "the row is not an object", "Each row is {...} with named fields.")
    kind = kind or _kind_of(row)
    pair = from_pairs(row, where) if kind == "pairs" else None
    example = pair.example if pair else _reader_of(row)(row, where)
    example.where = where
    example.row = index
    example.images = [find_image(image, root, where, links) for image in example.images]
    if kind == "sft":
        if example.response is None:
            mend = "SFT rows end with the assistant's turn, others hold the user's."
            raise BadRow(where, "the last turn is missing", mend)
        example.messages.append({"role": "assistant", "content": example.response})
    _check_images(example)
    if kind == "align":
        written = parts(example.response)
        if written is None or not all(written.values()):
            mend = "Write <caption>, <think>, <answer>, each once, none empty."
            raise BadRow(where, "the reference lacks the three parts", mend)
    if kind in ("rl", "eval"):
        _check_answer(example)
    return pair or example
