"""What all bench scripts share: timing contenders in turn, peak memory, small and real-shaped models, one JSON line."""

import json
import platform
import resource
import statistics
import sys
import time
from pathlib import Path

import torch
import transformers

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))


def clock(contenders, device="cpu", repeat=5, warmup=1):
    """{name: function} -> {name: [seconds, ...]}: one after the other in each round, so that a slow minute hits all."""
    sync = torch.cuda.synchronize if torch.device(device).type == "cuda" else lambda: None
    seconds = {name: [] for name in contenders}
    for i in range(warmup + repeat):
        for name, run in contenders.items():
            sync()
            start = time.perf_counter()
            run()
            sync()
            if i >= warmup:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def peak(run, device="cpu"):
    """Bytes that `run()` holds at most beyond what was there before. CPU: torch's own allocations, by its profiler."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        run()
    held = most = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            most = max(most, held)
    return most


def median(seconds):
    return statistics.median(seconds)


def report(claim, **figures):
    """Print the one line; floats with four digits."""

    def short(x):
        if isinstance(x, dict):
            return {k: short(v) for k, v in x.items()}
        if isinstance(x, list | tuple):
            return [short(v) for v in x]
        return float(f"{x:.4g}") if isinstance(x, float) else x

    cuda = figures.get("device", "cpu") != "cpu"
    where = torch.cuda.get_device_name() if cuda else f"{platform.machine()}, {torch.get_num_threads()} threads"
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    print(json.dumps({"claim": claim, **short(figures), "hardware": where, **versions}), flush=True)


def rss():  # highest resident memory of this process so far, bytes
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
