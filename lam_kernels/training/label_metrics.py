"""Metrics of multi-label predictions, as YouTube-8M counts them: GAP@k, MAP, PERR, Hit@1.

Source: the data set's evaluation code (youtube-8m, Apache-2.0); where it divides by nothing, the
choice is stated.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class LabelMetrics:
    """NaN where nothing defines a value (no sample, no label at all)."""

    gap: float
    map: float
    perr: float
    hit_at_1: float


def label_metrics(scores: Tensor, labels: Tensor, k: int = 20) -> LabelMetrics:
    """All four of scores [N, classes] and labels bool [N, classes].

    GAP@k: the k highest scores of each sample pooled and sorted (ties in an order drawn with seed
        0); average precision with the number of all positive labels, also those outside of the k.
    MAP: average precision of each class over the same pooled lists, with all its positives; mean
        over the classes that have one.
    PERR: of each sample, the share of its n highest scores that are right, n its number of labels,
        a score of 0 or less never being one; mean over the samples that have a label.
    Hit@1: the share of samples whose highest score is one of their labels.
    """
    if scores.shape != labels.shape or scores.dim() != 2:
        raise ValueError(
            f"scores and labels must be [N, classes], got {tuple(scores.shape)} and "
            f"{tuple(labels.shape)}"
        )
    scores, labels = scores.detach().double().cpu(), labels.bool().cpu()
    if scores.numel() == 0:
        return LabelMetrics(*[float("nan")] * 4)
    top, classes = scores.topk(min(k, scores.shape[1]))
    hits = labels.gather(1, classes)
    gap = _average_precision(top.flatten(), hits.flatten(), int(labels.sum()))
    per_class = []
    for one in labels.any(0).nonzero().flatten().tolist():
        chosen = classes == one
        per_class.append(_average_precision(top[chosen], hits[chosen], int(labels[:, one].sum())))
    mean = sum(per_class) / len(per_class) if per_class else float("nan")
    counts = labels.sum(1)
    perr = []
    for row in counts.nonzero().flatten().tolist():
        best, which = scores[row].topk(int(counts[row]))
        perr.append(float((labels[row, which] & (best > 0)).double().mean()))
    return LabelMetrics(
        gap,
        mean,
        sum(perr) / len(perr) if perr else float("nan"),
        float(labels.gather(1, scores.argmax(1, keepdim=True)).double().mean()),
    )


def _average_precision(scores: Tensor, hits: Tensor, positives: int) -> float:
    """Sum over hits of precision at their rank, by the number of positives."""
    if positives == 0:
        return float("nan")
    generator = torch.Generator().manual_seed(0)
    order = torch.randperm(len(scores), generator=generator)
    order = order[scores[order].argsort(descending=True, stable=True)]
    found = hits[order].double()
    ranks = torch.arange(1, len(found) + 1, dtype=torch.float64)
    return float((found * found.cumsum(0) / ranks).sum() / positives)
