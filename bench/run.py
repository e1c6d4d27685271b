"""The run command: a request -> jobs -> rows in a file and lines on the screen."""

from __future__ import annotations

import argparse
import math
import subprocess
import sys
import time

from . import lines, record, request
from .cases import DIRECTIONS, DTYPES, Case


def run(args: argparse.Namespace) -> int:
    with record.shared_references():
        return _run_here_or_apart(args)


def _run_here_or_apart(args: argparse.Namespace) -> int:
    chosen = request.chosen_cases(args)
    allocators = request.words(args.allocator, record.ALLOCATORS, "--allocator")
    asked = (args.case, args.workload, args.op, args.quick)
    both = args.device == "cpu" and args.set != "smoke" and not any(asked)
    if allocators is None:
        allocators = list(record.ALLOCATORS) if both else ["default"]
    elif both and not args.run_id and set(allocators) != set(record.ALLOCATORS):
        args.part = True
    threads = request.threads_of(args.threads)
    for option, value in (("--samples", args.samples), ("--seconds", args.seconds)):
        if value is not None and not 0 < value < math.inf:
            raise ValueError(f"{option} must be more than 0 and finite, got {value}")
    if args.device == "cpu" and (args.graph or args.warm_cache):
        raise ValueError("--graph and --warm-cache need --device cuda")
    if allocators != [record.allocator_of()]:
        return _run_apart(args, allocators)
    return _measure(args, chosen, allocators[0], threads)


_CHANGES_A_SET = (
    "case", "workload", "op", "dtype", "direction", "peer", "backend", "batch", "samples",
    "seconds", "warm_cache", "part",
)  # fmt: skip


def _measure(args, chosen: list[Case], allocator: str, threads: list[int]) -> int:
    dtypes = request.words(args.dtype, DTYPES, "--dtype")
    directions = request.words(args.direction, DIRECTIONS, "--direction")

    from . import measure  # torch from here on

    request.check_device(args.device)
    backends = request.backends_of(args.backend, args.device)
    peers = None
    if args.peer is not None:
        peers = request.words(
            "" if args.peer == "none" else args.peer, request.peer_names(chosen), "--peer"
        )
    samples, seconds = (31, 25.0) if args.full else (5, 3.0) if args.quick else (7, 4.0)
    if args.set == "overview" and not args.full:
        seconds = 2.0
    # anything but a whole set as it is meant: no report of that set may be made from it
    partial = args.threads != "2" or any(getattr(args, name) for name in _CHANGES_A_SET)
    path = None if args.no_save else args.results or record.default_path(args.device)
    if path:
        record.check_writable(path)
    jobs = [
        (case, dtype, direction, count)
        for count in threads
        for case in chosen
        for dtype in (dtypes or case.dtypes)
        for direction in (directions if request.is_free(case) and directions else case.directions)
        if not directions or direction in directions
    ]
    if not jobs:
        raise ValueError("nothing to do: no chosen case has that direction")
    settings = measure.Settings(
        samples=args.samples or samples,
        seconds=args.seconds or seconds,
        threads=threads[0],
        allocator=allocator,
        backends=backends,
        device=args.device,
        peers=peers,
        graph=args.graph,
        cold=not args.warm_cache,
        memory=args.memory,
    )
    facts = record.facts(args.device) | {
        "run": args.run_id or new_run_id(),
        "set": "part" if partial else args.set + ("-quick" if args.quick else ""),
        "asked_samples": settings.samples,
        "asked_seconds": settings.seconds,
    }
    print(lines.headline(facts, settings), flush=True)
    failed = False
    peak: dict[tuple, dict] = {}
    for case, dtype, direction, count in jobs:
        settings.threads = count
        rows = []
        if case.measure != "memory" and (dtype, count) not in peak:
            peak[dtype, count] = measure.peaks(dtype, settings)
            rows.append(_peak_row(peak[dtype, count], dtype, settings))
            print(lines.describe_peaks(rows[0]), flush=True)
        rows += measure.measure(case, dtype, direction, settings, peak.get((dtype, count), {}))
        failed |= any(_our_failure(row) for row in rows)
        print(lines.describe([row for row in rows if row["measure"] != "peaks"]), flush=True)
        if path:
            record.append(path, [facts | row for row in rows])
    if path:
        print(f"\n{path}\nrun {facts['run']}", flush=True)
    return 1 if failed else 0


# the front door's answers: the op says that it does not serve this, which is no failure of a kernel
_REFUSALS = ("ValueError", "TypeError", "RuntimeError: backend=", "RuntimeError: no backend serves")


def _our_failure(row: dict) -> bool:
    return (
        row["contender"].startswith("ours")
        and "error" in row
        and not row["error"].startswith(_REFUSALS)
    )


def _peak_row(peak: dict, dtype: str, settings) -> dict:
    return {
        "case": "peaks", "section": "peaks", "measure": "peaks", "contender": "torch",
        "dtype": dtype, "threads": settings.threads, "allocator": settings.allocator,
        "device": settings.device, **peak,
    }  # fmt: skip


def new_run_id() -> str:
    return time.strftime("%Y%m%dT%H%M%SZ", time.gmtime())


def _run_apart(args: argparse.Namespace, allocators: list[str]) -> int:
    """The same request for each allocator, in a process of its own: glibc reads it at start."""
    given = args.argv if getattr(args, "argv", None) is not None else sys.argv[1:]
    command = [sys.executable, "-m", "bench", *given, "--run", args.run_id or new_run_id()]
    if args.results:
        command += ["--results", str(args.results.resolve())]
    if args.part:
        command.append("--part")
    code = 0
    for allocator in allocators:
        done = subprocess.run(
            [*command, "--allocator", allocator],
            env=record.environment_for(allocator),
            cwd=record.tree(),
        )
        if done.returncode not in (0, 1):
            return done.returncode
        code = max(code, done.returncode)
    return code
