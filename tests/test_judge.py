"""eval.py --judge: what the rules leave open, the judge's verdicts from a server of the test's own,
their cache, and a server that behaves badly."""

import importlib
import json
import math
import re
import threading
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from test_eval import arguments, place, response  # noqa: F401 (a fixture)

from data import to_example
from engine import evaluation
from engine.answers import is_open
from engine.arguments import parse
from engine.grader import PROMPT, TRIAL, Claim, Grader, agreement, claim_of
from engine.sampler import Rollout
from rewards import left_open

script = importlib.import_module("eval")
KEY = "sk-very-secret-0123456789"


class Handler(BaseHTTPRequestHandler):
    def log_message(self, *_):
        pass

    def do_POST(self):
        request = json.loads(self.rfile.read(int(self.headers["content-length"])))
        text = request["messages"][-1]["content"]
        answer = re.search("Answer: (.*)", text)[1]
        self.server.requests.append((self.headers["authorization"], request))
        self.server.times[answer] += 1
        code, said = self.server.behave(answer, self.server.times[answer])
        message = {"role": "assistant", "content": said}
        body = json.dumps({"choices": [{"message": message, "finish_reason": "stop"}]})
        self.send_response(code)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body.encode())


@pytest.fixture
def server(monkeypatch):
    """A judge that says "different", unless `behave(answer, how often)` gives another
    (HTTP status, text)."""
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PRISM_API_KEY", KEY)
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    server.requests = []
    server.times = Counter()
    server.behave = lambda *_: (200, "different")
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


# ----------------------------------------------------------------------------- what is left open
CHOICES = ("the cat", "the dog")


@pytest.mark.parametrize(
    "pred, gold, choices",
    [
        ("the auto", "the car", ()),
        ("the auto", "5", ()),
        ("car", "5", ()),  # not c times a times r
        ("none", "0", ()),
        ("about a dozen of them", "12", ()),
        ("Paris, in France", "Paris", ()),
        ("the canine", "B", CHOICES),
        ("the canine", "the dog", CHOICES),
        ("I cannot tell", "B", CHOICES),
    ],
)
def test_what_the_rules_leave_open(pred, gold, choices):
    assert is_open(pred, gold, choices)


@pytest.mark.parametrize(
    "pred, gold, choices",
    [
        ("car", "the car", ()),  # right
        ("4", "5", ()),
        ("There are 3 dogs", "4", ()),  # in short: 3 dogs
        ("5 km", "5 m", ()),
        ("no", "yes", ()),
        ("x + 1", "x + 2", ()),
        ("1, 2", "1, 3", ()),
        ("A", "B", ()),
        ("A", "B", CHOICES),
        ("the cat", "B", CHOICES),
        ("(A) the cat", "the dog", CHOICES),
        (" ", "car", ()),
        ("a" * 5000, "car", ()),
    ],
)
def test_what_the_rules_decide(pred, gold, choices):
    assert not is_open(pred, gold, choices)


def test_only_well_formed_responses_are_left_open():
    row = {"question": "what?", "answer": "car", "equivalent_answers": ["tram"]}
    example = to_example(row)
    assert left_open(response(answer="an auto"), example) == "an auto"
    assert left_open(response(answer="tram"), example) is None
    assert left_open("an auto", example) is None
    # As long as one of the references leaves it open.
    assert left_open(response(answer="4"), to_example(row | {"equivalent_answers": ["5"]})) == "4"
    assert left_open(response(answer="4"), to_example(row | {"answer": "5"})) == "4"


# ----------------------------------------------------------------------------- a run
ANSWERS = ["an auto", "red", "4", "an auto"]  # of each row's four samples


@pytest.fixture
def run(server, place, tmp_path, monkeypatch):  # noqa: F811
    """A run whose policy answers ANSWERS to the rows 0, 1, 3 and 4 of the file -> (results,
    rollouts)."""
    rows = [json.loads(line) for line in (place / "rows.jsonl").read_text().splitlines()]
    for row in rows:
        row["answer"] = "the car"
        row["equivalent_answers"] = ["a vehicle"]
    (place / "cars.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def fake(hf, prompts, rows, *_, eos, **__):
        return [Rollout([k, eos[0]], [0.0] * 2, "end") for _, k in rows]

    monkeypatch.setattr(evaluation, "generate", fake)
    texts = [response(answer=answer) for answer in ANSWERS]
    monkeypatch.setattr("data.Encoder.decode", lambda self, ids: texts[ids[0]])

    def run(*flags):
        out = tmp_path / "rollouts.jsonl"
        line = ["--data", place / "cars.jsonl", "--no-greedy", "--samples", 4]
        line += ["--rollouts_out", out, "--out", tmp_path / "results.json"]
        line += ["--judge", "J", "--base_url", f"http://127.0.0.1:{server.server_address[1]}/v1"]
        line += ["--judge_cache", tmp_path / "new/cache.jsonl", "--first_delay", 0.01]
        results = script.main(arguments(place, *line, *flags))
        return results, [json.loads(line) for line in out.read_text().splitlines()]

    return run


def test_the_judge_grades_what_is_left_open(server, run, tmp_path, capsys):
    server.behave = lambda answer, _: (200, " **Same**.\n" if "auto" in answer else "different")
    ((result,), rollouts) = run()
    assert [record["accuracy"] for record in rollouts] == [[1.0, 0.0, 0.0, 1.0]] * 4
    assert [record["decided_by"] for record in rollouts] == [["judge"] * 4] * 4
    assert result["accuracy"] == 0.5 and result["pass@4"] == 1
    assert (result["judged"], result["ungraded"]) == (1, 0)
    # The trial, and each answer to each question once: 4 questions, 3 answers.
    assert len(server.requests) == 13
    report = json.loads((tmp_path / "results.json").read_text())["judge"]
    assert (report["model"], report["responses"], report["answers"]) == ("J", 16, 12)
    assert report["requests"] == {"answered": 13}
    assert "judge: {" in capsys.readouterr().out

    authorization, request = server.requests[-1]
    assert authorization == f"Bearer {KEY}"
    system, user = request.pop("messages")
    assert request == {"model": "J", "max_tokens": 4096, "temperature": 0}
    assert system == {"role": "system", "content": PROMPT}
    assert re.fullmatch(
        r"Question: how many \d\n\nReference: the car or a vehicle\n\nAnswer: (an auto|red|4)",
        user["content"],
    )
    assert KEY not in (tmp_path / "new/cache.jsonl").read_text()

    # What is known is not asked again, but for the trial; of another model nothing is known.
    assert run()[0] == [result]
    assert len(server.requests) == 14
    run("--judge", "K")
    assert len(server.requests) == 14 + 13


def test_what_is_no_verdict_is_refused_and_counted(server, run, tmp_path):
    """It is neither right nor wrong: it counts in no mean."""
    said = {"an auto": "same", "red": "The same, or different", TRIAL.answer: "same"}
    server.behave = lambda answer, _: (200, said.get(answer, "Different"))
    ((result,), rollouts) = run(
        *("--retries", 1, "--filter", 0.6, 0.7, "--filter_out", tmp_path / "kept.jsonl")
    )
    assert len((tmp_path / "kept.jsonl").read_text().splitlines()) == 4  # 2 of 3 are right
    assert [record["accuracy"] for record in rollouts] == [[1.0, None, 0.0, 1.0]] * 4
    assert rollouts[0]["decided_by"] == ["judge", "nobody", "judge", "judge"]
    assert result["accuracy"] == pytest.approx(2 / 3)
    assert result["pass@1"] == pytest.approx(2 / 3) and math.isnan(result["pass@4"])
    assert (result["judged"], result["ungraded"]) == (0.75, 0.25)
    assert server.times["red"] == 8  # asked again once, for each of 4 questions


def test_rows_without_a_verdict_are_not_kept_and_counted(server, run, tmp_path, capsys):
    server.behave = lambda answer, _: (200, "same" if answer == TRIAL.answer else "who knows")
    kept = tmp_path / "kept.jsonl"
    run("--retries", 0, "--filter", 0.0, 1.0, "--filter_out", kept)
    assert kept.read_text() == ""
    assert "4 rows are not kept: the judge graded none of their" in capsys.readouterr().out


def test_an_error_of_all_requests_ends_the_run_before_it_begins(server, run, monkeypatch):
    monkeypatch.setattr(script, "load", lambda *_, **__: pytest.fail("a model was loaded"))
    server.behave = lambda *_: (401, "")
    with pytest.raises(SystemExit, match=r"HTTP 401 from http.*a key in \$PRISM_API_KEY"):
        run()
    server.behave = lambda *_: (400, "no such parameter: temperature")
    with pytest.raises(SystemExit, match="--judge J: HTTP 400 to a trial.*no such parameter"):
        run()
    server.behave = lambda *_: (200, "yes")
    with pytest.raises(SystemExit, match="--judge J: Unreadable to a trial question: .*yes"):
        run("--retries", 0)


def test_a_judge_that_fails_later_costs_no_response(server, run, tmp_path):
    server.behave = lambda answer, _: (200 if answer in (TRIAL.answer, "4") else 403, "same")
    with pytest.raises(SystemExit, match="the judge was given up.*HTTP 403"):
        run("--concurrency", 1)
    (result,) = json.loads((tmp_path / "results.json").read_text())["results"]
    assert result["ungraded"] + result["judged"] == 1 and result["ungraded"] > 0.5
    assert len((tmp_path / "rollouts.jsonl").read_text().splitlines()) == 4


def test_agreement_with_the_rules_where_they_decide(server, run, tmp_path):
    server.behave = lambda answer, _: (200, "same" if answer in ("an auto", "red") else "different")
    ((result,), _) = run("--data", place_with_numbers(tmp_path), "--judge_agreement", 3)
    report = json.loads((tmp_path / "results.json").read_text())["judge"]
    assert report["answers"] == 4  # an auto, red: beside 4 and 5
    counts = {key: value for key, value in report["agreement"].items() if value}
    assert counts == {"agree": 0.5, "both wrong": 1, "rules alone": 1}


def place_with_numbers(folder):
    rows = [{"question": f"how many {answer}", "answer": answer} for answer in ("4", "5")]
    path = folder / "numbers.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_agreement_counts_each_outcome():
    claims = [Claim("?", ("x",), (), str(i)) for i in range(9)]
    by_rules = dict(zip(claims, [True] * 4 + [False] * 5, strict=True))
    says = [True, True, True, False, True, False, False, False, None]

    class Known:
        def verdicts(self, asked):
            return {claim: says[int(claim.answer)] for claim in asked}

    assert agreement(by_rules, Known(), 9, seed=0) == {
        "agree": 6 / 8,
        "both right": 3,
        "both wrong": 3,
        "rules alone": 1,
        "judge alone": 1,
        "no verdict": 1,
    }
    drawn = [agreement(by_rules, Known(), 4, seed) for seed in range(9)]
    assert {sum(list(counts.values())[1:]) for counts in drawn} == {4}
    assert len({json.dumps(counts) for counts in drawn}) > 1
    assert math.isnan(agreement({}, Known(), 4, 0)["agree"])


def test_a_claim_names_all_that_matters():
    row = {"question": "which?", "choices": list(CHOICES), "answer": "B"}
    claim = claim_of(to_example(row), "the canine")
    text = claim.messages()[1]["content"]
    assert "which?" in text and "<image>" not in text
    assert "Options: (A) the cat (B) the dog\n\nReference: B\n\nAnswer: the canine" in text
    others = [claim_of(to_example(row | {"question": "why?"}), "the canine")]
    others += [claim_of(to_example(row | {"answer": "A"}), "the canine")]
    others += [claim_of(to_example(row), "the animal")]
    assert len({one.digest() for one in (claim, *others)}) == 4


# ----------------------------------------------------------------------------- arguments
@pytest.mark.parametrize(
    "flags, says",
    [
        ("--judge J", "--base_url is http"),
        ("--judge J --base_url http://h/v1 --request 3", "--request is a JSON object"),
        ("--base_url http://h/v1", "need --judge"),
        ("--judge_agreement 9", "need --judge"),
    ],
)
def test_arguments_that_make_no_sense(flags, says, place, capsys):  # noqa: F811
    with pytest.raises(SystemExit):
        arguments(place, *flags.split())
    assert says in capsys.readouterr().err


def test_two_runs_do_not_share_a_cache(server, tmp_path):
    (tmp_path / "d").touch()
    flags = ["--policy", "p", "--data", tmp_path / "d", "--judge", "J"]
    flags += ["--base_url", "http://h/v1", "--judge_cache", tmp_path / "c.jsonl"]
    args = parse(script.Args, map(str, flags))
    first = Grader(args)
    with first.api.file, pytest.raises(SystemExit, match="c.jsonl: another run .* --judge_cache"):
        Grader(args)


def test_the_arguments_of_the_api_have_a_heading_of_their_own(capsys):
    with pytest.raises(SystemExit):
        parse(script.Args, ["--help"])
    of_this_script, _, of_the_api = capsys.readouterr().out.partition("\nof the API:\n")
    assert "\n  --judge_agreement" in of_this_script and "\n  --policy" in of_this_script
    for name in ("base_url", "key_env", "request", "concurrency", "timeout", "retries"):
        assert f"\n  --{name} " in "\n" + of_the_api
        assert f"\n  --{name} " not in of_this_script
