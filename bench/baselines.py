"""The contenders: ours, and what one would use without it, as callables of the same operands.

A peer is a function operands -> call, and call(query, key, value, multiplier, bias) -> out. The
formulas of the local peers (which keys a block of queries looks at) are written so that autograd
and the compiler see plain batched matrix products; check.py compares all of them with python_ref
before they are timed.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from python_ref.inputs import Operands, Problem

Attention = Callable[..., Tensor]


@dataclass(frozen=True)
class Peer:
    """How to get a contender's call, and in what its problem differs from the case's."""

    what: str
    build: Callable[[Operands, str], Attention]  # the operands, and the name of our backend
    change: dict = field(default_factory=dict)  # fields of Problem
    threads: int | None = None
    compiled: bool = False
    checked: bool = True  # False: computes nothing that could be checked

    def problem(self, problem: Problem) -> Problem:
        return problem.but(**self.change) if self.change else problem


def _scale(operands: Operands) -> float:
    p = operands.problem
    return p.D**-0.5 if p.scale is None else p.scale


def ours(operands: Operands, backend: str) -> Attention:
    """lam_kernels.masked_attention on a named backend, which never falls back."""
    from lam_kernels import masked_attention

    pattern, scale = operands.pattern, operands.problem.scale

    def call(query, key, value, multiplier, bias):
        return masked_attention(
            query, key, value, multiplier=multiplier, bias=bias, pattern=pattern, scale=scale,
            backend=backend,
        )  # fmt: skip

    return call


def eager(operands: Operands, backend: str = "") -> Attention:
    """The formula as one writes it, the [B,H,Lq,Lk] scores in memory."""
    scale, hidden = _scale(operands), None
    if operands.pattern is not None:
        hidden = ~operands.pattern.dense(operands.problem.Lq, operands.problem.Lk)

    def call(query, key, value, multiplier, bias):
        scores = (query @ key.transpose(-1, -2)) * scale
        if multiplier is not None:
            scores = scores * multiplier
        if bias is not None:
            scores = scores + bias
        if hidden is not None:
            scores = scores.masked_fill(hidden, -math.inf)
        return torch.softmax(scores, -1) @ value

    return call


def sdpa_nomask(operands: Operands, backend: str = "") -> Attention:
    """PyTorch's fused attention without any mask: the price when nobody learns one."""
    scale = _scale(operands)
    return lambda query, key, value, multiplier, bias: F.scaled_dot_product_attention(
        query, key, value, scale=scale
    )


def _band(operands: Operands, rows: int) -> tuple[int, int, Tensor]:
    """(radius, query blocks, hidden [blocks, rows, rows + 2 radius]) of a Toeplitz pattern."""
    p, radius = operands.problem, operands.pattern.radius
    if p.Lq != p.Lk or p.Lq % rows or rows % radius:
        raise ValueError(
            f"blocks of {rows} need Lq = Lk, a multiple of it, and a radius dividing it"
        )
    count = p.Lq // rows
    i = torch.arange(p.Lq).view(count, rows, 1)
    j = (torch.arange(count) * rows - radius)[:, None, None] + torch.arange(rows + 2 * radius)
    return radius, count, ((i - j).abs() > radius) | (j < 0) | (j >= p.Lk)


def _windowed(
    operands: Operands, rows: int, windows: Callable[[Tensor, int, int, int], Tensor]
) -> Attention:
    """Blocks of `rows` queries against the rows + 2 radius keys around them.

    windows(x [B,h,L,d], radius, blocks, rows) -> [B,h,blocks,rows + 2 radius,d]
    """
    scale = _scale(operands)
    radius, blocks, hidden = _band(operands, rows)

    def call(query, key, value, multiplier, bias):
        B, H, L, D = query.shape
        scores = query.view(B, H, blocks, rows, D) @ windows(key, radius, blocks, rows).transpose(
            -1, -2
        )
        scores = scores * scale
        if bias is not None:  # [1,H,1,L]
            scores = scores + windows(bias.transpose(-1, -2), radius, blocks, rows).transpose(
                -1, -2
            )
        weights = torch.softmax(scores.masked_fill(hidden, -math.inf), -1)
        return (weights @ windows(value, radius, blocks, rows)).reshape(B, H, L, value.shape[-1])

    return call


def _by_shifted_blocks(x: Tensor, radius: int, blocks: int, rows: int) -> Tensor:
    B, h, _, d = x.shape
    step = rows // radius  # a query block is `step` key blocks of one radius
    padded = F.pad(x, (0, 0, radius, radius)).view(B, h, blocks * step + 2, radius, d)
    shifted = [padded[:, :, s : s + (blocks - 1) * step + 1 : step] for s in range(step + 2)]
    return torch.cat(shifted, dim=3)


def _by_unfold(x: Tensor, radius: int, blocks: int, rows: int) -> Tensor:
    padded = F.pad(x, (0, 0, radius, radius))
    return padded.unfold(2, rows + 2 * radius, rows).transpose(-1, -2)


def blocks(rows: int) -> Callable[[Operands, str], Attention]:
    return lambda operands, backend="": _windowed(operands, rows, _by_shifted_blocks)


def windows(rows: int) -> Callable[[Operands, str], Attention]:
    return lambda operands, backend="": _windowed(operands, rows, _by_unfold)


def reshaped(operands: Operands, backend: str = "") -> Attention:
    """Block-diagonal attention as a batch of small dense ones: two views and nothing copied."""
    scale, block = _scale(operands), operands.pattern.block

    def call(query, key, value, multiplier, bias):
        B, H, L, D = query.shape
        blocked = (B, H, L // block, block)
        scores = (query.view(*blocked, D) @ key.view(*blocked, D).transpose(-1, -2)) * scale
        if bias is not None:  # [1,H,1,L]
            scores = scores + bias.view(1, H, L // block, 1, block)
        return (torch.softmax(scores, -1) @ value.view(*blocked, -1)).view(B, H, L, -1)

    return call


def reshaped_sdpa(operands: Operands, backend: str = "") -> Attention:
    """The same batch through PyTorch's fused attention, which learns no bias."""
    if operands.bias is not None:
        raise ValueError("has no learned bias")
    scale, block = _scale(operands), operands.pattern.block

    def call(query, key, value, multiplier, bias):
        B, H, L = query.shape[:3]
        split = [t.view(B, H * (L // block), block, -1) for t in (query, key, value)]
        return F.scaled_dot_product_attention(*split, scale=scale).view(B, H, L, -1)

    return call


class _Plain(torch.autograd.Function):
    """What any autograd.Function of these operands costs: allocate results, save operands."""

    @staticmethod
    def forward(ctx, query, key, value, multiplier):
        ctx.save_for_backward(query, key, value, multiplier)
        return torch.empty_like(query)

    @staticmethod
    def backward(ctx, grad_out):
        return tuple(torch.empty_like(t) for t in ctx.saved_tensors)


def plain_function(operands: Operands, backend: str = "") -> Attention:
    return lambda query, key, value, multiplier, bias: _Plain.apply(query, key, value, multiplier)


def compiled(build: Callable[..., Attention]) -> Callable[[Operands, str], Attention]:
    """torch.compile of a peer, one graph, static shapes."""
    return lambda operands, backend="": torch.compile(
        build(operands, backend), dynamic=False, fullgraph=True
    )


def _with_compiled(name: str, what: str, build, **rest) -> dict[str, Peer]:
    return {
        name: Peer(what, build, **rest),
        f"{name}_compile": Peer(f"torch.compile of {name}", compiled(build), compiled=True, **rest),
    }


_NO_MASK = {"multiplier": None, "bias": None, "pattern": None}

PEERS: dict[str, Peer] = {
    "ours": Peer("lam_kernels.masked_attention", ours),
    "eager": Peer("the formula in plain PyTorch", eager),
    "compile": Peer("torch.compile of eager", compiled(eager), compiled=True),
    "sdpa_nomask": Peer("scaled_dot_product_attention without any mask", sdpa_nomask, _NO_MASK),
    **_with_compiled("blocks64", "64 queries x 192 keys, key blocks side by side", blocks(64)),
    **_with_compiled("blocks128", "128 queries x 256 keys, the same", blocks(128)),
    **_with_compiled("windows64", "64 queries x 192 keys, unfolded windows", windows(64)),
    **_with_compiled("reshaped", "block-diagonal as a batch of small dense problems", reshaped),
    "reshaped_sdpa": Peer("the same batch through scaled_dot_product_attention", reshaped_sdpa),
    "ours_d32": Peer("ours with D 32", ours, {"D": 32}),
    "ours_1thread": Peer("ours with one thread", ours, threads=1),
    "plain_function": Peer("a Function that only allocates", plain_function, checked=False),
}  # fmt: skip


@dataclass
class Contender:
    """A peer on one case: `run()` is the timed call, `result()` names what it returned."""

    name: str
    peer: Peer
    operands: Operands
    run: Callable[[], tuple[Tensor, ...]]
    outputs: tuple[str, ...]

    def result(self) -> dict[str, Tensor]:
        return dict(zip(self.outputs, self.run(), strict=True))


def contender(name: str, problem: Problem, direction: str, backend: str, draw) -> Contender:
    """One contender. `draw` turns a problem into operands, and may give several peers the same."""
    peer = PEERS[name]
    operands = draw(peer.problem(problem))
    call = peer.build(operands, backend)
    given = (operands.query, operands.key, operands.value, operands.multiplier, operands.bias)
    leaves, grad_out = operands.leaves, operands.grad_out
    wanted = tuple(leaves.values())

    def forward():
        with torch.no_grad():
            return (call(*given),)

    def forward_with_gradients_on():
        return (call(*given),)

    def both():
        out = call(*given)
        return out.detach(), *torch.autograd.grad(out, wanted, grad_out)

    runs = {
        "fwd": (forward, ("out",)),
        "call": (forward_with_gradients_on, ("out",)),
        "both": (both, ("out", *leaves)),
    }
    run, outputs = runs[direction]
    return Contender(name, peer, operands, run, outputs)
