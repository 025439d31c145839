"""What alignment gains at each level of a factor, against values worked out by hand."""

import json
import subprocess
import sys

import pytest
from conftest import ROOT

from tools import arms, factors


def write_level(folder, accuracies):
    """Seeds' folders with an eval.json for each arm. accuracies: {arm: one value per seed}."""
    seeds = []
    for seed in range(len(next(iter(accuracies.values())))):
        seeds.append(folder / str(seed))
        for arm, values in accuracies.items():
            results = []
            for mode in ("greedy", "T=1"):
                result = {"policy": f"out/{arm}", "data": f"d{seed}/test_hard.jsonl", "mode": mode}
                accuracy = values[seed] if mode == "greedy" else 0.5
                results.append({**result, "prompts": 10, "accuracy": accuracy})
            (seeds[-1] / arm).mkdir(parents=True)
            (seeds[-1] / arm / "eval.json").write_text(json.dumps({"results": results}))
    return [str(seed) for seed in seeds]


@pytest.fixture
def levels(tmp_path):
    own = {"sft-grpo": [0.5, 0.6], "align-grpo": [0.7, 0.9], "refs-grpo": [0.9, 0.9]}
    foreign = {"sft-grpo": [0.5], "align-grpo": [0.45], "refs-grpo": [0.4]}
    return {
        "own": write_level(tmp_path / "own", own),
        "foreign": write_level(tmp_path / "foreign", foreign),
    }


def run(*arguments):
    command = [sys.executable, str(ROOT / "tools/factors.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True)


def test_gains_are_paired_and_greedy(levels):
    found = factors.gains(factors.read_level(levels["own"]))["hard"]
    nothing, references = found["over no alignment"], found["over SFT on the references"]
    assert nothing.of_seeds == pytest.approx([20, 30])
    assert references.of_seeds == pytest.approx([-20, 0])
    assert nothing.mean == pytest.approx(25)
    # The standard deviation is 7.07, t with one degree of freedom 12.706.
    assert nothing.half == pytest.approx(12.706 * 7.0711 / 2**0.5, rel=1e-3)


def test_a_level_may_be_of_other_arms(tmp_path):
    """On other references the arm without any is the same; behind another beginning it is not."""
    accuracies = {
        **{"sft-grpo": [0.1], "align-grpo": [0.2], "refs-grpo": [0.4]},
        **{"align-50-grpo": [0.3], "refs-50-grpo": [0.8]},
        **{"half-grpo": [0.5], "half-align-grpo": [0.6], "half-refs-grpo": [0.9]},
    }
    folders = write_level(tmp_path, accuracies)
    levels = factors.levels_of([["all", *folders], ["few=50", *folders], ["h=half", *folders]])
    found = {}
    for level, gained in levels.items():
        found[level] = [gain.mean for gain in gained["hard"].values()]
    assert found == {
        "all": pytest.approx([10, -20]),
        "few": pytest.approx([20, -50]),
        "h": pytest.approx([10, -30]),
    }
    for word in ("", "50", "mixed", "half", "base"):
        assert set(factors.arms_of(word)) <= set(arms.ARMS)


def test_table_and_figure(levels, tmp_path):
    pytest.importorskip("matplotlib")
    out = tmp_path / "figures/f.svg"
    given = [part for name, seeds in levels.items() for part in ("--level", name, *seeds)]
    done = run(*given, "--out", str(out))
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0] == "| points gained by alignment, greedy | hard |"
    assert lines[2].startswith("| own, over no alignment (2 seeds) | +25.0 [-38.6, +88.6]")
    assert lines[-1] == "| foreign, over SFT on the references (1 seed) | +5.0 (one seed) |"
    text = out.read_text()
    assert ">own<" in text and ">foreign<" in text and ">over no alignment<" in text


def test_levels_are_evaluated_alike_and_arms_have_all_tests(levels, tmp_path):
    given = [["own", *levels["own"]], ["foreign", *levels["foreign"]]]
    file = tmp_path / "foreign/0/refs-grpo/eval.json"
    whole = file.read_text()
    content = json.loads(whole)
    content["results"].append(content["results"][0] | {"data": "d0/test_id.jsonl"})
    file.write_text(json.dumps(content))
    with pytest.raises(ValueError, match="there is no result of sft-grpo id greedy"):
        factors.levels_of(given)
    file.write_text(whole)
    for arm in (tmp_path / "foreign/0").iterdir():
        content = json.loads((arm / "eval.json").read_text())
        for result in content["results"]:
            result["prompts"] = 20
        (arm / "eval.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match="--level foreign was evaluated otherwise"):
        factors.levels_of(given)


def test_what_is_wrong_is_named(levels, tmp_path):
    own = levels["own"]
    for given, why in (
        ([["own"]], "name the seeds' folders"),
        ([["a", *own], ["a", *own]], "--level a is given twice"),
        ([["a", *own, own[0]]], "twice"),
        ([["=", *own]], "write NAME, or NAME=WORD"),
        ([["a=", *own]], "write NAME, or NAME=WORD"),
        ([["lr=5e-5", *own]], "no result of the arm align-5e-5-grpo"),
    ):
        with pytest.raises(ValueError, match=why):
            factors.levels_of(given)
    for file in (tmp_path / "foreign").rglob("eval.json"):
        content = json.loads(file.read_text())
        content["results"] = [r for r in content["results"] if r["mode"] != "greedy"]
        file.write_text(json.dumps(content))
    with pytest.raises(ValueError, match="no greedy result"):
        factors.read_level(levels["foreign"])
    (tmp_path / "own/1/refs-grpo/eval.json").unlink()
    done = run("--level", "a", *own)
    assert done.returncode == 1 and "refs-grpo" in done.stderr
    assert "Traceback" not in done.stderr
