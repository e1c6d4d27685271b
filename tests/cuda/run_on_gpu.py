"""Runs the operator cases on a GPU by backend "cuda": operands are copied there, results back.

LAM_EMULATE_CUDA=0 python tests/cuda/run_on_gpu.py [DTYPE ...]

A program of its own: a process has either the GPU kernels or their emulation (with
LAM_EMULATE_CUDA=1 it tries itself out on the latter).
"""

from __future__ import annotations

import sys
from pathlib import Path

TESTS = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(TESTS), str(TESTS.parent), str(TESTS / "ops")]

from on_gpu import through  # noqa: E402
from problems import check  # noqa: E402
from test_masked_attention import CASES  # noqa: E402

from lam_kernels.ops import _cuda  # noqa: E402
from lam_kernels.ops._backends import Kernels  # noqa: E402
from lam_kernels.ops.masked_attention import KERNELS  # noqa: E402

DEVICE = "cpu" if _cuda.emulated() else "cuda"


def main() -> int:
    if why_not := _cuda.unavailable():
        print(f"not run: {why_not}")
        return 2
    service = KERNELS.table["cuda"]
    kernels = Kernels(*(through(kernel, DEVICE) for kernel in service.load()))
    KERNELS.table["cuda"] = service._replace(load=lambda: kernels)
    _cuda.refuses = lambda device: ""  # CPU tensors too: they are moved on the way
    failures = 0
    for dtype in sys.argv[1:] or ("bfloat16", "float16", "float32"):
        for name, case in CASES.items():
            try:
                check(case.but(dtype=dtype), "cuda")
            except Exception as error:
                failures += 1
                print(f"{dtype}, {name}: {type(error).__name__}: {error}")
    print(f"{len(CASES)} cases a dtype, {failures} failed")
    return int(failures > 0)


if __name__ == "__main__":
    raise SystemExit(main())
