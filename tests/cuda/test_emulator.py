"""The emulator itself: healthy kernels give the right values, and every planted fault is caught.

docs/emulation.md has the table that these tests keep true. A fault is caught where the value is
wrong (poison makes it NaN), where the emulator stops with a sentence, or where a sanitizer does.
"""

from __future__ import annotations

import subprocess

import pytest
from compile import ASAN, PLAIN, TSAN, build

HEALTHY = (
    "exchange",
    "exchange_in_warp",
    "ring",
    "partial_copy",
    "product_bf16",
    "product_f16",
    "bank_conflicts",
    "warp_operations",
    "atomic_sum",
    "after_a_fault",
)
# fault -> flavour -> what the output must say
FAULTS = {
    "missing_barrier": {"plain": "wrong", "tsan": "data race"},
    "missing_syncwarp": {"plain": "wrong", "tsan": "data race"},
    "no_barrier_after_wait": {"plain": "wrong", "tsan": "data race"},
    "no_barrier_before_reuse": {"plain": "wrong", "tsan": "data race"},
    "waits_for_too_little": {"plain": "wrong", "asan": "wrong", "tsan": "wrong"},
    "uninitialised": {"plain": "wrong", "asan": "wrong", "tsan": "wrong"},
    "race_between_blocks": {"tsan": "data race"},
    "read_past_the_end": {"asan": "heap-buffer-overflow"},
    "shared_past_the_end": {"asan": "heap-buffer-overflow"},
    "misaligned": {"asan": "misaligned address"},
    "misaligned_copy": {"plain": "cp.async: a source that is no multiple of 16"},
    "misaligned_row": {"plain": "ldmatrix: a row address that is no multiple of 16"},
    "copy_in_flight": {"plain": "exits with cp.async in flight"},
    "divergent_barrier": {"plain": "__syncthreads()"},
    "two_barriers": {"plain": "two different __syncthreads()"},
    "divergent_warp": {"plain": "divergent warp"},
    "lane_missing": {"plain": "__syncwarp"},
    "too_much_shared_memory": {"plain": "232449 bytes of dynamic shared memory"},
}
FLAVOURS = {"plain": PLAIN, "asan": ASAN, "tsan": TSAN}


@pytest.fixture(scope="module")
def programs():
    units = {"emulator": ("tests/cuda/emulator.cpp", [])}
    return {name: build(f"emulator-{name}", units, flags) for name, flags in FLAVOURS.items()}


def run(program, name: str, seed: int = 1) -> subprocess.CompletedProcess:
    return subprocess.run([program, name, str(seed)], capture_output=True, text=True, timeout=60)


@pytest.mark.backend("cuda")
@pytest.mark.parametrize("flavour", FLAVOURS)
@pytest.mark.parametrize("name", HEALTHY)
def test_healthy(programs, name, flavour):
    if (name, flavour) == ("after_a_fault", "tsan"):
        pytest.skip("threads that stopped at a fault are ordered with nothing: tsan sees races")
    for seed in (1, 2, 3):
        done = run(programs[flavour], name, seed)
        assert (done.returncode, done.stdout.strip()) == (0, "right"), done.stdout + done.stderr
        assert "WARNING" not in done.stderr


@pytest.mark.backend("cuda")
@pytest.mark.parametrize(
    ("name", "flavour", "words"),
    [(name, flavour, words) for name, found in FAULTS.items() for flavour, words in found.items()],
)
def test_fault_is_caught(programs, name, flavour, words):
    for seed in (1, 2, 3):  # whatever the order in which the threads run
        done = run(programs[flavour], name, seed)
        output = done.stdout + done.stderr
        assert done.returncode != 0, output
        assert words in output
        if "race" in words or "overflow" in words or "misaligned address" in words:
            assert "emulator.cpp:" in output, "the report does not name the kernel's line"
