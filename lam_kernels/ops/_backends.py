"""Which backend serves a call, and why not the others."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from ..triton import availability
from . import _cuda

# Tried in this order when no backend is named. The reference is never tried: it runs only when
# named.
DEVICE_BACKENDS = {"cpu": ("cpu",), "cuda": ("cuda", "triton")}
BACKENDS = ("cpu", "cuda", "triton", "reference")


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
    if name == "cuda":
        return _cuda.unavailable()
    if name == "triton":
        return availability.unavailable()
    return ""


def backends() -> dict[str, str]:
    """Every backend's name with "" when it can run in this process, otherwise why not."""
    return {name: unavailable(name) for name in BACKENDS}


def _device_reasons(name: str, device: str, dtype: torch.dtype) -> list[str]:
    """Why backend `name` serves no op on tensors of this device type and dtype; [] if it can."""
    found = []
    missing = unavailable(name)
    if missing:
        found.append(missing)
    if name == "cpu" and device != "cpu":
        found.append(f"serves CPU tensors, these are on {device}")
    if name == "triton" and (why_not := availability.refuses(device)):
        found.append(why_not)
    if name == "cuda" and (why_not := _cuda.refuses(device)):
        found.append(why_not)
    if name in ("cuda", "triton") and dtype == torch.float64:
        found.append("has no float64")
    return found


class Kernels(NamedTuple):
    """One op's kernels on one backend: the op's arguments without `backend`, the op's results."""

    forward: Callable
    backward: Callable


class Service(NamedTuple):
    """One op on one backend.

    load: gives the kernels, called once, at the first use.
    limits: the op's forward arguments without `backend` -> why these kernels do not take them,
        beyond device and dtype; [] when they do. Reads shapes, dtypes and settings, never data.
    slower: the same arguments -> what was measured, where another backend of the device is tried
        first when none is named; "" where the order of DEVICE_BACKENDS stands.
    """

    load: Callable[[], Kernels]
    limits: Callable[..., list[str]] | None = None
    slower: Callable[..., str] | None = None


# (op, named backend, device type, dtype) -> backend, where nothing else about a call matters
_settled: dict[tuple, str] = {}


class Services:
    """The backends of one op: which of them serves a call, why not the others, their kernels."""

    def __init__(self, op: str, table: dict[str, Service]):
        self.op = op
        self.table = table
        self._kernels: dict[str, Kernels] = {}

    def kernels(self, backend: str) -> Kernels:
        found = self._kernels.get(backend)
        if found is None:
            if backend not in self.table:
                raise ValueError(f"backend must be one of {', '.join(self.table)}, got {backend!r}")
            why_not = unavailable(backend)
            if why_not:
                raise RuntimeError(f'backend="{backend}" cannot serve this call: {why_not}')
            found = self._kernels[backend] = self.table[backend].load()
        return found

    def reasons(self, name: str, arguments: Sequence) -> list[str]:
        """Why backend `name` does not serve the op with these arguments; [] when it does.

        arguments: the op's forward arguments without `backend`, query first.
        """
        found = _device_reasons(name, arguments[0].device.type, arguments[0].dtype)
        service = self.table.get(name)
        if service is None and not unavailable(name):
            found.append(f"has no kernels of {self.op}")
        elif service is not None and service.limits is not None:
            found += service.limits(*arguments)
        return found

    def choose(self, name: str | None, arguments: Sequence) -> str:
        """The named backend, or the first of the device's table that serves the call."""
        query = arguments[0]
        device, dtype = query.device.type, query.dtype
        # a compiler would guard on the dictionary, and compile again when it grows
        compiling = torch.compiler.is_compiling()
        settled = None if compiling else _settled.get((self.op, name, device, dtype))
        if settled is not None:
            return settled
        if name is not None and name not in BACKENDS:
            raise ValueError(f"backend must be one of {', '.join(BACKENDS)} or None, got {name!r}")
        candidates = self._candidates(name, arguments)
        for candidate in candidates:
            if not self.reasons(candidate, arguments):
                # one with limits may serve the next call, or be slower there
                listed = [self.table[one] for one in candidates if one in self.table]
                if not compiling and not any(one.limits or one.slower for one in listed):
                    _settled[self.op, name, device, dtype] = candidate
                return candidate
        if name is not None:
            why_not = ", ".join(self.reasons(name, arguments))
            raise RuntimeError(f'backend="{name}" cannot serve this call: {why_not}')
        table = "; ".join(
            f'"{one}": {", ".join(why)}'
            for one in BACKENDS
            if (why := self.reasons(one, arguments))
        )
        raise RuntimeError(
            f"no backend serves this call on device {device} with {dtype}: {table}. "
            'backend="reference" is plain PyTorch and runs only when named'
        )

    def _candidates(self, name: str | None, arguments: Sequence) -> tuple[str, ...]:
        """The backends to try, in order."""
        if name is not None:
            return (name,)
        listed = DEVICE_BACKENDS.get(arguments[0].device.type, ())
        return tuple(sorted(listed, key=lambda one: self._slower(one, arguments) != ""))

    def _slower(self, name: str, arguments: Sequence) -> str:
        service = self.table.get(name)
        if service is None or service.slower is None:
            return ""
        return service.slower(*arguments)

    def explanation(
        self, name: str | None, arguments: Sequence, notes: tuple[str, ...]
    ) -> Explanation:
        if name is not None and name not in BACKENDS:
            self.choose(name, arguments)  # raises
        device = arguments[0].device.type
        found = {one: self.reasons(one, arguments) for one in BACKENDS}
        candidates = self._candidates(name, arguments)
        serving = next((one for one in candidates if not found[one]), "")
        for one in BACKENDS:
            if one == serving or found[one]:
                continue
            if name is not None:
                found[one] = [f'backend="{name}" is named']
            elif one not in candidates:
                found[one] = ["runs only when named"]
            else:
                first = f"{serving} comes first for {device} tensors"
                found[one] = [self._slower(one, arguments) or first]
        why_not = {one: tuple(why) for one, why in found.items()}
        return Explanation(self.op, serving, why_not, notes)


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
