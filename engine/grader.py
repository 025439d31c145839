"""
A judge: a model behind an API that says whether an answer means what the reference means, where
rules cannot (eval.py --judge).

It is shown the question's text, the reference and the answer; no picture, and none of the reasoning
that led to the answer. It may say one of two words. Whatever else it says is no verdict: it is
asked again (--retries), counted, and left without an effect.
"""

from __future__ import annotations

import hashlib
import json
import random
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

from engine.api import Api, Unanswered
from engine.progress import progress

PROMPT = """\
You compare an answer to a question about images, which you do not see, with the reference answer.
The reference is right: do not solve the question yourself.
Reply with one word only:
same - the answer means what the reference means, in other words, spelling, units or form;
different - it means something else, is vaguer, hedges, or gives several answers where the
reference gives one."""
VERDICT = r"(?i)\W*(same|different)\W*"  # the form of the judge's answer


@dataclass(frozen=True)
class Claim:
    """That an answer is right, which a judge can confirm."""

    question: str
    references: tuple[str, ...]  # each as good as the others
    choices: tuple[str, ...]  # the options' texts, in order; (): it has none
    answer: str

    def messages(self):
        lines = [f"Question: {self.question}"]
        if self.choices:
            options = [f"({chr(65 + i)}) {text}" for i, text in enumerate(self.choices)]
            lines.append(f"Options: {' '.join(options)}")
        lines.append(f"Reference: {' or '.join(self.references)}")
        lines.append(f"Answer: {self.answer}")
        return [
            {"role": "system", "content": PROMPT},
            {"role": "user", "content": "\n\n".join(lines)},
        ]

    def digest(self):
        """Its name in the file of answers. Another prompt asks something else."""
        text = json.dumps([PROMPT, asdict(self)])
        return hashlib.sha256(text.encode()).hexdigest()[:32]


def claim_of(example, answer):
    """The Claim that `answer` is right for an example."""
    turns = [turn["content"] for turn in example.messages if turn["role"] == "user"]
    question = "\n".join(turns).replace("<image>", "").strip()
    return Claim(question, (example.answer, *example.equivalent), tuple(example.choices), answer)


TRIAL = Claim("Which colour is the car?", ("grey",), (), "It is gray.")


class Grader:
    """The judge args.judge, whose verdicts args.judge_cache keeps."""

    def __init__(self, args):
        """Raises SystemExit where another run writes to the cache."""
        self.model = args.judge
        self.concurrency = args.concurrency
        self.fault = ""  # why the API was given up, if it was
        path = Path(args.judge_cache)
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            self.api = Api(args, path)
        except BlockingIOError:
            mend = "wait for it, or give this one a --judge_cache of its own"
            raise SystemExit(f"{path}: another run writes to it; {mend}") from None

    def try_out(self):
        """Ask for one verdict, known or not. Raises SystemExit where none comes: better before the
        responses are sampled than after."""
        try:
            self.ask(TRIAL, again=True)
        except Unanswered as error:
            raise SystemExit(
                f"--judge {self.model}: {error} to a trial question: {error.reply.text[:500]}"
            ) from None

    def ask(self, claim, again=False):
        """Whether the judge confirms a claim."""
        of = (claim.digest(), self.model, 0)
        return self.api.ask(of, claim.messages, VERDICT, again).lower() == "same"

    def verdicts(self, claims):
        """{claim: True, False, or None where the judge gave no verdict}, each asked once.

        Where the API fails for all, `fault` says how, and the rest has none.
        """
        asked = list(dict.fromkeys(claims))
        with ThreadPoolExecutor(self.concurrency) as pool:
            try:
                futures = [pool.submit(self.verdict, claim) for claim in asked]
                found = [future.result() for future in progress(futures, "judging", "answer")]
            except KeyboardInterrupt:  # no thread waits for a retry, or asks once more
                self.api.stopped.set()
                raise
        return dict(zip(asked, found, strict=True))

    def verdict(self, claim):
        if self.api.stopped.is_set():
            return None
        try:
            return self.ask(claim)
        except Unanswered:  # counted by the API
            return None
        except SystemExit as end:
            self.fault = str(end)
            return None


OUTCOMES = {  # (right by the rules, right by the judge) -> its name
    (True, True): "both right",
    (False, False): "both wrong",
    (True, False): "rules alone",
    (False, True): "judge alone",
}


def agreement(pairs, grader, most, seed):
    """How far judge and rules agree where the rules decide, on `most` claims of `pairs`.

    pairs: {claim: whether it is right by the rules}. Returns the counts, and their share `agree`
    of all verdicts (NaN without any).
    """
    drawn = random.Random(seed).sample(list(pairs), min(most, len(pairs)))
    counts = dict.fromkeys(OUTCOMES.values(), 0)
    no_verdict = 0
    for claim, judged in grader.verdicts(drawn).items():
        if judged is None:
            no_verdict += 1
        else:
            counts[OUTCOMES[pairs[claim], judged]] += 1
    decided = sum(counts.values())
    agreed = counts["both right"] + counts["both wrong"]
    share = agreed / decided if decided else float("nan")
    return {"agree": share, **counts, "no verdict": no_verdict}
