"""
TRL's side of bench/data.py, run by an interpreter of its own: the collator of its SFTTrainer on the
same rows. For each line of standard input, a number of rows per call, it answers with the seconds
of a core that all rows took and the tokens that they are.

    python bench/trl_collator.py CHECKPOINT ROWS.jsonl NUMBER
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
from PIL import Image
from transformers import AutoProcessor
from trl.trainer.sft_trainer import DataCollatorForVisionLanguageModeling


def opened(row):
    """A row as a data set hands it over: its turns, and its images as PIL opens them."""
    messages = []
    for turn in row["messages"]:
        messages.append(turn | {"content": turn["content"].replace("<image>\n", "")})
    images = [Image.open(path).convert("RGB") for path in row["images"]]
    return {"messages": messages, "images": images}


def main():
    torch.set_num_threads(1)
    policy, file, number = sys.argv[1:]
    rows = [json.loads(line) for line in Path(file).read_text().splitlines()[: int(number)]]
    collator = DataCollatorForVisionLanguageModeling(AutoProcessor.from_pretrained(policy))
    versions = {m.__name__: m.__version__ for m in (trl, transformers, torch, torchvision)}
    for line in sys.stdin:
        batch = int(line)
        tokens = 0
        begin = time.process_time()
        for start in range(0, len(rows), batch):
            made = collator([opened(row) for row in rows[start : start + batch]])
            tokens += int(made["attention_mask"].sum())
        seconds = time.process_time() - begin
        answer = {"seconds": seconds, "tokens": tokens, "versions": versions}
        print("RESULT " + json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
