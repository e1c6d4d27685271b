"""How the tests of score_masked_attention draw, evaluate and judge a problem.

A Problem of python_ref.inputs says all about query, key, value, padding, strides and dtypes; of its
`grads`, m stands for the weights of the network and b for its biases.
"""

from __future__ import annotations

import dataclasses
import random
from functools import lru_cache
from itertools import pairwise

import torch
from floors import one_thread
from problems import assert_refused, random_problem
from rounding import rounding_floors
from tolerance import FACTOR, GRADIENT_FACTOR, violations
from torch import Tensor

import lam_kernels
from python_ref import score_masked_attention as reference
from python_ref.inputs import Operands, Problem, lay_out


@dataclasses.dataclass(frozen=True)
class Case:
    """One call of the op; its repr can be pasted back."""

    problem: Problem
    depth: int = 3
    hidden: int = 24
    fusion: str = "mul"
    heads: str = "each"
    network_dtype: str | None = None  # None: that of the problem

    def but(self, **changes) -> Case:
        return dataclasses.replace(self, problem=self.problem.but(**changes))

    @property
    def widths(self) -> list[int]:
        Lk = self.problem.Lk
        return [Lk, *[self.hidden] * (self.depth - 1), Lk]


def case(depth: int = 3, hidden: int = 24, fusion: str = "mul", heads: str = "each", **fields):
    network_dtype = fields.pop("network_dtype", None)
    return Case(Problem(**fields), depth, hidden, fusion, heads, network_dtype)


class Drawn:
    """The operands of a case and its network."""

    def __init__(self, case: Case, operands: Operands | None = None, network=None):
        p = case.problem
        self.case, self.operands = case, operands or p.operands()
        self.weights, self.biases = network or self._draw()
        for letter, tensors in (("m", self.weights), ("b", self.biases)):
            for tensor in tensors:
                tensor.requires_grad_(letter in p.grads)

    def _draw(self) -> tuple[list[Tensor], list[Tensor]]:
        p, widths = self.case.problem, self.case.widths
        generator = torch.Generator().manual_seed(p.seed + 1)
        dtype = getattr(torch, self.case.network_dtype or p.dtype)
        weights, biases = [], []
        for layer, (width, out) in enumerate(pairwise(widths)):
            last = layer == self.case.depth - 1
            # M about 1 +- 0.5 to multiply with, 0 +- 0.5 to add: a depth of 64 keeps its size
            size = (0.5 if last else 2**0.5) * max(width, 1) ** -0.5
            weight = size * torch.randn(width, out, generator=generator)
            bias = 0.1 * torch.randn(out, generator=generator)
            bias = bias + (1.0 if last and self.case.fusion == "mul" else 0.0)
            layout = p.mask_layout if p.mask_layout != "expanded" else "contiguous"
            weights.append(lay_out(weight.to(dtype), layout).detach())
            biases.append(bias.to(dtype))
        return weights, biases

    def double(self) -> Drawn:
        network = [[t.detach().double() for t in ts] for ts in (self.weights, self.biases)]
        return Drawn(self.case, self.operands.to(torch.float64), network)

    @property
    def leaves(self) -> dict[str, Tensor]:
        found = dict(self.operands.leaves)
        for layer, (weight, bias) in enumerate(zip(self.weights, self.biases, strict=True)):
            found |= {f"weight {layer}": weight, f"bias {layer}": bias}
        return {name: tensor for name, tensor in found.items() if tensor.requires_grad}

    def call(self, op=None, **more) -> Tensor:
        o, c = self.operands, self.case
        op = op or lam_kernels.score_masked_attention
        return op(
            o.query, o.key, o.value, self.weights, self.biases, fusion=c.fusion, heads=c.heads,
            key_mask=o.key_mask, scale=c.problem.scale, **more,
        )  # fmt: skip

    def with_gradients(self, out: Tensor) -> dict[str, Tensor]:
        found, leaves = {"out": out.detach()}, self.leaves
        if leaves:
            grads = torch.autograd.grad(
                out, list(leaves.values()), self.operands.grad_out.to(out.dtype),
                allow_unused=True, materialize_grads=True,
            )  # fmt: skip
            found |= dict(zip(leaves, grads, strict=True))
        return found

    def formulas(self, stored) -> dict[str, Tensor]:
        """Results and wanted gradients from the specification's written-out formulas."""
        c, o, p = self.case, self.operands, self.case.problem
        pairs = zip(self.weights, self.biases, strict=True)
        parameters = torch.cat([t.detach().reshape(-1) for pair in pairs for t in pair])
        scale = p.D**-0.5 if p.scale is None else p.scale
        settings = (c.widths, scale, c.fusion == "mul", c.heads == "mean")
        shared = (o.query.detach(), o.key.detach(), o.value.detach(), parameters, o.key_mask)
        found = {"out": reference.score_masked_attention_fwd(*shared, *settings)}
        *grads, network = reference.score_masked_attention_bwd(
            o.grad_out, *shared, *settings, [True] * 4, stored
        )
        found |= dict(zip(("query", "key", "value"), grads, strict=True))
        for layer, (weight, bias) in enumerate(reference.unpack(network, c.widths)):
            found |= {f"weight {layer}": weight, f"bias {layer}": bias}
        return {name: found[name] for name in ("out", *self.leaves)}


@lru_cache(maxsize=512)
@one_thread
def expected_of(case: Case) -> dict[str, Tensor]:
    drawn = Drawn(case).double()
    return drawn.with_gradients(drawn.call(reference.score_masked_attention))


@lru_cache(maxsize=512)
@one_thread
def same_dtype_of(case: Case) -> dict[str, Tensor]:
    drawn = Drawn(case)
    return drawn.with_gradients(drawn.call(reference.score_masked_attention, upcast=False))


@lru_cache(maxsize=512)
@one_thread
def floors_of(case: Case):
    drawn = Drawn(case).double()
    o = drawn.operands
    inputs = [o.query, o.key, o.value, o.grad_out, *drawn.weights, *drawn.biases]
    dtype = getattr(torch, case.problem.dtype)
    return rounding_floors(drawn.formulas, inputs, dtype, case.problem.seed)


def evaluate(case: Case, backend: str | None, drawn: Drawn | None = None) -> dict[str, Tensor]:
    """The result and the wanted gradients from the public op."""
    drawn = drawn or Drawn(case)
    run = one_thread(drawn.call) if backend == "reference" else drawn.call
    return drawn.with_gradients(run(backend=backend))


def assert_accurate(result: dict[str, Tensor], case: Case) -> None:
    expected, same, floors = expected_of(case), same_dtype_of(case), floors_of(case)
    lines = []
    if set(result) != set(expected):
        lines.append(f"outputs {sorted(result)}, expected {sorted(expected)}")
    compute = getattr(torch, case.problem.dtype)
    for name in result.keys() & expected.keys():
        factor = FACTOR if name == "out" else GRADIENT_FACTOR
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
    if why_not:
        assert_refused(why_not, lambda: evaluate(case, backend))
    else:
        assert_accurate(evaluate(case, backend), case)


def limits(case: Case, backend: str | None) -> tuple[str, ...]:
    """Why the backend does not serve a case, () when it does."""
    if backend in (None, "cpu", "reference"):  # they serve everything
        return ()

    def explained(*arguments, **keywords):
        return lam_kernels.explain("score_masked_attention", *arguments, **keywords)

    return Drawn(case).call(explained, backend=backend).reasons[backend]


def random_case(seed: int, dtype: str | None = None) -> Case:
    """Case number `seed` of an endless list."""
    draw = random.Random(f"score {seed}")
    p = random_problem(seed, dtype)
    Lk = draw.choice((1, 3, 7, 16, 31, 32, 33, 64, 75, 100, 128))
    changes = {"B": min(p.B, 2), "H": min(p.H, 3), "Lq": min(p.Lq, 130), "Lk": Lk}
    changes |= {"Hkv": changes["H"], "multiplier": None, "bias": None, "gate": False}
    changes |= {"pattern": None, "attn_mask": None, "dropout_p": 0.0, "lse_grad": False}
    changes |= {"fill": "dead" if draw.random() < 0.2 else "", "spread": 1.0}
    return Case(
        p.but(**changes), draw.choice((1, 2, 3, 5, 9)), draw.choice((1, 5, 16, 32, 40, 100)),
        draw.choice(("mul", "add")), draw.choice(("each", "mean")),
    )  # fmt: skip
