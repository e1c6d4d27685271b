"""Which attention modules swap() knows: a table of families, and how the others are found."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

from torch import nn

from lam_kernels.nn.lam_attention import LAMSelfAttention

from . import timm_modules, torch_modules, transformers_interface, window_modules
from .changes import Change


@dataclass(frozen=True)
class Family:
    """One kind of attention module, as functions of an instance."""

    name: str
    is_known: Callable[[nn.Module], bool]
    refusal: Callable[[nn.Module], str]  # why this one stays, "" when it can be swapped
    changes: Callable[[nn.Module, bool], list[Change]]  # (module, gets a learned mask) -> steps
    # what has to change beside them: (model, swapped modules of any family) -> steps
    changes_around: Callable[[nn.Module, set[nn.Module]], list[Change]]
    heads: Callable[[nn.Module], int]
    head_dim: Callable[[nn.Module], int]
    in_features: Callable[[nn.Module], int]  # of a token, 0 where it cannot be found


def _of(page, name: str) -> Family:
    return Family(
        name, page.is_known, page.refusal, page.changes, page.changes_around, page.heads,
        page.head_dim, page.in_features,
    )  # fmt: skip


FAMILIES = (
    _of(torch_modules, "torch.nn.MultiheadAttention"),
    _of(transformers_interface, "transformers' attention interface"),
    _of(window_modules, "transformers' Swinv2 and ClapAudio"),
    _of(timm_modules, "timm"),
)

# what a module that reads another sequence is called by its parent or its class
_CROSS = re.compile(r"cross|encoder_attn|EncDecAttention|multihead_attn", re.IGNORECASE)
# (a FooAttentionOutput is the dense layer behind one)
_ATTENTION = re.compile(r"(attention|attn)(?!\w*output$)", re.IGNORECASE)


def family_of(module: nn.Module) -> Family | None:
    return next((family for family in FAMILIES if family.is_known(module)), None)


def is_cross_attention(name: str, module: nn.Module) -> bool:
    """Whether a learned mask or a pattern makes no sense: rows and columns are two sequences."""
    return bool(_CROSS.search(name.rpartition(".")[2]) or _CROSS.search(type(module).__name__))


def unknown_attention(model: nn.Module) -> dict[str, str]:
    """Modules that look like attention and are of no family, innermost ones only -> why they
    stay."""
    found = {}
    for name, module in model.named_modules():
        if isinstance(module, LAMSelfAttention):
            found[name] = "it is one of lam_kernels' own modules and has the fused op already"
        elif not _looks_like_attention(module) or family_of(module):
            continue
        elif not any(_looks_like_attention(inner) for inner in list(module.modules())[1:]):
            found[name] = _why_unknown(module)
    return found


def _looks_like_attention(module: nn.Module) -> bool:
    if type(module).__module__.startswith("lam_kernels."):
        return isinstance(module, LAMSelfAttention) or family_of(module) is not None
    return bool(_ATTENTION.search(type(module).__name__)) or family_of(module) is not None


def _why_unknown(module: nn.Module) -> str:
    kind = f"{type(module).__module__}.{type(module).__qualname__}"
    if isinstance(module, nn.MultiheadAttention):
        return f"{kind} is a subclass of nn.MultiheadAttention with code of its own"
    return (
        f"{kind} is not known to lam_kernels: call lam_kernels.masked_attention in it, or, where "
        "it calls F.scaled_dot_product_attention, run it under lam_kernels.swap.serve_sdpa()"
    )
