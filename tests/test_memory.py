"""tools/memory.py: its numbers against counting by hand, against real shards and against measured
memory."""

import gc
import json
import math
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from conftest import ROOT, tiny_config, tiny_prompt
from torch.profiler import ProfilerActivity, profile
from torch.testing._internal.distributed.fake_pg import FakeStore
from transformers import Qwen3VLForConditionalGeneration

import align
import model
import rlvr
import sft
from engine import logprob
from engine.attention import forward_pack
from engine.logprob import token_logps
from engine.packs import Tree, build_pack
from tools import memory

GB = 1e9


def arguments(stage, policy, **flags):
    flags = {"dtype": "bfloat16", **flags}
    return stage.Args(policy=str(policy), data="none", out="none", **flags)


def sizes(entries):
    return {what: size for _, what, size in entries}


def sums(entries):
    phases = {}
    for phase, _, size in entries:
        phases[phase] = phases.get(phase, 0) + size
    return phases


def test_parameters_of_the_real_models(shared):
    """8B: against the published index of Qwen3-VL-Embedding-8B, the same model without a head.
    4B: by hand."""
    folder = shared / "data/qwen3vl"
    count = {}
    for size in ("2B", "4B", "8B"):
        count[size] = memory.count(model.skeleton(folder / size))
    index = json.loads((folder / "8B-embedding/model.safetensors.index.json").read_text())
    assert count["8B"] - 151936 * 4096 == index["metadata"]["total_parameters"]
    layer = 2 * 2560 * (4096 + 1024) + 3 * 2560 * 9728 + 2 * 2560 + 2 * 128  # attention, MLP, norms
    block = 4 * 1024**2 + 2 * 1024 * 4096  # matrices
    block += (3 + 1 + 1 + 4) * 1024 + 4096  # biases and norms
    mergers = 4 * (4096 * 4096 + 4096 + 4096 * 2560 + 2560)
    mergers += 2 * 1024 + 3 * 2 * 4096  # the last one's norm is before the shuffle
    vision = 24 * block + (3 * 2 * 16 * 16 + 1) * 1024 + 2304 * 1024 + mergers
    assert count["4B"] == 36 * layer + 151936 * 2560 + 2560 + vision == 4_437_815_808
    assert count["2B"] == 2_127_532_032


def test_account_by_hand(shared):
    """The 4B policy with a discriminator upcycled from 2B, on 8 ranks."""
    folder = shared / "data/qwen3vl"
    flags = {"disc_init": str(folder / "2B"), "slots": 16, "checkpointing": True, "warmup_steps": 0}
    args = arguments(align, folder / "4B", **flags)
    policy, disc = memory.skeletons(align, args)
    entries = memory.account(args, 8, policy, disc)
    held = sizes(entries)
    assert held["policy: parameters"] == pytest.approx(4_437_815_808 * 4 / 8, rel=1e-4)
    copies = 28 * 3 * 3 * 2048 * 6144  # three more of each MLP
    routers_and_head = 28 * 4 * 2048 + 2048
    experts = 2_127_532_032 + copies + routers_and_head
    assert held["discriminator: AdamW"] == pytest.approx(experts * 8 / 8, rel=1e-4)
    assert held["rollout copy of the policy"] == 4_437_815_808 * 2
    tokens = 16 * 6144 + 4 * 2048  # of 16 rows, and of 4 prompts, which are kept once
    assert held["KV cache, 16 rows, 4 prompts"] == tokens * 36 * 2 * 8 * 128 * 2
    phases = sums(entries)
    assert phases["policy's update"] < 25 * GB
    assert phases["always"] < 30 * GB

    # With --offload all that is sharded is on the CPU.
    args = arguments(align, folder, offload=True)
    offloaded = sums(memory.account(args, 8, policy, disc))
    assert offloaded["always"] == held["rollout copy of the policy"]

    # On two nodes shards are twice as large.
    args = arguments(align, folder, nodes=2)
    on_two_nodes = sizes(memory.account(args, 8, policy, disc))
    assert on_two_nodes["policy: AdamW"] == pytest.approx(2 * held["policy: AdamW"], rel=1e-4)

    # What --freeze_vision freezes has neither gradient nor moments, in no player.
    vision = {"4B": 415_195_136, "2B": 407_001_088}
    args = arguments(align, folder / "4B", **flags, freeze_vision=True)
    frozen = sizes(memory.account(args, 8, *memory.skeletons(align, args)))
    for name, player in (("4B", "policy"), ("2B", "discriminator")):
        assert frozen[f"{player}: parameters"] == held[f"{player}: parameters"]
        saved = held[f"{player}: gradients"] - frozen[f"{player}: gradients"]
        assert saved == pytest.approx(4 * vision[name] / 8, rel=1e-3)
        assert held[f"{player}: AdamW"] - frozen[f"{player}: AdamW"] == 2 * saved

    # One rank in float32 has no copy, and gathers nothing.
    args = arguments(rlvr, folder, dtype="float32", kl=0.1)
    alone = memory.account(args, 1, policy)
    parameters_gradients_two_moments_and_reference = 5
    assert (
        sums(alone)["always"] == 4_437_815_808 * 4 * parameters_gradients_two_moments_and_reference
    )
    assert not [what for what in sizes(alone) if "gathered" in what or "copy" in what]


@pytest.fixture
def tiny(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(tiny_config(hidden_size=40).to_dict()))
    return tmp_path


@pytest.mark.parametrize("stage", memory.STAGES)
def test_a_configuration_is_enough(tiny, capsys, monkeypatch, stage):
    monkeypatch.chdir(tiny)
    monkeypatch.setenv("WORLD_SIZE", "8")
    flags = ["--dtype", "bfloat16"]
    memory.main([stage, "--policy", str(tiny), *flags])
    out = capsys.readouterr().out
    # The sizes are the paper's, not those of the embedded world, which stages take without --data.
    assert "each of 8 ranks, bfloat16, packs of 16384" in out
    assert "fits in 80 GB: yes" in out
    assert "AdamW" in out
    assert ("discriminator's update" in out) == (stage == "align")
    assert ("KV cache" in out) == (stage != "sft")
    assert ("256 rows, 64 prompts" in out) == (stage == "align")  # the warm-up's held-out ones
    assert not dist.is_initialized()
    assert [path.name for path in tiny.iterdir()] == ["config.json"]

    monkeypatch.setenv("RANK", "1")
    memory.main([stage, "--policy", str(tiny), *flags])
    assert capsys.readouterr().out == ""  # under torchrun one rank prints

    monkeypatch.delenv("RANK")
    memory.main([stage, "--policy", str(ROOT / "runs/tiny.json"), *flags])
    assert "fits in 80 GB: yes" in capsys.readouterr().out


def test_prompts_that_are_kept_once(tiny):
    """Those that one call samples from; a validation has a row of each."""

    def prompts(stage, **flags):
        return memory.prompts_at_once(arguments(stage, tiny, **flags))

    assert prompts(align, warmup_steps=0) == prompts(align, disc_path="d") == 4
    assert prompts(align, pairs="p") == 4 and prompts(align) == 64
    assert prompts(rlvr) == 32 and prompts(rlvr, algo="dapo") == 96
    held_out = dict(eval_data="held_out.jsonl")
    assert prompts(rlvr, **held_out) == prompts(sft, **held_out) == math.inf


def test_stage_1_samples_where_its_validation_does(tiny, capsys):
    flags = ["--policy", str(tiny), "--eval_rollouts", "--eval_data", "held_out.jsonl"]
    memory.main(["sft", *flags, "--slots", "4"])
    assert "KV cache, 4 rows, 4 prompts" in capsys.readouterr().out


def test_what_is_on_the_cpu_is_said_apart(tiny, capsys):
    flags = ["rlvr", "--policy", str(tiny), "--dtype", "bfloat16"]
    memory.main(flags)
    assert "CPU" not in capsys.readouterr().out
    memory.main([*flags, "--offload"])
    assert "of the CPU's memory, for each rank: " in capsys.readouterr().out


@pytest.mark.parametrize("argv", [[], ["eval"], ["--policy", "x"]])
def test_a_stage_is_asked_for(argv):
    with pytest.raises(SystemExit, match="sft,align,rlvr"):
        memory.main(argv)


@pytest.mark.parametrize("argv", [["--help"], ["align", "--help"], ["rlvr", "--policy", "x", "-h"]])
def test_its_own_manual(argv, capsys):
    memory.main(argv)
    assert "The memory that one rank of a stage needs" in capsys.readouterr().out


def test_a_wrong_flag_is_refused(capsys):
    with pytest.raises(SystemExit):
        memory.main(["align", "--policy", "x", "--slot", "3"])
    assert "did you mean --slots?" in capsys.readouterr().err


@pytest.mark.parametrize("ranks", [3, 8])
def test_shards_are_those_of_fsdp(tiny, ranks):
    """The first rank's shards, which are the largest; 4 experts on 8 ranks are cut along another
    dimension."""
    args = arguments(align, tiny, dtype="float32")
    policy, disc = memory.skeletons(align, args)
    held = sizes(memory.account(args, ranks, policy, disc))
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=ranks)
    try:
        disc = disc.to_empty(device="cpu")
        place = SimpleNamespace(device=torch.device("cpu"), world=ranks)
        model.shard(disc, disc.model, args, place, exact=[disc.v_head])
        local = sum(4 * p.to_local().numel() for p in disc.parameters())
    finally:
        dist.destroy_process_group()
    assert local == held["discriminator: parameters"]
    assert local < 4 * memory.count(disc) / ranks * 1.15


# ----------------------------------------------------------------------------- measured memory
class Dense:
    """Attention that copies nothing, as on CUDA."""

    def attend(self, query, key, value, scaling, window=None):
        attended = F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scaling)
        return attended.transpose(1, 2)


def peak(compute):
    """Most bytes that were held at once of those that `compute` took."""
    gc.collect()  # else what others have left is given back in between, and counts
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        compute()
    events = recorded.profiler.kineto_results.events()
    held = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        if event.name() == "[memory]":
            held += event.nbytes()
            most = max(most, held)
    return most


def measured_model():
    config = tiny_config(
        hidden_size=64,
        intermediate_size=192,
        num_hidden_layers=4,
        num_attention_heads=8,
        head_dim=16,
        num_key_value_heads=8,
        rope_scaling={"rope_type": "default", "mrope_section": [4, 2, 2]},
    )
    vision = config.vision_config
    vision.hidden_size = 48
    vision.depth = 4
    vision.num_heads = 4
    vision.intermediate_size = 128
    vision.out_hidden_size = 64
    hf = Qwen3VLForConditionalGeneration(config).train()
    hf.model.language_model.config._attn_implementation = "packs"
    return hf


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize(
    "dtype", [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.slow)], ids=str
)
@pytest.mark.parametrize("player", ["policy", "discriminator", "frozen"])
def test_activations_are_what_is_measured(player, dtype, checkpointing):
    hf = measured_model()
    if player == "frozen":
        model.freeze_vision(hf.model)
    side = 32 if player == "frozen" else 8
    prompt = tiny_prompt(hf, length=64, grid=(1, side, 16))
    prompt.images["pixel_values"] = prompt.images["pixel_values"].to(dtype)
    tree = Tree(prompt, [[5] * 96] * 4, kinds=[0, 1] * 2)
    pack = build_pack([tree], [(0, list(range(4)))])
    pack.layout = Dense()
    if player != "discriminator":
        experts_per_token = None
        module = hf.to(dtype)

        def compute():
            hidden = forward_pack(hf.model, pack)[pack.source]
            token_logps(hidden, hf.lm_head.weight, pack.target).sum().backward()
    else:
        experts_per_token = 2
        module = align.Discriminator(hf.model, "moe", top_k=experts_per_token).to(dtype)
        module.v_head.float()

        def compute():
            scores, probability, _ = module(pack)
            (scores.sum() + probability.sum()).backward()

    for p in module.parameters():
        if p.requires_grad:
            p.grad = torch.zeros_like(p)  # none is made during the measurement
    if checkpointing:
        model.recompute(hf.model)
    compute()
    size = (len(pack.ids), len(prompt.images["pixel_values"]), dtype.itemsize)
    found = memory.activations(hf.model, *size, checkpointing, experts_per_token)
    assert 0.95 < found / peak(compute) < 1.15


@pytest.mark.parametrize("stage", [sft, align, rlvr], ids=lambda stage: stage.__name__)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("tokens", [50, 400])
def test_what_the_head_takes_is_what_is_measured(stage, dtype, tokens, monkeypatch):
    """Chunks of 128 of 400 tokens; 50 tokens are less than a chunk."""
    vocabulary, width = 4096, 24
    monkeypatch.setitem(logprob.CHUNK, "cpu", 128 * vocabulary)
    # Matrices in bfloat16 are multiplied into float32, as on CUDA: a CPU holds both for a moment.
    monkeypatch.setattr(logprob, "product", zeros_in_float32)
    hidden = torch.randn(tokens, width, dtype=getattr(torch, dtype), requires_grad=True)
    weight = torch.randn(vocabulary, width, dtype=getattr(torch, dtype), requires_grad=True)
    for tensor in (hidden, weight):
        tensor.grad = torch.zeros_like(tensor)  # none is made during the measurement
    target = torch.zeros(tokens, dtype=torch.long)
    coefficient = torch.ones(tokens)
    args = arguments(stage, "none", dtype=dtype, device="cpu")

    def compute():
        found = token_logps(
            hidden, weight, target, entropy=stage is not sft, coefficient=coefficient
        )
        logp = found if stage is sft else found[0]
        (coefficient * logp).sum().backward()

    compute()
    text = SimpleNamespace(vocab_size=vocabulary, hidden_size=width)
    of_hidden = hidden.numel() * hidden.element_size()  # its gradient, which activations count
    expected = memory.head(text, tokens, args)
    assert 0.97 < expected / (peak(compute) - of_hidden) < 1.05


def zeros_in_float32(a, b):
    """In the place of `product`: memory is all that counts."""
    return torch.zeros(a.shape[0], b.shape[1])
