"""
The optimiser of all players: AdamW, its learning rate, and an update that never happens on numbers
that are not finite.
"""

import math

import torch
from torch.distributed.tensor import DTensor

from engine.ranks import agree, clip_grad, print0

ENDED = 0.01  # of the peak: a cosine that has come below it is over


def optimizer(model, lr, weight_decay, betas=(0.9, 0.999)):
    """AdamW over the trainable parameters, with weight decay on matrices only (not on norms and
    biases). To be made after `fully_shard`, which replaces the parameters."""
    matrices = []
    vectors = []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            kind = matrices if parameter.ndim > 1 else vectors
            kind.append((name, parameter))
    groups = []
    if matrices:
        groups.append({"params": matrices, "weight_decay": weight_decay})
    if vectors:
        groups.append({"params": vectors, "weight_decay": 0.0})
    return torch.optim.AdamW(groups, lr=lr, betas=betas)


class Schedule:
    """The factor on the learning rate over a run's updates: up in a straight line, then constant,
    or down a cosine that ends at 0.

    kind: "constant" or "cosine". total: updates of the run. warmup: of them, how many the line
    takes; below 1 it is a share.
    """

    def __init__(self, kind, total, warmup=0.0):
        self.kind = kind
        self.total = total
        self.warmup = warmup * total if warmup < 1 else warmup
        self.start = self.warmup  # the step where the cosine begins ...
        self.height = 1.0  # ... and the factor that it begins with

    def factor(self, step):
        """For update number `step`, from 0."""
        if step < self.warmup:
            return min(1.0, (step + 1) / self.warmup)  # not 0 at step 0: no update is for nothing
        if self.kind == "constant":
            return self.height
        done = (step - self.start) / max(1, self.total - self.start)
        return self.height * (0.5 + 0.5 * math.cos(math.pi * done))

    def state(self):
        """For a checkpoint, as plain values."""
        return dict(vars(self))

    def resume(self, state, step):
        """Go on after `step` updates of a run whose schedule had that state.

        Where the run has another length now, nothing jumps: the warm-up keeps its own, and the
        cosine goes down to the new end from where it has come to; where that is almost 0 it says
        so. Another `kind` is taken as given.
        """
        if state["kind"] != self.kind:
            return
        total = self.total
        vars(self).update(state)
        if total != self.total and step > self.warmup:
            self.height = self.factor(step - 1)
            self.start = step - 1
            if self.height < ENDED and step < total:
                print0(
                    f"warning: the learning rate had come down to {self.height:.2g} of its peak, "
                    "and goes on from there; for another cycle start a run from this checkpoint"
                )
        self.total = total


def set_lr(optimizer, lr):
    for group in optimizer.param_groups:
        group["lr"] = lr


def step_if_finite(optimizer, loss, max_norm, who):
    """Clip the gradients, update, empty the gradients -> (gradient norm, skipped: 0 or 1).

    Where loss or gradient is not finite on any rank, no rank makes an update; the third time in a
    row raises FloatingPointError, which names the player `who`. All ranks call it.
    """
    names = []
    parameters = []
    for group in optimizer.param_groups:
        names += group["param_names"]
        parameters += group["params"]
    norm = clip_grad(parameters, max_norm)
    loss = torch.as_tensor(loss).item()
    bad = agree(not math.isfinite(norm) or not math.isfinite(loss))
    optimizer.bad_in_a_row = getattr(optimizer, "bad_in_a_row", 0) + 1 if bad else 0
    if optimizer.bad_in_a_row == 3:
        first = first_not_finite(names, parameters)
        raise FloatingPointError(
            f"{who}: loss or gradient not finite in 3 updates in a row (loss {loss}, gradient norm "
            f"{norm}, first such parameter: {first}); lower --lr?"
        )
    if not bad:
        optimizer.step()
    optimizer.zero_grad()
    return norm, int(bad)


def first_not_finite(names, parameters):
    """The name of the first parameter whose gradient, or this rank's part of it, is not finite."""
    for name, parameter in zip(names, parameters, strict=True):
        grad = parameter.grad
        if isinstance(grad, DTensor):
            grad = grad.to_local()
        if grad is not None and not grad.isfinite().all():
            return name
    return "none on this rank"
