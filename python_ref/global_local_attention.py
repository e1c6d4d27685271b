"""Global and local attention from one Q K^T: the specification.

Shapes: query [B,H,Lq,D], key [B,H,Lk,D], value [B,H,Lk,Dv]. Multiplier M and bias A have each axis
of [B,H,Lq,Lk] full or 1. x stands for g (global: key mask and a bias of -inf hide) or l (local: the
pattern hides as well).

Forward
    S   = scale * Q K^T;   F = S * M + A
    P^x = softmax_j(F where visible^x, else -inf)      a row that sees no key: P^x = 0
    O^x = P^x V;   lse^x of the same softmax

Backward, with dO^x the gradients of both results
    dZ^x = P^x (dO^x V^T - rowsum(dO^x * O^x))         0 where hidden
    dZ   = dZ^g + dZ^l;   dS = dZ M
    dQ = scale * dS K;   dK = scale * dS^T Q;   dV = P^g^T dO^g + P^l^T dO^l
    dM = dZ S;   dA = dZ                               summed over the broadcast axes
S is formed once for both maps, and one dS gives dQ and dK. A hidden pair's M and A are never used.

Source: GMSA (arXiv 2110.13992), the core of its GateOp. Its masks of -inf are meant to hide: they
do so here before the softmax, not by multiplication with a score.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lam_kernels.patterns import Pattern, encode

from .patterns import visible as pattern_visible
from .softmax import dtype_of_sums, no_autocast, softmax_where, sum_to


class _Scores(NamedTuple):
    query: Tensor  # in the dtype of the sums, as key and value
    key: Tensor
    value: Tensor
    scores: Tensor  # S
    fused: Tensor  # F
    visible: tuple[Tensor, Tensor]  # global, local
    multiplier: Tensor | None  # 1 where not visible


def global_local_attention(
    query: Tensor,  # [B, H, Lq, D]
    key: Tensor,  # [B, H, Lk, D]
    value: Tensor,  # [B, H, Lk, Dv]
    pattern: Pattern | Sequence[Pattern | None] | None,
    *,
    multiplier: Tensor | None = None,  # [B|1, H|1, Lq|1, Lk|1] or [Lq|1, Lk|1]
    bias: Tensor | None = None,  # the same
    key_mask: Tensor | None = None,  # bool [B, Lk]
    scale: float | None = None,
    upcast: bool = True,
) -> tuple[Tensor, Tensor]:  # global_out, local_out [B, H, Lq, Dv]
    """The formulas above in plain torch operations, differentiable as often as wanted.

    upcast=True sums in fp32 for fp16, bf16 and fp32 input (fp64 for fp64). upcast=False rounds
    after every operation to the storage dtype.
    """
    flat, segment_ids = encode(pattern, query.shape[1])
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    with no_autocast(query):
        return _forward(
            query, key, value, multiplier, bias, key_mask, segment_ids, flat, scale, upcast
        )[:2]


def global_local_attention_fwd(
    query, key, value, multiplier, bias, key_mask, segment_ids, pattern, scale
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The op's forward with the op's own arguments: both results and the lse of both maps."""
    with no_autocast(query):
        return _forward(
            query, key, value, multiplier, bias, key_mask, segment_ids, pattern, scale, True
        )


def global_local_attention_bwd(
    grad_global, grad_local, query, key, value, multiplier, bias, key_mask, segment_ids,
    global_out, local_out, global_lse, local_lse, pattern, scale, needs,
) -> tuple[Tensor, ...]:  # fmt: skip
    """The backward formulas, written out; a gradient that `needs` does not ask for is empty."""
    with no_autocast(query):
        s = _scores(
            query, key, value, multiplier, bias, key_mask, segment_ids, pattern, scale, True
        )
        total = s.scores.dtype
        grad_fused = torch.zeros((), dtype=total)
        grad_value = torch.zeros((), dtype=total)
        for visible, grad_out, out, lse in (
            (s.visible[0], grad_global, global_out, global_lse),
            (s.visible[1], grad_local, local_out, local_lse),
        ):
            grad_out = grad_out.to(total)
            # exp is taken of 0 where the pair is hidden, so that nothing overflows there
            exponent = torch.where(visible, s.fused - lse.to(total)[..., None], 0.0)
            probability = torch.where(visible, torch.exp(exponent), 0.0)
            delta = (grad_out * out.to(total)).sum(-1, keepdim=True)
            slope = grad_out @ s.value.transpose(-1, -2) - delta
            grad_fused = grad_fused + torch.where(visible, probability * slope, 0.0)
            grad_value = grad_value + probability.transpose(-1, -2) @ grad_out
        grad_scores = grad_fused if s.multiplier is None else grad_fused * s.multiplier

        grads = []
        for wanted, operand in zip(needs, (query, key, value, multiplier, bias), strict=True):
            grads.append(query.new_empty(0, dtype=(query if operand is None else operand).dtype))
            if not wanted:
                continue
            if operand is query:
                grad = scale * (grad_scores @ s.key)
            elif operand is key:
                grad = scale * (grad_scores.transpose(-1, -2) @ s.query)
            elif operand is value:
                grad = grad_value
            elif operand is multiplier:
                grad = torch.where(s.visible[0], grad_fused * s.scores, 0.0)
            else:
                grad = grad_fused
            grads[-1] = sum_to(grad, operand)
        return tuple(grads)


def _scores(
    query, key, value, multiplier, bias, key_mask, segment_ids, pattern, scale, upcast
) -> _Scores:
    """S, F and what each map may see, with hidden mask values replaced before they can reach a
    sum."""
    total = dtype_of_sums(query.dtype, upcast)
    Lq, Lk = query.shape[2], key.shape[2]
    query, key, value = query.to(total), key.to(total), value.to(total)
    scores = scale * (query @ key.transpose(-1, -2))
    everywhere = torch.ones_like(scores, dtype=torch.bool)
    if key_mask is not None:
        everywhere = everywhere & key_mask[:, None, None, :]
    if bias is not None:
        everywhere = everywhere & (bias != -torch.inf)
    local = everywhere & pattern_visible(pattern, segment_ids, Lq, Lk, query.device)
    fused = scores
    if multiplier is not None:
        multiplier = torch.where(everywhere, multiplier.to(total), 1.0)
        fused = fused * multiplier
    if bias is not None:
        fused = fused + torch.where(everywhere, bias.to(total), 0.0)
    return _Scores(query, key, value, scores, fused, (everywhere, local), multiplier)


def _forward(
    query, key, value, multiplier, bias, key_mask, segment_ids, pattern, scale, upcast
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    s = _scores(query, key, value, multiplier, bias, key_mask, segment_ids, pattern, scale, upcast)
    outs, lses = [], []
    for visible in s.visible:
        probability, lse = softmax_where(s.fused, visible)
        outs.append((probability @ s.value).to(query.dtype).contiguous())
        lses.append(lse.to(torch.promote_types(torch.float32, lse.dtype)).contiguous())
    return (*outs, *lses)
