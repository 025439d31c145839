"""AdamW's groups, the learning rate, and updates that never happen on numbers that are not
finite."""

import copy
import math

import pytest
import torch

from engine import optimiser, ranks


def test_schedule():
    factors = [optimiser.schedule(step, 10, 0.2, "cosine") for step in range(10)]
    assert factors[:3] == [0.5, 1.0, 1.0]
    assert factors[6] == pytest.approx(0.5)
    assert 0 < factors[9] < factors[8]
    assert [optimiser.schedule(step, 10, 4) for step in range(6)] == [0.25, 0.5, 0.75, 1, 1, 1]
    assert [optimiser.schedule(step, 2) for step in range(2)] == [1, 1]
    assert optimiser.schedule(0, 2, 0.1) == 1  # a warm-up shorter than a step


def test_weight_decay_on_matrices_only():
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.LayerNorm(2))
    model[1].bias.requires_grad_(False)
    matrices, vectors = optimiser.optimizer(model, 1e-3, 0.1).param_groups
    assert (matrices["param_names"], matrices["weight_decay"]) == (["0.weight"], 0.1)
    assert (vectors["param_names"], vectors["weight_decay"]) == (["0.bias", "1.weight"], 0.0)


def test_clip_grad():
    params = [torch.nn.Parameter(torch.zeros(n)) for n in (2, 1, 1)]
    params[0].grad = torch.tensor([3.0, 0.0])
    params[1].grad = torch.tensor([4.0])
    assert ranks.clip_grad(params, 10) == 5
    assert params[1].grad.item() == 4
    assert ranks.clip_grad(params, 1) == 5
    assert params[1].grad.item() == pytest.approx(0.8)
    assert ranks.clip_grad(params[2:], 1) == 0


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_not_finite_updates_nothing_and_third_in_a_row_raises(what):
    model = torch.nn.Linear(2, 1)
    optimizer = optimiser.optimizer(model, 0.1, 0.0)
    before = copy.deepcopy(model.state_dict())

    def update(bad):
        model(torch.ones(2)).sum().backward()
        if bad and what == "gradient":
            model.bias.grad.fill_(math.inf)
        loss = math.nan if bad and what == "loss" else 1.0
        return optimiser.step_if_finite(optimizer, loss, 1.0, "discriminator")

    assert update(True)[1] == 1
    assert update(True)[1] == 1
    assert all(torch.equal(before[key], now) for key, now in model.state_dict().items())
    assert model.weight.grad is None
    assert update(False) == (pytest.approx(math.sqrt(3)), 0)
    assert not torch.equal(before["weight"], model.weight)
    update(True)
    update(True)
    named = "bias" if what == "gradient" else "loss nan"
    with pytest.raises(FloatingPointError, match=f"discriminator: .*{named}"):
        update(True)
