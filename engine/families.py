"""
What differs between families of vision-language models, asked of transformers' own classes.

A family is known here by no name: its text model and its image side by what they are, its masks and
its head by what they compute for a few numbers.
"""

from __future__ import annotations

import copy
import inspect
import sys

import torch
from transformers import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
from transformers.utils.output_capturing import _CAN_RECORD_REGISTRY

WINDOW = "sliding_attention"
KNOWN_LAYERS = ("full_attention", WINDOW, "linear_attention")  # the last: see states.py
# The kinds of tokens that a forward takes for rotary positions and masks alone, which packs bring.
KINDS = ("token_type_ids", "mm_token_type_ids")


def text_of(base):
    """The text model of `base`, a transformers vision-language model without head: embeddings,
    `layers`, norm."""
    return base.get_decoder()


def image_side(base):
    """The parts of `base` that are not the text model: the vision tower, and what makes its
    features as wide as the text's."""
    text = text_of(base)
    found = []
    for part in base.children():
        if part is not text and next(part.parameters(), None) is not None:
            found.append(part)
    return found


def keep_recording(part):
    """Let `part`, now sharded, hand out its layers' outputs, which some families read features
    from: transformers knows what it may record by the class's name, and FSDP makes a new class."""
    recorded = getattr(part, "_can_record_outputs", None)
    # A part is registered when it is made, and nothing public does so later. By dict's own method:
    # 5.18's table is a plain dict by class names, 5.23's makes the name itself of a part.
    dict.__setitem__(_CAN_RECORD_REGISTRY, str(type(part)), recorded)


def compute_in(base, dtype):
    """Let `base`, now sharded, say `dtype` where it is asked for its own. Transformers reads it off
    the first parameter, which in a shard is float32, and some families cast the features of images
    to it, to put them among embeddings that are computed in `dtype`."""
    kind = type(base)
    changed = {"dtype": dtype, "__module__": kind.__module__}  # the name stays the same
    base.__class__ = type(kind.__name__, (kind,), changed)


def windows_of(text):
    """The windows, in tokens, that the layers of a text model have: of each layer one, or None.

    Most attentions hold their own. Others (Mistral's, Phi-3's) read the configuration's as they
    run: it is every layer's, unless `layer_types` says which have one.
    """
    found = []
    kinds = getattr(text.config, "layer_types", None) or [WINDOW] * len(text.layers)
    for layer, kind in zip(text.layers, kinds, strict=True):
        window = None
        attention = getattr(layer, "self_attn", None)
        if hasattr(attention, "sliding_window"):
            window = attention.sliding_window
        elif attention is not None and kind == WINDOW:
            window = getattr(text.config, "sliding_window", None)
        found.append(window)
    return found


def obstacle(hf):
    """Why packs cannot run a transformers model, in words, or None where they can."""
    base = hf.model
    text = text_of(base)
    if not hasattr(base, "get_image_features") or text is base or not hasattr(text, "layers"):
        return "packs need a text model with `layers`, and get_image_features beside it"
    config = hf.config.get_text_config()
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    others = sorted(kinds.difference(KNOWN_LAYERS))
    if others:
        return f"packs run {' and '.join(KNOWN_LAYERS)}; some layers here are {', '.join(others)}"
    if getattr(config, "cross_attention_layers", None) or hf.config.is_encoder_decoder:
        return "packs need one row of text and images, without cross-attention"
    for name in inspect.signature(base.forward).parameters:
        if name.endswith("token_type_ids") and name not in KINDS:
            return f"what its layers do depends on {name}, which packs do not hand on"
    for layer in text.layers:
        attention = getattr(layer, "self_attn", None)
        if attention is not None and not looks_its_function_up(attention):
            return f"the attention of {type(attention).__name__} cannot be replaced"
    if not hf.get_output_embeddings().weight.is_meta and not has_plain_head(hf):
        return "its logits are more than hidden states times the head (a scale, a cap, a bias)"
    return None


def looks_its_function_up(attention):
    """Whether an attention module takes its function from transformers' table of them."""
    return "ALL_ATTENTION_FUNCTIONS" in vars(sys.modules[type(attention).__module__])


def has_plain_head(hf):
    """Whether the logits are the last hidden states times the head's matrix: its forward is run on
    random hidden states in place of the model's."""
    head = hf.get_output_embeddings().weight
    random = torch.Generator().manual_seed(0)
    hidden = torch.randn(1, 2, head.shape[1], generator=random).to(head.device)
    hidden[:, 1] *= 1000  # where a cap would show
    hidden = hidden.to(head.dtype)
    hf.model.forward = lambda *_, **__: _Hidden(hidden)
    try:
        found = hf(input_ids=torch.zeros(1, 2, dtype=torch.long, device=head.device)).logits
    finally:
        del hf.model.forward
    return torch.allclose(found.float(), (hidden @ head.T).float(), rtol=1e-2, atol=1e-2)


class _Hidden:
    """The output of a model without head, of which a head reads the hidden states alone."""

    def __init__(self, hidden):
        self.last_hidden_state = hidden

    def __getitem__(self, _):
        return self.last_hidden_state

    def __getattr__(self, _):
        return None


def images_attend_both_ways(config):
    """Whether tokens of one image attend to each other both ways in a model of this configuration:
    read off the mask that transformers makes for a row of a text token, two of an image, and
    another of text. Raises ValueError where that is neither causal nor causal but for the image.
    """
    kind = MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING[type(config)]
    make = getattr(kind, "create_masks_for_generate", None)
    if make is None:
        return False
    config = copy.deepcopy(config)
    config.get_text_config()._attn_implementation = "eager"  # whose masks are whole
    of_image = torch.tensor([[0, 1, 1, 0]])
    masks = make(
        config=config,
        inputs_embeds=torch.zeros(1, 4, 1),
        attention_mask=None,
        past_key_values=None,
        position_ids=torch.arange(4).unsqueeze(0),
        token_type_ids=of_image,
        mm_token_type_ids=of_image,
        is_first_iteration=True,
    )
    mask = masks.get("full_attention") if isinstance(masks, dict) else masks
    if mask is None:
        return False
    seen = mask[0, 0] == 0 if mask.is_floating_point() else mask[0, 0]
    causal = torch.ones(4, 4, dtype=torch.bool).tril()
    inside = (of_image == 1) & (of_image == 1).T
    if torch.equal(seen, causal):
        return False
    if torch.equal(seen, causal | inside):
        return True
    raise ValueError(
        f"{kind.__name__}: its masks are neither causal nor causal but for images, which packs "
        f"could run: {seen.int().tolist()} for a row of text, image, image, text"
    )


def takes(function, name):
    """Whether a function names an argument of its own so."""
    return name in inspect.signature(function).parameters
