"""What nvcc makes of the kernels, looked at without a GPU: registers, spills, shared memory, matrix
instructions and 16-byte accesses; and that the GPU library links and loads in a torch without CUDA.

Every kernel for every architecture takes nvcc five minutes on two cores: `make machine-code`,
which continuous integration runs beside `make test`.
"""

from __future__ import annotations

import importlib.util
import itertools
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
from compile import ROOT, ninja, setup_py

ARCHS = ("80", "90", "100")
DTYPES = ("bf16", "f16", "f32")
KERNELS = {
    "masked_attention": ("forward_kernel", "row_gradient_kernel", "key_gradient_kernel"),
    "global_local_attention": (
        "two_map_forward_kernel",
        "two_map_row_kernel",
        "two_map_key_kernel",
    ),
    "map_gated_attention": ("map_gated_forward_kernel", "map_gated_backward_kernel"),
}
WIDTHS = (64, 128)
ALL = tuple(itertools.product(KERNELS, DTYPES))
ATOMICS = r"\b(ATOM|RED)[GS]?\b"
# two blocks of 4 warps share a processor's 64 Ki registers
MOST_REGISTERS = 255


def cuobjdump() -> str | None:
    places = [Path(home, "bin") for home in [setup_py()["cuda_home"]()] if home]
    if importlib.util.find_spec("triton"):
        triton = Path(importlib.util.find_spec("triton").origin).parent
        places.append(triton / "backends" / "nvidia" / "bin")
    for place in places:
        if (place / "cuobjdump").exists():
            return str(place / "cuobjdump")
    return shutil.which("cuobjdump")


class Compiled(NamedTuple):
    objects: dict[tuple[str, str], Path]  # (op, dtype) -> file
    library: Path


@pytest.fixture(scope="module")
def compiled() -> Compiled:
    """The files of `_cuda` as setup.py compiles them on a machine with a GPU."""
    setup = setup_py()
    if setup["cuda_home"]() is None:
        pytest.skip("nvcc was not found: kernels are not compiled for a GPU here")
    out = ROOT / "build" / "cuda" / "machine-code"
    text = setup["NinjaFile"](out.relative_to(ROOT))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCH_CUDA_ARCH_LIST", ";".join(f"{arch[:-1]}.{arch[-1]}" for arch in ARCHS))
        library = ROOT / text.cuda(setup["gencode"]())
    folder = library.parent / "_cuda" / "gpu"
    objects = {(op, dtype): folder / f"{op}_{dtype}.o" for op, dtype in ALL}
    built = ninja(out, text.text(), str(library.relative_to(ROOT)))
    assert built.returncode == 0, built.stdout[-6000:]
    assert "warning" not in built.stdout, built.stdout[-6000:]  # of a spill, for example
    return Compiled(objects, library)


@pytest.fixture(scope="module")
def tool() -> str:
    if setup_py()["cuda_home"]() is None:
        pytest.skip("nvcc was not found")
    found = cuobjdump()
    if found is None:
        pytest.skip("cuobjdump was not found: neither beside nvcc nor in triton's wheel")
    return found


@pytest.fixture(scope="module")
def resources(compiled, tool) -> dict:
    """(arch, dtype, kernel, width) -> {"REG": ..., "STACK": ..., ...}."""
    found = {}
    for (op, dtype), path in compiled.objects.items():
        text = subprocess.run([tool, "-res-usage", path], capture_output=True, text=True).stdout
        arch = None
        for line in text.splitlines():
            if match := re.search(r"arch = sm_(\d+)", line):
                arch = match[1]
            if match := re.search(r"Function (\S+):", line):
                name = match[1]
            elif "REG:" in line:
                kernel = next((k for k in KERNELS[op] if k in name), None)
                width = re.search(r"Li(\d+)E", name)
                usage = {k: int(v) for k, v in re.findall(r"([A-Z]+)(?:\[\d+\])?:(\d+)", line)}
                if kernel:
                    found[arch, dtype, kernel, int(width[1])] = usage
    return found


SPILLING = """
__global__ void __launch_bounds__(1024, 2) spills(const float* x, float* y) {
  float kept[64];
  for (int k = 0; k < 64; ++k) kept[k] = x[k * 1024 + threadIdx.x];
  __syncthreads();
  for (int k = 0; k < 64; ++k) y[k * 1024 + threadIdx.x] = kept[k] * kept[63 - k];
}
"""


def test_a_spill_stops_the_build(tmp_path):
    """With the flags that every kernel is compiled with."""
    setup = setup_py()
    if setup["cuda_home"]() is None:
        pytest.skip("nvcc was not found")
    (tmp_path / "spills.cu").write_text(SPILLING)
    command = [setup["cuda_home"]() / "bin" / "nvcc", *setup["NVCC"], "-arch=sm_90", "-c"]
    done = subprocess.run(
        [*command, "spills.cu", "-o", "spills.o"], cwd=tmp_path, capture_output=True, text=True
    )
    assert "Registers are spilled" in done.stdout + done.stderr
    assert done.returncode != 0


@pytest.mark.full
def test_every_kernel_is_there(compiled, resources):
    wanted = {
        (arch, dtype, kernel, width)
        for arch in ARCHS
        for op, dtype in compiled.objects
        for kernel in KERNELS[op]
        for width in WIDTHS
    }
    assert set(resources) == wanted


@pytest.mark.full
def test_registers_and_spills(resources):
    for what, usage in resources.items():
        assert usage["REG"] <= MOST_REGISTERS, (what, usage)
        assert usage["STACK"] == 0, (what, usage)
        assert usage["LOCAL"] == 0, (what, usage)
        # what a block uses is plan.cpp's; from sm_90 on 1 KiB is the system's
        assert usage["SHARED"] <= 1024, (what, usage)


@pytest.fixture(scope="module")
def listing(compiled, tool):
    """(op, dtype, arch) -> the machine code of its kernels."""

    def listed(op: str, dtype: str, arch: str) -> str:
        command = [tool, "-sass", "-arch", f"sm_{arch}", compiled.objects[op, dtype]]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout

    return listed


ADDING = """
__global__ void adds(float* to, float* old) {
  __shared__ float sum;
  atomicAdd(&sum, 1.f);
  atomicAdd(to, sum);
  old[threadIdx.x] = atomicAdd(to + 1, 2.f);
}
"""


@pytest.mark.parametrize("arch", ARCHS)
def test_atomics_are_found(tool, tmp_path, arch):
    (tmp_path / "adds.cu").write_text(ADDING)
    nvcc = setup_py()["cuda_home"]() / "bin" / "nvcc"
    subprocess.run([nvcc, f"-arch=sm_{arch}", "-cubin", "adds.cu"], cwd=tmp_path, check=True)
    command = [tool, "-sass", "adds.cubin"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert len(re.findall(ATOMICS, done.stdout)) >= 3, done.stdout


def functions(op: str, listing: str) -> dict[tuple[str, int], str]:
    parts = re.split(r"Function : (\S+)", listing)
    found = {}
    for name, body in zip(parts[1::2], parts[2::2], strict=True):
        kernel = next((k for k in KERNELS[op] if k in name), None)
        if kernel:
            found[kernel, int(re.search(r"Li(\d+)E", name)[1])] = body
    return found


@pytest.mark.full
@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize(("op", "dtype"), ALL)
def test_instructions(listing, op, dtype, arch):
    found = functions(op, listing(op, dtype, arch))
    assert set(found) == set(itertools.product(KERNELS[op], WIDTHS))
    for what, body in found.items():
        matrix = {"bf16": r"HMMA\.16816\.F32\.BF16", "f16": r"HMMA\.16816\.F32\b", "f32": None}[
            dtype
        ]
        copies = re.findall(r"LDGSTS[.\w]*", body)
        assert copies, what
        assert all(".128" in copy for copy in copies), (what, set(copies))
        if matrix:
            assert re.search(matrix, body), what
            assert re.search(r"LDSM\.16\.M88\.4", body), what
            assert re.search(r"LDSM\.16\.MT88\.4", body), what
        else:
            assert "HMMA" not in body, what  # exact fp32: no tensor core, no tf32
            assert len(re.findall(r"\bFFMA\b", body)) > 200, what
            assert re.search(r"LDS\.128", body), what
        assert not re.search(r"\b(LDL|STL)\b", body), f"{what} uses local memory"
        assert not re.search(ATOMICS, body), f"{what} has atomics"


@pytest.mark.full
def test_library_loads_without_cuda(compiled):
    """Linked with the machine code of all kernels, it loads in this torch, schemas and all."""
    code = (
        "import sys, torch\n"
        "torch.ops.load_library(sys.argv[1])\n"
        "op = torch.ops.lam_kernels.masked_attention_cuda_bwd.default\n"
        "assert torch._C._dispatch_has_kernel_for_dispatch_key(op.name(), 'CUDA')\n"
        "print(op._schema)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(compiled.library)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "bool[] needs" in done.stdout


def test_kernels_see_one_plain_struct():
    """No torch, no runtime API outside of the two files that talk to the device."""
    for path in (ROOT / "csrc" / "cuda").iterdir():
        text = path.read_text()
        if path.name != "ptx.cuh":
            assert "asm" not in re.findall(r"\basm\b", text), f"{path.name} has inline PTX"
        if path.name not in ("launch.cuh", "device.cu", "ptx.cuh"):
            assert not re.search(r"\bcuda[A-Z]\w+\(", text), f"{path.name} calls the runtime"
