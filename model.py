"""
The loader that all stages share: open, save and shard a vision-language policy, or make one from a configuration.

    policy = load("ckpt/sft")                  # or a hub name; any Qwen3-VL checkpoint in transformers' layout
    logp = policy(pack)                        # (S,) log-probs of the pack's scored tokens
    save(policy, "ckpt/mine")                  # opens in plain transformers, and in what builds on it

    python model.py --init runs/tiny.json --corpus data/tiny/base.jsonl --out ckpt/init      # random weights
"""

from __future__ import annotations

import argparse
import copy
import json
import shutil
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn as nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from transformers import AutoConfig, AutoModelForImageTextToText, AutoTokenizer, PreTrainedTokenizerFast
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from data import Encoder
from packs import run, token_logps

# What a checkpoint folder holds besides weights and config.json: copied as it is, so that any server reads it.
PROCESSOR_FILES = (
    "tokenizer*", "vocab.json", "merges.txt", "added_tokens.json", "special_tokens_map.json", "*preprocessor_config.json",
    "processor_config.json", "chat_template*", "generation_config.json",
)  # fmt: skip


class Policy(nn.Module):
    """A transformers vision-language model, what encodes its inputs, and log-probs over packs.

    Loss-bearing calls go through this module's forward, so that FSDP2's hooks on it run.
    """

    def __init__(self, hf, encoder, source):
        super().__init__()
        self.hf, self.encoder, self.source = hf, encoder, Path(source)

    @property
    def banned(self):
        return self.encoder.banned

    def forward(self, pack, temperature=1.0, banned=(), entropy=False):
        """Log-probs (S,) float32 of the pack's scored tokens; with `entropy` also the entropies (S,)."""
        hidden = run(self.hf.model, pack)[pack.source]
        return token_logps(hidden, self.hf.lm_head.weight, pack.target, temperature, banned, entropy)


def load(path, dtype=torch.float32, device="cpu", checkpointing=False, **encoder_options) -> Policy:
    """Open a checkpoint folder or hub name. Weights come from safetensors only and no remote code runs.

    Raises FileNotFoundError for a folder without config.json, ValueError for a model that packs cannot run.
    """
    path = str(path)
    if Path(path).is_dir() and not (Path(path) / "config.json").exists():
        raise FileNotFoundError(f"{path} has no config.json: is it a run folder? Checkpoints of a run are inside it.")
    if not Path(path).is_dir() and (path.startswith((".", "/", "ckpt")) or path.count("/") > 1):
        raise FileNotFoundError(f"{path}: no such folder (and not the name of a model on the hub)")
    hf = AutoModelForImageTextToText.from_pretrained(path, dtype=dtype, use_safetensors=True)
    return _policy(hf, _folder(path), device, checkpointing, **encoder_options)


def _policy(hf, folder, device, checkpointing=False, **encoder_options):
    if not hasattr(hf.model, "get_rope_index") or not hasattr(hf.model, "language_model"):
        raise ValueError(f"{type(hf).__name__} ({folder}): packs need a Qwen-VL model (get_rope_index, language_model)")
    hf.model.language_model.config._attn_implementation = "packs"
    if checkpointing:
        hf.gradient_checkpointing_enable({"use_reentrant": False})  # re-entrant would cut side outputs' gradients
    tokenizer = AutoTokenizer.from_pretrained(folder)
    if not tokenizer.chat_template and (folder / "chat_template.json").exists():
        tokenizer.chat_template = json.loads((folder / "chat_template.json").read_text())["chat_template"]
    images = Qwen2VLImageProcessorPil.from_pretrained(folder)
    encoder = Encoder(tokenizer, images, hf.config, hf.model.get_rope_index, **encoder_options)
    return Policy(hf.to(device), encoder, folder)


def _folder(path):
    if Path(path).is_dir():
        return Path(path)
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(path, allow_patterns=list(PROCESSOR_FILES)))


def save(policy: Policy, folder, state=None):
    """Write `policy` to `folder` in transformers' layout with its tokenizer and processor files.

    `state`: the full state dict of `policy.hf`, needed where the model is sharded (see `full_state`).
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    policy.hf.save_pretrained(folder, state_dict=state)
    copy_processor(policy.source, folder)


def copy_processor(source, folder):
    for pattern in PROCESSOR_FILES:
        for file in Path(source).glob(pattern):
            if file.is_file() and not (Path(folder) / file.name).exists():
                shutil.copy(file, folder)


# ---------------------------------------------------------------------------------------------------------- ranks


def shard(module: nn.Module, hf_model: nn.Module, dtype=torch.bfloat16):
    """FSDP2: decoder layers, the vision tower as one unit, then the root (`module`, whose forward is called).

    Parameters are gathered and computed with in `dtype`, gradients are reduced in float32. Embedding and (tied) head
    stay in the root unit.
    """
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
    for layer in hf_model.language_model.layers:
        fully_shard(layer, mp_policy=policy)
    fully_shard(hf_model.visual, mp_policy=policy)
    return fully_shard(module, mp_policy=policy)


def full_state(module: nn.Module, dtype=None):
    """The unsharded state dict, on the CPU of rank 0 (empty elsewhere). All ranks must call it."""
    if not dist.is_initialized():
        return module.state_dict()
    return get_model_state_dict(module, options=StateDictOptions(full_state_dict=True, cpu_offload=True))


class RolloutCopy:
    """The weights that rollouts are sampled with: the policy's own, or, where it is sharded, a whole copy on each rank
    that is refreshed once per step. No collective runs while decoding, so ranks may finish at different times."""

    def __init__(self, policy: Policy, dtype=None):
        """Make it before the policy is sharded."""
        self.policy, self.hf = policy, policy.hf
        if dist.is_initialized() and dist.get_world_size() > 1:
            self.hf = copy.deepcopy(policy.hf).requires_grad_(False)
            self.hf.to(dtype or self.hf.dtype)
            self.hf.model.language_model.config._attn_implementation = "packs"

    @torch.no_grad()
    def refresh(self):
        if self.hf is self.policy.hf:
            return self.hf
        for mine, theirs in zip(self.hf.parameters(), self.policy.hf.parameters(), strict=True):
            mine.copy_(theirs.full_tensor() if hasattr(theirs, "full_tensor") else theirs)  # all ranks
        return self.hf


# ------------------------------------------------------------------------------------------------- random weights

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]  # fmt: skip
SHORT_CHAT = (  # ChatML without role words: every token of a tiny model's prompt counts
    "{% for m in messages %}{{ '<|im_start|>' if m.role != 'assistant' else '' }}{% if m.content is string %}"
    "{{ m.content }}{% else %}{% for c in m.content %}{{ '<|vision_start|><|image_pad|><|vision_end|>' if c.type == "
    "'image' else c.text }}{% endfor %}{% endif %}{{ '<|im_end|>' }}{% endfor %}"
)


def init(config_file, out, corpus=(), seed=0) -> Path:
    """Write a checkpoint of random weights to the folder `out`, from a configuration of any size.

    Tokenizer and image processor are those beside `config_file`; where there are none, a word-level tokenizer is
    trained on the texts of the files in `corpus` and the image processor takes its sizes from the configuration.
    """
    config_file, out = Path(config_file), Path(out)
    out.mkdir(parents=True, exist_ok=True)
    settings = json.loads(config_file.read_text())
    vision = settings["vision_config"]
    copy_processor(config_file.parent, out)
    if not (out / "tokenizer.json").exists():
        if not corpus:
            raise FileNotFoundError(f"no tokenizer.json beside {config_file}: name a --corpus to train a small one on")
        tokenizer = train_tokenizer(corpus)
        tokenizer.save_pretrained(out)
        ids = dict(zip(SPECIAL, tokenizer.convert_tokens_to_ids(SPECIAL), strict=True))
        settings |= {"image_token_id": ids["<|image_pad|>"], "video_token_id": ids["<|video_pad|>"],
                     "vision_start_token_id": ids["<|vision_start|>"], "vision_end_token_id": ids["<|vision_end|>"]}  # fmt: skip
        settings["text_config"] |= {"vocab_size": len(tokenizer), "eos_token_id": ids["<|im_end|>"],
                                    "bos_token_id": ids["<|endoftext|>"], "pad_token_id": None}  # fmt: skip
    if not (out / "preprocessor_config.json").exists():
        cell = vision["patch_size"] * vision["spatial_merge_size"]
        Qwen2VLImageProcessorPil(
            patch_size=vision["patch_size"], merge_size=vision["spatial_merge_size"],
            temporal_patch_size=vision["temporal_patch_size"], image_mean=[0.5] * 3, image_std=[0.5] * 3,
            size={"shortest_edge": cell**2, "longest_edge": 4096 * cell**2},
        ).save_pretrained(out)  # fmt: skip
    (out / "config.json").write_text(json.dumps(settings, indent=2))
    torch.manual_seed(seed)
    hf = AutoModelForImageTextToText.from_config(AutoConfig.from_pretrained(out))
    if std := settings.get("vision_position_std"):
        nn.init.normal_(hf.model.visual.pos_embed.weight, std=std)
    hf.save_pretrained(out)
    return out


def train_tokenizer(corpus):
    """A word-level tokenizer over every text of the JSON or JSONL files in `corpus` (white space splits words)."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    from data import Rows

    def texts(value):
        if isinstance(value, str):
            yield value
        elif isinstance(value, dict | list):
            for v in value.values() if isinstance(value, dict) else value:
                yield from texts(v)

    words = sorted({w for f in corpus for row in Rows(f) for k, v in row.items() if k not in ("images", "image", "id")
                    for t in texts(v) for w in t.replace("<image>", " ").split()})  # fmt: skip
    vocabulary = {w: i for i, w in enumerate([*SPECIAL, "<unk>", *words])}
    raw = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=raw, unk_token="<unk>", pad_token="<|endoftext|>", eos_token="<|im_end|>",
        additional_special_tokens=SPECIAL[1:], clean_up_tokenization_spaces=False,
    )  # fmt: skip
    tokenizer.chat_template = SHORT_CHAT
    return tokenizer


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="write a checkpoint of random weights")
    parser.add_argument("--init", required=True, help="config.json of a Qwen3-VL of any size")
    parser.add_argument("--corpus", nargs="*", default=[], help="data files to train a small tokenizer on")
    parser.add_argument("--out", required=True)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    print(init(args.init, args.out, args.corpus, args.seed))
