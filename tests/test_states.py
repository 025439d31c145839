"""Linear attention over packs and in the sampler equals transformers' own forward of separate
rows: Qwen3.5, dense and of mixture type."""

import copy
import json
from functools import partial

import pytest
import test_stages
import torch
from conftest import BLANK, EOS, IMAGE, START, STOP, VIDEO, VOCAB, tiny_prompt
from safetensors.torch import load_file, save_file
from test_memory import Dense, peak
from test_packs import whole
from test_ranks import FAST, job, on_ranks, same_runs
from test_sampler import BANNED, Asked, ids_of, sample
from test_stages import (
    COMMON,
    GAME,
    ROLLOUTS,
    check_game,
    leave_no_group,  # noqa: F401
    moved,
    opens_everywhere,
    records,
    scores,
    weights,
)
from transformers import (
    AutoModelForImageTextToText,
    Qwen3_5Config,
    Qwen3_5ForConditionalGeneration,
    Qwen3_5MoeConfig,
    Qwen3_5MoeForConditionalGeneration,
)

import align
import model
import rlvr
from data import Example
from engine import sampler, states
from engine.attention import adopt, forward_pack, layout_of
from engine.logprob import token_logps
from engine.packs import Segment, Tree, build_pack, filler, plan
from engine.sampler import all_rows
from engine.states import CHUNK
from model import recompute
from tools import memory
from tools.init import init

KINDS = {
    "dense": (Qwen3_5Config, Qwen3_5ForConditionalGeneration),
    "moe": (Qwen3_5MoeConfig, Qwen3_5MoeForConditionalGeneration),
}


def tiny_config(kind="dense", layers=("linear_attention", "full_attention"), **text):
    config, _ = KINDS[kind]
    hidden_size = text.get("hidden_size", 32)
    mlp = dict(intermediate_size=48)
    if kind == "moe":
        mlp = dict(
            moe_intermediate_size=16,
            shared_expert_intermediate_size=16,
            num_experts=4,
            num_experts_per_tok=2,
        )
    sizes = dict(
        hidden_size=hidden_size,
        num_hidden_layers=len(layers),
        layer_types=list(layers),
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        linear_num_key_heads=2,
        linear_num_value_heads=4,
        linear_key_head_dim=8,
        linear_value_head_dim=12,
        vocab_size=VOCAB,
        eos_token_id=EOS,
        pad_token_id=None,
        rope_parameters={
            "rope_type": "default",
            "rope_theta": 10000.0,
            "partial_rotary_factor": 0.5,
            "mrope_section": [2, 1, 1],
            "mrope_interleaved": True,
        },
        tie_word_embeddings=True,
        max_position_embeddings=512,
    )
    return config(
        text_config=sizes | mlp | text,
        vision_config=dict(
            depth=2,
            hidden_size=32,
            num_heads=2,
            intermediate_size=48,
            patch_size=4,
            spatial_merge_size=2,
            temporal_patch_size=2,
            out_hidden_size=hidden_size,
            num_position_embeddings=64,
        ),
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        vision_start_token_id=START,
        vision_end_token_id=STOP,
        tie_word_embeddings=True,
    )


def tiny_models(kind="dense", seed=0, **config):
    """(for packs, plain): the same random weights, large enough that mistakes show."""
    torch.manual_seed(seed)
    _, family = KINDS[kind]
    plain = family(tiny_config(kind, **config)).eval()
    for name, parameter in plain.named_parameters():
        if parameter.ndim > 1:
            parameter.data.normal_(0, 0.15)
        if "A_log" in name:  # so slowly that a state is felt over a whole row
            parameter.data.uniform_(-4, 0)
    ours = copy.deepcopy(plain)
    adopt(ours.model)
    ours.model.blank_image = BLANK
    return ours, plain


def plain_logits(plain, prompt, ids):
    full = torch.cat([prompt.ids, torch.tensor(ids, dtype=torch.long)])[None]
    plain.model.rope_deltas = None
    return plain(
        input_ids=full,
        mm_token_type_ids=(full == IMAGE).int(),
        **prompt.images,
    ).logits[0]


def texts(*lengths, seed=0):
    g = torch.Generator().manual_seed(seed)
    return [torch.randint(2, 50, (n,), generator=g).tolist() for n in lengths]


def forest(hf):
    """Unequal lengths, over several chunks too; prompts shorter than the convolution; images of
    several sizes, none; a tree without children."""
    prompts = [
        tiny_prompt(hf, 5, (1, 4, 4), 0),
        tiny_prompt(hf, CHUNK + 9, None, 1),
        tiny_prompt(hf, 3, (1, 8, 4), 2),
        tiny_prompt(hf, 2, None, 3),
        tiny_prompt(hf, 1, None, 4),
    ]
    children = [
        texts(4, 1, 17, 2 * CHUNK + 3),
        texts(2, CHUNK, seed=1),
        [],
        texts(1, 6, seed=2),
        texts(3, 2, seed=3),
    ]
    return [Tree(p, c) for p, c in zip(prompts, children, strict=True)]


@pytest.mark.parametrize("kind", KINDS)
def test_logits_and_gradients_equal_separate_rows(kind):
    ours, plain = tiny_models(kind)
    trees = forest(ours)
    pack = build_pack(trees, whole(trees), pad_to=128)  # with a tail, as on CUDA
    hidden = forward_pack(ours.model, pack)
    logits = ours.lm_head(hidden[pack.source])
    weights = torch.linspace(-1, 1, len(pack.target))
    found = token_logps(hidden[pack.source], ours.lm_head.weight, pack.target)
    (found * weights).sum().backward()
    for k, (t, c) in enumerate(pack.children):
        ids = trees[t].children[c]
        expected = plain_logits(plain, trees[t].prompt, ids)[-len(ids) - 1 : -1]
        mine = pack.sequence == k
        torch.testing.assert_close(logits[mine], expected, atol=1e-5, rtol=1e-5)
        logps = expected.log_softmax(-1).gather(1, torch.tensor(ids)[:, None]).squeeze(1)
        (logps * weights[mine]).sum().backward()
    for (name, a), b in zip(ours.named_parameters(), plain.parameters(), strict=True):
        if b.grad is not None:
            largest = b.grad.abs().max().clamp(min=1)
            torch.testing.assert_close(
                a.grad / largest,
                b.grad / largest,
                atol=1e-5,
                rtol=1e-4,
                msg=lambda m, n=name: f"{n}: {m}",
            )


@pytest.mark.parametrize("slots, shares", [(1, False), (2, True), (64, False), (64, True)])
def test_greedy_equals_generate(slots, shares):
    ours, plain = tiny_models()
    prompts = [tree.prompt for tree in forest(ours)[:4]]
    options = dict(temperature=0, slots=slots, share_prompts=shares)
    rollouts = sample(ours, prompts, all_rows(prompts, 1), 12, **options)
    for prompt, rollout in zip(prompts, rollouts, strict=True):
        image = (prompt.ids == IMAGE).int()[None]
        images = prompt.images | ({"mm_token_type_ids": image} if prompt.images else {})
        expected = plain.generate(
            input_ids=prompt.ids[None],
            max_new_tokens=12,
            do_sample=False,
            eos_token_id=EOS,
            pad_token_id=0,
            suppress_tokens=list(BANNED),
            attention_mask=torch.ones_like(image),
            **images,
        )
        assert rollout.ids == expected[0, len(prompt.ids) :].tolist()


@pytest.mark.parametrize("shares", [False, True])
def test_logps_of_refilled_slots_equal_the_trainers(monkeypatch, shares):
    """Few slots, rows of very different lengths: each begins with its prompt's states, also in a
    slot that another row has left, and after slots are given up."""
    ours, _ = tiny_models(layers=("linear_attention", "linear_attention", "full_attention"))
    prompts = [tree.prompt for tree in forest(ours)[:4]]
    widths = []
    advance = sampler._Decoder.advance

    def watched(decoder, steps):
        widths.append(len(decoder.rows))
        advance(decoder, steps)

    monkeypatch.setattr(sampler._Decoder, "advance", watched)
    options = dict(slots=4, share_prompts=shares, pack_tokens=90, eos=(EOS, 7, 9))
    rollouts = sample(ours, prompts, all_rows(prompts, 5), 30, **options)
    assert widths[0] == 4 > widths[-1]
    assert len({len(rollout.ids) for rollout in rollouts}) > 4
    trees = [Tree(p, ids_of(rollouts[5 * i : 5 * i + 5])) for i, p in enumerate(prompts)]
    parts = plan(trees, 100)
    assert len(parts) > 3  # trees are split: their roots stand in each part
    scored = 0
    for part in parts:
        pack = build_pack(trees, part)
        hidden = forward_pack(ours.model, pack)[pack.source]
        logps = token_logps(hidden, ours.lm_head.weight, pack.target, 1.0, BANNED)
        mine = torch.cat([torch.tensor(rollouts[5 * t + c].logps) for t, c in pack.children])
        torch.testing.assert_close(logps, mine, atol=1e-4, rtol=0)
        scored += len(mine)
    assert scored == sum(len(rollout.ids) for rollout in rollouts)


def test_a_step_asks_the_host_nothing(monkeypatch):
    """And leaves its tensors where they are: a captured graph writes to the same memory."""
    ours, _ = tiny_models()
    steps = []
    memory = []
    step = sampler._Decoder.step

    def watched(decoder):
        with Asked() as asked:
            step(decoder)
        steps.append(asked)
        states = decoder.store.states
        tensors = [*states.inputs.values(), *states.matrices.values()]
        memory.append([tensor.data_ptr() for tensor in tensors])

    monkeypatch.setattr(sampler._Decoder, "step", watched)
    prompts = [tree.prompt for tree in forest(ours)[:4]]
    sample(ours, prompts, all_rows(prompts, 2), 6, slots=3)
    assert len(steps) > 3 and not steps[0].waits()
    assert all(asked.names == steps[0].names for asked in steps)
    assert all(of_step == memory[0] for of_step in memory[:4])


def test_a_leak_over_a_boundary_is_seen(monkeypatch):
    """The tests above would see it: a child that goes on from its sibling, inputs of the
    convolution from what stands before in the pack, a row without boundaries, padding that changes
    a state."""
    ours, plain = tiny_models()
    tree, _, other, *_ = forest(ours)
    assert len(tree.prompt.ids) < len(other.prompt.ids) <= CHUNK  # it is padded
    ids = tree.children[2]
    expected = plain_logits(plain, tree.prompt, ids)[-len(ids) - 1 : -1]

    def error(change):
        with torch.no_grad(), monkeypatch.context() as patch:
            pack = build_pack([tree, other], whole([tree, other]))
            change(pack, patch)
            logits = ours.lm_head(forward_pack(ours.model, pack)[pack.source])
        return (logits[pack.sequence == 2] - expected).abs().max()

    def nothing(pack, patch):
        pass

    def from_sibling(pack, patch):
        pack.segments[3].parent = 2

    def inputs_before(pack, patch):
        last = states.last_places
        patch.setattr(states, "last_places", lambda pack, number, n: last(pack, 2, n))

    def no_boundaries(pack, patch):
        pack.segments[:] = [Segment(0, pack.ids, pack.positions, 0)]
        pack.segment = torch.zeros_like(pack.segment)

    def padding(pack, patch):
        patch.setattr(states, "Batch", partial(batch_without_ends, states.Batch))

    def batch_without_ends(kind, is_real, **rest):
        return kind(is_real=torch.ones_like(is_real), **rest)

    assert error(nothing) < 1e-5
    assert error(from_sibling) > 1e-3
    assert error(inputs_before) > 1e-3
    assert error(no_boundaries) > 1e-3
    assert error(padding) > 1e-3


def test_deeper_trees():
    """A segment of one token between the prompt and what comes after it: both the state and the
    last inputs come from several segments above."""
    ours, plain = tiny_models()
    prompt = tiny_prompt(ours, 2, None, 3)
    between, after = [7], texts(4)[0]
    pack = build_pack([Tree(prompt, [between, after])], [(0, [0, 1])])
    pack.segments[2].parent = 1
    pack.positions[:, pack.segments[2].start :] += len(between)
    pack.layout = layout_of(pack)
    logits = ours.lm_head(forward_pack(ours.model, pack))[-len(after) :]
    expected = plain_logits(plain, prompt, between + after)[-len(after) :]
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-5)


def test_padding_is_bounded():
    """Segments of a batch have about as many chunks; short ones have short chunks."""
    ours, _ = tiny_models()
    lengths = (1, 10, 60, 70, 130, 260, 300, 320, 900)
    pack = build_pack([Tree(tiny_prompt(ours, 5), texts(*lengths))], [(0, [*range(len(lengths))])])
    batches = states.forest_of(ours.model, pack).batches
    found = [[pack.segments[number].length for number in batch.segments] for batch in batches]
    assert found == [[11], [1, 10, 60], [70], [130], [260, 300, 320], [900]]
    assert [batch.chunk for batch in batches] == [16, 64, 64, 64, 64, 64]
    assert [states.chunk_of(length) for length in (1, 16, 17, 63, 1000)] == [16, 16, 32, 64, 64]
    assert [batch.is_continued for batch in batches] == [True, *[False] * 5]


def test_states_are_float32():
    """Whatever the weights are: rounded at each token, a sum of thousands of them would drift."""
    ours, _ = tiny_models()
    slots = states.SlotStates(ours.bfloat16(), 3)
    assert {state.dtype for state in slots.matrices.values()} == {torch.float32}
    assert {inputs.dtype for inputs in slots.inputs.values()} == {torch.bfloat16}
    prompts = [tree.prompt for tree in forest(ours)[1:2]]
    rollouts = sample(ours, prompts, all_rows(prompts, 3), 20)
    pack = build_pack([Tree(prompts[0], ids_of(rollouts))], [(0, [0, 1, 2])])
    hidden = forward_pack(ours.model, pack)[pack.source]
    logps = token_logps(hidden, ours.lm_head.weight, pack.target, 1.0, BANNED)
    mine = torch.cat([torch.tensor(rollout.logps) for rollout in rollouts])
    assert (logps - mine).abs().mean() < 0.02


def test_a_mixture_is_not_upcycled():
    with pytest.raises(ValueError, match="Qwen3_5MoeSparseMoeBlock .*: give --disc dense"):
        align.Discriminator(tiny_models("moe")[0].model, "moe")
    align.Discriminator(tiny_models("moe")[0].model, "dense")


def test_another_recurrence_is_refused():
    ours, _ = tiny_models()
    model.expect_packs_run(ours, "here")
    del ours.model.language_model.layers[0].linear_attn.in_proj_z
    with pytest.raises(ValueError, match="Qwen3.5's gated delta nets alone"):
        model.expect_packs_run(ours, "here")


def test_checkpointing_changes_nothing():
    ours, _ = tiny_models()
    other = copy.deepcopy(ours).train()
    recompute(other)
    trees = forest(ours)
    pack = build_pack(trees, whole(trees))
    for hf in (ours, other):
        hidden = forward_pack(hf.model, pack)[pack.source]
        token_logps(hidden, hf.lm_head.weight, pack.target).sum().backward()
    for a, b in zip(ours.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad)


def test_a_filler_has_a_gradient_of_zeros():
    ours, _ = tiny_models()
    pack = filler("cpu")
    hidden = forward_pack(ours.model, pack)[pack.source]
    token_logps(hidden, ours.lm_head.weight, pack.target).sum().backward()
    assert all(p.grad is not None and not p.grad.any() for p in ours.parameters())


def test_rows_of_their_own_are_refused():
    """Not run on in silence, over what a row's neighbours have left."""
    ours, _ = tiny_models()
    with pytest.raises(RuntimeError, match="loaded for packs"):
        ours(input_ids=torch.tensor([[5, 6, 7]]))


# --------------------------------------------------------------------------------------- memory
@pytest.mark.parametrize("checkpointing", [False, True])
def test_activations_are_what_is_measured(checkpointing):
    layers = ["linear_attention"] * 3 + ["full_attention"]
    sizes = dict(hidden_size=64, intermediate_size=192, num_attention_heads=8)
    sizes |= dict(num_key_value_heads=8, linear_key_head_dim=32, linear_value_head_dim=32)
    hf, _ = tiny_models(layers=layers, **sizes)
    hf.train()
    prompt = tiny_prompt(hf, 96, (1, 8, 16))
    tree = Tree(prompt, texts(*[CHUNK] * 6))
    pack = build_pack([tree], whole([tree]))
    pack.layout = Dense()

    def compute():
        hidden = forward_pack(hf.model, pack)[pack.source]
        token_logps(hidden, hf.lm_head.weight, pack.target).sum().backward()

    for parameter in hf.parameters():
        parameter.grad = torch.zeros_like(parameter)  # none is made during the measurement
    if checkpointing:
        recompute(hf.model)
    compute()
    size = (len(pack.ids), len(prompt.images["pixel_values"]), 4)
    found = memory.activations(hf.model, *size, checkpointing)
    assert 0.93 < found / peak(compute) < 1.15


def test_account_by_hand(tmp_path):
    """Keys and values in a layer of two; in the other a state for each row and each prompt."""
    (tmp_path / "config.json").write_text(json.dumps(tiny_config().to_dict()))
    flags = dict(policy=str(tmp_path), data="none", slots=8, dtype="bfloat16", warmup_steps=0)
    args = align.Args(prompts_per_step=4, max_prompt=100, max_response=10, **flags)
    policy, disc = memory.skeletons(align, args)
    entries = memory.account(args, 2, policy, disc)
    held = {what: size for _, what, size in entries}
    assert held["KV cache, 8 rows, 4 prompts"] == (8 * 10 + 4 * 100) * 2 * 2 * 16 * 2
    conv = 2 * 2 * 8 + 4 * 12  # queries and keys, values
    assert held["states, 8 rows, 4 prompts"] == (8 + 4) * (4 * 4 * 8 * 12 + 2 * 3 * conv)


# ---------------------------------------------------------------------------------- whole stages
WORDS = {"messages": [{"content": "<caption> red square </caption> count all of them"}]}


def test_checkpoints_open_everywhere(tmp_path):
    """Dense and of mixture type: plain transformers computes from what is saved what our loader
    does. Released ones hold weights of a head for several tokens at once (mtp), which no model of
    transformers reads: they are left out."""
    (tmp_path / "corpus.jsonl").write_text(json.dumps(WORDS))
    for kind in KINDS:
        folder = tmp_path / kind
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(tiny_config(kind).to_dict()))
        init(folder / "config.json", folder, [tmp_path / "corpus.jsonl"])
        weights = load_file(folder / "model.safetensors")
        weights["mtp.fc.weight"] = torch.zeros(2, 2)
        save_file(weights, folder / "model.safetensors", {"format": "pt"})
        policy = model.load(folder)
        model.save(policy, folder / "saved")
        plain = AutoModelForImageTextToText.from_pretrained(folder / "saved").eval()
        prompt = policy.encoder.prompt(Example([{"role": "user", "content": "count red"}], []))
        ids = policy.encoder.response("red square")
        with torch.no_grad():
            found = policy(build_pack([Tree(prompt, [ids])], [(0, [0])]))
            logps = plain_logits(plain, prompt, ids)[-len(ids) - 1 : -1].log_softmax(-1)
        expected = logps.gather(1, torch.tensor(ids).unsqueeze(1)).squeeze(1)
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """test_stages' world with a policy that is a Qwen3.5."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(test_stages, "tiny_config", tiny_config)
        return test_stages.build_world(tmp_path_factory.mktemp("qwen3_5"))


def test_rlvr(world):
    """Behind stage 1, which made the world's policy."""
    out = f"{world.folder}/rlvr"
    flags = dict(steps=1, lr=1e-3) | ROLLOUTS | COMMON
    rlvr.main(rlvr.Args(policy=world.sft, data=world.rl, out=out, **flags))
    (record,) = records(out)
    assert record["logp_diff_max"] < 1e-4 and record["skipped"] == 0
    assert moved(weights(f"{out}/last"), weights(world.sft))
    opens_everywhere(f"{out}/last", world)


@pytest.mark.slow
def test_the_game(world):
    """With a discriminator upcycled from the policy: a mixture in each layer's MLP."""
    out = f"{world.folder}/align"
    align.main(align.Args(policy=world.sft, data=world.align, out=out, **GAME))
    check_game(out)
    opens_everywhere(f"{out}/last", world)
    disc = align.open_discriminator(f"{out}/last/discriminator")
    assert disc.form == "moe"
    assert scores(disc, world, model.load(world.sft)).isfinite().all()


@pytest.mark.slow
def test_two_ranks_do_what_one_does(world, tmp_path):
    for ranks in (1, 2):
        on_ranks(ranks, [job(name, world, tmp_path / f"{name}{ranks}") for name in FAST], tmp_path)
    for name in FAST:
        assert same_runs(tmp_path / f"{name}1", tmp_path / f"{name}2") == [(2,)]
