"""The FLOP and byte formulas against counting."""

import pytest
from torch import Tensor

from bench.ops import global_local_attention, map_gated_attention, score_masked_attention
from bench.ops import masked_attention as cost
from lam_kernels import LowRankMask
from python_ref.inputs import Problem

PROBLEMS = [
    Problem(B=2, H=3, Lq=5, Lk=7, D=4, Dv=6, multiplier="b1qk"),
    Problem(B=1, H=2, Lq=9, D=2, bias="1h1k", pattern="Toeplitz(2)"),
    Problem(B=1, H=2, Lq=9, Lk=6, D=3, multiplier="11qk", pattern="BlockDiagonal(4)"),
    Problem(B=2, H=1, Lq=11, D=2, pattern="DilatedToeplitz(6, 3)"),
    Problem(B=1, H=1, Lq=6, Lk=9, D=2, pattern="Causal()"),
    Problem(B=1, H=2, Lq=8, D=2, pattern=("Toeplitz(1) & Causal()", None)),
    Problem(B=1, H=1, Lq=0, D=2),
    Problem(B=1, H=2, Lq=6, D=2, multiplier="11qk", bias="1h1k", grads="qk", dtype="bfloat16"),
    Problem(B=3, H=2, Lq=5, Lk=9, D=2, multiplier="b1qk", key_mask=True),
    Problem(B=2, H=4, Hkv=2, Lq=5, D=2, attn_mask="b1qk", pattern="Toeplitz(2)"),
    Problem(B=2, H=2, Lq=6, D=2, attn_mask="text(3)", key_mask=True),
    Problem(B=2, H=2, Lq=10, D=2, pattern="Segments(3)", seed=4),
    Problem(B=8, H=2, Lq=16, D=2, bias="1hqk", pattern="Windows(2, 2, 4, 2)"),
    Problem(B=2, H=2, Lq=8, D=2, pattern=("Toeplitz(1)", None), key_mask=True),
    Problem(B=2, H=3, Lq=6, Lk=8, D=2, multiplier="rank 3: b1 11 1h", bias="rank 2: 11 11"),
]


def _visible(problem):
    """Every visible pair, one at a time, from what the contenders are given."""
    operands = cost.draw(problem)
    patterns = operands.pattern if isinstance(operands.pattern, list) else None
    found = []
    for b in range(problem.B):
        for h in range(problem.H):
            one = patterns[h] if patterns else operands.pattern
            dense = None if one is None else one.dense(problem.Lq, problem.Lk)
            for i in range(problem.Lq):
                for j in range(problem.Lk):
                    at = (b, h, i, j)
                    seen = dense is None or _entry(dense.view(-1, 1, *dense.shape[-2:]), at)
                    if operands.attn_mask is not None:
                        seen = seen and _entry(operands.attn_mask, at)
                    if operands.key_mask is not None:
                        seen = seen and bool(operands.key_mask[b, j])
                    if seen:
                        found.append(at)
    return found


def _entry(mask, at):
    return bool(mask[tuple(x if n > 1 else 0 for x, n in zip(at, mask.shape, strict=True))])


@pytest.mark.parametrize("problem", PROBLEMS, ids=repr)
def test_visible_pairs(problem):
    assert cost.visible_pairs(problem) == len(_visible(problem))


@pytest.mark.parametrize("problem", PROBLEMS, ids=repr)
@pytest.mark.parametrize("direction", ["fwd", "bwd", "both"])
def test_flops(problem, direction):
    """One multiply and one add for each step of each product that the formulas name."""
    D, Dv = problem.D, problem.Dv
    products = {} if direction == "bwd" else {"S": D, "O": Dv}
    if direction != "fwd":
        products |= {"S again": D, "dP": Dv, "dV": Dv, "dQ": D, "dK": D}
    count = 0
    for _ in _visible(problem):
        for steps in products.values():
            for _ in range(steps):
                count += 2
    for name in ("multiplier", "bias"):  # rows @ columns^T of each sharing; back to both factors
        mask = getattr(cost.draw(problem), name)
        if isinstance(mask, LowRankMask):
            by_sample, by_head = (max(f.shape[i] for f in mask.factors()[:2]) for i in (0, 1))
            units = by_sample * by_head * problem.Lq * problem.Lk
            count += 2 * mask.rows.shape[-1] * units * {"fwd": 1, "bwd": 3, "both": 4}[direction]
    assert cost.flops(problem, direction) == count


def test_the_usual_convention():
    problem = Problem(B=1, H=1, Lq=8, D=4)
    forward = cost.flops(problem, "fwd")
    assert forward == 4 * 8 * 8 * 4
    assert cost.flops(problem, "bwd") == 2.5 * forward
    assert cost.flops(problem, "both") == 3.5 * forward
    assert cost.flops(problem, "call") == forward


def _bytes_of(tensors):
    return sum(t.numel() * t.element_size() for t in tensors)


@pytest.mark.parametrize("problem", [p for p in PROBLEMS if not p.pattern], ids=repr)
def test_least_bytes_of_dense_problems(problem):
    """Operands in, out and lse out; backward reads those and grad_out and writes gradients."""
    if problem.attn_mask and problem.multiplier:
        pytest.skip("entries that nobody sees need not be read: not this simple sum")
    operands = cost.draw(problem)
    names = ("query", "key", "value", "bias", "key_mask", "attn_mask")
    given = [t for t in (getattr(operands, n) for n in names) if t is not None]
    given = [f for t in given for f in ([t] if isinstance(t, Tensor) else t.factors())]
    read = _bytes_of(given)
    if isinstance(operands.multiplier, LowRankMask):
        read += _bytes_of(operands.multiplier.factors())
    elif operands.multiplier is not None:  # entries that some visible pair uses
        shape = operands.multiplier.shape
        pairs = problem.B * problem.H * problem.Lq * problem.Lk
        share = len(_visible(problem)) / pairs
        read += round(shape.numel() * share) * operands.multiplier.element_size()
    lse = 4 * problem.B * problem.H * problem.Lq
    forward = read + _bytes_of([operands.grad_out]) + lse  # out is as large as grad_out
    assert cost.least_bytes(problem, "fwd") == forward
    backward = read + _bytes_of([operands.grad_out, operands.grad_out]) + lse
    backward += _bytes_of(operands.leaves.values())
    assert cost.least_bytes(problem, "bwd") == backward
    assert cost.least_bytes(problem, "both") == forward + backward


def test_segment_ids_are_read_as_the_op_stores_them():
    plain = Problem(B=8, H=2, Lq=16, D=2)
    for pattern in ("Windows(2, 2, 4, 2)", "Segments(3)"):
        more = cost.least_bytes(plain.but(pattern=pattern), "fwd") - cost.least_bytes(plain, "fwd")
        assert more == 2 * 8 * 16 * 8


def test_hidden_entries_of_a_mask_need_not_be_read():
    dense = Problem(B=1, H=1, Lq=64, D=4, multiplier="11qk")
    local = dense.but(pattern="BlockDiagonal(8)")
    saved = cost.least_bytes(dense, "fwd") - cost.least_bytes(local, "fwd")
    assert saved == (64 * 64 - 8 * 64) * 4


TWO_MAPS = [
    Problem(B=2, H=3, Lq=7, D=4, Dv=6, pattern="Toeplitz(2)"),
    Problem(B=2, H=2, Lq=8, D=3, pattern="BlockDiagonal(4)", key_mask=True, seed=3),
    Problem(B=1, H=2, Lq=9, D=2, pattern=("Toeplitz(1)", "DilatedToeplitz(4, 2)"), key_mask=True),
    Problem(B=1, H=2, Lq=6, D=2, dtype="bfloat16"),
]
WITH_MASKS = [
    Problem(B=2, H=2, Lq=5, Lk=7, D=4, pattern="Toeplitz(1)", multiplier="b1qk", bias="1h1k"),
    Problem(B=2, H=2, Lq=5, D=4, pattern="Toeplitz(1)", multiplier="11qk", grads="qkv"),
]


def _pairs_of_two_maps(operands):
    """(visible to the global half, and to the local one), one pair at a time."""
    p = operands.problem
    patterns = operands.pattern if isinstance(operands.pattern, list) else [operands.pattern] * p.H
    dense = [None if one is None else one.dense(p.Lq, p.Lk) for one in patterns]
    whole = near = 0
    for b in range(p.B):
        for h in range(p.H):
            for i in range(p.Lq):
                for j in range(p.Lk):
                    seen = operands.key_mask is None or bool(operands.key_mask[b, j])
                    whole += seen
                    near += seen and (dense[h] is None or bool(dense[h][i, j]))
    return whole, near


@pytest.mark.parametrize("problem", TWO_MAPS + WITH_MASKS[:1], ids=repr)
@pytest.mark.parametrize("direction", ["fwd", "bwd", "both", "call"])
def test_flops_of_global_and_local(problem, direction):
    whole, near = _pairs_of_two_maps(global_local_attention.draw(problem))
    D, Dv = problem.D, problem.Dv
    count = 0
    if direction != "bwd":
        count += whole * (D + Dv) + near * Dv  # S, P V, local P V
    if direction in ("bwd", "both"):
        count += whole * (D + D + D + Dv + Dv) + near * (Dv + Dv)  # S, dQ, dK, dP, dV
    assert global_local_attention.flops(problem, direction) == 2 * count


@pytest.mark.parametrize("problem", TWO_MAPS, ids=repr)
@pytest.mark.parametrize("direction", ["fwd", "bwd", "both", "call"])
def test_flops_of_gated_maps(problem, direction):
    whole, near = _pairs_of_two_maps(map_gated_attention.draw(problem))
    D, Dv, T = problem.D, problem.Dv, problem.Lq
    count = 0
    if direction != "bwd":
        count += whole * (D + Dv) + (whole + near) * T  # S, A V, each map times its gate
    if direction in ("bwd", "both"):
        count += whole * (D + D + D + Dv + Dv)  # S, dQ, dK, dA, dV
        count += (whole + near) * (T + T + T)  # the logit, a map's gradient, its gate's
    assert map_gated_attention.flops(problem, direction) == 2 * count


NETWORKS = [
    score_masked_attention.Problem(B=2, H=3, Lq=5, Lk=7, D=4, depth=3, hidden=6),
    score_masked_attention.Problem(B=3, H=2, Lq=4, Lk=8, D=2, depth=1, key_mask=True),
    score_masked_attention.Problem(B=2, H=2, Lq=3, Lk=5, D=2, depth=2, heads="mean", fusion="add"),
]


@pytest.mark.parametrize("problem", NETWORKS, ids=repr)
@pytest.mark.parametrize("direction", ["fwd", "bwd", "both", "call"])
def test_flops_of_a_network_of_the_scores(problem, direction):
    p = problem
    operands = score_masked_attention.draw(p)
    keys = p.B * p.Lk if operands.key_mask is None else int(operands.key_mask.sum())
    pairs = p.H * p.Lq * keys
    rows = p.B * (1 if p.heads == "mean" else p.H) * p.Lq
    network = sum(rows * weight.numel() for weight in operands.weights)
    count = 0
    if direction != "bwd":
        count += pairs * (p.D + p.D) + network  # S, P V
    if direction in ("bwd", "both"):
        count += pairs * 5 * p.D + 2 * network  # S, dQ, dK, dP, dV; a layer's input and weight
    assert score_masked_attention.flops(p, direction) == 2 * count


@pytest.mark.parametrize(
    ("page", "problem"),
    [
        *((global_local_attention, p) for p in TWO_MAPS + WITH_MASKS),
        *((map_gated_attention, p) for p in TWO_MAPS),
        *((score_masked_attention, p) for p in NETWORKS),
    ],
    ids=lambda x: getattr(x, "__name__", repr(x)),
)
def test_least_bytes_of_the_other_ops(page, problem):
    """Operands in, results out; backward reads those and the results' gradients, where it needs
    them the results, and writes gradients."""
    operands = page.draw(problem)
    given = [t for t in page.arguments(operands) if t is not None]
    keys = [] if operands.key_mask is None else [operands.key_mask]
    if operands.key_mask is not None and page is global_local_attention:
        assert problem.multiplier is None  # entries that nobody sees need not be read
    read, results = _bytes_of(given + keys), _bytes_of(page.grad_outs(operands))
    forward = read + results
    again = results if page is global_local_attention else 0
    backward = read + results + again + _bytes_of(page.leaves(operands).values())
    assert page.least_bytes(problem, "fwd") == page.least_bytes(problem, "call") == forward
    assert page.least_bytes(problem, "bwd") == backward
    assert page.least_bytes(problem, "both") == forward + backward
