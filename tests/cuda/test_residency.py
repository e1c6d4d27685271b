"""docs/cuda_kernels.md says what the planner plans."""

from __future__ import annotations

import pytest
from compile import ROOT
from residency import table

from lam_kernels.ops import _cuda


@pytest.mark.backend("cuda")
def test_table_of_the_docs():
    if not _cuda.emulated():
        pytest.skip("asks the emulated library")
    text = (ROOT / "docs" / "cuda_kernels.md").read_text()
    assert table() in text, f"docs/cuda_kernels.md should hold:\n{table()}"
