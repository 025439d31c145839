"""
What lies on disk: the rows of a data file by index, their images, the order in which training takes
them, and the account of the rows that cannot be used.

    rows = Rows("sft.jsonl")                   # JSON array, JSONL or parquet, told apart by content
    rows[7]                                    # a dict, read from the disk when it is asked for
    data = Data("sft.jsonl", parse)            # the same rows as examples; bad ones are left out
    data.draw(data.order(seed=0), 4)           # the next four good rows, shuffled and resumable
"""

import bisect
import hashlib
import io
import json
import os
import re
import sys
import tempfile
import threading
from array import array
from collections import Counter
from functools import cached_property

import numpy as np
from PIL import Image, ImageOps
from tqdm import tqdm

from engine.progress import progress
from engine.ranks import gather
from engine.workers import Workers

CHUNK = 1 << 20  # bytes of a JSON array that are read at a time
MAX_ROW = 1 << 28  # bytes of the longest row in a JSON array
MAX_IMAGE = 50_000_000  # pixels of one file: more is taken for a bomb
# Pillow hands other formats (EPS) to programs that it starts.
IMAGE_FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000")
BYTE_ORDER_MARK = b"\xef\xbb\xbf"


class BadRow(ValueError):
    """A row that cannot be used.

    where: "file:row", from 1; what: the reason, under which such rows are counted; mend: the cure,
    a sentence; detail: what is particular to this row.
    """

    def __init__(self, where, what, mend, detail=""):
        reason = what if detail == "" else f"{what} ({str(detail)[:200]})"
        super().__init__(f"{where}: {reason}. {mend}")
        self.where = where
        self.what = what
        self.mend = mend


# -------------------------------------------------------------------------------- rows of a file
class Rows:
    """The rows of a JSON array, of JSONL or of a parquet file, by index from 0.

    A file of JSON stays on disk and costs 16 bytes of memory a row. Opening raises
    FileNotFoundError; ImportError for parquet without pyarrow; ValueError for a file without rows
    or one whose rows cannot be told apart. A row that is broken by itself raises ValueError when it
    is read, as a line of JSONL can.
    """

    def __init__(self, path):
        self.path = str(path)
        self.starts = array("q")  # of each JSON row, in bytes
        self.ends = array("q")
        self.table = None  # of parquet: the unpacked file
        self.batch_ends = []  # of parquet: rows up to the end of each of the table's batches
        self.lock = threading.Lock()  # Arrow promises no reader that threads may share
        if not os.path.isfile(path):
            what = "a folder" if os.path.isdir(path) else "no such file"
            raise FileNotFoundError(f"{path}: {what} (one JSON, JSONL or parquet file is expected)")
        with open(path, "rb") as file:
            head = file.read(4096)
            if head.startswith(b"PAR1"):
                self._unpack_parquet()
            else:
                self._index_json(file, head)
        if not len(self):
            raise ValueError(f"{path}: the file holds no rows; was its writing cut short?")

    def _index_json(self, file, head):
        text = head.removeprefix(BYTE_ORDER_MARK).lstrip()
        starts_in_ascii = b" " < text[:1] < b"\x7f"
        if text and (b"\0" in text[:16] or not starts_in_ascii):
            raise ValueError(
                f"{self.path}: neither text in UTF-8 nor parquet. "
                "Unpack it, or save it again in UTF-8"
            )
        file.seek(len(head) - len(text))
        places = self._elements(file) if text.startswith(b"[") else self._lines(file)
        for start, end in places:
            self.starts.append(start)
            self.ends.append(end)

    def _lines(self, file):
        """Yield (start, end) in bytes of each line that is not blank."""
        at = file.tell()
        for line in file:
            if line.strip():
                yield at, at + len(line)
            at += len(line)

    def _elements(self, file):
        """Yield (start, end) in bytes of each element of a JSON array."""
        # Latin-1 makes one character of each byte, so the C scanner's positions in the text are
        # positions in the file.
        scan = json.JSONDecoder(strict=False).raw_decode
        gap = re.compile(r"[ \t\r\n,]*")
        base = file.tell()  # of `text`, in the file
        text = file.read(CHUNK).decode("latin-1")
        at = 1  # in `text`, behind the opening bracket
        while True:
            at = gap.match(text, at).end()
            try:
                if text[at] == "]":
                    break
                end = scan(text, at)[1]
            except (ValueError, IndexError, RecursionError) as error:
                # The row is broken, or it goes on behind what was read so far.
                more = b""
                if len(text) - at < MAX_ROW:
                    more = file.read(max(CHUNK, len(text) - at))
                if not more:
                    raise ValueError(
                        f"{self.path}:{len(self.starts) + 1}: the JSON array breaks in this row, "
                        f"at byte {base + at} ({error}). Mend it; in JSONL only the row would be "
                        "lost."
                    ) from None
                text = text[at:] + more.decode("latin-1")
                base += at
                at = 0
            else:
                yield base + at, base + end
                at = end
        rest = text[at + 1 :] + file.read(CHUNK).decode("latin-1")
        if rest.strip():
            raise ValueError(
                f"{self.path}: more follows the JSON array, at byte {base + at + 1}. "
                "Make it one array, or JSONL"
            )

    def _unpack_parquet(self):
        try:
            import pyarrow as pa
            from pyarrow.parquet import ParquetFile
        except ImportError:
            raise ImportError(
                f"{self.path} is a parquet file: `pip install pyarrow` (the extra `parquet`)"
            ) from None
        # A row group can be the whole file, too much to unpack for one row. So all of it is
        # unpacked once, to an unnamed file that is mapped into memory; by each process, for
        # simplicity.
        with tempfile.NamedTemporaryFile(suffix=".arrow") as spill:
            try:
                source = ParquetFile(self.path)
                rows = 0
                with pa.ipc.new_file(spill, source.schema_arrow) as sink:
                    for batch in source.iter_batches(batch_size=64):
                        sink.write_batch(batch)
                        rows += batch.num_rows
                        self.batch_ends.append(rows)
                spill.flush()
                self.table = pa.ipc.open_file(pa.memory_map(spill.name))
            except (pa.ArrowException, OSError) as error:
                raise ValueError(
                    f"{self.path}: broken parquet, or no room in {tempfile.gettempdir()} "
                    f"(TMPDIR names another folder): {error}"
                ) from None

    def __len__(self):
        if self.batch_ends:
            return self.batch_ends[-1]
        return len(self.starts)

    def __getitem__(self, i):
        if not 0 <= i < len(self):
            raise IndexError(i)
        if self.table is not None:
            number = bisect.bisect_right(self.batch_ends, i)
            with self.lock:
                batch = self.table.get_batch(number)
            first = self.batch_ends[number] - batch.num_rows
            return batch.slice(i - first, 1).to_pylist()[0]
        with open(self.path, "rb") as file:
            file.seek(self.starts[i])
            content = file.read(self.ends[i] - self.starts[i])
        return json.loads(content, object_pairs_hook=_unique)


def _unique(pairs):
    """A JSON object as a dict. Of two fields of one name, Python's reader would keep the last."""
    row = dict(pairs)
    if len(row) < len(pairs):
        raise ValueError(f"a name stands twice: {sorted(name for name, _ in pairs)}")
    return row


# ----------------------------------------------------------------------------------------- images
def find_image(image, root, where, links=True):
    """What a row gives as an image, as open_image takes it.

    Bytes and PIL images stay as they are. A path becomes absolute and has to lie in the folder
    `root`; without `links` it must not be linked out of it either. Raises BadRow.
    """
    if isinstance(image, dict):  # {"bytes": .., "path": ..}, as in parquet
        content = image.get("bytes")
        if content is None:
            image = image.get("path")
        else:
            image = None if isinstance(content, str) else content
    if isinstance(image, bytes | Image.Image):
        return image
    if not isinstance(image, str) or not image:
        mend = 'Write a path; {"bytes": ..} is for parquet.'
        raise BadRow(where, "an image is neither path nor bytes", mend)
    path = os.path.normpath(os.path.join(root, image))
    inside = os.path.commonpath([root, path]) == root
    if inside and not os.path.isfile(path):
        mend = "Put it there, or name its folder with --image_root."
        raise BadRow(where, "an image is missing", mend, repr(path))
    if inside and not links:
        home = os.path.realpath(root)
        inside = os.path.commonpath([home, os.path.realpath(path)]) == home
    if not inside:
        mend = "Name its folder with --image_root, in which links are followed."
        raise BadRow(where, "an image path leads out of the data's folder", mend, repr(path))
    return path


def open_image(source, where=""):
    """A path, bytes or PIL image as 8-bit RGB, upright, transparency over white. Raises BadRow."""
    try:
        if isinstance(source, Image.Image):
            return _as_rgb(source)
        file = io.BytesIO(source) if isinstance(source, bytes) else source
        return _as_rgb(Image.open(file, formats=IMAGE_FORMATS))
    except Exception as error:  # a broken file can raise anything inside Pillow
        mend = "Write it again as one PNG or JPEG, smaller if need be."
        raise BadRow(where, "an image cannot be read", mend, error) from None


def shrink(image, max_side=None):
    """The image itself, scaled down where its longer side is more than max_side pixels."""
    if max_side:
        image.thumbnail((max_side, max_side))  # in place, only larger ones
    return image


def _as_rgb(image):
    if image.width * image.height > MAX_IMAGE:
        raise ValueError(f"{image.width} x {image.height} pixels, allowed are {MAX_IMAGE}")
    if image.mode == "F":
        raise ValueError("pixels that are no integers")
    # An MPO is a photo, and its preview the second frame.
    if getattr(image, "is_animated", False) and image.format != "MPO":
        raise ValueError("several frames or pages")
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):  # 16 bits: Pillow's own conversion would cut at 255
        values = np.asarray(image).astype(np.float32) / 257
        image = Image.fromarray(values.clip(0, 255).round().astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image)
    return image.convert("RGB")


# ------------------------------------------------------------------------------- order and account
class Order:
    """An endless order over n rows, shuffled anew in each epoch.

    It is a function of the seed alone and goes on at any point: `state()` into a checkpoint, `load`
    out of it. `path` and `fingerprint` say of which file's rows it is an order (see Data.order).
    """

    def __init__(self, n, seed=0, path="", fingerprint=""):
        self.n = n
        self.seed = seed
        self.path = str(path)
        self.fingerprint = fingerprint
        self.taken = 0
        self.epoch = None  # of `shuffled`

    def take(self, k):
        """The next k as (epoch, index)."""
        pairs = []
        for at in range(self.taken, self.taken + k):
            epoch, place = divmod(at, self.n)
            if epoch != self.epoch:
                self.epoch = epoch
                self.shuffled = np.random.default_rng([self.seed, epoch]).permutation(self.n)
            pairs.append((epoch, int(self.shuffled[place])))
        self.taken += k
        return pairs

    def peek(self, k):
        """What `take(k)` will give; nothing is taken."""
        pairs = self.take(k)
        self.taken -= k
        return pairs

    def state(self):
        return {
            "n": self.n,
            "seed": self.seed,
            "taken": self.taken,
            "fingerprint": self.fingerprint,
        }

    def load(self, state):
        """Go on where `state` was taken. ValueError where its rows or its seed were others."""
        file = f"{self.path}: " if self.path else ""
        if (state["n"], state["seed"]) != (self.n, self.seed):
            raise ValueError(
                f"{file}the run was saved with {state['n']} rows and seed {state['seed']}, here "
                f"are {self.n} rows and seed {self.seed}: resume with the same data and seed"
            )
        if state.get("fingerprint") != self.fingerprint:
            raise ValueError(
                f"{file}the run was saved with as many rows, but others: the file has changed "
                "since. Put the old file back to resume, or start a new run with another --out"
            )
        self.taken = state["taken"]


def _unchanged(example):
    return example


class Data:
    """The examples of a file. `data[i]` raises BadRow.

    `fetch`, `draw` and `share` leave bad rows out, keep them in `bad` and print the first five;
    they raise ValueError once more than `max_bad` rows are bad, or all.

    With `workers` threads the rows of a call are read and built side by side, and `draw` and
    `share` have the next call's begun before they return. Only when: which rows come in which
    order, and what is found bad at which call, is the same with any number of threads. What is
    built ahead counts for nothing until it is drawn.
    """

    def __init__(self, path, parse, max_bad=100, workers=0):
        """`parse(row, where, index)` makes an example of a row, or raises BadRow."""
        self.rows = Rows(path)
        self.path = str(path)
        self.parse = parse
        self.max_bad = max_bad
        self.bad = {}  # index -> reason
        self.workers = Workers(workers)
        self.ahead = {}  # (index, build) -> the Job that builds a row of the next call

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, i):
        where = f"{self.path}:{i + 1}"
        try:
            row = self.rows[i]
        except (ValueError, RecursionError) as error:
            what = "not valid JSON" if self.rows.table is None else "not valid parquet"
            raise BadRow(where, what, "Write the row again.", error) from None
        return self.parse(row, where, i)

    @property
    def skipped(self):
        """The number of bad rows by reason."""
        return Counter(self.bad.values())

    @cached_property
    def fingerprint(self):
        """A digest of all the file's bytes. It takes about as long as finding the rows did."""
        with open(self.path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()[:32]

    def order(self, seed, n=None):
        """The order in which training takes the rows (of `n`: the first n), bound to this file."""
        return Order(len(self) if n is None else n, seed, self.path, self.fingerprint)

    def fetch(self, indices, build=_unchanged):
        """[build(self[i])] of the good rows i. `build`, as Encoder.prompt, may raise BadRow too."""
        # A list: where a small file comes round again a row is drawn twice, and is built twice.
        jobs = [(i, self._begin(i, build)) for i in indices if i not in self.bad]
        built = []
        for i, job in progress(jobs, "encoding"):
            if i in self.bad:  # found to be so a moment ago
                continue
            try:
                built.append(job.result())
            except BadRow as error:
                self.bad[i] = error.what
                if len(self.bad) <= 5:
                    tqdm.write(f"left out: {error}", file=sys.stderr)  # above any bar
                self._limit(f". The last: {error}")
        return built

    def _begin(self, i, build):
        """The Job that builds row i: the one that was begun ahead, or a new one."""
        return self.ahead.pop((i, build), None) or self.workers.begin(self._build, i, build)

    def _build(self, i, build):
        try:
            return build(self[i])
        except BadRow:
            raise
        except Exception as error:
            error.add_note(f"in {self.path}:{i + 1}")
            raise

    def _begin_ahead(self, indices, build):
        """Have the rows built that the next call will most likely ask for. Of an earlier call's
        none is kept: no more than one call's rows are in memory ahead of their time."""
        self.ahead = {}
        if self.workers.number:
            for i in indices:
                if i not in self.bad:
                    self.ahead[i, build] = self.workers.begin(self._build, i, build)

    def _limit(self, last=""):
        if len(self.bad) > self.max_bad or len(self.bad) == len(self):
            raise ValueError(
                f"{self.path}: {len(self.bad)} of {len(self)} rows are bad (max_bad is "
                f"{self.max_bad}): {dict(self.skipped.most_common())}{last}"
            )

    def draw(self, order, k, build=_unchanged):
        """The next k good rows of `order`, built: the same on every rank, whatever is bad."""
        built = []
        while len(built) < k:
            indices = [i for _, i in order.take(k - len(built))]
            built += self.fetch(indices, build)
        self._begin_ahead([i for _, i in order.peek(k)], build)
        return built

    def share(self, order, k, build, ranks):
        """This rank's part of the next k good rows of `order`, built. All ranks call it.

        Each rank builds its own part alone, and all learn which rows are bad: what is drawn is the
        same on any number of ranks.
        """
        mine = []
        good = 0
        while good < k:
            indices = [i for _, i in order.take(k - good)]
            mine += self.fetch(indices[ranks.rank :: ranks.world], build)
            for bad in gather(self.bad):
                self.bad.update(bad)
            self._limit()
            good += sum(i not in self.bad for i in indices)
        indices = [i for _, i in order.peek(k)]
        self._begin_ahead(indices[ranks.rank :: ranks.world], build)
        return mine
