"""Families beside Qwen-VL: small ones, saved by transformers itself, opened by our loader. Forests
equal separate rows by plain transformers, in logits and gradients; tokens and tensors of images are
its processors'."""

import copy
import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModelForImageTextToText,
    AutoTokenizer,
    PreTrainedTokenizerFast,
)
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING

import align
import model
from data import SYSTEM_PROMPT, open_encoder, to_example
from engine.attention import _tensors, forward_pack
from engine.families import text_of, windows_of
from engine.files import same_input
from engine.images import make_processor, together
from engine.packs import Tree, build_pack, plan
from engine.ranks import setup
from engine.sampler import all_rows, generate
from engine.store import Store

CHAT = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.content is string %}{{ m.content }}{% else %}{% for c in m.content %}"
    "{{ MARK if c.type == 'image' else c.text }}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# As Idefics3's: a turn's content is always a list.
LISTS = (
    "<|im_start|>{% for m in messages %}{{ m.role | capitalize }}:"
    "{% for c in m.content %}{{ MARK if c.type == 'image' else '' }}"
    "{{ c.text if c.type == 'text' else '' }}{% endfor %}<end_of_utterance>\n{% endfor %}"
    "{% if add_generation_prompt %}Assistant:{% endif %}"
)
# As Gemma's: other names of the roles, another end of turns than the tokenizer's end token.
GEMMA = (
    "{{ bos_token }}{% for m in messages %}<start_of_turn>"
    "{{ 'model' if m.role == 'assistant' else m.role }}\n"
    "{% if m.content is string %}{{ m.content }}{% else %}{% for c in m.content %}"
    "{{ MARK if c.type == 'image' else c.text }}{% endfor %}{% endif %}<end_of_turn>\n{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
TEXT = dict(
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    intermediate_size=48,
    max_position_embeddings=4096,
    pad_token_id=None,
    bos_token_id=None,
)
VISION = dict(
    hidden_size=16,
    num_hidden_layers=2,
    num_attention_heads=2,
    intermediate_size=24,
    image_size=16,
    patch_size=4,
)
TILES = {"height": 16, "width": 16}
NORM = dict(image_mean=[0.5] * 3, image_std=[0.5] * 3)


def internvl(ids):
    vision = VISION | dict(image_size=[16, 16], patch_size=[4, 4], norm_type="layer_norm")
    return dict(
        config=dict(
            text_config=dict(model_type="qwen2"),
            vision_config=vision,
            image_token_id=ids["<IMG_CONTEXT>"],
            downsample_ratio=0.5,
        ),
        images=dict(image_processor_type="GotOcr2ImageProcessor", size=TILES, max_patches=4),
        processor=dict(image_seq_length=4),
    )


def idefics3(ids):
    return dict(
        config=dict(
            text_config=dict(model_type="llama"),
            vision_config=VISION,
            image_token_id=ids["<image>"],
            scale_factor=2,
        ),
        images=dict(
            image_processor_type="Idefics3ImageProcessor",
            size={"longest_edge": 48},
            max_image_size={"longest_edge": 16},
        ),
        processor=dict(image_seq_len=4),
        chat=LISTS,
        end="<end_of_utterance>",
    )


def smolvlm(ids):
    made = idefics3(ids)
    made["images"]["image_processor_type"] = "SmolVLMImageProcessor"
    return made


def llava_onevision(ids):
    pinpoints = [[16, 16], [16, 32], [32, 16], [32, 32], [16, 48]]
    return dict(
        config=dict(
            text_config=dict(model_type="qwen2"),
            vision_config=VISION | dict(model_type="siglip_vision_model", vision_use_head=False),
            image_token_index=ids["<image>"],
            video_token_index=ids["<video>"],
            image_grid_pinpoints=pinpoints,
            vision_feature_layer=-1,
        ),
        images=dict(
            image_processor_type="LlavaOnevisionImageProcessor",
            size=TILES,
            image_grid_pinpoints=pinpoints,
        ),
        processor=dict(
            num_image_tokens=16,
            vision_feature_select_strategy="full",
            vision_aspect_ratio="anyres_max_9",
        ),
    )


def gemma3(ids):
    return dict(
        config=dict(
            text_config=dict(
                model_type="gemma3_text",
                num_hidden_layers=3,
                layer_types=["sliding_attention", "full_attention", "sliding_attention"],
                sliding_window=9,
                query_pre_attn_scalar=8,
            ),
            vision_config=VISION | dict(model_type="siglip_vision_model", vision_use_head=False),
            image_token_index=ids["<image_soft_token>"],
            boi_token_index=ids["<start_of_image>"],
            eoi_token_index=ids["<end_of_image>"],
            mm_tokens_per_image=4,
        ),
        images=dict(image_processor_type="Gemma3ImageProcessor", size=TILES),
        processor=dict(image_seq_length=4),
        chat=GEMMA,
        end="<end_of_turn>",
    )


def llava(ids):
    return dict(
        config=dict(
            text_config=dict(model_type="llama"),
            vision_config=VISION | dict(model_type="clip_vision_model"),
            image_token_index=ids["<image>"],
            vision_feature_layer=-2,
        ),
        images=dict(image_processor_type="CLIPImageProcessor", size=TILES, crop_size=TILES),
        processor=dict(
            patch_size=4, vision_feature_select_strategy="default", num_additional_image_tokens=1
        ),
    )


def llava_next(ids):
    made = llava(ids)
    pinpoints = [[16, 32], [32, 16], [32, 32]]
    made["config"]["image_grid_pinpoints"] = pinpoints
    made["images"] |= dict(
        image_processor_type="LlavaNextImageProcessor",
        image_grid_pinpoints=pinpoints,
        size={"shortest_edge": 16},
    )
    return made


def mistral3(ids):
    return dict(
        config=dict(
            text_config=dict(model_type="mistral", sliding_window=7),
            vision_config=VISION | dict(model_type="pixtral", image_size=64, head_dim=8),
            image_token_index=ids["[IMG]"],
            spatial_merge_size=2,
        ),
        images=dict(
            image_processor_type="PixtralImageProcessor",
            size={"longest_edge": 48},
            patch_size={"height": 4, "width": 4},
        ),
        processor=dict(patch_size=4, spatial_merge_size=2),
    )


PATCHES = dict(size={"shortest_edge": 64, "longest_edge": 64 * 40}, patch_size=4, merge_size=2)
ROPE = {"rope_type": "default", "mrope_section": [2, 1, 1], "rope_theta": 10000.0}


def qwen2_5_vl(ids):
    """With a window in one layer of its text model, and others in its tower."""
    return dict(
        config=dict(
            text_config=dict(
                rope_parameters=ROPE,
                use_sliding_window=True,
                sliding_window=6,
                layer_types=["sliding_attention", "full_attention"],
            ),
            vision_config=dict(
                depth=2,
                hidden_size=16,
                num_heads=2,
                intermediate_size=24,
                out_hidden_size=32,
                patch_size=4,
                window_size=16,
                fullatt_block_indexes=[1],
            ),
            image_token_id=ids["<image>"],
            video_token_id=ids["<video>"],
        ),
        images=PATCHES | dict(image_processor_type="Qwen2VLImageProcessor"),
        processor={},
    )


def glm4v(ids):
    return dict(
        config=dict(
            text_config=dict(rope_parameters=ROPE | {"partial_rotary_factor": 1.0}),
            vision_config=dict(
                depth=2,
                hidden_size=16,
                num_heads=2,
                intermediate_size=24,
                out_hidden_size=32,
                patch_size=4,
                image_size=32,
            ),
            image_token_id=ids["<image>"],
            video_token_id=ids["<video>"],
            image_start_token_id=ids["<img>"],
            image_end_token_id=ids["</img>"],
        ),
        images=PATCHES | dict(image_processor_type="Glm4vImageProcessor"),
        processor={},
    )


def hunyuan_vl(ids):
    return dict(
        config=dict(
            text_config=dict(
                rope_parameters={
                    "rope_type": "default",
                    "rope_theta": 10000.0,
                    "mrope_section": [1, 1, 1, 1],
                }
            ),
            vision_config=VISION | dict(out_hidden_size=32, text_hidden_size=32),
            image_token_id=ids["<image>"],
            im_start_id=ids["<img>"],
            im_end_id=ids["</img>"],
        ),
        images=PATCHES | dict(image_processor_type="HunYuanVLImageProcessor"),
        processor={},
    )


def paddleocr_vl(ids):
    return dict(
        config=dict(
            text_config=dict(rope_parameters=ROPE),
            vision_config=VISION | dict(image_size=32, spatial_merge_size=2),
            image_token_id=ids["<image>"],
            video_token_id=ids["<video>"],
        ),
        images=PATCHES | dict(image_processor_type="PaddleOCRVLImageProcessor"),
        processor={},
    )


def ernie4_5_vl_moe(ids):
    return dict(
        config=dict(
            text_config=dict(
                rope_parameters=ROPE | {"mrope_section": [1, 1, 2]},
                moe_intermediate_size=[24, 16],
                moe_k=2,
                moe_num_experts=4,
                moe_num_shared_experts=1,
                mlp_layer_types=["dense", "sparse"],
            ),
            vision_config=dict(
                depth=2, hidden_size=16, num_heads=2, intermediate_size=24, patch_size=4
            ),
            image_token_id=ids["<image>"],
            video_token_id=ids["<video>"],
            image_start_token_id=ids["<img>"],
            image_end_token_id=ids["</img>"],
        ),
        images=PATCHES | dict(image_processor_type="Ernie4_5_VLMoeImageProcessor"),
        processor={},
    )


def aya_vision(ids):
    return dict(
        config=dict(
            text_config=dict(
                model_type="cohere2",
                layer_types=["sliding_attention", "full_attention"],
                sliding_window=9,
            ),
            vision_config=VISION | dict(model_type="siglip_vision_model", vision_use_head=False),
            image_token_index=ids["<IMG_CONTEXT>"],
            downsample_factor=2,
        ),
        images=dict(image_processor_type="GotOcr2ImageProcessor", size=TILES, max_patches=3),
        processor=dict(
            patch_size=4,
            img_size=16,
            downsample_factor=2,
            image_token="<image>",
            img_patch_token="<IMG_CONTEXT>",
            start_of_img_token="<img>",
            end_of_img_token="</img>",
        ),
    )


def paligemma(ids):
    return dict(
        config=dict(
            text_config=dict(model_type="gemma"),
            vision_config=VISION | dict(model_type="siglip_vision_model", vision_use_head=False),
            image_token_index=ids["<image>"],
            projection_dim=32,
        ),
        images=dict(image_processor_type="SiglipImageProcessor", size=TILES),
        processor={},
    )


def gemma4(ids):
    return dict(
        config=dict(
            text_config=dict(
                model_type="gemma4_text",
                num_hidden_layers=3,
                layer_types=["sliding_attention", "sliding_attention", "full_attention"],
                sliding_window=9,
                global_head_dim=8,
                hidden_size_per_layer_input=0,
                num_kv_shared_layers=0,
                pad_token_id=0,
                final_logit_softcapping=30.0,
            ),
            vision_config=VISION | dict(model_type="gemma4_vision", head_dim=8),
            audio_config=None,
            image_token_id=ids["<image>"],
        ),
        images=dict(image_processor_type="Gemma4ImageProcessor"),
        processor={},
    )


def minicpmv4_6(ids):
    """Linear and full attention; patches of all images in one row, slices beside an overview."""
    return dict(
        config=dict(
            text_config=dict(
                linear_key_head_dim=8,
                linear_value_head_dim=8,
                linear_num_key_heads=2,
                linear_num_value_heads=2,
                layer_types=["linear_attention", "full_attention"],
                rope_parameters=ROPE | {"partial_rotary_factor": 1.0},
            ),
            vision_config=VISION,
            insert_layer_id=0,
            image_token_id=ids["<image>"],
            video_token_id=ids["<video>"],
        ),
        images=dict(
            image_processor_type="MiniCPMV4_6ImageProcessor",
            scale_resolution=24,
            patch_size=4,
            max_slice_nums=4,
        ),
        processor={},
    )


def minicpmv4_7(ids):
    """Positions of slices are those of their places in the whole image."""
    made = minicpmv4_6(ids)
    made["config"] |= dict(
        image_start_id=ids["<img>"],
        image_end_id=ids["</img>"],
        slice_start_id=ids["<row_1_col_1>"],
        slice_end_id=ids["<row_1_col_2>"],
        newline_id=ids["Ċ"],
    )
    return made


def minicpm_ocr(ids):
    made = minicpmv4_6(ids)
    made["images"]["image_processor_type"] = "MiniCPMOcrImageProcessor"
    return made


def llava_mistral(ids):
    """With a window that its attention reads off the configuration."""
    made = llava(ids)
    made["config"]["text_config"] = dict(model_type="mistral", sliding_window=12)
    return made | dict(type="llava")


def internvl_moe(ids):
    """A policy of mixture type."""
    made = internvl(ids)
    made["config"]["text_config"] = dict(
        model_type="qwen3_moe", num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16
    )
    return made | dict(type="internvl")


SLOW = {
    "internvl_moe": internvl_moe,
    "llava": llava,
    "llava_mistral": llava_mistral,
    "llava_next": llava_next,
    "qwen2_5_vl": qwen2_5_vl,
    "glm4v": glm4v,
    "hunyuan_vl": hunyuan_vl,
    "paddleocr_vl": paddleocr_vl,
    "aya_vision": aya_vision,
    "minicpmv4_6": minicpmv4_6,
    "minicpmv4_7": minicpmv4_7,
}
FAST = {
    "internvl": internvl,
    "idefics3": idefics3,
    "smolvlm": smolvlm,
    "llava_onevision": llava_onevision,
    "gemma3": gemma3,
}
REFUSED = {  # and why
    "mistral3": (mistral3, "for torchvision alone"),
    "ernie4_5_vl_moe": (ernie4_5_vl_moe, "depends on moe_mm_token_type_ids"),
    "paligemma": (paligemma, "masks are neither causal nor causal but for images"),
    "gemma4": (gemma4, "its logits are more than hidden states times the head"),
    "minicpm_ocr": (minicpm_ocr, "for torchvision alone"),
}
FAMILIES = FAST | SLOW | {name: made for name, (made, _) in REFUSED.items()}
PARAMETERS = [*FAST, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)]
SPECIAL = [
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<image>",
    "<video>",
    "<img>",
    "</img>",
    "<IMG_CONTEXT>",
    "<fake_token_around_image>",
    "<end_of_utterance>",
    "<global-img>",
    *(f"<row_{row}_col_{column}>" for row in range(1, 5) for column in range(1, 5)),
    "[IMG]",
    "[IMG_BREAK]",
    "[IMG_END]",
    "<start_of_image>",
    "<end_of_image>",
    "<image_soft_token>",
    "<start_of_turn>",
    "<end_of_turn>",
]
NAMED = {
    "internvl": dict(
        start_image_token="<img>",
        end_image_token="</img>",
        context_image_token="<IMG_CONTEXT>",
        video_token="<video>",
    ),
    "gemma3": dict(
        image_token="<image_soft_token>", boi_token="<start_of_image>", eoi_token="<end_of_image>"
    ),
}
IMAGE = dict(image_token="<image>", video_token="<video>")
ENDS = dict(image_start_token="<img>", image_end_token="</img>")
NAMED["internvl_moe"] = NAMED["internvl"]
NAMED |= {
    "qwen2_5_vl": IMAGE,
    "glm4v": IMAGE,
    "hunyuan_vl": IMAGE | ENDS,
    "paddleocr_vl": IMAGE,
    "ernie4_5_vl_moe": IMAGE
    | ENDS
    | dict(video_start_token="<row_1_col_1>", video_end_token="<row_1_col_2>"),
}
SLICES = dict(
    slice_start_token="<row_1_col_1>",
    slice_end_token="<row_1_col_2>",
    image_id_start_token="<row_2_col_1>",
    image_id_end_token="<row_2_col_2>",
)
NAMED["minicpmv4_6"] = NAMED["minicpmv4_7"] = IMAGE | ENDS | SLICES
MARKS = {
    "internvl": "<IMG_CONTEXT>",
    "internvl_moe": "<IMG_CONTEXT>",
    "gemma3": "<start_of_image>",
    "mistral3": "[IMG]",
    # Their positions tell images apart by what stands between them.
    "qwen2_5_vl": "<img><image></img>",
    "glm4v": "<img><image></img>",
    "hunyuan_vl": "<img><image></img>",
    "paddleocr_vl": "<img><image></img>",
}


def tokenizer_of(family):
    """Of bytes, and of the marks of all families here."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate([*SPECIAL, *letters])}
    raw = Tokenizer(models.BPE(vocabulary, []))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    named = NAMED.get(family, {})
    others = [token for token in SPECIAL if token not in named.values()]
    return PreTrainedTokenizerFast(
        tokenizer_object=raw,
        pad_token="<|endoftext|>",
        bos_token="<|endoftext|>",
        eos_token="<|im_end|>",
        extra_special_tokens=named | {f"mark_{i}": token for i, token in enumerate(others)},
    )


def save_checkpoint(family, folder):
    """A small random model of a family, with its processor, written by transformers."""
    tokenizer = tokenizer_of(family)
    made = FAMILIES[family](tokenizer.get_vocab())
    if made.get("type", family) not in CONFIG_MAPPING:
        pytest.skip("unknown to this version of transformers")
    mark = MARKS.get(family, "<image>")
    tokenizer.chat_template = made.get("chat", CHAT).replace("MARK", f"'{mark}'")
    settings = made["config"]
    end = tokenizer.convert_tokens_to_ids(made.get("end", "<|im_end|>"))
    text = TEXT | {"vocab_size": len(tokenizer), "eos_token_id": end} | settings["text_config"]
    config = AutoConfig.for_model(made.get("type", family), **settings | {"text_config": text})
    torch.manual_seed(0)
    hf = AutoModelForImageTextToText.from_config(config)
    for parameter in hf.parameters():
        if parameter.ndim > 1:
            parameter.data.normal_(0, 0.15)
    hf.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(NORM | made["images"]))
    (folder / "processor_config.json").write_text(json.dumps(made["processor"]))
    return folder


class Family:
    """A family's checkpoint, opened by us, by plain transformers, and its processor."""

    def __init__(self, name, folder):
        self.folder = save_checkpoint(name, folder)
        self.policy = model.load(self.folder).eval()
        self.encoder = self.policy.encoder
        self.plain = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
        made = FAMILIES[name](self.encoder.tokenizer.get_vocab())
        self.end = self.encoder.tokenizer.convert_tokens_to_ids(made.get("end", "<|im_end|>"))
        made = made["processor"]
        kind = PROCESSOR_MAPPING[type(self.plain.config)]
        self.is_dense = name != "internvl_moe"
        tokenizer, images = self.encoder.tokenizer, self.encoder.images.image_processor
        self.processor = make_processor(kind, tokenizer, images, made)

    def inputs(self, example, ids=(), asks=True):
        """What transformers' processor makes of a row, with the ids of a response behind it."""
        messages = [
            {"role": turn["role"], "content": content_of(turn["content"])}
            for turn in example.messages
        ]
        text = self.encoder.tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=asks
        )
        options = dict(images=[example.images]) if example.images else {}
        made = self.processor(text=[text], return_tensors="pt", add_special_tokens=False, **options)
        ids = torch.tensor([ids], dtype=torch.long)
        made["input_ids"] = torch.cat([made["input_ids"], ids], 1)
        made["attention_mask"] = torch.ones_like(made["input_ids"])
        for kinds in ("token_type_ids", "mm_token_type_ids"):
            if kinds in made:
                made[kinds] = torch.cat([made[kinds], torch.zeros_like(ids)], 1)
        return dict(made)

    def logits(self, hf, example, ids):
        """Plain transformers' logits (n, V) that predict the ids of a response."""
        return hf(**self.inputs(example, ids)).logits[0, -len(ids) - 1 : -1]


def content_of(text):
    content = []
    for i, piece in enumerate(text.split("<image>")):
        content += [{"type": "image"}] if i else []
        content += [{"type": "text", "text": piece}] if piece else []
    return content


def picture(width, height, seed=0):
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(0, 256, (height, width, 3), generator=generator, dtype=torch.uint8)
    return Image.fromarray(pixels.numpy())


def row(*sizes):
    """A row with images of these sizes."""
    images = [picture(*size, seed) for seed, size in enumerate(sizes)]
    question = "".join(f"see <image> nr {i}\n" for i in range(len(images))) + "how many?"
    return to_example({"question": question, "images": images, "answer": "2"}, "here:1")


ROWS = [row(), row((40, 24)), row((20, 20), (64, 16)), row((16, 60))]
RESPONSES = ["<caption>\na\n</caption>", "two red", "x"]
_opened = {}


@pytest.fixture(scope="session", params=PARAMETERS)
def family(request, tmp_path_factory):
    return opened(request.param, tmp_path_factory)


def opened(name, tmp_path_factory):
    if name not in _opened:
        _opened[name] = Family(name, tmp_path_factory.mktemp(name))
    return _opened[name]


def trees_of(family):
    responses = [family.encoder.response(text) for text in RESPONSES]
    return [Tree(family.encoder.prompt(example), responses) for example in ROWS], responses


@pytest.mark.parametrize("n", range(len(ROWS)))
def test_a_prompt_is_what_the_processor_makes(family, n):
    prompt = family.encoder.prompt(ROWS[n])
    plain = family.inputs(ROWS[n])
    assert prompt.ids.tolist() == plain["input_ids"][0].tolist()
    for name, tensor in prompt.images.items():
        assert torch.equal(tensor, plain[name]), name
    images = [image.size for image in ROWS[n].images]
    rest, of_images, trained = family.encoder.lengths(ROWS[n], images)
    assert (rest, of_images, trained) == (len(prompt.ids), int(prompt.image_mask.sum()), 0)


def test_images_are_appended_where_the_processor_appends_them(tmp_path_factory):
    """Patches of all images in one row, and their numbers: as of the processor's own batch."""
    family = opened("minicpmv4_6", tmp_path_factory)
    chosen = (ROWS[2], ROWS[1])
    prompts = [family.encoder.prompt(row) for row in chosen]
    made = together([prompt.images for prompt in prompts])
    images = [row.images for row in chosen]
    expected = family.processor.image_processor(images=images, return_tensors="pt")
    assert {*made} == {"pixel_values", "target_sizes"} and made["pixel_values"].shape[0] == 1
    for name, tensor in made.items():
        assert torch.equal(tensor, expected[name]), name
    assert len(family.policy.hf.model.blank_image["target_sizes"]) == 1  # without slices
    for number in range(2):
        assert f"<row_2_col_1>{number}<row_2_col_2><img>" in text_with_marks(family, prompts[0])


def text_with_marks(family, prompt):
    return family.encoder.tokenizer.decode(prompt.ids, skip_special_tokens=False)


def test_images_that_cannot_be_appended_are_refused(tmp_path_factory):
    """Here two prompts' tensors are larger in two dimensions than one's."""
    images = copy.copy(opened("internvl", tmp_path_factory).encoder.images)

    class Grows(type(images.image_processor)):
        def __call__(self, images, **_):
            return {"pixel_values": torch.zeros(len(images), 3, len(images))}

    images.image_processor = Grows()
    with pytest.raises(ValueError, match=r"\[1, 3, 1\] .* and \[2, 3, 2\] .*one dimension only"):
        images._along()


def test_turns_end_as_the_template_ends_them(family):
    """Two turns of the assistant: ids as the whole text has them, its words and end tokens are
    trained on, and nothing that stands for images is ever sampled."""
    encoder, example = family.encoder, ROWS[1]
    turns = [{"role": "assistant", "content": "one"}, {"role": "user", "content": "sure?"}]
    whole = [*example.messages, *turns, {"role": "assistant", "content": "two"}]
    prompt, trained = encoder.conversation(replace(example, messages=whole))
    plain = family.inputs(replace(example, messages=whole), asks=False)
    ids = plain["input_ids"][0].tolist()
    assert prompt.ids.tolist() == ids[: len(prompt.ids)]
    assert ids[len(prompt.ids) - 1] == encoder.eos == family.end
    expected = [*encoder.response("one"), *encoder.response("two")]
    assert prompt.ids[trained].tolist() == expected and expected.count(encoder.eos) == 2
    vocabulary = encoder.tokenizer.get_vocab()
    assert encoder.image_id in encoder.banned
    assert vocabulary[encoder.images.mark] in encoder.banned


def test_limits_of_images(family):
    folder, base = family.folder, family.policy.hf.model
    sizes = [image.size for image in ROWS[3].images]
    if family.encoder.images.limits:
        small = open_encoder(folder, base, max_pixels=256)
        assert small.lengths(ROWS[3], sizes)[1] < family.encoder.lengths(ROWS[3], sizes)[1]
        assert small.prompt(ROWS[3]).image_mask.sum() == small.lengths(ROWS[3], sizes)[1]
    else:
        with pytest.raises(ValueError, match="--max_pixels: .* scales no image to an area"):
            open_encoder(folder, base, max_pixels=256)
    blind = open_encoder(folder, base, blind=True).prompt(ROWS[3])
    assert blind.images == {} and not blind.image_mask.any()


def test_a_forest_equals_separate_rows(family):
    """In log-probs and in all gradients: prompts with no image, one, two, of several sizes."""
    trees, responses = trees_of(family)
    (part,) = plan(trees, 100_000)
    pack = build_pack(trees, part)
    family.policy.zero_grad()
    logp = family.policy(pack)
    weights = torch.linspace(-1, 1, len(logp))
    (weights * logp).sum().backward()
    found = {name: p.grad for name, p in family.policy.hf.named_parameters()}

    family.plain.zero_grad()
    expected = []
    for t, child in pack.children:
        logits = family.logits(family.plain, ROWS[t], responses[child]).log_softmax(-1)
        expected.append(logits.gather(1, torch.tensor(responses[child])[:, None])[:, 0])
    expected = torch.cat(expected)
    torch.testing.assert_close(logp, expected, rtol=1e-5, atol=1e-5)
    (weights * expected).sum().backward()
    for name, p in family.plain.named_parameters():
        if p.grad is not None:
            torch.testing.assert_close(found[name], p.grad, rtol=1e-4, atol=1e-5, msg=name)


def test_greedy_equals_generate_and_log_probs_the_trainers(family):
    encoder, hf = family.encoder, family.policy.hf
    prompts = [encoder.prompt(example) for example in ROWS]
    options = dict(eos=encoder.eos_ids, banned=encoder.banned, slots=3)
    seeds = [(0, p) for p in range(len(prompts))]
    greedy = generate(hf, prompts, all_rows(prompts, 1), 14, temperature=0, seeds=seeds, **options)
    for example, rollout in zip(ROWS, greedy, strict=True):
        inputs = family.inputs(example)
        expected = family.plain.generate(
            **inputs,
            max_new_tokens=14,
            do_sample=False,
            eos_token_id=list(encoder.eos_ids),
            pad_token_id=0,
            suppress_tokens=list(encoder.banned),
        )
        assert rollout.ids == expected[0, inputs["input_ids"].shape[1] :].tolist()
    rollouts = generate(hf, prompts, all_rows(prompts, 2), 14, seeds=seeds, **options)
    trees = [
        Tree(prompt, [rollouts[2 * p].ids, rollouts[2 * p + 1].ids])
        for p, prompt in enumerate(prompts)
    ]
    with torch.no_grad():
        logp = family.policy(build_pack(trees, plan(trees, 100_000)[0]), banned=encoder.banned)
    sampled = torch.tensor([x for rollout in rollouts for x in rollout.logps])
    torch.testing.assert_close(logp, sampled, rtol=1e-4, atol=1e-5)


def test_a_frozen_image_side_is_not_trained(family):
    """Tower, projector and loose parameters such as a newline's; the text model and head are."""
    hf = copy.deepcopy(family.policy.hf)
    model.freeze_vision(hf.model)
    text = {id(p) for p in (*hf.model.get_decoder().parameters(), *hf.lm_head.parameters())}
    assert {id(p) for p in hf.parameters() if p.requires_grad} == text
    tree = Tree(family.encoder.prompt(ROWS[1]), [family.encoder.response("two")])
    forward_pack(hf.model, build_pack([tree], [(0, [0])])).sum().backward()
    assert all(p.grad is None for p in hf.parameters() if id(p) not in text)


# SmolVLM casts features to the dtype of its first parameter, InternVL to that of the embeddings.
BFLOAT16 = [
    pytest.param(name, marks=() if name in ("internvl", "smolvlm") else pytest.mark.slow)
    for name in (*FAST, *SLOW)
]

# How far gradients may be from those of float32, where that is more than 0.2 of them.
FAR = {
    "internvl_moe": 0.5,  # its router chooses otherwise where two experts are near
    "minicpmv4_6": 0.25,  # plain transformers in bfloat16 is off by 0.20
    "minicpmv4_7": 0.25,  # by 0.21
}


@pytest.mark.parametrize("frozen", [True, False])
@pytest.mark.parametrize("name", BFLOAT16)
def test_a_step_in_bfloat16_with_checkpointing(name, frozen, tmp_path_factory):
    """Sharded, on one rank: log-probs and gradients are nearly those of float32, and the features
    of a frozen image side have no graph."""
    family = opened(name, tmp_path_factory)
    args = SimpleNamespace(dtype="bfloat16", checkpointing=True, offload=False, nodes=1)
    ranks = setup(SimpleNamespace(device="cpu", seed=0))
    policy = model.load(family.folder).train()
    base = policy.hf.model
    if frozen:
        model.freeze_vision(base)
    model.shard(policy, base, args, ranks)
    have_graph = []
    features_of = base.get_image_features

    def look(*args, **kwargs):
        output = features_of(*args, **kwargs)
        have_graph.extend(feature.requires_grad for feature in _tensors([output.pooler_output]))
        return output

    base.get_image_features = look
    family.policy.zero_grad()
    for chosen in (ROWS, ROWS[:1]):  # with images, and of text alone
        trees = [
            Tree(policy.encoder.prompt(row), [policy.encoder.response("two red")]) for row in chosen
        ]
        pack = build_pack(trees, plan(trees, 100_000)[0])
        logp = policy(pack)
        expected = family.policy(pack)
        assert (logp - expected).abs().mean() < 0.1
        logp.mean().backward()
        expected.mean().backward()
    assert {*have_graph} == {not frozen}
    for ours, theirs in zip(policy.parameters(), family.policy.parameters(), strict=True):
        if ours.grad is None:  # the last layers of some towers are never used
            assert theirs.grad is None or not ours.requires_grad
        elif theirs.grad.norm() > 1e-3:
            off = (ours.grad.full_tensor() - theirs.grad).norm() / theirs.grad.norm()
            assert off < FAR.get(name, 0.2)


def test_what_is_saved_opens_in_plain_transformers(family, tmp_path):
    model.save(family.policy, tmp_path)
    again = AutoModelForImageTextToText.from_pretrained(tmp_path, dtype=torch.float32).eval()
    ids = family.encoder.response("two")
    with torch.no_grad():
        found = family.logits(again, ROWS[2], ids)
        expected = family.logits(family.plain, ROWS[2], ids)
    torch.testing.assert_close(found, expected)
    # The template asks for the three parts where a conversation does not.
    turn = {"role": "user", "content": content_of("how many?")}
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert SYSTEM_PROMPT in tokenizer.apply_chat_template([turn], tokenize=False)
    policy = model.load(tmp_path)
    assert (
        policy.encoder.prompt(ROWS[2]).ids.tolist() == family.encoder.prompt(ROWS[2]).ids.tolist()
    )
    # Saved once more, its settings do not grow.
    model.save(policy, tmp_path / "again")
    first = json.loads((tmp_path / "config.json").read_text())
    assert json.loads((tmp_path / "again/config.json").read_text()) == first


def test_a_discriminator_of_experts_is_the_dense_model_and_opens_again(family, tmp_path):
    """Without noise all experts are the MLP, whatever its form: hidden states stay the same."""
    if not family.is_dense:
        with pytest.raises(ValueError, match="Qwen3MoeSparseMoeBlock .*give --disc dense"):
            align.Discriminator(copy.deepcopy(family.policy.hf.model), "moe")
        return
    base = copy.deepcopy(family.policy.hf.model)
    tree = Tree(family.encoder.prompt(ROWS[2]), [family.encoder.response("two")], [0])
    pack = build_pack([tree], [(0, [0])])
    disc = align.Discriminator(base, "moe", noise=0.0).eval()
    with torch.no_grad():
        expected = forward_pack(family.policy.hf.model, pack)
        found, _, _ = disc(pack)
        torch.testing.assert_close(
            found, disc.v_head(expected[pack.ends]).sum(1), rtol=1e-4, atol=1e-5
        )
    align.save_discriminator(disc, family.folder, tmp_path)
    again = align.open_discriminator(tmp_path).eval()
    with torch.no_grad():
        torch.testing.assert_close(again(pack)[0], found)


def test_a_window_of_the_configuration_alone_is_known(tmp_path_factory):
    """Mistral's attention holds no window, and hands the configuration's on: prompts are not
    shared. Where they are, a window is an error, not left out."""
    family = opened("llava_mistral", tmp_path_factory)
    encoder, hf = family.encoder, family.policy.hf
    assert windows_of(text_of(hf.model)) == [12, 12]
    prompts = [encoder.prompt(ROWS[0])]
    assert len(prompts[0].ids) > 2 * 12
    options = dict(eos=encoder.eos_ids, seeds=[(0,)], share_prompts=True)
    rollouts = generate(hf, prompts, all_rows(prompts, 3), 8, **options)
    tree = Tree(prompts[0], [rollout.ids for rollout in rollouts])
    with torch.no_grad():
        logp = family.policy(build_pack([tree], [(0, [0, 1, 2])]))
    sampled = torch.tensor([x for rollout in rollouts for x in rollout.logps])
    torch.testing.assert_close(logp, sampled, rtol=1e-4, atol=1e-5)
    store = Store(hf, slots=1, share_prompts=True)
    with pytest.raises(ValueError, match="a window, of 12 tokens, so prompts cannot be shared"):
        store.attend(*torch.zeros(3, 1, 4, 1, 8), scaling=1.0, window=12)


@pytest.mark.parametrize("layer_types", [None, ["full_attention", "sliding_attention"]])
def test_layer_types_say_which_layers_have_the_configurations_window(layer_types):
    layers = [SimpleNamespace(self_attn=object()), SimpleNamespace(self_attn=object())]
    config = SimpleNamespace(sliding_window=4, layer_types=layer_types)
    found = windows_of(SimpleNamespace(layers=layers, config=config))
    assert found == [4 if layer_types is None else None, 4]
    layers[1] = SimpleNamespace(self_attn=SimpleNamespace(sliding_window=None))
    layers[0] = SimpleNamespace(linear_attn=object())
    assert windows_of(SimpleNamespace(layers=layers, config=config)) == [None, None]


def test_a_dense_discriminator_of_a_mixture_opens_again(tmp_path, tmp_path_factory):
    """The experts in its configuration are the policy's own, in transformers' layout."""
    family = opened("internvl_moe", tmp_path_factory)
    disc = align.Discriminator(copy.deepcopy(family.policy.hf.model), "dense").eval()
    align.save_discriminator(disc, family.folder, tmp_path)
    again = align.open_discriminator(tmp_path, "dense").eval()
    tree = Tree(family.encoder.prompt(ROWS[2]), [family.encoder.response("two")], [0])
    pack = build_pack([tree], [(0, [0])])
    with torch.no_grad():
        assert torch.equal(again(pack)[0], disc(pack)[0])


def test_a_discriminator_of_another_family_is_refused(family):
    ours = family.policy.hf.config
    same_input(ours, copy.deepcopy(ours))
    theirs = copy.deepcopy(ours)
    theirs.image_token_id = ours.image_token_id + 1
    with pytest.raises(ValueError, match="differ in image_token_id .*--disc_init"):
        same_input(theirs, ours)


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_run_is_refused_at_load(name, tmp_path):
    save_checkpoint(name, tmp_path)
    with pytest.raises(ValueError, match=REFUSED[name][1]):
        model.load(tmp_path)


REFERENCE = "<caption>\na dot\n</caption>\n<think>\none\n</think>\n<answer>\n1\n</answer>"
ROLLOUTS = dict(group_size=3, prompts_per_step=3, max_response=90)
STAGES = {
    "sft": dict(batch=3),
    "align": ROLLOUTS | dict(disc="moe", warmup_steps=0, disc_blind=False),
    "rlvr": ROLLOUTS,
}


def jobs(family, folder, **more):
    """What ranked.py runs: a step of each stage, on rows with no image, one and two."""
    folder.mkdir(exist_ok=True)
    rows = []
    for number, sizes in enumerate([(), [(40, 24)], [(20, 20), (64, 16)]]):
        names = []
        for place, size in enumerate(sizes):
            names.append(f"{number}-{place}.png")
            picture(*size, seed=place).save(folder / names[-1])
        turn = {"role": "user", "content": "<image>" * len(names) + "how many?"}
        answer = {"role": "assistant", "content": REFERENCE}
        written = {"images": names, "reward_model": {"ground_truth": "1"}}
        rows.append((written | {"messages": [turn, answer]}, written | {"prompt": [turn]}))
    files = {
        "sft": [sft for sft, _ in rows],
        "align": [prompt | {"teacher_response": REFERENCE} for _, prompt in rows],
        "rlvr": [prompt for _, prompt in rows],
    }
    made = []
    for stage, flags in STAGES.items():
        if stage == "align" and not family.is_dense:
            flags = flags | dict(disc="dense")
        file = folder / f"{stage}.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in files[stage]))
        flags = flags | dict(policy=str(family.folder), data=str(file), out=str(folder / stage))
        flags |= dict(steps=1, device="cpu", max_prompt=2000) | more
        made.append({"stage": stage, "flags": flags, "sgd": True})
    return made


@pytest.mark.slow
def test_a_step_of_each_stage_on_one_rank_and_on_two(family, tmp_path):
    from test_ranks import on_ranks, same_runs

    for n in (1, 2):
        on_ranks(n, jobs(family, tmp_path / str(n)), tmp_path / str(n))
    for stage in STAGES:
        same_runs(tmp_path / "1" / stage, tmp_path / "2" / stage)


@pytest.mark.slow
def test_a_step_of_each_stage_in_bfloat16(family, tmp_path):
    from test_ranks import on_ranks
    from test_stages import records

    made = jobs(family, tmp_path, dtype="bfloat16", checkpointing=True, freeze_vision=True)
    on_ranks(1, made, tmp_path)
    for stage in STAGES:
        step = records(tmp_path / stage)[-1]
        assert step["skipped"] == 0
        assert step["grad_norm"] > 0 or stage == "rlvr"  # all of a group may be wrong alike
        assert not step.get("logp_diff", 0) > 0.1
        model.load(tmp_path / stage / "last")
