"""
The world of NLVR's towers: real pictures and human-written statements (lil-lab/nlvr, CC-BY-4.0) in
the files of an embedded world. Nothing is drawn here and nothing is downloaded.

A picture of NLVR is three grey boxes, 400 x 100 pixels in all. In dev.jsonl two thirds of the
pictures have a tower of one to four blocks, black, blue or yellow, in each box. The others,
scattered shapes of three sizes, are left out: the model of runs/nlvr.sh sees pictures at a fifth of
their width and height, where a small shape is two pixels. A prompt is a statement, as a person
wrote it, in small letters and with marks apart; the answer is true or false.

    python tools/nlvr.py --data ../shared/data/nlvr --out data/nlvr --seed 0
    python tools/nlvr.py --data ../shared/data/nlvr --out data/nlvr-quick --quick    # 1/40 of rows

`--data` holds dev.jsonl, whose rows list the objects of each box, train.jsonl, whose rows have
answers only, and their images. References are written by the program of tools/statements.py: the
caption from the list of objects, the reasoning from its verification of the statement, tower by
tower. Its verdict is the reference's answer; the answer that is rewarded is NLVR's own. How often
the two are the same is printed, for dev.jsonl and, from the pixels, for train.jsonl.

    words.json              every word of the world, for the tokenizer: for all seeds and sizes
    easy, base.jsonl        sharegpt, accurate: descriptions and single towers; then what statements
                            say, answers, and demonstrations. The base model learns from them in
                            this order.
    public, curated.jsonl   sharegpt: many terse and partly wrong demonstrations (the rates are
                            below); few complete and right ones
    sft.json                these two shuffled together, in the other sharegpt dialect
    pairs.jsonl             warm-up pairs: a curated and a public response to one prompt
    align.jsonl             verl rows with teacher_response, on pictures and statements of their own
    rl.jsonl                verl rows with answers only: train.jsonl's, where the statement is
                            understood (to the others the base does not know the words)
    test_{id,hard,ood}      verl rows. id: one condition; hard: two or more; both with references.
                            ood: statements that the program does not understand, answers only

Rows of dev.jsonl are split three ways (PARTS), with all that share a statement or a picture in one
part: for tests, for align.jsonl, and to learn from (easy, base, public, curated, pairs). The order
of the boxes does not matter to a statement, and NLVR itself shows a picture in several: alignment
has all six, tests three of them. What is learnt from has to be more: its pictures are put together
of boxes cut out of the part's pictures, and its statements are those of the part and of train.jsonl
with their colours exchanged. No statement and no three towers, in whatever order, of a test are in
another file. To mirror a picture would change nothing: a tower stands in the middle of its box.
The same seed and sizes give the same bytes (of PNG files: with the same Pillow).
"""

import argparse
import random
import re
import sys
import zlib
from collections import Counter
from dataclasses import dataclass
from functools import cache
from itertools import permutations
from pathlib import Path

from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from tools import scenes  # noqa: E402
from tools.compare import json_object  # noqa: E402
from tools.statements import COLOURS, TOWERS, Statement, parse, spell_out, verify  # noqa: E402

SIDE = 100  # pixels, of a box
LEFT_EDGES = (0, 150, 300)  # of the boxes, in pixels; between them are bars
BLOCK = 20  # pixels, of a tower's block
BLOCK_X = 40  # its left edge in its box: all blocks of a tower have it
BLOCK_Y = (80, 59, 38, 17)  # their upper edges, from the base up
NAMES = {"Black": "black", "#0099ff": "blue", "Yellow": "yellow"}  # of NLVR's colours
RGB = {(0, 0, 0): "black", (0, 153, 255): "blue", (255, 255, 0): "yellow"}
BACKGROUND = (211, 211, 211)
ORDERS = tuple(permutations(range(3)))

PARTS = ("test", "test", "test", "align", "align", "align", "learn", "learn")  # by a hash
TEST_ORDERS = 3  # in which a test shows a picture, NLVR's own first


@dataclass(frozen=True)
class File:
    """A file that is learnt from: its rows, and how likely each kind of row is in it."""

    rows: int
    # Weights: describe, one tower, what a statement says, short answer, all three parts.
    kinds: tuple = (0, 0, 0, 0, 1)
    per_picture: int = 1  # rows about one picture


FILES = {
    "easy": File(5_000, (1, 1, 0, 0, 0), 2),
    "base": File(30_000, (1, 1, 3, 2, 13), 4),
    "public": File(8_000),
    "curated": File(500),
    "pairs": File(1_000),
}


@dataclass(frozen=True)
class Stock:
    """What the rows that are learnt from are made of, and what they may not hold."""

    examples: list  # whose pictures' boxes are cut out
    sentences: list  # understood ones, before their colours are exchanged
    taken_sentences: set  # of the tests
    taken_pictures: set  # of tests, alignment and RLVR: Example.picture


@dataclass(frozen=True)
class Example:
    """A row of NLVR on towers."""

    id: str
    number: str  # of the statement: what it is in NLVR, whatever the picture
    image: Path
    towers: tuple  # of each box, left to right, the colours from the base up
    sentence: str  # as it is shown to the model
    statement: Statement | None  # None: not understood
    answer: bool  # NLVR's

    @property
    def picture(self) -> tuple:
        """What the picture is, whatever the order of its boxes."""
        return tuple(sorted(self.towers))


# ------------------------------------------------------------------------------------------- NLVR
def load(data: Path, split: str) -> list[Example]:
    """The rows of dev.jsonl or train.jsonl whose pictures are towers.

    The towers come from `boxes` where a row has them, else from the pixels. Raises
    FileNotFoundError where the file or a picture is missing, and ValueError, with file and row,
    where `boxes` and pixels differ or a field is missing.
    """
    file = data / f"{split}.jsonl"
    if not file.exists():
        raise FileNotFoundError(f"{file} is missing: name the folder that holds it with --data")
    examples = []
    for number, line in enumerate(file.read_text().splitlines(), 1):
        row = json_object(line, f"{file}:{number}")
        missing = {"id", "image", "sentence", "statement_id", "answer"} - row.keys()
        if missing or row["answer"] not in ("true", "false"):
            problem = f"lacks {sorted(missing)}" if missing else f"has answer {row['answer']!r}"
            raise ValueError(f"{file}:{number} {problem}: this is not a file of NLVR")
        towers = read_towers(Image.open(data / row["image"]))
        if "boxes" in row and towers_of(row["boxes"]) != towers:
            raise ValueError(f"{file}:{number}: `boxes` and {row['image']} show other towers")
        if towers is None:
            continue
        example = Example(
            id=row["id"],
            number=f"{split}-{row['statement_id'].split('-')[0]}",
            image=data / row["image"],
            towers=towers,
            sentence=spell(row["sentence"]),
            statement=parse(spell(row["sentence"])),
            answer=row["answer"] == "true",
        )
        examples.append(example)
    if not any(example.statement for example in examples):
        raise ValueError(f"{file}: no row has towers and a statement that is understood")
    return examples


def towers_of(boxes: list) -> tuple | None:
    """The towers that NLVR's lists of objects are; None where an object is no block of a tower."""
    towers = []
    for box in boxes:
        tower = {}  # upper edge -> colour
        for colour, shape, size, x, y in box:
            if shape != "square" or size != BLOCK or x != BLOCK_X or y not in BLOCK_Y:
                return None
            tower[y] = NAMES[colour]
        towers.append(tuple(tower[y] for y in BLOCK_Y if y in tower))
    return tuple(towers)


def read_towers(image: Image.Image) -> tuple | None:
    """The towers that the pixels show; None where something lies outside the blocks' places."""
    image = image.convert("RGB")
    towers = []
    for left in LEFT_EDGES:
        box = image.crop((left, 0, left + SIDE, SIDE))
        tower = []
        for y in BLOCK_Y:
            colour = box.getpixel((BLOCK_X + BLOCK // 2, y + BLOCK // 2))
            if colour in RGB:
                tower.append(RGB[colour])
        # Painted over, the blocks' places leave nothing but background: else it is no tower.
        box.paste(BACKGROUND, (BLOCK_X - 2, 0, BLOCK_X + BLOCK + 3, SIDE))
        if not tower or box.getcolors(1) is None:
            return None
        towers.append(tuple(tower))
    return tuple(towers)


def spell(sentence: str) -> str:
    """A statement as the model reads it: small letters, marks apart, the words as written."""
    return " ".join(re.findall(r"[a-z0-9]+|[^\sa-z0-9]", sentence.lower()))


def split(examples: list[Example]) -> dict[str, list[Example]]:
    """The examples of each part: those that share a statement or a picture are in one part."""
    leader = {}  # a statement's number, its words, or a picture -> another, up to the group's own

    def find(key):
        while leader.setdefault(key, key) != key:
            key = leader[key]
        return key

    for example in examples:
        for key in (example.sentence, example.picture):
            leader[find(key)] = find(example.number)
    members = {}  # group -> its statements' numbers
    for example in examples:
        members.setdefault(find(example.number), set()).add(example.number)
    parts = {part: [] for part in PARTS}
    for example in examples:
        code = zlib.crc32(min(members[find(example.number)]).encode())
        parts[PARTS[code % len(PARTS)]].append(example)
    return parts


def agreement(examples: list[Example]) -> str:
    """How many statements are understood, and how many verdicts are NLVR's answers, in words."""
    understood = [example for example in examples if example.statement]
    same = [
        example
        for example in understood
        if verify(example.statement, example.towers)[1] == example.answer
    ]
    return (
        f"{len(understood):,d} of {len(examples):,d} statements understood "
        f"({len(understood) / len(examples):.1%}), {len(same):,d} verdicts as NLVR's answer "
        f"({len(same) / len(understood):.1%})"
    )


# --------------------------------------------------------------------------------------- pictures
def put_together(images: list[Image.Image], boxes: list[int]) -> Image.Image:
    """A picture whose box i is the box `boxes[i]` of images[i], pixel by pixel; bars of the first.

    With the same picture three times it shows that picture's boxes in another order.
    """
    result = images[0].copy()
    for left, image, box in zip(LEFT_EDGES, images, boxes, strict=True):
        edge = LEFT_EDGES[box]
        cut = image.crop((edge, 0, edge + SIDE, SIDE))
        result.paste(cut, (left, 0))
    return result


@cache
def open_image(path: Path) -> Image.Image:
    """A picture of NLVR, read once."""
    return Image.open(path).convert("RGB")


def in_order(example: Example, order: tuple[int, ...]) -> tuple[tuple, Image.Image]:
    """Towers and picture of an example with its boxes in another order."""
    image = open_image(example.image)
    towers = tuple(example.towers[box] for box in order)
    return towers, put_together([image] * 3, list(order))


def mixture(examples: list[Example], rng: random.Random) -> tuple[tuple, Image.Image]:
    """Towers and picture of three boxes that are cut out of any of the examples' pictures."""
    sources = [rng.choice(examples) for _ in range(3)]
    boxes = [rng.randrange(3) for _ in range(3)]
    towers = [source.towers[box] for source, box in zip(sources, boxes, strict=True)]
    return tuple(towers), put_together([open_image(each.image) for each in sources], boxes)


# -------------------------------------------------------------------------------------- responses
def describe(towers: tuple, names: tuple = TOWERS) -> str:
    """Every block with its place, each tower from its base up: "left 1 blue ; left 2 black"."""
    blocks = []
    for name, tower in zip(TOWERS, towers, strict=True):
        if name in names:
            blocks += [f"{name} {place} {colour}" for place, colour in enumerate(tower, 1)]
    return " ; ".join(blocks)


def yes_or_no(answer: bool) -> str:
    return "true" if answer else "false"


def good(towers: tuple, statement: Statement) -> str:
    """The references' manner.

    Every block stands with its place; then what the statement says, and every tower with the
    running total.
    """
    sentences, verdict = verify(statement, towers)
    answer = yes_or_no(verdict)
    think = [spell_out(statement), *sentences, f"so {answer}"]
    return scenes.three_parts(describe(towers), think, answer)


def terse(towers: tuple, statement: Statement, rng: random.Random) -> str:
    """The public manner: no places, blocks left out or of another colour, steps left out.

    The rates are those of the embedded worlds (tools/scenes.py): DROPPED, WRONG, BARE, SKIPPED and
    MISTAKEN.
    """
    blocks = [colour for tower in towers for colour in tower]
    named = [colour for colour in blocks if rng.random() >= scenes.DROPPED]
    if not named:
        named = [rng.choice(blocks)]
    for index, colour in enumerate(named):
        if rng.random() < scenes.WRONG:
            named[index] = rng.choice([other for other in COLOURS if other != colour])
    steps, verdict = verify(statement, towers)
    if rng.random() < scenes.MISTAKEN:
        verdict = not verdict
    sentences = []
    if rng.random() >= scenes.BARE:
        # What is seen of each tower, without its name and without the running total.
        seen = [" ".join(step.split()[1:-1]) for step in steps]
        sentences = [words for words in seen if rng.random() >= scenes.SKIPPED]
    answer = yes_or_no(verdict)
    return scenes.three_parts(" ; ".join(named), [*sentences, f"so {answer}"], answer)


# ------------------------------------------------------------------------------------------- rows
def exchange_colours(sentence: str, rng: random.Random) -> str:
    """The statement with its three colours exchanged for each other in one of the six ways."""
    others = dict(zip(COLOURS, rng.sample(COLOURS, 3), strict=True))
    return " ".join(others.get(word, word) for word in sentence.split())


def draw_statement(stock: Stock, towers: tuple, rng: random.Random) -> tuple[str, Statement]:
    """A statement about the towers that no test has, as often true as false."""
    wanted = rng.random() < 0.5
    for _ in range(50):  # of some towers nearly all is false: then the last one stays
        sentence = exchange_colours(rng.choice(stock.sentences), rng)
        while sentence in stock.taken_sentences:
            sentence = exchange_colours(rng.choice(stock.sentences), rng)
        statement = parse(sentence)
        _, verdict = verify(statement, towers)
        if verdict == wanted:
            break
    return sentence, statement


def demonstrate(
    name: str, towers: tuple, sentence: str, statement: Statement, rng: random.Random
) -> tuple[str, str]:
    """Draw a kind of row, as the file `name` weighs them, and return its (prompt, response)."""
    tower = rng.choice(TOWERS)
    _, verdict = verify(statement, towers)
    if name == "public":
        response = terse(towers, statement, rng)
    else:
        response = good(towers, statement)
    kinds = [
        ("describe", describe(towers)),
        (f"look {tower}", describe(towers, (tower,))),
        (f"read {sentence}", spell_out(statement)),
        (f"short {sentence}", yes_or_no(verdict)),
        (sentence, response),
    ]
    return rng.choices(kinds, FILES[name].kinds)[0]


def make_learnt(out: Path, name: str, rows: int, seed: int, stock: Stock) -> list[dict]:
    """Save the pictures of a file that is learnt from, and return its rows."""
    (out / "images" / name).mkdir(parents=True, exist_ok=True)
    result = []
    for index in range(rows):
        picture = index // FILES[name].per_picture
        path = f"images/{name}/{picture:05d}.png"
        if index % FILES[name].per_picture == 0:
            rng = random.Random(f"{seed} {name} {picture}")
            towers, image = mixture(stock.examples, rng)
            while tuple(sorted(towers)) in stock.taken_pictures:
                towers, image = mixture(stock.examples, rng)
            image.save(out / path, compress_level=1)
        sentence, statement = draw_statement(stock, towers, rng)
        prompt, response = demonstrate(name, towers, sentence, statement, rng)
        user = {"role": "user", "content": f"<image>{prompt}"}
        if name == "pairs":
            row = {
                "image": path,
                "prompt": [user],
                "teacher_response": response,
                "student_response": terse(towers, statement, rng),
            }
        else:
            assistant = {"role": "assistant", "content": response}
            row = {"messages": [user, assistant], "images": [path]}
        row["extra_info"] = {"index": index, "towers": describe(towers)}
        result.append(row)
    return result


def make_verl(
    out: Path, name: str, examples: list[Example], orders: int, references: bool
) -> list[dict]:
    """Save the examples' pictures with their boxes in so many orders, and return verl rows.

    The first order is that of NLVR's own file.
    """
    (out / "images" / name).mkdir(parents=True, exist_ok=True)
    result = []
    for example in examples:
        for order in ORDERS[:orders]:
            towers, image = in_order(example, order)
            path = f"images/{name}/{len(result):05d}.png"
            image.save(out / path, compress_level=1)
            row = {
                "data_source": name,
                "prompt": [{"role": "user", "content": f"<image>{example.sentence}"}],
                "images": [{"path": path}],
                "reward_model": {"style": "rule", "ground_truth": yes_or_no(example.answer)},
            }
            if references:
                row["teacher_response"] = good(towers, example.statement)
            row["extra_info"] = {
                "index": len(result),
                "id": example.id,
                "order": " ".join(TOWERS[box] for box in order),
                "towers": describe(towers),
            }
            result.append(row)
    return result


def vocabulary(examples: list[Example]) -> str:
    """Every word of the world, in one text."""
    marks = scenes.three_parts("; describe look read short true false so yes no", ["none"], 0)
    seen = "base second top above only size different stacked count tower and exactly at least most"
    numbers = " ".join(str(number) for number in range(13))
    sentences = [example.sentence for example in examples]
    return " ".join([" ".join(marks.split()), seen, numbers, *TOWERS, *COLOURS, *sentences])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True, help="NLVR: dev.jsonl, train.jsonl")
    parser.add_argument("--out", type=Path, default=Path("data/nlvr"), help="folder for the files")
    parser.add_argument("--seed", type=int, default=0, help="of the files that are learnt from")
    parser.add_argument(
        "--quick",
        action="store_true",
        help="a smoke test's sizes: 1/40 of the rows that are learnt from, 40 at least",
    )
    args = parser.parse_args()

    try:
        dev = load(args.data, "dev")
        train = load(args.data, "train")
    except (OSError, ValueError) as error:
        sys.exit(f"nlvr.py: {error}")
    for name, examples in (("dev", dev), ("train", train)):
        rows = len((args.data / f"{name}.jsonl").read_text().splitlines())
        print(f"{name}.jsonl: {len(examples)} of {rows} rows are on towers; {agreement(examples)}")
    parts = split(dev)
    test_sentences = {example.sentence for example in parts["test"]}
    test_pictures = {example.picture for example in parts["test"]}
    align = [example for example in parts["align"] if example.statement]
    rl = [
        example
        for example in train
        if example.statement
        and example.sentence not in test_sentences
        and example.picture not in test_pictures
    ]
    known = [example for example in parts["learn"] if example.statement]
    stock = Stock(
        examples=parts["learn"],
        sentences=sorted({example.sentence for example in known + rl}),
        taken_sentences=test_sentences,
        taken_pictures={example.picture for example in parts["test"] + align + rl},
    )
    tests = {"test_id": [], "test_hard": [], "test_ood": []}
    for example in parts["test"]:
        if example.statement is None:
            tests["test_ood"].append(example)
        elif len(example.statement.conditions) > 1:
            tests["test_hard"].append(example)
        else:
            tests["test_id"].append(example)

    files = {}  # name -> rows
    for name, file in FILES.items():
        number = max(40, file.rows // 40) if args.quick else file.rows
        files[name] = make_learnt(args.out, name, number, args.seed, stock)
    files["align"] = make_verl(args.out, "align", align, len(ORDERS), references=True)
    files["rl"] = make_verl(args.out, "rl", rl, 1, references=False)
    for name, examples in tests.items():
        references = name != "test_ood"
        files[name] = make_verl(args.out, name, examples, TEST_ORDERS, references)
    for name, rows in files.items():
        scenes.write(args.out / f"{name}.jsonl", rows)
        pictures = {row["extra_info"]["towers"] for row in rows}
        print(f"{name:10s} {len(rows):7,d} rows on {len(pictures):6,d} pictures", flush=True)
    for name in ("align", "rl", *tests):
        answers = Counter(row["reward_model"]["ground_truth"] for row in files[name])
        print(f"{name:10s} {answers['true'] / answers.total():.1%} true")
    mixed = scenes.mix(files["public"], files["curated"], args.seed)
    scenes.write(args.out / "sft.json", mixed)
    scenes.write(args.out / "words.json", [{"text": vocabulary(dev + train)}])


if __name__ == "__main__":
    main()
