"""
Claim: forward + backward of token_logps costs no more time than log_softmax and gather, at a fraction of the memory.

    python bench/logprob.py                     # V 151,936, T 2048, D 256, float32 on a CPU
    python bench/logprob.py --device cuda       # T 16,384, D 2560, bfloat16; beside Liger and TRL where they are installed
"""

import argparse

import torch
import torch.nn.functional as F
from measure import clock, median, peak, report

from engine.logprob import token_logps

parser = argparse.ArgumentParser()
parser.add_argument("--device", default="cpu")
parser.add_argument("--tokens", type=int)
parser.add_argument("--hidden", type=int)
parser.add_argument("--vocabulary", type=int, default=151_936)
parser.add_argument("--repeat", type=int, default=5)
args = parser.parse_args()
cuda = args.device != "cpu"
T, D, V = (
    args.tokens or (16_384 if cuda else 2048),
    args.hidden or (2560 if cuda else 256),
    args.vocabulary,
)
torch.manual_seed(0)
dtype = torch.bfloat16 if cuda else torch.float32
hidden = torch.randn(T, D, device=args.device).to(dtype).requires_grad_()
weight = (torch.randn(V, D, device=args.device) * D**-0.5).to(dtype).requires_grad_()
target = torch.randint(V, (T,), device=args.device)
coefficient = torch.randn(T, device=args.device) / T


def plain(dtype=torch.float32):
    logits = (hidden @ weight.T).to(dtype)
    return F.log_softmax(logits, -1).gather(1, target[:, None]).squeeze(1)


def trl():
    from trl.trainer.utils import selective_log_softmax

    return selective_log_softmax((hidden @ weight.T)[None], target[None])[0].float()


def liger():
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    return -liger_fused_linear_cross_entropy(hidden, weight, target, reduction="none")


def step(logps):
    hidden.grad = weight.grad = None
    logp = logps()
    (logp * coefficient).sum().backward()
    return logp.detach()


contenders = {
    "plain": lambda: step(plain),
    "two sweeps": lambda: step(lambda: token_logps(hidden, weight, target)),
    "one sweep": lambda: step(lambda: token_logps(hidden, weight, target, coefficient=coefficient)),
}
others, missing = {"trl": trl, "liger": liger} if cuda else {"trl": trl}, {}
for name, logps in others.items():
    try:
        step(logps)
        contenders[name] = lambda logps=logps: step(logps)
    except Exception as error:
        missing[name] = f"{type(error).__name__}: {error}"[:100]
expected = step(plain)
wanted = hidden.grad.float(), weight.grad.float()
for name in ("two sweeps", "one sweep"):
    difference = float((contenders[name]() - expected).abs().max())
    relative = [
        float((x.grad.float() - w).norm() / w.norm())
        for x, w in zip((hidden, weight), wanted, strict=True)
    ]
    assert difference < (0.05 if cuda else 1e-4) and max(relative) < (0.02 if cuda else 1e-4), (
        name,
        difference,
        relative,
    )
del expected, wanted
seconds = {k: median(v) for k, v in clock(contenders, args.device, args.repeat).items()}
memory = {}
for name, run in contenders.items():
    hidden.grad = weight.grad = None  # what the last one left is not to be counted as freed
    memory[name] = peak(run, args.device)
report(
    "logprob",
    ratio_time={k: v / seconds["plain"] for k, v in seconds.items()},
    ratio_memory={k: v / memory["plain"] for k, v in memory.items()},
    seconds=seconds,
    gigabytes={k: v / 1e9 for k, v in memory.items()},
    T=T,
    D=D,
    V=V,
    dtype=str(dtype),
    device=args.device,
    missing=missing,
)
