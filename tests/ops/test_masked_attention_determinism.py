"""The same bits again: 50 repeats, for each thread count, from several Python threads at once."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from problems import check, evaluate

from lam_kernels.triton import availability
from python_ref.inputs import Problem

REPEATS = 50

CASES = {
    "mask shared by all": Problem(B=3, H=4, Lq=130, D=32, multiplier="11qk", bias="1h1k"),
    "mask a sample": Problem(B=2, H=3, Lq=197, D=64, multiplier="b1qk", lse_grad=True),
    "vectors": Problem(B=3, H=2, Lq=100, multiplier="1h1k", bias="b1q1"),
    "one number": Problem(B=2, H=2, Lq=100, multiplier="1111", bias="1111"),
    "one sample, long": Problem(B=1, H=2, Lq=300, D=64, multiplier="11qk"),
    "dropout": Problem(B=2, H=2, Lq=100, bias="11qk", dropout_p=0.3),
    "local": Problem(B=1, H=4, Lq=300, bias="1h1k", pattern="Toeplitz(20)"),
    "shared heads": Problem(B=2, H=6, Hkv=2, Lq=100, bias="11qk", pattern="Causal()"),
}


def assert_same_bits(one, two):
    for name in one:
        assert torch.equal(one[name], two[name]), name


@pytest.mark.parametrize("case", CASES)
def test_repeats(case, backend, dtype):
    problem = CASES[case].but(dtype=dtype)
    operands = problem.operands()
    first = evaluate(problem, backend, operands)
    for _ in range(REPEATS - 1 if backend != "reference" else 2):
        assert_same_bits(first, evaluate(problem, backend, operands))


@pytest.mark.parametrize("threads", [1, 2, 3, 5])
@pytest.mark.parametrize("case", CASES)
def test_thread_counts(case, threads, backend):
    """Right and repeatable for each number of threads, also above the cores and the work."""
    for dtype in ("float32", "bfloat16"):
        problem = CASES[case].but(dtype=dtype)
        torch.set_num_threads(threads)
        check(problem, backend)
        first = evaluate(problem, backend)
        for _ in range(5):
            assert_same_bits(first, evaluate(problem, backend))


@pytest.mark.parametrize("pattern", [None, "Toeplitz(70)", "DilatedToeplitz(30, 3)"])
def test_more_groups_than_threads(pattern):
    """Long rows are cut into more groups than there are threads, which wait for one another."""
    torch.set_num_threads(2)
    problem = Problem(B=1, H=1, Lq=1540, D=8, multiplier="11qk", bias="1h11", pattern=pattern)
    check(problem, "cpu")
    first = evaluate(problem, "cpu")
    for _ in range(5):
        assert_same_bits(first, evaluate(problem, "cpu"))


@pytest.mark.parametrize(
    "rest",
    [
        {"pattern": "Toeplitz(40)"},
        {"pattern": "DilatedToeplitz(12, 3)"},
        {"pattern": "Toeplitz(40)", "key_mask": True},
        {"pattern": "BlockDiagonal(64)"},
        {"pattern": 'BlockDiagonal(24, alignment="end") & Toeplitz(30)'},
        {"pattern": "BlockDiagonal(100) & Toeplitz(12)"},
    ],
    ids=str,
)
def test_regions_that_lie_alike(rest):
    """One task walks through many regions of a long head, and keeps their bits where it may."""
    torch.set_num_threads(1)
    check(Problem(B=1, H=16, Lq=800, Lk=750, D=4, **rest), "cpu")


def test_python_threads(backend):
    """Calls from several Python threads at once neither disturb each other nor the caller's cached
    scratch."""
    if backend == "triton" and availability.interpreting():
        pytest.skip("Triton's interpreter keeps the grid it runs in one place for all threads")
    problems = [p.but(dtype=d) for p in CASES.values() for d in ("float32", "bfloat16")]
    # a torch thread count of one is the same in every Python thread
    torch.set_num_threads(1)
    alone = [evaluate(p, backend) for p in problems]

    def work(shift):
        torch.set_num_threads(1)
        order = [(n + shift) % len(problems) for n in range(len(problems))]
        return {n: evaluate(problems[n], backend) for n in order if problems[n].dropout_p == 0}

    with ThreadPoolExecutor(4) as pool:
        for results in pool.map(work, range(0, 8, 2)):
            for n, result in results.items():
                assert_same_bits(alone[n], result)
