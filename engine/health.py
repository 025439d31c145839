"""
Is the adversarial game sound? These are pure functions of what a step has scored; docs/method.md
has the healthy ranges.

    B pairs of one span   L layers   E experts   F features of a probe

NaN always means that there was no data, never 0. A discriminator that wins by something else than
content shows here: by length (`length_corr`, `longer`, `length_probe`), or by the token at which
the score is read (`leak`).
"""

from dataclasses import dataclass
from math import log, nan

import torch
import torch.nn.functional as F


@dataclass
class ScoredPairs:
    """
    The B pairs of one span in a step: a rollout's span beside the reference's of the same prompt. A
    reference stands in as many pairs as its prompt has well-formed rollouts. B may be 0.
    """

    reference: torch.Tensor  # (B,) float64, raw scores of the references' spans
    policy: torch.Tensor  # (B,) float64, raw scores of the rollouts' spans
    group: torch.Tensor  # (B,) a number for each prompt, the same in all pairs of the prompt
    reference_length: torch.Tensor  # (B,) float64, tokens
    policy_length: torch.Tensor  # (B,) float64, tokens


def scored_pairs(groups, names):
    """{name of a span: its ScoredPairs} of all pairs of a step."""
    pairs = {}
    for s, name in enumerate(names):
        rows = []
        for g, group in enumerate(groups):
            for k in group.well_formed.nonzero().flatten().tolist():
                scores = (float(group.reference_score[s]), float(group.score[s, k]))
                rows.append((*scores, g, len(group.reference[s]), len(group.spans[k][s])))
        columns = torch.tensor(rows, dtype=torch.float64).reshape(-1, 5).unbind(1)
        pairs[name] = ScoredPairs(*columns)
    return pairs


def probes_of(groups, names):
    """{name of a span: (prompts, references, rollouts)}, token ids of each pair of a step."""
    probes = {}
    for s, name in enumerate(names):
        prompts, references, policies = [], [], []
        for group in groups:
            for k in group.well_formed.nonzero().flatten().tolist():
                prompts.append(group.seen.ids.tolist())
                references.append(group.reference[s])
                policies.append(group.spans[k][s])
        probes[name] = (prompts, references, policies)
    return probes


def game_metrics(pairs, load, clip):
    """
    Return all that is logged of the discriminator's side in one step: {"<span>/<metric>": float}.

    pairs: {name of a span: its ScoredPairs}, all in the same order of rollouts.
    load: (spans, L, E), how many tokens of each span each expert got, in the order of the names; L
    is 0 where nothing is routed.
    clip: the bound on the scores as rewards.

    `advantage_corr` says whether the first two spans prefer the same rollouts.
    """
    metrics = {}
    for name, counts in zip(pairs, load, strict=True):
        found = span_metrics(pairs[name], clip)
        if len(counts):
            found.update(expert_load(counts))
        for metric, value in found.items():
            metrics[f"{name}/{metric}"] = value
    if len(pairs) >= 2:
        first, second, *_ = pairs.values()
        if torch.equal(first.group, second.group):
            first_advantage = _centred(first.policy, first.group)
            second_advantage = _centred(second.policy, second.group)
            metrics["advantage_corr"] = correlation(first_advantage, second_advantage)
    return metrics


def span_metrics(pairs, clip):
    """
    Return the metrics of the pairs of one span. `acc` of 1/2 is chance, `saturated` of 1 is bad.
    """
    margin = pairs.reference - pairs.policy  # (B,)
    advantage = _centred(pairs.policy, pairs.group)
    length = _centred(pairs.policy_length, pairs.group)
    metrics = {
        "acc": accuracy(margin),
        "margin": _mean(margin),
        "margin_p10": _quantile(margin, 0.1),
        "margin_p90": _quantile(margin, 0.9),
        "saturated": _mean(margin.float().sigmoid() > 0.99),
    }
    for side, scores in (("reference", pairs.reference), ("policy", pairs.policy)):
        for name, value in moments(scores).items():
            metrics[f"{side}_{name}"] = value
    metrics.update(group_spread(pairs.policy, pairs.group))
    metrics["length_corr"] = correlation(advantage, length)
    metrics["longer"] = accuracy(pairs.reference_length - pairs.policy_length)
    metrics["clipped"] = _mean(pairs.policy.abs() > clip)
    return metrics


def accuracy(margin):
    """
    Return the share of margins (B,) above 0; ties count one half. What is closer than 1e-6 is a
    tie: the same text twice in a pack has the same score only up to rounding.
    """
    sign = margin.masked_fill(margin.abs() <= 1e-6, 0).sign()
    return _mean((sign + 1) / 2)


def canary_metrics(groups, names):
    """
    Return {"<span>/auc": float, "<span>/auc_pairs": int}, of every pair of rollouts of one prompt
    of which the verifier takes one for right and one for wrong: in what share of them the right
    one's span has the higher score (equal scores count one half; 1/2 is chance, NaN without a
    pair), and how many there are. Malformed rollouts are in none.

    No score is trained to tell them apart: it says whether what the policy is rewarded for goes
    along with being right.
    """
    metrics = {}
    for s, name in enumerate(names):
        margins = []
        for group in groups:
            score = group.score[s][group.well_formed]
            right = group.verdicts["accuracy"][group.well_formed] > 0
            margins.append((score[right].unsqueeze(1) - score[~right]).flatten())
        margin = torch.cat(margins)
        metrics[f"{name}/auc"] = accuracy(margin)
        metrics[f"{name}/auc_pairs"] = len(margin)
    return metrics


def moments(scores):
    """
    Return mean, std and absmax of scores (B,). They show a drift of the scores' level, which
    advantages and the Bradley-Terry loss cannot see, because a shift does not change them.
    """
    std = nan
    if len(scores) > 1:
        std = scores.float().std().item()
    return {"mean": _mean(scores), "std": std, "absmax": _quantile(scores.abs(), 1.0)}


def group_spread(scores, group, floor=1e-3):
    """
    Return the unbiased standard deviation of the scores (B,) within groups: its mean over the
    groups of two or more, and the share of them in which it is below `floor`. The advantages of
    such a flat group are noise.
    """
    stds = []
    for number in group.unique():
        members = scores[group == number]
        if len(members) > 1:
            stds.append(members.float().std())
    spread = torch.tensor(stds)  # (groups of two or more,)
    return {"group_std": _mean(spread), "flat_groups": _mean(spread < floor)}


def correlation(a, b):
    """Return Pearson's correlation of a and b (B,), NaN where one of them does not vary."""
    if len(a) < 2:
        return nan
    a_centred = a.double() - a.double().mean()
    b_centred = b.double() - b.double().mean()
    norm = a_centred.norm() * b_centred.norm()
    if not norm > 1e-12:
        return nan
    return ((a_centred * b_centred).sum() / norm).item()


def expert_load(counts):
    """
    Return how evenly the tokens of one span spread over the experts of each layer, from their
    counts (L, E).

    `expert_i` is the share of expert i, as a mean over layers, and `max_share` the largest share in
    any layer. `entropy` is that of the shares, as a mean over layers: 1 is balanced, 0 means that
    one expert has all.
    """
    experts = counts.shape[1]
    tokens = counts.double().sum(1, keepdim=True)
    share = counts.double() / tokens  # (L, E); NaN in a layer without tokens, and so is the result
    load = {f"expert_{i}": _mean(share[:, i]) for i in range(experts)}
    load["max_share"] = _quantile(share.flatten(), 1.0)
    load["entropy"] = nan
    if experts > 1:
        entropy = torch.special.entr(share).sum(1)  # (L,) in nats
        load["entropy"] = _mean(entropy / log(experts))
    return load


# ----------------------------------------------------------------------------- probes
def probe_metrics(probes):
    """
    Return what gives the sides of a pair away without reading: {"<span>/leak": float,
    "<span>/length_probe": float}.

    probes: {name of the span: (prompts, reference, policy)}, three lists of B lists of token ids:
    in each pair, of the prompt, of the reference's span and of the rollout's. A span without pairs
    has no metrics.
    """
    metrics = {}
    for name, (prompts, reference, policy) in probes.items():
        if prompts:
            metrics[f"{name}/leak"] = leak_probe(prompts, reference, policy)
            lengths = [torch.tensor([len(ids) for ids in side]) for side in (reference, policy)]
            metrics[f"{name}/length_probe"] = length_probe(prompts, *lengths)
    return metrics


def leak_probe(prompts, reference, policy, seed=0):
    """
    Return the held-out accuracy of a probe that sees the prompt and, moved right behind it, only
    the token at which each side's score is read. 0.5 is sound. Near 1 that token gives the side
    away, and no reading is needed to win.

    prompts, reference, policy: lists of B lists of token ids; of the spans' ids only the last is
    used. The probe's score is w[token] + u[token] · features(prompt).
    """
    if not prompts:
        return nan
    random = torch.Generator().manual_seed(seed)
    reference_last = [ids[-1] for ids in reference]
    policy_last = [ids[-1] for ids in policy]
    tokens = sorted(set(reference_last + policy_last))
    bias = torch.ones(len(prompts), 1)
    seen = torch.cat([bias, _prompt_features(prompts, random)], 1)  # (B, 1 + 8)
    # (B, tokens): the same token on both sides leaves zeros, which is a tie
    token_difference = _one_hot(reference_last, tokens) - _one_hot(policy_last, tokens)
    difference = token_difference.unsqueeze(2) * seen.unsqueeze(1)  # (B, tokens, 1 + 8)
    return _held_out_accuracy(difference.flatten(1), prompts, random)


def length_probe(prompts, reference_length, policy_length, seed=0):
    """
    Return the held-out accuracy of a probe that sees the spans' lengths (B,) alone. High is no
    defect: it says how much can be won without reading.
    """
    difference = _length_features(reference_length) - _length_features(policy_length)  # (B, 2)
    scale = difference.square().mean(0).sqrt().clamp(min=1e-6)
    random = torch.Generator().manual_seed(seed)
    return _held_out_accuracy(difference / scale, prompts, random)


def _prompt_features(prompts, random):
    """Return features (B, 8) of the prompts: means of rows of a random table, of length 1."""
    largest = max(max(ids) for ids in prompts)
    table = torch.randn(largest + 1, 8, generator=random)
    means = [table[torch.tensor(ids)].mean(0) for ids in prompts]
    return F.normalize(torch.stack(means), dim=1)


def _one_hot(chosen, tokens):
    column = {token: i for i, token in enumerate(tokens)}
    columns = torch.tensor([column[token] for token in chosen])
    return F.one_hot(columns, len(tokens))


def _length_features(length):
    return torch.stack([length.float(), length.float().log1p()], 1)


def _held_out_accuracy(difference, prompts, random):
    """
    Train a linear score on the pairs of one half of the prompts and return its accuracy on those of
    the other half, both ways. All pairs of a prompt are in the same half.

    difference: (B, F), the reference's features minus the policy's.
    """
    distinct = sorted({tuple(ids) for ids in prompts})  # sorted: any order of pairs, the same split
    if len(distinct) < 2:
        return nan
    number = {ids: i for i, ids in enumerate(distinct)}
    prompt = torch.tensor([number[tuple(ids)] for ids in prompts])  # (B,)
    first_half = torch.randperm(len(distinct), generator=random) < len(distinct) // 2
    first = first_half[prompt]  # (B,) bool
    margins = torch.zeros(len(difference))
    for train in (first, ~first):
        weight = _fit(difference[train])
        margins[~train] = difference[~train] @ weight
    return accuracy(margins)


def _fit(difference, steps=200):
    """
    Fit a linear Bradley-Terry score to differences (B, F) and return its weight (F,). The loss is
    mean(-log sigmoid(difference · weight)) + 0.01 |weight|²; no random number of the run is drawn.
    """
    weight = torch.zeros(difference.shape[1])
    optimizer = torch.optim.Adam([weight], lr=0.1)
    for _ in range(steps):
        wrong = (-difference @ weight).sigmoid()  # (B,)
        weight.grad = 0.02 * weight - wrong @ difference / len(difference)
        optimizer.step()
    return weight


# ----------------------------------------------------------------------------- NaN where nothing is
def _mean(x):
    if not len(x):
        return nan
    return x.double().mean().item()


def _quantile(x, q):
    if not len(x):
        return nan
    return x.float().quantile(q).item()


def _centred(x, group):
    """Return x (B,) minus the mean of its group, in float64."""
    centred = x.double()
    for number in group.unique():
        members = group == number
        centred = centred.where(~members, centred - x[members].double().mean())
    return centred
