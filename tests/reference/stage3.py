"""A recorded run of rlvr.py beside the reference."""

import math
from types import SimpleNamespace

import torch

from reference import measures, method, steps
from reference.compare import (
    Player,
    as_reference,
    distinct,
    expected_rows,
    near,
    policy_weights,
    rollouts_of,
    same_metrics,
    same_prompt,
    same_rollouts,
)
from reference.models import Policy, chosen
from reference.rows import Reader


class Rlvr:
    """A run with the arguments `args`, and the algorithm's where they are None."""

    def __init__(self, args):
        flags = {"max_pixels": None, "max_side": None, **method.ALGORITHMS[args.algo]}
        flags.update({name: value for name, value in vars(args).items() if value is not None})
        self.args = SimpleNamespace(**flags)
        self.policy = Policy(args.policy, vision=not args.freeze_vision)
        self.start = Policy(args.policy) if args.kl else None  # the start policy
        self.reader = Reader(args.policy, args.data, self.args)
        self.banned = self.reader.banned(self.policy.vocabulary)
        self.order = self.reader.order(args.seed)
        weights = policy_weights(args.policy, args.freeze_vision)
        self.player = Player("policy", self.args.weight_decay, args.grad_clip, weights)
        self.surplus = []
        self.bad = set()  # rows that were left out
        self.seeds = []  # of all prompts that were sampled

    def sampled(self, found, seed):
        """A recorded group that was sampled under the policy's weights as they are, checked ->
        with verdicts, shaped rewards, advantages, and log-probs of now."""
        args = self.args
        prompt = self.reader.prompt(found["row"])
        same_prompt(found, prompt, self.policy.model.model)
        with torch.no_grad():
            log_probs = steps.sampled_from(
                self.policy, prompt, found["ids"], args.temperature, self.banned
            )
        same_rollouts(found, log_probs, seed, args, self.reader)
        group = as_reference(found, prompt)
        group.verdicts = [self.reader.verdict(text, found["row"]) for text in found["texts"]]
        near(found["verdicts"]["reward"], steps.shaped_rewards(group, args), "reward", 1e-6)
        # Of the rewards as they are rounded: where all are equal, all advantages are 0.
        group.advantage = method.reward_advantage(found["verdicts"]["reward"], args.scale_by_std)
        group.now = [chosen(rows, ids) for rows, ids in zip(log_probs, group.ids, strict=True)]
        group.old = None
        group.found = found
        return group

    def is_bad(self, row):
        return self.reader.is_bad(row) or self.reader.is_too_long(row, self.args.max_prompt)

    def collect(self, calls):
        """Check the calls of the sampler, and which groups are kept -> (to train on, the rest, all
        that was sampled)."""
        args = self.args
        prompts = args.prompts_per_draw if args.dynamic_sampling else args.prompts_per_step
        most = args.max_draws if args.dynamic_sampling else 1
        sampled = []
        kept = list(self.surplus)
        for seed, found in calls:
            assert len(kept) < args.prompts_per_step, "drawn although there were groups enough"
            rows, left_out = expected_rows(self.order, prompts, self.is_bad)
            self.bad |= left_out
            assert [one["row"] for one in found] == rows and seed[0] == args.seed
            for place, one in enumerate(found):
                self.seeds.append((*seed, place))
                sampled.append(self.sampled(one, self.seeds[-1]))
                if not args.dynamic_sampling or steps.teaches(sampled[-1]):
                    kept.append(sampled[-1])
        distinct(self.seeds)
        assert len(calls) == most or (len(calls) < most and len(kept) >= args.prompts_per_step)
        rest = kept[max(args.prompts_per_step, len(self.surplus)) :]
        return kept[: args.prompts_per_step], rest, sampled

    def update(self, groups, found, updates, rate):
        """Check the step's updates, a part of the groups each -> what is logged of them."""
        args = self.args
        off_policy = args.minibatches > 1 or any(group.old is not None for group in groups)
        for one, group in zip(found, groups, strict=True):
            assert one["row"] == group.found["row"] and one["ids"] == group.ids
            near(one["advantage"], group.advantage, "advantage")
            if off_policy:
                group.old = group.now if group.old is None else group.old
                for ours, theirs in zip(one["old_logp"], group.old, strict=True):
                    near(ours, theirs, "old log-probs", 5e-5)
        updates = list(updates)
        parts = []
        for part in range(args.minibatches):  # as even as can be, in order
            places = range(len(groups))
            mine = [groups[g] for g in places if g * args.minibatches // len(groups) == part]
            if not mine:
                continue
            update = updates.pop(0)
            self.policy.take(update["before"])
            parts.append(steps.minibatch(self.policy, mine, args, self.banned, self.start))
            gradient = self.policy.gradient()
            parts[-1].norm = method.total_norm(gradient.values())
            self.player.check(update, gradient, rate)
        assert not updates
        return parts

    def step(self, number, step):
        args = self.args
        # 1) rollouts, of the policy as it is before this step's updates
        self.policy.take(self.player.weights)
        dropped = max(0, len(self.surplus) - args.prompts_per_step)
        groups, rest, sampled = self.collect(step["calls"])
        # 2) to 4) advantage and updates
        rate = method.learning_rate(number, args.lr, args.steps, args.warmup, args.schedule)
        parts = self.update(groups, step["trained"], step["updates"], rate)
        # 5) log
        expected = of_updates(parts) if groups else {}
        expected |= {
            "loss": measures.mean([part.loss for part in parts]),
            "grad_norm": measures.mean([part.norm for part in parts]),
            "skipped": 0 if groups else 1,
            "draws": len(step["calls"]),
            "sampled": len(sampled),
            "groups": len(groups),
            "surplus": len(rest),
            "dropped": dropped,
            "lr": rate if groups else step["metrics"]["lr"],
            "left_out": len(self.bad),
            # of what was sampled; where the surplus was enough, of that
            **measures.of_rollouts([rollouts_of(group.found) for group in sampled or groups]),
        }
        same_metrics(step["metrics"], expected, {"lr": 1e-9})
        # the surplus keeps the log-probs of the policy that sampled it
        self.surplus = rest
        for group in rest:
            group.old = group.now


def of_updates(parts):
    """What is logged over all tokens of a step's updates."""
    tokens = {}
    for name in ("clipped", "ratios", "entropy", "distances", "kl"):
        tokens[name] = [value for part in parts for value in getattr(part, name)]
    return {
        "clip_frac": measures.mean(tokens["clipped"]),
        "ratio_max": max(tokens["ratios"]),
        "entropy": measures.mean(tokens["entropy"]),
        "kl": measures.mean(tokens["kl"]) if tokens["kl"] else math.nan,
        "tokens": len(tokens["entropy"]),
        "logp_diff": measures.mean(tokens["distances"]),
        "logp_diff_max": max(tokens["distances"]),
    }


def check_rlvr(trace, args):
    """All steps of a run of rlvr.py -> the policy's Player."""
    run = Rlvr(args)
    assert [step["step"] for step in trace] == list(range(1, args.steps + 1))
    for number, step in enumerate(trace):
        run.step(number, step)
    return run.player
