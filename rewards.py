"""Verifiable rewards: is a response well-formed, and is its answer right? Pure Python; Math-Verify is optional.

Rules come first: options by letter or text, yes/no, numbers, units, percentages, tuples, intervals, sets, `x = ...`.
They say True, False or None (cannot tell); only None (LaTeX, relations, prose) goes to Math-Verify. SymPy can hang or
swell on hostile text, so it lives in a worker process (`rewards.py --worker`, JSON lines over pipes) that forks a child
per question, with limits on time and memory: no signals in the caller, so any thread or notebook may ask. POSIX only.
Where verifiers differ: 10% equals 10 and 0.1; a unit that one side leaves out is ignored, two units are converted; bare
lists and {sets} have no order, (tuples) have; [1,2), (1,2] and (1,2) differ; a rounded decimal needs six significant
digits; what is longer than MAX_CHARS is wrong."""

import functools
import importlib.util
import json
import os
import re
import resource
import signal
import subprocess
import sys
import threading
import warnings
from fractions import Fraction

MAX_CHARS, MAX_DEPTH, MAX_ITEMS = 4000, 20, 64
SECONDS, MEMORY = 1.5, 1 << 30  # for one question to Math-Verify: wall time, bytes
HAVE_MATH_VERIFY = importlib.util.find_spec("math_verify") is not None
TAGS = ["<caption>", "</caption>", "<think>", "</think>", "<answer>", "</answer>"]


def parts(response):
    """(caption, think, answer), stripped; None unless every tag occurs exactly once, in order, with nothing outside."""
    pieces = re.split(f"({'|'.join(TAGS)})", response) if isinstance(response, str) else []
    texts = [piece.strip() for piece in pieces[0::2]]
    return tuple(texts[1::2]) if pieces[1::2] == TAGS and not any(texts[0::2]) else None


def split_spans(response):
    """(perception, reasoning) in the one canonical form that the discriminator reads; None when malformed."""
    p = parts(response)
    return p and (f"<caption>\n{p[0]}\n</caption>", f"<think>\n{p[1]}\n</think>\n<answer>\n{p[2]}\n</answer>")


def score(response, gold, choices=(), equivalent_answers=()):
    """{"accuracy", "format", "reward"}: floats, reward = 0.8 accuracy + 0.2 format; all three are 0 when malformed.
    The answer is right if it is equivalent to `gold` or to one of `equivalent_answers`."""
    p, golds = parts(response), [gold, *(() if equivalent_answers is None else equivalent_answers)]
    accuracy, well_formed = float(bool(p) and any(equivalent(p[2], g, choices) for g in golds)), float(bool(p))
    return {"accuracy": accuracy, "format": well_formed, "reward": 0.8 * accuracy + 0.2 * well_formed}


def equivalent(pred, gold, choices=()):
    """Is `pred` the answer `gold`? `choices`: the options' texts in order. What is blank or no text equals nothing."""
    if not all(isinstance(text, str) and len(text) <= MAX_CHARS and text.strip() for text in (pred, gold)):
        return False
    choices = [] if choices is None else [str(choice)[:MAX_CHARS] for choice in choices]
    p, g, options = clean(pred), clean(gold), [clean(choice) for choice in choices]
    if (right := option(g, options)) is not None:
        if (chosen := option(p, options)) is not None:
            return chosen == right
        if any(same(p, text) for i, text in enumerate(options) if i != right):
            return False
        g, gold = options[right], choices[right]
    return math_verify(pred, gold) if (verdict := same(p, g)) is None else verdict


# ---- Spelling. Patterns may meet any text of MAX_CHARS characters: each takes at worst quadratic time.
UNICODE = str.maketrans({chr(0xFF01 + i): chr(0x21 + i) for i in range(94)} | {
    "\u00a0": " ", "\u2009": " ", "\u202f": " ", "−": "-", "–": "-", "²": "^2", "³": "^3", "½": " 1/2", "÷": "/",
    "×": r"\times ", "·": r"\cdot ", "π": r"\pi ", "√": r"\sqrt ", "∞": r"\infty ", "≤": r"\le ", "≥": r"\ge ",
    "≠": r"\ne ", "≈": r"\approx ", "±": r"\pm ", "∪": r"\cup ", "∈": r"\in "})  # fmt: skip
BRACES = r"\{((?:[^{}]|\{(?:[^{}]|\{(?:[^{}]|\{[^{}]*\})*\})*\})*)\}"
BOX = re.compile(r"\\+f?box(?:ed)?\s*" + BRACES)
REWRITES = [(re.compile(pattern), by) for pattern, by in (
    (r"\\\\(?=[a-zA-Z])", r"\\"), (r"(?<!\\)\$\$?((?:[^$\\]|\\.)*)\$\$?", r" \1 "), (r",\\!\s*|\{,\}(?:\\!)?", ","),
    (r"\\(?:left|right|displaystyle)(?![a-zA-Z])|\\!|\{\}|(?<!\\)\\[()\[\]]", ""), ("==", "="),
    (r"\\[dtc]frac(?![a-zA-Z])", r"\\frac"), (r"\\[,;: ]|~|\\q?quad(?![a-zA-Z])|\s+", " "), (r"\\([{}%$&#])", r"\1"),
    (r"\\(?:text\w*|math(?:rm|bf|it|sf)|mbox|operatorname) ?\{([^{}]*)\}", r" \1 "),
    (r"\^ ?\{? ?\\circ ?\}?|\\(?:degree|circ)(?![a-zA-Z])", "°"), (r"\\frac ?(\d) ?(\d)", r"\\frac{\1}{\2}"),
    (r"\\sqrt ?(\w)", r"\\sqrt{\1}"), (r"\\([lg])e(?:q|qslant)?(?![a-zA-Z])", r"\\\1e "), (" +", " "), (r" ?\^ ?", "^"),
    (r"(?i)\b(?:square|sq) ([a-z]+)|\b([a-z]+) squared\b", r"\1\2^2"), (r"(?i)\bcubic ([a-z]+)", r"\1^3"),
    *((rf"(?i)(?<=\d) {name}\b", rf"*10^{n}") for name, n in (("thousand", 3), ("million", 6), ("billion", 9))),
    (r"([$€£]) ?(\d[\d.,]*(?:\*10\^\d)?)", r"\2 \1"), (r"(?<=[\d}]) ?\\approx.*", ""), (r"\\approx", "="),
    (r"(?i)^.*\b(?:answer|result|option|choice)(?: is\b| ?:| ?=) ?:? ?(?=\S)", ""),
    (r" per | ?/ ?", "/"), (r"^[*`\"“ ]+|[*`\"” .,;:]+$", ""))]  # fmt: skip
PROSE = re.compile(r"(?:(?<![\\A-Za-z])(?!and\b|or\b)[A-Za-z]{2,}(?![A-Za-z]).*?){4}")  # four words
WORDS = re.compile(r"[A-Za-z\s'\",.!?:;-]*[A-Za-z]{2}[A-Za-z\s'\",.!?:;-]*")


def clean(text):  # one spelling of what LaTeX, Markdown and Unicode write in several ways, without wrappings
    text = text.translate(UNICODE)
    while boxes := BOX.findall(text):
        text = boxes[0] if len(boxes) == 1 else BOX.sub(r"\1", text)
    for pattern, by in REWRITES:
        text = pattern.sub(by, text.strip())
    while (found := items(text))[0] in ("()", "{}") and len(found[1]) == 1:  # brackets around one thing
        text = found[1][0]
    return text


def key(text):  # of words: without case, articles, punctuation; of other texts: without spaces
    if WORDS.fullmatch(text):
        return "".join(re.findall("[a-z]+", re.sub(r"\b(?:an?|the)\b(?=.*[a-z])", "", text.lower())))
    return re.sub(r"(?<!\d) +| +(?!\d)", "", re.sub(r"\{(\w)\}", r"\1", text))


# ---- Readings of a cleaned text, None where one does not apply.
TRUTH = re.compile(r"(?i)(?:[a-z ]* is )?(?:(yes|true)|no|false)(?=$|[.,;:!])(?!.*\b(?:yes|no|true|false|not)\b)")
DECIMAL = r"(?:\d{1,3}(?:,\d{3})+|\d{1,3}(?: \d{3})+|\d+)?(?:\.\d+)?(?<=\d)"
NUMBER = re.compile(rf"([+-]?) ?(?!0+:)(?:(\d+) (?=\d+/))?({DECIMAL})(?:(?:[eE]| ?(?:\\times|\\cdot|[*x]) ?10\^)"
                    r"\{?([+-]?\d{1,3})\}?|\^\{?(-?\d{1,3})\}?| ?(?:/|:(?! ?0)) ?(\d+(?:\.\d+)?))?")  # 12:05 is a time
UNITS = {name: (Fraction(size), base) for names, size, base in (entry.split(":") for entry in (
    "m meter metre:1:m,km kilometer kilometre:1000:m,cm centimeter centimetre:0.01:m,mm millimeter millimetre:0.001:m,"
    "in inch inche:0.0254:m,ft foot feet:0.3048:m,yd yard:0.9144:m,mi mile:1609.344:m,g gram:1:g,kg kilogram:1000:g,"
    "mg milligram:0.001:g,lb pound:453.59237:g,oz ounce:28.349523125:g,l liter litre:1:l,ml milliliter:0.001:l,"
    "s sec second:1:s,min minute:60:s,h hr hour:3600:s,day:86400:s,° deg degree:1:°,$ dollar usd:1:$,cent:0.01:$,"
    "€ euro:1:€,% percent percentage pct:1:%").split(",")) for name in names.split()}  # fmt: skip
NO_UNIT = set("or and is are not of to the than times more less plus minus by if so because but maybe".split())
TAIL = re.compile(r"(?<![A-Za-z°%$€£\\])[A-Za-z°%$€£]++(?:\^?\{?-?\d\}?)?(?:[ /][A-Za-z°$]++(?:\^?\{?-?\d\}?)?){0,5}$")


def label(text):  # `B`, `(b)`, `B.` -> ("B", ""); `(B) the dog`, `B. the dog` -> ("B", "the dog")
    if m := re.fullmatch(r"(?:[Oo]ption |[Cc]hoice )?[(\[]?([A-Ja-j])[)\]]?[.:]?", text):
        return m[1].upper(), ""
    m = re.fullmatch(r"(?:\((?=[A-J]\)))?([A-J])(?:\) ?|[.:] )(?![( ])(.+)", text)
    return m.groups() if m and not re.search(r"\b[A-J][).:]|^(?:and|or)\b|^[A-J]\W+[A-J]\b", m[2]) else None


def option(text, options):  # index of the option named by its letter or its text; -1 where the two disagree
    names, (letter, rest) = [key(o) for o in options], label(text) or ("", "")
    lettered = ord(letter) - 65 if letter and ord(letter) - 65 < len(options) else None
    if key(text) in names and (rest or lettered is None):
        return names.index(key(text))
    return -1 if lettered is not None and key(rest) in names and key(rest) != names[lettered] else lettered


def number(text):  # (value, tolerance) of a number, fraction, mixed number, ratio or power
    m = NUMBER.fullmatch(re.sub(r" ?\\frac ?\{([^{}]+)\} ?\{([^{}]+)\}", r" \1/\2", text).strip(" {}"))
    plain, shift = (re.sub("[, ]", "", m[3]), int(m[4] or 0)) if m else ("", 0)
    if not m or (m[5] and (len(plain) > 9 or not Fraction(plain))) or (m[6] and not Fraction(m[6])):
        return None
    value = int(m[2] or 0) + (Fraction(plain) * Fraction(10) ** shift) ** int(m[5] or 1) / Fraction(m[6] or 1)
    rounded = "." in plain and not m[6] and len(plain.replace(".", "").lstrip("0")) > 5
    return -value if m[1] == "-" else value, Fraction(10) ** (shift - len(plain.partition(".")[2])) if rounded else 0


def split_unit(text):  # (text without its unit, (factor, dimensions) or None); any word can be the unit of a number
    tail, factor, dimensions = TAIL.search(text), Fraction(1), {}
    core = text[: tail.start()].strip() if tail else ""
    if not core or (re.fullmatch("[A-Za-z]", tail[0]) and text[tail.start() - 1] != " "):  # 5m may be a product
        return text, None
    for under, name, power in re.findall(r"(/?)([a-z]+|[°%$€£])\^?\{?(-?\d)?", tail[0].lower()):
        size, base = UNITS.get(name) or UNITS.get(name.removesuffix("s")) or (1, name.removesuffix("s"))
        if base not in UNITS and (len(name) < 3 or name in NO_UNIT or not number(core)):
            return text, None
        power = int(power or 1) * (-1 if under else 1)
        factor, dimensions[base] = factor * size**power, dimensions.get(base, 0) + power
    return core, (factor, dimensions)


def items(text):  # (the brackets around all of it or "", its parts between top-level commas or semicolons)
    depth, end, marks = 0, None, {}
    for m in re.finditer(r"[(\[{]|[)\]}]|;|,(?: ?and\b| ?or\b)?|(?<![A-Za-z\\])(?:and|or)\b", text):
        depth += (m[0] in "([{") - (m[0] in ")]}")
        if m[0] not in "([{)]}":
            marks.setdefault((depth, m[0] == ";"), []).extend(m.span())
        elif depth == 0 and end is None:
            end = m.end()
    inner = int(end == len(text) and text[0] in "([{")
    ends = [inner, *(marks.get((inner, True)) or marks.get((inner, False), [])), len(text) - inner]
    pieces = [piece for a, b in zip(ends[::2], ends[1::2], strict=True) if (piece := text[a:b].strip())]
    return (text[0] + text[-1] if inner else ""), pieces


def assignment(text):  # (name, value) of `x = 7`, `f(x) = ...`, `(p, q) = (3, 2)`; of `a = b = c` the last value
    sides = re.split(r"(?<![<>!\\])=", text)
    name = re.sub(r"_(?:\{[^{}]*\}|\w)", "", sides[0])
    if len(sides) > 1 and re.fullmatch(r"[^\d+*^<>|-]*[A-Za-z][^\d+*^<>|-]*", name) and len(items(text)[1]) == 1:
        return key(sides[0]), sides[-1].strip()


@functools.lru_cache(maxsize=1 << 14)
def same(p, g):  # are two cleaned texts one answer? True, False, or None: cannot tell
    if key(p) == key(g) != "":
        return True
    if not p or not g or "()" in p or max(map(p.count, "([{")) > MAX_DEPTH:
        return False
    p_label, g_label, p_truth, g_truth = label(p), label(g), TRUTH.match(p), TRUTH.match(g)
    if p_label and g_label:
        return p_label[0] == g_label[0] and not (p_label[1] and g_label[1] and same(p_label[1], g_label[1]) is False)
    if g_label:
        return same(p, g_label[1])
    if p_label and p_label[1] and same(p_label[1], g):
        return True
    if g_truth:
        return p_truth is not None and bool(p_truth[1]) == bool(g_truth[1])
    (p_core, p_unit), (g_core, g_unit) = split_unit(p), split_unit(g)
    if "." in g_core and re.fullmatch(r"-?\d+,\d+", p_core) and not number(p_core):
        p_core = p_core.replace(",", ".")  # a decimal comma
    p_number, g_number, p_items, g_items = number(p_core), number(g_core), items(p)[1][1:], items(g)[1][1:]
    p_name, g_name = assignment(p), assignment(g)
    if p_number and g_number:
        return same_quantity(*p_number, p_unit, *g_number, g_unit)
    if re.fullmatch(r"\d+ ?: ?\d+", p) and re.fullmatch(r"\d+ ?: ?\d+", g):
        return False  # times that differ
    if p_items and g_items and not p_number and not g_number:
        return same_items(*items(p), *items(g))
    if WORDS.fullmatch(g) and len(g) > 2 and (p_number or WORDS.fullmatch(p)) or g_number and WORDS.fullmatch(p):
        return False
    if p_items and g_number or g_items and p_number:
        return None if PROSE.search(p) else False
    if p_name and g_name and p_name[0] != g_name[0] and len(p_name[0] + g_name[0]) == 2:  # another variable's value
        return False if number(p_name[1]) and number(g_name[1]) else None
    if p_name or g_name:
        return same(p_name[1] if p_name else p, g_name[1] if g_name else g)
    if p_unit and g_unit and p_unit != g_unit:
        return False
    bare = split_unit(p_core)[1] is None and split_unit(g_core)[1] is None
    return same(p_core, g_core) if (p_unit or g_unit) and bare else None


def same_quantity(p, p_tolerance, p_unit, g, g_tolerance, g_unit):
    if p_unit and g_unit:
        return p_unit[1] == g_unit[1] and p * p_unit[0] == g * g_unit[0]
    if "%" in (p_unit or g_unit or ((), ()))[1]:  # 10% is 0.1 and, if it cannot be meant as a proportion, 10
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


@functools.lru_cache(maxsize=1 << 14)
def math_verify(pred, gold):
    """The worker's verdict; False without Math-Verify and where a limit was hit. A worker that died is replaced."""
    global _process
    if not HAVE_MATH_VERIFY:
        warnings.warn("Math-Verify is missing (extra `math`): answers are compared as texts and numbers", stacklevel=1)
        return False
    with _lock:
        for _ in range(2):
            process, _process = _process, None  # so that after an interrupt nobody reads another question's answer
            command = [sys.executable, "-P", os.path.abspath(__file__), "--worker"]
            process = process or subprocess.Popen(command, bufsize=0, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
            try:
                process.stdin.write(json.dumps([pred, gold]).encode() + b"\n")
                verdict, _process = json.loads(process.stdout.readline()), process
                return verdict
            except (OSError, ValueError):
                process.kill()
                process.communicate()
    raise RuntimeError("rewards.py: the Math-Verify worker does not start; its own error is above")


def serve():
    """The worker: a line [pred, gold] in, a verdict out, each from a child of its own that may hang, swell or crash."""
    import logging

    from math_verify import parse, verify

    def read(text):  # as a formula where nothing in it says prose, else by Math-Verify's extraction
        text = text.translate(UNICODE).replace("\\$", "")
        formula = not re.search(r"(?<![\\{A-Za-z])(?!sqrt)[A-Za-z]{4,}|\$|\\[(\[]|\\boxed|[^\0-\x7f]", text)
        return (parse(f"${text}$", parsing_timeout=None) if formula else []) or parse(text, parsing_timeout=None)

    logging.disable()
    verify(read("\\frac{1}{2}"), read("0.5"), timeout_seconds=None)  # fills the parser's tables before the forks
    for line in sys.stdin:
        if (child := os.fork()) == 0:
            status = 1
            try:
                resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
                signal.setitimer(signal.ITIMER_REAL, SECONDS)  # its signal ends the child, whatever that is doing
                pred, gold = map(read, json.loads(line))
                status = 0 if verify(gold, pred, timeout_seconds=None) else 1
            finally:
                os._exit(status)
        print(json.dumps(os.waitpid(child, 0)[1] == 0), flush=True)


if __name__ == "__main__" and sys.argv[1:] == ["--worker"]:
    serve()
