"""
One of several processes: python tests/reference/ranked.py JOBS.json PORT... runs the jobs, each a
stage with its flags, one after the other as one of WORLD_SIZE ranks, each on a port of its own. Of
a job, rank 0 keeps what was recorded in <out>/trace.pt.
"""

import json
import os
import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[number]) for number in (1, 2)]

import torch  # noqa: E402

from reference import watch  # noqa: E402


def move_from_sampler(module, distance):
    """On every rank but the first, the stage sees the sampler's log-probs so far from its own."""
    plain = module.sampler_logps
    own = distance if int(os.environ["RANK"]) else 0.0
    module.sampler_logps = lambda pack, groups: plain(pack, groups) + own


if __name__ == "__main__":
    torch.set_num_threads(1)
    jobs = json.loads(Path(sys.argv[1]).read_text())
    for job, port in zip(jobs, sys.argv[2:], strict=True):
        os.environ["MASTER_PORT"] = port
        if "check_every" in job:
            watch.align.WARMUP_CHECK = job["check_every"]
        if "distance" in job:
            move_from_sampler(watch.STAGES[job["stage"]], job["distance"])
        trace = watch.record(job["stage"], job["flags"])
        if os.environ["RANK"] == "0":
            torch.save(trace, Path(job["flags"]["out"], "trace.pt"))
    sys.stdout.flush()
    os._exit(0)  # what is left of the process groups' threads has nothing to do any more
