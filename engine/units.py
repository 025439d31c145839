"""Units of measure: which texts are units, and which of them measure the same.

`unit("km/h")`, `unit("kilometers per hour")`, `unit("m^2")`, `unit("square meters")`,
`unit("J K^{-1} mol^{-1}")`, `unit("元")`, `unit("apples")` give a `Unit`: its size, and its base
units with their exponents. A word that nobody knows is a unit of its own, so that 5 apples are not
5 pears. None is what no unit can be: comparisons, negations, single unknown letters.
"""

import re
from fractions import Fraction
from functools import lru_cache
from typing import NamedTuple

from engine.number_words import WORDS as NUMBER_WORDS

reader = lru_cache(maxsize=1 << 12)  # several kinds of answers read the same text


class Unit(NamedTuple):
    size: Fraction  # in its base units
    bases: tuple  # of (base, exponent), sorted
    known: bool = True  # False: an unknown word, which only stands behind a number


NONE = Unit(Fraction(1), ())

# Each line: the size in other units, then the names. With + in front a name takes the prefixes of
# PREFIXES, a symbol (before the bar) as `km`, a word (behind it) as `kilometer`.
TABLE = """
+ 1 m: m | meter metre 米
+ 0.001 kg: g | gram gramme 克
+ 1 s: s | second sec 秒
+ 1 A: A | ampere amp 安培 安
+ 1 K: K | kelvin
+ 1 mol: mol | mole 摩尔
+ 0.001 m^3: L l | liter litre 升
+ 1 kg m s^-2: N | newton 牛顿 牛
+ 1 kg m^2 s^-2: J | joule 焦耳 焦
+ 1 kg m^2 s^-3: W | watt 瓦特 瓦
+ 1 kg m^-1 s^-2: Pa | pascal 帕斯卡 帕
+ 1 s^-1: Hz | hertz 赫兹
+ 1 A s: C | coulomb 库仑
+ 1 kg m^2 s^-3 A^-1: V | volt 伏特 伏
+ 1 kg m^2 s^-3 A^-2: Ω ohm | ohm 欧姆 欧
1000 Ω: kilohm
1 N m: Nm
3600 J: Wh
3600000 J: kWh
+ 1 kg^-1 m^-2 s^4 A^2: F | farad 法拉
+ 1 kg s^-2 A^-1: T | tesla
+ 1 kg m^2 s^-2 A^-1: Wb | weber
+ 1 kg m^2 s^-2 A^-2: H | henry
+ 4.184 J: cal | calorie
+ 1 eV: eV | electronvolt
+ 1000 kg: t | ton tonne 吨
+ 1 bit: bit |
+ 1 byte: | byte 字节
1000 byte: KB kB
1000000 byte: MB
1000000000 byte: GB
1000000000000 byte: TB
0.0254 m: in inch inche 英寸
0.3048 m: ft foot feet 英尺
0.9144 m: yd yard
1609.344 m: mi mile
1852 m: nmi 海里
500 m: 里
0.1 m: 分米
0.01 m: 厘米 公分
0.001 m: 毫米
1000 m: 千米 公里
0.0000000001 m: Å angstrom
1 kg: kilo 千克 公斤
0.001 g: 毫克
0.45359237 kg: lb pound
0.028349523125 kg: oz ounce
60 s: min minute mins 分钟 分
3600 s: h hr hour 小时
86400 s: day 天
604800 s: week wk 周
1 month: month 个月 月
12 month: year yr 年
1000 m h^-1: kph kmph kmh
1609.344 m h^-1: mph
1852 m h^-1: knot
0.001 L: cc 毫升
3.785411784 L: gal gallon
0.946352946 L: quart
0.473176473 L: pint
101325 Pa: atm atmosphere
100000 Pa: bar
1 torr: torr mmHg
6894.757293 Pa: psi
1 celsius: °C 摄氏度 celsius
1 fahrenheit: °F 华氏度 fahrenheit
1 degree: ° deg degree 度
1 rad: rad radian
1 turn: rev revolution 转
1 turn min^-1: rpm
1 dB: dB decibel
1 percent: % percent percentage pct
1 usd: $ US$ usd dollar buck 美元
0.01 usd: ¢ cent
1 eur: € eur euro 欧元
1 gbp: £ gbp 英镑
0.01 gbp: pence penny
1 jpy: 日元 円 yen jpy
1 cny: 元 块 yuan rmb cny 人民币
1 yen-or-yuan: ¥
1 inr: ₹ Rs rupee
10000 m^2: ha hectare 公顷
4046.8564224 m^2: acre
1 beat: beat
1 beat min^-1: bpm
1 piece: piece pcs 个 只
1 unit: unit
"""
ONE_NAME = (  # of two units: `10 pounds` can be meant by `£10` and by `10 lb`
    ("£", "pound"),
    ("¥", "yuan"),
    ("¥", "yen"),
    ("F", "°F"),
    ("C", "°C"),
)
PREFIXES = {  # symbol: word and size
    "p": ("pico", "0.000000000001"),
    "n": ("nano", "0.000000001"),
    "μ": ("micro", "0.000001"),
    "u": ("micro", "0.000001"),
    "m": ("milli", "0.001"),
    "c": ("centi", "0.01"),
    "d": ("deci", "0.1"),
    "k": ("kilo", "1000"),
    "M": ("mega", "1000000"),
    "G": ("giga", "1000000000"),
    "T": ("tera", "1000000000000"),
}
# What cannot be a unit: the number before it is compared, denied, doubted, or one of several.
NO_UNIT = NUMBER_WORDS | set(
    """or and but not no never nor is are was to than as by if so because since maybe perhaps more
    less fewer greater least most up down over under above below beyond between plus minus max
    maximum minimum wrong incorrect false about am pm bc ad th st nd rd north south east west
    northeast northwest southeast southwest left right clockwise counterclockwise""".split()
)
MIXED_CASE = re.compile(".+[A-Z].*[a-z].*")  # `MBps`, which is no `Mbps`
JOINING = {"of", "the", "in", "on", "for", "at", "a", "an"}  # short words in `kinds of fruit`

LETTER = "A-Za-zμΩÅ°%$€£¥₹¢\u4e00-\u9fff"
WORD = f"[{LETTER}](?:[{LETTER}]|['-](?=[{LETTER}]))*+"
TERM = re.compile(  # `m`, `m^2`, `cm2`, `mol^{-1}`; `%` has no power
    rf"({WORD})(?:(?<![%°$€£¥₹¢])\^?\{{?(-?\d)\}}?)?"
)
POWER_WORDS = {
    "square": 2,
    "sq": 2,
    "平方": 2,
    "cubic": 3,
    "cu": 3,
    "立方": 3,
    "squared": 2,
    "cubed": 3,
}
POWER_PREFIX = re.compile("(?i)(?:square|cubic|平方|立方)(?=.)")  # `squareinches`, `平方米`
SEPARATOR = re.compile(r" ?(?:\\cdot|\*|\.) ?| ")


def multiply(a, b, power=1):
    exponents = dict(a.bases)
    for base, exponent in b.bases:
        exponents[base] = exponents.get(base, 0) + exponent * power
    bases = tuple(sorted((base, n) for base, n in exponents.items() if n))
    return Unit(a.size * b.size**power, bases, a.known and b.known)


NAMES = {}


def define(line):
    """One line of the table into NAMES."""
    definition, _, names = line.partition(": ")
    prefixed = definition.startswith("+ ")
    size, *bases = definition.removeprefix("+ ").split()
    meaning = Unit(Fraction(size), ())
    for base in bases:
        name, _, exponent = base.partition("^")
        meaning = multiply(
            meaning, NAMES.get(name, Unit(Fraction(1), ((name, 1),))), int(exponent or 1)
        )
    symbols, _, words = names.partition("|")
    for name in symbols.split() + words.split():
        NAMES[name] = meaning
    if not prefixed:
        return
    for symbol, (word, factor) in PREFIXES.items():
        scaled = Unit(meaning.size * Fraction(factor), meaning.bases)
        for name in symbols.split():
            NAMES.setdefault(symbol + name, scaled)
        for name in words.split():
            NAMES.setdefault(word + name, scaled)


for each in TABLE.strip().splitlines():
    define(each)


def known_unit(word):
    """`km`, `Kilometers`, `KM`, `inches`, `平方米`, `squareinches`; None for an unknown word."""
    found = POWER_PREFIX.match(word)
    name = word[found.end() :] if found else word
    power = POWER_WORDS[found[0].lower()] if found else 1
    lower = name.lower()
    joined = lower.replace("-", "").removesuffix("s")  # `kilo-ohms`
    for spelling in (name, lower, lower.removesuffix("s"), lower.removesuffix("es"), joined):
        if spelling in NAMES and (len(spelling) > 1 or spelling == name):
            return multiply(NONE, NAMES[spelling], power)
    return None


def product(text):
    """A product of units, `N m` or `square meters`; else unknown words, `red apples`."""
    result = NONE
    power = 1  # that a word in front asks for
    last = None
    words = SEPARATOR.split(text.strip())
    if known_unit(text) is None and all(map(known_unit, text.split("-"))):
        words = text.split("-")  # `kilowatt-hours`
    for word in words:
        term = TERM.fullmatch(word)
        if not term:
            return None
        unit_of_word = known_unit(term[1])
        name = term[1].lower()
        if unit_of_word:
            last = unit_of_word
            result = multiply(result, last, int(term[2] or 1) * power)
            power = 1
        elif name in ("squared", "cubed") and last:
            result = multiply(result, last, POWER_WORDS[name] - 1)
        elif name in POWER_WORDS:
            power = POWER_WORDS[name]
        else:
            return phrase(words)
    return result if power == 1 else phrase(words)


def phrase(words):
    """Up to three unknown words as a unit of their own, without number and case."""
    if len(words) > 3 or words[-1].lower() in JOINING:
        return None
    names = []
    for word in words:
        name = word if MIXED_CASE.fullmatch(word) else word.lower()
        short = len(name) < 3 and name.isascii() and not known_unit(word)
        if (
            name.lower() in NO_UNIT
            or not re.fullmatch(WORD, word)
            or (short and name not in JOINING)
        ):
            return None
        names.append(name.removesuffix("s"))
    return Unit(Fraction(1), ((" ".join(names), 1),), known=False)


@reader
def unit(text):
    """The unit that a text is, or None."""
    numerator, *denominators = text.split("/")
    result = product(numerator) if numerator.strip() else NONE
    for denominator in denominators:
        divisor = product(denominator)
        if result is None or divisor is None:
            return None
        result = multiply(result, divisor, -1)
    return result
