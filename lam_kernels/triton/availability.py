"""Whether Triton kernels can run in this process, and on which tensors. Imports no Triton."""

from __future__ import annotations

import functools
import importlib.metadata
import os

import torch
from torch import Tensor

LEAST_CAPABILITY = (8, 0)
MAX_LENGTH = 2**29  # positions, and sums of a few, in 32 bits


def interpreting() -> bool:
    """TRITON_INTERPRET=1: the kernels run on CPU tensors, in an interpreter."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes", "y")


def refuses(device: str) -> str:
    """Why tensors on a device of this type are not served, "" when they are."""
    if interpreting():
        return "" if device == "cpu" else f"TRITON_INTERPRET=1 serves CPU tensors, not {device}"
    return "" if device == "cuda" else f"serves CUDA tensors, these are on {device}"


@functools.cache
def unavailable() -> str:
    """Why backend "triton" cannot run here, "" when it can. Asks for no CUDA context."""
    try:
        importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        return "the package triton is not installed: pip install triton"
    if interpreting():
        return ""
    if not torch.cuda.is_available():
        return "no CUDA device (TRITON_INTERPRET=1 runs the kernels on CPU tensors, slowly)"
    capability = torch.cuda.get_device_capability()
    if capability < LEAST_CAPABILITY:
        least = ".".join(map(str, LEAST_CAPABILITY))
        found = ".".join(map(str, capability))
        return f"needs compute capability {least} or later, this GPU has {found}"
    return ""


# Read while compiling too: the answer never changes within a process.
unavailable._dynamo_marked_constant = True
refuses._dynamo_marked_constant = True


def limits(query: Tensor, key: Tensor, *_) -> list[str]:
    """Why attention kernels do not take a call, beyond device and dtype."""
    longest = max(query.shape[2], key.shape[2])
    return [f"takes lengths below {MAX_LENGTH}, got {longest}"] if longest >= MAX_LENGTH else []


MAX_NETWORK_WIDTH = 128  # a layer's weight is one tile


def score_masked_attention_limits(query, key, value, parameters, key_mask, widths, *_) -> list[str]:
    """The same for score_masked_attention, which has every layer on chip."""
    found = limits(query, key)
    if max(widths) > MAX_NETWORK_WIDTH:
        found.append(f"takes hidden widths up to {MAX_NETWORK_WIDTH}, got {widths[1]}")
    return found
