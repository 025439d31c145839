"""--dry_run: its numbers against counting by hand, against real shards and against measured memory."""

import json
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
from engine.logprob import token_logps
from engine.packs import Tree, make, run
from tools import memory

GB = 1e9


def shapes(path):
    with torch.device("meta"):
        return model.load(path)


def arguments(stage, policy, **flags):
    return stage.Args(
        policy=str(policy), data="none", out="none", dry_run=True, **dict(dtype="bfloat16") | flags
    )


def sums(rows):
    phases = {}
    for phase, _, n in rows:
        phases[phase] = phases.get(phase, 0) + n
    return phases


def test_parameters_of_the_real_models(shared):
    """8B: against the published index of Qwen3-VL-Embedding-8B, the same model without a head. 4B: by hand."""
    count = {
        size: sum(p.numel() for p in shapes(shared / f"data/qwen3vl/{size}").parameters())
        for size in ("2B", "4B", "8B")
    }
    index = json.loads(
        (shared / "data/qwen3vl/8B-embedding/model.safetensors.index.json").read_text()
    )
    assert count["8B"] - 151936 * 4096 == index["metadata"]["total_parameters"]
    layer = 2 * 2560 * (4096 + 1024) + 3 * 2560 * 9728 + 2 * 2560 + 2 * 128  # attention, MLP, norms
    block = (
        4 * 1024**2 + 2 * 1024 * 4096 + (3 + 1 + 1 + 4) * 1024 + 4096
    )  # matrices; biases and norms
    mergers = (
        4 * (4096 * 4096 + 4096 + 4096 * 2560 + 2560) + 2 * 1024 + 3 * 2 * 4096
    )  # the last norm is before the shuffle
    vision = 24 * block + (3 * 2 * 16 * 16 + 1) * 1024 + 2304 * 1024 + mergers
    assert count["4B"] == 36 * layer + 151936 * 2560 + 2560 + vision == 4_437_815_808
    assert count["2B"] == 2_127_532_032


def test_account_by_hand(shared):
    """The 4B policy with a discriminator upcycled from 2B, on 8 ranks."""
    folder = shared / "data/qwen3vl"
    args = arguments(
        align, folder / "4B", disc_init=str(folder / "2B"), slots=16, checkpointing=True
    )
    with torch.device("meta"):
        policy, disc = model.load(args.policy), align.load_discriminator(args)
    rows = memory.account(args, 8, policy, disc)
    held = {what: n for _, what, n in rows}
    assert held["policy: parameters"] == pytest.approx(4_437_815_808 * 4 / 8, rel=1e-4)
    experts = (
        2_127_532_032 + 28 * (3 * 3 * 2048 * 6144 + 4 * 2048) + 2048
    )  # three copies more, routers, head
    assert held["discriminator: AdamW"] == pytest.approx(experts * 8 / 8, rel=1e-4)
    assert held["rollout copy of the policy"] == 4_437_815_808 * 2
    assert held["KV cache, 16 rows of 8192"] == 16 * 8192 * 36 * 2 * 8 * 128 * 2
    phases = sums(rows)
    assert phases["policy's update"] < 25 * GB and phases["always"] < 30 * GB
    # on the CPU: all that is sharded; two nodes: shards twice as large; one rank in float32: no copy, nothing gathered
    offloaded = sums(memory.account(arguments(align, folder, offload=True), 8, policy, disc))
    assert offloaded["always"] == held["rollout copy of the policy"]
    twice = {
        what: n for _, what, n in memory.account(arguments(align, folder, nodes=2), 8, policy, disc)
    }
    assert twice["policy: AdamW"] == pytest.approx(2 * held["policy: AdamW"], rel=1e-4)
    alone = memory.account(arguments(rlvr, folder, dtype="float32", kl=0.1), 1, policy)
    assert (
        sums(alone)["always"] == 4_437_815_808 * 4 * 5
    )  # parameters, gradients, two moments, reference
    assert not [what for _, what, _ in alone if "gathered" in what or "copy" in what]


@pytest.fixture
def tiny(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(tiny_config(hidden_size=40).to_dict()))
    return tmp_path


@pytest.mark.parametrize("stage", [sft, align, rlvr], ids=lambda stage: stage.__name__)
def test_a_configuration_is_enough(tiny, capsys, monkeypatch, stage):
    monkeypatch.chdir(tiny)
    monkeypatch.setenv("WORLD_SIZE", "8")
    stage.main(arguments(stage, tiny))
    out = capsys.readouterr().out
    assert "each of 8 ranks, bfloat16" in out and "fits in 80 GB: yes" in out and "AdamW" in out
    assert ("discriminator's update" in out) == (stage is align) and ("KV cache" in out) == (
        stage is not sft
    )
    assert not dist.is_initialized() and [p.name for p in tiny.iterdir()] == ["config.json"]
    monkeypatch.setenv("RANK", "1")
    stage.main(arguments(stage, tiny))
    assert capsys.readouterr().out == ""  # under torchrun one rank prints
    if stage is sft:
        monkeypatch.delenv("RANK")
        sft.main(sft.Args(init=str(ROOT / "runs/tiny.json"), data="none", out="none", dry_run=True))
        assert "fits in 80 GB: yes" in capsys.readouterr().out


@pytest.mark.parametrize("ranks", [3, 8])
def test_shards_are_those_of_fsdp(tiny, ranks):
    """The first rank's shards, which are the largest; 4 experts on 8 ranks are cut along another dimension."""
    args = arguments(align, tiny, dtype="float32")
    with torch.device("meta"):
        policy, disc = model.load(args.policy), align.load_discriminator(args)
    held = {what: n for _, what, n in memory.account(args, ranks, policy, disc)}
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=ranks)
    try:
        disc = disc.to_empty(device="cpu")
        model.shard(
            disc,
            disc.model,
            args,
            SimpleNamespace(device=torch.device("cpu"), world=ranks),
            exact=[disc.v_head],
        )
        local = [p.to_local() for p in disc.parameters()]
    finally:
        dist.destroy_process_group()
    assert sum(4 * p.numel() for p in local) == held["discriminator: parameters"]
    total = sum(4 * p.numel() for p in disc.parameters())
    assert held["discriminator: parameters"] < total / ranks * 1.15


class Dense:
    """Attention that copies nothing, as on CUDA."""

    def attend(self, query, key, value, scaling):
        return F.scaled_dot_product_attention(
            query, key, value, is_causal=True, scale=scaling
        ).transpose(1, 2)


def peak(compute):
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        compute()
    held = most = 0
    for event in sorted(recorded.profiler.kineto_results.events(), key=lambda e: e.start_ns()):
        held += event.nbytes() if event.name() == "[memory]" else 0
        most = max(most, held)
    return most


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize(
    "dtype", [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.slow)], ids=str
)
@pytest.mark.parametrize("player", ["policy", "discriminator"])
def test_activations_are_what_is_measured(player, dtype, checkpointing):
    config = tiny_config(
        hidden_size=64,
        intermediate_size=192,
        num_hidden_layers=4,
        num_attention_heads=8,
        head_dim=16,
        num_key_value_heads=8,
        rope_scaling={"rope_type": "default", "mrope_section": [4, 2, 2]},
    )
    for name, value in dict(
        hidden_size=48, depth=4, num_heads=4, intermediate_size=128, out_hidden_size=64
    ).items():
        setattr(config.vision_config, name, value)
    hf = Qwen3VLForConditionalGeneration(config).train()
    hf.model.language_model.config._attn_implementation = "packs"
    prompt = tiny_prompt(hf, length=64, grid=(1, 8, 16))
    prompt.pixel_values = prompt.pixel_values.to(dtype)
    tree = Tree(prompt, [[5] * 96] * 4, kinds=[0, 1] * 2)
    pack = make([tree], [(0, list(range(4)))])
    pack.layout = Dense()
    if player == "policy":
        module = hf.to(dtype)

        def compute():
            token_logps(
                run(hf.model, pack)[pack.source], hf.lm_head.weight, pack.target
            ).sum().backward()
    else:
        module = align.Discriminator(hf.model, "moe").to(dtype)
        module.v_head.float()

        def compute():
            scores, balance, _ = module(pack)
            (scores.sum() + balance.sum()).backward()

    for p in module.parameters():
        p.grad = torch.zeros_like(p)  # none is made during the measurement
    if checkpointing:
        model.recompute(hf.model)
    compute()
    found = memory.activations(
        hf.model,
        len(pack.ids),
        128,
        dtype.itemsize,
        checkpointing,
        2 if player != "policy" else None,
    )
    assert 0.95 < found / peak(compute) < 1.15
