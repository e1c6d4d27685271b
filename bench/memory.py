"""Peak extra memory of one call, in a process of its own.

The peak of resident memory (VmHWM, reset through /proc/self/clear_refs) minus what was resident
before the call, so results, temporaries and scratch that a kernel keeps for its next call are all
in it. A tiny call comes first: it loads libraries and starts threads, which are no attention's
memory. torch.compile gets a whole call first, because compiling needs memory that training steps do
not; inductor's code keeps nothing between calls.
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


def measure_here(
    case_name: str, dtype: str, direction: str, peer_name: str, threads: int, backend: str
) -> dict:
    """One row, or a row with an error; for a fresh process."""
    import torch

    from . import baselines, check, measure
    from .cases import CASES

    torch.set_num_threads(threads)
    try:
        problem = measure.problem_of(CASES[case_name], dtype)
        tiny = problem.but(B=1, H=2, Lq=128, Lk=128)
        baselines.contender(peer_name, tiny, direction, backend, check.draw).run()
        one = baselines.contender(peer_name, problem, direction, backend, check.draw)
        if one.peer.compiled:
            one.run()
        peak, kept = peak_mib(one.run)
        row = {"peak_mib": round(peak, 2), "kept_mib": round(kept, 2)}
        if one.peer.checked:  # after the measurement: the reference's own memory must not be in it
            errors, wrong = check.problems_in(one.result(), one.peer.problem(problem))
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
        cwd=record.ROOT.parent,
    )
    lines = done.stdout.strip().splitlines()
    if done.returncode or not lines:
        last = (done.stderr.strip().splitlines() or ["no output"])[-1]
        return {"error": f"exit code {done.returncode}: {last}"}
    return json.loads(lines[-1]) | {"seconds": round(time.perf_counter() - started, 1)}
