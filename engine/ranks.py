"""
Several processes: set-up under torchrun (or alone), sums and decisions over ranks.

A rank is always the global one. What is called on all ranks must be called on all ranks: a
collective that one rank leaves out hangs the others.
"""

import math
import os
import random
import signal
import sys
import time
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch.distributed.elastic.multiprocessing.errors import get_error_handler
from torch.distributed.tensor import DTensor
from tqdm import tqdm

# Exit code after SIGTERM: the checkpoint is whole, start again with --resume.
SAVED_AND_STOPPED = 99


@dataclass
class Ranks:
    rank: int
    world: int
    device: torch.device
    terminated: bool = False  # this rank got SIGTERM

    def on_sigterm(self, signal_number, frame):
        self.terminated = True

    def stop(self):
        """True on all ranks once one got SIGTERM: save, then sys.exit(SAVED_AND_STOPPED). All ranks
        call it."""
        return agree(self.terminated)

    def close(self):
        """To be called at the end of `main`, not after an error: other ranks may then never come
        (torchrun ends them)."""
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        wait_for_gloo()
        dist.destroy_process_group()

    def fail(self, kind, error, trace):
        """As sys.excepthook: say whose error it is and end at once. The others' collectives break,
        or torchrun ends them."""
        sys.__excepthook__(kind, error, trace)
        try:
            raise error
        except kind:  # where torchrun's handler looks for it
            get_error_handler().record_exception(error)
        message = f"rank {self.rank} of {self.world}: {kind.__name__}: {error}"
        print(message, file=sys.stderr, flush=True)
        # The others fail once this one is gone. Torchrun blames the first, and counts whole
        # seconds.
        time.sleep(1.1)
        os._exit(1)  # tidying up could wait for the others


def setup(args):
    """Set up the process group (torchrun's, or one of this process alone, which FSDP2 needs too),
    the device and the seeds -> Ranks."""
    if hasattr(sys.stdout, "reconfigure"):  # a notebook's has not
        sys.stdout.reconfigure(errors="backslashreplace")  # a print never ends a run
    device = torch.device("cpu")
    backend = "gloo"
    if args.device == "cuda" or (args.device == "auto" and torch.cuda.is_available()):
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
        backend = "cpu:gloo,cuda:nccl"  # gloo: counts and metrics
    if not dist.is_initialized():
        if "RANK" in os.environ:
            dist.init_process_group(backend)
        else:
            dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    # The same seed on all ranks; what differs from rollout to rollout is seeded by its number.
    random.seed(args.seed)
    torch.manual_seed(args.seed)
    ranks = Ranks(dist.get_rank(), dist.get_world_size(), device)
    signal.signal(signal.SIGTERM, ranks.on_sigterm)
    sys.excepthook = ranks.fail if ranks.world > 1 else sys.__excepthook__
    return ranks


def world():
    """The number of ranks."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank():
    """This rank's number, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def is_main():
    return rank() == 0


def print0(*parts):
    """Print on rank 0, above any progress bar."""
    if is_main():
        tqdm.write(" ".join(map(str, parts)))


def wait_for_gloo():
    """Wait until gloo's threads have let go of the tensors of their collectives. All ranks call it.

    A thread drops its reference a moment after the collective has ended, and needs Python's lock
    for that. Where Python is already at its end by then, it ends the thread, and the C++ around it
    ends the process: "terminate called without an active exception".
    """
    tensors = [torch.zeros(1) for _ in range(8)]
    works = [dist.all_reduce(x, async_op=True) for x in tensors]  # for all threads at once
    for work in works:
        work.wait()
    del work, works
    while any(x._use_count() > 1 for x in tensors):
        time.sleep(0.001)


# ----------------------------------------------------------------------------- collectives
def all_sum(x, op=dist.ReduceOp.SUM):
    """Sum over ranks of a tensor, a number, or a dict of numbers (the same keys on all ranks). x
    itself stays as it is."""
    if isinstance(x, torch.Tensor):
        x = x.detach().clone()
        if dist.is_initialized():
            dist.all_reduce(x, op)
        return x
    if isinstance(x, dict):
        keys = sorted(x)
        values = torch.tensor([x[key] for key in keys], dtype=torch.float64)
        return dict(zip(keys, all_sum(values, op).tolist(), strict=True))
    return all_sum({"x": x}, op)["x"]


def all_max(x):
    """As `all_sum`, the largest over ranks."""
    return all_sum(x, dist.ReduceOp.MAX)


def agree(flag):
    """True on all ranks if `flag` is on any: for each decision on which the number of later
    collectives depends."""
    return bool(all_max(float(flag)))


def gather(item):
    """[item of rank 0, of rank 1, ...] on every rank. Items are anything picklable, tensors on the
    CPU."""
    items = [item] * world()
    if len(items) > 1:
        dist.all_gather_object(items, item)
    return items


def clip_grad(params, max_norm):
    """Scale the gradients so that their global norm is at most max_norm -> the norm before, a
    float. All ranks call it."""
    gradients = [p.grad for p in params if p.grad is not None]
    sharded = [g for g in gradients if isinstance(g, DTensor)]
    whole = [g for g in gradients if not isinstance(g, DTensor)]
    norms = []
    for kind in (sharded, whole):  # torch does not take a mixture of the two
        if kind:
            norm = torch.nn.utils.get_total_norm(kind)
            norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
            norms.append(norm.item())
    total = math.hypot(*norms)
    if total > max_norm:
        for kind in (sharded, whole):
            if kind:
                torch._foreach_mul_(kind, max_norm / total)
    return total
