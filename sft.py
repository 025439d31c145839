"""
Stage 1: supervised fine-tuning on demonstrations (PRISM, arXiv 2604.28123, section 3.1).

1. Draw conversations, pack them without padding.
2. Cross-entropy on the assistant's tokens and their end tokens, never on prompt or image tokens.
3. One denominator over all micro-batches and ranks: the loss is the mean over the trained tokens of the whole batch.

Differs from the released recipe: batch 128 and no weight decay (its table says batch 2, probably per device).

    python sft.py --policy ckpt/base/last --data data/tiny/sft.json --out ckpt/sft
    python sft.py --init runs/tiny.json --data data/tiny/base.jsonl --out ckpt/base            # from random weights
    torchrun --nproc_per_node=8 sft.py --policy Qwen/Qwen3-VL-4B-Instruct --data sft.json --out ckpt/sft

    S trained tokens of a pack   `logp` (S,) their log-probs
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import torch

import model
from data import Order, read
from engine.arguments import Common, parse
from engine.checkpoint import restore, save
from engine.log import Log
from engine.optimiser import optimizer, schedule, set_lr, step_if_finite
from engine.packs import Tree, each
from engine.ranks import SAVED_AND_STOPPED, agree, all_sum, is_main, print0, setup
from tools import memory
from tools.init import init


@dataclass(kw_only=True)
class Args(Common):
    policy: str = (
        ""  # checkpoint to start from: a Qwen3-VL folder in transformers layout, or a hub name
    )
    init: str = ""  # instead of --policy: config.json of a Qwen3-VL of any size, for random weights
    steps: int | None = None  # updates in all; none: as many as --epochs takes
    epochs: float = 1.0  # passes over the data, without --steps
    batch: int = 128  # conversations per update, over all ranks
    lr: float = 1e-5  # peak learning rate
    weight_decay: float = 0.0  # AdamW's, on matrices only
    schedule: Literal["constant", "cosine"] = (
        "cosine"  # of the learning rate after its warm-up; cosine ends at 0
    )
    warmup: float = (
        0.1  # of the learning rate, linear: below 1 a share of all steps, else a number of steps
    )

    def __post_init__(self):
        super().__post_init__()
        if bool(self.policy) == bool(self.init):
            raise ValueError(
                "give either --policy, a checkpoint to start from, or --init, a configuration for random weights"
            )


# ----------------------------------------------------------------------------------------------------- the algorithm
def sft_loss(logp, denominator):
    """Cross-entropy: log-probs (S,) of the trained tokens; their number in the whole batch, over all ranks -> scalar."""
    return -logp.sum() / max(1.0, denominator)


# ------------------------------------------------------------------------------------------------------------ the loop
def main(args):
    # set-up
    if args.dry_run:
        return memory.show(args, lambda: (model.load(args.init or args.policy),))
    ranks = setup(args)
    # model
    if args.init:
        if is_main() and not (args.resume and Path(args.out, "last").exists()):
            init(args.init, f"{args.out}/init", [args.data], args.seed)
        agree(False)  # all ranks wait for rank 0's files
    options = dict(
        max_prompt_tokens=args.max_prompt + args.max_response, max_pixels=args.max_pixels
    )
    start_from = f"{args.out}/init" if args.init else args.policy
    policy = model.load(start_from, **options).train()
    model.shard(policy, policy.hf.model, args, ranks)
    # optimiser
    opt = optimizer(policy, args.lr, args.weight_decay)
    # data
    data = read(args.data, "sft", args.image_root, args.max_bad)
    order, start = Order(len(data), args.seed), 0
    args.steps = args.steps or max(1, int(len(data) * args.epochs / args.batch))
    print0(
        f"{len(data)} conversations, {args.steps} updates of {args.batch}: {args.steps * args.batch / len(data):.2f} epochs"
    )
    # resume
    last = f"{args.out}/last"
    if args.resume and (found := restore(last, {"policy": (policy, opt)})):
        start = found[0]["step"]
        order.load(found[1]["order"])
    spare = Tree(
        data.draw(Order(len(data), args.seed), 1, policy.encoder.conversation)[0][0]
    )  # for ranks without a row
    log = Log(args.out, args, ("loss", "tokens", "grad_norm grad", "lr"), start)

    for step in range(start, args.steps):
        # 1) batch
        rows, _ = data.share(order, args.batch, policy.encoder.conversation, ranks)
        trees = [Tree(prompt, mask=mask) for prompt, mask in rows]
        tokens = all_sum(float(sum(int(tree.mask.sum()) for tree in trees)))
        # 2) loss   3) update
        total = 0.0
        for pack in each(trees, args.pack_tokens, ranks.device, spare):
            alike = torch.ones(
                len(pack.target), device=ranks.device
            )  # every token's log-prob counts the same in the loss
            loss = sft_loss(policy(pack, coefficient=alike), tokens) * pack.weight
            (
                loss * ranks.world
            ).backward()  # FSDP averages over ranks; the denominator is global already
            total += float(loss.detach())
        set_lr(opt, args.lr * schedule(step, args.steps, args.warmup, args.schedule))
        norm, skipped = step_if_finite(opt, total, args.grad_clip, "policy")
        # 4) log
        metrics = {
            "loss": all_sum(total),
            "tokens": tokens,
            "grad_norm": norm,
            "lr": opt.param_groups[0]["lr"],
            "skipped": skipped,
            "epoch": (step + 1) * args.batch / len(data),
            "left_out": len(data.bad),
        }
        log.step(step + 1, metrics)
        if args.sample_every and step % args.sample_every == 0 and trees:
            prompt, text = (
                trees[0].prompt,
                policy.encoder.decode(trees[0].prompt.ids[trees[0].mask].tolist()),
            )
            print0(f"--- step {step + 1}, {prompt.example.where}: the trained tokens\n{text}\n---")
        # 5) save
        stop = ranks.stop()
        if (
            stop
            or step + 1 == args.steps
            or (args.save_every and (step + 1) % args.save_every == 0)
        ):
            save(
                last,
                partial(model.save, policy),
                {"step": step + 1, "args": vars(args), "metrics": metrics},
                {"policy": (policy, opt)},
                {"order": order.state()},
            )
        if stop:
            sys.exit(SAVED_AND_STOPPED)
    ranks.close()


if __name__ == "__main__":
    main(parse(Args))
