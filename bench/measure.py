"""What all bench scripts share: timing contenders in turn, peak memory, small and real-shaped models, one JSON line."""

import json
import platform
import resource
import statistics
import sys
import time
from pathlib import Path

import torch
import transformers
from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from data import Prompt  # noqa: E402

VISION = {
    "depth": 24,
    "hidden_size": 1024,
    "num_heads": 16,
    "intermediate_size": 4096,
    "patch_size": 16,
    "num_position_embeddings": 2304,
    "deepstack_visual_indexes": [5, 11, 17],
}
SIZES = {  # text, vision: Qwen3-VL's published shapes, and one that a CPU runs in a second
    "small": (
        {
            "hidden_size": 256,
            "num_hidden_layers": 4,
            "num_attention_heads": 8,
            "num_key_value_heads": 4,
            "head_dim": 32,
            "intermediate_size": 768,
            "vocab_size": 4096,
        },
        {
            "depth": 4,
            "hidden_size": 128,
            "num_heads": 4,
            "intermediate_size": 512,
            "patch_size": 8,
            "num_position_embeddings": 256,
            "deepstack_visual_indexes": [0, 1],
        },
    ),
    "2B": (
        {
            "hidden_size": 2048,
            "num_hidden_layers": 28,
            "num_attention_heads": 16,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "intermediate_size": 6144,
            "vocab_size": 151_936,
        },
        VISION,
    ),
    "4B": (
        {
            "hidden_size": 2560,
            "num_hidden_layers": 36,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "intermediate_size": 9728,
            "vocab_size": 151_936,
        },
        VISION,
    ),
}


def model(size, device="cpu", seed=0, layers=None):
    """A Qwen3-VL of a shape in SIZES with random weights: float32 on a CPU, bfloat16 on CUDA. layers: fewer text layers."""
    text, vision = SIZES[size]
    section = [text["head_dim"] // 2 - 2 * (text["head_dim"] // 6), *[text["head_dim"] // 6] * 2]
    rope = {
        "rope_type": "default",
        "rope_theta": 5e6,
        "mrope_section": section,
        "mrope_interleaved": True,
    }
    vocabulary = text["vocab_size"]
    config = Qwen3VLConfig(
        text_config=text
        | {
            "rope_parameters": rope,
            "eos_token_id": 2,
            "pad_token_id": None,
            "tie_word_embeddings": True,
            "max_position_embeddings": 32768,
            "num_hidden_layers": layers or text["num_hidden_layers"],
        },
        vision_config=vision
        | {
            "out_hidden_size": text["hidden_size"],
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
        },
        image_token_id=vocabulary - 1,
        video_token_id=vocabulary - 2,
        vision_start_token_id=vocabulary - 3,
        vision_end_token_id=vocabulary - 4,
        tie_word_embeddings=True,
    )
    torch.manual_seed(seed)
    kind = torch.bfloat16 if torch.device(device).type == "cuda" else torch.float32
    with torch.device(device):
        return Qwen3VLForConditionalGeneration._from_config(config, dtype=kind)


def prompt(hf, text, side, seed=0):
    """A prompt of `text` random tokens behind an image of side x side patches (0: none), (side / 2)^2 tokens."""
    random, config, pixels, grid = torch.Generator().manual_seed(seed), hf.config, None, None
    ids = torch.randint(3, config.text_config.vocab_size - 8, (text,), generator=random)
    if side:
        image = (
            [config.vision_start_token_id]
            + [config.image_token_id] * (side // 2) ** 2
            + [config.vision_end_token_id]
        )
        ids, grid = torch.cat([torch.tensor(image), ids]), torch.tensor([[1, side, side]])
        pixels = torch.randn(side**2, 6 * config.vision_config.patch_size**2, generator=random)
    mask = ids == config.image_token_id
    positions = torch.arange(len(ids)).expand(3, -1)
    if side:
        positions = hf.model.get_rope_index(
            ids[None], mm_token_type_ids=mask[None].int(), image_grid_thw=grid
        )[0][:, 0]
    return Prompt(ids, positions, int(positions.max()) + 1, pixels, grid, mask, None)


def lengths(n, mean, seed=0):
    """n ragged lengths around `mean`, as rollouts have: log-normal, at least a quarter of the mean."""
    random = torch.Generator().manual_seed(seed)
    drawn = torch.randn(n, generator=random).mul(0.5).exp()
    return (drawn * mean / drawn.mean()).round().long().clamp(min=mean // 4).tolist()


def clock(contenders, device="cpu", repeat=5, warmup=1):
    """{name: function} -> {name: [seconds, ...]}: one after the other in each round, so that a slow minute hits all."""
    sync = torch.cuda.synchronize if torch.device(device).type == "cuda" else lambda: None
    seconds = {name: [] for name in contenders}
    for i in range(warmup + repeat):
        for name, run in contenders.items():
            sync()
            start = time.perf_counter()
            run()
            sync()
            if i >= warmup:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def seconds_of(run, device="cpu"):
    return clock({"it": run}, device, repeat=1, warmup=0)["it"][0]


def peak(run, device="cpu"):
    """Bytes that `run()` holds at most beyond what was there before. CPU: torch's own allocations, by its profiler."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        run()
    held = most = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            most = max(most, held)
    return most


def median(seconds):
    return statistics.median(seconds)


def report(claim, **figures):
    """Print the one line; floats with four digits."""

    def short(x):
        if isinstance(x, dict):
            return {k: short(v) for k, v in x.items()}
        if isinstance(x, list | tuple):
            return [short(v) for v in x]
        return float(f"{x:.4g}") if isinstance(x, float) else x

    cuda = figures.get("device", "cpu") != "cpu"
    where = (
        torch.cuda.get_device_name()
        if cuda
        else f"{platform.machine()}, {torch.get_num_threads()} threads"
    )
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    print(json.dumps({"claim": claim, **short(figures), "hardware": where, **versions}), flush=True)


def rss():  # highest resident memory of this process so far, bytes
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
