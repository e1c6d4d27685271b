"""Attention whose mask is a small network of the scores (cross-attention LAM): the specification.

Shapes: query [B,H,Lq,D], key [B,H,Lk,D], value [B,H,Lk,Dv]. The network has n layers x @ W + b, the
first W [Lk,h], inner ones [h,h], the last [h,Lk] (n = 1: [Lk,Lk]); its parameters are one vector,
W_1, b_1, W_2, ... row by row.

Forward
    S   = scale * Q K^T
    A   = S, or its mean over the heads; 0 where key_mask hides the key
    x_0 = A;   x_l = relu(x_(l-1) W_l + b_l), l < n;   M = x_(n-1) W_n + b_n
    Z   = S * M ("mul") or S + M ("add") where visible, else -inf
    P   = softmax_j(Z)                a row without a visible key: P = 0, out = 0
    O   = P V

Backward, with dO the gradient of the result
    dV = P^T dO;   dP = dO V^T;   dZ = P (dP - rowsum(P dP))
    dM = dZ S ("mul") or dZ, summed over the heads where A is their mean
    dy_n = dM;   dW_l = x_(l-1)^T dy_l;   db_l = sum of dy_l over all rows
    dx_(l-1) = dy_l W_l^T;   dy_(l-1) = dx_(l-1) where x_(l-1) > 0, else 0
    dA = dx_0, 0 where the key is hidden; divided by H where A is the heads' mean
    dS = dZ M ("mul") or dZ, plus dA
    dQ = scale * dS K;   dK = scale * dS^T Q

Source: LAM (arXiv 2406.02761), section 3, M = X(Q K^T). Feeding the scaled score rather than the
raw one only rescales W_1.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from .softmax import dtype_of_sums, no_autocast, softmax_where


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
    upcast: bool = True,
) -> Tensor:  # [B, H, Lq, Dv]
    """The formulas above in plain torch operations, differentiable as often as wanted.

    upcast=True sums in fp32 for fp16, bf16 and fp32 input (fp64 for fp64). upcast=False rounds
    after every operation to the storage dtype.
    """
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    with no_autocast(query):
        total = dtype_of_sums(query.dtype, upcast)
        layers = [(w.to(total), b.to(total)) for w, b in zip(weights, biases, strict=True)]
        *_, probability = _scores(
            query, key, layers, key_mask, scale, fusion == "mul", heads, total
        )
        return (probability @ value.to(total)).to(query.dtype).contiguous()


def score_masked_attention_fwd(
    query, key, value, parameters, key_mask, widths, scale, multiply, mean
) -> Tensor:
    """The op's forward with the op's own arguments."""
    with no_autocast(query):
        total = dtype_of_sums(query.dtype, True)
        layers = unpack(parameters, widths)
        heads = "mean" if mean else "each"
        *_, probability = _scores(query, key, layers, key_mask, scale, multiply, heads, total)
        return (probability @ value.to(total)).to(query.dtype).contiguous()


def score_masked_attention_bwd(
    grad_out, query, key, value, parameters, key_mask, widths, scale, multiply, mean, needs,
    stored=lambda x: x,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """The backward formulas, written out; a gradient that `needs` does not ask for is empty.

    `stored` passes on what a kernel may have rounded on its way into the backward pass.
    """
    with no_autocast(query):
        total = dtype_of_sums(query.dtype, True)
        layers = unpack(parameters, widths)
        heads = "mean" if mean else "each"
        visible, scores, inputs, mask, probability = _scores(
            query, key, layers, key_mask, scale, multiply, heads, total
        )
        H = query.shape[1]
        grad_out = grad_out.to(total)
        grad_probability = grad_out @ value.to(total).transpose(-1, -2)
        delta = (probability * grad_probability).sum(-1, keepdim=True)
        grad_fused = probability * (grad_probability - delta)

        slope = torch.where(visible, grad_fused * scores if multiply else grad_fused, 0.0)
        if mean:
            slope = slope.sum(1, keepdim=True)
        grad_parameters = []
        for (weight, _), x in zip(reversed(layers), reversed(inputs), strict=True):
            rows, grad_rows = x.reshape(-1, x.shape[-1]), slope.reshape(-1, slope.shape[-1])
            grad_parameters += [grad_rows.sum(0), (rows.transpose(0, 1) @ grad_rows).flatten()]
            slope = stored(slope @ weight.transpose(0, 1))
            if x is not inputs[0]:
                slope = torch.where(x > 0, slope, 0.0)
        grad_input = torch.where(visible, slope / H if mean else slope, 0.0)
        grad_scores = torch.where(visible, grad_fused * mask, 0.0) if multiply else grad_fused
        grad_scores = grad_scores + grad_input

        found = (
            (scale * (grad_scores @ key.to(total))).to(query.dtype),
            (scale * (grad_scores.transpose(-1, -2) @ query.to(total))).to(key.dtype),
            (probability.transpose(-1, -2) @ grad_out).to(value.dtype),
            torch.cat(grad_parameters[::-1]).to(parameters.dtype),
        )
        return tuple(
            g.contiguous() if wanted else g.new_empty(0)
            for g, wanted in zip(found, needs, strict=True)
        )


def unpack(parameters: Tensor, widths: Sequence[int]) -> list[tuple[Tensor, Tensor]]:
    """(W, b) of every layer."""
    layers, at = [], 0
    for width, out in pairwise(widths):
        weight = parameters[at : at + width * out].view(width, out)
        at += width * out
        layers.append((weight, parameters[at : at + out]))
        at += out
    return layers


def _scores(query, key, layers, key_mask, scale, multiply, heads, total):
    """(visible, S, the inputs x_0 ... x_(n-1) of all layers, M, P)"""
    B, _, _, _ = query.shape
    Lk = key.shape[2]
    visible = torch.ones(1, 1, 1, Lk, dtype=torch.bool, device=query.device)
    if key_mask is not None:
        visible = key_mask.view(B, 1, 1, Lk)
    scores = scale * (query.to(total) @ key.to(total).transpose(-1, -2))
    x = scores.mean(1, keepdim=True) if heads == "mean" else scores
    inputs = [torch.where(visible, x, 0.0)]
    for weight, bias in layers[:-1]:
        inputs.append(torch.relu(inputs[-1] @ weight + bias))
    weight, bias = layers[-1]
    mask = inputs[-1] @ weight + bias
    fused = scores * mask if multiply else scores + mask
    probability, _ = softmax_where(fused, visible.expand(fused.shape))
    return visible, scores, inputs, mask, probability
