"""Verifiable rewards: is a response well-formed, and is its answer right? Pure Python; Math-Verify is optional.

Rules come first: options by letter or text, yes/no, numbers, units, percentages, tuples, intervals, sets, `x = ...`. They
say True, False or None (cannot tell); only None (LaTeX, relations, prose) goes to Math-Verify. SymPy can hang or swell on
hostile text, so it lives in a worker process (`rewards.py --worker`, JSON lines over pipes) that imports it once and forks a
child per question, with limits on time and memory: no signals in the caller, so any thread and any notebook may ask.

Where verifiers differ: 10% equals 10 and 0.1; a unit that one side leaves out is ignored, two units must agree after
conversion; bare lists and {sets} have no order, (tuples) have; [1,2), (1,2] and (1,2) differ; a rounded decimal needs six
significant digits; what is longer than MAX_CHARS is wrong. Needs POSIX (fork).
"""

import functools
import importlib.util
import json
import os
import re
import subprocess
import sys
import threading
import warnings
from fractions import Fraction

MAX_CHARS, MAX_DEPTH, MAX_ITEMS = 4000, 20, 64
SECONDS, MEMORY = 1.5, 1 << 30  # for one question to Math-Verify: wall time, bytes
TAGS = ["<caption>", "</caption>", "<think>", "</think>", "<answer>", "</answer>"]


def parts(response):
    """(caption, think, answer), stripped; None unless every tag occurs exactly once, in order, with nothing outside."""
    pieces = re.split(f"({'|'.join(TAGS)})", response) if isinstance(response, str) else []
    texts = [piece.strip() for piece in pieces[0::2]]
    return tuple(texts[1::2]) if pieces[1::2] == TAGS and not any(texts[0::2]) else None


def split_spans(response):
    """(perception, reasoning) in the one canonical form that the discriminator reads; None when malformed."""
    if (found := parts(response)) is None:
        return None
    caption, think, answer = found
    return f"<caption>\n{caption}\n</caption>", f"<think>\n{think}\n</think>\n<answer>\n{answer}\n</answer>"


def score(response, gold, choices=(), equivalent_answers=()):
    """{"accuracy", "format", "reward"}, floats, reward = 0.8 accuracy + 0.2 format; all three are 0 when malformed.
    The answer may be equivalent to `gold` or to any of `equivalent_answers`."""
    found, golds = parts(response), [gold, *(() if equivalent_answers is None else equivalent_answers)]
    accuracy = float(found is not None and any(equivalent(found[2], one, choices) for one in golds))
    well_formed = float(found is not None)
    return {"accuracy": accuracy, "format": well_formed, "reward": 0.8 * accuracy + 0.2 * well_formed}


def equivalent(pred, gold, choices=()):
    """Is `pred` the answer `gold`? `choices`: texts of the options in order. What is not a text, or blank, equals nothing."""
    if not all(isinstance(text, str) and len(text) <= MAX_CHARS and text.strip() for text in (pred, gold)):
        return False
    return _equivalent(pred, gold, () if choices is None else tuple(str(choice)[:MAX_CHARS] for choice in choices))


@functools.lru_cache(maxsize=1 << 14)
def _equivalent(pred, gold, choices):
    p, g, options = clean(pred), clean(gold), [clean(choice) for choice in choices]
    if (right := option(g, options)) is not None:
        if (chosen := option(p, options)) is not None:
            return chosen == right
        if any(same(p, text) for i, text in enumerate(options) if i != right):
            return False
        g, gold = options[right], choices[right]
    verdict = same(p, g)
    return math_verify(pred, gold) if verdict is None else verdict


# ---- Spelling. Patterns may meet any text of MAX_CHARS characters: each takes at worst quadratic time.
UNICODE = str.maketrans({chr(0xFF01 + i): chr(0x21 + i) for i in range(94)} | dict.fromkeys("\u00a0\u2009\u202f", " ") | {
    "−": "-", "–": "-", "²": "^2", "³": "^3", "½": " 1/2", "¼": " 1/4", "¾": " 3/4", "÷": "/", "×": r"\times ", "·": r"\cdot ",
    "π": r"\pi ", "√": r"\sqrt ", "∞": r"\infty ", "≤": r"\le ", "≥": r"\ge ", "≠": r"\ne ", "≈": r"\approx ", "±": r"\pm ",
    "∪": r"\cup ", "∈": r"\in "})  # fmt: skip
REWRITES = [(re.compile(pattern), by) for pattern, by in (
    (r"\\\\(?=[a-zA-Z])", r"\\"), (r"(?<!\\)\$\$?((?:[^$\\]|\\.)*)\$\$?", r" \1 "), (r",\\!\s*|\{,\}(?:\\!)?", ","),
    (r"\\(?:left|right|displaystyle)(?![a-zA-Z])|\\!|\{\}|(?<!\\)\\[()\[\]]", ""), (r"\\[dtc]frac(?![a-zA-Z])", r"\\frac"),
    (r"\\(?:text\w*|math(?:rm|bf|it|sf)|mbox|operatorname)\s*\{([^{}]*)\}", r" \1 "), (r"==", "="),
    (r"\^\s*\{?\s*\\circ\s*\}?|\\(?:degree|circ)(?![a-zA-Z])", "°"), (r"\\[,;: ]|~|\\q?quad(?![a-zA-Z])|\s+", " "),
    (r"\\([{}%$&#])", r"\1"), (r"\\frac ?(\d) ?(\d)", r"\\frac{\1}{\2}"), (r"\\sqrt ?(\w)", r"\\sqrt{\1}"),
    (r"\\([lg])e(?:q|qslant)?(?![a-zA-Z])", r"\\\1e "), (r" +", " "), (r" ?\^ ?", "^"),
    (r"(?i)\b(?:square|sq) ([a-z]+)|\b([a-z]+) squared\b", r"\1\2^2"), (r"(?i)\bcubic ([a-z]+)", r"\1^3"), (" per ", "/"),
    *((rf"(?i)(?<=\d) {name}\b", rf"*10^{n}") for name, n in (("thousand", 3), ("million", 6), ("billion", 9))),
    (r"([$€£]) ?(\d[\d.,]*(?:\*10\^\d)?)", r"\2 \1"), (r"(?<=[\d}]) ?\\approx.*", ""), (r"\\approx", "="),
    (r"(?i)^.*\b(?:answer|result|option|choice)(?: is\b| ?:| ?=) ?:? ?(?=\S)", ""), (r"^[*`\"“ ]+|[*`\"” .,;:]+$", ""))]
BOX, PROSE = re.compile(r"\\+f?box(?:ed)?\s*\{"), re.compile(r"(?:(?<![\\A-Za-z])[A-Za-z]{2,}[ ,.']+){3}[A-Za-z]{2,}")
WORDS = re.compile(r"[A-Za-z\s'\",.!?:;-]*[A-Za-z]{2}[A-Za-z\s'\",.!?:;-]*")


def clean(text):  # one spelling of what LaTeX, Markdown and Unicode write in several ways, without an answer's wrappings
    text, boxes = text.translate(UNICODE), list(BOX.finditer(text))
    if len(boxes) == 1 and (end := closing(text, boxes[0].end() - 1)):
        text = text[boxes[0].end() : end]
    text = BOX.sub("{", text)
    for pattern, by in REWRITES:
        text = pattern.sub(by, text.strip())
    while text[:1] in tuple("({") and text[-1:] in tuple(")}") and closing(text, 0) == len(text) - 1 and not items(text):
        text = text[1:-1].strip()  # brackets around one thing
    return text


def closing(text, at):  # where the bracket at `at` closes, or None; the two may differ in kind, as in [0, 1)
    depth = 0
    for m in re.compile(r"[(\[{]|[)\]}]").finditer(text, at):
        depth += 1 if m[0] in "([{" else -1
        if depth == 0:
            return m.start()


def key(text):  # equal keys, same text: words without case, articles and punctuation; other texts without spaces
    if WORDS.fullmatch(text):
        found = re.findall("[a-z]+", text.lower())
        return "".join(word for word in found if word not in ("a", "an", "the")) or "".join(found)
    return re.sub(r"(?<!\d) +| +(?!\d)", "", re.sub(r"\{(\w)\}", r"\1", text))


# ---- Readings of a cleaned text, None where one does not apply.
TRUTH = re.compile(r"(?i)(?:[a-z ]* is )?(?:(yes|true)|no|false)(?=$|[.,;:!])(?!.*\b(?:yes|no|true|false|not)\b)")
COUNTS = "zero one two three four five six seven eight nine ten eleven twelve".split()
DECIMAL = r"(?:\d{1,3}(?:,\d{3})+|\d{1,3}(?: \d{3})+|\d+)?(?:\.\d+)?(?<=\d)"
NUMBER = re.compile(rf"([+-]?)(?!0+:)(?:(\d+) (?=\d+/))?({DECIMAL})(?:(?:[eE]| ?(?:\\times|\\cdot|[*x]) ?10\^)"
                    r"\{?([+-]?\d{1,3})\}?|\^\{?(-?\d{1,3})\}?| ?(?:/|:(?! ?0)) ?(\d+(?:\.\d+)?))?")  # 12:05 is a time
UNITS = {name: (Fraction(size), base) for names, size, base in (entry.split(":") for entry in (
    "m meter metre:1:m/km kilometer kilometre:1000:m/cm centimeter centimetre:0.01:m/mm millimeter millimetre:0.001:m/"
    "in inch inche:0.0254:m/ft foot feet:0.3048:m/yd yard:0.9144:m/mi mile:1609.344:m/g gram:1:g/kg kilogram:1000:g/"
    "mg milligram:0.001:g/lb pound:453.59237:g/oz ounce:28.349523125:g/l liter litre:1:l/ml milliliter millilitre:0.001:l/"
    "s sec second:1:s/min minute:60:s/h hr hour:3600:s/day:86400:s/° deg degree:1:°/$ dollar usd:1:$/cent ¢:0.01:$/"
    "€ euro:1:€/% percent percentage pct:1:%").split("/")) for name in names.split()}  # fmt: skip
NO_UNIT = set("or and is are not of to the than times more less plus minus by if so because but maybe".split())
TAIL = re.compile(r"(?<![A-Za-z\\])[A-Za-z°%$€£¢]+(?:\^?\{?-?\d\}?)?(?: ?[ /] ?[A-Za-z°$]+(?:\^?\{?-?\d\}?)?)*$")


def label(text):  # `B`, `(b)`, `B.` -> ("B", ""); `(B) the dog`, `B. the dog` -> ("B", "the dog")
    if m := re.fullmatch(r"(?:[Oo]ption |[Cc]hoice )?[(\[]?([A-Ja-j])[)\]]?[.:]?", text):
        return m[1].upper(), ""
    m = re.fullmatch(r"(?:\((?=[A-J]\)))?([A-J])(?:\) ?|[.:] )(?![( ])(.+)", text)
    if m and not re.search(r"\b[A-J][).:]|^(?:[A-J]|and|or)\b(?! [a-z])", m[2]):
        return m[1], m[2]


def option(text, options):  # index of the option named by its text or its letter; -1 where the two disagree
    if (name := key(text)) in (names := [key(o) for o in options]):
        return names.index(name)
    letter, rest = label(text) or ("", "")
    if letter and (index := ord(letter) - 65) < len(options):
        return index if not rest or option(rest, options) in (None, index) else -1


def number(text):  # (value, tolerance) of a number, fraction, mixed number, ratio or power
    text = re.sub(r" ?\\frac ?\{([^{}]+)\} ?\{([^{}]+)\}", r" \1/\2", re.sub(r"^\{(.*)\}$", r"\1", text)).strip()
    if m := NUMBER.fullmatch(re.sub("^([+-]) ", r"\1", text)):
        sign, whole, plain, shift, power, under = m[1], int(m[2] or 0), re.sub("[, ]", "", m[3]), m[4], m[5], m[6]
        if len(plain) < 10 or not power:
            try:
                value = (Fraction(plain) * Fraction(10) ** int(shift or 0)) ** int(power or 1) / Fraction(under or 1)
            except ZeroDivisionError:
                return None
            digits = plain.replace(".", "").lstrip("0") if "." in plain and not under else ""
            places = len(plain.partition(".")[2]) - int(shift or 0)
            return (value + whole) * (-1 if sign == "-" else 1), Fraction(10) ** -places if len(digits) > 5 else 0
    return (COUNTS.index(text.lower()), 0) if text.lower() in COUNTS else None


def split_unit(text):  # (text without its unit, (factor, dimensions) or None); any word can be the unit of a number
    tail, factor, dimensions = TAIL.search(text), Fraction(1), {}
    core = text[: tail.start()].strip() if tail else ""
    if not core or (len(tail[0]) == 1 and tail[0].isalpha() and text[tail.start() - 1] != " "):  # 5m may be a product
        return text, None
    for under, name, power in re.findall(r"(/?) ?([a-z]+|[°%$€£¢][cf]?)\^?\{?(-?\d)?", tail[0].lower()):
        known = UNITS.get(name) or UNITS.get(name.removesuffix("s"))
        if not known and (len(name) < 3 or name in NO_UNIT or not number(core)):
            return text, None
        size, base = known or (1, name.removesuffix("s"))
        power = int(power or 1) * (-1 if under else 1)
        factor, dimensions[base] = factor * size**power, dimensions.get(base, 0) + power
    return core, (factor, dimensions)


def items(text):  # (brackets or "", the parts between top-level separators); None where there are no two parts
    kind = text[0] + text[-1] if text[:1] in tuple("([{") and closing(text, 0) == len(text) - 1 else ""
    inside, depth, marks = text[1:-1] if kind else text, 0, {";": [], ",": []}
    for m in re.finditer(r"[(\[{]|[)\]}]|;|,(?: ?and\b| ?or\b)?|(?<![A-Za-z\\])(?:and|or)\b", inside):
        depth += (m[0] in "([{") - (m[0] in ")]}")
        if depth == 0 and m[0] not in ")]}":
            marks[";" if m[0] == ";" else ","] += m.span()
    ends = [0, *(marks[";"] or marks[","]), len(inside)]
    pieces = [piece for a, b in zip(ends[::2], ends[1::2], strict=True) if (piece := inside[a:b].strip())]
    return (kind, pieces) if len(pieces) > 1 else None


def assignment(text):  # (name, value) of `x = 7`, `f(x) = ...`, `(p, q) = (3, 2)`; of `a = b = c` the last value
    sides = re.split(r"(?<![<>!\\])=", text)
    if len(sides) > 1 and re.fullmatch(r"[^\d+*^<>|=-]*[A-Za-z][^\d+*^<>|=-]*", re.sub(r"_(?:\{[^{}]*\}|\w)", "", sides[0])):
        return key(sides[0]), sides[-1].strip()


@functools.lru_cache(maxsize=1 << 12)
def same(p, g):  # are two cleaned texts one answer? True, False, or None: cannot tell
    if key(p) == key(g) != "":
        return True
    if not p or not g or "()" in p or max(map(p.count, "([{")) > MAX_DEPTH:
        return False
    p_label, g_label = label(p), label(g)
    if p_label and g_label:
        return p_label[0] == g_label[0] and not (p_label[1] and g_label[1] and same(p_label[1], g_label[1]) is False)
    if g_label:
        return same(p, g_label[1])
    if p_label and p_label[1] and same(p_label[1], g):
        return True
    p_truth, g_truth = TRUTH.match(p), TRUTH.match(g)
    if g_truth:
        return p_truth is not None and (p_truth[1] is None) == (g_truth[1] is None)
    (p_core, p_unit), (g_core, g_unit) = split_unit(p), split_unit(g)
    if "." in g_core and re.fullmatch(r"-?\d+,\d+", p_core) and not number(p_core):
        p_core = p_core.replace(",", ".")  # a decimal comma
    p_number, g_number, p_items, g_items = number(p_core), number(g_core), items(p), items(g)
    p_word, g_word = (WORDS.fullmatch(text) and len(text) > 2 for text in (p, g))
    if p_number and g_number:
        return same_quantity(*p_number, p_unit, *g_number, g_unit)
    if g_word and (p_word or p_number) and not (p_items and g_items) or g_number and p_word:
        return False
    if p_items and g_items and not p_number and not g_number:
        return same_items(*p_items, *g_items)
    if p_items and g_number or g_items and p_number:
        return None if PROSE.search(p) else False
    p_name, g_name = assignment(p), assignment(g)
    if p_name and g_name and p_name[0] != g_name[0] and len(p_name[0]) == len(g_name[0]) == 1:  # another variable's value
        return False if number(p_name[1]) and number(g_name[1]) else None
    if p_name or g_name:
        return same(p_name[1] if p_name else p, g_name[1] if g_name else g)
    if p_unit and g_unit and p_unit != g_unit:
        return False
    return same(p_core, g_core) if p_unit or g_unit else None


def same_quantity(p, p_tolerance, p_unit, g, g_tolerance, g_unit):
    if p_unit and g_unit:
        if p_unit[1] != g_unit[1]:
            return False
        p *= p_unit[0] / g_unit[0]
    elif "%" in (p_unit or g_unit or (1, ()))[1]:  # 10% is 0.1 and, if it cannot be meant as a proportion, 10
        of, plain = (p, g) if p_unit else (g, p)
        return of == plain * 100 or of == plain >= 1
    return p == g or abs(p - g) < max(p_tolerance, g_tolerance)


def same_items(p_kind, ps, g_kind, gs):
    if len(ps + gs) > MAX_ITEMS or any(map(PROSE.search, ps + gs)):
        return None
    brackets = [kind not in ("", "{}") for kind in (p_kind, g_kind)]
    names = [{name[0] for name in map(assignment, those) if name} for those in (ps, gs)]
    if any(brackets) or (max(map(len, names)) > 1 and not all(names)):  # in order; k=45, n=2 gives 45, 2 an order
        if len(ps) != len(gs) or (all(brackets) and p_kind != g_kind and len(gs) == 2):  # other ends of an interval
            return False
        rows = [[None if "{}" in (p_kind, g_kind) else same(a, b)] for a, b in zip(ps, gs, strict=True)]
    else:
        rows = [[same(a, b) for a in ps] for b in gs] + [[same(a, b) for b in gs] for a in ps]
    return False if any(set(row) == {False} for row in rows) else all(True in row for row in rows) or None


# ---- Math-Verify, in a worker process.
_lock, _process = threading.Lock(), None
os.register_at_fork(after_in_child=lambda: globals().update(_lock=threading.Lock(), _process=None))  # not its pipes


@functools.cache
def installed():
    found = importlib.util.find_spec("math_verify") is not None
    if not found:
        warnings.warn("Math-Verify is missing (extra `math`): answers are compared as texts and numbers only", stacklevel=5)
    return found


def math_verify(pred, gold):
    """The worker's verdict; False without Math-Verify and where a limit was hit. A worker that died is replaced."""
    global _process
    if not installed():
        return False
    with _lock:
        for _ in range(2):
            process, _process = _process, None  # so that after an interrupt nobody reads the answer to another question
            if process is None:
                command = [sys.executable, "-P", os.path.abspath(__file__), "--worker"]
                process = subprocess.Popen(command, bufsize=0, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
            try:
                process.stdin.write(json.dumps([pred, gold]).encode() + b"\n")
                verdict = json.loads(process.stdout.readline())
            except (OSError, ValueError):
                process.kill()
                process.communicate()
                continue
            _process = process
            return verdict
    raise RuntimeError("rewards.py: the Math-Verify worker does not start; its own error is above")


def serve():
    """The worker: a line [pred, gold] in, a verdict out, each from a child of its own that may hang, swell or crash."""
    import logging
    import resource
    import signal

    from math_verify import parse, verify

    def read(text):  # as LaTeX where nothing in it says prose, else by Math-Verify's extraction
        text = text.translate(UNICODE).replace("\\$", "")
        words = set(re.findall(r"(?<![\\{A-Za-z])[A-Za-z]{4,}", text)) - {"sqrt"}
        formula = not words and not re.search(r"\$|\\[(\[]|\\boxed|[^\0-\x7f]", text)
        return (parse(f"${text}$", parsing_timeout=None) if formula else []) or parse(text, parsing_timeout=None)

    logging.disable()
    verify(read("\\frac{1}{2}"), read("0.5"), timeout_seconds=None)  # fills the parser's tables before the forks
    for line in sys.stdin:
        if (child := os.fork()) == 0:
            verdict = 1
            try:
                resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
                signal.setitimer(signal.ITIMER_REAL, SECONDS)  # its signal ends the child, whatever that is doing
                pred, gold = map(read, json.loads(line))
                verdict = 0 if verify(gold, pred, timeout_seconds=None) else 1
            finally:
                os._exit(verdict)
        print(json.dumps(os.waitpid(child, 0)[1] == 0), flush=True)


if __name__ == "__main__" and sys.argv[1:] == ["--worker"]:
    serve()
