r"""Demonstrations of one's own: from problems and a teacher behind an API to the method's files.

A problem is a row with images, a question and an answer, in any format that eval.py reads.

1. Keep the problems that the policy fails: those with a pass rate over eval.py's samples of at most
   `--hardest`; of several policies the best one counts.
2. Leave out near-duplicates of earlier problems: the same pixels, and a Jaccard index of the
   questions' word triples of at least `--near`.
3. Ask the teacher with data.SYSTEM_PROMPT (in place of a row's own), up to `--samples` times, for
   an answer that has all three parts and is right by rewards.py. With `--judge` a second model sees
   each well-formed answer and the reference, and grades it from 0 (another answer) to 5. With 1 or
   more an answer is kept too, but not in rl.jsonl, where rewards.py will have to judge.
4. Split: the best grades go to align.jsonl, the next to rl.jsonl, the rest to sft.jsonl; among
   equal ones `--seed` decides.

    python eval.py --policy CKPT --data problems.jsonl --no-greedy --samples 8 \
        --rollouts_out out/rollouts.jsonl
    PRISM_API_KEY=... python tools/curate.py --data problems.jsonl \
        --pass_rates out/rollouts.jsonl --out data/mine \
        --base_url https://HOST/v1 --teacher MODEL --judge MODEL --limit 20

The first look is at 20 problems; then leave --limit out. The key is read from the environment and
written nowhere. `--out` gets the images, all answers (answers.jsonl: after a stop the same command
asks for what is missing only) and, last, report.json. The recipe is that of arXiv 2604.28123,
section 3.1, where the judge decides alone.
"""

import base64
import hashlib
import io
import json
import re
import sys
from collections import Counter, defaultdict
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path

from PIL import Image
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from data import SYSTEM_PROMPT, parts, read, to_example  # noqa: E402
from engine.api import Api, ApiArgs, Unanswered  # noqa: E402
from engine.arguments import check, option, parse  # noqa: E402
from engine.evaluation import known_of, mean  # noqa: E402
from engine.inspection import words_of  # noqa: E402
from engine.log import provenance  # noqa: E402
from engine.rows import Data, Rows, open_image  # noqa: E402
from rewards import verify  # noqa: E402

JUDGE_PROMPT = (
    "You grade an answer to a question about images. Reply with one digit only: 0 if its <answer> "
    "means something\nelse than the reference; otherwise 1 (<caption> or <think> invent, "
    "contradict, leave gaps) to 5 (all is seen and follows)."
)
GRADE = r"\W*([0-5])\W*"  # the form of the judge's answer


@dataclass(kw_only=True)
class Args(ApiArgs):
    data: tuple[str, ...] = option(
        help="problems: files with answers, in any format that eval.py reads"
    )
    out: str = option(
        help="folder for sft.jsonl, align.jsonl, rl.jsonl, images, report.json, answers.jsonl"
    )
    base_url: str = option(help="of an OpenAI-compatible API: what stands before /chat/completions")
    teacher: str = option(help="name of the teacher's model")
    judge: str = option(
        "",
        "name of the judge's model, at the same API; empty: rewards.py alone decides, and nothing "
        "is graded",
    )
    pass_rates: str = option(
        "",
        "eval.py's --rollouts_out for --data; empty: no problem is left out for its pass rate",
    )
    hardest: float = option(0.0, "highest pass rate of a problem to keep")
    near: float = option(
        0.8,
        "Jaccard index from which on two questions about the same pictures are duplicates",
    )
    samples: int = option(4, "answers of the teacher, per problem, until one is kept", least=1)
    shares: tuple[float, float] = option(
        (0.05, 0.02), "of the kept problems, for align.jsonl and for rl.jsonl"
    )
    seed: int = option(0, "of the split")
    limit: int = option(0, "rows of each file, from its start; 0: all")
    max_bad: int = option(
        100, "rows of a file that cannot be used; with more of them the run stops"
    )
    image_root: str | None = option(
        None, "folder that image paths are relative to and stay in; none: the data file's"
    )

    def __post_init__(self):
        check(self)
        shares = {"hardest": self.hardest, "near": self.near, "shares": sum(self.shares)}
        for name, share in shares.items():
            if share > 1:
                raise ValueError(f"--{name} is {share}: it must be 1 or less")
        self.check_api()
        out = Path(self.out).resolve()
        if out in [Path(path).resolve().parent for path in self.data]:
            raise ValueError(
                "--out is the folder of --data: name another, lest a file of problems be "
                "overwritten"
            )


@dataclass
class Problem:
    """A problem to ask about, and what came of it.

    It holds no example: the row is read again when it is asked and when it is written, since the
    pictures of all problems would fill the memory.
    """

    data: Data
    row: int
    key: str  # digest of its pictures and turns: names it in answers.jsonl
    answers: list = field(default_factory=list)  # what each answer was: "right, graded 4", ...
    response: str = ""  # the last well-formed answer, as it was written
    right: bool = False  # by rewards.py
    grade: int | None = None  # by the judge

    def example(self):
        return self.data[self.row]


def digest(*things) -> str:
    """A short name for plain values."""
    return hashlib.sha256(json.dumps(things).encode()).hexdigest()[:32]


# ------------------------------------------------------------------------- what is in a problem
def look(example):
    """The pictures of an example, each a (path, bytes), and its turns but the system's.

    Raises BadRow for a picture that cannot be read.
    """
    pictures = [read_picture(source, example.where) for source in example.images]
    turns = [turn for turn in example.messages if turn["role"] != "system"]
    return pictures, turns


def read_picture(source, where):
    """The path of a picture below --out, named by its pixels, and its bytes.

    The bytes are the file's own where every reader sees in them what the policy sees; else a PNG of
    what the policy sees: upright, without transparency.
    """
    image = open_image(source, where)
    raw = source if isinstance(source, bytes) else Path(source).read_bytes()
    given = Image.open(io.BytesIO(raw))
    usual = given.format in ("PNG", "JPEG") and given.mode == "RGB"
    if usual and not given.has_transparency_data and not given.getexif():
        ending = given.format.lower()
    else:
        png = io.BytesIO()
        image.save(png, "PNG")
        raw = png.getvalue()
        ending = "png"
    pixels = digest(image.size, image.tobytes().hex())
    return f"images/{pixels}.{ending}", raw


# ------------------------------------------------------------------------------- which problems
def select(args):
    """The problems to ask, in the files' order, and {fate: rows} of all others."""
    rates = read_pass_rates(args.pass_rates) if args.pass_rates else None
    questions = defaultdict(list)  # names of pictures -> word triples of each question about them
    problems = []
    fates = Counter()
    for path in args.data:
        data = read(path, "eval", args.image_root, args.max_bad)
        rows = min(args.limit or len(data), len(data))
        for row in tqdm(range(rows), Path(path).name, disable=None):
            fate = "" if rates is None else fate_by_rate(rates, path, row, args.hardest)
            if fate:
                fates[fate] += 1
                continue
            found = data.fetch([row], look)
            if not found:  # a bad row: counted below
                continue
            pictures, turns = found[0]
            names = tuple(name for name, _ in pictures)
            texts = [turn["content"] for turn in turns]
            triples = word_triples(" ".join(texts))
            if is_near_any(triples, questions[names], args.near):
                fates["near-duplicate"] += 1
                continue
            questions[names].append(triples)
            problems.append(Problem(data, row, digest(names, texts)))
        for reason, rows in data.skipped.items():
            fates[f"bad: {reason}"] += rows
    return problems, fates


def read_pass_rates(path) -> dict:
    """{(data file, row): the best pass rate of any policy} from what eval.py wrote."""
    rates = {}
    for record in Rows(path):
        if not isinstance(record, dict) or not record.get("accuracy"):
            raise ValueError(f"{path} is not what eval.py writes with --rollouts_out")
        if record["mode"] == "greedy":
            continue
        known = known_of(record["accuracy"])
        if not known:  # eval.py's judge gave no verdict
            continue
        of = (Path(record["data"]).resolve(), record["row"])
        rates[of] = max(mean(known), rates.get(of, 0.0))
    return rates


def fate_by_rate(rates, path, row, hardest) -> str:
    """Why a row is left out for its pass rate; empty where it is not."""
    rate = rates.get((Path(path).resolve(), row))
    if rate is None:
        return "no pass rate"
    return "passed too often" if rate > hardest else ""


def word_triples(text) -> set:
    """All sequences of three words of a text; fewer words make one shorter sequence."""
    words = words_of(text)
    starts = range(max(1, len(words) - 2))
    return {tuple(words[start : start + 3]) for start in starts}


def is_near_any(triples, others, near) -> bool:
    """Whether the Jaccard index with any of the others, their common share, is `near` or more."""
    return any(len(triples & other) >= near * len(triples | other) for other in others)


# -------------------------------------------------------------------------------------- the API
def chat(example, system, more=""):
    """The messages that the API gets: pictures as data URLs, and `more` behind the last turn."""
    pictures, turns = look(example)
    urls = iter([data_url(name, raw) for name, raw in pictures])
    messages = [{"role": "system", "content": system}]
    for turn in turns:
        text = turn["content"]
        if turn is turns[-1]:
            text += more
        messages.append({"role": turn["role"], "content": content_of(text, urls)})
    return messages


def data_url(name, raw) -> str:
    ending = name.split(".")[1]
    return f"data:image/{ending};base64,{base64.b64encode(raw).decode()}"


def content_of(text, urls) -> list:
    """A turn's text as the API's list of parts; each `<image>` takes the next of `urls`."""
    content = []
    for piece in re.split("(<image>)", text):
        if piece == "<image>":
            content.append({"type": "image_url", "image_url": {"url": next(urls)}})
        elif piece.strip():
            content.append({"type": "text", "text": piece})
    return content


# -------------------------------------------------------------------------------------- answers
def solve(problem, api) -> str:
    """Ask the teacher until an answer is kept. Returns the problem's fate.

    Where that is "kept", `problem.response` is the demonstration.
    """
    fate = "malformed"
    try:
        example = problem.example()
        for number in range(api.args.samples):
            if api.stopped.is_set():
                break
            of = (problem.key, api.args.teacher, number)
            text = api.ask(of, partial(chat, example, SYSTEM_PROMPT))
            if not is_usable(text):
                problem.answers.append("malformed")
                continue
            fate = "wrong"
            problem.response = text.strip()
            problem.right = verify(text, example)["accuracy"] == 1
            verdict = "right" if problem.right else "wrong"
            if api.args.judge:
                problem.grade = judge(problem, example, api)
                verdict += f", graded {problem.grade}"
            problem.answers.append(verdict)
            if problem.right or problem.grade:
                return "kept"
    except Unanswered as error:
        return f"unanswered: {error}"
    return fate


def is_usable(text) -> bool:
    """Whether an answer has all three parts, none empty, and nothing that a data file refuses."""
    written = parts(text)
    if written is None or not all(written.values()):
        return False
    return not re.search("<image>|[\ud800-\udfff]", text)


def judge(problem, example, api) -> int:
    """The judge's grade of the problem's response, from 0 to 5."""
    reference = " or ".join((example.answer, *example.equivalent))
    more = f"\n\nReference: {reference}\n\nGrade:\n{problem.response}"
    of = (digest(problem.key, more), api.args.judge, 0)
    return int(api.ask(of, partial(chat, example, JUDGE_PROMPT, more), GRADE))


# ---------------------------------------------------------------------------------------- files
def write(kept, args) -> dict:
    """Write the kept problems to the three files. Returns {file: rows}.

    Each row is checked for the stage of its file.
    """
    out = Path(args.out)
    room_in_align = round(args.shares[0] * len(kept))
    room_in_rl = round(args.shares[1] * len(kept))
    files = {"align": [], "rl": [], "sft": []}
    for problem in sorted(kept, key=partial(rank, seed=args.seed)):
        if len(files["align"]) < room_in_align:
            kind = "align"
        elif problem.right and len(files["rl"]) < room_in_rl:
            kind = "rl"
        else:
            kind = "sft"
        line = json.dumps(make_row(problem, kind, out))
        where = f"{problem.data.path}:{problem.row + 1}"
        to_example(json.loads(line), where, kind=kind, root=str(out.resolve()))
        files[kind].append(line + "\n")
    for kind, lines in files.items():
        (out / f"{kind}.jsonl").write_text("".join(lines))
    return {kind: len(lines) for kind, lines in files.items()}


def rank(problem, seed):
    """What problems are sorted by: the best grades come first, and chance decides among equals.

    A digest rather than a shuffle: it stays as it is when problems are added.
    """
    return -(problem.grade or 0), digest(seed, problem.key)


def make_row(problem, kind, out) -> dict:
    """A row of a kept problem for the file of this kind; writes its pictures.

    SFT's is a conversation, as LLaMA-Factory, TRL and ms-swift read it; the others' are verl's. A
    column holds one type in all rows: readers of tables refuse a file whose types change.
    """
    example = problem.example()
    pictures, turns = look(example)
    for name, raw in pictures:
        (out / name).write_bytes(raw)
    prompt = [{"role": "system", "content": SYSTEM_PROMPT}, *turns]
    row = {
        "images": [name for name, _ in pictures],
        "data_source": example.source,
        "reward_model": {
            "style": "rule",
            "ground_truth": example.answer,
            "equivalent_answers": example.equivalent,
        },
        "extra_info": {
            "from": f"{Path(problem.data.path).name}:{problem.row + 1}",
            "choices": example.choices,
            "grade": problem.grade,
        },
    }
    if kind == "sft":
        response = {"role": "assistant", "content": problem.response}
        return {"messages": [*prompt, response], **row}
    return {"prompt": prompt, "teacher_response": problem.response, **row}


def main(args):
    out = Path(args.out)
    (out / "images").mkdir(parents=True, exist_ok=True)
    problems, fates = select(args)
    print(f"{len(problems)} problems to ask, left out: {dict(fates)}", flush=True)
    api = Api(args, out / "answers.jsonl")
    with api.file, ThreadPoolExecutor(args.concurrency) as pool:
        try:
            asked = pool.map(partial(solve, api=api), problems)
            ends = list(tqdm(asked, "asked", len(problems), disable=None))
        finally:  # after a fault or Ctrl-C no thread waits for a retry, or asks once more
            api.stopped.set()

    kept = []
    answers = Counter()
    for problem, end in zip(problems, ends, strict=True):
        fates[end] += 1
        answers.update(problem.answers)
        if end == "kept":
            kept.append(problem)
    report = {
        "rows": fates.total(),
        "fates": fates,
        "requests": api.requests,
        "answers": answers,
        "files": write(kept, args),
    }
    for name, counts in report.items():
        print(f"{name}: {counts}")
    record = {**report, "args": asdict(args), **provenance()}
    (out / "report.json").write_text(json.dumps(record, indent=1))


if __name__ == "__main__":
    main(parse(Args))
