"""
A short program that understands statements about three towers of blocks and verifies them step by
step: human-written ones, NLVR's.

A picture is three towers, left to right; a tower is the colours of its blocks from its base up:
(("yellow",), ("blue", "black"), ("black", "black", "yellow")). A statement says how many towers
fulfil some conditions ("there are exactly two towers with a blue block at the base"), or how many
blocks of a colour the picture has ("there are 3 yellow blocks").

    statement = parse("there is a tower with 3 blocks and a blue block at the base")    # or None
    spell_out(statement)                 # "at least 1 tower size exactly 3 and base blue"
    sentences, verdict = verify(statement, towers)    # ["left size 3 base blue yes 1", ..], True

None: not understood; the caller has to refuse it. What is understood depends on the words alone,
never on an answer. What words mean was chosen kind by kind, so that verdicts are NLVR's answers as
often as can be (one choice was open, that bare numbers are exact, in bench/NOTES.md):

    a, the                     at least one
    1, two, 3                  exactly so many, as with "exactly" and "only" before the number
    at least, at most ..       as they say
    above, over, on            the next block up; below: the next block down
    base, bottom, wall         the lowest block of a tower; top: the highest
    only blue and black        each of these colours, and no other
    each, all                  all three towers
"""

import re
from dataclasses import dataclass

COLOURS = ("black", "blue", "yellow")
TOWERS = ("left", "middle", "right")
MANY = 12  # blocks in a picture at most: three towers of four

NUMBERS = {"one": "1", "two": "2", "three": "3", "four": "4", "five": "5", "six": "6"}

# Other words for the same: (pattern, replacement), one after the other. `parse` reads the rest.
SYNONYMS = (
    (r"[.,;/\s]+", " "),
    (r"^ll ", "all "),  # NLVR's files have lost the first letter of some statements
    (r"^(at least|tleast|t least) ", "there is at least "),
    (r"^(one|two) ", r"there is \1 "),
    (r"\bthere is (as|a)?(?=(black|blue|yellow))", "there is a "),
    (r"\bthere isa\b", "there is a"),
    (r"\batleast\b|\bat leats\b", "at least"),
    (r"\b(grey )?box(es)?\b|\btowers\b", "tower"),
    (r"\bblocks\b|\bitems?\b|\bobjects?\b|\bsquares?\b|\bsquere\b|\bblccks\b", "block"),
    (r"\bcolou?rs?\b", "colour"),
    (r"\b(a )?single\b", "exactly 1"),
    (r"\b(one|two|three|four|five|six)\b", lambda match: NUMBERS[match[1]]),
    (r"\b(black|blue|yellow) 1\b", r"\1 block"),  # a black one
    (r"\b(bellow|beneath)\b", "below"),
    (r"\b((that|which|than|it) )?(has|have|having|contains?)\b", "with"),
    (r"\bwith with\b|\bof which\b", "with"),
    (r"\bwhich (is|are)\b", "and"),
    (r"\btouching the (wall|base)\b|\b(at|as) (the )?(base|bottom)\b", "at base"),
    (r"\bas the top\b|\b(at|on) the top\b|\bat top\b", "at top"),
    (r"\b(right |directly )?on top of\b|\bover\b|\bon(?= (a|the|black|blue|yellow)\b)", "above"),
    (r"\bon top\b", "at top"),
    (r"\bstacked together\b|\battached with each other\b", "stacked"),
    (r" +", " "),
)

COLOUR = "(black|blue|yellow)"
HOW_MANY = r"(exactly|only|at least|at most|more than)? ?(an|a|the|no|\d)?"  # two groups
SOME = f"{HOW_MANY} ?{COLOUR}(?: block)?"  # three groups: "at least 2 blue block"
PALETTE = f"{COLOUR}(?: and {COLOUR})?"  # two groups


@dataclass(frozen=True)
class Condition:
    """What a tower has to fulfil.

    base, second, top: the colour of that block; above: a block of the first colour directly on one
    of the second; only: these colours and no other; size, different, stacked, count: the number of
    blocks, of different colours, of blocks of a colour directly on each other, and of blocks of a
    colour, from `least` to `most`.
    """

    kind: str  # base, second, top, above, only, size, different, stacked or count
    colours: tuple = ()
    least: int = 1
    most: int = MANY


@dataclass(frozen=True)
class Statement:
    """So many towers fulfil all conditions; or, where `total` is a colour, it has so many blocks
    in the picture."""

    least: int
    most: int
    conditions: tuple[Condition, ...] = ()
    total: str | None = None


# ---------------------------------------------------------------------------------------- reading
def simplify(sentence: str) -> str:
    """The statement in fewer words: small letters, no marks, one word for each thing."""
    text = sentence.lower().strip()
    for pattern, replacement in SYNONYMS:
        text = re.sub(pattern, replacement, text)
    return text.strip()


def limits(how: str | None, number: str | None) -> tuple[int, int]:
    """The fewest and the most that "at least 2", "a" or "2" allow."""
    if number == "no":
        return 0, 0
    count = int(number) if number and number.isdigit() else 1
    if how in ("exactly", "only"):
        return count, count
    if how == "at least":
        return count, MANY
    if how == "more than":
        return count + 1, MANY
    if how == "at most":
        return 0, count
    if number and number.isdigit():
        return count, count
    return 1, MANY


def palette(*colours: str | None) -> tuple[str, ...]:
    """The colours that a pattern found, each once, in the order of COLOURS."""
    return tuple(colour for colour in COLOURS if colour in colours)


def above(match) -> list[Condition]:
    return [Condition("above", (match[3], match[4]))]


def below(match) -> list[Condition]:
    return [Condition("above", (match[4], match[3]))]


def at_place(match) -> list[Condition]:
    return [Condition(match[4], (match[3],))]


def place_is(match) -> list[Condition]:
    return [Condition(match[1], (match[2],))]


def only_colours(match) -> list[Condition]:
    return [Condition("only", palette(match[1], match[2]))]


def size_and_colours(match) -> list[Condition]:
    least, most = limits(match[1], match[2])
    return [Condition("size", (), least, most), Condition("only", palette(match[3], match[4]))]


def number_of_colours(match) -> list[Condition]:
    number = match[1]
    count = int(number) if number.isdigit() else 1  # "the same"
    return [Condition("different", (), count, count)]


def stacked(match) -> list[Condition]:
    return [Condition("stacked", (match[3],), int(match[2]))]


def count_colour(match) -> list[Condition]:
    least, most = limits(match[1], match[2])
    return [Condition("count", (match[3],), least, most)]


def size(match) -> list[Condition]:
    least, most = limits(match[1], match[2])
    return [Condition("size", (), least, most)]


# How conditions are written, the first that fits counts.
PHRASES = (
    (f"{SOME} above (?:a|the)? ?{COLOUR} block", above),
    (f"{SOME} below (?:a|the)? ?{COLOUR} block", below),
    (f"{SOME} (?:at )?(base|top)(?: and colour)?", at_place),
    (f"(?:the )?(base|top)(?: block)? is {COLOUR}", place_is),
    (f"(?:the )?(second) block(?: from the base)? is {COLOUR}", place_is),
    (r"(?:exactly|only)? ?(\d|same|the same) (?:different )?colour", number_of_colours),
    (r"block of (?:all )?(\d|same|the same) (?:different )?colour", number_of_colours),
    (r"of (?:all )?(\d|same|the same) (?:different )?colour", number_of_colours),
    (rf"{HOW_MANY} block of (?:only )?{COLOUR} and {COLOUR} colour", size_and_colours),
    (rf"only {PALETTE}(?: block| colour| colour block)?", only_colours),
    (rf"block of only {PALETTE} colour", only_colours),
    (rf"{HOW_MANY} {COLOUR} block stacked", stacked),
    (rf"{HOW_MANY} (?:are )?{COLOUR}(?: block|(?= and|$))", count_colour),
    (rf"{HOW_MANY} block", size),
)


def read_conditions(text: str) -> tuple[Condition, ...] | None:
    """All conditions of "a blue block at base and 3 block"; None where a word is left over."""
    found = []
    while text:
        conditions, length = first_phrase(text)
        if not conditions:
            return None
        found += conditions
        text = text[length:].strip()
        text = re.sub(r"^(and with|and|with|where|but) ", "", text)
    return tuple(found)


def first_phrase(text: str) -> tuple[list[Condition], int]:
    """The conditions that the text begins with, and their length in letters; ([], 0) for none."""
    for pattern, conditions_of in PHRASES:
        match = re.match(f"(?:{pattern})(?= |$)", text)
        if match:
            return conditions_of(match), match.end()
    return [], 0


def parse(sentence: str) -> Statement | None:
    """Read a statement; None where it is not understood.

    A statement that speaks of several conditions of one kind ("the base is blue and the base ..")
    is read as their conjunction.
    """
    text = simplify(sentence)
    place = re.fullmatch(
        f"there (?:is|are) {SOME} at (base|top)(?: of {HOW_MANY} tower)?(?: with (.+))?", text
    )
    if place:
        how, number, colour, kind, of_how, of_number, rest = place.groups()
        if of_how or (of_number or "").isdigit():
            how, number = of_how, of_number
        return statement_of(how, number, rest, Condition(kind, (colour,)))
    relation = re.fullmatch(f"there (?:is|are) ({SOME} (above|below) .+)", text)
    if relation:
        return statement_of(relation[2], relation[3], relation[1])
    coloured = re.fullmatch(f"there is (?:a|an) {COLOUR} tower(?: with (.+))?", text)
    if coloured:
        return statement_of(None, "a", coloured[2], Condition("only", (coloured[1],)))
    total = re.fullmatch(f"there (?:is|are) {HOW_MANY} ?{COLOUR} block", text)
    if total:
        least, most = limits(total[1], total[2])
        return Statement(least, most, total=total[3])
    every = re.fullmatch("(?:all|each)(?: of)?(?: the)?(?: 3)? tower with (.+)", text)
    every = every or re.fullmatch("there (?:is|are) (.+) in each tower", text)
    if every:
        return statement_of("exactly", "3", every[1])
    sized = re.fullmatch(
        f"there (?:is|are) {HOW_MANY} ([1-4]) block tower(?: (?:with|and) (.+))?", text
    )
    if sized:
        count = int(sized[3])
        return statement_of(sized[1], sized[2], sized[4], Condition("size", (), count, count))
    towers = re.fullmatch(
        f"(?:there (?:is|are) )?{HOW_MANY} ?(?:of the 3 )?tower (?:with|where) (.+)", text
    )
    if towers:
        return statement_of(towers[1], towers[2], towers[3])
    return None


def statement_of(
    how: str | None, number: str | None, rest: str | None, *first: Condition
) -> Statement | None:
    """So many towers that fulfil the conditions `first` and those that `rest` says."""
    conditions = read_conditions(rest) if rest else ()
    if conditions is None or not first + conditions:
        return None
    least, most = limits(how, number)
    return Statement(least, most, first + conditions)


# -------------------------------------------------------------------------------------- verifying
def spell_out(statement: Statement) -> str:
    """What the statement was understood to say, in words that always mean the same."""
    number = spell_limits(statement.least, statement.most)
    if statement.total:
        return f"{number} {statement.total}"
    return f"{number} tower {' and '.join(spell_condition(c) for c in statement.conditions)}"


def spell_limits(least: int, most: int) -> str:
    """ "exactly 2", "at least 2" or "at most 2"."""
    if least == most:
        return f"exactly {least}"
    if most == MANY:
        return f"at least {least}"
    return f"at most {most}"


def spell_condition(condition: Condition) -> str:
    """A condition in the words of `check`."""
    kind = condition.kind
    if kind == "above":
        return " above ".join(condition.colours)
    if kind == "only":
        return f"only {' '.join(condition.colours)}"
    if kind in ("base", "second", "top"):
        return f"{kind} {condition.colours[0]}"
    number = spell_limits(condition.least, condition.most)
    return " ".join([kind, *condition.colours, number])


def longest_run(tower: tuple, colour: str) -> int:
    """The most blocks of a colour that lie directly on each other."""
    longest = 0
    run = 0
    for block in tower:
        run = run + 1 if block == colour else 0
        longest = max(longest, run)
    return longest


def check(condition: Condition, tower: tuple) -> tuple[str, bool]:
    """What is seen of a condition in a tower, in words; and whether the tower fulfils it."""
    kind = condition.kind
    if kind in ("base", "top"):
        block = tower[0] if kind == "base" else tower[-1]
        return f"{kind} {block}", block in condition.colours
    if kind == "second":
        block = tower[1] if len(tower) > 1 else "none"
        return f"second {block}", block in condition.colours
    if kind == "above":
        upper, lower = condition.colours
        holds = (lower, upper) in zip(tower, tower[1:], strict=False)
        return (f"{upper} above {lower}" if holds else "none"), holds
    if kind == "only":
        present = palette(*tower)
        return f"only {' '.join(present)}", present == condition.colours
    if kind == "size":
        number = len(tower)
    elif kind == "different":
        number = len(set(tower))
    elif kind == "stacked":
        number = longest_run(tower, condition.colours[0])
    else:
        number = tower.count(condition.colours[0])
    words = " ".join([kind, *condition.colours, str(number)])
    return words, condition.least <= number <= condition.most


def verify(statement: Statement, towers: tuple) -> tuple[list[str], bool]:
    """A sentence for each tower, with what is seen and the running total; and the verdict."""
    sentences = []
    total = 0
    for name, tower in zip(TOWERS, towers, strict=True):
        words = [name]
        if statement.total:
            number = tower.count(statement.total)
            words += [statement.total, str(number)]
            total += number
        else:
            checks = [check(condition, tower) for condition in statement.conditions]
            holds = all(each for _, each in checks)
            words += [seen for seen, _ in checks]
            words.append("yes" if holds else "no")
            total += holds
        sentences.append(" ".join([*words, str(total)]))
    return sentences, statement.least <= total <= statement.most
