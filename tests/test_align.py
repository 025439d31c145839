"""Stage 2: parity of loss and advantage, the discriminator's invariances, upcycling, load balance,
spans."""

import json
from itertools import permutations
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from conftest import EOS, tiny_hf, tiny_prompt

from align import (
    Discriminator,
    alignment_advantage,
    bradley_terry,
    discriminator_pass,
    encode_spans,
    load_balance,
    load_discriminator,
    save_discriminator,
    span_advantage,
    spans_tree,
    with_spans,
)
from data import SPANS, WHOLE
from engine import health
from engine.packs import Tree, build_pack, plan
from engine.rollouts import Group
from model import recompute

CASES = json.loads((Path(__file__).parent / "reference.json").read_text())
PERCEPTION, REASONING = 0, 1  # numbers of the spans
ARGS = SimpleNamespace(pack_tokens=10**6, score_l2=1e-3, balance=0.01, spans="both")


def near(a, b, atol=1e-7):
    torch.testing.assert_close(
        torch.as_tensor(a).double(), torch.as_tensor(b).double(), rtol=1e-5, atol=atol
    )


# ----------------------------------------------------------------------------- loss and advantage


@pytest.mark.parametrize("case", CASES, ids=lambda c: f"seed{c['seed']}")
def test_parity(case):
    a = case["align"]
    for name in (k for k in a if k.startswith("advantage_alpha_")):
        got = alignment_advantage(
            torch.tensor(a["perception"]),
            torch.tensor(a["reasoning"]),
            torch.tensor(a["format_ok"]).bool(),
            case["group_size"],
            alpha=float(name.split("_")[-1]),
            malformed_penalty=a["format_penalty"],
        )
        near(got, a[name])
    b = case["bradley_terry"]
    reference, policy = (
        torch.tensor(b[f"{k}_score"], requires_grad=True) for k in ("reference", "policy")
    )
    loss = bradley_terry(reference, policy)
    loss.backward()
    near(loss, b["loss"])
    near(reference.grad, b["grad_reference"])
    near(policy.grad, b["grad_policy"])


def test_bradley_terry_parts_and_nothing():
    a, b = torch.randn(7), torch.randn(7, requires_grad=True)
    near(
        sum(bradley_terry(a[s], b[s], 7) for s in (slice(0, 2), slice(2, 7))),
        bradley_terry(a, b).detach(),
    )
    empty = bradley_terry(a[:0], b[:0])
    empty.backward()
    assert empty == 0 and b.grad.abs().sum() == 0
    assert (
        bradley_terry(torch.tensor([200.0]), torch.tensor([-200.0])) == 0
    )  # saturated, finite, not clamped
    assert (
        torch.autograd.grad(
            bradley_terry(torch.tensor([-200.0]), c := torch.tensor([200.0], requires_grad=True)), c
        )[0]
        == 1
    )


def test_advantage_of_malformed():
    nan, ok = float("nan"), torch.tensor([True, True, False, True])
    v, r = torch.tensor([1.0, 2.0, nan, 3.0]), torch.tensor([0.0, 0.0, nan, 0.0])
    got = alignment_advantage(v, r, ok, 4)
    filled = torch.tensor([1.0, 2.0, 0.0, 3.0]), torch.tensor([0.0, 0.0, -1.0, 0.0])
    near(got, 0.5 * sum((x - x.mean()) / (x.std() + 1e-6) for x in filled) - 1.5 * ~ok)
    got = alignment_advantage(v, r, ok, 4, malformed="drop")
    near(got, torch.tensor([-0.5, 0, 0, 0.5]) / (1 + 1e-6))
    none = torch.zeros(4, dtype=torch.bool)
    near(alignment_advantage(v, r, none, 4), torch.full((4,), -1.5))
    near(alignment_advantage(v, r, none, 4, malformed="drop"), torch.zeros(4))


def test_advantage_switches():
    torch.manual_seed(0)
    v, r, ok = torch.randn(8), 1e-5 * torch.randn(8), torch.ones(8, dtype=torch.bool)
    near(
        alignment_advantage(v, r, ok, 4, alpha=1),
        alignment_advantage(v, v, ok, 4, alpha=0.3),
        atol=1e-6,
    )
    summed = alignment_advantage(v, r, ok, 4, normalize="sum")
    assert (
        summed - alignment_advantage(v, r, ok, 4, alpha=1)
    ).abs().max() < 1e-3  # reasoning hardly varies
    assert alignment_advantage(r, r, ok, 4).abs().max() > 0.5
    assert alignment_advantage(r, r, ok, 4, std_floor=1e-3).abs().max() < 0.1
    for size in (1, 3):
        with pytest.raises(ValueError):
            alignment_advantage(v, r, ok, size)


@pytest.mark.parametrize("size", [2, 7, 8, 10, 12, 16, 24])
@pytest.mark.parametrize("normalize", ["span", "sum"])
def test_equal_scores_have_no_advantage(size, normalize):
    """0.2 is no binary fraction: a mean of 16 of them differs from it by a rounding."""
    score, ok = torch.full((size,), 0.2), torch.ones(size, dtype=torch.bool)
    advantage = alignment_advantage(score, score, ok, size, alpha=0.3, normalize=normalize)
    assert not advantage.any()


def test_any_number_of_spans():
    torch.manual_seed(0)
    scores, ok = torch.randn(3, 6), torch.tensor([True, True, False, True, True, True])
    one = [span_advantage(score[None], [1.0], ok, malformed_penalty=0.0) for score in scores]
    three = span_advantage(scores, [0.2, 0.3, 0.5], ok)
    near(three, 0.2 * one[0] + 0.3 * one[1] + 0.5 * one[2] - 1.5 * ~ok)


# ----------------------------------------------------------------------------- the discriminator


def disc(form="moe", seed=0, noise=0.3):
    torch.manual_seed(seed)
    d = Discriminator(tiny_hf(seed, packs=False).model, form, 4, 2, noise).eval()
    d.v_head[1].weight.data.normal_()
    for mlp in d.mlps:
        if mlp.gate is not None:
            mlp.gate.weight.data.normal_(0, 0.5)
    return d


def score(d, trees, budget=10**6):
    """{(tree, child): score}"""
    out = {}
    for part in plan(trees, budget):
        pack = build_pack(trees, part)
        out |= dict(zip(pack.children, d(pack)[0].tolist(), strict=True))
    return out


TEXTS = [[3, 4, 5, EOS], [7, 8, EOS], [9, 10, 11, 12, 13, 14, 15, 16, 17, 18, EOS], [3, 4, 5, EOS]]
KINDS = [PERCEPTION, REASONING, PERCEPTION, PERCEPTION]


@pytest.mark.parametrize("form", ["moe", "experts", "dense"])
def test_scores_do_not_depend_on_company(form):
    d = disc(form)
    hf = SimpleNamespace(model=d.model)
    prompts = [tiny_prompt(hf, 5, (1, 4, 4), 0), tiny_prompt(hf, 9, None, 1)]
    alone = [
        score(d, [Tree(p, [s], [k])])[0, 0]
        for p in prompts
        for s, k in zip(TEXTS, KINDS, strict=True)
    ]
    assert len({round(a, 4) for a in alone}) == 6  # they differ, but for the repeated span
    together = score(d, [Tree(p, TEXTS, KINDS) for p in prompts])
    near(list(together.values()), alone, atol=2e-6)
    near(
        [together[0, 0]], [together[0, 3]], atol=1e-6
    )  # identical text, identical score, wherever it stands
    for order in list(permutations(range(4)))[::7]:
        moved = score(d, [Tree(prompts[0], [TEXTS[i] for i in order], [KINDS[i] for i in order])])
        near([moved[0, order.index(i)] for i in range(4)], alone[:4], atol=2e-6)


def test_forms_differ_where_they_should():
    hf = SimpleNamespace(model=disc("experts").model)
    prompt = tiny_prompt(hf, 5)
    for form, differ in (("experts", True), ("moe", False), ("dense", False)):
        s = score(disc(form), [Tree(prompt, [TEXTS[0], TEXTS[0]], [PERCEPTION, REASONING])])
        assert (abs(s[0, 0] - s[0, 1]) > 1e-3) == differ, form


@pytest.mark.parametrize("form", ["moe", "experts"])
def test_upcycled_without_noise_is_dense(form):
    d, dense = disc(form, noise=0.0), disc("dense")
    d.v_head[1].weight.data[:] = dense.v_head[1].weight.data
    prompt = tiny_prompt(SimpleNamespace(model=dense.model), 5)
    trees = [Tree(prompt, TEXTS, KINDS)]
    near(list(score(d, trees).values()), list(score(dense, trees).values()), atol=1e-5)
    assert abs(score(disc(form, noise=0.3), trees)[0, 0] - score(dense, trees)[0, 0]) > 1e-4


def test_experts_reference():
    """The routed mixture against the definition, token by token."""
    d = disc()
    mlp, x = d.mlps[0], torch.randn(6, 32)
    y = mlp(x)
    for t in range(6):
        p = (mlp.gate.weight @ x[t]).softmax(0)
        top, at = p.topk(2)
        expected = 0
        for w, e in zip(top / top.sum(), at, strict=True):
            gate, up = (x[t] @ mlp.experts.gate_up_proj[e]).chunk(2)
            expected = expected + w * ((F.silu(gate) * up) @ mlp.experts.down_proj[e])
        near(y[t].detach(), expected.detach(), atol=1e-5)


def test_load_balance():
    """1 where balanced, E where one expert has all; 0 without routing."""
    even = torch.full((1, 2, 4), 0.25)
    near(load_balance(even, even), [1.0, 1.0])
    one = F.one_hot(torch.zeros(1, 2, dtype=torch.long), 4).float()
    near(load_balance(one, one), [4.0, 4.0])
    near(load_balance(torch.zeros(0, 2, 1), torch.zeros(0, 2, 1)), [0.0, 0.0])


def balance_of(d, trees):
    pack = build_pack(trees, plan(trees, 10**6)[0])
    _, probability, routed = d(pack)
    return load_balance(pack.mean_over_trees(routed), pack.mean_over_trees(probability))


@pytest.mark.parametrize("checkpointing", [False, True])
def test_load_balance_has_a_gradient(checkpointing):
    d = disc().train()
    if checkpointing:
        recompute(d.model)
    trees = [Tree(tiny_prompt(SimpleNamespace(model=d.model), 5), TEXTS, KINDS)]
    balance_of(d, trees).sum().backward()
    grads = torch.stack([mlp.gate.weight.grad for mlp in d.mlps])
    assert grads.abs().sum() > 0
    if checkpointing:
        plain = disc().train()
        balance_of(plain, trees).sum().backward()
        near(grads, torch.stack([mlp.gate.weight.grad for mlp in plain.mlps]), atol=1e-6)


def groups(d):
    """Three prompts with five, one and no well-formed rollouts."""
    hf = SimpleNamespace(model=d.model)
    reference = [[20, 21, EOS], [22, 23, 24, EOS]]
    spans = [[[3 + k, 4 + s, 5, EOS][: 3 + k % 2] + [EOS] for s in (0, 1)] for k in range(5)]
    prompts = (
        tiny_prompt(hf, 5, (1, 4, 4), 0),
        tiny_prompt(hf, 9, None, 1),
        tiny_prompt(hf, 4, None, 2),
    )
    chosen = spans, [None, spans[0]], [None, None]
    made = []
    for prompt, of_group in zip(prompts, chosen, strict=True):
        made.append(with_spans(Group(prompt, seen=prompt, reference=reference), of_group))
    return made


def test_discriminator_pass_is_the_written_loss():
    """One forward over packs against the formula, span by span; a group without well-formed
    rollouts takes no part."""
    d = disc()
    scored = groups(d)
    loss, load = discriminator_pass(d, scored, ARGS, "cpu")
    expected = 0.0
    squares = []
    for s in (0, 1):
        terms = []
        for group in scored[:2]:
            for k in group.well_formed.nonzero().flatten().tolist():
                spans = [group.reference[s], group.spans[k][s]]
                both = score(d, [Tree(group.prompt, spans, [s, s])])
                near([group.reference_score[s], group.score[s, k]], [both[0, 0], both[0, 1]], 2e-6)
                terms.append(F.softplus(torch.tensor(both[0, 1] - both[0, 0])))
                squares += [both[0, 0] ** 2, both[0, 1] ** 2]
        expected += float(sum(terms)) / len(terms)
    balance = 0.0
    for group, share in zip(scored[:2], (5 / 6, 1 / 6), strict=True):
        balance += share * balance_of(d, [spans_tree(group)]).item()
    near(loss, expected + 1e-3 * sum(squares) / len(squares) + 0.01 * balance, atol=1e-5)
    assert scored[1].score[:, 0].isnan().all() and not scored[1].score[:, 1].isnan().any()
    assert scored[2].score.isnan().all() and scored[2].reference_score.isnan().all()
    assert load.shape == (2, 2, 4)
    tokens = [sum(len(g.reference[s]) for g in scored[:2]) for s in (0, 1)]
    for s in (0, 1):
        tokens[s] += sum(
            len(g.spans[k][s]) for g in scored for k in g.well_formed.nonzero().flatten()
        )
    near(load.sum(2), [[tokens[0]] * 2, [tokens[1]] * 2], atol=1e-4)


@pytest.mark.parametrize("form", ["moe", "experts"])
def test_discriminator_pass_does_not_depend_on_packs(form):
    """A group that is split over packs gives the same loss, gradient, scores and load: of load
    balance too, which is per prompt."""
    whole, parts = disc(form), disc(form)
    args = SimpleNamespace(**vars(ARGS) | {"pack_tokens": 40})
    one, two = groups(whole), groups(parts)
    a, a_load = discriminator_pass(whole, one, ARGS, "cpu")
    b, b_load = discriminator_pass(parts, two, args, "cpu")
    near(a, b, atol=1e-6)
    near(a_load, b_load, atol=1e-4)
    split = plan([spans_tree(one[0])], 40)
    assert len(split) > 1 and all(cs[:2] == [0, 1] for pack in split for _, cs in pack)
    for x, y in zip(one[:2], two[:2], strict=True):
        torch.testing.assert_close(x.score, y.score, atol=1e-5, rtol=1e-5, equal_nan=True)
        near(x.reference_score, y.reference_score, atol=1e-5)
    for (name, p), q in zip(whole.named_parameters(), parts.named_parameters(), strict=True):
        if p.grad is not None:
            torch.testing.assert_close(
                p.grad, q[1].grad, atol=2e-6, rtol=1e-4, msg=lambda m, n=name: f"{n}: {m}"
            )


@pytest.mark.parametrize("form", ["moe", "experts", "dense"])
def test_saved_discriminator_scores_the_same(form, tmp_path):
    d = disc(form)
    save_discriminator(d, tmp_path / "none", tmp_path / "disc")
    again = load_discriminator(SimpleNamespace(disc=form, disc_path=tmp_path / "disc")).eval()
    trees = [Tree(tiny_prompt(SimpleNamespace(model=d.model), 5), TEXTS, KINDS)]
    assert list(score(d, trees).values()) == list(score(again, trees).values())
    with pytest.raises(ValueError, match="give --disc"):
        load_discriminator(SimpleNamespace(disc="other", disc_path=tmp_path / "disc"))
    config = json.loads((tmp_path / "disc/config.json").read_text())
    (tmp_path / "disc/config.json").write_text(
        json.dumps(config | {"transformers_version": "5.23.0"})
    )
    if form != "dense":
        with pytest.raises(ValueError, match="version 4"):
            load_discriminator(SimpleNamespace(disc=form, disc_path=tmp_path / "disc"))


# ----------------------------------------------------------------------------- spans and leaks


class Words:
    """An encoder of words, as data.Encoder.response: one function for both sides."""

    def response(self, text):
        return [2 + sum(map(ord, w)) % 40 for w in text.split()] + [EOS]


def test_white_space_gives_nothing_away():
    a = "<caption>\n- a red dot\n</caption>\n<think>\none\n</think>\n<answer>\n1\n</answer>"
    b = "  <caption>- a red dot</caption><think> one</think>\n\n\n<answer>1 </answer>\n"
    for table in (SPANS, WHOLE):
        assert encode_spans(Words(), a, table) == encode_spans(Words(), b, table)
        assert all(ids[-1] == EOS for ids in encode_spans(Words(), a, table))
    assert encode_spans(Words(), a + a, SPANS) is None


def test_leak_probe_is_at_chance_and_finds_a_planted_leak():
    g = torch.Generator().manual_seed(0)

    def text(n):
        return " ".join(str(int(x)) for x in torch.randint(0, 99, (n,), generator=g))

    prompts, sides = [], ([], [])
    for _ in range(60):
        prompt = torch.randint(2, 50, (8,), generator=g).tolist()
        for _ in range(4):
            prompts.append(prompt)
            for s, side in enumerate(sides):
                think = f"<think>{text(5 + 6 * s)}</think>"
                response = f"<caption>{text(9)}</caption>{think}<answer>{text(1)}</answer>"
                side.append(encode_spans(Words(), response, SPANS)[REASONING])
    assert abs(health.leak_probe(prompts, *sides) - 0.5) <= 0.05
    planted = [ids + [57] for ids in sides[1]]  # another end token on one side only
    assert health.leak_probe(prompts, sides[0], planted) > 0.95
