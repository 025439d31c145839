"""
The loader that all stages share: open, save and shard a vision-language policy.

    policy = load("ckpt/sft")     # or a hub name; any checkpoint of docs/models.md
    logp = policy(pack)           # (S,) log-probs of the pack's scored tokens
    save(policy, "ckpt/mine")     # opens in plain transformers, and in what builds on it
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
from transformers import AutoModelForImageTextToText
from transformers.utils import logging

from data import open_encoder, write_template
from engine import states
from engine.attention import adopt, forward_pack
from engine.families import compute_in, image_side, keep_recording, obstacle, text_of
from engine.files import (
    copy_processor,
    expect_none,
    find,
    open_config,
    read_files,
    with_older_experts,
    write_config,
)
from engine.images import blank_image
from engine.logprob import token_logps
from engine.ranks import is_main, world

logging.disable_progress_bar()  # "Loading weights", four times per stage


class Policy(nn.Module):
    """A transformers vision-language model and what encodes its inputs. Loss-bearing calls go
    through this forward, so that FSDP2's hooks on it run.
    """

    def __init__(self, hf, encoder, source):
        super().__init__()
        self.hf = hf
        self.encoder = encoder
        self.source = Path(source)  # the folder that it was loaded from

    def forward(self, pack, temperature=1.0, banned=(), entropy=False, coefficient=None):
        """Log-probs (S,) float32 of the pack's scored tokens; with `entropy` also the entropies
        (S,). coefficient (S,): their gradient in the loss, where it is known beforehand (a matrix
        product less, see engine/logprob.py).
        """
        hidden = forward_pack(self.hf.model, pack)  # (T, D)
        hidden = hidden[pack.source]  # (S, D)
        head = self.hf.lm_head.weight  # (V, D)
        return token_logps(hidden, head, pack.target, temperature, banned, entropy, coefficient)


# ------------------------------------------------------------------------------ open and save
def load(path, dtype=torch.float32, device="cpu", **encoder_options) -> Policy:
    """Open a checkpoint folder, a run folder, or the hub's model of that name.

    Weights come from safetensors only, and no remote code runs. Raises FileNotFoundError for a
    folder without config.json; ValueError where other files or tensors are missing or broken, and
    for a model that packs cannot run.
    """
    folder = find(path)
    read_files(folder, "tokenizer.json")
    hf, found = AutoModelForImageTextToText.from_pretrained(
        folder,
        config=open_config(folder),
        dtype=dtype,
        use_safetensors=True,
        trust_remote_code=False,
        output_loading_info=True,
        ignore_mismatched_sizes=True,  # they are in `found`
    )
    odd = {*found["missing_keys"], *found["unexpected_keys"], *found["mismatched_keys"]}
    expect_none(folder, odd)
    expect_packs_run(hf, folder)
    adopt(hf.model)
    encoder = open_encoder(folder, hf.model, **encoder_options)
    hf.model.blank_image = blank_image(encoder.images.image_processor, hf.model)
    expect_rows(hf, encoder.tokenizer, folder)
    return Policy(hf.to(device), encoder, folder)


def skeleton(path) -> Policy:
    """A policy without weights, on the meta device, from the configuration alone: for accounts of
    memory. path: as for `load`, or a config.json.
    """
    config = open_config(find(path) if Path(path).is_dir() else path)
    with torch.device("meta"):
        hf = AutoModelForImageTextToText.from_config(config, dtype=torch.float32)
    return Policy(hf, None, path)


def is_tied(hf):
    """Whether the head is the embedding itself, whatever the configuration says."""
    return hf.get_output_embeddings().weight is hf.get_input_embeddings().weight


def expect_packs_run(hf, folder):
    """ValueError for a model whose parts or layers are not what packs need."""
    why = obstacle(hf)
    if why is None:
        why = states.obstacle(hf)
    if why is not None:
        raise ValueError(f"{type(hf).__name__} ({folder}): {why}")


def expect_rows(hf, tokenizer, folder):
    """ValueError for token ids without a row in the embedding: looking one up would fail, or on
    CUDA read something else.
    """
    rows = len(hf.get_input_embeddings().weight)
    beyond = [token for token, number in tokenizer.get_vocab().items() if number >= rows]
    if beyond:
        raise ValueError(
            f"{folder}: its tokenizer has {len(beyond)} tokens beyond the {rows} rows of its "
            f"embedding, as {min(beyond)!r}. Open it in transformers, call resize_token_embeddings("
            "len(tokenizer)) and save it again; or take the tokenizer that it was trained with"
        )


def save(policy: Policy, folder):
    """Write `policy` to `folder` in transformers' layout, with its tokenizer and processor files.
    All ranks call it.

    What is written opens in version 4.57 as in version 5 where both know the model and its layers
    share one setting of rotary positions, as Qwen-VL's do. Gemma 3's differ by layer type and are
    written as version 5 spells them: 4.57 would take its class's own in their place.
    """
    state = full_state(policy.hf)
    tied = is_tied(policy.hf)
    if tied:  # then it is not written; where it is sharded, it is gathered as a tensor of its own
        state.pop("lm_head.weight", None)
    is_moe = policy.hf.config.model_type == "qwen3_vl_moe"
    if is_moe:
        state = with_older_experts(state)
    if is_main():
        # Its "original format" would undo `with_older_experts`.
        policy.hf.save_pretrained(folder, state_dict=state, save_original_format=not is_moe)
        settings = json.loads(Path(folder, "config.json").read_text())
        write_config(settings, folder, tied)
        copy_processor(policy.source, folder)
        write_template(policy.encoder.tokenizer, Path(folder))


def full_state(module: nn.Module):
    """The unsharded state dict; where the module is sharded, on the CPU of rank 0, and empty
    elsewhere. All ranks call it.
    """
    if not any(isinstance(p, DTensor) for p in module.parameters()):
        return module.state_dict()
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    return get_model_state_dict(module, options=options)


# --------------------------------------------------------------------------- what is trained
def freeze_vision(*bases):
    """Train the image sides of these transformers models without head, towers and what stands
    behind them, no more: no gradient, no optimiser state, no graph. To be called before the
    optimiser is made.
    """
    for base in bases:
        of_text = set(text_of(base).parameters())
        for parameter in base.parameters():
            if parameter not in of_text:
                parameter.requires_grad_(False)


def is_trained(module: nn.Module):
    """Whether any parameter of it is."""
    return any(parameter.requires_grad for parameter in module.parameters())


# -------------------------------------------------------------------------------------- ranks
def is_sharded(args, ranks):
    """False for one process in float32: there is nothing to share or cast. ranks: their number."""
    return ranks > 1 or args.dtype != "float32" or args.offload


def units(module: nn.Module, base: nn.Module):
    """What FSDP gathers at a time: each decoder layer, the parts of the image side, and the root
    (`module`, whose forward is called) with the rest, embeddings and head. base: the transformers
    model without head inside it.
    """
    return *text_of(base).layers, *image_side(base), module


def cut_dimension(parameter, ranks):
    """The dimension along which FSDP over so many ranks cuts a parameter: the first; of stacked
    experts, which may be fewer than the ranks, the second.
    """
    if parameter.ndim == 3 and parameter.shape[1] % ranks == 0:
        return 1
    return 0


def recompute(hf):
    """Activation checkpointing, not re-entrant: that would cut the gradients of what layers put
    aside (load balance).

    With it transformers makes all embeddings require a gradient, those of a frozen tower too, which
    only the re-entrant kind needs: features would have a graph that nothing is trained through.
    """
    enable = getattr(hf, "activation_checkpointing_enable", hf.gradient_checkpointing_enable)
    enable({"use_reentrant": False})
    hf.disable_input_require_grads()


def shard(module: nn.Module, base: nn.Module, args, ranks, exact=()):
    """Activation checkpointing if asked for, then onto the device, and FSDP2 of the `units`, in
    place.

    Over nodes it is HSDP: each node holds all shards, gradients are summed over the nodes.
    Parameters stay float32 in shards (on the CPU with --offload), are gathered and computed with in
    --dtype, gradients are reduced in float32. Modules in `exact` compute in float32. Raises
    ValueError where the ranks are no multiple of the nodes.
    """
    if args.checkpointing:
        recompute(base)
    if not is_sharded(args, world()):
        module.to(ranks.device)
        return
    mesh = mesh_of(ranks, args.nodes or int(os.environ.get("GROUP_WORLD_SIZE", 1)))
    shards = mesh.shape[-1]
    offload = OffloadPolicy()
    if args.offload:
        offload = CPUOffloadPolicy(pin_memory=ranks.device.type == "cuda")
    options = {
        "mesh": mesh,
        "offload_policy": offload,
        "shard_placement_fn": lambda parameter: Shard(cut_dimension(parameter, shards)),
    }
    for unit in exact:
        fully_shard(unit, **options)
    dtype = getattr(torch, args.dtype)
    precision = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
    *parts, root = units(module, base)
    for unit in parts:
        fully_shard(unit, mp_policy=precision, **options)
    for part in image_side(base):
        keep_recording(part)
        if not is_trained(part):
            # It ran first, so FSDP would gather it for the end of the backward pass, which needs it
            # no more.
            part.set_unshard_in_backward(False)
    compute_in(base, dtype)
    # The known gradients of the log-probs are among the root's inputs: they stay as they are.
    uncast = replace(precision, cast_forward_inputs=False)
    fully_shard(root, mp_policy=uncast, **options)


def mesh_of(ranks, nodes):
    """The device mesh that FSDP shards over. nodes: torchrun's number of them."""
    if ranks.world % nodes:
        raise ValueError(
            f"{ranks.world} ranks on {nodes} nodes: all nodes need equally many (--nodes 1 shards "
            "over all ranks)"
        )
    kind = ranks.device.type
    if nodes == 1:
        return init_device_mesh(kind, (ranks.world,), mesh_dim_names=("ranks",))
    shape = (nodes, ranks.world // nodes)
    return init_device_mesh(kind, shape, mesh_dim_names=("nodes", "ranks"))


class RolloutCopy:
    """The weights that rollouts are sampled with: the policy's own, or, where it is sharded, a
    whole copy on each rank in --dtype that `refresh` gathers once per step. No collective runs
    while decoding: ranks may finish at any time.
    """

    def __init__(self, policy: Policy, args, device):
        """To be called before the policy is sharded."""
        self.policy = policy
        self.hf = policy.hf
        if not is_sharded(args, world()):
            return
        dtype = getattr(torch, args.dtype)
        # Parameters alone are cast: rotary frequencies in bfloat16 turn far positions astray.
        copies = {}  # as deepcopy wants what it shall not copy itself
        for parameter in policy.hf.parameters():
            data = parameter.detach().to(device, dtype, copy=True)
            copies[id(parameter)] = nn.Parameter(data, requires_grad=False)
        self.hf = copy.deepcopy(policy.hf, copies).to(device)

    @torch.no_grad()
    def refresh(self):
        """Take over the policy's weights -> the transformers model to sample from. All ranks call
        it.
        """
        if self.hf is self.policy.hf:
            return self.hf
        for mine, theirs in zip(self.hf.parameters(), self.policy.hf.parameters(), strict=True):
            if isinstance(theirs, DTensor):
                theirs = theirs.full_tensor()
            mine.copy_(theirs)
        return self.hf
