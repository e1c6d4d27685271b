"""masked_attention as a citizen of torch, its refusals, and which backend serves a call."""

from __future__ import annotations

import subprocess
import sys
import threading
import warnings

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)
from torch.utils.flop_counter import FlopCounterMode

import lam_kernels
from lam_kernels import BlockDiagonal, Causal, Segments, Toeplitz, lam_attention, masked_attention
from lam_kernels.ops import _backends
from lam_kernels.patterns import encode
from python_ref.masked_attention import masked_attention as reference
from python_ref.masked_attention import masked_attention_bwd, masked_attention_fwd
from python_ref.philox import philox4x32

page = sys.modules["lam_kernels.ops.masked_attention"]  # the package attribute is the function
on_cpu = pytest.mark.backend("cpu")  # everything but the reference takes the same path
on_reference = pytest.mark.backend("reference")
B, H, HKV, LQ, LK, D, DV = 2, 4, 2, 5, 7, 3, 6
NO_FACTORS = (None,) * 4  # columns and offset of a low-rank multiplier and of a low-rank bias


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)
    torch._dynamo.reset()


def operands(dtype=torch.float32, requires_grad=True, **sizes):
    """query, key, value, multiplier [B,1,Lq,Lk], bias [1,H,1,Lk]"""
    n = {"B": B, "H": H, "Hkv": HKV, "Lq": LQ, "Lk": LK, "D": D, "Dv": DV} | sizes
    shapes = (
        (n["B"], n["H"], n["Lq"], n["D"]),
        (n["B"], n["Hkv"], n["Lk"], n["D"]),
        (n["B"], n["Hkv"], n["Lk"], n["Dv"]),
        (n["B"], 1, n["Lq"], n["Lk"]),
        (1, n["H"], 1, n["Lk"]),
    )
    return [torch.randn(shape, dtype=dtype).requires_grad_(requires_grad) for shape in shapes]


def attend(query, key, value, multiplier, bias, **keywords):
    return masked_attention(
        query,
        key,
        value,
        multiplier=multiplier,
        bias=bias,
        enable_gqa=True,
        return_lse=True,
        **keywords,
    )


def leaves(tensors):
    return [t.detach().clone().requires_grad_() for t in tensors]


def loss(out, lse):
    return out.float().sin().sum() + lse.cos().sum()


def segments(batch=B):
    return Segments(torch.randint(0, 2, (batch, LQ)), torch.randint(0, 2, (1, LK)))


def gradients(function, tensors, seed=0):
    tensors = leaves(tensors)
    torch.manual_seed(seed)
    out, lse = function(*tensors)
    loss(out, lse).backward()
    return [out.detach(), lse.detach(), *(t.grad for t in tensors)]


# ---- the reference


@on_reference
@pytest.mark.parametrize("gate", [False, True])
@pytest.mark.parametrize("dropout_p", [0.0, 0.4])
def test_written_out_backward_equals_autograd(gate, dropout_p):
    query, key, value, multiplier, bias = operands(torch.float64)
    with torch.no_grad():
        if gate:
            bias.abs_()
            bias[0, 0, 0, 2] = 0
        else:
            bias[0, 1, 0, 3] = -torch.inf
    pattern = [None, BlockDiagonal(3), segments() & Toeplitz(4), Causal()]
    hidden = {
        "attn_mask": torch.rand(1, H, LQ, LK) > 0.2,
        "key_mask": torch.arange(LK).expand(B, LK) < 5,
    }
    hidden["attn_mask"][0, 0, 1] = False  # a row that sees nothing
    state = torch.tensor([123456789012345678, 77])
    out, lse = reference(
        query, key, value, multiplier=multiplier, bias=bias, pattern=pattern, **hidden,
        dropout_p=dropout_p, rng_state=state, enable_gqa=True, gate=gate, return_lse=True,
    )  # fmt: skip
    grad_out, grad_lse = torch.randn_like(out), torch.randn_like(lse)
    wanted = (query, key, value, multiplier, bias)
    seen = lse > -torch.inf
    scalar = (out * grad_out).sum() + (lse[seen] * grad_lse[seen]).sum()
    expected = torch.autograd.grad(scalar, wanted)

    flat, ids = encode(pattern, H)
    plain = [t.detach() for t in wanted]
    settings = (flat, D**-0.5, dropout_p, gate)
    rest = (*NO_FACTORS, *hidden.values(), ids, state)
    same_out, same_lse = masked_attention_fwd(*plain, *rest, *settings)
    assert torch.equal(same_out, out)
    assert torch.equal(same_lse, lse)
    found = masked_attention_bwd(
        grad_out, grad_lse, *plain, *rest, out.detach(), lse.detach(), *settings,
        [True] * 5 + [False] * 4,
    )  # fmt: skip
    assert all(empty.numel() == 0 for empty in found[5:])
    for a, b in zip(found[:5], expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)
    assert (out[:, 0, 1] == 0).all()
    assert (lse[:, 0, 1] == -torch.inf).all()


@on_reference
def test_reference_has_double_backward():
    def call(*tensors):
        return attend(*tensors, pattern=Toeplitz(4) & Causal(), backend="reference")

    assert torch.autograd.gradgradcheck(call, operands(torch.float64, Lq=3, Lk=4, Dv=2))


@on_reference
def test_reference_ignores_hidden_mask_values_and_gives_them_no_gradient():
    query, key, value, multiplier, _ = operands(torch.float64)
    visible = Causal().dense(LQ, LK)
    clean = reference(query, key, value, multiplier=multiplier, pattern=Causal(), enable_gqa=True)
    poisoned = torch.where(visible, multiplier.detach(), torch.nan).requires_grad_()
    out = reference(query, key, value, multiplier=poisoned, pattern=Causal(), enable_gqa=True)
    assert torch.equal(out, clean)
    out.sum().backward()
    assert (poisoned.grad.masked_select(~visible) == 0).all()
    assert query.grad.isfinite().all()


@on_reference
def test_reference_gate_at_zero_has_the_finite_gradient():
    query, key, value, mask, _ = operands(torch.float64)
    mask = mask.detach().abs()
    mask[..., 2] = 0
    mask.requires_grad_()
    call = {"fusion": "gate", "enable_gqa": True, "backend": "reference"}
    out = lam_attention(query, key, value, mask, **call)
    (grad,) = torch.autograd.grad(out.sin().sum(), mask)
    step = torch.zeros_like(mask)
    step[0, 0, 1, 2] = 1e-6
    ahead = lam_attention(query, key, value, mask.detach() + step, **call).sin().sum()
    slope = (ahead - out.sin().sum()) / 1e-6
    assert grad[0, 0, 1, 2].item() == pytest.approx(slope.item(), rel=1e-4)
    log_form = lam_attention(query, key, value, mask.log(), **call | {"fusion": "add"})
    torch.testing.assert_close(out, log_form)


@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [  # known answers of Random123, file kat_vectors
        ((0,) * 4, (0,) * 2, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((2**32 - 1,) * 4, (2**32 - 1,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_philox_known_answers(counter, key, words):
    drawn = philox4x32(tuple(map(torch.tensor, counter)), tuple(map(torch.tensor, key)))
    assert tuple(word.item() for word in drawn) == words


# ---- registration


@pytest.mark.parametrize(
    "backend", [pytest.param("cpu", marks=on_cpu), pytest.param("reference", marks=on_reference)]
)
def test_opcheck(backend):
    query, key, value, multiplier, bias = operands(requires_grad=False)
    flat, ids = encode(segments() & Causal(), H)
    key_mask = torch.arange(LK).expand(B, LK) < 6
    attn_mask = torch.rand(1, 1, LQ, LK) > 0.1
    hidden = (attn_mask, key_mask, list(ids), torch.tensor([1, 2]))
    nothing = (None, None, [], None)
    transposed = query.transpose(1, 2).contiguous().transpose(1, 2)
    forward = torch.ops.lam_kernels.masked_attention_fwd.default
    backward = torch.ops.lam_kernels.masked_attention_bwd.default
    full = (query, key, value, multiplier, bias, *NO_FACTORS, *hidden)
    bare = (transposed, key, value, None, None, *NO_FACTORS, *nothing)
    rows, columns, offset = (
        torch.randn(shape) for shape in ((B, 1, LQ, 2), (1, 1, LK, 2), (1, H, 1, LK))
    )
    factored = (query, key, value, rows, rows, columns, None, columns, offset, *hidden)
    no_more = [False] * 4
    for tensors, settings, needs in (
        (full, (flat, 0.5, 0.2, False), [True] * 5 + no_more),
        (full, (flat, 0.5, 0.0, False), [True, False, False, True, False, *no_more]),
        (bare, ([], 0.5, 0.0, False), [False, True, True, False, False, *no_more]),
        (factored, (flat, 0.5, 0.2, False), [True] * 6 + [False, True, True]),
        (factored, (flat, 0.5, 0.0, False), [False] * 5 + [True, False, False, True]),
    ):
        torch.library.opcheck(forward, (*tensors, *settings, backend))
        out, lse = forward(*tensors, *settings, backend)
        for grad_lse in (None, torch.ones_like(lse)):
            arguments = (out, grad_lse, *tensors, out, lse, *settings, needs, backend)
            torch.library.opcheck(backward, arguments)


@on_cpu
def test_every_call_under_a_dispatch_mode_is_the_public_op():
    class Record(TorchDispatchMode):
        def __init__(self):
            super().__init__()
            self.seen = []

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            self.seen.append(str(function))
            return function(*args, **(kwargs or {}))

    with Record() as mode:
        attend(*operands())[0].sum().backward()
    assert mode.seen.count("lam_kernels.masked_attention_fwd.default") == 1
    assert mode.seen.count("lam_kernels.masked_attention_bwd.default") == 1


# ---- torch.compile and torch.export

KEYWORDS = {
    "plain": dict,
    "pattern": lambda: {"pattern": Toeplitz(2) & Causal()},
    "segments": lambda: {"pattern": segments()},
    "pattern a head": lambda: {"pattern": [None, Causal(), segments() & Toeplitz(3), None]},
    "hidden keys": lambda: {
        "key_mask": torch.rand(B, LK) > 0.3,
        "attn_mask": torch.rand(LQ, LK) > 0.2,
    },
    "dropout": lambda: {"dropout_p": 0.5},
    "scale": lambda: {"scale": 0.3},
}


@on_cpu
@pytest.mark.parametrize("case", KEYWORDS)
def test_compiles_into_one_graph_forward_and_backward(case):
    keywords = KEYWORDS[case]()
    tensors = operands()

    def call(*t):
        return attend(*t, **keywords)

    eager = gradients(call, tensors)
    compiled = gradients(torch.compile(call, fullgraph=True, backend="aot_eager"), tensors)
    for a, b in zip(eager, compiled, strict=True):
        assert torch.equal(a, b) or a.isinf().any()


@on_cpu
def test_compiles_with_inductor():
    def call(*t):
        return attend(*(x * 2 for x in t), pattern=Causal())

    tensors = operands()
    compiled = torch.compile(call, fullgraph=True, dynamic=True)
    for a, b in zip(gradients(call, tensors), gradients(compiled, tensors), strict=True):
        torch.testing.assert_close(a, b)


@on_cpu
def test_dynamic_lengths_do_not_recompile():
    counter = CompileCounterWithBackend("aot_eager")

    def call(*t):
        return attend(*t, pattern=Toeplitz(3))

    compiled = torch.compile(call, fullgraph=True, dynamic=True, backend=counter)
    counts = []  # below, no two sizes are alike: equal ones would be tied together
    for batch, Lq in ((5, 8), (7, 14), (11, 21)):
        tensors = operands(B=batch, Lq=Lq, Lk=Lq + 1)
        for a, b in zip(gradients(call, tensors), gradients(compiled, tensors), strict=True):
            assert torch.equal(a, b)
        counts.append(counter.frame_count)
    assert len(set(counts)) == 1


@on_cpu
def test_compiles_without_gradients_and_with_patterns_built_inside():
    def call(query_ids, key_ids, *t):
        return attend(*t, pattern=Segments(query_ids, key_ids) & Causal())

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    arguments = (torch.randint(0, 2, (B, LQ)), torch.randint(0, 2, (B, LK)), *operands())
    with torch.no_grad():
        assert torch.equal(compiled(*arguments)[0], call(*arguments)[0])
    assert torch.equal(compiled(*arguments)[0], call(*arguments)[0])


@on_cpu
def test_reference_compiles():
    def call(*t):
        return attend(*t, pattern=Causal(), dropout_p=0.2, backend="reference")

    compiled = torch.compile(call, fullgraph=True, dynamic=True, backend="aot_eager")
    tensors = operands()
    for a, b in zip(gradients(call, tensors), gradients(compiled, tensors), strict=True):
        torch.testing.assert_close(a, b)


@on_cpu
@pytest.mark.parametrize("strict", [True, False])
def test_export_gives_one_op_node(strict):
    class Layer(torch.nn.Module):
        def forward(self, *t):
            return attend(*t, pattern=Causal())[0]

    tensors = tuple(operands(requires_grad=False))
    program = torch.export.export(Layer(), tensors, strict=strict)
    targets = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    assert targets.count("lam_kernels.masked_attention_fwd.default") == 1
    assert all("masked_attention_fwd" in t or "getitem" in t for t in targets)
    assert torch.equal(program.module()(*tensors), Layer()(*tensors))


# ---- autocast


@on_cpu
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("backend", [None, "reference"])
def test_autocast_casts_query_key_value_and_no_mask(backend, compiled):
    def call(*t):
        return attend(*t, backend=backend)

    tensors = operands()
    with torch.no_grad():
        tensors[3].fill_(1.001)  # not a bfloat16 number
    run = torch.compile(call, fullgraph=True, backend="aot_eager") if compiled else call
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out, lse = run(*tensors)
    loss(out, lse).backward()
    assert out.dtype == torch.bfloat16
    assert lse.dtype == torch.float32
    assert all(t.grad.dtype == torch.float32 for t in tensors)
    halves = [t.detach().bfloat16() for t in tensors[:3]]
    same = call(*halves, *(t.detach() for t in tensors[3:]))
    assert torch.equal(out, same[0])
    assert torch.equal(lse, same[1])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert call(*operands(torch.float64))[0].dtype == torch.float64


# ---- torch.func


@on_cpu
def test_func_grad():
    def scalar(*t):
        return loss(*attend(*t, pattern=Toeplitz(3)))

    tensors = operands(torch.float64)
    expected = torch.autograd.grad(scalar(*tensors), tensors)
    found = torch.func.grad(scalar, argnums=tuple(range(5)))(*(t.detach() for t in tensors))
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)


MAPPED = [  # the mapped axis of query, key, value, multiplier, bias
    (0, 0, 0, 0, 0),
    (0, None, None, None, None),
    (None, 0, 0, None, 0),
    (None, None, None, 0, None),
    (None, None, None, None, 0),
    (1, 0, 2, 3, 4),
]


@on_cpu
@pytest.mark.parametrize("batch", [1, B])
@pytest.mark.parametrize("axes", MAPPED, ids=str)
def test_vmap_of_value_and_gradient(axes, batch):
    N = 3
    pattern = [None, Causal(), segments(batch), segments(1)]
    tensors = [
        torch.stack([t + n for n in range(N)], axis) if axis is not None else t
        for t, axis in zip(operands(torch.float64, False, B=batch), axes, strict=True)
    ]

    def call(*t):
        out, lse = attend(*t, pattern=pattern, key_mask=torch.ones(batch, LK, dtype=torch.bool))
        return out, lse.clamp(min=-20)

    def picked(n, given):
        return [
            t if axis is None else t.select(axis, n) for t, axis in zip(given, axes, strict=True)
        ]

    gradient = torch.func.grad(lambda *t: loss(*call(*t)), argnums=tuple(range(5)))
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*performance drop.*")  # vmap's slow fallback
        out, lse = torch.vmap(call, in_dims=axes)(*tensors)
        grads = torch.vmap(gradient, in_dims=axes)(*tensors)
        shared = leaves(tensors)
        loss(*torch.vmap(call, in_dims=axes)(*shared)).backward()
    for n in range(N):
        expected = call(*picked(n, tensors))
        torch.testing.assert_close(out[n], expected[0])
        torch.testing.assert_close(lse[n], expected[1])
        for a, b in zip(grads, gradient(*picked(n, tensors)), strict=True):
            torch.testing.assert_close(a[n], b)
    expected = leaves(tensors)
    outs, lses = zip(*(call(*picked(n, expected)) for n in range(N)), strict=True)
    loss(torch.stack(outs), torch.stack(lses)).backward()
    for a, b in zip(shared, expected, strict=True):
        torch.testing.assert_close(a.grad, b.grad)


@on_cpu
def test_vmap_over_hidden_pairs_and_segments():
    tensors = operands(requires_grad=False)
    ids, key_ids = torch.randint(0, 2, (3, 1, LQ)), torch.randint(0, 2, (1, LK))
    key_mask, attn_mask = torch.rand(3, B, LK) > 0.3, torch.rand(3, LQ, LK) > 0.3

    def call(ids, key_mask, attn_mask):
        pattern = Segments(ids, key_ids)
        return attend(*tensors, pattern=pattern, key_mask=key_mask, attn_mask=attn_mask)[0]

    out = torch.vmap(call)(ids, key_mask, attn_mask)
    for n in range(3):
        torch.testing.assert_close(out[n], call(ids[n], key_mask[n], attn_mask[n]))


@on_cpu
def test_vmap_of_dropout_follows_randomness():
    stacked = [torch.stack([t] * 2) for t in operands(requires_grad=False)]

    def call(*t):
        return attend(*t, dropout_p=0.5)[0]

    same = torch.vmap(call, randomness="same")(*stacked)
    assert torch.equal(same[0], same[1])
    different = torch.vmap(call, randomness="different")(*stacked)
    assert not torch.equal(different[0], different[1])
    with pytest.raises(RuntimeError, match="randomness"):
        torch.vmap(call)(*stacked)


# ---- second derivatives: the kernels refuse, wherever the question comes from


def _twice_by_autograd(scalar, tensors):
    grads = torch.autograd.grad(scalar(*tensors), tensors, create_graph=True)
    sum(g.sum() for g in grads).backward()


def _twice_by_func(scalar, tensors):
    def inner(query):
        return torch.func.grad(scalar)(query, *tensors[1:]).sum()

    torch.func.grad(inner)(tensors[0])


def _twice_crosswise(scalar, tensors):
    def inner(multiplier):
        return torch.func.grad(scalar)(*tensors[:3], multiplier, tensors[4]).sum()

    torch.func.grad(inner)(tensors[3])


def _jacobian_of_jacobian(scalar, tensors):
    torch.func.jacrev(torch.func.jacrev(scalar))(*tensors)


@on_cpu
@pytest.mark.parametrize(
    "twice", [_twice_by_autograd, _twice_by_func, _twice_crosswise, _jacobian_of_jacobian]
)
def test_double_backward_is_refused(twice):
    def scalar(*t):
        return loss(*attend(*t))

    with pytest.raises(RuntimeError, match=r'no double backward.*backend="reference"'):
        twice(scalar, operands(torch.float64))


@on_cpu
def test_forward_mode_is_refused():
    tensors = operands(torch.float64, requires_grad=False)
    with pytest.raises(NotImplementedError, match="jvp"):
        torch.func.jvp(lambda q: attend(q, *tensors[1:])[0], (tensors[0],), (tensors[0],))


# ---- what is computed, and for whom


@pytest.fixture
def calls(monkeypatch):
    """The arguments of each kernel call."""
    kernels, seen = page.KERNELS.kernels("cpu"), {"forward": [], "backward": []}

    def forward(*arguments):
        seen["forward"].append(arguments)
        return kernels.forward(*arguments)

    def backward(*arguments):
        seen["backward"].append(arguments)
        return kernels.backward(*arguments)

    monkeypatch.setitem(page.KERNELS._kernels, "cpu", _backends.Kernels(forward, backward))
    return seen


@on_cpu
@pytest.mark.parametrize("wanted", [(0,), (1, 2), (3,), (4,), (0, 3)])
def test_no_work_for_a_gradient_nobody_wants(calls, wanted):
    tensors = operands(requires_grad=False)
    for at in wanted:
        tensors[at].requires_grad_()
    out, lse = attend(*tensors)
    loss(out, lse).backward()
    (arguments,) = calls["backward"]
    assert list(arguments[-1]) == [at in wanted for at in range(9)]
    assert [t.grad is not None for t in tensors] == [at in wanted for at in range(5)]


@on_cpu
def test_unused_results_cost_nothing(calls):
    tensors = operands()
    attend(*tensors)[0].sum().backward()
    assert calls["backward"][0][1] is None  # lse unused: no gradient of it, not one of zeros
    attend(*tensors)
    assert len(calls["backward"]) == 1


@on_cpu
def test_lse_alone_is_differentiable():
    tensors = operands(torch.float64)
    found = torch.autograd.grad(attend(*tensors)[1].sin().sum(), tensors)
    by_reference = attend(*tensors, backend="reference")[1].sin().sum()
    expected = torch.autograd.grad(by_reference, tensors, allow_unused=True)
    assert (found[2] == 0).all()
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, torch.zeros_like(a) if b is None else b)


@on_cpu
def test_two_axes_are_one_and_one_and_two_axes():
    query, key, value, _, _ = operands()
    flat = torch.randn(LQ, LK, dtype=torch.bfloat16, requires_grad=True)
    out = masked_attention(query, key, value, multiplier=flat, enable_gqa=True)
    out.sum().backward()
    same = masked_attention(query, key, value, multiplier=flat[None, None], enable_gqa=True)
    assert torch.equal(out, same)
    assert flat.grad.shape == (LQ, LK)
    assert flat.grad.dtype == torch.bfloat16


@on_cpu
def test_results_are_new_and_contiguous_for_any_strides():
    tensors = operands(requires_grad=False)
    strided = [t.transpose(-1, -2).contiguous().transpose(-1, -2) for t in tensors]
    for t in strided:
        t.requires_grad_()
    out, lse = attend(*strided)
    grad_out = torch.ones(1, 1, 1, 1).expand_as(out)  # every stride 0, as sum().backward() gives
    grads = torch.autograd.grad((out, lse), strided, (grad_out, torch.ones_like(lse)))
    for result in (out, lse, *grads):
        assert result.is_contiguous()
    torch.testing.assert_close(out, attend(*tensors)[0])


@on_cpu
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients(mode):
    tensors = operands()
    with mode():
        out, _ = attend(*tensors)
    assert not out.requires_grad
    assert torch.equal(out, attend(*tensors)[0])


@on_cpu
def test_seed_governs_dropout_and_backward_draws_the_same():
    tensors = operands(torch.float64)

    def call(*t):
        return attend(*t, dropout_p=0.4)

    def by_reference(*t):
        return attend(*t, dropout_p=0.4, backend="reference")

    first = gradients(call, tensors, seed=3)
    for a, b, c in zip(
        first,
        gradients(call, tensors, seed=3),
        gradients(by_reference, tensors, seed=3),
        strict=True,
    ):
        assert torch.equal(a, b)
        torch.testing.assert_close(a, c)
    assert not torch.equal(first[0], gradients(call, tensors, seed=4)[0])


# ---- checkpointing, FLOPs


@on_cpu
@pytest.mark.parametrize("use_reentrant", [True, False])
def test_activation_checkpointing(use_reentrant):
    def call(*t):
        return attend(*t, dropout_p=0.4)

    def checkpointed(*t):
        return checkpoint(call, *t, use_reentrant=use_reentrant)

    tensors = operands()
    for a, b in zip(gradients(call, tensors), gradients(checkpointed, tensors), strict=True):
        assert torch.equal(a, b)


@on_cpu
def test_selective_checkpointing_can_save_the_op(calls):
    def policy(_, op, *args, **kwargs):
        saved = op is torch.ops.lam_kernels.masked_attention_fwd.default
        return CheckpointPolicy.MUST_SAVE if saved else CheckpointPolicy.PREFER_RECOMPUTE

    def call(*t):
        return checkpoint(
            attend, *t, use_reentrant=False,
            context_fn=lambda: create_selective_checkpoint_contexts(policy),
        )  # fmt: skip

    tensors = operands()
    found = gradients(call, tensors)
    assert len(calls["forward"]) == 1
    for a, b in zip(found, gradients(attend, tensors), strict=True):
        assert torch.equal(a, b)


@on_cpu
@pytest.mark.parametrize(
    ("pattern", "pairs"),
    [
        (None, H * LQ * LK),
        (Causal(), H * (3 + 4 + 5 + 6 + 7)),
        ([None, Causal(), Toeplitz(0), None], 2 * LQ * LK + 25 + LQ),
        ("segments", H * LQ * LK),  # which pairs they keep is data
    ],
)
def test_flops_count_the_pairs_of_the_pattern(pattern, pairs):
    pattern = segments() if pattern == "segments" else pattern
    with FlopCounterMode(display=False) as counter:
        attend(*operands(), pattern=pattern)[0].sum().backward()
    counts = {str(op): n for op, n in counter.get_flop_counts()["Global"].items()}
    assert counts["lam_kernels.masked_attention_fwd"] == 2 * B * pairs * (D + DV)
    assert counts["lam_kernels.masked_attention_bwd"] == 2 * B * pairs * (3 * D + 2 * DV)


# ---- threads and processes


@on_cpu
def test_calls_from_several_threads():
    problems = [operands(Lq=LQ + n, Lk=LK + 3 * n) for n in range(4)]
    expected = [gradients(attend, tensors) for tensors in problems]
    wrong = []

    def work(n):
        for _ in range(20):
            tensors = leaves(problems[n])
            out, lse = attend(*tensors)
            grads = torch.autograd.grad(loss(out, lse), tensors)
            for a, b in zip((out, lse, *grads), expected[n], strict=True):
                if not torch.equal(a, b):
                    wrong.append(n)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


FORK = """
import torch
from torch.utils.data import DataLoader, Dataset
import lam_kernels

class Attended(Dataset):
    def __len__(self):
        return 4

    def __getitem__(self, n):
        x = torch.full((1, 2, 70, 8), float(n), requires_grad=True)
        out = lam_kernels.masked_attention(x, x, x, multiplier=torch.ones(70, 70))
        out.sum().backward()
        return out.detach(), x.grad

torch.set_num_threads(2)
here = [Attended()[n] for n in range(4)]  # the parent's threads exist before the fork
loader = DataLoader(Attended(), batch_size=None, num_workers=2, multiprocessing_context="fork")
for n, (out, grad) in enumerate(loader):
    torch.testing.assert_close(out, here[n][0])
    torch.testing.assert_close(grad, here[n][1])
print("done")
"""


@on_cpu
def test_forked_data_loader_workers():
    done = subprocess.run(
        [sys.executable, "-c", FORK], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.stdout.strip() == "done", done.stderr


# ---- refusals: ValueError or TypeError, naming the argument, what came and what was expected

REFUSED = {
    "query is a list": ({"query": [1.0]}, TypeError, "query must be a Tensor, got list"),
    "key is missing": ({"key": None}, TypeError, "key must be a Tensor, got NoneType"),
    "3-D query": ({"query": torch.ones(2, 5, 3)}, ValueError, r"query must be .*\(2, 5, 3\)"),
    "integers": (
        dict.fromkeys(("query", "key", "value"), torch.ones(2, 4, 5, 3).int()),
        TypeError,
        "query must be float32.*got torch.int32",
    ),
    "mixed dtypes": (
        {"key": torch.ones(2, 2, 7, 3).half()},
        TypeError,
        "share one dtype, got torch.float32, torch.float16",
    ),
    "other device": (
        {"value": torch.ones(2, 2, 7, 6, device="meta")},
        ValueError,
        "on one device, got cpu, cpu, meta",
    ),
    "other batch": ({"key": torch.ones(3, 2, 7, 3)}, ValueError, r"key must be \[2, Hkv, Lk, 3\]"),
    "other head dim": ({"key": torch.ones(2, 2, 7, 4)}, ValueError, r"got \(2, 2, 7, 4\)"),
    "other length": (
        {"value": torch.ones(2, 2, 8, 6)},
        ValueError,
        r"value must be \[2, 2, 7, Dv\]",
    ),
    "wide value": (
        {"value": torch.ones(2, 2, 7, 257)},
        ValueError,
        "value: head dim must be 1 to 256",
    ),
    "no value dim": (
        {"value": torch.ones(2, 2, 7, 0)},
        ValueError,
        "head dim must be 1 to 256, got 0",
    ),
    "wide query": (
        {"query": torch.ones(2, 4, 5, 257), "key": torch.ones(2, 2, 7, 257)},
        ValueError,
        "query: head dim must be 1 to 256, got 257",
    ),
    "gqa unasked": ({"enable_gqa": False}, ValueError, "pass enable_gqa=True"),
    "gqa uneven": (
        {"key": torch.ones(2, 3, 7, 3), "value": torch.ones(2, 3, 7, 6)},
        ValueError,
        r"heads \(3\) must divide query heads \(4\)",
    ),
    "3-D multiplier": (
        {"multiplier": torch.ones(2, 5, 7)},
        ValueError,
        "multiplier must have 4 axes.*cannot be told apart",
    ),
    "1-D bias": ({"bias": torch.ones(7)}, ValueError, "bias must have 4 axes.*got 1"),
    "wrong multiplier": (
        {"multiplier": torch.ones(2, 4, 7, 5)},
        ValueError,
        r"multiplier has shape \(2, 4, 7, 5\).*\[2, 4, 5, 7\]",
    ),
    "wrong 2-D": ({"multiplier": torch.ones(7, 5)}, ValueError, "each axis must be 1 or"),
    "boolean bias": ({"bias": torch.ones(5, 7).bool()}, TypeError, "bias must be.*attn_mask"),
    "integer multiplier": (
        {"multiplier": torch.ones(5, 7).long()},
        TypeError,
        "multiplier must be float32.*got torch.int64",
    ),
    "float8 bias": (
        {"bias": torch.ones(5, 7).to(torch.float8_e4m3fn)},
        TypeError,
        "bias must be float32",
    ),
    "double mask": (
        {"multiplier": torch.ones(5, 7).double()},
        TypeError,
        "multiplier may be float64 only when query is",
    ),
    "mask elsewhere": (
        {"bias": torch.ones(5, 7, device="meta")},
        ValueError,
        "bias must be on query's device cpu, got meta",
    ),
    "mask object": (
        {"multiplier": object()},
        TypeError,
        "multiplier must be a Tensor or a LowRankMask, got object",
    ),
    "float attn_mask": (
        {"attn_mask": torch.ones(5, 7)},
        TypeError,
        "attn_mask must be bool.*is bias",
    ),
    "3-D attn_mask": (
        {"attn_mask": torch.ones(2, 5, 7).bool()},
        ValueError,
        "attn_mask must have 4 axes.*cannot be told apart",
    ),
    "integer key_mask": (
        {"key_mask": torch.ones(2, 7).long()},
        TypeError,
        "key_mask must be bool",
    ),
    "short key_mask": (
        {"key_mask": torch.ones(2, 6).bool()},
        ValueError,
        r"key_mask must be \[B, Lk\] = \[2, 7\], got shape \(2, 6\)",
    ),
    "one key_mask": (
        {"key_mask": torch.ones(1, 7).bool()},
        ValueError,
        r"key_mask must be \[B, Lk\]",
    ),
    "pattern name": ({"pattern": "causal"}, TypeError, "pattern must be a pattern.*got str"),
    "pattern tensor": ({"pattern": torch.ones(5, 7)}, TypeError, "pattern must be.*got Tensor"),
    "too few patterns": ({"pattern": [Causal()]}, ValueError, "1 entries.*4 heads"),
    "long segments": (
        {"pattern": Segments(torch.ones(2, 6).int(), torch.ones(2, 7).int())},
        ValueError,
        r"Segments.query_ids must be \[2 or 1, 5\], got \(2, 6\)",
    ),
    "segments of another batch": (
        {"pattern": Segments(torch.ones(1, 5).int(), torch.ones(3, 7).int())},
        ValueError,
        r"Segments.key_ids must be \[2 or 1, 7\]",
    ),
    "tensor scale": (
        {"scale": torch.tensor(0.5)},
        TypeError,
        r"scale must be a float.*multiplier \[1, H, 1, 1\]",
    ),
    "text scale": ({"scale": "0.5"}, TypeError, "scale must be a float or None, got str"),
    "infinite scale": ({"scale": float("inf")}, ValueError, "scale must be finite"),
    "certain dropout": ({"dropout_p": 1.0}, ValueError, "at least 0 and below 1, got 1.0"),
    "negative dropout": ({"dropout_p": -0.1}, ValueError, "dropout_p must be at least 0"),
    "nan dropout": ({"dropout_p": float("nan")}, ValueError, "dropout_p must be"),
    "tensor dropout": ({"dropout_p": torch.tensor(0.5)}, TypeError, "dropout_p must be a float"),
    "unknown backend": ({"backend": "fast"}, ValueError, "backend must be one of cpu, .*'fast'"),
    "absent backend": (
        {"backend": "cuda"},
        RuntimeError,
        'backend="cuda" cannot serve this call: ',
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refusals(case, monkeypatch):
    monkeypatch.setattr("lam_kernels.ops._cuda.unavailable", lambda: "not here")
    keywords, error, words = REFUSED[case]
    query, key, value, _, _ = operands(requires_grad=False)
    arguments = {"query": query, "key": key, "value": value}
    arguments |= {"enable_gqa": True, "backend": "reference"}
    with pytest.raises(error, match=words):
        masked_attention(**arguments | keywords)
    if error is not RuntimeError:
        with pytest.raises(error, match=words):
            lam_kernels.explain("masked_attention", **arguments | keywords)


def test_refusals_of_lam_attention():
    query, key, value, mask, _ = operands(requires_grad=False)
    with pytest.raises(ValueError, match='fusion must be "mul", "add" or "gate", got \'times\''):
        lam_attention(query, key, value, mask, fusion="times", enable_gqa=True)
    with pytest.raises(TypeError, match="mask must be a Tensor or a LowRankMask, got NoneType"):
        lam_attention(query, key, value, None, enable_gqa=True)
    for fusion in ("mul", "add", "gate"):
        with pytest.raises(ValueError, match="mask must have 4 axes"):
            lam_attention(query, key, value, mask[0], fusion=fusion, enable_gqa=True)


@on_cpu
@pytest.mark.parametrize("fusion", ["mul", "add", "gate"])
def test_lam_attention_is_masked_attention(fusion):
    query, key, value, mask, _ = operands(torch.float64)
    mask = mask.detach().abs()
    out = lam_attention(query, key, value, mask, fusion=fusion, enable_gqa=True)
    operand = {"mul": {"multiplier": mask}, "add": {"bias": mask}, "gate": {"bias": mask.log()}}
    same = masked_attention(query, key, value, **operand[fusion], enable_gqa=True)
    torch.testing.assert_close(out, same)


# ---- which backend


@on_cpu
def test_backends_and_explain():
    assert list(lam_kernels.backends()) == ["cpu", "cuda", "triton", "reference"]
    assert lam_kernels.backends()["cpu"] == lam_kernels.backends()["reference"] == ""
    query, key, value, mask, _ = operands()
    state = torch.get_rng_state()
    found = lam_kernels.explain(
        "lam_attention", query, key, value, mask, fusion="add", dropout_p=0.5, enable_gqa=True
    )
    assert torch.equal(state, torch.get_rng_state())
    assert (found.op, found.backend, found.notes) == ("lam_attention", "cpu", ())
    assert set(found.reasons) == set(lam_kernels.backends())
    assert all(why for name, why in found.reasons.items() if name != "cpu")
    assert "lam_attention: served by cpu" in str(found)
    assert "  not triton: " in str(found)
    assert "not reference: runs only when named" in str(found)
    bare = lam_kernels.explain("masked_attention", query, key, value, enable_gqa=True)
    assert "no mask at all" in str(bare)
    query, key, value, _, _ = operands(torch.float64)
    named = lam_kernels.explain(
        "masked_attention", query, key, value, enable_gqa=True, backend="cuda"
    )
    assert named.backend == ""
    assert "has no float64" in named.reasons["cuda"]
    assert "no backend serves this call" in str(named)
    with pytest.raises(ValueError, match=r"op must be one of .*lam_attention, .*masked_attention"):
        lam_kernels.explain("attention")


def test_without_the_library_the_call_says_so(monkeypatch):
    monkeypatch.setattr(_backends, "_cpu_unavailable", lambda: "not built: run make build")
    monkeypatch.setattr(_backends, "_settled", {})
    assert lam_kernels.backends()["cpu"] == "not built: run make build"
    query, key, value, _, _ = operands()
    with pytest.raises(RuntimeError, match='"cpu": not built: run make build'):
        masked_attention(query, key, value, enable_gqa=True)
    with pytest.raises(RuntimeError, match='backend="cpu" cannot serve this call: not built'):
        masked_attention(query, key, value, enable_gqa=True, backend="cpu")
    out = masked_attention(query, key, value, enable_gqa=True, backend="reference")
    assert out.shape == (B, H, LQ, DV)


def test_no_backend_for_another_device():
    query, key, value, _, _ = (t.to("meta") for t in operands())
    with pytest.raises(RuntimeError, match="no backend serves this call on device meta"):
        masked_attention(query, key, value, enable_gqa=True)


def test_importing_costs_torch_only():
    """Its FLOP counter included, which imports triton where that is installed."""
    code = (
        "import sys, torch, torch.utils.flop_counter; had = set(sys.modules); import lam_kernels; "
        "new = {n.split('.')[0] for n in set(sys.modules) - had}; "
        "print(sorted(new - set(sys.stdlib_module_names)), 'torch._dynamo' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() in ("['lam_kernels', 'torch'] False", "['lam_kernels'] False")
