"""Patterns in Triton: one predicate, one key range, for tiles of rows and for tiles of columns.

The terms are those of lam_kernels/patterns.py and csrc/patterns.h. Seen from a row i, a term keeps
the columns lo(i) <= j < hi(i) and, of those, the ones whose code equals the row's:

    term                           lo, hi                               code(i) == code(j)
    BlockDiagonal(a)               the block of i                       -
    Toeplitz(a)                    c - a, c + a + 1                     -
    DilatedToeplitz(a, b)          c - a, c + a + 1                     c mod b == j mod b
    Causal                         0, c + 1                             -
    Segments(a)                    0, Lk                                query_ids == key_ids

with c = i, moved by Lk - Lq when both count from the end. Bounds and codes are vectors, one number
a row or a column, so an element costs two comparisons however many terms there are, and one more a
code. Seen from a column the same holds with rows and columns exchanged (Causal then keeps i >= c):
TRANSPOSED. Both bounds grow with i, so the first and the last row of a tile bound the tile.

A tile of rows may be spaced by a dilation; its columns then are too (STEPPED). Positions are 32-bit
(lengths below availability.MAX_LENGTH; larger parameters mean the same as Lq + Lk), offsets in
memory 64-bit.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import patterns as spec

BLOCK_DIAGONAL = tl.constexpr(spec.BLOCK_DIAGONAL)
DILATED_TOEPLITZ = tl.constexpr(spec.DILATED_TOEPLITZ)
CAUSAL = tl.constexpr(spec.CAUSAL)
SEGMENTS = tl.constexpr(spec.SEGMENTS)
PER_HEAD = tl.constexpr(-1)  # a CODE: the terms lie in a table in memory, one row a head
_TABLE_INTS = spec.MAX_TERMS * spec.INTS_PER_TERM + 2  # terms, step, end_aligned of the step
TABLE_INTS = tl.constexpr(_TABLE_INTS)


class Terms(NamedTuple):
    """A pattern as kernels take it."""

    numbers: tuple[int, ...] | None  # one pattern for all heads: a, b of each term, see _unspecial
    table: Tensor | None  # one a head: int64 [H, TABLE_INTS]
    step: int
    step_shift: int  # Lk - Lq when the term with that dilation counts from the end
    segments: Segments | None
    END: None = None  # see masks.py


class Segments(NamedTuple):
    """Ids of all Segments terms, int64."""

    query: Tensor  # [terms, B|1, Lq]
    query_term: int
    query_batch: int
    query_position: int
    key: Tensor  # [terms, B|1, Lk]
    key_term: int
    key_batch: int
    key_position: int


class Shape(NamedTuple):
    """What is compiled into a kernel: a new radius or block is not a new kernel, a new kind is."""

    N_TERMS: int
    CODE: int  # 4 bits a term: kind, end_aligned; or PER_HEAD
    STEPPED: bool


def encoded(
    flat: list[int], segment_ids: list[Tensor], Lq: int, Lk: int, device: torch.device
) -> tuple[Terms, Shape, int]:
    """Kernel arguments, what is compiled in, and the largest dilation that tiles are spaced by."""
    per_head = spec.specs(flat)
    segments = _segments(segment_ids, Lq, Lk) if segment_ids else None
    if len(set(map(tuple, per_head))) <= 1:
        terms = spec.spec_terms(per_head[0]) if per_head else []
        code = sum((kind | end << 3) << 4 * at for at, (kind, end, _, _) in enumerate(terms))
        step, end = _step(terms, Lq, Lk)
        values = [_bounded(x, Lq, Lk) for _, _, a, b in terms for x in (a, b)]
        values += [0] * (2 * spec.MAX_TERMS - len(values))
        shift = Lk - Lq if end else 0
        found = Terms(tuple(map(_unspecial, values)), None, step, shift, segments)
        return (
            found if terms else found._replace(numbers=None),
            Shape(len(terms), code, step > 1),
            step,
        )
    table, largest = _table(tuple(flat), Lq, Lk, device)
    count = max(len(spec.spec_terms(one)) for one in per_head)
    return Terms(None, table, 1, 0, segments), Shape(count, PER_HEAD.value, largest > 1), largest


def _unspecial(value: int) -> int:
    """Never 1 and never a multiple of 16, for which Triton would compile kernels of their own."""
    return (value << 4) + 3


def _bounded(value: int, Lq: int, Lk: int) -> int:
    return min(value, Lq + Lk)


def _step(terms: list, Lq: int, Lk: int) -> tuple[int, int]:
    """(dilation that tiles are spaced by, whether its term counts from the end).

    Not where a residue class is shorter than the smallest tile, which would be mostly padding.
    """
    for kind, end, _, b in terms:
        if kind == spec.DILATED_TOEPLITZ and b > 1:
            return (b, end) if 16 * b <= min(Lq, Lk) else (1, 0)
    return 1, 0


# The copy to the device waits for it, so it happens once a pattern (and before a CUDA graph is
# captured, because the first call compiles as well).
_tables: dict[tuple, tuple[Tensor, int]] = {}
_MOST_TABLES = 256
_captured: dict[tuple, tuple[Tensor, int]] = {}  # read by a CUDA graph whenever it is replayed


def _table(flat: tuple[int, ...], Lq: int, Lk: int, device: torch.device) -> tuple[Tensor, int]:
    key = (flat, Lq, Lk, device)
    found = _tables.get(key)
    if found is None:
        rows, largest = [], 1
        for one in spec.specs(flat):
            terms = spec.spec_terms(one)
            step, end = _step(terms, Lq, Lk)
            largest = max(largest, step)
            row = [
                x
                for kind, end_aligned, a, b in terms
                for x in (kind, end_aligned, _bounded(a, Lq, Lk), _bounded(b, Lq, Lk))
            ]
            # a missing term is a radius that nothing exceeds
            wide = [spec.TOEPLITZ, 0, Lq + Lk, 0] * (spec.MAX_TERMS - len(terms))
            rows.append([*row, *wide, step, end])
        if len(_tables) >= _MOST_TABLES:
            _tables.clear()
        found = _tables[key] = torch.tensor(rows, dtype=torch.int64).to(device), largest
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        _captured[key] = found
    return found


def _segments(segment_ids: list[Tensor], Lq: int, Lk: int) -> Segments:
    sides = []
    for ids in (segment_ids[0::2], segment_ids[1::2]):
        if len(ids) == 1:
            stacked = ids[0][None]
        else:
            batch = max(one.shape[0] for one in ids)
            stacked = torch.stack([one.expand(batch, -1) for one in ids])
        term, batch, position = stacked.stride()
        sides += [stacked, term, batch if stacked.shape[1] > 1 else 0, position]
    return Segments(*sides)


@triton.jit
def _table_term(terms, head, T: tl.constexpr):
    """(kind, end_aligned, a, b) of term T of a head."""
    at = terms.table + head * TABLE_INTS + 4 * T
    return (
        tl.load(at).to(tl.int32),
        tl.load(at + 1).to(tl.int32),
        tl.load(at + 2).to(tl.int32),
        tl.load(at + 3).to(tl.int32),
    )


@triton.jit
def _number(terms, N: tl.constexpr):
    return (terms.numbers[N] >> 4).to(tl.int32)


@triton.jit
def _floor_mod(x, n):
    """x mod n in [0, n), where % takes the sign of x."""
    r = x % n
    return tl.where(r < 0, r + n, r)


@triton.jit
def key_bounds(
    terms, head, x, L, L_other,
    N_TERMS: tl.constexpr, CODE: tl.constexpr, TRANSPOSED: tl.constexpr,
):  # fmt: skip
    """[lo, hi) that rows x keep of the columns; TRANSPOSED: that columns x keep of the rows."""
    low = x * 0
    high = low + L_other
    for T in tl.static_range(N_TERMS):
        if CODE == PER_HEAD:
            kind, end, a, _ = _table_term(terms, head, T)
            lo, hi = _term_bounds(kind, end, a, x, L, L_other, TRANSPOSED)
        else:
            lo, hi = _term_bounds(
                (CODE >> (4 * T)) & 7, (CODE >> (4 * T + 3)) & 1, _number(terms, 2 * T),
                x, L, L_other, TRANSPOSED,
            )  # fmt: skip
        low = tl.maximum(low, lo)
        high = tl.minimum(high, hi)
    return low, high


@triton.jit
def _term_bounds(kind, end, a, x, L, L_other, TRANSPOSED: tl.constexpr):
    """kind and end_aligned are known at compile time, or only when the table has been read."""
    center = x
    if end == 1:
        center = x + (L_other - L)
    lo = x * 0
    hi = lo + L_other
    if kind == BLOCK_DIAGONAL:
        if end == 1:
            from_end = (L - 1 - x) // a * a
            lo = L_other - from_end - a
            hi = L_other - from_end
        else:
            lo = x // a * a
            hi = lo + a
    elif kind <= DILATED_TOEPLITZ:
        lo = center - a
        hi = center + a + 1
    elif kind == CAUSAL:
        if TRANSPOSED:
            lo = center
        else:
            hi = center + 1
    return lo, hi


@triton.jit
def codes_agree(
    kept, terms, batch, head, rows, columns, Lq, Lk, N_TERMS: tl.constexpr, CODE: tl.constexpr
):
    """`kept` where every dilated term and every Segments term also keeps the pair."""
    for T in tl.static_range(N_TERMS):
        if CODE == PER_HEAD:
            kind, end, a, b = _table_term(terms, head, T)
            row_code = (rows * 0).to(tl.int64)
            column_code = (columns * 0).to(tl.int64)
            if kind == DILATED_TOEPLITZ:
                row_code, column_code = _residues(rows, columns, end, b, Lq, Lk)
            if terms.segments is not None:  # noqa: SIM102   at compile time, the next at run time
                if kind == SEGMENTS:
                    row_code, column_code = _ids(terms.segments, a, batch, rows, columns, Lq, Lk)
            kept = kept & (row_code == column_code)
        elif ((CODE >> (4 * T)) & 7) == DILATED_TOEPLITZ:
            row_code, column_code = _residues(
                rows, columns, (CODE >> (4 * T + 3)) & 1, _number(terms, 2 * T + 1), Lq, Lk
            )
            kept = kept & (row_code == column_code)
        elif ((CODE >> (4 * T)) & 7) == SEGMENTS:
            row_code, column_code = _ids(
                terms.segments, _number(terms, 2 * T), batch, rows, columns, Lq, Lk
            )
            kept = kept & (row_code == column_code)
    return kept


@triton.jit
def _residues(rows, columns, end, b, Lq, Lk):
    center = rows
    if end == 1:
        center = rows + (Lk - Lq)
    return _floor_mod(center, b).to(tl.int64), (columns % b).to(tl.int64)


@triton.jit
def _ids(segments, a, batch, rows, columns, Lq, Lk):
    of_query = (
        segments.query
        + a.to(tl.int64) * segments.query_term
        + batch.to(tl.int64) * segments.query_batch
    )
    of_key = (
        segments.key + a.to(tl.int64) * segments.key_term + batch.to(tl.int64) * segments.key_batch
    )
    row_code = tl.load(
        of_query + rows.to(tl.int64) * segments.query_position, mask=rows < Lq, other=0
    )
    column_code = tl.load(
        of_key + columns.to(tl.int64) * segments.key_position, mask=columns < Lk, other=0
    )
    return row_code, column_code


@triton.jit
def head_step(terms, head, Lq, Lk, CODE: tl.constexpr, STEPPED: tl.constexpr):
    """(spacing of a tile's rows and columns, what to add to a row to compare it with a column)."""
    if STEPPED:
        if CODE == PER_HEAD:
            at = terms.table + head * TABLE_INTS + (TABLE_INTS - 2)
            step = tl.load(at).to(tl.int32)
            shift = tl.load(at + 1).to(tl.int32) * (Lk - Lq)
            return step, shift
        else:
            return terms.step, terms.step_shift
    else:
        return 1, 0


@triton.jit
def tile_start(index, L, step, BLOCK: tl.constexpr, STEPPED: tl.constexpr):
    """First position of a tile; L or more: there is no such tile. Tiles of one residue class
    follow each other."""
    if STEPPED:
        tiles = tl.cdiv(tl.cdiv(L, step), BLOCK)
        residue = index // tiles
        start = residue + (index - residue * tiles) * BLOCK * step
        return tl.where(residue < step, start, L)
    else:
        return index * BLOCK


@triton.jit
def tile_range(
    terms, head, first, L, L_other, step, shift, BLOCK: tl.constexpr,
    N_TERMS: tl.constexpr, CODE: tl.constexpr, STEPPED: tl.constexpr, TRANSPOSED: tl.constexpr,
):  # fmt: skip
    """(start, stop) of the columns (TRANSPOSED: rows) that a tile must visit, `step` apart.

    start is a multiple of 16 where the step is 1: loads stay aligned, and Philox draws four keys.
    """
    if N_TERMS == 0:
        return 0, L_other
    else:
        last = tl.minimum(first + step * (BLOCK - 1), L - 1)
        start, _ = key_bounds(terms, head, first, L, L_other, N_TERMS, CODE, TRANSPOSED)
        _, stop = key_bounds(terms, head, last, L, L_other, N_TERMS, CODE, TRANSPOSED)
        if STEPPED:
            if TRANSPOSED:
                start += _floor_mod(first - shift - start, step)
            else:
                start += _floor_mod(first + shift - start, step)
        else:
            start = start // 16 * 16
        return start, stop


@triton.jit
def near_tiles(
    terms, head, first, L, L_other, BLOCK: tl.constexpr, BLOCK_OTHER: tl.constexpr,
    N_TERMS: tl.constexpr, CODE: tl.constexpr, TRANSPOSED: tl.constexpr,
):  # fmt: skip
    """(start, length) of the whole tiles of columns that the pattern touches for a tile of rows."""
    begin, stop = tile_range(
        terms, head, first, L, L_other, 1, 0, BLOCK, N_TERMS, CODE, False, TRANSPOSED
    )
    begin = begin // BLOCK_OTHER * BLOCK_OTHER
    return begin, tl.maximum(tl.cdiv(stop - begin, BLOCK_OTHER), 0) * BLOCK_OTHER


@triton.jit
def part_length(near_length, L, BLOCK: tl.constexpr, PART: tl.constexpr):
    """Length of the near tiles (PART 0), or of all the others (PART 1)."""
    if PART == 0:
        return near_length
    else:
        return tl.cdiv(L, BLOCK) * BLOCK - near_length


@triton.jit
def part_start(at, near_start, near_length, PART: tl.constexpr):
    """Where a tile begins that lies `at` within its part."""
    if PART == 0:
        return near_start + at
    else:
        return at + tl.where(at >= near_start, near_length, 0)
