"""What a run is asked for: the options of `run`, and the cases that they choose."""

from __future__ import annotations

import argparse
import re
from dataclasses import fields, replace
from pathlib import Path

from .cases import CASES, DIRECTIONS, DTYPES, SETS, Case, select
from .ops import NAMES
from .workloads import WORKLOADS, on_cpu

EPILOG = """\
examples
  python -m bench run
      the overview: what `make bench` does, about 5 minutes
  python -m bench run --workload W8 --direction fwd,both
      one attention call of a real model (ViT-B/16) beside what one would use instead;
      `python -m bench list` shows all of W1 to W22
  python -m bench run --workload 4,8,512,512,64 --multiplier b1qk --dtype fp32,bf16 --memory
      YOUR sizes B,H,Lq,Lk,D with a learned mask [B,1,L,L], and the peak memory of each contender
  python -m bench run --workload 1,8,4096,4096,64 --bias 1h1k --pattern 'Toeplitz(64)'
      a local pattern against PyTorch blocked by hand
  python -m bench run --case length-L1024 --peer none --backend cpu,reference --samples 5
      ours alone while tuning a kernel: starts in seconds
  python -m bench run --case 'toeplitz*' --peer blocks64_compile --allocator kept --threads 1,2
  python -m bench run --set foundation
      the held targets of the first milestone under both allocators (8 minutes; --full 15)
  python -m bench run --set gpu --device cuda --graph
      what a CUDA machine is asked, plain calls and CUDA graphs side by side

how to read a line
  ours/this 0.74 (0.72 .. 0.77)
      our time divided by that contender's: median, 20 and 80 percentiles of the ratios within one
      round of samples (no spread: fewer than three rounds in common); below 1 we are faster. A
      contender as a CUDA graph is compared with ours as one
  target 0.65 NOT reached
      the ratio that the project holds itself to
  9 samples, 2 dropped
      2 more were taken while other work kept our threads from running; ~ before a time: fewer than
      3 samples without other load, all were used
  80% of mm, 31% of copy
      useful FLOPs a second / those of torch.mm (in this dtype or, on a CPU, in fp32: the faster
      one), and bytes that have to move a second / those of a large copy, all measured in this run:
      the larger share is what bounds the call
  first call 5.1 s
      where it took over a second more: compiling, which is in no other figure
  [mask added]
      the contender computes something else than asked, because it cannot do that: what

Every contender's results, gradients included, are compared with the float64 reference before its
time is printed; one that is wrong, fails or does not exist is a row that says so. Each measurement
is one line of JSON in bench/results/<date>-<processor>.jsonl (--no-save: none). The exit code is 1
when ours was wrong or failed, 2 for a request that makes no sense.
"""


def add_arguments(run: argparse.ArgumentParser) -> None:
    what = run.add_argument_group("what is measured")
    what.add_argument("--set", choices=SETS, default="overview", help="default: overview")
    what.add_argument("--case", action="append", metavar="NAME",
                      help="name, part of it, or glob; repeatable")  # fmt: skip
    what.add_argument("--workload", action="append", metavar="W",
                      help="W1 .. W22 (comma-separated), B,H,Lq,Lk,D, or 'Problem(...)'; "
                      "repeatable")  # fmt: skip
    what.add_argument("--op", help="only cases of these ops, comma-separated; with --workload "
                      "B,H,Lq,Lk,D the op to call (default there: masked_attention)")  # fmt: skip
    given = run.add_argument_group("with --workload B,H,Lq,Lk,D")
    given.add_argument("--multiplier", metavar="AXES", help="b1qk: a letter where an axis is full, "
                       "1 where it broadcasts; none (default: b1qk if no --bias; none for other "
                       "ops)")  # fmt: skip
    given.add_argument("--bias", metavar="AXES", help="the same for the added mask (default: none; "
                       "of window_attention: 1hqk)")  # fmt: skip
    given.add_argument("--pattern", help="for example 'Toeplitz(64) & Causal()' (default: none; of "
                       "ops with a local half: Toeplitz(15))")  # fmt: skip
    given.add_argument("--key-mask", action="store_true", help="padded keys")
    how = run.add_argument_group("how")
    cells = "comma-separated (default: those of each case), of "
    how.add_argument("--dtype", help=cells + ",".join(DTYPES) + "; workloads in fp16 are measured "
                     "in bf16 on a CPU unless this says fp16")  # fmt: skip
    how.add_argument("--direction", help=cells + ",".join(DIRECTIONS))
    how.add_argument("--peer", help="comma-separated (default: those of each case); none: ours "
                     "alone; `python -m bench list` shows all")  # fmt: skip
    how.add_argument("--backend", help="of ours, comma-separated, each a contender; none falls back"
                     " (default: cpu; on CUDA all that are there)")  # fmt: skip
    how.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    how.add_argument("--threads", default="2", help="comma-separated (default: 2)")
    how.add_argument("--allocator", help="comma-separated, of default,kept: glibc as it is; glibc "
                     "told to keep its memory (default: both for a whole set, else default)"
                     )  # fmt: skip
    how.add_argument("--batch", help="of workloads: a number, or full (default on a CPU: halved "
                     "until a call has 2^24 pairs)")  # fmt: skip
    how.add_argument("--memory", action="store_true",
                     help="also the peak memory of each contender, in fresh processes")  # fmt: skip
    how.add_argument("--graph", action="store_true", help="CUDA: CUDA graphs as further contenders")
    how.add_argument("--warm-cache", action="store_true",
                     help="CUDA: leave operands in the level-2 cache")  # fmt: skip
    how.add_argument("--samples", type=int,
                     help="clean samples of each contender (7; --full 31, --quick 5)")  # fmt: skip
    how.add_argument("--seconds", type=float,
                     help="most for the samples of a case (4; overview 2, --full 25, --quick 3)"
                     )  # fmt: skip
    size = how.add_mutually_exclusive_group()
    size.add_argument("--quick", action="store_true", help="fewer cases and samples")
    size.add_argument("--full", action="store_true", help="more samples")
    where = run.add_argument_group("where results go")
    where.add_argument("--results", type=Path,
                       help="file to append to (bench/results/<date>-<processor>.jsonl)"
                       )  # fmt: skip
    where.add_argument("--no-save", action="store_true", help="print only")
    where.add_argument("--run", dest="run_id", help=argparse.SUPPRESS)
    where.add_argument("--part", action="store_true", help=argparse.SUPPRESS)  # no whole set


def words(text: str | None, allowed, option: str) -> list[str] | None:
    """The comma-separated words of an option; ValueError for one that is not allowed."""
    if text is None:
        return None
    found = [word for word in text.split(",") if word]
    for word in found:
        if word not in allowed:
            raise ValueError(f"{option} {word!r}: expected some of {', '.join(allowed)}")
    return found


def threads_of(text: str) -> list[int]:
    if not re.fullmatch(r"[0-9]{1,4}(,[0-9]{1,4})*", text) or 0 in (
        found := [int(n) for n in text.split(",")]
    ):
        raise ValueError(f"--threads {text!r}: expected numbers from 1 to 9999, comma-separated")
    return found


def chosen_cases(args: argparse.Namespace) -> list[Case]:
    """The cases of --case and --workload, else of the set; those of --op."""
    ops = words(args.op, NAMES, "--op")
    chosen: list[Case] = []
    if args.case:
        chosen += select(args.set, args.quick, args.case)
    for text in args.workload or ():
        chosen += _workload_cases(text, args, ops)
    if not chosen:
        chosen = select(args.set, args.quick)
    if args.device == "cpu" or args.batch:
        chosen = [_with_batch(case, args.batch) for case in chosen]
    if args.device == "cpu" and not args.dtype:
        chosen = [_in_cpu_dtypes(case) for case in chosen]
    if ops:
        chosen = [case for case in chosen if case.op in ops]
        if not chosen:
            raise ValueError(f"no chosen case is of {', '.join(ops)}")
    return chosen


def _workload_cases(text: str, args, ops: list[str] | None) -> list[Case]:
    if re.fullmatch(r"\d+(,\d+)*", text):
        sizes = [int(n) for n in text.split(",")]
        if len(sizes) != 5:
            raise ValueError(f"--workload {text!r}: expected five numbers B,H,Lq,Lk,D")
        op = ops[0] if ops else "masked_attention"
        problem = dict(zip(_SIZES, sizes, strict=True)) | _options(args, op)
        return [_given("given-" + "x".join(map(str, sizes)), op, problem)]
    if text.startswith("Problem("):
        return [_parsed(text, ops[0] if ops else "masked_attention")]
    cases = []
    for name in text.split(","):
        wanted = name.upper() if "-" not in name else name
        found = [
            case for case in CASES.values()
            if case.section == "workloads" and (case.name == wanted or
                                                case.name.partition("-")[0] == wanted)
        ]  # fmt: skip
        if not found:
            raise ValueError(
                f"--workload {name!r}: expected W1 to W{len(WORKLOADS)}, B,H,Lq,Lk,D or "
                "'Problem(...)'; `python -m bench list --set workloads` shows them"
            )
        cases += found
    return cases


_SIZES = ("B", "H", "Lq", "Lk", "D")


def _options(args, op: str) -> dict:
    """What a problem has beside its sizes: the given options, else those of the op's example."""
    from . import ops as pages

    if pages.missing(op):
        return {}
    page = pages.page(op)
    given = {name: getattr(args, name) for name in ("multiplier", "bias", "pattern")}
    for name in ("multiplier", "bias"):
        axes = given[name]
        if axes not in (None, "none") and not re.fullmatch("[b1][h1][q1][k1]", axes):
            raise ValueError(
                f"--{name} {axes!r}: expected none, or bhqk with a 1 where an axis broadcasts"
            )
    given = {name: value for name, value in given.items() if value}
    if args.key_mask:
        given["key_mask"] = True
    known = {field.name for field in fields(page.Problem)}
    for name in given:
        if name not in known:
            raise ValueError(f"--{name.replace('_', '-')}: {op} has no such operand")
    if args.pattern and not args.pattern.startswith("Windows("):  # which needs the sizes
        _check_pattern(args.pattern)
    usual = {name: value for name, value in page.EXAMPLE.items() if name not in _SIZES}
    if "bias" in given:
        usual.pop("multiplier", None)
    return {name: value for name, value in (usual | given).items() if value != "none"}


def _check_pattern(text: str) -> None:
    import torch

    from python_ref.inputs import Problem, draw_pattern

    try:
        draw_pattern(Problem(B=1, H=1, Lq=1, Lk=1, D=1, pattern=text), torch.Generator())
    except (SyntaxError, TypeError, ValueError) as error:
        raise ValueError(f"--pattern {text!r}: {error}") from None


def _given(name: str, op: str, problem: dict, dtypes: tuple[str, ...] = ("fp32", "bf16")) -> Case:
    return Case(name, "given", problem, None, dtypes=dtypes, op=op, sets=())


def _parsed(text: str, op: str) -> Case:
    """'Problem(...)', as failing tests and results files print it."""
    from . import ops as pages

    try:
        parsed = pages.page(op).Problem.parse(text)
    except (SyntaxError, TypeError, ValueError) as error:
        raise ValueError(f"--workload: not a problem of {op} ({error}): {text}") from None
    problem = {name: value for name, value in vars(parsed).items() if name != "dtype"}
    dtypes = tuple(short for short, name in DTYPES.items() if name == parsed.dtype)
    return _given("given", op, problem, dtypes or ("fp32",))


def is_free(case: Case) -> bool:
    """Whether any direction makes sense: problems that hold no targets."""
    return case.measure == "time" and case.section in ("workloads", "given", "lengths", "patterns")


def _with_batch(case: Case, batch: str | None) -> Case:
    if case.section != "workloads" or not case.problem or batch == "full":
        return case
    if batch is None:
        return replace(case, problem=on_cpu(case.problem))
    if not re.fullmatch(r"[1-9]\d*", batch):
        raise ValueError(f"--batch {batch!r}: expected a number or full")
    return replace(case, problem=case.problem | {"B": int(batch)})


def _in_cpu_dtypes(case: Case) -> Case:
    """bf16 for fp16: plain PyTorch's fp16 takes seconds a call on most processors."""
    if case.section != "workloads":
        return case
    dtypes = dict.fromkeys("bf16" if name == "fp16" else name for name in case.dtypes)
    return replace(case, dtypes=tuple(dtypes))


def peer_names(chosen: list[Case]) -> list[str]:
    from . import ops as pages

    names: list[str] = []
    for op in dict.fromkeys(case.op for case in chosen):
        if not pages.missing(op):
            names += [name for name in pages.page(op).PEERS if name not in names]
    return names


def check_device(device: str) -> None:
    import torch

    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: this torch sees no CUDA device")


def backends_of(text: str | None, device: str) -> tuple[str, ...]:
    from lam_kernels import backends
    from lam_kernels.ops._backends import DEVICE_BACKENDS

    known, served = backends(), (*DEVICE_BACKENDS[device], "reference")
    if text is None:
        there = [name for name in DEVICE_BACKENDS[device] if not known[name]]
        return tuple(there) or DEVICE_BACKENDS[device][:1]
    found = [name for name in text.split(",") if name]
    for name in found:
        reason = known.get(name, "there is no such backend")
        if not reason and name not in served:
            reason = f"on {device} tensors it is only interpreted, and such a time means nothing"
        if reason:
            raise ValueError(f"backend {name!r}: {reason}")
    if not found:
        raise ValueError("--backend names nothing")
    return tuple(found)
