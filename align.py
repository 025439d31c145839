"""
Stage 2: black-box adversarial alignment on the policy's own rollouts (PRISM, arXiv 2604.28123, section 3.2).

1. Discriminator: a vision-language model upcycled into a mixture of experts, with a scalar head; it scores the
   perception span (<caption>) and the reasoning span (<think>, <answer>) of a response, each given the prompt.
2. Warm-up: Bradley-Terry on pairs, the reference's span preferred to the policy's (its rollouts, or --pairs).
3. The game, each step: sample N rollouts per prompt; score their spans and the reference's; update the discriminator by
   Bradley-Terry; update the policy by GRPO on alpha * GN(perception) + (1 - alpha) * GN(reasoning) - 1.5 * malformed,
   where GN normalises within the group and the scores are those of the forward that the discriminator's update used.
The verifier's accuracy is logged as a canary and never trained on.

Differs from the released code: both sides' spans go through one function and end in the same token; load balance is on
in the game too; the head is float32 without dropout, scores are clipped in the reward only, L2 is on raw scores; image,
prompt and reference are encoded once per prompt (packs.py); one denominator over all micro-batches and ranks.
Differs from the paper: spans are normalised, then weighed (--normalize sum: the paper's order); token-routed experts are
the default (--disc experts: one expert and head per kind of span, the paper's text taken literally).

    python align.py --policy ckpt/sft/last --data data/tiny/align.jsonl --out ckpt/align --steps 40
    torchrun --nproc_per_node=8 align.py --policy ckpt/sft --disc_init Qwen/Qwen3-VL-2B-Instruct --data align.parquet --out ckpt/align

    B rollouts   N group size   T tokens   K children of a pack   D hidden   I intermediate   E experts
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForImageTextToText

import health
from common import Common, Log, optimizer, parse, restore, save, schedule, step_if_finite
from data import BadRow, Encoder, Order, read, split_spans
from model import RolloutCopy, copy_processor, full_state, load, shard
from model import save as save_policy
from packs import Tree, each, run
from ranks import SAVED_AND_STOPPED, all_sum, gather, is_main, print0, setup, world
from rlvr import policy_update, sample, verify

PERCEPTION, REASONING = 0, 1  # kinds of span
NAMES = ("perception", "reasoning")


@dataclass(kw_only=True)
class Args(Common):
    disc: Literal["moe", "experts", "dense"] = "moe"  # token-routed experts; an expert and a head per kind of span; no experts
    disc_init: str = ""  # dense checkpoint that the discriminator is upcycled from; empty: the policy's
    disc_path: str = ""  # a discriminator that was warmed up already (this script's, or the released one)
    disc_blind: bool = False  # ablation: the discriminator sees no image
    spans: Literal["both", "whole"] = "both"  # whole: one score for the whole response (GAD, the text-only ancestor)
    experts: int = 4  # per layer, of --disc moe
    experts_per_token: int = 2  # of --disc moe
    upcycle_noise: float = 0.01  # noise on the copied experts, relative to each tensor's standard deviation
    pairs: str = ""  # warm-up pairs; empty: made from the policy's rollouts on --data
    warmup_steps: int = 940  # at most, of the discriminator before the game (120,000 pairs); 0: none
    warmup_pairs: int = 128  # pairs per warm-up update
    warmup_lr: float = 1e-5  # peak learning rate of the warm-up, cosine
    warmup_until: float = 0.9  # stop once held-out pair accuracy of every kind of span reaches it, or stops growing
    warmup_only: bool = False  # end after the warm-up
    prompts_per_step: int = 4  # groups per step of the game, over all ranks
    group_size: int = 16  # rollouts per prompt
    alpha: float = 0.5  # weight of perception in the advantage
    normalize: Literal["span", "sum"] = "span"  # normalise each span's scores then weigh, or weigh then normalise
    malformed: Literal["floor", "drop"] = "floor"  # malformed rollouts: lowest score - 1 and a penalty, or left out
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

    def __post_init__(self):
        super().__post_init__()
        self.minibatches, self.kl = 1, 0.0  # strictly on-policy, no KL: every ratio is 1 and the clip of no effect
        self.ratio, self.clip_low, self.clip_high, self.dual_clip, self.aggregation = "token", 0.2, 0.2, 3.0, "token-mean"
        if self.spans == "whole" and (self.disc == "experts" or self.normalize == "sum"):
            raise ValueError("--spans whole has one kind of span: --disc experts and --normalize sum need two")
        if self.group_size < 2 or not 0 <= self.alpha <= 1:
            raise ValueError("--group_size must be 2 or more, --alpha between 0 and 1")


# ----------------------------------------------------------------------------------------------------- the algorithm


def bradley_terry(reference_score, policy_score, denominator=None):
    """mean -log sigmoid(reference - policy), (B,) raw scores each -> scalar (section 3.2.4).

    denominator: pairs over all micro-batches and ranks; None: this call's own. No pairs: 0, with a gradient.
    """
    losses = -F.logsigmoid(reference_score - policy_score)
    return losses.sum() / (max(1, len(losses)) if denominator is None else denominator)


def alignment_advantage(perception, reasoning, well_formed, group_size, *, alpha=0.5, malformed_penalty=1.5,
                        normalize="span", std_floor=0.0, malformed="floor"):  # fmt: skip
    """alpha * GN(perception) + (1 - alpha) * GN(reasoning) - malformed_penalty * [malformed], (B,) each -> (B,).

    GN(s) = (s - mean) / (std + 1e-6) within groups of `group_size` consecutive rollouts, unbiased std. A malformed
    rollout has no spans: its score is replaced by the lowest of its group's well-formed ones of that kind - 1 (-1 where
    there is none) before; with malformed="drop" it gets advantage 0 and does not count. normalize="sum": the weighted
    sum of the scores is normalised (the paper's order). Raises ValueError where groups do not fit.
    """
    if group_size < 2 or len(perception) % group_size:
        raise ValueError(f"{len(perception)} rollouts are no groups of {group_size} (a group needs 2 or more)")
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
    if normalize == "sum":
        advantage = normalized(alpha * v + (1 - alpha) * r)
    else:
        advantage = alpha * normalized(v) + (1 - alpha) * normalized(r)
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
            copies = weight.detach().expand(experts, -1, -1)
            self.experts.register_parameter(name, nn.Parameter(copies + noise * copies.std() * torch.randn(copies.shape)))
        self.gate = nn.Linear(gate_up.shape[0], experts, bias=False) if routed else None
        if routed:
            nn.init.normal_(self.gate.weight, std=0.02)
        self.act, self.top_k = mlp.act_fn, top_k

    def forward(self, x):
        shape, x = x.shape, x.flatten(0, -2)  # (T, D)
        if self.gate is None:  # perception and reasoning expert; prompt tokens go through both, averaged
            route = torch.stack([(self.kind != REASONING).float(), (self.kind != PERCEPTION).float()], 1)
            route = route / route.sum(1, keepdim=True)
        else:
            self.probs = self.gate(x).float().softmax(-1)  # (T, E), read by Discriminator.forward for the load balance
            top, index = self.probs.topk(self.top_k, -1)
            route = torch.zeros_like(self.probs).scatter(1, index, top / top.sum(-1, keepdim=True))
        self.chosen = (route > 0).float().detach() / (route > 0).sum(1, keepdim=True)  # shares of the dispatch, (T, E)
        out = torch.zeros_like(x)
        for e in range(route.shape[1]):
            at = route[:, e].nonzero().squeeze(1)
            gate, up = (x[at] @ self.experts.gate_up_proj[e]).chunk(2, -1)
            y = (self.act(gate) * up) @ self.experts.down_proj[e]
            out = out.index_add(0, at, y * route[at, e, None].to(y.dtype))
        return out.view(shape)


class Discriminator(nn.Module):
    """A vision-language model without language-model head that scores the children of a pack at their last token."""

    def __init__(self, base, form, experts=4, top_k=2, noise=0.0):
        """base: a dense transformers model (the one without head), changed in place. Draws from torch's generator."""
        super().__init__()
        self.model, self.form = base, form
        layers = base.language_model.layers
        self.mlps = []  # the mixtures, by reference
        for layer in layers if form != "dense" else []:
            layer.mlp = Experts(layer.mlp, experts if form == "moe" else 2, top_k, noise, routed=form == "moe")
            self.mlps.append(layer.mlp)
        width = base.language_model.config.hidden_size
        self.v_head = nn.Sequential(nn.Identity(), nn.Linear(width, 2 if form == "experts" else 1, bias=False))
        nn.init.normal_(self.v_head[1].weight, std=0.02)
        base.language_model.config._attn_implementation = "packs"

    def forward(self, pack):
        """Raw scores (K,) float32 of the pack's children, the load-balancing loss of each of its trees, and the load
        (kinds, E): how many tokens of each kind of span went to each expert, summed over the layers."""
        for mlp in self.mlps:
            mlp.kind = pack.kind
        hidden = run(self.model, pack)[pack.ends].float()
        kinds = pack.kind[pack.ends]
        scores = self.v_head(hidden).gather(1, kinds.clamp(min=0)[:, None] if self.form == "experts" else kinds[:, None] * 0)
        trees = int(pack.tree.max()) + 1
        balance, load = hidden.new_zeros(trees), hidden.new_zeros(2, self.mlps[0].chosen.shape[1] if self.mlps else 1)
        for mlp in self.mlps:
            for kind in (PERCEPTION, REASONING):
                load[kind] += mlp.chosen[pack.kind == kind].sum(0)
            if self.form == "moe":
                balance = balance + load_balance(mlp.probs, mlp.chosen, pack.tree, trees) / len(self.mlps)
        return scores.squeeze(1), balance, load


def load_balance(probs, chosen, tree, trees):
    """E * sum_e f_e P_e of Switch (arXiv 2101.03961, equation 4) for each tree of a pack -> (trees,); 1 when balanced.

    f: share of the dispatch, P: mean router probability, both over the tree's tokens; probs, chosen (T, E); tree (T,).
    Per tree, so that it does not depend on what shares the pack.
    """
    tokens = tree.bincount(minlength=trees)[:, None]
    f, p = (probs.new_zeros(trees, probs.shape[1]).index_add(0, tree, x) / tokens for x in (chosen, probs))
    return probs.shape[1] * (f * p).sum(1)


def upcycle(path, args) -> Discriminator:
    """A discriminator from the dense checkpoint or hub name `path`."""
    hf = AutoModelForImageTextToText.from_pretrained(path, dtype=torch.float32, use_safetensors=True)
    torch.manual_seed(args.seed)
    return Discriminator(hf.model, args.disc, args.experts, args.experts_per_token, args.upcycle_noise)


def save_discriminator(disc, source, folder):
    """Write `disc` to `folder`: Qwen3-VL-MoE's layout of transformers 4.57 plus `v_head.1.weight`. All ranks call it."""
    state = full_state(disc)
    if not is_main():
        return
    config = disc.model.config.to_dict()
    if disc.form != "dense":
        text = config["text_config"]
        text |= {"model_type": "qwen3_vl_moe_text", "moe_intermediate_size": text["intermediate_size"], "mlp_only_layers": [],
                 "num_experts": disc.mlps[0].experts.down_proj.shape[0], "num_experts_per_tok": disc.mlps[0].top_k,
                 "decoder_sparse_step": 1, "norm_topk_prob": True}  # fmt: skip
        config |= {"model_type": "qwen3_vl_moe", "architectures": ["Qwen3VLMoeForConditionalGeneration"]}
    config |= {"transformers_version": "4.57.0", "discriminator": disc.form}
    Path(folder).mkdir(parents=True, exist_ok=True)
    Path(folder, "config.json").write_text(json.dumps(config, indent=1))
    save_file({k: v.contiguous() for k, v in state.items()}, Path(folder, "model.safetensors"), {"format": "pt"})
    copy_processor(source, folder)


def load_discriminator(folder) -> Discriminator:
    """Open what `save_discriminator` wrote, or the released discriminator. ValueError where the layout is in doubt."""
    config = json.loads(Path(folder, "config.json").read_text())
    state = {k: v.float() for f in sorted(Path(folder).glob("*.safetensors")) for k, v in load_file(f).items()}
    state = {k: v for k, v in state.items() if k != "lm_head.weight"}
    if "v_head.1.weight" not in state:
        raise ValueError(f"{folder} has no v_head.1.weight: it is no discriminator (--disc_init upcycles a policy)")
    text = config["text_config"]
    experts, top_k = text.get("num_experts", 0), text.get("num_experts_per_tok", 2)
    form = config.get("discriminator", "moe" if experts else "dense")
    if form != "dense":  # the dense model that it was upcycled from, as a skeleton
        if int(config.get("transformers_version", "0").split(".")[0]) != 4:
            raise ValueError(f"{folder}: experts saved by transformers {config.get('transformers_version')}; only the layout "
                             "of 4.57 is read, (experts, hidden, 2 * intermediate), since shapes alone cannot tell")  # fmt: skip
        text["intermediate_size"] = text["moe_intermediate_size"]
        dense = {"model_type": "qwen3_vl", "architectures": ["Qwen3VLForConditionalGeneration"]}
        config = config | dense | {"text_config": text | {"model_type": "qwen3_vl_text"},
                                   "vision_config": config["vision_config"] | {"model_type": "qwen3_vl"}}  # fmt: skip
    hf = AutoModelForImageTextToText.from_config(AutoConfig.for_model(**config), dtype=torch.float32)
    disc = Discriminator(hf.model, form, experts, top_k)
    disc.load_state_dict(state)
    return disc


# -------------------------------------------------------------------------------- spans, and the discriminator's update


@dataclass
class Spans:
    """What the discriminator sees of one prompt: its reference's spans first, then the policy's; `rollout[i]` is the
    number of the i-th policy span's rollout (malformed rollouts have no spans)."""

    prompt: object
    reference: dict[int, list[int]]  # kind -> ids
    policy: list[tuple[int, int, list[int]]]  # (rollout, kind, ids)

    def trees(self, budget):
        """One tree, or several within `budget` tokens that each hold the references again."""
        fixed = len(self.prompt.ids) + sum(map(len, self.reference.values()))
        parts, room = [[]], budget - fixed
        for span in self.policy:
            if parts[-1] and room < len(span[2]):
                parts.append([])
                room = budget - fixed
            parts[-1].append(span)
            room -= len(span[2])
        head = list(self.reference)
        return [(Tree(self.prompt, [*self.reference.values(), *(s[2] for s in part)],
                      kinds=[*head, *(s[1] for s in part)]), part) for part in parts]  # fmt: skip


def encode_spans(encoder, response, spans):
    """{kind: ids} of a response, or None where it is malformed. The one way from text to ids, for both sides."""
    texts = split_spans(response)
    if texts is None:
        return None
    texts = texts if spans == "both" else ("\n".join(texts),)
    return {kind: encoder.response(text) for kind, text in enumerate(texts)}


def disc_pass(disc, items, args, device, spare, train=True):
    """Score `items` (list of Spans, this rank's) once, accumulating the gradients of the discriminator's loss if `train`
    -> (scores, metrics); scores[item][kind]: (reference's, {rollout: score}). All ranks call it."""
    split = [(i, tree, part) for i, item in enumerate(items) if item.policy for tree, part in item.trees(args.pack_tokens)]
    counts = all_sum({kind: float(sum(s[1] == kind for _, _, p in split for s in p)) for kind in (0, 1)})
    weight = {kind: 1 / max(1.0, n) for kind, n in counts.items()}
    kinds = 2 if args.spans == "both" else 1
    scores = [{k: (float("nan"), {}) for k in item.reference} for item in items]
    sums, load = dict.fromkeys(("loss", "balance"), 0.0), 0.0
    with torch.set_grad_enabled(train):
        for pack in each([tree for _, tree, _ in split], args.pack_tokens, device, spare, split=False):
            raw, balance, spread = disc(pack)
            loss = raw.sum() * 0.0
            where = dict(zip(pack.children, range(len(raw)), strict=True)) if pack.weight else {}
            for n, t in enumerate(sorted({t for t, _ in where})):
                i, tree, part = split[t]
                heads = len(items[i].reference)
                for kind in items[i].reference:
                    at = [c for c in range(heads, len(tree.children)) if tree.kinds[c] == kind]
                    ours = raw[[where[t, c] for c in at]]
                    theirs = raw[where[t, list(items[i].reference).index(kind)]].expand(len(at))
                    loss = loss + bradley_terry(theirs, ours, 1 / weight[kind])
                    squares = theirs.square().sum() + ours.square().sum()  # raw, so that a saturated score is pulled back
                    loss = loss + args.score_l2 * weight[kind] / (2 * kinds) * squares
                    known = scores[i][kind][1] | {part[c - heads][0]: float(s) for c, s in zip(at, ours, strict=True)}
                    scores[i][kind] = (float(theirs[0]) if at else scores[i][kind][0], known)
                share = len(part) / max(1.0, sum(counts.values()))
                loss = loss + args.balance * share * balance[n]
                sums["balance"] += share * float(balance[n])
            if train:
                (loss * world()).backward()
            sums["loss"] += float(loss)
            load = load + spread.detach().cpu() * pack.weight
    return scores, all_sum(sums), all_sum(load)


def span_items(encoder, disc_encoder, group_texts, prompt, args):
    """A prompt's `Spans` from the texts of its rollouts, and which rollouts are well-formed (N,)."""
    spans = [encode_spans(encoder, text, args.spans) for text in group_texts]
    policy = [(k, kind, ids) for k, found in enumerate(spans) for kind, ids in (found or {}).items()]
    seen = disc_encoder.prompt(prompt.example) if args.disc_blind else prompt
    reference = encode_spans(encoder, prompt.example.response, args.spans)
    return Spans(seen, reference, policy), torch.tensor([found is not None for found in spans])
