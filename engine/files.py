"""
Checkpoints on disk: found, checked before anything is built from them, and the discriminator's
format.
"""

from __future__ import annotations

import glob
import json
import shutil
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForImageTextToText

from engine.arguments import HUB_DATA, may_be_on_the_hub
from engine.images import blank_image, open_image_processor
from engine.ranks import is_main

# What a checkpoint folder holds besides weights and config.json: copied as it is, so that any
# server reads it.
PROCESSOR_FILES = (
    "tokenizer*",
    "vocab.json",
    "merges.txt",
    "added_tokens.json",
    "special_tokens_map.json",
    "*preprocessor_config.json",
    "processor_config.json",
    "chat_template*",
    "generation_config.json",
)
WEIGHT_FILES = ("config.json", "*.safetensors", "*.safetensors.index.json")
# Named chat templates beside the default: the tokenizer reads and writes them.
TEMPLATE_FILES = ("additional_chat_templates/*.jinja",)
FLOATS = ("F64", "F32", "F16", "BF16")  # as safetensors names them


# ------------------------------------------------------------------------------------- opening
def find(path, inside=("last", "")) -> Path:
    """The folder of a checkpoint: the first of the folders `inside` the folder `path` that has a
    config.json ("last": of a run folder, "": the folder itself). Where `path` is no folder: the
    hub's model of that name, fetched or from the cache.
    """
    for name in inside:
        if Path(path, name, "config.json").exists():
            return Path(path, name)
    if Path(path).is_dir():
        raise FileNotFoundError(
            f"{path} has no config.json: neither a checkpoint nor a run folder with one in last/"
        )
    if not may_be_on_the_hub(path):
        raise FileNotFoundError(f"{path}: no such folder (and not the name of a model on the hub)")
    from huggingface_hub import snapshot_download

    wanted = [*WEIGHT_FILES, *PROCESSOR_FILES, *TEMPLATE_FILES]
    return Path(snapshot_download(str(path), allow_patterns=wanted))


def find_data(path) -> str:
    """The path of a data file: the same, or that of the hub's file, fetched or from the cache.

    path: a file, or hf://datasets/OWNER/NAME/FILE; FILE may hold *, as "testmini-*.parquet", where
    only one file matches. Of the hub only a file that holds its images can be read, as parquet
    does. Raises FileNotFoundError where no file matches, ValueError where several do.
    """
    path = str(path)
    if path.startswith(HUB_DATA):
        pattern = fetch_data(path)
    elif "*" in path and not Path(path).exists():
        pattern = path
    else:
        return path
    found = sorted(glob.glob(pattern))
    if not found:
        raise FileNotFoundError(f"{path}: no such file")
    if len(found) > 1:
        names = ", ".join(Path(file).name for file in found[:3])
        raise ValueError(f"{path}: {len(found)} files match ({names}, ..), name one of them")
    return found[0]


def fetch_data(path) -> str:
    """Fetch what matches hf://datasets/OWNER/NAME/FILE -> the same pattern in the hub's cache."""
    from huggingface_hub import snapshot_download

    owner, _, rest = path.removeprefix(HUB_DATA).partition("/")
    name, _, file = rest.partition("/")
    if not file:
        raise ValueError(f"{path}: no file is named, as in {HUB_DATA}OWNER/NAME/FILE.parquet")
    folder = snapshot_download(f"{owner}/{name}", repo_type="dataset", allow_patterns=[file])
    return f"{glob.escape(folder)}/{file}"


def read_files(folder, *more):
    """Check a checkpoint's files -> (config.json as a dict, paths of the safetensors).

    more: names of JSON files that have to be there too. Raises ValueError that names the first file
    that is missing or broken: transformers would take the sizes of a large model, or make an empty
    tokenizer.
    """
    file = Path(folder, "config.json")
    try:
        config = read_config(file)
        file = Path(folder, "model.safetensors.index.json")
        names = ["model.safetensors"]
        if file.exists():
            names = sorted(set(json.loads(file.read_text())["weight_map"].values()))
        weights = [Path(folder, name) for name in names]
        for file in weights:
            refuse_quantized(file)
        for file in [Path(folder, name) for name in more]:
            json.loads(file.read_text("utf-8"))
    except Exception as error:  # safetensors has its own, which is no OSError
        raise ValueError(
            f"{file} is missing, broken or not what is read here ({type(error).__name__}: {error})."
            " Get it again: weights come only from whole safetensors, in floats"
        ) from None
    return config, weights


def read_config(file):
    config = json.loads(file.read_text("utf-8"))
    has_text = config.get("text_config") or config.get("hidden_size")  # older ones are flat
    if not has_text or not config.get("vision_config"):
        raise KeyError("text_config, vision_config: not of a vision-language model")
    return config


def refuse_quantized(file):
    """Opens a file of safetensors, which raises where it is cut short."""
    with safe_open(file, "pt") as tensors:
        kinds = {tensors.get_slice(key).get_dtype() for key in tensors.keys()}
    odd = sorted(kinds.difference(FLOATS))
    if odd:
        raise TypeError(f"numbers of type {odd[0]}: quantized?")


def expect_none(folder, odd):
    """ValueError for tensors that are missing, too many or of a wrong shape: transformers only
    warns, and draws numbers.
    """
    if odd:
        raise ValueError(
            f"{folder}: its tensors and its config.json differ in {len(odd)} names or shapes, "
            f"first {min(map(str, odd))}; get it again, or start from another checkpoint"
        )


def copy_processor(source, folder):
    """Copy tokenizer, image settings and the like; what is there already stays."""
    for pattern in PROCESSOR_FILES:
        for file in Path(source).glob(pattern):
            if file.is_file() and not Path(folder, file.name).exists():
                shutil.copy(file, folder)


# ------------------------------------------------------------- for transformers 4.57 and 5 alike
def open_config(path):
    """transformers' configuration of a checkpoint's folder or config.json. A tied head counts where
    either version says it: 4.57 in the text model's settings, 5 in the whole model's.
    """
    config = AutoConfig.from_pretrained(path, trust_remote_code=False)
    settings, _ = config.get_config_dict(path)
    for part in (settings, settings.get("text_config", {})):
        if part.get("tie_word_embeddings"):
            config.tie_word_embeddings = True
    return config


def write_config(settings, folder, tied):
    """Write config.json, from a dict, so that both versions read the same from it. tied: whether
    the head is the embedding, and so is not among the tensors.

    Rotary settings that differ by layer type (Gemma 3's) stay as version 5 spells them: 4.57 has no
    one spelling of them, and takes the class's own settings in their place.
    """
    text = settings["text_config"]
    settings["tie_word_embeddings"] = tied
    text["tie_word_embeddings"] = tied
    rotary = dict(text.get("rope_parameters") or {})  # as 5 spells them
    if any(isinstance(value, dict) for value in rotary.values()):  # of each layer type its own
        rotary = {}
    for name in ("rope_theta", "partial_rotary_factor"):
        if name in rotary:
            text[name] = rotary.pop(name)
    if rotary:
        text["rope_scaling"] = rotary
    if "num_local_experts" in text:
        text["num_experts"] = text["num_local_experts"]
    Path(folder, "config.json").write_text(json.dumps(settings, indent=2))


def with_older_experts(state):
    """A state dict of a Qwen3-VL-MoE with the layers' experts as 4.57 has them, (E, D, 2I) and
    (E, I, D). Version 5 has (E, 2I, D) and (E, D, I), and reads both, which it tells apart by their
    shapes: where these are square, they stay as they are.
    """
    converted = {}
    for key, tensor in state.items():
        if ".mlp.experts." in key:
            rows, columns = tensor.shape[1:]
            tensor = tensor if rows == columns else tensor.transpose(1, 2).contiguous()
        converted[key] = tensor
    return converted


# ------------------------------------------------------------------------------- discriminator
def experts_of(config):
    """The number of experts of a discriminator's mixtures, from its config.json as a dict; 0 where
    it is dense. A dense one of a policy that is a mixture itself has the policy's experts: they are
    layers of transformers' own.
    """
    if config.get("discriminator") == "dense":
        return 0
    return config["text_config"].get("num_experts") or 0


def write_backbone(state, config, extra, source, folder, mixture=None):
    """Write a discriminator; rank 0 does.

    state: full state dict of a model without language-model head. config: its transformers
    configuration; extra: fields added to config.json. source: checkpoint whose processor files are
    copied. mixture: (experts, experts per token) where layers became mixtures; then a Qwen3-VL's
    configuration is Qwen3-VL-MoE's of transformers 4.57, as the released discriminator's.
    """
    if not is_main():
        return
    settings = config.to_dict()
    if mixture:
        settings = as_mixture(settings, *mixture)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    # It has no head; whoever opens it as a model with one gets the embedding, and no random one.
    write_config(settings | extra, folder, tied=True)
    tensors = {key: tensor.contiguous() for key, tensor in state.items()}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    copy_processor(source, folder)


def as_mixture(settings, experts, experts_per_token):
    """The configuration of a dense model, a dict -> that of its upcycled copy."""
    text = settings["text_config"]
    text["moe_intermediate_size"] = text["intermediate_size"]
    text["num_experts"] = experts
    text["num_experts_per_tok"] = experts_per_token
    text["norm_topk_prob"] = True
    text["decoder_sparse_step"] = 1
    text["mlp_only_layers"] = []
    if settings["model_type"] == "qwen3_vl":
        text["model_type"] = "qwen3_vl_moe_text"
        settings["model_type"] = "qwen3_vl_moe"
        settings["architectures"] = ["Qwen3VLMoeForConditionalGeneration"]
    # Other families have no such class in transformers: only `read_backbone` opens theirs.
    settings["transformers_version"] = "4.57.0"
    return settings


def as_dense(settings):
    """The configuration of an upcycled model, a dict -> that of the dense model it is a copy of."""
    if settings["model_type"] != "qwen3_vl_moe":
        return settings
    text = {**settings["text_config"], "model_type": "qwen3_vl_text"}
    text["intermediate_size"] = text["moe_intermediate_size"]
    vision = {**settings["vision_config"], "model_type": "qwen3_vl"}
    return {**settings, "model_type": "qwen3_vl", "text_config": text, "vision_config": vision}


def read_backbone(path):
    """Open what `write_backbone` wrote -> (dense model without head and with random weights, all
    tensors, config as a dict).

    path: a folder, a run folder, its last/ or warmup/, or the hub's model of that name. Raises
    ValueError for a mixture's experts in another layout than 4.57's, (E, D, 2I) and (E, I, D):
    shapes cannot tell it from version 5's, (E, 2I, D), where 2I = D or I = D, so the version in the
    configuration decides.
    """
    folder = find(path, ("last/discriminator", "discriminator", "warmup/last", "last", ""))
    config, weights = read_files(folder)
    dense = config
    if experts_of(config):
        version = str(config.get("transformers_version"))
        if not version.startswith("4."):
            raise ValueError(
                f"{folder}: its experts were saved by transformers {version}; only the layout of "
                "version 4 is read. Save it again with transformers 4.57"
            )
        dense = as_dense(config)
    state = {}
    for file in weights:
        for key, tensor in load_file(file).items():
            if key != "lm_head.weight":
                state[key] = tensor.float()
    settings = AutoConfig.for_model(**dense)
    base = AutoModelForImageTextToText.from_config(settings, dtype=torch.float32).model
    if any(folder.glob("p*processor_config.json")):
        base.blank_image = blank_image(open_image_processor(folder), base)
    return base, state, config


# What two models have to agree in to read the same ids and pixels, by the part of a configuration
# that says it. A family has some of these.
INPUT = {
    "text_config": ("vocab_size",),
    "vision_config": ("patch_size", "spatial_merge_size", "image_size"),
    "": (
        "image_token_id",
        "scale_factor",
        "downsample_ratio",
        "downsample_mode",
        "mm_tokens_per_image",
        "image_grid_pinpoints",
    ),
}


def same_input(a, b):
    """ValueError where two configurations do not read the same token ids and images."""
    for part, names in INPUT.items():
        mine = getattr(a, part) if part else a
        theirs = getattr(b, part) if part else b
        for name in names:
            first = getattr(mine, name, None)
            second = getattr(theirs, name, None)
            if first != second:
                raise ValueError(
                    f"discriminator and policy differ in {name} ({first}, {second}), so they "
                    "cannot read the same tokens and images: upcycle a checkpoint of the policy's "
                    "family (--disc_init)"
                )
