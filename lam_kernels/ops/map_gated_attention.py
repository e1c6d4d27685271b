"""The page of attention with gated maps (GateAtt): public function, checks, schema, FLOPs.

Formulas and their derivation: python_ref/map_gated_attention.py. Kernels: the KERNELS table.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from ..patterns import Pattern, encode
from . import _backends, _checks
from ._autograd import differentiable
from ._backends import Explanation, Services
from ._cuda import map_gated_attention_limits
from ._flops import pair_count
from ._registration import (
    cpu_service,
    cuda_service,
    gradients_like,
    reference_service,
    register,
    triton_service,
)
from ._vmap import register_one_by_one

MAX_LENGTH = 512  # whole rows of both maps stay on chip


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
    backend: str | None = None,
) -> Tensor:  # out [B, H, T, Dv]
    """Attention whose map is mixed, pair by pair, from a global and a local one (GateAtt).

        S   = scale * Q K^T
        A^g = softmax_j(S over visible j);  A^l = softmax_j(S over visible j of the pattern)
        R   = sigmoid(A^g gate_global - A^l gate_local)
        out = (R * A^g + (1 - R) * A^l) V

    A row of the mixed map sums to 1 only where both maps agree, as in the paper; renormalise
    divides it by its sum. Visible is what key_mask keeps. Gradients go to query, key, value and
    both gates (summed over batch and heads).

    Args:
        query, key, value: one dtype of float32, bfloat16, float16, float64 (float64 on "cpu" and
            "reference"), any strides, D and Dv from 1 to 256, all of one length T up to 512 and of
            the same heads. Under autocast these three are cast, the gates never are.
        gate_global, gate_local: [T, T], any strides, any float dtype (float64 only with a float64
            query). For a shorter sequence a slice [:T, :T] of larger gates is exact.
        pattern: of the local map: BlockDiagonal, Toeplitz, DilatedToeplitz, Causal, Segments or
            several joined by &; or a sequence of H of them, one a head. None means everything.
        renormalise: divide each row of the mixed map by its sum.
        key_mask: booleans [B, T], False for padding.
        scale: a float, D ** -0.5 by default.
        backend: "cpu", "cuda", "triton" or "reference"; a named one never falls back. None: the
            first of the device's table that serves the call (never the reference). See explain().

    Returns:
        out in query's dtype, contiguous. A row that sees no key in one map has zeros there, and the
        gate still acts on the other; one that sees no key in either is 0, all gradients 0. A size
        of 0 in B, H or T gives an empty result.

    Raises:
        TypeError, ValueError: naming the argument, what came and what was expected.
        RuntimeError: no backend serves the call (with every reason), or on double backward, which
            only backend="reference" has.

    Numerics: sums, softmax and sigmoid in float32 (float64 for float64) whatever the storage dtype;
    bitwise repeatable for a device and thread count, gate gradients included. No [B, H, T, T]
    intermediate. With a bfloat16 query, AMX and GPUs multiply maps by gates in bfloat16, also gates
    of another dtype.

    Source: GMSA (arXiv 2110.13992), GateAtt; its softmax over the pair of gates is this sigmoid.
    """
    arguments = _checked(
        query, key, value, gate_global, gate_local, pattern, renormalise, key_mask, scale
    )
    backend = KERNELS.choose(backend, arguments)
    query, key, value, gate_global, gate_local, key_mask, segment_ids, flat, scale, _ = arguments
    if backend == "reference":
        from python_ref.map_gated_attention import map_gated_attention as reference

        # plain autograd, not the function below: the reference is differentiable more than once
        return reference(
            query, key, value, gate_global, gate_local, pattern, renormalise=renormalise,
            key_mask=key_mask, scale=scale,
        )  # fmt: skip
    (out,) = _call(
        (query, key, value, gate_global, gate_local), (key_mask,), segment_ids,
        (flat, scale, renormalise), backend,
    )  # fmt: skip
    return out


def _checked(
    query, key, value, gate_global, gate_local, pattern, renormalise, key_mask, scale
) -> tuple:
    """The op's forward arguments, or an error. Reads shapes and dtypes only."""
    query, key, value = _checks.cast_under_autocast(query, key, value)
    _checks.check_equal_heads(query, key)
    _checks.check_query_key_value(query, key, value, False)
    B, H, T, D = query.shape
    if key.shape[2] != T:
        raise ValueError(f"key must have query's length {T}, got {key.shape[2]}")
    if T > MAX_LENGTH:
        raise ValueError(f"query: at most {MAX_LENGTH} positions (whole rows of maps), got {T}")
    for name, gate in (("gate_global", gate_global), ("gate_local", gate_local)):
        _checks.check_tensor(name, gate)
        if gate.dim() != 2:
            raise ValueError(f"{name} must be [T, T] = [{T}, {T}], got {tuple(gate.shape)}")
        _checks.check_float_operand(name, gate, (1, 1, T, T), query)
        if tuple(gate.shape) != (T, T):
            raise ValueError(f"{name} must be [T, T] = [{T}, {T}], got {tuple(gate.shape)}")
    if not isinstance(renormalise, bool):
        raise TypeError(f"renormalise must be a bool, got {type(renormalise).__name__}")
    if key_mask is not None:
        _checks.check_key_mask(key_mask, B, T, query)
    flat, segment_ids = encode(pattern, H)
    if segment_ids:
        _checks.check_segment_ids(segment_ids, B, T, T, query)
    scale = D**-0.5 if scale is None else _checks.check_scale(scale)
    return (
        query, key, value, gate_global, gate_local, key_mask, segment_ids, flat, scale,
        renormalise,
    )  # fmt: skip


def _explain(
    query, key, value, gate_global, gate_local, pattern, *, renormalise=False, key_mask=None,
    scale=None, backend=None,
) -> Explanation:  # fmt: skip
    arguments = _checked(
        query, key, value, gate_global, gate_local, pattern, renormalise, key_mask, scale
    )
    return KERNELS.explanation(backend, arguments, ())


_backends.EXPLAINERS["map_gated_attention"] = _explain


# ---- the op: schemas, kernels, fakes

_OPERANDS = (
    "Tensor query, Tensor key, Tensor value, Tensor gate_global, Tensor gate_local, "
    "Tensor? key_mask, Tensor[] segment_ids"
)
_SETTINGS = "int[] pattern, float scale, bool renormalise"

KERNELS = Services(
    "map_gated_attention",
    {
        "cpu": cpu_service("map_gated_attention"),
        "cuda": cuda_service("map_gated_attention", map_gated_attention_limits),
        "triton": triton_service("map_gated_attention"),
        "reference": reference_service("map_gated_attention"),
    },
)


def _fake_forward(query, key, value, *_):
    return query.new_empty(*query.shape[:3], value.shape[3])


def _fake_backward(grad_out, query, key, value, gate_global, gate_local, *rest):
    return gradients_like(query, (query, key, value, gate_global, gate_local), rest[-2])


_op = register(
    KERNELS,
    f"({_OPERANDS}, {_SETTINGS}, str backend) -> Tensor",
    f"(Tensor grad_out, {_OPERANDS}, {_SETTINGS}, bool[] needs, str backend) -> "
    "(Tensor, Tensor, Tensor, Tensor, Tensor)",
    _fake_forward,
    _fake_backward,
)
_call = differentiable(_op, learned=5, results=1, saves_results=False)
register_one_by_one(_op)


# ---- FLOPs of the pairs that the pattern keeps; masks and segment ids are data, all visible here


@register_flop_formula(torch.ops.lam_kernels.map_gated_attention_fwd)
def _forward_flops(query_shape, key_shape, value_shape, *rest, out_shape=None) -> int:
    """Q K^T, both maps times their gates, and the mixed map times V."""
    T, D, Dv = query_shape[2], query_shape[3], value_shape[3]
    whole = pair_count(query_shape, key_shape, ())
    near = pair_count(query_shape, key_shape, rest[4])
    return 2 * (whole * (D + Dv) + (whole + near) * T)


@register_flop_formula(torch.ops.lam_kernels.map_gated_attention_bwd)
def _backward_flops(
    grad_shape, query_shape, key_shape, value_shape, *rest, out_shape=None
) -> int:  # fmt: skip
    """The forward pass but its last product again, dO V^T, and one product a gradient; the gates
    are met once more in the gradient of each map."""
    T, D, Dv = query_shape[2], query_shape[3], value_shape[3]
    needs = rest[-2]
    grad_query, grad_key, grad_value, grad_global, grad_local = needs
    maps = grad_query or grad_key
    whole = pair_count(query_shape, key_shape, ())
    near = pair_count(query_shape, key_shape, rest[4])
    slopes = Dv * (maps or grad_global or grad_local)
    widths = D * (1 + grad_query + grad_key) + Dv * grad_value + slopes
    return 2 * (
        whole * (widths + T * (1 + maps + grad_global)) + near * T * (1 + maps + grad_local)
    )
