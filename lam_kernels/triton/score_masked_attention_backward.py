"""Backward kernel of attention masked by a network of its scores.

A program takes one block of rows after the other, in an order that only the sizes decide. It forms
the scores and the network's activations again; these go to scratch memory of its own, [layers + 2,
BLOCK_M, W], where the way back through the layers finds them and leaves its slopes. The last plane
holds P or dS. Products along the keys, or a layer, read both operands from memory chunk by chunk:
in three tf32 parts, and with warps placed as another product wants them, they would be many times
what the registers hold. What several blocks add to (keys,
values, parameters) it sums in memory of its own as well, so there are no atomics; the parts of all
programs are added afterwards, in a fixed order.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from .score_masked_attention_forward import (
    VARYING,
    layer_output,
    layer_place,
    layer_weight,
    network_input,
    row_weights,
    score_rows,
    seen_keys,
)
from .tiles import add_chunk, base_of, load_chunk, product_of_rows, store_chunk

_FLOAT32 = tl.constexpr("tf32x3")


class ScoredGradients(NamedTuple):
    """Where gradients go; None: not wanted. Parts are float32 and begin as zeros."""

    query: Tensor | None
    key: Tensor | None  # [splits, B, H, Lk, D]
    value: Tensor | None  # [splits, B, H, Lk, Dv]
    parameters: Tensor | None  # [programs, layers, W + 1, W]: padded weights, and biases below
    END: None = None  # see masks.py


@triton.jit
def _slopes(
    o, grad_out, s, m, seen, batch, head, row, column, Lq, Lk,
    DV: tl.constexpr, BLOCK_DV: tl.constexpr, CHUNK: tl.constexpr, MULTIPLY: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """(P, dZ) of a head's rows."""
    p, total = row_weights(s, m, seen, MULTIPLY)
    p = p / total[:, None]
    dp = product_of_rows(
        base_of(grad_out, batch, head), grad_out.row, row, Lq,
        base_of(o.value, batch, head), o.value.row, column, Lk,
        DV, BLOCK_DV, CHUNK, False, PRECISION,
    )  # fmt: skip
    return p, p * (dp - tl.sum(p * dp, 1)[:, None])


@triton.jit
def _kept_places(kept, plane, column, W: tl.constexpr, BLOCK_M: tl.constexpr):
    i = tl.arange(0, BLOCK_M)[:, None]
    return kept + (plane * BLOCK_M + i) * W + column[None, :]


@triton.jit
def _exchange(kept, plane, column, tile, W: tl.constexpr, BLOCK_M: tl.constexpr):
    """Puts a tile where every thread can read all of it."""
    tl.debug_barrier()  # all have read what was there
    tl.store(_kept_places(kept, plane, column, W, BLOCK_M), tile)
    tl.debug_barrier()


@triton.jit
def _add_value_gradient(
    grads, grad_out, p, kept, plane, part, pair, batch, head, row, column, Lq, Lk,
    DV: tl.constexpr, CHUNK_V: tl.constexpr, W: tl.constexpr, BLOCK_M: tl.constexpr,
    CHUNK_W: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    if grads.value is not None:
        _exchange(kept, plane, column, p, W, BLOCK_M)
        rows = base_of(grad_out, batch, head)
        for first in range(0, Lk, CHUNK_W):
            keys = first + tl.arange(0, CHUNK_W)
            weights = tl.trans(tl.load(_kept_places(kept, plane, keys, W, BLOCK_M)))
            for begin in range(0, DV, CHUNK_V):
                do = load_chunk(rows, grad_out.row, row, Lq, begin, DV, CHUNK_V)
                dv = tl.dot(weights.to(do.dtype), do, input_precision=PRECISION)
                add_chunk(grads.value, part + pair, keys, Lk, begin, DV, CHUNK_V, dv)


@triton.jit
def _add_score_gradient(
    o, grads, ds, kept, plane, part, pair, batch, head, row, column, Lq, Lk,
    D: tl.constexpr, CHUNK: tl.constexpr, W: tl.constexpr, BLOCK_M: tl.constexpr,
    CHUNK_W: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dQ and dK of dS, which has the scale already."""
    _exchange(kept, plane, column, ds, W, BLOCK_M)
    if grads.query is not None:
        rows = base_of(o.key, batch, head)
        for begin in range(0, D, CHUNK):
            dq = tl.zeros([BLOCK_M, CHUNK], tl.float32)
            for first in range(0, Lk, CHUNK_W):
                keys = first + tl.arange(0, CHUNK_W)
                k = load_chunk(rows, o.key.row, keys, Lk, begin, D, CHUNK)
                slopes = tl.load(_kept_places(kept, plane, keys, W, BLOCK_M))
                dq = tl.dot(slopes.to(k.dtype), k, dq, input_precision=PRECISION)
            store_chunk(grads.query, pair, row, Lq, begin, D, CHUNK, dq)
    if grads.key is not None:
        rows = base_of(o.query, batch, head)
        for first in range(0, Lk, CHUNK_W):
            keys = first + tl.arange(0, CHUNK_W)
            slopes = tl.trans(tl.load(_kept_places(kept, plane, keys, W, BLOCK_M)))
            for begin in range(0, D, CHUNK):
                q = load_chunk(rows, o.query.row, row, Lq, begin, D, CHUNK)
                dk = tl.dot(slopes.to(q.dtype), q, input_precision=PRECISION)
                add_chunk(grads.key, part + pair, keys, Lk, begin, D, CHUNK, dk)


@triton.jit
def _kept_network(
    parameters, x, kept, column, layers, Lk, hidden,
    W: tl.constexpr, BLOCK_M: tl.constexpr, CHUNK_W: tl.constexpr,
):  # fmt: skip
    """M of the network's input x; the input of every layer stays in its plane of `kept`."""
    tl.store(_kept_places(kept, 0, column, W, BLOCK_M), x)
    for layer in range(0, layers):
        tl.debug_barrier()  # another thread may read what one has kept
        first, rows, columns = layer_place(layer, layers, Lk, hidden)
        for to in range(0, columns, CHUNK_W):
            j = to + tl.arange(0, CHUNK_W)
            y = tl.zeros([BLOCK_M, CHUNK_W], tl.float32)
            for begin in range(0, rows, CHUNK_W):
                i = begin + tl.arange(0, CHUNK_W)
                some = tl.load(_kept_places(kept, layer, i, W, BLOCK_M))
                weight = layer_weight(parameters, first, i[:, None], j[None, :], rows, columns)
                y = tl.dot(some, weight, y, input_precision=_FLOAT32)
            y = layer_output(parameters, y, first, j, rows, columns, layer == layers - 1)
            tl.store(_kept_places(kept, layer + 1, j, W, BLOCK_M), y)
    tl.debug_barrier()
    places = _kept_places(kept, layers, column, W, BLOCK_M)
    return tl.load(places, mask=column[None, :] < Lk, other=0.0)


@triton.jit
def _back_through(
    grads, parameters, dm, kept, program, column, layers, Lk, hidden,
    W: tl.constexpr, BLOCK_M: tl.constexpr, CHUNK_W: tl.constexpr,
):  # fmt: skip
    """dA of dM; adds to the parameters' gradient. Each plane's activations give way to their
    slopes."""
    tl.store(_kept_places(kept, layers, column, W, BLOCK_M), dm)
    tl.debug_barrier()
    for step in range(0, layers):
        layer = layers - 1 - step
        first, rows, columns = layer_place(layer, layers, Lk, hidden)
        if grads.parameters is not None:
            first_row = (program.to(tl.int64) * layers + layer) * (W + 1)
            for to in range(0, columns, CHUNK_W):
                j = to + tl.arange(0, CHUNK_W)
                dy = tl.load(_kept_places(kept, layer + 1, j, W, BLOCK_M))
                of_bias = grads.parameters + (first_row + W) * W + j
                tl.store(of_bias, tl.load(of_bias) + tl.sum(dy, 0))
                for begin in range(0, rows, CHUNK_W):
                    i = begin + tl.arange(0, CHUNK_W)
                    x = tl.load(_kept_places(kept, layer, i, W, BLOCK_M))
                    own = grads.parameters + (first_row + i[:, None]) * W + j[None, :]
                    dw = tl.dot(tl.trans(x), dy, tl.load(own), input_precision=_FLOAT32)
                    tl.store(own, dw)
        for begin in range(0, rows, CHUNK_W):
            i = begin + tl.arange(0, CHUNK_W)
            dx = tl.zeros([BLOCK_M, CHUNK_W], tl.float32)
            for to in range(0, columns, CHUNK_W):
                j = to + tl.arange(0, CHUNK_W)
                dy = tl.load(_kept_places(kept, layer + 1, j, W, BLOCK_M))
                weight = layer_weight(parameters, first, i[:, None], j[None, :], rows, columns)
                dx = tl.dot(dy, tl.trans(weight), dx, input_precision=_FLOAT32)
            places = _kept_places(kept, layer, i, W, BLOCK_M)
            dx = tl.where((layer == 0) | (tl.load(places) > 0), dx, 0.0)
            tl.debug_barrier()  # all have read the activations
            tl.store(places, dx)
        tl.debug_barrier()
    places = _kept_places(kept, 0, column, W, BLOCK_M)
    return tl.load(places, mask=column[None, :] < Lk, other=0.0)


@triton.jit(do_not_specialize=(*VARYING, "units", "groups", "splits"))
def score_masked_backward_kernel(
    o, grad_out, grads, scratch, scale, B, H, Lq, Lk, tiles, layers, hidden, units, groups, splits,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    CHUNK: tl.constexpr, CHUNK_V: tl.constexpr, CHUNK_W: tl.constexpr, BLOCK_M: tl.constexpr,
    W: tl.constexpr, MULTIPLY: tl.constexpr, MEAN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Program (group, split): of every groups-th head (MEAN: sample), every splits-th tile of rows.

    MEAN: the scores of all heads are formed three times, for their mean, for
    the sum of dM and for dS, where keeping them would take H tiles.
    """
    program = tl.program_id(0)
    split = program // groups
    kept = scratch + program.to(tl.int64) * (layers + 2) * (BLOCK_M * W)
    part = split * B * H
    column = tl.arange(0, W)
    SCORES: tl.constexpr = grads.query is not None or grads.key is not None
    for unit in range(program % groups, units, groups):
        batch = unit if MEAN else unit // H
        head = unit * 0 if MEAN else unit % H
        pair = batch * H + head
        seen = seen_keys(o, batch, column, Lq, Lk)
        for tile in range(split, tiles, splits):
            row = tile * BLOCK_M + tl.arange(0, BLOCK_M)
            s, x = network_input(
                o, batch, head, row, column, seen, scale, H, Lq, Lk, MEAN,
                D, BLOCK_D, CHUNK, PRECISION,
            )  # fmt: skip
            m = _kept_network(
                o.parameters, x, kept, column, layers, Lk, hidden, W, BLOCK_M, CHUNK_W
            )
            p, dz = _slopes(
                o, grad_out, s, m, seen, batch, head, row, column, Lq, Lk,
                DV, BLOCK_DV, CHUNK_V, MULTIPLY, PRECISION,
            )  # fmt: skip
            _add_value_gradient(
                grads, grad_out, p, kept, layers + 1, part, pair, batch, head, row, column, Lq, Lk,
                DV, CHUNK_V, W, BLOCK_M, CHUNK_W, PRECISION,
            )  # fmt: skip
            dm = dz * s if MULTIPLY else dz
            if MEAN:
                for after in range(1, H):
                    other = head + after
                    s_other = score_rows(
                        o, batch, other, row, column, scale, Lq, Lk, D, BLOCK_D, CHUNK, PRECISION
                    )
                    p, dz_other = _slopes(
                        o, grad_out, s_other, m, seen, batch, other, row, column, Lq, Lk,
                        DV, BLOCK_DV, CHUNK_V, MULTIPLY, PRECISION,
                    )  # fmt: skip
                    _add_value_gradient(
                        grads, grad_out, p, kept, layers + 1, part, batch * H + other, batch, other,
                        row, column, Lq, Lk, DV, CHUNK_V, W, BLOCK_M, CHUNK_W, PRECISION,
                    )  # fmt: skip
                    dm += dz_other * s_other if MULTIPLY else dz_other
            if SCORES or grads.parameters is not None:
                tl.debug_barrier()  # all have read M
                da = _back_through(
                    grads, o.parameters, dm, kept, program, column, layers, Lk, hidden,
                    W, BLOCK_M, CHUNK_W,
                )  # fmt: skip
                if SCORES:
                    da = tl.where(seen, da / H if MEAN else da, 0.0)
                    ds = scale * (tl.where(seen, dz * m, 0.0) + da if MULTIPLY else dz + da)
                    _add_score_gradient(
                        o, grads, ds, kept, layers + 1, part, pair, batch, head, row, column,
                        Lq, Lk, D, CHUNK, W, BLOCK_M, CHUNK_W, PRECISION,
                    )  # fmt: skip
                    if MEAN:
                        for after in range(1, H):
                            other = head + after
                            s_other = score_rows(
                                o, batch, other, row, column, scale, Lq, Lk,
                                D, BLOCK_D, CHUNK, PRECISION,
                            )  # fmt: skip
                            _, dz_other = _slopes(
                                o, grad_out, s_other, m, seen, batch, other, row, column, Lq, Lk,
                                DV, BLOCK_DV, CHUNK_V, MULTIPLY, PRECISION,
                            )  # fmt: skip
                            if MULTIPLY:
                                dz_other = tl.where(seen, dz_other * m, 0.0)
                            _add_score_gradient(
                                o, grads, scale * (dz_other + da), kept, layers + 1, part,
                                batch * H + other, batch, other, row, column, Lq, Lk,
                                D, CHUNK, W, BLOCK_M, CHUNK_W, PRECISION,
                            )  # fmt: skip
            tl.debug_barrier()  # before the next tile overwrites it, and adds to the sums
