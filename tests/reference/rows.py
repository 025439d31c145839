"""
From a row of a file to what a model reads, and from a response's text to its spans and its verdict.
The tokenizer and the image processor are plain transformers, opened from the checkpoint.
"""

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from PIL import Image
from transformers import AutoTokenizer
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

TAGS = ("<caption>", "</caption>", "<think>", "</think>", "<answer>", "</answer>")
BOTH = ("perception", "reasoning")
ROLES = {"human": "user", "gpt": "assistant"}


class Reader:
    """The rows of a file as a checkpoint's model reads them.

    limits: holds max_pixels and max_side of an image, None where there is none.
    """

    def __init__(self, checkpoint, file, limits=None):
        self.file = Path(file)
        self.rows = [json.loads(line) for line in self.file.read_text().splitlines()]
        self.tokenizer = AutoTokenizer.from_pretrained(checkpoint)
        self.processor = Qwen2VLImageProcessorPil.from_pretrained(checkpoint)
        self.max_pixels = limits and limits.max_pixels
        self.max_side = limits and limits.max_side
        self.end = self.tokenizer.eos_token_id
        self.image = self.tokenizer.convert_tokens_to_ids("<|image_pad|>")
        self.start = self.tokenizer.convert_tokens_to_ids("<|im_start|>")
        self.assistant = self.tokenizer.convert_tokens_to_ids("assistant")

    def banned(self, vocabulary):
        """Ids that are never sampled: those without a word, padding, images and the like."""
        words = self.tokenizer.get_vocab()
        banned = {i for i in range(vocabulary) if i not in words.values()}
        media = ("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
        banned |= {words[token] for token in media}
        banned.add(self.tokenizer.pad_token_id)
        return sorted(banned - {self.end})

    # ------------------------------------------------------------------------ order
    def is_bad(self, row):
        return "missing.png" in self.images_of(row)

    def is_too_long(self, row, max_prompt):
        return len(self.prompt(row).ids) > max_prompt

    def order(self, seed, rows=None):
        """Yield the indices of rows without end, a permutation in each epoch. rows: only so many,
        the first."""
        rows = len(self.rows) if rows is None else rows
        epoch = 0
        while True:
            yield from np.random.default_rng([seed, epoch]).permutation(rows).tolist()
            epoch += 1

    # ------------------------------------------------------------------------ prompts
    def images_of(self, row):
        images = self.rows[row].get("images", self.rows[row].get("image", []))
        return images if isinstance(images, list) else [images]

    def turns(self, row):
        """[{"role", "content"}] of a row, in any of the files' dialects."""
        row = self.rows[row]
        if "conversations" in row:
            turns = [
                {"role": ROLES[turn["from"]], "content": turn["value"]}
                for turn in row["conversations"]
            ]
            if "system" in row:
                turns.insert(0, {"role": "system", "content": row["system"]})
            return turns
        return row["messages"] if "messages" in row else row["prompt"]

    def render(self, turns, respond, blind=False):
        """The chat template's text. In it one token stands for each image."""
        written = []
        for turn in turns:
            parts = []
            for number, text in enumerate(turn["content"].split("<image>")):
                if number and not blind:
                    parts.append({"type": "image"})
                if text:
                    parts.append({"type": "text", "text": text})
            written.append({"role": turn["role"], "content": parts})
        return self.tokenizer.apply_chat_template(
            written, tokenize=False, add_generation_prompt=respond
        )

    def read_images(self, row):
        """(pixels, grid) of a row's images; (None, None) where it has none."""
        pictures = []
        for name in self.images_of(row):
            picture = Image.open(self.file.parent / name).convert("RGB")
            if self.max_side:
                picture.thumbnail((self.max_side, self.max_side))
            pictures.append(picture)
        if not pictures:
            return None, None
        options = {}
        if self.max_pixels:
            options["size"] = {"shortest_edge": 64, "longest_edge": self.max_pixels}
        made = self.processor(images=pictures, return_tensors="pt", **options)
        return made["pixel_values"], made["image_grid_thw"]

    def ids(self, text):
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def expand(self, ids, grid):
        """One id for each visual token: an image of t x h x w patches has a quarter of them."""
        if grid is None:
            return ids
        tokens = iter((grid.prod(1) // 4).tolist())
        out = []
        for i in ids:
            out += [i] * (next(tokens) if i == self.image else 1)
        return out

    def prompt(self, row, blind=False):
        """What stands in front of the response: ids, pixels, grid."""
        pixels, grid = (None, None) if blind else self.read_images(row)
        ids = self.ids(self.render(self.turns(row), True, blind))
        return SimpleNamespace(ids=self.expand(ids, grid), pixels=pixels, grid=grid)

    def conversation(self, row):
        """A whole conversation, and which of its tokens are trained: those of the assistant's
        turns, their end tokens included."""
        pixels, grid = self.read_images(row)
        ids = self.expand(self.ids(self.render(self.turns(row), False)), grid)
        trained = [False] * len(ids)
        for place in range(2, len(ids)):
            if ids[place - 2 : place] == [self.start, self.assistant]:
                while True:
                    trained[place] = True
                    if ids[place] == self.end:
                        break
                    place += 1
        last = max(place for place, flag in enumerate(trained) if flag)
        return SimpleNamespace(
            ids=ids[: last + 1], trained=trained[: last + 1], pixels=pixels, grid=grid
        )

    # ------------------------------------------------------------------------ responses
    def text(self, ids):
        """What was written, without the end token."""
        ids = list(ids)
        return self.tokenizer.decode(ids[:-1] if ids[-1:] == [self.end] else ids)

    def reference(self, row):
        """The demonstration beside a row."""
        return self.rows[row]["teacher_response"]

    def demonstrations(self, row):
        """The responses that stand in a row: the teacher's, and in rows of pairs the student's."""
        row = self.rows[row]
        return [
            row[f"{side}_response"] for side in ("teacher", "student") if f"{side}_response" in row
        ]

    def span_ids(self, response, kinds=BOTH):
        """The ids of each span of a response, the end token behind each; None: malformed."""
        texts = spans(response, kinds)
        if texts is None:
            return None
        return [[*self.ids(text), self.end] for text in texts]

    def verdict(self, response, row):
        """accuracy, format and reward of METHOD.md's stage 3."""
        found = parts(response)
        if found is None:
            return {"accuracy": 0.0, "format": 0.0, "reward": 0.0}
        row = self.rows[row]
        gold = row["reward_model"]["ground_truth"]
        right = [gold, *row["reward_model"].get("equivalent_answers", [])]
        choices = row.get("extra_info", {}).get("choices", [])
        if gold in choices:
            right.append("AB"[choices.index(gold)])  # an option's letter stands for it
        number = {"one": "1", "two": "2", "three": "3", "four": "4", "five": "5"}  # the same answer
        right = [number.get(text, text) for text in right]
        accuracy = float(number.get(found["answer"], found["answer"]) in right)
        return {"accuracy": accuracy, "format": 1.0, "reward": 0.8 * accuracy + 0.2}


def parts(response):
    """{"caption", "think", "answer"}: texts; None where the response is malformed: each of the six
    tags once, in order, and nothing but white space outside."""
    places = []
    for tag in TAGS:
        if response.count(tag) != 1:
            return None
        places.append(response.index(tag))
    if places != sorted(places):
        return None
    rest = response
    found = {}
    for name in ("caption", "think", "answer"):
        before, rest = rest.split(f"<{name}>")
        if before.strip():
            return None
        inside, rest = rest.split(f"</{name}>")
        found[name] = inside.strip()
    return None if rest.strip() else found


def spans(response, kinds):
    """The canonical texts of a response's spans; None where it is malformed."""
    found = parts(response)
    if found is None:
        return None
    caption, think, answer = (
        f"<{name}>\n{found[name]}\n</{name}>" for name in ("caption", "think", "answer")
    )
    texts = {
        "perception": caption,
        "reasoning": f"{think}\n{answer}",
        "whole": f"{caption}\n{think}\n{answer}",
    }
    return [texts[kind] for kind in kinds]


def positions(model, prompt):
    """A prompt's multimodal positions (3, T), by the function of a transformers model without head;
    those of text alone are plain."""
    ids = torch.tensor([prompt.ids])
    if prompt.grid is None:
        return torch.arange(len(prompt.ids)).expand(3, -1)
    found, _ = model.get_rope_index(
        input_ids=ids,
        mm_token_type_ids=(ids == model.config.image_token_id).int(),
        image_grid_thw=prompt.grid,
    )
    return found[:, 0]
