"""Verifiable rewards: is a response well-formed, and is its answer right? Pure Python, POSIX; Math-Verify is optional.

Rules come first: options by letter or text, yes/no, numbers, units, percentages, tuples, intervals, sets, `x = ...`. They say
True, False or None (cannot tell); only None (LaTeX, relations, prose) goes to Math-Verify. SymPy can hang or swell on hostile
text: a worker process (`engine/answers.py --worker`, JSON lines over pipes) forks a child per question, with limits on time and
memory. That needs no signals in the caller, so any thread or notebook may ask. Where verifiers differ: 10% equals 10 and 0.1;
a unit left out on one side is ignored, two must be the same; lists and {sets} have no order, (tuples) have; [1,2), (1,2] and
(1,2) differ; a rounded decimal needs six significant digits; what is longer than MAX_CHARS is wrong."""

import functools
import importlib.util
import json
import os
import re
import resource
import signal
import sys
import threading
import warnings
from fractions import Fraction
from subprocess import DEVNULL, PIPE, Popen

MAX_CHARS, MAX_DEPTH, MAX_ITEMS, SECONDS, MEMORY = (
    4000,
    20,
    64,
    1.5,
    1 << 30,
)  # the last two: of a question to Math-Verify


def equivalent(pred, gold, choices=()):
    """Is `pred` the answer `gold`? `choices`: the options' texts in order. What is blank or no text equals nothing."""
    if not all(
        isinstance(text, str) and len(text) <= MAX_CHARS and text.strip() for text in (pred, gold)
    ):
        return False
    p, g, options = (
        clean(pred),
        clean(gold),
        [clean(str(choice)[:MAX_CHARS]) for choice in choices or ()],
    )
    if (right := option(g, options)) is not None:
        chosen = option(p, options)
        if chosen is not None or any(same(p, text) for i, text in enumerate(options) if i != right):
            return chosen == right
        g, gold = options[right], str(choices[right])
    return math_verify(pred, gold) if (verdict := same(p, g)) is None else verdict


# ---- Spelling. Patterns may meet any text of MAX_CHARS characters: each takes at worst quadratic time.
UNICODE = str.maketrans(
    {chr(0xFF01 + i): chr(0x21 + i) for i in range(94)}
    | {
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
)
BOX = re.compile(r"\\+f?box(?:ed)?\s*\{((?:[^{}]|\{(?:[^{}]|\{(?:[^{}]|\{[^{}]*\})*\})*\})*)\}")
REWRITES = [
    (re.compile(pattern), by)
    for pattern, by in (
        (r"\\\\(?=[a-zA-Z])", r"\\"),
        (r"(?<!\\)\$\$?((?:[^$\\]|\\.)*)\$\$?", r" \1 "),
        (r",\\!\s*|\{,\}(?:\\!)?", ","),
        (r"\\(?:left|right|displaystyle)(?![a-zA-Z])|\\!|\{\}|(?<!\\)\\[()\[\]]", ""),
        (r"\\[dtc]frac(?![a-zA-Z])", r"\\frac"),
        (r"\\[,;: ]|~|\\q?quad(?![a-zA-Z])|\s+", " "),
        (r"\\([{}%$&#])", r"\1"),
        (r"\\([lg])e(?:q|qslant)?(?![a-zA-Z])", r"\\\1e "),
        (r"\\(?:text\w*|math(?:rm|bf|it|sf)|mbox|operatorname) ?\{([^{}]*)\}", r" \1 "),
        (r"\\sqrt ?(\w)", r"\\sqrt{\1}"),
        (r"\^ ?\{? ?\\circ ?\}?|\\(?:degree|circ)(?![a-zA-Z])", "°"),
        (r"\\frac ?(\d) ?(\d)", r"\\frac{\1}{\2}"),
        (" +", " "),
        (r" ?\^ ?", "^"),
        (r"(?i)\b(?:square|sq) ([a-z]+)|\b([a-z]+) squared\b", r"\1\2^2"),
        (r"(?i)\bcubic ([a-z]+)", r"\1^3"),
        *(
            (rf"(?i)(?<=\d) {name}\b", rf"*10^{n}")
            for name, n in (("thousand", 3), ("million", 6), ("billion", 9))
        ),
        (r"([$€£]) ?(\d[\d.,]*(?:\*10\^\d)?)", r"\2 \1"),
        (" per | ?/ ?", "/"),
        (r"(?<=[\d}]) ?\\approx.*", ""),
        (r"\\approx", "="),
        (r"(?i)^.*\b(?:answer|result|option|choice)(?: is\b| ?:| ?=) ?:? ?(?=\S)", ""),
        (r"^[*`\"“ ]+|[*`\"” .,;:]+$", ""),
    )
]
PROSE = re.compile(r"(?:(?<![\\A-Za-z])(?!and\b|or\b)[A-Za-z]{2,}(?![A-Za-z]).*?){4}")  # four words
WORDS = re.compile(r"[A-Za-z\s'\",.!?:;-]*[A-Za-z]{2}[A-Za-z\s'\",.!?:;-]*")


def clean(
    text,
):  # one spelling of what LaTeX, Markdown and Unicode write in several ways, without wrappings
    text = text.translate(UNICODE)
    while boxes := BOX.findall(text):
        text = boxes[0] if len(boxes) == 1 else BOX.sub(r"\1", text)
    for pattern, by in REWRITES:
        text = pattern.sub(by, text.strip())
    while (found := items(text))[0] in ("()", "{}") and len(
        found[1]
    ) == 1:  # brackets around one thing
        text = found[1][0]
    return text


def key(text):  # of words: without case, articles, punctuation; of other texts: without spaces
    if WORDS.fullmatch(text):
        return "".join(
            re.findall("[a-z]+", re.sub(r"\b(?:an?|the)\b(?=.*[a-z])", "", text.lower()))
        )
    return re.sub(r"(?<!\d) +| +(?!\d)", "", re.sub(r"\{(\w)\}", r"\1", text))


# ---- Readings of a cleaned text, None where one does not apply.
TRUTH = re.compile(
    r"(?i)(?:[a-z ]* is )?(?:(yes|true)|no|false)(?=$|[.,;:!])(?!.*\b(?:yes|no|true|false)\b)"
)
NUMBER = re.compile(
    r"([+-]?) ?(?!0+:)(?:(\d+) (?=\d+/))?((?:\d{1,3}(?:,\d{3})+|\d{1,3}(?: \d{3})+|\d+)?(?:\.\d+)?(?<=\d))"
    r"(?:(?:[eE]| ?(?:\\times|\\cdot|[*x]) ?10\^)\{?([+-]?\d{1,3})\}?|\^\{?(-?\d{1,3})\}?| ?(?:/|:(?! ?0)) ?"
    r"(\d+(?:\.\d+)?))?"
)  # 1,234.5; 1e5; 10^5; 1/2; 2 1/2; the ratio 1:2, but 12:05 is a time
UNITS = {
    name: names.split()[0]
    for names in (
        "m meter metre,km kilometer kilometre,cm centimeter centimetre,mm millimeter millimetre,in inch inche,ft foot feet,yd yard,"
        "mi mile,g gram,kg kilogram,mg milligram,lb pound,oz ounce,l liter litre,ml milliliter,s sec second,min minute,h hr hour,"
        "° deg degree,$ dollar usd,€ euro,£,% percent percentage pct"
    ).split(",")
    for name in names.split()
}
NO_UNIT = set(
    "or and is are not of to the than times more less plus minus by if so because but maybe".split()
)
TAIL = re.compile(
    r"(?<![A-Za-z°%$€£\\])[A-Za-z°%$€£]++(?:\^?\{?-?\d\}?)?(?:[ /][A-Za-z°$]++(?:\^?\{?-?\d\}?)?){0,5}$"
)


def label(text):  # `B`, `(b)`, `B.` -> ("B", ""); `(B) the dog`, `B. the dog` -> ("B", "the dog")
    if m := re.fullmatch(r"(?:[Oo]ption |[Cc]hoice )?[(\[]?([A-Ja-j])[)\]]?[.:]?", text):
        return m[1].upper(), ""
    m = re.fullmatch(r"(?:\((?=[A-J]\)))?([A-J])(?:\) ?|[.:] )(?![( ])(.+)", text)
    return (
        m.groups()
        if m and not re.search(r"\b[A-J][).:]|^(?:and|or)\b|^[A-J]\W+[A-J]\b", m[2])
        else None
    )


def option(
    text, options
):  # index of the option named by its letter or its text; -1 where the two disagree
    names, (letter, rest) = [key(o) for o in options], label(text) or ("", "")
    lettered = ord(letter) - 65 if letter and ord(letter) - 65 < len(options) else None
    if key(text) in names and (rest or lettered is None):
        return names.index(key(text))
    return (
        -1
        if lettered is not None and key(rest) in names and key(rest) != names[lettered]
        else lettered
    )


def number(text):  # (value, tolerance) of a number, fraction, mixed number, ratio or power
    m = NUMBER.fullmatch(
        re.sub(r" ?\\frac ?\{([^{}]+)\} ?\{([^{}]+)\}", r" \1/\2", text).strip(" {}")
    )
    plain, shift = (re.sub("[, ]", "", m[3]), int(m[4] or 0)) if m else ("", 0)
    if not m or (m[5] and (len(plain) > 9 or not Fraction(plain))) or (m[6] and not Fraction(m[6])):
        return None
    value = int(m[2] or 0) + (Fraction(plain) * Fraction(10) ** shift) ** int(m[5] or 1) / Fraction(
        m[6] or 1
    )
    rounded = "." in plain and not m[6] and len(plain.replace(".", "").lstrip("0")) > 5
    return -value if m[1] == "-" else value, Fraction(10) ** (
        shift - len(plain.partition(".")[2])
    ) if rounded else 0


def split_unit(
    text,
):  # (text without its unit, the unit or ""); any word can be the unit of a number
    tail = TAIL.search(text)
    core, words = (
        (text[: tail.start()].strip(), re.findall(r"[a-z]+|[°%$€£/]|-?\d", tail[0].lower()))
        if tail
        else ("", [])
    )
    names = [
        UNITS.get(word) or UNITS.get(word.removesuffix("s"), word.removesuffix("s"))
        for word in words
    ]
    strange = [name for name in names if name.isalpha() and name not in UNITS]
    plausible = not strange or (
        number(core) and not NO_UNIT.intersection(words) and min(map(len, strange)) > 2
    )
    return (core, " ".join(names)) if core and plausible else (text, "")


def items(
    text,
):  # (the brackets around all of it or "", its parts between top-level commas or semicolons)
    depth, end, marks = 0, None, {}
    for m in re.finditer(r"[(\[{]|[)\]}]|;|,(?: ?and\b| ?or\b)?|(?<![A-Za-z\\])(?:and|or)\b", text):
        depth += (m[0] in "([{") - (m[0] in ")]}")
        if m[0] not in "([{)]}":
            marks.setdefault((depth, m[0] == ";"), []).extend(m.span())
        elif depth == 0 and end is None:
            end = m.end()
    inner = int(end == len(text) and text[0] in "([{")
    ends = [inner, *(marks.get((inner, True)) or marks.get((inner, False), [])), len(text) - inner]
    pieces = [
        piece for a, b in zip(ends[::2], ends[1::2], strict=True) if (piece := text[a:b].strip())
    ]
    return (text[0] + text[-1] if inner else ""), pieces


def assignment(
    text,
):  # (name, value) of `x = 7`, `f(x) = ...`, `(p, q) = (3, 2)`; of `a = b = c` the last value
    sides = re.split(r"(?<![<>!\\])=", text)
    name = re.fullmatch(r"(?=.*[A-Za-z])(?:[^\d+*^<>|_-]|_\{[^{}]*\}|_\w)+", sides[0])
    return (
        (key(sides[0]), sides[-1].strip())
        if len(sides) > 1 and name and len(items(text)[1]) == 1
        else None
    )


@functools.lru_cache(maxsize=1 << 14)
def same(p, g):  # are two cleaned texts one answer? True, False, or None: cannot tell
    p_label, g_label, p_truth, g_truth = label(p), label(g), TRUTH.match(p), TRUTH.match(g)
    if key(p) == key(g) != "" or (p_label and p_label[1] and not g_label and same(p_label[1], g)):
        return True
    if not p or not g or "()" in p or max(map(p.count, "([{")) > MAX_DEPTH:
        return False
    if p_label and g_label:
        return p_label[0] == g_label[0] and not (
            p_label[1] and g_label[1] and same(p_label[1], g_label[1]) is False
        )
    if g_label:
        return same(p, g_label[1])
    if g_truth:
        return p_truth is not None and bool(p_truth[1]) == bool(g_truth[1])
    (p_core, p_unit), (g_core, g_unit) = split_unit(p), split_unit(g)
    p_number, g_number, p_items, g_items = (
        number(p_core),
        number(g_core),
        items(p)[1][1:],
        items(g)[1][1:],
    )
    p_name, g_name, p_word, g_word = (
        assignment(p),
        assignment(g),
        WORDS.fullmatch(p),
        WORDS.fullmatch(g) and len(g) > 2,
    )
    if p_number and g_number and "%" in (p_unit, g_unit) and "" in (p_unit, g_unit):
        of, plain = (p_number[0], g_number[0]) if p_unit else (g_number[0], p_number[0])
        return (
            of == plain * 100 or of == plain >= 1
        )  # 10% is 0.1 and, where it cannot be meant as a proportion, 10
    if p_unit and g_unit and p_unit != g_unit:
        return False
    if p_number and g_number:
        return p_number[0] == g_number[0] or abs(p_number[0] - g_number[0]) < max(
            p_number[1], g_number[1]
        )
    if p_items and g_items and not p_number and not g_number:
        return same_items(*items(p), *items(g))
    if (
        p_word
        and (g_word or g_number)
        or g_word
        and p_number
        or re.fullmatch(r"(?:#\d+ ?: ?\d+){2}", f"#{p}#{g}")
    ):
        return False
    if p_items and g_number or g_items and p_number:
        return (
            None if PROSE.search(p) or re.fullmatch(r"-?\d+,\d+", p) else False
        )  # 1000,99 may be a decimal
    if (
        p_name and g_name and p_name[0] != g_name[0] and len(p_name[0] + g_name[0]) == 2
    ):  # another variable's value
        return False if number(p_name[1]) and number(g_name[1]) else None
    if p_name or g_name:
        return same(p_name[1] if p_name else p, g_name[1] if g_name else g)
    return (
        same(p_core, g_core)
        if (p_unit or g_unit) and not (TAIL.search(p_core) or TAIL.search(g_core))
        else None
    )


def same_items(p_kind, ps, g_kind, gs):
    if len(ps + gs) > MAX_ITEMS or any(map(PROSE.search, ps + gs)):
        return None
    brackets = [kind not in ("", "{}") for kind in (p_kind, g_kind)]
    names = [{name[0] for name in map(assignment, those) if name} for those in (ps, gs)]
    if any(brackets) or (
        max(map(len, names)) > 1 and not all(names)
    ):  # in order; k=45, n=2 gives 45, 2 an order
        if len(ps) != len(gs) or (
            all(brackets) and p_kind != g_kind and len(gs) == 2
        ):  # other ends of an interval
            return False
        rows = [
            [None if "{}" in (p_kind, g_kind) else same(a, b)] for a, b in zip(ps, gs, strict=True)
        ]
    else:
        rows = [[same(a, b) for a in ps] for b in gs] + [[same(a, b) for b in gs] for a in ps]
    return (
        False
        if any(set(row) == {False} for row in rows)
        else all(True in row for row in rows) or None
    )


_lock, _process = threading.Lock(), None
os.register_at_fork(
    after_in_child=lambda: globals().update(_lock=threading.Lock(), _process=None)
)  # not its pipes


@functools.lru_cache(maxsize=1 << 14)
def math_verify(pred, gold):
    """The worker's verdict; False without Math-Verify and at a limit. A worker that somebody ended is replaced."""
    global _process
    if importlib.util.find_spec("math_verify") is None:
        warnings.warn(
            "Math-Verify is missing (extra `math`): answers are compared as texts and numbers",
            stacklevel=1,
        )
        return False
    with _lock:
        process, _process = (
            _process,
            None,
        )  # so that after an interrupt nobody reads another question's answer
        if process is None or process.poll() is not None:
            command = [sys.executable, "-P", __file__, "--worker"]
            process = Popen(command, bufsize=0, stdin=PIPE, stdout=PIPE, stderr=DEVNULL)
        process.stdin.write(json.dumps([pred, gold]).encode() + b"\n")
        if not (line := process.stdout.readline()):
            raise RuntimeError(
                "the Math-Verify worker ended: `python engine/answers.py --worker` shows why"
            )
        _process = process
        return json.loads(line)


def serve():
    """The worker: a line [pred, gold] in, a verdict out, each from a child of its own that may hang, swell or crash."""
    from math_verify import parse, verify

    def read(text):  # as a formula where nothing in it says prose, else by Math-Verify's extraction
        text = text.translate(UNICODE).replace("\\$", "")
        formula = not re.search(
            r"(?<![\\{A-Za-z])(?!sqrt)[A-Za-z]{4,}|\$|\\[(\[]|\\boxed|[^\0-\x7f]|^[-\d.,]+$", text
        )
        return (parse(f"${text}$", parsing_timeout=None) if formula else []) or parse(
            text, parsing_timeout=None
        )

    verify(
        read("\\frac{1}{2}"), read("0.5"), timeout_seconds=None
    )  # fills the parser's tables before the forks
    for line in sys.stdin:
        if (child := os.fork()) == 0:
            try:
                resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
                signal.setitimer(
                    signal.ITIMER_REAL, SECONDS
                )  # its signal ends the child, whatever that is doing
                pred, gold = map(read, json.loads(line))
                os._exit(0 if verify(gold, pred, timeout_seconds=None) else 1)
            finally:
                os._exit(1)
        print(json.dumps(os.waitpid(child, 0)[1] == 0), flush=True)


if __name__ == "__main__" and sys.argv[1:] == ["--worker"]:
    serve()
