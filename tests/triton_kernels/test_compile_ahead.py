"""Every entry of the configuration table compiles for sm_80, sm_90 and sm_100, within the chip:
all of them, with both ends of the supported Tritons, in a --full run; one a kernel otherwise.

Shared memory fits, the stack stays within a budget (spilled registers live there), and the matrix
products are done by the instruction that was meant. What is compiled and how: compile_ahead.py.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from lam_kernels.triton.configurations import HEAD_DIMS, SCORE, TABLE, shared_limit

pytest.importorskip("triton")
pytestmark = pytest.mark.backend("triton")

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
ARCHS = (80, 90, 100)
TENSOR_MEMORY_COLUMNS = 512
# Spilled registers of a thread, by bytes an element. A few words around a loop cost nothing; what a
# loop reloads does. float32 keeps three tf32 parts of its operands, which wide heads pay for.
STACK_BUDGET_BYTES = {2: 64, 4: 256}


def compile_ahead(version: str, *arguments: str) -> list[dict]:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    folder = Path("build", f"triton-{version}")
    paths = [str(ROOT / folder)] if version else []
    if version and not (ROOT / folder / "triton").is_dir():
        pytest.skip(f"Triton {version} is not there: `make {folder}/triton` installs it")
    environment["PYTHONPATH"] = os.pathsep.join([*paths, str(ROOT)])
    environment.setdefault("TRITON_CACHE_DIR", str(ROOT / "build" / "triton-cache"))
    done = subprocess.run(
        [sys.executable, HERE / "compile_ahead.py", *arguments],
        env=environment,
        capture_output=True,
        text=True,
        timeout=1500,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    records = [json.loads(line) for line in done.stdout.splitlines()]
    if "--features" not in arguments:
        announced, *records = records
        chosen = {name_of(record | {"entry": record["chosen"]}) for record in records}
        assert len(chosen) == announced["entries"]
    assert all(r["triton"].startswith(version) for r in records if version), records[:1]
    return records


def meant_instruction(record: dict) -> str:
    """Warp groups, four warps and 64 rows, have an instruction of their own from sm_90 on."""
    block_m, block_n, warps, _ = record["entry"]
    rows = block_n if record["kernel"].endswith("columns") else block_m
    if record["arch"] == 80 or rows < 64 or warps < 4:
        return "mma.sync"
    return "wgmma.mma_async" if record["arch"] == 90 else "tcgen05.mma"


def faults(record: dict) -> list[str]:
    """What is wrong with a compiled kernel, in words."""
    found = []
    limit = shared_limit((record["arch"] // 10, record["arch"] % 10))
    if record["shared"] > limit:
        found.append(f"{record['shared']} bytes of shared memory, at most {limit}")
    if record["tensor_memory"] > TENSOR_MEMORY_COLUMNS:
        found.append(f"{record['tensor_memory']} columns of tensor memory")
    budget = STACK_BUDGET_BYTES[record["width"]]
    if record["stack"] > budget:
        found.append(f"{record['stack']} bytes of stack, at most {budget}")
    meant = meant_instruction(record)
    if not record["instructions"][meant]:
        found.append(f"no {meant}")
    return [f"{name_of(record)}: {fault}" for fault in found]


def name_of(record: dict) -> str:
    keys = ("arch", "kernel", "entry", "width", "head_dim")
    rank = f" rank {record['rank']}" if record["rank"] else ""
    return "sm_" + " ".join(str(record[key]) for key in keys) + rank


KERNELS = {
    op: {kernel for kernel in TABLE if kernel.startswith(op)}
    for op in ("global_local", "map_gated")
}
KERNELS[""] = set(TABLE).difference(*KERNELS.values()) | {"short_forward", "short_backward", *SCORE}


def check(records: list[dict], kernels: set[str]) -> None:
    assert {r["kernel"] for r in records} == kernels
    found = [fault for record in records for fault in faults(record)]
    assert not found, "\n".join(found)


@pytest.mark.full
@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("version", ["3.6", pytest.param("", id="installed")])
@pytest.mark.parametrize("op", [pytest.param("", id="masked"), "global_local", "map_gated"])
def test_every_entry(op, version, arch):
    of_op = ("--op", op) if op else ()
    check(compile_ahead(version, "--arch", str(arch), *of_op), KERNELS[op])


@pytest.mark.parametrize(
    ("version", "arch"), [("3.6", 80), pytest.param("", 100, id="installed-100")]
)
def test_an_entry_of_every_kernel(version, arch):
    records = compile_ahead(version, "--arch", str(arch), "--op", "all", "--one-a-kernel")
    check(records, set().union(*KERNELS.values()))


@pytest.mark.full
@pytest.mark.parametrize("rank", ["16", "64"])
@pytest.mark.parametrize("arch", ARCHS)
def test_every_entry_with_a_low_rank_mask(arch, rank):
    records = compile_ahead("3.6", "--arch", str(arch), "--rank", rank)
    found = [fault for record in records for fault in faults(record)]
    assert not found, "\n".join(found)


@pytest.mark.full
@pytest.mark.parametrize("arch", [80, 86, 90])
def test_more_masks_than_the_table_is_made_for(arch):
    """What does not fit the chip is launched with less, whatever the operands are."""
    records = compile_ahead("3.6", "--arch", str(arch), "--heavy", "--width", "2")
    limit = shared_limit((arch // 10, arch % 10))
    assert all(record["shared"] <= limit for record in records)
    assert any(record["entry"] != record["chosen"] for record in records) == (arch != 90)


@pytest.mark.parametrize(
    "version",
    [
        "3.6",
        pytest.param("", id="installed", marks=pytest.mark.full),
        pytest.param("3.9", marks=pytest.mark.full),
    ],
)
def test_every_kind_of_operand(version):
    """What the language of either version takes: masks of every shape, patterns, low rank."""
    records = compile_ahead(version, "--arch", "90", "--features")
    launched = {r["feature"]: r["launched"] for r in records}
    usual = ["columns", "delta", "forward", "rows"]
    assert launched == {
        "vectors": usual, "patterns": [*usual, "tiles"], "low rank": usual,
        "global and local": ["delta", *(f"global_local_{one}" for one in usual if one != "delta")],
        "gated maps": ["map_gated_forward", "map_gated_gates", "map_gated_heads"],
        "short": ["short_backward", "short_forward"],
    }  # fmt: skip


def test_a_tile_too_large_is_found():
    planted = (
        "--head-dim",
        "256",
        "--kernel",
        "rows",
        "--width",
        "2",
        "--entry",
        "128",
        "64",
        "4",
        "2",
    )
    records = compile_ahead("", "--arch", "80", *planted)
    text = "\n".join(fault for record in records for fault in faults(record))
    assert "bytes of stack" in text
    assert "bytes of shared memory" in text


def test_a_wrong_instruction_is_found():
    record = {
        "arch": 90, "kernel": "forward", "entry": [64, 64, 4, 2], "width": 2, "head_dim": 64,
        "rank": 0, "stack": 0, "shared": 0, "tensor_memory": 0,
        "instructions": {"wgmma.mma_async": 0, "mma.sync": 8},
    }  # fmt: skip
    assert faults(record) == ["sm_90 forward [64, 64, 4, 2] 2 64: no wgmma.mma_async"]


def test_table_is_complete():
    for kernel, rows in TABLE.items():
        assert set(rows) == {(width, step) for width in (2, 4) for step in HEAD_DIMS}, kernel
        assert all(rows.values())
