"""The one call of the op that every swapped module makes, and the settings that it reads."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

import lam_kernels
from lam_kernels.low_rank_mask import LowRankMask
from lam_kernels.patterns import Causal, DilatedToeplitz, Intersection, Pattern, Toeplitz

from .learned_mask import MaskSource, check_last_key, check_right_padded, no_positions


@dataclass(frozen=True)
class Settings:
    """What swap() asked of one module; module.__dict__["lam_swap"]."""

    owner: int  # number of the swap() call, so that undo can tell whose turn it is
    name: str = ""  # of the module, for errors
    backend: str | None = None
    pattern: Pattern | Sequence[Pattern | None] | None = None
    pattern_by_name: bool = False  # by the module's whole name: the caller knows what it is
    source: MaskSource | None = None  # of a learned mask

    def __post_init__(self):
        # the same module is called again inside its own checkpoint, never at the same time
        object.__setattr__(self, "source", self.source and self.source.copy())


_PLAIN = Settings(owner=-1)


def settings_of(module: nn.Module) -> Settings:
    return module.__dict__.get("lam_swap", _PLAIN)


def attend(
    module: nn.Module,
    query: Tensor,  # [B, H, Lq, D]
    key: Tensor,  # [B, Hkv, Lk, D]
    value: Tensor,  # [B, Hkv, Lk, Dv]
    *,
    tokens: Tensor | None = None,  # [B, Lq, in_features], what a learned mask reads
    bias: Tensor | None = None,
    attn_mask: Tensor | None = None,
    key_mask: Tensor | None = None,
    padding: Tensor | None = None,  # whichever of the three says which keys are padding
    pattern: Pattern | None = None,  # beside the module's own
    causal: bool = False,
    cached: bool = False,  # more keys than queries are those of earlier calls
    scale: float | None = None,
    dropout_p: float = 0.0,
) -> Tensor:  # [B, H, Lq, Dv]
    """softmax(fuse(scale Q K^T, M) + bias, hidden pairs left out) V with the module's settings."""
    settings = settings_of(module)
    multiplier, bias, gate = fused_operands(module, query, key, tokens, bias, padding)
    if settings.pattern is not None and query.shape[2] != key.shape[2]:
        if not settings.pattern_by_name and not (cached and query.shape[2] < key.shape[2]):
            raise ValueError(_cross_attention(settings.name, query.shape[2], key.shape[2]))
        if padding is not None:
            check_last_key(padding)
    options = {
        "pattern": visible_pairs(settings.pattern, pattern, causal, query.shape[2], key.shape[2]),
        "attn_mask": attn_mask,
        "key_mask": key_mask,
        "scale": scale,
        "dropout_p": dropout_p,
        "enable_gqa": key.shape[1] != query.shape[1],
        "backend": settings.backend,
    }
    if gate is not None:
        return lam_kernels.lam_attention(query, key, value, gate, fusion="gate", **options)
    return lam_kernels.masked_attention(
        query, key, value, multiplier=multiplier, bias=bias, **options
    )


def _cross_attention(name: str, Lq: int, Lk: int) -> str:
    return (
        f"{name or 'the model'} was called with {Lq} queries and {Lk} keys, none of them from a "
        "cache: that is cross-attention, which a pattern for all modules is not meant for. Give "
        f"patterns by name and leave it out: patterns={{{name!r}: None, '*': ...}}; a pattern "
        "under its whole name counts from the last key"
    )


def fused_operands(
    module: nn.Module, query, key, tokens, bias: Tensor | None, padding: Tensor | None
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """(multiplier, bias, gate) of a call: what came as bias, and the module's learned mask."""
    source = settings_of(module).source
    if source is None:
        return None, bias, None
    if query.shape[2] != key.shape[2]:  # the name is read here only: layers share compiled code
        raise ValueError(no_positions(settings_of(module).name, query.shape[2], key.shape[2]))
    if padding is not None:
        check_right_padded(padding)
    mask = source.take(module, tokens)
    if source.fusion == "mul":
        return mask, bias, None
    if bias is not None and isinstance(mask, LowRankMask):
        mask = mask.dense()  # there is one bias operand, and both are meant for it
    if source.fusion == "add":
        return None, mask if bias is None else mask + bias, None
    return None, None, mask if bias is None else mask * bias.exp()  # log(M e^b) = log M + b


def visible_pairs(
    pattern: Pattern | Sequence[Pattern | None] | None,
    other: Pattern | None,
    causal: bool,
    Lq: int,
    Lk: int,
) -> Pattern | Sequence[Pattern] | None:
    """The pattern of a call: the module's (from the last position on where keys come from a cache),
    another one, and causality."""
    if pattern is not None and Lq != Lk:
        pattern = (
            _from_the_end(pattern)
            if isinstance(pattern, Pattern)
            else [p and _from_the_end(p) for p in pattern]
        )
    if causal:
        # SDPA's own rule, which callers rely on: row i sees the columns 0 .. i
        start = Causal(alignment="start")
        other = start if other is None else other & start
    if other is None:
        return pattern
    if pattern is None:
        return other
    if isinstance(pattern, Pattern):
        return pattern & other
    return [other if p is None else p & other for p in pattern]


def _from_the_end(pattern: Pattern) -> Pattern:
    parts = pattern.parts if isinstance(pattern, Intersection) else (pattern,)
    for part in parts:
        if not isinstance(part, Toeplitz | DilatedToeplitz | Causal):
            raise ValueError(
                f"{type(part).__name__} counts from the first position, so it cannot be used with "
                "a key/value cache, where queries and keys differ in number"
            )
    ends = [dataclasses.replace(part, alignment="end") for part in parts]
    return ends[0] if len(ends) == 1 else Intersection(tuple(ends))


def refusal(module: nn.Module, head_dim: int, backend: str | None) -> str:
    """Why no kernel can serve this module's attention whatever the batch, "" when one can."""
    if head_dim == 0:
        return "its head dim was not found in it"
    if not 1 <= head_dim <= 256:
        return f"its head dim is {head_dim}, the kernels serve 1 to 256"
    parameter = next(module.parameters(), None)
    if parameter is None or parameter.device.type == "meta":  # both are known later only
        return ""
    if not parameter.dtype.is_floating_point:
        return f"its weights are {parameter.dtype}"
    # an empty call: shapes and dtypes are all that explain() reads
    query = torch.empty(1, 1, 0, head_dim, device=parameter.device, dtype=parameter.dtype)
    try:
        found = lam_kernels.explain("masked_attention", query, query, query, backend=backend)
    except TypeError as error:
        return str(error)
    if found.backend:
        return ""
    names = found.reasons if backend is None else (backend,)
    return "; ".join(f"{name}: {', '.join(found.reasons[name])}" for name in names)
