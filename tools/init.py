"""
Random weights: a checkpoint folder from a Qwen3-VL configuration of any size.

    python tools/init.py --config runs/tiny.json --corpus data/tiny/words.json --out ckpt/init

Tokenizer and image processor are those beside the configuration. Where there are none, a word-level
tokenizer is trained on the corpus, and the image processor takes its sizes from the configuration.
The same seed gives the same weights.
"""

import argparse
import json
import sys
from pathlib import Path

import torch
import torch.nn as nn
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForImageTextToText, PreTrainedTokenizerFast
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from engine.files import copy_processor  # noqa: E402
from engine.rows import Rows  # noqa: E402

SPECIAL = [
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
]
UNKNOWN = "<unk>"
# Fields of a row that no model reads: their words are not in the vocabulary.
UNREAD = ("images", "image", "id", "role", "from", "style", "data_source", "extra_info")
# ChatML without role words: every token of a tiny model's prompt counts.
SHORT_CHAT = (
    "{% for m in messages %}"
    "{{ '<|im_start|>' if m.role != 'assistant' else '' }}"
    "{% if m.content is string %}{{ m.content }}"
    "{% else %}{% for c in m.content %}"
    "{{ '<|vision_start|><|image_pad|><|vision_end|>' if c.type == 'image' else c.text }}"
    "{% endfor %}{% endif %}"
    "{{ '<|im_end|>' }}"
    "{% endfor %}"
)


def init(config_file, out, corpus=(), seed=0) -> Path:
    """Write a checkpoint of random weights to the folder `out`, and return it.

    corpus: data files, read only where a tokenizer has to be trained. Raises FileNotFoundError
    where there is neither a tokenizer beside the configuration nor a corpus, and FileExistsError
    where `out` holds a checkpoint.
    """
    config_file = Path(config_file)
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    settings = json.loads(config_file.read_text())
    copy_processor(config_file.parent, out)
    if (out / "config.json").exists() and not (out / "config.json").samefile(config_file):
        raise FileExistsError(f"{out} holds a checkpoint already: remove it, or name another --out")
    if not (out / "tokenizer.json").exists():
        if not corpus:
            raise FileNotFoundError(
                f"no tokenizer.json beside {config_file}: name a --corpus to train a small one on"
            )
        tokenizer = train_tokenizer(corpus)
        tokenizer.save_pretrained(out)
        set_token_ids(settings, tokenizer)
    if not (out / "preprocessor_config.json").exists():
        image_processor(settings["vision_config"]).save_pretrained(out)
    (out / "config.json").write_text(json.dumps(settings, indent=2))

    torch.manual_seed(seed)
    hf = AutoModelForImageTextToText.from_config(AutoConfig.from_pretrained(out))
    # A setting of our own: with the small position embeddings that transformers draws, a tiny model
    # did not learn to see (measured: bench/NOTES.md).
    std = settings.get("vision_position_std")
    if std:
        nn.init.normal_(hf.model.visual.pos_embed.weight, std=std)
    hf.save_pretrained(out)
    return out


def train_tokenizer(corpus):
    """A word-level tokenizer over all texts of the files' rows; white space splits words."""
    words = set()
    for file in corpus:
        for row in Rows(file):
            for text in texts(row):
                words.update(text.replace("<image>", " ").split())
    tokens = [*SPECIAL, UNKNOWN, *sorted(words)]
    ids = {token: i for i, token in enumerate(tokens)}
    raw = Tokenizer(models.WordLevel(ids, unk_token=UNKNOWN))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=raw,
        unk_token=UNKNOWN,
        pad_token="<|endoftext|>",
        eos_token="<|im_end|>",
        additional_special_tokens=SPECIAL[1:],
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = SHORT_CHAT
    return tokenizer


def texts(value):
    """Yield every text inside a row, however deep, but those of fields that no model reads."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for field, inner in value.items():
            if field not in UNREAD:
                yield from texts(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from texts(inner)


def set_token_ids(settings: dict, tokenizer) -> None:
    """Write a trained tokenizer's size and special ids into the configuration."""
    ids = tokenizer.get_vocab()
    settings["image_token_id"] = ids["<|image_pad|>"]
    settings["video_token_id"] = ids["<|video_pad|>"]
    settings["vision_start_token_id"] = ids["<|vision_start|>"]
    settings["vision_end_token_id"] = ids["<|vision_end|>"]
    text = settings["text_config"]
    text["vocab_size"] = len(tokenizer)
    text["eos_token_id"] = ids["<|im_end|>"]
    text["bos_token_id"] = ids["<|endoftext|>"]
    text["pad_token_id"] = None


def image_processor(vision: dict) -> Qwen2VLImageProcessorPil:
    """An image processor for a vision_config; an image has 1 to 4096 visual tokens."""
    cell = vision["patch_size"] * vision["spatial_merge_size"]  # a visual token's side in pixels
    return Qwen2VLImageProcessorPil(
        patch_size=vision["patch_size"],
        merge_size=vision["spatial_merge_size"],
        temporal_patch_size=vision["temporal_patch_size"],
        image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
        size={"shortest_edge": cell**2, "longest_edge": 4096 * cell**2},  # areas, despite the names
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", required=True, help="config.json of a Qwen3-VL of any size")
    parser.add_argument(
        "--corpus", nargs="*", default=[], help="data files to train a small tokenizer on"
    )
    parser.add_argument("--out", required=True, help="folder for the checkpoint")
    parser.add_argument("--seed", type=int, default=0, help="of the weights")
    args = parser.parse_args()
    print(init(args.config, args.out, args.corpus, args.seed))
