"""
The memory that one rank of a stage needs, counted from shapes: nothing runs.

    WORLD_SIZE=8 python tools/memory.py align --policy Qwen/Qwen3-VL-4B-Instruct --dtype bfloat16

The first argument is the stage (sft, align, rlvr), the others are that stage's own, without --data
(`python align.py --help` lists them). Of --policy and --disc_init only config.json is read,
--disc_path is read whole. WORLD_SIZE is the number of ranks, 1 without it; GROUP_WORLD_SIZE or
--nodes is the number of nodes.

The estimate is an upper one: packs are full of sequences at their limits, each with an image as
large as --max_prompt or --max_pixels lets it be. Left out is what CUDA, NCCL and fragments take (a
GB is 10^9 bytes here, and cards of 80 hold 85), and what decoding needs for a moment.

Parameters, gradients and AdamW's moments are float32 numbers of 4 bytes; `bytes_each` below is what
a number in --dtype takes, with which matrices are multiplied. Of what --freeze_vision freezes there
are parameters alone.
"""

from __future__ import annotations

import math
import os
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn as nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import align  # noqa: E402
import model  # noqa: E402
import rlvr  # noqa: E402
import sft  # noqa: E402
from engine.arguments import parse  # noqa: E402
from engine.families import image_side  # noqa: E402
from engine.logprob import CHUNK  # noqa: E402
from engine.states import CHUNK as CHUNK_OF_RULE  # noqa: E402
from engine.states import delta_nets  # noqa: E402

STAGES = {"sft": sft, "align": align, "rlvr": rlvr}
ALWAYS = "always"
ON_CPU = "on the CPU"
FLOAT32 = 4  # bytes
CARD = 80e9  # bytes


class Entry(NamedTuple):
    """A line of the account.

    Phases other than ALWAYS and ON_CPU take turns, each on top of what is always there.
    """

    phase: str
    what: str
    size: float  # bytes


@dataclass
class Player:
    """A model that the stage trains: the policy, and in stage 2 the discriminator."""

    name: str
    module: nn.Module
    base: nn.Module  # the transformers model without head inside it
    patches: int  # image patches in its largest pack
    experts_per_token: int | None = None  # None: a dense model


# -------------------------------------------------------------------------------- the account
def account(args, ranks, policy, discriminator=None) -> list[Entry]:
    """What one of so many ranks holds. args: the stage's; the models may be on the meta device."""
    tokens, patches = largest_pack(args, policy.hf.config)
    players = [Player("policy", policy, policy.hf.model, patches)]
    if discriminator is not None:
        seen = 0 if args.disc_blind else patches
        experts = experts_per_token(discriminator)
        players.append(Player("discriminator", discriminator, discriminator.model, seen, experts))

    entries = []
    for player in players:
        entries += resting(player, args, ranks)
    if getattr(args, "eval_rollouts", True):  # stage 1 samples for that alone
        entries += sampling(policy, args, ranks)
    for player in players:
        entries += update(player, tokens, args, ranks)
    return entries


def experts_per_token(discriminator) -> int | None:
    """How many experts a token goes through at most; None in a dense model."""
    if discriminator.form == "dense":
        return None
    if discriminator.form == "moe":
        return discriminator.mlps[0].top_k
    # An expert for each span: a prompt's tokens go through all of them.
    return len(discriminator.mlps[0].experts.down_proj)


def largest_pack(args, config) -> tuple[int, int]:
    """Tokens and image patches of the largest pack that the arguments allow."""
    vision = config.vision_config
    sequence = args.max_prompt + args.max_response
    tokens = max(args.pack_tokens, sequence)
    image_tokens = args.max_prompt
    if args.max_pixels:
        side = vision.patch_size * vision.spatial_merge_size  # of a visual token, in pixels
        image_tokens = min(image_tokens, args.max_pixels // side**2)
    images = tokens // sequence
    return tokens, images * image_tokens * vision.spatial_merge_size**2


def resting(player: Player, args, ranks) -> list[Entry]:
    """Parameters, gradients and optimiser of a player: a rank's shard of each."""
    phase = ON_CPU if args.offload else ALWAYS
    nodes = args.nodes or int(os.environ.get("GROUP_WORLD_SIZE", 1))
    parameters = list(player.module.parameters())
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    shard = FLOAT32 * largest_shard(parameters, ranks // nodes)  # each node holds all shards
    trained_shard = FLOAT32 * largest_shard(trained, ranks // nodes)
    entries = [
        Entry(phase, f"{player.name}: parameters", shard),
        Entry(phase, f"{player.name}: gradients", trained_shard),
        Entry(phase, f"{player.name}: AdamW", 2 * trained_shard),
    ]
    if player.name == "policy" and getattr(args, "kl", 0.0):
        entries.append(Entry(phase, "reference of the KL term: parameters", shard))
    return entries


def largest_shard(parameters, shards) -> int:
    """Numbers in the first rank's shard of these parameters.

    FSDP cuts a parameter along one dimension in equal pieces, rounded up; the last ranks get less.
    """
    numbers = 0
    for parameter in parameters:
        length = parameter.shape[model.cut_dimension(parameter, shards)]
        piece = -(-length // shards)
        numbers += parameter.numel() // length * piece
    return numbers


def sampling(policy, args, ranks) -> list[Entry]:
    """The copy of the policy that samples, and its keys and values."""
    text = policy.hf.config.text_config
    bytes_each = itemsize(args)
    entries = []
    if model.is_sharded(args, ranks):
        copied = bytes_each * count(policy)
        entries.append(Entry(ALWAYS, "rollout copy of the policy", copied))
    linear = delta_nets(policy.hf.model)
    attending = text.num_hidden_layers - len(linear)
    keys = text.num_key_value_heads * text.head_dim
    cache = attending * 2 * keys * bytes_each  # keys and values of one token
    prompts = min(args.slots, prompts_at_once(args))
    rows = (args.slots * args.max_response + prompts * args.max_prompt) * cache
    prefill = max(args.pack_tokens, args.max_prompt) * cache
    entries.append(Entry("rollouts", f"KV cache, {args.slots} rows, {prompts} prompts", rows))
    entries.append(Entry("rollouts", "keys and values of a prefill", prefill))
    if linear:
        states = (args.slots + prompts) * sum(state(net, bytes_each) for net in linear.values())
        entries.append(Entry("rollouts", f"states, {args.slots} rows, {prompts} prompts", states))
    return entries


def state(net, bytes_each) -> int:
    """Bytes of what a layer of linear attention keeps of a row, however long: a matrix for each
    head in float32, and the last inputs of its convolution."""
    matrices = FLOAT32 * net.num_v_heads * net.head_k_dim * net.head_v_dim
    return matrices + bytes_each * (net.conv_kernel_size - 1) * net.conv_dim


def prompts_at_once(args):
    """How many prompts are in a sampling call: each is kept once for all of its rows."""
    if args.eval_data or not hasattr(args, "prompts_per_step"):
        return math.inf  # a validation has one row of each
    prompts = args.prompts_per_step
    if isinstance(args, align.Args) and args.warmup_steps and not (args.disc_path or args.pairs):
        prompts = max(prompts, align.HELD_OUT)
    if isinstance(args, rlvr.Args) and rlvr.chosen_algorithm(args).dynamic_sampling:
        prompts = max(prompts, args.prompts_per_draw)
    return prompts


def update(player: Player, tokens, args, ranks) -> list[Entry]:
    """What a player's update takes, from the gathered weights to the activations of a pack."""
    phase = f"{player.name}'s update"
    bytes_each = itemsize(args)
    entries = []
    if model.is_sharded(args, ranks):
        *units, module = model.units(player.module, player.base)
        parts = [count(unit) for unit in units]
        root = count(module) - sum(parts)
        # The root stays gathered; of the other units one computes, one is fetched, one is in the
        # buffer.
        weights = bytes_each * (root + 3 * max(parts))
        trained = [count(unit) for unit in units if model.is_trained(unit)]
        gradients = (bytes_each + FLOAT32) * max(root, *trained)
        entries.append(Entry(phase, "gathered weights", weights))
        entries.append(Entry(phase, "gathered gradients, and reduced in float32", gradients))
    if player.name == "policy":
        what = "head's gradient in float32, a chunk of logits"
        entries.append(Entry(phase, what, head(player.base.config.text_config, tokens, args)))

    size = [player.base, tokens, player.patches, bytes_each]
    without = activations(*size, False, player.experts_per_token)
    recomputed = activations(*size, True, player.experts_per_token)
    if args.checkpointing:
        what = f"activations of a pack ({without / 1e9:.1f} without --checkpointing)"
        entries.append(Entry(phase, what, recomputed))
    else:
        what = f"activations of a pack ({recomputed / 1e9:.1f} with --checkpointing)"
        entries.append(Entry(phase, what, without))
    return entries


def head(text, tokens, args) -> int:
    """Bytes that the log-probs take, forward and backward, beside hidden states and weights.

    See engine/logprob.py: while a chunk's probabilities are made, and while its gradient is.
    """
    gradient = FLOAT32 * text.vocab_size * text.hidden_size
    held_at_a_time = CHUNK["cpu" if args.device == "cpu" else "cuda"]
    rows = min(tokens, max(1, held_at_a_time // text.vocab_size))
    logits = FLOAT32 * rows * text.vocab_size

    made = gradient + logits
    if takes_entropy(args):  # it needs logits and probabilities
        made += logits
    added = gradient + logits  # to the head's gradient, in place
    if itemsize(args) != FLOAT32:
        # The logits' gradient in --dtype, and its product with the hidden states, which is a matrix
        # of its own before it is added.
        added += rows * text.vocab_size * itemsize(args) + gradient
    return max(made, added)


def takes_entropy(args) -> bool:
    """Stages 2 and 3 log the policy's entropy, stage 1 does not."""
    return not isinstance(args, sft.Args)


# ---------------------------------------------------------------------- activations of a pack
# What is read of a vision tower's configuration
OF_TOWER = ("depth", "hidden_size", "intermediate_size", "patch_size", "spatial_merge_size")


def activations(base, tokens, patches, bytes_each, checkpointing, experts_per_token=None) -> float:
    """Peak bytes of the activations of one pack, forward and backward.

    It is 0.96 to 1.11 of what is measured (tests/test_memory.py), of a Qwen3.5 0.89 to 1.14
    (tests/test_states.py). A frozen vision tower keeps nothing, and what a block of it takes for a
    moment is free again before layers keep much.
    """
    text = base.config.text_config
    vision = base.config.vision_config
    by_layer = []  # bytes per token
    for layer in base.language_model.layers:
        by_layer.append(saved_by_layer(layer, text, bytes_each, experts_per_token))
    block = saved_by_block(vision, bytes_each)  # per patch
    if not any(model.is_trained(part) for part in image_side(base)):
        patches = 0

    # With checkpointing a layer keeps its input alone, and all else only while it is at work.
    layers = tokens * sum(by_layer)
    kept_by_block = block
    if checkpointing:
        layers = tokens * text.num_hidden_layers * bytes_each * text.hidden_size
        kept_by_block = bytes_each * vision.hidden_size
    blocks = patches * vision.depth * kept_by_block

    # Embeddings in --dtype, final norm in float32 and --dtype, what the head reads in --dtype.
    ends = tokens * text.hidden_size * (FLOAT32 + 3 * bytes_each)
    # One merger behind the vision tower, one for each layer that deepstack feeds: norm and MLP.
    mergers = 1 + len(getattr(vision, "deepstack_visual_indexes", ()))
    merging = patches * mergers * 4 * bytes_each * vision.hidden_size

    largest = max(tokens * max(by_layer), patches * block)
    at_work = largest / 4  # gradients
    if checkpointing:
        at_work += largest
    return layers + blocks + ends + merging + at_work


def saved_by_layer(layer, text, bytes_each, experts_per_token=None) -> float:
    """Bytes that a decoder layer keeps of each token for its backward pass."""
    hidden = text.hidden_size
    queries = text.num_attention_heads * text.head_dim
    keys = text.num_key_value_heads * text.head_dim

    # A norm keeps its input in float32, the normalised input, and its output.
    norm = FLOAT32 + 2 * bytes_each
    norms = 2 * hidden * norm
    # Queries and keys have a norm of their own; then they are rotated. Values are as wide as keys,
    # the output as wide as queries.
    attention = (queries + keys) * (norm + bytes_each)
    if hasattr(layer, "linear_attn"):
        attention = saved_by_delta_net(layer.linear_attn, bytes_each)
    elif is_gated(layer.self_attn, queries):  # the gate, its activation, the gated output
        attention += 3 * queries * bytes_each
    return norms + attention + saved_by_mlp(layer.mlp, text, bytes_each, experts_per_token)


def saved_by_mlp(mlp, text, bytes_each, experts_per_token=None) -> int:
    """Bytes that a layer's MLP, or mixture of them, keeps of each token. experts_per_token: of a
    discriminator's mixture; a policy's own is as its configuration says."""
    inner = getattr(text, "intermediate_size", 0)
    shared = 0
    if experts_per_token is None and hasattr(mlp, "experts"):
        experts_per_token = text.num_experts_per_tok
        inner = text.moe_intermediate_size
        shared = getattr(text, "shared_expert_intermediate_size", 0)
    # The gate, its activation, the up projection, the product of both.
    kept = 4 * inner * bytes_each
    if experts_per_token is not None:  # each of them also keeps the token's input and output
        kept = experts_per_token * (kept + 2 * text.hidden_size * bytes_each)
    return kept + 4 * shared * bytes_each


def is_gated(attention, queries) -> bool:
    """Whether a layer's attention has an output gate, made along with its queries (Qwen3.5)."""
    projection = getattr(attention, "q_proj", None)
    return projection is not None and projection.out_features == 2 * queries


def saved_by_delta_net(net, bytes_each) -> float:
    """Bytes that a gated delta net keeps of each token, with the rule in plain PyTorch, which
    computes in float32; the kernel of flash-linear-attention keeps less. Segments are taken as
    whole chunks."""
    heads = net.num_v_heads
    keys = heads * net.head_k_dim
    values = heads * net.head_v_dim
    # The convolution's input and output.
    convolved = 2 * net.conv_dim * bytes_each
    # Queries and keys as they come, of length 1, decayed; keys by beta, and what they take back of
    # the old state. Values as they come, as solved for, as written.
    rows = 8 * keys + 3 * values
    # Five matrices of a chunk's tokens by each other, and a state for each chunk.
    rows += 5 * heads * CHUNK_OF_RULE
    rows += keys * net.head_v_dim / CHUNK_OF_RULE
    # The gated norm: its input, that of length 1, the gate and its activation; then the gate and
    # the output in --dtype.
    gated = values * (4 * FLOAT32 + 2 * bytes_each)
    return convolved + FLOAT32 * rows + gated


def saved_by_block(vision, bytes_each) -> int:
    """Bytes that a block of the vision tower keeps of each patch for its backward pass."""
    # Two norms (4 widths), queries, keys and values (3), both rotated (2), attention's output (1).
    width = 10 * vision.hidden_size
    mlp = 2 * vision.intermediate_size  # before and after its activation
    return bytes_each * (width + mlp)


def itemsize(args) -> int:
    """Bytes of a number in --dtype."""
    return getattr(torch, args.dtype).itemsize


def count(module: nn.Module) -> int:
    """Parameters of a module; tied ones count once."""
    return sum(parameter.numel() for parameter in module.parameters())


# -------------------------------------------------------------------------------- the command
def skeletons(stage, args):
    """The models that a stage trains, on the meta device: (policy, discriminator or None)."""
    policy = model.skeleton(args.policy)
    discriminator = None
    if stage is align and args.disc_path:
        discriminator = opened_skeleton(args.disc_path, args.disc)
    elif stage is align:
        base = model.skeleton(args.disc_init or args.policy).hf.model
        with torch.device("meta"):
            discriminator = align.upcycle(base, args)
    if args.freeze_vision:
        model.freeze_vision(policy.hf.model)
    if args.freeze_vision and discriminator is not None:
        model.freeze_vision(discriminator.model)
    return policy, discriminator


def opened_skeleton(path, form):
    """A saved discriminator on the meta device. Its tensors are read, since their names tell its
    form, and then copied nowhere: PyTorch warns of each.
    """
    with torch.device("meta"), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*meta parameter.*")
        return align.open_discriminator(path, form)


def show(entries: list[Entry]) -> None:
    """Print the account by phases, and the peak: what is always there and the worst phase."""
    phases = {}
    for entry in entries:
        phases.setdefault(entry.phase, []).append(entry)
    totals = {}
    for phase, lines in phases.items():
        for line in lines:
            print(f"  {phase:<22} {line.what:<56} {line.size / 1e9:7.2f}")
        totals[phase] = sum(line.size for line in lines)
    always = totals.pop(ALWAYS, 0)
    on_cpu = totals.pop(ON_CPU, 0)
    worst = max(totals, key=totals.get)
    peak = always + totals[worst]
    print(f"  peak: always + {worst:<64} {peak / 1e9:7.2f}")
    print(f"  fits in 80 GB: {'yes' if peak < CARD else 'no'}")
    if on_cpu:
        print(f"  and of the CPU's memory, for each rank: {on_cpu / 1e9:.1f} GB")


def main(argv) -> None:
    name = argv[0] if argv else ""
    if "-h" in argv or "--help" in argv:
        return print(__doc__)
    if name not in STAGES:
        sys.exit(f"usage: python tools/memory.py {{{','.join(STAGES)}}} --policy CHECKPOINT ...")
    stage = STAGES[name]
    # No row is read; but a stage without --data would take the sizes of the embedded world.
    args = parse(stage.Args, ["--data", "none", *argv[1:]], with_paths=False)
    if os.environ.get("RANK", "0") != "0":
        return  # under torchrun one process says it
    ranks = int(os.environ.get("WORLD_SIZE", 1))
    policy, discriminator = skeletons(stage, args)
    missing = [name for name in OF_TOWER if not hasattr(policy.hf.config.vision_config, name)]
    if missing:
        sys.exit(
            f"tools/memory.py: {args.policy}: the account of activations is that of Qwen-VL's "
            f"vision towers; this one's configuration has no {', '.join(missing)}"
        )
    print(
        f"{args.policy}, {count(policy):,} parameters: GB on each of {ranks} ranks, {args.dtype}, "
        f"packs of {args.pack_tokens}"
    )
    show(account(args, ranks, policy, discriminator))


if __name__ == "__main__":
    main(sys.argv[1:])
