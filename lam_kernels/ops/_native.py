"""Find, verify and load the compiled libraries, at the first use and not at import.

Three states: not built (every op exists, backend "cpu" says why it cannot run), loaded, and
broken, which is an ImportError: a library that is there and does not fit is never treated as one
that is missing.
"""

from __future__ import annotations

import functools
import importlib
import json
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

import torch

_PACKAGE = Path(__file__).resolve().parent.parent
_SUFFIX = EXTENSION_SUFFIXES[0]
_REBUILD = "rebuild with `make build` or `pip install -e . --no-build-isolation`"


def _release(version: str) -> tuple[int, ...]:
    """(2, 13) of "2.13.0+cpu"."""
    return tuple(int(part) for part in version.split("+")[0].split(".")[:2])


@functools.cache
def stamp() -> dict:
    """What the libraries were built with; {} when they are not built for this Python.

    Raises ImportError when the running torch is older than the one they need.
    """
    path = _PACKAGE / "_build.json"
    if not path.exists():
        return {}
    try:
        found = json.loads(path.read_text())
        target = _release(found["target_torch"])
        suffix = found["python"]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ImportError(
            f"lam_kernels: the build stamp {path} cannot be read ({error}): {_REBUILD}"
        ) from error
    if suffix != _SUFFIX:
        return {}
    if _release(torch.__version__) < target:
        raise ImportError(
            f"lam_kernels was built for torch {found['target_torch']} or later, "
            f"this is torch {torch.__version__}: install a later torch"
        )
    return found


@functools.cache
def _host():
    """The module of what has no tensor in it, with both libraries loaded; None if not built."""
    if not stamp():
        return None
    library = _PACKAGE / f"_cpu{_SUFFIX}"
    if not library.exists():
        raise ImportError(
            f"lam_kernels: the build stamp is there, but {library.name} is missing: {_REBUILD}"
        )
    try:
        torch.ops.load_library(str(library))
        host = importlib.import_module("lam_kernels._host")
    except (OSError, ImportError) as error:
        raise ImportError(f"lam_kernels: {library.name} is broken ({error}): {_REBUILD}") from error
    if json.loads(host.build_stamp()) != stamp():
        raise ImportError(
            f"lam_kernels: _build.json and the libraries come from different builds: {_REBUILD}"
        )
    return host


@functools.cache
def unavailable() -> str:
    """Why backend "cpu" cannot run here, "" when it can. The first call loads the libraries."""
    host = _host()
    return "not built for this Python: run `make build`" if host is None else host.level_error()


def level() -> str:
    """The instruction-set level in use: portable, avx2, avx512, amx or amx_emulated.

    Raises RuntimeError when backend "cpu" is unavailable.
    """
    if unavailable():
        raise RuntimeError(unavailable())
    return _host().level()


def available_levels() -> list[str]:
    """What this build has and this machine can run, least demanding first; [] if not built."""
    return [] if _host() is None else _host().available_levels()


def release_scratch() -> int:
    """Give the scratch memory that kernels keep between calls back; returns its bytes."""
    return 0 if _host() is None else _host().release_scratch()
