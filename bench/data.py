"""
Claim: the device does not wait for data where a thread keeps up, and rows are encoded no slower
than by the processor that others use.

    python bench/data.py ../shared/data                            # the share of a step that waits
    python bench/data.py ../shared/data --device_ms 30             # the same beside a faster device
    python bench/data.py ../shared/data --trl /tmp/trl/bin/python  # rows per second of the encoder,
                                                                   # against TRL's collator

Real images at the size of their files (PuzzleVQA, MATH-Vision), Qwen3-VL's own tokenizer, template
and image processor, and a Qwen3-VL with small random dimensions, whose head over 151,936 ids makes
a step slow all the same. So --device_ms puts a wait in the place of each row's computing: 30 ms are
what a 4B model takes for 500 tokens, forward and backward, at 400 TFLOP/s. Waiting is the time that
sft.py spends in `data.share`; the first step has nothing read ahead and does not count. One torch
thread: the main thread computes on one core, so that the others have one.

TRL runs in an environment of its own (trl, accelerate, datasets, torchvision) on the same rows,
with DataCollatorForVisionLanguageModeling, one row a call and eight; ours makes a row's ids, mask,
patches and positions. Both are timed by their core's seconds: what else the machine does counts for
neither.
"""

import argparse
import contextlib
import io
import json
import shutil
import subprocess
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import torch
from measure import ROOT, median, report

import sft
from data import open_encoder, read
from engine.rows import Data
from tools.init import init

RESPONSE = "<caption>\n- a drawing\n</caption>\n<think>\n{}\n</think>\n<answer>\n{}\n</answer>"
WORKERS = (0, 2, 4)


# ----------------------------------------------------------------------------- a model, and rows
def write_model(shared, folder):
    """A Qwen3-VL of small dimensions with the real processor files -> its checkpoint's folder."""
    source = shared / "qwen3vl"
    config_folder = folder / "config"
    config_folder.mkdir()
    for name in ("tokenizer.json", "vocab.json", "merges.txt"):
        if (source / "tokenizer" / name).exists():
            shutil.copy(source / "tokenizer" / name, config_folder)
    for name in ("preprocessor_config.json", "video_preprocessor_config.json"):
        shutil.copy(source / "30B-A3B-Thinking" / name, config_folder)
    template = source / "chat_templates/qwen3vl_instruct.jinja"
    shutil.copy(template, config_folder / "chat_template.jinja")
    settings = json.loads((source / "30B-A3B-Thinking/tokenizer_config.json").read_text())
    settings.pop("chat_template", None)
    (config_folder / "tokenizer_config.json").write_text(json.dumps(settings))
    config = json.loads((source / "2B/config.json").read_text())
    config["text_config"] |= {
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 16,
        "intermediate_size": 32,
    }
    config["text_config"]["rope_scaling"]["mrope_section"] = [4, 2, 2]
    config["vision_config"] |= {
        "hidden_size": 32,
        "depth": 2,
        "num_heads": 2,
        "intermediate_size": 64,
        "out_hidden_size": 16,
        "deepstack_visual_indexes": [0, 1],
    }
    (config_folder / "config.json").write_text(json.dumps(config))
    return str(init(config_folder / "config.json", folder / "model"))


def write_rows(shared, folder):
    """{name: JSONL file of conversations with images}: PuzzleVQA's rows as they are; MATH-Vision's
    questions, whose answers are put into a response."""
    puzzles = json.loads((shared / "puzzlevqa/sft.json").read_text())
    for row in puzzles:
        row["images"] = [str(shared / "puzzlevqa" / path) for path in row["images"]]
    problems = []
    for line in (shared / "mathvision/testmini.jsonl").read_text().splitlines():
        row = json.loads(line)
        question = row["question"].replace("<image1>", "").strip()
        if "<image" in question:
            continue  # it names several pictures in one
        response = RESPONSE.format(row["solution"] or question, row["answer"])
        turns = [("user", f"<image>\n{question}"), ("assistant", response)]
        messages = [{"role": role, "content": content} for role, content in turns]
        image = str(shared / "mathvision" / row["image"])
        problems.append({"messages": messages, "images": [image]})
    files = {}
    for name, rows in {"PuzzleVQA": puzzles, "MATH-Vision": problems}.items():
        files[name] = folder / f"{name}.jsonl"
        files[name].write_text("".join(json.dumps(row) + "\n" for row in rows))
    return files


# ----------------------------------------------------------------------------- waiting for data
class Watch:
    """When each step of a run asked for its rows, and when it had them."""

    def __init__(self):
        self.asked = []
        self.had = []

    def __enter__(self):
        self.plain = Data.share
        watch = self

        def share(data, *args):
            watch.asked.append(time.perf_counter())
            rows = watch.plain(data, *args)
            watch.had.append(time.perf_counter())
            return rows

        Data.share = share
        return self

    def __exit__(self, *_):
        Data.share = self.plain

    def figures(self):
        """(share of the steps' time that is waiting, seconds of a step), without the first step and
        the last one, whose end is not seen."""
        steps = self.asked[-1] - self.asked[1]
        pairs = zip(self.asked[1:-1], self.had[1:-1], strict=True)
        waiting = sum(had - asked for asked, had in pairs)
        return waiting / steps, steps / (len(self.asked) - 2)


def train(policy, file, workers, folder, flags):
    """sft.py itself: the small model's steps, on the main thread's core."""
    out = folder / "run"
    args = sft.Args(
        policy=policy,
        data=str(file),
        image_root=str(flags.shared),
        out=str(out),
        steps=flags.steps + 2,
        batch=flags.batch,
        workers=workers,
        device="cpu",
        sample_every=0,
        save_every=0,
    )
    shutil.rmtree(out, ignore_errors=True)
    with Watch() as watch, contextlib.redirect_stdout(io.StringIO()):
        sft.main(args)
    return watch.figures()


def stand_in(policy, file, workers, folder, flags):
    """The same rows, where each step is `flags.device_ms` of waiting for each of its rows: a device
    that computes by itself, and takes no core of the CPU."""
    encoder = open_encoder(policy, max_prompt_tokens=8192)
    data = read(file, "sft", str(flags.shared), workers=workers)
    order = data.order(seed=0)
    alone = SimpleNamespace(rank=0, world=1)
    with Watch() as watch:
        for _ in range(flags.steps + 2):
            rows = data.share(order, flags.batch, encoder.conversation, alone)
            time.sleep(flags.device_ms / 1000 * len(rows))
    return watch.figures()


def waiting(run, policy, files, folder, flags):
    """Of each file and number of threads, in turn: {waiting: median, lowest, highest share of a
    step; step: seconds}."""
    found = {}
    for name, file in files.items():
        runs = {workers: [] for workers in WORKERS}
        for _ in range(flags.repeat):
            for workers in WORKERS:
                runs[workers].append(run(policy, file, workers, folder, flags))
        found[name] = {}
        for workers, figures in runs.items():
            shares = [share for share, _ in figures]
            found[name][f"{workers} workers"] = {
                "waiting": [median(shares), min(shares), max(shares)],
                "step": median([seconds for _, seconds in figures]),
            }
    return found


# ----------------------------------------------------------------------------- the encoder alone
def rates(policy, files, flags):
    """Rows that the encoder makes in a second of one core, and TRL's collator, in turn."""
    encoder = open_encoder(policy, max_prompt_tokens=8192)
    found = {}
    for name, file in files.items():
        data = read(file, "sft", str(flags.shared))
        rows = range(min(flags.rows, len(data)))
        ours = lambda data=data, rows=rows: data.fetch(rows, encoder.conversation)  # noqa: E731
        runs = {"ours": [], "TRL, a row a call": [], "TRL, 8 rows a call": []}
        tokens = sum(len(prompt.ids) for prompt, _ in ours())
        with TRL(flags.trl, policy, file, len(rows)) as trl:
            for _ in range(flags.repeat + 1):
                begin = time.process_time()
                ours()
                runs["ours"].append(time.process_time() - begin)
                for batch, key in ((1, "TRL, a row a call"), (8, "TRL, 8 rows a call")):
                    answer = trl.run(batch)
                    assert batch > 1 or answer["tokens"] == tokens, (answer, tokens)
                    runs[key].append(answer["seconds"])
        per_second = {}
        for key, seconds in runs.items():
            each = [len(rows) / s for s in seconds[1:]]  # the first is a warm-up
            per_second[key] = [median(each), min(each), max(each)]
        best = max(per_second[key][0] for key in per_second if key != "ours")
        found[name] = {"ratio": per_second["ours"][0] / best, "rows_per_second": per_second}
        found[name]["tokens_per_row"] = tokens / len(rows)
        found[name]["versions"] = answer["versions"]
    return found


class TRL:
    """TRL's collator in a process of its own: see bench/trl_collator.py."""

    def __init__(self, python, policy, file, rows):
        self.command = [python, str(ROOT / "bench/trl_collator.py"), policy, str(file), str(rows)]

    def __enter__(self):
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(self.command, stdin=pipe, stdout=pipe, text=True)
        return self

    def __exit__(self, *_):
        self.process.stdin.close()
        self.process.wait()

    def run(self, batch):
        print(batch, file=self.process.stdin, flush=True)
        for line in self.process.stdout:
            if line.startswith("RESULT "):
                return json.loads(line.removeprefix("RESULT "))
        raise RuntimeError("TRL's process ended")


def sizes_of(flags):
    names = ("device_ms", "steps", "batch", "repeat")
    return {name: getattr(flags, name) for name in names}


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("shared", type=Path, help="folder of puzzlevqa, mathvision and qwen3vl")
    parser.add_argument("--trl", help="the Python of an environment with TRL: encoders alone")
    parser.add_argument(
        "--device_ms", type=float, default=0, help="of each row; 0: a small model computes"
    )
    parser.add_argument("--steps", type=int, default=6, help="of a run")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rows", type=int, default=128, help="of the encoders alone")
    parser.add_argument("--repeat", type=int, default=5)
    flags = parser.parse_args()
    flags.shared = flags.shared.resolve()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        policy = write_model(flags.shared, folder)
        files = write_rows(flags.shared, folder)
        if flags.trl:
            found = rates(policy, files, flags)
            report("data, the encoder alone", found=found, rows=flags.rows, repeat=flags.repeat)
        else:
            run = stand_in if flags.device_ms else train
            found = waiting(run, policy, files, folder, flags)
            report("data, waiting", found=found, **sizes_of(flags))


if __name__ == "__main__":
    main()
