"""Tiles of multiplier, bias and boolean masks, and of their gradients, in device memory.

Rows and columns come as [M, 1] and [1, N], or as [1, M] and [N, 1] for a transposed tile: nothing
here depends on the orientation. An axis that broadcasts is missing from the address (a stride of
None), so that a vector mask is a vector of loads and a learned scale a single one.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor


class Mask(NamedTuple):
    """A 4-D operand; strides in elements, 0 on a batch or head axis that broadcasts."""

    pointer: Tensor
    batch: int
    head: int
    row: int | None  # None: broadcasts
    column: int | None


def mask_argument(tensor: Tensor | None) -> Mask | None:
    if tensor is None:
        return None
    strides = [
        stride if size > 1 else 0
        for size, stride in zip(tensor.shape, tensor.stride(), strict=True)
    ]
    row = strides[2] if tensor.shape[2] > 1 else None
    column = strides[3] if tensor.shape[3] > 1 else None
    return Mask(tensor, strides[0], strides[1], row, column)


@triton.jit
def _addresses(mask, batch, head, rows, columns):
    at = mask.pointer + batch.to(tl.int64) * mask.batch + head.to(tl.int64) * mask.head
    if mask.row is not None:
        at = at + rows.to(tl.int64) * mask.row
    if mask.column is not None:
        at = at + columns.to(tl.int64) * mask.column
    return at


@triton.jit
def _inside(mask, rows, columns, Lq, Lk):
    if mask.row is not None and mask.column is not None:
        return (rows < Lq) & (columns < Lk)
    elif mask.row is not None:
        return rows < Lq
    else:
        return columns < Lk


@triton.jit
def mask_tile(mask, batch, head, rows, columns, Lq, Lk, EVEN: tl.constexpr):
    """The mask's values for a tile, in its own dtype, of a shape that broadcasts to the tile's.

    EVEN: no position of the tile is outside. Everything that a kernel knows about a learned mask
    comes through here and mask_gradient_tile.
    """
    at = _addresses(mask, batch, head, rows, columns)
    if mask.row is None and mask.column is None:
        return tl.load(at + tl.zeros([1, 1], tl.int32))
    elif EVEN:
        return tl.load(at)
    else:
        return tl.load(at, mask=_inside(mask, rows, columns, Lq, Lk), other=0)


@triton.jit
def mask_gradient_tile(mask, batch, head, rows, columns, Lq, Lk, value, ahead=0, where=True):
    """Stores the gradient of a tile of a mask that has both rows and columns, `where` its pairs
    exist, `ahead` elements behind its own place (a partial sum)."""
    at = _addresses(mask, batch, head, rows, columns) + ahead
    inside = (rows < Lq) & (columns < Lk) & where
    tl.store(at, value.to(mask.pointer.dtype.element_ty), mask=inside)
