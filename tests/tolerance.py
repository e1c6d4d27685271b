"""The only comparison of the test-suite: is a result as accurate as its dtype allows?

    error = |result - float64 reference|
    noise = the same error of the same-dtype reference (upcast=False: every operation is rounded)

A result passes when, for the maximum and the RMS over a tensor,

    error <= one rounding step of the largest value + max(k * noise, floor)

with k = 2 (gradients 3); and, because one bad row hides in the mean of many, when the same holds
for each row: for its RMS, and for its gain <error, expected> / <expected, expected>, in which
independent roundings average out and a wrong factor does not (for the gain the floor alone counts).
Infinities must be the same ones, NaN never passes, and an element all of whose summands are zero
must be exactly 0.

The floor is what rounding does to the summands: floors.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache

import torch
from floors import Summands, one_thread, rng_state, summands
from torch import Tensor

from python_ref.inputs import Operands, Problem
from python_ref.masked_attention import masked_attention as reference_attention

# A rounding is uniform over a step: deviation 0.29 steps, so 1.5 steps are five deviations (more
# where the mantissa is not at the lower end of its binade). 500 right kernels per dtype
# (test_right_kernels_pass) stay below 0.6 of it.
STEPS = 1.5
FACTOR, GRADIENT_FACTOR = 2, 3


def assert_accurate(result: dict[str, Tensor], problem: Problem) -> None:
    """Raise AssertionError with one line per violated bound.

    `result` holds out, lse and, under the operand's name, each gradient, as `evaluate` of
    problems.py returns them.
    """
    expected, same, floors = expected_of(problem), same_dtype_of(problem), summands(problem)
    lines = []
    if set(result) != set(expected):
        lines.append(f"outputs {sorted(result)}, expected {sorted(expected)}")
    compute = getattr(torch, problem.dtype)
    for name in result.keys() & expected.keys():
        factor = FACTOR if name in ("out", "lse") else GRADIENT_FACTOR
        # lse is fp32 whatever the operands are: it gets no credit for what the low-precision
        # reference loses
        noisy = expected[name] if name == "lse" else same[name]
        lines += violations(
            name, result[name], expected[name], noisy, factor, floors[name], compute
        )
    if lines:
        raise AssertionError("\n  ".join([f"--problem '{problem!r}'", *lines]))


def violations(
    name: str,
    result: Tensor,
    expected: Tensor,  # float64
    same_dtype: Tensor,  # of the same-dtype reference
    factor: float,
    floor: Summands | None = None,
    compute: torch.dtype | None = None,
) -> list[str]:
    """Sentences about what is wrong with `result`; empty when nothing is. Serves any op, also
    without a floor."""
    if result.shape != expected.shape:
        return [f"{name}: shape {tuple(result.shape)}, expected {tuple(expected.shape)}"]
    if result.numel() == 0:
        return []
    if floor is None:
        floor = Summands(expected.abs(), torch.zeros_like(expected))
    compute = compute or result.dtype
    got, noisy = result.detach().double(), same_dtype.detach().double()
    bad = _not_comparable(name, got, expected, noisy, floor)
    if bad:
        return bad
    finite = expected.isfinite()
    zero = torch.zeros((), dtype=torch.float64)
    got, noisy, expected, accumulated, stored = (
        torch.where(finite, x, zero)
        for x in (got, noisy, expected, floor.accumulated, floor.stored)
    )
    error, noise = got - expected, noisy - expected
    step = torch.finfo(result.dtype).eps
    accumulator = torch.float64 if compute == torch.float64 else torch.float32
    accumulated = STEPS * torch.finfo(accumulator).eps * accumulated
    stored = STEPS * torch.finfo(compute).eps * stored
    tiny = torch.finfo(result.dtype).smallest_normal * step  # of the subnormals

    found = []
    for statistic, of in (("maximum", _maximum), ("RMS", _rms)):
        bound = step * of(expected) + max(factor * of(noise), of(accumulated) + of(stored)) + tiny
        if not of(error) <= bound:
            found.append(f"{name}: {statistic} of the error {of(error):.3g}, at most {bound:.3g}")

    rows = (lambda x: x.reshape(-1, x.shape[-1])) if expected.dim() else (lambda x: x.reshape(1, 1))
    error, noise, expected, accumulated, stored = map(
        rows, (error, noise, expected, accumulated, stored)
    )
    # in units of each row's own size: squares of float64 weights underflow from e^-360 on
    size = torch.maximum(expected.abs(), accumulated).amax(1)
    size = size.clamp_min(torch.finfo(torch.float64).smallest_normal)
    error, noise, expected, accumulated, stored = (
        x / size[:, None] for x in (error, noise, expected, accumulated, stored)
    )
    norm = expected.norm(dim=1)
    tiny = tiny * math.sqrt(expected.shape[1]) / size
    unit = (STEPS * step * norm).hypot(stored.norm(dim=1)) + accumulated.norm(dim=1) + tiny
    bound = max(1.0, factor * float((noise.norm(dim=1) / unit).max()))
    found += _rows(f"{name}: RMS", error.norm(dim=1) / unit, bound)
    # a row smaller than its own floor has no direction
    along = torch.where((norm > unit)[:, None], expected / norm[:, None], 0.0)
    gain = (stored * along).norm(dim=1)
    if floor.stored_gain is not None:
        gain = STEPS * torch.finfo(compute).eps * floor.stored_gain.reshape(-1) / size
    unit = (STEPS * step * (expected * along).norm(dim=1)).hypot(gain)
    unit = unit + accumulated.norm(dim=1) + tiny
    # no credit for `noise`: the reference's low-precision sums move whole rows, a kernel sums in
    # fp32
    found += _rows(f"{name}: gain", (error * along).sum(1).abs() / unit, 1.0)
    return found


def _rows(what: str, error: Tensor, bound: float) -> list[str]:
    """`error` is in units of each row's own floor, so that a small row counts as much as a large
    one."""
    worst = int(error.argmax())
    if not float(error[worst]) <= bound:
        return [f"{what} of row {worst} is {float(error[worst]):.3g} floors, at most {bound:.3g}"]
    return []


def _not_comparable(name, got, expected, noisy, floor) -> list[str]:
    if got.isnan().any():
        return [f"{name}: {int(got.isnan().sum())} of {got.numel()} are NaN"]
    infinite = expected.isinf()
    if not torch.equal(got.isinf(), infinite) or not torch.equal(got[infinite], expected[infinite]):
        return [f"{name}: infinities differ, {int(got.isinf().sum())} for {int(infinite.sum())}"]
    if not noisy[~infinite].isfinite().all():
        return [f"{name}: the same-dtype reference overflows, this problem judges nothing"]
    leaked = (floor.accumulated == 0) & (got != 0) & ~infinite
    if leaked.any():
        where = tuple(leaked.nonzero()[0].tolist())
        return [f"{name}: {int(leaked.sum())} must be exactly 0, e.g. {got[where]:.3g} at {where}"]
    return []


def _maximum(x: Tensor) -> float:
    return float(x.abs().max())


def _rms(x: Tensor) -> float:
    return float(x.square().mean().sqrt())


def assert_right_derivative(f: Callable[[float], float], derivative: float) -> None:
    """`derivative` is that of f at 0 from the right: second-order differences with two steps bound
    each other."""
    step = 1e-4
    values = [f(n * step) for n in (0, 1, 2, 4)]
    fine = (4 * values[1] - values[2] - 3 * values[0]) / (2 * step)
    coarse = (4 * values[2] - values[3] - 3 * values[0]) / (4 * step)
    rounding = 8 * torch.finfo(torch.float64).eps * max(map(abs, values)) / step
    bound = abs(fine - coarse) + rounding
    if not abs(derivative - fine) <= bound:
        raise AssertionError(
            f"derivative {derivative:.8g}, difference {fine:.8g} within {bound:.2g}"
        )


def run_reference(problem: Problem, operands: Operands, upcast: bool) -> dict[str, Tensor]:
    """out, lse and all wanted gradients from python_ref."""
    out, lse = reference_attention(
        operands.query,
        operands.key,
        operands.value,
        **operands.masks(),
        gate=problem.gate,
        rng_state=rng_state(problem),
        return_lse=True,
        upcast=upcast,
    )
    return with_gradients(out, lse, operands)


def with_gradients(out: Tensor, lse: Tensor, operands: Operands) -> dict[str, Tensor]:
    result = {"out": out.detach(), "lse": lse.detach()}
    leaves = operands.leaves
    if leaves:
        outputs, seeds = [out], [operands.grad_out.to(out.dtype)]
        if operands.grad_lse is not None and lse.requires_grad:  # it does not depend on value
            outputs, seeds = [out, lse], [*seeds, operands.grad_lse.to(lse.dtype)]
        gradients = torch.autograd.grad(
            outputs, list(leaves.values()), seeds, allow_unused=True, materialize_grads=True
        )
        result.update(zip(leaves, gradients, strict=True))
    return result


@lru_cache(maxsize=128)
@one_thread
def expected_of(problem: Problem) -> dict[str, Tensor]:
    return run_reference(problem, problem.operands().to(torch.float64), upcast=True)


@lru_cache(maxsize=128)
@one_thread
def same_dtype_of(problem: Problem) -> dict[str, Tensor]:
    return run_reference(problem, problem.operands(), upcast=False)
