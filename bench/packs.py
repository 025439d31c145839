"""
Claim: a group in one pack costs a fraction of one row per rollout, since prompt and image are computed once.

    python bench/packs.py                       # policy, forward and backward, prompt 1x and 3x the mean response
    python bench/packs.py --discriminator       # forward and backward over the spans of a group and of its reference
    python bench/packs.py --device cuda         # the 4B's shape in bfloat16 (the discriminator: the 2B's, upcycled)
"""

import argparse
import copy

import torch
from measure import clock, lengths, median, model, peak, prompt, report

from align import Discriminator, bradley_terry
from engine.logprob import token_logps
from engine.packs import Tree, adopt, make, run

N = 16  # rollouts of the group


def texts(hf, sizes, seed=1):
    random = torch.Generator().manual_seed(seed)
    return [
        torch.randint(3, hf.config.text_config.vocab_size - 8, (n,), generator=random).tolist()
        for n in sizes
    ]


def policy(hf, root, mean, device):
    """{contender: forward and backward}, the model of each, tokens of a row's responses."""
    ours, responses = copy.deepcopy(hf), texts(hf, lengths(N, mean))
    adopt(ours.model)
    coefficient = torch.randn(sum(map(len, responses)), device=device).split(
        list(map(len, responses))
    )
    images = {
        "pixel_values": root.pixel_values.to(device, hf.dtype),
        "image_grid_thw": root.grid_thw.to(device),
    }

    def theirs(rows):  # transformers' own forward, right-padded where there are several
        whole = [torch.cat([root.ids, torch.tensor(row)]) for row in rows]
        ids = torch.nn.utils.rnn.pad_sequence(whole, batch_first=True).to(device)
        mask = torch.nn.utils.rnn.pad_sequence(
            [torch.ones_like(row) for row in whole], batch_first=True
        ).to(device)
        kinds = (ids == hf.config.image_token_id).int()
        many = {k: v.repeat(len(rows), 1) for k, v in images.items()}
        hf.model.rope_deltas = None
        hidden = hf.model(
            input_ids=ids,
            attention_mask=mask if len(rows) > 1 else None,
            mm_token_type_ids=kinds,
            **many,
        )
        return hidden.last_hidden_state[:, len(root.ids) - 1 :]

    def loss(
        hidden, k
    ):  # the same log-prob everywhere: what is compared is the model's forward and backward
        target = torch.tensor(responses[k], device=device)
        logp = token_logps(
            hidden[: len(target)], hf.lm_head.weight, target, coefficient=coefficient[k]
        )
        return (logp * coefficient[k]).sum()

    def rows():
        for k, row in enumerate(responses):
            loss(theirs([row])[0], k).backward()

    def padded():
        hidden = theirs(responses)
        sum(loss(hidden[k], k) for k in range(N)).backward()

    def packed():
        pack = make([Tree(root, responses)], [(0, list(range(N)))], device)
        c = torch.cat(coefficient)
        (
            token_logps(
                run(ours.model, pack)[pack.source], ours.lm_head.weight, pack.target, coefficient=c
            )
            * c
        ).sum().backward()

    return {"rows": (rows, hf), "padded": (padded, hf), "packed": (packed, ours)}, responses


def discriminator(hf, root, mean, device):
    disc = Discriminator(copy.deepcopy(hf.model), "moe", noise=0.01).to(device, hf.dtype)
    spans, kinds = (
        texts(hf, [n // 2 for n in lengths(2 * (N + 1), mean, 2)]),
        [0, 1] * (N + 1),
    )  # 0 and 1: the reference's

    def one(k):
        return disc(make([Tree(root, [spans[k]], [kinds[k]])], [(0, [0])], device))[0]

    def pairs(score):
        return sum(bradley_terry(score(k % 2), score(k), N) for k in range(2, len(spans)))

    def released():  # a row for each span, and the reference's again for each rollout
        for k in range(2, len(spans)):
            bradley_terry(one(k % 2), one(k), N).backward()

    def rows():  # a row for each span, each once
        scores = [one(k) for k in range(len(spans))]
        pairs(lambda k: scores[k]).backward()

    def packed():
        raw = disc(make([Tree(root, spans, kinds)], [(0, list(range(len(spans))))], device))[0]
        pairs(lambda k: raw[k : k + 1]).backward()

    return {
        "rows, reference each time": (released, disc),
        "rows": (rows, disc),
        "packed": (packed, disc),
    }, spans


def measured(run, model):
    def once():
        for p in model.parameters():
            p.grad = None
        run()

    return once


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--discriminator", action="store_true")
    parser.add_argument("--checkpointing", action="store_true")
    parser.add_argument("--response", type=int, help="mean length of a response, tokens")
    parser.add_argument("--repeat", type=int, default=5)
    args = parser.parse_args()
    cuda = args.device != "cpu"
    mean = args.response or (512 if cuda else 128)
    size = ("2B" if args.discriminator else "4B") if cuda else "small"
    figures = {"ratio": {}, "ratio_memory": {}, "seconds": {}, "tokens": {}}
    for times in (1, 3):
        hf = model(size, args.device).train()
        side = min(
            range(2, 300, 2), key=lambda s: abs((s // 2) ** 2 - 0.75 * times * mean)
        )  # three quarters are image
        root = prompt(hf, times * mean - (side // 2) ** 2 - 2, side)
        contenders, texts_ = (discriminator if args.discriminator else policy)(
            hf, root, mean, args.device
        )
        runs, grads, bytes_ = {}, {}, {}
        for name, (run_, m) in contenders.items():
            if args.checkpointing:
                getattr(m, "model", m).gradient_checkpointing_enable({"use_reentrant": False})
            runs[name] = measured(run_, m)
            runs[name]()
            grads[name] = {
                k: p.grad.float().norm().item()
                for k, p in m.named_parameters()
                if p.grad is not None
            }
        first, *rest = grads.values()
        worst = max(
            abs(g[k] - first[k]) / (first[k] + 1e-6 * max(first.values()))
            for g in rest
            for k in first
        )
        assert worst < (0.2 if cuda else 5e-3), worst  # the same gradients, whichever way
        seconds = {k: median(v) for k, v in clock(runs, args.device, args.repeat).items()}
        for name, (_, m) in contenders.items():
            for p in m.parameters():
                p.grad = None
            bytes_[name] = peak(runs[name], args.device)
        key = f"prompt {times}x"
        figures["seconds"][key] = seconds
        figures["ratio"][key] = {k: v / seconds["packed"] for k, v in seconds.items()}
        figures["ratio_memory"][key] = {k: v / bytes_["packed"] for k, v in bytes_.items()}
        figures["tokens"][key] = {"prompt": len(root.ids), "others": [len(text) for text in texts_]}
    claim = "packs, discriminator" if args.discriminator else "packs, policy"
    report(claim, **figures, size=size, checkpointing=args.checkpointing, device=args.device)


if __name__ == "__main__":
    main()
