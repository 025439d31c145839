"""What the stages log, computed from the raw numbers of a step with numpy."""

import math

import numpy as np

NAN = math.nan


def mean(values):
    return float(np.mean(values)) if len(values) else NAN


def std(values):
    return float(np.std(values, ddof=1)) if len(values) > 1 else NAN


def preferred(margins):
    """The share of margins above 0; ties (within 1e-6) count one half."""
    wins = [0.5 if abs(margin) <= 1e-6 else float(margin > 0) for margin in margins]
    return mean(wins)


def correlation(a, b):
    if len(a) < 2:
        return NAN
    a = np.asarray(a) - np.mean(a)
    b = np.asarray(b) - np.mean(b)
    size = np.linalg.norm(a) * np.linalg.norm(b)
    return float((a * b).sum() / size) if size > 1e-12 else NAN


def centred(values, groups):
    """Values minus the mean of their group."""
    values = np.asarray(values, dtype=float)
    groups = np.asarray(groups)
    out = values.copy()
    for group in set(groups.tolist()):
        out[groups == group] -= values[groups == group].mean()
    return out


def of_span(pairs, clip):
    """pairs: of each well-formed rollout (group, reference's score, rollout's score, reference's
    tokens, rollout's tokens), all of one kind of span."""
    group = [pair[0] for pair in pairs]
    theirs = np.array([pair[1] for pair in pairs], dtype=float)
    ours = np.array([pair[2] for pair in pairs], dtype=float)
    their_length = np.array([pair[3] for pair in pairs], dtype=float)
    our_length = np.array([pair[4] for pair in pairs], dtype=float)
    margin = theirs - ours
    spreads = []
    for number in sorted(set(group)):
        members = [score for g, score in zip(group, ours, strict=True) if g == number]
        if len(members) > 1:
            spreads.append(std(members))
    found = {
        "acc": preferred(margin),
        "margin": mean(margin),
        "margin_p10": float(np.quantile(margin, 0.1)) if pairs else NAN,
        "margin_p90": float(np.quantile(margin, 0.9)) if pairs else NAN,
        "saturated": mean(1 / (1 + np.exp(-margin)) > 0.99),
        "group_std": mean(spreads),
        "flat_groups": mean([spread < 1e-3 for spread in spreads]),
        "longer": preferred(their_length - our_length),
        "clipped": mean(np.abs(ours) > clip),
        "length_corr": NAN,
    }
    for side, scores in (("reference", theirs), ("policy", ours)):
        found[f"{side}_mean"] = mean(scores)
        found[f"{side}_std"] = std(scores)
        found[f"{side}_absmax"] = float(np.abs(scores).max()) if pairs else NAN
    if pairs:
        found["length_corr"] = correlation(centred(ours, group), centred(our_length, group))
    return found


def right_above_wrong(groups):
    """groups: of each the list of its well-formed rollouts' (score of a span, accuracy)."""
    margins = []
    for rollouts in groups:
        for score, accuracy in rollouts:
            for other, of_other in rollouts:
                if accuracy == 1 and of_other == 0:
                    margins.append(score - other)
    return preferred(margins), len(margins)


def of_experts(tokens):
    """tokens (L, E): how many of a kind of span's tokens each expert got."""
    with np.errstate(invalid="ignore"):
        share = tokens / tokens.sum(1, keepdims=True)
    experts = share.shape[1]
    found = {f"expert_{e}": float(share[:, e].mean()) for e in range(experts)}
    found["max_share"] = float(share.max())
    found["entropy"] = NAN
    if experts > 1:
        terms = np.where(share > 0, -share * np.log(np.where(share > 0, share, 1)), 0.0)
        found["entropy"] = float((terms.sum(1) / math.log(experts)).mean())
        if np.isnan(share).any():
            found["entropy"] = NAN
    return found


def of_rollouts(groups):
    """groups: of each the list of its rollouts' (reward, accuracy, format, tokens, stop)."""
    rollouts = [rollout for group in groups for rollout in group]
    found = {}
    for place, name in enumerate(("reward", "accuracy", "format", "length")):
        found[name] = mean([rollout[place] for rollout in rollouts])
    found["truncated"] = mean([rollout[4] == "length" for rollout in rollouts])
    spread = [len({rollout[0] for rollout in group}) > 1 for group in groups]
    found["informative"] = mean(spread)
    return found
