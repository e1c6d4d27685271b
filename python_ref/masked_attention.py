"""Masked attention: the specification.

Shapes: query [B,H,Lq,D], key [B,Hkv,Lk,D], value [B,Hkv,Lk,Dv]; query head h reads key/value head
h * Hkv // H. Multiplier M, bias A and attn_mask have each axis of [B,H,Lq,Lk] full or 1. Row i is
a query, column j a key. M or A may be given by factors: python_ref/low_rank.py.

Forward
    S  = scale * Q K^T
    F  = S * M + A                      M alone is LAM eq. 6 ("mul"), A alone its C.1 ("add")
    F  = S * M,  weight W = A >= 0      fusion "gate": A is a weight, stands for a bias of log A
    visible = pattern and attn_mask and key_mask and A > -inf    (gate: and A > 0)
    Z  = F (gate: F + log W) where visible, else -inf
    m  = max_j Z;  E = exp(Z - m)  (gate: W exp(F - m));  l = sum_j E
    P  = E / l;  lse = m + log l        a row without a visible key: P = 0, out = 0, lse = -inf
    P~ = kept ? P / (1 - p) : 0         dropout; which pairs are kept: python_ref/philox.py
    O  = P~ V
The order is fixed: M is applied before anything is hidden, because -inf * 0 is NaN and -inf * M > 0
for M < 0.

Backward, with dO and dlse the gradients of out and lse
    delta = rowsum(dO * O)
    dP = kept ? dO V^T / (1 - p) : 0
    dZ = P (dP - delta + dlse)          0 where hidden, and in a row without a visible key
    dV = P~^T dO
    dS = dZ M;   dQ = scale * dS K;   dK = scale * dS^T Q
    dM = dZ S;   dA = dZ                each summed over the broadcast axes of its operand
    gate: dA = exp(F - lse) (dP - delta + dlse)    where pattern and masks allow, also at A = 0
    dK and dV are summed over the query heads that share them.

    A hidden pair's M and A are never used: NaN or inf there changes nothing and its gradient is
    exactly 0. K and V must be finite. NaN or +inf at a visible pair propagates.

Sources: LAM (arXiv 2406.02761) eq. 6 and ablation C.1; delta and the recomputed P of FlashAttention
(arXiv 2205.14135, appendix B); dlse follows from d lse_i / d Z_ij = P_ij.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lam_kernels.low_rank_mask import LowRankMask
from lam_kernels.patterns import Pattern, encode

from .low_rank import factor_gradients, product
from .patterns import visible as pattern_visible
from .philox import kept_pairs
from .softmax import dtype_of_sums, no_autocast, sum_to

_NEG_INF = float("-inf")


class _Scores(NamedTuple):
    """What forward and backward both need, all of shape [B|1, H|1, Lq, Lk] or broadcast to it."""

    query: Tensor  # [B, H, Lq, D] in the dtype of the sums
    key: Tensor  # [B, H, Lk, D], heads repeated
    value: Tensor  # [B, H, Lk, Dv], heads repeated
    scores: Tensor  # S
    fused: Tensor  # F
    allowed: Tensor  # by pattern, attn_mask, key_mask and a bias of -inf
    visible: Tensor  # allowed, and for a gate also A > 0
    multiplier: Tensor | None  # 1 where not allowed
    weight: Tensor | None  # the gate, 1 where not allowed
    row_seen: Tensor  # [.., Lq, 1]: the row sees a key


def masked_attention(
    query: Tensor,  # [B, H, Lq, D]
    key: Tensor,  # [B, Hkv, Lk, D]
    value: Tensor,  # [B, Hkv, Lk, Dv]
    *,
    multiplier: Tensor | LowRankMask | None = None,  # [B|1, H|1, Lq|1, Lk|1] or [Lq|1, Lk|1]
    bias: Tensor | LowRankMask | None = None,  # the same
    pattern: Pattern | Sequence[Pattern | None] | None = None,
    attn_mask: Tensor | None = None,  # bool, the same; True = visible
    key_mask: Tensor | None = None,  # bool [B, Lk]
    scale: float | None = None,
    dropout_p: float = 0.0,
    rng_state: Tensor | None = None,  # int64 [2] = (seed, offset), needed when dropout_p > 0
    enable_gqa: bool = False,
    gate: bool = False,
    return_lse: bool = False,
    upcast: bool = True,
) -> Tensor | tuple[Tensor, Tensor]:  # out [B, H, Lq, Dv] (, lse [B, H, Lq])
    """The formulas above in plain torch operations, differentiable as often as wanted.

    upcast=True sums in fp32 for fp16, bf16 and fp32 input (fp64 for fp64). upcast=False rounds
    after every operation to the storage dtype: what plain PyTorch in that dtype would give, from
    which error bounds are taken. lse is fp32 (fp64 for fp64 input), in natural-log units.
    """
    if key.shape[1] != query.shape[1] and not enable_gqa:
        raise ValueError(
            f"key has {key.shape[1]} heads, query {query.shape[1]}: needs enable_gqa=True"
        )
    flat, segment_ids = encode(pattern, query.shape[1])
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    total = dtype_of_sums(query.dtype, upcast)
    with no_autocast(query):
        multiplier, bias = (
            product(mask.rows, mask.columns, mask.offset, total)
            if isinstance(mask, LowRankMask)
            else mask
            for mask in (multiplier, bias)
        )
        out, lse = _forward(
            query, key, value, multiplier, bias, attn_mask, key_mask, segment_ids, rng_state,
            flat, scale, dropout_p, gate, upcast,
        )  # fmt: skip
    return (out, lse) if return_lse else out


def masked_attention_fwd(
    query, key, value, multiplier, bias, multiplier_columns, multiplier_offset, bias_columns,
    bias_offset, attn_mask, key_mask, segment_ids, rng_state, pattern, scale, dropout_p, gate,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The op's forward with the op's own arguments (an encoded pattern, 4-D masks)."""
    total = dtype_of_sums(query.dtype, True)
    with no_autocast(query):
        multiplier = _mask(multiplier, multiplier_columns, multiplier_offset, total)
        bias = _mask(bias, bias_columns, bias_offset, total)
        return _forward(
            query, key, value, multiplier, bias, attn_mask, key_mask, segment_ids, rng_state,
            pattern, scale, dropout_p, gate, True,
        )  # fmt: skip


def masked_attention_bwd(
    grad_out, grad_lse, query, key, value, multiplier, bias, multiplier_columns,
    multiplier_offset, bias_columns, bias_offset, attn_mask, key_mask, segment_ids,
    rng_state, out, lse, pattern, scale, dropout_p, gate, needs,
) -> tuple[Tensor, ...]:  # fmt: skip
    """The backward formulas, written out; a gradient that `needs` does not ask for is empty."""
    multiplier_factors = (multiplier, multiplier_columns, multiplier_offset)
    bias_factors = (bias, bias_columns, bias_offset)
    with no_autocast(query):
        total = dtype_of_sums(query.dtype, True)
        multiplier, bias = _mask(*multiplier_factors, total), _mask(*bias_factors, total)
        s = _scores(
            query, key, value, multiplier, bias, attn_mask, key_mask, segment_ids,
            pattern, scale, gate, True,
        )  # fmt: skip
        total = s.scores.dtype
        grad_out = grad_out.to(total)
        lse = torch.where(s.row_seen, lse.to(total)[..., None], 0.0)
        delta = (grad_out * out.to(total)).sum(-1, keepdim=True)
        shift = delta if grad_lse is None else delta - grad_lse.to(total)[..., None]

        # exp is taken of 0 where the pair is hidden, so that nothing overflows there
        counted = s.allowed & s.row_seen
        unweighted = torch.where(counted, torch.exp(torch.where(counted, s.fused - lse, 0.0)), 0.0)
        probability = unweighted if s.weight is None else unweighted * s.weight
        if s.weight is not None:
            probability = torch.where(s.visible, probability, 0.0)
        grad_probability = grad_out @ s.value.transpose(-1, -2)
        dropped = probability
        if dropout_p > 0:
            kept = kept_pairs(rng_state, dropout_p, *s.scores.shape, device=query.device)
            dropped = torch.where(kept, probability / (1 - dropout_p), 0.0)
            grad_probability = torch.where(kept, grad_probability / (1 - dropout_p), 0.0)
        grad_fused = torch.where(s.visible, probability * (grad_probability - shift), 0.0)
        grad_scores = grad_fused if s.multiplier is None else grad_fused * s.multiplier

        grads = {}
        if needs[0]:
            grads[0] = sum_to(scale * (grad_scores @ s.key), query)
        if needs[1]:
            grads[1] = sum_to(scale * (grad_scores.transpose(-1, -2) @ s.query), key)
        if needs[2]:
            grads[2] = sum_to(dropped.transpose(-1, -2) @ grad_out, value)
        for factors, at in ((multiplier_factors, (3, 5, 6)), (bias_factors, (4, 7, 8))):
            if not any(needs[n] for n in at):
                continue
            if factors is multiplier_factors:
                grad = torch.where(s.visible, grad_fused * s.scores, 0.0)
            elif gate:
                grad = torch.where(counted, unweighted * (grad_probability - shift), 0.0)
            else:
                grad = grad_fused
            if factors[1] is None:
                grads[at[0]] = sum_to(grad, factors[0])
                continue
            for n, g, factor in zip(at, factor_gradients(grad, *factors), factors, strict=True):
                if factor is not None:
                    grads[n] = sum_to(g, factor)
        operands = (
            query, key, value, multiplier_factors[0], bias_factors[0], *multiplier_factors[1:],
            *bias_factors[1:],
        )  # fmt: skip
        return tuple(
            grads[n]
            if wanted
            else query.new_empty(0, dtype=(query if operand is None else operand).dtype)
            for n, (wanted, operand) in enumerate(zip(needs, operands, strict=True))
        )


def _mask(mask, columns, offset, dtype: torch.dtype) -> Tensor | None:
    """A mask operand of the op as one matrix."""
    return mask if columns is None else product(mask, columns, offset, dtype)


def _scores(
    query, key, value, multiplier, bias, attn_mask, key_mask, segment_ids,
    pattern, scale, gate, upcast,
) -> _Scores:  # fmt: skip
    """S, F and what may be seen, with hidden mask values replaced before they can reach a sum."""
    total = dtype_of_sums(query.dtype, upcast)
    H, Lq, Lk = query.shape[1], query.shape[2], key.shape[2]

    query = query.to(total)
    key, value = _repeat_heads(key.to(total), H), _repeat_heads(value.to(total), H)
    scores = scale * (query @ key.transpose(-1, -2))

    allowed = pattern_visible(pattern, segment_ids, Lq, Lk, query.device)
    if attn_mask is not None:
        allowed = allowed & attn_mask
    if key_mask is not None:
        allowed = allowed & key_mask[:, None, None, :]
    if bias is not None and not gate:
        allowed = allowed & (bias != _NEG_INF)
    visible = allowed if bias is None or not gate else allowed & (bias != 0)

    fused, weight = scores, None
    if multiplier is not None:
        multiplier = torch.where(allowed, multiplier.to(total), 1.0)
        fused = fused * multiplier
    if bias is not None and gate:
        weight = torch.where(allowed, bias.to(total), 1.0)
    elif bias is not None:
        fused = fused + torch.where(allowed, bias.to(total), 0.0)
    row_seen = visible.any(-1, keepdim=True)
    return _Scores(query, key, value, scores, fused, allowed, visible, multiplier, weight, row_seen)


def _forward(
    query, key, value, multiplier, bias, attn_mask, key_mask, segment_ids, rng_state,
    pattern, scale, dropout_p, gate, upcast,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    s = _scores(
        query, key, value, multiplier, bias, attn_mask, key_mask, segment_ids,
        pattern, scale, gate, upcast,
    )  # fmt: skip
    total = s.scores.dtype

    # The largest Z of a row only keeps exp in range: P and lse do not depend on it, so it carries
    # no gradient.
    with torch.no_grad():
        largest = s.fused
        if s.weight is not None:
            largest = largest + torch.log(s.weight)
        if largest.shape[-1] == 0:
            largest = largest.new_zeros(*largest.shape[:-1], 1)
        else:
            largest = torch.where(s.visible, largest, _NEG_INF).amax(-1, keepdim=True)
        largest = torch.where(s.row_seen, largest, 0.0)

    # Hidden pairs: exp of 0 and then 0, because the gradient of a where is 0 * whatever the other
    # branch holds.
    exponent = torch.where(s.allowed & s.row_seen, s.fused - largest, 0.0)
    if s.weight is None:
        weights = torch.where(s.visible, torch.exp(exponent), 0.0)
    else:
        weights = _gated_weights(s, exponent)
    sums = weights.sum(-1, keepdim=True)
    sums = torch.where(s.row_seen, sums, 1.0)
    probability = weights / sums
    lse = torch.where(s.row_seen, largest + torch.log(sums), _NEG_INF).squeeze(-1)
    if dropout_p > 0:
        kept = kept_pairs(rng_state, dropout_p, *s.scores.shape, device=query.device)
        probability = torch.where(kept, probability / (1 - dropout_p), 0.0)
    out = (probability @ s.value).to(query.dtype)
    return out.contiguous(), lse.to(torch.promote_types(torch.float32, total)).contiguous()


def _gated_weights(s: _Scores, exponent: Tensor) -> Tensor:
    """W exp(F - m), with the gradient exp(F - m) to W also where W is 0.

    m is the largest F + log W, so F - m may be large where W is tiny or 0: there the logarithm of W
    goes into the exponent, and a W of 0 meets an exponent that is held below overflow (0 * inf is
    NaN).
    """
    positive = s.visible & s.row_seen
    logarithm = torch.log(torch.where(positive, s.weight, 1.0))
    seen = torch.exp(torch.where(positive, exponent + logarithm, 0.0))
    held = exponent.clamp(max=math.log(torch.finfo(exponent.dtype).max) - 1)
    unseen = s.weight * torch.exp(torch.where(positive, 0.0, held))
    unseen = torch.where(s.allowed & s.row_seen, unseen, 0.0)
    return torch.where(positive, seen, unseen)


def _repeat_heads(tensor: Tensor, heads: int) -> Tensor:
    B, Hkv, L, D = tensor.shape
    if Hkv == heads:
        return tensor
    group = heads // Hkv
    return tensor[:, :, None].expand(B, Hkv, group, L, D).reshape(B, heads, L, D)
