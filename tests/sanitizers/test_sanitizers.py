"""The C++ kernels under AddressSanitizer and UBSan, without torch and Python (see main.cpp)."""

from __future__ import annotations

import fcntl
import os
import platform
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from lam_kernels.ops import _native

ROOT = Path(__file__).resolve().parents[2]
HERE = Path(__file__).resolve().parent
OUT = ROOT / "build" / "sanitizers"
CXX = os.environ.get("CXX", "g++")
# -O0: the sanitizers see every access, and a kernel file takes 5 s to compile instead of 25 s.
SANITIZE = "-O0 -g1 -fsanitize=address,undefined -fno-sanitize-recover=all -fno-omit-frame-pointer"

LEVELS = ["portable", "avx2", "avx512", "amx_emulated", "amx"]
if platform.machine() != "x86_64":
    LEVELS = LEVELS[:1]


def source_of(level: str) -> str:
    return f"csrc/cpu/masked_attention_{level.removesuffix('_emulated')}.cpp"


def flags_of(level: str) -> str:
    """The flags that the extension was built with, apart from the optimisation."""
    flags = [
        f for f in shlex.split(_native.stamp()["flags"][level]) if not f.startswith(("-O", "-g"))
    ]
    return shlex.join([*flags, *SANITIZE.split()])


@pytest.fixture(scope="module")
def driver():
    if not _native.stamp():
        pytest.skip("the extension is not built, so its compiler flags are not known")
    OUT.mkdir(parents=True, exist_ok=True)
    rename = " ".join(f"-Dscratch_{f}=cached_scratch_{f}" for f in ("acquire", "release", "trim"))
    base = flags_of("portable")
    runnable = [level for level in LEVELS if level in _native.available_levels()]
    units = {level: (source_of(level), flags_of(level)) for level in runnable}
    for level in runnable:  # files that are compiled once for each level
        for op in ("global_local_attention", "map_gated_attention", "score_masked_attention"):
            flags = f"{flags_of(level)} -DLAM_LEVEL={level}"
            units[f"{op}_{level}"] = (f"csrc/cpu/{op}.cpp", flags)
    units |= {
        "levels": ("csrc/cpu/levels.cpp", base),
        "cached_scratch": ("csrc/cpu/scratch.cpp", f"{base} {rename}"),
        "tight_scratch": ("tests/sanitizers/tight_scratch.cpp", base),
        "main": ("tests/sanitizers/main.cpp", f"{base} -O1"),
    }
    missing = "-Wl,--unresolved-symbols=ignore-in-object-files" if runnable != LEVELS else ""
    lines = [
        f"builddir = {OUT}",
        f"rule cxx\n command = {CXX} -MMD -MF $out.d $flags -c $in -o $out",
        " depfile = $out.d\n deps = gcc",
        # levels.cpp names every level's kernels; those this machine cannot run are not compiled
        f"rule link\n command = {CXX} $in -o $out {SANITIZE} -pthread {missing}",
    ]
    for name, (source, flags) in units.items():
        lines.append(f"build {OUT}/{name}.o: cxx {source}\n flags = {flags}")
    lines.append(f"build {OUT}/driver: link {' '.join(f'{OUT}/{name}.o' for name in units)}\n")
    ninja = Path(sys.executable).with_name("ninja")
    command = [str(ninja) if ninja.exists() else "ninja", "-f", str(OUT / "build.ninja"), "-j2"]
    with (OUT / "lock").open("w") as lock:  # two builds at once leave a file that is never rebuilt
        fcntl.flock(lock, fcntl.LOCK_EX)
        (OUT / "build.ninja").write_text("\n".join(lines))
        built = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert built.returncode == 0, built.stdout[-4000:]
    return OUT / "driver"


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.backend("cpu")
def test_kernels_stay_inside_their_memory(driver, level, request):
    if level not in _native.available_levels():
        pytest.skip(f"this machine cannot run level {level}")
    problems = 400 if request.config.getoption("full") else 16
    run = subprocess.run([str(driver), level, str(problems)], capture_output=True, text=True)
    where = f"repeat it with: {driver} {level} 1 PROBLEM\n"
    assert run.returncode == 0, where + run.stdout[-1500:] + run.stderr[-6000:]


@pytest.mark.backend("cpu")
def test_the_driver_finds_a_read_past_the_end(tmp_path):
    """Guards the guard: a driver whose sanitizers do not work would pass everything."""
    source = tmp_path / "past_the_end.cpp"
    source.write_text(
        "#include <cstdlib>\n"
        "int main(int argc, char**) { char* volatile p = new char[7]; return p[6 + argc]; }\n"
    )
    program = tmp_path / "past_the_end"
    subprocess.run(
        [CXX, *SANITIZE.replace(",undefined", "").split(), str(source), "-o", str(program)],
        check=True,
    )
    run = subprocess.run([str(program)], capture_output=True, text=True)
    assert run.returncode != 0
    assert "heap-buffer-overflow" in run.stderr
