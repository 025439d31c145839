"""
One step of the alignment game (stage 2), cell by cell, on what `bash runs/tiny.sh` leaves: each
tensor is printed with its shape and its meaning. It makes by hand what align.main does in a step.

    python docs/one_step.py > docs/one_step.md
"""

# %%
import sys
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import align  # noqa: E402
from data import SPANS, read  # noqa: E402
from engine.optimiser import optimizer, step_if_finite  # noqa: E402
from engine.packs import packs_of  # noqa: E402
from engine.rollouts import sampler_logps  # noqa: E402
from model import load  # noqa: E402

POLICY = "ckpt/sft"
DISCRIMINATOR = "out/tiny-0/align/warmup/last"  # after its warm-up, before the game
DATA = "data/tiny/align.jsonl"

for needed in (POLICY, DISCRIMINATOR, DATA):
    if not Path(needed).exists():
        sys.exit(f"{needed} is not there: `bash runs/tiny.sh` makes it")

torch.set_printoptions(precision=3, linewidth=96, threshold=60)


def heading(title, prose):
    print(f"## {title}\n\n{prose}\n")


def show(name, value, meaning):
    """Print a tensor, or any other value, with what it is."""
    text = str(value)
    if isinstance(value, torch.Tensor):
        value = value.detach()
        torch.set_printoptions(edgeitems=7 if value.ndim < 2 else 3, sci_mode=False)
        numbers = str(value).removeprefix("tensor(").removesuffix(")").replace("\n       ", "\n")
        kind = str(value.dtype).removeprefix("torch.")
        text = f"{kind} {tuple(value.shape)}\n{numbers}"
    print(f"**`{name}`** {meaning}\n\n```text\n{text}\n```\n")


print("# One step of the game, tensor by tensor\n")
print(
    "The output of [one_step.py](one_step.py), which has the code. N rollouts of a prompt, P pairs;"
)
print("of a pack T tokens, K children, S scored tokens, G trees; L layers, E experts.\n")

# %%
heading(
    "1. A row becomes a prompt",
    "`data.read` gives an `Example`, `Encoder.prompt` the ids, positions and patches that the "
    "model sees. The step has G = 2 prompts with N = 4 rollouts each; the first is shown.",
)
args = align.Args(
    policy=POLICY, data=DATA, prompts_per_step=2, group_size=4, max_response=128, lr=1.5e-4
)
policy = load(POLICY).train()
encoder = policy.encoder
disc = align.open_discriminator(DISCRIMINATOR).train()
data = read(DATA, "align")
groups = [align.new_group(data[row], encoder, encoder, args) for row in (0, 2)]
group = groups[0]
example = group.prompt.example

show("example.messages[-1]", example.messages[-1], "the user's turn")
show("example.response", example.response, "the reference y*, a demonstration")
words = encoder.tokenizer.convert_ids_to_tokens(group.prompt.ids.tolist())
show("words", " ".join(words), "the prompt's tokens; the image has one for each 2 x 2 patches")
show("prompt.ids", group.prompt.ids, "(T,) their ids")
show("prompt.positions", group.prompt.positions, "(3, T) rotary positions: time, height, width")
pixels = group.prompt.images["pixel_values"]
grid = group.prompt.images["image_grid_thw"]
show("prompt.images['pixel_values']", pixels, "the image's patches, flattened")
show("prompt.images['image_grid_thw']", grid, "the image in patches: time, height, width")

# %%
heading(
    "2. The policy samples rollouts",
    "`align.roll` samples N rollouts of each prompt at temperature 1, asks the verifier, and "
    "splits the well-formed ones into spans.",
)
align.roll(groups, policy.hf, encoder, args, seed=(args.seed, 0, 0))
for k, text in enumerate(group.texts):
    show(f"group.texts[{k}]", text, f"rollout {k}, {len(group.rollouts[k].ids)} tokens")
show("group.rollouts[0].ids", torch.tensor(group.rollouts[0].ids), "the ids of rollout 0")
show(
    "group.rollouts[0].logps",
    torch.tensor(group.rollouts[0].logps),
    "the log-prob of each id, as the sampler drew it",
)
show(
    "group.verdicts['accuracy']",
    group.verdicts["accuracy"],
    "(N,) the verifier's: a canary, never trained on",
)
show("group.well_formed", group.well_formed, "(N,) which rollouts have spans")

# %%
heading(
    "3. Spans, and the discriminator's pack",
    "Both sides' spans go through one function, `align.encode_spans`. The tree of a prompt has the "
    "reference's spans first, then those of each well-formed rollout. One pack holds both trees.",
)
show("group.reference", group.reference, f"the ids of the reference's spans: {', '.join(SPANS)}")
show("group.spans[0]", group.spans[0], "the ids of the spans of rollout 0")
trees = [align.spans_tree(group) for group in groups]
(pack,) = packs_of(trees, args.pack_tokens, "cpu")
alone = sum(len(tree.prompt.ids) + len(ids) for tree in trees for ids in tree.children)
show("len(pack.ids)", len(pack.ids), f"tokens T of the pack; {alone} with a row for each span")
show("pack.ids", pack.ids, "(T,) token ids, without padding")
show("pack.segment", pack.segment, "(T,) the segment of each token: prompts and spans")
show("pack.kind", pack.kind, "(T,) the number of the token's span; -1 in prompts")
show("pack.sees()", pack.sees().int(), "which segment attends to which: itself and its prompt")
show("pack.children", pack.children, "K pairs: (tree, place among its children)")
show("pack.ends", pack.ends, "(K,) the end token of each span, where its score is read")

# %%
heading(
    "4. Scores, pairs and the discriminator's loss",
    "One forward pass scores all spans. A pair is a span of a rollout and the reference's span of "
    "the same kind. This is what `align.discriminator_pass` does.",
)
raw, probability, routed = disc(pack)
show("raw", raw, "(K,) the raw score of each span")
show("probability[0]", probability[0], "(T, E) layer 0: the router's probability of each expert")
show("routed[0]", routed[0], "(T, E) layer 0: the token's share that each expert gets, top 2")
pairs = align.pairs_in(pack, groups)
ours = raw[pairs.row]
theirs = raw[pairs.reference_row]
show("pairs.span", torch.tensor(pairs.span), "(P,) the kind of each pair")
show("ours", ours, "(P,) D(x, y_i), the rollouts' spans")
show("theirs", theirs, "(P,) D(x, y*), the reference's spans")
rollouts = sum(int(group.well_formed.sum()) for group in groups)
show("loss of each pair", -F.logsigmoid(theirs - ours), "(P,) small where the reference is ahead")
bradley_terry = -F.logsigmoid(theirs - ours).sum() / rollouts
show("bradley_terry", bradley_terry, "summed over spans, mean over well-formed rollouts")
squares = args.score_l2 * ((ours**2 + theirs**2) / 2).sum() / rollouts / len(SPANS)
show("squares", squares, "1e-3 times the mean square of the raw scores")
f = pack.mean_over_trees(routed)
p = pack.mean_over_trees(probability)
show("align.load_balance(f, p)", align.load_balance(f, p), "(G,) 1 where the load is balanced")

# %%
heading(
    "5. The discriminator's update",
    "`align.discriminator_pass` makes the same forward pass and the gradients, and writes the "
    "scores of this very pass into the groups: they are the rewards.",
)
disc_opt = optimizer(disc, 5e-4, args.disc_weight_decay)
loss, load_of_experts = align.discriminator_pass(disc, groups, args, "cpu")
show("loss", round(loss, 4), "Bradley-Terry, squares and 0.01 times the load balance, together")
norm, skipped = step_if_finite(disc_opt, loss, args.grad_clip, "discriminator")
show("norm", round(norm, 4), "of the gradient, before it is clipped to 1")
show("group.reference_score", group.reference_score, f"(spans,) {', '.join(SPANS)}")
show("group.score", group.score, "(spans, N) of the rollouts, NaN where malformed")

# %%
heading(
    "6. The advantage",
    "Each span's scores are normalised within the group, then weighed: "
    "`align.span_advantage`. What is malformed gets the lowest score − 1, and 1.5 off.",
)
for name, score in zip(SPANS, group.score, strict=True):
    floored = align.floor_malformed(score, group.well_formed)
    everybody = torch.ones_like(group.well_formed)
    normalized = align.group_normalize(floored, everybody)
    show(f"GN({name})", normalized, "(N,) mean 0, standard deviation 1")
weights = list(align.span_weights(args.spans, args.alpha).values())
for each in groups:
    reward = each.score.clamp(-args.score_clip, args.score_clip)
    each.advantage = align.span_advantage(reward, weights, each.well_formed)
show("group.advantage", group.advantage, f"(N,) with weights {weights}")

# %%
heading(
    "7. The policy's update",
    "Now the children are the whole rollouts. On policy, the loss is −Σ A · log π / tokens; its "
    "coefficient is known before any log-prob is. This is `align.update_policy`.",
)
tokens = sum(group.tokens() for group in groups)
(pack,) = packs_of([group.tree() for group in groups], args.pack_tokens, "cpu")
show("pack.source", pack.source, "(S,) the token whose hidden state predicts ...")
show("pack.target", pack.target, "(S,) ... this id, ...")
show("pack.sequence", pack.sequence, "(S,) ... which belongs to this child (rollout)")
advantage = torch.stack([groups[g].advantage[k] for g, k in pack.children])
coefficient = (-advantage / tokens)[pack.sequence]
show("advantage", advantage, "(K,) of each rollout in the pack")
show("coefficient", coefficient, "(S,) d loss / d log-prob of each token")
logp = policy(pack, args.temperature, encoder.banned, coefficient=coefficient)
show("logp", logp, "(S,) log-probs under the policy")
difference = (logp.detach() - sampler_logps(pack, groups)).abs().max()
show("largest |logp − sampler's|", f"{difference:.1e}", "sampled as it is scored")
opt = optimizer(policy, args.lr, args.weight_decay)
loss = (coefficient * logp).sum()
loss.backward()
norm, skipped = step_if_finite(opt, loss, args.grad_clip, "policy")
show("norm", round(norm, 4), "of the gradient, before it is clipped to 1")

# %%
heading(
    "8. What it did",
    "The same rollouts under the updated policy: those with a positive advantage became likelier, "
    "the others less likely, as far as one small step and what they share allow.",
)
with torch.no_grad():
    after = policy(pack, args.temperature, encoder.banned)
change = torch.zeros(len(pack.children)).index_add(0, pack.sequence, after - logp.detach())
show("advantage", advantage, "(K,) again")
show("change", change, "(K,) of the log-prob of each whole rollout")
