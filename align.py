"""
Stage 2: black-box adversarial alignment on the policy's own rollouts (PRISM, arXiv 2604.28123, section 3.2).

1. Discriminator: a vision-language model upcycled into a mixture of experts, with a scalar head; it scores the
   perception span (<caption>) and the reasoning span (<think>, <answer>) of a response, each given the prompt.
2. Warm-up: Bradley-Terry on pairs, the reference's span preferred to the policy's (its rollouts, or --pairs).
3. The game, each step: sample N rollouts per prompt; score their spans and the reference's; update the discriminator by
   Bradley-Terry; update the policy by GRPO on alpha * GN(perception) + (1 - alpha) * GN(reasoning) - 1.5 * malformed, where
   GN normalises within the group and the scores are those of the forward that the discriminator's update used. The
   verifier's accuracy is logged as a canary and never trained on.

Differs from the released code: both sides' spans go through one function and end in the same token; load balance is on in
the game too; the head is float32 without dropout; scores are clipped in the reward only, L2 is on raw scores. From the
paper: spans are normalised, then weighed (--normalize sum: its order); experts are routed by token (--disc experts: by kind).

    python align.py --policy ckpt/sft/last --data data/tiny/align.jsonl --out ckpt/align --steps 40
    torchrun --nproc_per_node=8 align.py --policy ckpt/sft --data align.parquet --out ckpt/align

    B rollouts   N group size   T tokens   K children of a pack   D hidden   I intermediate   E experts
"""

from __future__ import annotations

import copy
import sys
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Literal

import torch
import torch.nn as nn
import torch.nn.functional as F

from data import BadRow, Order, Prompt, read, split_spans
from engine import health
from engine.arguments import Common, parse
from engine.checkpoint import restore, save
from engine.files import expect_none, read_backbone, same_input, write_backbone
from engine.log import Log
from engine.optimiser import optimizer, schedule, set_lr, step_if_finite
from engine.packs import Tree, adopt, each, run
from engine.ranks import SAVED_AND_STOPPED, all_sum, gather, print0, setup, share, world
from engine.rollouts import rollout_metrics, sample, show_rollout, verify
from model import RolloutCopy, full_state, load, shard
from model import save as save_policy
from rlvr import policy_update
from tools import memory

PERCEPTION, REASONING = 0, 1  # kinds of span
NAMES = ("perception", "reasoning")
WARMUP_CHECK = 20  # updates between held-out accuracies


@dataclass(kw_only=True)
class Args(Common):
    disc: Literal["moe", "experts", "dense"] = (
        "moe"  # token-routed experts; an expert and a head per kind of span; no experts
    )
    disc_init: str = (
        ""  # dense checkpoint that the discriminator is upcycled from; empty: the policy's
    )
    disc_path: str = ""  # a discriminator that was warmed up already: a run's, or the released one (folder or hub name)
    disc_blind: bool = False  # ablation: the discriminator sees no image
    spans: Literal["both", "whole"] = (
        "both"  # whole: one score for the whole response (GAD, the text-only ancestor)
    )
    experts: int = 4  # per layer, of --disc moe
    experts_per_token: int = 2  # of --disc moe
    upcycle_noise: float = (
        0.01  # noise on the copied experts, relative to each tensor's standard deviation
    )
    pairs: str = ""  # warm-up pairs; empty: made from the policy's rollouts on --data
    warmup_steps: int = (
        940  # at most, of the discriminator before the game (120,000 pairs); 0: none
    )
    warmup_pairs: int = 128  # pairs per warm-up update
    warmup_lr: float = 1e-5  # peak learning rate of the warm-up, cosine
    warmup_until: float = (
        0.9  # stop once held-out pair accuracy of every kind of span reaches it, or stops growing
    )
    warmup_only: bool = False  # end after the warm-up
    prompts_per_step: int = 4  # groups per step of the game, over all ranks
    group_size: int = 16  # rollouts per prompt
    alpha: float = 0.5  # weight of perception in the advantage
    normalize: Literal["span", "sum"] = (
        "span"  # normalise each span's scores then weigh, or weigh then normalise
    )
    malformed: Literal["floor", "drop"] = (
        "floor"  # malformed rollouts: lowest score - 1 and a penalty, or left out
    )
    malformed_penalty: float = 1.5  # subtracted from the advantage of a malformed rollout
    std_floor: float = 0.0  # least standard deviation that a group is divided by
    disc_lr: float = 1e-6  # of the discriminator in the game
    disc_weight_decay: float = 0.01  # AdamW's, on matrices only
    score_clip: float = 10.0  # bound on the scores as rewards (never in the discriminator's loss)
    score_l2: float = 1e-3  # coefficient of the mean square of raw scores: Bradley-Terry alone leaves their level free
    balance: float = 0.01  # coefficient of the load-balancing loss of --disc moe
    temperature: float = 1.0  # of sampling and of the log-probs alike
    slots: int = 256  # rows decoded at once, per device
    probe_every: int = 50  # steps between leak probes; 0: never
    # not for choice: strictly on-policy, no KL; so every ratio is 1 and the clip of no effect
    minibatches, kl, ratio, clip_low, clip_high, dual_clip, aggregation = (
        1,
        0.0,
        "token",
        0.2,
        0.2,
        3.0,
        "token-mean",
    )

    def __post_init__(self):
        super().__post_init__()
        if self.spans == "whole" and (self.disc == "experts" or self.normalize == "sum"):
            raise ValueError(
                "--spans whole has one kind of span: --disc experts and --normalize sum need two"
            )
        if self.group_size < 2 or not 0 <= self.alpha <= 1 or self.score_clip <= 0:
            raise ValueError(
                "--group_size must be 2 or more, --alpha between 0 and 1, --score_clip above 0"
            )


# ----------------------------------------------------------------------------------------------------- the algorithm
def bradley_terry(reference_score, policy_score, denominator=None):
    """mean -log sigmoid(reference - policy), (B,) raw scores each -> scalar (section 3.2.4).

    denominator: pairs over all micro-batches and ranks; None: this call's own. No pairs: 0, with a gradient.
    """
    losses = -F.logsigmoid(reference_score - policy_score)
    return losses.sum() / (max(1, len(losses)) if denominator is None else denominator)


def alignment_advantage(
    perception,
    reasoning,
    well_formed,
    group_size,
    *,
    alpha=0.5,
    malformed_penalty=1.5,
    normalize="span",
    std_floor=0.0,
    malformed="floor",
):
    """alpha * GN(perception) + (1 - alpha) * GN(reasoning) - malformed_penalty * [malformed], (B,) each -> (B,).

    GN(s) = (s - mean) / (std + 1e-6) within groups of `group_size` consecutive rollouts, unbiased std. A malformed rollout
    has no spans: its score is the lowest of its group's well-formed ones of that kind - 1 (-1 where there is none); with
    malformed="drop" it gets advantage 0 and does not count. normalize="sum": the weighted sum of the scores is normalised
    (the paper's order). Raises ValueError where groups do not fit.
    """
    if group_size < 2 or len(perception) % group_size:
        raise ValueError(
            f"{len(perception)} rollouts are no groups of {group_size} (a group needs 2 or more)"
        )
    ok = well_formed.bool().view(-1, group_size)

    def floored(score):
        score = score.float().view(-1, group_size).masked_fill(~ok, torch.inf)
        lowest = score.amin(1, keepdim=True)
        return torch.where(ok, score, torch.where(lowest.isinf(), 0.0, lowest) - 1.0)

    def normalized(score):
        counted = ok if malformed == "drop" else torch.ones_like(ok)
        n = counted.sum(1, keepdim=True)
        centred = (score - (score * counted).sum(1, keepdim=True) / n.clamp(min=1)) * counted
        std = (centred.square().sum(1, keepdim=True) / (n - 1).clamp(min=1)).sqrt()
        return centred / (std.clamp(min=std_floor) + 1e-6)

    v, r = floored(perception), floored(reasoning)
    spans_first = alpha * normalized(v) + (1 - alpha) * normalized(r)
    advantage = normalized(alpha * v + (1 - alpha) * r) if normalize == "sum" else spans_first
    return (advantage - malformed_penalty * ~ok * (malformed == "floor")).flatten()


# ------------------------------------------------------------------------------------------------- the discriminator
class Experts(nn.Module):
    """E SwiGLU experts in the place of a dense MLP, each a copy of it plus noise; parameters in transformers 4.57's
    layout. Routed by token (softmax, top k, weights renormalised), or, without a router, by the token's kind of span."""

    def __init__(self, mlp, experts, top_k, noise=0.0, routed=True):
        super().__init__()
        gate_up = torch.cat([mlp.gate_proj.weight, mlp.up_proj.weight]).T  # (D, 2I)
        self.experts = nn.Module()
        for name, weight in (("gate_up_proj", gate_up), ("down_proj", mlp.down_proj.weight.T)):
            copies = (
                weight.detach().expand(experts, -1, -1).contiguous()
            )  # FSDP2 takes nothing else
            self.experts.register_parameter(
                name, nn.Parameter(copies + noise * copies.std() * torch.randn(copies.shape))
            )
        self.gate = nn.Linear(gate_up.shape[0], experts, bias=False) if routed else None
        if routed:
            nn.init.normal_(self.gate.weight, std=0.02)
        self.act, self.top_k, self.routing = mlp.act_fn, top_k, None

    def forward(self, x):
        shape, x = x.shape, x.flatten(0, -2)  # (T, D)
        if (
            self.gate is None
        ):  # perception and reasoning expert; prompt tokens go through both, averaged
            route = F.normalize(
                torch.stack([self.kind != REASONING, self.kind != PERCEPTION], 1).float(),
                p=1,
                dim=1,
            )
        else:
            probs = self.gate(x).float().softmax(-1)  # (T, E)
            top, index = probs.topk(self.top_k, -1)
            route = torch.zeros_like(probs).scatter(1, index, top / top.sum(-1, keepdim=True))
            if self.routing is None:  # with the shares of the dispatch (T, E)
                self.routing = (
                    probs,
                    (route > 0).float().detach() / (route > 0).sum(1, keepdim=True),
                )
        out, weights = (
            torch.zeros_like(x),
            [w.unbind() for w in (self.experts.gate_up_proj, self.experts.down_proj)],
        )
        for e, (gate_up, down) in enumerate(zip(*weights, strict=True)):
            at = route[:, e].nonzero().squeeze(1)
            gate, up = (x[at] @ gate_up).chunk(2, -1)
            y = (self.act(gate) * up) @ down
            out = out.index_add(0, at, y * route[at, e, None].to(y.dtype))
        return out.view(shape)


class Discriminator(nn.Module):
    """A vision-language model without language-model head that scores the children of a pack at their last token."""

    def __init__(self, base, form, experts=4, top_k=2, noise=0.0):
        """base: a dense transformers model (the one without head), changed in place. Draws from torch's generator."""
        super().__init__()
        self.model, self.form = base, form
        self.mlps = []  # the mixtures, by reference
        for layer in base.language_model.layers if form != "dense" else []:
            layer.mlp = Experts(
                layer.mlp, experts if form == "moe" else 2, top_k, noise, routed=form == "moe"
            )
            self.mlps.append(layer.mlp)
        heads = nn.Linear(
            base.language_model.config.hidden_size, 2 if form == "experts" else 1, bias=False
        )
        self.v_head = nn.Sequential(
            nn.Identity(), heads
        )  # v_head.1.weight in the released checkpoint
        nn.init.normal_(self.v_head[1].weight, std=0.02)
        adopt(base)

    def forward(self, pack):
        """Raw scores (K,) float32 of the pack's children, the load-balancing loss of each of its trees, and the load
        (kinds, layers, E): tokens of each kind of span that each expert got."""
        for mlp in self.mlps:
            mlp.kind, mlp.routing = pack.kind, None
        hidden = run(self.model, pack)[pack.ends].float()
        kinds = pack.kind[pack.ends]
        scores = self.v_head(hidden).gather(
            1, kinds.clamp(min=0)[:, None] if self.form == "experts" else kinds[:, None] * 0
        )
        trees = int(pack.tree.max()) + 1
        balance, load = hidden.new_zeros(trees), []
        for mlp in self.mlps if self.form == "moe" else []:
            (probs, chosen), mlp.routing = (
                mlp.routing,
                (),
            )  # kept in checkpointing's second run, it would keep all that ran
            balance = balance + load_balance(probs, chosen, pack.tree, trees) / len(self.mlps)
            load.append(
                torch.stack([chosen[pack.kind == kind].sum(0) for kind in (PERCEPTION, REASONING)])
            )
        return scores.sum(1), balance, torch.stack(load, 1) if load else hidden.new_zeros(2, 0, 1)


def load_balance(probs, chosen, tree, trees):
    """E * sum_e f_e P_e of Switch (arXiv 2101.03961, equation 4) for each tree of a pack -> (trees,); 1 when balanced.

    f: share of the dispatch, P: mean router probability, both over the tree's tokens; probs, chosen (T, E); tree (T,).
    Per tree, so that it does not depend on what shares the pack.
    """
    tokens = tree.bincount(minlength=trees)[:, None]
    f, p = (
        probs.new_zeros(trees, probs.shape[1]).index_add(0, tree, x) / tokens
        for x in (chosen, probs)
    )
    return probs.shape[1] * (f * p).sum(1)


def save_discriminator(disc, source, folder):
    """Write `disc` in the released one's layout: Qwen3-VL-MoE's of transformers 4.57, and `v_head.1.weight`. All ranks."""
    mixture = (len(disc.mlps[0].experts.down_proj), disc.mlps[0].top_k) if disc.mlps else None
    write_backbone(
        full_state(disc), disc.model.config, {"discriminator": disc.form}, source, folder, mixture
    )


def load_discriminator(args) -> Discriminator:
    """Open --disc_path, or upcycle --disc_init (the policy)."""
    if args.disc_path:
        return open_discriminator(args.disc_path, args.disc)
    base = load(args.disc_init or args.policy).hf.model
    torch.manual_seed(args.seed)
    return Discriminator(base, args.disc, args.experts, args.experts_per_token, args.upcycle_noise)


def open_discriminator(path, expected=None) -> Discriminator:
    """`path`: as for files.read_backbone. ValueError for what is no discriminator, in doubt, or not of the `expected` form."""
    base, state, config = read_backbone(path)
    experts, top_k = (
        config["text_config"].get(k, 0) for k in ("num_experts", "num_experts_per_tok")
    )
    form = config.get("discriminator", "moe" if experts else "dense")
    if "v_head.1.weight" not in state:
        raise ValueError(
            f"{path} has no v_head.1.weight: it is no discriminator (--disc_init upcycles a policy)"
        )
    if form != (expected or form):
        raise ValueError(
            f"{path} is a discriminator of the form {form}, not {expected}: give --disc {form}"
        )
    disc = Discriminator(base, form, experts, top_k)
    expect_none(
        path,
        {(k, v.shape) for k, v in disc.state_dict().items()}
        ^ {(k, v.shape) for k, v in state.items()},
    )
    disc.load_state_dict(state)
    return disc


# -------------------------------------------------------------------------------- spans, and the discriminator's update
@dataclass
class Item:
    """One prompt of a batch: the reference's spans, and the policy's once there are rollouts (malformed ones: none)."""

    prompt: Prompt
    seen: Prompt  # by the discriminator: without image if it is blind
    reference: dict[int, list[int]]  # kind -> ids
    policy: list[tuple[int, int, list[int]]] = field(default_factory=list)  # (rollout, kind, ids)
    well_formed: torch.Tensor | None = None  # (N,) bool
    score: dict = field(
        default_factory=dict
    )  # kind -> {rollout, or None for the reference: raw score}

    def tree(self):  # what the discriminator reads
        children = [*self.reference.values(), *(ids for *_, ids in self.policy)]
        kinds = [*self.reference, *(kind for _, kind, _ in self.policy)]
        return Tree(self.seen, children, kinds, shared=len(self.reference))


def encode_spans(encoder, response, spans):
    """{kind: ids} of a response, or None where it is malformed. The one way from text to ids, for both sides."""
    texts = split_spans(response)
    if texts is None:
        return None
    texts = texts if spans == "both" else ("\n".join(texts),)
    return {kind: encoder.response(text) for kind, text in enumerate(texts)}


def demonstration(example, encoder, disc_encoder, args) -> Item:
    """The item of a row. Raises BadRow where its reference is longer than rollouts may be (cut, it has no answer)."""
    if len(encoder.response(example.response)) > args.max_response:
        raise BadRow(
            example.where, "reference longer than --max_response", "Raise it, or drop the row."
        )
    prompt = encoder.prompt(example)
    seen = disc_encoder.prompt(example) if args.disc_blind else prompt
    return Item(prompt, seen, encode_spans(encoder, example.response, args.spans))


def warm_up_pair(row, encoder, disc_encoder, args) -> Item:
    """The item of a row of --pairs, as if of one rollout."""
    pairs = dict(enumerate(row.pairs[name] for name in NAMES))
    if args.spans == "whole":
        pairs = {0: tuple("\n".join(side) for side in zip(*pairs.values(), strict=True))}
    reference, policy = (
        {kind: encoder.response(texts[side]) for kind, texts in pairs.items()} for side in (0, 1)
    )
    prompt = disc_encoder.prompt(row.example)
    return Item(prompt, prompt, reference, [(0, kind, ids) for kind, ids in policy.items()])


def roll(items, numbers, hf, encoder, args, seed):
    """Sample a group of rollouts on each item's prompt -> groups; their spans become the items'."""
    groups = sample(hf, encoder, [item.prompt for item in items], numbers, args, seed)
    for item, group in zip(items, groups, strict=True):
        found = [encode_spans(encoder, text, args.spans) for text in group.texts]
        item.well_formed = torch.tensor([spans is not None for spans in found])
        item.policy = [
            (k, kind, ids) for k, spans in enumerate(found) for kind, ids in (spans or {}).items()
        ]
    return groups


def disc_pass(disc, items, args, device, spare, train=True):
    """Score the spans of `items` (this rank's; `spare`: any item) in one forward, and with `train` accumulate the gradients of

        sum over kinds of mean_i [bradley_terry(D(x, y*), D(x, y_i))] + score_l2 * mean square of the raw scores
        + balance * load balance,      means over all well-formed rollouts of the step, on all ranks

    -> (loss, this rank's part; load (kinds, layers, E), all ranks'). Fills item.score. All ranks call it.
    """
    busy = [item for item in items if item.policy]
    n = all_sum(
        {
            kind: sum(s[1] == kind for item in items for s in item.policy)
            for kind in (PERCEPTION, REASONING)
        }
    )
    kinds, spans, total, loads = sum(c > 0 for c in n.values()), max(1.0, sum(n.values())), 0.0, []
    with torch.set_grad_enabled(train):
        for pack in each([item.tree() for item in busy], args.pack_tokens, device, spare.tree()):
            raw, balance, load = disc(pack)
            loss = (raw.sum() + balance.sum()) * 0.0
            at = {
                child: k for k, child in enumerate(pack.children if pack.weight else [])
            }  # (item, child) -> row of raw
            for b, t in enumerate(sorted({t for t, _ in at})):
                item, head = busy[t], len(busy[t].reference)
                mine = [(c, *span[:2]) for c, span in enumerate(item.policy, head) if (t, c) in at]
                for c, kind in enumerate(item.reference):
                    rows, rollouts = (
                        [at[t, c] for c, _, k in mine if k == kind],
                        [r for _, r, k in mine if k == kind],
                    )
                    ours, theirs = raw[rows], raw[at[t, c]].expand(len(rows))
                    loss = loss + bradley_terry(theirs, ours, max(1.0, n[kind]))
                    squares = (
                        theirs.square() + ours.square()
                    ).sum() / 2  # raw: what is saturated is pulled back too
                    loss = loss + args.score_l2 * squares / max(1.0, n[kind] * kinds)
                    values = raw[[at[t, c], *rows]].tolist()
                    item.score.setdefault(kind, {}).update(
                        zip([None, *rollouts], values, strict=True)
                    )
                loss = loss + args.balance * balance[b] * len(mine) / spans
            if train:
                (loss * world()).backward()
            total += float(loss.detach())
            loads.append(load.detach() * pack.weight)
    return total, all_sum(torch.stack(loads).sum(0)).cpu() if loads else torch.zeros(2, 0, 1)


def disc_metrics(items, numbers, load, args, probe=False):
    """The discriminator's side of a step in figures (health.py), over all ranks."""
    rows = [
        (
            kind,
            number,
            item.score[kind][None],
            item.score[kind][k],
            len(item.reference[kind]),
            len(ids),
        )
        for item, number in zip(items, numbers, strict=True)
        for k, kind, ids in item.policy
    ]
    names = NAMES[: 1 + (args.spans == "both")]
    metrics = health.game_metrics(sum(gather(rows), []), load, names, args.score_clip)
    if probe:
        mine = [
            (kind, x.seen.ids.tolist(), x.reference[kind], ids)
            for x in items
            for _, kind, ids in x.policy
        ]
        metrics |= health.probe_metrics(sum(gather(mine), []), names)
    return metrics


# ------------------------------------------------------------------------------------------------------------ the loops
def warm_up(disc, hf, encoder, disc_encoder, source, args, ranks):
    """Train the discriminator alone on pairs until it tells held-out pairs apart (section 3.2.3). All ranks call it."""
    # data: rows of pairs, or prompts whose rollouts become pairs with their references; the last rows are held out
    data = read(
        args.pairs or args.data, "pairs" if args.pairs else "align", args.image_root, args.max_bad
    )
    held_out = max(1, min(64, len(data) // 10))
    if len(data) <= held_out:
        raise ValueError(
            f"{data.path}: {len(data)} rows are too few to warm up on and to hold {held_out} out"
        )
    order, start, best, stale = Order(len(data) - held_out, args.seed), 0, 0.0, 0
    build = partial(
        warm_up_pair if args.pairs else demonstration,
        encoder=encoder,
        disc_encoder=disc_encoder,
        args=args,
    )
    rows = max(1, args.warmup_pairs // (len(NAMES) * (1 if args.pairs else args.group_size)))
    # optimiser, resume
    opt = optimizer(disc, args.warmup_lr, args.disc_weight_decay)
    last = f"{args.out}/warmup/last"
    if args.resume and (found := restore(last, {"disc": (disc, opt)})):
        start, best, stale = found[0]["step"], found[1]["best"], found[1]["stale"]
        order.load(found[1]["order"])
    spans = NAMES[: 1 + (args.spans == "both")]
    shown = [
        f"{name}/{key} {key}_{name[0]}" for name in spans for key in ("acc", "margin", "held_out")
    ]
    log = Log(
        f"{args.out}/warmup",
        replace(args, steps=args.warmup_steps),
        ("loss", *shown, "grad_norm"),
        start,
    )
    spare = data.draw(Order(len(data), args.seed), 1, build)[0]  # for ranks without an item
    test, test_numbers = share(data.fetch(range(len(data) - held_out, len(data)), build), ranks)
    if not args.pairs:
        roll(test, test_numbers, hf, encoder, args, (args.seed, 1, 0))
    for step in range(
        start, start if best >= args.warmup_until or stale >= 5 else args.warmup_steps
    ):
        items, numbers = data.share(order, rows, build, ranks)
        if not args.pairs:
            roll(items, numbers, hf, encoder, args, (args.seed, 1, step + 1))
        loss, spread = disc_pass(disc, items, args, ranks.device, spare)
        set_lr(opt, args.warmup_lr * schedule(step, args.warmup_steps, 0.1, "cosine"))
        norm, skipped = step_if_finite(opt, loss, args.grad_clip, "discriminator")
        metrics = disc_metrics(items, numbers, spread, args)
        loss = all_sum(loss) if metrics[f"{spans[0]}/acc"] >= 0 else torch.nan  # no pair was seen
        metrics |= {"loss": loss, "grad_norm": norm, "skipped": skipped, "left_out": len(data.bad)}
        if step + 1 == args.warmup_steps or (step + 1) % WARMUP_CHECK == 0:
            _, spread = disc_pass(disc, test, args, ranks.device, spare, train=False)
            found = disc_metrics(test, test_numbers, spread, args, probe=True)
            held = {
                k.replace("/acc", "/held_out"): v for k, v in found.items() if k.endswith("/acc")
            }
            metrics |= held | {
                k: v for k, v in found.items() if k.endswith(("/leak", "/length_probe"))
            }
            stale = (
                0 if min(held.values()) > best + 0.005 else stale + 1
            )  # NaN, no well-formed rollout, is no gain
            best = max(best, min(held.values()))
        log.step(step + 1, metrics)
        done, stop = (
            step + 1 == args.warmup_steps or best >= args.warmup_until or stale >= 5,
            ranks.stop(),
        )
        if stop or done or (args.save_every and (step + 1) % args.save_every == 0):
            save(
                last,
                partial(save_discriminator, disc, source),
                {"step": step + 1, "args": vars(args), "metrics": metrics},
                {"disc": (disc, opt)},
                {"order": order.state(), "best": best, "stale": stale},
            )
        if stop:
            sys.exit(SAVED_AND_STOPPED)
        if done:
            break
    print0(
        f"warm-up: {best:.3f} held-out pair accuracy, of the harder kind of span (0: no pair was seen) -> {last}"
    )


def main(args):
    # set-up
    if args.dry_run:
        return memory.show(args, lambda: (load(args.policy), load_discriminator(args)))
    ranks = setup(args)
    # model: the policy, the copy that samples, the discriminator
    policy = load(
        args.policy, max_prompt_tokens=args.max_prompt, max_pixels=args.max_pixels
    ).train()
    encoder = policy.encoder
    disc = load_discriminator(args).train()
    same_input(disc.model.config, policy.hf.config)
    disc_encoder = copy.copy(encoder)
    disc_encoder.blind = args.disc_blind
    sampler = RolloutCopy(policy, args, ranks.device)
    shard(policy, policy.hf.model, args, ranks)
    shard(disc, disc.model, args, ranks, exact=[disc.v_head])
    # optimisers
    opt = optimizer(policy, args.lr, args.weight_decay)
    disc_opt = optimizer(disc, args.disc_lr, args.disc_weight_decay)
    # data
    data = read(args.data, "align", args.image_root, args.max_bad)
    build = partial(demonstration, encoder=encoder, disc_encoder=disc_encoder, args=args)
    order, start = Order(len(data), args.seed), 0
    # resume, or warm up
    last = f"{args.out}/last"
    if args.resume and (
        found := restore(last, {"policy": (policy, opt), "disc": (disc, disc_opt)})
    ):
        start = found[0]["step"]
        order.load(found[1]["order"])
    elif args.warmup_steps and not args.disc_path:
        warm_up(disc, sampler.refresh(), encoder, disc_encoder, policy.source, args, ranks)
    if args.warmup_only:
        return ranks.close()
    spare = data.draw(Order(len(data), args.seed), 1, build)[0]  # for ranks without a prompt
    spans = NAMES[: 1 + (args.spans == "both")]
    shown = [f"{name}/{key} {key}_{name[0]}" for name in spans for key in ("acc", "margin")]
    log = Log(
        args.out,
        args,
        ("loss", "disc_loss disc", *shown, "format", "accuracy", "length", "entropy"),
        start,
    )

    for step in range(start, args.steps):
        # 1) rollout
        items, numbers = data.share(order, args.prompts_per_step, build, ranks)
        groups = roll(items, numbers, sampler.refresh(), encoder, args, (args.seed, 0, step))
        # 2) score, and 3) update the discriminator: one forward serves both
        disc_loss, spread = disc_pass(disc, items, args, ranks.device, spare)
        disc_norm, disc_skipped = step_if_finite(
            disc_opt, disc_loss, args.grad_clip, "discriminator"
        )
        # 4) advantage
        for group, item in zip(groups, items, strict=True):
            for kind, name in enumerate(spans):
                raw = torch.tensor(
                    [item.score.get(kind, {}).get(k, float("nan")) for k in range(args.group_size)]
                )
                raw = raw.masked_fill(
                    raw.isinf() | bool(disc_skipped), torch.nan
                )  # so that it skips the policy's update too
                group.scores[name] = raw.clamp(-args.score_clip, args.score_clip)  # NaN: malformed
            group.advantage = alignment_advantage(
                group.scores[spans[0]],
                group.scores[spans[-1]],
                item.well_formed,
                args.group_size,
                alpha=args.alpha,
                malformed_penalty=args.malformed_penalty,
                normalize=args.normalize,
                std_floor=args.std_floor,
                malformed=args.malformed,
            )
            verify(group)  # a canary: logged, never trained on
        # 5) update the policy
        set_lr(opt, args.lr * schedule(step, args.steps, args.warmup, args.schedule))
        metrics = policy_update(
            policy, opt, groups, numbers, args, Tree(spare.prompt, [[encoder.eos]]), ranks.device
        )
        # 6) log
        metrics |= disc_metrics(
            items, numbers, spread, args, bool(args.probe_every) and step % args.probe_every == 0
        )
        metrics |= rollout_metrics(groups) | {
            "lr": opt.param_groups[0]["lr"],
            "left_out": len(data.bad),
        }
        disc_loss = (
            all_sum(disc_loss) if metrics[f"{spans[0]}/acc"] >= 0 else torch.nan
        )  # no pair was seen
        metrics |= {
            "disc_loss": disc_loss,
            "disc_grad_norm": disc_norm,
            "disc_skipped": disc_skipped,
        }
        log.step(step + 1, metrics)
        if args.sample_every and step % args.sample_every == 0 and groups:
            references = {
                name: items[0].score.get(kind, {}).get(None) for kind, name in enumerate(spans)
            }
            show_rollout(log, step + 1, groups[0], references)
        # 7) save
        stop = ranks.stop()
        if (
            stop
            or step + 1 == args.steps
            or (args.save_every and (step + 1) % args.save_every == 0)
        ):
            save(
                last,
                lambda at: (
                    save_policy(policy, at),
                    save_discriminator(disc, policy.source, at / "discriminator"),
                ),
                {"step": step + 1, "args": vars(args), "metrics": metrics},
                {"policy": (policy, opt), "disc": (disc, disc_opt)},
                {"order": order.state()},
            )
        if stop:
            sys.exit(SAVED_AND_STOPPED)
    ranks.close()


if __name__ == "__main__":
    main(parse(Args))
