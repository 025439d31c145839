"""
Claim: a whole GRPO step of the tiny run is several times faster than TRL's GRPOTrainer (same model,
prompts and limits).

    python bench/step.py                            # ours alone: a step of GRPO and of alignment,
                                                    # and where its time goes
    python bench/step.py --trl /tmp/trl/bin/python  # an environment with trl, accelerate, datasets
                                                    # and torchvision

After `bash runs/tiny.sh`. TRL generates with transformers (its vLLM needs a GPU), with images, in
float32, in batches of all rollouts of a step, as ours.
"""

import argparse
import base64
import json
import subprocess
import tempfile
import time
from functools import partial

import torch
from measure import ROOT, median, report

import align
import rlvr
from data import read
from engine.optimiser import optimizer, step_if_finite
from engine.ranks import setup
from engine.rollouts import Group, sample_groups
from model import load
from rewards import verify


class Parts:
    """Seconds of each part of each step, and the tokens of each step's rollouts."""

    def __init__(self):
        self.seconds = {}
        self.tokens = []

    def begin_step(self):
        self.last = time.perf_counter()

    def end_part(self, name):
        now = time.perf_counter()
        self.seconds.setdefault(name, []).append(now - self.last)
        self.last = now

    def medians(self):
        """Of the whole step, of each part, and of the tokens; the first step is a warm-up."""
        steps = [sum(parts) for parts in zip(*self.seconds.values(), strict=True)]
        figures = {"step": median(steps[1:])}
        for name, seconds in self.seconds.items():
            figures[name] = median(seconds[1:])
        figures["tokens"] = median(self.tokens[1:])
        return figures


def grpo_steps(args, steps):
    policy = load(args.policy).train()
    encoder = policy.encoder
    algorithm = rlvr.chosen_algorithm(args)
    opt = optimizer(policy, args.lr, algorithm.weight_decay)
    data = read(args.data, "rl")
    order = data.order(args.seed)
    parts = Parts()
    for step in range(steps):
        parts.begin_step()
        prompts = data.draw(order, args.prompts_per_step, encoder.prompt)
        parts.end_part("encode")
        groups = [Group(prompt) for prompt in prompts]
        sample_groups(policy.hf, encoder, groups, verify, args, (args.seed, step, 0))
        parts.end_part("sample, verify")
        for group in groups:
            reward = group.verdicts["reward"]
            group.advantage = rlvr.group_advantage(reward, args.group_size, algorithm.scale_by_std)
        rlvr.update_policy(policy, opt, groups, args, "cpu")
        parts.end_part("policy's update")
        parts.tokens.append(sum(group.tokens() for group in groups))
    return parts.medians()


def alignment_steps(args, steps):
    policy = load(args.policy).train()
    encoder = policy.encoder
    disc = align.load_discriminator(args).train()
    opt = optimizer(policy, args.lr, args.weight_decay)
    disc_opt = optimizer(disc, args.disc_lr, args.disc_weight_decay)
    data = read(args.data, "align")
    order = data.order(args.seed)
    build = partial(align.new_group, encoder=encoder, disc_encoder=encoder, args=args)
    weights = list(align.span_weights(args.spans, args.alpha).values())
    parts = Parts()
    for step in range(steps):
        parts.begin_step()
        groups = data.draw(order, args.prompts_per_step, build)
        parts.end_part("encode")
        align.roll(groups, policy.hf, encoder, args, (args.seed, 0, step))
        parts.end_part("sample, verify")
        loss, _ = align.discriminator_pass(disc, groups, args, "cpu")
        step_if_finite(disc_opt, loss, args.grad_clip, "discriminator")
        parts.end_part("discriminator's update")
        for group in groups:
            group.advantage = align.span_advantage(group.score, weights, group.well_formed)
        align.update_policy(policy, opt, groups, args, "cpu")
        parts.end_part("policy's update")
        parts.tokens.append(sum(group.tokens() for group in groups))
    return parts.medians()


def trl_steps(python, args, steps, batch):
    """Figures of TRL's steps, with `batch` rows in a forward."""
    policy = load(args.policy)
    rows = []
    for example in read(args.data, "rl").fetch(range(args.prompts_per_step * steps)):
        turns = []
        for message in example.messages:
            text = message["content"].replace("<image>", "").strip()
            turns.append({**message, "content": text})
        images = []
        for image in example.images:
            if isinstance(image, str):
                images.append({"path": image})
            else:
                images.append({"bytes": base64.b64encode(image).decode()})
        rows.append({"prompt": turns, "answer": example.answer, "images": images})
    with tempfile.TemporaryDirectory() as out:
        job = {
            "policy": str(policy.source),
            "rows": rows,
            "prompts": args.prompts_per_step,
            "group": args.group_size,
            "most": args.max_response,
            "lr": args.lr,
            "steps": steps,
            "batch": batch,
            "banned": list(policy.encoder.banned),
            "out": out,
            "device": "cpu",
            "threads": torch.get_num_threads(),
        }
        command = [python, str(ROOT / "bench/trl_step.py"), json.dumps(job)]
        done = subprocess.run(command, capture_output=True, text=True)
    marker = "RESULT "
    results = [line for line in done.stdout.splitlines() if line.startswith(marker)]
    if not results:
        raise SystemExit(done.stdout[-2000:] + done.stderr[-3000:])
    found = json.loads(results[0].removeprefix(marker))
    rollouts = args.prompts_per_step * args.group_size
    return {
        "step": median(found["seconds"]),
        "tokens": median(found["mean_length"]) * rollouts,
        **found["versions"],
    }


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--policy", default="out/tiny-0/sft", help="as runs/tiny.sh left it")
    parser.add_argument("--data", default="data/tiny", help="folder of the embedded world's files")
    parser.add_argument("--disc_init", default="ckpt/base-tiny")
    parser.add_argument("--trl", help="the Python of an environment with TRL")
    parser.add_argument("--steps", type=int, default=8)
    flags = parser.parse_args()
    common = {
        "policy": flags.policy,
        "out": "unused",
        "group_size": 8,
        "lr": 1.5e-4,
        "max_response": 128,
        "device": "cpu",
    }
    grpo_args = rlvr.Args(data=f"{flags.data}/rl.jsonl", prompts_per_step=24, **common)
    alignment_args = align.Args(
        data=f"{flags.data}/align.jsonl",
        prompts_per_step=16,
        disc_init=flags.disc_init,
        disc_lr=5e-4,
        **common,
    )
    setup(grpo_args)
    figures = {
        "GRPO": grpo_steps(grpo_args, flags.steps),
        "alignment": alignment_steps(alignment_args, flags.steps),
    }
    ratio = {}
    if flags.trl:
        ours = figures["GRPO"]
        # All rows of a step at once; and TRL's own default, with accumulation.
        for batch in (192, 8):
            name = f"TRL, {batch} rows a forward"
            theirs = trl_steps(flags.trl, grpo_args, flags.steps, batch)
            figures[name] = theirs
            step = theirs["step"] / ours["step"]
            ratio[name] = {"step": step, "token": step / theirs["tokens"] * ours["tokens"]}
    report("step", ratio=ratio, seconds=figures, prompts=24, rollouts=8, device="cpu")


if __name__ == "__main__":
    main()
