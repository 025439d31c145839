"""tools/curate.py against a server of its own that behaves badly, and badly written answers.

No network is needed.
"""

import base64
import io
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import ROOT
from PIL import Image

from data import SYSTEM_PROMPT, read
from engine import api
from engine.arguments import parse
from eval import write_rows
from tools import curate

KEY = "sk-very-secret-0123456789"


def response(answer, caption="- a square", think="1. I look."):
    return f"<caption>{caption}</caption>\n\n<think>\n{think}</think> <answer>{answer}</answer>"


def completion(text, **more):
    message = {"role": "assistant", "content": text}
    return json.dumps({"choices": [{"message": message, "finish_reason": "stop", **more}]})


def asked(request):
    """(the problem's number, all of the last turn's text) of a request to the API."""
    text = "".join(part.get("text", "") for part in request["messages"][-1]["content"])
    return int(re.search(r"number (\d+)", text)[1]), text


class Server(ThreadingHTTPServer):
    """Answers rightly, unless `behave(problem's number, how often it was asked, request)` gives
    another text (str) or does something to the handler (a function of it)."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.requests = []
        self.times = Counter()
        self.lock = threading.Lock()
        self.behave = lambda *_: None
        self.url = f"http://127.0.0.1:{self.server_address[1]}/v1"
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()

    def handle_error(self, *_):  # a client that hangs up is no news
        pass


class Handler(BaseHTTPRequestHandler):
    def log_message(self, *_):
        pass

    def do_POST(self):
        request = json.loads(self.rfile.read(int(self.headers["content-length"])))
        number = asked(request)[0]
        with self.server.lock:
            self.server.requests.append((self.path, self.headers["authorization"], request))
            self.server.times[number] += 1
            times = self.server.times[number]
        told = self.server.behave(number, times, request)
        if callable(told):
            return told(self)
        self.reply(completion(told if told is not None else response(number)))

    def reply(self, body, code=200, cut=0, **headers):
        body = body if isinstance(body, bytes) else body.encode()
        self.send_response(code)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body[: len(body) - cut])


@pytest.fixture
def server(monkeypatch):
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PRISM_API_KEY", KEY)
    server = Server()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def problems(tmp_path):
    """20 problems, each with a picture and a number of its own, which is the answer."""
    (tmp_path / "in").mkdir()
    rows = []
    for i in range(20):
        Image.new("RGB", (16, 16), (10 * i, 0, 99)).save(tmp_path / f"in/{i}.png")
        rows.append({"image": f"{i}.png", "question": f"What is number {i}?", "answer": str(i)})
    return save(tmp_path / "in/problems.jsonl", rows)


def save(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def arguments(server, problems, *flags):
    given = ["--data", problems, "--out", problems.parents[1] / "out"]
    given += ["--base_url", server.url, "--teacher", "T", "--first_delay", 0.01]
    return [str(flag) for flag in (*given, *flags)]


def run(server, problems, *flags):
    """A run, and what always holds: every row has one fate, what is kept is in one of the files."""
    curate.main(parse(curate.Args, arguments(server, problems, *flags)))
    out = problems.parents[1] / "out"
    report = json.loads((out / "report.json").read_text())
    kept = []
    for kind, size in report["files"].items():
        rows = lines(out / f"{kind}.jsonl")
        assert len(rows) == size
        kept += [row["extra_info"]["from"] for row in rows]
    assert len(kept) == len(set(kept)) == report["fates"].get("kept", 0)
    assert report["rows"] == sum(report["fates"].values())
    return report


# ----------------------------------------------------------------------------- the three files
def test_three_files_that_the_stages_open(server, problems, tmp_path):
    report = run(server, problems, "--shares", 0.25, 0.2)
    out = tmp_path / "out"
    assert report["rows"] == 20
    assert report["fates"] == {"kept": 20}
    assert report["files"] == {"align": 5, "rl": 4, "sft": 11}
    seen = []
    for kind, size in report["files"].items():
        data = read(str(out / f"{kind}.jsonl"), kind)
        assert len(data) == size
        for example in data.fetch(range(size)):
            number = int(re.search(r"number (\d+)", example.messages[1]["content"])[1])
            seen.append(number)
            assert example.messages[0] == {"role": "system", "content": SYSTEM_PROMPT}
            assert example.answer == str(number)
            assert Image.open(example.images[0]).getpixel((0, 0)) == (10 * number, 0, 99)
            assert example.images[0].startswith(str(out / "images"))
            text = example.messages[-1]["content"] if kind == "sft" else example.response
            assert text == response(number)  # its empty line too
    assert sorted(seen) == list(range(20))  # none twice, none lost


def test_the_teachers_words_are_kept_as_they_stand(server, problems, tmp_path):
    """Empty lines and indentation are what a policy is to learn to write; only the ends go."""
    think = "1. I look:\n\n    2 + 2\n      = 4\n\n2. So  4."
    server.behave = lambda number, *_: f"\n {response(number, think=think)}\n\n"
    run(server, problems, "--shares", 0.25, 0.2)
    for kind in ("sft", "align", "rl"):
        for row in lines(tmp_path / f"out/{kind}.jsonl"):
            number = row["reward_model"]["ground_truth"]
            text = row["messages"][-1]["content"] if kind == "sft" else row["teacher_response"]
            assert text == response(number, think=think)


def test_sft_rows_are_conversations_that_other_tools_read(server, problems, tmp_path):
    """LLaMA-Factory's `messages` dialect: a turn has role and content alone, `<image>` stands in
    the user's for each image, whose path is relative to the file."""
    run(server, problems, "--shares", 0, 0)
    rows = lines(tmp_path / "out/sft.jsonl")
    assert len(rows) == 20
    for row in rows:
        assert not {"prompt", "teacher_response", "conversations"} & row.keys()
        assert [turn["role"] for turn in row["messages"]] == ["system", "user", "assistant"]
        assert all(turn.keys() == {"role", "content"} for turn in row["messages"])
        texts = "".join(turn["content"] for turn in row["messages"])
        assert texts.count("<image>") == len(row["images"]) == 1
        assert (tmp_path / "out" / row["images"][0]).exists()


@pytest.mark.parametrize("flags", [(), ("--judge", "J")])
def test_columns_keep_their_types(server, problems, tmp_path, flags):
    """Readers of tables refuse a file in which a column's type changes from row to row."""
    rows = lines(problems)
    rows[0]["answer"] = 0
    rows[1]["equivalent_answers"] = ["one"]
    rows[2] |= {"choices": ["2", "3", "4"], "answer": "A", "data_source": "mine"}
    rows[3]["answer"] = [3, "three"]
    save(problems, rows)

    def behave(number, times, request):
        return str(number % 6) if request["model"] == "J" else None

    server.behave = behave
    report = run(server, problems, "--shares", 0.3, 0.2, *flags)
    for name in (*report["files"], "answers"):
        rows = lines(tmp_path / f"out/{name}.jsonl")
        assert len(rows) > 3
        types = {}
        for row in rows:
            for path, kind in types_in(row):
                assert types.setdefault(path, kind) == kind, f"{name}: {path}"
        pyarrow_json = pytest.importorskip("pyarrow.json", reason="the extra `parquet` is missing")
        assert len(pyarrow_json.read_json(tmp_path / f"out/{name}.jsonl")) == len(rows)


def test_what_eval_filters_keeps_its_types(problems, tmp_path):
    rows = [{"image": "0.png", "question": "How?", "answer": "1", "x": 1.0, "of": [1, 2]}]
    rows = [row | {"n": i} for i in range(3) for row in rows]
    out = tmp_path / "in/kept.jsonl"
    write_rows(save(tmp_path / "in/p.jsonl", rows), [0, 2], out)
    found = lines(out)
    assert found == [rows[0], rows[2]]
    assert [list(types_in(row)) for row in found] == [list(types_in(row)) for row in rows[::2]]


def types_in(value, path=""):
    """Yield (path, type) of all that a row holds: one path for all the elements of a list."""
    if isinstance(value, dict):
        for name, one in value.items():
            yield from types_in(one, f"{path}.{name}")
    elif isinstance(value, list):
        for one in value:
            yield from types_in(one, f"{path}[]")
    else:
        yield path, type(value)


def test_what_the_api_is_asked(server, problems, tmp_path):
    run(server, problems, "--limit", 1, "--request", '{"temperature": 0.5, "max_tokens": 7}')
    ((path, authorization, request),) = server.requests
    assert path == "/v1/chat/completions" and authorization == f"Bearer {KEY}"
    system, user = request.pop("messages")
    assert request == {"model": "T", "temperature": 0.5, "max_tokens": 7}
    assert system == {"role": "system", "content": SYSTEM_PROMPT}
    image, text = user["content"]
    head, data = image["image_url"]["url"].split(",")
    assert head == "data:image/png;base64"
    assert base64.b64decode(data) == (tmp_path / "in/0.png").read_bytes()
    assert text == {"type": "text", "text": "\nWhat is number 0?"}


def test_images_stand_where_the_turns_have_them_and_options_are_kept(server, tmp_path):
    Image.new("RGB", (8, 8), "red").save(tmp_path / "a.png")
    Image.new("RGB", (8, 8), "blue").save(tmp_path / "b.png")
    turns = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "First <image> number 1 then <image>?"},
    ]
    row = {
        "prompt": turns,
        "images": [{"path": "a.png"}, {"path": "b.png"}],
        "extra_info": {"choices": ["red", "blue"]},
        "reward_model": {"ground_truth": "B", "equivalent_answers": ["azure"]},
        "data_source": "mine",
    }
    (tmp_path / "in").mkdir()
    server.behave = lambda *_: response("blue")
    run(server, save(tmp_path / "in/p.jsonl", [row]), "--image_root", tmp_path, "--shares", 1, 0)
    content = server.requests[0][2]["messages"][1]["content"]
    assert [part["type"] for part in content] == ["text", "image_url", "text", "image_url", "text"]
    assert server.requests[0][2]["messages"][0]["content"] == SYSTEM_PROMPT
    example = read(str(tmp_path / "out/align.jsonl"), "align")[0]
    assert example.answer == "B"
    assert example.equivalent == ("azure",)
    assert example.choices == ("red", "blue")
    assert example.messages[1]["content"] == turns[1]["content"] and example.source == "mine"
    colours = [Image.open(image).getpixel((0, 0)) for image in example.images]
    assert colours == [(255, 0, 0), (0, 0, 255)]


def test_the_split_is_the_seeds_and_moves_little_when_problems_are_added(
    server, problems, tmp_path
):
    flags = ("--shares", 0.3, 0.2)
    sets = []
    for more in (("--limit", 18), ("--limit", 18), ("--limit", 18, "--seed", 1), ("--limit", 20)):
        run(server, problems, *flags, *more)
        sets.append({row["extra_info"]["from"] for row in lines(tmp_path / "out/align.jsonl")})
    assert sets[0] == sets[1] != sets[2] and len(server.requests) == 20
    assert len(sets[0] & sets[3]) >= 3


def test_nobody_sees_the_key(server, problems, tmp_path, capsys):
    echo = json.dumps({"error": {"message": f"your key {KEY} is tired"}})

    def behave(number, times, request):
        if number == 3:
            return lambda handler: handler.reply(echo, 500)
        return response(number, caption=f"- {KEY}") if number == 4 else None

    server.behave = behave
    run(server, problems, "--retries", 1)
    server.behave = lambda *_: lambda handler: handler.reply(echo, 401)
    with pytest.raises(SystemExit) as stop:
        curate.main(parse(curate.Args, arguments(server, problems, "--teacher", "U")))
    assert "your key [key] is tired" in str(stop.value) and KEY not in str(stop.value)
    shown = "".join(capsys.readouterr())
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) > 40
    assert KEY not in shown
    assert not any(KEY.encode() in path.read_bytes() for path in files)


def test_without_a_key_none_is_sent(server, problems, monkeypatch):
    monkeypatch.delenv("PRISM_API_KEY")
    run(server, problems, "--limit", 1)
    server.behave = lambda *_: lambda handler: handler.reply("", 401)
    with pytest.raises(SystemExit, match=r"HTTP 401 .*no key in \$PRISM_API_KEY"):
        run(server, problems, "--limit", 2)
    assert {authorization for _, authorization, _ in server.requests} == {None}
    server.behave = lambda *_: None
    # Short ones, as local servers want them, are words: they stay in what is answered.
    monkeypatch.setenv("OTHER", "o\n")
    run(server, problems, "--limit", 1, "--teacher", "U", "--key_env", "OTHER")
    assert server.requests[-1][1] == "Bearer o" and len(server.requests) == 3


def test_pictures_are_sent_as_the_policy_sees_them(tmp_path):
    """Bytes as they are where that is the same; else a PNG: turned by EXIF, transparent, of an
    unusual format."""
    image = Image.radial_gradient("L").convert("RGB").resize((24, 16))
    image.putpixel((0, 0), (255, 0, 0))
    turned = Image.Exif()
    turned[274] = 6
    image.save(tmp_path / "a.png")
    image.save(tmp_path / "a.jpg")
    image.save(tmp_path / "a.bmp")
    image.save(tmp_path / "turned.jpg", exif=turned)
    image.convert("RGBA").save(tmp_path / "clear.png")
    image.save(tmp_path / "hole.png", transparency=(255, 0, 0))
    names = ("a.png", "a.jpg", "a.bmp", "turned.jpg", "clear.png", "hole.png")
    rows = [{"image": name, "question": "?", "answer": "1"} for name in names]
    data = read(str(save(tmp_path / "p.jsonl", rows)), "eval")
    seen = {}  # the file's name -> (path by the pixels, bytes)
    for example in data.fetch(range(6)):
        pictures, _ = curate.look(example)
        seen[Path(example.images[0]).name] = pictures[0]
    assert all(seen[name][1] == (tmp_path / name).read_bytes() for name in ("a.png", "a.jpg"))
    assert seen["a.jpg"][0].endswith(".jpeg")
    assert all(seen[n][0].endswith(".png") for n in seen if n != "a.jpg")
    assert seen["a.png"][0] == seen["a.bmp"][0] == seen["clear.png"][0] != seen["turned.jpg"][0]
    upright = Image.open(io.BytesIO(seen["turned.jpg"][1]))
    assert Image.open(io.BytesIO(seen["hole.png"][1])).getpixel((0, 0)) == (255, 255, 255)
    assert upright.size == (16, 24) and upright.format == "PNG" and not upright.getexif()


# ----------------------------------------------------------------------------- which problems
def rollouts(problems, rates, policy="p", mode="T=1"):
    same = {"policy": policy, "data": str(problems), "mode": mode, "where": "", "text": []}
    return [{**same, "row": row, "accuracy": accuracy} for row, accuracy in rates.items()]


def test_only_what_the_policy_fails_is_asked(server, problems, tmp_path):
    """Of several policies the best counts; greedy decoding does not; a row without a record, or
    without a verdict, is counted, not guessed."""
    records = rollouts(problems, {0: [0, None], 1: [0, 1], 2: [1, 1], 3: [0.0, 0.0], 4: [0, 0]})
    records += rollouts(problems, {3: [0, 0], 4: [0, 1], 5: [None]}, policy="q")
    records += rollouts(problems, {0: [1], 5: [0]}, mode="greedy")
    flags = ("--pass_rates", save(tmp_path / "rollouts.jsonl", records))
    report = run(server, problems, *flags)
    assert report["fates"] == {"kept": 2, "passed too often": 3, "no pass rate": 15}
    assert {asked(request)[0] for *_, request in server.requests} == {0, 3}
    report = run(server, problems, *flags, "--hardest", 0.5)
    assert report["fates"] == {"kept": 4, "passed too often": 1, "no pass rate": 15}


@pytest.mark.parametrize("record", [{"question": "?"}, {"mode": "T=1", "accuracy": []}, [1]])
def test_a_file_without_rollouts_is_refused(server, problems, tmp_path, record):
    with pytest.raises(ValueError, match="x.jsonl.* --rollouts_out"):
        run(server, problems, "--pass_rates", save(tmp_path / "x.jsonl", [record]))


def test_rollouts_of_other_data_leave_nothing_to_ask(server, problems, tmp_path):
    records = rollouts(tmp_path / "other.jsonl", {0: [0]})
    report = run(server, problems, "--pass_rates", save(tmp_path / "r.jsonl", records))
    assert report["fates"] == {"no pass rate": 20}
    assert not server.requests


LONG = (
    "In the figure a train of length 12 m leaves the station at noon, and a second one follows "
    "after 5 minutes. How far"
)


@pytest.mark.parametrize(
    "one, other, near",
    [
        ("How many cats?", "how many  cats", True),
        ("How many cats?", "How many dogs?", False),
        ("What is a + b?", "What is a - b?", False),
        ("What is f(2)?", "What is f(3)?", False),
        ("1.5", "15", False),
        (f"{LONG} apart are they?", f"{LONG} apart are the trains?", True),
        (f"{LONG} apart are they?", "How far apart are they?", False),
        ("?", "!", True),
        ("图中有几只猫？", "图中有几只狗？", False),
    ],
)
def test_near_duplicates(tmp_path, one, other, near):
    path = save(tmp_path / "p.jsonl", [{"question": q, "answer": "1"} for q in (one, other, one)])
    args = curate.Args(data=(str(path),), out="", base_url="http://h", teacher="T")
    problems, fates = curate.select(args)
    assert [p.row for p in problems] == ([0] if near else [0, 1])
    assert fates == {"near-duplicate": 1 + near}


def test_duplicates_have_the_same_pixels(server, problems, tmp_path):
    """The same picture in another file, in another format, in another data file: the first row
    stays. Another picture: both."""
    Image.open(tmp_path / "in/0.png").save(tmp_path / "in/again.bmp")
    rows = lines(problems)[:3] + [
        {"image": "again.bmp", "question": "what is number 0", "answer": "0"},
        {"image": "again.bmp", "question": "Is this number 0 blue or red?", "answer": "0"},
        {"image": "1.png", "question": "What is number 0?", "answer": "0"},
        {"question": "What is number 0?", "answer": "0"},
        {"question": "What is number 0!", "answer": "0"},
    ]
    second = save(tmp_path / "in/second.jsonl", lines(problems)[2:3])
    first = save(problems, rows)
    report = run(server, problems, "--data", first, second)
    assert report["fates"] == {"kept": 6, "near-duplicate": 3} and len(server.requests) == 6


def test_bad_rows_are_counted(server, problems, tmp_path):
    (tmp_path / "in/1.png").write_bytes(b"no image")
    rows = lines(problems)[:4] + [{"image": "0.png", "question": "What?"}]
    report = run(server, save(problems, rows))
    bad = {
        "bad: an image cannot be read": 1,
        "bad: no answer, or one of more than 4000 characters": 1,
    }
    assert report["fates"] == {"kept": 3} | bad and report["rows"] == 5
    with pytest.raises(ValueError, match="2 of 5 rows are bad"):
        run(server, problems, "--max_bad", 1)


# ----------------------------------------------------------------------------- answers
def test_malformed_and_wrong_answers_are_asked_again_up_to_samples(server, problems):
    bad = {
        0: ["no tags"],
        1: [response("7")],
        2: [response("2", think=" ")],
        3: ["x"] * 9,
        4: ["x", *[response("9")] * 9],
        5: [response("5", caption="<image>")],
        6: [response("6") + response("6")],
        7: ["\ud800" + response("7")],
        8: [response("8", caption="\ud800")],
        9: [None],
    }

    def behave(number, times, request):
        texts = bad.get(number, [])
        if number == 9 and times == 1:
            return lambda handler: handler.reply(completion(None, finish_reason="content_filter"))
        return texts[times - 1] if times <= len(texts) else None

    server.behave = behave
    report = run(server, problems, "--samples", 3, "--limit", 10)
    assert report["fates"] == {"kept": 8, "malformed": 1, "wrong": 1}
    assert [server.times[i] for i in range(10)] == [2, 2, 2, 3, 3, 2, 2, 2, 2, 2]
    assert report["requests"] == {"answered": 22}
    assert report["answers"] == {
        "malformed": 11,
        "wrong": 3,
        "right": 8,
    }
    server.behave = lambda *_: None
    assert run(server, problems, "--samples", 4, "--limit", 10)["fates"] == {"kept": 10}
    assert [server.times[i] for i in (3, 4)] == [4, 4]
    assert sum(server.times.values()) == 24  # only what is missing


def test_a_longer_limit_asks_cut_answers_again(server, problems):
    cut = response(0)[:20]
    server.behave = lambda *_: (
        lambda handler: handler.reply(completion(cut, finish_reason="length"))
    )
    assert run(server, problems, "--limit", 1, "--samples", 2)["fates"] == {"malformed": 1}
    assert len(server.requests) == 2
    server.behave = lambda *_: None
    for flags, requests in (((), 2), (("--request", '{"max_tokens": 9999}'), 3)):
        run(server, problems, "--limit", 1, "--samples", 2, *flags)
        assert len(server.requests) == requests


def test_the_judge(server, problems, tmp_path):
    """It may call right what rewards.py calls wrong, not the reverse; such a row is never in
    rl.jsonl; grades rank."""
    grades = {0: 5, 1: 1, 2: 0, 3: 4, 4: 0, 5: 5, 6: 2}  # answers to 4, 5, 6 are not rewards.py's

    def behave(number, times, request):
        if request["model"] == "J":
            return "Well, 3 or 4" if number == 3 and times == 2 else f" **{grades[number]}**\n"
        return response("the fifth" if number > 3 else number)

    server.behave = behave
    rows = lines(problems)
    rows[4]["equivalent_answers"] = ["or so"]
    save(problems, rows)
    flags = ("--judge", "J", "--limit", 7, "--samples", 1, "--shares", 0.34, 0.51)
    report = run(server, problems, *flags)
    assert report["fates"] == {"kept": 6, "wrong": 1}
    assert report["files"] == {
        "align": 2,
        "rl": 3,
        "sft": 1,
    }
    assert report["requests"] == {"answered": 14, "Unreadable": 1}
    assert report["answers"]["right, graded 0"] == 1
    got = {
        kind: [row["extra_info"]["from"] for row in lines(tmp_path / f"out/{kind}.jsonl")]
        for kind in report["files"]
    }
    assert set(got["align"]) == {"problems.jsonl:1", "problems.jsonl:6"}
    assert got["rl"] == ["problems.jsonl:4", "problems.jsonl:2", "problems.jsonl:3"]
    assert got["sft"] == ["problems.jsonl:7"]
    judged = [request for *_, request in server.requests if request["model"] == "J"]
    judged = next(request for request in judged if asked(request)[0] == 4)
    assert judged["messages"][0]["content"] == curate.JUDGE_PROMPT
    assert "Reference: 4 or or so\n" in asked(judged)[1]
    assert "<answer>the fifth" in asked(judged)[1]
    assert judged["messages"][1]["content"][0]["type"] == "image_url"
    before = len(server.requests)
    assert run(server, problems, *flags)["files"] == report["files"]
    assert len(server.requests) == before  # its grades are known, too


# --------------------------------------------------------------------- a server that behaves badly
MISDEEDS = {  # how it is counted -> what the server does
    "HTTP 500": lambda handler: handler.reply("<html>oops</html>", 500),
    "HTTP 429": lambda handler: handler.reply("{}", 429, Retry_After="0"),
    "HTTP 503": lambda handler: handler.reply(
        "{}", 503, Retry_After="Wed, 21 Oct 2015 07:28:00 GMT"
    ),
    "ReadTimeout": lambda handler: time.sleep(1),
    "RemoteProtocolError": lambda handler: handler.reply(completion(response(0)), cut=9),
    "JSONDecodeError": lambda handler: handler.reply('{"choices": [{"mess'),
    "KeyError": lambda handler: handler.reply('{"error": {"message": "overloaded"}}'),
    "IndexError": lambda handler: handler.reply('{"choices": []}'),
    "TypeError": lambda handler: handler.reply(completion(["a", "list"])),
    "RecursionError": lambda handler: handler.reply("[" * 100_000),
}


@pytest.mark.parametrize("kind", MISDEEDS)
def test_a_server_that_recovers_is_asked_again(server, problems, kind):
    server.behave = lambda number, times, request: (
        MISDEEDS[kind] if number == 1 and times < 3 else None
    )
    flags = ("--timeout", 0.5) if kind == "ReadTimeout" else ()
    report = run(server, problems, "--limit", 3, "--retries", 2, *flags)
    assert report["fates"] == {"kept": 3} and report["requests"] == {"answered": 3, kind: 2}
    assert server.times == {0: 1, 1: 3, 2: 1}


@pytest.mark.parametrize(
    "kind", ["HTTP 500", "JSONDecodeError", "HTTP 400", "HTTP 413", "HTTP 422"]
)
def test_what_is_not_answered_is_counted_and_asked_in_the_next_run(server, problems, kind):
    """Some requests cannot be mended by asking again: this problem's picture is too large, say."""
    code = int(kind[5:]) if kind[5:].isdigit() else 0
    misdeed = MISDEEDS.get(kind, lambda handler: handler.reply('{"error": "too large"}', code))
    server.behave = lambda number, *_: misdeed if number in (1, 2) else None
    report = run(server, problems, "--limit", 5, "--retries", 1)
    assert report["fates"] == {"kept": 3, f"unanswered: {kind}": 2}
    assert server.times[1] == server.times[2] == (1 if 400 <= code < 500 else 2)
    server.behave = lambda *_: None
    report = run(server, problems, "--limit", 5)
    assert report["fates"] == {"kept": 5} and report["requests"] == {"answered": 2}


def test_nobody_there(server, problems):
    url = "http://127.0.0.1:9/v1"
    with pytest.raises(SystemExit, match=f"ConnectError from {url}"):
        run(server, problems, "--base_url", url, "--retries", 1, "--max_failures", 3)


@pytest.mark.parametrize("code", [301, 401, 403, 404])
def test_an_error_that_concerns_all_stops_at_once(server, problems, tmp_path, code):
    server.behave = lambda number, *_: (
        (lambda handler: handler.reply("who are you?", code)) if number > 1 else None
    )
    with pytest.raises(SystemExit) as stop:
        run(server, problems, "--concurrency", 2)
    assert re.search(
        rf"HTTP {code} from {server.url} .*PRISM_API_KEY.*who are you?", str(stop.value)
    )
    assert len(server.requests) <= 5
    # What was answered is kept; the second problem may not have been asked by then.
    assert len(lines(tmp_path / "out/answers.jsonl")) == server.times[0] + server.times[1]
    assert not (tmp_path / "out/sft.jsonl").exists()


def test_many_failures_in_a_row_stop_the_run(server, problems):
    """Single ones do not: an answer between them starts the count again."""
    flags = ("--retries", 0, "--max_failures", 3, "--concurrency", 1)
    server.behave = lambda number, *_: None if number % 4 == 3 else MISDEEDS["HTTP 500"]
    assert run(server, problems, *flags)["fates"] == {"kept": 5, "unanswered: HTTP 500": 15}
    server.behave = lambda *_: MISDEEDS["HTTP 500"]
    before = len(server.requests)
    with pytest.raises(SystemExit, match="HTTP 500"):
        run(server, problems, *flags)
    assert len(server.requests) == before + 4


@pytest.fixture
def waits(monkeypatch):
    """Seconds that the run would have waited before its retries."""

    class Event(threading.Event):
        def wait(self, seconds):
            waits.append(seconds)
            return self.is_set()

    waits = []
    monkeypatch.setattr(api, "threading", SimpleNamespace(Event=Event, Lock=threading.Lock))
    return waits


def test_delays_double(server, problems, waits):
    server.behave = lambda *_: MISDEEDS["HTTP 500"]
    run(server, problems, "--limit", 1, "--first_delay", 8, "--retries", 5)
    assert len(waits) == 5 == len(set(waits)) and len(server.requests) == 6
    for wait, mean in zip(waits, (8, 16, 32, 60, 60), strict=True):
        assert 0.5 * mean <= wait <= 1.5 * mean


def test_retry_after_is_honoured(server, problems, waits):
    busy = lambda handler: handler.reply("{}", 429, Retry_After="7")  # noqa: E731
    server.behave = lambda number, times, _: busy if times == 1 else None
    assert run(server, problems, "--limit", 2)["fates"] == {"kept": 2} and waits == [7, 7]
    server.behave = lambda *_: lambda handler: handler.reply("daily quota", 429, Retry_After="3600")
    with pytest.raises(SystemExit, match=r"HTTP 429.*wait: 3600 s.*daily quota"):
        run(server, problems, "--limit", 3)
    assert waits == [7, 7]


def test_requests_are_at_once_but_not_more_than_allowed(server, problems):
    together = threading.Barrier(4)
    lock = threading.Lock()
    now = most = 0

    def behave(*_):
        nonlocal now, most
        with lock:
            now += 1
            most = max(most, now)
        together.wait(10)
        with lock:
            now -= 1

    server.behave = behave
    assert run(server, problems, "--concurrency", 4)["fates"] == {"kept": 20}
    assert most == 4


# ----------------------------------------------------------------------------- stopped and resumed
def test_a_broken_last_line_is_asked_again(server, problems, tmp_path):
    run(server, problems)
    cache = tmp_path / "out/answers.jsonl"
    whole = cache.read_bytes()
    for cut in (1, 40):
        cache.write_bytes(whole[:-cut])
        report = run(server, problems)
        assert report["requests"] == {"answered": 1}
        assert report["fates"] == {"kept": 20}
        assert len(lines(cache)) == 20


def test_ctrl_c_keeps_what_was_answered(server, problems, tmp_path):
    def behave(number, *_):
        if number == 5:
            os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.3 if number > 4 else 0)
        return MISDEEDS["HTTP 500"] if number == 4 else None

    server.behave = behave
    # A test run in the background does not have this handler.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    begin = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        run(server, problems, "--concurrency", 2, "--first_delay", 30)  # nobody waits for a retry
    signal.signal(signal.SIGINT, before)
    assert time.monotonic() - begin < 12  # of the 15 s or more before the retry
    server.behave = lambda *_: None
    answered = len(lines(tmp_path / "out/answers.jsonl"))
    assert 5 <= answered < 20
    report = run(server, problems)
    assert report["requests"] == {"answered": 20 - answered}
    assert report["fates"] == {"kept": 20}


def test_two_runs_do_not_share_a_folder(server, problems, tmp_path):
    (tmp_path / "out").mkdir()
    first = api.Api(parse(curate.Args, arguments(server, problems)), tmp_path / "out/answers.jsonl")
    with first.file, pytest.raises(BlockingIOError):
        run(server, problems)


@pytest.mark.slow
def test_a_killed_run_goes_on(server, problems, tmp_path):
    """kill -9 in the middle, from the command line, with the key only in the environment; what was
    answered is not asked."""
    cache = tmp_path / "out/answers.jsonl"
    gate = threading.Event()

    def behave(number, *_):
        if number >= 7:
            gate.wait(60)

    server.behave = behave
    flags = arguments(server, problems, "--concurrency", 2)
    command = [sys.executable, str(ROOT / "tools/curate.py"), *flags]
    child = subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd=tmp_path
    )
    for _ in range(600):
        if cache.exists() and len(lines(cache)) == 7:
            break
        time.sleep(0.1)
    child.send_signal(signal.SIGKILL)
    assert child.wait(10) == -signal.SIGKILL
    gate.set()
    with open(cache, "a") as file:
        file.write('{"about": "half a li')
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0
    assert "Counter({'answered': 13})" in done.stdout
    assert KEY not in done.stdout + done.stderr
    assert json.loads((tmp_path / "out/report.json").read_text())["fates"] == {"kept": 20}


# ----------------------------------------------------------------------------- arguments
@pytest.mark.parametrize(
    "flags, says",
    [
        (["--base_url", "api.example.org"], "--base_url is http"),
        (["--out", "in/../in"], "--out is the folder of --data"),
        (["--base_url", "https://me:secret@example.org/v1"], "--base_url is http"),
        (["--base_url", "https://example.org/v1?key=secret"], "--base_url is http"),
        (["--request", "[]"], "--request is a JSON object"),
        (["--samples", "0"], "--samples is 0"),
        (["--concurrency", "0"], "--concurrency is 0"),
        (["--hardest", "50"], "--hardest is 50"),
        (["--near", "nan"], "--near is nan"),
        (["--shares", "0.9", "0.2"], "--shares is 1.1"),
        (["--judges", "x"], "did you mean --judge"),
    ],
)
def test_wrong_arguments(server, problems, capsys, monkeypatch, flags, says):
    monkeypatch.chdir(problems.parents[1])
    with pytest.raises(SystemExit) as stop:
        parse(curate.Args, arguments(server, problems, *flags))
    assert stop.value.code == 2 and says in capsys.readouterr().err


def test_the_help_is_the_manual(capsys):
    with pytest.raises(SystemExit):
        parse(curate.Args, ["--help"])
    text = capsys.readouterr().out
    assert curate.__doc__.splitlines()[0] in text and "python tools/curate.py --data" in text
    for name in curate.Args.__dataclass_fields__:
        assert re.search(rf"\n  --{name} .+", text), name
    options = text.split("\n  --")[1:]
    assert len(options) == len(curate.Args.__dataclass_fields__)
    for option in options:
        explained = re.sub(r"\(default:.*", "", option, flags=re.DOTALL)
        assert len(explained.split()) > 3, option
