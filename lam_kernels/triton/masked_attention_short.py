"""Masked attention where all rows and keys of a head fit in one tile: one kernel each way.

A program takes PACK heads (of any samples, in the order of b * H + h) as one tile: row p of the
tile is row p mod Lq of its head p div Lq, and pairs of two different heads are hidden. A tile that
would be mostly padding is filled that way. The backward pass has S and dP of every pair in one
place, so that all gradients but those of shared masks take five products and one launch.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .masked_attention_forward import VARYING
from .masks import fold_gradient, fold_start, mask_gradient_tile, store_fold
from .patterns import key_bounds
from .philox import kept_pairs
from .tiles import (
    LOG2E,
    base_of,
    fused_scores,
    learned_tile,
    load_rows,
    seen_pairs,
    slopes,
    store_rows,
)

_INF = tl.constexpr(float("inf"))


@triton.jit
def _packed_axis(pairs, H, L, BLOCK: tl.constexpr, PACK: tl.constexpr):
    """(member, position, pair, batch, head) of a tile's rows or columns; position L: padding.

    One number each for pair, batch and head where PACK is 1.
    """
    at = tl.arange(0, BLOCK)
    if PACK == 1:
        pair = tl.program_id(0)
        return at * 0, at, pair, pair // H, pair % H
    else:
        member = at // L
        pair = tl.program_id(0) * PACK + member
        inside = (member < PACK) & (pair < pairs)
        pair = tl.where(inside, pair, 0)
        return member, tl.where(inside, at - member * L, L), pair, pair // H, pair % H


@triton.jit
def _down(x, PACK: tl.constexpr):
    """A vector of the rows as a column of the tile; one number as it is."""
    if PACK == 1:
        return x
    else:
        return x[:, None]


@triton.jit
def _seen(
    o, batch, head, row, column, row_member, column_member, Lq, Lk,
    N_TERMS: tl.constexpr, CODE: tl.constexpr, PACK: tl.constexpr,
):  # fmt: skip
    rows = row[:, None]
    low, high = key_bounds(o.terms, head, rows, Lq, Lk, N_TERMS, CODE, False)
    seen = seen_pairs(
        o, batch, head, rows, column[None, :], low, high, Lq, Lk, N_TERMS, CODE, False, False
    )
    if PACK > 1:
        seen = seen & (row_member[:, None] == column_member[None, :])
    return seen


@triton.jit
def _store_folded(
    fold, slope, batch, head, at, L, other_batch, other_head, other_at, other_L, N: tl.constexpr
):
    """A factor's gradient at the positions `at`, from those of the other factor."""
    for BLOCK in tl.static_range((fold.RANK + fold.BLOCK - 1) // fold.BLOCK):
        begin = BLOCK * fold.BLOCK
        total = fold_start(fold, N)
        total = fold_gradient(
            fold, total, slope, other_batch, other_head, other_at, other_L, begin, False
        )
        store_fold(fold, batch, head, at, L, begin, total)


@triton.jit(do_not_specialize=VARYING)
def short_forward_kernel(
    o, out, lse, scale, seed, offset, threshold, keep_scale, pairs, H, group, Lq, Lk,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PACK: tl.constexpr,
    N_TERMS: tl.constexpr, CODE: tl.constexpr, GATE: tl.constexpr, DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """out and lse of PACK heads."""
    row_member, row, pair, batch, head = _packed_axis(pairs, H, Lq, BLOCK_M, PACK)
    column_member, column, _, column_batch, column_head = _packed_axis(pairs, H, Lk, BLOCK_N, PACK)
    rows = row[:, None]
    columns = column[None, :]
    tile_batch = _down(batch, PACK)
    tile_head = _down(head, PACK)
    key_batch = _down(column_batch, PACK)
    key_head = _down(column_head, PACK)

    q = load_rows(base_of(o.query, tile_batch, tile_head), o.query.row, row, Lq, D, BLOCK_D, False)
    k = load_rows(
        base_of(o.key, key_batch, key_head // group), o.key.row, column, Lk, D, BLOCK_D, False
    )
    v = load_rows(
        base_of(o.value, key_batch, key_head // group), o.value.row, column, Lk, DV, BLOCK_DV, False
    )
    s = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale
    seen = _seen(
        o, tile_batch, tile_head, row, column, row_member, column_member, Lq, Lk,
        N_TERMS, CODE, PACK,
    )  # fmt: skip
    multiplier = learned_tile(
        o.multiplier, tile_batch, tile_head, rows, columns, Lq, Lk, False, True, key_batch, key_head
    )
    bias = learned_tile(
        o.bias, tile_batch, tile_head, rows, columns, Lq, Lk, False, True, key_batch, key_head
    )
    _, z, _ = fused_scores(o, s, seen, multiplier, bias, GATE, True)

    largest = tl.max(z, 1)
    anchor = tl.where(largest == -_INF, 0.0, largest)
    p = tl.exp2((z - anchor[:, None]) * LOG2E)
    total = tl.sum(p, 1)
    empty = total == 0.0
    if DROPOUT:
        kept = kept_pairs(
            rows, 0, columns, _down(pair, PACK), seed, offset, threshold, BLOCK_N, PACK == 1
        )
        p = tl.where(kept, p, 0.0)
    result = tl.dot(p.to(v.dtype), v, input_precision=PRECISION)
    result = result / tl.where(empty, 1.0, total)[:, None]
    if DROPOUT:
        result = result * keep_scale
    store_rows(out, pair, row, Lq, DV, BLOCK_DV, result)
    at = pair.to(tl.int64) * Lq + row
    tl.store(lse + at, tl.where(empty, -_INF, largest + tl.log(total)), mask=row < Lq)


@triton.jit(do_not_specialize=VARYING)
def short_backward_kernel(
    o, g, out, grad_lse, grad_query, grad_key, grad_value, own, rows_sums, columns_sums,
    rows_folds, columns_folds, scale, seed, offset, threshold, keep_scale, pairs, H, group, Lq, Lk,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PACK: tl.constexpr,
    N_TERMS: tl.constexpr, CODE: tl.constexpr, GATE: tl.constexpr, DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """All gradients of PACK heads, and delta for the tiles pass that sums those of shared masks.

    own, rows_sums, columns_sums, rows_folds, columns_folds: (multiplier, bias), each None where not
    wanted. group is 1.
    """
    row_member, row, pair, batch, head = _packed_axis(pairs, H, Lq, BLOCK_M, PACK)
    column_member, column, column_pair, column_batch, column_head = _packed_axis(
        pairs, H, Lk, BLOCK_N, PACK
    )
    rows = row[:, None]
    columns = column[None, :]
    tile_batch = _down(batch, PACK)
    tile_head = _down(head, PACK)
    key_batch = _down(column_batch, PACK)
    key_head = _down(column_head, PACK)

    q = load_rows(base_of(o.query, tile_batch, tile_head), o.query.row, row, Lq, D, BLOCK_D, False)
    k = load_rows(base_of(o.key, key_batch, key_head), o.key.row, column, Lk, D, BLOCK_D, False)
    v = load_rows(
        base_of(o.value, key_batch, key_head), o.value.row, column, Lk, DV, BLOCK_DV, False
    )
    do = load_rows(
        base_of(g.grad_out, tile_batch, tile_head), g.grad_out.row, row, Lq, DV, BLOCK_DV, False
    )
    at = pair.to(tl.int64) * Lq + row
    inside = row < Lq
    lse = tl.load(g.lse + at, mask=inside, other=-_INF)
    lse = tl.where(lse == -_INF, _INF, lse)
    pair_rows = out + _down(pair, PACK).to(tl.int64) * Lq * DV
    result = load_rows(pair_rows, DV, row, Lq, DV, BLOCK_DV, False)
    delta = tl.sum(result.to(tl.float32) * do.to(tl.float32), 1)
    if grad_lse is not None:
        delta -= tl.load(grad_lse + at, mask=inside, other=0.0)
    if g.delta is not None:
        tl.store(g.delta + at, delta, mask=inside)

    s = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale
    dp = tl.dot(do, tl.trans(v), input_precision=PRECISION)
    if DROPOUT:
        kept = kept_pairs(
            rows, 0, columns, _down(pair, PACK), seed, offset, threshold, BLOCK_N, PACK == 1
        )
        dp = tl.where(kept, dp * keep_scale, 0.0)
    seen = _seen(
        o, tile_batch, tile_head, row, column, row_member, column_member, Lq, Lk,
        N_TERMS, CODE, PACK,
    )  # fmt: skip
    multiplier = learned_tile(
        o.multiplier, tile_batch, tile_head, rows, columns, Lq, Lk, False, True, key_batch, key_head
    )
    bias = learned_tile(
        o.bias, tile_batch, tile_head, rows, columns, Lq, Lk, False, True, key_batch, key_head
    )
    p, ds, dm, da = slopes(
        o, s, dp, seen, multiplier, bias, lse[:, None], delta[:, None], GATE, True
    )
    if grad_value is not None:
        if DROPOUT:
            p = tl.where(kept, p * keep_scale, 0.0)
        dv = tl.dot(tl.trans(p.to(do.dtype)), do, input_precision=PRECISION)
        store_rows(grad_value, column_pair, column, Lk, DV, BLOCK_DV, dv)
    ds = ds.to(q.dtype)
    if grad_query is not None:
        dq = tl.dot(ds, k, input_precision=PRECISION) * scale
        store_rows(grad_query, pair, row, Lq, D, BLOCK_D, dq)
    if grad_key is not None:
        dk = tl.dot(tl.trans(ds), q, input_precision=PRECISION) * scale
        store_rows(grad_key, column_pair, column, Lk, D, BLOCK_D, dk)

    same = row_member[:, None] == column_member[None, :]
    for WHICH in tl.static_range(2):
        slope = dm if WHICH == 0 else da
        if own[WHICH] is not None:
            mask_gradient_tile(
                own[WHICH], tile_batch, tile_head, rows, columns, Lq, Lk, slope, 0, same
            )
        if rows_sums[WHICH] is not None:
            tl.store(rows_sums[WHICH] + at, tl.sum(slope, 1), mask=inside)
        if columns_sums[WHICH] is not None:
            below = column_pair.to(tl.int64) * Lk + column
            tl.store(columns_sums[WHICH] + below, tl.sum(slope, 0), mask=column < Lk)
        if rows_folds[WHICH] is not None:
            _store_folded(
                rows_folds[WHICH], slope, tile_batch, tile_head, rows, Lq,
                key_batch, key_head, column[:, None], Lk, BLOCK_M,
            )  # fmt: skip
        if columns_folds[WHICH] is not None:
            _store_folded(
                columns_folds[WHICH], tl.trans(slope), key_batch, key_head, column[:, None], Lk,
                tile_batch, tile_head, rows, Lq, BLOCK_N,
            )  # fmt: skip
