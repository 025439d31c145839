r"""Demonstrations of one's own: problems (images, question, answer) and a teacher behind an API -> the method's three files.

1. Keep the problems that the policy fails: pass rate over eval.py's samples at most `--hardest`; of several policies the best.
2. Leave out near-duplicates of earlier ones: equal pixels, and a Jaccard index of the questions' word triples from `--near` on.
3. Ask the teacher with data.SYSTEM_PROMPT (in place of a row's own), up to `--samples` times, for an answer with all three
   parts that is right by rewards.py. `--judge`: a second model sees each well-formed answer and the reference, and grades it
   from 0 (another answer) to 5; with 1 or more it is kept too, but not in rl.jsonl, which rewards.py will have to judge.
4. Split: the best grades go to align.jsonl, the next to rl.jsonl, the rest to sft.jsonl; among equal ones `--seed` decides.

    python eval.py --policy CKPT --data problems.jsonl --no-greedy --samples 8 --rollouts_out out/rollouts.jsonl
    PRISM_API_KEY=... python tools/curate.py --data problems.jsonl --pass_rates out/rollouts.jsonl --out data/mine \
        --base_url https://HOST/v1 --teacher MODEL --judge MODEL --limit 20     # a first look; then without --limit

The key is read from the environment and written nowhere. `--out` gets the images, all answers (answers.jsonl: after a stop the
same command asks what is missing) and, last, report.json. Recipe: arXiv 2604.28123, 3.1 (there the judge decides alone)."""

import base64
import fcntl
import hashlib
import importlib.util
import io
import json
import os
import random
import re
import sys
import threading
from collections import Counter, defaultdict
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from types import SimpleNamespace

from PIL import Image
from tqdm import tqdm

httpx = importlib.import_module(
    "httpx2" if importlib.util.find_spec("httpx2") else "httpx"
)  # transformers brings one of them
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from data import SYSTEM_PROMPT, read, to_example  # noqa: E402
from engine.arguments import parse  # noqa: E402
from engine.log import provenance  # noqa: E402
from engine.rows import Rows, open_image  # noqa: E402
from rewards import parts, score, split_spans  # noqa: E402

JUDGE_PROMPT = """You grade an answer to a question about images. Reply with one digit only: 0 if its <answer> means something
else than the reference; otherwise 1 (<caption> or <think> invent, contradict, leave gaps) to 5 (all is seen and follows)."""


@dataclass(kw_only=True)
class Args:
    data: tuple[str, ...]  # problems: files with answers, in any format that eval.py reads
    out: str  # folder for sft.jsonl, align.jsonl, rl.jsonl, images, report.json, answers.jsonl
    base_url: str  # of an OpenAI-compatible API: what stands before /chat/completions
    teacher: str  # name of the teacher's model
    judge: str = ""  # name of the judge's model, at the same API; empty: rewards.py alone decides, and nothing is graded
    key_env: str = "PRISM_API_KEY"  # environment variable with the API's key
    pass_rates: str = (
        ""  # eval.py's --rollouts_out for --data; empty: no problem is left out for its pass rate
    )
    hardest: float = 0.0  # highest pass rate of a problem to keep
    near: float = (
        0.8  # Jaccard index from which on two questions about the same pictures are duplicates
    )
    samples: int = 4  # answers of the teacher, per problem, until one is kept
    request: str = (
        '{"max_tokens": 8192}'  # JSON object with more fields of each request, temperature say
    )
    concurrency: int = 8  # problems asked at once
    timeout: float = 300.0  # s that the server may be silent
    retries: int = 5  # of a request, after HTTP 408, 409, 425, 429 or 5xx, a timeout, a broken connection, a broken answer
    first_delay: float = (
        1.0  # s before the first retry; each further one doubles it, up to 60; times 0.5 to 1.5
    )
    max_failures: int = (
        20  # problems in a row that the API does not answer; with more of them the run stops
    )
    shares: tuple[float, float] = (
        0.05,
        0.02,
    )  # of the kept problems, for align.jsonl and for rl.jsonl
    seed: int = 0  # of the split
    limit: int = 0  # rows of each file, from its start; 0: all
    max_bad: int = 100  # rows of a file that cannot be used; with more of them the run stops
    image_root: str | None = (
        None  # folder that image paths are relative to and stay in; none: the data file's
    )

    def __post_init__(self):
        if not re.fullmatch(r"https?://[^@?#\s]+", self.base_url) or not isinstance(
            json.loads(self.request), dict
        ):
            raise ValueError(
                "--base_url is http(s)://HOST/PATH, without user, query or key; --request is a JSON object"
            )
        if Path(self.out).resolve() in [Path(path).resolve().parent for path in self.data]:
            raise ValueError(
                "--out is the folder of --data: name another, lest a file of problems be overwritten"
            )
        for name, value in {**vars(self), "shares": sum(self.shares)}.items():
            least, most = (
                int(name in ("samples", "concurrency")),
                1 if name in ("hardest", "near", "shares") else 1e9,
            )
            if isinstance(value, int | float) and not least <= value <= most:
                raise ValueError(f"--{name} is {value}: it must be from {least} to {most:g}")


def digest(*things):
    return hashlib.sha256(json.dumps(things).encode()).hexdigest()[:32]


def look(example):
    """(pictures [(path named by the pixels, bytes)], turns but the system's). The bytes are the file's own where every reader
    sees in them what the policy sees, else a PNG of that. Raises BadRow."""
    pictures = []
    for source in example.images:
        image, raw = (
            open_image(source, example.where),
            source if isinstance(source, bytes) else Path(source).read_bytes(),
        )
        given, png = Image.open(io.BytesIO(raw)), io.BytesIO()
        if (
            given.format not in ("PNG", "JPEG")
            or given.mode != "RGB"
            or given.has_transparency_data
            or given.getexif()
        ):
            image.save(png, "PNG")
        name = f"images/{digest(image.size, image.tobytes().hex())}.{'png' if png.tell() else given.format.lower()}"
        pictures.append((name, png.getvalue() or raw))
    return pictures, [turn for turn in example.messages if turn["role"] != "system"]


def select(args):  # -> problems to ask, in the files' order; {fate: rows} of all others
    problems, fates, asked, rates = [], Counter(), defaultdict(list), {}
    for r in Rows(args.pass_rates) if args.pass_rates else ():
        if not isinstance(r, dict) or not r.get("accuracy"):
            raise ValueError(f"{args.pass_rates} is not what eval.py writes with --rollouts_out")
        of, rate = (Path(r["data"]).resolve(), r["row"]), sum(r["accuracy"]) / len(r["accuracy"])
        rates |= {of: max(rate, rates.get(of, 0.0))} if r["mode"] != "greedy" else {}
    for path in args.data:
        data = read(path, "eval", args.image_root, args.max_bad)
        for row in tqdm(
            range(min(args.limit or len(data), len(data))), Path(path).name, disable=None
        ):
            rate = rates.get((Path(path).resolve(), row))
            if args.pass_rates and (rate is None or rate > args.hardest):
                fates["no pass rate" if rate is None else "passed too often"] += 1
                continue
            for pictures, turns in data.fetch(
                [row], look
            ):  # read again when asked and written: they would fill the memory
                names, texts = (
                    tuple(name for name, _ in pictures),
                    [turn["content"] for turn in turns],
                )
                words = re.findall(
                    r"\w+|[^\w\s.,;:!?'\"]", " ".join(texts).casefold()
                )  # signs count, punctuation does not
                new = {tuple(words[i : i + 3]) for i in range(max(1, len(words) - 2))}
                if any(len(new & old) >= args.near * len(new | old) for old in asked[names]):
                    fates["near-duplicate"] += 1
                else:
                    asked[names].append(new)
                    problems.append(
                        SimpleNamespace(
                            data=data, row=row, key=digest(names, texts), grade=None, answers=[]
                        )
                    )
        fates.update({f"bad: {reason}": n for reason, n in data.skipped.items()})
    return problems, fates


def chat(
    example, system, more=""
):  # -> the messages that the API gets: pictures as data URLs, `more` behind the last turn
    (pictures, turns), messages = look(example), [{"role": "system", "content": system}]
    urls = (
        f"data:image/{name.split('.')[1]};base64,{base64.b64encode(raw).decode()}"
        for name, raw in pictures
    )
    for turn in turns:
        pieces = filter(
            str.strip, re.split("(<image>)", turn["content"] + more * (turn is turns[-1]))
        )
        content = [
            ("image_url", {"url": next(urls)}) if piece == "<image>" else ("text", piece)
            for piece in pieces
        ]
        messages.append(
            {
                "role": turn["role"],
                "content": [{"type": kind, kind: value} for kind, value in content],
            }
        )
    return messages


class Api:  # its answers: known ones come from answers.jsonl, others are asked for and appended to it at once
    def __init__(self, args):
        self.args, self.requests, self.in_a_row, key = (
            args,
            Counter(),
            0,
            "".join(os.environ.get(args.key_env, "").split()),
        )
        self.lock, self.stopped, self.secret = (
            threading.Lock(),
            threading.Event(),
            key if len(key) > 9 else "\0",
        )  # not "EMPTY"
        self.http = httpx.Client(
            headers={"Authorization": f"Bearer {key}"} if key else {}, timeout=args.timeout
        )
        self.file, self.hint = (
            open(Path(args.out) / "answers.jsonl", "a+"),
            f"{'a' if key else 'no'} key in ${args.key_env}",
        )
        fcntl.flock(
            self.file, fcntl.LOCK_EX | fcntl.LOCK_NB
        )  # BlockingIOError: another run writes to this folder
        *lines, broken = Path(self.file.name).read_text().split("\n")
        self.file.truncate(
            self.file.tell() - len(broken)
        )  # a kill can break the last line (all ASCII)
        self.known = {tuple(answer["of"]): answer for answer in map(json.loads, lines)}

    def ask(self, of, prompt, form="(?s)(.*)"):
        """What `form` finds in the answer to chat(*prompt); of: (what, model, number from 0). Raises ConnectionError."""
        if (known := self.known.get(of)) and (
            known["finish"] != "length" or known["request"] == self.args.request
        ):
            return re.fullmatch(form, known["text"])[1]
        body = json.loads(self.args.request) | {"model": of[1], "messages": chat(*prompt)}
        for attempt in range(self.args.retries + 1):
            code, text, wait, delay = (
                0,
                "",
                0,
                min(60, self.args.first_delay * 2**attempt) * random.uniform(0.5, 1.5),
            )
            try:
                reply = self.http.post(
                    f"{self.args.base_url.rstrip('/')}/chat/completions", json=body
                )
                code, text = reply.status_code, reply.text.replace(self.secret, "[key]")
                wait = int(
                    (re.fullmatch(r"\d{1,9}", reply.headers.get("retry-after", "")) or "0")[0]
                )
                choice = json.loads(text if reply.is_success else "")["choices"][0]
                answer = {
                    "of": of,
                    "request": self.args.request,
                    "finish": choice.get("finish_reason"),
                }
                answer["text"] = (
                    choice["message"]["content"] or ""
                )  # nothing: it was all thought, or is held back
                kind, found = "answered", re.fullmatch(form, answer["text"])[1]
            except (
                httpx.HTTPError,
                ValueError,
                LookupError,
                TypeError,
                AttributeError,
                RecursionError,
            ) as error:
                kind, text = (
                    f"HTTP {code}" if code not in (0, 200) else type(error).__name__,
                    text or str(error),
                )
            with self.lock:
                self.requests[kind] += 1
                if kind == "answered":
                    self.in_a_row, self.known[of] = 0, answer
                    print(json.dumps(answer), file=self.file, flush=True)
                    return found
            fault = 300 <= code < 500 and code not in (
                408,
                409,
                425,
                429,
            )  # ours: to ask again is in vain
            if (
                fault
                or wait > 600
                or attempt == self.args.retries
                or self.stopped.wait(max(wait, delay))
            ):
                break
        self.in_a_row += 1
        if (
            fault
            and code not in (400, 413, 422)
            or wait > 600
            or self.in_a_row > self.args.max_failures
        ):
            self.stopped.set()
            raise SystemExit(
                f"{kind} from {self.args.base_url} ({self.hint}, wait: {wait} s): {text[:500]}"
            )
        raise ConnectionError(kind)


def solve(
    problem, api
):  # -> the problem's fate; if that is "kept", problem.response is the demonstration
    example, args, fate = problem.data[problem.row], api.args, "malformed"
    try:
        for number in (n for n in range(args.samples) if not api.stopped.is_set()):
            text = api.ask((problem.key, args.teacher, number), (example, SYSTEM_PROMPT))
            if not all(parts(text) or [""]) or re.search("<image>|[\ud800-\udfff]", text):
                problem.answers.append("malformed")
                continue
            fate, problem.response = "wrong", "\n".join(split_spans(text))
            problem.right = (
                score(text, example.answer, example.choices, example.equivalent)["accuracy"] == 1
            )
            if args.judge:
                more = f"\n\nReference: {' or '.join((example.answer, *example.equivalent))}\n\nGrade:\n{problem.response}"
                of, prompt = (
                    (digest(problem.key, more), args.judge, 0),
                    (example, JUDGE_PROMPT, more),
                )
                problem.grade = int(api.ask(of, prompt, r"\W*([0-5])\W*"))
            problem.answers.append(
                ("right" if problem.right else "wrong")
                + f", graded {problem.grade}" * bool(args.judge)
            )
            if problem.grade or problem.right:
                return "kept"
    except ConnectionError as error:
        return f"unanswered: {error}"
    return fate


def write(
    kept, args
):  # -> {kind: rows} of the files: rows of one form, which all stages read, each checked for its own
    out, lines = Path(args.out), {"align": [], "rl": [], "sft": []}
    for p in sorted(kept, key=lambda p: (-(p.grade or 0), digest(args.seed, p.key))):
        example, (pictures, turns) = p.data[p.row], look(p.data[p.row])
        for name, raw in pictures:
            (out / name).write_bytes(raw)
        row = {
            "data_source": example.source,
            "prompt": [{"role": "system", "content": SYSTEM_PROMPT}, *turns],
        }
        row |= {"images": [name for name, _ in pictures], "teacher_response": p.response}
        row["reward_model"] = {
            "style": "rule",
            "ground_truth": example.answer,
            "equivalent_answers": example.equivalent,
        }
        row["extra_info"] = {
            "from": f"{Path(p.data.path).name}:{p.row + 1}",
            "choices": example.choices,
            "grade": p.grade,
        }
        room = {"align": args.shares[0], "rl": args.shares[1] * p.right, "sft": 1}
        kind = next(
            kind for kind, share in room.items() if len(lines[kind]) < round(share * len(kept))
        )
        lines[kind].append(json.dumps(row) + "\n")
        to_example(json.loads(lines[kind][-1]), example.where, kind=kind, root=str(out.resolve()))
    for kind, rows in lines.items():
        (out / f"{kind}.jsonl").write_text("".join(rows))
    return {kind: len(rows) for kind, rows in lines.items()}


def main(args):
    (Path(args.out) / "images").mkdir(parents=True, exist_ok=True)
    problems, fates = select(args)
    print(f"{len(problems)} problems to ask, left out: {dict(fates)}", flush=True)
    with (api := Api(args)).file, ThreadPoolExecutor(args.concurrency) as pool:
        try:
            ends = list(
                tqdm(
                    pool.map(lambda problem: solve(problem, api), problems),
                    "asked",
                    len(problems),
                    disable=None,
                )
            )
        finally:
            api.stopped.set()
    report = {
        "rows": fates.total() + len(ends),
        "fates": fates + Counter(ends),
        "requests": api.requests,
    }
    report["answers"] = Counter(answer for problem in problems for answer in problem.answers)
    report["files"] = write(
        [p for p, end in zip(problems, ends, strict=True) if end == "kept"], args
    )
    print(*(f"{name}: {counts}" for name, counts in report.items()), sep="\n")
    (Path(args.out) / "report.json").write_text(
        json.dumps(report | {"args": asdict(args)} | provenance(), indent=1)
    )


if __name__ == "__main__":
    main(parse(Args))
