"""Float64 finite differences of the kernels: every operand, patterns, gate, lse, dropout."""

from __future__ import annotations

import pytest
import torch
from backends import BACKENDS, BY_NAME
from tolerance import assert_right_derivative
from torch.autograd import gradcheck, gradgradcheck

import lam_kernels
from python_ref.inputs import Problem

SMALL = {"B": 2, "H": 2, "Lq": 3, "Lk": 4, "D": 3, "Dv": 2, "dtype": "float64"}

CASES = {
    "no mask": Problem(**SMALL),
    "multiplier": Problem(**SMALL, multiplier="bhqk"),
    "bias": Problem(**SMALL, bias="bhqk"),
    "both": Problem(**SMALL, multiplier="b1qk", bias="1hqk"),
    "rows and columns": Problem(**SMALL, multiplier="1hq1", bias="b11k"),
    "two axes": Problem(**SMALL, multiplier="qk", bias="1111"),
    "scale": Problem(**SMALL, multiplier="1h11", scale=0.7),
    "gate": Problem(**SMALL, bias="b1qk", gate=True),
    "gate shared": Problem(**SMALL, bias="11qk", gate=True),
    "masks": Problem(**SMALL, multiplier="b1qk", attn_mask="b1qk", key_mask=True, fill="dead"),
    "hidden by the bias": Problem(**SMALL, bias="1hqk", fill="neg_inf", seed=4),
    "causal": Problem(**SMALL, multiplier="11qk", pattern="Causal()"),
    "local": Problem(**SMALL, bias="b1qk", pattern="Toeplitz(1)"),
    "dilated": Problem(**SMALL, bias="1hqk", pattern="DilatedToeplitz(2, 2)"),
    "blocks": Problem(**SMALL, multiplier="1h1k", pattern="BlockDiagonal(2)"),
    "segments": Problem(**SMALL, multiplier="b1qk", pattern="Segments(2)"),
    "one pattern a head": Problem(**SMALL, bias="11qk", pattern=("Causal()", None)),
    "dropout": Problem(**SMALL, multiplier="b1qk", dropout_p=0.4),
    "shared heads": Problem(**SMALL | {"H": 4}, Hkv=2, multiplier="b1qk", bias="1h1k"),
    "several tiles": Problem(
        **SMALL | {"B": 1, "H": 1, "Lq": 9, "Lk": 37}, bias="11qk", grads="qb"
    ),
}


def function_of(problem, backend):
    """(f, inputs): (out, lse) of the leaves; -inf entries and zeros of a gate are held fixed."""
    o = problem.operands()
    names = list(o.leaves)
    masks = o.masks()
    held = o.bias.detach().clone() if o.bias is not None else None

    def f(*leaves):
        given = dict(zip(names, leaves, strict=True))
        query, key, value = (given.get(n, getattr(o, n)) for n in ("query", "key", "value"))
        mine = masks | {n: given[n] for n in ("multiplier", "bias") if n in given}
        if held is not None and "bias" in given:
            fixed = (held == 0) if problem.gate else held.isinf()
            mine["bias"] = torch.where(fixed, held, given["bias"])
        torch.manual_seed(problem.seed)
        keywords = {"return_lse": True, "backend": backend}
        if problem.gate:
            mine.pop("multiplier")
            mask = mine.pop("bias")
            out, lse = lam_kernels.lam_attention(
                query, key, value, mask, fusion="gate", **mine, **keywords
            )
        else:
            out, lse = lam_kernels.masked_attention(query, key, value, **mine, **keywords)
        return out, lse.masked_fill(
            lse.isinf(), 0.0
        )  # rows without keys have no lse to differentiate

    return f, list(o.leaves.values())


@pytest.mark.parametrize("case", CASES)
def test_gradcheck(case, backend):
    if "float64" not in BY_NAME[backend].dtypes:
        pytest.skip(f"{backend} has no float64")
    f, leaves = function_of(CASES[case], backend)
    assert gradcheck(f, leaves)


# A backend without double backward says so: test_double_backward of the conventions.
@pytest.mark.parametrize(
    "backend",
    [
        pytest.param(b.name, marks=pytest.mark.backend(b.name))
        for b in BACKENDS
        if b.double_backward
    ],
)
@pytest.mark.parametrize("case", CASES)
def test_gradgradcheck(case, backend):
    f, leaves = function_of(CASES[case], backend)
    assert gradgradcheck(f, leaves)


def test_gate_at_zero(backend):
    """M = 0 has the gradient that pushes a closed gate open: a one-sided difference finds it."""
    if "float64" not in BY_NAME[backend].dtypes:
        pytest.skip(f"{backend} has no float64")
    problem = CASES["gate"].but(seed=11)
    o = problem.operands()
    closed = (o.bias == 0) & o.visible.any(-1, keepdim=True).any(1, keepdim=True)
    assert closed.any()

    def loss(mask):
        torch.manual_seed(0)
        out = lam_kernels.lam_attention(
            o.query, o.key, o.value, mask, fusion="gate", backend=backend
        )
        return (out * o.grad_out).sum()

    gradient = torch.autograd.grad(loss(o.bias), o.bias)[0]
    for place in map(tuple, closed.nonzero().tolist()):

        def opened(step, place=place):
            mask = o.bias.detach().clone()
            mask[place] = step
            return float(loss(mask).detach())

        assert_right_derivative(opened, float(gradient[place]))
