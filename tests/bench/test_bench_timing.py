"""Percentiles, the disturbance filter and the interleaving, on made-up clocks."""

import math

import pytest

from bench import timing
from bench.timing import Runner, Series


def test_percentiles():
    values = [5.0, 1.0, 4.0, 2.0, 3.0]
    assert timing.spread(values) == pytest.approx((1.8, 3.0, 4.2))
    assert timing.percentile([7.0], 20) == 7.0
    assert math.isnan(timing.percentile([], 50))


def test_waiting_counts_threads_that_started_meanwhile_and_not_those_that_ended():
    assert timing.waited_ns({1: 100, 2: 50}, {1: 130, 3: 7}) == 37
    assert timing.waited_ns(None, {1: 5}) == 0


def test_this_system_says_how_long_its_threads_waited():
    delays = timing.run_delay_ns()
    assert delays is None or all(d >= 0 for d in delays.values())


class Machine:
    """A clock that calls advance, and a run queue on which chosen calls wait."""

    def __init__(self, disturbed=()):
        self.now, self.waited, self.calls, self.order = 0.0, 0, 0, []
        self.disturbed = set(disturbed)

    def work(self, name, seconds):
        def call():
            self.calls += 1
            self.order.append(name)
            late = 0.05 if self.calls in self.disturbed else 0.0
            self.now += seconds + late
            self.waited += round(late * 1e9)

        return call

    def measure(self, runners, **settings):
        sampler = timing.CpuSampler(clock=lambda: self.now, delay=lambda: {1: self.waited})
        return timing.interleave(runners, sampler=sampler, **settings)


def test_samples_alternate_after_warm_up():
    machine = Machine()
    runners = [Runner("a", machine.work("a", 0.01)), Runner("b", machine.work("b", 0.02))]
    series = machine.measure(runners, samples=3, seconds=9)
    assert machine.order == ["a", "a", "b", "b", *["a", "b"] * 3]
    assert list(series["a"].clean.values()) == pytest.approx([0.01] * 3)
    assert timing.ratio(series["a"], series["b"]) == pytest.approx((0.5, 0.5, 0.5))


def test_disturbed_samples_are_dropped_counted_and_replaced():
    machine = Machine(disturbed=(5, 8))  # the first sample of a, the second of b
    runners = [Runner("a", machine.work("a", 0.01)), Runner("b", machine.work("b", 0.02))]
    series = machine.measure(runners, samples=4, seconds=9)
    assert [len(series[n].disturbed) for n in "ab"] == [1, 1]
    assert all(len(series[n].clean) >= 4 for n in "ab")
    assert max(series["a"].used.values()) == pytest.approx(0.01)
    low, _, high = timing.ratio(series["a"], series["b"])  # only rounds in which both were clean
    assert (low, high) == pytest.approx((0.5, 0.5))


def test_without_clean_samples_all_are_used_and_marked():
    machine = Machine(disturbed=range(1, 1000))
    runners = [Runner("a", machine.work("a", 0.01)), Runner("b", machine.work("b", 0.02))]
    series = machine.measure(runners, samples=4, seconds=1)
    assert not series["a"].filtered
    assert len(series["a"].used) == len(series["a"].disturbed) > 3
    assert timing.ratio(series["a"], series["b"])[1] == pytest.approx(0.06 / 0.07)


def test_a_ratio_never_divides_clean_by_disturbed_samples():
    calm = Series(clean={0: 1.0, 1: 1.0, 2: 1.0, 3: 1.0}, disturbed={4: 3.0, 5: 3.0, 6: 3.0})
    noisy = Series(disturbed={4: 6.0, 5: 6.0, 6: 6.0})
    assert timing.ratio(calm, noisy) == pytest.approx((0.5, 0.5, 0.5))


def test_a_ratio_is_within_its_spread_and_has_none_of_too_few_rounds():
    ours, peer = (Series(clean=dict(enumerate(v))) for v in ([1, 2, 3, 9], [1, 1, 2, 1]))
    low, middle, high = timing.ratio(ours, peer)
    assert low <= middle <= high
    few = Series(clean={0: 2.0, 7: 2.0})
    low, middle, high = timing.ratio(ours, few)
    assert math.isnan(low)
    assert middle == pytest.approx(2.5 / 2.0)


def test_short_calls_are_repeated_within_a_sample():
    machine = Machine()
    series = machine.measure([Runner("a", machine.work("a", 0.001))], samples=2, seconds=9)
    assert series["a"].repeats == 5
    assert list(series["a"].clean.values()) == pytest.approx([0.001] * 2)


def test_context_is_sampled_less_and_decides_nothing():
    machine = Machine()
    runners = [
        Runner("a", machine.work("a", 0.01)),
        Runner("slow", machine.work("slow", 0.1), context=True),
    ]
    series = machine.measure(runners, samples=7, seconds=99)
    assert len(series["a"].clean) == 7
    assert len(series["slow"].clean) == 3


def test_the_budget_ends_it_but_everybody_is_sampled_once():
    machine = Machine()
    runners = [Runner(n, machine.work(n, 1.0)) for n in "ab"]
    series = machine.measure(runners, samples=100, seconds=0.5)
    assert [len(s.used) for s in series.values()] == [1, 1]


def test_threads_are_set_before_each_sample():
    machine, seen = Machine(), []
    runners = [
        Runner("a", machine.work("a", 0.01)),
        Runner("b", machine.work("b", 0.01), threads=1),
    ]
    machine.measure(runners, samples=1, seconds=9, set_threads=seen.append)
    assert seen == [None, 1, None, 1, None]
