"""GAP, MAP, PERR and Hit@1 on cases worked by hand."""

from __future__ import annotations

import math

import pytest
import torch

from lam_kernels.training.label_metrics import label_metrics


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
