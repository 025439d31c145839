"""What all bench scripts share: models of small and of real shapes, timing in turn, peak memory,
and the one JSON line that each prints."""

import argparse
import json
import platform
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

# Text model and vision tower: one shape that a CPU runs in a second, and Qwen3-VL's published ones.
SMALL_TEXT = {
    "hidden_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 32,
    "intermediate_size": 768,
    "vocab_size": 4096,
}
SMALL_VISION = {
    "depth": 4,
    "hidden_size": 128,
    "num_heads": 4,
    "intermediate_size": 512,
    "patch_size": 8,
    "num_position_embeddings": 256,
    "deepstack_visual_indexes": [0, 1],
}
TEXT_2B = {
    "hidden_size": 2048,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "intermediate_size": 6144,
    "vocab_size": 151_936,
}
TEXT_4B = {
    "hidden_size": 2560,
    "num_hidden_layers": 36,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "intermediate_size": 9728,
    "vocab_size": 151_936,
}
VISION = {
    "depth": 24,
    "hidden_size": 1024,
    "num_heads": 16,
    "intermediate_size": 4096,
    "patch_size": 16,
    "num_position_embeddings": 2304,
    "deepstack_visual_indexes": [5, 11, 17],
}
SIZES = {
    "small": (SMALL_TEXT, SMALL_VISION),
    "2B": (TEXT_2B, VISION),
    "4B": (TEXT_4B, VISION),
}


def model(size, device="cpu", seed=0, layers=None):
    """A Qwen3-VL of a shape in SIZES with random weights: float32 on a CPU, bfloat16 on CUDA.

    layers: another number of text layers than the shape's.
    """
    text, vision = SIZES[size]
    sixth = text["head_dim"] // 6
    rope = {
        "rope_type": "default",
        "rope_theta": 5e6,
        "mrope_section": [text["head_dim"] // 2 - 2 * sixth, sixth, sixth],
        "mrope_interleaved": True,
    }
    vocabulary = text["vocab_size"]
    config = Qwen3VLConfig(
        text_config={
            **text,
            "num_hidden_layers": layers or text["num_hidden_layers"],
            "rope_parameters": rope,
            "eos_token_id": 2,
            "pad_token_id": None,
            "tie_word_embeddings": True,
            "max_position_embeddings": 32768,
        },
        vision_config={
            **vision,
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
    dtype = torch.bfloat16 if torch.device(device).type == "cuda" else torch.float32
    with torch.device(device):
        hf = Qwen3VLForConditionalGeneration._from_config(config, dtype=dtype)
    hf.model.blank_image = prompt(hf, 1, 2).images
    return hf


def prompt(hf, text, side, seed=0):
    """A prompt of `text` random tokens behind an image of side x side patches, (side / 2)^2
    tokens. side 0: no image."""
    config = hf.config
    random = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, config.text_config.vocab_size - 8, (text,), generator=random)
    images = {}
    if side:
        image = [config.image_token_id] * (side // 2) ** 2
        image = [config.vision_start_token_id, *image, config.vision_end_token_id]
        ids = torch.cat([torch.tensor(image), ids])
        channels = 6 * config.vision_config.patch_size**2  # 3 colours, 2 frames
        images["pixel_values"] = torch.randn(side**2, channels, generator=random)
        images["image_grid_thw"] = torch.tensor([[1, side, side]])
    mask = ids == config.image_token_id
    positions = torch.arange(len(ids)).expand(3, -1)
    if side:
        found = hf.model.get_rope_index(
            ids[None],
            mm_token_type_ids=mask[None].int(),
            image_grid_thw=images["image_grid_thw"],
        )
        positions = found[0][:, 0]
    return Prompt(
        ids=ids,
        positions=positions,
        next_position=int(positions.max()) + 1,
        images=images,
        image_mask=mask,
        blocks=None,
        example=None,
    )


def lengths(n, mean, seed=0):
    """n ragged lengths around `mean`, as rollouts have: log-normal, at least a quarter of it."""
    random = torch.Generator().manual_seed(seed)
    drawn = torch.randn(n, generator=random).mul(0.5).exp()
    scaled = (drawn * mean / drawn.mean()).round().long()
    return scaled.clamp(min=mean // 4).tolist()


def device_here(name):
    """--device of a script: the name itself, where PyTorch has such a device."""
    if name != "cpu" and not torch.cuda.is_available():
        raise argparse.ArgumentTypeError(
            f"PyTorch {torch.__version__} finds no CUDA here; --device cpu tries the script itself"
        )
    return name


def clock(contenders, device="cpu", repeat=5, warmup=1):
    """Seconds of each of `contenders`, {name: function} -> {name: `repeat` numbers}.

    They run one after the other in each round, so that a slow minute of the machine hits all.
    """
    seconds = {name: [] for name in contenders}
    for number in range(warmup + repeat):
        for name, run in contenders.items():
            wait_for(device)
            start = time.perf_counter()
            run()
            wait_for(device)
            if number >= warmup:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def wait_for(device):
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize()


def seconds_of(run, device="cpu"):
    """Seconds of one call, without a warm-up."""
    return clock({"it": run}, device, repeat=1, warmup=0)["it"][0]


def peak(run, device="cpu"):
    """Bytes that `run()` holds at most beyond what was there before.

    On a CPU: torch's own allocations, by its profiler.
    """
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        run()
    held = 0
    most = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            most = max(most, held)
    return most


def median(values):
    return statistics.median(values)


def report(claim, **figures):
    """Print the one JSON line: the figures, with four digits, and what they were measured on."""
    hardware = f"{platform.machine()}, {torch.get_num_threads()} threads"
    if figures.get("device", "cpu") != "cpu":
        hardware = torch.cuda.get_device_name()
    line = {
        "claim": claim,
        **_rounded(figures),
        "hardware": hardware,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    print(json.dumps(line), flush=True)


def _rounded(x):
    if isinstance(x, dict):
        return {name: _rounded(value) for name, value in x.items()}
    if isinstance(x, list | tuple):
        return [_rounded(value) for value in x]
    if isinstance(x, float):
        return float(f"{x:.4g}")
    return x
