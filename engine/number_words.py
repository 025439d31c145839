"""Numbers in words: `spelled("two hundred and fifty")` is 250, `ordinal("twenty-first")` is 21.

Each reader takes a whole text and gives None where a word of it has no place in a number.
"""

import re
from fractions import Fraction
from functools import lru_cache

SMALL = {
    name: value
    for value, name in enumerate(
        "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen"
        " fifteen sixteen seventeen eighteen nineteen".split()
    )
}
TENS = {
    name: 10 * place
    for place, name in enumerate(
        "twenty thirty forty fifty sixty seventy eighty ninety".split(), start=2
    )
}
DOZEN = {"dozen": 12}
SCALES = {"thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12}
WORDS = {*SMALL, *TENS, *DOZEN, *SCALES, "hundred"}


def regular_ordinal(cardinal):
    """`seven` -> `seventh`, `twenty` -> `twentieth`."""
    if cardinal.endswith("y"):
        return cardinal.removesuffix("y") + "ieth"
    return cardinal + "th"


ORDINALS = {regular_ordinal(cardinal): cardinal for cardinal in WORDS} | {
    "first": "one",
    "second": "two",
    "third": "three",
    "fifth": "five",
    "eighth": "eight",
    "ninth": "nine",
    "twelfth": "twelve",
}
PARTS = {"half": 2, "halve": 2, "quarter": 4}  # without their plural s
NUMERAL = re.compile(r"(\d+)(?:st|nd|rd|th)")
MAX_WORDS = 16


def words_of(text):
    return re.split(r"[ -]+", text.lower())


@lru_cache(maxsize=1 << 12)
def spelled(text):
    """`forty-two`, `a dozen`, `two and a half`, `three quarters`, `two point five`; a Fraction."""
    words = words_of(text)
    if len(words) > MAX_WORDS:
        return None
    if "point" in words:
        return decimal(words)
    if words == ["half"]:
        return Fraction(1, 2)
    divisor = denominator(words[-1]) if len(words) > 1 else None
    if divisor is None:
        return whole(words)
    head = words[:-1]
    if "and" in head[-2:]:  # `two and a half`, `three and two thirds`
        place = len(head) - 1 - head[::-1].index("and")
        total = whole(head[:place])
        count = whole(article_as_one(head[place + 1 :]))
    else:
        total = Fraction(0)
        count = whole(article_as_one(head))
    if total is None or count is None:
        return None
    return total + count / divisor


def article_as_one(words):
    """Of `a half` and `an eighth`."""
    return ["one"] if words in (["a"], ["an"]) else words


def denominator(word):
    """`thirds` -> 3."""
    name = word.removesuffix("s")
    if name in PARTS:
        return PARTS[name]
    cardinal = ORDINALS.get(name)
    return whole([cardinal]) if cardinal not in (None, "one", "two") else None


def decimal(words):
    """`two point five`."""
    place = words.index("point")
    total = whole(words[:place])
    digits = [SMALL.get(word, 10) for word in words[place + 1 :]]
    if total is None or not digits or max(digits) > 9:
        return None
    return total + Fraction(int("".join(map(str, digits))), 10 ** len(digits))


def whole(words):
    """`two hundred and fifty` -> 250, `a hundred` -> 100."""
    total = 0  # of the thousands, millions that are complete
    group = 0  # below a thousand
    last = ""
    for word in words:
        if word in ("a", "an") and last == "":
            group = 1
        elif word == "and" and last in ("hundred", *SCALES):
            pass
        elif word in SMALL and has_room(group, SMALL[word], last):
            group += SMALL[word]
        elif word in TENS and group % 100 == 0 and last not in ("a", "an"):
            group += TENS[word]
        elif word == "hundred" and group < 100:
            group = (group or 1) * 100
        elif word in DOZEN and group < 100:
            group = (group or 1) * DOZEN[word]
        elif word in SCALES and group and (total == 0 or total % (SCALES[word] * 1000) == 0):
            total += group * SCALES[word]
            group = 0
        else:
            return None
        last = word
    return None if last in ("", "a", "an", "and") else Fraction(total + group)


def has_room(group, value, last):
    """Can `value` stand behind a group? `twenty five` yes, `five six` and `dozen one` no."""
    if last in SMALL or last in DOZEN or last in ("a", "an"):
        return False
    if group % 100 == 0:
        return True
    return last in TENS and 0 < value < 10


@lru_cache(maxsize=1 << 12)
def ordinal(text):
    """`3rd`, `third`, `twenty-first` as a number."""
    numeral = NUMERAL.fullmatch(text.lower())
    if numeral:
        return Fraction(numeral[1])
    words = words_of(text)
    if words[-1] not in ORDINALS or len(words) > MAX_WORDS:
        return None
    return whole([*words[:-1], ORDINALS[words[-1]]])
