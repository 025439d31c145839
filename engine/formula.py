r"""Reads a formula, or refuses to: `parse(text)` gives the tree of an expression or a relation.

The text is one that `engine.spelling.clean` gives. Every digit, letter and sign of it has to find a
place in the tree, or the text is no mathematics and the answer is None: words, units, `x2`, `3 4`,
`1/2x` (is x above or below?). So what Math-Verify is asked about holds all that was written.

    2x + \sqrt{3}   ["+", ["*", "2", ["symbol", "x"]], ["sqrt", "3"]]
    x \le \frac12   ["<=", ["symbol", "x"], ["/", "1", "2"]]

A node is a list of an operator and its operands, a leaf the digits of a number. AB is one symbol (a
line), xy are two; log has base 10; e and i are the constants.
"""

import re
from functools import lru_cache

MAX_DEPTH = 20  # of brackets and functions
MAX_TOKENS = 200  # a tree is no deeper than that, whoever walks it

TOKEN = re.compile(
    r" *(?:(?P<number>(?:\d+(?:,\d{3})*(?:\.\d+)?|\.\d+)(?:[eE]-?\d+)?)|(?P<command>\\[A-Za-z]+)"
    r"|(?P<letters>[A-Za-z]+)|(?P<sign>[-+*/^_!|(){}\[\]=<>°]))"
)
RELATIONS = {"=": "=", "<": "<", ">": ">", r"\le": "<=", r"\ge": ">=", r"\ne": "!="}
TIMES = {"*", r"\cdot", r"\times"}
CLOSING = {"(": ")", "{": "}", "[": "]", "|": "|", r"\lfloor": r"\rfloor", r"\lceil": r"\rceil"}
AROUND = {"|": "abs", r"\lfloor": "floor", r"\lceil": "ceiling"}
FUNCTIONS = set("sin cos tan cot sec csc arcsin arccos arctan sinh cosh tanh ln exp".split())
OTHER_NAMES = {"tg": "tan", "ctg": "cot", "arctg": "arctan"}
INVERSE = {"sin": "arcsin", "cos": "arccos", "tan": "arctan"}
CONSTANTS = {r"\pi": "pi", "e": "e", "i": "i", r"\infty": "infinity"}
GREEK = set(
    r"""\alpha \beta \gamma \delta \epsilon \varepsilon \theta \lambda \mu \nu \phi \varphi \rho
    \sigma \tau \omega \Delta \Omega""".split()
)
DECORATIONS = set(r"\overline \bar \vec \overrightarrow \hat \angle \triangle \widehat".split())
UNKNOWN_FUNCTIONS = set("fgh")
WORDS = set("an and are as at be by do for if in is it no not of on or so the to up was we".split())


def symbols(tree):
    """The names of unknowns and functions in a tree."""
    if isinstance(tree, str):
        return set()
    operator, *operands = tree
    if operator == "symbol":
        return {operands[0]}
    if operator == "constant":
        return set()
    if operator == "call":
        return {operands[0]} | symbols(operands[1])
    return set().union(*map(symbols, operands))


def is_relation(tree):
    return tree[0] in RELATIONS.values()


class Unreadable(ValueError):
    """The text is no formula."""


@lru_cache(maxsize=1 << 12)
def parse(text):
    """The tree of a formula, or None."""
    try:
        reader = Reader(tokenize(text))
        tree = reader.relation()
        reader.expect(None)
        return tree
    except Unreadable:
        return None


def tokenize(text):
    text = text.rstrip()
    tokens = []
    place = 0
    while place < len(text):
        found = TOKEN.match(text, place)
        if not found:
            raise Unreadable
        tokens.append(found[0].strip())
        place = found.end()
        if len(tokens) > MAX_TOKENS:
            raise Unreadable
    return tokens


class Reader:
    """Recursive descent: relation, sum, product, factor, atom, each over the next tokens."""

    def __init__(self, tokens):
        self.tokens = tokens
        self.place = 0
        self.depth = 0

    @property
    def next(self):
        return self.tokens[self.place] if self.place < len(self.tokens) else None

    def take(self):
        token = self.next
        if token is None:
            raise Unreadable
        self.place += 1
        return token

    def accept(self, *tokens):
        return self.take() if self.next in tokens and self.next is not None else None

    def expect(self, token):
        if self.next != token:
            raise Unreadable
        self.place += 1

    def relation(self):
        left = self.sum()
        if self.next in RELATIONS:
            operator = RELATIONS[self.take()]
            return [operator, left, self.sum()]
        return left

    def sum(self):
        sign = self.accept("+", "-")
        total = self.product()
        if sign == "-":
            total = ["-", total]
        while self.next in ("+", "-"):
            if self.take() == "+":
                total = ["+", total, self.product()]
            else:
                total = ["+", total, ["-", self.product()]]
        return total

    def product(self):
        total = self.factor()
        divided = False
        while True:
            if self.accept(*TIMES):
                sign = self.accept("-")
                factor = self.factor()
                total = ["*", total, ["-", factor] if sign else factor]
            elif self.accept("/"):
                total = ["/", total, self.factor()]
                divided = True
            elif self.begins_factor():
                if divided:
                    raise Unreadable  # `1/2x`
                total = self.juxtaposed(total)
            else:
                return total

    def juxtaposed(self, left):
        r"""`2x` is a product, the mixed number `3\frac{1}{2}` a sum."""
        fraction = self.next == r"\frac"
        right = self.factor()
        whole = isinstance(left, str) and left.isdigit()
        if whole and fraction and all(isinstance(part, str) for part in right[1:]):
            return ["+", left, right]
        return ["*", left, right]

    def begins_factor(self):
        """Can the next token stand behind a factor without a sign? A number cannot."""
        token = self.next
        if (
            token is None
            or token in RELATIONS
            or token in TIMES
            or token in (r"\rfloor", r"\rceil")
        ):
            return False
        return token[0] == "\\" or token.isalpha() or token in "({["

    def factor(self):
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise Unreadable
        base = self.atom()
        self.depth -= 1
        while True:
            if self.accept("!"):
                base = ["!", base]
            elif self.accept("°"):
                base = ["°", base]
            elif self.accept("^"):
                base = ["^", base, self.exponent()]
            else:
                return base

    def exponent(self):
        if self.accept("-"):
            return ["-", self.atom()]
        if self.next and self.next.isalpha() and len(self.next) > 1:
            raise Unreadable  # `x^ab`
        return self.atom()

    def atom(self):
        token = self.take()
        if token[0].isdigit() or token[0] == ".":
            return token.replace(",", "")
        if token in CLOSING:
            inner = self.sum()
            self.expect(CLOSING[token])
            return [AROUND[token], inner] if token in AROUND else inner
        if token in CONSTANTS:
            return ["constant", CONSTANTS[token]]
        if token in GREEK:
            return ["symbol", token + self.index()]
        if token in DECORATIONS:
            return ["symbol", token + self.name()]
        if token[0] == "\\":
            return self.command(token[1:])
        if token.isalpha():
            return self.letters(token)
        raise Unreadable

    def command(self, name):
        name = OTHER_NAMES.get(name, name)
        if name in ("frac", "binom"):
            operator = "/" if name == "frac" else "binomial"
            return [operator, self.group("{"), self.group("{")]
        if name == "sqrt":
            if self.next == "[":
                degree = self.group("[")
                return ["root", self.group("{"), degree]
            return ["sqrt", self.group("{")]
        if name in ("log", "lg"):
            base = self.subscript() or "10"
            return ["log", self.argument(), base]
        if name in FUNCTIONS:
            return self.function(name)
        raise Unreadable

    def group(self, opening):
        self.expect(opening)
        inner = self.sum()
        self.expect(CLOSING[opening])
        return inner

    def subscript(self):
        """The base of a logarithm."""
        return self.atom() if self.accept("_") else None

    def function(self, name):
        r"""`\sin x`, `\sin^2 x`, `\sin^{-1} x`."""
        power = self.exponent() if self.accept("^") else None
        if power == ["-", "1"] and name in INVERSE:
            return [INVERSE[name], self.argument()]
        value = [name, self.argument()]
        return ["^", value, power] if power else value

    def argument(self):
        r"""Of `\sin(x)` what is in brackets, of `\sin 2x` all up to a sign or a function."""
        if self.next in ("(", "{"):
            return self.group(self.next)
        total = self.factor()
        while self.begins_factor() and self.next.lstrip("\\") not in FUNCTIONS | {"log", "frac"}:
            if self.next in ("(", "["):
                raise Unreadable  # `\sin x(x + 1)`
            total = ["*", total, self.factor()]
        return total

    def letters(self, token):
        """One symbol, a line AB, or a product of single letters."""
        if token.isupper() and len(token) > 1:
            return ["symbol", token + self.index()]
        if len(token) > 3 or token in WORDS or not (token.islower() or len(token) == 1):
            raise Unreadable
        factors = [self.letter(letter) for letter in token[:-1]]
        last = token[-1]
        if last in UNKNOWN_FUNCTIONS and self.next == "(":
            factors.append(["call", last, self.group("(")])
        else:
            factors.append(self.letter(last, self.index()))
        total = factors[0]
        for factor in factors[1:]:
            total = ["*", total, factor]
        return total

    def letter(self, letter, index=""):
        if letter in CONSTANTS and not index:
            return ["constant", CONSTANTS[letter]]
        return ["symbol", letter + index]

    def index(self):
        """`_1` or `_{12}` behind a letter, as a part of its name."""
        if not self.accept("_"):
            return ""
        if not self.accept("{"):
            return "_" + self.name()
        name = ""
        while self.next != "}":
            name += self.take()
        self.expect("}")
        return "_" + name

    def name(self):
        """Letters or digits, in braces or not, that stand for nothing but themselves."""
        braces = self.accept("{")
        name = self.take()
        if not name.isalnum():
            raise Unreadable
        if braces:
            self.expect("}")
        return name
