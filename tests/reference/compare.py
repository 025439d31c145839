"""
A recorded run beside the reference: each number of each step. The stage computes in float32, the
reference in float64; so gradients may differ by rounding, and a draw where its uniform number lies
on a bound.
"""

import math
from itertools import islice
from types import SimpleNamespace

import numpy as np
import torch

from reference import measures, method, steps
from reference.models import Discriminator, Policy, chosen, dense_weights
from reference.rows import Reader, positions

NOT_COMPARED = {"seconds"}
ON_A_BOUND = 2e-5  # of a uniform number from the nearest bound of the cumulative distribution


# ----------------------------------------------------------------------------- numbers
def near(found, expected, what, tolerance=2e-5):
    """Numbers, lists of them or tensors; None and NaN only beside NaN."""
    found = torch.as_tensor(_filled(found), dtype=torch.float64)
    expected = torch.as_tensor(_filled(expected), dtype=torch.float64)
    assert found.shape == expected.shape, f"{what}: {found.shape} beside {expected.shape}"
    torch.testing.assert_close(
        found,
        expected,
        rtol=tolerance,
        atol=tolerance,
        equal_nan=True,
        msg=lambda text: f"{what}: {found} beside {expected}\n{text}",
    )


def _filled(values):
    if isinstance(values, list):
        return [_filled(value) for value in values]
    return math.nan if values is None else values


def same_gradient(found, expected, who, tolerance=3e-4):
    """Gradients {name: tensor or None}: of each tensor the error's norm, beside the tensor's own and
    a ten-thousandth of the largest tensor's share."""
    assert found.keys() == expected.keys()
    whole = method.total_norm(expected.values())
    for name, theirs in expected.items():
        ours = found[name]
        theirs = torch.zeros(()) if theirs is None else theirs
        ours = torch.zeros(()) if ours is None else ours
        error = float((ours.double() - theirs).norm())
        allowed = tolerance * float(theirs.norm()) + 3e-6 * whole + 1e-12
        assert error <= allowed, (
            f"{who}: the gradient of {name} is {error} off, its norm is {float(theirs.norm())}"
        )


def same_metrics(found, expected, tolerances=()):
    """Every logged number; none that the reference does not know."""
    tolerances = dict(tolerances)
    keys = set(found) - NOT_COMPARED
    assert keys == set(expected), f"logged and expected differ in {sorted(keys ^ set(expected))}"
    for name in keys:
        near(found[name], expected[name], f"metric {name}", tolerances.get(name, 1e-4))


# ----------------------------------------------------------------------------- the optimisers
class Player:
    """A player's weights through all updates: they begin as the checkpoint's, each update is
    AdamW's, and nothing changes them in between."""

    def __init__(self, who, decay, clip, weights):
        self.who = who
        self.decay = decay
        self.adam = method.AdamW(decay, clip)
        self.weights = weights

    def check(self, update, expected_gradient, rate):
        """`update` as recorded; its gradient is compared, then its result."""
        what = f"{self.who}, update {self.adam.updates}"
        assert update["who"] == self.who
        for name, before in update["before"].items():
            assert torch.equal(before, self.weights[name]), f"{what}: {name} changed before it"
        assert set(update["rates"]) == {update["rates"][0]}
        assert update["rates"][0] == np.float64(rate) or math.isclose(
            update["rates"][0], rate, rel_tol=1e-9
        ), f"{what}: learning rate {update['rates'][0]} beside {rate}"
        for name, decay in update["decay"].items():
            assert decay == (self.decay if update["before"][name].ndim > 1 else 0.0), name
        same_gradient(update["gradient"], expected_gradient, what)
        near(update["norm"], method.total_norm(expected_gradient.values()), "norm", 1e-4)
        assert update["skipped"] == 0
        after = self.adam.step(update["before"], update["gradient"], rate)
        for name, weight in after.items():
            near(update["after"][name], weight, f"{what}: {name} after it", 2e-6 + rate * 1e-3)
        self.weights = update["after"]


# ----------------------------------------------------------------------------- rows and rollouts
def expected_rows(reader, order, count, is_bad=None):
    """The next rows that are usable, and how many were not."""
    taken = []
    bad = set()
    while len(taken) < count:
        row = next(order)
        if (is_bad or reader.is_bad)(row):
            bad.add(row)
        else:
            taken.append(row)
    return taken, bad


def same_prompt(found, prompt, model):
    assert found["prompt"] == prompt.ids
    assert torch.equal(found["positions"], positions(model, prompt))
    if prompt.pixels is None:
        assert found["pixels"] is None
    else:
        assert torch.equal(found["pixels"], prompt.pixels)


def same_rollouts(found, log_probs, seed, flags, reader):
    """A group's rollouts, drawn again from the reference's distributions (T, V) of each."""
    assert len(found["ids"]) == flags.group_size
    differ = 0
    for k, ids in enumerate(found["ids"]):
        drawn = steps.redraw(log_probs[k], seed, k, flags.max_response)
        for place, (i, distance) in enumerate(drawn):
            what = f"token {place} of rollout {k}: {ids[place]}, drawn again {i}"
            assert i == ids[place] or distance < ON_A_BOUND, what
            differ += i != ids[place]
        ended = ids[-1] == reader.end
        assert reader.end not in ids[:-1]
        assert ended or len(ids) == flags.max_response
        assert found["stops"][k] == ("end" if ended else "length")
        near(found["logps"][k], chosen(log_probs[k].detach(), ids), "sampler's log-probs", 5e-5)
        assert found["texts"][k] == reader.text(ids)
        expected = reader.verdict(found["texts"][k], found["row"])
        for name, values in found["verdicts"].items():
            if name != "reward":  # stage 3 shapes it
                near(values[k], expected[name], name)
    assert differ <= 1


def distinct(seeds):
    """No two calls of the sampler, and no two prompts, share their random numbers."""
    assert len(set(seeds)) == len(seeds), f"the same random numbers again: {seeds}"


def as_reference(found, prompt):
    """A recorded group as the reference takes it: what was sampled, and nothing computed."""
    return SimpleNamespace(prompt=prompt, ids=found["ids"], logps=found["logps"])


# ----------------------------------------------------------------------------- stage 1
def check_sft(trace, args):
    """All steps of a run of sft.py with the arguments `args`."""
    reader = Reader(args.policy, args.data, args.max_pixels)
    policy = Policy(args.policy)
    weights = {f"hf.{name}": tensor for name, tensor in dense_weights(args.policy).items()}
    player = Player("policy", args.weight_decay, args.grad_clip, weights)
    order = reader.order(args.seed)
    bad = set()
    assert [step["step"] for step in trace] == list(range(1, args.steps + 1))
    for number, step in enumerate(trace):
        rows, left_out = expected_rows(reader, order, args.batch)
        bad |= left_out
        (update,) = step["updates"]
        policy.take(update["before"])
        loss, tokens = steps.sft(policy, [reader.conversation(row) for row in rows])
        rate = method.learning_rate(number, args.lr, args.steps, args.warmup, args.schedule)
        gradient = policy.gradient()
        player.check(update, gradient, rate)
        same_metrics(
            step["metrics"],
            {
                "loss": loss,
                "tokens": tokens,
                "grad_norm": method.total_norm(gradient.values()),
                "lr": rate,
                "skipped": 0,
                "epoch": (number + 1) * args.batch / len(reader.rows),
                "left_out": len(bad),
            },
            {"lr": 1e-9},
        )
    return player


# ----------------------------------------------------------------------------- stage 2
class Alignment:
    """What stays the same over a run of align.py."""

    def __init__(self, args):
        self.args = args
        self.kinds = ["whole"] if args.spans == "whole" else ["perception", "reasoning"]
        self.weights = [1.0] if args.spans == "whole" else [args.alpha, 1 - args.alpha]
        self.policy = Policy(args.policy)
        self.source = args.disc_init or args.policy
        self.disc = Discriminator(
            self.source, args.disc, args.experts, args.experts_per_token, len(self.kinds)
        )
        self.reader = Reader(args.policy, args.data, args.max_pixels)
        self.banned = self.reader.banned(self.policy.vocabulary)

    def too_long(self, row):
        """Bad rows, and those whose reference is longer than a rollout may be."""
        if self.reader.is_bad(row):
            return True
        return len(self.reader.ids(self.reader.reference(row))) + 1 > self.args.max_response

    def sampled(self, found, seed):
        """A recorded group that was sampled under the policy's weights as they are, checked."""
        prompt = self.reader.prompt(found["row"])
        same_prompt(found, prompt, self.policy.model)
        with torch.no_grad():
            log_probs = steps.sampled_from(
                self.policy, prompt, found["ids"], self.args.temperature, self.banned
            )
        same_rollouts(found, log_probs, seed, self.args, self.reader)
        return as_reference(found, prompt)

    def group(self, found, prompt):
        """A recorded group with the spans that the reference finds, for the discriminator."""
        row = found["row"]
        group = as_reference(found, self.reader.prompt(row, self.args.disc_blind))
        assert found["seen"] == group.prompt.ids
        group.reference = self.reader.span_ids(self.reader.reference(row), self.kinds)
        texts = [self.reader.text(ids) for ids in found["ids"]]
        group.spans = [self.reader.span_ids(text, self.kinds) for text in texts]
        same_spans(found, group)
        return group


def same_spans(found, group):
    assert found["reference"] == group.reference
    assert found["spans"] == group.spans
    assert found["well_formed"].tolist() == [spans is not None for spans in group.spans]


def same_scores(found, group):
    near(found["reference_score"].tolist(), group.reference_score, "reference's scores", 5e-5)
    near(found["score"].tolist(), group.score, "rollouts' scores", 5e-5)


def probes(groups, kinds, length_probe):
    """What the probes find: the last token is the same on both sides, so that half is chance."""
    found = {}
    for k, kind in enumerate(kinds):
        prompts, theirs, ours = [], [], []
        for group in groups:
            for spans in group.spans:
                if spans is not None:
                    prompts.append(group.prompt.ids)
                    theirs.append(len(group.reference[k]))
                    ours.append(len(spans[k]))
        if prompts:
            several = len({tuple(ids) for ids in prompts}) > 1
            found[f"{kind}/leak"] = 0.5 if several else math.nan
            lengths = torch.tensor(theirs), torch.tensor(ours)
            found[f"{kind}/length_probe"] = length_probe(prompts, *lengths)
    return found


def check_game(trace, args, disc_weights, policy_weights, length_probe):
    """All steps of a game with the arguments `args`, from these weights of both players."""
    run = Alignment(args)
    policy = Player("policy", args.weight_decay, args.grad_clip, policy_weights)
    disc = Player("discriminator", args.disc_weight_decay, args.grad_clip, disc_weights)
    order = run.reader.order(args.seed)
    bad = set()
    seeds = []
    assert [step["step"] for step in trace] == list(range(1, args.steps + 1))
    for number, step in enumerate(trace):
        rows, left_out = expected_rows(run.reader, order, args.prompts_per_step, run.too_long)
        bad |= left_out
        ((seed, found),) = step["calls"]
        assert [group["row"] for group in found] == rows
        disc_update, policy_update = step["updates"]
        # 1) rollouts, of the policy as it is before this step's update
        run.policy.take(policy_update["before"])
        groups = []
        for place, one in enumerate(found):
            seeds.append((*seed, place))
            run.sampled(one, seeds[-1])
            groups.append(run.group(one, None))
        distinct(seeds)
        # 2) and 3) scores, the discriminator's update
        run.disc.take(disc_update["before"])
        loss, routed = steps.discriminate(run.disc, groups, run.kinds, args)
        if loss is not None:
            loss.backward()
        disc_gradient = run.disc.gradient()
        for one, group in zip(found, groups, strict=True):
            same_scores(one, group)
        disc.check(disc_update, disc_gradient, args.disc_lr)
        # 4) advantage
        steps.alignment_advantages(groups, run.weights, args)
        for one, group in zip(found, groups, strict=True):
            near(one["advantage"], group.advantage, "advantage", 1e-3)
        # 5) the policy's update
        for group, one in zip(groups, found, strict=True):
            group.advantage = one["advantage"].tolist()  # compared; their rounding is not the loss's
            group.prompt = run.reader.prompt(one["row"])
        logged = steps.align_policy(run.policy, groups, args, run.banned)
        gradient = run.policy.gradient()
        rate = method.learning_rate(number, args.lr, args.steps, args.warmup, args.schedule)
        policy.check(policy_update, gradient, rate)
        # 6) log
        for group, one in zip(groups, found, strict=True):
            group.prompt = run.reader.prompt(one["row"], args.disc_blind)
        expected = {
            **logged,
            **steps.discriminator_measures(groups, run.kinds, routed, args),
            **measures.of_rollouts([rollouts_of(one) for one in found]),
            "grad_norm": method.total_norm(gradient.values()),
            "skipped": 0,
            "lr": rate,
            "left_out": len(bad),
            "disc_loss": math.nan if loss is None else float(loss),
            "disc_grad_norm": method.total_norm(disc_gradient.values()),
            "disc_skipped": 0,
        }
        if args.probe_every and number % args.probe_every == 0:
            expected |= probes(groups, run.kinds, length_probe)
        tolerances = {"lr": 1e-9}
        tolerances |= {f"{kind}/length_corr": 1e-3 for kind in run.kinds}
        same_metrics(step["metrics"], expected, tolerances)
    return policy, disc


def rollouts_of(found):
    """(reward, accuracy, format, tokens, stop) of each rollout of a recorded group, whose verdicts
    and stops are compared elsewhere."""
    verdicts = found["verdicts"]
    lengths = [len(ids) for ids in found["ids"]]
    columns = (verdicts["reward"], verdicts["accuracy"], verdicts["format"])
    return list(zip(*columns, lengths, found["stops"], strict=True))


def first(iterator, count):
    return list(islice(iterator, count))
