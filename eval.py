r"""
Evaluation of checkpoints on files with answers: is a response right, is it well-formed, and does
it look like the references?

1. Sample one response per prompt greedily, and `--samples` rollouts per prompt at `--temperature`.
   The prompts are dealt out over the ranks; the responses are the same on any number of them.
2. Measure each response by rewards.py: accuracy and format. From them follow pass@k without bias,
   the tokens per response, and the share of responses that were cut at `--max_response`.
3. Measure the drift: items per caption and steps per reasoning of the well-formed responses, beside
   those of the references where the file has them, and the share of captions that are the
   reference's word by word.

    python eval.py --policy ckpt/sft/last --data test.jsonl hard.jsonl --samples 8 --out eval.json
    python eval.py --policy ckpt/rlvr --all_steps --data test.jsonl   # a run's kept checkpoints

For stage 3, keep the prompts that the policy solves sometimes:

    torchrun --nproc_per_node=8 eval.py --policy ckpt/align/last --data rl.parquet --no-greedy \
        --samples 16 --filter 0.2 0.8 --filter_out rl_filtered.parquet

The rules cannot tell whether "the auto" is right where the reference is "the car". As the paper's
benchmarks do, a judge behind an API can say so, of such answers alone; `--judge_agreement` shows
how far it agrees with the rules where they decide:

    PRISM_API_KEY=... python eval.py --policy ckpt/rlvr/last --data test.jsonl \
        --base_url https://HOST/v1 --judge MODEL --judge_agreement 200
"""

from __future__ import annotations

import json
import math
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import torch

from data import parts, read
from engine.api import ApiArgs
from engine.arguments import check, is_first_rank, is_missing, option, parse
from engine.checkpoint import kept_steps
from engine.evaluation import GREEDY, Mode, evaluate, known_of, left_out_of, mean, summarise
from engine.grader import Grader, agreement, claim_of
from engine.log import provenance, to_json
from engine.ranks import print0, setup
from engine.rows import Data
from model import load
from rewards import left_open, measure


@dataclass(kw_only=True)
class Args(ApiArgs):
    policy: tuple[str, ...] = option(
        help="checkpoints: Qwen3-VL folders in transformers layout, run folders, or hub names"
    )
    data: tuple[str, ...] = option(
        help="files with answers, in any of the formats or as benchmarks are published"
    )
    all_steps: bool = option(
        False, "--policy names run folders: evaluate each step-* that --keep_every left, and last"
    )
    out: str = option("", "JSON file for the results")
    rollouts_out: str = option("", "JSONL file for every rollout")
    limit: int = option(0, "rows of each file, from its start; 0: all")
    show: int = option(0, "responses to print in full, of each policy, file and mode", least=0)
    greedy: bool = option(True, "evaluate greedy decoding")
    samples: int = option(0, "rollouts per prompt to evaluate at --temperature")
    temperature: float = option(1.0, "of the samples")
    pass_at: tuple[int, ...] = option((1, 4, 8, 16), "the k of pass@k, up to --samples", least=1)
    filter: tuple[float, float] | None = option(
        None, "keep the rows whose pass rate over the samples is from LOW to HIGH"
    )
    filter_out: str = option(
        "", "file for the rows that --filter keeps: .parquet if the data is, else .jsonl"
    )
    seed: int = option(0, "of the samples, which are the same on any number of ranks")
    max_prompt: int = option(
        2048,
        "tokens, image tokens included; longer prompts are left out and counted, never cut",
        least=1,
    )
    max_response: int = option(6144, "tokens, end token included", least=1)
    max_pixels: int | None = option(
        None,
        "of one image, larger ones are scaled down; none: the image processor's own limit",
        least=1,
    )
    max_side: int | None = option(
        None, "pixels, of one image's longer side; larger ones are scaled down", least=1
    )
    max_bad: int = option(
        100, "rows of a file that cannot be used; with more of them the run stops"
    )
    image_root: str | None = option(
        None, "folder that image paths are relative to and stay in; none: the data file's"
    )
    workers: int = option(
        2, "threads per process that read and encode rows side by side; 0: the main thread alone"
    )
    slots: int = option(256, "rows decoded at once, per device", least=1)
    pack_tokens: int = option(16384, "of one prefill, per device", least=1)
    judge: str = option(
        "", "name of a model that grades what the rules leave open; empty: there it is wrong"
    )
    judge_agreement: int = option(
        0, "responses that the rules decide, to ask the judge about as well; 0: none"
    )
    judge_cache: str = option("ckpt/judge.jsonl", "JSONL file that keeps the judge's verdicts")
    request: str = option(
        '{"max_tokens": 4096, "temperature": 0}', "JSON object with more fields of each request"
    )
    config: str = option(
        "", "JSON file of arguments, as an earlier --out, which is run again; flags given here win"
    )
    device: Literal["auto", "cpu", "cuda"] = option("auto", "auto: cuda where there is one")
    dtype: Literal["auto", "float32", "bfloat16"] = option(
        "auto", "auto: bfloat16 on cuda, float32 on a CPU"
    )

    def __post_init__(self):
        check(self)
        if not self.greedy and self.samples < 1:
            raise ValueError("nothing to do: --no-greedy needs --samples of 1 or more")
        if self.temperature == 0:
            raise ValueError("--temperature is 0: it must be above 0 (greedy decoding: --greedy)")
        if (self.filter is None) != (not self.filter_out):
            raise ValueError("--filter LOW HIGH and --filter_out FILE come together")
        if self.filter:
            self.check_filter()
        self.check_files()
        if self.judge:
            self.check_api()
        elif self.base_url or self.judge_agreement:
            raise ValueError("--base_url and --judge_agreement need --judge MODEL")

    def check_filter(self):
        low, high = self.filter
        if not low <= high <= 1:
            mend = "LOW and HIGH are shares, LOW at most HIGH, HIGH at most 1"
            raise ValueError(f"--filter is {low} {high}: {mend}")
        several = self.all_steps or len(self.policy) != 1
        if self.samples < 1 or len(self.data) != 1 or several:
            needed = "--samples of 1 or more, one --policy and one file in --data"
            raise ValueError(f"--filter needs {needed}")
        (data,) = self.data
        if is_parquet(data) != is_parquet(self.filter_out):
            form = "both end in .parquet, or neither"
            raise ValueError(f"--filter_out keeps the form of {data}: {form}")

    def check_files(self):
        """What would else be found out behind hours of sampling, or never."""
        for path in self.data:
            if is_missing(path) or Path(path).is_dir():
                raise ValueError(f"--data {path}: no such file")
        if self.image_root is not None and not Path(self.image_root).is_dir():
            raise ValueError(f"--image_root {self.image_root}: no such folder")
        taken = [Path(path).resolve() for path in self.data]
        for name in ("out", "rollouts_out", "filter_out"):
            path = getattr(self, name)
            if not path:
                continue
            if Path(path).is_dir():
                raise ValueError(f"--{name} {path} is a folder: name a file in it")
            if Path(path).resolve() in taken:
                raise ValueError(f"--{name} {path} would overwrite another file of this command")
            taken.append(Path(path).resolve())


# ----------------------------------------------------------------------------- what is shown
def table(results):
    """
    Return the results as aligned text, a line for each policy, file and mode. Columns without data
    are left out.
    """
    columns = []
    for key in dict.fromkeys(key for result in results for key in result):
        cells = [cell(result.get(key, math.nan)) for result in results]
        if key != "left_out" and set(cells) != {"nan"}:
            columns.append([key, *cells])
    widths = [max(len(text) for text in column) for column in columns]
    lines = []
    for line in zip(*columns, strict=True):
        lines.append("  ".join(text.rjust(w) for text, w in zip(line, widths, strict=True)))
    return "\n".join(lines)


def cell(value):
    return f"{value:.3f}" if isinstance(value, float) else str(value)


def curves(results):
    """
    Return the accuracy of each run's checkpoints against their steps as text, for each file and
    mode: a line for each checkpoint, with a bar of up to 50 characters.
    """
    lines = []
    before = None
    for result in sorted(results, key=curve_of):
        if curve_of(result) != before:
            before = curve_of(result)
            lines.append(f"\naccuracy of {', '.join(before)}")
        accuracy = result["accuracy"]
        bar = "" if math.isnan(accuracy) else "█" * round(50 * accuracy)
        lines.append(f"{result['step']:>8}  {accuracy:.3f}  {bar}")
    return "\n".join(lines)


def curve_of(result):
    return str(Path(result["policy"]).parent), result["data"], result["mode"]


# ----------------------------------------------------------------------------- files
def is_parquet(path):
    return Path(path).suffix == ".parquet"


@contextmanager
def whole_or_not(path):
    """
    Give the name under which to write the file `path`: another one beside it, that becomes its own
    when all is written. Where that fails (a full disk, a kill), the file before it stays. A link, a
    pipe and a device such as /dev/stdout are written to as they are.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.is_symlink() or (path.exists() and not path.is_file()):
        yield path
        return
    new = path.with_name(f"{path.name}.new")
    try:
        yield new
        new.replace(path)
    finally:
        new.unlink(missing_ok=True)  # room on a full disk


def write_text(path, text):
    with whole_or_not(path) as new:
        new.write_text(text, encoding="utf-8")


def write_rows(path, rows, out, image_root=None):
    """
    Copy rows (indices) of the data file `path` to the file `out`; parquet stays parquet. Image
    paths are copied as they are: where `out` is in another folder, the printed line says from
    where they start.
    """
    if is_parquet(out):
        import pyarrow.parquet as pq

        with whole_or_not(out) as new:
            pq.write_table(pq.read_table(path).take(rows), new)
    else:
        source = read(path, "eval").rows
        lines = [json.dumps(source[i], ensure_ascii=False) + "\n" for i in rows]
        write_text(out, "".join(lines))
    root = Path(image_root or Path(path).parent).resolve()
    hint = ""
    if Path(out).parent.resolve() != root:
        hint = f"; its image paths still start at --image_root {root}"
    print0(f"{len(rows)} rows in {out}{hint}")


def rows_in_band(records, low, high):
    """Return the rows of the file whose pass rate over their rollouts is from `low` to `high`."""
    kept = []
    for record in records:
        known = known_of(record["accuracy"])
        if known and low <= mean(known) <= high:
            kept.append(record["row"])
    return kept


def show(one, number):
    """Print the first responses of a policy to a file, with question and right answer."""
    for record in one.records[:number]:
        example = one.data[record["row"]]
        print(f"--- {one.what['policy']}, {one.what['mode']}, {record['where']}")
        print(example.messages[-1]["content"])
        print(f"--- right is {example.answer!r}; the response:")
        print(record["text"][0])
    print("---")


def write_rollouts(path, evaluated):
    lines = []
    for one in evaluated:
        for record in one.records:
            lines.append(to_json({**one.what, **record}, ensure_ascii=False) + "\n")
    write_text(path, "".join(lines))


# ----------------------------------------------------------------------------- the judge
def grade(evaluated, grader, args):
    """
    Let the judge decide about what the rules leave open: the records' accuracy changes in place,
    and is None where there is no verdict; `decided_by` says who decided.

    Returns what is to be reported of the judge.
    """
    open_ones = []  # (record, number of the response, claim)
    decided = {}  # claim -> whether it is right by the rules
    for one in evaluated:
        for record in one.records:
            example = one.data[record["row"]]
            record["decided_by"] = ["rules"] * len(record["text"])
            for k, text in enumerate(record["text"]):
                left = left_open(text, example)
                if left is not None:
                    open_ones.append((record, k, claim_of(example, left)))
                elif record["format"][k]:
                    answer = parts(text)["answer"]
                    decided[claim_of(example, answer)] = bool(record["accuracy"][k])

    verdicts = grader.verdicts([claim for _, _, claim in open_ones])
    for record, k, claim in open_ones:
        verdict = verdicts[claim]
        record["accuracy"][k] = None if verdict is None else float(verdict)
        record["decided_by"][k] = "nobody" if verdict is None else "judge"
    report = {"model": args.judge, "responses": len(open_ones), "answers": len(verdicts)}
    if args.judge_agreement:
        report["agreement"] = agreement(decided, grader, args.judge_agreement, args.seed)
    return report | {"requests": dict(grader.api.requests)}


def shares_of_judge(records):
    """Shares of all responses: graded by the judge, and by nobody."""
    deciders = [decider for record in records for decider in record["decided_by"]]
    return {
        "judged": mean([decider == "judge" for decider in deciders]),
        "ungraded": mean([decider == "nobody" for decider in deciders]),
    }


# ----------------------------------------------------------------------------- the run
@dataclass
class Evaluated:
    """A policy on a file in one mode."""

    what: dict  # policy, data, mode; step of a checkpoint of --all_steps
    data: Data
    mode: Mode
    records: list  # engine.evaluation.evaluate's
    left_out: dict  # reason -> rows


def checkpoints_of(args):
    """{checkpoint to evaluate: its step, None without --all_steps}, in the order of --policy."""
    if not args.all_steps:
        return dict.fromkeys(args.policy)
    found = {}
    for run in args.policy:
        for step, folder in kept_steps(run):
            found[str(folder)] = step
    return found


def sample(args, modes, ranks):
    """Evaluate each policy on each file in each mode. All ranks call it, and have all of it."""
    dtype = args.dtype
    if dtype == "auto":
        dtype = "bfloat16" if ranks.device.type == "cuda" else "float32"
    evaluated = []
    for name, step in checkpoints_of(args).items():
        policy = load(
            name,
            getattr(torch, dtype),
            ranks.device,
            max_prompt_tokens=args.max_prompt,
            max_pixels=args.max_pixels,
            max_side=args.max_side,
        )
        for path in args.data:
            data = read(path, "eval", args.image_root, args.max_bad, args.workers)
            by_mode = evaluate(
                policy.hf, policy.encoder, data, measure, args, ranks, modes, args.limit, args.slots
            )
            left_out = left_out_of(data)
            for mode in modes:
                what = {"policy": name, "data": path, "mode": mode.name}
                if step is not None:
                    what["step"] = step
                evaluated.append(Evaluated(what, data, mode, by_mode[mode.name], left_out))
            if left_out:
                print0(f"{path}: left out {sum(left_out.values())} rows: {left_out}")
    return evaluated


def main(args):
    grader = None
    if args.judge and is_first_rank():
        grader = Grader(args)
        grader.try_out()
    sampled = Mode(f"T={args.temperature:g}", args.samples, args.temperature)
    modes = []
    if args.greedy:
        modes.append(GREEDY)
    if args.samples:
        modes.append(sampled)
    ranks = setup(args)
    evaluated = sample(args, modes, ranks)
    content = {"args": asdict(args), **provenance()}
    ranks.close()  # the others need not wait for the judge
    if not is_first_rank():
        return []

    if args.rollouts_out:
        write_rollouts(args.rollouts_out, evaluated)
    if grader:
        content["judge"] = grade(evaluated, grader, args)
        grader.api.close()
        print(f"judge: {content['judge']}")
        if args.rollouts_out:  # once more, with its verdicts; a kill before that loses no response
            write_rollouts(args.rollouts_out, evaluated)
    pass_at = [k for k in args.pass_at if k <= args.samples]
    results = []
    for one in evaluated:
        if args.show:
            show(one, args.show)
        summary = summarise(one.records, pass_at if one.mode is sampled else ())
        if grader:
            summary |= shares_of_judge(one.records)
        results.append({**one.what, **summary, "left_out": one.left_out})
        if args.filter and one.mode is sampled:
            kept = rows_in_band(one.records, *args.filter)
            unknown = sum(1 for record in one.records if not known_of(record["accuracy"]))
            if unknown:
                print(f"{unknown} rows are not kept: the judge graded none of their responses")
            write_rows(one.data.path, kept, args.filter_out, args.image_root)

    print(table(results))
    if args.all_steps:
        print(curves(results))
    if args.out:
        write_text(args.out, to_json(content | {"results": results}, indent=1))
    if grader and grader.fault:
        raise SystemExit(f"the judge was given up, the rest is ungraded: {grader.fault}")
    return results


if __name__ == "__main__":
    main(parse(Args))
