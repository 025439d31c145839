"""Units of measure: what may stand behind a number, and which of them measure the same.

`read(text)` of `km/h`, `kilometers per hour`, `m^2`, `square meters`, `J K^{-1} mol^{-1}`, `元` or
`apples` gives a `Unit`: its size in base units and their exponents. A word that nobody knows is a
unit of its own, so that 5 apples are not 5 pears.
"""

import re
from fractions import Fraction
from functools import lru_cache
from typing import NamedTuple


class Unit(NamedTuple):
    size: Fraction
    bases: tuple  # of (base, exponent), sorted


NONE = Unit(Fraction(1), ())

# size in the base, base: names; the first ones are symbols. What is marked with + takes prefixes.
TABLE = """
+1 m: m meter metre 米
0.0254 m: in inch inche 英寸
0.3048 m: ft foot feet 英尺
0.9144 m: yd yard
1609.344 m: mi mile 英里
1852 m: nmi 海里
0.1 m: 分米
0.01 m: 厘米 公分
0.001 m: 毫米
1000 m: 千米 公里
0.0000000001 m: Å angstrom
+0.001 kg: g gram gramme 克
1 kg: 千克 公斤
0.000001 kg: 毫克
0.45359237 kg: lb lbs pound
0.028349523125 kg: oz ounce
+1000 kg: t ton tonne 吨
+1 s: s sec second 秒
60 s: min minute mins 分钟
3600 s: h hr hour hrs 小时
86400 s: d day 天
604800 s: week wk 周
1 month: month 个月 月
1 year: yr year 年 岁
+0.001 m3: L l liter litre 升
0.000001 m3: cc 毫升
0.003785411784 m3: gal gallon
+1 A: A amp ampere 安
+1 V: V volt 伏
+1 W: W watt 瓦
+1 Hz: Hz hertz 赫兹
+1 N: N newton 牛
+1 J: J joule 焦
+1 Pa: Pa pascal 帕
101325 Pa: atm atmosphere
100000 Pa: bar
+1 C: C coulomb 库仑
+1 F: F farad
+1 ohm: Ω ohm 欧姆 欧
+1 T: T tesla
+1 Wb: Wb weber
+1 H: henry
+1 eV: eV electronvolt
+1 mol: mol mole 摩尔
+1 K: K kelvin
+1 cal: cal calorie
+1 byte: byte 字节
+1 bit: bit
1 torr: torr mmHg
1 °C: °C 摄氏度
1 °F: °F
1 °: ° deg degree 度
1 rad: rad radian
1 rev: rev revolution 转
1 dB: dB decibel
1 %: % percent percentage pct
1 $: $ dollar usd us$ 美元
0.01 $: cent ¢
1 €: € euro eur
1 £: £ gbp
0.01 £: pence penny
1 ¥: ¥ yen jpy 日元
1 元: 元 yuan rmb cny 人民币
1 ₹: ₹ rs rupee
1 ha: ha hectare 公顷
1 acre: acre
"""
PREFIXES = {
    "p pico": "0.000000000001",
    "n nano": "0.000000001",
    "μ u micro": "0.000001",
    "m milli": "0.001",
    "c centi": "0.01",
    "d deci": "0.1",
    "k kilo": "1000",
    "M mega": "1000000",
    "G giga": "1000000000",
    "T tera": "1000000000000",
}
