"""Files -> rows -> examples -> prompts: every format, what is refused and how it is named, and what
the model sees."""

import io
import json
import os
import re
import shutil
import sys
import tracemalloc
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT, SHARED
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoTokenizer,
    PreTrainedTokenizerFast,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLProcessor,
)
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from data import (
    ASKS,
    PARTS,
    SPANS,
    SYSTEM_PROMPT,
    TAGS,
    WHOLE,
    Encoder,
    Example,
    count_items,
    count_steps,
    open_encoder,
    parts,
    read,
    split_spans,
    to_example,
    write_template,
)
from engine import rows
from engine.files import copy_processor
from engine.images import make_processor
from engine.rows import BadRow, Order, Rows, open_image

SPECIAL = [
    *("<|endoftext|>", "<|im_start|>", "<|im_end|>"),
    *("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"),
]
CHAT = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}"
    "{% if m.content is string %}{{ m.content }}{% else %}{% for c in m.content %}"
    "{{ '<|vision_start|><|image_pad|><|vision_end|>' if c.type == 'image' else c.text }}"
    "{% endfor %}{% endif %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
RESPONSE = "<caption>\n- a red dot\n</caption>\n<think>\none dot\n</think>\n<answer>\n1\n</answer>"
USER = {"role": "user", "content": "<image>\nHow many dots?"}
ASSISTANT = {"role": "assistant", "content": RESPONSE}


def byte_tokenizer():
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=330, initial_alphabet=alphabet, show_progress=False)
    raw.train_from_iterator([SYSTEM_PROMPT, RESPONSE, "How many dots are there?"] * 3, trainer)
    return finish(raw)


def word_tokenizer():
    words = [*SPECIAL, "<unk>", *SYSTEM_PROMPT.split(), *RESPONSE.split()]
    words += ["How", "many", "dots?", "user", "assistant", "two"]
    ids = {word: i for i, word in enumerate(dict.fromkeys(words))}
    raw = Tokenizer(models.WordLevel(ids, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return finish(raw, unk_token="<unk>")


def finish(raw, **more):
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=raw,
        pad_token=SPECIAL[0],
        eos_token=SPECIAL[2],
        additional_special_tokens=SPECIAL[1:],
        **more,
    )
    tokenizer.chat_template = CHAT
    return tokenizer


def tiny_config(tokenizer, spare=3):
    """A Qwen3-VL with patch 4, merge 2 whose head is `spare` rows longer than the vocabulary, as
    the real ones are."""
    ids = dict(zip(SPECIAL, tokenizer.convert_tokens_to_ids(SPECIAL), strict=True))
    rope = {"rope_type": "default", "mrope_section": [2, 1, 1], "mrope_interleaved": True}
    return Qwen3VLConfig(
        text_config=dict(
            hidden_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=8,
            intermediate_size=16,
            vocab_size=len(tokenizer) + spare,
            eos_token_id=tokenizer.eos_token_id,
            rope_scaling=rope,
        ),
        vision_config=dict(
            depth=1,
            hidden_size=16,
            num_heads=2,
            intermediate_size=16,
            patch_size=4,
            spatial_merge_size=2,
            temporal_patch_size=2,
            out_hidden_size=16,
            num_position_embeddings=64,
            deepstack_visual_indexes=[0],
        ),
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
    )


def image_processor():
    return Qwen2VLImageProcessorPil(
        patch_size=4,
        merge_size=2,
        image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
        size={"shortest_edge": 64, "longest_edge": 64 * 4096},
    )


def encoder_of(tokenizer, **options):
    hf = Qwen3VLForConditionalGeneration(tiny_config(tokenizer))
    processor = make_processor(Qwen3VLProcessor, tokenizer, image_processor())
    return Encoder(processor, hf.model, **options)


@pytest.fixture(scope="module", params=[byte_tokenizer, word_tokenizer], ids=["bytes", "words"])
def encoder(request):
    return encoder_of(request.param())


@pytest.fixture(scope="module")
def bpe():
    return encoder_of(byte_tokenizer())


def picture(width=24, height=24, seed=0):
    random = np.random.default_rng(seed)
    return Image.fromarray(random.integers(0, 255, (height, width, 3), dtype=np.uint8))


def png(image, format="PNG", **options):
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "images").mkdir()
    for i in range(3):
        picture(seed=i).save(tmp_path / f"images/{i}.png")
    return tmp_path


def write(folder, *rows, name="rows.jsonl"):
    """Rows (dicts, or raw lines) as a JSONL file."""
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    (folder / name).write_text("".join(line + "\n" for line in lines))
    return folder / name


def verl(**more):
    row = {
        "data_source": "dots",
        "prompt": [{"role": "system", "content": SYSTEM_PROMPT}, USER],
        "images": [{"bytes": None, "path": "images/0.png"}],
        "reward_model": {"style": "rule", "ground_truth": "1"},
    }
    return row | more


# ----------------------------------------------------------------------------------------- formats
def test_both_sharegpt_dialects_are_the_same_example(folder):
    system = {"role": "system", "content": "Look."}
    a = {"messages": [system, USER, ASSISTANT], "images": ["images/0.png"]}
    turns = [{"from": "human", "value": USER["content"]}, {"from": "gpt", "value": RESPONSE}]
    b = {"conversations": turns, "images": ["images/0.png"], "system": "Look."}
    told_twice = a | {"system": "Look."}
    one, two, three = read(write(folder, a, b, told_twice), "sft").fetch(range(3))
    assert one.messages == two.messages == three.messages == a["messages"]
    assert one.images == two.images == [str(folder / "images/0.png")]
    assert (two.where, two.row) == (f"{folder}/rows.jsonl:2", 1)


def test_verl_rows(folder):
    cut = RESPONSE.index("<think>")
    sides = {"teacher_caption": RESPONSE[:cut], "teacher_cot": RESPONSE[cut:]}
    more = {"style": "rule", "ground_truth": "1", "equivalent_answers": ["one", "1.0"]}
    path = write(folder, verl(teacher_response=RESPONSE), verl(**sides), verl(reward_model=more))
    whole = read(path, "align")[0]
    derived = read(path, "align")[1]
    answers = read(path, "rl")[2]
    assert [message["role"] for message in whole.messages] == ["system", "user"]
    assert (whole.answer, whole.source) == ("1", "dots")
    assert split_spans(whole.response) == split_spans(derived.response) is not None
    assert (answers.answer, answers.equivalent) == ("1", ("one", "1.0"))
    assert answers.response is None
    assert read(path, "sft")[0].messages[-1] == ASSISTANT


def test_parquet_equals_json(folder):
    pa = pytest.importorskip("pyarrow", reason="the extra `parquet` is not installed")
    import pyarrow.parquet as pq

    contents = [png(picture(seed=i)) for i in range(200)]
    rows = []
    for content in contents:
        images = [{"bytes": content, "path": None}]
        rows.append(verl(images=images, teacher_response=RESPONSE))
    rows[150]["reward_model"] = {"style": "rule", "ground_truth": "many"}
    pq.write_table(pa.Table.from_pylist(rows), folder / "rows.parquet", row_group_size=70)
    found = read(folder / "rows.parquet", "align")
    assert len(found) == 200
    assert [found[i].images[0] for i in range(200)] == contents
    assert found[150].answer == "many" and found[150].where.endswith("rows.parquet:151")
    # What it is unpacked to leaves nothing behind.
    assert os.listdir(folder).count("rows.parquet") == 1


def test_parquet_without_pyarrow_names_the_extra(folder, monkeypatch):
    (folder / "rows.parquet").write_bytes(b"PAR1....")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ImportError, match="pip install pyarrow"):
        Rows(folder / "rows.parquet")


def test_pairs(folder):
    other = RESPONSE.replace("red", "blue")
    cut = RESPONSE.index("<think>")
    row = {
        "image": "images/0.png",
        "question": "How many dots?",
        "teacher_caption": RESPONSE[:cut],
        "teacher_cot": RESPONSE[cut:],
        "student_caption": other[:cut],
        "student_cot": other[cut:],
    }
    whole = {
        "image": "images/0.png",
        "prompt": "<image>\nHow many dots?",
        "teacher_response": RESPONSE,
        "student_response": other.replace("\n", "  "),
    }
    texts = zip(SPANS, split_spans(RESPONSE), split_spans(other), strict=True)
    expected = {span: (reference, policy) for span, reference, policy in texts}
    for pair in read(write(folder, row, whole), "pairs").fetch(range(2)):
        assert pair.pairs == expected
        assert pair.example.messages == [{"role": "system", "content": SYSTEM_PROMPT}, USER]


def test_plain_questions(folder):
    row = {
        "id": "a",
        "image": "images/0.png",
        "question": "Which?\n<image1>",
        "choices": ["A", "B"],
        "answer": "B",
    }
    several = row | {"question": "This <image1> or that <image2>?\n<image3>", "choices": []}
    hidden = row | {"question": "Is it red?", "choices": ["true", "false"], "answer": False}
    listed = hidden | {"question": "Is it true or false?", "answer": "false"}
    found = read(write(folder, row, several, hidden, listed), "eval").fetch(range(4))
    assert [example.messages[1]["content"] for example in found] == [
        "<image>\nWhich?",
        "<image>\nThis (image 1) or that (image 2)?\n(image 3)",
        "<image>\nIs it red?\nOptions:\n(A) true\n(B) false",
        "<image>\nIs it true or false?",
    ]
    assert all(example.messages[0]["content"] == SYSTEM_PROMPT for example in found)
    assert (found[0].choices, found[0].answer) == (("A", "B"), "B")
    assert found[2].answer == "False"


def test_evaluation_takes_every_format(folder):
    sft = {"messages": [USER, ASSISTANT], "images": ["images/0.png"]}
    path = write(folder, sft, verl(teacher_response=RESPONSE))
    for example in read(path, "eval").fetch(range(2)):
        assert (example.response, example.answer) == (RESPONSE, "1")
        assert example.messages[-1] == USER


def test_system_prompt_is_the_papers():
    if not SHARED.exists():
        pytest.skip("needs ../shared, which is not here")
    text = (SHARED / "METHOD.md").read_text()
    assert SYSTEM_PROMPT == re.search(r"```\n(You are a helpful.*?</answer>\n)```", text, re.S)[1]


# --------------------------------------------------------------- what others' rows say, and is read
def said(row, kind="rl"):
    """The Example of a row whose images are pictures."""
    return to_example(row, "f:1", kind=kind)


A, B, C = (picture(seed=i) for i in range(3))


def test_easyr1():
    for images, problem in (([A], "<image>Find x."), ([A, B], "<image>Is it <image>?"), ([], "x?")):
        found = said({"images": images, "problem": problem, "answer": "5"})
        assert (found.images, found.answer) == (images, "5")
        assert [m["content"] for m in found.messages] == [SYSTEM_PROMPT, problem]


@pytest.mark.parametrize("empty", [[], None])
def test_an_image_beside_empty_images_is_read(empty):
    found = said({"question": "What?", "images": empty, "image": A, "answer": "red"})
    assert found.images == [A] and found.messages[1]["content"] == "<image>\nWhat?"
    turns = verl(images=empty, image=A)
    assert said(turns).images == [A]


@pytest.mark.parametrize(
    "row, images, asked",
    [
        (
            {
                "question": "<image 1> Which one matches it?",
                "options": "['<image 2>', '<image 3>']",
                "answer": "B",
                "image_1": A,
                "image_2": B,
                "image_3": C,
            },
            [A, B, C],
            "(image 1) Which one matches it?\nOptions:\n(A) (image 2)\n(B) (image 3)",
        ),
        (  # a gap: of image_1 and image_3 the latter is the second that the model sees
            {
                "question": "Is <image 1> like <image 3>?",
                "answer": "no",
                "image_3": B,
                "image_1": A,
                "image_2": None,
            },
            [A, B],
            "Is (image 1) like (image 2)?",
        ),
        (
            {"question": "<image 2> What?", "answer": "4", "image_1": None, "image_2": C},
            [C],
            "What?",
        ),
        (
            {"question": "See <image 2>: why?", "answer": "4", "image_2": C},
            [C],
            "See (image 1): why?",
        ),
        (
            {"question": "What? <image 1>", "answer": "4", "images": [A, B]},
            [A, B],
            "What? (image 1)",
        ),
        (  # parts of one picture, of which the question calls for one
            {
                "question": "Which?\n<image1>",
                "choices": ["<image2>", "<image3>"],
                "answer": "A",
                "image": A,
            },
            [A],
            "Which?\n(image 1)\nOptions:\n(A) (image 2)\n(B) (image 3)",
        ),
    ],
    ids=["options", "gap", "one of a gap", "inside", "two", "parts"],
)
def test_numbered_images(row, images, asked):
    found = said(row, "eval")
    assert found.images == images
    assert found.messages[1]["content"] == "<image>\n" * len(images) + asked


LIDS = ("the lid", "the base", "the wheel")
LETTERED = "Which?\nOptions:\n(A) the lid\n(B) the base\n(C) the wheel"
OPTIONS = {  # name -> (fields, the answer)
    "bare": ({"choices": list(LIDS), "answer": "C"}, "C"),
    "A)": ({"options": ["A) the lid", "B) the base", "C) the wheel"], "answer": "C"}, "C"),
    "(a)": ({"options": ["(a) the lid", "(b) the base", "(c) the wheel"], "answer": "c"}, "c"),
    "A.": ({"choices": ["A.the lid", "B. the base", "C.  the wheel"], "answer": "(C)"}, "(C)"),
    "A、": ({"choices": ["A、the lid", "B、the base", "C、the wheel"], "answer": "C"}, "C"),
    "1.": ({"choices": ["1. the lid", "2. the base", "3. the wheel"], "answer": 3}, "the wheel"),
    "in a line": ({"options": "A. the lid B. the base C. the wheel", "answer": "C"}, "C"),
    "(A)": ({"options": "(A) the lid; (B) the base; (C) the wheel", "answer": "C"}, "C"),
    "dictionary": ({"options": {"B": LIDS[1], "A": LIDS[0], "C": LIDS[2]}, "answer": "C"}, "C"),
    "columns": ({"A": LIDS[0], "B": LIDS[1], "C": LIDS[2], "D": None, "answer": "C"}, "C"),
    "choice_a": (
        {"choice_a": LIDS[0], "choice_b": LIDS[1], "choice_c": LIDS[2], "answer": "C"},
        "C",
    ),
    "of verl": ({"extra_info": {"choices": ["A) the lid", "B) the base"]}, "answer": "B"}, "B"),
    "text": ({"choices": list(LIDS), "answer": "The wheel"}, "The wheel"),
    "letter and text": ({"choices": list(LIDS), "answer": "C. the wheel"}, "C. the wheel"),
    "several letters": ({"choices": list(LIDS), "answer": "A, C"}, "A, C"),
    "several answers": ({"choices": list(LIDS), "answer": ["wheel", "C"]}, "wheel"),
    "numbers": ({"choices": ["3", "$4$", "5"], "answer": 4}, "4"),
    "formulas": ({"choices": ["1/2", "1/3", "2"], "answer": "0.5"}, "0.5"),
}


@pytest.mark.parametrize("name", OPTIONS)
def test_options_are_lettered_once_and_the_answer_is_among_them(name):
    fields, answer = OPTIONS[name]
    found = said({"question": "Which?"} | fields)
    assert found.answer == answer
    asked = found.messages[1]["content"]
    if name in ("numbers", "formulas"):
        assert asked.startswith("Which?\nOptions:\n(A) ")
    elif name == "of verl":
        assert (asked, found.choices) == ("Which?", LIDS[:2])
    else:
        assert (asked, found.choices) == (LETTERED, LIDS)


@pytest.mark.parametrize(
    "gold, answer",
    [
        ("<answer> 3 </answer>", "3"),
        ("<think>one, two, three</think>\n<answer>\n3\n</answer>", "3"),
        (r"\boxed{3}", "3"),
        (r"$\boxed{\frac{1}{2}}$", r"\frac{1}{2}"),
        (r"<answer>\boxed{x^{2}}</answer>", "x^{2}"),
        ("Each has 2, so 2 + 1 = 3.\n#### 3", "3"),
        (" 3 ", "3"),
        (r"\boxed{1} or \boxed{2}", r"\boxed{1} or \boxed{2}"),  # which of them is not said
    ],
)
def test_wrapped_answers(gold, answer):
    assert said({"problem": "How many?", "answer": gold}).answer == answer
    assert said(verl(images=[A], reward_model={"ground_truth": gold})).answer == answer
    also = {"ground_truth": "7", "equivalent_answers": [gold]}
    assert said(verl(images=[A], reward_model=also)).equivalent == (answer,)


def test_a_solution_is_the_answer_only_where_it_marks_it():
    assert said({"problem": "How many?", "solution": "<answer> 3 </answer>"}).answer == "3"
    with pytest.raises(BadRow, match="no answer"):
        said({"problem": "How many?", "solution": " One and two make 3."})
    both = {"problem": "How many?", "solution": r"So \boxed{4}.", "answer": "3"}
    assert said(both).answer == "3"


def test_flags_that_ask_for_the_usual_are_followed():
    turns = [{"role": "user", "content": "hi", "loss": False, "weight": None}]
    turns.append({"role": "assistant", "content": "ho", "loss": True, "weight": 1, "id": ""})
    row = {"messages": turns, "weight": 1.0, "videos": [], "audios": None, "tools": ""}
    found = said(row, "sft")
    assert found.messages == [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "ho"},
    ]


@pytest.mark.parametrize("nothing", [None, float("nan"), "", [], {}], ids=str)
def test_fields_that_say_nothing_do_no_harm(nothing):
    """A table of several sources has every column in every row."""
    columns = (
        *("messages", "conversations", "prompt", "question", "system", "images", "image"),
        *("teacher_response", "teacher_caption", "teacher_cot", "student_response"),
        *("reward_model", "extra_info", "equivalent_answers", "choices", "answer", "video"),
    )
    answer = {"reward_model": {"ground_truth": "1"}}
    rows = {
        "sft": turns(USER, ASSISTANT, images=[A]),
        "align": verl(images=[A], teacher_response=RESPONSE),
        "rl": {"question": "How?", "image": A} | answer,
        "pairs": {"question": "How?", "teacher_response": RESPONSE, "student_response": RESPONSE},
    }
    for kind, row in rows.items():
        for asked in (kind, None):
            found = said(dict.fromkeys(columns, nothing) | row, asked)
            assert found == said(row, asked)


def test_other_fields_do_no_harm():
    row = {"id": "a.png", "boxes": [[1, 2]], "video_id": 7, "image_width": 24, "split": "test"}
    row |= {"objects": [{"colour": "red"}], "metadata": {"source": "x", "score": float("nan")}}
    row |= {"question": "Which file is it?", "choices": ["a.png", "b.png"], "answer": "b.png"}
    assert said(row).answer == "b.png"
    seen = {"question": "What?", "answer": "red", "image": A}
    seen |= {"file_name": "a.png", "path": "scenes/a.png", "videos": False, "tools": "[]"}
    assert said(seen).images == [A]


def test_public_cases(shared, tmp_path):
    """../shared/cases/rows: what public reports led to, each with what should come of it."""
    if not (shared / "cases/rows/rows.jsonl").exists():
        pytest.skip("needs ../shared/cases/rows, which is not here")
    refused = {
        "video": "`videos` is not read",
        "grounding": "`objects` is not read",
        "loss-flag": "`loss` in a turn is not read",
        "index-answer": "the answer is none of the options",
        "path-column": "`path` is not read",
    }
    for name in ("a", "1", "2", "3"):
        picture().save(tmp_path / f"{name}.png")
    found = {}
    for line in (shared / "cases/rows/rows.jsonl").read_text().splitlines():
        case = json.loads(line)
        name = case["id"]
        try:
            row = case["row"]
            found[name] = to_example(row, name, kind=case["kind"], root=str(tmp_path))
        except BadRow as error:
            assert error.what.startswith(refused.pop(name)), error
    assert not refused
    assert found["tagged-gold"].answer == "3"
    assert found["lettered-options"].answer == "C"
    assert found["lettered-options"].messages[1]["content"].count("A)") == 1
    assert found["empty-images"].images == [f"{tmp_path}/a.png"]
    easy = found["easyr1"]
    assert (easy.images, easy.answer) == ([f"{tmp_path}/a.png"], "5")
    assert easy.messages[1]["content"] == "<image>Find x."
    asked = found["mmmu-options"].messages[1]["content"]
    assert asked.endswith("(image 1) Which one matches it?\nOptions:\n(A) (image 2)\n(B) (image 3)")
    plain = "<caption>- two red dots</caption><think>I count two.</think><answer>2</answer>"
    assert split_spans(found["crlf-reference"].response) == split_spans(plain)


# ------------------------------------------------------------------------------------------- files
def test_index_of_json_array_and_lines(folder):
    rows = [{"id": i, "text": f'[{{"é{i}" \\ 中\n' * (i % 50)} for i in range(10_000)]
    array = json.dumps(rows, ensure_ascii=False, indent=1)
    lines = " \r\n\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    (folder / "a.json").write_text("\ufeff " + array, "utf-8")
    (folder / "b.json").write_text(json.dumps(rows))
    (folder / "c.jsonl").write_text("\n" + lines, "utf-8")
    size = (folder / "a.json").stat().st_size
    del rows, array, lines
    for name in ("a.json", "b.json", "c.jsonl"):
        tracemalloc.start()
        found = Rows(folder / name)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert len(found) == 10_000 and peak < min(6 << 20, size)
        for i in (0, 1, 777, 9_999):
            assert found[i] == {"id": i, "text": f'[{{"é{i}" \\ 中\n' * (i % 50)}
    with pytest.raises(IndexError):
        found[10_000]


@pytest.mark.parametrize(
    "content, error",
    [
        ("", "no rows"),
        ("[]", "no rows"),
        ("\n\n", "no rows"),
        ('[{"a": 1}, {"a": 2', ":2: the JSON array breaks"),
        ('[{"a": 1}, {a: 2}, {"a": 3}]', ":2: the JSON array breaks"),
        ("PAR1 and no more", "broken parquet"),
    ],
)
def test_broken_files(folder, content, error):
    if "PAR1" in content:
        pytest.importorskip("pyarrow")
    (folder / "x.json").write_text(content)
    with pytest.raises(ValueError, match=error) as raised:
        Rows(folder / "x.json")
    assert str(folder / "x.json") in str(raised.value)


def test_missing_file():
    with pytest.raises(FileNotFoundError, match="nowhere.jsonl"):
        read("nowhere.jsonl", "sft")


def test_order_is_shuffled_whole_and_resumable():
    whole = Order(7, seed=3).take(30)
    assert [epoch for epoch, _ in whole] == [i // 7 for i in range(30)]
    epochs = [[i for e, i in whole if e == epoch] for epoch in range(4)]
    assert all(sorted(epoch) == list(range(7)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4
    for stop in range(16):  # the ends of epochs (7, 14) among them
        first = Order(7, seed=3)
        taken = first.take(stop)
        second = Order(7, seed=3)
        second.load(json.loads(json.dumps(first.state())))
        assert taken + second.take(30 - stop) == whole
    with pytest.raises(ValueError, match="7 rows and seed 3, here are 8 rows"):
        Order(8, seed=3).load(first.state())


@pytest.mark.parametrize("form", ["jsonl", "json", "parquet"])
def test_an_order_is_of_the_rows_that_it_was_made_for(folder, form):
    def save(name, *answers):
        rows = [verl(reward_model={"ground_truth": answer}) for answer in answers]
        if form == "parquet":
            pa = pytest.importorskip("pyarrow", reason="the extra `parquet` is not installed")
            import pyarrow.parquet as pq

            pq.write_table(pa.Table.from_pylist(rows), folder / name)
        elif form == "json":
            (folder / name).write_text(json.dumps(rows))
        else:
            write(folder, *rows, name=name)
        return read(folder / name, "rl")

    saved = save("rows", "1", "2", "3").order(seed=5)
    saved.take(2)
    state = json.loads(json.dumps(saved.state()))
    same = save("moved", "1", "2", "3").order(seed=5)  # the same bytes in another place
    same.load(state)
    assert same.take(4) == saved.take(4)
    part = read(folder / "rows", "rl").order(5, 2)
    assert sorted(i for _, i in part.take(2)) == [0, 1]
    with pytest.raises(ValueError, match=r"rows: .* 3 rows and seed 5, here are 2 rows and seed 5"):
        part.load(state)
    other = save("rows", "1", "2", "4").order(seed=5)  # as many rows, as many bytes
    says = rf"{folder}/rows: .*others: the file has changed.*Put the old file back .*--out"
    with pytest.raises(ValueError, match=says):
        other.load(state)
    assert other.taken == 0


# ---------------------------------------------------------------------------------------- bad rows
ONE = {"images": ["images/0.png"]}


def turns(*messages, images=("images/0.png",)):
    return {"images": list(images), "messages": list(messages)}


def answered(content):
    return turns(USER, {"role": "assistant", "content": content})


BAD = [
    ("sft", '{"messages": [', "not valid JSON"),
    ("sft", "[" * 100_000, "not valid JSON"),
    ("sft", '"text"', "not an object"),
    ("sft", ONE | {"messages": "hello"}, "`messages` is not a list"),
    ("sft", ONE | {"messages": ["hello"]}, "`messages` is not a list"),
    ("sft", turns(), "`question` is missing, empty or no valid text.*`messages`"),
    ("sft", turns(USER, USER, ASSISTANT), "do not alternate"),
    ("sft", turns(ASSISTANT, USER), "do not alternate"),
    ("sft", turns({"role": "tool", "content": "x"}, USER, ASSISTANT), "do not alternate"),
    ("sft", turns(USER), "last turn is missing"),
    ("sft", answered(" "), "`content` is missing, empty"),
    ("sft", answered(5), "`content` is missing, empty"),
    ("sft", answered("\ud800"), "no valid text"),
    ("sft", answered("<image>"), "<image> outside a user's turn"),
    ("sft", turns(USER, ASSISTANT, images=()), r"not one <image> .*\(1 <image>, 0 images\)"),
    ("sft", turns(USER, ASSISTANT, images=["images/0.png"] * 2), "not one <image> for each image"),
    ("sft", turns(USER, ASSISTANT, images=["images/9.png"]), "an image is missing"),
    ("sft", turns(USER, ASSISTANT, images=["images"]), "an image is missing"),
    ("sft", turns(USER, ASSISTANT, images=["../x.png"]), "leads out .*--image_root"),
    ("sft", turns(USER, ASSISTANT, images=["/etc/passwd"]), "leads out .*--image_root"),
    ("sft", turns(USER, ASSISTANT, images=[5]), "neither path nor bytes"),
    ("sft", turns(USER, ASSISTANT, images=[None]), "neither path nor bytes"),
    (
        "sft",
        turns(USER, ASSISTANT, images=[{"bytes": None, "path": None}]),
        "neither path nor bytes",
    ),
    ("align", verl(), r"reference is not <caption>, <think>, <answer> \(there is none"),
    ("align", verl(teacher_response="It is 1."), r"<answer> \(<caption> stands 0 times"),
    ("align", verl(teacher_response=RESPONSE.replace("\n1\n", "\n")), r"<answer> \(an empty part"),
    ("align", verl(teacher_caption="<caption>x</caption>"), "`teacher_cot` is missing"),
    ("align", verl(teacher_response=["x"]), "`teacher_response` is missing, empty or no valid"),
    ("rl", verl(reward_model={}), "no answer"),
    ("rl", verl(reward_model={"ground_truth": " "}), "no answer"),
    ("rl", verl(reward_model={"ground_truth": float("nan")}), "no answer"),
    ("rl", verl(reward_model={"ground_truth": {"a": 1}}), "`answer` is neither a text"),
    ("rl", verl(reward_model="1"), "reward_model or extra_info"),
    ("rl", verl(prompt=None), "`question` is missing"),
    ("eval", {"image": "images/0.png", "question": "", "answer": "1"}, "`question` is missing"),
    ("eval", {"question": "How?", "choices": [{}], "answer": "1"}, "`choices` is neither"),
    (
        "pairs",
        {"question": "How?", "teacher_response": RESPONSE, "student_response": "1"},
        r"<answer> \(student",
    ),
    ("pairs", {"question": "How?", "teacher_response": RESPONSE}, r"<answer> \(student"),
]


@pytest.mark.parametrize("kind, row, what", BAD, ids=[f"{i}-{b[0]}" for i, b in enumerate(BAD)])
def test_bad_row_is_named_and_left_out(folder, capsys, kind, row, what):
    good = {"sft": turns(USER, ASSISTANT), "align": verl(teacher_response=RESPONSE)}
    good["pairs"] = {"question": "How?", "teacher_response": RESPONSE, "student_response": RESPONSE}
    good = good.get(kind, verl())
    path = write(folder, good, row, good)
    found = read(path, kind)
    with pytest.raises(BadRow, match=what) as raised:
        found[1]
    assert str(raised.value).startswith(f"{path}:2: ")
    assert raised.value.mend in str(raised.value)
    assert [getattr(row, "example", row).row for row in found.fetch([0, 1, 2, 1])] == [0, 2]
    assert found.skipped == {raised.value.what: 1}
    assert str(raised.value) in capsys.readouterr().err


def test_too_many_bad_rows_end_the_run(folder):
    path = write(folder, *["{"] * 3, *[verl()] * 5)
    says = r"3 of 8 rows are bad .*'not valid JSON': 3.*rows.jsonl:3"
    with pytest.raises(ValueError, match=says):
        read(path, "rl", max_bad=2).fetch(range(8))
    assert len(read(path, "rl", max_bad=3).fetch(range(8))) == 5
    with pytest.raises(ValueError, match="1 of 1 rows are bad"):
        read(write(folder, "{", name="all.jsonl"), "rl").draw(Order(1), 1)


def every_third_is_bad(folder):
    lines = ["{" if i % 3 == 0 else verl() for i in range(12)]
    return write(folder, *lines)


def test_draw_is_full_and_the_same_whatever_is_bad(folder):
    found = read(every_third_is_bad(folder), "rl")
    order = Order(12, seed=1)
    rows = [example.row for _ in range(5) for example in found.draw(order, 4)]
    good = [i for _, i in Order(12, seed=1).take(60) if i % 3]
    assert rows == good[:20] and len(found.bad) == 4


@pytest.mark.parametrize("world", [1, 2, 3])
def test_ranks_share_what_one_would_draw(folder, monkeypatch, world):
    """The ranks take turns in this process; of bad rows each learns what the others would find."""
    path = every_third_is_bad(folder)
    ranks = [SimpleNamespace(rank=rank, world=world) for rank in range(world)]
    datas = [read(path, "rl") for _ in ranks]
    orders = [Order(12, seed=1) for _ in ranks]
    # A bad row is bad for whoever reads it: another rank's account is what its reader would find.
    everywhere = {i: "not valid JSON" for i in range(0, 12, 3)}

    def gather(bad):
        seen = {i for order in orders for _, i in Order(12, seed=1).take(order.taken)}
        return [bad, {i: what for i, what in everywhere.items() if i in seen}]

    monkeypatch.setattr(rows, "gather", gather)
    drawn = []
    alone = read(path, "rl")
    order = Order(12, seed=1)
    for _ in range(4):
        parts = []
        for data_, order_, rank in zip(datas, orders, ranks, strict=True):
            parts += [example.row for example in data_.share(order_, 5, lambda row: row, rank)]
        drawn = [example.row for example in alone.draw(order, 5)]
        assert sorted(parts) == sorted(drawn)
        assert {order_.taken for order_ in orders} == {order.taken}


def test_image_root(folder, tmp_path_factory):
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    first = turns(USER, ASSISTANT, images=[str(folder / "images/0.png")])
    second = turns(USER, ASSISTANT, images=["images/1.png"])
    path = write(elsewhere, first, second)
    with pytest.raises(BadRow, match="leads out"):
        read(path, "sft")[0]
    found = read(path, "sft", image_root=folder).fetch(range(2))
    assert [example.images for example in found] == [
        [str(folder / "images/0.png")],
        [str(folder / "images/1.png")],
    ]


# ------------------------------------------------------------------------------------------ images
def test_path_bytes_and_pil_are_the_same_picture(folder):
    path = str(folder / "images/0.png")
    for source in (path, open(path, "rb").read(), Image.open(path)):
        assert np.array_equal(np.asarray(open_image(source)), np.asarray(picture()))


def look(content):
    """The pixels of a picture, row by row."""
    return np.asarray(open_image(content)).tolist()


def test_modes():
    white = [255, 255, 255]
    red = [255, 0, 0]
    rgba = Image.new("RGBA", (8, 8), (255, 0, 0, 255))
    rgba.putpixel((0, 0), (0, 0, 0, 0))
    palette = rgba.convert("RGB").quantize(2)
    clear = Image.new("P", (8, 8), 0)
    clear.putpalette([10, 20, 30, 255, 0, 0])
    clear.putpixel((1, 0), 1)
    deep = Image.fromarray(np.array([[0, 257 * 128, 65535]], dtype=np.uint16))
    turned = Image.new("RGB", (8, 4), (255, 0, 0))
    exif = turned.getexif()
    exif[0x0112] = 6
    assert look(png(rgba))[0][:2] == [white, red]  # transparent is white, not black
    assert look(png(palette))[1][1] == red
    assert look(png(clear, transparency=0))[0][:2] == [white, red]
    assert look(png(deep))[0] == [[0] * 3, [128] * 3, [255] * 3]
    assert look(png(Image.new("L", (2, 1), 77)))[0][0] == [77] * 3
    assert look(png(Image.new("LA", (2, 1), (0, 0))))[0][0] == white
    assert look(png(Image.new("CMYK", (2, 1)), "TIFF"))[0][0] == white
    assert open_image(png(turned, "JPEG", exif=exif)).size == (4, 8)


def test_broken_truncated_and_huge_images(monkeypatch):
    whole = png(picture(200, 200))
    for broken in (whole[: len(whole) // 2], whole[:20], b"", b"no image", "/nowhere.png"):
        with pytest.raises(BadRow, match="f:7: an image cannot be read .*Write it again"):
            open_image(broken, "f:7")
    bomb = png(Image.new("1", (8000, 8000)))
    assert len(bomb) < 200_000
    with pytest.raises(BadRow, match="8000 x 8000 pixels"):
        open_image(bomb)
    monkeypatch.setattr(rows, "MAX_IMAGE", 1000)
    with pytest.raises(BadRow, match="200 x 200 pixels, allowed are 1000"):
        open_image(whole)


# ----------------------------------------------------------------------------------------- encoder
def joint_ids(encoder, messages, n_tokens, generation=True):
    """The other way to the same ids: render with placeholders, widen them in the text, tokenise it
    all at once."""
    parted = []
    for message in messages:
        content = []
        for piece in re.split("(<image>)", message["content"]):
            if piece == "<image>":
                content.append({"type": "image"})
            elif piece:
                content.append({"type": "text", "text": piece})
        parted.append({"role": message["role"], "content": content})
    tokenizer = encoder.tokenizer
    text = tokenizer.apply_chat_template(parted, tokenize=False, add_generation_prompt=generation)
    for n in n_tokens:
        text = text.replace("<|image_pad|>", "<here>" * n, 1)
    text = text.replace("<here>", " <|image_pad|> " if tokenizer.unk_token else "<|image_pad|>")
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def test_prompt_is_the_jointly_tokenised_template(encoder):
    messages = [
        {"role": "system", "content": SYSTEM_PROMPT},
        {"role": "user", "content": "<image>\n<image> How many dots?"},
    ]
    prompt = encoder.prompt(Example(messages, [picture(), picture(32, 16)]))
    ids = prompt.ids.tolist()
    assert ids == joint_ids(encoder, messages, (9, 8))
    assert prompt.images["image_grid_thw"].tolist() == [[1, 6, 6], [1, 4, 8]]
    assert prompt.images["pixel_values"].shape == (36 + 32, 3 * 2 * 4 * 4)
    assert prompt.image_mask.tolist() == [i == encoder.image_id for i in ids]


def test_small_images_keep_their_pixels(encoder):
    prompt = encoder.prompt(Example([USER], [picture()]))
    # (channel, frame, height, width) of the first patch
    corner = prompt.images["pixel_values"][0].view(3, 2, 4, 4)[:, 0]
    expected = torch.tensor(np.asarray(picture())[:4, :4]).permute(2, 0, 1).float()
    assert torch.allclose((corner + 1) * 127.5, expected)


def test_positions_are_the_models_own(encoder):
    user = {"role": "user", "content": "How <image> many\n<image> dots?"}
    prompt = encoder.prompt(Example([user], [picture(), picture(40, 16)]))
    # Text counts on; an image's rows and columns count from where it starts, and text goes on
    # behind the larger of them.
    expected = []
    at = 0
    grids = iter([(3, 3), (2, 5)])
    ids = prompt.ids.tolist()
    while len(expected) < len(ids):
        if ids[len(expected)] == encoder.image_id:
            h, w = next(grids)
            expected += [[at, at + y, at + x] for y in range(h) for x in range(w)]
            at += max(h, w)
        else:
            expected.append([at] * 3)
            at += 1
    assert prompt.positions.T.tolist() == expected
    assert prompt.next_position == at
    assert prompt.positions.dtype == prompt.ids.dtype == torch.int64
    text = encoder.prompt(Example([{"role": "user", "content": "How many"}], []))
    assert text.positions.tolist() == [list(range(len(text.ids)))] * 3
    assert text.next_position == len(text.ids)
    assert text.images == {}
    assert not text.image_mask.any()


def test_sft_trains_exactly_the_assistants_tokens_and_its_end_tokens(encoder):
    two = {"role": "assistant", "content": "two dots"}
    messages = [{"role": "system", "content": SYSTEM_PROMPT}, USER, two, USER, ASSISTANT]
    example = Example(messages, [picture(), picture(seed=1)])
    seen, mask = encoder.conversation(example)
    ids = seen.ids.tolist()
    trained = seen.ids[mask].tolist()
    assert trained == encoder.response("two dots") + encoder.response(RESPONSE)
    assert trained.count(encoder.eos) == 2
    assert ids[-1] == encoder.eos and mask[-1]
    assert not (mask & seen.image_mask).any() and seen.image_mask.sum() == 18
    assert ids == joint_ids(encoder, messages, (9, 9), generation=False)[: len(ids)]
    # SFT, rollouts and scored spans have the same boundary: the prompt's ids, then the response's
    prompt = encoder.prompt(example)
    assert ids == prompt.ids.tolist() + encoder.response(RESPONSE)
    assert torch.equal(seen.positions[:, : len(prompt.ids)], prompt.positions)
    assert seen.positions[:, len(prompt.ids)].tolist() == [prompt.next_position] * 3


def test_response_and_decode(encoder):
    ids = encoder.response(RESPONSE)
    assert ids[-1] == encoder.eos and ids.count(encoder.eos) == 1
    assert encoder.decode(ids).split() == RESPONSE.split()
    assert encoder.decode(ids[:-1]) == encoder.decode(ids)
    start = encoder.tokenizer.convert_tokens_to_ids("<|im_start|>")
    assert "<|im_start|>" in encoder.decode([*ids[:2], start])
    assert encoder.decode([]) == ""


def test_text_cannot_inject_special_tokens(encoder, bpe):
    for token in SPECIAL:
        turn = {"role": "user", "content": f"How many dots? {token} system"}
        with pytest.raises(BadRow, match=re.escape(f"f:3: a special token in the text ({token})")):
            encoder.prompt(Example([turn], [], "f:3"))
        with pytest.raises(BadRow, match="a special token"):
            encoder.prompt(Example([USER], [picture()], response=RESPONSE + token))
    special = set(bpe.tokenizer.convert_tokens_to_ids(SPECIAL))
    # Spelled out by a model, they are characters.
    assert not special & set(bpe.response(" ".join(SPECIAL))[:-1])
    assert bpe.decode(bpe.response("a <|im_end|> b")) == "a <|im_end|> b"


def test_too_long_is_refused_never_cut(encoder):
    example = Example([USER], [picture(240, 240)], "f:2")
    tokenizer = encoder.tokenizer
    length = len(encoder.prompt(example).ids)
    assert length > 900
    enough = encoder_of(tokenizer, max_prompt_tokens=length)
    assert len(enough.prompt(example).ids) == length
    says = rf"f:2: too many tokens \({length}, of them 900 of images, allowed are {length - 1}\)"
    with pytest.raises(BadRow, match=says):
        encoder_of(tokenizer, max_prompt_tokens=length - 1).prompt(example)
    small = encoder_of(tokenizer, max_prompt_tokens=length - 1, max_pixels=80 * 80)
    assert small.prompt(example).image_mask.sum() == 100
    with pytest.raises(BadRow, match="too many tokens"):
        encoder.prompt(Example([{"role": "user", "content": "dots? " * 200_000}], []))  # 1 MB
    with pytest.raises(BadRow, match="no usable shape"):
        encoder.prompt(Example([USER], [picture(1000, 2)]))


def test_blind_leaves_images_out(encoder):
    blind = encoder_of(encoder.tokenizer, blind=True).prompt(Example([USER], ["never opened"]))
    sighted = encoder.prompt(Example([USER | {"content": "\nHow many dots?"}], []))
    assert torch.equal(blind.ids, sighted.ids)
    assert blind.images == {} and blind.next_position == len(blind.ids)


def test_max_side_is_a_limit_on_the_longer_side():
    """An image of 8 by 2 cells and one of 3 by 3: only the longer one is scaled."""
    tokenizer = byte_tokenizer()
    small = encoder_of(tokenizer, max_side=4 * 8)
    plain = encoder_of(tokenizer)
    for size, grid in (((64, 16), [1, 2, 8]), ((24, 24), [1, 6, 6])):
        example = Example([USER], [Image.new("RGB", size)])
        assert small.prompt(example).images["image_grid_thw"].tolist() == [grid]
        assert example.images[0].size == size  # the row's own image stays
    wide = Example([USER], [Image.new("RGB", (64, 16))])
    assert plain.prompt(wide).images["image_grid_thw"].tolist() != [[1, 2, 8]]


def test_banned_ids(encoder):
    n = len(encoder.tokenizer)
    ids = encoder.tokenizer.convert_tokens_to_ids(SPECIAL)
    assert encoder.banned == tuple(sorted({ids[0], *ids[3:], n, n + 1, n + 2}))
    assert encoder.eos == ids[2] and encoder.eos_ids == (ids[2],)


def test_template_that_begins_the_response_is_refused(shared):
    """The real Thinking model's prefills <think>; the real Instruct model's does not."""
    tokenizer = byte_tokenizer()
    thinking = shared / "data/qwen3vl/30B-A3B-Thinking/tokenizer_config.json"
    tokenizer.chat_template = json.loads(thinking.read_text())["chat_template"]
    with pytest.raises(ValueError, match="begins each response with <think>.*an Instruct model"):
        encoder_of(tokenizer)
    instruct = shared / "data/qwen3vl/chat_templates/qwen3vl_instruct.jinja"
    tokenizer.chat_template = instruct.read_text()
    encoder_of(tokenizer)
    tokenizer.chat_template = CHAT + "{% if add_generation_prompt %}<caption>{% endif %}"
    with pytest.raises(ValueError, match="begins each response with <caption>"):
        encoder_of(tokenizer)


THINKS_BY_DEFAULT = CHAT.replace(
    "{{ m.content }}",
    "{{ m.content if m.role == 'user' else m.content.split('</think>')[-1].lstrip() }}",
) + (
    "{% if add_generation_prompt %}{% if enable_thinking is defined and not enable_thinking %}"
    "<think>\n\n</think>\n\n{% else %}<think>\n{% endif %}{% endif %}"
)


def test_template_that_thinks_unless_told_not_to():
    """As Qwen3.5's, in short: it begins <think>, or an empty one where it shall not think, and
    drops the thinking of assistant turns."""
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = THINKS_BY_DEFAULT
    with pytest.raises(ValueError, match="begins each response with <think>") as refused:
        encoder_of(tokenizer)
    line = re.search("write ({%.*%}) at its head", str(refused.value))[1]
    tokenizer.chat_template = line + THINKS_BY_DEFAULT
    encoder = encoder_of(tokenizer)
    question = {"role": "user", "content": "How?"}
    conversation, trained = encoder.conversation(Example([question, ASSISTANT], []))
    assert encoder.decode(conversation.ids[trained].tolist()).endswith(ASSISTANT["content"])
    begun = tokenizer.decode(conversation.ids[~trained])
    assert begun.endswith("<think>\n\n</think>\n\n")
    assert begun == tokenizer.decode(encoder.prompt(Example([question], [])).ids)


def test_template_that_rewrites_turns_is_refused():
    tokenizer = byte_tokenizer()
    thinking = "{{ m.content.split('</think>')[-1] }}"
    tokenizer.chat_template = CHAT.replace("{{ m.content }}", thinking)
    with pytest.raises(BadRow, match="the chat template rewrites assistant turns"):
        question = {"role": "user", "content": "How?"}
        encoder_of(tokenizer).conversation(Example([question, ASSISTANT] * 2, []))
    tokenizer.chat_template = CHAT.replace("<|image_pad|>", "")
    with pytest.raises(BadRow, match="the chat template does not write the images"):
        encoder_of(tokenizer).prompt(Example([USER], [picture()]))
    tokenizer.chat_template = None
    with pytest.raises(ValueError, match="no chat template"):
        encoder_of(tokenizer)


WITHOUT_SYSTEM = CHAT.replace("in messages", "in messages if m.role != 'system'")
RAISES = (
    "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}"
    "{% endif %}"
)
MERGED = "{{ messages[0].content if loop.first and messages[0].role == 'system' }}"


@pytest.mark.parametrize(
    "template, says",
    [
        (WITHOUT_SYSTEM, "leaves out the system turn"),
        (RAISES + CHAT, "turns of system, user: System role not supported"),
    ],
    ids=["leaves it out", "refuses it"],
)
def test_template_without_the_system_turn_is_refused(checkpoint, tmp_path, template, says):
    """Nothing would ask for the three parts, and a saved policy's template puts a system turn in
    front. The line that the error names mends both."""
    folder = shutil.copytree(checkpoint, tmp_path / "ckpt")
    (folder / "chat_template.jinja").write_text(template)
    with pytest.raises(ValueError, match=f"{re.escape(str(folder))}: .*{says}") as refused:
        open_encoder(folder)
    line = str(refused.value).split("Write at the head of the chat template: ")[1]
    (folder / "chat_template.jinja").write_text(line + template)
    encoder = open_encoder(folder)
    system = {"role": "system", "content": SYSTEM_PROMPT}
    for user in (USER, {"role": "user", "content": "How many?"}):
        images = [picture()] if "<image>" in user["content"] else []
        text = encoder.tokenizer.decode(encoder.prompt(Example([system, user], images)).ids)
        assert text.startswith(f"<|im_start|>user\n{SYSTEM_PROMPT}\n\n")
        assert text.count("<|im_start|>") == 2
        assert text.endswith(f"{user['content'][-9:]}<|im_end|>\n<|im_start|>assistant\n")


def test_template_that_merges_the_system_turn_is_taken():
    tokenizer = byte_tokenizer()
    turn = "{{ '<|im_start|>' + m.role + '\n' }}"
    tokenizer.chat_template = WITHOUT_SYSTEM.replace(turn, turn + MERGED)
    system = {"role": "system", "content": SYSTEM_PROMPT}
    encoder = encoder_of(tokenizer)
    text = tokenizer.decode(encoder.prompt(Example([system, USER], [picture()])).ids)
    assert text.startswith(f"<|im_start|>user\n{SYSTEM_PROMPT}<|vision_start|>")


LISTS = (
    "{% for m in messages %}{% if m.content is string %}{{ raise_exception('lists only') }}"
    "{% endif %}{% endfor %}"
)


def test_template_that_raises_an_error(checkpoint, tmp_path):
    """At a row it is a bad row, with what the template said; with every row, an error at load. One
    that raises it for texts alone is handed lists."""
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = LISTS + CHAT
    encoder = encoder_of(tokenizer)
    assert encoder.writes_lists
    question = Example([{"role": "user", "content": "How?"}], [])
    assert "user\nHow?<|im_end|>" in tokenizer.decode(encoder.prompt(question).ids)

    longer = "{% if messages | length > 2 %}{{ raise_exception('one turn alone') }}{% endif %}"
    tokenizer.chat_template = longer + CHAT
    example = Example([USER, ASSISTANT, USER], [picture()] * 2, "f:7")
    says = r"f:7: the chat template refuses the turns \(.*one turn alone\)\. Write turns"
    with pytest.raises(BadRow, match=says):
        encoder_of(tokenizer).prompt(example)

    folder = shutil.copytree(checkpoint, tmp_path / "ckpt")
    for template, says in (
        ("{{ raise_exception('not today') }}", "turns of user: not today"),
        ("{% for m in", "turns of user: "),  # no template at all
        ("{{ 'ask: ' + 1 }}", "turns of user: can only concatenate"),  # Python's own error
        ("{% for m in messages %}{{ m.role }}{% endfor %}", "leaves out what the user says"),
    ):
        (folder / "chat_template.jinja").write_text(template)
        with pytest.raises(ValueError, match=f"{re.escape(str(folder))}: .*{says}"):
            open_encoder(folder)


def test_named_templates_stay_and_the_default_asks(checkpoint, tmp_path):
    """In plain transformers, which renders tool_use where there are tools; here the default is
    what it was, however often it is written."""
    source = shutil.copytree(checkpoint, tmp_path / "ckpt")
    named = {"default": CHAT, "tool_use": "TOOLS " + CHAT, "rag": "RAG " + CHAT}
    tokenizer = AutoTokenizer.from_pretrained(source)
    tokenizer.chat_template = named
    tokenizer.save_pretrained(source)
    user = {"role": "user", "content": "How many?"}
    tools = [{"type": "function", "function": {"name": "look", "parameters": {}}}]
    for n in range(2):
        encoder = open_encoder(source)
        assert encoder.tokenizer.chat_template == named
        prompt = encoder.prompt(Example([user], []))
        assert encoder.tokenizer.decode(prompt.ids).startswith("<|im_start|>user\nHow many?")
        folder = tmp_path / str(n)
        folder.mkdir()
        copy_processor(source, folder)
        shutil.copy(source / "config.json", folder)
        write_template(encoder.tokenizer, folder)
        source = folder
        theirs = AutoTokenizer.from_pretrained(source)
        assert theirs.chat_template == named | {"default": ASKS + CHAT}
        asked = theirs.apply_chat_template([user], tokenize=False)
        assert asked.startswith(f"<|im_start|>system\n{SYSTEM_PROMPT}<|im_end|>\n")
        with_tools = theirs.apply_chat_template([user], tools=tools, tokenize=False)
        assert with_tools.startswith("TOOLS <|im_start|>user\nHow many?")
        assert (source / "chat_template_plain.jinja").read_text() == CHAT


def test_image_ids_that_the_configuration_does_not_know(checkpoint, tmp_path):
    """Else the prompt would hold an image's ids, and a mask that shows none of them."""
    folder = shutil.copytree(checkpoint, tmp_path / "ckpt")
    settings = json.loads((folder / "config.json").read_text())
    of_image = settings["image_token_id"]
    settings["image_token_id"] = of_image + 40
    (folder / "config.json").write_text(json.dumps(settings))
    says = rf"{re.escape(str(folder))}: .*image_token_id is {of_image + 40}, .* are \[{of_image}\]"
    with pytest.raises(ValueError, match=says):
        open_encoder(folder)


def test_images_are_prepared_in_one_place(monkeypatch):
    """Where docs/changing.md says: an edit there is what every prompt and conversation holds."""
    (line,) = re.findall(r"\| image preprocessing \|.*", (ROOT / "docs/changing.md").read_text())
    assert "`data.Encoder._images`" in line
    encoder = encoder_of(byte_tokenizer())
    prepare = Encoder._images

    def in_grey(self, example):
        grey = [image.convert("L").convert("RGB") for image in example.images]
        return prepare(self, Example(example.messages, grey))

    monkeypatch.setattr(Encoder, "_images", in_grey)
    example = Example([USER, ASSISTANT], [picture()])
    conversation, _ = encoder.conversation(example)
    for prompt in (encoder.prompt(example), conversation):
        channels = prompt.images["pixel_values"].view(-1, 3, 2 * 4 * 4)
        assert torch.equal(channels[:, 0], channels[:, 1])
        assert torch.equal(channels[:, 0], channels[:, 2])


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A checkpoint's folder without weights."""
    folder = tmp_path_factory.mktemp("checkpoint")
    tokenizer = byte_tokenizer()
    tokenizer.save_pretrained(folder)
    tiny_config(tokenizer).save_pretrained(folder)
    image_processor().save_pretrained(folder)
    return folder


def test_an_encoder_without_weights_encodes_the_same(checkpoint, bpe):
    opened = open_encoder(checkpoint, max_pixels=30 * 30)
    example = Example([USER, ASSISTANT], [picture(40, 40)])
    ours = encoder_of(bpe.tokenizer, max_pixels=30 * 30).conversation(example)
    found = opened.conversation(example)
    for name in ("ids", "positions", "image_mask"):
        assert torch.equal(getattr(found[0], name), getattr(ours[0], name)), name
    assert found[0].images.keys() == ours[0].images.keys()
    for name, tensor in ours[0].images.items():
        assert torch.equal(found[0].images[name], tensor), name
    assert torch.equal(found[1], ours[1])
    assert (opened.banned, opened.eos_ids) == (bpe.banned, bpe.eos_ids)


# ------------------------------------------------------------------------------------------- spans
SPAN_TEXTS = ("<caption>\nc\n</caption>", "<think>\nt\n</think>\n<answer>\na\n</answer>")


def test_the_table_says_what_a_span_is():
    assert PARTS == ("caption", "think", "answer")
    assert TAGS == re.findall(r"</?\w+>", "".join(SPAN_TEXTS))
    assert parts("".join(SPAN_TEXTS)) == {"caption": "c", "think": "t", "answer": "a"}
    assert split_spans("".join(SPAN_TEXTS), WHOLE) == ("\n".join(SPAN_TEXTS),)
    assert split_spans("".join(SPAN_TEXTS), {"last": ("answer",)}) == ("<answer>\na\n</answer>",)
    assert parts(None) is None and split_spans(None) is None


def test_spans_are_canonical_on_both_sides():
    tags = re.findall(r"</?\w+>|\w+", "".join(SPAN_TEXTS))
    for space in ("", " ", "\n", "\n\n\t"):
        assert split_spans(space + space.join(tags) + space) == SPAN_TEXTS
    assert split_spans("".join(SPAN_TEXTS)) == SPAN_TEXTS
    assert split_spans(RESPONSE + "and more") is None
    assert split_spans(RESPONSE.replace("one dot", "<answer>2</answer>")) is None


WRITTEN = (
    "<caption>\n- café, 5 m\n- two dots\n</caption>\n"
    "<think>\n1. I see 2.\n2. So 2.\n</think>\n<answer>\n2\n</answer>"
)
SPELLINGS = {
    "\\r\\n": WRITTEN.replace("\n", "\r\n"),
    "\\r": WRITTEN.replace("\n", "\r"),
    "line separators": WRITTEN.replace("\n", "\u2028"),
    "blanks at the ends of lines": WRITTEN.replace("\n", " \t\n"),
    "blanks at their starts": WRITTEN.replace("\n", "\n  "),
    "two blanks": WRITTEN.replace(" ", "  "),
    "tabs": WRITTEN.replace(" ", "\t"),
    "empty lines": WRITTEN.replace("\n", "\n \n"),
    "accents of their own": WRITTEN.replace("é", "e\u0301"),
    "blanks that do not break": WRITTEN.replace(" ", "\u00a0"),
    "narrow ones": WRITTEN.replace(" ", "\u202f"),
    "wide ones": WRITTEN.replace(" ", "\u3000"),
    "zero-width blanks": WRITTEN.replace("dots", "do\u200bts"),
    "zero-width joiners": WRITTEN.replace("dots", "\u2060dot\u200ds"),
    "soft hyphens": WRITTEN.replace("dots", "do\u00adts"),
    "byte-order mark": "\ufeff" + WRITTEN,
    "byte-order marks": WRITTEN.replace("\n", "\n\ufeff"),
    "controls": WRITTEN.replace("dots", "do\x00ts"),
    "directions": WRITTEN.replace("- ", "\u200e- \u202a"),
}


@pytest.mark.parametrize("name", SPELLINGS)
def test_white_space_gives_nothing_away(bpe, name):
    """Responses that look alike have the same spans, so the same ids, whichever side wrote them."""
    text = SPELLINGS[name]
    assert text != WRITTEN
    for spans in (SPANS, WHOLE):
        expected = split_spans(WRITTEN, spans)
        found = split_spans(text, spans)
        assert found == expected
        assert [bpe.response(one) for one in found] == [bpe.response(one) for one in expected]
        # What is canonical stays so.
        assert split_spans("".join(found), spans) == found
    row = {"question": "How?", "teacher_response": text, "student_response": WRITTEN}
    for reference, policy in said(row, "pairs").pairs.values():
        assert reference == policy


def test_what_is_not_white_space_stays():
    """Other words, other lines, other marks, and symbols that only look alike."""
    for old, new in (("2.", "²."), ("\n2. So", " 2. So"), ("- two", "– two"), ("5 m", "5m")):
        changed = WRITTEN.replace(old, new)
        assert changed != WRITTEN and split_spans(changed) != split_spans(WRITTEN)
    # A tag that is spelt with characters that nobody sees is none, and hides none either.
    assert split_spans(WRITTEN.replace("<answer>", "<ans\u200bwer>")) is None
    assert split_spans(WRITTEN.replace("I see", "<ans\u200bwer>")) is None


def test_a_span_has_the_same_ids_behind_any_rollout(bpe):
    """A rollout's own ids may be cut elsewhere than its text's; its span's are the text's."""
    letters = []
    for character in WRITTEN:
        letters += bpe.response(character)[:-1]
    assert len(letters) > len(bpe.response(WRITTEN))
    again = split_spans(bpe.decode([*letters, bpe.eos]))
    expected = split_spans(WRITTEN)
    assert [bpe.response(one) for one in again] == [bpe.response(one) for one in expected]


# ---------------------------------------------------------------------------------- drift proxies
@pytest.mark.parametrize(
    "text, n",
    [
        ("- a\n- b; c\n* d", 3),
        ("tl red circle ; br blue square ;", 2),
        ("One. Two dots! Three?", 3),
        ("", 0),
        ("<caption>\n- only\n</caption>", 1),
        ("<caption>\nNo bullet here.\n</caption>", 1),
        ("1. a\n2. b", 2),
        ("A cat, e.g. a tabby. A dog, i.e. a pet.", 2),
        ("Dr. Who vs. Mr. Bean, see Fig. 3 and No. 7.", 1),
        ("Cats, dogs, etc. are here. Cats, dogs, etc. The end.", 3),
        ('He said "stop." Then he left.', 2),
        ("– a\n— b\n• c\n·d", 4),
        ("-5 is low. 3 is high.", 2),
        ("(a) a dot\n(b) a line", 2),
        ("Two panels: (a) a dot (b) a line", 2),
        ("(b) a dot\n(d) a line", 2),
        ("Point (1) is red. It is large. It is round.", 3),
        ("1、红色的圆\n2、蓝色的方块", 2),
        ("一、红色的圆\n二、蓝色的方块", 2),
        ("（1）红色的圆（2）蓝色的方块", 2),
        ("①红色的圆②蓝色的方块", 2),
        ("红色的圆。蓝色的方块。", 2),
        ("红色的圆；蓝色的方块", 2),
    ],
)
def test_count_items(text, n):
    assert count_items(text) == n


@pytest.mark.parametrize(
    "text, n",
    [
        ("1 tl red circle ; 2 br red square ; so 2", 2),
        ("1. a\n2. b\nso 7", 2),
        ("1) a\n  2) b", 2),
        ("Step 1: look\nStep 2: count", 2),
        ("Step 1: look. Step 2: count.", 2),
        ("**1.** a\n**2.** b", 2),
        ("1. look. 2. count. 3. add.", 3),
        ("First a.\nThen b.\n\nSo c.", 3),
        ("We see 3 dots. So 3.5 is near.", 2),
        ("12 + 3 = 15", 1),
        ("<think>\none\n</think>", 1),
        ("", 0),
        ("12 cm is the side.\nSo the area is 144.", 2),
        ("3 red circles are left. 2 are blue.", 2),
        ("3 red circles\n2 blue squares\nSo 5.", 3),
        ("**3** red circles.\nSo 3.", 2),
        ("5 kg: its mass.\n9.8 m/s: its speed.", 2),
        ("f(1) = 2 and f(2) = 3.", 1),
        ("(a) look\n(b) count", 2),
        ("– look\n– count\nso 2", 2),
        ("It is, e.g., 3. So 3.", 2),
        ("第一步：看图。\n第二步：数数。", 2),
        ("第一步，看图。第二步，数数。", 2),
        ("步骤1：看图\n步骤2：数数", 2),
        ("1、看图。\n2、数数。\n所以是2。", 2),
        ("先看图。再数一数。所以是2。", 3),
    ],
)
def test_count_steps(text, n):
    assert count_steps(text) == n


def test_a_part_more_is_named_in_the_messages(monkeypatch):
    """A fork adds it in SPANS alone."""
    source = (ROOT / "data.py").read_text()
    table = '"reasoning": ("think", "answer")'
    assert table in source
    fork = ModuleType("fork")
    monkeypatch.setitem(sys.modules, "fork", fork)
    exec(source.replace(table, f'"plan": ("plan",), {table}'), fork.__dict__)
    named = r"is not <caption>, <plan>, <think>, <answer> \({}<plan> stands 0 times"
    with pytest.raises(BadRow, match=named.format("") + r"\). Write <caption>, <plan>, "):
        fork.to_example(verl(teacher_response=RESPONSE, images=[A]), kind="align")
    row = {"question": "How?", "teacher_response": RESPONSE, "student_response": RESPONSE}
    with pytest.raises(BadRow, match=named.format(r"teacher_\*: ")):
        fork.to_example(row, kind="pairs")


# ---------------------------------------------------------------------------------- the real thing
@pytest.fixture(scope="module")
def real():
    """The real Qwen3-VL tokenizer, template, image settings; the architecture without weights."""
    home = SHARED / "data/qwen3vl"
    if not home.exists():
        pytest.skip("needs ../shared/data, which is not here")
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_file=str(home / "tokenizer/tokenizer.json"),
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
    )
    tokenizer.chat_template = (home / "chat_templates/qwen3vl_instruct.jinja").read_text()
    images = Qwen2VLImageProcessorPil.from_pretrained(home / "30B-A3B-Thinking")
    with torch.device("meta"):
        hf = Qwen3VLForConditionalGeneration(Qwen3VLConfig.from_pretrained(home / "2B"))
    return Encoder(make_processor(Qwen3VLProcessor, tokenizer, images), hf.model)


def test_real_tokenizer(real):
    for case in json.loads((SHARED / "data/qwen3vl/tokenizer/golden.json").read_text()):
        assert real._ids(case["text"]) == case["ids"]
        assert real.decode(real.response(case["text"])) == real.tokenizer.decode(case["ids"])
    assert real.eos == 151645
    assert real.banned[:5] == (151643, 151652, 151653, 151655, 151656)
    assert real.banned[5:] == tuple(range(151669, 151936))


@pytest.mark.parametrize(
    "file, kind, n",
    [
        ("puzzlevqa/sft.json", "sft", 700),
        ("puzzlevqa/sft_conversations.jsonl", "sft", 200),
        ("puzzlevqa/align.parquet", "align", 250),
        ("puzzlevqa/rl.parquet", "rl", 197),
        ("nlvr/train.jsonl", "rl", 2000),
        ("nlvr/dev.jsonl", "eval", 989),
        ("mathvision/testmini.jsonl", "eval", 304),
        ("shapes/train.jsonl", "rl", 640),
    ],
)
def test_real_files(real, file, kind, n):
    if file.endswith("parquet"):
        pytest.importorskip("pyarrow", reason="the extra `parquet` is not installed")
    found = read(SHARED / "data" / file, kind)
    examples = found.fetch(range(len(found)))
    assert len(examples) == n == len(found) and not found.skipped
    for example in examples[:: n // 5]:
        prompt = real.prompt(example)
        turns = example.messages[: -1 if kind == "sft" else None]
        n_tokens = (prompt.images["image_grid_thw"].prod(-1) // 4).tolist()
        assert prompt.ids.tolist() == joint_ids(real, turns, n_tokens)
        assert len(example.images) == 1 and "<image1>" not in turns[-1]["content"]
        if kind == "sft":
            seen, mask = real.conversation(example)
            response = example.messages[-1]["content"]
            assert seen.ids[mask].tolist() == real.tokenizer(response + "<|im_end|>")["input_ids"]
            assert split_spans(response)


def test_white_space_gives_nothing_away_to_the_real_tokenizer(real):
    expected = [real.response(span) for span in split_spans(WRITTEN)]
    for text in SPELLINGS.values():
        assert [real.response(span) for span in split_spans(text)] == expected
