"""A tiny Qwen3-VL (real architecture, random weights), prompts with and without images, paths."""

import contextlib
import json
import os
import random
import socket
import sys
from pathlib import Path
from types import SimpleNamespace

os.environ.setdefault("HF_HUB_OFFLINE", "1")
ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT.parent / "shared"
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import pytest  # noqa: E402
import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration  # noqa: E402

from engine.attention import adopt  # noqa: E402

torch.set_num_threads(1)
VOCAB, IMAGE, VIDEO, START, STOP, PAD, EOS = 64, 60, 61, 58, 59, 0, 1


@pytest.fixture(autouse=True)
def no_process_group_is_left():
    """A stage that ends with an error leaves its group behind, as it should: the process ends. Here
    it goes on, and a later test that forks would hang in the group's first collective."""
    yield
    if dist.is_initialized():
        dist.destroy_process_group()


# Of one visual token, as the tiny model takes it
BLANK = {"pixel_values": torch.zeros(4, 3 * 2 * 16), "image_grid_thw": torch.tensor([[1, 2, 2]])}


def tiny_config(**text):
    return Qwen3VLConfig(
        text_config=dict(
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=8,
            intermediate_size=48,
            vocab_size=VOCAB,
            rope_theta=10000.0,
            eos_token_id=EOS,
            pad_token_id=None,
            rope_scaling={
                "rope_type": "default",
                "mrope_section": [2, 1, 1],
                "mrope_interleaved": True,
            },
            tie_word_embeddings=True,
            max_position_embeddings=512,
        )
        | text,
        vision_config=dict(
            depth=2,
            hidden_size=32,
            num_heads=2,
            intermediate_size=48,
            patch_size=4,
            spatial_merge_size=2,
            temporal_patch_size=2,
            out_hidden_size=32,
            num_position_embeddings=64,
            deepstack_visual_indexes=[0],
        ),
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        vision_start_token_id=START,
        vision_end_token_id=STOP,
        tie_word_embeddings=text.get("tie_word_embeddings", True),
    )


def tiny_hf(seed=0, packs=True, **text):
    torch.manual_seed(seed)
    hf = Qwen3VLForConditionalGeneration(tiny_config(**text)).eval()
    for p in (
        hf.parameters()
    ):  # larger than the usual initialisation, so that mistakes show in the logits
        if p.ndim > 1:
            p.data.normal_(0, 0.15)
    if packs:
        adopt(hf.model)
    hf.model.blank_image = BLANK
    return hf


def tiny_prompt(hf, length=5, grid=(1, 4, 4), seed=0):
    """A prompt of `length` text tokens, an image of `grid` (None: no image) in front."""
    g = torch.Generator().manual_seed(seed)
    ids = torch.randint(2, 50, (length,), generator=g)
    images = {}
    if grid:
        n = grid[0] * grid[1] * grid[2]
        ids = torch.cat([torch.tensor([START] + [IMAGE] * (n // 4) + [STOP]), ids])
        images["pixel_values"] = torch.randn(n, 3 * 2 * 16, generator=g)
        images["image_grid_thw"] = torch.tensor([grid])
    image = (ids == IMAGE).int()
    positions, _ = hf.model.get_rope_index(
        ids[None], mm_token_type_ids=image[None], image_grid_thw=images.get("image_grid_thw")
    )
    return SimpleNamespace(
        ids=ids,
        positions=positions[:, 0],
        next_position=int(positions.max()) + 1,
        images=images,
        image_mask=image.bool(),
        blocks=None,
    )


def plain_logits(hf, prompt, ids):
    """transformers' own forward on one row: no packs, images one by one, patches by convolution."""
    full = torch.cat([prompt.ids, torch.tensor(ids, dtype=torch.long)])[None]
    configs, patches = (
        (hf.model.language_model.config, hf.model.visual.config),
        hf.model.visual.patch_embed.proj,
    )
    ours, kind = [c._attn_implementation for c in configs], type(patches)
    for config in configs:
        config._attn_implementation = "sdpa"
    patches.__class__, hf.model.rope_deltas = torch.nn.Conv3d, None
    try:
        return hf(
            input_ids=full,
            mm_token_type_ids=(full == IMAGE).int(),
            **prompt.images,
        ).logits[0]
    finally:
        patches.__class__ = kind
        for config, implementation in zip(configs, ours, strict=True):
            config._attn_implementation = implementation


def strict_records(file):
    """The records of a JSONL file, as the strictest reader takes them: no NaN, and each field has
    one type in all of them, or is null."""
    lines = Path(file).read_text(encoding="utf-8").splitlines()
    found = [json.loads(line, parse_constant=pytest.fail) for line in lines]
    kinds = {}
    for record in found:
        for name, value in flat(record):
            if value is not None:
                kinds.setdefault(name, set()).add(type(value).__name__)
    several = {name: types for name, types in kinds.items() if len(types) > 1}
    assert not several, f"{file}: fields with several types: {several}"
    return found


def flat(value, name=""):
    """(name, value) of the leaves of plain values; all items of a list have one name."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from flat(inner, f"{name}.{key}")
    elif isinstance(value, list):
        yield f"{name}[]", []
        for inner in value:
            yield from flat(inner, f"{name}[]")
    else:
        yield name, value


def free_ports(n):
    """Below the range that outgoing connections take theirs from: what is free now stays free. Not
    by the seed that a stage has set: two suites on one machine would draw the same."""
    draw = random.SystemRandom().randrange
    ports = []
    while len(ports) < n:
        with (
            contextlib.suppress(OSError),
            socket.create_server(("127.0.0.1", port := draw(10_000, 30_000))),
        ):
            ports += [str(port)] if str(port) not in ports else []
    return ports


@pytest.fixture
def hf():
    return tiny_hf()


@pytest.fixture(scope="session")
def shared():
    if not SHARED.exists():
        pytest.skip("needs ../shared, which is not here")
    return SHARED
