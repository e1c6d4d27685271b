"""The FLOP and byte formulas against counting."""

import pytest

from bench import cost
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
]


def _visible(problem):
    """Every visible pair, one at a time."""
    seen = problem.operands().seen
    return [tuple(at) for at in seen.nonzero().tolist()]


@pytest.mark.parametrize("problem", PROBLEMS, ids=repr)
def test_visible_pairs(problem):
    assert cost.visible_pairs(problem) == len(_visible(problem))


@pytest.mark.parametrize("problem", PROBLEMS, ids=repr)
@pytest.mark.parametrize("direction", ["fwd", "both"])
def test_flops(problem, direction):
    """One multiply and one add for each step of each product that the formulas name."""
    D, Dv = problem.D, problem.Dv
    products = {"S": D, "O": Dv}
    if direction == "both":
        products |= {"S again": D, "dP": Dv, "dV": Dv, "dQ": D, "dK": D}
    count = 0
    for _ in _visible(problem):
        for steps in products.values():
            for _ in range(steps):
                count += 2
    assert cost.flops(problem, direction) == count


def test_the_usual_convention():
    problem = Problem(B=1, H=1, Lq=8, D=4)
    forward = cost.flops(problem, "fwd")
    assert forward == 4 * 8 * 8 * 4
    assert cost.flops(problem, "both") == 3.5 * forward
    assert cost.flops(problem, "call") == forward


def _bytes_of(tensors):
    return sum(t.numel() * t.element_size() for t in tensors)


@pytest.mark.parametrize("problem", [p for p in PROBLEMS if p.pattern is None], ids=repr)
def test_least_bytes_of_dense_problems(problem):
    """Operands in, out and lse out; backward reads those and grad_out and writes gradients."""
    operands = problem.operands()
    names = ("query", "key", "value", "multiplier", "bias")
    given = [t for t in (getattr(operands, n) for n in names) if t is not None]
    lse = 4 * problem.B * problem.H * problem.Lq
    forward = _bytes_of([*given, operands.grad_out]) + lse  # out is as large as grad_out
    assert cost.least_bytes(problem, "fwd") == forward
    backward = _bytes_of([*given, operands.grad_out, operands.grad_out]) + lse
    backward += _bytes_of(operands.leaves.values())
    assert cost.least_bytes(problem, "both") == forward + backward


def test_hidden_entries_of_a_mask_need_not_be_read():
    dense = Problem(B=1, H=1, Lq=64, D=4, multiplier="11qk")
    local = dense.but(pattern="BlockDiagonal(8)")
    saved = cost.least_bytes(dense, "fwd") - cost.least_bytes(local, "fwd")
    assert saved == (64 * 64 - 8 * 64) * 4
