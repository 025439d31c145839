"""Arguments, log, optimiser and checkpoints, on one rank and on two (gloo)."""

import copy
import json
import math
import os
import signal
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import pytest
import torch
import torch.multiprocessing as mp
from conftest import free_ports
from torch.distributed.fsdp import fully_shard

import align
import rlvr
from engine import arguments, checkpoint, log, optimiser, ranks


@dataclass
class Args(arguments.Common):
    data: tuple[str, ...] = ()  # the rows, in 1 or more files
    alpha: float = 0.5  # weight of perception, 1 is 100 %
    blind: bool = False  # no images
    band: tuple[float, float] = (0.0, 1.0)  # pass rates
    scaled: bool | None = None  # none: the preset's
    ratio: Literal["token", "sequence"] | None = None  # none: the preset's

    def __post_init__(self):
        super().__post_init__()
        if self.alpha > 1:
            raise ValueError(f"--alpha is {self.alpha}: it is a share, at most 1")


NEEDED = ["--policy", "p", "--out", "o"]


@pytest.fixture
def alone():
    here = ranks.setup(Args(policy="p", out="o", device="cpu"))
    yield here
    here.close()


# ----------------------------------------------------------------------------- arguments
def test_parse_types():
    line = "--data a b --no-blind --max_pixels 5 --band 0.1 0.9 --schedule cosine --lr 1e-3"
    args = arguments.parse(Args, NEEDED + line.split())
    assert (args.data, args.blind, args.max_pixels, args.band) == (("a", "b"), False, 5, (0.1, 0.9))
    assert (args.schedule, args.lr, args.alpha, args.policy) == ("cosine", 1e-3, 0.5, "p")
    assert arguments.parse(Args, [*NEEDED, "--max_pixels", "none", "--blind"]).max_pixels is None
    assert (args.scaled, args.ratio) == (None, None)
    args = arguments.parse(Args, [*NEEDED, "--resume", "--no-scaled", "--ratio", "token"])
    assert (args.resume, args.scaled, args.ratio) == (True, False, "token")


def test_help_lists_every_flag_with_its_comment_and_default(capsys):
    with pytest.raises(SystemExit) as stop:
        arguments.parse(Args, ["--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert stop.value.code == 0 and "on one rank and on two" in text  # the docstring is the manual
    for flag in Args.__dataclass_fields__:
        assert f"--{flag}" in text
    assert "weight of perception, 1 is 100 % (default: 0.5)" in text
    assert (
        "the rows, in 1 or more files" in text and "the rows to train on" not in text
    )  # redeclared comment wins


@pytest.mark.parametrize(
    "line, says",
    [
        ("--aplha 0.1", "did you mean --alpha?"),
        ("--group-sise=3", "there is no --group-sise"),
        (
            "--pol p",
            "did you mean --policy?",
        ),  # no abbreviations: a later flag could change their meaning
        ("--dtype fp8", "invalid choice: 'fp8'"),
        ("--steps 0", "--steps is 0: it must be 1 or more"),
        ("--lr nan", "--lr is nan"),
        ("--steps 1.5", "invalid int value"),
        ("--alpha 2", "at most 1"),
    ],
)
def test_usage_errors_say_the_mend(line, says, capsys):
    with pytest.raises(SystemExit) as stop:
        arguments.parse(Args, NEEDED + line.split())
    assert stop.value.code == 2 and says in capsys.readouterr().err


def test_config_repeats_a_run_and_flags_win(tmp_path):
    """What a checkpoint's meta.json says of the arguments is, as --config, the same run again, in every stage."""
    given = {
        align.Args: ["--alpha", "0.25", "--disc_blind", "--steps", "7", "--max_pixels", "99"],
        rlvr.Args: [
            "--algo",
            "dapo",
            "--max_response",
            "9000",
            "--no-scale_by_std",
            "--lr",
            "3e-05",
        ],
        Args: ["--data", "a b", "c", "--band", "0.1", "0.9", "--no-scaled", "--max_pixels", "none"],
    }
    for Kind, line in given.items():
        was = arguments.parse(Kind, [*NEEDED, *([] if Kind is Args else ["--data", "d"]), *line])
        path = tmp_path / "meta.json"
        path.write_text(json.dumps({"step": 3, "args": vars(was)}))
        again = arguments.parse(Kind, ["--config", str(path)])
        assert again.config == str(path) and replace(again, config="") == was
        path.write_text(
            json.dumps(vars(again))
        )  # a repeated run's, and without what is around the arguments
        more = arguments.parse(Kind, ["--out", "elsewhere", f"--config={path}", "--seed", "5"])
        assert more == replace(was, config=str(path), out="elsewhere", seed=5)


@pytest.mark.parametrize(
    "config, says",
    [
        ({"aplha": 1}, "has no aplha: did you mean alpha?"),
        ({"algo": "grpo", "overlong": 3}, "has no algo, overlong: is it of another script?"),
        ({"alpha": "half"}, "run.json: error: argument --alpha: invalid float value: 'half'"),
        ({"steps": 2.5}, "invalid int value: '2.5'"),
        ({"steps": True}, "argument --steps: expected one argument"),
        ({"blind": "yes"}, "--blind"),
        ({"schedule": "linear"}, "invalid choice: 'linear'"),
        ({"alpha": 2}, "run.json: error: --alpha is 2.0: it is a share, at most 1"),
        ({"band": [0.1]}, "argument --band: expected 2 arguments"),
        ([1], "not a JSON file of arguments"),
        ("{", "not a JSON file of arguments"),
        (None, "No such file"),
    ],
)
def test_config_errors_name_file_and_mend(config, says, tmp_path, capsys):
    path = tmp_path / "run.json"
    if config is not None:
        path.write_text(config if isinstance(config, str) else json.dumps(config))
    with pytest.raises(SystemExit) as stop:
        arguments.parse(Args, [*NEEDED, "--config", str(path)])
    error = capsys.readouterr().err
    assert stop.value.code == 2 and says in error and str(path) in error


def test_missing_required(capsys):
    with pytest.raises(SystemExit):
        arguments.parse(Args, ["--out", "o"])
    assert "--policy" in capsys.readouterr().err


# ----------------------------------------------------------------------------- optimiser
def test_schedule():
    factors = [optimiser.schedule(step, 10, 0.2, "cosine") for step in range(10)]
    assert (
        factors[:3] == [0.5, 1.0, 1.0]
        and factors[6] == pytest.approx(0.5)
        and 0 < factors[9] < factors[8]
    )
    assert [optimiser.schedule(step, 10, 4) for step in range(6)] == [0.25, 0.5, 0.75, 1, 1, 1]
    assert [optimiser.schedule(step, 2) for step in range(2)] == [1, 1]
    assert optimiser.schedule(0, 2, 0.1) == 1  # a warm-up shorter than a step


def test_weight_decay_on_matrices_only():
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.LayerNorm(2))
    model[1].bias.requires_grad_(False)
    groups = [
        (g["param_names"], g["weight_decay"])
        for g in optimiser.optimizer(model, 1e-3, 0.1).param_groups
    ]
    assert groups == [(["0.weight"], 0.1), (["0.bias", "1.weight"], 0.0)]


def test_clip_grad():
    params = [torch.nn.Parameter(torch.zeros(n)) for n in (2, 1, 1)]
    params[0].grad, params[1].grad = torch.tensor([3.0, 0.0]), torch.tensor([4.0])
    assert ranks.clip_grad(params, 10) == 5 and params[1].grad.item() == 4
    assert ranks.clip_grad(params, 1) == 5 and params[1].grad.item() == pytest.approx(0.8)
    assert ranks.clip_grad(params[2:], 1) == 0


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_not_finite_updates_nothing_and_third_in_a_row_raises(what):
    model = torch.nn.Linear(2, 1)
    optimizer = optimiser.optimizer(model, 0.1, 0.0)
    before = copy.deepcopy(model.state_dict())

    def update(bad):
        model(torch.ones(2)).sum().backward()
        if bad and what == "gradient":
            model.bias.grad.fill_(math.inf)
        return optimiser.step_if_finite(
            optimizer, math.nan if bad and what == "loss" else 1.0, 1.0, "discriminator"
        )

    assert [update(True)[1], update(True)[1]] == [1, 1]
    assert (
        all(torch.equal(before[k], v) for k, v in model.state_dict().items())
        and model.weight.grad is None
    )
    assert update(False) == (pytest.approx(math.sqrt(3)), 0) and not torch.equal(
        before["weight"], model.weight
    )
    update(True), update(True)
    with pytest.raises(
        FloatingPointError,
        match="discriminator: .*" + ("bias" if what == "gradient" else "loss nan"),
    ):
        update(True)


# ----------------------------------------------------------------------------- log
def test_log(tmp_path, capsys):
    args = Args(policy="p", out=str(tmp_path / "run"), steps=4)
    log = log.Log(args.out, args, show=("loss", "gap"))
    for step in (1, 2, 3):
        log.step(step, {"loss": 1.0 / step, "n": step, "empty": math.nan})
    path = Path(args.out, "log.jsonl")
    header, *records = [json.loads(line) for line in path.read_text().splitlines()]
    assert header["args"]["alpha"] == 0.5 and {"commit", "versions", "hardware"} <= set(header)
    assert (
        [r["step"] for r in records] == [1, 2, 3]
        and records[1]["loss"] == 0.5
        and math.isnan(records[0]["empty"])
    )
    assert "NaN" in path.read_text()
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3 and len({len(line) for line in lines}) == 1  # aligned
    assert "loss 0.5" in lines[1] and "gap nan" in lines[1]
    assert Path(args.out, "test_common.py").read_text() == Path(__file__).read_text()

    with pytest.raises(SystemExit, match="--resume"):
        log.Log(args.out, args)
    with open(path, "a") as file:
        file.write('{"step": 4, "lo')  # killed while writing
    args.resume = True
    log.Log(args.out, args, done=2).step(3, {"loss": 9.0})
    records = [json.loads(line) for line in path.read_text().splitlines()]
    assert [r.get("step") for r in records] == [None, 1, 2, None, 3] and records[-1]["loss"] == 9


def test_a_missing_package_is_named(tmp_path, monkeypatch):
    import sys

    for package, flag in {
        "wandb": {"wandb": "project"},
        "tensorboard": {"tensorboard": True},
    }.items():
        monkeypatch.setitem(sys.modules, package, None)
        with pytest.raises(SystemExit, match=f"pip install {package}"):
            log.Log(tmp_path / package, Args(policy="p", out="o", **flag))
        assert not (tmp_path / package).exists()  # so that the next start finds no log in its way


def test_tensorboard_gets_every_scalar(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    args = Args(policy="p", out="o", tensorboard=True, resume=True)
    for done, steps in (
        (0, (1, 2, 3)),
        (2, (3, 4)),
    ):  # the second goes on from a checkpoint of step 2
        log = log.Log(tmp_path, args, done=done)
        for step in steps:
            log.step(step, {"a/loss": done + step / 2, "gap": math.nan})
        log.board.close()
    found = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(e.step, e.value) for e in found.Scalars("a/loss")] == [
        (1, 0.5),
        (2, 1.0),
        (3, 3.5),
        (4, 4.0),
    ]
    assert all(math.isnan(e.value) for e in found.Scalars("gap"))


def test_resume_drops_later_rollouts(tmp_path):
    args = Args(policy="p", out="o", resume=True)
    log = log.Log(tmp_path, args)
    assert not (tmp_path / "rollouts.jsonl").exists()  # stage 1 has none
    for step in (1, 2, 3):
        log.rollouts(step, {"advantage": [math.nan, 1.5]})
    with open(tmp_path / "rollouts.jsonl", "a") as file:
        file.write('{"step": 1, "te')  # killed while writing
    log.Log(tmp_path, args, done=2).rollouts(3, {"advantage": []})
    records = [json.loads(line) for line in (tmp_path / "rollouts.jsonl").read_text().splitlines()]
    assert [(r["step"], r["stage"], r["advantage"]) for r in records] == [
        (1, "test_common", [None, 1.5]),
        (2, "test_common", [None, 1.5]),
        (3, "test_common", []),
    ]


# ----------------------------------------------------------------------------- checkpoints
class Toy(torch.nn.Module):
    """Dropout for the RNG, a tied weight, and a parameter that never gets a gradient."""

    def __init__(self, tied):
        super().__init__()
        self.first, self.last = torch.nn.Linear(6, 6), torch.nn.Linear(6, 6)
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


def test_resume_is_bit_for_bit(tmp_path, alone):
    """Two steps, a checkpoint, a new process's objects, two more: losses, weights and optimiser equal those of four."""
    (model, optimizer), order = fresh(0), torch.Generator().manual_seed(5)
    expected = train(model, optimizer, order, 4)

    (half, half_optimizer), order = fresh(0), torch.Generator().manual_seed(5)
    losses = train(half, half_optimizer, order, 2)
    state = {"order": order.get_state(), "surplus": [(1, torch.ones(2))]}
    folder, players = tmp_path / "last", {"p": (half, half_optimizer)}
    checkpoint.save(folder, lambda path: (path / "weights").touch(), {"step": 2}, players, state)
    assert (folder / "weights").exists() and list(tmp_path.iterdir()) == [folder]

    again, again_optimizer = fresh(1)
    meta, kept = checkpoint.restore(tmp_path / "last", {"p": (again, again_optimizer)})
    assert meta["step"] == 2 and {"commit", "versions"} <= set(meta) and kept["surplus"][0][0] == 1
    order = torch.Generator()
    order.set_state(kept["order"])
    assert losses + train(again, again_optimizer, order, 2) == expected
    assert all(torch.equal(v, again.state_dict()[k]) for k, v in model.state_dict().items())
    a, b = optimizer.state_dict()["state"], again_optimizer.state_dict()["state"]
    assert a.keys() == b.keys() and all(torch.equal(a[i][k], b[i][k]) for i in a for k in a[i])


def test_no_checkpoint_and_another_model(tmp_path, alone):
    model, optimizer = fresh(0)
    assert checkpoint.restore(tmp_path / "last", {"p": (model, optimizer)}) is None
    checkpoint.save(tmp_path / "last", lambda path: None, {"step": 0}, {"p": (model, optimizer)})
    model.extra = torch.nn.Linear(2, 2)
    with pytest.raises(ValueError, match="another model.*p.model.extra"):
        checkpoint.restore(tmp_path / "last", {"p": (model, optimizer)})


def test_failed_save_leaves_the_last_checkpoint(tmp_path, alone, monkeypatch):
    """An error in each phase of a save, the swap of names included, costs the new checkpoint, never the old one."""
    folder, player = tmp_path / "last", {"p": fresh(0)}
    checkpoint.save(folder, lambda path: None, {"step": 1}, player)

    def full_disk(*_, **__):
        raise OSError("No space left on device")

    with pytest.raises(OSError):
        checkpoint.save(folder, full_disk, {"step": 2}, player)
    assert checkpoint.restore(folder, player)[0]["step"] == 1
    rename = Path.rename
    with monkeypatch.context() as patch:
        patch.setattr(
            Path, "rename", lambda a, b: full_disk() if a.name == "last.new" else rename(a, b)
        )
        with pytest.raises(OSError):
            checkpoint.save(folder, lambda path: None, {"step": 3}, player)
    assert not folder.exists() and checkpoint.restore(folder, player)[0]["step"] == 1
    checkpoint.save(folder, lambda path: None, {"step": 4}, player)
    assert checkpoint.restore(folder, player)[0]["step"] == 4 and list(tmp_path.iterdir()) == [
        folder
    ]


def test_sigterm_is_a_flag(alone):
    assert not alone.stop()
    os.kill(os.getpid(), signal.SIGTERM)
    assert alone.stop() and ranks.SAVED_AND_STOPPED not in (0, 1, 2)


# ----------------------------------------------------------------------------- two ranks
def whole(tensor):
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def _two_ranks(rank, folder):
    os.environ.update(RANK=str(rank), WORLD_SIZE="2", LOCAL_RANK=str(rank), MASTER_ADDR="127.0.0.1")
    os.environ["MASTER_PORT"] = (folder / "port").read_text()
    torch.set_num_threads(1)
    here = ranks.setup(Args(policy="p", out="o", device="cpu", seed=3))
    assert (here.rank, here.world) == (rank, 2)
    assert len({x.item() for x in ranks.gather(torch.rand(()))}) == 1  # same seed on all ranks
    mine = torch.tensor([rank + 1.0])
    assert (
        ranks.all_sum(mine).item() == 3
        and ranks.all_max(mine).item() == 2
        and mine.item() == rank + 1
    )
    assert ranks.all_sum({"b": rank, "a": 1}) == {"a": 2, "b": 1} and ranks.all_sum(0.25) == 0.5
    assert ranks.gather({"rank": rank}) == [{"rank": 0}, {"rank": 1}]
    assert ranks.agree(rank == 1) and not ranks.agree(False)

    model, optimizer = fresh(0, tied=False, sharded=True)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    assert ranks.clip_grad(model.parameters(), 1e9) == pytest.approx(math.sqrt(36 + 6 + 36 + 6 + 3))
    _, skipped = optimiser.step_if_finite(
        optimizer, math.nan if rank else 1.0, 1.0, "toy"
    )  # bad on one rank only
    assert skipped == 1 and not optimizer.state and model.first.weight.grad is None
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimiser.step_if_finite(optimizer, 1.0, 1.0, "toy")
    checkpoint.save(
        folder / "last", lambda path: None, {"step": 1}, {"p": (model, optimizer)}, {"cursor": 7}
    )
    other, other_optimizer = fresh(1, tied=False, sharded=True)
    assert checkpoint.restore(folder / "last", {"p": (other, other_optimizer)})[1] == {"cursor": 7}
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(whole(a), whole(b))
        assert torch.equal(
            whole(optimizer.state[a]["exp_avg"]), whole(other_optimizer.state[b]["exp_avg"])
        )
    here.close()
    os._exit(
        0
    )  # all is asserted; in a spawned process torch's threads abort now and then while Python ends


def test_two_ranks_and_resume_on_one(tmp_path):
    (tmp_path / "port").write_text(free_ports(1)[0])
    mp.spawn(_two_ranks, (tmp_path,), nprocs=2)
    here = ranks.setup(Args(policy="p", out="o", device="cpu"))
    model, optimizer = fresh(1, tied=False)
    meta, _ = checkpoint.restore(tmp_path / "last", {"p": (model, optimizer)})
    assert meta["hardware"]["ranks"] == 2 and optimizer.state[model.first.weight]["step"] == 1
    expected, expected_optimizer = fresh(0, tied=False)
    for p in expected.parameters():
        p.grad = torch.ones_like(p)
    optimiser.step_if_finite(expected_optimizer, 1.0, 1.0, "toy")
    assert all(
        torch.allclose(a, b) for a, b in zip(model.parameters(), expected.parameters(), strict=True)
    )
    here.close()
