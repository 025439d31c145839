"""
The names and spellings in which others publish rows: questions, options, answers, images; and what
a row can say that is not read here: it is refused, lest a row be trained without its video.

    benchmark        question                  options               answer           images
    MathVista        question                  choices, a list       option's text    decoded_image
    MathVerse        question; else query_wo   in the question       letter, text     image
    MATH-Vision (1)  question with <image1>    options, a list       letter, LaTeX    decoded_image
    We-Math          question                  option "A. 3; B. 4"   letter           image_path
    MMMU             question with <image 1>   options "['3', '4']"  letter, texts    image_1, ..
    MMMU-Pro         question, or in image     options "['3', '4']"  letter           image_1; image
    HallusionBench   question                  none                  gt_answer: 0, 1  image, or none
    MMBench          question                  A, B, C, D            letter           image
    EasyR1           problem with <image>      in the question       answer           images
    R1-V             problem                   options, lettered     solution, tagged image

(1) is verified on a file; the others are the names that published code reads.
"""

import ast
import re
from string import ascii_lowercase, ascii_uppercase

from PIL import Image

from engine.answers import MAX_CHARS, equivalent
from engine.rows import BadRow

# Our names of fields: theirs, of which the first that says something counts.
FIELDS = {
    "images": ("decoded_image", "image", "image_path", "filename"),
    "question": ("question", "problem", "prompt", "query", "query_wo"),
    "choices": ("choices", "options", "option"),
    "answer": ("answer", "gt_answer", "solution"),
}
IMAGE_FIELD = re.compile(r"image_(\d{1,3})")  # of MMMU
OPTION_FIELD = re.compile(r"([A-J])|(?:choice|option)_([A-Ja-j])")  # of MMBench, SEED-Bench


def says(value):
    """Does a field's value say anything? Where a row lacks it, files hold None, NaN, "" or []."""
    if isinstance(value, dict):  # a struct of parquet has all its names
        return any(says(one) for one in value.values())
    if isinstance(value, float):
        return value == value
    return value is not None and value not in ("", b"", [])


def first(row, names):
    """(name, value) of the first of these fields that says something, or (None, None)."""
    for name in names:
        if says(row.get(name)):
            return name, row[name]
    return None, None


def standard(row, where=""):
    """A plain question as {images, numbers, question, choices, answer}, whatever its own names.

    The values are not checked yet; images and numbers as `pictures` returns them. Raises BadRow.
    """
    images, numbers = pictures(row, where, FIELDS["images"], numbered=True)
    _, question = first(row, FIELDS["question"])
    choices = _options(row, where)
    if choices and images and question is None:
        question = "Answer the question in the image."
    name, answer = first(row, FIELDS["answer"])
    if name == "gt_answer":
        answer = {"0": "no", "1": "yes"}.get(str(answer), answer)
    elif name == "solution":  # a worked one does not say which part of it is the answer
        marked = unwrap(str(answer))
        answer = marked if marked != str(answer).strip() else None
    elif isinstance(answer, str):
        several = _spelt(answer)
        if several and all(isinstance(one, str) for one in several):
            answer = several  # several right answers; [1, 2] is an interval
    return {
        "images": images,
        "numbers": numbers,
        "question": question,
        "choices": choices,
        "answer": answer,
    }


def _spelt(text):
    """The list that a text spells as Python writes it, or None."""
    if not text.startswith("["):
        return None
    try:
        return ast.literal_eval(text)
    except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
        return None


# ------------------------------------------------------------------------------------------ images
IMAGE_MARK = re.compile(r"<image[ _]?(\d{1,3})>")
IMAGE_MARK_AT_AN_END = re.compile(r"^<image[ _]?\d{1,3}>\s*|(?<!\s)\s*<image[ _]?\d{1,3}>$")


def pictures(row, where, names=("image",), numbered=False):
    """(the images of a row as a list, the numbers that they have in its text or None).

    They stand under `images`, else under the first of `names` that says something, else, if
    `numbered`, under image_1, image_2, .. Raises BadRow where two of these hold different images.
    """
    images = _listed(row.get("images"))
    name, other = first(row, names)
    other = _listed(other)
    by_number = {}
    if numbered:
        for key, value in row.items():
            match = IMAGE_FIELD.fullmatch(key)
            if match and says(value):
                by_number[int(match[1])] = value
    found = images or other
    doubled = [image for image in other if image not in found]
    if doubled or (found and by_number):
        detail = [name or "images", "image_1, .." if by_number else "images"]
        mend = "Write all of them into `images`, in their order."
        raise BadRow(where, "images under two names", mend, " and ".join(detail))
    if found:
        return found, None
    numbers = sorted(by_number)
    return [by_number[number] for number in numbers], numbers or None


def _listed(value):
    if value is None:
        return []
    return value if isinstance(value, list) else [value]


def name_pictures(question, choices, images, numbers, where):
    """(question, choices) with words for marks: "(image 2)" for <image 2>. Raises BadRow.

    images: how many there are; numbers: as `pictures` returns them, None for 1, 2, .. A picture is
    called by its place among those that there are: image_3 of image_1 and image_3 is the second.
    A single picture may be called by several numbers: they are parts of it (MATH-Vision). A single
    mark of a single picture goes where it stands at an end.
    """
    marks = []
    for text in (question, *choices):
        marks += [int(number) for number in IMAGE_MARK.findall(text)]
    if numbers is not None:
        places = {number: place + 1 for place, number in enumerate(numbers)}
    elif images == 1:
        places = {number: number for number in marks}
    else:
        places = {number: number for number in range(1, images + 1)}
    missing = [f"<image {number}>" for number in marks if number not in places]
    if missing:
        mend = "Give it, or take its mark out of the text."
        raise BadRow(where, "the text calls for an image that is missing", mend, missing[0])

    def words(mark):
        return f"(image {places[int(mark[1])]})"

    if len(marks) == 1 and images == 1:
        question = IMAGE_MARK_AT_AN_END.sub("", question.strip())
    return IMAGE_MARK.sub(words, question), tuple(IMAGE_MARK.sub(words, text) for text in choices)


# ----------------------------------------------------------------------------------------- options
def _options(row, where):
    """The options of a plain question as a list: from a list, from a text like "['3', '4']" or
    "A. 3; B. 4", from {"A": "3", "B": "4"}, or from a field for each letter. None without any."""
    _, choices = first(row, FIELDS["choices"])
    if isinstance(choices, str):
        return _options_in(choices, where)
    if isinstance(choices, dict):
        return _by_letter(choices, where)
    if choices is not None:
        return choices
    columns = {}
    for name, value in row.items():
        match = OPTION_FIELD.fullmatch(name)
        if match:
            columns[(match[1] or match[2]).upper()] = value
    return _by_letter(columns, where) if says(columns.get("A")) else None


def _options_in(text, where):
    text = text.strip("; \n")
    if text.startswith("["):
        found = _spelt(text)
    else:
        found = max(_split_letters(text, "[;\n]"), _split_letters(text, r"\s"), key=len)
        found = found or None
    # One alone: numpy writes lists without commas, of which Python makes a single text.
    if found is None or len(found) == 1:
        mend = "Write `choices` as a list of texts."
        raise BadRow(where, "the options are in no known form", mend)
    return found


def _split_letters(text, separator):
    """["3", "4"] of "A. 3; B. 4": letters in their order, at the start or behind a separator."""
    marks = []
    for letter in ascii_uppercase:
        begin = marks[-1].end() if marks else 0
        pattern = re.compile(rf"(?:^|{separator})\s{{0,20}}\(?{letter}[.:)、．]\s{{0,20}}")
        mark = pattern.search(text, begin)
        if mark is None:
            break
        marks.append(mark)
    if not marks:
        return []
    ends = [mark.start() for mark in marks[1:]] + [len(text)]
    pieces = [text[mark.end() : end] for mark, end in zip(marks, ends, strict=True)]
    return [piece.strip("; \n") for piece in pieces]


def _by_letter(choices, where):
    """The texts of {"A": "3", "B": "4"} in the letters' order. BadRow for a gap: behind it every
    option would be shown with another letter than the answer means."""
    given = {str(letter).upper(): text for letter, text in choices.items() if says(text)}
    letters = sorted(given)
    if letters != list(ascii_uppercase[: len(letters)]):
        mend = "Write `choices` as a list of texts."
        raise BadRow(where, "the options' letters have a gap", mend, ", ".join(letters))
    return [given[letter] for letter in letters]


def unlettered(choices, golds):
    """(choices, golds) without the letters or numbers that the options bring themselves.

    Options are shown with letters of ours. A gold that is one of their numbers becomes that
    option's text.
    """
    if len(choices) < 2:
        return choices, golds
    numbers = [str(n + 1) for n in range(len(choices))]
    for labels in (ascii_uppercase, ascii_lowercase, numbers):
        bare = [_without(choice, label) for choice, label in zip(choices, labels, strict=False)]
        if len(bare) == len(choices) and all(bare):
            if labels is numbers:
                by_number = dict(zip(numbers, bare, strict=True))
                golds = tuple(by_number.get(gold.strip(" ()."), gold) for gold in golds)
            return tuple(bare), golds
    return choices, golds


def _without(choice, label):
    """A choice behind its label: "the lid" of "A) the lid", None where it has another or none."""
    space = r"\s*" if label.isupper() else r"\s+"  # "A.the lid", but not "a.png" or "1.5"
    match = re.match(rf"\s*[(（]?{label}(?:[)）、]\s*|[.:．：]{space})", choice)
    return choice[match.end() :].strip() if match else None


# ------------------------------------------------------------------------------------------- golds
BOX = r"\\f?box(?:ed)?\s?\{((?:[^{}]|\{(?:[^{}]|\{(?:[^{}]|\{[^{}]*\})*\})*\})*)\}"
WRAPPINGS = (re.compile(r"(?is)<answer>(.*?)</answer>"), re.compile(BOX))


def unwrap(gold):
    r"""The answer itself of a text that marks it: <answer> 3 </answer>, \boxed{3}, 1 + 2 #### 3."""
    if len(gold) > 4 * MAX_CHARS:
        return gold
    for wrapping in WRAPPINGS:
        inside = wrapping.findall(gold)
        if len(inside) == 1:
            return unwrap(inside[0].strip())
    return gold.rpartition("####")[2].strip()


def is_among(gold, choices):
    """Is the answer one that can be chosen: an option's letter or text, or several letters?"""
    if gold.isdecimal() and int(gold[:9]) <= len(choices):
        # It may be an index: "1 m" is no option for it then.
        return any(re.fullmatch(rf"[ $]*{gold}(?:\.0+)?[ $.]*", choice) for choice in choices)
    letters = re.sub(r"\band\b|[\s,;&().]", "", gold)
    if letters and set(letters) <= set(ascii_uppercase[: len(choices)]):
        return True
    return any(equivalent(choice, gold, choices) for choice in choices)


# --------------------------------------------------------------------------- what is not read here
ONLY_IMAGES = "Only images are read: leave the row out."
INTO_IMAGES = "Write the images into `images`, in their order, and take this field out."
INTO_TURNS = "Write what the model is to see of it into the turns, and take this field out."
BOXES = "Write the boxes and the names into the text."
ALL_ALIKE = "The assistant's turns are all trained on, each as a whole: take it out, or the row."
ONLY_TEXT = "A turn is read as its role and its text: take it out, or write it into the text."

UNREAD_FIELDS = {  # names, and what is to be done about them
    r"(?:video|audio)s?(?:_?(?:path|url|file|frame|byte)s?)?": ONLY_IMAGES,
    r"(?:image|img|picture|photo|screenshot)s?_?(?:path|url|file|file_?name|base64|byte)s?"
    r"|imgs?|image_\d+|multi_?modal_\w+": INTO_IMAGES,
    r"tools?|functions?|history": INTO_TURNS,
}
# A row's or a turn's flags for training on it: loss, trainable, weight, loss_mask, sample_weight ..
LOSS_FLAG = re.compile(r"(?:loss|train|sample)_?(?:weight|scale|mask)s?|weight|loss|train(?:able)?")
# Fields of text, which may end like a file's name.
TEXTS = {
    *FIELDS["question"],
    *FIELDS["choices"],
    *FIELDS["answer"],
    *("messages", "conversations", "system", "data_source", "id"),
    *("reward_model", "equivalent_answers"),
}
MEDIA_FILE = re.compile(
    r"(?is)[^\n]{1,300}\.(?:png|jpe?g|webp|gif|bmp|tiff?|svg|heic|avif"
    r"|mp4|avi|mov|mkv|webm|wav|mp3|flac|ogg)"
    r"|data:(?:image|video|audio)/.*"
)
# Of a turn's text: what other readers fill in; other ways to write <image>; images in the text.
UNFILLED_MARK = re.compile(r"(?i)<\|?(?:video|audio|bbox|ref-object)(?:[ _]?\d{1,3})?\|?>")
IMAGE_MARKS = re.compile(r"(?i)<\|?(?:image|img)(?:[ _-]?(?:\d{1,3}|here|placeholder))?\|?>")
PICTURE_IN_TEXT = re.compile(
    r"(?i)<img\s[^>]{0,300}>|!\[[^\]\n]{0,300}\]\([^)\n]{1,300}\)|data:image/"
)


def refuse_fields(row, images, where, plain):
    """BadRow for a field that says something which is not read; images: those that were.

    plain: is the row a plain question, whose images may stand under other names?
    """
    for name, value in row.items():
        read = name in ("images", "image")
        if plain:
            read = read or name in FIELDS["images"] or IMAGE_FIELD.fullmatch(name)
        if read or not says(value) or value in (False, "[]"):
            continue
        what = f"`{name}` is not read"
        for names, mend in UNREAD_FIELDS.items():
            if re.fullmatch(names, name, re.IGNORECASE):
                raise BadRow(where, what, mend)
        if name == "objects" and isinstance(value, dict) and first(value, ("bbox", "ref"))[0]:
            raise BadRow(where, what, BOXES)
        if not images and _holds_media(name, value):
            raise BadRow(where, f"{what}, and the row has no other image", INTO_IMAGES)


def refuse_flags(row, where):
    """BadRow for a row that asks to be trained on otherwise than as a whole."""
    for name, value in row.items():
        if LOSS_FLAG.fullmatch(name) and says(value) and value != 1:
            raise BadRow(where, f"`{name}` is not read", ALL_ALIKE, value)


def _holds_media(name, value):
    """Is a field's value, or one inside it, an image, or the name of a file of images or sounds?"""
    if name in TEXTS:
        return False
    if isinstance(value, dict):
        return any(_holds_media(key, one) for key, one in value.items())
    if isinstance(value, list):
        return any(_holds_media(name, one) for one in value)
    if isinstance(value, str):
        return MEDIA_FILE.fullmatch(value) is not None
    return isinstance(value, bytes | Image.Image)


def refuse_in_turn(turn, role, known, where):
    """BadRow for a field of a turn, besides the two `known` ones, that says something."""
    usual = role == "assistant"  # what a flag says of a turn as it is trained here
    for name, value in turn.items():
        if name in known or not says(value):
            continue
        is_flag = LOSS_FLAG.fullmatch(name) is not None
        if not is_flag or value != usual:
            mend = ALL_ALIKE if is_flag else ONLY_TEXT
            raise BadRow(where, f"`{name}` in a turn is not read", mend, value)


def refuse_marks(role, text, images, where):
    """BadRow for a mark in a turn's text in whose place a model would have to see something."""
    mark = UNFILLED_MARK.search(text)
    if mark:
        mend = BOXES if mark[0][1:].startswith(("bbox", "ref")) else ONLY_IMAGES
        raise BadRow(where, f"{mark[0]} in the text is not filled in", mend)
    if images or role == "assistant":
        return
    other = [mark for mark in IMAGE_MARKS.findall(text) if mark != "<image>"]
    if other or PICTURE_IN_TEXT.search(text):
        mend = "Write <image> where it stands, and the image into `images`."
        raise BadRow(where, "the text holds an image, the row has none", mend, ", ".join(other))
