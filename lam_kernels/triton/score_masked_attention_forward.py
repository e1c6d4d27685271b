"""Forward kernel of attention masked by a network of its scores, and what the backward kernel does
again: formulas in python_ref/score_masked_attention.py.

A program has whole score rows on chip, [BLOCK_M, W], with W columns for the keys and for every
layer of the network: the smallest power of two that holds both. Columns outside are 0 all the way.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from .masks import Mask, mask_tile
from .tiles import LOG2E, Rows, base_of, load_chunk, product_of_rows, store_chunk

_INF = tl.constexpr(float("inf"))
_FLOAT32 = tl.constexpr("tf32x3")
# They change from call to call: no kernel of their own when they are 1 or a multiple of 16.
VARYING = ("B", "H", "Lq", "Lk", "tiles", "layers", "hidden")


class Scored(NamedTuple):
    """What both kernels read."""

    query: Rows
    key: Rows
    value: Rows
    parameters: Tensor  # float32: W_1, b_1, W_2, ... row by row
    key_mask: Mask | None
    END: None = None  # see masks.py


@triton.jit
def seen_keys(o, batch, column, Lq, Lk):
    """[1, W]: the keys that exist and that key_mask keeps."""
    columns = column[None, :]
    seen = columns < Lk
    if o.key_mask is not None:
        seen = seen & (mask_tile(o.key_mask, batch, 0 * batch, 0, columns, Lq, Lk, False) != 0)
    return seen


@triton.jit
def score_rows(
    o, batch, head, row, column, scale, Lq, Lk,
    D: tl.constexpr, BLOCK_D: tl.constexpr, CHUNK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    return scale * product_of_rows(
        base_of(o.query, batch, head), o.query.row, row, Lq,
        base_of(o.key, batch, head), o.key.row, column, Lk,
        D, BLOCK_D, CHUNK, False, PRECISION,
    )  # fmt: skip


@triton.jit
def network_input(
    o, batch, head, row, column, seen, scale, H, Lq, Lk, MEAN: tl.constexpr,
    D: tl.constexpr, BLOCK_D: tl.constexpr, CHUNK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """(the scores of `head`, the network's input): its own, or the mean over all heads."""
    s = score_rows(o, batch, head, row, column, scale, Lq, Lk, D, BLOCK_D, CHUNK, PRECISION)
    x = s
    if MEAN:
        for after in range(1, H):
            other = head + after
            x += score_rows(
                o, batch, other, row, column, scale, Lq, Lk, D, BLOCK_D, CHUNK, PRECISION
            )
        x = x / H
    return s, tl.where(seen, x, 0.0)


@triton.jit
def layer_place(layer, layers, Lk, hidden):
    """(first element, rows, columns) of a layer's weight; its bias follows."""
    first = tl.where(layer == 0, 0, (Lk + 1) * hidden + (layer - 1) * (hidden + 1) * hidden)
    return first, tl.where(layer == 0, Lk, hidden), tl.where(layer == layers - 1, Lk, hidden)


@triton.jit
def layer_weight(parameters, first, i, j, rows, columns):
    """A weight's rows i and columns j, expanded; zeros outside."""
    inside = (i < rows) & (j < columns)
    return tl.load(parameters + first + i * columns + j, mask=inside, other=0.0)


@triton.jit
def layer_output(parameters, product, first, j, rows, columns, last):
    """What a layer makes of columns j of X W."""
    bias = tl.load(parameters + first + rows * columns + j, mask=j < columns, other=0.0)
    y = product + bias[None, :]
    return tl.where((y < 0) & (last == 0), 0.0, y)  # NaN stays


@triton.jit
def _apply_network(parameters, x, layers, Lk, hidden, W: tl.constexpr):
    """M of the network's input x [BLOCK_M, W]."""
    j = tl.arange(0, W)
    for layer in range(0, layers):
        first, rows, columns = layer_place(layer, layers, Lk, hidden)
        weight = layer_weight(parameters, first, j[:, None], j[None, :], rows, columns)
        y = tl.dot(x, weight, input_precision=_FLOAT32)
        x = layer_output(parameters, y, first, j, rows, columns, layer == layers - 1)
    return x


@triton.jit
def row_weights(s, m, seen, MULTIPLY: tl.constexpr):
    """(exponentials, their sum of each row, 1 where there is none)."""
    z = s * m if MULTIPLY else s + m
    z = tl.where(seen, z, -_INF)
    largest = tl.max(z, 1)
    p = tl.exp2((z - tl.where(largest == -_INF, 0.0, largest)[:, None]) * LOG2E)
    total = tl.sum(p, 1)
    return p, tl.where(total == 0.0, 1.0, total)


@triton.jit
def _store_out(
    o, out, s, m, seen, pair, batch, head, row, column, Lq, Lk,
    DV: tl.constexpr, CHUNK_V: tl.constexpr, MULTIPLY: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    p, total = row_weights(s, m, seen, MULTIPLY)
    values = base_of(o.value, batch, head)
    for begin in range(0, DV, CHUNK_V):
        v = load_chunk(values, o.value.row, column, Lk, begin, DV, CHUNK_V)
        result = tl.dot(p.to(v.dtype), v, input_precision=PRECISION) / total[:, None]
        store_chunk(out, pair, row, Lq, begin, DV, CHUNK_V, result)


@triton.jit(do_not_specialize=VARYING)
def score_masked_forward_kernel(
    o, out, scale, H, Lq, Lk, tiles, layers, hidden,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, CHUNK: tl.constexpr,
    CHUNK_V: tl.constexpr, BLOCK_M: tl.constexpr, W: tl.constexpr, MULTIPLY: tl.constexpr,
    MEAN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """out of BLOCK_M rows of one head; MEAN: of all heads of a sample, whose scores are formed a
    second time once their mean has been through the network."""
    unit = tl.program_id(0) // tiles
    row = (tl.program_id(0) - unit * tiles) * BLOCK_M + tl.arange(0, BLOCK_M)
    column = tl.arange(0, W)
    batch = unit if MEAN else unit // H
    head = unit * 0 if MEAN else unit % H
    seen = seen_keys(o, batch, column, Lq, Lk)
    s, x = network_input(
        o, batch, head, row, column, seen, scale, H, Lq, Lk, MEAN, D, BLOCK_D, CHUNK, PRECISION
    )
    m = _apply_network(o.parameters, x, layers, Lk, hidden, W)
    _store_out(
        o, out, s, m, seen, batch * H + head, batch, head, row, column, Lq, Lk,
        DV, CHUNK_V, MULTIPLY, PRECISION,
    )  # fmt: skip
    if MEAN:
        for after in range(1, H):
            other = head + after
            s = score_rows(
                o, batch, other, row, column, scale, Lq, Lk, D, BLOCK_D, CHUNK, PRECISION
            )
            _store_out(
                o, out, s, m, seen, batch * H + other, batch, other, row, column, Lq, Lk,
                DV, CHUNK_V, MULTIPLY, PRECISION,
            )  # fmt: skip
