"""Attention modules of transformers that look their function up by name (AttentionInterface)."""

from __future__ import annotations

import functools
import inspect
import sys
import warnings

import torch
from torch import Tensor, nn

from lam_kernels.optional_package import optional_package

from .attend import attend
from .changes import AddPreHook, Change, SetAttribute
from .learned_mask import catch_tokens

NAME = "lam_kernels"

# names of the query projection, in the order tried; its width is what a learned mask reads
_QUERY_PROJECTIONS = (
    "q_proj", "query", "q", "qkv_proj", "qkv", "query_key_value", "c_attn", "q_lin", "Wqkv",
    "q_a_proj",
)  # fmt: skip
_HEAD_COUNTS = ("num_attention_heads", "num_heads", "n_heads")
# whose masks this family understands: a boolean one or None, or one that is added
_UNDERSTOOD = ("sdpa", "eager", NAME, None)
# module attributes and call keywords that change the formula
_SOFTCAPS = ("attn_logit_softcapping", "softcap", "logits_soft_cap")
_OTHER_FORMULAS = {
    "softcap": "caps the scores",
    "s_aux": "adds a sink to the softmax",
    "sinks": "adds a sink to the softmax",
    "cache": "reads keys from a paged cache",
    "indices": "attends to keys that it picks by index",
    "topk_indices": "attends to keys that it picks by index",
    "block_indices": "attends to blocks of keys that it picks by index",
}


def register_transformers() -> None:
    """Makes attn_implementation="lam_kernels" known to transformers, with its mask function.

    For models that are chosen by name instead of swapped: from_pretrained(...,
    attn_implementation="lam_kernels") or model.set_attn_implementation("lam_kernels"). Adds one
    entry to two tables of transformers and changes no model; may be called again. Models that do
    not use transformers' attention interface ignore the name with a log line: swap() serves or
    names them. UserError where transformers is not installed.
    """
    transformers = optional_package("transformers", "register_transformers()")
    masking = optional_package("transformers.masking_utils", "register_transformers()")
    # without a mask function of the same name padding would be dropped without a word
    transformers.AttentionMaskInterface.register(NAME, masking.sdpa_mask)
    transformers.AttentionInterface.register(NAME, interface_attention)


def interface_attention(
    module: nn.Module,
    query: Tensor,  # [B, H, Lq, D]
    key: Tensor,  # [B, Hkv, Lk, D]
    value: Tensor,
    attention_mask: Tensor | None,  # bool (True = visible) or added, 4-D
    scaling: float | None = None,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    position_bias: Tensor | None = None,
    **keywords,
) -> tuple[Tensor, None]:  # [B, Lq, H, Dv]
    """transformers' attention function: what the registered name stands for.

    attention_mask None means "no padding": causality is then applied here, by the keyword or else
    the module's attribute (transformers' own rule for sdpa). Masks made for eager attention have
    the causality in them: without one nothing is hidden.
    """
    for name, what in _OTHER_FORMULAS.items():
        if keywords.get(name) is not None:
            raise ValueError(
                f"{type(module).__name__} {what} ({name}), which the kernels do not: use "
                'attn_implementation="eager" for this model'
            )
    if _wants_weights(module, keywords.get("output_attentions")):
        warnings.warn(
            "output_attentions=True: the kernels store no attention weights, None is returned. "
            'Use attn_implementation="eager" where they are wanted, without a swap',
            stacklevel=2,
        )
    if query.shape[0] == 1 and key.shape[0] > 1:  # learned queries, one set for the batch
        query = query.expand(key.shape[0], -1, -1, -1)
    causal, bias, visible = False, position_bias, None
    if attention_mask is None:
        causal = query.shape[2] > 1 and _is_causal(module, is_causal)
    elif attention_mask.dtype == torch.bool:
        visible = attention_mask
    else:
        bias = attention_mask if bias is None else attention_mask + bias
    out = attend(
        module, query, key, value, bias=bias, attn_mask=visible, padding=attention_mask,
        causal=causal, cached=_may_have_cache(module, is_causal), scale=scaling, dropout_p=dropout,
    )  # fmt: skip
    return out.transpose(1, 2).contiguous(), None


def _is_causal(module: nn.Module, keyword: bool | None) -> bool:
    made_for = getattr(getattr(module, "config", None), "_masks_made_for", NAME)
    if made_for in ("eager", None):
        return False
    said = getattr(module, "is_causal", None) if keyword is None else keyword
    if said is None and made_for == NAME:
        raise ValueError(
            f"{type(module).__name__} does not say whether it is causal, and there is no mask: "
            'use attn_implementation="eager" and lam_kernels.swap.swap(model)'
        )
    return said is None or bool(said)


def _wants_weights(module: nn.Module, keyword: bool | None) -> bool:
    if keyword is not None:
        return keyword
    return bool(getattr(getattr(module, "config", None), "output_attentions", False))


def _may_have_cache(module: nn.Module, keyword: bool | None) -> bool:
    # only decoders have one; who does not say is one, as in transformers' rule for sdpa
    said = getattr(module, "is_causal", None) if keyword is None else keyword
    return said is None or bool(said)


def is_known(module: nn.Module) -> bool:
    if "transformers" not in sys.modules:
        return False
    forward = getattr(type(module), "forward", None)  # scripted modules have none
    code = getattr(inspect.unwrap(forward), "__code__", None)
    return code is not None and "ALL_ATTENTION_FUNCTIONS" in code.co_names


def refusal(module: nn.Module) -> str:
    config = module.__dict__.get("config")
    if config is None:
        return "it has no config to name an attention function in"
    chosen = getattr(config, "_attn_implementation", None)
    if chosen not in _UNDERSTOOD:
        return (
            f'its attn_implementation is "{chosen}", whose masks have another form: '
            'call model.set_attn_implementation("sdpa") first'
        )
    for place in (module, config):
        for name in _SOFTCAPS:
            if getattr(place, name, None) is not None:
                return f"it caps its scores ({name})"
    for name in ("sinks", "sink_proj"):
        if getattr(module, name, None) is not None:
            return f"its softmax has a sink ({name})"
    if getattr(module, "indexer", None) is not None:
        return "it picks its keys by an index of its own (indexer)"
    if _masks_by_name(module):
        return "it makes other masks for other attention functions than transformers' own"
    return ""


def _masks_by_name(module: nn.Module) -> bool:
    """Does the module's own forward ask whether its function is one of transformers' own? With our
    name it would then leave out what it does for those."""
    constants = inspect.unwrap(type(module).forward).__code__.co_consts
    return any(
        isinstance(one, tuple | frozenset) and {"eager", "sdpa"} <= {*one} for one in constants
    )


def heads(module: nn.Module) -> int:
    for place in (module, module.config):
        for name in _HEAD_COUNTS:
            if isinstance(getattr(place, name, None), int):
                return getattr(place, name)
    return 0


def head_dim(module: nn.Module) -> int:
    for name in ("head_dim", "attention_head_size", "key_value_proj_dim", "qk_head_dim"):
        if isinstance(getattr(module, name, None), int):
            return getattr(module, name)
    count = heads(module)
    return _query_width(module) // count if count else 0


def in_features(module: nn.Module) -> int:
    """0 where its tokens do not come as hidden_states, which is what catch_tokens takes."""
    known = inspect.signature(inspect.unwrap(type(module).forward)).parameters
    return _query_width(module) if "hidden_states" in known else 0


def _query_width(module: nn.Module) -> int:
    for name in _QUERY_PROJECTIONS:
        projection = getattr(module, name, None)
        width = getattr(projection, "in_features", getattr(projection, "nx", None))  # of a Conv1D
        if width is not None:
            return width
    return 0


def changes(module: nn.Module, learned: bool) -> list[Change]:
    register_transformers()
    steps: list[Change] = [SetAttribute(module, "config", view_of(module.config))]
    if learned:
        steps.append(AddPreHook(module, catch_tokens))
    return steps


def changes_around(root: nn.Module, swapped: set[nn.Module]) -> list[Change]:
    return []


def view_of(config):
    """The same configuration with another attention function.

    It shares the attributes of the original, so that it never goes stale; the original, which
    belongs to the whole model and maybe to other models, is not touched.
    """
    if type(config).__name__.startswith("Swapped"):
        return config
    view = object.__new__(_view_class(type(config)))
    object.__setattr__(view, "__dict__", config.__dict__)
    return view


@functools.cache
def _view_class(config_class: type) -> type:
    return type(
        f"Swapped{config_class.__name__}",
        (config_class,),
        {
            "_attn_implementation": NAME,
            "_masks_made_for": getattr(config_class, "_attn_implementation", None),  # a property
            "__reduce_ex__": _reduce_view,
        },
    )


def _reduce_view(view, protocol):
    """Copied and pickled by way of the original class: the view's own has no importable name."""
    return _restored_view, (type(view).__bases__[0], view.__dict__)


def _restored_view(config_class: type, attributes: dict):
    original = object.__new__(config_class)
    object.__setattr__(original, "__dict__", attributes)
    return view_of(original)
