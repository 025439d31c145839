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

For stage 3, keep the prompts that the policy solves sometimes:

    torchrun --nproc_per_node=8 eval.py --policy ckpt/align/last --data rl.parquet --no-greedy \
        --samples 16 --filter 0.2 0.8 --filter_out rl_filtered.parquet
"""

from __future__ import annotations

import json
import math
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import torch
from tqdm import tqdm

from data import count_items, count_steps, parts, read
from engine.arguments import check, option, parse
from engine.log import provenance
from engine.ranks import gather, is_main, print0, setup
from engine.sampler import all_rows, generate
from model import load
from rewards import verify


@dataclass(kw_only=True)
class Args:
    policy: tuple[str, ...] = option(
        help="checkpoints: Qwen3-VL folders in transformers layout, run folders, or hub names"
    )
    data: tuple[str, ...] = option(
        help="files with answers, in any of the formats or as benchmarks are published"
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
        if self.samples < 1 or len(self.data) != 1 or len(self.policy) != 1:
            needed = "--samples of 1 or more, one --policy and one file in --data"
            raise ValueError(f"--filter needs {needed}")
        (data,) = self.data
        if is_parquet(data) != is_parquet(self.filter_out):
            form = "both end in .parquet, or neither"
            raise ValueError(f"--filter_out keeps the form of {data}: {form}")


@dataclass(frozen=True)
class Mode:
    """One way of decoding."""

    name: str  # in the results
    samples: int  # per prompt
    temperature: float  # 0: greedy


GREEDY = Mode("greedy", 1, 0.0)


# ----------------------------------------------------------------------------- what is measured
def pass_at_k(n, right, k):
    """
    Return the chance that k of n rollouts, drawn without replacement, hold one of the `right` ones
    (arXiv 2107.03374).
    """
    return 1.0 - math.comb(n - right, k) / math.comb(n, k)


def judge(example, rollouts, texts):
    """
    Return a record of all that is known of a prompt's rollouts: {name: [a value per rollout]}, None
    where a value has no meaning. What is known of the reference stands in lists of one value, which
    are empty where there is no reference.
    """
    reference = parts(example.response or "")
    record = {
        "accuracy": [],
        "format": [],
        "length": [],  # tokens
        "stop": [],  # "end" or "length"
        "text": [],
        "items": [],  # of the caption
        "steps": [],  # of the reasoning
        "same_caption": [],  # as the reference's, up to white space
    }
    for rollout, text in zip(rollouts, texts, strict=True):
        verdict = verify(text, example)
        written = parts(text)  # None: malformed
        record["accuracy"].append(verdict["accuracy"])
        record["format"].append(verdict["format"])
        record["length"].append(len(rollout.ids))
        record["stop"].append(rollout.stop)
        record["text"].append(text)
        record["items"].append(count_items(written["caption"]) if written else None)
        record["steps"].append(count_steps(written["think"]) if written else None)
        record["same_caption"].append(same_caption(written, reference))
    record["reference_items"] = [count_items(reference["caption"])] if reference else []
    record["reference_steps"] = [count_steps(reference["think"])] if reference else []
    record["row"] = example.row
    record["where"] = example.where
    return record


def same_caption(written, reference):
    """Is the caption the reference's, word by word? None where there is no reference."""
    if not reference:
        return None
    if not written:
        return False
    return written["caption"].split() == reference["caption"].split()


def summarise(records, pass_at=()):
    """
    Return the means over all rollouts of `judge`'s records, and over the prompts pass@k for each k
    of `pass_at`. A mean is NaN where there is nothing to take it of.
    """
    summary = {"prompts": len(records), "accuracy": mean_of(records, "accuracy")}
    for k in pass_at:
        rates = []
        for record in records:
            right = int(sum(record["accuracy"]))
            rates.append(pass_at_k(len(record["accuracy"]), right, k))
        summary[f"pass@{k}"] = mean(rates)
    summary["format"] = mean_of(records, "format")
    summary["length"] = mean_of(records, "length")
    summary["truncated"] = mean([s == "length" for record in records for s in record["stop"]])
    for name in ("items", "reference_items", "steps", "reference_steps", "same_caption"):
        summary[name] = mean_of(records, name)
    return summary


def mean_of(records, name):
    return mean([value for record in records for value in record[name] if value is not None])


def mean(values):
    if not values:
        return math.nan
    return sum(float(value) for value in values) / len(values)


# ----------------------------------------------------------------------------- the run
def evaluate(hf, encoder, data, args, ranks, modes=(GREEDY,), limit=0, slots=256):
    """
    Evaluate a model on a file in each of `modes`, for instance while it is trained. All ranks call
    it.

    hf: the transformers model that samples, as for engine.sampler.generate.
    data: the file, opened by data.read(path, "eval"). Rows that cannot be used are left out.
    args: those of any stage; only `seed`, `max_response` and `pack_tokens` are used.
    limit: rows of the file, from its start; 0 means all.
    slots: rows decoded at once, per device.

    Returns {name of the mode: `judge`'s records of all ranks, in the file's order} on every rank.
    """
    records = {mode.name: [] for mode in modes}
    rows = min(limit or len(data), len(data))
    own_rows = range(ranks.rank, rows, ranks.world)
    # so many prompts at once keep the slots busy
    chunk = max(8, 4 * slots // max(mode.samples for mode in modes))
    starts = range(0, len(own_rows), chunk)
    # tqdm's None: a bar only where somebody looks at a terminal
    hidden = None if is_main() else True
    for start in tqdm(starts, Path(data.path).name, disable=hidden):
        prompts = data.fetch(own_rows[start : start + chunk], encoder.prompt)
        for mode in modes:
            found = sample_and_judge(hf, encoder, prompts, args, mode, slots)
            records[mode.name] += found
    everywhere = gather(records)
    merged = {}
    for mode in modes:
        of_all_ranks = [record for part in everywhere for record in part[mode.name]]
        merged[mode.name] = sorted(of_all_ranks, key=lambda record: record["row"])
    return merged


def sample_and_judge(hf, encoder, prompts, args, mode, slots):
    """Return `judge`'s record of each of the prompts."""
    rollouts = generate(
        hf,
        prompts,
        all_rows(prompts, mode.samples),
        args.max_response,
        eos=encoder.eos_ids,
        banned=encoder.banned,
        temperature=mode.temperature,
        seeds=[(args.seed, prompt.example.row) for prompt in prompts],
        slots=slots,
        pack_tokens=args.pack_tokens,
    )
    records = []
    for p, prompt in enumerate(prompts):
        own = rollouts[p * mode.samples : (p + 1) * mode.samples]
        texts = [encoder.decode(rollout.ids) for rollout in own]
        records.append(judge(prompt.example, own, texts))
    return records


def left_out_of(data):
    """Return {reason: rows that were left out}, over all ranks. All ranks call it."""
    left_out = Counter()
    for skipped in gather(dict(data.skipped)):
        left_out.update(skipped)
    return dict(left_out)


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
    for name in args.policy:
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
                policy.hf, policy.encoder, data, args, ranks, modes, args.limit, args.slots
            )
            left_out = left_out_of(data)
            for mode in modes:
                records = by_mode[mode.name]
                what = {"policy": name, "data": path, "mode": mode.name}
                summary = summarise(records, pass_at if mode is sampled else ())
                results.append({**what, **summary, "left_out": left_out})
                rollouts += [{**what, **record} for record in records]
            if args.filter and is_main():
                kept = rows_in_band(by_mode[sampled.name], *args.filter)
                write_rows(path, kept, args.filter_out, args.image_root)
            if left_out:
                print0(f"{path}: left out {sum(left_out.values())} rows: {left_out}")

    print0(table(results))
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
