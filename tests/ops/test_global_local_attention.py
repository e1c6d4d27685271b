"""Forward and gradients of global_local_attention, every backend and dtype, from one table."""

from __future__ import annotations

import pytest
import torch
from backends import needs_float64
from two_maps import KERNELS, Drawn, assert_accurate, both, check, evaluate

import lam_kernels

CASES = {
    "plain": both(Lq=50, D=64, pattern="Toeplitz(5)"),
    "one row": both(Lq=1, Lk=65, D=16, pattern="Toeplitz(2)"),
    "one key": both(Lq=65, Lk=1, D=16, pattern="Toeplitz(2)"),
    "everything": both(Lq=33, D=24),
    "blocks": both(Lq=100, D=32, pattern="BlockDiagonal(10)"),
    "blocks from the end": both(Lq=50, Lk=66, pattern="BlockDiagonal(16, alignment='end')"),
    "dilated": both(Lq=100, D=16, pattern="DilatedToeplitz(30, 4)"),
    "causal": both(Lq=65, Lk=100, pattern="Causal() & Toeplitz(20)"),
    "segments": both(Lq=66, pattern="Segments(4)", key_mask=True),
    "padding": both(Lq=66, Dv=40, pattern="Toeplitz(9)", key_mask=True, fill="dead,loud"),
    "multiplier": both(Lq=65, multiplier="b1qk", pattern="Toeplitz(9)"),
    "bias": both(Lq=65, bias="1hqk", pattern="Toeplitz(9)"),
    "both masks": both(
        Lq=63, multiplier="b1qk", bias="1h1k", pattern="BlockDiagonal(20)", key_mask=True,
        fill="nan,dead",
    ),
    "hidden by the bias": both(
        Lq=65, multiplier="11qk", bias="b1qk", pattern="Toeplitz(9)", fill="neg_inf,nan,loud"
    ),
    "other mask dtypes": both(
        Lq=50, multiplier="11qk", multiplier_dtype="bfloat16", bias="b1qk", bias_dtype="float16",
        pattern="Toeplitz(5)",
    ),
    "one pattern a head": both(
        H=4, Lq=100,
        pattern=("Causal()", None, "Toeplitz(5) & Segments(3)", "DilatedToeplitz(30, 3)"),
    ),
    "wide scores": both(Lq=65, D=64, pattern="Toeplitz(5)", spread=30.0),
    "negative scale": both(Lq=33, pattern="Toeplitz(5)", scale=-0.3),
}  # fmt: skip

# across the tile and region boundaries of the kernels
TILES = {
    "square": both(B=1, H=1, Lq=300, D=64, pattern="Toeplitz(15)"),
    "masks": both(
        B=1, H=1, Lq=257, Lk=300, D=32, multiplier="11qk", bias="1h1k", pattern="Toeplitz(64)"
    ),
    "rows": both(B=1, H=1, Lq=515, Lk=66, D=32, bias="1hqk", pattern="BlockDiagonal(32)"),
    "keys": both(B=1, H=1, Lq=31, Lk=515, pattern="Toeplitz(9)", key_mask=True),
    "dilated": both(B=1, H=1, Lq=300, Lk=530, D=32, pattern="DilatedToeplitz(96, 4)"),
}  # fmt: skip


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
        check(both(B=1, Lq=35, D=D, Dv=257 - D, pattern="Toeplitz(5)", dtype=dtype), backend)


@pytest.mark.parametrize("layout", ["transposed", "sliced", "expanded", "last_strided"])
@pytest.mark.parametrize("of", ["layout", "mask_layout", "grad_layout"])
def test_strides(of, layout, backend):
    masks = {"multiplier": "b1qk", "bias": "1hqk", "pattern": "Toeplitz(5)"}
    for dtype in ("float32", "bfloat16"):
        check(both(B=3, Lq=33, Lk=50, D=24, Dv=40, **masks, dtype=dtype, **{of: layout}), backend)


@pytest.mark.parametrize("grads", ["", "q", "k", "v", "m", "b", "mb", "qm", "qkv"])
def test_only_wanted_gradients(grads, backend, dtype):
    masks = {"multiplier": "b1qk", "bias": "1hqk", "pattern": "Toeplitz(5)"}
    check(both(Lq=34, **masks, dtype=dtype, grads=grads), backend)


@pytest.mark.parametrize("case", CASES)
def test_two_calls_of_masked_attention(case, backend):
    """The same numbers as two calls, one without and one with the pattern."""
    needs_float64(backend)
    drawn = Drawn(CASES[case].but(dtype="float64"))
    o = drawn.operands
    fused = drawn.call(drawn.tensors(), backend=backend)
    masks = {
        "multiplier": o.multiplier, "bias": o.bias, "key_mask": o.key_mask,
        "scale": CASES[case].problem.scale, "backend": backend,
    }  # fmt: skip
    for out, pattern in zip(fused, (None, drawn.pattern), strict=True):
        same = lam_kernels.masked_attention(o.query, o.key, o.value, pattern=pattern, **masks)
        torch.testing.assert_close(out, same)


@pytest.mark.parametrize("which", [0, 1])
def test_one_result_in_the_loss(which, backend):
    """The other result takes no part: the gradients are those of one call of masked_attention."""
    needs_float64(backend)
    drawn = Drawn(both(Lq=50, dtype="float64", pattern="Toeplitz(5)"))
    o = drawn.operands
    leaves = [o.query, o.key, o.value]
    found = drawn.call(drawn.tensors(), backend=backend)[which]
    pattern = drawn.pattern if which else None
    same = lam_kernels.masked_attention(*leaves, pattern=pattern, backend=backend)
    for a, b in zip(
        torch.autograd.grad(found, leaves, o.grad_out),
        torch.autograd.grad(same, leaves, o.grad_out),
        strict=True,
    ):
        torch.testing.assert_close(a, b)


def test_batch_mates(backend):
    """A sample's result and gradients do not depend on the others of its batch."""
    needs_float64(backend)
    whole = Drawn(both(B=3, Lq=50, dtype="float64", pattern="Toeplitz(5)", key_mask=True))
    everyone = whole.call(whole.tensors(), backend=backend)
    o = whole.operands
    for b in range(3):
        alone = lam_kernels.global_local_attention(
            *(x[b : b + 1] for x in (o.query, o.key, o.value)), whole.pattern,
            key_mask=o.key_mask[b : b + 1], backend=backend,
        )  # fmt: skip
        for one, all_of_them in zip(alone, everyone, strict=True):
            torch.testing.assert_close(one[0], all_of_them[b])


# ---- the check itself: each of these mistakes must be found


def _without_a_key(case):
    drawn = Drawn(case)
    o = drawn.operands
    mask = torch.ones(o.key.shape[0], o.key.shape[2], dtype=torch.bool)
    mask[:, 17] = False
    o.key_mask = mask
    return evaluate(case, "reference", drawn)


def _wider_pattern(case):
    drawn = Drawn(case)
    drawn.pattern = lam_kernels.Toeplitz(10)
    return evaluate(case, "reference", drawn)


def _scaled(name, factor):
    def mistake(case):
        found = evaluate(case, "reference")
        return found | {name: found[name] * factor}

    return mistake


def _half_missing(case):
    """dV of the global half only."""
    drawn = Drawn(case)
    drawn.grads[1] = torch.zeros_like(drawn.grads[1])
    found = evaluate(case, "reference")
    return found | {"value": evaluate(case, "reference", drawn)["value"]}


def _one_row_wrong(case):
    found = evaluate(case, "reference")
    found["local_out"][1, 1, 30] *= 1.02
    return found


MISTAKES = {
    "a key is lost": _without_a_key,
    "the pattern is one wider": _wider_pattern,
    "dQ lacks a factor": _scaled("query", 1.01),
    "dK is 1 % small": _scaled("key", 0.99),
    "dV of one half": _half_missing,
    "one row": _one_row_wrong,
    "NaN": _scaled("global_out", float("nan")),
}


@pytest.mark.backend("reference")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float64"])
@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_found(mistake, dtype):
    case = both(Lq=65, D=32, pattern="Toeplitz(9)", dtype=dtype)
    assert_accurate(evaluate(case, "reference"), case)
    with pytest.raises(AssertionError):
        assert_accurate(MISTAKES[mistake](case), case)
