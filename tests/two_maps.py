"""How the tests of global_local_attention and map_gated_attention evaluate and judge a problem.

A Problem of python_ref.inputs says all about a call: its pattern is that of the local half, drawn
apart so that everything else belongs to the global half as well. For map_gated_attention multiplier
and bias, both "qk", are the two gates.
"""

from __future__ import annotations

import dataclasses
import random
from functools import lru_cache

import pytest
import torch
from backends import BACKENDS
from floors import one_thread
from problems import random_problem
from rounding import rounding_floors
from tolerance import FACTOR, GRADIENT_FACTOR, violations
from torch import Tensor

import lam_kernels
from lam_kernels.ops._backends import Explanation
from lam_kernels.patterns import encode
from python_ref import global_local_attention as global_local
from python_ref import map_gated_attention as map_gated
from python_ref.inputs import Operands, Problem, draw_pattern, lay_out

# what is not the specification itself
KERNELS = [
    pytest.param(row.name, marks=pytest.mark.backend(row.name))
    for row in BACKENDS
    if row.name != "reference"
]
GRADIENTS = ("query", "key", "value", "multiplier", "bias")


@dataclasses.dataclass(frozen=True)
class Case:
    """One call of the op; its repr can be pasted back."""

    op: str  # "global_local_attention" or "map_gated_attention"
    problem: Problem
    renormalise: bool = False

    def but(self, **changes) -> Case:
        return dataclasses.replace(self, problem=self.problem.but(**changes))

    @property
    def results(self) -> tuple[str, ...]:
        return ("global_out", "local_out") if self.op == "global_local_attention" else ("out",)


def gated(renormalise: bool = False, **fields) -> Case:
    problem = Problem(**{"multiplier": "qk", "bias": "qk", **fields})
    return Case("map_gated_attention", problem, renormalise)


def both(**fields) -> Case:
    return Case("global_local_attention", Problem(**fields))


class Drawn:
    """The operands of a case, the local pattern, and a gradient for each result."""

    def __init__(self, case: Case, operands: Operands | None = None):
        p = case.problem
        self.case = case
        self.operands = operands or p.but(pattern=None, lse_grad=False).operands()
        generator = torch.Generator().manual_seed(p.seed + 1)
        self.pattern = draw_pattern(p, generator)
        first = self.operands.grad_out
        second = torch.randn(first.shape, generator=generator).to(first.dtype)
        self.grads = [first, lay_out(second, p.grad_layout)][: len(case.results)]

    def double(self) -> Drawn:
        wide = Drawn(self.case, self.operands.to(torch.float64))
        wide.grads = [g.double() for g in self.grads]
        wide.pattern = self.pattern
        return wide

    def tensors(self) -> list[Tensor | None]:
        o = self.operands
        return [o.query, o.key, o.value, o.multiplier, o.bias]

    def call(self, tensors, op=None, **more) -> tuple[Tensor, ...]:
        """The results for these five tensors; `op` is the public one unless given."""
        o, p, case = self.operands, self.case.problem, self.case
        op = op or getattr(lam_kernels, case.op)
        query, key, value, multiplier, bias = tensors
        more |= {"key_mask": o.key_mask, "scale": p.scale}
        if case.op == "global_local_attention":
            return op(query, key, value, self.pattern, multiplier=multiplier, bias=bias, **more)
        more["renormalise"] = case.renormalise
        return (op(query, key, value, multiplier, bias, self.pattern, **more),)

    def explain(self, backend: str) -> Explanation:
        def op(*arguments, **keywords):
            explained.append(lam_kernels.explain(self.case.op, *arguments, **keywords))
            return ()

        explained: list = []
        self.call(self.tensors(), op, backend=backend)
        return explained[0]

    def with_gradients(self, results) -> dict[str, Tensor]:
        found = dict(zip(self.case.results, (r.detach() for r in results), strict=True))
        leaves = self.operands.leaves
        if leaves:
            grads = torch.autograd.grad(
                results,
                list(leaves.values()),
                self.grads,
                allow_unused=True,
                materialize_grads=True,
            )
            found.update(zip(leaves, grads, strict=True))
        return found

    def formulas(self, stored) -> dict[str, Tensor]:
        """Results and wanted gradients from the specification's written-out formulas."""
        case, o, p = self.case, self.operands, self.case.problem
        flat, ids = encode(self.pattern, p.H)
        scale = p.D**-0.5 if p.scale is None else p.scale
        four = [x if x is None or x.dim() == 4 else x[None, None] for x in self.tensors()]
        names = [name for name, x in zip(GRADIENTS, four, strict=True) if x is not None]
        needs = [name in o.leaves for name in GRADIENTS]
        if case.op == "global_local_attention":
            shared = (*four, o.key_mask, ids)
            kept = global_local.global_local_attention_fwd(*shared, flat, scale)
            outs = [stored(out) for out in kept[:2]]
            grads = global_local.global_local_attention_bwd(
                *self.grads, *shared, *outs, *kept[2:], flat, scale, needs
            )
        else:
            shared = (*self.tensors(), o.key_mask, ids, flat, scale, case.renormalise)
            kept = (map_gated.map_gated_attention_fwd(*shared),)
            grads = map_gated.map_gated_attention_bwd(*self.grads, *shared, needs)
        found = dict(zip(case.results, kept, strict=False))
        for name, grad in zip(GRADIENTS, grads, strict=True):
            if name in names and name in o.leaves:
                found[name] = grad.view(getattr(o, name).shape)
        return found


def reference_of(case: Case):
    module = global_local if case.op == "global_local_attention" else map_gated
    return getattr(module, case.op)


@lru_cache(maxsize=64)
@one_thread
def expected_of(case: Case) -> dict[str, Tensor]:
    drawn = Drawn(case).double()
    return drawn.with_gradients(drawn.call(drawn.tensors(), reference_of(case)))


@lru_cache(maxsize=64)
@one_thread
def same_dtype_of(case: Case) -> dict[str, Tensor]:
    drawn = Drawn(case)
    return drawn.with_gradients(drawn.call(drawn.tensors(), reference_of(case), upcast=False))


@lru_cache(maxsize=64)
@one_thread
def floors_of(case: Case):
    drawn = Drawn(case).double()
    inputs = [x for x in (*drawn.tensors(), *drawn.grads) if x is not None]
    dtype = getattr(torch, case.problem.dtype)
    return rounding_floors(drawn.formulas, inputs, dtype, case.problem.seed)


def evaluate(case: Case, backend: str | None, drawn: Drawn | None = None) -> dict[str, Tensor]:
    """Results and wanted gradients from the public op."""
    drawn = drawn or Drawn(case)
    run = one_thread(drawn.call) if backend == "reference" else drawn.call
    return drawn.with_gradients(run(drawn.tensors(), backend=backend))


def assert_accurate(result: dict[str, Tensor], case: Case) -> None:
    expected, same, floors = expected_of(case), same_dtype_of(case), floors_of(case)
    lines = []
    if set(result) != set(expected):
        lines.append(f"outputs {sorted(result)}, expected {sorted(expected)}")
    compute = getattr(torch, case.problem.dtype)
    for name in result.keys() & expected.keys():
        factor = FACTOR if name in case.results else GRADIENT_FACTOR
        lines += violations(
            name, result[name], expected[name], same[name], factor, floors[name], compute
        )
    if lines:
        raise AssertionError("\n  ".join([repr(case), *lines]))


def check(case: Case, backend: str | None) -> None:
    """The backend's result for a case is as accurate as its dtype allows.

    A case beyond the backend's limits must be refused, with the reason that explain() gives.
    """
    why_not = limits(case, backend)
    if not why_not:
        assert_accurate(evaluate(case, backend), case)
        return
    with pytest.raises(RuntimeError, match="cannot serve this call") as refused:
        evaluate(case, backend)
    assert why_not[0] in str(refused.value)


def limits(case: Case, backend: str | None) -> tuple[str, ...]:
    """Why the backend does not serve a case, () when it does."""
    if backend in (None, "cpu", "reference"):  # they serve everything
        return ()
    return Drawn(case).explain(backend).reasons[backend]


def random_case(op: str, seed: int, dtype: str | None = None) -> Case:
    """Case number `seed` of an endless list."""
    draw = random.Random(seed)
    p = random_problem(seed, dtype)
    B, H = min(p.B, 2), min(p.H, 3)
    changes = {"B": B, "H": H, "Hkv": H, "dropout_p": 0.0, "attn_mask": None, "lse_grad": False}
    changes["gate"] = False
    if isinstance(p.pattern, tuple):
        changes["pattern"] = p.pattern[:H]
    elif p.pattern is None:
        choices = ("Toeplitz(5)", "BlockDiagonal(16)", "DilatedToeplitz(30, 4)", "Toeplitz(40)")
        changes["pattern"] = draw.choice(choices)
    if op == "global_local_attention":
        return Case(op, p.but(**changes))
    changes |= {"multiplier": "qk", "bias": "qk", "Lq": min(p.Lq, 512), "fill": ""}
    changes["Lk"] = changes["Lq"]
    if p.mask_layout == "expanded":  # gates have no axis to expand along
        changes["mask_layout"] = "transposed"
    return Case(op, p.but(**changes), draw.random() < 0.5)
