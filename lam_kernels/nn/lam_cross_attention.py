"""Multi-head cross-attention whose mask is a network of its own scores."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import lam_kernels

from .learnable_attention_mask import LearnableAttentionMask

MASK_HEADS = ("each", "mean")


class LAMCrossAttention(nn.Module):
    """Cross-attention whose mask is learned from its scores (arXiv 2406.02761, section 3).

        Q = X W_q + b_q;  [K V] = memory W_kv + b_kv,  per head of width D = embed_dim / num_heads
        S = Q K^T / sqrt(D);  M = lam(S);  O = softmax_j(S * M or S + M, hidden keys left out) V
        Y = concat_h(O) W_out + b_out

    The generator `lam` is a LearnableAttentionMask from max_len scores to max_len mask values, the
    same for all heads and samples; a memory of Lk < max_len positions uses the first Lk rows of its
    first weight and the first Lk columns of its last. Column j belongs to memory position j, so
    memories are padded on the right. Without a generator it is plain cross-attention. Padding:
    hidden keys are 0 in the generator's input and left out of the softmax; memory must be finite
    there. A sample without a key gives Y = b_out.

    Shapes: x [B, Lq, embed_dim], memory [B, Lk, memory_dim] -> [B, Lq, embed_dim]; key_mask bool
    [B, Lk], True = this key may be seen. dtypes and numerics: those of
    lam_kernels.score_masked_attention, which stores neither M nor activations up to 128 keys.

    state_dict (stable): `query.weight` [embed_dim, embed_dim], `query.bias`, `key_value.weight`
    [2 * embed_dim, memory_dim] (rows: K, V; head h owns D rows of each), `key_value.bias`,
    `out.weight`, `out.bias`, and with a generator `lam.layers.*`.

    Args:
        lam: LearnableAttentionMask(max_len, max_len, depth, hidden) of fusion "mul" or "add",
            heads 1, no activation.
        memory_dim: width of the memory; default embed_dim.
        mask_heads: "each" (the generator reads and masks the scores of each head) or "mean" (it
            reads their mean, one mask serves all heads).
        bias: whether the projections have one.
        backend: of the op; default the first that serves the call.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        *,
        lam: LearnableAttentionMask | None = None,
        memory_dim: int | None = None,
        mask_heads: str = "each",
        bias: bool = True,
        backend: str | None = None,
        device=None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        if num_heads < 1 or embed_dim < 1 or embed_dim % num_heads:
            raise ValueError(
                f"embed_dim must be a multiple of num_heads, got {embed_dim} and {num_heads}"
            )
        if mask_heads not in MASK_HEADS:
            raise ValueError(f"mask_heads must be one of {list(MASK_HEADS)}, got {mask_heads!r}")
        if lam is not None:
            if lam.in_features != lam.max_len:
                raise ValueError(
                    "lam must map max_len scores to max_len mask values, got in_features "
                    f"{lam.in_features} and max_len {lam.max_len}"
                )
            for name, allowed in (("heads", (1,)), ("activation", (None,))):
                if getattr(lam, name) not in allowed:
                    raise ValueError(f"lam.{name} must be {allowed[0]}, got {getattr(lam, name)!r}")
            if lam.fusion == "gate":
                raise ValueError("lam.fusion must be 'mul' or 'add', got 'gate'")
        self.embed_dim, self.num_heads, self.head_dim = embed_dim, num_heads, embed_dim // num_heads
        self.memory_dim = embed_dim if memory_dim is None else memory_dim
        self.mask_heads, self.backend = mask_heads, backend
        place = {"bias": bias, "device": device, "dtype": dtype}
        self.query = nn.Linear(embed_dim, embed_dim, **place)
        self.key_value = nn.Linear(self.memory_dim, 2 * embed_dim, **place)
        self.out = nn.Linear(embed_dim, embed_dim, **place)
        self.lam = lam

    def forward(
        self,
        x: Tensor,  # [B, Lq, embed_dim]
        memory: Tensor,  # [B, Lk, memory_dim]
        *,
        key_mask: Tensor | None = None,  # bool [B, Lk]
    ) -> Tensor:  # [B, Lq, embed_dim]
        for name, tensor, width in (("x", x, self.embed_dim), ("memory", memory, self.memory_dim)):
            if tensor.dim() != 3 or tensor.shape[-1] != width:
                raise ValueError(f"{name} must be [B, L, {width}], got shape {tuple(tensor.shape)}")
        query = self.query(x).unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2)
        pair = self.key_value(memory).unflatten(-1, (2, self.num_heads, self.head_dim))
        key, value = pair.permute(2, 0, 3, 1, 4)
        options = {"key_mask": key_mask, "backend": self.backend}
        if self.lam is None:
            out = lam_kernels.masked_attention(query, key, value, **options)
        else:
            weights, biases = self.lam.network(memory.shape[1])
            out = lam_kernels.score_masked_attention(
                query, key, value, weights, biases, fusion=self.lam.fusion, heads=self.mask_heads,
                **options,
            )  # fmt: skip
        return self.out(out.transpose(1, 2).flatten(2))

    def extra_repr(self) -> str:
        text = f"embed_dim={self.embed_dim}, num_heads={self.num_heads}"
        if self.memory_dim != self.embed_dim:
            text += f", memory_dim={self.memory_dim}"
        text += f", mask_heads={self.mask_heads!r}" if self.lam is not None else ""
        return text + (f", backend={self.backend!r}" if self.backend else "")
