"""The sampler by itself beside the reference, and METHOD.md's numbers for each stage."""

import pytest
import torch
from reference import compare, method, models, rows, world

import align
import model
import rlvr
import sft
from data import read
from engine.sampler import all_rows, generate

COMMON = dict(temperature=1.0, grad_clip=1.0, max_prompt=2048, freeze_vision=False)
DEFAULTS = {  # METHOD.md's tables
    "sft": dict(
        lr=1e-5,
        weight_decay=0.0,
        schedule="cosine",
        warmup=0.1,
        epochs=1.0,
        batch=128,
        steps=None,
        freeze_vision=True,
    ),
    "align": COMMON
    | dict(
        disc="moe",
        experts=4,
        experts_per_token=2,
        spans="both",
        disc_blind=False,
        prompts_per_step=4,
        group_size=16,
        max_response=6144,
        score_l2=1e-3,
        balance=0.01,
        disc_lr=1e-6,
        disc_weight_decay=0.01,
        score_clip=10.0,
        alpha=0.5,
        malformed_penalty=1.5,
        normalize="span",
        malformed="floor",
        std_floor=0.0,
        lr=1e-6,
        weight_decay=0.01,
        schedule="constant",
        warmup=0.0,
        steps=500,
        warmup_lr=1e-5,
        warmup_pairs=128,
        warmup_until=0.9,
    ),
    "rlvr": COMMON
    | dict(
        prompts_per_step=32,
        prompts_per_draw=96,
        max_draws=10,
        group_size=16,
        max_response=8192,
        lr=1e-6,
        steps=1500,
        schedule="constant",
        algo="grpo",
        kl=0.0,
        minibatches=1,
    ),
}


@pytest.mark.parametrize("name", DEFAULTS)
def test_defaults(name):
    args = {"sft": sft, "align": align, "rlvr": rlvr}[name].Args(policy="none", data="none")
    assert {key: getattr(args, key) for key in DEFAULTS[name]} == DEFAULTS[name]
    if name == "sft":
        assert args.max_prompt + args.max_response == 8192
    if name == "align":
        assert 120_000 <= args.warmup_steps * args.warmup_pairs < 121_000


@pytest.mark.parametrize("name", method.ALGORITHMS)
def test_presets(name):
    assert vars(rlvr.ALGORITHMS[name]) == method.ALGORITHMS[name]
    assert set(rlvr.ALGORITHMS) == set(method.ALGORITHMS)


@pytest.fixture(scope="module")
def opened(tmp_path_factory):
    """The policy in both forms, with a banned id that it would like best, and prompts."""
    folder = tmp_path_factory.mktemp("reference")
    files = world.make_world(folder)
    ours = model.load(files.policy)
    theirs = models.Policy(files.policy)
    reader = rows.Reader(files.policy, files.rl)
    weights = compare.policy_weights(files.policy)
    head = weights["hf.lm_head.weight"]
    wanted = reader.tokenizer.convert_tokens_to_ids(["<think>", "<answer>"])
    head[-1] = 1.2 * head[wanted].sum(0)  # of an id without a word: liked better than both
    theirs.take(weights)
    with torch.no_grad():
        ours.hf.lm_head.weight.copy_(head)
    return files, ours, theirs, reader


@pytest.mark.parametrize("slots", [2, 64])
@pytest.mark.parametrize("temperature", [0, 0.6, 1.3])
def test_sampler(opened, slots, temperature):
    """Each id is the first whose cumulative probability is above its uniform number; at temperature
    0 it is the most likely one. Banned ids have probability 0, also where they would be likely."""
    files, ours, theirs, reader = opened
    data = read(files.rl, "rl")
    numbers = (1, 4, 5)  # an image of 2 x 2 tokens, two images, none
    prompts = [ours.encoder.prompt(data[row]) for row in numbers]
    banned = reader.banned(theirs.vocabulary)
    assert list(ours.encoder.banned) == banned and list(ours.encoder.eos_ids) == [reader.end]
    seeds = [(7, 1, number) for number in numbers]
    order = all_rows(prompts, 2)[::-1]
    rollouts = generate(
        ours.hf,
        prompts,
        order,
        14,
        eos=ours.encoder.eos_ids,
        banned=banned,
        temperature=temperature,
        seeds=seeds,
        slots=slots,
        pack_tokens=30,
    )
    likely = 0.0  # the largest probability of the banned id, were it not banned
    for (p, k), rollout in zip(order, rollouts, strict=True):
        prompt = reader.prompt(numbers[p])
        with torch.no_grad():
            log_probs = theirs.log_probs(prompt, rollout.ids, temperature or 1.0, banned)
            free = theirs.log_probs(prompt, rollout.ids)
        likely = max(likely, float(free[:, -1].exp().max()))
        u = method.uniforms(seeds[p], k, 14)
        for place, i in enumerate(rollout.ids):
            expected = int(log_probs[place].argmax())
            if temperature:
                expected, distance = method.draw(log_probs[place], u[place])
                expected = i if distance < compare.ON_A_BOUND else expected
            assert i == expected
        found = torch.tensor(rollout.logps)
        compare.near(found, models.chosen(log_probs, rollout.ids), "log-probs", 5e-5)
        assert reader.end not in rollout.ids[:-1]
        ended = rollout.ids[-1] == reader.end
        assert rollout.stop == ("end" if ended else "length")
        assert ended or len(rollout.ids) == 14
    assert likely > 0.3, "the ban was never asked for"
