"""A learned mask for modules that exist: what to add, and how a module's forward pass gets M."""

from __future__ import annotations

import dataclasses
import threading
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from lam_kernels.low_rank_mask import LowRankMask
from lam_kernels.nn.learnable_attention_mask import LearnableAttentionMask


@dataclass(frozen=True)
class LearnedMask:
    """Which learned mask swap() adds to self-attention modules (LAM, arXiv 2406.02761).

    It starts as the identity, so that the model's outputs are unchanged at step 0, and is a
    submodule named `lam` of the attention module (peft keeps it with modules_to_save=["lam"]).
    Its columns are key positions: sequences are padded on the right and at most max_len long; left
    padding and a key/value cache are refused when they come.

    Args:
        max_len: longest sequence, in tokens as the attention modules see them.
        scope: "layer" (each module reads its own input, the paper's main results) or "global" (the
            first module's generator serves all of one stack of layers, and another stack takes a
            LearnedMask object of its own; not with gradient checkpointing).
        fusion, depth, hidden, activation, mask_form: see lam_kernels.nn.LearnableAttentionMask.
        heads: "shared" (one mask for all heads, as in the paper) or "each".
    """

    max_len: int
    scope: str = "layer"
    fusion: str = "mul"
    depth: int = 1
    hidden: int | None = None
    heads: str = "shared"
    activation: str | None = None
    mask_form: str = "auto"

    def __post_init__(self):
        if type(self.max_len) is not int or self.max_len < 1:
            raise ValueError(f"max_len must be an integer of at least 1, got {self.max_len!r}")
        for name, allowed in (("scope", ("layer", "global")), ("heads", ("shared", "each"))):
            if getattr(self, name) not in allowed:
                raise ValueError(
                    f"{name} must be one of {list(allowed)}, got {getattr(self, name)!r}"
                )
        self.build(1, 1)  # raises what the generator would raise, before any module is touched

    def build(self, in_features: int, heads: int, like: Tensor | None = None):
        """The generator for a module of that width, on the device and in the dtype of `like`."""
        place = {} if like is None else {"device": like.device, "dtype": like.dtype}
        return LearnableAttentionMask(
            in_features,
            self.max_len,
            depth=self.depth,
            hidden=self.hidden,
            heads=heads if self.heads == "each" else 1,
            fusion=self.fusion,
            activation=self.activation,
            mask_form=self.mask_form,
            **place,
        )


class _OfAThread(threading.local):
    """What is kept on the way through a forward pass, for each thread that runs the model."""

    def __reduce__(self):  # a copied or pickled model starts without what a past batch left
        return type(self), ()


class SharedMask(_OfAThread):
    """The mask of a global LAM between the module that makes it and those that use it."""

    mask: Tensor | LowRankMask | None = None


class _Caught(_OfAThread):
    tokens: Tensor | None = None


@dataclass
class MaskSource:
    """Where a module's M comes from: its own generator, or the one that serves all layers."""

    fusion: str
    makes: bool  # this module owns a generator
    shared: SharedMask | None = None  # scope "global"
    # tokens on the way in, where the op is called too far inside
    caught: _Caught = field(default_factory=_Caught, compare=False)

    def take(self, module: nn.Module, tokens: Tensor | None) -> Tensor | LowRankMask:
        """M of this forward pass, [B, 1|H, L, L]."""
        tokens = self.caught.tokens if tokens is None else tokens
        self.caught.tokens = None
        if self.shared is None:
            return module.lam(tokens)
        if torch._C._current_graph_task_id() != -1:
            raise RuntimeError(
                "a learned mask with scope='global' cannot be recomputed layer by layer: use "
                "scope='layer', or switch gradient checkpointing off"
            )
        if self.makes:
            self.shared.mask = module.lam(tokens)
        elif self.shared.mask is None:
            raise RuntimeError(
                "a learned mask with scope='global' was wanted before the first attention module "
                "made it: this model does not run its modules in the order it lists them, use "
                "scope='layer'"
            )
        return self.shared.mask

    def copy(self) -> MaskSource:
        return dataclasses.replace(self, caught=_Caught())


def catch_tokens(module: nn.Module, args: tuple, kwargs: dict) -> None:
    """Forward pre-hook: keeps the hidden states, which the attention function does not get."""
    source = module.__dict__["lam_swap"].source
    source.caught.tokens = args[0] if args else kwargs["hidden_states"]


def no_positions(name: str, length_query: int, length_key: int) -> str:
    """Why a module called like that cannot have a learned mask."""
    return (
        f"{name or 'the model'}: a learned mask has one column for each key position, so it needs "
        f"as many keys as queries: got {length_query} queries and {length_key} keys. A key/value "
        "cache (generate with use_cache=True) and cross-attention cannot have one. Leave such a "
        f"module out by name: learned_mask={{{name!r}: None, '*': LearnedMask(...)}}"
    )


def check_last_key(padding: Tensor) -> None:
    """padding as in check_right_padded: the last query is that of the last key."""
    if padding.dim() == 2:
        return
    _assert_visible(
        padding[..., -1, -1],
        "a pattern counts from the last key where keys come from a cache, but the last query does "
        "not see it: a static cache has places that are not used yet. Use a dynamic one",
    )


def check_right_padded(padding: Tensor) -> None:
    """padding: [B, Lk] or [B, 1|H, 1|Lq, Lk], bool (True = visible) or added to the scores."""
    _assert_visible(
        padding[:, 0] if padding.dim() == 2 else padding[..., 0, 0],
        "a learned mask has one column for each key position, but the first position is hidden: "
        "left padding moves every token to another column. Pad on the right",
    )


def _assert_visible(pairs: Tensor, sentence: str) -> None:
    visible = pairs if pairs.dtype == torch.bool else pairs > torch.finfo(pairs.dtype).min / 2
    if torch.compiler.is_compiling() or visible.device.type != "cpu":
        torch._assert_async(visible.all(), sentence)
    elif not bool(visible.all()):
        raise ValueError(sentence)
