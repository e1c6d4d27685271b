"""How long a model takes with and without its swap, measured in turns."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .check import call, tensors_of
from .report import Report

_WARM_UP = 2


class Times(NamedTuple):
    """Medians before and after, and of the ratio between neighbours, which met the same load."""

    before_ms: float
    after_ms: float
    gain: float  # before / after: above 1 the swapped model is the faster one
    gain_quartiles: tuple[float, float]

    def __str__(self) -> str:
        low, high = self.gain_quartiles
        return (
            f"{self.before_ms:.1f} ms before, {self.after_ms:.1f} ms after, "
            f"{self.gain:.2f} x the speed (quartiles {low:.2f} to {high:.2f})"
        )


def forward_times(report: Report, batch, samples: int) -> Times:
    """A forward pass of the model as it stands, without gradients."""
    device = _device(report.model)

    @torch.no_grad()
    def forward() -> float:
        start = _now(device)
        call(report.model, batch)
        return _now(device) - start

    return _in_turns(report, forward, samples)


def step_times(report: Report, batch, samples: int) -> Times:
    """A training step: forward, backward, AdamW. The weights stay what they are."""
    model = report.model
    device = _device(model)
    optimizer = torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad], lr=0.0, weight_decay=0.0
    )

    def step() -> float:
        start = _now(device)
        output = call(model, batch)
        loss = getattr(output, "loss", None)
        if not isinstance(loss, Tensor):
            loss = sum(t.float().square().mean() for t in tensors_of(output) if t.requires_grad)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return _now(device) - start

    training = [(module, module.training) for module in model.modules()]
    model.train()
    try:
        return _in_turns(report, step, samples)
    finally:
        for module, flag in training:
            module.training = flag
        optimizer.zero_grad()


def _in_turns(report: Report, run: Callable[[], float], samples: int) -> Times:
    seconds: dict[bool, list[float]] = {False: [], True: []}
    for sample in range(_WARM_UP + samples):
        # whoever comes second finds warmer caches: each does so half of the time
        for swapped in (sample % 2 == 1, sample % 2 == 0):
            with contextlib.nullcontext() if swapped else report.taken_out():
                seconds[swapped].append(run())
    before, after = (
        torch.tensor(seconds[swapped][_WARM_UP:], dtype=torch.float64) for swapped in (False, True)
    )
    low, gain, high = (before / after).quantile(torch.tensor([0.25, 0.5, 0.75]).double()).tolist()
    return Times(
        1e3 * float(before.quantile(0.5)), 1e3 * float(after.quantile(0.5)), gain, (low, high)
    )


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
