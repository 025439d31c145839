"""
Claim: a group in one pack costs a fraction of one row per rollout, since prompt and image are
computed once.

    python bench/packs.py                       # policy; prompt 1x and 3x the mean response
    python bench/packs.py --discriminator       # the spans of a group and of its reference
    python bench/packs.py --device cuda         # the 4B's shape, bfloat16 (discriminator: the 2B's)

Measured are forward and backward.
"""

import argparse
import copy
from collections.abc import Callable
from dataclasses import dataclass

import torch
from measure import clock, device_here, lengths, median, model, peak, prompt, report

from align import Discriminator, bradley_terry
from engine.attention import adopt, forward_pack
from engine.logprob import token_logps
from engine.packs import Tree, build_pack


@dataclass
class Contender:
    run: Callable[[], None]  # forward and backward
    model: torch.nn.Module  # whose parameters get the gradients

    def forget(self):
        for parameter in self.model.parameters():
            parameter.grad = None

    def step(self):
        self.forget()
        self.run()

    def gradient_norms(self):
        norms = {}
        for name, parameter in self.model.named_parameters():
            if parameter.grad is not None:
                norms[name] = parameter.grad.float().norm().item()
        return norms


def random_texts(hf, sizes, seed):
    """Token ids of texts of these sizes."""
    random = torch.Generator().manual_seed(seed)
    most = hf.config.text_config.vocab_size - 8
    return [torch.randint(3, most, (n,), generator=random).tolist() for n in sizes]


def one_pack(tree, device):
    """A tree with all its children as one pack."""
    return build_pack([tree], [(0, list(range(len(tree.children))))], device)


# -------------------------------------------------------------------------------------- the policy
class PolicyCase:
    """Log-probs of several responses to one prompt, in three ways, with the same loss."""

    def __init__(self, hf, root, rollouts, mean, device):
        self.theirs = hf
        self.ours = copy.deepcopy(hf)
        adopt(self.ours.model)
        self.root = root
        self.device = device
        self.texts = random_texts(hf, lengths(rollouts, mean), seed=1)
        sizes = [len(text) for text in self.texts]
        self.coefficient = torch.randn(sum(sizes), device=device)  # of each token in the loss
        self.coefficients = self.coefficient.split(sizes)

    def contenders(self):
        return {
            "rows": Contender(self.rows, self.theirs),
            "padded": Contender(self.padded, self.theirs),
            "packed": Contender(self.packed, self.ours),
        }

    def rows(self):
        """One row after the other."""
        for k, text in enumerate(self.texts):
            hidden = self.hidden_by_transformers([text])
            self.loss(hidden[0], k).backward()

    def padded(self):
        """All rows at once, padded to the longest."""
        hidden = self.hidden_by_transformers(self.texts)
        losses = [self.loss(hidden[k], k) for k in range(len(self.texts))]
        sum(losses).backward()

    def packed(self):
        pack = one_pack(Tree(self.root, self.texts), self.device)
        hidden = forward_pack(self.ours.model, pack)[pack.source]
        weight = self.ours.lm_head.weight
        logp = token_logps(hidden, weight, pack.target, coefficient=self.coefficient)
        (logp * self.coefficient).sum().backward()

    def hidden_by_transformers(self, texts):
        """Hidden states (rows, tokens, D) that predict the texts, by transformers' own forward."""
        whole = [torch.cat([self.root.ids, torch.tensor(text)]) for text in texts]
        kept = [torch.ones_like(row) for row in whole]
        ids = torch.nn.utils.rnn.pad_sequence(whole, batch_first=True).to(self.device)
        mask = torch.nn.utils.rnn.pad_sequence(kept, batch_first=True).to(self.device)
        pixels = self.root.images["pixel_values"].to(self.device, self.theirs.dtype)
        grid = self.root.images["image_grid_thw"].to(self.device)
        self.theirs.model.rope_deltas = None
        output = self.theirs.model(
            input_ids=ids,
            attention_mask=mask if len(texts) > 1 else None,
            mm_token_type_ids=(ids == self.theirs.config.image_token_id).int(),
            pixel_values=pixels.repeat(len(texts), 1),
            image_grid_thw=grid.repeat(len(texts), 1),
        )
        return output.last_hidden_state[:, len(self.root.ids) - 1 :]

    def loss(self, hidden, k):
        """Of the k-th text. The log-prob is ours for all: compared are the model's passes."""
        target = torch.tensor(self.texts[k], device=self.device)
        coefficient = self.coefficients[k]
        weight = self.theirs.lm_head.weight
        logp = token_logps(hidden[: len(target)], weight, target, coefficient=coefficient)
        return (logp * coefficient).sum()


# ------------------------------------------------------------------------------- the discriminator
class DiscriminatorCase:
    """Scores of the spans of responses and of the reference, in three ways, with the same loss.

    The texts are spans of two kinds in turn; the first two are the reference's.
    """

    def __init__(self, hf, root, rollouts, mean, device):
        disc = Discriminator(copy.deepcopy(hf.model), "moe", noise=0.01)
        self.disc = disc.to(device, hf.dtype)
        self.root = root
        self.device = device
        self.rollouts = rollouts
        sizes = [n // 2 for n in lengths(2 * (rollouts + 1), mean, seed=2)]
        self.texts = random_texts(hf, sizes, seed=1)
        self.kinds = [0, 1] * (rollouts + 1)

    def contenders(self):
        return {
            "rows, reference each time": Contender(self.rows_as_released, self.disc),
            "rows": Contender(self.rows, self.disc),
            "packed": Contender(self.packed, self.disc),
        }

    def rows_as_released(self):
        """A row for each span, and the reference's again for each rollout."""
        for k in range(2, len(self.texts)):
            bradley_terry(self.score(k % 2), self.score(k), self.rollouts).backward()

    def rows(self):
        """A row for each span, each once."""
        self.loss(torch.cat([self.score(k) for k in range(len(self.texts))])).backward()

    def packed(self):
        pack = one_pack(Tree(self.root, self.texts, self.kinds), self.device)
        self.loss(self.disc(pack)[0]).backward()

    def score(self, k):
        """Raw score (1,) of one span in a row of its own."""
        pack = one_pack(Tree(self.root, [self.texts[k]], [self.kinds[k]]), self.device)
        return self.disc(pack)[0]

    def loss(self, scores):
        """scores: (spans,)."""
        reference = scores[:2].repeat(self.rollouts)
        return bradley_terry(reference, scores[2:], self.rollouts)


# ------------------------------------------------------------------------------------- the measure
def check(contenders, tolerance):
    """All contenders give the same gradients."""
    norms = []
    for contender in contenders.values():
        contender.step()
        norms.append(contender.gradient_norms())
    first, *others = norms
    floor = 1e-6 * max(first.values())
    for other in others:
        for name, expected in first.items():
            difference = abs(other[name] - expected) / (expected + floor)
            assert difference < tolerance, (name, difference)


def image_side(tokens):
    """Patches on a side of the square image that comes next to so many tokens."""
    return min(range(2, 300, 2), key=lambda side: abs((side // 2) ** 2 - tokens))


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--device", type=device_here, default="cpu")
    parser.add_argument("--discriminator", action="store_true")
    parser.add_argument("--checkpointing", action="store_true")
    parser.add_argument("--rollouts", type=int, default=16)
    parser.add_argument("--response", type=int, help="mean length of a response, tokens")
    parser.add_argument("--repeat", type=int, default=5)
    args = parser.parse_args()
    cuda = args.device != "cpu"
    mean = args.response or (512 if cuda else 128)
    size = "small"
    if cuda:
        size = "2B" if args.discriminator else "4B"
    ratio = {}
    ratio_memory = {}
    seconds = {}
    tokens = {}
    for times in (1, 3):
        hf = model(size, args.device).train()
        side = image_side(0.75 * times * mean)  # three quarters of the prompt
        root = prompt(hf, times * mean - (side // 2) ** 2 - 2, side)
        case_of = DiscriminatorCase if args.discriminator else PolicyCase
        case = case_of(hf, root, args.rollouts, mean, args.device)
        contenders = case.contenders()
        if args.checkpointing:
            for contender in contenders.values():
                base = getattr(contender.model, "model", contender.model)
                base.gradient_checkpointing_enable({"use_reentrant": False})
        check(contenders, tolerance=0.2 if cuda else 5e-3)
        runs = {name: contender.step for name, contender in contenders.items()}
        key = f"prompt {times}x"
        found = clock(runs, args.device, args.repeat)
        seconds[key] = {name: median(values) for name, values in found.items()}
        memory = {}
        for name, contender in contenders.items():
            contender.forget()
            memory[name] = peak(contender.step, args.device)
        fastest = seconds[key]["packed"]
        ratio[key] = {name: value / fastest for name, value in seconds[key].items()}
        ratio_memory[key] = {name: value / memory["packed"] for name, value in memory.items()}
        others = [len(text) for text in case.texts]
        tokens[key] = {"prompt": len(root.ids), "others": others}
    report(
        "packs, discriminator" if args.discriminator else "packs, policy",
        ratio=ratio,
        ratio_memory=ratio_memory,
        seconds=seconds,
        tokens=tokens,
        size=size,
        checkpointing=args.checkpointing,
        device=args.device,
    )


if __name__ == "__main__":
    main()
