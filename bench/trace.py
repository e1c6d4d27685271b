"""Where a training step's time goes, before and after the fused ops.

One torch.profiler trace of a few steps. Every operation is counted once, with the time that is its
own, under the innermost range it ran in: modules and attention functions open ranges in the
forward pass, and autograd's sequence numbers say which range an operation of the backward belongs
to. On CUDA the times are those of kernels on the device; what is left of the step is launch gaps.

    attention     masked_attention and scaled_dot_product_attention, and of modules that are named
                  ...Attention what is neither a linear layer nor a mask generator
    generator     LearnableAttentionMask, its linear layers included
    gemm          matrix products anywhere else
    copies        copies, casts, layout changes, fills anywhere else
    optimizer     the optimizer's step and zero_grad
    other         norms, activations, losses, additions
    gaps          time in which no operation ran: Python on a CPU, launches that are late on CUDA
"""

from __future__ import annotations

import contextlib
import functools
import gzip
import json
import math
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from torch.profiler import ProfilerActivity, record_function

from . import timing

CATEGORIES = (
    "attention forward", "attention backward", "mask generator", "gemm", "copies", "optimizer",
    "other", "gaps",
)  # fmt: skip
STEPS, SECONDS = 7, 10.0  # of whole steps, at least and at most
ATTEMPTS = 3
_PREFIX = "bench."
_GEMM = ("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm", "aten::matmul", "mkldnn::",
         "aten::linear", "aten::_scaled_mm")  # fmt: skip
_COPIES = ("aten::copy_", "aten::_to_copy", "aten::to", "aten::contiguous", "aten::clone",
           "aten::cat", "aten::fill_", "aten::zero_", "aten::empty", "aten::constant_pad_nd",
           "aten::index", "Memcpy", "Memset")  # fmt: skip


# attention that was called by a name of the user's own, which no range is around
_ATTENTION = ("lam_kernels::", "aten::scaled_dot_product_attention",
              "aten::_scaled_dot_product_")  # fmt: skip


@dataclass
class Subject:
    """A training step, and the module whose parts get ranges."""

    step: Callable[[], object]
    module: nn.Module | None = None


# ---- ranges


@contextlib.contextmanager
def ranges(module: nn.Module | None, nvtx: bool = False) -> Iterator[None]:
    """Opens a range around each part while the model runs, on CUDA an NVTX range as well."""
    with contextlib.ExitStack() as stack:
        for owner, name in _attention_functions():
            stack.enter_context(_replaced(owner, name, nvtx))
        for part in module.modules() if module is not None else ():
            if kind := _kind(part):
                stack.callback(_hook(part, kind, nvtx))
        yield


def _kind(part: nn.Module) -> str:
    name = type(part).__name__
    if name == "LearnableAttentionMask":
        return "generator"
    if isinstance(part, nn.Linear):
        return "linear"
    return "attention" if "attention" in name.lower() else ""


def _attention_functions() -> list[tuple[object, str]]:
    import lam_kernels

    from .ops import NAMES

    names = [name for name in ("lam_attention", *NAMES) if hasattr(lam_kernels, name)]
    return [(F, "scaled_dot_product_attention"), *((lam_kernels, name) for name in names)]


@contextlib.contextmanager
def _replaced(owner: object, name: str, nvtx: bool) -> Iterator[None]:
    original = getattr(owner, name)

    @functools.wraps(original)
    def ranged(*args, **kwargs):
        with _range("core", nvtx):
            return original(*args, **kwargs)

    setattr(owner, name, ranged)
    try:
        yield
    finally:
        setattr(owner, name, original)


@contextlib.contextmanager
def _range(kind: str, nvtx: bool) -> Iterator[None]:
    if nvtx:
        torch.cuda.nvtx.range_push(_PREFIX + kind)
    try:
        with record_function(_PREFIX + kind):
            yield
    finally:
        if nvtx:
            torch.cuda.nvtx.range_pop()


def _hook(part: nn.Module, kind: str, nvtx: bool) -> Callable[[], None]:
    opened: list = []

    def before(_module, _args):
        one = _range(kind, nvtx)
        one.__enter__()
        opened.append(one)

    def after(_module, _args, _result):
        if opened:
            opened.pop().__exit__(None, None, None)

    handles = (
        part.register_forward_pre_hook(before),
        part.register_forward_hook(after, always_call=True),
    )
    return lambda: [handle.remove() for handle in handles]


# ---- the trace


@dataclass
class Profile:
    """Milliseconds a step."""

    name: str
    times: timing.Series  # of whole steps, in seconds
    parts_ms: dict[str, float]
    peak_mib: float  # of tensors, above the first record
    timeline: list[tuple[float, float]] = field(default_factory=list)  # (ms, MiB)
    trace: Path | None = None
    waited: float = 0.0  # share of the profiled time in which other work kept our threads waiting

    @property
    def spread_ms(self) -> tuple[float, float, float]:
        return tuple(1e3 * value for value in timing.spread(list(self.times.used.values())))

    @property
    def wall_ms(self) -> float:
        return self.spread_ms[1]


def whole_steps(made: dict[str, Subject], steps: int, device: str) -> dict[str, timing.Series]:
    """Whole steps without the profiler, those of all subjects in turns, after a warm-up."""

    def step(one: Subject) -> Callable[[], None]:
        def call() -> None:
            one.step()
            if device == "cuda":
                torch.cuda.synchronize()

        return call

    runners = [timing.Runner(name, step(one)) for name, one in made.items()]
    return timing.interleave(
        runners, samples=max(STEPS, steps), seconds=SECONDS, sampler=timing.CpuSampler()
    )


def profiled(
    name: str,
    made: Subject,
    *,
    steps: int,
    device: str,
    trace: Path | None,
    times: timing.Series | None = None,
) -> Profile:
    """Profiles so many steps; `times` are those of whole steps, which are measured if not given.

    Of a few profiles it is the one in which other work kept our threads waiting least.
    """
    nvtx = device == "cuda"
    times = times or whole_steps({name: made}, steps, device)[name]
    wall = 1e3 * timing.percentile(list(times.used.values()), 50)
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if nvtx else [])]
    least = math.inf
    with ranges(made.module, nvtx):
        made.step()
        for _ in range(ATTEMPTS):
            before = timing.run_delay_ns()
            with torch.profiler.profile(activities=activities, profile_memory=True) as one:
                started = time.perf_counter()
                for _ in range(steps):
                    made.step()
                if nvtx:
                    torch.cuda.synchronize()
                taken = time.perf_counter() - started
            waited = timing.waited_ns(before, timing.run_delay_ns()) / 1e9 / taken
            if waited < least:
                least, profiler, profiled_ms = waited, one, taken * 1e3 / steps
            if waited <= timing.DISTURBED_SHARE:
                break
    parts = attributed(profiler.events(), on_device=nvtx)
    parts = {kind: value / steps / 1e3 for kind, value in parts.items()}
    busy = sum(parts.values())
    # the profiler slows Python, not the operations: their times are kept, the rest of the step
    # without the profiler is gaps
    parts["gaps"] = max(0.0, (wall if busy < wall else profiled_ms) - busy)
    timeline, peak, saved = _memory(profiler, trace, "cuda" if nvtx else "cpu")
    parts = {kind: parts.get(kind, 0.0) for kind in CATEGORIES}
    return Profile(name, times, parts, peak, timeline, saved, least)


def attributed(events, *, on_device: bool) -> dict[str, float]:
    """Microseconds of each category: every event's own time, under the range it belongs to."""
    forward: dict[tuple, str] = {}  # (thread, sequence number) -> range, for the backward
    for event in events:
        if event.sequence_nr >= 0 and not _is_backward(event):
            # the last one with this number is the one that made the node
            forward[event.thread, event.sequence_nr] = _innermost(event)
    found: dict[str, float] = defaultdict(float)
    for event in events:
        if event.name.startswith("ProfilerStep"):
            continue
        own = event.self_device_time_total if on_device else event.self_cpu_time_total
        if own <= 0 or event.device_type != torch.autograd.DeviceType.CPU:
            continue
        found[_category(event, forward)] += own
    return dict(found)


def _is_backward(event) -> bool:
    return event.name.startswith("autograd::engine") or event.scope == 1


def _chain(event) -> Iterator[object]:
    while event is not None:
        yield event
        event = event.cpu_parent


def _innermost(event) -> str:
    """The range that an operation ran in: a generator's and an attention function's parts stay
    theirs, a linear layer within an attention module is a linear layer."""
    kinds = [e.name.removeprefix(_PREFIX) for e in _chain(event) if e.name.startswith(_PREFIX)]
    kinds += ["core" for e in _chain(event) if e.name.startswith(_ATTENTION)]
    for whole in ("generator", "core"):
        if whole in kinds:
            return whole
    return kinds[0] if kinds else ""


def _category(event, forward: dict[tuple, str]) -> str:
    backward, kind = False, ""
    for one in _chain(event):
        if _is_backward(one):
            backward = True
            if one.sequence_nr >= 0:
                kind = forward.get((one.fwd_thread, one.sequence_nr), kind)
        if one.name.startswith("Optimizer.") or "zero_grad" in one.name:
            return "optimizer"
    kind = kind if backward else _innermost(event)
    if backward and any(e.name.startswith(_ATTENTION) for e in _chain(event)):
        kind = "core"
    if kind == "generator":
        return "mask generator"
    if kind == "core" or (kind == "attention" and not event.name.startswith(_PREFIX)):
        return f"attention {'backward' if backward else 'forward'}"
    if event.name.startswith(_GEMM) or kind == "linear":
        return "gemm"
    return "copies" if event.name.startswith(_COPIES) else "other"


def _memory(
    profiler, trace: Path | None, device: str
) -> tuple[list[tuple[float, float]], float, Path | None]:
    """(timeline, peak, where the Chrome trace was saved), from the trace's memory records."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        content = path.read_text()
        if trace is not None:
            trace.parent.mkdir(parents=True, exist_ok=True)
            with gzip.open(trace, "wt") as file:
                file.write(content)
    kind = {"cpu": 0, "cuda": 1}[device]
    records = sorted(
        (float(event["ts"]), event["args"])
        for event in json.loads(content)["traceEvents"]
        if event.get("name") == "[memory]" and event["args"].get("Device Type") == kind
    )
    timeline, held = [], 0
    first = records[0][0] if records else 0.0
    for at, arguments in records:
        held += int(arguments["Bytes"])
        timeline.append(((at - first) / 1e3, held / 2**20))
    low = min((mib for _, mib in timeline), default=0.0)
    timeline = [(at, mib - low) for at, mib in timeline]
    return timeline, max((mib for _, mib in timeline), default=0.0), trace
