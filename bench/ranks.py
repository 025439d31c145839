"""
Claim: no rank idles. Rollouts are dealt out row by row, packs evenly by tokens.

    python bench/ranks.py          # 1, 2, 4, 8 ranks on the paper's shapes; lengths alone, no model

Prints the largest rank's share of a step's sampled and of its trained tokens, over the mean rank's:
the median and the largest of --steps draws. Lengths are log-normal: prompts differ by --between,
the rollouts of one prompt by --within (standard deviations of the logarithm). Rows cannot be cut:
beside the sampled tokens stands the longest row, as a share of the mean rank's tokens. `idle` is
the share of ranks without a row, `groups` the same as `sampled` for whole groups on one rank.
"""

import argparse
import random
from types import SimpleNamespace

import torch
from measure import median, report

from engine.packs import Tree, plan

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


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--response", type=int, default=1000, help="mean tokens")
    parser.add_argument("--prompt", type=int, default=1000, help="tokens, of an image too")
    parser.add_argument("--limit", type=int, default=6144, help="of a response")
    parser.add_argument("--between", type=float, default=0.5)
    parser.add_argument("--within", type=float, default=0.25)
    parser.add_argument("--pack_tokens", type=int, default=16384)
    parser.add_argument("--steps", type=int, default=50)
    cli = parser.parse_args()
    shares = {}
    for shape in SHAPES:
        shares[shape] = {ranks: figures(shape, ranks, cli) for ranks in (1, 2, 4, 8)}
    report("ranks", over_the_mean=shares, **vars(cli))
