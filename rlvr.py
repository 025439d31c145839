"""
Stage 3: reinforcement learning with verifiable rewards (PRISM, arXiv 2604.28123, section 3).

1. Draw prompts, sample a group of N rollouts for each at temperature 1.
2. Reward: 0.8 accuracy + 0.2 format (rewards.py); a malformed response gets 0.
3. Advantage: the reward normalised within its group.
4. Update the policy by GRPO, DAPO, GSPO or Dr. GRPO: one loss function, four presets (ALGORITHMS).
DAPO draws again until enough groups hold both right and wrong answers, and punishes overlong responses.

Differs from the released code: the loss has one denominator over all micro-batches and ranks; `old_logp` is the
trainer's own; surplus groups of DAPO are used in the next step with the log-probs of the policy that sampled them;
with one minibatch per step every ratio is 1 and clipping does nothing, `--minibatches` makes it matter.

    python rlvr.py --policy ckpt/align/last --data data/tiny/rl.jsonl --out ckpt/rlvr --steps 60
    torchrun --nproc_per_node=8 rlvr.py --policy ckpt/align/last --data rl.parquet --out ckpt/rlvr --algo dapo

    B sequences   N group size   T tokens   `logp` (B, T) log-prob of the sampled token   `mask` 1 on trained tokens
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch

from data import Order, read
from engine.arguments import Common, parse
from engine.checkpoint import restore, save
from engine.log import Log
from engine.optimiser import optimizer, schedule, set_lr, step_if_finite
from engine.packs import Tree, each
from engine.ranks import SAVED_AND_STOPPED, agree, all_max, all_sum, gather, setup, world
from engine.rollouts import Group, rollout_metrics, sample, show_rollout, verify
from engine.sampler import Rollout
from model import RolloutCopy, load, shard
from model import save as save_policy
from tools import memory

ALGORITHMS = {  # what METHOD's table of stage 3 says; each entry is also a flag of its own
    "grpo": dict(
        ratio="token",
        clip_low=0.2,
        clip_high=0.2,
        dual_clip=3.0,
        aggregation="token-mean",
        scale_by_std=True,
        dynamic_sampling=False,
        overlong=0,
        weight_decay=0.01,
        warmup=0.0,
    ),
    "dapo": dict(
        ratio="token",
        clip_low=0.2,
        clip_high=0.28,
        dual_clip=10.0,
        aggregation="token-mean",
        scale_by_std=True,
        dynamic_sampling=True,
        overlong=4096,
        weight_decay=0.1,
        warmup=10,
    ),
    "gspo": dict(
        ratio="sequence",
        clip_low=3e-4,
        clip_high=4e-4,
        dual_clip=0.0,
        aggregation="seq-mean-token-mean",
        scale_by_std=True,
        dynamic_sampling=False,
        overlong=0,
        weight_decay=0.1,
        warmup=0.05,
    ),
    "dr_grpo": dict(
        ratio="token",
        clip_low=0.2,
        clip_high=0.2,
        dual_clip=3.0,
        aggregation="constant",
        scale_by_std=False,
        dynamic_sampling=False,
        overlong=0,
        weight_decay=0.01,
        warmup=0.0,
    ),
}


@dataclass(kw_only=True)
class Args(Common):
    steps: int = 1500  # updates in all
    max_response: int = 8192  # tokens, end token included
    weight_decay: float | None = None  # AdamW's, on matrices only; none: the algorithm's
    warmup: float | None = (
        None  # of the learning rate: a share of all steps below 1, else steps; none: the algorithm's
    )
    algo: Literal["grpo", "dapo", "gspo", "dr_grpo"] = (
        "grpo"  # presets for what follows (and the two above)
    )
    ratio: Literal["token", "sequence"] | None = (
        None  # importance ratio per token, or per sequence (GSPO)
    )
    clip_low: float | None = None  # the ratio is clipped to [1 - clip_low, 1 + clip_high]
    clip_high: float | None = None  # see clip_low
    dual_clip: float | None = None  # bound on the loss where the advantage is negative; 0: none
    aggregation: Literal["token-mean", "seq-mean-token-mean", "constant"] | None = (
        None  # of the loss over tokens
    )
    scale_by_std: bool | None = None  # divide the advantage by the group's standard deviation
    dynamic_sampling: bool | None = (
        None  # draw until enough groups hold both right and wrong answers (DAPO)
    )
    overlong: int | None = (
        None  # tokens before max_response over which a penalty grows from 0 to -1 (DAPO); 0: none
    )
    prompts_per_step: int = 32  # groups per update, over all ranks
    prompts_per_draw: int = 96  # prompts per draw of dynamic sampling, over all ranks
    max_draws: int = 10  # after which dynamic sampling trains on what it has
    group_size: int = 16  # rollouts per prompt
    minibatches: int = 1  # updates per step; above 1 the ratios leave 1 and clipping acts
    temperature: float = 1.0  # of sampling and of the log-probs alike
    kl: float = 0.0  # coefficient of the k3 estimate of KL(policy || start policy)
    slots: int = 256  # rows decoded at once, per device

    def __post_init__(self):
        for name, value in ALGORITHMS[self.algo].items():
            if getattr(self, name) is None:
                setattr(self, name, value)
        super().__post_init__()
        if self.overlong >= self.max_response:
            raise ValueError(
                f"--overlong {self.overlong} must be below --max_response {self.max_response}"
            )
        if self.group_size < 2 or not 1 <= self.minibatches <= self.prompts_per_step:
            raise ValueError(
                "--group_size must be 2 or more, --minibatches from 1 to --prompts_per_step"
            )


# ----------------------------------------------------------------------------------------------------- the algorithm
def group_advantage(reward, group_size, scale_by_std=True):
    """(reward - mean) / (std + 1e-6) within groups of `group_size` consecutive entries; reward (B,) -> (B,).

    The standard deviation is the unbiased one (GRPO, arXiv 2402.03300); without it: Dr. GRPO (2503.20783).
    Raises ValueError where group_size does not divide B or is below 2.
    """
    if group_size < 2 or len(reward) % group_size:
        raise ValueError(
            f"{len(reward)} rewards are no groups of {group_size} (a group needs 2 or more)"
        )
    groups = reward.float().view(-1, group_size)
    centred = groups - groups.mean(1, keepdim=True)
    return (centred / (groups.std(1, keepdim=True) + 1e-6) if scale_by_std else centred).flatten()


def policy_loss(
    logp,
    old_logp,
    advantage,
    mask,
    *,
    ratio="token",
    clip_low,
    clip_high,
    dual_clip=None,
    aggregation="token-mean",
    denominator=None,
):
    """Clipped policy-gradient loss of GRPO, DAPO, Dr. GRPO (ratio per token) and GSPO (ratio per sequence).

    logp, old_logp (B, T) log-probs under the policy and under the one that sampled; advantage (B,); mask (B, T) bool
    or float, 1 on trained tokens: what stands elsewhere has no influence. `dual_clip` bounds the loss of tokens with a
    negative advantage at dual_clip * |advantage| (arXiv 1912.09729); None or 0: unbounded.
    aggregation and what `denominator` counts (over all micro-batches and ranks; None: this call's own count):
    "token-mean" tokens, "seq-mean-token-mean" sequences, "constant" anything, required (Dr. GRPO).
    Returns (loss, metrics): parts of a batch with a shared denominator sum to the whole. metrics are over this call's
    tokens: `tokens`, `clip_frac`, `ratio_max`, `old_kl` (k1 estimate of KL(old || new)).
    """
    mask = mask.bool()
    advantage = advantage.unsqueeze(1)
    log_ratio = (logp - old_logp).masked_fill(~mask, 0.0).clamp(-20, 20)
    lengths = mask.sum(1)
    if (
        ratio == "sequence"
    ):  # GSPO (2507.18071): s = exp(mean_t log-ratio), its gradient spread evenly over the tokens
        mean = (log_ratio.sum(1) / lengths.clamp(min=1)).detach().unsqueeze(1)
        log_ratio = (mean + (logp - logp.detach()).masked_fill(~mask, 0.0)).clamp(max=10.0)
    r = log_ratio.exp()
    plain, clipped = -advantage * r, -advantage * r.clamp(1 - clip_low, 1 + clip_high)
    loss = torch.maximum(plain, clipped)
    if dual_clip:
        loss = torch.where(advantage < 0, torch.minimum(loss, -advantage * dual_clip), loss)
    loss = loss.masked_fill(~mask, 0.0)
    if aggregation == "seq-mean-token-mean":
        total, count = (loss.sum(1) / lengths.clamp(min=1)).sum(), (lengths > 0).sum()
    else:
        total, count = loss.sum(), lengths.sum()
    if denominator is None:
        if aggregation == "constant":
            raise ValueError("aggregation 'constant' needs a denominator")
        denominator = count.clamp(min=1)
    tokens = int(lengths.sum())
    with torch.no_grad():
        metrics = {
            "tokens": tokens,
            "clip_frac": float((clipped > plain)[mask].float().mean()) if tokens else float("nan"),
            "ratio_max": float(r[mask].max()) if tokens else float("nan"),
            "old_kl": float((old_logp - logp)[mask].mean()) if tokens else float("nan"),
        }
    return total / denominator, metrics


def k3(logp, ref_logp):
    """Schulman's k3 estimate of KL(policy || reference) per token: never negative, unbiased."""
    d = ref_logp - logp
    return d.exp() - d - 1


def overlong_penalty(length, limit, buffer):
    """0 up to limit - buffer tokens, then linearly to -1 at the limit (DAPO, arXiv 2503.14476, equation 13)."""
    return -max(0, length - (limit - buffer)) / buffer if buffer else 0.0


# ------------------------------------------------------------------------------------------- the update on groups
@torch.no_grad()
def trainer_logps(policy, groups, args, spare, device):
    """Log-probs of every rollout under `policy` as it is: per group a list of (T,). All ranks."""
    out = [[None] * len(g.rollouts) for g in groups]
    for pack in each([g.tree() for g in groups], args.pack_tokens, device, spare):
        logp = policy(pack, args.temperature, policy.encoder.banned)
        for k, (t, c) in enumerate(pack.children if pack.weight else []):
            out[t][c] = logp[pack.sequence == k].cpu()
    return out


def on_policy_gradient(loss_of, pack):
    """d loss / d logp (S,) where every ratio is 1: known before any log-prob is, as long as the loss is one of ratios."""
    zeros = torch.zeros(len(pack.target), device=pack.target.device, requires_grad=True)
    return torch.autograd.grad(loss_of(pack.rows(zeros), pack.rows(zeros.detach()))[0], zeros)[0]


def policy_update(policy, opt, groups, numbers, args, spare, device, reference=None):
    """One step of the policy on `groups` (this rank's), in `args.minibatches` updates -> metrics. All ranks.

    Stages 2 and 3 share it: they differ in where `group.advantage` comes from. numbers: of the groups, from 0 over all
    ranks', so that the minibatches are the same on any number of them. `spare`: any tree (see packs.each).
    """
    on_policy = not agree(
        args.minibatches > 1 or any(g.old_logp for g in groups)
    )  # then the ratio is 1 by construction
    if not on_policy:
        fresh = [g for g in groups if g.old_logp is None]
        for g, logps in zip(fresh, trainer_logps(policy, fresh, args, spare, device), strict=True):
            g.old_logp = logps
    ref_logp = trainer_logps(reference, groups, args, spare, device) if reference else None
    sums = dict.fromkeys(("tokens", "clipped", "entropy", "diff", "kl", "loss"), 0.0)
    ratios, diffs, norms, skipped, all_groups = (
        [-torch.inf],
        [-torch.inf],
        [],
        0,
        all_sum(len(groups)),
    )
    for part in range(args.minibatches):
        mine = [
            g for g, number in enumerate(numbers) if number * args.minibatches // all_groups == part
        ]
        counts = all_sum(
            {
                "token-mean": sum(len(r.ids) for g in mine for r in groups[g].rollouts),
                "seq-mean-token-mean": sum(len(groups[g].rollouts) for g in mine),
            }
        )
        counts["constant"] = (
            counts["seq-mean-token-mean"] * args.max_response
        )  # Dr. GRPO: no length in the divisor
        part_loss = 0.0
        for pack in each([groups[g].tree() for g in mine], args.pack_tokens, device, spare):
            where = [(mine[t], c) for t, c in pack.children] if pack.weight else []
            if not where:
                (policy(pack).sum() * 0.0).backward()
                continue
            mask = pack.rows(torch.ones(len(pack.target), device=device)).bool()
            loss_of = partial(
                policy_loss,
                advantage=torch.stack([groups[g].advantage[c] for g, c in where]).to(device),
                mask=mask,
                ratio=args.ratio,
                clip_low=args.clip_low,
                clip_high=args.clip_high,
                dual_clip=args.dual_clip,
                aggregation=args.aggregation,
                denominator=max(1.0, counts[args.aggregation]),
            )
            ahead = on_policy_gradient(loss_of, pack) if on_policy and not ref_logp else None
            logp, entropy = policy(
                pack, args.temperature, policy.encoder.banned, entropy=True, coefficient=ahead
            )
            sampler_logp = torch.tensor(
                [x for g, c in where for x in groups[g].rollouts[c].logps], device=device
            )
            old = (
                logp.detach()
                if on_policy
                else torch.cat([groups[g].old_logp[c] for g, c in where]).to(device)
            )
            diff = (old - sampler_logp).abs()  # both under the policy that sampled
            loss, m = loss_of(pack.rows(logp), pack.rows(old))
            if ref_logp:
                kl = k3(logp, torch.cat([ref_logp[g][c] for g, c in where]).to(device))
                loss = loss + args.kl * kl.sum() / max(1.0, counts["token-mean"])
                sums["kl"] += float(kl.detach().sum())
            (
                loss * world()
            ).backward()  # FSDP averages over ranks; the denominator is global already
            part_loss += float(loss.detach())
            sums["tokens"] += m["tokens"]
            sums["clipped"] += m["clip_frac"] * m["tokens"]
            sums["entropy"] += float(entropy.sum())
            sums["diff"] += float(diff.sum())
            ratios, diffs = [*ratios, m["ratio_max"]], [*diffs, float(diff.max())]
        norm, bad = step_if_finite(opt, part_loss, args.grad_clip, "policy")
        norms, skipped, sums["loss"] = [*norms, norm], skipped + bad, sums["loss"] + part_loss
    sums = all_sum(sums)
    tokens = sums["tokens"] or float("nan")
    ratio, most = (
        all_max(torch.tensor(x).max()).item() for x in (ratios, diffs)
    )  # torch's max keeps a NaN
    return {
        "loss": sums["loss"] / args.minibatches,
        "grad_norm": sum(norms) / len(norms),
        "skipped": skipped,
        "clip_frac": sums["clipped"] / tokens,
        "ratio_max": ratio,
        "entropy": sums["entropy"] / tokens,
        "kl": sums["kl"] / tokens if ref_logp else float("nan"),
        "tokens": sums["tokens"],
        "logp_diff": sums["diff"] / tokens,
        "logp_diff_max": most,
    }


def collect(step, data, order, hf, encoder, args, ranks, kept):
    """Draw and sample until `args.prompts_per_step` groups are kept over all ranks -> ({number: group to train on},
    {(step, draw, prompt): surplus group}, all that was sampled, counts). Without dynamic sampling that is one draw. `kept`:
    the last step's surplus, used first, then dropped. All ranks; groups stay on the rank that sampled them, but which are
    trained on, and their numbers, are the same on any number of ranks.
    """
    new, seen, draws, wanted = {}, [], 0, args.prompts_per_step
    size, most = (args.prompts_per_draw, args.max_draws) if args.dynamic_sampling else (wanted, 1)
    while draws < most and all_sum(len(kept) + len(new)) < wanted:
        prompts, numbers = data.share(order, size, encoder.prompt, ranks)
        drawn = sample(hf, encoder, prompts, numbers, args, (args.seed, step, draws))
        for group in drawn:
            verify(group)
            penalty = [
                overlong_penalty(len(r.ids), args.max_response, args.overlong)
                for r in group.rollouts
            ]
            group.scores["reward"] = group.scores["reward"] + torch.tensor(penalty)
        # DAPO filters on accuracy, not on the shaped reward: equal answers of unequal length teach nothing.
        new |= {
            (step, draws, number): g
            for number, g in zip(numbers, drawn, strict=True)
            if not args.dynamic_sampling or 0 < g.scores["accuracy"].mean() < 1
        }
        seen, draws = seen + drawn, draws + 1

    first = sorted(key for keys in gather([*kept, *new]) for key in keys)[:wanted]
    groups = {first.index(key): g for key, g in (kept | new).items() if key in first}
    surplus = {key: g for key, g in new.items() if key not in first}
    counts = all_sum(
        {
            "draws": draws / ranks.world,
            "sampled": len(seen),
            "groups": len(groups),
            "surplus": len(surplus),
            "dropped": len(kept) + len(new) - len(groups) - len(surplus),
        }
    )
    return groups, surplus, seen, counts


# ------------------------------------------------------------------------------------------------------------ the loop
def main(args):
    # set-up
    if args.dry_run:
        return memory.show(args, lambda: (load(args.policy),))
    ranks = setup(args)
    device = ranks.device
    # model
    options = dict(max_prompt_tokens=args.max_prompt, max_pixels=args.max_pixels)
    policy = load(args.policy, **options).train()
    reference = load(args.policy, **options).requires_grad_(False) if args.kl else None
    sampler, encoder = RolloutCopy(policy, args, device), policy.encoder
    for model in filter(None, (policy, reference)):
        shard(model, model.hf.model, args, ranks)
    # optimiser
    opt = optimizer(policy, args.lr, args.weight_decay)
    # data
    data = read(args.data, "rl", args.image_root, args.max_bad)
    order, surplus, start = Order(len(data), args.seed), {}, 0
    spare = Tree(
        data.draw(Order(len(data), args.seed), 1, encoder.prompt)[0], [[encoder.eos]]
    )  # for ranks without a group
    # resume
    last = f"{args.out}/last"
    if args.resume and (found := restore(last, {"policy": (policy, opt)})):
        start, state = found[0]["step"], found[1]
        order.load(state["order"])
        surplus = unpack_groups(state["surplus"][ranks.rank :: ranks.world], data, encoder)
    log = Log(
        args.out,
        args,
        ("loss", "reward", "accuracy", "format", "length", "entropy", "grad_norm grad"),
        start,
    )

    for step in range(start, args.steps):
        # 1) rollout   2) score
        hf = sampler.refresh()
        groups, new_surplus, seen, counts = collect(
            step, data, order, hf, encoder, args, ranks, surplus
        )
        late = new_surplus.values()
        for g, logps in zip(late, trainer_logps(policy, late, args, spare, device), strict=True):
            g.old_logp = logps
        # 3) advantage
        for g in groups.values():
            g.advantage = group_advantage(g.scores["reward"], args.group_size, args.scale_by_std)
        # 4) update the policy
        metrics = dict.fromkeys(("loss", "grad_norm"), float("nan")) | {"skipped": 1}
        if counts["groups"]:
            set_lr(opt, args.lr * schedule(step, args.steps, args.warmup, args.schedule))
            metrics = policy_update(
                policy, opt, list(groups.values()), list(groups), args, spare, device, reference
            )
        surplus = new_surplus
        # 5) log
        metrics |= (
            rollout_metrics(seen)
            | counts
            | {"lr": opt.param_groups[0]["lr"], "left_out": len(data.bad)}
        )
        log.step(step + 1, metrics)
        if args.sample_every and step % args.sample_every == 0 and groups:
            show_rollout(log, step + 1, next(iter(groups.values())))
        # 6) save
        stop = ranks.stop()
        if (
            stop
            or step + 1 == args.steps
            or (args.save_every and (step + 1) % args.save_every == 0)
        ):
            packed = [g for part in gather(pack_groups(surplus)) for g in part]
            save(
                last,
                partial(save_policy, policy),
                {"step": step + 1, "args": vars(args), "metrics": metrics},
                {"policy": (policy, opt)},
                {"order": order.state(), "surplus": packed},
            )
        if stop:
            sys.exit(SAVED_AND_STOPPED)
    ranks.close()


def pack_groups(groups):
    # surplus groups as plain data for a checkpoint, and back
    return [
        {
            "key": key,
            "row": g.prompt.example.row,
            "rollouts": [(r.ids, r.logps, r.stop) for r in g.rollouts],
            "texts": g.texts,
            "scores": g.scores,
            "old_logp": g.old_logp,
        }
        for key, g in groups.items()
    ]


def unpack_groups(packed, data, encoder):
    return {
        p["key"]: Group(
            encoder.prompt(data[p["row"]]),
            [Rollout(*r) for r in p["rollouts"]],
            p["texts"],
            p["scores"],
            None,
            p["old_logp"],
        )
        for p in packed
    }


if __name__ == "__main__":
    main(parse(Args))
