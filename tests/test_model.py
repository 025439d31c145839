"""The loader: what opens, what is refused and how, that what is saved opens in transformers."""

import json
import os
import random
import shutil
import subprocess
from types import SimpleNamespace

import pytest
import torch
from conftest import tiny_config, tiny_hf
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForImageTextToText,
    AutoTokenizer,
    CLIPVisionConfig,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
)

import align
import model
from data import Example
from engine import files
from engine.packs import Tree, build_pack, plan
from engine.sampler import all_rows, generate
from tools.init import SPECIAL, init

RESPONSE = "<caption> tl red square </caption>"


def example(text="<image>count red"):
    picture = Image.frombytes("RGB", (24, 24), random.Random(0).randbytes(3 * 24 * 24))
    return Example([{"role": "user", "content": text}], [picture] * text.count("<image>"), "here:1")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    file = tmp_path_factory.mktemp("corpus") / "corpus.jsonl"
    row = {
        "prompt": [{"role": "user", "content": "<image>count red"}],
        "teacher_response": RESPONSE,
        "images": ["x y z"],
    }
    file.write_text(json.dumps(row) + "\n")
    return file


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def checkpoint(request, corpus, tmp_path_factory):
    """A folder that init.py wrote; its weights large enough that mistakes show in the logits."""
    folder = tmp_path_factory.mktemp("checkpoint")
    config = tiny_config(tie_word_embeddings=request.param).to_dict()
    (folder / "config.json").write_text(json.dumps(config))
    init(folder / "config.json", folder / "ckpt", [corpus])
    hf = AutoModelForImageTextToText.from_pretrained(folder / "ckpt")
    torch.manual_seed(1)
    for p in hf.parameters():
        if p.ndim > 1:
            p.data.normal_(0, 0.15)
    hf.save_pretrained(folder / "ckpt")
    return folder / "ckpt"


def logps(policy, text="<image>count red"):
    prompt = policy.encoder.prompt(example(text))
    tree = Tree(prompt, [policy.encoder.response(RESPONSE)])
    (part,) = plan([tree], 10_000)
    with torch.no_grad():
        return policy(build_pack([tree], part)), prompt


def plain_logps(folder, prompt, answer):
    hf = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
    ids = torch.cat([prompt.ids, torch.tensor(answer)])[None]
    with torch.no_grad():
        logits = hf(
            input_ids=ids,
            mm_token_type_ids=(ids == hf.config.image_token_id).int(),
            **prompt.images,
        ).logits[0]
    logp = logits[-len(answer) - 1 : -1].log_softmax(-1)
    return logp.gather(1, torch.tensor(answer)[:, None])[:, 0]


@pytest.mark.parametrize("text", ["<image>count red", "count red", "<image> or <image>"])
def test_init_load_save_and_plain_transformers_agree(checkpoint, tmp_path, text):
    policy = model.load(checkpoint)
    mine, prompt = logps(policy, text)
    answer = policy.encoder.response(RESPONSE)
    assert mine.shape == (len(answer),) and mine.std() > 0.1
    torch.testing.assert_close(mine, plain_logps(checkpoint, prompt, answer), rtol=1e-5, atol=1e-5)
    model.save(policy, tmp_path / "saved")
    saved = tmp_path / "saved"
    assert torch.equal(plain_logps(saved, prompt, answer), plain_logps(checkpoint, prompt, answer))
    torch.testing.assert_close(logps(model.load(saved), text)[0], mine, rtol=0, atol=0)


def test_trained_weights_are_what_is_saved(checkpoint, tmp_path):
    policy = model.load(checkpoint)
    before, prompt = logps(policy)
    with torch.no_grad():
        for p in policy.parameters():
            p.add_(0.05 * torch.randn_like(p))
    model.save(policy, tmp_path)
    after = plain_logps(tmp_path, prompt, policy.encoder.response(RESPONSE))
    torch.testing.assert_close(after, logps(policy)[0], rtol=1e-5, atol=1e-5)
    assert (after - before).abs().max() > 1e-2


def test_sharded_files_open(checkpoint, tmp_path):
    hf = AutoModelForImageTextToText.from_pretrained(checkpoint)
    hf.save_pretrained(tmp_path, max_shard_size="50KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    assert not (tmp_path / "model.safetensors").exists()
    files.copy_processor(checkpoint, tmp_path)
    expected = logps(model.load(checkpoint))[0]
    assert torch.equal(logps(model.load(tmp_path))[0], expected)
    model.save(model.load(tmp_path), tmp_path / "saved")
    assert torch.equal(logps(model.load(tmp_path / "saved"))[0], expected)


def test_what_is_saved_holds_all_files_and_no_trace_of_packs(checkpoint, tmp_path):
    (checkpoint / "processor_config.json").write_text("{}")
    policy = model.load(checkpoint)
    model.save(policy, tmp_path)
    (checkpoint / "processor_config.json").unlink()
    for name in (
        "tokenizer.json",
        "tokenizer_config.json",
        "preprocessor_config.json",
        "chat_template.jinja",
        "processor_config.json",
        "config.json",
    ):
        assert (tmp_path / name).exists(), name
    config = (tmp_path / "config.json").read_text()
    assert "packs" not in config and "attn" not in config
    assert json.loads(config)["tie_word_embeddings"] == policy.hf.config.tie_word_embeddings
    plain = AutoModelForImageTextToText.from_pretrained(tmp_path)
    assert "packs" not in str(plain.config._attn_implementation)
    turns = [{"role": "user", "content": "count red"}]
    theirs = AutoTokenizer.from_pretrained(tmp_path).apply_chat_template(turns, tokenize=False)
    ours = policy.encoder.tokenizer.apply_chat_template(turns, tokenize=False)
    assert theirs == ours


def test_legacy_chat_template_file(checkpoint, tmp_path):
    """transformers 4 kept the template of processors in chat_template.json; Qwen3-VL's hub folders
    have it."""
    shutil.copytree(checkpoint, tmp_path / "ckpt")
    template = (tmp_path / "ckpt/chat_template.jinja").read_text()
    (tmp_path / "ckpt/chat_template.jinja").unlink()
    (tmp_path / "ckpt/chat_template.json").write_text(json.dumps({"chat_template": template}))
    policy = model.load(tmp_path / "ckpt")
    assert policy.encoder.tokenizer.chat_template == template
    model.save(policy, tmp_path / "saved")
    assert torch.equal(logps(model.load(tmp_path / "saved"))[0], logps(policy)[0])


def test_init_is_seeded_and_its_ids_are_the_configuration_s(corpus, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(tiny_config().to_dict()))
    folders = [
        init(tmp_path / "config.json", tmp_path / str(i), [corpus], seed)
        for i, seed in enumerate((0, 0, 1))
    ]
    a, b, c = (load_file(folder / "model.safetensors") for folder in folders)
    assert all(torch.equal(a[k], b[k]) for k in a)
    assert any(not torch.equal(a[k], c[k]) for k in a)
    policy = model.load(folders[0])
    settings = json.loads((folders[0] / "config.json").read_text())
    tokenizer = policy.encoder.tokenizer
    words = {"count", "red", "<caption>", "tl", "square", "</caption>"}
    found = set(tokenizer.get_vocab()) - {"user"}
    assert found == {*SPECIAL, "<unk>", *words}  # image paths are no text
    rows = settings["text_config"]["vocab_size"]
    assert rows == len(tokenizer) == policy.hf.lm_head.weight.shape[0]
    assert settings["image_token_id"] == tokenizer.convert_tokens_to_ids("<|image_pad|>")
    # 24 x 24 pixels, patch 4, merge 2
    assert policy.encoder.prompt(example()).image_mask.sum() == 9


def test_init_leaves_a_checkpoint_as_it_is(corpus, tmp_path):
    """A second one would take the first one's tokenizer for the configuration's own."""
    (tmp_path / "config.json").write_text(json.dumps(tiny_config().to_dict()))
    init(tmp_path / "config.json", tmp_path / "out", [corpus])
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    with pytest.raises(FileExistsError, match="out holds a checkpoint already"):
        init(tmp_path / "config.json", tmp_path / "out", [corpus])
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before


def test_init_without_tokenizer_or_corpus(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(tiny_config().to_dict()))
    with pytest.raises(FileNotFoundError, match="--corpus"):
        init(tmp_path / "config.json", tmp_path / "out")


@pytest.mark.parametrize("name", ["/nowhere/ckpt", "./nowhere", "ckpt/nowhere", "runs/a/b"])
def test_a_folder_that_is_not_there(name):
    with pytest.raises(FileNotFoundError, match="no such folder"):
        model.load(name)


def test_a_run_folder_is_no_checkpoint(tmp_path):
    with pytest.raises(FileNotFoundError, match="no config.json.*run folder"):
        model.load(tmp_path)


def test_a_model_that_packs_cannot_run(checkpoint, tmp_path):
    small = dict(hidden_size=16, intermediate_size=16, num_attention_heads=2, num_hidden_layers=1)
    text = LlamaConfig(vocab_size=32, **small)
    vision = CLIPVisionConfig(image_size=8, patch_size=4, **small)
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_index=31)
    LlavaForConditionalGeneration(config).save_pretrained(tmp_path / "llava")
    files.copy_processor(checkpoint, tmp_path / "llava")
    says = "the tokenizer has no token 31, the configuration's image_token_id, and no <image>"
    with pytest.raises(ValueError, match=says):
        model.load(tmp_path / "llava")
    LlamaForCausalLM(text).save_pretrained(tmp_path / "llama")
    with pytest.raises(ValueError, match="config.json is .*text_config, vision_config"):
        model.load(tmp_path / "llama")


def test_weights_that_are_no_safetensors_are_refused(checkpoint, tmp_path):
    shutil.copytree(checkpoint, tmp_path / "ckpt")
    (tmp_path / "ckpt/model.safetensors").unlink()
    # A pickle: opening it would run code.
    torch.save(tiny_hf().state_dict(), tmp_path / "ckpt/pytorch_model.bin")
    says = "model.safetensors is missing.*only from whole safetensors"
    with pytest.raises(ValueError, match=says):
        model.load(tmp_path / "ckpt")


def test_skeleton_has_shapes_and_no_weights(checkpoint):
    for path in (checkpoint, checkpoint / "config.json"):
        bones = model.skeleton(path)
        assert {p.device.type for p in bones.parameters()} == {"meta"}
        shapes = {name: p.shape for name, p in bones.named_parameters()}
        assert shapes == {name: p.shape for name, p in model.load(checkpoint).named_parameters()}


def test_checkpointing_changes_no_gradient(checkpoint):
    found = []
    for on in (False, True):
        policy = model.load(checkpoint).train()
        args = SimpleNamespace(dtype="float32", checkpointing=on, offload=False)
        model.shard(policy, policy.hf.model, args, SimpleNamespace(device="cpu"))
        tree = Tree(policy.encoder.prompt(example()), [policy.encoder.response(RESPONSE)])
        policy(build_pack([tree], [(0, [0])])).sum().backward()
        found.append([p.grad for p in policy.parameters()])
    assert all(gradient.abs().sum() > 0 for gradient in found[0] if gradient.ndim > 1)
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)


def test_rollout_copy_casts_parameters_alone(checkpoint):
    """Rotary frequencies in bfloat16 are off by 0.2 %: some radians at position 2000."""
    policy = model.load(checkpoint)
    args = SimpleNamespace(dtype="bfloat16", offload=False)
    hf = model.RolloutCopy(policy, args, "cpu").refresh()
    assert {p.dtype for p in hf.parameters()} == {torch.bfloat16}
    assert not any(p.requires_grad for p in hf.parameters())
    buffers = dict(policy.hf.named_buffers())
    assert buffers
    for name, buffer in hf.named_buffers():
        assert torch.equal(buffer, buffers[name]) and buffer.dtype == torch.float32
    tied = policy.hf.lm_head.weight is policy.hf.get_input_embeddings().weight
    assert (hf.lm_head.weight is hf.get_input_embeddings().weight) == tied
    for ours, theirs in zip(hf.parameters(), policy.hf.parameters(), strict=True):
        assert ours is not theirs and torch.equal(ours, theirs.bfloat16())


# ------------------------------------------------------------------------------- the tied head
def settings_of(folder):
    return json.loads((folder / "config.json").read_text())


def said_tied(folder):
    """As transformers 5 and as 4.57 read it."""
    settings = settings_of(folder)
    return settings["tie_word_embeddings"], settings["text_config"]["tie_word_embeddings"]


@pytest.mark.parametrize("top", [None, False])
def test_a_tied_head_that_the_text_model_s_settings_alone_name(checkpoint, tmp_path, top):
    """transformers 4.57 asks there; the checkpoint has no matrix for the head."""
    settings = settings_of(checkpoint)
    if not settings["tie_word_embeddings"]:
        return
    shutil.copytree(checkpoint, tmp_path / "ckpt")
    settings["tie_word_embeddings"] = top
    if top is None:
        del settings["tie_word_embeddings"]
    settings["text_config"]["tie_word_embeddings"] = True
    (tmp_path / "ckpt/config.json").write_text(json.dumps(settings))
    policy = model.load(tmp_path / "ckpt")
    assert model.is_tied(policy.hf) and model.is_tied(model.skeleton(tmp_path / "ckpt").hf)
    assert torch.equal(logps(policy)[0], logps(model.load(checkpoint))[0])
    model.save(policy, tmp_path / "saved")
    assert said_tied(tmp_path / "saved") == (True, True)
    assert "lm_head.weight" not in load_file(tmp_path / "saved/model.safetensors")


def test_a_tied_flag_over_two_different_matrices(checkpoint, tmp_path):
    """The matrices count, and what is saved says so: a version that believes the flag would lose
    the head."""
    shutil.copytree(checkpoint, tmp_path / "ckpt")
    weights = load_file(checkpoint / "model.safetensors")
    embedding = weights["model.language_model.embed_tokens.weight"]
    weights["lm_head.weight"] = torch.randn_like(embedding)
    save_file(weights, tmp_path / "ckpt/model.safetensors", {"format": "pt"})
    settings = settings_of(checkpoint)
    settings["tie_word_embeddings"] = settings["text_config"]["tie_word_embeddings"] = True
    (tmp_path / "ckpt/config.json").write_text(json.dumps(settings))
    policy = model.load(tmp_path / "ckpt")
    assert torch.equal(policy.hf.lm_head.weight, weights["lm_head.weight"])
    model.save(policy, tmp_path / "saved")
    assert said_tied(tmp_path / "saved") == (False, False)
    again = model.load(tmp_path / "saved")
    assert torch.equal(again.hf.lm_head.weight, weights["lm_head.weight"])
    assert torch.equal(again.hf.get_input_embeddings().weight, embedding)


def test_tokens_without_a_row_in_the_embedding(checkpoint, tmp_path):
    shutil.copytree(checkpoint, tmp_path / "ckpt")
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    tokenizer.add_tokens(["<new>"])
    tokenizer.save_pretrained(tmp_path / "ckpt")
    with pytest.raises(ValueError, match="1 tokens beyond the .* rows.*'<new>'.*resize_token_emb"):
        model.load(tmp_path / "ckpt")
    hf = AutoModelForImageTextToText.from_pretrained(checkpoint)
    hf.resize_token_embeddings(len(tokenizer))
    hf.save_pretrained(tmp_path / "ckpt")
    model.load(tmp_path / "ckpt")


# ----------------------------------------------------------------------------- other files' ways
@pytest.mark.parametrize("named", [0, [0, 3], [3, 2, 999]])
def test_end_tokens_of_generation_config_alone(checkpoint, tmp_path, named):
    """They end a rollout, padding (0) too; what marks an image (3) or is no token never does."""
    shutil.copytree(checkpoint, tmp_path / "ckpt")
    generation = tmp_path / "ckpt/generation_config.json"
    generation.write_text(json.dumps({"eos_token_id": named}))
    encoder = model.load(tmp_path / "ckpt").encoder
    assert encoder.tokenizer.pad_token_id == 0 and encoder.eos == 2
    expected = (2,) if named == [3, 2, 999] else (2, 0)
    assert encoder.eos_ids == expected
    assert 3 in encoder.banned and not set(expected) & set(encoder.banned)
    assert encoder.decode([7, expected[-1]]) == encoder.decode([7])


@pytest.mark.parametrize("top", [True, False], ids=["on top", "in size"])
def test_pixel_limits_as_older_files_have_them(checkpoint, tmp_path, top):
    shutil.copytree(checkpoint, tmp_path / "ckpt")
    file = tmp_path / "ckpt/preprocessor_config.json"
    settings = json.loads(file.read_text())
    limits = {"min_pixels": 64, "max_pixels": 400}
    settings["size"] = limits
    if top:
        settings |= limits
        del settings["size"]
    file.write_text(json.dumps(settings))
    encoder = model.load(tmp_path / "ckpt").encoder
    assert encoder.images.limits == {"shortest_edge": 64, "longest_edge": 400}
    # 24 x 24 pixels are scaled to 16 x 16: patches of 4, merged by 2 x 2.
    assert encoder.prompt(example()).image_mask.sum() == 4
    smaller = model.load(tmp_path / "ckpt", max_pixels=100).encoder
    assert smaller.images.limits == {"shortest_edge": 64, "longest_edge": 100}


# ---------------------------------------------------------------------------- another transformers
def test_rotary_settings_stand_in_both_spellings(checkpoint, tmp_path):
    model.save(model.load(checkpoint), tmp_path)
    text = settings_of(tmp_path)["text_config"]
    assert text["rope_theta"] == text["rope_parameters"]["rope_theta"] == 10000
    assert text["rope_scaling"]["mrope_section"] == [2, 1, 1]
    assert "rope_theta" not in text["rope_scaling"]


OTHER_VERSION = """
import sys, torch, transformers
assert transformers.__version__.startswith("4.57"), transformers.__version__
inputs = torch.load("inputs.pt", weights_only=True)
found = []
for folder in sys.argv[1:]:
    hf = transformers.AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        found.append(hf.eval()(**inputs).logits)
torch.save(found, "logits.pt")
"""


def small_moe(corpus, folder):
    """A policy that is a Qwen3-VL-MoE."""
    config = tiny_config().to_dict()
    config["model_type"] = "qwen3_vl_moe"
    config["vision_config"]["model_type"] = "qwen3_vl_moe"
    experts = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=24)
    config["text_config"] |= dict(model_type="qwen3_vl_moe_text", **experts)
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    return init(folder / "config.json", folder / "ckpt", [corpus])


def test_what_is_saved_opens_in_transformers_4(checkpoint, corpus, tmp_path):
    """Policies and discriminators: equal logits in version 4.57 and in this one."""
    python = os.environ.get("TRANSFORMERS_4")
    if not python:
        pytest.skip("TRANSFORMERS_4 names no Python with torch and transformers 4.57")
    policy = model.load(checkpoint)
    model.save(policy, tmp_path / "policy")
    model.save(model.load(small_moe(corpus, tmp_path / "of")), tmp_path / "moe")
    for form in ("moe", "dense"):
        disc = align.Discriminator(model.load(checkpoint).hf.model, form, noise=0.1)
        align.save_discriminator(disc, checkpoint, tmp_path / f"disc_{form}")
    prompt = policy.encoder.prompt(example())
    inputs = prompt.images | dict(
        input_ids=prompt.ids[None], attention_mask=torch.ones_like(prompt.ids)[None]
    )
    torch.save(inputs, tmp_path / "inputs.pt")
    folders = ["policy", "moe", "disc_moe", "disc_dense"]
    command = [python, "-c", OTHER_VERSION, *folders]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    kinds = prompt.image_mask.int()[None]
    found = torch.load(tmp_path / "logits.pt", weights_only=True)
    for folder, theirs in zip(folders, found, strict=True):
        hf = AutoModelForImageTextToText.from_pretrained(tmp_path / folder, dtype=torch.float32)
        with torch.no_grad():
            ours = hf.eval()(**inputs, mm_token_type_ids=kinds).logits
        assert ours.std() > 0.01, folder
        torch.testing.assert_close(theirs, ours, rtol=1e-5, atol=1e-5, msg=folder)


# ---------------------------------------------------------------------------- the real settings
def small(config):
    """A real configuration with small dimensions: deepstack, grouped queries, tying and rotary
    sections stay as they are."""
    text = config["text_config"]
    vision = config["vision_config"]
    ratio = text["num_attention_heads"] // text["num_key_value_heads"]
    text |= dict(
        num_key_value_heads=2,
        num_attention_heads=2 * ratio,
        head_dim=16,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=4,
    )
    rope = text["rope_scaling"]
    sections = [size // 8 for size in rope["mrope_section"]]
    sections[0] += 8 - sum(sections)
    rope["mrope_section"] = sections
    levels = len(vision["deepstack_visual_indexes"])
    vision |= dict(
        hidden_size=32,
        num_heads=2,
        intermediate_size=48,
        out_hidden_size=32,
        depth=levels + 1,
        deepstack_visual_indexes=list(range(levels)),
    )
    return config


@pytest.fixture(scope="module", params=["2B", "4B", "8B"])
def real(request, shared, tmp_path_factory):
    """A folder as runs/puzzlevqa.sh makes it: a real configuration, made small, beside the real
    tokenizer."""
    folder = tmp_path_factory.mktemp(request.param)
    source = shared / "data/qwen3vl"
    config = small(json.loads((source / request.param / "config.json").read_text()))
    (folder / "config.json").write_text(json.dumps(config))
    settings = (source / "30B-A3B-Thinking").glob("*config.json")
    for file in (*(source / "tokenizer").glob("*"), *settings):
        if file.name not in ("config.json", "golden.json"):
            shutil.copyfile(file, folder / file.name)
    template = source / "chat_templates/qwen3vl_instruct.jinja"
    shutil.copyfile(template, folder / "chat_template.jinja")
    return init(folder / "config.json", folder / "ckpt")


def test_real_settings(real, tmp_path):
    policy = model.load(real)
    config = policy.hf.config
    assert config.text_config.vocab_size == 151936
    assert len(config.vision_config.deepstack_visual_indexes) == 3
    tied = policy.hf.lm_head.weight is policy.hf.model.language_model.embed_tokens.weight
    assert tied == json.loads((real / "config.json").read_text())["tie_word_embeddings"]
    assert tied == ("8B" not in str(real))
    encoder = policy.encoder
    prompt = encoder.prompt(example())
    begin = "<|im_start|>user\n<|vision_start|><|image_pad|>"
    assert encoder.tokenizer.decode(prompt.ids).startswith(begin)
    mine, _ = logps(policy)
    answer = encoder.response(RESPONSE)
    assert torch.isfinite(mine).all() and answer[-1] == 151645
    torch.testing.assert_close(mine, plain_logps(real, prompt, answer), rtol=1e-4, atol=1e-4)
    options = dict(eos=encoder.eos_ids, banned=encoder.banned, seeds=[(0,)])
    for rollout in generate(policy.hf, [prompt], all_rows([prompt], 2), 6, **options):
        assert all(i < 151669 and i not in encoder.banned for i in rollout.ids)
    model.save(policy, tmp_path)
    assert torch.equal(plain_logps(tmp_path, prompt, answer), plain_logps(real, prompt, answer))
    copied = ["vocab.json", "merges.txt", "video_preprocessor_config.json"]
    for name in (*copied, "generation_config.json"):
        assert (tmp_path / name).read_bytes() == (real / name).read_bytes(), name
