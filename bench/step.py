"""
Claim: a whole GRPO step of the tiny run is several times faster than TRL's GRPOTrainer (same model, prompts, lengths).

    python bench/step.py --trl /tmp/trl/bin/python      # an environment with trl, accelerate, datasets, torchvision
    python bench/step.py                                # ours alone: GRPO and alignment steps and where their time goes

After `bash runs/tiny.sh`. TRL generates with transformers (its vLLM needs a GPU), with images, in float32, in batches of all
rollouts of a step, as ours.
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
from data import Order, read
from engine.optimiser import optimizer, step_if_finite
from engine.packs import Tree
from engine.ranks import setup
from engine.rollouts import sample, verify
from model import load


class Parts:
    """Seconds of each part of a step."""

    def __init__(self):
        self.seconds, self.last = {}, time.perf_counter()

    def __call__(self, name):
        now = time.perf_counter()
        self.seconds.setdefault(name, []).append(now - self.last)
        self.last = now

    def medians(self):
        return {k: median(v[1:]) for k, v in self.seconds.items()}


def grpo(args, steps):
    policy = load(args.policy).train()
    encoder, opt, data = policy.encoder, optimizer(policy, args.lr, 0.01), read(args.data, "rl")
    order, parts, tokens = Order(len(data), 0), Parts(), []
    spare = Tree(data.draw(Order(len(data), 0), 1, encoder.prompt)[0], [[encoder.eos]])
    for step in range(steps):
        parts.last = time.perf_counter()
        prompts = data.draw(order, args.prompts_per_step, encoder.prompt)
        parts("encode")
        groups = sample(policy.hf, encoder, prompts, range(len(prompts)), args, (0, step, 0))
        parts("sample")
        for g in groups:
            verify(g)
            g.advantage = rlvr.group_advantage(g.scores["reward"], args.group_size)
        parts("verify")
        rlvr.policy_update(policy, opt, groups, range(len(groups)), args, spare, "cpu")
        parts("policy's update")
        tokens.append(sum(len(r.ids) for g in groups for r in g.rollouts))
    return parts, tokens


def game(args, steps):
    policy, disc = load(args.policy).train(), align.load_discriminator(args).train()
    encoder, opt, disc_opt = (
        policy.encoder,
        optimizer(policy, args.lr, 0.01),
        optimizer(disc, args.disc_lr, 0.01),
    )
    data, parts, tokens = read(args.data, "align"), Parts(), []
    build = partial(align.demonstration, encoder=encoder, disc_encoder=encoder, args=args)
    order, spare = Order(len(data), 0), data.draw(Order(len(data), 0), 1, build)[0]
    for step in range(steps):
        parts.last = time.perf_counter()
        items = data.draw(order, args.prompts_per_step, build)
        parts("encode")
        groups = align.roll(items, range(len(items)), policy.hf, encoder, args, (0, 0, step))
        parts("sample")
        loss, _ = align.disc_pass(disc, items, args, "cpu", spare)
        step_if_finite(disc_opt, loss, 1.0, "discriminator")
        parts("discriminator's update")
        for group, item in zip(groups, items, strict=True):
            raw = [
                [item.score.get(kind, {}).get(k, float("nan")) for k in range(args.group_size)]
                for kind in (0, 1)
            ]
            group.advantage = align.alignment_advantage(
                *map(torch.tensor, raw), item.well_formed, args.group_size
            )
            verify(group)
        parts("advantage, verify")
        rlvr.policy_update(
            policy, opt, groups, range(len(items)), args, Tree(spare.prompt, [[encoder.eos]]), "cpu"
        )
        parts("policy's update")
        tokens.append(sum(len(r.ids) for g in groups for r in g.rollouts))
    return parts, tokens


def trl(python, args, steps, batch):
    data = read(args.data, "rl")
    rows = []
    for example in data.fetch(range(args.prompts_per_step * steps)):
        turns = [
            m | {"content": m["content"].replace("<image>", "").strip()} for m in example.messages
        ]
        images = [
            {"path": x} if isinstance(x, str) else {"bytes": base64.b64encode(x).decode()}
            for x in example.images
        ]
        rows.append({"prompt": turns, "answer": example.answer, "images": images})
    with tempfile.TemporaryDirectory() as out:
        job = {
            "policy": str(load(args.policy).source),
            "rows": rows,
            "prompts": args.prompts_per_step,
            "lr": args.lr,
            "group": args.group_size,
            "most": args.max_response,
            "steps": steps,
            "out": out,
            "device": "cpu",
            "batch": batch,
            "banned": list(load(args.policy).encoder.banned),
            "threads": torch.get_num_threads(),
        }
        command = [python, str(ROOT / "bench/trl_step.py"), json.dumps(job)]
        done = subprocess.run(command, capture_output=True, text=True)
    found = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    if not found:
        raise SystemExit(done.stdout[-2000:] + done.stderr[-3000:])
    return json.loads(found[0][7:])


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", default="out/tiny-0", help="folder that runs/tiny.sh left")
    parser.add_argument("--data", default="data/tiny")
    parser.add_argument("--trl", help="the Python of an environment with TRL")
    parser.add_argument("--steps", type=int, default=8)
    cli = parser.parse_args()
    common = dict(
        policy=f"{cli.out}/sft",
        out="unused",
        group_size=8,
        lr=1.5e-4,
        max_response=128,
        device="cpu",
    )
    for_grpo = rlvr.Args(data=f"{cli.data}/rl.jsonl", prompts_per_step=24, **common)
    game_data = dict(data=f"{cli.data}/align.jsonl", disc_init="ckpt/base-tiny", disc_lr=5e-4)
    for_game = align.Args(prompts_per_step=16, **game_data, **common)
    setup(for_grpo)
    figures, whole = {}, {}
    for name, run, args in (("GRPO", grpo, for_grpo), ("alignment", game, for_game)):
        parts, tokens = run(args, cli.steps)
        each = [sum(v) for v in zip(*parts.seconds.values(), strict=True)][1:]
        whole[name] = median(each)
        figures[name] = {"step": whole[name], **parts.medians(), "tokens": median(tokens[1:])}
    ratio = {}
    for batch in (
        (192, 8) if cli.trl else ()
    ):  # all rows of a step at once; its own default, with accumulation
        theirs, name = trl(cli.trl, for_grpo, cli.steps, batch), f"TRL, {batch} rows a forward"
        tokens = median(theirs["mean_length"]) * 24 * 8
        figures[name] = {"step": median(theirs["seconds"]), "tokens": tokens, **theirs["versions"]}
        ratio[name] = {"step": figures[name]["step"] / whole["GRPO"]}
        ratio[name]["token"] = ratio[name]["step"] / tokens * figures["GRPO"]["tokens"]
    report("step", ratio=ratio, seconds=figures, prompts=24, rollouts=8, device="cpu")
