"""Import of packages that only demo and training need."""

from __future__ import annotations

import importlib
from types import ModuleType

from .user_error import UserError

# import name -> name to install, where they differ
_DISTRIBUTION = {"sklearn": "scikit-learn", "PIL": "pillow"}


def optional_package(module: str, purpose: str) -> ModuleType:
    """The module, imported now; a UserError that says how to install it where it is missing."""
    root = module.partition(".")[0]
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != root:
            raise
        name = _DISTRIBUTION.get(root, root)
        raise UserError(
            f"{purpose} needs the package {name}, which is not installed: pip install {name}"
        ) from None
