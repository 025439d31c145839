r"""
RLVR with a rubric as the reward, scored by rule: the rival of 2026 in the discriminator's place,
for the comparison on the embedded worlds (runs/miniature.sh). Rubric-based On-policy Distillation
(arXiv 2605.07396) has a teacher write a rubric for each prompt, and a judge score rollouts by it.
Here the reference itself is the rubric and a rule the judge.

    python tools/rubric.py --config runs/tiny-rlvr.json --policy ckpt/sft \
        --data data/tiny/align.jsonl

It is rlvr.py with another reward, and takes its flags; the rows are alignment's, with references. A
well-formed response gets the mean of three shares, which are logged too, a malformed one 0:

    caption     items that are in the reference's caption, too, of all items in either
    reasoning   steps that are in the reference's, too, of all steps in either
    answer      1 where the verifier takes it for the reference's, else 0

Items and steps count where they are the same word by word, so it fits references that are one
function of picture and question; a teacher's choice of words it takes for an error.
"""

import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import rlvr  # noqa: E402
from data import parts, read  # noqa: E402
from engine.arguments import option, parse  # noqa: E402
from engine.rows import BadRow  # noqa: E402
from rewards import verify  # noqa: E402


@dataclass(kw_only=True)
class Args(rlvr.Args):
    reward: Literal["rubric"] = option("rubric", "so that the log says what the reward was")


def judge(response, example):
    """The verdict of rewards.verify on a response with the rubric as the reward, and its shares.

    example: a row of alignment's, whose reference is well-formed.
    """
    verdict = verify(response, example)
    verdict |= {"caption": 0.0, "reasoning": 0.0, "reward": 0.0}
    written = parts(response)
    if written is None:
        return verdict
    reference = parts(example.response)
    verdict["caption"] = common(written["caption"].split(";"), reference["caption"].split(";"))
    verdict["reasoning"] = common(written["think"].split("."), reference["think"].split("."))
    shares = (verdict["caption"], verdict["reasoning"], verdict["accuracy"])
    verdict["reward"] = sum(shares) / len(shares)
    return verdict


def common(ours, theirs):
    """The share of pieces that are in both lists of all that are in either, up to white space; a
    piece that is there twice counts twice. Of two empty lists it is 1."""
    ours = Counter(" ".join(piece.split()) for piece in ours if piece.strip())
    theirs = Counter(" ".join(piece.split()) for piece in theirs if piece.strip())
    either = (ours | theirs).total()
    return (ours & theirs).total() / either if either else 1.0


def expect_references(args):
    """Raise BadRow for the first row whose reference alignment could not use: threads that judge
    rollouts have no way to leave a row out."""
    data = read(args.data, "align", args.image_root, args.max_bad)
    for row in range(len(data)):
        data[row]


def main(args):
    try:
        expect_references(args)
    except BadRow as error:
        sys.exit(f"rubric.py: {error}")
    rlvr.verify = judge
    rlvr.main(args)


if __name__ == "__main__":
    main(parse(Args))
