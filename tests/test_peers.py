"""What users have, and what their other tools open: released files, hub names, other models, LoRA,
servers, benchmarks."""

import fnmatch
import json
import os
import random
import re
import runpy
import shutil
import subprocess
import sys
from types import SimpleNamespace

import huggingface_hub
import pytest
import torch
from conftest import ROOT, tiny_config
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    AutoTokenizer,
    Qwen3VLMoeForConditionalGeneration,
)
from transformers.utils.chat_template_utils import render_jinja_template

import align
import model
import rewards
from data import SPANS, SYSTEM_PROMPT, open_encoder, read, to_example
from engine import files
from engine.packs import Tree, build_pack, plan
from engine.rows import BadRow
from engine.sampler import all_rows, generate
from tools.init import init

RESPONSE = "<caption> tl red square </caption> <think> so 1 . </think> <answer> 1 </answer>"
PICTURE = Image.frombytes("RGB", (24, 32), random.Random(0).randbytes(3 * 24 * 32))
TEXT = dict(
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    intermediate_size=48,
    vocab_size=64,
    max_position_embeddings=512,
    pad_token_id=None,
    tie_word_embeddings=True,
)
ROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]}
VISION = dict(
    depth=2,
    hidden_size=32,
    num_heads=2,
    intermediate_size=48,
    out_hidden_size=32,
    patch_size=4,
    spatial_merge_size=2,
    temporal_patch_size=2,
    in_channels=3,
)
MOE = dict(head_dim=8, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=24)
V3 = tiny_config().to_dict()["vision_config"]
GLM_ROPE = ROPE | {"partial_rotary_factor": 1.0}
V35 = {key: value for key, value in V3.items() if key != "deepstack_visual_indexes"}
LINEAR = dict(
    layer_types=["linear_attention", "full_attention"],
    linear_num_value_heads=4,
    linear_num_key_heads=2,
    linear_key_head_dim=8,
    linear_value_head_dim=12,
    rope_parameters=GLM_ROPE | {"mrope_interleaved": True},
)
OTHERS = {  # model type -> text and vision fields of a small one
    "qwen2_vl": ({}, VISION | dict(embed_dim=32, mlp_ratio=2)),
    "qwen2_5_vl": (  # windows in vision
        {},
        VISION | dict(window_size=16, fullatt_block_indexes=[1], tokens_per_second=4),
    ),
    "qwen3_vl_moe": (
        MOE
        | dict(
            decoder_sparse_step=1,
            mlp_only_layers=[],
            rope_parameters=ROPE | {"mrope_interleaved": True},
        ),
        V3 | {"model_type": "qwen3_vl_moe"},
    ),
    "glm4v": (dict(head_dim=8, rope_parameters=GLM_ROPE), VISION | {"image_size": 32}),
    "glm46v": (dict(head_dim=8, rope_parameters=GLM_ROPE), VISION | {"image_size": 32}),
    "glm_ocr": (dict(head_dim=8, rope_parameters=GLM_ROPE), VISION | {"image_size": 32}),
    "glm4v_moe": (
        MOE
        | dict(
            n_routed_experts=4,
            n_shared_experts=1,
            first_k_dense_replace=1,
            n_group=1,
            topk_group=1,
            rope_parameters=GLM_ROPE,
        ),
        VISION | {"image_size": 32},
    ),
    "qwen3_5": (LINEAR, V35 | {"model_type": "qwen3_5"}),
    "qwen3_5_moe": (
        LINEAR | MOE | dict(shared_expert_intermediate_size=16),
        V35 | {"model_type": "qwen3_5_moe"},
    ),
}


def example(text="<image>count red", **row):
    image = PICTURE if "<image>" in text else None
    return to_example({"question": text, "image": image, "answer": "1"} | row, "here:1")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """Rows of all three kinds with their picture; the tokenizers' words."""
    folder = tmp_path_factory.mktemp("corpus")
    PICTURE.save(folder / "a.png")
    row = {
        "prompt": [{"role": "user", "content": "<image>count red"}],
        "teacher_response": RESPONSE,
        "images": ["a.png"],
        "reward_model": {"ground_truth": "1"},
        "messages": [
            {"role": "user", "content": "<image>count red"},
            {"role": "assistant", "content": RESPONSE},
        ],
    }
    (folder / "rows.jsonl").write_text((json.dumps(row) + "\n") * 4)
    return folder / "rows.jsonl"


def checkpoint(settings, corpus, folder):
    """A folder of init.py with weights large enough that mistakes show."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(settings))
    init(folder / "config.json", folder / "ckpt", [corpus])
    hf = AutoModelForImageTextToText.from_pretrained(folder / "ckpt", dtype=torch.float32)
    torch.manual_seed(1)
    for p in hf.parameters():
        if p.ndim > 1:
            p.data.normal_(0, 0.15)
    hf.save_pretrained(folder / "ckpt")
    return folder / "ckpt"


@pytest.fixture(scope="module")
def tiny(corpus, tmp_path_factory):
    return checkpoint(tiny_config().to_dict(), corpus, tmp_path_factory.mktemp("tiny"))


def logps(policy, text="<image>count red"):
    prompt = policy.encoder.prompt(example(text))
    tree = Tree(prompt, [policy.encoder.response(RESPONSE), policy.encoder.response("red red")])
    (part,) = plan([tree], 10_000)
    with torch.no_grad():
        return policy(build_pack([tree], part)), tree


def plain(hf, prompt, ids):
    """transformers' own inputs for a row."""
    ids = torch.cat([prompt.ids, torch.tensor(ids, dtype=torch.long)])[None]
    kinds = (ids == hf.config.image_token_id).int()
    return dict(input_ids=ids, mm_token_type_ids=kinds, **prompt.images)


# -------------------------------------------------------------------- the released discriminator
def released(corpus, folder, D=32, I=48, version="4.57.0"):  # noqa: E741
    """A small discriminator in the released layout, in two shards -> (transformers' model with its
    weights, head)."""
    base = checkpoint(tiny_config().to_dict(), corpus, folder / "of")  # for its tokenizer
    config = released_config(json.loads((base / "config.json").read_text()), D, I, version)
    hf = Qwen3VLMoeForConditionalGeneration(AutoConfig.for_model(**config)).eval()
    torch.manual_seed(3)
    for p in hf.parameters():
        p.data.normal_(1 if p.ndim == 1 else 0, 0.15)
    head = torch.randn(1, D)
    state = {}
    for key, value in hf.state_dict().items():
        if ".experts." in key:
            value = value.transpose(1, 2).contiguous()
        state[key] = value.clone().bfloat16().float()
    assert state["model.language_model.layers.0.mlp.experts.gate_up_proj"].shape == (4, D, 2 * I)
    write_in_two_shards(state | {"v_head.1.weight": head}, folder)
    (folder / "config.json").write_text(json.dumps(config))
    files.copy_processor(base, folder)
    for key, value in state.items():
        hf.state_dict()[key].copy_(value.transpose(1, 2) if ".experts." in key else value)
    return hf, head


def released_config(settings, D, I, version):  # noqa: E741
    """settings: of the dense model whose tokenizer it shares."""
    rope = {"rope_type": "default", "mrope_section": [2, 1, 1], "mrope_interleaved": True}
    own = dict(
        hidden_size=D,
        moe_intermediate_size=I,
        intermediate_size=6144,
        decoder_sparse_step=1,
        mlp_only_layers=[],
        norm_topk_prob=True,
        rope_theta=1e4,
        rope_scaling=rope,
        model_type="qwen3_vl_moe_text",
        vocab_size=settings["text_config"]["vocab_size"],
    )
    ids = {key: value for key, value in settings.items() if key.endswith("_token_id")}
    return {
        "model_type": "qwen3_vl_moe",
        "architectures": ["Qwen3VLMoeForConditionalGeneration"],
        "text_config": TEXT | MOE | own,
        **ids,
        "vision_config": V3 | {"out_hidden_size": D, "model_type": "qwen3_vl_moe"},
        "tie_word_embeddings": True,
        "transformers_version": version,
    }


def write_in_two_shards(state, folder):
    names = sorted(state)
    place = {}
    for number, some in enumerate((names[::2], names[1::2]), 1):
        file = f"model-{number:05}-of-00002.safetensors"
        save_file({key: state[key] for key in some}, folder / file)
        place |= dict.fromkeys(some, file)
    index = {"metadata": {}, "weight_map": place}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def scores(disc, tree):
    part = (0, list(range(len(tree.children))))
    with torch.no_grad():
        return disc.eval()(build_pack([tree], [part]))[0]


# Shapes do not tell the layouts of experts apart.
@pytest.mark.parametrize("D, I", [(32, 48), (32, 16), (32, 32)], ids=["any", "2I is D", "I is D"])
def test_released_discriminator(corpus, tmp_path, D, I):  # noqa: E741
    hf, head = released(corpus, tmp_path, D, I)
    disc = align.load_discriminator(SimpleNamespace(disc="moe", disc_path=str(tmp_path)))
    encoder = open_encoder(tmp_path, disc.model)
    spans = align.encode_spans(encoder, RESPONSE, SPANS)
    tree = Tree(encoder.prompt(example()), spans, [0, 1])
    expected = []
    for ids in spans:
        with torch.no_grad():
            hidden = hf.model(**plain(hf, tree.prompt, ids)).last_hidden_state  # (1, T, D)
        expected.append(hidden[0, -1] @ head[0])
    expected = torch.stack(expected)
    assert expected.std() > 0.1
    torch.testing.assert_close(scores(disc, tree), expected, rtol=1e-5, atol=1e-5)
    align.save_discriminator(disc, tmp_path, tmp_path / "again")
    again = load_file(tmp_path / "again/model.safetensors")
    first = load_file(tmp_path / "model-00001-of-00002.safetensors")
    assert all(torch.equal(again[key], first[key]) for key in first if key != "lm_head.weight")
    assert "lm_head.weight" not in again


def test_discriminator_of_another_version_is_refused(corpus, tmp_path):
    released(corpus, tmp_path, version="5.23.0")
    with pytest.raises(ValueError, match="saved by transformers 5.23.0"):
        align.open_discriminator(tmp_path)


def test_discriminator_is_found_in_a_run_folder(tiny, tmp_path):
    base = model.load(tiny).hf.model
    disc = align.Discriminator(base, "moe")
    for mark, where in enumerate(("warmup/last", "last/discriminator")):
        disc.v_head[1].weight.data.fill_(mark)
        align.save_discriminator(disc, tiny, tmp_path / where)
    shutil.copy(tiny / "config.json", tmp_path / "last")  # beside it lies the policy
    for path, mark in {
        "": 1,
        "last": 1,
        "last/discriminator": 1,
        "warmup": 0,
        "warmup/last": 0,
    }.items():
        assert align.open_discriminator(tmp_path / path).v_head[1].weight.unique() == mark, path
    shutil.rmtree(tmp_path / "last")
    assert align.open_discriminator(str(tmp_path)).v_head[1].weight.unique() == 0
    with pytest.raises(ValueError, match="no v_head.1.weight: it is no discriminator"):
        align.open_discriminator(tiny)
    with pytest.raises(FileNotFoundError, match="no config.json"):
        align.open_discriminator(tiny.parent.parent)


SCORE = """\
import torch
from PIL import Image

from align import encode_spans, open_discriminator
from data import SPANS, open_encoder, to_example
from engine.packs import Tree, build_pack

disc = open_discriminator("ckpt/align").eval()  # a run folder, a folder, or a name on the hub
encoder = open_encoder("ckpt/align", disc.model)
row = {"image": Image.open("a.png"), "question": "How many are red?", "answer": "1"}
prompt = encoder.prompt(to_example(row))
spans = encode_spans(encoder, response, SPANS)  # the ids of each; None where it is malformed
tree = Tree(prompt, spans, kinds=[0, 1])
with torch.no_grad():
    perception, reasoning = disc(build_pack([tree], [(0, [0, 1])]))[0].tolist()
"""


def test_lines_that_score_a_response(tiny, tmp_path, monkeypatch):
    """Exactly those of the README or of docs/, wherever a discriminator is opened there."""
    for page in (ROOT / "README.md", *(ROOT / "docs").rglob("*.md")):
        text = page.read_text()
        assert "= open_discriminator(" not in text or SCORE in text, page
    assert 10 <= len(re.findall(r"(?m)^.*\S.*$", SCORE)) <= 14
    policy = model.load(tiny)
    model.save(policy, tmp_path / "ckpt/align/last")
    disc = align.Discriminator(policy.hf.model, "moe").eval()
    align.save_discriminator(disc, tiny, tmp_path / "ckpt/align/last/discriminator")
    PICTURE.save(tmp_path / "a.png")
    monkeypatch.chdir(tmp_path)
    names = {"response": RESPONSE}
    exec(SCORE, names)
    prompt = policy.encoder.prompt(example("How many are red?", image=PICTURE))
    expected = []
    for kind, ids in enumerate(names["spans"]):
        expected.append(scores(disc, Tree(prompt, [ids], [kind])).item())
    assert [names["perception"], names["reasoning"]] == pytest.approx(expected, abs=1e-5)
    assert abs(expected[0] - expected[1]) > 1e-4


# --------------------------------------------------------------------------------------- the hub
def cached(source, home, name, commit="0123456789abcdef0123456789abcdef01234567"):
    """`source` as the hub's cache has it: files are links to blobs."""
    folder = home / f"models--{name.replace('/', '--')}"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs/main").write_text(commit)
    (folder / "snapshots" / commit).mkdir(parents=True)
    (folder / "blobs").mkdir()
    for i, file in enumerate(file for file in source.iterdir() if file.is_file()):
        shutil.copy(file, folder / "blobs" / str(i))
        (folder / "snapshots" / commit / file.name).symlink_to(f"../../blobs/{i}")


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_hub_name_from_the_cache(corpus, tmp_path, monkeypatch, tied):
    source = checkpoint(tiny_config(tie_word_embeddings=tied).to_dict(), corpus, tmp_path / "made")
    whole = logps(model.load(source))[0]
    AutoModelForImageTextToText.from_pretrained(source).save_pretrained(
        tmp_path / "shards", max_shard_size="50KB"
    )
    files.copy_processor(source, tmp_path / "shards")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 2
    cached(tmp_path / "shards", tmp_path / "hub", "some/policy")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    policy = model.load("some/policy")
    assert torch.equal(logps(policy)[0], whole)
    assert (policy.hf.lm_head.weight is policy.hf.model.language_model.embed_tokens.weight) == tied
    model.save(policy, tmp_path / "saved")
    assert ("lm_head.weight" in load_file(tmp_path / "saved/model.safetensors")) != tied
    assert torch.equal(logps(model.load(tmp_path / "saved"))[0], whole)
    with pytest.raises(Exception, match="(?s)some/other|snapshot"):
        model.load("some/other")


def test_released_discriminator_by_its_hub_name(corpus, tmp_path, monkeypatch):
    released(corpus, tmp_path)
    cached(tmp_path, tmp_path / "hub", "some/discriminator")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    theirs = align.open_discriminator("some/discriminator").state_dict()
    ours = align.open_discriminator(tmp_path).state_dict()
    assert theirs.keys() == ours.keys()
    assert all(torch.equal(theirs[key], ours[key]) for key in ours)


def test_what_is_fetched(tiny, monkeypatch):
    asked = {}

    def fetch(name, **rest):
        asked.update(rest, name=name)
        return str(tiny)

    def wanted(file):
        return any(fnmatch.fnmatch(file, pattern) for pattern in asked["allow_patterns"])

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
    assert files.find("some/policy") == tiny
    assert asked["name"] == "some/policy"
    expected = [*FILES, "additional_chat_templates/tool_use.jinja"]
    assert [file for file in expected if not wanted(file)] == []
    code = ("modeling_qwen.py", "training_args.bin", "optimizer.pt")
    for file in ("pytorch_model.bin", *code, "README.md"):
        assert not wanted(file), file


# ---------------------------------------------------------------------------------- other models
def other(kind, corpus, folder):
    text, vision = OTHERS[kind]
    settings = {
        "model_type": kind,
        "text_config": TEXT | {"rope_parameters": ROPE} | text,
        "vision_config": vision,
    }
    made = checkpoint(settings | {"tie_word_embeddings": True}, corpus, folder)
    if kind == "glm_ocr":  # as the published one says; its configuration alone does not
        file = made / "preprocessor_config.json"
        named = json.loads(file.read_text()) | {"processor_class": "Glm46VProcessor"}
        file.write_text(json.dumps(named))
    return made


@pytest.mark.parametrize("kind", OTHERS)
def test_other_models_compute_what_transformers_computes(kind, corpus, tmp_path):
    folder = other(kind, corpus, tmp_path)
    policy = model.load(folder)
    hf = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
    encoder = policy.encoder
    for text in ("<image>count red", "count red", "<image> or <image>"):
        images = [PICTURE] * text.count("<image>")
        prompt = encoder.prompt(example(text, images=images, image=None))
        children = [encoder.response(RESPONSE), encoder.response("red red")]
        with torch.no_grad():
            mine = policy(build_pack([Tree(prompt, children)], [(0, [0, 1])]))
            expected = [plain_logps(hf, prompt, ids) for ids in children]
            torch.testing.assert_close(mine, torch.cat(expected), rtol=0, atol=1e-4)
            greedy = hf.generate(
                **plain(hf, prompt, []),
                attention_mask=torch.ones_like(prompt.ids)[None],
                max_new_tokens=8,
                do_sample=False,
                eos_token_id=list(encoder.eos_ids),
                pad_token_id=0,
            )
        options = dict(eos=encoder.eos_ids, temperature=0.0, seeds=[(0,)])
        (rollout,) = generate(policy.hf, [prompt], all_rows([prompt], 1), 8, **options)
        assert rollout.ids == greedy[0, len(prompt.ids) :].tolist()
    model.save(policy, tmp_path / "saved")
    assert type(AutoModelForImageTextToText.from_pretrained(tmp_path / "saved")) is type(hf)


def plain_logps(hf, prompt, ids):
    logits = hf(**plain(hf, prompt, ids)).logits[0, -len(ids) - 1 : -1]
    return logits.log_softmax(-1).gather(1, torch.tensor(ids)[:, None])[:, 0]


@pytest.mark.parametrize(
    "kind, form",
    [
        ("qwen2_5_vl", "moe"),
        ("qwen3_5", "moe"),
        ("qwen3_5_moe", "dense"),
        ("qwen3_vl_moe", "dense"),
    ],
)
def test_discriminator_of_another_family(corpus, tmp_path, kind, form):
    """A dense one of a mixture too: its configuration's experts are the policy's own."""
    folder = other(kind, corpus, tmp_path)
    policy = model.load(folder)
    disc = align.Discriminator(model.load(folder).hf.model, form, noise=0.1)
    align.save_discriminator(disc, folder, tmp_path / "disc")
    again = align.open_discriminator(tmp_path / "disc", form)
    tree = Tree(policy.encoder.prompt(example()), [policy.encoder.response("red")], [0])
    assert torch.equal(scores(again, tree), scores(disc, tree))


def test_experts_are_not_copied_from_experts(corpus, tmp_path):
    base = model.load(other("qwen3_vl_moe", corpus, tmp_path)).hf.model
    with pytest.raises(ValueError, match="TextSparseMoeBlock .*is none: give --disc dense, or a"):
        align.Discriminator(base, "moe")


# ------------------------------------------------------------------------------------------ LoRA
LORA = ROOT / "docs/recipes/lora.py"


def test_lora_without_peft(monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(SystemExit, match="pip install peft accelerate"):
        runpy.run_path(str(LORA), run_name="__main__")


def test_lora(tiny, corpus, tmp_path, monkeypatch):
    """The recipe through all stages; what they save is merged and opens anywhere."""
    pytest.importorskip("peft")
    common = "--steps 2 --lr 1e-2 --max_response 16 --sample_every 0 --data".split()
    game = "--group_size 2 --prompts_per_step 2 --warmup_steps 0".split()
    stages = {"sft": ["--batch", "2"], "align": game, "rlvr": [*game[:4], "--kl", "0.1"]}
    before = load_file(tiny / "model.safetensors")
    start = tiny
    for stage, own in stages.items():
        out = tmp_path / stage
        line = ["lora.py", stage, "--policy", start, "--out", out, *common, corpus, *own]
        with monkeypatch.context() as patch:
            patch.setattr(model, "load", model.load)  # put back what the recipe wraps
            patch.setattr(model, "full_state", model.full_state)
            patch.delitem(sys.modules, stage, raising=False)
            patch.setattr(sys, "argv", list(map(str, line)))
            runpy.run_path(str(LORA), run_name="__main__")
        after = load_file(out / "last/model.safetensors")
        assert after.keys() == before.keys()
        moved = {key for key in after if not torch.equal(after[key], before[key])}
        assert all(key.endswith("_proj.weight") for key in moved)
        if stage == "sft":  # the others may see nothing well-formed
            assert moved
        policy = model.load(out)
        assert not any("lora" in name for name, _ in policy.named_parameters())
        logps(policy)
        before = after
        start = out
    disc = load_file(tmp_path / "align/last/discriminator/model.safetensors")
    assert not any("lora" in key or "base_layer" in key for key in disc)
    align.open_discriminator(tmp_path / "align")


def test_merged_weights_are_base_plus_adapter(monkeypatch):
    peft = SimpleNamespace(LoraConfig=dict, inject_adapter_in_model=None)
    monkeypatch.setitem(sys.modules, "peft", peft)  # merging needs nothing of it
    merged_state = runpy.run_path(str(LORA))["merged_state"]
    layer = torch.nn.Module()
    layer.q = torch.nn.Module()
    layer.q.base_layer = torch.nn.Linear(3, 4)
    layer.q.lora_A = torch.nn.ModuleDict({"default": torch.nn.Linear(3, 2, bias=False)})
    layer.q.lora_B = torch.nn.ModuleDict({"default": torch.nn.Linear(2, 4, bias=False)})
    layer.q.scaling = {"default": 2.0}
    state = merged_state(layer)
    assert set(state) == {"q.weight", "q.bias"}
    assert torch.equal(state["q.bias"], layer.q.base_layer.bias)
    a = layer.q.lora_A["default"].weight
    b = layer.q.lora_B["default"].weight
    torch.testing.assert_close(state["q.weight"], layer.q.base_layer.weight + 2 * b @ a)
    layer.q.lora_magnitude_vector = torch.nn.ParameterDict({"default": torch.ones(4)})
    with pytest.raises(ValueError, match="lora_magnitude_vector.*plain LoRA"):
        merged_state(layer)


# --------------------------------------------------------------------------------------- servers
# Those of Qwen/Qwen3-VL-4B-Instruct on the hub; for chat_template.json there is a .jinja.
FILES = (
    "config.json",
    "generation_config.json",
    "merges.txt",
    "preprocessor_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "video_preprocessor_config.json",
    "vocab.json",
    "chat_template.jinja",
    "model.safetensors",
)


@pytest.fixture(
    scope="module",
    params=["qwen3vl_instruct", pytest.param("prism_bridge_eval", marks=pytest.mark.slow)],
)
def real(request, shared, tmp_path_factory):
    """The real tokenizer and settings, with a template in each of the three places where the hub's
    folders have one."""
    folder = tmp_path_factory.mktemp(request.param)
    source = shared / "data/qwen3vl"
    settings = tiny_config(vocab_size=151936, eos_token_id=151645).to_dict()
    settings |= dict(
        image_token_id=151655,
        video_token_id=151656,
        vision_start_token_id=151652,
        vision_end_token_id=151653,
    )
    (folder / "config.json").write_text(json.dumps(settings))
    others = (source / "30B-A3B-Thinking").glob("*config.json")
    for file in (*(source / "tokenizer").glob("*"), *others):
        if file.name not in ("config.json", "golden.json"):
            (folder / file.name).write_bytes(file.read_bytes())
    processor = json.loads((folder / "preprocessor_config.json").read_text())
    processor |= dict(patch_size=4, size={"longest_edge": 4096, "shortest_edge": 64})
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    template = (source / f"chat_templates/{request.param}.jinja").read_text()
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": template}))
    tokenizer = json.loads((folder / "tokenizer_config.json").read_text())
    tokenizer["chat_template"] = template
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    return init(folder / "config.json", folder / "ckpt"), template


def test_any_server_asks_for_the_three_parts(real, tmp_path):
    folder, template = real
    policy = model.load(folder)
    model.save(policy, tmp_path)
    assert not [name for name in FILES if not (tmp_path / name).exists()]
    assert "chat_template" not in (tmp_path / "tokenizer_config.json").read_text()
    assert not (tmp_path / "chat_template.json").exists()  # processors would prefer it

    theirs = AutoTokenizer.from_pretrained(tmp_path)
    user = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "How many?"}]}
    system = {"role": "system", "content": "Be brief."}
    answer = {"role": "assistant", "content": "1"}
    asked = theirs.apply_chat_template([user], tokenize=False, add_generation_prompt=True)
    trained = [
        {"role": "system", "content": SYSTEM_PROMPT},
        {"role": "user", "content": "<image>How many?"},
    ]
    assert asked == policy.encoder._render(trained)
    system_turn = f"<|im_start|>system\n{SYSTEM_PROMPT}<|im_end|>\n"
    assert asked.startswith(f"{system_turn}<|im_start|>user\n<|vision_start|>")
    tools = [{"type": "function", "function": {"name": "look", "parameters": {}}}]
    for turns in ([system, user], [system, user, answer, user]):  # a system turn of one's own stays
        for more in ({}, {"tools": tools}):
            options = dict(tokenize=False, **more)
            mine = theirs.apply_chat_template(turns, **options)
            assert mine == theirs.apply_chat_template(turns, chat_template=template, **options)
    conversations = [[user], [system, user], [user, answer, user]]
    several = theirs.apply_chat_template(conversations, tokenize=False)
    assert [SYSTEM_PROMPT in text for text in several] == [True, False, True]
    file = (tmp_path / "chat_template.jinja").read_text()
    (text,), _ = render_jinja_template([[user]], chat_template=file)  # as processors do
    assert text == theirs.apply_chat_template([user], tokenize=False)


def test_trl_knows_the_template(real, tmp_path):
    """By its text, as SFTConfig(chat_template_path=..) reads it: then it finds its own variant, in
    which the assistant's turns are marked. The template that asks for the three parts it refuses.
    """
    folder, template = real
    policy = model.load(folder)
    model.save(policy, tmp_path)
    plain = (tmp_path / "chat_template_plain.jinja").read_text()
    asking = (tmp_path / "chat_template.jinja").read_text()
    assert plain == template and asking.endswith(plain) and asking != plain
    trl = pytest.importorskip("trl.chat_template_utils")
    if template != trl.qwen3_vl_chat_template:
        return  # the one of the released evaluation, which TRL does not know
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="not training-compatible"):
        trl.get_training_chat_template(theirs)
    theirs.chat_template = plain
    marked = trl.get_training_chat_template(theirs)
    assert trl.is_chat_template_stop_token_trained(theirs, marked)


def test_our_own_prompts_stay_as_they_were(real, tmp_path):
    """Rows without a system turn have none, however often a policy was saved; and saving again
    changes no file."""
    folder, template = real
    policies = [model.load(folder)]
    for n in range(2):
        model.save(policies[-1], tmp_path / str(n))
        policies.append(model.load(tmp_path / str(n)))
    assert {policy.encoder.tokenizer.chat_template for policy in policies} == {template}
    asked = {"role": "user", "content": "hi"}
    answered = {"messages": [asked, {"role": "assistant", "content": RESPONSE}]}
    question = {"prompt": [asked], "reward_model": {"ground_truth": "1"}}
    rows = [
        example(),
        example("count", image=None),
        to_example(answered),
        to_example(question, kind="rl"),
    ]
    for row in rows:
        ids = [policy.encoder.conversation(row)[0].ids.tolist() for policy in policies]
        assert ids[0] == ids[1] == ids[2]
    encoder = policies[-1].encoder
    bare = encoder.tokenizer.decode(encoder.prompt(rows[-1]).ids)
    # What the source's own template adds stays.
    assert ("caption" in bare) == ("default_system_message" in template)
    for file in (tmp_path / "0").iterdir():
        assert file.read_bytes() == (tmp_path / "1" / file.name).read_bytes(), file.name


@pytest.mark.parametrize("in_files", [True, False], ids=["files", "tokenizer_config.json"])
def test_a_saved_policy_keeps_named_templates(tiny, tmp_path, in_files):
    """In either form that transformers reads them in, also of a policy that is saved again."""
    source = shutil.copytree(tiny, tmp_path / "source")
    template = (source / "chat_template.jinja").read_text()
    (source / "chat_template.jinja").unlink()
    tokenizer = AutoTokenizer.from_pretrained(source)
    tokenizer.chat_template = {"default": template, "tool_use": "a {{ tools }}", "rag": "b"}
    tokenizer.save_pretrained(source, save_jinja_files=in_files)
    assert (source / "chat_template.jinja").exists() == in_files
    for n in range(2):
        policy = model.load(source)
        source = tmp_path / str(n)
        model.save(policy, source)
        assert "chat_template" not in (source / "tokenizer_config.json").read_text()
        assert AutoTokenizer.from_pretrained(source).chat_template == tokenizer.chat_template


def test_named_templates_without_a_default_or_a_file_s_name(tiny, tmp_path):
    source = shutil.copytree(tiny, tmp_path / "source")
    template = (source / "chat_template.jinja").read_text()
    (source / "chat_template.jinja").unlink()
    file = source / "tokenizer_config.json"
    settings = json.loads(file.read_text())
    for names, says in (
        (["tool_use"], "none named default"),
        (["default", "../x"], "named '../x'"),
    ):
        listed = [{"name": name, "template": template} for name in names]
        file.write_text(json.dumps(settings | {"chat_template": listed}))
        with pytest.raises(ValueError, match=f"{re.escape(str(source))}: .*{says}"):
            open_encoder(source)


def test_embedded_world_is_not_asked_in_words_it_lacks(tiny, tmp_path):
    model.save(model.load(tiny), tmp_path)
    saved, source = (folder / "chat_template.jinja" for folder in (tmp_path, tiny))
    assert saved.read_bytes() == source.read_bytes()


# ------------------------------------------------------------------------------------ benchmarks
IMAGE = {"bytes": b"a picture", "path": "1.png"}
B = b"a picture"
ROWS = {  # benchmark: (row as published, its images, question's parts, choices, answers)
    "MathVista, options": (
        {
            "pid": "1",
            "question": "Which one?",
            "image": "images/1.jpg",
            "decoded_image": IMAGE,
            "choices": ["(A) 1", "(B) 2"],
            "unit": None,
            "precision": None,
            "answer": "(B) 2",
            "question_type": "multi_choice",
            "query": "Hint: .. Which one?",
        },
        [B],
        ["Which one?", "(A) 1\n(B) 2"],
        ("1", "2"),  # the letters that they bring are those that they are shown with
        ("(B) 2",),
    ),
    "MathVista, number": (
        {
            "pid": "2",
            "question": "How long?",
            "decoded_image": IMAGE,
            "choices": None,
            "precision": 1.0,
            "answer": "1.2",
        },
        [B],
        ["How long?"],
        (),
        ("1.2",),
    ),
    "MathVerse": (
        {
            "sample_index": "1",
            "question": "Find x.\nChoices:\nA:1\nB:2",
            "image": IMAGE,
            "answer": "B",
            "query_wo": "..",
        },
        [B],
        ["Find x."],
        (),
        ("B",),
    ),
    "MathVerse, vision only": (
        {
            "sample_index": "1",
            "question": "",
            "image": IMAGE,
            "answer": "B",
            "query_wo": "According to the question ..",
        },
        [B],
        ["According to"],
        (),
        ("B",),
    ),
    "MATH-Vision": (
        {
            "id": "4",
            "question": "Which?\n<image1>",
            "options": ["3", "4"],
            "image": "images/4.jpg",
            "decoded_image": IMAGE,
            "answer": "B",
            "solution": None,
            "level": 2,
        },
        [B],
        ["<image>\nWhich?", "(A) 3\n(B) 4"],
        ("3", "4"),
        ("B",),
    ),
    "MATH-Vision, open": (
        {
            "question": "How many? <image1>",
            "options": [],
            "decoded_image": IMAGE,
            "answer": "[1, 2]",
        },
        [B],
        ["How many?"],
        (),
        ("[1, 2]",),
    ),
    "We-Math": (
        {
            "ID": "3steps_1",
            "question": "What is the area?",
            "option": "A. 200.96;B. 3215.36;C. 32; D. No correct answer;",
            "answer": "B",
            "image_path": IMAGE,
            "key": "3steps_3",
            "question number": 1575,
            "knowledge concept": "Area",
        },
        [B],
        ["What is the area?", "(D) No correct answer"],
        ("200.96", "3215.36", "32", "No correct answer"),
        ("B",),
    ),
    "MMMU": (
        {
            "id": "v_1",
            "question": "Is <image 1> like <image 2>?",
            "options": "['$6', 'It\\'s 7']",
            "answer": "A",
            "question_type": "multiple-choice",
            **{f"image_{k}": IMAGE if k < 3 else None for k in range(1, 8)},
        },
        [B, B],
        ["<image>\n<image>\nIs (image 1) like (image 2)?", "(B) It's 7"],
        ("$6", "It's 7"),
        ("A",),
    ),
    "MMMU, open": (
        {
            "id": "v_2",
            "question": "<image 1> How much?",
            "options": "[]",
            "answer": "['$8', '8']",
            "image_1": IMAGE,
        },
        [B],
        ["<image>\nHow much?"],
        (),
        ("$8", "8"),
    ),
    "MMMU-Pro, vision": (
        {
            "id": "t_1",
            "image": IMAGE,
            "options": "['a', 'b', 'c']",
            "answer": "C",
            "subject": "Art",
        },
        [B],
        ["Answer the question in the image.", "(C) c"],
        ("a", "b", "c"),
        ("C",),
    ),
    "HallusionBench": (
        {
            "category": "VD",
            "visual_input": "1",
            "question": "Is it longer?",
            "gt_answer": "0",
            "gt_answer_details": "No, ..",
            "filename": "./VD/0.png",
            "image": IMAGE,
        },
        [B],
        ["Is it longer?"],
        (),
        ("no",),
    ),
    "HallusionBench, no picture": (
        {
            "category": "VS",
            "visual_input": "0",
            "question": "Is it longer?",
            "gt_answer": 1,
            "filename": None,
            "image": None,
        },
        [],
        ["Is it longer?"],
        (),
        ("yes",),
    ),
    "lettered": (
        {"problem": "Which?", "options": {"B": "2", "A": "1", "C": None}, "answer": 2},
        [],
        ["(A) 1"],
        ("1", "2"),
        ("2",),
    ),
}


@pytest.mark.parametrize("name", ROWS)
def test_benchmark_rows(name):
    row, images, words, choices, answers = ROWS[name]
    for kind in ("eval", "rl", None):
        found = to_example(dict(row), "f:1", kind=kind)
        assert (found.images, found.choices) == (images, choices)
        assert (found.answer, *found.equivalent) == answers
        assert found.messages[0]["content"] == SYSTEM_PROMPT
        asked = found.messages[1]["content"]
        assert asked.count("<image>") == len(images)
        assert [part for part in words if part not in asked] == [], asked


def test_benchmark_rows_that_cannot_be_read():
    odd = {"question": "Which?", "options": "one or two", "answer": "A"}
    with pytest.raises(BadRow, match="f:1: the options are in no known form.*`choices` as a list"):
        to_example(odd, "f:1", kind="eval")
    with pytest.raises(BadRow, match="no answer"):
        to_example({"question": "Which?", "decoded_image": IMAGE, "answer": ""}, "f:1", kind="eval")
    with pytest.raises(BadRow, match="`question` is missing"):
        to_example({"decoded_image": IMAGE, "answer": "1"}, "f:1", kind="eval")


def test_benchmark_names_mean_nothing_elsewhere():
    """Only rows of questions are read by the table: one with turns keeps its own fields, and SFT
    rows are left alone."""
    turns = {
        "prompt": [{"role": "user", "content": "How many?"}],
        "reward_model": {"ground_truth": "3"},
        "gt_answer": "0",
    }
    assert to_example(dict(turns), kind="rl").answer == "3"
    talk = {
        "messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": RESPONSE}],
        "options": "nothing",
    }
    assert to_example(dict(talk), kind="sft").choices == ()


FORMS = ["mathvision/testmini.jsonl", "nlvr/dev.jsonl", "shapes/val.jsonl"]


@pytest.mark.parametrize("file", FORMS)
def test_forms_verified_on_a_file(shared, tmp_path, file):
    """Read as they are and, as MATH-Vision is published, with `options` for `choices`: the same
    examples."""
    path = shared / "data" / file
    plain = read(path, "eval")
    lines = []
    for line in path.read_text().splitlines():
        row = json.loads(line)
        row["options"] = row.pop("choices")
        lines.append(json.dumps(row) + "\n")
    renamed = tmp_path / "renamed.jsonl"
    renamed.write_text("".join(lines))
    same = read(renamed, "eval", image_root=path.parent)
    for i in range(0, len(plain), 7):
        for name in ("messages", "images", "choices", "answer"):
            assert getattr(plain[i], name) == getattr(same[i], name)


# --------------------------------------------------------------------------------------- answers
NOT_EQUAL = [
    ("2(x+3)", "2x+3"),
    ("1.5", "15"),
    (r"\frac{1}{23}", r"\frac{12}{3}"),
    ("(5/2,3)", "(1/2,3)"),
    ("5 kg", "5 lb"),
    ("[1,2)", "(1,2]"),
]
EQUAL = [("1234", "1,234"), ("x=7", "7"), ("x=1, x=2", "x=2, x=1"), (r"\{1,2,3\}", r"\{3,1,2\}")]


@pytest.mark.parametrize("a, b", NOT_EQUAL + EQUAL)
def test_what_the_released_verifier_gets_wrong(a, b):
    """Exactly METHOD.md's list, in both directions."""
    assert rewards.equivalent(a, b) == rewards.equivalent(b, a) == ((a, b) in EQUAL)


NOTEBOOK = r"""
import asyncio, rewards
ask = lambda n: rewards.equivalent(rf"\sqrt{{{4 * n}}}", rf"2\sqrt{{{n}}}")
async def cell():
    return ask(2), await asyncio.to_thread(ask, 3)
print(*asyncio.run(cell()), __file__)
"""


@pytest.mark.slow
def test_verifier_in_a_notebook_s_circumstances(tmp_path):
    """No main file, a running event loop, another working directory, another thread."""
    pytest.importorskip("math_verify")
    done = subprocess.run(
        [sys.executable, "-"],
        input=NOTEBOOK,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    assert (done.stdout.split(), done.stderr) == (["True", "True", "<stdin>"], "")


def test_verifier_table_is_one_json_line(tmp_path):
    pytest.importorskip("math_verify")
    case = dict(kind="fraction", policy=None)
    rows = [
        case | dict(pred="1/2", gold="0.5", expected=True),
        case | dict(pred="2", gold="3", expected=True),
        case | dict(pred="2", gold="3", expected=False),
        case | dict(pred="a", gold="b", expected=True, policy="x"),
    ]
    (tmp_path / "cases.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    command = [sys.executable, ROOT / "bench/verifier.py", tmp_path / "cases.jsonl"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    found = json.loads(done.stdout)
    assert (found["rows"], found["equal"], done.stdout.count("\n")) == (3, 2, 1)
    assert found["combined"] | {"ms_per_row": 0} == {
        "right": 0.6667,
        "false_positives": 0.0,
        "false_negatives": 0.5,
        "ms_per_row": 0,
    }
