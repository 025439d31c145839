"""
The forms in which benchmarks are published, as one table of field names; a row becomes {images, question, choices, answer}.

    benchmark        question                    options                 answer                 images
    MathVista        question                    choices, a list         number, option's text  decoded_image
    MathVerse        question; if empty query_wo in the question         letter, text           image
    MATH-Vision (1)  question, <image1> in it    options, a list         letter, LaTeX          decoded_image; image, a path
    We-Math          question                    option "A. 3; B. 4"     letter                 image_path
    MMMU             question, <image 1> in it   options "['3', '4']"    letter, text, a list   image_1 .. image_7
    MMMU-Pro         question, or in the image   options "['3', '4']"    letter                 image_1 .. image_7, or image
    HallusionBench   question                    none                    gt_answer: 0 no, 1 yes image; filename; or none

(1) is verified on a file, with `choices` for `options`; the others are the names that published evaluation code reads.
"""

import ast
import re

from engine.rows import BadRow

FIELDS = {  # ours: theirs, of which the first that is not empty counts
    "images": ("decoded_image", "image", "image_path", "filename"),
    "question": ("question", "problem", "query", "query_wo"),
    "choices": ("choices", "options", "option"),
    "answer": ("answer", "gt_answer"),
}


def standard(row, where=""):
    """A benchmark's row under our names; one with turns, a prompt or `images` as it is. Raises BadRow."""
    if any(
        row.get(field) is not None for field in ("messages", "conversations", "prompt", "images")
    ):
        return row
    found = {
        k: next((row[f] for f in names if row.get(f) not in (None, "", [])), None)
        for k, names in FIELDS.items()
    }
    image, choices, answer = found["images"], found["choices"], found["answer"]
    found["images"] = (
        [row[k] for k in (f"image_{n}" for n in range(1, 8)) if row.get(k)]
        if image is None
        else [image]
    )
    if isinstance(choices, str):
        lettered = re.split(r"(?:^|[;\n])\s*\(?[A-J][.:)]\s*", choices.strip("; \n"))[1:]
        choices = spelt(choices) if choices.startswith("[") else lettered or None
        if choices is None:
            raise BadRow(
                where, "the options are in no known form", "Write `choices` as a list of texts."
            )
    if isinstance(choices, dict):
        choices = [choices[letter] for letter in sorted(choices) if choices[letter] is not None]
    if choices and found["images"] and found["question"] is None:
        found["question"] = "Answer the question in the image."
    if row.get("answer") in (None, "", []) and answer is not None:
        answer = {"0": "no", "1": "yes"}.get(str(answer), answer)
    elif isinstance(answer, str) and all(isinstance(one, str) for one in spelt(answer) or [0]):
        answer = spelt(answer)  # several right answers; [1, 2] is an interval
    return row | found | {"choices": choices, "answer": answer}


def spelt(text):  # the list that `text` spells as Python writes it, or None
    try:
        return ast.literal_eval(text) if text.startswith("[") else None
    except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
        return None
