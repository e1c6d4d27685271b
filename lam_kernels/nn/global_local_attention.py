"""Multi-head self-attention that sees everything and a neighbourhood: ShareAtt, GateAtt, GateOp."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lam_kernels
from lam_kernels.patterns import Pattern

VARIANTS = ("share", "gate_map", "gate_output")


class GlobalLocalAttention(nn.Module):
    """Global and local self-attention over one projection of query, key and value (GMSA).

        [Q K V] = X W_qkv + b_qkv, per head of width dim / heads;  A^g softmax over all keys, A^l
        softmax over those of the pattern

        "share"        heads 0 .. H/2 - 1 use A^g, the others A^l;        Y = O W + b
        "gate_map"     R = sigmoid(A^g W^g - A^l W^l), W^x [max_len, max_len], shared by the heads;
                       O = (R * A^g + (1 - R) * A^l) V;                   Y = O W + b
        "gate_output"  R = sigmoid(O^g W^gg - O^l W^gl);  Y = R * O^g W^og + (1 - R) * O^l W^ol + b

    pattern=None is plain attention with the same parameters as "share" (only "share" takes it).
    The gates start at 0, which is R = 1/2 everywhere. "gate_map" adds 2 * max_len^2 parameters to
    plain attention, "gate_output" 3 * dim^2; "share" none. A sequence shorter than max_len uses
    exact slices of the [max_len, max_len] gates, because attention to padding is 0.

    Shapes: x [B, L, dim] -> [B, L, dim]; key_mask bool [B, L], True = this key may be seen. dtypes
    and numerics: those of the op that serves it (masked_attention, map_gated_attention,
    global_local_attention). A row that sees no key gives Y = b.

    state_dict (stable): `qkv.*`, `out.*` (W or W^og), with "gate_map" `gate_global`, `gate_local`,
    with "gate_output" `out_local.weight`, `gate_global.weight`, `gate_local.weight`.

    Source: GMSA (arXiv 2110.13992); parameter counts from its model sizes.

    Args:
        pattern: of the local half: a pattern of lam_kernels.
        max_len: the longest sequence, at most 512; needed by "gate_map" only.
        renormalise: with "gate_map", divide each row of the mixed map by its sum.
        bias: whether the projections have one; the gates have none.
        backend: of the op; default the first that serves the call.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        pattern: Pattern | None,
        variant: str = "share",
        max_len: int | None = None,
        *,
        renormalise: bool = False,
        bias: bool = True,
        backend: str | None = None,
        device=None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        if variant not in VARIANTS:
            raise ValueError(f"variant must be one of {list(VARIANTS)}, got {variant!r}")
        if heads < 1 or dim < 1 or dim % heads:
            raise ValueError(f"dim must be a multiple of heads, got {dim} and {heads}")
        if pattern is not None and not isinstance(pattern, Pattern):
            raise TypeError(f"pattern must be a pattern or None, got {type(pattern).__name__}")
        if pattern is None and variant != "share":
            raise ValueError(f"variant {variant!r} needs a pattern")
        if variant == "share" and pattern is not None and heads % 2:
            raise ValueError(f"variant 'share' needs an even number of heads, got {heads}")
        if variant == "gate_map" and (type(max_len) is not int or not 1 <= max_len <= 512):
            raise ValueError(
                f"variant 'gate_map' needs an integer max_len from 1 to 512, got {max_len!r}"
            )
        if renormalise and variant != "gate_map":
            raise ValueError(f"renormalise is for 'gate_map', got variant {variant!r}")
        self.dim, self.heads, self.pattern, self.variant = dim, heads, pattern, variant
        self.max_len, self.renormalise, self.backend = max_len, renormalise, backend
        place = {"device": device, "dtype": dtype}
        self.qkv = nn.Linear(dim, 3 * dim, bias=bias, **place)
        self.out = nn.Linear(dim, dim, bias=bias, **place)
        if variant == "gate_map":
            self.gate_global = nn.Parameter(torch.zeros(max_len, max_len, **place))
            self.gate_local = nn.Parameter(torch.zeros(max_len, max_len, **place))
        elif variant == "gate_output":
            self.out_local = nn.Linear(dim, dim, bias=False, **place)
            self.gate_global = nn.Linear(dim, dim, bias=False, **place)
            self.gate_local = nn.Linear(dim, dim, bias=False, **place)
        self.reset_gates()

    @torch.no_grad()
    def reset_gates(self) -> None:
        """R = 1/2 everywhere."""
        if self.variant == "gate_map":
            self.gate_global.zero_()
            self.gate_local.zero_()
        elif self.variant == "gate_output":
            self.gate_global.weight.zero_()
            self.gate_local.weight.zero_()

    def forward(
        self,
        x: Tensor,  # [B, L, dim]
        *,
        key_mask: Tensor | None = None,  # bool [B, L]
    ) -> Tensor:  # [B, L, dim]
        query, key, value = self._project(x)
        options = {"key_mask": key_mask, "backend": self.backend}
        if self.variant == "gate_output":
            both = lam_kernels.global_local_attention(query, key, value, self.pattern, **options)
            whole, near = (out.transpose(1, 2).flatten(2) for out in both)
            gate = torch.sigmoid(self.gate_global(whole) - self.gate_local(near))
            mixed = gate * F.linear(whole, self.out.weight) + (1 - gate) * self.out_local(near)
            return mixed if self.out.bias is None else mixed + self.out.bias
        if self.variant == "gate_map":
            length = x.shape[1]
            out = lam_kernels.map_gated_attention(
                query, key, value, self.gate_global[:length, :length],
                self.gate_local[:length, :length], self.pattern, renormalise=self.renormalise,
                **options,
            )  # fmt: skip
        else:
            pattern = self.pattern
            if pattern is not None:
                pattern = [None] * (self.heads // 2) + [pattern] * (self.heads // 2)
            out = lam_kernels.masked_attention(query, key, value, pattern=pattern, **options)
        return self.out(out.transpose(1, 2).flatten(2))

    def attention_maps(
        self,
        x: Tensor,  # [B, L, dim]
        key_mask: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:  # A^g, A^l [B, H, L, L]
        """Both maps, for looking at: plain torch, stores [B, H, L, L]."""
        query, key, _ = self._project(x)
        length = x.shape[1]
        dtype = torch.promote_types(query.dtype, torch.float32)
        scores = query.to(dtype) @ key.to(dtype).mT * query.shape[-1] ** -0.5
        seen = torch.ones(length, length, dtype=torch.bool, device=x.device)
        near = seen if self.pattern is None else self.pattern.dense(length, length).to(x.device)
        maps = []
        for visible in (seen, near):
            if key_mask is not None:
                visible = visible & key_mask[:, None, None, :]
            some = visible.any(-1, keepdim=True)
            hidden = scores.masked_fill(~visible & some, -torch.inf)
            maps.append(torch.softmax(hidden, -1) * (visible & some))
        return maps[0], maps[1]

    def _project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        if x.dim() != 3 or x.shape[-1] != self.dim:
            raise ValueError(f"x must be [B, L, {self.dim}], got shape {tuple(x.shape)}")
        if self.variant == "gate_map" and x.shape[1] > self.max_len:
            raise ValueError(f"x has {x.shape[1]} positions, max_len is {self.max_len}")
        # [B, L, 3, H, D] -> three strided views [B, H, L, D], no copy
        return self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)

    def extra_repr(self) -> str:
        text = f"dim={self.dim}, heads={self.heads}, variant={self.variant!r}"
        return f"{text}, pattern={self.pattern!r}"
