"""How the tests here compile programs around the emulated kernels, with and without sanitizers."""

from __future__ import annotations

import fcntl
import functools
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import setuptools

ROOT = Path(__file__).resolve().parents[2]
CXX = os.environ.get("CXX", "g++")
PLAIN = ["-O2"]
# -O1: the sanitizers see every access, and the kernels still run in seconds
ASAN = ["-O1", "-g1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
TSAN = ["-O1", "-g1", "-fsanitize=thread"]


@functools.cache
def setup_py() -> dict:
    """setup.py's own functions and tables."""
    before, setuptools.setup = setuptools.setup, lambda **_: None
    here = os.getcwd()
    os.chdir(ROOT)
    try:
        return runpy.run_path(str(ROOT / "setup.py"))
    finally:
        setuptools.setup = before
        os.chdir(here)


def ninja(folder: Path, text: str, *targets: str) -> subprocess.CompletedProcess:
    """Build what `text` describes; other test processes wait and then find nothing to do."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        (folder / "build.ninja").write_text(text)
        return _run_ninja(folder, targets)


def _run_ninja(folder: Path, targets: tuple[str, ...]) -> subprocess.CompletedProcess:
    program = Path(sys.executable).with_name("ninja")
    command = [str(program) if program.exists() else "ninja", "-f", str(folder / "build.ninja")]
    jobs = os.environ.get("MAX_JOBS") or str(len(os.sched_getaffinity(0)))
    return subprocess.run(
        [*command, "-j", jobs, *targets], cwd=ROOT, capture_output=True, text=True
    )


def build(name: str, units: dict[str, tuple[str, list[str]]], flags: list[str]) -> Path:
    """The program `name` from units: object -> (source, flags of its own)."""
    headers = setup_py()["cuda_headers"]()
    if headers is None:
        pytest.skip("no cuda_bf16.h: neither a CUDA toolkit nor triton is installed")
    out = ROOT / "build" / "cuda" / name
    base = ["-std=c++17", "-Wall", "-Wno-unknown-pragmas", "-Icsrc", f"-isystem{headers}", *flags]
    lines = [
        f"builddir = {out}",
        f"rule cxx\n command = {CXX} -MMD -MF $out.d $flags -c $in -o $out",
        " depfile = $out.d\n deps = gcc",
        f"rule link\n command = {CXX} $in -o $out {' '.join(flags)} -pthread",
    ]
    for unit, (source, own) in units.items():
        lines.append(f"build {out}/{unit}.o: cxx {source}\n flags = {' '.join([*base, *own])}")
    lines.append(f"build {out}/program: link {' '.join(f'{out}/{unit}.o' for unit in units)}\n")
    built = ninja(out, "\n".join(lines))
    assert built.returncode == 0, built.stdout[-4000:]
    return out / "program"


def kernel_units(dtypes: dict[str, tuple[str, ...]]) -> dict[str, tuple[str, list[str]]]:
    """The emulated kernels of some ops: op -> dtypes."""
    own = setup_py()["EMULATION"]
    names = ["device", *(f"{op}_{dtype}" for op, listed in dtypes.items() for dtype in listed)]
    units = {name: (f"csrc/cuda/{name}.cu", own) for name in names}
    return units | {name: (f"csrc/cuda/{name}.cpp", []) for name in setup_py()["CUDA_PLANS"]}
