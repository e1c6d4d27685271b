"""A mask too long to store: forward and backward at L = 32768, where M and its gradient would be
8 GiB."""

from __future__ import annotations

import subprocess
import sys

import pytest
from backends import TESTS

SCRIPT = """
import resource, time, torch
from lam_kernels import LowRankMask, masked_attention

torch.set_num_threads(2)
H, D, rank = 8, 64, 64

def run(L):
    torch.manual_seed(0)
    query, key, value = (torch.randn(1, H, L, D, requires_grad=True) for _ in range(3))
    rows = (torch.randn(1, 1, L, rank) * rank**-0.5).requires_grad_()
    columns = torch.randn(1, 1, L, rank, requires_grad=True)
    offset = torch.ones(1, 1, 1, L, requires_grad=True)
    grad_out = torch.randn(1, H, L, D)
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
    mask = LowRankMask(rows, columns, offset)
    out = masked_attention(query, key, value, multiplier=mask, backend="cpu")
    out.backward(grad_out)
    seconds = time.perf_counter() - start
    extra = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 / 1e6
    picked = torch.arange(0, L, max(1, L // 7))
    few = [x.detach()[:, :, picked].double().requires_grad_() for x in (query, rows)]
    wide = [x.detach().double() for x in (key, value, columns, offset)]
    expected = masked_attention(
        few[0], wide[0], wide[1], multiplier=LowRankMask(few[1], wide[2], wide[3]),
        backend="reference",
    )
    expected.backward(grad_out[:, :, picked].double())
    pairs = ((out, expected), (query.grad, few[0].grad), (rows.grad, few[1].grad))
    errors = [float((x[:, :, picked] - y).norm() / y.norm()) for x, y in pairs]
    return extra, seconds, max(errors)

run(64)
print(*run(32768))
"""


@pytest.mark.full
@pytest.mark.backend("cpu")
def test_too_long_to_store():
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], capture_output=True, text=True, cwd=TESTS.parent
    )
    assert done.returncode == 0, done.stderr
    extra_mb, seconds, error = map(float, done.stdout.split())
    print(
        f"L 32768, H 8, D 64, rank 64: {extra_mb:.0f} MB extra, forward and backward in "
        f"{seconds:.1f} s, largest error of the rows compared {error:.1e}"
    )
    assert extra_mb < 600
    assert (
        error < 32768**0.5 * 2**-23
    )  # roundings of a float32 sum grow like the root of its length
