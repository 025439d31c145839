r"""The kinds of answers: `same(p, g)` asks each in turn whether two cleaned texts are one answer.

A kind is a function of the two texts. It says True or False where it decides about them, and None
where it leaves that to the next one; `KINDS`, at the end, has them in their order. What no kind
decides is unequal. Numbers, measures, ranges and ratios are in engine/quantities.py, times of day
and dates in engine/times.py.
"""

import re
from typing import NamedTuple

from engine import math_worker
from engine.formula import is_relation, parse, symbols
from engine.number_words import WORDS as NUMBER_WORDS
from engine.quantities import (
    measure,
    number,
    ratio,
    same_measure,
    same_range,
    same_ratio,
    split_unit,
)
from engine.spelling import DENIAL, items
from engine.times import same_clock, same_date, same_opening_hours, same_place_in_order
from engine.units import NONE, reader

MAX_DEPTH = 20  # of brackets
MAX_ITEMS = 64  # of both lists together


def same(p, g):
    """Are two cleaned texts one answer?"""
    if same_text(p, g):
        return True
    if not p or not g or "()" in p or max(map(p.count, "([{")) > MAX_DEPTH:
        return False
    for kind in KINDS:
        verdict = kind(p, g)
        if verdict is not None:
            return verdict
    return False


# -------------------------------------------------------------- text
LETTER = r"[^\W\d_]"
HYPHEN = rf"(?<={LETTER}{{3}})-(?={LETTER})|(?<={LETTER})-(?={LETTER}{{3}})"  # `x-axis`, not `b-a`
WORDS = re.compile(rf"(?=.*{LETTER}\.?{LETTER})(?:{LETTER}|[\s'\",.!?:;]|{HYPHEN})+")
LONG_WORD = re.compile(rf"{LETTER}{{3}}")
ARTICLE = re.compile(r"(?i)\b(?:an?|the) +(?=.*[a-z])")  # of something: the grade `a` is none
ELEMENT = (
    "A[cglmrstu]|B[aehikr]?|C[adeflmnorsu]?|D[bsy]|E[rsu]|F[elmr]?|G[ade]|H[efgos]?|I[nr]?|Kr?"
    "|L[airuv]|M[cdgnot]|N[abdehiop]?|O[gs]?|P[abdmortu]?|R[abefghnu]|S[bcegimnr]?|T[abcehilms]"
    "|U|V|W|Xe|Yb?|Z[nr]"
)
ELEMENTS = re.compile(rf"(?:{ELEMENT}|[\d()\[\]_^{{}}+ -]|\\to)+")  # `CO_2`, `2H_2+O_2\to 2H_2O`

ORBITALS = re.compile(r"(?:\d[spdf](?:\^?\d{1,2}|\^\{\d{1,2}\}) ?){2,}")  # `1s^2 2s^2`


def is_words(text):
    return WORDS.fullmatch(text) is not None


@reader
def key(text):
    """What has to be alike: words without articles and punctuation; other texts without blanks (but
    between digits), without `_`, and without braces around one name.
    """
    if is_words(text):
        return "".join(re.findall(LETTER, ARTICLE.sub("", text)))
    text = re.sub(r"^(?:the|an?) (?=[A-Za-z]{2}|\d)", "", text)
    if ORBITALS.fullmatch(text):
        text = re.sub(r"[\^{}]", "", text)
    text = re.sub(r"(?<!\d) +| +(?!\d)", "", text)
    text = re.sub(r"(?<=[_^])\{(\w+|\d*[+-])\}(?!\d)", r"\1", text)
    text = re.sub(r"(?<=[A-Za-z)\]])_", "", text)
    return re.sub(r"\^(\d?[+-])(?=$|[+\\,])", r"\1", text)  # `Fe^{2+}` and `Fe2+`


def same_text(p, g):
    """`The dog` and `dogs`, `H_2O` and `H2O`."""
    p_key = key(p)
    g_key = key(g)
    if p_key == g_key:
        return p_key != ""
    if p_key.casefold() == g_key.casefold():
        return not case_counts(p, g)
    return is_plural(p, g) or is_plural(g, p)


def case_counts(p, g):
    """Between symbols, `x` and `X`, elements, `CO` and `Co`, and units, `2 MeV` and `2 meV`."""
    if ELEMENTS.fullmatch(p) and ELEMENTS.fullmatch(g):
        return True
    if measure(p) != measure(g):
        return True
    return not (is_words(p) or LONG_WORD.search(p))


NAME_AT_END = re.compile(r".*\b[A-Z]\S*")
SHORTEST_NOUN = 3  # letters
NO_NOUNS = {"new", "mean", "good"} | NUMBER_WORDS  # `news`, `hundreds` are something else


def is_plural(several, one):
    """`dogs` of `dog`, `boxes`, `berries`; but `Adams` is another name than `Adam`."""
    if not (is_words(several) and is_words(one)):
        return False
    if NAME_AT_END.fullmatch(several) and NAME_AT_END.fullmatch(one):
        return False
    stem = key(one).casefold()
    if len(stem) < SHORTEST_NOUN or stem in NO_NOUNS:
        return False
    plurals = {stem + "es"}
    if not stem.endswith("s"):
        plurals.add(stem + "s")
    if stem.endswith("y"):
        plurals.add(stem.removesuffix("y") + "ies")
    return key(several).casefold() in plurals


# -------------------------------------------------------------- letters of options
LABEL_ALONE = re.compile(  # `B`, `(b)`, `Option B.`
    r"(?:(?i:option|choice|answer|选项?|答案) ?)?[(\[]?([A-Ja-j])[)\]]?[.:]?(?: ?选?项)?"
)
LABELLED = re.compile(  # `(B) the dog`, `Option B: the dog`, `(B) (0, 1)`; not `(A) (B)`
    r"(?:(?i:option|choice|answer) )?(?:\((?=[A-J]\)))?([A-J])(?:\) ?|[.:] )(?! |\([A-J]\))(.+)"
)
NOT_ITS_TEXT = re.compile(  # `(A) B) ...`, `(A) or (B)`, `(A) is wrong`, `A. No, B`
    r"\b[A-J][).:]|^[A-J]\W+[A-J]\b|^(?i:no|not|wait|actually)\b.*\b[A-J]\b|^(?:and|or|but|is|isn't|was|are|not|no|nor|vs|wrong)\b"
)
ONE_LETTER = r"[(\[]?[A-H][)\]]?"
LETTERS = re.compile(  # `A, C`, `A and C`, `(A) (C)`, `options A and C`
    rf"(?:(?i:options|choices|answers) )?{ONE_LETTER}"
    rf"(?:(?:[,;/] ?(?:and )?| and | ?(?=\()| (?=[A-H])){ONE_LETTER})+"
)


@reader
def label(text):
    """(letter, text): `b` -> ("B", ""), `(B) the dog` -> ("B", "the dog")."""
    alone = LABEL_ALONE.fullmatch(text)
    if alone:
        return alone[1].upper(), ""
    labelled = LABELLED.fullmatch(text)
    if labelled and not NOT_ITS_TEXT.search(labelled[2]):
        return labelled.groups()
    return None


def letters(text, in_order=True):
    """The set of `A, C`, `A and C`, `AC`; letters without marks between them have to ascend."""
    if not LETTERS.fullmatch(text):
        if not re.fullmatch("[A-H]{2,8}", text) or len(set(text)) < len(text):
            return None
        if in_order and list(text) != sorted(text):
            return None
    return set(re.findall(r"(?<![a-z])[A-H](?![a-z])", text))


def same_choice(p, g):
    """`(B) the dog` and `B`, or `the dog`; a letter is nothing but a letter."""
    p_label = label(p)
    g_label = label(g)
    if not g_label:
        return True if p_label and p_label[1] and same(p_label[1], g) else None
    if not p_label:
        return same(p, g_label[1])
    if p_label[0] != g_label[0]:
        return False
    both = p_label[1] and g_label[1]
    return not both or same(p_label[1], g_label[1])


def same_letters(p, g):
    """`ACD` and `A, D and C`."""
    g_letters = letters(g)
    return letters(p, in_order=False) == g_letters if g_letters else None


# -------------------------------------------------------------- yes and no
PRONOUN = "it|they|he|she|there|this|that|these|those|we|you|i"
AUXILIARY = "is|are|was|were|do|does|did|has|have|had|can|could|will|would|should|may|might|must"
ECHO = re.compile(rf"(?i)(?:{PRONOUN}) (?:{AUXILIARY})(?:n't| not)?")  # `it is`, `there aren't`
TRUTH = re.compile(
    r"(?i)(?P<lead>[a-z ]*\bis )?(?:(?P<true>yes|true)|no|false)"
    rf"(?=$|[.,;:!]| (?:{PRONOUN}) (?:{AUXILIARY}))"
)
TRUTH_WORD = re.compile(r"(?i)\b(?:yes|no|true|false)\b")
TRUTH_IN_CHINESE = {"是": True, "是的": True, "对": True, "正确": True}
TRUTH_IN_CHINESE |= {
    "否": False,
    "不是": False,
    "不对": False,
    "不正确": False,
    "错误": False,
    "错": False,
}
CONDITION = re.compile(r"(?i)\b(?:if|unless|but|except|maybe|perhaps|although|only)\b")


@reader
def truth(text):
    """(is it yes, what is said besides): `No, it is not` -> (False, "it is not")."""
    if text in TRUTH_IN_CHINESE:
        return TRUTH_IN_CHINESE[text], ""
    found = TRUTH.match(text)
    if not found or DENIAL.search(found["lead"] or ""):
        return None
    rest = text[found.end() :].strip(" .,;:!")
    if TRUTH_WORD.search(rest) or rest[:1].isdigit():  # `yes and no`, `No. 7`
        return None
    return bool(found["true"]), rest


def same_truth(p, g):
    """`No, it is not` and `False`; but `No, never` says more than `no`."""
    p_truth = truth(p)
    g_truth = truth(g)
    if g_truth is None:
        return None
    if p_truth is None or p_truth[0] != g_truth[0]:
        return False
    p_rest = "" if ECHO.fullmatch(p_truth[1]) else p_truth[1]
    g_rest = "" if ECHO.fullmatch(g_truth[1]) else g_truth[1]
    if g_rest or CONDITION.search(p_rest):
        return False
    return not p_rest or not g_truth[1]


# -------------------------------------------------------------- numbers with something around them
NUMBERED = re.compile(  # `No. 7`, `pieces 1 and 3`, `Ages 18-29`, `in 2014`, `the year 2014`
    r"(?i)(?:the )?(no|number|figure|fig|step|page|question|problem|group|case|table|chapter"
    r"|section|row|column|piece|day|year|grade|level|class|room|line|box|stage|type|desk|point|option|picture"
    r"|image|team|player|age|aged|week|round|lane|floor|bus|route|channel|item|shape)"
    r"s?(?:\. ?| )(?=\d)|([#第]) ?(?=\d)|in (?=\d{4}$)"
)
SHORT_NOUNS = {"number": "no", "fig": "figure"}


def noun(found):
    if found[2]:
        return "no"
    name = found[1].lower() if found[1] else "year"
    return SHORT_NOUNS.get(name, name)


def same_numbered(p, g):
    """`No. 7` is `7`, but not `No. 9`; `Figure 3` is not `Table 3`."""
    p_noun = NUMBERED.match(p)
    g_noun = NUMBERED.match(g)
    if not (p_noun or g_noun):
        return None
    if p_noun and g_noun and noun(p_noun) != noun(g_noun):
        return False
    p_rest = p[p_noun.end() :] if p_noun else p
    g_rest = g[g_noun.end() :] if g_noun else g
    if not (p_noun and g_noun) and split_unit(g if p_noun else p)[1] != NONE:
        return False  # `Desk 1` and `1 cm`
    return same(p_rest, g_rest)


DECIMAL_COMMA = re.compile(r"(-?\d+(?:\.\d{3})*),(\d+)(\D*)")


def same_decimal_comma(p, g):
    """`1000,99`, `1.000,99` and `1000,99 €` where the reference is 1000.99."""
    found = DECIMAL_COMMA.fullmatch(p)
    if "." not in g or not measure(g) or not found:
        return None
    whole = found[1].replace(".", "")
    return same_measure(f"{whole}.{found[2]}{found[3]}", g)


def same_angle(p, g):
    r"""`60°` and `\frac{\pi}{3}`."""
    degrees = [text for text in (p, g) if "°" in text]
    radians = [text for text in (p, g) if r"\pi" in text]
    if len(degrees) != 1 or len(radians) != 1 or degrees == radians:
        return None
    angle = re.sub(r" ?(?:rad|radians?)$", "", radians[0])
    return same_formula(degrees[0], angle)


FUNCTION = re.compile(r"\\(?:sin|cos|tan|cot|sec|csc)")  # of an angle, whose ° is no unit


def same_quantity(p, g):
    r"""`2\pi\text{ cm}` and `2\pi`, `5\sqrt{3}` m and `5\sqrt{3}` m."""
    p_core, p_unit = split_unit(p)
    g_core, g_unit = split_unit(g)
    if p_unit == NONE == g_unit or FUNCTION.search(p + g):
        return None
    if NONE not in (p_unit, g_unit) and p_unit != g_unit:
        return False
    return same(p_core, g_core) if parse(p_core) and parse(g_core) else None


# -------------------------------------------------------------- bounds and intervals
BOUNDS_IN_FRONT = [
    (r"at most|up to|(?:no|not) (?:more|greater|longer) than|maximum(?: of)?|\\le", "<="),
    (r"at least|(?:no|not) (?:less|fewer) than|minimum(?: of)?|\\ge", ">="),
    (r"(?:less|fewer|lower|smaller|younger|shorter) than|under|below|<", "<"),
    (r"(?:more|greater|higher|larger|bigger|older|longer) than|over|above|exceeding|>", ">"),
]
BOUNDS_BEHIND = [
    (r"\+|(?:or|and) (?:more|over|above|older|greater|higher|up|longer)|at least|minimum", ">="),
    (r"(?:or|and) (?:less|fewer|under|below|younger|lower|shorter)|at most|maximum", "<="),
]
NAME = r"[A-Za-z](?:_\w+|_\{\w+\})?(?:\([a-z]\))?"  # `x`, `x_1`, `f(x)`
INEQUALITY = re.compile(r"(<|>|\\le(?![a-z])|\\ge(?![a-z]))")
COMPILED_BOUNDS = [
    (re.compile(rf"(?i)(?:({NAME}) ?)?(?:is )?(?:{words}) ?(.+)"), operator)
    for words, operator in BOUNDS_IN_FRONT
] + [(re.compile(rf"(?i)()(.*\S) ?(?:{words})"), operator) for words, operator in BOUNDS_BEHIND]


@reader
def bound(text):
    """(name or "", operator, value): `x < 5`, `less than 5`, `65+`, `10 or more`."""
    for pattern, operator in COMPILED_BOUNDS:
        found = pattern.fullmatch(text)
        value = found[2] if found else ""
        if not found or INEQUALITY.search(value) or (found[1] and re.fullmatch(NAME, value)):
            continue  # `a < b` bounds nothing
        if measure(value) or parse(value):
            return found[1] or "", operator, value
    return None


def same_bound(p, g):
    """`at least 10` and `10+`."""
    p_bound = bound(p)
    g_bound = bound(g)
    if not (p_bound and g_bound):
        return None
    names = {p_bound[0], g_bound[0]} - {""}
    return len(names) < 2 and p_bound[1] == g_bound[1] and same(p_bound[2], g_bound[2])


ELEMENT_OF = re.compile(rf"({NAME}) ?\\in ?")
INFINITY = r"\infty"
TURNED = {">": "<", r"\ge": r"\le"}


class Interval(NamedTuple):
    name: str
    low: str
    closed_below: bool
    high: str
    closed_above: bool


@reader
def interval(text):
    r"""`1 < x \le 3`, `x < 3`, `x \in (1, 3]`, `(1, 3]`; the last may be a point, too."""
    member = ELEMENT_OF.match(text)
    name = member[1] if member else ""
    if member:
        text = text[member.end() :]
    brackets, ends = items(text)
    if brackets in ("()", "(]", "[)", "[]") and len(ends) == 2:
        return Interval(name, ends[0], brackets[0] == "[", ends[1], brackets[1] == "]")
    return from_inequality([side.strip() for side in INEQUALITY.split(text)])


def from_inequality(sides):
    """Of `x`, `<`, `3` or of `1`, `<`, `x`, `<`, `3`; a name has to stand among them."""
    if ">" in sides or r"\ge" in sides:
        sides = [TURNED.get(side, side) for side in reversed(sides)]
    if ">" in sides or r"\ge" in sides:
        return None  # `1 < x > 3`
    names = [place for place in range(0, len(sides), 2) if re.fullmatch(NAME, sides[place])]
    if len(names) != 1 or "" in sides:
        return None
    if len(sides) == 5 and names == [2]:
        low, below, name, above, high = sides
        return Interval(name, low, below == r"\le", high, above == r"\le")
    if len(sides) == 3 and names == [0]:
        name, above, high = sides
        return Interval(name, "-" + INFINITY, False, high, above == r"\le")
    if len(sides) == 3:
        low, below, name = sides
        return Interval(name, low, below == r"\le", INFINITY, False)
    return None


def same_interval(p, g):
    r"""`x < 3` and `(-\infty, 3)`; two texts in brackets are a collection's affair."""
    p_interval = interval(p)
    g_interval = interval(g)
    if not (p_interval and g_interval) or not (p_interval.name or g_interval.name):
        return None
    if p_interval.name and g_interval.name and p_interval.name != g_interval.name:
        return False
    closed = p_interval.closed_below == g_interval.closed_below
    closed = closed and p_interval.closed_above == g_interval.closed_above
    ends = same(p_interval.low, g_interval.low) and same(p_interval.high, g_interval.high)
    return closed and ends


@reader
def chain(text):
    """The sides and signs of `a < b < c`, the least first."""
    sides = [side.strip() for side in INEQUALITY.split(text)]
    if ">" in sides or r"\ge" in sides:
        sides = [TURNED.get(side, side) for side in reversed(sides)]
    return sides if len(sides) > 3 else None


def same_chain(p, g):
    """`a < b < c` and `c > b > a`."""
    p_chain = chain(p)
    g_chain = chain(g)
    if not (p_chain and g_chain):
        return None
    if len(p_chain) != len(g_chain):
        return False
    return all(same(a, b) for a, b in zip(p_chain, g_chain, strict=True))


def union(text):
    r"""The parts of `(1,2) \cup (3,4)` or of `x < 1 or x > 3`."""
    member = ELEMENT_OF.match(text)
    parts = (text[member.end() :] if member else text).split(r"\cup")
    if len(parts) == 1:
        parts = text.split(" or ")
        if not all(interval(part.strip()) for part in parts):
            return None
    return [part.strip() for part in parts] if len(parts) > 1 else None


def same_union(p, g):
    p_parts = union(p)
    g_parts = union(g)
    return match(p_parts, g_parts) if p_parts and g_parts else None


# -------------------------------------------------------------- lists
def match(p_items, g_items):
    """Has each item of one list its own equal in the other, in whatever order?"""
    if len(p_items) + len(g_items) > MAX_ITEMS:
        return False
    if not any(map(measure, g_items)) and len(set(map(key, g_items))) == len(g_items):
        p_items = {key(item): item for item in p_items}.values()  # a point said again adds nothing
    if len(p_items) != len(g_items):
        return False
    left = list(p_items)
    for wanted in g_items:
        found = next((item for item in left if same(item, wanted)), None)
        if found is None:
            return False
        left.remove(found)
    return True


PLUS_MINUS = re.compile(r" ?\\pm ?")


class Collection(NamedTuple):
    brackets: str
    items: list
    names: list  # of `x = 1, y = 2`; "" where an item has none

    @property
    def is_ordered(self):
        several_names = len(set(self.names)) > 1
        return self.brackets not in ("", "{}") or several_names


COLUMN = "column"  # the brackets of `[[1],[2]]`, which is also `(1, 2)` and `[1, 2]`


def column(brackets, parts):
    """`1` and `2` of the column `[[1],[2]]`, else None."""
    rows = [items(part) for part in parts]
    if brackets == "[]" and all(around == "[]" and len(row) == 1 for around, row in rows):
        return [row[0] for _, row in rows]
    return None


@reader
def collection(text):
    r"""`1, 2`, `{1, 2}`, `x = 1 or x = 2`, `n = 1, 2, 3`, `3 \pm 2`; None where it is one thing."""
    brackets, parts = items(text)
    if number(text):
        return None  # `45,000`
    if brackets == "()" and len(both_signs(text)) > 1:
        brackets = ""
        parts = both_signs(text)  # `(\pm 1, 0)`: two points
    if column(brackets, parts):
        parts = column(brackets, parts)
        brackets = COLUMN
    names = []
    values = []
    for part in parts:
        name, value = assignment(part) or ("", part)
        for each in both_signs(value):
            names.append(name)
            values.append(each)
    if set(names[1:]) == {""}:
        names = [names[0]] * len(names) if names[0] else names  # `n = 1, 2, 3`
    return Collection(brackets, values, names) if len(values) > 1 else None


def both_signs(text):
    r"""`3 \pm 2` -> `3+2`, `3-2`; of two signs nobody knows which go together."""
    if len(PLUS_MINUS.findall(text)) != 1:
        return [text]
    return [PLUS_MINUS.sub("+", text).lstrip("+"), PLUS_MINUS.sub("-", text)]


def same_collection(p, g):
    """`x=2, x=1` and `{1, 2}`; `(1, 2)` is neither `(2, 1)` nor `[1, 2]`."""
    p_list = collection(p)
    g_list = collection(g)
    if not (p_list and g_list):
        return None
    if bool(OR.search(p)) != bool(OR.search(g)) and not are_solutions(p_list, g_list, p + g):
        return False
    if are_alternatives(p) and is_point(g_list) or are_alternatives(g) and is_point(p_list):
        return False
    p_names = set(p_list.names) - {""}
    g_names = set(g_list.names) - {""}
    if p_names and g_names:
        if p_names != g_names:
            return False
        return match(named(p_list), named(g_list))
    different = p_list.brackets != g_list.brackets
    if different and HALF_OPEN & {p_list.brackets, g_list.brackets}:
        return False
    both = p_list.brackets and g_list.brackets
    if both and different and "{}" in (p_list.brackets, g_list.brackets):
        return False  # a set is no point
    matrix = COLUMN in (p_list.brackets, g_list.brackets)
    if both and different and len(g_list.items) == 2 and not matrix:
        return False  # other ends of an interval
    if p_list.is_ordered or g_list.is_ordered:
        if len(p_list.items) != len(g_list.items) or len(p_list.items) * 2 > MAX_ITEMS:
            return False
        return all(same(a, b) for a, b in zip(p_list.items, g_list.items, strict=True))
    return match(p_list.items, g_list.items)


HALF_OPEN = {"(]", "[)"}
POINT = re.compile(r"([A-Z]) ?(\([^()]*,[^()]*\))")


def same_point(p, g):
    """`P(3, 4)` and `(3, 4)`, but not `Q(3, 4)`."""
    p_point = POINT.fullmatch(p)
    g_point = POINT.fullmatch(g)
    if not (p_point or g_point):
        return None
    if p_point and g_point and p_point[1] != g_point[1]:
        return False
    return same(p_point[2] if p_point else p, g_point[2] if g_point else g)


OR = re.compile(r"\bor\b")
AND = re.compile(r"\band\b")


def are_solutions(p_list, g_list, texts):
    """`x = 1 or x = 2` lists values, as `1, 2` does; `red or blue` does not, nor `1 and 2`."""
    return not AND.search(texts) and not any(map(is_words, p_list.items + g_list.items))


def are_alternatives(text):
    r"""`3 or 4`, `\pm 3`."""
    return bool(OR.search(text) or PLUS_MINUS.search(text))


def is_point(several):
    return several.brackets in ("()", "[]")


def named(several):
    return [f"{name} = {value}" for name, value in zip(several.names, several.items, strict=True)]


# -------------------------------------------------------------- equations and formulas
EQUALS = re.compile(r"(?<![<>!\\])=")
LEFT_SIDE = re.compile(  # `x`, `f(x)`, `x_{1}`, `AB`, `\\angle A`, `(u1, u2)`, `total area`
    r"(?=.*[A-Za-z])(?:\\[A-Za-z]+ ?|[^\d+*^<>|_ \\-]|, |_\{[^{}]*\}|_\w|(?<=[A-Za-z])\d)+|[a-z ]+"
)
FUNCTION_OF = re.compile(r"[a-zA-Z]\([a-z]\)")


@reader
def assignment(text):
    """(name, value) of `x = 7`, `f(x) = ...`, `(p, q) = (3, 2)`; of `a = b = c` the last value.

    A sum that was done, `3 + 4 = 7`, has no name.
    """
    sides = EQUALS.split(text)
    if len(sides) < 2 or len(items(text)[1]) > 1:
        return None
    if LEFT_SIDE.fullmatch(sides[0].strip()):
        return key(sides[0].strip()), sides[-1].strip()
    if len(sides) == 2 and number(sides[0].strip()) and re.fullmatch(NAME, sides[1].strip()):
        return key(sides[1].strip()), sides[0].strip()  # `5 = x`
    if not re.search(r"(?<![\\A-Za-z])[A-Za-z]", sides[0]):
        return "", sides[-1].strip()
    return None


def is_equation(text):
    """`2x + y = 3`."""
    return bool(EQUALS.search(text)) and len(items(text)[1]) == 1 and assignment(text) is None


def same_assignment(p, g):
    """`x = 7` and `7`, but not `y = 7`; `y = 2x` and `f(x) = 2x`."""
    p_name, p_value = assignment(p) or ("", p)
    g_name, g_value = assignment(g) or ("", g)
    if p_value is p and g_value is g:
        return None
    if is_equation(p) or is_equation(g):
        return None  # beside `y = 2x`: for algebra
    if p_name and g_name and p_name != g_name:
        functions = [name for name in (p_name, g_name) if FUNCTION_OF.fullmatch(name)]
        if not functions or "y" not in (p_name, g_name):
            return False if measure(p_value) or measure(g_value) else None
    if p_name != g_name and re.fullmatch("[A-Za-z]+", g_value):
        return None  # `AB = CD` gives no value
    return same(p_value, g_value)


def same_quotient_of_formulas(p, g):
    r"""`1:\sqrt{2}` and `\frac{\sqrt{2}}{2}`; two numbers with a colon are no such thing."""
    p_terms = p.split(":")
    g_terms = g.split(":")
    if max(len(p_terms), len(g_terms)) != 2 or ratio(p) or ratio(g):
        return None
    if not all(map(parse, p_terms + g_terms)):
        return None
    return same_formula(quotient(p_terms), quotient(g_terms))


def quotient(terms):
    return "/".join(f"({term})" for term in terms)


CODE = re.compile(  # `5-4-3-2-1`, `04/02/2005`, the size `3 \\times 4`: nothing to work out
    r"\d+(?:([-/])\d+)(?:\1\d+)+|\d+(?: ?\\times ?\d+)+"
)


def same_code(p, g):
    """Equal codes are equal texts, which were compared before."""
    return False if CODE.fullmatch(p) or CODE.fullmatch(g) else None


def same_formula(p, g):
    """Mathematics on both sides, each read to its end."""
    if is_words(p) and is_words(g):
        return None  # though `ab` could be a product
    p_tree = parse(p)
    g_tree = parse(g)
    if p_tree is None or g_tree is None:
        return None
    if p_tree == g_tree:
        return True
    if symbols(p_tree) != symbols(g_tree) or is_relation(p_tree) != is_relation(g_tree):
        return False
    tolerance = max(number(text).tolerance if number(text) else 0 for text in (p, g))
    return math_worker.ask(p_tree, g_tree, tolerance)


KINDS = (
    same_choice,
    same_letters,
    same_truth,
    same_numbered,
    same_clock,
    same_opening_hours,
    same_date,
    same_place_in_order,
    same_ratio,
    same_range,
    same_bound,
    same_measure,
    same_decimal_comma,
    same_angle,
    same_quantity,
    same_union,
    same_point,
    same_collection,
    same_interval,
    same_chain,
    same_assignment,
    same_quotient_of_formulas,
    same_code,
    same_formula,
)


def deciding_kind(p, g):
    """The name of the kind of answer that decides about two cleaned texts, as `measure` of
    `same_measure`; None where they can only be compared as texts. Not as a formula about a word:
    `car` could be a product, and is none."""
    for kind in KINDS:
        if kind is same_formula and (is_words(p) or is_words(g)):
            continue
        if kind(p, g) is not None:
            return kind.__name__.removeprefix("same_")
    return None


def is_decided(p, g):
    return deciding_kind(p, g) is not None
