"""Forward and gradients of masked_attention, every backend and dtype, from one table."""

from __future__ import annotations

import itertools

import pytest
import torch
from backends import BY_NAME
from floors import rng_state
from problems import HEAD_DIMS, check, evaluate
from tolerance import assert_accurate

import lam_kernels
from lam_kernels.patterns import encode
from python_ref.inputs import Problem

# Every way to broadcast: each of B, H, Lq, Lk full or 1, and the two-dimensional form.
BROADCASTS = ["".join(axes) for axes in itertools.product("b1", "h1", "q1", "k1")] + ["qk"]

PATTERNS = (
    "BlockDiagonal(16)",
    "BlockDiagonal(50, alignment='end')",
    "Toeplitz(0)",
    "Toeplitz(9)",
    "Toeplitz(30, alignment='end')",
    "DilatedToeplitz(24, 3)",
    "DilatedToeplitz(70, 7, alignment='end')",
    "Causal()",
    "Causal(alignment='start')",
    "Segments(4)",
    "Segments(3, shuffled=True)",
    "Segments(5, shared=True)",
    "Causal() & Toeplitz(20)",
    "Segments(3) & Causal(alignment='start') & BlockDiagonal(20) & DilatedToeplitz(40, 2)",
)

CASES = {
    "no mask": Problem(Lq=50, D=64),
    "no mask, one row": Problem(Lq=1, Lk=65, D=64),
    "no mask, one key": Problem(Lq=65, Lk=1, D=64),
    "both masks": Problem(Lq=65, D=32, multiplier="b1qk", bias="1hqk"),
    "both masks, all full": Problem(Lq=33, D=24, multiplier="bhqk", bias="bhqk", lse_grad=True),
    "mask of one number": Problem(Lq=33, multiplier="1111", bias="1111"),
    "learned scale": Problem(Lq=50, H=4, D=64, multiplier="1h11"),
    "gate": Problem(Lq=66, D=40, bias="b1qk", gate=True, lse_grad=True),
    "gate, key weights": Problem(Lq=50, bias="1h1k", gate=True, key_mask=True),
    "gate in half precision": Problem(Lq=50, bias="11qk", bias_dtype="bfloat16", gate=True),
    "float32 masks": Problem(
        Lq=63, multiplier="b1qk", multiplier_dtype="float32", bias="1hqk", bias_dtype="float32"
    ),
    "masks of two other dtypes": Problem(
        Lq=63, multiplier="11qk", multiplier_dtype="bfloat16", bias="b1qk", bias_dtype="float16"
    ),
    "more keys than rows": Problem(Lq=17, Lk=130, D=32, Dv=80, multiplier="b1qk", key_mask=True),
    "more rows than keys": Problem(Lq=130, Lk=17, D=80, Dv=32, bias="1hqk", attn_mask="b1qk"),
    "shared heads": Problem(H=6, Hkv=2, Lq=50, D=64, multiplier="b1qk", bias="1h1k"),
    "one shared head": Problem(H=4, Hkv=1, Lq=33, D=16, multiplier="bhqk", pattern="Causal()"),
    "windows": Problem(B=6, H=3, Lq=49, D=24, bias="1hqk", attn_mask="b1qk"),
    "large windows": Problem(B=3, H=4, Lq=144, D=24, bias="1hqk", multiplier="1h1k"),
    "rows without keys": Problem(
        Lq=50, multiplier="b1qk", bias="1hqk", attn_mask="b1qk", key_mask=True, fill="dead,nan,loud"
    ),
    "hidden by the bias": Problem(Lq=65, multiplier="11qk", bias="b1qk", fill="neg_inf,nan,loud"),
    "mask of rows": Problem(Lq=65, multiplier="b1q1", attn_mask="11q1", fill="dead,nan"),
    "dropout": Problem(Lq=65, Lk=66, D=32, multiplier="b1qk", dropout_p=0.3, lse_grad=True),
    "dropout, local": Problem(Lq=130, bias="1hqk", dropout_p=0.5, pattern="Toeplitz(20)"),
    "dropout, nearly all": Problem(Lq=33, dropout_p=0.95, bias="b11k", gate=True),
    "lse alone": Problem(Lq=50, multiplier="b1qk", lse_grad=True, grads="qkm"),
    "wide scores": Problem(Lq=65, D=64, multiplier="b1qk", bias="11qk", spread=30.0, lse_grad=True),
    "negative scale": Problem(Lq=33, multiplier="11qk", scale=-0.3),
    "scale of zero": Problem(Lq=33, multiplier="11qk", bias="11qk", scale=0.0),
    "tiles": Problem(B=1, H=2, Lq=300, D=64, multiplier="b1qk", bias="1hqk"),
    "tiles, shared mask": Problem(B=2, H=2, Lq=257, Lk=300, D=64, multiplier="11qk"),
    "tiles, keys": Problem(B=1, H=2, Lq=31, Lk=515, D=32, bias="b11k", key_mask=True, fill="nan"),
    "tiles, rows": Problem(B=1, H=2, Lq=515, Lk=66, D=32, multiplier="1hqk", lse_grad=True),
    "tiles, local": Problem(
        B=1, H=2, Lq=515, D=32, multiplier="11qk", bias="1h1k", pattern="Toeplitz(64)", fill="nan"
    ),
    "tiles, dilated": Problem(
        B=1, H=2, Lq=300, D=32, bias="1hqk", pattern="DilatedToeplitz(96, 4)", fill="nan"
    ),
    "tiles, blocks": Problem(
        B=1, H=2, Lq=300, D=32, multiplier="b1qk", pattern="BlockDiagonal(64)"
    ),
    "tiles, causal": Problem(
        B=1, H=2, Lq=257, Lk=300, D=64, multiplier="b1qk", pattern="Causal()", dropout_p=0.1
    ),
    "one pattern a head": Problem(
        H=4,
        Lq=100,
        multiplier="b1qk",
        bias="1hqk",
        pattern=("Causal()", None, "Toeplitz(5) & Segments(3)", "DilatedToeplitz(30, 3)"),
        fill="nan",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_case(case, backend, dtype):
    check(CASES[case].but(dtype=dtype), backend)


@pytest.mark.parametrize("axes", BROADCASTS)
@pytest.mark.parametrize("use", ["multiplier", "bias", "gate"])
def test_broadcast(use, axes, backend):
    for dtype in ("float32", "bfloat16"):
        mask = (
            {"multiplier": axes} if use == "multiplier" else {"bias": axes, "gate": use == "gate"}
        )
        check(Problem(B=3, Lq=34, Lk=35, **mask, dtype=dtype, key_mask=True, fill="nan"), backend)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_pattern(pattern, backend):
    for dtype in ("float32", "bfloat16"):
        masks = {"multiplier": "b1qk", "bias": "1hqk", "fill": "nan,loud"}
        check(Problem(Lq=100, pattern=pattern, **masks, dtype=dtype), backend)
        check(Problem(Lq=50, Lk=66, pattern=pattern, **masks, dtype=dtype, lse_grad=True), backend)


@pytest.mark.parametrize("D", HEAD_DIMS)
def test_head_dims(D, backend):
    other = HEAD_DIMS[-1 - HEAD_DIMS.index(D)]
    for dtype in BY_NAME[backend].dtypes:
        for Dv in {D, other}:
            check(Problem(B=1, Lq=35, D=D, Dv=Dv, multiplier="11qk", dtype=dtype), backend)


@pytest.mark.parametrize("layout", ["transposed", "sliced", "expanded", "last_strided"])
@pytest.mark.parametrize("of", ["layout", "mask_layout", "grad_layout"])
def test_strides(of, layout, backend, dtype):
    masks = {"multiplier": "b1qk", "bias": "1hqk", "attn_mask": "b11k", "lse_grad": True}
    check(Problem(B=3, Lq=33, Lk=50, D=24, Dv=40, **masks, dtype=dtype, **{of: layout}), backend)


def test_strides_of_key_mask_and_results(backend):
    problem = Problem(Lq=33, key_mask=True, multiplier="b1qk")
    o = problem.operands()
    room = torch.zeros(2, 33, 3, dtype=torch.bool)
    room[:, :, 1] = o.key_mask
    o.key_mask = room[:, :, 1]
    result = evaluate(problem, backend, o)
    assert_accurate(result, problem)
    if backend != "reference":  # whose gradients come from autograd
        for name, tensor in result.items():
            assert tensor.is_contiguous(), name


@pytest.mark.parametrize("grads", ["", "q", "k", "v", "m", "b", "mb", "qm", "kv", "qkv"])
def test_only_wanted_gradients(grads, backend, dtype):
    check(Problem(Lq=34, multiplier="b1qk", bias="1hqk", dtype=dtype, grads=grads), backend)


@pytest.mark.parametrize("case", ["both masks", "gate", "dropout", "one shared head", "lse alone"])
def test_lam_attention_is_masked_attention(case, backend):
    """The paper's words give bitwise the same as the general op."""
    problem = CASES[case]
    o = problem.operands()
    masks = o.masks()
    for fusion, name in (("mul", "multiplier"), ("add", "bias")):
        mask = masks[name]
        if mask is None or problem.gate:
            continue
        others = {k: v for k, v in masks.items() if k not in ("multiplier", "bias")}
        torch.manual_seed(0)
        one = lam_kernels.lam_attention(
            o.query, o.key, o.value, mask, fusion=fusion, **others, backend=backend
        )
        torch.manual_seed(0)
        two = lam_kernels.masked_attention(
            o.query, o.key, o.value, **{name: mask}, **others, backend=backend
        )
        assert torch.equal(one, two)


@pytest.mark.backend("reference")
@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16"])
@pytest.mark.parametrize("case", [name for name in CASES if "tiles" not in name])
def test_written_out_backward_of_the_reference(case, dtype):
    """The formulas of python_ref's docstring, which the op's backward runs, agree with autograd."""
    p = CASES[case].but(dtype=dtype)
    o = p.operands()
    flat, ids = encode(o.pattern, p.H)
    four = lambda x: x if x is None or x.dim() == 4 else x[None, None]  # noqa: E731
    scale = p.D**-0.5 if p.scale is None else p.scale
    operands = [
        x if x is None else x.detach() for x in (o.query, o.key, o.value, o.multiplier, o.bias)
    ]
    no_factors = (None,) * 4
    state = (*no_factors, four(o.attn_mask), o.key_mask, list(ids), rng_state(p))
    settings = (list(flat), scale, p.dropout_p, p.gate)
    ops = torch.ops.lam_kernels
    out, lse = ops.masked_attention_fwd(*operands, *state, *settings, "reference")
    needs = [
        x is not None and name in o.leaves
        for name, x in zip(o.NAMES.values(), operands, strict=True)
    ]
    gradients = ops.masked_attention_bwd(
        o.grad_out, o.grad_lse, *operands, *state, out, lse, *settings, [*needs, *[False] * 4],
        "reference",
    )  # fmt: skip
    result = {"out": out, "lse": lse}
    for name, wanted, gradient in zip(o.NAMES.values(), needs, gradients[:5], strict=True):
        if wanted:
            result[name] = gradient
        else:
            assert gradient.numel() == 0
    assert_accurate(result, p)


def test_large_scores_lose_no_weight(backend):
    """One key: its weight is 1 however large the score, in the backward pass too."""
    query = torch.ones(1, 1, 1, 16)
    for size in (1e3, 1e4, 1e5):
        value = torch.ones(1, 1, 1, 16, requires_grad=True)
        out = lam_kernels.masked_attention(
            query, query, value, scale=size / 16 * 1.2345, backend=backend
        )
        out.sum().backward()
        assert torch.equal(value.grad, torch.ones_like(value))
