"""Forward kernel of global and local attention: one Q K^T a tile, two online softmaxes."""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from .masked_attention_forward import VARYING
from .patterns import key_bounds, near_tiles, part_length, part_start
from .tiles import (
    base_of,
    fused_scores,
    kept_by_pattern,
    learned_tile,
    load_rows,
    product_of_tiles,
    program_tile,
    seen_pairs,
    softmax_step,
    store_softmax,
)

_INF = tl.constexpr(float("inf"))


class Results(NamedTuple):
    """What the forward kernel writes for one half."""

    out: Tensor  # [B, H, Lq, Dv]
    lse: Tensor  # float32 [B, H, Lq]


@triton.jit(do_not_specialize=VARYING)
def global_local_forward_kernel(
    o, whole, near, scale, B, H, Lq, Lk, tiles,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    CHUNK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    N_TERMS: tl.constexpr, CODE: tl.constexpr, HIDES: tl.constexpr, EVEN: tl.constexpr,
    ORDER: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """out and lse of both halves, of BLOCK_M rows of one head: first over the tiles of keys that
    the pattern touches, for both, then over the others for the global half alone.

    HIDES: a pair may be invisible in the global half. EVEN: no position is outside the operands.
    """
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
    q = load_rows(queries, o.query.row, row, Lq, D, BLOCK_D, EVEN)
    largest = tl.full([BLOCK_M], -_INF, tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    result = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
    near_largest = largest
    near_total = total
    near_result = result
    for PART in tl.static_range(2):
        for at in range(0, part_length(near_length, Lk, BLOCK_N, PART), BLOCK_N):
            column = part_start(at, near_start, near_length, PART) + tl.arange(0, BLOCK_N)
            columns = column[None, :]
            k = load_rows(keys, o.key.row, column, Lk, D, BLOCK_D, EVEN)
            s = product_of_tiles(
                q, k, queries, o.query.row, row, Lq, keys, o.key.row, column, Lk,
                D, BLOCK_D, CHUNK_D, EVEN, PRECISION,
            )  # fmt: skip
            s = s * scale
            seen = seen_pairs(o, batch, head, rows, columns, low, high, Lq, Lk, 0, 0, False, EVEN)
            multiplier = learned_tile(o.multiplier, batch, head, rows, columns, Lq, Lk, EVEN)
            bias = learned_tile(o.bias, batch, head, rows, columns, Lq, Lk, EVEN)
            _, z, _ = fused_scores(o, s, seen, multiplier, bias, False, HIDES)
            v = load_rows(values, o.value.row, column, Lk, DV, BLOCK_DV, EVEN)

            p, shrink, largest, total = softmax_step(z, largest, total)
            result = result * shrink[:, None]
            result = tl.dot(p.to(v.dtype), v, result, input_precision=PRECISION)
            if PART == 0:
                kept = kept_by_pattern(
                    o.terms, batch, head, rows, columns, low, high, Lq, Lk, N_TERMS, CODE, False
                )
                z = tl.where(kept, z, -_INF)
                p, shrink, near_largest, near_total = softmax_step(z, near_largest, near_total)
                near_result = near_result * shrink[:, None]
                near_result = tl.dot(p.to(v.dtype), v, near_result, input_precision=PRECISION)
        if PART == 0:
            store_softmax(
                near.out, near.lse, pair, row, Lq, DV, BLOCK_DV,
                near_result, near_largest, near_total,
            )  # fmt: skip
    store_softmax(whole.out, whole.lse, pair, row, Lq, DV, BLOCK_DV, result, largest, total)
