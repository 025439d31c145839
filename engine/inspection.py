"""
What a data file holds, for whoever is about to train on it: `python data.py check` prints it.

    found = Inspection(data, args, split_spans, encoder)
    print("\\n".join(found.lines()))
    print("\\n".join(found.compare(held_out).lines()))    # what two files share

A large file is not looked at whole. Of `args.texts` rows the text is read: is it usable, what is
the answer, does one row repeat another? Of `args.rows` of these images are opened and tokens
counted, which takes a hundred times as long. Both samples are drawn at random by a seed, and what
is printed says of how many rows it speaks.
"""

from __future__ import annotations

import hashlib
import math
import os
import random
import re
import time
from collections import Counter, defaultdict
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from tqdm import tqdm

from engine.answers import MAX_CHARS
from engine.arguments import Common
from engine.benchmarks import is_among
from engine.kinds import deciding_kind
from engine.rows import BadRow, open_image, shrink
from engine.spelling import clean

BATCH = 256  # rows whose images wait at once for their tokens to be counted
SHOWN = 3  # answers that are shown of those that can only be compared as text
LONG = 5  # words: hardly a policy gives a longer answer word for word


@dataclass
class Look:
    """What is measured of one row."""

    index: int  # of the row in the file
    row: object  # an Example or a PairExample; None once it is measured
    sizes: list = field(default_factory=list)  # (width, height) of each image in the file
    shrunk: list = field(default_factory=list)  # the same within --max_side
    error: BadRow | None = None
    prompt: int | None = None  # tokens, those of images included; None: nothing counts them
    image: int | None = None  # tokens
    responses: list = field(default_factory=list)  # tokens of the reference; of pairs, of each side
    limits: list = field(default_factory=list)  # for which a stage leaves the row out


class Inspection:
    """
    What is found in a file.

    data: engine.rows.Data. args: those of data.Check. split_spans: as data.split_spans, the texts
    of a response's spans, None where it is malformed. encoder: data.Encoder without a limit on the
    prompt; None: no tokens are counted.
    """

    def __init__(self, data, args, split_spans, encoder=None):
        self.data = data
        self.args = args
        self.split_spans = split_spans
        self.encoder = encoder
        # of the text
        self.read = sample(range(len(data)), args.texts, args.seed)
        self.good = []  # those of `read` whose text is usable
        self.bad_text = BadRows()
        self.kinds = Counter()  # kind of answer -> rows
        self.texts = []  # answers that can only be compared as text
        self.references = 0
        self.malformed = 0  # references
        self.questions = defaultdict(list)  # digest of a question -> [(row, sizes of its files)]
        self.repeats = []  # (row, the earlier row that it repeats, do the answers differ?)
        # of images and tokens
        self.looks = []  # of a sample of `good`
        self.bad_look = BadRows()

        begin = time.perf_counter()
        self.read_texts()
        self.find_repeats()
        self.seconds_a_text = (time.perf_counter() - begin) / len(self.read)
        self.looked = sample(self.good, args.rows, args.seed)
        self.look_at_rows()

    # ------------------------------------------------------------------------------- the text
    def read_texts(self):
        for i in tqdm(self.read, "text", unit="row", disable=None):
            try:
                example = example_of(self.data[i])
            except BadRow as error:
                self.bad_text.add(error)
                continue
            self.good.append(i)
            kind = kind_of_answer(example.answer, example.choices)
            self.kinds[kind] += 1
            if kind == TEXT:
                self.texts.append(example.answer)
            if example.response is not None:
                self.references += 1
                self.malformed += self.split_spans(example.response) is None
            sizes = tuple(file_size(image) for image in example.images)
            self.questions[question_digest(example)].append((i, sizes))

    def find_repeats(self):
        """Rows of one question, and of images of the same digests."""
        for rows in self.questions.values():
            by_sizes = defaultdict(list)  # only files of one size are opened and compared
            for i, sizes in rows:
                by_sizes[sizes].append(i)
            for alike in by_sizes.values():
                if len(alike) > 1:
                    self.repeats += self.repeats_among(alike)
        self.repeats.sort()

    def repeats_among(self, rows):
        first = {}  # digests of a row's images -> (the first row that has them, its answer's words)
        for i in rows:
            example = example_of(self.data[i])
            answer = words_of(example.answer or "")
            earlier, its_answer = first.setdefault(image_digests(example), (i, answer))
            if earlier != i:
                yield i, earlier, answer != its_answer

    # --------------------------------------------------------------------- images and tokens
    def look_at_rows(self):
        what = "images and tokens" if self.encoder else "images"
        bar = tqdm(total=len(self.looked), desc=what, unit="row", disable=None)
        with ThreadPoolExecutor() as pool:
            for start in range(0, len(self.looked), BATCH):
                # Images are opened in threads. Tokens are not counted there: a tokenizer has
                # settings that every call changes.
                for look in pool.map(self.open, self.looked[start : start + BATCH]):
                    self.count(look)
                    bar.update()
        bar.close()

    def open(self, i) -> Look:
        look = Look(i, self.data[i])
        example = example_of(look.row)
        try:
            for source in example.images:
                image = open_image(source, example.where)
                look.sizes.append(image.size)
                look.shrunk.append(shrink(image, self.args.max_side).size)
        except BadRow as error:
            look.error = error
        return look

    def count(self, look):
        """Count a row's tokens, and keep its Look."""
        if self.encoder and look.error is None:
            try:
                self.count_tokens(look)
            except BadRow as error:
                look.error = error
        if look.error is None:
            look.row = None  # its images' bytes would fill the memory
            self.looks.append(look)
        else:
            self.bad_look.add(look.error)

    def count_tokens(self, look):
        """The limits are those of the stages: SFT's is on the whole conversation, alignment's on
        prompt and response apart."""
        args = self.args
        example = example_of(look.row)
        look.prompt, look.image, trained = self.encoder.lengths(example, look.shrunk)
        if example.messages[-1]["role"] == "assistant":  # a whole conversation, SFT's
            look.responses = [trained]
            if look.prompt + trained > args.max_prompt + args.max_response:
                look.limits.append("--max_prompt and --max_response together")
            return
        look.prompt += trained  # earlier answers of several turns
        for spans in self.sides(look.row):
            look.responses.append(sum(len(self.encoder.response(text)) for text in spans))
        if look.prompt > args.max_prompt:
            look.limits.append("--max_prompt")
        if self.has_response_limit([look]) and max(look.responses) > args.max_response:
            look.limits.append("--max_response")

    def has_response_limit(self, looks):
        """RLVR and evaluation do not read references."""
        return self.args.kind not in ("rl", "eval") and any(look.responses for look in looks)

    def sides(self, row):
        """The texts that make up the response; of pairs, the spans of either side."""
        if hasattr(row, "pairs"):
            return zip(*row.pairs.values(), strict=True)
        return [] if row.response is None else [(row.response,)]

    # --------------------------------------------------------------------------- in words
    def lines(self):
        yield from self.lines_of_usable()
        if self.looks:
            yield from self.lines_of_sizes()
            yield from self.lines_of_limits()
            yield from self.lines_of_answers()
            yield from self.lines_of_repeats()

    def lines_of_usable(self):
        rows = len(self.data)
        read = len(self.read)
        usable = len(self.good)
        if len(self.looked) == len(self.good):
            usable -= self.bad_look.total()
        if read == rows:
            yield f"{self.data.path}: {usable:,} of {rows:,} rows usable"
        else:
            yield f"{self.data.path}: {rows:,} rows; of {read:,} drawn at random {usable:,} usable"
            seconds = self.seconds_a_text * rows
            yield f"  --texts 0 reads all, in about {duration(seconds)}, but opens no image more"
        if len(self.looked) < len(self.good):
            what = "images opened, tokens counted" if self.encoder else "images opened"
            of = f"only of {len(self.looked):,} of these (--rows)"
            yield f"  {what} {of}, drawn at random: {len(self.looks):,} usable"
        yield from self.bad_text.lines()
        yield from self.bad_look.lines()
        too_long = sum(1 for look in self.looks if look.limits)  # they are bad rows, too
        of_looked = (self.bad_look.total() + too_long) / max(1, len(self.looked))
        share = self.bad_text.total() / read + len(self.good) / read * of_looked
        bad = round(share * rows)
        if bad > Common.max_bad:
            limit = f"more than --max_bad, by default {Common.max_bad}"
            what = f"{bad:,} bad or too long rows of {rows:,} are {limit}"
            yield f"  a stage would stop: {what}"

    def lines_of_sizes(self):
        looks = self.looks
        table = {}
        if self.encoder:
            table["prompt, tokens"] = [look.prompt for look in looks]
            table["  of them image"] = [look.image for look in looks if look.sizes]
            table["reference, tokens"] = [look.responses[0] for look in looks if look.responses]
            pairs = [look for look in looks if len(look.responses) == 2]
            table["policy's, tokens"] = [look.responses[1] for look in pairs]
        sizes = [size for look in looks for size in look.sizes]
        table["images in a row"] = [len(look.sizes) for look in looks]
        table["image, width"] = [width for width, _ in sizes]
        table["image, height"] = [height for _, height in sizes]
        table["image, pixels"] = [width * height for width, height in sizes]
        yield ""
        yield " " * 20 + "".join(f"{name:>11}" for name in QUANTILES)
        for name, values in table.items():
            if values:
                cells = [f"{quantile(values, q):>11,}" for q in QUANTILES.values()]
                yield f"{name:<20}" + "".join(cells)

    def lines_of_limits(self):
        args = self.args
        yield ""
        if self.encoder:
            flags = f"--max_prompt {args.max_prompt}"
            if self.has_response_limit(self.looks):
                flags += f", --max_response {args.max_response}"
            out = [look for look in self.looks if look.limits]
            yield f"left out by {flags}: {share_of(len(out), len(self.looks))} rows"
            for limit, n in Counter(limit for look in out for limit in look.limits).items():
                yield f"  {n:,} by {limit}"
        else:
            yield "no tokens are counted without a tokenizer: --policy CHECKPOINT"
        yield from self.lines_of_scaling()

    def lines_of_scaling(self):
        images = sum(len(look.sizes) for look in self.looks)
        smallest, largest = self.pixel_limits()
        limits = []
        if largest < math.inf:
            limits.append(f"{largest:,} pixels")
        if self.args.max_side:
            limits.append(f"a side of {self.args.max_side:,}")
        down = 0
        up = 0
        for look in self.looks:
            for (width, height), shrunk in zip(look.sizes, look.shrunk, strict=True):
                down += width * height > largest or shrunk != (width, height)
                up += width * height < smallest
        if images and limits:
            yield f"scaled down to {' and '.join(limits)}: {share_of(down, images)} images"
        if images and smallest:
            yield f"scaled up to {smallest:,} pixels: {share_of(up, images)} images"

    def pixel_limits(self):
        """(least, most) pixels of an image as the model sees it."""
        if self.encoder and self.encoder.images.limits:
            limits = self.encoder.images.limits
            return limits["shortest_edge"], limits["longest_edge"]
        return 0, self.args.max_pixels or math.inf

    def lines_of_answers(self):
        good = len(self.good)
        yield ""
        if self.malformed:
            form = "references that are not in the response's form"
            yield f"{form}: {share_of(self.malformed, self.references)}"
        yield "answers, as the verifier takes them"
        for kind, n in self.kinds.most_common():
            yield f"  {kind:<18}{n:>9,}{100 * n / good:>9.1f} %"
        if self.texts:
            long = sum(1 for text in self.texts if len(text.split()) > LONG)
            some = ", ".join(f"{text[:60]!r}" for text in list(dict.fromkeys(self.texts))[:SHOWN])
            yield f"  {TEXT}: only the same words are right: {some}"
            yield f"  {long:,} of these have more than {LONG} words"

    def lines_of_repeats(self):
        good = len(self.good)
        yield ""
        yield f"rows that ask what an earlier one asks: {share_of(len(self.repeats), good)}"
        if self.repeats:
            row, earlier, _ = self.repeats[0]
            differ = sum(1 for *_, answers_differ in self.repeats if answers_differ)
            yield f"  such as row {row + 1}, like row {earlier + 1}"
            yield f"  {differ:,} of them have another answer"
        if len(self.read) < len(self.data):
            yield f"  sought among {good:,} rows only: most repeats in the file are not found"
        yield f"  ({HOW_COMPARED})"

    # ------------------------------------------------------------------------ against another
    def compare(self, held_out) -> Overlap:
        """What this file's rows that were read share with a file to test on, engine.rows.Data."""
        overlap = Overlap(self, held_out)
        tests = {}  # row of the test file -> (its question, its images' digests)
        test_files = set()  # sizes of the test file's images, in bytes
        for i in sample(range(len(held_out)), self.args.texts, self.args.seed):
            try:
                example = example_of(held_out[i])
            except BadRow as error:
                overlap.bad.add(error)
                continue
            tests[i] = (question_digest(example), image_digests(example))
            test_files.update(file_size(image) for image in example.images)
        overlap.tests = len(tests)

        asked = {question for question, _ in tests.values()}
        first_by_image = {}
        first_by_both = {}
        for question, rows in self.questions.items():
            for i, sizes in rows:
                same_size = test_files.intersection(sizes)
                if not same_size and (sizes or question not in asked):
                    continue  # none of its images can be one of the test file's
                digests = image_digests(example_of(self.data[i]), same_size)
                for digest in digests:
                    first_by_image.setdefault(digest, i)
                first_by_both.setdefault((question, digests), i)
        for i, (question, digests) in tests.items():
            images = [first_by_image[digest] for digest in digests if digest in first_by_image]
            if (question, digests) in first_by_both:
                overlap.same[i] = first_by_both[question, digests]
            if images:
                overlap.same_image[i] = images[0]
            if question in self.questions:
                overlap.same_question[i] = self.questions[question][0][0]
        return overlap


class Overlap:
    """What two files share: {row of the file to test on: row of the one to train on}."""

    def __init__(self, inspection, held_out):
        self.inspection = inspection
        self.held_out = held_out
        self.tests = 0  # rows of it that were read
        self.bad = BadRows()  # of the others
        self.same = {}  # the same question about the same images
        self.same_image = {}  # an image, whatever the question
        self.same_question = {}  # the question, whatever the images

    def lines(self):
        inspection = self.inspection
        shared = self.same or self.same_image
        yield ""
        yield f"{'WARNING: shared' if shared else 'shared'} with {self.held_out.path}"
        yield from self.line("the same question about the same images", self.same)
        yield from self.line("an image, whatever is asked", self.same_image)
        yield from self.line("a question, whatever the images", self.same_question)
        if self.bad.total():
            yield f"  {self.bad.total():,} other rows there are unusable:"
            yield from self.bad.lines()
        if len(inspection.read) < len(inspection.data):
            rows = f"{len(inspection.good):,} rows here, of {len(inspection.data):,}"
            yield f"  sought among {rows}: most of what they share is not found"

    def line(self, what, rows):
        where = ""
        if rows:
            there, here = next(iter(rows.items()))
            where = f" (row {there + 1} there, row {here + 1} here)"
        yield f"  {len(rows):,} of its {self.tests:,} rows: {what}{where}"


class BadRows:
    """Bad rows, counted by reason; of each reason the first stays."""

    def __init__(self):
        self.counts = Counter()
        self.first = {}

    def add(self, error):
        self.counts[error.what] += 1
        self.first.setdefault(error.what, error)

    def total(self):
        return self.counts.total()

    def lines(self):
        for what, n in self.counts.most_common():
            yield f"  {n:,} {what}"
            yield f"    {self.first[what]}"


# ------------------------------------------------------------------------------ kinds of answers
TEXT = "text"
NO_ANSWER = "none"


def kind_of_answer(answer, choices=()):
    """What the verifier takes a reference for: the kind of answer that decides about it and itself.
    TEXT: only the same words are right."""
    if answer is None:
        return NO_ANSWER
    if len(answer) > MAX_CHARS:
        return TEXT
    gold = clean(answer)
    kind = deciding_kind(gold, gold)
    if choices and is_among(answer, choices):
        return "option's letter" if kind in ("choice", "letters") else "option's text"
    return SAID.get(kind, kind) or TEXT


SAID = {  # kinds of engine/kinds.py whose names say little outside of it
    "choice": "option's letter",
    "letters": "option's letter",
    "truth": "yes or no",
    "clock": "time",
    "measure": "number",
    "collection": "list or interval",
    "interval": "list or interval",
    "assignment": "equation",
    "code": TEXT,
    "quotient_of_formulas": "formula",
    "place_in_order": "place in an order",
    "decimal_comma": "number",
    "opening_hours": "opening hours",
}


# ------------------------------------------------------------------------------ what is compared
HOW_COMPARED = (
    "questions are compared word by word, up to case, spaces and punctuation; images byte by byte"
)


def words_of(text):
    """A text's words: case, white space and punctuation do not count, other signs are words."""
    return re.findall(r"\w+|[^\w\s.,;:!?'\"]", text.casefold())


def question_digest(example):
    """Of the users' turns, whatever the system prompt and the images' places."""
    turns = [turn["content"] for turn in example.messages if turn["role"] == "user"]
    text = " ".join(words_of(" ".join(turns).replace("<image>", " ")))
    return hashlib.blake2b(text.encode(), digest_size=12).digest()


def image_digests(example, sizes=None):
    """A digest of each image's bytes; sizes: those of other sizes in bytes are None, unread."""
    digests = []
    for image in example.images:
        if sizes is not None and file_size(image) not in sizes:
            digests.append(None)
            continue
        try:
            content = Path(image).read_bytes() if isinstance(image, str) else bytes_of(image)
            digests.append(hashlib.blake2b(content, digest_size=12).digest())
        except OSError:
            digests.append(image)  # no reader may see it: like no other file
    return tuple(digests)


def file_size(image):
    return os.path.getsize(image) if isinstance(image, str) else len(bytes_of(image))


def bytes_of(image):
    """Of an image in memory: a file's, or a PIL image's pixels."""
    return image if isinstance(image, bytes) else image.tobytes()


# -------------------------------------------------------------------------------------- the rest
def example_of(row):
    """The Example of a row, which may be a PairExample."""
    return getattr(row, "example", row)


def sample(rows, k, seed):
    """k of the rows, drawn at random, in their order; all of them where k is 0."""
    if not 0 < k < len(rows):
        return rows
    return sorted(random.Random(seed).sample(rows, k))


QUANTILES = {"least": 0, "10 %": 0.1, "median": 0.5, "90 %": 0.9, "99 %": 0.99, "most": 1}


def quantile(values, q):
    """The smallest value that a share q of the values does not exceed."""
    place = math.ceil(round(q * len(values), 6))
    return sorted(values)[max(0, place - 1)]


def share_of(n, of):
    percent = f" ({100 * n / of:.1f} %)" if n else ""
    return f"{n:,} of {of:,}{percent}"


def duration(seconds):
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = seconds / 60
    return f"{minutes:.0f} min" if minutes < 90 else f"{minutes / 60:.0f} h"
