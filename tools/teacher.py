"""
A foreign teacher for the embedded world (tools/scenes.py): demonstrations that are right and whole,
in a manner that is not the base's own (it knows the words), and no two alike.

Places have names of their own ("upper left" for tl, or "nw"), shapes have a second one (disc, box,
wedge).
A response draws its manner anew: in which order a caption goes through the objects and in which
form it names them, whether it says how many there are, in which order and form the reasoning
goes and whether it says what each colour adds, what it opens and closes with. Every way is a valid
one, and none is marked as the best.

    rng = random.Random(0)
    caption, sentences = demonstrate(things, "red or blue", 3, rng)
"""

import random
from dataclasses import dataclass

# Names for the places of tools/scenes.py: of two words, or of one as on a compass.
IN_WORDS = {
    "tl": "upper left",
    "tc": "upper centre",
    "tr": "upper right",
    "ml": "middle left",
    "mc": "middle centre",
    "mr": "middle right",
    "bl": "lower left",
    "bc": "lower centre",
    "br": "lower right",
}
COMPASS = {
    "tl": "nw",
    "tc": "north",
    "tr": "ne",
    "ml": "west",
    "mc": "centre",
    "mr": "east",
    "bl": "sw",
    "bc": "south",
    "br": "se",
}
SECOND_NAMES = {"circle": "disc", "square": "box", "triangle": "wedge"}

# How an object of a caption is named.
FORMS = ("{colour} {shape} {place}", "{place} {colour} {shape}", "{place} : {shape} in {colour}")
# How a step of a reasoning is written.
STEPS = ("{thing} gives {total}", "{total} for {thing}", "plus {thing} : {total}")
ORDERS = ("above", "below", "columns", "colours")
OPENINGS = ("", "", "look for {subject}", "first {subject}")
CLOSINGS = ("so {answer}", "hence {answer}", "that makes {answer}", "the total is {answer}")

COUNTED = 0.3  # share of the captions that begin with the number of objects
WORDS = (  # without the places' names
    *SECOND_NAMES.values(),
    *"look for first hence that makes the total is objects : plus gives".split(),
)


@dataclass(frozen=True)
class Thing:
    """An object of a scene."""

    number: int  # of its place, in raster order
    place: str  # in the teacher's words
    colour: str
    shape: str  # by its first name
    worth: int | None  # what it adds to the answer; None: the question is not about it


def demonstrate(
    things, subject: str, answer: int, rng: random.Random, orders=ORDERS
) -> tuple[str, list[str]]:
    """A caption and the sentences of a reasoning, in a manner that rng draws.

    things: all objects of a scene. subject: the question without its verb. answer: the right one.
    orders: those of ORDERS that the teacher uses.
    """
    asked = [thing for thing in things if thing.worth is not None]
    name = rng.choice(("first", "second"))
    caption = describe(things, name, rng, orders)
    sentences = reason(asked, name, rng, orders)
    opening = rng.choice(OPENINGS).format(subject=subject)
    closing = rng.choice(CLOSINGS).format(answer=answer)
    sentences = [*sentences, closing]
    if opening:
        sentences.insert(0, opening)
    return caption, sentences


def spell(thing: Thing) -> str:
    """An object in the teacher's words: "upper left red disc". The base learns them so."""
    return f"{thing.place} {thing.colour} {called(thing.shape, 'second')}"


def called(shape: str, name: str) -> str:
    """A shape by its first or its second name."""
    return shape if name == "first" else SECOND_NAMES[shape]


# --------------------------------------------------------------------------------------- captions
def describe(things, name: str, rng: random.Random, orders) -> str:
    """All objects with their places, in an order and a form that rng draws."""
    form = rng.choice(FORMS)
    items = []
    for thing in ordered(things, rng.choice(orders), rng):
        shape = called(thing.shape, name)
        items.append(form.format(place=thing.place, colour=thing.colour, shape=shape))
    if rng.random() < COUNTED:
        items.insert(0, f"{len(things)} objects")
    return " ; ".join(items)


def ordered(things, order: str, rng: random.Random) -> list[Thing]:
    """The objects line by line from above or from below, column by column, or by colour."""
    if order == "above":
        return sorted(things, key=lambda thing: thing.number)
    if order == "below":
        return sorted(things, key=lambda thing: -thing.number)
    if order == "columns":
        return sorted(things, key=lambda thing: (thing.number % 3, thing.number))
    colours = sorted({thing.colour for thing in things})
    rng.shuffle(colours)
    return sorted(things, key=lambda thing: (colours.index(thing.colour), thing.number))


# ------------------------------------------------------------------------------------- reasonings
def reason(asked, name: str, rng: random.Random, orders) -> list[str]:
    """Each object that the question is about with the running total, in an order and a form that
    rng draws; where the order is by colours, perhaps each colour with what it adds."""
    form = rng.choice(STEPS)
    order = rng.choice(orders)
    with_colours = order == "colours" and rng.random() < 0.5
    sentences = []
    total = 0
    of_colour = 0
    things = ordered(asked, order, rng)
    for number, thing in enumerate(things):
        total += thing.worth
        of_colour += thing.worth
        shape = called(thing.shape, name)
        thing_named = f"{thing.place} {thing.colour} {shape}"
        sentences.append(form.format(thing=thing_named, total=total))
        is_last = number + 1 == len(things) or things[number + 1].colour != thing.colour
        if with_colours and is_last:
            sentences.append(f"{thing.colour} makes {of_colour}")
            of_colour = 0
    return sentences
