"""
Who attends to whom in a pack: the one rule that both layouts of attention follow.

A token attends to its own segment up to itself, and to all of its segment's ancestors. A family may
change that in two ways. In layers with a window a token looks no further back than so many tokens
along its path, from the root through the child. And tokens of one image may attend to each other
both ways: images stand in roots.
"""

from __future__ import annotations

import torch


def depths(pack):
    """(T,) int32, on the CPU: of each token its depth, the number of its predecessors on its path
    from the root."""
    found = []
    for number, segment in enumerate(pack.segments):
        above = sum(pack.segments[ancestor].length for ancestor in pack.ancestors(number))
        found.append(above + torch.arange(segment.length, dtype=torch.int32))
    return torch.cat(found)


def rule_of(pack, depth, window=None):
    """A function of two tensors of places in the pack, a query's and a key's: whether it attends to
    it. depth: as of `depths`, on the pack's device. window: tokens that a query sees, itself
    included; None: all."""
    sees = pack.sees()
    segment = pack.segment
    block = pack.blocks

    def causal(query, key):
        return (query >= key) & sees[segment[query], segment[key]]

    def with_images(query, key):
        of_one_image = (block[query] >= 0) & (block[query] == block[key])
        return ((query >= key) | of_one_image) & sees[segment[query], segment[key]]

    # Each is a function of its own: of one that asks whether there is a `block`, torch 2.13 makes a
    # kernel for CPUs whose C++ does not compile.
    rule = causal if block is None else with_images
    if window is None:
        return rule

    def within_window(query, key):
        return rule(query, key) & (depth[query] - depth[key] < window)

    return within_window


def narrowest(window, deepest):
    """`window`, or None where no path of the pack is longer. deepest: the greatest depth in it."""
    if window is None or deepest < window:
        return None
    return window


def blocks_of(image_mask):
    """(T,) of a prompt the number of the image, or tile, that each token belongs to; -1: none. Its
    tokens (image_mask (T,) bool) stand side by side."""
    starts = image_mask & ~torch.nn.functional.pad(image_mask, (1, 0))[:-1]
    return torch.where(image_mask, starts.cumsum(0) - 1, -1)
