"""
LoRA in any stage: adapters are trained in place of all weights, and what is saved is merged, so
that every stage and every server opens it.

    pip install peft accelerate
    python docs/recipes/lora.py align --policy ckpt/sft --data data/tiny/align.jsonl --out ckpt/lora

The first argument is the stage, the others are that stage's own; `--resume` works too. In `align`
the discriminator's attention gets adapters as well; its experts, router and head train whole.
"""

import importlib
import sys
from pathlib import Path

try:
    from peft import LoraConfig, inject_adapter_in_model
except ImportError as error:
    sys.exit(f"LoRA is peft's: pip install peft accelerate ({error})")

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import model  # noqa: E402
from engine.arguments import parse  # noqa: E402

CONFIG = LoraConfig(r=16, lora_alpha=32, target_modules=r".*language_model.*_proj")

load = model.load
full_state = model.full_state


def load_with_adapters(*args, **options):
    """As model.load, with adapters, the only weights that are still trained."""
    policy = load(*args, **options)
    inject_adapter_in_model(CONFIG, policy.hf)
    return policy


def merged_state(module):
    """As model.full_state, each adapter added to the weight that it is for, under plain names.

    ValueError for adapters that are no plain LoRA on linear layers.
    """
    state = full_state(module)
    merged = {}
    for key, tensor in state.items():
        if ".lora_" not in key:
            merged[key.replace(".base_layer.", ".")] = tensor
    for key, down in state.items():
        if ".lora_" not in key or ".lora_B." in key:
            continue
        name, found, adapter = key.removesuffix(".weight").partition(".lora_A.")
        if not found:
            raise ValueError(f"{key}: only adapters of plain LoRA on linear layers can be merged")
        up = state[key.replace(".lora_A.", ".lora_B.")]
        scaling = module.get_submodule(name).scaling[adapter]
        merged[f"{name}.weight"] = merged[f"{name}.weight"] + scaling * up @ down
    return merged


if __name__ == "__main__":
    model.load = load_with_adapters  # before the stage is imported, which takes them by name
    model.full_state = merged_state
    stage = importlib.import_module(sys.argv.pop(1))
    stage.main(parse(stage.Args))
