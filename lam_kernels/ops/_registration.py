"""How an op page registers its two ops in torch's library, and when they may be bypassed."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ..triton import availability
from ._backends import Kernels, Service, Services

# One fragment for all pages: a registration lives as long as the object it was made through.
LIBRARY = torch.library.Library("lam_kernels", "FRAGMENT")

_PLAIN_TYPES = {Tensor, torch.nn.Parameter, type(None)}


def cpu_service(op: str, limits: Callable[..., list[str]] | None = None) -> Service:
    """The C++ kernels lam_kernels::OP_cpu_fwd and OP_cpu_bwd."""
    return Service(lambda: _compiled(op, "cpu"), limits)


def cuda_service(
    op: str,
    limits: Callable[..., list[str]] | None = None,
    slower: Callable[..., str] | None = None,
) -> Service:
    """The CUDA C++ kernels lam_kernels::OP_cuda_fwd and OP_cuda_bwd, or their emulation."""
    return Service(lambda: _compiled(op, "cuda"), limits, slower)


def _compiled(op: str, backend: str) -> Kernels:
    private = torch.ops.lam_kernels
    directions = (getattr(private, f"{op}_{backend}_{direction}") for direction in ("fwd", "bwd"))
    # _op: what the overload's own call does, without that call's microsecond
    return Kernels(*(kernel.default._op for kernel in directions))


def triton_service(op: str, limits: Callable[..., list[str]] = availability.limits) -> Service:
    """OP_fwd and OP_bwd of lam_kernels/triton/OP.py."""

    def load() -> Kernels:
        kernels = importlib.import_module(f"..triton.{op}", __package__)
        return Kernels(*(getattr(kernels, f"{op}_{direction}") for direction in ("fwd", "bwd")))

    return Service(load, limits)


def reference_service(op: str) -> Service:
    """OP_fwd and OP_bwd of python_ref/OP.py."""

    def load() -> Kernels:
        reference = importlib.import_module(f"python_ref.{op}")
        return Kernels(*(getattr(reference, f"{op}_{direction}") for direction in ("fwd", "bwd")))

    return Service(load)


class RegisteredOp(NamedTuple):
    """An op and its backward in torch's library, and the kernels behind them.

    forward takes the op's arguments and `backend`; backward the gradients of the results, the
    op's arguments, what the forward pass left for it, `needs` and `backend`.
    """

    name: str
    forward: Callable
    backward: Callable
    services: Services


def register(
    services: Services,
    forward: str,  # "(arguments) -> results", the last argument being `str backend`
    backward: str,  # the same
    fake_forward: Callable,
    fake_backward: Callable,
) -> RegisteredOp:
    """Defines lam_kernels::NAME_fwd and NAME_bwd for NAME = services.op, on CPU and CUDA tensors.

    Their last argument is the backend, whose kernels take all the others.
    """
    name = services.op
    for direction, schema, fake in (
        ("fwd", forward, fake_forward),
        ("bwd", backward, fake_backward),
    ):
        LIBRARY.define(f"{name}_{direction}{schema}")
        run = _run_forward(services) if direction == "fwd" else _run_backward(services)
        for key in ("CPU", "CUDA"):
            LIBRARY.impl(f"{name}_{direction}", run, key)
        torch.library.register_fake(f"lam_kernels::{name}_{direction}", fake, lib=LIBRARY)
    ops = torch.ops.lam_kernels
    return RegisteredOp(
        name,
        getattr(ops, f"{name}_fwd").default,
        getattr(ops, f"{name}_bwd").default,
        services,
    )


def _run_forward(services: Services) -> Callable:
    return lambda *arguments: services.kernels(arguments[-1]).forward(*arguments[:-1])


def _run_backward(services: Services) -> Callable:
    return lambda *arguments: services.kernels(arguments[-1]).backward(*arguments[:-1])


def traced_or_transformed() -> bool:
    return torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active()


def unobserved(*operands: Tensor | None) -> bool:
    """Nobody but the kernel would see the op: no compiler, torch.func, mode or tensor subclass.

    The kernel is then called without a round trip through the dispatcher, which is a good part
    of a small call.
    """
    return not (
        traced_or_transformed()
        or torch._C._len_torch_dispatch_stack()
        or not _PLAIN_TYPES.issuperset(map(type, operands))
    )


def gradients_like(query: Tensor, operands: tuple[Tensor | None, ...], needs) -> tuple:
    """What a fake backward returns: a tensor of each wanted operand's shape, else an empty one."""
    return tuple(
        query.new_empty(
            operand.shape if wanted else 0, dtype=(query if operand is None else operand).dtype
        )
        for operand, wanted in zip(operands, needs, strict=True)
    )
