"""
Stage 1: supervised fine-tuning on demonstrations (PRISM, arXiv 2604.28123, section 3.1).

1. Draw conversations, pack them without padding.
2. Cross-entropy on the assistant's tokens and their end tokens, never on prompt or image tokens.
3. One denominator over all packs and ranks: the loss is the mean over the trained tokens of the
   whole batch.

The vision tower and its mergers are frozen, as in the paper; where training starts from random
weights, give --no-freeze_vision.

Differs from the released recipe: batch 128 and no weight decay (its table says batch 2, probably
per device).

    python sft.py --policy ckpt/base-tiny                             # the embedded world, on a CPU
    torchrun --nproc_per_node=8 sft.py --policy Qwen/Qwen3-VL-4B-Instruct --data sft.json

    S trained tokens of a pack   `logp` (S,) their log-probs
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch

from data import read
from engine.arguments import Common, option, parse
from engine.checkpoint import Checkpoints, restore
from engine.evaluation import own_rows, validate, validation_is_due, warn_of_overlap
from engine.log import Log
from engine.optimiser import Schedule, optimizer, set_lr, step_if_finite
from engine.packs import Tree, packs_of_own
from engine.ranks import SAVED_AND_STOPPED, all_sum, print0, setup, world
from model import RolloutCopy, freeze_vision, load, shard
from model import save as save_policy
from rewards import measure


@dataclass(kw_only=True)
class Args(Common):
    steps: int | None = option(None, "updates in all; none: as many as --epochs takes", least=1)
    epochs: float = option(1.0, "passes over the data, without --steps", above=0)
    batch: int = option(128, "conversations per update, over all ranks", least=1)
    lr: float = option(1e-5, "peak learning rate")
    weight_decay: float = option(0.0, "AdamW's, on matrices only")
    schedule: Literal["constant", "cosine"] = option(
        "cosine", "of the learning rate after its warm-up; cosine ends at 0"
    )
    warmup: float = option(
        0.1, "of the learning rate, linear: below 1 a share of all steps, else a number of steps"
    )
    freeze_vision: bool = option(
        True, "train neither the vision tower nor its mergers; --no-freeze_vision: train them too"
    )
    eval_rollouts: bool = option(
        False, "the validation samples responses too; the rows of --eval_data need answers then"
    )
    slots: int = option(256, "rows decoded at once, per device, by --eval_rollouts", least=1)
    keep_best: Literal["eval/loss", "eval/accuracy", "eval/format"] | None = option(
        None, "metric of the validation: the checkpoint with its best value stays in <out>/best"
    )

    def __post_init__(self):
        super().__post_init__()
        if self.keep_best not in (None, "eval/loss") and not self.eval_rollouts:
            raise ValueError(f"--keep_best {self.keep_best} needs --eval_rollouts")


# ----------------------------------------------------------------------------- the algorithm
def sft_coefficient(tokens):
    """d loss / d logp of each trained token: the loss is cross-entropy, -sum of logp / tokens,
    where `tokens` counts the trained tokens of the whole batch, over all ranks."""
    return -1.0 / max(1.0, tokens)


def trees_of(conversations):
    """What packs are made of: each conversation a root, its trained tokens in the mask."""
    return [Tree(prompt, mask=mask) for prompt, mask in conversations]


# ----------------------------------------------------------------------------- held-out rows
@torch.no_grad()
def held_out_loss(policy, conversations, args, ranks):
    """The loss of training on this rank's part of conversations that are not trained on. All ranks
    call it."""
    trees = trees_of(conversations)
    tokens = all_sum(sum(int(tree.mask.sum()) for tree in trees))
    loss_sum = 0.0
    for pack in packs_of_own(trees, args.pack_tokens, ranks.device):
        loss_sum += sft_coefficient(tokens) * float(policy(pack).sum())
    return all_sum(loss_sum) if tokens else torch.nan


def held_out_metrics(policy, sampler, held_out, build, args, ranks):
    """The loss on the held-out rows, and with --eval_rollouts what there is to say of greedy
    responses to them. All ranks call it.

    held_out: the file, opened as each of the kinds "sft" and "eval".
    """
    data = held_out["sft"]
    conversations = data.fetch(own_rows(data, args.eval_rows, ranks), build)
    metrics = {"eval/loss": held_out_loss(policy, conversations, args, ranks)}
    if args.eval_rollouts:
        hf = sampler.refresh()
        metrics |= validate(hf, policy.encoder, held_out["eval"], measure, args, ranks)
    return metrics


# ----------------------------------------------------------------------------- the loop
def main(args):
    # set-up
    ranks = setup(args)
    # model; with --eval_rollouts the copy that samples
    images = {"max_pixels": args.max_pixels, "max_side": args.max_side}
    policy = load(args.policy, max_prompt_tokens=args.max_prompt, **images).train()
    encoder = policy.encoder
    if args.freeze_vision:
        freeze_vision(policy.hf.model)
    sampler = RolloutCopy(policy, args, ranks.device) if args.eval_rollouts else None
    shard(policy, policy.hf.model, args, ranks)
    # optimiser
    opt = optimizer(policy, args.lr, args.weight_decay)
    players = {"policy": (policy, opt)}
    # data
    data = read(args.data, "sft", args.image_root, args.max_bad, args.workers)
    build = partial(encoder.conversation, max_tokens=args.max_prompt + args.max_response)
    order = data.order(args.seed)
    held_out = {}
    if args.eval_data:
        for kind in ("sft", "eval") if args.eval_rollouts else ("sft",):
            held_out[kind] = read(args.eval_data, kind, args.image_root, args.max_bad, args.workers)
        warn_of_overlap(held_out["sft"], data, args)
    steps = args.steps or max(1, int(len(data) * args.epochs / args.batch))
    epochs = steps * args.batch / len(data)
    print0(f"{len(data)} conversations, {steps} updates of {args.batch}: {epochs:.2f} epochs")
    rate = Schedule(args.schedule, steps, args.warmup)
    # resume
    start = 0
    if args.resume and (found := restore(f"{args.out}/last", players, args)):
        meta, state = found
        start = meta["step"]
        order.load(state["order"])
        rate.resume(state["rate"], start)
    log = Log(args.out, args, ("loss", "tokens", "grad_norm grad", "lr"), start, steps)
    checkpoints = Checkpoints(args, steps, players, partial(save_policy, policy), start)
    if start == 0 and args.eval_data:
        metrics = held_out_metrics(policy, sampler, held_out, build, args, ranks)
        log.step(0, metrics)
        checkpoints.save(0, metrics, {"order": order.state(), "rate": rate.state()})

    for step in range(start, steps):
        # 1) batch: this rank's part of it
        trees = trees_of(data.share(order, args.batch, build, ranks))
        tokens = all_sum(sum(int(tree.mask.sum()) for tree in trees))
        # 2) loss
        loss_sum = 0.0
        for pack in packs_of_own(trees, args.pack_tokens, ranks.device):
            coefficient = torch.full_like(pack.target, sft_coefficient(tokens), dtype=torch.float32)
            logp = policy(pack, coefficient=coefficient)  # (S,)
            loss = (coefficient * logp).sum()
            (loss * world()).backward()  # FSDP averages over ranks; `tokens` is global already
            loss_sum += float(loss.detach())
        # 3) update
        set_lr(opt, args.lr * rate.factor(step))
        norm, skipped = step_if_finite(opt, loss_sum, args.grad_clip, "policy")
        # 4) log
        metrics = {
            "loss": all_sum(loss_sum),
            "tokens": tokens,
            "grad_norm": norm,
            "lr": opt.param_groups[0]["lr"],
            "skipped": skipped,
            "epoch": (step + 1) * args.batch / len(data),
            "left_out": len(data.bad),
        }
        if validation_is_due(args, step + 1, steps):
            metrics |= held_out_metrics(policy, sampler, held_out, build, args, ranks)
        log.step(step + 1, metrics)
        if args.sample_every and step % args.sample_every == 0 and trees:
            prompt = trees[0].prompt
            text = encoder.decode(prompt.ids[trees[0].mask].tolist())
            print0(f"--- step {step + 1}, {prompt.example.where}: the trained tokens\n{text}\n---")
        # 5) save
        stop = ranks.stop()
        state = {"order": order.state(), "rate": rate.state()}
        checkpoints.save(step + 1, metrics, state, stop)
        if stop:
            sys.exit(SAVED_AND_STOPPED)
    ranks.close()


if __name__ == "__main__":
    main(parse(Args))
