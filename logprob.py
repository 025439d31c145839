"""
Log-probs of given tokens under a language-model head, without ever holding (T, V).

    T tokens   D hidden   V vocabulary
"""

from __future__ import annotations

import torch
import torch.nn.functional as F


class _TokenLogps(torch.autograd.Function):
    """Chunks over T; the backward pass computes each chunk's logits again."""

    @staticmethod
    def forward(ctx, hidden, weight, targets, temperature, banned, entropy):
        logp = torch.empty(len(targets), device=hidden.device)
        lse, ent = torch.empty_like(logp), torch.empty_like(logp) if entropy else None
        size = _chunk(weight)
        for start in range(0, len(targets), size):
            at = slice(start, start + size)
            logits = _logits(hidden[at], weight, temperature, banned)  # (chunk, V)
            lse[at] = logits.logsumexp(-1)
            logp[at] = logits.gather(1, targets[at, None]).squeeze(1) - lse[at]
            if entropy:  # a banned id has probability 0 and adds 0, not 0 * -inf
                q = logits - lse[at, None]
                ent[at] = -(q.exp() * q.masked_fill(q == -torch.inf, 0)).sum(-1)
        ctx.save_for_backward(hidden, weight, targets, banned, lse)
        ctx.temperature, ctx.size = temperature, size
        if entropy:
            ctx.mark_non_differentiable(ent)
        return logp, ent

    @staticmethod
    def backward(ctx, grad, _):
        hidden, weight, targets, banned, lse = ctx.saved_tensors
        d_hidden = torch.zeros_like(hidden) if ctx.needs_input_grad[0] else None
        d_weight = torch.zeros_like(weight, dtype=torch.float32) if ctx.needs_input_grad[1] else None
        for start in range(0, len(targets), ctx.size):
            at = slice(start, start + ctx.size)
            d = _logits(hidden[at], weight, ctx.temperature, banned).sub_(lse[at, None]).exp_().neg_()  # -p
            d.scatter_add_(1, targets[at, None], torch.ones_like(targets[at, None], dtype=d.dtype))  # one-hot - p
            d = d.mul_(grad[at, None] / ctx.temperature).to(hidden.dtype)
            if d_hidden is not None:
                d_hidden[at] = d @ weight
            if d_weight is not None:
                d_weight += d.T @ hidden[at]
        return d_hidden, d_weight if d_weight is None else d_weight.to(weight.dtype), None, None, None, None


def _chunk(weight):
    return max(1, 2**24 // len(weight))  # rows of logits held at a time: about 64 MB of float32


def _logits(hidden, weight, temperature, banned):
    logits = F.linear(hidden, weight).float()
    if temperature != 1.0:
        logits = logits / temperature
    return logits.index_fill(1, banned, float("-inf")) if len(banned) else logits


def token_logps(hidden, weight, targets, temperature=1.0, banned=(), entropy=False):
    """log softmax(hidden @ weight.T / temperature)[targets], without ever holding (T, V).

    hidden (T, D), weight (V, D), targets (T,) token ids -> (T,) float32, in nats; with `entropy=True` also the
    entropy of each distribution, (T,) float32, without a gradient. `banned` ids have probability 0 (a banned target
    -inf): the ban is part of the policy, so sampler, trainer and KL reference leave out the same ids.
    """
    banned = torch.as_tensor(banned, dtype=torch.long, device=hidden.device)
    logp, ent = _TokenLogps.apply(hidden, weight, targets, float(temperature), banned, entropy)
    return (logp, ent) if entropy else logp
