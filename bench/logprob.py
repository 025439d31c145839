"""
Claim: forward + backward of token_logps costs no more time than log_softmax and gather, at a
fraction of the memory.

    python bench/logprob.py                  # V 151,936, T 2048, D 256, float32 on a CPU
    python bench/logprob.py --device cuda    # T 16,384, D 2560, bfloat16

TRL's function runs beside it where it is installed, on CUDA also Liger's kernel.
"""

import argparse

import torch
import torch.nn.functional as F
from measure import clock, device_here, median, peak, report

from engine.logprob import token_logps


class Case:
    """The inputs of one measurement, and each contender's log-probs (T,) of them."""

    def __init__(self, tokens, width, vocabulary, dtype, device):
        torch.manual_seed(0)
        hidden = torch.randn(tokens, width, device=device)
        weight = torch.randn(vocabulary, width, device=device) * width**-0.5
        self.hidden = hidden.to(dtype).requires_grad_()  # (T, D)
        self.weight = weight.to(dtype).requires_grad_()  # (V, D)
        self.targets = torch.randint(vocabulary, (tokens,), device=device)
        self.coefficient = torch.randn(tokens, device=device) / tokens

    def plain(self):
        logits = (self.hidden @ self.weight.T).float()
        return F.log_softmax(logits, -1).gather(1, self.targets[:, None]).squeeze(1)

    def two_sweeps(self):
        return token_logps(self.hidden, self.weight, self.targets)

    def one_sweep(self):
        return token_logps(self.hidden, self.weight, self.targets, coefficient=self.coefficient)

    def trl(self):
        from trl.trainer.utils import selective_log_softmax

        logits = self.hidden @ self.weight.T
        return selective_log_softmax(logits[None], self.targets[None])[0].float()

    def liger(self):
        from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

        return -liger_fused_linear_cross_entropy(
            self.hidden, self.weight, self.targets, reduction="none"
        )

    def forget(self):
        """Drop the gradients, so that what the last contender left does not count as freed."""
        self.hidden.grad = None
        self.weight.grad = None

    def step(self, logps):
        """Forward and backward of a contender -> its log-probs."""
        self.forget()
        logp = logps()
        (logp * self.coefficient).sum().backward()
        return logp.detach()


def check(case, names, contenders, tolerance_logp, tolerance_gradient):
    """Log-probs and gradients of the contenders `names` are the plain ones."""
    expected = case.step(case.plain)
    gradients = (case.hidden.grad.float(), case.weight.grad.float())
    for name in names:
        difference = float((case.step(contenders[name]) - expected).abs().max())
        assert difference < tolerance_logp, (name, difference)
        found = (case.hidden.grad.float(), case.weight.grad.float())
        for mine, wanted in zip(found, gradients, strict=True):
            relative = float((mine - wanted).norm() / wanted.norm())
            assert relative < tolerance_gradient, (name, relative)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--device", type=device_here, default="cpu")
    parser.add_argument("--tokens", type=int)
    parser.add_argument("--hidden", type=int)
    parser.add_argument("--vocabulary", type=int, default=151_936)
    parser.add_argument("--repeat", type=int, default=5)
    args = parser.parse_args()
    cuda = args.device != "cpu"
    tokens = args.tokens or (16_384 if cuda else 2048)
    width = args.hidden or (2560 if cuda else 256)
    dtype = torch.bfloat16 if cuda else torch.float32
    case = Case(tokens, width, args.vocabulary, dtype, args.device)

    contenders = {
        "plain": case.plain,
        "two sweeps": case.two_sweeps,
        "one sweep": case.one_sweep,
    }
    others = {"trl": case.trl}
    if cuda:
        others["liger"] = case.liger
    missing = {}
    for name, logps in others.items():
        try:
            case.step(logps)
            contenders[name] = logps
        except Exception as error:  # not installed, or no kernel for this device
            missing[name] = f"{type(error).__name__}: {error}"[:100]

    ours = ("two sweeps", "one sweep")
    if cuda:
        check(case, ours, contenders, tolerance_logp=0.05, tolerance_gradient=0.02)
    else:
        check(case, ours, contenders, tolerance_logp=1e-4, tolerance_gradient=1e-4)

    runs = {}
    for name, logps in contenders.items():
        runs[name] = lambda logps=logps: case.step(logps)
    seconds = {}
    for name, values in clock(runs, args.device, args.repeat).items():
        seconds[name] = median(values)
    memory = {}
    for name, run in runs.items():
        case.forget()
        memory[name] = peak(run, args.device)
    report(
        "logprob",
        ratio_time={name: value / seconds["plain"] for name, value in seconds.items()},
        ratio_memory={name: value / memory["plain"] for name, value in memory.items()},
        seconds=seconds,
        gigabytes={name: value / 1e9 for name, value in memory.items()},
        T=tokens,
        D=width,
        V=args.vocabulary,
        dtype=str(dtype),
        device=args.device,
        missing=missing,
    )


if __name__ == "__main__":
    main()
