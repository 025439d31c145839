"""
Log-probs of given tokens under a language-model head, without ever holding (T, V): the widest tensor of the method.

    logp = token_logps(hidden, weight, targets)                       # two sweeps over the vocabulary: forward, backward
    logp = token_logps(hidden, weight, targets, coefficient=c)        # one: the gradient is made along with the forward
    (c * logp).sum().backward()

In plain PyTorch, chunk after chunk of T, in place. Where the coefficient of each log-prob in the loss is known beforehand
(cross-entropy's is, and that of an on-policy gradient), forward and backward are the three matrix products of the plain
version; otherwise four, since the backward pass computes each chunk's logits again.

    T tokens   D hidden   V vocabulary
"""

from __future__ import annotations

import torch

CHUNK = {"cpu": 2**24, "cuda": 2**27}  # logits held at a time: 64 MB, 0.5 GB


def token_logps(
    hidden, weight, targets, temperature=1.0, banned=(), entropy=False, coefficient=None
):
    """log softmax(hidden @ weight.T / temperature)[targets], without ever holding (T, V).

    hidden (T, D), weight (V, D), targets (T,) token ids -> (T,) float32, in nats; with `entropy=True` also the
    entropy of each distribution, (T,) float32, without a gradient. `banned` ids have probability 0 (a banned target
    -inf): the ban is part of the policy, so sampler, trainer and KL reference leave out the same ids.
    coefficient (T,): d loss / d logp up to a common factor, where it is known beforehand. The backward pass raises
    ValueError where the loss turns out to have another gradient.
    """
    banned = torch.as_tensor(banned, dtype=torch.long, device=hidden.device)
    coefficient = coefficient if torch.is_grad_enabled() else None
    logp, ent = _TokenLogps.apply(
        hidden, weight, targets, float(temperature), banned, entropy, coefficient
    )
    return (logp, ent) if entropy else logp


def logits(hidden, weight, temperature=1.0, banned=()):
    """(T, V) float32, accumulated in float32 from inputs of any width; -inf at `banned`, a tensor of ids."""
    out = product(hidden, weight.T)
    if temperature != 1.0:
        out = out.div_(temperature)
    return out.index_fill_(1, banned, float("-inf")) if len(banned) else out


def product(a, b):
    """a @ b in float32, also of narrower matrices (or batches of them); a CPU has no such kernel and rounds them."""
    kernel = torch.mm if a.ndim == 2 else torch.bmm
    return (
        kernel(a, b, out_dtype=torch.float32)
        if a.is_cuda and a.dtype != torch.float32
        else kernel(a, b).float()
    )


class _TokenLogps(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, targets, temperature, banned, entropy, coefficient):
        logp = torch.empty(len(targets), device=hidden.device)
        lse, ent = torch.empty_like(logp), torch.empty_like(logp)
        gradient = (
            None
            if coefficient is None
            else _Gradient(ctx.needs_input_grad, hidden, weight, targets, temperature)
        )
        for at in _chunks(weight, len(targets)):
            x = logits(hidden[at], weight, temperature, banned)  # (chunk, V)
            picked, top = x.gather(1, targets[at, None]), x.amax(1, keepdim=True)
            x.sub_(top)
            p = x.exp() if entropy else x.exp_()
            total = p.sum(1, keepdim=True)
            lse[at] = (top + total.log()).squeeze(1)
            logp[at] = picked.squeeze(1) - lse[at]
            if entropy:  # a banned id has probability 0 and adds 0, not 0 * -inf
                ent[at] = total.log().squeeze(1) - torch.linalg.vecdot(
                    p, x.index_fill_(1, banned, 0)
                ) / total.squeeze(1)
            if gradient:
                gradient.add(at, p.div_(total), coefficient)
        ctx.gradient, ctx.temperature = gradient, temperature
        ctx.save_for_backward(
            *((coefficient,) if gradient else (hidden, weight, targets, banned, lse))
        )
        ctx.mark_non_differentiable(ent)
        return logp, ent

    @staticmethod
    def backward(ctx, grad, _):
        gradient = ctx.gradient
        if gradient:
            (coefficient,) = ctx.saved_tensors
            factor = grad @ coefficient / (coefficient @ coefficient).clamp(min=1e-30)
            if factor.isfinite() and not torch.allclose(
                grad, factor * coefficient, rtol=1e-3, atol=1e-9
            ):
                raise ValueError(
                    "token_logps: the loss has another gradient than `coefficient`; call it without"
                )
            return *gradient.result(factor), None, None, None, None, None
        hidden, weight, targets, banned, lse = ctx.saved_tensors
        gradient = _Gradient(ctx.needs_input_grad, hidden, weight, targets, ctx.temperature)
        for at in _chunks(weight, len(targets)):
            x = logits(hidden[at], weight, ctx.temperature, banned)
            gradient.add(at, x.sub_(lse[at, None]).exp_(), grad)
        return *gradient.result(1.0), None, None, None, None, None


class _Gradient:
    """d loss / d hidden and d loss / d weight, accumulated chunk by chunk, the latter in float32."""

    def __init__(self, needed, hidden, weight, targets, temperature):
        self.hidden, self.weight, self.targets, self.temperature = (
            hidden,
            weight,
            targets,
            temperature,
        )
        self.d_hidden = torch.empty_like(hidden) if needed[0] else None
        self.d_weight = torch.zeros_like(weight, dtype=torch.float32) if needed[1] else None

    def add(self, at, p, coefficient):
        """p (chunk, V), the probabilities, is overwritten: d logp / d logits = (one-hot - p) / temperature."""
        scale = (coefficient[at, None] / self.temperature).float()
        d = p.mul_(-scale).scatter_add_(1, self.targets[at, None], scale).to(self.hidden.dtype)
        if self.d_hidden is not None:
            self.d_hidden[at] = product(d, self.weight).to(self.hidden.dtype)
        if self.d_weight is not None and d.dtype == torch.float32:
            self.d_weight.addmm_(d.T, self.hidden[at])
        elif self.d_weight is not None:
            self.d_weight += product(d.T, self.hidden[at])

    def result(self, factor):
        pair = self.d_hidden, self.d_weight
        hidden, weight = (
            x if x is None or isinstance(factor, float) else x.mul_(factor) for x in pair
        )
        return hidden, weight if weight is None else weight.to(self.weight.dtype)


def _chunks(weight, length):
    rows = max(1, CHUNK[weight.device.type] // len(weight))
    return [slice(start, start + rows) for start in range(0, length, rows)]
