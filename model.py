"""
The loader that all stages share: open, save and shard a vision-language policy.

    policy = load("ckpt/sft")                  # or a hub name; any Qwen3-VL checkpoint in transformers' layout
    logp = policy(pack)                        # (S,) log-probs of the pack's scored tokens
    save(policy, "ckpt/mine")                  # opens in plain transformers, and in what builds on it
"""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path

import torch
import torch.nn as nn
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from transformers import AutoConfig, AutoModelForImageTextToText, AutoTokenizer
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.utils import logging

from data import Encoder
from logprob import token_logps
from packs import run
from ranks import is_main, world

logging.disable_progress_bar()  # "Loading weights", four times per stage

# What a checkpoint folder holds besides weights and config.json: copied as it is, so that any server reads it.
PROCESSOR_FILES = (
    "tokenizer*", "vocab.json", "merges.txt", "added_tokens.json", "special_tokens_map.json", "*preprocessor_config.json",
    "processor_config.json", "chat_template*", "generation_config.json",
)  # fmt: skip


class Policy(nn.Module):
    """A transformers vision-language model and what encodes its inputs. Loss-bearing calls go through this forward, so
    that FSDP2's hooks on it run."""

    def __init__(self, hf, encoder, source):
        super().__init__()
        self.hf, self.encoder, self.source = hf, encoder, Path(source)

    def forward(self, pack, temperature=1.0, banned=(), entropy=False):
        """Log-probs (S,) float32 of the pack's scored tokens; with `entropy` also the entropies (S,)."""
        hidden = run(self.hf.model, pack)[pack.source]
        return token_logps(hidden, self.hf.lm_head.weight, pack.target, temperature, banned, entropy)


def load(path, dtype=torch.float32, device="cpu", **encoder_options) -> Policy:
    """Open a checkpoint folder or hub name. Weights come from safetensors only and no remote code runs.

    Raises FileNotFoundError for a folder without config.json, ValueError where other files or tensors are missing or broken,
    and for a model that packs cannot run.
    """
    path = str(path)
    if Path(path, "last", "config.json").exists():  # a run folder: its newest checkpoint
        path = f"{path}/last"
    if Path(path).is_dir() and not Path(path, "config.json").exists():
        raise FileNotFoundError(f"{path} has no config.json: neither a checkpoint nor a run folder with one in last/")
    if not Path(path).is_dir() and (path.startswith((".", "/", "ckpt")) or path.count("/") > 1):
        raise FileNotFoundError(f"{path}: no such folder (and not the name of a model on the hub)")
    if Path(path).is_dir():
        read_files(path, "tokenizer.json")
    options = dict(use_safetensors=True, trust_remote_code=False, output_loading_info=True, ignore_mismatched_sizes=True)
    hf, found = AutoModelForImageTextToText.from_pretrained(path, dtype=dtype, **options)
    expect_none(path, {*found["missing_keys"], *found["unexpected_keys"], *found["mismatched_keys"]})
    folder = _folder(path)
    if not hasattr(hf.model, "get_rope_index") or not hasattr(hf.model, "language_model"):
        raise ValueError(f"{type(hf).__name__} ({folder}): packs need a Qwen-VL model (get_rope_index, language_model)")
    hf.model.language_model.config._attn_implementation = "packs"
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    if not tokenizer.chat_template and (folder / "chat_template.json").exists():
        tokenizer.chat_template = json.loads((folder / "chat_template.json").read_text())["chat_template"]
    images, positions = Qwen2VLImageProcessorPil.from_pretrained(folder), hf.model.get_rope_index
    return Policy(hf.to(device), Encoder(tokenizer, images, hf.config, positions, **encoder_options), folder)


def read_files(folder, *more):
    """(config.json as a dict, paths of the safetensors) of a checkpoint. ValueError naming the first file, of `more` JSON too,
    that is missing or broken: transformers would take the sizes of a large model, or make an empty tokenizer."""
    file = Path(folder, "config.json")
    try:
        config = json.loads(file.read_text("utf-8"))
        if not {"text_config", "vision_config"} <= {k for k, part in config.items() if isinstance(part, dict) and part}:
            raise KeyError("text_config, vision_config: not of a vision-language model")
        file = Path(folder, "model.safetensors.index.json")
        names = json.loads(file.read_text())["weight_map"].values() if file.exists() else ["model.safetensors"]
        for file in (files := [Path(folder, name) for name in sorted(set(names))]):
            with safe_open(file, "pt") as tensors:
                if odd := {tensors.get_slice(k).get_dtype() for k in tensors.keys()} - {"F64", "F32", "F16", "BF16"}:
                    raise TypeError(f"numbers of type {min(odd)}: quantized?")
        for file in [Path(folder, name) for name in more]:
            json.loads(file.read_text("utf-8"))
    except Exception as error:  # safetensors has its own, which is no OSError
        raise ValueError(f"{file} is missing, broken or not what is read here ({type(error).__name__}: {error}). Get it again: "
                         "weights come only from whole safetensors, in floats") from None  # fmt: skip
    return config, files


def expect_none(folder, odd):
    """ValueError for tensors that are missing, too many or of a wrong shape: transformers only warns, and draws numbers."""
    if odd:
        raise ValueError(f"{folder}: its tensors and its config.json differ in {len(odd)} names or shapes, first "
                         f"{min(map(str, odd))}; get it again, or start from another checkpoint")  # fmt: skip


def recompute(hf):
    """Activation checkpointing, not re-entrant: that would cut the gradients of what layers put aside (load balance)."""
    getattr(hf, "activation_checkpointing_enable", hf.gradient_checkpointing_enable)({"use_reentrant": False})


def _folder(path):
    if Path(path).is_dir():
        return Path(path)
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(path, allow_patterns=list(PROCESSOR_FILES)))


def save(policy: Policy, folder):
    """Write `policy` to `folder` in transformers' layout with its tokenizer and processor files. All ranks call it."""
    state = full_state(policy.hf)
    if policy.hf.get_output_embeddings().weight is policy.hf.get_input_embeddings().weight:
        state.pop("lm_head.weight", None)  # gathered twice where it is sharded; a tied head is not written
    if is_main():
        policy.hf.save_pretrained(folder, state_dict=state)
        copy_processor(policy.source, folder)


def copy_processor(source, folder):
    for pattern in PROCESSOR_FILES:
        for file in Path(source).glob(pattern):
            if file.is_file() and not (Path(folder) / file.name).exists():
                shutil.copy(file, folder)


# ---------------------------------------------------------------------------------------------------------- ranks
def shard(module: nn.Module, base: nn.Module, dtype, checkpointing=False, exact=()):
    """Activation checkpointing if asked for, then FSDP2, in place: decoder layers, the vision tower as one unit, then the
    root (`module`, whose forward is called and whose unit holds embeddings and head). `base`: the transformers model
    without head inside it.

    Parameters stay float32 in shards, are gathered and computed with in `dtype`, gradients are reduced in float32.
    Units in `exact` compute in float32. One process in float32 is left as it is: there is nothing to share or cast.
    """
    if checkpointing:
        recompute(base)
    if world() == 1 and dtype == torch.float32:
        return
    precision = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
    for unit in exact:
        fully_shard(unit)
    for unit in (*base.language_model.layers, base.visual, module):
        fully_shard(unit, mp_policy=precision)


def full_state(module: nn.Module):
    """The unsharded state dict: where the module is sharded, on the CPU of rank 0 and empty elsewhere. All ranks."""
    if not any(isinstance(p, DTensor) for p in module.parameters()):
        return module.state_dict()
    return get_model_state_dict(module, options=StateDictOptions(full_state_dict=True, cpu_offload=True))


class RolloutCopy:
    """The weights that rollouts are sampled with: the policy's own, or, where it is sharded, a whole copy on each rank
    in `dtype` that `refresh` gathers once per step. No collective runs while decoding: ranks may finish at any time."""

    def __init__(self, policy: Policy, dtype):
        """Call it before the policy is sharded."""
        self.policy, self.hf = policy, policy.hf
        if world() > 1 or dtype != torch.float32:
            self.hf = copy.deepcopy(policy.hf).requires_grad_(False).to(dtype)

    @torch.no_grad()
    def refresh(self):
        """Take over the policy's weights -> the transformers model to sample from. All ranks call it."""
        if self.hf is not self.policy.hf:
            for mine, theirs in zip(self.hf.parameters(), self.policy.hf.parameters(), strict=True):
                mine.copy_(theirs.full_tensor() if isinstance(theirs, DTensor) else theirs)
        return self.hf


# ------------------------------------------------------------------------------------ the discriminator's file format
def write_backbone(state, config, extra, source, folder, mixture=None):
    """Write the full state dict `state` of a model without language-model head, with `extra` in its config.json.

    mixture: (experts, experts per token) of layers that became mixtures: then the configuration is Qwen3-VL-MoE's of
    transformers 4.57, as of the released discriminator. Rank 0 writes.
    """
    if not is_main():
        return
    config = config.to_dict()
    if mixture:
        text = config["text_config"]
        text |= {"model_type": "qwen3_vl_moe_text", "moe_intermediate_size": text["intermediate_size"],
                 "num_experts": mixture[0], "num_experts_per_tok": mixture[1], "norm_topk_prob": True,
                 "decoder_sparse_step": 1, "mlp_only_layers": []}  # fmt: skip
        config |= {"model_type": "qwen3_vl_moe", "architectures": ["Qwen3VLMoeForConditionalGeneration"]}
        config["transformers_version"] = "4.57.0"
    Path(folder).mkdir(parents=True, exist_ok=True)
    Path(folder, "config.json").write_text(json.dumps(config | extra, indent=1))
    save_file({k: v.contiguous() for k, v in state.items()}, Path(folder, "model.safetensors"), {"format": "pt"})
    copy_processor(source, folder)


def read_backbone(folder):
    """(dense model without head and with random weights, all tensors, config as a dict) of what `write_backbone` wrote.

    ValueError for experts in another layout than 4.57's, (E, D, 2I) and (E, I, D): shapes cannot tell it from version
    5's, (E, 2I, D), where 2I = D or I = D, so the version in the configuration decides.
    """
    config, files = read_files(folder)
    state = {k: v.float() for file in files for k, v in load_file(file).items() if k != "lm_head.weight"}
    dense, text = dict(config), config["text_config"]
    if text.get("num_experts"):
        if not str(config.get("transformers_version", "")).startswith("4."):
            raise ValueError(f"{folder}: its experts were saved by transformers {config.get('transformers_version')}; only the "
                             "layout of version 4 is read. Save it again with transformers 4.57")  # fmt: skip
        dense |= {"model_type": "qwen3_vl", "vision_config": config["vision_config"] | {"model_type": "qwen3_vl"}}
        dense["text_config"] = text | {"model_type": "qwen3_vl_text", "intermediate_size": text["moe_intermediate_size"]}
    hf = AutoModelForImageTextToText.from_config(AutoConfig.for_model(**dense), dtype=torch.float32)
    return hf.model, state, config


def same_input(a, b):
    """ValueError where two configurations do not read the same token ids and image patches."""
    for part, key in (("text", "vocab_size"), ("vision", "patch_size"), ("vision", "spatial_merge_size")):
        x, y = (getattr(getattr(c, f"{part}_config"), key) for c in (a, b))
        if x != y:
            raise ValueError(f"discriminator and policy differ in {key} ({x}, {y}), so they cannot read the same tokens and "
                             "patches: upcycle a checkpoint of the policy's family (--disc_init)")  # fmt: skip
