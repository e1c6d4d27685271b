"""The conventions table of the README, row by row: each test is named after its row."""

from __future__ import annotations

import mmap
import os
import subprocess
import sys

import pytest
import torch
from backends import BY_NAME, TESTS
from problems import check, evaluate
from tolerance import assert_accurate, expected_of

import lam_kernels
from lam_kernels import Causal, Toeplitz, explain, lam_attention, masked_attention
from python_ref.inputs import Problem
from python_ref.masked_attention import masked_attention as reference

INF, NAN = float("inf"), float("nan")
MAP_NORESERVE = 0x4000  # Linux; Python 3.11 has no name for it


def qkv(B=2, H=2, Lq=5, Lk=7, D=8, dtype=torch.float32, Hkv=None):
    generator = torch.Generator().manual_seed(1)
    shapes = (B, H, Lq, D), (B, Hkv or H, Lk, D), (B, Hkv or H, Lk, D)
    return [torch.randn(s, generator=generator).to(dtype).requires_grad_() for s in shapes]


def same_result(problem: Problem, backend: str, **changes) -> None:
    """Operands changed in ways that must not matter give a result as accurate as before."""
    o = problem.operands()
    for name, change in changes.items():
        setattr(o, name, change(getattr(o, name)))
    o._require()
    assert_accurate(evaluate(problem, backend, o), problem)


def test_order(backend):
    """scale, multiplier, bias, hide, softmax, dropout, value: every step present at once."""
    everything = {
        "multiplier": "b1qk",
        "bias": "1hqk",
        "pattern": "Causal()",
        "attn_mask": "11qk",
        "key_mask": True,
    }
    check(Problem(Lq=33, **everything, scale=0.4, dropout_p=0.2, lse_grad=True), backend)


def test_boolean_masks_true_is_seen(backend):
    q, k, v = qkv()
    v = v.bfloat16().float()  # products of three tf32 parts give these back exactly
    seen = torch.zeros(2, 7, dtype=torch.bool)
    seen[:, 3] = True
    wanted = v[:, :, 3:4].expand(2, 2, 5, 8)
    assert torch.equal(masked_attention(q, k, v, key_mask=seen, backend=backend), wanted)
    assert torch.equal(
        masked_attention(q, k, v, attn_mask=seen[:, None, None], backend=backend), wanted
    )
    assert torch.equal(
        masked_attention(q[:, :, :1], k, v, pattern=Toeplitz(0), backend=backend), v[:, :, :1]
    )


HIDING = {
    "key_mask": {"key_mask": torch.zeros(2, 7, dtype=torch.bool)},
    "attn_mask": {"attn_mask": torch.zeros(5, 7, dtype=torch.bool)},
    "bias": {"bias": torch.full((1, 1, 1, 1), -INF)},
    "pattern": {
        "pattern": Toeplitz(0)
        & lam_kernels.Segments(torch.zeros(1, 5).long(), torch.ones(1, 7).long())
    },
    "gate": {"mask": torch.zeros(2, 1, 5, 7), "fusion": "gate"},
}


@pytest.mark.parametrize("by", HIDING)
@pytest.mark.parametrize("dropout_p", [0.0, 0.5])
def test_row_that_sees_no_key(by, dropout_p, backend, dtype):
    q, k, v = qkv(dtype=getattr(torch, dtype))
    given = dict(HIDING[by])
    multiplier = torch.ones(2, 2, 5, 7, requires_grad=True)
    leaves = [q, k, v]
    op = masked_attention
    if by == "gate":
        op = lam_attention
        given["mask"] = given["mask"].clone().requires_grad_()
        leaves.append(given["mask"])
    else:
        given["multiplier"] = multiplier
        leaves.append(multiplier)
        if by == "bias":
            given["bias"] = given["bias"].clone().requires_grad_()
            leaves.append(given["bias"])
    out, lse = op(q, k, v, **given, dropout_p=dropout_p, return_lse=True, backend=backend)
    assert torch.equal(out, torch.zeros_like(out))
    assert torch.equal(lse, torch.full_like(lse, -INF))
    gradients = torch.autograd.grad(
        [out, lse], leaves, [torch.ones_like(out), torch.ones_like(lse)], allow_unused=True
    )
    for gradient in gradients:
        assert gradient is None or torch.equal(gradient, torch.zeros_like(gradient))


def test_bias_of_minus_infinity(backend, dtype):
    """Hides exactly like attn_mask: the same numbers, gradient 0 at the hidden pairs."""
    p = Problem(Lq=33, multiplier="b1qk", bias="b1qk", fill="neg_inf", dtype=dtype, lse_grad=True)
    o = p.operands()
    one = evaluate(p, backend)
    assert one["bias"][o.bias.isinf()].eq(0).all()
    assert one["multiplier"][o.bias.isinf()].eq(0).all()
    hidden = o.bias.isinf()
    masked = p.operands()
    masked.attn_mask = ~hidden
    masked.bias = masked.bias.detach().masked_fill(hidden, 0.0).requires_grad_()
    assert_accurate(evaluate(p, backend, masked), p)


@pytest.mark.parametrize("value", [INF, NAN])
@pytest.mark.parametrize("name", ["multiplier", "bias"])
def test_nan_and_plus_infinity_at_a_visible_pair_propagate(name, value, backend):
    q, k, v = qkv()
    mask = torch.ones(2, 1, 5, 7)
    mask[0, 0, 2, 3] = value
    out, lse = masked_attention(q, k, v, **{name: mask}, return_lse=True, backend=backend)
    row = out[0, :, 2]
    if name == "bias" or value != value:
        assert not row.isfinite().any()
        assert not lse[0, :, 2].isfinite().any()
    others = torch.ones(2, 5, dtype=torch.bool)
    others[0, 2] = False
    assert out.transpose(1, 2)[others].isfinite().all()


@pytest.mark.parametrize("hide", ["pattern", "attn_mask", "key_mask", "bias"])
def test_hidden_pair_is_never_used(hide, backend, dtype):
    """NaN and both infinities at hidden pairs change no bit and have a gradient of exactly 0."""
    hiding = {
        "pattern": {"pattern": "Toeplitz(7)"},
        "attn_mask": {"attn_mask": "b1qk"},
        "key_mask": {"key_mask": True},
        "bias": {},
    }[hide]
    fill = "neg_inf" if hide == "bias" else ""
    p = Problem(Lq=66, multiplier="b1qk", bias="b1qk", dtype=dtype, fill=fill, **hiding)
    poisoned = p.but(fill=f"nan,{fill}")
    clean, dirty = evaluate(p, backend), evaluate(poisoned, backend)
    for name in clean:
        assert torch.equal(clean[name], dirty[name]), name
    check(poisoned, backend)


def test_values_of_hidden_keys_do_not_reach_anyone(backend, dtype):
    check(
        Problem(
            Lq=65, multiplier="b1qk", key_mask=True, pattern="Toeplitz(9)", fill="loud", dtype=dtype
        ),
        backend,
    )


def test_multiplier_of_zero_does_not_hide(backend):
    q, k, v = qkv()
    out, lse = masked_attention(
        q, k, v, multiplier=torch.zeros(1, 1, 1, 1), return_lse=True, backend=backend
    )
    p = Problem(Lq=33, multiplier="1111", scale=0.0)
    check(p, backend)
    assert torch.equal(lse, torch.full_like(lse, lse[0, 0, 0].item()))
    assert out.unique(dim=2).shape[2] == 1


def test_gate(backend, dtype):
    """bias = log M: the same as log M given as a bias; M = 0 hides, its gradient is finite."""
    p = Problem(Lq=33, bias="b1qk", gate=True, lse_grad=True, dtype=dtype)
    o = p.operands()
    result = evaluate(p, backend)
    assert (o.bias == 0).any()
    assert result["bias"].isfinite().all()
    assert result["bias"][o.bias == 0].ne(0).any()
    assert_accurate(result, p)
    if dtype == "float64":
        logarithm = p.but(gate=False)
        other = logarithm.operands()
        other.bias = o.bias.detach().log().requires_grad_()
        del result["bias"]
        as_bias = evaluate(logarithm, backend, other)
        del as_bias["bias"]
        assert_accurate(as_bias | {"bias": evaluate(p, backend)["bias"]}, p)


def test_lse(backend, dtype):
    """Natural log, fp32 (fp64 for fp64), and a gradient of its own."""
    q, k, v = qkv(dtype=getattr(torch, dtype))
    _out, lse = masked_attention(q, k, v, return_lse=True, backend=backend)
    assert lse.dtype == (torch.float64 if dtype == "float64" else torch.float32)
    assert lse.shape == (2, 2, 5)
    assert lse.is_contiguous()
    check(Problem(Lq=50, multiplier="b1qk", lse_grad=True, dtype=dtype), backend)
    gradient = torch.autograd.grad(lse.sum(), [q, k])
    assert all(g.ne(0).any() for g in gradient)


def test_lse_below_the_range_of_exp(backend):
    """Rows whose lse is far below log of the smallest float32, or above log of the largest."""
    q, k, v = qkv()
    for bias in (-200.0, 200.0):
        shift = torch.full((1, 1, 1, 1), bias)
        out, lse = masked_attention(q, k, v, bias=shift, return_lse=True, backend=backend)
        assert out.isfinite().all()
        assert torch.equal(lse.sign(), torch.full_like(lse, bias).sign())
    check(Problem(Lq=65, multiplier="b1qk", bias="11qk", spread=100.0, lse_grad=True), backend)


@pytest.mark.parametrize("operand", ["float32", "bfloat16", "float16", "float64"])
def test_dtypes(operand, backend, dtype):
    """Masks have a dtype of their own, that of their gradient; fp64 only with an fp64 query."""
    p = Problem(
        Lq=33,
        multiplier="b1qk",
        bias="1hqk",
        multiplier_dtype=operand,
        bias_dtype=operand,
        dtype=dtype,
    )
    if operand == "float64" and dtype != "float64":
        with pytest.raises(TypeError, match="multiplier"):
            evaluate(p, backend)
        return
    result = evaluate(p, backend)
    for name in ("query", "key", "value", "out"):
        assert result[name].dtype == getattr(torch, dtype)
    for name in ("multiplier", "bias"):
        assert result[name].dtype == getattr(torch, operand)
    assert_accurate(result, p)


def test_dtypes_must_agree(backend):
    q, k, v = qkv()
    for wrong in (
        (q.half(), k, v),
        (q, k.half(), v),
        (q, k, v.half()),
        (q.int(), k.int(), v.int()),
    ):
        with pytest.raises(TypeError, match="query"):
            masked_attention(*wrong, backend=backend)


def test_autocast(backend):
    q, k, v = qkv()
    mask = torch.ones(2, 1, 5, 7, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        out = masked_attention(q, k, v, multiplier=mask, backend=backend)
    assert out.dtype == torch.bfloat16
    gradients = torch.autograd.grad(out.float().sum(), [q, mask])
    assert [g.dtype for g in gradients] == [torch.float32, torch.float32]
    third = torch.full_like(mask, 1 / 3)
    with torch.autocast("cpu", torch.bfloat16):
        out = masked_attention(q, k, v, multiplier=third, backend=backend)
    q, k, v = (x.bfloat16() for x in (q, k, v))
    assert torch.equal(out, masked_attention(q, k, v, multiplier=third, backend=backend))


@pytest.mark.parametrize("name", ["multiplier", "bias", "attn_mask"])
def test_operand_rank(name, backend):
    q, k, v = qkv()
    whole = torch.ones(2, 2, 5, 7)
    if name == "attn_mask":
        whole = whole.bool()
    masked_attention(q, k, v, **{name: whole[0, 0]}, backend=backend)
    for wrong in (whole[0], whole[0, 0, 0], whole[None], whole[..., :3], whole[:, :, :2]):
        with pytest.raises(ValueError, match=name):
            masked_attention(q, k, v, **{name: wrong}, backend=backend)


def test_scale(backend):
    q, k, v = qkv()
    default = masked_attention(q, k, v, backend=backend)
    assert torch.equal(default, masked_attention(q, k, v, scale=8**-0.5, backend=backend))
    for wrong in (torch.tensor(0.3), "0.3", None.__class__):
        with pytest.raises(TypeError, match="scale"):
            masked_attention(q, k, v, scale=wrong, backend=backend)
    check(Problem(H=4, Lq=33, multiplier="1h11"), backend)


def test_heads(backend):
    q, k, v = qkv(H=4, Hkv=2)
    with pytest.raises(ValueError, match="enable_gqa"):
        masked_attention(q, k, v, backend=backend)
    out = masked_attention(q, k, v, enable_gqa=True, backend=backend)
    repeated = [x.repeat_interleave(2, 1) for x in (k, v)]
    assert torch.equal(out, masked_attention(q, *repeated, backend=backend))
    with pytest.raises(ValueError, match="heads"):
        masked_attention(q, *qkv(H=3)[1:], enable_gqa=True, backend=backend)


def test_batch_mates(backend, dtype):
    """A sample alone is as accurate as in its batch, whoever its mates are."""
    p = Problem(B=3, Lq=65, multiplier="b1qk", bias="1hqk", dtype=dtype, grads="qkvm")
    whole = evaluate(p, backend)
    o = p.operands()
    for name in ("query", "key", "value", "multiplier", "grad_out"):
        tensor = getattr(o, name).detach().clone()
        tensor[1:] = tensor[1:].flip(0) * 3
        setattr(o, name, tensor)
    other = evaluate(p, backend, o._require())
    mixed = {name: torch.cat([other[name][:1], whole[name][1:]]) for name in whole}
    assert_accurate(mixed, p)


@pytest.mark.parametrize("axis", range(4))
def test_offsets_are_64_bit(axis, backend):
    """Strides over 2^31 elements, in a buffer that is reserved and, but for the touched pages,
    never filled."""
    p = Problem(
        B=2,
        H=2,
        Lq=2,
        Lk=2,
        D=2,
        multiplier="bhqk",
        bias="bhqk",
        attn_mask="bhqk",
        dtype="bfloat16",
    )
    stride = 2**31 + 5
    o = p.operands()
    names = ("query", "key", "value", "multiplier", "bias", "attn_mask", "grad_out")
    buffers = []
    for name in names:
        tensor = getattr(o, name).detach()
        if axis == 3 and name in ("query", "key", "value", "grad_out"):
            continue  # their last stride is 1, or they are copied
        strides = [0, 0, 0, 0]
        small = 1
        for a in (3, 2, 1, 0):
            if a != axis:
                strides[a] = small
                small *= tensor.shape[a]
        strides[axis] = stride
        nbytes = (stride + 64) * tensor.element_size()
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE
        buffers.append(mmap.mmap(-1, nbytes, flags=flags))
        room = torch.frombuffer(buffers[-1], dtype=tensor.dtype)
        setattr(o, name, room.as_strided(tensor.shape, strides).copy_(tensor))
    assert_accurate(evaluate(p, backend, o._require()), p)
    del o, room, tensor


def in_a_process(script: str, timeout: int = 120) -> str:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join((str(TESTS), str(TESTS.parent)))}
    done = subprocess.run(
        [sys.executable, "-c", script],
        env=environment,
        capture_output=True,
        text=True,
        timeout=timeout,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.backend("cpu")
@pytest.mark.parametrize("masks", ["11qk", "1h1k", "expanded"])
def test_memory(masks):
    """Peak memory of forward and backward: far below [B,H,Lq,Lk], and no copy of an expanded
    operand."""
    script = f"""
import resource, torch, lam_kernels
torch.set_num_threads(2)
B, H, L, D = 2, 8, 1536, 32
def run(L):
    q, k, v = (torch.randn(B, L, H, D).transpose(1, 2).requires_grad_() for _ in range(3))
    m = torch.ones({{"11qk": (1, 1, L, L), "1h1k": (1, H, 1, L)}}.get("{masks}", (1, 1, L, 1)))
    if "{masks}" == "expanded":
        m = m.expand(B, H, L, L)
    else:
        m.requires_grad_()
    out = lam_kernels.masked_attention(q, k, v, multiplier=m, backend="cpu")
    out.backward(torch.ones_like(out))
run(32)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
run(L)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)
"""
    peak = float(in_a_process(script))
    whole = 2 * 8 * 1536**2 * 4 / 2**20  # 144 MiB
    assert peak < whole / 2, f"{peak:.0f} MiB; [B,H,Lq,Lk] is {whole:.0f} MiB"


def test_layout(backend):
    """Results are new and contiguous, whatever the operands' strides."""
    for layout in ("contiguous", "transposed", "sliced", "expanded", "last_strided"):
        p = Problem(Lq=33, multiplier="b1qk", layout=layout, mask_layout=layout, grad_layout=layout)
        result = evaluate(p, backend)
        assert result["out"].is_contiguous()
        assert result["lse"].is_contiguous()
        if backend != "reference":
            assert all(x.is_contiguous() for x in result.values())
        assert_accurate(result, p)


@pytest.mark.parametrize("empty", ["B", "H", "Lq", "Lk"])
def test_sizes_of_zero(empty, backend, dtype):
    sizes = {"B": 2, "H": 2, "Lq": 5, "Lk": 7} | {empty: 0}
    q = torch.randn(sizes["B"], sizes["H"], sizes["Lq"], 8, dtype=getattr(torch, dtype))
    k = torch.randn(sizes["B"], sizes["H"], sizes["Lk"], 8, dtype=getattr(torch, dtype))
    leaves = [x.requires_grad_() for x in (q, k, k.clone())]
    m = torch.ones(1, 1, sizes["Lq"], sizes["Lk"], requires_grad=True)
    for pattern in (None, Causal()):
        out, lse = masked_attention(
            *leaves, multiplier=m, pattern=pattern, return_lse=True, backend=backend
        )
        assert out.shape == (sizes["B"], sizes["H"], sizes["Lq"], 8)
        assert lse.shape == out.shape[:3]
        if empty == "Lk":
            assert out.eq(0).all()
            assert lse.eq(-INF).all()
        gradients = torch.autograd.grad(
            [out, lse], [*leaves, m], [torch.ones_like(out), torch.ones_like(lse)]
        )
        for leaf, gradient in zip([*leaves, m], gradients, strict=True):
            assert gradient.shape == leaf.shape
            assert gradient.eq(0).all()


def test_sizes_of_head_dims(backend):
    for D, Dv, name in ((257, 8, "query"), (8, 257, "value"), (0, 8, "query"), (8, 0, "value")):
        q, k, v = torch.ones(1, 1, 2, D), torch.ones(1, 1, 2, D), torch.ones(1, 1, 2, Dv)
        with pytest.raises(ValueError, match=name):
            masked_attention(q, k, v, backend=backend)
    for D, Dv in ((1, 256), (256, 1)):
        check(Problem(Lq=3, D=D, Dv=Dv, multiplier="b1qk"), backend)


def test_dropout(backend):
    """Philox by (seed, offset): torch.manual_seed governs, forward and backward draw the same, dV
    has P~."""
    q, k, v = qkv(Lq=33, Lk=66)
    results = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        results.append(masked_attention(q, k, v, dropout_p=0.4, backend=backend))
    assert torch.equal(results[0], results[1])
    assert not torch.equal(results[0], results[2])
    torch.manual_seed(1)
    first = masked_attention(q, k, v, dropout_p=0.4, backend=backend)
    assert not torch.equal(first, masked_attention(q, k, v, dropout_p=0.4, backend=backend))
    check(Problem(Lq=65, Lk=34, dropout_p=0.4, multiplier="b1qk", lse_grad=True), backend)
    for wrong, error in (
        (1.0, ValueError),
        (-0.1, ValueError),
        ("0.1", TypeError),
        (NAN, ValueError),
    ):
        with pytest.raises(error, match="dropout_p"):
            masked_attention(q, k, v, dropout_p=wrong, backend=backend)
    state = torch.random.get_rng_state()
    masked_attention(q, k, v, backend=backend)
    assert torch.equal(state, torch.random.get_rng_state())  # without dropout nothing is drawn


def test_positions(backend):
    """Causal counts from the end, the others from the start, unless told; & takes both."""
    q, k, v = qkv(Lq=3, Lk=5)
    v = torch.eye(5)[:, :].expand(2, 2, 5, 5)
    i, j = torch.arange(3)[:, None], torch.arange(5)
    wanted = {
        Causal(): j <= i + 2,
        Causal(alignment="start"): j <= i,
        Toeplitz(1): (i - j).abs() <= 1,
        Toeplitz(1, alignment="end"): (i + 2 - j).abs() <= 1,
        lam_kernels.BlockDiagonal(2): i // 2 == j // 2,
        lam_kernels.BlockDiagonal(2, alignment="end"): (2 - i) // 2 == (4 - j) // 2,
        Causal() & Toeplitz(1): (j <= i + 2) & ((i - j).abs() <= 1),
    }
    for pattern, seen in wanted.items():
        out = masked_attention(q, k, v, pattern=pattern, backend=backend)
        assert torch.equal(out > 0, seen.expand_as(out)), pattern


def test_double_backward(backend):
    dtype = torch.float64 if "float64" in BY_NAME[backend].dtypes else torch.float32
    q, k, v = (x.to(dtype) for x in qkv())
    mask = torch.ones(2, 1, 5, 7, dtype=dtype, requires_grad=True)

    def loss(mask, q=q):
        return masked_attention(q, k, v, multiplier=mask, backend=backend).sin().sum()

    (gradient,) = torch.autograd.grad(loss(mask), mask, create_graph=True)
    nested = torch.func.grad(lambda m: torch.func.grad(loss)(m).square().sum())
    if BY_NAME[backend].double_backward:
        assert torch.autograd.grad(gradient.square().sum(), mask)[0].ne(0).any()
        assert nested(mask).ne(0).any()
        return
    with pytest.raises(RuntimeError, match="double backward"):
        torch.autograd.grad(gradient.square().sum(), mask)
    with pytest.raises(RuntimeError, match="double backward"):
        nested(mask)


BAD = {
    "query": {"query": torch.ones(2, 5, 8)},
    "key": {"key": torch.ones(2, 2, 7, 9)},
    "value": {"value": torch.ones(2, 2, 6, 8)},
    "multiplier": {"multiplier": torch.ones(2, 1, 5, 7, dtype=torch.int32)},
    "bias": {"bias": [[0.0]]},
    "multiplier ": {"multiplier": torch.ones(5, 7).to_sparse()},
    "attn_mask": {"attn_mask": torch.ones(2, 1, 5, 7)},
    "key_mask": {"key_mask": torch.ones(2, 5, dtype=torch.bool)},
    "key_mask ": {"key_mask": torch.ones(2, 7)},
    "pattern": {"pattern": "causal"},
    "pattern ": {"pattern": [Causal()]},
    "backend": {"backend": "cpuu"},
}


@pytest.mark.parametrize("argument", BAD)
def test_bad_input(argument, backend):
    names = ("query", "key", "value")
    given = dict(zip(names, qkv(), strict=True)) | {"backend": backend} | BAD[argument]
    with pytest.raises((ValueError, TypeError), match=argument.strip()) as error:
        masked_attention(**given)
    assert any(word in str(error.value) for word in ("got", "has"))
    with pytest.raises((ValueError, TypeError)):
        lam_attention(*qkv(), torch.ones(5, 7), fusion="multiply", backend=backend)
    with pytest.raises(TypeError, match="mask"):
        lam_attention(*qkv(), None, backend=backend)


@pytest.mark.backend("cpu")
def test_backend_none_and_no_mask_at_all():
    q, k, v = qkv()
    assert torch.equal(masked_attention(q, k, v), masked_attention(q, k, v, backend="cpu"))
    found = explain("masked_attention", q, k, v)
    assert found.backend == "cpu"
    assert "no mask at all" in str(found)
    assert "no mask at all" not in str(explain("masked_attention", q, k, v, bias=torch.ones(5, 7)))
    check(Problem(Lq=65, D=64), None)


@pytest.mark.parametrize("name", ["cuda", "triton"])
def test_named_backend_never_falls_back(name):
    if not lam_kernels.backends()[name]:
        pytest.skip(f"{name} can run here")
    q, k, v = qkv()
    with pytest.raises(RuntimeError, match=f'backend="{name}"'):
        masked_attention(q, k, v, backend=name)
    assert explain("masked_attention", q, k, v, backend=name).backend == ""


def test_backends_names_every_backend_with_its_reason():
    found = lam_kernels.backends()
    assert set(found) == {"cpu", "cuda", "triton", "reference"}
    assert found["reference"] == ""
    assert all(isinstance(reason, str) for reason in found.values())


def test_reference_runs_only_when_named():
    q, k, v = qkv()
    assert explain("masked_attention", q, k, v).backend != "reference"
    named = masked_attention(q, k, v, backend="reference")
    assert torch.equal(named, reference(q, k, v))
    p = Problem(Lq=5, Lk=7, D=8, grads="")
    assert expected_of(p)["out"].dtype == torch.float64


@pytest.mark.backend("cpu")
def test_fork():
    """Workers forked after the parent used two threads give the parent's results, and end."""
    script = """
import torch, lam_kernels
from torch.utils.data import DataLoader
torch.set_num_threads(2)
q = torch.randn(2, 2, 130, 16)
def call(n):
    return lam_kernels.masked_attention(q, q, q, multiplier=torch.ones(130, 130), backend="cpu")
class Calls(torch.utils.data.Dataset):
    def __len__(self): return 6
    def __getitem__(self, n): return call(n)
parent = call(0)
loader = DataLoader(Calls(), batch_size=None, num_workers=2, multiprocessing_context="fork")
results = list(loader)
torch.set_num_threads(1)
alone = call(0)
assert len(results) == 6 and all(torch.equal(r, alone) for r in results)
assert torch.equal(call(0), alone)
"""
    in_a_process(script)
