"""What tells whether the game is sound: values by hand, no data, planted leaks."""

import math
import time
from types import SimpleNamespace

import pytest
import torch

from engine import health
from engine.rollouts import Group

T = torch.tensor
NONE = torch.zeros(0)


def span_metrics(reference, policy, group, reference_length, policy_length):
    pairs = health.ScoredPairs(reference, policy, group, reference_length, policy_length)
    return health.span_metrics(pairs, clip=10)


def test_span_metrics():
    reference = T([1.0, 1.0, 0.0, 8.0])
    policy = T([0.0, 1.0, 2.0, 0.0])
    m = span_metrics(reference, policy, T([0, 0, 1, 1]), T([5, 5, 9, 9]), T([4, 5, 10, 20]))
    assert m["acc"] == (1 + 0.5 + 0 + 1) / 4
    assert m["longer"] == (1 + 0.5 + 0 + 0) / 4
    assert m["margin"] == 1.75
    assert m["saturated"] == 0.25
    one = T([0])
    lost = span_metrics(T([0.0]), T([9.0]), one, one, one)
    assert lost["saturated"] == 0
    assert m["margin_p10"] == pytest.approx(-1.4)
    assert m["margin_p90"] == pytest.approx(5.9)
    assert (m["reference_mean"], m["reference_absmax"], m["policy_mean"]) == (2.5, 8, 0.75)
    assert m["policy_std"] == pytest.approx(policy.std().item())
    assert m["group_std"] == pytest.approx((math.sqrt(0.5) + math.sqrt(2)) / 2)
    assert m["flat_groups"] == 0


def test_auc_asks_whether_right_rollouts_score_higher_than_wrong_ones():
    """Within a prompt alone: a prompt whose rollouts all score higher says nothing."""

    def scored(score, accuracy, well_formed=None):
        group = Group(None)
        group.score = T([score, [-value for value in score]])
        group.well_formed = T(well_formed or [True] * len(accuracy))
        group.verdicts = {"accuracy": T(accuracy)}
        return group

    groups = [
        scored([1.0, 2.0, 3.0], [0.0, 1.0, 0.0]),  # 2 is above 1, not above 3
        scored([9.0, 8.0, 9.0], [1.0, 0.0, 0.0]),  # above the one, as high as the other
        scored([50.0, 60.0], [1.0, 1.0]),
        scored([0.0, -5.0, math.nan], [1.0, 0.0, 0.0], [True, True, False]),
    ]
    assert health.canary_metrics(groups, ["perception", "reasoning"]) == {
        "perception/auc": (1 + 0 + 1 + 0.5 + 1) / 5,
        "perception/auc_pairs": 5,
        "reasoning/auc": (0 + 1 + 0 + 0.5 + 0) / 5,
        "reasoning/auc_pairs": 5,
    }
    alike = health.canary_metrics(groups[2:3], ["perception"])
    assert math.isnan(alike["perception/auc"]) and alike["perception/auc_pairs"] == 0


def test_no_data_is_nan_never_a_number():
    metrics = span_metrics(NONE, NONE, NONE.long(), NONE, NONE)
    metrics["correlation"] = health.correlation(NONE, NONE)
    metrics["leak"] = health.leak_probe([], [], [])
    metrics["length"] = health.length_probe([], NONE, NONE)
    metrics.update(health.expert_load(torch.zeros(2, 3)))
    assert [name for name, value in metrics.items() if not math.isnan(value)] == []
    one = span_metrics(T([1.0]), T([0.0]), T([0]), T([3]), T([3]))
    assert one["acc"] == 1
    assert math.isnan(one["policy_std"])
    assert math.isnan(one["group_std"])


def test_flat_groups_and_singles():
    spread = health.group_spread(T([1.0, 1.0005, 1.0, 2.0, 7.0]), T([4, 4, 2, 2, 9]))
    assert spread["flat_groups"] == 0.5 and spread["group_std"] == pytest.approx(0.35373, abs=1e-4)


def test_length_correlation_is_within_group():
    """
    Over all pairs longer goes with lower, within each group with higher: the latter is what moves
    the policy.
    """
    policy = T([1.0, 2.0, 11.0, 12.0])
    length = T([100, 200, 10, 20])
    assert health.correlation(policy, length) < 0
    m = span_metrics(policy, policy, T([0, 0, 1, 1]), length, length)
    assert m["length_corr"] > 0.7
    assert m["longer"] == 0.5
    assert m["acc"] == 0.5
    assert health.correlation(policy, -3 * policy + 1) == pytest.approx(-1)
    assert math.isnan(health.correlation(policy, torch.ones(4)))


def test_expert_load():
    load = health.expert_load(T([[1, 1, 1, 1], [4, 0, 0, 0]]))
    assert load["entropy"] == 0.5
    assert load["max_share"] == 1
    assert load["expert_0"] == 0.625


def pairs(n, rollouts=2, seed=0):
    """
    Ids of n prompts, each `rollouts` times, and as many spans of random length and text for each
    side, of the same distribution on both sides.
    """
    random = torch.Generator().manual_seed(seed)

    def ids(low, high):
        length = int(torch.randint(low, high, (), generator=random))
        return torch.randint(10, 50, (length,), generator=random).tolist()

    prompts = []
    for _ in range(n):
        prompts += [ids(5, 20)] * rollouts
    reference = [ids(3, 30) for _ in prompts]
    policy = [ids(3, 30) for _ in prompts]
    return prompts, reference, policy


def test_leak_probe():
    prompts, reference, policy = pairs(200)
    reference_closed = [ids + [2] for ids in reference]
    policy_closed = [ids + [2] for ids in policy]
    half_closed = [ids + [2] if i % 2 else ids for i, ids in enumerate(reference)]
    state = torch.get_rng_state()
    begin = time.perf_counter()
    # one end token on both sides: nothing but ties
    assert health.leak_probe(prompts, reference_closed, policy_closed) == 0.5
    # last tokens differ, but not by side
    assert 0.45 < health.leak_probe(prompts, reference, policy) < 0.55
    # planted on one side, and on half of one side
    assert health.leak_probe(prompts, reference_closed, policy) > 0.99
    assert 0.65 < health.leak_probe(prompts, half_closed, policy) < 0.85
    assert time.perf_counter() - begin < 5
    # a probe must not move the run's random numbers
    assert torch.equal(state, torch.get_rng_state())


def test_leak_probe_uses_the_prompt():
    """Token and prompt together give the side away: which of two words the prompt has."""
    prompts, _, _ = pairs(100, 1)
    prompts = [ids + [60 + i % 2] * 20 for i, ids in enumerate(prompts)]
    reference = [[2 + i % 2] for i in range(100)]
    policy = [[3 - i % 2] for i in range(100)]
    assert health.leak_probe(prompts, reference, policy) > 0.95


def test_probes_hold_out_whole_prompts():
    """
    Sides that are random but fixed per prompt: a probe that saw the prompt's other pairs would find
    them.
    """
    prompts, _, _ = pairs(20, 8, seed=3)
    random = torch.Generator().manual_seed(1)
    flip = torch.randint(0, 2, (20,), generator=random).repeat_interleave(8).tolist()
    accuracy = health.leak_probe(prompts, [[2 + f] for f in flip], [[3 - f] for f in flip])
    assert accuracy < 0.55
    # one prompt: nothing to hold out
    assert math.isnan(health.leak_probe(prompts[:8], [[1]] * 8, [[2]] * 8))


def test_length_probe():
    prompts, reference, policy = pairs(100)
    reference_length = T([len(ids) for ids in reference])
    policy_length = T([len(ids) for ids in policy])
    assert 0.42 < health.length_probe(prompts, reference_length, policy_length) < 0.58
    assert health.length_probe(prompts, reference_length + 40, policy_length) > 0.99
    assert health.length_probe(prompts, reference_length, reference_length) == 0.5


def game_pairs(sign):
    """Two groups of three rollouts whose scores follow their lengths, or oppose them (sign −1)."""
    scores = sign * T([1.0, 2.0, 12.0, 1.0, 2.0, 12.0])
    return health.ScoredPairs(
        reference=torch.full((6,), 5.0),
        policy=scores,
        group=T([1, 1, 1, 0, 0, 0]),
        reference_length=torch.full((6,), 7),
        policy_length=T([4, 5, 6, 4, 5, 6]),
    )


def test_game_metrics_keep_the_spans_apart():
    """The second span opposes the first, in any order of groups."""
    pairs = {"perception": game_pairs(1), "reasoning": game_pairs(-1)}
    load = T([[[1, 1]], [[0, 2]]])
    m = health.game_metrics(pairs, load, clip=10)
    assert m["perception/acc"] == pytest.approx(2 / 3)
    assert m["reasoning/acc"] == 1
    assert m["perception/clipped"] == pytest.approx(1 / 3)
    assert m["reasoning/policy_mean"] == -5
    assert m["perception/length_corr"] == pytest.approx(-m["reasoning/length_corr"])
    assert m["perception/length_corr"] > 0.8
    assert m["perception/longer"] == 1
    assert m["advantage_corr"] == pytest.approx(-1)
    assert (m["perception/entropy"], m["reasoning/max_share"]) == (1, 1)

    nothing = health.ScoredPairs(NONE, NONE, NONE, NONE, NONE)
    pairs = {"perception": nothing, "reasoning": nothing}
    empty = health.game_metrics(pairs, torch.zeros(2, 0, 4), clip=10)
    of_experts = ("expert", "share", "entropy")
    assert set(empty) == {name for name in m if not any(word in name for word in of_experts)}
    assert all(math.isnan(value) for value in empty.values())


def test_game_metrics_of_one_and_of_three_spans():
    """Metrics follow the names; the correlation is that of the first two spans."""
    one = health.game_metrics({"whole": game_pairs(1)}, torch.zeros(1, 0, 1), clip=10)
    assert "whole/acc" in one
    assert "advantage_corr" not in one
    pairs = {"plan": game_pairs(1), "perception": game_pairs(1), "reasoning": game_pairs(-1)}
    three = health.game_metrics(pairs, torch.zeros(3, 0, 1), clip=10)
    assert three["advantage_corr"] == pytest.approx(1)
    assert three["plan/acc"] == three["perception/acc"]
    assert three["reasoning/policy_mean"] == -5
    with pytest.raises(ValueError):
        health.game_metrics(pairs, torch.zeros(2, 0, 1), clip=10)  # a load for each span


def test_probes_see_what_the_discriminator_sees():
    """Its prompt, which may be blind, and well-formed rollouts."""
    prompt = SimpleNamespace(ids=T([1, 2, 3]))
    seen = SimpleNamespace(ids=T([1, 3]))
    group = Group(prompt, seen=seen, reference=[[5], [6]], well_formed=T([True, False]))
    group.spans = [[[7], [8]], None]
    found = health.probes_of([group], ["caption", "answer"])
    assert found == {
        "caption": ([[1, 3]], [[5]], [[7]]),
        "answer": ([[1, 3]], [[6]], [[8]]),
    }


def test_probe_metrics():
    prompts, reference, policy = pairs(30)
    closed = [ids + [2] for ids in reference]
    probes = {
        "perception": (prompts, closed, [ids + [2] for ids in policy]),
        "reasoning": (prompts, closed, [ids + [3] for ids in policy]),
    }
    m = health.probe_metrics(probes)
    assert m["perception/leak"] == 0.5
    assert m["reasoning/leak"] > 0.99
    assert 0 < m["reasoning/length_probe"] < 1
    assert health.probe_metrics({"perception": ([], [], [])}) == {}
