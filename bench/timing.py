"""Times contestants in shuffled rounds, so that whatever else the machine does hits all alike."""

from __future__ import annotations

import gc
import itertools
import math
import os
import random
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

ROUND_SECONDS = 0.03
MOST_CALLS = 1000
SLOW = 1.0
"""Seconds of a call that needs no second one to tell what it costs."""


class Contestant:
    """A function and the inputs that it is called with, one after the other, over and over.

    A round takes about ROUND_SECONDS, and one call at least; with `whole` it takes every input
    once, because their costs differ. `around` is entered before a round, out of its time. `seconds`
    is about what one call takes.
    """

    def __init__(
        self,
        call: Callable[[Any], Any],
        inputs: Sequence[Any],
        whole: bool = False,
        around: Callable[[], AbstractContextManager] = nullcontext,
    ):
        self.call, self.around = call, around
        self.inputs = itertools.cycle(inputs)
        self.calls = len(inputs)
        self.seconds = self.round(1)
        if self.seconds < SLOW:
            self.seconds = min(self.seconds, self.round(1))
        if not whole:
            self.calls = min(MOST_CALLS, max(1, math.ceil(ROUND_SECONDS / self.seconds)))

    def round(self, calls: int | None = None) -> float:
        """Mean seconds a call."""
        calls = calls or self.calls
        inputs = list(itertools.islice(self.inputs, calls))
        with self.around():
            start = time.perf_counter()
            for each in inputs:
                self.call(each)
            return (time.perf_counter() - start) / calls


def interleaved(contestants: dict[str, Contestant], rounds: int) -> dict[str, list[float]]:
    """Mean seconds a call, by contestant and round; one more round warms up."""
    order, shuffle = list(contestants), random.Random(0).shuffle
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    gc.disable()
    try:
        for _ in range(rounds + 1):
            shuffle(order)
            for name in order:
                seconds[name].append(contestants[name].round())
    finally:
        gc.enable()
    return {name: of_rounds[1:] for name, of_rounds in seconds.items()}


class Replay:
    """A timer that lets pytest-benchmark report rounds that were timed before, interleaved."""

    def __call__(self) -> float:
        return next(self.readings)

    def load(self, durations: Sequence[float]) -> None:
        self.readings = iter([reading for each in durations for reading in (0.0, each)])


class Others:
    """What other processes take of the cores that this one may use, from now on."""

    STAT = Path("/proc/stat")

    def __init__(self):
        self.start, self.before = time.perf_counter(), self._taken()

    def share(self) -> float:
        """Of the cores' time; nothing where the system does not tell."""
        cores = len(os.sched_getaffinity(0))
        passed = (time.perf_counter() - self.start) * cores
        return max(0.0, (self._taken() - self.before) / passed)

    def _taken(self) -> float:
        """Seconds that these cores were busy, less our own."""
        if not self.STAT.exists():
            return 0.0
        lines = map(str.split, self.STAT.read_text().splitlines())
        ticks = {name: list(map(int, numbers)) for name, *numbers in lines if name[:3] == "cpu"}
        # user, nice, system, idle, iowait, irq, softirq, steal
        of_cores = [ticks[f"cpu{core}"] for core in os.sched_getaffinity(0)]
        busy = sum(sum(each[:3] + each[5:8]) for each in of_cores)
        return busy / os.sysconf("SC_CLK_TCK") - time.process_time()
