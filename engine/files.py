"""
Checkpoints on disk: found, checked before anything is built from them, and the discriminator's format.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForImageTextToText

from engine.ranks import is_main

# What a checkpoint folder holds besides weights and config.json: copied as it is, so that any server reads it.
PROCESSOR_FILES = (
    "tokenizer*",
    "vocab.json",
    "merges.txt",
    "added_tokens.json",
    "special_tokens_map.json",
    "*preprocessor_config.json",
    "processor_config.json",
    "chat_template*",
    "generation_config.json",
)


def find(path, inside=("last", "")) -> Path:
    """The folder of a checkpoint: the first of the folders `inside` the folder `path` with a config.json ("last": of a run
    folder, "": itself), or the hub's model of that name, fetched or from the cache."""
    for name in inside:
        if Path(path, name, "config.json").exists():
            return Path(path, name)
    if Path(path).is_dir():
        raise FileNotFoundError(
            f"{path} has no config.json: neither a checkpoint nor a run folder with one in last/"
        )
    if str(path).startswith((".", "/", "ckpt")) or str(path).count("/") > 1:
        raise FileNotFoundError(f"{path}: no such folder (and not the name of a model on the hub)")
    from huggingface_hub import snapshot_download

    weights = ("config.json", "*.safetensors", "*.safetensors.index.json")
    return Path(snapshot_download(str(path), allow_patterns=[*weights, *PROCESSOR_FILES]))


def read_files(folder, *more):
    """(config.json as a dict, paths of the safetensors) of a checkpoint. ValueError naming the first file, of `more` JSON too,
    that is missing or broken: transformers would take the sizes of a large model, or make an empty tokenizer."""
    file = Path(folder, "config.json")
    try:
        config = json.loads(file.read_text("utf-8"))
        if not config.get("vision_config") or not (
            config.get("text_config") or config.get("hidden_size")
        ):  # flat: older ones
            raise KeyError("text_config, vision_config: not of a vision-language model")
        file = Path(folder, "model.safetensors.index.json")
        names = (
            json.loads(file.read_text())["weight_map"].values()
            if file.exists()
            else ["model.safetensors"]
        )
        for file in (files := [Path(folder, name) for name in sorted(set(names))]):
            with safe_open(file, "pt") as tensors:
                if odd := {tensors.get_slice(k).get_dtype() for k in tensors.keys()} - {
                    "F64",
                    "F32",
                    "F16",
                    "BF16",
                }:
                    raise TypeError(f"numbers of type {min(odd)}: quantized?")
        for file in [Path(folder, name) for name in more]:
            json.loads(file.read_text("utf-8"))
    except Exception as error:  # safetensors has its own, which is no OSError
        raise ValueError(
            f"{file} is missing, broken or not what is read here ({type(error).__name__}: {error}). Get it again: "
            "weights come only from whole safetensors, in floats"
        ) from None
    return config, files


def expect_none(folder, odd):
    """ValueError for tensors that are missing, too many or of a wrong shape: transformers only warns, and draws numbers."""
    if odd:
        raise ValueError(
            f"{folder}: its tensors and its config.json differ in {len(odd)} names or shapes, first "
            f"{min(map(str, odd))}; get it again, or start from another checkpoint"
        )


def copy_processor(source, folder):
    for pattern in PROCESSOR_FILES:
        for file in Path(source).glob(pattern):
            if file.is_file() and not (Path(folder) / file.name).exists():
                shutil.copy(file, folder)


# ------------------------------------------------------------------------------------ the discriminator's file format
def write_backbone(state, config, extra, source, folder, mixture=None):
    """Write the full state dict `state` of a model without language-model head, with `extra` in its config.json.

    mixture: (experts, experts per token) of layers that became mixtures: then a Qwen3-VL's configuration is Qwen3-VL-MoE's
    of transformers 4.57, as of the released discriminator. Rank 0 writes.
    """
    if not is_main():
        return
    config = config.to_dict()
    if mixture:
        text = config["text_config"]
        text |= {
            "moe_intermediate_size": text["intermediate_size"],
            "num_experts": mixture[0],
            "norm_topk_prob": True,
            "num_experts_per_tok": mixture[1],
            "decoder_sparse_step": 1,
            "mlp_only_layers": [],
        }
        if (
            config["model_type"] == "qwen3_vl"
        ):  # other families have no such class: only `read_backbone` opens theirs
            text["model_type"] = "qwen3_vl_moe_text"
            config |= {
                "model_type": "qwen3_vl_moe",
                "architectures": ["Qwen3VLMoeForConditionalGeneration"],
            }
        config["transformers_version"] = "4.57.0"
    Path(folder).mkdir(parents=True, exist_ok=True)
    Path(folder, "config.json").write_text(json.dumps(config | extra, indent=1))
    save_file(
        {k: v.contiguous() for k, v in state.items()},
        Path(folder, "model.safetensors"),
        {"format": "pt"},
    )
    copy_processor(source, folder)


def read_backbone(path):
    """(dense model without head and with random weights, all tensors, config as a dict) of what `write_backbone` wrote,
    in a folder, a run folder, its last/ or warmup/, or the hub's model of that name.

    ValueError for experts in another layout than 4.57's, (E, D, 2I) and (E, I, D): shapes cannot tell it from version
    5's, (E, 2I, D), where 2I = D or I = D, so the version in the configuration decides.
    """
    folder = find(path, ("last/discriminator", "discriminator", "warmup/last", "last", ""))
    config, files = read_files(folder)
    state = {
        k: v.float() for file in files for k, v in load_file(file).items() if k != "lm_head.weight"
    }
    dense, text = dict(config), config["text_config"]
    if text.get("num_experts"):
        if not str(config.get("transformers_version", "")).startswith("4."):
            raise ValueError(
                f"{folder}: its experts were saved by transformers {config.get('transformers_version')}; only the "
                "layout of version 4 is read. Save it again with transformers 4.57"
            )
        if config["model_type"] == "qwen3_vl_moe":
            dense |= {
                "model_type": "qwen3_vl",
                "vision_config": config["vision_config"] | {"model_type": "qwen3_vl"},
            }
            dense["text_config"] = text | {
                "model_type": "qwen3_vl_text",
                "intermediate_size": text["moe_intermediate_size"],
            }
    hf = AutoModelForImageTextToText.from_config(AutoConfig.for_model(**dense), dtype=torch.float32)
    return hf.model, state, config


def same_input(a, b):
    """ValueError where two configurations do not read the same token ids and image patches."""
    for part, key in (
        ("text", "vocab_size"),
        ("vision", "patch_size"),
        ("vision", "spatial_merge_size"),
    ):
        x, y = (getattr(getattr(c, f"{part}_config"), key) for c in (a, b))
        if x != y:
            raise ValueError(
                f"discriminator and policy differ in {key} ({x}, {y}), so they cannot read the same tokens and "
                "patches: upcycle a checkpoint of the policy's family (--disc_init)"
            )
