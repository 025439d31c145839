"""
The loader that all stages share: open, save and shard a vision-language policy.

    policy = load("ckpt/sft")                  # or a hub name; any Qwen-VL checkpoint in transformers' layout
    logp = policy(pack)                        # (S,) log-probs of the pack's scored tokens
    save(policy, "ckpt/mine")                  # opens in plain transformers, and in what builds on it
"""

from __future__ import annotations

import copy
import json
import os
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn as nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
)
from torch.distributed.tensor import DTensor, Shard
from transformers import AutoConfig, AutoImageProcessor, AutoModelForImageTextToText, AutoTokenizer
from transformers.utils import logging

from data import SYSTEM_PROMPT, Encoder
from engine.files import copy_processor, expect_none, find, read_files
from engine.logprob import token_logps
from engine.packs import adopt, run
from engine.ranks import is_main, world

logging.disable_progress_bar()  # "Loading weights", four times per stage

# In front of a saved chat template, so that any server asks for the three parts: the system turn that users leave out.
ASKS = (
    "{%- if messages[0].role != 'system' %}{%- set messages = [{'role': 'system', 'content': "
    f"{json.dumps(SYSTEM_PROMPT)}}}] + messages %}}{{%- endif %}}"
)


class Policy(nn.Module):
    """A transformers vision-language model and what encodes its inputs. Loss-bearing calls go through this forward, so
    that FSDP2's hooks on it run."""

    def __init__(self, hf, encoder, source):
        super().__init__()
        self.hf, self.encoder, self.source = hf, encoder, Path(source)

    def forward(self, pack, temperature=1.0, banned=(), entropy=False, coefficient=None):
        """Log-probs (S,) float32 of the pack's scored tokens; with `entropy` also the entropies (S,). coefficient (S,):
        their gradient in the loss, where it is known beforehand (see logprob.py: a matrix product less)."""
        hidden = run(self.hf.model, pack)[pack.source]
        return token_logps(
            hidden, self.hf.lm_head.weight, pack.target, temperature, banned, entropy, coefficient
        )


def load(path, dtype=torch.float32, device="cpu", **encoder_options) -> Policy:
    """Open a checkpoint folder or hub name. Weights come from safetensors only and no remote code runs.

    Raises FileNotFoundError for a folder without config.json, ValueError where other files or tensors are missing or broken,
    and for a model that packs cannot run.
    """
    if (
        torch.get_default_device().type == "meta"
    ):  # --dry_run: the configuration, a file too, is enough
        config = AutoConfig.from_pretrained(find(path) if Path(path).is_dir() else path)
        return Policy(AutoModelForImageTextToText.from_config(config, dtype=dtype), None, path)
    read_files(folder := find(path), "tokenizer.json")
    options = dict(
        use_safetensors=True,
        trust_remote_code=False,
        output_loading_info=True,
        ignore_mismatched_sizes=True,
    )
    hf, found = AutoModelForImageTextToText.from_pretrained(folder, dtype=dtype, **options)
    expect_none(
        folder, {*found["missing_keys"], *found["unexpected_keys"], *found["mismatched_keys"]}
    )
    layers = set(getattr(hf.config.get_text_config(), "layer_types", None) or ["full_attention"])
    if (
        not hasattr(hf.model, "get_rope_index")
        or not hasattr(hf.model, "language_model")
        or layers != {"full_attention"}
    ):
        raise ValueError(
            f"{type(hf).__name__} ({folder}): packs need a Qwen-VL model or the like: get_rope_index, "
            f"language_model, full attention in every layer (these: {', '.join(sorted(layers))})"
        )
    adopt(hf.model)
    return Policy(hf.to(device), read_encoder(folder, hf.model, **encoder_options), folder)


def read_encoder(path, base, **options) -> Encoder:
    """The encoder of a checkpoint, for its model without head. What `save` put before the chat template comes off: here
    the data's own turns are all that a prompt holds."""
    folder = find(path)
    tokenizer, images = (
        AutoTokenizer.from_pretrained(folder),
        AutoImageProcessor.from_pretrained(folder, backend="pil"),
    )
    if not tokenizer.chat_template and (folder / "chat_template.json").exists():
        tokenizer.chat_template = json.loads((folder / "chat_template.json").read_text())[
            "chat_template"
        ]
    if tokenizer.chat_template:
        tokenizer.chat_template = tokenizer.get_chat_template().removeprefix(ASKS)
    return Encoder(tokenizer, images, base.config, base.get_rope_index, **options)


def recompute(hf):
    """Activation checkpointing, not re-entrant: that would cut the gradients of what layers put aside (load balance)."""
    getattr(hf, "activation_checkpointing_enable", hf.gradient_checkpointing_enable)(
        {"use_reentrant": False}
    )


def save(policy: Policy, folder):
    """Write `policy` to `folder` in transformers' layout with its tokenizer and processor files. All ranks call it."""
    state = full_state(policy.hf)
    if policy.hf.get_output_embeddings().weight is policy.hf.get_input_embeddings().weight:
        state.pop(
            "lm_head.weight", None
        )  # gathered twice where it is sharded; a tied head is not written
    if is_main():
        policy.hf.save_pretrained(folder, state_dict=state)
        copy_processor(policy.source, folder)
        write_template(policy.encoder.tokenizer, Path(folder))


def write_template(tokenizer, folder):
    """One chat template in one place: chat_template.jinja. It asks for the three parts where a conversation has no system
    turn, unless the vocabulary lacks the words, as the embedded world's does."""
    asks = "" if tokenizer.unk_token_id in tokenizer(SYSTEM_PROMPT)["input_ids"] else ASKS
    (folder / "chat_template.jinja").write_text(asks + tokenizer.chat_template, encoding="utf-8")
    (folder / "chat_template.json").unlink(
        missing_ok=True
    )  # of transformers 4, whose processors prefer it
    settings = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    if settings.pop("chat_template", None):
        (folder / "tokenizer_config.json").write_text(
            json.dumps(settings, indent=2, ensure_ascii=False), encoding="utf-8"
        )


# ---------------------------------------------------------------------------------------------------------- ranks
def is_sharded(args, ranks):
    """False for one process in float32: there is nothing to share or cast. ranks: their number."""
    return ranks > 1 or args.dtype != "float32" or args.offload


def cut_dimension(p, ranks):
    """Of a parameter, for FSDP over so many ranks: the first; of stacked experts, fewer than ranks may be, the next."""
    return int(p.ndim == 3 and p.shape[1] % ranks == 0)


def units(module: nn.Module, base: nn.Module):
    """What FSDP gathers at a time: decoder layers, the vision tower, then the root (`module`, whose forward is called) with
    the rest, embeddings and head. `base`: the transformers model without head inside it."""
    return *base.language_model.layers, base.visual, module


def shard(module: nn.Module, base: nn.Module, args, ranks, exact=()):
    """Activation checkpointing if asked for, then onto the device and FSDP2 of its `units`, in place; over nodes HSDP: each
    node holds all shards, gradients are summed over the nodes.

    Parameters stay float32 in shards (on the CPU with --offload), are gathered and computed with in --dtype, gradients are
    reduced in float32. Modules in `exact` compute in float32. Raises ValueError where ranks are no multiple of nodes.
    """
    if args.checkpointing:
        recompute(base)
    if not is_sharded(args, world()):
        return module.to(ranks.device)
    nodes = args.nodes or int(os.environ.get("GROUP_WORLD_SIZE", 1))  # torchrun's number of nodes
    if ranks.world % nodes:
        raise ValueError(
            f"{ranks.world} ranks on {nodes} nodes: all nodes need equally many (--nodes 1 shards over all ranks)"
        )
    shape, names = (
        ((nodes, ranks.world // nodes), ("nodes", "ranks"))
        if nodes > 1
        else ((ranks.world,), ("ranks",))
    )
    offload = (
        CPUOffloadPolicy(pin_memory=ranks.device.type == "cuda")
        if args.offload
        else OffloadPolicy()
    )
    plan = dict(
        mesh=init_device_mesh(ranks.device.type, shape, mesh_dim_names=names),
        offload_policy=offload,
        shard_placement_fn=lambda p: Shard(cut_dimension(p, shape[-1])),
    )
    for unit in exact:
        fully_shard(unit, **plan)
    precision = MixedPrecisionPolicy(
        param_dtype=getattr(torch, args.dtype), reduce_dtype=torch.float32
    )
    *parts, root = units(module, base)
    for unit in parts:
        fully_shard(unit, mp_policy=precision, **plan)
    exactly = replace(
        precision, cast_forward_inputs=False
    )  # gradients among the root's inputs: they stay exact
    fully_shard(root, mp_policy=exactly, **plan)


def full_state(module: nn.Module):
    """The unsharded state dict, adapters of peft merged: where the module is sharded, on the CPU of rank 0 and empty
    elsewhere. All ranks."""
    sharded = any(isinstance(p, DTensor) for p in module.parameters())
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    state = get_model_state_dict(module, options=options) if sharded else module.state_dict()
    whole = {k.replace(".base_layer.", "."): v for k, v in state.items() if ".lora_" not in k}
    for key in [k for k in state if ".lora_" in k and ".lora_B." not in k]:
        name, found, adapter = key.removesuffix(".weight").partition(".lora_A.")
        if not found:
            raise ValueError(f"{key}: only adapters of plain LoRA on linear layers can be merged")
        delta = (
            state[key.replace(".lora_A.", ".lora_B.")]
            @ state[key]
            * module.get_submodule(name).scaling[adapter]
        )
        whole[f"{name}.weight"] = whole[f"{name}.weight"] + delta
    return whole


class RolloutCopy:
    """The weights that rollouts are sampled with: the policy's own, or, where it is sharded, a whole copy on each rank
    in --dtype that `refresh` gathers once per step. No collective runs while decoding: ranks may finish at any time."""

    def __init__(self, policy: Policy, args, device):
        """Call it before the policy is sharded."""
        self.policy, self.hf = policy, policy.hf
        if is_sharded(
            args, world()
        ):  # parameters alone are cast: rotary frequencies in bfloat16 turn far positions astray
            cast = {
                id(p): nn.Parameter(
                    p.detach().to(device, getattr(torch, args.dtype), copy=True),
                    requires_grad=False,
                )
                for p in policy.hf.parameters()
            }
            self.hf = copy.deepcopy(policy.hf, cast).to(device)

    @torch.no_grad()
    def refresh(self):
        """Take over the policy's weights -> the transformers model to sample from. All ranks call it."""
        if self.hf is not self.policy.hf:
            for mine, theirs in zip(self.hf.parameters(), self.policy.hf.parameters(), strict=True):
                mine.copy_(theirs.full_tensor() if isinstance(theirs, DTensor) else theirs)
        return self.hf
