"""Backward kernels of global and local attention. The scores of a tile are formed once for both
halves, whose gradients meet in one dS. As in masked_attention_backward.py each element is written
by one program after a loop in a fixed order, and the local half only works on tiles of its pattern:

    rows     dQ of a tile of rows: 4 products a near tile (S, dP of both halves, dQ), 3 a far one
    columns  dK and dV of a tile of keys: 6 products (S, dP and dV of both halves, dK), 4
    tiles    a tile of a mask that several heads or samples share: 3 products (S, dP of both), 2
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl

from .masked_attention_backward import Backward
from .masked_attention_forward import VARYING
from .masks import mask_gradient_tile
from .patterns import key_bounds, near_tiles, part_length, part_start, tile_range
from .tiles import (
    LOG2E,
    base_of,
    fused_scores,
    kept_by_pattern,
    learned_tile,
    load_rows,
    product_of_rows,
    product_of_tiles,
    program_mask_tile,
    program_tile,
    row_statistics,
    score_slope,
    seen_pairs,
    store_rows,
)


class BothBackward(NamedTuple):
    """What the backward kernels read beside the operands."""

    whole: Backward
    near: Backward
    END: None = None  # see masks.py


@triton.jit
def _whole_slope(
    o, s, dp, batch, head, rows, columns, low, high, Lq, Lk, lse, delta,
    TRANSPOSED: tl.constexpr, HIDES: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """(Z, visible, multiplier, P, dZ) of the global half. lse is +inf in a row without keys."""
    seen = seen_pairs(o, batch, head, rows, columns, low, high, Lq, Lk, 0, 0, TRANSPOSED, EVEN)
    multiplier = learned_tile(o.multiplier, batch, head, rows, columns, Lq, Lk, EVEN)
    bias = learned_tile(o.bias, batch, head, rows, columns, Lq, Lk, EVEN)
    _, z, visible = fused_scores(o, s, seen, multiplier, bias, False, HIDES)
    p = tl.exp2((z - lse) * LOG2E)
    return z, visible, multiplier, p, p * (dp - delta)


@triton.jit
def _near_slope(
    o, z, dp, batch, head, rows, columns, low, high, Lq, Lk, lse, delta,
    N_TERMS: tl.constexpr, CODE: tl.constexpr, TRANSPOSED: tl.constexpr,
):  # fmt: skip
    """(P, dZ) of the local half."""
    kept = kept_by_pattern(
        o.terms, batch, head, rows, columns, low, high, Lq, Lk, N_TERMS, CODE, TRANSPOSED
    )
    p = tl.where(kept, tl.exp2((z - lse) * LOG2E), 0.0)
    return p, p * (dp - delta)


@triton.jit(do_not_specialize=VARYING)
def global_local_rows_kernel(
    o, g, grad_query, grads, scale, B, H, Lq, Lk, tiles,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    CHUNK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    N_TERMS: tl.constexpr, CODE: tl.constexpr, HIDES: tl.constexpr, EVEN: tl.constexpr,
    ORDER: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dQ of BLOCK_M rows; with it the gradient of a mask that has its own head and sample, and the
    sums along rows that a mask without columns needs."""
    tile, batch, head = program_tile(tiles, B, H, ORDER)
    pair = batch * H + head
    first = tile * BLOCK_M
    row = first + tl.arange(0, BLOCK_M)
    rows = row[:, None]
    near_start, near_length = near_tiles(
        o.terms, head, first, Lq, Lk, BLOCK_M, BLOCK_N, N_TERMS, CODE, False
    )
    low, high = key_bounds(o.terms, head, rows, Lq, Lk, N_TERMS, CODE, False)

    keys = base_of(o.key, batch, head)
    values = base_of(o.value, batch, head)
    queries = base_of(o.query, batch, head)
    whole_grad_outs = base_of(g.whole.grad_out, batch, head)
    near_grad_outs = base_of(g.near.grad_out, batch, head)
    q = load_rows(queries, o.query.row, row, Lq, D, BLOCK_D, EVEN)
    whole_do = load_rows(whole_grad_outs, g.whole.grad_out.row, row, Lq, DV, BLOCK_DV, EVEN)
    near_do = load_rows(near_grad_outs, g.near.grad_out.row, row, Lq, DV, BLOCK_DV, EVEN)
    lse, delta = row_statistics(g.whole.lse, g.whole.delta, pair, row, Lq)
    near_lse, near_delta = row_statistics(g.near.lse, g.near.delta, pair, row, Lq)
    dq = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    multiplier_sums = tl.zeros([BLOCK_M], tl.float32)
    bias_sums = tl.zeros([BLOCK_M], tl.float32)
    for PART in tl.static_range(2):
        for at in range(0, part_length(near_length, Lk, BLOCK_N, PART), BLOCK_N):
            column = part_start(at, near_start, near_length, PART) + tl.arange(0, BLOCK_N)
            columns = column[None, :]
            k = load_rows(keys, o.key.row, column, Lk, D, BLOCK_D, EVEN)
            v = load_rows(values, o.value.row, column, Lk, DV, BLOCK_DV, EVEN)
            s = product_of_tiles(
                q, k, queries, o.query.row, row, Lq, keys, o.key.row, column, Lk,
                D, BLOCK_D, CHUNK_D, EVEN, PRECISION,
            )  # fmt: skip
            s = s * scale
            dp = product_of_tiles(
                whole_do, v, whole_grad_outs, g.whole.grad_out.row, row, Lq,
                values, o.value.row, column, Lk, DV, BLOCK_DV, CHUNK_D, EVEN, PRECISION,
            )  # fmt: skip
            z, visible, multiplier, _, dz = _whole_slope(
                o, s, dp, batch, head, rows, columns, low, high, Lq, Lk,
                lse[:, None], delta[:, None], False, HIDES, EVEN,
            )  # fmt: skip
            if PART == 0:
                dp = product_of_tiles(
                    near_do, v, near_grad_outs, g.near.grad_out.row, row, Lq,
                    values, o.value.row, column, Lk, DV, BLOCK_DV, CHUNK_D, EVEN, PRECISION,
                )  # fmt: skip
                _, more = _near_slope(
                    o, z, dp, batch, head, rows, columns, low, high, Lq, Lk,
                    near_lse[:, None], near_delta[:, None], N_TERMS, CODE, False,
                )  # fmt: skip
                dz += more
            dm = dz * s
            if grads.multiplier is not None:
                mask_gradient_tile(grads.multiplier, batch, head, rows, columns, Lq, Lk, dm)
            if grads.bias is not None:
                mask_gradient_tile(grads.bias, batch, head, rows, columns, Lq, Lk, dz)
            if grads.multiplier_sums is not None:
                multiplier_sums += tl.sum(dm, 1)
            if grads.bias_sums is not None:
                bias_sums += tl.sum(dz, 1)
            if grad_query is not None:
                ds = score_slope(o, dz, visible, multiplier, HIDES)
                dq = tl.dot(ds.to(k.dtype), k, dq, input_precision=PRECISION)

    if grad_query is not None:
        store_rows(grad_query, pair, row, Lq, D, BLOCK_D, dq * scale)
    at = pair.to(tl.int64) * Lq + row
    if grads.multiplier_sums is not None:
        tl.store(grads.multiplier_sums + at, multiplier_sums, mask=row < Lq)
    if grads.bias_sums is not None:
        tl.store(grads.bias_sums + at, bias_sums, mask=row < Lq)


@triton.jit(do_not_specialize=VARYING)
def global_local_columns_kernel(
    o, g, grad_key, grad_value, grads, scale, B, H, Lq, Lk, tiles,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    CHUNK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    N_TERMS: tl.constexpr, CODE: tl.constexpr, HIDES: tl.constexpr, EVEN: tl.constexpr,
    ORDER: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dK and dV of BLOCK_N keys, tiles transposed; sums along columns."""
    tile, batch, head = program_tile(tiles, B, H, ORDER)
    pair = batch * H + head
    first = tile * BLOCK_N
    column = first + tl.arange(0, BLOCK_N)
    columns = column[:, None]
    near_start, near_length = near_tiles(
        o.terms, head, first, Lk, Lq, BLOCK_N, BLOCK_M, N_TERMS, CODE, True
    )
    low, high = key_bounds(o.terms, head, columns, Lk, Lq, N_TERMS, CODE, True)
    SLOPES: tl.constexpr = (
        grad_key is not None
        or grads.multiplier is not None
        or grads.bias is not None
        or grads.multiplier_sums is not None
        or grads.bias_sums is not None
    )
    queries = base_of(o.query, batch, head)
    whole_grad_outs = base_of(g.whole.grad_out, batch, head)
    near_grad_outs = base_of(g.near.grad_out, batch, head)
    keys = base_of(o.key, batch, head)
    values = base_of(o.value, batch, head)
    k = load_rows(keys, o.key.row, column, Lk, D, BLOCK_D, EVEN)
    v = load_rows(values, o.value.row, column, Lk, DV, BLOCK_DV, EVEN)
    dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dv = tl.zeros([BLOCK_N, BLOCK_DV], tl.float32)
    multiplier_sums = tl.zeros([BLOCK_N], tl.float32)
    bias_sums = tl.zeros([BLOCK_N], tl.float32)
    for PART in tl.static_range(2):
        for at in range(0, part_length(near_length, Lq, BLOCK_M, PART), BLOCK_M):
            row = part_start(at, near_start, near_length, PART) + tl.arange(0, BLOCK_M)
            rows = row[None, :]
            q = load_rows(queries, o.query.row, row, Lq, D, BLOCK_D, EVEN)
            do = load_rows(whole_grad_outs, g.whole.grad_out.row, row, Lq, DV, BLOCK_DV, EVEN)
            lse, delta = row_statistics(g.whole.lse, g.whole.delta, pair, row, Lq)
            s = product_of_tiles(
                k, q, keys, o.key.row, column, Lk, queries, o.query.row, row, Lq,
                D, BLOCK_D, CHUNK_D, EVEN, PRECISION,
            )  # fmt: skip
            s = s * scale
            dp = s
            if SLOPES:
                dp = product_of_tiles(
                    v, do, values, o.value.row, column, Lk,
                    whole_grad_outs, g.whole.grad_out.row, row, Lq,
                    DV, BLOCK_DV, CHUNK_D, EVEN, PRECISION,
                )  # fmt: skip
            z, visible, multiplier, p, dz = _whole_slope(
                o, s, dp, batch, head, rows, columns, low, high, Lq, Lk,
                lse[None, :], delta[None, :], True, HIDES, EVEN,
            )  # fmt: skip
            if grad_value is not None:
                dv = tl.dot(p.to(do.dtype), do, dv, input_precision=PRECISION)
            if PART == 0:
                do = load_rows(near_grad_outs, g.near.grad_out.row, row, Lq, DV, BLOCK_DV, EVEN)
                lse, delta = row_statistics(g.near.lse, g.near.delta, pair, row, Lq)
                if SLOPES:
                    dp = product_of_tiles(
                        v, do, values, o.value.row, column, Lk,
                        near_grad_outs, g.near.grad_out.row, row, Lq,
                        DV, BLOCK_DV, CHUNK_D, EVEN, PRECISION,
                    )  # fmt: skip
                p, more = _near_slope(
                    o, z, dp, batch, head, rows, columns, low, high, Lq, Lk,
                    lse[None, :], delta[None, :], N_TERMS, CODE, True,
                )  # fmt: skip
                if grad_value is not None:
                    dv = tl.dot(p.to(do.dtype), do, dv, input_precision=PRECISION)
                dz += more
            dm = dz * s
            if grads.multiplier is not None:
                mask_gradient_tile(grads.multiplier, batch, head, rows, columns, Lq, Lk, dm)
            if grads.bias is not None:
                mask_gradient_tile(grads.bias, batch, head, rows, columns, Lq, Lk, dz)
            if grads.multiplier_sums is not None:
                multiplier_sums += tl.sum(dm, 1)
            if grads.bias_sums is not None:
                bias_sums += tl.sum(dz, 1)
            if grad_key is not None:
                ds = score_slope(o, dz, visible, multiplier, HIDES)
                dk = tl.dot(ds.to(q.dtype), q, dk, input_precision=PRECISION)

    at = pair.to(tl.int64) * Lk + column
    if grads.multiplier_sums is not None:
        tl.store(grads.multiplier_sums + at, multiplier_sums, mask=column < Lk)
    if grads.bias_sums is not None:
        tl.store(grads.bias_sums + at, bias_sums, mask=column < Lk)
    if grad_key is not None:
        store_rows(grad_key, pair, column, Lk, D, BLOCK_D, dk * scale)
    if grad_value is not None:
        store_rows(grad_value, pair, column, Lk, DV, BLOCK_DV, dv)


@triton.jit(do_not_specialize=(*VARYING, "row_tiles", "column_tiles", "batches", "heads", "splits"))
def global_local_tiles_kernel(
    o, g, grads, split_stride, scale, H, Lq, Lk,
    row_tiles, column_tiles, batches, heads, splits,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    N_TERMS: tl.constexpr, CODE: tl.constexpr, HIDES: tl.constexpr, EVEN: tl.constexpr,
    PRECISION: tl.constexpr, CHUNK_D: tl.constexpr,
):  # fmt: skip
    """The gradient of one tile of a mask, summed over the batches x heads that share it.

    Programs and splits: as those of masked_attention_backward.tiles_kernel.
    """
    column_tile, row_tile, split, own_batch, own_head = program_mask_tile(
        row_tiles, column_tiles, splits, H // heads
    )
    first_row = row_tile * BLOCK_M
    first_column = column_tile * BLOCK_N
    row = first_row + tl.arange(0, BLOCK_M)
    column = first_column + tl.arange(0, BLOCK_N)
    rows = row[:, None]
    columns = column[None, :]

    dm_total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    da_total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for sharer in range(split, batches * heads, splits):
        batch = own_batch + sharer // heads
        head = own_head + sharer % heads
        pair = batch * H + head
        low, high = key_bounds(o.terms, head, rows, Lq, Lk, N_TERMS, CODE, False)
        begin, stop = tile_range(
            o.terms, head, first_row, Lq, Lk, 1, 0, BLOCK_M, N_TERMS, CODE, False, False
        )
        values = base_of(o.value, batch, head)
        lse, delta = row_statistics(g.whole.lse, g.whole.delta, pair, row, Lq)
        s = product_of_rows(
            base_of(o.query, batch, head), o.query.row, row, Lq,
            base_of(o.key, batch, head), o.key.row, column, Lk,
            D, BLOCK_D, CHUNK_D, EVEN, PRECISION,
        )  # fmt: skip
        s = s * scale
        dp = product_of_rows(
            base_of(g.whole.grad_out, batch, head), g.whole.grad_out.row, row, Lq,
            values, o.value.row, column, Lk, DV, BLOCK_DV, CHUNK_D, EVEN, PRECISION,
        )  # fmt: skip
        z, _, _, _, dz = _whole_slope(
            o, s, dp, batch, head, rows, columns, low, high, Lq, Lk,
            lse[:, None], delta[:, None], False, HIDES, EVEN,
        )  # fmt: skip
        if (first_column < stop) & (first_column + BLOCK_N > begin):
            near_lse, near_delta = row_statistics(g.near.lse, g.near.delta, pair, row, Lq)
            near_dp = product_of_rows(
                base_of(g.near.grad_out, batch, head), g.near.grad_out.row, row, Lq,
                values, o.value.row, column, Lk, DV, BLOCK_DV, CHUNK_D, EVEN, PRECISION,
            )  # fmt: skip
            _, more = _near_slope(
                o, z, near_dp, batch, head, rows, columns, low, high, Lq, Lk,
                near_lse[:, None], near_delta[:, None], N_TERMS, CODE, False,
            )  # fmt: skip
            dz += more
        if grads.multiplier is not None:
            dm_total += dz * s
        if grads.bias is not None:
            da_total += dz
    ahead = split.to(tl.int64) * split_stride
    if grads.multiplier is not None:
        mask_gradient_tile(
            grads.multiplier, own_batch, own_head, rows, columns, Lq, Lk, dm_total, ahead
        )
    if grads.bias is not None:
        mask_gradient_tile(grads.bias, own_batch, own_head, rows, columns, Lq, Lk, da_total, ahead)
