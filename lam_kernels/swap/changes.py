"""What swap() does to a module, as steps that can be taken back in reverse order.

Each step remembers what it found, so that revert() restores the very objects, not equal ones.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

from torch import nn

_MISSING = object()


class SetClass:
    """Gives an instance another class of the same layout: parameters, hooks and identity stay."""

    def __init__(self, module: nn.Module, new: type[nn.Module]):
        self.module, self.new = module, new

    def apply(self) -> None:
        self.old = type(self.module)
        self.module.__class__ = self.new

    def revert(self) -> None:
        self.module.__class__ = self.old


class SetAttribute:
    """Sets a plain attribute of an instance (never a parameter, buffer or submodule)."""

    def __init__(self, module: nn.Module, name: str, new):
        self.module, self.name, self.new = module, name, new

    def apply(self) -> None:
        self.old = self.module.__dict__.get(self.name, _MISSING)
        self.module.__dict__[self.name] = self.new

    def revert(self) -> None:
        if self.old is _MISSING:
            del self.module.__dict__[self.name]
        else:
            self.module.__dict__[self.name] = self.old


class AddSubmodule:
    """Adds a submodule under a name that is free."""

    def __init__(self, module: nn.Module, name: str, new: nn.Module):
        self.module, self.name, self.new = module, name, new
        self.left: tuple | None = None  # device and dtype of the module when it was taken out

    def apply(self) -> None:
        place = _place_of(self.module)
        if self.left not in (None, place):  # what was done to the module since is done to it too
            self.new.to(*place)
        self.module.add_module(self.name, self.new)

    def current(self) -> nn.Module:
        """What hangs there now: peft may have wrapped it meanwhile."""
        return self.module._modules.get(self.name, self.new)

    def revert(self) -> None:
        self.new = self.module._modules.pop(self.name, self.new)  # somebody may have deleted it
        self.left = _place_of(self.module)


def _place_of(module: nn.Module) -> tuple:
    parameter = next(module.parameters())
    return parameter.device, parameter.dtype


class AddPreHook:
    """Registers a forward pre-hook in front of those that are there."""

    def __init__(self, module: nn.Module, hook: Callable):
        self.module, self.hook = module, hook

    def apply(self) -> None:
        self.handle = self.module.register_forward_pre_hook(
            self.hook, prepend=True, with_kwargs=True
        )

    def revert(self) -> None:
        self.handle.remove()


@functools.cache
def swapped_class(base: type[nn.Module], method: str, function: Callable) -> type[nn.Module]:
    """The subclass of `base` that differs in one method; made when a model with a `base` is there,
    so that no package is imported for it."""
    attributes = {method: function, "_made_of": (base, method, function), "__reduce_ex__": _reduce}
    return type(f"Swapped{base.__name__}", (base,), attributes)


def _reduce(module: nn.Module, protocol):
    # such a class has no name that could be imported: copies and pickles make it again
    return _made_again, type(module)._made_of, module.__dict__


def _made_again(base: type[nn.Module], method: str, function: Callable) -> nn.Module:
    new = swapped_class(base, method, function)
    return new.__new__(new)


def base_of(module: nn.Module) -> type[nn.Module]:
    """The class that a module had before it was swapped."""
    return getattr(type(module), "_made_of", (type(module),))[0]


def class_before(module: nn.Module) -> tuple[str, str]:
    base = base_of(module)
    return base.__module__, base.__qualname__


Change = SetClass | SetAttribute | AddSubmodule | AddPreHook
