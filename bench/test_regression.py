"""A few cases under pytest-benchmark: `pytest bench --benchmark-only` (--benchmark-compare, ...).

The cases, the operands and the check against the reference are the bench's own; only the clock is
pytest-benchmark's, which knows nothing of other load, so targets are not judged here.
"""

from __future__ import annotations

import pytest

from bench import check, measure
from bench.cases import CASES
from bench.contender import contender
from bench.ops import masked_attention as page
from lam_kernels import backends

_CHOSEN = [
    ("dense-L50", "both"),
    ("dense-L197", "both"),
    ("forward-L197", "fwd"),
    ("nomask-L197", "both"),
    ("dense-L1024", "both"),
    ("toeplitz64-bias", "both"),
    ("blockdiagonal64-bias", "both"),
    ("overhead-tiny", "both"),
]


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize(("name", "direction"), _CHOSEN, ids=[f"{n}-{d}" for n, d in _CHOSEN])
def test_ours(benchmark, name, direction, dtype):
    reason = backends()["cpu"]
    if reason:
        pytest.skip(f"backend cpu: {reason}")
    problem = measure.problem_of(CASES[name], dtype)
    one = contender(page, "ours", problem, direction, "cpu", page.draw)
    _, wrong = check.problems_in(one.result(), page, problem)
    assert not wrong
    benchmark.group = f"{name} {dtype}"
    benchmark(one.run)
