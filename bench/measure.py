"""One case in one dtype and direction -> rows."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass

import torch

from python_ref.inputs import Problem

from . import baselines, check, cost, memory, timing
from .cases import DTYPES, Case, Goal

PEAK_SIZE = 1024  # of the square matrices
COPY_BYTES = 2**26


@dataclass
class Settings:
    """What a run was asked for."""

    samples: int
    seconds: float  # of sampling, a case
    threads: int
    allocator: str
    backend: str
    peers: list[str] | None = None  # None: all that the case names


def problem_of(case: Case, dtype: str) -> Problem:
    return Problem(**case.problem, dtype=DTYPES[dtype])


def one_line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:300]}"


def peaks(dtype: str, threads: int) -> dict:
    """Rates of a square matrix product and of a large copy, best of a few, measured now."""
    torch.set_num_threads(threads)
    a, b = (torch.randn(PEAK_SIZE, PEAK_SIZE).to(getattr(torch, DTYPES[dtype])) for _ in range(2))
    source = torch.zeros(COPY_BYTES // 4)
    target = torch.zeros_like(source)
    runners = [
        timing.Runner("matmul", lambda: torch.mm(a, b)),
        timing.Runner("copy", lambda: target.copy_(source)),
    ]
    series = timing.interleave(runners, samples=9, seconds=1.0)
    matmul, copy = (min(series[n].used.values()) for n in ("matmul", "copy"))
    return {
        "matmul_tflops": 2 * PEAK_SIZE**3 / matmul / 1e12,
        "copy_gbps": 2 * COPY_BYTES / copy / 1e9,
    }


def measure(case: Case, dtype: str, direction: str, settings: Settings, peak: dict) -> list[dict]:
    """The rows of a case, ours first. A contender that fails or is wrong is a row that says so."""
    head = {
        "case": case.name,
        "section": case.section,
        "label": case.label,
        "measure": case.measure,
        "dtype": dtype,
        "direction": direction,
        "threads": settings.threads,
        "allocator": settings.allocator,
        "backend": settings.backend,
    }
    wanted = case.peers if settings.peers is None else settings.peers
    names = ["ours", *(p for p in wanted if p != "ours")]
    goals = case.goals_of(dtype, direction)
    if case.measure == "memory":
        rows = _memory_rows(case, dtype, direction, settings, names)
    else:
        rows = _timed_rows(case, dtype, direction, settings, names, goals, peak)
    _judge(rows, goals, case.measure)
    return [head | row for row in rows]


def _memory_rows(case, dtype, direction, settings, names) -> list[dict]:
    rows = []
    for name in names:
        found = memory.measure_apart(
            case.name, dtype, direction, name, settings.threads, settings.backend,
            allocator=settings.allocator,
        )  # fmt: skip
        rows.append({"contender": name} | found)
    return rows


def _timed_rows(case, dtype, direction, settings, names, goals, peak) -> list[dict]:
    problem = problem_of(case, dtype)
    torch._dynamo.reset()  # each case compiles anew: no case runs into another's recompile limit
    torch._dynamo.config.recompile_limit = 64
    drawn = {}

    def draw(one: Problem):
        if repr(one) not in drawn:
            drawn[repr(one)] = check.draw(one)
        return drawn[repr(one)]

    def set_threads(threads: int | None) -> None:
        count = threads or settings.threads
        if torch.get_num_threads() != count:
            torch.set_num_threads(count)

    deciding = {"ours", *(p for goal in goals for p in goal.peers)}
    rows, runners = {}, []
    for name in names:
        rows[name] = {"contender": name}
        try:
            set_threads(baselines.PEERS[name].threads)
            one = baselines.contender(name, problem, direction, settings.backend, draw)
            start = time.perf_counter()
            result = one.result()
            rows[name]["first_call_ms"] = round((time.perf_counter() - start) * 1e3, 3)
            if one.peer.checked:
                errors, wrong = check.problems_in(result, one.peer.problem(problem))
                if wrong:
                    rows[name]["error"] = "wrong result: " + "; ".join(wrong)
                    continue
                rows[name]["errors"] = errors
            del result
        except Exception as error:  # a peer that fails is a row
            rows[name]["error"] = one_line(error)
            continue
        runners.append(timing.Runner(name, one.run, one.peer.threads, name not in deciding))
        if one.peer.checked:
            mine = one.peer.problem(problem)
            rows[name] |= {
                "flops": cost.flops(mine, direction),
                "least_bytes": cost.least_bytes(mine, direction),
            }
    if not runners:
        return list(rows.values())
    series = timing.interleave(
        runners, samples=settings.samples, seconds=settings.seconds, set_threads=set_threads
    )
    measured = timing.run_delay_ns() is not None
    for name, one in series.items():
        rows[name] |= _times(one, measured, rows[name], peak)
        if name != "ours" and "ours" in series:
            low, middle, high = timing.ratio(series["ours"], one)
            rows[name]["ours_over_this"] = round(middle, 4)
            if math.isfinite(low):
                rows[name] |= {
                    "ours_over_this_p20": round(low, 4),
                    "ours_over_this_p80": round(high, 4),
                }
            mine = timing.spread(list(series["ours"].used.values()))[1]
            theirs = timing.spread(list(one.used.values()))[1]
            rows[name]["ours_minus_this_us"] = round((mine - theirs) * 1e6, 3)
    return list(rows.values())


def _times(series: timing.Series, measured: bool, row: dict, peak: dict) -> dict:
    low, middle, high = timing.spread(list(series.used.values()))
    found = {
        "median_ms": round(middle * 1e3, 5),
        "p20_ms": round(low * 1e3, 5),
        "p80_ms": round(high * 1e3, 5),
        "samples": len(series.used),
        "dropped": len(series.disturbed) if series.filtered else 0,
        "disturbed": not series.filtered,  # too few clean samples: these include disturbed ones
        "delay_measured": measured,
        "calls_per_sample": series.repeats,
    }
    if "flops" in row:
        found |= {
            "tflops": round(row["flops"] / middle / 1e12, 4),
            "gbps": round(row["least_bytes"] / middle / 1e9, 3),
            "share_of_matmul": round(row["flops"] / middle / 1e12 / peak["matmul_tflops"], 4),
            "share_of_copy": round(row["least_bytes"] / middle / 1e9 / peak["copy_gbps"], 4),
        }
    return found


def _judge(rows: list[dict], goals: list[Goal], measure: str) -> None:
    """Write target and target_met into a goal's row: its fastest peer's, or ours for memory."""
    ours = rows[0]
    for goal in goals:
        if measure == "memory":
            ours["target"] = goal.at_most
            if "peak_mib" in ours:
                ours["target_met"] = ours["peak_mib"] <= goal.at_most
            continue
        peers = [r for r in rows if r["contender"] in goal.peers]
        timed = [r for r in peers if "median_ms" in r]
        if not timed:
            for row in peers:
                row["target"] = round(goal.at_most, 4)
            continue
        fastest = min(timed, key=lambda r: r["median_ms"])
        fastest["target"] = round(goal.at_most, 4)
        value = fastest.get("ours_minus_this_us" if measure == "overhead" else "ours_over_this")
        if value is not None:
            fastest["target_met"] = value <= round(goal.at_most, 4)
