"""
The optimiser of all players: AdamW, its learning rate, and an update that never happens on numbers that are not finite.
"""

import math

import torch

from engine.ranks import agree, clip_grad


def optimizer(model, lr, weight_decay, betas=(0.9, 0.999)):
    """AdamW over the trainable parameters (after `fully_shard`, which replaces them); weight decay on matrices only."""
    trained = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    matrices, vectors = (
        [x for x in trained if x[1].ndim > 1],
        [x for x in trained if x[1].ndim < 2],
    )  # norms, biases
    groups = [
        {"params": matrices, "weight_decay": weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW([g for g in groups if g["params"]], lr=lr, betas=betas)


def schedule(step, total, warmup=0.0, kind="constant"):
    """Factor on the learning rate for update number `step`, from 0, of `total`."""
    first = warmup * total if warmup < 1 else warmup
    if step < first:
        return min(1.0, (step + 1) / first)  # not 0 at step 0: no update is for nothing
    return (
        1.0
        if kind == "constant"
        else 0.5 + 0.5 * math.cos(math.pi * (step - first) / max(1, total - first))
    )


def set_lr(optimizer, lr):
    for group in optimizer.param_groups:
        group["lr"] = lr


def step_if_finite(optimizer, loss, max_norm, who):
    """
    Clip, update, empty the gradients -> (gradient norm, skipped 0 or 1). A loss or gradient that is not finite on any
    rank: no update on any rank; the third in a row raises, naming `who` (the player). All ranks.
    """
    named = [
        pair
        for g in optimizer.param_groups
        for pair in zip(g["param_names"], g["params"], strict=True)
    ]
    norm, loss = clip_grad([p for _, p in named], max_norm), torch.as_tensor(loss).item()
    bad = agree(not math.isfinite(norm) or not math.isfinite(loss))
    optimizer.bad_in_a_row = getattr(optimizer, "bad_in_a_row", 0) + 1 if bad else 0
    if optimizer.bad_in_a_row == 3:
        local = [
            (n, getattr(p.grad, "to_local", lambda p=p: p.grad)())
            for n, p in named
            if p.grad is not None
        ]
        first = next((n for n, grad in local if not grad.isfinite().all()), "none on this rank")
        what = f"loss {loss}, gradient norm {norm}, first such parameter: {first}"
        raise FloatingPointError(
            f"{who}: loss or gradient not finite in 3 updates in a row ({what}); lower --lr?"
        )
    if not bad:
        optimizer.step()
    optimizer.zero_grad()
    return norm, int(bad)
