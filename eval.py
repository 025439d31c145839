r"""
Evaluation of checkpoints on files with answers: is a response right, is it well-formed, and does
it look like the references?

1. Sample one response per prompt greedily, and `--samples` rollouts per prompt at `--temperature`.
   The prompts are dealt out over the ranks; the responses are the same on any number of them.
2. Judge each response by rewards.py: accuracy and format. From them follow pass@k without bias, the
   tokens per response, and the share of responses that were cut at `--max_response`.
3. Measure the drift: items per caption and steps per reasoning of the well-formed responses, beside
   those of the references where the file has them, and the share of captions that are the
   reference's word by word.

    python eval.py --policy ckpt/sft/last --data test.jsonl hard.jsonl --samples 8 --out eval.json
    python eval.py --policy ckpt/rlvr --all_steps --data test.jsonl   # a run's kept checkpoints

For stage 3, keep the prompts that the policy solves sometimes:

    torchrun --nproc_per_node=8 eval.py --policy ckpt/align/last --data rl.parquet --no-greedy \
        --samples 16 --filter 0.2 0.8 --filter_out rl_filtered.parquet
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import torch

from data import read
from engine.arguments import check, option, parse
from engine.checkpoint import kept_steps
from engine.evaluation import GREEDY, Mode, evaluate, left_out_of, mean, summarise
from engine.log import provenance
from engine.ranks import is_main, print0, setup
from model import load
from rewards import judge


@dataclass(kw_only=True)
class Args:
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
        None, "of one image, larger ones are scaled down; none: the image processor's own limit"
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
    slots: int = option(256, "rows decoded at once, per device", least=1)
    pack_tokens: int = option(16384, "of one prefill, per device", least=1)
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

    def check_filter(self):
        several = self.all_steps or len(self.policy) != 1
        if self.samples < 1 or len(self.data) != 1 or several:
            needed = "--samples of 1 or more, one --policy and one file in --data"
            raise ValueError(f"--filter needs {needed}")
        (data,) = self.data
        if is_parquet(data) != is_parquet(self.filter_out):
            form = "both end in .parquet, or neither"
            raise ValueError(f"--filter_out keeps the form of {data}: {form}")


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


def write_text(path, text):
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text(text, encoding="utf-8")


def write_rows(path, rows, out, image_root=None):
    """
    Copy rows (indices) of the data file `path` to the file `out`; parquet stays parquet. Image
    paths are copied as they are: where `out` is in another folder, the printed line says from
    where they start.
    """
    if is_parquet(out):
        import pyarrow.parquet as pq

        Path(out).parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(pq.read_table(path).take(rows), out)
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
        if low <= mean(record["accuracy"]) <= high:
            kept.append(record["row"])
    return kept


def checkpoints_of(args):
    """{checkpoint to evaluate: its step, None without --all_steps}, in the order of --policy."""
    if not args.all_steps:
        return dict.fromkeys(args.policy)
    found = {}
    for run in args.policy:
        for step, folder in kept_steps(run):
            found[str(folder)] = step
    return found


def main(args):
    ranks = setup(args)
    dtype = args.dtype
    if dtype == "auto":
        dtype = "bfloat16" if ranks.device.type == "cuda" else "float32"
    sampled = Mode(f"T={args.temperature:g}", args.samples, args.temperature)
    modes = []
    if args.greedy:
        modes.append(GREEDY)
    if args.samples:
        modes.append(sampled)
    pass_at = [k for k in args.pass_at if k <= args.samples]

    results = []
    rollouts = []
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
            data = read(path, "eval", args.image_root, args.max_bad)
            by_mode = evaluate(
                policy.hf, policy.encoder, data, judge, args, ranks, modes, args.limit, args.slots
            )
            left_out = left_out_of(data)
            for mode in modes:
                records = by_mode[mode.name]
                what = {"policy": name, "data": path, "mode": mode.name}
                if step is not None:
                    what["step"] = step
                summary = summarise(records, pass_at if mode is sampled else ())
                results.append({**what, **summary, "left_out": left_out})
                rollouts += [{**what, **record} for record in records]
            if args.filter and is_main():
                kept = rows_in_band(by_mode[sampled.name], *args.filter)
                write_rows(data.path, kept, args.filter_out, args.image_root)
            if left_out:
                print0(f"{path}: left out {sum(left_out.values())} rows: {left_out}")

    print0(table(results))
    if args.all_steps:
        print0(curves(results))
    if args.out and is_main():
        content = {"args": asdict(args), **provenance(), "results": results}
        write_text(args.out, json.dumps(content, indent=1))
    if args.rollouts_out and is_main():
        lines = [json.dumps(rollout, ensure_ascii=False) + "\n" for rollout in rollouts]
        write_text(args.rollouts_out, "".join(lines))
    ranks.close()
    return results


if __name__ == "__main__":
    main(parse(Args))
