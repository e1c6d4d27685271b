"""Every instruction-set level of the C++ kernels of score_masked_attention, each forced by
LAM_CPU_LEVEL in a process of its own."""

from __future__ import annotations

import sys

import pytest
from score_networks import case, check, random_case
from test_masked_attention_levels import AVAILABLE, LEVELS, run

from lam_kernels.ops import _native

FIXED = [
    case(B=1, H=2, Lq=Lq, Lk=Lk, D=D, hidden=hidden, depth=depth, heads=heads)
    for Lq, Lk, D, hidden, depth, heads in (
        (1, 1, 1, 1, 1, "each"),
        (31, 33, 64, 32, 4, "each"),
        (130, 128, 32, 100, 2, "mean"),
        (100, 32, 80, 17, 3, "mean"),
    )
]


def main(level: str) -> None:
    """Runs in the subprocess: prints a line for each case that fails."""
    if _native.level() != level:
        print(f"asked for {level}, runs {_native.level()}")
    dtypes = ("bfloat16",) if level.startswith("amx") else ("float32", "bfloat16")
    cases = [one.but(dtype=dtype) for one in FIXED for dtype in dtypes]
    cases += [random_case(10_000 + n, dtypes[0]) for n in range(2)]
    for one in cases:
        try:
            check(one, "cpu")
        except AssertionError as failure:
            print(failure, flush=True)


@pytest.mark.backend("cpu")
@pytest.mark.parametrize("level", LEVELS)
def test_level(level):
    if level not in AVAILABLE:
        pytest.skip(f"cpu level {level}: this machine runs {', '.join(sorted(AVAILABLE))}")
    done = run(level, __file__, level)
    assert done.returncode == 0, done.stderr
    assert not done.stdout.strip(), done.stdout


if __name__ == "__main__":
    main(sys.argv[1])
