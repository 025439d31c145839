"""tools/nlvr.py and tools/statements.py: what the program understands and how it verifies it, the
files of the world on a small NLVR that is drawn here, and NLVR itself where ../shared is there."""

import json
import random
import re
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image, ImageChops, ImageDraw
from test_runs import commands, project  # noqa: F401

import align
import data
import eval as evaluation
import rlvr
import sft
from engine.arguments import parse as parse_flags
from tools import nlvr
from tools.statements import COLOURS, TOWERS, parse, spell_out, verify

STAGES = {"sft.py": sft, "align.py": align, "rlvr.py": rlvr, "eval.py": evaluation}
TALL = (("yellow",), ("blue", "black"), ("black", "black", "yellow", "blue"))
SHORT = (("yellow",), ("yellow",), ("yellow", "blue"))
FILES = ("easy", "base", "public", "curated", "pairs", "align", "rl")
TESTS = ("test_id", "test_hard", "test_ood")


# ------------------------------------------------------------------------------------- statements
VERDICTS = [  # statement, towers, the sentence of the right tower, verdict
    ("There is a tower with a blue block at the base", TALL, "base black no 1", True),
    ("there is no blue block as the base of a tower.", TALL, "base black no 1", False),
    ("There is exactly one tower with a blue block at the top", TALL, "top blue yes 1", True),
    ("There are two yellow items touching the wall", SHORT, "base yellow yes 3", False),
    ("There are at least two yellow items touching the wall", SHORT, "base yellow yes 3", True),
    ("There are 2 black blocks", TALL, "black 2 3", False),
    ("There are three black blocks", TALL, "black 2 3", True),
    ("There are at most 2 black blocks", TALL, "black 2 3", False),
    (
        "There is a tower with a blue block over a yellow block",
        SHORT,
        "blue above yellow yes 1",
        True,
    ),
    ("There is a black block on a blue block", TALL, "none no 1", True),
    ("There is a yellow block below a blue block", TALL, "blue above yellow yes 1", True),
    ("There is a tower with four blocks.", TALL, "size 4 yes 1", True),
    ("There is a tower with more than two blocks", SHORT, "size 2 no 0", False),
    ("There is a box with 4 items and a blue one on top", TALL, "size 4 top blue yes 1", True),
    ("There is a box with only yellow and blue items", SHORT, "only blue yellow yes 1", True),
    ("there is a black tower", TALL, "only black blue yellow no 0", False),
    (
        "there is a yellow tower with only one block",
        TALL,
        "only black blue yellow size 4 no 1",
        True,
    ),
    ("There is a tower with blocks of three different colors", TALL, "different 3 yes 1", True),
    ("There is 1 tower with 2 black blocks stacked together", TALL, "stacked black 2 yes 1", True),
    ("There is a tower with exactly two black blocks", TALL, "count black 2 yes 1", True),
    ("there is a tower with black second block", TALL, None, None),
    ("ll towers contain 1 yellow block", SHORT, "count yellow 1 yes 3", True),
    ("each tower has a yellow base", TALL, "base black no 1", False),
    ("two of the three towers has a yellow base", SHORT, "base yellow yes 3", False),
    ("the tower with four blocks has a blue block at the top", TALL, "size 4 top blue yes 1", True),
    ("There are two towers with the same height", SHORT, None, None),
    ("there is a tower with a yellow block between two blocks", TALL, None, None),
    ("there is exactly one tower which has a yellow black at the top", SHORT, None, None),
    ("", TALL, None, None),
]


@pytest.mark.parametrize("sentence, towers, right, verdict", VERDICTS)
def test_statements(sentence, towers, right, verdict):
    statement = parse(sentence)
    if verdict is None:
        assert statement is None
        return
    sentences, found = verify(statement, towers)
    assert sentences[2] == f"right {right}"
    assert [words.split()[0] for words in sentences] == ["left", "middle", "right"]
    assert found == verdict
    assert parse(nlvr.spell(sentence)) == statement  # as the model is shown it


def test_the_order_of_the_boxes_does_not_matter_to_a_verdict():
    for sentence, towers, _, verdict in VERDICTS:
        if verdict is not None:
            for order in nlvr.ORDERS:
                turned = tuple(towers[box] for box in order)
                assert verify(parse(sentence), turned)[1] == verdict


READINGS = {
    "There is no tower with a blue block over a yellow one": "exactly 0 tower blue above yellow",
    "There are at least two towers with at most 2 blocks": "at least 2 tower size at most 2",
    "there is a tower with more than two blocks": "at least 1 tower size at least 3",
    "There are 2 towers with only 1 black item": "exactly 2 tower count black exactly 1",
    "There are 3 yellow blocks.": "exactly 3 yellow",
    "There is a box with only yellow and black items": "at least 1 tower only black yellow",
    "Each tower has a blue base": "exactly 3 tower base blue",
    "There is a tower with a blue block at the top and a black block at the base": (
        "at least 1 tower top blue and base black"
    ),
    "there is 1 tower with 2 blue blocks stacked together": (
        "exactly 1 tower stacked blue at least 2"
    ),
    "There is a tower with blocks of 3 different colours": "at least 1 tower different exactly 3",
}


@pytest.mark.parametrize("sentence", READINGS)
def test_what_a_statement_was_understood_to_say(sentence):
    assert spell_out(parse(sentence)) == READINGS[sentence]


def test_a_reference_is_whole_and_counted_block_by_block():
    response = nlvr.good(TALL, parse("There are at least three black blocks"))
    caption, think, answer = data.parts(response).values()
    assert caption == (
        "left 1 yellow ; middle 1 blue ; middle 2 black ; "
        "right 1 black ; right 2 black ; right 3 yellow ; right 4 blue"
    )
    assert think == (
        "at least 3 black . left black 0 0 . middle black 1 1 . right black 2 3 . so true ."
    )
    assert answer == "true"
    assert data.count_items(caption) == 7 and data.count_steps(think) == 5


# --------------------------------------------------------------------------------------- pictures
RGB = {colour: rgb for rgb, colour in nlvr.RGB.items()}


def paint(towers):
    """A picture as NLVR's: RGBA, bars between the boxes."""
    image = Image.new("RGBA", (400, 100), (128, 128, 128, 255))
    pen = ImageDraw.Draw(image)
    for left, tower in zip(nlvr.LEFT_EDGES, towers, strict=True):
        pen.rectangle((left, 0, left + 99, 99), nlvr.BACKGROUND)
        for y, colour in zip(nlvr.BLOCK_Y, tower, strict=False):
            pen.rectangle((left + 40, y, left + 59, y + 19), RGB[colour])
    return image


def test_another_order_moves_the_boxes_pixel_by_pixel():
    image = paint(TALL).convert("RGB")
    for order in nlvr.ORDERS:
        turned = tuple(TALL[box] for box in order)
        moved = nlvr.put_together([image] * 3, list(order))
        assert ImageChops.difference(moved, paint(turned).convert("RGB")).getbbox() is None
        assert nlvr.read_towers(moved) == turned
    mixed = nlvr.put_together([image, paint(SHORT).convert("RGB"), image], [2, 2, 0])
    assert nlvr.read_towers(mixed) == (TALL[2], SHORT[2], TALL[0])


def test_other_shapes_are_no_towers():
    image = paint(TALL)
    ImageDraw.Draw(image).rectangle((5, 90, 14, 99), RGB["blue"])
    assert nlvr.read_towers(image) is None
    tower = ["Black", "square", 20, 40, 80]
    assert nlvr.towers_of([[tower]] * 3) == (("black",),) * 3
    for other in (
        ["Black", "circle", 20, 40, 80],
        ["Black", "square", 10, 40, 80],
        ["Black", "square", 20, 41, 80],
        ["Black", "square", 20, 40, 81],
    ):
        assert nlvr.towers_of([[tower], [tower], [tower, other]]) is None


# --------------------------------------------------------------------------------- the whole world
def sentence_of(number):
    """A statement of one or two conditions, or one that is not understood; 0 to 71 differ."""
    how = ("a tower", "exactly one tower", "no tower", "at least two towers")[number % 4]
    colour = COLOURS[number // 4 % 3]
    place = ("base", "top")[number // 12 % 2]
    kind = number // 24
    if kind == 0:
        return f"There is {how} with a {colour} block at the {place}."
    if kind == 1:
        return f"There is {how} with 3 blocks and a {colour} block at the {place}."
    return f"There is {how} with a {colour} block at the {place} for once."


def row_of(split, number, towers):
    names = {colour: name for name, colour in nlvr.NAMES.items()}
    row = {
        "id": f"nlvr-{split}-{number}",
        "image": f"images/{split}-{number}.png",
        "sentence": sentence_of(number),
        "statement_id": f"{number}-0",
        "answer": "true" if number % 2 else "false",
    }
    if split == "dev":
        row["boxes"] = [
            [
                [names[colour], "square", 20, 40, y]
                for y, colour in zip(nlvr.BLOCK_Y, tower, strict=False)
            ]
            for tower in towers
        ]
    return row


def write_nlvr(folder):
    """A small NLVR: 72 rows a split on towers, and one row on another shape."""
    rng = random.Random(0)
    (folder / "images").mkdir(parents=True)
    for split in ("dev", "train"):
        rows = []
        for number in range(72):
            towers = tuple(tuple(rng.choices(COLOURS, k=rng.randint(1, 4))) for _ in range(3))
            rows.append(row_of(split, number, towers))
            paint(towers).save(folder / rows[-1]["image"])
        rows.append(row_of(split, 72, towers))
        image = paint(towers)
        ImageDraw.Draw(image).rectangle((5, 90, 14, 99), RGB["blue"])
        image.save(folder / rows[-1]["image"])
        if split == "dev":
            rows[-1]["boxes"][0].append(["#0099ff", "square", 10, 5, 90])
        (folder / f"{split}.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))


def run(monkeypatch, source, out, *flags):
    arguments = ["nlvr.py", "--data", str(source), "--out", str(out), "--quick", *flags]
    monkeypatch.setattr("sys.argv", arguments)
    small = {name: replace(file, rows=min(file.rows, 4000)) for name, file in nlvr.FILES.items()}
    monkeypatch.setattr(nlvr, "FILES", small)
    nlvr.main()


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = tmp_path_factory.mktemp("nlvr")
    write_nlvr(folder / "source")
    return folder / "source"


@pytest.fixture(scope="module")
def world(source):
    out = source.parent / "world"
    with pytest.MonkeyPatch.context() as patch:
        run(patch, source, out)
    return out


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def asked(row):
    """(prompt, response or None) of a row in any of the forms."""
    if "messages" in row:
        user, assistant = row["messages"]
        return user["content"].removeprefix("<image>"), assistant["content"]
    (user,) = row["prompt"]
    return user["content"].removeprefix("<image>"), row.get("teacher_response")


def towers_in(row):
    """The towers that a row's picture has by its extra_info."""
    blocks = [block.split() for block in row["extra_info"]["towers"].split(" ; ")]
    return tuple(tuple(colour for name, _, colour in blocks if name == tower) for tower in TOWERS)


def test_pictures_are_what_the_rows_say(world):
    checked = 0
    for name in (*FILES, *TESTS):
        for row in lines(world / f"{name}.jsonl"):
            if "messages" in row:
                (path,) = row["images"]
            elif "image" in row:
                path = row["image"]
            else:
                path = row["images"][0]["path"]
            assert nlvr.read_towers(Image.open(world / path)) == towers_in(row), path
            checked += 1
    assert checked > 400


def test_no_statement_and_no_picture_of_a_test_is_elsewhere(world):
    pictures, statements = {}, {}
    for name in (*FILES, *TESTS):
        rows = lines(world / f"{name}.jsonl")
        assert rows, name
        pictures[name] = {tuple(sorted(towers_in(row))) for row in rows}
        statements[name] = {re.sub("^(short|read) ", "", asked(row)[0]) for row in rows}
    for test in TESTS:
        for name in FILES:
            assert pictures[test].isdisjoint(pictures[name]), (test, name)
            assert statements[test].isdisjoint(statements[name]), (test, name)
    for name in ("easy", "base", "public", "curated", "pairs"):
        assert pictures[name].isdisjoint(pictures["align"] | pictures["rl"]), name
    assert statements["align"].isdisjoint(statements["curated"] - statements["rl"])


def test_responses_are_right_where_they_are_to_be(world):
    checked = Counter()
    for name in ("easy", "base", "curated", "align", "test_id", "test_hard"):
        for row in lines(world / f"{name}.jsonl"):
            prompt, response = asked(row)
            towers = towers_in(row)
            kind = prompt.split()[0]
            checked[name, kind] += 1
            whole = row["extra_info"]["towers"]
            if kind == "describe":
                assert response == whole
            elif kind == "look":
                tower = prompt.split()[1]
                blocks = [block for block in whole.split(" ; ") if block.startswith(tower)]
                assert response == " ; ".join(blocks)
            elif kind == "read":
                assert response == spell_out(parse(prompt.removeprefix("read ")))
            elif kind == "short":
                _, verdict = verify(parse(prompt.removeprefix("short ")), towers)
                assert response == ("true" if verdict else "false")
            else:
                sentences, verdict = verify(parse(prompt), towers)
                answer = "true" if verdict else "false"
                caption, think, given = data.parts(response).values()
                assert caption == whole
                steps = [spell_out(parse(prompt)), *sentences, f"so {answer}"]
                assert think == " ".join(f"{words} ." for words in steps)
                assert given == answer
    assert {kind for _, kind in checked} == {"describe", "look", "read", "short", "there"}


def test_public_demonstrations_are_terse_and_partly_wrong_at_the_stated_rates():
    rng = random.Random(0)
    statement = parse("There are at least three black blocks")
    named = wrong_answers = bare = steps = 0
    for _ in range(2000):
        caption, think, answer = data.parts(nlvr.terse(TALL, statement, rng)).values()
        named += len(caption.split(" ; "))
        wrong_answers += answer != "true"
        bare += think == f"so {answer} ."
        steps += think.count("black")
        assert not set(caption.split()) & set(TOWERS)
    assert named / 2000 == pytest.approx(0.6 * 7, abs=0.15)
    assert wrong_answers / 2000 == pytest.approx(0.05, abs=0.02)
    assert bare / 2000 == pytest.approx(0.5 + 0.5 * 0.3**3, abs=0.04)
    assert steps / 2000 == pytest.approx(0.5 * 0.7 * 3, abs=0.1)


def test_the_answer_that_is_rewarded_is_nlvrs_own(world, source):
    answers = {row["id"]: row["answer"] for row in lines(source / "dev.jsonl")}
    answers |= {row["id"]: row["answer"] for row in lines(source / "train.jsonl")}
    for name in ("align", "rl", *TESTS):
        for row in lines(world / f"{name}.jsonl"):
            answer = row["reward_model"]["ground_truth"]
            assert answer == answers[row["extra_info"]["id"]]
            assert answer in ("true", "false")
    assert all("teacher_response" not in row for row in lines(world / "rl.jsonl"))
    orders = Counter(row["extra_info"]["id"] for row in lines(world / "align.jsonl"))
    assert set(orders.values()) == {6}
    orders = Counter(row["extra_info"]["id"] for row in lines(world / "test_id.jsonl"))
    assert set(orders.values()) == {3}


def test_every_file_goes_through_the_loader_and_has_its_words_in_the_vocabulary(world):
    (row,) = json.loads((world / "words.json").read_text())
    words = set(row["text"].split())
    kinds = {"sft.json": "sft", "align.jsonl": "align", "pairs.jsonl": "pairs", "rl.jsonl": "rl"}
    kinds |= {f"{test}.jsonl": "eval" for test in TESTS}
    for file, kind in kinds.items():
        rows = data.read(str(world / file), kind)
        assert all(rows[i] is not None for i in range(len(rows))) and not rows.bad, file
    for name in (*FILES, *TESTS):
        for row in lines(world / f"{name}.jsonl"):
            prompt, response = asked(row)
            assert set(f"{prompt} {response or ''}".split()) <= words, name


def test_same_seed_same_bytes_other_seed_other_rows(world, source, tmp_path, monkeypatch):
    run(monkeypatch, source, tmp_path / "again")
    for path in world.rglob("*.*"):
        assert (tmp_path / "again" / path.relative_to(world)).read_bytes() == path.read_bytes()
    run(monkeypatch, source, tmp_path / "other", "--seed", "1")
    for name in ("base.jsonl", "sft.json", "pairs.jsonl"):
        assert (tmp_path / "other" / name).read_bytes() != (world / name).read_bytes()
    for name in ("align", "rl", *TESTS, "words"):  # they are NLVR's rows, at every seed
        file = "words.json" if name == "words" else f"{name}.jsonl"
        assert (tmp_path / "other" / file).read_bytes() == (world / file).read_bytes()


def test_bad_input_is_named(source, tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError, match="dev.jsonl is missing.*--data"):
        nlvr.load(tmp_path, "dev")
    row = lines(source / "dev.jsonl")[0]
    (tmp_path / "images").mkdir()
    image = tmp_path / row["image"]
    image.write_bytes((source / row["image"]).read_bytes())

    def load(row):
        (tmp_path / "dev.jsonl").write_text(json.dumps(row))
        return nlvr.load(tmp_path, "dev")

    assert len(load(row)) == 1
    with pytest.raises(ValueError, match=r"dev.jsonl:1: .*other towers"):
        load({**row, "boxes": row["boxes"][1:] + row["boxes"][:1]})
    with pytest.raises(ValueError, match=r"dev.jsonl:1 lacks \['sentence'\].*not a file of NLVR"):
        load({name: value for name, value in row.items() if name != "sentence"})
    with pytest.raises(ValueError, match="dev.jsonl:1 has answer 'yes'"):
        load({**row, "answer": "yes"})
    for text, why in (('{"x', "not JSON"), ("[1]", "a JSON list where an object is expected")):
        (tmp_path / "dev.jsonl").write_text(text)
        with pytest.raises(ValueError, match=f"dev.jsonl:1: {why}"):
            nlvr.load(tmp_path, "dev")
    image.unlink()
    with pytest.raises(FileNotFoundError, match="dev-0.png"):
        load(row)
    # From the shell it is one message.
    monkeypatch.setattr(sys, "argv", ["nlvr.py", "--data", str(tmp_path), "--out", str(tmp_path)])
    with pytest.raises(SystemExit, match="nlvr.py: .*dev-0.png"):
        nlvr.main()


# -------------------------------------------------------------------------------------- NLVR itself
@pytest.fixture(scope="module")
def real(shared):
    return shared / "data/nlvr"


def test_verdicts_are_nlvrs_answers(real):
    """dev.jsonl is what the meanings were chosen on; train.jsonl's towers are read from pixels."""
    dev, train = nlvr.load(real, "dev"), nlvr.load(real, "train")
    assert nlvr.agreement(dev) == (
        "540 of 676 statements understood (79.9%), 539 verdicts as NLVR's answer (99.8%)"
    )
    assert nlvr.agreement(train) == (
        "774 of 946 statements understood (81.8%), 738 verdicts as NLVR's answer (95.3%)"
    )
    parts = nlvr.split(dev)
    sizes = {part: len(examples) for part, examples in parts.items()}
    assert sum(sizes.values()) == 676 and min(sizes.values()) > 100
    for one, other in (("test", "align"), ("test", "learn"), ("align", "learn")):
        for key in ("number", "sentence", "picture"):
            ours = {getattr(example, key) for example in parts[one]}
            theirs = {getattr(example, key) for example in parts[other]}
            assert ours.isdisjoint(theirs), (one, other, key)


@pytest.mark.slow
def test_nlvrs_own_orders_are_those_made_here(real):
    """train.jsonl has each picture in two orders of its boxes: the one makes the other."""
    pairs = {}
    for example in nlvr.load(real, "train"):
        statement, _, _ = example.id.rpartition("-")
        pairs.setdefault(statement, []).append(nlvr.open_image(example.image))
    assert len(pairs) == 473
    for one, other in list(pairs.values())[:50]:
        made = [nlvr.put_together([one] * 3, list(order)) for order in nlvr.ORDERS]
        assert any(ImageChops.difference(each, other).getbbox() is None for each in made)


# ------------------------------------------------------------------------------------ runs/nlvr.sh
@pytest.mark.parametrize("size", [(), ("--quick",)])
def test_the_script_gives_every_arm_as_many_updates(project, source, size, monkeypatch):  # noqa: F811
    """Its commands are the stages' flags, and behind SFT each arm with GRPO updates as often."""
    monkeypatch.chdir(project)
    (project / "data/nlvr").mkdir(parents=True)
    (project / "data/nlvr-quick").mkdir()
    for name in ("nlvr", "nlvr-quick"):
        for test in TESTS:
            row = {"reward_model": {"ground_truth": "true"}}
            (project / f"data/{name}/{test}.jsonl").write_text(json.dumps(row) + "\n")
    found = commands(project, "nlvr.sh", source, *size)
    runs = {}
    for words, _ in found:
        script, *flags = words[1:]
        if script in STAGES:
            args = parse_flags(STAGES[script].Args, flags, with_paths=False)
            assert args.max_pixels == 1700
            if script != "eval.py":
                runs[Path(args.out).name] = args
    learnt = [runs[name].data.split("/")[-1] for name in ("easy", "base")]
    assert learnt == ["easy.jsonl", "base.jsonl"]
    assert all(runs[name].resume for name in runs)  # what a stop cut short goes on
    behind = {
        "sft-grpo": ["sft-grpo"],
        "align-grpo": ["align", "align-grpo"],
        "refs-grpo": ["refs", "refs-grpo"],
    }
    updates = {sum(runs[name].steps for name in names) for names in behind.values()}
    assert updates == {2 if size else 100}
    assert runs["align"].policy == runs["refs"].policy == runs["sft-grpo"].policy == runs["sft"].out
    assert runs["align-grpo"].policy == runs["align"].out
    assert runs["refs-grpo"].policy == runs["refs"].out
