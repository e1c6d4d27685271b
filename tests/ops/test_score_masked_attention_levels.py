"""Every instruction-set level of the C++ kernels of score_masked_attention, each forced by
LAM_CPU_LEVEL in a process of its own."""

from __future__ import annotations

import sys

import levels
import pytest
from levels import LEVELS
from score_networks import case, check, random_case

FIXED = [
    case(B=1, H=2, Lq=Lq, Lk=Lk, D=D, hidden=hidden, depth=depth, heads=heads)
    for Lq, Lk, D, hidden, depth, heads in (
        (1, 1, 1, 1, 1, "each"),
        (31, 33, 64, 32, 4, "each"),
        (130, 128, 32, 100, 2, "mean"),
        (100, 32, 80, 17, 3, "mean"),
    )
]


def cases(level: str):
    dtypes = ("bfloat16",) if level.startswith("amx") else ("float32", "bfloat16")
    fixed = [one.but(dtype=dtype) for one in FIXED for dtype in dtypes]
    return fixed + [random_case(10_000 + n, dtypes[0]) for n in range(2)]


@pytest.mark.backend("cpu")
@pytest.mark.parametrize("level", LEVELS)
def test_level(level):
    levels.assert_silent(__file__, level)


if __name__ == "__main__":
    levels.print_failures(sys.argv[1], cases(sys.argv[1]), check)
