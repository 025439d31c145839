"""What tells whether the game is sound: values by hand, no data, planted leaks."""

import math
import time

import pytest
import torch

from engine import health

T = torch.tensor
NONE = torch.zeros(0)


def test_span_metrics():
    reference, policy = T([1.0, 1.0, 0.0, 8.0]), T([0.0, 1.0, 2.0, 0.0])
    group, lengths = T([0, 0, 1, 1]), (T([5, 5, 9, 9]), T([4, 5, 10, 20]))
    m = health.span_metrics(reference, policy, group, *lengths)
    assert m["acc"] == (1 + 0.5 + 0 + 1) / 4 and m["longer"] == (1 + 0.5 + 0 + 0) / 4
    assert m["margin"] == 1.75 and m["saturated"] == 0.25
    assert (m["margin_p10"], m["margin_p90"]) == (pytest.approx(-1.4), pytest.approx(5.9))
    assert (m["reference_mean"], m["reference_absmax"], m["policy_mean"]) == (2.5, 8, 0.75)
    assert m["policy_std"] == pytest.approx(policy.std().item())
    assert (
        m["group_std"] == pytest.approx((math.sqrt(0.5) + math.sqrt(2)) / 2)
        and m["flat_groups"] == 0
    )


def test_no_data_is_nan_never_a_number():
    metrics = health.span_metrics(NONE, NONE, NONE.long(), NONE, NONE)
    metrics |= {
        "correlation": health.correlation(NONE, NONE),
        "leak": health.leak_probe([], [], []),
    }
    metrics |= {
        "length": health.length_probe([], NONE, NONE),
        **health.expert_load(torch.zeros(2, 3)),
    }
    assert [k for k, v in metrics.items() if not math.isnan(v)] == []
    one = health.span_metrics(T([1.0]), T([0.0]), T([0]), T([3]), T([3]))
    assert one["acc"] == 1 and math.isnan(one["policy_std"]) and math.isnan(one["group_std"])


def test_flat_groups_and_singles():
    spread = health.group_spread(T([1.0, 1.0005, 1.0, 2.0, 7.0]), T([4, 4, 2, 2, 9]))
    assert spread["flat_groups"] == 0.5 and spread["group_std"] == pytest.approx(0.35373, abs=1e-4)


def test_length_correlation_is_within_group():
    """Over all pairs longer goes with lower, within each group with higher: the latter is what moves the policy."""
    policy, length, group = T([1.0, 2.0, 11.0, 12.0]), T([100, 200, 10, 20]), T([0, 0, 1, 1])
    assert health.correlation(policy, length) < 0
    m = health.span_metrics(policy, policy, group, length, length)
    assert m["length_corr"] > 0.7 and m["longer"] == 0.5 and m["acc"] == 0.5
    assert health.correlation(policy, -3 * policy + 1) == pytest.approx(-1)
    assert math.isnan(health.correlation(policy, torch.ones(4)))


def test_expert_load():
    load = health.expert_load(T([[1, 1, 1, 1], [4, 0, 0, 0]]))
    assert load["entropy"] == 0.5 and load["max_share"] == 1 and load["expert_0"] == 0.625


def pairs(n, rollouts=2, seed=0):
    """Prompts, and spans of random length and text, the same distribution on both sides."""
    random = torch.Generator().manual_seed(seed)

    def ids(low, high):
        return torch.randint(
            10, 50, (int(torch.randint(low, high, (), generator=random)),), generator=random
        ).tolist()

    prompts = [p for p in (ids(5, 20) for _ in range(n)) for _ in range(rollouts)]
    return prompts, [ids(3, 30) for _ in prompts], [ids(3, 30) for _ in prompts]


def test_leak_probe():
    prompts, reference, policy = pairs(200)
    closed = [ids + [2] for ids in reference], [ids + [2] for ids in policy]
    state = torch.get_rng_state()
    begin = time.perf_counter()
    assert (
        health.leak_probe(prompts, *closed) == 0.5
    )  # one end token on both sides: nothing but ties
    assert (
        0.45 < health.leak_probe(prompts, reference, policy) < 0.55
    )  # last tokens differ, but not by side
    assert health.leak_probe(prompts, closed[0], policy) > 0.99  # planted on one side
    some = [ids + [2] if i % 2 else ids for i, ids in enumerate(reference)]
    assert 0.65 < health.leak_probe(prompts, some, policy) < 0.85  # on half of one side
    assert time.perf_counter() - begin < 5
    assert torch.equal(
        state, torch.get_rng_state()
    )  # a probe must not move the run's random numbers


def test_leak_probe_uses_the_prompt():
    """The side is given away only by token and prompt together: by which of two words the prompt has."""
    prompts, _, _ = pairs(100, 1)
    prompts = [ids + [60 + i % 2] * 20 for i, ids in enumerate(prompts)]
    reference, policy = [[2 + i % 2] for i in range(100)], [[3 - i % 2] for i in range(100)]
    assert health.leak_probe(prompts, reference, policy) > 0.95


def test_probes_hold_out_whole_prompts():
    """Sides that are random but fixed per prompt: a probe that saw the prompt's other pairs would find them."""
    prompts, _, _ = pairs(20, 8, seed=3)
    random = torch.Generator().manual_seed(1)
    flip = torch.randint(0, 2, (20,), generator=random).repeat_interleave(8).tolist()
    accuracy = health.leak_probe(prompts, [[2 + f] for f in flip], [[3 - f] for f in flip])
    assert accuracy < 0.55
    assert math.isnan(
        health.leak_probe(prompts[:8], [[1]] * 8, [[2]] * 8)
    )  # one prompt: nothing to hold out


def test_length_probe():
    prompts, reference, policy = pairs(100)
    lengths = [T([len(ids) for ids in side]) for side in (reference, policy)]
    assert 0.42 < health.length_probe(prompts, *lengths) < 0.58
    assert health.length_probe(prompts, lengths[0] + 40, lengths[1]) > 0.99
    assert health.length_probe(prompts, lengths[0], lengths[0]) == 0.5


def test_game_metrics_keep_the_kinds_apart():
    """Kind 0 follows the group, kind 1 opposes it; rows as the ranks gather them, in any order of groups."""
    rows = [
        (kind, group, 5.0, score * (1 - 2 * kind), 7, 4 + k)
        for group in (1, 0)
        for k, score in enumerate((1.0, 2.0, 12.0))
        for kind in (0, 1)
    ]
    load = T([[[1, 1]], [[0, 2]]])
    m = health.game_metrics(rows, load, ("perception", "reasoning"), clip=10)
    assert (m["perception/acc"], m["reasoning/acc"]) == (pytest.approx(2 / 3), 1)
    assert (m["perception/clipped"], m["reasoning/policy_mean"]) == (pytest.approx(1 / 3), -5)
    assert m["perception/length_corr"] == pytest.approx(-m["reasoning/length_corr"])
    assert m["perception/length_corr"] > 0.8 and m["perception/longer"] == 1
    assert m["advantage_corr"] == pytest.approx(-1)
    assert (m["perception/entropy"], m["reasoning/max_share"]) == (1, 1)
    empty = health.game_metrics([], torch.zeros(2, 0, 4), ("perception", "reasoning"), clip=10)
    assert set(empty) == {
        k for k in m if "expert" not in k and "share" not in k and "entropy" not in k
    }
    assert all(math.isnan(v) for v in empty.values())


def test_probe_metrics():
    prompts, reference, policy = pairs(30)
    probes = [
        (1, prompt, a + [2], b + [3])
        for prompt, a, b in zip(prompts, reference, policy, strict=True)
    ]
    probes += [(0, prompt, a + [2], b + [2]) for _, prompt, a, b in probes]
    m = health.probe_metrics(probes, ("perception", "reasoning"))
    assert (
        m["perception/leak"] == 0.5
        and m["reasoning/leak"] > 0.99
        and 0 < m["reasoning/length_probe"] < 1
    )
    assert health.probe_metrics([], ("perception", "reasoning")) == {}
