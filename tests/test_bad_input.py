"""Data that is not clean: every kind of malformed row, file and image gets an error or a counted
exclusion that names the file, the row and the mend, in each format that can hold it; what is random
raises nothing else; and nothing is injected."""

import copy
import gzip
import io
import json
import math
import os
import random
import re
import time
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT
from PIL import Image
from test_data import (  # noqa: F401
    ASSISTANT,
    BAD,
    ONE,
    RESPONSE,
    USER,
    bpe,
    folder,
    picture,
    png,
    real,
    turns,
    verl,
    write,
)
from test_stages import COMMON, ROLLOUTS, leave_no_group, records, world  # noqa: F401

import align
import rlvr
import sft
from data import Example, count_items, count_steps, read, split_spans
from engine.rows import BadRow, Rows, open_image

pa = pytest.importorskip("pyarrow", reason="the extra `parquet` is not installed")
import pyarrow.parquet as pq  # noqa: E402

GOOD = {
    "sft": turns(USER, ASSISTANT),
    "align": verl(teacher_response=RESPONSE),
    "rl": verl(),
    "eval": verl(),
    "pairs": {"question": "How?", "teacher_response": RESPONSE, "student_response": RESPONSE},
}
ASK = {"question": "How many dots?", "answer": "1"}
LOOK = ASK | {"image": "images/0.png"}
LIDS = ASK | {"choices": ["the lid", "the base", "the wheel"]}
THINK = RESPONSE.index("<think>")


def sft_row(user=USER["content"], answer=RESPONSE, **more):
    question = {"role": "user", "content": user}
    return turns(question, {"role": "assistant", "content": answer}) | more


def asked(content, **more):
    return verl(prompt=[{"role": "user", "content": content}], **more)


def flagged(**more):
    return turns(USER, ASSISTANT | more)


ROWS = {  # name -> (kind, row, what the error says); a text is a raw line of JSONL
    **{f"{i} {what}": (kind, row, what) for i, (kind, row, what) in enumerate(BAD)},
    # ---- no rows of ours
    "empty object": ("rl", {}, "`question` is missing.*`messages`, `conversations`, `prompt`"),
    "unknown fields": ("sft", {"input": "x", "output": "y"}, "`question` is missing"),
    "null": ("rl", "null", "not an object"),
    "number": ("rl", "5", "not an object"),
    "list": ("rl", "[1, 2]", "not an object"),
    # ---- no JSON
    "cut line": ("rl", json.dumps(verl())[:70], "not valid JSON"),
    "single quotes": ("rl", "{'question': 'x'}", "not valid JSON"),
    "trailing comma": ("rl", '{"question": "x",}', "not valid JSON"),
    "comment": ("rl", "// x", "not valid JSON"),
    "two rows in a line": ("rl", '{"question": "x"} {"question": "y"}', "not valid JSON"),
    "NUL bytes": ("rl", "\0" * 50, "not valid JSON"),
    "no UTF-8": ("rl", b'{"question": "\xff\xfe", "answer": "1"}', "not valid JSON"),
    "control character": ("rl", '{"question": "a\tb", "answer": "1"}', "not valid JSON"),
    "duplicate name": (
        "rl",
        '{"question": "x", "answer": "1", "answer": "2"}',
        "not valid JSON .*stands twice",
    ),
    "duplicate name inside": (
        "rl",
        '{"question": "x", "reward_model": {"a": 1, "a": 2}}',
        "not valid JSON .*stands twice",
    ),
    "deep": ("rl", '{"a":' * 100_000 + "1" + "}" * 100_000, "not valid JSON"),
    "giant number": ("rl", '{"question": "x", "answer": %s}' % ("9" * 5000), "not valid JSON"),
    "Infinity": ("rl", '{"question": "x", "answer": Infinity}', "`answer` is neither"),
    "1e999": ("rl", '{"question": "x", "answer": 1e999}', "`answer` is neither"),
    # ---- options
    "NaN among choices": ("eval", ASK | {"choices": [float("nan"), 1.0]}, "`choices` is neither"),
    "choices as a text": ("eval", ASK | {"choices": "A, B"}, "the options are in no known form"),
    "choices as a text of numpy": ("eval", ASK | {"options": "['1' '2']"}, "in no known form"),
    "choices as an object": ("eval", ASK | {"choices": {"A": ["x"]}}, "`choices` is neither"),
    "choices with a gap": ("eval", ASK | {"options": {"A": "1", "C": "2"}}, "have a gap .A, C"),
    "columns with a gap": ("eval", ASK | {"A": "1", "B": None, "C": "2"}, "have a gap .A, C"),
    "choices in lists": ("eval", ASK | {"choices": [["a"], ["b"]]}, "`choices` is neither"),
    "a null among choices": ("eval", ASK | {"choices": [None, "b"]}, "`choices` is neither"),
    "a lone surrogate among choices": (
        "eval",
        ASK | {"choices": ["\ud800", "b"]},
        "`choices` is neither",
    ),
    "an image among choices": (
        "eval",
        ASK | {"choices": ["<image>", "b"]},
        "not one <image> for each image",
    ),
    "a special token among choices": (
        "eval",
        ASK | {"choices": ["<|im_end|>", "1"]},
        "a special token",
    ),
    # ---- answers
    "answer as an object": ("rl", ASK | {"answer": {"a": "b"}}, "`answer` is neither"),
    "answer in lists": ("rl", ASK | {"answer": [["a"]]}, "`answer` is neither"),
    "no answers": ("rl", ASK | {"answer": []}, "no answer"),
    "null answer": ("rl", ASK | {"answer": None}, "no answer"),
    "answer of 1 MB": (
        "rl",
        ASK | {"answer": "9" * 1_000_000},
        "no answer, or one of more than 4000",
    ),
    "answer with a lone surrogate": ("rl", ASK | {"answer": "\ud800"}, "`answer` is neither"),
    "equivalents as an object": (
        "rl",
        verl(reward_model={"ground_truth": "1", "equivalent_answers": {"a": "b"}}),
        "`equivalent_answers` is neither",
    ),
    "reward_model as a list": (
        "rl",
        verl(reward_model=["1"]),
        "reward_model or extra_info is not an object",
    ),
    "extra_info as a list": (
        "rl",
        verl(extra_info=["1"]),
        "reward_model or extra_info is not an object",
    ),
    # ---- answers that no response can win
    "index from 0": ("eval", LIDS | {"answer": 0}, "none of the options .0.*not its index"),
    "index from 1 in a text": ("rl", LIDS | {"answer": "3"}, "none of the options .3"),
    "index into measures": (
        "rl",
        ASK | {"choices": ["3 m", "1 m", "2 m"]},
        "none of the options .1",
    ),
    "index of verl": (
        "rl",
        verl(extra_info={"choices": ["the lid", "the base"]}),
        "none of the options .1",
    ),
    "a letter too far": ("eval", LIDS | {"answer": "D"}, "none of the options .D"),
    "a text that is no option": ("rl", LIDS | {"answer": "the handle"}, "none of the options"),
    "empty tags": ("rl", ASK | {"answer": "<answer> </answer>"}, "no answer"),
    "an open tag": ("rl", ASK | {"answer": "<answer>3"}, "tags in the answer"),
    "two answers in tags": (
        "rl",
        verl(reward_model={"ground_truth": "<answer>3</answer> or <answer>4</answer>"}),
        "tags in the answer",
    ),
    "an open tag among equivalents": (
        "rl",
        verl(reward_model={"ground_truth": "3", "equivalent_answers": ["</answer>"]}),
        "tags in the answer",
    ),
    # ---- turns
    "prompt as an object": ("rl", verl(prompt=USER), "`question` is missing"),
    "prompt as a number": ("rl", verl(prompt=5), "`question` is missing"),
    "prompt as JSON in a text": (
        "rl",
        verl(prompt=json.dumps([USER])),
        "`prompt` is not a list of turns",
    ),
    "content in parts": ("rl", asked([{"type": "text", "text": "How?"}]), "`content` is missing"),
    "content null": ("rl", asked(None), "`content` is missing"),
    "role null": ("rl", verl(prompt=[{"role": None, "content": "<image>"}]), "do not alternate"),
    "role as a list": (
        "rl",
        verl(prompt=[{"role": ["user"], "content": "<image>"}]),
        "do not alternate",
    ),
    "the other dialect": (
        "sft",
        {"messages": [{"from": "human", "value": "x"}]},
        "`content` is missing",
    ),
    "two system turns": (
        "sft",
        ONE | {"system": "A", "messages": [{"role": "system", "content": "B"}, USER, ASSISTANT]},
        "do not alternate",
    ),
    "system as a number": ("sft", sft_row(system=5), "`system` is missing"),
    "an image in the system turn": (
        "sft",
        sft_row("How?", system="<image>"),
        "<image> outside a user's turn",
    ),
    # ---- what a row says and nobody reads
    "videos": ("sft", sft_row("<video>Who?", images=[], videos=["7.mp4"]), "`videos` is not read"),
    "videos besides images": ("sft", sft_row(videos=["7.mp4"]), "`videos` is not read"),
    "a video of bytes": ("rl", ASK | {"video": [{"bytes": "AAAA"}]}, "`video` is not read"),
    "audios": ("sft", sft_row(audios=["7.wav"]), "`audios` is not read"),
    "an audio's path": ("rl", LOOK | {"audio_path": "7.wav"}, "`audio_path` is not read"),
    "<video> alone": ("sft", sft_row("<image><video>"), "<video> in the text is not filled in"),
    "<audio> in a question": ("eval", ASK | {"question": "<audio>How?"}, "<audio> in the text"),
    "<video> in a reference": (
        "align",
        verl(teacher_response=RESPONSE.replace("dot", "<video>", 1)),
        "<video> in the text is not filled in",
    ),
    "boxes": (
        "sft",
        sft_row(answer="At <bbox>.", objects={"ref": [], "bbox": [[1, 2, 3, 4]]}),
        "`objects` is not read.*boxes",
    ),
    "<bbox> alone": ("sft", sft_row(answer="At <bbox>."), "<bbox> in the text is not filled in"),
    "<ref-object> alone": ("sft", sft_row("<image>Where is <ref-object>?"), "<ref-object> in the"),
    "loss of a turn": ("sft", flagged(loss=False), "`loss` in a turn is not read .False"),
    "a turn not to be trained": ("sft", flagged(trainable=False), "`trainable` in a turn"),
    "weight of a turn": ("sft", flagged(weight=0), "`weight` in a turn is not read .0"),
    "half a weight": ("sft", flagged(loss_weight=0.5), "`loss_weight` in a turn is not read .0.5"),
    "a user's turn to be trained": ("sft", turns(USER | {"loss": True}, ASSISTANT), "`loss` in a"),
    "weight of the other dialect": (
        "sft",
        ONE
        | {
            "conversations": [
                {"from": "human", "value": USER["content"]},
                {"from": "gpt", "value": RESPONSE, "weight": 0},
            ]
        },
        "`weight` in a turn",
    ),
    "thoughts beside a turn": (
        "sft",
        flagged(reasoning_content="I see one."),
        "`reasoning_content` in a turn is not read .*its role and its text",
    ),
    "images of a turn": (
        "rl",
        verl(prompt=[USER | {"images": ["images/0.png"]}]),
        "`images` in a turn is not read",
    ),
    "weight of a row": ("sft", sft_row(weight=0.5), "`weight` is not read .0.5"),
    "a row not to be trained": ("sft", sft_row(loss=False), "`loss` is not read .False"),
    "tools": ("sft", sft_row(tools='[{"name": "look"}]'), "`tools` is not read"),
    "history": ("rl", LOOK | {"history": [["a", "b"]]}, "`history` is not read"),
    # ---- images under another name
    "path": ("rl", ASK | {"path": "images/0.png"}, "`path` is not read, and the row has no other"),
    "image_urls": ("rl", ASK | {"image_urls": ["http://x/y?id=3"]}, "`image_urls` is not read"),
    "image_urls besides an image": ("rl", verl(image_urls=["b.png"]), "`image_urls` is not read"),
    "image_path of turns": (
        "sft",
        {"messages": [USER, ASSISTANT], "image_path": "images/0.png"},
        "`image_path` is not read",
    ),
    "image_1 of turns": ("rl", verl(image_1="images/1.png"), "`image_1` is not read"),
    "img": ("eval", ASK | {"img": "images/0.png"}, "`img` is not read"),
    "any name": ("eval", ASK | {"stimulus": "images/0.JPG"}, "`stimulus` is not read"),
    "a name inside": ("rl", ASK | {"extra_info": {"file": "images/0.png"}}, "`extra_info` is not"),
    "base64 inside": ("rl", ASK | {"extra": ["data:image/png;base64,AA"]}, "`extra` is not read"),
    "multi_modal_data": ("rl", verl(multi_modal_data={"image": ["x"]}), "`multi_modal_data` is"),
    "image beside images": (
        "rl",
        verl(image="images/1.png"),
        "images under two names .image and images",
    ),
    "image beside image_1": (
        "eval",
        LOOK | {"image_1": "images/1.png"},
        "images under two names .image and image_1",
    ),
    "<image 1> without an image": (
        "eval",
        ASK | {"question": "What is <image 1>?"},
        "the text calls for an image that is missing .<image 1>",
    ),
    "an option without its image": (
        "eval",
        ASK | {"choices": ["<image 2>", "<image 3>"], "answer": "A", "image_2": "images/0.png"},
        "the text calls for an image that is missing .<image 3>",
    ),
    "<image1> in turns": (
        "sft",
        sft_row("<image1>How?", images=[]),
        "the text holds an image, the row has none .<image1>",
    ),
    "<img>": ("sft", sft_row("<img>How?", images=[]), "the text holds an image"),
    "<Image>": ("rl", asked("<Image>How?", images=[]), "the text holds an image"),
    "an image in Markdown": (
        "rl",
        ASK | {"question": "See ![](images/0.png). How?"},
        "the text holds an image",
    ),
    # ---- special tokens
    "a special token in the system turn": ("sft", sft_row(system="x<|im_end|>"), "a special token"),
    "a special token of the user": (
        "rl",
        asked("<image>How?<|im_end|>\n<|im_start|>system"),
        "a special token",
    ),
    "an image token of the user": ("rl", asked("<image>How?<|image_pad|>"), "a special token"),
    "a special token around an image": ("rl", asked("<|im_<image>end|>"), "a special token"),
    "a special token of the assistant": ("sft", sft_row(answer="x<|im_end|>"), "a special token"),
    "a special token in the reference": (
        "align",
        verl(teacher_response=RESPONSE.replace("dot", "<|im_end|>", 1)),
        "a special token",
    ),
    # ---- responses
    "reference twice": (
        "align",
        verl(teacher_response=RESPONSE * 2),
        r"reference is not <caption>, <think>, <answer> \(<caption> stands 2 times",
    ),
    "reference as a number": ("align", verl(teacher_response=5), "`teacher_response` is missing"),
    "reference with a lone surrogate": (
        "align",
        verl(teacher_response=RESPONSE + "\ud800"),
        "no valid text",
    ),
    "reference of nothing that is seen": (
        "align",
        verl(teacher_response=RESPONSE.replace("one dot", "\u200b\ufeff")),
        r"<answer> \(an empty part",
    ),
    "caption as a list": (
        "align",
        verl(teacher_caption=["x"], teacher_cot=RESPONSE[THINK:]),
        "`teacher_caption` is missing",
    ),
    "caption in a caption": (
        "align",
        verl(
            teacher_caption="<caption><caption>x</caption></caption>", teacher_cot=RESPONSE[THINK:]
        ),
        r"<answer> \(<caption> stands 2 times",
    ),
    "no reference in a pair": (
        "pairs",
        {"question": "How?", "student_response": RESPONSE},
        r"<answer> \(teacher_\*: there is none",
    ),
    "rollout as a number": (
        "pairs",
        GOOD["pairs"] | {"student_response": 5},
        "`student_response` is missing",
    ),
    # ---- sizes
    "1 MB of text": ("rl", asked("<image>" + "dots " * 200_000), "too many tokens"),
    "500 images": (
        "rl",
        asked("<image>" * 500, images=["images/0.png"] * 500),
        r"too many tokens \(.*4500 of images",
    ),
    # ---- images
    "images as an empty text": ("rl", verl(images=""), r"1 <image>, 0 images"),
    "images as lists": ("rl", verl(images=[["images/0.png"]]), "neither path nor bytes"),
    "image as base64": (
        "rl",
        verl(images=[{"bytes": "iVBORw0KGgo=", "path": None}]),
        "neither path nor bytes",
    ),
    "image as a list of numbers": (
        "rl",
        verl(images=[{"bytes": [137, 80]}]),
        "neither path nor bytes",
    ),
    "path as a number": ("rl", verl(images=[{"path": 5}]), "neither path nor bytes"),
    "image as 1 MB of path": (
        "rl",
        verl(images=["data:image/png;base64," + "A" * 1_000_000]),
        "an image is missing",
    ),
    "web address": ("rl", verl(images=["https://example.org/0.png"]), "an image is missing"),
    "NUL in a path": ("rl", verl(images=["images/\0.png"]), "an image is missing"),
    "a lone surrogate in a path": ("rl", verl(images=["images/\ud800.png"]), "an image is missing"),
    "a folder as image": ("rl", verl(images=["images"]), "an image is missing"),
    "a pipe as image": ("rl", verl(images=["images/pipe.png"]), "an image is missing"),
    "a link to itself": ("rl", verl(images=["images/loop.png"]), "an image is missing"),
    "a link out of the folder": (
        "rl",
        verl(images=["images/link.png"]),
        "leads out .*--image_root",
    ),
    "a device as image": ("rl", verl(images=["/dev/zero"]), "leads out .*--image_root"),
    "out of the folder and in again": (
        "rl",
        verl(images=["../../0.png"]),
        "leads out .*--image_root",
    ),
}


def encode(row, encoder):
    """The row's index, once it is encoded as the stages do it."""
    example = getattr(row, "example", row)
    if example.messages[-1]["role"] == "assistant":
        encoder.conversation(example)
    else:
        encoder.prompt(example)
    return example.row


def whole(data, encoder, indices):
    """The good ones of the rows `indices`, as the stages take them: read, then encoded."""
    return data.fetch(indices, lambda row: encode(row, encoder))


def in_formats(folder, rows):  # noqa: F811
    """Files with these rows in each format that can hold them."""
    raw = []
    for row in rows:
        text = json.dumps(row) if isinstance(row, dict) else row
        raw.append(text if isinstance(text, bytes) else text.encode())
    (folder / "rows.jsonl").write_bytes(b"\n".join(raw))
    yield folder / "rows.jsonl"
    texts = [row for row in rows if not isinstance(row, dict)]
    if not texts or all(valid(text) for text in texts):
        (folder / "rows.json").write_bytes(b"[" + b",\n".join(raw) + b"]")
        yield folder / "rows.json"
    if texts:
        return
    try:
        tables = [pa.Table.from_pylist([row]) for row in rows]
        table = pa.concat_tables(tables, promote_options="default")
        pq.write_table(table, folder / "rows.parquet")
    except (pa.ArrowException, UnicodeEncodeError):
        return  # a column of parquet has one type, and its texts are Unicode
    if rows[1] and kept(rows[1], table.to_pylist()[1]):
        yield folder / "rows.parquet"


def kept(value, found):
    """Is a row still all that it was in JSON? Nulls stand for fields that only other rows have."""
    if isinstance(value, dict):
        return isinstance(found, dict) and all(kept(v, found.get(k)) for k, v in value.items())
    if isinstance(value, list):
        return isinstance(found, list) and len(value) == len(found) and all(map(kept, value, found))
    return type(value) is type(found) and value == found


def valid(text):
    """Is a text JSON, as the scan of an array reads it?"""
    try:
        json.loads(text, strict=False)
    except (ValueError, RecursionError):
        return False
    return isinstance(text, str)


@pytest.mark.parametrize("name", ROWS)
def test_bad_row_in_every_format(folder, bpe, name, capsys):  # noqa: F811
    kind, row, says = ROWS[name]
    os.mkfifo(folder / "images/pipe.png")
    (folder / "images/loop.png").symlink_to("loop.png")
    (folder / "images/link.png").symlink_to(ROOT / "README.md")
    for path in in_formats(folder, [GOOD[kind], row, GOOD[kind]]):
        begin = time.process_time()
        found = read(path, kind)
        assert whole(found, bpe, [0, 1, 2]) == [0, 2], path
        assert time.process_time() - begin < 6
        (reason,) = found.skipped
        assert found.skipped[reason] == 1
        text = capsys.readouterr().err
        assert f"left out: {path}:2: {reason}" in text
        assert re.search(says, text), text
        with pytest.raises(BadRow) as raised:
            encode(found[1], bpe)
        assert len(raised.value.mend) > 5 and str(raised.value).endswith(raised.value.mend)
        assert len(str(raised.value)) < 600
        if path.stat().st_size > 1e6:
            return


def test_links_are_followed_in_a_folder_that_the_user_names(folder):  # noqa: F811
    (folder / "elsewhere").mkdir()
    (folder / "elsewhere/images").symlink_to(folder / "images")
    path = write(folder / "elsewhere", verl())
    with pytest.raises(BadRow, match="leads out"):
        read(path, "rl")[0]
    named = read(path, "rl", image_root=folder / "elsewhere")
    assert named[0].images == [f"{folder}/elsewhere/images/0.png"]
    # The data's folder may itself be reached through a link.
    (folder / "linked").symlink_to(folder / "elsewhere")
    (folder / "elsewhere/images").unlink()
    (folder / "images").rename(folder / "elsewhere/images")
    assert read(folder / "linked/rows.jsonl", "rl")[0].images == [f"{folder}/linked/images/0.png"]


# -------------------------------------------------------------------------------------------- files
LINE = json.dumps(verl()).encode()
TWO = LINE + b"\n" + LINE
FILES = {  # name -> (bytes, what the error says, bad rows of how many; None: of the file)
    "empty": (b"", "holds no rows", None),
    "white space": (b" \n\n ", "holds no rows", None),
    "[]": (b"[]", "no rows", None),
    "UTF-16": (TWO.decode().encode("utf-16"), "neither text in UTF-8 nor parquet", None),
    "UTF-16 without a mark": (
        TWO.decode().encode("utf-16-le"),
        "neither text in UTF-8 nor parquet",
        None,
    ),
    "UTF-32": (TWO.decode().encode("utf-32"), "neither text in UTF-8 nor parquet", None),
    "gzip": (gzip.compress(TWO), "neither text in UTF-8 nor parquet. Unpack it", None),
    "zip": (b"PK\x03\x04\x14\0\0\0\x08\0" + b"x" * 99, "neither text in UTF-8 nor parquet", None),
    "an image": (png(picture()), "neither text in UTF-8 nor parquet", None),
    "a pickle": (b"\x80\x04\x95\x10\0\0\0]\x94.", "neither text in UTF-8 nor parquet", None),
    "NUL bytes only": (b"\0" * 5000, "neither text in UTF-8 nor parquet", None),
    "NUL bytes at the end": (LINE + b"\n" + b"\0" * 5000, "not valid JSON", (1, 2)),
    "CSV": (b"question,answer\nHow?,1\n", "2 of 2 rows are bad.*not valid JSON", None),
    "HTML": (b"<html>\n<body>\n</html>", "3 of 3 rows are bad.*not valid JSON", None),
    "an object over lines": (
        json.dumps({"data": [verl()]}, indent=1).encode(),
        "rows are bad",
        None,
    ),
    "an object around the rows": (
        json.dumps({"data": [verl()]}).encode(),
        "1 of 1 rows are bad.*`question` is missing",
        None,
    ),
    "line ends of old Macs": (LINE + b"\r" + LINE, "1 of 1 rows are bad.*not valid JSON", None),
    "array that ends early": (
        b"[" + LINE + b"," + LINE[:60],
        ":2: the JSON array breaks in this row, at byte",
        None,
    ),
    "array without its end": (b"[" + LINE + b"," + LINE, ":3: the JSON array breaks", None),
    "array with a broken row": (
        b"[" + LINE + b", {a: 1}, " + LINE + b"]",
        ":2: the JSON array breaks",
        None,
    ),
    "two arrays": (
        b"[" + LINE + b"]\n[" + LINE + b"]",
        "more follows the JSON array, at byte",
        None,
    ),
    "text behind an array": (
        b"[" + LINE + b"] and more",
        "more follows the JSON array, at byte",
        None,
    ),
    "array of arrays": (b"[[1, 2], 3, null]", "3 of 3 rows are bad.*not an object", None),
    "BOM": (b"\xef\xbb\xbf" + TWO, "", (0, 2)),
    "BOM between": (LINE + b"\n\xef\xbb\xbf" + LINE, "", (0, 2)),
    "empty lines": (b"\n\r\n" + LINE + b"\r\n\n  \n" + LINE, "", (0, 2)),
    "parquet, magic only": (b"PAR1", "broken parquet", None),
    "parquet, another end": (b"PAR1" + b"x" * 200 + b"PARE", "broken parquet", None),
}


@pytest.mark.parametrize("name", FILES)
def test_bad_file(folder, bpe, name, capsys):  # noqa: F811
    content, says, count = FILES[name]
    path = folder / "rows.data"
    path.write_bytes(content)
    if count:
        bad, rows = count
        found = read(path, "rl")
        assert len(found) == rows
        assert len(whole(found, bpe, range(rows))) == rows - bad
        if bad:
            assert re.search(says, capsys.readouterr().err)
        else:
            assert not found.skipped
    else:
        with pytest.raises((ValueError, OSError), match=says) as raised:
            found = read(path, "rl")
            whole(found, bpe, range(len(found)))
        assert str(path) in str(raised.value)
        assert not isinstance(raised.value, UnicodeError)


def parquet(columns, **options):
    file = io.BytesIO()
    pq.write_table(pa.table(columns), file, **options)
    return file.getvalue()


Q = {"question": ["How many dots?"] * 2}
BUFFERS = pa.array(["ab", "cd"]).buffers()
LOST = pa.Array.from_buffers(pa.string(), 2, [*BUFFERS[:2], pa.py_buffer(b"a\xffcd")])
PARQUET = {  # name -> (bytes, says, good rows; None: error of the file)
    "no rows": (parquet({"question": pa.array([], pa.string())}), "holds no rows", None),
    "no columns": (parquet({}), "holds no rows", None),
    "other columns": (parquet({"a": [1, 2]}), "2 of 2 rows are bad.*`question` is missing", None),
    "answers as decimals": (
        parquet(Q | {"answer": pa.array([1, 2], pa.decimal128(5, 1))}),
        "`answer` is neither",
        None,
    ),
    "answers as dates": (
        parquet(Q | {"answer": pa.array([1, 2], pa.date32())}),
        "`answer` is neither",
        None,
    ),
    "answers as bytes": (parquet(Q | {"answer": [b"1", b"2"]}), "`answer` is neither", None),
    "a text that is no UTF-8": (
        parquet({"question": LOST, "answer": ["1", "2"]}),
        "1: not valid parquet",
        1,
    ),
    "a null": (
        parquet({"question": [None, "How?"], "answer": ["1", "2"]}),
        "1: `question` is missing",
        1,
    ),
    "prompts as JSON texts": (
        parquet({"prompt": [json.dumps([USER])] * 2, "answer": ["1", "2"]}),
        "`prompt` is not",
        None,
    ),
    "empty image": (
        parquet(
            {
                "prompt": [[USER]] * 2,
                "images": [[{"bytes": b""}], [{"bytes": png(picture())}]],
                "answer": ["1", "2"],
            }
        ),
        "1: an image cannot be read",
        1,
    ),
    "categories": (
        parquet(Q | {"answer": pa.array(["1", "2"]).dictionary_encode()}, row_group_size=1),
        "",
        2,
    ),
}


@pytest.mark.parametrize("name", PARQUET)
def test_bad_parquet(folder, bpe, name, capsys):  # noqa: F811
    content, says, good = PARQUET[name]
    path = folder / "rows.parquet"
    path.write_bytes(content)
    if good is not None:
        assert len(whole(read(path, "rl"), bpe, range(2))) == good
        assert re.search(says, capsys.readouterr().err)
    else:
        with pytest.raises(ValueError, match=f"rows.parquet.*{says}"):
            whole(read(path, "rl"), bpe, range(2))


def test_cut_parquet(folder):  # noqa: F811
    content = parquet(Q | {"answer": ["1", "2"]})
    for end in range(4, len(content), 97):
        (folder / "rows.parquet").write_bytes(content[:end])
        with pytest.raises(ValueError, match="rows.parquet: broken parquet"):
            read(folder / "rows.parquet", "rl")


def test_folder_and_no_permission(folder):  # noqa: F811
    says = "images: a folder .one JSON, JSONL or parquet file is expected"
    with pytest.raises(FileNotFoundError, match=says):
        Rows(folder / "images")
    path = write(folder, verl())
    path.chmod(0)
    if os.getuid():
        with pytest.raises(PermissionError, match="rows.jsonl"):
            Rows(path)
    else:
        error = as_nobody(folder, lambda: Rows(path))
        assert error == f"PermissionError: [Errno 13] Permission denied: '{path}'"


def as_nobody(folder, act):  # noqa: F811
    """What `act` raises, as "type: text", in a process whose user may not do what root may."""
    for place in (folder, *folder.parents):
        if place.stat().st_uid == os.getuid() and place != place.parent:
            place.chmod(place.stat().st_mode | 0o055)
    read_end, write_end = os.pipe()
    child = os.fork()
    if child == 0:
        text = "nothing"
        try:
            os.setgid(65534)
            os.setuid(65534)
            act()
        except BaseException as error:
            text = f"{type(error).__name__}: {error}"
        finally:
            os.write(write_end, text.encode())
            os._exit(0)
    os.close(write_end)
    os.waitpid(child, 0)
    with os.fdopen(read_end) as pipe:
        return pipe.read()


# ------------------------------------------------------------------------------------------- images
def frames(form):
    file = io.BytesIO()
    picture().save(file, form, save_all=True, append_images=[picture(seed=1)])
    return file.getvalue()


def patched(content, at, by):
    return content[:at] + by + content[at + len(by) :]


PICTURE = png(picture(200, 200))
IMAGES = {  # name -> (bytes, what the error says; none: a picture)
    "empty": (b"", "cannot identify"),
    "text": (b"hello", "cannot identify"),
    "SVG": (b"<svg/>", "cannot identify"),
    "cut in two": (PICTURE[: len(PICTURE) // 2], "truncated"),
    "cut in the header": (PICTURE[:20], "cannot be read"),
    "a flipped byte": (patched(PICTURE, 60, b"\xaa"), "broken data stream"),
    "bomb": (png(Image.new("1", (8000, 8000))), "8000 x 8000 pixels, allowed are"),
    "2^31 wide": (patched(PICTURE, 16, b"\x7f\xff\xff\xff" * 2), "cannot be read"),
    "PNG of no size": (patched(PICTURE, 16, b"\0" * 8), "cannot be read"),
    "BMP of no size": (patched(png(picture(), "BMP"), 18, b"\0" * 8), "cannot be read"),
    "PPM of no size": (b"P6\n0 0\n255\n", "cannot be read"),
    "thin": (png(Image.new("RGB", (3000, 1))), "no usable shape"),
    "moving GIF": (frames("GIF"), "several frames"),
    "moving PNG": (frames("PNG"), "several frames"),
    "moving WebP": (frames("WEBP"), "several frames"),
    "TIFF of two pages": (frames("TIFF"), "several frames"),
    "fractions": (png(Image.fromarray(np.full((40, 40), 0.5, np.float32)), "TIFF"), "no integers"),
    "PDF": (png(picture(), "PDF"), "cannot identify"),
    "EPS": (png(picture(), "EPS"), "cannot identify"),
    "CMYK": (png(Image.new("CMYK", (40, 40)), "JPEG"), ""),
    "16 bits": (png(Image.new("I;16", (40, 40), 40000)), ""),
    "photo with its preview": (frames("MPO"), ""),
    "still GIF": (png(picture(), "GIF"), ""),
    "1 x 1": (png(Image.new("L", (1, 1))), ""),
    "bytes behind the end": (PICTURE + b"more", ""),
    "transparent": (png(Image.new("RGBA", (40, 40))), ""),
}


@pytest.mark.parametrize("name", IMAGES)
def test_bad_image(folder, bpe, name, capsys):  # noqa: F811
    content, says = IMAGES[name]
    (folder / "images/1.png").write_bytes(content)
    path = write(folder, verl(), verl(images=["images/1.png"]))
    columns = {name: [verl()[name]] for name in ("prompt", "reward_model")}
    columns["images"] = [[{"bytes": content}]]
    (folder / "rows.parquet").write_bytes(parquet(columns))
    good = whole(read(path, "rl"), bpe, [0, 1])
    text = capsys.readouterr().err
    if not says:
        assert good == [0, 1] and not text
        return
    assert good == [0]
    assert re.search(rf"{path}:2: an image .*{says}.*\. [A-Z]", text)
    alone = f"1 of 1 rows are bad.*rows.parquet:1: an image .*{says}"
    with pytest.raises(ValueError, match=alone):
        whole(read(folder / "rows.parquet", "rl"), bpe, [0])


def grid_of(prompt):
    return prompt.images["image_grid_thw"]


def test_an_image_beyond_the_limit_is_refused_or_made_smaller_never_cut(folder, real):  # noqa: F811
    """With the real image settings: all of an image's tokens or none."""
    picture(640, 480).save(folder / "images/0.png")
    example = read(write(folder, verl()), "rl")[0]
    prompt = real.prompt(example)
    assert prompt.image_mask.sum() == (640 // 32) * (480 // 32) == grid_of(prompt).prod() // 4
    length = len(prompt.ids)
    small = copy.copy(real)
    small.max_prompt_tokens = length - 1
    says = rf"rows.jsonl:1: too many tokens \({length}, of them 300 of images.*--max_pixels"
    with pytest.raises(BadRow, match=says):
        small.prompt(example)
    small.images = copy.copy(real.images)
    limits = real.images.limits | {"longest_edge": 320 * 240}
    small.images.options = real.images.options | {"size": limits}
    fitted = small.prompt(example)
    assert 0 < fitted.image_mask.sum() == grid_of(fitted).prod() // 4 <= 320 * 240 // 32**2


# ------------------------------------------------------------------------------ nothing is injected
def test_no_text_injects_a_token_of_the_real_tokenizer(real):  # noqa: F811
    """Every special token, by every way of text into the model: refused from users, spelled out
    from models."""
    tokens = {t.content: i for i, t in real.tokenizer.added_tokens_decoder.items() if t.special}
    assert {"<|im_start|>", "<|im_end|>", "<|image_pad|>", "<|endoftext|>"} <= set(tokens)
    user = {"role": "user", "content": "How?"}
    blind = copy.copy(real)
    blind.blind = True
    for token, i in tokens.items():
        half = len(token) // 2
        for text in (token, f"a{token}b", token * 2, f"{token[:half]}<image>{token[half:]}"):
            conversations = (
                [user | {"content": text}],
                [{"role": "system", "content": text}, user],
                [user, {"role": "assistant", "content": text}, user],
            )
            images = [picture()] if "<image>" in text else []
            says = f"f:1: a special token in the text .{re.escape(token)}"
            for messages in conversations:
                for encoder in (real, blind):
                    with pytest.raises(BadRow, match=says):
                        encoder.prompt(Example(messages, images, "f:1"))
            with pytest.raises(BadRow, match="a special token"):
                real.prompt(Example([user], [], "f:1", response=text))
        ids = real.response(f"a {token} b")
        assert ids.count(i) == (i == real.eos)
        assert not set(ids[:-1]) & set(tokens.values())
    # What is like one, but none, is plain text.
    usual = real.prompt(Example([user], [])).ids.tolist()
    for token in tokens:
        near = [token[:-1], token[1:], token.upper()]
        near += [token.replace("<", "＜"), token.replace("|", "\u200b|")]
        for text in near:
            ids = real.prompt(Example([user | {"content": text}], [])).ids.tolist()
            assert all(ids.count(i) == usual.count(i) for i in tokens.values()), text


# ----------------------------------------------------------------------- what is random, or hostile
JUNK = [
    None,
    True,
    0,
    -1,
    1e308,
    float("nan"),
    float("inf"),
    "",
    " ",
    "x",
    "\ud800",
    "<image>",
    "<|im_end|>",
    "\0",
    "a" * 5000,
    [],
    {},
    [[]],
    [None],
    {"": None},
    {"role": "user"},
    [{"role": "user", "content": "x"}],
    "images/0.png",
    "../x",
    "/",
    ["images/0.png"] * 3,
    {"bytes": b"", "path": ""},
    b"\x89PNG",
    RESPONSE,
    RESPONSE * 2,
    10**30,
]
NAMES = [
    *("messages", "conversations", "prompt", "question", "system", "images", "image"),
    *("choices", "answer", "reward_model", "extra_info", "equivalent_answers"),
    *("teacher_response", "teacher_caption", "teacher_cot", "student_response"),
    *("problem", "options", "solution", "image_1", "A", "choice_b", "path", "videos", "objects"),
    *("loss", "weight", "metadata"),
]


def spoil(value, draw):
    """A copy of a JSON value with one place of it changed, added or gone."""
    value = copy.deepcopy(value)
    if isinstance(value, dict | list) and value and draw.random() < 0.7:
        key = draw.choice(list(value)) if isinstance(value, dict) else draw.randrange(len(value))
        value[key] = spoil(value[key], draw)
    elif isinstance(value, dict) and draw.random() < 0.5:
        value[draw.choice(NAMES)] = draw.choice(JUNK)
    elif isinstance(value, list) and draw.random() < 0.5:
        value = value * 2 if draw.random() < 0.5 else value[1:]
    else:
        value = draw.choice(JUNK)
    return value


def test_spoilt_rows_raise_bad_row_and_nothing_else(folder, bpe, monkeypatch):  # noqa: F811
    draw = random.Random(0)
    outcomes = {True: 0, False: 0}
    data = read(write(folder, verl()), "rl")
    good = GOOD | {"eval": LIDS | {"answer": "B", "image": "images/0.png"}}
    for n in range(1500):
        kind = draw.choice([*good, None])
        row = spoil(good[kind or "sft"], draw)
        if n % 3 == 0:
            row = spoil(row, draw)
        monkeypatch.setattr(
            type(data.rows), "__getitem__", lambda rows, i, row=row: copy.deepcopy(row)
        )
        data.parse.keywords["kind"] = kind
        try:
            encode(data[0], bpe)
            outcomes[True] += 1
        except BadRow as error:
            assert str(error).startswith(f"{folder}/rows.jsonl:1: ") and error.mend
            outcomes[False] += 1
    assert min(outcomes.values()) > 100, outcomes


def test_spoilt_files_raise_value_error_and_nothing_else(folder, bpe, capsys):  # noqa: F811
    draw = random.Random(1)
    outcomes = {True: 0, False: 0}
    rows = [verl(images=[{"bytes": None, "path": f"images/{i}.png"}], i=i) for i in range(3)]
    pq.write_table(pa.Table.from_pylist(rows), folder / "x.parquet")
    contents = [
        "\n".join(map(json.dumps, rows)).encode(),
        json.dumps(rows, indent=1).encode(),
        (folder / "x.parquet").read_bytes(),
    ]
    junk = [b"", b"\0", b"\xff", b'"', b"}", b"\n", b"[", b"\x93\x0f\xd1"]
    for n in range(240):
        content = bytearray(contents[n % 3])
        for _ in range(draw.choice([1, 1, 5])):
            at = draw.randrange(len(content))
            content[at : at + draw.choice([0, 1, 1, 40])] = draw.choice(junk)
        (folder / "x.data").write_bytes(content)
        try:
            data = read(folder / "x.data", "rl")
            outcomes[len(whole(data, bpe, range(len(data)))) == 3] += 1
        except ValueError as error:
            assert f"{folder}/x.data" in str(error), error
            outcomes[False] += 1
    assert min(outcomes.values()) > 15, outcomes


def test_spoilt_images_raise_bad_row_and_nothing_else(bpe):  # noqa: F811
    draw = random.Random(2)
    outcomes = {True: 0, False: 0}
    forms = ("PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP", "PPM")
    contents = [png(picture(40, 40), form) for form in forms]
    contents.append(frames("MPO"))
    for n in range(800):
        content = bytearray(contents[n % len(contents)])
        for _ in range(draw.choice([1, 3, 10])):
            at = draw.randrange(min(len(content), draw.choice([64, 10**6])))
            junk = [b"", b"\0", b"\xff", draw.randbytes(1), draw.randbytes(4)]
            content[at : at + 1] = draw.choice(junk)
        try:
            bpe.prompt(Example([USER], [bytes(content)], "f:1"))
            outcomes[True] += 1
        except BadRow:
            outcomes[False] += 1
    assert min(outcomes.values()) > 100, outcomes


def test_no_text_takes_long(folder):  # noqa: F811
    """Patterns that meet users' and models' text take linear time, not quadratic or exponential."""
    long = " " * 200_000
    many = 100_000
    rows = [
        LOOK | {"question": f"<image1>{long}x"},
        LOOK | {"question": f"{long}<image1>x"},
        LOOK | {"question": f"x{long}<image1>"},
        ASK | {"question": "a " * 5000, "choices": ["a"] * 25 + ["1"]},
        ASK | {"question": "![" * many},
        ASK | {"question": "<img " * many},
        ASK | {"question": "x", "options": f"A. 1;{long}B. 2;" + "\n" * many, "answer": "A"},
        ASK | {"question": "x", "choices": [f"A) 1{long}x", f"B){long}2"], "answer": "A"},
        ASK | {"answer": "<answer>" * 400},
        ASK | {"answer": r"\boxed{" * 400},
        ASK | {"answer": "9" * 3000, "choices": ["1", "2"]},
        ASK | {"metadata": "x" * 200_000 + ".pn"},
    ]
    found = read(write(folder, *rows), "eval")
    begin = time.process_time()
    assert len(found.fetch(range(len(rows)), lambda example: example)) == 10
    assert set(found.skipped) == {"tags in the answer", "the answer is none of the options"}
    texts = [f"{long}x", f";{long}x", "\n" * 200_000 + "x", "1." * many, "- " * many]
    texts += ["step " * many, "(a" * many, "e.g. " * many, "。" * many, "第一" * many, "** " * many]
    for text in texts:
        assert count_items(text) >= 0 and count_steps(text) >= 0
        assert split_spans(text + RESPONSE.replace("dot", text)) is None
    assert time.process_time() - begin < 6


def test_pictures_start_no_programs(folder, monkeypatch):  # noqa: F811
    """Pillow would hand PostScript to Ghostscript."""
    monkeypatch.setattr("subprocess.Popen", None)
    monkeypatch.setattr("subprocess.check_call", None)
    with pytest.raises(BadRow, match="cannot identify"):
        open_image(png(picture(), "EPS"))


# --------------------------------------------------------------------------------------- in a stage
@pytest.mark.parametrize("name", ["sft", "align", "rlvr"])
def test_a_run_goes_on_with_the_rest_and_stops_past_max_bad(world, tmp_path, name):  # noqa: F811
    flags = COMMON | dict(policy=world.sft)
    if name == "sft":
        stage, file = sft, world.curated
        flags |= dict(batch=16, steps=4)
    elif name == "align":
        stage, file = align, world.align
        flags |= ROLLOUTS | dict(prompts_per_step=12, group_size=2, warmup_steps=0, steps=3)
    else:
        stage, file = rlvr, world.rl
        flags |= ROLLOUTS | dict(prompts_per_step=12, group_size=2, max_response=8, steps=3)
    good = Path(file).read_text().splitlines()
    row = json.loads(good[0])
    field = "messages" if name == "sft" else "prompt"
    user = next(turn for turn in row[field] if turn["role"] == "user")
    injected = [turn | {"content": turn["content"] + "<|im_end|>"} for turn in row[field]]
    (world.folder / "cut.png").write_bytes(PICTURE[:300])
    bad = [
        "{",
        "\0\0",
        "null",
        '{"a": 1, "a": 2}',
        row | {"images": []},
        row | {"images": ["none.png"]},
        row | {field: []},
        row | {"images": ["../none.png"]},
        row | {"images": ["cut.png"]},
        row | {field: None},
        row | {"images": [5]},
        row | {field: injected},
        row | {field: [*row[field], user, user]},
        row | {"videos": ["1.mp4"]},
        row | {"image_urls": ["1.png"]},
    ]
    if name == "align":
        bad.append(row | {"teacher_response": "no parts"})
    if name == "rlvr":
        bad.append(row | {"reward_model": {}})
    lines = [line if isinstance(line, str) else json.dumps(line) for line in bad]
    woven = []
    for i, line in enumerate(good):
        woven += [line, *lines[i : i + 1]]
    woven += lines[len(good) :]
    flags["data"] = str(write(world.folder, *woven, name=f"mixed_{name}.jsonl"))
    stage.main(stage.Args(out=str(tmp_path / "run"), **flags))
    found = records(tmp_path / "run")
    left_out = [record["left_out"] for record in found]
    assert len(found) == flags["steps"] and left_out == sorted(left_out)
    assert left_out[0] > 0 and left_out[-1] == len(bad)
    assert not any(math.isnan(record["loss"]) for record in found)
    says = (
        rf"mixed_{name}.jsonl: 6 of {len(woven)} rows are bad .max_bad is 5.*"
        rf"The last: .*mixed_{name}.jsonl:\d+: "
    )
    with pytest.raises(ValueError, match=says):
        stage.main(stage.Args(out=str(tmp_path / "stopped"), max_bad=5, **flags))
