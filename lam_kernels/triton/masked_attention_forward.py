"""Forward kernel of masked attention: one program, one tile of query rows, online softmax."""

from __future__ import annotations

import triton
import triton.language as tl

from .patterns import head_step, key_bounds, tile_range, tile_start
from .philox import kept_pairs
from .tiles import (
    base_of,
    fused_scores,
    learned_tile,
    load_rows,
    program_tile,
    seen_pairs,
    softmax_step,
    store_softmax,
)

_INF = tl.constexpr(float("inf"))
# They change from call to call: no kernel of their own when they are 1 or a multiple of 16.
VARYING = ("seed", "offset", "threshold", "B", "H", "group", "tiles", "pairs")


@triton.jit(do_not_specialize=VARYING)
def forward_kernel(
    o, out, lse, scale, seed, offset, threshold, keep_scale, B, H, group, Lq, Lk, tiles,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    N_TERMS: tl.constexpr, CODE: tl.constexpr, STEPPED: tl.constexpr, GATE: tl.constexpr,
    DROPOUT: tl.constexpr, HIDES: tl.constexpr, EVEN: tl.constexpr, ORDER: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """out and lse of BLOCK_M rows of one head.

    HIDES: a visited pair may be invisible. EVEN: no visited position is outside the operands.
    """
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
    largest = tl.full([BLOCK_M], -_INF, tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    result = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
    for start in range(begin, stop, BLOCK_N * step):
        column = start + step * tl.arange(0, BLOCK_N)
        columns = column[None, :]
        k = load_rows(keys, o.key.row, column, Lk, D, BLOCK_D, EVEN)
        s = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale
        seen = seen_pairs(
            o, batch, head, rows, columns, low, high, Lq, Lk, N_TERMS, CODE, False, EVEN
        )
        multiplier = learned_tile(o.multiplier, batch, head, rows, columns, Lq, Lk, EVEN)
        bias = learned_tile(o.bias, batch, head, rows, columns, Lq, Lk, EVEN)
        _, z, _ = fused_scores(o, s, seen, multiplier, bias, GATE, HIDES)

        p, shrink, largest, total = softmax_step(z, largest, total)
        if DROPOUT:
            kept = kept_pairs(
                rows, start, columns, pair, seed, offset, threshold, BLOCK_N, not STEPPED
            )
            p = tl.where(kept, p, 0.0)
        v = load_rows(values, o.value.row, column, Lk, DV, BLOCK_DV, EVEN)
        result = result * shrink[:, None]
        result = tl.dot(p.to(v.dtype), v, result, input_precision=PRECISION)

    if DROPOUT:
        result = result * keep_scale
    store_softmax(out, lse, pair, row, Lq, DV, BLOCK_DV, result, largest, total)
