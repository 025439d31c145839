"""AdamW's groups, the learning rate, and updates that never happen on numbers that are not
finite."""

import copy
import itertools
import json
import math

import pytest
import torch

from engine import optimiser, ranks
from engine.optimiser import Schedule


def factors(kind, total, warmup, steps):
    schedule = Schedule(kind, total, warmup)
    return [schedule.factor(step) for step in steps]


def test_schedule():
    cosine = factors("cosine", 10, 0.2, range(10))
    assert cosine[:3] == [0.5, 1.0, 1.0]
    assert cosine[6] == pytest.approx(0.5)
    assert 0 < cosine[9] < cosine[8]
    assert factors("constant", 10, 4, range(6)) == [0.25, 0.5, 0.75, 1, 1, 1]
    assert factors("constant", 2, 0.0, range(2)) == [1, 1]
    assert factors("constant", 2, 0.1, [0]) == [1]  # a warm-up shorter than a step


def resumed(kind, before, now, warmup, step):
    """A run of `now` updates, the first `step` of which were those of one of `before`."""
    first = Schedule(kind, before, warmup)
    second = Schedule(kind, now, warmup)
    second.resume(json.loads(json.dumps(first.state())), step)
    return [first.factor(k) for k in range(step)], second


def test_schedule_of_a_resumed_run():
    """The same where the length is the same; where it grew, it goes on from where it was."""
    done, schedule = resumed("cosine", 100, 100, 0.1, 40)
    rest = [schedule.factor(step) for step in range(40, 100)]
    assert done + rest == factors("cosine", 100, 0.1, range(100))

    for step in (5, 12, 60, 99):
        done, schedule = resumed("cosine", 100, 300, 0.1, step)
        whole = done + [schedule.factor(k) for k in range(step, 300)]
        jumps = [abs(a - b) for a, b in itertools.pairwise(whole)]
        assert max(jumps[step - 1 :]) <= 0.1 + 1e-9  # a step of the warm-up's line
        assert max(jumps[11:]) < 0.02
        assert sorted(whole[10:], reverse=True) == whole[10:]
        assert 0 < whole[-1] < 0.001
    # Interrupted again, with nothing changed: as if it had not been.
    again = Schedule("cosine", 300, 0.1)
    again.resume(schedule.state(), 150)
    assert [again.factor(k) for k in range(150, 300)] == whole[150:]

    _, schedule = resumed("constant", 100, 200, 0.1, 5)
    assert [schedule.factor(k) for k in (5, 9, 10, 150)] == [0.6, 1.0, 1.0, 1.0]
    _, schedule = resumed("cosine", 100, 10, 0, 60)  # shorter than it is already
    assert schedule.factor(60) <= 1


def test_a_cosine_that_has_ended_says_so(capsys):
    resumed("cosine", 100, 100, 0.1, 40)
    resumed("cosine", 100, 300, 0.1, 50)
    resumed("cosine", 100, 100, 0.1, 100)
    assert capsys.readouterr().out == ""
    resumed("cosine", 100, 300, 0.1, 100)
    assert "warning: the learning rate had come down to 0.0003 of" in capsys.readouterr().out


def test_another_kind_of_schedule_is_taken_as_given():
    schedule = Schedule("constant", 200)
    schedule.resume(Schedule("cosine", 100).state(), 99)
    assert schedule.factor(99) == 1


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
