"""score_masked_attention for the bench: operands, reference, FLOPs, bytes and peers.

FLOPs: the matrix products of visible pairs and of the network's rows; the backward pass is charged
with one product a gradient and one recomputation of the scores, the network's with none: that a
kernel computes activations again is its own affair.
"""

from __future__ import annotations

import ast
import dataclasses
import math
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise

import torch
from torch import Tensor

from bench.check import EPS_FACTOR, Expected
from bench.contender import Peer, compiled
from python_ref.score_masked_attention import score_masked_attention as reference_attention

OUTPUTS = ("out",)
EXAMPLE = {"B": 32, "H": 8, "Lq": 75, "Lk": 32, "D": 32}
_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "float64": 8}


@dataclass(frozen=True)
class Problem:
    """One call as plain data; everything is drawn from the seed."""

    B: int = 2
    H: int = 2
    Lq: int = 33
    Lk: int = 32
    D: int = 16
    depth: int = 4
    hidden: int = 32
    fusion: str = "mul"
    heads: str = "each"
    key_mask: bool = False
    dtype: str = "float32"
    seed: int = 0

    def but(self, **changes) -> Problem:
        return dataclasses.replace(self, **changes)

    @classmethod
    def parse(cls, text: str) -> Problem:
        call = ast.parse(text.strip(), mode="eval").body
        return cls(**{k.arg: ast.literal_eval(k.value) for k in call.keywords})

    @property
    def widths(self) -> list[int]:
        return [self.Lk, *[self.hidden] * (self.depth - 1), self.Lk]


@dataclass
class Operands:
    problem: Problem
    query: Tensor
    key: Tensor
    value: Tensor
    weights: list[Tensor]
    biases: list[Tensor]
    key_mask: Tensor | None
    grad_out: Tensor

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return (self.query, self.key, self.value, *self.weights, *self.biases)


def draw(problem: Problem, device: str = "cpu") -> Operands:
    p, generator = problem, torch.Generator().manual_seed(problem.seed)
    dtype = getattr(torch, p.dtype)

    def normal(*shape: int, size: float = 1.0) -> Tensor:
        drawn = size * torch.randn(shape, generator=generator)
        return drawn.to(device, dtype).requires_grad_()

    query, key, value = (normal(p.B, p.H, n, p.D) for n in (p.Lq, p.Lk, p.Lk))
    layers = list(pairwise(p.widths))
    weights = [normal(a, b, size=math.sqrt(2 / a)) for a, b in layers]
    biases = [normal(b, size=0.1) for _, b in layers]
    key_mask = None
    if p.key_mask:  # at least a quarter of the keys
        lengths = torch.randint(-(-p.Lk // 4), p.Lk + 1, (p.B, 1), generator=generator)
        key_mask = (torch.arange(p.Lk)[None] < lengths).to(device)
    grad_out = normal(p.B, p.H, p.Lq, p.D).detach()
    return Operands(p, query, key, value, weights, biases, key_mask, grad_out)


def arguments(operands: Operands) -> tuple[Tensor, ...]:
    return operands.tensors


def leaves(operands: Operands) -> dict[str, Tensor]:
    n = operands.problem.depth
    names = ["query", "key", "value", *(f"weight {k}" for k in range(n))]
    return dict(zip([*names, *(f"bias {k}" for k in range(n))], operands.tensors, strict=True))


def grad_outs(operands: Operands) -> tuple[Tensor]:
    return (operands.grad_out,)


def expected(problem: Problem, device: str = "cpu") -> list[Expected]:
    """Where a sum is within rounding of 0, its ReLU is open in one number type and shut in another:
    so a gradient's bound is, where that is more, four times the error that python_ref makes in the
    problem's number type."""
    operands, dtype = draw(problem, device), getattr(torch, problem.dtype)
    wide, same = _reference(operands, torch.float64), _reference(operands, dtype)
    usual = EPS_FACTOR[dtype] * torch.finfo(dtype).eps * score_size(problem)
    found = []
    for name, values in wide.items():
        error = ((same[name].double() - values).norm() / values.norm()).item()
        size = 1.0 if name in OUTPUTS else max(1.0, 4 * error / usual)
        found.append(Expected(name, (), values, size))
    return found


def _reference(operands: Operands, dtype: torch.dtype) -> dict[str, Tensor]:
    o, p, n = operands, operands.problem, operands.problem.depth
    cast = [t.detach().to(dtype).requires_grad_() for t in o.tensors]
    out = reference_attention(
        *cast[:3], cast[3 : 3 + n], cast[3 + n :], fusion=p.fusion, heads=p.heads,
        key_mask=o.key_mask,
    )  # fmt: skip
    grads = torch.autograd.grad(out, cast, o.grad_out.to(dtype))
    return {"out": out.detach()} | dict(zip(leaves(o), grads, strict=True))


def score_size(problem: Problem) -> float:
    """An error of a score passes through every layer of the network."""
    return math.sqrt(problem.depth)


def flops(problem: Problem, direction: str) -> int:
    p = problem
    pairs = p.H * p.Lq * _visible_keys(p)
    network = p.B * (1 if p.heads == "mean" else p.H) * p.Lq
    network *= sum(a * b for a, b in pairwise(p.widths))
    forward, backward = 2 * (pairs * 2 * p.D + network), 2 * (pairs * 5 * p.D + 2 * network)
    whole = {"fwd": forward, "call": forward, "bwd": backward}
    return whole.get(direction, forward + backward)


def least_bytes(problem: Problem, direction: str) -> int:
    p = problem
    rows, keys = p.B * p.H * p.Lq * p.D, p.B * p.H * p.Lk * p.D
    network = sum((a + 1) * b for a, b in pairwise(p.widths))
    operands = rows + 2 * keys + network
    mask = p.B * p.Lk if p.key_mask else 0
    forward = _BYTES[p.dtype] * (operands + rows) + mask
    backward = _BYTES[p.dtype] * (2 * operands + rows) + mask
    whole = {"fwd": forward, "call": forward, "bwd": backward}
    return whole.get(direction, forward + backward)


@lru_cache(maxsize=64)
def _visible_keys(problem: Problem) -> int:
    """Over all samples."""
    return int(draw(problem).key_mask.sum()) if problem.key_mask else problem.B * problem.Lk


def label(problem: Problem) -> str:
    p = problem
    text = f"B{p.B} H{p.H} L{p.Lq}x{p.Lk} D{p.D}, depth {p.depth}, hidden {p.hidden}, {p.fusion}"
    return f"{text}, {p.heads}" + (", key padding" if p.key_mask else "")


def tiny(problem: Problem) -> Problem:
    return problem.but(B=1, H=2, Lq=16)


# ---- contenders


def ours(operands: Operands, backend: str):
    """lam_kernels.score_masked_attention on a named backend, which never falls back."""
    from lam_kernels import score_masked_attention

    p, key_mask, n = operands.problem, operands.key_mask, operands.problem.depth

    def call(query, key, value, *network):
        return score_masked_attention(
            query, key, value, network[:n], network[n:], fusion=p.fusion, heads=p.heads,
            key_mask=key_mask, backend=backend,
        )  # fmt: skip

    return call


def eager(operands: Operands, backend: str = ""):
    """The formula as one writes it; the mask and every activation in memory."""
    p, n, scale = operands.problem, operands.problem.depth, operands.problem.D**-0.5
    hidden = None if operands.key_mask is None else ~operands.key_mask[:, None, None, :]

    def call(query, key, value, *network):
        scores = (query @ key.transpose(-1, -2)) * scale
        x = scores.mean(1, keepdim=True) if p.heads == "mean" else scores
        x = x if hidden is None else x.masked_fill(hidden, 0.0)
        for layer in range(n):
            x = (torch.relu(x) if layer else x) @ network[layer] + network[n + layer]
        fused = scores * x if p.fusion == "mul" else scores + x
        fused = fused if hidden is None else fused.masked_fill(hidden, -math.inf)
        return torch.softmax(fused, -1) @ value

    return call


PEERS = {
    "ours": Peer("lam_kernels.score_masked_attention", ours),
    "eager": Peer("the formula in plain PyTorch", eager),
    "compile": Peer("torch.compile of eager", compiled(eager), compiled=True),
}


def usual_peers(problem: Problem, device: str, direction: str) -> tuple[str, ...]:
    return ("compile", "eager")
