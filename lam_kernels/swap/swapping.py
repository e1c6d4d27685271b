"""swap(): finds the attention modules of a model and puts the fused ops into them."""

from __future__ import annotations

import itertools
import re
import warnings
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase

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
    learned_mask: LearnedMask | None = None,
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
    the parameters); before or after peft, with modules_to_save=["lam"] when a learned mask was
    added before it.

    Args:
        learned_mask: adds a learned mask to every self-attention module, at the identity, so that
            the outputs are unchanged at step 0. Only keys under "....lam." are added.
        patterns: a pattern (or one a head) that hides pairs in every self-attention module, or a
            mapping from module names (`*` allowed, a whole name first) to patterns; a
            cross-attention module gets one by its whole name only.
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
    number = next(_numbers)
    changed: dict[str, str] = {}
    skipped = unknown_attention(model)
    steps: list[Change] = []
    swapped: dict[str, nn.Module] = {}
    shared = SharedMask() if learned_mask is not None and learned_mask.scope == "global" else None
    makers: list[tuple[int, int, str]] = []  # (width, heads, stack) of the global mask
    for name, module in model.named_modules():
        family = family_of(module)
        if family is None:
            continue
        pattern = _pattern_for(name, patterns)
        why = _why_it_stays(module, family, backend, learned_mask, pattern)
        if why:
            skipped[name] = why
            continue
        old = settings_of(module)
        cross = is_cross_attention(name, module)
        source, notes = old.source, []
        wanted = learned_mask if not cross else None
        if wanted is not None:
            width, heads = family.in_features(module), family.heads(module)
            if shared is not None and makers and makers[0][:2] != (width, heads):
                skipped[name] = (
                    f"scope='global': it has width {width} and {heads} heads, the first module "
                    f"{makers[0][0]} and {makers[0][1]}"
                )
                continue
            if shared is not None and makers and makers[0][2] != _stack(name):
                skipped[name] = (
                    f"scope='global': it is one of {_stack(name)}, the mask belongs to "
                    f"{makers[0][2]}: use scope='layer'"
                )
                continue
            source = MaskSource(wanted.fusion, makes=shared is None or not makers, shared=shared)
            makers.append((width, heads, _stack(name)))
            if source.makes:
                lam = wanted.build(width, heads, next(module.parameters()))
                steps.append(AddSubmodule(module, "lam", lam))
            notes.append(f"learned mask ({wanted.scope}, {wanted.fusion})")
        elif learned_mask is not None:
            notes.append("no learned mask: cross-attention")
        named = isinstance(patterns, Mapping) and name in patterns
        if pattern is not None and cross and not named:
            notes.append("no pattern: cross-attention")
            pattern = None
        elif pattern is not None:
            notes.append("pattern")
        settings = Settings(
            number,
            old.backend if backend is None else backend,
            old.pattern if pattern is None else pattern,
            source,
        )
        steps += family.changes(module, wanted is not None)
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


def _check_arguments(model, learned_mask, patterns, backend) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    if learned_mask is not None and not isinstance(learned_mask, LearnedMask):
        raise TypeError(
            f"learned_mask must be a LearnedMask or None, got {type(learned_mask).__name__}"
        )
    if learned_mask is not None and type(model).__name__ in _CLOSED:
        raise ValueError(
            f"model is a {type(model).__name__}, which has collected its parameters already: "
            "swap a learned mask in first, then wrap"
        )
    check_backend(backend)
    if isinstance(patterns, Mapping):
        names = [name for name, module in model.named_modules() if family_of(module)]
        for name in patterns:
            if not any(fnmatchcase(other, name) for other in names):
                raise ValueError(f"patterns: no attention module is called {name!r}")
            _check_pattern(patterns[name], f"patterns[{name!r}]", "")
    else:
        _check_pattern(patterns, "patterns", ", or a mapping from module names to these")


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


def _pattern_for(name: str, patterns) -> Patterns | None:
    if not isinstance(patterns, Mapping):
        return patterns
    if name in patterns:
        return patterns[name]
    return next((patterns[key] for key in patterns if fnmatchcase(name, key)), None)


def _why_it_stays(
    module: nn.Module, family: Family, backend: str | None, learned_mask, pattern
) -> str:
    if "forward" in module.__dict__:
        return "its forward was replaced on the instance (by a hook of accelerate?): swap first"
    why = family.refusal(module) or refusal(module, family.head_dim(module), backend)
    if why:
        return why
    if learned_mask is not None:
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
