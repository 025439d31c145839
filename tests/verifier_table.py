"""Rows of ../shared/data/verifier/cases.jsonl that test a convention or the search for an answer in
free text, not the comparison of two answers. Our answers stand between tags, so for these rows the
source's verdict is a convention that we share or not, decided here one by one. `AS_SOURCE`: rows
with a `policy` where we do as the source does. `OTHERWISE`: all rows, with a policy or not, where
we do not, and our verdict. Those that are not comparable and in neither: as the source."""

FREE_TEXT = (
    "raw_response",
    "boxed",
    "extraction",
    "reasoning_then",
    "answer_tag",
    "latex_delimiters",
    "mixed",
    "puzzle_text",
    "choice_letter",
)


def comparable(row):
    return not row.get("policy") and not any(part in row["kind"] for part in FREE_TEXT)


AS_SOURCE = {
    "an answer that says it is wrong is none": ["vc00397"],
    "wrappings around the answer come off": (
        "vc00357",
        "vc00347",
        "vc00369",
        "vc00300",
    ),
    "10% is 10 (and 0.1)": ["vc00334", "vc00311"],
    "percent in words": ["vc00048", "vc00049", "vc00050", "vc00051", "vc00052", "vc00053"],
    "what stands before an approximation counts": ["vc00096", "vc00099"],
    "articles, punctuation and case do not count in words": [
        "vc00351",
        "vc00363",
        "vc00365",
        "vc00367",
        "vc00368",
    ],
    "nothing equals nothing": ["vc00413"],
    "an inequality is its interval": ["vc00179"],
    "other items make another list": ["vc00303"],
    "an answer needs its closing tag or a value": ["vc00393", "vc00396"],
}

OTHERWISE = {
    # reason: {id: our verdict}
    "a whole solution is no answer: only what stands between the tags is read": {
        "vc00151": False,
        "vc00135": False,
        "vc00137": False,
        "vc00150": False,
        "vc00283": False,
        "vc00282": False,
        "vc00284": False,
        "vc00417": False,
    },
    "tags inside an answer stay: only the response's own tags count": {
        "vc00346": False,
        "vc00359": False,
        "vc00370": False,
        "vc00416": False,
    },
    "a letter must stand alone or be marked as a label, not be found in a sentence": {
        "vc00262": False,
        "vc00263": False,
        "vc00267": False,
        "vc00270": False,
        "vc00271": False,
        "vc01392": False,
    },
    "white space in a formula is free, line ends too": {"vc00029": True},
    "f(x) and f(y) are different answers": {"vc00245": False},
    "values are compared, all of them, whatever words join them": {
        "vc00299": False,
    },
    "no search for values in sentences that are not in English": {
        "vc00278": False,
        "vc00280": False,
        "vc00286": False,
        "vc00290": False,
    },
}

SLOW = {
    "vc00251"
}  # a recurrence that takes SymPy a second: equal, or out of time on a busy machine
