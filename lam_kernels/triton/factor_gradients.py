"""Which gradients of low-rank masks the passes of the backward fold, where to, and what is summed
afterwards. Why so: masked_attention.py; what a fold does: masks.fold_gradient.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from .masked_attention_backward import MaskGradients
from .masks import RANK_BLOCK, Fold, fold_argument

# where the op has each mask among its learned operands: itself (or its rows), columns, offset
MASKS = ((3, 5, 6), (4, 7, 8))


def wanted_folds(which: str, operands, needs) -> list[tuple[int, int] | None]:
    """(the factor whose gradient the rows or columns pass gives, the other one) of each mask."""
    pairs = [(rows, columns) if which == "rows" else (columns, rows) for rows, columns, _ in MASKS]
    given = [operands[columns] is not None for _, columns, _ in MASKS]
    return [
        pair if low_rank and needs[pair[0]] else None
        for pair, low_rank in zip(pairs, given, strict=True)
    ]


def any_fold(which: str, operands, needs) -> bool:
    return any(pair is not None for pair in wanted_folds(which, operands, needs))


def make_folds(
    which: str, B: int, H: int, operands, needs, grads: list[Tensor], ranks: slice = slice(None)
) -> tuple[list[Fold | None], list[tuple[Tensor, Tensor]]]:
    """What a pass folds into factors of multiplier and bias, of some of their ranks, and (gradient,
    its parts) where a factor is shared: one part a head, to be summed afterwards."""
    folds, parts = [None, None], []
    for at, pair in enumerate(wanted_folds(which, operands, needs)):
        if pair is None:
            continue
        grad, other = grads[pair[0]][..., ranks], operands[pair[1]][..., ranks]
        if grad.shape[3] == 0:
            continue
        to = grad
        if grad.shape[0] != B or grad.shape[1] != H:
            to = grad.new_empty(B, H, *grad.shape[2:], dtype=torch.float32)
            parts.append((grad, to))
        folds[at] = fold_argument(other, to)
    return folds, parts


def fold_blocks(
    which: str, B: int, H: int, operands, needs, grads: list[Tensor]
) -> Iterator[list[Fold | None]]:
    """The folds of each launch of a pass, at least one; sums parts when it is through."""
    pairs = wanted_folds(which, operands, needs)
    most = max((operands[pair[0]].shape[3] for pair in pairs if pair is not None), default=1)
    for begin in range(0, most, RANK_BLOCK):
        ranks = slice(begin, begin + RANK_BLOCK)
        folds, parts = make_folds(which, B, H, operands, needs, grads, ranks)
        yield folds
        sum_parts(parts)


def sum_parts(parts: list[tuple[Tensor, Tensor]]) -> None:
    """Over the heads and samples that share a factor, in a fixed order."""
    for grad, each in parts:
        axes = [axis for axis in (0, 1) if grad.shape[axis] == 1]
        grad.copy_(each.sum(axes, keepdim=True))


def of_block(block: int, targets: MaskGradients, folds: list[Fold | None]) -> MaskGradients:
    """The first launch of a pass gives everything, the next ones only what further ranks need."""
    mine = targets if block == 0 else MaskGradients(None, None, None, None)
    return mine._replace(multiplier_fold=folds[0], bias_fold=folds[1])
