"""Attention with a gate on each pair of a global and a local map (GateAtt): the specification.

Shapes: query, key [B,H,T,D], value [B,H,T,Dv], gates [T,T], shared by batch and heads. x stands for
g (global: the key mask hides) or l (local: the pattern hides as well).

Forward
    S   = scale * Q K^T;   A^x = softmax_j(S where visible^x, else -inf)     no key: A^x = 0
    U   = A^g W^g - A^l W^l;   R = sigmoid(U)
    A   = R * A^g + (1 - R) * A^l
    A'  = A, or with renormalise A / n where n = rowsum(A), and 0 in a row of zeros
    O   = A' V

Backward, with dO the gradient of the result
    dA' = dO V^T;   dA = dA', or with renormalise (dA' - rowsum(dA' * A')) / n
    dU  = dA (A^g - A^l) R (1 - R)
    dA^g = dA R + dU W^g^T;   dA^l = dA (1 - R) - dU W^l^T
    dW^g = sum_bh A^g^T dU;   dW^l = - sum_bh A^l^T dU
    dS  = sum over x of A^x (dA^x - rowsum(A^x * dA^x))
    dV = A'^T dO;   dQ = scale * dS K;   dK = scale * dS^T Q

Without renormalise a row of A sums to 1 only where both maps agree, as in the paper.

Source: GMSA (arXiv 2110.13992), its GateAtt. The softmax over the pair of gates is one sigmoid of
their difference.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lam_kernels.patterns import Pattern, encode

from .patterns import visible as pattern_visible
from .softmax import dtype_of_sums, no_autocast, softmax_where


def map_gated_attention(
    query: Tensor,  # [B, H, T, D]
    key: Tensor,  # [B, H, T, D]
    value: Tensor,  # [B, H, T, Dv]
    gate_global: Tensor,  # [T, T]
    gate_local: Tensor,  # [T, T]
    pattern: Pattern | Sequence[Pattern | None] | None,
    *,
    renormalise: bool = False,
    key_mask: Tensor | None = None,  # bool [B, T]
    scale: float | None = None,
    upcast: bool = True,
) -> Tensor:  # [B, H, T, Dv]
    """The formulas above in plain torch operations, differentiable as often as wanted.

    upcast=True sums in fp32 for fp16, bf16 and fp32 input (fp64 for fp64). upcast=False rounds
    after every operation to the storage dtype.
    """
    flat, segment_ids = encode(pattern, query.shape[1])
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    with no_autocast(query):
        total = dtype_of_sums(query.dtype, upcast)
        *_, mixed = _maps(
            query, key, gate_global, gate_local, key_mask, segment_ids, flat, scale, renormalise,
            total,
        )  # fmt: skip
        return (mixed @ value.to(total)).to(query.dtype).contiguous()


def map_gated_attention_fwd(
    query, key, value, gate_global, gate_local, key_mask, segment_ids, pattern, scale, renormalise
) -> Tensor:
    """The op's forward with the op's own arguments."""
    with no_autocast(query):
        total = dtype_of_sums(query.dtype, True)
        *_, mixed = _maps(
            query, key, gate_global, gate_local, key_mask, segment_ids, pattern, scale,
            renormalise, total,
        )  # fmt: skip
        return (mixed @ value.to(total)).to(query.dtype).contiguous()


def map_gated_attention_bwd(
    grad_out, query, key, value, gate_global, gate_local, key_mask, segment_ids,
    pattern, scale, renormalise, needs,
) -> tuple[Tensor, ...]:  # fmt: skip
    """The backward formulas, written out; a gradient that `needs` does not ask for is empty."""
    with no_autocast(query):
        total = dtype_of_sums(query.dtype, True)
        maps, gate, sums, mixed = _maps(
            query, key, gate_global, gate_local, key_mask, segment_ids, pattern, scale,
            renormalise, total,
        )  # fmt: skip
        grad_out = grad_out.to(total)
        grad_mixed = grad_out @ value.to(total).transpose(-1, -2)
        grad_value = mixed.transpose(-1, -2) @ grad_out
        if renormalise:
            along = (grad_mixed * mixed).sum(-1, keepdim=True)
            grad_mixed = (grad_mixed - along) / sums
        whole, near = maps
        grad_logit = grad_mixed * (whole - near) * gate * (1 - gate)
        grad_whole = grad_mixed * gate + grad_logit @ gate_global.to(total).mT
        grad_near = grad_mixed * (1 - gate) - grad_logit @ gate_local.to(total).mT
        grad_scores = whole * (grad_whole - (whole * grad_whole).sum(-1, keepdim=True))
        grad_scores = grad_scores + near * (grad_near - (near * grad_near).sum(-1, keepdim=True))
        found = (
            (query, lambda: scale * (grad_scores @ key.to(total))),
            (key, lambda: scale * (grad_scores.mT @ query.to(total))),
            (value, lambda: grad_value),
            (gate_global, lambda: (whole.mT @ grad_logit).sum((0, 1))),
            (gate_local, lambda: -(near.mT @ grad_logit).sum((0, 1))),
        )
        return tuple(
            grad().to(operand.dtype).contiguous() if wanted else operand.new_empty(0)
            for wanted, (operand, grad) in zip(needs, found, strict=True)
        )


def _maps(
    query, key, gate_global, gate_local, key_mask, segment_ids, pattern, scale, renormalise, total
) -> tuple[tuple[Tensor, Tensor], Tensor, Tensor | None, Tensor]:
    """(A^g, A^l), R, n where it divides, A'."""
    query, key = query.to(total), key.to(total)
    scores = scale * (query @ key.transpose(-1, -2))
    everywhere = torch.ones_like(scores, dtype=torch.bool)
    if key_mask is not None:
        everywhere = everywhere & key_mask[:, None, None, :]
    local = everywhere & pattern_visible(
        pattern, segment_ids, query.shape[2], key.shape[2], query.device
    )
    whole, near = softmax_where(scores, everywhere)[0], softmax_where(scores, local)[0]
    gate = torch.sigmoid(whole @ gate_global.to(total) - near @ gate_local.to(total))
    mixed = gate * whole + (1 - gate) * near
    if not renormalise:
        return (whole, near), gate, None, mixed
    sums = mixed.sum(-1, keepdim=True)
    sums = torch.where(everywhere.any(-1, keepdim=True), sums, 1.0)
    return (whole, near), gate, sums, mixed / sums
