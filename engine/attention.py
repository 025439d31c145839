"""
Attention over packs, and through the vision tower: what transformers calls in place of its own.

Transformers looks the attention function up by a name in the model's configuration; `adopt` sets
these names, and `forward_pack` hands the pack's layout through to it.

    T tokens of a pack   H heads   d width of a head   D hidden   P patches
"""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import groupby

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from engine import states
from engine.families import takes, text_of
from engine.windows import depths, narrowest, rule_of


def layout_of(pack):
    """What computes attention over `pack` on its device."""
    return FlexLayout(pack) if pack.ids.device.type == "cuda" else SegmentLayout(pack)


# ----------------------------------------------------------------------------- segment by segment
@dataclass
class Bucket:
    """Segments of similar length whose ancestors have equally many tokens: one batch."""

    shortest: int  # length of the shortest segment
    segments: list = field(default_factory=list)
    above: list = field(default_factory=list)  # of each segment, its ancestors' tokens


class SegmentLayout:
    """Attention segment by segment, each against its ancestors' keys and its own, in batches."""

    def __init__(self, pack):
        self.pack = pack
        self.batches = []  # (places of the queries, places of the keys, segments, causal mask)
        self.real = []  # of each batch (segments, keys) bool: False behind a segment's end
        self.masks = {}  # window -> of each batch its mask
        depth = depths(pack)
        self.deepest = int(depth.max())
        self.depth = depth.to(pack.ids.device)  # (T,)
        # (T,) where a token's result stands among those of all batches
        self.rows = torch.empty(len(pack.ids), dtype=torch.long)
        done = 0
        for bucket in self._buckets(pack):
            done += self._add(bucket, done, pack.ids.device)
        self.rows = self.rows.to(pack.ids.device)

    def _buckets(self, pack):
        buckets = {}  # tokens above -> the buckets of such segments
        shortest_first = sorted(range(len(pack.segments)), key=lambda s: pack.segments[s].length)
        for number in shortest_first:
            segment = pack.segments[number]
            above = []
            for ancestor in map(pack.segments.__getitem__, pack.ancestors(number)):
                above.extend(range(ancestor.start, ancestor.start + ancestor.length))
            alike = buckets.setdefault(len(above), [])
            if not alike or segment.length > 1.25 * alike[-1].shortest + 8:  # bounds the padding
                alike.append(Bucket(segment.length))
            alike[-1].segments.append(segment)
            alike[-1].above.append(above)
        return [bucket for alike in buckets.values() for bucket in alike]

    def _add(self, bucket, done, device):
        """Make a batch of a bucket; `done` queries stand before its own -> how many it has."""
        longest = bucket.segments[-1].length
        before = len(bucket.above[0])
        # Queries beyond a segment's end are its first token again: computed, never read. As keys
        # they come after every real query of the row, so that the causal mask alone hides them.
        queries = []
        for segment in bucket.segments:
            places = torch.arange(longest)
            places[segment.length :] = 0
            queries.append(segment.start + places)
        queries = torch.stack(queries)  # (segments, longest)
        above = torch.tensor(bucket.above, dtype=torch.long)  # (segments, before)
        keys = torch.cat([above, queries], 1)
        mask = None
        if before:
            mask = torch.ones(longest, before + longest, dtype=torch.bool).tril(before).to(device)
        size = len(bucket.segments)
        self.batches.append((queries.flatten().to(device), keys.flatten().to(device), size, mask))
        lengths = torch.tensor([segment.length for segment in bucket.segments])
        self.real.append((torch.arange(keys.shape[1]) - before < lengths.unsqueeze(1)).to(device))
        for row, segment in enumerate(bucket.segments):
            places = done + row * longest + torch.arange(segment.length)
            self.rows[segment.start : segment.start + segment.length] = places
        return queries.numel()

    def _masks(self, window):
        """Of each batch its mask, or None where the causal one of torch's own does."""
        if self.pack.blocks is None and window is None:
            return [mask for *_, mask in self.batches]
        if window not in self.masks:
            rule = rule_of(self.pack, self.depth, window)
            masks = []
            for (queries, keys, size, _), real in zip(self.batches, self.real, strict=True):
                seen = rule(queries.view(size, -1, 1), keys.view(size, 1, -1))
                masks.append(
                    (seen & real.unsqueeze(1)).unsqueeze(1)
                )  # (segments, 1, queries, keys)
            self.masks[window] = masks
        return self.masks[window]

    def attend(self, query, key, value, scaling, window=None):
        """(1, H, T, d) each -> (1, T, H, d). window: of the layer, in tokens; None: it has none."""
        masks = self._masks(narrowest(window, self.deepest))
        query = query[0].transpose(0, 1)  # (T, H, d)
        key = key[0].transpose(0, 1)
        value = value[0].transpose(0, 1)
        results = []
        for (queries, keys, size, _), mask in zip(self.batches, masks, strict=True):
            attended = F.scaled_dot_product_attention(
                _gather(query, queries, size),
                _gather(key, keys, size),
                _gather(value, keys, size),
                attn_mask=mask,
                is_causal=mask is None,
                scale=scaling,
                enable_gqa=query.shape[1] != key.shape[1],
            )
            results.append(attended.transpose(1, 2).reshape(-1, *query.shape[1:]))
        return torch.cat(results).index_select(0, self.rows).unsqueeze(0)


def _gather(x, places, size):
    """Rows of x (T, H, d) at `places`, as a batch (size, H, places / size, d)."""
    return x.index_select(0, places).view(size, -1, *x.shape[1:]).transpose(1, 2)


# ----------------------------------------------------------------------------- on CUDA
class FlexLayout:
    """The same through torch's FlexAttention: one kernel, which skips what nobody attends to."""

    kernel = None  # compiled at its first call

    def __init__(self, pack):
        self.pack = pack
        self.masks = {}  # window -> block mask
        depth = depths(pack)
        self.deepest = int(depth.max())
        self.depth = depth.to(pack.ids.device)  # (T,)
        self._mask(None)

    def _mask(self, window):
        if window not in self.masks:
            size = len(self.pack.ids)
            rule = rule_of(self.pack, self.depth, window)
            self.masks[window] = create_block_mask(
                lambda batch, head, query, key: rule(query, key),
                None,
                None,
                size,
                size,
                device=self.pack.ids.device,
            )
        return self.masks[window]

    def attend(self, query, key, value, scaling, window=None):
        """(1, H, T, d) each -> (1, T, H, d). window: of the layer, in tokens; None: it has none."""
        if FlexLayout.kernel is None:
            FlexLayout.kernel = torch.compile(flex_attention)  # shapes become dynamic by themselves
        attended = FlexLayout.kernel(
            query,
            key,
            value,
            block_mask=self._mask(narrowest(window, self.deepest)),
            scale=scaling,
            enable_gqa=query.shape[1] != key.shape[1],
        )
        return attended.transpose(1, 2)


# ----------------------------------------------------------------------------- for transformers
def pack_attention(
    module,
    query,
    key,
    value,
    attention_mask,
    scaling=None,
    sliding_window=None,
    layout=None,
    **kwargs,
):
    """In the text layers, (1, H, T, d) each -> (1, T, H, d). layout: the pack's, or the sampler's
    store."""
    for name in ("softcap", "s_aux"):  # a cap on scores, a score of nothing: not built
        if kwargs.get(name) is not None:
            raise ValueError(f"packs cannot run attention with {name}")
    if layout is not None and module.is_causal:
        layout.was_asked = True
        return layout.attend(query, key, value, scaling, sliding_window), None
    if module.is_causal:
        raise RuntimeError(
            "this model was loaded for packs: call it through attention.forward_pack or "
            "sampler.generate"
        )
    return sdpa_attention_forward(
        module, query, key, value, attention_mask, scaling=scaling, **kwargs
    )


def image_attention(
    module, query, key, value, attention_mask, scaling=None, cu_seq_lens_q=None, **kwargs
):
    """In the vision tower: (1, H, P, d) each -> (1, P, H, d), neighbouring images (or windows) of
    one size at once. Transformers hands the whole row over only to what is named like flash
    attention, and loops over images otherwise."""
    if not hasattr(cu_seq_lens_q, "runs"):  # once per forward: all layers get the same tensor
        sizes = cu_seq_lens_q.diff().tolist()
        cu_seq_lens_q.runs = [(size, len(list(same))) for size, same in groupby(sizes)]
    runs = cu_seq_lens_q.runs  # (patches of an image, so many images)
    patches = [size * images for size, images in runs]
    query, key, value = (x[0].split(patches, 1) for x in (query, key, value))
    results = []
    for run, (size, images) in enumerate(runs):
        q, k, v = (x[run].unflatten(1, (images, size)).transpose(0, 1) for x in (query, key, value))
        attended = F.scaled_dot_product_attention(q, k, v, scale=scaling)  # (images, H, size, d)
        results.append(attended.transpose(1, 2).flatten(0, 1))
    return torch.cat(results).unsqueeze(0), None


AttentionInterface.register("packs", pack_attention)
AttentionInterface.register("images-like-flash", image_attention)


class PatchProduct(nn.Conv3d):
    """The patch embedding. Its convolution moves by its own size: a matrix product, at which
    convolution kernels are slower."""

    def forward(self, x):  # (P, channels, time, height, width) -> (P, D)
        return F.linear(x.flatten(1), self.weight.flatten(1), self.bias)


def adopt(base):
    """Make a transformers vision-language model without head run packs; weights and their names
    stay as they are."""
    text_of(base).config._attn_implementation = "packs"
    tower = base.get_encoder("image")
    if takes(tower.forward, "grid_thw"):  # images of any size in one row of patches
        tower.config._attn_implementation = "images-like-flash"
    for module in tower.modules():
        if type(module) is nn.Conv3d and module.kernel_size == module.stride:
            module.__class__ = PatchProduct
    states.adopt(base)
    return base


def forward_pack(base, pack, kept=None, **kwargs):
    """Final hidden states (T, D) of `pack` under `base`, a transformers model without head.

    kept: a dictionary for what linear attention hands on behind the segments (states.Forest).
    """
    nothing = 0.0
    if not pack.images:
        nothing = _run_blank_image(base, pack.ids.device)
    positions = pack.positions  # (R, T)
    if len(positions) > 1:
        positions = positions.unsqueeze(1)  # (R, 1, T): multimodal rotary
    output = base(
        input_ids=pack.ids.unsqueeze(0),
        position_ids=positions,
        layout=pack.layout,
        recurrence=states.forest_of(base, pack, kept),
        **pack.images,
        **kwargs,
    )
    has_attention = any(hasattr(layer, "self_attn") for layer in text_of(base).layers)
    if has_attention and not getattr(pack.layout, "was_asked", False):
        raise RuntimeError(
            f"{type(base).__name__} computed its attention past us, over the ends of segments: its "
            "layers do not hand `layout` on, or do not look the function up in the configuration"
        )
    return output.last_hidden_state[0] + nothing


def _run_blank_image(base, device):
    """Run the vision tower on `base.blank_image` -> 0, with a gradient of zeros.

    All ranks run the tower in every forward, and first, or the collectives of a sharded one never
    meet. So does one rank alone: a parameter then has a gradient of zero, which AdamW treats
    otherwise than none, on any number of ranks.
    """
    blank = {name: tensor.to(device) for name, tensor in base.blank_image.items()}
    seen = base.get_image_features(**blank, return_dict=True)
    features = [seen.pooler_output, getattr(seen, "deepstack_features", None)]
    return 0.0 * sum(feature.sum() for feature in _tensors(features))


def _tensors(features):
    """Yield the tensors in lists of lists: of each image, and of each layer that is fed."""
    if isinstance(features, torch.Tensor):
        yield features
    for feature in features if isinstance(features, list | tuple) else ():
        yield from _tensors(feature)
