"""
Claim: the verifier is off the path. Rollouts that have ended are verified while others are sampled.

    python bench/verifier_path.py ../shared/data/verifier/cases.jsonl

A GRPO step of 32 prompts x 16 rollouts with LaTeX answers: sampling and verifying, advantages, the
policy's update. The sampler and the update are those of stage 3, on a 2-layer model with random
weights, whose rollouts have geometric lengths of mean 32. Random weights write no formulas: for
each rollout stands an answer to its prompt, drawn by its ids. Each prompt's reference is the LaTeX
of a case; its 16 answers are 4 times the case's own and 12 of other cases, as a group of right and
wrong rollouts has them. The verifier is the real one, with algebra (the extra `math`), and
remembers nothing from one step to the next.

Contenders in turn: without threads (verified when all are sampled), with 2 and 4, and with a
verdict that costs nothing, which no verifier can beat.
"""

import argparse
import json
import random
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import torch
from measure import ROOT, median, model, prompt, report

sys.path.insert(0, str(ROOT / "tests"))
from verifier_table import comparable  # noqa: E402

import rlvr  # noqa: E402
from data import Example  # noqa: E402
from engine import math_worker, rollouts  # noqa: E402
from engine.attention import adopt  # noqa: E402
from engine.optimiser import optimizer  # noqa: E402
from engine.ranks import setup  # noqa: E402
from engine.rollouts import Group, sample_groups  # noqa: E402
from engine.sampler import generate  # noqa: E402
from model import Policy  # noqa: E402
from rewards import verify  # noqa: E402

FORM = "<caption>\na drawing\n</caption>\n<think>\nso\n</think>\n<answer>\n{}\n</answer>"
PROMPTS = 32
N = 16  # rollouts of each
RIGHT = 4  # of them, as the case has it
MEAN = 32  # tokens of a rollout


def examples(cases, seed=0):
    """An Example of each of PROMPTS cases whose reference is LaTeX; `written`: its N answers."""
    rows = [json.loads(line) for line in Path(cases).read_text(encoding="utf-8").splitlines()]
    latex = [row for row in rows if comparable(row) and "\\" in row["gold"]]
    own = {}
    for row in latex:
        own.setdefault(row["gold"], row["pred"])
    draw = random.Random(seed)
    found = []
    for gold in draw.sample(sorted(own), PROMPTS):
        others = draw.sample([pred for each, pred in own.items() if each != gold], N - RIGHT)
        example = Example(messages=[], images=[], answer=gold)
        example.written = [own[gold]] * RIGHT + others
        found.append(example)
    return found


def real(text, example):
    """The verdict on the answer that stands for a rollout's text."""
    ids = [int(each) for each in text.split()]
    return verify(FORM.format(example.written[sum(ids) % N]), example)


def free(text, example):
    return {"accuracy": 0.0, "format": 1.0, "reward": float(len(text) % 2)}


class Step:
    """The same step again and again, each time with new rollouts."""

    def __init__(self, cases):
        hf = model("small", layers=2).train()
        adopt(hf.model)
        vocabulary = hf.config.text_config.vocab_size
        ends = (vocabulary - 8) // MEAN  # random weights end nowhere: so many ids are end tokens
        self.encoder = SimpleNamespace(
            eos_ids=tuple(range(3, 3 + ends)),
            banned=tuple(range(vocabulary - 8, vocabulary)),  # marks of images among them
            decode=lambda ids: " ".join(map(str, ids)),
        )
        self.policy = Policy(hf, self.encoder, source="")
        self.opt = optimizer(self.policy, 0.0, 0.0)  # the same rollouts for all contenders
        self.prompts = []
        for seed, example in enumerate(examples(cases)):
            made = prompt(hf, text=48, side=8, seed=seed)
            made.example = example
            self.prompts.append(made)
        self.number = 0
        rollouts.generate = self.generate

    def generate(self, *args, **options):
        found = generate(*args, **options)
        self.ended = time.perf_counter()  # the last rollout
        return found

    def run(self, workers, verdict):
        """{part: seconds}"""
        math_worker._verdicts.clear()
        args = rlvr.Args(
            policy="none",
            data="none",
            workers=workers,
            group_size=N,
            max_response=8 * MEAN,
            overlong=0,
            slots=128,
            device="cpu",
        )
        groups = [Group(each) for each in self.prompts]
        begin = time.perf_counter()
        sample_groups(self.policy.hf, self.encoder, groups, verdict, args, (0, self.number))
        verified = time.perf_counter()
        for group in groups:
            group.advantage = rlvr.group_advantage(group.verdicts["reward"], N)
        rlvr.update_policy(self.policy, self.opt, groups, args, "cpu")
        end = time.perf_counter()
        self.tokens = sum(group.tokens() for group in groups)
        self.verdicts = torch.stack([group.verdicts["accuracy"] for group in groups]).tolist()
        return {
            "sampling": self.ended - begin,
            "verifying behind it": verified - self.ended,
            "update": end - verified,
            "step": end - begin,
        }


def verifier_alone(step):
    """(seconds of all verdicts one after the other, questions to algebra)"""
    math_worker._verdicts.clear()
    asked = 0
    plain = math_worker.exchange

    def exchange(*question):
        nonlocal asked
        asked += 1
        return plain(*question)

    math_worker.exchange = exchange
    begin = time.perf_counter()
    for each in step.prompts:
        for k in range(N):
            real(str(k), each.example)
    math_worker.exchange = plain
    return time.perf_counter() - begin, asked


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("cases", help="JSONL of {pred, gold, expected, kind, policy?}")
    parser.add_argument("--repeat", type=int, default=5)
    flags = parser.parse_args()
    torch.set_num_threads(1)
    setup(SimpleNamespace(device="cpu", seed=0))
    step = Step(flags.cases)
    contenders = {
        "without threads": (0, real),
        "2 workers": (2, real),
        "4 workers": (4, real),
        "a verdict that costs nothing": (0, free),
    }
    seconds = {name: {} for name in contenders}
    for number in range(flags.repeat + 1):
        step.number = number
        for name, (workers, verdict) in contenders.items():
            found = step.run(workers, verdict)
            if workers == 0 and verdict is real:
                expected = step.verdicts
            assert verdict is free or step.verdicts == expected, "threads change a verdict"
            if number:  # the first is a warm-up
                for part, value in found.items():
                    seconds[name].setdefault(part, []).append(value)
    alone, asked = verifier_alone(step)
    medians = {}
    for name, parts in seconds.items():
        medians[name] = {part: [median(v), min(v), max(v)] for part, v in parts.items()}
    plain = medians["without threads"]["step"][0]
    ratio = {name: plain / parts["step"][0] for name, parts in medians.items()}
    report(
        "verifier off the path",
        ratio_of_the_step=ratio,
        seconds=medians,
        verifier_alone=alone,
        questions_to_algebra=asked,
        rollouts=PROMPTS * N,
        tokens=step.tokens,
    )


if __name__ == "__main__":
    main()
