"""
Claim: an SFT step with a frozen vision tower (sft.py's default) takes less time and memory.

    python bench/freeze.py                       # random weights and rows, small
    python bench/freeze.py --device cuda         # of the 2B model's shape
    python bench/freeze.py --policy Qwen/Qwen3-VL-4B-Instruct --data sft.json --device cuda
    bash runs/puzzlevqa.sh ../shared/data        # leaves a checkpoint of random weights, for
    python bench/freeze.py --policy out/puzzlevqa/init --data ../shared/data/puzzlevqa/sft.json

A step is what sft.main does with a batch of rows that are encoded already: forward, backward,
AdamW. Peak: bytes beyond weights and AdamW's moments, so gradients are among them.
"""

import argparse

import torch
from measure import clock, device_here, median, model, peak, prompt, report

import sft
from data import read
from engine.attention import adopt
from engine.optimiser import optimizer
from engine.packs import packs_of_own
from model import Policy, freeze_vision, load


class Contender:
    """A policy, its optimiser, and a step of training on `trees`."""

    def __init__(self, args, trees, frozen):
        self.policy = open_policy(args).train()
        if frozen:
            freeze_vision(self.policy.hf.model)
        self.optimizer = optimizer(self.policy, 1e-5, 0.0)
        self.trees = trees
        self.pack_tokens = args.pack_tokens
        self.device = args.device

    def loss(self):
        """The loss of the batch, its gradients accumulated."""
        tokens = sum(int(tree.mask.sum()) for tree in self.trees)
        total = 0.0
        for pack in packs_of_own(self.trees, self.pack_tokens, self.device):
            coefficient = torch.full_like(
                pack.target, sft.sft_coefficient(tokens), dtype=torch.float32
            )
            loss = (coefficient * self.policy(pack, coefficient=coefficient)).sum()
            loss.backward()
            total += float(loss.detach())
        return total

    def step(self):
        self.loss()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def moments(self):
        """Bytes of AdamW's state."""
        held = 0
        for state in self.optimizer.state.values():
            held += sum(tensor.numel() * tensor.element_size() for tensor in state.values())
        return held


def open_policy(args):
    if args.policy:
        dtype = torch.float32 if args.device == "cpu" else torch.bfloat16
        return load(args.policy, dtype, args.device)
    hf = model("small" if args.device == "cpu" else "2B", args.device)
    adopt(hf.model)
    return Policy(hf, None, "random weights")


def conversations(args):
    """Encoded rows of --data; or random ones, an image and 200 tokens, 300 of a response."""
    if args.data:
        options = {"max_prompt_tokens": 8192, "max_pixels": args.max_pixels}
        encoder = load(args.policy, **options).encoder
        return read(args.data, "sft").fetch(range(args.batch), encoder.conversation)
    hf = open_policy(args).hf
    side = 16 if args.device == "cpu" else 32  # patches
    rows = []
    for seed in range(args.batch):
        row = prompt(hf, 500, side, seed)
        trained = torch.zeros(len(row.ids), dtype=torch.bool)
        trained[-300:] = True
        rows.append((row, trained))
    return rows


def same_gradients(trained, frozen):
    """Both compute the same loss, and the same gradients of what both train."""
    first = trained.loss()
    second = frozen.loss()
    assert abs(first - second) <= 1e-5 * abs(first), (first, second)
    others = dict(trained.policy.named_parameters())
    for name, parameter in frozen.policy.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(parameter.grad, others[name].grad, rtol=1e-3, atol=1e-6)
        else:
            assert parameter.grad is None
    for contender in (trained, frozen):
        contender.optimizer.zero_grad()


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--policy", help="a checkpoint; none: random weights")
    parser.add_argument("--data", help="demonstrations with images, for --policy; none: random")
    parser.add_argument("--batch", type=int, default=8, help="rows of a step")
    parser.add_argument("--max_pixels", type=int, help="of one image")
    parser.add_argument("--pack_tokens", type=int, default=16384)
    parser.add_argument("--device", type=device_here, default="cpu")
    parser.add_argument("--repeat", type=int, default=5)
    args = parser.parse_args()

    if bool(args.policy) != bool(args.data):
        parser.error("--policy and --data come together")

    trees = sft.trees_of(conversations(args))
    contenders = {name: Contender(args, trees, name == "frozen") for name in ("trained", "frozen")}
    if args.device == "cpu":
        same_gradients(**contenders)
    steps = {name: contender.step for name, contender in contenders.items()}
    seconds = {
        name: median(found) for name, found in clock(steps, args.device, args.repeat).items()
    }
    peaks = {name: peak(step, args.device) for name, step in steps.items()}
    moments = {name: contender.moments() for name, contender in contenders.items()}
    report(
        "freeze",
        seconds=seconds,
        time=seconds["frozen"] / seconds["trained"],
        peak_mb={name: held / 1e6 for name, held in peaks.items()},
        peak=peaks["frozen"] / peaks["trained"],
        adamw_mb={name: held / 1e6 for name, held in moments.items()},
        rows=len(trees),
        tokens=sum(len(tree.prompt.ids) for tree in trees),
        patches=sum(len(tree.prompt.images["pixel_values"]) for tree in trees),
        parameters=sum(p.numel() for p in contenders["trained"].policy.parameters()),
        of_vision=sum(p.numel() for p in contenders["trained"].policy.hf.model.visual.parameters()),
        device=args.device,
    )


if __name__ == "__main__":
    main()
