"""Prints the predictions of docs/cuda_kernels.md: what the emulator counts for one sample of each
workload, times the samples, and the least time that an H200 needs for it.

LAM_EMULATE_CUDA=1 python tests/cuda/prediction.py

HBM: each operand once, at 4.3 TB/s (a copy measured on an H200). Matrix instructions: at 620
TFLOP/s, about 65 % of the chip's dense bf16 peak, which is what mma.sync reaches there. The times
are lower bounds: latency, launches, softmax and shared memory come on top.
"""

from __future__ import annotations

import ctypes

import torch

import lam_kernels
from lam_kernels.ops import _native

HBM_BYTES_PER_S, MMA_FLOP_PER_S = 4.3e12, 620e12
FLOP_PER_MMA = 2 * 16 * 8 * 16
# name: B, H, Lq, Lk, D, axes of the mask (of B, H), multiplier or bias
WORKLOADS = {
    "W1": (32, 12, 50, 50, 64, "b1", "multiplier"),
    "W5": (32, 8, 75, 32, 32, "b1", "multiplier"),
    "W6": (32, 8, 76, 76, 32, "b1", "multiplier"),
    "W8": (128, 12, 197, 197, 64, "b1", "multiplier"),
    "W12": (64, 8, 300, 300, 128, "11", "multiplier"),
    "W18, stage 1": (1280, 6, 144, 144, 32, "1h", "bias"),
    "W19, stage 1": (5120, 4, 64, 64, 24, "1h", "bias"),
}


def one(library, name: str) -> str:
    B, H, Lq, Lk, D, axes, use = WORKLOADS[name]
    samples = 2  # counted; the rest of the batch does the same
    query, key, value = (
        torch.randn(samples, H, L, D, dtype=torch.bfloat16, requires_grad=True)
        for L in (Lq, Lk, Lk)
    )
    shape = [samples if axes[0] == "b" else 1, H if axes[1] == "h" else 1, Lq, Lk]
    mask = torch.randn(shape, requires_grad=True)
    counted = []
    for backward in (False, True):
        library.lam_emulation_count_banks(0)
        out = lam_kernels.masked_attention(query, key, value, **{use: mask}, backend="cuda")
        if backward:
            library.lam_emulation_count_banks(0)
            out.sum().backward()
        library.lam_emulation_counter.restype = ctypes.c_uint64
        names = ("mma", "launches", "ldmatrix_conflicts")
        counted.append([library.lam_emulation_counter(n.encode()) for n in names])
    mask_bytes = 4 * Lq * Lk * (B if axes[0] == "b" else 1) * (H if axes[1] == "h" else 1)
    rows, keys = B * H * Lq * D * 2, B * H * Lk * D * 2
    moved = (2 * rows + 2 * keys + mask_bytes, 4 * rows + 4 * keys + 2 * mask_bytes)
    cells = []
    for bytes_moved, (mma, launches, conflicts) in zip(moved, counted, strict=True):
        mma *= B // samples
        hbm_us = bytes_moved / HBM_BYTES_PER_S * 1e6
        mma_us = mma * FLOP_PER_MMA / MMA_FLOP_PER_S * 1e6
        cells.append(f"{launches} | {mma:,} | {conflicts} | {bytes_moved / 1e6:.1f}")
        cells.append(f"{hbm_us:.1f} | {mma_us:.1f}")
    return f"| {name} | {' | '.join(cells)} |"


def table() -> str:
    library = ctypes.CDLL(str(_native._PACKAGE / f"_cuda_emulation{_native._SUFFIX}"))
    lam_kernels.backends()
    library.lam_emulation_device(132, 232448)
    columns = ["launches", "mma", "conflicts", "HBM MB", "HBM us", "mma us"]
    heads = [f"{c}, {step}" for step in ("forward", "backward") for c in columns]
    lines = ["| bf16 | " + " | ".join(heads) + " |", "| --- " * (1 + len(heads)) + "|"]
    return "\n".join([*lines, *(one(library, name) for name in WORKLOADS)])


if __name__ == "__main__":
    print(table())
