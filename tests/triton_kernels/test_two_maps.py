"""The Triton kernels of global_local_attention and map_gated_attention: every feature in problems
small enough for the interpreter, whose checks watch each access; repeats; sums in several parts."""

from __future__ import annotations

import contextlib

import pytest
import torch
from two_maps import both, check, evaluate, gated

import lam_kernels
from lam_kernels.triton import availability, configurations

pytestmark = pytest.mark.backend("triton")
pytest.importorskip("triton")

BOTH = {
    "shared masks": both(
        B=2, H=2, Lq=35, Lk=20, D=24, multiplier="11qk", bias="b1qk", pattern="Toeplitz(4)"
    ),
    "own mask, padding": both(
        Lq=20, Lk=35, Dv=8, multiplier="bhqk", bias="bh1k", pattern="BlockDiagonal(8)",
        key_mask=True, fill="dead,nan",
    ),
    "vectors": both(Lq=35, D=8, multiplier="1h11", bias="b1q1", pattern="DilatedToeplitz(9, 3)"),
    "a pattern a head": both(
        H=3, Lq=35, D=8, bias="1hqk", pattern=("Causal()", "Segments(3)", None), dtype="bfloat16"
    ),
    "nothing near": both(Lq=50, Lk=16, D=8, pattern="Toeplitz(2)", dtype="float16"),
    "hidden by the bias": both(
        Lq=20, multiplier="11qk", bias="bhqk", pattern="Toeplitz(5)", fill="neg_inf,nan"
    ),
    "only keys": both(Lq=20, D=8, multiplier="bhqk", pattern="Toeplitz(2)", grads="km"),
    "only masks": both(
        Lq=20, D=8, multiplier="bhqk", bias="1hqk", pattern="Toeplitz(2)", grads="mb"
    ),
    "only values": both(Lq=20, D=8, pattern="Toeplitz(2)", grads="v"),
}  # fmt: skip
GATED = {
    "band": gated(B=1, H=2, Lq=33, D=8, pattern="Toeplitz(4)", dtype="bfloat16"),
    "renormalised, padding": gated(
        True, B=2, H=1, Lq=33, Dv=24, pattern="BlockDiagonal(8)", key_mask=True, fill="dead"
    ),
    "a pattern a head": gated(
        B=1, H=2, Lq=20, pattern=("DilatedToeplitz(9, 3)", "Segments(3)"), dtype="float16"
    ),
    "only a gate": gated(Lq=20, B=1, D=8, pattern="Causal()", grads="b"),
    "only values": gated(True, Lq=20, B=1, D=8, pattern="Toeplitz(2)", grads="v"),
}  # fmt: skip
CASES = {f"both: {name}": case for name, case in BOTH.items()} | {
    f"gated: {name}": case for name, case in GATED.items()
}


@pytest.fixture
def watched():
    """Accesses out of bounds and between programs raise, where the interpreter runs."""
    if not availability.interpreting():
        return contextlib.nullcontext()
    from lam_kernels.triton import interpreter

    interpreter.install()
    return interpreter.checked()


@pytest.mark.parametrize("case", CASES)
def test_right_and_touching_only_what_is_theirs(case, watched):
    with watched:
        check(CASES[case], "triton")


REPEATED = {
    "both": BOTH["shared masks"],
    "gated": gated(B=1, H=3, Lq=20, D=8, pattern="BlockDiagonal(16)", dtype="bfloat16"),
}


@pytest.mark.parametrize("case", REPEATED)
def test_same_bits_again(case):
    first = evaluate(REPEATED[case], "triton")
    for _ in range(2 if availability.interpreting() else 200):
        again = evaluate(REPEATED[case], "triton")
        assert all(torch.equal(tensor, again[name]) for name, tensor in first.items())


@pytest.mark.parametrize("case", REPEATED)
def test_partial_sums(case, monkeypatch):
    """Gradients that several heads share, in one part and in more than there are tiles."""
    for parts in (1, 3):
        monkeypatch.setattr(
            configurations, "splits", lambda _, sharers, *rest, parts=parts: min(parts, sharers)
        )
        check(REPEATED[case], "triton")


def test_a_gate_out_of_a_far_larger_tensor():
    """Offsets within a gate are 32 bits wide: one whose strides are too large is copied."""
    from lam_kernels.triton.map_gated_attention import _gate

    strides = [
        _gate(torch.empty_strided((4, 4), (row, 1), device="meta"))[1:] for row in (7, 2**30)
    ]
    assert strides == [(7, 1), (4, 1)]


def test_what_is_not_served_names_its_reason():
    x = torch.ones(1, 2, 4, 8, dtype=torch.float64)
    gates = [torch.ones(4, 4) for _ in range(2)]
    pattern = lam_kernels.Toeplitz(1)
    with pytest.raises(RuntimeError, match=r'"triton" cannot serve this call: .*no float64'):
        lam_kernels.global_local_attention(x, x, x, pattern, backend="triton")
    with pytest.raises(RuntimeError, match=r'"triton" cannot serve this call: .*no float64'):
        lam_kernels.map_gated_attention(x, x, x, *gates, pattern, backend="triton")
