"""
Compare arms over seeds: each arm's mean, and paired differences with 95 % intervals.

    python tools/compare.py out/miniature-*
    python tools/compare.py out/tiny-*/eval.json --pairs align-grpo:sft-grpo --metric items
    python tools/compare.py out/tiny-[0-4] --arms sft sft-grpo

Of each seed there is a file that eval.py wrote of all its arms, or a folder in which each arm's run
has an eval.json; all on the same tests. An arm has the name of its run's folder. A pair is compared
seed by seed, so what is common to the two (data, the SFT run that both begin with) cancels out. Two
intervals of the mean difference are given: Student's t, which takes the differences for normal, and
the bootstrap over seeds, which does not (its percentiles, of 10,000 draws from a fixed seed). Where
the first excludes 0 the line is marked with *.

The tables are in Markdown.
"""

import argparse
import json
import random
import sys
from pathlib import Path
from statistics import mean

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from tools.report import half_interval  # noqa: E402

# The arms of runs/miniature.sh's main table, in the order in which they are shown; others come
# behind them.
ARMS = (
    "sft",
    "sft-grpo",
    "sft-grpo-tokens",
    "align",
    "align-grpo",
    "refs",
    "refs-grpo",
    "refs-align",
    "refs-align-grpo",
)
# The comparisons, where both arms are there.
PAIRS = (
    "align:sft",
    "align-grpo:sft-grpo",
    "align-grpo:sft-grpo-tokens",
    "refs-grpo:sft-grpo",
    "align-grpo:refs-grpo",
    "refs-align-grpo:refs-grpo",
    "refs-align-grpo:align-grpo",
)
DRAWS = 10_000
SETTINGS = ("limit", "samples", "temperature", "max_response")  # of eval.py: the same in all files


def read_seed(path, metric, arms=()):
    """Return {(arm, test, mode): value} of a seed's file or folder. Raises ValueError.

    arms: those to read; none: all.
    """
    values = {}
    for result in results_of(Path(path)):
        arm = Path(result["policy"]).name
        if arms and arm not in arms:
            continue
        test = Path(result["data"]).stem.removeprefix("test_")
        key = (arm, test, result["mode"])
        if key in values:
            raise ValueError(
                f"{path}: two results of {' '.join(key)}: name the arms' folders apart"
            )
        if result.get(metric) is None:
            numbers = [name for name in result if isinstance(result[name], float | int)]
            known = ", ".join(numbers)
            raise ValueError(f"{path}: no {metric} for {' '.join(key)}; there is {known}")
        values[key] = result[metric]
    return values


def without_logs(paths):
    """Leave out runs/miniature.sh's out/tiny-0.log, which out/tiny-* names beside out/tiny-0."""
    return [path for path in paths if not str(path).endswith(".log")]


def files_of(path):
    """Return the files of a seed: the path itself, or those in a folder's runs."""
    files = sorted(path.glob("*/eval.json")) if path.is_dir() else [path]
    if not files:
        raise ValueError(f"{path}: no run in it has an eval.json")
    return files


def results_of(path):
    """Return the results in a file that eval.py wrote, or in those of a folder's runs."""
    results = []
    for file in files_of(path):
        results += json.loads(file.read_text())["results"]
    return results


def expect_same_evaluation(paths):
    """Raise ValueError where files were made with other settings of eval.py."""
    first = {}
    for path in paths:
        for file in files_of(Path(path)):
            args = json.loads(file.read_text()).get("args", {})
            for name in SETTINGS:
                there, known = first.setdefault(name, (file, args.get(name)))
                if args.get(name) != known:
                    raise ValueError(
                        f"{file} was made with --{name} {args.get(name)}, {there} with {known}"
                    )


def in_order(arm):
    """Return the key by which arms are sorted."""
    return ARMS.index(arm) if arm in ARMS else len(ARMS)


def read_seeds(paths, metric, arms=()):
    """Return {(arm, test, mode): one value per file}. Raises ValueError where one lacks any.

    arms: those to read; none: all.
    """
    seeds = [read_seed(path, metric, arms) for path in paths]
    known = dict.fromkeys(key for values in seeds for key in values)
    found = {arm for arm, _, _ in known}
    if missing := [arm for arm in arms if arm not in found]:
        raise ValueError(f"there is no result of {missing[0]}, which --arms names")
    for path, values in zip(paths, seeds, strict=True):
        if missing := [key for key in known if key not in values]:
            what = " ".join(missing[0])
            raise ValueError(f"{path}: there is no result of {what}, which another file has")
    by_arm = sorted(known, key=lambda key: in_order(key[0]))
    return {key: [values[key] for values in seeds] for key in by_arm}


def bootstrap(differences):
    """Return the 2.5 and 97.5 percentiles of the mean over resampled seeds."""
    generator = random.Random(0)
    seeds = len(differences)
    means = sorted(mean(generator.choices(differences, k=seeds)) for _ in range(DRAWS))
    return means[round(0.025 * DRAWS)], means[round(0.975 * DRAWS) - 1]


def names_in(values, place):
    """Return what stands at a place of the keys, each once, in their order."""
    return list(dict.fromkeys(key[place] for key in values))


def means_table(values, mode, scale, digits):
    """Return the lines of a table: an arm per line, its mean and interval on each test."""
    tests = names_in(values, 1)
    lines = heading(f"arm, {mode}", tests)
    for arm in names_in(values, 0):
        cells = []
        for test in tests:
            of_seeds = [scale * value for value in values[arm, test, mode]]
            cells.append(mean_cell(of_seeds, digits))
        lines.append(table_row(arm, cells))
    return lines


def heading(first, tests):
    """Return a table's first two lines."""
    rule = "|---" * (len(tests) + 1) + "|"
    return [table_row(first, tests), rule]


def table_row(first, cells):
    return f"| {first} | {' | '.join(cells)} |"


def mean_cell(of_seeds, digits):
    """Return a mean with its interval, as "84.0 ± 6.9"."""
    cell = f"{mean(of_seeds):.{digits}f}"
    half = half_interval(of_seeds)
    if half is not None:
        cell += f" ± {half:.{digits}f}"
    return cell


def differences_table(values, pairs, mode, scale, digits):
    """Return the lines of a table: a pair per line, its mean difference on each test with both
    intervals, marked with * where Student's excludes 0."""
    tests = names_in(values, 1)
    lines = heading(f"paired difference, {mode}", tests)
    for pair in pairs:
        first, second = pair.split(":")
        cells = []
        for test in tests:
            ours = values[first, test, mode]
            theirs = values[second, test, mode]
            differences = [scale * (x - y) for x, y in zip(ours, theirs, strict=True)]
            cells.append(difference_cell(differences, digits))
        lines.append(table_row(f"{first} − {second}", cells))
    return lines


def difference_cell(differences, digits):
    """Return a mean difference with its intervals, as "+2.1 [+0.3, +3.9] (+0.5, +3.6) *"."""
    middle = mean(differences)
    half = half_interval(differences)
    if half is None:
        return f"{signed(middle, digits)} (one seed)"
    student = f"[{signed(middle - half, digits)}, {signed(middle + half, digits)}]"
    low, high = bootstrap(differences)
    resampled = f"({signed(low, digits)}, {signed(high, digits)})"
    mark = " *" if abs(middle) > half else ""
    return f"{signed(middle, digits)} {student} {resampled}{mark}"


def signed(value, digits):
    return f"{value:+.{digits}f}"


def pairs_of(asked, arms):
    """Return the pairs to compare: those asked for, else those of PAIRS that are there. Raises
    ValueError for an arm that is not."""
    for pair in asked:
        if pair.count(":") != 1 or not set(pair.split(":")) <= set(arms):
            raise ValueError(f"--pairs {pair}: write ARM:ARM, of {', '.join(arms)}")
    return asked or [pair for pair in PAIRS if set(pair.split(":")) <= set(arms)]


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("files", nargs="+", help="of eval.py --out, or folders: one per seed")
    parser.add_argument(
        "--pairs", nargs="*", default=[], help="ARM:ARM, the first minus the second"
    )
    parser.add_argument("--arms", nargs="*", default=[], help="to read no others; none: all")
    parser.add_argument("--metric", default="accuracy", help="of the results in the files")
    args = parser.parse_args()
    files = without_logs(args.files)
    try:
        expect_same_evaluation(files)
        values = read_seeds(files, args.metric, args.arms)
        pairs = pairs_of(args.pairs, names_in(values, 0))
    except (OSError, ValueError, KeyError) as error:
        sys.exit(f"compare.py: {error}")
    # Shares are shown in %, counts (items, steps, tokens) as they are.
    is_share = all(0 <= value <= 1 for of_seeds in values.values() for value in of_seeds)
    scale, digits = (100, 1) if is_share else (1, 2)
    seeds = len(files)
    print(f"{args.metric}{', %' if is_share else ''}, {seeds} seed{'s' * (seeds > 1)}")
    for mode in names_in(values, 2):
        print()
        print("\n".join(means_table(values, mode, scale, digits)))
        if pairs:
            print()
            print("\n".join(differences_table(values, pairs, mode, scale, digits)))
    if seeds > 1:
        print("\n± and [ ]: 95 % by Student's t over the seeds; ( ): bootstrap; *: [ ] excludes 0")


if __name__ == "__main__":
    main()
