"""Window attention of transformers' Swinv2 and ClapAudio (HTS-AT), which know no interface.

Their layers compute a mask [windows, N, N] of -100 for shifted windows; swapped, a layer hands over
the segment of every position instead, [windows, N], and hidden pairs are hidden.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lam_kernels.ops.window_attention import window_operands

from .attend import attend
from .changes import Change, SetClass, base_of, class_before, swapped_class

_SWINV2, _CLAP = (
    "transformers.models.swinv2.modeling_swinv2",
    "transformers.models.clap.modeling_clap",
)
# attention class -> the class of the layer that makes its masks
_PAGES = {
    (_SWINV2, "Swinv2SelfAttention"): (_SWINV2, "Swinv2Layer"),
    (_CLAP, "ClapAudioSelfAttention"): (_CLAP, "ClapAudioLayer"),
}


def shift_segments(height: int, width: int, window: int, shift: int, device=None) -> Tensor:
    """Segment of every position of every window, [windows, window * window]: the region of the
    image that it had before the cyclic shift (arXiv 2103.14030, figure 4)."""

    def regions(length: int) -> Tensor:
        at = torch.arange(length, device=device)
        return (at >= length - window).long() + (at >= length - shift).long()

    ids = regions(height)[:, None] * 3 + regions(width)[None, :]
    ids = ids.unflatten(1, (-1, window)).unflatten(0, (-1, window))  # rows, y, columns, x
    return ids.transpose(1, 2).reshape(-1, window * window)


def _get_attn_mask(layer: nn.Module, height: int, width: int, dtype=None, device=None):
    if layer.shift_size <= 0:
        return None
    return shift_segments(height, width, layer.window_size, layer.shift_size, device)


def _relative_bias(module: nn.Module) -> Tensor:  # [H, N, N]
    """From the table (ClapAudio), or from the MLP on relative coordinates (Swinv2)."""
    if hasattr(module, "relative_position_bias_table"):
        table = module.relative_position_bias_table
    else:
        table = module.continuous_position_bias_mlp(module.relative_coords_table)
        table = 16 * torch.sigmoid(table.flatten(0, -2))
    N = module.window_size[0] * module.window_size[1]
    return table.t()[:, module.relative_position_index.reshape(-1)].unflatten(1, (N, N))


def _forward(
    module: nn.Module,
    hidden_states: Tensor,  # [windows, N, C]
    attention_mask: Tensor | None = None,  # segments [w, N], or 0 and negative [w, N, N]
    output_attentions: bool | None = False,
) -> tuple[Tensor]:
    if output_attentions:
        raise ValueError(
            "output_attentions=True: the kernels store no attention weights, undo the swap to get "
            "them"
        )
    query, key, value = (
        layer(hidden_states).unflatten(-1, (-1, module.attention_head_size)).transpose(1, 2)
        for layer in (module.query, module.key, module.value)
    )
    scale = module.attention_head_size**-0.5
    if hasattr(module, "logit_scale"):
        query, key = cosine(query, key, module.logit_scale)
        scale = 1.0
    out = attend_windows(
        module, query, key, value, _relative_bias(module), attention_mask, scale,
        hidden_states, module.dropout.p,
    )  # fmt: skip
    return (out.transpose(1, 2).flatten(2),)


def cosine(query: Tensor, key: Tensor, logit_scale: Tensor) -> tuple[Tensor, Tensor]:
    """Operands whose product is exp(min(logit_scale, log 100)) * cos(query, key)."""
    learned = torch.clamp(logit_scale, max=math.log(100.0)).exp()  # [H, 1, 1]
    return F.normalize(query, dim=-1) * learned, F.normalize(key, dim=-1)


def attend_windows(
    module: nn.Module, query, key, value, bias, mask, scale: float, tokens, dropout_p: float
) -> Tensor:  # [windows, H, N, D]
    """window_attention with the module's settings, its dropout, and masks as its caller has
    them."""
    dtype = value.dtype  # under autocast a normalised query is float32
    visible = None
    if mask is not None and mask.dim() == 3:
        # a caller whose layer was not swapped: 0 is visible, -100 or -inf is not
        visible = (mask == 0).repeat(query.shape[0] // mask.shape[0], 1, 1)[:, None]
        mask = None
    operands = window_operands(query, bias, mask)
    return attend(
        module, query.to(dtype), key.to(dtype), value, tokens=tokens, attn_mask=visible,
        scale=scale, dropout_p=dropout_p if module.training else 0.0, **operands,
    )  # fmt: skip


def is_known(module: nn.Module) -> bool:
    return class_before(module) in _PAGES


def refusal(module: nn.Module) -> str:
    return ""


def changes(module: nn.Module, learned: bool) -> list[Change]:
    return [SetClass(module, swapped_class(base_of(module), "forward", _forward))]


def changes_around(root: nn.Module, swapped: set[nn.Module]) -> list[Change]:
    """The layers around swapped modules hand over segments instead of masks."""
    return [
        SetClass(layer, swapped_class(base_of(layer), "get_attn_mask", _get_attn_mask))
        for layer in root.modules()
        if class_before(layer) in _PAGES.values()
        and any(inner in swapped for inner in layer.modules())
    ]


def heads(module: nn.Module) -> int:
    return module.num_attention_heads


def head_dim(module: nn.Module) -> int:
    return module.attention_head_size


def in_features(module: nn.Module) -> int:
    return module.all_head_size
