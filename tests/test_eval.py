"""Evaluation: metrics by hand, runs on a tiny model, shares of ranks, the pass-rate filter."""

import importlib
import json
import math
import os
from itertools import combinations, product
from types import SimpleNamespace

import pytest
from conftest import tiny_config
from PIL import Image

from data import Example, read
from engine import evaluation, rollouts
from engine.arguments import parse
from engine.sampler import Rollout
from model import load
from rewards import measure
from tools.init import init

script = importlib.import_module("eval")


def response(caption="- a cat\n- a mat", think="1. look\n2. count", answer="2"):
    parts = {"caption": caption, "think": think, "answer": answer}
    return "\n".join(f"<{tag}>\n{text}\n</{tag}>" for tag, text in parts.items())


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """
    A checkpoint of random weights and a file of 5 rows, with references in all but the last and a
    bad row in the middle.
    """
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
    line = ["--policy", place / "model", "--data", place / "rows.jsonl"]
    line += ["--device", "cpu", "--max_response", 12]
    return parse(script.Args, [str(x) for x in [*line, *more]])


# ----------------------------------------------------------------------------- metrics
def test_pass_at_k_is_the_share_of_draws_with_a_right_one():
    for right, k in product(range(6), range(1, 6)):
        draws = list(combinations([1] * right + [0] * (5 - right), k))
        assert evaluation.pass_at_k(5, right, k) == pytest.approx(sum(map(max, draws)) / len(draws))


def an_example(response, row=0):
    return SimpleNamespace(
        response=response, answer="2", choices=(), equivalent=(), row=row, where=f"f:{row + 1}"
    )


def test_judge_and_summarise():
    texts = [
        response(),
        response("- one cat", "1. look", "3"),
        "2",
        response(caption="-  a cat -  a mat"),
    ]
    lengths_and_stops = [(3, "end"), (5, "end"), (9, "length"), (7, "end")]
    rollouts = [Rollout([1] * n, [0.0] * n, stop) for n, stop in lengths_and_stops]
    example = an_example(response(), row=3)
    with_reference = evaluation.record_of(example, rollouts, texts, measure)
    assert with_reference["accuracy"] == [1, 0, 0, 1]
    assert with_reference["items"] == [2, 1, None, 1]
    assert with_reference["same_caption"] == [True, False, False, True]
    assert with_reference["same_reasoning"] == [True, False, False, True]
    other_steps = [response(think="1. look")]
    record = evaluation.record_of(example, rollouts[:1], other_steps, measure)
    assert (record["same_caption"], record["same_reasoning"]) == ([True], [False])
    assert (with_reference["row"], with_reference["where"]) == (3, "f:4")

    without_reference = evaluation.record_of(an_example(None), rollouts, texts, measure)
    m = evaluation.summarise([with_reference, without_reference], [1, 4])
    assert (m["accuracy"], m["pass@1"], m["pass@4"]) == (0.5, 0.5, 1)
    assert (m["format"], m["truncated"]) == (0.75, 0.25)
    assert (m["length"], m["prompts"]) == (6, 2)
    assert m["items"] == pytest.approx((2 + 1 + 1) / 3)  # the malformed one has no caption
    assert m["steps"] == pytest.approx((2 + 1 + 2) / 3)
    worse = without_reference | {"accuracy": [1.0, 0.0, 0.0, 0.0]}
    assert evaluation.summarise([with_reference, worse], [1])["pass@1"] == 0.375
    # only where there is a reference
    assert (m["reference_items"], m["reference_steps"], m["same_caption"]) == (2, 2, 0.5)
    assert m["same_reasoning"] == 0.5


def test_a_mean_of_nothing_is_nan():
    rollouts = [Rollout([1], [0.0], "end")]
    malformed = evaluation.record_of(an_example(None), rollouts, ["2"], measure)
    summary = evaluation.summarise([malformed])
    for name in ("items", "steps", "reference_items", "same_caption", "same_reasoning"):
        assert math.isnan(summary[name])
    nothing = evaluation.summarise([], [1])
    assert nothing.pop("prompts") == 0
    assert all(math.isnan(value) for value in nothing.values())


def test_table_is_aligned_and_without_empty_columns():
    first = {"data": "a", "accuracy": 0.5, "items": math.nan, "left_out": {}}
    second = {"data": "long name", "accuracy": 1, "pass@4": 0.25, "left_out": {}}
    lines = script.table([first, second]).splitlines()
    assert lines[0].split() == ["data", "accuracy", "pass@4"]
    assert lines[1].split() == ["a", "0.500", "nan"]
    assert len({len(line) for line in lines}) == 1


@pytest.mark.parametrize(
    "flags, says",
    [
        ("--no-greedy", "nothing to do"),
        ("--filter 0.1 0.9", "come together"),
        ("--filter 0.1 0.9 --filter_out x.jsonl", "needs --samples"),
        ("--filter 0.1 0.9 --filter_out x.parquet --samples 2", "neither"),
        ("--filter 0.1 0.9 --filter_out x.jsonl --samples 2 --all_steps", "needs --samples"),
        ("--temperature 0", "above 0"),
        ("--max_pixels 0", "--max_pixels is 0: it must be 1 or more"),
        ("--filter 0.5 0.1 --filter_out x.jsonl --samples 2", "LOW at most HIGH"),
        ("--filter 20 80 --filter_out x.jsonl --samples 2", "HIGH at most 1"),
        ("--data rows.jsonl lost.jsonl", "--data lost.jsonl: no such file"),
        ("--image_root lost", "--image_root lost: no such folder"),
        ("--out .", "--out . is a folder"),
        ("--filter 0 1 --filter_out ./rows.jsonl --samples 2", "would overwrite"),
        ("--out r.json --rollouts_out r.json", "would overwrite"),
    ],
)
def test_combinations_that_make_no_sense(flags, says, place, capsys, monkeypatch):
    monkeypatch.chdir(place)
    with pytest.raises(SystemExit):
        arguments(place, *flags.split())
    assert says in capsys.readouterr().err


# ----------------------------------------------------------------------------- runs
def test_run_writes_results_and_rollouts(place, tmp_path, capsys):
    out = ["--out", tmp_path / "new/r.json", "--rollouts_out", tmp_path / "r.jsonl"]
    results = script.main(arguments(place, *out, "--samples", 2, "--pass_at", 1, 2, 4))
    missing = {"an image is missing": 1}
    assert [(r["mode"], r["prompts"], r["left_out"]) for r in results] == [
        ("greedy", 4, missing),
        ("T=1", 4, missing),
    ]
    greedy, sampled = results
    assert "pass@2" in sampled and "pass@4" not in sampled and "pass@1" not in greedy
    assert 0 < greedy["length"] <= 12
    assert 0 <= greedy["truncated"] <= 1
    assert greedy["reference_items"] == 2

    written = json.loads((tmp_path / "new/r.json").read_text())
    assert written["results"][1]["length"] == sampled["length"]
    assert {"commit", "args"} <= set(written)
    rollouts = [json.loads(line) for line in (tmp_path / "r.jsonl").read_text().splitlines()]
    assert [(r["mode"], r["row"], len(r["text"])) for r in rollouts] == [
        *[("greedy", row, 1) for row in (0, 1, 3, 4)],
        *[("T=1", row, 2) for row in (0, 1, 3, 4)],
    ]
    assert "left out 1 rows" in capsys.readouterr().out


def test_a_file_is_written_whole_or_not_at_all(tmp_path):
    """What cannot be encoded stands for a full disk: it fails when the file is open already."""
    out = tmp_path / "new/r.json"
    script.write_text(out, "first")
    with pytest.raises(UnicodeEncodeError):
        script.write_text(out, "second" * 10_000 + "\ud800")
    assert out.read_text() == "first"
    with pytest.raises(UnicodeEncodeError):
        script.write_text(out.with_name("other.json"), "\ud800")
    assert [path.name for path in out.parent.iterdir()] == ["r.json"]
    with out.open() as reader:  # who has opened it reads it to its end
        script.write_text(out, "third")
        assert reader.read() == "first"
    assert out.read_text() == "third"


def test_parquet_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    pq = pytest.importorskip("pyarrow.parquet")
    write_parquet(tmp_path / "rows.parquet", [{"a": 1}, {"a": 2}])
    kept = tmp_path / "kept.parquet"
    script.write_rows(tmp_path / "rows.parquet", [1], kept)
    before = kept.read_bytes()

    def fill_the_disk(table, path):
        path.write_text("half")
        raise OSError("No space left on device")

    monkeypatch.setattr(pq, "write_table", fill_the_disk)
    with pytest.raises(OSError, match="No space"):
        script.write_rows(tmp_path / "rows.parquet", [0], kept)
    assert kept.read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["kept.parquet", "rows.parquet"]


def test_a_link_or_a_pipe_stays_what_it_is(tmp_path):
    """--out /dev/stdout is no file to be put in another's place."""
    script.write_text(tmp_path / "r.json", "first")
    (tmp_path / "link.json").symlink_to("r.json")
    script.write_text(tmp_path / "link.json", "second")
    assert (tmp_path / "link.json").is_symlink()
    assert (tmp_path / "r.json").read_text() == "second"
    os.mkfifo(tmp_path / "pipe")
    reader = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    script.write_text(tmp_path / "pipe", "third")
    assert os.read(reader, 100) == b"third"
    os.close(reader)


def test_limits_are_kept_in_each_file(place, monkeypatch):
    opened = []

    def load_and_keep(*more, **options):
        opened.append(load(*more, **options))
        return opened[0]

    monkeypatch.setattr(script, "load", load_and_keep)
    last = (place / "rows.jsonl").read_text().splitlines()[-1]
    (place / "last.jsonl").write_text(last)
    limits = ["--max_prompt", 99, "--max_pixels", 512, "--max_side", 24, "--limit", 2]
    files = ["--data", place / "rows.jsonl", place / "last.jsonl"]
    results = script.main(arguments(place, *limits, *files))
    encoder = opened[0].encoder
    assert encoder.max_prompt_tokens == 99
    assert encoder.images.limits["longest_edge"] == 512
    assert encoder.max_side == 24
    assert [result["prompts"] for result in results] == [2, 1]


def test_responses_are_shown(place, tmp_path, capsys):
    out = tmp_path / "r.jsonl"
    script.main(arguments(place, "--limit", 4, "--show", 1, "--rollouts_out", out))
    printed = capsys.readouterr().out
    records = [json.loads(line) for line in out.read_text().splitlines()]
    for record in records[:1]:
        gold = f"right is {read(place / 'rows.jsonl', 'eval')[record['row']].answer!r}"
        block = printed.split(f", greedy, {record['where']}\n")[1].split("\n---\n")[0]
        assert gold in block and block.endswith(record["text"][0])
    assert len(records) > 1 and records[1]["where"] not in printed
    script.main(arguments(place, "--limit", 4))
    assert "right is" not in capsys.readouterr().out


def test_same_rollouts_on_any_number_of_ranks(place):
    args = arguments(place)
    policy = load(place / "model")
    modes = (evaluation.GREEDY, evaluation.Mode("T=1", 3, 1.0))

    def texts(rank, world):
        """{(mode, row): texts} of one rank's part of the file, and what it left out."""
        data = read(args.data[0], "eval")
        ranks = SimpleNamespace(rank=rank, world=world)
        records = evaluation.evaluate(policy.hf, policy.encoder, data, measure, args, ranks, modes)
        found = {}
        for mode in records:
            for record in records[mode]:
                found[mode, record["row"]] = record["text"]
        return found, evaluation.left_out_of(data)

    whole, left_out = texts(0, 1)
    parts = [texts(rank, 3) for rank in range(3)]
    assert len(whole) == 8
    assert sum(len(part) for part, _ in parts) == 8
    assert {key: text for part, _ in parts for key, text in part.items()} == whole
    assert [bool(bad) for _, bad in parts] == [False, False, True]
    assert left_out == parts[2][1]
    assert texts(7, 8)[0] == {}  # a rank without rows


def test_samples_are_nearly_greedy_where_it_is_cold(place, tmp_path):
    """The rows lie elsewhere than the images."""
    (tmp_path / "rows.jsonl").write_text((place / "rows.jsonl").read_text())
    flags = ["--data", tmp_path / "rows.jsonl", "--image_root", place, "--limit", 1]
    flags += ["--samples", 2, "--temperature", 1e-4, "--rollouts_out", tmp_path / "r.jsonl"]
    script.main(arguments(place, *flags))
    greedy, cold = [json.loads(line) for line in (tmp_path / "r.jsonl").read_text().splitlines()]
    assert cold["text"] == greedy["text"] * 2


@pytest.mark.parametrize(
    "file, every, due", [("f", 3, [0, 3, 6, 7]), ("f", 0, [0, 7]), ("", 3, [])]
)
def test_when_validation_is_due(file, every, due):
    args = SimpleNamespace(eval_data=file, eval_every=every)
    assert [step for step in range(8) if evaluation.validation_is_due(args, step, 7)] == due


def test_rows_are_dealt_out():
    data = range(10)
    shares = [[*evaluation.own_rows(data, 5, SimpleNamespace(rank=r, world=2))] for r in (0, 1)]
    assert shares == [[0, 2, 4], [1, 3]]


@pytest.mark.parametrize("by", ["evaluation", "training"])
def test_what_the_sampler_is_told(monkeypatch, by):
    """Ids that end a rollout, ids that are banned, and the names of the prompts."""
    told = {}

    def generate(hf, prompts, rows, max_tokens, **options):
        on_end = options.pop("on_end", None)
        told.update(options, max_tokens=max_tokens)
        found = [Rollout([5], [0.0], "length") for _ in rows]
        if on_end:
            for row, rollout in enumerate(found):
                on_end(row, rollout)
        return found

    encoder = SimpleNamespace(eos_ids=(1, 7), banned=(3, 4), decode=str)
    args = SimpleNamespace(seed=6, group_size=2, temperature=0.7, max_response=9, slots=3)
    args.pack_tokens = 50
    args.workers = 0
    prompts = [SimpleNamespace(example=Example([], [], row=row)) for row in (4, 2)]
    if by == "evaluation":
        monkeypatch.setattr(evaluation, "generate", generate)
        mode = evaluation.Mode("samples", 2, 0.7)
        evaluation.sample_and_measure(
            None, encoder, prompts, lambda *_: {"right": 1}, args, mode, slots=3
        )
        seeds = [(6, 4), (6, 2)]  # the run's, the row
    else:
        monkeypatch.setattr(rollouts, "generate", generate)
        groups = [rollouts.Group(prompt) for prompt in prompts]
        rollouts.sample_groups(None, encoder, groups, lambda *_: {"right": 1}, args, (6, 8))
        seeds = [(6, 8, 0), (6, 8, 1)]
    limits = dict(max_tokens=9, temperature=0.7, slots=3, pack_tokens=50)
    assert told == limits | dict(eos=(1, 7), banned=(3, 4), seeds=seeds)


def test_a_stage_can_evaluate_with_its_own_arguments(place):
    """Of the arguments only those are read that every stage has; greedy decoding by default."""
    args = SimpleNamespace(seed=0, max_response=12, pack_tokens=1024)
    policy = load(place / "model")
    data = read(place / "rows.jsonl", "eval")
    ranks = SimpleNamespace(rank=0, world=1)
    records = evaluation.evaluate(policy.hf, policy.encoder, data, measure, args, ranks, limit=2)
    assert [record["row"] for record in records["greedy"]] == [0, 1]
    assert evaluation.summarise(records["greedy"])["prompts"] == 2


def write_parquet(path, rows):
    pa = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    parquet.write_table(pa.Table.from_pylist(rows), path)
    return path


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_filter_keeps_rows_in_the_band(place, tmp_path, monkeypatch, suffix, capsys):
    source = place / "rows.jsonl"
    if suffix == "parquet":
        rows = [json.loads(line) for line in source.read_text().splitlines()]
        source = write_parquet(place / "rows.parquet", rows)

    def fake(hf, prompts, rows, max_tokens, *, eos, seeds, **_):
        """Row i of the file gets i right answers out of 4."""
        rollouts = []
        for p, k in rows:
            _, row = seeds[p]
            rollouts.append(Rollout([row, k < row, eos[0]], [0.0] * 3, "end"))
        return rollouts

    def decode(self, ids):
        row, right, _ = ids
        return response(answer=str(row if right else "no"))

    monkeypatch.setattr(evaluation, "generate", fake)
    monkeypatch.setattr("data.Encoder.decode", decode)
    out = tmp_path / f"kept.{suffix}"
    flags = ["--no-greedy", "--samples", 4, "--filter", 0.25, 0.75, "--filter_out", out]
    (result,) = script.main(arguments(place, *flags, "--data", source))
    assert result["accuracy"] == pytest.approx((0 + 1 + 3 + 4) / 16)
    assert result["same_caption"] == 1
    kept = read(out, "eval", image_root=place)
    assert [kept[i].answer for i in range(len(kept))] == ["1", "3"]
    assert f"--image_root {place}" in capsys.readouterr().out


def test_published_benchmark_is_evaluated_and_filtered(place, tmp_path):
    """
    Parquet as on the hub: pictures as structs of bytes, options as a list in a string, `image_1` to
    `image_7`.
    """
    picture = {"bytes": (place / "a.png").read_bytes(), "path": "a.png"}
    rows = []
    for i in range(4):
        row = {"id": f"v_{i}", "question": "how many <image 1>", "options": "['0', '1']"}
        row["answer"] = "AB"[i % 2]
        row["image_1"] = picture
        for k in range(2, 8):
            row[f"image_{k}"] = None
        rows.append(row)
    path = write_parquet(tmp_path / "mmmu.parquet", rows)
    flags = ["--samples", 2, "--filter", 0, 1, "--filter_out", tmp_path / "kept.parquet"]
    results = script.main(arguments(place, *flags, "--data", path))
    assert [(r["mode"], r["prompts"], r["left_out"]) for r in results] == [
        ("greedy", 4, {}),
        ("T=1", 4, {}),
    ]
    kept = read(tmp_path / "kept.parquet", "rl")
    found = [(e.answer, e.choices, len(e.images)) for e in kept.fetch(range(4))]
    assert found == [(answer, ("0", "1"), 1) for answer in "ABAB"]
