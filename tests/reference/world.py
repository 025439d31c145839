"""
The world of the reference tests: a few rows with pictures, and tiny checkpoints.

The policy is made by hand, not trained: its head prefers, after each word, the words that may
follow it in a well-formed response. So it is the same on every machine, and takes no time. About
half of its responses are malformed at temperature 1: cut short, or astray.

Half of the words have ids beyond 256, and 8 ids of the embedding stand for no word: the sampler
must never draw them.
"""

import json
import random
from pathlib import Path
from types import SimpleNamespace

import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen3VLConfig, Qwen3VLForConditionalGeneration
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

SPECIAL = [
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
]
WORDS = [
    *("<caption>", "</caption>", "<think>", "</think>", "<answer>", "</answer>", "\n"),
    *("system", "user", "assistant", "be", "brief", "count", "pick", "again", "or"),
    *("red", "green", "blue", "square", "dot", "so", "then", "plus", "one", "two", "three", "."),
    *("1", "2", "3", "A", "B"),
]
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }} "
    "{% if m.content is string %}{{ m.content }}{% else %}{% for c in m.content %}"
    "{{ '<|vision_start|><|image_pad|><|vision_end|>' if c.type == 'image' else c.text }}"
    "{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant {% endif %}"
)
# What may follow each word of a response, and how much stronger than others (in nats).
FOLLOWS = {
    "assistant": {"<caption>": 13},
    "<caption>": {"red": 11, "green": 11, "blue": 11, "\n": 10},
    "\n": {"red": 11, "green": 11, "blue": 11},
    "red": {"square": 11, "dot": 11},
    "green": {"square": 11, "dot": 12},
    "blue": {"square": 12, "dot": 11},
    "square": {"</caption>": 12, "red": 10},
    "dot": {"</caption>": 12, "green": 11},
    "</caption>": {"<think>": 13, "plus": 11.5},
    "plus": {"<think>": 12},
    "<think>": {"so": 12, "one": 11},
    "so": {"one": 11, "two": 11},
    "one": {"</think>": 11, "then": 10},
    "two": {"</think>": 11, "then": 10},
    "then": {"one": 11, "two": 10},
    "</think>": {"<answer>": 13},
    "<answer>": {"1": 11.5, "2": 11, "A": 12, "B": 10, "three": 9},
    **{word: {"</answer>": 12} for word in ("1", "2", "A", "B", "three")},
    "</answer>": {"<|im_end|>": 14, "<answer>": 9},
}
UNUSED = 8  # ids without a word
VOCABULARY = 320


def tokenizer():
    """Words as tokens, a line break among them; tags and line breaks need no space around them."""
    words = list(WORDS)
    filler = VOCABULARY - UNUSED - len(SPECIAL) - len(words)
    words += [f"word{i}" for i in range(filler - 1)]
    random.Random(0).shuffle(words)
    ids = {token: i for i, token in enumerate([*SPECIAL, "<unk>", *words])}
    raw = Tokenizer(models.WordLevel(ids, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(" +"), "removed"),
            pre_tokenizers.Split(Regex("\n|</?(caption|think|answer)>"), "isolated"),
        ]
    )
    made = PreTrainedTokenizerFast(
        tokenizer_object=raw,
        unk_token="<unk>",
        pad_token="<|endoftext|>",
        eos_token="<|im_end|>",
        additional_special_tokens=SPECIAL[1:],
        clean_up_tokenization_spaces=False,
    )
    made.chat_template = TEMPLATE
    return made


def config(words, tied, width, layers):
    """A Qwen3-VL of two or three layers, in which one visual token is 8 x 8 pixels."""
    ids = words.get_vocab()
    return Qwen3VLConfig(
        text_config=dict(
            hidden_size=width,
            num_hidden_layers=layers,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=8,
            intermediate_size=40,
            vocab_size=VOCABULARY,
            rope_theta=10000.0,
            rope_scaling={
                "rope_type": "default",
                "mrope_section": [2, 1, 1],
                "mrope_interleaved": True,
            },
            eos_token_id=ids["<|im_end|>"],
            bos_token_id=None,
            pad_token_id=None,
            tie_word_embeddings=tied,
            max_position_embeddings=512,
        ),
        vision_config=dict(
            depth=2,
            hidden_size=16,
            num_heads=2,
            intermediate_size=24,
            patch_size=4,
            spatial_merge_size=2,
            temporal_patch_size=2,
            out_hidden_size=width,
            num_position_embeddings=64,
            deepstack_visual_indexes=[0],
        ),
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
        tie_word_embeddings=tied,
    )


def make_policy(folder, tied=False, width=32, layers=2, seed=0):
    """Write a checkpoint of weights large enough for every mistake to show in what comes out. Where
    the head is not tied, the responses have a form (see FOLLOWS)."""
    words = tokenizer()
    hf = Qwen3VLForConditionalGeneration(config(words, tied, width, layers)).eval()
    random_numbers = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in hf.named_parameters():
            drawn = torch.randn(parameter.shape, generator=random_numbers)
            if parameter.ndim > 1:
                parameter.copy_(drawn * 0.12)
            elif name.endswith("bias"):
                parameter.copy_(drawn * 0.05)
            else:
                parameter.copy_(1 + drawn * 0.05)
        embedding = hf.model.language_model.embed_tokens.weight
        embedding.mul_(2 if tied else 8)
        if not tied:
            prefer(hf.lm_head.weight, embedding, words.get_vocab())
    hf.save_pretrained(folder)
    words.save_pretrained(folder)
    Qwen2VLImageProcessorPil(
        patch_size=4,
        merge_size=2,
        temporal_patch_size=2,
        image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
        size={"shortest_edge": 64, "longest_edge": 64 * 64},
    ).save_pretrained(folder)
    return str(folder)


def prefer(head, embedding, ids):
    """Add to the head's rows (V, D) what makes each word prefer its followers."""
    for word, followers in FOLLOWS.items():
        direction = embedding[ids[word]]
        direction = direction / direction.norm() / len(direction) ** 0.5
        for follower, strength in followers.items():
            head[ids[follower]] += strength * direction


def strengthen_discriminator(folder, seed=1):
    """Overwrite the routers, experts and head of a saved discriminator with weights that are all
    unlike each other: as if a long training lay behind it."""
    file = Path(folder, "model.safetensors")
    state = load_file(file)
    random_numbers = torch.Generator().manual_seed(seed)
    for name, tensor in sorted(state.items()):
        drawn = torch.randn(tensor.shape, generator=random_numbers)
        if "mlp.gate.weight" in name:
            state[name] = drawn * 0.3
        elif "mlp.experts" in name:
            state[name] = tensor + drawn * 0.05
        elif "v_head" in name:
            state[name] = drawn * 0.4
    save_file(state, file, {"format": "pt"})


# ----------------------------------------------------------------------------- rows
def make_pictures(folder, count=6):
    """PNG files of one to four visual tokens, some of them a square -> their names."""
    drawn = random.Random(1)
    names = []
    for number in range(count):
        size = [(8, 8), (16, 16), (8, 24)][number % 3]
        picture = Image.new("RGB", size)
        for x in range(size[0]):
            for y in range(size[1]):
                picture.putpixel((x, y), tuple(drawn.randrange(256) for _ in range(3)))
        names.append(f"picture{number}.png")
        picture.save(folder / names[-1])
    return names


def response(drawn, answer, terse=False):
    """A well-formed demonstration, with white space where it is free."""
    things = [f"{drawn.choice(['red', 'green', 'blue'])} {drawn.choice(['square', 'dot'])}"]
    steps = drawn.choice(["one", "so two"])
    gap = drawn.choice(["", " ", "\n"])
    if not terse:
        things.append("green dot .")
        steps += " then one plus two"
    return (
        f"<caption>{gap}{' '.join(things)}{gap}</caption>{gap}"
        f"<think>{gap}{steps}\n</think>\n<answer> {answer} </answer>{gap}"
    )


def make_world(folder):
    """All files of the tests in `folder` -> their names."""
    folder = Path(folder)
    drawn = random.Random(2)
    pictures = make_pictures(folder)
    align = []
    rl = []
    pairs = []
    messages = []
    conversations = []
    for number in range(10):
        images = [pictures[number % len(pictures)]]
        if number % 5 == 3:
            images.append(pictures[(number + 2) % len(pictures)])
        if number % 5 == 4:
            images = []
        question = "<image>" * len(images) + drawn.choice(["count red", "\ncount green or dot"])
        answer = drawn.choice(["1", "2", "3"] if number % 5 == 2 else ["1", "2"])
        prompt = [{"role": "user", "content": question}]
        if number % 3 == 0:
            prompt.insert(0, {"role": "system", "content": "be brief"})
        row = {"prompt": prompt, "images": images}
        row["reward_model"] = {"style": "rule", "ground_truth": answer}
        demonstration = response(drawn, answer, terse=number % 5 != 3)
        align.append({**row, "teacher_response": demonstration})

        row = {**row, "reward_model": dict(row["reward_model"])}
        if number % 5 == 0:  # nearly every answer is right
            row["reward_model"]["equivalent_answers"] = ["1", "2", "three", "A", "B"]
        elif number % 2:
            row["extra_info"] = {"choices": ["two", "three"]}
            row["reward_model"]["ground_truth"] = "two"
        elif answer == "3":
            row["reward_model"]["equivalent_answers"] = ["three"]
        rl.append(row)

        if len(images) == 1:
            teacher = response(drawn, answer, terse=number % 4)
            student = response(drawn, drawn.choice(["1", "2"]), terse=number % 2)
            pair = {"image": images[0], "prompt": prompt}
            for side, text in (("teacher", teacher), ("student", student)):
                pair[f"{side}_response"] = text
            pairs.append(pair)

        again = {"role": "user", "content": "again"}
        asked = {"role": "user", "content": question.replace("><", "> or <")}
        turns = [*prompt[:-1], asked]
        turns.append({"role": "assistant", "content": response(drawn, answer)})
        if number % 4 == 1:
            turns += [again, {"role": "assistant", "content": f"{answer} . again or so"}]
        messages.append({"messages": turns, "images": images})
        names = {"user": "human", "assistant": "gpt"}
        told = [
            {"from": names[turn["role"]], "value": turn["content"]}
            for turn in turns
            if turn["role"] != "system"
        ]
        other = {"conversations": told, "images": images}
        if turns[0]["role"] == "system":
            other["system"] = turns[0]["content"]
        conversations.append(other)
    for pair in list(pairs):
        *before, turn = pair["prompt"]
        turn = {"role": "user", "content": turn["content"] + " again"}
        pairs.append({**pair, "prompt": [*before, turn]})
    world = SimpleNamespace(folder=folder)
    files = {"align": align, "rl": rl, "pairs": pairs}
    files |= {"messages": messages, "conversations": conversations}
    for name, rows in files.items():
        if name != "pairs":
            rows.insert(2, {**rows[2], "images": ["missing.png"]})  # a bad row, to be left out
        setattr(world, name, f"{folder}/{name}.jsonl")
        text = "".join(json.dumps(row) + "\n" for row in rows)
        Path(getattr(world, name)).write_text(text)
    world.policy = make_policy(folder / "policy")
    world.tied = make_policy(folder / "tied", tied=True, layers=1, seed=3)
    world.other = make_policy(folder / "other", width=24, layers=2, seed=4)
    return world
