"""Stage 2: parity of loss and advantage, the discriminator's invariances, upcycling, load balance, spans."""

import json
from itertools import permutations
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from conftest import EOS, tiny_hf, tiny_prompt

from align import (
    PERCEPTION,
    REASONING,
    Discriminator,
    Item,
    alignment_advantage,
    bradley_terry,
    disc_pass,
    encode_spans,
    load_balance,
    load_discriminator,
    save_discriminator,
)
from engine import health
from engine.packs import Tree, make, plan
from model import recompute

CASES = json.loads((Path(__file__).parent / "reference.json").read_text())
ARGS = SimpleNamespace(pack_tokens=10**6, score_l2=1e-3, balance=0.01, score_clip=10.0, disc="moe")


def near(a, b, atol=1e-7):
    torch.testing.assert_close(
        torch.as_tensor(a).double(), torch.as_tensor(b).double(), rtol=1e-5, atol=atol
    )


# ------------------------------------------------------------------------------------------------ loss and advantage


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


# -------------------------------------------------------------------------------------------------- the discriminator


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
        pack = make(trees, part)
        out |= dict(zip(pack.children, d(pack)[0].tolist(), strict=True))
    return out


SPANS = [[3, 4, 5, EOS], [7, 8, EOS], [9, 10, 11, 12, 13, 14, 15, 16, 17, 18, EOS], [3, 4, 5, EOS]]
KINDS = [PERCEPTION, REASONING, PERCEPTION, PERCEPTION]


@pytest.mark.parametrize("form", ["moe", "experts", "dense"])
def test_scores_do_not_depend_on_company(form):
    d = disc(form)
    hf = SimpleNamespace(model=d.model)
    prompts = [tiny_prompt(hf, 5, (1, 4, 4), 0), tiny_prompt(hf, 9, None, 1)]
    alone = [
        score(d, [Tree(p, [s], [k])])[0, 0]
        for p in prompts
        for s, k in zip(SPANS, KINDS, strict=True)
    ]
    assert len({round(a, 4) for a in alone}) == 6  # they differ, but for the repeated span
    together = score(d, [Tree(p, SPANS, KINDS) for p in prompts])
    near(list(together.values()), alone, atol=2e-6)
    near(
        [together[0, 0]], [together[0, 3]], atol=1e-6
    )  # identical text, identical score, wherever it stands
    for order in list(permutations(range(4)))[::7]:
        moved = score(d, [Tree(prompts[0], [SPANS[i] for i in order], [KINDS[i] for i in order])])
        near([moved[0, order.index(i)] for i in range(4)], alone[:4], atol=2e-6)


def test_forms_differ_where_they_should():
    hf = SimpleNamespace(model=disc("experts").model)
    prompt = tiny_prompt(hf, 5)
    for form, differ in (("experts", True), ("moe", False), ("dense", False)):
        s = score(disc(form), [Tree(prompt, [SPANS[0], SPANS[0]], [PERCEPTION, REASONING])])
        assert (abs(s[0, 0] - s[0, 1]) > 1e-3) == differ, form


@pytest.mark.parametrize("form", ["moe", "experts"])
def test_upcycled_without_noise_is_dense(form):
    d, dense = disc(form, noise=0.0), disc("dense")
    d.v_head[1].weight.data[:] = dense.v_head[1].weight.data
    prompt = tiny_prompt(SimpleNamespace(model=dense.model), 5)
    trees = [Tree(prompt, SPANS, KINDS)]
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
    probs, tree = torch.full((6, 4), 0.25), torch.tensor([0, 0, 0, 0, 1, 1])
    near(load_balance(probs, probs, tree, 2), [1.0, 1.0])
    one = F.one_hot(torch.zeros(6, dtype=torch.long), 4).float()
    near(load_balance(one, one, tree, 2), [4.0, 4.0])


@pytest.mark.parametrize("checkpointing", [False, True])
def test_load_balance_has_a_gradient(checkpointing):
    d = disc().train()
    if checkpointing:
        recompute(d.model)
    trees = [Tree(tiny_prompt(SimpleNamespace(model=d.model), 5), SPANS, KINDS)]
    d(make(trees, plan(trees, 10**6)[0]))[1].sum().backward()
    grads = torch.stack([mlp.gate.weight.grad for mlp in d.mlps])
    assert grads.abs().sum() > 0
    if checkpointing:
        plain = disc().train()
        plain(make(trees, plan(trees, 10**6)[0]))[1].sum().backward()
        near(grads, torch.stack([mlp.gate.weight.grad for mlp in plain.mlps]), atol=1e-6)


def items(d):
    hf = SimpleNamespace(model=d.model)
    reference = {PERCEPTION: [20, 21, EOS], REASONING: [22, 23, 24, EOS]}
    rows = [
        (k, kind, [3 + k, 4 + kind, 5, EOS][: 3 + k % 2] + [EOS])
        for k in range(5)
        for kind in (0, 1)
    ]
    prompts = (
        tiny_prompt(hf, 5, (1, 4, 4), 0),
        tiny_prompt(hf, 9, None, 1),
        tiny_prompt(hf, 4, None, 2),
    )
    return [
        Item(p, p, reference, mine) for p, mine in zip(prompts, (rows, rows[:2], []), strict=True)
    ]


def test_disc_pass_is_the_written_loss():
    """One forward over packs against the formula, span by span; a group without well-formed rollouts takes no part."""
    d = disc()
    scored = items(d)
    loss, load = disc_pass(d, scored, ARGS, "cpu", scored[0])
    expected, squares = 0.0, []
    for kind in (0, 1):
        terms = []
        for item in scored[:2]:
            for k, _, ids in (s for s in item.policy if s[1] == kind):
                both = score(d, [Tree(item.prompt, [item.reference[kind], ids], [kind, kind])])
                near(
                    [item.score[kind][None], item.score[kind][k]],
                    [both[0, 0], both[0, 1]],
                    atol=2e-6,
                )
                terms.append(F.softplus(torch.tensor(both[0, 1] - both[0, 0])))
                squares += [both[0, 0] ** 2, both[0, 1] ** 2]
        expected += float(sum(terms)) / len(terms)
    balance = 0.0
    for item, share in zip(items(d)[:2], (10 / 12, 2 / 12), strict=False):
        tree = item.tree()
        balance += share * d(make([tree], plan([tree], 10**6)[0]))[1].item()
    near(loss, expected + 1e-3 * sum(squares) / len(squares) + 0.01 * balance, atol=1e-5)
    assert scored[2].score == {} and load.shape == (2, 2, 4) and load[PERCEPTION].sum() > 0


def test_disc_pass_gradient_does_not_depend_on_packs():
    whole, parts = disc(), disc()
    args = SimpleNamespace(**vars(ARGS) | {"pack_tokens": 40, "balance": 0.0})
    a, _ = disc_pass(
        whole,
        items(whole),
        SimpleNamespace(**vars(ARGS) | {"balance": 0.0}),
        "cpu",
        items(whole)[0],
    )
    b, _ = disc_pass(parts, items(parts), args, "cpu", items(parts)[0])
    near(a, b, atol=1e-6)
    split = plan([items(parts)[0].tree()], 40)
    assert len(split) > 1 and all(
        cs[:2] == [0, 1] for part in split for _, cs in part
    )  # the references in each part
    for (name, p), q in zip(whole.named_parameters(), parts.parameters(), strict=True):
        if p.grad is not None:
            torch.testing.assert_close(
                p.grad, q.grad, atol=2e-6, rtol=1e-4, msg=lambda m, n=name: f"{n}: {m}"
            )


@pytest.mark.parametrize("form", ["moe", "experts", "dense"])
def test_saved_discriminator_scores_the_same(form, tmp_path):
    d = disc(form)
    save_discriminator(d, tmp_path / "none", tmp_path / "disc")
    again = load_discriminator(SimpleNamespace(disc=form, disc_path=tmp_path / "disc")).eval()
    trees = [Tree(tiny_prompt(SimpleNamespace(model=d.model), 5), SPANS, KINDS)]
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


# -------------------------------------------------------------------------------------------------- spans and leaks


class Words:
    """An encoder of words, as data.Encoder.response: one function for both sides."""

    def response(self, text):
        return [2 + sum(map(ord, w)) % 40 for w in text.split()] + [EOS]


def test_white_space_gives_nothing_away():
    a = "<caption>\n- a red dot\n</caption>\n<think>\none\n</think>\n<answer>\n1\n</answer>"
    b = "  <caption>- a red dot</caption><think> one</think>\n\n\n<answer>1 </answer>\n"
    for spans in ("both", "whole"):
        assert encode_spans(Words(), a, spans) == encode_spans(Words(), b, spans)
        assert all(ids[-1] == EOS for ids in encode_spans(Words(), a, spans).values())
    assert encode_spans(Words(), a + a, "both") is None


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
                response = f"<caption>{text(9)}</caption><think>{text(5 + 6 * s)}</think><answer>{text(1)}</answer>"
                side.append(encode_spans(Words(), response, "both")[REASONING])
    assert abs(health.leak_probe(prompts, *sides) - 0.5) <= 0.05
    planted = [ids + [57] for ids in sides[1]]  # another end token on one side only
    assert health.leak_probe(prompts, sides[0], planted) > 0.95
