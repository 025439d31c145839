"""
Claim: rollouts come several times faster than from transformers' generate, with the same
checkpoint, the same rows and ragged lengths.

    python bench/sampler.py                             # on a CPU, after `bash runs/base.sh`
    python bench/sampler.py --policy out/tiny-0/sft     # after `bash runs/tiny.sh`
    python bench/sampler.py --random            # a larger model, random weights, ragged lengths
    python bench/sampler.py --device cuda       # the 4B's shape, lengths of about 300
    python bench/sampler.py --prompt 1024       # a prompt's keys and values once, or once per row
    python bench/sampler.py --growth            # 4 to 64 rows of 256 to 4096 tokens
    python bench/sampler.py --profile           # on a CPU: what sampling spends its time on
"""

import argparse
import time
from collections import Counter
from dataclasses import dataclass

import torch
from measure import clock, device_here, median, model, prompt, report, seconds_of
from transformers import AutoModelForImageTextToText

from data import Prompt, read
from engine import sampler, store
from engine.attention import adopt
from engine.images import together
from engine.sampler import all_rows, generate
from model import load

N = 16  # rollouts of each prompt


@dataclass
class Case:
    """What both contenders sample from."""

    ours: object  # the model as model.load opens it
    theirs: object  # the same as transformers opens it
    prompts: list[Prompt]
    eos: tuple[int, ...]
    banned: tuple[int, ...]
    pad: int
    max_tokens: int

    def by_us(self, seed, slots, **options):
        """Sample all rows with engine.sampler -> the number of tokens."""
        rollouts = generate(
            self.ours,
            self.prompts,
            all_rows(self.prompts, N),
            self.max_tokens,
            eos=self.eos,
            banned=self.banned,
            seeds=[(seed, number) for number in range(len(self.prompts))],
            slots=slots,
            **options,
        )
        return sum(len(rollout.ids) for rollout in rollouts)

    @torch.no_grad()
    def by_transformers(self, seed):
        """What a user would write: `generate` over left-padded prompts -> the number of tokens."""
        torch.manual_seed(seed)
        device = self.theirs.device
        longest = max(len(p.ids) for p in self.prompts)
        ids = torch.full((len(self.prompts), longest), self.pad)
        mask = torch.zeros_like(ids)
        for row, p in enumerate(self.prompts):
            ids[row, longest - len(p.ids) :] = p.ids
            mask[row, longest - len(p.ids) :] = 1
        images = together([p.images for p in self.prompts])
        out = self.theirs.generate(
            input_ids=ids.to(device),
            attention_mask=mask.to(device),
            mm_token_type_ids=(ids == self.theirs.config.image_token_id).int().to(device),
            pixel_values=images["pixel_values"].to(device, self.theirs.dtype),
            image_grid_thw=images["image_grid_thw"].to(device),
            do_sample=True,
            temperature=1.0,
            top_k=0,
            top_p=1.0,
            num_return_sequences=N,
            max_new_tokens=self.max_tokens,
            eos_token_id=list(self.eos),
            pad_token_id=self.pad,
            suppress_tokens=list(self.banned) or None,
        )
        out = out[:, longest:]  # (rows, tokens)
        ended = torch.isin(out, torch.tensor(self.eos, device=device))
        lengths = torch.where(ended.any(1), ended.int().argmax(1) + 1, out.shape[1])
        return int(lengths.sum())


def random_case(size, side, mean, max_tokens, device):
    """Random weights, lengths of mean `mean`, prompts of 64 tokens and an image."""
    plain = model(size, device).eval()
    ours = model(size, device)
    adopt(ours.model)
    prompts = [prompt(plain, 64, side, seed) for seed in range(8)]
    # Random weights end nowhere: of V about equally likely ids, V / mean are taken for end tokens.
    ends = (plain.config.text_config.vocab_size - 8) // mean
    eos = tuple(range(3, 3 + ends))
    return Case(ours, plain, prompts, eos, banned=(), pad=0, max_tokens=max_tokens)


def checkpoint_case(policy_folder, data_file, max_tokens):
    policy = load(policy_folder)
    plain = AutoModelForImageTextToText.from_pretrained(policy.source, dtype=torch.float32).eval()
    encoder = policy.encoder
    prompts = read(data_file, "rl").fetch(range(8), encoder.prompt)
    pad = encoder.tokenizer.pad_token_id
    return Case(policy.hf, plain, prompts, encoder.eos_ids, encoder.banned, pad, max_tokens)


def case_of(args):
    """The case that the flags name, and how the report names it."""
    if args.device != "cpu":
        case = random_case("4B", 32, mean=300, max_tokens=args.most or 1024, device=args.device)
        return case, "4B, random"
    if args.random:
        case = random_case("small", 16, mean=64, max_tokens=args.most or 1024, device="cpu")
        return case, "small, random"
    return checkpoint_case(args.policy, args.data, max_tokens=args.most or 128), args.policy


def compare(args):
    case, name = case_of(args)
    tokens = {"transformers": [], "ours": []}

    def theirs():
        tokens["transformers"].append(case.by_transformers(seed=len(tokens["transformers"])))

    def ours():
        tokens["ours"].append(case.by_us(seed=len(tokens["ours"]), slots=args.slots))

    contenders = {"transformers": theirs, "ours": ours}
    rates = {}
    for who, seconds in clock(contenders, args.device, args.repeat).items():
        measured = tokens[who][1:]  # without the warm-up's
        rates[who] = median([n / s for n, s in zip(measured, seconds, strict=True)])
    rows = len(case.prompts) * N
    report(
        "sampler",
        ratio=rates["ours"] / rates["transformers"],
        tokens_per_second=rates,
        prompts=len(case.prompts),
        rollouts=N,
        mean_length={who: sum(counts) / len(counts) / rows for who, counts in tokens.items()},
        prompt_tokens=len(case.prompts[0].ids),
        slots=args.slots,
        model=name,
        device=args.device,
    )


def shared_prompts(args):
    """Keys and values of each prompt once (as `generate` does by itself where prompts are long)
    against a copy in each row's slot: 4 prompts, 16 rows of each, all in slots."""
    size = "4B" if args.device != "cpu" else "small"
    side = 32 if args.prompt >= 512 else 4  # patches
    image_tokens = (side // 2) ** 2
    table = {}
    for mean in (64, 512):
        case = random_case(size, side, mean, max_tokens=min(4 * mean, 1024), device=args.device)
        text = args.prompt - image_tokens - 2
        case.prompts = [prompt(case.theirs, text, side, seed) for seed in range(4)]
        tokens = {True: [], False: []}
        memory = {True: 0, False: 0}
        advance = sampler._Decoder.advance

        def watched(decoder, steps, memory=memory, advance=advance):
            advance(decoder, steps)
            store = decoder.store
            tensors = [*store.keys, *store.values]
            if store.shared:
                tensors += [*store.shared.keys, *store.shared.values]
            size = sum(tensor.numel() * tensor.itemsize for tensor in tensors)
            shares = store.shared is not None
            memory[shares] = max(memory[shares], size)

        def run(shares, case=case, tokens=tokens):
            seed = len(tokens[shares])
            tokens[shares].append(case.by_us(seed, slots=4 * N, share_prompts=shares))

        sampler._Decoder.advance = watched
        contenders = {"once": lambda run=run: run(True), "each row": lambda run=run: run(False)}
        seconds = clock(contenders, args.device, args.repeat)
        sampler._Decoder.advance = advance
        rates = {}
        for name, shares in (("once", True), ("each row", False)):
            measured = tokens[shares][1:]  # without the warm-up's
            pairs = zip(measured, seconds[name], strict=True)
            rates[name] = median([n / s for n, s in pairs])
        table[f"mean response {mean}"] = {
            "ratio": rates["once"] / rates["each row"],
            "tokens_per_second": rates,
            "memory_of_the_store": memory[True] / memory[False],
            "prompt_tokens": len(case.prompts[0].ids),
        }
    report("sampler, shared prompts", table=table, size=size, device=args.device)


def growth(args):
    """Tokens per second without an end token, and what share of the memory's bandwidth weights,
    keys and values account for."""
    cuda = args.device != "cpu"
    size = "4B" if cuda else "small"
    hf = model(size, args.device)
    adopt(hf.model)
    root = prompt(hf, 64, 32 if cuda else 8)
    bandwidth = copy_rate(args.device)
    weights = sum(p.numel() * p.element_size() for p in hf.model.language_model.parameters())
    text = hf.config.text_config
    numbers_per_token = 2 * text.num_hidden_layers * text.num_key_value_heads * text.head_dim
    bytes_per_token = numbers_per_token * hf.dtype.itemsize
    cases = [(4, 256), (16, 256), (64, 256), (4, 1024), (64, 1024), (4, 4096), (64, 4096)]
    if args.most:
        cases = [(rows, length) for rows, length in cases if length <= args.most]
    elif not cuda:
        cases.remove((64, 4096))  # many minutes
    table = {}
    for rows, length in cases:

        def run(rows=rows, length=length):
            chosen = all_rows([root], rows)
            generate(hf, [root], chosen, length, eos=(-1,), seeds=[(0, 0)], slots=rows)

        if length == 256:
            run()  # a warm-up
        seconds = seconds_of(run, args.device)
        mean_filled = len(root.ids) + length / 2
        bytes_per_step = weights + rows * mean_filled * bytes_per_token
        table[f"{rows} x {length}"] = {
            "tokens_per_second": rows * length / seconds,
            "of_bandwidth": bytes_per_step * length / seconds / bandwidth,
        }
    report("sampler, growth", table=table, bandwidth=bandwidth, size=size, device=args.device)


def copy_rate(device):
    """Bytes per second that a copy reads and writes: the bound on decoding."""
    x = torch.empty(2**28 if device == "cpu" else 2**32, dtype=torch.uint8, device=device)
    y = torch.empty_like(x)
    seconds = clock({"copy": lambda: y.copy_(x)}, device)["copy"]
    return 2 * x.numel() / median(seconds)


class Stopwatch:
    """Seconds that functions spend by themselves, without other watched ones that they call."""

    def __init__(self):
        self.open = [
            "the rest"
        ]  # labels of the watched functions that are running, the last inside
        self.reset()

    def reset(self):
        self.seconds = Counter()
        self.calls = Counter()
        self.last = time.perf_counter()

    def count(self):
        """Give the time since the last count to the function that was running."""
        now = time.perf_counter()
        self.seconds[self.open[-1]] += now - self.last
        self.last = now

    def watch(self, owner, name, label):
        function = getattr(owner, name)

        def timed(*args, **kwargs):
            if self.open[-1] == "reading prompts":  # counts as a whole
                return function(*args, **kwargs)
            self.count()
            self.open.append(label)
            result = function(*args, **kwargs)
            self.count()
            self.open.pop()
            self.calls[label] += 1
            return result

        setattr(owner, name, timed)


def profile(args):
    """Which share of sampling's time is transformers' own layers, and which is ours."""
    case, name = case_of(args)
    text = case.ours.model.language_model
    stopwatch = Stopwatch()
    for owner, function, label in (
        (sampler._Queue, "read_prompts", "reading prompts"),
        (sampler._Decoder, "fill", "ours: filling slots"),
        (sampler._Decoder, "reserve", "ours: growing the store"),
        (sampler._Decoder, "shrink", "ours: shrinking the store"),
        (sampler._Decoder, "step", "ours: the rest of a step"),
        (store.Store, "begin_step", "ours: mask and places"),
        (store.Store, "update", "ours: writing keys and values"),
        (store.Store, "attend", "ours: attention"),
        (sampler, "logits", "ours: logits"),
        (sampler, "pick", "ours: picking tokens"),
        (text, "forward", "transformers: around the layers"),
        (text.rotary_emb, "forward", "transformers: rotary positions"),
        (text.norm, "forward", "transformers: norms"),
    ):
        stopwatch.watch(owner, function, label)
    for layer in text.layers:
        stopwatch.watch(layer, "forward", "transformers: around attention and MLP")
        stopwatch.watch(layer.self_attn, "forward", "transformers: projections and rotation")
        stopwatch.watch(layer.mlp, "forward", "transformers: MLPs")
        for part in (layer, layer.self_attn):
            for norm in part.children():
                if type(norm) is type(text.norm):
                    stopwatch.watch(norm, "forward", "transformers: norms")
    case.by_us(seed=0, slots=args.slots)  # a warm-up
    stopwatch.reset()
    for seed in range(args.repeat):
        case.by_us(seed=seed, slots=args.slots)
    stopwatch.count()
    seconds = sum(stopwatch.seconds.values())
    steps = stopwatch.calls["ours: the rest of a step"]
    shares = {}
    for label, value in sorted(stopwatch.seconds.items()):
        owner, _, _ = label.partition(":")
        shares[label] = value / seconds
        if owner != label:
            shares[owner] = shares.get(owner, 0.0) + value / seconds
    report(
        "sampler, profile",
        share=shares,
        milliseconds_per_step=1000 * seconds / steps,
        steps=steps,
        model=name,
        slots=args.slots,
        device=args.device,
    )


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--device", type=device_here, default="cpu")
    parser.add_argument("--policy", default="ckpt/base-tiny")
    parser.add_argument("--data", default="data/tiny/rl.jsonl")
    parser.add_argument("--random", action="store_true", help="on a CPU: the model `small`")
    parser.add_argument("--slots", type=int, default=128)
    parser.add_argument("--prompt", type=int, help="tokens of a prompt: kept once, or per row")
    parser.add_argument("--growth", action="store_true")
    parser.add_argument("--most", type=int, help="tokens of the longest rollout")
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--repeat", type=int, default=5)
    args = parser.parse_args()
    if args.prompt:
        shared_prompts(args)
    elif args.growth:
        growth(args)
    elif args.profile:
        profile(args)
    else:
        compare(args)


if __name__ == "__main__":
    main()
