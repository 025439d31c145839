"""Stage 1 beside the reference: trained tokens, loss, gradient, AdamW, learning rate, log."""

from functools import partial

import pytest
from reference import compare, stage1, watch, world

import sft

COMMON = dict(device="cpu", sample_every=0, save_every=0, steps=3, batch=4, lr=1e-2, warmup=0.4)
COMMON |= dict(freeze_vision=False)
# With images so small conversations have 29 to 50 tokens, one of them 46.
SOME_TOO_LONG = dict(max_pixels=128, max_prompt=30, max_response=16)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return world.make_world(tmp_path_factory.mktemp("reference"))


@pytest.mark.parametrize(
    "data, flags",
    {
        "messages": ("messages", dict(weight_decay=0.1, grad_clip=3.0, batch=6)),
        "conversations": ("conversations", dict(schedule="constant", seed=5) | SOME_TOO_LONG),
        "vision frozen": ("messages", dict(freeze_vision=True, weight_decay=0.1)),
        "split": ("messages", dict(pack_tokens=40, steps=2, max_side=16)),
        "untied": ("conversations", dict(policy="policy", steps=2, grad_clip=0.1)),
        "sharded": ("messages", dict(offload=True, checkpointing=True, weight_decay=0.1)),
    }.items(),
    ids=lambda case: case if isinstance(case, str) else "",
)
def test_sft(files, tmp_path, data, flags):
    data, flags = flags
    flags = COMMON | flags
    flags["policy"] = getattr(files, flags.get("policy", "tied"))
    flags |= dict(data=getattr(files, data), out=str(tmp_path))
    trace = watch.record("sft", flags)
    player = stage1.check_sft(trace, sft.Args(**flags))
    frozen = flags["policy"] if flags["freeze_vision"] else None
    compare.check_saved(tmp_path / "last", player.weights, "hf.", frozen)


def test_epochs(files, tmp_path):
    """Without --steps the schedule spans so many updates as the epochs take."""
    flags = COMMON | dict(policy=files.tied, data=files.messages, out=str(tmp_path))
    flags |= dict(steps=None, epochs=1.7)
    trace = watch.record("sft", flags)
    assert len(trace) == int(11 * 1.7 / 4)
    stage1.check_sft(trace, sft.Args(**flags | dict(steps=len(trace))))


def test_prolonged(files, tmp_path):
    flags = COMMON | dict(policy=files.tied, data=files.messages, out=str(tmp_path), batch=2)
    compare.check_prolonged(partial(watch.record, "sft"), flags, flags["lr"])


def test_skipped_updates_are_logged(files, tmp_path, monkeypatch):
    """Of two updates the first is left out."""
    answers = [(7.0, 1), (8.0, 0)]
    monkeypatch.setattr(sft, "step_if_finite", lambda *_: answers.pop(0))
    flags = COMMON | dict(steps=2, policy=files.tied, data=files.messages, out=str(tmp_path))
    trace = watch.record("sft", flags)
    found = [(step["metrics"]["grad_norm"], step["metrics"]["skipped"]) for step in trace]
    assert found == [(7.0, 1), (8.0, 0)]
