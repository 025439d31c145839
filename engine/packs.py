"""
Packs: the one data structure of all three stages, and attention over them, the vision tower's included.

A model call takes one row of tokens, a forest of segments without padding. A token attends to its own segment up to
itself and to its segment's ancestors, so what several sequences share (the prompt, its image) is computed once:

    SFT            root = a whole conversation                      (no children: block-diagonal)
    policy         root = prompt, children = the N rollouts of its group
    discriminator  root = prompt, children = the 2 spans of the reference and the 2N spans of the rollouts
    prefill        root = prompt (sampler.py copies its keys and values to the N rows that continue it)

    T tokens of a pack   S scored tokens   K children   H heads   D hidden   V vocabulary

    trees = [Tree(prompt, [rollout_ids, ...]), ...]
    for part in plan(trees, budget=16384):                 # a group longer than the budget is split, its root repeated
        pack = make(trees, part, device)
        logp = token_logps(run(hf.model, pack)[pack.source], hf.lm_head.weight, pack.target)              # (S,)
"""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import groupby
from typing import TYPE_CHECKING

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from engine.ranks import all_max

if TYPE_CHECKING:
    from data import Prompt


@dataclass
class Tree:
    """A prompt and what continues it."""

    prompt: Prompt
    children: list[list[int]] = field(default_factory=list)
    kinds: list[int] | None = None  # span kind of each child (discriminator)
    shared: int = (
        0  # so many first children (the references) are in each part of a tree that is split
    )
    mask: torch.Tensor | None = (
        None  # (T,) bool, trained tokens of the root itself (SFT: the whole conversation)
    )


@dataclass
class Pack:
    ids: torch.Tensor  # (T,)
    positions: torch.Tensor  # (3, T) multimodal rotary: time, height, width
    segment: torch.Tensor  # (T,) number of the token's segment
    tree: (
        torch.Tensor
    )  # (T,) number of the token's tree, counted within the pack; a padded tail's is one more
    kind: torch.Tensor  # (T,) span kind of the token; -1 in roots
    parent: list[int]  # of each segment, -1 for a root
    spans: list[tuple[int, int]]  # of each segment: first token, length
    children: list[
        tuple[int, int]
    ]  # of each child: (index of its tree in `trees`, index in tree.children)
    ends: torch.Tensor  # (K,) last token of each child
    source: torch.Tensor  # (S,) the token whose hidden state predicts ...
    target: torch.Tensor  # (S,) ... this token id,
    sequence: (
        torch.Tensor
    )  # (S,) of this child (or tree, where the root is scored), counted within the pack
    pixel_values: torch.Tensor | None  # (P, C) patches of all images
    grid_thw: torch.Tensor | None  # (images, 3)
    weight: float = 1.0  # 0 for a pack that runs only so that all ranks run equally many
    layout: object = None  # computes attention over it

    def ancestors(self, segment):
        """Segments that `segment` attends to besides itself, the root first."""
        above = self.parent[segment]
        return [] if above < 0 else [*self.ancestors(above), above]

    def sees(self):
        """(segments, segments) bool: which segment attends to which (and in causal order, the definition of a pack)."""
        sees = torch.eye(len(self.parent), dtype=torch.bool)
        for s in range(len(sees)):
            sees[s, self.ancestors(s)] = True
        return sees.to(self.ids.device)

    def rows(self, values):
        """Values (S,) of the scored tokens as one row per sequence: (K, longest), 0 behind each row's end."""
        lengths = self.sequence.bincount()
        at = (
            torch.arange(len(values), device=values.device)
            - (lengths.cumsum(0) - lengths)[self.sequence]
        )
        out = values.new_zeros(len(lengths), int(lengths.max()))
        return out.index_put((self.sequence, at), values)


def plan(trees: list[Tree], budget: int) -> list[list[tuple[int, list[int]]]]:
    """Which trees (and which of their children) share a pack: lists of (tree index, child indices).

    A tree above the budget is split, its root (and shared children) repeated in each part; parts fill packs longest
    first, each into the emptiest pack that still has room. What is above the budget by itself gets a pack of its own.
    """
    parts = []  # (tokens, tree, children)
    for t, tree in enumerate(trees):
        head = list(range(tree.shared))
        fixed = len(tree.prompt.ids) + sum(len(tree.children[c]) for c in head)
        tokens, children = fixed, head
        for c in range(tree.shared, len(tree.children)):
            if len(children) > tree.shared and tokens + len(tree.children[c]) > budget:
                parts.append((tokens, t, children))
                tokens, children = fixed, head
            tokens, children = tokens + len(tree.children[c]), [*children, c]
        parts.append((tokens, t, children))
    packs = []  # [tokens, parts]
    for tokens, t, children in sorted(parts, key=lambda p: (-p[0], p[1], p[2])):
        pack = min((p for p in packs if p[0] + tokens <= budget), key=lambda p: p[0], default=None)
        if pack is None:
            packs.append(pack := [0, []])
        pack[0] += tokens
        pack[1].append((t, children))
    return [sorted(pack) for _, pack in packs]


def make(trees: list[Tree], part: list[tuple[int, list[int]]], device="cpu", pad_to=None) -> Pack:
    """Lay `part` of `trees` out as one pack on `device`; on CUDA its tail is padded to a multiple of `pad_to` (128)
    with a segment of its own that is never scored, so that compiled code sees few shapes."""
    ids, positions, kinds, tree_of, parent, spans, children, ends = [], [], [], [], [], [], [], []
    source, target, sequence, length = [], [], [], 0

    def add(tokens, where, kind, tree, above):
        nonlocal length
        for known, new in zip(
            (ids, positions, kinds, tree_of, parent),
            (tokens, where, kind, tree, above),
            strict=True,
        ):
            known.append(new)
        spans.append((length, len(tokens)))
        length += len(tokens)

    for n, (t, chosen) in enumerate(part):
        tree = trees[t]
        prompt, root, start = tree.prompt, len(parent), length
        add(prompt.ids, prompt.positions, -1, n, -1)
        if tree.mask is not None:
            at = tree.mask.nonzero().squeeze(1)
            source.append(start + at - 1)
            target.append(prompt.ids[at])
            sequence.append(torch.full((len(at),), n))
        for c in chosen:
            child = torch.tensor(tree.children[c], dtype=torch.long)
            at = torch.arange(len(child))
            source.append(
                torch.where(at == 0, start + len(prompt.ids), length + at) - 1
            )  # the root predicts the first
            target.append(child)
            sequence.append(torch.full((len(child),), len(children)))
            add(
                child,
                (prompt.next_position + at).expand(3, -1),
                tree.kinds[c] if tree.kinds else 0,
                n,
                root,
            )
            ends.append(length - 1)
            children.append((t, c))
    device = torch.device(device)
    if tail := -length % (pad_to or (128 if device.type == "cuda" else 1)):
        add(
            torch.zeros(tail, dtype=torch.long), torch.arange(tail).expand(3, -1), -1, len(part), -1
        )
    segment = torch.repeat_interleave(torch.tensor([n for _, n in spans]))
    images = [p for p in (trees[t].prompt for t, _ in part) if p.pixel_values is not None]
    none = torch.zeros(0, dtype=torch.long)  # where nothing is scored
    tensors = dict(
        ids=torch.cat(ids),
        positions=torch.cat(positions, 1),
        segment=segment,
        tree=torch.tensor(tree_of)[segment],
        kind=torch.tensor(kinds)[segment],
        ends=torch.tensor(ends, dtype=torch.long),
        source=torch.cat([*source, none]),
        target=torch.cat([*target, none]),
        sequence=torch.cat([*sequence, none]),
        pixel_values=torch.cat([p.pixel_values for p in images]) if images else None,
        grid_thw=torch.cat([p.grid_thw for p in images]) if images else None,
    )
    tensors = {name: x if x is None else x.to(device) for name, x in tensors.items()}
    pack = Pack(parent=parent, spans=spans, children=children, **tensors)
    pack.layout = (FlexLayout if device.type == "cuda" else SegmentLayout)(pack)
    return pack


def each(trees, budget, device, spare: Tree):
    """The packs of this rank's `trees`, equally many on all ranks: one that has fewer, or no tree at all, runs `spare`
    (any tree) at weight 0, or the collectives of sharded models would never meet."""
    parts = plan(trees, budget)
    for i in range(int(all_max(len(parts)))):
        mine = i < len(parts)
        pack = (
            make(trees, parts[i], device)
            if mine
            else make([spare], [(0, list(range(len(spare.children))))], device)
        )
        pack.weight = float(mine)
        yield pack


# ------------------------------------------------------------------------------------------------------- attention
class SegmentLayout:
    """Attention segment by segment, each against its ancestors' keys and its own, batched by length."""

    def __init__(self, pack):
        device, batches = pack.ids.device, {}
        for s in sorted(range(len(pack.parent)), key=lambda s: pack.spans[s][1]):
            prefix = [
                i for a in pack.ancestors(s) for i in range(pack.spans[a][0], sum(pack.spans[a]))
            ]
            alike = batches.setdefault(len(prefix), [])
            if (
                not alike or pack.spans[s][1] > 1.25 * alike[-1][0][2] + 8
            ):  # than the batch's shortest: bounds padding
                alike.append([])
            alike[-1].append((prefix, *pack.spans[s]))
        self.groups, rows, offset = [], torch.empty(len(pack.ids), dtype=torch.long), 0
        for batch in [batch for alike in batches.values() for batch in alike]:
            before, longest = len(batch[0][0]), batch[-1][2]
            # Queries beyond a segment's end are its first token again: computed, never read. As keys they come after
            # every real query of the row, so that the causal mask alone hides them.
            own = torch.tensor(
                [[s + i if i < n else s for i in range(longest)] for _, s, n in batch]
            )
            keys = torch.cat([torch.tensor([p for p, _, _ in batch], dtype=torch.long), own], 1)
            for b, (_, s, n) in enumerate(batch):
                rows[s : s + n] = offset + b * longest + torch.arange(n)
            offset += len(batch) * longest
            mask = (
                torch.ones(longest, before + longest, dtype=torch.bool).tril(before).to(device)
                if before
                else None
            )
            self.groups.append(
                (own.flatten().to(device), keys.flatten().to(device), len(batch), mask)
            )
        self.rows = rows.to(device)

    def attend(self, query, key, value, scaling):
        q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))  # (T, H, d)
        out = []
        for own, keys, n, mask in self.groups:
            qs, ks, vs = (
                x.index_select(0, at).view(n, -1, *x.shape[1:]).transpose(1, 2)
                for x, at in ((q, own), (k, keys), (v, keys))
            )
            o = F.scaled_dot_product_attention(
                qs,
                ks,
                vs,
                attn_mask=mask,
                is_causal=mask is None,
                scale=scaling,
                enable_gqa=q.shape[1] != k.shape[1],
            )
            out.append(o.transpose(1, 2).reshape(-1, *q.shape[1:]))
        return torch.cat(out).index_select(0, self.rows).unsqueeze(0)


class FlexLayout:
    """The same through torch's FlexAttention: one kernel over the row, blocks that nobody attends to are skipped."""

    kernel = None  # compiled at its first call

    def __init__(self, pack):
        sees, segment, size = pack.sees(), pack.segment, len(pack.ids)
        rule = lambda b, h, q, k: (q >= k) & sees[segment[q], segment[k]]  # noqa: E731
        self.mask = create_block_mask(rule, None, None, size, size, device=pack.ids.device)

    def attend(self, query, key, value, scaling):
        FlexLayout.kernel = FlexLayout.kernel or torch.compile(
            flex_attention
        )  # shapes become dynamic by themselves
        gqa = query.shape[1] != key.shape[1]
        return FlexLayout.kernel(
            query, key, value, block_mask=self.mask, scale=scaling, enable_gqa=gqa
        ).transpose(1, 2)


def attention(module, query, key, value, attention_mask, scaling=None, layout=None, **kwargs):
    """What transformers calls in the text layers, (1, H, T, d) -> (1, T, H, d); `layout` is handed through `run`."""
    if layout is None or not module.is_causal:
        if layout is None and module.is_causal:
            raise RuntimeError(
                "this model was loaded for packs: call it through packs.run or sampler.generate"
            )
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, scaling=scaling, **kwargs
        )
    return layout.attend(query, key, value, scaling), None


def image_attention(
    module, query, key, value, attention_mask, scaling=None, cu_seq_lens_q=None, **kwargs
):
    """What transformers calls in the vision tower, (1, H, P, d) -> (1, P, H, d): neighbouring images (or windows) of one
    size at once. It hands over the whole row only to what is named like flash attention, and loops over images otherwise.
    """
    if not hasattr(
        cu_seq_lens_q, "runs"
    ):  # [(size, images)], once per forward: all layers get the same tensor
        cu_seq_lens_q.runs = [
            (n, len(list(same))) for n, same in groupby(cu_seq_lens_q.diff().tolist())
        ]
    out, parts = (
        [],
        [
            x[0].split([n * images for n, images in cu_seq_lens_q.runs], 1)
            for x in (query, key, value)
        ],
    )
    for (size, images), *qkv in zip(cu_seq_lens_q.runs, *parts, strict=True):
        q, k, v = (
            x.unflatten(1, (images, size)).transpose(0, 1) for x in qkv
        )  # (images, H, size, d)
        out.append(
            F.scaled_dot_product_attention(q, k, v, scale=scaling).transpose(1, 2).flatten(0, 1)
        )
    return torch.cat(out).unsqueeze(0), None


class _PatchProduct(nn.Conv3d):
    """The patch embedding's convolution moves by its own size: a matrix product, which convolution kernels are slower at."""

    def forward(self, x):  # (P, channels, time, height, width) -> (P, D)
        return F.linear(x.flatten(1), self.weight.flatten(1), self.bias)


AttentionInterface.register("packs", attention)
AttentionInterface.register("images-like-flash", image_attention)


def adopt(model):
    """Make a transformers Qwen-VL base model (the one without a head) run packs; its weights and their names stay."""
    model.language_model.config._attn_implementation = "packs"
    model.visual.config._attn_implementation = "images-like-flash"
    patches = model.visual.patch_embed.proj
    if type(patches) is nn.Conv3d and patches.kernel_size == patches.stride:
        patches.__class__ = _PatchProduct
    return model


def run(model, pack: Pack, **kwargs) -> torch.Tensor:
    """Final hidden states (T, D) of `pack` under a transformers Qwen-VL base model (the one without a head)."""
    nothing = 0.0
    if pack.pixel_values is None:
        # All ranks run the vision tower in every forward, and first, or the collectives of a sharded one never meet. So does
        # one alone: it then has a zero gradient, which AdamW treats otherwise than none, on any number of ranks.
        cfg, side = model.config.vision_config, model.config.vision_config.spatial_merge_size
        pixels = torch.zeros(
            side**2,
            cfg.in_channels * cfg.temporal_patch_size * cfg.patch_size**2,
            device=pack.ids.device,
        )
        blank = model.visual(pixels, grid_thw=torch.tensor([[1, side, side]], device=pixels.device))
        nothing = 0.0 * sum(
            x.sum() for x in (blank.pooler_output, *getattr(blank, "deepstack_features", ()))
        )
    out = model(
        input_ids=pack.ids.unsqueeze(0),
        position_ids=pack.positions.unsqueeze(1),
        pixel_values=pack.pixel_values,
        image_grid_thw=pack.grid_thw,
        layout=pack.layout,
        **kwargs,
    ).last_hidden_state[0]
    return out + nothing
