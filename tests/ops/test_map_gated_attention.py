"""Forward and gradients of map_gated_attention, every backend and dtype, from one table."""

from __future__ import annotations

import pytest
import torch
from backends import needs_float64
from two_maps import KERNELS, Drawn, assert_accurate, check, evaluate, gated

import lam_kernels

CASES = {
    "plain": gated(Lq=50, D=64, pattern="Toeplitz(5)"),
    "one position": gated(Lq=1, pattern="Toeplitz(2)"),
    "everything": gated(Lq=33, D=24),
    "blocks": gated(Lq=100, D=32, pattern="BlockDiagonal(10)"),
    "blocks from the end": gated(Lq=50, pattern="BlockDiagonal(16, alignment='end')"),
    "dilated": gated(Lq=66, pattern="DilatedToeplitz(30, 4)"),
    "causal": gated(Lq=65, pattern="Causal() & Toeplitz(20)"),
    "segments": gated(Lq=66, pattern="Segments(4, shuffled=True)", key_mask=True),
    "padding": gated(Lq=66, Dv=40, pattern="Toeplitz(3)", key_mask=True, fill="dead,loud"),
    "renormalised": gated(True, Lq=65, D=40, pattern="Toeplitz(9)"),
    "renormalised padding": gated(True, Lq=65, pattern="Toeplitz(2)", key_mask=True, fill="dead"),
    "other gate dtypes": gated(
        Lq=50, multiplier_dtype="bfloat16", bias_dtype="float16", pattern="Toeplitz(5)"
    ),
    "one pattern a head": gated(
        H=4, Lq=65,
        pattern=("Causal()", None, "Toeplitz(5) & Segments(3)", "DilatedToeplitz(30, 3)"),
    ),
    "wide scores": gated(Lq=65, D=64, pattern="Toeplitz(5)", spread=30.0),
    "negative scale": gated(True, Lq=33, pattern="Toeplitz(5)", scale=-0.3),
    "many heads": gated(B=3, H=5, Lq=33, D=8, pattern="Toeplitz(5)"),
}  # fmt: skip

# across the block boundaries of the kernels, up to the longest there is
TILES = {
    "paper": gated(B=1, H=1, Lq=300, D=128, pattern="Toeplitz(15)"),
    "paper, audio": gated(True, B=1, H=1, Lq=300, D=16, pattern="BlockDiagonal(20)", key_mask=True),
    "longest": gated(B=1, H=1, Lq=512, D=16, pattern="DilatedToeplitz(60, 4)"),
}


@pytest.mark.parametrize("case", CASES)
def test_case(case, backend, dtype):
    check(CASES[case].but(dtype=dtype), backend)


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("case", TILES)
def test_tiles(case, backend):
    for dtype in ("float32", "bfloat16"):
        check(TILES[case].but(dtype=dtype), backend)


@pytest.mark.parametrize("D", [1, 3, 8, 16, 24, 40, 80, 128, 200, 256])
def test_head_dims(D, backend):
    for dtype in ("float32", "bfloat16"):
        check(gated(B=1, Lq=35, D=D, Dv=257 - D, pattern="Toeplitz(5)", dtype=dtype), backend)


@pytest.mark.parametrize("layout", ["transposed", "sliced", "expanded", "last_strided"])
@pytest.mark.parametrize("of", ["layout", "mask_layout", "grad_layout"])
def test_strides(of, layout, backend):
    if (of, layout) == ("mask_layout", "expanded"):
        layout = "contiguous"  # gates have no axis to expand along
    for dtype in ("float32", "bfloat16"):
        case = gated(B=3, Lq=33, D=24, Dv=40, pattern="Toeplitz(5)", dtype=dtype, **{of: layout})
        check(case, backend)


@pytest.mark.parametrize("grads", ["", "q", "k", "v", "m", "b", "mb", "qm", "qkv"])
def test_only_wanted_gradients(grads, backend, dtype):
    check(gated(Lq=34, pattern="Toeplitz(5)", dtype=dtype, grads=grads), backend)


def test_slices_of_larger_gates_are_exact(backend):
    """A clip shorter than max_len uses [:T, :T] of the gates; the rest gets no gradient."""
    needs_float64(backend)
    large = [torch.randn(50, 50, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    drawn = Drawn(gated(Lq=33, dtype="float64", pattern="Toeplitz(5)"))
    o = drawn.operands
    gates = [gate[:33, :33] for gate in large]
    (out,) = drawn.call([o.query, o.key, o.value, *gates], backend=backend)
    out.sum().backward()
    copies = [gate.detach().clone().requires_grad_() for gate in gates]
    (same,) = drawn.call([o.query, o.key, o.value, *copies], backend=backend)
    same.sum().backward()
    torch.testing.assert_close(out, same)
    for gate, copy in zip(large, copies, strict=True):
        torch.testing.assert_close(gate.grad[:33, :33], copy.grad)
        assert (gate.grad[33:] == 0).all()
        assert (gate.grad[:, 33:] == 0).all()


def test_open_and_closed_gates_are_the_maps(backend):
    """R near 1 is the global map, R near 0 the local one."""
    needs_float64(backend)
    drawn = Drawn(gated(Lq=40, dtype="float64", pattern="Toeplitz(5)"))
    o = drawn.operands
    for size, pattern in ((1e4, None), (-1e4, drawn.pattern)):
        gates = [torch.full((40, 40), size, dtype=torch.float64), torch.zeros(40, 40).double()]
        (out,) = drawn.call([o.query, o.key, o.value, *gates], backend=backend)
        same = lam_kernels.masked_attention(
            o.query, o.key, o.value, pattern=pattern, backend=backend
        )
        torch.testing.assert_close(out, same)


def test_renormalised_rows_are_weights(backend):
    """With values of one the result is the row sum of the map: 1 with renormalise only."""
    needs_float64(backend)
    drawn = Drawn(gated(Lq=40, dtype="float64", pattern="Toeplitz(5)", key_mask=True, fill="dead"))
    o = drawn.operands
    ones = torch.ones_like(o.value)
    seen = o.key_mask.any(-1)[:, None, None, None].expand(ones.shape)
    for renormalise in (False, True):
        out = lam_kernels.map_gated_attention(
            o.query, o.key, ones, o.multiplier, o.bias, drawn.pattern,
            renormalise=renormalise, key_mask=o.key_mask, backend=backend,
        )  # fmt: skip
        assert (out[~seen] == 0).all()
        exact = torch.allclose(out[seen], torch.ones_like(out[seen]))
        assert exact == renormalise


def test_batch_mates(backend):
    """A sample's result does not depend on the others of its batch."""
    needs_float64(backend)
    drawn = Drawn(gated(B=3, Lq=50, dtype="float64", pattern="Toeplitz(5)", key_mask=True))
    o = drawn.operands
    (everyone,) = drawn.call(drawn.tensors(), backend=backend)
    for b in range(3):
        alone = lam_kernels.map_gated_attention(
            *(x[b : b + 1] for x in (o.query, o.key, o.value)), o.multiplier, o.bias,
            drawn.pattern, key_mask=o.key_mask[b : b + 1], backend=backend,
        )  # fmt: skip
        torch.testing.assert_close(alone[0], everyone[b])


# ---- the check itself: each of these mistakes must be found


def _scaled(name, factor):
    def mistake(case):
        found = evaluate(case, "reference")
        return found | {name: found[name] * factor}

    return mistake


def _with(change):
    def mistake(case):
        drawn = Drawn(case)
        change(drawn)
        return drawn.with_gradients(drawn.call(drawn.tensors(), backend="reference"))

    return mistake


def _other_pattern(drawn):
    drawn.pattern = lam_kernels.Toeplitz(10)


def _gates_transposed(drawn):
    o = drawn.operands
    o.multiplier = o.multiplier.detach().mT.contiguous().requires_grad_()


def _renormalised(case):
    return evaluate(gated(True, **_fields(case)), "reference")


def _fields(case):
    p = case.problem
    return {"Lq": p.Lq, "D": p.D, "pattern": p.pattern, "dtype": p.dtype}


def _a_gate_entry_lost(case):
    found = evaluate(case, "reference")
    found["multiplier"][20] *= 1.05
    return found


MISTAKES = {
    "the pattern is one wider": _with(_other_pattern),
    "a gate is transposed": _with(_gates_transposed),
    "renormalised unasked": _renormalised,
    "dK is 2 % small": _scaled("key", 0.98),
    "the local gate's gradient has the other sign": _scaled("bias", -1),
    "a row of a gate's gradient": _a_gate_entry_lost,
}


@pytest.mark.backend("reference")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float64"])
@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_found(mistake, dtype):
    case = gated(Lq=65, D=32, pattern="Toeplitz(9)", dtype=dtype)
    assert_accurate(evaluate(case, "reference"), case)
    with pytest.raises(AssertionError):
        assert_accurate(MISTAKES[mistake](case), case)
