"""Tests in a process of their own, at an instruction-set level that LAM_CPU_LEVEL forces."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterable

import pytest
from backends import TESTS

from lam_kernels.ops import _native

AVAILABLE = set(_native.available_levels())
# what every other test runs at
OWN = _native.level() if AVAILABLE and not _native.unavailable() else ""
LEVELS = [
    pytest.param(level, marks=pytest.mark.full if level == OWN else ())
    for level in ("portable", "avx2", "avx512", "amx", "amx_emulated")
]


def run(level: str, *arguments: str) -> subprocess.CompletedProcess:
    """Python with these arguments, on one thread: a neighbouring test has the other core."""
    environment = os.environ | {"LAM_CPU_LEVEL": level, "OMP_NUM_THREADS": "1"}
    paths = [str(TESTS), str(TESTS.parent), environment.get("PYTHONPATH", "")]
    environment["PYTHONPATH"] = os.pathsep.join(p for p in paths if p)
    return subprocess.run(
        [sys.executable, *arguments], env=environment, capture_output=True, text=True, timeout=600
    )


def assert_silent(file: str, level: str) -> None:
    """The file, run as a program with the level as its argument, prints nothing; it prints a line
    (print_failures) for each case that fails."""
    if level not in AVAILABLE:
        pytest.skip(f"cpu level {level}: this machine runs {', '.join(sorted(AVAILABLE))}")
    done = run(level, file, level)
    assert done.returncode == 0, done.stderr
    assert not done.stdout.strip(), done.stdout


def print_failures(level: str, cases: Iterable, check) -> None:
    """In that process: a line for each case that check(case, "cpu") refuses."""
    if _native.level() != level:
        print(f"asked for {level}, runs {_native.level()}")
    for case in cases:
        try:
            check(case, "cpu")
        except AssertionError as failure:
            print(failure, flush=True)
