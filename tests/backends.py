"""The backends that the operator tests run on, as one table."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

TESTS = Path(__file__).resolve().parent


@dataclass(frozen=True)
class Backend:
    """One row of the table. A backend joins the operator tests by being listed here."""

    name: str
    dtypes: tuple[str, ...]
    expected: bool  # every machine has it: a run in which all its tests were skipped has failed
    random_problems: int  # in an ordinary run
    double_backward: bool = False
    low_rank: bool = True  # takes a LowRankMask


BACKENDS = (
    Backend("cpu", ("float32", "bfloat16", "float16", "float64"), True, 300),
    # in the interpreter where there is no GPU, and then only what is marked for it: interpreted.py
    Backend("triton", ("float32", "bfloat16", "float16"), False, 20),
    Backend(
        "reference", ("float32", "bfloat16", "float16", "float64"), True, 60, double_backward=True
    ),
)
BY_NAME = {row.name: row for row in BACKENDS}


def why_missing(name: str) -> str:
    """Why a backend cannot run here, "" when it can."""
    import lam_kernels

    return lam_kernels.backends().get(name, "unknown to lam_kernels.backends()")
