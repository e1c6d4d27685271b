"""Every instruction-set level of the C++ kernels, each forced by LAM_CPU_LEVEL in a process of its
own."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from backends import TESTS
from problems import check, random_low_rank_problem, random_problem

from lam_kernels.ops import _native
from python_ref.inputs import Problem

LEVELS = ("portable", "avx2", "avx512", "amx", "amx_emulated")
AVAILABLE = set(_native.available_levels())
COUNT = 60

# One problem for every tile boundary that a level may have, in the dtypes whose paths differ.
FIXED = [
    Problem(B=1, H=2, Lq=Lq, Lk=Lk, D=D, multiplier="11qk", bias="1h1k", dtype=dtype, lse_grad=True)
    for dtype in ("float32", "bfloat16", "float16")
    for Lq, Lk, D in ((1, 1, 1), (31, 33, 64), (130, 515, 32), (257, 64, 80), (100, 129, 256))
]
FIXED += [
    p.but(multiplier="rank 20: 11 11 11", bias="rank 3: 1h 1h") for p in FIXED if p.Lq in (31, 257)
]


def problems(level: str) -> list[Problem]:
    dtype = "bfloat16" if level.startswith("amx") else None  # the one dtype that tiles serve
    drawn = [random_problem(10_000 + n, dtype) for n in range(COUNT)]
    drawn += [random_low_rank_problem(10_000 + n, dtype) for n in range(COUNT // 3)]
    return [p for p in FIXED if dtype in (None, p.dtype)] + drawn


def main(level: str) -> None:
    """Runs in the subprocess: prints a line for each problem that fails."""
    if _native.level() != level:
        print(f"asked for {level}, runs {_native.level()}")
    for problem in problems(level):
        try:
            check(problem, "cpu")
        except AssertionError as failure:
            print(failure, flush=True)


def run(level: str, *arguments: str) -> subprocess.CompletedProcess:
    environment = os.environ | {"LAM_CPU_LEVEL": level, "OMP_WAIT_POLICY": "PASSIVE"}
    paths = [str(TESTS), str(TESTS.parent), environment.get("PYTHONPATH", "")]
    environment["PYTHONPATH"] = os.pathsep.join(p for p in paths if p)
    command = [sys.executable, *(arguments or (__file__, level))]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)


@pytest.mark.backend("cpu")
@pytest.mark.parametrize("level", LEVELS)
def test_level(level):
    if level not in AVAILABLE:
        pytest.skip(f"cpu level {level}: this machine runs {', '.join(sorted(AVAILABLE))}")
    done = run(level)
    assert done.returncode == 0, done.stderr
    assert not done.stdout.strip(), done.stdout


@pytest.mark.backend("cpu")
@pytest.mark.parametrize("level", ["no_such_level", *sorted(set(LEVELS) - AVAILABLE)])
def test_level_that_cannot_run_is_refused(level):
    """Nothing crashes on a lesser CPU, and a forced level is never replaced in silence."""
    done = run(level, "-c", "import lam_kernels; print(lam_kernels.backends()['cpu'])")
    assert done.returncode == 0, done.stderr
    assert f"LAM_CPU_LEVEL={level}" in done.stdout


if __name__ == "__main__":
    main(sys.argv[1])
