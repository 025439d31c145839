"""
A run of a real stage, recorded: what it sampled, what it gave to its updates, the weights and
gradients of each update, and its log. It hooks in at names of the stages and computes nothing.
"""

import copy

import torch

import align
import rlvr
import sft
from engine.log import Log

STAGES = {"sft": sft, "align": align, "rlvr": rlvr}


def whole(tensor):
    """A copy of a tensor, put together where it is sharded. All ranks call it."""
    if tensor is None:
        return None
    tensor = tensor.detach()
    if hasattr(tensor, "full_tensor"):
        tensor = tensor.full_tensor()
    return tensor.clone().cpu()


def plain(group):
    """All that a Group holds as plain values."""
    prompt = group.prompt
    kept = {
        "id": id(group),
        "row": prompt.example.row,
        "question": prompt.example.messages[-1]["content"],
        "answer": prompt.example.answer,
        "response": prompt.example.response,
        "prompt": prompt.ids.tolist(),
        "positions": prompt.positions.clone(),
        "pixels": prompt.images["pixel_values"].clone() if prompt.images else None,
        "seen": group.seen.ids.tolist() if group.seen is not None else None,
        "ids": [list(rollout.ids) for rollout in group.rollouts],
        "logps": [list(rollout.logps) for rollout in group.rollouts],
        "stops": [rollout.stop for rollout in group.rollouts],
        "verdicts": {name: values.tolist() for name, values in group.verdicts.items()},
    }
    for name in ("texts", "advantage", "old_logp", "reference", "spans", "well_formed"):
        kept[name] = copy.deepcopy(getattr(group, name))
    for name in ("reference_score", "score"):
        kept[name] = copy.deepcopy(getattr(group, name))
    return kept


class Watch:
    """
    with Watch("align") as watch:
        align.main(args)
    watch.steps         # of each record of the log: metrics, calls, passes, trained, updates
    """

    def __init__(self, stage):
        self.stage = STAGES[stage]
        self.steps = []
        self.saved = []
        self.clear()

    def clear(self):
        self.calls = []  # of the sampler: (seed, groups)
        self.passes = []  # of the discriminator: (groups, whether it is trained)
        self.trained = []  # groups of the policy's update
        self.updates = []

    def replace(self, owner, name, make):
        original = getattr(owner, name)
        self.saved.append((owner, name, original))
        setattr(owner, name, make(original))

    def __enter__(self):
        self.replace(self.stage, "step_if_finite", self.watch_update)
        self.replace(Log, "step", self.watch_log)
        if hasattr(self.stage, "sample_groups"):
            self.replace(self.stage, "sample_groups", self.watch_sampler)
            self.replace(self.stage, "update_policy", self.watch_policy)
        if hasattr(self.stage, "discriminator_pass"):
            self.replace(self.stage, "discriminator_pass", self.watch_pass)
        return self

    def __exit__(self, *_):
        for owner, name, original in reversed(self.saved):
            setattr(owner, name, original)

    def watch_update(self, original):
        def step_if_finite(optimizer, loss, max_norm, who):
            named = {}
            decay = {}
            for group in optimizer.param_groups:
                for name, parameter in zip(group["param_names"], group["params"], strict=True):
                    named[name] = parameter
                    decay[name] = group["weight_decay"]
            update = {
                "who": who,
                "loss": float(loss),
                "rates": [group["lr"] for group in optimizer.param_groups],
                "decay": decay,
                "clip": max_norm,
                "before": {name: whole(parameter) for name, parameter in named.items()},
                "gradient": {name: whole(parameter.grad) for name, parameter in named.items()},
            }
            norm, skipped = original(optimizer, loss, max_norm, who)
            update["after"] = {name: whole(parameter) for name, parameter in named.items()}
            update |= {"norm": norm, "skipped": skipped}
            self.updates.append(update)
            return norm, skipped

        return step_if_finite

    def watch_sampler(self, original):
        def sample_groups(hf, encoder, groups, verify, args, seed):
            original(hf, encoder, groups, verify, args, seed)
            self.calls.append((tuple(seed), list(groups)))

        return sample_groups

    def watch_policy(self, original):
        def update_policy(policy, opt, groups, *args, **kwargs):
            self.trained = list(groups)
            return original(policy, opt, groups, *args, **kwargs)

        return update_policy

    def watch_pass(self, original):
        def discriminator_pass(disc, groups, args, device, train=True):
            found = original(disc, groups, args, device, train)
            self.passes.append((list(groups), train))
            return found

        return discriminator_pass

    def watch_log(self, original):
        def step(log, number, metrics):
            original(log, number, metrics)
            self.steps.append(
                {
                    "step": number,
                    "metrics": dict(metrics),
                    "calls": [(seed, list(map(plain, groups))) for seed, groups in self.calls],
                    "passes": [(list(map(plain, groups)), train) for groups, train in self.passes],
                    "trained": list(map(plain, self.trained)),
                    "updates": self.updates,
                }
            )
            self.clear()

        return step


def record(stage, flags):
    """Run a stage with these flags -> what was recorded of its steps, warm-up first."""
    torch.manual_seed(12345)  # nothing may depend on it
    module = STAGES[stage]
    try:
        with Watch(stage) as watch:
            module.main(module.Args(**flags))
    finally:
        if torch.distributed.is_initialized():  # an error leaves it behind
            torch.distributed.destroy_process_group()
    return watch.steps
