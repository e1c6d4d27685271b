"""Instruction-set levels: LAM_CPU_LEVEL forces each; no file leaks instructions into another."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

import lam_kernels
from lam_kernels.ops import _native

ROOT = Path(__file__).resolve().parents[1]
ALL_LEVELS = ("portable", "avx2", "avx512", "amx_emulated", "amx")
SUFFIX = sysconfig.get_config_var("EXT_SUFFIX")
OBJECTS = ROOT / "build" / f"ninja{SUFFIX.removesuffix('.so')}" / "_cpu"

pytestmark = pytest.mark.backend("cpu")

CALL = """
import torch, lam_kernels
from lam_kernels.ops import _native

torch.manual_seed(0)
bounds = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 0.1, torch.float16: 0.1}
for dtype, bound in bounds.items():  # coarse: the accuracy tests are elsewhere
    make = lambda *shape: torch.randn(shape, dtype=dtype, requires_grad=True)
    operands = make(2, 2, 67, 24), make(2, 2, 67, 24), make(2, 2, 67, 24), make(1, 1, 67, 67)
    results = []
    for backend in ("cpu", "reference"):
        query, key, value, mask = operands
        out = lam_kernels.masked_attention(query, key, value, multiplier=mask, backend=backend)
        results.append((out, *torch.autograd.grad(out.square().sum(), operands)))
    for ours, expected in zip(*results):
        assert (ours - expected).abs().max() <= bound * expected.abs().max(), (dtype, ours.shape)
print("level:", _native.level())
"""

ASK = """
import torch, lam_kernels
print("backend:", lam_kernels.backends()["cpu"])
x = torch.ones(1, 1, 2, 4)
for backend in ("cpu", None):
    try:
        lam_kernels.masked_attention(x, x, x, backend=backend)
    except RuntimeError as error:
        print("call:", error)
"""


def python(code: str, level: str | None) -> subprocess.CompletedProcess:
    env = {name: value for name, value in os.environ.items() if name != "LAM_CPU_LEVEL"}
    if level is not None:
        env["LAM_CPU_LEVEL"] = level
    return subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=env, capture_output=True, text=True
    )


@pytest.mark.parametrize("level", ALL_LEVELS)
def test_a_forced_level_runs_and_reports_itself(level):
    if level not in _native.available_levels():
        pytest.skip(f"this machine cannot run level {level}")
    run = python(CALL, level)
    assert run.returncode == 0, run.stderr
    assert run.stdout.split("level:")[-1].strip() == level


def test_the_level_of_its_own_choice_is_the_highest_and_never_an_emulation():
    run = python("from lam_kernels.ops import _native; print(_native.level())", None)
    real = [level for level in _native.available_levels() if level != "amx_emulated"]
    assert run.stdout.strip() == real[-1]
    assert real[0] == "portable"


@pytest.mark.parametrize("level", ["nonsense", "AVX2", "amx"])
def test_a_level_that_cannot_be_had_is_a_clear_error(level):
    if level in _native.available_levels():
        pytest.skip(f"this machine runs level {level}")
    run = python(ASK, level)
    assert run.returncode == 0, run.stderr
    backend, *calls = run.stdout.strip().splitlines()
    for line in (backend, *calls):
        assert f"LAM_CPU_LEVEL={level}" in line
        assert "portable" in line  # what can be had instead
    assert len(calls) == 2  # neither a named backend nor the default falls back to another level


def test_an_empty_variable_forces_nothing():
    assert python("import lam_kernels; print(lam_kernels.backends()['cpu'])", "").stdout == "\n"


def objects(*levels: str) -> list[Path]:
    if lam_kernels.backends()["cpu"] or not OBJECTS.is_dir():
        pytest.skip(
            "the extension was not built in this tree: there are no object files to look at"
        )
    if shutil.which("nm") is None or shutil.which("objdump") is None:
        pytest.skip("nm and objdump are not installed")
    return [path for level in levels for path in sorted((OBJECTS / level).glob("*.o"))]


def tool(*command: object) -> str:
    return subprocess.run(
        [str(part) for part in command], capture_output=True, text=True, check=True
    ).stdout


@pytest.mark.parametrize("level", ALL_LEVELS)
def test_a_level_defines_its_entry_points_and_nothing_that_the_linker_could_share(level):
    """A weak symbol (a template or inline function that other files have too) is kept once, from
    whichever file comes first: code of a higher level then runs on a machine that lacks it.
    """
    harmless = {"V DW.ref.__gxx_personality_v0"}  # a pointer
    found = objects(level)
    assert found or level not in _native.available_levels()
    for path in found:
        lines = [
            line.split(maxsplit=2) for line in tool("nm", "-C", "--defined-only", path).splitlines()
        ]
        shared = [f"{kind} {name}" for _, kind, name in lines if kind.isupper() or kind in "uvw"]
        entry = re.compile(rf"T lam::\w+_(fwd|bwd)_{level}\(lam::\w+ const&\)")
        strangers = [
            symbol for symbol in shared if not entry.fullmatch(symbol) and symbol not in harmless
        ]
        assert not strangers, f"{path.name}: put these into an unnamed namespace: {strangers}"
        assert len(shared) >= 2  # forward and backward


@pytest.mark.parametrize("level", ALL_LEVELS)
def test_a_level_runs_nothing_when_the_library_is_loaded(level):
    for path in objects(level):
        sections = tool("objdump", "-h", path)
        assert ".init_array" not in sections, (
            f"{path.name} has a global that is constructed at load time"
        )


def test_what_every_machine_runs_has_no_wide_registers():
    for path in objects("portable", "baseline"):
        wide = [
            line
            for line in tool("objdump", "-d", path).splitlines()
            if re.search(r"%[yz]mm|%tmm", line)
        ]
        assert not wide, f"{path.name}: {wide[:3]}"
