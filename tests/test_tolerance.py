"""The comparison is tested like a kernel: right results pass, and each planted fault fails, for
every dtype."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from floors import rng_state
from problems import random_problem
from tolerance import assert_accurate, expected_of, run_reference
from torch import Tensor

from python_ref.inputs import Problem
from python_ref.philox import kept_pairs

DTYPES = ("float32", "bfloat16", "float16", "float64")
BASE = Problem(
    Lq=130, D=128, multiplier="b1qk", bias="1hqk", pattern="Toeplitz(100)", lse_grad=True, seed=3
)
ROW = (1, 0, 37)  # an ordinary row: sample, head, position
TILE = slice(16, 32)


def exact(problem: Problem) -> dict[str, Tensor]:
    """The float64 result, rounded once to the dtypes of the contract."""
    o = problem.operands()
    dtypes = {name: leaf.dtype for name, leaf in o.leaves.items()} | {"out": o.query.dtype}
    dtypes["lse"] = torch.float64 if o.query.dtype == torch.float64 else torch.float32
    return {name: x.to(dtypes[name]) for name, x in expected_of(problem).items()}


def scaled_row(name):
    """One row by 1.01: less than two steps of bf16, which neither maximum nor RMS can see."""

    def plant(result, problem):
        row = result[name][0, 0, 7] if name == "multiplier" else result[name][ROW]
        row.copy_(1.01 * row.double())

    return plant


def shifted_tile(name):
    def plant(result, problem):
        tile = result[name][0, 1, 17:33].clone()
        result[name][0, 1, TILE] = tile

    return plant


def swapped_heads(name):
    def plant(result, problem):
        result[name][0] = result[name][0].flip(0)

    return plant


def leaked_key(result, problem):
    """Row 12 of one head sees one key more than its 113."""
    o = problem.operands().to(torch.float64)
    seen = o.visible.clone()
    seen[1, 0, 12, 120] = True
    leaky = dataclasses.replace(o, pattern=None, attn_mask=seen)
    leaked = run_reference(problem, leaky, upcast=True)
    for name in result:
        result[name] = leaked[name].to(result[name].dtype)


def dropped_tile(result, problem):
    result["multiplier"][1, 0, TILE, TILE] = 0


def dropped_head(result, problem):
    """The multiplier's gradient lacks what head 1 of sample 0 adds to it."""
    o = problem.operands().to(torch.float64)
    for seed in (o.grad_out, o.grad_lse):
        seed[0, 1] = 0
    part = run_reference(problem, o, upcast=True)["multiplier"]
    result["multiplier"] = part.to(result["multiplier"].dtype)


def forgotten_lse_gradient(result, problem):
    o = dataclasses.replace(problem.operands().to(torch.float64), grad_lse=None)
    part = run_reference(problem, o, upcast=True)
    for name in ("query", "key", "multiplier", "bias"):
        result[name] = part[name].to(result[name].dtype)


def coarse(name):
    """Half of the dtype's significant bits."""

    def plant(result, problem):
        bits = (1 - round(math.log2(torch.finfo(result[name].dtype).eps))) // 2
        mantissa, exponent = torch.frexp(result[name].double())
        rounded = torch.ldexp((mantissa * 2**bits).round() / 2**bits, exponent)
        result[name] = rounded.to(result[name].dtype)

    return plant


def set_to(name, place, value):
    def plant(result, problem):
        result[name][place] = value

    return plant


def add_to_lse(result, problem):
    result["lse"][1, 1, 5] += 0.01


def base_two_lse(result, problem):
    result["lse"] /= math.log(2)


def missing(result, problem):
    del result["bias"]


def transposed(result, problem):
    result["multiplier"] = result["multiplier"].mT


HIDDEN = (0, 0, 0, 120)
FAULTS = {
    **{f"scaled row of {n}": scaled_row(n) for n in ("out", "query", "key", "value", "multiplier")},
    **{f"shifted tile of {n}": shifted_tile(n) for n in ("out", "query", "key", "value")},
    **{f"swapped heads of {n}": swapped_heads(n) for n in ("out", "lse", "query", "key", "value")},
    "leaked key": leaked_key,
    "dropped tile of multiplier": dropped_tile,
    "dropped head of multiplier": dropped_head,
    "forgotten lse gradient": forgotten_lse_gradient,
    **{f"coarse {n}": coarse(n) for n in ("out", "lse", "query", "key", "value", "bias")},
    "leak into a hidden multiplier": set_to("multiplier", HIDDEN, 1e-6),
    "leak into a hidden bias": set_to("bias", HIDDEN, -1e-6),
    "NaN": set_to("out", (0, 0, 3, 5), math.nan),
    "infinity": set_to("key", (0, 0, 3, 5), math.inf),
    "row taken for empty": set_to("lse", (0, 0, 3), -math.inf),
    "unwritten row": set_to("query", (0, 1, 129), 0.0),
    "lse off by 0.01": add_to_lse,
    "lse in base 2": base_two_lse,
    "missing gradient": missing,
    "transposed mask gradient": transposed,
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("fault", FAULTS)
def test_planted_fault_fails(fault, dtype):
    problem = BASE.but(dtype=dtype)
    result = {name: x.clone() for name, x in exact(problem).items()}
    FAULTS[fault](result, problem)
    with pytest.raises(AssertionError) as failure:
        assert_accurate(result, problem)
    assert repr(problem) in str(failure.value)


@pytest.mark.parametrize("dtype", DTYPES)
def test_references_pass(dtype):
    problem = BASE.but(dtype=dtype)
    assert_accurate(exact(problem), problem)
    assert_accurate(run_reference(problem, problem.operands(), upcast=True), problem)


@pytest.mark.parametrize(
    ("result", "wanted"),
    [
        ({"seed": 5}, "the operands of another seed"),
        ({"scale": 0.0893}, "a scale of 0.0893 for 0.0884"),
        ({"pattern": "Toeplitz(101)"}, "a radius of 101 for 100"),
        ({"pattern": None}, "no pattern"),
        ({"multiplier": None, "grads": "qkvb"}, "no multiplier"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
@pytest.mark.parametrize("dtype", DTYPES)
def test_results_of_another_problem_fail(result, wanted, dtype):
    problem = BASE.but(dtype=dtype)
    with pytest.raises(AssertionError):
        assert_accurate(exact(problem.but(**result)), problem)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_sums_in_low_precision_fail(dtype):
    """The same-dtype reference sets the noise and is itself refused: it sums a softmax in the
    operands' dtype."""
    problem = BASE.but(dtype=dtype)
    with pytest.raises(AssertionError, match="gain"):
        assert_accurate(run_reference(problem, problem.operands(), upcast=False), problem)


@pytest.mark.parametrize("dropped", [0.1, 0.5])
def test_another_dropout_draw_fails(dropped):
    problem = BASE.but(dropout_p=dropped)
    with pytest.raises(AssertionError):
        assert_accurate(exact(problem.but(dropout_p=dropped + 0.01)), problem)


def flash_kernel(p: Problem) -> dict[str, Tensor]:
    """What a right kernel may do: blocks of 48 keys, P and dS rounded to the operands' dtype for
    the products, P
    recomputed from a stored lse, delta from the stored out, sums in fp32."""
    o = p.operands()
    dtype = o.query.dtype
    total = torch.float64 if dtype == torch.float64 else torch.float32
    groups = p.H // p.Hkv
    scale = p.D**-0.5 if p.scale is None else p.scale

    def rounded(x):
        return x.to(dtype).to(total)

    def by_key_head(x):
        return x.view(p.B, p.Hkv, groups, *x.shape[2:]).sum(2)

    with torch.no_grad():
        query, grad_out = o.query.to(total), o.grad_out.to(total)
        key, value = (x.to(total).repeat_interleave(groups, 1) for x in (o.key, o.value))
        used = o.seen if p.gate else o.visible
        M = 1.0 if o.multiplier is None else torch.where(used, o.multiplier.to(total), 1.0)
        S = scale * (query @ key.mT)
        F = Z = S * M
        if o.bias is not None:
            bias = torch.where(used, o.bias.to(total), 1.0)
            Z = F + (bias.log() if p.gate else bias)
        Z = torch.where(o.visible, Z, -math.inf)
        largest = Z.amax(-1, keepdim=True).clamp(min=-1e30)
        E = torch.exp2((Z - largest) * math.log2(math.e))
        sums = E.sum(-1, keepdim=True)
        keep = torch.ones_like(E)
        if p.dropout_p:
            keep = kept_pairs(rng_state(p), p.dropout_p, p.B, p.H, p.Lq, p.Lk).to(total)
            keep /= 1 - p.dropout_p
        out = sum(
            rounded(e * k) @ v
            for e, k, v in zip(E.split(48, -1), keep.split(48, -1), value.split(48, 2), strict=True)
        )
        out = (out / sums.clamp(min=1e-30)).to(dtype)
        lse = torch.where(sums > 0, largest + sums.log(), -math.inf)
        shown = lse.clamp(min=-1e30)
        weight = torch.where(used & (sums > 0), torch.exp2((F - shown) * math.log2(math.e)), 0.0)
        P = torch.exp2((Z - shown) * math.log2(math.e))
        delta = (grad_out * out.to(total)).sum(-1, keepdim=True)
        if o.grad_lse is not None:
            delta = delta - o.grad_lse[..., None]
        slope = keep * (grad_out @ value.mT) - delta
        dZ = P * slope
        dS = rounded(dZ * M)
        gradients = {
            "query": scale * (dS @ key),
            "key": by_key_head(scale * (dS.mT @ query)),
            "value": by_key_head(rounded(P * keep).mT @ grad_out),
            "multiplier": torch.where(o.visible, dZ * S, 0.0),
            "bias": weight * slope if p.gate else dZ,
        }
    result = {"out": out, "lse": lse[..., 0]}
    for name, leaf in o.leaves.items():
        result[name] = gradients[name].sum_to_size(leaf.shape).to(leaf.dtype)
    return result


@pytest.mark.parametrize("dtype", DTYPES)
def test_right_kernels_pass(dtype):
    for seed in range(40):
        problem = random_problem(seed, dtype)
        assert_accurate(flash_kernel(problem), problem)


def test_true_gradient_of_zero():
    """One visible key: P = 1, so query, key and masks have no gradient, and a kernel finds
    roundings of 0."""
    for dtype in DTYPES:
        problem = BASE.but(pattern="Toeplitz(0)", multiplier=None, lse_grad=False, dtype=dtype)
        result = exact(problem)
        step = torch.finfo(result["query"].dtype).eps
        result["query"] = torch.full_like(result["query"], 0.01 * step)
        assert_accurate(result, problem)
        result["query"] = torch.full_like(result["query"], 1000 * step)
        with pytest.raises(AssertionError):
            assert_accurate(result, problem)


def test_rows_whose_squares_underflow():
    """Dropout that leaves a row nothing but weights of e^-370: float64 holds them, not squares."""
    problem = Problem(
        H=4, Lq=65, D=200, Dv=64, dtype="float64", multiplier="bhq1", multiplier_dtype="float32",
        attn_mask="1hq1", scale=0.3, dropout_p=0.9, spread=20.0, fill="neg_inf", seed=1205,
    )  # fmt: skip
    result = flash_kernel(problem)
    size = result["out"].abs().amax(-1)
    row = tuple((size == size[size > 0].min()).nonzero()[0].tolist())
    assert float(size[row]) < 1e-100
    assert_accurate(result, problem)
    result["out"][row] *= 1.01
    with pytest.raises(AssertionError, match="out: gain"):
        assert_accurate(result, problem)


def test_problem_is_one_line_that_can_be_pasted():
    for seed in range(200):
        problem = random_problem(seed)
        assert "\n" not in repr(problem)
        assert Problem.parse(repr(problem)) == problem
