"""Dropout's random numbers: Philox4x32-10 by the position of a pair, as csrc/philox.h draws them.

key = seed, counter = (j // 4, i, b * H + h, offset), word j % 4; kept where word >= threshold.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def kept_pairs(
    rows,  # [M, 1], original positions
    first_column,
    columns,  # [1, N], first_column, first_column + step, ...
    pair,  # b * H + h
    seed,
    offset,
    threshold,
    N: tl.constexpr,
    QUADS: tl.constexpr,  # the columns are contiguous and begin with a multiple of four
):  # bool [M, N]
    """QUADS draws each counter once, for the four columns that share it; otherwise four times."""
    c1 = rows.to(tl.uint32)
    c2 = (pair + rows * 0).to(tl.uint32)
    c3 = ((offset + rows * 0).to(tl.int64) & 0xFFFFFFFF).to(tl.uint32)
    if QUADS:
        group = first_column // 4 + tl.arange(0, N // 4)[None, :]
        w0, w1, w2, w3 = tl.philox(seed, group, c1, c2, c3)
        words = tl.join(tl.join(w0, w2), tl.join(w1, w3))  # [M, N / 4, 2, 2], word 2 k + l
        words = tl.reshape(words, [words.shape[0], N])
    else:
        w0, w1, w2, w3 = tl.philox(seed, columns // 4, c1, c2, c3)
        word = columns % 4
        words = tl.where(word < 2, tl.where(word == 0, w0, w1), tl.where(word == 2, w2, w3))
    return words >= threshold.to(tl.uint32)
