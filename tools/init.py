"""
Random weights: a checkpoint folder from a Qwen3-VL configuration of any size.

    python init.py --config runs/tiny.json --corpus data/tiny/base.jsonl --out ckpt/init

Tokenizer and image processor are those beside the configuration; where there are none, a word-level tokenizer is trained
on the corpus, and the image processor takes its sizes from the configuration.
"""

import argparse
import json
from pathlib import Path

import torch
import torch.nn as nn
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForImageTextToText, PreTrainedTokenizerFast
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from data import Rows
from engine.files import copy_processor

SPECIAL = [
    f"<|{x}|>"
    for x in (
        "endoftext",
        "im_start",
        "im_end",
        "vision_start",
        "vision_end",
        "image_pad",
        "video_pad",
    )
]
UNREAD = (
    "images",
    "image",
    "id",
    "role",
    "from",
    "style",
    "data_source",
    "extra_info",
)  # fields that no model reads
SHORT_CHAT = (  # ChatML without role words: every token of a tiny model's prompt counts
    "{% for m in messages %}{{ '<|im_start|>' if m.role != 'assistant' else '' }}{% if m.content is string %}"
    "{{ m.content }}{% else %}{% for c in m.content %}{{ '<|vision_start|><|image_pad|><|vision_end|>' if c.type == "
    "'image' else c.text }}{% endfor %}{% endif %}{{ '<|im_end|>' }}{% endfor %}"
)


def init(config_file, out, corpus=(), seed=0) -> Path:
    """Write a checkpoint of random weights to the folder `out`. corpus: data files, read only to train a tokenizer."""
    config_file, out = Path(config_file), Path(out)
    out.mkdir(parents=True, exist_ok=True)
    vision = (settings := json.loads(config_file.read_text()))["vision_config"]
    copy_processor(config_file.parent, out)
    if not (out / "tokenizer.json").exists():
        if not corpus:
            raise FileNotFoundError(
                f"no tokenizer.json beside {config_file}: name a --corpus to train a small one on"
            )
        tokenizer = train_tokenizer(corpus)
        tokenizer.save_pretrained(out)
        ids = dict(zip(SPECIAL, tokenizer.convert_tokens_to_ids(SPECIAL), strict=True))
        settings |= {
            "image_token_id": ids["<|image_pad|>"],
            "video_token_id": ids["<|video_pad|>"],
            "vision_start_token_id": ids["<|vision_start|>"],
            "vision_end_token_id": ids["<|vision_end|>"],
        }
        settings["text_config"] |= {
            "vocab_size": len(tokenizer),
            "eos_token_id": ids["<|im_end|>"],
            "bos_token_id": ids["<|endoftext|>"],
            "pad_token_id": None,
        }
    if not (out / "preprocessor_config.json").exists():
        cell = vision["patch_size"] * vision["spatial_merge_size"]
        Qwen2VLImageProcessorPil(
            patch_size=vision["patch_size"],
            merge_size=vision["spatial_merge_size"],
            temporal_patch_size=vision["temporal_patch_size"],
            image_mean=[0.5] * 3,
            image_std=[0.5] * 3,
            size={"shortest_edge": cell**2, "longest_edge": 4096 * cell**2},
        ).save_pretrained(out)
    (out / "config.json").write_text(json.dumps(settings, indent=2))
    torch.manual_seed(seed)
    hf = AutoModelForImageTextToText.from_config(AutoConfig.from_pretrained(out))
    if std := settings.get("vision_position_std"):
        nn.init.normal_(hf.model.visual.pos_embed.weight, std=std)
    hf.save_pretrained(out)
    return out


def train_tokenizer(corpus):
    """A word-level tokenizer over every text of the rows of the files in `corpus` (white space splits words)."""

    def texts(value):
        if isinstance(value, str):
            yield value
        elif isinstance(value, dict | list):
            fields = (
                [v for k, v in value.items() if k not in UNREAD]
                if isinstance(value, dict)
                else value
            )
            for part in fields:
                yield from texts(part)

    words = sorted(
        {
            w
            for f in corpus
            for row in Rows(f)
            for t in texts(row)
            for w in t.replace("<image>", " ").split()
        }
    )
    vocabulary = {w: i for i, w in enumerate([*SPECIAL, "<unk>", *words])}
    raw = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=raw,
        unk_token="<unk>",
        pad_token="<|endoftext|>",
        eos_token="<|im_end|>",
        additional_special_tokens=SPECIAL[1:],
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = SHORT_CHAT
    return tokenizer


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", required=True, help="config.json of a Qwen3-VL of any size")
    parser.add_argument(
        "--corpus", nargs="*", default=[], help="data files to train a small tokenizer on"
    )
    parser.add_argument("--out", required=True)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    print(init(args.config, args.out, args.corpus, args.seed))
