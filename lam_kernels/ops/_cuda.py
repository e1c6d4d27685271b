"""The CUDA C++ backend: its libraries, and what its kernels do not take.

LAM_EMULATE_CUDA=1 in the environment lets backend="cuda" serve CPU tensors with the same kernels,
compiled for the CPU by `make emulation` (docs/emulation.md). A process has one of the two.
"""

from __future__ import annotations

import ctypes
import functools
import os
from pathlib import Path
from typing import NamedTuple

import torch

from ..patterns import spec_terms, specs
from . import _native
from ._sources import emulation_stamp

# csrc/cuda/masked_attention.h has the same numbers; tests/cuda/test_dispatch.py compares them
MAX_KEYS = 320
MAX_HEAD_DIM = 128
MAX_PATTERNS = 16
MAX_PATTERN_HEADS = 256
MAX_SEGMENTS = 4


@functools.cache
def emulated() -> bool:
    """Whether the CUDA kernels run on the CPU in this process."""
    return os.environ.get("LAM_EMULATE_CUDA") == "1"


def refuses(device: str) -> str:
    """Why tensors on a device of this type are not served, "" when they are."""
    if emulated():
        return "" if device == "cpu" else f"LAM_EMULATE_CUDA=1 serves CPU tensors, not {device}"
    return "" if device == "cuda" else f"serves CUDA tensors, these are on {device}"


@functools.cache
def unavailable() -> str:
    """Why backend "cuda" cannot run here, "" when it can. The first call loads its library."""
    name = f"_cuda_emulation{_native._SUFFIX}" if emulated() else f"_cuda{_native._SUFFIX}"
    library = _native._PACKAGE / name
    if emulated():
        if not library.exists():
            return (
                "LAM_EMULATE_CUDA=1, but the emulated kernels are not built: run `make emulation`"
            )
    else:
        if not library.exists():
            skipped = _native.stamp().get("cuda_skipped") or "not built for this Python"
            return f"not built ({skipped})"
        if not torch.cuda.is_available():
            return "torch sees no GPU"
    try:
        torch.ops.load_library(str(library))
    except OSError as error:
        return f"{name} is broken ({error}): build it again"
    return _stale(library) if emulated() else ""


def _stale(library: Path) -> str:
    """Why the emulated kernels are not those of the sources beside them, "" when they are."""
    try:
        stamp = ctypes.CDLL(str(library)).lam_emulation_stamp
    except AttributeError:
        return f"{library.name} is older than its sources: run `make emulation`"
    stamp.restype = ctypes.c_char_p
    sources = emulation_stamp(_native._PACKAGE.parent)
    if sources and stamp().decode() != sources:
        return f"{library.name} and its sources in csrc differ: run `make emulation`"
    return ""


# Constants of a process, also for a compiler, which could not trace how a library is loaded.
emulated._dynamo_marked_constant = True
unavailable._dynamo_marked_constant = True


class Measured(NamedTuple):
    """One row: calls of up to these sizes, and the backend that was faster, forward + backward."""

    gpu: str  # torch.cuda.get_device_name()
    dtypes: tuple[torch.dtype, ...]
    most_keys: int
    most_head_dim: int
    faster: str


# The first row that fits a call decides who is tried first when no backend is named. No GPU has
# measured anything yet, so the default holds: "cuda" for every call within its limits, because up
# to 320 keys launches, mask traffic and padding decide, which its kernels are made for, then
# "triton". To be filled from `python -m bench run --set workloads` on a GPU.
MEASURED: tuple[Measured, ...] = ()


@functools.cache
def _gpu(index: int | None) -> str:
    return torch.cuda.get_device_name(index)


def masked_attention_slower(query, key, value, *rest) -> str:
    """Service.slower of masked_attention."""
    if not MEASURED or query.device.type != "cuda":
        return ""
    gpu = _gpu(query.device.index)
    head_dim = max(query.shape[3], value.shape[3])
    for row in MEASURED:
        fits = key.shape[2] <= row.most_keys and head_dim <= row.most_head_dim
        if row.gpu == gpu and query.dtype in row.dtypes and fits:
            faster = row.faster != "cuda"
            return f"{row.faster} was measured to be faster on {gpu}" if faster else ""
    return ""


def masked_attention_limits(
    query, key, value, multiplier, bias, multiplier_columns, multiplier_offset, bias_columns,
    bias_offset, attn_mask, key_mask, segment_ids, rng_state, pattern, *settings,
) -> list[str]:  # fmt: skip
    """Service.limits of masked_attention."""
    return _common_limits(query, key, value, segment_ids, pattern)


def global_local_attention_limits(
    query, key, value, multiplier, bias, key_mask, segment_ids, pattern, scale
) -> list[str]:
    """Service.limits of global_local_attention."""
    return _common_limits(query, key, value, segment_ids, pattern)


def map_gated_attention_limits(
    query, key, value, gate_global, gate_local, key_mask, segment_ids, pattern, scale, renormalise
) -> list[str]:
    """Service.limits of map_gated_attention."""
    return _common_limits(query, key, value, segment_ids, pattern)


def _common_limits(query, key, value, segment_ids, pattern) -> list[str]:
    found = []
    D, Dv, Lk = query.shape[3], value.shape[3], key.shape[2]
    if Lk > MAX_KEYS:
        found.append(f"serves at most {MAX_KEYS} keys, there are {Lk}")
    if max(D, Dv) > MAX_HEAD_DIM:
        found.append(f"serves head dims of at most {MAX_HEAD_DIM}, these are {D} and {Dv}")
    if pattern:
        each = [tuple(map(tuple, spec_terms(spec))) for spec in specs(pattern)]
        if len(each) > MAX_PATTERN_HEADS or len(set(each)) > MAX_PATTERNS:
            found.append(
                f"serves at most {MAX_PATTERNS} different patterns on at most {MAX_PATTERN_HEADS} "
                f"heads, there are {len(set(each))} on {len(each)}"
            )
    if len(segment_ids) > 2 * MAX_SEGMENTS:
        found.append(
            f"serves at most {MAX_SEGMENTS} different Segments, there are {len(segment_ids) // 2}"
        )
    return found
