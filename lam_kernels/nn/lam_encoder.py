"""Transformer encoder with a learned mask in each layer, or one for all of them."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lam_kernels.low_rank_mask import LowRankMask

from .lam_attention import LAMSelfAttention
from .learnable_attention_mask import LearnableAttentionMask


class LAMEncoderLayer(nn.Module):
    """One transformer block whose attention has a learned mask (arXiv 2406.02761, eq. 6 in place of
    eq. 1).

        pre-norm  (norm_first):  n = LN1(x);  x' = x + attention(n);  y = x' + FF(LN2(x'))
        post-norm:               x' = LN1(x + attention(x));          y = LN2(x' + FF(x'))
        FF(x) = gelu(x W_1 + b_1) W_2 + b_2

    The generator reads what Q and K read: n in a pre-norm block, x in a post-norm one (eq. 6: the
    input of the layer). mask_input="raw" feeds it x in a pre-norm block as well.

    Shapes: x [B, L, embed_dim] -> the same; mask and key_mask as in LAMSelfAttention. Padded rows
    are computed and never read by another row; they must be finite.

    state_dict (stable): `norm1.*`, `attention.*` (see LAMSelfAttention), `norm2.*`,
    `feedforward.0.*`, `feedforward.3.*`.

    Args:
        feedforward: hidden width of FF; default 4 * embed_dim.
        lam: this layer's generator, or None: then `mask` may come from outside.
        norm_first: pre-norm (default) or post-norm.
        dropout: after attention, in and after FF; attention_dropout: of the attention weights.
        norm_eps: of both LayerNorms.
        mask_input: "normed" (default) or "raw", see above.
        attention_type: the class of the attention, called like LAMSelfAttention.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        feedforward: int | None = None,
        *,
        lam: LearnableAttentionMask | None = None,
        fusion: str | None = None,
        norm_first: bool = True,
        dropout: float = 0.0,
        attention_dropout: float = 0.0,
        norm_eps: float = 1e-5,
        mask_input: str = "normed",
        pattern=None,
        backend: str | None = None,
        attention_type: type[LAMSelfAttention] = LAMSelfAttention,
        device=None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        if mask_input not in ("normed", "raw"):
            raise ValueError(f"mask_input must be 'normed' or 'raw', got {mask_input!r}")
        feedforward = 4 * embed_dim if feedforward is None else feedforward
        place = {"device": device, "dtype": dtype}
        self.norm_first, self.mask_input = norm_first, mask_input
        self.norm1 = nn.LayerNorm(embed_dim, eps=norm_eps, **place)
        self.attention = attention_type(
            embed_dim,
            num_heads,
            lam=lam,
            fusion=fusion,
            dropout=attention_dropout,
            pattern=pattern,
            backend=backend,
            **place,
        )
        self.norm2 = nn.LayerNorm(embed_dim, eps=norm_eps, **place)
        self.feedforward = nn.Sequential(
            nn.Linear(embed_dim, feedforward, **place),
            nn.GELU(),
            nn.Dropout(dropout),
            nn.Linear(feedforward, embed_dim, **place),
        )
        self.dropout = nn.Dropout(dropout)

    def forward(
        self,
        x: Tensor,  # [B, L, embed_dim]
        *,
        mask: Tensor | LowRankMask | None = None,
        key_mask: Tensor | LowRankMask | None = None,  # bool [B, L]
    ) -> Tensor:  # [B, L, embed_dim]
        if self.norm_first:
            normed = self.norm1(x)
            tokens = normed if self.mask_input == "normed" else x
            attended = self.attention(normed, mask=mask, mask_input=tokens, key_mask=key_mask)
            x = x + self.dropout(attended)
            return x + self.dropout(self.feedforward(self.norm2(x)))
        x = self.norm1(x + self.dropout(self.attention(x, mask=mask, key_mask=key_mask)))
        return self.norm2(x + self.dropout(self.feedforward(x)))

    def extra_repr(self) -> str:
        return f"norm_first={self.norm_first}, mask_input={self.mask_input!r}"


class LAMEncoder(nn.Module):
    """A stack of LAMEncoderLayer with the two scopes of the paper (arXiv 2406.02761, section 3).

        scope="layer"  (multi-layer LAM): layer i makes its own mask M_i = X_i(input of layer i)
        scope="global": one generator reads the input sequence of the first layer; its M serves all
        layers

    The paper's main results use "layer". max_len=None builds the encoder without a LAM; a mask may
    then come from outside.

    Shapes: x [B, L, embed_dim] with L <= max_len -> the same; key_mask bool [B, L], True = a real
    token. With a key_mask, padded rows of x are set to 0 at the entry, so that whatever they hold
    (NaN too) reaches no other row and no gradient; the padded rows that come back are not
    meaningful.

    state_dict (stable): `layers.<i>.*` (see LAMEncoderLayer; scope "layer" has
    `layers.<i>.attention.lam.*`), scope "global" has `lam.layers.*`, and a pre-norm encoder has the
    final `norm.weight`, `norm.bias`.

    Args:
        max_len, mask_depth, mask_hidden, mask_heads, mask_init, mask_activation, mask_form, fusion:
            see LearnableAttentionMask.
        the others: see LAMEncoderLayer.
    """

    def __init__(
        self,
        num_layers: int,
        embed_dim: int,
        num_heads: int,
        max_len: int | None = None,
        *,
        scope: str = "layer",
        fusion: str = "mul",
        mask_depth: int = 1,
        mask_hidden: int | None = None,
        mask_heads: int = 1,
        mask_init: str = "identity",
        mask_activation: str | None = None,
        mask_form: str = "auto",
        feedforward: int | None = None,
        norm_first: bool = True,
        dropout: float = 0.0,
        attention_dropout: float = 0.0,
        norm_eps: float = 1e-5,
        mask_input: str = "normed",
        pattern=None,
        backend: str | None = None,
        attention_type: type[LAMSelfAttention] = LAMSelfAttention,
        device=None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        if num_layers < 1:
            raise ValueError(f"num_layers must be at least 1, got {num_layers}")
        if scope not in ("layer", "global"):
            raise ValueError(f"scope must be 'layer' or 'global', got {scope!r}")
        if mask_heads not in (1, num_heads):
            raise ValueError(f"mask_heads must be 1 or {num_heads}, got {mask_heads}")
        place = {"device": device, "dtype": dtype}

        def generator() -> LearnableAttentionMask:
            return LearnableAttentionMask(
                embed_dim,
                max_len,
                depth=mask_depth,
                hidden=mask_hidden,
                heads=mask_heads,
                fusion=fusion,
                init=mask_init,
                activation=mask_activation,
                mask_form=mask_form,
                **place,
            )

        self.scope = scope if max_len is not None else None
        self.lam = generator() if self.scope == "global" else None
        self.layers = nn.ModuleList(
            LAMEncoderLayer(
                embed_dim,
                num_heads,
                feedforward,
                lam=generator() if self.scope == "layer" else None,
                fusion=fusion,
                norm_first=norm_first,
                dropout=dropout,
                attention_dropout=attention_dropout,
                norm_eps=norm_eps,
                mask_input=mask_input,
                pattern=pattern,
                backend=backend,
                attention_type=attention_type,
                **place,
            )
            for _ in range(num_layers)
        )
        self.norm = nn.LayerNorm(embed_dim, eps=norm_eps, **place) if norm_first else nn.Identity()

    def forward(
        self,
        x: Tensor,  # [B, L, embed_dim]
        *,
        mask: Tensor | LowRankMask | None = None,
        key_mask: Tensor | LowRankMask | None = None,  # bool [B, L]
    ) -> Tensor:  # [B, L, embed_dim]
        if mask is not None and self.scope is not None:
            raise ValueError(f"mask was given, but this encoder has a LAM of scope {self.scope!r}")
        if key_mask is not None:
            if key_mask.dtype != torch.bool or key_mask.shape != x.shape[:2]:
                raise ValueError(
                    f"key_mask must be bool {list(x.shape[:2])}, got {key_mask.dtype} "
                    f"{list(key_mask.shape)}"
                )
            x = x.masked_fill(~key_mask.unsqueeze(-1), 0.0)
        if self.lam is not None:
            mask = self.lam(x)
        for layer in self.layers:
            x = layer(x, mask=mask, key_mask=key_mask)
        return self.norm(x)

    def extra_repr(self) -> str:
        return f"scope={self.scope!r}"
