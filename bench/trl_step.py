"""
TRL's side of bench/step.py, run by an interpreter of its own: GRPOTrainer on the same checkpoint, rows, batch and limits.

    python bench/trl_step.py '{"policy": .., "rows": [..], "images": [..], "prompts": 24, "group": 8, ..}'
"""

import json
import sys
import time
from pathlib import Path

import torch

try:
    import torchvision
except (
    RuntimeError
):  # built for another torch (CUDA's): transformers' processor needs its Python part alone
    ops = torch.library.Library("torchvision", "DEF")
    for name in ("nms", "qnms"):
        ops.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    for name in [name for name in sys.modules if name.startswith("torchvision")]:
        del sys.modules[name]
    import torchvision

import transformers
import trl
from datasets import Dataset, Features, Image, Sequence, Value
from transformers import AutoModelForImageTextToText, AutoProcessor, TrainerCallback
from trl import GRPOConfig, GRPOTrainer

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from rewards import score  # noqa: E402

job = json.loads(sys.argv[1])
torch.set_num_threads(job["threads"])
clock, lengths = [], []


class Clock(TrainerCallback):
    def on_step_end(self, *_, **__):
        clock.append(time.perf_counter())

    def on_log(self, args, state, control, logs=None, **__):
        lengths.extend(v for k, v in (logs or {}).items() if k == "completions/mean_length")


def reward(prompts, completions, answer, **_):
    texts = [c if isinstance(c, str) else c[0]["content"] for c in completions]
    return [score(text, gold)["reward"] for text, gold in zip(texts, answer, strict=True)]


features = Features(
    {
        "prompt": [{"role": Value("string"), "content": Value("string")}],
        "answer": Value("string"),
        "images": Sequence(Image()),
    }
)
rows = Dataset.from_list(job["rows"], features=features)
config = GRPOConfig(
    output_dir=job["out"],
    max_steps=job["steps"],
    per_device_train_batch_size=job["batch"],
    num_generations=job["group"],
    gradient_accumulation_steps=job["prompts"] * job["group"] // job["batch"],
    max_completion_length=job["most"],
    learning_rate=job["lr"],
    temperature=1.0,
    beta=0.0,
    loss_type="dapo",
    use_cpu=job["device"] == "cpu",
    bf16=job["device"] != "cpu",
    gradient_checkpointing=False,
    save_strategy="no",
    report_to=[],
    logging_steps=1,
    disable_tqdm=True,
    generation_kwargs={"suppress_tokens": job["banned"]} if job["banned"] else None,
)
policy = AutoModelForImageTextToText.from_pretrained(job["policy"], dtype=torch.float32)
trainer = GRPOTrainer(
    policy,
    reward,
    config,
    rows,
    processing_class=AutoProcessor.from_pretrained(job["policy"]),
    callbacks=[Clock()],
)
trainer.train()
seconds = [b - a for a, b in zip(clock, clock[1:], strict=False)]
versions = {m.__name__: m.__version__ for m in (trl, transformers, torch, torchvision)}
print(
    "RESULT " + json.dumps({"seconds": seconds, "mean_length": lengths[1:], "versions": versions})
)
