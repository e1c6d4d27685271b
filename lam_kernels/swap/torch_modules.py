"""torch.nn.MultiheadAttention, alone and inside TransformerEncoder, -Decoder and their layers."""

from __future__ import annotations

import warnings

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lam_kernels.nn.attention_weights import attention_weights

from .attend import attend, fused_operands, settings_of, visible_pairs
from .changes import AddPreHook, Change, SetAttribute, SetClass


class SwappedMultiheadAttention(nn.MultiheadAttention):
    """nn.MultiheadAttention with its attention on our kernels: the same parameters, arguments,
    shapes and masks; learned masks and patterns of swap() on top.

    Never built by hand: swap() gives an instance this class, undo() the old one back.
    need_weights=True still returns the weights, which are then computed in plain PyTorch beside the
    kernel (without dropout) and cost what they cost before: pass need_weights=False.
    """

    def forward(
        self,
        query: Tensor,  # [L, B, E], batch_first [B, L, E], or [L, E]
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,  # [B, S] or [S], True = hidden, or added
        need_weights: bool = True,
        attn_mask: Tensor | None = None,  # [L, S] or [B * H, L, S], True = hidden, or added
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        alone = attn_mask is None and key_padding_mask is None and not need_weights
        if query.is_nested and query is key is value and alone and not self.training:
            return self._packed(query), None
        if query.is_nested or key.is_nested or value.is_nested:
            raise ValueError("nested tensors are not served: pad, and pass key_padding_mask")
        if is_causal and attn_mask is None:
            raise RuntimeError("is_causal is a hint about attn_mask: pass the mask as well")
        batched, same = query.dim() == 3, (query is key, key is value)
        if not batched:
            query, key, value = (x.unsqueeze(0) for x in (query, key, value))
            if key_padding_mask is not None:
                key_padding_mask = key_padding_mask.unsqueeze(0)
        elif not self.batch_first:
            query, key, value = (x.transpose(0, 1) for x in (query, key, value))
        q, k, v = self._project(query, key, value, *same)
        # what torch does with the hint, where it does it
        causal = is_causal and key_padding_mask is None and not need_weights
        if causal:
            attn_mask = None
        bias, visible, key_mask = self._masks(attn_mask, key_padding_mask, q, k)
        dropout_p = self.dropout if self.training else 0.0
        padding = None
        if key_padding_mask is not None:
            padding = key_mask if key_mask is not None else key_padding_mask
        weights = None
        if need_weights:
            warnings.warn(
                "need_weights=True, the default of nn.MultiheadAttention: the kernel stores no "
                "weights, so they are computed a second time in plain PyTorch. Pass "
                "need_weights=False where they are not used",
                stacklevel=2,
            )
        out = attend(
            self, q, k, v, tokens=query, bias=bias, attn_mask=visible, key_mask=key_mask,
            padding=padding, causal=causal, dropout_p=dropout_p,
        )  # fmt: skip
        if need_weights:
            weights = self._weights(q, k, query, bias, visible, key_mask)
            weights = weights.mean(dim=1) if average_attn_weights else weights
        # the weight itself, not the module: torch never calls out_proj either
        out = F.linear(out.transpose(1, 2).flatten(2), self.out_proj.weight, self.out_proj.bias)
        if not batched:
            return out.squeeze(0), None if weights is None else weights.squeeze(0)
        return out if self.batch_first else out.transpose(0, 1), weights

    def _packed(self, tokens: Tensor) -> Tensor:
        """Self-attention of the nested tensor that an nn.TransformerEncoder around a swapped layer
        makes of a padded batch in eval, and unpacks at its end."""
        padded = tokens.to_padded_tensor(0.0)
        lengths = torch.tensor([len(x) for x in tokens.unbind()], device=padded.device)
        hidden = torch.arange(padded.shape[1], device=padded.device) >= lengths[:, None]
        out, _ = self.forward(padded, padded, padded, hidden, need_weights=False)
        return torch._nested_tensor_from_mask(out, ~hidden)

    def _project(self, query, key, value, query_is_key: bool, key_is_value: bool):
        """[B, H, L, D] each; views of as few products as the identity of the inputs allows."""
        E, D = self.embed_dim, self.head_dim
        weight, bias = self.in_proj_weight, self.in_proj_bias
        if weight is None:
            weights = (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)
            biases = (None,) * 3 if bias is None else bias.chunk(3)
            projected = [
                F.linear(x, w, b)
                for x, w, b in zip((query, key, value), weights, biases, strict=True)
            ]
        elif query_is_key and key_is_value:
            projected = F.linear(query, weight, bias).chunk(3, dim=-1)
        elif key_is_value:
            first, rest = weight.split([E, 2 * E])
            b_first, b_rest = (None, None) if bias is None else bias.split([E, 2 * E])
            q = F.linear(query, first, b_first)
            projected = [q, *F.linear(key, rest, b_rest).chunk(2, dim=-1)]
        else:
            biases = (None,) * 3 if bias is None else bias.chunk(3)
            projected = [
                F.linear(x, w, b)
                for x, w, b in zip((query, key, value), weight.chunk(3), biases, strict=True)
            ]
        return [x.unflatten(-1, (self.num_heads, D)).transpose(1, 2) for x in projected]

    def _masks(self, attn_mask: Tensor | None, key_padding_mask: Tensor | None, q, k):
        """(bias, attn_mask, key_mask) of the op; torch's booleans say what is hidden."""
        B, H, L, _ = q.shape
        S = k.shape[2]
        bias = visible = key_mask = None
        if attn_mask is not None:
            if attn_mask.shape not in ((L, S), (B * H, L, S)):
                raise ValueError(
                    f"attn_mask must be {[L, S]} or {[B * H, L, S]}, got {list(attn_mask.shape)}"
                )
            pairs = attn_mask.view(1 if attn_mask.dim() == 2 else B, -1, L, S)
            if pairs.dtype == torch.bool:
                visible = ~pairs
            else:
                bias = pairs
        if key_padding_mask is not None:
            if key_padding_mask.shape != (B, S):
                raise ValueError(
                    f"key_padding_mask must be {[B, S]}, got {list(key_padding_mask.shape)}"
                )
            if key_padding_mask.dtype == torch.bool:
                key_mask = ~key_padding_mask
            else:
                keys = key_padding_mask[:, None, None, :]
                bias = keys if bias is None else bias + keys
        return bias, visible, key_mask

    def _weights(self, q, k, tokens, bias, visible, key_mask) -> Tensor:
        multiplier, bias, gate = fused_operands(self, q, k, tokens, bias, None)
        pattern = settings_of(self).pattern
        return attention_weights(
            q, k, multiplier=multiplier, bias=bias if gate is None else gate.log(),
            pattern=visible_pairs(pattern, None, False, q.shape[2], k.shape[2]),
            attn_mask=visible, key_mask=key_mask,
        ).to(q.dtype)  # fmt: skip


def keep_off_the_fast_path(module: nn.Module, args: tuple, kwargs: dict) -> None:
    """Forward pre-hook that does nothing. In eval without gradients nn.TransformerEncoderLayer
    reads the weights of its self_attn and runs a kernel of its own, without calling self_attn,
    unless a hook hangs on it."""


def is_known(module: nn.Module) -> bool:
    return type(module) in (nn.MultiheadAttention, SwappedMultiheadAttention)


def head_dim(module: nn.MultiheadAttention) -> int:
    return module.head_dim


def heads(module: nn.MultiheadAttention) -> int:
    return module.num_heads


def in_features(module: nn.MultiheadAttention) -> int:
    return module.embed_dim


def refusal(module: nn.MultiheadAttention) -> str:
    if module.bias_k is not None:
        return "add_bias_kv=True appends a key that has no position"
    if module.add_zero_attn:
        return "add_zero_attn=True appends a key that has no position"
    return ""


def changes(module: nn.MultiheadAttention, learned: bool) -> list[Change]:
    return [SetClass(module, SwappedMultiheadAttention), AddPreHook(module, keep_off_the_fast_path)]


def changes_around(root: nn.Module, swapped: set[nn.Module]) -> list[Change]:
    """In eval nn.TransformerEncoder packs a padded batch into a nested tensor for the fast path of
    its layers, which a swapped layer does not take."""
    return [
        SetAttribute(module, "use_nested_tensor", False)
        for module in root.modules()
        if isinstance(module, nn.TransformerEncoder)
        and getattr(module, "use_nested_tensor", False)
        and any(inner in swapped for inner in module.modules())
    ]
