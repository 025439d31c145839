r"""Is an answer the reference?  `equivalent(pred, gold, choices)`.

Both texts get one spelling (engine/spelling.py). Where the row has options, both are looked up
among them. Else each kind of answer looks at the two in turn (engine/kinds.py, with numbers and
units in engine/quantities.py and engine/units.py). Only two formulas, each read to its last sign
(engine/formula.py), are left to algebra: to Math-Verify, in a process of its own
(engine/math_worker.py; without the extra `math` they are unequal).

Conventions, where graders differ:

| what | taken as | why |
|---|---|---|
| 10% | 0.1, and 10; 0.1% is not 0.1 | both are how a share is written, but a share of 0.1 is 10% |
| a unit on one side only | ignored | references are inconsistent about it |
| two units | converted where they measure the same | 3 h 20 min is 200 minutes; 5 m is not 5 km |
| an unknown word behind a number | a unit | 5 apples is 5, and is not 5 pears |
| 5M, 5k, 5B without a blank | million, thousand, billion | charts write so; not 5 |
| 3:30 and 3:30 PM | equal | a unit on one side only; 15:30 is 3:30 PM, and not 3:30 |
| 4:2 | in lowest terms a ratio (2:1 is 4:2); else a score, as it is; 1:15 a clock time | |
| 3-5, 3 to 5 | a range or score, never a difference | nobody answers with a sum left undone |
| 65+, over 65, at least 65 | bounds: equal to the same bound, never to 65 | another claim |
| about 5, ~5, 5? | 5 | one value, and committed to |
| 3 or 4, 3 (or 4) | a list: not 3 | two values are no answer to a question for one |
| bare lists, {sets} | without order; a number counts as often as it is written | |
| (tuples), [lists] | in order, also against a bare list | points have one |
| [1,2), (1,2], (1,2) | different; x < 3 is (-oo, 3) | they are |
| 0.333333 | 1/3, from six significant digits on | 0.33 may be a wrong 1/3 |
| 1000,99 | 1000.99, where the reference is that decimal | else a list of two |
| ACD, A, C and D | the same options in any order | a gold of ascending letters names options |
| No, it is not | no; but "No, never" is more than "no" | what an echo repeats adds nothing |
| case | free in words, not in symbols and formulas of elements (CO, Co) | |
| log | base 10; ln 2 is another number | |
| articles, punctuation of words | free | they carry no answer |
| more than MAX_CHARS | wrong | no answer is so long |
"""

import re

from engine import math_worker
from engine.kinds import OR, is_decided, key, label, letters, same, same_text, truth
from engine.quantities import measure
from engine.spelling import DENIAL, clean, items

MAX_CHARS = 4000


def equivalent(pred, gold, choices=()):
    """Is `pred` the answer `gold`? `choices`: the options' texts in order.

    What is blank or no text equals nothing.
    """
    if not (is_answer(pred) and is_answer(gold)):
        return False
    math_worker.new_answer()
    g = clean(gold)
    options = without_letters([clean(str(choice)[:MAX_CHARS]) for choice in choices or ()])
    return any(is_right(p, g, options) for p in wordings(clean(pred)))


def is_answer(text):
    return isinstance(text, str) and len(text) <= MAX_CHARS and bool(text.strip())


def is_right(p, g, options):
    verdict = same_option(p, g, options) if options else None
    return same(p, g) if verdict is None else verdict


def is_open(pred, gold, choices=()):
    """Do the rules leave open whether `pred` is `gold`?

    They do where they find the two unequal and had nothing to compare but their texts: no kind of
    answer decides about the two, as `same_measure` does about two numbers, neither as `pred` words
    it nor in short. Of a gold that names an option, that option's text is compared, and an answer
    that names one itself is decided. So `the auto` is open beside `the car`, and beside `5`; `4`
    beside `5`, `no` beside `yes`, `A` beside `B` and what is blank are wrong.
    """
    if not (is_answer(pred) and is_answer(gold)) or equivalent(pred, gold, choices):
        return False
    p = clean(pred)
    g = clean(gold)
    options = without_letters([clean(str(choice)[:MAX_CHARS]) for choice in choices or ()])
    right = option(g, options)
    if right is not None and right >= 0:
        if names_an_option(p, options):
            return False
        g = options[right]
    return not any(is_decided(wording, g) for wording in wordings(p))


def names_an_option(p, options):
    """By its letter, by several, or by its text."""
    if option(p, options) is not None or letters(p):
        return True
    return any(same(p, text) for text in options)


# -------------------------------------------------------------- wordings
CONCLUSION = re.compile(  # `I count 40 and 2 more, so 42`
    r"(?i).*(?:, ?so\b|\b(?:thus|hence|therefore|which (?:is|gives|makes))\b|所以|因此)[, ]*(?=\S)"
)
STATEMENT = re.compile(  # `There are 3 dogs`, `The area is 25`: no number in front of the verb
    r"(?i)\D*"
    r"(?:\b(?:is|are|was|were|equals|count|see|get|find|has|have|shows?|it's)\b:? |[是为有] ?)"
)
REASON = re.compile(r"(.{1,60}?),? (?:because|since)\b.*")


def wordings(text):
    """The answer as it is worded, and in short where it is a sentence."""
    yield text
    conclusion = CONCLUSION.match(text)
    if conclusion:
        yield clean(text[conclusion.end() :])
    statement = STATEMENT.match(text)
    if statement and not DENIAL.search(statement[0]):
        yield clean(text[statement.end() :])
    reason = REASON.fullmatch(text)
    if reason and (label(reason[1]) or measure(reason[1]) or truth(reason[1])):
        yield reason[1]


# -------------------------------------------------------------- options
LABEL_BEFORE = re.compile(r"([A-J]) ?[-(] ?(.+?)\)?")  # `B (the dog)`, `B - the dog`


def without_letters(options):
    """`A. cat`, `B. dog` -> `cat`, `dog`, where all the options bring their letters."""
    labels = [label(text) for text in options]
    if all(found and found[0] == letter_of(i) for i, found in enumerate(labels)):
        return [text or letter for letter, text in labels]
    return options


def letter_of(index):
    return chr(ord("A") + index)


def option(text, options):
    """Index of the option named by its letter or its text; -1 where the two disagree."""
    names = [key(each) for each in options]
    letter, rest = label(text) or ("", "")
    lettered = ord(letter) - ord("A") if letter else None
    if lettered is not None and lettered >= len(options):
        lettered = None
    if key(text) in names and (rest or lettered is None):
        return names.index(key(text))
    for index, each in enumerate(options):
        if lettered is not None and index != lettered and rest and same_text(rest, each):
            return -1
    if lettered is None:
        return option_before_text(text, options)
    return lettered


def option_before_text(text, options):
    """`B (the dog)`, where that is option B."""
    found = LABEL_BEFORE.fullmatch(text)
    for index, each in enumerate(options):
        if found and found[1] == letter_of(index) and same_text(found[2], each):
            return index
        if same_text(text, each):
            return index
    return None


def same_option(p, g, options):
    """The verdict where the gold names an option, else None."""
    right = option(g, options)
    if right is None:
        several = letters(g)
        if several and max(several) < letter_of(len(options)):
            return chosen_letters(p, options) == several
        alike = [index for index, text in enumerate(options) if same(g, text)]
        if len(alike) != 1:
            return None
        right = alike[0]
    chosen = option(p, options)
    if chosen is not None:
        return chosen >= 0 and same_text(options[chosen], options[right])
    others = [text for text in options if not same_text(text, options[right])]
    if letters(p) or any(same(p, text) for text in others):
        return False
    return same(p, options[right])


def chosen_letters(p, options):
    """Letters of several options, given as letters or as texts."""
    if letters(p, in_order=False):
        return letters(p, in_order=False)
    chosen = [option(text, options) for text in items(p)[1]]
    if OR.search(p) or None in chosen or -1 in chosen:
        return None
    return {letter_of(index) for index in chosen}
