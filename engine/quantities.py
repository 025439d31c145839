r"""Answers with a value: numbers, measures, ranges, ratios.

Each kind has a reader, which gives None for another kind of text, and a function `same_...(p, g)`:
True or False where it decides about two texts, None where it does not.
"""

import math
import re
from fractions import Fraction
from typing import NamedTuple

from engine.number_words import spelled
from engine.times import clock
from engine.units import LETTER, NONE, ONE_NAME, WORD, Unit, reader, unit

SIGNIFICANT = 6  # digits from which on a decimal may be a rounded value
DIGITS_OF_A_FLOAT = 15  # what a program prints beyond them is noise


# -------------------------------------------------------------- numbers
class Number(NamedTuple):
    value: Fraction
    tolerance: Fraction = Fraction(0)  # of a rounded value


NUMBER = re.compile(
    r"(?P<sign>[+-]?) ?"
    r"(?:(?P<whole>\d+) (?=\d+/))?"  # `2 1/2`
    r"(?P<digits>(?:\d{1,3}(?:,\d{3})+|\d{1,3}(?: \d{3})+|\d+)?(?:\.\d+)?(?<=\d))"  # `1,234.5`
    r"(?:(?:[eE]| ?(?:\\times|\\cdot|[*x]) ?10\^)\{?(?P<shift>[+-]?\d{1,3})\}?"  # `1e5`, `2 x 10^5`
    r"|\^\{?(?P<power>-?\d{1,3})\}?"  # `10^5`
    r"| ?/ ?(?P<divisor>\d+(?:\.\d+)?)"  # `1/2`
    r"|(?P<scale>[kKMB]))?"  # `5M`
)
SCALES = {"k": 10**3, "K": 10**3, "M": 10**6, "B": 10**9}
FRACTION = re.compile(r" ?\\frac ?\{([^{}]+)\} ?\{([^{}]+)\}")
PERIODIC = re.compile(r"(\d+\.\d*)\\(?:overline|bar|dot) ?\{?(\d{1,9})\}?")
REPEATED = re.compile(r"(\d+\.\d*?)(\d{1,9}?)\2{2,}\.\.\.")  # `0.333...`


@reader
def number(text):
    r"""`-1,234.5`, `1/2`, `2 1/2`, `1e5`, `10^5`, `5M`, `0.\overline{3}`, `forty-two`."""
    in_words = spelled(text.removeprefix("-"))
    if in_words is not None:
        return Number(-in_words if text.startswith("-") else in_words)
    periodic = PERIODIC.fullmatch(text) or REPEATED.fullmatch(text)
    if periodic:
        return Number(periodic_value(*periodic.groups()))
    found = NUMBER.fullmatch(FRACTION.sub(r" \1/\2 ", text).strip(" {}"))
    if not found:
        return None
    digits = re.sub("[, ]", "", found["digits"])
    power = int(found["power"] or 1)
    divisor = Fraction(found["divisor"] or 1)
    if not divisor or (found["power"] and (len(digits) > 9 or not Fraction(digits))):
        return None
    shift = int(found["shift"] or 0)
    value = (Fraction(digits) * Fraction(10) ** shift) ** power / divisor
    value *= SCALES.get(found["scale"], 1)
    value += int(found["whole"] or 0)
    if found["sign"] == "-":
        value = -value
    significant = len(digits.replace(".", "").lstrip("0"))
    if "." not in digits or found["divisor"] or significant < SIGNIFICANT:
        return Number(value)
    decimals = len(digits.partition(".")[2])
    tolerance = Fraction(10) ** (shift - decimals)
    if significant > DIGITS_OF_A_FLOAT:
        tolerance = max(tolerance, abs(value) / 10**DIGITS_OF_A_FLOAT * 10)
    return Number(value, tolerance)


def periodic_value(start, period):
    """ "0.1" and "6" -> 1/6."""
    decimals = len(start.partition(".")[2])
    repeated = Fraction(int(period), 10 ** len(period) - 1)
    return Fraction(start + "0") + repeated / 10**decimals


def close(a, b):
    return a.value == b.value or abs(a.value - b.value) < max(a.tolerance, b.tolerance)


# -------------------------------------------------------------- measures
class Measure(NamedTuple):
    number: Number
    unit: Unit = NONE

    def in_base_units(self):
        value, tolerance = self.number
        return Number(value * self.unit.size, tolerance * self.unit.size)


UNIT_WORD = rf"{WORD}(?:\^?\{{?-?\d\}}?)?"
UNIT_TAIL = re.compile(  # `km/h`, `m^2`, `red apples`: up to seven words behind something else
    rf"(?<![{LETTER}\\\\^_{{'-]){UNIT_WORD}"
    rf"(?:(?: ?(?:\\cdot|[*/]) ?| ){UNIT_WORD}){{0,6}}$"
)
UNKNOWN = re.compile(r"(?<![\\A-Za-z])[A-Za-z](?![A-Za-z])")
DECADE = re.compile(r"\d{3}0s")  # `1990s`, which are no seconds
PERCENT = unit("%")
HOUR = unit("h")
MINUTE = unit("min")
HOMONYMS = [{unit(first), unit(second)} for first, second in ONE_NAME]
PART = rf"(\d+(?:\.\d+)?) ?({WORD})(?:,? and |,? ?)"
PARTS = re.compile(rf"(?:{PART}){{2,4}}")  # `3 h 20 min`, `5 feet and 3 inches`


@reader
def split_unit(text):
    """(what is left of it, the unit behind it), where that is a number or the unit a known one."""
    tail = None if DECADE.fullmatch(text) else UNIT_TAIL.search(text)
    while tail:
        core = text[: tail.start()].strip()
        found = unit(tail[0])
        if len(tail[0]) == 1 and UNKNOWN.search(core) and not number(core):
            break  # `2\pi r h`
        if core and found and (found.known or number(core)):
            return core, found
        tail = UNIT_TAIL.search(text, tail.start() + 1)
    return text, NONE


@reader
def measure(text):
    """`5 km/h`, `3 h 20 min`, `10 $`, `three apples`, or a number alone."""
    alone = number(text)
    if alone:
        return Measure(alone)
    total = sum_of_parts(re.findall(PART, text)) if PARTS.fullmatch(text) else None
    if total:
        return total
    core, found = split_unit(text)
    value = number(core)
    return Measure(value, found) if value and found != NONE else None


def sum_of_parts(parts):
    """In the last part's unit; each part's is smaller than the one before, and of its kind."""
    total = Fraction(0)
    last = None
    for digits, name in parts:
        found = unit(name)
        if name == "m" and last == HOUR:
            found = MINUTE
        if not found or not found.known:
            return None
        if last and (found.bases != last.bases or found.size >= last.size):
            return None
        total += Fraction(digits) * found.size
        last = found
    return Measure(Number(total / last.size), last)


def same_measure(p, g):
    """`0.5 cm` and `1/2`, `5 km` and `5000 m`; not `5 km` and `5 m`, `5 apples` and `5 pears`."""
    p_measure = measure(p)
    g_measure = measure(g)
    if not (p_measure and g_measure):
        return None
    return measures_agree(p_measure, g_measure)


def measures_agree(a, b):
    if a.unit == PERCENT and b.unit == NONE:
        return same_share(a.number.value, b.number.value)
    if b.unit == PERCENT and a.unit == NONE:
        return same_share(b.number.value, a.number.value)
    if NONE in (a.unit, b.unit):
        return close(a.number, b.number)
    if a.unit.bases == b.unit.bases:
        return close(a.in_base_units(), b.in_base_units())
    return {a.unit, b.unit} in HOMONYMS and close(a.number, b.number)


def same_share(percentage, plain):
    """10% is 0.1 and, where it cannot be meant as a proportion, 10."""
    return percentage == plain * 100 or (percentage == plain and abs(plain) >= 1)


# -------------------------------------------------------------- ranges
RANGE = re.compile(  # `3-5`, `from 3 to 5`, `100 - 500 euros`, `42.2%-62.6%`
    r"(?:from )?(?P<low>-?\.?\d[\d.,]*+[^\d-]*?) ?(?:-|\b(?:to|until|through)\b) ?"
    r"(?P<high>-?\.?\d.*)"
)
BETWEEN = re.compile(r"between (?P<low>-?\.?\d[\d.,]*+[^\d-]*?) and (?P<high>-?\.?\d.*)")
SEASON = re.compile(r"([12]\d)(\d\d)(?: ?- ?|/)(\d\d)")  # `2007-08`, `2007/08`


@reader
def range_of(text):
    """(low, high), two measures; the scores `3-1` too. One unit counts for both."""
    season = SEASON.fullmatch(text)
    if season:
        text = f"{season[1]}{season[2]}-{season[1]}{season[3]}"
    found = RANGE.fullmatch(text) or BETWEEN.fullmatch(text)
    low = measure(found["low"].strip()) if found else None
    high = measure(found["high"].strip()) if found else None
    if not (low and high):
        return None
    if low.unit == NONE:
        low = low._replace(unit=high.unit)
    return low, high


def same_range(p, g):
    """`3-5` and `3 to 5`; a range is no number, and no difference."""
    p_range = range_of(p)
    g_range = range_of(g)
    if not (p_range or g_range):
        return None
    if not (p_range and g_range):
        return False
    return all(measures_agree(a, b) for a, b in zip(p_range, g_range, strict=True))


# -------------------------------------------------------------- ratios
@reader
def ratio(text):
    """The numbers of `3:2` or `1:2:3`."""
    parts = [number(part.strip()) for part in text.split(":")]
    return parts if len(parts) > 1 and all(parts) else None


def same_ratio(p, g):
    """`2:4` is `1:2`, and 0.5. A gold that is not in lowest terms is a score: as it is."""
    p_ratio = ratio(p)
    g_ratio = ratio(g)
    if g_ratio and not p_ratio and " to " in p:
        p_ratio = ratio(p.replace(" to ", ":"))
    if p_ratio and g_ratio:
        return not clock(g) and same_terms(values_of(p_ratio), values_of(g_ratio))
    if g_ratio and not in_lowest_terms(values_of(g_ratio)):
        return False
    if p_ratio:
        return same_quotient(p, values_of(p_ratio), g)
    if g_ratio:
        return same_quotient(g, values_of(g_ratio), p)
    return None


def values_of(numbers):
    return [each.value for each in numbers]


def same_terms(p_terms, g_terms):
    if p_terms == g_terms:
        return True
    if len(p_terms) != len(g_terms) or 0 in p_terms or not in_lowest_terms(g_terms):
        return False
    return all(p * g_terms[0] == g * p_terms[0] for p, g in zip(p_terms, g_terms, strict=True))


def in_lowest_terms(terms):
    whole = all(term.denominator == 1 for term in terms)
    return whole and math.gcd(*(term.numerator for term in terms)) == 1


def same_quotient(text, terms, other):
    """`1:2` and `0.5`; of what may be a time only the fraction, `1:12` and `1/12`."""
    value = number(other)
    if len(terms) != 2 or not value or not terms[1]:
        return None
    if clock(text):
        return FRACTION.sub(r"\1/\2", other).strip() == text.replace(":", "/")
    return terms[0] / terms[1] == value.value
