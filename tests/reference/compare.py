"""
A recorded run beside the reference: each number of each step. The stage computes in float32, the
reference in float64; so gradients may differ by rounding, and a draw where its uniform number lies
on a bound.
"""

import json
import math
from pathlib import Path
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
    player = Player("policy", args.weight_decay, args.grad_clip, policy_weights(args.policy))
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

    def too_long_in(self, reader):
        """Of rows: bad ones, and those with a response longer than a rollout may be; of pairs the
        spans are counted, each with its end token."""

        def is_bad(row):
            if reader.is_bad(row):
                return True
            texts = reader.demonstrations(row)
            lengths = [len(reader.ids(text)) + 1 for text in texts]
            if len(texts) == 2:
                lengths = [sum(map(len, reader.span_ids(text, self.kinds))) for text in texts]
            return max(lengths) > self.args.max_response

        return is_bad

    def sampled(self, found, seed):
        """A recorded group that was sampled under the policy's weights as they are, checked."""
        prompt = self.reader.prompt(found["row"])
        same_prompt(found, prompt, self.policy.model.model)
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


    def pair(self, found, reader):
        """A recorded group of a row of --pairs, as the reference takes it."""
        teacher, student = reader.demonstrations(found["row"])
        prompt = reader.prompt(found["row"], self.args.disc_blind)
        assert found["seen"] == prompt.ids
        group = SimpleNamespace(prompt=prompt)
        group.reference = reader.span_ids(teacher, self.kinds)
        group.spans = [reader.span_ids(student, self.kinds)]
        same_spans(found, group)
        return group


def same_spans(found, group):
    assert found["reference"] == group.reference
    assert found["spans"] == group.spans
    assert found["well_formed"].tolist() == [spans is not None for spans in group.spans]


def same_scores(found, group):
    """Compare a group's scores; then go on with those that were found: what divides by their spread
    makes much of the last bit. The same text has the same score, to the last bit."""
    near(found["reference_score"].tolist(), group.reference_score, "reference's scores", 5e-5)
    near(found["score"].tolist(), group.score, "rollouts' scores", 5e-5)
    group.reference_score = found["reference_score"].tolist()
    for kind, scores in enumerate(found["score"].tolist()):
        group.score[kind] = [None if math.isnan(score) else score for score in scores]
        score_of = {}
        for spans, score in zip(group.spans, scores, strict=True):
            if spans is not None:
                assert score_of.setdefault(tuple(spans[kind]), score) == score


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


def check_upcycled(weights, args):
    """A discriminator before its first update: its source's weights, whose MLPs are copied for each
    expert, with noise of its own; a router and a head of small random numbers."""
    run = Alignment(args)
    source = dense_weights(run.source)
    experts = {"moe": args.experts, "experts": len(run.kinds), "dense": 0}[args.disc]
    rest = dict(weights)
    drawn = []  # noise of each expert, in units of its tensor's standard deviation
    for name, tensor in source.items():
        if name == "lm_head.weight":
            continue
        if ".mlp." not in name or ".visual." in name or not experts:
            assert torch.equal(rest.pop(name), tensor), name
    if experts:
        for layer in range(len(run.disc.mixtures)):
            mlp = f"model.language_model.layers.{layer}.mlp"
            gate, up, down = (source[f"{mlp}.{part}_proj.weight"] for part in ("gate", "up", "down"))
            for part, dense in (("gate_up", torch.cat([gate.T, up.T], 1)), ("down", down.T)):
                tensor = rest.pop(f"{mlp}.experts.{part}_proj")
                assert len(tensor) == experts
                drawn += [((expert - dense) / dense.std()).flatten() for expert in tensor]
            if args.disc == "moe":
                router = rest.pop(f"{mlp}.gate.weight")
                assert router.shape == (experts, len(down))
                assert 0.016 < router.std() < 0.024
    for one, noise in enumerate(drawn):
        assert abs(noise.std() - args.upcycle_noise) < 0.1 * args.upcycle_noise
        for other in drawn[:one]:
            if len(other) == len(noise):
                assert abs(torch.corrcoef(torch.stack([noise, other]))[0, 1]) < 0.15
    head = rest.pop("v_head.1.weight")
    assert len(head) == (experts if args.disc == "experts" else 1)
    assert 0.01 < head.std() < 0.03 and head.dtype == torch.float32
    assert not rest, f"beyond what was upcycled: {list(rest)}"


def check_warm_up(trace, args, weights, length_probe, check_every):
    """The steps of a warm-up from these weights of the discriminator, on rows of --pairs or on
    rollouts of the policy -> its Player. The trace may end early, by its own rule."""
    run = Alignment(args)
    run.policy.take(policy_weights(args.policy))
    disc = Player("discriminator", args.disc_weight_decay, args.grad_clip, weights)
    reader = Reader(args.policy, args.pairs, args.max_pixels) if args.pairs else run.reader
    held_out = max(1, len(reader.rows) // 10)  # the last tenth
    training = len(reader.rows) - held_out
    order = reader.order(args.seed, training)
    pairs_of_row = len(run.kinds) * (1 if args.pairs else args.group_size)
    rows_of_step = args.warmup_pairs // pairs_of_row
    bad = set()
    seeds = []
    tested = None
    best = 0.0

    def groups_of(found, seed=None):
        groups = []
        for place, one in enumerate(found):
            if args.pairs:
                groups.append(run.pair(one, reader))
                continue
            seeds.append((*seed, place))
            run.sampled(one, seeds[-1])
            groups.append(run.group(one, None))
        return groups

    for number, step in enumerate(trace):
        assert step["step"] == number + 1 and best < args.warmup_until
        calls = dict(enumerate(step["calls"]))
        if number == 0 and not args.pairs:  # held-out pairs are sampled first, once
            seed, found = calls.pop(0)
            expected = [row for row in range(training, len(reader.rows)) if not reader.is_bad(row)]
            assert [one["row"] for one in found] == expected
            tested = groups_of(found, seed)
        rows, left_out = expected_rows(reader, order, rows_of_step, run.too_long_in(reader))
        bad |= left_out
        (found, trained), *tests = step["passes"]
        assert trained and [one["row"] for one in found] == rows
        assert max(rows) < training, "trained on a row that is held out"
        groups = groups_of(found, None if args.pairs else calls.popitem()[1][0])
        assert not calls
        distinct(seeds)
        (update,) = step["updates"]
        run.disc.take(update["before"])
        loss, routed = steps.discriminate(run.disc, groups, run.kinds, args)
        if loss is not None:
            loss.backward()
        gradient = run.disc.gradient()
        for one, group in zip(found, groups, strict=True):
            same_scores(one, group)
        total = args.warmup_steps
        rate = method.learning_rate(number, args.warmup_lr, total, 0.1, "cosine")
        disc.check(update, gradient, rate)
        expected = {
            **steps.discriminator_measures(groups, run.kinds, routed, args),
            "loss": math.nan if loss is None else float(loss.detach()),
            "grad_norm": method.total_norm(gradient.values()),
            "skipped": 0,
            "left_out": len(bad),
        }
        if number + 1 == total or (number + 1) % check_every == 0:
            ((held, trained),) = tests
            assert not trained
            assert min(one["row"] for one in held) >= training
            if args.pairs:
                tested = groups_of(held)
            run.disc.take(disc.weights)
            with torch.no_grad():
                steps.discriminate(run.disc, tested, run.kinds, args)
            for one, group in zip(held, tested, strict=True):
                same_scores(one, group)
            measured = steps.discriminator_measures(tested, run.kinds, [], args)
            accuracies = [measured[f"{kind}/acc"] for kind in run.kinds]
            for kind, accuracy in zip(run.kinds, accuracies, strict=True):
                expected[f"{kind}/held_out"] = accuracy
            expected |= probes(tested, run.kinds, length_probe)
            best = max(best, min(accuracies))
        else:
            assert not tests
        tolerances = {f"{kind}/length_corr": 1e-3 for kind in run.kinds}
        same_metrics(step["metrics"], expected, tolerances)
    assert len(trace) == args.warmup_steps or best >= args.warmup_until
    return disc


def check_game(trace, args, disc_weights, weights, length_probe):
    """All steps of a game with the arguments `args`, from these weights of both players."""
    run = Alignment(args)
    policy = Player("policy", args.weight_decay, args.grad_clip, weights)
    disc = Player("discriminator", args.disc_weight_decay, args.grad_clip, disc_weights)
    order = run.reader.order(args.seed)
    bad = set()
    seeds = []
    assert [step["step"] for step in trace] == list(range(1, args.steps + 1))
    for number, step in enumerate(trace):
        rows, left_out = expected_rows(run.reader, order, args.prompts_per_step, run.too_long_in(run.reader))
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
            near(one["advantage"], group.advantage, "advantage")
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
            "disc_loss": math.nan if loss is None else float(loss.detach()),
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


def check_shown(folder, trace, kinds=()):
    """rollouts.jsonl of a run with --sample_every 1: of each step its first group, and what it was
    worth. kinds: of the spans that were scored."""
    lines = Path(folder, "rollouts.jsonl").read_text().splitlines()
    for line, step in zip(lines, trace, strict=True):
        shown = json.loads(line)
        group = step["trained"][0]
        assert shown["step"] == step["step"] and f":{group['row'] + 1}" in shown["where"]
        assert [one["text"] for one in shown["rollouts"]] == group["texts"]
        for k, one in enumerate(shown["rollouts"]):
            assert one["tokens"] == len(group["ids"][k]) and one["stop"] == group["stops"][k]
            near(one["advantage"], float(group["advantage"][k]), "shown advantage", 1e-4)
            expected = {name: values[k] for name, values in group["verdicts"].items()}
            for kind, scores in zip(kinds, group["score"] if kinds else [], strict=True):
                expected[kind] = float(scores[k])
            assert expected.keys() == one["scores"].keys()
            for name, value in one["scores"].items():
                near(value, expected[name], f"shown {name}", 1e-4)
        for kind, value in shown["reference_scores"].items():
            theirs = group["reference_score"][kinds.index(kind)]
            near(value, float(theirs), "shown reference score", 1e-4)
        assert len(shown["reference_scores"]) == len(kinds)


def check_saved(folder, weights, prefix=""):
    """What was saved is what the last update left."""
    saved = dense_weights(folder)
    assert saved.keys() == {name.removeprefix(prefix) for name in weights}
    for name, tensor in weights.items():
        assert torch.equal(saved[name.removeprefix(prefix)], tensor), name


# ----------------------------------------------------------------------------- stage 3
class Rlvr:
    """What stays the same over a run of rlvr.py."""

    def __init__(self, args):
        self.args = args
        self.policy = Policy(args.policy)
        self.start = None
        if args.kl:
            self.start = Policy(args.policy)
            self.start.take(policy_weights(args.policy))
        self.reader = Reader(args.policy, args.data, args.max_pixels)
        self.banned = self.reader.banned(self.policy.vocabulary)

    def sampled(self, found, seed):
        """A recorded group that was sampled under the policy's weights as they are, checked ->
        as the reference takes it, with verdicts, shaped rewards, and log-probs of now."""
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
        group.rewards = steps.shaped_rewards(group, args)
        near(found["verdicts"]["reward"], group.rewards, "reward", 1e-6)
        rounded = torch.tensor(found["verdicts"]["reward"], dtype=torch.float64).tolist()
        group.advantage = method.reward_advantage(rounded, args.scale_by_std)
        group.now = [chosen(rows, ids) for rows, ids in zip(log_probs, group.ids, strict=True)]
        group.old = None
        group.found = found
        return group


def policy_weights(folder):
    """A checkpoint's weights as the stages name them."""
    return {f"hf.{name}": tensor for name, tensor in dense_weights(folder).items()}


def check_rlvr(trace, args):
    """All steps of a run of rlvr.py with the arguments `args`, and the algorithm's where None."""
    flags = dict(method.ALGORITHMS[args.algo])
    flags.update({name: value for name, value in vars(args).items() if value is not None})
    args = SimpleNamespace(**{"max_pixels": None, **flags})
    run = Rlvr(args)
    player = Player("policy", args.weight_decay, args.grad_clip, policy_weights(args.policy))
    order = run.reader.order(args.seed)
    surplus = []
    bad = set()
    seeds = []
    wanted = args.prompts_per_step
    assert [step["step"] for step in trace] == list(range(1, args.steps + 1))
    for number, step in enumerate(trace):
        # 1) rollouts, of the policy as it is before this step's updates
        run.policy.take(player.weights)
        sampled = []
        kept = list(surplus)
        for seed, found in step["calls"]:
            assert not sampled or args.dynamic_sampling
            assert len(kept) < wanted, "drawn although there were groups enough"
            prompts = args.prompts_per_draw if args.dynamic_sampling else wanted
            rows, left_out = expected_rows(run.reader, order, prompts)
            bad |= left_out
            assert [group["row"] for group in found] == rows
            for place, one in enumerate(found):
                seeds.append((*seed, place))
                sampled.append(run.sampled(one, seeds[-1]))
                if not args.dynamic_sampling or steps.teaches(sampled[-1]):
                    kept.append(sampled[-1])
        distinct(seeds)
        draws = len(step["calls"])
        assert len(kept) >= wanted or draws == (args.max_draws if args.dynamic_sampling else 1)
        groups = kept[:wanted]
        dropped = max(0, len(surplus) - wanted)
        rest = kept[max(wanted, len(surplus)) :]
        # 2) to 4) advantage, and the updates
        off_policy = args.minibatches > 1 or any(group.old is not None for group in groups)
        for group in groups:
            if off_policy and group.old is None:
                group.old = group.now
        assert len(step["trained"]) == len(groups)
        for one, group in zip(step["trained"], groups, strict=True):
            assert one["row"] == group.found["row"] and one["ids"] == group.ids
            near(one["advantage"], group.advantage, "advantage")
            if off_policy:
                for ours, theirs in zip(one["old_logp"], group.old, strict=True):
                    near(ours, theirs, "old log-probs", 5e-5)
        rate = method.learning_rate(number, args.lr, args.steps, args.warmup, args.schedule)
        updates = iter(step["updates"])
        parts = []
        norms = []
        for part in range(args.minibatches):
            mine = [
                group
                for place, group in enumerate(groups)
                if place * args.minibatches // len(groups) == part
            ]
            if mine:
                update = next(updates)
                run.policy.take(update["before"])
                parts.append(steps.minibatch(run.policy, mine, args, run.banned, run.start))
                gradient = run.policy.gradient()
                norms.append(method.total_norm(gradient.values()))
                player.check(update, gradient, rate)
        for update in updates:  # of a part without a group: it changes nothing
            assert all(gradient is None for gradient in update["gradient"].values())
            assert all(torch.equal(player.weights[name], w) for name, w in update["after"].items())
        # 5) log
        rate = step["metrics"]["lr"] if not groups else rate
        expected = {
            "loss": measures.mean([part.loss for part in parts]),
            "grad_norm": measures.mean(norms),
            "skipped": 0 if groups else 1,
            "draws": draws,
            "sampled": len(sampled),
            "groups": len(groups),
            "surplus": len(rest),
            "dropped": dropped,
            "lr": rate,
            "left_out": len(bad),
            # of what was sampled; where the surplus was enough, of that
            **measures.of_rollouts([rollouts_of(group.found) for group in sampled or groups]),
        }
        if groups:
            tokens = {}
            for name in ("clipped", "ratios", "entropy", "distances", "kl"):
                tokens[name] = [value for part in parts for value in getattr(part, name)]
            expected |= {
                "clip_frac": measures.mean(tokens["clipped"]),
                "ratio_max": max(tokens["ratios"]),
                "entropy": measures.mean(tokens["entropy"]),
                "kl": measures.mean(tokens["kl"]),
                "tokens": len(tokens["entropy"]),
                "logp_diff": measures.mean(tokens["distances"]),
                "logp_diff_max": max(tokens["distances"]),
            }
        same_metrics(step["metrics"], expected, {"lr": 1e-9})
        # the surplus keeps the log-probs of the policy that sampled it
        surplus = rest
        for group in surplus:
            group.old = group.now
    return player
