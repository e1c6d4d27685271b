"""global_local_attention for the bench: operands, reference, peers, FLOPs and bytes.

FLOPs of visible pairs, a multiply and an add being 2: forward S (2 D) and P V (2 Dv) of each half;
backward S, dQ, dK (2 D each) of the global half, dP and dV (2 Dv each) of both.
"""

from __future__ import annotations

import torch
from torch import Tensor

import lam_kernels
from bench.check import Expected
from bench.contender import Peer, with_compiled
from python_ref.global_local_attention import global_local_attention as reference
from python_ref.inputs import Problem

from . import two_maps
from .two_maps import TwoMaps, label, score_size, tiny

__all__ = ["Problem", "label", "score_size", "tiny"]

OUTPUTS = ("global_out", "local_out")
EXAMPLE = {"B": 4, "H": 8, "Lq": 300, "Lk": 300, "D": 128, "pattern": "Toeplitz(15)"}


def draw(problem: Problem, device: str = "cpu") -> TwoMaps:
    return two_maps.draw(problem, device, 2, False)


def arguments(operands: TwoMaps) -> tuple[Tensor | None, ...]:
    return *operands.tensors, *operands.masks.values()


def leaves(operands: TwoMaps) -> dict[str, Tensor]:
    names = ("query", "key", "value", "multiplier", "bias")
    given = zip(names, arguments(operands), strict=True)
    return {name: x for name, x in given if x is not None and x.requires_grad}


def grad_outs(operands: TwoMaps) -> tuple[Tensor, ...]:
    return operands.grads


def expected(problem: Problem, device: str = "cpu") -> list[Expected]:
    return _expected_of(draw(problem, device))


def expected_of_global(problem: Problem, device: str) -> list[Expected]:
    """Of one_call, whose second result is the first one again and gives no gradient."""
    operands = draw(problem, device)
    operands.grads = (operands.grads[0], torch.zeros_like(operands.grads[1]))
    whole, _, *gradients = _expected_of(operands)
    return [whole, Expected("local_out", whole.index, whole.values), *gradients]


def _expected_of(operands: TwoMaps) -> list[Expected]:
    wide = [None if x is None else x.detach().double() for x in arguments(operands)]
    names = leaves(operands)
    for name, x in zip(("query", "key", "value", "multiplier", "bias"), wide, strict=True):
        if x is not None:
            x.requires_grad_(name in names)
    query, key, value, multiplier, bias = wide
    outs = reference(
        query, key, value, operands.pattern, multiplier=multiplier, bias=bias, **operands.options
    )
    grads = torch.autograd.grad(
        outs, [x for x in wide if x is not None and x.requires_grad],
        [g.double() for g in operands.grads],
    )  # fmt: skip
    found = dict(zip(OUTPUTS, outs, strict=True)) | dict(zip(names, grads, strict=True))
    return [Expected(name, (slice(None),), x.detach()) for name, x in found.items()]


def flops(problem: Problem, direction: str) -> int:
    whole, near = two_maps.pairs(problem)
    D, Dv = problem.D, problem.Dv
    forward = whole * 2 * (D + Dv) + near * 2 * Dv
    backward = whole * (6 * D + 4 * Dv) + near * 4 * Dv
    return {"bwd": backward, "both": forward + backward}.get(direction, forward)


def least_bytes(problem: Problem, direction: str) -> int:
    operands, out = two_maps.operand_bytes(problem)
    masks, gradients = two_maps.mask_bytes(problem)
    forward, backward = operands + masks + 2 * out, 2 * operands + masks + gradients + 4 * out
    return {"bwd": backward, "both": forward + backward}.get(direction, forward)


# ---- peers


def ours(operands: TwoMaps, backend: str):
    def call(query, key, value, multiplier, bias):
        return lam_kernels.global_local_attention(
            query, key, value, operands.pattern, multiplier=multiplier, bias=bias,
            backend=backend or None, **operands.options,
        )  # fmt: skip

    return call


def two_calls(operands: TwoMaps, backend: str = ""):
    """masked_attention without and with the pattern."""

    def call(query, key, value, multiplier, bias):
        options = {"multiplier": multiplier, "bias": bias, **operands.options}
        return tuple(
            lam_kernels.masked_attention(query, key, value, pattern=pattern, **options)
            for pattern in (None, operands.pattern)
        )

    return call


def one_call(operands: TwoMaps, backend: str = ""):
    """The global half alone: what the local half costs on top is the rest."""

    def call(query, key, value, multiplier, bias):
        options = {"multiplier": multiplier, "bias": bias, **operands.options}
        out = lam_kernels.masked_attention(query, key, value, **options)
        return out, out.detach().requires_grad_()

    return call


def eager(operands: TwoMaps, backend: str = ""):
    whole, near = two_maps.seen(operands)

    def call(query, key, value, multiplier, bias):
        scores = query @ key.transpose(-1, -2) * operands.scale
        if multiplier is not None:
            scores = scores * multiplier
        if bias is not None:
            scores = scores + bias
        return two_maps.softmax(scores, whole) @ value, two_maps.softmax(scores, near) @ value

    return call


def sdpa(operands: TwoMaps, backend: str = ""):
    if any(mask is not None for mask in operands.masks.values()):
        raise ValueError("scaled_dot_product_attention is compared without learned masks")

    def call(query, key, value, multiplier, bias):
        return two_maps.sdpa(operands, query, key, value)

    return call


PEERS = {
    "ours": Peer("lam_kernels.global_local_attention", ours),
    **with_compiled("eager", "one Q K^T, two masked softmaxes, scores in memory", eager),
    **with_compiled("sdpa", "two calls of scaled_dot_product_attention", sdpa),
    "ours_two_calls": Peer("two calls of our masked_attention", two_calls),
    "ours_global": Peer(
        "one call of our masked_attention", one_call, differs="no local half",
        expected=expected_of_global, counted=False,
    ),
}  # fmt: skip


def usual_peers(problem: Problem, device: str, direction: str) -> tuple[str, ...]:
    peers = ("eager_compile", "sdpa_compile", "ours_two_calls")
    return peers if direction == "fwd" else (*peers, "ours_global")
