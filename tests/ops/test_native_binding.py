"""The private C++ operators called directly: whatever comes in, they refuse or stay in bounds."""

from __future__ import annotations

import pytest
import torch

from lam_kernels.ops import _native

pytestmark = pytest.mark.backend("cpu")

EVERYTHING = [0] * 17  # a pattern spec without terms


@pytest.fixture(autouse=True)
def loaded():
    if _native.unavailable():
        pytest.skip(_native.unavailable())


def operands(**changes) -> dict:
    return {
        "query": torch.randn(2, 4, 5, 8),
        "key": torch.randn(2, 2, 6, 8),
        "value": torch.randn(2, 2, 6, 3),
        "multiplier": None,
        "bias": None,
        "multiplier_columns": None,
        "multiplier_offset": None,
        "bias_columns": None,
        "bias_offset": None,
        "attn_mask": None,
        "key_mask": None,
        "segment_ids": [],
        "rng_state": None,
        "pattern": [],
        "scale": 1.0,
        "dropout_p": 0.0,
        "gate": False,
        **changes,
    }


def forward(**changes):
    return torch.ops.lam_kernels.masked_attention_cpu_fwd(**operands(**changes))


def backward(needs=(True,) * 3 + (False,) * 2, grads=(), **changes):
    given = operands(**changes)
    out, lse = torch.ops.lam_kernels.masked_attention_cpu_fwd(**given)
    given |= {"out": out, "lse": lse, "grad_out": torch.ones_like(out), "grad_lse": None}
    needs = [*needs, *[False] * (9 - len(needs))] if len(needs) >= 5 else needs
    return torch.ops.lam_kernels.masked_attention_cpu_bwd(**{**given, **dict(grads)}, needs=needs)


def pattern_of(terms: int = 1, **term) -> list[int]:
    """A pattern of one spec, whose first term is given by field."""
    fields = {"kind": 3, "end": 0, "a": 0, "b": 0, **term}
    return [1, terms, *fields.values(), *[0] * 12]


def factors(**changes) -> dict:
    """A low-rank multiplier by its field names, rank 3."""
    given = {"rows": torch.randn(2, 1, 5, 3), "columns": torch.randn(1, 4, 6, 3), **changes}
    names = {"rows": "multiplier", "columns": "multiplier_columns", "offset": "multiplier_offset"}
    return {names[name]: tensor for name, tensor in given.items()}


REFUSED = {
    "other batch": {"key": torch.randn(3, 2, 6, 8)},
    "other head dim": {"key": torch.randn(2, 2, 6, 9)},
    "other key length": {"value": torch.randn(2, 2, 7, 3)},
    "heads that do not divide": {"key": torch.randn(2, 3, 6, 8), "value": torch.randn(2, 3, 6, 3)},
    "no key heads": {"key": torch.randn(2, 0, 6, 8), "value": torch.randn(2, 0, 6, 3)},
    "3-D query": {"query": torch.randn(4, 5, 8)},
    "wide head": {"query": torch.randn(2, 4, 5, 257), "key": torch.randn(2, 2, 6, 257)},
    "no head dim": {"query": torch.randn(2, 4, 5, 0), "key": torch.randn(2, 2, 6, 0)},
    "mixed dtypes": {"key": torch.randn(2, 2, 6, 8).double()},
    "integer query": {"query": torch.ones(2, 4, 5, 8, dtype=torch.int32)},
    "mask of another length": {"multiplier": torch.randn(1, 1, 5, 7)},
    "mask with 2 axes": {"bias": torch.randn(5, 6)},
    "integer mask": {"bias": torch.ones(1, 1, 5, 6, dtype=torch.int64)},
    "float64 mask of float32": {"bias": torch.ones(1, 1, 5, 6, dtype=torch.float64)},
    "columns without rows": factors(rows=None),
    "an offset alone": factors(rows=None, columns=None, offset=torch.randn(1, 1, 1, 6)),
    "an offset of a dense mask": factors(
        rows=torch.randn(1, 1, 5, 6), columns=None, offset=torch.randn(1, 1, 1, 6)
    ),
    "two ranks": factors(columns=torch.randn(1, 1, 6, 4)),
    "rank 0": factors(rows=torch.randn(1, 1, 5, 0), columns=torch.randn(1, 1, 6, 0)),
    "rank 257": factors(rows=torch.randn(1, 1, 5, 257), columns=torch.randn(1, 1, 6, 257)),
    "rows of one query": factors(rows=torch.randn(1, 1, 1, 3)),
    "columns of one key": factors(columns=torch.randn(1, 1, 1, 3)),
    "columns of another batch": factors(columns=torch.randn(3, 1, 6, 3)),
    "3-D rows": factors(rows=torch.randn(1, 5, 3)),
    "offset of one key": factors(offset=torch.randn(1, 1, 1, 1)),
    "offset of every query": factors(offset=torch.randn(1, 1, 5, 6)),
    "integer columns": factors(columns=torch.ones(1, 1, 6, 3, dtype=torch.int32)),
    "float64 rows of float32": factors(rows=torch.randn(1, 1, 5, 3).double()),
    "a gate of factors": {
        "bias": torch.randn(1, 1, 5, 3), "bias_columns": torch.randn(1, 1, 6, 3), "gate": True
    },
    "attn_mask not bool": {"attn_mask": torch.ones(1, 1, 5, 6)},
    "key_mask of another batch": {"key_mask": torch.ones(3, 6, dtype=torch.bool)},
    "key_mask not bool": {"key_mask": torch.ones(2, 6)},
    "one segment tensor": {"segment_ids": [torch.ones(1, 5, dtype=torch.int64)]},
    "short segment ids": {"segment_ids": [torch.ones(1, 4).long(), torch.ones(1, 6).long()]},
    "segment ids not int64": {"segment_ids": [torch.ones(1, 5).int(), torch.ones(1, 6).int()]},
    "ids of another batch": {"segment_ids": [torch.ones(3, 5).long(), torch.ones(3, 6).long()]},
    "pattern too short": {"pattern": [1, 0, 0]},
    "pattern of no spec": {"pattern": [0]},
    "pattern of minus one spec": {"pattern": [-1]},
    "pattern with 2 specs for 4 heads": {"pattern": [2, *EVERYTHING, *EVERYTHING]},
    "five terms": {"pattern": pattern_of(terms=5)},
    "minus one term": {"pattern": pattern_of(terms=-1)},
    "unknown kind": {"pattern": pattern_of(kind=5)},
    "unknown alignment": {"pattern": pattern_of(end=2)},
    "block 0": {"pattern": pattern_of(kind=0, a=0)},
    "radius -1": {"pattern": pattern_of(kind=1, a=-1)},
    "dilation 0": {"pattern": pattern_of(kind=2, a=1, b=0)},
    "segments that are not there": {"pattern": pattern_of(kind=4, a=0)},
    "dropout without a state": {"dropout_p": 0.5},
    "dropout 1": {"dropout_p": 1.0, "rng_state": torch.zeros(2).long()},
    "dropout nan": {"dropout_p": float("nan"), "rng_state": torch.zeros(2).long()},
    "short rng_state": {"dropout_p": 0.5, "rng_state": torch.zeros(1).long()},
    "float rng_state": {"dropout_p": 0.5, "rng_state": torch.zeros(2)},
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case):
    with pytest.raises(RuntimeError):
        forward(**REFUSED[case])


WRONG_GRADIENTS = {
    "grad_out of another shape": {"grad_out": torch.ones(2, 4, 5, 4)},
    "grad_out of another dtype": {"grad_out": torch.ones(2, 4, 5, 3).double()},
    "out of another shape": {"out": torch.ones(2, 4, 4, 3)},
    "lse of another shape": {"lse": torch.ones(2, 4, 4)},
    "lse of another dtype": {"lse": torch.ones(2, 4, 5).double()},
    "grad_lse of another shape": {"grad_lse": torch.ones(2, 4, 1)},
    "grad_lse of another dtype": {"grad_lse": torch.ones(2, 4, 5).half()},
}


@pytest.mark.parametrize("case", WRONG_GRADIENTS)
def test_wrong_gradients_are_refused(case):
    with pytest.raises(RuntimeError):
        backward(grads=WRONG_GRADIENTS[case].items())


@pytest.mark.parametrize(
    "needs",
    [
        (True,) * 4,
        (True,) * 5,
        (False, False, False, True, False),
        (*[True] * 3, *[False] * 5, True),
    ],
)
def test_gradients_that_cannot_be_are_refused(needs):
    with pytest.raises(RuntimeError):
        backward(needs=needs)


def test_gradient_of_an_offset_that_is_not_there_is_refused():
    with pytest.raises(RuntimeError, match="not there"):
        backward(needs=[False] * 6 + [True, False, False], **factors())


def test_unwanted_gradients_are_empty():
    for needs in ([False] * 9, [False, True, *[False] * 7]):
        for wanted, grad in zip(needs, backward(needs=needs), strict=True):
            assert (grad.numel() > 0) == wanted


@pytest.mark.parametrize(
    "sizes", [(0, 4, 5, 6), (2, 0, 5, 6), (2, 4, 0, 6), (2, 4, 5, 0)], ids=["B", "H", "Lq", "Lk"]
)
def test_nothing_to_attend(sizes):
    B, H, Lq, Lk = sizes
    given = {
        "query": torch.randn(B, H, Lq, 8),
        "key": torch.randn(B, H, Lk, 8),
        "value": torch.randn(B, H, Lk, 3),
        "multiplier": torch.randn(1, 1, Lq, 3),
        "bias": torch.randn(1, 1, 1, Lk),
        "multiplier_columns": torch.randn(1, H, Lk, 3),
        "multiplier_offset": torch.randn(B, 1, 1, Lk),
        "pattern": [1, *EVERYTHING],
    }
    out, lse = forward(**given)
    assert out.shape == (B, H, Lq, 3)
    assert (out == 0).all()
    assert lse.shape == (B, H, Lq)
    assert (lse == -torch.inf).all()
    names = ["query", "key", "value", "multiplier", "bias"]
    names += ["multiplier_columns", "multiplier_offset"]
    gradients = backward(needs=[True] * 7 + [False] * 2, **given)
    for name, grad in zip(names, gradients, strict=False):
        assert grad.shape == given[name].shape
        assert (grad == 0).all()


def test_any_stride():
    dense = operands(bias=torch.randn(2, 4, 5, 6), attn_mask=torch.rand(2, 4, 5, 6) > 0.2)
    strided = dict(dense)
    for name in ("query", "key", "value", "bias", "attn_mask"):
        strided[name] = dense[name].mT.contiguous().mT
    lse_grad = torch.randn(2, 4, 1).expand(2, 4, 5)
    results = []
    for given, g in ((dense, lse_grad.contiguous()), (strided, lse_grad)):
        ones = torch.ones(2, 4, 5, 1)
        grads = {"grad_lse": g, "grad_out": ones.expand(2, 4, 5, 3)}
        results.append(
            [*forward(**given), *backward([True] * 3 + [False, True], grads.items(), **given)]
        )
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other)


def test_a_memory_that_was_freed_is_refused():
    query = torch.randn(2, 4, 5, 8)
    query.untyped_storage().resize_(0)
    with pytest.raises(RuntimeError, match="query"):
        forward(query=query)


def test_a_repeated_row_is_not_copied_for_each_repetition():
    """A non-unit last stride is copied; the axes that are expanded stay expanded."""
    wide = torch.randn(1, 1, 6, 16)[..., ::2]
    spread = {"key": wide.expand(2, 2, 6, 8), "value": wide.expand(2, 2, 6, 8)}
    whole = {name: tensor.clone() for name, tensor in spread.items()}
    query = torch.randn(2, 4, 5, 8)
    for mine, expected in zip(
        forward(query=query, **spread), forward(query=query, **whole), strict=True
    ):
        assert torch.equal(mine, expected)
