"""
One complete step of each stage, from the weights before it and from what was sampled: losses,
gradients (left in the models), advantages, and all that is logged. Written from METHOD.md.
"""

from types import SimpleNamespace

import numpy as np
import torch

from reference import measures, method
from reference.models import chosen, entropies


# ----------------------------------------------------------------------------- stage 1
def sft(policy, conversations):
    """Cross-entropy over the trained tokens of all conversations of the batch -> (loss, tokens);
    the gradient is in `policy`."""
    total = 0.0
    tokens = 0
    for conversation in conversations:
        log_probs = policy.logits(conversation, []).log_softmax(-1)
        for place, trained in enumerate(conversation.trained):
            if trained:
                total = total - log_probs[place - 1, conversation.ids[place]]
                tokens += 1
    loss = total / tokens
    loss.backward()
    return float(loss.detach()), tokens


# ----------------------------------------------------------------------------- rollouts
def sampled_from(policy, prompt, rollouts, temperature, banned):
    """The distribution (T, V) of each token of each rollout, with a gradient."""
    return [policy.log_probs(prompt, ids, temperature, banned) for ids in rollouts]


def redraw(log_probs, seed, k, limit):
    """What the inverse of the cumulative distribution gives for each token of a rollout, behind
    the ids that stand there: [(id, distance of the uniform number from a bound)]."""
    numbers = method.uniforms(seed, k, limit)
    rows = log_probs.detach()
    return [method.draw(row, u) for row, u in zip(rows, numbers, strict=False)]


# ----------------------------------------------------------------------------- stage 2
def discriminate(disc, groups, kinds, flags):
    """The discriminator's pass over groups, each with prompt, reference (ids of each kind of span)
    and spans (of each rollout, None where malformed). Fills in their scores.

    -> loss (a tensor, or None where all are malformed), pairs and routed tokens of each kind.
    """
    pairs = [[] for _ in kinds]
    balances = []
    routed = [0.0 for _ in kinds]
    for group in groups:
        group.reference_score = [None] * len(kinds)
        group.score = [[None] * len(group.spans) for _ in kinds]
        well_formed = [i for i, spans in enumerate(group.spans) if spans is not None]
        if not well_formed:
            continue  # never shown
        tree = []  # routing of the prompt's tokens, then of each span's: (probability, share)
        prompt_length = len(group.prompt.ids)
        for kind in range(len(kinds)):
            rows = [("reference", group.reference[kind])]
            rows += [(i, group.spans[i][kind]) for i in well_formed]
            scores = {}
            for name, span in rows:
                scores[name], routing = disc.score(group.prompt, span, kind)
                if routing and not tree:
                    tree.append([(p[:prompt_length], s[:prompt_length]) for p, s in routing])
                if routing:
                    tree.append([(p[prompt_length:], s[prompt_length:]) for p, s in routing])
                    shares = [s[prompt_length:].sum(0) for _, s in routing]
                    routed[kind] = routed[kind] + torch.stack(shares)
            group.reference_score[kind] = float(scores["reference"].detach())
            for i in well_formed:
                group.score[kind][i] = float(scores[i].detach())
                pairs[kind].append((scores["reference"], scores[i]))
        if tree:
            layers = [
                (torch.cat([p for p, _ in layer]), torch.cat([s for _, s in layer]))
                for layer in zip(*tree, strict=True)
            ]
            balances.append((method.load_balance(layers), len(well_formed)))
    loss = None
    if pairs[0]:
        loss = method.discriminator_loss(pairs, balances, flags.score_l2, flags.balance)
    routed = [np.asarray(tokens) for tokens in routed] if pairs[0] and disc.form == "moe" else []
    return loss, routed


def discriminator_measures(groups, kinds, routed, flags):
    """What is logged of the discriminator's side."""
    found = {}
    centred = []
    for k, kind in enumerate(kinds):
        pairs = []
        for number, group in enumerate(groups):
            for i, spans in enumerate(group.spans):
                if spans is not None:
                    scores = (group.reference_score[k], group.score[k][i])
                    pairs.append((number, *scores, len(group.reference[k]), len(spans[k])))
        values = measures.of_span(pairs, flags.score_clip)
        if routed:
            values |= measures.of_experts(routed[k])
        for name, value in values.items():
            found[f"{kind}/{name}"] = value
        if pairs:
            centred.append(measures.centred([p[2] for p in pairs], [p[0] for p in pairs]))
    if len(kinds) == 2:
        found["advantage_corr"] = measures.correlation(*centred) if centred else measures.NAN
    return found


def alignment_advantages(groups, weights, flags):
    """Fill in the advantages of scored groups."""
    for group in groups:
        group.advantage = method.alignment_advantage(
            group.score,
            weights,
            clip=flags.score_clip,
            penalty=flags.malformed_penalty,
            normalize=flags.normalize,
            malformed=flags.malformed,
            std_floor=flags.std_floor,
        )


def align_policy(policy, groups, flags, banned):
    """The policy's update of stage 2 on group.advantage -> what is logged; the gradient is in
    `policy`. GRPO's loss where every ratio is 1."""
    losses = []
    entropy = []
    distances = []
    for group in groups:
        group.log_probs = sampled_from(policy, group.prompt, group.ids, flags.temperature, banned)
        for i, ids in enumerate(group.ids):
            logp = chosen(group.log_probs[i], ids)
            ratio = (logp - logp.detach()).exp()
            losses.append(-group.advantage[i] * ratio)
            entropy += entropies(group.log_probs[i].detach()).tolist()
            sampler = torch.tensor(group.logps[i], dtype=torch.float64)
            distances += (logp.detach() - sampler).abs().tolist()
    loss = method.aggregate(losses, "token-mean", None)
    loss.backward()
    return {
        "loss": float(loss.detach()),
        "entropy": measures.mean(entropy),
        "tokens": len(entropy),
        "logp_diff": measures.mean(distances),
        "logp_diff_max": max(distances),
    }


# ----------------------------------------------------------------------------- stage 3
def shaped_rewards(group, flags):
    """Rewards with DAPO's penalty for overlong responses."""
    penalties = [
        method.overlong_penalty(len(ids), flags.max_response, flags.overlong) for ids in group.ids
    ]
    return [
        verdict["reward"] + penalty
        for verdict, penalty in zip(group.verdicts, penalties, strict=True)
    ]


def teaches(group):
    """DAPO keeps a group whose answers are neither all right nor all wrong."""
    accuracy = measures.mean([verdict["accuracy"] for verdict in group.verdicts])
    return 0 < accuracy < 1


def minibatch(policy, groups, flags, banned, start=None):
    """One update of stage 3 on group.advantage and group.old -> what is logged; the gradient is in
    `policy`. start: the start policy, for the KL term."""
    losses = []
    kls = []
    found = SimpleNamespace(clipped=[], ratios=[], entropy=[], distances=[], kl=[])
    for group in groups:
        rows = sampled_from(policy, group.prompt, group.ids, flags.temperature, banned)
        for i, ids in enumerate(group.ids):
            logp = chosen(rows[i], ids)
            old = logp.detach() if group.old is None else group.old[i]
            loss, ratio, clipped = method.sequence_losses(
                logp,
                old,
                group.advantage[i],
                ratio=flags.ratio,
                clip_low=flags.clip_low,
                clip_high=flags.clip_high,
                dual_clip=flags.dual_clip,
            )
            losses.append(loss)
            if start is not None:
                with torch.no_grad():
                    first = start.log_probs(group.prompt, ids, flags.temperature, banned)
                kls.append(method.k3(logp, chosen(first, ids)))
                found.kl += kls[-1].detach().tolist()
            found.clipped += clipped.tolist()
            found.ratios += ratio.tolist()
            found.entropy += entropies(rows[i].detach()).tolist()
            sampler = torch.tensor(group.logps[i], dtype=torch.float64)
            found.distances += (old - sampler).abs().tolist()
    loss = method.aggregate(losses, flags.aggregation, flags.max_response)
    if kls:
        loss = loss + flags.kl * torch.cat(kls).mean()
    loss.backward()
    found.loss = float(loss.detach())
    return found
