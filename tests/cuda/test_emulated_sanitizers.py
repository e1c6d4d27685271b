"""The emulated kernels under AddressSanitizer + UBSan and under ThreadSanitizer (see driver.cpp).

ThreadSanitizer takes every thread of a block for a thread of its own, ordered by barriers and
__syncwarp alone, and new ones for every block: a missing barrier and a race between blocks show
whatever the order in which they ran.
"""

from __future__ import annotations

import subprocess

import pytest
from compile import ASAN, TSAN, build, kernel_units

DTYPES = ("bf16", "f32")  # fp16 is bf16 with another matrix instruction
KERNELS = {
    "masked_attention": DTYPES,
    "global_local_attention": ("bf16",),
    "map_gated_attention": ("bf16",),
}
FLAVOURS = {"asan": (ASAN, 12), "tsan": (TSAN, 5)}  # problems a dtype


@pytest.fixture(scope="module", params=FLAVOURS)
def driver(request):
    flags, problems = FLAVOURS[request.param]
    units = kernel_units(KERNELS) | {"driver": ("tests/cuda/driver.cpp", [])}
    return request.param, build(f"driver-{request.param}", units, flags), problems


@pytest.mark.backend("cuda")
@pytest.mark.parametrize("dtype", DTYPES)
def test_random_problems(driver, dtype, request):
    flavour, program, problems = driver
    if request.config.getoption("full"):
        problems *= 10
    elif (flavour, dtype) == ("tsan", "bf16"):
        pytest.skip(
            "big: only with --full (make test-full)"
        )  # their waits and barriers are those of f32
    races = ["races"] if flavour == "tsan" else []
    command = [str(program), dtype, str(problems), "0", *races]
    done = subprocess.run(command, capture_output=True, text=True)
    where = f"repeat it with: {program} {dtype} 1 PROBLEM {' '.join(races)}\n"
    assert done.returncode == 0, where + done.stdout[-1500:] + done.stderr[-6000:]
    assert "WARNING" not in done.stderr, where + done.stderr[:6000]
    assert done.stdout.count("emulated") > problems / 2
