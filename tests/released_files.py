"""Small files of the names, columns and forms that are released (the hub's organisation prism-vlm)
and of two benchmarks, in OWNER/NAME/.. below a folder; and a server of them, as the hub is one."""

import hashlib
import json
import random
import tarfile
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from io import BytesIO
from pathlib import Path

import torch
from conftest import tiny_config
from PIL import Image
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForImageTextToText, Qwen3VLMoeForConditionalGeneration

from data import SYSTEM_PROMPT
from engine import files
from tools.init import init

CAPTION = "<caption>\n- tl red square\n</caption>"
COT = "<think>\nso 1\n</think>\n<answer>\n1\n</answer>"
RESPONSE = f"{CAPTION}\n{COT}"
QUESTION = "<image>how many red"
COMMIT = "0123456789abcdef0123456789abcdef01234567"
SHARDS = 18


def picture(number, side=24):
    """The bytes of a PNG."""
    pixels = random.Random(number).randbytes(3 * side * side)
    file = BytesIO()
    Image.frombytes("RGB", (side, side), pixels).save(file, "PNG")
    return file.getvalue()


def build(folder):
    """Write all of them."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    def table(name, rows):
        file = Path(folder, name)
        file.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.Table.from_pylist(rows), file)
        return file

    rows = [rl_row(number) for number in range(12)]
    corpus = table("prism-vlm/rl_dataset/rl_training_data_5.9k.parquet", rows)
    table("prism-vlm/rl_dataset/rl_training_data_filtered_2k.parquet", rows[:8])
    table("prism-vlm/rl_dataset/rl_training_data_10k.parquet", rows[:10])
    table("AI4Math/MathVista/data/testmini-00000-of-00001-725687.parquet", [vista_row(0)])
    table("MathLLMs/MathVision/data/testmini-00000-of-00001-f8ff70.parquet", [vision_row(1)])
    table("MathLLMs/MathVision/data/test-00000-of-00001-3532b8.parquet", [vision_row(2)])
    write_pairs(Path(folder, "prism-vlm/qwen3_vl_moe_warmup_pairwise_120k"))

    dense = Path(folder, "Qwen/Qwen3-VL-2B-Instruct")
    dense.mkdir(parents=True)
    (dense / "config.json").write_text(json.dumps(tiny_config().to_dict()))
    init(dense / "config.json", dense, [corpus])
    for size in ("4B", "8B"):
        for end in ("", "-PRISM"):
            write_policy(dense, Path(folder, f"prism-vlm/Qwen3-VL-{size}-Instruct-SFT{end}"))
    write_discriminator(dense, Path(folder, "prism-vlm/Qwen3-VL-2B-4X-Moe-warmup-120k"))


# ----------------------------------------------------------------------------------------- rows
def rl_row(number):
    """A row of rl_dataset's files, its columns in their order."""
    return {
        "images": [{"bytes": picture(number), "path": None}],
        "data_source": "mm_gad",
        "prompt": [
            {"role": "system", "content": SYSTEM_PROMPT + "\n"},
            {"role": "user", "content": QUESTION},
        ],
        "teacher_caption": CAPTION,
        "teacher_cot": COT,
        "teacher_response": RESPONSE,
        "answer": "1",
        "reward_model": {"ground_truth": "1", "style": "rule"},
    }


def write_pairs(folder):
    """JSONL whose images lie in an archive."""
    folder.mkdir(parents=True)
    lines = []
    with tarfile.open(folder / "images.tar.gz", "w:gz") as archive:
        for number in range(20):
            image = f"images/{number}.png"
            content = picture(number)
            entry = tarfile.TarInfo(image)
            entry.size = len(content)
            archive.addfile(entry, BytesIO(content))
            row = {
                "id": number,
                "image": image,
                "question": "how many red",
                "teacher_caption": CAPTION,
                "teacher_cot": COT,
                "student_caption": "<caption>\nred\n</caption>",
                "student_cot": COT.replace("so", "1 1"),
            }
            lines.append(json.dumps(row) + "\n")
    (folder / "warmup_pairwise.jsonl").write_text("".join(lines))


def vista_row(number):
    return {
        "pid": str(number),
        "question": "how many red",
        "image": f"images/{number}.jpg",
        "decoded_image": {"bytes": picture(number), "path": None},
        "choices": None,
        "unit": None,
        "precision": 1.0,
        "answer": "1",
    }


def vision_row(number):
    return {
        "id": str(number),
        "question": "how many red\n<image1>",
        "options": ["1", "so"],
        "image": f"images/{number}.jpg",
        "decoded_image": {"bytes": picture(number), "path": None},
        "answer": "A",
        "solution": None,
        "level": 2,
    }


# ---------------------------------------------------------------------------------- checkpoints
def write_policy(dense, folder):
    """In two shards of bfloat16, with a configuration as transformers 4.57 writes it."""
    hf = AutoModelForImageTextToText.from_pretrained(dense, dtype=torch.bfloat16)
    hf.save_pretrained(folder, max_shard_size="60KB")
    files.copy_processor(dense, folder)
    settings = json.loads((folder / "config.json").read_text())
    files.write_config(settings, folder, tied=True)
    assert len(list(folder.glob("*.safetensors"))) > 1


def write_discriminator(dense, folder):
    """In 18 shards, with the experts in the layout of transformers 4.57 and a value head."""
    settings = files.as_mixture(json.loads((dense / "config.json").read_text()), 4, 2)
    folder.mkdir(parents=True)
    files.write_config(settings, folder, tied=True)
    files.copy_processor(dense, folder)
    hf = Qwen3VLMoeForConditionalGeneration(AutoConfig.from_pretrained(folder)).bfloat16()
    state = files.with_older_experts(hf.state_dict())
    width = settings["text_config"]["hidden_size"]
    state["v_head.1.weight"] = torch.randn(1, width, dtype=torch.bfloat16)
    write_shards(state, folder, SHARDS)


def write_shards(state, folder, number):
    """Write a state dict in so many files and an index."""
    place = {}
    for shard in range(number):
        file = f"model-{shard + 1:05}-of-{number:05}.safetensors"
        some = {key: state[key].clone() for key in sorted(state)[shard::number]}
        save_file(some, folder / file, {"format": "pt"})
        place |= dict.fromkeys(some, file)
    index = {"metadata": {}, "weight_map": place}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


# -------------------------------------------------------------------------------------- the hub
@contextmanager
def served(folder):
    """The address of a hub on this machine that has what lies in `folder`, at one commit."""

    class Hub(BaseHTTPRequestHandler):
        def do_GET(self):
            answer(self, Path(folder))

        do_HEAD = do_GET

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


def answer(request, folder):
    """What the hub's client asks for: a repository's commit, the list of its files, a file."""
    path = request.path.partition("?")[0].strip("/")
    path = path.removeprefix("api/").removeprefix("models/").removeprefix("datasets/")
    owner, name, *rest = f"{path}/".split("/")
    repository = folder / owner / name
    if not name or not repository.is_dir():
        return reply(request, 404, b"{}", {"X-Error-Code": "RepoNotFound"})
    if rest[:1] == ["resolve"]:  # a commit and a file
        file = repository.joinpath(*rest[2:])
        if not file.is_file():
            return reply(request, 404, b"", {"X-Error-Code": "EntryNotFound"})
        content = file.read_bytes()
        return reply(request, 200, content, {"ETag": f'"{etag(content)}"', "X-Repo-Commit": COMMIT})
    found = sorted(file for file in repository.rglob("*") if file.is_file())
    if rest[:1] == ["tree"]:
        return reply_in_json(request, [entry(file, repository) for file in found])
    names = [{"rfilename": file.relative_to(repository).as_posix()} for file in found]
    reply_in_json(request, {"id": f"{owner}/{name}", "sha": COMMIT, "siblings": names})


def entry(file, repository):
    return {
        "type": "file",
        "path": file.relative_to(repository).as_posix(),
        "size": file.stat().st_size,
        "oid": etag(file.read_bytes()),
    }


def etag(content):
    return hashlib.sha1(content).hexdigest()


def reply_in_json(request, content):
    reply(request, 200, json.dumps(content).encode(), {"Content-Type": "application/json"})


def reply(request, status, content, headers):
    request.send_response(status)
    for name, value in (headers | {"Content-Length": str(len(content))}).items():
        request.send_header(name, value)
    request.end_headers()
    if request.command == "GET":
        request.wfile.write(content)
