"""Backward kernels of masked attention. Each gradient element is written by one program, after a
loop in a fixed order: no atomics, bitwise the same every time.

    delta_kernel    rowsum(dO * O) - dlse
    rows_kernel     one program, one tile of query rows, loops over keys: dQ, sums along rows, the
                    rows of low-rank masks
    columns_kernel  one program, one tile of keys, loops over the query heads that share them and
                    their rows: dK, dV, sums along columns, the columns of low-rank masks
    tiles_kernel    one program, one tile of a mask, loops over the heads and samples that share it
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from .masked_attention_forward import VARYING
from .masks import Fold, Mask, fold_gradient, fold_start, mask_gradient_tile, store_fold
from .patterns import head_step, key_bounds, tile_range, tile_start
from .philox import kept_pairs
from .tiles import (
    Rows,
    base_of,
    learned_tile,
    load_rows,
    product_of_rows,
    product_of_tiles,
    program_mask_tile,
    program_tile,
    row_statistics,
    seen_pairs,
    slopes,
    store_rows,
)


class Backward(NamedTuple):
    """What the backward kernels read beside the operands."""

    grad_out: Rows
    lse: Tensor  # float32 [B, H, Lq]
    delta: Tensor  # float32 [B, H, Lq]
    END: None = None  # see masks.py


class MaskGradients(NamedTuple):
    """Where the gradients of multiplier and bias go; None: not wanted, or not from this pass."""

    multiplier: Mask | None  # a tile is one program's, or one of its loop
    bias: Mask | None
    multiplier_sums: Tensor | None  # float32 [B, H, Lq] (rows pass) or [B, H, Lk] (columns pass)
    bias_sums: Tensor | None
    multiplier_fold: Fold | None = None  # of the low-rank mask's rows (rows pass) or columns
    bias_fold: Fold | None = None
    END: None = None


@triton.jit(do_not_specialize=VARYING)
def delta_kernel(
    out, grad_out, grad_lse, delta, H, Lq,
    DV: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """grad_lse: None, or float32 [B, H, Lq], contiguous."""
    tiles = tl.cdiv(Lq, BLOCK_M)
    pair = tl.program_id(0) // tiles
    row = (tl.program_id(0) - pair * tiles) * BLOCK_M + tl.arange(0, BLOCK_M)
    offset = pair.to(tl.int64) * Lq
    o = load_rows(out + offset * DV, DV, row, Lq, DV, BLOCK_DV, False).to(tl.float32)
    base = base_of(grad_out, pair // H, pair % H)
    do = load_rows(base, grad_out.row, row, Lq, DV, BLOCK_DV, False).to(tl.float32)
    sums = tl.sum(o * do, 1)
    if grad_lse is not None:
        sums -= tl.load(grad_lse + offset + row, mask=row < Lq, other=0.0)
    tl.store(delta + offset + row, sums, mask=row < Lq)


@triton.jit(do_not_specialize=VARYING)
def rows_kernel(
    o, g, grad_query, grads, scale, seed, offset, threshold, keep_scale, B, H, group, Lq, Lk, tiles,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    N_TERMS: tl.constexpr, CODE: tl.constexpr, STEPPED: tl.constexpr, GATE: tl.constexpr,
    DROPOUT: tl.constexpr, HIDES: tl.constexpr, EVEN: tl.constexpr, ORDER: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """dQ of BLOCK_M rows; with it the gradient of a mask that has its own head and sample, the sums
    along rows that a mask without columns needs, and what this head gives to the rows of a low-rank
    mask."""
    tile, batch, head = program_tile(tiles, B, H, ORDER)
    pair = batch * H + head
    step, shift = head_step(o.terms, head, Lq, Lk, CODE, STEPPED)
    first = tile_start(tile, Lq, step, BLOCK_M, STEPPED)
    if first >= Lq:
        return
    row = first + step * tl.arange(0, BLOCK_M)
    rows = row[:, None]
    begin, stop = tile_range(
        o.terms, head, first, Lq, Lk, step, shift, BLOCK_M, N_TERMS, CODE, STEPPED, False
    )
    low, high = key_bounds(o.terms, head, rows, Lq, Lk, N_TERMS, CODE, False)

    keys = base_of(o.key, batch, head // group)
    values = base_of(o.value, batch, head // group)
    q = load_rows(base_of(o.query, batch, head), o.query.row, row, Lq, D, BLOCK_D, EVEN)
    do = load_rows(base_of(g.grad_out, batch, head), g.grad_out.row, row, Lq, DV, BLOCK_DV, EVEN)
    lse, delta = row_statistics(g.lse, g.delta, pair, row, Lq)
    dq = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    multiplier_sums = tl.zeros([BLOCK_M], tl.float32)
    bias_sums = tl.zeros([BLOCK_M], tl.float32)
    multiplier_fold = fold_start(grads.multiplier_fold, BLOCK_M)
    bias_fold = fold_start(grads.bias_fold, BLOCK_M)
    for start in range(begin, stop, BLOCK_N * step):
        column = start + step * tl.arange(0, BLOCK_N)
        columns = column[None, :]
        k = load_rows(keys, o.key.row, column, Lk, D, BLOCK_D, EVEN)
        v = load_rows(values, o.value.row, column, Lk, DV, BLOCK_DV, EVEN)
        s = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale
        dp = tl.dot(do, tl.trans(v), input_precision=PRECISION)
        if DROPOUT:
            kept = kept_pairs(
                rows, start, columns, pair, seed, offset, threshold, BLOCK_N, not STEPPED
            )
            dp = tl.where(kept, dp * keep_scale, 0.0)
        seen = seen_pairs(
            o, batch, head, rows, columns, low, high, Lq, Lk, N_TERMS, CODE, False, EVEN
        )
        multiplier = learned_tile(o.multiplier, batch, head, rows, columns, Lq, Lk, EVEN)
        bias = learned_tile(o.bias, batch, head, rows, columns, Lq, Lk, EVEN)
        _, ds, dm, da = slopes(
            o, s, dp, seen, multiplier, bias, lse[:, None], delta[:, None], GATE, HIDES
        )
        if grads.multiplier is not None:
            mask_gradient_tile(grads.multiplier, batch, head, rows, columns, Lq, Lk, dm)
        if grads.bias is not None:
            mask_gradient_tile(grads.bias, batch, head, rows, columns, Lq, Lk, da)
        if grads.multiplier_sums is not None:
            multiplier_sums += tl.sum(dm, 1)
        if grads.bias_sums is not None:
            bias_sums += tl.sum(da, 1)
        if grads.multiplier_fold is not None:
            multiplier_fold = fold_gradient(
                grads.multiplier_fold, multiplier_fold, dm, batch, head, column[:, None], Lk, 0,
                EVEN,
            )  # fmt: skip
        if grads.bias_fold is not None:
            bias_fold = fold_gradient(
                grads.bias_fold, bias_fold, da, batch, head, column[:, None], Lk, 0, EVEN,
            )  # fmt: skip
        if grad_query is not None:
            dq = tl.dot(ds.to(k.dtype), k, dq, input_precision=PRECISION)

    if grad_query is not None:
        store_rows(grad_query, pair, row, Lq, D, BLOCK_D, dq * scale)
    at = pair.to(tl.int64) * Lq + row
    if grads.multiplier_sums is not None:
        tl.store(grads.multiplier_sums + at, multiplier_sums, mask=row < Lq)
    if grads.bias_sums is not None:
        tl.store(grads.bias_sums + at, bias_sums, mask=row < Lq)
    if grads.multiplier_fold is not None:
        store_fold(grads.multiplier_fold, batch, head, rows, Lq, 0, multiplier_fold)
    if grads.bias_fold is not None:
        store_fold(grads.bias_fold, batch, head, rows, Lq, 0, bias_fold)


@triton.jit(do_not_specialize=VARYING)
def columns_kernel(
    o, g, grad_key, grad_value, grads, scale, seed, offset, threshold, keep_scale, B, H, group,
    Lq, Lk, tiles,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    N_TERMS: tl.constexpr, CODE: tl.constexpr, STEPPED: tl.constexpr, GATE: tl.constexpr,
    DROPOUT: tl.constexpr, HIDES: tl.constexpr, EVEN: tl.constexpr, ORDER: tl.constexpr,
    PRECISION: tl.constexpr, CHUNK_D: tl.constexpr,
):  # fmt: skip
    """dK and dV of BLOCK_N keys of one key head, tiles transposed so that P and dS need no
    transposition on their way into the products; sums along columns, one vector a query head, and
    what each query head gives to the columns of a low-rank mask."""
    tile, batch, key_head = program_tile(tiles, B, H // group, ORDER)
    step, shift = head_step(o.terms, key_head * group, Lq, Lk, CODE, STEPPED)
    first = tile_start(tile, Lk, step, BLOCK_N, STEPPED)
    if first >= Lk:
        return
    column = first + step * tl.arange(0, BLOCK_N)
    columns = column[:, None]
    SLOPES: tl.constexpr = (
        grad_key is not None
        or grads.multiplier is not None
        or grads.bias is not None
        or grads.multiplier_sums is not None
        or grads.bias_sums is not None
        or grads.multiplier_fold is not None
        or grads.bias_fold is not None
    )
    keys = base_of(o.key, batch, key_head)
    values = base_of(o.value, batch, key_head)
    k = load_rows(keys, o.key.row, column, Lk, D, BLOCK_D, EVEN)
    v = load_rows(values, o.value.row, column, Lk, DV, BLOCK_DV, EVEN)
    dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dv = tl.zeros([BLOCK_N, BLOCK_DV], tl.float32)
    for member in range(0, group):
        head = key_head * group + member
        pair = batch * H + head
        begin, stop = tile_range(
            o.terms, head, first, Lk, Lq, step, shift, BLOCK_N, N_TERMS, CODE, STEPPED, True
        )
        low, high = key_bounds(o.terms, head, columns, Lk, Lq, N_TERMS, CODE, True)
        queries = base_of(o.query, batch, head)
        grad_outs = base_of(g.grad_out, batch, head)
        multiplier_sums = tl.zeros([BLOCK_N], tl.float32)
        bias_sums = tl.zeros([BLOCK_N], tl.float32)
        multiplier_fold = fold_start(grads.multiplier_fold, BLOCK_N)
        bias_fold = fold_start(grads.bias_fold, BLOCK_N)
        for start in range(begin, stop, BLOCK_M * step):
            row = start + step * tl.arange(0, BLOCK_M)
            rows = row[None, :]
            q = load_rows(queries, o.query.row, row, Lq, D, BLOCK_D, EVEN)
            do = load_rows(grad_outs, g.grad_out.row, row, Lq, DV, BLOCK_DV, EVEN)
            lse, delta = row_statistics(g.lse, g.delta, pair, row, Lq)
            s = product_of_tiles(
                k, q, keys, o.key.row, column, Lk, queries, o.query.row, row, Lq,
                D, BLOCK_D, CHUNK_D, EVEN, PRECISION,
            )  # fmt: skip
            s = s * scale
            dp = s
            if SLOPES:
                dp = product_of_tiles(
                    v, do, values, o.value.row, column, Lk, grad_outs, g.grad_out.row, row, Lq,
                    DV, BLOCK_DV, CHUNK_D, EVEN, PRECISION,
                )  # fmt: skip
            if DROPOUT:
                kept = kept_pairs(
                    row[:, None], first, column[None, :], pair, seed, offset, threshold, BLOCK_N,
                    not STEPPED,
                )  # fmt: skip
                kept = tl.trans(kept)
                dp = tl.where(kept, dp * keep_scale, 0.0)
            seen = seen_pairs(
                o, batch, head, rows, columns, low, high, Lq, Lk, N_TERMS, CODE, True, EVEN
            )
            multiplier = learned_tile(o.multiplier, batch, head, rows, columns, Lq, Lk, EVEN)
            bias = learned_tile(o.bias, batch, head, rows, columns, Lq, Lk, EVEN)
            p, ds, dm, da = slopes(
                o, s, dp, seen, multiplier, bias, lse[None, :], delta[None, :], GATE, HIDES
            )
            if grads.multiplier is not None:
                mask_gradient_tile(grads.multiplier, batch, head, rows, columns, Lq, Lk, dm)
            if grads.bias is not None:
                mask_gradient_tile(grads.bias, batch, head, rows, columns, Lq, Lk, da)
            if grads.multiplier_sums is not None:
                multiplier_sums += tl.sum(dm, 1)
            if grads.bias_sums is not None:
                bias_sums += tl.sum(da, 1)
            if grads.multiplier_fold is not None:
                multiplier_fold = fold_gradient(
                    grads.multiplier_fold, multiplier_fold, dm, batch, head, row[:, None], Lq, 0,
                    EVEN,
                )  # fmt: skip
            if grads.bias_fold is not None:
                bias_fold = fold_gradient(
                    grads.bias_fold, bias_fold, da, batch, head, row[:, None], Lq, 0, EVEN,
                )  # fmt: skip
            if grad_value is not None:
                if DROPOUT:
                    p = tl.where(kept, p * keep_scale, 0.0)
                dv = tl.dot(p.to(do.dtype), do, dv, input_precision=PRECISION)
            if grad_key is not None:
                dk = tl.dot(ds.to(q.dtype), q, dk, input_precision=PRECISION)
        at = pair.to(tl.int64) * Lk + column
        if grads.multiplier_sums is not None:
            tl.store(grads.multiplier_sums + at, multiplier_sums, mask=column < Lk)
        if grads.bias_sums is not None:
            tl.store(grads.bias_sums + at, bias_sums, mask=column < Lk)
        if grads.multiplier_fold is not None:
            store_fold(grads.multiplier_fold, batch, head, columns, Lk, 0, multiplier_fold)
        if grads.bias_fold is not None:
            store_fold(grads.bias_fold, batch, head, columns, Lk, 0, bias_fold)

    key_pair = batch * (H // group) + key_head
    if grad_key is not None:
        store_rows(grad_key, key_pair, column, Lk, D, BLOCK_D, dk * scale)
    if grad_value is not None:
        store_rows(grad_value, key_pair, column, Lk, DV, BLOCK_DV, dv)


@triton.jit
def _tile_slopes(
    o, g, batch, head, row, first_column, column, scale,
    seed, offset, threshold, keep_scale, H, group, Lq, Lk,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_N: tl.constexpr, N_TERMS: tl.constexpr, CODE: tl.constexpr, STEPPED: tl.constexpr,
    GATE: tl.constexpr, DROPOUT: tl.constexpr, HIDES: tl.constexpr, EVEN: tl.constexpr,
    PRECISION: tl.constexpr, CHUNK_D: tl.constexpr,
):  # fmt: skip
    """(dM, dA) of one head's tile."""
    rows = row[:, None]
    columns = column[None, :]
    pair = batch * H + head
    low, high = key_bounds(o.terms, head, rows, Lq, Lk, N_TERMS, CODE, False)
    lse, delta = row_statistics(g.lse, g.delta, pair, row, Lq)
    s = product_of_rows(
        base_of(o.query, batch, head), o.query.row, row, Lq,
        base_of(o.key, batch, head // group), o.key.row, column, Lk,
        D, BLOCK_D, CHUNK_D, EVEN, PRECISION,
    )  # fmt: skip
    s = s * scale
    dp = product_of_rows(
        base_of(g.grad_out, batch, head), g.grad_out.row, row, Lq,
        base_of(o.value, batch, head // group), o.value.row, column, Lk,
        DV, BLOCK_DV, CHUNK_D, EVEN, PRECISION,
    )  # fmt: skip
    if DROPOUT:
        kept = kept_pairs(
            rows, first_column, columns, pair, seed, offset, threshold, BLOCK_N, not STEPPED
        )
        dp = tl.where(kept, dp * keep_scale, 0.0)
    seen = seen_pairs(o, batch, head, rows, columns, low, high, Lq, Lk, N_TERMS, CODE, False, EVEN)
    multiplier = learned_tile(o.multiplier, batch, head, rows, columns, Lq, Lk, EVEN)
    bias = learned_tile(o.bias, batch, head, rows, columns, Lq, Lk, EVEN)
    _, _, dm, da = slopes(
        o, s, dp, seen, multiplier, bias, lse[:, None], delta[:, None], GATE, HIDES
    )
    return dm, da


@triton.jit(do_not_specialize=(*VARYING, "row_tiles", "column_tiles", "batches", "heads", "splits"))
def tiles_kernel(
    o, g, grads, split_stride, scale, seed, offset, threshold, keep_scale, H, group, Lq, Lk,
    row_tiles, column_tiles, batches, heads, splits,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    N_TERMS: tl.constexpr, CODE: tl.constexpr, STEPPED: tl.constexpr, GATE: tl.constexpr,
    DROPOUT: tl.constexpr, HIDES: tl.constexpr, EVEN: tl.constexpr, PRECISION: tl.constexpr,
    CHUNK_D: tl.constexpr,
):  # fmt: skip
    """The gradient of one tile of a mask, summed over the batches x heads that share it.

    Programs: split, mask batch and head, row tile, column tile (fastest). A split sums every
    splits-th sharer into its own partial result, split_stride elements after the one before.
    """
    column_tile, row_tile, split, own_batch, own_head = program_mask_tile(
        row_tiles, column_tiles, splits, H // heads
    )

    step, shift = head_step(o.terms, own_head, Lq, Lk, CODE, STEPPED)
    first_row = tile_start(row_tile, Lq, step, BLOCK_M, STEPPED)
    if first_row >= Lq:
        return
    row = first_row + step * tl.arange(0, BLOCK_M)
    if STEPPED:  # the n-th tile of the columns that are of the rows' residue class
        first_column = (first_row + shift) % step
        first_column = tl.where(first_column < 0, first_column + step, first_column)
        first_column += column_tile * BLOCK_N * step
    else:
        first_column = column_tile * BLOCK_N
    column = first_column + step * tl.arange(0, BLOCK_N)
    rows = row[:, None]
    columns = column[None, :]
    if N_TERMS > 0 and CODE >= 0:
        begin, stop = tile_range(
            o.terms, own_head, first_row, Lq, Lk, step, shift, BLOCK_M, N_TERMS, CODE, STEPPED,
            False,
        )  # fmt: skip
        if (first_column >= stop) | (first_column + step * (BLOCK_N - 1) < begin):
            return  # the gradient was allocated as zeros

    dm_total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    da_total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for sharer in range(split, batches * heads, splits):
        batch = own_batch + sharer // heads
        head = own_head + sharer % heads
        touched = True
        if N_TERMS > 0 and CODE < 0:  # the heads' patterns differ: some leave this tile out
            begin, stop = tile_range(
                o.terms, head, first_row, Lq, Lk, 1, 0, BLOCK_M, N_TERMS, CODE, False, False
            )
            touched = (first_column < stop) & (first_column + BLOCK_N > begin)
        if touched:
            dm, da = _tile_slopes(
                o, g, batch, head, row, first_column, column, scale,
                seed, offset, threshold, keep_scale, H, group, Lq, Lk,
                D, DV, BLOCK_D, BLOCK_DV, BLOCK_N, N_TERMS, CODE, STEPPED, GATE, DROPOUT,
                HIDES, EVEN, PRECISION, CHUNK_D,
            )  # fmt: skip
            if grads.multiplier is not None:
                dm_total += dm
            if grads.bias is not None:
                da_total += da
    ahead = split.to(tl.int64) * split_stride
    if grads.multiplier is not None:
        mask_gradient_tile(
            grads.multiplier, own_batch, own_head, rows, columns, Lq, Lk, dm_total, ahead
        )
    if grads.bias is not None:
        mask_gradient_tile(grads.bias, own_batch, own_head, rows, columns, Lq, Lk, da_total, ahead)
