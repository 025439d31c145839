"""
Claim: on a GPU packs, sampler, log-probs and whole steps of stages 2 and 3 compute what they
compute on a CPU.

    python bench/check.py --device cuda       # float32 against the CPU, then each stage in bfloat16
"""

import argparse
import contextlib
import copy
import json
import sys
import tempfile
from pathlib import Path

import states
import torch
from measure import ROOT, device_here, lengths, model, prompt, report

import align
import rlvr
from engine.attention import adopt, forward_pack
from engine.logprob import token_logps
from engine.packs import Tree, build_pack, plan
from engine.sampler import all_rows, generate
from tools.init import init


def logps_and_gradients(hf, trees, device):
    """Log-probs of the trees' children (on the CPU), and {name: gradient} of their sum."""
    logps = []
    for part in plan(trees, 600):
        pack = build_pack(trees, part, device)
        hidden = forward_pack(hf.model, pack)[pack.source]
        coefficient = torch.ones(len(hidden), device=device)
        logp = token_logps(
            hidden, hf.lm_head.weight, pack.target, 0.9, banned=(3, 4), coefficient=coefficient
        )
        logp.sum().backward()
        logps.append(logp.detach().cpu())
    gradients = {}
    for name, parameter in hf.named_parameters():
        if parameter.grad is not None:
            gradients[name] = parameter.grad.cpu()
    return torch.cat(logps), gradients


def largest_difference(gradients, expected):
    """Relative, over the parameters."""
    worst = 0.0
    for name, gradient in gradients.items():
        norm = expected[name].norm() + 1e-9
        worst = max(worst, float((expected[name] - gradient).norm() / norm))
    return worst


def same_rollouts(here, there, prompts):
    """Share of the rollouts that have the same ids in both models."""
    n = 4
    found = []
    for hf in (here, there):
        rows = all_rows(prompts, n)
        seeds = [(0, number) for number in range(len(prompts))]
        rollouts = generate(hf, prompts, rows, 60, eos=(9, 10, 11), seeds=seeds, slots=6)
        found.append([rollout.ids for rollout in rollouts])
    same = [mine == theirs for mine, theirs in zip(*found, strict=True)]
    return sum(same) / len(same)


def steps_of_stages(device, folder):
    """Two steps of alignment and two of GRPO from random weights, sharded, on CUDA in bfloat16.

    Returns for each the mean difference between the sampler's log-probs and the trainer's.
    """
    text = "<caption> red </caption> <think> one </think> <answer> 1 </answer>"
    rows = []
    for number in range(24):
        row = {
            "prompt": [{"role": "user", "content": f"how many {number} ?"}],
            "images": [],
            "teacher_response": text,
            "reward_model": {"ground_truth": "1"},
        }
        rows.append(json.dumps(row) + "\n")
    data = folder / "rows.jsonl"
    data.write_text("".join(rows))
    init(ROOT / "runs/tiny.json", folder / "init", [data])
    common = {
        "policy": str(folder / "init"),
        "data": str(data),
        "device": device,
        "dtype": "float32" if device == "cpu" else "bfloat16",
        "group_size": 4,
        "max_response": 24,
        "steps": 2,
        "prompts_per_step": 2,
        "save_every": 0,
    }
    out = folder / "align"
    align.main(align.Args(out=str(out), warmup_steps=1, warmup_pairs=16, **common))
    rlvr.main(rlvr.Args(out=str(folder / "rlvr"), **common))
    differences = {}
    for stage in ("align", "rlvr"):
        lines = (folder / stage / "log.jsonl").read_text().splitlines()
        differences[stage] = json.loads(lines[-1])["logp_diff"]
    return differences


def compare(here, device):
    """A model on the CPU against its copy on the device: the largest differences of log-probs and
    of gradients (relative), and the share of equal rollouts."""
    here = here.float()
    adopt(here.model)
    there = copy.deepcopy(here).to(device)
    random = torch.Generator().manual_seed(0)
    trees = []
    for seed in range(4):
        children = []
        for length in lengths(6, 30, seed):
            children.append(torch.randint(3, 4000, (length,), generator=random).tolist())
        trees.append(Tree(prompt(here, 20, 8, seed), children))

    expected_logps, expected_gradients = logps_and_gradients(here, trees, "cpu")
    logps, gradients = logps_and_gradients(there, trees, device)
    return {
        "logp": float((logps - expected_logps).abs().max()),
        "gradient, relative": largest_difference(gradients, expected_gradients),
        "same rollouts": same_rollouts(here, there, [tree.prompt for tree in trees]),
    }


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--device", type=device_here, default="cuda")
    device = parser.parse_args().device
    torch.backends.cuda.matmul.allow_tf32 = False
    # With attention alone, and with linear attention in three layers of four.
    models = {"Qwen3-VL": model("small"), "Qwen3.5": states.model("small", 4, "cpu")}
    found = {name: compare(here, device) for name, here in models.items()}
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(sys.stderr):
        stages = steps_of_stages(device, Path(folder))
    report("check", against_cpu=found, logp_diff_in_bfloat16=stages, device=device)
    # Written so that NaN fails.
    for name, differences in found.items():
        assert differences["logp"] < 1e-3, f"{name}: log-probs are others on the GPU"
        assert differences["gradient, relative"] < 1e-2, f"{name}: gradients are others on the GPU"
        assert differences["same rollouts"] > 0.9, f"{name}: rollouts are others on the GPU"


if __name__ == "__main__":
    main()
