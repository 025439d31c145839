"""
TRL's side of bench/step.py, run by an interpreter of its own: GRPOTrainer on the same checkpoint,
rows, batch and limits.

    python bench/trl_step.py '{"policy": .., "rows": [..], "prompts": 24, "group": 8, ..}'
"""

import json
import sys
import time
from pathlib import Path

import torch

try:
    import torchvision
except RuntimeError:
    # Built for another torch (CUDA's): transformers' processor needs its Python part alone.
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


class Clock(TrainerCallback):
    """When steps ended, and the mean length of their rollouts."""

    def __init__(self):
        self.ends = []
        self.lengths = []

    def on_step_end(self, *_, **__):
        self.ends.append(time.perf_counter())

    def on_log(self, args, state, control, logs=None, **__):
        for name, value in (logs or {}).items():
            if name == "completions/mean_length":
                self.lengths.append(value)

    def seconds(self):
        """Of each step but the first."""
        return [end - start for start, end in zip(self.ends, self.ends[1:], strict=False)]


def reward(prompts, completions, answer, **_):
    rewards = []
    for completion, gold in zip(completions, answer, strict=True):
        text = completion if isinstance(completion, str) else completion[0]["content"]
        rewards.append(score(text, gold)["reward"])
    return rewards


def main():
    job = json.loads(sys.argv[1])
    torch.set_num_threads(job["threads"])
    features = Features(
        {
            "prompt": [{"role": Value("string"), "content": Value("string")}],
            "answer": Value("string"),
            "images": Sequence(Image()),
        }
    )
    generation = None
    if job["banned"]:
        generation = {"suppress_tokens": job["banned"]}
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
        generation_kwargs=generation,
    )
    clock = Clock()
    trainer = GRPOTrainer(
        AutoModelForImageTextToText.from_pretrained(job["policy"], dtype=torch.float32),
        reward,
        config,
        Dataset.from_list(job["rows"], features=features),
        processing_class=AutoProcessor.from_pretrained(job["policy"]),
        callbacks=[clock],
    )
    trainer.train()
    result = {
        "seconds": clock.seconds(),
        "mean_length": clock.lengths[1:],
        "versions": {m.__name__: m.__version__ for m in (trl, transformers, torch, torchvision)},
    }
    print("RESULT " + json.dumps(result))


if __name__ == "__main__":
    main()
