"""
What lies on disk: rows of a data file by index, without loading the file; their images; the shuffled order in which
training takes them; and the account of the rows that cannot be used.

    rows = Rows("sft.jsonl")        # JSON array, JSONL or parquet, told apart by content
    rows[7]                         # a dict; JSON stays on disk, 16 bytes a row are kept in memory
    Order(len(rows), seed=0).take(4)
"""

import bisect
import io
import json
import os
import re
import sys
import tempfile
from array import array
from collections import Counter

import numpy as np
from PIL import Image, ImageOps

from engine.ranks import gather

CHUNK, MAX_ROW = 1 << 20, 1 << 28  # bytes: read at a time, and at most for one row of a JSON array
MAX_IMAGE = 50_000_000  # pixels of one file: more is taken for a bomb
FORMATS = (
    "PNG",
    "JPEG",
    "WEBP",
    "GIF",
    "BMP",
    "TIFF",
    "PPM",
    "JPEG2000",
)  # others (EPS) start programs


class BadRow(ValueError):
    """A row that cannot be used: `where` is "file:row" (from 1), `what` the reason that is counted, `mend` the cure."""

    def __init__(self, where, what, mend, detail=""):
        super().__init__(f"{where}: {what}{detail and f' ({str(detail)[:200]})'}. {mend}")
        self.where, self.what, self.mend = where, what, mend


class Rows:
    """Raises FileNotFoundError, ImportError (parquet without pyarrow), ValueError for a file without rows or whose rows
    cannot be told apart. A row that is broken by itself raises ValueError when it is read, as JSONL's can be."""

    def __init__(self, path):
        self.path, self.starts, self.ends, self.table = str(path), array("q"), array("q"), None
        if not os.path.isfile(path):
            what = "a folder" if os.path.isdir(path) else "no such file"
            raise FileNotFoundError(f"{path}: {what} (one JSON, JSONL or parquet file is expected)")
        with open(path, "rb") as file:
            head = file.read(4096)
            if head.startswith(b"PAR1"):
                self._unpack_parquet()
            else:
                text = head.removeprefix(b"\xef\xbb\xbf").lstrip()
                if text and (b"\0" in text[:16] or not b" " < text[:1] < b"\x7f"):
                    raise ValueError(
                        f"{path}: neither text in UTF-8 nor parquet. Unpack it, or save it again in UTF-8"
                    )
                file.seek(len(head) - len(text))
                for start, end in (
                    self._elements(file) if text.startswith(b"[") else self._lines(file)
                ):
                    self.starts.append(start)
                    self.ends.append(end)
        if not len(self):
            raise ValueError(f"{path}: the file holds no rows; was its writing cut short?")

    def _lines(self, file):
        at = file.tell()
        for line in file:
            if line.strip():
                yield at, at + len(line)
            at += len(line)

    def _elements(self, file):
        # Latin-1 makes one character of each byte, so the C scanner's positions in the text are positions in the file.
        scan, gap = json.JSONDecoder(strict=False).raw_decode, re.compile(r"[ \t\r\n,]*")
        base, at, text = file.tell(), 1, file.read(CHUNK).decode("latin-1")
        while True:
            at = gap.match(text, at).end()
            try:
                if text[at] == "]":
                    break
                end = scan(text, at)[1]
            except (
                ValueError,
                IndexError,
                RecursionError,
            ) as error:  # broken, or it goes on behind this chunk
                more = file.read(max(CHUNK, len(text) - at)) if len(text) - at < MAX_ROW else b""
                if not more:
                    what = f"{self.path}:{len(self.starts) + 1}: the JSON array breaks in this row, at byte {base + at}"
                    raise ValueError(
                        f"{what} ({error}). Mend it; in JSONL only the row would be lost."
                    ) from None
                text, base, at = text[at:] + more.decode("latin-1"), base + at, 0
            else:
                yield base + at, base + end
                at = end
        if (text[at + 1 :] + file.read(CHUNK).decode("latin-1")).strip():
            raise ValueError(
                f"{self.path}: more follows the JSON array, at byte {base + at + 1}. Make it one array, or JSONL"
            )

    def _unpack_parquet(self):
        try:
            import pyarrow as pa
            from pyarrow.parquet import ParquetFile
        except ImportError:
            raise ImportError(
                f"{self.path} is a parquet file: `pip install pyarrow` (the extra `parquet`)"
            ) from None
        # A row group can be the whole file, too much to unpack for one row: unpacked once, to an unnamed memory-mapped
        # file. simple: by each process.
        with tempfile.NamedTemporaryFile(suffix=".arrow") as spill:
            try:
                source = ParquetFile(self.path)
                with pa.ipc.new_file(spill, source.schema_arrow) as sink:
                    for batch in source.iter_batches(batch_size=64):
                        sink.write_batch(batch)
                        self.ends.append(batch.num_rows + (self.ends[-1] if self.ends else 0))
                spill.flush()
                self.table = pa.ipc.open_file(pa.memory_map(spill.name))
            except (pa.ArrowException, OSError) as error:
                what = f"broken parquet, or no room in {tempfile.gettempdir()} (TMPDIR names another folder)"
                raise ValueError(f"{self.path}: {what}: {error}") from None

    def __len__(self):
        return self.ends[-1] if self.table and self.ends else len(self.starts)

    def __getitem__(self, i):
        if not 0 <= i < len(self):
            raise IndexError(i)
        if self.table:
            k = bisect.bisect_right(self.ends, i)
            return (
                self.table.get_batch(k).slice(i - (self.ends[k - 1] if k else 0), 1).to_pylist()[0]
            )
        with open(self.path, "rb") as file:
            file.seek(self.starts[i])
            return json.loads(file.read(self.ends[i] - self.starts[i]), object_pairs_hook=_unique)


def _unique(pairs):  # JSON's own reader would keep the last of two fields with one name
    if len(row := dict(pairs)) < len(pairs):
        raise ValueError(f"a name stands twice: {sorted(name for name, _ in pairs)}")
    return row


def find_image(image, root, where, links=True):
    """Bytes and PIL images as they are, a path made absolute: in `root`, and without `links` not linked out of it."""
    if isinstance(image, dict):
        image = image.get("path") if (content := image.get("bytes")) is None else content
        image = None if isinstance(content, str) else image
    if isinstance(image, bytes | Image.Image):
        return image
    if not isinstance(image, str) or not image:
        raise BadRow(
            where,
            "an image is neither path nor bytes",
            'Write a path; {"bytes": ..} is for parquet.',
        )
    path = os.path.normpath(os.path.join(root, image))
    if os.path.commonpath([root, path]) == root:
        if not os.path.isfile(path):
            raise BadRow(
                where,
                "an image is missing",
                "Put it there, or name its folder with --image_root.",
                repr(path),
            )
        if (
            links
            or os.path.commonpath([home := os.path.realpath(root), os.path.realpath(path)]) == home
        ):
            return path
    mend = "Name its folder with --image_root, in which links are followed."
    raise BadRow(where, "an image path leads out of the data's folder", mend, repr(path))


def open_image(source, where=""):
    """A path, bytes or PIL image as 8-bit RGB, upright, transparency over white. Raises BadRow."""
    try:
        file = io.BytesIO(source) if isinstance(source, bytes) else source
        image = file if isinstance(file, Image.Image) else Image.open(file, formats=FORMATS)
        if image.width * image.height > MAX_IMAGE:
            raise ValueError(f"{image.width} x {image.height} pixels, allowed are {MAX_IMAGE}")
        if image.mode == "F" or (
            getattr(image, "is_animated", False) and image.format != "MPO"
        ):  # a photo, its preview
            raise ValueError(
                "pixels that are no integers" if image.mode == "F" else "several frames or pages"
            )
        image = ImageOps.exif_transpose(image)
        if image.mode.startswith("I"):  # 16 bits: Pillow's own conversion would cut at 255
            image = Image.fromarray(
                (np.asarray(image).astype(np.float32) / 257).clip(0, 255).round().astype(np.uint8)
            )
        if image.has_transparency_data:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        return image.convert("RGB")
    except Exception as error:  # a broken file can raise anything inside Pillow
        mend = "Write it again as one PNG or JPEG, smaller if need be."
        raise BadRow(where, "an image cannot be read", mend, error) from None


class Order:
    """An endless order over n rows, shuffled in each epoch: a function of the seed alone, resumable at any point."""

    def __init__(self, n, seed=0):
        self.n, self.seed, self.taken, self.epoch = n, seed, 0, None

    def take(self, k):
        """The next k (epoch, index)."""
        pairs = []
        for at in range(self.taken, self.taken + k):
            if at // self.n != self.epoch:
                self.epoch = at // self.n
                self.shuffled = np.random.default_rng([self.seed, self.epoch]).permutation(self.n)
            pairs.append((self.epoch, int(self.shuffled[at % self.n])))
        self.taken += k
        return pairs

    def state(self):
        return {"n": self.n, "seed": self.seed, "taken": self.taken}

    def load(self, state):
        if (state["n"], state["seed"]) != (self.n, self.seed):
            was, now = (
                f"{n} rows and seed {seed}"
                for n, seed in ((state["n"], state["seed"]), (self.n, self.seed))
            )
            raise ValueError(
                f"the run was saved with {was}, here are {now}: resume with the same data and seed"
            )
        self.taken = state["taken"]


class Data:
    """The examples of a file. `data[i]` raises BadRow; `fetch`, `draw` and `share` leave bad rows out, keep them in `bad`,
    print the first, and raise ValueError once more than `max_bad` rows are bad, or all."""

    def __init__(self, path, parse, max_bad=100):
        """`parse(row, where, index)` makes an example of a row."""
        self.rows, self.path, self.parse, self.max_bad = Rows(path), str(path), parse, max_bad
        self.bad = {}  # index -> reason

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, i):
        where = f"{self.path}:{i + 1}"
        try:
            row = self.rows[i]
        except (ValueError, RecursionError) as error:
            what = "not valid parquet" if self.rows.table else "not valid JSON"
            raise BadRow(where, what, "Write the row again.", error) from None
        return self.parse(row, where, i)

    def fetch(self, indices, build=lambda example: example):
        """[build(self[i])] of the good rows i; `build` (Encoder.prompt, say) may raise BadRow too."""
        built = []
        for i in indices:
            try:
                built += [] if i in self.bad else [build(self[i])]
            except BadRow as error:
                self.bad[i] = error.what
                if len(self.bad) <= 5:
                    print(f"left out: {error}", file=sys.stderr, flush=True)
                self._limit(f". The last: {error}")
        return built

    def _limit(self, last=""):
        if len(self.bad) > self.max_bad or len(self.bad) == len(self):
            what = f"{self.path}: {len(self.bad)} of {len(self)} rows are bad (max_bad is {self.max_bad})"
            raise ValueError(f"{what}: {dict(self.skipped.most_common())}{last}")

    @property
    def skipped(self):  # reason -> rows
        return Counter(self.bad.values())

    def draw(self, order, k, build=lambda example: example):
        """The next k good rows of `order`, built: the same on all ranks, whatever is bad."""
        built = []
        while len(built) < k:
            built += self.fetch([i for _, i in order.take(k - len(built))], build)
        return built

    def share(self, order, k, build, ranks):
        """This rank's part of the next k good rows of `order`, and their numbers among the k. Each rank builds its own part
        alone, and all learn which rows are bad: what is drawn is the same on any number of ranks. All ranks call it."""
        mine, owners = [], []
        while len(owners) < k:
            new = [i for _, i in order.take(k - len(owners))]
            mine += self.fetch(new[ranks.rank :: ranks.world], build)
            for bad in gather(self.bad):
                self.bad |= bad
            self._limit()
            owners += [n % ranks.world for n, i in enumerate(new) if i not in self.bad]
        return mine, [number for number, owner in enumerate(owners) if owner == ranks.rank]
