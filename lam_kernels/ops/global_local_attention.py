"""The page of global and local attention in one call: public function, checks, schema, FLOPs.

Formulas and their derivation: python_ref/global_local_attention.py. Kernels: the KERNELS table.
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
from ._cuda import global_local_attention_limits
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
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:  # global_out, local_out [B, H, Lq, Dv]
    """Attention over all keys and over a neighbourhood, from one Q K^T.

        Z_ij = scale * q_i . k_j * multiplier_ij + bias_ij
        global_out_i = sum over visible j of               softmax_j(Z_ij) v_j
        local_out_i  = sum over visible j of the pattern   softmax_j(Z_ij) v_j

    The same numbers as two calls of masked_attention, without and with the pattern, for less: the
    scores are formed once, forward and backward, one combined dS gives the gradients of query and
    key, and the local half only works on tiles that the pattern touches. Visible is what key_mask
    keeps and where bias is not -inf.

    Args:
        query, key, value: one dtype of float32, bfloat16, float16, float64 (float64 on "cpu" and
            "reference"), any strides, D and Dv from 1 to 256; key and value have query's heads.
            Under autocast these three are cast, the masks never are.
        pattern: of the local half: BlockDiagonal, Toeplitz, DilatedToeplitz, Causal, Segments or
            several joined by &; or a sequence of H of them, one a head. None means everything.
        multiplier, bias: each axis full or 1, any float dtype (float64 only with a float64 query);
            both halves use them. A bias of -inf hides a pair in both. A hidden pair's values are
            never used and their gradient is exactly 0.
        key_mask: booleans [B, Lk], False for padding, in both halves.
        scale: a float, D ** -0.5 by default.
        backend: "cpu", "cuda", "triton" or "reference"; a named one never falls back. None: the
            first of the device's table that serves the call (never the reference). See explain().

    Returns:
        (global_out, local_out) in query's dtype, contiguous. A row that sees no key in a half: 0
        there, and no gradient from there. A size of 0 in B, H or Lq gives empty results.

    Raises:
        TypeError, ValueError: naming the argument, what came and what was expected.
        RuntimeError: no backend serves the call (with every reason), or on double backward, which
            only backend="reference" has.

    Numerics: sums and softmax in float32 (float64 for float64) whatever the storage dtype; bitwise
    repeatable for a device and thread count, mask gradients included. No [B, H, Lq, Lk]
    intermediate.

    Source: GMSA (arXiv 2110.13992), the attention of its GateOp.
    """
    arguments = _checked(query, key, value, pattern, multiplier, bias, key_mask, scale)
    backend = KERNELS.choose(backend, arguments)
    query, key, value, multiplier, bias, key_mask, segment_ids, flat, scale = arguments
    if backend == "reference":
        from python_ref.global_local_attention import global_local_attention as reference

        # plain autograd, not the function below: the reference is differentiable more than once
        return reference(
            query, key, value, pattern, multiplier=multiplier, bias=bias, key_mask=key_mask,
            scale=scale,
        )  # fmt: skip
    return _call(
        (query, key, value, multiplier, bias), (key_mask,), segment_ids, (flat, scale), backend
    )


def _checked(query, key, value, pattern, multiplier, bias, key_mask, scale) -> tuple:
    """The op's forward arguments, or an error. Reads shapes and dtypes only."""
    query, key, value = _checks.cast_under_autocast(query, key, value)
    _checks.check_equal_heads(query, key)
    _checks.check_query_key_value(query, key, value, False)
    B, H, Lq, D = query.shape
    shape = (B, H, Lq, key.shape[2])
    if multiplier is not None:
        multiplier = _checks.check_float_operand("multiplier", multiplier, shape, query)
    if bias is not None:
        bias = _checks.check_float_operand("bias", bias, shape, query)
    if key_mask is not None:
        _checks.check_key_mask(key_mask, B, shape[3], query)
    flat, segment_ids = encode(pattern, H)
    if segment_ids:
        _checks.check_segment_ids(segment_ids, B, Lq, shape[3], query)
    scale = D**-0.5 if scale is None else _checks.check_scale(scale)
    return query, key, value, multiplier, bias, key_mask, segment_ids, flat, scale


def _explain(
    query, key, value, pattern, *, multiplier=None, bias=None, key_mask=None, scale=None,
    backend=None,
) -> Explanation:  # fmt: skip
    arguments = _checked(query, key, value, pattern, multiplier, bias, key_mask, scale)
    return KERNELS.explanation(backend, arguments, ())


_backends.EXPLAINERS["global_local_attention"] = _explain


# ---- the op: schemas, kernels, fakes

_OPERANDS = (
    "Tensor query, Tensor key, Tensor value, Tensor? multiplier, Tensor? bias, Tensor? key_mask, "
    "Tensor[] segment_ids"
)
_RESULTS = "Tensor global_out, Tensor local_out, Tensor global_lse, Tensor local_lse"
_SETTINGS = "int[] pattern, float scale"

KERNELS = Services(
    "global_local_attention",
    {
        "cpu": cpu_service("global_local_attention"),
        "cuda": cuda_service("global_local_attention", global_local_attention_limits),
        "triton": triton_service("global_local_attention"),
        "reference": reference_service("global_local_attention"),
    },
)


def _fake_forward(query, key, value, *_):
    B, H, Lq, _D = query.shape
    lse_dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
    outs = [query.new_empty(B, H, Lq, value.shape[3]) for _ in range(2)]
    return (*outs, *(query.new_empty(B, H, Lq, dtype=lse_dtype) for _ in range(2)))


def _fake_backward(grad_global, grad_local, query, key, value, multiplier, bias, *rest):
    return gradients_like(query, (query, key, value, multiplier, bias), rest[-2])


_op = register(
    KERNELS,
    f"({_OPERANDS}, {_SETTINGS}, str backend) -> ({_RESULTS})",
    f"(Tensor grad_global, Tensor grad_local, {_OPERANDS}, {_RESULTS}, {_SETTINGS}, bool[] needs, "
    "str backend) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _fake_forward,
    _fake_backward,
)
_call = differentiable(_op, learned=5, results=2, saves_results=True)
register_one_by_one(_op)


# ---- FLOPs of the pairs that the pattern keeps; masks and segment ids are data, all visible here


@register_flop_formula(torch.ops.lam_kernels.global_local_attention_fwd)
def _forward_flops(query_shape, key_shape, value_shape, *rest, out_shape=None) -> int:
    """Q K^T once, P V of both halves."""
    D, Dv = query_shape[-1], value_shape[-1]
    near = pair_count(query_shape, key_shape, rest[4])
    return 2 * (pair_count(query_shape, key_shape, ()) * (D + Dv) + near * Dv)


@register_flop_formula(torch.ops.lam_kernels.global_local_attention_bwd)
def _backward_flops(
    global_shape, local_shape, query_shape, key_shape, value_shape, *rest, out_shape=None
) -> int:
    """Q K^T again, dO V^T and dV of both halves, one product for each of dQ and dK."""
    D, Dv = query_shape[-1], value_shape[-1]
    needs = rest[-2]
    grad_query, grad_key, grad_value = needs[:3]
    both = Dv * (grad_value + (grad_query or grad_key or needs[3] or needs[4]))
    whole = pair_count(query_shape, key_shape, ())
    near = pair_count(query_shape, key_shape, rest[8])
    return 2 * (whole * (D * (1 + grad_query + grad_key) + both) + near * both)
