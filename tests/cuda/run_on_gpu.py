"""Runs the operator cases on a GPU by backend "cuda": operands are copied there, results back.

LAM_EMULATE_CUDA=0 python tests/cuda/run_on_gpu.py [DTYPE ...]

A program of its own: a process has either the GPU kernels or their emulation (with
LAM_EMULATE_CUDA=1 it tries itself out on the latter).
"""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

TESTS = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(TESTS), str(TESTS.parent), str(TESTS / "ops")]

import test_global_local_attention as global_local_cases  # noqa: E402
import test_map_gated_attention as map_gated_cases  # noqa: E402
import test_masked_attention as masked_cases  # noqa: E402
import test_masked_attention_low_rank as low_rank_cases  # noqa: E402
import two_maps  # noqa: E402
from on_gpu import through  # noqa: E402
from problems import check  # noqa: E402

from lam_kernels.ops import _cuda  # noqa: E402
from lam_kernels.ops._backends import Kernels  # noqa: E402

DEVICE = "cpu" if _cuda.emulated() else "cuda"
# op -> its cases, and how one is judged
OPS = {
    "masked_attention": (masked_cases.CASES | low_rank_cases.CASES, check),
    "global_local_attention": (global_local_cases.CASES, two_maps.check),
    "map_gated_attention": (map_gated_cases.CASES, two_maps.check),
}


def main() -> int:
    if why_not := _cuda.unavailable():
        print(f"not run: {why_not}")
        return 2
    _cuda.refuses = lambda device: ""  # CPU tensors too: they are moved on the way
    failures = 0
    for op, (cases, judge) in OPS.items():
        page = importlib.import_module(f"lam_kernels.ops.{op}")
        service = page.KERNELS.table["cuda"]
        kernels = Kernels(*(through(kernel, DEVICE) for kernel in service.load()))
        page.KERNELS.table["cuda"] = service._replace(load=lambda kernels=kernels: kernels)
        for dtype in sys.argv[1:] or ("bfloat16", "float16", "float32"):
            for name, case in cases.items():
                try:
                    judge(case.but(dtype=dtype), "cuda")
                except Exception as error:
                    failures += 1
                    print(f"{op}, {dtype}, {name}: {type(error).__name__}: {error}")
        print(f"{op}: {len(cases)} cases a dtype")
    print(f"{failures} failed")
    return int(failures > 0)


if __name__ == "__main__":
    raise SystemExit(main())
