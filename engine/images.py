"""
Images as a model's forward takes them: tensors by name.

What the names are is the family's: patches of all images and their grids, or tiles of one size and
which of them belong to which image. Along the first dimension of each tensor images are appended.
"""

from __future__ import annotations

import inspect

import torch
import torch.nn.functional as F
from PIL import Image
from transformers import AutoImageProcessor


def open_image_processor(folder):
    """The image processor of a checkpoint's folder, which works without torchvision."""
    return AutoImageProcessor.from_pretrained(folder, backend="pil")


def together(images):
    """Images of several prompts, a dict (name -> tensor) of each, as one dict.

    Where one's tensor is larger than another's beyond the first dimension, as where an image has
    more tiles, the smaller is filled up with zeros: so do transformers' processors in a batch.
    """
    images = [made for made in images if made]  # a prompt without images has none of the names
    if not images:
        return {}
    return {name: _concatenate([made[name] for made in images]) for name in images[0]}


def _concatenate(tensors):
    largest = [max(sizes) for sizes in zip(*(tensor.shape for tensor in tensors), strict=True)]
    filled = []
    for tensor in tensors:
        missing = []
        for dimension in reversed(range(1, tensor.ndim)):
            missing += [0, largest[dimension] - tensor.shape[dimension]]
        filled.append(F.pad(tensor, missing) if any(missing) else tensor)
    return torch.cat(filled)


def taken_by(base):
    """The names that a transformers model without head takes: what an image processor makes beside
    them (numbers of tiles, say) is for the text alone."""
    return {
        *inspect.signature(base.forward).parameters,
        *inspect.signature(base.get_image_features).parameters,
    }


def blank_image(image_processor, base):
    """One small white image as `base` takes it: what packs without images run through its tower."""
    side = image_processor.patch_size * image_processor.merge_size
    image = Image.new("RGB", (side, side), "white")
    size = {"shortest_edge": 1, "longest_edge": side**2}
    made = image_processor(images=[image], size=size, return_tensors="pt")
    return {name: tensor for name, tensor in made.items() if name in taken_by(base)}
