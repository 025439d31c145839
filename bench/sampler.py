"""
Claim: rollouts come several times faster than from transformers' generate, same checkpoint, same rows, ragged lengths.

    python bench/sampler.py --policy ckpt/base-tiny --data data/tiny/rl.jsonl      # on a CPU, after `bash runs/base.sh`
    python bench/sampler.py --random            # a larger model of random weights, lengths as ragged as a language model's
    python bench/sampler.py --device cuda       # the 4B's shape, 8 prompts with an image x 16, lengths around 300
    python bench/sampler.py --growth            # tokens per second at 4 to 64 rows and 256 to 4096 tokens, both devices
"""

import argparse

import torch
from measure import clock, median, model, prompt, report, seconds_of

from data import read
from engine.packs import adopt
from engine.sampler import generate
from model import load


def by_transformers(hf, prompts, n, max_tokens, eos, banned, pad):
    """What a user would write: generate over left-padded prompts, n samples of each at temperature 1."""
    longest = max(len(p.ids) for p in prompts)
    ids = torch.stack(
        [torch.cat([torch.full((longest - len(p.ids),), pad), p.ids]) for p in prompts]
    ).to(hf.device)
    mask = torch.stack(
        [(torch.arange(longest) >= longest - len(p.ids)).long() for p in prompts]
    ).to(hf.device)
    out = hf.generate(
        input_ids=ids,
        attention_mask=mask,
        mm_token_type_ids=(ids == hf.config.image_token_id).int(),
        pixel_values=torch.cat([p.pixel_values for p in prompts]).to(hf.device, hf.dtype),
        image_grid_thw=torch.cat([p.grid_thw for p in prompts]).to(hf.device),
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        num_return_sequences=n,
        max_new_tokens=max_tokens,
        eos_token_id=list(eos),
        pad_token_id=pad,
        suppress_tokens=list(banned) or None,
    )[:, longest:]
    ended = torch.isin(out, torch.tensor(eos, device=out.device))
    lengths = torch.where(ended.any(1), ended.int().argmax(1) + 1, out.shape[1])
    return lengths.tolist()


def compare(args):
    cuda = args.device != "cpu"
    if cuda or args.random:
        size, mean = ("4B", 300) if cuda else ("small", 64)
        plain, ours = model(size, args.device), model(size, args.device)
        prompts = [prompt(plain, 64, 32 if cuda else 16, seed) for seed in range(8)]
        vocabulary = plain.config.text_config.vocab_size - 8
        # Random weights end nowhere: of V about equally likely ids, V / mean are taken for end tokens.
        eos, banned, pad, most = tuple(range(3, 3 + vocabulary // mean)), (), 0, 1024
        adopt(ours.model)
    else:
        policy = load(args.policy)
        from transformers import AutoModelForImageTextToText

        ours, encoder = policy.hf, policy.encoder
        plain = AutoModelForImageTextToText.from_pretrained(policy.source, dtype=torch.float32)
        prompts = read(args.data, "rl").fetch(range(8), encoder.prompt)
        eos, banned, pad, most = (
            encoder.eos_ids,
            encoder.banned,
            encoder.tokenizer.pad_token_id,
            128,
        )
    tokens, calls = {"transformers": [], "ours": []}, iter(range(10**6))
    plain.eval()

    def theirs():
        torch.manual_seed(next(calls))
        with torch.no_grad():
            tokens["transformers"].append(
                sum(by_transformers(plain, prompts, 16, most, eos, banned, pad))
            )

    def mine():
        made = generate(
            ours, prompts, 16, most, eos=eos, banned=banned, seed=(next(calls),), slots=args.slots
        )
        tokens["ours"].append(sum(len(r.ids) for group in made for r in group))

    seconds = clock({"transformers": theirs, "ours": mine}, args.device, args.repeat)
    rates = {
        k: median([t / s for t, s in zip(tokens[k][1:], v, strict=True)])
        for k, v in seconds.items()
    }
    report(
        "sampler",
        ratio=rates["ours"] / rates["transformers"],
        tokens_per_second=rates,
        prompts=8,
        rollouts=16,
        mean_length={k: sum(v) / len(v) / 128 for k, v in tokens.items()},
        prompt_tokens=len(prompts[0].ids),
        slots=args.slots,
        model=f"{size}, random" if cuda or args.random else args.policy,
        device=args.device,
    )


def growth(args):
    """Rates with no end token, and, on CUDA, what share of the memory's bandwidth the decoding steps reach."""
    cuda, table = args.device != "cpu", {}
    hf = model("4B" if cuda else "small", args.device)
    adopt(hf.model)
    root = prompt(hf, 64, 32 if cuda else 8)
    bandwidth = copy_rate(args.device)
    weights = sum(p.numel() * p.element_size() for p in hf.model.language_model.parameters())
    text = hf.config.text_config
    per_token = (
        2 * text.num_hidden_layers * text.num_key_value_heads * text.head_dim * hf.dtype.itemsize
    )
    for rows, length in (
        (4, 256),
        (16, 256),
        (64, 256),
        (4, 1024),
        (64, 1024),
        (4, 4096),
        (64, 4096),
    ):
        if not cuda and rows * length > 70_000 and not args.all:
            continue
        run = lambda n=rows, most=length: generate(hf, [root], n, most, eos=(-1,), slots=n)  # noqa: E731
        run() if length == 256 else None
        taken = seconds_of(run, args.device)
        step = weights + rows * per_token * (len(root.ids) + length / 2)
        table[f"{rows} x {length}"] = {
            "tokens_per_second": rows * length / taken,
            "of_bandwidth": step * length / taken / bandwidth,
        }
    report(
        "sampler, growth",
        table=table,
        bandwidth=bandwidth,
        size="4B" if cuda else "small",
        device=args.device,
    )


def copy_rate(device):
    """Bytes per second that a copy reads and writes: the bound on decoding."""
    x = torch.empty(2**28 if device == "cpu" else 2**32, dtype=torch.uint8, device=device)
    y = torch.empty_like(x)
    return 2 * x.numel() / median(clock({"copy": lambda: y.copy_(x)}, device)["copy"])


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--policy", default="ckpt/base-tiny")
    parser.add_argument("--data", default="data/tiny/rl.jsonl")
    parser.add_argument(
        "--random",
        action="store_true",
        help="on a CPU: random weights, geometric lengths of mean 64",
    )
    parser.add_argument("--slots", type=int, default=128)
    parser.add_argument("--growth", action="store_true")
    parser.add_argument(
        "--all", action="store_true", help="on a CPU the long cases too: many minutes"
    )
    parser.add_argument("--repeat", type=int, default=5)
    args = parser.parse_args()
    growth(args) if args.growth else compare(args)
