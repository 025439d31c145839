"""
The memory that a rank needs, from shapes alone (--dry_run): models are on the meta device, no weight is read, nothing runs.

    WORLD_SIZE=8 python align.py --policy Qwen/Qwen3-VL-4B-Instruct --dtype bfloat16 … --dry_run

An upper estimate: packs of sequences at their limits, each with an image as large as --max_prompt or --max_pixels lets it
be. Not in it: what CUDA, NCCL and fragments take (a GB is 10^9 bytes here, cards of 80 hold 85), temporaries of decoding.

    b bytes of a number in --dtype   d hidden   i intermediate   q, k widths of all query and of all key heads
"""

from __future__ import annotations

import os

import torch

from engine.logprob import CHUNK
from model import cut_dimension, is_sharded, units


def saved_by_layer(text, b, top_k=None):
    """Bytes per token that a decoder layer keeps for its backward pass (top_k: of a mixture of experts).

    Norms: input in float32, normalised input, output. Attention: queries, keys, values, output. MLP: gate, its activation,
    up, their product; an expert also its token's input and output.
    """
    q, k = (n * text.head_dim for n in (text.num_attention_heads, text.num_key_value_heads))
    d, i = text.hidden_size, text.intermediate_size
    mlp = 4 * b * i if top_k is None else top_k * b * (4 * i + 2 * d)
    return 2 * d * (4 + 2 * b) + (q + k) * (4 + 3 * b) + mlp


def activations(base, tokens, patches, b, checkpointing, top_k=None):
    """Peak bytes of a pack: what layers and vision blocks keep (with checkpointing their inputs, and all of the one at work),
    and a quarter of a layer for the gradients at work. 0.96 to 1.11 of what is measured (tests/test_memory.py)."""
    text, vision = base.config.text_config, base.config.vision_config
    d, layer = vision.hidden_size, saved_by_layer(text, b, top_k)
    block = b * (
        10 * d + 2 * vision.intermediate_size
    )  # per patch: norms, qkv, rotated q and k, attention, MLP
    mergers = 4 * b * d * (1 + len(vision.deepstack_visual_indexes))  # norm, MLP
    ends = text.hidden_size * (4 + 3 * b)  # embeddings, final norm, what the head reads
    kept = (b * text.hidden_size, b * d) if checkpointing else (layer, block)
    at_work = max(tokens * layer, patches * block) * (1.25 if checkpointing else 0.25)
    return (
        tokens * (text.num_hidden_layers * kept[0] + ends)
        + patches * (vision.depth * kept[1] + mergers)
        + at_work
    )


def account(args, world, policy, disc=None):
    """[(phase, what, bytes)] of one rank of `world`. Phases: "always"; those that take turns on top of it; "on the CPU"."""
    sharded, b, resting = (
        is_sharded(args, world),
        getattr(torch, args.dtype).itemsize,
        ("always", "on the CPU")[args.offload],
    )
    shards = world // (
        args.nodes or int(os.environ.get("GROUP_WORLD_SIZE", 1))
    )  # HSDP: each node holds all
    text, vision = policy.hf.config.text_config, policy.hf.config.vision_config
    limit = args.max_prompt + args.max_response
    tokens = max(args.pack_tokens, limit)
    image = min(
        args.max_prompt,
        (args.max_pixels or 10**9) // (vision.patch_size * vision.spatial_merge_size) ** 2,
    )
    patches = tokens // limit * image * vision.spatial_merge_size**2
    players, rows = [("policy", policy, policy.hf.model, None, patches)], []
    if disc:
        top_k = {"dense": None, "moe": args.experts_per_token, "experts": 2}[args.disc]
        players.append(
            ("discriminator", disc, disc.model, top_k, 0 if args.disc_blind else patches)
        )
    for who, module, _, *_ in players:
        cut = [(p.numel(), p.shape[cut_dimension(p, shards)]) for p in module.parameters()]
        held = 4 * sum(n // length * -(-length // shards) for n, length in cut)
        rows += [
            (resting, f"{who}: {what}", held * n)
            for what, n in (("parameters", 1), ("gradients", 1), ("AdamW", 2))
        ]
        if who == "policy" and getattr(args, "kl", 0):
            rows.append((resting, "reference of the KL term: parameters", held))
    if hasattr(args, "slots"):
        cache = (
            text.num_hidden_layers * 2 * text.num_key_value_heads * text.head_dim * b
        )  # a token's keys and values
        if sharded:
            rows.append(
                (
                    "always",
                    "rollout copy of the policy",
                    b * sum(p.numel() for p in policy.parameters()),
                )
            )
        rows.append(
            ("rollouts", f"KV cache, {args.slots} rows of {limit}", args.slots * limit * cache)
        )
        rows.append(
            (
                "rollouts",
                "keys and values of a prefill",
                max(args.pack_tokens, args.max_prompt) * cache,
            )
        )
    for who, module, base, top_k, patches in players:
        phase, (*sizes, whole) = (
            f"{who}'s update",
            (sum(p.numel() for p in unit.parameters()) for unit in units(module, base)),
        )
        root = whole - sum(sizes)
        if sharded:  # the root stays gathered; of other units one computes, one is fetched, one is in the buffer
            rows.append((phase, "gathered weights", b * (root + 3 * max(sizes))))
            rows.append(
                (phase, "gathered gradients, and reduced in float32", (b + 4) * max(root, *sizes))
            )
        if who == "policy":
            head, chunk = (
                4 * text.vocab_size * text.hidden_size,
                4 * CHUNK["cpu" if args.device == "cpu" else "cuda"],
            )
            rows.append(
                (
                    phase,
                    "head's gradient in float32, chunks of logits",
                    (head if b == 4 else 2 * head) + 3 * chunk,
                )
            )
        on, off = (activations(base, tokens, patches, b, ckpt, top_k) for ckpt in (True, False))
        other = f"({off / 1e9:.1f} without" if args.checkpointing else f"({on / 1e9:.1f} with"
        rows.append(
            (
                phase,
                f"activations of a pack {other} --checkpointing)",
                on if args.checkpointing else off,
            )
        )
    return rows


def show(args, build):
    """Print the account of a rank of WORLD_SIZE (torchrun's variable; 1 without it). build() -> (policy,) or (policy, disc)."""
    world = int(os.environ.get("WORLD_SIZE", 1))
    if os.environ.get("RANK", "0") != "0":
        return
    with torch.device("meta"):
        policy, *disc = build()
    rows, sums = account(args, world, policy, *disc), {}
    count = sum(p.numel() for p in policy.parameters())
    print(
        f"{policy.source}, {count:,} parameters: GB on each of {world} ranks, {args.dtype}, packs of {args.pack_tokens}"
    )
    for phase, what, n in sorted(rows, key=lambda row: [r[0] for r in rows].index(row[0])):
        sums[phase] = sums.get(phase, 0) + n / 1e9
        print(f"  {phase:<22} {what:<56} {n / 1e9:7.2f}")
    worst = max(sums.keys() - {"always", "on the CPU"}, key=sums.get)
    peak = sums.get("always", 0) + sums[worst]
    print(
        f"  peak: always + {worst:<64} {peak:7.2f}\n  fits in 80 GB: {'yes' if peak < 80 else 'no'}"
    )
