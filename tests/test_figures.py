"""The figures of the comparison: what is drawn, against values worked out by hand; the files; and
what is said of runs that do not fit together."""

import json
import math
import shutil
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

from tools import compare, figures

ARMS = [arm for arm in compare.ARMS if arm not in ("base", "sft-grpo-tokens")]

needs_matplotlib = pytest.mark.skipif(
    figures.matplotlib is None, reason="the extra `plot` (matplotlib) is not installed"
)
T_OF_TWO = 12.71  # Student's t with one degree of freedom
RLVR = {"algo": "grpo", "prompts_per_step": 2, "group_size": 4}  # 8 rollouts per update
ALIGN = {"disc": "moe", "prompts_per_step": 3, "group_size": 4}  # 12


def write_log(seed, arm, began_with, args, updates):
    """An arm's log.jsonl: its arguments, then an update per record."""
    folder = seed / arm
    folder.mkdir(parents=True, exist_ok=True)
    lines = [{"args": {"policy": f"out/{seed.name}/{began_with}", **args}}]
    for step, metrics in enumerate(updates, 1):
        lines.append({"step": step, **metrics})
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (folder / "log.jsonl").write_text(text)


def write_results(seed, arm, accuracy, items=3.0, modes=("greedy", "T=1")):
    """An arm's eval.json, on two tests; in the sampled mode accuracy and items are halved."""
    results = []
    for test in ("id", "hard"):
        for mode in modes:
            share = 1 if mode == "greedy" else 0.5
            written = {"items": share * items, "reference_items": 6.0}
            written |= {"steps": 2.0, "reference_steps": 4.0}
            what = {"policy": f"out/{seed.name}/{arm}", "data": f"data/test_{test}.jsonl"}
            measured = {"mode": mode, "prompts": 9, "accuracy": share * accuracy}
            results.append({**what, **measured, **written})
    (seed / arm).mkdir(parents=True, exist_ok=True)
    (seed / arm / "eval.json").write_text(json.dumps({"args": {"limit": 9}, "results": results}))


def write_seed(seed, shift=0.0):
    """All arms that the figures need, two or four updates each."""

    def grpo(lengths):
        return [{"accuracy": 0.2 + shift, "length": n, "sampled": 2} for n in lengths]

    def game(margin):
        spans = {"perception/margin": margin, "perception/acc": 0.5 + shift}
        spans |= {"reasoning/margin": 1.0, "reasoning/acc": 1.0}
        return [{"length": 5, "accuracy": 0.9, **spans}, {"length": 10, "accuracy": 0.9, **spans}]

    sft = {"epochs": 1.0}
    write_log(seed, "sft", "base", sft, [{"loss": 1.0}])
    write_log(seed, "sft-grpo", "sft", RLVR, grpo([10, 20, 30, 40]))
    write_log(seed, "align", "sft", ALIGN, game(2 + 10 * shift))
    (seed / "align.jsonl").write_text("{}\n" * 20)  # of which 2 rows are held out
    warmup = {"pairs": "", "spans": "both", "warmup_pairs": 16, "data": f"{seed}/align.jsonl"}
    write_log(seed / "align", "warmup", "sft", ALIGN | warmup, [{"loss": 1.0}] * 3)
    write_log(seed, "align-grpo", "align", RLVR, grpo([10, 10]))
    write_log(seed, "refs", "sft/last", sft, [{"loss": 1.0}, {"loss": 0.5}])
    write_log(seed, "refs-grpo", "refs", RLVR, grpo([10, 10]))
    write_log(seed, "refs-align", "refs", ALIGN, game(2))
    write_log(seed, "refs-align-grpo", "refs-align", RLVR, grpo([10, 10]))
    for arm in ARMS:
        write_results(seed, arm, 0.5 + shift, items=3 + 10 * shift)


@pytest.fixture
def seeds(tmp_path):
    """Two seeds' folders, in which accuracies differ by 0.2, items and margins by 2."""
    folders = [tmp_path / "tiny-0", tmp_path / "tiny-1"]
    write_seed(folders[0])
    write_seed(folders[1], shift=0.2)
    return folders


# ----------------------------------------------------------------------------- in numbers
def test_accuracy_is_a_mean_with_its_interval(seeds):
    panels, left_out = figures.accuracies(figures.comparison_of(seeds))
    assert left_out == []
    assert list(panels) == ["id", "hard"]
    assert list(panels["id"]) == ARMS  # the order of runs/miniature.sh
    found = panels["hard"]["align"]
    assert found.of_seeds == pytest.approx([50, 70])  # greedy, in %
    # 50 and 70: their deviation is 14.14, that of the mean 10.
    assert (found.mean, found.half) == pytest.approx((60, 10 * T_OF_TWO))


def test_one_seed_has_no_interval(seeds):
    comparison = figures.comparison_of(seeds[:1])
    assert figures.accuracies(comparison)[0]["id"]["sft"].half is None
    curve = figures.training_curves(comparison)[0]["updates"]["sft-grpo"]
    assert curve.low == curve.high == []
    assert figures.reward_gaps(comparison)[0]["margin"]["perception"].low == []


def test_drift_is_a_multiple_of_the_references_sampled(seeds, monkeypatch):
    """Sampled items are 1.5 and 2.5 of 6, steps 2 of 4; without a sampled mode the greedy ones."""
    comparison = figures.comparison_of(seeds, ["sft", "align"])
    panels, left_out = figures.drift(comparison)
    assert left_out == []
    assert panels["items"]["align"].of_seeds == pytest.approx([1.5 / 6, 2.5 / 6])
    assert panels["items"]["align"].half == pytest.approx(T_OF_TWO / 12)
    assert panels["steps"]["sft"].mean == 0.5 and panels["steps"]["sft"].half == 0
    for seed in seeds:
        for arm in comparison.arms:
            write_results(seed, arm, 0.5, items=3.0, modes=("greedy",))
    comparison = figures.comparison_of(seeds, ["sft", "align"])
    assert figures.drift_mode(comparison) == "greedy"
    assert figures.drift(comparison)[0]["items"]["sft"].mean == 0.5
    monkeypatch.setattr(figures, "DRIFT_TEST", "ood")  # on which nothing was evaluated
    assert figures.drift(comparison) == ({}, [])


def test_gap_is_that_of_the_alignment(seeds):
    panels, _ = figures.reward_gaps(figures.comparison_of(seeds))
    curve = panels["margin"]["perception"]
    assert curve.x == [1, 2]
    assert curve.mean == [3, 3]  # of 2 and 4
    assert curve.high == pytest.approx([3 + T_OF_TWO] * 2, rel=1e-3)
    assert panels["acc"]["perception"].mean == pytest.approx([0.6, 0.6])
    assert panels["acc"]["reasoning"].low == [1, 1]


def test_a_gap_that_was_not_measured_is_none(seeds):
    """null in the log, of one seed and of both."""
    for seed, margins in zip(seeds, ([None, None, 2], [4, None, 4]), strict=True):
        updates = [{"perception/acc": 1.0, "perception/margin": margin} for margin in margins]
        write_log(seed, "align", "sft", ALIGN, updates)
    panels, _ = figures.reward_gaps(figures.comparison_of(seeds))
    curve = panels["margin"]["perception"]
    assert curve.mean[0] == 4 and math.isnan(curve.low[0])
    assert math.isnan(curve.mean[1]) and math.isnan(curve.high[1])
    assert curve.mean[2] == 3 and curve.low[2] == pytest.approx(3 - T_OF_TWO, rel=1e-3)


def test_updates_and_tokens_count_all_stages_since_sft(seeds):
    """Alignment: 12 rollouts of 5, then of 10 tokens, 180 in all; 3 updates of warm-up before it,
    with 2 rows of 4 rollouts, and 2 rows held out, all as long as its first ones: 160. GRPO: 8
    rollouts per update. SFT on references: updates, but no tokens."""
    training = {arm: figures.training_of(seeds[0], arm) for arm in ARMS if "grpo" in arm}
    assert training["sft-grpo"].updates == [1, 2, 3, 4]
    assert training["sft-grpo"].tokens == [80, 240, 480, 800]
    assert training["align-grpo"].updates == [3, 4]
    assert training["align-grpo"].tokens == [160 + 180 + 80, 160 + 180 + 160]
    assert training["refs-grpo"].updates == [3, 4]
    assert training["refs-grpo"].tokens == [80, 160]
    assert training["refs-align-grpo"].updates == [5, 6]
    assert training["refs-align-grpo"].tokens == [180 + 80, 180 + 160]


def test_groups_that_were_drawn_count_not_those_trained_on(seeds):
    """DAPO: 5 groups of 4 drawn; none, where the update lived on the last one's surplus."""
    updates = [
        {"accuracy": 0.5, "length": 10, "sampled": 5},
        {"accuracy": 0.5, "length": 10, "sampled": 0},
    ]
    write_log(seeds[0], "sft-grpo", "sft", RLVR, updates)
    assert figures.training_of(seeds[0], "sft-grpo").tokens == [200, 200]


def test_training_accuracy_over_seeds_leaves_alignment_out(seeds):
    panels, left_out = figures.training_curves(figures.comparison_of(seeds))
    assert left_out == []
    assert list(panels["updates"]) == ["sft-grpo", "align-grpo", "refs-grpo", "refs-align-grpo"]
    curve = panels["tokens"]["align-grpo"]
    assert curve.x == [420, 500]
    assert curve.mean == pytest.approx([30, 30])  # GRPO's 20 and 40 %, not alignment's 90
    assert curve.low == pytest.approx([30 - 10 * T_OF_TWO] * 2)


def test_tokens_of_seeds_are_averaged(seeds):
    updates = [{"accuracy": 0.5, "length": n, "sampled": 2} for n in (30, 40, 50, 60)]
    write_log(seeds[1], "sft-grpo", "sft", RLVR, updates)
    panels, _ = figures.training_curves(figures.comparison_of(seeds))
    curve = panels["tokens"]["sft-grpo"]
    # 80 and 240, 240 and 560, 480 and 960, 800 and 1440
    assert curve.x == [160, 400, 720, 1120]


def test_a_curve_goes_as_far_as_all_seeds(seeds):
    """sft-grpo-tokens has as many updates as the tokens allow, in each seed another number."""
    for seed, count in zip(seeds, (5, 7), strict=True):
        updates = [{"accuracy": 0.5, "length": 10, "sampled": 2}] * count
        write_log(seed, "sft-grpo-tokens", "sft", RLVR, updates)
        write_results(seed, "sft-grpo-tokens", 0.5)
    panels, _ = figures.training_curves(figures.comparison_of(seeds))
    assert panels["updates"]["sft-grpo-tokens"].x == [1, 2, 3, 4, 5]


def test_arms_without_sft_are_not_counted_from_it(seeds):
    """They are named, and in the other figures."""
    for seed in seeds:
        write_log(seed, "base-grpo", "x", RLVR, [{"accuracy": 0.5, "length": 10}])
        log = seed / "base-grpo/log.jsonl"
        log.write_text(log.read_text().replace(f"out/{seed.name}/x", "ckpt/base-tiny"))
        write_results(seed, "base-grpo", 0.5)
    comparison = figures.comparison_of(seeds)
    assert figures.arms_of_rlvr(comparison)[1] == ["base-grpo"]
    panels, left_out = figures.training_curves(comparison)
    assert "base-grpo" not in panels["tokens"]
    assert left_out == ["base-grpo, which did not begin with sft"]
    assert "base-grpo" in figures.accuracies(comparison)[0]["id"]


def test_labels_break_before_an_arrow():
    assert figures.label_of("refs-align-grpo") == "SFT → SFT on references\n→ alignment → GRPO"


def test_smoothing_is_over_ten_updates():
    values = figures.smoothed(list(range(12)))
    assert values[:2] == [0, 0.5]
    assert values[9:] == [4.5, 5.5, 6.5]


def test_long_curves_are_thinned_to_their_end():
    count = 3 * figures.POINTS - 1
    updates = list(range(1, count + 1))
    training = figures.Training(updates, updates, updates)
    curve = figures.curve_of_seeds([training], "updates")
    assert len(curve.x) == figures.POINTS
    assert curve.x[-2:] == [count - 3, count]


def put_null(seed, arm, test, mode, metric):
    """Write null for a metric of an arm, as eval.py does where there was nothing to measure."""
    path = seed / arm / "eval.json"
    content = json.loads(path.read_text())
    for result in content["results"]:
        if result["mode"] == mode and result["data"].endswith(f"{test}.jsonl"):
            result[metric] = None
    path.write_text(json.dumps(content))


def test_a_number_that_no_figure_draws_may_be_null(seeds):
    """Not the items on a test that drift is not of, nor the sampled accuracy."""
    put_null(seeds[1], "align", "id", "T=1", "items")
    put_null(seeds[1], "align", "hard", "greedy", "items")
    put_null(seeds[1], "align", "hard", "T=1", "accuracy")
    comparison = figures.comparison_of(seeds)
    for drawing in figures.DRAWINGS:
        panels, left_out = drawing.compute(comparison)
        assert panels and left_out == [], drawing.name
    assert "align" in figures.drift(comparison)[0]["items"]


def test_an_arm_without_a_number_is_left_out_of_that_figure(seeds):
    """And named; the other arms, and the other figures, are drawn."""
    put_null(seeds[1], "align", "hard", "greedy", "accuracy")
    put_null(seeds[0], "refs", "hard", "T=1", "reference_items")
    log = seeds[1] / "sft-grpo/log.jsonl"
    log.write_text(log.read_text().replace('"accuracy": 0.4', '"accuracy": null', 1))
    comparison = figures.comparison_of(seeds)
    panels, (line,) = figures.accuracies(comparison)
    assert "align" in panels["id"] and "align" not in panels["hard"]
    assert line.startswith(f"align on hard: {seeds[1]}/align/eval.json: align hard greedy: accurac")
    panels, (line,) = figures.drift(comparison)
    assert list(panels["items"]) == [arm for arm in ARMS if arm != "refs"]
    assert list(panels["steps"]) == ARMS
    assert line.startswith(f"items of refs: {seeds[0]}/refs/eval.json: ")
    panels, (line,) = figures.training_curves(comparison)
    assert list(panels["tokens"]) == ["align-grpo", "refs-grpo", "refs-align-grpo"]
    assert line.startswith(f"sft-grpo: {seeds[1]}/sft-grpo/log.jsonl, step 1: accuracy is null")


def test_references_that_wrote_nothing_have_no_multiple(seeds):
    """Of no arm there is a number: there is no figure."""
    write_results(seeds[0], "sft", 0.5)
    path = seeds[0] / "sft/eval.json"
    path.write_text(path.read_text().replace('_items": 6.0', '_items": 0.0'))
    panels, left_out = figures.drift(figures.comparison_of(seeds[:1], ["sft"]))
    assert list(panels["steps"]) == ["sft"] and panels["items"] == {}
    assert "reference_items is 0" in left_out[0]
    path.write_text(path.read_text().replace('_steps": 4.0', '_steps": null'))
    panels, left_out = figures.drift(figures.comparison_of(seeds[:1], ["sft"]))
    assert panels == {} and len(left_out) == 2


# ----------------------------------------------------------------------------- the files
def run(monkeypatch, *arguments):
    """The command, in this process."""
    monkeypatch.setattr(sys, "argv", ["figures.py", *map(str, arguments)])
    figures.main()


@needs_matplotlib
def test_files_are_drawn_twice_alike(seeds, tmp_path, monkeypatch):
    """The second time with other settings of matplotlib, as another machine's matplotlibrc."""
    (tmp_path / "tiny-0.log").write_text("the run's output")  # out/tiny-* names it too
    first = tmp_path / "first"
    run(monkeypatch, *sorted(tmp_path.glob("tiny-*")), "--out", first)
    figures.run_of.cache_clear()
    with figures.matplotlib.rc_context({"lines.linewidth": 7, "svg.hashsalt": None}):
        run(monkeypatch, *seeds, "--out", tmp_path / "second")
    names = ["accuracy.svg", "drift.svg", "gap.svg", "tokens.svg"]
    assert sorted(path.name for path in first.iterdir()) == names
    for path in first.iterdir():
        assert path.read_bytes() == (tmp_path / "second" / path.name).read_bytes(), path
        assert path.stat().st_size < 60_000
        drawn = "".join(ElementTree.parse(path).getroot().itertext())
        assert "mean of 2 seeds with its 95 % interval" in drawn  # text is text
    assert "SFT → alignment → GRPO" in (first / "tokens.svg").read_text()
    assert "as many as the references" in (first / "drift.svg").read_text()


@needs_matplotlib
def test_what_cannot_be_drawn_is_named(tmp_path, capsys):
    """Arms without an alignment, without GRPO; a run that has not ended; a run without a log; an
    arm without a number. The figures of an earlier state are gone."""
    seed = tmp_path / "tiny-0"
    write_results(seed, "sft", 0.5)
    write_results(seed, "teacher", 0.9)
    write_results(seed, "aside", 0.9)
    for mode in ("greedy", "T=1"):
        put_null(seed, "aside", "hard", mode, "items")
        put_null(seed, "aside", "hard", mode, "steps")
    write_log(seed, "align", "sft", ALIGN, [])
    (tmp_path / "out").mkdir()
    for name in ("accuracy", "gap"):  # of an earlier state
        (tmp_path / f"out/{name}.svg").write_text("old")
    figures.draw_all(figures.comparison_of([seed]), tmp_path / "out")
    said = capsys.readouterr().out
    assert f"drift.svg: without steps of aside: {seed}/aside/eval.json" in said
    drawn = (tmp_path / "out/drift.svg").read_text()
    assert "teacher" in drawn and "aside" not in drawn
    assert "aside" in (tmp_path / "out/accuracy.svg").read_text()
    assert "gap.svg: not drawn, there is no arm align" in said
    assert "tokens.svg: not drawn, there is no arm that goes from SFT to RLVR" in said
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "accuracy.svg",
        "drift.svg",
    ]
    assert figures.unfinished([seed]) == [seed / "align"]


@needs_matplotlib
def test_runs_that_do_not_fit_leave_the_earlier_figures(seeds, tmp_path, monkeypatch):
    """All four: none is drawn, and none removed."""
    (tmp_path / "gap.svg").write_text("old")
    write_log(seeds[0], "align-grpo", "refs-align", RLVR, [{"accuracy": 0.5, "length": 5}])
    with pytest.raises(SystemExit, match="figures.py: .* updates behind SFT"):
        run(monkeypatch, *seeds, "--out", tmp_path)
    assert [path.name for path in tmp_path.glob("*.svg")] == ["gap.svg"]


def test_without_matplotlib_the_extra_is_named(monkeypatch):
    monkeypatch.setattr(figures, "matplotlib", None)
    monkeypatch.setattr(sys, "argv", ["figures.py", "nowhere", "--out", "nowhere"])
    with pytest.raises(SystemExit, match="pip install matplotlib.* extra `plot`"):
        figures.main()


# ----------------------------------------------------------------------------- what does not fit
def test_an_arm_that_only_some_seeds_have(seeds):
    """Named, whichever seed has it; --arms leaves it out, or asks for what is not there."""
    shutil.rmtree(seeds[1] / "refs-grpo")
    for order in (seeds, seeds[::-1]):
        with pytest.raises(ValueError, match="tiny-1: .* no result of the arm refs-grpo; --arms"):
            figures.comparison_of(order)
    comparison = figures.comparison_of(seeds, ["align", "sft"])
    assert comparison.arms == ["sft", "align"]
    assert list(figures.accuracies(comparison)[0]["id"]) == ["sft", "align"]
    with pytest.raises(
        ValueError, match="tiny-0: there is no result of the arm nobody; .* have: sft "
    ):
        figures.comparison_of(seeds, ["nobody"])


def test_a_left_out_arm_may_be_of_another_evaluation(seeds):
    path = seeds[0] / "refs/eval.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"args": {"limit": 5}}))
    with pytest.raises(ValueError, match="--limit"):
        figures.comparison_of(seeds)
    figures.comparison_of(seeds, ["sft"])


def test_seeds_are_folders_and_count_once(seeds, tmp_path):
    with pytest.raises(ValueError, match="given twice"):
        figures.comparison_of([seeds[0], Path(f"{seeds[0]}/../tiny-0")])
    (tmp_path / "eval.json").write_text("{}")
    with pytest.raises(ValueError, match="eval.json: not a folder"):
        figures.comparison_of([tmp_path / "eval.json"])
    with pytest.raises(ValueError, match="no seed is named"):
        figures.comparison_of(["tiny-0.log"])


def test_a_chain_must_be_there(seeds):
    """Drawn or not: align-grpo begins where align's log says."""
    comparison = figures.comparison_of(seeds, ["align-grpo"])
    shutil.rmtree(seeds[0] / "align")
    with pytest.raises(ValueError, match="tiny-0/align-grpo began with out/tiny-0/align, of which"):
        figures.training_curves(comparison)


def test_seeds_must_begin_alike(seeds):
    updates = [{"accuracy": 0.5, "length": 5}]  # one of alignment, two in the other seed
    write_log(seeds[1], "align", "sft", ALIGN, updates)
    with pytest.raises(ValueError, match="tiny-1/align-grpo begins 1 updates behind SFT, in .* 2"):
        figures.training_curves(figures.comparison_of(seeds, ["align-grpo"]))


def test_a_log_must_be_whole(seeds):
    path = seeds[1] / "sft-grpo/log.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    comparison = figures.comparison_of(seeds, ["sft-grpo"])

    def expect(text, message):
        path.write_text(text)
        figures.run_of.cache_clear()
        with pytest.raises(ValueError, match=message):
            figures.training_curves(comparison)

    expect("".join(lines[:2] + lines[3:]), "sft-grpo/log.jsonl: the updates in it are not 1, 2, 3")
    expect("".join(lines).replace('"length": 20, ', ""), "log.jsonl, step 2: there is no length")
    expect("".join(lines).replace('"policy"', '"start"'), "log.jsonl: its arguments have no policy")
    expect("".join(lines[1:]), "no line of it has the run's arguments")
    path.unlink()
    figures.run_of.cache_clear()
    with pytest.raises(ValueError, match="tiny-1/sft-grpo: no log.jsonl there"):
        figures.training_curves(comparison)
