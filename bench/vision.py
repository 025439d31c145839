"""
Claim: the vision tower runs images of one size at once, and its patch embedding as the matrix
product that it is.

    python bench/vision.py                      # on a CPU: many small images, few larger ones
    python bench/vision.py --device cuda        # the 4B's tower in bfloat16
"""

import argparse
import copy

import torch
from measure import clock, device_here, median, model, report

from engine.attention import adopt


def images(sides, patch_channels, device, dtype):
    """Pixels (P, C) and grids (images, 3) of square images of so many patches a side."""
    grid = torch.tensor([[1, side, side] for side in sides], device=device)
    patches = int(grid.prod(1).sum())
    return torch.randn(patches, patch_channels, device=device, dtype=dtype), grid


def tower(visual, pixels, grid):
    return visual(pixels, grid_thw=grid).pooler_output


def patch_embedding(visual, pixels, grid):
    return visual.patch_embed(pixels)


def step(part, visual, pixels, grid):
    """Forward and backward of a part of the tower -> its output."""
    out = part(visual, pixels, grid)
    out.float().square().mean().backward()
    for parameter in visual.parameters():
        parameter.grad = None
    return out.detach()


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--device", type=device_here, default="cpu")
    parser.add_argument("--repeat", type=int, default=7)
    args = parser.parse_args()
    cuda = args.device != "cpu"
    hf = model("4B" if cuda else "small", args.device, layers=1)
    theirs = hf.model.visual
    ours = adopt(copy.deepcopy(hf.model)).visual
    dtype = next(theirs.parameters()).dtype
    patch_channels = 6 * hf.config.vision_config.patch_size**2  # 3 colours, 2 frames
    if cuda:
        cases = {"one size": [32] * 16, "eight sizes": list(range(16, 48, 4)) * 2}
    else:
        cases = {"one size": [8] * 64, "eight sizes": list(range(4, 20, 2)) * 8}
    seconds = {}
    ratio = {}
    for case, sides in cases.items():
        pixels, grid = images(sides, patch_channels, args.device, dtype)
        for name, part in (("tower", tower), ("patch embedding", patch_embedding)):
            runs = {
                "theirs": lambda p=part, x=pixels, g=grid: step(p, theirs, x, g),
                "ours": lambda p=part, x=pixels, g=grid: step(p, ours, x, g),
            }
            difference = float((runs["ours"]() - runs["theirs"]()).float().abs().max())
            assert difference < (0.1 if cuda else 1e-4), difference
            found = clock(runs, args.device, args.repeat)
            key = f"{name}, {len(sides)} images of {case}"
            seconds[key] = {who: median(values) for who, values in found.items()}
            ratio[key] = seconds[key]["theirs"] / seconds[key]["ours"]
    report("vision", ratio=ratio, seconds=seconds, device=args.device, dtype=str(dtype))


if __name__ == "__main__":
    main()
