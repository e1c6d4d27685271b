"""The page of attention masked by a network of its scores: public function, checks, schema, FLOPs.

Formulas and their derivation: python_ref/score_masked_attention.py. Kernels: the KERNELS table.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from ..triton import availability
from . import _backends, _checks
from ._autograd import differentiable
from ._backends import Explanation, Services
from ._network import apply_network, network_widths, pack_network
from ._registration import (
    cpu_service,
    gradients_like,
    reference_service,
    register,
    triton_service,
)
from ._vmap import register_one_by_one
from .masked_attention import masked_attention

MAX_KEYS = 128  # of the fused kernels: whole score rows and activations stay in cache


def score_masked_attention(
    query: Tensor,  # [B, H, Lq, D]
    key: Tensor,  # [B, H, Lk, D]
    value: Tensor,  # [B, H, Lk, Dv]
    weights: Sequence[Tensor],  # [Lk, h], [h, h] ..., [h, Lk]
    biases: Sequence[Tensor],  # [h] ..., [Lk]
    *,
    fusion: str = "mul",
    heads: str = "each",
    key_mask: Tensor | None = None,  # bool [B, Lk]
    scale: float | None = None,
    backend: str | None = None,
) -> Tensor:  # out [B, H, Lq, Dv]
    """Cross-attention LAM: the mask is a small network (MLP) of the score row itself.

        S   = scale * Q K^T
        A   = S, or its mean over the heads; 0 at hidden keys
        M   = relu(relu(A W_1 + b_1) ... W_(n-1) + b_(n-1)) W_n + b_n
        out = softmax_j(S * M or S + M, over visible j) V

    One network for all heads and samples. Visible is what key_mask keeps: hidden keys are 0 in the
    network's input and left out of the softmax. Gradients go to query, key, value, every weight and
    every bias.

    Args:
        query, key, value: one dtype of float32, bfloat16, float16, float64 (float64 on "cpu" and
            "reference"), any strides, D and Dv from 1 to 256, one number of heads. Under autocast
            these three are cast, the network's parameters never are.
        weights: 1 to 64 matrices, applied as x @ W: the first [Lk, h], inner ones [h, h], the last
            [h, Lk], any h; a single one is [Lk, Lk]. Any float dtype (float64 only with a float64
            query).
        biases: one vector a weight, as long as its rows.
        fusion: "mul" (scores times M) or "add" (scores plus M).
        heads: "each": the network reads and masks the scores of every head. "mean": it reads the
            mean of the heads' scores, and its one mask serves them all.
        key_mask: booleans [B, Lk], False for padding.
        scale: a float, D ** -0.5 by default.
        backend: "cpu", "cuda", "triton" or "reference"; a named one never falls back. None: the
            first of the device's table that serves the call (never the reference). See explain().

    Returns:
        out in query's dtype, contiguous. A row that sees no key is 0, all its gradients 0. A size
        of 0 in B, H or Lq gives an empty result.

    Raises:
        TypeError, ValueError: naming the argument, what came and what was expected.
        RuntimeError: no backend serves the call (with every reason), or on double backward, which
            only backend="reference" has.

    Numerics: sums, softmax and the network in float32 (float64 for float64) whatever the storage
    dtype; bitwise repeatable for a device and thread count, parameter gradients included. Up to 128
    keys nothing of [B, H, Lq, Lk] is stored: the backward pass computes the activations again,
    block by block. Above 128 keys the call is composed of torch operations and masked_attention,
    which stores M and every layer's activations; explain() says so.

    Source: LAM (arXiv 2406.02761), section 3, cross-attention: M = X(Q K^T).
    """
    arguments = _checked(query, key, value, weights, biases, fusion, heads, key_mask, scale)
    query, key, value, parameters, key_mask, widths, scale, multiply, mean = arguments
    if backend == "reference":
        from python_ref.score_masked_attention import score_masked_attention as reference

        KERNELS.choose(backend, arguments)
        # plain autograd, not the function below: the reference is differentiable more than once
        return reference(
            query, key, value, weights, biases, fusion=fusion, heads=heads, key_mask=key_mask,
            scale=scale,
        )  # fmt: skip
    if key.shape[2] > MAX_KEYS:
        mask = apply_network(query, key, parameters, key_mask, widths, scale, mean)
        operand = {"multiplier" if multiply else "bias": mask}
        return masked_attention(
            query, key, value, **operand, key_mask=key_mask, scale=scale, backend=backend
        )
    backend = KERNELS.choose(backend, arguments)
    learned = (query, key, value, parameters)
    (out,) = _call(learned, (key_mask,), (), (widths, scale, multiply, mean), backend)
    return out


def _checked(query, key, value, weights, biases, fusion, heads, key_mask, scale) -> tuple:
    """The op's forward arguments, or an error. Reads shapes and dtypes only."""
    query, key, value = _checks.cast_under_autocast(query, key, value)
    _checks.check_equal_heads(query, key)
    _checks.check_query_key_value(query, key, value, False)
    B, _, _, D = query.shape
    Lk = key.shape[2]
    if fusion not in ("mul", "add"):
        raise ValueError(f'fusion must be "mul" or "add", got {fusion!r}')
    if heads not in ("each", "mean"):
        raise ValueError(f'heads must be "each" or "mean", got {heads!r}')
    widths = network_widths(weights, biases, Lk, query)
    if key_mask is not None:
        _checks.check_key_mask(key_mask, B, Lk, query)
    scale = D**-0.5 if scale is None else _checks.check_scale(scale)
    parameters = pack_network(weights, biases, query.dtype)
    return query, key, value, parameters, key_mask, widths, scale, fusion == "mul", heads == "mean"


def _explain(
    query, key, value, weights, biases, *, fusion="mul", heads="each", key_mask=None, scale=None,
    backend=None,
) -> Explanation:  # fmt: skip
    arguments = _checked(query, key, value, weights, biases, fusion, heads, key_mask, scale)
    Lk = key.shape[2]
    if Lk <= MAX_KEYS or backend == "reference":
        return KERNELS.explanation(backend, arguments, ())
    note = (
        f"Lk = {Lk} is above {MAX_KEYS}: composed of torch operations and masked_attention; the "
        f"mask and the activations of all {len(weights)} layers are stored"
    )
    query, key, value = arguments[:3]
    mask = query.new_empty(1, 1, 1, 1)
    found = _backends.explain(
        "masked_attention", query, key, value, key_mask=key_mask, backend=backend,
        **{"multiplier" if fusion == "mul" else "bias": mask},
    )  # fmt: skip
    return dataclasses.replace(found, op="score_masked_attention", notes=(*found.notes, note))


_backends.EXPLAINERS["score_masked_attention"] = _explain


# ---- the op: schemas, kernels, fakes

_OPERANDS = "Tensor query, Tensor key, Tensor value, Tensor parameters, Tensor? key_mask"
_SETTINGS = "int[] widths, float scale, bool multiply, bool mean"

KERNELS = Services(
    "score_masked_attention",
    {
        "cpu": cpu_service("score_masked_attention"),
        "triton": triton_service(
            "score_masked_attention", availability.score_masked_attention_limits
        ),
        "reference": reference_service("score_masked_attention"),
    },
)


def _fake_forward(query, key, value, *_):
    return query.new_empty(*query.shape[:3], value.shape[3])


def _fake_backward(grad_out, query, key, value, parameters, *rest):
    return gradients_like(query, (query, key, value, parameters), rest[-2])


_op = register(
    KERNELS,
    f"({_OPERANDS}, {_SETTINGS}, str backend) -> Tensor",
    f"(Tensor grad_out, {_OPERANDS}, {_SETTINGS}, bool[] needs, str backend) -> "
    "(Tensor, Tensor, Tensor, Tensor)",
    _fake_forward,
    _fake_backward,
)
_call = differentiable(_op, learned=4, results=1, saves_results=False, segments=False)
register_one_by_one(_op)


# ---- FLOPs: every key counts, which of them are hidden is data


def _network_flops(query_shape, widths, mean: bool) -> int:
    B, H, Lq, _ = query_shape
    return 2 * B * (1 if mean else H) * Lq * sum(a * b for a, b in pairwise(widths))


@register_flop_formula(torch.ops.lam_kernels.score_masked_attention_fwd)
def _forward_flops(query_shape, key_shape, value_shape, *rest, out_shape=None) -> int:
    """Q K^T, the network, P V."""
    B, H, Lq, D = query_shape
    widths, mean = rest[2], rest[5]
    pairs = B * H * Lq * key_shape[2]
    return 2 * pairs * (D + value_shape[3]) + _network_flops(query_shape, widths, mean)


@register_flop_formula(torch.ops.lam_kernels.score_masked_attention_bwd)
def _backward_flops(
    grad_shape, query_shape, key_shape, value_shape, *rest, out_shape=None
) -> int:  # fmt: skip
    """Q K^T and the network again, dO V^T, one product a gradient; of the network one for its
    weights and one for its inputs."""
    B, H, Lq, D = query_shape
    widths, mean, needs = rest[2], rest[5], rest[-2]
    grad_query, grad_key, grad_value, grad_parameters = needs
    scores = grad_query or grad_key
    pairs = B * H * Lq * key_shape[2]
    width = D * (1 + grad_query + grad_key) + value_shape[3] * (
        grad_value + (scores or grad_parameters)
    )
    network = _network_flops(query_shape, widths, mean)
    return 2 * pairs * width + network * (1 + grad_parameters + (scores or grad_parameters))
