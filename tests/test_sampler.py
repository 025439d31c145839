"""The sampler equals transformers' generate (greedy), the trainer's log-probs, and the distribution that it names."""

import numpy as np
import pytest
import torch
from conftest import EOS, IMAGE, PAD, START, STOP, VIDEO, VOCAB, plain_logits, tiny_hf, tiny_prompt
from torch.utils._python_dispatch import TorchDispatchMode

from engine.logprob import token_logps
from engine.packs import Tree, make, plan, run
from engine.sampler import BLOCK, _Slots, generate, pick, uniforms

BANNED = (PAD, START, STOP, IMAGE, VIDEO, 62, 63)


def prompts(hf):
    return [
        tiny_prompt(hf, 5, (1, 4, 4), 0),
        tiny_prompt(hf, 9, None, 1),
        tiny_prompt(hf, 3, (1, 8, 4), 2),
    ]


@pytest.mark.parametrize("slots", [1, 2, 64])
def test_greedy_equals_generate(slots):
    hf, plain = tiny_hf(), tiny_hf(packs=False)
    rollouts = generate(
        hf, prompts(hf), 1, 12, eos=(EOS,), banned=BANNED, temperature=0, slots=slots
    )
    for prompt, (rollout,) in zip(prompts(hf), rollouts, strict=True):
        image = (prompt.ids == IMAGE).int()[None]
        images = {
            "pixel_values": prompt.pixel_values,
            "image_grid_thw": prompt.grid_thw,
            "mm_token_type_ids": image,
        }
        expected = plain.generate(
            input_ids=prompt.ids[None],
            max_new_tokens=12,
            do_sample=False,
            eos_token_id=EOS,
            pad_token_id=PAD,
            suppress_tokens=list(BANNED),
            attention_mask=torch.ones_like(image),
            **(images if image.any() else {}),
        )[0, len(prompt.ids) :]
        assert rollout.ids == expected.tolist()
        assert rollout.stop == ("end" if EOS in rollout.ids else "length")


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_logps_equal_the_trainers(hf, temperature):
    ps = prompts(hf)
    rollouts = generate(hf, ps, 5, 10, eos=(EOS,), banned=BANNED, temperature=temperature, slots=4)
    trees = [Tree(p, [r.ids for r in group]) for p, group in zip(ps, rollouts, strict=True)]
    for part in plan(trees, 60):
        pack = make(trees, part)
        logps = token_logps(
            run(hf.model, pack)[pack.source], hf.lm_head.weight, pack.target, temperature, BANNED
        )
        mine = torch.tensor([x for t, c in pack.children for x in rollouts[t][c].logps])
        torch.testing.assert_close(logps, mine, atol=1e-4, rtol=0)


def test_same_ids_in_any_order_and_company(hf):
    ps = prompts(hf)
    together = generate(hf, ps, 4, 10, eos=(EOS,), banned=BANNED, seed=(7, 1), slots=5)
    alone = [
        generate(hf, [p], 4, 10, eos=(EOS,), banned=BANNED, seed=(7, 1), numbers=[i])[0]
        for i, p in enumerate(ps)
    ]
    assert [[r.ids for r in g] for g in together] == [[r.ids for r in g] for g in alone]
    other = generate(hf, ps, 4, 10, eos=(EOS,), banned=BANNED, seed=(7, 2))
    assert [[r.ids for r in g] for g in together] != [[r.ids for r in g] for g in other]


def test_stops_lengths_and_bans(hf):
    lengths = set()
    for group in generate(hf, prompts(hf), 20, 6, eos=(EOS, 5), banned=BANNED, slots=7):
        for r in group:
            assert len(r.ids) == len(r.logps) <= 6 and not set(r.ids) & set(BANNED)
            assert (r.stop == "end") == (r.ids[-1] in (EOS, 5))
            assert not {EOS, 5} & set(r.ids[:-1]) and (r.stop == "end" or len(r.ids) == 6)
            lengths.add(len(r.ids))
    assert len(lengths) > 1  # ragged, or this test shows nothing


def test_first_token_distribution(hf):
    """Frequencies of the first token over 4,000 rollouts match the model's own probabilities."""
    prompt = tiny_prompt(hf, 4, None, 3)
    ids = [
        r.ids[0] for r in generate(hf, [prompt], 4000, 1, eos=(EOS,), banned=BANNED, slots=4000)[0]
    ]
    logits = plain_logits(hf, prompt, [])[-1].index_fill(0, torch.tensor(BANNED), -torch.inf)
    p = logits.softmax(-1).detach().numpy()
    counts = np.bincount(ids, minlength=VOCAB)
    big = p * 4000 > 5
    assert ((counts - p * 4000)[big] ** 2 / (p * 4000)[big]).sum() < 2 * big.sum()


def test_pick_edges():
    logits = torch.log(torch.tensor([[0.0, 0.5, 0.0, 0.5, 0.0]])).repeat(5, 1)
    ids, logps = pick(
        logits, torch.tensor([0.0, 0.4999, 0.5, 0.9999, 1.0])
    )  # 1.0 can come of rounding
    assert ids.tolist() == [1, 1, 3, 3, 3] and torch.allclose(logps.exp(), torch.tensor(0.5))
    assert pick(logits, None)[0].tolist() in ([1] * 5, [3] * 5)


def test_uniforms_are_named_by_their_row():
    a = uniforms((1, 2), 3, 4, 5)
    assert (a == uniforms((1, 2), 3, 4, 9)[:5]).all() and (a != uniforms((1, 2), 4, 3, 5)).all()
    assert (a != uniforms((1, 2), 5, 4, 5)).all() and (
        a != uniforms((1, 2), 3, 5, 5)
    ).all()  # prompt and k both count
    assert ((0 <= a) & (a < 1)).all()


def test_empty(hf):
    hf.train()  # a rank without a prompt stays as it was: in eval mode it would no longer checkpoint its activations
    assert generate(hf, [], 4, 5, eos=(EOS,)) == [] and hf.training


@pytest.mark.parametrize("look_every", [2, 5, 100])
def test_how_often_the_host_looks_changes_nothing(hf, look_every):
    ps = prompts(hf)
    expected = generate(hf, ps, 4, 10, eos=(EOS, 5), banned=BANNED, slots=5)
    found = generate(hf, ps, 4, 10, eos=(EOS, 5), banned=BANNED, slots=5, look_every=look_every)
    assert [[(r.ids, r.stop) for r in g] for g in expected] == [
        [(r.ids, r.stop) for r in g] for g in found
    ]


@pytest.mark.parametrize("slots,pack_tokens", [(1, 10**4), (3, 10**4), (3, 20), (64, 1)])
def test_each_prompt_is_read_once(hf, monkeypatch, slots, pack_tokens):
    packs = []
    monkeypatch.setattr(
        "sampler.run", lambda model, pack, **k: (packs.append(pack), run(model, pack, **k))[1]
    )
    ps = prompts(hf)
    expected = generate(hf, ps, 5, 6, eos=(EOS,), banned=BANNED)
    packs.clear()
    found = generate(hf, ps, 5, 6, eos=(EOS,), banned=BANNED, slots=slots, pack_tokens=pack_tokens)
    assert sum(len(pack.ids) for pack in packs) == sum(len(p.ids) for p in ps)
    assert [[r.ids for r in g] for g in expected] == [[r.ids for r in g] for g in found]


class Asked(TorchDispatchMode):
    """Operations that make the host wait for the device."""

    WAIT = ("_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "equal", "item")

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(function.name())
        return function(*args, **(kwargs or {}))


def test_a_step_asks_the_host_nothing(hf, monkeypatch):
    """And makes the same operations in the same order each time: what a captured graph needs."""
    steps, step = [], _Slots.step

    def watched(self):
        with Asked() as asked:
            step(self)
        steps.append(asked.names)

    monkeypatch.setattr(_Slots, "step", watched)
    generate(hf, prompts(hf), 4, 8, eos=(EOS,), banned=BANNED)
    assert len(steps) > 3 and not [
        n for n in steps[0] for wait in Asked.WAIT if n.split("::")[1].split(".")[0] == wait
    ]
    assert all(names == steps[0] for names in steps)


def test_the_store_grows_with_the_rows(hf, monkeypatch):
    monkeypatch.setitem(BLOCK, "cpu", 4)
    sizes, advance = [], _Slots.advance
    monkeypatch.setattr(
        _Slots, "advance", lambda s, n: (advance(s, n), sizes.append(s.store[0][0].shape[1]))[0]
    )
    (rollouts,) = generate(hf, [tiny_prompt(hf, 5, None)], 8, 500, eos=(EOS,), banned=BANNED)
    longest = 5 + max(len(r.ids) for r in rollouts)
    assert (
        longest - 1 <= max(sizes) < longest + 5 and sizes == sorted(sizes) and len(set(sizes)) > 2
    )
