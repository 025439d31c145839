r"""One spelling for what LaTeX, Markdown, Unicode and Chinese typesetting write in several ways.

`clean(text)` takes an answer as it was written and gives it without wrappings: no box, dollars,
fonts, lead-in ("The answer is") or full stop; commands in one form; symbols as LaTeX commands.
Every rule has a name and an example, to which a test holds it. A pattern may meet any text of 4,000
characters: each takes at worst quadratic time.
"""

import re
import unicodedata
from functools import lru_cache
from typing import NamedTuple

from engine.number_words import WORDS as NUMBER_WORDS

# -------------------------------------------------------------- characters
ONE_FOR_MANY = {
    "-": "−–—‐‑‒﹣",
    "'": "’‘`´′",
    '"': "“”「」″",
    "[": "【",
    "]": "】",
    "No. ": "№",
    ". ": "。",
    ", ": "、，",
    "; ": "；",
    ":": "：∶",
    "/": "⁄÷",
    "*": "∗",
    "°": "º",
    "¥": "￥",
    r"\cdot ": "·⋅",
    r"\times ": "×✕",
    r"\pi ": "π",
    r"\infty ": "∞",
    r"\le ": "≤⩽≦",
    r"\ge ": "≥⩾≧",
    r"\ne ": "≠",
    r"\approx ": "≈",
    r"\cong ": "≅≌",
    r"\sim ": "∽∼",
    r"\pm ": "±",
    r"\cup ": "∪",
    r"\cap ": "∩",
    r"\in ": "∈",
    r"\angle ": "∠",
    r"\triangle ": "△▵",
    r"\perp ": "⊥",
    r"\parallel ": "∥",
    r"\to ": "→⟶",
    r"\emptyset ": "∅",
    r"\mathbb{R} ": "ℝ",
    "(": "⟨〈",
    ")": "⟩〉",
    r"\alpha ": "α",
    r"\beta ": "β",
    r"\gamma ": "γ",
    r"\theta ": "θ",
    r"\lambda ": "λ",
    r"\phi ": "φ",
    r"\rho ": "ρ",
    r"\sigma ": "σ",
    r"\omega ": "ω",
    r"\Delta ": "Δ∆",
}
SYMBOLS = {ord(sign): one for one, signs in ONE_FOR_MANY.items() for sign in signs}
RAISED = "⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻"
LOWERED = "₀₁₂₃₄₅₆₇₈₉₊₋"
RAISED_RUN = re.compile(f"[{RAISED}]+")
LOWERED_RUN = re.compile(f"[{LOWERED}]+")
ON_THE_LINE = str.maketrans(RAISED + LOWERED, "0123456789+-" * 2)
VULGAR_FRACTION = re.compile("[¼-¾⅐-⅞]")
CIRCLED = re.compile("[①-⑳]")
ROOT_SIGN = re.compile(r"([√∛]) ?(\d+(?:\.\d+)?|[A-Za-zπ])")
ROOTS = {"√": r"\sqrt", "∛": r"\sqrt[3]"}


def plain_characters(text):
    r"""`H₂O` -> `H_{2}O`, `１０⁻³` -> `10^{-3}`, `2½` -> `2 1/2`, `√23` -> `\sqrt{23}`."""
    text = RAISED_RUN.sub(lambda run: f"^{{{run[0].translate(ON_THE_LINE)}}}", text)
    text = LOWERED_RUN.sub(lambda run: f"_{{{run[0].translate(ON_THE_LINE)}}}", text)
    text = VULGAR_FRACTION.sub(lambda found: " " + unicodedata.normalize("NFKC", found[0]), text)
    text = CIRCLED.sub(spell_circled, text)
    text = ROOT_SIGN.sub(lambda root: f"{ROOTS[root[1]]}{{{root[2]}}}", text)
    text = text.replace("√", r"\sqrt ").replace("∛", r"\sqrt[3]")
    text = text.translate(SYMBOLS)  # before NFKC, which would take `´` for a blank
    text = unicodedata.normalize("NFKC", text)  # full width, ligatures, accents, `℃`
    text = text.translate(SYMBOLS)
    return "".join(each for each in text if unicodedata.category(each) != "Cf")  # zero width


def spell_circled(found):
    """`①②` -> `1, 2`: the next one is another item of a list."""
    number = str(ord(found[0]) - ord("①") + 1)
    another = CIRCLED.match(found.string, found.end())
    return number + ", " if another else number


# -------------------------------------------------------------- wrappings
BOX = re.compile(
    r"(?<!\\)\\++f?box(?:ed)?\s*\{((?:[^{}]|\{(?:[^{}]|\{(?:[^{}]|\{[^{}]*\})*\})*\})*)\}"
)


def unbox(text):
    r"""`so x = \boxed{3}` -> `3`; of boxes that differ all stay, where they are."""
    boxes = BOX.findall(text)
    while boxes:
        text = boxes[0] if len(set(boxes)) == 1 else BOX.sub(r"\1", text)
        boxes = BOX.findall(text)
    return text


MATRIX = re.compile(
    r"(?:\\left ?[\[(] ?)?(?<!\\)\\++begin ?\{(?:[pbB]?matrix|array)\}(?:\{[lcr| ]*\})?"
    r"((?:[^\\]|\\(?!begin|end))*)\\+end ?\{(?:[pbB]?matrix|array)\}(?: ?\\right ?[\])])?"
)


def list_rows(found):
    r"""`\begin{pmatrix}1&2\\3&4\end{pmatrix}` -> `[[1,2],[3,4]]`."""
    rows = [row.split("&") for row in re.split(r"\\{2,}", found[1]) if row.strip()]
    return "[" + ",".join("[" + ",".join(row) + "]" for row in rows) + "]"


INTRODUCTION = re.compile(  # `We find that $x < 3$.`: words that lead to one formula
    r"(?i)^[a-z ,']*\b(?:is|are|that|get|find|have|equals|matrix)\b ?:? ?"
    r"(?:\$\$?([^$]+)\$\$?|\\\((.+)\\\)|\\\[(.+)\\\])[ .]*$"
)
DENIAL = re.compile(  # what makes the words in front of an answer more than an introduction
    r"(?i)\b(?:no|not|none|never|cannot|neither|nor|maybe|perhaps|if|unless|whether|than|either|yes"
    r"|true|false|wrong|incorrect|except|at least|at most)\b|n't\b|[不非]"
)


def introduced(text):
    """The formula of a sentence that says nothing else, and nothing against it."""
    found = INTRODUCTION.match(text)
    if found and not DENIAL.search(text[: found.start(found.lastindex)]):
        return found[found.lastindex]
    return text


OF_IT = r"(?: (?:to|of|for) (?:the|this) \w+)?(?: is\b| are\b| ?[:=])[ :=]*(?=\S)"
CLAIMS = (  # the first one that a text makes counts
    re.compile(  # `The answer is`, `Answer:`, `Answer 7`, `答案是`
        rf"(?i)^answer (?=[\d\\(]|[A-J]\b)|\banswers?{OF_IT}"
        r"|答案(?:应该|应)?[是为选]?[ :]*(?=\S)|^答 ?:"
    ),
    re.compile(  # `The result is`, `Solution:`, `故选`, `选项`
        rf"(?i)\b(?:result|option|choice|solution)s?{OF_IT}|结果(?:应该|应)?[是为]?[ :]*(?=\S)"
        r"|\bI (?:choose|pick|select) (?=\S)"
        r"|(?:故|应|因此|所以|正确)?选(?:[项择]|(?![项择]))[ :]*(?=\S)"
    ),
)
SENTENCE_END = re.compile(r"[.;!?\n](?= |\n|$)")
NO_CLAIM = re.compile(
    r"(?i)(?:the|my|final|correct|[ :*])*"
)  # `Final answer: The correct answer is`
HOPE = re.compile(r"[ .]*I hope it is correct.*")  # how a common prompt has answers end


def claimed(text):
    """What a text says that the answer is; the text itself where it denies it, or differs."""
    for pattern in CLAIMS:
        claims = list(pattern.finditer(text))
        if claims:
            break
    else:
        return text
    sentence = SENTENCE_END.split(text[: claims[0].start()])[-1]
    if DENIAL.search(sentence):
        return text
    answer = HOPE.sub("", text[claims[-1].end() :])
    for claim, following in zip(claims, claims[1:], strict=False):
        other = SENTENCE_END.split(text[claim.end() : following.start()])[0]
        if not NO_CLAIM.fullmatch(other) and other.strip(" *.") != answer.strip(" *."):
            return text
    return answer


def has_claim(text):
    """Does it say somewhere what the answer is?"""
    return any(pattern.search(text) for pattern in CLAIMS)


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


MARKS = re.compile(r"[(\[{]|[)\]}]|;|,(?: ?and\b| ?or\b)?|(?<![A-Za-z\\])(?:and|or)\b")


def unwrap(text):
    r"""`((x + 1))` -> `x + 1`: no brackets around one thing, but `{\emptyset}` is a set of one."""
    brackets, parts = items(text)
    while brackets in ("()", "{}") and len(parts) == 1 and parts[0] != r"\emptyset":
        text = parts[0]
        brackets, parts = items(text)
    return text


# -------------------------------------------------------------- rewriting
class Rewrite(NamedTuple):
    what: str
    pattern: str
    by: str
    before: str  # an example, and what becomes of it
    after: str


SPACING = (
    Rewrite("a backslash escaped", r"\\\\(?=[a-zA-Z])", r"\\", r"\\frac", r"\frac"),
    Rewrite("a backslash lost", r"\x0c(?=rac)", r"\\f", "\x0crac{1}{2}", r"\frac{1}{2}"),
    Rewrite("a backslash lost", r"\t(?=imes|ext|heta|an\b)", r"\\t", "2\times 3", r"2\times 3"),
    Rewrite("empty set", r"\\\{ ?\\\}", r"\\emptyset ", r"\{\}", r"\emptyset "),
    Rewrite("dollars", r"(?<!\\)\$\$?((?:[^$\\]|\\.)*)\$\$?(?!\d)", r" \1 ", "$x$", " x "),
    Rewrite("comma of thousands", r" ?\{, ?\}(?:\\!)?|,\\!\s*", ",", "1{,}234", "1,234"),
    Rewrite(
        "size", r"\\(?:left|right|displaystyle|rm|bf)(?![a-zA-Z])|\\!|\{\}", "", r"\left(", "("
    ),
    Rewrite("delimiters", r"(?<!\\)\\[()\[\]]", "", r"\(x\)", "x"),
    Rewrite("tilde as range", r"(?<=\d) ?~ ?(?=\d)", "-", "3~5", "3-5"),
    Rewrite("tilde as about", r"^ *~ ?(?=[\d$€£¥])", "", "~4", "4"),
    Rewrite("blanks", r"\\[,;: ]|~|\\q?quad(?![a-zA-Z])|\s+", " ", r"5\,cm", "5 cm"),
    Rewrite("escapes", r"\\([{}%$&#_])", r"\1", r"50\%", "50%"),
    Rewrite("raised in HTML", r"<sup>([^<>]*)</sup>", r"^{\1}", "m<sup>2</sup>", "m^{2}"),
    Rewrite("lowered in HTML", r"<sub>([^<>]*)</sub>", r"_{\1}", "H<sub>2</sub>O", "H_{2}O"),
    Rewrite("power in Python", r"(?<=[\dA-Za-z)])\*\*(?=[\d(])", "^", "x**2", "x^2"),
    Rewrite("bold", r"\*\*", "", "**B**", "B"),
    Rewrite("bold in HTML", r"</?(?:b|i|u|em|strong)>", "", "<b>5</b>", "5"),
    Rewrite("tags", r"^<answer>(.*)</answer>$", r"\1", "<answer>B</answer>", "B"),
)
DEGREES = r"\bdeg(?:rees?|\.)?"
FONT = r"text\w*|math(?:rm|bf|it|sf|bb)|mbox|operatorname|ce"
FUNCTION = "arcsin|arccos|arctan|sin|cos|tan|cot|sec|csc|log|ln|exp"
COMMANDS = (
    Rewrite(
        "all reals",
        r"\\mathbb ?\{?R\}?",
        r"(-\\infty, \\infty)",
        r"\mathbb{R}",
        r"(-\infty, \infty)",
    ),
    Rewrite(
        "empty set", r"\\varnothing(?![a-zA-Z])", r"\\emptyset ", r"\varnothing", r"\emptyset "
    ),
    Rewrite("vector brackets", r"\\langle(?![a-zA-Z])", "(", r"\langle 1", "( 1"),
    Rewrite("vector brackets", r"\\rangle(?![a-zA-Z])", ")", r"1 \rangle", "1 )"),
    Rewrite(
        "arrow of a vector",
        r"\\overrightarrow(?![a-zA-Z])",
        r"\\vec",
        r"\overrightarrow{AB}",
        r"\vec{AB}",
    ),
    Rewrite(
        "fonts", rf"\\(?:{FONT}) ?\{{((?:[^{{}}]|\{{[^{{}}]*\}})*)\}}", r" \1 ", r"\text{m}", " m "
    ),
    Rewrite("fractions", r"\\[dtc]frac(?![a-zA-Z])", r"\\frac", r"\dfrac12", r"\frac12"),
    Rewrite("at most", r"\\le(?:q|qslant)?(?![a-zA-Z])|<=", r"\\le ", r"x \leq 3", r"x \le  3"),
    Rewrite("at least", r"\\ge(?:q|qslant)?(?![a-zA-Z])|>=", r"\\ge ", "x >= 3", r"x \ge  3"),
    Rewrite("unequal", r"\\neq?(?![a-zA-Z])|!=", r"\\ne ", "x != 3", r"x \ne  3"),
    Rewrite("less", r"\\lt(?![a-zA-Z])", "<", r"x \lt 3", "x < 3"),
    Rewrite("greater", r"\\gt(?![a-zA-Z])", ">", r"x \gt 3", "x > 3"),
    Rewrite("arrows", r"\\(?:long)?rightarrow(?![a-zA-Z])|-+>", r"\\to ", "A -> B", r"A \to  B"),
    Rewrite("ellipsis", r"\\[lc]?dots(?![a-zA-Z])", "...", r"\ldots", "..."),
    Rewrite("ampersand", r" ?& ?", " and ", "1 & 3", "1 and 3"),
    Rewrite("times", r"(?<=\d) ?x ?(?=\d)", r" \\times ", "3x4", r"3 \times 4"),
    Rewrite("pi", r"(?<![A-Za-z\\])pi(?![A-Za-z])", r"\\pi ", "5pi", r"5\pi "),
    Rewrite(
        "infinity", r"(?<![A-Za-z\\])(?:infinity|inf)(?![A-Za-z])", r"\\infty ", "inf", r"\infty "
    ),
    Rewrite("plus infinity", r"\+ ?(?=\\infty)", "", r"(0, +\infty)", r"(0, \infty)"),
    Rewrite(
        "root of brackets",
        r"\\?(?<![A-Za-z])sqrt ?\(((?:[^()]|\([^()]*\))*)\)",
        r"\\sqrt{\1}",
        "sqrt(x+(1))",
        r"\sqrt{x+(1)}",
    ),
    Rewrite(
        "root in words", r"(?<![A-Za-z\\])sqrt ?(\d+|[a-z])", r"\\sqrt{\1}", "sqrt2", r"\sqrt{2}"
    ),
    Rewrite("root of a number", r"\\sqrt (\d+)", r"\\sqrt{\1}", r"\sqrt 25", r"\sqrt{25}"),
    Rewrite("root", r"\\sqrt ?(\w)", r"\\sqrt{\1}", r"\sqrt2", r"\sqrt{2}"),
    Rewrite(
        "functions in words",
        rf"(?<![A-Za-z\\])({FUNCTION})(?= ?[\d({{\\^_]| [a-z](?![a-z])|[xz](?![a-z]))",
        r"\\\1",
        "sin(x)",
        r"\sin(x)",
    ),
    Rewrite(
        "degree",
        r"\*? ?(?:\^ ?\{? ?\\circ ?\}?|\\(?:degree|circ)(?![a-zA-Z]))",
        "°",
        r"9^\circ",
        "9°",
    ),
    Rewrite("Celsius", rf"(?i)(?:° ?|{DEGREES} )(?:celsius|c\b)", "°C", "25 degrees C", "25 °C"),
    Rewrite("Fahrenheit", rf"(?i)(?:° ?|{DEGREES} )(?:fahrenheit|f\b)", "°F", "77° F", "77°F"),
    Rewrite("north", rf"(?i)(?:° ?| {DEGREES} )n(?:orth)?\b", "°N", "30 degrees north", "30°N"),
    Rewrite("south", rf"(?i)(?:° ?| {DEGREES} )s(?:outh)?\b", "°S", "30 degrees south", "30°S"),
    Rewrite("east", rf"(?i)(?:° ?| {DEGREES} )e(?:ast)?\b", "°E", "30° east", "30°E"),
    Rewrite("west", rf"(?i)(?:° ?| {DEGREES} )w(?:est)?\b", "°W", "30° west", "30°W"),
    Rewrite("ohm", r"\\Omega(?![a-zA-Z])", "Ω", r"6 k\Omega", "6 kΩ"),
    Rewrite("micro", r"\\mu ?(?=[ACFHJNTVWgmsΩ]\b)", "μ", r"5 \mu F", "5 μF"),
    Rewrite(
        "triangle",
        r"(?<!\\)\btriangle (?=[A-Z]{3}\b)",
        r"\\triangle ",
        "triangle ABC",
        r"\triangle ABC",
    ),
    Rewrite(
        "angle", r"(?<!\\)\bangle (?=[A-Z]{1,3}\b|\d\b)", r"\\angle ", "angle ABC", r"\angle ABC"
    ),
    Rewrite("blanks in braces", r"(?<=\{) +| +(?=\})", "", r"\frac{ 5 }{3}", r"\frac{5}{3}"),
    Rewrite("blanks at braces", r"(?<=[a-z}]) +(?=\{)", "", r"\frac {5} {3}", r"\frac{5}{3}"),
    Rewrite("short fraction", r"\\frac ?(\d) ?(\d)", r"\\frac{\1}{\2}", r"\frac12", r"\frac{1}{2}"),
    Rewrite(
        "short numerator", r"\\frac ?(\d)(?=\{)", r"\\frac{\1}", r"\frac1{72}", r"\frac{1}{72}"
    ),
    Rewrite("short divisor", r"(\\frac\{[^{}]*\})(\d)", r"\1{\2}", r"\frac{36}7", r"\frac{36}{7}"),
    Rewrite(
        "a word in braces",
        r"(?<!begin)(?<!end)\{([a-z]{4,})\}",
        r" \1 ",
        "69{degrees}",
        "69 degrees ",
    ),
    Rewrite("powers", r" ?\^ ?", "^", "x ^ 2", "x^2"),
    Rewrite("indices", r" ?_ ?", "_", "CO _2", "CO_2"),
    Rewrite("runs of blanks", " +", " ", "a  b", "a b"),
)
NUMBER_WORD = "|".join(sorted(NUMBER_WORDS))
COLORS = "red|orange|yellow|green|blue|purple|violet|pink|brown|black|white|gr[ae]y"
MONEY = "US\\$|USD|EUR|GBP|RMB|CNY|Rs\\.?|[$€£¥₹]"
WORDING = (
    Rewrite(
        "minus", rf"(?i)^(?:minus|negative) (?=[\d.\\]|(?:{NUMBER_WORD})\b)", "-", "minus 5", "-5"
    ),
    Rewrite("plus", r"(?i)^(?:plus|positive) (?=[\d.\\])", "", r"positive \infty", r"\infty"),
    Rewrite("per cent", r"(?i)\bper cent\b", "percent", "5 per cent", "5 percent"),
    Rewrite("out of", r"(?<=\d) (?:out of|in) (?=\d+$)", "/", "4 out of 9", "4/9"),
    Rewrite("sq.", r"(?i)\b(sq|cu)\. ?", r"\1 ", "5 sq. cm", "5 sq cm"),
    Rewrite("feet and inches", r"(?<![\d°])(\d+)' ?(\d+)\"", r"\1 ft \2 in", "5'3\"", "5 ft 3 in"),
    Rewrite("decades", r"(?<=\d0)'s\b", "s", "1990's", "1990s"),
    Rewrite("before Christ", r"(?<=\d) ?B\.? ?C\.?(?: ?E\.?)?$", " BC", "500 B.C.E.", "500 BC"),
    Rewrite("after Christ", r"(?<=\d) ?(?:A\.? ?D\.?|C\.?E\.?)$", "", "500 A.D.", "500"),
    Rewrite("after Christ", r"^A\.?D\.? (?=\d+$)", "", "AD 500", "500"),
    Rewrite("on a day", r"(?i)^on (?=\w+day$)", "", "on Tuesday", "Tuesday"),
    Rewrite("age", r"(?i)\b(years?|months?|weeks?|days?) old$", r"\1", "3 years old", "3 years"),
    Rewrite("color", rf"(?i)\b({COLORS}) (?:in )?colou?r$", r"\1", "blue in color", "blue"),
    Rewrite("tick", r" ?[✓✔✅]$", "", "15 ✓", "15"),
    Rewrite("emphasis", r"^_([^_]+)_$", r"\1", "_15_", "15"),
    Rewrite("一共", r"^[一总]?共有? ?(?=\d)", "", "共15个", "15个"),
    Rewrite("half", r"(?i)^half an? (?=[a-z])", "1/2 ", "half an hour", "1/2 hour"),
    Rewrite("both", r"(?i)^both (?=.+ and )", "", "both B and D", "B and D"),
    Rewrite("base of a number", r"^\((\d+)\)_", r"\1_", "(204)_5", "204_5"),
    Rewrite("does not exist", r"^DNE$", "does not exist", "DNE", "does not exist"),
    Rewrite("empty set", r"(?i)^(?:the )?empty set$", r"\\emptyset", "the empty set", r"\emptyset"),
    Rewrite(
        "all reals",
        r"(?i)^all real(?:s| numbers)(?: x)?$",
        r"(-\\infty, \\infty)",
        "all real numbers",
        r"(-\infty, \infty)",
    ),
    Rewrite(
        "set of those that",
        r"^\{ ?([A-Za-z])(?: ?\\in ?[^|{}:]*)? ?(?:\\mid|\||:) ?([^{}]*)\}$",
        r"\2",
        r"{x \mid x > 3}",
        "x > 3",
    ),
    Rewrite("union", r"(?<=[)\]]) ?U ?(?=[(\[])", r"\\cup ", "(0,1) U (2,3)", r"(0,1)\cup (2,3)"),
    Rewrite(
        "parallel",
        r"(?<=[A-Za-z]) ?(?://|\|\|) ?(?=[A-Za-z])",
        r"\\parallel ",
        "AB // CD",
        r"AB\parallel CD",
    ),
    Rewrite("point", r"(?i)^(?:point|line|segment|ray) (?=[A-Z]{1,2}$)", "", "point P", "P"),
    Rewrite(
        "where it is seen",
        r"(?i) (?:shown )?(?:in|on) the (?:picture|image|figure|photo|diagram|chart|graph|scene)$",
        "",
        "3 dogs in the picture",
        "3 dogs",
    ),
    Rewrite("hundred", r"(?i)(?<=\d) hundred\b", "*10^2", "5 hundred", "5*10^2"),
    Rewrite("thousand", r"(?i)(?<=\d) thousand\b", "*10^3", "5 thousand", "5*10^3"),
    Rewrite("million", r"(?i)(?<=\d) ?(?:million|mn)\b", "*10^6", "5 million", "5*10^6"),
    Rewrite("billion", r"(?i)(?<=\d) ?(?:billion|bn)\b", "*10^9", "5bn", "5*10^9"),
    Rewrite("trillion", r"(?i)(?<=\d) trillion\b", "*10^{12}", "5 trillion", "5*10^{12}"),
    Rewrite("dozen", r"(?i)(?<=\d) dozen\b", "*12", "2 dozen", "2*12"),
    Rewrite("万", r"(?<=\d) ?万", "*10^4", "5万", "5*10^4"),
    Rewrite("亿", r"(?<=\d) ?亿", "*10^8", "5亿", "5*10^8"),
    Rewrite(
        "currency in front",
        rf"({MONEY}) ?(-?\.?\d[\d.,]*(?:\*10\^\d|[KMBk]\b)?)",
        r"\2 \1",
        "$10",
        "10 $",
    ),
    Rewrite("per", " per | ?/ ?", "/", "km per h", "km/h"),
    Rewrite("per several", r"/\((\w+)(?: |\*| ?\\cdot )(\w+)\)", r"/\1/\2", "J/(mol K)", "J/mol/K"),
    Rewrite(
        "和",
        r"(?<=[\dA-Z)}甲乙丙丁]) ?[和与及] ?(?=[\d(A-Z\\甲乙丙丁])",
        " and ",
        "A和C",
        "A and C",
    ),
    Rewrite("或", r"(?<=[\dA-Z)}]) ?或 ?(?=[\d(A-Z\\])", " or ", "1或2", "1 or 2"),
    Rewrite("what approximates it", r"(?<=[\d})]) ?\\approx.*", "", r"1/3 \approx 0.3", "1/3"),
    Rewrite(
        "about",
        r"(?i)^(?:about|approximately|approx\.?|around|roughly|exactly|\\approx|约|大约)"
        r"(?: ?(?=\d)| (?=[-+.\\]))",
        "",
        "about 5",
        "5",
    ),
    Rewrite(
        "is correct",
        r"^(?:[Oo]ption )?\(?([A-J])\)? is (?:the )?(?:correct|right)(?: answer| option| choice)?$",
        r"\1",
        "B is correct",
        "B",
    ),
    Rewrite("is about", r"\\approx", "=", r"x \approx 3", "x = 3"),
    Rewrite("equals sign in front", "^= ?", "", "= 5", "5"),
    Rewrite(
        "quotes and stops",
        r"^[*\" ]+|(?<![*\" .,;:?])(?!(?<=\d)[,:]? ?\.\.\.)[*\" .,;:?]+$",
        "",
        '"B".',
        "B",
    ),
    Rewrite("quotes", "^'(.*)'$", r"\1", "'B'", "B"),
)


def compiled(rewrites):
    return [(re.compile(rewrite.pattern), rewrite.by) for rewrite in rewrites]


BEFORE_CLAIM = compiled(SPACING + COMMANDS)
AFTER_CLAIM = compiled(WORDING)


@lru_cache(maxsize=1 << 14)
def clean(text):
    """One spelling of an answer, without wrappings."""
    text = unbox(plain_characters(text))
    text = introduced(MATRIX.sub(list_rows, text).strip())
    text = rewrite(text, BEFORE_CLAIM)
    text = claimed(text)
    text = rewrite(text, AFTER_CLAIM)
    return unwrap(text)


def rewrite(text, rules):
    for pattern, by in rules:
        text = pattern.sub(by, text.strip())
    return text.strip()
