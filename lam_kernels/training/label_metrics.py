"""Metrics of multi-label predictions, as YouTube-8M counts them: GAP@k, MAP, PERR, Hit@1.

Source: the data set's evaluation code (youtube-8m, Apache-2.0); where it divides by nothing, the
choice is stated.
"""

from __future__ import annotations

import math
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


class LabelMeter:
    """The four metrics of batches that are added one after another; of each sample only its k best
    scores are kept.

    GAP@k: the k highest scores of each sample pooled and sorted (ties in an order drawn with seed
        0); average precision with the number of all positive labels, also those outside of the k.
    MAP: average precision of each class over the same pooled lists, with all its positives; mean
        over the classes that have one.
    PERR: of each sample, the share of its n highest scores that are right, n its number of labels,
        a score of 0 or less never being one; mean over the samples that have a label.
    Hit@1: the share of samples whose highest score is one of their labels.
    """

    def __init__(self, k: int = 20):
        self.k = k
        self._top: list[tuple[Tensor, Tensor, Tensor]] = []  # scores, hits, classes, each flat
        self._rates: list[Tensor] = []  # PERR of the samples that have a label
        self._hits: list[Tensor] = []
        self._positives: Tensor | None = None  # [classes]

    def add(self, scores: Tensor, labels: Tensor) -> None:  # [N, classes], bool [N, classes]
        if scores.shape != labels.shape or scores.dim() != 2:
            raise ValueError(
                f"scores and labels must be [N, classes], got {tuple(scores.shape)} and "
                f"{tuple(labels.shape)}"
            )
        if scores.numel() == 0:
            return
        if bool(scores.isnan().any()):  # sorting would put them first: numbers that look right
            count = int(scores.isnan().any(1).sum())
            raise ValueError(
                f"scores must not be NaN, got some in {count} of {len(scores)} samples"
            )
        scores, labels = scores.detach().double().cpu(), labels.bool().cpu()
        counts = labels.sum(1)
        best, classes = scores.topk(max(min(self.k, scores.shape[1]), int(counts.max())))
        hits = labels.gather(1, classes)
        self._top.append(
            tuple(x[:, : self.k].flatten() for x in (best, hits, classes.to(torch.int32)))
        )
        first = torch.arange(best.shape[1]) < counts[:, None]
        right = (hits & (best > 0) & first).sum(1)
        self._rates.append((right.double() / counts)[counts > 0])
        self._hits.append(hits[:, 0])
        found = labels.sum(0)
        self._positives = found if self._positives is None else self._positives + found

    def metrics(self) -> LabelMetrics:
        if self._positives is None:
            return LabelMetrics(*[math.nan] * 4)
        scores, hits, classes = (torch.cat(parts) for parts in zip(*self._top, strict=True))
        order = torch.randperm(len(scores), generator=torch.Generator().manual_seed(0))
        order = order[scores[order].argsort(descending=True, stable=True)]
        positives = self._positives
        gap = _average_precisions(
            hits[order], torch.zeros_like(classes), positives.sum().reshape(1)
        )  # fmt: skip
        order = order[classes[order].argsort(stable=True)]
        each = _average_precisions(hits[order], classes[order], positives)
        return LabelMetrics(
            float(gap[0]),
            float(each[positives > 0].mean()),
            float(torch.cat(self._rates).mean()),
            float(torch.cat(self._hits).double().mean()),
        )


def label_metrics(scores: Tensor, labels: Tensor, k: int = 20) -> LabelMetrics:
    """The four metrics of LabelMeter of scores [N, classes] and labels bool [N, classes]."""
    meter = LabelMeter(k)
    meter.add(scores, labels)
    return meter.metrics()


def _average_precisions(hits: Tensor, groups: Tensor, positives: Tensor) -> Tensor:
    """Of each group: the sum over its hits of precision at their rank, by its positives.

    groups is sorted; within a group the best score comes first.
    """
    groups, hits = groups.long(), hits.double()
    start = torch.searchsorted(groups, torch.arange(len(positives)))[groups]
    total = hits.cumsum(0)
    before = (total - hits)[start]
    ranks = torch.arange(1, len(hits) + 1) - start
    sums = torch.zeros(len(positives), dtype=torch.float64)
    sums.index_add_(0, groups, hits * (total - before) / ranks)
    return sums / positives
