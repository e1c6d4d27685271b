"""What swap() did, as data: what changed, what stayed and why, and the way back."""

from __future__ import annotations

import contextlib

from torch import nn

from lam_kernels.training.text_table import text_table

from .changes import AddSubmodule, Change, SetClass


class SwapError(RuntimeError):
    """swap(strict=True) found something that it cannot swap, or nothing at all."""


class Report:
    """The result of swap(); str() is a table.

    Attributes:
        model: the model, swapped in place.
        changed: module name -> what serves its attention now.
        skipped: module name -> why it stayed as it was.
    """

    def __init__(
        self,
        model: nn.Module,
        number: int,
        changed: dict[str, str],
        skipped: dict[str, str],
        modules: dict[str, nn.Module],
        steps: list[Change],
    ):
        self.model, self.changed, self.skipped = model, changed, skipped
        self._number, self._modules, self._steps = number, modules, steps
        self._in_place = False

    def __str__(self) -> str:
        kind = type(self.model).__name__
        if not self.changed and not self.skipped:
            return f"{kind}: no attention module found"
        rows = [[name or kind, "fused", what] for name, what in self.changed.items()]
        rows += [[name or kind, "stays", why] for name, why in self.skipped.items()]
        head = f"{kind}: {len(self.changed)} attention modules fused, {len(self.skipped)} stay"
        return head + "\n" + text_table(["module", "now", "how, or why not"], rows, left=3)

    def __repr__(self) -> str:
        return f"<Report: {len(self.changed)} changed, {len(self.skipped)} skipped>"

    def __enter__(self) -> Report:
        return self

    def __exit__(self, *_) -> None:
        if self._in_place:
            self.undo()

    def learned_parameters(self) -> list[nn.Parameter]:
        """The parameters of the learned masks that were added: for an optimizer built earlier,
        optimizer.add_param_group({"params": report.learned_parameters()})."""
        added = [step.current() for step in self._steps if isinstance(step, AddSubmodule)]
        return [parameter for lam in added for parameter in lam.parameters()]

    def apply(self) -> None:
        """Puts the swap in place (again, after undo). Learned masks come back as they were, on
        the device and in the dtype that their modules have gone to."""
        if self._in_place:
            raise RuntimeError("this swap is in place already")
        self._free_forwards()
        done = []
        try:
            for step in self._steps:
                step.apply()
                done.append(step)
        except BaseException:
            for step in reversed(done):
                step.revert()
            raise
        self._in_place = True

    def undo(self) -> None:
        """Restores the model: the same objects as before, trained weights kept, learned masks
        taken out. Swaps of the same modules are undone in reverse order; hooks of accelerate that
        came after the swap are removed before."""
        if not self._in_place:
            raise RuntimeError("this swap is not in place: it was undone already")
        for name, module in self._modules.items():
            if module.__dict__["lam_swap"].owner != self._number:
                raise RuntimeError(f"{name} was swapped again later: undo that swap first")
        for step in self._steps:
            if isinstance(step, SetClass) and type(step.module) is not step.new:
                raise RuntimeError(
                    f"a {step.new.__name__} became a {type(step.module).__name__} since (by "
                    "fully_shard or a parametrization?): its old class cannot be given back"
                )
        self._free_forwards()
        for step in reversed(self._steps):
            step.revert()
        self._in_place = False

    def _free_forwards(self) -> None:
        """A forward on the instance goes on with the class that the module had when it was set: one
        that does more than that is refused, before anything is changed."""
        given = {step.module for step in self._steps if isinstance(step, SetClass)}
        found = {
            name: module
            for name, module in self._modules.items()
            if module in given and "forward" in module.__dict__
        }
        for name, module in found.items():
            # remove_hook_from_module leaves the method of the class behind, bound to the instance
            if getattr(module.forward, "__func__", None) is not type(module).forward:
                raise RuntimeError(
                    f"{name or type(module).__name__}: its forward was replaced on the instance "
                    "since (accelerate's add_hook_to_module does), and would not follow the change "
                    "of its class: remove that first (remove_hook_from_module)"
                )
        for module in found.values():
            del module.forward

    @contextlib.contextmanager
    def taken_out(self):
        """The untouched model for the length of a block."""
        self.undo()
        try:
            yield self.model
        finally:
            self.apply()

    def check(self, batch, *, against: str = "untouched"):
        """Runs the model on a batch with and without the swap, prints the largest error of every
        module's output and of all gradients, and returns them: see check.py."""
        from .check import check

        found = check(self, batch, against)
        print(found)
        return found
