"""Peak extra memory of one call.

CPU, in a process of its own: the peak of resident memory (VmHWM, reset through
/proc/self/clear_refs) minus what was resident before the call, so results, temporaries and scratch
that a kernel keeps for its next call are all in it. A tiny call comes first: it loads libraries and
starts threads, which are no attention's memory. torch.compile gets a whole call first, because
compiling needs memory that training steps do not; inductor's code keeps nothing between calls.
"""

from __future__ import annotations

import ctypes
import gc
import json
import subprocess
import sys
import time

from . import record

MIB = 2**20


def resident_kib(field: str) -> int:
    """VmRSS or VmHWM of this process."""
    with open("/proc/self/status") as file:
        for line in file:
            if line.startswith(field + ":"):
                return int(line.split()[1])
    raise OSError(f"/proc/self/status has no {field}")


def _settle() -> None:
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)


def peak_mib(call) -> tuple[float, float]:
    """(peak during the call, still there when its results are freed), MiB above the time before."""
    _settle()
    before = resident_kib("VmRSS")
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # VmHWM starts again at VmRSS
    result = call()
    peak = resident_kib("VmHWM") - before
    del result
    _settle()
    return peak / 1024, (resident_kib("VmRSS") - before) / 1024


def cuda_peak_mib(call) -> tuple[float, float]:
    """The same on a CUDA device, by the statistics of torch's allocator."""
    import torch

    gc.collect()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    result = call()
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated() - before
    del result
    return peak / MIB, (torch.cuda.memory_allocated() - before) / MIB


def measure_here(
    op: str, problem: str, direction: str, name: str, threads: int, backend: str, device: str
) -> dict:
    """One row, or a row with an error; for a fresh process. `problem` is the text of one."""
    import torch

    from . import check, measure, ops
    from .contender import contender

    torch.set_num_threads(threads)
    try:
        page = ops.page(op)
        problem = page.Problem.parse(problem)

        def made(one):
            return contender(page, name, one, direction, backend, lambda p: page.draw(p, device))

        made(page.tiny(problem)).run()
        one = made(problem)
        if one.peer.compiled:
            one.run()
        peak, kept = (cuda_peak_mib if device == "cuda" else peak_mib)(one.run)
        row = {"peak_mib": round(peak, 2), "kept_mib": round(kept, 2)}
        if one.peer.differs:
            row["differs"] = one.peer.differs
        if one.peer.checked:  # after the measurement: the reference's own memory must not be in it
            mine = one.peer.problem(problem)
            parts = one.peer.expected(mine, device) if one.peer.expected else None
            errors, wrong = check.problems_in(one.result(), page, mine, device, parts)
            if wrong:
                return {"error": "wrong result: " + "; ".join(wrong)}
            row["errors"] = errors
        return row
    except Exception as error:  # a peer that fails is a row
        return {"error": measure.one_line(error)}


def measure_apart(*arguments, allocator: str) -> dict:
    """measure_here in a fresh process with that allocator."""
    command = [sys.executable, "-m", "bench", "_memory", json.dumps(arguments)]
    started = time.perf_counter()
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        env=record.environment_for(allocator),
        cwd=record.tree(),
    )
    lines = done.stdout.strip().splitlines()
    if done.returncode or not lines:
        last = (done.stderr.strip().splitlines() or ["no output"])[-1]
        return {"error": f"exit code {done.returncode}: {last}"}
    return json.loads(lines[-1]) | {"seconds": round(time.perf_counter() - started, 1)}
