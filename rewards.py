"""The reward: is a response well-formed, and is its answer right?  Edit here to change it.

`verify` is the one function that training (rlvr.py), evaluation (eval.py), the canary of the
alignment (align.py) and the curation of data (tools/curate.py) call. A response is well-formed
where `data.parts` finds each of its parts once, in order, with nothing outside; whether two answers
are the same is decided in engine/answers.py.
"""

from data import count_items, count_steps, parts
from engine.answers import equivalent, is_open

ACCURACY_WEIGHT = 0.8
FORMAT_WEIGHT = 0.2  # for the form alone, so that a group of wrong answers still teaches it


def verify(response, example):
    """The verdict on a response to `example`: floats accuracy, format and reward."""
    return score(response, example.answer, example.choices, example.equivalent)


def score(response, gold, choices=(), equivalent_answers=()):
    """The verdict on a response: floats accuracy, format and reward, all 0 where it is malformed.

    Every name of the verdict is logged, as a mean over the step's rollouts.

    gold: the reference answer. choices: the texts of the options, in order. equivalent_answers:
    other references, each as good as `gold`. A list may be None, as files have it.
    """
    verdict = {"accuracy": 0.0, "format": 0.0, "reward": 0.0}
    found = parts(response)
    if found is None:
        return verdict
    golds = [gold, *(equivalent_answers or ())]
    verdict["format"] = 1.0
    if any(equivalent(found["answer"], each, choices) for each in golds):
        verdict["accuracy"] = 1.0
    verdict["reward"] = ACCURACY_WEIGHT * verdict["accuracy"] + FORMAT_WEIGHT
    return verdict


def left_open(response, example):
    """The answer in a response where the rules cannot tell whether it is right (see
    engine.answers.is_open), else None: what they decide, and what is malformed."""
    found = parts(response)
    if found is None or verify(response, example)["accuracy"]:
        return None
    golds = (example.answer, *example.equivalent)
    is_left = any(is_open(found["answer"], gold, example.choices) for gold in golds)
    return found["answer"] if is_left else None


def measure(example, rollout, text):
    """All that evaluation measures of a response: {name: value}, None where one has no meaning.

    rollout: its ids and how it stopped (engine.sampler.Rollout). What is known of the reference is
    None where there is no reference.
    """
    verdict = verify(text, example)
    measured = {
        "accuracy": verdict["accuracy"],
        "format": verdict["format"],
        "length": len(rollout.ids),  # tokens
        "stop": rollout.stop,  # "end" or "length"
        "text": text,
        "items": None,  # of the caption
        "steps": None,  # of the reasoning
        "reference_items": None,
        "reference_steps": None,
        "same_caption": None,  # as the reference's, up to white space
        "same_reasoning": None,  # the same
    }
    written = parts(text)  # None: malformed
    reference = parts(example.response or "")
    if written:
        measured["items"] = count_items(written["caption"])
        measured["steps"] = count_steps(written["think"])
    if reference:
        measured["reference_items"] = count_items(reference["caption"])
        measured["reference_steps"] = count_steps(reference["think"])
        measured["same_caption"] = False
        measured["same_reasoning"] = False
    if written and reference:
        measured["same_caption"] = written["caption"].split() == reference["caption"].split()
        measured["same_reasoning"] = written["think"].split() == reference["think"].split()
    return measured
