"""The backends that the operator tests run on, as one table."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from lam_kernels.triton import availability

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
    modules: tuple[str, ...] = ()  # only these test modules; () for all


BACKENDS = (
    Backend("cpu", ("float32", "bfloat16", "float16", "float64"), True, 300),
    # without a GPU in the interpreter, where interpreted.py says which tests an ordinary run takes
    Backend("triton", ("float32", "bfloat16", "float16"), False, 20),
    Backend(
        "reference", ("float32", "bfloat16", "float16", "float64"), True, 60, double_backward=True
    ),
    # emulated, a problem takes some 0.1 s: accuracy and determinism of the kernels; what lies
    # around them is the same for every backend
    Backend(
        "cuda",
        ("float32", "bfloat16", "float16"),
        False,
        200,
        modules=(
            "test_masked_attention",
            "test_masked_attention_random",
            "test_masked_attention_conventions",
            # an ordinary run takes what emulated.py lists
            "test_global_local_attention",
            "test_map_gated_attention",
            "test_masked_attention_low_rank",
        ),
    ),
)
BY_NAME = {row.name: row for row in BACKENDS}


def widest(name: str) -> str:
    """The dtype of a backend in which comparisons are sharpest."""
    return "float64" if "float64" in BY_NAME[name].dtypes else "float32"


def rows_for(module: str) -> list[Backend]:
    """The rows whose tests a module has."""
    return [row for row in BACKENDS if not row.modules or module in row.modules]


def repeats(name: str, count: int) -> int:
    """How often a test repeats a call: once where one takes long."""
    slow = name == "reference" or (name == "triton" and availability.interpreting())
    return 1 if slow else count


def why_missing(name: str) -> str:
    """Why a backend cannot run here, "" when it can."""
    import lam_kernels

    return lam_kernels.backends().get(name, "unknown to lam_kernels.backends()")


@cache
def takes_no_part(name: str, test_file: str) -> str:
    """Why a backend takes no part in tests/ops/test_OP*.py, "" when it does."""
    rooms = {path.stem for path in (TESTS.parent / "lam_kernels" / "ops").glob("[!_]*.py")}
    ops = [op for op in rooms if test_file.startswith(f"test_{op}")]
    if test_file == "test_two_map_ops":  # what the two ops share
        ops = ["global_local_attention"]
    if name not in BY_NAME or not ops:
        return ""
    page = importlib.import_module(f"lam_kernels.ops.{max(ops, key=len)}")
    services = getattr(page, "KERNELS", None)
    if services is None:
        return ""
    if name not in services.table:
        return f"{name} has no kernels of {services.op}"
    if BY_NAME[name].modules and test_file not in BY_NAME[name].modules:
        return f"{name}: accuracy of its kernels only, not what is the same for every backend"
    return ""
