"""Arms compared over seeds: means, paired differences and both intervals, against values worked out
by hand and by another way."""

import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

from engine.evaluation import summarise
from tools import compare

eval_script = importlib.import_module("eval")

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


@pytest.fixture
def run(monkeypatch, capsys):
    """The command, in this process: run(*arguments) -> its lines, or what it ended with, a text."""

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["compare.py", *map(str, arguments)])
        try:
            compare.main()
        except SystemExit as end:
            assert isinstance(end.code, str)  # which python prints, and exits with 1
            return end.code
        return capsys.readouterr().out.splitlines()

    return call


def change(path, change_result):
    """Change the results in a file in place: change_result(a result)."""
    content = json.loads(Path(path).read_text())
    for result in content["results"]:
        change_result(result)
    Path(path).write_text(json.dumps(content))


def test_tables_of_four_seeds(tmp_path):
    """The command as it is called."""
    files = write_seeds(tmp_path, {"align-grpo": OURS, "sft-grpo": THEIRS})
    command = [sys.executable, str(ROOT / "tools/compare.py"), *files]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0] == "accuracy, %, 4 seeds; prompts: hard 10"
    # The mean of OURS is 84.0, its standard deviation 4.32; t with 3 degrees is 3.182.
    assert "| SFT → alignment → GRPO | 84.0 ± 6.9 |" in lines
    # Differences 10, 6, 2, 6: mean 6, standard deviation 3.266, half 3.182 * 3.266 / 2 = 5.196.
    (line,) = [line for line in lines if line.startswith("| SFT → alignment → GRPO − SFT → GRPO")]
    # Of four seeds the bootstrap is not shown.
    assert line == "| SFT → alignment → GRPO − SFT → GRPO | +6.0 [+0.8, +11.2] * |"
    assert "from 8 seeds on" in lines[-2] and "( )" not in lines[-2]
    assert lines[-1].startswith("Of N intervals in a table about N/20 exclude 0 by chance")


def test_each_seed_s_values(tmp_path, run):
    """In the order in which the seeds are named."""
    files = write_seeds(tmp_path, {"align-grpo": OURS, "sft-grpo": THEIRS})
    lines = run(*reversed(files), "--each", "hard")
    names = " | ".join(reversed(files))
    place = lines.index(f"| hard, greedy, each seed | {names} |")
    assert lines[place + 2 : place + 4] == [
        "| SFT → GRPO | 84.0 | 80.0 | 78.0 | 70.0 |",
        "| SFT → alignment → GRPO | 90.0 | 82.0 | 84.0 | 80.0 |",
    ]
    assert not any("each seed" in line for line in run(*files))
    assert "--each odd: the tests are hard" in run(*files, "--each", "odd")


def test_a_difference_whose_interval_holds_0_is_not_marked(tmp_path, run):
    files = write_seeds(tmp_path, {"align-grpo": OURS, "sft-grpo": [0.70, 0.90, 0.80, 0.84]})
    (line,) = [line for line in run(*files) if " − " in line]
    assert "*" not in line


def test_the_bootstrap_is_shown_from_eight_seeds_on(tmp_path, run):
    """Seeds that differ by 5 % in all, and in one by 9."""
    ours = [0.55] * 7 + [0.59]
    files = write_seeds(tmp_path, {"align-grpo": ours, "sft-grpo": [0.5] * 8})
    lines = run(*files)
    # Of 8 draws of the seeds none is the last one in 34 %, three or more in 7 %, four in 1 %.
    assert "| SFT → alignment → GRPO − SFT → GRPO | +5.5 [+4.3, +6.7] (+5.0, +6.5) * |" in lines
    assert "( ): 95 % by the bootstrap over the seeds" in lines[-2]
    assert not any("(" in line for line in run(*files[:7]) if " − " in line)


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


def test_bootstrap_has_the_percentiles_of_95_percent():
    """
    Against the exact distribution of the sum of 8 draws, a convolution: 2.5 % of it lie at or below
    the lower end, and at or above the upper one, but for the draws' noise, 0.16 %. Of a 99 %
    interval it would be 0.5 %, of the least and greatest mean next to nothing.
    """
    differences = [-31, -17, -8, -3, 2, 9, 21, 40]
    ways = {0: 1}  # sum -> in how many ways
    for _ in differences:
        longer = {}
        for total, count in ways.items():
            for value in differences:
                longer[total + value] = longer.get(total + value, 0) + count
        ways = longer
    assert sum(ways.values()) == 8**8
    low, high = compare.bootstrap(differences)
    below = sum(count for total, count in ways.items() if total <= 8 * low) / 8**8
    above = sum(count for total, count in ways.items() if total >= 8 * high) / 8**8
    assert below == pytest.approx(0.025, abs=0.005)
    assert above == pytest.approx(0.025, abs=0.005)


def test_counts_are_shown_as_they_are_and_shares_in_percent(tmp_path, run):
    """By their names: a length may be below 1 in all seeds, a share is one whatever it is."""
    files = write_seeds(tmp_path, {"sft": [3.0, 5.0]}, metric="items")
    lines = run(*files, "--metric", "items")
    assert lines[0] == "items, 2 seeds; prompts: hard 10"
    assert "| SFT | 4.00 ± 12.71 |" in lines
    files = write_seeds(tmp_path, {"sft": [0.4, 0.6]}, metric="steps")
    assert "| SFT | 0.50 ± 1.27 |" in run(*files, "--metric", "steps")
    files = write_seeds(tmp_path, {"sft": [0.4, 0.6]}, metric="pass@4")
    assert "| SFT | 50.0 ± 127.1 |" in run(*files, "--metric", "pass@4")


def test_arms_have_names_in_words():
    names = {
        "align-dense-grpo": "SFT → alignment (dense) → GRPO",
        "refs-align": "SFT → SFT on references → alignment",
        "sft-grpo-tokens": "SFT → GRPO (equal tokens)",
        "base-align": "base → alignment",
        "half-refs-grpo": "half of SFT → SFT on references → GRPO",
        "rubric-grpo": "SFT → rubric → GRPO",
        **{name: name for name in ("teacher", "grpo", "align-", "my-align")},
    }
    assert compare.names_of(names) == names
    # Two with the same words are told apart by their folders.
    assert compare.names_of(["sft-align", "align", "refs"]) == {
        "sft-align": "sft-align",
        "align": "align",
        "refs": "SFT → SFT on references",
    }


def test_shares_are_those_that_eval_writes():
    """Of all that eval.py's summary has: what is between 0 and 1 by what it is."""
    response = {"accuracy": [1.0], "format": [1.0], "length": [5], "stop": ["length"]}
    written = dict.fromkeys(("items", "reference_items", "steps", "reference_steps"), [2.0])
    shared = {"same_caption": [1.0], "same_reasoning": [1.0]}
    records = [response | written | shared | {"decided_by": ["judge"]}]
    metrics = summarise(records, pass_at=(1,)) | eval_script.shares_of_judge(records)
    shares = [name for name in metrics if compare.is_share(name)]
    counts = ["prompts", "length", *written]
    assert sorted(shares + counts) == sorted(metrics)
    assert set(compare.SHARES) == {name for name in shares if "@" not in name}


# ----------------------------------------------------------------------------- what does not fit
def test_what_is_missing_is_named(tmp_path, run):
    files = write_seeds(tmp_path, {"sft": OURS, "align": THEIRS})
    assert "--pairs align:nobody: write ARM:ARM, of sft, align" in run(
        *files, "--pairs", "align:nobody"
    )
    said = run(*files, "--metric", "beauty")
    assert "0.json: sft hard greedy: there is no beauty, but prompts, accuracy" in said
    said = run(*files, "--metric", "mode")
    assert "0.json: sft hard greedy: mode is 'greedy', not a number" in said


def test_an_arm_that_only_some_seeds_have(tmp_path, run):
    """Whichever file has it: the message says what to do, and that it may be done."""
    files = write_seeds(tmp_path, {"sft": OURS, "align": THEIRS, "refs": THEIRS})
    content = json.loads(Path(files[2]).read_text())
    content["results"].pop(1)
    Path(files[2]).write_text(json.dumps(content))
    said = "2.json: there is no result of the arm align; --arms names those to read, and all seeds "
    for order in (files, files[::-1], files[2:]):
        assert said + "have: sft refs" in run(*order)
    assert run(*files, "--arms", "sft", "refs")[0].startswith("accuracy, %, 4 seeds")
    assert "0.json: there is no result of the arm nobody" in run(*files, "--arms", "nobody")


def test_a_test_or_mode_that_only_some_have(tmp_path, run):
    """Of a seed, and of an arm."""
    files = write_seeds(tmp_path, {"sft": OURS, "align": THEIRS})
    for path in files:
        content = json.loads(Path(path).read_text())
        content["results"].append(content["results"][0] | {"mode": "T=1"})
        Path(path).write_text(json.dumps(content))
    assert "there is no result of align hard T=1, which other arms have; --arms" in run(*files)
    assert "accuracy, %, 4 seeds" in run(*files, "--arms", "sft")[0]
    write_seeds(tmp_path, {"sft": OURS[:1], "align": THEIRS[:1]})  # the first seed's, without it
    assert "0.json: there is no result of sft hard T=1, which another seed has" in run(*files)


def test_a_seed_counts_once(tmp_path, run):
    """By whichever path it is named; and none is no comparison."""
    files = write_seeds(tmp_path, {"sft": OURS, "align": THEIRS})
    again = f"{tmp_path}/../{tmp_path.name}/1.json"
    assert f"{again} is given twice: a seed counts once" in run(*files, again)
    assert "1.json is given twice: a seed counts once" in run(again, *files)
    (tmp_path / "link.json").symlink_to(files[0])
    assert "link.json is given twice" in run(files[0], tmp_path / "link.json")
    assert "no seed is named" in run()
    assert "no seed is named" in run("out/tiny-0.log")


def test_arms_are_measured_on_the_same_tests(tmp_path, run):
    """In a seed on one file, over the seeds with one number of prompts."""
    files = write_seeds(tmp_path, {"sft": OURS, "align": THEIRS})

    def own_file(result):
        result["data"] = f"{Path(result['policy']).parent}/test_hard.jsonl"

    def other_file(result):
        if result["policy"].endswith("align"):
            result["data"] = "elsewhere/test_hard.jsonl"

    def other_prompts(result):
        result["prompts"] = 9

    for path in files:
        change(path, own_file)
    assert run(*files)[0].endswith("; prompts: hard 10")
    change(files[2], other_file)
    assert "2.json: the file of the test hard is " in run(*files)
    assert run(*files, "--arms", "sft")[0].endswith("; prompts: hard 10")
    change(files[3], other_prompts)
    said = run(*files, "--arms", "sft")
    assert "3.json: the number of prompts of the test hard is 9, in " in said
    assert "0.json it is 10: evaluate all arms alike" in said


def test_files_of_other_evaluations_are_refused(tmp_path, run):
    files = write_seeds(tmp_path, {"sft": OURS})
    for path, limit in zip(files, (500, 500, 300, 500), strict=True):
        content = json.loads(Path(path).read_text())
        Path(path).write_text(json.dumps(content | {"args": {"limit": limit}}))
    assert "2.json: --limit is 300, in " in run(*files)
    assert "accuracy" in run(*files[:2])[0]


def write_folder(folder, arms):
    """A seed's folder, in which each arm has its own file."""
    for arm, value in arms.items():
        (folder / arm).mkdir(parents=True)
        (file,) = write_seeds(folder / arm, {arm: [value]})
        Path(file).rename(folder / arm / "eval.json")
    return folder


def test_a_seed_may_be_a_folder_of_runs(tmp_path, run):
    """Each arm's own file, and the arms in the order of runs/miniature.sh."""
    folders = []
    for seed in range(2):
        arms = dict.fromkeys(("refs", "sft", "align"), OURS[seed])
        folders.append(write_folder(tmp_path / f"seed-{seed}", arms))
    lines = run(*folders)
    arms = [line.split(" | ")[0] for line in lines if " ± " in line]
    assert arms[:3] == ["| SFT", "| SFT → alignment", "| SFT → SFT on references"]
    (tmp_path / "empty").mkdir()
    assert "empty: no run in it has an eval.json" in run(tmp_path / "empty")


def test_an_arm_that_is_not_read_may_be_of_another_evaluation(tmp_path, run):
    folder = write_folder(tmp_path / "seed-0", {"sft": 0.5, "align": 0.6, "refs": 0.7})
    file = folder / "refs/eval.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"args": {"limit": 5}}))
    assert "refs/eval.json: --limit is 5" in run(folder)
    assert "| SFT → alignment | 60.0 |" in run(folder, "--arms", "sft", "align")


@pytest.mark.parametrize(
    "text, says",
    [
        ('{"results": [', "1.json: not JSON (Expecting"),
        ("", "1.json: not JSON"),
        (b"\xff\xfe\x00", "1.json: not JSON"),
        ('[{"results": []}]', "1.json: a JSON list where an object is expected"),
        ('{"results": []}', '1.json: no list of "results"'),
        ('{"results": [{"policy": "a"}]}', "1.json: a result without policy, data or mode"),
    ],
)
def test_a_broken_file_is_named(tmp_path, run, text, says):
    files = write_seeds(tmp_path, {"sft": OURS})
    Path(files[1]).write_bytes(text if isinstance(text, bytes) else text.encode())
    assert says in run(*files)


@pytest.mark.parametrize("value", [None, float("nan")])
def test_a_number_that_is_null_is_named(tmp_path, run, value):
    files = write_seeds(tmp_path, {"sft": OURS, "align": [0.5, 0.5, value, 0.5]})
    said = run(*files)
    assert "2.json: align hard greedy: accuracy is null, nothing was measured there; --arms" in said
    assert run(*files, "--arms", "sft")


def test_a_reader_that_leaves_is_no_error(tmp_path):
    """compare.py | head"""
    files = write_seeds(tmp_path, {"sft": OURS})
    command = [sys.executable, str(ROOT / "tools/compare.py"), *files]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.close()
        assert process.stderr.read() == b""
