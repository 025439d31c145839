"""token_logps equals log_softmax and gather, in one sweep and in two, and never holds what they hold."""

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
    h, w = hidden.detach().double().requires_grad_(), weight.detach().double().requires_grad_()
    logits = h @ w.T / temperature
    logits = logits.index_fill(1, torch.tensor(banned, dtype=torch.long), -torch.inf)
    ref = logits.log_softmax(-1)
    expected = ref.gather(1, targets[:, None]).squeeze(1)
    torch.testing.assert_close(logp.double(), expected, atol=1e-5, rtol=1e-5)
    expected_entropy = -(ref.exp() * ref.masked_fill(ref == -torch.inf, 0)).sum(-1)
    torch.testing.assert_close(entropy.double(), expected_entropy, atol=1e-5, rtol=1e-5)
    for a, b in zip(got, torch.autograd.grad((expected * up.double()).sum(), (h, w)), strict=True):
        torch.testing.assert_close(a.double(), b, atol=1e-4, rtol=1e-4)
    assert not entropy.requires_grad


def test_token_logps_banned_target_and_empty():
    hidden, weight = torch.randn(2, 4), torch.randn(5, 4)
    assert token_logps(hidden, weight, torch.tensor([1, 2]), banned=(2,))[1] == -torch.inf
    empty = token_logps(hidden[:0].requires_grad_(), weight, torch.zeros(0, dtype=torch.long))
    assert empty.shape == (0,)
    empty.sum().backward()


def inputs(t=12, d=8, v=400):
    torch.manual_seed(0)
    return (
        torch.randn(t, d, requires_grad=True),
        torch.randn(v, d, requires_grad=True),
        torch.randint(v, (t,)),
    )


def test_another_gradient_than_the_coefficient_is_an_error():
    hidden, weight, targets = inputs()
    logp = token_logps(hidden, weight, targets, coefficient=torch.ones(12))
    with pytest.raises(ValueError, match="another gradient"):
        logp.square().sum().backward()
    with torch.no_grad():
        assert not token_logps(hidden, weight, targets, coefficient=torch.ones(12)).requires_grad


def test_zero_and_nan_coefficients():
    """An advantage of 0 is a gradient of 0; one that is NaN must reach the optimiser's check, not end the run here."""
    hidden, weight, targets = inputs()
    zeros, nans = torch.zeros(12), torch.ones(12).index_fill(0, torch.tensor([3]), torch.nan)
    (token_logps(hidden, weight, targets, coefficient=zeros) * zeros).sum().backward()
    assert not hidden.grad.any() and not weight.grad.any()
    (token_logps(hidden, weight, targets, coefficient=nans) * nans).sum().backward()
    assert weight.grad.isnan().any()


class Widest(TorchDispatchMode):
    numbers = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for x in out if isinstance(out, tuple | list) else [out]:
            self.numbers = max(self.numbers, x.numel() if isinstance(x, torch.Tensor) else 0)
        return out


@pytest.mark.parametrize("sweeps", [1, 2])
def test_nothing_of_the_logits_size_is_made(monkeypatch, sweeps):
    hidden, weight, targets = inputs(t=64)
    monkeypatch.setitem(logprob.CHUNK, "cpu", 5 * 400)
    with Widest() as widest:
        logp, _ = token_logps(
            hidden, weight, targets, 0.5, (1,), True, torch.ones(64) if sweeps == 1 else None
        )
        logp.sum().backward()
    assert widest.numbers == 8 * 400  # the head itself; all logits would be 64 * 400


@pytest.mark.parametrize("sweeps", [1, 2])
def test_under_compile_and_checkpoint(sweeps):
    hidden, weight, targets = inputs()
    up = torch.randn(12)

    def loss(hidden, weight):
        logp = token_logps(
            hidden.tanh(), weight, targets, 0.7, (5,), coefficient=up if sweeps == 1 else None
        )
        return (logp * up).sum()

    expected = torch.autograd.grad(loss(hidden, weight), (hidden, weight))
    for run in (
        lambda: checkpoint(loss, hidden, weight, use_reentrant=False),
        lambda: torch.compile(loss, backend="aot_eager")(hidden, weight),
    ):
        for a, b in zip(torch.autograd.grad(run(), (hidden, weight)), expected, strict=True):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("sweeps", [1, 2])
def test_half_precision_inputs_accumulate_in_float32(sweeps):
    hidden, weight, targets = inputs(t=300, d=16, v=50)
    h, w = hidden.detach().bfloat16().requires_grad_(), weight.detach().bfloat16().requires_grad_()
    up = torch.randn(300)
    logp = token_logps(h, w, targets % 50, coefficient=up if sweeps == 1 else None)
    got = torch.autograd.grad((logp * up).sum(), (h, w))
    a, b = h.detach().double().requires_grad_(), w.detach().double().requires_grad_()
    exact = (a @ b.T).log_softmax(-1).gather(1, (targets % 50)[:, None]).squeeze(1)
    assert logp.dtype == torch.float32 and [g.dtype for g in got] == [torch.bfloat16] * 2
    for mine, expected in zip(
        (logp, *got), (exact, *torch.autograd.grad((exact * up).sum(), (a, b))), strict=True
    ):
        assert float((mine.double() - expected).detach().norm() / expected.detach().norm()) < 0.01
