"""
Compare arms over seeds: each arm's mean, and paired differences with 95 % intervals.

    python tools/compare.py out/arms-miniature-*
    python tools/compare.py out/tiny-*/eval.json --pairs align-grpo:sft-grpo --metric items
    python tools/compare.py out/tiny-[0-4] --arms sft sft-grpo
    python tools/compare.py out/tiny-[0-4] --each hard        each seed's values, too, on a test

Of each seed there is a file that eval.py wrote of all its arms, or a folder in which each arm's run
has an eval.json. An arm has the name of its run's folder. All arms of a seed are evaluated on the
same files, and all seeds with as many prompts of each test and with the same settings; whatever is
not so is an error. The tables name arms of runs/miniature.sh in words ("SFT → alignment" is the
folder align), others by their folders; --arms and --pairs take the folders' names. Only what
eval.py found of the arms of --arms is looked at.

A pair is compared seed by seed, so what is common to the two (data, the SFT run that both begin
with) cancels out. The interval of the mean difference is Student's t over the seeds, which takes
the differences for normal; where it excludes 0 the line is marked with *. From 8 seeds on the
bootstrap over seeds stands beside it, which does not (its percentiles, of 10,000 draws from a fixed
seed). Of few seeds it is too narrow: of normal data its "95 %" hold the mean in about 74 % of the
cases with 3 seeds, 83 % with 5, 89 % with 8 and 90 % with 10 (4,000 trials each).

The tables are in Markdown.
"""

import argparse
import json
import math
import random
import signal
import sys
from dataclasses import dataclass
from pathlib import Path
from statistics import mean

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from tools.report import half_interval  # noqa: E402

# The arms of runs/miniature.sh's main table, in the order in which they are shown; others come
# behind them.
ARMS = (
    "base",
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
# What the words of an arm's name mean, as in runs/miniature.sh
STAGE_NAMES = {
    "sft": "SFT",
    "base": "base",
    "half": "half of SFT",
    "refs": "SFT on references",
    "align": "alignment",
    "rubric": "rubric",
    "grpo": "GRPO",
    "dapo": "DAPO",
    "gspo": "GSPO",
}
FIRST_STAGES = ("sft", "base", "half")  # an arm of another beginning comes behind SFT
SECOND_STAGES = ("refs", "align", "rubric")
VARIANT_NAMES = {"tokens": "equal tokens", "time": "equal time"}  # others are shown as they are
DRAWS = 10_000
BOOTSTRAP_FROM = 8  # seeds
SETTINGS = ("limit", "samples", "temperature", "max_response")  # of eval.py: the same in all files
# Metrics of eval.py that are shares of something, shown in %; pass@k is one for each k.
SHARES = ("accuracy", "format", "truncated", "same_caption", "same_reasoning", "judged", "ungraded")


# ----------------------------------------------------------------------------- reading
class NotMeasured(ValueError):
    """A metric is null, or NaN: there was nothing to take it of."""


def json_object(text, where):
    """Return the JSON object that a text or its bytes are. where: the text's file, or its file and
    line, for the message. Raises ValueError."""
    try:
        value = json.loads(text)
    except ValueError as error:  # broken JSON, or bytes that are no text
        raise ValueError(
            f"{where}: not JSON ({error}); was it cut short? Mend it, or take it out"
        ) from None
    if not isinstance(value, dict):
        kind = type(value).__name__
        raise ValueError(f"{where}: a JSON {kind} where an object is expected: is it another file?")
    return value


def read_json(path):
    """Return the JSON object in a file. Raises ValueError, or OSError."""
    return json_object(Path(path).read_bytes(), path)


def number(record, name, where):
    """Return a number of a record. where: the record's file and place, for the message. Raises
    NotMeasured where it is null, ValueError where there is none."""
    if name not in record:
        raise ValueError(f"{where}: there is no {name}")
    value = record[name]
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        raise NotMeasured(f"{where}: {name} is null, nothing was measured there")
    if not isinstance(value, int | float):
        raise ValueError(f"{where}: {name} is {value!r}, not a number")
    return value


@dataclass(frozen=True)
class Result:
    """What eval.py found of one arm on one test in one mode."""

    file: Path
    settings: dict  # eval.py's arguments
    arm: str
    test: str
    mode: str
    data: Path  # the test's file
    metrics: dict

    @property
    def key(self):
        return self.arm, self.test, self.mode

    def value(self, metric):
        """Return a metric. Raises NotMeasured, or ValueError where eval.py wrote none."""
        where = f"{self.file}: {' '.join(self.key)}"
        if metric not in self.metrics:
            known = [name for name, value in self.metrics.items() if isinstance(value, float | int)]
            raise ValueError(f"{where}: there is no {metric}, but {', '.join(known)}")
        return number(self.metrics, metric, where)


def without_logs(paths):
    """Leave out a run's output beside its folder: out/tiny-* names out/tiny-0.log as well."""
    return [path for path in paths if not str(path).endswith(".log")]


def files_of(path):
    """Return the files of a seed: the path itself, or those in a folder's runs."""
    files = sorted(path.glob("*/eval.json")) if path.is_dir() else [path]
    if not files:
        raise ValueError(f"{path}: no run in it has an eval.json")
    return files


def results_in(file):
    """Return the Results in a file that eval.py wrote. Raises ValueError."""
    content = read_json(file)
    settings = content.get("args", {})
    found = content.get("results")
    if not isinstance(found, list) or not found or not isinstance(settings, dict):
        raise ValueError(f'{file}: no list of "results": it is no file of eval.py --out')
    results = []
    for metrics in found:
        texts = [metrics.get(name) for name in ("policy", "data", "mode")]
        if not all(isinstance(text, str) for text in texts):
            raise ValueError(f"{file}: a result without policy, data or mode")
        policy, data, mode = texts
        arm = Path(policy).name
        test = Path(data).stem.removeprefix("test_")
        results.append(Result(file, settings, arm, test, mode, Path(data), metrics))
    return results


def read_seed(path):
    """Return {(arm, test, mode): Result} of a seed's file or folder. Raises ValueError."""
    results = {}
    for file in files_of(path):
        for result in results_in(file):
            if result.key in results:
                raise ValueError(
                    f"{file}: a second result of {' '.join(result.key)}, the first is in "
                    f"{results[result.key].file}: name the arms' folders, or the tests, apart"
                )
            results[result.key] = result
    return results


def read_seeds(paths, asked=()):
    """
    Return {(arm, test, mode): Result} of each seed, a list; the arms are in the order of ARMS, and
    all seeds have the same keys.

    asked: the arms to read; none: all. Raises ValueError where no seed is named, one is named
    twice, one lacks anything that another has, or two were not evaluated alike.
    """
    paths = [Path(path) for path in paths]
    expect_seeds_once(paths)
    seeds = [read_seed(path) for path in paths]
    arms = arms_of_all(paths, seeds, asked)
    chosen = []
    for results in seeds:
        of_arms = {}
        for arm in arms:
            of_arms |= {key: result for key, result in results.items() if key[0] == arm}
        chosen.append(of_arms)
    expect_same_results(paths, chosen)
    expect_same_evaluation(chosen)
    return chosen


def expect_seeds_once(paths):
    """Raise ValueError where no seed is named, or one twice."""
    if not paths:
        raise ValueError("no seed is named: name files of eval.py --out, or seeds' folders")
    known = set()
    for path in paths:
        for file in files_of(path):
            if file.resolve() in known:
                raise ValueError(f"{path} is given twice: a seed counts once")
            known.add(file.resolve())


def arms_of_all(paths, seeds, asked):
    """Return the arms to read in their order. asked: none for all. Raises ValueError for an arm
    that a seed has not."""
    there = [names_in(results, 0) for results in seeds]
    wanted = list(asked) or [arm for of_seed in there for arm in of_seed]
    arms = sorted(dict.fromkeys(wanted), key=in_order)
    common = [arm for arm in names_in(seeds[0], 0) if all(arm in of_seed for of_seed in there)]
    for path, of_seed in zip(paths, there, strict=True):
        missing = [arm for arm in arms if arm not in of_seed]
        if missing:
            raise ValueError(
                f"{path}: there is no result of the arm {missing[0]}; --arms names those to read, "
                f"and all seeds have: {' '.join(sorted(common, key=in_order)) or 'none'}"
            )
    return arms


def in_order(arm):
    """Return the key by which arms are sorted."""
    return ARMS.index(arm) if arm in ARMS else len(ARMS)


def expect_same_results(paths, seeds):
    """Raise ValueError where a seed lacks a test or mode that another has."""
    known = dict.fromkeys(key for results in seeds for key in results)
    for path, results in zip(paths, seeds, strict=True):
        missing = [key for key in known if key not in results]
        if missing:
            what = " ".join(missing[0])
            raise ValueError(f"{path}: there is no result of {what}, which another seed has")


def expect_same_evaluation(seeds):
    """Raise ValueError where two results were made with other settings of eval.py, of another
    number of a test's prompts, or, within a seed, of another file."""
    every = [result for results in seeds for result in results.values()]
    for name in SETTINGS:
        expect_one(f"--{name}", [(result.file, result.settings.get(name)) for result in every])
    for test in names_in(seeds[0], 1):
        of_test = [result for result in every if result.test == test]
        counts = [(result.file, result.value("prompts")) for result in of_test]
        expect_one(f"the number of prompts of the test {test}", counts)
    for results in seeds:
        for test in names_in(results, 1):
            of_test = [result for result in results.values() if result.test == test]
            data = [(result.file, str(result.data.resolve())) for result in of_test]
            expect_one(f"the file of the test {test}", data)


def expect_one(what, found):
    """Raise ValueError where the values of found, [(file, value)], are not all the same."""
    first_file, first = found[0]
    for file, value in found:
        if value != first:
            raise ValueError(
                f"{file}: {what} is {value}, in {first_file} it is {first}: evaluate all arms alike"
            )


def values_of(seeds, metric):
    """Return {(arm, test, mode): one value per seed}. Raises ValueError where a metric is not
    there, or where an arm has not all tests and modes that others have."""
    values = {}
    for key in seeds[0]:
        values[key] = [results[key].value(metric) for results in seeds]
    for arm in names_in(values, 0):
        for test in names_in(values, 1):
            for mode in names_in(values, 2):
                if (arm, test, mode) not in values:
                    raise ValueError(
                        f"there is no result of {arm} {test} {mode}, which other arms have; "
                        f"--arms names those to read"
                    )
    return values


# ----------------------------------------------------------------------------- the tables
def bootstrap(differences):
    """Return the 2.5 and 97.5 percentiles of the mean over resampled seeds."""
    generator = random.Random(0)
    seeds = len(differences)
    means = sorted(mean(generator.choices(differences, k=seeds)) for _ in range(DRAWS))
    return means[round(0.025 * DRAWS)], means[round(0.975 * DRAWS) - 1]


def names_in(values, place):
    """Return what stands at a place of the keys, each once, in their order."""
    return list(dict.fromkeys(key[place] for key in values))


def names_of(arms):
    """Return {arm: its name in words}. Where the words of two are the same, both keep the names of
    their folders."""
    names = {arm: name_of(arm) for arm in arms}
    known = list(names.values())
    return {arm: name if known.count(name) == 1 else arm for arm, name in names.items()}


def name_of(arm):
    """Return an arm's name in words: "align-dense-grpo" is "SFT → alignment (dense) → GRPO". What
    does not begin as an arm of runs/miniature.sh does stays as it is."""
    words = arm.split("-")
    if words[0] not in (*FIRST_STAGES, *SECOND_STAGES) or "" in words:
        return arm
    stages = [] if words[0] in FIRST_STAGES else [STAGE_NAMES["sft"]]
    for word in words:
        if word in STAGE_NAMES:
            stages.append(STAGE_NAMES[word])
        else:
            stages[-1] += f" ({VARIANT_NAMES.get(word, word)})"
    return " → ".join(stages)


def means_table(values, mode, scale, digits):
    """Return the lines of a table: an arm per line, its mean and interval on each test."""
    tests = names_in(values, 1)
    lines = heading(f"arm, {mode}", tests)
    for arm, name in names_of(names_in(values, 0)).items():
        cells = []
        for test in tests:
            of_seeds = [scale * value for value in values[arm, test, mode]]
            cells.append(mean_cell(of_seeds, digits))
        lines.append(table_row(name, cells))
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


def each_table(values, paths, test, mode, scale, digits):
    """Return the lines of a table: an arm per line, a test's value of each seed. Raises ValueError
    for a test that there is not."""
    if test not in names_in(values, 1):
        raise ValueError(f"--each {test}: the tests are {', '.join(names_in(values, 1))}")
    lines = heading(f"{test}, {mode}, each seed", paths)
    for arm, name in names_of(names_in(values, 0)).items():
        cells = [f"{scale * value:.{digits}f}" for value in values[arm, test, mode]]
        lines.append(table_row(name, cells))
    return lines


def differences_table(values, pairs, mode, scale, digits):
    """Return the lines of a table: a pair per line, its mean difference on each test with its
    intervals, marked with * where Student's excludes 0."""
    tests = names_in(values, 1)
    names = names_of(names_in(values, 0))
    lines = heading(f"paired difference, {mode}", tests)
    for pair in pairs:
        first, second = pair.split(":")
        cells = []
        for test in tests:
            ours = values[first, test, mode]
            theirs = values[second, test, mode]
            differences = [scale * (x - y) for x, y in zip(ours, theirs, strict=True)]
            cells.append(difference_cell(differences, digits))
        lines.append(table_row(f"{names[first]} − {names[second]}", cells))
    return lines


def difference_cell(differences, digits):
    """Return a mean difference with its intervals, as "+2.1 [+0.3, +3.9] (+0.5, +3.6) *", of few
    seeds without the second."""
    middle = mean(differences)
    half = half_interval(differences)
    if half is None:
        return f"{signed(middle, digits)} (one seed)"
    student = f"[{signed(middle - half, digits)}, {signed(middle + half, digits)}]"
    cell = f"{signed(middle, digits)} {student}"
    if len(differences) >= BOOTSTRAP_FROM:
        low, high = bootstrap(differences)
        cell += f" ({signed(low, digits)}, {signed(high, digits)})"
    if abs(middle) > half:
        cell += " *"
    return cell


def signed(value, digits):
    return f"{value:+.{digits}f}"


def pairs_of(asked, arms):
    """Return the pairs to compare: those asked for, else those of PAIRS that are there. Raises
    ValueError for an arm that is not."""
    for pair in asked:
        if pair.count(":") != 1 or not set(pair.split(":")) <= set(arms):
            raise ValueError(f"--pairs {pair}: write ARM:ARM, of {', '.join(arms)}")
    return asked or [pair for pair in PAIRS if set(pair.split(":")) <= set(arms)]


def is_share(metric):
    return metric in SHARES or metric.startswith("pass@")


def first_line(metric, seeds):
    """Return what the tables are of: "accuracy, %, 4 seeds; prompts: id 500, hard 500"."""
    unit = ", %" if is_share(metric) else ""
    prompts = {result.test: result.value("prompts") for result in seeds[0].values()}
    of_tests = ", ".join(f"{test} {count}" for test, count in prompts.items())
    plural = "s" if len(seeds) > 1 else ""
    return f"{metric}{unit}, {len(seeds)} seed{plural}; prompts: {of_tests}"


def legend(seeds):
    """Return what the signs in the tables of so many seeds mean."""
    signs = "± and [ ]: 95 % by Student's t over the seeds; "
    if seeds >= BOOTSTRAP_FROM:
        signs += "( ): 95 % by the bootstrap over the seeds; "
    else:
        signs += (
            f"the bootstrap is shown from {BOOTSTRAP_FROM} seeds on, of fewer it is too narrow; "
        )
    signs += "*: [ ] excludes 0.\n"
    return signs + "Of N intervals in a table about N/20 exclude 0 by chance where nothing differs."


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("files", nargs="*", help="of eval.py --out, or folders: one per seed")
    parser.add_argument(
        "--pairs", nargs="*", default=[], help="ARM:ARM, the first minus the second"
    )
    parser.add_argument("--arms", nargs="*", default=[], help="to read no others; none: all")
    parser.add_argument("--each", metavar="TEST", help="print each seed's values on a test, too")
    parser.add_argument("--metric", default="accuracy", help="of the results in the files")
    args = parser.parse_args()
    paths = without_logs(args.files)
    # Counts (items, steps, tokens) are shown as they are.
    scale, digits = (100, 1) if is_share(args.metric) else (1, 2)
    each = {}
    try:
        seeds = read_seeds(paths, args.arms)
        values = values_of(seeds, args.metric)
        pairs = pairs_of(args.pairs, names_in(values, 0))
        if args.each:
            for mode in names_in(values, 2):
                each[mode] = each_table(values, paths, args.each, mode, scale, digits)
    except NotMeasured as error:
        sys.exit(f"compare.py: {error}; --arms without the arm compares the others")
    except (OSError, ValueError) as error:
        sys.exit(f"compare.py: {error}")
    print(first_line(args.metric, seeds))
    for mode in names_in(values, 2):
        print()
        print("\n".join(means_table(values, mode, scale, digits)))
        if pairs:
            print()
            print("\n".join(differences_table(values, pairs, mode, scale, digits)))
        if mode in each:
            print()
            print("\n".join(each[mode]))
    if len(seeds) > 1:
        print()
        print(legend(len(seeds)))


if __name__ == "__main__":
    # `| head` ends this command as it ends others, without a traceback.
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    main()
