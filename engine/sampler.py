"""
Batched sampling for rollouts: prefill each prompt once, continue it N times, stop rows one by one.

    rollouts = generate(hf, prompts, group_size, max_tokens, banned=encoder.banned, eos=encoder.eos_ids, seed=(1, step))
    rollouts[p][k].ids, .logps, .stop                                     # k-th rollout of the p-th prompt

Samples from exactly the distribution that the trainer scores: temperature only, no top-k or top-p, and the same banned
ids left out. One uniform number per (rollout, token) is drawn beforehand from (seed, prompt's number, k) and turned into
a token through the inverse of the cumulative distribution, so that the same ids come out on any number of ranks and in
any order of the rows. Rows are slots of one key-value store; a slot whose row ended takes the next waiting row. A step of
all slots is made of tensor operations alone: on CUDA it is a captured graph, and the host looks only every few tokens.

    B slots   S positions of the store   H key-value heads   d head width   V vocabulary
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

from engine.logprob import logits, product
from engine.packs import Tree, make, plan, run

BLOCK = {
    "cpu": 16,
    "cuda": 256,
}  # positions by which the store grows: on CUDA each time captures the step anew


@dataclass
class Rollout:
    ids: list[int]  # the end token included where one was sampled
    logps: list[float]  # of each id, under the sampling distribution, in nats
    stop: str  # "end": an end token was sampled; "length": cut at max_tokens


def uniforms(seed, prompt, k, length) -> np.ndarray:
    """The random numbers of one rollout, (length,) float64 in [0, 1)."""
    return np.random.Generator(np.random.Philox(np.random.SeedSequence([*seed, prompt, k]))).random(
        length
    )


def pick(logits, u, block=256):
    """Sample ids (B,) and their log-probs (B,) from logits (B, V) float32 with uniform numbers u (B,); None: the argmax.

    The distribution is inverted in two steps, a block of ids and then an id, with sums in float64: 150,000 float32 terms
    would lose the tail.
    """
    lse = logits.logsumexp(-1, keepdim=True)
    if u is None:
        ids = logits.argmax(-1, keepdim=True)
    else:
        p = F.pad((logits - lse).exp_(), (0, -logits.shape[1] % block)).view(len(logits), -1, block)
        sums = p.sum(-1, dtype=torch.float64)
        cdf = sums.cumsum(-1)
        target = u.double().unsqueeze(1) * cdf[:, -1:]
        b = _first_above(cdf, target)
        inside = p.take_along_dim(b.unsqueeze(2), 1).squeeze(1).double().cumsum(-1)
        ids = b * block + _first_above(inside, target - (cdf - sums).gather(1, b))
    return ids.squeeze(1), (logits.gather(1, ids) - lse).squeeze(1)


def _first_above(cdf, target):
    """Index (B, 1) of the first entry of cdf (B, n) above target (B, 1): never one of probability 0. Where rounding put
    the target at or above the end, the last entry that rises."""
    rising = cdf > F.pad(cdf, (1, 0))[:, :-1]
    last = cdf.shape[1] - 1 - rising.flip(-1).long().argmax(-1, keepdim=True)
    return torch.minimum(torch.searchsorted(cdf, target, right=True), last)


class _Prefill:
    """Stands in for a transformers cache while prompts are read: keeps the keys and values of every layer, (H, T, d)."""

    def __init__(self):
        self.layers = {}

    def update(self, key, value, layer, *_):
        self.layers[layer] = key[0], value[0]
        return key, value


class _Slots:
    """What is being decoded: keys and values, (B * H, S, d) in each layer, and, per slot, the token to feed next, its
    rotary position, how many positions are filled, how many tokens were sampled, whether it is live, and the row's uniform
    numbers and results. Stands in both for a transformers cache (`update`) and for a layout (`attend`).

    `step` decodes one token in every slot and changes these tensors in place, without asking the host anything: on CUDA
    it is captured as a graph and replayed. A slot that is not live computes too, where nobody reads. S grows with the
    longest row, so that the store is as large as what is in it and attention reads no more.
    """

    def __init__(self, hf, slots, max_tokens, ends, banned, temperature):
        self.text, self.head, self.rows = (
            hf.model.language_model,
            hf.lm_head.weight,
            [None] * slots,
        )  # a row: (prompt, k)
        self.max_tokens, self.ends, self.banned, self.temperature = (
            max_tokens,
            ends,
            banned,
            temperature,
        )
        cfg, like, self.graph = self.text.config, dict(device=hf.device), None
        self.heads, width = cfg.num_key_value_heads, self.text.layers[0].self_attn.head_dim
        empty = torch.zeros(slots * self.heads, 0, width, dtype=hf.dtype, **like)
        self.store = [[empty, empty] for _ in range(cfg.num_hidden_layers)]
        self.token, self.position, self.filled, self.count = torch.zeros(
            4, slots, dtype=torch.long, **like
        )
        self.live, self.all = (
            torch.zeros(slots, dtype=torch.bool, **like),
            torch.arange(slots, **like),
        )
        self.u = torch.zeros(
            slots, max_tokens + 1, dtype=torch.float64, **like
        )  # the last column is the idle slots'
        self.ids = torch.zeros(slots, max_tokens + 1, dtype=torch.long, **like)
        self.logps = torch.zeros(slots, max_tokens + 1, **like)

    def fill(self, slots, prompt, prefill, start, u):
        """Begin a row of `prompt` in each of `slots`, with uniform numbers u. Its last token is left out of the prefill
        (which has the prompt at `start`) and fed by the first step, so that a fresh row needs no step of its own."""
        length = len(prompt.ids) - 1
        self.reserve(length + 1)
        for layer, pair in prefill.layers.items():
            for store, new in zip(self.store[layer], pair, strict=True):
                store.unflatten(0, (-1, self.heads))[slots, :, :length] = new[
                    :, start : start + length
                ]
        self.u[slots, : self.max_tokens] = torch.from_numpy(np.stack(u)).to(self.u.device)
        self.token[slots], self.position[slots] = prompt.ids[-1].item(), prompt.next_position - 1
        self.filled[slots], self.count[slots], self.live[slots] = length, 0, True

    def reserve(self, length):
        """Room for `length` positions in every slot."""
        more = length - self.store[0][0].shape[1]
        if more > 0:
            block, self.graph = BLOCK[self.u.device.type], None
            for pair in self.store:  # one after the other: never twice the store
                pair[:] = [F.pad(pair.pop(0), (0, 0, 0, -(-more // block) * block)) for _ in "kv"]

    def keep(self, slots):  # drop all others
        self.rows, self.all, self.graph = (
            [self.rows[s] for s in slots],
            self.all[: len(slots)],
            None,
        )
        for pair in self.store:
            pair[:] = [
                pair.pop(0).unflatten(0, (-1, self.heads))[slots].flatten(0, 1) for _ in "kv"
            ]
        for name in ("token", "position", "filled", "count", "live", "u", "ids", "logps"):
            setattr(self, name, getattr(self, name)[slots])

    def advance(self, steps):
        """Decode `steps` tokens in every slot; then the host looks: slots whose row has ended."""
        self.reserve(int(self.filled.max()) + steps)
        for _ in range(steps):
            if self.u.is_cuda and self.graph is None:
                self.capture()
            elif self.u.is_cuda:
                self.graph.replay()
            else:
                self.step()
        return (~self.live).nonzero().squeeze(1).tolist()

    def capture(self):
        """Run a step, then capture it: shapes stay until the store grows or shrinks."""
        self.graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(
            stream
        ):  # libraries set themselves up in it, which a graph must not hold
            self.step()
        torch.cuda.current_stream().wait_stream(stream)
        with torch.cuda.graph(self.graph):
            self.step()

    def step(self):
        size = self.store[0][0].shape[1]
        self.hidden = (
            torch.arange(size, device=self.u.device) > self.filled[:, None, None]
        )  # (B, 1, S)
        rows = self.all[:, None] * self.heads + torch.arange(self.heads, device=self.u.device)
        self.where = (
            rows * size + self.filled[:, None]
        ).flatten()  # this token's, in the store's (B * H * S, d)
        hidden = self.text(
            inputs_embeds=self.text.embed_tokens(self.token).unsqueeze(1),
            past_key_values=self,
            layout=self,
            position_ids=self.position.expand(3, -1).unsqueeze(2),
        ).last_hidden_state[:, 0]
        at = torch.where(self.live, self.count, self.max_tokens)
        scores = logits(hidden, self.head, self.temperature or 1.0, self.banned)
        token, logp = pick(scores, self.u[self.all, at] if self.temperature else None)
        self.ids[self.all, at], self.logps[self.all, at] = token, logp
        self.token.copy_(token)
        for counter in (self.count, self.filled, self.position):
            counter.add_(self.live)
        self.live &= (token.unsqueeze(1) != self.ends).all(1) & (self.count < self.max_tokens)

    def update(self, key, value, layer, *_):
        for store, new in zip(self.store[layer], (key, value), strict=True):
            store.flatten(0, 1).index_copy_(0, self.where, new.reshape(-1, new.shape[-1]))
        return self.store[layer]

    def attend(self, query, key, value, scaling):
        # One query a row: two thin products that read each key and value once. SDPA would repeat them for each query head.
        b, heads, _, d = query.shape
        scores = product((query * scaling).view(len(key), -1, d), key.transpose(1, 2)).view(
            b, heads, -1
        )
        p = scores.masked_fill_(self.hidden, -torch.inf).softmax(-1).to(value.dtype)
        return (p.view(len(value), -1, key.shape[1]) @ value).view(b, 1, heads, d)

    def take(self, slot):
        """Free `slot`: its row and rollout."""
        row, n, self.rows[slot] = self.rows[slot], int(self.count[slot]), None
        ids = self.ids[slot, :n].tolist()
        return row, Rollout(
            ids, self.logps[slot, :n].tolist(), "end" if ids[-1] in self.ends.tolist() else "length"
        )


@torch.no_grad()
def generate(
    hf,
    prompts,
    n,
    max_tokens,
    *,
    eos,
    banned=(),
    temperature=1.0,
    seed=(0,),
    numbers=None,
    slots=256,
    pack_tokens=16384,
    look_every=None,
):
    """Sample `n` rollouts of each prompt from the transformers model `hf` (loaded by model.load, not sharded).

    prompts: list of data.Prompt.  eos: ids that end a rollout.  banned: ids that are never sampled.
    seed: ints that name this call (the run's seed, step, draw).  numbers: the prompts' numbers within it (by default
    their positions; give the global ones where ranks share the prompts).  slots: rows decoded at once.
    look_every: tokens between the host's looks at which rows have ended (1 on a CPU, 16 on CUDA, where looking waits).
    Returns per prompt a list of n `Rollout`.
    """
    was_training, device = hf.training, hf.device
    banned, ends = (torch.as_tensor(x, dtype=torch.long, device=device) for x in (banned, eos))
    numbers = range(len(prompts)) if numbers is None else numbers
    look_every = look_every or (16 if device.type == "cuda" else 1)
    waiting = deque((p, k) for p in range(len(prompts)) for k in range(n))
    if not waiting:
        return [[] for _ in prompts]
    hf.eval()
    out, read = (
        [[None] * n for _ in prompts],
        {},
    )  # read: prompt -> its keys and values, as long as rows of it wait
    state = _Slots(hf, min(slots, len(waiting)), max_tokens, ends, banned, temperature)
    while waiting or any(state.rows):
        free, taken = (
            [s for s, row in enumerate(state.rows) if row is None],
            {},
        )  # taken: prompt -> [(slot, k)]
        for slot in free[: len(waiting)]:
            p, k = state.rows[slot] = waiting.popleft()
            taken.setdefault(p, []).append((slot, k))
        if new := [p for p in taken if p not in read]:
            _read(
                hf, prompts, [*new, *range(new[-1] + 1, len(prompts))], len(new), pack_tokens, read
            )
        for p, rows in taken.items():
            u = [uniforms(seed, numbers[p], k, max_tokens) for _, k in rows]
            state.fill([slot for slot, _ in rows], prompts[p], *read[p], u)
        for p in [p for p in read if not waiting or p < waiting[0][0]]:
            del read[p]
        ended = [slot for slot in state.advance(look_every) if state.rows[slot]]
        for slot in ended:
            (p, k), rollout = state.take(slot)
            out[p][k] = rollout
        busy = [s for s, row in enumerate(state.rows) if row]
        if not waiting and busy and len(busy) < 0.75 * len(state.rows):
            state.keep(busy)  # go on with fewer rows
    hf.train(was_training)
    return out


def _read(hf, prompts, order, needed, pack_tokens, read):
    """Prefill the first `needed` prompts of `order`, and what follows while one pack has room for it."""
    room = pack_tokens - sum(len(prompts[p].ids) for p in order[:needed])
    while needed < len(order) and len(prompts[order[needed]].ids) <= room:
        room -= len(prompts[order[needed]].ids)
        needed += 1
    trees = [Tree(prompts[p]) for p in order[:needed]]
    for part in plan(trees, pack_tokens):
        pack, prefill = make(trees, part, hf.device), _Prefill()
        run(hf.model, pack, past_key_values=prefill)
        read |= {
            order[t]: (prefill, start) for (t, _), (start, _) in zip(part, pack.spans, strict=False)
        }
