"""Files -> rows -> examples -> prompts: every format, what is refused and how it is named, and what the model sees."""

import io
import json
import os
import re
import subprocess
import sys
import tracemalloc

import numpy as np
import pytest
import torch
from conftest import ROOT, SHARED
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast, Qwen3VLConfig, Qwen3VLForConditionalGeneration
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

import data
from data import SYSTEM_PROMPT, Encoder, Example, count_items, count_steps, read, split_spans
from engine.rows import BadRow, Order, Rows, open_image

SPECIAL = "<|endoftext|> <|im_start|> <|im_end|> <|vision_start|> <|vision_end|> <|image_pad|> <|video_pad|>".split()
CHAT = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% if m.content is string %}{{ m.content }}{% else %}"
    "{% for c in m.content %}{{ '<|vision_start|><|image_pad|><|vision_end|>' if c.type == 'image' else c.text }}"
    "{% endfor %}{% endif %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
RESPONSE = "<caption>\n- a red dot\n</caption>\n<think>\none dot\n</think>\n<answer>\n1\n</answer>"
USER, ASSISTANT = (
    {"role": "user", "content": "<image>\nHow many dots?"},
    {"role": "assistant", "content": RESPONSE},
)


def byte_tokenizer():
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer, raw.decoder = (
        pre_tokenizers.ByteLevel(add_prefix_space=False),
        decoders.ByteLevel(),
    )
    trainer = trainers.BpeTrainer(
        vocab_size=330, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    raw.train_from_iterator([SYSTEM_PROMPT, RESPONSE, "How many dots are there?"] * 3, trainer)
    return finish(raw)


def word_tokenizer():
    words = dict.fromkeys(
        [
            *SPECIAL,
            "<unk>",
            *SYSTEM_PROMPT.split(),
            *RESPONSE.split(),
            "How",
            "many",
            "dots?",
            "user",
        ]
    )
    raw = Tokenizer(
        models.WordLevel(
            {word: i for i, word in enumerate([*words, "assistant", "two"])}, unk_token="<unk>"
        )
    )
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


def tiny_model(tokenizer, spare=3):
    """A Qwen3-VL with patch 4, merge 2 whose head is `spare` rows longer than the vocabulary, as the real ones are."""
    ids = dict(zip(SPECIAL, tokenizer.convert_tokens_to_ids(SPECIAL), strict=True))
    config = Qwen3VLConfig(
        text_config=dict(
            hidden_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=8,
            intermediate_size=16,
            vocab_size=len(tokenizer) + spare,
            eos_token_id=tokenizer.eos_token_id,
            rope_scaling={
                "rope_type": "default",
                "mrope_section": [2, 1, 1],
                "mrope_interleaved": True,
            },
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
    return Qwen3VLForConditionalGeneration(config)


def encoder_of(tokenizer, **options):
    hf = tiny_model(tokenizer)
    images = Qwen2VLImageProcessorPil(
        patch_size=4,
        merge_size=2,
        image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
        size={"shortest_edge": 64, "longest_edge": 64 * 4096},
    )
    return Encoder(tokenizer, images, hf.config, hf.model.get_rope_index, **options)


@pytest.fixture(scope="module", params=[byte_tokenizer, word_tokenizer], ids=["bytes", "words"])
def encoder(request):
    return encoder_of(request.param())


@pytest.fixture(scope="module")
def bpe():
    return encoder_of(byte_tokenizer())


def picture(width=24, height=24, seed=0):
    return Image.fromarray(
        np.random.default_rng(seed).integers(0, 255, (height, width, 3), dtype=np.uint8)
    )


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
    (folder / name).write_text(
        "".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in rows)
    )
    return folder / name


def verl(**more):
    row = {
        "data_source": "dots",
        "prompt": [{"role": "system", "content": SYSTEM_PROMPT}, USER],
        "images": [{"bytes": None, "path": "images/0.png"}],
        "reward_model": {"style": "rule", "ground_truth": "1"},
    }
    return row | more


# ------------------------------------------------------------------------------------------------------------ formats


def test_both_sharegpt_dialects_are_the_same_example(folder):
    a = {
        "messages": [{"role": "system", "content": "Look."}, USER, ASSISTANT],
        "images": ["images/0.png"],
    }
    turns = [{"from": "human", "value": USER["content"]}, {"from": "gpt", "value": RESPONSE}]
    b = {"conversations": turns, "images": ["images/0.png"], "system": "Look."}
    one, two = read(write(folder, a, b), "sft").fetch(range(2))
    assert one.messages == two.messages == a["messages"]
    assert one.images == two.images == [str(folder / "images/0.png")]
    assert (two.where, two.row) == (f"{folder}/rows.jsonl:2", 1)


def test_verl_rows(folder):
    spans = {
        "teacher_caption": RESPONSE[: RESPONSE.index("<think>")],
        "teacher_cot": RESPONSE[RESPONSE.index("<think>") :],
    }
    more = {"style": "rule", "ground_truth": "1", "equivalent_answers": ["one", "1.0"]}
    path = write(folder, verl(teacher_response=RESPONSE), verl(**spans), verl(reward_model=more))
    whole, derived, answers = (
        read(path, kind)[i] for kind, i in (("align", 0), ("align", 1), ("rl", 2))
    )
    assert (
        [m["role"] for m in whole.messages] == ["system", "user"]
        and whole.answer == "1"
        and whole.source == "dots"
    )
    assert split_spans(whole.response) == split_spans(derived.response) is not None
    assert (
        answers.answer == "1" and answers.equivalent == ("one", "1.0") and answers.response is None
    )
    assert read(path, "sft")[0].messages[-1] == ASSISTANT


def test_parquet_equals_json(folder):
    pa = pytest.importorskip("pyarrow", reason="the extra `parquet` is not installed")
    import pyarrow.parquet as pq

    rows = [
        verl(images=[{"bytes": png(picture(seed=i)), "path": None}], teacher_response=RESPONSE)
        for i in range(200)
    ]
    rows[150]["reward_model"] = {"style": "rule", "ground_truth": "many"}
    pq.write_table(pa.Table.from_pylist(rows), folder / "rows.parquet", row_group_size=70)
    found = read(folder / "rows.parquet", "align")
    assert len(found) == 200 and [found[i].images[0] for i in range(200)] == [
        row["images"][0]["bytes"] for row in rows
    ]
    assert found[150].answer == "many" and found[150].where.endswith("rows.parquet:151")
    assert (
        os.listdir(folder).count("rows.parquet") == 1
    )  # what it is unpacked to leaves nothing behind


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
    for pair in read(write(folder, row, whole), "pairs").fetch(range(2)):
        assert pair.pairs["perception"] == (split_spans(RESPONSE)[0], split_spans(other)[0])
        assert pair.pairs["reasoning"] == (split_spans(RESPONSE)[1], split_spans(other)[1])
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
    listed = row | {
        "question": "Is it true or false?",
        "choices": ["true", "false"],
        "answer": "false",
    }
    found = read(write(folder, row, several, hidden, listed), "eval").fetch(range(4))
    assert [example.messages[1]["content"] for example in found] == [
        "<image>\nWhich?",
        "<image>\nThis (image 1) or that (image 2)?\n(image 3)",
        "<image>\nIs it red?\nOptions:\n(A) true\n(B) false",
        "<image>\nIs it true or false?",
    ]
    assert all(example.messages[0]["content"] == SYSTEM_PROMPT for example in found)
    assert found[0].choices == ("A", "B") and found[0].answer == "B" and found[2].answer == "False"


def test_evaluation_takes_every_format(folder):
    sft = {"messages": [USER, ASSISTANT], "images": ["images/0.png"]}
    for example in read(write(folder, sft, verl(teacher_response=RESPONSE)), "eval").fetch(
        range(2)
    ):
        assert (example.response, example.answer, example.messages[-1]) == (RESPONSE, "1", USER)


def test_system_prompt_is_the_papers():
    if not SHARED.exists():
        pytest.skip("needs ../shared, which is not here")
    text = (SHARED / "METHOD.md").read_text()
    assert SYSTEM_PROMPT == re.search(r"```\n(You are a helpful.*?</answer>\n)```", text, re.S)[1]


# -------------------------------------------------------------------------------------------------------------- files


def test_index_of_json_array_and_lines(folder):
    rows = [{"id": i, "text": f'[{{"é{i}" \\ 中\n' * (i % 50)} for i in range(10_000)]
    (folder / "a.json").write_text(
        "\ufeff " + json.dumps(rows, ensure_ascii=False, indent=1), "utf-8"
    )
    (folder / "b.json").write_text(json.dumps(rows))
    (folder / "c.jsonl").write_text(
        "\n" + " \r\n\n".join(json.dumps(row, ensure_ascii=False) for row in rows), "utf-8"
    )
    size = (folder / "a.json").stat().st_size
    del rows
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
    assert (
        all(sorted(epoch) == list(range(7)) for epoch in epochs)
        and len({tuple(epoch) for epoch in epochs}) == 4
    )
    for stop in range(16):  # the ends of epochs (7, 14) among them
        first = Order(7, seed=3)
        taken = first.take(stop)
        second = Order(7, seed=3)
        second.load(json.loads(json.dumps(first.state())))
        assert taken + second.take(30 - stop) == whole
    with pytest.raises(ValueError, match="7 rows and seed 3, here are 8 rows"):
        Order(8, seed=3).load(first.state())


# ------------------------------------------------------------------------------------------------------------ bad rows

ONE = {"images": ["images/0.png"]}
BAD = [
    ("sft", '{"messages": [', "not valid JSON"),
    ("sft", "[" * 100_000, "not valid JSON"),
    ("sft", '"text"', "not an object"),
    ("sft", ONE | {"messages": "hello"}, "`messages` is not a list"),
    ("sft", ONE | {"messages": ["hello"]}, "`messages` is not a list"),
    ("sft", ONE | {"messages": []}, "do not alternate"),
    ("sft", ONE | {"messages": [USER, USER, ASSISTANT]}, "do not alternate"),
    ("sft", ONE | {"messages": [ASSISTANT, USER]}, "do not alternate"),
    (
        "sft",
        ONE | {"messages": [{"role": "tool", "content": "x"}, USER, ASSISTANT]},
        "do not alternate",
    ),
    ("sft", ONE | {"messages": [USER]}, "last turn is missing"),
    (
        "sft",
        ONE | {"messages": [USER, {"role": "assistant", "content": " "}]},
        "`content` is missing, empty",
    ),
    (
        "sft",
        ONE | {"messages": [USER, {"role": "assistant", "content": 5}]},
        "`content` is missing, empty",
    ),
    (
        "sft",
        ONE | {"messages": [USER, {"role": "assistant", "content": "\ud800"}]},
        "no valid text",
    ),
    (
        "sft",
        ONE | {"messages": [USER, {"role": "assistant", "content": "<image>"}]},
        "<image> outside a user's turn",
    ),
    (
        "sft",
        {"images": [], "messages": [USER, ASSISTANT]},
        r"not one <image> for each image \(1 <image>, 0 images\)",
    ),
    (
        "sft",
        {"images": ["images/0.png"] * 2, "messages": [USER, ASSISTANT]},
        "not one <image> for each image",
    ),
    ("sft", {"images": ["images/9.png"], "messages": [USER, ASSISTANT]}, "an image is missing"),
    ("sft", {"images": ["images"], "messages": [USER, ASSISTANT]}, "an image is missing"),
    ("sft", {"images": ["../x.png"], "messages": [USER, ASSISTANT]}, "leads out .*--image_root"),
    ("sft", {"images": ["/etc/passwd"], "messages": [USER, ASSISTANT]}, "leads out .*--image_root"),
    ("sft", {"images": [5], "messages": [USER, ASSISTANT]}, "neither path nor bytes"),
    ("sft", {"images": [None], "messages": [USER, ASSISTANT]}, "neither path nor bytes"),
    (
        "sft",
        {"images": [{"bytes": None, "path": None}], "messages": [USER, ASSISTANT]},
        "neither path nor bytes",
    ),
    ("align", verl(), "lacks the three parts"),
    ("align", verl(teacher_response="It is 1."), "lacks the three parts"),
    ("align", verl(teacher_response=RESPONSE.replace("\n1\n", "\n")), "lacks the three parts"),
    ("align", verl(teacher_caption="<caption>x</caption>"), "`teacher_cot` is missing"),
    (
        "align",
        verl(teacher_response=["x"]),
        "`teacher_response` is missing, empty or no valid text",
    ),
    ("rl", verl(reward_model={}), "no answer"),
    ("rl", verl(reward_model={"ground_truth": " "}), "no answer"),
    ("rl", verl(reward_model={"ground_truth": float("nan")}), "no answer"),
    ("rl", verl(reward_model={"ground_truth": {"a": 1}}), "`answer` is neither a text"),
    ("rl", verl(reward_model="1"), "reward_model or extra_info"),
    ("rl", verl(prompt=None), "`question` is missing"),
    ("eval", {"image": "images/0.png", "question": "", "answer": "1"}, "`question` is missing"),
    (
        "eval",
        {"image": "images/0.png", "question": "How?", "choices": [{}], "answer": "1"},
        "`choices` is neither",
    ),
    (
        "pairs",
        {"question": "How?", "teacher_response": RESPONSE, "student_response": "1"},
        r"three parts \(student",
    ),
    ("pairs", {"question": "How?", "teacher_response": RESPONSE}, r"three parts \(student"),
]


@pytest.mark.parametrize("kind, row, what", BAD, ids=[f"{i}-{b[0]}" for i, b in enumerate(BAD)])
def test_bad_row_is_named_and_left_out(folder, capsys, kind, row, what):
    good = {"sft": ONE | {"messages": [USER, ASSISTANT]}, "align": verl(teacher_response=RESPONSE)}
    good["pairs"] = {"question": "How?", "teacher_response": RESPONSE, "student_response": RESPONSE}
    good = good.get(kind, verl())
    path = write(folder, good, row, good)
    found = read(path, kind)
    with pytest.raises(BadRow, match=what) as raised:
        found[1]
    assert str(raised.value).startswith(f"{path}:2: ") and raised.value.mend in str(raised.value)
    assert [getattr(row, "example", row).row for row in found.fetch([0, 1, 2, 1])] == [0, 2]
    assert found.skipped == {raised.value.what: 1} and str(raised.value) in capsys.readouterr().err


def test_too_many_bad_rows_end_the_run(folder):
    path = write(folder, *["{"] * 3, *[verl()] * 5)
    with pytest.raises(
        ValueError, match=r"3 of 8 rows are bad .*'not valid JSON': 3.*rows.jsonl:3"
    ):
        read(path, "rl", max_bad=2).fetch(range(8))
    assert len(read(path, "rl", max_bad=3).fetch(range(8))) == 5
    with pytest.raises(ValueError, match="1 of 1 rows are bad"):
        read(write(folder, "{", name="all.jsonl"), "rl").draw(Order(1), 1)


def test_draw_is_full_and_the_same_whatever_is_bad(folder):
    found = read(write(folder, *["{" if i % 3 == 0 else verl() for i in range(12)]), "rl")
    order = Order(12, seed=1)
    rows = [example.row for _ in range(5) for example in found.draw(order, 4)]
    assert rows == [i for _, i in Order(12, seed=1).take(60) if i % 3][:20] and len(found.bad) == 4


def test_image_root(folder, tmp_path_factory):
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    row = {"messages": [USER, ASSISTANT]}
    path = write(
        elsewhere,
        row | {"images": [str(folder / "images/0.png")]},
        row | {"images": ["images/1.png"]},
    )
    with pytest.raises(BadRow, match="leads out"):
        read(path, "sft")[0]
    assert [example.images for example in read(path, "sft", image_root=folder).fetch(range(2))] == [
        [str(folder / "images/0.png")],
        [str(folder / "images/1.png")],
    ]


# -------------------------------------------------------------------------------------------------------------- images


def test_path_bytes_and_pil_are_the_same_picture(folder):
    path = str(folder / "images/0.png")
    for source in (path, open(path, "rb").read(), Image.open(path)):
        assert np.array_equal(np.asarray(open_image(source)), np.asarray(picture()))


def test_modes():
    white, red = [255, 255, 255], [255, 0, 0]
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
    look = lambda data: np.asarray(open_image(data)).tolist()  # noqa: E731
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
    monkeypatch.setattr("engine.rows.MAX_IMAGE", 1000)
    with pytest.raises(BadRow, match="200 x 200 pixels, allowed are 1000"):
        open_image(whole)


# ------------------------------------------------------------------------------------------------------------- encoder


def joint_ids(encoder, messages, n_tokens, generation=True):
    """The other way to the same ids: render with placeholders, widen them in the text, tokenise it all at once."""
    parted = [
        {
            "role": m["role"],
            "content": [
                {"type": "image"} if p == "<image>" else {"type": "text", "text": p}
                for p in re.split("(<image>)", m["content"])
                if p
            ],
        }
        for m in messages
    ]
    text = encoder.tokenizer.apply_chat_template(
        parted, tokenize=False, add_generation_prompt=generation
    )
    for n in n_tokens:
        text = text.replace("<|image_pad|>", "<here>" * n, 1)
    text = text.replace(
        "<here>", " <|image_pad|> " if encoder.tokenizer.unk_token else "<|image_pad|>"
    )
    return encoder.tokenizer(text, add_special_tokens=False)["input_ids"]


def test_prompt_is_the_jointly_tokenised_template(encoder):
    messages = [
        {"role": "system", "content": SYSTEM_PROMPT},
        {"role": "user", "content": "<image>\n<image> How many dots?"},
    ]
    prompt = encoder.prompt(Example(messages, [picture(), picture(32, 16)]))
    assert prompt.ids.tolist() == joint_ids(encoder, messages, (9, 8))
    assert prompt.grid_thw.tolist() == [[1, 6, 6], [1, 4, 8]] and prompt.pixel_values.shape == (
        36 + 32,
        3 * 2 * 4 * 4,
    )
    assert prompt.image_mask.tolist() == [i == encoder.image_id for i in prompt.ids.tolist()]


def test_small_images_keep_their_pixels(encoder):
    prompt = encoder.prompt(Example([USER], [picture()]))
    corner = prompt.pixel_values[0].view(3, 2, 4, 4)[
        :, 0
    ]  # (channel, frame, height, width) of the first patch
    assert torch.allclose(
        (corner + 1) * 127.5, torch.tensor(np.asarray(picture())[:4, :4]).permute(2, 0, 1).float()
    )


def test_positions_are_the_models_own(encoder):
    example = Example(
        [{"role": "user", "content": "How <image> many\n<image> dots?"}],
        [picture(), picture(40, 16)],
    )
    prompt = encoder.prompt(example)
    # text counts on; an image's rows and columns count from where it starts, and text goes on behind the larger of them
    want, at, grids = [], 0, iter([(3, 3), (2, 5)])
    ids = prompt.ids.tolist()
    while len(want) < len(ids):
        if ids[len(want)] == encoder.image_id:
            h, w = next(grids)
            want += [(at, at + y, at + x) for y in range(h) for x in range(w)]
            at += max(h, w)
        else:
            want.append((at,) * 3)
            at += 1
    assert prompt.positions.T.tolist() == [list(p) for p in want] and prompt.next_position == at
    assert prompt.positions.dtype == prompt.ids.dtype == torch.int64
    text = encoder.prompt(Example([{"role": "user", "content": "How many"}], []))
    assert text.positions.tolist() == [
        list(range(len(text.ids)))
    ] * 3 and text.next_position == len(text.ids)
    assert text.pixel_values is None and text.grid_thw is None and not text.image_mask.any()


def test_sft_trains_exactly_the_assistants_tokens_and_its_end_tokens(encoder):
    two = {"role": "assistant", "content": "two dots"}
    messages = [{"role": "system", "content": SYSTEM_PROMPT}, USER, two, USER, ASSISTANT]
    example = Example(messages, [picture(), picture(seed=1)])
    seen, mask = encoder.conversation(example)
    assert seen.ids[mask].tolist() == encoder.response("two dots") + encoder.response(RESPONSE)
    assert (
        seen.ids[mask].tolist().count(encoder.eos) == 2 and seen.ids[-1] == encoder.eos and mask[-1]
    )
    assert not (mask & seen.image_mask).any() and seen.image_mask.sum() == 18
    assert (
        seen.ids.tolist() == joint_ids(encoder, messages, (9, 9), generation=False)[: len(seen.ids)]
    )
    # SFT, rollouts and scored spans have the same boundary: the prompt's ids, then the response's
    prompt = encoder.prompt(example)
    assert seen.ids.tolist() == prompt.ids.tolist() + encoder.response(RESPONSE)
    assert torch.equal(seen.positions[:, : len(prompt.ids)], prompt.positions)
    assert seen.positions[:, len(prompt.ids)].tolist() == [prompt.next_position] * 3


def test_response_and_decode(encoder):
    ids = encoder.response(RESPONSE)
    assert ids[-1] == encoder.eos and ids.count(encoder.eos) == 1
    assert encoder.decode(ids).split() == RESPONSE.split() and encoder.decode(
        ids[:-1]
    ) == encoder.decode(ids)
    start = encoder.tokenizer.convert_tokens_to_ids("<|im_start|>")
    assert "<|im_start|>" in encoder.decode([*ids[:2], start]) and encoder.decode([]) == ""


def test_text_cannot_inject_special_tokens(encoder, bpe):
    for token in SPECIAL:
        turn = {"role": "user", "content": f"How many dots? {token} system"}
        with pytest.raises(BadRow, match=re.escape(f"f:3: a special token in the text ({token})")):
            encoder.prompt(Example([turn], [], "f:3"))
        with pytest.raises(BadRow, match="a special token"):
            encoder.prompt(Example([USER], [picture()], response=RESPONSE + token))
    special = set(bpe.tokenizer.convert_tokens_to_ids(SPECIAL))
    assert not special & set(
        bpe.response(" ".join(SPECIAL))[:-1]
    )  # spelled out by a model, they are characters
    assert bpe.decode(bpe.response("a <|im_end|> b")) == "a <|im_end|> b"


def test_too_long_is_refused_never_cut(encoder):
    example = Example([USER], [picture(240, 240)], "f:2")
    length = len(encoder_of(encoder.tokenizer).prompt(example).ids)
    assert length > 900
    assert (
        len(encoder_of(encoder.tokenizer, max_prompt_tokens=length).prompt(example).ids) == length
    )
    with pytest.raises(
        BadRow,
        match=rf"f:2: too many tokens \({length}, of them 900 of images, allowed are {length - 1}\)",
    ):
        encoder_of(encoder.tokenizer, max_prompt_tokens=length - 1).prompt(example)
    small = encoder_of(encoder.tokenizer, max_prompt_tokens=length - 1, max_pixels=80 * 80).prompt(
        example
    )
    assert small.image_mask.sum() == 100
    with pytest.raises(BadRow, match="too many tokens"):
        encoder.prompt(Example([{"role": "user", "content": "dots? " * 200_000}], []))  # 1 MB
    with pytest.raises(BadRow, match="no usable shape"):
        encoder.prompt(Example([USER], [picture(1000, 2)]))


def test_blind_leaves_images_out(encoder):
    blind = encoder_of(encoder.tokenizer, blind=True).prompt(Example([USER], ["never opened"]))
    sighted = encoder.prompt(Example([USER | {"content": "\nHow many dots?"}], []))
    assert (
        torch.equal(blind.ids, sighted.ids)
        and blind.pixel_values is None
        and blind.next_position == len(blind.ids)
    )


def test_banned_ids(encoder):
    n, ids = len(encoder.tokenizer), encoder.tokenizer.convert_tokens_to_ids(SPECIAL)
    assert encoder.banned == tuple(sorted({ids[0], *ids[3:], n, n + 1, n + 2}))
    assert encoder.eos == ids[2] and encoder.eos_ids == (ids[2],)


def test_template_that_rewrites_turns_is_refused():
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = CHAT.replace(
        "{{ m.content }}", "{{ m.content.split('</think>')[-1] }}"
    )
    with pytest.raises(BadRow, match="the chat template rewrites assistant turns"):
        encoder_of(tokenizer).conversation(
            Example([{"role": "user", "content": "How?"}, ASSISTANT], [])
        )
    tokenizer.chat_template = CHAT.replace("<|image_pad|>", "")
    with pytest.raises(BadRow, match="the chat template does not write the images"):
        encoder_of(tokenizer).prompt(Example([USER], [picture()]))
    tokenizer.chat_template = None
    with pytest.raises(ValueError, match="no chat template"):
        encoder_of(tokenizer)


# ------------------------------------------------------------------------------------------------ spans, counts, check


def test_spans_are_canonical_on_both_sides():
    spans = ("<caption>\nc\n</caption>", "<think>\nt\n</think>\n<answer>\na\n</answer>")
    for space in ("", " ", "\n", "\n\n\t"):
        tags = [
            "<caption>",
            "c",
            "</caption>",
            "<think>",
            "t",
            "</think>",
            "<answer>",
            "a",
            "</answer>",
        ]
        assert split_spans(space + space.join(tags) + space) == spans
    assert split_spans("".join(spans)) == spans and split_spans(RESPONSE + "and more") is None
    assert split_spans(RESPONSE.replace("one dot", "<answer>2</answer>")) is None


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
        ("**1.** a\n**2.** b", 2),
        ("First a.\nThen b.\n\nSo c.", 3),
        ("We see 3 dots. So 3.5 is near.", 2),
        ("12 + 3 = 15", 1),
        ("<think>\none\n</think>", 1),
        ("", 0),
    ],
)
def test_count_steps(text, n):
    assert count_steps(text) == n


def test_check_command(folder):
    row = {"messages": [USER, ASSISTANT], "images": ["images/0.png"]}
    (folder / "images/1.png").write_bytes(b"broken")
    path = write(
        folder, row, row | {"images": ["images/1.png"]}, row | {"images": []}, "{", verl(), row
    )
    run = subprocess.run(
        [sys.executable, ROOT / "data.py", "check", path],
        capture_output=True,
        text=True,
        cwd=folder,
    )
    assert (
        run.returncode == 0
        and f"{path}: 3 of 6 rows usable" in run.stdout
        and "How many dots?" in run.stdout
    )
    assert (
        "  1 an image cannot be read" in run.stdout
        and f"left out: {path}:2: an image cannot" in run.stderr
    )
    with pytest.raises(SystemExit) as end:
        data.main(["check", str(write(folder, "{", name="bad.jsonl"))])
    assert end.value.code == 1


# ------------------------------------------------------------------------------------------------------ the real thing


@pytest.fixture(scope="module")
def real():
    """The real Qwen3-VL tokenizer, template and image settings; the architecture without weights."""
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
    return Encoder(tokenizer, images, hf.config, hf.model.get_rope_index)


def test_real_tokenizer(real):
    for case in json.loads((SHARED / "data/qwen3vl/tokenizer/golden.json").read_text()):
        assert real._ids(case["text"]) == case["ids"]
        assert real.decode(real.response(case["text"])) == real.tokenizer.decode(case["ids"])
    assert real.eos == 151645 and real.banned[:5] == (151643, 151652, 151653, 151655, 151656)
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
        assert prompt.ids.tolist() == joint_ids(
            real, turns, (prompt.grid_thw.prod(-1) // 4).tolist()
        )
        assert len(example.images) == 1 and "<image1>" not in turns[-1]["content"]
        if kind == "sft":
            seen, mask = real.conversation(example)
            response = example.messages[-1]["content"]
            assert seen.ids[mask].tolist() == real.tokenizer(response + "<|im_end|>")["input_ids"]
            assert split_spans(response)
