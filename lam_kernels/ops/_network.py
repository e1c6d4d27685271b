"""The network that makes a mask of a score row: its checks, its parameters as one tensor, and its
application in plain torch.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from . import _checks

MAX_DEPTH = 64


def network_widths(
    weights: Sequence[Tensor], biases: Sequence[Tensor], Lk: int, query: Tensor
) -> tuple[int, ...]:
    """Lk, h ..., Lk of a network that fits together, or an error."""
    for name, given in (("weights", weights), ("biases", biases)):
        if not isinstance(given, Sequence) or isinstance(given, str):
            raise TypeError(f"{name} must be a sequence of Tensors, got {type(given).__name__}")
    depth = len(weights)
    if not 1 <= depth <= MAX_DEPTH:
        raise ValueError(f"weights must hold 1 to {MAX_DEPTH} matrices, got {depth}")
    if len(biases) != depth:
        raise ValueError(f"biases must hold one vector a weight, {depth}, got {len(biases)}")
    hidden = None
    for at, (weight, bias) in enumerate(zip(weights, biases, strict=True)):
        for name, tensor, axes in (("weights", weight, 2), ("biases", bias, 1)):
            name = f"{name}[{at}]"
            _checks.check_tensor(name, tensor)
            if tensor.dim() != axes:
                raise ValueError(f"{name} must have {axes} axes, got shape {tuple(tensor.shape)}")
            if tensor.dtype not in _checks.FLOAT_DTYPES:
                raise TypeError(
                    f"{name} must be float32, bfloat16, float16 or float64, got {tensor.dtype}"
                )
            if tensor.dtype == torch.float64 and query.dtype != torch.float64:
                raise TypeError(f"{name} may be float64 only when query is, query is {query.dtype}")
            _checks.check_device(name, tensor, query)
        if at == 0 and depth > 1:
            hidden = weight.shape[1]
            if hidden == 0:
                raise ValueError("weights[0] must have at least 1 column, got 0")
        expected = (Lk if at == 0 else hidden, Lk if at == depth - 1 else hidden)
        if tuple(weight.shape) != expected:
            raise ValueError(
                f"weights[{at}] must be {list(expected)} for {Lk} keys, "
                f"got {list(weight.shape)}; a generator of more keys is sliced to the first {Lk}"
            )
        if bias.shape[0] != expected[1]:
            raise ValueError(f"biases[{at}] must be [{expected[1]}], got {list(bias.shape)}")
    return (Lk, *[hidden] * (depth - 1), Lk)


def pack_network(weights: Sequence[Tensor], biases: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    """W_1, b_1, W_2, ... row by row as one vector in the dtype of the sums; differentiable."""
    total = torch.float64 if dtype == torch.float64 else torch.float32
    pairs = zip(weights, biases, strict=True)
    return torch.cat([tensor.reshape(-1).to(total) for pair in pairs for tensor in pair])


def apply_network(
    query: Tensor,
    key: Tensor,
    parameters: Tensor,
    key_mask: Tensor | None,
    widths: Sequence[int],
    scale: float,
    mean: bool,
) -> Tensor:  # [B, H or 1, Lq, Lk]
    """The mask of score_masked_attention, stored, from torch operations."""
    device = query.device.type
    autocast = device != "meta" and torch.is_autocast_enabled(device)
    with torch.autocast(device, enabled=False) if autocast else contextlib.nullcontext():
        mask = scale * (query.to(parameters.dtype) @ key.to(parameters.dtype).mT)
        mask = mask.mean(1, keepdim=True) if mean else mask
        if key_mask is not None:
            mask = mask.masked_fill(~key_mask[:, None, None, :], 0.0)
        at = 0
        for layer, (width, out) in enumerate(pairwise(widths)):
            weight = parameters[at : at + width * out].view(width, out)
            bias = parameters[at + width * out : at + (width + 1) * out]
            at += (width + 1) * out
            mask = F.linear(F.relu(mask) if layer else mask, weight.mT, bias)
    return mask
