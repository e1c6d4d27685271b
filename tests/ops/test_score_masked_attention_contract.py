"""score_masked_attention as a citizen of torch, its refusals, and its private C++ operators."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from lam_kernels import score_masked_attention
from lam_kernels.ops import _native

on_cpu = pytest.mark.backend("cpu")
B, H, LQ, LK, D, DV, HIDDEN = 2, 2, 5, 7, 3, 6, 4


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)
    torch._dynamo.reset()


def operands(dtype=torch.float32, requires_grad=True):
    """query, key, value, two weights, two biases"""
    shapes = (
        (B, H, LQ, D), (B, H, LK, D), (B, H, LK, DV), (LK, HIDDEN), (HIDDEN, LK), (HIDDEN,), (LK,)
    )  # fmt: skip
    return [torch.randn(s, dtype=dtype).requires_grad_(requires_grad) for s in shapes]


def attend(query, key, value, w1, w2, b1, b2, **keywords):
    return score_masked_attention(query, key, value, [w1, w2], [b1, b2], **keywords)


def gradients(function, tensors):
    leaves = [t.detach().clone().requires_grad_() for t in tensors]
    out = function(*leaves)
    out.float().sin().sum().backward()
    return [out.detach(), *(t.grad for t in leaves)]


@pytest.mark.parametrize(
    "backend",
    [pytest.param(name, marks=pytest.mark.backend(name)) for name in ("cpu", "reference")],
)
def test_opcheck(backend):
    query, key, value, *_ = operands(requires_grad=False)
    parameters = torch.randn((LK + 1) * HIDDEN + (HIDDEN + 1) * LK)
    forward = torch.ops.lam_kernels.score_masked_attention_fwd.default
    backward = torch.ops.lam_kernels.score_masked_attention_bwd.default
    key_mask = torch.arange(LK).expand(B, LK) < 6
    for mask, mean in ((key_mask, False), (None, True)):
        tensors = (query, key, value, parameters, mask)
        settings = ([LK, HIDDEN, LK], 0.5, True, mean)
        torch.library.opcheck(forward, (*tensors, *settings, backend))
        out = forward(*tensors, *settings, backend)
        for needs in ([True] * 4, [True, False, False, True]):
            torch.library.opcheck(backward, (out, *tensors, *settings, needs, backend))


@on_cpu
@pytest.mark.parametrize("mode", ["aot_eager", "inductor"])
def test_compiles_into_one_graph(mode):
    def call(*t):
        return attend(*t, key_mask=torch.arange(LK).expand(B, LK) < 6, heads="mean")

    tensors = operands()
    compiled = torch.compile(call, fullgraph=True, backend=mode, dynamic=mode == "inductor")
    for a, b in zip(gradients(call, tensors), gradients(compiled, tensors), strict=True):
        torch.testing.assert_close(a, b)


@on_cpu
def test_func_grad_and_vmap():
    tensors = operands(torch.float64, False)

    def scalar(*t):
        return attend(*t, fusion="add").sin().sum()

    everything = tuple(range(7))
    found = torch.func.grad(scalar, argnums=everything)(*tensors)
    leaves = [t.clone().requires_grad_() for t in tensors]
    expected = torch.autograd.grad(scalar(*leaves), leaves)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)
    stacked = [torch.stack([t, t + 1]) for t in tensors]
    for a, b in zip(torch.vmap(attend)(*stacked), (tensors, [t + 1 for t in tensors]), strict=True):
        torch.testing.assert_close(a, attend(*b))
    mapped = torch.vmap(torch.func.grad(scalar, argnums=everything))(*stacked)
    for a, b in zip(mapped, found, strict=True):
        torch.testing.assert_close(a[0], b)


@on_cpu
def test_double_backward_is_refused():
    tensors = operands(torch.float64)
    (grad,) = torch.autograd.grad(attend(*tensors).sin().sum(), tensors[0], create_graph=True)
    with pytest.raises(RuntimeError, match=r'no double backward.*backend="reference"'):
        grad.sum().backward()


@on_cpu
@pytest.mark.parametrize("backend", [None, "reference"])
@pytest.mark.parametrize("keys", [LK, 140])
def test_autocast_casts_query_key_value_and_no_parameter(backend, keys):
    query, key, value = (torch.randn(B, H, n, D) for n in (LQ, keys, keys))
    weights = [torch.randn(keys, HIDDEN), torch.randn(HIDDEN, keys)]
    biases = [torch.randn(HIDDEN), torch.randn(keys)]
    with torch.autocast("cpu", torch.bfloat16):
        out = score_masked_attention(query, key, value, weights, biases, backend=backend)
    assert out.dtype == torch.bfloat16
    halves = (t.bfloat16() for t in (query, key, value))
    assert torch.equal(out, score_masked_attention(*halves, weights, biases, backend=backend))


@on_cpu
@pytest.mark.parametrize("heads", ["each", "mean"])
def test_flops(heads):
    with FlopCounterMode(display=False) as counter:
        attend(*operands(), heads=heads).sum().backward()
    counts = {str(op): n for op, n in counter.get_flop_counts()["Global"].items()}
    network = 2 * B * (1 if heads == "mean" else H) * LQ * 2 * LK * HIDDEN
    pairs = 2 * B * H * LQ * LK
    assert counts["lam_kernels.score_masked_attention_fwd"] == pairs * (D + DV) + network
    backward = pairs * (3 * D + 2 * DV) + 3 * network
    assert counts["lam_kernels.score_masked_attention_bwd"] == backward


def call_of(**changes):
    query, key, value, w1, w2, b1, b2 = operands(requires_grad=False)
    given = {"query": query, "key": key, "value": value}
    return {**given, "weights": [w1, w2], "biases": [b1, b2], **changes}


one = torch.randn
REFUSED = {
    "no weights": ({"weights": [], "biases": []}, "weights must hold 1 to 64 matrices, got 0"),
    "65 layers": ({"weights": [one(7, 7)] * 65, "biases": [one(7)] * 65}, "1 to 64.*got 65"),
    "a tensor": ({"weights": one(7, 7)}, "weights must be a sequence of Tensors, got Tensor"),
    "one bias": ({"biases": [one(4)]}, "one vector a weight, 2, got 1"),
    "rows for other keys": (
        {"weights": [one(8, 4), one(4, 7)]},
        r"weights\[0\] must be \[7, 4\] for 7 keys, got \[8, 4\]; a generator of more keys is",
    ),
    "columns for other keys": ({"weights": [one(7, 4), one(4, 8)]}, r"weights.1. must be .4, 7."),
    "two hidden widths": (
        {"weights": [one(7, 4), one(4, 5), one(5, 7)], "biases": [one(4), one(5), one(7)]},
        r"weights\[1\] must be \[4, 4\]",
    ),
    "no hidden width": (
        {"weights": [one(7, 0), one(0, 7)], "biases": [one(0), one(7)]}, "at least 1 column"
    ),
    "a long bias": ({"biases": [one(5), one(7)]}, r"biases\[0\] must be \[4\], got \[5\]"),
    "a matrix of biases": ({"biases": [one(1, 4), one(7)]}, r"biases\[0\] must have 1 axes"),
    "integers": ({"biases": [one(4).int(), one(7)]}, r"biases\[0\] must be float32"),
    "float64": ({"weights": [one(7, 4).double(), one(4, 7)]}, "float64 only when query is"),
    "fusion": ({"fusion": "gate"}, "fusion must be \"mul\" or \"add\", got 'gate'"),
    "heads": ({"heads": "all"}, "heads must be \"each\" or \"mean\", got 'all'"),
    "heads of the keys": ({"key": one(B, 1, LK, D), "value": one(B, 1, LK, DV)}, "heads"),
    "key_mask": ({"key_mask": torch.ones(B, 8, dtype=torch.bool)}, "key_mask must be"),
    "scale": ({"scale": "1"}, "scale must be a float"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_refusals(case):
    changes, words = REFUSED[case]
    with pytest.raises((ValueError, TypeError), match=words):
        score_masked_attention(**call_of(**changes))


# ---- the private operators called directly: whatever comes in, they refuse or stay in bounds


def direct(**changes):
    query, key, value, *_ = operands(requires_grad=False)
    given = {
        "query": query, "key": key, "value": value,
        "parameters": torch.randn((LK + 1) * HIDDEN + (HIDDEN + 1) * LK), "key_mask": None,
        "widths": [LK, HIDDEN, LK], "scale": 1.0, "multiply": True, "mean": False, **changes,
    }  # fmt: skip
    return given


NATIVE = {
    "no layer": {"widths": [LK]},
    "no widths": {"widths": []},
    "65 layers": {"widths": [LK] * 66},
    "first width": {"widths": [LK + 1, HIDDEN, LK]},
    "last width": {"widths": [LK, HIDDEN, LK + 1]},
    "width 0": {"widths": [LK, 0, LK]},
    "negative width": {"widths": [LK, -1, LK]},
    "huge width": {"widths": [LK, 2**62, LK]},
    "short parameters": {"parameters": torch.randn(10)},
    "half parameters": {"parameters": torch.randn((LK + 1) * HIDDEN + (HIDDEN + 1) * LK).half()},
    "shared heads": {"key": torch.randn(B, 1, LK, D), "value": torch.randn(B, 1, LK, DV)},
    "129 keys": {
        "key": torch.randn(B, H, 129, D), "value": torch.randn(B, H, 129, DV),
        "widths": [129, 129], "parameters": torch.randn(129 * 130),
    },
    "key_mask of another batch": {"key_mask": torch.ones(3, LK, dtype=torch.bool)},
}  # fmt: skip


@on_cpu
@pytest.mark.parametrize("case", NATIVE)
def test_native_refusals(case):
    if _native.unavailable():
        pytest.skip(_native.unavailable())
    with pytest.raises(RuntimeError):
        torch.ops.lam_kernels.score_masked_attention_cpu_fwd(**direct(**NATIVE[case]))
    out = torch.ones(B, H, LQ, DV)
    with pytest.raises(RuntimeError):
        torch.ops.lam_kernels.score_masked_attention_cpu_bwd(
            grad_out=out, **direct(**NATIVE[case]), needs=[True] * 4
        )


@on_cpu
@pytest.mark.parametrize(
    "wrong", [{"grad_out": torch.ones(B, H, LQ, 5)}, {"needs": [True] * 5}, {"needs": []}]
)
def test_native_backward_refusals(wrong):
    if _native.unavailable():
        pytest.skip(_native.unavailable())
    given = {"grad_out": torch.ones(B, H, LQ, DV), **direct(), "needs": [True] * 4, **wrong}
    with pytest.raises(RuntimeError):
        torch.ops.lam_kernels.score_masked_attention_cpu_bwd(**given)
