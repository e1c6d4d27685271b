"""The page of window attention: a thin function over masked_attention."""

from __future__ import annotations

import dataclasses

from torch import Tensor

from ..patterns import Segments
from . import _backends, _checks
from ._backends import Explanation, explain
from .masked_attention import masked_attention


def window_attention(
    query: Tensor,  # [B, H, N, D], B windows
    key: Tensor,  # [B, H, N, D]
    value: Tensor,  # [B, H, N, Dv]
    bias: Tensor,  # [H, N, N]
    *,
    segments: Tensor | None = None,  # [windows, N] integers, windows divides B
    scale: float | None = None,
    backend: str | None = None,
) -> Tensor:  # [B, H, N, Dv]
    """Attention inside many small windows with one relative bias for all of them.

        out_i = sum over visible j of  softmax_j(scale * q_i . k_j + bias_ij) v_j

    Visible in window b is what has the same segment: segments[b % windows, i] ==
    segments[b % windows, j], the order in which images are cut into windows. None: everything. So
    the mask of shifted windows is computed from N numbers a window, [windows, N, N] is never
    stored. bias is read by stride and never copied per window; its gradient is summed over the
    windows in the kernel. Cosine scores with a learned scale (Swin V2): normalise query and key,
    multiply query by the scale, and pass scale=1.0.

    dtypes (float32, bfloat16, float16, float64; D and Dv up to 256), autocast, backend, errors and
    numerics: masked_attention. A row that sees no key cannot happen, each sees itself.

    Args:
        bias: any float dtype; a bias of -inf hides. Zeros [H, 1, 1] for none.
        segments: any integer dtype.
        scale: a float, D ** -0.5 by default.

    Raises:
        TypeError, ValueError: naming the argument, what came and what was expected.

    Source: Swin Transformer (arXiv 2103.14030) eq. 4 and its shifted windows; Swin V2 (arXiv
    2111.09883) eq. 2.
    """
    return masked_attention(
        query, key, value, **window_operands(query, bias, segments), scale=scale, backend=backend
    )


def window_operands(query: Tensor, bias: Tensor, segments: Tensor | None) -> dict:
    """bias and segments as keywords of masked_attention."""
    for name, tensor in (("query", query), ("bias", bias)):
        _checks.check_tensor(name, tensor)
    if query.dim() != 4 or bias.dim() != 3:
        raise ValueError(
            "query must be [windows, heads, N, D] and bias [heads, N, N], got shapes "
            f"{tuple(query.shape)} and {tuple(bias.shape)}"
        )
    operands = {"bias": bias.unsqueeze(0)}
    if segments is not None:
        _checks.check_tensor("segments", segments)
        B, N = query.shape[0], query.shape[2]
        if segments.dim() != 2 or segments.shape[1] != N or B % max(1, segments.shape[0]):
            raise ValueError(
                f"segments must be [windows, {N}] with windows dividing {B}, "
                f"got shape {tuple(segments.shape)}"
            )
        if 1 < segments.shape[0] < B:
            segments = segments.repeat(B // segments.shape[0], 1)
        operands["pattern"] = Segments(segments, segments)
    return operands


def _explain_window_attention(
    query, key, value, bias, *, segments=None, scale=None, backend=None
) -> Explanation:
    operands = window_operands(query, bias, segments)
    found = explain("masked_attention", query, key, value, **operands, scale=scale, backend=backend)
    return dataclasses.replace(found, op="window_attention")


_backends.EXPLAINERS["window_attention"] = _explain_window_attention
