"""token_logps equals log_softmax and gather, in one sweep and in two, and never holds what they
hold."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from engine import logprob
from engine.logprob import token_logps


@pytest.mark.parametrize("temperature,banned", [(1.0, ()), (0.7, (3, 9)), (2.0, (1,))])
@pytest.mark.parametrize("rows", [1, 3, 1000])
@pytest.mark.parametrize("sweeps", [1, 2])
def test_token_logps(monkeypatch, temperature, banned, rows, sweeps):
    monkeypatch.setitem(logprob.CHUNK, "cpu", rows * 20)
    torch.manual_seed(0)
    hidden = torch.randn(11, 16, dtype=torch.float64).float().requires_grad_()
    weight = torch.randn(20, 16).requires_grad_()
    targets = torch.randint(10, 20, (11,))
    up = torch.randn(11)
    ahead = 3 * up if sweeps == 1 else None  # up to a common factor
    logp, entropy = token_logps(
        hidden, weight, targets, temperature, banned, entropy=True, coefficient=ahead
    )
    got = torch.autograd.grad((logp * up).sum(), (hidden, weight))
    assert not entropy.requires_grad

    exact_hidden = hidden.detach().double().requires_grad_()
    exact_weight = weight.detach().double().requires_grad_()
    logits = exact_hidden @ exact_weight.T / temperature
    logits = logits.index_fill(1, torch.tensor(banned, dtype=torch.long), -torch.inf)
    log_softmax = logits.log_softmax(-1)
    expected = log_softmax.gather(1, targets[:, None]).squeeze(1)
    torch.testing.assert_close(logp.double(), expected, atol=1e-5, rtol=1e-5)
    finite = log_softmax.masked_fill(log_softmax == -torch.inf, 0)
    expected_entropy = -(log_softmax.exp() * finite).sum(-1)
    torch.testing.assert_close(entropy.double(), expected_entropy, atol=1e-5, rtol=1e-5)
    gradients = torch.autograd.grad((expected * up.double()).sum(), (exact_hidden, exact_weight))
    for mine, exact in zip(got, gradients, strict=True):
        torch.testing.assert_close(mine.double(), exact, atol=1e-4, rtol=1e-4)


def test_token_logps_banned_target_and_empty():
    hidden, weight = torch.randn(2, 4), torch.randn(5, 4)
    assert token_logps(hidden, weight, torch.tensor([1, 2]), banned=(2,))[1] == -torch.inf
    empty = token_logps(hidden[:0].requires_grad_(), weight, torch.zeros(0, dtype=torch.long))
    assert empty.shape == (0,)
    empty.sum().backward()


def inputs(t=12, d=8, v=400):
    torch.manual_seed(0)
    hidden = torch.randn(t, d, requires_grad=True)
    weight = torch.randn(v, d, requires_grad=True)
    return hidden, weight, torch.randint(v, (t,))


def test_another_gradient_than_the_coefficient_is_an_error():
    hidden, weight, targets = inputs()
    logp = token_logps(hidden, weight, targets, coefficient=torch.ones(12))
    with pytest.raises(ValueError, match="another gradient"):
        logp.square().sum().backward()
    with torch.no_grad():
        assert not token_logps(hidden, weight, targets, coefficient=torch.ones(12)).requires_grad


def test_a_second_backward_pass_of_one_sweep_is_an_error():
    hidden, weight, targets = inputs()
    loss = 3 * token_logps(hidden, weight, targets, coefficient=torch.ones(12)).sum()
    loss.backward(retain_graph=True)  # which scales the gradient that the forward pass made
    with pytest.raises(RuntimeError, match="one backward pass"):
        loss.backward()


def test_zero_and_nan_coefficients():
    """An advantage of 0 is a gradient of 0; one that is NaN must reach the optimiser's check, not
    end the run here."""
    hidden, weight, targets = inputs()
    zeros = torch.zeros(12)
    (token_logps(hidden, weight, targets, coefficient=zeros) * zeros).sum().backward()
    assert not hidden.grad.any() and not weight.grad.any()
    nans = torch.ones(12)
    nans[3] = torch.nan
    (token_logps(hidden, weight, targets, coefficient=nans) * nans).sum().backward()
    assert weight.grad.isnan().any()


@pytest.mark.parametrize("sweeps", [1, 2])
@pytest.mark.parametrize("trained", ["hidden", "weight"])
def test_where_one_of_the_two_is_frozen(sweeps, trained):
    hidden, weight, targets = inputs()
    up = torch.randn(12)
    both = torch.autograd.grad((token_logps(hidden, weight, targets) * up).sum(), (hidden, weight))
    frozen = weight if trained == "hidden" else hidden
    frozen.requires_grad_(False)
    logp = token_logps(hidden, weight, targets, coefficient=up if sweeps == 1 else None)
    (logp * up).sum().backward()
    assert frozen.grad is None
    found = hidden.grad if trained == "hidden" else weight.grad
    torch.testing.assert_close(found, both[0] if trained == "hidden" else both[1])


class Widest(TorchDispatchMode):
    """Counts the numbers of the largest tensor that is made."""

    numbers = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for x in out if isinstance(out, tuple | list) else [out]:
            if isinstance(x, torch.Tensor):
                self.numbers = max(self.numbers, x.numel())
        return out


@pytest.mark.parametrize("sweeps", [1, 2])
def test_nothing_of_the_logits_size_is_made(monkeypatch, sweeps):
    hidden, weight, targets = inputs(t=64)
    monkeypatch.setitem(logprob.CHUNK, "cpu", 5 * 400)
    ahead = torch.ones(64) if sweeps == 1 else None
    with Widest() as widest:
        logp, _ = token_logps(hidden, weight, targets, 0.5, (1,), True, ahead)
        logp.sum().backward()
    assert widest.numbers == 8 * 400  # the head itself; all logits would be 64 * 400


@pytest.mark.parametrize("sweeps", [1, 2])
def test_under_compile_and_checkpoint(sweeps):
    hidden, weight, targets = inputs()
    up = torch.randn(12)
    ahead = up if sweeps == 1 else None

    def loss(hidden, weight):
        logp = token_logps(hidden.tanh(), weight, targets, 0.7, (5,), coefficient=ahead)
        return (logp * up).sum()

    expected = torch.autograd.grad(loss(hidden, weight), (hidden, weight))
    checkpointed = checkpoint(loss, hidden, weight, use_reentrant=False)
    compiled = torch.compile(loss, backend="aot_eager")(hidden, weight)
    for other in (checkpointed, compiled):
        found = torch.autograd.grad(other, (hidden, weight))
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("sweeps", [1, 2])
def test_half_precision_inputs_accumulate_in_float32(sweeps):
    hidden, weight, targets = inputs(t=300, d=16, v=50)
    hidden = hidden.detach().bfloat16().requires_grad_()
    weight = weight.detach().bfloat16().requires_grad_()
    up = torch.randn(300)
    logp = token_logps(hidden, weight, targets, coefficient=up if sweeps == 1 else None)
    got = torch.autograd.grad((logp * up).sum(), (hidden, weight))
    assert logp.dtype == torch.float32
    assert [gradient.dtype for gradient in got] == [torch.bfloat16] * 2

    exact_hidden = hidden.detach().double().requires_grad_()
    exact_weight = weight.detach().double().requires_grad_()
    log_softmax = (exact_hidden @ exact_weight.T).log_softmax(-1)
    exact = log_softmax.gather(1, targets[:, None]).squeeze(1)
    gradients = torch.autograd.grad((exact * up).sum(), (exact_hidden, exact_weight))
    for mine, expected in zip((logp, *got), (exact, *gradients), strict=True):
        difference = (mine.double() - expected).detach().norm()
        assert float(difference / expected.detach().norm()) < 0.01
