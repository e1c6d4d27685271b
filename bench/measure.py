"""One case in one dtype and direction -> rows."""

from __future__ import annotations

import itertools
import math
import time
from dataclasses import dataclass, replace

import torch

from . import check, memory, ops, timing
from .cases import DTYPES, Case, Goal
from .contender import Contender, captured, contender, peer_of, split_name

PEAK_SIZE = {"cpu": 1024, "cuda": 8192}  # of the square matrices
COPY_BYTES = {"cpu": 2**26, "cuda": 2**30}


@dataclass
class Settings:
    """What a run was asked for."""

    samples: int
    seconds: float  # of sampling, a case
    threads: int
    allocator: str
    backends: tuple[str, ...]  # of ours; the first one's contender is "ours"
    device: str = "cpu"
    peers: list[str] | None = None  # None: all that the case names
    graph: bool = False  # CUDA graphs beside the plain calls
    cold: bool = True  # CUDA: the cache is overwritten before each sample
    memory: bool = False  # peak memory of each contender of a timed case too


def sampler_of(settings: Settings) -> timing.CpuSampler | timing.CudaSampler:
    if settings.device == "cpu":
        return timing.CpuSampler()
    return timing.CudaSampler(cold=settings.cold)


def problem_of(case: Case, dtype: str):
    return ops.page(case.op).Problem(**case.problem, dtype=DTYPES[dtype])


def one_line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:300]}"


def peaks(dtype: str, settings: Settings) -> dict:
    """Rates of a square matrix product and of a large copy, best of a few, measured now.

    On a CPU the product is measured in fp32 as well: many processors have no unit for half types,
    and a kernel that computes those in fp32 would otherwise seem to exceed what is possible.
    """
    torch.set_num_threads(settings.threads)
    dtypes = dict.fromkeys((dtype, "fp32") if settings.device == "cpu" else (dtype,))
    runners = [_copy(settings.device), *(_matmul(name, settings.device) for name in dtypes)]
    series = timing.interleave(runners, samples=9, seconds=1.0, sampler=sampler_of(settings))
    rates = {name: _best_rate(one, settings.device) for name, one in series.items()}
    matmuls = {name: rates[f"mm {name}"] for name in dtypes}
    fastest = max(matmuls, key=matmuls.get)
    return {
        "matmul_tflops": matmuls[dtype] / 1e12,
        "peak_tflops": matmuls[fastest] / 1e12,  # what shares are of
        "peak_dtype": fastest,
        "copy_gbps": rates["copy"] / 1e9,
    }


def _copy(device: str) -> timing.Runner:
    source = torch.zeros(COPY_BYTES[device] // 4, device=device)
    target = torch.zeros_like(source)
    return timing.Runner("copy", lambda: target.copy_(source), context=True)


def _matmul(dtype: str, device: str) -> timing.Runner:
    size = PEAK_SIZE[device]
    drawn = torch.randn(size, size, device=device).to(getattr(torch, DTYPES[dtype]))
    return timing.Runner(f"mm {dtype}", lambda: torch.mm(drawn, drawn), context=True)


def _best_rate(series: timing.Series, device: str) -> float:
    """FLOPs or bytes a second of the best sample."""
    work = 2 * COPY_BYTES[device] if series.name == "copy" else 2 * PEAK_SIZE[device] ** 3
    return work / min(series.used.values())


def _raised(peak: dict, series: dict[str, timing.Series], device: str) -> dict:
    """The peaks, where the samples that were taken among a case's own were better: the clock of a
    shared machine moves within a run."""
    mm, copy = (
        _best_rate(series.pop(name), device) for name in (f"mm {peak['peak_dtype']}", "copy")
    )
    return peak | {
        "peak_tflops": max(peak["peak_tflops"], mm / 1e12),
        "copy_gbps": max(peak["copy_gbps"], copy / 1e9),
    }


def measure(case: Case, dtype: str, direction: str, settings: Settings, peak: dict) -> list[dict]:
    """The rows of a case, ours first. A contender that fails or is wrong is a row that says so."""
    head = {
        "case": case.name,
        "op": case.op,
        "section": case.section,
        "measure": case.measure,
        "dtype": dtype,
        "direction": direction,
        "device": settings.device,
        "threads": settings.threads,
        "allocator": settings.allocator,
        "backend": settings.backends[0],
    }
    why_not = case.why_not or ops.missing(case.op)
    if why_not:
        return [head | {"label": _sizes(case), "contender": "ours", "missing": why_not}]
    page, problem = ops.page(case.op), problem_of(case, dtype)
    head |= {"label": page.label(problem), "problem": repr(problem), "length": problem.Lq}
    names = _contenders(case, page, problem, direction, settings)
    goals = case.goals_of(dtype, direction)
    if case.measure == "memory":
        rows = [memory_row(case, problem, direction, settings, name) for name in names]
    else:
        rows = _timed_rows(case, page, problem, direction, settings, names, goals, peak)
    _judge(rows, goals, case.measure)
    return [head | row for row in rows]


def _sizes(case: Case) -> str:
    return " ".join(
        f"{name.removesuffix('q')}{case.problem[name]}"
        for name in ("B", "H", "Lq", "D")
        if name in case.problem
    )


def _contenders(case, page, problem, direction, settings) -> list[str]:
    """Ours on each backend, then the peers."""
    wanted = case.peers if settings.peers is None else settings.peers
    if wanted is None:
        wanted = page.usual_peers(problem, settings.device, direction)
    mine = ["ours", *(f"ours:{name}" for name in settings.backends[1:])]
    known = {*mine, f"ours:{settings.backends[0]}"}
    names = [*mine, *(p for p in wanted if p not in known)]
    if settings.graph:
        names += [f"{name}+graph" for name in names]
    return names


def memory_row(case: Case, problem, direction: str, settings: Settings, name: str) -> dict:
    """A contender's peak memory, in a process of its own."""
    found = memory.measure_apart(
        case.op, repr(problem), direction, name, settings.threads, settings.backends[0],
        settings.device, allocator=settings.allocator,
    )  # fmt: skip
    return _named(name, settings) | found


def _named(name: str, settings: Settings) -> dict:
    """The contender's name, and its backend where it has one of its own."""
    backend = split_name(name.removesuffix("+graph"))[1]
    return {"contender": name} | ({"backend": backend} if backend else {})


def _timed_rows(case, page, problem, direction, settings, names, goals, peak) -> list[dict]:
    torch._dynamo.reset()  # each case compiles anew: no case runs into another's recompile limit
    torch._dynamo.config.recompile_limit = 64
    # a backward that is run again and again needs what the forward saved
    torch._functorch.config.donated_buffer = direction != "bwd"
    drawn = {}

    def draw(one):
        if repr(one) not in drawn:
            drawn[repr(one)] = page.draw(one, settings.device)
        return drawn[repr(one)]

    def set_threads(threads: int | None) -> None:
        count = threads or settings.threads
        if torch.get_num_threads() != count:
            torch.set_num_threads(count)

    deciding = set(names)
    if goals:  # the others are only context then, and sampled less
        held = {name for goal in goals for peer in goal.peers for name in (peer, f"{peer}+graph")}
        deciding = held | {n for n in names if n.startswith("ours")}
    rows, runners = {}, []
    for name in names:
        rows[name] = row = _named(name, settings)
        try:
            peer = peer_of(page, name.removesuffix("+graph"))
            set_threads(peer.threads)
            one = _ready(page, name, problem, direction, settings, draw, row)
        except Exception as error:  # a peer that fails is a row
            row["error"] = one_line(error)
            continue
        if "error" in row:
            continue
        runners.append(timing.Runner(name, one.run, peer.threads, name not in deciding))
        if peer.checked and peer.counted:
            mine = peer.problem(problem)
            row |= {
                "flops": page.flops(mine, direction),
                "least_bytes": page.least_bytes(mine, direction),
            }
    if not runners:
        return list(rows.values())
    sampler = timing.CpuSampler() if case.measure == "overhead" else sampler_of(settings)
    if peak:
        runners += [_matmul(peak["peak_dtype"], settings.device), _copy(settings.device)]
    series = timing.interleave(
        runners, samples=settings.samples, seconds=settings.seconds, set_threads=set_threads,
        sampler=sampler,
    )  # fmt: skip
    if peak:
        peak |= _raised(peak, series, settings.device)  # for the cases that follow as well
    for name, one in series.items():
        rows[name] |= _times(one, settings, rows[name], peak)
        mine = "ours+graph" if name.endswith("+graph") and name != "ours+graph" else "ours"
        if name != mine and mine in series:  # graphs against ours as a graph
            rows[name] |= _against(series[mine], one)
    for name in series if settings.memory and settings.device == "cpu" else ():
        found = memory_row(case, problem, direction, settings, name)
        rows[name] |= {k: found[k] for k in ("peak_mib", "kept_mib") if k in found}
        if "error" in found:
            rows[name]["memory_error"] = found["error"]
    return list(rows.values())


def _ready(page, name, problem, direction, settings, draw, row) -> Contender:
    """The contender after its first call and its check; what is found goes into the row."""
    plain = name.removesuffix("+graph")
    one = contender(page, plain, problem, direction, settings.backends[0], draw)
    peer = one.peer
    if peer.differs:
        row["differs"] = peer.differs
    if peer.note:
        row["note"] = peer.note(one.operands)
    start = time.perf_counter()
    result = one.result()
    if settings.device == "cuda":
        torch.cuda.synchronize()
    row["first_call_ms"] = round((time.perf_counter() - start) * 1e3, 3)
    if settings.device == "cuda":
        del result
        peak, kept = memory.cuda_peak_mib(one.run)
        row |= {"peak_mib": round(peak, 2), "kept_mib": round(kept, 2)}
    if name != plain:
        one = replace(captured(one), name=name)
    if settings.device == "cuda":
        result = one.result()
    if peer.checked:
        mine = peer.problem(problem)
        parts = peer.expected(mine, settings.device) if peer.expected else None
        errors, wrong = check.problems_in(result, page, mine, settings.device, parts)
        if wrong:
            row["error"] = "wrong result: " + "; ".join(wrong)
        row["errors"] = errors
    return one


def _against(ours: timing.Series, peer: timing.Series) -> dict:
    low, middle, high = timing.ratio(ours, peer)
    found = {"ours_over_this": round(middle, 4), "ratio": "median of rounds"}
    if math.isfinite(low):
        found |= {"ours_over_this_p20": round(low, 4), "ours_over_this_p80": round(high, 4)}
    mine, theirs = (timing.spread(list(s.used.values()))[1] for s in (ours, peer))
    return found | {"ours_minus_this_us": round((mine - theirs) * 1e6, 3)}


def _times(series: timing.Series, settings: Settings, row: dict, peak: dict) -> dict:
    low, middle, high = timing.spread(list(series.used.values()))
    found = {
        "median_ms": round(middle * 1e3, 5),
        "p20_ms": round(low * 1e3, 5),
        "p80_ms": round(high * 1e3, 5),
        "samples": len(series.used),
        "dropped": len(series.disturbed) if series.filtered else 0,
        "disturbed": not series.filtered,  # too few clean samples: these include disturbed ones
        "delay_measured": settings.device == "cpu" and timing.run_delay_ns() is not None,
        "calls_per_sample": series.repeats,
    }
    if settings.device == "cuda":
        found |= {"cold_cache": settings.cold}
    if "flops" in row and peak:
        found |= {
            "peak_tflops": round(peak["peak_tflops"], 4),
            "peak_gbps": round(peak["copy_gbps"], 3),
            "tflops": round(row["flops"] / middle / 1e12, 4),
            "gbps": round(row["least_bytes"] / middle / 1e9, 3),
            "share_of_matmul": round(row["flops"] / middle / 1e12 / peak["peak_tflops"], 4),
            "share_of_copy": round(row["least_bytes"] / middle / 1e9 / peak["copy_gbps"], 4),
        }
    return found


def _judge(rows: list[dict], goals: list[Goal], measure: str) -> None:
    """Write target and target_met into a goal's row: its fastest peer's, of the plain calls and of
    the CUDA graphs; or ours for memory."""
    ours = rows[0]
    if measure == "memory":
        for goal in goals:
            ours["target"] = goal.at_most
            if "peak_mib" in ours:
                ours["target_met"] = ours["peak_mib"] <= goal.at_most
        return
    for goal, way in itertools.product(goals, ("", "+graph")):
        peers = [r for r in rows if r["contender"] in {f"{peer}{way}" for peer in goal.peers}]
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
