"""What the attention kernels of all ops do with one tile: addresses, loads, scores, slopes.

A tile is [rows, columns], or transposed [columns, rows] where the products want it so; rows and
columns come expanded ([M, 1] and [1, N], or [1, M] and [N, 1]), and nothing here depends on which.
Scores are in natural units and only the difference to the row's largest (or to lse) is multiplied
by log2(e): with log2-scaled scores the lse that the op returns could not give back exactly the
weights that the forward pass used, and a row of one key would lose weight at large scores.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from .masks import Mask, mask_tile
from .patterns import Terms, codes_agree

LOG2E = tl.constexpr(1.4426950408889634)
_INF = tl.constexpr(float("inf"))


class Rows(NamedTuple):
    """[B, heads, L, D] with a last stride of 1; strides in elements."""

    pointer: Tensor
    batch: int
    head: int
    row: int


class Operands(NamedTuple):
    """What every kernel of masked attention reads."""

    query: Rows
    key: Rows
    value: Rows
    multiplier: Mask | None
    bias: Mask | None
    attn_mask: Mask | None
    key_mask: Mask | None
    terms: Terms
    END: None = None  # see masks.py


def rows_argument(tensor: Tensor) -> Rows:
    batch, head, row, _ = tensor.stride()
    return Rows(tensor, batch, head, row)


@triton.jit
def program_tile(tiles, B, H, ORDER: tl.constexpr):
    """(tile, batch, head) of this program. The part that varies fastest shares what it reads:

    tiles    the keys and values of one head
    heads    the mask rows of one sample
    batches  the mask rows of one head
    pairs    mask rows that all share
    """
    index = tl.program_id(0)
    if ORDER == "tiles":
        pair = index // tiles
        return index - pair * tiles, pair // H, pair % H
    elif ORDER == "heads":
        rest = index // H
        return rest % tiles, rest // tiles, index - rest * H
    elif ORDER == "batches":
        rest = index // B
        return rest % tiles, index - rest * B, rest // tiles
    else:
        tile = index // (B * H)
        pair = index - tile * (B * H)
        return tile, pair // H, pair % H


@triton.jit
def program_mask_tile(row_tiles, column_tiles, splits, own_heads):
    """(column tile, row tile, split, batch, head) of a program that owns a tile of a mask: column
    tiles vary fastest, then row tiles, splits, the mask's own heads."""
    index = tl.program_id(0)
    column_tile = index % column_tiles
    index = index // column_tiles
    row_tile = index % row_tiles
    index = index // row_tiles
    split = index % splits
    index = index // splits
    return column_tile, row_tile, split, index // own_heads, index % own_heads


@triton.jit
def base_of(operand, batch, head):
    return operand.pointer + batch.to(tl.int64) * operand.batch + head.to(tl.int64) * operand.head


@triton.jit
def load_rows(base, stride, row, L, D: tl.constexpr, BLOCK_D: tl.constexpr, EVEN: tl.constexpr):
    """[len(row), BLOCK_D], zeros outside [L, D]."""
    d = tl.arange(0, BLOCK_D)[None, :]
    at = base + row.to(tl.int64)[:, None] * stride + d
    if EVEN and D == BLOCK_D:
        return tl.load(at)
    elif EVEN:
        return tl.load(at, mask=d < D, other=0.0)
    elif D == BLOCK_D:
        return tl.load(at, mask=row[:, None] < L, other=0.0)
    else:
        return tl.load(at, mask=(row[:, None] < L) & (d < D), other=0.0)


@triton.jit
def load_chunk(base, stride, row, L, begin, D: tl.constexpr, CHUNK: tl.constexpr):
    """[len(row), CHUNK] of the head dim from `begin` on, zeros outside [L, D]."""
    d = begin + tl.arange(0, CHUNK)[None, :]
    at = base + row.to(tl.int64)[:, None] * stride + d
    return tl.load(at, mask=(row[:, None] < L) & (d < D), other=0.0)


@triton.jit
def product_of_rows(
    a, a_stride, row, La, b, b_stride, column, Lb,
    D: tl.constexpr, BLOCK_D: tl.constexpr, CHUNK_D: tl.constexpr, EVEN: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """a b^T of rows of two operands, float32. In chunks of the head dim where holding the three
    tf32 parts of whole rows would take more registers than there are."""
    if CHUNK_D >= BLOCK_D:
        left = load_rows(a, a_stride, row, La, D, BLOCK_D, EVEN)
        right = load_rows(b, b_stride, column, Lb, D, BLOCK_D, EVEN)
        return tl.dot(left, tl.trans(right), input_precision=PRECISION)
    else:
        total = tl.zeros([row.shape[0], column.shape[0]], tl.float32)
        for begin in range(0, D, CHUNK_D):
            left = load_chunk(a, a_stride, row, La, begin, D, CHUNK_D)
            right = load_chunk(b, b_stride, column, Lb, begin, D, CHUNK_D)
            total = tl.dot(left, tl.trans(right), total, input_precision=PRECISION)
        return total


@triton.jit
def product_of_tiles(
    left, right, a, a_stride, row, La, b, b_stride, column, Lb,
    D: tl.constexpr, BLOCK_D: tl.constexpr, CHUNK_D: tl.constexpr, EVEN: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """left right^T of tiles at hand or, where holding them on the way would take more registers
    than there are, of the rows that they were loaded from (product_of_rows)."""
    if CHUNK_D >= BLOCK_D:
        return tl.dot(left, tl.trans(right), input_precision=PRECISION)
    else:
        return product_of_rows(
            a, a_stride, row, La, b, b_stride, column, Lb, D, BLOCK_D, CHUNK_D, EVEN, PRECISION
        )


@triton.jit
def store_rows(pointer, pair, row, L, D: tl.constexpr, BLOCK_D: tl.constexpr, value):
    """Into a contiguous [pairs, L, D]; pair: one number, or one a row."""
    d = tl.arange(0, BLOCK_D)[None, :]
    at = pointer + (pair.to(tl.int64) * L + row)[:, None] * D + d
    tl.store(at, value.to(pointer.dtype.element_ty), mask=(row[:, None] < L) & (d < D))


@triton.jit
def store_chunk(pointer, pair, row, L, begin, D: tl.constexpr, CHUNK: tl.constexpr, value):
    """Into a contiguous [pairs, L, D], its head dim from `begin` on."""
    d = begin + tl.arange(0, CHUNK)[None, :]
    at = pointer + (pair.to(tl.int64) * L + row)[:, None] * D + d
    tl.store(at, value.to(pointer.dtype.element_ty), mask=(row[:, None] < L) & (d < D))


@triton.jit
def add_chunk(pointer, pair, row, L, begin, D: tl.constexpr, CHUNK: tl.constexpr, value):
    """The same, added to what is there: a sum that one program owns."""
    d = begin + tl.arange(0, CHUNK)[None, :]
    at = pointer + (pair.to(tl.int64) * L + row)[:, None] * D + d
    inside = (row[:, None] < L) & (d < D)
    tl.store(at, tl.load(at, mask=inside, other=0.0) + value, mask=inside)


@triton.jit
def learned_tile(
    mask, batch, head, rows, columns, Lq, Lk, EVEN: tl.constexpr,
    PACKED: tl.constexpr = False, key_batch=0, key_head=0,
):  # fmt: skip
    """Multiplier or bias in float32; a 1 that nobody uses where there is none (Triton 3.6 returns
    no None)."""
    if mask is None:
        return tl.full([1, 1], 1.0, tl.float32)
    else:
        tile = mask_tile(
            mask, batch, head, rows, columns, Lq, Lk, EVEN, PACKED, key_batch, key_head
        )
        return tile.to(tl.float32)


@triton.jit
def kept_by_pattern(
    terms, batch, head, rows, columns, low, high, Lq, Lk,
    N_TERMS: tl.constexpr, CODE: tl.constexpr, TRANSPOSED: tl.constexpr,
):  # fmt: skip
    """Where a column exists and the pattern keeps the pair. low, high: see seen_pairs."""
    kept = columns < Lk
    if N_TERMS > 0:
        if TRANSPOSED:
            kept = kept & (rows >= low) & (rows < high)
        else:
            kept = (columns >= low) & (columns < high)
        kept = codes_agree(kept, terms, batch, head, rows, columns, Lq, Lk, N_TERMS, CODE)
    return kept


@triton.jit
def seen_pairs(
    o, batch, head, rows, columns, low, high, Lq, Lk,
    N_TERMS: tl.constexpr, CODE: tl.constexpr, TRANSPOSED: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """Where pattern, attn_mask and key_mask keep a pair. low, high: key_bounds of the rows
    (TRANSPOSED: of the columns)."""
    kept = kept_by_pattern(
        o.terms, batch, head, rows, columns, low, high, Lq, Lk, N_TERMS, CODE, TRANSPOSED
    )
    if o.key_mask is not None:
        kept = kept & (mask_tile(o.key_mask, batch, head, rows, columns, Lq, Lk, EVEN) != 0)
    if o.attn_mask is not None:
        kept = kept & (mask_tile(o.attn_mask, batch, head, rows, columns, Lq, Lk, EVEN) != 0)
    return kept


@triton.jit
def fused_scores(o, s, seen, multiplier, bias, GATE: tl.constexpr, HIDES: tl.constexpr):
    """(F, Z, visible) of the formulas: F = S * M + A, or S * M where A is a gate. HIDES: `seen`
    is not everything."""
    f = s
    visible = seen
    if o.multiplier is not None:
        f = f * multiplier
    z = f
    if o.bias is not None:
        if GATE:
            visible = visible & (bias != 0)
            z = f + tl.log(tl.where(visible, bias, 1.0))
        else:
            f = f + bias
            z = f
            if o.multiplier is not None:  # whose value may be NaN where the bias hides
                visible = visible & (bias != -_INF)
    if HIDES or (o.bias is not None and (GATE or o.multiplier is not None)):
        z = tl.where(visible, z, -_INF)
    return f, z, visible


@triton.jit
def slopes(
    o, s, dp, seen, multiplier, bias, lse, delta,
    GATE: tl.constexpr, HIDES: tl.constexpr,
):  # fmt: skip
    """(P, dS, dM, dA) of a tile. lse is +inf in a row that sees no key: every weight is 0."""
    f, z, visible = fused_scores(o, s, seen, multiplier, bias, GATE, HIDES)
    p = tl.exp2((z - lse) * LOG2E)
    slope = dp - delta
    dz = p * slope
    ds = score_slope(o, dz, visible, multiplier, HIDES)
    da = dz
    if GATE:  # finite also where the gate is 0, and then not P / A
        da = tl.where(seen, tl.exp2((f - lse) * LOG2E), 0.0) * slope
    return p, ds, dz * s, da


@triton.jit
def score_slope(o, dz, visible, multiplier, HIDES: tl.constexpr):
    """dS of dZ."""
    ds = dz
    if o.multiplier is not None:
        ds = dz * multiplier
        if HIDES or o.bias is not None:  # the multiplier of a hidden pair may be NaN
            ds = tl.where(visible, ds, 0.0)
    return ds


@triton.jit
def softmax_step(z, largest, total):
    """(weights of a tile, what earlier sums shrink by, largest, total) of an online softmax."""
    larger = tl.maximum(largest, tl.max(z, 1))
    anchor = tl.where(larger == -_INF, 0.0, larger)
    p = tl.exp2((z - anchor[:, None]) * LOG2E)
    shrink = tl.exp2((largest - anchor) * LOG2E)
    return p, shrink, larger, total * shrink + tl.sum(p, 1)


@triton.jit
def store_softmax(
    out, lse, pair, row, Lq, DV: tl.constexpr, BLOCK_DV: tl.constexpr, result, largest, total
):
    """out and lse of rows from the sums of an online softmax; 0 and -inf where no key was seen."""
    empty = total == 0.0
    result = result / tl.where(empty, 1.0, total)[:, None]
    store_rows(out, pair, row, Lq, DV, BLOCK_DV, result)
    at = lse + pair.to(tl.int64) * Lq + row
    tl.store(at, tl.where(empty, -_INF, largest + tl.log(total)), mask=row < Lq)


@triton.jit
def row_statistics(lse, delta, pair, row, Lq):
    """lse (+inf in a row without a key, and outside) and delta - dlse of rows."""
    at = pair.to(tl.int64) * Lq + row
    z = tl.load(lse + at, mask=row < Lq, other=-_INF)
    return tl.where(z == -_INF, _INF, z), tl.load(delta + at, mask=row < Lq, other=0.0)
