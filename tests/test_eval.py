"""Evaluation: metrics by hand, a real run on a tiny model, shares of ranks, the pass-rate filter."""

import importlib
import json
import math
from itertools import combinations, product
from types import SimpleNamespace

import pytest
from conftest import tiny_config
from PIL import Image

from data import read
from engine.arguments import parse
from engine.sampler import Rollout
from model import load
from tools.init import init

evaluation = importlib.import_module("eval")


def response(caption="- a cat\n- a mat", think="1. look\n2. count", answer="2"):
    return f"<caption>\n{caption}\n</caption>\n<think>\n{think}\n</think>\n<answer>\n{answer}\n</answer>"


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A checkpoint of random weights and a file of 5 rows: references in all but the last, a bad row in the middle."""
    folder = tmp_path_factory.mktemp("eval")
    Image.new("RGB", (16, 16), "red").save(folder / "a.png")
    rows = [{"image": "a.png", "question": f"how many {i}", "answer": str(i)} for i in range(5)]
    for i, row in enumerate(rows[:4]):
        row["teacher_response"] = response(answer=str(i))
    rows[2]["image"] = "lost.png"
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "config.json").write_text(json.dumps(tiny_config().to_dict()))
    init(folder / "config.json", folder / "model", [folder / "rows.jsonl"])
    return folder


def arguments(place, *more):
    line = [
        "--policy",
        place / "model",
        "--data",
        place / "rows.jsonl",
        "--device",
        "cpu",
        "--max_response",
        12,
    ]
    return parse(evaluation.Args, [str(x) for x in [*line, *more]])


# ----------------------------------------------------------------------------- metrics
def test_pass_at_k_is_the_share_of_draws_with_a_right_one():
    for right, k in product(range(6), range(1, 6)):
        draws = list(combinations([1] * right + [0] * (5 - right), k))
        assert evaluation.pass_at_k(5, right, k) == pytest.approx(sum(map(max, draws)) / len(draws))


def test_judge_and_summarise():
    example = SimpleNamespace(
        response=response(), answer="2", choices=(), equivalent=(), row=3, where="f:4"
    )
    texts = [
        response(),
        response("- one cat", "1. look", "3"),
        "2",
        response(caption="-  a cat -  a mat"),
    ]
    rollouts = [Rollout([1] * n, [0.0] * n, "length" if n == 9 else "end") for n in (3, 5, 9, 7)]
    right = evaluation.judge(example, rollouts, texts)
    bare = SimpleNamespace(response=None, answer="2", choices=(), equivalent=(), row=0, where="f:1")
    m = evaluation.summarise([right, evaluation.judge(bare, rollouts, texts)], [1, 4])
    assert (m["accuracy"], m["pass@1"], m["pass@4"], m["format"], m["truncated"]) == (
        0.5,
        0.5,
        1,
        0.75,
        0.25,
    )
    assert (m["length"], m["prompts"]) == (6, 2)
    assert m["items"] == pytest.approx((2 + 1 + 1) / 3)  # the malformed one has no caption
    assert m["steps"] == pytest.approx((2 + 1 + 2) / 3)
    assert (m["reference_items"], m["reference_steps"], m["same_caption"]) == (
        2,
        2,
        0.5,
    )  # only where there is one
    only_bare = evaluation.summarise([evaluation.judge(bare, rollouts[2:3], ["2"])])
    assert all(
        math.isnan(only_bare[k]) for k in ("items", "steps", "reference_items", "same_caption")
    )
    assert all(math.isnan(v) for k, v in evaluation.summarise([], [1]).items() if k != "prompts")


def test_table_is_aligned_and_without_empty_columns():
    first = {"data": "a", "accuracy": 0.5, "items": math.nan, "left_out": {}}
    second = {"data": "long name", "accuracy": 1, "pass@4": 0.25, "left_out": {}}
    lines = evaluation.table([first, second]).splitlines()
    assert [line.split() for line in lines[:2]] == [
        ["data", "accuracy", "pass@4"],
        ["a", "0.500", "nan"],
    ]
    assert len({len(line) for line in lines}) == 1


@pytest.mark.parametrize(
    "flags, says",
    [
        ("--no-greedy", "nothing to do"),
        ("--filter 0.1 0.9", "come together"),
        ("--filter 0.1 0.9 --filter_out x.jsonl", "needs --samples"),
        ("--filter 0.1 0.9 --filter_out x.parquet --samples 2", "neither"),
        ("--temperature 0", "above 0"),
    ],
)
def test_combinations_that_make_no_sense(flags, says, place, capsys):
    with pytest.raises(SystemExit):
        arguments(place, *flags.split())
    assert says in capsys.readouterr().err


# ----------------------------------------------------------------------------- runs
def test_run_writes_results_and_rollouts(place, tmp_path, capsys):
    out = ["--out", tmp_path / "new/r.json", "--rollouts_out", tmp_path / "r.jsonl"]
    results = evaluation.main(arguments(place, *out, "--samples", 2, "--pass_at", 1, 2, 4))
    assert [(r["mode"], r["prompts"], r["left_out"]) for r in results] == [
        ("greedy", 4, {"an image is missing": 1}),
        ("T=1", 4, {"an image is missing": 1}),
    ]
    greedy, sampled = results
    assert "pass@2" in sampled and "pass@4" not in sampled and "pass@1" not in greedy
    assert (
        0 < greedy["length"] <= 12
        and 0 <= greedy["truncated"] <= 1
        and greedy["reference_items"] == 2
    )
    written = json.loads((tmp_path / "new/r.json").read_text())
    assert written["results"][1]["length"] == sampled["length"] and {"commit", "args"} <= set(
        written
    )
    rollouts = [json.loads(line) for line in (tmp_path / "r.jsonl").read_text().splitlines()]
    assert [(r["mode"], r["row"], len(r["text"])) for r in rollouts] == [
        *[("greedy", i, 1) for i in (0, 1, 3, 4)],
        *[("T=1", i, 2) for i in (0, 1, 3, 4)],
    ]
    assert "left out 1 rows" in capsys.readouterr().out


def test_same_rollouts_on_any_number_of_ranks(place):
    args, policy = arguments(place, "--samples", 3), load(place / "model")
    path = args.data[0]

    def texts(rank, world):
        records, left_out = evaluation.evaluate(
            policy, path, args, SimpleNamespace(rank=rank, world=world)
        )
        return {(mode, r["row"]): r["text"] for mode in records for r in records[mode]}, left_out

    whole, left_out = texts(0, 1)
    parts = [texts(rank, 3) for rank in range(3)]
    assert len(whole) == 8 and sum(len(part) for part, _ in parts) == 8
    assert {k: v for part, _ in parts for k, v in part.items()} == whole
    assert [bool(bad) for _, bad in parts] == [False, False, True] and left_out == parts[2][1]
    assert texts(7, 8)[0] == {}  # a rank without rows


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_filter_keeps_rows_in_the_band(place, tmp_path, monkeypatch, suffix, capsys):
    source = place / "rows.jsonl"
    if suffix == "parquet":
        pa = pytest.importorskip("pyarrow")
        from pyarrow import parquet

        rows = [json.loads(line) for line in source.read_text().splitlines()]
        parquet.write_table(pa.Table.from_pylist(rows), source := place / "rows.parquet")

    def fake(hf, prompts, n, *_, eos, numbers, **__):
        """Row i gets i right answers out of 4."""
        return [
            [Rollout([number, k < number, eos[0]], [0.0] * 3, "end") for k in range(n)]
            for number in numbers
        ]

    monkeypatch.setattr(evaluation, "generate", fake)
    monkeypatch.setattr(
        "data.Encoder.decode", lambda self, ids: response(answer=str(ids[0] if ids[1] else "no"))
    )
    out = tmp_path / f"kept.{suffix}"
    flags = ["--no-greedy", "--samples", 4, "--filter", 0.25, 0.75, "--filter_out", out]
    (result,) = evaluation.main(arguments(place, *flags, "--data", source))
    assert result["accuracy"] == pytest.approx((0 + 1 + 3 + 4) / 16) and result["same_caption"] == 1
    kept = read(out, "eval", image_root=place)
    assert [kept[i].answer for i in range(len(kept))] == ["1", "3"]
    assert f"--image_root {place}" in capsys.readouterr().out


def test_published_benchmark_is_evaluated_and_filtered(place, tmp_path):
    """Parquet as on the hub: pictures as structs of bytes, options as a list in a string, `image_1` to `image_7`."""
    pa = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    picture = {"bytes": (place / "a.png").read_bytes(), "path": "a.png"}
    rows = [
        {
            "id": f"v_{i}",
            "question": "how many <image 1>",
            "options": "['0', '1']",
            "answer": "AB"[i % 2],
            **{f"image_{k}": picture if k == 1 else None for k in range(1, 8)},
        }
        for i in range(4)
    ]
    parquet.write_table(pa.Table.from_pylist(rows), path := tmp_path / "mmmu.parquet")
    flags = ["--samples", 2, "--filter", 0, 1, "--filter_out", tmp_path / "kept.parquet"]
    results = evaluation.main(arguments(place, *flags, "--data", path))
    assert [(r["mode"], r["prompts"], r["left_out"]) for r in results] == [
        ("greedy", 4, {}),
        ("T=1", 4, {}),
    ]
    kept = read(tmp_path / "kept.parquet", "rl")
    assert [(e.answer, e.choices, len(e.images)) for e in kept.fetch(range(4))] == [
        (x, ("0", "1"), 1) for x in "ABAB"
    ]
