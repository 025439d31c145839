"""
Is the adversarial game sound? Pure functions of what a step has gathered over all ranks; the README has healthy ranges.

    B pairs of a reference span and a policy span, of one kind, for the same prompt   P prompts   E experts   L layers

`reference`, `policy` (B,) raw scores; `group` (B,) which prompt a pair belongs to. NaN means that there was no data.
A discriminator that wins by something else than content shows here: by length (`length_corr`, `longer`,
`length_probe`), or by the token at which the score is read (`leak_probe`).
"""

from math import log, nan

import torch
import torch.nn.functional as F


def span_metrics(reference, policy, group, reference_length, policy_length):
    """All of a span kind's metrics, {name: float}; lengths (B,) in tokens. `acc` ½ is chance, `saturated` 1 is bad."""
    margin = reference - policy
    return {
        "acc": accuracy(margin),
        "margin": _mean(margin),
        "margin_p10": _quantile(margin, 0.1),
        "margin_p90": _quantile(margin, 0.9),
        "saturated": _mean(margin.float().sigmoid() > 0.99),
        **{f"reference_{k}": v for k, v in moments(reference).items()},
        **{f"policy_{k}": v for k, v in moments(policy).items()},
        **group_spread(policy, group),
        "length_corr": correlation(_centred(policy, group), _centred(policy_length, group)),
        "longer": accuracy(reference_length - policy_length),
    }


def game_metrics(rows, load, names, clip):
    """
    All that is logged of the discriminator's side in one step, {"<kind>/<metric>": float}. rows: a (kind, group,
    reference's score, rollout's score, reference's length, rollout's length) for each policy span, a rollout's spans in
    the same order in each kind; load (kinds, L, E): tokens that each expert got (L = 0: no routing); names: of kinds.
    """
    metrics, centred = {}, []
    for kind, name in enumerate(names):
        mine = torch.tensor(
            [row[1:] for row in rows if row[0] == kind], dtype=torch.float64
        ).reshape(-1, 5)
        group, reference, policy, *lengths = mine.unbind(1)
        found = span_metrics(reference, policy, group, *lengths) | {
            "clipped": _mean(policy.abs() > clip)
        }
        metrics |= {
            f"{name}/{k}": v
            for k, v in (found | (expert_load(load[kind]) if load.shape[1] else {})).items()
        }
        centred.append(_centred(policy, group))
    if len(names) == 2 and len(centred[0]) == len(centred[1]):
        metrics["advantage_corr"] = correlation(*centred)
    return metrics


def probe_metrics(probes, names):
    """What gives sides away without reading. probes: (kind, prompt ids, reference's ids, rollout's ids) per pair."""
    metrics = {}
    for kind in sorted({p[0] for p in probes}):
        prompts, reference, policy = zip(*[p[1:] for p in probes if p[0] == kind], strict=True)
        metrics[f"{names[kind]}/leak"] = leak_probe(prompts, reference, policy)
        lengths = (torch.tensor([len(ids) for ids in side]) for side in (reference, policy))
        metrics[f"{names[kind]}/length_probe"] = length_probe(prompts, *lengths)
    return metrics


def accuracy(margin):
    """Share of pairs in which the reference is ahead, ties ½ (the same text twice in a pack: equal up to rounding)."""
    return _mean((margin.masked_fill(margin.abs() <= 1e-6, 0).sign() + 1) / 2)


def moments(scores):
    """Drift that advantages and the Bradley-Terry loss cannot see, being invariant to a shift: mean, std, absmax."""
    std = scores.float().std().item() if len(scores) > 1 else nan
    return {"mean": _mean(scores), "std": std, "absmax": _quantile(scores.abs(), 1.0)}


def group_spread(scores, group, floor=1e-3):
    """Within-group std (unbiased): its mean, and the share of groups below `floor`, whose advantages are noise."""
    stds = torch.tensor(
        [scores[group == g].float().std() for g in group.unique() if (group == g).sum() > 1]
    )
    return {"group_std": _mean(stds), "flat_groups": _mean(stds < floor)}


def correlation(a, b):
    """Pearson's; NaN where either does not vary. Of scores and lengths, or of perception and reasoning advantages."""
    a, b = a.double() - a.double().mean(), b.double() - b.double().mean()
    norm = a.norm() * b.norm()
    return ((a * b).sum() / norm).item() if len(a) > 1 and norm > 1e-12 else nan


def expert_load(counts):
    """
    counts (L, E): tokens of one span kind that each expert of each layer got. `expert_i`: its share, mean over layers;
    `max_share`: the largest of any layer; `entropy` of the shares, mean over layers: 1 balanced, 0 one expert has all.
    """
    experts = counts.shape[1]
    share = counts.double() / counts.double().sum(
        1, keepdim=True
    )  # a layer without tokens: NaN, and so is the result
    means = {f"expert_{i}": _mean(share[:, i]) for i in range(experts)}
    entropy = torch.special.entr(share).sum(1) / log(experts) if experts > 1 else share[:0, 0]
    return {**means, "max_share": _quantile(share.flatten(), 1.0), "entropy": _mean(entropy)}


# ----------------------------------------------------------------------------- probes
def leak_probe(prompts, reference, policy, seed=0):
    """
    Held-out accuracy of a probe that sees prompt + only the token at which each side's score is read, moved right
    behind the prompt. 0.5 is sound; ~1: the kind of that token gives the side away, no reading is needed to win.

    prompts, reference, policy: lists of B lists of token ids; of the spans' ids only the last is used. Pairs of one
    prompt are all in training or all held out, each in turn. Score: w[token] + u[token] · features(prompt).
    """
    if not prompts:
        return nan
    tokens = {t: i for i, t in enumerate(sorted({ids[-1] for ids in [*reference, *policy]}))}
    random = torch.Generator().manual_seed(seed)
    table = torch.randn(
        max(map(max, prompts)) + 1, 8, generator=random
    )  # random features: the probe learns w and u
    means = torch.stack([F.normalize(table[torch.tensor(ids)].mean(0), dim=0) for ids in prompts])
    seen = torch.cat([torch.ones(len(prompts), 1), means], 1)  # (B, 1 + 8)
    sides = [
        F.one_hot(torch.tensor([tokens[ids[-1]] for ids in side]), len(tokens))
        for side in (reference, policy)
    ]
    difference = ((sides[0] - sides[1]).unsqueeze(2) * seen.unsqueeze(1)).flatten(
        1
    )  # same token: 0, a tie
    return _held_out_accuracy(difference, prompts, random)


def length_probe(prompts, reference_length, policy_length, seed=0):
    """As `leak_probe`, from the spans' lengths (B,) alone: no defect, but what can be won without reading."""
    features = [
        torch.stack([x.float(), x.float().log1p()], 1) for x in (reference_length, policy_length)
    ]
    difference = features[0] - features[1]
    scale = difference.square().mean(0).sqrt().clamp(min=1e-6)
    return _held_out_accuracy(difference / scale, prompts, torch.Generator().manual_seed(seed))


def _held_out_accuracy(difference, prompts, random, steps=200):
    """
    difference (B, F): features of the reference minus those of the policy. Bradley-Terry with a linear score, trained
    on half of the prompts and tested on the other, both ways; no state outside is touched.
    """
    number = {
        ids: i for i, ids in enumerate(sorted(set(map(tuple, prompts))))
    }  # the split: as on one rank
    prompt = torch.tensor([number[tuple(ids)] for ids in prompts])
    if len(number) < 2:
        return nan
    first = (torch.randperm(len(number), generator=random) < len(number) // 2)[prompt]
    margins = torch.zeros(len(difference))
    for train in (first, ~first):
        weight, x = torch.zeros(difference.shape[1]), difference[train]
        optimizer = torch.optim.Adam([weight], lr=0.1)
        for _ in range(steps):  # the gradient of mean(-log sigmoid(x w)) + 0.01 |w|^2
            weight.grad = 0.02 * weight - (-x @ weight).sigmoid() @ x / len(x)
            optimizer.step()
        margins[~train] = difference[~train] @ weight
    return accuracy(margins)


def _mean(x):
    return x.double().mean().item() if len(x) else nan


def _quantile(x, q):
    return x.float().quantile(q).item() if len(x) else nan


def _centred(x, group):
    """x (B,) minus the mean of its group."""
    return x.double() - torch.tensor(
        [x[group == g].double().mean() for g in group], dtype=torch.float64
    )
