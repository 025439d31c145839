"""
Claim: on a GPU packs, sampler, log-probs and a whole alignment step compute what they compute on a CPU.

    python bench/check.py --device cuda         # float32 against the CPU, then a step of each stage in bfloat16
"""

import argparse
import contextlib
import copy
import json
import sys
import tempfile
from pathlib import Path

import torch
from measure import ROOT, lengths, model, prompt, report

import align
import rlvr
from engine.logprob import token_logps
from engine.packs import Tree, adopt, make, plan, run
from engine.sampler import generate
from tools.init import init


def forward(hf, trees, device):
    found = []
    for part in plan(trees, 600):
        pack = make(trees, part, device)
        hidden = run(hf.model, pack)[pack.source]
        logp = token_logps(
            hidden,
            hf.lm_head.weight,
            pack.target,
            0.9,
            (3, 4),
            coefficient=torch.ones_like(hidden[:, 0]),
        )
        logp.sum().backward()
        found.append(logp.detach().cpu())
    return torch.cat(found), {
        k: p.grad.cpu() for k, p in hf.named_parameters() if p.grad is not None
    }


def stages(device, folder):
    """Two alignment steps and two GRPO steps of a tiny model from random weights, sharded, in bfloat16."""
    rows, text = [], "<caption> red </caption> <think> one </think> <answer> 1 </answer>"
    for i in range(24):
        rows.append(
            {
                "prompt": [{"role": "user", "content": f"how many {i} ?"}],
                "images": [],
                "teacher_response": text,
                "reward_model": {"ground_truth": "1"},
            }
        )
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    init(ROOT / "runs/tiny.json", folder / "init", [folder / "rows.jsonl"])
    flags = dict(
        policy=str(folder / "init"),
        data=str(folder / "rows.jsonl"),
        device=device,
        group_size=4,
        max_response=24,
        steps=2,
        prompts_per_step=2,
        dtype="bfloat16" if device != "cpu" else "float32",
        save_every=0,
    )
    align.main(align.Args(out=str(folder / "align"), warmup_steps=1, warmup_pairs=16, **flags))
    rlvr.main(rlvr.Args(out=str(folder / "rlvr"), **flags))
    logs = [
        json.loads((folder / stage / "log.jsonl").read_text().splitlines()[-1])
        for stage in ("align", "rlvr")
    ]
    return {stage: log["logp_diff"] for stage, log in zip(("align", "rlvr"), logs, strict=True)}


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--device", default="cuda")
    device = parser.parse_args().device
    torch.backends.cuda.matmul.allow_tf32 = False
    here = model("small").float()
    adopt(here.model)
    there = copy.deepcopy(here).to(device)
    random = torch.Generator().manual_seed(0)
    trees = [
        Tree(
            prompt(here, 20, 8, s),
            [torch.randint(3, 4000, (n,), generator=random).tolist() for n in lengths(6, 30, s)],
        )
        for s in range(4)
    ]
    (a, a_grads), (b, b_grads) = forward(here, trees, "cpu"), forward(there, trees, device)
    logps = float((a - b).abs().max())
    grads = max(
        float((a_grads[k] - g).norm() / (a_grads[k].norm() + 1e-9)) for k, g in b_grads.items()
    )
    prompts = [tree.prompt for tree in trees]
    mine, theirs = (generate(m, prompts, 4, 60, eos=(9, 10, 11), slots=6) for m in (here, there))
    same = (
        sum(
            x.ids == y.ids
            for g, h in zip(mine, theirs, strict=True)
            for x, y in zip(g, h, strict=True)
        )
        / 16
    )
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(sys.stderr):
        steps = stages(device, Path(folder))
    differences = {"logp": logps, "gradient, relative": grads, "logp_diff in bfloat16": steps}
    report("check", differences=differences, same_rollouts=same, device=device)
    assert logps < 1e-3 and grads < 1e-2 and same > 0.9, "the GPU computes something else"
