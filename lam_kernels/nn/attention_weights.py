"""Softmax weights under a learned mask, stored: for looking at, not for training speed."""

from __future__ import annotations

import torch
from torch import Tensor

from lam_kernels.low_rank_mask import LowRankMask
from lam_kernels.patterns import Pattern


def attention_weights(
    query: Tensor,  # [B, H, Lq, D]
    key: Tensor,  # [B, H, Lk, D]
    *,
    multiplier: Tensor | LowRankMask | None = None,  # [Lq, Lk] or 4-D, each axis full or 1
    bias: Tensor | LowRankMask | None = None,  # the same
    pattern: Pattern | None = None,
    attn_mask: Tensor | None = None,  # bool
    key_mask: Tensor | None = None,  # bool [B, Lk]
) -> Tensor:  # [B, H, Lq, Lk]
    """softmax_j(Q K^T / sqrt(D) * multiplier + bias, hidden keys left out).

    Plain torch, differentiable; float32 at least; no dropout. A row that sees no key is 0. pattern
    may be a sequence of one a head.
    """
    Lq, Lk = query.shape[2], key.shape[2]
    dtype = torch.promote_types(query.dtype, torch.float32)
    scores = query.to(dtype) @ key.to(dtype).transpose(-1, -2) * query.shape[-1] ** -0.5
    if multiplier is not None:
        scores = scores * _dense(multiplier).to(dtype)
    if bias is not None:
        scores = scores + _dense(bias).to(dtype)
    visible = visible_pairs(pattern, Lq, Lk, query.device)
    if attn_mask is not None:
        visible = visible & attn_mask
    if key_mask is not None:
        visible = visible & key_mask[:, None, None, :]
    scores = scores.masked_fill(~visible, -torch.inf)
    seen = (scores != -torch.inf).any(-1, keepdim=True)  # the mask too may hide a pair
    return torch.softmax(torch.where(seen, scores, 0.0), dim=-1) * seen


def _dense(mask: Tensor | LowRankMask) -> Tensor:
    return mask.dense() if isinstance(mask, LowRankMask) else mask


def visible_pairs(pattern, Lq: int, Lk: int, device) -> Tensor:
    """What a pattern, or a sequence of one a head, keeps: bool [Lq, Lk] or [1|B, 1|H, Lq, Lk]."""
    everything = torch.ones(Lq, Lk, dtype=torch.bool, device=device)
    if pattern is None:
        return everything
    patterns = pattern if isinstance(pattern, list | tuple) else [pattern]
    shown = [everything if p is None else p.dense(Lq, Lk).to(device) for p in patterns]
    shown = [s.reshape(-1, Lq, Lk) for s in shown]
    return torch.stack(torch.broadcast_tensors(*shown), dim=1)
