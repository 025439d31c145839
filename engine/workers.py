"""
Threads beside the main one: they read and encode the next step's rows, and verify rollouts that
have ended, while the main thread and its device compute.

    workers = Workers(2)
    job = workers.begin(encode, row)      # as soon as a thread is free
    job.result()                          # what encode returned; what it raised is raised here

Threads are enough: Pillow, NumPy and the tokenizer let go of Python's lock while they work, and
algebra runs in processes of its own (math_worker.py).
"""

import contextlib
import queue
import threading
import time
import weakref
from functools import partial

import torch

PATIENCE = 10  # seconds that calls have to end at the end of the process


class Job:
    """A call that is made once, by whichever thread comes to it first."""

    def __init__(self, function, *arguments):
        self.call = partial(function, *arguments)
        self.claim = threading.Lock()  # whoever gets it makes the call
        self.done = threading.Event()
        self.value = None
        self.error = None

    def run(self):
        """Make the call, unless another thread has begun it."""
        if not self.claim.acquire(blocking=False):
            return
        try:
            self.value = self.call()
        except BaseException as error:  # raised again by `result`
            self.error = error
        self.done.set()

    def result(self):
        """What the call returned; raises what it raised. The thread that asks makes the call itself
        where no other has begun it, else it waits."""
        self.run()
        self.done.wait()
        if self.error is not None:
            raise self.error
        return self.value


class Workers:
    """Threads that make the calls which they are given, in that order.

    0 threads: a call is made by the thread that asks for its result, when it asks. The threads end
    with this object, or with the process: then the calls that wait are dropped, and those that are
    being made have PATIENCE seconds to come to their end. A side effect: threads of others that use
    PyTorch for the first time after these have begun have one thread by default, as these.
    """

    def __init__(self, number):
        self.number = number
        self.jobs = queue.SimpleQueue()
        self.threads = []  # started with the first job

    def begin(self, function, *arguments) -> Job:
        """Have `function(*arguments)` called by a thread that is free."""
        job = Job(function, *arguments)
        if self.number:
            self._start()
            self.jobs.put(job)
        return job

    def _start(self):
        if self.threads:
            return
        # PyTorch sets up a thread's number when it is first used there, and `serve` changes what
        # it takes by default. So the main thread's is settled before.
        torch.get_num_threads()
        for _ in range(self.number):
            # No thread is left at the end of the process, where it could not be ended safely: the
            # finalizer is called before. Daemons, for Python would wait for them before that.
            thread = threading.Thread(target=serve, args=(self.jobs,), daemon=True)
            thread.start()
            self.threads.append(thread)
        weakref.finalize(self, end, self.jobs, self.threads)


def serve(jobs):
    """What a thread does: make the calls of a queue, up to a None."""
    torch.set_num_threads(1)  # of this thread: its few tensors are no work for several
    while (job := jobs.get()) is not None:
        job.run()
        del job  # else its result would stay in memory until the next one comes


def end(jobs, threads):
    """Drop the calls that wait, and end the threads after those that are being made."""
    with contextlib.suppress(queue.Empty):
        while True:
            jobs.get_nowait()
    for _ in threads:
        jobs.put(None)
    latest = time.monotonic() + PATIENCE
    for thread in threads:
        if thread is not threading.current_thread():  # the last reference may go in any thread
            thread.join(max(0.0, latest - time.monotonic()))
