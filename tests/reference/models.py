"""
A policy and a discriminator as plain transformers models in float64, called on one row at a time.
"""

from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import nn
from transformers import AutoConfig, Qwen3VLForConditionalGeneration, Qwen3VLModel


def open_config(folder):
    """A checkpoint's configuration, with transformers' plain attention."""
    settings = AutoConfig.from_pretrained(folder)
    settings._attn_implementation = "sdpa"
    return settings


def inputs(prompt, more, image):
    """The keyword arguments of one forward: a prompt, continued by the ids `more`."""
    ids = torch.tensor([[*prompt.ids, *more]])
    arguments = {"input_ids": ids}
    if prompt.grid is not None:
        arguments["mm_token_type_ids"] = (ids == image).int()
        arguments["pixel_values"] = prompt.pixels.double()
        arguments["image_grid_thw"] = prompt.grid
    return arguments


class Player:
    """What policy and discriminator share: weights that a stage trains, by the names that its
    optimiser has for them. Without `vision`, the vision tower and its mergers are not trained."""

    vision = True

    def parameters(self):
        """{name: parameter} of all."""
        raise NotImplementedError

    def trained(self):
        parameters = self.parameters().items()
        return {name: p for name, p in parameters if self.vision or ".visual." not in name}

    def take(self, weights):
        """Take over the trained weights {name: tensor}."""
        own = self.trained()
        assert own.keys() == weights.keys(), own.keys() ^ weights.keys()
        with torch.no_grad():
            for name, parameter in own.items():
                parameter.copy_(weights[name])
                parameter.grad = None

    def open(self, weights):
        """Take over what there is of the weights {name: tensor} of a checkpoint."""
        with torch.no_grad():
            for name, parameter in self.parameters().items():
                if name in weights:
                    parameter.copy_(weights[name])

    def gradient(self):
        """{name: gradient}, after a backward pass; None where nothing depended on it."""
        return {name: parameter.grad for name, parameter in self.trained().items()}


class Policy(Player):
    """A checkpoint's model."""

    def __init__(self, folder, vision=True):
        settings = open_config(folder)
        self.model = Qwen3VLForConditionalGeneration(settings).double()
        self.image = settings.image_token_id
        self.vocabulary = settings.text_config.vocab_size
        self.vision = vision
        self.open({f"hf.{name}": tensor for name, tensor in dense_weights(folder).items()})

    def parameters(self):
        return {f"hf.{name}": parameter for name, parameter in self.model.named_parameters()}

    def logits(self, prompt, more):
        """The logits (T, V) of the whole row's next tokens."""
        self.model.model.rope_deltas = None
        return self.model(**inputs(prompt, more, self.image), use_cache=False).logits[0]

    def log_probs(self, prompt, response, temperature=1.0, banned=()):
        """log softmax (T, V) of each place of the response: what it was sampled from."""
        logits = self.logits(prompt, response)
        logits = logits[len(prompt.ids) - 1 : -1] / temperature
        forbidden = torch.zeros(logits.shape[1], dtype=torch.bool)
        forbidden[list(banned)] = True
        return logits.masked_fill(forbidden, -torch.inf).log_softmax(-1)


def chosen(log_probs, response):
    """(T,) the log-probs of what was sampled."""
    return log_probs.gather(1, torch.tensor(response)[:, None])[:, 0]


def entropies(log_probs):
    """(T,) in nats. An id of probability 0 adds nothing."""
    terms = log_probs.exp() * log_probs
    return -terms.nan_to_num(0.0).sum(1)


class Experts(nn.Module):
    """The experts in the place of one MLP, each computed for all tokens and weighed."""

    def __init__(self, form, experts, top_k, width, inner):
        super().__init__()
        self.form = form
        self.top_k = top_k
        self.experts = nn.Module()
        self.experts.gate_up_proj = nn.Parameter(torch.zeros(experts, width, 2 * inner))
        self.experts.down_proj = nn.Parameter(torch.zeros(experts, inner, width))
        if form == "moe":
            self.gate = nn.Linear(width, experts, bias=False)
        self.prompt_length = 0  # of the row at hand
        self.kind = 0  # of its span
        self.probability = None  # (T, E) of the last row
        self.share = None  # (T, E) of each token that goes to each expert

    def weigh(self, x):
        """(T, E): how much each expert counts for each token."""
        experts = len(self.experts.down_proj)
        if self.form == "experts":  # the span's kind selects; prompt tokens go through all
            weight = torch.zeros(len(x), experts, dtype=x.dtype)
            weight[: self.prompt_length] = 1 / experts
            weight[self.prompt_length :, self.kind] = 1
            return weight
        self.probability = self.gate(x).softmax(-1)
        best = self.probability.argsort(-1, descending=True)[:, : self.top_k]
        taken = torch.zeros_like(self.probability).scatter(1, best, 1.0)
        self.share = taken / self.top_k
        weight = self.probability * taken
        return weight / weight.sum(1, keepdim=True)

    def forward(self, x):
        (x,) = x  # one row
        weight = self.weigh(x)
        out = 0
        for expert in range(weight.shape[1]):
            gate, up = (x @ self.experts.gate_up_proj[expert]).chunk(2, -1)
            y = (nn.functional.silu(gate) * up) @ self.experts.down_proj[expert]
            out = out + weight[:, expert, None] * y
        return out[None]


class Discriminator(Player):
    """A dense checkpoint's model, its MLPs replaced by experts, and a scalar head."""

    def __init__(self, folder, form, experts=4, top_k=2, kinds=2, vision=True):
        settings = open_config(folder)
        self.vision = vision
        self.form = form
        self.image = settings.image_token_id
        self.model = Qwen3VLModel(settings)
        self.mixtures = []
        text = settings.text_config
        if form == "experts":
            experts = kinds
        if form != "dense":
            for layer in self.model.language_model.layers:
                layer.mlp = Experts(form, experts, top_k, text.hidden_size, text.intermediate_size)
                self.mixtures.append(layer.mlp)
        self.model.double()
        heads = kinds if form == "experts" else 1
        self.head = nn.Parameter(torch.zeros(heads, text.hidden_size, dtype=torch.float64))
        self.open(dense_weights(folder))

    def parameters(self):
        named = {f"model.{name}": p for name, p in self.model.named_parameters()}
        return {**named, "v_head.1.weight": self.head}

    def score(self, prompt, span, kind):
        """The raw score of one span behind its prompt: of the last token's final hidden state. Also
        how the row's tokens were routed: [(probability (T, E), share (T, E)) of each layer]."""
        for mixture in self.mixtures:
            mixture.prompt_length = len(prompt.ids)
            mixture.kind = kind
        self.model.rope_deltas = None
        output = self.model(**inputs(prompt, span, self.image), use_cache=False)
        hidden = output.last_hidden_state[0, -1]
        head = self.head[kind] if self.form == "experts" else self.head[0]
        routing = [(m.probability, m.share) for m in self.mixtures if self.form == "moe"]
        return head @ hidden, routing


def dense_weights(folder):
    """All tensors of a checkpoint folder, {name: tensor}."""
    found = {}
    for file in sorted(Path(folder).glob("*.safetensors")):
        found |= load_file(file)
    return found
