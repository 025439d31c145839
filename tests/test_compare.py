"""Arms compared over seeds: means, paired differences and both intervals, against values worked out
by hand and by another way."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

from tools import compare

# accuracy of two arms on one test, for four seeds
OURS = [0.80, 0.84, 0.82, 0.90]
THEIRS = [0.70, 0.78, 0.80, 0.84]


def write_seeds(folder, arms, metric="accuracy"):
    """eval.py's files of as many seeds as the arms {name: values} have -> their paths."""
    paths = []
    for seed in range(len(next(iter(arms.values())))):
        results = []
        for arm, values in arms.items():
            what = {"policy": f"out/world-{seed}/{arm}", "data": "x/test_hard.jsonl"}
            results.append({**what, "mode": "greedy", "prompts": 10, metric: values[seed]})
        paths.append(folder / f"{seed}.json")
        paths[-1].write_text(json.dumps({"results": results}))
    return [str(path) for path in paths]


def run(*arguments):
    command = [sys.executable, str(ROOT / "tools/compare.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True)


def test_tables_of_four_seeds(tmp_path):
    files = write_seeds(tmp_path, {"align-grpo": OURS, "sft-grpo": THEIRS})
    done = run(*files)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0] == "accuracy, %, 4 seeds"
    # The mean of OURS is 84.0, its standard deviation 4.32; t with 3 degrees is 3.182.
    assert "| align-grpo | 84.0 ± 6.9 |" in lines
    # Differences 10, 6, 2, 6: mean 6, standard deviation 3.266, half 3.182 * 3.266 / 2 = 5.196.
    (line,) = [line for line in lines if line.startswith("| align-grpo − sft-grpo")]
    assert "+6.0 [+0.8, +11.2]" in line and line.endswith("* |")


def test_a_difference_whose_interval_holds_0_is_not_marked(tmp_path):
    files = write_seeds(tmp_path, {"align-grpo": OURS, "sft-grpo": [0.70, 0.90, 0.80, 0.84]})
    (line,) = [line for line in run(*files).stdout.splitlines() if " − " in line]
    assert "*" not in line


def test_bootstrap_is_that_of_all_resamples():
    """Of three seeds there are 27 resamples: the percentiles of the drawn means are among theirs,
    where 2.5 % of them lie."""
    differences = [0.0, 3.0, 9.0]
    means = sorted((a + b + c) / 3 for a in differences for b in differences for c in differences)
    low, high = compare.bootstrap(differences)
    assert low == pytest.approx(means[0])  # one of 27 is 3.7 %
    assert high == pytest.approx(means[-1])
    # Seeds that all agree leave no doubt.
    assert compare.bootstrap([2.0, 2.0, 2.0]) == (2.0, 2.0)


def test_other_metrics_are_shown_as_they_are(tmp_path):
    files = write_seeds(tmp_path, {"sft": [3.0, 5.0]}, metric="items")
    lines = run(*files, "--metric", "items").stdout.splitlines()
    assert lines[0] == "items, 2 seeds"
    assert "| sft | 4.00 ± 12.71 |" in lines


def test_what_is_missing_is_named(tmp_path):
    files = write_seeds(tmp_path, {"sft": OURS, "align": THEIRS})
    content = json.loads((tmp_path / "2.json").read_text())
    content["results"].pop()
    (tmp_path / "2.json").write_text(json.dumps(content))
    done = run(*files)
    assert done.returncode == 1
    assert "2.json: there is no result of align hard greedy, which another" in done.stderr
    done = run(*files[:2], "--pairs", "align:nobody")
    assert "--pairs align:nobody: write ARM:ARM, of sft, align" in done.stderr
    done = run(*files[:2], "--metric", "beauty")
    assert "no beauty for sft hard greedy; there is prompts, accuracy" in done.stderr


def test_an_extra_arm_in_a_later_file_is_no_reason_to_drop_it(tmp_path):
    """Whatever one file has and another has not is refused, whichever comes first."""
    files = write_seeds(tmp_path, {"sft": OURS})
    content = json.loads((tmp_path / "1.json").read_text())
    content["results"].append({**content["results"][0], "policy": "out/world-1/align"})
    (tmp_path / "1.json").write_text(json.dumps(content))
    assert "there is no result of align" in run(*files).stderr


def test_files_of_other_evaluations_are_refused(tmp_path):
    files = write_seeds(tmp_path, {"sft": OURS})
    for path, limit in zip(files, (500, 500, 300, 500), strict=True):
        content = json.loads(Path(path).read_text())
        Path(path).write_text(json.dumps(content | {"args": {"limit": limit}}))
    assert "2.json was made with --limit 300, " in run(*files).stderr
    assert run(*files[:2]).returncode == 0


def test_a_seed_may_be_a_folder_of_runs(tmp_path):
    """Each arm's own file, and the arms in the order of runs/miniature.sh."""
    for seed in range(2):
        for arm in ("refs", "sft", "align"):
            folder = tmp_path / f"seed-{seed}" / arm
            folder.mkdir(parents=True)
            (file,) = write_seeds(folder, {arm: OURS[seed : seed + 1]})
            Path(file).rename(folder / "eval.json")
    done = run(str(tmp_path / "seed-0"), str(tmp_path / "seed-1"))
    arms = [line.split(" | ")[0] for line in done.stdout.splitlines() if " ± " in line]
    assert arms[:3] == ["| sft", "| align", "| refs"], done.stderr
    (tmp_path / "empty").mkdir()
    assert "empty: no run in it has an eval.json" in run(str(tmp_path / "empty")).stderr
