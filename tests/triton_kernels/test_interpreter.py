"""The interpreter is right where the stock one is not, and its checks find planted faults."""

from __future__ import annotations

import pytest
import torch
from problems import check, evaluate
from score_networks import case as network_case
from score_networks import check as check_network

from lam_kernels.triton import availability
from python_ref.inputs import Problem

pytestmark = [
    pytest.mark.backend("triton"),
    pytest.mark.skipif(not availability.interpreting(), reason="only with TRITON_INTERPRET=1"),
]
triton = pytest.importorskip("triton")
tl = pytest.importorskip("triton.language")

N = tl.constexpr(16)


@triton.jit
def product(a, b, c, PRECISION: tl.constexpr):
    i = tl.arange(0, N)
    at = i[:, None] * N + i[None, :]
    x = tl.dot(tl.load(a + at), tl.load(b + at), input_precision=PRECISION)
    tl.store(c + at, x.to(c.dtype.element_ty))


@triton.jit
def add_one(x, n, MASKED: tl.constexpr):
    i = tl.program_id(0) * N + tl.arange(0, N)
    if MASKED:
        tl.store(x + i, tl.load(x + i, mask=i < n) + 1, mask=i < n)
    else:
        tl.store(x + i, 1.0)


@triton.jit
def read_all(x, y, n, MASKED: tl.constexpr):
    i = tl.arange(0, N)
    if MASKED:
        tl.store(y + tl.program_id(0), tl.sum(tl.load(x + i, mask=i < n, other=0.0)))
    else:
        tl.store(y + tl.program_id(0), tl.sum(tl.load(x + i)))


@triton.jit
def same_element(x):
    tl.store(x, tl.program_id(0).to(tl.float32))


@triton.jit
def neighbour(x, y):
    """Each program reads what the next one writes."""
    tl.store(y + tl.program_id(0), tl.load(x + tl.program_id(0) + 1))
    tl.store(x + tl.program_id(0), 0.0)


@pytest.fixture
def interpreter():
    from lam_kernels.triton import interpreter

    interpreter.install()
    return interpreter


def test_bfloat16_products_round_to_nearest_even(interpreter):
    a, b = (torch.randn(16, 16, dtype=torch.bfloat16) for _ in range(2))
    c = torch.empty(16, 16, dtype=torch.bfloat16)
    product[(1,)](a, b, c, "ieee")
    assert torch.equal(c, (a.float() @ b.float()).bfloat16())


@pytest.mark.parametrize(("precision", "bits"), [("ieee", 21), ("tf32x3", 19), ("tf32", 10)])
def test_precision_of_float32_products(interpreter, precision, bits):
    """Not worse than the name says, and tf32 not better."""
    a, b, c = (torch.randn(16, 16) for _ in range(3))
    product[(1,)](a, b, c, precision)
    size = a.abs().double() @ b.abs().double()
    error = float(((c - a.double() @ b.double()).abs() / size).max())
    assert error < 2.0**-bits
    assert precision != "tf32" or error > 2.0**-14


FAULTS = {
    "write past the end": (add_one, 2, lambda: (torch.zeros(20), 20, False), "writes 12 elements"),
    "read past the end": (
        read_all,
        1,
        lambda: (torch.zeros(12), torch.zeros(1), 12, False),
        "reads 4 elements outside",
    ),
    "two programs write": (same_element, 3, lambda: (torch.zeros(1),), "that program 0 writes"),
    "one reads, one writes": (
        neighbour,
        4,
        lambda: (torch.zeros(5), torch.zeros(4)),
        "that another reads",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_planted_fault_is_found(interpreter, fault):
    kernel, programs, arguments, words = FAULTS[fault]
    with interpreter.checked(), pytest.raises(interpreter.KernelFault, match=words):
        kernel[(programs,)](*arguments())


def test_right_kernels_pass_the_checks(interpreter):
    with interpreter.checked():
        add_one[(2,)](torch.zeros(20), 20, True)
        read_all[(3,)](torch.zeros(12), torch.zeros(3), 12, True)


CHECKED = {
    "shared masks": Problem(B=2, H=2, Lq=35, Lk=20, D=24, multiplier="11qk", bias="b1qk"),
    "own masks": Problem(Lq=20, Lk=35, Dv=8, multiplier="bhqk", bias="bh1k", attn_mask="b1q1"),
    "sums": Problem(H=4, Hkv=2, Lq=35, D=8, multiplier="1111", bias="1h1k", key_mask=True),
    "dilated": Problem(Lq=40, D=8, multiplier="11qk", pattern="DilatedToeplitz(30, 2)"),
    "patterns": Problem(
        H=3, Lq=35, D=8, bias="1hqk", dropout_p=0.2, pattern=("Causal()", "Segments(3)", None)
    ),
    "only keys": Problem(Lq=20, D=8, multiplier="bhqk", grads="km"),
    "only masks": Problem(Lq=20, D=8, multiplier="bhqk", bias="1hqk", grads="mb"),
    "low rank, short": Problem(
        Lq=20, Lk=18, D=8, multiplier="rank 70: b1 1h 11", bias="rank 3: 1h 11", dtype="bfloat16"
    ),
    "low rank, blocks of ranks": Problem(
        B=1, Lq=35, Lk=20, D=8, multiplier="rank 70: 11 1h", grads="m"
    ),
    "low rank, patterns": Problem(
        B=1, Lq=35, D=8, bias="rank 3: 11 bh 11", dropout_p=0.2, pattern=("Causal()", "Segments(3)")
    ),
    "low rank, shared keys": Problem(
        B=1, H=4, Hkv=2, Lq=35, D=8, multiplier="rank 17: 1h 11 11", key_mask=True
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CHECKED)
def test_kernels_touch_only_what_is_theirs(interpreter, case):
    with interpreter.checked():
        check(CHECKED[case], "triton")


def test_tiles_that_a_head_hides_are_left_out(interpreter, monkeypatch):
    """Also of the gradient of a mask that heads of different patterns share: two products a visited
    tile, 32 x 32, forward and in the pass over the mask's tiles."""
    products = []
    builder = interpreter.interpreter.InterpreterBuilder
    before = builder.create_dot

    def counted(*arguments):
        products.append(1)
        return before(*arguments)

    monkeypatch.setattr(builder, "create_dot", counted)
    patterns = ("BlockDiagonal(16)", "BlockDiagonal(32)")
    check(Problem(B=1, H=2, Lq=64, D=8, bias="11qk", grads="b", pattern=patterns), "triton")
    heads, visited = 2, 2
    assert len(products) == 2 * 2 * heads * visited


NETWORKS = {
    "mean": network_case(B=2, H=2, Lq=20, Lk=18, D=8, heads="mean", key_mask=True),
    "each": network_case(B=1, H=3, Lq=35, Lk=20, D=80, Dv=3, depth=4, hidden=5, dtype="bfloat16"),
    "one layer": network_case(B=3, H=3, Lq=5, Lk=17, D=8, depth=1, fusion="add"),
}


@pytest.mark.parametrize("case", NETWORKS)
def test_network_kernels_touch_only_what_is_theirs(interpreter, case):
    with interpreter.checked():
        check_network(NETWORKS[case], "triton")


def test_parts_are_added_in_one_order():
    problem = CHECKED["low rank, shared keys"]
    first = evaluate(problem, "triton")
    for name, tensor in evaluate(problem, "triton").items():
        assert torch.equal(first[name], tensor), name


def test_a_forgotten_part_is_found(monkeypatch):
    from lam_kernels.triton import factor_gradients

    def all_but_one(parts):
        for grad, each in parts:
            grad.copy_(each[:, 1:].sum((0, 1), keepdim=True))

    monkeypatch.setattr(factor_gradients, "sum_parts", all_but_one)
    with pytest.raises(AssertionError, match=r"multiplier\.columns"):
        check(CHECKED["low rank, shared keys"], "triton")


@triton.jit
def every_key(o, batch, column, Lq, Lk):
    return column[None, :] < Lk


def test_forgotten_padding_is_found(monkeypatch):
    from lam_kernels.triton import score_masked_attention_forward

    monkeypatch.setattr(score_masked_attention_forward, "seen_keys", every_key)
    with pytest.raises(AssertionError, match="out"):
        check_network(NETWORKS["mean"].but(grads=""), "triton")
