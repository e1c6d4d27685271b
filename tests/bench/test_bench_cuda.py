"""The CUDA paths on a stand-in for torch.cuda, and on a device where there is one."""

from contextlib import contextmanager

import pytest
import torch

from bench import memory, timing
from bench.contender import Contender, captured, contender
from bench.ops import masked_attention as page
from bench.timing import Runner
from python_ref.inputs import Problem


class StandIn:
    """torch.cuda with a device whose clock is moved by the calls themselves."""

    L2_cache_size = 2**20

    def __init__(self):
        self.ms, self.order = 0.0, []

    def get_device_properties(self, index):
        return self

    def Event(self, enable_timing):
        return _Event(self)

    def work(self, name, ms):
        def call():
            self.order.append(name)
            self.ms += ms

        return call


class _Event:
    def __init__(self, cuda):
        self.cuda, self.at, self.waited = cuda, None, False

    def record(self):
        self.cuda.order.append("record")
        self.at = self.cuda.ms

    def synchronize(self):
        self.waited = True

    def elapsed_time(self, end):
        assert end.waited, "the time is asked for before the device was there"
        return end.at - self.at


def test_events_stand_around_one_call_and_the_cache_is_flushed_before():
    cuda = StandIn()
    sampler = timing.CudaSampler(cuda, cold=True)
    flushed = sampler._flush
    assert flushed.numel() >= 2 * cuda.L2_cache_size
    flushed.fill_(1)
    seconds, disturbed = sampler.sample(cuda.work("call", 3.0), repeats=1)
    assert cuda.order == ["record", "call", "record"]
    assert seconds == pytest.approx(3e-3)
    assert not disturbed
    assert not flushed.any()
    assert timing.CudaSampler(cuda, cold=False)._flush is None


def test_samples_are_interleaved_one_call_each():
    cuda = StandIn()
    runners = [Runner("a", cuda.work("a", 1.0)), Runner("b", cuda.work("b", 2.0))]
    series = timing.interleave(
        runners, samples=4, seconds=9, sampler=timing.CudaSampler(cuda, cold=False)
    )
    assert [name for name in cuda.order if name != "record"] == ["a", "a", "b", "b"] + 4 * [
        "a",
        "b",
    ]
    assert series["a"].repeats == 1
    assert timing.ratio(series["a"], series["b"]) == pytest.approx((0.5, 0.5, 0.5))


class GraphStandIn:
    """torch.cuda's streams and graphs: what is called while one is captured is run by replay."""

    def __init__(self):
        self.order, self.capturing = [], False

    def Stream(self):
        return self

    def current_stream(self):
        return self

    def wait_stream(self, other):
        self.order.append("wait")

    @contextmanager
    def stream(self, stream):
        self.order.append("side")
        yield
        self.order.append("main")

    def CUDAGraph(self):
        return self

    @contextmanager
    def graph(self, graph):
        self.capturing = True
        yield
        self.capturing = False

    def replay(self):
        self.order.append("replay")


def test_a_graph_is_captured_once_after_a_warm_up_beside_the_main_stream(monkeypatch):
    cuda, made = GraphStandIn(), []
    for name in ("Stream", "current_stream", "stream", "CUDAGraph", "graph"):
        monkeypatch.setattr(torch.cuda, name, getattr(cuda, name))

    def run():
        cuda.order.append("captured call" if cuda.capturing else "call")
        made.append(object())
        return made[-1]

    one = captured(Contender("eager", None, {}, run, None), warm_up_calls=2)
    assert cuda.order == ["wait", "side", "call", "call", "main", "wait", "captured call"]
    assert one.run() is one.run() is made[2]  # the memory that the graph writes
    assert cuda.order[7:] == ["replay", "replay"]


def test_the_peak_is_what_the_allocator_counts_beyond_what_was_there(monkeypatch):
    now, most = [5 * 2**20], [0]

    def allocate(mib):
        now[0] += mib * 2**20
        most[0] = max(most[0], now[0])

    def reset():
        most[0] = now[0]

    most[0] = 900 * 2**20  # of an earlier call
    for name, answer in (
        ("synchronize", lambda: None), ("memory_allocated", lambda: now[0]),
        ("reset_peak_memory_stats", reset), ("max_memory_allocated", lambda: most[0]),
    ):  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, answer)

    def call():
        allocate(64)
        allocate(-61)

    assert memory.cuda_peak_mib(call) == (64, 3)


needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
PROBLEM = Problem(B=2, H=2, Lq=64, D=16, multiplier="b1qk", dtype="bfloat16")


def _eager(direction="both"):
    return contender(page, "eager", PROBLEM, direction, "", lambda p: page.draw(p, "cuda"))


@needs_cuda
def test_a_graph_gives_the_same_results():
    from bench import check

    one = captured(_eager())
    one.run()
    _, wrong = check.problems_in(one.result(), page, PROBLEM, "cuda")
    assert not wrong


@needs_cuda
def test_peak_memory_by_the_allocator():
    block = 2**24
    peak, kept = memory.cuda_peak_mib(lambda: torch.empty(block, dtype=torch.int8, device="cuda"))
    assert peak == pytest.approx(16, abs=1)
    assert kept == 0


@needs_cuda
def test_a_run_on_the_device(tmp_path):
    from bench import record
    from bench.__main__ import main

    path = tmp_path / "rows.jsonl"
    code = main([
        "run", "--workload", "2,2,64,64,16", "--device", "cuda", "--dtype", "bf16", "--graph",
        "--peer", "eager,sdpa_nomask", "--samples", "3", "--seconds", "1", "--backend", "reference",
        "--results", str(path),
    ])  # fmt: skip
    rows = {row["contender"]: row for row in record.read(path)}
    assert code == 0
    assert {"ours", "ours+graph", "eager", "eager+graph", "sdpa_nomask"} <= rows.keys()
    assert all(row["gpu"] for row in rows.values())
    assert rows["eager+graph"]["median_ms"] > 0
    assert rows["eager"]["peak_mib"] > 0


@needs_cuda
def test_a_profiled_step_on_the_device(tmp_path, capsys):
    from bench.__main__ import main

    arguments = ["--device", "cuda", "--steps", "1", "--output", str(tmp_path)]
    assert main(["profile", *arguments]) == 0
    printed = capsys.readouterr().out
    assert "attention forward" in printed
    assert "attention backward" in printed
    assert (tmp_path / "after.json.gz").stat().st_size > 0
