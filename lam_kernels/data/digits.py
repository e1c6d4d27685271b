"""The 1,797 real handwritten digits (8 x 8 pixels) that scikit-learn carries."""

from __future__ import annotations

import torch

from lam_kernels.optional_package import optional_package

from .labelled_images import LabelledImages, split_by_class


def load_digits(split_seed: int = 0) -> tuple[LabelledImages, LabelledImages]:
    """(train, test): of each class 20 % for the test. Values 0 .. 16 become -1 .. 1."""
    datasets = optional_package("sklearn.datasets", "the digits data set")
    digits = datasets.load_digits()
    pixels = torch.as_tensor(digits.images, dtype=torch.float32)[:, None] / 8 - 1
    labels = torch.as_tensor(digits.target, dtype=torch.int64)
    classes = tuple(str(name) for name in digits.target_names)
    parts = split_by_class(labels, 0.2, split_seed)
    train, test = (LabelledImages(labels[i], classes, pixels=pixels[i]) for i in parts)
    return train, test
