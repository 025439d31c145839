"""A recorded run of align.py beside the reference: the upcycled discriminator, the warm-up, the
game."""

import math
from types import SimpleNamespace

import torch

from reference import measures, method, steps
from reference.compare import (
    Player,
    as_reference,
    distinct,
    expected_rows,
    is_vision,
    near,
    policy_weights,
    rollouts_of,
    same_metrics,
    same_prompt,
    same_rollouts,
)
from reference.models import Discriminator, Policy, dense_weights
from reference.rows import Reader


class Alignment:
    """What the warm-up and the game share.

    length_probe(prompts, reference's lengths, rollouts' lengths): as engine/health.py has it, whose
    small training is not done a second time here.
    """

    def __init__(self, args, length_probe=None):
        self.args = args
        self.length_probe = length_probe
        self.kinds = ["whole"] if args.spans == "whole" else ["perception", "reasoning"]
        vision = not args.freeze_vision
        self.policy = Policy(args.policy, vision)
        self.source = args.disc_init or args.policy
        experts = (args.experts, args.experts_per_token, len(self.kinds))
        self.disc = Discriminator(self.source, args.disc, *experts, vision)
        self.reader = Reader(args.policy, args.data, args)
        self.banned = self.reader.banned(self.policy.vocabulary)
        self.bad = set()  # rows that were left out
        self.seeds = []  # of all prompts that were sampled

    # ------------------------------------------------------------------------ rows
    def take_rows(self, reader, order, count):
        """The next rows that are usable. They are not, where an image is missing, or a prompt too
        long, or a response longer than a rollout may be; of pairs the spans are counted, each with
        its end token."""

        def is_bad(row):
            if reader.is_bad(row) or reader.is_too_long(row, self.args.max_prompt):
                return True
            texts = reader.demonstrations(row)
            lengths = [len(reader.ids(text)) + 1 for text in texts]
            if len(texts) == 2:
                lengths = [sum(map(len, reader.span_ids(text, self.kinds))) for text in texts]
            return max(lengths) > self.args.max_response

        rows, left_out = expected_rows(order, count, is_bad)
        self.bad |= left_out
        return rows

    # ------------------------------------------------------------------------ groups
    def sampled(self, found, seed):
        """Recorded groups of one call of the sampler, under the policy's weights as they are now,
        each checked -> with the spans that the reference finds."""
        assert seed[0] == self.args.seed
        groups = []
        for place, one in enumerate(found):
            self.seeds.append((*seed, place))
            prompt = self.reader.prompt(one["row"])
            same_prompt(one, prompt, self.policy.model.model)
            with torch.no_grad():
                log_probs = steps.sampled_from(
                    self.policy, prompt, one["ids"], self.args.temperature, self.banned
                )
            same_rollouts(one, log_probs, self.seeds[-1], self.args, self.reader)
            verdicts = [self.reader.verdict(text, one["row"]) for text in one["texts"]]
            near(one["verdicts"]["reward"], [v["reward"] for v in verdicts], "canary's reward")
            groups.append(self.with_spans(one))
        distinct(self.seeds)
        return groups

    def with_spans(self, found):
        """A recorded group, with the prompt that the discriminator sees."""
        group = as_reference(found, self.reader.prompt(found["row"], self.args.disc_blind))
        group.reference = self.reader.span_ids(self.reader.reference(found["row"]), self.kinds)
        texts = [self.reader.text(ids) for ids in found["ids"]]
        group.spans = [self.reader.span_ids(text, self.kinds) for text in texts]
        same_spans(found, group)
        return group

    def pairs(self, found, reader):
        """Recorded groups of rows of --pairs."""
        groups = []
        for one in found:
            teacher, student = reader.demonstrations(one["row"])
            group = SimpleNamespace(prompt=reader.prompt(one["row"], self.args.disc_blind))
            group.reference = reader.span_ids(teacher, self.kinds)
            group.spans = [reader.span_ids(student, self.kinds)]
            same_spans(one, group)
            groups.append(group)
        return groups

    # ------------------------------------------------------------------------ the discriminator
    def update_disc(self, disc, update, found, groups, rate, is_last=True):
        """Check the discriminator's pass over groups and its update -> what is logged of it. The
        scores of the last pass of a step are kept."""
        self.disc.take(update["before"])
        loss, routed = steps.discriminate(self.disc, groups, self.kinds, self.args)
        if loss is not None:
            loss.backward()
        gradient = self.disc.gradient()
        if is_last:
            for one, group in zip(found, groups, strict=True):
                same_scores(one, group)
        disc.check(update, gradient, rate)
        measured = steps.discriminator_measures(groups, self.kinds, routed, self.args)
        loss = math.nan if loss is None else float(loss.detach())
        return loss, method.total_norm(gradient.values()), measured

    def probes(self, groups):
        """What the probes find. The token at which scores are read is the same on both sides, so
        that it says nothing: half is chance."""
        found = {}
        for k, kind in enumerate(self.kinds):
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
                found[f"{kind}/length_probe"] = self.length_probe(prompts, *lengths)
        return found

    def canary(self, found, groups):
        """Whether the spans' scores put right rollouts above wrong ones."""
        values = {}
        for k, kind in enumerate(self.kinds):
            scored = []
            for one, group in zip(found, groups, strict=True):
                both = zip(group.score[k], one["verdicts"]["accuracy"], group.spans, strict=True)
                scored.append([(float(s), a) for s, a, spans in both if spans is not None])
            share, pairs = measures.right_above_wrong(scored)
            values |= {f"{kind}/auc": share, f"{kind}/auc_pairs": pairs}
        return values

    def same_metrics(self, found, expected):
        tolerances = {"lr": 1e-9}
        tolerances |= {f"{kind}/length_corr": 1e-3 for kind in self.kinds}
        same_metrics(found, expected, tolerances)


def same_spans(found, group):
    assert found["seen"] == group.prompt.ids
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
        score_of = {tuple(group.reference[kind]): group.reference_score[kind]}
        for spans, score in zip(group.spans, scores, strict=True):
            if spans is not None:
                assert score_of.setdefault(tuple(spans[kind]), score) == score


# ----------------------------------------------------------------------------- upcycling
def check_upcycled(weights, args):
    """A discriminator before its first update: its source's weights, whose MLPs are copied for each
    expert, with noise of its own; a router and a head of small random numbers."""
    run = Alignment(args)
    experts = {"moe": args.experts, "experts": len(run.kinds), "dense": 0}[args.disc]
    rest = dict(weights)
    source = dense_weights(run.source)
    for name, tensor in source.items():
        if is_vision(name) and args.freeze_vision:
            continue
        in_expert = ".mlp." in name and not is_vision(name) and experts
        if name != "lm_head.weight" and not in_expert:
            assert torch.equal(rest.pop(name), tensor), name
    noise = []
    for layer in range(len(run.disc.mixtures)):
        mlp = f"model.language_model.layers.{layer}.mlp"
        gate, up, down = (source[f"{mlp}.{part}_proj.weight"] for part in ("gate", "up", "down"))
        dense = {"gate_up": torch.cat([gate.T, up.T], 1), "down": down.T}
        for part, tensor in dense.items():
            copies = rest.pop(f"{mlp}.experts.{part}_proj")
            assert len(copies) == experts
            noise += [((copy - tensor) / tensor.std()).flatten() for copy in copies]
        if args.disc == "moe":
            router = rest.pop(f"{mlp}.gate.weight")
            assert router.shape == (experts, len(down))
            assert 0.016 < router.std() < 0.024
    for number, one in enumerate(noise):
        assert abs(one.std() - args.upcycle_noise) < 0.1 * args.upcycle_noise
        for other in noise[:number]:
            if len(other) == len(one):
                assert abs(torch.corrcoef(torch.stack([one, other]))[0, 1]) < 0.15
    head = rest.pop("v_head.1.weight")
    assert len(head) == (experts if args.disc == "experts" else 1)
    assert 0.01 < head.std() < 0.03 and head.dtype == torch.float32
    assert not rest, f"beyond what was upcycled: {list(rest)}"


# ----------------------------------------------------------------------------- the warm-up
class WarmUp(Alignment):
    """A warm-up on rows of --pairs or on rollouts of the policy."""

    def __init__(self, args, weights, length_probe):
        super().__init__(args, length_probe)
        self.player = Player("discriminator", args.disc_weight_decay, args.grad_clip, weights)
        self.policy.take(policy_weights(args.policy, args.freeze_vision))
        self.rows = self.reader
        if args.pairs:
            self.rows = Reader(args.policy, args.pairs, args)
        held_out = max(1, len(self.rows.rows) // 10)  # the last tenth
        self.training = len(self.rows.rows) - held_out
        self.order = self.rows.order(args.seed, self.training)
        self.held_out = None  # groups
        self.best = 0.0  # held-out accuracy, of the harder kind of span
        self.stale = 0  # checks in a row without a gain

    def groups(self, found, calls):
        if self.args.pairs:
            return self.pairs(found, self.rows)
        return self.sampled(found, calls.pop(0)[0])

    def step(self, number, step, last, check):
        args = self.args
        calls = list(step["calls"])
        if number == 0 and not args.pairs:  # the held-out pairs are sampled first, and once
            seed, found = calls.pop(0)
            rows = range(self.training, len(self.rows.rows))
            assert [one["row"] for one in found] == [r for r in rows if not self.rows.is_bad(r)]
            self.held_out = self.sampled(found, seed)
        # 1) pairs
        of_row = len(self.kinds) * (1 if args.pairs else args.group_size)
        rows = self.take_rows(self.rows, self.order, args.warmup_pairs // of_row)
        assert max(rows) < self.training, "trained on a row that is held out"
        (found, trained), *tests = step["passes"]
        assert trained and [one["row"] for one in found] == rows
        groups = self.groups(found, calls)
        assert not calls
        # 2) update
        rate = method.learning_rate(number, args.warmup_lr, args.warmup_steps, 0.1, "cosine")
        (update,) = step["updates"]
        loss, norm, expected = self.update_disc(self.player, update, found, groups, rate)
        expected |= {"loss": loss, "grad_norm": norm, "skipped": 0, "left_out": len(self.bad)}
        # 3) held-out pairs, now and then
        if last or check:
            ((found, trained),) = tests
            assert not trained
            expected |= self.check_held_out(found)
        else:
            assert not tests
        self.same_metrics(step["metrics"], expected)

    def check_held_out(self, found):
        """Pair accuracy under the weights after the update."""
        assert min(one["row"] for one in found) >= self.training
        if self.args.pairs:
            self.held_out = self.pairs(found, self.rows)
        self.disc.take(self.player.weights)
        with torch.no_grad():
            steps.discriminate(self.disc, self.held_out, self.kinds, self.args)
        for one, group in zip(found, self.held_out, strict=True):
            same_scores(one, group)
        measured = steps.discriminator_measures(self.held_out, self.kinds, [], self.args)
        accuracy = {f"{kind}/held_out": measured[f"{kind}/acc"] for kind in self.kinds}
        harder = min(accuracy.values())
        self.stale = 0 if harder > self.best + 0.005 else self.stale + 1
        self.best = max(self.best, harder)
        return {**accuracy, **self.probes(self.held_out)}


def check_warm_up(trace, args, weights, length_probe, check_every=20, no_gain=5):
    """The steps of a warm-up from these weights of the discriminator -> its Player. It ends early
    once held-out pairs of every kind of span are told apart, or after `no_gain` checks in a row
    without a gain."""
    run = WarmUp(args, weights, length_probe)
    ended = False
    for number, step in enumerate(trace):
        assert step["step"] == number + 1 and not ended
        last = number + 1 == args.warmup_steps
        run.step(number, step, last, (number + 1) % check_every == 0)
        ended = last or run.best >= args.warmup_until or run.stale >= no_gain
    assert ended
    return run.player


# ----------------------------------------------------------------------------- the game
def check_game(trace, args, disc_weights, weights, length_probe):
    """All steps of a game, from these weights of the two players -> (policy, discriminator)."""
    run = Alignment(args, length_probe)
    policy = Player("policy", args.weight_decay, args.grad_clip, weights)
    disc = Player("discriminator", args.disc_weight_decay, args.grad_clip, disc_weights)
    span_weights = [1.0] if args.spans == "whole" else [args.alpha, 1 - args.alpha]
    order = run.reader.order(args.seed)
    assert [step["step"] for step in trace] == list(range(1, args.steps + 1))
    for number, step in enumerate(trace):
        *disc_updates, policy_update = step["updates"]
        assert len(disc_updates) == args.disc_updates
        # 1) rollouts, of the policy as it is before this step's update
        rows = run.take_rows(run.reader, order, args.prompts_per_step)
        ((seed, found),) = step["calls"]
        assert [one["row"] for one in found] == rows
        run.policy.take(policy_update["before"])
        groups = run.sampled(found, seed)
        # 2) score, and 3) the discriminator's update
        for disc_update in disc_updates:
            is_last = disc_update is disc_updates[-1]
            disc_loss, disc_norm, expected = run.update_disc(
                disc, disc_update, found, groups, args.disc_lr, is_last
            )
        if args.probe_every and number % args.probe_every == 0:
            expected |= run.probes(groups)
        # 4) advantage
        steps.alignment_advantages(groups, span_weights, args)
        for one, group in zip(found, groups, strict=True):
            near(one["advantage"], group.advantage, "advantage")
            group.advantage = one["advantage"].tolist()  # its rounding is not the loss's
        # 5) the policy's update
        for row, group in zip(rows, groups, strict=True):
            group.prompt = run.reader.prompt(row)
        expected |= steps.align_policy(run.policy, groups, args, run.banned)
        gradient = run.policy.gradient()
        rate = method.learning_rate(number, args.lr, args.steps, args.warmup, args.schedule)
        policy.check(policy_update, gradient, rate)
        # 6) log
        expected |= measures.of_rollouts([rollouts_of(one) for one in found])
        expected |= run.canary(found, groups)
        expected |= {
            "grad_norm": method.total_norm(gradient.values()),
            "skipped": 0,
            "lr": rate,
            "left_out": len(run.bad),
            "disc_loss": disc_loss,
            "disc_grad_norm": disc_norm,
            "disc_skipped": 0,
        }
        run.same_metrics(step["metrics"], expected)
    return policy, disc
