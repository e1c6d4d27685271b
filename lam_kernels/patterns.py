"""Structural patterns as data: which pairs (query row i, key column j) may see each other.

A pattern is a predicate and, per tile of query rows, a key range (start, stop, step) outside which
it keeps nothing. Both are pure integer arithmetic, so that the C++ (csrc/patterns.h) and Triton
kernels repeat them line by line.

    BlockDiagonal(block)               i // block == j // block
    Toeplitz(radius)                   |i - j| <= radius
    DilatedToeplitz(radius, dilation)  |i - j| <= radius and (i - j) % dilation == 0
    Causal()                           i >= j
    Segments(query_ids, key_ids)       query_ids[b, i] == key_ids[b, j]
    p & q                              both; at most 4 terms

`alignment="start"` counts i and j from 0, `alignment="end"` counts both from the last position: i
becomes Lq - 1 - i and j becomes Lk - 1 - j, so that the last row lies on the last column. Causal is
end-aligned unless told otherwise (the last query sees every key), the others are start-aligned;
terms of both alignments may be combined. With Lq == Lk the alignment matters to BlockDiagonal only,
and only when the length is no multiple of the block.

Sources: GMSA (arXiv 2110.13992; its BD_k, TP_r and TD_r^d, with k and r explicit), causal and
segment ("document") masks as everywhere else.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from math import gcd

import torch
from torch import Tensor

# Kinds and the layout of one encoded pattern: csrc/lam.h (PatternKind, kMaxPatternTerms) has the
# same numbers.
BLOCK_DIAGONAL, TOEPLITZ, DILATED_TOEPLITZ, CAUSAL, SEGMENTS = range(5)
MAX_TERMS = 4
INTS_PER_TERM = 4  # kind, end_aligned, a, b
INTS_PER_SPEC = 1 + MAX_TERMS * INTS_PER_TERM

# No sequence is this long, so a larger block, radius or dilation means the same; kernels may then
# add a position to it in 64 bits without overflow.
_LARGEST = 2**40

_ALIGNMENTS = ("start", "end")
_INTEGER_DTYPES = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


class Pattern:
    """What all patterns can do; build one of the classes below, combine them with `&`."""

    def __and__(self, other: Pattern) -> Pattern:
        if not isinstance(other, Pattern):
            return NotImplemented
        return Intersection((*self._parts(), *other._parts()))

    def dense(self, Lq: int, Lk: int, *, device=None) -> Tensor:
        """The pattern as a boolean tensor, True = visible.

        Shape [Lq, Lk]; with Segments in it [B|1, 1, Lq, Lk] on the device of its ids.
        """
        for part in self._parts():
            if isinstance(part, Segments):
                part.check_lengths(Lq, Lk)
                device = part.query_ids.device
        i = torch.arange(Lq, device=device)[:, None]
        j = torch.arange(Lk, device=device)[None, :]
        kept = torch.ones(Lq, Lk, dtype=torch.bool, device=device)
        for part in self._parts():
            kept = kept & part._keep(i, j, Lq, Lk)
        return kept

    def density(self, Lq: int, Lk: int) -> float:
        """Visible pairs / (Lq * Lk), 0 when there is no pair at all.

        With Segments the mean over the batch, which reads the ids and so waits for their device.
        """
        if Lq == 0 or Lk == 0:
            return 0.0
        if self.segment_ids:
            return self._segment_density(Lq, Lk)
        return visible_pairs(self._spec, Lq, Lk) / (Lq * Lk)

    def key_range(self, rows: range, Lq: int, Lk: int) -> tuple[int, int, int]:
        """(start, stop, step): no row of the tile `rows` keeps a key outside that range.

        `rows` is a non-empty range with a positive step, inside range(Lq). The step is a dilation
        when all rows of the tile are of one residue class of it, else 1. For a single row and no
        Segments the range is exactly the keys it sees.
        """
        return key_range(self._spec, rows, Lq, Lk)

    def encode(self) -> tuple[tuple[int, ...], tuple[Tensor, ...]]:
        """The flat integers that the op takes (see `encode` below) and the ids they refer to."""
        return self._encoded, self.segment_ids

    # Set once by __post_init__ of the dataclasses, so that a call only reads them.
    _spec = ()  # n_terms, then MAX_TERMS x (kind, end_aligned, a, b)
    _encoded = ()  # (1, *_spec)
    segment_ids = ()  # query_ids, key_ids of each Segments term

    def _parts(self) -> tuple[Pattern, ...]:
        return (self,)

    def _finish(self) -> None:
        terms, ids = [], []
        for part in self._parts():
            kind, a, b = part._term()
            if kind == SEGMENTS:
                a = len(ids) // 2
                ids += [part.query_ids, part.key_ids]
            terms.append((kind, int(getattr(part, "alignment", "start") == "end"), a, b))
        spec = [len(terms)]
        for term in terms:
            spec += term
        spec += [0] * (INTS_PER_SPEC - len(spec))
        # frozen protects the caller's fields; these three only repeat them in another form
        object.__setattr__(self, "_spec", tuple(spec))
        object.__setattr__(self, "_encoded", (1, *spec))
        object.__setattr__(self, "segment_ids", tuple(ids))

    def _segment_density(self, Lq: int, Lk: int) -> float:
        rows_per_chunk = max(1, 2**24 // Lk)  # at most 16 MiB of booleans per sample at a time
        total, batch = 0, 1
        j = torch.arange(Lk, device=self.segment_ids[0].device)[None, :]
        for part in self._parts():
            if isinstance(part, Segments):
                part.check_lengths(Lq, Lk)
        for first in range(0, Lq, rows_per_chunk):
            i = torch.arange(first, min(first + rows_per_chunk, Lq), device=j.device)[:, None]
            kept = torch.ones(1, dtype=torch.bool, device=j.device)
            for part in self._parts():
                kept = kept & part._keep(i, j, Lq, Lk)
            batch = kept.shape[0]
            total += int(kept.sum())
        return total / (batch * Lq * Lk)


def _check_positive(pattern: str, name: str, value: int, least: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{pattern}: {name} must be an int, got {type(value).__name__} {value!r}")
    if value < least:
        raise ValueError(f"{pattern}: {name} must be at least {least}, got {value}")


def _check_alignment(pattern: str, alignment: str) -> None:
    if alignment not in _ALIGNMENTS:
        raise ValueError(f'{pattern}: alignment must be "start" or "end", got {alignment!r}')


def _offset(alignment: str, Lq: int, Lk: int) -> int:
    """What i - j has to be moved by to become the distance of the aligned positions."""
    return Lk - Lq if alignment == "end" else 0


@dataclass(frozen=True)
class BlockDiagonal(Pattern):
    """Row i sees column j when both lie in the same block: i // block == j // block.

    alignment="end" starts the blocks at the last position, so that a partial block comes first.
    """

    block: int
    alignment: str = field(default="start", kw_only=True)

    def __post_init__(self) -> None:
        _check_positive("BlockDiagonal", "block", self.block, 1)
        _check_alignment("BlockDiagonal", self.alignment)
        self._finish()

    def _term(self) -> tuple[int, int, int]:
        return BLOCK_DIAGONAL, min(self.block, _LARGEST), 0

    def _keep(self, i: Tensor, j: Tensor, Lq: int, Lk: int) -> Tensor:
        if self.alignment == "end":
            i, j = Lq - 1 - i, Lk - 1 - j
        block = min(self.block, _LARGEST)
        return i // block == j // block


@dataclass(frozen=True)
class Toeplitz(Pattern):
    """Row i sees column j when |i - j| <= radius, both ends included: 2 * radius + 1 keys in the
    middle."""

    radius: int
    alignment: str = field(default="start", kw_only=True)

    def __post_init__(self) -> None:
        _check_positive("Toeplitz", "radius", self.radius, 0)
        _check_alignment("Toeplitz", self.alignment)
        self._finish()

    def _term(self) -> tuple[int, int, int]:
        return TOEPLITZ, min(self.radius, _LARGEST), 0

    def _keep(self, i: Tensor, j: Tensor, Lq: int, Lk: int) -> Tensor:
        return (i - j + _offset(self.alignment, Lq, Lk)).abs() <= min(self.radius, _LARGEST)


@dataclass(frozen=True)
class DilatedToeplitz(Pattern):
    """Row i sees column j when |i - j| <= radius and i - j is a multiple of dilation."""

    radius: int
    dilation: int
    alignment: str = field(default="start", kw_only=True)

    def __post_init__(self) -> None:
        _check_positive("DilatedToeplitz", "radius", self.radius, 0)
        _check_positive("DilatedToeplitz", "dilation", self.dilation, 1)
        _check_alignment("DilatedToeplitz", self.alignment)
        self._finish()

    def _term(self) -> tuple[int, int, int]:
        return DILATED_TOEPLITZ, min(self.radius, _LARGEST), min(self.dilation, _LARGEST)

    def _keep(self, i: Tensor, j: Tensor, Lq: int, Lk: int) -> Tensor:
        delta = i - j + _offset(self.alignment, Lq, Lk)
        near = delta.abs() <= min(self.radius, _LARGEST)
        return near & (delta % min(self.dilation, _LARGEST) == 0)


@dataclass(frozen=True)
class Causal(Pattern):
    """Row i sees the columns up to its own position: j <= i + Lk - Lq ("end", the default) or j <=
    i ("start")."""

    alignment: str = field(default="end", kw_only=True)

    def __post_init__(self) -> None:
        _check_alignment("Causal", self.alignment)
        self._finish()

    def _term(self) -> tuple[int, int, int]:
        return CAUSAL, 0, 0

    def _keep(self, i: Tensor, j: Tensor, Lq: int, Lk: int) -> Tensor:
        return i - j + _offset(self.alignment, Lq, Lk) >= 0


@dataclass(frozen=True, eq=False)
class Segments(Pattern):
    """Row i of sample b sees column j when query_ids[b, i] == key_ids[b, j].

    Ids are integer tensors [B|1, Lq] and [B|1, Lk] of any integer dtype (stored as int64); any
    value is an id. They are compared where they lie, never read at the front door.
    """

    query_ids: Tensor  # [B|1, Lq]
    key_ids: Tensor  # [B|1, Lk]

    def __post_init__(self) -> None:
        for name, ids in (("query_ids", self.query_ids), ("key_ids", self.key_ids)):
            if not isinstance(ids, Tensor):
                raise TypeError(f"Segments: {name} must be a Tensor, got {type(ids).__name__}")
            if ids.dtype not in _INTEGER_DTYPES:
                raise TypeError(f"Segments: {name} must hold integers, got {ids.dtype}")
            if ids.dim() != 2:
                raise ValueError(f"Segments: {name} must be [B|1, L], got shape {tuple(ids.shape)}")
            object.__setattr__(self, name, ids.to(torch.int64))
        batches = self.query_ids.shape[0], self.key_ids.shape[0]
        if batches[0] != batches[1] and 1 not in batches:
            raise ValueError(
                f"Segments: query_ids and key_ids have batches {batches[0]} and {batches[1]}"
            )
        if self.query_ids.device != self.key_ids.device:
            raise ValueError(
                f"Segments: query_ids is on {self.query_ids.device}, "
                f"key_ids on {self.key_ids.device}"
            )
        self._finish()

    def check_lengths(self, Lq: int, Lk: int) -> None:
        if self.query_ids.shape[1] != Lq:
            raise ValueError(
                f"Segments: query_ids has length {self.query_ids.shape[1]}, expected {Lq}"
            )
        if self.key_ids.shape[1] != Lk:
            raise ValueError(f"Segments: key_ids has length {self.key_ids.shape[1]}, expected {Lk}")

    def _term(self) -> tuple[int, int, int]:
        return SEGMENTS, 0, 0

    def _keep(self, i: Tensor, j: Tensor, Lq: int, Lk: int) -> Tensor:
        return self.query_ids[:, None, i] == self.key_ids[:, None, j]


@dataclass(frozen=True)
class Intersection(Pattern):
    """Pairs that every part keeps; what `&` builds. At most 4 different parts."""

    parts: tuple[Pattern, ...]

    def __post_init__(self) -> None:
        different: list[Pattern] = []
        for part in self.parts:
            if part not in different:
                different.append(part)
        if len(different) > MAX_TERMS:
            raise ValueError(
                f"a pattern combines at most {MAX_TERMS} terms with &, got {len(different)}: "
                + " & ".join(type(part).__name__ for part in different)
            )
        object.__setattr__(self, "parts", tuple(different))
        self._finish()

    def _parts(self) -> tuple[Pattern, ...]:
        return self.parts


_EVERYTHING = (0,) * INTS_PER_SPEC


def encode(
    pattern: Pattern | Sequence[Pattern | None] | None, heads: int
) -> tuple[Sequence[int], tuple[Tensor, ...]]:
    """Flat integers and segment ids of a pattern, or of one pattern a head (None there is
    "everything").

        []                                                        everything
        [n_specs, n_specs x (n_terms, 4 x (kind, end_aligned, a, b))]   n_specs is 1 or heads,
        unused terms are 0

    a, b: block | radius | radius, dilation | - | s, where ids 2s and 2s + 1 are the query_ids and
        key_ids.
    """
    if pattern is None:
        return (), ()
    if isinstance(pattern, Pattern):
        return pattern._encoded, pattern.segment_ids
    if not isinstance(pattern, Sequence) or isinstance(pattern, str):
        raise TypeError(
            "pattern must be a pattern, a sequence of one pattern (or None) a head, or None; "
            f"got {type(pattern).__name__}"
        )
    if len(pattern) != heads:
        raise ValueError(
            f"pattern has {len(pattern)} entries, expected one for each of {heads} heads"
        )
    flat = [heads]
    ids: tuple[Tensor, ...] = ()
    for head, one in enumerate(pattern):
        if one is None:
            flat += _EVERYTHING
        elif not isinstance(one, Pattern):
            raise TypeError(f"pattern[{head}] must be a pattern or None, got {type(one).__name__}")
        elif one.segment_ids:
            flat += _shift_segments(one._spec, len(ids) // 2)
            ids += one.segment_ids
        else:
            flat += one._spec
    return flat, ids


def _shift_segments(spec: Sequence[int], first: int) -> list[int]:
    """The same spec with its ids counted from `first`."""
    shifted = list(spec)
    for at in range(1, 1 + spec[0] * INTS_PER_TERM, INTS_PER_TERM):
        if spec[at] == SEGMENTS:
            shifted[at + 2] += first
    return shifted


def specs(flat: Sequence[int]) -> list[Sequence[int]]:
    """The encoded patterns in a flat list: none (everything), one (all heads), or one a head."""
    return [flat[at : at + INTS_PER_SPEC] for at in range(1, len(flat), INTS_PER_SPEC)]


def spec_terms(spec: Sequence[int]) -> list[Sequence[int]]:
    """(kind, end_aligned, a, b) of each term of one encoded pattern."""
    return [
        spec[at : at + INTS_PER_TERM] for at in range(1, 1 + spec[0] * INTS_PER_TERM, INTS_PER_TERM)
    ]


def key_range(spec: Sequence[int], rows: range, Lq: int, Lk: int) -> tuple[int, int, int]:
    """Pattern.key_range for one encoded pattern.

    Every bound grows with i, so the first and the last row of the tile decide. Two dilations in one
    pattern are solved together (Chinese remainder), which may show that nothing is kept: then start
    == stop.
    """
    first, last = rows[0], rows[-1]
    start, stop = 0, Lk
    residue, step = 0, 1  # kept keys are residue (mod step)
    for kind, end_aligned, a, b in spec_terms(spec):
        offset = Lk - Lq if end_aligned else 0
        if kind == BLOCK_DIAGONAL and not end_aligned:
            start, stop = max(start, first // a * a), min(stop, (last // a + 1) * a)
        elif kind == BLOCK_DIAGONAL:
            start = max(start, Lk - ((Lq - 1 - first) // a + 1) * a)
            stop = min(stop, Lk - (Lq - 1 - last) // a * a)
        elif kind == TOEPLITZ:
            start, stop = max(start, first + offset - a), min(stop, last + offset + a + 1)
        elif kind == DILATED_TOEPLITZ:
            reach = a // b * b
            start, stop = max(start, first + offset - reach), min(stop, last + offset + reach + 1)
            if len(rows) == 1 or rows.step % b == 0:  # one residue class
                residue, step = _both_residues(residue, step, (first + offset) % b, b)
                if step == 0:
                    return 0, 0, 1
        elif kind == CAUSAL:
            stop = min(stop, last + offset + 1)
    start += (residue - start) % step
    return (start, stop, step) if start < stop else (0, 0, 1)


def _both_residues(r1: int, d1: int, r2: int, d2: int) -> tuple[int, int]:
    """The x with x = r1 (mod d1) and x = r2 (mod d2) as (residue, step); step 0 when there is
    none."""
    common = gcd(d1, d2)
    if (r2 - r1) % common:
        return 0, 0
    d2 //= common
    times = (r2 - r1) // common * pow(d1 // common, -1, d2) % d2
    return r1 + d1 * times, d1 * d2


def visible_pairs(spec: Sequence[int], Lq: int, Lk: int) -> int:
    """Pairs that one encoded pattern keeps, its Segments terms taken as "everything" (their ids are
    data)."""
    if spec[0] == 0:
        return Lq * Lk
    return sum(len(range(*key_range(spec, range(i, i + 1), Lq, Lk))) for i in range(Lq))
