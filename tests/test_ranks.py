"""Two processes (gloo, FSDP2) do what one does: the same rollouts, losses, gradients and checkpoints."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from test_stages import COMMON, ROLLOUTS, leave_no_group, opens_everywhere, records, weights, world  # noqa: F401

import align
import rlvr
import sft

GAME = dict(steps=1, lr=1e-3, disc_lr=1e-3, probe_every=1, warmup_steps=2, warmup_pairs=32, upcycle_noise=0.1)
RUNS = {  # name -> (stage, data, flags)
    "sft": ("sft", "curated", dict(steps=2, batch=8, lr=1e-3, schedule="constant", warmup=0.0)),
    "align": ("align", "align", GAME | ROLLOUTS),
    "rlvr": ("rlvr", "rl", dict(steps=1, lr=1e-3, minibatches=2, kl=0.1) | ROLLOUTS),
    "experts": ("align", "align", GAME | ROLLOUTS | dict(disc="experts", warmup_steps=0)),
    "dense": ("align", "align", GAME | ROLLOUTS | dict(disc="dense", disc_blind=True, warmup_steps=0)),
    "whole": ("align", "align", GAME | ROLLOUTS | dict(spans="whole", warmup_steps=0, checkpointing=True)),
    "uneven": ("align", "align", GAME | ROLLOUTS | dict(prompts_per_step=3, warmup_steps=0, pack_tokens=64)),
    "gspo": ("rlvr", "rl", dict(steps=2, lr=1e-3, algo="gspo", pack_tokens=64) | ROLLOUTS),
    "dapo": ("rlvr", "rl", ROLLOUTS | dict(steps=4, lr=1e-3, algo="dapo", overlong=8, prompts_per_step=2,
                                           prompts_per_draw=12, max_draws=3)),
}  # fmt: skip
FAST = ("sft", "align", "rlvr")
STAGES = {"sft": sft, "align": align, "rlvr": rlvr}
SCRIPT = """
import json, os, sys
sys.path.insert(0, {root!r})
import torch
torch.set_num_threads(1)
import align, rlvr, sft
for n, (stage, flags) in enumerate(json.load(open(sys.argv[1]))):
    os.environ["MASTER_PORT"] = sys.argv[2 + n]  # each run makes a process group of its own
    stage = dict(align=align, rlvr=rlvr, sft=sft)[stage]
    stage.main(stage.Args(**flags))
"""


def arguments(name, world, out, **more):  # noqa: F811
    stage, data, flags = RUNS[name]
    return stage, COMMON | flags | dict(policy=world.sft, data=getattr(world, data), out=str(out)) | more


def free_ports(n):
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(n)]
    ports = [str(s.getsockname()[1]) for s in sockets]
    for s in sockets:
        s.close()
    return ports


def on_two_ranks(jobs, folder, timeout=240):
    """Run [(stage, flags)] one after the other on two ranks, in two processes; a failure shows what they printed."""
    (folder / "jobs.json").write_text(json.dumps(jobs))
    ports, env = free_ports(len(jobs)), {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", SCRIPT.format(root=str(ROOT)), str(folder / "jobs.json"), *ports]
    processes, prints = [], [folder / "rank0.txt", folder / "rank1.txt"]
    for rank, file in enumerate(prints):
        env |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        with open(file, "w") as out:
            processes.append(subprocess.Popen(command, env=os.environ | env, stdout=out, stderr=out))
    try:
        codes = [p.wait(timeout if rank == 0 else 30) for rank, p in enumerate(processes)]
    except subprocess.TimeoutExpired:
        codes = ["hangs"]
    finally:
        for p in processes:
            p.kill()
    assert codes == [0, 0], "\n".join(f"--- {f.name}\n{f.read_text()[-4000:]}" for f in prints)


def agree(one, two, rel=1e-4):
    """Records of runs on one and on two ranks: sums and means of the same numbers in another order."""
    assert len(one) == len(two) > 0
    loose = {"logp_diff", "logp_diff_max", "seconds"}
    for a, b in zip(one, two, strict=True):
        assert a.keys() == b.keys()
        wrong = {k: (a[k], b[k]) for k in a.keys() - loose if a[k] != pytest.approx(b[k], rel=rel, abs=2e-6, nan_ok=True)}
        assert not wrong, a["step"]
        assert b.get("logp_diff_max", 0) < 1e-4


def same_as_alone(names, world, tmp_path):  # noqa: F811
    on_two_ranks([arguments(name, world, tmp_path / f"{name}2") for name in names], tmp_path)
    for name in names:
        stage, flags = arguments(name, world, tmp_path / f"{name}1")
        STAGES[stage].main(STAGES[stage].Args(**flags))
        one, two = tmp_path / f"{name}1", tmp_path / f"{name}2"
        agree(records(one), records(two))
        if (one / "warmup").exists():
            agree(records(one / "warmup"), records(two / "warmup"))
        opens_everywhere(two / "last", world)
        players = ["last"] + ["last/discriminator"] * (stage == "align") + ["warmup/last"] * (one / "warmup").exists()
        for player in players:
            a, b = weights(one / player), weights(two / player)
            assert a.keys() == b.keys() and a
            start = weights(world.sft)
            for k in a:  # Adam turns rounding of a gradient near zero into a step of either sign: not bit for bit
                torch.testing.assert_close(a[k], b[k], rtol=0, atol=5e-3 if player == "last" else 1e-1)
            if player == "last":
                moves = [torch.cat([(x[k] - start[k]).flatten() for k in a if k in start]) for x in (a, b)]
                assert torch.cosine_similarity(*moves, dim=0) > 0.99


def test_two_ranks_do_what_one_does(world, tmp_path):  # noqa: F811
    same_as_alone(FAST, world, tmp_path)


@pytest.mark.slow
def test_two_ranks_do_what_one_does_with_other_flags(world, tmp_path):  # noqa: F811
    same_as_alone([name for name in RUNS if name not in (*FAST, "dapo")], world, tmp_path)


@pytest.mark.slow
def test_dapo_on_two_ranks(world, tmp_path):  # noqa: F811
    """Which groups are kept depends on which rank sampled them: not the same numbers, but sound ones; then resumed."""
    stage, flags = arguments("dapo", world, tmp_path / "dapo")
    on_two_ranks([(stage, flags | {"steps": 3}), (stage, flags | {"resume": True})], tmp_path)
    found = records(tmp_path / "dapo")
    assert [r["step"] for r in found] == [1, 2, 3, 4]
    assert sum(r["surplus"] for r in found) > 0
    for r in found:
        assert r["groups"] <= 2 and r["draws"] <= 3 and r["sampled"] == 12 * r["draws"]
        assert r["logp_diff_max"] < 1e-4 and (r["groups"] == 0 or r["grad_norm"] > 0)


@pytest.mark.slow
def test_resume_on_another_number_of_ranks(world, tmp_path):  # noqa: F811
    """Begun on two ranks, ended on one: as all on one. What was saved in two pieces is put together."""
    on_two_ranks([arguments(name, world, tmp_path / f"{name}2") for name in FAST], tmp_path)
    for name in FAST:
        stage, flags = arguments(name, world, tmp_path / f"{name}2")
        more = dict(steps=flags["steps"] + 1)
        STAGES[stage].main(STAGES[stage].Args(**flags | more | dict(resume=True)))
        STAGES[stage].main(STAGES[stage].Args(**arguments(name, world, tmp_path / f"{name}1", **more)[1]))
        agree(records(tmp_path / f"{name}1"), records(tmp_path / f"{name}2"), rel=1e-3)


@pytest.mark.slow
def test_torchrun(world, tmp_path):  # noqa: F811
    """The command of the docstring; torchrun sets what ranks.setup reads."""
    _, flags = arguments("sft", world, tmp_path)
    flags = [f"--{k}={v}" for k, v in flags.items()]
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", f"--master_port={free_ports(1)[0]}"]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run([*command, str(ROOT / "sft.py"), *flags], env=env, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-4000:]
    assert [r["step"] for r in records(tmp_path)] == [1, 2]
    header = json.loads(Path(tmp_path, "log.jsonl").read_text().splitlines()[0])
    assert header["hardware"]["ranks"] == 2


def test_bfloat16_is_sharded_on_one_rank_too(world, tmp_path):  # noqa: F811
    """FSDP2 in one process: parameters stay float32, products are bfloat16, rollouts come from a bfloat16 copy."""
    for name in FAST:
        stage, flags = arguments(name, world, tmp_path / name, dtype="bfloat16", steps=1)
        STAGES[stage].main(STAGES[stage].Args(**flags | ({"warmup_steps": 0} if stage == "align" else {})))
        (found,) = records(tmp_path / name)
        assert found["grad_norm"] > 0 and found["skipped"] == 0
        assert found.get("logp_diff_max", 0) < 0.3
        opens_everywhere(tmp_path / name / "last", world)
        assert all(v.dtype == torch.float32 for v in weights(tmp_path / name / "last").values())
