"""Every instruction-set level of the C++ kernels, each forced by LAM_CPU_LEVEL in a process of its
own."""

from __future__ import annotations

import sys
from functools import partial

import levels
import pytest
from levels import AVAILABLE, LEVELS
from problems import check, random_low_rank_problem, random_problem

from python_ref.inputs import Problem

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
# More than one region: gradients in which one region alone has a part, or several that come in
# order or not, rows of regions that see nothing, keys that no row sees.
long = partial(Problem, B=1, H=2, D=40, dtype="bfloat16", dropout_p=0.1, lse_grad=True)
REGIONS = [
    long(Lq=800, pattern="BlockDiagonal(64)", bias="1h1k"),
    long(Lq=800, Lk=512, pattern="BlockDiagonal(96)", multiplier="11qk"),
    long(Lq=1100, Lk=400, pattern='Causal(alignment="end")'),
    long(H=4, Hkv=2, Lq=800, pattern="DilatedToeplitz(90, 5)", multiplier="11qk"),
    long(H=3, Hkv=1, Lq=700, pattern=("Toeplitz(9)", "DilatedToeplitz(9, 3)", None)),
    long(Lq=700, Dv=72, multiplier="1h1k", key_mask=True),
    long(Lq=1000, pattern="Toeplitz(40)", bias="1h1k"),
    long(Lq=900, Lk=700, pattern='Toeplitz(200, alignment="end")'),
    long(Lq=900, pattern="DilatedToeplitz(80, 2)"),
    long(Lq=900, pattern=("Toeplitz(30)", None), multiplier="b1qk"),
    long(Lq=800, Lk=900, multiplier="11qk"),
]


def problems(level: str) -> list[Problem]:
    dtype = "bfloat16" if level.startswith("amx") else None  # the one dtype that tiles serve
    drawn = [random_problem(10_000 + n, dtype) for n in range(COUNT)]
    drawn += [random_low_rank_problem(10_000 + n, dtype) for n in range(COUNT // 3)]
    fixed = FIXED if dtype is None else [p for p in FIXED if p.dtype == dtype] + REGIONS
    return fixed + drawn


@pytest.mark.backend("cpu")
@pytest.mark.parametrize("level", LEVELS)
def test_level(level):
    levels.assert_silent(__file__, level)


@pytest.mark.backend("cpu")
@pytest.mark.parametrize("number", range(len(REGIONS)))
def test_regions(number):
    """At the machine's own level, with its threads."""
    check(REGIONS[number], "cpu")


@pytest.mark.backend("cpu")
@pytest.mark.parametrize("level", ["no_such_level", *sorted({"avx2", "avx512", "amx"} - AVAILABLE)])
def test_level_that_cannot_run_is_refused(level):
    """Nothing crashes on a lesser CPU, and a forced level is never replaced in silence."""
    done = levels.run(level, "-c", "import lam_kernels; print(lam_kernels.backends()['cpu'])")
    assert done.returncode == 0, done.stderr
    assert f"LAM_CPU_LEVEL={level}" in done.stdout


if __name__ == "__main__":
    levels.print_failures(sys.argv[1], problems(sys.argv[1]), check)
