"""python -m lam_kernels swap module:function: swap, check and time somebody's model."""

from __future__ import annotations

import argparse
import importlib
import os
import sys
import time
import warnings

import torch
from torch import Tensor, nn

from lam_kernels.user_error import UserError

from .check import call, tensors_of
from .learned_mask import LearnedMask
from .report import Report, SwapError
from .swapping import swap

SUMMARY = "swap the fused ops into a model of yours, check it, and time a training step"
_EPILOG = """\
MODULE:FUNCTION is called without arguments and returns the model, or (model, batch); the batch is a
dict of keyword arguments, a tuple of positional ones, or a tensor. Without a batch there is only
the report. The loss is output.loss where there is one, else the mean square of the outputs.

examples:
  %(prog)s my_project.models:build
  %(prog)s my_project.models:build --learned-mask 128 --fusion add
  %(prog)s my_project.models:build --backend cpu --strict
"""
_WARM_UP = 2


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = _EPILOG
    parser.add_argument("factory", metavar="MODULE:FUNCTION", help="returns model or model, batch")
    parser.add_argument("--learned-mask", type=int, metavar="MAX_LEN", help="add a learned mask")
    parser.add_argument("--scope", choices=("layer", "global"), default="layer")
    parser.add_argument("--fusion", choices=("mul", "add"), default="mul")
    parser.add_argument("--backend", help="of the op (default: the first that serves the device)")
    parser.add_argument("--strict", action="store_true", help="exit 2 where any module stays")
    parser.add_argument("--steps", type=int, default=10, metavar="N", help="timed (default: 10)")
    parser.add_argument("--threads", type=int, metavar="N", help="CPU threads (default: torch's)")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    if args.threads is not None:
        if args.threads < 1:
            raise UserError(f"--threads must be at least 1, got {args.threads}")
        torch.set_num_threads(args.threads)
    if args.steps < 1:
        raise UserError(f"--steps must be at least 1, got {args.steps}")
    model, batch = _made(args.factory)
    if batch is not None:  # a batch that does not fit is the model's own error, from its own code
        with torch.no_grad():
            call(model, batch)
    try:
        mask = None
        if args.learned_mask is not None:
            mask = LearnedMask(args.learned_mask, scope=args.scope, fusion=args.fusion)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that nothing was swapped is the report itself
            report = swap(model, learned_mask=mask, backend=args.backend, strict=args.strict)
    except (SwapError, ValueError) as error:
        raise UserError(" ".join(str(error).split())) from None
    print(report)
    if not report.changed:
        return 0
    if batch is None:
        print(f"{args.factory} returned no batch beside the model: nothing checked, nothing timed")
        return 0
    print()
    try:
        found = report.check(batch)
        print()
        before, after = step_seconds(report, batch, args.steps)
    except ValueError as error:  # left padding under a learned mask, no gradient to compare, ...
        raise UserError(" ".join(str(error).split())) from None
    print(
        f"training step (forward, backward, AdamW), median of {args.steps}, "
        f"{torch.get_num_threads()} threads\n"
        f"  before the swap  {before * 1e3:.1f} ms\n"
        f"  after it         {after * 1e3:.1f} ms   {before / after:.2f} x the speed"
    )
    return 0 if found.ok else 1


def _made(factory: str) -> tuple[nn.Module, object]:
    name, _, function = factory.partition(":")
    if not name or not function or name.startswith("."):
        raise UserError(f"{factory!r} must be MODULE:FUNCTION, for example my_project.models:build")
    if (here := os.getcwd()) not in sys.path:  # as python -m does for the program itself
        sys.path.insert(0, here)
    try:
        module = importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{name}.".startswith(f"{error.name}."):
            raise
        raise UserError(f"there is no module {name} to import from {here}") from None
    made = getattr(module, function, None)
    if not callable(made):
        raise UserError(f"{name} has no function {function}")
    result = made()
    model, batch = result if isinstance(result, tuple) and len(result) == 2 else (result, None)
    if not isinstance(model, nn.Module):
        raise UserError(
            f"{factory} must return a torch.nn.Module, or one and a batch, "
            f"but returned {type(model).__name__}"
        )
    return model, batch


def step_seconds(report: Report, batch, steps: int) -> tuple[float, float]:
    """Medians before and after the swap, taken in turns; the weights stay what they are."""
    model = report.model
    optimizer = torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad], lr=0.0, weight_decay=0.0
    )
    training = [(module, module.training) for module in model.modules()]
    times: tuple[list[float], list[float]] = ([], [])
    model.train()
    try:
        for _ in range(_WARM_UP + steps):
            with report.taken_out():
                times[0].append(_step(model, batch, optimizer))
            times[1].append(_step(model, batch, optimizer))
    finally:
        for module, flag in training:
            module.training = flag
        optimizer.zero_grad()
    before, after = (
        float(torch.tensor(t[_WARM_UP:], dtype=torch.float64).quantile(0.5)) for t in times
    )
    return before, after


def _step(model: nn.Module, batch, optimizer: torch.optim.Optimizer) -> float:
    device = next(model.parameters()).device
    start = _now(device)
    output = call(model, batch)
    loss = getattr(output, "loss", None)
    if not isinstance(loss, Tensor):
        loss = sum(t.float().square().mean() for t in tensors_of(output) if t.requires_grad)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return _now(device) - start


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
