"""Verifiable rewards: is a response well-formed, and is its answer right?"""

from data import parts
from engine.answers import equivalent


def score(response, gold, choices=(), equivalent_answers=()):
    """Floats accuracy, format, reward = 0.8 accuracy + 0.2 format, all 0 when malformed; right: `gold` or an equivalent."""
    p, golds = parts(response), [gold, *(() if equivalent_answers is None else equivalent_answers)]
    accuracy, well_formed = (
        float(bool(p) and any(equivalent(p[2], g, choices) for g in golds)),
        float(bool(p)),
    )
    return {
        "accuracy": accuracy,
        "format": well_formed,
        "reward": 0.8 * accuracy + 0.2 * well_formed,
    }
