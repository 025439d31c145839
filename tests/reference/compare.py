"""
What is compared in every stage: numbers, gradients, AdamW's updates, rows, rollouts, what is
logged and saved. The stage computes in float32, the reference in float64; so gradients may differ
by rounding, and a draw where its uniform number lies on a bound.
"""

import json
import math
from pathlib import Path
from types import SimpleNamespace

import torch

from reference import method, steps
from reference.models import chosen, dense_weights
from reference.rows import positions

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
    """Gradients {name: tensor or None}: of each tensor the error's norm is small beside its own; a
    tensor of nothing but rounding may differ by a little of the whole gradient's norm."""
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
        self.clip = clip
        self.adam = method.AdamW(decay, clip)
        self.weights = weights
        self.updates = 0

    def check(self, update, expected_gradient, rate):
        """`update` as recorded; its gradient is compared, then its result."""
        self.updates += 1
        what = f"{self.who}, update {self.updates}"
        assert update["who"] == self.who and update["clip"] == self.clip
        assert update["before"].keys() == self.weights.keys()
        for name, before in update["before"].items():
            assert torch.equal(before, self.weights[name]), f"{what}: {name} changed before it"
        for found in update["rates"]:
            assert math.isclose(found, rate, rel_tol=1e-9), f"{what}: rate {found} beside {rate}"
        for name, decay in update["decay"].items():
            assert decay == (self.decay if update["before"][name].ndim > 1 else 0.0), name
        same_gradient(update["gradient"], expected_gradient, what)
        near(update["norm"], method.total_norm(expected_gradient.values()), "norm", 1e-4)
        assert update["skipped"] == 0
        after = self.adam.step(update["before"], update["gradient"], rate)
        for name, weight in after.items():
            near(update["after"][name], weight, f"{what}: {name} after it", 2e-6 + rate * 1e-3)
        self.weights = update["after"]


def check_prolonged(record, flags, peak):
    """A run of 3 steps and a cosine is resumed to make 5: the learning rate goes on from where it
    was, down to the new end. record(flags) -> the recorded steps."""
    flags = flags | dict(schedule="cosine", warmup=1)
    before = record(flags | dict(steps=3))
    after = record(flags | dict(steps=5, resume=True))
    rates = [step["metrics"]["lr"] / peak for step in before + after]
    near(rates, [1, 1, 0.5, 0.5 * 0.75, 0.5 * 0.25], "learning rates", 1e-6)


# ----------------------------------------------------------------------------- rows and rollouts
def expected_rows(order, count, is_bad):
    """(the next rows that are usable, those that were not)."""
    taken = []
    bad = set()
    while len(taken) < count:
        row = next(order)
        if is_bad(row):
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
    """A group's rollouts, drawn again from the reference's distributions (T, V) of each. Rewards
    are left out: stage 3 shapes them."""
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
        assert len(ids) <= flags.max_response
        assert ended or len(ids) == flags.max_response
        assert found["stops"][k] == ("end" if ended else "length")
        near(found["logps"][k], chosen(log_probs[k].detach(), ids), "sampler's log-probs", 5e-5)
        assert found["texts"][k] == reader.text(ids)
        expected = reader.verdict(found["texts"][k], found["row"])
        for name, values in found["verdicts"].items():
            if name != "reward":
                near(values[k], expected[name], name)
    assert differ <= 1


def distinct(seeds):
    """No two calls of the sampler, and no two prompts, share their random numbers."""
    assert len(set(seeds)) == len(seeds), f"the same random numbers again: {seeds}"


def as_reference(found, prompt):
    """A recorded group as the reference takes it: what was sampled, and nothing computed."""
    return SimpleNamespace(prompt=prompt, ids=found["ids"], logps=found["logps"])


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
        told = (shown["question"], shown["answer"], shown["reference"])
        assert told == (group["question"], group["answer"], group["response"])
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


def check_saved(folder, weights, prefix="", frozen=None):
    """What was saved is what the last update left; frozen: and what was never trained, as it is in
    that checkpoint."""
    saved = dense_weights(folder)
    expected = {name.removeprefix(prefix): tensor for name, tensor in weights.items()}
    if frozen:
        vision = {name: t for name, t in dense_weights(frozen).items() if is_vision(name)}
        assert vision and not vision.keys() & expected.keys(), "trained although frozen"
        expected |= vision
    assert saved.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(saved[name], tensor), name


def is_vision(name):
    """Whether it is a tensor of the vision tower, its mergers included."""
    return ".visual." in name


def policy_weights(folder, frozen=False):
    """A checkpoint's weights as the stages name them. frozen: those that are trained where the
    vision tower is not."""
    weights = {f"hf.{name}": tensor for name, tensor in dense_weights(folder).items()}
    return {name: tensor for name, tensor in weights.items() if not (frozen and is_vision(name))}
