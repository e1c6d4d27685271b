"""Interleaved samples, the filter against other load, percentiles.

One sample of every contender in turn, so that a slow minute of the machine is everybody's.

CPU   wall time. A sample is dropped when this process's threads waited for a processor for more
      than 1 % of it (run-queue delay of /proc/self/task/*/schedstat): then something else ran.
      Without the filter two threads on two cores read whole time slices instead of milliseconds,
      since the waiting thread spins at a barrier while its partner is not running.
CUDA  time between two events around one call, after the level-2 cache was overwritten, so that
      operands come from memory as they do between the layers of a model (cold=False leaves them
      there). The overwriting also hides the launch of the call's first kernels, as a busy queue
      does; what a launch-bound call costs shows in its CUDA graph beside it. Nothing is dropped.
"""

from __future__ import annotations

import gc
import math
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field

DISTURBED_SHARE = 0.01
SAMPLE_SECONDS = 0.005  # a shorter call is repeated within a sample until it lasts this long
WARM_UP_CALLS = 2
LONG_CALL_SECONDS = 0.5  # such a call is warm after one
LEAST_CLEAN = 3  # with fewer clean samples all are used and the row says so


def run_delay_ns() -> dict[int, int] | None:
    """Nanoseconds each thread has waited while runnable; None where the kernel does not say."""
    delays = {}
    try:
        for thread in os.listdir("/proc/self/task"):
            try:
                with open(f"/proc/self/task/{thread}/schedstat") as file:
                    delays[int(thread)] = int(file.read().split()[1])
            except FileNotFoundError:  # the thread ended meanwhile
                continue
    except (OSError, IndexError, ValueError):
        return None
    return delays


def waited_ns(before: dict[int, int] | None, after: dict[int, int] | None) -> int:
    """Run-queue delay between two readings, over the threads that are in the second one."""
    if before is None or after is None:
        return 0
    return sum(delay - before.get(thread, 0) for thread, delay in after.items())


@dataclass
class Series:
    """Samples of one contender, seconds a call, by round."""

    name: str = ""
    clean: dict[int, float] = field(default_factory=dict)
    disturbed: dict[int, float] = field(default_factory=dict)
    repeats: int = 1

    @property
    def filtered(self) -> bool:
        return len(self.clean) >= LEAST_CLEAN or not self.disturbed

    @property
    def used(self) -> dict[int, float]:
        """Clean samples; all of them where there are too few clean ones."""
        return self.clean if self.filtered else self.clean | self.disturbed


def percentile(values: list[float], q: float) -> float:
    """The q-th percentile (0 to 100), linear between neighbours."""
    ordered = sorted(values)
    if not ordered:
        return math.nan
    at = (len(ordered) - 1) * q / 100
    low = math.floor(at)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (at - low) * (ordered[high] - ordered[low])


def spread(values: list[float]) -> tuple[float, float, float]:
    """(20th percentile, median, 80th percentile)."""
    return percentile(values, 20), percentile(values, 50), percentile(values, 80)


def ratio(ours: Series, peer: Series) -> tuple[float, float, float]:
    """Our time / the peer's: 20th percentile, median and 80th of the ratios within a round.

    Clean samples, if both have enough of them; else all samples of both, so that like is divided by
    like. With fewer than three common rounds it is the ratio of the medians and no spread.
    """
    a, b = ours.clean, peer.clean
    if not (ours.filtered and peer.filtered):
        a, b = a | ours.disturbed, b | peer.disturbed
    paired = [a[i] / b[i] for i in a.keys() & b.keys()]
    if len(paired) >= LEAST_CLEAN:
        return spread(paired)
    middle = percentile(list(a.values()), 50) / percentile(list(b.values()), 50)
    return math.nan, middle, math.nan


@dataclass
class Runner:
    """A zero-argument call to be timed."""

    name: str
    call: Callable[[], object]
    threads: int | None = None  # None: as the run says
    context: bool = False  # no goal hangs on it: sampled in every third round


class CpuSampler:
    """Wall time of a call, and whether other work kept our threads waiting meanwhile."""

    least_seconds = SAMPLE_SECONDS

    def __init__(
        self,
        clock: Callable[[], float] = time.perf_counter,
        delay: Callable[[], dict[int, int] | None] = run_delay_ns,
    ):
        self.now, self._delay = clock, delay

    def sample(self, call: Callable[[], object], repeats: int) -> tuple[float, bool]:
        """(seconds a call, disturbed)"""
        before = self._delay()
        start = self.now()
        for _ in range(repeats):
            call()
        wall = self.now() - start
        waited = waited_ns(before, self._delay()) / 1e9
        return wall / repeats, waited > DISTURBED_SHARE * wall


class CudaSampler:
    """Time between two events around one call. `cuda` is torch.cuda, or a stand-in in tests."""

    least_seconds = 0.0  # one call a sample: the cache is overwritten before each

    def __init__(self, cuda=None, *, cold: bool = True, clock=time.perf_counter):
        import torch

        self._cuda, self.now = cuda or torch.cuda, clock
        self._flush = None
        if cold:
            cache = self._cuda.get_device_properties(0).L2_cache_size
            device = "cuda" if cuda is None else "cpu"
            self._flush = torch.empty(max(2 * cache, 2**26), dtype=torch.int8, device=device)

    def sample(self, call: Callable[[], object], repeats: int) -> tuple[float, bool]:
        """(seconds of the call on the device, False)"""
        start, end = (self._cuda.Event(enable_timing=True) for _ in range(2))
        if self._flush is not None:
            self._flush.zero_()
        start.record()
        call()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3, False


def interleave(
    runners: list[Runner],
    *,
    samples: int,
    seconds: float,
    set_threads: Callable[[int | None], None] = lambda threads: None,
    sampler: CpuSampler | CudaSampler | None = None,
) -> dict[str, Series]:
    """Rounds over all runners until each has `samples` clean samples or `seconds` are over.

    Every runner is sampled at least once, whatever the budget. `set_threads` is called outside the
    timed part.
    """
    sampler = sampler or CpuSampler()
    series = {r.name: Series(r.name) for r in runners}
    for runner in runners:
        set_threads(runner.threads)
        took = math.inf
        for _ in range(WARM_UP_CALLS):
            took = min(took, sampler.sample(runner.call, 1)[0])
            if took > LONG_CALL_SECONDS:
                break
        repeats = math.ceil(sampler.least_seconds / max(took, 1e-9))
        series[runner.name].repeats = max(1, repeats)

    started, round_ = sampler.now(), 0
    gc.collect()
    collecting = gc.isenabled()
    gc.disable()  # a collection would fall into somebody's sample
    try:
        while True:
            for runner in runners:
                if runner.context and round_ % 3:
                    continue
                one = series[runner.name]
                set_threads(runner.threads)
                took, disturbed = sampler.sample(runner.call, one.repeats)
                (one.disturbed if disturbed else one.clean)[round_] = took
            round_ += 1
            gc.collect(0)
            if not _wanted(runners, series, samples) or sampler.now() - started > seconds:
                return series
    finally:
        if collecting:
            gc.enable()
        set_threads(None)


def _wanted(runners: list[Runner], series: dict[str, Series], samples: int) -> bool:
    """Whether a runner that decides something still lacks clean samples."""
    deciding = [r for r in runners if not r.context] or runners
    return any(len(series[r.name].clean) < samples for r in deciding)
