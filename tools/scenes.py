"""
The embedded world: small pictures, questions with one right answer, demonstrations in PRISM's three parts. No download.

A picture is a 3 x 3 grid of 8-pixel cells (24 x 24), each empty or holding one of 4 colours x 3 shapes; with Qwen3-VL's
patch 4 and merge 2 a cell is one visual token. A question counts the shapes of one or two colours, in the picture or in a
part of it, or adds up their sides (circle 0, triangle 3, square 4). Prompts are one short line without a system message;
words and marks stand apart, so that a tokenizer may split at white space.

    python tools/scenes.py --out data/tiny --seed 0   # --quick: 1/20 of the rows; --parquet: verl rows also as parquet

    words.json                every word of the world, for the tokenizer: the same for each seed and size
    easy, look, base.jsonl    sharegpt, accurate, in this order: descriptions; places of colours; demonstrations
    public, curated.jsonl     sharegpt: many terse, partly wrong demonstrations (rates below); few complete and right ones
    sft.json                  both shuffled together, in the other sharegpt dialect
    align.jsonl, rl.jsonl     verl rows with teacher_response, curated, not in sft.json; with answers only, harder
    pairs.jsonl               warm-up pairs: a curated and a public response to one prompt
    test_{id,hard,ood}.jsonl  verl rows with references; ood has more objects than any other file but look and base
No scene (what lies where) is in two files (sft.json apart): a hash of the scene says which may hold it. Same seed and
sizes, same bytes (of PNG files: with the same Pillow).
"""

import argparse
import json
import random
import zlib
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageChops, ImageDraw

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

# What is wrong with the public demonstrations, as shares.
DROPPED = 0.4  # of the objects: left out of the caption (one always stays)
WRONG = 0.1  # of the objects that a caption names: with another colour or shape
BARE = 0.5  # of the demonstrations: the result without a step
SKIPPED = 0.3  # of the steps of the others: left out
MISTAKEN = 0.05  # of the answers: off by one


@dataclass(frozen=True)
class File:
    rows: int
    objects: tuple[int, int]  # fewest and most in a scene
    families: str  # of questions: c count a colour, r in a region, o count two colours, s sides of a colour, t of two
    share: int  # of all scenes, in parts of the sum: those that this file may hold
    matches: int = 1  # fewest objects that an answer rests on
    per_scene: int = 1  # questions about one picture
    kinds: tuple = (
        0,
        0,
        0,
        1,
    )  # weights of rows that ask for a description, places, the bare answer, the three parts


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
OWNERS = [name for name, file in FILES.items() for _ in range(file.share)]
SFT_FILES = ("easy", "look", "base", "public", "curated")


def draw_scene(rng: random.Random, name: str) -> tuple:
    """A scene that file `name` may hold: nine entries in raster order, each None or (colour, shape)."""
    while True:
        cells = [None] * 9
        for place in rng.sample(range(9), rng.randint(*FILES[name].objects)):
            cells[place] = (rng.choice(tuple(COLOURS)), rng.choice(tuple(SIDES)))
        if OWNERS[zlib.crc32(describe(cells).encode()) % len(OWNERS)] == name:
            return tuple(cells)


def paint(scene: tuple, rng: random.Random) -> Image.Image:
    """24 x 24 RGB: size, place and colour of each shape vary a little, and every pixel carries some noise."""
    image = Image.new("RGB", (3 * CELL, 3 * CELL), (rng.randint(15, 60),) * 3)
    pen = ImageDraw.Draw(image)
    for place, (colour, shape) in ((place, thing) for place, thing in enumerate(scene) if thing):
        fill = tuple(max(0, min(255, part + rng.randint(-25, 25))) for part in COLOURS[colour])
        size = rng.randint(5, 6)
        x, y = (CELL * cell + rng.randint(0, 7 - size) for cell in (place % 3, place // 3))
        if shape == "triangle":
            pen.polygon([(x, y + size), (x + size, y + size), (x + size // 2, y)], fill)
        else:
            (pen.ellipse if shape == "circle" else pen.rectangle)((x, y, x + size, y + size), fill)
    noise = Image.frombytes("RGB", image.size, rng.randbytes(3 * image.width * image.height))
    return ImageChops.add(image, noise.point(lambda value: value // 10), offset=-12)


def solve(scene: tuple, question: str) -> tuple[list[tuple[int, int]], int]:
    """([(place, running total) of each step, in raster order], answer)."""
    words, steps, total = question.split(), [], 0
    where = REGIONS[words[-1]].split() if "in" in words else POSITIONS
    for place, thing in enumerate(scene):
        if thing and POSITIONS[place] in where and thing[0] in words:
            total += 1 if words[0] == "count" else SIDES[thing[1]]
            steps.append((place, total))
    return steps, total


def ask(rng: random.Random, scene: tuple, file: File) -> str:
    for _ in range(
        50
    ):  # a scene may allow no question with enough matches: then the last one stays
        first, second = rng.sample(tuple(COLOURS), 2)
        count, region = f"count {first}", rng.choice(tuple(REGIONS))
        question = {
            "c": count,
            "r": f"{count} in {region}",
            "o": f"{count} or {second}",
            "s": f"sides {first}",
            "t": f"sides {first} or {second}",
        }[rng.choice(file.families)]
        if len(solve(scene, question)[0]) >= file.matches:
            break
    return question


def describe(scene: tuple) -> str:
    return " ; ".join(
        f"{POSITIONS[place]} {' '.join(thing)}" for place, thing in enumerate(scene) if thing
    )


def three_parts(caption: str, steps: list[str], answer: int) -> str:
    think = " ".join(f"{step} ." for step in (*steps, f"so {answer}"))
    return f"<caption>\n{caption}\n</caption>\n<think>\n{think}\n</think>\n<answer>\n{answer}\n</answer>"


def good(scene: tuple, question: str) -> str:
    """The references' manner: every object with its place, every step with the running total, always right."""
    steps, answer = solve(scene, question)
    return three_parts(
        describe(scene),
        [f"{POSITIONS[at]} {' '.join(scene[at])} {total}" for at, total in steps],
        answer,
    )


def terse(scene: tuple, question: str, rng: random.Random) -> str:
    """The public manner: no places, objects left out or wrong, steps left out; the answer is nearly always right."""
    things = [thing for thing in scene if thing]
    named = [thing for thing in things if rng.random() >= DROPPED] or [rng.choice(things)]
    for i, (colour, shape) in enumerate(named):
        others = (
            [(c, shape) for c in COLOURS if c != colour],
            [(colour, s) for s in SIDES if s != shape],
        )
        if rng.random() < WRONG:
            named[i] = rng.choice(rng.choice(others))
    steps, answer = solve(scene, question)
    if rng.random() < MISTAKEN:
        answer += 1 if answer == 0 else rng.choice((-1, 1))
    kept = (
        []
        if rng.random() < BARE
        else [" ".join(scene[place]) for place, _ in steps if rng.random() >= SKIPPED]
    )
    return three_parts(" ; ".join(map(" ".join, named)), kept, answer)


def demonstrate(name: str, scene: tuple, question: str, rng: random.Random) -> tuple[str, str]:
    """(prompt, response) of a row of one of the SFT files."""
    steps, answer = solve(scene, question)
    places = " ".join(POSITIONS[place] for place, _ in steps)
    kinds = [
        ("describe", describe(scene)),
        (f"where {question.split(' ', 1)[1]}", places or "none"),
        (f"short {question}", str(answer)),
        (question, terse(scene, question, rng) if name == "public" else good(scene, question)),
    ]
    return rng.choices(kinds, FILES[name].kinds)[0]


def items(name: str, rows: int, seed: int):
    """Yields (number of the picture, scene, question, rng) for each row; questions about one picture are neighbours."""
    seen = set()
    for row in range(rows):
        picture = row // FILES[name].per_scene
        if row % FILES[name].per_scene == 0:
            rng = random.Random(f"{seed} {name} {picture}")
            scene = draw_scene(rng, name)
            while name.startswith("test") and scene in seen:  # a test has no scene twice
                scene = draw_scene(rng, name)
            seen.add(scene)
        yield picture, scene, ask(rng, scene, FILES[name]), rng


def make(out: Path, name: str, rows: int, seed: int) -> list[dict]:
    """Saves the pictures of a file and returns its rows; image paths are relative to `out`."""
    (out / "images" / name).mkdir(parents=True, exist_ok=True)
    result = []
    for index, (picture, scene, question, rng) in enumerate(items(name, rows, seed)):
        path = f"images/{name}/{picture:05d}.png"
        if index % FILES[name].per_scene == 0:
            paint(scene, rng).save(out / path, compress_level=1)
        prompt, response = demonstrate(name, scene, question, rng)
        turn, truth = (
            {"role": "user", "content": f"<image>{prompt}"},
            {"index": index, "scene": describe(scene)},
        )
        if name in SFT_FILES:
            row = {"messages": [turn, {"role": "assistant", "content": response}], "images": [path]}
        elif name == "pairs":
            student = terse(scene, question, rng)
            row = {
                "image": path,
                "prompt": [turn],
                "teacher_response": response,
                "student_response": student,
            }
        else:
            row = {"data_source": name, "prompt": [turn], "images": [{"path": path}]}
            row["reward_model"] = {"style": "rule", "ground_truth": str(solve(scene, question)[1])}
            row |= {} if name == "rl" else {"teacher_response": response}
        result.append({**row, "extra_info": truth})
    return result


def write(path: Path, rows: list[dict]) -> None:
    """JSON (an array), JSONL, or parquet with the pictures' bytes inside: as the file's ending says."""
    if path.suffix == ".parquet":
        import pyarrow.parquet  # an optional extra

        rows = [
            {
                **r,
                "images": [
                    {**i, "bytes": (path.parent / i["path"]).read_bytes()} for i in r["images"]
                ],
            }
            for r in rows
        ]
        return pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    lines = [json.dumps(row) for row in rows]
    path.write_text(
        "[\n" + ",\n".join(lines) + "\n]\n" if path.suffix == ".json" else "\n".join([*lines, ""])
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("data/tiny"), help="folder for the files")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--scale", type=float, default=1.0, help="multiplies the numbers of rows")
    parser.add_argument(
        "--quick", action="store_true", help="a smoke test's sizes: 1/20 of the rows, at least 40"
    )
    parser.add_argument(
        "--parquet", action="store_true", help="verl rows also as parquet (needs pyarrow)"
    )
    args = parser.parse_args()

    files, scenes = {}, {}
    for name, file in FILES.items():
        rows = max(1, round(args.scale * (max(40, file.rows // 20) if args.quick else file.rows)))
        files[name] = make(args.out, name, rows, args.seed)
        write(args.out / f"{name}.jsonl", files[name])
        if args.parquet and name not in (*SFT_FILES, "pairs"):
            write(args.out / f"{name}.parquet", files[name])
        scenes[name] = {row["extra_info"]["scene"] for row in files[name]}
        print(
            f"{name:10s} {len(files[name]):7,d} rows on {len(scenes[name]):7,d} scenes", flush=True
        )
    assert len(set().union(*scenes.values())) == sum(map(len, scenes.values())), (
        "a scene is in two files"
    )

    mixed = files["public"] + files["curated"]
    random.Random(f"{args.seed} sft").shuffle(mixed)
    for row in mixed:
        user, assistant = (turn["content"] for turn in row.pop("messages"))
        row["conversations"] = [
            {"from": "human", "value": user},
            {"from": "gpt", "value": assistant},
        ]
    write(args.out / "sft.json", mixed)
    words = [
        *three_parts("; describe where none short count sides or in", [], 0).split(),
        *POSITIONS,
        *COLOURS,
        *SIDES,
    ]
    write(
        args.out / "words.json",
        [{"text": " ".join([*words, *REGIONS, *map(str, range(4 * 9 + 1))])}],
    )


if __name__ == "__main__":
    main()
