"""python -m bench: run | report | compare | profile | list | table, each a page of its own."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from lam_kernels.user_error import UserError

from . import compare, profile, record, report, request, run
from .cases import SECTIONS, SETS, select

_EPILOG = """\
the three questions
  What does attention cost with these kernels, and with what I would use otherwise?
      python -m bench run --workload 4,8,512,512,64
  Can I trust the number, and what does it look like?
      python -m bench report
  What is there to ask?
      python -m bench list

`python -m bench COMMAND --help` shows examples and how to read what is printed.
"""


def _parser() -> argparse.ArgumentParser:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        prog="python -m bench",
        description="Side-by-side measurements of attention: checked, interleaved, with spread.",
        epilog=_EPILOG,
        formatter_class=raw,
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    measuring = commands.add_parser(
        "run", help="measure", description="Measure cases side by side.", epilog=request.EPILOG,
        formatter_class=raw,
    )  # fmt: skip
    request.add_arguments(measuring)
    measuring.set_defaults(do=run.run)

    comparing = commands.add_parser(
        "compare", help="what got faster or slower between two runs, or since a commit",
        description="What of ours got faster or slower, with the noise taken into account.",
        epilog=compare.EPILOG, formatter_class=raw,
    )  # fmt: skip
    compare.add_arguments(comparing)
    request.add_arguments(comparing)
    comparing.set_defaults(do=compare.compare)

    reporting = commands.add_parser(
        "report", help="plots, one HTML page, the README's table",
        description="Plots and one page from a results file.", epilog=report.EPILOG,
        formatter_class=raw,
    )  # fmt: skip
    report.add_arguments(reporting)
    reporting.set_defaults(do=report.report)

    profiling = commands.add_parser(
        "profile", help="where a training step's time goes, before and after the fused ops",
        description="A training step, before and after the fused ops.", epilog=profile.EPILOG,
        formatter_class=raw,
    )  # fmt: skip
    profile.add_arguments(profiling)
    profiling.set_defaults(do=profile.profile)

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

    listing = commands.add_parser("list", help="cases, workloads and peers by name")
    listing.add_argument("--set", choices=SETS, help="default: all but smoke")
    listing.set_defaults(do=_list)

    one = commands.add_parser("_memory")  # the fresh process of memory.py
    one.add_argument("arguments")
    one.set_defaults(do=_memory)
    return parser


def main(argv: list[str] | None = None) -> int:
    """Exit code 0; 1 when ours failed somewhere; 2 and a sentence on stderr for a bad request."""
    args = _parser().parse_args(argv)
    args.argv = argv
    try:
        return args.do(args)
    except BrokenPipeError:  # the reader of our output, `head` for example, has seen enough
        sys.stdout = None
        return 141
    except (ValueError, OSError, UserError) as error:  # OSError: a path that cannot be used
        print(f"bench: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


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
    from . import ops

    chosen = {
        case.name: case
        for name in ([args.set] if args.set else [s for s in SETS if s != "smoke"])
        for case in select(name)
    }
    for section, title in SECTIONS.items():
        found = [case for case in chosen.values() if case.section == section]
        if found:
            print(f"\n{title}")
        for case in found:
            why_not = case.why_not or ops.missing(case.op)
            peers = "the usual peers" if case.peers is None else ", ".join(case.peers)
            cells = f"{','.join(case.dtypes)} {','.join(case.directions)} against {peers}"
            if why_not:
                label, cells = case.op, f"not now: {why_not}"
            else:
                page = ops.page(case.op)
                label = page.label(page.Problem(**case.problem))
            print(f"  {case.name:<24}{label}\n{'':26}{cells}; sets: {', '.join(case.sets)}")
    for op in ops.NAMES:
        if not ops.missing(op):
            print(f"\ncontenders of {op}")
            for name, peer in ops.page(op).PEERS.items():
                print(f"  {name:<20}{peer.what}")
    return 0


def _memory(args: argparse.Namespace) -> int:
    from . import memory

    print(json.dumps(memory.measure_here(*json.loads(args.arguments))))
    return 0


if __name__ == "__main__":
    sys.exit(main())
