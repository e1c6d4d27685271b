"""What an encoded pattern means: the predicate of each kind, from the integers that kernels get."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lam_kernels.patterns import (
    BLOCK_DIAGONAL,
    CAUSAL,
    DILATED_TOEPLITZ,
    SEGMENTS,
    TOEPLITZ,
    spec_terms,
    specs,
)


def visible(
    flat: Sequence[int], segment_ids: Sequence[Tensor], Lq: int, Lk: int, device=None
) -> Tensor:  # bool [B|1, H|1, Lq, Lk]
    """True where the pattern keeps the pair. `flat` is lam_kernels.patterns.encode's."""
    per_head = [_spec_visible(spec, segment_ids, Lq, Lk, device) for spec in specs(flat)]
    if not per_head:
        return torch.ones(1, 1, Lq, Lk, dtype=torch.bool, device=device)
    batch = max(mask.shape[0] for mask in per_head) if all(m.shape[0] for m in per_head) else 0
    return torch.cat([mask.expand(batch, 1, Lq, Lk) for mask in per_head], dim=1)


def _spec_visible(
    spec: Sequence[int], segment_ids: Sequence[Tensor], Lq: int, Lk: int, device
) -> Tensor:  # bool [B|1, 1, Lq, Lk]
    i = torch.arange(Lq, device=device)[:, None]
    j = torch.arange(Lk, device=device)[None, :]
    kept = torch.ones(1, 1, Lq, Lk, dtype=torch.bool, device=device)
    for kind, end_aligned, a, b in spec_terms(spec):
        # positions from the last one; delta is then j' - i', the same i - j moved by Lk - Lq
        row, column = (Lq - 1 - i, Lk - 1 - j) if end_aligned else (i, j)
        delta = column - row if end_aligned else row - column
        if kind == BLOCK_DIAGONAL:
            kept = kept & (row // a == column // a)
        elif kind == TOEPLITZ:
            kept = kept & (delta.abs() <= a)
        elif kind == DILATED_TOEPLITZ:
            kept = kept & (delta.abs() <= a) & (delta % b == 0)
        elif kind == CAUSAL:
            kept = kept & (delta >= 0)
        elif kind == SEGMENTS:
            query_ids, key_ids = segment_ids[2 * a], segment_ids[2 * a + 1]
            kept = kept & (query_ids[:, None, :, None] == key_ids[:, None, None, :])
        else:
            raise ValueError(f"pattern: unknown kind {kind}")
    return kept
