"""
Evaluation: responses to the rows of a file, measured and summarised. eval.py does it with
checkpoints, the stages with the policy that they train (--eval_data).

What is known of a response is the business of `measure`, which is passed in (rewards.measure).
"""

from __future__ import annotations

import math
import os
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from engine.inspection import image_digests, question_digest
from engine.progress import Bar
from engine.ranks import gather, is_main, print0
from engine.rows import BadRow
from engine.sampler import all_rows, generate

SEARCHED = 20_000  # training rows, at most, among which held-out ones are looked for


@dataclass(frozen=True)
class Mode:
    """One way of decoding."""

    name: str  # in the results
    samples: int  # per prompt
    temperature: float  # 0: greedy


GREEDY = Mode("greedy", 1, 0.0)


# ----------------------------------------------------------------------------- responses, measured
def evaluate(hf, encoder, data, measure, args, ranks, modes=(GREEDY,), limit=0, slots=256):
    """
    Evaluate a model on a file in each of `modes`. All ranks call it.

    hf: the transformers model that samples, as for engine.sampler.generate.
    data: the file, opened by data.read(path, "eval"). Rows that cannot be used are left out.
    measure(example, rollout, text): {name: value} of all that is known of a response.
    args: those of any stage; only `seed`, `max_response` and `pack_tokens` are used.
    limit: rows of the file, from its start; 0 means all.
    slots: rows decoded at once, per device.

    Returns {name of the mode: a record of each row, in the file's order} on every rank. A record
    holds, under each of the measured names, a list of one value per response; `row` and `where`.
    """
    records = {mode.name: [] for mode in modes}
    mine = own_rows(data, limit, ranks)
    # so many prompts at once keep the slots busy
    chunk = max(8, 4 * slots // max(mode.samples for mode in modes))
    with Bar(len(mine), f"evaluating {Path(data.path).name}") as bar:
        for start in range(0, len(mine), chunk):
            part = mine[start : start + chunk]
            prompts = data.fetch(part, encoder.prompt)
            for mode in modes:
                found = sample_and_measure(hf, encoder, prompts, measure, args, mode, slots)
                records[mode.name] += found
            bar.update(len(part))
    everywhere = gather(records)
    merged = {}
    for mode in modes:
        of_all_ranks = [record for part in everywhere for record in part[mode.name]]
        merged[mode.name] = sorted(of_all_ranks, key=lambda record: record["row"])
    return merged


def own_rows(data, limit, ranks):
    """This rank's rows of the first `limit` of a file (0: of all), dealt out one by one."""
    return range(ranks.rank, min(limit or len(data), len(data)), ranks.world)


def sample_and_measure(hf, encoder, prompts, measure, args, mode, slots):
    """Return the record of each of the prompts."""
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
        records.append(record_of(prompt.example, own, texts, measure))
    return records


def record_of(example, rollouts, texts, measure):
    """Return the record of a row and its responses: see `evaluate`."""
    record = {}
    for rollout, text in zip(rollouts, texts, strict=True):
        for name, value in measure(example, rollout, text).items():
            record.setdefault(name, []).append(value)
    return record | {"row": example.row, "where": example.where}


def left_out_of(data):
    """Return {reason: rows that were left out}, over all ranks. All ranks call it."""
    left_out = Counter()
    for skipped in gather(dict(data.skipped)):
        left_out.update(skipped)
    return dict(left_out)


# ----------------------------------------------------------------------------- what is measured
def summarise(records, pass_at=()):
    """
    Return the means of `evaluate`'s records over all responses, and over the prompts pass@k for
    each k of `pass_at`. A mean is NaN where there is nothing to take it of. A response of which
    nobody knows whether it is right (its accuracy is None) counts in neither.
    """
    summary = {"prompts": len(records), "accuracy": mean_of(records, "accuracy")}
    for k in pass_at:
        rates = []
        for record in records:
            known = known_of(record["accuracy"])
            if len(known) >= k:
                rates.append(pass_at_k(len(known), int(sum(known)), k))
        summary[f"pass@{k}"] = mean(rates)
    summary["format"] = mean_of(records, "format")
    summary["length"] = mean_of(records, "length")
    summary["truncated"] = mean([s == "length" for record in records for s in record["stop"]])
    of_parts = ("items", "reference_items", "steps", "reference_steps")
    for name in (*of_parts, "same_caption", "same_reasoning"):
        summary[name] = mean_of(records, name)
    return summary


def mean_of(records, name):
    return mean([value for record in records for value in known_of(record[name])])


def known_of(values):
    return [value for value in values if value is not None]


def mean(values):
    if not values:
        return math.nan
    return sum(float(value) for value in values) / len(values)


def pass_at_k(n, right, k):
    """
    Return the chance that k of n rollouts, drawn without replacement, hold one of the `right` ones
    (arXiv 2107.03374).
    """
    return 1.0 - math.comb(n - right, k) / math.comb(n, k)


# ----------------------------------------------------------------------------- while training
def validation_is_due(args, step, steps):
    """Whether a run of so many steps validates after `step` updates."""
    if not args.eval_data:
        return False
    regular = args.eval_every > 0 and step % args.eval_every == 0
    return regular or step in (0, steps)


def validate(hf, encoder, data, measure, args, ranks):
    """
    Metrics of the policy's greedy responses to the first --eval_rows rows of the held-out file
    `data`. All ranks call it. It draws no random number: the run goes on as it would without.
    """
    begin = time.perf_counter()
    records = evaluate(
        hf, encoder, data, measure, args, ranks, limit=args.eval_rows, slots=args.slots
    )
    found = summarise(records[GREEDY.name])
    return {
        "eval/accuracy": found["accuracy"],
        "eval/format": found["format"],
        "eval/length": found["length"],
        "eval/truncated": found["truncated"],
        "eval/items": found["items"],
        "eval/steps": found["steps"],
        "eval/prompts": found["prompts"],
        "eval/seconds": time.perf_counter() - begin,
    }


def warn_of_overlap(held_out, data, args):
    """
    Say how many of the rows to validate on are training rows too: of the same file, or the same
    question with the same images. Of `data` it looks at SEARCHED rows at most, spread evenly.
    """
    if not is_main():
        return
    rows = range(min(args.eval_rows or len(held_out), len(held_out)))
    stride = math.ceil(len(data) / SEARCHED)
    if os.path.samefile(held_out.path, data.path):
        shared = set(rows)
    else:
        shared = shared_rows(held_out, rows, data, range(0, len(data), stride))
    if shared:
        first = f"{held_out.path}:{min(shared) + 1}"
        searched = "" if stride == 1 else f", of which 1 row in {stride} was looked at"
        print0(
            f"warning: {len(shared)} of the {len(rows)} rows to validate on are trained on as "
            f"well, first {first} ({data.path}{searched})"
        )


def shared_rows(held_out, rows, data, others):
    """Those of the `rows` of a file whose question and images a row of `others` in `data` has."""
    wanted = {}  # question -> {digest of its images: row}
    for example in good_rows(held_out, rows):
        digests = wanted.setdefault(question_digest(example), {})
        digests[image_digests(example)] = example.row
    shared = set()
    for example in good_rows(data, others):
        same_question = wanted.get(question_digest(example))
        if same_question:  # else its images are not read
            shared.add(same_question.get(image_digests(example)))
    return shared - {None}


def good_rows(data, rows):
    for i in rows:
        try:
            yield data[i]
        except BadRow:  # counted where it is used
            continue
