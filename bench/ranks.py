"""
Claim: no rank idles. Rollouts are dealt out row by row, packs evenly by tokens.

    python bench/ranks.py          # 1, 2, 4, 8 ranks on the paper's shapes; lengths alone, no model
    python bench/ranks.py --run    # GRPO steps of 1 and of 2 real processes on this CPU

Prints the largest rank's share of a step's sampled and of its trained tokens, over the mean rank's:
the median and the largest of --steps draws. Lengths are log-normal: prompts differ by --between,
the rollouts of one prompt by --within (standard deviations of the logarithm). Rows cannot be cut:
beside the sampled tokens stands the longest row, as a share of the mean rank's tokens. `idle` is
the share of ranks without a row, `groups` the same as `sampled` for whole groups on one rank.

With --run a model with random weights is trained by rlvr.update_policy on its own rollouts, with
one thread in each process, sharded where there are two. Medians over the steps, after the first:
seconds of a step and of its parts; how long the rank that has sampled its rows first waits for the
other; and of the first step, which is not timed, what a rank hands to each kind of collective.
"""

import argparse
import json
import os
import random
import subprocess
import sys
import time
from collections import Counter
from contextlib import nullcontext
from types import SimpleNamespace

import torch
from measure import median, model, prompt, report
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import rlvr
from engine import ranks as engine_ranks
from engine import rollouts as engine_rollouts
from engine.attention import adopt
from engine.optimiser import optimizer
from engine.packs import Tree, plan
from engine.rollouts import Group, sample_groups
from model import Policy, RolloutCopy, shard

SHAPES = {"alignment 4 x 16": (4, 16), "RLVR 32 x 16": (32, 16)}  # prompts, rollouts of each


def draw_lengths(prompts, rollouts, args, seed):
    """[[tokens of each rollout] of each prompt], about a mean of --response."""
    generator = random.Random(seed)
    lengths = []
    for _ in range(prompts):
        mean = args.response * generator.lognormvariate(0, args.between)
        of_prompt = [mean * generator.lognormvariate(0, args.within) for _ in range(rollouts)]
        lengths.append([max(16, min(args.limit, round(n))) for n in of_prompt])
    return lengths


def over_mean(tokens):
    return max(tokens) * len(tokens) / sum(tokens)


def sampled_tokens(lengths, ranks):
    """Tokens that each rank samples, its rows being every `ranks`-th of all."""
    rows = [n for of_prompt in lengths for n in of_prompt]
    return [sum(rows[rank::ranks]) for rank in range(ranks)]


def trained_tokens(lengths, prompt, args, ranks):
    """Tokens of each rank's packs, the repeated prompts of split groups included."""
    root = SimpleNamespace(ids=torch.zeros(prompt))
    trees = [Tree(root, [[0] * n for n in of_prompt]) for of_prompt in lengths]
    tokens = []
    for pack in plan(trees, args.pack_tokens, ranks):
        rows = sum(len(trees[t].children[c]) for t, children in pack for c in children)
        tokens.append(prompt * len(pack) + rows)
    return [sum(tokens[rank::ranks]) for rank in range(ranks)]


def figures(shape, ranks, args):
    prompts, rollouts = SHAPES[shape]
    found = {name: [] for name in ("sampled", "longest row", "trained", "groups")}
    for seed in range(args.steps):
        lengths = draw_lengths(prompts, rollouts, args, seed)
        total = sum(map(sum, lengths))
        found["sampled"].append(over_mean(sampled_tokens(lengths, ranks)))
        found["longest row"].append(max(map(max, lengths)) * ranks / total)
        found["trained"].append(over_mean(trained_tokens(lengths, args.prompt, args, ranks)))
        found["groups"].append(over_mean([sum(map(sum, lengths[r::ranks])) for r in range(ranks)]))
    line = {name: [median(values), max(values)] for name, values in found.items()}
    line["idle"] = max(0, ranks - prompts * rollouts) / ranks
    return line


# ----------------------------------------------------------------------------- real processes
PROMPTS = 8
GROUP = 8
MEAN_LENGTH = 64  # tokens of a rollout
COLLECTIVES = ("c10d", "_c10d_functional")  # where torch keeps them


class Encoder:
    """What the sampler asks of an encoder, for a model without a tokenizer."""

    def __init__(self, vocabulary):
        self.banned = tuple(range(vocabulary - 8, vocabulary))  # marks of images
        # Random weights end nowhere: of V about equally likely ids so many are taken for ends.
        self.eos_ids = tuple(range(3, 3 + vocabulary // MEAN_LENGTH))

    def decode(self, ids):
        return " ".join(map(str, ids))


class Sent(TorchDispatchMode):
    """Counts the bytes that this rank hands to torch's collectives, by the collective's name."""

    def __init__(self):
        super().__init__()
        self.bytes = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        namespace, name = func.name().split("::")
        is_collective = namespace in COLLECTIVES and not name.startswith(("wait", "_wrap"))
        if is_collective:
            # Those of c10d take a tensor for the result first, where it is another one.
            place = 1 if namespace == "c10d" and "allreduce" not in name else 0
            tensors = [x for x in tree_leaves(args[place]) if isinstance(x, torch.Tensor)]
            self.bytes[name.strip("_")] += sum(x.numel() * x.element_size() for x in tensors)
        return func(*args, **kwargs or {})


def reward(text, example):
    """A verdict that teaches nothing, and differs from rollout to rollout."""
    return {"reward": float(len(text) % 2), "accuracy": 0.0, "format": 0.0}


def train(steps):
    """GRPO steps of this process, one of torchrun's -> prints figures of each step."""
    args = rlvr.Args(
        data="none",
        policy="none",
        out="none",
        group_size=GROUP,
        prompts_per_step=PROMPTS,
        max_response=8 * MEAN_LENGTH,
        pack_tokens=4096,
        device="cpu",
    )
    ranks = engine_ranks.setup(args)
    hf = model("small")
    adopt(hf.model)
    policy = Policy(hf, Encoder(hf.config.text_config.vocab_size), ".")
    prompts = [prompt(hf, 64, 16, number) for number in range(PROMPTS)]
    sampler = RolloutCopy(policy, args, ranks.device)
    shard(policy, policy.hf.model, args, ranks)
    opt = optimizer(policy, 1e-6, 0.0)
    sent = Sent()
    sampled_at = []  # when this rank had sampled its own rows
    generate = engine_rollouts.generate

    def timed_generate(*arguments, **options):
        found = generate(*arguments, **options)
        sampled_at.append(time.perf_counter())
        return found

    engine_rollouts.generate = timed_generate
    figures = []
    for step in range(steps + 1):
        engine_ranks.all_sum(1.0)  # all begin together
        with sent if step == 0 else nullcontext():
            begin = time.perf_counter()
            copy = sampler.refresh()
            refreshed = time.perf_counter()
            groups = [Group(one) for one in prompts]
            sample_groups(copy, policy.encoder, groups, reward, args, (0, step, 0))
            sampled = time.perf_counter()
            for group in groups:
                group.advantage = rlvr.group_advantage(group.verdicts["reward"], GROUP)
            metrics = rlvr.update_policy(policy, opt, groups, args, ranks.device)
            end = time.perf_counter()
        times = engine_ranks.gather(sampled_at[-1])
        if step > 0:
            figures.append(
                {
                    "step": end - begin,
                    "weights for the sampler": refreshed - begin,
                    "sampling, all ranks": sampled - refreshed,
                    "first rank's wait for rollouts": max(times) - min(times),
                    "update": end - sampled,
                    "tokens": metrics["tokens"],
                }
            )
    if engine_ranks.is_main():
        print("FIGURES", json.dumps([sent.bytes, figures]), flush=True)
    ranks.close()


def run_processes(number, steps):
    """Medians of the steps that `number` processes under torchrun make."""
    command = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={number}"]
    command += [__file__, "--train", "--steps", str(steps)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    marker = "FIGURES "
    lines = [line for line in done.stdout.splitlines() if line.startswith(marker)]
    if not lines:
        raise SystemExit(done.stdout[-2000:] + done.stderr[-3000:])
    sent, figures = json.loads(lines[0].removeprefix(marker))
    found = {name: median([of_step[name] for of_step in figures]) for name in figures[0]}
    found["megabytes"] = {name: size / 1e6 for name, size in sent.items()}
    return found


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--response", type=int, default=1000, help="mean tokens")
    parser.add_argument("--prompt", type=int, default=1000, help="tokens, of an image too")
    parser.add_argument("--limit", type=int, default=6144, help="of a response")
    parser.add_argument("--between", type=float, default=0.5)
    parser.add_argument("--within", type=float, default=0.25)
    parser.add_argument("--pack_tokens", type=int, default=16384)
    parser.add_argument("--steps", type=int, help="draws, by default 50; with --run steps, 8")
    parser.add_argument("--run", action="store_true", help="steps of 1 and of 2 real processes")
    parser.add_argument("--train", action="store_true", help=argparse.SUPPRESS)  # one of these
    cli = parser.parse_args()
    if cli.train:
        train(cli.steps)
    elif cli.run:
        found = {number: run_processes(number, cli.steps or 8) for number in (1, 2)}
        faster = found[1]["step"] / found[2]["step"]
        report("ranks, run", faster=faster, by_processes=found, prompts=PROMPTS, rollouts=GROUP)
    else:
        cli.steps = cli.steps or 50
        shares = {}
        for shape in SHAPES:
            shares[shape] = {ranks: figures(shape, ranks, cli) for ranks in (1, 2, 4, 8)}
        report("ranks", over_the_mean=shares, **vars(cli))


if __name__ == "__main__":
    main()
