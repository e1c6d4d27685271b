"""Forward kernel of attention with gated maps, and what its kernels share: tiles of both maps and
of the gate.

    A^g, A^l  softmax of the scores S, all and those of the pattern
    R         sigmoid(A^g W^g - A^l W^l), whose tile takes a row of both maps
    A         R A^g + (1 - R) A^l

A tile of a map is formed from Q K^T again wherever it is needed: that costs D multiply-adds an
element where the product with a gate costs T. What lies between are numbers a row (Norms). The
local map is only formed on tiles that its pattern touches; there, and only there, PART is 0.
Gates are addressed in 32 bits (map_gated_attention.py copies one that would not fit).
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from .masked_attention_forward import VARYING
from .patterns import key_bounds, near_tiles, part_length, part_start
from .tiles import (
    LOG2E,
    base_of,
    kept_by_pattern,
    load_rows,
    product_of_rows,
    program_tile,
    seen_pairs,
    softmax_step,
    store_rows,
)

_INF = tl.constexpr(float("inf"))


class Gate(NamedTuple):
    """[T, T]; strides in elements."""

    pointer: Tensor
    row: int
    column: int


class Gates(NamedTuple):
    whole: Gate
    near: Gate
    END: None = None  # see masks.py


class Norms(NamedTuple):
    """Float32 [B, H, T] each: a map is exp(S - largest) * inverse."""

    largest: Tensor
    inverse: Tensor
    near_largest: Tensor
    near_inverse: Tensor
    share: Tensor  # 1 / the sum of a row of the rounded mixed map; only with renormalise
    along: Tensor  # rowsum(dO * O); only with renormalise


@triton.jit
def gate_tile(gate, rows, columns, T, GATE_TYPE: tl.constexpr):
    """Rows and columns expanded, either way round; zeros outside."""
    at = rows * gate.row + columns * gate.column
    return tl.load(gate.pointer + at, mask=(rows < T) & (columns < T), other=0.0).to(GATE_TYPE)


@triton.jit
def rows_of_head(
    o, batch, head, first, T, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    N_TERMS: tl.constexpr, CODE: tl.constexpr,
):  # fmt: skip
    """Where a tile of rows is and which keys its pattern keeps, as scores_tile takes it."""
    row = first + tl.arange(0, BLOCK_M)
    start, length = near_tiles(o.terms, head, first, T, T, BLOCK_M, BLOCK_N, N_TERMS, CODE, False)
    low, high = key_bounds(o.terms, head, row[:, None], T, T, N_TERMS, CODE, False)
    return batch, head, row, low, high, start, length


@triton.jit
def scores_tile(
    o, place, column, scale, T, D: tl.constexpr, BLOCK_D: tl.constexpr, CHUNK_D: tl.constexpr,
    N_TERMS: tl.constexpr, CODE: tl.constexpr, HIDES: tl.constexpr, EVEN: tl.constexpr,
    PRECISION: tl.constexpr, PART: tl.constexpr,
):  # fmt: skip
    """(S where the key mask shows the key, and where the pattern does as well), -inf elsewhere."""
    batch, head, row, low, high, _, _ = place
    rows = row[:, None]
    columns = column[None, :]
    s = product_of_rows(
        base_of(o.query, batch, head), o.query.row, row, T,
        base_of(o.key, batch, head), o.key.row, column, T,
        D, BLOCK_D, CHUNK_D, EVEN, PRECISION,
    )  # fmt: skip
    s = s * scale
    if HIDES:
        seen = seen_pairs(o, batch, head, rows, columns, low, high, T, T, 0, 0, False, EVEN)
        s = tl.where(seen, s, -_INF)
    near = s
    if PART == 0:
        kept = kept_by_pattern(
            o.terms, batch, head, rows, columns, low, high, T, T, N_TERMS, CODE, False
        )
        near = tl.where(kept, s, -_INF)
    return s, near


@triton.jit
def map_tiles(
    o, place, norms, column, scale, T,
    D: tl.constexpr, BLOCK_D: tl.constexpr, CHUNK_D: tl.constexpr,
    N_TERMS: tl.constexpr, CODE: tl.constexpr, HIDES: tl.constexpr, EVEN: tl.constexpr,
    PRECISION: tl.constexpr, PART: tl.constexpr,
):  # fmt: skip
    """(A^g, A^l); nothing that may be used for A^l where PART is 1."""
    whole, near = scores_tile(
        o, place, column, scale, T,
        D, BLOCK_D, CHUNK_D, N_TERMS, CODE, HIDES, EVEN, PRECISION, PART,
    )  # fmt: skip
    whole = tl.exp2((whole - norms[0]) * LOG2E) * norms[1]
    if PART == 0:
        near = tl.exp2((near - norms[2]) * LOG2E) * norms[3]
    return whole, near


@triton.jit
def share_tile(
    o, gates, place, norms, column, scale, T,
    D: tl.constexpr, BLOCK_D: tl.constexpr, CHUNK_D: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    N_TERMS: tl.constexpr, CODE: tl.constexpr, HIDES: tl.constexpr, EVEN: tl.constexpr,
    PRECISION: tl.constexpr, GATE_TYPE: tl.constexpr, GATE_PRECISION: tl.constexpr,
):  # fmt: skip
    """R: the global map's share of each pair."""
    logit = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for PART in tl.static_range(2):
        for at in range(0, part_length(place[6], T, BLOCK_N, PART), BLOCK_N):
            inner = part_start(at, place[5], place[6], PART) + tl.arange(0, BLOCK_N)
            whole, near = map_tiles(
                o, place, norms, inner, scale, T, D, BLOCK_D, CHUNK_D,
                N_TERMS, CODE, HIDES, EVEN, PRECISION, PART,
            )  # fmt: skip
            w = gate_tile(gates.whole, inner[:, None], column[None, :], T, GATE_TYPE)
            logit = tl.dot(whole.to(GATE_TYPE), w, logit, input_precision=GATE_PRECISION)
            if PART == 0:
                w = gate_tile(gates.near, inner[:, None], column[None, :], T, GATE_TYPE)
                logit = tl.dot((-near).to(GATE_TYPE), w, logit, input_precision=GATE_PRECISION)
    return 1.0 / (1.0 + tl.exp2(-logit * LOG2E))


@triton.jit(do_not_specialize=VARYING)
def map_gated_forward_kernel(
    o, gates, out, kept, grad_out, scale, B, H, T, tiles,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    CHUNK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    N_TERMS: tl.constexpr, CODE: tl.constexpr, HIDES: tl.constexpr, EVEN: tl.constexpr,
    PRECISION: tl.constexpr, GATE_TYPE: tl.constexpr, GATE_PRECISION: tl.constexpr,
    RENORMALISE: tl.constexpr,
):  # fmt: skip
    """Forward: out of BLOCK_M rows of one head. Backward: `kept`, the Norms of those rows."""
    tile, batch, head = program_tile(tiles, B, H, "tiles")
    pair = batch * H + head
    first = tile * BLOCK_M
    row = first + tl.arange(0, BLOCK_M)
    place = rows_of_head(o, batch, head, first, T, BLOCK_M, BLOCK_N, N_TERMS, CODE)

    largest = tl.full([BLOCK_M], -_INF, tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    near_largest = largest
    near_total = total
    for PART in tl.static_range(2):
        for at in range(0, part_length(place[6], T, BLOCK_N, PART), BLOCK_N):
            column = part_start(at, place[5], place[6], PART) + tl.arange(0, BLOCK_N)
            s, near = scores_tile(
                o, place, column, scale, T,
                D, BLOCK_D, CHUNK_D, N_TERMS, CODE, HIDES, EVEN, PRECISION, PART,
            )  # fmt: skip
            _, _, largest, total = softmax_step(s, largest, total)
            if PART == 0:
                _, _, near_largest, near_total = softmax_step(near, near_largest, near_total)
    largest = tl.where(total == 0.0, 0.0, largest)
    near_largest = tl.where(near_total == 0.0, 0.0, near_largest)
    inverse = tl.where(total == 0.0, 0.0, 1.0 / total)
    near_inverse = tl.where(near_total == 0.0, 0.0, 1.0 / near_total)
    inside = row < T
    at_row = pair.to(tl.int64) * T + row
    if kept is not None:
        tl.store(kept.largest + at_row, largest, mask=inside)
        tl.store(kept.inverse + at_row, inverse, mask=inside)
        tl.store(kept.near_largest + at_row, near_largest, mask=inside)
        tl.store(kept.near_inverse + at_row, near_inverse, mask=inside)

    if out is not None or RENORMALISE:
        norms = (
            largest[:, None], inverse[:, None], near_largest[:, None], near_inverse[:, None]
        )  # fmt: skip
        values = base_of(o.value, batch, head)
        result = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
        sums = tl.zeros([BLOCK_M], tl.float32)
        for PART in tl.static_range(2):
            for at in range(0, part_length(place[6], T, BLOCK_N, PART), BLOCK_N):
                column = part_start(at, place[5], place[6], PART) + tl.arange(0, BLOCK_N)
                r = share_tile(
                    o, gates, place, norms, column, scale, T,
                    D, BLOCK_D, CHUNK_D, BLOCK_M, BLOCK_N, N_TERMS, CODE, HIDES, EVEN, PRECISION,
                    GATE_TYPE, GATE_PRECISION,
                )  # fmt: skip
                whole, near = map_tiles(
                    o, place, norms, column, scale, T,
                    D, BLOCK_D, CHUNK_D, N_TERMS, CODE, HIDES, EVEN, PRECISION, PART,
                )  # fmt: skip
                mixed = r * whole
                if PART == 0:
                    mixed += (1.0 - r) * near
                v = load_rows(values, o.value.row, column, T, DV, BLOCK_DV, EVEN)
                weights = mixed.to(v.dtype)
                # of the rounded weights, for those of a row to be 1 together
                sums += tl.sum(weights.to(tl.float32), 1)
                result = tl.dot(weights, v, result, input_precision=PRECISION)
        share = tl.where(sums == 0.0, 0.0, 1.0 / sums)
        if RENORMALISE:
            result = result * share[:, None]
        if out is not None:
            store_rows(out, pair, row, T, DV, BLOCK_DV, result)
        if kept is not None:
            do = load_rows(base_of(grad_out, batch, head), grad_out.row, row, T, DV, BLOCK_DV, EVEN)
            tl.store(kept.share + at_row, share, mask=inside)
            tl.store(kept.along + at_row, tl.sum(result * do.to(tl.float32), 1), mask=inside)
