"""
Images as a model's forward takes them, and the tokens that they stand for in a text.

Both are the family's own, and both come from transformers' processor of the checkpoint: patches and
their grids, or tiles and which image they belong to; one token for each 2 x 2 patches, or rows of
tokens between marks. Tensors have the names that the forward knows them by. Images are appended
along the first dimension of each, or where the processor appends them.
"""

from __future__ import annotations

import importlib
import inspect
import math
import sys

import torch
import torch.nn.functional as F
import transformers
from PIL import Image
from transformers import AutoImageProcessor, ImageProcessingMixin, ProcessorMixin
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING


# ------------------------------------------------------------------------------- a pack's images
class Tensors(dict):
    """The tensors of one prompt's images, by name, where they may be appended otherwise than along
    the first dimension."""

    def __init__(self, tensors, along):
        """along: of a name the dimension along which images of several prompts are appended."""
        super().__init__(tensors)
        self.along = along


def together(images):
    """Images of several prompts, a dict (name -> tensor) of each, as one dict: appended along the
    first dimension, or where they are Tensors along the one that these say.

    Where one's tensor is larger than another's in another dimension than that of the images, as
    where an image has more tiles, the smaller is filled up with zeros: so do transformers'
    processors in a batch.
    """
    images = [made for made in images if made]  # a prompt without images has none of the names
    if not images:
        return {}
    joined = {}
    for name in images[0]:
        along = images[0].along[name] if isinstance(images[0], Tensors) else 0
        joined[name] = _concatenate([made[name] for made in images], along)
    return joined


def _concatenate(tensors, along):
    largest = [max(sizes) for sizes in zip(*(tensor.shape for tensor in tensors), strict=True)]
    filled = []
    for tensor in tensors:
        missing = []
        for dimension in reversed(range(tensor.ndim)):
            is_images = dimension == along
            missing += [0, 0 if is_images else largest[dimension] - tensor.shape[dimension]]
        filled.append(F.pad(tensor, missing) if any(missing) else tensor)
    return torch.cat(filled, along)


# ------------------------------------------------------------------------------ to be opened
def open_image_processor(folder):
    """The image processor of a checkpoint's folder, one that works on PIL images alone. Raises
    ValueError where it is unknown, or transformers has it for torchvision only."""
    try:
        return AutoImageProcessor.from_pretrained(folder, backend="pil")
    except (ImportError, ValueError) as error:
        raise ValueError(not_opened(folder, error)) from error


def not_opened(folder, error):
    return (
        f"{folder}: its processor cannot be opened. Of some families transformers has one for "
        f"torchvision alone, which is none of our dependencies ({error})"
    )


def make_processor(kind, tokenizer, image_processor, settings=()):
    """A transformers processor of the class `kind`, without what it has for videos.

    settings: of processor_config.json, a dict. The class would ask for a video processor, and so
    for torchvision; no data here holds videos.
    """
    # One family's asks for this package when it is made, and spells numbers in videos' texts by it.
    module = sys.modules[kind.__module__]
    if getattr(module, "num2words", "known") is None:
        module.num2words = str
    arguments = {"tokenizer": tokenizer, "image_processor": image_processor}
    known = inspect.signature(kind.__init__).parameters
    for name, value in dict(settings).items():
        if name in known and name not in kind.get_attributes():
            arguments[name] = value
    for name in kind.get_attributes():
        arguments.setdefault(name, _Nothing() if name == "video_processor" else None)
    processor = kind.__new__(kind)
    # The class has no argument for "without videos", and its check does not let None pass. Nor
    # would AutoProcessor do: it opens every part, and so the video processor, by torchvision.
    processor.check_argument_for_proper_class = lambda *_: None
    processor.__init__(**arguments)
    del processor.check_argument_for_proper_class
    if "video_processor" in arguments:
        processor.video_processor = None
    return processor


class _Nothing:
    """In place of a video processor: some classes copy its settings when they are made."""

    def __getattr__(self, _):
        return None


def open_processor(folder, config, tokenizer):
    """The processor of a checkpoint's folder: its image processor, and the settings of its class,
    which the folder's files name or else the model's configuration does. Raises ValueError where
    transformers has none."""
    settings, _ = ProcessorMixin.get_processor_dict(folder)
    of_images, _ = ImageProcessingMixin.get_image_processor_dict(folder)
    name = settings.get("processor_class") or of_images.get("processor_class")
    try:
        if name is not None:
            kind = getattr(transformers, name, None)
        else:
            kind = PROCESSOR_MAPPING.get(type(config), None)
        if kind is not None:
            importlib.import_module(kind.__module__)
    except ImportError as error:
        raise ValueError(not_opened(folder, error)) from error
    if kind is None:
        raise ValueError(
            f"{folder}: transformers has no processor {name or f'for a {config.model_type}'}; "
            "processor_config.json or preprocessor_config.json names it, as processor_class"
        )
    return make_processor(kind, tokenizer, open_image_processor(folder), settings)


# -------------------------------------------------------------------------------- one image
def taken_by(base):
    """The names that a transformers model without head takes: what an image processor makes beside
    them (numbers of tiles, say) is for the text alone."""
    names = {*inspect.signature(base.forward).parameters}
    return names | {*inspect.signature(base.get_image_features).parameters}


def blank_image(image_processor, base):
    """One small white image as `base` takes it: what packs without images run through its tower."""
    made = image_processor(images=[_blank(_side(image_processor))], **smallest(image_processor))
    return {name: tensor for name, tensor in made.items() if name in taken_by(base)}


def smallest(image_processor):
    """Options by which an image processor makes as little of an image as it can: no tiles."""
    options = {"return_tensors": "pt"}
    known = image_processor.valid_kwargs.__annotations__
    for name in ("do_image_splitting", "crop_to_patches", "do_pan_and_scan", "slice_mode"):
        if name in known:
            options[name] = False
    if has_areas(image_processor):
        options["size"] = {"shortest_edge": 1, "longest_edge": _side(image_processor) ** 2}
    return options


def has_areas(image_processor):
    """Whether it scales images to an area and cuts them into patches, as Qwen-VL's do. Then the
    edges in its `size` are areas, for all their names; older files name them so."""
    limits = dict(image_processor.size or {})
    areas = {"shortest_edge", "longest_edge"} <= {*limits} or "max_pixels" in limits
    return hasattr(image_processor, "merge_size") and areas


def _side(image_processor):
    if has_areas(image_processor):
        return image_processor.patch_size * image_processor.merge_size
    return 32


def _blank(width, height=None):
    return Image.new("RGB", (width, height or width), "white")


class Images:
    """The image side of a checkpoint: PIL images -> tensors, and the text that each stands for."""

    def __init__(self, processor, base, max_pixels=None):
        """processor: transformers'. base: the model without head, for the names that it takes.
        max_pixels: larger images are scaled down to this area. Raises ValueError where the image
        processor knows no areas."""
        self.processor = processor
        self.image_processor = processor.image_processor
        self.names = taken_by(base)
        tokenizer = processor.tokenizer
        self.mark = processor.image_token  # what the chat template writes for an image
        if self.mark not in tokenizer.get_vocab():  # a tokenizer that names its image token itself
            self.mark = tokenizer.convert_ids_to_tokens(base.config.image_token_id)
            if self.mark is None:
                raise ValueError(
                    f"the tokenizer has no token {base.config.image_token_id}, the configuration's "
                    f"image_token_id, and no {processor.image_token}: take the tokenizer that the "
                    "model was trained with"
                )
            processor.image_token = self.mark
            processor.image_token_id = base.config.image_token_id
        # A processor's own defaults for images, above those of its image processor. transformers
        # merges them inside a processor's call alone, which wants a text with marks beside them.
        known = processor.valid_processor_kwargs
        self.options = processor._merge_kwargs(known, return_tensors="pt")["images_kwargs"]
        self.limits = None  # areas, in pixels
        if has_areas(self.image_processor):
            self.limits = self._limits(max_pixels)
            self.options["size"] = self.limits
        elif max_pixels:
            kind = type(self.image_processor).__name__
            raise ValueError(
                f"--max_pixels: {kind} scales no image to an area. How large an image becomes, and "
                f"how many tiles it has, is set in the checkpoint's preprocessor_config.json "
                "(--max_side makes the image itself smaller before)"
            )
        self.along = self._along()
        # Whether an image's text begins with its number among the images of its prompt.
        self.numbered = getattr(processor, "default_use_image_id", None)
        self.counts_patches = bool(self.limits) and self._counts_patches()
        # ((width, height), ..) of all images of one prompt -> [text, ..], one for each
        self.known_sizes = {}

    def _limits(self, max_pixels):
        limits = dict(self.image_processor.size)
        largest = limits.get("longest_edge") or limits["max_pixels"]
        least = limits.get("shortest_edge") or limits["min_pixels"]
        largest = min(largest, max_pixels or math.inf)
        return {"shortest_edge": min(least, largest), "longest_edge": largest}

    def prepare(self, images):
        """PIL images of one prompt -> (tensors by name, of each image the text in its mark's
        place). Raises ValueError for a shape that the image processor cannot take."""
        # The processor's public call wants a whole text with marks, tokenises it, and returns its
        # ids; of the images' texts it hands out only where they stand. Here they go into turns that
        # are tokenised apart.
        made, texts = self.processor._process_images([images], **self.options)
        tensors = {}
        for name, value in made.items():
            if name in self.names:
                tensors[name] = torch.as_tensor(value)
        if self.numbered:  # this, too, transformers does inside a processor's call alone
            texts = self.processor._prepend_local_ids([self.mark * len(texts)], texts, self.mark)
        return Tensors(tensors, self.along), texts

    def _along(self):
        """Of each tensor's name the dimension along which images of several prompts are appended:
        the one that is twice as long for two prompts as for one. It is not the first where patches
        of all images lie in one row. Raises ValueError where there is no such dimension."""
        options = smallest(self.image_processor)
        blank = _blank(_side(self.image_processor))
        one = self.image_processor(images=[[blank]], **options)
        two = self.image_processor(images=[[blank], [blank]], **options)
        found = {}
        for name in self.names.intersection(one):
            single = list(torch.as_tensor(one[name]).shape)
            double = list(torch.as_tensor(two[name]).shape)
            longer = []
            for dimension, size in enumerate(single):
                if double == [*single[:dimension], 2 * size, *single[dimension + 1 :]]:
                    longer.append(dimension)
            if len(longer) != 1:
                raise ValueError(
                    f"{type(self.image_processor).__name__} makes {name} of shape {single} of a "
                    f"prompt with one image, and {double} of two such prompts: packs can append "
                    "images along one dimension only"
                )
            (found[name],) = longer
        return found

    def texts_of_sizes(self, sizes):
        """The texts of one prompt's images of these sizes, a tuple of (width, height), without
        their pixels. Raises ValueError for a shape that the image processor cannot take."""
        if not sizes:
            return []
        if sizes not in self.known_sizes:
            self.known_sizes[sizes] = self._texts_of_sizes(sizes)
        return self.known_sizes[sizes]

    def text_of_blank(self):
        """The text that stands for one small blank image."""
        side = _side(self.image_processor)
        (text,) = self.texts_of_sizes(((side, side),))
        return text

    def _texts_of_sizes(self, sizes):
        """Where texts are as long as there are merged patches, these are counted; else blank images
        are prepared: what the text is follows from the sizes alone."""
        if self.counts_patches:
            count = self.image_processor.get_number_of_image_patches
            merged = self.image_processor.merge_size**2
            limits = {  # Qwen-VL's reads the first two, GLM's the third
                "min_pixels": self.limits["shortest_edge"],
                "max_pixels": self.limits["longest_edge"],
                "size": self.limits,
            }
            patches = [count(height, width, limits) for width, height in sizes]
            return [self.mark * (n // merged) for n in patches]
        return self.prepare([_blank(*size) for size in sizes])[1]

    def _counts_patches(self):
        """Whether an image's text is its mark once for each merged patch, and nothing else."""
        made, (text,) = self.prepare([_blank(_side(self.image_processor))])
        patches = int(made["image_grid_thw"].prod()) // self.image_processor.merge_size**2
        return text == self.mark * patches

    def fill_in(self, text, texts):
        """A rendered text with the next of `texts`, an iterator, in the place of each mark."""
        first, *others = text.split(self.mark)
        for piece in others:
            first += next(texts) + piece
        return first
