"""LowRankMask as data: what it refuses, what the op refuses of it, .dense()."""

from __future__ import annotations

import pytest
import torch
from backends import BY_NAME

import lam_kernels
from lam_kernels import LowRankMask, explain, masked_attention


def factors(**changes):
    shapes = {"rows": (2, 1, 5, 3), "columns": (1, 2, 7, 3), "offset": (1, 1, 1, 7)}
    return {name: torch.randn(changes.get(name, shape)) for name, shape in shapes.items()}


BAD_MASKS = {
    "rows has 3 axes": (ValueError, "rows must have 4 axes", factors(rows=(2, 5, 3))),
    "two ranks": (ValueError, "one rank of at least 1, got 3 and 4", factors(columns=(1, 1, 7, 4))),
    "rank 0": (ValueError, "got 0 and 0", factors(rows=(1, 1, 5, 0), columns=(1, 1, 7, 0))),
    "an offset a row": (ValueError, "offset must be", factors(offset=(1, 1, 5, 7))),
    "a short offset": (ValueError, "offset must be", factors(offset=(1, 1, 1, 6))),
    "two batches": (ValueError, "axis B of the factors", factors(columns=(3, 1, 7, 3))),
    "two heads": (ValueError, "axis H of the factors", factors(rows=(2, 3, 5, 3))),
    "a list": (TypeError, "rows must be a Tensor, got list", factors() | {"rows": [[1.0]]}),
    "integers": (TypeError, "columns must be float32", {"columns": torch.ones(1, 2, 7, 3).int()}),
    "sparse": (ValueError, "must be dense", {"columns": torch.ones(1, 2, 7, 3).to_sparse()}),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_MASKS)
def test_mask_that_cannot_be(case):
    error, words, changes = BAD_MASKS[case]
    with pytest.raises(error, match=words):
        LowRankMask(**factors() | changes)


BAD_CALLS = {
    "rank 257": ("rank of 1 to 256, got 257", (2, 1, 5, 257), (1, 1, 7, 257)),
    "other length": ("LowRankMask.rows has shape", (2, 1, 6, 3), (1, 1, 7, 3)),
    "one row": ("LowRankMask.rows has shape", (2, 1, 1, 3), (1, 1, 7, 3)),
    "other keys": ("LowRankMask.columns has shape", (2, 1, 5, 3), (1, 1, 8, 3)),
    "other batch": ("LowRankMask.rows has shape", (3, 1, 5, 3), (1, 1, 7, 3)),
    "other heads": ("LowRankMask.columns has shape", (2, 1, 5, 3), (1, 4, 7, 3)),
}


@pytest.mark.parametrize("case", BAD_CALLS)
@pytest.mark.parametrize("use", ["multiplier", "bias"])
def test_call_that_cannot_be(use, case):
    words, rows, columns = BAD_CALLS[case]
    mask = LowRankMask(torch.randn(rows), torch.randn(columns))
    q, k, v = (torch.randn(2, 2, n, 8) for n in (5, 7, 7))
    with pytest.raises(ValueError, match=f"{use}.*{words}"):
        masked_attention(q, k, v, **{use: mask})
    with pytest.raises(ValueError, match=words):
        explain("masked_attention", q, k, v, **{use: mask})


def test_dense_serves_what_the_factors_cannot():
    q, k, v = (torch.randn(2, 2, n, 8) for n in (5, 7, 7))
    mask = LowRankMask(
        torch.randn(2, 1, 5, 300), torch.randn(1, 1, 7, 300), torch.randn(1, 1, 1, 7)
    )
    expected = mask.rows @ mask.columns.mT + mask.offset
    assert torch.equal(mask.dense(), expected)
    assert masked_attention(q, k, v, multiplier=mask.dense()).isfinite().all()


@pytest.mark.parametrize("name", ["cuda", "triton"])
def test_a_backend_that_cannot_says_so(name):
    if lam_kernels.backends()[name] or BY_NAME.get(name) is None or BY_NAME[name].low_rank:
        pytest.skip(f"{name}: not here, or it serves a LowRankMask")
    q, k, v = (torch.randn(2, 2, n, 8) for n in (5, 7, 7))
    mask = LowRankMask(torch.randn(2, 1, 5, 3), torch.randn(1, 1, 7, 3))
    reasons = explain("masked_attention", q, k, v, multiplier=mask).reasons[name]
    assert any("LowRankMask" in reason for reason in reasons)
