"""torch.vmap of the ops: the mapped axis joins the batch, or the calls run one by one."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ._registration import LIBRARY, RegisteredOp


def fold(
    tensor: Tensor | None, axis: int | None, N: int, B: int, keep_shared: bool
) -> Tensor | None:
    """[N, B|1, ...] as [N * B, ...]; with keep_shared, what neither axis varies stays [1, ...]."""
    if tensor is None or (axis is None and keep_shared and tensor.shape[0] == 1):
        return tensor
    tensor = tensor[None] if axis is None else tensor.movedim(axis, 0)
    return tensor.expand(N, B, *tensor.shape[2:]).flatten(0, 1)


def mapped_batch(query: Tensor, axis: int | None) -> int:
    return query.shape[0] if axis is None else query.movedim(axis, 0).shape[1]


def one_by_one(op: Callable, N: int, in_dims: Sequence, arguments: Sequence):
    """One call a mapped sample."""
    results = [op(*_each(arguments, in_dims, n)) for n in range(N)]
    if isinstance(results[0], Tensor):
        return torch.stack(results), 0
    return tuple(torch.stack(same) for same in zip(*results, strict=True)), (0,) * len(results[0])


def _each(arguments: Sequence, in_dims: Sequence, n: int) -> list:
    """The arguments of the n-th mapped call."""
    chosen = []
    for argument, axis in zip(arguments, in_dims, strict=True):
        if isinstance(axis, (list, tuple)):
            chosen.append(_each(argument, axis, n))
        else:
            chosen.append(argument if axis is None else argument.select(axis, n))
    return chosen


def register_one_by_one(op: RegisteredOp) -> None:
    """Both directions of the op under torch.vmap: as many kernel calls as mapped samples."""

    def rule(which):
        def run(info, in_dims, *arguments):
            return one_by_one(which, info.batch_size, in_dims, arguments)

        return run

    for direction, which in (("fwd", op.forward), ("bwd", op.backward)):
        name = f"lam_kernels::{op.name}_{direction}"
        torch.library.register_vmap(name, rule(which), lib=LIBRARY)
