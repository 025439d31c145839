"""
Stage 2 beside the reference: what is sampled, spans, scores, the discriminator's loss and gradient,
advantages, the policy's loss and gradient, AdamW, learning rates, log; and the warm-up before it.
"""

from functools import partial
from math import nan

import pytest
import torch
from reference import compare, stage2, watch, world

import align
from engine import health

COMMON = dict(device="cpu", sample_every=0, save_every=0, warmup_steps=0, probe_every=0)
GAME = COMMON | dict(
    steps=2, prompts_per_step=2, group_size=4, max_response=20, lr=2e-3, disc_lr=1e-3
)
GAME |= dict(experts_per_token=3)  # of 4
# With images so small prompts have 8 to 24 tokens, one of them 18.
SOME_TOO_LONG = dict(max_pixels=128, max_prompt=18)
# Large enough to be seen in a gradient beside the Bradley-Terry loss.
TERMS = dict(score_l2=0.05, balance=0.2)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """The world, and discriminators whose experts, router and head are far from their start."""
    folder = tmp_path_factory.mktemp("reference")
    files = world.make_world(folder)
    for form in ("moe", "experts", "dense"):
        args = align.Args(policy=files.policy, data=files.align, disc=form, experts_per_token=3)
        path = str(folder / form)
        align.save_discriminator(align.load_discriminator(args), files.policy, path)
        world.strengthen_discriminator(path)
        setattr(files, form, path)
    return files


CASES = {
    "moe": dict(
        disc_path="moe",
        alpha=0.3,
        temperature=0.8,
        score_clip=0.5,
        grad_clip=0.2,
        steps=3,
        schedule="cosine",
        warmup=0.5,
        slots=3,
        sample_every=1,
        probe_every=2,
        disc_weight_decay=0.2,
        weight_decay=0.1,
    ),
    "experts": dict(
        disc="experts", disc_path="experts", normalize="sum", alpha=0.7, seed=3, max_side=16
    ),
    "dense, blind": dict(
        disc="dense",
        disc_path="dense",
        disc_blind=True,
        malformed="drop",
        std_floor=1.0,
        probe_every=1,
    ),
    "vision frozen": dict(disc="dense", disc_path="dense", freeze_vision=True, steps=1),
    "whole": dict(
        disc_path="moe", spans="whole", malformed_penalty=0.5, sample_every=1, **SOME_TOO_LONG
    ),
    "split": dict(disc_path="moe", pack_tokens=70, alpha=0.2, prompts_per_step=3, disc_updates=2),
    "top 1 of 3": dict(
        experts=3, experts_per_token=1, upcycle_noise=0.3, steps=1, disc_init="other"
    ),
    "sharded": dict(disc_path="moe", offload=True, checkpointing=True, temperature=0.7),
    "nothing well-formed": dict(temperature=4.0, prompts_per_step=1),
}


def complete(flags, files, out):
    """Flags of a stage, with the names of the world's folders in place."""
    flags = TERMS | flags | dict(policy=files.policy, data=files.align, out=str(out))
    for name in ("disc_path", "disc_init", "pairs"):
        if name in flags:
            flags[name] = getattr(files, flags[name])
    return flags


@pytest.mark.parametrize("case", CASES)
def test_game(files, tmp_path, case):
    flags = complete(GAME | CASES[case], files, tmp_path)
    trace = watch.record("align", flags)
    args = align.Args(**flags)
    weights = trace[0]["updates"][0]["before"]
    frozen = args.freeze_vision
    if args.disc_path:
        compare.check_saved(args.disc_path, weights, frozen=args.disc_path if frozen else None)
    else:
        stage2.check_upcycled(weights, args)
    start = compare.policy_weights(args.policy, frozen)
    policy, disc = stage2.check_game(trace, args, weights, start, health.length_probe)
    last = tmp_path / "last"
    compare.check_saved(last, policy.weights, "hf.", args.policy if frozen else None)
    compare.check_saved(last / "discriminator", disc.weights, "", args.policy if frozen else None)
    if args.sample_every:
        kinds = ["whole"] if args.spans == "whole" else ["perception", "reasoning"]
        compare.check_shown(tmp_path, trace, kinds)
    shape = [one["well_formed"] for step in trace for one in step["trained"]]
    share = torch.cat(shape).float().mean()
    assert share == 0 if case == "nothing well-formed" else 0 < share < 1


def test_distance_to_the_sampler_is_logged(files, tmp_path, monkeypatch):
    """It is 0 but for rounding; so here a distance is planted, of either sign."""
    planted = []

    def sample_groups(hf, encoder, groups, *more, plain=align.sample_groups):
        plain(hf, encoder, groups, *more)
        for group in groups:
            for k, rollout in enumerate(group.rollouts):
                rollout.logps = [logp + 0.1 * (k - 1) for logp in rollout.logps]
                planted.extend([0.1 * abs(k - 1)] * len(rollout.ids))

    monkeypatch.setattr(align, "sample_groups", sample_groups)
    flags = GAME | dict(steps=1, disc="dense", disc_path="dense", pack_tokens=60)
    (step,) = watch.record("align", complete(flags, files, tmp_path))
    compare.near(step["metrics"]["logp_diff"], sum(planted) / len(planted), "logp_diff", 1e-4)
    compare.near(step["metrics"]["logp_diff_max"], 0.2, "logp_diff_max", 1e-4)


def test_one_of_several_updates_left_out_is_logged(files, tmp_path, monkeypatch):
    """The first of two, not the last: the policy's update is left out too."""
    calls = []

    def step_if_finite(optimizer, loss, max_norm, who, plain=align.step_if_finite):
        calls.append(who)
        if len(calls) == 1:
            return 0.0, 1
        return plain(optimizer, loss, max_norm, who)

    monkeypatch.setattr(align, "step_if_finite", step_if_finite)
    flags = GAME | dict(steps=1, disc="dense", disc_path="dense", disc_updates=2)
    (step,) = watch.record("align", complete(flags, files, tmp_path))
    assert calls == ["discriminator", "discriminator", "policy"]
    assert (step["metrics"]["disc_skipped"], step["metrics"]["skipped"]) == (1, 1)


def test_prolonged(files, tmp_path):
    flags = GAME | dict(disc="dense", disc_path="dense", prompts_per_step=1)
    flags = complete(flags, files, tmp_path)
    compare.check_prolonged(partial(watch.record, "align"), flags, flags["lr"])


WARM_UPS = {
    "rollouts": dict(
        warmup_steps=3, warmup_pairs=16, disc_weight_decay=0.3, temperature=0.8, seed=11
    ),
    "pairs": dict(
        pairs="pairs",
        warmup_steps=3,
        warmup_pairs=6,
        disc="experts",
        grad_clip=0.1,
        max_response=30,
    ),
    "told apart": dict(warmup_steps=8, warmup_pairs=16, warmup_until=0.9, seed=2),
    "pairs, some too long": dict(
        pairs="pairs", warmup_steps=1, warmup_pairs=6, disc="dense", max_response=24
    ),
    "whole": dict(
        pairs="pairs",
        warmup_steps=2,
        warmup_pairs=3,
        spans="whole",
        disc_blind=True,
        max_response=30,
    ),
}


@pytest.mark.parametrize("case", WARM_UPS)
def test_warm_up(files, tmp_path, monkeypatch, case):
    monkeypatch.setattr(align, "WARMUP_CHECK", 2)
    monkeypatch.setattr(align, "NO_GAIN", 2)
    flags = dict(warmup_only=case != "rollouts", warmup_lr=2e-3, warmup_until=1.5)
    flags = complete(GAME | dict(steps=1) | flags | WARM_UPS[case], files, tmp_path)
    trace = watch.record("align", flags)
    args = align.Args(**flags)
    warm = [step for step in trace if len(step["updates"]) == 1]
    weights = warm[0]["updates"][0]["before"]
    stage2.check_upcycled(weights, args)
    disc = stage2.check_warm_up(warm, args, weights, health.length_probe, 2, 2)
    compare.check_saved(tmp_path / "warmup/last", disc.weights)
    told_apart = [value for name, value in warm[-1]["metrics"].items() if name.endswith("held_out")]
    assert all(0 <= value <= 1 for value in told_apart) and told_apart
    assert len(warm) == {"told apart": 2}.get(case, args.warmup_steps)
    game = trace[len(warm) :]
    assert bool(game) != args.warmup_only
    if game:
        start = compare.policy_weights(args.policy)
        stage2.check_game(game, args, disc.weights, start, health.length_probe)
        calls = [seed for step in trace for seed, _ in step["calls"]]
        compare.distinct(calls)


# Held-out accuracies of perception and reasoning, a pair for each check, and what ends the warm-up.
ENDS = {
    "told apart": [(0.95, 0.5), (0.5, 0.95), (0.9, 0.95)],
    "no gain twice in a row": [(0.5, 0.6), (0.6, 0.5), (0.7, 0.6), (0.6, 0.8), (0.6, 0.7)],
    "a loss, made good in part": [(0.5, 0.6), (0.4, 0.6), (0.45, 0.6)],
    "hardly a gain": [(0.5, 0.6), (0.504, 0.6), (0.504, 0.6)],
    "no pair": [(nan, nan), (nan, nan)],
}


@pytest.mark.parametrize("ends", ENDS)
def test_what_ends_the_warm_up(files, tmp_path, monkeypatch, ends):
    """Also where it is resumed before its last check."""
    planted = list(ENDS[ends])
    kinds = ("perception", "reasoning")

    def held_out_metrics(*_):
        if len(planted) == 1 and not args.resume:
            raise InterruptedError
        return {f"{kind}/held_out": one for kind, one in zip(kinds, planted.pop(0), strict=True)}

    monkeypatch.setattr(align, "WARMUP_CHECK", 1)
    monkeypatch.setattr(align, "NO_GAIN", 2)
    monkeypatch.setattr(align, "held_out_metrics", held_out_metrics)
    flags = GAME | dict(disc="dense", warmup_steps=9, warmup_until=0.9, warmup_only=True)
    flags |= dict(pairs="pairs", warmup_pairs=2, save_every=1)
    flags = complete(flags, files, tmp_path)
    args = align.Args(**flags)
    with pytest.raises(InterruptedError):
        watch.record("align", flags)
    args = align.Args(**flags, resume=True)
    (step,) = watch.record("align", flags | dict(resume=True))
    assert not planted and step["step"] == len(ENDS[ends])


def test_head_computes_in_float32(files, tmp_path, monkeypatch):
    """Under --dtype bfloat16 the backbone's numbers are narrow; the scores are not."""
    seen = []

    def score(disc, pack, plain=align.Discriminator.forward):
        hook = disc.v_head.register_forward_hook(
            lambda head, inputs, out: seen.append((inputs[0], watch.whole(head[1].weight), out))
        )
        found = plain(disc, pack)
        hook.remove()
        return found

    monkeypatch.setattr(align.Discriminator, "forward", score)
    flags = GAME | dict(steps=1, dtype="bfloat16", disc_path="moe", prompts_per_step=1)
    watch.record("align", complete(flags, files, tmp_path))
    hidden, weight, scores = seen[0]
    assert hidden.dtype == weight.dtype == scores.dtype == torch.float32
    compare.near(scores.detach(), (hidden.double() @ weight.double().T).detach(), "scores", 1e-5)
    assert not torch.equal(scores, scores.bfloat16().float())
