"""
Answers of a model behind an OpenAI-compatible API: asked for with retries, kept in a file, counted.

tools/curate.py asks a teacher and a judge, eval.py --judge a judge.

The key is read from the environment and written nowhere: it is taken out of whatever a server says.
What was answered stands in a JSONL file, so that after a stop, or in another run, only what is
missing is asked.
"""

import fcntl
import json
import os
import random
import re
import threading
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from engine.arguments import option

try:  # transformers brings one of the two
    import httpx2 as httpx
except ImportError:
    import httpx

ANYTHING = "(?s)(.*)"  # the form of an answer of which all is wanted
AGAIN = (408, 409, 425, 429)  # HTTP errors that time may mend, as it may those from 500 on
THIS_REQUEST = (400, 413, 422)  # HTTP errors of one request alone: its picture is too large, say
LONGEST_DELAY = 60  # s before a retry
LONGEST_WAIT = 600  # s: a server that wants more, as for a daily quota, ends the run
# What can go wrong with a request or in the reading of what came back.
FAULTS = (httpx.HTTPError, ValueError, LookupError, TypeError, AttributeError, RecursionError)


@dataclass(kw_only=True)
class ApiArgs:
    """The arguments of a script that asks; its `Args` inherits them."""

    GROUP = "of the API"  # their heading in --help

    base_url: str = option("", "of an OpenAI-compatible API: what stands before /chat/completions")
    key_env: str = option("PRISM_API_KEY", "environment variable with the API's key")
    request: str = option(
        '{"max_tokens": 8192}', "JSON object with more fields of each request, temperature say"
    )
    concurrency: int = option(8, "questions to the API at once", least=1)
    timeout: float = option(300.0, "s that the server may be silent", above=0)
    retries: int = option(
        5,
        "of a request, after HTTP 408, 409, 425, 429 or 5xx, a timeout, a broken connection, a "
        "broken answer",
    )
    first_delay: float = option(
        1.0,
        "s before the first retry; each further one doubles it, up to 60; times 0.5 to 1.5",
    )
    max_failures: int = option(
        20, "questions in a row that the API does not answer; with more of them it is asked no more"
    )

    def check_api(self):
        """ValueError where the API cannot be asked with these arguments."""
        if not re.fullmatch(r"https?://[^@?#\s]+", self.base_url):
            raise ValueError("--base_url is http(s)://HOST/PATH, without user, query or key")
        try:
            fields = json.loads(self.request)
        except ValueError:
            fields = None
        if not isinstance(fields, dict):
            raise ValueError("--request is a JSON object")


class Unreadable(ValueError):
    """An answer has not the form that was asked for."""


class Unanswered(ConnectionError):
    """A question has no answer; another may have one. Its text is the fault's kind."""

    def __init__(self, reply):
        super().__init__(reply.kind)
        self.reply = reply


@dataclass
class Reply:
    """What came of one request."""

    kind: str = ""  # "answered", or the fault, as it is counted
    code: int = 0  # HTTP status; 0: none came
    text: str = ""  # what came, without the key; or what went wrong
    wait: int = 0  # s that the server wants us to wait
    finish: str | None = None  # why the model stopped: "length" where it was cut
    content: str = ""  # the model's answer
    found: str = ""  # what was looked for in it

    @property
    def is_our_fault(self):
        """To ask again is in vain."""
        return 300 <= self.code < 500 and self.code not in AGAIN

    @property
    def concerns_all(self):
        """No other request would be answered either: a wrong key, a spent quota."""
        wrong = self.is_our_fault and self.code not in THIS_REQUEST
        return wrong or self.wait > LONGEST_WAIT


class Api:
    """The API's answers: known ones come from the file `path`, others are asked for.

    What is answered is appended to the file at once. Threads may share an Api, runs no file: for
    the second one it raises BlockingIOError.
    """

    def __init__(self, args, path):
        """args: an `ApiArgs`."""
        self.args = args
        self.requests = Counter()  # kinds of replies
        self.failures = 0  # questions in a row that were not answered
        self.lock = threading.Lock()
        self.stopped = threading.Event()

        key = "".join(os.environ.get(args.key_env, "").split())
        # A short key, as local servers want one ("EMPTY"), is a word: it may stay in what is shown.
        self.secret = key if len(key) > 9 else None
        self.hint = f"{'a' if key else 'no'} key in ${args.key_env}"
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        self.http = httpx.Client(headers=headers, timeout=args.timeout)
        self.url = f"{args.base_url.rstrip('/')}/chat/completions"

        self.file = open(path, "a+")
        fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # A kill can break the last line; all is ASCII, so that characters are bytes.
        *lines, broken = Path(path).read_text().split("\n")
        self.file.truncate(self.file.tell() - len(broken))
        self.known = {}
        for line in lines:
            answer = json.loads(line)
            self.known[answer["about"], answer["model"], answer["number"]] = answer

    def close(self):
        """Let another run write to the file."""
        self.file.close()
        self.http.close()

    def ask(self, of, messages, form=ANYTHING, again=False) -> str:
        """What the pattern `form` finds in the answer to the messages.

        of: (what is asked about, model, number of the try from 0), the answer's name in the file.
        messages: a function that makes the chat's messages; not called where the answer is known.
        again: ask all the same.
        Raises Unanswered where there is no answer to this request, SystemExit where there would be
        none to any other.
        """
        known = self.known.get(of)
        if known and not again and not self.is_cut_short(known):
            return re.fullmatch(form, known["text"])[1]
        body = json.loads(self.args.request)
        body["model"] = of[1]
        body["messages"] = messages()
        for attempt in range(self.args.retries + 1):
            reply = self.request(body, form)
            self.keep(of, reply)
            if reply.kind == "answered":
                return reply.found
            if reply.is_our_fault or reply.wait > LONGEST_WAIT or attempt == self.args.retries:
                break
            if self.stopped.wait(max(reply.wait, self.delay(attempt))):
                break
        self.give_up(reply)

    def is_cut_short(self, answer) -> bool:
        """Whether another --request, with a longer limit, may bring the rest of an answer."""
        return answer["finish"] == "length" and answer["request"] != self.args.request

    def request(self, body, form) -> Reply:
        """Make one request; a fault is in the reply, and not raised."""
        reply = Reply()
        try:
            response = self.http.post(self.url, json=body)
            reply.code = response.status_code
            reply.text = self.without_key(response.text)
            reply.wait = seconds(response.headers.get("retry-after", ""))
            if not response.is_success:
                raise ValueError("nothing else was said")
            choice = json.loads(reply.text)["choices"][0]
            reply.finish = choice.get("finish_reason")
            # No content: all of it was thought, or it is held back.
            reply.content = choice["message"]["content"] or ""
            found = re.fullmatch(form, reply.content)
            if found is None:
                raise Unreadable
            reply.found = found[1]
            reply.kind = "answered"
        except FAULTS as error:
            reply.kind = type(error).__name__
            if reply.code not in (0, 200):
                reply.kind = f"HTTP {reply.code}"
            reply.text = reply.text or str(error)
        return reply

    def without_key(self, text) -> str:
        """Servers repeat the key in their errors, and a model may in its answer."""
        return text.replace(self.secret, "[key]") if self.secret else text

    def keep(self, of, reply) -> None:
        """Count a reply, and write it down where it is an answer."""
        with self.lock:
            self.requests[reply.kind] += 1
            if reply.kind != "answered":
                return
            self.failures = 0
            about, model, number = of
            answer = {
                "about": about,
                "model": model,
                "number": number,
                "request": self.args.request,
                "finish": reply.finish,
                "text": reply.content,
            }
            self.known[of] = answer
            print(json.dumps(answer), file=self.file, flush=True)

    def delay(self, attempt) -> float:
        """Seconds before a retry: doubled each time, and spread, lest all threads ask at once."""
        doubled = self.args.first_delay * 2**attempt
        return min(LONGEST_DELAY, doubled) * random.uniform(0.5, 1.5)

    def give_up(self, reply) -> None:
        """End the run where it is in vain; else only this question stays without an answer."""
        with self.lock:
            self.failures += 1
            too_many = self.failures > self.args.max_failures
        if reply.concerns_all or too_many:
            self.stopped.set()
            raise SystemExit(
                f"{reply.kind} from {self.args.base_url} ({self.hint}, wait: {reply.wait} s): "
                f"{reply.text[:500]}"
            )
        raise Unanswered(reply)


def seconds(retry_after) -> int:
    """The seconds in a Retry-After header; 0 where it holds a date or is not there."""
    return int(retry_after) if re.fullmatch("[0-9]{1,9}", retry_after) else 0
