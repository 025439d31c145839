"""
Groups of rollouts, which stages 2 and 3 share: sampled, verified, counted, and shown now and then.

Another reward goes into `verify`.    N rollouts of a prompt
"""

from __future__ import annotations

import base64
import io
from dataclasses import dataclass, field

import torch

from data import Prompt
from engine.packs import Tree
from engine.ranks import all_sum, print0
from engine.rows import open_image
from engine.sampler import Rollout, generate
from rewards import score


@dataclass
class Group:
    """A prompt's rollouts and what is known of them."""

    prompt: Prompt
    rollouts: list[Rollout]
    texts: list[str]
    scores: dict[str, torch.Tensor] = field(default_factory=dict)  # name -> (N,)
    advantage: torch.Tensor | None = None  # (N,)
    old_logp: list[torch.Tensor] | None = (
        None  # (T,) each, the trainer's, under the policy that sampled
    )

    def tree(self):
        return Tree(self.prompt, [r.ids for r in self.rollouts])


def sample(hf, encoder, prompts, numbers, args, seed) -> list[Group]:
    """`args.group_size` rollouts of each prompt."""
    rollouts = generate(
        hf,
        prompts,
        args.group_size,
        args.max_response,
        eos=encoder.eos_ids,
        banned=encoder.banned,
        seed=seed,
        temperature=args.temperature,
        numbers=numbers,
        slots=args.slots,
        pack_tokens=args.pack_tokens,
    )
    return [
        Group(p, g, [encoder.decode(r.ids) for r in g])
        for p, g in zip(prompts, rollouts, strict=True)
    ]


def verify(group):
    """Fill in accuracy, format and reward of a group (never trained on in stage 2: there they are a canary)."""
    example = group.prompt.example
    verdicts = [
        score(text, example.answer, example.choices, example.equivalent) for text in group.texts
    ]
    for name in ("accuracy", "format", "reward"):
        group.scores[name] = torch.tensor([v[name] for v in verdicts])


def rollout_metrics(groups):
    """What both stages report of the rollouts of a step, over all ranks (NaN: no rollouts)."""
    rollouts = [r for g in groups for r in g.rollouts]
    flat = {
        k: torch.cat([g.scores[k] for g in groups]) if groups else torch.zeros(0)
        for k in ("reward", "accuracy", "format")
    }
    sums = {k: float(v.sum()) for k, v in flat.items()} | {
        "length": sum(len(r.ids) for r in rollouts),
        "truncated": sum(r.stop == "length" for r in rollouts),
        "n": len(rollouts),
        "groups": len(groups),
        "informative": sum(bool(g.scores["reward"].std() > 0) for g in groups),
    }
    sums = all_sum(sums)
    n, groups = sums.pop("n") or float("nan"), sums.pop("groups") or float("nan")
    return {k: v / (groups if k == "informative" else n) for k, v in sums.items()}


def show_rollout(log, step, group, reference_scores=None):
    """Print a rollout with its scores, now and then: nothing finds mistakes faster. `log` keeps the whole group, for
    tools/report.py. reference_scores: {kind of span: the discriminator's raw score of the reference}."""
    columns, example = group.scores | {"advantage": group.advantage}, group.prompt.example
    rows = [
        {k: round(float(v[i]), 4) for k, v in columns.items()} for i in range(len(group.rollouts))
    ]
    print0(
        f"--- step {step}, {example.where}, answer {example.answer!r}\n{group.texts[0]}\n--- {rows[0]}"
    )
    log.rollouts(
        step,
        {
            "where": example.where,
            "question": example.messages[-1]["content"],
            "answer": example.answer,
            "reference": example.response,
            "reference_scores": reference_scores or {},
            "images": [_data_url(open_image(image, example.where)) for image in example.images],
            "rollouts": [
                {
                    "text": text,
                    "tokens": len(r.ids),
                    "stop": r.stop,
                    "advantage": row.pop("advantage"),
                    "scores": row,
                }
                for text, r, row in zip(group.texts, group.rollouts, rows, strict=True)
            ],
        },
    )


def _data_url(
    image, side=384
):  # scaled down to `side` pixels; small drawings exactly, the rest as JPEG
    image.thumbnail((side, side))
    form = "png" if image.width * image.height <= 200 * 200 else "jpeg"
    image.save(file := io.BytesIO(), form)
    return f"data:image/{form};base64,{base64.b64encode(file.getvalue()).decode()}"
