"""
Linear attention over packs, and in the sampler's slots: a recurrence that runs over a tree.

Most layers of a Qwen3.5 are gated delta nets. A head of one keeps a matrix S (K, V), its state,
which answers a key with a value. Each token with key k and value v changes it, and then asks it
with its query q:

    S = exp(decay) S                     forget a little: decay is at most 0
    S = S + beta k (v - k S)             let k answer v, by the share beta in 0..1
    out = q S                            q and k have length 1, and q is divided by sqrt(K)

Before that, queries, keys and values go through a convolution over a token's own inputs and those
of the 3 tokens before it. So all that a token takes over from what is before it is a state and 3
inputs, however long that is. In a pack the prompt is therefore run once, and each of its children
starts from a copy of what stands behind the prompt's last token; the gradients of all children flow
into it. The sampler keeps the same two things of each row (SlotStates).

Projections, norms and gates work token by token and do not know of trees.

    T tokens of a pack   B slots   N either   n segments of a batch   L tokens of its longest
    C channels of the convolution   W its width, 4   H heads   K, V width of a key, of a value
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace
from types import MethodType

import torch
import torch.nn.functional as F
from transformers.activations import ACT2FN

from engine.families import text_of

# The rule is computed in chunks of so many tokens, with matrix products within each: the state is
# made at the end of each chunk alone, and not at each token.
CHUNK = 64
SHORTEST_CHUNK = 16

# What `delta_net` reads of a layer's module; one that lacks any of it is another recurrence.
USED = (
    "in_proj_qkv",
    "in_proj_z",
    "in_proj_b",
    "in_proj_a",
    "conv1d",
    "A_log",
    "dt_bias",
    "norm",
)


# ------------------------------------------------------------------------------------- the layer
def delta_nets(base):
    """{number of a layer: its gated delta net} of a transformers model without head."""
    layers = enumerate(text_of(base).layers)
    return {number: layer.linear_attn for number, layer in layers if hasattr(layer, "linear_attn")}


def is_delta_net(net):
    """Whether a layer's module is one that `delta_net` can run."""
    return all(hasattr(net, part) for part in USED) and chunk_rule(net) is not None


def obstacle(hf):
    """Why packs cannot run a transformers model's linear attention, in words; None: they can."""
    kinds = getattr(hf.config.get_text_config(), "layer_types", None) or []
    nets = delta_nets(hf.model)
    if len(nets) == kinds.count("linear_attention") and all(map(is_delta_net, nets.values())):
        return None
    return "of linear attention packs run Qwen3.5's gated delta nets alone"


def adopt(base):
    """Let the gated delta nets of a transformers model without head run by `delta_net`."""
    for net in delta_nets(base).values():
        net.forward = MethodType(delta_net, net)


def delta_net(net, hidden_states, recurrence=None, **_):
    """The forward pass of a gated delta net, in place of transformers' own, which knows rows alone
    and would run on over the ends of a pack's segments.

    hidden_states (1, T, D) with a Forest as `recurrence`, (B, 1, D) with SlotStates -> the same.
    """
    if recurrence is None:
        raise RuntimeError(
            "this model was loaded for packs: call it through attention.forward_pack or "
            "sampler.generate"
        )
    x = hidden_states.flatten(0, 1)  # (N, D)
    mixed = recurrence.convolve(net, net.in_proj_qkv(x))  # (N, C)
    query, key, value = mixed.split([net.key_dim, net.key_dim, net.value_dim], 1)
    query = query.unflatten(1, (-1, net.head_k_dim))
    key = key.unflatten(1, (-1, net.head_k_dim))
    value = value.unflatten(1, (-1, net.head_v_dim))  # (N, H, V)
    per_key = net.num_v_heads // net.num_k_heads  # heads that share a query and a key
    query = query.repeat_interleave(per_key, 1)  # (N, H, K)
    key = key.repeat_interleave(per_key, 1)
    beta = net.in_proj_b(x).sigmoid()  # (N, H)
    rate = F.softplus(net.in_proj_a(x).float() + net.dt_bias)
    decay = -net.A_log.float().exp() * rate  # (N, H) float32
    out = recurrence.recur(net, query, key, value, beta, decay)  # (N, H, V)
    gate = net.in_proj_z(x).view_as(out)
    out = net.norm(out.flatten(0, 1), gate.flatten(0, 1))  # (N * H, V)
    return net.out_proj(out.view(len(x), -1)).view_as(hidden_states)


def convolve(net, rows):
    """The convolution over rows (n, W - 1 + L, C), the inputs before each in front: (n, L, C)."""
    conv = net.conv1d
    out = F.conv1d(rows.transpose(1, 2), conv.weight, conv.bias, groups=conv.groups)
    return ACT2FN[net.activation](out).transpose(1, 2)


def chunk_rule(net):
    """transformers' function for the rule over whole rows: plain PyTorch, or the kernel of
    flash-linear-attention where that is installed. It never gets several sequences in one row:
    the plain one would run on from one into the next."""
    return getattr(sys.modules[type(net).__module__], "torch_chunk_gated_delta_rule", None)


def delta_step(state, query, key, value, beta, decay):
    """One token of the rule, as at the head of this file, in each slot: state (B, H, K, V) changes
    in place; query and key (B, H, K), value (B, H, V), beta and decay (B, H) -> (B, H, V)."""
    query = unit(query.float()) * query.shape[-1] ** -0.5
    key = unit(key.float())
    state.mul_(decay.exp().unsqueeze(2).unsqueeze(3))
    answer = key.unsqueeze(2) @ state  # (B, H, 1, V)
    change = beta.unsqueeze(2).unsqueeze(3) * (value.unsqueeze(2) - answer)  # (B, H, 1, V)
    heads = state.flatten(0, 1)  # (B * H, K, V)
    heads.baddbmm_(key.flatten(0, 1).unsqueeze(2), change.flatten(0, 1))
    return (query.unsqueeze(2) @ state).squeeze(2)


def unit(x):
    """Vectors of length 1, as the kernels make them."""
    return x * (x.square().sum(-1, keepdim=True) + 1e-6).rsqrt()


# -------------------------------------------------------------------------------------- in a pack
@dataclass
class Batch:
    """Segments of one level of the forest, and of similar length: the rule runs over all at once.

    Behind a segment's end stands its first token again, with beta and decay 0: the state stays.
    """

    segments: list[int]  # n, their numbers
    parents: list[int]  # n, the numbers of the segments above; empty for roots
    places: torch.Tensor  # (n * L,) of their tokens in the pack
    is_real: torch.Tensor  # (n, L, 1) bool
    is_continued: bool  # whether any of them has children
    chunk: int  # tokens that the rule takes at a time

    def to(self, device):
        return replace(self, places=self.places.to(device), is_real=self.is_real.to(device))

    def gather(self, x):
        """Rows of x (T, ...) as (n, L, ...)."""
        return x.index_select(0, self.places).unflatten(0, (len(self.segments), -1))


def make_batch(pack, numbers):
    """A Batch of the segments of these numbers, shortest first."""
    segments = [pack.segments[number] for number in numbers]
    longest = segments[-1].length
    places = torch.zeros(len(segments), longest, dtype=torch.long)
    is_real = torch.zeros(len(segments), longest, dtype=torch.bool)
    for row, segment in enumerate(segments):
        places[row, : segment.length] = torch.arange(segment.length)
        places[row] += segment.start
        is_real[row, : segment.length] = True
    continued = {segment.parent for segment in pack.segments}
    return Batch(
        segments=numbers,
        parents=[segment.parent for segment in segments if segment.parent >= 0],
        places=places.flatten(),
        is_real=is_real.unsqueeze(2),
        is_continued=not continued.isdisjoint(numbers),
        chunk=chunk_of(longest),
    )


class Forest:
    """Convolution and rule over the segments of a pack, each from where its parent ended.

    kept: None, or a dictionary that gets {number of the layer: (the last inputs of the convolution
    in each segment (segments, W - 1, C), the state behind each segment [segments] of (H, K, V))}.
    """

    def __init__(self, pack, width, kept=None):
        self.kept = kept
        device = pack.ids.device
        # 1) The rule runs level by level, since a segment starts from its parent's state.
        self.batches = []
        rows = torch.empty(len(pack.ids), dtype=torch.long)
        done = 0
        for numbers in levels_of_similar_length(pack):
            batch = make_batch(pack, numbers)
            real = batch.is_real.flatten().nonzero().squeeze(1)
            rows[batch.places[real]] = done + real
            done += len(batch.places)
            self.batches.append(batch.to(device))
        self.rows = rows.to(device)  # (T,) where a token's result stands among those of all batches
        # 2) The convolution runs over one row, in which the inputs before each segment stand in
        # front of it once more.
        row = []
        for segment in pack.segments:
            row += last_places(pack, segment.parent, width - 1)
            row += range(segment.start, segment.start + segment.length)
        self.row = torch.tensor(row, device=device)  # (T + segments * (W - 1),)
        # A result stands where the first of its inputs does.
        self.results = torch.arange(len(pack.ids), device=device) + pack.segment * (width - 1)
        # 3) What comes after a segment would begin with these.
        ends = [last_places(pack, number, width - 1) for number in range(len(pack.segments))]
        self.ends = torch.tensor(ends, device=device)  # (segments, W - 1)

    def convolve(self, net, x):
        """Inputs (T, C) -> (T, C)."""
        x = F.pad(x, (0, 0, 0, 1))  # at place T there is nothing
        if self.kept is not None:  # `recur`, which comes next, fills in the states
            self.kept[net.layer_idx] = (x[self.ends], [None] * len(self.ends))
        row = x.index_select(0, self.row)
        return convolve(net, row.unsqueeze(0))[0].index_select(0, self.results)

    def recur(self, net, query, key, value, beta, decay):
        """query and key (T, H, K), value (T, H, V), beta and decay (T, H) -> (T, H, V)."""
        states = [None] * len(self.ends)  # behind each segment (H, K, V), if anything needs it
        if self.kept is not None:
            _, states = self.kept[net.layer_idx]
        results = []
        for batch in self.batches:
            start = None
            if batch.parents:
                start = torch.stack([states[parent] for parent in batch.parents])  # (n, H, K, V)
            out, end = chunk_rule(net)(
                batch.gather(query),
                batch.gather(key),
                batch.gather(value),
                beta=batch.gather(beta) * batch.is_real,
                g=batch.gather(decay) * batch.is_real,
                chunk_size=batch.chunk,
                initial_state=start,
                output_final_state=batch.is_continued or self.kept is not None,
                use_qk_l2norm_in_kernel=True,
            )
            results.append(out.flatten(0, 1))  # (n * L, H, V)
            if end is not None:
                for number, state in zip(batch.segments, end.unbind(), strict=True):
                    states[number] = state
        return torch.cat(results).index_select(0, self.rows)


def forest_of(base, pack, kept=None):
    """The Forest of `pack` for a transformers model without head; None where it has no such layers.
    kept: as of Forest."""
    nets = list(delta_nets(base).values())
    if not nets:
        return None
    return Forest(pack, nets[0].conv_kernel_size, kept)


def levels_of_similar_length(pack):
    """Lists of numbers of segments, shortest first: roots before their children, and in each list
    segments of one level with about equally many chunks."""
    levels = {}
    for number, segment in enumerate(pack.segments):
        depth = len(pack.ancestors(number))
        levels.setdefault(depth, []).append((segment.length, number))
    lists = []
    for depth in sorted(levels):
        most = 0
        for length, number in sorted(levels[depth]):
            chunks = -(-length // CHUNK)
            if chunks > most:  # bounds the padding
                lists.append([])
                most = int(1.25 * chunks)
            lists[-1].append(number)
    return lists


def chunk_of(longest):
    """Tokens per chunk: short segments are not padded to a long one."""
    chunk = SHORTEST_CHUNK
    while chunk < min(longest, CHUNK):
        chunk *= 2
    return chunk


def last_places(pack, number, count):
    """Places of the last `count` tokens that a continuation of segment `number` comes after, on its
    path from the root. Where there are fewer, place T, where nothing is, stands for the others."""
    places = []
    while number >= 0 and len(places) < count:
        segment = pack.segments[number]
        own = range(segment.start, segment.start + segment.length)
        missing = count - len(places)
        places = [*own[-missing:], *places]
        number = segment.parent
    nothing = [len(pack.ids)] * (count - len(places))
    return nothing + places


# ----------------------------------------------------------------------------------- in the sampler
class SlotStates:
    """State and last inputs of the convolution of the sampler's slots, per layer. A step changes
    them in place."""

    def __init__(self, hf, slots):
        self.inputs = {}  # number of a layer -> (B, W - 1, C)
        self.matrices = {}  # number of a layer -> (B, H, K, V) float32
        for layer, net in delta_nets(hf.model).items():
            inputs = (slots, net.conv_kernel_size - 1, net.conv_dim)
            state = (slots, net.num_v_heads, net.head_k_dim, net.head_v_dim)
            self.inputs[layer] = torch.zeros(inputs, dtype=hf.dtype, device=hf.device)
            self.matrices[layer] = torch.zeros(state, dtype=torch.float32, device=hf.device)

    def keep(self, slots):
        """Keep only `slots`, which are then numbered from 0."""
        for tensors in (self.inputs, self.matrices):
            for layer, old in tensors.items():
                tensors[layer] = old[slots]

    def write_prompt(self, slots, read):
        """Let each of `slots` start behind a prompt. read: {layer: (inputs, state)} of it."""
        for layer, (inputs, state) in read.items():
            self.inputs[layer][slots] = inputs
            self.matrices[layer][slots] = state

    def convolve(self, net, x):
        """This step's inputs (B, C) -> (B, C)."""
        inputs = self.inputs[net.layer_idx]
        row = torch.cat([inputs, x.unsqueeze(1)], 1)  # (B, W, C)
        inputs.copy_(row[:, 1:])
        return convolve(net, row).squeeze(1)

    def recur(self, net, query, key, value, beta, decay):
        """This step's query and key (B, H, K), value (B, H, V), beta and decay (B, H) ->
        (B, H, V)."""
        state = self.matrices[net.layer_idx]
        return delta_step(state, query, key, value, beta, decay).to(value.dtype)
