"""
Claim: with linear attention too a group in one pack costs a fraction of one row per rollout: the
prompt's recurrence is run once, and its children start from its state.

    python bench/states.py                     # a prompt of 512 tokens, 16 rollouts of 64
    python bench/states.py --discriminator     # the spans of a group and of its reference
    python bench/states.py --device cuda       # the 4B's text sizes, bfloat16

A Qwen3.5 with random weights: three layers of four are gated delta nets. Measured are forward and
backward, as in bench/packs.py.
"""

import argparse

import torch
from measure import SIZES, clock, device_here, median, peak, prompt, report
from packs import DiscriminatorCase, PolicyCase, check, image_side
from transformers import Qwen3_5Config, Qwen3_5ForConditionalGeneration


def model(size, layers, device):
    """A Qwen3.5 with the text and vision sizes of a shape in measure.SIZES."""
    text, vision = SIZES[size]
    width = text["head_dim"]
    sixth = width // 6
    rope = {
        "rope_type": "default",
        "rope_theta": 1e7,
        "partial_rotary_factor": 1.0,
        "mrope_section": [width // 2 - 2 * sixth, sixth, sixth],
        "mrope_interleaved": True,
    }
    vocabulary = text["vocab_size"]
    linear = {
        "linear_num_key_heads": text["num_attention_heads"] // 2,
        "linear_num_value_heads": text["num_attention_heads"],
        "linear_key_head_dim": width,
        "linear_value_head_dim": width,
    }
    config = Qwen3_5Config(
        text_config={
            **text,
            **linear,
            "num_hidden_layers": layers,
            "rope_parameters": rope,
            "eos_token_id": 2,
            "pad_token_id": None,
            "tie_word_embeddings": True,
        },
        vision_config={
            **{name: value for name, value in vision.items() if name != "deepstack_visual_indexes"},
            "out_hidden_size": text["hidden_size"],
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
        },
        image_token_id=vocabulary - 1,
        video_token_id=vocabulary - 2,
        vision_start_token_id=vocabulary - 3,
        vision_end_token_id=vocabulary - 4,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    dtype = torch.bfloat16 if torch.device(device).type == "cuda" else torch.float32
    with torch.device(device):
        hf = Qwen3_5ForConditionalGeneration._from_config(config, dtype=dtype)
    hf.model.blank_image = prompt(hf, 1, 2).images
    return hf


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--device", type=device_here, default="cpu")
    parser.add_argument("--discriminator", action="store_true")
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--prompt", type=int, default=512, help="tokens, of an image and of text")
    parser.add_argument("--rollouts", type=int, default=16)
    parser.add_argument("--response", type=int, default=64, help="mean length, tokens")
    parser.add_argument("--repeat", type=int, default=5)
    args = parser.parse_args()
    cuda = args.device != "cpu"
    hf = model("4B" if cuda else "small", args.layers, args.device).train()
    side = image_side(0.75 * args.prompt)  # three quarters of the prompt
    root = prompt(hf, args.prompt - (side // 2) ** 2 - 2, side)
    case_of = DiscriminatorCase if args.discriminator else PolicyCase
    case = case_of(hf, root, args.rollouts, args.response, args.device)
    contenders = case.contenders()
    check(contenders, tolerance=0.2 if cuda else 5e-3)
    runs = {name: contender.step for name, contender in contenders.items()}
    found = clock(runs, args.device, args.repeat)
    seconds = {name: median(values) for name, values in found.items()}
    memory = {}
    for name, contender in contenders.items():
        contender.forget()
        memory[name] = peak(contender.step, args.device)
    report(
        "states, discriminator" if args.discriminator else "states, policy",
        ratio={name: value / seconds["packed"] for name, value in seconds.items()},
        ratio_memory={name: value / memory["packed"] for name, value in memory.items()},
        seconds=seconds,
        memory=memory,
        tokens={"prompt": len(root.ids), "others": [len(text) for text in case.texts]},
        layers=hf.config.text_config.layer_types,
        parameters=sum(p.numel() for p in hf.parameters()),
        device=args.device,
    )


if __name__ == "__main__":
    main()
