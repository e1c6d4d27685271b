"""The training loop: same seed, same losses, interrupted and resumed or not."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lam_kernels.user_error import UserError

from .checkpoint import Checkpoint, finite_list
from .distributed import Ranks, refuse_torchrun
from .progress import Progress

MAX_SEED = 2**62
_SKIPPED_STEPS = 2  # the first steps of a process pay for caches and page faults


@dataclass(frozen=True)
class LoopOptions:
    """How to train; plain data for the checkpoint. Warm-up then cosine to 0, AdamW, gradients
    clipped at norm 1.
    """

    epochs: int
    batch_size: int
    lr: float
    weight_decay: float = 0.05
    warmup: float = 0.1  # share of all steps
    seed: int = 0
    dtype: str = "fp32"  # or "bf16": autocast

    def __post_init__(self):
        for name, limit in (("epochs", 10**6), ("batch_size", 10**6), ("seed", MAX_SEED)):
            value = getattr(self, name)
            low = 0 if name == "seed" else 1
            if type(value) is not int or not low <= value <= limit:
                raise ValueError(f"{name} must be an integer from {low} to {limit}, got {value!r}")
        for name, limit in (("lr", 100.0), ("weight_decay", 100.0), ("warmup", 1.0)):
            value = getattr(self, name)
            if type(value) not in (int, float) or not 0 <= value <= limit:
                raise ValueError(f"{name} must be from 0 to {limit:g}, got {value!r}")
        if self.dtype not in ("fp32", "bf16"):
            raise ValueError(f"dtype must be 'fp32' or 'bf16', got {self.dtype!r}")

    def autocast(self, device: str) -> torch.autocast:
        return torch.autocast(device, torch.bfloat16, enabled=self.dtype == "bf16")


def new_history() -> dict[str, list]:
    """One loss and one time a step, one accuracy (or what the task measures) an epoch."""
    return {"loss": [], "step_seconds": [], "full_batch": [], "accuracy": []}


def read_history(checkpoint: Checkpoint) -> dict[str, list]:
    """The history in a checkpoint, checked: finite numbers, a loss a step, a measure an epoch."""
    history = {name: finite_list(checkpoint, name) for name in new_history()}
    steps = {len(history[name]) for name in ("loss", "step_seconds", "full_batch")}
    if len(steps) != 1 or len(history["accuracy"]) != checkpoint.epoch:
        raise UserError(f"{checkpoint.path}: the lists of the record history differ in length")
    return history


def make_optimizer(model: nn.Module, options: LoopOptions) -> torch.optim.AdamW:
    """AdamW; no weight decay on vectors (biases, norms), where it would pull a mask's identity
    bias to 0.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.dim() > 1], "weight_decay": options.weight_decay},
        {"params": [p for p in parameters if p.dim() <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW([g for g in groups if g["params"]], lr=options.lr)


def fit(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    options: LoopOptions,
    *,
    count: int,  # training samples
    loss_of: Callable[[Tensor], tuple[Tensor, int]],  # indices [n] -> mean loss, of how many
    history: dict[str, list],
    first_epoch: int,
    label: str,
    device: str,
    after_epoch: Callable[[int], str],  # epochs done -> a note; measures, saves
    ranks: Ranks | None = None,
) -> None:
    """Runs the epochs first_epoch .. epochs - 1. The order of samples depends on seed and epoch
    alone. `ranks` is for a task that wrapped its model with it: each process then takes its share
    of every batch, and history holds the loss over all.
    """
    if ranks is None:
        refuse_torchrun("only image-classification and swapped-digits train in several processes")
        ranks = Ranks(device)
    steps = math.ceil(count / options.batch_size)
    total = steps * options.epochs
    with Progress(total, label, done=first_epoch * steps, silent=not ranks.first) as progress:
        for epoch in range(first_epoch, options.epochs):
            model.train()
            order = _order(options.seed, epoch, count)
            for step, indices in enumerate(order.split(options.batch_size)):
                for group in optimizer.param_groups:
                    group["lr"] = options.lr * _schedule(
                        epoch * steps + step, total, options.warmup
                    )
                start = time.perf_counter()
                with options.autocast(device):
                    loss = ranks.mean_loss(loss_of, indices)
                optimizer.zero_grad()
                loss.backward()
                nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                value = ranks.mean(loss.item())  # waits for the device
                history["step_seconds"].append(time.perf_counter() - start)
                history["loss"].append(value)
                history["full_batch"].append(int(len(indices) == options.batch_size))
                if not math.isfinite(value):
                    raise UserError(
                        f"the loss became {value} in epoch {epoch + 1}, step {step + 1}: "
                        "use a smaller --lr"
                    )
                progress.step(f"loss {value:.3f}")
            progress.note(f"epoch {epoch + 1}/{options.epochs}, {after_epoch(epoch + 1)}")


def seconds_per_step(history: dict[str, list]) -> float:
    """Median over the steps of a full batch without the first ones."""
    timed = list(zip(history["step_seconds"], history["full_batch"], strict=True))
    chosen = [s for s, full in timed[_SKIPPED_STEPS:] if full] or [s for s, _ in timed]
    return float(torch.tensor(chosen, dtype=torch.float64).quantile(0.5)) if chosen else math.nan


def _order(seed: int, epoch: int, count: int) -> Tensor:
    generator = torch.Generator().manual_seed((seed * 1_000_003 + epoch) % 2**63)
    return torch.randperm(count, generator=generator)


def _schedule(step: int, total: int, warmup: float) -> float:
    rise = max(1, round(total * warmup))
    if step < rise:
        return (step + 1) / rise
    return 0.5 * (1 + math.cos(math.pi * (step - rise) / max(1, total - rise)))
