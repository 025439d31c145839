"""
The embedded world: small pictures, questions with one right answer, and demonstrations in PRISM's
three parts. Nothing is downloaded.

A picture is a grid of 3 x 3 cells of 8 x 8 pixels. Each cell is empty or holds one object, of one
of 4 colours and 3 shapes; with Qwen3-VL's patch of 4 pixels and merge of 2 a cell is one visual
token. A question counts the shapes of one or two colours, in the picture or in a part of it, or
adds up their sides (circle 0, triangle 3, square 4). A prompt is one short line without a system
message; words and marks stand apart, so that a tokenizer may split at white space.

    python tools/scenes.py --out data/tiny --seed 0
    python tools/scenes.py --out data/quick --quick        # a twentieth of the rows
    python tools/scenes.py --out data/tiny --parquet       # verl rows also as parquet
    python tools/scenes.py --world miniature --out data/miniature

There are three worlds. In `tiny` the references are a function of picture and question, in the
manner of the base itself. In the others a foreign teacher writes them (tools/teacher.py), each in
another manner, and the pictures are so noisy that nobody reads all of them right. In `miniature`
the base never had that manner; in `known` half of its own demonstrations were in it.

    words.json                every word of the world, for the tokenizer: for all seeds and sizes
    easy, look, base.jsonl    sharegpt, accurate: descriptions; places of colours; demonstrations.
                              The base model learns from them in this order.
    public, curated.jsonl     sharegpt: many terse and partly wrong demonstrations (the rates are
                              below); few complete and right ones
    sft.json                  these two shuffled together, in the other sharegpt dialect
    align.jsonl               verl rows with teacher_response, as curated, but none of sft.json
    align_{mixed,reversed}    of `tiny`: the same rows, but half or all of the references go through
                              the objects from below, as no other file's do
    rl.jsonl                  verl rows with answers only, harder
    pairs.jsonl               warm-up pairs: a curated and a public response to one prompt
    test_{id,hard,ood}.jsonl  verl rows with references; ood has more objects than any other file
                              but look and base

No scene (what lies where) is in two files, sft.json apart: a hash of the scene says which file may
hold it. The same seed and sizes give the same bytes (of PNG files: with the same Pillow).
"""

import argparse
import json
import random
import sys
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageChops, ImageDraw

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from tools import teacher  # noqa: E402

CELL = 8  # pixels
POSITIONS = ("tl", "tc", "tr", "ml", "mc", "mr", "bl", "bc", "br")  # raster order
COLOURS = {
    "red": (215, 60, 55),
    "green": (60, 180, 75),
    "blue": (65, 90, 215),
    "yellow": (225, 205, 60),
}
SIDES = {"circle": 0, "square": 4, "triangle": 3}
REGIONS = {"left": "tl ml bl", "right": "tr mr br", "top": "tl tc tr", "bottom": "bl bc br"}

QUESTIONS = {  # by the letters of File.questions
    "c": "count {colour}",
    "r": "count {colour} in {region}",
    "o": "count {colour} or {other}",
    "s": "sides {colour}",
    "t": "sides {colour} or {other}",
}


@dataclass(frozen=True)
class World:
    """What differs between the worlds."""

    places: dict | None  # as the foreign teacher names them; None: no teacher, the base's manner
    orders: tuple  # in which the teacher goes through the objects
    known: float  # share of the base's demonstrations that are in the teacher's manner
    noise: int  # of each channel of a pixel: so much down, and up (up to 8 more: see paint)
    shade: int  # of each channel of an object's colour, the same
    curated: int  # rows of the references' manner among SFT's
    from_below: dict  # more files of references: name -> share that goes from below


WORLDS = {
    "tiny": World(
        places=None,
        orders=(),
        known=0,
        noise=12,
        shade=25,
        curated=550,
        from_below={"align_mixed": 0.5, "align_reversed": 1.0},
    ),
    "miniature": World(
        places=teacher.IN_WORDS,
        orders=teacher.ORDERS,
        known=0,
        noise=60,
        shade=75,
        curated=2000,
        from_below={},
    ),
    "known": World(
        places=teacher.COMPASS,
        orders=("above", "below"),
        known=0.5,
        noise=60,
        shade=75,
        curated=2000,
        from_below={},
    ),
}

# Where the teacher is foreign: the share of the base's rows about places that use its words, so
# that the base knows them, though not the manner.
SPELLED = 0.5

# What is wrong with the public demonstrations, as shares.
DROPPED = 0.4  # of the objects: left out of the caption (one always stays)
WRONG = 0.1  # of the objects that a caption names: with another colour or shape
BARE = 0.5  # of the demonstrations: the result without a step
SKIPPED = 0.3  # of the steps of the others: left out
MISTAKEN = 0.05  # of the answers: off by one


@dataclass(frozen=True)
class File:
    """What a file of the world holds."""

    rows: int
    objects: tuple[int, int]  # fewest and most in a scene
    questions: str  # letters of QUESTIONS, each as often as it is likely
    share: int  # of all scenes, in parts of the sum: those that this file may hold
    matches: int = 1  # fewest objects that an answer rests on
    per_scene: int = 1  # questions about one picture
    kinds: tuple = (0, 0, 0, 1)  # weights: describe, where, short answer, all three parts


FILES = {
    "easy": File(8_000, (1, 3), "cro", 2, 0, 2, (16, 4, 0, 0)),
    "look": File(12_800, (1, 9), "cro", 2, 0, 4, (4, 12, 0, 4)),
    "base": File(48_000, (1, 9), "crostot", 6, 0, 4, (1, 2, 3, 14)),
    "public": File(12_000, (2, 7), "crost", 3, 1, 2),
    "curated": File(550, (2, 7), "crost", 1),
    "align": File(1_500, (3, 7), "crost", 1),
    "pairs": File(1_000, (3, 7), "crost", 1),
    "rl": File(4_000, (5, 7), "ot", 2, 3),
    "test_id": File(500, (2, 7), "crost", 1),
    "test_hard": File(500, (5, 7), "ot", 1, 3),
    "test_ood": File(500, (8, 9), "ot", 1, 3),
}
BASE_FILES = ("easy", "look", "base")
SFT_FILES = ("easy", "look", "base", "public", "curated")
OWNERS = [name for name, file in FILES.items() for _ in range(file.share)]


# --------------------------------------------------------------------------- scenes and questions
def draw_scene(rng: random.Random, name: str) -> tuple:
    """Draw a scene that the file `name` may hold.

    A scene is nine entries in raster order, each None or (colour, shape).
    """
    while True:
        scene = [None] * 9
        objects = rng.randint(*FILES[name].objects)
        for place in rng.sample(range(9), objects):
            colour = rng.choice(tuple(COLOURS))
            shape = rng.choice(tuple(SIDES))
            scene[place] = (colour, shape)
        if owner(scene) == name:
            return tuple(scene)


def owner(scene) -> str:
    """The one file that may hold this scene; a hash decides, so that no two files share one."""
    code = zlib.crc32(describe(scene).encode())
    return OWNERS[code % len(OWNERS)]


def describe(scene) -> str:
    """Every object with its place, in raster order: "tl red circle ; mc blue square"."""
    return " ; ".join(name_with_place(scene, place) for place in range(9) if scene[place])


def name_with_place(scene, place: int) -> str:
    """The object at a place of a scene: "tl red circle"."""
    colour, shape = scene[place]
    return f"{POSITIONS[place]} {colour} {shape}"


def ask(rng: random.Random, scene: tuple, file: File) -> str:
    """Draw a question about the scene whose answer rests on as many objects as the file wants."""
    for _ in range(50):  # a scene may allow no such question: then the last one stays
        colour, other = rng.sample(tuple(COLOURS), 2)
        region = rng.choice(tuple(REGIONS))
        form = QUESTIONS[rng.choice(file.questions)]
        question = form.format(colour=colour, other=other, region=region)
        steps, _ = solve(scene, question)
        if len(steps) >= file.matches:
            break
    return question


def solve(scene: tuple, question: str) -> tuple[list[tuple[int, int]], int]:
    """The steps to the answer, each a (place, running total), in raster order; and the answer."""
    words = question.split()
    region = REGIONS[words[-1]].split() if "in" in words else POSITIONS
    steps = []
    total = 0
    for place, thing in enumerate(scene):
        if thing is None or POSITIONS[place] not in region:
            continue
        colour, shape = thing
        if colour in words:
            total += 1 if words[0] == "count" else SIDES[shape]
            steps.append((place, total))
    return steps, total


# --------------------------------------------------------------------------------------- pictures
def paint(scene: tuple, rng: random.Random, world: World) -> Image.Image:
    """Paint a scene as 24 x 24 pixels in RGB.

    Size, place and colour of each object vary a little, and every pixel carries some noise.
    """
    grey = rng.randint(15, 60)
    image = Image.new("RGB", (3 * CELL, 3 * CELL), (grey, grey, grey))
    pen = ImageDraw.Draw(image)
    for place, thing in enumerate(scene):
        if thing:
            paint_object(pen, place, *thing, rng, world)
    noise = Image.frombytes("RGB", image.size, rng.randbytes(3 * image.width * image.height))
    # By so much the 256 values are divided; rounded down, it leaves some that are a little larger.
    fainter = 256 // (2 * world.noise + 1)
    faint = noise.point(lambda value: value // fainter)  # 0 to about 2 * world.noise
    return ImageChops.add(image, faint, offset=-world.noise)


def paint_object(
    pen, place: int, colour: str, shape: str, rng: random.Random, world: World
) -> None:
    """Paint one object somewhere in its cell."""
    spread = world.shade
    shade = [channel + rng.randint(-spread, spread) for channel in COLOURS[colour]]
    fill = tuple(max(0, min(255, channel)) for channel in shade)
    size = rng.randint(5, 6)
    x = CELL * (place % 3) + rng.randint(0, 7 - size)
    y = CELL * (place // 3) + rng.randint(0, 7 - size)
    box = (x, y, x + size, y + size)
    if shape == "circle":
        pen.ellipse(box, fill)
    elif shape == "square":
        pen.rectangle(box, fill)
    else:
        corners = [(x, y + size), (x + size, y + size), (x + size // 2, y)]
        pen.polygon(corners, fill)


# -------------------------------------------------------------------------------------- responses
def three_parts(caption: str, sentences: list[str], answer: int) -> str:
    """A response in PRISM's form. Each sentence ends in a full stop of its own."""
    think = " ".join(f"{sentence} ." for sentence in sentences)
    return (
        f"<caption>\n{caption}\n</caption>\n"
        f"<think>\n{think}\n</think>\n"
        f"<answer>\n{answer}\n</answer>"
    )


def good(scene: tuple, question: str) -> str:
    """The references' manner.

    Every object stands with its place, every step with the running total, and all is right.
    """
    steps, answer = solve(scene, question)
    sentences = [f"{name_with_place(scene, place)} {total}" for place, total in steps]
    return three_parts(describe(scene), [*sentences, f"so {answer}"], answer)


def good_from_below(scene: tuple, question: str) -> str:
    """As `good`, but caption and steps go through the objects from the last to the first."""
    steps, answer = solve(scene, question)
    items = describe(scene).split(" ; ")
    before = [0, *(total for _, total in steps)]  # the running total before each step, from above
    sentences = []
    for number in reversed(range(len(steps))):
        place, _ = steps[number]
        sentences.append(f"{name_with_place(scene, place)} {answer - before[number]}")
    return three_parts(" ; ".join(reversed(items)), [*sentences, f"so {answer}"], answer)


def foreign(scene: tuple, question: str, rng: random.Random, world: World) -> str:
    """The foreign teacher's manner: as right and whole as `good`, in one of many forms."""
    _, answer = solve(scene, question)
    _, subject = question.split(" ", 1)
    everything = things_of(scene, question, world)
    caption, sentences = teacher.demonstrate(everything, subject, answer, rng, world.orders)
    return three_parts(caption, sentences, answer)


def things_of(scene: tuple, question: str, world: World) -> list[teacher.Thing]:
    """All objects of a scene, as the teacher sees them."""
    steps, _ = solve(scene, question)
    asked = {place for place, _ in steps}
    counts = question.startswith("count")
    things = []
    for place, thing in enumerate(scene):
        if thing:
            colour, shape = thing
            worth = None
            if place in asked:
                worth = 1 if counts else SIDES[shape]
            name = world.places[POSITIONS[place]]
            things.append(teacher.Thing(place, name, colour, shape, worth))
    return things


def terse(scene: tuple, question: str, rng: random.Random) -> str:
    """The public manner.

    There are no places, objects are left out or wrong, steps are left out; the answer is nearly
    always right. The rates are the constants at the top.
    """
    objects = [thing for thing in scene if thing]
    named = [thing for thing in objects if rng.random() >= DROPPED]
    if not named:
        named = [rng.choice(objects)]
    named = [perhaps_wrong(colour, shape, rng) for colour, shape in named]
    caption = " ; ".join(f"{colour} {shape}" for colour, shape in named)

    steps, answer = solve(scene, question)
    if rng.random() < MISTAKEN:
        answer += 1 if answer == 0 else rng.choice((-1, 1))

    sentences = []
    if rng.random() >= BARE:
        kept = [place for place, _ in steps if rng.random() >= SKIPPED]
        sentences = [" ".join(scene[place]) for place in kept]
    return three_parts(caption, [*sentences, f"so {answer}"], answer)


def perhaps_wrong(colour: str, shape: str, rng: random.Random) -> tuple[str, str]:
    """An object as a public caption names it, seldom in another colour or shape."""
    if rng.random() >= WRONG:
        return colour, shape
    other_colours = [(other, shape) for other in COLOURS if other != colour]
    other_shapes = [(colour, other) for other in SIDES if other != shape]
    return rng.choice(rng.choice((other_colours, other_shapes)))


def demonstrate(
    name: str, scene: tuple, question: str, rng: random.Random, world: World
) -> tuple[str, str]:
    """Draw a kind of row, as the file `name` weighs them, and return its (prompt, response)."""
    steps, answer = solve(scene, question)
    subject = question.split(" ", 1)[1]
    where = f"where {subject}"
    places = " ".join(POSITIONS[place] for place, _ in steps)
    if world.places and name in BASE_FILES and rng.random() < SPELLED:
        where = f"spell {subject}"
        named = [thing for thing in things_of(scene, question, world) if thing.worth is not None]
        places = " ; ".join(teacher.spell(thing) for thing in named)
    if name == "public":
        response = terse(scene, question, rng)
    elif is_foreign(name, world, rng):
        response = foreign(scene, question, rng, world)
    else:
        response = good(scene, question)
    kinds = [
        ("describe", describe(scene)),
        (where, places or "none"),
        (f"short {question}", str(answer)),
        (question, response),
    ]
    return rng.choices(kinds, FILES[name].kinds)[0]


def is_foreign(name: str, world: World, rng: random.Random) -> bool:
    """Whether a demonstration of the file `name`, not a public one, is in the teacher's manner."""
    if world.places is None:
        return False
    if name in BASE_FILES:
        return world.known > 0 and rng.random() < world.known
    return True


# ------------------------------------------------------------------------------------------ files
def items(name: str, rows: int, seed: int) -> Iterator[tuple]:
    """Yield (number of the picture, scene, question, rng) for each row of the file `name`.

    Questions about one picture are neighbours and share its generator.
    """
    file = FILES[name]
    is_test = name.startswith("test")
    seen = set()
    for row in range(rows):
        picture = row // file.per_scene
        if row % file.per_scene == 0:
            rng = random.Random(f"{seed} {name} {picture}")
            scene = draw_scene(rng, name)
            while is_test and scene in seen:  # a test has no scene twice
                scene = draw_scene(rng, name)
            seen.add(scene)
        yield picture, scene, ask(rng, scene, file), rng


def make(out: Path, name: str, rows: int, seed: int, world: World = WORLDS["tiny"]) -> list[dict]:
    """Save the pictures of a file and return its rows; image paths are relative to `out`."""
    (out / "images" / name).mkdir(parents=True, exist_ok=True)
    result = []
    painted = -1
    for index, (picture, scene, question, rng) in enumerate(items(name, rows, seed)):
        path = f"images/{name}/{picture:05d}.png"
        if picture != painted:
            paint(scene, rng, world).save(out / path, compress_level=1)
            painted = picture
        row = make_row(name, scene, question, path, rng, world)
        row["extra_info"] = {"index": index, "scene": describe(scene)}
        result.append(row)
    return result


def make_row(
    name: str, scene: tuple, question: str, path: str, rng: random.Random, world: World
) -> dict:
    """A row in the format of the file `name`: sharegpt, a warm-up pair, or verl."""
    prompt, response = demonstrate(name, scene, question, rng, world)
    user = {"role": "user", "content": f"<image>{prompt}"}
    if name in SFT_FILES:
        assistant = {"role": "assistant", "content": response}
        return {"messages": [user, assistant], "images": [path]}
    if name == "pairs":
        return {
            "image": path,
            "prompt": [user],
            "teacher_response": response,
            "student_response": terse(scene, question, rng),
        }
    _, answer = solve(scene, question)
    row = {
        "data_source": name,
        "prompt": [user],
        "images": [{"path": path}],
        "reward_model": {"style": "rule", "ground_truth": str(answer)},
    }
    if name != "rl":
        row["teacher_response"] = response
    return row


def restate(rows: list[dict], name: str, share: float, seed: int) -> list[dict]:
    """The rows of align.jsonl with references of which that share goes from below."""
    rng = random.Random(f"{seed} {name}")
    result = []
    for row, item in zip(rows, items("align", len(rows), seed), strict=True):
        _, scene, question, _ = item
        manner = good_from_below if rng.random() < share else good
        response = manner(scene, question)
        result.append({**row, "teacher_response": response})
    return result


def mix(public: list[dict], curated: list[dict], seed: int) -> list[dict]:
    """The rows of sft.json: both files shuffled together, in sharegpt's other dialect."""
    rows = public + curated
    random.Random(f"{seed} sft").shuffle(rows)
    mixed = []
    for row in rows:
        user, assistant = row["messages"]
        turns = [
            {"from": "human", "value": user["content"]},
            {"from": "gpt", "value": assistant["content"]},
        ]
        others = {field: value for field, value in row.items() if field != "messages"}
        mixed.append({**others, "conversations": turns})
    return mixed


def vocabulary(world: World) -> str:
    """Every word of the world, in one text."""
    marks_and_verbs = three_parts("; describe where none short count sides or in", ["so 0"], 0)
    totals = range(4 * 9 + 1)  # nine squares have 36 sides
    words = [marks_and_verbs, *POSITIONS, *COLOURS, *SIDES, *REGIONS, *map(str, totals)]
    if world.places:
        words += ["spell", *world.places.values(), *teacher.WORDS]
    return " ".join(" ".join(words).split())


def write(path: Path, rows: list[dict]) -> None:
    """Write rows as JSON (an array), JSONL, or parquet: as the file's ending says."""
    if path.suffix == ".parquet":
        return write_parquet(path, rows)
    lines = [json.dumps(row) for row in rows]
    if path.suffix == ".json":
        path.write_text("[\n" + ",\n".join(lines) + "\n]\n")
    else:
        path.write_text("".join(f"{line}\n" for line in lines))


def write_parquet(path: Path, rows: list[dict]) -> None:
    """Write verl rows as parquet, with the pictures' bytes inside."""
    import pyarrow.parquet  # an optional extra

    with_bytes = []
    for row in rows:
        images = []
        for image in row["images"]:
            content = (path.parent / image["path"]).read_bytes()
            images.append({**image, "bytes": content})
        with_bytes.append({**row, "images": images})
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(with_bytes), path)


def number_of_rows(name: str, world: World, scale: float, quick: bool, tests: int) -> int:
    """Rows of the file `name` in a world of this size, one at least."""
    rows = FILES[name].rows
    if name == "curated":
        rows = world.curated
    if name.startswith("test"):
        rows = tests
    if quick:
        rows = max(40, rows // 20)
    return max(1, round(scale * rows))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("data/tiny"), help="folder for the files")
    parser.add_argument("--world", choices=WORLDS, default="tiny")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--tests", type=int, default=500, help="rows of each test")
    parser.add_argument("--scale", type=float, default=1.0, help="multiplies the numbers of rows")
    parser.add_argument(
        "--quick", action="store_true", help="a smoke test's sizes: 1/20 of the rows, at least 40"
    )
    parser.add_argument(
        "--parquet", action="store_true", help="verl rows also as parquet (needs pyarrow)"
    )
    args = parser.parse_args()
    world = WORLDS[args.world]

    files = {}  # name -> rows
    owned = set()  # scenes of all files so far
    for name in FILES:
        number = number_of_rows(name, world, args.scale, args.quick, args.tests)
        rows = make(args.out, name, number, args.seed, world)
        files[name] = rows
        write(args.out / f"{name}.jsonl", rows)
        if args.parquet and "reward_model" in rows[0]:
            write(args.out / f"{name}.parquet", rows)
        scenes = {row["extra_info"]["scene"] for row in rows}
        assert owned.isdisjoint(scenes), f"a scene of {name} is in another file too"
        owned |= scenes
        print(f"{name:10s} {len(rows):7,d} rows on {len(scenes):7,d} scenes", flush=True)

    for name, share in world.from_below.items():
        write(args.out / f"{name}.jsonl", restate(files["align"], name, share, args.seed))
    write(args.out / "sft.json", mix(files["public"], files["curated"], args.seed))
    write(args.out / "words.json", [{"text": vocabulary(world)}])


if __name__ == "__main__":
    main()
