"""
Log-probs of given tokens under a language-model head, without ever holding (T, V): the widest
tensor of the method.

    logp = token_logps(hidden, weight, targets)                 # two sweeps over the vocabulary
    logp = token_logps(hidden, weight, targets, coefficient=c)  # one sweep
    (c * logp).sum().backward()

Everything is plain PyTorch, in place, on one chunk of the tokens after the other.

Where the coefficient of each log-prob in the loss is known beforehand (cross-entropy's is, and that
of an on-policy gradient), each chunk's gradient is made along with its log-probs, and forward and
backward are the three matrix products of the plain version. Otherwise they are four, since the
backward pass computes each chunk's logits again.

    T tokens   C tokens of a chunk   D hidden   V vocabulary
"""

from __future__ import annotations

from typing import NamedTuple

import torch

CHUNK = {"cpu": 2**24, "cuda": 2**27}  # logits held at a time: 64 MB, 0.5 GB


def token_logps(
    hidden, weight, targets, temperature=1.0, banned=(), entropy=False, coefficient=None
):
    """log softmax(hidden @ weight.T / temperature)[targets], (T,) float32, in nats.

    hidden: (T, D).  weight: (V, D).  targets: (T,) token ids.
    banned: ids of probability 0 (a banned target has -inf). The ban is part of the policy, so
        sampler, trainer and KL reference leave out the same ids.
    entropy: return also the entropy of each distribution, (T,) float32, without a gradient.
    coefficient: (T,) d loss / d logp up to a common factor, where it is known beforehand. The
        backward pass raises ValueError where the loss turns out to have another gradient.
    """
    banned = torch.as_tensor(banned, dtype=torch.long, device=hidden.device)
    arguments = (hidden, weight, targets, float(temperature), banned, entropy)
    if coefficient is not None and torch.is_grad_enabled():
        logp, entropies = _OneSweep.apply(*arguments, coefficient)
    else:
        logp, entropies = _TwoSweeps.apply(*arguments)
    if entropy:
        return logp, entropies
    return logp


def logits(hidden, weight, temperature=1.0, banned=()):
    """(T, V) float32, accumulated in float32 from inputs of any width; -inf at `banned`, a tensor
    of ids."""
    out = product(hidden, weight.T)
    if temperature != 1.0:
        out = out.div_(temperature)
    if len(banned):
        out = out.index_fill_(1, banned, float("-inf"))
    return out


def product(a, b):
    """a @ b of two matrices or two batches of them, in float32 also where they are narrower.

    CUDA accumulates and returns float32. A CPU has no such kernel, and rounds the result.
    """
    kernel = torch.mm if a.ndim == 2 else torch.bmm
    if a.is_cuda and a.dtype != torch.float32:
        return kernel(a, b, out_dtype=torch.float32)
    return kernel(a, b).float()


# -------------------------------------------------------------- the coefficient is known: one sweep
class _OneSweep(torch.autograd.Function):
    """The forward pass makes log-probs and gradients; the backward pass scales the gradients."""

    @staticmethod
    def forward(ctx, hidden, weight, targets, temperature, banned, entropy, coefficient):
        logp = torch.empty(len(targets), device=hidden.device)
        entropies = torch.empty_like(logp)
        gradient = _Gradient(ctx.needs_input_grad, hidden, weight, targets, temperature)
        for at in _chunks(weight, len(targets)):
            chunk = _softmax_chunk(hidden[at], weight, targets[at], temperature, banned, entropy)
            logp[at] = chunk.logp
            if entropy:
                entropies[at] = chunk.entropy
            gradient.add(at, chunk.p.div_(chunk.total), coefficient[at])
            del chunk  # (C, V) is free before the next is made
        ctx.save_for_backward(coefficient)
        ctx.gradient = gradient
        ctx.mark_non_differentiable(entropies)
        return logp, entropies

    @staticmethod
    def backward(ctx, d_logp, _):
        (coefficient,) = ctx.saved_tensors
        # The loss may have multiplied all coefficients by one factor, such as the number of ranks.
        factor = d_logp @ coefficient / (coefficient @ coefficient).clamp(min=1e-30)
        same = torch.allclose(d_logp, factor * coefficient, rtol=1e-3, atol=1e-9)
        # A factor that is not finite goes on to the optimiser's check of the gradient's norm.
        if factor.isfinite() and not same:
            raise ValueError(
                "token_logps: the loss has another gradient than `coefficient`; call it without"
            )
        gradient = ctx.gradient
        ctx.gradient = None
        if gradient is None:
            raise RuntimeError(
                "token_logps: with `coefficient` there can be one backward pass only"
            )
        d_hidden, d_weight = gradient.scaled(factor)
        return d_hidden, d_weight, None, None, None, None, None


# --------------------------------------------------------- the coefficient is not known: two sweeps
class _TwoSweeps(torch.autograd.Function):
    """The forward pass makes log-probs; the backward pass makes the logits again, and gradients."""

    @staticmethod
    def forward(ctx, hidden, weight, targets, temperature, banned, entropy):
        logp = torch.empty(len(targets), device=hidden.device)
        lse = torch.empty_like(logp)
        entropies = torch.empty_like(logp)
        for at in _chunks(weight, len(targets)):
            chunk = _softmax_chunk(hidden[at], weight, targets[at], temperature, banned, entropy)
            logp[at] = chunk.logp
            lse[at] = chunk.lse
            if entropy:
                entropies[at] = chunk.entropy
            del chunk  # (C, V) is free before the next is made
        ctx.save_for_backward(hidden, weight, targets, banned, lse)
        ctx.temperature = temperature
        ctx.mark_non_differentiable(entropies)
        return logp, entropies

    @staticmethod
    def backward(ctx, d_logp, _):
        hidden, weight, targets, banned, lse = ctx.saved_tensors
        gradient = _Gradient(ctx.needs_input_grad, hidden, weight, targets, ctx.temperature)
        for at in _chunks(weight, len(targets)):
            p = logits(hidden[at], weight, ctx.temperature, banned)  # (C, V)
            p.sub_(lse[at, None]).exp_()
            gradient.add(at, p, d_logp[at])
            del p
        d_hidden, d_weight = gradient.finished()
        return d_hidden, d_weight, None, None, None, None


# ---------------------------------------------------------------------------------- what both share
def _chunks(weight, length):
    """Slices of `length` tokens, each of so many that CHUNK logits are not exceeded."""
    rows = max(1, CHUNK[weight.device.type] // len(weight))
    return [slice(start, start + rows) for start in range(0, length, rows)]


class _Chunk(NamedTuple):
    """What is known of a chunk of tokens after its softmax."""

    logp: torch.Tensor  # (C,) of the targets
    lse: torch.Tensor  # (C,) log of the sum of exp
    entropy: torch.Tensor | None  # (C,)
    p: torch.Tensor  # (C, V) the probabilities times `total`
    total: torch.Tensor  # (C, 1)


def _softmax_chunk(hidden, weight, targets, temperature, banned, entropy) -> _Chunk:
    """hidden (C, D), targets (C,): at most two tensors of (C, V) at a time, one without entropy."""
    x = logits(hidden, weight, temperature, banned)  # (C, V)
    of_target = x.gather(1, targets[:, None])  # (C, 1)
    top = x.amax(1, keepdim=True)
    x.sub_(top)
    p = x.exp() if entropy else x.exp_()
    total = p.sum(1, keepdim=True)
    lse = (top + total.log()).squeeze(1)
    entropies = None
    if entropy:
        x.index_fill_(1, banned, 0)  # a banned id has probability 0 and adds 0, not 0 * -inf
        mean = x.mul_(p).sum(1, keepdim=True) / total
        entropies = (total.log() - mean).squeeze(1)
    return _Chunk(of_target.squeeze(1) - lse, lse, entropies, p, total)


class _Gradient:
    """d loss / d hidden and d loss / d weight, chunk by chunk; the latter is summed in float32."""

    def __init__(self, needed, hidden, weight, targets, temperature):
        self.hidden = hidden
        self.weight = weight
        self.targets = targets
        self.temperature = temperature
        self.d_hidden = None  # (T, D), where it is needed
        self.d_weight = None  # (V, D) float32, where it is needed
        if needed[0]:
            self.d_hidden = torch.empty_like(hidden)
        if needed[1]:
            self.d_weight = torch.zeros_like(weight, dtype=torch.float32)

    def add(self, at, p, coefficient):
        """Add a chunk, with coefficient (C,) = d loss / d logp; its probabilities p (C, V) are
        overwritten. d logp / d logits = (one-hot of the target - p) / temperature.
        """
        scale = (coefficient[:, None] / self.temperature).float()  # (C, 1)
        d_logits = p.mul_(-scale).scatter_add_(1, self.targets[at, None], scale)
        d_logits = d_logits.to(self.hidden.dtype)
        if self.d_hidden is not None:
            self.d_hidden[at] = product(d_logits, self.weight).to(self.hidden.dtype)
        if self.d_weight is not None and d_logits.dtype == torch.float32:
            self.d_weight.addmm_(d_logits.T, self.hidden[at])
        elif self.d_weight is not None:
            self.d_weight += product(d_logits.T, self.hidden[at])

    def scaled(self, factor):
        """`finished` times a factor; in place, so that it can be done once."""
        for gradient in (self.d_hidden, self.d_weight):
            if gradient is not None:
                gradient.mul_(factor)
        return self.finished()

    def finished(self):
        """d_hidden and d_weight in their tensors' types; None where they are not needed."""
        if self.d_weight is None:
            return self.d_hidden, None
        return self.d_hidden, self.d_weight.to(self.weight.dtype)
