"""
Batched sampling of rollouts: each prompt is read once and continued by all of its rows.

    rows = all_rows(prompts, 16)                        # [(0, 0), (0, 1), ..]: (prompt, k)
    seeds = [(run_seed, step, number) for number in range(len(prompts))]
    rollouts = generate(hf, prompts, rows, max_tokens, eos=.., banned=.., seeds=seeds)
    rollouts[i].ids, rollouts[i].logps, rollouts[i].stop                # of rows[i]

The sampler draws from exactly the distribution that the trainer scores: temperature only, no
top-k and no top-p, and the same banned ids left out. Each row has one uniform number per token,
drawn beforehand from the ints that name its prompt and from k, and turned into a token through the
inverse of the cumulative distribution. Hence a row has the same ids on any number of ranks, in any
order and beside any other rows (up to rounding).

Rows are decoded in slots of one key-value store (store.py); a slot whose row has ended takes the
next row that waits. A step of all slots consists of tensor operations alone. On CUDA it is a
captured graph, and the host looks only every few tokens which rows have ended.

    B slots   D hidden   V vocabulary
"""

from __future__ import annotations

import contextlib
import copy
import functools
import inspect
import math
from collections import Counter, deque
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

from engine.attention import forward_pack
from engine.families import text_of, windows_of
from engine.logprob import logits
from engine.packs import Tree, build_pack, plan
from engine.progress import Bar
from engine.store import PromptCache, Store

# The store grows by so many positions at a time. On CUDA each time means to capture the step anew.
BLOCK = {"cpu": 16, "cuda": 256}

# Prompts of so many tokens on average are kept once for all of their rows. Shorter ones are copied
# to each row: a step then has fewer operators.
SHARE_FROM = 256

# Once no row waits, slots without a row are given up where less than this share of them is busy.
SHRINK_BELOW = 0.75


@dataclass
class Rollout:
    ids: list[int]  # the end token included where one was sampled
    logps: list[float]  # of each id, under the sampling distribution, in nats
    stop: str  # "end": an end token was sampled; "length": cut at max_tokens


def all_rows(prompts, n):
    """`n` rows of every prompt, rows of one prompt side by side: [(0, 0), (0, 1), ..]."""
    return [(p, k) for p in range(len(prompts)) for k in range(n)]


@torch.no_grad()
def generate(
    hf,
    prompts,
    rows,
    max_tokens,
    *,
    eos,
    banned=(),
    temperature=1.0,
    seeds,
    slots=256,
    pack_tokens=16384,
    look_every=None,
    share_prompts=None,
    on_end=None,
):
    """Sample one rollout for each of `rows` and return them as a list, in the order of `rows`.

    hf: a transformers model that model.load has loaded, not sharded.
    prompts: list of data.Prompt.
    rows: list of (p, k), each the k-th rollout of prompts[p]: any of them, in any order. A prompt
        is kept from the first to the last of its rows: rows of one prompt should be neighbours.
    max_tokens: the most ids of a rollout, its end token included.
    eos: ids that end a rollout.  banned: ids that are never sampled.
    temperature: 0 takes the most likely id (and reports log-probs at temperature 1).
    seeds: for each prompt the tuple of ints that names it, such as (run's seed, step, number).
    slots: rows decoded at once.  pack_tokens: tokens of prompts read at once.
    look_every: tokens between two looks of the host at which rows have ended. The default is 1 on a
        CPU and 16 on CUDA, where a look waits for the device.
    share_prompts: whether a prompt's keys and values are kept once for all of its rows. The default
        is by the prompts' length (SHARE_FROM), where a prompt has several rows. Never of a model
        with windows.
    on_end: called with each rollout as soon as it has ended, on_end(number in `rows`, rollout).
    """
    if not rows:
        return []
    if look_every is None:
        look_every = 16 if hf.device.type == "cuda" else 1
    queue = _Queue(hf, prompts, rows, pack_tokens)
    if any(windows_of(text_of(hf.model))):
        share_prompts = False  # a prompt that is kept once has one bias for all of its rows
    if share_prompts is None:
        share_prompts = sharing_pays(prompts, rows)
    decoder = _Decoder(
        hf, min(slots, len(rows)), max_tokens, eos, banned, temperature, share_prompts
    )
    rollouts = [None] * len(rows)
    tokens = 0  # about: of a row that ends between two looks a few too many
    with in_eval_mode(hf), Bar(len(rows), "sampling") as bar:
        while queue.waiting or decoder.busy_slots():
            _fill_free_slots(decoder, queue, seeds)
            decoder.advance(look_every)
            tokens += look_every * len(decoder.busy_slots())
            ended = decoder.ended_slots()
            for slot in ended:
                row, rollout = decoder.take(slot)
                rollouts[row] = rollout
                if on_end is not None:
                    on_end(row, rollout)
            bar.update(len(ended), tokens)
            if not queue.waiting:
                decoder.shrink()
    return rollouts


@contextlib.contextmanager
def in_eval_mode(hf):
    """Without dropout, and afterwards as before, also after an error."""
    was_training = hf.training
    hf.eval()
    try:
        yield
    finally:
        hf.train(was_training)


def sharing_pays(prompts, rows):
    """Whether rows of one prompt should share its keys and values in the store."""
    of_rows = {p for p, _ in rows}
    lengths = [len(prompts[p].ids) for p in of_rows]
    long = sum(lengths) >= SHARE_FROM * len(lengths)
    return len(rows) > len(of_rows) and long


def _fill_free_slots(decoder, queue, seeds):
    """Give the rows that have waited longest to the slots that have none, prompt by prompt."""
    free = decoder.free_slots()
    taken = queue.take(len(free))
    queue.read_prompts(taken)
    for p, row_numbers in taken.items():
        chosen = free[: len(row_numbers)]
        free = free[len(row_numbers) :]
        draws = []
        for row in row_numbers:
            _, k = queue.rows[row]
            draws.append(uniforms(seeds[p], k, decoder.max_tokens))
        decoder.fill(chosen, row_numbers, p, queue.prompts[p], queue.read[p], np.stack(draws))
    queue.drop_finished(taken)


# ---------------------------------------------------------------------------- from logits to tokens
def uniforms(seed, k, length) -> np.ndarray:
    """The random numbers of the k-th rollout of the prompt that the ints `seed` name.

    Returns (length,) float64 in [0, 1). A longer rollout begins with the numbers of a shorter one.
    """
    sequence = np.random.SeedSequence([*seed, k])
    return np.random.Generator(np.random.Philox(sequence)).random(length)


def pick(logits, u):
    """Sample an id for each row of logits (B, V) float32 with the uniform numbers u (B,).

    Returns ids (B,) and their log-probs (B,). The cumulative distribution is inverted in two steps,
    to a block of about sqrt(V) ids and then to an id in it, with sums in float64: float32 sums over
    150,000 terms would lose the tail.
    """
    vocabulary = logits.shape[1]
    block = math.isqrt(vocabulary)
    top = logits.amax(-1, keepdim=True)
    p = (logits - top).exp_()  # (B, V), not normalised
    lse = top + p.sum(-1, keepdim=True).log_()  # (B, 1)
    p = F.pad(p, (0, -vocabulary % block)).view(len(p), -1, block)  # (B, blocks, block)
    mass = p.sum(-1, dtype=torch.float64)  # (B, blocks)
    cdf = mass.cumsum(-1)
    target = u.unsqueeze(1) * cdf[:, -1:]  # (B, 1)
    chosen = _first_above(cdf, target)  # (B, 1), the block
    before = (cdf - mass).gather(1, chosen)  # (B, 1), the mass of the blocks in front of it
    p_inside = p.take_along_dim(chosen.unsqueeze(2), 1).squeeze(1)  # (B, block)
    cdf_inside = p_inside.cumsum(-1, dtype=torch.float64)
    ids = chosen * block + _first_above(cdf_inside, target - before)  # (B, 1)
    ids = ids.clamp_(max=vocabulary - 1)  # of NaN: an id, not an index error on the device
    logp = logits.gather(1, ids) - lse
    return ids.squeeze(1), logp.squeeze(1)


def pick_most_likely(logits):
    """The most likely id of each row of logits (B, V): ids (B,) and their log-probs (B,)."""
    ids = logits.argmax(-1, keepdim=True)
    logp = logits.gather(1, ids) - logits.logsumexp(-1, keepdim=True)
    return ids.squeeze(1), logp.squeeze(1)


def _first_above(cdf, target):
    """Index (B, 1) of the first entry of cdf (B, n) that is above target (B, 1).

    A target that rounding has put below 0 or at the end is moved inside. So there always is such an
    entry, and it is one where cdf rises: never an id of probability 0. Of NaN it is the last one.
    """
    below_end = cdf[:, -1:] * (1 - 2**-52)
    inside = torch.minimum(target.clamp(min=0), below_end)
    return torch.searchsorted(cdf, inside, right=True).clamp_(max=cdf.shape[1] - 1)


# ---------------------------------------------------------------------- rows that wait, and prefill
@functools.cache
def cache_argument(kind):
    """The name by which a class of transformers models takes its cache: `cache` from version 5.24
    on, where `past_key_values` is deprecated."""
    known = inspect.signature(kind.forward).parameters
    return "cache" if "cache" in known else "past_key_values"


def without_last(prompt):
    """A prompt but for its last token, which the first step feeds to the model: what it predicts is
    the row's first token. So a fresh row needs no step of its own, and a state, of which nothing
    can be taken back, stands where that step begins. Raises ValueError for a prompt of one token.
    """
    if len(prompt.ids) < 2:
        raise ValueError("a prompt of one token: there is nothing to read before its first step")
    shorter = copy.copy(prompt)
    shorter.ids = prompt.ids[:-1]
    shorter.positions = prompt.positions[:, :-1]
    if prompt.blocks is not None:
        shorter.blocks = prompt.blocks[:-1]
    return shorter


class _Queue:
    """The rows that wait for a slot, and the keys, values and states of the prompts that they
    continue.

    A prompt is read when the first of its rows gets a slot, together with those that are needed
    next as far as they fit into the same pack. It is dropped when its last row has got a slot.
    """

    def __init__(self, hf, prompts, rows, pack_tokens):
        self.hf = hf
        self.prompts = prompts
        self.rows = rows
        self.pack_tokens = pack_tokens
        prompts_of_rows = [p for p, _ in rows]
        self.waiting = deque(range(len(rows)))  # numbers of rows
        self.waiting_of = Counter(prompts_of_rows)  # prompt -> how many of its rows wait
        self.unread = deque(dict.fromkeys(prompts_of_rows))  # prompts in the order of need
        self.read = {}  # prompt -> PromptCache

    def take(self, count):
        """The next rows, `count` of them where so many wait: {prompt: numbers of its rows}."""
        taken = {}
        for _ in range(min(count, len(self.waiting))):
            row = self.waiting.popleft()
            p, _ = self.rows[row]
            taken.setdefault(p, []).append(row)
            self.waiting_of[p] -= 1
        return taken

    def read_prompts(self, needed):
        """Read those of the prompts `needed` that are unread, and what the pack has room for."""
        if all(p in self.read for p in needed):
            return
        chosen = []
        tokens = 0
        while self.unread:
            p = self.unread[0]
            tokens += len(self.prompts[p].ids)
            if p not in needed and tokens > self.pack_tokens:
                break
            chosen.append(self.unread.popleft())
        trees = [Tree(without_last(self.prompts[p])) for p in chosen]
        for part in plan(trees, self.pack_tokens):
            pack = build_pack(trees, part, self.hf.device)
            read = PromptCache()
            cache = {cache_argument(type(self.hf.model)): read}
            forward_pack(self.hf.model, pack, kept=read.states, **cache)
            # The segments are the part's prompts, on CUDA with the padding behind them.
            for number, (t, _) in enumerate(part):
                self.read[chosen[t]] = read.cut(number, pack.segments[number])

    def drop_finished(self, prompts):
        """Forget the keys and values of those of `prompts` of which no row waits any more."""
        for p in prompts:
            if self.waiting_of[p] == 0:
                del self.read[p]


# ----------------------------------------------------------------------------------------- decoding
class _Decoder:
    """The rows that are being decoded, one in each slot, and the step that decodes them.

    `step` decodes one token in every slot and changes these tensors in place, without asking the
    host anything: on CUDA it is captured as a graph and replayed. A slot that is not live computes
    too, and writes where nobody reads.
    """

    def __init__(self, hf, slots, max_tokens, eos, banned, temperature, share_prompts):
        device = hf.device
        self.text = text_of(hf.model)
        self.head = hf.lm_head.weight  # (V, D)
        self.max_tokens = max_tokens
        self.ends = torch.as_tensor(eos, dtype=torch.long, device=device)
        self.banned = torch.as_tensor(banned, dtype=torch.long, device=device)
        self.greedy = temperature == 0
        self.temperature = 1.0 if self.greedy else temperature
        self.graph = None  # the captured step, on CUDA

        self.store = Store(hf, slots, share_prompts)
        self.rows = [None] * slots  # number of the row in each slot; None: free
        self.token = torch.zeros(slots, dtype=torch.long, device=device)  # (B,) to feed next
        self.position = torch.zeros_like(self.token)  # (B,) its rotary position
        self.filled = torch.zeros_like(self.token)  # (B,) positions of the store that are in use
        self.count = torch.zeros_like(self.token)  # (B,) tokens sampled so far
        self.live = torch.zeros_like(self.token, dtype=torch.bool)  # (B,)
        # Column max_tokens of the next three is for slots that are not live.
        table = torch.zeros(slots, max_tokens + 1, device=device)
        self.u = table.double()  # (B, max_tokens + 1) the row's uniform numbers
        self.ids = table.long()  # (B, max_tokens + 1) what was sampled
        self.logps = table  # (B, max_tokens + 1)

    def free_slots(self):
        return [slot for slot, row in enumerate(self.rows) if row is None]

    def busy_slots(self):
        return [slot for slot, row in enumerate(self.rows) if row is not None]

    def ended_slots(self):
        """Slots whose row has ended and was not taken yet. The host waits for the device."""
        live = self.live.tolist()
        return [slot for slot in self.busy_slots() if not live[slot]]

    def fill(self, slots, row_numbers, p, prompt, cache, u):
        """Begin a row of `prompt`, number p, in each of `slots`.

        row_numbers: of these rows.  cache: of the prompt `without_last`.  u: (rows, max_tokens).
        """
        for slot, row in zip(slots, row_numbers, strict=True):
            self.rows[slot] = row
        length = len(prompt.ids) - 1
        if self.store.states:
            self.store.states.write_prompt(slots, cache.states)
        if self.store.shared:
            self.store.shared.add(p, slots, cache, length)
            length = 0  # of the slots' own positions
        else:
            self.reserve(length + 1)
            self.store.write_prompt(slots, cache, length)
        self.u[slots, : self.max_tokens] = torch.from_numpy(u).to(self.u.device)
        self.token[slots] = prompt.ids[-1].item()
        self.position[slots] = prompt.next_position - 1
        self.filled[slots] = length
        self.count[slots] = 0
        self.live[slots] = True

    def take(self, slot):
        """Free `slot`: the number of its row, and its rollout."""
        row = self.rows[slot]
        self.rows[slot] = None
        if self.store.shared:
            self.store.shared.leave(slot)
        count = int(self.count[slot])
        ids = self.ids[slot, :count].tolist()
        logps = self.logps[slot, :count].tolist()
        stop = "end" if ids[-1] in self.ends.tolist() else "length"
        return row, Rollout(ids, logps, stop)

    def reserve(self, length):
        """Make room for `length` positions in every slot."""
        missing = length - self.store.size
        if missing > 0:
            block = BLOCK[self.u.device.type]
            self.store.grow(-(-missing // block) * block)
            self.graph = None

    def shrink(self):
        """Go on with the busy slots alone, where that is worth the copy."""
        busy = self.busy_slots()
        if not busy or len(busy) >= SHRINK_BELOW * len(self.rows):
            return
        self.store.keep(busy)
        self.rows = [self.rows[slot] for slot in busy]
        for name in ("token", "position", "filled", "count", "live", "u", "ids", "logps"):
            setattr(self, name, getattr(self, name)[busy])
        self.graph = None

    def advance(self, steps):
        """Decode `steps` tokens in every slot."""
        self.reserve(int(self.filled.max()) + steps)
        if self.store.shared and self.store.shared.arrange():
            self.graph = None
        for _ in range(steps):
            if not self.u.is_cuda:
                self.step()
            elif self.graph is None:
                self.capture()
            else:
                self.graph.replay()

    def capture(self):
        """Make a step, and capture one as a graph. It holds until a tensor of the store is
        replaced by another: where it grows or shrinks."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            # The step made here counts. Libraries set themselves up in it, which no graph may hold.
            self.step()
        torch.cuda.current_stream().wait_stream(stream)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):  # records, and computes nothing
            self.step()

    def step(self):
        """Decode one token in every slot."""
        self.store.begin_step(self.filled)
        embedded = self.text.embed_tokens(self.token).unsqueeze(1)  # (B, 1, D)
        output = self.text(
            inputs_embeds=embedded,
            position_ids=self.position.unsqueeze(1),  # (B, 1), of all rows where rotary has several
            layout=self.store,
            recurrence=self.store.states,
            **{cache_argument(type(self.text)): self.store},
        )
        hidden = output.last_hidden_state[:, 0]  # (B, D)
        scores = logits(hidden, self.head, self.temperature, self.banned)  # (B, V)
        column = torch.where(self.live, self.count, self.max_tokens).unsqueeze(1)  # (B, 1)
        if self.greedy:
            token, logp = pick_most_likely(scores)
        else:
            token, logp = pick(scores, self.u.gather(1, column).squeeze(1))
        self.ids.scatter_(1, column, token.unsqueeze(1))
        self.logps.scatter_(1, column, logp.unsqueeze(1))
        self.token.copy_(token)
        for counter in (self.count, self.filled, self.position):
            counter.add_(self.live)
        at_an_end = (token.unsqueeze(1) == self.ends).any(1)  # (B,)
        self.live &= ~at_an_end & (self.count < self.max_tokens)
