"""Multi-head self-attention with a learned mask."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import lam_kernels
from lam_kernels.low_rank_mask import LowRankMask

from .attention_weights import attention_weights, visible_pairs
from .learnable_attention_mask import LearnableAttentionMask

FUSIONS = ("mul", "add", "gate")


class LAMSelfAttention(nn.Module):
    """Self-attention whose scores meet a learned mask (arXiv 2406.02761, eq. 1 and 6).

        [Q K V] = X W_qkv + b_qkv,  per head of width D = embed_dim / num_heads
        O = softmax_j(fuse(Q K^T / sqrt(D), M), hidden keys left out) V;   Y = concat_h(O) W_out +
        b_out fuse = S * M ("mul"), S + M ("add"), S + log M ("gate")

    M comes from the module's own generator `lam` (fed X, or `mask_input`), or from outside through
    `mask` (global LAM: one mask for several layers). With neither, it is plain attention served by
    the same kernels. Padding: `key_mask` hides keys after the fusion, always; rows that are padding
    are computed and never read by another row (X must be finite there); a row that sees no key
    gives Y = b_out.

    Shapes: x [B, L, embed_dim] -> [B, L, embed_dim]; mask [L, L] or 4-D, each axis full or 1,
    or a LowRankMask; key_mask bool [B, L], True = this key may be seen. dtypes and numerics: those
    of lam_kernels.lam_attention.

    state_dict (stable): `qkv.weight` [3 * embed_dim, embed_dim] (rows: Q, K, V; head h owns D rows
    of each), `qkv.bias`, `out.weight`, `out.bias`, and with a generator `lam.layers.*`.

    Args:
        lam: the generator, a LearnableAttentionMask of in_features = embed_dim and heads 1 or
            num_heads.
        fusion: how a mask from outside is fused; default the generator's, else "mul".
        bias: whether the projections have one.
        dropout: of the attention weights, in training.
        pattern: a pattern of lam_kernels (or one a head) that hides pairs.
        backend: of the op; default the first that serves the call.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        *,
        lam: LearnableAttentionMask | None = None,
        fusion: str | None = None,
        bias: bool = True,
        dropout: float = 0.0,
        pattern=None,
        backend: str | None = None,
        device=None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        if num_heads < 1 or embed_dim < 1 or embed_dim % num_heads:
            raise ValueError(
                f"embed_dim must be a multiple of num_heads, got {embed_dim} and {num_heads}"
            )
        if not 0.0 <= dropout < 1.0:
            raise ValueError(f"dropout must be at least 0 and below 1, got {dropout}")
        if lam is not None:
            if lam.in_features != embed_dim:
                raise ValueError(
                    f"lam.in_features is {lam.in_features}, but embed_dim is {embed_dim}"
                )
            if lam.heads not in (1, num_heads):
                raise ValueError(f"lam.heads must be 1 or {num_heads}, got {lam.heads}")
            if fusion not in (None, lam.fusion):
                raise ValueError(f"fusion is {fusion!r}, but lam was built for {lam.fusion!r}")
            fusion = lam.fusion
        if fusion not in (None, *FUSIONS):
            raise ValueError(f"fusion must be one of {list(FUSIONS)}, got {fusion!r}")
        self.embed_dim, self.num_heads, self.head_dim = embed_dim, num_heads, embed_dim // num_heads
        self.fusion, self.dropout = fusion or "mul", dropout
        self.pattern, self.backend = pattern, backend
        self.qkv = nn.Linear(embed_dim, 3 * embed_dim, bias=bias, device=device, dtype=dtype)
        self.out = nn.Linear(embed_dim, embed_dim, bias=bias, device=device, dtype=dtype)
        self.lam = lam

    def forward(
        self,
        x: Tensor,  # [B, L, embed_dim]
        *,
        mask: Tensor | LowRankMask | None = None,  # [L, L] or [1|B, 1|H, 1|L, 1|L]
        mask_input: Tensor | None = None,  # [B, L, embed_dim], default x
        key_mask: Tensor | None = None,  # bool [B, L]
    ) -> Tensor:  # [B, L, embed_dim]
        query, key, value = self._project(x)
        mask = self._mask(x, mask, mask_input, key_mask)
        out = self.attend(query, key, value, mask, key_mask)
        return self.out(out.transpose(1, 2).flatten(2))

    def attend(self, query, key, value, mask, key_mask) -> Tensor:
        """The one call of the op; [B, H, L, D] in and out. A subclass may attend in another way."""
        options = {
            "pattern": self.pattern,
            "key_mask": key_mask,
            "dropout_p": self.dropout if self.training else 0.0,
            "backend": self.backend,
        }
        if mask is None:
            return lam_kernels.masked_attention(query, key, value, **options)
        return lam_kernels.lam_attention(query, key, value, mask, fusion=self.fusion, **options)

    def attention_weights(
        self,
        x: Tensor,  # [B, L, embed_dim]
        mask: Tensor | LowRankMask | None = None,
        key_mask: Tensor | None = None,
    ) -> Tensor:  # [B, H, L, L]
        """The softmax weights under `mask` (None: no mask, whatever `lam` says), for looking at.

        Plain torch; stores [B, H, L, L]; no dropout. A row that sees no key is 0.
        """
        query, key, _ = self._project(x)
        multiplier, bias = (mask, None) if self.fusion == "mul" else (None, mask)
        if self.fusion == "gate" and mask is not None:
            bias = mask.log()  # no LowRankMask: the op refuses a gate by factors
        return attention_weights(
            query, key, multiplier=multiplier, bias=bias, pattern=self.pattern, key_mask=key_mask
        )

    def _project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        if x.dim() != 3 or x.shape[-1] != self.embed_dim:
            raise ValueError(f"x must be [B, L, {self.embed_dim}], got shape {tuple(x.shape)}")
        # [B, L, 3, H, D] -> three strided views [B, H, L, D], no copy
        return self.qkv(x).unflatten(-1, (3, self.num_heads, self.head_dim)).permute(2, 0, 3, 1, 4)

    def _visible(self, length: int, key_mask: Tensor | None, device: torch.device) -> Tensor:
        """What pattern and key_mask keep: bool [L, L] or [1|B, 1|H, L, L]."""
        visible = visible_pairs(self.pattern, length, length, device)
        return visible if key_mask is None else visible & key_mask[:, None, None, :]

    def _mask(self, x, mask, mask_input, key_mask) -> Tensor | LowRankMask | None:
        if mask is not None:
            if self.lam is not None:
                raise ValueError("mask was given, but this module has its own generator `lam`")
            # a generator guarantees M >= 0; a mask from outside is read once, where reading is free
            readable = self.fusion == "gate" and isinstance(mask, Tensor)
            readable = readable and mask.device.type == "cpu" and _plain(mask)
            if readable and self._negative_where_visible(mask.detach(), x.shape[1], key_mask):
                raise ValueError("fusion='gate' needs a mask M >= 0, but mask has negative values")
            return mask
        if self.lam is None:
            return None
        return self.lam(x if mask_input is None else mask_input)

    def _negative_where_visible(self, mask: Tensor, length: int, key_mask: Tensor | None) -> bool:
        negative = mask < 0
        if not bool(negative.any()):
            return False
        visible = self._visible(length, key_mask, mask.device)
        try:
            return bool((negative & visible).any())
        except RuntimeError:  # shapes that do not fit: the op says so in better words
            return False

    def extra_repr(self) -> str:
        text = f"embed_dim={self.embed_dim}, num_heads={self.num_heads}, fusion={self.fusion!r}"
        text += f", dropout={self.dropout}" if self.dropout else ""
        text += f", pattern={self.pattern!r}" if self.pattern is not None else ""
        return text + (f", backend={self.backend!r}" if self.backend else "")


def _plain(tensor: Tensor) -> bool:
    """Whether its values can be read here: not while tracing, not inside vmap or grad of
    torch.func.
    """
    return (
        not torch.compiler.is_compiling()
        and not torch._C._functorch.is_functorch_wrapped_tensor(tensor)
    )
