"""python -m lam_kernels swap module:function: swap, check and time somebody's model."""

from __future__ import annotations

import argparse
import importlib
import inspect
import os
import sys
import warnings

import torch
from torch import nn

from lam_kernels.user_error import UserError

from .check import call
from .learned_mask import LearnedMask
from .report import SwapError
from .swapping import swap
from .timing import step_times

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
        times = step_times(report, batch, args.steps)
    except ValueError as error:  # left padding under a learned mask, no gradient to compare, ...
        raise UserError(" ".join(str(error).split())) from None
    print(
        f"training step (forward, backward, AdamW), median of {args.steps}, "
        f"{torch.get_num_threads()} threads: {times}"
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
    _check_needs_no_argument(factory, made)
    result = made()
    model, batch = result if isinstance(result, tuple) and len(result) == 2 else (result, None)
    if not isinstance(model, nn.Module):
        raise UserError(
            f"{factory} must return a torch.nn.Module, or one and a batch, "
            f"but returned {type(model).__name__}"
        )
    return model, batch


def _check_needs_no_argument(factory: str, made) -> None:
    try:
        signature = inspect.signature(made)
    except ValueError:  # of a builtin: the call itself will tell
        return
    try:
        signature.bind()
    except TypeError as error:
        raise UserError(
            f"{factory} is called without arguments: {error}. Write a function that takes none and "
            "calls it"
        ) from None
