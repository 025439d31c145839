"""
Stage 2: black-box adversarial alignment on the policy's own rollouts (PRISM, arXiv 2604.28123,
section 3.2).

1. Discriminator: a vision-language model upcycled into a mixture of experts, with a scalar head. It
   scores each span of a response (data.SPANS: perception is the caption, reasoning is the thinking
   and the answer), given the prompt.
2. Warm-up: Bradley-Terry on pairs, the reference's span preferred to the policy's (of its rollouts,
   or of --pairs).
3. The game, in each step: sample N rollouts for each prompt; score their spans and the reference's;
   update the discriminator by Bradley-Terry; update the policy on the advantage
   alpha * GN(perception) + (1 - alpha) * GN(reasoning) - 1.5 * [malformed], where GN normalises
   within the group, and the scores are those of the forward that the discriminator's last update
   used (there is one in a step, or --disc_updates).
   The verifier's accuracy is logged as a canary and never trained on.

Differs from the released code: both sides' spans go through one function and end in the same token;
load balance is on in the game too; the head is float32 without dropout; scores are clipped in the
reward only, L2 is on raw scores. Differs from the paper: the spans' scores are normalised, then
weighed (--normalize sum: in its order).

    python align.py --policy ckpt/sft                                 # the embedded world, on a CPU
    torchrun --nproc_per_node=8 align.py --policy ckpt/sft --data align.parquet --out ckpt/align

    N rollouts of a prompt   P pairs of a rollout's and a reference's span
    of a pack: T tokens   K children (spans; for the policy, rollouts)   S scored tokens   G trees
    D hidden   I intermediate   E experts   L layers
"""

from __future__ import annotations

import copy
import sys
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
import torch.nn as nn
import torch.nn.functional as F

from data import SPANS, WHOLE, read, split_spans
from engine import health
from engine.arguments import Common, option, parse
from engine.attention import adopt, forward_pack
from engine.checkpoint import Checkpoints, restore, save
from engine.evaluation import validate, validation_is_due, warn_of_overlap
from engine.families import text_of
from engine.files import (
    expect_none,
    experts_of,
    read_backbone,
    same_input,
    write_backbone,
)
from engine.log import Log
from engine.optimiser import Schedule, optimizer, set_lr, step_if_finite
from engine.packs import Tree, is_split, packs_of
from engine.ranks import SAVED_AND_STOPPED, all_max, all_sum, gather, print0, setup, world
from engine.rollouts import (
    Group,
    rollout_metrics,
    sample_groups,
    sampler_logps,
    show_rollouts,
)
from engine.rows import BadRow
from model import RolloutCopy, freeze_vision, full_state, load, shard
from model import save as save_policy
from rewards import measure, verify

WARMUP_CHECK = 20  # updates between held-out accuracies
NO_GAIN = 5  # so many checks without a gain end the warm-up
LEAST_GAIN = 0.005  # of held-out accuracy
HELD_OUT = 64  # rows of the warm-up's data, at most, that it is never trained on


@dataclass(kw_only=True)
class Args(Common):
    disc: Literal["moe", "experts", "dense"] = option(
        "moe", "token-routed experts; an expert and a head for each span; no experts"
    )
    disc_init: str = option(
        "", "dense checkpoint that the discriminator is upcycled from; empty: the policy's"
    )
    disc_path: str = option(
        "", "a discriminator that is warmed up already: a run's, or the released one"
    )
    disc_blind: bool = option(False, "ablation: the discriminator sees no image")
    spans: Literal["both", "whole"] = option(
        "both", "whole: one score for the whole response (GAD, the text-only ancestor)"
    )
    experts: int = option(4, "per layer, of --disc moe", least=1)
    experts_per_token: int = option(2, "of --disc moe", least=1)
    upcycle_noise: float = option(
        0.01, "noise on the copied experts, relative to each tensor's standard deviation"
    )
    pairs: str = option("", "warm-up pairs; empty: made from the policy's rollouts on --data")
    warmup_steps: int = option(
        940, "at most, of the discriminator before the game (120,000 pairs); 0: none"
    )
    warmup_pairs: int = option(128, "pairs per warm-up update", least=1)
    warmup_lr: float = option(1e-5, "peak learning rate of the warm-up, cosine")
    warmup_until: float = option(
        0.9, "stop once held-out pair accuracy of every span reaches it, or stops growing"
    )
    warmup_only: bool = option(False, "end after the warm-up")
    prompts_per_step: int = option(4, "groups per step of the game, over all ranks", least=1)
    group_size: int = option(16, "rollouts per prompt", least=2)
    alpha: float = option(0.5, "weight of perception in the advantage")
    normalize: Literal["span", "sum"] = option(
        "span", "normalise each span's scores, then weigh; or weigh, then normalise"
    )
    malformed: Literal["floor", "drop"] = option(
        "floor", "malformed rollouts: lowest score - 1 and a penalty; or left out"
    )
    malformed_penalty: float = option(1.5, "subtracted from a malformed rollout's advantage")
    std_floor: float = option(0.0, "least standard deviation that a group is divided by")
    disc_lr: float = option(1e-6, "of the discriminator in the game")
    disc_updates: int = option(
        1, "of the discriminator on each step's rollouts; the last one's scores count", least=1
    )
    disc_weight_decay: float = option(0.01, "AdamW's, on matrices only")
    score_clip: float = option(
        10.0, "bound on the scores as rewards, never in the discriminator's loss", above=0
    )
    score_l2: float = option(
        1e-3, "coefficient of the mean square of raw scores: Bradley-Terry leaves their level free"
    )
    balance: float = option(0.01, "coefficient of the load-balancing loss of --disc moe")
    temperature: float = option(1.0, "of sampling and of the log-probs alike", above=0)
    slots: int = option(256, "rows decoded at once, per device", least=1)
    probe_every: int = option(50, "steps between leak probes; 0: never")

    def __post_init__(self):
        super().__post_init__()
        if self.alpha > 1:
            raise ValueError(f"--alpha is {self.alpha}: it is a share, at most 1")
        if self.spans == "whole" and self.disc == "experts":
            raise ValueError("--disc experts needs several spans: --spans whole has one")
        if self.spans == "whole" and self.normalize == "sum":
            raise ValueError("--normalize sum adds several spans: --spans whole has one")
        if self.experts_per_token > self.experts:
            raise ValueError("--experts_per_token is at most --experts")
        names = [*span_table(self)]
        weighed = [*span_weights(self.spans, self.alpha)]
        if names != weighed:
            raise ValueError(
                f"data.SPANS has {names}, and align.span_weights {weighed}: each span needs a "
                "weight, in the same order"
            )


def span_table(args):
    """{name of a span: the parts of a response that it holds}: what the discriminator scores."""
    return WHOLE if args.spans == "whole" else SPANS


def span_weights(spans, alpha):
    """{name of a span: its weight in the advantage}. spans: as --spans."""
    if spans == "whole":
        return {"whole": 1.0}
    return {"perception": alpha, "reasoning": 1 - alpha}


# ----------------------------------------------------------------------------- the algorithm
def bradley_terry(reference_score, policy_score, denominator=None):
    """-log sigmoid(reference - policy), summed over pairs and divided by `denominator`: raw scores
    (P,) each -> scalar (section 3.2.4).

    denominator: None, the number of pairs: their mean. The game divides by the well-formed rollouts
    of the whole step, of which each has a pair of every span: the spans' means add up. Without
    pairs the loss is 0, with a gradient.
    """
    if denominator is None:
        denominator = max(1, len(policy_score))
    return -F.logsigmoid(reference_score - policy_score).sum() / denominator


def group_normalize(score, counted, std_floor=0.0):
    """GN: (score - mean) / (std + 1e-6) within a group, (N,) -> (N,), with the unbiased std.

    Rollouts that are not `counted`, (N,) bool, get 0 and do not enter mean and std. Where all
    scores are equal there is nothing to tell apart: 0 for all (their rounding, divided by itself,
    would give a whole advantage).
    """
    normalized = torch.zeros_like(score)
    x = score[counted]
    if len(x) < 2 or x.max() == x.min():
        return normalized
    normalized[counted] = (x - x.mean()) / (x.std().clamp(min=std_floor) + 1e-6)
    return normalized


def floor_malformed(score, well_formed):
    """Scores (N,) of one span, where malformed rollouts get the group's lowest score - 1 (-1 where
    no rollout is well-formed)."""
    lowest = score[well_formed].min() if well_formed.any() else torch.zeros(())
    return torch.where(well_formed, score, lowest - 1)


def span_advantage(
    scores,
    weights,
    well_formed,
    *,
    malformed_penalty=1.5,
    normalize="span",
    std_floor=0.0,
    malformed="floor",
):
    """The advantage (N,) of one group from the scores (spans, N), weighed by `weights`, a number
    for each span: sum of weight * GN(score), - malformed_penalty * [malformed].

    well_formed (N,) bool; scores of malformed rollouts are not read. With malformed="drop" they get
    advantage 0 and do not count. normalize="sum": GN of the weighted sum (the paper's order).
    """
    dropped = malformed == "drop"
    counted = well_formed if dropped else torch.ones_like(well_formed)
    floored = [floor_malformed(score, well_formed) for score in scores.float()]
    if normalize == "sum":
        total = sum(w * score for w, score in zip(weights, floored, strict=True))
        advantage = group_normalize(total, counted, std_floor)
    else:
        normalized = [group_normalize(score, counted, std_floor) for score in floored]
        advantage = sum(w * score for w, score in zip(weights, normalized, strict=True))
    if not dropped:
        advantage = advantage - malformed_penalty * (~well_formed).float()
    return advantage


def alignment_advantage(
    perception, reasoning, well_formed, group_size, *, alpha=0.5, malformed_penalty=1.5, **options
):
    """`span_advantage` of perception and reasoning scores (B,), in groups of `group_size`
    consecutive rollouts -> (B,). Raises ValueError where groups do not fit."""
    if group_size < 2 or len(perception) % group_size:
        raise ValueError(
            f"{len(perception)} rollouts are no groups of {group_size} (a group needs 2 or more)"
        )
    advantages = []
    for start in range(0, len(perception), group_size):
        group = slice(start, start + group_size)
        scores = torch.stack([perception[group], reasoning[group]])
        advantages.append(
            span_advantage(
                scores,
                (alpha, 1 - alpha),
                well_formed[group].bool(),
                malformed_penalty=malformed_penalty,
                **options,
            )
        )
    return torch.cat(advantages)


def load_balance(dispatched, probability):
    """E * sum_e f_e P_e of Switch (arXiv 2101.03961, equation 4), averaged over layers: 1 where the
    load is balanced.

    dispatched, probability (L, G, E): f, the share of a tree's tokens that goes to each expert, and
    P, the mean of the router's probabilities over the tree's tokens -> (G,).
    """
    layers, trees, experts = probability.shape
    if layers == 0:
        return probability.new_zeros(trees)
    return experts * (dispatched * probability).sum(-1).mean(0)


# ----------------------------------------------------------------------------- the discriminator
def gated(mlp):
    """Of a gated MLP, transformers', the matrices of gate and up (2I, D), of down (D, I), and the
    activation. Raises ValueError for layers of another kind, which have no such copies."""
    layers = dict(mlp.named_children())
    if {*layers} >= {"gate_proj", "up_proj", "down_proj"}:
        gate_up = torch.cat([mlp.gate_proj.weight, mlp.up_proj.weight])
        act = mlp.act_fn
    elif {*layers} >= {"gate_up_proj", "down_proj"}:  # GLM's, in one matrix
        gate_up = mlp.gate_up_proj.weight
        act = mlp.activation_fn
    else:
        gate_up = act = None
    if gate_up is None or any(getattr(layer, "bias", None) is not None for layer in mlp.children()):
        raise ValueError(
            f"a discriminator of experts copies gated MLPs without biases, and "
            f"{type(mlp).__name__} ({', '.join(layers)}) is none: give --disc dense, or a dense "
            "--disc_init of the same family"
        )
    return gate_up, mlp.down_proj.weight, act


class MixtureOfExperts(nn.Module):
    """E SwiGLU experts in the place of a dense MLP, each a copy of it plus noise. Parameters stand
    in the layout of transformers 4.57.

    With a router: a softmax over experts, the top k, their weights renormalised. Without: each span
    has its expert; prompt tokens, which the spans share, go through all of them, averaged.
    """

    def __init__(self, mlp, experts, top_k, noise=0.0, has_router=True):
        super().__init__()
        gate_up, down, self.act = gated(mlp)
        gate_up = gate_up.T  # (D, 2I)
        down = down.T  # (I, D)
        self.experts = nn.Module()
        self.experts.gate_up_proj = nn.Parameter(_noisy_copies(gate_up, experts, noise))
        self.experts.down_proj = nn.Parameter(_noisy_copies(down, experts, noise))
        self.gate = None
        if has_router:
            self.gate = nn.Linear(gate_up.shape[0], experts, bias=False)
            nn.init.normal_(self.gate.weight, std=0.02)
        self.top_k = top_k
        self.kind = None  # (T,) the span of each token, set before each forward
        self.recording = False  # whether the next forward keeps `probability` and `routed`
        self.probability = None  # (T, E)
        self.routed = None  # (T, E)

    def forward(self, x):
        shape = x.shape
        x = x.flatten(0, -2)  # (T, D)
        route = self._route_by_span() if self.gate is None else self._route_by_token(x)  # (T, E)
        out = torch.zeros_like(x)
        gate_ups = self.experts.gate_up_proj.unbind()
        downs = self.experts.down_proj.unbind()
        for e, (gate_up, down) in enumerate(zip(gate_ups, downs, strict=True)):
            at = route[:, e].nonzero().squeeze(1)  # the tokens that go to expert e
            gate, up = (x[at] @ gate_up).chunk(2, -1)
            y = (self.act(gate) * up) @ down
            weight = route[at, e].unsqueeze(1).to(y.dtype)
            out = out.index_add(0, at, y * weight)
        return out.view(shape)

    def _route_by_span(self):
        experts = len(self.experts.down_proj)
        in_span = F.one_hot(self.kind.clamp(min=0), experts).float()
        shared = torch.full_like(in_span, 1 / experts)
        return torch.where(self.kind.unsqueeze(1) >= 0, in_span, shared)

    def _route_by_token(self, x):
        probability = self.gate(x).float().softmax(-1)
        top, index = probability.topk(self.top_k, -1)
        route = torch.zeros_like(probability)
        route = route.scatter(1, index, top / top.sum(-1, keepdim=True))
        if self.recording:
            self.recording = False  # checkpointing's second run would keep all that it made
            chosen = (route > 0).float().detach()
            self.probability = probability
            self.routed = chosen / chosen.sum(1, keepdim=True)
        return route


def _noisy_copies(weight, experts, noise):
    """(experts, rows, columns); `noise` is relative to the weight's standard deviation."""
    copies = weight.detach().expand(experts, -1, -1).contiguous()  # FSDP2 takes nothing else
    return copies + noise * copies.std() * torch.randn(copies.shape)


class Discriminator(nn.Module):
    """A vision-language model without language-model head, which scores the children of a pack at
    their last tokens."""

    def __init__(self, base, form, experts=4, top_k=2, noise=0.0, spans=2):
        """base: a dense transformers model without head, changed in place. form: as --disc. Draws
        from torch's generator."""
        super().__init__()
        self.model = base
        self.form = form
        self.mlps = []  # the mixtures, by reference
        heads = 1
        if form == "experts":
            experts = heads = spans
        if form != "dense":
            for layer in text_of(base).layers:
                layer.mlp = MixtureOfExperts(
                    layer.mlp, experts, top_k, noise, has_router=form == "moe"
                )
                self.mlps.append(layer.mlp)
        head = nn.Linear(text_of(base).config.hidden_size, heads, bias=False)
        nn.init.normal_(head.weight, std=0.02)
        # files know it as v_head.1.weight: in the released one a dropout comes first
        self.v_head = nn.Sequential(nn.Identity(), head)
        adopt(base)

    def forward(self, pack):
        """Raw scores (K,) float32 of the pack's children, and how its tokens were routed: the
        probability of each expert, and the share of the token that it got, (L, T, E) each (L = 0
        without a router)."""
        for mlp in self.mlps:
            mlp.kind = pack.kind
            mlp.recording = True
        hidden = forward_pack(self.model, pack)  # (T, D)
        scores = self.v_head(hidden[pack.ends].float())  # (K, heads)
        if self.form == "experts":
            scores = scores.gather(1, pack.kind[pack.ends].unsqueeze(1))  # (K, 1)
        if self.form != "moe":
            nothing = hidden.new_zeros(0, len(pack.ids), 1)
            return scores.sum(1), nothing, nothing
        probability = torch.stack([mlp.probability for mlp in self.mlps])
        routed = torch.stack([mlp.routed for mlp in self.mlps])
        for mlp in self.mlps:
            mlp.probability = mlp.routed = None
        return scores.sum(1), probability, routed


def load_discriminator(args) -> Discriminator:
    """Open --disc_path, or upcycle --disc_init (the policy)."""
    if args.disc_path:
        return open_discriminator(args.disc_path, args.disc)
    return upcycle(load(args.disc_init or args.policy).hf.model, args)


def upcycle(base, args) -> Discriminator:
    """A discriminator made of `base`, a dense transformers model without head."""
    torch.manual_seed(args.seed)
    return Discriminator(
        base,
        args.disc,
        args.experts,
        args.experts_per_token,
        args.upcycle_noise,
        spans=len(span_table(args)),
    )


def open_discriminator(path, expected=None) -> Discriminator:
    """Open the discriminator in `path` (as for files.read_backbone).

    Raises ValueError for what is no discriminator, in doubt, or not of the `expected` form.
    """
    base, state, config = read_backbone(path)
    experts = experts_of(config)
    top_k = config["text_config"].get("num_experts_per_tok", 0)
    form = config.get("discriminator", "moe" if experts else "dense")
    if "v_head.1.weight" not in state:
        raise ValueError(
            f"{path} has no v_head.1.weight: it is no discriminator (--disc_init upcycles a policy)"
        )
    if expected and form != expected:
        raise ValueError(
            f"{path} is a discriminator of the form {form}, not {expected}: give --disc {form}"
        )
    disc = Discriminator(base, form, experts, top_k, spans=experts)
    ours = {(name, tensor.shape) for name, tensor in disc.state_dict().items()}
    theirs = {(name, tensor.shape) for name, tensor in state.items()}
    expect_none(path, ours ^ theirs)
    disc.load_state_dict(state)
    return disc


def save_discriminator(disc, source, folder):
    """Write `disc` in the released one's layout: Qwen3-VL-MoE's of transformers 4.57, and
    `v_head.1.weight`. source: the checkpoint whose processor files are copied. All ranks."""
    mixture = None
    if disc.mlps:
        mixture = (len(disc.mlps[0].experts.down_proj), disc.mlps[0].top_k)
    extra = {"discriminator": disc.form}
    write_backbone(full_state(disc), disc.model.config, extra, source, folder, mixture)


# ----------------------------------------------------------------------------- spans of a group
def encode_spans(encoder, response, table):
    """The ids of each span of a response, in the order of `table`, or None where it is malformed.
    This is the one way from text to ids, for references and rollouts alike."""
    texts = split_spans(response, table)
    if texts is None:
        return None
    return [encoder.response(text) for text in texts]


def new_group(example, encoder, disc_encoder, args) -> Group:
    """The group of a row, before its rollouts. Raises BadRow where the reference is too long."""
    check_length([encoder.response(example.response)], example, args)
    prompt = encoder.prompt(example)
    seen = disc_encoder.prompt(example) if args.disc_blind else prompt
    reference = encode_spans(encoder, example.response, span_table(args))
    return Group(prompt, seen=seen, reference=reference)


def group_of_pair(row, encoder, disc_encoder, args) -> Group:
    """The group of a row of --pairs, as if of one rollout. Raises BadRow for a side too long."""
    references, policies = zip(*row.pairs.values(), strict=True)  # the texts of each span
    if args.spans == "whole":
        references = ["\n".join(references)]
        policies = ["\n".join(policies)]
    reference = [encoder.response(text) for text in references]
    policy = [encoder.response(text) for text in policies]
    for side in (reference, policy):
        check_length(side, row.example, args)
    prompt = disc_encoder.prompt(row.example)
    return with_spans(Group(prompt, seen=prompt, reference=reference), [policy])


def check_length(spans, example, args):
    """Raise BadRow for a response, or the spans of one, that is longer than rollouts may be: cut,
    it would have no answer."""
    if sum(map(len, spans)) > args.max_response:
        what = "a response longer than --max_response"
        raise BadRow(example.where, what, "Raise it, or drop the row.")


def with_spans(group, spans) -> Group:
    """`group` with the ids of its rollouts' spans, N lists (None: malformed), and no scores yet."""
    group.spans = spans
    group.well_formed = torch.tensor([ids is not None for ids in spans])
    group.reference_score = torch.full((len(group.reference),), torch.nan)
    group.score = torch.full((len(group.reference), len(spans)), torch.nan)
    return group


def roll(groups, hf, encoder, args, seed):
    """Sample the groups' rollouts and split them into spans. All ranks call it."""
    sample_groups(hf, encoder, groups, verify, args, seed)
    for group in groups:
        with_spans(group, [encode_spans(encoder, text, span_table(args)) for text in group.texts])


def scored_spans(group):
    """(rollout, span) of each span that the discriminator scores beside the reference's, in the
    order in which they stand in the group's tree."""
    rollouts = group.well_formed.nonzero().flatten().tolist()
    return [(k, s) for k in rollouts for s in range(len(group.reference))]


def spans_tree(group) -> Tree:
    """What the discriminator reads: the prompt, continued by the reference's spans, then by the
    rollouts'. The reference's stand in each part of a tree that is split."""
    children = [*group.reference]
    kinds = [*range(len(group.reference))]
    for k, s in scored_spans(group):
        children.append(group.spans[k][s])
        kinds.append(s)
    return Tree(group.seen, children, kinds, shared=len(group.reference))


# ----------------------------------------------------------------------------- its update
@dataclass
class Pairs:
    """The P pairs of a pack: a rollout's span and the reference's span of the same kind."""

    row: list[int]  # of the rollout's span among the pack's children
    reference_row: list[int]  # of the reference's
    group: list[int]  # its group's place in the list of groups
    rollout: list[int]
    span: list[int]

    def names(self):
        """(group, rollout, span) of each pair."""
        return zip(self.group, self.rollout, self.span, strict=True)


def pairs_in(pack, groups) -> Pairs:
    """The pairs of `pack`, made of the trees of `groups`."""
    row_of = {child: row for row, child in enumerate(pack.children)}
    pairs = Pairs([], [], [], [], [])
    for (g, child), row in row_of.items():
        references = len(groups[g].reference)
        if child >= references:  # the first children are the reference's
            rollout, span = scored_spans(groups[g])[child - references]
            pairs.row.append(row)
            pairs.reference_row.append(row_of[g, span])
            pairs.group.append(g)
            pairs.rollout.append(rollout)
            pairs.span.append(span)
    return pairs


def pair_loss(reference_score, policy_score, rollouts, args):
    """The part of the discriminator's loss that is made of pairs, from raw scores of references'
    and rollouts' spans, (P,) each: Bradley-Terry, and an L2 that holds the scores' level.

    rollouts: well-formed ones of the whole step. Each has a pair of every span.
    """
    spans = len(span_table(args))
    # Raw scores: what is saturated is pulled back.
    squares = (reference_score.square() + policy_score.square()) / 2
    l2 = squares.sum() / (rollouts * spans)
    return bradley_terry(reference_score, policy_score, rollouts) + args.score_l2 * l2


def balance_loss(pack, probability, routed, routed_whole, share):
    """Load balance of a pack's trees, averaged over the step's rollouts.

    probability, routed: (L, T, E), of Discriminator.forward. routed_whole: of
    `routing_of_split_trees`. share: for each tree of the step its part of the well-formed rollouts.
    """
    dispatched = pack.mean_over_trees(routed)  # (L, G, E)
    if routed_whole is not None:
        dispatched = routed_whole[:, pack.trees]
    balance = load_balance(dispatched, pack.mean_over_trees(probability))  # (G,)
    return (balance * balance.new_tensor([share[g] for g in pack.trees])).sum()


def discriminator_pass(disc, groups, args, device, train=True):
    """Score the spans of `groups` in one forward, into group.score and group.reference_score, and
    with `train` accumulate the gradients of

        sum over spans of mean_i -log sigmoid(D(x, y*) - D(x, y_i))
        + score_l2 * mean square of the raw scores + balance * load balance,

    means over all well-formed rollouts of the step -> (loss; load (spans, L, E), tokens of each
    span that each expert got). The loss is NaN where a score is not finite. All ranks call it with
    the same groups, and all get the same.
    """
    groups = [group for group in groups if group.well_formed.any()]
    trees = [spans_tree(group) for group in groups]
    well_formed = [int(group.well_formed.sum()) for group in groups]
    rollouts = sum(well_formed)  # pairs of each span
    share = [number / rollouts for number in well_formed]
    spans = len(span_table(args))
    routed_whole = routing_of_split_trees(disc, trees, args, device)
    total = 0.0
    loads = []
    found = []  # (group, rollout, span, score, reference's score) of each pair
    for pack in packs_of(trees, args.pack_tokens, device):
        with torch.set_grad_enabled(train):
            raw, probability, routed = disc(pack)  # (K,), (L, T, E), (L, T, E)
            pairs = pairs_in(pack, groups)
            policy_score = raw[pairs.row]  # (P,)
            reference_score = raw[pairs.reference_row]  # (P,)
            loss = pair_loss(reference_score, policy_score, rollouts, args)
            balance = balance_loss(pack, probability, routed, routed_whole, share)
            loss = loss + args.balance * balance
        if train:
            (loss * world()).backward()  # FSDP averages over ranks; the divisors are global already
        total += float(loss.detach()) if raw.isfinite().all() else torch.nan
        loads.append(load_of_spans(routed, pack, spans))
        scores = zip(policy_score.tolist(), reference_score.tolist(), strict=True)
        for name, both in zip(pairs.names(), scores, strict=True):
            found.append((*name, *both))
    for part in gather(found):
        for g, k, s, score, score_of_reference in part:
            groups[g].score[s, k] = score
            groups[g].reference_score[s] = score_of_reference
    for group in groups:
        share_scores_of_equal_spans(group)
    if not loads:  # there was nothing to score
        return 0.0, torch.zeros(spans, 0, 1)
    return all_sum(total), sum(gather(sum(loads)))


def share_scores_of_equal_spans(group):
    """Give spans with the same ids, the reference's among them, the same score. They differ by
    rounding, which a group of nothing else would divide by itself."""
    for s, reference in enumerate(group.reference):
        score_of = {tuple(reference): group.reference_score[s]}
        for k in group.well_formed.nonzero().flatten().tolist():
            ids = tuple(group.spans[k][s])
            group.score[s, k] = score_of.setdefault(ids, group.score[s, k].clone())


@torch.no_grad()
def routing_of_split_trees(disc, trees, args, device):
    """(L, trees, E): the share of each whole tree's tokens that each expert gets; None where no
    tree is split, or nothing is routed. The load-balancing loss of a part needs it of the whole,
    before the part's backward pass: one forward pass more, without gradient. All ranks call it.
    """
    if disc.form != "moe" or not is_split(trees, args.pack_tokens):
        return None
    whole = 0.0
    for pack in packs_of(trees, args.pack_tokens, device):
        _, _, routed = disc(pack)
        part = routed.new_zeros(len(routed), len(trees), routed.shape[2])
        part[:, pack.trees] = pack.mean_over_trees(routed)
        whole = whole + part
    return all_sum(whole)


def load_of_spans(routed, pack, spans):
    """(spans, L, E): how many tokens of each span of a pack each expert gets, from the share of
    each token that it gets, (L, T, E)."""
    routed = routed.detach() / pack.copies.unsqueeze(1)
    return torch.stack([routed[:, pack.kind == s].sum(1) for s in range(spans)]).cpu()


# ----------------------------------------------------------------------------- the policy's update
def update_policy(policy, opt, groups, args, device, skip=False):
    """One on-policy update of the policy on group.advantage -> metrics. All ranks call it.

    skip: all but the update, since the discriminator's scores are not to be trusted; it counts as
    one whose loss is not finite.

    The rollouts are of this very policy, and it is updated once. So every ratio of GRPO's loss is 1
    and no clip acts: its gradient is that of - sum of A * log pi / tokens, whose coefficient is
    known before any log-prob is (logprob.py makes the gradient along with them).
    """
    tokens = sum(group.tokens() for group in groups)  # of the step, on all ranks
    trees = [group.tree() for group in groups]
    sums = {"loss": 0.0, "entropy": 0.0, "logp_diff": 0.0}
    logp_diff_max = torch.tensor(0.0)
    for pack in packs_of(trees, args.pack_tokens, device):
        advantage = [float(groups[g].advantage[k]) for g, k in pack.children]
        advantage = torch.tensor(advantage, device=device)  # (K,) of each rollout
        coefficient = (-advantage / tokens)[pack.sequence]  # (S,) d loss / d logp
        banned = policy.encoder.banned
        logp, entropy = policy(
            pack, args.temperature, banned, entropy=True, coefficient=coefficient
        )
        loss = (coefficient * logp).sum()
        (loss * world()).backward()  # FSDP averages over ranks; `tokens` is global already
        difference = (logp.detach() - sampler_logps(pack, groups)).abs()
        sums["loss"] += float(coefficient.sum())  # GRPO's loss, where every ratio is 1
        sums["entropy"] += float(entropy.sum())
        sums["logp_diff"] += float(difference.sum())
        if len(difference):  # torch's maximum keeps a NaN, Python's max may lose it
            logp_diff_max = torch.maximum(logp_diff_max, difference.max().cpu())
    if skip:
        sums["loss"] = torch.nan
    norm, skipped = step_if_finite(opt, sums["loss"], args.grad_clip, "policy")
    sums = all_sum(sums)
    return {
        "loss": sums["loss"],
        "grad_norm": norm,
        "skipped": skipped,
        "entropy": sums["entropy"] / tokens,
        "tokens": tokens,
        "logp_diff": sums["logp_diff"] / tokens,
        "logp_diff_max": all_max(logp_diff_max).item(),
    }


# ----------------------------------------------------------------------------- the loops
def warm_up(disc, hf, encoder, disc_encoder, source, args, ranks):
    """Train the discriminator alone on pairs until it tells held-out pairs apart (section 3.2.3).
    All ranks call it."""
    names = list(span_table(args))
    # data: rows of pairs, or prompts whose rollouts become pairs with their references
    from_pairs = bool(args.pairs)
    kind = "pairs" if from_pairs else "align"
    data = read(args.pairs or args.data, kind, args.image_root, args.max_bad, args.workers)
    make_group = group_of_pair if from_pairs else new_group
    build = partial(make_group, encoder=encoder, disc_encoder=disc_encoder, args=args)
    pairs_per_row = len(names) * (1 if from_pairs else args.group_size)
    rows = max(1, args.warmup_pairs // pairs_per_row)
    # the last rows are held out
    held_out = max(1, min(HELD_OUT, len(data) // 10))
    first_held_out = len(data) - held_out
    if first_held_out < 1:
        raise ValueError(
            f"{data.path}: {len(data)} rows are too few to warm up on and to hold {held_out} out"
        )
    order = data.order(args.seed, first_held_out)
    # optimiser, resume
    opt = optimizer(disc, args.warmup_lr, args.disc_weight_decay)
    rate = Schedule("cosine", args.warmup_steps, 0.1)
    last = f"{args.out}/warmup/last"
    start = 0
    best = 0.0  # held-out pair accuracy, of the harder span
    stale = 0  # checks since it grew
    if args.resume and (found := restore(last, {"disc": (disc, opt)}, args)):
        meta, state = found
        start = meta["step"]
        order.load(state["order"])
        rate.resume(state["rate"], start)
        best = state["best"]
        stale = state["stale"]
    shown = ("loss", *columns(names, ("acc", "margin", "held_out")), "grad_norm")
    log = Log(f"{args.out}/warmup", args, shown, start, args.warmup_steps)
    test = data.fetch(range(first_held_out, len(data)), build)
    if not from_pairs:
        roll(test, hf, encoder, args, (args.seed, 1, 0))
    done = best >= args.warmup_until or stale >= NO_GAIN
    end = start if done else args.warmup_steps
    for step in range(start, end):
        # 1) pairs
        groups = data.draw(order, rows, build)
        if not from_pairs:
            roll(groups, hf, encoder, args, (args.seed, 1, step + 1))
        # 2) update
        loss, expert_load = discriminator_pass(disc, groups, args, ranks.device)
        set_lr(opt, args.warmup_lr * rate.factor(step))
        norm, skipped = step_if_finite(opt, loss, args.grad_clip, "discriminator")
        # 3) log
        pairs = health.scored_pairs(groups, names)
        metrics = health.game_metrics(pairs, expert_load, args.score_clip)
        metrics["loss"] = loss if any(group.well_formed.any() for group in groups) else torch.nan
        metrics["grad_norm"] = norm
        metrics["skipped"] = skipped
        metrics["left_out"] = len(data.bad)
        # 4) held-out pairs
        last_step = step + 1 == args.warmup_steps
        if last_step or (step + 1) % WARMUP_CHECK == 0:
            metrics |= held_out_metrics(disc, test, args, ranks.device)
            accuracy = min(metrics[f"{name}/held_out"] for name in names)
            # NaN, no pair at all, is no gain
            stale = 0 if accuracy > best + LEAST_GAIN else stale + 1
            best = max(best, accuracy)
        log.step(step + 1, metrics)
        # 5) save
        done = last_step or best >= args.warmup_until or stale >= NO_GAIN
        stop = ranks.stop()
        if stop or done or (args.save_every and (step + 1) % args.save_every == 0):
            save(
                last,
                partial(save_discriminator, disc, source),
                {"step": step + 1, "args": vars(args), "metrics": metrics},
                {"disc": (disc, opt)},
                {"order": order.state(), "rate": rate.state(), "best": best, "stale": stale},
            )
        if stop:
            sys.exit(SAVED_AND_STOPPED)
        if done:
            break
    print0(
        f"warm-up: {best:.3f} held-out pair accuracy, of the harder span (0: no pair was seen) "
        f"-> {last}"
    )


def held_out_metrics(disc, test, args, device):
    """Pair accuracy on groups that are never trained on, and what gives their sides away."""
    names = list(span_table(args))
    _, expert_load = discriminator_pass(disc, test, args, device, train=False)
    found = health.game_metrics(health.scored_pairs(test, names), expert_load, args.score_clip)
    metrics = {f"{name}/held_out": found[f"{name}/acc"] for name in names}
    return metrics | health.probe_metrics(health.probes_of(test, names))


def columns(names, keys):
    """What the printed line has of each span: "perception/acc acc_perc" and so on."""
    return [f"{name}/{key} {key}_{name[:4]}" for name in names for key in keys]


def save_players(policy, disc, folder):
    """Write the policy to `folder`, the discriminator into it. All ranks call it."""
    save_policy(policy, folder)
    save_discriminator(disc, policy.source, folder / "discriminator")


def main(args):
    # set-up
    ranks = setup(args)
    names = list(span_table(args))
    # model: the policy, the copy that samples, the discriminator
    images = {"max_pixels": args.max_pixels, "max_side": args.max_side}
    policy = load(args.policy, max_prompt_tokens=args.max_prompt, **images).train()
    encoder = policy.encoder
    disc = load_discriminator(args).train()
    same_input(disc.model.config, policy.hf.config)
    disc_encoder = copy.copy(encoder)
    disc_encoder.blind = args.disc_blind
    if args.freeze_vision:
        freeze_vision(policy.hf.model, disc.model)
    sampler = RolloutCopy(policy, args, ranks.device)
    shard(policy, policy.hf.model, args, ranks)
    shard(disc, disc.model, args, ranks, exact=[disc.v_head])
    # optimisers
    opt = optimizer(policy, args.lr, args.weight_decay)
    disc_opt = optimizer(disc, args.disc_lr, args.disc_weight_decay)
    rate = Schedule(args.schedule, args.steps, args.warmup)
    players = {"policy": (policy, opt), "disc": (disc, disc_opt)}
    # data
    data = read(args.data, "align", args.image_root, args.max_bad, args.workers)
    build = partial(new_group, encoder=encoder, disc_encoder=disc_encoder, args=args)
    order = data.order(args.seed)
    if args.eval_data:
        held_out = read(args.eval_data, "eval", args.image_root, args.max_bad, args.workers)
        warn_of_overlap(held_out, data, args)
    # resume, or warm up
    start = 0
    if args.resume and (found := restore(f"{args.out}/last", players, args)):
        meta, state = found
        start = meta["step"]
        order.load(state["order"])
        rate.resume(state["rate"], start)
    elif args.warmup_steps and not args.disc_path:
        warm_up(disc, sampler.refresh(), encoder, disc_encoder, policy.source, args, ranks)
    if args.warmup_only:
        return ranks.close()
    of_spans = columns(names, ("acc", "margin"))
    shown = ("loss", "disc_loss disc", *of_spans, "format", "accuracy", "length", "entropy")
    log = Log(args.out, args, shown, start)
    save_all = partial(save_players, policy, disc)
    checkpoints = Checkpoints(args, args.steps, players, save_all, start)
    if start == 0 and args.eval_data:
        metrics = validate(sampler.refresh(), encoder, held_out, measure, args, ranks)
        log.step(0, metrics)
        checkpoints.save(0, metrics, {"order": order.state(), "rate": rate.state()})

    for step in range(start, args.steps):
        # 1) rollout
        groups = data.draw(order, args.prompts_per_step, build)
        roll(groups, sampler.refresh(), encoder, args, (args.seed, 0, step))
        # 2) score, and 3) update the discriminator: one forward serves both
        disc_skipped = False
        for _ in range(args.disc_updates):  # the scores are those of the last forward
            disc_loss, expert_load = discriminator_pass(disc, groups, args, ranks.device)
            disc_norm, skipped = step_if_finite(
                disc_opt, disc_loss, args.grad_clip, "discriminator"
            )
            disc_skipped = disc_skipped or skipped
        # 4) advantage
        weights = span_weights(args.spans, args.alpha)
        for group in groups:
            reward = group.score.clamp(-args.score_clip, args.score_clip)  # (spans, N)
            group.advantage = span_advantage(
                reward,
                [*weights.values()],
                group.well_formed,
                malformed_penalty=args.malformed_penalty,
                normalize=args.normalize,
                std_floor=args.std_floor,
                malformed=args.malformed,
            )
        # 5) update the policy
        set_lr(opt, args.lr * rate.factor(step))
        metrics = update_policy(policy, opt, groups, args, ranks.device, skip=disc_skipped)
        # 6) log
        pairs = health.scored_pairs(groups, names)
        metrics |= health.game_metrics(pairs, expert_load, args.score_clip)
        metrics |= health.canary_metrics(groups, names)
        if args.probe_every and step % args.probe_every == 0:
            metrics |= health.probe_metrics(health.probes_of(groups, names))
        metrics |= rollout_metrics(groups)  # the canary among them
        metrics["lr"] = opt.param_groups[0]["lr"]
        metrics["left_out"] = len(data.bad)
        any_pair = any(group.well_formed.any() for group in groups)
        metrics["disc_loss"] = disc_loss if any_pair else torch.nan
        metrics["disc_grad_norm"] = disc_norm
        metrics["disc_skipped"] = disc_skipped
        if validation_is_due(args, step + 1, args.steps):
            metrics |= validate(sampler.refresh(), encoder, held_out, measure, args, ranks)
        log.step(step + 1, metrics)
        if args.sample_every and step % args.sample_every == 0:
            shown_group = groups[0]
            scores = dict(zip(names, shown_group.score, strict=True)) | shown_group.verdicts
            references = dict(zip(names, shown_group.reference_score.tolist(), strict=True))
            show_rollouts(log, step + 1, shown_group, scores, references)
        # 7) save
        stop = ranks.stop()
        state = {"order": order.state(), "rate": rate.state()}
        checkpoints.save(step + 1, metrics, state, stop)
        if stop:
            sys.exit(SAVED_AND_STOPPED)
    ranks.close()


if __name__ == "__main__":
    main(parse(Args))
