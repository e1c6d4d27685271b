"""The emulated kernels of map_gated_attention: what only an emulator can tell, and random problems.
Accuracy by case: tests/ops, backend "cuda" (an ordinary run: tests/emulated.py).
"""

from __future__ import annotations

import pytest
import torch
from backends import BY_NAME
from two_maps import check, evaluate, gated, random_case

pytestmark = pytest.mark.backend("cuda")

SM_80 = 166912  # bytes of shared memory that a block may have


def test_random_problems(request):
    failures = []
    for number in range(200 if request.config.getoption("full") else 6):
        case = random_case("map_gated_attention", number)
        if case.problem.dtype in BY_NAME["cuda"].dtypes:
            try:
                check(case, "cuda")
            except AssertionError as failure:
                failures.append(str(failure))
    assert not failures, "\n".join(failures)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_order_of_threads_changes_no_bit(emulation, dtype):
    case = gated(Lq=70, D=24, Dv=40, pattern="Toeplitz(9)", key_mask=True, dtype=dtype)
    first = evaluate(case, "cuda")
    emulation.schedule(7, 2)
    for name, tensor in evaluate(case, "cuda").items():
        assert torch.equal(tensor, first[name]), name


@pytest.mark.parametrize("processors", [1, 200])
def test_parts_of_every_size(emulation, processors):
    """One block for all pairs, or a part of the gates' gradients for every fourth pair."""
    emulation.device(processors)
    emulation.count()
    check(gated(True, B=3, H=3, Lq=70, D=16, pattern="Toeplitz(9)", dtype="bfloat16"), "cuda")
    assert emulation.counted("launches") == 3


@pytest.mark.full
def test_longest_fits_every_gpu(emulation):
    """320 positions, head dims of 128, in fp32: 16 rows a block, nothing refused."""
    emulation.device(2, SM_80)
    case = gated(B=1, H=1, Lq=320, D=128, pattern="Toeplitz(15)", dtype="float32")
    check(case, "cuda")


@pytest.mark.parametrize("D", [24, 64])
def test_bank_conflicts(emulation, D):
    """None in matrix loads. Planes are read by rows without any, and transposed, for dK, dV and the
    gates' gradients, two lanes at a time: a pitch serves one of the two, and rows are read more.
    """
    emulation.count(banks=True)
    evaluate(gated(B=1, H=1, Lq=64, D=D, dtype="bfloat16", grads=""), "cuda")
    assert emulation.counted("ldmatrix") > 0
    assert emulation.counted("ldmatrix_conflicts") == 0
    assert emulation.counted("shared_accesses") > 0
    assert emulation.counted("shared_conflicts") == 0
    emulation.count(banks=True)
    evaluate(gated(B=1, H=1, Lq=64, D=D, dtype="bfloat16"), "cuda")
    assert emulation.counted("ldmatrix_conflicts") == 0
    assert emulation.counted("shared_conflicts") <= 0.5 * emulation.counted("shared_accesses")
