"""
Claim: the vision tower runs images of one size at once, and its patch embedding as the matrix product that it is.

    python bench/vision.py                      # on a CPU: many small images, few larger ones
    python bench/vision.py --device cuda        # the 4B's tower in bfloat16
"""

import argparse
import copy

import torch
from measure import clock, median, model, report

from engine.packs import adopt

parser = argparse.ArgumentParser()
parser.add_argument("--device", default="cpu")
parser.add_argument("--repeat", type=int, default=7)
args = parser.parse_args()
cuda = args.device != "cpu"
hf = model("4B" if cuda else "small", args.device, layers=1)
theirs, ours = hf.model.visual, adopt(copy.deepcopy(hf.model)).visual
dtype = next(theirs.parameters()).dtype
channels = 6 * hf.config.vision_config.patch_size**2
ratio, seconds = {}, {}


def once(run, parameters):
    out = run()
    out.float().square().mean().backward()
    for p in parameters:
        p.grad = None
    return out.detach()


sides = (
    {"one size": [32] * 16, "eight sizes": list(range(16, 48, 4)) * 2}
    if cuda
    else {"one size": [8] * 64, "eight sizes": list(range(4, 20, 2)) * 8}
)
for name, each in sides.items():
    grid = torch.tensor([[1, side, side] for side in each], device=args.device)
    pixels = torch.randn(int(grid.prod(1).sum()), channels, device=args.device, dtype=dtype)
    for part in ("tower", "patch embedding"):
        both = {}
        for who, visual in (("theirs", theirs), ("ours", ours)):
            run = (
                (lambda v=visual, g=grid, x=pixels: v(x, grid_thw=g).pooler_output)
                if part == "tower"
                else (lambda v=visual, x=pixels: v.patch_embed(x))
            )
            both[who] = lambda run=run, v=visual: once(run, v.parameters())
        difference = float((both["ours"]() - both["theirs"]()).float().abs().max())
        assert difference < (0.1 if cuda else 1e-4), difference
        found = {k: median(v) for k, v in clock(both, args.device, args.repeat).items()}
        seconds[f"{part}, {len(each)} images of {name}"] = found
        ratio[f"{part}, {len(each)} images of {name}"] = found["theirs"] / found["ours"]
report("vision", ratio=ratio, seconds=seconds, device=args.device, dtype=str(dtype))
