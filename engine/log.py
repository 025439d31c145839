"""
What a run leaves to be read: log.jsonl, rollouts.jsonl, a copy of the stage file, and where a
number comes from.
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

from engine.arguments import overwrites
from engine.ranks import is_main, print0, world


def provenance():
    """What a number needs to be believed: commit, versions, hardware."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "commit": commit(),
        "versions": {
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "python": platform.python_version(),
        },
        "hardware": {
            "cpu": platform.machine(),
            "cores": os.cpu_count(),
            "gpu": gpu,
            "ranks": world(),
        },
    }


def commit():
    """The commit of this code, with "-dirty" where files differ from it."""
    if not shutil.which("git"):
        return "no git"
    here = str(Path(__file__).parent)
    describe = ["describe", "--always", "--dirty", "--exclude=*", "--abbrev=40"]
    found = subprocess.run(["git", "-C", here, *describe], capture_output=True, text=True)
    return found.stdout.strip() or "none"


def to_json(value, **form):
    """
    Plain values as JSON that every reader takes: NaN and infinity, for which JSON has no sign, are
    null. form: as of json.dumps.
    """
    plain = json.loads(json.dumps(value), parse_constant=lambda _: None)
    return json.dumps(plain, allow_nan=False, **form)


class Log:
    """
    `<folder>/log.jsonl`: a header (arguments, provenance) at each start, then a record per step;
    null means no data. `<folder>/rollouts.jsonl`: groups of rollouts, to look at. Both are strict
    JSON, and a field has one type in all records.

    folder: the run's. args: the stage's arguments. show: what the printed line has, each a key of
    the metrics or "key label"; a validation has a line of its own. done: steps of the checkpoint
    that is resumed; of both files, what comes after them goes. steps: of the whole run; None:
    args.steps. Only rank 0 writes.
    """

    def __init__(self, folder, args, show=(), done=0, steps=None):
        self.args = args
        self.steps = args.steps if steps is None else steps
        self.show = (*show, "seconds s")
        self.wandb = None
        self.board = None
        self.clock = time.perf_counter()
        if not is_main():
            return
        path = Path(folder, "log.jsonl")
        self.samples = Path(folder, "rollouts.jsonl")
        if overwrites(folder, args.resume):
            raise SystemExit(overwrites(folder, args.resume))
        header = {"args": asdict(args), "done": done, "time": time.time(), **provenance()}
        self.open_boards(folder, header, done)
        path.parent.mkdir(parents=True, exist_ok=True)
        for file in (path, self.samples):
            if file.exists():
                drop_steps_after(done, file)
        self.file = open(path, "a", buffering=1)  # line by line
        print(to_json(header), file=self.file)
        shutil.copy(inspect.getfile(type(args)), folder)

    def open_boards(self, folder, header, done):
        """Weights & Biases and TensorBoard, where they are asked for."""
        for package, asked in (("wandb", self.args.wandb), ("tensorboard", self.args.tensorboard)):
            if asked and not importlib.util.find_spec(package):
                raise SystemExit(f"--{package} needs a package: pip install {package}")
        if self.args.wandb:
            wandb = importlib.import_module("wandb")
            self.wandb = wandb.init(project=self.args.wandb, name=str(folder), config=header)
        if self.args.tensorboard:
            board = importlib.import_module("torch.utils.tensorboard")
            first = done + 1 if done else 0  # of the steps that are made again
            self.board = board.SummaryWriter(Path(folder, "tensorboard"), purge_step=first)

    def step(self, step, metrics):
        """Log one update.

        step: updates done, this one included; 0: the validation before the first. metrics:
        {name: number}, over all ranks already; those of a validation begin with "eval/".
        """
        if not is_main():
            return
        now = time.perf_counter()
        record = {"step": step, **metrics, "seconds": now - self.clock}
        self.clock = now
        print(to_json(record), file=self.file)
        if self.wandb:
            self.wandb.log(record, step=step)
        if self.board:
            for name, value in record.items():
                self.board.add_scalar(name, value, step)
        is_shown = step % self.args.log_every == 0 or step == self.steps
        if is_shown and step > 0:
            self.print_line(step, record, self.show)
        of_validation = [key for key in metrics if key.startswith("eval/")]
        if of_validation:
            self.print_line(step, record, of_validation)

    def print_line(self, step, record, show):
        cells = []
        for shown in show:
            key, _, label = shown.partition(" ")
            cells.append(f"| {label or key} {record.get(key, math.nan):<8.3g}")
        print0(f"{step:>6}/{self.steps}", *cells)

    def rollouts(self, step, group):
        """Append a group of rollouts, a dict of plain values, to rollouts.jsonl."""
        if not is_main():
            return
        stage = Path(inspect.getfile(type(self.args))).stem
        with self.samples.open("a") as file:
            print(to_json({"step": step, "stage": stage, **group}), file=file)


def drop_steps_after(done, file):
    """Keep of a file of records those up to step `done`, and headers. A line that a kill cut short,
    the last one without its newline, goes too."""
    kept = []
    for line in file.read_text().split("\n")[:-1]:
        record = json.loads(line)
        # A run that begins again (done is 0) makes its step 0 again too.
        if "step" not in record or (done and record["step"] <= done):
            kept.append(line + "\n")
    new = file.with_suffix(".new")
    new.write_text("".join(kept))
    new.replace(file)
