"""
Packs: the one data structure of all three stages.

A model call takes one row of tokens, a forest of segments without padding. A token attends to its
own segment up to itself, and to all of its segment's ancestors. So what several sequences share
(the prompt and its image) is computed once:

    SFT            root = a whole conversation                 (no children: block-diagonal)
    policy         root = prompt, children = the N rollouts of its group
    discriminator  root = prompt, children = the spans of the reference and of the N rollouts
    prefill        root = prompt (sampler.py takes its keys and values from there)

    trees = [Tree(prompt, [rollout_ids, ...]), ...]
    for pack in packs_of(trees, budget=16384, device=device):         # this rank's share of them
        hidden = forward_pack(hf.model, pack)                         # (T, D), attention.py
        logp = token_logps(hidden[pack.source], hf.lm_head.weight, pack.target)       # (S,)

    T tokens of a pack   S scored tokens   K children   G trees
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass, field

import torch

from engine import attention
from engine.images import together
from engine.progress import progress
from engine.ranks import all_max, rank, world


@dataclass
class Tree:
    """A prompt and what continues it."""

    prompt: object  # data.Prompt: ids, positions, next_position, images, blocks
    children: list[list[int]] = field(default_factory=list)  # token ids of each
    kinds: list[int] | None = None  # of each child: the number of its span (discriminator)
    shared: int = 0  # so many first children (the reference's) stand in each part of a split tree
    mask: torch.Tensor | None = None  # (T,) bool, the root's own trained tokens (SFT)

    def fixed_tokens(self):
        """Tokens that each part of this tree holds: the root and the shared children."""
        return len(self.prompt.ids) + sum(map(len, self.children[: self.shared]))

    def tokens(self):
        return len(self.prompt.ids) + sum(map(len, self.children))


@dataclass
class Segment:
    """A run of tokens that stand together in a pack: a prompt, or one continuation of it."""

    start: int  # its first token's place in the pack
    ids: torch.Tensor  # (n,)
    positions: torch.Tensor  # (R, n)
    tree: int  # number of its tree, counted within the pack
    kind: int = -1  # number of the child's span; -1 for a root
    parent: int = -1  # the segment above, -1 for a root
    copies: int = 1  # packs that it stands in

    @property
    def length(self):
        return len(self.ids)


@dataclass
class Pack:
    """One row of tokens, what is scored in it, and how attention runs over it."""

    ids: torch.Tensor  # (T,)
    # (R, T) rotary: of one row, plain; of several, multimodal, as Qwen-VL's 3 (time, height, width)
    # and Hunyuan's 4. All packs of a model have as many rows, but for fillers, which have one.
    positions: torch.Tensor
    segment: torch.Tensor  # (T,) number of the token's segment
    tree: torch.Tensor  # (T,) number of the token's tree in the pack; a padded tail's is one more
    kind: torch.Tensor  # (T,) number of the token's span; -1 in roots
    segments: list[Segment]
    children: list[
        tuple[int, int]
    ]  # K pairs (its tree in the list of trees, its place among the children)
    ends: torch.Tensor  # (K,) the last token of each child
    source: torch.Tensor  # (S,) the token whose hidden state predicts ...
    target: torch.Tensor  # (S,) ... this token id, ...
    sequence: torch.Tensor  # (S,) ... which belongs to this child (SFT: to this tree of the pack)
    trees: list[int]  # G, the place of each of the pack's trees in the list of trees
    tree_tokens: torch.Tensor  # (G,) tokens of each whole tree, other packs' parts included
    copies: torch.Tensor  # (T,) in how many packs the token stands: above 1 in roots of split trees
    images: dict[str, torch.Tensor]  # of all prompts, as the model's forward takes them; {}: none
    # (T,) number of the image whose tokens attend to each other; -1: of none; None: no token is.
    # Images are counted within their prompt: the same number in another prompt is another image.
    blocks: torch.Tensor | None
    layout: object = None  # computes attention over the pack (attention.py)

    def ancestors(self, segment):
        """The segments, by number, that `segment` attends to besides itself, the root first."""
        above = self.segments[segment].parent
        return [] if above < 0 else [*self.ancestors(above), above]

    def sees(self):
        """(segments, segments) bool: which segment attends to which. With the causal order it is
        the definition of attention over a pack."""
        sees = torch.eye(len(self.segments), dtype=torch.bool)
        for number in range(len(self.segments)):
            sees[number, self.ancestors(number)] = True
        return sees.to(self.ids.device)

    def rows(self, values):
        """Values (S,) of the scored tokens one row a sequence: (K, longest), 0 behind its end."""
        lengths = self.sequence.bincount()
        starts = lengths.cumsum(0) - lengths
        place = torch.arange(len(values), device=values.device) - starts[self.sequence]
        longest = int(lengths.max()) if len(lengths) else 0
        out = values.new_zeros(len(lengths), longest)
        return out.index_put((self.sequence, place), values)

    def mean_over_trees(self, values):
        """Means of values (L, T, E) over the tokens of each tree: (L, G, E). Of a tree that is
        split it is this pack's part of the mean: a token that stands in several packs counts a
        share of one in each."""
        values = values / self.copies.unsqueeze(1)
        padding = 1  # a padded tail counts as one tree more
        sums = values.new_zeros(len(values), len(self.trees) + padding, values.shape[2])
        sums = sums.index_add(1, self.tree, values)
        return sums[:, : len(self.trees)] / self.tree_tokens.unsqueeze(1)


# ----------------------------------------------------------------------------- which packs
def packs_of(trees, budget, device):
    """Yield this rank's packs of `trees`, a list that all ranks hold alike.

    The packs are dealt out evenly by tokens, equally many to each rank: sharded models need as many
    forward passes everywhere. A rank for which none is left gets a filler, in which nothing is
    scored. Of no trees there are no packs, on any rank.
    """
    packs = plan(trees, budget, multiple_of=world())
    copies = count_parts(packs)
    for part in progress(packs[rank() :: world()], "packs", "pack"):
        yield build_pack(trees, part, device, copies) if part else filler(device)


def packs_of_own(trees, budget, device):
    """Yield the packs of this rank's own `trees`, equally many on all ranks: fillers make up."""
    packs = plan(trees, budget)
    for number in progress(range(int(all_max(len(packs)))), "packs", "pack"):
        if number < len(packs):
            yield build_pack(trees, packs[number], device, count_parts(packs))
        else:
            yield filler(device)


def is_split(trees, budget):
    """Whether `packs_of` spreads any of the trees over several packs."""
    packs = plan(trees, budget, multiple_of=world())
    return any(parts > 1 for parts in count_parts(packs).values())


def count_parts(packs):
    """In how many of the planned packs each tree stands: {number of the tree: packs}."""
    return Counter(t for pack in packs for t, _ in pack)


def plan(trees, budget, multiple_of=1):
    """Divide trees into packs: for each pack a list of (number of a tree, its children's numbers).

    No pack has more than `budget` tokens, unless one child (or a tree without children) is longer
    by itself. The number of packs is a multiple of `multiple_of`, the ranks, among which the packs
    are then evened out; with fewer children than that some packs are empty. A tree is split only
    where a pack is full, and its root and shared children stand in each of its parts.
    """
    packs = _fill(trees, budget)
    if multiple_of > 1 and packs:
        number = multiple_of * math.ceil(len(packs) / multiple_of)
        packs = _even_out(trees, budget, number)
        packs += [[] for _ in range(number - len(packs))]
    return packs


def _even_out(trees, budget, number):
    """At most `number` packs, the largest as small as can be: by bisection of its size."""
    best = _fill(trees, budget)
    low = sum(tree.tokens() for tree in trees) // number
    high = budget
    while high - low > max(1, low // 200):  # half a percent
        size = (low + high) // 2
        packs = _fill(trees, size)
        if len(packs) <= number:
            best = packs
            high = size
        else:
            low = size
    return best


def _fill(trees, size):
    """Packs of at most `size` tokens: one after the other, large pieces first."""
    waiting = sorted(range(len(trees)), key=lambda t: (-trees[t].tokens(), t))
    begun = None  # the tree that did not fit into the last pack whole ...
    rest = []  # ... and its children that are still to be packed, the longest first
    packs = []
    while waiting or begun is not None:
        pack = []
        room = size
        # 1) go on with the tree that was begun
        if begun is not None:
            taken, rest = _that_fit(trees[begun], rest, room, at_least=1)
            room -= _add(trees, pack, begun, taken)
        # 2) trees that fit whole, the largest first
        if not rest:
            begun = None
            for t in list(waiting):
                if trees[t].tokens() <= room:
                    room -= _add(trees, pack, t, _longest_first(trees[t]))
                    waiting.remove(t)
        # 3) a part of one more
        if not rest and waiting:
            t = waiting[0]
            needed = 0 if pack else 1
            taken, stay = _that_fit(trees[t], _longest_first(trees[t]), room, at_least=needed)
            if taken or not pack:
                _add(trees, pack, t, taken)
                waiting.remove(t)
                rest = stay
                begun = t if rest else None
        packs.append(sorted(pack))
    return packs


def _longest_first(tree):
    """The numbers of the children that are not shared."""
    own = range(tree.shared, len(tree.children))
    return sorted(own, key=lambda c: (-len(tree.children[c]), c))


def _that_fit(tree, children, room, at_least):
    """(children that fit into `room` tokens beside root and shared children, those that stay)."""
    room -= tree.fixed_tokens()
    taken = []
    stay = []
    for c in children:
        if len(tree.children[c]) <= room:
            taken.append(c)
            room -= len(tree.children[c])
        else:
            stay.append(c)
    if len(taken) < at_least and stay:
        taken.append(stay.pop(0))
    return taken, stay


def _add(trees, pack, t, children):
    """Put children of tree t, and its shared ones, into `pack` -> the tokens that this takes."""
    tree = trees[t]
    pack.append((t, [*range(tree.shared), *sorted(children)]))
    return tree.fixed_tokens() + sum(len(tree.children[c]) for c in children)


# ----------------------------------------------------------------------------- one pack
def build_pack(trees, part, device="cpu", copies=None, pad_to=None):
    """Lay `part` of `trees`, one element of `plan`, out as a Pack on `device`.

    copies: {number of a tree: packs that it stands in}, by default one each. On CUDA the tail is
    padded to a multiple of `pad_to` (128) with a segment of its own that is never scored, so that
    compiled code sees few shapes.
    """
    device = torch.device(device)
    segments = []
    children = []
    ends = []
    scored = []  # (source, target, sequence) of each sequence, (n,) each
    length = 0
    for number, (t, chosen) in enumerate(part):
        tree = trees[t]
        prompt = tree.prompt
        parts = copies[t] if copies else 1
        root = Segment(length, prompt.ids, prompt.positions, number, -1, -1, parts)
        root_number = len(segments)
        segments.append(root)
        length += root.length
        if tree.mask is not None:
            at = tree.mask.nonzero().squeeze(1)
            scored.append((root.start + at - 1, prompt.ids[at], torch.full_like(at, number)))
        for c in chosen:
            ids = torch.tensor(tree.children[c], dtype=torch.long)
            step = torch.arange(len(ids))
            positions = (prompt.next_position + step).expand(len(prompt.positions), -1)
            kind = tree.kinds[c] if tree.kinds else 0
            stands_in = parts if c < tree.shared else 1
            child = Segment(length, ids, positions, number, kind, root_number, stands_in)
            source = length + step - 1  # the token before it ...
            source[:1] = root.start + root.length - 1  # ... which for the first is the root's last
            scored.append((source, ids, torch.full_like(step, len(children))))
            segments.append(child)
            length += child.length
            ends.append(length - 1)
            children.append((t, c))
    multiple = pad_to or (128 if device.type == "cuda" else 1)
    tail = -length % multiple
    if tail:
        positions = torch.arange(tail).expand(len(segments[0].positions), -1)
        segments.append(Segment(length, torch.zeros(tail, dtype=torch.long), positions, len(part)))
    return _to_pack(trees, [t for t, _ in part], segments, children, ends, scored, device)


def filler(device):
    """A pack of two tokens in which nothing is scored: for a rank that must run as many forward
    passes as the others. Its loss is 0, with a gradient of zeros."""
    ids = torch.zeros(2, dtype=torch.long)
    segment = Segment(0, ids, torch.arange(2).unsqueeze(0), tree=0)
    return _to_pack([], [], [segment], [], [], [], torch.device(device))


def _to_pack(trees, chosen, segments, children, ends, scored, device):
    number = torch.repeat_interleave(torch.tensor([s.length for s in segments]))  # (T,)
    tree = torch.tensor([segment.tree for segment in segments])
    kind = torch.tensor([segment.kind for segment in segments])
    copies = torch.tensor([segment.copies for segment in segments])
    nothing = torch.zeros(0, dtype=torch.long)  # where nothing is scored
    prompts = [trees[t].prompt for t in chosen]
    images = together([prompt.images for prompt in prompts])
    blocks = _blocks(prompts, segments)
    pack = Pack(
        ids=torch.cat([segment.ids for segment in segments]).to(device),
        positions=torch.cat([segment.positions for segment in segments], 1).to(device),
        segment=number.to(device),
        tree=tree[number].to(device),
        kind=kind[number].to(device),
        segments=segments,
        children=children,
        ends=torch.tensor(ends, dtype=torch.long, device=device),
        source=torch.cat([*(source for source, _, _ in scored), nothing]).to(device),
        target=torch.cat([*(target for _, target, _ in scored), nothing]).to(device),
        sequence=torch.cat([*(sequence for _, _, sequence in scored), nothing]).to(device),
        trees=chosen,
        tree_tokens=torch.tensor([trees[t].tokens() for t in chosen], device=device),
        copies=copies[number].to(device),
        images={name: tensor.to(device) for name, tensor in images.items()},
        blocks=None if blocks is None else blocks.to(device),
    )
    pack.layout = attention.layout_of(pack)
    return pack


def _blocks(prompts, segments):
    """(T,) of each token the number of its image in its prompt, where an image's tokens attend to
    each other both ways, else -1; None where no prompt has such images."""
    if all(prompt.blocks is None for prompt in prompts):
        return None
    found = []
    for segment in segments:
        blocks = torch.full((segment.length,), -1)
        is_root = segment.parent < 0 and segment.tree < len(prompts)  # and no padded tail
        if is_root and prompts[segment.tree].blocks is not None:
            blocks = prompts[segment.tree].blocks
        found.append(blocks)
    return torch.cat(found)
