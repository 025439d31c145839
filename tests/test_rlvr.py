"""Stage 3: parity of advantage and loss with the released code's values, and what must hold for any
batch."""

import json
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from engine.packs import Pack
from rlvr import (
    ALGORITHMS,
    group_advantage,
    k3,
    on_policy_coefficient,
    overlong_penalty,
    policy_loss,
)

CASES = json.loads((Path(__file__).parent / "reference.json").read_text())
NAMES = ("ratio", "clip_low", "clip_high", "dual_clip", "aggregation")


def near(a, b):
    torch.testing.assert_close(
        torch.as_tensor(a).double(), torch.as_tensor(b).double(), rtol=1e-5, atol=1e-7
    )


@pytest.mark.parametrize("case", CASES, ids=lambda c: f"seed{c['seed']}")
def test_parity(case):
    near(group_advantage(torch.tensor(case["reward"]), case["group_size"]), case["advantage"])
    near(
        group_advantage(torch.tensor(case["reward"]), case["group_size"], scale_by_std=False),
        case["advantage_no_std"],
    )
    old, mask, adv = (torch.tensor(case[k]) for k in ("old_logp", "mask", "advantage"))
    for p in case["policy"]:
        logp = torch.tensor(p["logp"], requires_grad=True)
        loss, metrics = policy_loss(
            logp,
            old,
            adv,
            mask,
            ratio="sequence" if p["algo"] == "gspo" else "token",
            clip_low=p["clip_low"],
            clip_high=p["clip_high"],
            dual_clip=p["dual_clip_c"],
            aggregation=p["aggregation"],
        )
        loss.backward()
        near(loss, p["loss"])
        near(logp.grad, p["grad_logp"])
        near(metrics["clip_frac"], p["clipfrac"])


def batch(seed=0, b=8, t=7):
    g = torch.Generator().manual_seed(seed)
    logp, old = -3 * torch.rand(b, t, generator=g), -3 * torch.rand(b, t, generator=g)
    mask = torch.arange(t) < torch.randint(1, t + 1, (b, 1), generator=g)
    return logp.requires_grad_(), old, torch.randn(b, generator=g), mask


def settings(algo):
    return {name: getattr(ALGORITHMS[algo], name) for name in NAMES}


@pytest.mark.parametrize("algo", ALGORITHMS)
def test_parts_with_a_shared_denominator_sum_to_the_whole(algo):
    logp, old, adv, mask = batch()
    count = {"token-mean": mask.sum(), "seq-mean-token-mean": len(mask), "constant": 100}[
        ALGORITHMS[algo].aggregation
    ]
    whole, _ = policy_loss(logp, old, adv, mask, denominator=count, **settings(algo))
    parts = [
        policy_loss(logp[s], old[s], adv[s], mask[s], denominator=count, **settings(algo))[0]
        for s in (slice(0, 3), slice(3, 4), slice(4, 8))
    ]
    near(sum(parts), whole)
    near(torch.autograd.grad(sum(parts), logp)[0], torch.autograd.grad(whole, logp)[0])
    if algo != "dr_grpo":
        near(policy_loss(logp, old, adv, mask, **settings(algo))[0], whole)


@pytest.mark.parametrize("algo", ALGORITHMS)
@pytest.mark.parametrize("junk", [99.0, -float("inf"), float("nan")])
def test_masked_positions_are_inert(algo, junk):
    logp, old, adv, mask = batch()
    loss, metrics = policy_loss(logp, old, adv, mask, denominator=10, **settings(algo))
    dirty = logp.detach().masked_fill(~mask, junk).requires_grad_()
    before = dirty.clone()
    again, m = policy_loss(dirty, old, adv, mask.float(), denominator=10, **settings(algo))
    near(again, loss)
    near(torch.autograd.grad(again, dirty)[0], torch.autograd.grad(loss, logp)[0])
    assert m == metrics
    assert torch.equal(dirty.nan_to_num(5), before.nan_to_num(5))  # inputs are left as they were


def pack_of(mask):
    """A stand-in for a pack whose scored tokens are those of a mask (B, T)."""
    pack = SimpleNamespace(sequence=mask.nonzero()[:, 0], ids=torch.arange(mask.sum()))
    pack.target = pack.ids
    pack.rows = partial(Pack.rows, pack)
    return pack


@pytest.mark.parametrize("algo", ALGORITHMS)
def test_on_policy_gradient_is_reinforce(algo):
    """At ratio 1 nothing is clipped: the gradient is -advantage on each token, whatever the
    algorithm; `on_policy_coefficient` knows it before any log-prob."""
    logp, _, adv, mask = batch()
    loss, m = policy_loss(logp, logp.detach(), adv, mask, denominator=1, **settings(algo))
    per_sequence = (
        mask.sum(1, keepdim=True) if ALGORITHMS[algo].aggregation == "seq-mean-token-mean" else 1
    )
    gradient = torch.autograd.grad(loss, logp)[0]
    near(gradient, -adv[:, None] * mask / per_sequence)
    known = on_policy_coefficient(pack_of(mask), adv, ALGORITHMS[algo], 1)
    near(gradient[mask], known)
    near(loss, known.sum())
    assert m["clip_frac"] == 0 and m["ratio_max"] == 1


def test_nothing_to_train_on_is_zero_with_a_gradient():
    logp, old, adv, mask = batch()
    for algo in ALGORITHMS:
        for rows in (slice(0, 0), slice(0, 3)):
            nothing = logp[rows], old[rows], adv[rows], mask[rows] & False
            loss, _ = policy_loss(*nothing, **settings(algo) | {"aggregation": "token-mean"})
            assert loss == 0 and torch.autograd.grad(loss, logp)[0].abs().sum() == 0


@pytest.mark.parametrize("size", [2, 7, 8, 10, 12, 16, 24])
def test_equal_rewards_have_no_advantage(size):
    """0.2 is no binary fraction: a mean of 16 of them differs from it by a rounding."""
    rewards = torch.cat([torch.full((size,), 0.2), torch.full((size,), 0.8), torch.arange(size)])
    for scale in (True, False):
        advantage = group_advantage(rewards, size, scale_by_std=scale)
        assert not advantage[: 2 * size].any() and advantage[2 * size :].all() == (size % 2 == 0)


def test_bad_groups_are_refused():
    for n, size in ((5, 2), (4, 1), (4, 3)):
        with pytest.raises(ValueError):
            group_advantage(torch.zeros(n), size)
    with pytest.raises(ValueError):
        policy_loss(*batch(), clip_low=0.2, clip_high=0.2, aggregation="constant")


def test_sequence_ratio_differs_from_token_ratio():
    logp, old, adv, mask = batch()
    token, _ = policy_loss(logp, old, adv, mask, ratio="token", clip_low=9, clip_high=9)
    sequence, _ = policy_loss(logp, old, adv, mask, ratio="sequence", clip_low=9, clip_high=9)
    assert abs(token - sequence) > 1e-3


def test_k3_and_overlong():
    assert k3(torch.tensor([-1.0, -2.0]), torch.tensor([-1.0, -1.0])).tolist() == pytest.approx(
        [0, torch.e - 2]
    )
    assert [overlong_penalty(n, 100, 40) for n in (10, 60, 80, 100, 140)] == [0, 0, -0.5, -1, -2]
    assert overlong_penalty(100, 100, 0) == 0
