"""Backward kernel of attention masked by a network of its scores.

A program takes one block of rows after the other, in an order that only the sizes decide. It forms
the scores and the network's activations again; these go to scratch memory of its own, [layers,
BLOCK_M, W], where the way back through the layers finds them. What several blocks add to (keys,
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
    apply_network,
    kept_places,
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
def _add_value_gradient(
    grads, grad_out, p, part, pair, batch, head, row, column, Lq, Lk,
    DV: tl.constexpr, CHUNK_V: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    if grads.value is not None:
        rows = base_of(grad_out, batch, head)
        for begin in range(0, DV, CHUNK_V):
            do = load_chunk(rows, grad_out.row, row, Lq, begin, DV, CHUNK_V)
            dv = tl.dot(tl.trans(p).to(do.dtype), do, input_precision=PRECISION)
            add_chunk(grads.value, part + pair, column, Lk, begin, DV, CHUNK_V, dv)


@triton.jit
def _add_score_gradient(
    o, grads, ds, part, pair, batch, head, row, column, Lq, Lk,
    D: tl.constexpr, CHUNK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dQ and dK of dS, which has the scale already."""
    queries = base_of(o.query, batch, head)
    keys = base_of(o.key, batch, head)
    for begin in range(0, D, CHUNK):
        if grads.query is not None:
            k = load_chunk(keys, o.key.row, column, Lk, begin, D, CHUNK)
            dq = tl.dot(ds.to(k.dtype), k, input_precision=PRECISION)
            store_chunk(grads.query, pair, row, Lq, begin, D, CHUNK, dq)
        if grads.key is not None:
            q = load_chunk(queries, o.query.row, row, Lq, begin, D, CHUNK)
            dk = tl.dot(tl.trans(ds).to(q.dtype), q, input_precision=PRECISION)
            add_chunk(grads.key, part + pair, column, Lk, begin, D, CHUNK, dk)


@triton.jit
def _back_through(
    grads, parameters, dy, kept, program, layers, Lk, hidden,
    W: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """dA of dM; adds to the parameters' gradient."""
    i = tl.arange(0, W)
    for step in range(0, layers):
        layer = layers - 1 - step
        x = tl.load(kept_places(kept, layer, W, BLOCK_M))
        if grads.parameters is not None:
            first_row = (program.to(tl.int64) * layers + layer) * (W + 1)
            own = grads.parameters + (first_row + i[:, None]) * W + i[None, :]
            dw = tl.dot(tl.trans(x), dy, tl.load(own), input_precision=_FLOAT32)
            tl.store(own, dw)
            of_bias = grads.parameters + (first_row + W) * W + i
            tl.store(of_bias, tl.load(of_bias) + tl.sum(dy, 0))
        first, rows, columns = layer_place(layer, layers, Lk, hidden)
        weight = layer_weight(parameters, first, rows, columns, W)
        dx = tl.dot(dy, tl.trans(weight), input_precision=_FLOAT32)
        dy = tl.where((layer == 0) | (x > 0), dx, 0.0)
    return dy


@triton.jit(do_not_specialize=(*VARYING, "units", "groups", "splits"))
def score_masked_backward_kernel(
    o, grad_out, grads, scratch, scale, B, H, Lq, Lk, tiles, layers, hidden, units, groups, splits,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    CHUNK: tl.constexpr, CHUNK_V: tl.constexpr, BLOCK_M: tl.constexpr, W: tl.constexpr,
    MULTIPLY: tl.constexpr, MEAN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Program (group, split): of every groups-th head (MEAN: sample), every splits-th tile of rows.

    MEAN: the scores of all heads are formed three times, for their mean, for
    the sum of dM and for dS, where keeping them would take H tiles.
    """
    program = tl.program_id(0)
    split = program // groups
    kept = scratch + program.to(tl.int64) * layers * (BLOCK_M * W)
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
            m = apply_network(o.parameters, x, kept, layers, Lk, hidden, W, BLOCK_M, True)
            p, dz = _slopes(
                o, grad_out, s, m, seen, batch, head, row, column, Lq, Lk,
                DV, BLOCK_DV, CHUNK_V, MULTIPLY, PRECISION,
            )  # fmt: skip
            _add_value_gradient(
                grads, grad_out, p, part, pair, batch, head, row, column, Lq, Lk,
                DV, CHUNK_V, PRECISION,
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
                        grads, grad_out, p, part, batch * H + other, batch, other, row, column,
                        Lq, Lk, DV, CHUNK_V, PRECISION,
                    )  # fmt: skip
                    dm += dz_other * s_other if MULTIPLY else dz_other
            if SCORES or grads.parameters is not None:
                tl.debug_barrier()  # another thread may read what one has kept
                da = _back_through(
                    grads, o.parameters, dm, kept, program, layers, Lk, hidden, W, BLOCK_M
                )
                if SCORES:
                    da = tl.where(seen, da / H if MEAN else da, 0.0)
                    ds = scale * (tl.where(seen, dz * m, 0.0) + da if MULTIPLY else dz + da)
                    _add_score_gradient(
                        o, grads, ds, part, pair, batch, head, row, column, Lq, Lk,
                        D, CHUNK, PRECISION,
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
                                o, grads, scale * (dz_other + da), part, batch * H + other, batch,
                                other, row, column, Lq, Lk, D, CHUNK, PRECISION,
                            )  # fmt: skip
            tl.debug_barrier()  # before the next tile overwrites it, and adds to the sums
