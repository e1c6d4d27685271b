"""A mask that is never stored: the factors of a low-rank matrix as one operand."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

MAX_RANK = 256
_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@dataclass(frozen=True, eq=False)
class LowRankMask:
    """The mask M = rows @ columns^T + offset, as multiplier or bias of masked_attention, never
    stored.

        M_ij = rows_i . columns_j + offset_j

    The kernels build a tile of M where it is used, once for all heads that share it, and fold the
    gradient G of that tile straight into those of the factors:

        drows = G columns;   dcolumns = G^T rows;   doffset = sum_i G_ij
        G = dZ S (multiplier) or dZ (bias), summed over the heads and samples that share M

    No [Lq, Lk] buffer exists in either direction. The last linear layer of a LAM generator has this
    form: rows are its hidden states, columns its weight, offset its bias (arXiv 2406.02761, eq. 3).

    Shapes: rows [B|1, H|1, Lq, r], columns [B|1, H|1, Lk, r], offset [B|1, H|1, 1, Lk] or None;
    each may be shared by batch or heads on its own. The ops take a rank r of 1 to 256; above, pass
    `.dense()`.
    dtypes: float32, bfloat16, float16, float64 (with a float64 query only), each factor its own,
    which its gradient comes back in. Sums in float32 (float64 for float64).

    Edge cases: rows and columns must be finite, like key and value, also where every pair is
    hidden. An offset of -inf in a bias hides its key; an offset is never used at a hidden pair.

    Raises: TypeError, ValueError naming the factor, what came and what was expected.

    Source: LAM (arXiv 2406.02761) eq. 3 to 6; factored biases: FlashBias (arXiv 2505.12044).
    """

    rows: Tensor  # [B|1, H|1, Lq, r]
    columns: Tensor  # [B|1, H|1, Lk, r]
    offset: Tensor | None = None  # [B|1, H|1, 1, Lk]

    def __post_init__(self) -> None:
        named = {"rows": self.rows, "columns": self.columns, "offset": self.offset}
        for name, factor in named.items():
            if factor is None and name == "offset":
                continue
            if not isinstance(factor, Tensor):
                raise TypeError(
                    f"LowRankMask: {name} must be a Tensor, got {type(factor).__name__}"
                )
            if factor.dtype not in _DTYPES:
                raise TypeError(
                    f"LowRankMask: {name} must be float32, bfloat16, float16 or float64, "
                    f"got {factor.dtype}"
                )
            if factor.layout != torch.strided:
                raise ValueError(
                    f"LowRankMask: {name} must be dense (torch.strided), got {factor.layout}"
                )
            if factor.dim() != 4:
                raise ValueError(
                    f"LowRankMask: {name} must have 4 axes, [B|1, H|1, "
                    + ("1, Lk]" if name == "offset" else "L, rank]")
                    + f", got shape {tuple(factor.shape)}"
                )
            if factor.device != self.rows.device:
                raise ValueError(
                    f"LowRankMask: {name} must be on the device of rows, {self.rows.device}, "
                    f"got {factor.device}"
                )
        if self.rank < 1 or self.columns.shape[3] != self.rank:
            raise ValueError(
                "LowRankMask: rows and columns must have one rank of at least 1, "
                f"got {self.rank} and {self.columns.shape[3]}"
            )
        if self.offset is not None:
            length = self.columns.shape[2]
            if self.offset.shape[2] != 1 or self.offset.shape[3] != length:
                raise ValueError(
                    f"LowRankMask: offset must be [B|1, H|1, 1, {length}] to match columns "
                    f"{tuple(self.columns.shape)}, got {tuple(self.offset.shape)}"
                )
        for axis, letter in ((0, "B"), (1, "H")):
            sizes = {f.shape[axis] for f in self.factors() if f.shape[axis] != 1}
            if len(sizes) > 1:
                raise ValueError(
                    f"LowRankMask: axis {letter} of the factors must be 1 or one size, "
                    f"got {[f.shape[axis] for f in self.factors()]}"
                )

    @property
    def rank(self) -> int:
        return self.rows.shape[3]

    def factors(self) -> tuple[Tensor, ...]:
        """rows, columns and, if there is one, offset."""
        given = (self.rows, self.columns, self.offset)
        return given if self.offset is not None else given[:2]

    def dense(self) -> Tensor:  # [B|1, H|1, Lq, Lk]
        """M itself, differentiable, in the factors' promoted dtype."""
        dtype = self.rows.dtype
        for factor in self.factors():
            dtype = torch.promote_types(dtype, factor.dtype)
        product = self.rows.to(dtype) @ self.columns.to(dtype).mT
        return product if self.offset is None else product + self.offset.to(dtype)
