"""The emulated kernels of global_local_attention: what only an emulator can tell, and random
problems. Accuracy by case: tests/ops, backend "cuda" (an ordinary run: tests/emulated.py).
"""

from __future__ import annotations

import pytest
import torch
from backends import BY_NAME
from two_maps import both, check, evaluate, random_case

pytestmark = pytest.mark.backend("cuda")

SM_80 = 166912  # bytes of shared memory that a block may have
MASKS = {"multiplier": "b1qk", "bias": "1hqk", "key_mask": True}
LOCAL = both(Lq=100, Lk=130, D=24, Dv=40, pattern="Toeplitz(20)", **MASKS)


def test_random_problems(request):
    failures = []
    for number in range(300 if request.config.getoption("full") else 8):
        case = random_case("global_local_attention", number)
        if case.problem.dtype in BY_NAME["cuda"].dtypes:
            try:
                check(case, "cuda")
            except AssertionError as failure:
                failures.append(str(failure))
    assert not failures, "\n".join(failures)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_order_of_threads_changes_no_bit(emulation, dtype):
    first = evaluate(LOCAL.but(dtype=dtype), "cuda")
    for seed, order in ((7, 0), (1, 2)):
        emulation.schedule(seed, order)
        for name, tensor in evaluate(LOCAL.but(dtype=dtype), "cuda").items():
            assert torch.equal(tensor, first[name]), name


@pytest.mark.parametrize("processors", [1, 200])
def test_slices_of_every_size(emulation, processors):
    """One block for all pairs of a mask tile, or one a pair: the second-stage sum or none."""
    emulation.device(processors)
    for axes in (("b1qk", "1hqk"), ("11qk", "1h1k")):
        masks = {"multiplier": axes[0], "bias": axes[1], "pattern": "Toeplitz(9)"}
        check(both(B=3, H=3, Lq=50, D=16, **masks, dtype="bfloat16"), "cuda")


def test_largest_problem_fits_every_gpu(emulation):
    """320 keys, head dims of 128, two masks with gradients: fewer rows a block, nothing refused."""
    emulation.device(2, SM_80)
    masks = {"multiplier": "11qk", "bias": "11qk", "pattern": "Toeplitz(20)"}
    check(both(B=1, H=2, Lq=20, Lk=320, D=128, **masks, dtype="float32"), "cuda")


def test_launches_and_matrix_instructions(emulation):
    """One launch forward, two backward; the scores are formed once for both maps."""
    case = both(B=1, H=2, Lq=64, D=64, dtype="bfloat16", multiplier="11qk")
    one_product = 2 * (64 // 16) * (64 // 8) * (64 // 16)
    emulation.count()
    evaluate(case.but(grads=""), "cuda")
    assert emulation.counted("launches") == 1
    assert emulation.counted("mma") == 3 * one_product  # scores, both results
    emulation.count()
    evaluate(case, "cuda")
    assert emulation.counted("launches") == 3
    # rows: scores, dP of both, dQ; keys: scores, dV and dP of both, dK. Two calls: 2 * (2 + 3 + 4)
    assert emulation.counted("mma") == (3 + 4 + 6) * one_product


def test_local_work_only_where_the_pattern_leaves_a_pair(emulation):
    counts = []
    for pattern in (None, "Toeplitz(15)"):
        emulation.count()
        evaluate(both(B=1, H=1, Lq=256, D=32, dtype="bfloat16", pattern=pattern), "cuda")
        counts.append(emulation.counted("mma"))
    # of 13 products 5 are local: both results' weights, dP twice, dV
    assert counts[1] < (8 + 5 * 0.45) / 13 * counts[0]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("D", [24, 64, 128])
def test_bank_conflicts(emulation, dtype, D):
    """None in matrix loads, in the exact fp32 products and in the mask tiles."""
    masks = {"multiplier": "11qk", "bias": "11qk", "pattern": "Toeplitz(9)"}
    emulation.count(banks=True)
    evaluate(both(B=1, H=2, Lq=70, D=D, dtype=dtype, **masks), "cuda")
    assert emulation.counted("shared_accesses") > 0
    assert (emulation.counted("ldmatrix") > 0) == (dtype != "float32")
    assert emulation.counted("ldmatrix_conflicts") == 0
    assert emulation.counted("shared_conflicts") == 0
