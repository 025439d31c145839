"""
Other projects' tools on what a run leaves: each opens it, uses it, and checks what came out. Prints
one line: what ran, with which versions. bench/consumers.sh makes the environments and calls it.

    python bench/consumers.py polars out/tiny-0/align

`run` is a run folder of align.py or rlvr.py, with last/, log.jsonl and rollouts.jsonl, of which the
questions and images are taken too.
"""

import argparse
import base64
import contextlib
import io
import json
import re
import subprocess
import sys
import time
import urllib.request
from importlib.metadata import version
from pathlib import Path

PARTS = re.compile(r"\s*<caption>.*</caption>\s*<think>.*</think>\s*<answer>.*</answer>\s*", re.S)


def read(path):
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def expected(run):
    """(rows of log.jsonl, its losses, rows of rollouts.jsonl), as Python's own reader has them."""
    log = read(run / "log.jsonl")
    losses = [record["loss"] for record in log if record.get("loss") is not None]
    return len(log), losses, len(read(run / "rollouts.jsonl"))


def check(found, run):
    """found: the same of another reader."""
    rows, losses, groups = expected(run)
    assert found[0] == rows and found[2] == groups, f"{found[0]}, {found[2]} rows"
    others = [loss for loss in found[1] if loss is not None and loss == loss]
    assert len(others) == len(losses), f"{len(others)} losses, not {len(losses)}"
    assert all(abs(a - b) < 1e-9 for a, b in zip(others, losses, strict=True))
    return f"{rows} rows of log.jsonl, {groups} groups of rollouts.jsonl"


# ----------------------------------------------------------------------------- readers
def datasets(run):
    from datasets import load_dataset

    log, groups = (
        load_dataset("json", data_files=str(run / name), split="train")
        for name in ("log.jsonl", "rollouts.jsonl")
    )
    return check((len(log), log["loss"], len(groups)), run)


def pandas(run):
    import pandas

    log = pandas.read_json(run / "log.jsonl", lines=True)
    groups = pandas.read_json(run / "rollouts.jsonl", lines=True)
    return check((len(log), log["loss"].tolist(), len(groups)), run)


def duckdb(run):
    import duckdb

    losses = duckdb.sql(f"select loss from '{run}/log.jsonl'").fetchall()
    ((groups,),) = duckdb.sql(f"select count(*) from '{run}/rollouts.jsonl'").fetchall()
    texts = duckdb.sql(f"select unnest(rollouts).text from '{run}/rollouts.jsonl'").fetchall()
    assert len(texts) == sum(len(group["rollouts"]) for group in read(run / "rollouts.jsonl"))
    return check((len(losses), [loss for (loss,) in losses], groups), run)


def polars(run):
    import polars

    log = polars.read_ndjson(run / "log.jsonl", infer_schema_length=None)
    groups = polars.read_ndjson(run / "rollouts.jsonl", infer_schema_length=None)
    return check((len(log), log["loss"].to_list(), len(groups)), run)


def pyarrow(run):
    from pyarrow import json as reader

    log = reader.read_json(run / "log.jsonl")
    groups = reader.read_json(run / "rollouts.jsonl")
    return check((len(log), log["loss"].to_pylist(), len(groups)), run)


# ----------------------------------------------------------------------------- models
def problems(run):
    """Question, answer and image of the groups in rollouts.jsonl."""
    from PIL import Image

    found = []
    for group in read(run / "rollouts.jsonl"):
        raw = base64.b64decode(group["images"][0].split(",")[1])
        question = group["question"].replace("<image>", "").strip()
        image = Image.open(io.BytesIO(raw)).convert("RGB")
        found.append((question, group["answer"], image, group["images"][0]))
    return found


def report(texts):
    formed = sum(PARTS.fullmatch(text) is not None for text in texts)
    assert any(text.strip() for text in texts), "nothing was generated"
    return f"{len(texts)} answers, {formed} of them in the three parts"


def pipeline(run):
    """transformers' own pipeline, with nothing of this repository."""
    from transformers import pipeline as make

    pipe = make("image-text-to-text", model=str(run / "last"), device="cpu")
    texts = []
    for question, _, image, _ in problems(run):
        content = [{"type": "image", "image": image}, {"type": "text", "text": question}]
        turns = [{"role": "user", "content": content}]
        (answer,) = pipe(text=turns, max_new_tokens=64, return_full_text=False)
        texts.append(answer["generated_text"])
    return report(texts)


def ask(client, model, content):
    answer = client.chat.completions.create(
        model=model, messages=[{"role": "user", "content": content}], max_tokens=64
    )
    return answer.choices[0].message.content


def serve(run):
    """`transformers serve`, asked by the openai client as any server is. Where its torchvision can
    decode no image (beside a torch for CPUs), it is asked without, and the line says so."""
    from openai import InternalServerError, OpenAI

    command = [Path(sys.executable).with_name("transformers"), "serve", "--port", "8765"]
    server = subprocess.Popen([*command, "--device", "cpu"], stdout=sys.stderr)
    try:
        for _ in range(120):
            try:
                urllib.request.urlopen("http://127.0.0.1:8765/health", timeout=1)
                break
            except OSError:
                time.sleep(1)
        client = OpenAI(base_url="http://127.0.0.1:8765/v1", api_key="none")
        model = str((run / "last").resolve())
        note = ""
        texts = []
        for question, _, _, url in problems(run):
            image = [{"type": "image_url", "image_url": {"url": url}}]
            text = [{"type": "text", "text": question}]
            try:
                texts.append(ask(client, model, image + text))
            except InternalServerError:
                note = ", asked without images: the server cannot decode them here"
                texts.append(ask(client, model, text))
        return report(texts) + note
    finally:
        server.terminate()
        server.wait()


def trl(run):
    """Two steps of TRL's GRPO from the checkpoint; its reward: is the answer right?"""
    import torch
    from datasets import Dataset
    from transformers import AutoModelForImageTextToText, AutoProcessor
    from trl import GRPOConfig, GRPOTrainer

    rows = []
    for question, answer, image, _ in problems(run):
        turns = [{"role": "user", "content": question}]
        rows.append({"prompt": turns, "image": image, "answer": answer})

    def reward(completions, answer, **_):
        texts = [turns[-1]["content"] for turns in completions]
        return [float(f" {right} " in text) for text, right in zip(texts, answer, strict=True)]

    config = GRPOConfig(
        output_dir="/tmp/prism-consumers/trl",
        max_steps=2,
        per_device_train_batch_size=4,
        num_generations=4,
        max_completion_length=32,
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        save_strategy="no",
        report_to=[],
        logging_steps=1,
        disable_tqdm=True,
    )
    trainer = GRPOTrainer(
        AutoModelForImageTextToText.from_pretrained(run / "last", dtype=torch.float32),
        reward,
        config,
        Dataset.from_list(rows),
        processing_class=AutoProcessor.from_pretrained(run / "last"),
    )
    with contextlib.redirect_stdout(sys.stderr):  # its table of each step
        trainer.train()
    losses = [record["loss"] for record in trainer.state.log_history if "loss" in record]
    assert len(losses) == 2
    return f"2 updates, losses {losses}"


CONSUMERS = {  # and the packages whose versions are told
    datasets: ("datasets",),
    pandas: ("pandas",),
    duckdb: ("duckdb",),
    polars: ("polars",),
    pyarrow: ("pyarrow",),
    pipeline: ("transformers", "torch", "torchvision"),
    serve: ("transformers", "openai"),
    trl: ("trl", "transformers", "torch"),
}


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    by_name = {consumer.__name__: consumer for consumer in CONSUMERS}
    parser.add_argument("consumer", choices=by_name)
    parser.add_argument("run", type=Path)
    args = parser.parse_args()
    consumer = by_name[args.consumer]
    versions = " ".join(f"{package} {version(package)}" for package in CONSUMERS[consumer])
    print(f"{args.consumer} ({versions}): {consumer(args.run)}", flush=True)


if __name__ == "__main__":
    main()
