"""How many pairs of query and key a call works on, for the FLOP formulas."""

from __future__ import annotations

from collections.abc import Sequence

from ..patterns import specs, visible_pairs


def pair_count(query_shape: Sequence[int], key_shape: Sequence[int], flat: Sequence[int]) -> int:
    """Pairs that an encoded pattern keeps, over batch and heads."""
    B, H, Lq, _ = query_shape
    Lk = key_shape[2]
    per_head = [visible_pairs(spec, Lq, Lk) for spec in specs(flat)] or [Lq * Lk]
    return B * (sum(per_head) if len(per_head) > 1 else H * per_head[0])
