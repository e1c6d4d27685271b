"""One page an op: all that the bench knows about it. A page is a module with

    Problem                         frozen dataclass: B and dtype among its fields, .but(**changes),
                                    and a repr that Problem.parse reads back
    EXAMPLE                         keyword -> value: a call; what it has beside B, H, Lq, Lk, D is
                                    the default of `--workload B,H,Lq,Lk,D`
    OUTPUTS                         names of what a call returns
    draw(problem, device)           operands
    arguments(operands)             what a contender's call gets, in order
    leaves(operands)                name -> tensor that requires a gradient
    grad_outs(operands)             gradient of each output
    expected(problem, device)       list of check.Expected: the reference's results in float64
    score_size(problem)             factor of check.py's bounds, 1 where scores are small
    flops(problem, direction)       of visible pairs
    least_bytes(problem, direction)
    label(problem)                  one line
    tiny(problem)                   a small problem of the same kind, to warm up with
    PEERS                           name -> contender.Peer; "ours" is one of them
    usual_peers(problem, device, direction)    the peers of a workload where none is named

The generic part (timing, checking, memory, rows) reads nothing else of an op.
"""

from __future__ import annotations

import importlib
import importlib.util
from types import ModuleType

# every public op, whether this version of the package has it or not
NAMES = (
    "masked_attention",
    "global_local_attention",
    "map_gated_attention",
    "score_masked_attention",
    "window_attention",
    "prefix_gated_attention",
)


def page(op: str) -> ModuleType:
    """The op's page. ValueError says why there is none."""
    why = missing(op)
    if why:
        raise ValueError(why)
    return importlib.import_module(f"bench.ops.{op}")


def missing(op: str) -> str:
    """Why nothing can be measured for this op, "" when it can."""
    import lam_kernels

    if op not in NAMES:
        return f"there is no op {op!r}: the ops are {', '.join(NAMES)}"
    if not hasattr(lam_kernels, op):
        return f"lam_kernels.{op} is not part of this version"
    if importlib.util.find_spec(f"bench.ops.{op}") is None:
        return f"the bench has no page of {op} yet (bench/ops/{op}.py)"
    return ""
