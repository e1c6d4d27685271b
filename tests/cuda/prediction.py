"""Prints the predictions of docs/cuda_kernels.md: what the emulator counts for two samples of each
workload, times the samples, and the least time that an H200 needs for it.

LAM_EMULATE_CUDA=1 python tests/cuda/prediction.py

The workloads are the cases that test the predictions on a GPU (bench/cases.py):

python -m bench run --set gpu --device cuda --graph --case 'gpu-W*'

HBM: each operand and result once, at 4.3 TB/s (a copy measured on an H200). Matrix instructions: at
620 TFLOP/s, about 65 % of the chip's dense bf16 peak, which is what mma.sync reaches there. The
times are lower bounds: latency, launches, softmax and shared memory come on top. No key is padding.
"""

from __future__ import annotations

import ctypes
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import lam_kernels
from bench.cases import CASES
from bench.ops import masked_attention as page
from lam_kernels.ops import _native

HBM_BYTES_PER_S, MMA_FLOP_PER_S = 4.3e12, 620e12
FLOP_PER_MMA = 2 * 16 * 8 * 16
SAMPLES = 2  # counted; the rest of the batch does the same
NAMES = ("mma", "launches", "ldmatrix_conflicts")


def workloads() -> dict[str, page.Problem]:
    chosen = {name: case for name, case in CASES.items() if name.startswith("gpu-W")}
    return {
        name.removeprefix("gpu-"): page.Problem(**case.problem, dtype="bfloat16")
        for name, case in chosen.items()
    }


def counted(library, problem: page.Problem) -> list[list[int]]:
    """NAMES of the forward pass and of the backward pass."""
    operands = page.draw(problem.but(B=SAMPLES, key_mask=False))
    masks = {"multiplier": operands.multiplier, "bias": operands.bias}

    def counts() -> list[int]:
        return [library.lam_emulation_counter(name.encode()) for name in NAMES]

    library.lam_emulation_count_banks(0)
    out = lam_kernels.masked_attention(
        operands.query, operands.key, operands.value, **masks, backend="cuda"
    )
    forward = counts()
    library.lam_emulation_count_banks(0)
    out.sum().backward()
    return [forward, counts()]


def row(library, name: str, problem: page.Problem) -> str:
    cells = []
    for direction, counts in zip(("fwd", "bwd"), counted(library, problem), strict=True):
        mma, launches, conflicts = counts
        mma *= problem.B // SAMPLES
        moved = page.least_bytes(problem, direction)
        hbm_us = moved / HBM_BYTES_PER_S * 1e6
        mma_us = mma * FLOP_PER_MMA / MMA_FLOP_PER_S * 1e6
        cells.append(f"{launches} | {mma:,} | {conflicts} | {moved / 1e6:.1f}")
        cells.append(f"{hbm_us:.1f} | {mma_us:.1f}")
    return f"| {name} | {' | '.join(cells)} |"


def table() -> str:
    library = ctypes.CDLL(str(_native._PACKAGE / f"_cuda_emulation{_native._SUFFIX}"))
    library.lam_emulation_counter.restype = ctypes.c_uint64
    lam_kernels.backends()
    library.lam_emulation_device(132, 232448)
    columns = ["launches", "mma", "conflicts", "HBM MB", "HBM us", "mma us"]
    heads = [f"{c}, {step}" for step in ("forward", "backward") for c in columns]
    lines = ["| bf16 | " + " | ".join(heads) + " |", "| --- " * (1 + len(heads)) + "|"]
    return "\n".join([*lines, *(row(library, *one) for one in workloads().items())])


if __name__ == "__main__":
    print(table())
