"""No time is printed before the results are right: each contender against python_ref in float64.

Problems of more than 2^24 pairs are compared on a slice that still covers every operand's gradient:
64 rows of all heads (out, dquery, the rows of a mask's gradient, which sums over heads and batch),
and one whole head (dkey, dvalue, a column bias' gradient).

Bounds on |result - reference| / |reference| (Euclidean norms over a tensor):

    half types  4 eps   rounding P and dS to the storage dtype costs plain PyTorch up to 1 eps
                        (bf16 eager's dM: 7.0e-3 = 0.9 eps)
    fp32       64 eps   roundings of a sum of 4096 terms, the longest here, grow like sqrt(4096)

and eight times that for the worst row against the largest one: a wrong row cannot hide among many.
The tests hold our kernels to far tighter bounds (tests/tolerance.py).
"""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

from python_ref.inputs import Operands, Problem, draw_pattern
from python_ref.masked_attention import masked_attention as reference_attention

from . import record

FULL_PAIRS = 2**24
SLICE_ROWS = 64
EPS_FACTOR = {torch.float32: 64, torch.bfloat16: 4, torch.float16: 4, torch.float64: 64}
ROW_FACTOR = 8


@dataclass
class Expected:
    """Part of one output: `values` are the reference's at `index`."""

    name: str  # "out" or an operand, whose gradient it is
    index: tuple
    values: Tensor  # float64


def draw(problem: Problem) -> Operands:
    """The operands without the [B,H,Lq,Lk] booleans that only tests look at."""
    operands = problem.but(pattern=None).operands()  # the pattern's booleans take seconds at L 4096
    operands.problem, operands.pattern = problem, draw_pattern(problem, None)
    operands.visible = operands.seen = None
    return operands


@lru_cache(maxsize=8)
def expected(problem: Problem) -> list[Expected]:
    """The reference's out and gradients in float64, of the whole problem or its slices."""
    if folder := os.environ.get(record.REFERENCES):
        path = Path(folder) / f"{hashlib.sha256(repr(problem).encode()).hexdigest()}.pt"
        if not path.exists():
            torch.save([vars(part) for part in _expected(problem)], path)
        return [Expected(**part) for part in torch.load(path, weights_only=False)]
    return _expected(problem)


def _expected(problem: Problem) -> list[Expected]:
    _warm_up_exp()
    pairs = problem.B * problem.H * problem.Lq * problem.Lk
    if pairs <= FULL_PAIRS:
        return _reference(draw(problem))
    if problem.Hkv != problem.H:
        raise ValueError("a sliced check needs Hkv == H")
    step = max(1, problem.Lq // SLICE_ROWS)
    rows = torch.arange(0, problem.Lq, step)
    rows[-1] = problem.Lq - 1  # both ends, where patterns are cut off
    operands = draw(problem)
    return _reference(operands, rows=rows) + _reference(operands, head=problem.H // 2)


def _reference(
    operands: Operands, rows: Tensor | None = None, head: int | None = None
) -> list[Expected]:
    problem = operands.problem
    everything = slice(None)
    at_row = everything if rows is None else rows
    at_head = everything if head is None else slice(head, head + 1)

    def index(name: str, shape: torch.Size) -> tuple:
        has_rows = name in ("query", "out", "multiplier", "bias") and shape[2] == problem.Lq
        has_heads = shape[1] == problem.H
        return (
            everything,
            at_head if has_heads else everything,
            at_row if has_rows else everything,
        )

    parts, where = {}, {}
    for name in ("query", "key", "value", "multiplier", "bias"):
        tensor = getattr(operands, name)
        if tensor is not None:
            where[name] = index(name, tensor.shape)
            part = tensor.detach()[where[name]].double()
            parts[name] = part.requires_grad_(tensor.requires_grad)
    masks = {name: parts.get(name) for name in ("multiplier", "bias")}
    pattern, attn_mask = operands.pattern, None
    if pattern is not None and rows is not None:
        pattern, attn_mask = None, pattern.dense(problem.Lq, problem.Lk)[rows]
    out = reference_attention(
        parts["query"], parts["key"], parts["value"], **masks, pattern=pattern, attn_mask=attn_mask,
        scale=problem.scale,
    )  # fmt: skip
    where["out"] = index("out", operands.grad_out.shape)
    found = {"out": out.detach()}
    # A slice knows all of a gradient only if it holds every pair that adds to it.
    complete = {
        name: tensor
        for name, tensor in parts.items()
        if tensor.requires_grad
        and (
            rows is None
            or (getattr(operands, name).shape[2] == problem.Lq and name not in ("key", "value"))
        )
        and (head is None or getattr(operands, name).shape[1] == problem.H)
    }
    if complete:
        grad_out = operands.grad_out[where["out"]].double()
        found |= dict(
            zip(complete, torch.autograd.grad(out, list(complete.values()), grad_out), strict=True)
        )
    return [Expected(name, where[name], values) for name, values in found.items()]


def problems_in(result: dict[str, Tensor], problem: Problem) -> tuple[dict[str, float], list[str]]:
    """(relative error of each output, one sentence for each that is wrong)."""
    bound = (
        EPS_FACTOR[getattr(torch, problem.dtype)] * torch.finfo(getattr(torch, problem.dtype)).eps
    )
    errors, wrong = {}, []
    compared = set()
    for part in expected(problem):
        if part.name not in result:
            continue
        compared.add(part.name)
        whole = result[part.name]
        ours = whole.detach()[part.index].double()
        if ours.shape != part.values.shape:
            wrong.append(f"{part.name} has shape {tuple(whole.shape)}")
            continue
        error, worst_row = _relative(ours, part.values)
        errors[part.name] = max(error, errors.get(part.name, 0.0))
        if not error <= bound:
            wrong.append(
                f"{part.name} differs from the reference by {error:.1e}, allowed {bound:.1e}"
            )
        elif not worst_row <= ROW_FACTOR * bound:
            wrong.append(
                f"a row of {part.name} differs by {worst_row:.1e}, allowed {ROW_FACTOR * bound:.1e}"
            )
    for name in result.keys() - compared:
        wrong.append(f"{name} has nothing to be compared with")
    return errors, wrong


def _relative(ours: Tensor, values: Tensor) -> tuple[float, float]:
    difference = ours - values
    if difference.numel() == 0:
        return 0.0, 0.0
    norm, largest = values.norm().item(), values.norm(dim=-1).max().item()
    error, row = difference.norm().item(), difference.norm(dim=-1).max().item()
    tiny = torch.finfo(torch.float64).tiny
    return error / max(norm, tiny), row / max(largest, tiny)


@lru_cache(maxsize=1)
def _warm_up_exp() -> None:
    # torch 2.13: the first float64 exp of a process on a large tensor is now and then wrong by 3e-9
    for _ in range(2):
        torch.exp(torch.zeros(200_000, dtype=torch.float64))
