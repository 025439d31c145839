"""
Several processes: set-up under torchrun (or alone), sums and decisions over ranks. Rank is always the global one.

What is called on all ranks must be called on all ranks: a collective that one rank leaves out hangs the others.
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

SAVED_AND_STOPPED = (
    99  # exit code after SIGTERM: the checkpoint is whole, start again with --resume
)


@dataclass
class Ranks:
    rank: int
    world: int
    device: torch.device
    terminated: bool = False  # this rank got SIGTERM

    def stop(self):
        """True on all ranks once one got SIGTERM: save, then sys.exit(SAVED_AND_STOPPED). All ranks call it."""
        return agree(self.terminated)

    def close(self):
        """At the end of `main`; not after an error, when other ranks may never come (torchrun ends them)."""
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        dist.destroy_process_group()

    def fail(self, kind, error, trace):
        """As sys.excepthook: says whose error it is and ends at once. The others' collectives break, or torchrun ends them."""
        sys.__excepthook__(kind, error, trace)
        try:
            raise error
        except kind:  # where torchrun's handler looks for it
            get_error_handler().record_exception(error)
        print(
            f"rank {self.rank} of {self.world}: {kind.__name__}: {error}",
            file=sys.stderr,
            flush=True,
        )
        time.sleep(
            1.1
        )  # the others fail once this one is gone; torchrun blames the first, and counts whole seconds
        os._exit(1)  # tidying up could wait for the others


def setup(args):
    """Process group (torchrun's, or one of this process alone, which FSDP2 needs too), device, seeds -> Ranks."""
    cuda = args.device == "cuda" or (args.device == "auto" and torch.cuda.is_available())
    device = (
        torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if cuda else torch.device("cpu")
    )
    if cuda:
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        alone = (
            {} if "RANK" in os.environ else {"store": dist.HashStore(), "rank": 0, "world_size": 1}
        )
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if cuda else "gloo", **alone
        )  # gloo: counts and metrics
    random.seed(args.seed)
    torch.manual_seed(
        args.seed
    )  # the same on all ranks; what differs per rollout is seeded by its number
    ranks = Ranks(dist.get_rank(), dist.get_world_size(), device)
    signal.signal(signal.SIGTERM, lambda *_: setattr(ranks, "terminated", True))
    sys.excepthook = ranks.fail if ranks.world > 1 else sys.__excepthook__
    return ranks


def all_sum(x, op=dist.ReduceOp.SUM):
    """Sum over ranks of a tensor, a number or a dict of numbers (same keys on all ranks); x itself stays as it is."""
    if isinstance(x, torch.Tensor):
        x = x.detach().clone()
        if dist.is_initialized():
            dist.all_reduce(x, op)
        return x
    if isinstance(x, dict):
        values = all_sum(torch.tensor([x[k] for k in sorted(x)], dtype=torch.float64), op)
        return dict(zip(sorted(x), values.tolist(), strict=True))
    return all_sum({"x": x}, op)["x"]


def all_max(x):
    """As `all_sum`, the largest over ranks."""
    return all_sum(x, dist.ReduceOp.MAX)


def agree(flag):
    """True on all ranks if `flag` is on any: for each decision on which the number of later collectives depends."""
    return bool(all_max(float(flag)))


def gather(item):
    """[item of rank 0, of rank 1, …] on every rank; items are anything picklable, tensors on the CPU."""
    items = [item] * world()
    if len(items) > 1:
        dist.all_gather_object(items, item)
    return items


def world():
    return dist.get_world_size() if dist.is_initialized() else 1


def share(items, ranks):
    """This rank's part of a list that all ranks hold (nothing, where there are fewer items than ranks), and the numbers
    of its items."""
    numbers = range(ranks.rank, len(items), ranks.world)
    return [items[i] for i in numbers], numbers


def is_main():
    return not dist.is_initialized() or dist.get_rank() == 0


def print0(*parts):
    """Prints on rank 0, above any progress bar."""
    if is_main():
        tqdm.write(" ".join(map(str, parts)))


def clip_grad(params, max_norm):
    """Scales the gradients so that their global norm is at most max_norm -> the norm before, a float. All ranks."""
    grads = [p.grad for p in params if p.grad is not None]
    kinds = [
        [g for g in grads if isinstance(g, DTensor) is sharded] for sharded in (True, False)
    ]  # torch wants no mix
    norms = [torch.nn.utils.get_total_norm(kind) for kind in kinds if kind]
    norm = math.hypot(*[(n.full_tensor() if isinstance(n, DTensor) else n).item() for n in norms])
    if norm > max_norm:
        for kind in filter(None, kinds):
            torch._foreach_mul_(kind, max_norm / norm)
    return norm
