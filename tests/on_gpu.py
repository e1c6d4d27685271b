"""The operator tests on a GPU: they make CPU tensors, and the Triton kernels get CUDA copies.

Where torch sees a GPU, serve_cpu_tensors() puts a step in front of the Triton kernels of every op:
operands go to the GPU with their strides (a stride of 0 stays one), results come back. Nothing else
of the suite knows; tests that mean CUDA tensors pass them, and they go through untouched.
"""

from __future__ import annotations

import importlib
from pathlib import Path

import torch
from torch import Tensor

from lam_kernels.ops._backends import Kernels
from lam_kernels.triton import availability

OPS = Path(__file__).resolve().parent.parent / "lam_kernels" / "ops"


def moved(value, device: str):
    """The same values under the same strides on another device; lists by element."""
    if isinstance(value, (list, tuple)):
        return type(value)(moved(one, device) for one in value)
    if not isinstance(value, Tensor) or value.device.type == device:
        return value
    if value.dtype == torch.int64 and value.shape == (2,):  # the random state, read by the host
        return value
    room = value.detach().untyped_storage()
    copy = torch.empty(0, dtype=torch.uint8)
    copy.set_(room, 0, (room.nbytes(),), (1,))
    there = copy.to(device, copy=True).untyped_storage()
    empty = torch.empty(0, dtype=value.dtype, device=device)
    return empty.set_(there, value.storage_offset(), value.shape, value.stride())


def through(kernel, device: str):
    def run(*arguments):
        if arguments[0].device.type == device:
            return kernel(*arguments)
        found = kernel(*moved(arguments, device))
        one = isinstance(found, Tensor)
        return found.cpu() if one else tuple(result.cpu() for result in found)

    return run


def serve_cpu_tensors(device: str = "cuda") -> None:
    """Let backend "triton" take CPU tensors in this process, by way of `device`."""
    availability.refuses = lambda _device: ""
    for path in OPS.glob("[!_]*.py"):
        page = importlib.import_module(f"lam_kernels.ops.{path.stem}")
        services = getattr(page, "KERNELS", None)
        if services is None or "triton" not in services.table:
            continue
        service = services.table["triton"]

        def loaded(load=service.load):
            return Kernels(*(through(kernel, device) for kernel in load()))

        services.table["triton"] = service._replace(load=loaded)
