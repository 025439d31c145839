"""
Stage 3: reinforcement learning with verifiable rewards (PRISM, arXiv 2604.28123, section 3).

1. Draw prompts, sample a group of N rollouts for each at temperature 1.
2. Reward: 0.8 accuracy + 0.2 format (rewards.py); a malformed response gets 0.
3. Advantage: the reward normalised within its group.
4. Update the policy by GRPO, DAPO, GSPO or Dr. GRPO: one loss function, four presets (ALGORITHMS).
DAPO draws again until enough groups hold both right and wrong answers, and punishes overlong
responses.

Differs from the released code: the loss has one denominator over all packs and ranks; `old_logp` is
the trainer's own; surplus groups of DAPO are used in the next step, with the log-probs of the
policy that sampled them. With one minibatch per step every ratio is 1 and clipping does nothing,
but on that surplus; `--minibatches` makes it matter.

    python rlvr.py --policy ckpt/align                                # the embedded world, on a CPU
    torchrun --nproc_per_node=8 rlvr.py --policy ckpt/align --data rl.parquet --out ckpt/rlvr

    B sequences   N rollouts of a prompt   T tokens   S scored tokens and K rollouts of a pack
    `logp` log-probs of the sampled tokens   `mask` (B, T) 1 on trained tokens
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import Literal

import torch

from data import read
from engine.arguments import Common, option, parse
from engine.checkpoint import Checkpoints, restore
from engine.evaluation import validate, validation_is_due, warn_of_overlap
from engine.log import Log
from engine.optimiser import Schedule, optimizer, set_lr, step_if_finite
from engine.packs import packs_of
from engine.ranks import SAVED_AND_STOPPED, all_max, all_sum, gather, setup, world
from engine.rollouts import (
    Group,
    rollout_metrics,
    sample_groups,
    sampler_logps,
    show_rollouts,
)
from engine.sampler import Rollout
from model import RolloutCopy, freeze_vision, load, shard
from model import save as save_policy
from rewards import measure, verify


@dataclass(frozen=True)
class Algorithm:
    """A row of docs/method.md's table of algorithms. Each entry is also a flag of its own."""

    ratio: str = "token"
    clip_low: float = 0.2
    clip_high: float = 0.2
    dual_clip: float = 3.0
    aggregation: str = "token-mean"
    scale_by_std: bool = True
    dynamic_sampling: bool = False
    overlong: int = 0
    weight_decay: float = 0.01
    warmup: float = 0.0


ALGORITHMS = {
    "grpo": Algorithm(),
    "dapo": Algorithm(
        clip_high=0.28,
        dual_clip=10.0,
        dynamic_sampling=True,
        overlong=4096,
        weight_decay=0.1,
        warmup=10,
    ),
    "gspo": Algorithm(
        ratio="sequence",
        clip_low=3e-4,
        clip_high=4e-4,
        dual_clip=0.0,
        aggregation="seq-mean-token-mean",
        weight_decay=0.1,
        warmup=0.05,
    ),
    "dr_grpo": Algorithm(aggregation="constant", scale_by_std=False),
}


@dataclass(kw_only=True)
class Args(Common):
    steps: int = option(1500, "updates in all", least=1)
    max_response: int = option(8192, "tokens, end token included", least=1)
    weight_decay: float | None = option(None, "AdamW's, on matrices only; none: the algorithm's")
    warmup: float | None = option(
        None,
        "of the learning rate: a share of all steps below 1, else steps; none: the algorithm's",
    )
    algo: Literal["grpo", "dapo", "gspo", "dr_grpo"] = option(
        "grpo", "sets the defaults of --ratio to --overlong, of --weight_decay and --warmup"
    )
    ratio: Literal["token", "sequence"] | None = option(
        None, "importance ratio per token, or per sequence (GSPO)"
    )
    clip_low: float | None = option(None, "the ratio is clipped to [1 - clip_low, 1 + clip_high]")
    clip_high: float | None = option(None, "see --clip_low")
    dual_clip: float | None = option(
        None, "bound on the loss where the advantage is negative; 0: none"
    )
    aggregation: Literal["token-mean", "seq-mean-token-mean", "constant"] | None = option(
        None, "of the loss over tokens"
    )
    scale_by_std: bool | None = option(
        None, "divide the advantage by the group's standard deviation"
    )
    dynamic_sampling: bool | None = option(
        None, "draw until enough groups hold both right and wrong answers (DAPO)"
    )
    overlong: int | None = option(
        None,
        "tokens before max_response over which a penalty grows from 0 to -1 (DAPO); 0: none",
    )
    prompts_per_step: int = option(32, "groups per update, over all ranks", least=1)
    prompts_per_draw: int = option(
        96, "prompts per draw of dynamic sampling, over all ranks", least=1
    )
    max_draws: int = option(10, "after which dynamic sampling trains on what it has", least=1)
    group_size: int = option(16, "rollouts per prompt", least=2)
    minibatches: int = option(
        1, "updates per step; above 1 the ratios leave 1 and clipping acts", least=1
    )
    temperature: float = option(1.0, "of sampling and of the log-probs alike", above=0)
    kl: float = option(0.0, "coefficient of the k3 estimate of KL(policy || start policy)")
    slots: int = option(256, "rows decoded at once, per device", least=1)

    def __post_init__(self):
        super().__post_init__()
        overlong = chosen_algorithm(self).overlong
        if overlong >= self.max_response:
            preset = f", as --algo {self.algo} has it," if self.overlong is None else ""
            raise ValueError(
                f"--overlong {overlong}{preset} must be below --max_response {self.max_response}: "
                "give --overlong, 0 for no penalty"
            )
        if 0 < (self.dual_clip or 0) <= 1:
            raise ValueError(
                f"--dual_clip is {self.dual_clip}: a bound of |advantage| or less would stop every "
                "token with a negative one; it must be above 1, or 0 for none"
            )
        if self.minibatches > self.prompts_per_step:
            raise ValueError("--minibatches is at most --prompts_per_step")


def chosen_algorithm(args) -> Algorithm:
    """The preset --algo, with what was given by a flag of its own."""
    given = {f.name: getattr(args, f.name) for f in fields(Algorithm)}
    return replace(ALGORITHMS[args.algo], **{name: x for name, x in given.items() if x is not None})


# ----------------------------------------------------------------------------- the algorithm
def group_advantage(reward, group_size, scale_by_std=True):
    """(reward - mean) / (std + 1e-6) within groups of `group_size` consecutive entries: (B,) ->
    (B,).

    The standard deviation is the unbiased one (GRPO, arXiv 2402.03300); without it: Dr. GRPO
    (2503.20783). Where all rewards of a group are equal its advantages are 0 (their rounding,
    divided by itself, would give whole ones). Raises ValueError where group_size does not divide B
    or is below 2.
    """
    if group_size < 2 or len(reward) % group_size:
        raise ValueError(
            f"{len(reward)} rewards are no groups of {group_size} (a group needs 2 or more)"
        )
    groups = reward.float().view(-1, group_size)
    advantage = groups - groups.mean(1, keepdim=True)
    if scale_by_std:
        advantage = advantage / (groups.std(1, keepdim=True) + 1e-6)
    equal = groups.amax(1, keepdim=True) == groups.amin(1, keepdim=True)
    return advantage.masked_fill(equal, 0.0).flatten()


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
    """Clipped policy-gradient loss of GRPO, DAPO, Dr. GRPO (a ratio per token) and GSPO (a ratio
    per sequence).

    logp, old_logp (B, T): log-probs under the policy, and under the one that sampled. advantage
    (B,). mask (B, T), bool or float: 1 on trained tokens; what stands elsewhere has no influence.
    dual_clip bounds the loss of tokens with a negative advantage at dual_clip * |advantage| (arXiv
    1912.09729); None or 0: unbounded.
    aggregation, and what `denominator` counts over all packs and ranks (None: this call's own
    count): "token-mean" tokens, "seq-mean-token-mean" sequences, "constant" anything, required (Dr.
    GRPO).
    Returns (loss, metrics): parts of a batch with a shared denominator sum to the whole. metrics
    are over this call's tokens: `tokens`, `clip_frac`, `ratio_max`, `old_kl` (the k1 estimate of
    KL(old || new)).
    """
    mask = mask.bool()
    advantage = advantage.unsqueeze(1)  # (B, 1)
    lengths = mask.sum(1)  # (B,)
    log_ratio = (logp - old_logp).masked_fill(~mask, 0.0).clamp(-20, 20)
    if ratio == "sequence":  # GSPO (2507.18071): exp(mean_t log-ratio), its gradient on all tokens
        mean = (log_ratio.sum(1) / lengths.clamp(min=1)).detach().unsqueeze(1)
        zero_with_gradient = (logp - logp.detach()).masked_fill(~mask, 0.0)
        log_ratio = (mean + zero_with_gradient).clamp(max=10.0)
    r = log_ratio.exp()  # (B, T)
    plain = -advantage * r
    clipped = -advantage * r.clamp(1 - clip_low, 1 + clip_high)
    loss = torch.maximum(plain, clipped)
    if dual_clip:
        bounded = torch.minimum(loss, -advantage * dual_clip)
        loss = torch.where(advantage < 0, bounded, loss)
    loss = loss.masked_fill(~mask, 0.0)  # (B, T)

    if aggregation == "seq-mean-token-mean":
        total = (loss.sum(1) / lengths.clamp(min=1)).sum()
        count = (lengths > 0).sum()
    else:
        total = loss.sum()
        count = lengths.sum()
    if denominator is None and aggregation == "constant":
        raise ValueError("aggregation 'constant' needs a denominator")
    if denominator is None:
        denominator = count.clamp(min=1)

    tokens = int(lengths.sum())
    metrics = {
        "tokens": tokens,
        "clip_frac": torch.nan,
        "ratio_max": torch.nan,
        "old_kl": torch.nan,
    }
    if tokens:
        metrics["clip_frac"] = float((clipped > plain)[mask].float().mean())
        metrics["ratio_max"] = float(r.detach()[mask].max())
        metrics["old_kl"] = float((old_logp - logp).detach()[mask].mean())
    return total / denominator, metrics


def pack_loss(pack, logp, old_logp, advantage, algorithm, denominator):
    """`policy_loss` of the scored tokens (S,) of a pack, with the settings of an `Algorithm`.
    advantage: (K,), of each of the pack's rollouts."""
    return policy_loss(
        pack.rows(logp),
        pack.rows(old_logp),
        advantage,
        pack.rows(torch.ones_like(old_logp)),
        ratio=algorithm.ratio,
        clip_low=algorithm.clip_low,
        clip_high=algorithm.clip_high,
        dual_clip=algorithm.dual_clip,
        aggregation=algorithm.aggregation,
        denominator=denominator,
    )


def on_policy_coefficient(pack, advantage, algorithm, denominator):
    """d pack_loss / d logp of each scored token, (S,), where the policy is the one that sampled.

    It is known before any log-prob is: a policy-gradient loss has its gradient from the ratios, and
    on policy they are all 1. So zeros stand for both log-probs here. Where a loss has another
    gradient at the real ones, token_logps raises ValueError in the backward pass.
    """
    logp = torch.zeros(len(pack.target), device=pack.ids.device, requires_grad=True)
    loss, _ = pack_loss(pack, logp, logp.detach(), advantage, algorithm, denominator)
    (coefficient,) = torch.autograd.grad(loss, logp)
    return coefficient


def k3(logp, ref_logp):
    """Schulman's k3 estimate of KL(policy || reference) per token: never negative, unbiased."""
    difference = ref_logp - logp
    return difference.exp() - difference - 1


def overlong_penalty(length, limit, buffer):
    """0 up to limit - buffer tokens, then linearly to -1 at the limit (DAPO, arXiv 2503.14476,
    equation 13). buffer 0: no penalty."""
    if buffer == 0:
        return 0.0
    return -max(0, length - (limit - buffer)) / buffer


def loss_denominator(groups, aggregation, max_response):
    """What the loss of these groups is divided by: tokens, sequences, or, for Dr. GRPO, sequences
    times the longest allowed (no length of a response in it)."""
    if aggregation == "token-mean":
        return max(1, sum(group.tokens() for group in groups))
    sequences = max(1, sum(len(group.rollouts) for group in groups))
    return sequences * max_response if aggregation == "constant" else sequences


# ----------------------------------------------------------------------------- groups to train on
def collect(step, data, order, hf, encoder, args, kept):
    """Draw and sample until args.prompts_per_step groups are there to train on. Without dynamic
    sampling that is one draw. All ranks call it, and get the same.

    kept: the last step's surplus, which is used first; what is left of it is dropped. Returns
    (groups to train on, new surplus, all that was sampled, counts).
    """
    algorithm = chosen_algorithm(args)
    dynamic = algorithm.dynamic_sampling
    prompts = args.prompts_per_draw if dynamic else args.prompts_per_step
    most = args.max_draws if dynamic else 1
    wanted = args.prompts_per_step
    fresh = []
    sampled = []
    draws = 0
    while draws < most and len(kept) + len(fresh) < wanted:
        drawn = [Group(prompt) for prompt in data.draw(order, prompts, encoder.prompt)]
        sample_groups(hf, encoder, drawn, verify, args, (args.seed, step, draws))
        for group in drawn:
            lengths = [len(rollout.ids) for rollout in group.rollouts]
            penalty = [overlong_penalty(n, args.max_response, algorithm.overlong) for n in lengths]
            group.verdicts["reward"] = group.verdicts["reward"] + torch.tensor(penalty)
            if not dynamic or teaches(group):
                fresh.append(group)
        sampled += drawn
        draws += 1
    groups = (kept + fresh)[:wanted]
    surplus = fresh[max(0, wanted - len(kept)) :]
    counts = {
        "draws": draws,
        "sampled": len(sampled),
        "groups": len(groups),
        "surplus": len(surplus),
        "dropped": max(0, len(kept) - wanted),
    }
    return groups, surplus, sampled, counts


def teaches(group):
    """DAPO keeps groups with both right and wrong answers. It looks at accuracy, not at the shaped
    reward: equal answers of unequal length teach nothing."""
    return 0 < group.verdicts["accuracy"].mean() < 1


@torch.no_grad()
def trainer_logps(policy, groups, args, device):
    """Log-probs of every rollout under `policy` as it is: for each group N of (T,), on every rank.
    All ranks call it with the same groups."""
    found = []
    for pack in packs_of([group.tree() for group in groups], args.pack_tokens, device):
        logp = policy(pack, args.temperature, policy.encoder.banned).cpu()  # (S,)
        lengths = pack.sequence.bincount().tolist()
        found.extend(zip(pack.children, logp.split(lengths), strict=True))
    logps = [[None] * len(group.rollouts) for group in groups]
    for part in gather(found):
        for (g, k), logp in part:
            logps[g][k] = logp
    return logps


def remember_logps(policy, groups, args, device):
    """Fill in group.old_logp under `policy` as it is. All ranks call it."""
    for group, logps in zip(groups, trainer_logps(policy, groups, args, device), strict=True):
        group.old_logp = logps


# ----------------------------------------------------------------------------- the policy's update
def update_policy(policy, opt, groups, args, device, reference=None):
    """One step of the policy on group.advantage, in args.minibatches updates -> metrics. All ranks
    call it with the same groups.

    reference: the start policy, for the KL term.
    """
    on_policy = args.minibatches == 1 and all(group.old_logp is None for group in groups)
    if not on_policy:  # else each log-prob is its own old one, and every ratio is 1
        fresh = [group for group in groups if group.old_logp is None]
        remember_logps(policy, fresh, args, device)
    if reference is not None:
        for group, logps in zip(
            groups, trainer_logps(reference, groups, args, device), strict=True
        ):
            group.ref_logp = logps
    sums = dict.fromkeys(("loss", "clipped", "entropy", "logp_diff", "kl"), 0.0)
    most = {"ratio_max": torch.tensor(1.0), "logp_diff_max": torch.tensor(0.0)}
    norms = []
    skipped = 0
    for part in range(args.minibatches):
        chosen = [
            group for g, group in enumerate(groups) if g * args.minibatches // len(groups) == part
        ]
        if not chosen:  # fewer groups than minibatches
            continue
        loss = accumulate_gradient(policy, chosen, on_policy, args, device, sums, most)
        norm, bad = step_if_finite(opt, loss, args.grad_clip, "policy")
        norms.append(norm)
        skipped += bad
        sums["loss"] += loss
    sums = all_sum(sums)
    tokens = sum(group.tokens() for group in groups) or torch.nan
    return {
        "loss": sums["loss"] / len(norms),
        "grad_norm": sum(norms) / len(norms),
        "skipped": skipped,
        "clip_frac": sums["clipped"] / tokens,
        "ratio_max": all_max(most["ratio_max"]).item(),
        "entropy": sums["entropy"] / tokens,
        "kl": sums["kl"] / tokens if reference is not None else torch.nan,
        "tokens": tokens,
        "logp_diff": sums["logp_diff"] / tokens,
        "logp_diff_max": all_max(most["logp_diff_max"]).item(),
    }


def accumulate_gradient(policy, groups, on_policy, args, device, sums, most):
    """The gradient of the loss of a minibatch of `groups` -> this rank's part of that loss. All
    ranks call it with the same groups. Adds to the sums, and updates the maxima `most`, of
    update_policy."""
    algorithm = chosen_algorithm(args)
    with_kl = groups[0].ref_logp is not None
    denominator = loss_denominator(groups, algorithm.aggregation, args.max_response)
    tokens = max(1, sum(group.tokens() for group in groups))
    loss_sum = 0.0
    for pack in packs_of([group.tree() for group in groups], args.pack_tokens, device):
        advantage = [float(groups[g].advantage[k]) for g, k in pack.children]
        advantage = torch.tensor(advantage, device=device)  # (K,)
        coefficient = None  # (S,) d loss / d logp
        if on_policy and not with_kl:
            coefficient = on_policy_coefficient(pack, advantage, algorithm, denominator)
        banned = policy.encoder.banned
        logp, entropy = policy(
            pack, args.temperature, banned, entropy=True, coefficient=coefficient
        )
        old_logp = logp.detach()
        if not on_policy:
            old_logp = kept_logps(pack, [group.old_logp for group in groups])  # (S,)
        loss, found = pack_loss(pack, logp, old_logp, advantage, algorithm, denominator)
        if with_kl:
            kl = k3(logp, kept_logps(pack, [group.ref_logp for group in groups]))  # (S,)
            loss = loss + args.kl * kl.sum() / tokens
            sums["kl"] += float(kl.detach().sum())
        (loss * world()).backward()  # FSDP averages over ranks; the denominator is global already
        loss_sum += float(loss.detach())
        difference = (old_logp - sampler_logps(pack, groups)).abs()  # under the one that sampled
        sums["entropy"] += float(entropy.sum())
        sums["logp_diff"] += float(difference.sum())
        if found["tokens"]:
            sums["clipped"] += found["clip_frac"] * found["tokens"]
            # torch's maximum keeps a NaN, Python's max may lose it
            ratio_max = torch.tensor(found["ratio_max"])
            most["ratio_max"] = torch.maximum(most["ratio_max"], ratio_max)
            logp_diff_max = difference.max().cpu()
            most["logp_diff_max"] = torch.maximum(most["logp_diff_max"], logp_diff_max)
    return loss_sum


def kept_logps(pack, logps):
    """The scored tokens' (S,) of log-probs that were kept: of each group N of (T,)."""
    of_pack = [logps[g][k] for g, k in pack.children]
    return torch.cat([*of_pack, torch.zeros(0)]).to(pack.ids.device)


# ----------------------------------------------------------------------------- the loop
def main(args):
    # set-up
    ranks = setup(args)
    device = ranks.device
    # model: the policy, the copy that samples, the start policy for a KL term
    images = {"max_pixels": args.max_pixels, "max_side": args.max_side}
    policy = load(args.policy, max_prompt_tokens=args.max_prompt, **images).train()
    encoder = policy.encoder
    reference = None
    if args.kl:
        reference = load(args.policy).requires_grad_(False)
    if args.freeze_vision:
        freeze_vision(policy.hf.model)
    sampler = RolloutCopy(policy, args, device)
    shard(policy, policy.hf.model, args, ranks)
    if reference is not None:
        shard(reference, reference.hf.model, args, ranks)
    # optimiser
    algorithm = chosen_algorithm(args)
    opt = optimizer(policy, args.lr, algorithm.weight_decay)
    rate = Schedule(args.schedule, args.steps, algorithm.warmup)
    players = {"policy": (policy, opt)}
    # data
    data = read(args.data, "rl", args.image_root, args.max_bad, args.workers)
    order = data.order(args.seed)
    if args.eval_data:
        held_out = read(args.eval_data, "eval", args.image_root, args.max_bad, args.workers)
        warn_of_overlap(held_out, data, args)
    # resume
    start = 0
    surplus = []
    if args.resume and (found := restore(f"{args.out}/last", players, args)):
        meta, state = found
        start = meta["step"]
        order.load(state["order"])
        rate.resume(state["rate"], start)
        surplus = [group_from_plain(plain, data, encoder) for plain in state["surplus"]]
    shown = ("loss", "reward", "accuracy", "format", "length", "entropy", "grad_norm grad")
    log = Log(args.out, args, shown, start)
    save_weights = partial(save_policy, policy)
    checkpoints = Checkpoints(args, args.steps, players, save_weights, start)
    if start == 0 and args.eval_data:
        metrics = validate(sampler.refresh(), encoder, held_out, measure, args, ranks)
        log.step(0, metrics)
        checkpoints.save(0, metrics, state_of(order, rate, surplus))

    for step in range(start, args.steps):
        # 1) rollout   2) score
        hf = sampler.refresh()
        groups, surplus, sampled, counts = collect(step, data, order, hf, encoder, args, surplus)
        remember_logps(
            policy, surplus, args, device
        )  # they are trained on after this step's update
        # 3) advantage
        for group in groups:
            reward = group.verdicts["reward"]
            group.advantage = group_advantage(reward, args.group_size, algorithm.scale_by_std)
        # 4) update the policy
        metrics = {"loss": torch.nan, "grad_norm": torch.nan, "skipped": 1}
        if groups:
            set_lr(opt, args.lr * rate.factor(step))
            metrics = update_policy(policy, opt, groups, args, device, reference)
        # 5) log
        metrics |= rollout_metrics(sampled or groups)  # a step may live on surplus alone
        metrics |= counts
        metrics["lr"] = opt.param_groups[0]["lr"]
        metrics["left_out"] = len(data.bad)
        if validation_is_due(args, step + 1, args.steps):
            metrics |= validate(sampler.refresh(), encoder, held_out, measure, args, ranks)
        log.step(step + 1, metrics)
        if args.sample_every and step % args.sample_every == 0 and groups:
            show_rollouts(log, step + 1, groups[0], groups[0].verdicts)
        # 6) save
        stop = ranks.stop()
        checkpoints.save(step + 1, metrics, state_of(order, rate, surplus), stop)
        if stop:
            sys.exit(SAVED_AND_STOPPED)
    ranks.close()


def state_of(order, rate, surplus):
    """What a resumed run goes on with, beside weights and optimiser."""
    return {
        "order": order.state(),
        "rate": rate.state(),
        "surplus": [group_to_plain(group) for group in surplus],
    }


def group_to_plain(group):
    """A surplus group as plain values and CPU tensors, for a checkpoint."""
    return {
        "row": group.prompt.example.row,
        "rollouts": [(r.ids, r.logps, r.stop) for r in group.rollouts],
        "texts": group.texts,
        "verdicts": group.verdicts,
        "old_logp": group.old_logp,
    }


def group_from_plain(plain, data, encoder):
    """What `group_to_plain` was given."""
    return Group(
        encoder.prompt(data[plain["row"]]),
        [Rollout(*rollout) for rollout in plain["rollouts"]],
        plain["texts"],
        plain["verdicts"],
        old_logp=plain["old_logp"],
    )


if __name__ == "__main__":
    main(parse(Args))
