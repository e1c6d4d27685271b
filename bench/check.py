"""No time is printed before the results are right: each contender against python_ref in float64.

Bounds on |result - reference| / |reference| (Euclidean norms over a tensor):

    half types  2 eps   rounding P and dS to the storage dtype costs plain PyTorch up to 1.7 eps,
                        the largest of the rows under bench/results
    fp32       64 eps   roundings of a sum of 4096 terms, the longest here, grow like sqrt(4096)

times the standard deviation of the scores where that is above 1 (an error of a score is one of its
weight), and eight times that for the worst row against the largest one: a wrong row cannot hide
among many.
The tests hold our kernels to far tighter bounds (tests/tolerance.py).
"""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor

from . import record

EPS_FACTOR = {torch.float32: 64, torch.bfloat16: 2, torch.float16: 2, torch.float64: 64}
ROW_FACTOR = 8


@dataclass
class Expected:
    """Part of one output: `values` are the reference's at `index`."""

    name: str  # an output, or an operand, whose gradient it is
    index: tuple
    values: Tensor  # float64
    size: float = 1.0  # factor of its bounds


@lru_cache(maxsize=8)
def expected(page: ModuleType, problem, device: str = "cpu") -> list[Expected]:
    """The page's reference results, computed once for all processes of a run."""
    _warm_up_exp()
    folder = os.environ.get(record.REFERENCES)
    if not folder or device != "cpu":
        return page.expected(problem, device)
    text = f"{page.__name__} {problem!r}"
    path = Path(folder) / f"{hashlib.sha256(text.encode()).hexdigest()}.pt"
    if not path.exists():
        torch.save([vars(part) for part in page.expected(problem, device)], path)
    # ours alone: the folder is private to this run (record.shared_references)
    return [Expected(**part) for part in torch.load(path, weights_only=False)]


def problems_in(
    result: dict[str, Tensor],
    page: ModuleType,
    problem,
    device: str = "cpu",
    parts: list[Expected] | None = None,
) -> tuple[dict[str, float], list[str]]:
    """(relative error of each output, one sentence for each that is wrong).

    `parts` is what is right where that is not what the page says of the problem.
    """
    dtype = getattr(torch, problem.dtype)
    bound = EPS_FACTOR[dtype] * torch.finfo(dtype).eps * page.score_size(problem)
    errors, wrong = {}, []
    compared = set()
    for part in expected(page, problem, device) if parts is None else parts:
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
        allowed = bound * part.size
        if not error <= allowed:
            wrong.append(
                f"{part.name} differs from the reference by {error:.1e}, allowed {allowed:.1e}"
            )
        elif not worst_row <= ROW_FACTOR * allowed:
            wrong.append(
                f"a row of {part.name} differs by {worst_row:.1e}, "
                f"allowed {ROW_FACTOR * allowed:.1e}"
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
