"""
Evaluation of checkpoints on files with answers: is it right, is it well-formed, does it look like the references?

1. Sample greedily, and `--samples` rollouts per prompt at `--temperature`; ranks share the prompts.
2. Accuracy and format by rewards.py, pass@k without bias, tokens, share of rollouts cut at `--max_response`.
3. Drift: items per caption and steps per reasoning of well-formed rollouts, beside those of the references where the
   file has them, and the share of captions that are the reference's word by word.

    python eval.py --policy ckpt/sft/last --data test.jsonl hard.jsonl --samples 8 --out out/sft.json
    torchrun --nproc_per_node=8 eval.py --policy ckpt/align/last --data rl.parquet --no-greedy --samples 16 \
        --filter 0.05 0.95 --filter_out rl_filtered.parquet       # for stage 3: prompts that are sometimes solved
"""

from __future__ import annotations

import itertools
import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import torch
from tqdm import tqdm

from data import count_items, count_steps, read
from engine.arguments import parse
from engine.log import provenance
from engine.ranks import gather, is_main, print0, setup
from engine.sampler import generate
from model import load
from rewards import parts, score


@dataclass(kw_only=True)
class Args:
    policy: tuple[
        str, ...
    ]  # checkpoints: Qwen3-VL folders in transformers layout, run folders, or hub names
    data: tuple[
        str, ...
    ]  # files with answers, in any of the formats or as benchmarks are published (benchmarks.py)
    out: str = ""  # JSON file for the results
    rollouts_out: str = ""  # JSONL file for every rollout
    limit: int = 0  # rows of each file, from its start; 0: all
    greedy: bool = True  # evaluate greedy decoding
    samples: int = 0  # rollouts per prompt to evaluate at --temperature
    temperature: float = 1.0  # of the samples
    pass_at: tuple[int, ...] = (1, 4, 8, 16)  # the k of pass@k, up to --samples
    filter: tuple[float, float] | None = (
        None  # keep the rows whose pass rate over the samples is from LOW to HIGH
    )
    filter_out: str = (
        ""  # file for the rows that --filter keeps: .parquet if the data is, else .jsonl
    )
    seed: int = 0  # of the samples, which are the same on any number of ranks
    max_prompt: int = (
        2048  # tokens, image tokens included; longer prompts are left out and counted, never cut
    )
    max_response: int = 6144  # tokens, end token included
    max_pixels: int | None = (
        None  # of one image, larger ones are scaled down; none: the image processor's own limit
    )
    max_bad: int = 100  # rows of a file that cannot be used; with more of them the run stops
    image_root: str | None = (
        None  # folder that image paths are relative to and stay in; none: the data file's
    )
    slots: int = 256  # rows decoded at once, per device
    pack_tokens: int = 16384  # of one prefill, per device
    config: str = (
        ""  # JSON file of arguments, as an earlier --out, which is run again; flags given here win
    )
    device: Literal["auto", "cpu", "cuda"] = "auto"  # auto: cuda where there is one
    dtype: Literal["auto", "float32", "bfloat16"] = (
        "auto"  # auto: bfloat16 on cuda, float32 on a CPU
    )

    def __post_init__(self):
        if not self.greedy and self.samples < 1:
            raise ValueError("nothing to do: --no-greedy needs --samples of 1 or more")
        if not self.temperature > 0:
            raise ValueError(
                f"--temperature is {self.temperature}: it must be above 0 (greedy decoding: --greedy)"
            )
        if (self.filter is None) != (not self.filter_out):
            raise ValueError("--filter LOW HIGH and --filter_out FILE come together")
        if self.filter and (self.samples < 1 or len(self.data) != 1 or len(self.policy) != 1):
            raise ValueError(
                "--filter needs --samples of 1 or more, one --policy and one file in --data"
            )
        if self.filter and (Path(self.data[0]).suffix == ".parquet") != (
            Path(self.filter_out).suffix == ".parquet"
        ):
            raise ValueError(
                f"--filter_out keeps the form of {self.data[0]}: both end in .parquet, or neither"
            )


# ----------------------------------------------------------------------------- what is measured
def pass_at_k(n, right, k):
    """Chance that k of n rollouts, drawn without replacement, hold one of the `right` ones (arXiv 2107.03374)."""
    return 1.0 - math.comb(n - right, k) / math.comb(n, k)


def judge(example, rollouts, texts):
    """All that is known of a prompt's rollouts: {name: [value per rollout]}; None where a value has no meaning."""
    reference, each = parts(example.response or ""), []
    for rollout, text in zip(rollouts, texts, strict=True):
        rewards, written = (
            score(text, example.answer, example.choices, example.equivalent),
            parts(text),
        )
        each.append(
            {
                "accuracy": rewards["accuracy"],
                "format": rewards["format"],
                "length": len(rollout.ids),
                "stop": rollout.stop,
                "text": text,
                "items": count_items(written[0]) if written else None,
                "steps": count_steps(written[1]) if written else None,
                "same_caption": bool(written and written[0].split() == reference[0].split())
                if reference
                else None,
            }
        )
    record = {name: [one[name] for one in each] for name in each[0]}
    record["reference_items"] = [count_items(reference[0])] if reference else []
    record["reference_steps"] = [count_steps(reference[1])] if reference else []
    return record | {"row": example.row, "where": example.where}


def summarise(records, pass_at=()):
    """Means over all rollouts of `judge`'s records; NaN where there is nothing to take a mean of."""

    def mean(name):
        values = [float(v) for record in records for v in record[name] if v is not None]
        return sum(values) / len(values) if values else math.nan

    result = {"prompts": len(records), "accuracy": mean("accuracy")}
    for k in pass_at:
        rates = [pass_at_k(len(r["accuracy"]), int(sum(r["accuracy"])), k) for r in records]
        result[f"pass@{k}"] = sum(rates) / len(rates) if rates else math.nan
    stops = [stop for record in records for stop in record["stop"]]
    result |= {"format": mean("format"), "length": mean("length")}
    result["truncated"] = stops.count("length") / len(stops) if stops else math.nan
    names = ("items", "reference_items", "steps", "reference_steps", "same_caption")
    return result | {name: mean(name) for name in names}


# ----------------------------------------------------------------------------- the run
def evaluate(policy, path, args, ranks):
    """Of one file: {mode: records of all ranks in the file's order}, {reason: rows left out}. All ranks."""
    data, encoder = read(path, "eval", args.image_root, args.max_bad), policy.encoder
    modes = {"greedy": (1, 0.0)} if args.greedy else {}
    modes |= {f"T={args.temperature:g}": (args.samples, args.temperature)} if args.samples else {}
    records = {mode: [] for mode in modes}
    mine = range(ranks.rank, min(args.limit or len(data), len(data)), ranks.world)
    chunk = max(
        8, 4 * args.slots // max(1, args.samples)
    )  # prompts at once: enough to keep the slots busy
    for start in tqdm(
        range(0, len(mine), chunk), Path(path).name, disable=None if is_main() else True
    ):
        prompts = data.fetch(mine[start : start + chunk], encoder.prompt)
        numbers = [prompt.example.row for prompt in prompts]
        for mode, (n, temperature) in modes.items():
            groups = generate(
                policy.hf,
                prompts,
                n,
                args.max_response,
                eos=encoder.eos_ids,
                banned=encoder.banned,
                temperature=temperature,
                seed=(args.seed,),
                numbers=numbers,
                slots=args.slots,
                pack_tokens=args.pack_tokens,
            )
            for prompt, group in zip(prompts, groups, strict=True):
                records[mode].append(
                    judge(prompt.example, group, [encoder.decode(r.ids) for r in group])
                )
    left_out = {}
    for reason, count in (
        item for skipped in gather(dict(data.skipped)) for item in skipped.items()
    ):
        left_out[reason] = left_out.get(reason, 0) + count
    everywhere = gather(records)
    return {
        m: sorted((r for part in everywhere for r in part[m]), key=lambda r: r["row"])
        for m in modes
    }, left_out


def write_rows(path, rows, out, image_root=None):
    """Copy the rows (indices) of the data file `path` to the file `out`; parquet stays parquet."""
    Path(out).parent.mkdir(parents=True, exist_ok=True)
    if Path(out).suffix == ".parquet":
        import pyarrow.parquet as pq

        pq.write_table(pq.read_table(path).take(rows), out)
    else:
        source = read(path, "eval").rows
        Path(out).write_text(
            "".join(json.dumps(source[i], ensure_ascii=False) + "\n" for i in rows),
            encoding="utf-8",
        )
    root = Path(image_root or Path(path).parent).resolve()
    hint = (
        ""
        if Path(out).parent.resolve() == root
        else f"; its image paths still start at --image_root {root}"
    )
    print0(f"{len(rows)} rows in {out}{hint}")


def table(results):
    """Results as aligned text, a line for each policy, file and mode; columns without data are left out."""
    keys = [k for k in dict.fromkeys(k for r in results for k in r) if k != "left_out"]
    lines = [
        [f"{v:.3f}" if isinstance(v := r.get(k, math.nan), float) else str(v) for k in keys]
        for r in results
    ]
    columns = [
        (k, *column) for k, *column in zip(keys, *lines, strict=True) if set(column) != {"nan"}
    ]
    widths = [max(map(len, column)) for column in columns]
    return "\n".join("  ".join(map(str.rjust, line, widths)) for line in zip(*columns, strict=True))


def main(args):
    ranks = setup(args)
    dtype = {"auto": "bfloat16" if ranks.device.type == "cuda" else "float32"}.get(
        args.dtype, args.dtype
    )
    limits = {"max_prompt_tokens": args.max_prompt, "max_pixels": args.max_pixels}
    results, rollouts, policy, loaded = [], [], None, None
    for name, path in itertools.product(args.policy, args.data):
        if name != loaded:
            policy, loaded = load(name, getattr(torch, dtype), ranks.device, **limits), name
        by_mode, left_out = evaluate(policy, path, args, ranks)
        for mode, records in by_mode.items():
            ks = [k for k in args.pass_at if k <= args.samples] if mode != "greedy" else []
            what = {"policy": name, "data": path, "mode": mode}
            results.append({**what, **summarise(records, ks), "left_out": left_out})
            rollouts += [{**what, **record} for record in records]
        if args.filter and is_main():
            low, high = args.filter  # the last mode is the sampled one
            rates = {r["row"]: sum(r["accuracy"]) / len(r["accuracy"]) for r in records}
            write_rows(
                path,
                [i for i, rate in rates.items() if low <= rate <= high],
                args.filter_out,
                args.image_root,
            )
        if left_out:
            print0(f"{path}: left out {sum(left_out.values())} rows: {left_out}")
    if is_main():
        print0(table(results))
        for out, text in (
            (
                args.out,
                json.dumps({"args": asdict(args), **provenance(), "results": results}, indent=1),
            ),
            (
                args.rollouts_out,
                "".join(json.dumps(rollout, ensure_ascii=False) + "\n" for rollout in rollouts),
            ),
        ):
            if out:
                Path(out).parent.mkdir(parents=True, exist_ok=True)
                Path(out).write_text(text, encoding="utf-8")
    ranks.close()
    return results


if __name__ == "__main__":
    main(parse(Args))
