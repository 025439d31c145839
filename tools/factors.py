"""
When does alignment help? What it gains at each level of a factor (how foreign the teacher is, how
many references there are ..), as a table and a figure.

    python tools/factors.py --level "own manner" out/arms-tiny-* \\
        --level "foreign, known" out/arms-known-* --out docs/figures/foreignness.svg
    python tools/factors.py --level "50 references=50" out/arms-tiny-* \\
        --level "1,500 references" out/arms-tiny-*

A level is a name and its seeds' folders, as runs/miniature.sh leaves them. Of each level it shows
greedy accuracy gained, in points, over the two rivals at as many updates: over nothing (align-grpo
less sft-grpo), and over SFT on the references (align-grpo less refs-grpo). A word behind a level's
name and = says that other arms are meant: those on other references (=50: align-50-grpo and
refs-50-grpo), or those behind another beginning (=half: half-align-grpo, half-grpo,
half-refs-grpo). The differences are paired over the seeds, with Student's 95 % interval. All levels
have to be evaluated alike. --out needs the extra `plot`.
"""

import argparse
import signal
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from tools import compare, figures  # noqa: E402

RIVALS = {  # in words: the colour
    "over no alignment": "#0072B2",
    "over SFT on the references": "#D55E00",
}
BEGINNINGS = ("base", "half")  # of arms, in the place of SFT
MODE = "greedy"
APART = 0.16  # of a row's height: by so much the rivals' lines are above and below its middle


def arms_of(word):
    """Return the names of three arms: ours, and the rivals in the order of RIVALS.

    word: what stands behind a level's name; "" means the arms on all references.
    """
    if not word:
        return "align-grpo", "sft-grpo", "refs-grpo"
    if word in BEGINNINGS:
        return f"{word}-align-grpo", f"{word}-grpo", f"{word}-refs-grpo"
    return f"align-{word}-grpo", "sft-grpo", f"refs-{word}-grpo"


def read_level(folders, word=""):
    """Return the seeds of a level as compare.read_seeds does, whose errors it raises; word: as
    arms_of takes it. Raises ValueError where there is no greedy result too."""
    folders = compare.without_logs(folders)
    seeds = compare.read_seeds(folders, arms_of(word))
    compare.values_of(seeds, "accuracy")  # each arm has all tests and modes
    if MODE not in compare.names_in(seeds[0], 2):
        raise ValueError(f"{folders[0]}: there is no {MODE} result: evaluate with --greedy")
    return seeds


def gains(seeds, word=""):
    """Return {test: {rival: Estimate of the gain in points}} of read_level's seeds."""
    ours, *rivals = arms_of(word)
    found = {}
    for test in compare.names_in(seeds[0], 1):
        found[test] = {}
        for words, rival in zip(RIVALS, rivals, strict=True):
            differences = []
            for results in seeds:
                our_accuracy = results[ours, test, MODE].value("accuracy")
                their_accuracy = results[rival, test, MODE].value("accuracy")
                differences.append(100 * (our_accuracy - their_accuracy))
            found[test][words] = figures.estimate(differences)
    return found


def table(levels):
    """Return the lines of a Markdown table: {level: gains()}, a line for each level and rival."""
    tests = list(next(iter(levels.values())))
    lines = compare.heading(f"points gained by alignment, {MODE}", tests)
    for level, found in levels.items():
        for words in RIVALS:
            cells = [compare.difference_cell(found[test][words].of_seeds, 1) for test in tests]
            count = len(found[tests[0]][words].of_seeds)
            seeds = f"{count} seed{'s' * (count > 1)}"
            lines.append(compare.table_row(f"{level}, {words} ({seeds})", cells))
    return lines


def draw(levels):
    """Return the figure of {level: gains()}: a panel per test, a row per level."""
    tests = list(next(iter(levels.values())))
    title = "Accuracy gained by alignment before GRPO, at as many updates: mean and 95 % interval"
    figure, axes = figures.new_figure(title, len(tests), 1.6 + 0.5 * len(levels), share="y")
    for ax, test in zip(axes, tests, strict=True):
        ax.axvline(0, color="#222222", linewidth=1, linestyle=":")
        for row, found in enumerate(levels.values()):
            for place, (words, colour) in enumerate(RIVALS.items()):
                height = row + APART * (2 * place - 1)
                figures.draw_estimate(ax, height, found[test][words], colour, below=APART / 2)
        ax.set_title(figures.TEST_NAMES.get(test, test))
        ax.set_xlabel("points")
        ax.set_yticks(range(len(levels)), list(levels))
        ax.set_ylim(len(levels) - 0.5, -0.5)  # the first level on top
        ax.tick_params(axis="y", length=0)
    lines = [figures.Line2D([], [], color=colour, marker="o") for colour in RIVALS.values()]
    figure.legend(lines, list(RIVALS), loc="outside lower center", ncols=len(RIVALS))
    return figure


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--level",
        nargs="+",
        action="append",
        required=True,
        metavar=("NAME", "FOLDER"),
        help="a level's name, perhaps with =WORD, and its seeds' folders; once for each level",
    )
    parser.add_argument("--out", type=Path, help="an SVG file")
    args = parser.parse_args()
    try:
        levels = levels_of(args.level)
    except (OSError, ValueError) as error:
        sys.exit(f"factors.py: {error}")
    print("\n".join(table(levels)))
    if args.out:
        if figures.matplotlib is None:
            sys.exit("factors.py: --out needs `pip install matplotlib` (the extra `plot`)")
        args.out.parent.mkdir(parents=True, exist_ok=True)
        with figures.matplotlib.rc_context():
            figures.matplotlib.rcdefaults()
            figures.matplotlib.rcParams.update(figures.STYLE)
            draw(levels).savefig(args.out, metadata={"Date": None, "Creator": None})


def levels_of(given):
    """Return {name: gains()} of what --level gave. Raises ValueError."""
    levels = {}
    of_first = None  # how the first level was evaluated
    for words, *folders in given:
        name, equals, word = words.partition("=")
        if not name or (equals and not word):
            raise ValueError(f"--level {words}: write NAME, or NAME=WORD")
        if not folders:
            raise ValueError(f"--level {name}: name the seeds' folders behind it")
        if name in levels:
            raise ValueError(f"--level {name} is given twice")
        seeds = read_level(folders, word)
        of_first = of_first or evaluation_of(seeds)
        if evaluation_of(seeds) != of_first:
            raise ValueError(
                f"--level {name} was evaluated otherwise than the first level: "
                f"{evaluation_of(seeds)}, there {of_first}"
            )
        levels[name] = gains(seeds, word)
    return levels


def evaluation_of(seeds):
    """Return eval.py's settings and the number of prompts of each test, which are the same for all
    of a level's seeds."""
    results = seeds[0].values()
    settings = {name: next(iter(results)).settings.get(name) for name in compare.SETTINGS}
    return settings | {result.test: result.value("prompts") for result in results}


if __name__ == "__main__":
    # `| head` ends this command as it ends others, without a traceback.
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    main()
