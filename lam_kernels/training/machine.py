"""The options of every task that say on which machine it runs, and their checks."""

from __future__ import annotations

import argparse
import os

import torch

import lam_kernels
from lam_kernels.user_error import UserError


def add_machine_arguments(group) -> None:
    group.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="default: cpu")
    group.add_argument("--threads", type=int, metavar="N", help="CPU threads (default: torch's)")


def apply_machine(args: argparse.Namespace) -> None:
    if args.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: torch sees no GPU here")
    if args.threads is not None:
        most = 4 * (os.cpu_count() or 1)
        if not 1 <= args.threads <= most:
            raise UserError(f"--threads must be 1 to {most} on this machine, got {args.threads}")
        torch.set_num_threads(args.threads)


def check_backend(backend: str | None, device: str) -> None:
    """A backend that cannot run is a sentence now, not a traceback after the data was read."""
    if device != "cpu":
        return
    known = lam_kernels.backends()
    if backend is not None and backend not in known:
        raise UserError(f"--backend must be one of {', '.join(known)}, got {backend}")
    reason = known[backend or "cpu"]
    if reason:
        raise UserError(f"the backend {backend or 'cpu'} cannot run: {reason}")
