"""timm's plain attention and the window attention of its Swin Transformers."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .attend import attend
from .changes import Change, SetClass, base_of, class_before, swapped_class
from .window_modules import attend_windows, cosine


def _plain_forward(
    module: nn.Module,
    x: Tensor,  # [B, N, C]
    attn_mask: Tensor | None = None,  # 4-D or [N, N], bool (True = visible) or added
    is_causal: bool = False,
) -> Tensor:
    query, key, value = _projected(module, module.qkv(x))
    query, key = module.q_norm(query), module.k_norm(key)
    bias = visible = None
    if attn_mask is not None:
        bias, visible = (None, attn_mask) if attn_mask.dtype == torch.bool else (attn_mask, None)
    out = attend(
        module, query, key, value, tokens=x, bias=bias, attn_mask=visible, causal=is_causal,
        scale=module.scale, dropout_p=module.attn_drop.p if module.training else 0.0,
    )  # fmt: skip
    out = out.transpose(1, 2).flatten(2)
    if getattr(module, "norm", None) is not None:  # as the gate, of later versions
        out = module.norm(out)
    if getattr(module, "gate", None) is not None:
        out = out * module.gate(x).sigmoid()
    return module.proj_drop(module.proj(out))


def _window_forward(
    module: nn.Module,
    x: Tensor,  # [windows, N, C]
    mask: Tensor | None = None,  # [w, N, N], 0 or negative
) -> Tensor:
    if getattr(module, "q_bias", None) is None:
        qkv = module.qkv(x)
    else:
        bias = torch.cat([module.q_bias, module.k_bias, module.v_bias])
        qkv = F.linear(x, module.qkv.weight, bias)
    query, key, value = _projected(module, qkv)
    index = module.relative_position_index
    if hasattr(module, "logit_scale"):
        table = module.cpb_mlp(module.relative_coords_table)
        table = 16 * torch.sigmoid(table.flatten(0, -2))
        query, key = cosine(query, key, module.logit_scale)
        scale = 1.0
    else:
        table, scale = module.relative_position_bias_table, module.scale
    bias = table.t()[:, index.reshape(-1)].unflatten(1, index.shape)
    out = attend_windows(module, query, key, value, bias, mask, scale, x, module.attn_drop.p)
    return module.proj_drop(module.proj(out.transpose(1, 2).flatten(2)))


def _projected(module: nn.Module, qkv: Tensor) -> Tensor:
    return qkv.unflatten(-1, (3, module.num_heads, -1)).permute(2, 0, 3, 1, 4)


_FORWARDS = {
    ("timm.layers.attention", "Attention"): _plain_forward,
    ("timm.models.vision_transformer", "Attention"): _plain_forward,  # where it was until 1.0.16
    ("timm.models.swin_transformer", "WindowAttention"): _window_forward,
    ("timm.models.swin_transformer_v2", "WindowAttention"): _window_forward,
}


def is_known(module: nn.Module) -> bool:
    return class_before(module) in _FORWARDS


def refusal(module: nn.Module) -> str:
    return ""


def changes(module: nn.Module, learned: bool) -> list[Change]:
    forward = _FORWARDS[class_before(module)]
    return [SetClass(module, swapped_class(base_of(module), "forward", forward))]


def changes_around(root: nn.Module, swapped: set[nn.Module]) -> list[Change]:
    return []


def heads(module: nn.Module) -> int:
    return module.num_heads


def head_dim(module: nn.Module) -> int:
    return module.qkv.out_features // (3 * module.num_heads)


def in_features(module: nn.Module) -> int:
    return module.qkv.in_features
