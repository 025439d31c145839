"""The sampler equals transformers' generate (greedy), the trainer's log-probs, and the distribution
that it names."""

import numpy as np
import pytest
import torch
from conftest import EOS, IMAGE, PAD, START, STOP, VIDEO, VOCAB, plain_logits, tiny_hf, tiny_prompt
from torch.utils._python_dispatch import TorchDispatchMode

from engine import sampler, store
from engine.attention import forward_pack
from engine.logprob import token_logps
from engine.packs import Tree, build_pack, plan
from engine.sampler import all_rows, generate, pick, pick_most_likely, uniforms

BANNED = (PAD, START, STOP, IMAGE, VIDEO, 62, 63)


def three_prompts(hf):
    return [
        tiny_prompt(hf, 5, (1, 4, 4), 0),
        tiny_prompt(hf, 9, None, 1),
        tiny_prompt(hf, 3, (1, 8, 4), 2),
    ]


def sample(hf, prompts, rows, max_tokens, seed=0, eos=(EOS,), **options):
    """generate with the seeds (seed, 0), (seed, 1), .. and the usual bans."""
    seeds = [(seed, number) for number in range(len(prompts))]
    return generate(hf, prompts, rows, max_tokens, eos=eos, banned=BANNED, seeds=seeds, **options)


def ids_of(rollouts):
    return [rollout.ids for rollout in rollouts]


@pytest.mark.parametrize("shares", [False, True])
@pytest.mark.parametrize("slots", [1, 2, 64])
def test_greedy_equals_generate(slots, shares):
    hf = tiny_hf()
    plain = tiny_hf(packs=False)
    prompts = three_prompts(hf)
    options = dict(temperature=0, slots=slots, share_prompts=shares)
    rollouts = sample(hf, prompts, all_rows(prompts, 1), 12, **options)
    for prompt, rollout in zip(prompts, rollouts, strict=True):
        image = (prompt.ids == IMAGE).int()[None]
        images = {}
        if image.any():
            images = prompt.images | {"mm_token_type_ids": image}
        expected = plain.generate(
            input_ids=prompt.ids[None],
            max_new_tokens=12,
            do_sample=False,
            eos_token_id=EOS,
            pad_token_id=PAD,
            suppress_tokens=list(BANNED),
            attention_mask=torch.ones_like(image),
            **images,
        )
        assert rollout.ids == expected[0, len(prompt.ids) :].tolist()
        assert rollout.stop == ("end" if EOS in rollout.ids else "length")


@pytest.mark.parametrize("temperature, shares", [(1.0, False), (1.0, True), (0.6, True)])
def test_logps_equal_the_trainers(hf, temperature, shares):
    prompts = three_prompts(hf)
    options = dict(temperature=temperature, slots=4, share_prompts=shares)
    rollouts = sample(hf, prompts, all_rows(prompts, 5), 10, **options)
    trees = [Tree(p, ids_of(rollouts[5 * i : 5 * i + 5])) for i, p in enumerate(prompts)]
    scored = 0
    for part in plan(trees, 60):
        pack = build_pack(trees, part)
        hidden = forward_pack(hf.model, pack)[pack.source]
        logps = token_logps(hidden, hf.lm_head.weight, pack.target, temperature, BANNED)
        mine = torch.cat([torch.tensor(rollouts[5 * t + c].logps) for t, c in pack.children])
        torch.testing.assert_close(logps, mine, atol=1e-4, rtol=0)
        scored += len(mine)
    assert scored == sum(len(rollout.ids) for rollout in rollouts)


def test_same_ids_in_any_order_and_company(hf):
    prompts = three_prompts(hf)
    rows = all_rows(prompts, 4)
    together = sample(hf, prompts, rows, 10, seed=7, slots=5)
    alone = [sample(hf, prompts, [row], 10, seed=7)[0] for row in rows]
    assert ids_of(together) == ids_of(alone)
    own = []  # each prompt in a call of its own, under the name that it has among the others
    for number, prompt in enumerate(prompts):
        seeds = [(7, number)]
        own += generate(
            hf, [prompt], all_rows([prompt], 4), 10, eos=(EOS,), banned=BANNED, seeds=seeds
        )
    assert ids_of(together) == ids_of(own)
    assert ids_of(together) != ids_of(sample(hf, prompts, rows, 10, seed=8))


@pytest.mark.parametrize("shares", [False, True])
@pytest.mark.parametrize("slots,pack_tokens", [(1, 20), (2, 10**4), (3, 1), (64, 10**4)])
def test_any_subset_of_rows_in_any_order(hf, slots, pack_tokens, shares):
    """Rows of one prompt need not be neighbours, nor complete, and may come twice."""
    prompts = three_prompts(hf)
    rows = all_rows(prompts, 4)
    rollout_of = dict(zip(rows, sample(hf, prompts, rows, 8), strict=True))
    some = [(2, 3), (0, 1), (2, 0), (0, 3), (0, 1), (2, 1)]
    options = dict(slots=slots, pack_tokens=pack_tokens, share_prompts=shares)
    found = sample(hf, prompts, some, 8, **options)
    assert ids_of(found) == [rollout_of[row].ids for row in some]
    for rollout, row in zip(found, some, strict=True):
        assert rollout.logps == pytest.approx(rollout_of[row].logps, abs=1e-4)


def test_stops_lengths_and_bans(hf):
    lengths = set()
    ends = (EOS, 5)
    prompts = three_prompts(hf)
    for rollout in sample(hf, prompts, all_rows(prompts, 20), 6, eos=ends, slots=7):
        assert len(rollout.ids) == len(rollout.logps) <= 6
        assert not set(rollout.ids) & set(BANNED)
        assert (rollout.stop == "end") == (rollout.ids[-1] in ends)
        assert not set(ends) & set(rollout.ids[:-1])
        assert rollout.stop == "end" or len(rollout.ids) == 6
        lengths.add(len(rollout.ids))
    assert len(lengths) > 1  # ragged, or this test shows nothing


def test_first_token_distribution(hf):
    """Frequencies of the first token over 4,000 rollouts match the model's own probabilities."""
    n = 4000
    prompt = tiny_prompt(hf, 4, None, 3)
    rollouts = sample(hf, [prompt], all_rows([prompt], n), 1, slots=n)
    logits = plain_logits(hf, prompt, [])[-1].index_fill(0, torch.tensor(BANNED), -torch.inf)
    p = logits.softmax(-1).detach().numpy()
    counts = np.bincount([rollout.ids[0] for rollout in rollouts], minlength=VOCAB)
    big = p * n > 5
    chi_square = ((counts - p * n)[big] ** 2 / (p * n)[big]).sum()
    assert chi_square < 2 * big.sum()


def test_pick_edges():
    logits = torch.log(torch.tensor([[0.0, 0.5, 0.0, 0.5, 0.0]])).repeat(5, 1)
    u = torch.tensor([0.0, 0.4999, 0.5, 0.9999, 1.0])  # 1.0 can come of rounding
    ids, logps = pick(logits, u)
    assert ids.tolist() == [1, 1, 3, 3, 3]
    assert torch.allclose(logps.exp(), torch.tensor(0.5))
    ids, logps = pick_most_likely(logits)
    assert ids.tolist() in ([1] * 5, [3] * 5)
    assert torch.allclose(logps.exp(), torch.tensor(0.5))


@pytest.mark.parametrize("vocabulary", [1, 2, 3, 50, 1000])
def test_pick_takes_each_id_where_its_share_begins(vocabulary):
    p = torch.arange(vocabulary).double() % 3 + 1
    p[::4] = 0
    p[-1] = 1
    p /= p.sum()
    logits = p.log().float()[None]
    starts = p.cumsum(0) - p
    for number in p.nonzero().squeeze(1).tolist():
        for share in (0.01, 0.99):
            u = starts[number] + share * p[number]
            assert pick(logits, u[None])[0].item() == number


def test_pick_of_nan_is_an_id():
    """A policy that has diverged is for the optimiser's check to report."""
    ids, logps = pick(torch.full((2, 7), torch.nan), torch.tensor([0.1, 0.9]))
    assert ((0 <= ids) & (ids < 7)).all() and logps.isnan().all()


def test_uniforms_are_named_by_their_row():
    a = uniforms((1, 2, 3), 4, 5)
    assert (a == uniforms((1, 2, 3), 4, 9)[:5]).all()
    assert (a != uniforms((1, 2, 4), 3, 5)).all()
    assert (a != uniforms((1, 2, 5), 4, 5)).all()  # the prompt counts ...
    assert (a != uniforms((1, 2, 3), 5, 5)).all()  # ... and k
    assert ((0 <= a) & (a < 1)).all()
    expected = np.random.Generator(np.random.Philox(np.random.SeedSequence([1, 2, 3, 4])))
    assert (a == expected.random(5)).all()


def test_all_rows():
    assert all_rows(["a", "b"], 3) == [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (1, 2)]
    assert all_rows([], 3) == []


def test_empty(hf):
    # A rank without a row leaves the model as it was: in eval mode it would no longer checkpoint
    # its activations.
    hf.train()
    assert sample(hf, [], [], 5) == []
    assert sample(hf, three_prompts(hf), [], 5) == []
    assert hf.training


@pytest.mark.parametrize("look_every", [2, 5, 100])
def test_how_often_the_host_looks_changes_nothing(hf, look_every):
    prompts = three_prompts(hf)
    rows = all_rows(prompts, 4)
    expected = sample(hf, prompts, rows, 10, eos=(EOS, 5), slots=5)
    found = sample(hf, prompts, rows, 10, eos=(EOS, 5), slots=5, look_every=look_every)
    assert ids_of(expected) == ids_of(found)
    assert [r.stop for r in expected] == [r.stop for r in found]


@pytest.mark.parametrize("slots,pack_tokens", [(1, 10**4), (3, 10**4), (3, 20), (64, 1)])
def test_each_prompt_is_read_once(hf, monkeypatch, slots, pack_tokens):
    packs = []

    def watched(base, pack, **options):
        packs.append(pack)
        return forward_pack(base, pack, **options)

    monkeypatch.setattr(sampler, "forward_pack", watched)
    prompts = three_prompts(hf)
    rows = all_rows(prompts, 5)
    expected = sample(hf, prompts, rows, 6)
    packs.clear()
    found = sample(hf, prompts, rows, 6, slots=slots, pack_tokens=pack_tokens)
    # but for its last token, which the first step feeds
    assert sum(len(pack.ids) for pack in packs) == sum(len(p.ids) - 1 for p in prompts)
    assert ids_of(expected) == ids_of(found)


def test_a_prompt_of_one_token_is_refused(hf):
    with pytest.raises(ValueError, match="a prompt of one token"):
        sample(hf, [tiny_prompt(hf, 1, None)], [(0, 0)], 2)


def test_prompts_are_kept_no_longer_than_their_rows_wait(hf, monkeypatch):
    kept = []
    drop_finished = sampler._Queue.drop_finished

    def watched(queue, prompts):
        drop_finished(queue, prompts)
        kept.append(set(queue.read))

    monkeypatch.setattr(sampler._Queue, "drop_finished", watched)
    prompts = three_prompts(hf)
    rows = [(1, 0), (0, 0), (1, 1), (2, 0)]
    sample(hf, prompts, rows, 3, slots=1, pack_tokens=1)
    seen = [read for number, read in enumerate(kept) if number == 0 or read != kept[number - 1]]
    assert seen == [{1}, set()]  # the second row of prompt 1 waits while prompt 0 is begun


class Asked(TorchDispatchMode):
    """Records the names of all operations."""

    WAIT = ("_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "equal", "item")

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(function.name())
        return function(*args, **(kwargs or {}))

    def waits(self):
        """Those that make the host wait for the device."""
        return [name for name in self.names if name.split("::")[1].split(".")[0] in self.WAIT]


@pytest.mark.parametrize("temperature, shares", [(0, False), (1.0, False), (1.0, True)])
def test_a_step_asks_the_host_nothing(hf, monkeypatch, temperature, shares):
    """And makes the same operations in the same order each time: what a captured graph needs."""
    steps = []
    step = sampler._Decoder.step

    def watched(decoder):
        with Asked() as asked:
            step(decoder)
        steps.append(asked)

    monkeypatch.setattr(sampler._Decoder, "step", watched)
    prompts = three_prompts(hf)
    sample(hf, prompts, all_rows(prompts, 4), 8, temperature=temperature, share_prompts=shares)
    assert len(steps) > 3
    assert not steps[0].waits()
    assert all(asked.names == steps[0].names for asked in steps)


def test_the_store_grows_with_the_rows(hf, monkeypatch):
    monkeypatch.setitem(sampler.BLOCK, "cpu", 4)
    sizes = []
    advance = sampler._Decoder.advance

    def watched(decoder, steps):
        advance(decoder, steps)
        sizes.append(decoder.store.size)

    monkeypatch.setattr(sampler._Decoder, "advance", watched)
    prompt = tiny_prompt(hf, 5, None)
    rollouts = sample(hf, [prompt], all_rows([prompt], 8), 500)
    longest = 5 + max(len(rollout.ids) for rollout in rollouts)
    assert longest - 1 <= max(sizes) < longest + 5
    assert sizes == sorted(sizes)
    assert len(set(sizes)) > 2


def test_long_prompts_are_kept_once(hf, monkeypatch):
    """Each in a place, which the next one takes; in the slots there are the rows' own tokens alone.
    A captured step stays valid as long as no tensor is replaced."""
    prompts = [tiny_prompt(hf, 200 + number, None, number) for number in range(6)]
    options = dict(slots=8, eos=())
    expected = sample(hf, prompts, all_rows(prompts, 4), 6, share_prompts=False, **options)
    monkeypatch.setitem(sampler.BLOCK, "cpu", 1)
    stores = []
    replaced = []
    tensors = [[]]
    advance = sampler._Decoder.advance
    arrange = store.SharedPrompts.arrange

    def watched(decoder, steps):
        advance(decoder, steps)
        shared = decoder.store.shared
        stores.append((decoder.store.size, len(shared.lengths), shared.keys[0].shape[2]))

    def watched_arrange(shared):
        replaced.append(arrange(shared))
        kept = [*shared.keys.values(), *shared.values.values()]
        tensors.append([shared.bias, shared.slots, shared.seats, *kept])
        same = [x is y for x, y in zip(tensors[-2], tensors[-1], strict=False)]
        assert replaced[-1] == (not same or not all(same))
        return replaced[-1]

    monkeypatch.setattr(sampler._Decoder, "advance", watched)
    monkeypatch.setattr(store.SharedPrompts, "arrange", watched_arrange)
    monkeypatch.setattr(sampler, "SHARE_FROM", 200)
    found = sample(hf, prompts, all_rows(prompts, 4), 6, **options)
    assert ids_of(found) == ids_of(expected)
    sizes, places, tokens = zip(*stores[:-1], strict=True)
    assert max(sizes) == 6 and max(places) == 2 and max(tokens) == 204
    assert len(replaced) == 18 and sum(replaced) == 3  # at first, and where a prompt is longer


def test_which_prompts_are_shared(hf):
    """Long ones with several rows; a short copy in each row's slot costs less than a seat."""
    long, short = tiny_prompt(hf, sampler.SHARE_FROM, None), tiny_prompt(hf, 5, None)
    assert sampler.sharing_pays([long], all_rows([long], 2))
    assert not sampler.sharing_pays([long], all_rows([long], 1))
    assert not sampler.sharing_pays([short], all_rows([short], 16))
    assert not sampler.sharing_pays([long, short], all_rows([long, short], 16))


def test_slots_without_a_row_are_given_up(hf, monkeypatch):
    widths = []
    advance = sampler._Decoder.advance

    def watched(decoder, steps):
        widths.append(len(decoder.rows))
        advance(decoder, steps)

    monkeypatch.setattr(sampler._Decoder, "advance", watched)
    prompts = three_prompts(hf)
    rows = all_rows(prompts, 8)
    found = sample(hf, prompts, rows, 60, slots=12)
    assert widths[0] == 12 and widths[-1] < 12
    shared = sample(hf, prompts, rows, 60, slots=12, share_prompts=True)
    assert ids_of(found) == ids_of(shared)
    monkeypatch.setattr(sampler, "SHRINK_BELOW", 0)
    assert ids_of(found) == ids_of(sample(hf, prompts, rows, 60, slots=12))


@pytest.mark.parametrize("training", [True, False])
def test_the_model_stays_in_its_mode(hf, training):
    """Activation checkpointing, say, acts in training alone."""
    hf.train(training)
    sample(hf, [tiny_prompt(hf)], [(0, 0)], 2)
    assert hf.training == hf.model.language_model.training == training

    def fail(row, rollout):
        assert not hf.training
        raise LookupError("of a caller's own")

    with pytest.raises(LookupError):
        sample(hf, [tiny_prompt(hf)], [(0, 0)], 2, on_end=fail)
    assert hf.training == training
