"""Times of day and dates: readers and `same_...(p, g)`, in the form of engine/quantities.py."""

import re
from fractions import Fraction
from typing import NamedTuple

from engine.number_words import ordinal, spelled
from engine.units import reader

# -------------------------------------------------------------- times of day
CLOCK = re.compile(  # `3:30`, `03:30:00`, `3:30 p.m`, `3 pm`, `ten o'clock`
    r"(?i)(\d{1,2}|[a-z]+)(?::(\d\d))?(?::(\d\d))?(?: ?([ap])\.? ?m\.?| ?(o'clock))?"
)
SPOKEN = re.compile(  # `half past three`, `a quarter to 4`, `10 past 11`; `5 to 6` is a range
    r"(?i)(?:a )?([a-z-]+|\d{1,2}(?= (?:minutes|past)))(?: minutes)? (past|after|to|before)"
    r" (\d{1,2}|[a-z]+)"
)
PARTS_OF_AN_HOUR = {"quarter": 15, "half": 30}
MIDDAY = re.compile(r"(?i)(?:12 )?noon")
MIDNIGHT = re.compile(r"(?i)(?:12 )?midnight")


class Clock(NamedTuple):
    hour: int
    minutes: tuple  # and seconds
    half: str  # of the day: "a", "p" or ""

    def hours(self):
        """The hours of the day that it can be."""
        if self.half == "a":
            return {self.hour % 12}
        if self.half == "p":
            return {self.hour % 12 + 12}
        if self.hour > 12 or self.hour == 0:
            return {self.hour}
        return {self.hour % 12, self.hour % 12 + 12}


@reader
def clock(text):
    if MIDDAY.fullmatch(text):
        return Clock(12, (0, 0), "p")
    if MIDNIGHT.fullmatch(text):
        return Clock(12, (0, 0), "a")
    spoken = SPOKEN.fullmatch(text)
    if spoken:
        return clock_as_spoken(*spoken.groups())
    found = CLOCK.fullmatch(text)
    if not found or not (found[2] or found[4] or found[5]):
        return None
    hour = hour_of(found[1])
    minutes = (int(found[2] or 0), int(found[3] or 0))
    half = (found[4] or "").lower()
    if hour is None or max(minutes) > 59 or hour > (12 if half else 24):
        return None
    return Clock(hour, minutes, half)


def hour_of(text):
    if text.isdigit():
        return int(text)
    value = spelled(text)
    return int(value) if value in range(1, 13) else None


def minute_of(text):
    value = Fraction(text) if text.isdigit() else spelled(text)
    return int(value) if value in range(1, 60) else None


def clock_as_spoken(minutes, direction, hour):
    """Of "quarter", "past", "three"."""
    hour = hour_of(hour)
    minutes = PARTS_OF_AN_HOUR.get(minutes.lower()) or minute_of(minutes)
    if hour not in range(1, 13) or minutes not in range(1, 60):
        return None
    if direction.lower() in ("past", "after"):
        return Clock(hour, (minutes, 0), "")
    return Clock(hour - 1 or 12, (60 - minutes, 0), "")


def same_clock(p, g):
    """`3:45 PM` is `15:45`, and `3:45`, which leaves the half of the day open."""
    p_clock = clock(p) or hour_alone(p, clock(g))
    g_clock = clock(g) or hour_alone(g, clock(p))
    if not (p_clock and g_clock):
        return None
    if p_clock.minutes != g_clock.minutes:
        return False
    if not (p_clock.half or g_clock.half):
        return p_clock.hour == g_clock.hour
    return bool(p_clock.hours() & g_clock.hours())


def hour_alone(text, other):
    """`3`, beside `3 pm`."""
    if other and other.half and re.fullmatch(r"\d\d?", text):
        return Clock(int(text), (0, 0), "")
    return None


FROM_TO = re.compile(r"(?i)(?:from )?(.+?) ?(?:-|\b(?:to|until|till)\b) ?(.+)")


@reader
def opening_hours(text):
    """The two times of `9 AM - 5 PM` or `from 6:00 to 7:30`."""
    found = FROM_TO.fullmatch(text)
    if found and clock(found[2]) and (clock(found[1]) or hour_alone(found[1], clock(found[2]))):
        return found.groups()
    return None


def same_opening_hours(p, g):
    """`9am-5pm` and `9 AM to 5 PM`."""
    p_times = opening_hours(p)
    g_times = opening_hours(g)
    if not (p_times and g_times):
        return None
    return all(same_clock(a, b) for a, b in zip(p_times, g_times, strict=True))


# -------------------------------------------------------------- dates
MONTHS = "january february march april may june july august september october november december"
WEEKDAYS = "monday tuesday wednesday thursday friday saturday sunday"
SHORTEST_NAME = 3  # `Jan`, `Thurs`, `Sept`
MONTH = r"(?P<month>[A-Za-z]{3,9})\.?"
DAY = r"(?P<day>\d{1,2})(?:st|nd|rd|th)?"
YEAR = r"(?P<year>\d{4})"
DATES = [
    re.compile(form)
    for form in (
        rf"{MONTH} (?:the )?{DAY}(?:,? {YEAR})?",  # `July 4th, 1776`
        rf"{DAY} (?:of )?{MONTH}(?:,? {YEAR})?",  # `4 July`
        rf"{MONTH},? (?:of )?{YEAR}",  # `Mar 2015`
        r"(?P<year>\d{4})[-/.](?P<month>\d{1,2})[-/.](?P<day>\d{1,2})",  # `2020-05-03`
        r"(?P<year>\d{4})年(?P<month>\d{1,2})月(?:(?P<day>\d{1,2})[日号])?",
        r"(?P<month>\d{1,2})月(?P<day>\d{1,2})[日号]",
    )
]
SLASHED = re.compile(r"(\d{1,2})/(\d{1,2})/(\d{4})")  # of two countries: which one is the month?


def place_of_name(text, names):
    """1 for `Jan` and `january` among MONTHS; None for a text that is none of the names."""
    word = text.lower().removesuffix(".")
    for place, name in enumerate(names.split(), start=1):
        if name.startswith(word) and len(word) >= SHORTEST_NAME:
            return place
    return None


@reader
def date(text):
    """(year, month, day) of a date, with None for what it leaves open."""
    for form in DATES:
        found = form.fullmatch(text)
        if found:
            parts = found.groupdict()
            month = parts["month"]
            month = int(month) if month.isdigit() else place_of_name(month, MONTHS)
            day = int(parts.get("day") or 0) or None
            year = int(parts.get("year") or 0) or None
            return (year, month, day) if month in range(1, 13) else None
    slashed = SLASHED.fullmatch(text)
    return tuple(map(int, slashed.groups())) if slashed else None


def same_date(p, g):
    """`July 4th, 1776` and `4 July 1776`; `04/02/2005` is `4/2/2005`, not `02/04/2005`."""
    p_date = date(p)
    g_date = date(g)
    if p_date and g_date:
        return p_date == g_date
    for names in (MONTHS, WEEKDAYS):
        p_place = place_of_name(p, names)
        g_place = place_of_name(g, names)
        if p_place and g_place:
            return p_place == g_place
    return None


# -------------------------------------------------------------- places in an order
ORDINAL = re.compile(r"(?i)(?:the )?(\d+(?:st|nd|rd|th)|[a-z]+(?:[ -][a-z]+)??)\b(?: (.*))?")


@reader
def place_in_order(text):
    """(19, "century") of `19th century` or `the nineteenth century`."""
    found = ORDINAL.fullmatch(text)
    place = ordinal(found[1]) if found else None
    return (place, found[2] or "") if place else None


def same_place_in_order(p, g):
    """`3rd` and `third`, `19th century` and `the nineteenth century`."""
    p_place = place_in_order(p)
    g_place = place_in_order(g)
    if not (p_place and g_place):
        return None
    return p_place[0] == g_place[0] and p_place[1].lower() == g_place[1].lower()
