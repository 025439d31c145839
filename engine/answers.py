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
| a name of two units | either: 10 pounds is £10 and 10 lb, 40 F is 40 °F | who knows which? |
| an unknown word behind a number | a unit | 5 apples is 5, and is not 5 pears |
| 5M, 5k, 5B without a blank | million, thousand, billion | charts write so; not 5 |
| 3:30 and 3:30 PM | equal | a unit on one side only; 15:30 is 3:30 PM, and not 3:30 |
| 04/02/2005 | 4/2/2005, not 02/04/2005 | which number is the month, nobody knows |
| 500 BC | not 500, which is 500 AD | as years are written |
| 4:2 | a score, 2:1 a ratio (which 4:2 is) | whoever means the ratio gives it in lowest terms |
| 1:15 | a time, so not 2:30; and the fraction 1/15 | nobody answers a time with a fraction |
| 3-5, 3 to 5 | a range or score, never a difference | nobody answers with a sum left undone |
| 3 × 4 | a size, not 12; 3 × 4 = 12 is 12 | nobody answers with a product left undone |
| 65+, over 65, at least 65 | bounds: equal to the same bound, never to 65 | another claim |
| about 5, ~5, 5? | 5 | one value, and committed to |
| 3 or 4, 3 (or 4) | a list: not 3 | two values are no answer to a question for one |
| bare lists, {sets} | without order; 1, 2, 2 is not 1, 2 | who lists a number twice has counted |
| (tuples), [lists] | in order, also against a bare list | points have one |
| [1,2), (1,2], (1,2) | different; x < 3 is (-oo, 3) | they are |
| P(3, 4), x = 7 | (3, 4) and 7, but neither Q(3, 4) nor y = 7 | a name says what it is of |
| 0.333333 | 1/3, from six significant digits on | 0.33 may be a wrong 1/3 |
| 1000,99 | 1000.99, where the reference is that decimal | else a list of two |
| three, third | 3 and 3rd; third is not 3 | a number in words is that number |
| ACD, A, C and D | the same options in any order | a gold of ascending letters names options |
| a letter, where there are options | the option of that letter | whatever its text |
| No, it is not | no; but "No, never" is another answer | what an echo repeats adds nothing |
| dogs | dog; but Adams is not Adam | a plural is the same answer, and names have none |
| ab | a word: not ba; a·b is b·a | letters side by side are rarely a product |
| case | free in words, not in symbols and elements (CO, Co) | X is another unknown than x |
| log | base 10; ln 2 is another number | so in schools |
| There are 3 dogs | 3; but "Ann is tall" is not "Tom is tall" | the rest repeats the question |
| articles, punctuation of words | free | they carry no answer |
| more than MAX_CHARS | wrong | no answer is so long |
"""

import re

from engine import math_worker
from engine.kinds import OR, is_decided, key, label, letters, same, same_text, truth
from engine.quantities import measure
from engine.spelling import DENIAL, clean, has_claim, items

MAX_CHARS = 4000


def equivalent(pred, gold, choices=()):
    """Is `pred` the answer `gold`? `choices`: the options' texts in order.

    What is blank or no text equals nothing.
    """
    if not (is_answer(pred) and is_answer(gold)):
        return False
    math_worker.new_answer()
    p = clean(pred)
    g = clean(gold)
    options = without_letters([clean(str(choice)[:MAX_CHARS]) for choice in choices or ()])
    if any(is_right(each, g, options) for each in wordings(p)):
        return True
    return not options and any(same(p, each) for each in wordings(g))


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
    r"(?:\b(?:is|are|was|were|equals|count(?:ed)?|see|get|got|find|found|has|have|shows?|it's)\b:? "
    r"|[是为有] ?)"
)
REASON = re.compile(r"(.{1,60}?),? (?:because|since)\b.*")
CAPTION = re.compile(r"[A-Za-z][A-Za-z ]{2,30}: (?=\S)")  # `Total: 24`
TWICE = re.compile(r"(.+?) ?\((.+)\)")  # `3 (three)`
SUBJECT = re.compile(r"(?i)(?:it|they|this|he|she) (?=[a-z]+$)")  # `It increases`


def wordings(text):
    """The answer as it is worded, and in short where it is a sentence.

    Of two answers one may be taken in short, not both: `Ann is tall` is not `Tom is tall`.
    """
    yield text
    if has_claim(text):
        return  # two, which differ
    conclusion = CONCLUSION.match(text)
    if conclusion:
        yield clean(text[conclusion.end() :])
    statement = STATEMENT.match(text)
    if statement and not DENIAL.search(statement[0]):
        yield clean(text[statement.end() :])
    caption = CAPTION.match(text)
    if caption and not DENIAL.search(caption[0]):
        yield clean(text[caption.end() :])
    subject = SUBJECT.match(text)
    if subject:
        yield text[subject.end() :]
    twice = TWICE.fullmatch(text)
    if twice and measure(twice[1]) and same(twice[1], twice[2]):
        yield twice[1]
    reason = REASON.fullmatch(text)
    if reason and (label(reason[1]) or measure(reason[1]) or truth(reason[1])):
        yield reason[1]


# -------------------------------------------------------------- options
LABEL_BEFORE = re.compile(r"(?P<letter>[A-J]) ?[-(] ?(?P<text>.+?)\)?")  # `B (dog)`, `B - dog`
LABEL_BEHIND = re.compile(r"(?P<text>.+?) ?\((?P<letter>[A-J])\)")  # `the dog (B)`


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
        return option_beside_text(text, options)
    return lettered


def option_beside_text(text, options):
    """`B (the dog)` or `the dog (B)`, where that is option B."""
    found = LABEL_BEFORE.fullmatch(text) or LABEL_BEHIND.fullmatch(text)
    for index, each in enumerate(options):
        if found and found["letter"] == letter_of(index) and same_text(found["text"], each):
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
        return chosen >= 0 and key(options[chosen]) == key(options[right])
    others = [text for text in options if key(text) != key(options[right])]
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
