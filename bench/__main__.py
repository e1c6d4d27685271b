"""python -m bench: run | table | list."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

from . import record
from .cases import DIRECTIONS, DTYPES, SECTIONS, SETS, select

_EPILOG = """\
examples
  python -m bench run
      the whole set under both allocator settings (what `make bench` does, about 5 minutes);
      --full takes more samples (10 to 15 minutes), --quick fewer cases and samples (2 minutes)
  python -m bench run --case dense-L197 --dtype fp32 --samples 5
      one case while tuning a kernel: starts in seconds
  python -m bench run --case dense-L4096 --peer none
      ours alone, no peer to wait for
  python -m bench run --case 'toeplitz*' --peer blocks64_compile --allocator kept
  python -m bench list
      the cases and peers by name
  python -m bench table
      the README's table from the newest results file

how to read a line
  ours/this 0.74 (0.72 .. 0.77)
      our time divided by that contender's: ratio of medians, and the 20 and 80 percentiles of the
      ratios within one round of samples; below 1 we are faster
  target 0.65 NOT reached
      the ratio that the project holds itself to
  9 samples, 2 dropped
      2 more were taken while other work kept our threads from running; ~ before a time: too few
      samples without other load, all were used
  80% of mm
      useful FLOPs a second / those of torch.mm in this dtype, measured in this run

Every contender's results, gradients included, are compared with the float64 reference before its
time is printed. Each measurement is one line of JSON in bench/results/<date>-<processor>.jsonl
(--no-save: none). Memory is measured in a fresh process for each contender.
"""


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m bench",
        description="Side-by-side measurements of attention.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    commands = parser.add_subparsers(dest="command", required=True)

    run = commands.add_parser(
        "run", help="measure", epilog=_EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = run.add_argument
    add("--set", choices=SETS, default="foundation", help="which cases (default: foundation)")
    add("--case", action="append", metavar="NAME", help="name, part of it, or glob; repeatable")
    cells = "comma-separated (default: those of each case), of "
    add("--dtype", help=cells + ",".join(DTYPES))
    add("--direction", help=cells + ",".join(DIRECTIONS))
    add("--peer", help="comma-separated (default: those of each case); none: ours alone")
    add("--threads", type=int, default=2, help="default 2")
    add("--allocator", help="comma-separated, of default,kept: glibc as it is; glibc told to keep "
        "its memory (default: both; with --case or --quick: default)")  # fmt: skip
    add("--backend", default="cpu", help="of ours; never falls back to another one (default: cpu)")
    add("--samples", type=int, help="clean samples of each contender (7; --full 31, --quick 5)")
    add("--seconds", type=float, help="most for the samples of a case (4; --full 25, --quick 3)")
    size = run.add_mutually_exclusive_group()
    size.add_argument("--quick", action="store_true", help="fewer cases and samples")
    size.add_argument("--full", action="store_true", help="more samples")
    add("--results", type=Path, help="file to append to (bench/results/<date>-<processor>.jsonl)")
    add("--no-save", action="store_true", help="print only")
    add("--run", dest="run_id", help=argparse.SUPPRESS)
    run.set_defaults(do=_run)

    table = commands.add_parser("table", help="markdown table from a results file")
    table.add_argument("--results", type=Path, help="default: the newest in bench/results")
    table.add_argument(
        "--run", dest="run_id", help="id (default: the file's last run of a whole set)"
    )
    table.add_argument("--output", type=Path, help="write there instead of printing")
    table.add_argument("--brief", action="store_true", help="one line a comparison with a target")
    table.add_argument(
        "--into", type=Path, help="replace what stands between bench:begin and bench:end of a file"
    )
    table.set_defaults(do=_table)

    listing = commands.add_parser("list", help="cases and peers by name")
    listing.add_argument("--set", choices=SETS, default="foundation")
    listing.set_defaults(do=_list)

    one = commands.add_parser("_memory")  # the fresh process of memory.py
    one.add_argument("arguments")
    one.set_defaults(do=_memory)
    return parser


def main(argv: list[str] | None = None) -> int:
    """Exit code 0; 1 when ours failed somewhere; 2 and a sentence on stderr for a bad request."""
    args = _parser().parse_args(argv)
    try:
        return args.do(args)
    except (ValueError, FileNotFoundError) as error:
        print(f"bench: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


def _words(text: str | None, allowed, option: str) -> list[str] | None:
    if text is None:
        return None
    words = [word for word in text.split(",") if word]
    for word in words:
        if word not in allowed:
            raise ValueError(f"{option} {word!r}: expected some of {', '.join(allowed)}")
    return words


def _run(args: argparse.Namespace) -> int:
    with record.shared_references():
        return _run_here_or_apart(args)


def _run_here_or_apart(args: argparse.Namespace) -> int:
    chosen = select(args.set, args.quick, args.case)
    allocators = _words(args.allocator, record.ALLOCATORS, "--allocator")
    if allocators is None:
        allocators = ["default"] if args.case or args.quick else list(record.ALLOCATORS)
    if args.threads < 1 or (args.samples is not None and args.samples < 1):
        raise ValueError("--threads and --samples must be at least 1")
    if allocators != [record.allocator_of()]:
        return _run_apart(args, allocators)

    dtypes = _words(args.dtype, DTYPES, "--dtype")
    directions = _words(args.direction, DIRECTIONS, "--direction")

    from . import baselines, measure  # torch from here on

    peers = None
    if args.peer is not None:
        peers = _words("" if args.peer == "none" else args.peer, baselines.PEERS, "--peer")
    _check_backend(args.backend)
    samples, seconds = (31, 25.0) if args.full else (5, 3.0) if args.quick else (7, 4.0)
    settings = measure.Settings(
        samples=args.samples or samples,
        seconds=args.seconds or seconds,
        threads=args.threads,
        allocator=allocators[0],
        backend=args.backend,
        peers=peers,
    )
    facts = record.facts()
    partial = bool(args.case or args.dtype or args.direction or args.peer)
    facts |= {
        "run": args.run_id or _new_run_id(),
        "set": "part" if partial else args.set + ("-quick" if args.quick else ""),
        "asked_samples": settings.samples,
        "asked_seconds": settings.seconds,
    }
    path = None if args.no_save else args.results or record.default_path()
    failed = False
    peak: dict[str, dict] = {}
    print(_headline(facts, settings), flush=True)
    jobs = [
        (case, dtype, direction)
        for case in chosen
        for dtype in (dtypes or case.dtypes)
        for direction in case.directions
        if not directions or direction in directions
    ]
    if not jobs:
        raise ValueError("nothing to do: no chosen case has that direction")
    for case, dtype, direction in jobs:
        if case.measure != "memory" and dtype not in peak:
            peak[dtype] = measure.peaks(dtype, args.threads)
            row = facts | {
                "case": "peaks", "section": "peaks", "measure": "peaks", "contender": "torch",
                "dtype": dtype,
                "threads": args.threads, "allocator": settings.allocator, **peak[dtype],
            }  # fmt: skip
            if path:
                record.append(path, [row])
            print(
                f"\n{dtype}: torch.mm {peak[dtype]['matmul_tflops']:.3f} TFLOP/s, "
                f"copy {peak[dtype]['copy_gbps']:.1f} GB/s",
                flush=True,
            )
        rows = [
            facts | row
            for row in measure.measure(case, dtype, direction, settings, peak.get(dtype, {}))
        ]
        failed |= "error" in rows[0]
        print(describe(rows), flush=True)
        if path:
            record.append(path, rows)
    if path:
        print(f"\n{path}", flush=True)
    return 1 if failed else 0


def _new_run_id() -> str:
    return time.strftime("%Y%m%dT%H%M%SZ", time.gmtime())


def _run_apart(args: argparse.Namespace, allocators: list[str]) -> int:
    """The same request for each allocator, in a process of its own: glibc reads it at start."""
    command = [sys.executable, "-m", "bench", *sys.argv[1:], "--run", args.run_id or _new_run_id()]
    if args.results:
        command += ["--results", str(args.results.resolve())]
    code = 0
    for allocator in allocators:
        done = subprocess.run(
            [*command, "--allocator", allocator],
            env=record.environment_for(allocator),
            cwd=record.ROOT.parent,
        )
        if done.returncode not in (0, 1):
            return done.returncode
        code = max(code, done.returncode)
    return code


def _check_backend(name: str) -> None:
    from lam_kernels import backends

    reason = backends().get(name, "there is no such backend")
    if reason:
        raise ValueError(f"backend {name!r}: {reason}")


def _headline(facts: dict, settings) -> str:
    return (
        f"{facts['machine']} ({facts['level']}, kernels at {facts['kernel_level']}), "
        f"{settings.threads} threads, allocator {settings.allocator}, torch {facts['torch']}, "
        f"lam_kernels {facts['lam_kernels']}, commit {facts['commit']}, {facts['date']}"
    )


def describe(rows: list[dict]) -> str:
    """The lines that a case prints."""
    head = rows[0]
    lines = [
        f"\n{head['case']}  {head['dtype']} {head['direction']}  {head['label']}  "
        f"[{head['allocator']} allocator]"
    ]
    for row in rows:
        text = f"  {row['contender']:<18}"
        if "error" in row:
            lines.append(text + row["error"])
            continue
        if "peak_mib" in row:
            text += f"{row['peak_mib']:9.1f} MiB peak, {row['kept_mib']:.1f} MiB stay"
        else:
            mark = "~" if row["disturbed"] else " "
            text += (
                f"{mark}{row['median_ms']:9.3f} ms ({row['p20_ms']:.3f} .. {row['p80_ms']:.3f})"
                f"  {row['samples']} samples"
            )
            if row["dropped"]:
                text += f", {row['dropped']} dropped"
            if not row["delay_measured"]:
                text += ", no run-queue delay on this system: nothing dropped"
            if "tflops" in row:
                text += f"  {row['tflops'] * 1e3:.0f} GFLOP/s {row['share_of_matmul']:.0%} of mm"
        if row["measure"] == "overhead" and "ours_minus_this_us" in row:
            text += f"  ours - this {row['ours_minus_this_us']:.1f} us"
        elif "ours_over_this" in row:
            text += f"  ours/this {row['ours_over_this']:.2f}"
            if "ours_over_this_p20" in row:
                text += f" ({row['ours_over_this_p20']:.2f} .. {row['ours_over_this_p80']:.2f})"
        if "target" in row and "target_met" in row:
            text += (
                f"  target {row['target']:g} {'reached' if row['target_met'] else 'NOT reached'}"
            )
        lines.append(text)
    return "\n".join(lines)


def _table(args: argparse.Namespace) -> int:
    from . import table

    path = args.results or record.newest()
    render = table.render_brief if args.brief else table.render
    text = render(record.read(path), args.run_id)
    if args.into:
        args.into.write_text(table.insert(args.into.read_text(), text))
    elif args.output:
        args.output.write_text(text)
    else:
        print(text, end="")
    return 0


def _list(args: argparse.Namespace) -> int:
    from .baselines import PEERS

    for section, title in SECTIONS.items():
        found = [case for case in select(args.set) if case.section == section]
        if found:
            print(f"\n{title}")
        for case in found:
            cells = f"{','.join(case.dtypes)} {','.join(case.directions)}"
            print(f"  {case.name:<24}{case.label}\n{'':26}{cells}"
                  f" against {', '.join(case.peers)}")  # fmt: skip
    print("\npeers")
    for name, peer in PEERS.items():
        print(f"  {name:<20}{peer.what}")
    return 0


def _memory(args: argparse.Namespace) -> int:
    from . import memory

    print(json.dumps(memory.measure_here(*json.loads(args.arguments))))
    return 0


if __name__ == "__main__":
    sys.exit(main())
