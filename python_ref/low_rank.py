"""Masks given by factors: the specification.

    M_ij = rows_i . columns_j + offset_j      rows [B|1,H|1,Lq,r], columns [B|1,H|1,Lk,r],
                                              offset [B|1,H|1,1,Lk] or none

and with G the gradient of M at [B,H,Lq,Lk], 0 where the pair is hidden

    drows = G columns;   dcolumns = G^T rows;   doffset = sum_i G_ij

each summed over the axes that its factor shares. M is formed in the dtype of the sums.

Source: the last linear layer of the generator of LAM (arXiv 2406.02761) eq. 3 to 5 is such a
product; the gradients are those of a matrix product.
"""

from __future__ import annotations

import torch
from torch import Tensor


def product(rows: Tensor, columns: Tensor, offset: Tensor | None, dtype: torch.dtype) -> Tensor:
    """M in `dtype`, differentiable."""
    mask = rows.to(dtype) @ columns.to(dtype).transpose(-1, -2)
    return mask if offset is None else mask + offset.to(dtype)


def factor_gradients(
    grad: Tensor, rows: Tensor, columns: Tensor, offset: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """(drows, dcolumns, doffset) for every sample and head, before the sums over shared axes."""
    dtype = grad.dtype
    return (
        grad @ columns.to(dtype),
        grad.transpose(-1, -2) @ rows.to(dtype),
        grad.sum(-2, keepdim=True),
    )
