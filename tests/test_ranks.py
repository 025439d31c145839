"""Several processes (gloo, FSDP2) do what one does: the same rollouts, losses, gradients and
checkpoints. Nothing hangs."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import ROOT, free_ports
from test_stages import COMMON, ROLLOUTS, leave_no_group, opens_everywhere, records, weights, world  # noqa: F401

import align
import rlvr
import sft
from engine.arguments import flags_of

GAME = (
    dict(steps=1, lr=1e-3, disc_lr=1e-3, probe_every=1, warmup_steps=0, upcycle_noise=0.1)
    | ROLLOUTS
)
SFT = dict(steps=2, batch=8, lr=1e-2, schedule="constant", warmup=0.0)
RL = dict(steps=1, lr=1e-3, minibatches=2, kl=0.1) | ROLLOUTS
VALIDATION = dict(eval_rows=3, eval_every=1, max_response=32)
DAPO = ROLLOUTS | dict(
    lr=1e-3, algo="dapo", overlong=8, prompts_per_step=2, prompts_per_draw=12, max_draws=3
)
RUNS = {  # name -> (stage, data, flags)
    "sft": ("sft", "curated", SFT | VALIDATION | dict(eval_rollouts=True)),
    "align": ("align", "align", GAME | dict(warmup_steps=2, warmup_pairs=32)),
    "rlvr": ("rlvr", "rl", RL | VALIDATION),
    "experts": ("align", "align", GAME | dict(disc="experts")),
    "dense": ("align", "align", GAME | dict(disc="dense", disc_blind=True)),
    "whole": ("align", "align", GAME | dict(spans="whole")),
    "split": ("align", "align", GAME | dict(pack_tokens=64)),
    "pairs": ("align", "align", GAME | dict(pairs="pairs", warmup_steps=2, warmup_pairs=10)),
    "gspo": ("rlvr", "rl", RL | dict(steps=2, algo="gspo", kl=0.0, pack_tokens=64)),
    "dapo": ("rlvr", "rl", DAPO | dict(steps=4)),
    # shards that are uneven: of three prompts one has an image
    "uneven sft": ("sft", "three", SFT | dict(batch=3)),
    "uneven align": ("align", "three", GAME | dict(prompts_per_step=3, disc="experts")),
    "uneven rlvr": (
        "rlvr",
        "three",
        RL | dict(prompts_per_step=3, kl=0.0),
    ),  # kl of nearly nothing is rounding
    # or empty: one prompt for all ranks
    "empty sft": ("sft", "curated", SFT | dict(batch=1)),
    "empty align": ("align", "align", GAME | dict(prompts_per_step=1)),
    "empty rlvr": ("rlvr", "rl", RL | dict(prompts_per_step=1, minibatches=1)),
    "empty dapo": ("rlvr", "rl", DAPO | dict(steps=2, prompts_per_draw=1)),
    # nothing to learn from on one rank, or on any
    "malformed": ("align", "align", GAME | dict(prompts_per_step=2)),
    "all malformed": ("align", "align", GAME | dict(prompts_per_step=2)),
    "never right": ("rlvr", "never", DAPO | dict(steps=2, prompts_per_draw=4, max_draws=2)),
    # the same by other means
    "checkpointing": ("align", "align", GAME | dict(checkpointing=True)),
    "offload": ("align", "align", GAME | dict(offload=True)),
    "nodes": ("align", "align", GAME | dict(nodes=2)),
    "plain": ("align", "align", GAME),
    "frozen": ("align", "align", GAME | dict(freeze_vision=True)),
    "trained vision": ("sft", "three", SFT | dict(batch=3, freeze_vision=False)),
}
FAST = ("sft", "align", "rlvr")
MALFORMED = {"malformed": [1], "all malformed": [0, 1]}  # prompts whose rollouts are cut short
STAGES = {"sft": sft, "align": align, "rlvr": rlvr}
ALONE = {
    "checkpointing": "plain",
    "offload": "plain",
    "nodes": "plain",
}  # what another run on one rank has to equal


def data_files(world):  # noqa: F811
    """{name: file}: the world's, three rows of which one has an image, and questions that no
    rollout answers rightly."""
    files = {name: Path(getattr(world, name)) for name in ("curated", "align", "pairs", "rl")}
    for name in ("curated", "align", "rl"):
        rows = [json.loads(line) for line in files[name].read_text().splitlines()[:3]]
        for row in rows[1:]:
            row["images"] = []
            for message in row.get("messages") or row["prompt"]:
                message["content"] = message["content"].replace("<image>", "")
        files[f"three {name}"] = write(world.folder / f"three_{name}.jsonl", rows)
    rows = [json.loads(line) for line in files["rl"].read_text().splitlines()]
    for row in rows:
        row["reward_model"]["ground_truth"] = "never"
    return files | {"never": write(world.folder / "never_right.jsonl", rows)}


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def job(name, world, out, sgd=True, **more):  # noqa: F811
    """What ranked.py runs. sgd: linear in the gradient, so that runs can be compared beyond their
    first update."""
    (stage, data, flags), files = RUNS[name], data_files(world)
    data = files[
        f"three {dict(sft='curated', align='align', rlvr='rl')[stage]}" if data == "three" else data
    ]
    flags = COMMON | flags | dict(policy=world.sft, data=str(data), out=str(out)) | more
    flags |= {"pairs": str(files["pairs"])} if flags.get("pairs") else {}
    flags |= {"eval_data": str(files["align"])} if flags.get("eval_rows") else {}
    return {"stage": stage, "flags": flags, "sgd": sgd, "malformed": MALFORMED.get(name, [])}


def on_ranks(n, jobs, folder, timeout=300, **env):
    """Run jobs one after the other on n ranks, a process each. A failure, or a hang, shows what
    they printed."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "jobs.json").write_text(json.dumps(jobs))
    env |= {"WORLD_SIZE": str(n), "MASTER_ADDR": "127.0.0.1", "OMP_NUM_THREADS": "1"}
    command = [
        sys.executable,
        ROOT / "tests/ranked.py",
        folder / "jobs.json",
        *free_ports(len(jobs)),
    ]
    processes, prints, end = (
        [],
        [folder / f"rank{rank}.txt" for rank in range(n)],
        time.time() + timeout,
    )
    try:
        for rank, file in enumerate(prints):
            with open(file, "w") as out:
                mine = os.environ | env | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
                processes.append(subprocess.Popen(command, env=mine, stdout=out, stderr=out))
        while (
            None in (codes := [p.poll() for p in processes])
            and not any(codes)
            and time.time() < end
        ):
            time.sleep(0.05)
    finally:
        for p in processes:
            p.kill()
    why = f"exit codes {codes} (None: it hung for {timeout} s, or another failed)\n"
    assert codes == [0] * n, why + "\n".join(
        f"--- {f.name}\n{f.read_text()[-4000:]}" for f in prints
    )


def agree(one, two, rel=1e-4):
    """Records of runs on different ranks: losses and gradient norms to 1e-5, figures of small
    differences to `rel`."""
    assert len(one) == len(two) > 0
    loose = {"logp_diff", "logp_diff_max", "seconds", "eval/seconds"}
    exact = {"loss", "disc_loss", "grad_norm", "disc_grad_norm"} if rel == 1e-4 else ()
    for a, b in zip(one, two, strict=True):
        assert a.keys() == b.keys()
        near = {}
        for k in a.keys() - loose:
            near[k] = b[k]
            if b[k] is not None:  # else there was no data
                rounding = (1e-5, 1e-7) if k in exact else (rel, 2e-6)
                near[k] = pytest.approx(b[k], *rounding)
        wrong = {k: (a[k], b[k]) for k in near if a[k] != near[k]}
        assert not wrong, f"step {a['step']}: {wrong}"
        assert a.get("eval/prompts", 3) == 3
        assert not (b.get("logp_diff_max") or 0) > 1e-4


def same_gradients(one, two):
    """Of every update and parameter: to 1e-5 of the parameter's gradient, or 1e-6 of the whole."""
    one, two = (torch.load(folder / "probe.pt", weights_only=True) for folder in (one, two))
    assert one["rollouts"] == two["rollouts"]
    assert len(one["gradients"]) == len(two["gradients"])
    for a, b in zip(one["gradients"], two["gradients"], strict=True):
        assert a.keys() == b.keys()
        whole = sum(g.norm() ** 2 for g in a.values()) ** 0.5
        wrong = {
            k: float((a[k] - b[k]).norm() / a[k].norm())
            for k in a
            if not (a[k] - b[k]).norm() <= 1e-5 * a[k].norm() + 1e-6 * whole
        }
        assert not wrong, f"{two['meshes']}: {wrong}"
    return sorted(two["meshes"])


def same_runs(one, two):
    agree(records(one), records(two))
    if (one / "warmup").exists():
        agree(records(one / "warmup"), records(two / "warmup"))
    return same_gradients(one, two)


@pytest.fixture(scope="session")
def alone(world, tmp_path_factory):  # noqa: F811
    """All runs on one rank: their folder."""
    folder = tmp_path_factory.mktemp("alone")
    on_ranks(1, [job(name, world, folder / name) for name in RUNS if name not in ALONE], folder)
    return folder


def test_two_ranks_do_what_one_does(world, tmp_path):  # noqa: F811
    """Nor does it matter how many threads read their rows and verify their rollouts."""
    for n, workers in ((1, 0), (2, 2)):
        jobs = [job(name, world, tmp_path / f"{name}{n}", workers=workers) for name in FAST]
        on_ranks(n, jobs, tmp_path)
    for name in FAST:
        one, two = tmp_path / f"{name}1", tmp_path / f"{name}2"
        assert same_runs(one, two) == [(2,)]
        opens_everywhere(two / "last", world)
        for player in ["last"] + ["last/discriminator", "warmup/last"] * (name == "align"):
            a, b = weights(one / player), weights(two / player)
            assert a.keys() == b.keys() and a
            for k in a:
                torch.testing.assert_close(a[k], b[k], rtol=1e-5, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("n", [2, 3])
def test_any_number_of_ranks_does_what_one_does(alone, world, tmp_path, n):  # noqa: F811
    """Every form of the stages, and shards that are uneven, empty or hold nothing to learn from."""
    names = [name for name in RUNS if not (name == "nodes" and n % 2)]
    on_ranks(n, [job(name, world, tmp_path / name) for name in names], tmp_path, timeout=600)
    meshes = {name: same_runs(alone / ALONE.get(name, name), tmp_path / name) for name in names}
    assert meshes == dict.fromkeys(names, [(n,)]) | {"never right": []} | (
        {"nodes": [(2, 1)]} if "nodes" in names else {}
    )
    assert (
        sum(r["surplus"] for r in records(tmp_path / "dapo"))
        > 0
        < sum(r["dropped"] for r in records(tmp_path / "dapo"))
    )
    for r in records(tmp_path / "dapo"):
        assert r["groups"] <= 2 and r["draws"] <= 3 and r["sampled"] == 12 * r["draws"]
    assert [(r["groups"], r["draws"], r["skipped"]) for r in records(tmp_path / "never right")] == [
        (0, 2, 1)
    ] * 2
    assert [r["draws"] for r in records(tmp_path / "empty dapo")] == [3, 3]
    assert (
        records(tmp_path / "all malformed")[0]["format"]
        == 0
        < records(tmp_path / "malformed")[0]["format"]
        <= 0.5
    )


@pytest.mark.slow
def test_nodes(alone, world, tmp_path):  # noqa: F811
    """HSDP, 2 nodes of 2 ranks, as torchrun's variable says; 3 nodes of 4 ranks are refused."""
    on_ranks(4, [job("plain", world, tmp_path / "plain")], tmp_path, GROUP_WORLD_SIZE="2")
    assert same_runs(alone / "plain", tmp_path / "plain") == [(2, 2)]
    with pytest.raises(AssertionError, match="2 ranks on 3 nodes: all nodes need equally many"):
        on_ranks(2, [job("sft", world, tmp_path / "sft", nodes=3)], tmp_path)


@pytest.mark.slow
def test_one_rank_alone_by_other_means(alone, world, tmp_path):  # noqa: F811
    on_ranks(
        1, [job(name, world, tmp_path / name) for name in ("checkpointing", "offload")], tmp_path
    )
    for name in ("checkpointing", "offload"):
        same_runs(alone / "plain", tmp_path / name)


@pytest.mark.slow
def test_resume_on_another_number_of_ranks(world, tmp_path):  # noqa: F811
    """Begun on two ranks, ended on one: as all on one. What was saved in two pieces is put
    together."""
    names = (*FAST, "dapo")
    on_ranks(2, [job(name, world, tmp_path / f"{name}2", sgd=False) for name in names], tmp_path)
    for name in names:
        stage, flags = (job(name, world, tmp_path / f"{name}2")[k] for k in ("stage", "flags"))
        more = dict(steps=flags["steps"] + 1)
        STAGES[stage].main(STAGES[stage].Args(**flags | more | dict(resume=True)))
        STAGES[stage].main(
            STAGES[stage].Args(**flags | more | dict(out=str(tmp_path / f"{name}1")))
        )
        agree(records(tmp_path / f"{name}1"), records(tmp_path / f"{name}2"), rel=1e-3)


def torchrun(nodes=1):
    return [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc_per_node=2",
        f"--master_port={free_ports(1)[0]}",
    ]


@pytest.mark.slow
def test_torchrun(world, tmp_path):  # noqa: F811
    """The command of the docstring; torchrun sets what ranks.setup reads."""
    flags = []
    for name, value in job("sft", world, tmp_path)["flags"].items():
        flags += flags_of(name, value)
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*torchrun(), str(ROOT / "sft.py"), *flags],
        env=env,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert [r["step"] for r in records(tmp_path)] == [0, 1, 2]  # 0: the validation before
    header = json.loads(Path(tmp_path, "log.jsonl").read_text().splitlines()[0])
    assert header["hardware"]["ranks"] == 2


@pytest.mark.slow
def test_torchrun_on_two_nodes(world, tmp_path):  # noqa: F811
    """Two of torchrun's agents, a rank each: the parameters are on a mesh of two nodes."""
    (tmp_path / "jobs.json").write_text(json.dumps([job("sft", world, tmp_path / "sft")]))
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nnodes=2",
        "--nproc_per_node=1",
        "--master_addr=127.0.0.1",
        f"--master_port={free_ports(1)[0]}",
    ]
    script, env = (
        [str(ROOT / "tests/ranked.py"), str(tmp_path / "jobs.json")],
        os.environ | {"OMP_NUM_THREADS": "1"},
    )
    agents = [
        subprocess.Popen([*command, f"--node_rank={rank}", *script], env=env) for rank in (0, 1)
    ]
    try:
        assert [agent.wait(240) for agent in agents] == [0, 0]
    finally:
        for agent in agents:
            agent.kill()
    assert torch.load(tmp_path / "sft/probe.pt", weights_only=True)["meshes"] == [(2, 1)]


@pytest.mark.slow
@pytest.mark.parametrize("name", FAST)
def test_an_error_on_one_rank_ends_all(world, tmp_path, name):  # noqa: F811
    """Rank 1 fails in its second update, where rank 0 waits for it: all end, and the last words are
    rank 1's."""
    planted = job(name, world, tmp_path / "out", steps=3) | {"fail": [1, 1]}
    (tmp_path / "jobs.json").write_text(json.dumps([planted]))
    command = [*torchrun(), str(ROOT / "tests/ranked.py"), str(tmp_path / "jobs.json")]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=240)
    seconds = time.time() - float(done.stdout.split("planted at ")[1].split()[0])
    assert done.returncode != 0 and seconds < 60
    assert "rank 1 of 2: ValueError: a planted error" in done.stderr
    root_cause = done.stderr.split("Root Cause")[1]
    assert "ValueError: a planted error" in root_cause and "rank      : 1" in root_cause
    print(f"{name}: all ended after {seconds:.1f} s")


def test_bfloat16_is_sharded_on_one_rank_too(world, tmp_path):  # noqa: F811
    """FSDP2 in one process: parameters stay float32, products are bfloat16, rollouts come from a
    bfloat16 copy."""
    for name in FAST:
        made = job(
            name,
            world,
            tmp_path / name,
            dtype="bfloat16",
            steps=1,
            **({"warmup_steps": 0} if name == "align" else {}),
        )
        STAGES[made["stage"]].main(STAGES[made["stage"]].Args(**made["flags"]))
        found = records(tmp_path / name)[-1]
        assert found["grad_norm"] > 0 and found["skipped"] == 0
        assert found.get("logp_diff_max", 0) < 0.3
        opens_everywhere(tmp_path / name / "last", world)
        assert all(v.dtype == torch.float32 for v in weights(tmp_path / name / "last").values())
