"""Images with labels, in memory or in files, read batch by batch."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor


class LabelledImages:
    """Images as float32 [n, channels, size, size] in [-1, 1], labels int64 [N].

    Either `pixels` (uint8, or float in [-1, 1]; all in memory) or `paths` with `read`, which makes
    one uint8 image [channels, size, size] of a path and is called by two threads.
    """

    def __init__(
        self,
        labels: Tensor,
        classes: tuple[str, ...],
        *,
        pixels: Tensor | None = None,
        paths: list[Path] | None = None,
        read: Callable[[Path], Tensor] | None = None,
    ):
        self.labels, self.classes = labels, classes
        self.pixels, self.paths, self.read = pixels, paths, read

    def __len__(self) -> int:
        return len(self.labels)

    def batch(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        if self.pixels is not None:
            images = self.pixels[indices]
        else:
            with ThreadPoolExecutor(2) as pool:
                images = torch.stack(
                    list(pool.map(self.read, [self.paths[i] for i in indices.tolist()]))
                )
        if not images.is_floating_point():
            images = images.float() / 127.5 - 1.0
        return images, self.labels[indices]


def split_by_class(labels: Tensor, fraction: float, seed: int) -> tuple[Tensor, Tensor]:
    """(train, test) indices: of each class a seeded random `fraction` for the test, but one image
    of a class trains.
    """
    generator = torch.Generator().manual_seed(seed)
    train, test = [], []
    for label in labels.unique().tolist():
        members = torch.nonzero(labels == label).flatten()
        members = members[torch.randperm(len(members), generator=generator)]
        count = min(round(len(members) * fraction), len(members) - 1)
        test.append(members[:count])
        train.append(members[count:])
    return torch.cat(train).sort().values, torch.cat(test).sort().values
