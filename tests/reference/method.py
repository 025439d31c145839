"""
The formulas of METHOD.md. Lists are over the rollouts of a group, or over sequences; every number
is a float64 tensor or a Python float.
"""

import math

import numpy as np
import torch

WELL_BELOW = -1.0  # a malformed rollout's place below the group's lowest score

# METHOD.md's table of stage 3.
GRPO = {
    "ratio": "token",
    "clip_low": 0.2,
    "clip_high": 0.2,
    "dual_clip": 3.0,
    "aggregation": "token-mean",
    "scale_by_std": True,
    "dynamic_sampling": False,
    "overlong": 0,
    "weight_decay": 0.01,
    "warmup": 0.0,
}
ALGORITHMS = {
    "grpo": GRPO,
    "dapo": {
        **GRPO,
        "clip_high": 0.28,
        "dual_clip": 10.0,
        "dynamic_sampling": True,
        "overlong": 4096,
        "weight_decay": 0.1,
        "warmup": 10,
    },
    "gspo": {
        **GRPO,
        "ratio": "sequence",
        "clip_low": 3e-4,
        "clip_high": 4e-4,
        "dual_clip": 0.0,
        "aggregation": "seq-mean-token-mean",
        "weight_decay": 0.1,
        "warmup": 0.05,
    },
    "dr_grpo": {**GRPO, "aggregation": "constant", "scale_by_std": False},
}


# ----------------------------------------------------------------------------- advantages
def normalise(scores, std_floor=0.0):
    """GN(s) = (s - mean) / (std + 1e-6), the unbiased std; 0 where nothing is to be told apart."""
    if len(scores) < 2 or max(scores) == min(scores):
        return [0.0] * len(scores)
    mean = sum(scores) / len(scores)
    variance = sum((score - mean) ** 2 for score in scores) / (len(scores) - 1)
    std = max(math.sqrt(variance), std_floor)
    return [(score - mean) / (std + 1e-6) for score in scores]


def alignment_advantage(
    scores, weights, *, clip, penalty=1.5, normalize="span", malformed="floor", std_floor=0.0
):
    """scores: for each kind of span its raw scores, None where malformed -> the group's advantages.

    Clipped to +-clip; malformed: the lowest of the well-formed - 1 (-1 where there is none), and a
    penalty.
    """
    rollouts = len(scores[0])
    well_formed = [scores[0][i] is not None for i in range(rollouts)]
    counted = [i for i in range(rollouts) if well_formed[i] or malformed == "floor"]
    filled = []
    for kind in scores:
        clipped = [max(-clip, min(clip, s)) if s is not None else None for s in kind]
        present = [s for s in clipped if s is not None]
        low = min(present, default=0.0) + WELL_BELOW
        clipped = [low if s is None else s for s in clipped]
        filled.append([clipped[i] for i in counted])
    if normalize == "span":
        total = weigh(weights, [normalise(kind, std_floor) for kind in filled])
    else:
        total = normalise(weigh(weights, filled), std_floor)
    advantage = [0.0] * rollouts
    for place, i in enumerate(counted):
        advantage[i] = total[place]
        if not well_formed[i]:
            advantage[i] -= penalty
    return advantage


def weigh(weights, kinds):
    """Of each rollout the weighted sum over the kinds of span."""
    return [
        sum(weight * score for weight, score in zip(weights, scores, strict=True))
        for scores in zip(*kinds, strict=True)
    ]


def reward_advantage(rewards, scale_by_std):
    """GRPO's advantage of a group's rewards; Dr. GRPO's is without the standard deviation."""
    if scale_by_std:
        return normalise(rewards)
    if max(rewards) == min(rewards):
        return [0.0] * len(rewards)
    mean = sum(rewards) / len(rewards)
    return [reward - mean for reward in rewards]


def overlong_penalty(length, limit, buffer):
    """Linear from 0 to -1 over the last `buffer` tokens of the limit."""
    beyond = length - (limit - buffer)
    return -beyond / buffer if buffer and beyond > 0 else 0.0


# ----------------------------------------------------------------------------- the discriminator
def discriminator_loss(pairs, balances, l2, balance):
    """pairs: for each kind of span, (reference's score, rollout's score) of every well-formed
    rollout of the step. balances: (load balance of a prompt, its well-formed rollouts).

    sum over kinds of mean -log sigmoid(reference - rollout) + l2 * mean square of all raw scores
    + balance * load balance.
    """
    loss = 0.0
    squares = []
    for kind in pairs:
        losses = [-torch.nn.functional.logsigmoid(theirs - ours) for theirs, ours in kind]
        loss = loss + sum(losses) / len(losses)
        squares += [score**2 for pair in kind for score in pair]
    loss = loss + l2 * sum(squares) / len(squares)
    rollouts = sum(count for _, count in balances)
    return loss + balance * sum(count / rollouts * value for value, count in balances)


def load_balance(layers):
    """Switch's E * sum_e f_e P_e of one prompt's tokens, as a mean over layers; layers: of each the
    probabilities and the shares of its tokens, (T, E) both."""
    values = []
    for probability, share in layers:
        experts = probability.shape[1]
        values.append(experts * (share.mean(0) * probability.mean(0)).sum())
    return sum(values) / len(values)


# ----------------------------------------------------------------------------- the policy
def sequence_losses(logp, old, advantage, *, ratio, clip_low, clip_high, dual_clip):
    """One sequence's losses (T,) -> (losses, ratios, whether the clip acts on each)."""
    if ratio == "token":
        r = (logp - old).exp()
    else:  # GSPO: one ratio for all tokens, with a gradient through each token's own log-prob
        mean = (logp - old).mean().detach()
        r = mean.exp() * (logp - logp.detach()).exp()
    bounded = r.clamp(1 - clip_low, 1 + clip_high)
    loss = torch.maximum(-advantage * r, -advantage * bounded)
    clipped = -advantage * bounded > -advantage * r
    if dual_clip and advantage < 0:
        loss = torch.minimum(loss, torch.tensor(-advantage * dual_clip, dtype=loss.dtype))
    return loss, r.detach(), clipped.detach()


def aggregate(losses, how, max_response):
    """The loss of a batch of the sequences' losses, (T,) each."""
    if how == "token-mean":
        return sum(loss.sum() for loss in losses) / sum(len(loss) for loss in losses)
    if how == "seq-mean-token-mean":
        return sum(loss.mean() for loss in losses) / len(losses)
    return sum(loss.sum() for loss in losses) / (len(losses) * max_response)  # Dr. GRPO


def k3(logp, start):
    """Schulman's estimate of KL(policy || start policy), per token."""
    ratio = (start - logp).exp()
    return ratio - 1 - (start - logp)


# ----------------------------------------------------------------------------- the update
def learning_rate(step, peak, total, warmup, schedule):
    """Of update `step`, from 0: linear over the warm-up (its last update has the peak), then
    constant or a cosine to 0."""
    first = warmup * total if warmup < 1 else warmup
    if step < first:
        return peak * min(1.0, (step + 1) / first)
    if schedule == "constant":
        return peak
    return peak * 0.5 * (1 + math.cos(math.pi * (step - first) / max(1, total - first)))


def total_norm(gradients):
    return math.sqrt(sum(float((g.double() ** 2).sum()) for g in gradients if g is not None))


class AdamW:
    """Decoupled weight decay on matrices alone, of gradients clipped to a global norm."""

    def __init__(self, decay, clip):
        self.decay = decay
        self.clip = clip
        self.first = {}
        self.second = {}
        self.updates = {}  # of each tensor: a step without a gradient is none

    def step(self, weights, gradients, rate):
        """{name: tensor} of weights and of unclipped gradients -> the new weights."""
        norm = total_norm(gradients.values())
        scale = min(1.0, self.clip / norm) if norm else 1.0
        new = {}
        for name, weight in weights.items():
            weight = weight.double()
            if gradients[name] is None:
                new[name] = weight
                continue
            self.updates[name] = self.updates.get(name, 0) + 1
            g = gradients[name].double() * scale
            self.first[name] = 0.9 * self.first.get(name, 0.0) + 0.1 * g
            self.second[name] = 0.999 * self.second.get(name, 0.0) + 0.001 * g**2
            m = self.first[name] / (1 - 0.9 ** self.updates[name])
            v = self.second[name] / (1 - 0.999 ** self.updates[name])
            if weight.ndim > 1:
                weight = weight - rate * self.decay * weight
            new[name] = weight - rate * m / (v.sqrt() + 1e-8)
        return new


# ----------------------------------------------------------------------------- the sampler
def uniforms(seed, k, length):
    """The numbers of the k-th rollout of the prompt that the ints `seed` name, one for a token."""
    bits = np.random.Philox(np.random.SeedSequence([*seed, k]))
    return np.random.Generator(bits).random(length)


def draw(log_probs, u):
    """The first id whose cumulative probability is above u, and how near u is to its bounds."""
    cumulative = log_probs.exp().cumsum(-1)
    cumulative = cumulative / cumulative[-1]
    drawn = int((cumulative <= u).sum())
    return drawn, float((cumulative - u).abs().min())
