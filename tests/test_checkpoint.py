"""Checkpoints of a run, on one rank and on two (gloo): resumed bit for bit, written whole or
not."""

import json
import math
import os
import shutil
import signal
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import torch.multiprocessing as mp
from conftest import free_ports
from torch.distributed.fsdp import fully_shard

from engine import arguments, checkpoint, optimiser, ranks


@dataclass
class Args(arguments.Common):
    pass


@pytest.fixture
def alone():
    here = ranks.setup(Args(policy="p", out="o", device="cpu"))
    yield here
    here.close()


class Toy(torch.nn.Module):
    """Dropout for the RNG, a tied weight, and a parameter that never gets a gradient."""

    def __init__(self, tied):
        super().__init__()
        self.first = torch.nn.Linear(6, 6)
        self.last = torch.nn.Linear(6, 6)
        if tied:
            self.last.weight = self.first.weight
        self.unused = torch.nn.Parameter(torch.ones(3))

    def forward(self, x):
        return self.last(torch.nn.functional.dropout(self.first(x).relu()))


def train(model, optimizer, order, steps):
    losses = []
    for _ in range(steps):
        loss = model(torch.randn(4, 6, generator=order)).square().mean()
        loss.backward()
        optimiser.step_if_finite(optimizer, loss, 1.0, "toy")
        losses.append(loss.item())
    return losses


def fresh(seed, tied=True, sharded=False):
    torch.manual_seed(seed)
    model = Toy(tied)
    if sharded:
        fully_shard(model.first)  # sharded and whole parameters in one model
    return model, optimiser.optimizer(model, 0.01, 0.1)


def no_weights(path):
    pass


def test_resume_is_bit_for_bit(tmp_path, alone):
    """Two steps, a checkpoint, a new process's objects, two more: losses, weights and optimiser
    equal those of four."""
    model, optimizer = fresh(0)
    expected = train(model, optimizer, torch.Generator().manual_seed(5), 4)

    half, half_optimizer = fresh(0)
    order = torch.Generator().manual_seed(5)
    losses = train(half, half_optimizer, order, 2)
    state = {"order": order.get_state(), "surplus": [(1, torch.ones(2))]}
    folder = tmp_path / "last"

    def write_weights(path):
        (path / "weights").touch()

    checkpoint.save(folder, write_weights, {"step": 2}, {"p": (half, half_optimizer)}, state)
    assert (folder / "weights").exists()
    assert list(tmp_path.iterdir()) == [folder]

    again, again_optimizer = fresh(1)
    meta, kept = checkpoint.restore(folder, {"p": (again, again_optimizer)})
    assert meta["step"] == 2 and {"commit", "versions"} <= set(meta)
    assert kept["surplus"][0][0] == 1
    order = torch.Generator()
    order.set_state(kept["order"])
    assert losses + train(again, again_optimizer, order, 2) == expected
    assert all(torch.equal(v, again.state_dict()[k]) for k, v in model.state_dict().items())
    ours = optimizer.state_dict()["state"]
    theirs = again_optimizer.state_dict()["state"]
    assert ours.keys() == theirs.keys()
    for number, moments in ours.items():
        assert all(torch.equal(moment, theirs[number][k]) for k, moment in moments.items())


def test_no_checkpoint_and_another_model(tmp_path, alone):
    model, optimizer = fresh(0)
    players = {"p": (model, optimizer)}
    assert checkpoint.restore(tmp_path / "last", players) is None
    checkpoint.save(tmp_path / "last", no_weights, {"step": 0}, players)
    model.extra = torch.nn.Linear(2, 2)
    with pytest.raises(ValueError, match="another model.*p.model.extra"):
        checkpoint.restore(tmp_path / "last", players)


def test_changed_arguments_are_said_in_a_line(tmp_path, alone, capsys):
    players = {"p": fresh(0)}
    args = Args(policy="p", out="o", steps=4, lr=0.01)
    checkpoint.save(tmp_path / "last", no_weights, {"step": 2, "args": vars(args)}, players)
    same = Args(policy="p", out="o", steps=4, lr=0.01, resume=True)
    checkpoint.restore(tmp_path / "last", players, same)
    assert capsys.readouterr().out == ""
    other = Args(policy="p", out="o", steps=8, lr=0.001, weight_decay=0.1, resume=True)
    checkpoint.restore(tmp_path / "last", players, other)
    said = capsys.readouterr().out
    assert said.count("\n") == 1
    assert "last: goes on after step 2 with other arguments: --steps 8 (was 4), --lr 0.001" in said
    assert "--weight_decay 0.1 (was 0.01)" in said


def test_a_checkpoint_of_an_earlier_version(tmp_path, alone):
    players = {"p": fresh(0)}
    checkpoint.save(tmp_path / "last", no_weights, {"step": 0}, players)
    file = tmp_path / "last/resume/state.pt"
    kept = torch.load(file, weights_only=True)
    del kept["version"]  # as before there were versions
    torch.save(kept, file)
    with pytest.raises(ValueError, match="cannot be resumed: .*made by an earlier version of this"):
        checkpoint.restore(tmp_path / "last", players)


def test_failed_save_leaves_the_last_checkpoint(tmp_path, alone, monkeypatch):
    """An error in each phase of a save, the swap of names included, costs the new checkpoint,
    never the old one."""
    folder = tmp_path / "last"
    player = {"p": fresh(0)}
    checkpoint.save(folder, no_weights, {"step": 1}, player)

    def full_disk(*_, **__):
        raise OSError("No space left on device")

    with pytest.raises(OSError):
        checkpoint.save(folder, full_disk, {"step": 2}, player)
    assert checkpoint.restore(folder, player)[0]["step"] == 1
    rename = Path.rename

    def rename_old_only(path, target):
        return full_disk() if path.name == "last.new" else rename(path, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", rename_old_only)
        with pytest.raises(OSError):
            checkpoint.save(folder, no_weights, {"step": 3}, player)
    assert not folder.exists()
    assert checkpoint.restore(folder, player)[0]["step"] == 1
    checkpoint.save(folder, no_weights, {"step": 4}, player)
    assert checkpoint.restore(folder, player)[0]["step"] == 4
    assert list(tmp_path.iterdir()) == [folder]


# ----------------------------------------------------------------------------- what stays
def write_weights(path):
    (path / "weights").touch()


def whole_folders(folder):
    """{name: its meta.json} of the checkpoints in a run folder; none may lack anything."""
    found = {}
    for path in folder.iterdir():
        if not path.name.endswith(".new"):  # which the next save removes
            assert (path / "weights").exists()
            found[path.name] = json.loads((path / "meta.json").read_text())
    return found


def test_what_stays_of_a_run(tmp_path, alone):
    """step-* every --keep_every steps, best/ by a metric that may be NaN or missing, last/ in the
    end; the optimiser only in last/, or in all."""
    accuracies = {0: math.nan, 1: 0.2, 2: 0.5, 4: 0.5, 5: 0.1, 6: 0.4}
    options = dict(policy="p", eval_data="e", keep_best="eval/accuracy", keep_every=2, save_every=3)
    for keep_resume in (False, True):
        out = tmp_path / str(keep_resume)
        out.mkdir()
        args = Args(**options, out=str(out), keep_resume=keep_resume)
        run = checkpoint.Checkpoints(args, 6, {"p": fresh(0)}, write_weights)
        lasts = []
        for step in range(7):
            metrics = {"eval/accuracy": accuracies[step]} if step in accuracies else {}
            run.save(step, metrics, {"order": step})
            lasts.append(whole_folders(out).get("last", {}).get("step"))
            assert (out / "best").exists() == (step > 0)
        assert lasts == [None, None, None, 3, 3, 3, 6]
        found = whole_folders(out)
        assert found.keys() == {"best", "last", "step-000002", "step-000004", "step-000006"}
        assert (found["best"]["step"], found["best"]["best"]["value"]) == (2, 0.5)
        for name in found:
            assert (out / name / "resume").exists() == (keep_resume or name == "last")
        (out / "step-000007.new").mkdir()
        (out / "step-000007.new/meta.json").write_text('{"step": 7}')  # killed while writing
        steps = [(step, path.name) for step, path in checkpoint.kept_steps(out)]
        assert steps == [(2, "step-000002"), (4, "step-000004"), (6, "step-000006")]
    _, state = checkpoint.restore(out / "step-000004", {"p": fresh(1)})
    assert state == {"order": 4}
    with pytest.raises(FileNotFoundError, match="holds neither step-"):
        checkpoint.kept_steps(tmp_path)


def test_the_best_of_a_resumed_run(tmp_path, alone):
    """A best/ of a step that the run has made is what is to be beaten; one of a step that is made
    again is not; of a loss the lowest is best."""

    @dataclass
    class Stage(Args):
        keep_best: str = "eval/loss"

    args = Stage(policy="p", out=str(tmp_path), eval_data="e", save_every=0)

    def best_after(step, loss, done):
        run = checkpoint.Checkpoints(args, 100, {"p": fresh(0)}, write_weights, done)
        run.save(step, {"eval/loss": loss}, {})
        return whole_folders(tmp_path)["best"]["step"]

    assert best_after(1, 0.5, done=0) == 1
    assert best_after(4, 0.3, done=2) == 4
    assert best_after(6, 0.4, done=5) == 4
    assert best_after(3, 0.6, done=2) == 3
    (tmp_path / "best").rename(tmp_path / "best.old")  # killed between two renames
    assert best_after(8, 0.7, done=7) == 3


def test_a_kill_leaves_whole_folders(tmp_path, alone, monkeypatch):
    """Before each rename and removal of a step in which all three are written: what has its name
    is whole, and last/, from which a run goes on, is never ahead of the others."""
    options = dict(policy="p", out=str(tmp_path / "run"), eval_data="e", keep_best="eval/accuracy")
    args = Args(**options, keep_every=1, save_every=1)
    players = {"p": fresh(0)}

    class Killed(BaseException):
        pass

    def run(step, kill_at=None):
        calls = iter(range(100))

        def or_killed(plain):
            def call(path, *more, **named):
                # Within a checkpoint torch.distributed.checkpoint renames by itself.
                if Path(path).parent == Path(args.out) and next(calls) == kill_at:
                    raise Killed
                return plain(path, *more, **named)

            return call

        checkpoints = checkpoint.Checkpoints(args, 100, players, write_weights, done=step - 1)
        with monkeypatch.context() as patch:
            patch.setattr(Path, "rename", or_killed(Path.rename))
            patch.setattr(checkpoint.shutil, "rmtree", or_killed(shutil.rmtree))
            checkpoints.save(step, {"eval/accuracy": step / 100}, {})
        return next(calls)

    run(1)
    renames_and_removals = run(2)
    for kill_at in range(renames_and_removals):
        step = kill_at + 3
        with pytest.raises(Killed):
            run(step, kill_at)
        found = whole_folders(Path(args.out))
        last = found.get("last") or found["last.old"]
        best = found.get("best") or found["best.old"]
        assert last["step"] <= best["step"] <= step
        assert f"step-{last['step']:06}" in found
        run(step)
        found = whole_folders(Path(args.out))
        assert found["last"]["step"] == found["best"]["step"] == step
        assert not [name for name in found if name.endswith(".old")]


def test_sigterm_is_a_flag(alone):
    assert not alone.stop()
    os.kill(os.getpid(), signal.SIGTERM)
    assert alone.stop()
    assert ranks.SAVED_AND_STOPPED not in (0, 1, 2)


# ----------------------------------------------------------------------------- two ranks
def whole(tensor):
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def fill_gradients(model):
    for p in model.parameters():
        p.grad = torch.ones_like(p)


def _two_ranks(rank, folder):
    os.environ.update(RANK=str(rank), WORLD_SIZE="2", LOCAL_RANK=str(rank), MASTER_ADDR="127.0.0.1")
    os.environ["MASTER_PORT"] = (folder / "port").read_text()
    torch.set_num_threads(1)
    here = ranks.setup(Args(policy="p", out="o", device="cpu", seed=3))
    assert (here.rank, here.world) == (rank, 2)
    check_collectives(rank)
    check_sharded_checkpoint(rank, folder)
    here.close()


def check_collectives(rank):
    assert len({x.item() for x in ranks.gather(torch.rand(()))}) == 1  # same seed on all ranks
    mine = torch.tensor([rank + 1.0])
    assert ranks.all_sum(mine).item() == 3
    assert ranks.all_max(mine).item() == 2
    assert mine.item() == rank + 1
    assert ranks.all_sum({"b": rank, "a": 1}) == {"a": 2, "b": 1}
    assert ranks.all_sum(0.25) == 0.5
    assert ranks.all_sum(2**24 + 1) == 2**25 + 2  # beyond what float32 counts
    assert ranks.gather({"rank": rank}) == [{"rank": 0}, {"rank": 1}]
    assert ranks.agree(rank == 1) and not ranks.agree(False)


def check_sharded_checkpoint(rank, folder):
    model, optimizer = fresh(0, tied=False, sharded=True)
    fill_gradients(model)
    norm = ranks.clip_grad(model.parameters(), 1e9)
    assert norm == pytest.approx(math.sqrt(36 + 6 + 36 + 6 + 3))
    loss = math.nan if rank else 1.0  # bad on one rank only
    _, skipped = optimiser.step_if_finite(optimizer, loss, 1.0, "toy")
    assert skipped == 1
    assert not optimizer.state and model.first.weight.grad is None
    fill_gradients(model)
    optimiser.step_if_finite(optimizer, 1.0, 1.0, "toy")
    last = folder / "last"
    checkpoint.save(last, no_weights, {"step": 1}, {"p": (model, optimizer)}, {"cursor": 7})
    other, other_optimizer = fresh(1, tied=False, sharded=True)
    _, state = checkpoint.restore(last, {"p": (other, other_optimizer)})
    assert state == {"cursor": 7}
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(whole(a), whole(b))
        moments = [opt.state[p]["exp_avg"] for opt, p in ((optimizer, a), (other_optimizer, b))]
        assert torch.equal(*map(whole, moments))


def test_two_ranks_and_resume_on_one(tmp_path):
    (tmp_path / "port").write_text(free_ports(1)[0])
    mp.spawn(_two_ranks, (tmp_path,), nprocs=2)
    here = ranks.setup(Args(policy="p", out="o", device="cpu"))
    model, optimizer = fresh(1, tied=False)
    meta, _ = checkpoint.restore(tmp_path / "last", {"p": (model, optimizer)})
    assert meta["hardware"]["ranks"] == 2
    assert optimizer.state[model.first.weight]["step"] == 1
    expected, expected_optimizer = fresh(0, tied=False)
    fill_gradients(expected)
    optimiser.step_if_finite(expected_optimizer, 1.0, 1.0, "toy")
    for ours, theirs in zip(model.parameters(), expected.parameters(), strict=True):
        assert torch.allclose(ours, theirs)
    here.close()
