"""
Data: rows of the method's files -> examples -> prompts as the model sees them. Bad rows are named, counted, left out.

a. SFT     JSON, JSONL or parquet in LLaMA-Factory's "sharegpt" form, both dialects: messages [{role, content}] or
           conversations [{from, value}] and system?; images, one for each `<image>` in the users' turns
b. align,  verl form: prompt [{role, content}], images [path or {bytes, path}], reward_model {ground_truth,
   rl      equivalent_answers?}; for align also teacher_response, or teacher_caption + teacher_cot (think and answer)
c. pairs   image, prompt or question, and the fields teacher_* and student_*, each as in b
d. plain   image, question, choices?, answer (benchmarks.py: other names), for eval and rl. A plain question gets SYSTEM_PROMPT

Image paths are relative to the data file's folder, or to `image_root`, and must not lead out of it.

    python data.py check FILE [--kind sft|align|rl|pairs|eval] [--model CHECKPOINT] [--image_root FOLDER]
"""

from __future__ import annotations

import argparse
import math
import os
import re
import sys
from dataclasses import dataclass, field
from functools import partial

import torch
from tqdm import tqdm

from engine.answers import MAX_CHARS
from engine.benchmarks import standard
from engine.rows import BadRow, Data, Order, Rows, find_image, open_image  # noqa: F401 (Order, Rows: for the stages)

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
TAGS = ["<caption>", "</caption>", "<think>", "</think>", "<answer>", "</answer>"]
KINDS = ("sft", "align", "rl", "pairs", "eval")
ROLES = {
    "system": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
}


@dataclass
class Example:
    messages: (
        list  # [{"role", "content"}]; the last turn is the user's, in SFT data the assistant's
    )
    images: list = field(
        repr=False
    )  # path | bytes | PIL image, in the order of `<image>`; opened when encoded
    where: str = ""  # "file:row"
    row: int = -1  # index in the file, from 0
    response: str | None = None  # the reference
    answer: str | None = None
    choices: tuple = ()
    equivalent: tuple = ()  # other right answers
    source: str = ""


@dataclass
class PairExample:
    example: Example
    pairs: dict  # {"perception" | "reasoning": (reference's span, policy's span)}, canonical


@dataclass
class Prompt:
    ids: torch.Tensor  # (T,) int64
    positions: torch.Tensor  # (3, T) int64, multimodal rotary
    next_position: int  # where a child segment goes on
    pixel_values: torch.Tensor | None  # (P, C) float32, the patches of all images
    grid_thw: torch.Tensor | None  # (n, 3) int64
    image_mask: torch.Tensor  # (T,) bool
    example: Example


def read(path, kind=None, image_root=None, max_bad=100) -> Data:
    """Open a data file: data[i] is an Example, of kind "pairs" a PairExample. `kind`: what the rows are for, one of
    KINDS ("rl" and "eval" take any format with answers); None: as each row's fields suggest."""
    if kind not in (None, *KINDS):
        raise ValueError(f"kind is one of {', '.join(KINDS)}, not {kind!r}")
    root = os.path.abspath(image_root or os.path.dirname(path) or ".")
    return Data(path, partial(to_example, kind=kind, root=root, links=bool(image_root)), max_bad)


# the response's form
def parts(response):
    """(caption, think, answer), stripped; None unless every tag occurs exactly once, in order, with nothing outside."""
    pieces = re.split(f"({'|'.join(TAGS)})", response) if isinstance(response, str) else []
    texts = [piece.strip() for piece in pieces[0::2]]
    return tuple(texts[1::2]) if pieces[1::2] == TAGS and not any(texts[0::2]) else None


def split_spans(response):
    """(perception, reasoning) in the one canonical form that the discriminator reads; None when malformed."""
    p = parts(response)
    return p and (
        f"<caption>\n{p[0]}\n</caption>",
        f"<think>\n{p[1]}\n</think>\n<answer>\n{p[2]}\n</answer>",
    )


# -------------------------------------------------------------------------------------------------- rows -> examples
def to_example(row, where="", index=-1, kind=None, root=".", links=True):
    """A row of any of the formats as Example or PairExample. Raises BadRow."""
    bad = partial(BadRow, where)
    if not isinstance(row, dict):
        raise bad("the row is not an object", "Each row is {...} with named fields.")
    has = lambda *fields: any(row.get(field) for field in fields)  # noqa: E731
    kind = kind or (
        "pairs"
        if has("student_response", "student_caption")
        else "sft"
        if has("messages", "conversations")
        else "align"
        if has("teacher_response", "teacher_caption")
        else "eval"
    )
    row = standard(row, where) if kind in ("rl", "eval") else row
    extra, reward = row.get("extra_info") or {}, row.get("reward_model") or {}
    if not isinstance(extra, dict) or not isinstance(reward, dict):
        raise bad("reward_model or extra_info is not an object", "Write {..} with named fields.")
    images = row["images"] if row.get("images") is not None else row.get("image")
    images = images if isinstance(images, list) else [] if images is None else [images]
    images = [find_image(image, root, where, links) for image in images]
    choices = _strings(row.get("choices") or extra.get("choices"), "choices", where)
    messages, response = (
        _messages(row, len(images), choices, where),
        _written(row, "teacher", where),
    )
    if kind == "sft" and messages[-1]["role"] == "user" and response:
        messages.append({"role": "assistant", "content": response})
    elif kind != "sft" and messages[-1]["role"] == "assistant":
        response = messages.pop()["content"]
    if messages[-1]["role"] != ("assistant" if kind == "sft" else "user"):
        raise bad(
            "the last turn is missing",
            "SFT rows end with the assistant's turn, others hold the user's.",
        )
    written = parts(response or "")
    golds = _strings(
        row["answer"] if row.get("answer") is not None else reward.get("ground_truth"),
        "answer",
        where,
    )
    golds = golds or (written or ("", "", ""))[2:]
    golds += _strings(
        reward.get("equivalent_answers") or row.get("equivalent_answers"),
        "equivalent_answers",
        where,
    )
    golds = tuple(gold for gold in golds if gold.strip())
    if kind in ("rl", "eval") and (not golds or len(golds[0]) > MAX_CHARS):
        mend = "Give `answer` or `reward_model.ground_truth`, or leave the row out."
        raise bad(f"no answer, or one of more than {MAX_CHARS} characters", mend)
    if kind == "align" and not all(written or [""]):
        raise bad(
            "the reference lacks the three parts",
            "Write <caption>, <think>, <answer>, each once, none empty.",
        )
    answer, source = golds[0] if golds else None, str(row.get("data_source") or "")
    example = Example(messages, images, where, index, response, answer, choices, golds[1:], source)
    if kind != "pairs":
        return example
    sides = [split_spans(side or "") for side in (response, _written(row, "student", where))]
    if None in sides:
        side = "teacher_*" if sides[0] is None else "student_*"
        raise bad(
            "a side of the pair lacks the three parts", "Leave malformed responses out.", side
        )
    return PairExample(
        example, dict(zip(("perception", "reasoning"), zip(*sides, strict=True), strict=True))
    )


def _messages(row, n_images, choices, where):
    bad = partial(BadRow, where)
    dialects = {
        "conversations": ("from", "value"),
        "messages": ("role", "content"),
        "prompt": ("role", "content"),
    }
    field = next((field for field in dialects if row.get(field) is not None), "prompt")
    turns, (role, content) = row.get(field), dialects[field]
    if (
        field == "prompt"
        and not isinstance(turns, list)
        and not str(turns).lstrip().startswith("[{")
    ):  # JSON in a text
        question = _text(
            row.get("question") or turns,
            "question",
            where,
            " (or `messages`, `conversations`, `prompt`)",
        )
        turns = [("system", SYSTEM_PROMPT), ("user", _question(question, n_images, choices))]
    elif not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        raise bad(
            f"`{field}` is not a list of turns", f'Write [{{"{role}": .., "{content}": ..}}, ..].'
        )
    else:
        turns = [
            (ROLES.get(str(turn.get(role))), _text(turn.get(content), content, where))
            for turn in turns
        ]
    if row.get("system") and turns and turns[0] != ("system", row["system"]):
        turns.insert(0, ("system", _text(row["system"], "system", where)))
    roles = [role for role, _ in turns][bool(turns and turns[0][0] == "system") :]
    if not roles or any(role != ("user", "assistant")[i % 2] for i, role in enumerate(roles)):
        raise bad(
            "turns do not alternate",
            "An optional system turn, then user, assistant, user, ..",
            roles,
        )
    if any("<image>" in text for role, text in turns if role != "user"):
        raise bad(
            "<image> outside a user's turn", "Move it into a user's turn, or out of the text."
        )
    if (n := sum(text.count("<image>") for _, text in turns)) != n_images:
        raise bad(
            "not one <image> for each image",
            "Write it where each stands.",
            f"{n} <image>, {n_images} images",
        )
    return [{"role": role, "content": text} for role, text in turns]


def _question(text, n_images, choices):
    """A plain question as a user's turn: images first, as in the paper's data, then the text, then lettered options.

    `<image1>`, `<image2>` (MATH-Vision: parts of one picture): a single one at an end goes, others become words. What
    the picture letters ("A", "(B)"), or the question lists in this order, is not written again.
    """
    if "<image>" not in text:
        if len(re.findall(r"<image ?\d+>", text)) == 1:
            text = re.sub(r"^<image ?\d+>\s*|(?<!\s)\s*<image ?\d+>$", "", text.strip())
        text = "<image>\n" * n_images + re.sub(r"<image ?(\d+)>", r"(image \1)", text)
    found = re.match("", text)
    for (
        choice
    ) in choices:  # one after the other: as one pattern with gaps it could take exponential time
        found = found and re.compile(rf"(?<!\w){re.escape(choice)}(?!\w)").search(text, found.end())
    if found or all(re.fullmatch(r"\(?[A-Z][).]?", choice) for choice in choices):
        return text
    return "\n".join(
        [text, "Options:", *(f"({chr(65 + i)}) {choice}" for i, choice in enumerate(choices))]
    )


def _written(row, side, where):
    """A side's response, from `{side}_response`, or from `{side}_caption` and `{side}_cot` (think and answer)."""
    whole, caption, cot = (f"{side}_{part}" for part in ("response", "caption", "cot"))
    if row.get(whole):
        return _text(row[whole], whole, where)
    if not row.get(caption) and not row.get(cot):
        return None
    caption, cot = _text(row.get(caption), caption, where), _text(row.get(cot), cot, where)
    return f"{caption if '<caption>' in caption else f'<caption>{caption}</caption>'}\n{cot}"


def _text(value, field, where, others=""):
    if not isinstance(value, str) or not value.strip() or re.search("[\ud800-\udfff]", value):
        raise BadRow(
            where,
            f"`{field}` is missing, empty or no valid text",
            f"Write `{field}`{others} as text in Unicode.",
        )
    return value


def _strings(value, field, where):
    values = (
        value if isinstance(value, list) else [] if value is None or value != value else [value]
    )
    texts = tuple(
        str(v)
        for v in values
        if isinstance(v, str) or (isinstance(v, int | float) and math.isfinite(v))
    )
    if (
        len(texts) < len(values)
        or re.search("[\ud800-\udfff]", "".join(texts))
        or (field, values) == ("choices", [value])
    ):
        raise BadRow(
            where,
            f"`{field}` is neither a text nor a list of texts",
            "Write texts in Unicode, `choices` as a list.",
        )
    return texts


# ------------------------------------------------------------------------------------------------ examples -> prompts
class Encoder:
    """Text and images -> token ids, for prompts, responses and conversations, in one way for all stages.

    The prompt is rendered by the chat template and tokenised apart from the response that follows it: a text has the
    same ids as a demonstration, a rollout's span and a reference's span. `rope_index`: the transformers model's
    `get_rope_index` (None: plain positions). `max_pixels`: images are scaled down to it. `blind`: images are left out.
    """

    def __init__(
        self,
        tokenizer,
        image_processor,
        config,
        rope_index=None,
        max_prompt_tokens=2048,
        max_pixels=None,
        blind=False,
    ):
        if not tokenizer.chat_template or tokenizer.eos_token_id is None:
            raise ValueError(
                "the tokenizer has no chat template or no end token: put chat_template.jinja beside it"
            )
        self.tokenizer, self.image_processor, self.rope_index = (
            tokenizer,
            image_processor,
            rope_index,
        )
        self.max_prompt_tokens, self.blind, self.image_id = (
            max_prompt_tokens,
            blind,
            config.image_token_id,
        )
        longest = min(
            image_processor.size["longest_edge"], max_pixels or float("inf")
        )  # areas, for all their names
        self.size = {
            "shortest_edge": min(image_processor.size["shortest_edge"], longest),
            "longest_edge": longest,
        }
        text, known = config.get_text_config(), set(tokenizer.get_vocab().values())
        media = [
            getattr(config, f"{kind}_token_id", None)
            for kind in ("image", "video", "vision_start", "vision_end")
        ]
        media = {i for i in media if i in known}
        self.eos = tokenizer.eos_token_id
        unused = set(range(text.vocab_size)) - known | {tokenizer.pad_token_id}
        self.banned = tuple(sorted((media | unused) - {self.eos, None}))
        more = getattr(text, "eos_token_id", None)
        more = more if isinstance(more, list) else [more]
        self.eos_ids = tuple(
            {self.eos: 0} | {i: 0 for i in more if i in known and i not in self.banned}
        )
        special = {t.content for t in tokenizer.added_tokens_decoder.values() if t.special}
        special |= set(tokenizer.convert_ids_to_tokens(sorted(media)))
        self.special = re.compile("|".join(map(re.escape, special)))

    def prompt(self, example) -> Prompt:
        """The prompt up to where the response starts. Raises BadRow (too long, a broken image, special tokens, ..)."""
        messages = example.messages[: -1 if example.messages[-1]["role"] == "assistant" else None]
        return self._encode(example, messages, self.max_prompt_tokens)[0]

    def conversation(self, example, max_tokens=None):
        """A whole conversation -> (Prompt, loss mask (T,) bool), True on the assistant's tokens and its end tokens."""
        return self._encode(example, example.messages, max_tokens or self.max_prompt_tokens)

    def response(self, text) -> list[int]:
        """Ids of a response or a span, and the end token. Special tokens in `text` count as plain characters."""
        return [*self._ids(text, split=True), self.eos]

    def decode(self, ids) -> str:
        """The text of sampled ids; an end token at the end is dropped, other special tokens stay visible."""
        ids = [int(i) for i in ids]
        ids = ids[:-1] if ids and ids[-1] in self.eos_ids else ids
        return self.tokenizer.decode(
            ids, skip_special_tokens=False, clean_up_tokenization_spaces=False
        )

    def _ids(self, text, split=False):
        return self.tokenizer(
            text, add_special_tokens=False, split_special_tokens=split, verbose=False
        )["input_ids"]

    def _render(self, messages, start_response):
        def content(text):  # text, or the list of text and image parts that templates know
            pieces = re.split("(<image>)", text.replace("<image>", "") if self.blind else text)
            pieces = [
                {"type": "image"} if p == "<image>" else {"type": "text", "text": p}
                for p in pieces
                if p
            ]
            return pieces if {"type": "image"} in pieces else "".join(p["text"] for p in pieces)

        messages = [message | {"content": content(message["content"])} for message in messages]
        return self.tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=start_response
        )

    def _encode(self, example, messages, limit):
        bad = partial(BadRow, example.where)
        for text in [message["content"] for message in messages] + [example.response or ""]:
            if found := self.special.search(text) or self.special.search(
                text.replace("<image>", "")
            ):  # as if blind
                raise bad(
                    "a special token in the text",
                    "Take it out: it would steer the model.",
                    found[0],
                )
        ids, trained, done = [], [], ""  # `done`: the text that `ids` stand for
        ends = [k for k, message in enumerate(messages) if message["role"] == "assistant"]
        for k in [*ends, len(messages)]:
            closed = (
                k == len(messages) and k - 1 in ends
            )  # what the template adds behind the last turn is not kept
            text = self._render(messages[:k], not closed)
            if not text.startswith(done):
                raise bad(
                    "the chat template rewrites assistant turns",
                    "Use an instruct model's template.",
                )
            ids += [] if closed else self._ids(text[len(done) :])
            trained += [False] * (len(ids) - len(trained))
            if k < len(messages):
                ids += self.response(messages[k]["content"])
                trained += [True] * (len(ids) - len(trained))
                done = text + messages[k]["content"] + self.tokenizer.eos_token
        ids, trained, pixels, grid = torch.tensor(ids), torch.tensor(trained), None, None
        images = (
            [] if self.blind else [open_image(image, example.where) for image in example.images]
        )
        slots, repeats = ids == self.image_id, torch.ones_like(ids)
        if slots.sum() != len(images):
            raise bad(
                "the chat template does not write the images",
                "Use the template of a vision-language model.",
            )
        if images:
            try:
                made = self.image_processor(images=images, size=self.size, return_tensors="pt")
            except ValueError as error:
                raise bad("an image has no usable shape", "Crop it.", str(error)) from None
            pixels, grid = made["pixel_values"], made["image_grid_thw"]
            repeats[slots] = grid.prod(-1) // self.image_processor.merge_size**2
        if repeats.sum() > limit:  # never cut
            detail = (
                f"{repeats.sum()}, of them {repeats[slots].sum()} of images, allowed are {limit}"
            )
            raise bad(
                "too many tokens",
                "Raise the limit, lower --max_pixels, or leave the row out.",
                detail,
            )
        ids, trained = ids.repeat_interleave(repeats), trained.repeat_interleave(repeats)
        mask, positions = ids == self.image_id, torch.arange(len(ids)).expand(3, -1)
        if images and self.rope_index:
            kinds = mask[None].int()
            positions = self.rope_index(
                input_ids=ids[None], mm_token_type_ids=kinds, image_grid_thw=grid
            )[0][:, 0]
        return Prompt(
            ids, positions, int(positions.max()) + 1, pixels, grid, mask, example
        ), trained


# ------------------------------------------------------------------------------------------- drift proxies, the check
def count_items(caption) -> int:
    """Items of a caption: bullet lines, else `;`-separated parts, else sentences. For rollouts and references alike."""
    text = re.sub(r"</?caption>", "", caption)
    items = text.split(";") if ";" in text else re.split(r"(?<=[.!?])\s", text)
    return len(re.findall(r"(?m)^[^\S\n]*+(?:[-*•+]|\d+[.)])\s+\S", text)) or sum(
        bool(item.strip()) for item in items
    )


def count_steps(think) -> int:
    """Steps of a reasoning: numbered items (a number, then words, where a line or a `;` part starts), else lines, else
    sentences. For rollouts and references alike."""
    text = re.sub(r"</?think>", "", think).strip()
    numbered = re.findall(
        r"(?im)(?:^|;)[ \t]*+[*#_]*+[ \t]*+(?:step +)?\d{1,3}(?:[.):*]+\s+\S|\s+[^\W\d])", text
    )
    steps = text.splitlines() if "\n" in text else re.split(r"(?<=[.!?])\s", text)
    return len(numbered) or sum(bool(step.strip()) for step in steps)


def main(argv=None):
    parser = argparse.ArgumentParser(
        description="say whether a data file is usable, show a row as the model sees it"
    )
    parser.add_argument("command", choices=["check"])
    parser.add_argument("file")
    parser.add_argument(
        "--kind", choices=KINDS, help="what the rows are for (default: by each row's fields)"
    )
    parser.add_argument(
        "--model", help="checkpoint to encode with (default: images are opened, nothing is encoded)"
    )
    parser.add_argument(
        "--image_root", help="folder that image paths are relative to (default: the file's)"
    )
    parser.add_argument(
        "--max_tokens", type=int, default=8192, help="rows with more are bad; needs --model"
    )
    args = parser.parse_args(argv)
    data, encoder, first = (
        read(args.file, args.kind, args.image_root, max_bad=float("inf")),
        None,
        [],
    )
    if args.model:
        from model import load

        encoder = load(args.model, max_prompt_tokens=args.max_tokens).encoder

    def look(row):
        example = getattr(row, "example", row)
        if not encoder:
            return row, *(open_image(image, example.where) for image in example.images)
        prompt = encoder.conversation(example)[0]
        text = encoder.tokenizer.decode(prompt.ids[~prompt.image_mask])
        return f"{example.where}: {len(prompt.ids)} tokens, {prompt.image_mask.sum()} of them image (not shown)\n{text}"

    try:
        for i in tqdm(range(len(data)), unit="row", disable=None):
            found = data.fetch([i], look)
            first = first or found
    except ValueError as error:
        print(error)
    usable = f"{args.file}: {len(data) - len(data.bad)} of {len(data)} rows usable"
    print(*first, usable, *(f"  {n} {what}" for what, n in data.skipped.most_common()), sep="\n")
    sys.exit(not first)


if __name__ == "__main__":
    import data  # not this `__main__`: its BadRow would be another class than the one that model.py's encoder raises

    data.main()
