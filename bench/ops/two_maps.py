"""What the bench pages of global_local_attention and map_gated_attention share: operands of a
Problem of python_ref.inputs, FLOPs by counted pairs, and plain PyTorch's two maps.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import lru_cache
from math import prod

import torch
import torch.nn.functional as F
from torch import Tensor

from lam_kernels.patterns import encode, specs, visible_pairs
from python_ref.inputs import Operands, Problem, draw_pattern, mask_shape


@dataclass
class TwoMaps:
    """Operands of a call; `gates` is empty for global_local_attention."""

    problem: Problem
    tensors: tuple[Tensor, ...]  # query, key, value
    gates: tuple[Tensor, ...]
    pattern: object
    key_mask: Tensor | None
    grads: tuple[Tensor, ...]  # of each result
    masks: dict = field(default_factory=dict)  # multiplier, bias

    @property
    def scale(self) -> float:
        return self.problem.D**-0.5 if self.problem.scale is None else self.problem.scale

    @property
    def options(self) -> dict:
        return {"key_mask": self.key_mask, "scale": self.scale}


def draw(problem: Problem, device: str, results: int, gated: bool) -> TwoMaps:
    generator = torch.Generator().manual_seed(problem.seed)
    o: Operands = problem.but(pattern=None).operands(booleans=False)
    dtype = getattr(torch, problem.dtype)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    gates = ()
    if gated:  # learned weights stay in float32 under autocast
        gates = tuple(drawn(problem.Lq, problem.Lq).to(device).requires_grad_() for _ in range(2))
    second = drawn(problem.B, problem.H, problem.Lq, problem.Dv).to(dtype)
    pattern = draw_pattern(problem, generator)

    def leaf(x: Tensor | None) -> Tensor | None:
        return x if x is None else x.detach().to(device).requires_grad_(x.requires_grad)

    key_mask = None if o.key_mask is None else o.key_mask.to(device)
    return TwoMaps(
        problem, tuple(leaf(x) for x in (o.query, o.key, o.value)), gates, pattern, key_mask,
        tuple(g.to(device) for g in (o.grad_out, second)[:results]),
        {"multiplier": leaf(o.multiplier), "bias": leaf(o.bias)},
    )  # fmt: skip


def seen(operands: TwoMaps) -> tuple[Tensor | None, Tensor | None]:
    """What the global and the local half may see, broadcasting to [B,H,Lq,Lk]; None: everything."""
    p, device = operands.problem, operands.tensors[0].device
    whole = None if operands.key_mask is None else operands.key_mask[:, None, None, :]
    patterns = operands.pattern if isinstance(operands.pattern, list) else [operands.pattern]
    near = [
        torch.ones(p.Lq, p.Lk, dtype=torch.bool, device=device)
        if one is None
        else one.dense(p.Lq, p.Lk, device=device)
        for one in patterns
    ]
    if any(one.dim() > 2 for one in near):
        raise ValueError("the bench draws no segments for this op")
    near = torch.stack(near)[None]
    return whole, near if whole is None else near & whole


def softmax(scores: Tensor, visible: Tensor | None) -> Tensor:
    if visible is not None:
        scores = scores.masked_fill(~visible, -torch.inf)
    return torch.softmax(scores, -1)


def sdpa(operands: TwoMaps, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, ...]:
    return tuple(
        F.scaled_dot_product_attention(query, key, value, visible, scale=operands.scale)
        for visible in seen(operands)
    )


@lru_cache(maxsize=64)
def pairs(problem: Problem) -> tuple[int, int]:
    """Visible pairs of the global and of the local half."""
    if problem.key_mask:
        return _counted_pairs(problem)
    whole = problem.B * problem.H * problem.Lq * problem.Lk
    flat, _ = encode(draw_pattern(problem, torch.Generator().manual_seed(0)), problem.H)
    found = [visible_pairs(spec, problem.Lq, problem.Lk) for spec in specs(flat)]
    if not found:
        return whole, whole
    return whole, problem.B * (sum(found) if len(found) > 1 else problem.H * found[0])


def _counted_pairs(problem: Problem) -> tuple[int, int]:
    operands = draw(problem, "cpu", 1, False)
    samples = operands.key_mask.sum(0)  # how many see each key
    operands.key_mask = None
    _, near = seen(operands)
    queries = near.expand(1, problem.H, -1, -1).sum((0, 1, 2))  # of all heads, near each key
    return problem.H * problem.Lq * int(samples.sum()), int((samples * queries).sum())


_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "float64": 8}


def operand_bytes(problem: Problem) -> tuple[int, int]:
    """Bytes of query, key and value, and of one result."""
    p, size = problem, _BYTES[problem.dtype] * problem.B * problem.H
    return size * ((p.Lq + p.Lk) * p.D + p.Lk * p.Dv), size * p.Lq * p.Dv


def mask_bytes(problem: Problem) -> tuple[int, int]:
    """Bytes of the masks' entries that the global half uses, and of the learned ones' gradients."""
    p, read, gradients = problem, problem.B * problem.Lk if problem.key_mask else 0, 0
    share = pairs(p)[0] / max(1, p.B * p.H * p.Lq * p.Lk)
    for letter, name in (("m", "multiplier"), ("b", "bias")):
        if axes := getattr(p, name):
            size = _BYTES[getattr(p, f"{name}_dtype") or p.dtype] * prod(mask_shape(p, axes))
            read += round(size * share) if axes.endswith("qk") else size
            gradients += size if letter in p.grads else 0
    return read, gradients


def label(problem: Problem) -> str:
    p = problem
    width = f"D{p.D}" + (f"/{p.Dv}" if p.Dv != p.D else "")
    text = (
        f"B{p.B} H{p.H} L{p.Lq}" + (f"x{p.Lk}" if p.Lk != p.Lq else "") + f" {width}, {p.pattern}"
    )
    return text + (", key padding" if p.key_mask else "")


def tiny(problem: Problem) -> Problem:
    return problem.but(B=1, Lq=64, Lk=64)


def score_size(problem: Problem) -> float:
    return max(1.0, problem.spread)
