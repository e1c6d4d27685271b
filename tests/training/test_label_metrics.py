"""GAP, MAP, PERR and Hit@1 on cases worked by hand."""

from __future__ import annotations

import math

import pytest
import torch

from lam_kernels.training.label_metrics import LabelMeter, label_metrics


def metrics(scores, labels, k=20):
    return label_metrics(torch.tensor(scores), torch.tensor(labels, dtype=torch.bool), k)


def test_by_hand():
    """Pooled order: 0.9 hit, 0.8 miss, 0.7 hit, 0.6 hit, 0.3 miss, 0.1 miss."""
    found = metrics([[0.9, 0.8, 0.1], [0.3, 0.6, 0.7]], [[1, 0, 0], [0, 1, 1]])
    assert found.gap == pytest.approx((1 / 1 + 2 / 3 + 3 / 4) / 3)
    # class 0: 0.9 hit, 0.3; class 1: 0.8 miss, 0.6 hit; class 2: 0.7 hit, 0.1
    assert found.map == pytest.approx((1 + 1 / 2 + 1) / 3)
    assert found.perr == pytest.approx(1.0)
    assert found.hit_at_1 == pytest.approx(1.0)


def test_positives_outside_of_the_top_k_count():
    found = metrics([[0.9, 0.8, 0.7]], [[0, 1, 1]], k=2)
    assert found.gap == pytest.approx((1 / 2) / 2)
    assert found.map == pytest.approx((1 + 0) / 2)  # class 2 is in no list


def test_perr_counts_only_scores_above_zero_and_samples_with_labels():
    found = metrics([[0.5, 0.0, -1.0], [0.9, 0.2, 0.1]], [[1, 1, 0], [0, 0, 0]])
    assert found.perr == pytest.approx(1 / 2)
    assert found.hit_at_1 == pytest.approx(1 / 2)


def test_classes_without_positives_are_left_out():
    found = metrics([[0.9, 0.8], [0.1, 0.2]], [[1, 0], [0, 0]])
    assert found.map == pytest.approx(1.0)


def test_ties_do_not_favour_the_first():
    """All scores equal: an order drawn with seed 0, the same every time."""
    scores, labels = torch.zeros(40, 5), torch.zeros(40, 5, dtype=torch.bool)
    labels[:, 0] = True
    one, two = (label_metrics(scores, labels).gap for _ in range(2))
    assert one == two
    assert 0.1 < one < 0.4  # the share of positives is 0.2; in their own order it would be higher


@pytest.mark.parametrize(("shape", "labels"), [((0, 3), 0), ((2, 3), 0)])
def test_nothing_to_measure_is_nan(shape, labels):
    found = label_metrics(torch.rand(shape), torch.zeros(shape, dtype=torch.bool))
    assert math.isnan(found.gap)
    assert math.isnan(found.map)
    assert math.isnan(found.perr)


def test_shapes_are_checked():
    with pytest.raises(ValueError, match=r"\[N, classes\], got \(2, 3\) and \(2, 4\)"):
        label_metrics(torch.rand(2, 3), torch.zeros(2, 4))


def test_nan_scores_are_refused():
    with pytest.raises(ValueError, match="scores must not be NaN, got some in 1 of 2 samples"):
        metrics([[0.5, math.nan, 0.1], [0.1, 0.2, 0.3]], [[1, 0, 0], [0, 1, 0]])
    assert metrics([[math.inf, -math.inf]], [[1, 0]]).gap == 1


def by_the_definition(scores, labels, k):
    """Loops over Python numbers; distinct scores."""
    N, C = scores.shape
    ranked = [sorted(range(C), key=lambda c: -scores[n, c]) for n in range(N)]
    pooled = [(float(scores[n, c]), bool(labels[n, c]), c) for n in range(N) for c in ranked[n][:k]]

    def precision(entries, positives):
        hits, total = 0, 0.0
        for rank, (_, hit, _) in enumerate(sorted(entries, reverse=True), 1):
            hits += hit
            total += hit * hits / rank
        return total / positives

    counts = labels.sum(0).tolist()
    each = [precision([e for e in pooled if e[2] == c], counts[c]) for c in range(C) if counts[c]]
    rates = []
    for n in range(N):
        if number := int(labels[n].sum()):
            best = ranked[n][:number]
            rates.append(sum(bool(labels[n, c] & (scores[n, c] > 0)) for c in best) / number)
    hit = sum(bool(labels[n, ranked[n][0]]) for n in range(N)) / N
    mean = lambda values: float(sum(values) / len(values))  # noqa: E731
    return precision(pooled, sum(counts)), mean(each), mean(rates), hit


@pytest.mark.parametrize("seed", range(12))
def test_batches_are_the_whole_and_the_definition(seed):
    generator = torch.Generator().manual_seed(seed)
    N, C = 5 + 3 * seed, 2 + 4 * seed
    scores = torch.randn(N, C, generator=generator, dtype=torch.float64)
    labels = torch.rand(N, C, generator=generator) < (0.1, 0.5)[seed % 2]
    labels[0, 0] = True
    k = (1, 5, 20)[seed % 3]
    meter = LabelMeter(k)
    for at in range(0, N, 7):
        meter.add(scores[at : at + 7], labels[at : at + 7])
    found, expected = meter.metrics(), by_the_definition(scores, labels, k)
    assert (found.gap, found.map, found.perr, found.hit_at_1) == pytest.approx(expected, abs=1e-12)
    assert meter.metrics() == label_metrics(scores, labels, k)
