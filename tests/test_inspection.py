"""`python data.py check`: what it counts is what a stage counts and leaves out, what it says of a
sample it says of a sample, and a wrong command is one line."""

import json
import re
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
from conftest import ROOT, SHARED
from PIL import Image
from test_data import (  # noqa: F401
    ASSISTANT,
    RESPONSE,
    USER,
    bpe,
    checkpoint,
    encoder_of,
    folder,
    picture,
    turns,
    verl,
    write,
)

import align
import data
from data import Check, read, split_spans
from engine.answers import equivalent
from engine.arguments import Common
from engine.inspection import Inspection, image_digests, kind_of_answer, quantile, sample
from engine.rows import BadRow

LONG = RESPONSE.replace("one dot", "one dot, " * 30)


def inspect(path, kind=None, encoder=None, **flags):
    args = Check(kind=kind, **flags)
    return Inspection(read(path, kind), args, split_spans, encoder)


def text_of(found):
    return "\n".join(found.lines())


def end_of(capsys, *arguments):
    """(exit status, stdout, stderr) of the command line."""
    with pytest.raises(SystemExit) as end:
        data.main([str(argument) for argument in arguments])
    printed = capsys.readouterr()
    return end.value.code, printed.out, printed.err


def test_images_in_memory_have_digests_too():
    red, blue = (Image.new("RGB", (2, 2), colour) for colour in ("red", "blue"))
    of = [image_digests(SimpleNamespace(images=[image])) for image in (red, red.copy(), blue)]
    assert of[0] == of[1] != of[2]


# ----------------------------------------------------------------------------- the command
def test_what_is_usable_and_what_is_not(folder, capsys):  # noqa: F811
    row = turns(USER, ASSISTANT)
    (folder / "images/1.png").write_bytes(b"broken")
    broken = turns(USER, ASSISTANT, images=["images/1.png"])
    path = write(folder, row, broken, row | {"images": []}, "{", verl(), row)
    status, out, _ = end_of(capsys, "check", path)
    assert status == 0
    assert f"{path}: 3 of 6 rows usable" in out and "How many dots?" in out
    assert f"  1 an image cannot be read\n    {path}:2: an image cannot be read" in out
    assert f"  1 not valid JSON\n    {path}:4: not valid JSON" in out


def test_exit_status_and_one_line(folder, capsys):  # noqa: F811
    good = write(folder, turns(USER, ASSISTANT))
    none = write(folder, "{", name="bad.jsonl")
    empty = folder / "empty.jsonl"
    empty.write_text("")
    assert end_of(capsys, "check", good)[0] == 0
    assert end_of(capsys, "check", none)[0] == 1
    assert end_of(capsys, "check", good, none)[0] == 1
    for arguments, says in (
        (("check", "nope.jsonl"), r"nope.jsonl: no such file"),
        (("check", good, "nope.jsonl"), r"nope.jsonl: no such file"),
        (("check", good, "--against", "nope.jsonl"), r"nope.jsonl: no such file"),
        (("check", folder), r"a folder"),
        (("check", empty), r"empty.jsonl: the file holds no rows"),
        (("check", good, "--policy", "./nope"), r"./nope: no such folder"),
        (("check", good, "--policy", folder), r"has no config.json"),
        (("check", good, "--image_root", "nope"), r"--image_root nope: no such folder"),
        (("check", good, "--rows", "-1"), r"--rows is -1: it must be 0 or more"),
        (("check", good, "--max_prompt", "0"), r"--max_prompt is 0: it must be 1 or more"),
        (("check", good, "--kind", "x"), r"argument --kind: invalid choice: 'x'"),
        (("check", good, "--polcy", "x"), r"there is no --polcy: did you mean --policy\?"),
        (("chek", good), r"invalid choice: 'chek'"),
        (("check",), r"required: file"),
        ((), r"required: command, file"),
    ):
        status, _, said = end_of(capsys, *arguments)
        assert status == 2, arguments
        assert re.fullmatch(rf"data.py: .*{says}.*\n", said), (arguments, said)


@pytest.mark.slow
def test_no_traceback_from_the_shell(folder):  # noqa: F811
    command = [sys.executable, ROOT / "data.py", "check", "nope.jsonl"]
    run = subprocess.run(command, capture_output=True, text=True, cwd=folder)
    assert run.returncode == 2 and not run.stdout
    assert run.stderr == (
        "data.py: nope.jsonl: no such file (one JSON, JSONL or parquet file is expected)\n"
    )


def test_flags_are_the_stages(capsys):
    for name in ("max_prompt", "max_response", "max_pixels", "max_side", "image_root"):
        assert getattr(Check(), name) == getattr(Common, name)
        assert getattr(Check(), name) == getattr(align.Args, name)
    status, manual, _ = end_of(capsys, "--help")
    assert status == 0 and "python data.py check FILE" in manual
    for name in Check.__dataclass_fields__:
        assert f"--{name} " in manual


# ----------------------------------------------------------------------------- a row as it is read
def test_a_row_is_shown_as_it_is_read(folder, capsys):  # noqa: F811
    row = verl(teacher_response=LONG, images=["images/0.png"])
    row["extra_info"] = {"choices": ["one", "two"]}
    row["reward_model"]["equivalent_answers"] = ["(A)"]
    path = write(folder, "{", row, verl())
    out = end_of(capsys, "check", path)[1]
    perception, reasoning = split_spans(LONG)
    assert f"{path}:2, as it is read" in out and f"{path}:3," not in out
    assert f"[user]\n{USER['content']}" in out
    assert f"[perception, of the reference]\n{perception}\n" in out
    assert f"[reasoning, of the reference]\n{reasoning}\n" in out
    assert "[answer] '1'\n[equivalent] ('(A)',)\n[choices] ('one', 'two')" in out
    assert f"{path}:3, as it is read" in end_of(capsys, "check", path, "--show", 2)[1]
    assert "as it is read" not in end_of(capsys, "check", path, "--show", 0)[1]
    free = write(folder, turns(USER, ASSISTANT | {"content": "One."}))
    out = end_of(capsys, "check", free)[1]
    assert "[the reference is not <caption>, <think>, <answer>: no spans]\nOne.\n" in out
    assert "references that are not in the response's form: 1 of 1 (100.0 %)" in out
    pair = {"question": "How?", "teacher_response": RESPONSE, "student_response": LONG}
    out = end_of(capsys, "check", write(folder, pair))[1]
    assert f"[reasoning, of the policy]\n{reasoning}\n" in out


def test_a_row_is_shown_as_the_model_sees_it(folder, checkpoint, monkeypatch, capsys):  # noqa: F811
    monkeypatch.setitem(sys.modules, "model", None)  # it needs no weights, so not their loader
    injected = turns(USER | {"content": "<image><|im_end|>"}, ASSISTANT)
    path = write(folder, injected, turns(USER, ASSISTANT))
    status, out, _ = end_of(capsys, "check", path, "--policy", checkpoint)
    assert status == 0
    assert f"{path}: 1 of 2 rows usable\n  1 a special token in the text\n" in out
    assert f"{path}:2, as the policy sees it: " in out and " 9 of them image (not shown)" in out
    assert f"<|im_start|>assistant\n{RESPONSE}<|im_end|>" in out


# ----------------------------------------------------------------------------- tokens and limits
def rows_of(kind):
    """Rows of one kind, some with more images, one with a long response."""
    look = [f"images/{i}.png" for i in range(3)]
    two = USER | {"content": "<image> and <image>: how many dots?"}
    if kind == "sft":
        rows = [turns(USER, ASSISTANT), turns(two, ASSISTANT, images=look[:2])]
        return [*rows, turns(USER, ASSISTANT, USER | {"content": "Sure?"}, ASSISTANT)]
    if kind == "pairs":
        row = {"question": "How?", "teacher_response": RESPONSE, "student_response": LONG}
        return [row, row | {"student_response": RESPONSE, "image": look[2]}]
    rows = [verl(), verl(prompt=[two], images=look[1:]), verl(prompt=[two], images=look[:2])]
    if kind == "rl":
        rows[0]["teacher_response"] = LONG  # which RLVR does not read
    if kind == "align":
        rows = [row | {"teacher_response": RESPONSE} for row in rows]
        rows[1]["teacher_response"] = LONG
    return rows


@pytest.fixture
def images(folder):  # noqa: F811
    for i, size in enumerate([(60, 31), (24, 24), (90, 200)]):
        picture(*size).save(folder / f"images/{i}.png")
    return folder


@pytest.mark.parametrize("limits", [{}, {"max_pixels": 900}, {"max_side": 50}])
@pytest.mark.parametrize("kind", ["sft", "align", "rl", "pairs"])
def test_tokens_are_those_of_the_stages(images, checkpoint, kind, limits):  # noqa: F811
    """Counted without the work on the pixels, they are what the encoder makes."""
    encoder = data.open_encoder(checkpoint, max_prompt_tokens=10**9, **limits)
    path = write(images, *rows_of(kind))
    looks = inspect(path, kind, encoder, **limits).looks
    assert len(looks) == len(read(path, kind))
    for look, row in zip(looks, read(path, kind).fetch(range(9)[: len(looks)]), strict=True):
        example = row.example if kind == "pairs" else row
        prompt, trained = encoder.conversation(example)
        assert look.prompt == int((~trained).sum())
        assert look.image == int(prompt.image_mask.sum())
        if kind == "sft":
            assert look.responses == [int(trained.sum())]
        if kind == "align":
            assert look.responses == [len(encoder.response(example.response))]
    if kind == "pairs":
        assert looks[0].responses[1] > looks[0].responses[0] == looks[1].responses[1]


def stage_takes(row, kind, encoder, args):  # noqa: F811
    """Whether the stages themselves take a row."""
    try:
        if kind == "sft":
            encoder.conversation(row, args.max_prompt + args.max_response)
        elif kind == "rl":
            encoder.prompt(row)
        elif kind == "align":
            align.new_group(row, encoder, encoder, args)
        else:
            align.group_of_pair(row, encoder, encoder, args)
    except BadRow:
        return False
    return True


@pytest.mark.parametrize("kind", ["sft", "align", "rl", "pairs"])
def test_left_out_is_what_the_stages_leave_out(images, checkpoint, kind):  # noqa: F811
    path = write(images, *rows_of(kind))
    encoder = data.open_encoder(checkpoint, max_prompt_tokens=10**9)
    strict = data.open_encoder(checkpoint)
    measured = inspect(path, kind, encoder).looks
    prompts = {look.prompt for look in measured}
    responses = {n for look in measured for n in look.responses} or {100}
    taken = set()
    for max_prompt in [n + shift for n in prompts for shift in (-1, 0)]:
        for max_response in [n + shift for n in responses for shift in (-1, 0)]:
            limits = {"max_prompt": max_prompt, "max_response": max_response}
            args = SimpleNamespace(spans="both", disc_blind=False, **limits)
            strict.max_prompt_tokens = max_prompt
            found = inspect(path, kind, encoder, **limits)
            for look in found.looks:
                row = read(path, kind)[look.index]
                takes = stage_takes(row, kind, strict, args)
                assert takes == (not look.limits), (limits, look)
                taken.add(takes)
            n = sum(1 for look in found.looks if look.limits)
            assert f": {n} of {len(found.looks)}" in text_of(found).split("left out by")[1]
    assert taken == {True, False}


def test_images_that_are_scaled(images, checkpoint):  # noqa: F811
    path = write(images, *rows_of("rl"))
    encoder = data.open_encoder(checkpoint, max_pixels=1000)
    out = text_of(inspect(path, "rl", encoder, max_pixels=1000))
    assert "scaled down to 1,000 pixels: 3 of 5 (60.0 %) images" in out
    assert "scaled up to 64 pixels: 0 of 5 images" in out
    picture(7, 9).save(images / "images/1.png")
    out = text_of(inspect(path, "rl", encoder))
    assert "scaled up to 64 pixels: 2 of 5 (40.0 %) images" in out
    picture(24, 24).save(images / "images/1.png")
    out = text_of(inspect(path, "rl", max_pixels=2000))
    assert "scaled down to 2,000 pixels: 1 of 5 (20.0 %) images" in out
    assert "scaled up" not in out and "scaled down" not in text_of(inspect(path, "rl"))
    out = text_of(inspect(path, "rl", max_side=100))
    assert "scaled down to a side of 100: 1 of 5 (20.0 %) images" in out
    assert "no tokens are counted" in out
    line = next(line for line in out.splitlines() if line.startswith("image, pixels"))
    assert line.split()[2:] == ["576", "576", "1,860", "18,000", "18,000", "18,000"]


def test_quantiles():
    values = [5, 1, 2, 3, 4]
    assert [quantile(values, q) for q in (0, 0.1, 0.5, 0.9, 0.99, 1)] == [1, 1, 3, 5, 5, 5]
    assert quantile(list(range(1, 101)), 0.9) == 90


# ----------------------------------------------------------------------------- answers
@pytest.mark.parametrize(
    "gold, kind, other",  # another writing that the verifier takes, None where words must be alike
    [
        ("12", "number", "12.0"),
        ("1/2", "number", "0.5"),
        ("three", "number", "3"),
        ("No. 7", "numbered", "7"),
        (r"\frac{1}{3}", "number", "1/3"),
        ("5 km", "number", "5000 m"),
        (r"2\pi cm", "quantity", r"2\pi"),
        ("40%", "number", "0.4"),
        ("March 3, 2020", "date", "3 March 2020"),
        ("B", "option's letter", "(B)"),
        ("A, C", "option's letter", "AC"),
        ("Yes", "yes or no", "true"),
        ("3:2", "ratio", "6:4"),
        ("3:30 PM", "time", "15:30"),
        ("3 to 5", "range", "3-5"),
        ("at least 10", "bound", "10+"),
        ("1, 2", "list or interval", "2, 1"),
        ("(1,2]", "list or interval", r"(1, 2]"),
        ("1 < x < 3", "list or interval", "x \\in (1, 3)"),
        ("x = 7", "equation", "7"),
        (r"\sqrt{3}+x", "formula", r"x+\sqrt{3}"),
        ("purple", "text", None),
        ("a red circle", "text", None),
        ("1-2-3-4", "text", None),
        ("x2y", "text", None),
    ],
)
def test_kinds_of_answers_are_the_verifiers(gold, kind, other):
    assert kind_of_answer(gold) == kind
    if other:
        if kind == "formula":
            pytest.importorskip("math_verify", reason="the extra `math` is not installed")
        assert equivalent(other, gold)
    else:
        assert equivalent(gold, gold) and not equivalent(f"{gold} 1", gold)


def test_kinds_with_options():
    choices = ("red", "purple")
    assert kind_of_answer("B", choices) == "option's letter"
    assert kind_of_answer("purple", choices) == "option's text"
    assert kind_of_answer(None) == "none"


def test_answers_are_counted(folder):  # noqa: F811
    golds = ["1", "2", "red", "red", "as many as there are blue dots", "B"]
    rows = [{"question": f"How {i}?", "answer": gold} for i, gold in enumerate(golds)]
    out = text_of(inspect(write(folder, *rows), "rl"))
    assert re.search(r"text +3 +50.0 %", out) and re.search(r"number +2 +33.3 %", out)
    assert "only the same words are right: 'red', 'as many as there are blue dots'" in out
    assert "1 of these have more than 5 words" in out


def test_whatever_is_written_has_a_kind(shared):
    """No answer ends the check, or holds it up."""
    cases = (shared / "data/verifier/cases.jsonl").read_text().splitlines()[::7]
    for line in cases:
        assert isinstance(kind_of_answer(str(json.loads(line)["gold"])), str)
    begin = time.monotonic()
    for line in (shared / "data/verifier/hostile.jsonl").read_text().splitlines():
        case = json.loads(line)
        for side in ("gold", "pred"):
            made = case.get(f"{side}_gen")
            text = "".join(one * n for one, n in made) if made else case[side] or ""
            assert isinstance(kind_of_answer(str(text)[: 1 << 20]), str)
    assert time.monotonic() - begin < 20


# ----------------------------------------------------------------------------- repeats, overlap
def test_repeats(images):  # noqa: F811
    rows = [
        {"image": "images/0.png", "question": "How many dots?", "answer": "1"},
        {"image": "images/0.png", "question": "how  many DOTS", "answer": "1"},  # repeats
        {"image": "images/1.png", "question": "How many dots?", "answer": "1"},
        {"image": "images/0.png", "question": "How many lines?", "answer": "1"},
        {"image": "copy.png", "question": "How many dots?", "answer": "2"},  # repeats, differs
        {"question": "How many dots?", "answer": "1"},
        {"question": "How many dots!", "answer": "1"},  # repeats
        {"question": "What is a - b?", "answer": "1"},
        {"question": "What is a + b?", "answer": "1"},
    ]
    (images / "copy.png").write_bytes((images / "images/0.png").read_bytes())
    found = inspect(write(images, *rows), "rl")
    assert found.repeats == [(1, 0, False), (4, 0, True), (6, 5, False)]
    out = text_of(found)
    assert "rows that ask what an earlier one asks: 3 of 9 (33.3 %)" in out
    assert "such as row 2, like row 1\n  1 of them have another answer" in out
    assert "up to case, spaces and punctuation; images byte by byte" in out


def test_what_train_and_test_files_share(images, capsys):  # noqa: F811
    ask = {"question": "How many dots?", "answer": "1"}
    sft = turns(USER | {"content": "<image> how many dots"}, ASSISTANT)  # images/0.png
    train = write(images, {"question": "x", "answer": "1"}, sft, {"question": "Why?"} | ASSISTANT)
    (images / "copy.png").write_bytes((images / "images/0.png").read_bytes())
    tests = write(
        images,
        ask | {"image": "images/1.png"},
        ask | {"image": "copy.png"},
        ask | {"image": "copy.png", "question": "How many lines?"},
        ask,
        {"question": "X", "answer": "2"},
        "{",
        name="test.jsonl",
    )
    overlap = inspect(train).compare(read(tests))
    assert overlap.same == {1: 1, 4: 0}
    assert overlap.same_image == {1: 1, 2: 1}
    assert overlap.same_question == {0: 1, 1: 1, 3: 1, 4: 0}
    out = end_of(capsys, "check", train, "--against", tests)[1]
    assert f"WARNING: shared with {tests}\n  2 of its 5 rows: the same question about" in out
    assert "2 of its 5 rows: an image, whatever is asked (row 2 there, row 2 here)" in out
    assert f"1 other rows there are unusable:\n  1 not valid JSON\n    {tests}:6: " in out
    apart = write(images, ask | {"image": "images/1.png"}, name="apart.jsonl")
    out = end_of(capsys, "check", train, "--against", apart)[1]
    assert f"\nshared with {apart}\n  0 of its 1 rows" in out and "WARNING" not in out


# ----------------------------------------------------------------------------- samples
def test_a_sample_is_said_to_be_one(folder):  # noqa: F811
    rows = [{"question": f"How {i // 2}?", "answer": "1"} for i in range(200)]
    path = write(folder, *rows)
    found = inspect(path, "rl", texts=50, rows=20)
    assert len(found.read) == 50 and len(found.looks) == 20
    out = text_of(found)
    assert f"{path}: 200 rows; of 50 drawn at random 50 usable" in out
    assert "--texts 0 reads all, in about" in out
    assert "images opened only of 20 of these (--rows), drawn at random: 20 usable" in out
    assert "sought among 50 rows only: most repeats in the file are not found" in out
    other = inspect(path, "rl", texts=50, rows=20, seed=1)
    again = inspect(path, "rl", texts=50, rows=20)
    assert [look.index for look in again.looks] == [look.index for look in found.looks]
    assert [look.index for look in other.looks] != [look.index for look in found.looks]
    whole = inspect(path, "rl", texts=0, rows=0)
    assert len(whole.looks) == 200 and len(whole.repeats) == 100
    assert "only" not in text_of(whole) and "drawn" not in text_of(whole)
    overlap = "\n".join(found.compare(read(path)).lines())
    assert "sought among 50 rows here, of 200: most of what they share is not found" in overlap


def test_samples_are_spread():
    drawn = sample(range(1_000_000), 1000, seed=3)
    assert drawn == sorted(set(drawn)) and len(drawn) == 1000
    assert 400 < sum(i < 500_000 for i in drawn) < 600
    assert sample(range(5), 5, 0) == sample(range(5), 0, 0) == range(5)


def test_bad_rows_of_a_sample_are_those_of_the_file(folder):  # noqa: F811
    """More bad rows than --max_bad allows would stop a stage: the check says so before."""
    rows = [{"question": "How?", "answer": "1"}, {"question": "How?"}] * 150
    path = write(folder, *rows)
    out = text_of(inspect(path, "rl", texts=100))
    bad = int(re.search(r"a stage would stop: (\d+) bad or too long rows of 300", out)[1])
    assert 100 < bad < 200
    assert "a stage would stop" not in text_of(inspect(write(folder, *rows[:150]), "rl"))


def test_rows_that_are_too_long_are_bad_rows_of_a_stage(images, checkpoint):  # noqa: F811
    path = write(images, *[verl()] * 150)
    encoder = data.open_encoder(checkpoint, max_prompt_tokens=10**9)
    found = inspect(path, "align", encoder, max_prompt=3)
    assert "a stage would stop: 150 bad or too long rows of 150" in text_of(found)


def test_a_broken_image_is_counted_once_and_not_shown(images, capsys):  # noqa: F811
    (images / "images/0.png").write_bytes(b"broken")
    path = write(images, verl(), verl(), verl(images=["images/1.png"]))
    status, out, _ = end_of(capsys, "check", path)
    assert status == 0
    assert f"{path}: 1 of 3 rows usable\n  2 an image cannot be read\n    {path}:1: " in out
    assert f"{path}:3, as it is read" in out


@pytest.mark.skipif(not SHARED.exists(), reason="needs ../shared, which is not here")
@pytest.mark.parametrize("name", ["puzzlevqa/sft.json", "mathvision/testmini.jsonl"])
def test_real_files(name, capsys):
    path = SHARED / "data" / name
    status, out, _ = end_of(capsys, "check", path, "--rows", 30)
    assert status == 0
    assert f"{path}: {len(read(path))} of " in out
    assert "image, pixels" in out and "answers, as the verifier takes them" in out
