"""Every pattern, pair by pair, against the plain reading of its definition."""

from __future__ import annotations

import copy
import itertools
import pickle

import pytest
import torch

from lam_kernels import BlockDiagonal, Causal, DilatedToeplitz, Segments, Toeplitz
from lam_kernels.patterns import INTS_PER_SPEC, SEGMENTS, Intersection, encode, specs, visible_pairs
from python_ref.patterns import visible

LENGTHS = [(1, 1), (5, 5), (8, 8), (7, 12), (12, 7), (1, 9), (9, 1)]
ALIGNMENTS = ("start", "end")
HUGE = 2**62

TERMS = [
    *(BlockDiagonal(block, alignment=a) for block in (1, 3, 4, HUGE) for a in ALIGNMENTS),
    *(Toeplitz(radius, alignment=a) for radius in (0, 2, HUGE) for a in ALIGNMENTS),
    *(
        DilatedToeplitz(radius, dilation, alignment=a)
        for radius, dilation in ((0, 2), (3, 2), (5, 3), (4, 1), (HUGE, 4), (4, HUGE))
        for a in ALIGNMENTS
    ),
    *(Causal(alignment=a) for a in ALIGNMENTS),
]
COMBINATIONS = [
    Toeplitz(2) & Causal(),
    Toeplitz(3, alignment="end") & Causal(alignment="start"),
    BlockDiagonal(4) & DilatedToeplitz(6, 2) & Causal(),
    BlockDiagonal(3, alignment="end") & Toeplitz(2),
    DilatedToeplitz(9, 2) & DilatedToeplitz(9, 3),
    DilatedToeplitz(9, 4) & DilatedToeplitz(9, 6, alignment="end"),
    DilatedToeplitz(9, 2) & DilatedToeplitz(9, 2, alignment="end"),
]


def term_keeps(term, i: int, j: int, Lq: int, Lk: int, b: int = 0) -> bool:
    """The definitions of the public interface, one pair at a time."""
    if isinstance(term, Segments):
        query_ids, key_ids = term.query_ids, term.key_ids
        return bool(
            query_ids[b % query_ids.shape[0], i].item() == key_ids[b % key_ids.shape[0], j].item()
        )
    if term.alignment == "end":  # both count from the last position; looking back is looking ahead
        i, j = Lq - 1 - i, Lk - 1 - j
        ahead = i - j
    else:
        ahead = j - i
    match term:
        case BlockDiagonal():
            return i // term.block == j // term.block
        case Toeplitz():
            return abs(i - j) <= term.radius
        case DilatedToeplitz():
            return abs(i - j) <= term.radius and (i - j) % term.dilation == 0
        case Causal():
            return ahead <= 0


def brute_force(pattern, Lq: int, Lk: int, b: int = 0) -> torch.Tensor:
    terms = pattern.parts if isinstance(pattern, Intersection) else (pattern,)
    return torch.tensor(
        [[all(term_keeps(t, i, j, Lq, Lk, b) for t in terms) for j in range(Lk)] for i in range(Lq)]
    )


@pytest.mark.parametrize("pattern", TERMS + COMBINATIONS, ids=repr)
def test_every_pair(pattern):
    for Lq, Lk in LENGTHS:
        expected = brute_force(pattern, Lq, Lk)
        assert torch.equal(pattern.dense(Lq, Lk), expected)
        flat, ids = pattern.encode()
        assert torch.equal(visible(flat, ids, Lq, Lk)[0, 0], expected)
        assert pattern.density(Lq, Lk) == expected.float().mean(dtype=torch.float64).item()
        assert visible_pairs(flat[1:], Lq, Lk) == int(expected.sum())


@pytest.mark.parametrize("pattern", TERMS + COMBINATIONS, ids=repr)
def test_no_kept_pair_outside_the_key_range(pattern):
    for Lq, Lk in LENGTHS:
        dense = brute_force(pattern, Lq, Lk)
        for first, last, step in itertools.product(range(Lq), range(Lq), (1, 2, 3, 4, 6)):
            rows = range(first, last + 1, step)
            if not rows:
                continue
            start, stop, key_step = pattern.key_range(rows, Lq, Lk)
            assert 0 <= start <= stop <= Lk
            assert key_step >= 1
            outside = torch.ones(Lk, dtype=torch.bool)
            outside[torch.arange(start, stop, key_step)] = False
            assert not dense[list(rows)][:, outside].any(), (Lq, Lk, rows)
            if len(rows) == 1:
                assert dense[first].nonzero().flatten().tolist() == list(
                    range(start, stop, key_step)
                )


def test_a_dilated_pattern_visits_only_its_residue_class():
    pattern = DilatedToeplitz(8, 4)
    assert pattern.key_range(range(10, 31, 4), 64, 64) == (2, 39, 4)
    assert pattern.key_range(range(10, 14), 64, 64)[2] == 1  # all residues: every key
    assert (pattern & Causal()).key_range(range(3, 20, 8), 64, 64) == (3, 20, 4)


def test_segments_pair_by_pair():
    torch.manual_seed(0)
    for query_batch, key_batch in ((1, 1), (3, 3), (1, 3), (3, 1)):
        segments = Segments(
            torch.randint(-2, 2, (query_batch, 6)), torch.randint(-2, 2, (key_batch, 8))
        )
        for pattern in (segments, segments & Causal(), Toeplitz(2) & segments):
            dense = pattern.dense(6, 8)
            batch = max(query_batch, key_batch)
            assert dense.shape == (batch, 1, 6, 8)
            expected = torch.stack([brute_force(pattern, 6, 8, b) for b in range(batch)])
            assert torch.equal(dense[:, 0], expected)
            flat, ids = pattern.encode()
            assert torch.equal(visible(flat, ids, 6, 8), dense)
            assert pattern.density(6, 8) == pytest.approx(expected.double().mean().item())


@pytest.mark.parametrize("dtype", [torch.int32, torch.int16, torch.int8, torch.uint8])
def test_segment_ids_of_any_integer_dtype(dtype):
    ids = torch.tensor([[0, 0, 1, 1]])
    segments = Segments(ids.to(dtype), ids)
    assert segments.query_ids.dtype == torch.int64
    assert torch.equal(segments.dense(4, 4)[0, 0], BlockDiagonal(2).dense(4, 4))


def test_one_pattern_a_head():
    a = Segments(torch.tensor([[0, 1, 1]]), torch.tensor([[0, 0, 1]]))
    b = Segments(torch.tensor([[5, 5, 7]]), torch.tensor([[7, 5, 7]]))
    patterns = [None, Causal(), a & Toeplitz(1), b]
    flat, ids = encode(patterns, 4)
    assert len(flat) == 1 + 4 * INTS_PER_SPEC
    assert len(ids) == 4
    dense = visible(flat, ids, 3, 3)
    assert dense[0, 0].all()
    for head in range(1, 4):
        assert torch.equal(dense[0, head], brute_force(patterns[head], 3, 3))
    shifted = specs(flat)[3]
    assert (shifted[1], shifted[3]) == (SEGMENTS, 1)


def test_everything_is_no_pattern():
    assert encode(None, 4) == ((), ())
    assert visible((), (), 2, 3).shape == (1, 1, 2, 3)


def test_encoding_is_the_one_the_kernels_read():
    flat, ids = (BlockDiagonal(4, alignment="end") & DilatedToeplitz(6, 2) & Causal()).encode()
    assert flat == (1, 3, 0, 1, 4, 0, 2, 0, 6, 2, 3, 1, 0, 0, 0, 0, 0, 0)
    assert ids == ()
    pattern = Toeplitz(3)
    assert encode(pattern, 8)[0] is encode(pattern, 8)[0]  # kept, not rebuilt at every call


def test_equal_terms_count_once():
    assert (Causal() & Causal()).parts == (Causal(),)
    many = Causal() & Toeplitz(1) & Causal() & Toeplitz(2) & Toeplitz(1) & BlockDiagonal(2)
    assert len(many.parts) == 4
    assert many == Causal() & Toeplitz(1) & Toeplitz(2) & BlockDiagonal(2)


def test_patterns_survive_pickle_and_copy():
    for pattern in (
        Toeplitz(2) & Causal(),
        Segments(torch.ones(1, 3).long(), torch.ones(1, 4).int()),
    ):
        for same in (pickle.loads(pickle.dumps(pattern)), copy.deepcopy(pattern)):
            assert same.encode()[0] == pattern.encode()[0]
            assert torch.equal(same.dense(3, 4), pattern.dense(3, 4))


def test_empty_lengths():
    for pattern in TERMS:
        assert pattern.dense(0, 3).shape == (0, 3)
        assert pattern.dense(3, 0).shape == (3, 0)
        assert pattern.density(0, 3) == pattern.density(3, 0) == 0.0
        assert pattern.key_range(range(0, 3), 3, 0) == (0, 0, 1)


@pytest.mark.parametrize(
    ("build", "error", "words"),
    [
        (lambda: BlockDiagonal(0), ValueError, "block must be at least 1, got 0"),
        (lambda: BlockDiagonal(2.0), TypeError, "block must be an int"),
        (lambda: BlockDiagonal(True), TypeError, "block must be an int"),
        (lambda: Toeplitz(-1), ValueError, "radius must be at least 0, got -1"),
        (lambda: DilatedToeplitz(-1, 2), ValueError, "radius must be at least 0"),
        (lambda: DilatedToeplitz(4, 0), ValueError, "dilation must be at least 1, got 0"),
        (lambda: Causal(alignment="left"), ValueError, "alignment must be"),
        (lambda: Segments([0], [1]), TypeError, "query_ids must be a Tensor, got list"),
        (
            lambda: Segments(torch.zeros(1, 3), torch.zeros(1, 3).int()),
            TypeError,
            "query_ids must hold integers",
        ),
        (
            lambda: Segments(torch.zeros(1, 3).bool(), torch.zeros(1, 3).int()),
            TypeError,
            "query_ids must hold integers",
        ),
        (
            lambda: Segments(torch.zeros(1, 3).int(), torch.zeros(3).int()),
            ValueError,
            r"key_ids must be \[B\|1, L\]",
        ),
        (
            lambda: Segments(torch.zeros(2, 3).int(), torch.zeros(3, 3).int()),
            ValueError,
            "batches 2 and 3",
        ),
        (
            lambda: Causal() & Toeplitz(1) & Toeplitz(2) & Toeplitz(3) & Toeplitz(4),
            ValueError,
            "at most 4 terms",
        ),
        (lambda: Causal() & torch.ones(2, 2).bool(), TypeError, "unsupported operand"),
        (lambda: encode("causal", 2), TypeError, "pattern must be a pattern"),
        (lambda: encode([Causal()], 2), ValueError, "1 entries, expected one for each of 2 heads"),
        (lambda: encode([Causal(), 3], 2), TypeError, r"pattern\[1\] must be a pattern or None"),
        (
            lambda: Segments(torch.zeros(1, 3).int(), torch.zeros(1, 3).int()).dense(4, 3),
            ValueError,
            "query_ids has length 3, expected 4",
        ),
    ],
)
def test_refusals(build, error, words):
    with pytest.raises(error, match=words):
        build()
