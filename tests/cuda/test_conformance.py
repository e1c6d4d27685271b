"""Each inline-PTX wrapper on a GPU against its emulation, bit for bit: what a GPU runs first.

pytest tests/cuda/test_conformance.py

It needs neither library of backend "cuda", so it is not counted there: without them it would be
skipped.
"""

from __future__ import annotations

import re
import subprocess

import pytest
import torch
from compile import PLAIN, ROOT, build, setup_py

WRAPPERS = ("cp_async16", "ldmatrix_x4", "ldmatrix_x4_trans", "mma_16816_f16", "mma_16816_bf16")


def lines_of(program) -> list[list[str]]:
    done = subprocess.run([program], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    return [line.split() for line in done.stdout.splitlines()]


@pytest.fixture(scope="module")
def emulated() -> list[list[str]]:
    units = {"conformance": ("tests/cuda/conformance.cu", ["-x", "c++", "-fno-strict-aliasing"])}
    return lines_of(build("conformance", units, PLAIN))


def test_every_wrapper_has_a_conformance_test(emulated):
    """All that hold an asm statement; commit and wait are tested through the copies."""
    text = (ROOT / "csrc" / "cuda" / "ptx.cuh").read_text()
    parts = re.split(r"__device__ __forceinline__ \w+ (\w+)", text)
    names = {n for n, body in zip(parts[1::2], parts[2::2], strict=True) if "asm volatile" in body}
    through_copies = {"cp_async_commit", "cp_async_wait"}
    assert {name[0].removesuffix("_f16").removesuffix("_bf16") for name in emulated} == (
        names - through_copies | {"mma_16816"}
    )


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_device_equals_emulation(emulated, wrapper, tmp_path):
    nvcc = setup_py()["cuda_home"]()
    if nvcc is None:
        pytest.skip("nvcc was not found")
    program = ROOT / "build" / "cuda" / "conformance" / "device"
    if wrapper == WRAPPERS[0]:
        arch = "native" if torch.cuda.is_available() else "sm_90"
        command = [nvcc / "bin" / "nvcc", f"-arch={arch}", "-std=c++17", "-O3", "-Icsrc"]
        command += ["tests/cuda/conformance.cu", "-o", program]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    if not torch.cuda.is_available():
        pytest.skip("no GPU: compiled for sm_90, not run")
    device = lines_of(program)
    assert [line for line in device if line[0] == wrapper] == [
        line for line in emulated if line[0] == wrapper
    ]
