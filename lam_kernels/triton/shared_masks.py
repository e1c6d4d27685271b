"""Gradients of masks that several heads or samples share: where the tiles pass of an op sums them.

Where a mask has few tiles and many sharers the loop over these is split among several programs,
whose partial sums are added in a fixed order.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from . import configurations
from .masked_attention_backward import MaskGradients
from .masks import Mask, mask_argument


class SharedSums(NamedTuple):
    """Where the tiles pass sums the gradients of masks that the same heads and samples share."""

    batches: int  # that share them
    heads: int
    own: int  # tiles of one row and column tile: samples x heads of the mask
    splits: int
    stride: int  # elements from one partial sum to the next
    targets: MaskGradients
    partial: dict[int, Tensor]

    def finish(self, grads: list[Tensor]) -> None:
        for at, sums in self.partial.items():
            grads[3 + at].copy_(sums.sum(0))


def shared_sums(call, which: list[int], grads: list[Tensor], tiles: int) -> SharedSums:
    """For some of (multiplier, bias), whose gradients are in `grads` from 3 on. call: the operands
    (masked_attention.py); tiles: row tiles x column tiles."""
    first = grads[3 + which[0]]
    batches = call.B if first.shape[0] == 1 else 1
    heads = call.H if first.shape[1] == 1 else 1
    own = first.shape[0] * first.shape[1]
    splits = configurations.splits(
        own * tiles, batches * heads, first.numel() * len(which),
        call.B * call.H * (call.Lq + call.Lk) * call.D, call.query.device,
    )  # fmt: skip
    targets: list[Mask | None] = [None, None]
    partial = {}
    for at in which:
        grad = grads[3 + at]
        if splits > 1:
            make = grad.new_zeros if call.shape.N_TERMS else grad.new_empty
            partial[at] = make((splits, *grad.shape), dtype=torch.float32)
            targets[at] = mask_argument(partial[at][0])._replace(pointer=partial[at])
        else:
            targets[at] = mask_argument(grad)
    stride = first.numel()
    return SharedSums(
        batches, heads, own, splits, stride, MaskGradients(*targets, None, None), partial
    )
