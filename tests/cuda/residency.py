"""Prints the table of docs/cuda_kernels.md: what lies in shared memory at once, by the planner.

python tests/cuda/residency.py
"""

from __future__ import annotations

import ctypes

from lam_kernels.ops import _native

GPUS = {"sm_80": 166912, "sm_90, sm_100": 232448}  # bytes of shared memory that a block may have
DTYPES = {"fp32": 0, "bf16, fp16": 1}
HEAD_DIMS = ((16, 16), (32, 32), (64, 64), (64, 32), (128, 128))
LENGTHS = (50, 144, 197, 320)


def cell(
    library: ctypes.CDLL, dtype: int, L: int, dims: tuple[int, int], room: int, backward: bool
):
    plan = (ctypes.c_int * 4)()
    library.lam_emulation_layout(dtype, L, L, *dims, int(backward), room, plan)
    rows, stages, chunks, used = plan
    held = "all" if stages >= chunks else f"{stages} of {chunks}"
    return f"{rows} / {held} / {used / 1024:.0f}"


def table() -> str:
    library = ctypes.CDLL(str(_native._PACKAGE / f"_cuda_emulation{_native._SUFFIX}"))
    lines = ["| GPU | dtype | D, Dv | pass | " + " | ".join(f"L = {L}" for L in LENGTHS) + " |"]
    lines.append("| --- " * (4 + len(LENGTHS)) + "|")
    for gpu, room in GPUS.items():
        for name, dtype in DTYPES.items():
            for dims in HEAD_DIMS:
                for backward in (False, True):
                    cells = [cell(library, dtype, L, dims, room, backward) for L in LENGTHS]
                    step = "backward" if backward else "forward"
                    head = f"| {gpu} | {name} | {dims[0]}, {dims[1]} | {step} | "
                    lines.append(head + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
