"""Backends as one parameter, poisoned memory, fixed threads, and the table at the end of a run."""

from __future__ import annotations

import os
import sys
from collections import Counter
from pathlib import Path

# Read by OpenMP when torch loads it. Threads that spin while other programs want the cores make
# small calls 10 x slower.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
# Read once, when a backend is first asked for: where there is no GPU the CUDA kernels run emulated.
os.environ.setdefault("LAM_EMULATE_CUDA", "1")

import pytest
import torch

# Read by Triton when it is imported: without a GPU its kernels run on CPU tensors.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

TESTS = Path(__file__).resolve().parent
for folder in (TESTS, TESTS.parent):
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))

import emulated  # noqa: E402
import interpreted  # noqa: E402
from backends import BACKENDS, rows_for, takes_no_part, why_missing  # noqa: E402

THREADS = 2


def pytest_addoption(parser):
    group = parser.getgroup("lam_kernels")
    group.addoption("--full", action="store_true", help="also the big sets (make test-full)")
    group.addoption("--problems", type=int, help="how many random problems a backend gets")
    group.addoption(
        "--first-problem", type=int, default=0, help="number of the first random problem"
    )
    group.addoption(
        "--problem", action="append", help="run this one: 'Problem(...)' from a failure"
    )


def pytest_configure(config):
    config.addinivalue_line("markers", "backend(name): counted under this backend in the table")
    config.addinivalue_line("markers", "full: only with --full")
    torch.set_num_threads(THREADS)
    if torch.cuda.is_available():
        from on_gpu import serve_cpu_tensors

        serve_cpu_tensors()
    # The first large float64 exp of a process is now and then wrong in the ninth digit; later ones
    # are exact.
    for _ in range(2):
        torch.exp(torch.linspace(-20, 5, 200_000, dtype=torch.float64))


# Last, so that the backends of a case follow one another and find its expected values computed.
@pytest.hookimpl(trylast=True)
def pytest_generate_tests(metafunc):
    """`backend`: every row of BACKENDS; `backend` and `dtype`: every dtype of each row."""
    names = metafunc.fixturenames
    own = {mark.args[0] for mark in metafunc.definition.iter_markers("parametrize")}
    if hasattr(metafunc.module, "pytest_generate_tests"):  # it makes its own
        return
    if "backend" not in names or any("backend" in arguments for arguments in own):
        return
    rows = rows_for(metafunc.module.__name__.rpartition(".")[2])
    if "dtype" in names and not any("dtype" in arguments for arguments in own):
        cases = [(row, dtype) for row in rows for dtype in row.dtypes]
        values = [
            pytest.param(row.name, dtype, marks=pytest.mark.backend(row.name))
            for row, dtype in cases
        ]
        metafunc.parametrize("backend, dtype", values)
    else:
        values = [pytest.param(row.name, marks=pytest.mark.backend(row.name)) for row in rows]
        metafunc.parametrize("backend", values)


# backend -> why an ordinary run leaves a test out, "" when it takes it
LEFT_OUT = {"triton": interpreted.left_out, "cuda": emulated.left_out}


def _takes_no_part(name: str, item, full: bool) -> str:
    """Why a test is not for a backend, "" when it is."""
    why_not = takes_no_part(name, item.path.stem) if item.path.parent.name == "ops" else ""
    if not why_not and not full and name in LEFT_OUT:
        why_not = LEFT_OUT[name](item)
    return why_not


def pytest_collection_modifyitems(config, items):
    reasons = {row.name: why_missing(row.name) for row in BACKENDS}
    for item in items:
        mark = item.get_closest_marker("backend")
        name = mark.args[0] if mark else "none"
        item.user_properties.append(("backend", name))
        if reasons.get(name):
            item.add_marker(pytest.mark.skip(reason=f"{name}: {reasons[name]}"))
        elif why_not := _takes_no_part(name, item, config.getoption("full")):
            item.add_marker(pytest.mark.skip(reason=why_not))
        if item.get_closest_marker("full") and not config.getoption("full"):
            item.add_marker(pytest.mark.skip(reason="big: only with --full (make test-full)"))


@pytest.fixture(autouse=True)
def poison():
    """Uninitialised memory from torch is NaN, so a kernel that forgets to write is found."""
    before = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(before, warn_only=warn_only)


@pytest.fixture(autouse=True)
def same_threads():
    yield
    torch.set_num_threads(THREADS)


# ---- the table


def pytest_terminal_summary(terminalreporter, exitstatus, config):
    import lam_kernels

    ran, skipped = _counts(terminalreporter)
    rows = [("backend", "tests run", "not run", "why not")]
    for name, missing in {**lam_kernels.backends(), "none": ""}.items():
        why = Counter(skipped.get(name, {}))
        reasons = [f"{n} x {reason}" for reason, n in why.most_common(6)]
        label = "(no backend)" if name == "none" else name
        if missing and not why:
            reasons = [missing]
        rows.append((label, str(ran[name]), str(why.total()), "; ".join(reasons)))
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    terminalreporter.section("backends")
    for row in rows:
        cells = [cell.ljust(width) for cell, width in zip(row, widths, strict=False)]
        terminalreporter.write_line("  ".join([*cells, row[3]]))
    for name in _silent(ran, skipped):
        terminalreporter.write_line(f"FAILED: every test of backend {name} was skipped", red=True)


def pytest_sessionfinish(session, exitstatus):
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    if reporter is not None and exitstatus == 0 and _silent(*_counts(reporter)):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def _silent(ran: Counter, skipped: dict) -> list[str]:
    """Backends that every machine has, whose tests were collected and all skipped."""
    return [
        row.name for row in BACKENDS if row.expected and skipped.get(row.name) and not ran[row.name]
    ]


def _counts(reporter) -> tuple[Counter, dict[str, Counter]]:
    ran: Counter = Counter()
    skipped: dict[str, Counter] = {}
    for outcome, reports in reporter.stats.items():
        for report in reports:
            name = dict(getattr(report, "user_properties", ())).get("backend")
            if name is None or outcome not in ("passed", "failed", "skipped", "xfailed", "xpassed"):
                continue
            if outcome == "skipped":
                reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else "?"
                skipped.setdefault(name, Counter())[reason.removeprefix("Skipped: ")] += 1
            else:
                ran[name] += 1
    return ran, skipped
