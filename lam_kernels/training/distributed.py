"""Training in several processes: what torchrun started, or one process when it did not.

Every process takes every world-th sample of each batch. Gradients and losses are averaged with the
weight of the samples behind them, so that the losses are those of one process within rounding.
"""

from __future__ import annotations

import os
from collections.abc import Callable

import torch
from torch import Tensor, nn

from lam_kernels.user_error import UserError

PARALLEL = ("ddp", "fsdp")


class Ranks:
    """This process among those that torchrun started; rank 0 of 1 without torchrun."""

    def __init__(self, device: str = "cpu"):
        self.world = int(os.environ.get("WORLD_SIZE", "1"))
        self.rank = int(os.environ.get("RANK", "0"))
        if self.world > 1 and not torch.distributed.is_initialized():
            if device == "cuda":
                torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
            torch.distributed.init_process_group("nccl" if device == "cuda" else "gloo")

    @property
    def first(self) -> bool:
        """Prints, draws and writes files."""
        return self.rank == 0

    def close(self) -> None:
        if self.world > 1 and torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()

    def wrap(self, model: nn.Module, how: str = "ddp", layers=()) -> nn.Module:
        """The model with averaged gradients: DistributedDataParallel, or FSDP2 in place (`layers`
        are sharded one by one). Swap before, build the optimizer after."""
        if self.world == 1:
            return model
        if how == "ddp":
            return nn.parallel.DistributedDataParallel(model)
        if how != "fsdp":
            raise UserError(f"--parallel must be one of {', '.join(PARALLEL)}, got {how!r}")
        from torch.distributed.fsdp import fully_shard

        mesh = torch.distributed.init_device_mesh(
            next(model.parameters()).device.type, (self.world,)
        )
        for layer in layers:
            fully_shard(layer, mesh=mesh)
        return fully_shard(model, mesh=mesh)

    def mean_loss(self, loss_of: Callable[[Tensor], tuple[Tensor, int]], indices: Tensor) -> Tensor:
        """The mean loss of this process's samples, weighted: its mean over the processes is the
        mean over all samples, and so is its gradient's.

        loss_of(indices) gives the mean and how many samples are behind it, which may be fewer where
        some cannot be read, or 0: every process takes every step.
        """
        own = indices[self.rank :: self.world]
        # more processes than samples: this one computes along with weight 0
        loss, count = loss_of(own if len(own) else indices[:1])
        share = count if len(own) else 0
        return loss * (share / max(1 / self.world, self.mean(float(share))))

    def mean(self, value: float) -> float:
        if self.world == 1:
            return value
        total = torch.tensor(value, dtype=torch.float64)
        if torch.distributed.get_backend() == "nccl":
            total = total.cuda()
        torch.distributed.all_reduce(total)
        return total.item() / self.world

    def gather(self, found: dict) -> None:
        """Adds the entries that the other processes have, in every process."""
        if self.world == 1:
            return
        all_of_them: list[dict] = [{}] * self.world
        torch.distributed.all_gather_object(all_of_them, found)
        for one in all_of_them:
            found.update(one)


def refuse_torchrun(what: str) -> None:
    """For commands that start processes of their own."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError(f"under torchrun {what}")
