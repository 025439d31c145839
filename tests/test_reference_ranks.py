"""
Two ranks beside the same reference: one denominator over both, one order of rows and of random
numbers, a rollout copy of this step's weights, gradients clipped once. One pair of processes runs
all stages.
"""

import json
import os
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, free_ports
from reference import compare, stage1, stage2, stage3, world

import align
import rlvr
import sft
from engine import health

COMMON = dict(device="cpu", sample_every=0, save_every=0, steps=2)
COMMON |= dict(freeze_vision=False)
ROLLOUTS = dict(group_size=4, max_response=20, lr=2e-3)
JOBS = {
    "sft": ("sft", dict(data="messages", batch=3, lr=1e-2, grad_clip=0.5, pack_tokens=60)),
    "align": (
        "align",
        ROLLOUTS
        | dict(
            data="align",
            disc_path="strong",
            disc_lr=1e-3,
            prompts_per_step=3,
            temperature=0.8,
            alpha=0.3,
            balance=0.2,
            score_l2=0.05,
            grad_clip=0.2,
            warmup_steps=0,
            probe_every=0,
            pack_tokens=100,
        ),
    ),
    "warm-up": (
        "align",
        ROLLOUTS
        | dict(
            data="align",
            pairs="pairs",
            disc="experts",
            warmup_steps=2,
            warmup_pairs=6,
            warmup_lr=1e-3,
            warmup_only=True,
            max_response=30,
        ),
    ),
    "rlvr": (
        "rlvr",
        ROLLOUTS
        | dict(
            data="rl",
            algo="dapo",
            overlong=6,
            prompts_per_draw=3,
            max_draws=2,
            prompts_per_step=2,
            temperature=0.7,
            minibatches=2,
            kl=0.2,
            warmup=1,
        ),
    ),
    # The last two: what they change stays changed in their processes.
    "align, distant": (
        "align",
        ROLLOUTS | dict(data="align", disc="dense", warmup_steps=0, prompts_per_step=2, steps=1),
    ),
    "rlvr, distant": ("rlvr", ROLLOUTS | dict(data="rl", prompts_per_step=2, steps=1)),
}
DISTANCE = 0.5
STAGES = {"sft": sft, "align": align, "rlvr": rlvr}


def run_on_ranks(ranks, jobs, folder, timeout=240):
    """Run jobs on so many ranks, a process each. A failure shows what they printed."""
    (folder / "jobs.json").write_text(json.dumps(jobs))
    command = [sys.executable, ROOT / "tests/reference/ranked.py", folder / "jobs.json"]
    command += free_ports(len(jobs))
    settings = {**os.environ, "MASTER_ADDR": "127.0.0.1", "OMP_NUM_THREADS": "1"}
    settings["WORLD_SIZE"] = str(ranks)
    processes = []
    for rank in range(ranks):
        with open(folder / f"rank{rank}.txt", "w") as prints:
            process = subprocess.Popen(
                command,
                env=settings | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
                stdout=prints,
                stderr=subprocess.STDOUT,
                cwd=ROOT,
            )
        processes.append(process)
    try:
        codes = [process.wait(timeout) for process in processes]
    finally:
        for process in processes:
            process.kill()
    prints = [(folder / f"rank{rank}.txt").read_text()[-3000:] for rank in range(ranks)]
    assert codes == [0] * ranks, "\n----\n".join(prints)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """{name: (flags, recorded steps)} of all jobs on two ranks."""
    folder = tmp_path_factory.mktemp("reference")
    files = world.make_world(folder)
    args = align.Args(policy=files.policy, data=files.align)
    files.strong = str(folder / "strong")
    align.save_discriminator(align.load_discriminator(args), files.policy, files.strong)
    world.strengthen_discriminator(files.strong)
    jobs = []
    for name, (stage, flags) in JOBS.items():
        flags = COMMON | flags | dict(policy=files.policy, out=f"{folder}/{name}")
        for key in ("data", "pairs", "disc_path"):
            if key in flags:
                flags[key] = getattr(files, flags[key])
        jobs.append({"stage": stage, "flags": flags, "check_every": 2})
        if "distant" in name:
            jobs[-1]["distance"] = DISTANCE
    run_on_ranks(2, jobs, folder)
    found = {}
    for name, job in zip(JOBS, jobs, strict=True):
        trace = torch.load(f"{folder}/{name}/trace.pt", weights_only=False)
        found[name] = (STAGES[job["stage"]].Args(**job["flags"]), trace)
    return found


def test_sft(runs):
    args, trace = runs["sft"]
    player = stage1.check_sft(trace, args)
    compare.check_saved(f"{args.out}/last", player.weights, "hf.")


def test_game(runs):
    args, trace = runs["align"]
    weights = trace[0]["updates"][0]["before"]
    compare.check_saved(args.disc_path, weights)
    start = compare.policy_weights(args.policy)
    policy, disc = stage2.check_game(trace, args, weights, start, health.length_probe)
    compare.check_saved(f"{args.out}/last", policy.weights, "hf.")
    compare.check_saved(f"{args.out}/last/discriminator", disc.weights)


def test_warm_up(runs):
    args, trace = runs["warm-up"]
    weights = trace[0]["updates"][0]["before"]
    stage2.check_upcycled(weights, args)
    stage2.check_warm_up(trace, args, weights, health.length_probe, 2)


def test_rlvr(runs):
    args, trace = runs["rlvr"]
    player = stage3.check_rlvr(trace, args)
    compare.check_saved(f"{args.out}/last", player.weights, "hf.")


@pytest.mark.parametrize("stage", ["align", "rlvr"])
def test_distance_to_the_sampler_on_one_rank_is_logged(runs, stage):
    _, (step,) = runs[f"{stage}, distant"]
    compare.near(step["metrics"]["logp_diff_max"], DISTANCE, "logp_diff_max", 1e-4)
    assert 0.1 * DISTANCE < step["metrics"]["logp_diff"] < 0.9 * DISTANCE
