"""Packs equal separate rows under transformers' own forward, vision tower included."""

import copy
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from conftest import EOS, plain_logits, tiny_hf, tiny_prompt
from torch.nn.attention.flex_attention import flex_attention

from engine import attention, packs
from engine.attention import FlexLayout, adopt, forward_pack
from engine.logprob import token_logps
from engine.packs import Tree, build_pack, filler, plan
from engine.windows import blocks_of, depths
from model import recompute


def forest(hf):
    prompts = [
        tiny_prompt(hf, 5, (1, 4, 4), 0),
        tiny_prompt(hf, 9, None, 1),
        tiny_prompt(hf, 3, (1, 8, 4), 2),
    ]
    children = [
        [[3, 4, 5, EOS], [7], [9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20, EOS]],
        [[5, 6]],
        [],
    ]
    return [Tree(p, c) for p, c in zip(prompts, children, strict=True)]


def dense_mask(pack):
    """(T, T) bool: own segment and its ancestors, nothing ahead."""
    causal = torch.ones(len(pack.ids), len(pack.ids), dtype=torch.bool).tril()
    return causal & pack.sees()[pack.segment][:, pack.segment]


def whole(trees):
    return [(t, list(range(len(tree.children)))) for t, tree in enumerate(trees)]


@pytest.mark.parametrize("tied", [True, False])
def test_logits_equal_separate_rows(tied):
    hf = tiny_hf(tie_word_embeddings=tied)
    trees = forest(hf)
    pack = build_pack(trees, whole(trees))
    logits = hf.lm_head(forward_pack(hf.model, pack))
    for k, (t, c) in enumerate(pack.children):
        mine = pack.source[pack.sequence == k]
        ids = trees[t].children[c]
        expected = plain_logits(hf, trees[t].prompt, ids)[-len(ids) - 1 : -1]
        torch.testing.assert_close(logits[mine], expected, atol=1e-5, rtol=1e-5)
        assert pack.target[pack.sequence == k].tolist() == ids
        assert pack.ids[pack.ends[k]] == ids[-1]


def test_roots_equal_separate_rows(hf):
    trees = forest(hf)
    pack = build_pack(trees, whole(trees))
    logits = hf.lm_head(forward_pack(hf.model, pack))
    for s, tree in ((0, trees[0]), (4, trees[1]), (6, trees[2])):
        segment = pack.segments[s]
        mine = logits[segment.start : segment.start + segment.length]
        torch.testing.assert_close(mine, plain_logits(hf, tree.prompt, []), atol=1e-5, rtol=1e-5)


def test_gradients_equal_separate_rows(hf):
    trees = forest(hf)
    other = copy.deepcopy(hf)
    pack = build_pack(trees, whole(trees))
    weights = torch.linspace(-1, 1, len(pack.target))
    (
        token_logps(forward_pack(hf.model, pack)[pack.source], hf.lm_head.weight, pack.target)
        * weights
    ).sum().backward()
    for k, (t, c) in enumerate(pack.children):
        ids = trees[t].children[c]
        logps = plain_logits(other, trees[t].prompt, ids)[-len(ids) - 1 : -1].log_softmax(-1)
        (
            logps.gather(1, torch.tensor(ids)[:, None]).squeeze(1) * weights[pack.sequence == k]
        ).sum().backward()
    for (name, a), b in zip(hf.named_parameters(), other.parameters(), strict=True):
        if b.grad is not None:
            torch.testing.assert_close(
                a.grad, b.grad, atol=2e-5, rtol=1e-4, msg=lambda m, n=name: f"{n}: {m}"
            )


def test_gradient_checkpointing_changes_nothing(hf):
    trees = forest(hf)
    other = copy.deepcopy(hf).train()
    recompute(other)
    pack = build_pack(trees, whole(trees))
    for model in (hf, other):
        token_logps(
            forward_pack(model.model, pack)[pack.source], model.lm_head.weight, pack.target
        ).sum().backward()
    for a, b in zip(hf.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad)


def test_layout_is_the_dense_mask(hf):
    trees = forest(hf)
    pack = build_pack(trees, whole(trees), pad_to=64)  # with a tail
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, h, len(pack.ids), 8, generator=g) for h in (4, 2, 2))
    expected = F.scaled_dot_product_attention(
        q, k, v, attn_mask=dense_mask(pack), scale=0.3, enable_gqa=True
    )
    torch.testing.assert_close(
        pack.layout.attend(q, k, v, 0.3), expected.transpose(1, 2), atol=1e-6, rtol=1e-5
    )


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_flex_layout_is_the_dense_mask(hf, monkeypatch):
    """The CUDA layout, run without its compiled kernel."""
    monkeypatch.setattr(FlexLayout, "kernel", staticmethod(flex_attention))
    trees = forest(hf)
    pack = build_pack(trees, whole(trees), pad_to=128)
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, h, len(pack.ids), 16, generator=g) for h in (4, 2, 2))
    expected = F.scaled_dot_product_attention(
        q, k, v, attn_mask=dense_mask(pack), scale=0.3, enable_gqa=True
    )
    torch.testing.assert_close(
        FlexLayout(pack).attend(q, k, v, 0.3), expected.transpose(1, 2), atol=1e-5, rtol=1e-4
    )


def row_by_row(pack, trees, window):
    """(T, T) bool: each path as a row of its own, root and child, and then who sees whom in it."""
    seen = torch.zeros(len(pack.ids), len(pack.ids), dtype=torch.bool)
    for number, segment in enumerate(pack.segments):
        path = [pack.segments[n] for n in (*pack.ancestors(number), number)]
        places = [s.start + i for s in path for i in range(s.length)]
        of_image = [False] * len(places)
        if segment.tree < len(trees) and trees[segment.tree].prompt.blocks is not None:
            mask = trees[segment.tree].prompt.image_mask.tolist()
            of_image[: len(mask)] = mask
        for i, query in enumerate(places):
            for j, key in enumerate(places):
                one_image = all(of_image[min(i, j) : max(i, j) + 1])  # side by side
                if (j <= i or one_image) and (window is None or i - j < window):
                    seen[query, key] = True
    return seen


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("window", [None, 1, 4, 1000])
@pytest.mark.parametrize("both_ways", [False, True])
def test_windows_and_images_that_attend_both_ways(hf, monkeypatch, window, both_ways):
    """Both layouts compute what separate rows would."""
    monkeypatch.setattr(FlexLayout, "kernel", staticmethod(flex_attention))
    trees = forest(hf)
    for tree in trees[::2] if both_ways else ():  # the second prompt says nothing of images
        tree.prompt.blocks = blocks_of(tree.prompt.image_mask)
    pack = build_pack(trees, whole(trees), pad_to=128)
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, h, len(pack.ids), 16, generator=g) for h in (4, 2, 2))
    mask = row_by_row(pack, trees, window)
    expected = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=0.3, enable_gqa=True)
    for layout in (pack.layout, FlexLayout(pack)):
        found = layout.attend(q, k, v, 0.3, window)
        torch.testing.assert_close(found, expected.transpose(1, 2), atol=1e-5, rtol=1e-4)


def test_depths_are_counted_once_for_all_layers(hf, monkeypatch):
    """Of a token, how many come before it from the root through its child. On the CPU: no layer
    asks the device."""
    made = []

    def count(pack):
        made.append(depths(pack))
        return made[-1]

    monkeypatch.setattr(attention, "depths", count)
    trees = forest(hf)
    pack = build_pack(trees, whole(trees))
    depth = pack.layout.depth
    for segment in pack.segments:
        above = pack.segments[segment.parent].length if segment.parent >= 0 else 0
        own = depth[segment.start : segment.start + segment.length]
        assert own.tolist() == [*range(above, above + segment.length)]
    assert pack.layout.deepest == depth.max() and depth.dtype == torch.int32
    q, k, v = (torch.randn(1, 2, len(pack.ids), 8) for _ in "qkv")
    for window in (3, 4, 1000, None):
        pack.layout.attend(q, k, v, 0.3, window)
    assert len(made) == 1


def test_children_see_root_and_themselves_only(hf):
    trees = forest(hf)
    pack = build_pack(trees, whole(trees))
    mask = dense_mask(pack)
    root, first, _, third, other = pack.segments[:5]
    of_first = slice(first.start, first.start + first.length)
    of_third = slice(third.start, third.start + third.length)
    assert mask[of_first.stop - 1, : root.length].all()
    assert not mask[of_third, of_first].any()
    assert not mask[other.start, : third.start].any()  # another tree


def test_root_scored_by_mask(hf):
    prompt = tiny_prompt(hf, 8)
    mask = torch.zeros(len(prompt.ids), dtype=torch.bool)
    mask[-3:] = True
    pack = build_pack([Tree(prompt, mask=mask)], [(0, [])])
    assert pack.target.tolist() == prompt.ids[-3:].tolist()
    assert pack.source.tolist() == [len(prompt.ids) - 4 + i for i in range(3)]


def sizes(trees, packs):
    """Tokens of each planned pack."""
    found = []
    for pack in packs:
        roots = sum(len(trees[t].prompt.ids) for t, _ in pack)
        found.append(roots + sum(len(trees[t].children[c]) for t, cs in pack for c in cs))
    return found


def test_plan_splits_and_fills(hf):
    trees = forest(hf)
    root = len(trees[0].prompt.ids)
    parts = plan(trees, root + 14)
    seen = sorted((t, c) for part in parts for t, cs in part for c in cs)
    assert seen == [(0, 0), (0, 1), (0, 2), (1, 0)]
    assert {t for part in parts for t, _ in part} == {0, 1, 2}  # a root without children is run too
    assert max(sizes(trees, parts)) <= root + 14
    assert len(plan(trees, 10**6)) == 1 and plan(trees, 1) and parts == plan(trees, root + 14)


def of_lengths(prompt, lengths, shared=0):
    return Tree(SimpleNamespace(ids=torch.zeros(prompt)), [[0] * n for n in lengths], shared=shared)


@pytest.mark.parametrize("ranks", [1, 2, 3, 8])
def test_plan_evens_the_ranks_out(ranks):
    """The paper's shape, ragged: every child once, shared ones in each part, no pack too large, as
    many packs for each rank, and no rank with a tenth more than the mean."""
    g = torch.Generator().manual_seed(0)
    trees = []
    for mean in (300, 900, 1200, 2000):
        lengths = (mean * (torch.randn(16, generator=g) * 0.4).exp()).int().tolist()
        trees.append(of_lengths(500, [40, 60, *lengths], shared=2))
    packs = plan(trees, 16384, ranks)
    assert len(packs) % ranks == 0 and max(sizes(trees, packs)) <= 16384
    own = [(t, c) for pack in packs for t, cs in pack for c in cs[2:]]
    assert sorted(own) == [(t, c) for t in range(4) for c in range(2, 18)]
    assert all(cs[:2] == [0, 1] for pack in packs for _, cs in pack)
    tokens = sizes(trees, packs)
    of_rank = [sum(tokens[rank::ranks]) for rank in range(ranks)]
    assert max(of_rank) <= 1.1 * sum(of_rank) / ranks
    split_roots = sum(len(pack) for pack in packs) - len(trees)
    assert split_roots < len(packs)  # a tree is split only where a pack ends


def test_plan_of_little_and_of_much():
    nothing_to_split = [of_lengths(n, []) for n in (50, 10, 30, 7)]
    assert [sum(len(p) for p in plan(nothing_to_split, 60, ranks)) for ranks in (1, 3)] == [4, 4]
    assert plan([], 100, 3) == [] and plan([], 100) == []
    few = plan([of_lengths(5, [3, 3])], 100, 4)
    assert len(few) == 4 and sum(map(bool, few)) == 2  # two ranks get a filler
    long = plan([of_lengths(5, [500, 2, 2])], 100)
    assert sizes([of_lengths(5, [500, 2, 2])], long) == [9, 505]


def test_a_split_root_counts_once(hf):
    """`copies`: over all packs each token of a tree counts as one."""
    trees = [Tree(tiny_prompt(hf, 5), [[3, 4], [5, 6, 7], [8] * 6], [0, 1, 0], shared=1)]
    packs = plan(trees, 20)
    assert len(packs) > 1
    built = [build_pack(trees, part, copies={0: len(packs)}) for part in packs]
    assert sum((1 / pack.copies).sum() for pack in built) == pytest.approx(trees[0].tokens())
    assert all(pack.tree_tokens.tolist() == [trees[0].tokens()] for pack in built)
    parts = [pack.mean_over_trees(torch.ones(2, len(pack.ids), 3)) for pack in built]
    torch.testing.assert_close(sum(parts), torch.ones(2, 1, 3))
    assert filler("cpu").mean_over_trees(torch.ones(2, 2, 3)).shape == (2, 0, 3)


def test_a_filler_has_a_gradient_of_zeros(hf):
    pack = filler("cpu")
    hidden = forward_pack(hf.model, pack)[pack.source]
    logp = token_logps(hidden, hf.lm_head.weight, pack.target, coefficient=torch.zeros(0))
    assert logp.shape == (0,) and pack.rows(logp).shape == (0, 0)
    logp.sum().backward()
    assert all(p.grad is not None and not p.grad.any() for p in hf.parameters())


@pytest.mark.slow
def test_compiled_flex_attention_is_the_dense_mask_and_compiled_few_times(hf, monkeypatch):
    """The kernel that CUDA runs, compiled for this CPU: packs of every length after the third
    compile nothing anew."""
    kernel = torch.compile(flex_attention)
    monkeypatch.setattr(FlexLayout, "kernel", staticmethod(kernel))
    torch._dynamo.utils.counters.clear()
    for n in (5, 9, 20, 30, 40):
        trees = [
            Tree(tiny_prompt(hf, 5 + n, (1, 4, 4), 0), [[3] * k for k in range(2, 2 + n)]),
            *forest(hf),
        ]
        pack = build_pack(trees, whole(trees), pad_to=128)
        with torch.no_grad():
            expected, pack.layout = forward_pack(hf.model, pack), FlexLayout(pack)
            torch.testing.assert_close(forward_pack(hf.model, pack), expected, atol=1e-5, rtol=1e-4)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 3


# ----------------------------------------------------------------------------- the vision tower
GRIDS = [
    [(1, 4, 4)] * 3,
    [(1, 4, 4), (1, 8, 4), (1, 8, 4), (1, 4, 4), (1, 4, 8)],
    [(2, 4, 4), (1, 4, 4)],
]


@pytest.mark.parametrize("grids", GRIDS)
def test_vision_tower_equals_transformers_own(grids):
    """Images of one size at once, patches by a matrix product: same features, gradients and names
    of weights."""
    theirs, ours = tiny_hf(packs=False).model, adopt(tiny_hf(packs=False).model)
    assert type(ours.visual.patch_embed.proj) is not torch.nn.Conv3d
    assert {k: v.shape for k, v in theirs.state_dict().items()} == {
        k: v.shape for k, v in ours.state_dict().items()
    }
    grid = torch.tensor(grids)
    pixels = torch.randn(int(grid.prod(1).sum()), 96)
    found = []
    for visual in (theirs.visual, ours.visual):
        out = visual(pixels, grid_thw=grid)
        sum(
            (x * x.detach().cos()).sum() for x in (out.pooler_output, *out.deepstack_features)
        ).backward()
        found.append((out, {k: p.grad for k, p in visual.named_parameters()}))
    (a, a_grads), (b, b_grads) = found
    for x, y in zip(
        (a.pooler_output, *a.deepstack_features),
        (b.pooler_output, *b.deepstack_features),
        strict=True,
    ):
        torch.testing.assert_close(x, y, atol=1e-5, rtol=1e-5)
    for name, grad in a_grads.items():
        torch.testing.assert_close(grad, b_grads[name], atol=1e-3, rtol=1e-3)


def test_images_of_one_size_are_one_call(hf, monkeypatch):
    calls, sdpa = [], F.scaled_dot_product_attention
    monkeypatch.setattr(
        F,
        "scaled_dot_product_attention",
        lambda q, *x, **k: (calls.append(q.shape), sdpa(q, *x, **k))[1],
    )
    hf.model.visual(torch.randn(5 * 16, 96), grid_thw=torch.tensor([[1, 4, 4]] * 5))
    assert [shape[0] for shape in calls] == [5] * len(hf.model.visual.blocks)


def test_ranks_split_a_tree_that_fits(hf, monkeypatch):
    tree = Tree(tiny_prompt(hf), [[3] * 6, [4] * 6, [5] * 6, [6] * 6])
    assert not packs.is_split([tree], 1000)
    monkeypatch.setattr(packs, "world", lambda: 2)
    assert packs.is_split([tree], 1000)


def test_rows(hf):
    """Values of the scored tokens, a row for each child: from its first place on, 0 behind it."""
    tree = Tree(tiny_prompt(hf), [[5, 6], [7, 8, 9], [4]])
    pack = build_pack([tree], [(0, [0, 1, 2])])
    rows = pack.rows(torch.arange(1.0, 7.0))
    assert rows.tolist() == [[1, 2, 0], [3, 4, 5], [6, 0, 0]]
