"""Which backend serves a call, and why not the others."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

# Tried in this order when no backend is named. The reference is never tried: it runs only when
# named.
DEVICE_BACKENDS = {"cpu": ("cpu",), "cuda": ("cuda", "triton")}
BACKENDS = ("cpu", "cuda", "triton", "reference")

_LATER = "not part of this version yet"


def _cpu_unavailable() -> str:
    from . import _native

    try:
        return _native.unavailable()
    except ImportError as error:  # built, but broken: just as loud, and backends() can still say it
        return str(error)


# Read while compiling too, where loading a library cannot be traced: the answer never changes
# within a process.
_cpu_unavailable._dynamo_marked_constant = True


def unavailable(name: str) -> str:
    """Why backend `name` cannot run in this process, "" when it can."""
    if name == "cpu":
        return _cpu_unavailable()
    return "" if name == "reference" else _LATER


def backends() -> dict[str, str]:
    """Every backend's name with "" when it can run in this process, otherwise why not."""
    return {name: unavailable(name) for name in BACKENDS}


def reasons(name: str, device: str, dtype: torch.dtype) -> list[str]:
    """Why backend `name` cannot serve tensors of this device type and dtype; [] when it can."""
    found = []
    missing = unavailable(name)
    if missing:
        found.append(missing)
    if name == "cpu" and device != "cpu":
        found.append(f"serves CPU tensors, these are on {device}")
    if name in ("cuda", "triton"):
        if device != "cuda":
            found.append(f"serves CUDA tensors, these are on {device}")
        if dtype == torch.float64:
            found.append("has no float64")
    return found


def choose(name: str | None, device: str, dtype: torch.dtype) -> str:
    """The named backend, or the first of the device's table that serves the call."""
    if name is None:
        for candidate in DEVICE_BACKENDS.get(device, ()):
            if not reasons(candidate, device, dtype):
                return candidate
        table = "; ".join(
            f'"{b}": {", ".join(r)}' for b, r in _all_reasons(device, dtype).items() if r
        )
        raise RuntimeError(
            f"no backend serves this call on device {device} with {dtype}: {table}. "
            'backend="reference" is plain PyTorch and runs only when named'
        )
    if name not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)} or None, got {name!r}")
    why_not = reasons(name, device, dtype)
    if why_not:
        raise RuntimeError(f'backend="{name}" cannot serve this call: {", ".join(why_not)}')
    return name


def _all_reasons(device: str, dtype: torch.dtype) -> dict[str, list[str]]:
    return {name: reasons(name, device, dtype) for name in BACKENDS}


@dataclass(frozen=True)
class Explanation:
    """Which backend serves a call, and why the others do not; str() is for reading."""

    op: str
    backend: str  # "" when nothing serves the call
    reasons: dict[str, tuple[str, ...]]  # why a backend does not serve it; () for the one that does
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        lines = [
            f"{self.op}: "
            + (f"served by {self.backend}" if self.backend else "no backend serves this call")
        ]
        for name, why_not in self.reasons.items():
            if name != self.backend:
                lines.append(f"  not {name}: " + "; ".join(why_not))
        return "\n".join(lines + [f"  note: {note}" for note in self.notes])


# Filled by each op's page: op name -> function with the op's arguments that returns an Explanation.
EXPLAINERS: dict[str, Callable[..., Explanation]] = {}


def explain(op: str, /, *args, **kwargs) -> Explanation:
    """Which backend would serve op(*args, **kwargs), and why not each of the others.

    Runs no kernel and draws no random number. Bad arguments raise what the call itself would raise.
    """
    if op not in EXPLAINERS:
        raise ValueError(f"op must be one of {', '.join(sorted(EXPLAINERS))}, got {op!r}")
    return EXPLAINERS[op](*args, **kwargs)


def explanation(
    op: str, backend: str | None, device: str, dtype: torch.dtype, notes: tuple[str, ...]
) -> Explanation:
    found = _all_reasons(device, dtype)
    if backend is not None and backend not in BACKENDS:
        choose(backend, device, dtype)  # raises
    candidates = DEVICE_BACKENDS.get(device, ()) if backend is None else (backend,)
    serving = next((name for name in candidates if not found[name]), "")
    for name in BACKENDS:
        if name == serving or found[name]:
            continue
        if backend is not None:
            found[name] = [f'backend="{backend}" is named']
        elif name == "reference":
            found[name] = ["runs only when named"]
        else:
            found[name] = [f"{serving} comes first for {device} tensors"]
    return Explanation(op, serving, {name: tuple(why) for name, why in found.items()}, notes)
