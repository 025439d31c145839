r"""Is an answer the reference? `equivalent(pred, gold, choices)`.

Both texts get one spelling (`clean`). Then each kind of answer, in the order of `KINDS`, looks at
the pair: it says True or False where both are of its kind, None where they are not, or ASK where
only algebra can tell. What no kind decides goes to Math-Verify (extra `math`), in a process of its
own (engine/math_worker.py). The rest is the standard library.

Conventions, where verifiers differ:

| what | taken as | why |
|---|---|---|
| 10% | 10 and 0.1, but 0.1% is not 0.1 | both are ways to write a share |
| a unit left out on one side | ignored | references are inconsistent; two units must be the same |
| lists and {sets} | without order | "x = 1 or x = 2" has none |
| (tuples), [lists] | in order; a bare list is both | points and vectors have one |
| [1,2), (1,2], (1,2) | different | they are |
| a rounded decimal | equal to a fraction from six significant digits on | 0.67 may be a wrong 2/3 |
| 1000,99 | a decimal where the reference is a number | a list of two is no number |
| articles, case, punctuation of words | free | they carry no answer |
| more than MAX_CHARS | wrong | no answer is so long |
"""

import functools
import re
from fractions import Fraction
from typing import NamedTuple

from engine.old_math_worker import math_verify

MAX_CHARS = 4000
MAX_DEPTH = 20  # of brackets
MAX_ITEMS = 64  # of both lists together
ASK = "ask Math-Verify"


def equivalent(pred, gold, choices=()):
    """Is `pred` the answer `gold`? `choices`: the options' texts in order.

    What is blank or no text equals nothing.
    """
    if not (is_answer(pred) and is_answer(gold)):
        return False
    p = clean(pred)
    g = clean(gold)
    options = [clean(str(choice)[:MAX_CHARS]) for choice in choices or ()]
    right = option(g, options)
    if right is not None:
        chosen = option(p, options)
        others = [text for i, text in enumerate(options) if i != right]
        if chosen is not None or any(same(p, text) is True for text in others):
            return chosen == right
        g = options[right]
        gold = str(choices[right])
    verdict = same(p, g)
    if verdict is ASK:
        return math_verify(pred.translate(UNICODE), gold.translate(UNICODE))
    return verdict


def is_answer(text):
    return isinstance(text, str) and len(text) <= MAX_CHARS and bool(text.strip())


# -------------------------------------------------------------------------------- spelling
# Patterns may meet any text of MAX_CHARS characters: each takes at worst quadratic time.
FULL_WIDTH = {chr(0xFF01 + i): chr(0x21 + i) for i in range(94)}
SYMBOLS = {
    "\u00a0": " ",
    "\u2009": " ",
    "\u202f": " ",
    "−": "-",
    "–": "-",
    "²": "^2",
    "³": "^3",
    "½": " 1/2",
    "÷": "/",
    "·": r"\cdot ",
    "×": r"\times ",
    "π": r"\pi ",
    "√": r"\sqrt ",
    "∞": r"\infty ",
    "≤": r"\le ",
    "≥": r"\ge ",
    "≠": r"\ne ",
    "≈": r"\approx ",
    "±": r"\pm ",
    "∪": r"\cup ",
    "∈": r"\in ",
}
UNICODE = str.maketrans(FULL_WIDTH | SYMBOLS)
BOX = re.compile(r"\\+f?box(?:ed)?\s*\{((?:[^{}]|\{(?:[^{}]|\{(?:[^{}]|\{[^{}]*\})*\})*\})*)\}")


class Rewrite(NamedTuple):
    what: str
    pattern: str
    by: str
    before: str  # an example, and what becomes of it
    after: str


REWRITES = (
    Rewrite("a backslash escaped", r"\\\\(?=[a-zA-Z])", r"\\", r"\\frac", r"\frac"),
    Rewrite("dollars", r"(?<!\\)\$\$?((?:[^$\\]|\\.)*)\$\$?", r" \1 ", "$x$", " x "),
    Rewrite("comma of thousands", r",\\!\s*|\{,\}(?:\\!)?", ",", "1{,}234", "1,234"),
    Rewrite(
        "size and delimiters",
        r"\\(?:left|right|displaystyle)(?![a-zA-Z])|\\!|\{\}|(?<!\\)\\[()\[\]]",
        "",
        r"\left(1\right)",
        "(1)",
    ),
    Rewrite("fractions", r"\\[dtc]frac(?![a-zA-Z])", r"\\frac", r"\dfrac12", r"\frac12"),
    Rewrite("spaces", r"\\[,;: ]|~|\\q?quad(?![a-zA-Z])|\s+", " ", r"5\,cm", "5 cm"),
    Rewrite("escapes", r"\\([{}%$&#])", r"\1", r"50\%", "50%"),
    Rewrite("relations", r"\\([lg])e(?:q|qslant)?(?![a-zA-Z])", r"\\\1e ", r"\leq3", r"\le 3"),
    Rewrite(
        "text and fonts",
        r"\\(?:text\w*|math(?:rm|bf|it|sf)|mbox|operatorname) ?\{([^{}]*)\}",
        r" \1 ",
        r"\text{cm}",
        " cm ",
    ),
    Rewrite("roots", r"\\sqrt ?(\w)", r"\\sqrt{\1}", r"\sqrt2", r"\sqrt{2}"),
    Rewrite(
        "degrees",
        r"\^ ?\{? ?\\circ ?\}?|\\(?:degree|circ)(?![a-zA-Z])",
        "°",
        r"90^{\circ}",
        "90°",
    ),
    Rewrite(
        "short fractions", r"\\frac ?(\d) ?(\d)", r"\\frac{\1}{\2}", r"\frac12", r"\frac{1}{2}"
    ),
    Rewrite("runs of blanks", " +", " ", "a  b", "a b"),
    Rewrite("powers", r" ?\^ ?", "^", "x ^ 2", "x^2"),
    Rewrite(
        "squares",
        r"(?i)\b(?:square|sq) ([a-z]+)|\b([a-z]+) squared\b",
        r"\1\2^2",
        "5 square meters",
        "5 meters^2",
    ),
    Rewrite("cubes", r"(?i)\bcubic ([a-z]+)", r"\1^3", "cubic cm", "cm^3"),
    Rewrite("thousand", r"(?i)(?<=\d) thousand\b", "*10^3", "5 thousand", "5*10^3"),
    Rewrite("million", r"(?i)(?<=\d) million\b", "*10^6", "5 million", "5*10^6"),
    Rewrite("billion", r"(?i)(?<=\d) billion\b", "*10^9", "5 billion", "5*10^9"),
    Rewrite("currency in front", r"([$€£]) ?(\d[\d.,]*(?:\*10\^\d)?)", r"\2 \1", "$10", "10 $"),
    Rewrite("per", " per | ?/ ?", "/", "km per h", "km/h"),
    Rewrite("what approximates it", r"(?<=[\d}]) ?\\approx.*", "", r"\pi/2 \approx 1.57", r"\pi/2"),
    Rewrite("is about", r"\\approx", "=", r"x \approx 3", "x = 3"),
    Rewrite(
        "what leads to it",
        r"(?i)^.*\b(?:answer|result|option|choice)(?: is\b| ?:| ?=) ?:? ?(?=\S)",
        "",
        "So the answer is 7",
        "7",
    ),
    Rewrite("quotes and stops", r"^[*`\"“ ]+|[*`\"” .,;:]+$", "", "**B**.", "B"),
)
COMPILED = [(re.compile(rewrite.pattern), rewrite.by) for rewrite in REWRITES]


def clean(text):
    """One spelling of what LaTeX, Markdown and Unicode write in several ways, without wrappings."""
    text = unbox(text.translate(UNICODE))
    for pattern, by in COMPILED:
        text = pattern.sub(by, text.strip())
    return unwrap(text)


def unbox(text):
    r"""`so x = \boxed{3}` -> `3`; of several boxes all stay, where they are."""
    boxes = BOX.findall(text)
    while boxes:
        text = boxes[0] if len(boxes) == 1 else BOX.sub(r"\1", text)
        boxes = BOX.findall(text)
    return text


def unwrap(text):
    """`((x + 1))` -> `x + 1`: no brackets around one thing."""
    brackets, parts = items(text)
    while brackets in ("()", "{}") and len(parts) == 1:
        text = parts[0]
        brackets, parts = items(text)
    return text


WORDS = re.compile(r"[A-Za-z\s'\",.!?:;-]*[A-Za-z]{2}[A-Za-z\s'\",.!?:;-]*")  # `a dog, asleep`
ARTICLE = re.compile(r"\b(?:an?|the)\b(?=.*[a-z])")  # in front of something: the grade `a` is none
PROSE = re.compile(r"(?:(?<![\\A-Za-z])(?!and\b|or\b)[A-Za-z]{2,}(?![A-Za-z]).*?){4}")  # four words


def key(text):
    """What has to be alike: of words no case, articles, punctuation; of other texts no spaces."""
    if WORDS.fullmatch(text):
        return "".join(re.findall("[a-z]+", ARTICLE.sub("", text.lower())))
    without_braces = re.sub(r"\{(\w)\}", r"\1", text)
    return re.sub(r"(?<!\d) +| +(?!\d)", "", without_braces)


# -------------------------------------------------------------------------------- readings
# Each reads a cleaned text, and gives None where it does not apply.
LETTER = re.compile(r"(?:[Oo]ption |[Cc]hoice )?[(\[]?([A-Ja-j])[)\]]?[.:]?")  # `B`, `(b)`, `B.`
LABELLED = re.compile(r"(?:\((?=[A-J]\)))?([A-J])(?:\) ?|[.:] )(?![( ])(.+)")  # `(B) the dog`
SEVERAL = re.compile(r"\b[A-J][).:]|^(?:and|or)\b|^[A-J]\W+[A-J]\b")  # `(A) B) ...`, `A. or B`


def label(text):
    """(letter, text): `b` -> ("B", ""), `(B) the dog` -> ("B", "the dog")."""
    alone = LETTER.fullmatch(text)
    if alone:
        return alone[1].upper(), ""
    labelled = LABELLED.fullmatch(text)
    if labelled and not SEVERAL.search(labelled[2]):
        return labelled.groups()
    return None


def option(text, options):
    """Index of the option named by its letter or its text; -1 where the two disagree."""
    names = [key(each) for each in options]
    letter, rest = label(text) or ("", "")
    lettered = None
    if letter and ord(letter) - ord("A") < len(options):
        lettered = ord(letter) - ord("A")
    if key(text) in names and (rest or lettered is None):
        return names.index(key(text))
    if lettered is not None and key(rest) in names and key(rest) != names[lettered]:
        return -1
    return lettered


TRUTH = re.compile(  # `Yes, it is`, `The statement is false.`; not `yes or no`
    r"(?i)(?:[a-z ]* is )?(?:(yes|true)|no|false)(?=$|[.,;:!])(?!.*\b(?:yes|no|true|false)\b)"
)


def truth(text):
    found = TRUTH.match(text)
    return bool(found[1]) if found else None


NUMBER = re.compile(
    r"(?P<sign>[+-]?) ?(?!0+:)"  # `0:30` is a time
    r"(?:(?P<whole>\d+) (?=\d+/))?"  # `2 1/2`
    r"(?P<digits>(?:\d{1,3}(?:,\d{3})+|\d{1,3}(?: \d{3})+|\d+)?(?:\.\d+)?(?<=\d))"  # `1,234.5`
    r"(?:(?:[eE]| ?(?:\\times|\\cdot|[*x]) ?10\^)\{?(?P<shift>[+-]?\d{1,3})\}?"  # `1e5`, `2 x 10^5`
    r"|\^\{?(?P<power>-?\d{1,3})\}?"  # `10^5`
    r"| ?(?:/|:(?! ?0)) ?(?P<divisor>\d+(?:\.\d+)?))?"  # `1/2`, the ratio `1:2`; `12:05` is a time
)
FRACTION = re.compile(r" ?\\frac ?\{([^{}]+)\} ?\{([^{}]+)\}")


def number(text):
    """(value, tolerance) of a number, fraction, mixed number, ratio or power."""
    found = NUMBER.fullmatch(FRACTION.sub(r" \1/\2", text).strip(" {}"))
    if not found:
        return None
    digits = re.sub("[, ]", "", found["digits"])
    power = int(found["power"] or 1)
    divisor = Fraction(found["divisor"] or 1)
    if not divisor or (found["power"] and (len(digits) > 9 or not Fraction(digits))):
        return None
    shift = int(found["shift"] or 0)
    value = (Fraction(digits) * Fraction(10) ** shift) ** power / divisor
    value += int(found["whole"] or 0)
    if found["sign"] == "-":
        value = -value
    significant = len(digits.replace(".", "").lstrip("0"))
    if "." not in digits or found["divisor"] or significant < 6:
        return value, 0
    decimals = len(digits.partition(".")[2])
    return value, Fraction(10) ** (shift - decimals)


UNIT_NAMES = (
    "m meter metre,km kilometer kilometre,cm centimeter centimetre,mm millimeter millimetre,"
    "in inch inche,ft foot feet,yd yard,mi mile,g gram,kg kilogram,mg milligram,lb pound,oz ounce,"
    "l liter litre,ml milliliter,s sec second,min minute,h hr hour,"
    "° deg degree,$ dollar usd,€ euro,£,% percent percentage pct"
)
UNITS = {}
for names in UNIT_NAMES.split(","):
    for name in names.split():
        UNITS[name] = names.split()[0]
NO_UNIT = set(
    "or and is are not of to the than times more less plus minus by if so because but maybe".split()
)
TAIL = re.compile(  # `5 km/h`, `5 m^2`, `5 red apples`: up to six words behind the rest
    r"(?<![A-Za-z°%$€£\\])[A-Za-z°%$€£]++(?:\^?\{?-?\d\}?)?"
    r"(?:[ /][A-Za-z°$]++(?:\^?\{?-?\d\}?)?){0,5}$"
)


def split_unit(text):
    """(text without its unit, the unit or ""); any word can be the unit of a number."""
    tail = TAIL.search(text)
    core = text[: tail.start()].strip() if tail else ""
    if not core:
        return text, ""
    words = re.findall(r"[a-z]+|[°%$€£/]|-?\d", tail[0].lower())
    names = [unit_name(word) for word in words]
    strange = [name for name in names if name.isalpha() and name not in UNITS]
    if strange:
        too_short = min(map(len, strange)) < 3
        if too_short or not number(core) or NO_UNIT.intersection(words):
            return text, ""
    return core, " ".join(names)


def unit_name(word):
    singular = word.removesuffix("s")
    return UNITS.get(word) or UNITS.get(singular, singular)


MARKS = re.compile(r"[(\[{]|[)\]}]|;|,(?: ?and\b| ?or\b)?|(?<![A-Za-z\\])(?:and|or)\b")


def items(text):
    """(the brackets around all of it or "", its parts between top-level commas or semicolons)."""
    depth = 0
    end = None  # of the brackets that begin the text
    cuts = {}  # where to cut, by (depth, is it a semicolon)
    for mark in MARKS.finditer(text):
        if mark[0] in "([{":
            depth += 1
        elif mark[0] in ")]}":
            depth -= 1
            if depth == 0 and end is None:
                end = mark.end()
        else:
            cuts.setdefault((depth, mark[0] == ";"), []).extend(mark.span())
    inner = 1 if end == len(text) and text[0] in "([{" else 0
    inside = cuts.get((inner, True)) or cuts.get((inner, False), [])
    ends = [inner, *inside, len(text) - inner]
    pieces = [text[a:b].strip() for a, b in zip(ends[::2], ends[1::2], strict=True)]
    brackets = text[0] + text[-1] if inner else ""
    return brackets, [piece for piece in pieces if piece]


EQUALS = re.compile(r"(?<![<>!\\])=")
NAME = re.compile(r"(?=.*[A-Za-z])(?:[^\d+*^<>|_-]|_\{[^{}]*\}|_\w)+")  # `x`, `f(x)`, `x_{1}`, `AB`


def assignment(text):
    """(name, value) of `x = 7`, `f(x) = ...`, `(p, q) = (3, 2)`; of `a = b = c` the last value."""
    sides = EQUALS.split(text)
    if len(sides) > 1 and NAME.fullmatch(sides[0]) and len(items(text)[1]) == 1:
        return key(sides[0]), sides[-1].strip()
    return None


# -------------------------------------------------------------------------------- kinds
@functools.lru_cache(maxsize=1 << 14)
def same(p, g):
    """Are two cleaned texts one answer? True, False, or ASK."""
    for kind in KINDS:
        verdict = kind(p, g)
        if verdict is not None:
            return verdict
    return ASK


def same_text(p, g):
    """`The dog` and `dog`; nothing equals nothing, and nothing deeper than MAX_DEPTH is read."""
    if key(p) == key(g) != "":
        return True
    labelled = label(p)
    if labelled and labelled[1] and not label(g) and same(labelled[1], g) is True:
        return True
    if not p or not g or "()" in p or max(map(p.count, "([{")) > MAX_DEPTH:
        return False
    return None


def same_choice(p, g):
    """`(B) the dog` and `B`, or `the dog`; a letter is nothing but a letter."""
    p_label = label(p)
    g_label = label(g)
    if not g_label:
        return None
    if not p_label:
        return same(p, g_label[1])
    if p_label[0] != g_label[0]:
        return False
    both = p_label[1] and g_label[1]
    return not (both and same(p_label[1], g_label[1]) is False)


def same_truth(p, g):
    """`No, it is not` and `False`."""
    if truth(g) is None:
        return None
    return truth(p) == truth(g)


def same_percentage(p, g):
    """10% is 0.1 and, where it cannot be meant as a proportion, 10."""
    p_core, p_unit = split_unit(p)
    g_core, g_unit = split_unit(g)
    p_number = number(p_core)
    g_number = number(g_core)
    if not (p_number and g_number and "%" in (p_unit, g_unit) and "" in (p_unit, g_unit)):
        return None
    share, plain = (p_number[0], g_number[0]) if p_unit else (g_number[0], p_number[0])
    return share == plain * 100 or share == plain >= 1


def same_unit(p, g):
    """`5 kg` is not `5 lb`."""
    p_unit = split_unit(p)[1]
    g_unit = split_unit(g)[1]
    return False if p_unit and g_unit and p_unit != g_unit else None


def same_number(p, g):
    """`0.5 cm` and `1/2`."""
    p_number = number(split_unit(p)[0])
    g_number = number(split_unit(g)[0])
    if not (p_number and g_number):
        return None
    tolerance = max(p_number[1], g_number[1])
    return p_number[0] == g_number[0] or abs(p_number[0] - g_number[0]) < tolerance


def same_collection(p, g):
    """`x=2, x=1` and `{1, 2}`; `(1, 2)` is neither `(2, 1)` nor `[1, 2]`."""
    p_brackets, p_items = items(p)
    g_brackets, g_items = items(g)
    p_number = number(split_unit(p)[0])
    g_number = number(split_unit(g)[0])
    if len(p_items) < 2 or len(g_items) < 2 or p_number or g_number:
        return None
    if len(p_items + g_items) > MAX_ITEMS or any(map(PROSE.search, p_items + g_items)):
        return ASK
    brackets = [kind not in ("", "{}") for kind in (p_brackets, g_brackets)]
    p_names = {name[0] for name in map(assignment, p_items) if name}
    g_names = {name[0] for name in map(assignment, g_items) if name}
    several_names = max(len(p_names), len(g_names)) > 1 and not (p_names and g_names)
    if any(brackets) or several_names:  # in order; k=45, n=2 gives 45, 2 an order
        if len(p_items) != len(g_items):
            return False
        if all(brackets) and p_brackets != g_brackets and len(g_items) == 2:
            return False  # other ends of an interval
        if "{}" in (p_brackets, g_brackets):
            return ASK
        verdicts = [[same(a, b)] for a, b in zip(p_items, g_items, strict=True)]
    else:
        found = [[same(a, b) for a in p_items] for b in g_items]
        verdicts = found + [[same(a, b) for b in g_items] for a in p_items]
    if any(set(row) == {False} for row in verdicts):
        return False
    return True if all(True in row for row in verdicts) else ASK


def is_word(text):
    return WORDS.fullmatch(text) is not None


SCORE = re.compile(r"#\d+ ?: ?\d+#\d+ ?: ?\d+")


def of_two_kinds(p, g):
    """`the dog` and `7`, `7` and `7, 8`: answers of two kinds, which nothing makes equal."""
    p_number = number(split_unit(p)[0])
    g_number = number(split_unit(g)[0])
    g_word = is_word(g) and len(g) > 2
    if (is_word(p) and (g_word or g_number)) or (g_word and p_number):
        return False
    if SCORE.fullmatch(f"#{p}#{g}"):  # times
        return False
    p_several = len(items(p)[1]) > 1
    g_several = len(items(g)[1]) > 1
    if (p_several and g_number) or (g_several and p_number):
        decimal_comma = re.fullmatch(r"-?\d+,\d+", p)
        return ASK if PROSE.search(p) or decimal_comma else False
    return None


def same_assignment(p, g):
    """`x = 7` and `7`, but not `y = 7`."""
    p_name = assignment(p)
    g_name = assignment(g)
    if not (p_name or g_name):
        return None
    if p_name and g_name and p_name[0] != g_name[0] and len(p_name[0] + g_name[0]) == 2:
        return False if number(p_name[1]) and number(g_name[1]) else ASK
    return same(p_name[1] if p_name else p, g_name[1] if g_name else g)


def same_without_unit(p, g):
    r"""`2\pi\text{ cm}` and `2\pi`."""
    p_core, p_unit = split_unit(p)
    g_core, g_unit = split_unit(g)
    if (p_unit or g_unit) and not (TAIL.search(p_core) or TAIL.search(g_core)):
        return same(p_core, g_core)
    return None


KINDS = (
    same_text,
    same_choice,
    same_truth,
    same_percentage,
    same_unit,
    same_number,
    same_collection,
    of_two_kinds,
    same_assignment,
    same_without_unit,
)
