"""
Progress of long work: how much is done, how fast, and about how long the rest will take.

A bar stands on the terminal of the first rank, and goes when the work is done. There is none on
other ranks, none where the output is a file, and none of what is done within DELAY seconds.

    for row in progress(rows, "encoding"):            # what comes out of `rows`, counted
    with Bar(len(rows), "sampling") as bar:           # bar.update(n) counts
"""

import sys
import time

from tqdm import tqdm

from engine.ranks import is_main

DELAY = 3.0  # s
INTERVAL = 0.5  # s between two looks of the bar


def progress(items, what, unit="row"):
    """Yield the items of a sequence while a bar of `what` is done counts them."""
    with Bar(len(items), what, unit) as bar:
        for item in items:
            yield item
            bar.update()


class Bar:
    """A bar of `what` is done of `total` units, which begins with `with`.

    delay: seconds before it shows; None: DELAY.
    """

    def __init__(self, total, what, unit="row", delay=None):
        self.total = total
        self.what = what
        self.unit = unit
        self.delay = DELAY if delay is None else delay
        # Of a single unit there is nothing to show.
        self.is_hidden = total < 2 or not is_main() or not sys.stderr.isatty()
        self.begin = time.time()
        self.done = 0
        self.shown = None  # tqdm's

    def __enter__(self):
        self.update(0)
        return self

    def __exit__(self, *error):
        if self.shown is not None:
            self.shown.close()

    def update(self, done=1, tokens=None):
        """Count `done` units more; tokens: how many they are made of so far, for their rate."""
        self.done += done
        seconds = time.time() - self.begin
        if self.is_hidden or seconds < self.delay:
            return
        if self.shown is None:
            # No sooner: whatever is printed would make tqdm show it.
            self.shown = self.open()
        if tokens is not None:
            rate = tokens / max(seconds, 1e-3)
            self.shown.set_postfix_str(f"{rate:,.0f} tokens/s", refresh=False)
        self.shown.update(self.done - self.shown.n)

    def open(self):
        shown = tqdm(
            total=self.total,
            desc=self.what,
            unit=self.unit,
            leave=False,
            mininterval=INTERVAL,
            miniters=0,  # a look also where nothing was finished meanwhile
            smoothing=0,  # the mean of all the time
            dynamic_ncols=True,
        )
        shown.start_t = self.begin
        return shown
