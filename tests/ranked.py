"""A process of test_ranks.py: python ranked.py JOBS.json [PORT...] runs the jobs, each a stage
with its flags, one after the other as one of WORLD_SIZE ranks, each on a port of its own. Of a job,
<out>/probe.pt keeps the gradients of all updates, the ids of all rollouts, and the mesh that its
parameters are on."""

import json
import os
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

import align
import rlvr
import sft
from engine import optimiser, ranks
from engine.rollouts import sample_groups as plain_sample

STAGES = {"sft": sft, "align": align, "rlvr": rlvr}
close, job, gradients, rollouts, meshes = ranks.Ranks.close, {}, [], {}, set()


def sgd(model, lr, weight_decay):
    """Linear in the gradient; Adam makes a whole step of the rounding of a gradient near zero."""
    return torch.optim.SGD([(n, p) for n, p in model.named_parameters() if p.requires_grad], lr=lr)


def step_if_finite(optimizer, loss, max_norm, who):
    if job.get("fail") == [torch.distributed.get_rank(), len(gradients)]:
        print("planted at", time.time(), flush=True)
        raise ValueError("a planted error")
    named = []
    for g in optimizer.param_groups:
        named += zip(g["param_names"], g["params"], strict=True)
    meshes.update(tuple(p.device_mesh.shape) for _, p in named if hasattr(p, "device_mesh"))
    gradients.append(
        {
            n: getattr(p.grad, "full_tensor", lambda p=p: p.grad)().clone()
            for n, p in named
            if p.grad is not None
        }
    )
    return optimiser.step_if_finite(optimizer, loss, max_norm, who)


def sample_groups(hf, encoder, groups, verify, args, seed):
    plain_sample(hf, encoder, groups, verify, args, seed)
    for number, group in enumerate(groups):
        rollouts[str((*seed, number))] = [r.ids for r in group.rollouts]
        if number in job.get("malformed", ()):  # cut short: none has its three parts
            for r in group.rollouts:
                r.ids = r.ids[:3]
                r.logps = r.logps[:3]
            group.texts = [encoder.decode(r.ids) for r in group.rollouts]
            for name in group.verdicts:
                group.verdicts[name] = torch.zeros(len(group.rollouts))


def keep_and_close(self):
    everywhere = dict(rollouts)  # every rank has them all
    assert all(part == rollouts for part in ranks.gather(rollouts))
    if ranks.is_main():
        found = {"gradients": gradients, "rollouts": everywhere, "meshes": list(meshes)}
        torch.save(found, Path(job["flags"]["out"], "probe.pt"))
    close(self)


if __name__ == "__main__":
    torch.set_num_threads(1)
    ranks.Ranks.close = keep_and_close
    align.sample_groups = rlvr.sample_groups = sample_groups
    for stage in STAGES.values():
        stage.step_if_finite = step_if_finite
    ports = sys.argv[2:] or [os.environ["MASTER_PORT"]]  # torchrun's
    for job, port in zip(json.loads(Path(sys.argv[1]).read_text()), ports, strict=True):
        os.environ["MASTER_PORT"] = port  # each run makes a process group of its own
        gradients, rollouts, meshes = [], {}, set()
        for stage in STAGES.values():
            stage.optimizer = sgd if job.get("sgd") else optimiser.optimizer
        STAGES[job["stage"]].main(STAGES[job["stage"]].Args(**job["flags"]))
