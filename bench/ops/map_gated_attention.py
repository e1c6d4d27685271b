"""map_gated_attention for the bench: operands, reference, peers, FLOPs and bytes.

FLOPs, a multiply and an add being 2, T the length: forward S and A V (2 D and 2 Dv a pair), each
map times its gate (2 T a pair of the map); backward S, dQ, dK, dA, dV, and for each map the logit
again, the gradient of the map and that of its gate (2 T each).
"""

from __future__ import annotations

import torch
from torch import Tensor

import lam_kernels
from bench.check import Expected
from bench.contender import Peer, with_compiled
from python_ref.inputs import Problem
from python_ref.map_gated_attention import map_gated_attention as reference

from . import two_maps
from .two_maps import TwoMaps, label, score_size, tiny

__all__ = ["Problem", "label", "score_size", "tiny"]

OUTPUTS = ("out",)
EXAMPLE = {"B": 4, "H": 8, "Lq": 300, "Lk": 300, "D": 128, "pattern": "Toeplitz(15)"}
_NAMES = ("query", "key", "value", "gate_global", "gate_local")


def draw(problem: Problem, device: str = "cpu") -> TwoMaps:
    return two_maps.draw(problem, device, 1, True)


def arguments(operands: TwoMaps) -> tuple[Tensor, ...]:
    return *operands.tensors, *operands.gates


def leaves(operands: TwoMaps) -> dict[str, Tensor]:
    given = zip(_NAMES, arguments(operands), strict=True)
    return {name: x for name, x in given if x.requires_grad}


def grad_outs(operands: TwoMaps) -> tuple[Tensor, ...]:
    return operands.grads


def expected(problem: Problem, device: str = "cpu") -> list[Expected]:
    operands = draw(problem, device)
    wide = [x.detach().double().requires_grad_(x.requires_grad) for x in arguments(operands)]
    out = reference(*wide, operands.pattern, **operands.options)
    wanted = [x for x in wide if x.requires_grad]
    grads = torch.autograd.grad(out, wanted, operands.grads[0].double())
    found = {"out": out} | dict(zip(leaves(operands), grads, strict=True))
    return [Expected(name, (slice(None),), x.detach()) for name, x in found.items()]


def flops(problem: Problem, direction: str) -> int:
    whole, near = two_maps.pairs(problem)
    D, Dv, T = problem.D, problem.Dv, problem.Lq
    forward = whole * 2 * (D + Dv) + (whole + near) * 2 * T
    backward = whole * (6 * D + 4 * Dv) + (whole + near) * 6 * T
    return {"bwd": backward, "both": forward + backward}.get(direction, forward)


def least_bytes(problem: Problem, direction: str) -> int:
    operands, out = two_maps.operand_bytes(problem)
    operands += 2 * 4 * problem.Lq**2  # the gates
    keys = two_maps.mask_bytes(problem)[0]
    forward, backward = operands + keys + out, 2 * operands + keys + out
    return {"bwd": backward, "both": forward + backward}.get(direction, forward)


# ---- peers


def ours(operands: TwoMaps, backend: str):
    def call(query, key, value, gate_global, gate_local):
        return lam_kernels.map_gated_attention(
            query, key, value, gate_global, gate_local, operands.pattern, backend=backend or None,
            **operands.options,
        )  # fmt: skip

    return call


def eager(operands: TwoMaps, backend: str = ""):
    whole, near = two_maps.seen(operands)

    def call(query, key, value, gate_global, gate_local):
        scores = query @ key.transpose(-1, -2) * operands.scale
        both, local = two_maps.softmax(scores, whole), two_maps.softmax(scores, near)
        dtype = both.dtype
        gate = torch.sigmoid(both @ gate_global.to(dtype) - local @ gate_local.to(dtype))
        return (gate * both + (1 - gate) * local) @ value

    return call


PEERS = {
    "ours": Peer("lam_kernels.map_gated_attention", ours),
    **with_compiled("eager", "the formula, every map in memory", eager),
}


def usual_peers(problem: Problem, device: str, direction: str) -> tuple[str, ...]:
    return ("eager_compile", "eager")
