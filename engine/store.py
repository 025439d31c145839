"""
The keys and values of what the sampler decodes.

Each row has a slot of the store. Where a call's prompts are short, each one's keys and values are
copied to the slots of all of its rows. Where they are long they are kept once (SharedPrompts): the
rows of a prompt ask together, in one matrix product that reads them once, and each row's attention
is merged of its prompt's part and its own.

Layers of linear attention have no keys and values but a state, which grows with nothing: each row
has its own (states.SlotStates).

    B slots   S positions of a slot   H key-value heads   Q query heads
    d width of a head
    of shared prompts: G places   R rows of one, at most   P tokens of the longest
    of an attention: n batches   q queries of each
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from engine.families import text_of
from engine.logprob import product
from engine.states import SlotStates, delta_nets

NOTHING = -1e30  # a score that has no weight, and no NaN comes of it where all scores are so


class PromptCache:
    """What a read of prompts leaves of the tokens of a pack, or of one of its segments, by the
    number of the layer.

    While a pack is read it stands in for a transformers cache, whose `update` is called.
    """

    def __init__(self):
        self.keys = {}  # of attention (H, T, d)
        self.values = {}  # (H, T, d)
        self.states = {}  # of linear attention, as states.Forest keeps them; of one segment a pair

    def update(self, key, value, layer, *_, **__):
        """Keep a layer's key and value (1, H, T, d); attention over the pack goes on with them."""
        self.keys[layer] = key[0]
        self.values[layer] = value[0]
        return key, value

    def cut(self, number, segment):
        """What belongs to a segment of the pack, its number-th: keys and values share the memory of
        the whole."""
        part = PromptCache()
        own = slice(segment.start, segment.start + segment.length)
        for layer in self.keys:
            part.keys[layer] = self.keys[layer][:, own]
            part.values[layer] = self.values[layer][:, own]
        for layer, (inputs, states) in self.states.items():
            part.states[layer] = (inputs[number], states[number])
        return part


# ----------------------------------------------------------------------------- attention in parts
def attend_to_part(query, key, value, bias):
    """Attention of queries (n, q, d) over a part of their keys and values (n, S, d) each, with a
    bias (n, 1, S) on the scores -> (out (n, q, d), lse (n, q, 1) float32). lse is the log of the
    sum of exp of the scores: what `merge` weighs the part by."""
    scores = product(query, key.transpose(1, 2)).add_(bias)  # (n, q, S)
    p = scores.softmax(-1)
    top = scores.amax(-1, keepdim=True)
    lse = top - p.amax(-1, keepdim=True).log()  # since p = exp(score - lse)
    return p.to(value.dtype) @ value, lse


def merge(part, other):
    """The attention over two parts of the keys together, (n, q, d) float32."""
    out, lse = part
    other_out, other_lse = other
    share = (lse - other_lse).sigmoid()  # exp(lse) / (exp(lse) + exp(other_lse))
    return torch.lerp(other_out.float(), out.float(), share)


class Store:
    """The keys and values of all slots, each row's from position 0 on: of its prompt's copy and
    its own tokens, or, with `shared`, of its own tokens alone.

    S grows with the longest row, so that the store is as large as what is in it and attention reads
    no more. In the model's forward it stands in for two things: for a transformers cache, of which
    `update` is called, and for the layout of a pack, of which `attend` is called.
    """

    def __init__(self, hf, slots, share_prompts=False):
        self.heads = text_of(hf.model).config.num_key_value_heads
        self.size = 0  # S, the positions that each slot has
        empty = (slots * self.heads, 0)
        self.keys = no_keys(hf, *empty)  # number of a layer -> (B * H, S, d)
        self.values = no_keys(hf, *empty)  # number of a layer -> (B * H, S, d)
        self.states = SlotStates(hf, slots) if delta_nets(hf.model) else None
        self.filled = None  # (B * H,) of this step: the position of its keys and values
        self.biases = {}  # window -> (B * H, 1, S): 0 where its queries may look, else -inf
        self.write_at = None  # (B * H,) where its keys and values go, counted in (B * H * S, d)
        self.layer = None  # whose keys and values were asked for last
        self.shared = SharedPrompts(hf, slots) if share_prompts else None

    def grow(self, positions):
        """Append `positions` to every slot, layer after layer: there are never two whole stores."""
        self.size += positions
        for store in (self.keys, self.values):
            for layer, old in store.items():
                store[layer] = F.pad(old, (0, 0, 0, positions))

    def keep(self, slots):
        """Keep only `slots`, which are then numbered from 0."""
        for store in (self.keys, self.values):
            for layer, old in store.items():
                store[layer] = old.unflatten(0, (-1, self.heads))[slots].flatten(0, 1)
        if self.states:
            self.states.keep(slots)
        if self.shared:
            self.shared.keep(slots)

    def write_prompt(self, slots, cache, length):
        """Copy the `length` tokens of a prompt's read into each of `slots`."""
        for store, prompt in ((self.keys, cache.keys), (self.values, cache.values)):
            for layer, new in prompt.items():
                store[layer].unflatten(0, (-1, self.heads))[slots, :, :length] = new

    def begin_step(self, filled):
        """Prepare for one token more in each slot, at position filled (B,)."""
        device = filled.device
        self.filled = filled.repeat_interleave(self.heads)  # (B * H,)
        self.biases = {}
        rows = torch.arange(len(self.filled), device=device)
        self.write_at = rows * self.size + self.filled

    def bias(self, window):
        """The bias (B * H, 1, S) on the scores of layers with this window, in tokens, or None."""
        if window not in self.biases:
            filled = self.filled.unsqueeze(1)
            positions = torch.arange(self.size, device=filled.device)
            seen = positions <= filled  # (B * H, S)
            if window is not None:
                seen = seen & (filled - positions < window)
            self.biases[window] = torch.where(seen, 0.0, -torch.inf).unsqueeze(1)
        return self.biases[window]

    def update(self, key, value, layer, *_, **__):
        """Add this step's key and value (B, H, 1, d), and return all of the layer's."""
        for store, new in ((self.keys[layer], key), (self.values[layer], value)):
            by_place = store.flatten(0, 1)  # (B * H * S, d)
            by_place.index_copy_(0, self.write_at, new.flatten(0, 2))
        self.layer = layer
        return self.keys[layer], self.values[layer]

    def attend(self, query, key, value, scaling, window=None):
        """Attention of one query (B, Q, 1, d) per slot over its keys and values -> (B, 1, Q, d).
        window: of the layer, in tokens. Raises ValueError for one where prompts are shared: a
        prompt that is kept once has one bias for all of its rows.

        Two thin matrix products read each key and value once. torch's own attention would repeat
        them for each query head.
        """
        if self.shared is not None and window is not None:
            raise ValueError(
                f"a layer has a window, of {window} tokens, so prompts cannot be shared: "
                "families.windows_of does not know it"
            )
        slots, query_heads, _, width = query.shape
        by_head = (query * scaling).view(len(key), -1, width)  # (B * H, Q / H, d)
        if self.shared is None:
            scores = product(by_head, key.transpose(1, 2)).add_(
                self.bias(window)
            )  # (B * H, Q / H, S)
            out = scores.softmax(-1).to(value.dtype) @ value  # (B * H, Q / H, d)
        else:
            own = attend_to_part(by_head, key, value, self.bias(None))
            out = merge(own, self.shared.attend(by_head, self.layer)).to(value.dtype)
        return out.view(slots, 1, query_heads, width)


def no_keys(hf, *sizes):
    """An empty tensor (*sizes, d) for each layer that has attention: {its number: tensor}."""
    empty = {}
    for number, layer in enumerate(text_of(hf.model).layers):
        if hasattr(layer, "self_attn"):
            width = layer.self_attn.head_dim
            empty[number] = torch.zeros(*sizes, width, dtype=hf.dtype, device=hf.device)
    return empty


class SharedPrompts:
    """The keys and values of the prompts whose rows are in the slots, each prompt's once.

    A prompt has a place, and each of its rows a seat there. Queries are brought to their seats, so
    that one product of (R * Q / H, d) queries and a prompt's keys serves all of its rows, and the
    results are brought back. Seats without a row compute too, and nobody reads them.
    """

    def __init__(self, hf, slots):
        self.heads = text_of(hf.model).config.num_key_value_heads
        self.device = hf.device
        self.longest = 0  # P
        self.keys = no_keys(hf, 0, self.heads, 0)  # number of a layer -> (G, H, P, d)
        self.values = no_keys(hf, 0, self.heads, 0)  # number of a layer -> (G, H, P, d)
        self.lengths = []  # G, tokens of the prompt in each place
        self.places = {}  # number of a prompt -> its place
        self.prompts = [None] * slots  # B, number of the prompt of each slot's row
        self.most = 0  # R, which only grows until `keep`: a captured step stays valid longer
        self.is_arranged = True
        self.bias = None  # (G * H, 1, P) 0 on a prompt's tokens, NOTHING behind them
        self.slots = None  # (G * R,) the slot of each seat
        self.seats = None  # (B,) the seat of each slot

    def add(self, p, slots, cache, length):
        """Let rows of prompt p begin in `slots`: keep the `length` tokens of its read."""
        for slot in slots:
            self.prompts[slot] = p
        self.is_arranged = False
        if p in self.places:
            return
        place = self._free_place()
        self.places[p] = place
        self.lengths[place] = length
        self._reserve(length)
        for store, prompt in ((self.keys, cache.keys), (self.values, cache.values)):
            for layer, new in prompt.items():
                store[layer][place, :, :length] = new

    def leave(self, slot):
        """The row in `slot` has ended."""
        self.prompts[slot] = None

    def keep(self, slots):
        """Keep only `slots`, which are then numbered from 0, and the prompts of their rows."""
        self.prompts = [self.prompts[slot] for slot in slots]
        kept = {p: place for p, place in self.places.items() if p in self.prompts}
        places = [*kept.values()]
        for store in (self.keys, self.values):
            for layer, old in store.items():
                store[layer] = old[places]
        self.lengths = [self.lengths[place] for place in places]
        self.places = {p: number for number, p in enumerate(kept)}
        self.most = 0
        self.is_arranged = False

    def _free_place(self):
        """A place whose prompt has no rows any more, or a new one."""
        for p, place in self.places.items():
            if p not in self.prompts:
                del self.places[p]
                return place
        self.lengths.append(0)
        return len(self.lengths) - 1

    def _reserve(self, length):
        """Make room for `length` tokens in as many places as there are."""
        self.longest = max(self.longest, length)
        for store in (self.keys, self.values):
            for layer, old in store.items():
                places, _, tokens, _ = old.shape
                more = (0, 0, 0, self.longest - tokens, 0, 0, 0, len(self.lengths) - places)
                if any(more):
                    store[layer] = F.pad(old, more)

    def arrange(self):
        """Seat the rows anew where slots were filled or given up -> whether any tensor of a step
        was replaced, and not just written to. Where keys and values were, for more places or longer
        prompts, `bias` is too: it has their sizes."""
        if self.is_arranged:
            return False
        self.is_arranged = True
        rows_of = {}  # place -> its rows' slots
        for slot, p in enumerate(self.prompts):
            if p is not None:
                place = self.places[p]
                rows_of.setdefault(place, []).append(slot)
        self.most = max(self.most, *map(len, rows_of.values()))
        slots = torch.zeros(len(self.lengths), self.most, dtype=torch.long)  # (G, R)
        seats = torch.zeros(len(self.prompts), dtype=torch.long)  # (B,)
        for place, of_place in rows_of.items():
            for r, slot in enumerate(of_place):
                slots[place, r] = slot
                seats[slot] = place * self.most + r
        tokens = torch.arange(self.longest)
        is_behind = tokens >= torch.tensor(self.lengths).unsqueeze(1)  # (G, P)
        bias = torch.where(is_behind, NOTHING, 0.0)
        bias = bias.repeat_interleave(self.heads, 0)
        replaced = [
            self._write("bias", bias.unsqueeze(1)),
            self._write("slots", slots.flatten()),
            self._write("seats", seats),
        ]
        return any(replaced)

    def _write(self, name, new):
        """Write `new` to the tensor of that name, in place if it fits -> whether it did not."""
        old = getattr(self, name)
        if old is not None and old.shape == new.shape:
            old.copy_(new)
            return False
        setattr(self, name, new.to(self.device))
        return True

    def attend(self, by_head, layer):
        """Attention of the slots' queries (B * H, Q / H, d) over their prompts, as of
        `attend_to_part`."""
        keys = self.keys[layer].flatten(0, 1)  # (G * H, P, d)
        values = self.values[layer].flatten(0, 1)
        places = len(self.lengths)
        _, group, width = by_head.shape  # Q / H, d
        seated = by_head.view(-1, self.heads, group, width)
        seated = seated.index_select(0, self.slots)  # (G * R, H, Q / H, d)
        seated = seated.view(places, self.most, self.heads, group, width)
        seated = seated.transpose(1, 2).reshape(len(keys), -1, width)  # (G * H, R * Q / H, d)
        out, lse = attend_to_part(seated, keys, values, self.bias)
        return self._to_slots(out, group), self._to_slots(lse, group)

    def _to_slots(self, x, group):
        """(G * H, R * Q / H, n) of the seats -> (B * H, Q / H, n) of the slots."""
        places = len(self.lengths)
        x = x.view(places, self.heads, self.most, group, -1)
        x = x.transpose(1, 2).flatten(0, 1)  # (G * R, H, Q / H, n)
        x = x.index_select(0, self.seats)  # (B, H, Q / H, n)
        return x.flatten(0, 1)
