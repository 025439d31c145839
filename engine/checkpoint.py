"""
Checkpoints: a folder that the next stage and plain transformers open, with what `--resume` needs beside the weights.

Written whole or not at all: under another name, then renamed. A kill at any moment leaves the last good one.
"""

import json
import os
import pickle
import random
import re
import shutil
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp

from engine.log import provenance
from engine.ranks import agree, is_main

RECORDS = re.compile(
    r"pathlib \w*Path|torch (Size|bool|b?float\d+|u?int\d+)|torch\.serialization _get_layout|"
    r"torch\.distributed\.checkpoint\.(metadata \w*(Metadata|Index|Meta|Properties|ENCODING)|filesystem _StorageInfo)"
)


def save(folder, write_weights, meta, players=None, state=None):
    """
    Writes the checkpoint `folder` whole or not at all: under another name, then renamed. All ranks.
    write_weights(path), on all ranks: weights, config, tokenizer. meta: for meta.json (args, step, cursor, metrics).
    For `restore`: players {name: (model, AdamW)}; state: plain values and CPU tensors, the same on all ranks.
    Raises OSError where it cannot be written (a full disk, ..); the checkpoint before it stays.
    """
    folder, new, old = Path(folder), Path(f"{folder}.new"), Path(f"{folder}.old")
    try:
        if is_main():
            shutil.rmtree(new, ignore_errors=True)
            (new / "resume").mkdir(parents=True)
        agree(False)  # all ranks: wait for it
        write_weights(new)
        if players:
            dcp.save(_tensors(players), checkpoint_id=new / "resume")
        if is_main():
            cuda = torch.cuda.get_rng_state() if torch.cuda.is_available() else None
            kept = {
                "python": random.getstate(),
                "cpu": torch.get_rng_state(),
                "cuda": cuda,
                "state": state,
            }
            torch.save(kept, new / "resume/state.pt")
            (new / "meta.json").write_text(json.dumps(provenance() | meta, indent=1))
            os.sync()  # the data has to reach the disk before the names
            if folder.exists():
                shutil.rmtree(old, ignore_errors=True)
                folder.rename(old)
            new.rename(folder)
            shutil.rmtree(old, ignore_errors=True)
    except (Exception, dcp.CheckpointException) as error:
        if is_main():
            shutil.rmtree(new, ignore_errors=True)  # room on a full disk
        what = f"{folder} could not be written ({_why(error)}); the checkpoint before it, if any, is whole"
        raise OSError(f"{what}. Make room or give permission, then go on with --resume") from None
    agree(False)


def restore(folder, players):
    """Loads what `save` kept into models, optimisers and RNG -> (meta, state), or None: no checkpoint. All ranks."""
    folder, old = Path(folder), Path(f"{folder}.old")
    if is_main() and old.exists() and not folder.exists():
        old.rename(folder)  # a kill between the two renames
    agree(False)
    if not folder.exists():
        return None
    try:
        with open(folder / "resume/.metadata", "rb") as file:
            known = {
                k: tuple(saved.size) for k, saved in _Plain(file).load().state_dict_metadata.items()
            }
        tensors = _tensors(players, known)
        if odd := sorted(
            k
            for k in known.keys() | tensors
            if k not in tensors or known.get(k) != tuple(tensors[k].shape)
        ):
            raise ValueError(f"it is of another model: {len(odd)} tensors differ, first {odd[0]}")
        dcp.load(
            tensors, checkpoint_id=folder / "resume"
        )  # in place, and cut anew for this number of ranks
        kept, meta = (
            torch.load(folder / "resume/state.pt", weights_only=True),
            json.loads((folder / "meta.json").read_text()),
        )
    except (Exception, dcp.CheckpointException) as error:
        what = f"{folder} cannot be resumed: {_why(error)}"
        raise ValueError(
            f"{what}. Give the arguments that the run was begun with, or remove it to start afresh"
        ) from None
    random.setstate(kept["python"])
    torch.set_rng_state(kept["cpu"])
    if kept["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(kept["cuda"])
    return meta, kept["state"]


class _Plain(pickle.Unpickler):  # of dcp's index: dcp's own reader would run whatever it names
    def find_class(self, module, name):
        if not RECORDS.fullmatch(f"{module} {name}"):
            raise pickle.UnpicklingError(
                f"its index names {module}.{name}, which is no record of a tensor"
            )
        return super().find_class(module, name)


def _why(error):  # in one line; dcp's ends with the cause, others begin with it
    lines = f"{type(error).__name__}: {error}".strip().splitlines()
    return lines[-1 if isinstance(error, dcp.CheckpointException) else 0][:200]


def _tensors(players, known=()):
    """{key: tensor} of models and optimisers, by reference; optimiser tensors with a key in `known` are made first."""
    found = {}
    for name, (model, optimizer) in players.items():
        found |= {f"{name}.model.{k}": t for k, t in model.state_dict().items()}
        for (
            n,
            p,
        ) in (
            model.named_parameters()
        ):  # one that never had a gradient has no optimiser state, before and after
            prefix = f"{name}.optimizer.{n}."
            for k in [k for k in ("step", "exp_avg", "exp_avg_sq") if prefix + k in known]:
                optimizer.state[p][k] = (
                    torch.zeros(()) if k == "step" else torch.zeros_like(p, requires_grad=False)
                )
            found |= {prefix + k: t for k, t in optimizer.state.get(p, {}).items()}
    return found
