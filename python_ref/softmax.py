"""What the specifications share: softmax over the visible keys of a row, dtypes, and sums over
broadcast axes.
"""

from __future__ import annotations

import contextlib

import torch
from torch import Tensor


def softmax_where(
    scores: Tensor,  # [..., Lq, Lk]
    visible: Tensor,  # bool, broadcasts to it
) -> tuple[Tensor, Tensor]:  # P [..., Lq, Lk], lse [..., Lq]
    """Softmax over the visible keys; a row that sees none has P = 0 and lse = -inf.

    A hidden score is never used: NaN there changes nothing and its gradient is 0.
    """
    row_seen = visible.any(-1, keepdim=True)
    # hidden pairs are exp of 0 and then 0: the gradient of a where is 0 * whatever the other branch
    # holds
    safe = torch.where(visible, scores, 0.0)
    with torch.no_grad():  # the largest score keeps exp in range, P and lse do not depend on it
        if safe.shape[-1] == 0:
            largest = safe.new_zeros(*safe.shape[:-1], 1)
        else:
            largest = torch.where(visible, safe, -torch.inf).amax(-1, keepdim=True)
        largest = torch.where(row_seen, largest, 0.0)
    exponent = torch.where(visible, safe - largest, 0.0)
    weights = torch.where(visible, torch.exp(exponent), 0.0)
    sums = torch.where(row_seen, weights.sum(-1, keepdim=True), 1.0)
    lse = torch.where(row_seen, largest + torch.log(sums), -torch.inf).squeeze(-1)
    return weights / sums, lse


def dtype_of_sums(dtype: torch.dtype, upcast: bool) -> torch.dtype:
    """fp32 for half types when the specification is asked for itself, else the storage dtype."""
    half = dtype in (torch.float16, torch.bfloat16)
    return torch.float32 if half and upcast else dtype


def sum_to(grad: Tensor, operand: Tensor) -> Tensor:
    """Sum over the operand's broadcast axes; for key and value over the heads that share one."""
    if operand.shape[1] not in (1, grad.shape[1]):
        B, H, L, D = grad.shape
        grad = grad.reshape(B, operand.shape[1], H // operand.shape[1], L, D).sum(2)
    return grad.sum_to_size(operand.shape).to(operand.dtype).contiguous()


def no_autocast(tensor: Tensor):
    """Autocast would round the products here; what to cast was decided at the front door."""
    device = tensor.device.type
    if device != "meta" and torch.is_autocast_enabled(device):  # meta has no autocast to ask about
        return torch.autocast(device, enabled=False)
    return contextlib.nullcontext()
