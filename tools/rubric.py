"""
RLVR with a rubric as the reward, scored by rule: the rival of 2026 in the discriminator's place,
for the comparison on the embedded worlds (runs/miniature.sh). Rubric-based On-policy Distillation
(arXiv 2605.07396) has a teacher write a rubric for each prompt, and a judge score rollouts by it.
Here the reference itself is the rubric and a rule the judge.

    python tools/rubric.py --policy ckpt/sft --data data/tiny/align.jsonl --out out/rubric ..

The flags are those of rlvr.py; the rows are alignment's, with references. A well-formed response
gets the mean of three shares, a malformed one 0:

    caption     items that are in the reference's caption, too, of all items in either
    reasoning   steps that are in the reference's, too, of all steps in either
    answer      1 where the verifier takes it for the reference's, else 0

So the judge never errs and sees what the reference says word by word: an upper bound of what a
rubric may give where references are one function of the picture, and a matter of luck where a
teacher may choose among words.
"""

import sys
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import rlvr  # noqa: E402
from data import parts  # noqa: E402
from engine.arguments import parse  # noqa: E402
from engine.rows import BadRow  # noqa: E402
from rewards import verify  # noqa: E402


def judge(response, example):
    """The verdict of rewards.verify with the rubric as the reward; its shares are logged, too.
    Raises BadRow where the row has no reference."""
    reference = parts(example.response or "")
    if reference is None:
        raise BadRow(example.where, "there is no reference", "Name a file of alignment's rows.")
    verdict = verify(response, example)
    verdict |= {"caption": 0.0, "reasoning": 0.0, "reward": 0.0}
    written = parts(response)
    if written is None:
        return verdict
    verdict["caption"] = common(written["caption"].split(";"), reference["caption"].split(";"))
    verdict["reasoning"] = common(written["think"].split("."), reference["think"].split("."))
    shares = (verdict["caption"], verdict["reasoning"], verdict["accuracy"])
    verdict["reward"] = sum(shares) / len(shares)
    return verdict


def common(ours, theirs):
    """The share of pieces that are in both lists of all that are in either, up to white space; a
    piece that is there twice counts twice."""
    ours = Counter(" ".join(piece.split()) for piece in ours if piece.strip())
    theirs = Counter(" ".join(piece.split()) for piece in theirs if piece.strip())
    either = (ours | theirs).total()
    return (ours & theirs).total() / either if either else 1.0


if __name__ == "__main__":
    rlvr.verify = judge
    rlvr.main(parse(rlvr.Args))
