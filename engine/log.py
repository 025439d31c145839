"""
What a run leaves to be read: log.jsonl, rollouts.jsonl, a copy of the stage file, and where a number comes from.
"""

import importlib.util
import inspect
import json
import math
import os
import platform
import shutil
import subprocess
import time
from dataclasses import asdict
from pathlib import Path

import torch
import transformers

from engine.ranks import is_main, print0, world


def provenance():
    """What a number needs to be believed: commit, versions, hardware."""
    command = [
        "git",
        "-C",
        str(Path(__file__).parent),
        "describe",
        "--always",
        "--dirty",
        "--exclude=*",
        "--abbrev=40",
    ]
    commit = (
        subprocess.run(command, capture_output=True, text=True).stdout.strip()
        if shutil.which("git")
        else "no git"
    )
    versions = {m.__name__: m.__version__ for m in (torch, transformers)} | {
        "python": platform.python_version()
    }
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    hardware = {"cpu": platform.machine(), "cores": os.cpu_count(), "gpu": gpu, "ranks": world()}
    return {"commit": commit or "none", "versions": versions, "hardware": hardware}


class Log:
    """
    `<folder>/log.jsonl`: a header (arguments, provenance) at each start, then a record per step; NaN means no data.
    `<folder>/rollouts.jsonl`: what `groups.show_rollout` keeps. Of both, steps after `done`, the resumed one's, go.
    `show`: keys of the printed line ("key" or "key label").
    """

    def __init__(self, folder, args, show=(), done=0):
        self.args, self.show, self.wandb, self.board, self.clock = (
            args,
            show,
            None,
            None,
            time.perf_counter(),
        )
        if not is_main():
            return
        path, self.samples = Path(folder, "log.jsonl"), Path(folder, "rollouts.jsonl")
        if path.exists() and not args.resume:
            raise SystemExit(
                f"{path} exists: continue that run with --resume, or remove {folder}, or change --out"
            )
        header = {"args": asdict(args), "done": done, "time": time.time(), **provenance()}
        for package, asked in ("wandb", args.wandb), ("tensorboard", args.tensorboard):
            if asked and not importlib.util.find_spec(package):
                raise SystemExit(f"--{package} needs a package: pip install {package}")
        if args.wandb:
            self.wandb = importlib.import_module("wandb").init(
                project=args.wandb, name=str(folder), config=header
            )
        if args.tensorboard:
            board = importlib.import_module("torch.utils.tensorboard")
            self.board = board.SummaryWriter(Path(folder, "tensorboard"), purge_step=done + 1)
        path.parent.mkdir(parents=True, exist_ok=True)
        for file in filter(Path.exists, (path, self.samples)):
            lines = file.read_text().split("\n")[:-1]  # what follows the last \n, a kill cut short
            kept = [line + "\n" for line in lines if json.loads(line).get("step", 0) <= done]
            file.with_suffix(".new").write_text("".join(kept))
            file.with_suffix(".new").replace(file)
        self.file = open(path, "a", buffering=1)  # line by line
        print(json.dumps(header), file=self.file)
        shutil.copy(inspect.getfile(type(args)), folder)

    def step(self, step, metrics):
        """step: updates done, this one included. metrics: {name: number}, already global (rank 0's are written)."""
        if not is_main():
            return
        self.clock, before = time.perf_counter(), self.clock
        record = {"step": step, **metrics, "seconds": self.clock - before}
        print(json.dumps(record), file=self.file)
        if self.wandb:
            self.wandb.log(record, step=step)
        for name, value in record.items() if self.board else ():
            self.board.add_scalar(name, value, step)
        if step % self.args.log_every == 0 or step == self.args.steps:
            cells = [
                f"| {k.split()[-1]} {record.get(k.split()[0], math.nan):<8.3g}"
                for k in (*self.show, "seconds s")
            ]
            print0(f"{step:>6}/{self.args.steps}", *cells)

    def rollouts(self, step, group):
        """Append a group of rollouts, plain values, to rollouts.jsonl; there NaN is null."""
        record = {"step": step, "stage": Path(inspect.getfile(type(self.args))).stem, **group}
        if is_main():
            with self.samples.open("a") as file:
                print(
                    json.dumps(json.loads(json.dumps(record), parse_constant=lambda _: None)),
                    file=file,
                )
