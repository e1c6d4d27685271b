"""The emulated kernels through torch: what only an emulator can tell. Whether the order of threads
matters, how many launches and matrix instructions there are, bank conflicts, and the plans that
other GPUs would lead to. Accuracy over hundreds of problems: tests/ops, backend "cuda".
"""

from __future__ import annotations

import pytest
import torch
from problems import check, evaluate

from lam_kernels import masked_attention
from python_ref.inputs import Problem

pytestmark = pytest.mark.backend("cuda")

SM_80, SM_90 = 166912, 232448  # bytes of shared memory that a block may have
DTYPES = ("float32", "bfloat16", "float16")
LOCAL = Problem(B=2, H=3, Lq=100, Lk=130, D=24, Dv=40, multiplier="b1qk", bias="1hqk")
FACTORS = {"multiplier": "rank 20: b1 11 11", "bias": "rank 3: 1h b1"}


@pytest.mark.parametrize("case", [*DTYPES, "factors"])
def test_the_order_of_threads_changes_no_bit(emulation, case):
    changes = FACTORS | {"dtype": "bfloat16"} if case == "factors" else {"dtype": case}
    problem = LOCAL.but(key_mask=True, dropout_p=0.2, lse_grad=True, **changes)
    first = evaluate(problem, "cuda")
    for seed, order in ((7, 0), (1, 1), (1, 2)):
        emulation.schedule(seed, order)
        for name, tensor in evaluate(problem, "cuda").items():
            assert torch.equal(tensor, first[name]), name


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("processors", [1, 3, 200])
def test_slices_of_every_size(emulation, dtype, processors):
    """One block for all pairs of a mask tile, a few, one a pair: the second-stage sum or none."""
    emulation.device(processors, SM_90)
    for axes in (("b1qk", "1hqk"), ("11qk", "11qk"), ("1h1k", "b1q1"), ("1h11", "1111")):
        problem = Problem(B=3, H=4, Lq=70, D=16, multiplier=axes[0], bias=axes[1], dtype=dtype)
        check(problem, "cuda")


def test_masks_whose_rows_overlap(emulation):
    """Windows into one table: the tiles of two samples may begin at one address."""
    emulation.device(1)
    B, L, S, hop = 6, 100, 40, 64
    generator = torch.Generator().manual_seed(0)
    table = torch.randn(hop * B + L, S, generator=generator)
    windows = table.unfold(0, L, hop)[:B].transpose(1, 2)[:, None]
    query, key, value = (torch.randn(B, 1, n, 16, generator=generator) for n in (L, S, S))
    leaves = [x.requires_grad_() for x in (query, key, value)]
    for name in ("multiplier", "bias"):
        results = []
        for mask in (windows, windows.contiguous()):
            out = masked_attention(*leaves, **{name: mask}, backend="cuda")
            results.append([out, *torch.autograd.grad(out.square().sum(), leaves)])
        for mine, expected in zip(*results, strict=True):
            assert torch.equal(mine, expected), name


@pytest.mark.parametrize("processors", [1, 200])
def test_slices_of_factors(emulation, processors):
    """A factor that units, splits and blocks of rows share is summed in parts; or in one."""
    emulation.device(processors)
    for masks in (FACTORS, {"multiplier": "rank 5: 11 11 11", "bias": "rank 17: bh 11 1h"}):
        check(Problem(B=3, H=4, Lq=70, D=16, **masks, dtype="bfloat16"), "cuda")


def test_a_tile_of_factors_is_built_once_for_all_heads(emulation):
    """Two heads more cost the same shared-memory accesses whatever the rank is, in all launches."""
    emulation.device(1)
    more = []
    for rank in (16, 64):
        counts = []
        for H in (2, 4):
            emulation.count(banks=True)
            mask = f"rank {rank}: 11 11 11"
            evaluate(Problem(B=1, H=H, Lq=70, D=16, multiplier=mask, dtype="bfloat16"), "cuda")
            counts.append(emulation.counted("shared_accesses"))
        more.append(counts[1] - counts[0])
    assert more[0] == more[1] > 0


@pytest.mark.parametrize("Lq", [20, 330])
def test_largest_factors_fit_every_gpu(emulation, Lq):
    """Beyond 320 queries the second launch builds its tiles chunk by chunk."""
    emulation.device(2, SM_80)
    check(Problem(B=1, H=2, Lq=Lq, Lk=320, D=128, **FACTORS, dtype="float32"), "cuda")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_bank_conflicts_of_factors(emulation, dtype):
    emulation.count(banks=True)
    evaluate(Problem(B=1, H=2, Lq=70, D=24, dtype=dtype, **FACTORS), "cuda")
    assert emulation.counted("launches") == 3
    assert emulation.counted("ldmatrix_conflicts") == 0
    assert emulation.counted("shared_conflicts") == 0


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shared_bytes", [SM_80, SM_90])
def test_largest_problem_fits_every_gpu(emulation, dtype, shared_bytes):
    """320 keys, head dims of 128, two masks with gradients: fewer rows a block, nothing refused."""
    emulation.device(2, shared_bytes)
    masks = {"multiplier": "11qk", "bias": "11qk", "multiplier_dtype": "float32"}
    check(Problem(B=1, H=2, Lq=20, Lk=320, D=128, dtype=dtype, **masks), "cuda")


def test_a_gpu_with_too_little_shared_memory_says_so(emulation):
    emulation.device(2, 40000)
    problem = Problem(B=1, H=1, Lq=20, Lk=320, D=128, multiplier="11qk")
    with pytest.raises(RuntimeError, match="do not fit the shared memory of this GPU"):
        evaluate(problem, "cuda")


@pytest.mark.parametrize("grads", ["qkvmb", "kv", "v", "mb", "q"])
def test_launches(emulation, grads):
    problem = LOCAL.but(grads=grads)
    emulation.count()
    evaluate(problem.but(grads=""), "cuda")
    assert emulation.counted("launches") == 1
    emulation.count()
    evaluate(problem, "cuda")
    assert emulation.counted("launches") <= 3


def test_matrix_instructions(emulation):
    """As many as the formulas need, rounded up to tiles: 16 rows x 8 columns x 16 deep each."""
    problem = Problem(B=1, H=2, Lq=64, D=64, dtype="bfloat16", multiplier="11qk")
    emulation.count()
    evaluate(problem.but(grads=""), "cuda")
    one_product = 2 * (64 // 16) * (64 // 8) * (64 // 16)
    assert emulation.counted("mma") == 2 * one_product
    emulation.count()
    evaluate(problem, "cuda")
    # forward 2; rows: scores, dP, dQ; keys: scores, dV, dP, dK
    assert emulation.counted("mma") == (2 + 3 + 4) * one_product
    emulation.count()
    evaluate(problem.but(dtype="float32"), "cuda")
    assert emulation.counted("mma") == 0


def test_a_pattern_skips_what_it_hides(emulation):
    """Half of the 64 x 64 tiles of a narrow band over 256 keys hold nothing."""
    counts = []
    for pattern in (None, "Toeplitz(20)"):
        emulation.count()
        evaluate(Problem(B=1, H=1, Lq=256, D=32, dtype="bfloat16", pattern=pattern), "cuda")
        counts.append(emulation.counted("mma"))
    assert counts[1] < 0.65 * counts[0]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("D", [16, 24, 32, 64, 128])
def test_bank_conflicts(emulation, dtype, D):
    """None in matrix loads, in the exact fp32 products and in the mask tiles."""
    emulation.count(banks=True)
    evaluate(Problem(B=1, H=2, Lq=70, D=D, dtype=dtype, multiplier="11qk", bias="11qk"), "cuda")
    assert emulation.counted("shared_accesses") > 0
    assert (emulation.counted("ldmatrix") > 0) == (dtype != "float32")
    assert emulation.counted("ldmatrix_conflicts") == 0
    assert emulation.counted("shared_conflicts") == 0
