"""
Data: what a row is, and how it becomes what the model sees. A row of a file is read into an
Example, turns and images; the Encoder makes a Prompt of it, ids and pixels. A bad row is named with
file, row and mend, left out and counted.

The response's form stands in SPANS: three parts in tags, two spans that the discriminator scores.
The formats that rows come in have a function each, `from_..`, which says what fields it reads; all
hold images under `images` or `image`, as paths, bytes or {bytes, path}, and plain questions also
under the names that benchmarks give them. An image's path is relative to the file's folder, or to
`image_root`, and must not lead out of it.

A checkpoint's encoder is opened by open_encoder, which refuses chat templates that would leave a
turn out or begin the response; write_template writes the template of what is saved.

    python data.py check FILE .. [--kind sft|align|rl|pairs|eval] [--policy CHECKPOINT] [--against
        TEST_FILE ..]

says what of a file is usable, what is in it, and what it shares with files to test on
(engine/inspection.py), and shows a row as it is read. Tokens are counted only with --policy.
"""

from __future__ import annotations

import json
import math
import os
import re
import sys
import threading
import unicodedata
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from string import ascii_lowercase
from typing import Literal

import torch
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    AutoTokenizer,
    PreTrainedTokenizerFast,
)

from engine.answers import MAX_CHARS
from engine.arguments import Common, end, make_parser, option, refuse_unknown_flags
from engine.arguments import check as check_numbers
from engine.benchmarks import (
    is_among,
    name_pictures,
    pictures,
    refuse_fields,
    refuse_flags,
    refuse_in_turn,
    refuse_marks,
    says,
    standard,
    unlettered,
    unwrap,
)
from engine.families import images_attend_both_ways, takes
from engine.files import find, find_data
from engine.images import Images, open_processor
from engine.inspection import Inspection
from engine.rows import BadRow, Data, find_image, open_image, shrink
from engine.windows import blocks_of

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

# The spans that the discriminator scores, and the parts of a response that each is made of, in the
# response's order. The ablation `whole` scores the response as one span.
SPANS = {"perception": ("caption",), "reasoning": ("think", "answer")}
PARTS = tuple(name for names in SPANS.values() for name in names)
WHOLE = {"whole": PARTS}
TAGS = [tag for name in PARTS for tag in (f"<{name}>", f"</{name}>")]
FORM = ", ".join(TAGS[0::2])  # in messages: "<caption>, <think>, <answer>"

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
    positions: torch.Tensor  # (R, T) int64, rotary; of several rows, multimodal
    next_position: int  # where a child segment goes on
    images: dict  # name -> tensor, as the model's forward takes all its images; {}: it has none
    image_mask: torch.Tensor  # (T,) bool
    blocks: torch.Tensor | None  # (T,) as of engine.windows.blocks_of, where a model asks for it
    example: Example


def read(path, kind=None, image_root=None, max_bad=100, workers=0) -> Data:
    """Open a data file: data[i] is an Example, of kind "pairs" a PairExample.

    path: as for files.find_data, also of the hub.
    kind: one of KINDS; None: as each row's fields suggest. Links are followed in an `image_root`
    that the user names, not in the file's own folder. workers: threads that read and build rows,
    see Data. Raises what Rows and Data raise.
    """
    if kind not in (None, *KINDS):
        raise ValueError(f"kind is one of {', '.join(KINDS)}, not {kind!r}")
    path = find_data(path)
    root = os.path.abspath(image_root or os.path.dirname(path) or ".")
    parse = partial(to_example, kind=kind, root=root, links=bool(image_root))
    return Data(path, parse, max_bad, workers)


# ------------------------------------------------------------------------------ the response's form
# Characters that nobody sees: marks of direction and joining, a byte-order mark, controls.
INVISIBLE = re.compile(
    "[\x00-\x08\x0e-\x1b\x7f\u00ad\u034f\u061c\u180b-\u180e\u200b-\u200f\u202a-\u202e"
    "\u2060-\u206f\ufe00-\ufe0f\ufeff\ufff9-\ufffb]"
)


def canonical(text):
    """A text with one spelling of its white space: what a reader does not see gives no side away.

    Lines hold neither blanks at their ends nor two in a row, none is empty, all end in "\\n";
    letters are composed with their accents, and invisible characters are gone. Where a line ends
    stays, as do all other characters: a "²" is no "2".
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


# ------------------------------------------------------------------------------- rows -> examples
def to_example(row, where="", index=-1, kind=None, root=".", links=True):
    """A row of any format as an Example, of kind "pairs" as a PairExample. Raises BadRow."""
    if not isinstance(row, dict):
        raise BadRow(where, "the row is not an object", "Each row is {...} with named fields.")
    # A table has every column in every row: what a row lacks says nothing.
    row = {name: value for name, value in row.items() if says(value)}
    kind = kind or _kind_of(row)
    pair = None
    if kind == "pairs":
        pair = from_pairs(row, where)
        example = pair.example
    else:
        example = _reader_of(row)(row, where)
    example.where = where
    example.row = index
    example.images = [find_image(image, root, where, links) for image in example.images]
    _check_marks(example)
    if kind == "sft":
        refuse_flags(row, where)
        if example.response is None:
            mend = "SFT rows end with the assistant's turn, others hold the user's."
            raise BadRow(where, "the last turn is missing", mend)
        example.messages.append({"role": "assistant", "content": example.response})
    if kind == "align":
        written = parts(example.response)
        if written is None or not all(written.values()):
            mend = f"Write {FORM}, each once, in this order, none empty, nothing outside."
            raise BadRow(where, f"the reference is not {FORM}", mend, _flaw(example.response))
    if kind in ("rl", "eval"):
        _check_answer(example)
    return pair or example


def _kind_of(row):
    if row.get("student_response") or row.get("student_caption"):
        return "pairs"
    if row.get("messages") or row.get("conversations"):
        return "sft"
    if row.get("teacher_response") or row.get("teacher_caption"):
        return "align"
    return "eval"


def _reader_of(row):
    """The function that reads a row's format: the field that holds its turns decides."""
    if row.get("messages") is not None or row.get("conversations") is not None:
        return from_sharegpt
    prompt = row.get("prompt")
    # A list that is written as text is no question either: from_verl says so.
    if isinstance(prompt, list) or str(prompt).lstrip().startswith("[{"):
        return from_verl
    return from_plain


def from_sharegpt(row, where):
    """LLaMA-Factory's form, in both dialects, for SFT and anything else.

    messages [{role, content}], or conversations [{from, value}]; system?; images, one for each
    `<image>` in the users' turns.
    """
    if row.get("conversations") is not None:
        turns = _turns(row, "conversations", ("from", "value"), where)
    else:
        turns = _turns(row, "messages", ("role", "content"), where)
    return _example(row, where, turns)


def from_verl(row, where):
    """verl's form, for alignment and RL.

    prompt [{role, content}]; images; reward_model {ground_truth, equivalent_answers?}; data_source;
    extra_info {choices?}; for alignment teacher_response, or teacher_caption and teacher_cot.
    """
    return _example(row, where, _turns(row, "prompt", ("role", "content"), where))


def from_plain(row, where):
    """A question, for evaluation and RL: question, choices?, answer, image.

    Other names that benchmarks give these: see engine/benchmarks.py. The system prompt is ours.
    """
    fields = standard(row, where)
    images = fields["images"]
    elsewhere = " (or `messages`, `conversations`, `prompt`)"
    question = _text(fields["question"], "question", where, elsewhere)
    choices = _strings(fields["choices"], "choices", where)
    question, choices = name_pictures(question, choices, len(images), fields["numbers"], where)
    shown, _ = unlettered(choices, ())
    turns = [("system", SYSTEM_PROMPT), ("user", _ask(question, shown, len(images)))]
    return _example(row, where, turns, fields | {"choices": choices})


def from_pairs(row, where) -> PairExample:
    """A row of any of the formats above that has two responses, for the discriminator's warm-up:
    teacher_response and student_response, or of either side its _caption and _cot."""
    example = _reader_of(row)(row, where)
    sides = {"teacher": example.response, "student": _written(row, "student", where)}
    spans = []
    for side, response in sides.items():
        spans.append(split_spans(response))
        if spans[-1] is None:
            detail = f"{side}_*: {_flaw(response)}"
            mend = "Leave malformed responses out."
            raise BadRow(where, f"a side of the pair is not {FORM}", mend, detail)
    texts = zip(*spans, strict=True)  # of each span the reference's and the policy's
    return PairExample(example, dict(zip(SPANS, texts, strict=True)))


def _flaw(response):
    """In words, what keeps a response from being well-formed."""
    if response is None:
        return "there is none"
    for tag in TAGS:
        if response.count(tag) != 1:
            return f"{tag} stands {response.count(tag)} times"
    return "an empty part, text outside, or another order"


# What all formats share
ROLES = {
    "system": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
}


def _turns(row, name, fields, where):
    """The turns under `name` as [(role, text)]; fields: what role and text are called there."""
    turns = row[name]
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        mend = f'Write [{{"{fields[0]}": .., "{fields[1]}": ..}}, ..].'
        raise BadRow(where, f"`{name}` is not a list of turns", mend)
    found = []
    for turn in turns:
        role = ROLES.get(str(turn.get(fields[0])))
        found.append((role, _text(turn.get(fields[1]), fields[1], where)))
        refuse_in_turn(turn, role, fields, where)
    return found


def _example(row, where, turns, plain=None):
    """An Example of a row's turns [(role, text)]; plain: what `standard` found, of a plain row."""
    if row.get("system"):
        system = ("system", _text(row["system"], "system", where))
        if turns[:1] != [system]:
            turns = [system, *turns]
    roles = [role for role, _ in turns]
    if roles[:1] == ["system"]:
        roles = roles[1:]
    usual = [("user", "assistant")[i % 2] for i in range(len(roles))]
    if not roles or roles != usual:
        mend = "An optional system turn, then user, assistant, user, .."
        raise BadRow(where, "turns do not alternate", mend, roles)
    response = _written(row, "teacher", where)
    if roles[-1] == "assistant":
        _, response = turns.pop()
    images = plain["images"] if plain else pictures(row, where)[0]
    refuse_fields(row, images, where, plain is not None)
    choices, golds = _answers(row, plain or row, response, where)
    return Example(
        messages=[{"role": role, "content": text} for role, text in turns],
        images=images,
        response=response,
        answer=golds[0] if golds else None,
        choices=choices,
        equivalent=golds[1:],
        source=str(row.get("data_source") or ""),
    )


def _answers(row, named, response, where):
    """(the options' texts, all right answers) of a row; named: holds `choices` and `answer`."""
    extra = row.get("extra_info") or {}
    reward = row.get("reward_model") or {}
    if not isinstance(extra, dict) or not isinstance(reward, dict):
        mend = "Write {..} with named fields."
        raise BadRow(where, "reward_model or extra_info is not an object", mend)
    choices = _strings(named.get("choices") or extra.get("choices"), "choices", where)
    answer = named.get("answer")
    if answer is None:
        answer = reward.get("ground_truth")
    golds = _strings(answer, "answer", where)
    written = parts(response)
    if not golds and written is not None:
        golds = (written["answer"],)
    others = reward.get("equivalent_answers") or row.get("equivalent_answers")
    golds += _strings(others, "equivalent_answers", where)
    golds = [unwrap(gold) for gold in golds]
    return unlettered(choices, tuple(gold for gold in golds if gold))


def _written(row, side, where):
    """A side's response, from {side}_response or from {side}_caption and {side}_cot, or None."""
    if row.get(f"{side}_response"):
        return _text(row[f"{side}_response"], f"{side}_response", where)
    caption = row.get(f"{side}_caption")
    cot = row.get(f"{side}_cot")  # <think> and <answer>
    if not caption and not cot:
        return None
    caption = _text(caption, f"{side}_caption", where)
    cot = _text(cot, f"{side}_cot", where)
    if "<caption>" not in caption:
        caption = f"<caption>{caption}</caption>"
    return f"{caption}\n{cot}"


def _ask(question, choices, n_images):
    """A plain question as a user's turn: images first, as in the paper's data, then the text, then
    lettered options. What the picture letters ("A", "(B)"), or the question lists in this order, is
    not written again."""
    if "<image>" not in question:
        question = "<image>\n" * n_images + question
    lettered = all(re.fullmatch(r"\(?[A-Z][).]?", choice) for choice in choices)
    if lettered or _lists(question, choices):
        return question
    options = [f"({chr(65 + i)}) {choice}" for i, choice in enumerate(choices)]
    return "\n".join([question, "Options:", *options])


def _lists(question, choices):
    """Does a question's text hold all of the choices, in their order?"""
    # One after the other: as one pattern with gaps it could take exponential time.
    end = 0
    for choice in choices:
        if choice not in question:
            return False
        found = re.compile(rf"(?<!\w){re.escape(choice)}(?!\w)").search(question, end)
        if found is None:
            return False
        end = found.end()
    return True


def _check_marks(example):
    """BadRow unless the users' turns hold one `<image>` for each image, and no turn other marks."""
    where = example.where
    n = 0
    texts = [(message["role"], message["content"]) for message in example.messages]
    for role, text in [*texts, ("assistant", example.response or "")]:
        refuse_marks(role, text, example.images, where)
        n += text.count("<image>")
        if role != "user" and "<image>" in text:
            mend = "Move it into a user's turn, or out of the text."
            raise BadRow(where, "<image> outside a user's turn", mend)
    if n != len(example.images):
        detail = f"{n} <image>, {len(example.images)} images"
        mend = "Write it where each stands."
        raise BadRow(where, "not one <image> for each image", mend, detail)


def _check_answer(example):
    """BadRow where no response can be right."""
    where = example.where
    if example.answer is None or len(example.answer) > MAX_CHARS:
        mend = "Give `answer` or `reward_model.ground_truth`, or leave the row out."
        raise BadRow(where, f"no answer, or one of more than {MAX_CHARS} characters", mend)
    golds = (example.answer, *example.equivalent)
    if any(tag in gold for gold in golds for tag in TAGS):
        raise BadRow(where, "tags in the answer", "Write the answer alone.", example.answer)
    if example.choices and not any(is_among(gold, example.choices) for gold in golds):
        mend = "Write the right option's letter or its text, not its index."
        raise BadRow(where, "the answer is none of the options", mend, example.answer)


SURROGATE = re.compile("[\ud800-\udfff]")  # half a character: no text in Unicode holds one


def _text(value, field, where, others=""):
    if not isinstance(value, str) or not value.strip() or SURROGATE.search(value):
        mend = f"Write `{field}`{others} as text in Unicode."
        raise BadRow(where, f"`{field}` is missing, empty or no valid text", mend)
    return value


def _strings(value, field, where):
    """A text, a number or a list of them as a tuple of texts; () of None and NaN."""
    if value is None or value != value:
        return ()
    values = value if isinstance(value, list | tuple) else [value]
    texts = []
    for one in values:
        if isinstance(one, int | float) and math.isfinite(one):
            one = str(one)
        texts.append(one)
    valid = all(isinstance(text, str) and not SURROGATE.search(text) for text in texts)
    if not valid or (field == "choices" and values is not value):
        mend = "Write texts in Unicode, `choices` as a list."
        raise BadRow(where, f"`{field}` is neither a text nor a list of texts", mend)
    return tuple(texts)


# ----------------------------------------------------------------------------- examples -> prompts
class Encoder:
    """Text and images -> token ids and the images' tensors, in one way for all stages.

    The prompt is rendered by the chat template and tokenised apart from the response that follows
    it: a response has the same ids as a demonstration and as a reference, and so has a span of it.
    processor: transformers', of tokenizer and image processor. base: the transformers model without
    head, for its configuration, the names that its forward takes, and positions; its weights are
    not read. max_pixels, max_side: larger images are scaled down to this area, or to this longer
    side in pixels. blind: images are left out. ends: ids that end a rollout beside those that the
    chat template, tokenizer and configuration name.

    Raises ValueError where the tokenizer has no end token or no chat template; for a template that
    begins the response, leaves a turn out or has an error; where the configuration does not know
    the ids that an image's text has; for max_pixels where images are not scaled to an area.
    """

    def __init__(
        self,
        processor,
        base,
        max_prompt_tokens=2048,
        max_pixels=None,
        max_side=None,
        blind=False,
        ends=(),
    ):
        tokenizer = processor.tokenizer
        config = base.config
        if "default" not in templates_of(tokenizer) or tokenizer.eos_token_id is None:
            raise ValueError(
                "the tokenizer has no chat template (of several, none named default) or no end "
                "token: put chat_template.jinja beside it"
            )
        refuse_prefilled(tokenizer)
        refuse_without_system(tokenizer)
        self.tokenizer = tokenizer
        self.images = Images(processor, base, max_pixels)
        self.rope_index = getattr(base, "get_rope_index", None)  # None: plain positions
        self.both_ways = images_attend_both_ways(config)
        self.writes_lists = not writes_strings(tokenizer)
        self.max_prompt_tokens = max_prompt_tokens
        self.max_side = max_side
        self.blind = blind
        # A call of the tokenizer can change its settings: threads take turns.
        self.lock = threading.Lock()
        self.image_id = config.image_token_id
        self._expect_image_id()

        self.eos = end_of_turn(tokenizer)
        text_config = config.get_text_config()
        known = set(tokenizer.get_vocab().values())
        media = set()
        for name in ("image", "video", "vision_start", "vision_end"):
            media.add(getattr(config, f"{name}_token_id", None))
        media.update(tokenizer.convert_tokens_to_ids([self.images.mark]))
        media &= known
        # Any of these ends a rollout: the tokenizer's end token first, then the model's, then those
        # of generation_config.json. Padding may be one of them.
        named = [
            self.eos,
            tokenizer.eos_token_id,
            *ids_of(getattr(text_config, "eos_token_id", None)),
            *ends,
        ]
        self.eos_ids = tuple(dict.fromkeys(i for i in named if i in known - media))
        # Never sampled: marks of images, padding, and rows of the embedding without a token.
        unused = set(range(text_config.vocab_size)) - known
        banned = media | unused | {tokenizer.pad_token_id}
        self.banned = tuple(sorted(banned - {*self.eos_ids, None}))
        # A text that holds one of these would steer the model.
        special = {t.content for t in tokenizer.added_tokens_decoder.values() if t.special}
        special.update(tokenizer.convert_ids_to_tokens(sorted(media)))
        self.special = re.compile("|".join(map(re.escape, special)))

    def _expect_image_id(self):
        """ValueError where an image's text has other ids than the configuration says: they would be
        trained and attended to as words."""
        text = self.images.text_of_blank()
        written = sorted(set(self._ids(text)))
        if self.image_id not in written:
            raise ValueError(
                f"config.json's image_token_id is {self.image_id}, but the ids that the processor "
                f"and tokenizer write for an image are {written}, the text {text[:80]!r}: take "
                "config.json and the tokenizer's files from one checkpoint"
            )

    def prompt(self, example) -> Prompt:
        """The prompt up to where the response starts. Raises BadRow, of a long prompt say."""
        messages = example.messages
        if messages[-1]["role"] == "assistant":
            messages = messages[:-1]
        prompt, _ = self._encode(example, messages, self.max_prompt_tokens)
        return prompt

    def conversation(self, example, max_tokens=None):
        """A whole conversation -> (Prompt, loss mask (T,) bool): True on the assistant's tokens and
        its end tokens. Raises BadRow."""
        return self._encode(example, example.messages, max_tokens or self.max_prompt_tokens)

    def response(self, text) -> list[int]:
        """Ids of a response or a span, and the end token. Special tokens in it are plain text."""
        return [*self._ids(text, split=True), self.eos]

    def decode(self, ids) -> str:
        """The text of sampled ids: without an end token at the end, other special ones visible."""
        ids = [int(i) for i in ids]
        if ids and ids[-1] in self.eos_ids:
            ids.pop()
        with self.lock:
            return self.tokenizer.decode(
                ids, skip_special_tokens=False, clean_up_tokenization_spaces=False
            )

    def _images(self, example):
        """The images as the model's forward takes them: (tensors by name, of each image the text
        that stands for it); ({}, []) for none.

        The one place where images are prepared. Each is opened upright in RGB (open_image), made
        smaller where its longer side is above max_side, and scaled, normalised and cut by the
        checkpoint's own image processor. Raises BadRow.
        """
        if self.blind or not example.images:
            return {}, []
        images = [open_image(image, example.where) for image in example.images]
        images = [shrink(image, self.max_side) for image in images]
        try:
            return self.images.prepare(images)
        except ValueError as error:
            raise no_shape(example, error) from None

    def lengths(self, example, sizes):
        """Tokens of a row's turns, without the work on its pixels: (not trained on, of them image,
        trained on). sizes: (width, height) of each image, within max_side. Raises BadRow."""
        try:
            texts = self.images.texts_of_sizes(tuple(sizes))
        except ValueError as error:
            raise no_shape(example, error) from None
        ids, trained = self._tokens(example, example.messages, texts)
        of_images = (ids == self.image_id).sum()
        return int((~trained).sum()), int(of_images), int(trained.sum())

    def _encode(self, example, messages, limit):
        images, texts = self._images(example)
        ids, trained = self._tokens(example, messages, texts)
        image_mask = ids == self.image_id  # (T,)
        if len(ids) > limit:  # never cut
            detail = f"{len(ids)}, of them {image_mask.sum()} of images, allowed are {limit}"
            lower = "lower --max_pixels" if self.images.limits else "let images have fewer tiles"
            mend = f"Raise the limit, {lower}, or leave the row out."
            raise BadRow(example.where, "too many tokens", mend, detail)
        positions, next_position = self._positions(ids, images)
        blocks = blocks_of(image_mask) if self.both_ways else None
        prompt = Prompt(ids, positions, next_position, images, image_mask, blocks, example)
        return prompt, trained

    def _positions(self, ids, images):
        """(positions (R, T), the one behind them) of ids (T,): the model's own, or plain ones."""
        if self.rope_index is None:
            return torch.arange(len(ids)).unsqueeze(0), len(ids)
        kinds = self.images.processor.create_mm_token_type_ids([ids.tolist()])
        known = {name: images[name] for name in images if takes(self.rope_index, name)}
        found, delta = self.rope_index(
            input_ids=ids[None], mm_token_type_ids=torch.tensor(kinds), **known
        )
        return found[:, 0], len(ids) + int(delta)

    def _tokens(self, example, messages, images):
        """(ids (T,), trained on? (T,)) of a conversation. images: the text that stands for each."""
        if self.blind:
            images = []
        texts = [message["content"] for message in messages]
        for text in [*texts, example.response or ""]:
            # A family may itself write an image as `<image>`. Also as a blind encoder would see it.
            marked = text.replace("<image>", "\n")
            found = self.special.search(marked) or self.special.search(text.replace("<image>", ""))
            if found:
                mend = "Take it out: it would steer the model."
                raise BadRow(example.where, "a special token in the text", mend, found[0])
        asked = messages[:-1] if messages[-1]["role"] == "assistant" else messages
        if self._render(asked, example.where).count(self.images.mark) != len(images):
            mend = "Use the template of a vision-language model."
            raise BadRow(example.where, "the chat template does not write the images", mend)
        images = iter(images)
        ids = []
        trained = []
        done = ""  # the text that `ids` stand for
        for k in range(len(messages) + 1):
            at_end = k == len(messages)
            if not at_end and messages[k]["role"] != "assistant":
                continue
            if at_end and messages[-1]["role"] == "assistant":
                # What the template would make of an assistant's last turn, or add behind it, is
                # not asked: nothing comes after it.
                break
            text = self._render(messages[:k], example.where)
            if not text.startswith(done):
                mend = "Use an instruct model's template."
                raise BadRow(example.where, "the chat template rewrites assistant turns", mend)
            ids += self._ids(self.images.fill_in(text[len(done) :], images))
            trained += [False] * (len(ids) - len(trained))
            if not at_end:
                response = messages[k]["content"]
                ids += self.response(response)
                trained += [True] * (len(ids) - len(trained))
                done = text + response + self.tokenizer.convert_ids_to_tokens(self.eos)
        return torch.tensor(ids), torch.tensor(trained)

    def _ids(self, text, split=False):
        with self.lock:
            found = self.tokenizer(
                text, add_special_tokens=False, split_special_tokens=split, verbose=False
            )
        return found["input_ids"]

    def _render(self, messages, where=""):
        """The text that asks for the response behind these turns. Raises BadRow, of `where`."""
        turns = [message | {"content": self._content(message)} for message in messages]
        try:
            return rendered(self.tokenizer, turns, asks=True)
        except ValueError as error:
            mend = "Write turns as it knows them, or use the template of a vision-language model."
            raise BadRow(where, "the chat template refuses the turns", mend, error) from None

    def _content(self, message):
        """A turn's text, or the list of text and image parts that templates know."""
        text = message["content"]
        if self.blind:
            text = text.replace("<image>", "")
        if "<image>" not in text and not self.writes_lists:
            return text
        content = []
        for piece in re.split("(<image>)", text):
            if piece == "<image>":
                content.append({"type": "image"})
            elif piece:
                content.append({"type": "text", "text": piece})
        return content


def no_shape(example, error):
    return BadRow(example.where, "an image has no usable shape", "Crop it.", error)


# In front of a saved chat template, so that any server asks for the three parts: the system turn
# that users leave out.
ASKS = (
    "{%- if messages[0].role != 'system' %}{%- set messages = [{'role': 'system', 'content': "
    f"{json.dumps(SYSTEM_PROMPT)}}}] + messages %}}{{%- endif %}}"
)
# The same for a template that knows content as a list alone.
ASKS_IN_LISTS = ASKS.replace(
    json.dumps(SYSTEM_PROMPT), f"[{{'type': 'text', 'text': {json.dumps(SYSTEM_PROMPT)}}}]"
)

# For the head of a template that knows no system turn: it is put in front of the user's first.
MERGES = (
    "{%- if messages[0].role == 'system' %}"
    "{%- set system, asked = messages[0].content, messages[1].content %}"
    "{%- if system is string %}{%- set system = system + '\\n\\n' %}{%- endif %}"
    "{%- if system is string and asked is not string %}"
    "{%- set system = [{'type': 'text', 'text': system}] %}{%- endif %}"
    "{%- set messages = [{'role': 'user', 'content': system + asked}] + messages[2:] %}{%- endif %}"
)


def open_encoder(path, base=None, **options) -> Encoder:
    """The encoder of a checkpoint, a folder or a hub name; options: of Encoder.

    base: its model without head; None: one without weights is made of config.json, for its
    positions alone. What write_template put before the chat template comes off: here the data's own
    turns are all that a prompt holds. Of several templates the one named "default" is used. Raises
    ValueError, with the folder, for what an Encoder cannot be made of.
    """
    folder = find(path)
    if base is None:
        config = AutoConfig.from_pretrained(folder)
        with torch.device("meta"):
            base = AutoModelForImageTextToText.from_config(config).model
    tokenizer = open_tokenizer(folder)
    tokenizer.chat_template = open_templates(tokenizer, folder)
    generation = folder / "generation_config.json"
    if generation.exists():
        named = json.loads(generation.read_text(encoding="utf-8")).get("eos_token_id")
        options = {"ends": ids_of(named), **options}
    processor = open_processor(folder, base.config, tokenizer)
    try:
        return Encoder(processor, base, **options)
    except ValueError as error:
        raise ValueError(f"{folder}: {error}") from error


def templates_of(tokenizer):
    """A tokenizer's chat templates by name; one alone is named "default"."""
    found = tokenizer.chat_template or {}
    return {"default": found} if isinstance(found, str) else dict(found)


def open_templates(tokenizer, folder):
    """What `tokenizer.chat_template` has to be for the tokenizer in a checkpoint's folder (a Path):
    one template's text, or several by name, as tool_use beside the default; None without any."""
    templates = templates_of(tokenizer)
    older = folder / "chat_template.json"
    if "default" not in templates and older.exists():
        text = older.read_text(encoding="utf-8")
        templates["default"] = json.loads(text)["chat_template"]
    for name in templates:
        if Path(name).name != name:
            raise ValueError(f"{folder}: a chat template is named {name!r}, which no file can be")
    if "default" in templates:
        templates["default"] = templates["default"].removeprefix(ASKS).removeprefix(ASKS_IN_LISTS)
    if set(templates) <= {"default"}:
        return templates.get("default")
    return templates


def rendered(tokenizer, turns, asks=False):
    """The text that the chat template makes of turns; asks: up to where a response starts. Raises
    ValueError with what the template says."""
    try:
        return tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=asks)
    except Exception as error:  # a template is a program: it can raise anything inside Jinja
        roles = ", ".join(turn["role"] for turn in turns)
        raise ValueError(
            f"the chat template has an error with turns of {roles}: {error}"
        ) from error


def as_turn(tokenizer, role, text):
    """A turn, its content in the form that the chat template knows."""
    content = text if writes_strings(tokenizer) else [{"type": "text", "text": text}]
    return {"role": role, "content": content}


def writes_strings(tokenizer):
    """Whether its chat template writes turns whose content is a text; some know lists alone, and
    leave texts out without a word, or raise an error. Raises ValueError where it writes neither."""
    text = "a text of its own"
    try:
        if text in rendered(tokenizer, [{"role": "user", "content": text}]):
            return True
    except ValueError:
        pass  # a list may do
    content = [{"type": "text", "text": text}]
    if text in rendered(tokenizer, [{"role": "user", "content": content}]):
        return False
    raise ValueError("the chat template leaves out what the user says: use an Instruct model's")


def end_of_turn(tokenizer):
    """The id of the special token that the chat template writes behind the assistant's text, or of
    the tokenizer's end token where it writes none."""
    turns = [as_turn(tokenizer, "user", "?"), as_turn(tokenizer, "assistant", "!")]
    behind = rendered(tokenizer, turns).rpartition("!")[2]
    for id, token in tokenizer.added_tokens_decoder.items():
        if token.special and behind.startswith(token.content):
            return id
    return tokenizer.eos_token_id


def open_tokenizer(folder):
    """The tokenizer in a checkpoint's folder, a Path.

    For some types of model transformers has a class that takes only words and merges from
    tokenizer.json, whatever that file holds: of a word-level one, as tools/init.py makes, it would
    drop the words in silence. Then the file itself is what counts.
    """
    tokenizer = AutoTokenizer.from_pretrained(folder)
    in_file = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))["model"]["type"]
    if type(tokenizer.backend_tokenizer.model).__name__ != in_file:
        tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    return tokenizer


def refuse_prefilled(tokenizer):
    """Raise ValueError for a chat template that begins the response itself, as a Thinking model's
    does with <think>: no rollout could then begin with its caption. One that closes what it begins,
    as Qwen3.5's does where it shall not think, is none."""
    text = rendered(tokenizer, [as_turn(tokenizer, "user", "?")], asks=True)
    behind = text.rpartition("?")[2]
    begun = [name for name in PARTS if behind.count(f"<{name}>") > behind.count(f"</{name}>")]
    if begun:
        raise ValueError(
            f"the chat template begins each response with <{begun[0]}>, as a Thinking model's does,"
            f" but responses here begin with {TAGS[0]}: start from an Instruct model, or take "
            f"<{begun[0]}> out of the end of chat_template.jinja. Where the template asks for "
            "enable_thinking, write {%- set enable_thinking = false %} at its head"
        )


def refuse_without_system(tokenizer):
    """Raise ValueError for a chat template that leaves the system turn out, or has an error with
    it: nothing would ask for the response's form. It may stand in the user's turn, as Gemma's."""
    texts = {"system": "what the system says", "user": "what the user says"}
    turns = [as_turn(tokenizer, role, text) for role, text in texts.items()]
    mend = f"Write at the head of the chat template: {MERGES}"
    try:
        written = rendered(tokenizer, turns, asks=True)
    except ValueError as error:
        raise ValueError(f"{error}. {mend}") from error
    for role, text in texts.items():
        if text not in written:
            raise ValueError(
                f"the chat template leaves out the {role} turn where a conversation has a system "
                f"turn, which is what asks for {FORM}. {mend}"
            )


def ids_of(named):
    """A configuration names one id, several, or none."""
    if named is None:
        return []
    return named if isinstance(named, list) else [named]


def write_template(tokenizer, folder):
    """The chat template of a checkpoint's folder (a Path), in one place: chat_template.jinja. Other
    templates that the tokenizer has by name, as tool_use, stand in additional_chat_templates, as
    transformers writes and reads them.

    It asks for the three parts where a conversation has no system turn, unless the vocabulary lacks
    the words, as the embedded world's does. Then the model's own template lies beside it, in
    chat_template_plain.jinja: TRL knows a template by its text alone (docs/other_tools.md). The
    named ones stay as they are.
    """
    words = tokenizer(SYSTEM_PROMPT)["input_ids"]
    templates = templates_of(tokenizer)
    default = templates.pop("default")
    if tokenizer.unk_token_id not in words:
        (folder / "chat_template_plain.jinja").write_text(default, encoding="utf-8")
        default = (ASKS if writes_strings(tokenizer) else ASKS_IN_LISTS) + default
    (folder / "chat_template.jinja").write_text(default, encoding="utf-8")
    for name, template in templates.items():
        file = folder / "additional_chat_templates" / f"{name}.jinja"
        file.parent.mkdir(exist_ok=True)
        file.write_text(template, encoding="utf-8")
    # Of transformers 4, whose processors prefer it.
    (folder / "chat_template.json").unlink(missing_ok=True)
    file = folder / "tokenizer_config.json"
    settings = json.loads(file.read_text(encoding="utf-8"))
    if settings.pop("chat_template", None):
        file.write_text(json.dumps(settings, indent=2, ensure_ascii=False), encoding="utf-8")


# ---------------------------------------------------------------------------------- drift proxies
CHINESE = "一二三四五六七八九十"
CIRCLED = "①②③④⑤⑥⑦⑧⑨⑩⑪⑫⑬⑭⑮⑯⑰⑱⑲⑳"
# What marks an item or a step, at the start of a line or of a part behind `;`
MARKS = (
    r"[-*+•][^\S\n]+\S",  # - a
    r"[•‣◦▪●○■◆·・–—][^\S\n]*\S",  # – a, •a
    r"\d{1,3}(?:\*\*|__)?[.):](?:\*\*|__)?[^\S\n]+\S",  # 1. a, 2) a, **3.** a, 4: a
    r"[(（](?:\d{1,3}|[a-z]|[ivx]{1,4}|[一二三四五六七八九十]{1,3})[)）]",  # (1), (a), (iv), （一）
    r"[a-z]\)[^\S\n]+\S",  # a) a
    rf"(?:\d{{1,3}}|[{CHINESE}]{{1,3}})[、．）][^\S\n]*\S",  # 1、a, 一、a
    rf"[{CIRCLED}]",
    rf"(?:step|步骤)[^\S\n]*(?:\d{{1,3}}|[{CHINESE}]{{1,3}})",  # Step 1
    rf"第(?:\d{{1,3}}|[{CHINESE}]{{1,3}})步",
)
MARK_AT_START = re.compile(
    rf"(?im)(?:^|[;；])[^\S\n]*+(?:#+[^\S\n]+|\*\*|__)?(?:{'|'.join(MARKS)})"
)
# Marks anywhere in a line: they count where they run 1, 2, 3 .., at least to the second.
RUNNING_MARKS = (
    re.compile(r"(?<![A-Za-z\d])[(（](\d{1,2}|[a-z])[)）]"),  # (1) a (2) b; not f(1) or f(2)
    re.compile(rf"([{CIRCLED}])"),
    re.compile(r"(?i)\bstep (\d{1,2})\b"),
    re.compile(rf"第(\d{{1,2}}|[{CHINESE}])步"),
    re.compile(r"(?:^|(?<=[.;:!?]\s)|(?<=[。；：！？]))(\d{1,2})[.)]\s"),  # 1. a. 2. b.
)
# A number and words, where a line or a part starts: "1 red circle ; 2 blue square", not "12 cm".
BARE_NUMBER = re.compile(r"(?m)(?:^|[;；])[^\S\n]*+(\d{1,3})[^\S\n]+[^\W\d]")
# A full stop that ends no sentence
ABBREVIATION = re.compile(
    r"\b(?:[Ee]\.g|[Ii]\.e|[Vv]s|[Cc]f|[Aa]pprox|[Ff]igs?|[Ee]qs?|Dr|Mrs?|Ms|Prof|St|Jr|Sr)\.(?=\s)"
    r"|\b(?:etc|al|resp|[ap]\.m|U\.S)\.(?=\s+[a-z(])|\b[Nn]os?\.(?=\s+\d)"
)
SENTENCE_END = re.compile(r"(?<=[.!?])\s|(?<=[.!?][\"')\]”’])\s|(?<=[。！？])")


def count_items(caption) -> int:
    """Items of a caption: marked ones (bullets, numbers, letters), else parts behind `;`, else
    sentences. For rollouts and references alike."""
    text = re.sub(r"</?caption>", "", caption).strip()
    marked = _marked(text, RUNNING_MARKS)
    if marked:
        return marked
    if re.search("[;；]", text):
        return _filled(re.split("[;；]", text))
    return _filled(_sentences(text))


def count_steps(think) -> int:
    """Steps of a reasoning: marked ones (numbers, letters, bullets, "Step 1"), else lines, else
    sentences. For rollouts and references alike."""
    text = re.sub(r"</?think>", "", think).strip()
    marked = _marked(text, (*RUNNING_MARKS, BARE_NUMBER))
    if marked:
        return marked
    if "\n" in text:
        return _filled(text.splitlines())
    return _filled(_sentences(text))


def _marked(text, running):
    """The number of marks in a text: of those that start lines, or of those that run 1, 2, 3 .."""
    most = len(MARK_AT_START.findall(text))
    for pattern in running:
        n = 0
        for label in pattern.findall(text):
            if _place(label) == n + 1:
                n += 1
        if n > 1:
            most = max(most, n)
    return most


def _place(label):
    """1 of "1", "a", "①" and "一"."""
    if label.isdecimal():
        return int(label)
    for order in (ascii_lowercase, CIRCLED, CHINESE):
        if label in order:
            return order.index(label) + 1
    return 0


def _sentences(text):
    return SENTENCE_END.split(ABBREVIATION.sub("", text))


def _filled(pieces):
    """How many pieces hold a letter or a digit."""
    return sum(re.search(r"\w", piece) is not None for piece in pieces)


# -------------------------------------------------------------------------------------- the check
@dataclass(kw_only=True)
class Check:
    """The flags of `python data.py check`; those of the stages have their names and defaults."""

    kind: Literal[KINDS] | None = option(
        None, "what the rows are for; none: what each row's fields suggest"
    )
    policy: str = option(
        "", "checkpoint, or a folder with its tokenizer and configurations, to count tokens with"
    )
    against: tuple[str, ...] = option(
        (), "files to test on: a warning where they share images or questions with the file"
    )
    texts: int = option(20_000, "rows whose text is read, drawn at random; 0: all")
    rows: int = option(
        2000, "of these, rows whose images and tokens are looked at; 0: all of these"
    )
    seed: int = option(0, "of the drawing")
    show: int = option(1, "rows to show, the first that are usable")
    max_prompt: int = option(Common.max_prompt, "tokens, image tokens included", least=1)
    max_response: int = option(Common.max_response, "tokens, end token included", least=1)
    max_pixels: int | None = option(None, "of one image, larger ones are scaled down", least=1)
    max_side: int | None = option(None, "pixels, of one image's longer side", least=1)
    image_root: str | None = option(
        None, "folder that image paths are relative to and stay in; none: the data file's"
    )

    def __post_init__(self):
        check_numbers(self)
        if self.image_root is not None and not os.path.isdir(self.image_root):
            raise ValueError(f"--image_root {self.image_root}: no such folder")


def main(argv=None):
    """Check files; exit status 1 where one has no usable row, 2 where one cannot be opened."""
    files, args = parse_check(argv)
    encoder = None
    try:
        if args.policy:
            limits = {"max_pixels": args.max_pixels, "max_side": args.max_side}
            encoder = open_encoder(args.policy, max_prompt_tokens=math.inf, **limits)
        opened = [read(path, args.kind, args.image_root) for path in files]
        held_out = [read(path, None, args.image_root) for path in args.against]
    except (OSError, ImportError, ValueError) as error:
        end(f"data.py: {error}")
    usable = []
    for data in opened:
        found = Inspection(data, args, split_spans, encoder)
        for look in found.looks[: args.show]:
            print(shown(data[look.index], encoder))
        print("\n".join(found.lines()))
        for other in held_out:
            print("\n".join(found.compare(other).lines()))
        usable.append(bool(found.looks))
    sys.exit(0 if all(usable) else 1)


def parse_check(argv):
    """(files, Check) of the command line."""
    parser = make_parser(Check)
    parser.add_argument("command", choices=["check"])
    parser.add_argument("file", nargs="+", help="JSON, JSONL or parquet")
    argv = sys.argv[1:] if argv is None else argv
    refuse_unknown_flags(parser, argv)
    given = vars(parser.parse_args(argv))
    given.pop("command")
    files = given.pop("file")
    try:
        return files, Check(**given)
    except ValueError as error:
        parser.error(str(error))


def shown(row, encoder):
    """A row as text: its turns, as the policy sees them where there is an encoder, and what is read
    of the reference."""
    example = row.example if isinstance(row, PairExample) else row
    lines = []
    if encoder is None:
        lines.append(f"{example.where}, as it is read, with {len(example.images)} image(s)")
        for turn in example.messages:
            lines.append(f"[{turn['role']}]\n{turn['content']}")
    else:
        prompt, _ = encoder.conversation(example)
        text = encoder.tokenizer.decode(prompt.ids[~prompt.image_mask])
        of_images = int(prompt.image_mask.sum())
        lines.append(
            f"{example.where}, as the policy sees it: {len(prompt.ids)} tokens, {of_images} of "
            f"them image (not shown)\n{text}"
        )
    if isinstance(row, PairExample):
        for span, (reference, policy) in row.pairs.items():
            lines.append(f"[{span}, of the reference]\n{reference}")
            lines.append(f"[{span}, of the policy]\n{policy}")
    elif example.response is not None:
        texts = split_spans(example.response)
        if texts is None:
            lines.append(f"[the reference is not {FORM}: no spans]\n{example.response}")
        else:
            for span, text in zip(SPANS, texts, strict=True):
                lines.append(f"[{span}, of the reference]\n{text}")
    lines.append(f"[answer] {example.answer!r}")
    if example.equivalent:
        lines.append(f"[equivalent] {example.equivalent}")
    if example.choices:
        lines.append(f"[choices] {example.choices}")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
