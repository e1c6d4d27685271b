"""swap(): finds the attention modules of a model and puts the fused ops into them."""

from __future__ import annotations

import itertools
import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase

import torch
from torch import nn

from lam_kernels.ops import backends
from lam_kernels.patterns import Pattern, encode

from .attend import Settings, refusal, settings_of
from .changes import AddSubmodule, Change, SetAttribute
from .families import FAMILIES, Family, family_of, is_cross_attention, unknown_attention
from .learned_mask import LearnedMask, MaskSource, SharedMask
from .report import Report, SwapError

Patterns = Pattern | Sequence[Pattern | None]

_numbers = itertools.count()
# wrappers that keep a list of the parameters they found when they were built
_CLOSED = ("DistributedDataParallel", "FullyShardedDataParallel")


def swap(
    model: nn.Module,
    *,
    learned_mask: LearnedMask | Mapping[str, LearnedMask | None] | None = None,
    patterns: Patterns | Mapping[str, Patterns] | None = None,
    backend: str | None = None,
    strict: bool = False,
) -> Report:
    """Puts the fused attention of lam_kernels into the attention modules of a model, in place.

        out = softmax(fuse(scale Q K^T, M) + bias, hidden pairs left out) V

    Served: torch.nn.MultiheadAttention (alone and in nn.Transformer...), every transformers module
    that uses its attention interface, the window attention of transformers' Swinv2 and ClapAudio,
    and timm's attention modules. Everything else that looks like attention is left alone and named
    in the report with its reason. Only these instances change: no class, no global, no other model.
    Parameters, buffers, hooks, optimizer references and state_dict keys stay what they are.

    Order: swap before torch.compile, DDP and FSDP (a learned mask has to be there when they collect
    the parameters); before or after peft, a learned mask before it and with
    modules_to_save=["lam"]: one that comes later trains, but peft's save_pretrained does not write
    it, which a warning says. A later model.set_attn_implementation(...) does not reach modules that
    are swapped: undo first.

    Args:
        learned_mask: adds a learned mask to every self-attention module, at the identity, so that
            the outputs are unchanged at step 0. Only keys under "....lam." are added.
        patterns: a pattern (or one a head) that hides pairs in every self-attention module. Where
            keys come from a cache it counts from the last one; a module that turns out to be called
            with another number of keys otherwise raises then, with its name.

        Both may be a mapping from module names (`*` allowed; the whole name first, then the first
        that fits) to these, or to None for modules that are left out. A cross-attention module gets
        one by its whole name only.

        backend: of the op; default the first that serves the call.
        strict: raise when any attention module stays as it is, or when there is none.

    Returns:
        a Report: .changed, .skipped, print() for a table, .check(batch), .undo(); as a context
        manager it undoes at the end of the block. A model swapped twice is undone in reverse order;
        what the second call does not name is kept from the first.

    Raises:
        TypeError, ValueError: naming the argument, what came and what was expected.
        SwapError: strict=True and something stays; nothing is changed then.

    Numerics: those of masked_attention. Dropout draws other random numbers than PyTorch's own.
    """
    _check_arguments(model, learned_mask, patterns, backend)
    learned_masks, patterns = _by_name(learned_mask), _by_name(patterns)
    number = next(_numbers)
    changed: dict[str, str] = {}
    skipped = unknown_attention(model)
    steps: list[Change] = []
    swapped: dict[str, nn.Module] = {}
    makers: dict[int, _Maker] = {}  # of the global masks, by the LearnedMask that asks for one
    for name, module in model.named_modules():
        family = family_of(module)
        if family is None:
            continue
        mask, pattern = _value_for(name, learned_masks), _value_for(name, patterns)
        why = _why_it_stays(module, family, backend, mask, pattern)
        if why:
            skipped[name] = why
            continue
        old = settings_of(module)
        cross = is_cross_attention(name, module)
        source, notes = old.source, []
        if mask is not None and cross and name not in learned_masks:
            notes.append("no learned mask: cross-attention")
            mask = None
        elif mask is not None:
            made = _Maker(family.in_features(module), family.heads(module), _stack(name))
            first = makers.setdefault(id(mask), made) if mask.scope == "global" else made
            why = first.why_not_for(made)
            if why:
                skipped[name] = why
                continue
            shared = first.shared if mask.scope == "global" else None
            source = MaskSource(mask.fusion, makes=first is made, shared=shared)
            if source.makes:
                lam = mask.build(made.width, made.heads, next(module.parameters()))
                steps.append(AddSubmodule(module, "lam", lam))
            notes.append(f"learned mask ({mask.scope}, {mask.fusion})")
        if pattern is not None and cross and name not in patterns:
            notes.append("no pattern: cross-attention")
            pattern = None
        elif pattern is not None:
            notes.append("pattern")
        settings = Settings(
            number,
            name,
            old.backend if backend is None else backend,
            old.pattern if pattern is None else pattern,
            old.pattern_by_name if pattern is None else name in patterns,
            source,
        )
        steps += family.changes(module, mask is not None)
        steps.append(SetAttribute(module, "lam_swap", settings))
        changed[name] = "; ".join(["masked_attention", *notes])
        swapped[name] = module
    for family in FAMILIES:
        steps += family.changes_around(model, set(swapped.values()))
    report = Report(model, number, changed, skipped, swapped, steps)
    if strict and (skipped or not changed):
        raise SwapError(f"strict=True, and not everything can be swapped:\n{report}")
    report.apply()
    if not changed:
        warnings.warn(f"swap() found nothing to swap:\n{report}", stacklevel=2)
    if report.learned_parameters() and _has_adapters(model):
        warnings.warn(
            "the model has adapters of peft already, whose save_pretrained() will not write the "
            'learned masks: swap first and give peft modules_to_save=["lam"], or save '
            "report.learned_parameters() yourself",
            stacklevel=2,
        )
    return report


def check_backend(backend) -> None:
    if backend is None:
        return
    known = backends()
    if not isinstance(backend, str) or backend not in known:
        raise ValueError(f"backend must be one of {', '.join(known)} or None, got {backend!r}")


def _stack(name: str) -> str:
    """The layers that a module is one of: a mask of other tokens has nothing to say to it."""
    return re.sub(r"\d+", "*", name)


def _has_adapters(model: nn.Module) -> bool:
    return any(type(module).__module__.partition(".")[0] == "peft" for module in model.modules())


@dataclass(frozen=True)
class _Maker:
    """A module that makes a learned mask; of a global one, for those that come after it."""

    width: int
    heads: int
    stack: str
    shared: SharedMask = field(default_factory=SharedMask, compare=False)

    def why_not_for(self, other: _Maker) -> str:
        if (other.width, other.heads) != (self.width, self.heads):
            return (
                f"scope='global': it has width {other.width} and {other.heads} heads, the first "
                f"module {self.width} and {self.heads}"
            )
        if other.stack != self.stack:
            return (
                f"scope='global': it is one of {other.stack}, the mask belongs to {self.stack}: "
                "use scope='layer', or give learned_mask by name with another LearnedMask for it"
            )
        return ""


def _check_arguments(model, learned_mask, patterns, backend) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    if isinstance(model, torch.jit.ScriptModule):
        raise TypeError(
            f"model is a {type(model).__name__}, and a scripted or traced model cannot be swapped: "
            "swap the module that it was made of"
        )
    for argument, given, check in (
        ("learned_mask", learned_mask, _check_mask),
        ("patterns", patterns, _check_pattern),
    ):
        if not isinstance(given, Mapping):
            check(given, argument, ", or a mapping from module names to these")
            continue
        names = [name for name, module in model.named_modules() if family_of(module)]
        for key, value in given.items():
            if not isinstance(key, str) or not any(fnmatchcase(name, key) for name in names):
                raise ValueError(f"{argument}: no attention module is called {key!r}")
            check(value, f"{argument}[{key!r}]", "")
    if any(_by_name(learned_mask).values()) and type(model).__name__ in _CLOSED:
        raise ValueError(
            f"model is a {type(model).__name__}, which has collected its parameters already: "
            "swap a learned mask in first, then wrap"
        )
    check_backend(backend)


def _check_mask(value, name: str, more: str) -> None:
    if not isinstance(value, LearnedMask | None):
        raise TypeError(
            f"{name} must be a LearnedMask or None, got {type(value).__name__}"
            + (f" (expected one{more})" if more else "")
        )


def _check_pattern(value, name: str, more: str) -> None:
    several = isinstance(value, Sequence) and not isinstance(value, str) and len(value) > 0
    of_heads = several and all(isinstance(one, Pattern | None) for one in value)
    if not isinstance(value, Pattern | None) and not of_heads:
        kinds = ", ".join(type(one).__name__ for one in value) if several else None
        got = type(value).__name__ + (f" of {kinds}" if kinds else "")
        raise TypeError(
            f"{name} must be a pattern, or a sequence of one pattern (or None) a head{more}; "
            f"got {got}"
        )


def _by_name(given) -> Mapping:
    if given is None:
        return {}
    return given if isinstance(given, Mapping) else {"*": given}


def _value_for(name: str, by_name: Mapping):
    key = name if name in by_name else next((k for k in by_name if fnmatchcase(name, k)), None)
    return by_name.get(key)


def _why_it_stays(module: nn.Module, family: Family, backend: str | None, mask, pattern) -> str:
    if "forward" in module.__dict__:
        return "its forward was replaced on the instance (by a hook of accelerate?): swap first"
    why = family.refusal(module) or refusal(module, family.head_dim(module), backend)
    if why:
        return why
    if mask is not None:
        if settings_of(module).source is not None:
            return "it has a learned mask from an earlier swap"
        if hasattr(module, "lam"):
            return "it has an attribute `lam` of its own, where the learned mask would go"
        if not family.in_features(module) or not family.heads(module):
            return "a learned mask needs the width of its tokens, which was not found in it"
    if pattern is not None:
        try:
            encode(pattern, family.heads(module))
        except (TypeError, ValueError) as error:
            return str(error)
    return ""
