"""Backward kernels of attention with gated maps. Every element is summed by one program in a fixed
order: no atomics, bitwise the same every time.

    heads  one program, one head: dQ, and dK and dV, which grow in memory row tile by row tile
    gates  one program, one tile of columns of both gates: loops over heads and their rows

A row of the gate's slope depends on whole rows of both maps, and a row of the maps' slopes on a
whole row of it. `heads` therefore keeps, for the row tile it works on, R, dU, dA^g and dA^l in
memory of its own, [4, BLOCK_M, T]: small enough for the second-level cache, and never [T, T].
A program reads there what its other threads wrote, so each phase ends with a barrier.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .map_gated_attention_forward import gate_tile, map_tiles, rows_of_head, share_tile
from .masked_attention_forward import VARYING
from .patterns import part_length, part_start
from .tiles import base_of, load_rows, product_of_rows, store_rows


@triton.jit
def _norms_of_rows(kept, pair, row, T):
    """(what map_tiles takes), zeros outside: a map without weights."""
    at = pair.to(tl.int64) * T + row
    inside = row < T
    return (
        tl.load(kept.largest + at, mask=inside, other=0.0)[:, None],
        tl.load(kept.inverse + at, mask=inside, other=0.0)[:, None],
        tl.load(kept.near_largest + at, mask=inside, other=0.0)[:, None],
        tl.load(kept.near_inverse + at, mask=inside, other=0.0)[:, None],
    )


@triton.jit
def _mixed_slope(
    o, kept, grad_out, pair, batch, head, row, column, T,
    DV: tl.constexpr, BLOCK_DV: tl.constexpr, CHUNK_D: tl.constexpr, EVEN: tl.constexpr,
    PRECISION: tl.constexpr, RENORMALISE: tl.constexpr,
):  # fmt: skip
    """dA."""
    da = product_of_rows(
        base_of(grad_out, batch, head), grad_out.row, row, T,
        base_of(o.value, batch, head), o.value.row, column, T,
        DV, BLOCK_DV, CHUNK_D, EVEN, PRECISION,
    )  # fmt: skip
    if RENORMALISE:
        at = pair.to(tl.int64) * T + row
        along = tl.load(kept.along + at, mask=row < T, other=0.0)
        share = tl.load(kept.share + at, mask=row < T, other=0.0)
        da = (da - along[:, None]) * share[:, None]
    return da


@triton.jit
def _logit_slope(da, r, whole, near, PART: tl.constexpr):
    """dU."""
    steep = da * r * (1.0 - r)
    if PART == 0:
        return steep * (whole - near)
    else:
        return steep * whole


@triton.jit
def _add(pointer, at, mask, value):
    """An element meets this once between two barriers: other threads may add to it next."""
    tl.store(pointer + at, tl.load(pointer + at, mask=mask, other=0.0) + value, mask=mask)


@triton.jit
def _add_rows(pointer, pair, row, T, D: tl.constexpr, BLOCK_D: tl.constexpr, value):
    """To rows of a contiguous float32 [pairs, T, D]."""
    d = tl.arange(0, BLOCK_D)[None, :]
    _add(
        pointer + pair.to(tl.int64) * (T * D),
        row[:, None] * D + d,
        (row[:, None] < T) & (d < D),
        value,
    )


@triton.jit(do_not_specialize=VARYING)
def map_gated_heads_kernel(
    o, gates, kept, grad_out, grad_query, key_sums, value_sums, room, scale, H, T,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    CHUNK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    N_TERMS: tl.constexpr, CODE: tl.constexpr, HIDES: tl.constexpr, EVEN: tl.constexpr,
    PRECISION: tl.constexpr, GATE_TYPE: tl.constexpr, GATE_PRECISION: tl.constexpr,
    RENORMALISE: tl.constexpr,
):  # fmt: skip
    """dQ of one head, and dK and dV added to float32 key_sums and value_sums, each None where not
    wanted. room: float32 [pairs, 4, BLOCK_M, T]."""
    pair = tl.program_id(0)
    batch = pair // H
    head = pair % H
    MAPS: tl.constexpr = grad_query is not None or key_sums is not None
    in_room = tl.arange(0, BLOCK_M)[:, None] * T
    plane = BLOCK_M * T
    shares = room + pair.to(tl.int64) * (4 * plane)
    logits = shares + plane
    wholes = logits + plane
    nears = wholes + plane
    for first in range(0, T, BLOCK_M):
        row = first + tl.arange(0, BLOCK_M)
        place = rows_of_head(o, batch, head, first, T, BLOCK_M, BLOCK_N, N_TERMS, CODE)
        norms = _norms_of_rows(kept, pair, row, T)
        for PART in tl.static_range(2):
            for at in range(0, part_length(place[6], T, BLOCK_N, PART), BLOCK_N):
                column = part_start(at, place[5], place[6], PART) + tl.arange(0, BLOCK_N)
                columns = column[None, :]
                r = share_tile(
                    o, gates, place, norms, column, scale, T,
                    D, BLOCK_D, CHUNK_D, BLOCK_M, BLOCK_N, N_TERMS, CODE, HIDES, EVEN, PRECISION,
                    GATE_TYPE, GATE_PRECISION,
                )  # fmt: skip
                whole, near = map_tiles(
                    o, place, norms, column, scale, T,
                    D, BLOCK_D, CHUNK_D, N_TERMS, CODE, HIDES, EVEN, PRECISION, PART,
                )  # fmt: skip
                if value_sums is not None:
                    mixed = r * whole
                    if PART == 0:
                        mixed += (1.0 - r) * near
                    if RENORMALISE:
                        at_row = pair.to(tl.int64) * T + row
                        share = tl.load(kept.share + at_row, mask=row < T, other=0.0)
                        mixed = mixed * share[:, None]
                    do = load_rows(
                        base_of(grad_out, batch, head), grad_out.row, row, T, DV, BLOCK_DV, EVEN
                    )
                    dv = tl.dot(tl.trans(mixed.to(do.dtype)), do, input_precision=PRECISION)
                    _add_rows(value_sums, pair, column, T, DV, BLOCK_DV, dv)
                if MAPS:
                    da = _mixed_slope(
                        o, kept, grad_out, pair, batch, head, row, column, T,
                        DV, BLOCK_DV, CHUNK_D, EVEN, PRECISION, RENORMALISE,
                    )  # fmt: skip
                    du = _logit_slope(da, r, whole, near, PART)
                    tl.store(shares + in_room + columns, r, mask=columns < T)
                    tl.store(logits + in_room + columns, du, mask=columns < T)
        tl.debug_barrier()
        if MAPS:
            whole_mean = tl.zeros([BLOCK_M], tl.float32)
            near_mean = tl.zeros([BLOCK_M], tl.float32)
            for PART in tl.static_range(2):
                for at in range(0, part_length(place[6], T, BLOCK_N, PART), BLOCK_N):
                    column = part_start(at, place[5], place[6], PART) + tl.arange(0, BLOCK_N)
                    columns = column[None, :]
                    whole_slope = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
                    near_slope = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
                    for begin in range(0, T, BLOCK_N):
                        inner = begin + tl.arange(0, BLOCK_N)
                        du = tl.load(
                            logits + in_room + inner[None, :], mask=inner[None, :] < T, other=0.0
                        ).to(GATE_TYPE)
                        w = gate_tile(gates.whole, columns, inner[:, None], T, GATE_TYPE)
                        whole_slope = tl.dot(du, w, whole_slope, input_precision=GATE_PRECISION)
                        if PART == 0:
                            w = gate_tile(gates.near, columns, inner[:, None], T, GATE_TYPE)
                            near_slope = tl.dot(du, w, near_slope, input_precision=GATE_PRECISION)
                    r = tl.load(shares + in_room + columns, mask=columns < T, other=0.0)
                    da = _mixed_slope(
                        o, kept, grad_out, pair, batch, head, row, column, T,
                        DV, BLOCK_DV, CHUNK_D, EVEN, PRECISION, RENORMALISE,
                    )  # fmt: skip
                    whole, near = map_tiles(
                        o, place, norms, column, scale, T,
                        D, BLOCK_D, CHUNK_D, N_TERMS, CODE, HIDES, EVEN, PRECISION, PART,
                    )  # fmt: skip
                    whole_slope = da * r + whole_slope
                    whole_mean += tl.sum(whole * whole_slope, 1)
                    tl.store(wholes + in_room + columns, whole_slope, mask=columns < T)
                    if PART == 0:
                        near_slope = da * (1.0 - r) - near_slope
                        near_mean += tl.sum(near * near_slope, 1)
                        tl.store(nears + in_room + columns, near_slope, mask=columns < T)
            tl.debug_barrier()
            dq = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
            for PART in tl.static_range(2):
                for at in range(0, part_length(place[6], T, BLOCK_N, PART), BLOCK_N):
                    column = part_start(at, place[5], place[6], PART) + tl.arange(0, BLOCK_N)
                    columns = column[None, :]
                    whole, near = map_tiles(
                        o, place, norms, column, scale, T,
                        D, BLOCK_D, CHUNK_D, N_TERMS, CODE, HIDES, EVEN, PRECISION, PART,
                    )  # fmt: skip
                    slope = tl.load(wholes + in_room + columns, mask=columns < T, other=0.0)
                    ds = whole * (slope - whole_mean[:, None])
                    if PART == 0:
                        slope = tl.load(nears + in_room + columns, mask=columns < T, other=0.0)
                        ds += near * (slope - near_mean[:, None])
                    ds = (ds * scale).to(o.query.pointer.dtype.element_ty)
                    if grad_query is not None:
                        k = load_rows(
                            base_of(o.key, batch, head), o.key.row, column, T, D, BLOCK_D, EVEN
                        )
                        dq = tl.dot(ds, k, dq, input_precision=PRECISION)
                    if key_sums is not None:
                        q = load_rows(
                            base_of(o.query, batch, head), o.query.row, row, T, D, BLOCK_D, EVEN
                        )
                        dk = tl.dot(tl.trans(ds), q, input_precision=PRECISION)
                        _add_rows(key_sums, pair, column, T, D, BLOCK_D, dk)
            if grad_query is not None:
                store_rows(grad_query, pair, row, T, D, BLOCK_D, dq)
            tl.debug_barrier()


@triton.jit(do_not_specialize=(*VARYING, "splits"))
def map_gated_gates_kernel(
    o, gates, kept, grad_out, whole_sums, near_sums, scale, pairs, H, T, tiles, splits,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    CHUNK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    N_TERMS: tl.constexpr, CODE: tl.constexpr, HIDES: tl.constexpr, EVEN: tl.constexpr,
    PRECISION: tl.constexpr, GATE_TYPE: tl.constexpr, GATE_PRECISION: tl.constexpr,
    RENORMALISE: tl.constexpr,
):  # fmt: skip
    """Columns of dW^g and dW^l, added to float32 [splits, T, T], each None where not wanted. A
    split takes every splits-th head into a sum of its own.

    R of a tile of columns takes the gates' columns alone, so programs repeat only Q K^T.
    """
    tile = tl.program_id(0) % tiles
    split = tl.program_id(0) // tiles
    own = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    ahead = split.to(tl.int64) * (T * T)
    for member in range(0, tl.cdiv(pairs - split, splits)):
        pair = split + member * splits
        batch = pair // H
        head = pair % H
        for first in range(0, T, BLOCK_M):
            row = first + tl.arange(0, BLOCK_M)
            place = rows_of_head(o, batch, head, first, T, BLOCK_M, BLOCK_N, N_TERMS, CODE)
            norms = _norms_of_rows(kept, pair, row, T)
            r = share_tile(
                o, gates, place, norms, own, scale, T,
                D, BLOCK_D, CHUNK_D, BLOCK_M, BLOCK_N, N_TERMS, CODE, HIDES, EVEN, PRECISION,
                GATE_TYPE, GATE_PRECISION,
            )  # fmt: skip
            da = _mixed_slope(
                o, kept, grad_out, pair, batch, head, row, own, T,
                DV, BLOCK_DV, CHUNK_D, EVEN, PRECISION, RENORMALISE,
            )  # fmt: skip
            whole, near = map_tiles(
                o, place, norms, own, scale, T,
                D, BLOCK_D, CHUNK_D, N_TERMS, CODE, HIDES, EVEN, PRECISION, 0,
            )  # fmt: skip
            du = _logit_slope(da, r, whole, near, 0).to(GATE_TYPE)
            for PART in tl.static_range(2):
                for at in range(0, part_length(place[6], T, BLOCK_N, PART), BLOCK_N):
                    inner = part_start(at, place[5], place[6], PART) + tl.arange(0, BLOCK_N)
                    whole, near = map_tiles(
                        o, place, norms, inner, scale, T,
                        D, BLOCK_D, CHUNK_D, N_TERMS, CODE, HIDES, EVEN, PRECISION, PART,
                    )  # fmt: skip
                    to = inner[:, None] * T + own[None, :]
                    inside = (inner[:, None] < T) & (own[None, :] < T)
                    if whole_sums is not None:
                        dw = tl.dot(
                            tl.trans(whole.to(GATE_TYPE)), du, input_precision=GATE_PRECISION
                        )
                        _add(whole_sums + ahead, to, inside, dw)
                    if near_sums is not None and PART == 0:
                        dw = tl.dot(
                            tl.trans((-near).to(GATE_TYPE)), du, input_precision=GATE_PRECISION
                        )
                        _add(near_sums + ahead, to, inside, dw)
            tl.debug_barrier()
