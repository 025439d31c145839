"""
Checkpoints: a folder that the next stage and plain transformers open, with what `--resume` needs
beside the weights.

    last/                   weights, config, tokenizer: whatever `write_weights` writes
    last/meta.json          arguments, step, metrics, provenance
    last/resume/            models and optimisers (torch.distributed.checkpoint), state.pt
    step-000200/, best/     the same of a step that stays, by default without resume/

Written whole or not at all: under another name, then renamed. A kill at any moment leaves the last
good one.
"""

import json
import math
import os
import pickle
import random
import re
import shutil
from enum import Enum
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp

from engine.arguments import changes
from engine.log import provenance, to_json
from engine.progress import Bar
from engine.ranks import agree, is_main, print0

VERSION = 2  # of what is kept: to be raised where a stage begins to keep other state
MOMENTS = ("step", "exp_avg", "exp_avg_sq")  # of a parameter, in AdamW's state

# The classes and functions that an index of torch.distributed.checkpoint may name.
RECORDS = re.compile(
    r"pathlib(\._local)? \w*Path"  # the second of Python 3.13
    r"|torch (Size|bool|b?float\d+|u?int\d+)"
    r"|torch\.serialization _get_layout"
    r"|torch\.distributed\.checkpoint\.metadata \w*(Metadata|Index|Meta|Properties|ENCODING)"
    r"|torch\.distributed\.checkpoint\.filesystem _StorageInfo"
)


# ------------------------------------------------------------------------------------- writing
def save(folder, write_weights, meta, players=None, state=None):
    """
    Write the checkpoint `folder`. All ranks call it.

    write_weights(path): called on all ranks, writes weights, config and tokenizer. meta: for
    meta.json (arguments, step, metrics). For `restore`: players, {name: (model, AdamW)}, and state,
    plain values and CPU tensors, the same on all ranks; without players the weights are all.
    Raises OSError where it cannot be written (a full disk, ..); the checkpoint before it stays.
    """
    folder = Path(folder)
    new = Path(f"{folder}.new")
    try:
        if is_main():
            shutil.rmtree(new, ignore_errors=True)
            (new / "resume" if players else new).mkdir(parents=True)
        agree(False)  # all ranks wait for the folder
        with Bar(3, f"saving {folder}", "part", delay=0) as bar:
            write_weights(new)
            bar.update()
            if players:
                dcp.save(tensors_of(players), checkpoint_id=new / "resume")
            bar.update()
            if is_main():
                if players:
                    kept = {"version": VERSION, **random_state(), "state": state}
                    torch.save(kept, new / "resume/state.pt")
                (new / "meta.json").write_text(to_json(provenance() | meta, indent=1))
                os.sync()  # the data has to reach the disk before the names
                swap(new, folder)
    except (Exception, dcp.CheckpointException) as error:
        if is_main():
            shutil.rmtree(new, ignore_errors=True)  # room on a full disk
        raise OSError(
            f"{folder} could not be written ({in_one_line(error)}); the checkpoint before it, if "
            "any, is whole. Make room or give permission, then go on with --resume"
        ) from None
    agree(False)  # no rank goes on before it is there


def swap(new, folder):
    """Give the folder `new` the name `folder`, whose checkpoint goes. `put_back` mends a kill
    between the two renames."""
    old = Path(f"{folder}.old")
    if folder.exists():
        shutil.rmtree(old, ignore_errors=True)
        folder.rename(old)
    new.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


def put_back(folder):
    old = Path(f"{folder}.old")
    if is_main() and old.exists() and not folder.exists():
        old.rename(folder)
    agree(False)


# ---------------------------------------------------------------------------------- of a run
class Checkpoints:
    """
    The checkpoints that a run leaves in its folder, and when.

    last/          every --save_every steps, after the last one, and where the run is stopped
    step-000200/   every --keep_every steps; it stays
    best/          where --keep_best's metric is better than ever; the value is in its meta.json
    """

    def __init__(self, args, steps, players, write_weights, done=0):
        """steps: of the whole run. players, write_weights: as for `save`. done: steps of the
        checkpoint that is resumed. All ranks call it."""
        self.args = args
        self.steps = steps
        self.players = players
        self.write_weights = write_weights
        self.folder = Path(args.out)
        self.best = self.value_of_best(done)
        if done >= steps:
            print0(f"nothing to do: {done} of {steps} updates are made already")

    def value_of_best(self, done):
        """That of best/, or None where none is there. Nor does it count where its step comes after
        `done`: it will be made again, maybe with other arguments."""
        put_back(self.folder / "best")
        file = self.folder / "best/meta.json"
        if not self.args.keep_best or not file.exists():
            return None
        meta = json.loads(file.read_text())
        kept = meta.get("best", {})
        if kept.get("metric") != self.args.keep_best or meta["step"] > done:
            return None
        return kept["value"]

    def save(self, step, metrics, state, stop=False):
        """
        Write what is due after `step` updates. All ranks call it.

        metrics: of this step. state: what `restore` returns. stop: the run ends here.
        """
        meta = {"step": step, "args": vars(self.args), "metrics": metrics}
        resume = (self.players, state) if self.args.keep_resume else ()
        if is_every(self.args.keep_every, step):
            save(self.folder / f"step-{step:06}", self.write_weights, meta, *resume)
        if self.is_best(metrics):
            self.best = metrics[self.args.keep_best]
            best = {"metric": self.args.keep_best, "value": self.best}
            save(self.folder / "best", self.write_weights, meta | {"best": best}, *resume)
        # last/ comes last: a run that is killed before that makes this step again, and the others.
        if stop or step == self.steps or is_every(self.args.save_every, step):
            save(self.folder / "last", self.write_weights, meta, self.players, state)

    def is_best(self, metrics):
        """Whether a step's metrics have a validation that is better than any before."""
        if not self.args.keep_best or self.args.keep_best not in metrics:
            return False
        value = metrics[self.args.keep_best]
        better = self.best is None or value > self.best
        if self.args.keep_best == "eval/loss":
            better = self.best is None or value < self.best
        return agree(is_main() and better and math.isfinite(value))


def is_every(number, step):
    """Whether a step is due of those that come every `number` steps; 0: none is."""
    return number > 0 and step > 0 and step % number == 0


def kept_steps(run):
    """
    [(step, folder)] of a run folder's checkpoints by steps, oldest first: step-000200 and the like,
    and last/ where it is of another step. Raises FileNotFoundError where there is none.
    """
    found = {}
    for folder in [Path(run, "last"), *Path(run).glob("step-*")]:
        is_whole = folder.name == "last" or re.fullmatch(r"step-\d+", folder.name)
        if is_whole and (folder / "meta.json").exists():
            meta = json.loads((folder / "meta.json").read_text())
            found[meta["step"]] = folder
    if not found:
        raise FileNotFoundError(f"{run} holds neither step-* nor last/: it is no run folder")
    return sorted(found.items())


# ------------------------------------------------------------------------------------- reading
def restore(folder, players, args=None):
    """Load what `save` kept into the players' models and optimisers and into the random number
    generators -> (meta, state), or None where there is no checkpoint. All ranks call it.

    args: the stage's arguments; says in a line which are not those of the run so far.
    Raises ValueError where it is broken, of another model, or of another version of this code.
    """
    folder = Path(folder)
    put_back(folder)
    if not folder.exists():
        print0(f"--resume: there is no {folder} yet to go on from")
        return None
    try:
        shapes = saved_shapes(folder / "resume/.metadata")
        tensors = tensors_of(players, shapes)
        refuse_other_tensors(shapes, tensors)
        kept = torch.load(folder / "resume/state.pt", weights_only=True)
        if kept.get("version") != VERSION:
            raise ValueError("it was made by an earlier version of this code")
        meta = json.loads((folder / "meta.json").read_text())
        if args:
            refuse_other_training(meta["args"], args)
        # In place, and cut anew for this number of ranks.
        dcp.load(tensors, checkpoint_id=folder / "resume")
    except (Exception, dcp.CheckpointException) as error:
        raise ValueError(
            f"{folder} cannot be resumed: {in_one_line(error)}. Give the arguments that the run "
            "was begun with, or remove it to start afresh"
        ) from None
    set_random_state(kept)
    changed = changes(meta["args"], args) if args else ""
    if changed:
        print0(f"{folder}: goes on after step {meta['step']} with other arguments: {changed}")
    return meta, kept["state"]


def saved_shapes(index):
    """{key: shape} of the tensors in a checkpoint of torch.distributed.checkpoint, by its index."""
    with open(index, "rb") as file:
        metadata = RecordsOnly(file).load().state_dict_metadata
    return {key: tuple(saved.size) for key, saved in metadata.items()}


class RecordsOnly(pickle.Unpickler):
    """Opens the index and nothing else: torch.distributed.checkpoint's own reader would run
    whatever the file names."""

    def find_class(self, module, name):
        if (module, name) == ("builtins", "getattr"):
            return enum_member
        if not RECORDS.fullmatch(f"{module} {name}"):
            raise pickle.UnpicklingError(
                f"its index names {module}.{name}, which is no record of a tensor"
            )
        return super().find_class(module, name)


def enum_member(of, name):
    """An enumeration's member. Python 3.11.0 to 3.11.3 write one as getattr(enumeration, name)."""
    if not (isinstance(of, type) and issubclass(of, Enum)):
        raise pickle.UnpicklingError("its index asks for an attribute of what is no enumeration")
    return of[name]


def refuse_other_tensors(shapes, tensors):
    """ValueError where a checkpoint's {key: shape} and the players' {key: tensor} differ."""
    odd = []
    for key in sorted(shapes.keys() | tensors):
        if key not in tensors or shapes.get(key) != tuple(tensors[key].shape):
            odd.append(key)
    if odd:
        raise ValueError(
            f"it is of another model or made by an earlier version of this code: {len(odd)} "
            f"tensors differ, first {odd[0]}"
        )


def refuse_other_training(before, args):
    """ValueError where the run trained other parameters before, as its arguments, a dict, say: the
    optimiser would have no state for some, or one for what is not trained."""
    frozen = before.get("freeze_vision", False)
    if frozen != args.freeze_vision:
        flag = "--freeze_vision" if frozen else "--no-freeze_vision"
        raise ValueError(f"the run was begun with {flag}, which stays as it is in a run")


# -------------------------------------------------------------------------------- what is kept
def tensors_of(players, known=()):
    """{key: tensor} of models and optimisers, by reference.

    A parameter that never had a gradient has no optimiser state, before and after. For loading, the
    state of the others is made first: where its key is in `known`.
    """
    found = {}
    for name, (model, optimizer) in players.items():
        for key, tensor in model.state_dict().items():
            found[f"{name}.model.{key}"] = tensor
        for key, parameter in model.named_parameters():
            prefix = f"{name}.optimizer.{key}."
            for moment in MOMENTS:
                if prefix + moment in known:
                    optimizer.state[parameter][moment] = empty_moment(moment, parameter)
            for moment, tensor in optimizer.state.get(parameter, {}).items():
                found[prefix + moment] = tensor
    return found


def empty_moment(moment, parameter):
    if moment == "step":
        return torch.zeros(())
    return torch.zeros_like(parameter, requires_grad=False)


def random_state():
    cuda = torch.cuda.get_rng_state() if torch.cuda.is_available() else None
    return {"python": random.getstate(), "cpu": torch.get_rng_state(), "cuda": cuda}


def set_random_state(kept):
    random.setstate(kept["python"])
    torch.set_rng_state(kept["cpu"])
    if kept["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(kept["cuda"])


def in_one_line(error):
    """An exception as one line of text. One of torch.distributed.checkpoint ends with the cause,
    others begin with it."""
    lines = f"{type(error).__name__}: {error}".strip().splitlines()
    cause = lines[-1] if isinstance(error, dcp.CheckpointException) else lines[0]
    return cause[:200]
