"""FLOPs and bytes that masked attention cannot avoid; tests/bench/test_cost.py counts by hand.

Only visible pairs count, and only the matrix products: a multiply and an add are 2 FLOPs.

    forward   S = Q K^T (2 D), O = P V (2 Dv)                            2 D + 2 Dv a pair
    backward  S again, dQ, dK (2 D each), dP = dO V^T, dV (2 Dv each)    6 D + 4 Dv a pair

With D = Dv that is 4 D and 10 D: backward = 2.5 x forward, the convention of FlashAttention (arXiv
2205.14135). A peer that does more (a mask-free one does not compute dM, a blocked one also
multiplies hidden pairs) is charged for the same useful work, so rates compare like times do.

Bytes: every operand and every saved result is read once, every result written once; nothing in
between touches memory.
"""

from __future__ import annotations

from lam_kernels.patterns import visible_pairs as pairs_of_spec
from python_ref.inputs import Problem, draw_pattern, mask_shape

_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "float64": 8}


def visible_pairs(problem: Problem) -> int:
    """Pairs (i, j) over all B and H that the pattern keeps; segments and masks hide none here."""
    pattern = draw_pattern(problem, None)
    if pattern is None:
        return problem.B * problem.H * problem.Lq * problem.Lk
    heads = pattern if isinstance(pattern, list) else [pattern] * problem.H
    counts = {}
    for one in heads:
        if one not in counts:
            whole = problem.Lq * problem.Lk
            counts[one] = whole if one is None else pairs_of_spec(one._spec, problem.Lq, problem.Lk)
    return problem.B * sum(counts[one] for one in heads)


def flops(problem: Problem, direction: str) -> int:
    """FLOPs of the visible pairs; direction "fwd" (also "call") or "both"."""
    forward = 2 * problem.D + 2 * problem.Dv
    backward = 6 * problem.D + 4 * problem.Dv
    return visible_pairs(problem) * (forward + (backward if direction == "both" else 0))


def least_bytes(problem: Problem, direction: str) -> int:
    """Bytes that have to move, see above."""
    p, size = problem, _BYTES[problem.dtype]
    query, out = p.B * p.H * p.Lq * p.D * size, p.B * p.H * p.Lq * p.Dv * size
    key, value = p.B * p.Hkv * p.Lk * p.D * size, p.B * p.Hkv * p.Lk * p.Dv * size
    lse = p.B * p.H * p.Lq * (8 if p.dtype == "float64" else 4)
    masks, mask_grads = 0, 0
    for letter, axes, dtype in (
        ("m", p.multiplier, p.multiplier_dtype),
        ("b", p.bias, p.bias_dtype),
    ):
        if axes:
            count = _BYTES[dtype or p.dtype]
            for axis in mask_shape(p, axes):
                count *= axis
            kept = _kept_share(p) if axes[-2:] == "qk" else 1.0
            masks += round(count * kept)
            mask_grads += count if letter in p.grads else 0  # hidden zeros are written too
    total = query + key + value + masks + out + lse
    if direction == "both":
        total += query + key + value + masks + 2 * out + lse  # read again; out and its gradient
        total += mask_grads
        total += sum(
            n for letter, n in (("q", query), ("k", key), ("v", value)) if letter in p.grads
        )
    return total


def _kept_share(problem: Problem) -> float:
    pairs = problem.B * problem.H * problem.Lq * problem.Lk
    return visible_pairs(problem) / pairs if pairs else 0.0
