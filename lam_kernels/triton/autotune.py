"""Measured choice among the table's entries, remembered on disk. Off unless LAM_TRITON_AUTOTUNE=1.

The first call of a kernel with a problem of a new size (lengths and heads rounded up to a power of
two) times every entry of the table and waits for the device while doing so; later calls, also of
later processes, take what was found. One JSON file a GPU, torch and Triton version, under
LAM_TRITON_AUTOTUNE_DIR or $XDG_CACHE_HOME/lam_kernels (~/.cache/lam_kernels). A file that cannot be
read, or names what the table no longer has, counts as empty: an entry is only ever one of the
table's. While a CUDA graph is captured nothing is measured; the rule of cost decides.
"""

from __future__ import annotations

import functools
import json
import math
import os
import re
from collections.abc import Callable
from pathlib import Path

import torch
import triton
from triton.runtime.errors import OutOfResources

from ..training.atomic_write import atomic_write
from . import configurations
from .configurations import Configuration, Problem

_REPEATS = 20
_MOST_BYTES = 2**20  # of a cache file


def enabled() -> bool:
    return os.environ.get("LAM_TRITON_AUTOTUNE", "0") == "1"


def choose(
    problem: Problem, device: torch.device, run: Callable[[Configuration], object]
) -> Configuration:
    """The fastest entry as measured now or before; by the rule of cost where nothing may wait."""
    entries = configurations.entries(problem)
    if len(entries) == 1:
        return entries[0]
    file = cache_file(device)
    found = _remembered(str(file))
    key = _key(problem)
    entry = _entry(found.get(key))
    if entry not in entries:
        if torch.cuda.is_current_stream_capturing():
            return configurations.choose(problem, device)
        entry = min(entries, key=lambda one: _milliseconds(lambda: run(one)))
        found[key] = list(entry)
        # another process may have added to it meanwhile
        atomic_write(file, json.dumps({**_read(file), **found}, indent=1, sort_keys=True))
    return entry


def cache_file(device: torch.device) -> Path:
    folder = os.environ.get("LAM_TRITON_AUTOTUNE_DIR")
    if not folder:
        home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        folder = Path(home) / "lam_kernels"
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    text = f"triton-{name}-{torch.__version__}-{triton.__version__}"
    return Path(folder) / (re.sub(r"[^\w.+-]", "-", text) + ".json")


def _key(problem: Problem) -> str:
    sizes = (triton.next_power_of_2(n) for n in (problem.Lq, problem.Lk, problem.pairs))
    kernel = f"{problem.kernel}, low rank" if problem.low_rank else problem.kernel
    return " ".join(map(str, (kernel, problem.width, problem.head_dim, *sizes)))


def _entry(values: object) -> Configuration | None:
    numbers = isinstance(values, list) and len(values) == len(Configuration._fields)
    return Configuration(*values) if numbers else None


@functools.cache
def _remembered(file: str) -> dict:
    return _read(Path(file))


def _read(file: Path) -> dict:
    try:
        if file.stat().st_size > _MOST_BYTES:
            return {}
        found = json.loads(file.read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _milliseconds(run: Callable[[], object]) -> float:
    """Median of some launches, after one that compiles; endless where it does not fit the chip."""
    try:
        run()
    except OutOfResources:
        return math.inf
    times = []
    for _ in range(_REPEATS):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        run()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end))
    return sorted(times)[len(times) // 2]
