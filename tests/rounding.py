"""Floors of an op from its written formulas alone: what one rounding in every operation does to the
result.

The float64 formulas run again with each operation's result moved by a random amount of a known
size, and the root mean square of what that does to an output, divided by the size, is the output's
error in units of eps, to first order. Two kinds, as in floors.py:

    accumulated  every result is moved in proportion to itself, a sum in proportion to the absolute
                 values of its summands
    stored       every computed operand of a matrix product is moved, and every result on its way
                 into the backward pass, as if they had been rounded to the operands' dtype

No assumption about tiles or the order of summation enters, and an output that is 0 because all of
its summands are stays 0.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch
from floors import Summands
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

SIZE = 1e-6  # of a perturbation: its square is far below it, float64's own rounding as well
RUNS = 12
# A mean square of that many draws is low by luck: one in a thousand lies below 2.21 / RUNS, the
# quantile of chi-square with 12 degrees of freedom.
LUCK = (2.21 / RUNS) ** -0.5
_POOL = 2**21  # random numbers that all runs take theirs from, at offsets of their own

_aten = torch.ops.aten
_PRODUCTS = (_aten.mm.default, _aten.bmm.default)
_SUMS = (_aten.sum.dim_IntList, _aten.sum.default)
_ROUNDED = (
    _aten.add.Tensor, _aten.sub.Tensor, _aten.mul.Tensor, _aten.div.Tensor, _aten.rsub.Scalar,
    _aten.exp.default, _aten.log.default, _aten.sigmoid.default, _aten.relu.default,
)  # fmt: skip


@cache
def _pool() -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return SIZE * torch.randn(_POOL, generator=generator, dtype=torch.float64)


class _Rounding(TorchDispatchMode):
    def __init__(self, stored: bool, generator: torch.Generator, exact: set[int], dtype):
        super().__init__()
        self.stored, self.generator, self.exact = stored, generator, exact
        total = torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32)
        self.flushed = total.smallest_normal / total.eps  # an exponential below this may be 0
        self.smallest = torch.finfo(dtype).smallest_normal  # below, a step stays the same

    def noise(self, size: Tensor) -> Tensor:
        pool = _pool()
        count = size.numel()
        at = int(torch.randint(max(_POOL - count, 1), (1,), generator=self.generator))
        copies = -(-(at + count) // _POOL)  # seldom two: a copy takes longer than the rest
        drawn = (pool if copies == 1 else pool.repeat(copies))[at : at + count]
        return size * drawn.view(size.shape)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if self.stored:
            if function in _PRODUCTS:
                args = tuple(self.as_stored(x) for x in args)
            return function(*args, **kwargs)
        out = function(*args, **kwargs)
        if not isinstance(out, Tensor) or out.dtype != torch.float64:
            return out
        if function in _PRODUCTS or function in _SUMS:
            absolute = (x.abs() if isinstance(x, Tensor) else x for x in args)
            return out + self.noise(function(*absolute, **kwargs))
        if function in _ROUNDED:
            size = out.abs()
            if function == _aten.exp.default:
                size = size + self.flushed
            return out + self.noise(size)
        return out

    def as_stored(self, x: Tensor) -> Tensor:
        if x.untyped_storage().data_ptr() in self.exact:
            return x
        return x + self.noise(torch.where(x != 0, x.abs() + self.smallest, 0.0))


def rounding_floors(
    formulas: Callable[[Callable[[Tensor], Tensor]], dict[str, Tensor]],
    inputs: list[Tensor],
    dtype: torch.dtype,
    seed: int,
) -> dict[str, Summands]:
    """Floors of every output of `formulas`, which computes in float64 from `inputs` (exact in
    `dtype`) and passes each result that its backward half reads through the function it is given.
    """
    _pool()  # outside of the mode
    exact = {x.untyped_storage().data_ptr() for x in inputs}
    with torch.no_grad():
        right = formulas(lambda x: x)
        moved = {}
        for stored in (False, True):
            generator = torch.Generator().manual_seed(seed)
            moved[stored] = []
            for _ in range(RUNS):
                with _Rounding(stored, generator, exact, dtype) as mode:
                    moved[stored].append(formulas(mode.as_stored if stored else lambda x: x))
    floors = {}
    for name, expected in right.items():
        errors = {
            kind: torch.stack([(run[name] - expected).nan_to_num() / SIZE for run in runs])
            for kind, runs in moved.items()
        }
        if (
            dtype == torch.float64
        ):  # the expected values are float64 as well: their error comes on top
            errors[False] = 2 * errors[False]
        norm = expected.norm(dim=-1, keepdim=True)
        along = torch.where(norm > 1e-140, expected / norm, 0.0)
        floors[name] = Summands(
            _rms(errors[False]), _rms(errors[True]), _rms((errors[True] * along).sum(-1))
        )
    return floors


def _rms(runs: Tensor) -> Tensor:
    return LUCK * runs.square().mean(0).sqrt()
