"""
Batched sampling for rollouts: prefill each prompt once, continue it N times, stop rows one by one.

    rollouts = generate(hf, prompts, group_size, max_tokens, banned=encoder.banned, eos=encoder.eos_ids, seed=(1, step))
    rollouts[p][k].ids, .logps, .stop                                     # k-th rollout of the p-th prompt

Samples from exactly the distribution that the trainer scores: temperature only, no top-k or top-p, and the same banned
ids left out. One uniform number per (rollout, token) is drawn beforehand from (seed, prompt's number, k) and turned into
a token through the inverse of the cumulative distribution, so that the same ids come out on any number of ranks and in
any order of the rows. Rows are slots of one key-value store; a slot whose row ended takes the next waiting row.

    B slots   S positions of the store   H key-value heads   d head width   V vocabulary
"""

from __future__ import annotations

import base64
import io
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn.functional as F

from data import Prompt
from packs import Tree, make, plan, run
from ranks import all_sum, print0
from rewards import score
from rows import open_image


@dataclass
class Rollout:
    ids: list[int]  # the end token included where one was sampled
    logps: list[float]  # of each id, under the sampling distribution, in nats
    stop: str  # "end": an end token was sampled; "length": cut at max_tokens


def uniforms(seed, prompt, k, length) -> np.ndarray:
    """The random numbers of one rollout, (length,) float64 in [0, 1)."""
    return np.random.Generator(np.random.Philox(np.random.SeedSequence([*seed, prompt, k]))).random(length)


def pick(logits, u, temperature=1.0, banned=None, block=256):
    """Sample ids (B,) and their log-probs (B,) from logits (B, V) float32 with uniform numbers u (B,).

    temperature 0 is the argmax (its log-prob is the one at temperature 1). The distribution is inverted in two steps,
    a block of ids and then an id, with sums in float64: 150,000 float32 terms would lose the tail.
    """
    logits = logits / (temperature or 1.0)
    if banned is not None and len(banned):
        logits = logits.index_fill(1, banned, float("-inf"))
    lse = logits.logsumexp(-1, keepdim=True)
    if temperature == 0:
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


class _Capture:
    """Stands in for a transformers cache during prefill: keeps the keys and values of every layer, (H, T, d)."""

    def __init__(self):
        self.layers = {}

    def update(self, key, value, layer, *_):
        self.layers[layer] = key[0], value[0]
        return key, value


class _Slots:
    """What is being decoded: keys and values (layers, B, H, S, d) and, per slot, the token to feed next, its rotary
    position, how many positions are filled, how many tokens were sampled, and the row's uniform numbers and results.
    Stands in for both a transformers cache (`update`) and a layout (`attend`)."""

    def __init__(self, text, slots, longest, max_tokens):
        cfg, like = text.config, dict(device=text.device)
        width = text.layers[0].self_attn.head_dim
        shape = (cfg.num_hidden_layers, slots, cfg.num_key_value_heads, longest + max_tokens, width)
        self.text, self.rows = text, [None] * slots  # a row: (prompt, k), None where the slot is free
        self.k, self.v = (torch.zeros(shape, dtype=text.dtype, **like) for _ in "kv")
        self.token, self.position, self.filled, self.count = torch.zeros(4, slots, dtype=torch.long, **like)
        self.u = torch.zeros(slots, max_tokens, dtype=torch.float64, **like)
        self.ids = torch.zeros(slots, max_tokens, dtype=torch.long, **like)
        self.logps = torch.zeros(slots, max_tokens, **like)
        self.all = torch.arange(slots, **like)

    def fill(self, slots, prompt, captured, start):
        """Begin a row of `prompt` in each of `slots`. Its last token is left out of the prefill (which put the prompt
        at `start` of `captured`) and fed by the first step, so that a fresh row needs no step of its own."""
        length = len(prompt.ids) - 1
        for layer, (k, v) in captured.layers.items():
            self.k[layer, slots, :, :length] = k[:, start : start + length]
            self.v[layer, slots, :, :length] = v[:, start : start + length]
        self.token[slots], self.position[slots] = prompt.ids[-1].item(), prompt.next_position - 1
        self.filled[slots], self.count[slots] = length, 0

    def keep(self, slots):  # drop all others
        self.rows, self.k, self.v = [self.rows[s] for s in slots], self.k[:, slots], self.v[:, slots]
        for name in ("token", "position", "filled", "count", "u", "ids", "logps"):
            setattr(self, name, getattr(self, name)[slots])
        self.all = self.all[: len(slots)]

    def step(self):  # feed each slot's token: hidden states (B, D)
        self.reach = int(self.filled.max()) + 1
        self.mask = torch.arange(self.reach, device=self.k.device) <= self.filled[:, None, None, None]
        hidden = self.text(
            inputs_embeds=self.text.embed_tokens(self.token).unsqueeze(1), past_key_values=self, layout=self,
            position_ids=self.position.expand(3, -1).unsqueeze(2),
        ).last_hidden_state[:, 0]  # fmt: skip
        self.filled += 1
        self.position += 1
        return hidden

    def update(self, key, value, layer, *_):
        self.k[layer, self.all, :, self.filled] = key[:, :, 0]
        self.v[layer, self.all, :, self.filled] = value[:, :, 0]
        return self.k[layer, :, :, : self.reach], self.v[layer, :, :, : self.reach]

    def attend(self, query, key, value, scaling):
        gqa = query.shape[1] != key.shape[1]
        out = F.scaled_dot_product_attention(query, key, value, attn_mask=self.mask, scale=scaling, enable_gqa=gqa)
        return out.transpose(1, 2)

    def record(self, token, logp):
        self.ids[self.all, self.count], self.logps[self.all, self.count] = token, logp
        self.token = token
        self.count += 1

    def take(self, slot, stop):
        """Free `slot`: its row and rollout."""
        row, n = self.rows[slot], int(self.count[slot])
        self.rows[slot] = None
        self.count[slot] = self.filled[slot] = 0  # it idles at the start of its store until it is filled again
        return row, Rollout(self.ids[slot, :n].tolist(), self.logps[slot, :n].tolist(), stop)


@torch.no_grad()
def generate(hf, prompts, n, max_tokens, *, eos, banned=(), temperature=1.0, seed=(0,), numbers=None, slots=256,
             pack_tokens=16384):  # fmt: skip
    """Sample `n` rollouts of each prompt from the transformers model `hf` (loaded by model.load, not sharded).

    prompts: list of data.Prompt.  eos: ids that end a rollout.  banned: ids that are never sampled.
    seed: ints that name this call (the run's seed, step, draw).  numbers: the prompts' numbers within it (by default
    their positions; give the global ones where ranks share the prompts).  slots: rows decoded at once.
    Returns per prompt a list of n `Rollout`.
    """
    was_training, device = hf.training, hf.device
    text = hf.model.language_model
    banned, ends = (torch.as_tensor(x, dtype=torch.long, device=device) for x in (banned, eos))
    numbers = range(len(prompts)) if numbers is None else numbers
    waiting = [(p, k) for p in range(len(prompts)) for k in range(n)]
    if not waiting:
        return [[] for _ in prompts]
    hf.eval()
    out = [[None] * n for _ in prompts]
    state = _Slots(text, min(slots, len(waiting)), max(len(p.ids) for p in prompts), max_tokens)

    def refill():
        """Hand the free slots to waiting rows; each of their prompts is prefilled once."""
        free = [s for s, row in enumerate(state.rows) if row is None]
        taken = {}  # prompt -> slots
        for slot in free[: len(waiting)]:
            p, k = state.rows[slot] = waiting.pop(0)
            state.u[slot] = torch.from_numpy(uniforms(seed, numbers[p], k, max_tokens))
            taken.setdefault(p, []).append(slot)
        trees = [Tree(prompts[p]) for p in taken]
        for part in plan(trees, pack_tokens):
            pack, captured = make(trees, part, device), _Capture()
            run(hf.model, pack, past_key_values=captured)
            for (t, _), (start, _) in zip(part, pack.spans, strict=False):
                p = list(taken)[t]
                state.fill(taken[p], prompts[p], captured, start)

    refill()
    while any(state.rows):
        logits = hf.lm_head(state.step()).float()
        token, logp = pick(logits, state.u[state.all, state.count], temperature, banned)
        state.record(token, logp)
        ended = torch.isin(token, ends)
        done = (ended | (state.count >= max_tokens)).tolist()  # free slots are idle: their tokens mean nothing
        finished = [s for s, row in enumerate(state.rows) if row and done[s]]
        for slot in finished:
            (p, k), rollout = state.take(slot, "end" if ended[slot] else "length")
            out[p][k] = rollout
        if finished and waiting:
            refill()
        live = [s for s, row in enumerate(state.rows) if row]
        if len(live) < 0.75 * len(state.rows):  # nothing waits any more: go on with fewer rows
            state.keep(live)
        else:  # an idle slot writes to the start of its own store
            idle = [s for s, row in enumerate(state.rows) if row is None]
            state.filled[idle] = state.count[idle] = 0
    hf.train(was_training)
    return out


# ---------------------------------------------------------------------------------- groups of rollouts (stages 2, 3)
@dataclass
class Group:
    """A prompt's rollouts and what is known of them."""

    prompt: Prompt
    rollouts: list[Rollout]
    texts: list[str]
    scores: dict[str, torch.Tensor] = field(default_factory=dict)  # name -> (N,)
    advantage: torch.Tensor | None = None  # (N,)
    old_logp: list[torch.Tensor] | None = None  # (T,) each, the trainer's, under the policy that sampled

    def tree(self):
        return Tree(self.prompt, [r.ids for r in self.rollouts])


def sample(hf, encoder, prompts, numbers, args, seed) -> list[Group]:
    """`args.group_size` rollouts of each prompt."""
    rollouts = generate(
        hf, prompts, args.group_size, args.max_response, eos=encoder.eos_ids, banned=encoder.banned, seed=seed,
        temperature=args.temperature, numbers=numbers, slots=args.slots, pack_tokens=args.pack_tokens,
    )  # fmt: skip
    return [Group(p, g, [encoder.decode(r.ids) for r in g]) for p, g in zip(prompts, rollouts, strict=True)]


def verify(group):
    """Fill in accuracy, format and reward of a group (never trained on in stage 2: there they are a canary)."""
    example = group.prompt.example
    verdicts = [score(text, example.answer, example.choices, example.equivalent) for text in group.texts]
    for name in ("accuracy", "format", "reward"):
        group.scores[name] = torch.tensor([v[name] for v in verdicts])


def rollout_metrics(groups):
    """What both stages report of the rollouts of a step, over all ranks (NaN: no rollouts)."""
    rollouts = [r for g in groups for r in g.rollouts]
    flat = {k: torch.cat([g.scores[k] for g in groups]) if groups else torch.zeros(0) for k in ("reward", "accuracy", "format")}
    sums = {k: float(v.sum()) for k, v in flat.items()} | {
        "length": sum(len(r.ids) for r in rollouts), "truncated": sum(r.stop == "length" for r in rollouts),
        "n": len(rollouts), "groups": len(groups), "informative": sum(bool(g.scores["reward"].std() > 0) for g in groups),
    }  # fmt: skip
    sums = all_sum(sums)
    n, groups = sums.pop("n") or float("nan"), sums.pop("groups") or float("nan")
    return {k: v / (groups if k == "informative" else n) for k, v in sums.items()}


def show_rollout(log, step, group, reference_scores=None):
    """Print a rollout with its scores, now and then: nothing finds mistakes faster. `log` keeps the whole group, for
    tools/report.py. reference_scores: {kind of span: the discriminator's raw score of the reference}."""
    columns, example = group.scores | {"advantage": group.advantage}, group.prompt.example
    rows = [{k: round(float(v[i]), 4) for k, v in columns.items()} for i in range(len(group.rollouts))]
    print0(f"--- step {step}, {example.where}, answer {example.answer!r}\n{group.texts[0]}\n--- {rows[0]}")
    log.rollouts(step, {
        "where": example.where, "question": example.messages[-1]["content"], "answer": example.answer,
        "reference": example.response, "reference_scores": reference_scores or {},
        "images": [_data_url(open_image(image, example.where)) for image in example.images],
        "rollouts": [{"text": text, "tokens": len(r.ids), "stop": r.stop, "advantage": row.pop("advantage"), "scores": row}
                     for text, r, row in zip(group.texts, group.rollouts, rows, strict=True)],
    })  # fmt: skip


def _data_url(image, side=384):  # scaled down to `side` pixels; small drawings exactly, the rest as JPEG
    image.thumbnail((side, side))
    form = "png" if image.width * image.height <= 200 * 200 else "jpeg"
    image.save(file := io.BytesIO(), form)
    return f"data:image/{form};base64,{base64.b64encode(file.getvalue()).decode()}"
