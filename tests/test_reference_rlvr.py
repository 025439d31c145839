"""
Stage 3 beside the reference: what is sampled and kept, rewards, advantages, the log-probs of the
policy that sampled, each update's loss and gradient, AdamW, learning rate, log.
"""

from functools import partial

import pytest
from reference import compare, stage3, watch, world

import rlvr

COMMON = dict(device="cpu", sample_every=0, save_every=0)
BASE = COMMON | dict(steps=2, lr=3e-3, prompts_per_step=3, group_size=4, max_response=20)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return world.make_world(tmp_path_factory.mktemp("reference"))


DAPO = dict(algo="dapo", prompts_per_draw=4, max_draws=3, prompts_per_step=2, temperature=0.7)
CASES = {
    "grpo": dict(
        temperature=0.8, schedule="cosine", steps=3, slots=5, sample_every=1, grad_clip=0.2
    ),
    "grpo, 3 minibatches": dict(
        minibatches=3, clip_low=0.02, clip_high=0.03, dual_clip=1.05, prompts_per_step=4
    ),
    # with images so small prompts have 8 to 24 tokens, one of them 18
    "grpo, split": dict(pack_tokens=50, max_pixels=128, max_prompt=18, seed=6),
    "grpo, split, 2 minibatches": dict(
        pack_tokens=50, minibatches=2, steps=1, clip_low=0.05, seed=6
    ),
    "dapo": DAPO | dict(overlong=8, clip_low=0.02, clip_high=0.03, steps=3, seed=13),
    "dapo, surplus alone": DAPO | dict(overlong=0, prompts_per_draw=8, prompts_per_step=1, steps=4),
    "dapo, too few": DAPO
    | dict(
        overlong=5, max_draws=1, prompts_per_draw=2, minibatches=2, warmup=0.0, steps=3, seed=11
    ),
    "gspo": dict(algo="gspo", steps=3, max_side=16),
    "gspo, 2 minibatches": dict(algo="gspo", minibatches=2, clip_low=0.01, clip_high=0.02),
    "dr_grpo": dict(algo="dr_grpo", temperature=0.8),
    "dr_grpo, 2 minibatches": dict(algo="dr_grpo", minibatches=2, clip_low=0.02, kl=0.5, steps=1),
    "kl": dict(kl=0.5, minibatches=2, temperature=0.8),
    "kl, 1 minibatch": dict(kl=0.5, prompts_per_step=2, steps=2),
    "kl, vision frozen": dict(kl=0.5, prompts_per_step=2, minibatches=2, freeze_vision=True),
    "sharded": dict(offload=True, checkpointing=True, minibatches=2),
}


@pytest.mark.parametrize("case", CASES)
def test_rlvr(files, tmp_path, case):
    flags = BASE | CASES[case] | dict(policy=files.policy, data=files.rl, out=str(tmp_path))
    trace = watch.record("rlvr", flags)
    args = rlvr.Args(**flags)
    player = stage3.check_rlvr(trace, args)
    frozen = args.policy if args.freeze_vision else None
    compare.check_saved(tmp_path / "last", player.weights, "hf.", frozen)
    if args.sample_every:
        compare.check_shown(tmp_path, trace)
    if args.minibatches > 1 and case != "dapo, too few":
        assert any(step["metrics"]["clip_frac"] > 0 for step in trace)
    if args.algo == "dapo":
        assert what_happened(trace, args) >= HAPPENS[case]


def test_distance_to_the_sampler_is_logged(files, tmp_path, monkeypatch):
    """It is 0 but for rounding; so here a distance is planted, of either sign."""
    planted = []

    def sample_groups(hf, encoder, groups, *more, plain=rlvr.sample_groups):
        plain(hf, encoder, groups, *more)
        for group in groups:
            for k, rollout in enumerate(group.rollouts):
                rollout.logps = [logp + 0.1 * (k - 1) for logp in rollout.logps]
                planted.extend([0.1 * abs(k - 1)] * len(rollout.ids))

    monkeypatch.setattr(rlvr, "sample_groups", sample_groups)
    flags = BASE | dict(steps=1, minibatches=2, pack_tokens=60, lr=1e-2)
    flags |= dict(policy=files.policy, data=files.rl, out=str(tmp_path))
    (step,) = watch.record("rlvr", flags)
    compare.near(step["metrics"]["logp_diff"], sum(planted) / len(planted), "logp_diff", 1e-4)
    compare.near(step["metrics"]["logp_diff_max"], 0.2, "logp_diff_max", 1e-4)


def test_prolonged(files, tmp_path):
    flags = BASE | dict(policy=files.policy, data=files.rl, out=str(tmp_path), prompts_per_step=1)
    compare.check_prolonged(partial(watch.record, "rlvr"), flags, flags["lr"])


def test_skipped_updates_are_logged(files, tmp_path, monkeypatch):
    """Of three minibatches the first two are left out."""
    answers = [(7.0, 1), (8.0, 1), (9.0, 0)]
    monkeypatch.setattr(rlvr, "step_if_finite", lambda *_: answers.pop(0))
    flags = BASE | dict(steps=1, minibatches=3, policy=files.policy, data=files.rl)
    (step,) = watch.record("rlvr", flags | dict(out=str(tmp_path)))
    assert (step["metrics"]["grad_norm"], step["metrics"]["skipped"]) == (8.0, 2)


# What each case of DAPO is there for.
HAPPENS = {
    "dapo": {"all right", "clipped", "several draws", "surplus beside more than is needed"},
    "dapo, surplus alone": {"all right", "all wrong", "no draw", "dropped"},
    "dapo, too few": {"no group", "fewer groups than minibatches"},
}


def what_happened(trace, args):
    """Words for what came about in a run."""
    happened = set()
    surplus = 0
    for step in trace:
        metrics = step["metrics"]
        means = [mean_accuracy(group) for _, groups in step["calls"] for group in groups]
        fresh = sum(0 < mean < 1 for mean in means)
        words = {
            "all right": 1 in means,
            "all wrong": 0 in means,
            "clipped": metrics.get("clip_frac", 0) > 0,
            "several draws": metrics["draws"] > 1,
            "no draw": metrics["draws"] == 0,
            "dropped": metrics["dropped"] > 0,
            "no group": metrics["groups"] == 0,
            "fewer groups than minibatches": 0 < metrics["groups"] < args.minibatches,
            "surplus beside more than is needed": 0 < surplus and fresh >= args.prompts_per_step,
        }
        happened |= {word for word, came in words.items() if came}
        surplus = metrics["surplus"]
    return happened


def mean_accuracy(group):
    accuracy = group["verdicts"]["accuracy"]
    return sum(accuracy) / len(accuracy)
