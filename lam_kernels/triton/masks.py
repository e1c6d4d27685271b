"""Tiles of multiplier, bias and boolean masks, and of their gradients.

Rows and columns come as [M, 1] and [1, N], or as [1, M] and [N, 1] for a transposed tile: nothing
here depends on the orientation. An axis that broadcasts is missing from the address (its flag is
False), so that a vector mask is a vector of loads and a learned scale a single one.

Triton 3.6 cannot tell whether a tuple is None if there is a None in it, hence flags and empty
tuples; and a loop forgets what is constant in a tuple within a tuple unless the outer one's last
field is constant as well, hence the order of fields here and END elsewhere.

A low-rank mask, M = rows columns^T + offset, has no tiles in memory. Each is one product of two
tiles of factors, a block of ranks at a time, made where it is used: forward, rows and columns pass
each make it once a head, which costs `rank` multiply-adds a pair and no memory; a tile that several
heads use in turn would have to outlive the loop over keys. Its gradient is folded into those of the
factors in the pass that has it in registers anyway (fold_gradient).

Products of factors of one half-precision dtype are exact in float32; others are float32 products in
three tf32 parts, as all float32 products here.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

RANK_BLOCK = 64  # ranks that are multiplied, and whose gradient is held, at a time
_FLOAT32 = tl.constexpr("tf32x3")


class Mask(NamedTuple):
    """A 4-D operand; strides in elements, 0 on a batch or head axis that broadcasts."""

    pointer: Tensor
    batch: int
    head: int
    row: int
    column: int
    ROWS: tl.constexpr  # False: broadcasts along them
    COLUMNS: tl.constexpr
    factors: Factors | tuple[()] = ()  # of a low-rank mask, which this then is the rows of
    RANK: tl.constexpr = tl.constexpr(0)


class Factors(NamedTuple):
    """What a low-rank mask has beside its rows."""

    columns: Mask
    offset: Mask | tuple[()]
    BLOCK: tl.constexpr  # ranks at a time
    OFFSET: tl.constexpr  # whether there is one


class Fold(NamedTuple):
    """The gradient of one factor from the gradient of M: dM times the other factor."""

    factor: Mask  # the other one
    gradient: Mask  # with its own head and sample
    RANK: tl.constexpr
    BLOCK: tl.constexpr


def mask_argument(
    tensor: Tensor | None, columns: Tensor | None = None, offset: Tensor | None = None
) -> Mask | None:
    """A dense mask, or with `columns` a low-rank one, whose rows then are `tensor`."""
    if tensor is None:
        return None
    if columns is None:
        return _mask(tensor, tensor.shape[2] > 1, tensor.shape[3] > 1)
    rank, block = _ranks(columns)
    given = offset is not None
    factors = Factors(
        _mask(columns), mask_argument(offset) if given else (), block, tl.constexpr(given)
    )
    return _mask(tensor)._replace(RANK=rank, factors=factors)


def fold_argument(factor: Tensor, gradient: Tensor) -> Fold:
    return Fold(_mask(factor), _mask(gradient), *_ranks(factor))


def _mask(tensor: Tensor, has_rows: bool = True, has_columns: bool = True) -> Mask:
    batch, head, *strides = tensor.stride()
    own_batch, own_head = (size > 1 for size in tensor.shape[:2])
    flags = tl.constexpr(has_rows), tl.constexpr(has_columns)
    return Mask(tensor, batch if own_batch else 0, head if own_head else 0, *strides, *flags)


def _ranks(factor: Tensor) -> tuple[tl.constexpr, tl.constexpr]:
    """The rank, and how many of them at a time."""
    rank = factor.shape[3]
    block = min(RANK_BLOCK, max(16, triton.next_power_of_2(rank)))
    return tl.constexpr(rank), tl.constexpr(block)


@triton.jit
def _addresses(mask, batch, head, rows, columns):
    at = mask.pointer + batch.to(tl.int64) * mask.batch + head.to(tl.int64) * mask.head
    if mask.ROWS:
        at = at + rows.to(tl.int64) * mask.row
    if mask.COLUMNS:
        at = at + columns.to(tl.int64) * mask.column
    return at


@triton.jit
def _inside(mask, rows, columns, Lq, Lk):
    if mask.ROWS and mask.COLUMNS:
        return (rows < Lq) & (columns < Lk)
    elif mask.ROWS:
        return rows < Lq
    else:
        return columns < Lk


@triton.jit
def mask_tile(
    mask, batch, head, rows, columns, Lq, Lk, EVEN: tl.constexpr,
    PACKED: tl.constexpr = False, key_batch=0, key_head=0,
):  # fmt: skip
    """The mask's values for a tile, in its own dtype (low rank: float32), of a shape that
    broadcasts to the tile's.

    EVEN: no position of the tile is outside. PACKED: the tile packs several heads, `batch` and
    `head` are those of each row, key_batch and key_head those of each column, [N, 1]. Everything
    that a kernel knows about a learned mask comes through here, mask_gradient_tile and
    fold_gradient.
    """
    if mask.RANK > 0:
        if PACKED:
            return _product_tile(
                mask, batch, head, key_batch, key_head, rows, columns, Lq, Lk, EVEN
            )
        else:
            return _product_tile(mask, batch, head, batch, head, rows, columns, Lq, Lk, EVEN)
    else:
        return _dense_tile(mask, batch, head, rows, columns, Lq, Lk, EVEN)


@triton.jit
def _dense_tile(mask, batch, head, rows, columns, Lq, Lk, EVEN: tl.constexpr):
    at = _addresses(mask, batch, head, rows, columns)
    if not (mask.ROWS or mask.COLUMNS):
        return tl.load(at + tl.zeros([1, 1], tl.int32))
    elif EVEN:
        return tl.load(at)
    else:
        return tl.load(at, mask=_inside(mask, rows, columns, Lq, Lk), other=0)


@triton.jit
def _product_tile(
    mask, batch, head, key_batch, key_head, rows, columns, Lq, Lk, EVEN: tl.constexpr
):
    TRANSPOSED: tl.constexpr = rows.shape[0] == 1
    if TRANSPOSED:
        row = tl.trans(rows)
        column = columns
        total = tl.zeros([columns.shape[0], rows.shape[1]], tl.float32)
    else:
        row = rows
        column = tl.trans(columns)
        total = tl.zeros([rows.shape[0], columns.shape[1]], tl.float32)
    # what does not change along a kernel's loop, rows or columns, the compiler loads before it
    for N in tl.static_range((mask.RANK + mask.factors.BLOCK - 1) // mask.factors.BLOCK):
        of_rows = _factor_tile(
            mask, batch, head, row, Lq, N * mask.factors.BLOCK, mask.RANK, mask.factors.BLOCK, EVEN
        )
        of_columns = _factor_tile(
            mask.factors.columns,
            key_batch,
            key_head,
            column,
            Lk,
            N * mask.factors.BLOCK,
            mask.RANK,
            mask.factors.BLOCK,
            EVEN,
        )
        if TRANSPOSED:
            total = _dot(of_columns, tl.trans(of_rows), total)
        else:
            total = _dot(of_rows, tl.trans(of_columns), total)
    if mask.factors.OFFSET:
        offset = _dense_tile(mask.factors.offset, batch, head, rows, columns, Lq, Lk, EVEN)
        total = total + offset.to(tl.float32)
    return total


@triton.jit
def _factor_tile(
    factor, batch, head, at, L, begin,
    RANK: tl.constexpr, BLOCK: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """[len(at), BLOCK] of the positions `at` [N, 1], zeros outside [L, RANK]."""
    rank = begin + tl.arange(0, BLOCK)[None, :]
    pointers = _addresses(factor, batch, head, at, rank)
    if EVEN and RANK % BLOCK == 0:
        return tl.load(pointers)
    elif EVEN:
        return tl.load(pointers, mask=rank < RANK, other=0.0)
    else:
        return tl.load(pointers, mask=(at < L) & (rank < RANK), other=0.0)


@triton.jit
def _dot(a, b, total):
    if a.dtype == b.dtype and a.dtype != tl.float32:
        return tl.dot(a, b, total)
    else:
        a = a.to(tl.float32)
        return tl.dot(a, b.to(tl.float32), total, input_precision=_FLOAT32)


@triton.jit
def mask_gradient_tile(mask, batch, head, rows, columns, Lq, Lk, value, ahead=0, where=True):
    """Stores the gradient of a tile of a mask that has both rows and columns, `where` its pairs
    exist, `ahead` elements behind its own place (a partial sum)."""
    at = _addresses(mask, batch, head, rows, columns) + ahead
    inside = (rows < Lq) & (columns < Lk) & where
    tl.store(at, value.to(mask.pointer.dtype.element_ty), mask=inside)


@triton.jit
def fold_start(fold, N: tl.constexpr):
    """The sum that fold_gradient adds to; a 0 that nobody uses where there is none."""
    if fold is None:
        return tl.zeros([1, 1], tl.float32)
    else:
        return tl.zeros([N, fold.BLOCK], tl.float32)


@triton.jit
def fold_gradient(fold, total, dm, batch, head, at, L, begin, EVEN: tl.constexpr):
    """total + dM times the factor at the positions `at` [N, 1] of dM's second axis.

    dM stays exact to 16 bits where the factor is bfloat16 (two products), to 20 otherwise: rounded
    to the factor's dtype it would lose sums that nearly cancel.
    """
    factor = _factor_tile(fold.factor, batch, head, at, L, begin, fold.RANK, fold.BLOCK, EVEN)
    if factor.dtype == tl.bfloat16:
        high = dm.to(tl.bfloat16)
        low = (dm - high.to(tl.float32)).to(tl.bfloat16)
        return tl.dot(low, factor, tl.dot(high, factor, total))
    else:
        return tl.dot(dm, factor.to(tl.float32), total, input_precision=_FLOAT32)


@triton.jit
def store_fold(fold, batch, head, at, L, begin, total):
    """at: [N, 1] positions of dM's first axis."""
    rank = begin + tl.arange(0, fold.BLOCK)[None, :]
    pointers = _addresses(fold.gradient, batch, head, at, rank)
    inside = (at < L) & (rank < fold.RANK)
    tl.store(pointers, total.to(fold.gradient.pointer.dtype.element_ty), mask=inside)
