"""
Groups of rollouts, for stages 2 and 3: sampled, counted, and shown now and then.

The rows of all groups are dealt out over the ranks one by one, not group by group, so that no rank
idles where there are fewer prompts than ranks. What comes of them (ids, log-probs, texts, verdicts:
small) is gathered: every rank then holds every group, and what follows is plain code on the same
data everywhere.

    N rollouts of a prompt   T tokens of a rollout   S scored tokens of a pack
"""

from __future__ import annotations

import base64
import io
from dataclasses import dataclass, field

import torch

from engine.packs import Tree
from engine.ranks import gather, print0, rank, world
from engine.rows import open_image
from engine.sampler import Rollout, all_rows, generate
from engine.workers import Workers


@dataclass
class Group:
    """A prompt, its rollouts, and all that a step learns of them, from the draw to the log."""

    prompt: object  # data.Prompt
    rollouts: list[Rollout] = field(default_factory=list)  # N
    texts: list[str] = field(default_factory=list)  # N
    # (N,) each: accuracy, format, reward, and whatever else rewards.score returns
    verdicts: dict[str, torch.Tensor] = field(default_factory=dict)
    advantage: torch.Tensor | None = None  # (N,)
    old_logp: list[torch.Tensor] | None = None  # N of (T,): the trainer's, when they were sampled
    ref_logp: list[torch.Tensor] | None = None  # N of (T,): the start policy's, for the KL term

    # Stage 2. Spans stand in the order of the table of spans.
    seen: object = None  # the prompt as the discriminator sees it
    reference: list[list[int]] = field(default_factory=list)  # ids of each of the reference's spans
    # for each rollout the ids of each span; None: malformed
    spans: list[list[list[int]] | None] = field(default_factory=list)
    well_formed: torch.Tensor | None = None  # (N,) bool
    reference_score: torch.Tensor | None = None  # (spans,) raw scores
    score: torch.Tensor | None = None  # (spans, N) raw scores, NaN where malformed

    def tree(self):
        """What the policy reads: the prompt, continued by the rollouts."""
        return Tree(self.prompt, [rollout.ids for rollout in self.rollouts])

    def tokens(self):
        return sum(len(rollout.ids) for rollout in self.rollouts)


def sample_groups(hf, encoder, groups, verify, args, seed):
    """Sample args.group_size rollouts of each group's prompt from the transformers model `hf`, and
    fill in their texts and verdicts. All ranks call it with the same groups.

    verify(text, example) -> {name: number}; with args.workers threads it is called for rollouts
    that have ended while others are still sampled. seed: ints that name this call (the run's seed,
    the step, the draw): the same rollouts come out on any number of ranks.
    """
    rows = all_rows(groups, args.group_size)  # (group, k)
    mine = rows[rank() :: world()]
    workers = Workers(args.workers)
    jobs = {}  # number of a row -> the Job that reads and verifies its rollout

    def begin(row, rollout):
        g, _ = mine[row]
        example = groups[g].prompt.example
        jobs[row] = workers.begin(read_and_verify, rollout, example, encoder, verify)

    rollouts = generate(
        hf,
        [group.prompt for group in groups],
        mine,
        args.max_response,
        eos=encoder.eos_ids,
        banned=encoder.banned,
        temperature=args.temperature,
        seeds=[(*seed, number) for number in range(len(groups))],
        slots=args.slots,
        pack_tokens=args.pack_tokens,
        on_end=begin,
    )
    found = []
    for row, (g, k) in enumerate(mine):
        text, verdict = jobs[row].result()
        found.append((g, k, rollouts[row], text, verdict))
    everywhere = sorted((row for part in gather(found) for row in part), key=lambda row: row[:2])
    for g, group in enumerate(groups):
        of_group = everywhere[g * args.group_size : (g + 1) * args.group_size]
        group.rollouts = [rollout for _, _, rollout, _, _ in of_group]
        group.texts = [text for _, _, _, text, _ in of_group]
        verdicts = [verdict for _, _, _, _, verdict in of_group]
        for name in verdicts[0]:
            group.verdicts[name] = torch.tensor([verdict[name] for verdict in verdicts])


def read_and_verify(rollout, example, encoder, verify):
    """(text, verdict) of a rollout."""
    text = encoder.decode(rollout.ids)
    try:
        return text, verify(text, example)
    except Exception as error:
        error.add_note(f"of a response to {example.where}: {text!r}")
        raise


def sampler_logps(pack, groups):
    """The sampler's own log-probs (S,) of the scored tokens of a pack of groups' trees."""
    logps = []
    for g, k in pack.children:
        logps.extend(groups[g].rollouts[k].logps)
    return torch.tensor(logps, device=pack.ids.device)


def rollout_metrics(groups):
    """What stages 2 and 3 log of a step's rollouts: the mean of each verdict, and more."""
    rollouts = [rollout for group in groups for rollout in group.rollouts]
    metrics = {}
    for name in groups[0].verdicts:
        metrics[name] = _mean([float(x) for group in groups for x in group.verdicts[name]])
    metrics["length"] = _mean([len(rollout.ids) for rollout in rollouts])
    metrics["truncated"] = _mean([rollout.stop == "length" for rollout in rollouts])
    rewards = [group.verdicts["reward"] for group in groups]
    metrics["informative"] = _mean([bool(reward.max() > reward.min()) for reward in rewards])
    return metrics


def _mean(values):
    return sum(values) / len(values) if values else float("nan")


# ----------------------------------------------------------------------------- to be looked at
def show_rollouts(log, step, group, scores, reference_scores=None):
    """Print one rollout of `group` with its scores: nothing finds mistakes faster. `log` keeps the
    whole group, for tools/report.py.

    scores: {name: (N,)}. reference_scores: {name: the reference's score}.
    """
    example = group.prompt.example
    rollouts = []
    for k, rollout in enumerate(group.rollouts):
        rollouts.append(
            {
                "text": group.texts[k],
                "tokens": len(rollout.ids),
                "stop": rollout.stop,
                "advantage": round(float(group.advantage[k]), 4),
                "scores": {name: round(float(score[k]), 4) for name, score in scores.items()},
            }
        )
    first = rollouts[0]
    print0(f"--- step {step}, {example.where}, answer {example.answer!r}")
    print0(first["text"])
    print0("---", first["scores"] | {"advantage": first["advantage"]})
    images = [_data_url(open_image(image, example.where)) for image in example.images]
    log.rollouts(
        step,
        {
            "where": example.where,
            "question": example.messages[-1]["content"],
            "answer": example.answer,
            "reference": example.response,
            "reference_scores": reference_scores or {},
            "images": images,
            "rollouts": rollouts,
        },
    )


def _data_url(image, side=384):
    """The image, at most `side` pixels wide and high, as a URL; small drawings exactly, the rest as
    JPEG."""
    image.thumbnail((side, side))
    form = "png" if image.width * image.height <= 200 * 200 else "jpeg"
    file = io.BytesIO()
    image.save(file, form)
    return f"data:image/{form};base64,{base64.b64encode(file.getvalue()).decode()}"
