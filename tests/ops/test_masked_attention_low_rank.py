"""LowRankMask as an operand of masked_attention: every backend that serves it, from one table."""

from __future__ import annotations

import pytest
import torch
from backends import BY_NAME, repeats, widest
from problems import HEAD_DIMS, check, evaluate, random_low_rank_problem
from test_masked_attention import PATTERNS
from tolerance import assert_accurate

from lam_kernels import LowRankMask, lam_attention, masked_attention
from python_ref.inputs import Problem

RANKS = (1, 2, 3, 8, 15, 16, 17, 64, 100, 256)

CASES = {
    "multiplier": Problem(Lq=50, D=64, multiplier="rank 8: b1 11 11"),
    "bias": Problem(Lq=50, D=64, bias="rank 8: b1 11 11"),
    "no offset": Problem(Lq=65, multiplier="rank 5: bh bh", lse_grad=True),
    "both": Problem(Lq=65, D=32, multiplier="rank 7: b1 1h", bias="rank 19: 1h b1 11"),
    "dense bias": Problem(Lq=65, D=32, multiplier="rank 4: b1 11 1h", bias="b1qk"),
    "dense multiplier": Problem(Lq=65, D=32, multiplier="11qk", bias="rank 4: 1h 1h b1"),
    "key weights": Problem(Lq=33, multiplier="rank 3: b1 11", bias="1h1k", key_mask=True),
    "shared by all": Problem(B=3, H=4, Lq=50, multiplier="rank 16: 11 11 11"),
    "more keys": Problem(Lq=17, Lk=130, D=32, Dv=80, multiplier="rank 9: b1 1h bh", key_mask=True),
    "more rows": Problem(Lq=130, Lk=17, D=80, Dv=32, bias="rank 9: 1h b1 b1", attn_mask="b1qk"),
    "shared heads": Problem(H=6, Hkv=2, Lq=50, multiplier="rank 6: b1 11 11", bias="rank 3: 1h 1h"),
    "one shared head": Problem(H=4, Hkv=1, Lq=33, multiplier="rank 6: bh 11", pattern="Causal()"),
    "rows without keys": Problem(
        Lq=50, multiplier="rank 5: b1 11 b1", bias="rank 2: 1h 11 11", attn_mask="b1qk",
        key_mask=True, fill="dead,nan,loud",
    ),
    "keys hidden by the offset": Problem(Lq=65, bias="rank 5: b1 11 b1", fill="neg_inf,nan,loud"),
    "dropout": Problem(Lq=65, Lk=66, D=32, multiplier="rank 5: b1 11 11", dropout_p=0.3),
    "lse alone": Problem(Lq=50, multiplier="rank 5: b1 11 11", lse_grad=True, grads="qkm"),
    "wide scores": Problem(Lq=65, multiplier="rank 5: b1 11 11", spread=30.0, lse_grad=True),
    "one pattern a head": Problem(
        H=4, Lq=100, multiplier="rank 4: b1 11 11", bias="rank 6: 1h 11 11", fill="nan",
        pattern=("Causal()", None, "Toeplitz(5) & Segments(3)", "DilatedToeplitz(30, 3)"),
    ),
    "tiles": Problem(B=1, H=2, Lq=300, D=64, multiplier="rank 33: 11 11 11", bias="rank 5: 1h 1h"),
    "tiles, samples": Problem(B=4, H=2, Lq=257, Lk=300, D=64, multiplier="rank 16: b1 11 11"),
    "tiles, keys": Problem(B=1, H=2, Lq=31, Lk=1100, D=32, bias="rank 3: 11 11 11", key_mask=True),
    "tiles, rows": Problem(B=1, H=2, Lq=700, Lk=66, D=32, multiplier="rank 3: 1h 11"),
    "tiles, local": Problem(
        B=1, H=2, Lq=515, D=32, multiplier="rank 20: 11 11 11", pattern="Toeplitz(64)"
    ),
    "tiles, dilated": Problem(
        B=1, H=2, Lq=300, D=32, bias="rank 20: 11 1h 11", pattern="DilatedToeplitz(96, 4)"
    ),
    "tiles, causal": Problem(
        B=1, H=4, Lq=515, Lk=530, multiplier="rank 20: 11 11 11", pattern="Causal()", dropout_p=0.1
    ),
}  # fmt: skip


@pytest.fixture(autouse=True)
def _served(request):
    name = request.node.callspec.params.get("backend") if hasattr(request.node, "callspec") else ""
    if name and not BY_NAME[name].low_rank:
        pytest.skip(f"{name} does not serve a LowRankMask yet")


@pytest.mark.parametrize("case", CASES)
def test_case(case, backend, dtype):
    check(CASES[case].but(dtype=dtype), backend)


@pytest.mark.parametrize("use", ["multiplier", "bias"])
@pytest.mark.parametrize("rows", ["11", "b1", "1h", "bh"])
def test_broadcast(use, rows, backend):
    """Each factor is shared by batch or heads on its own."""
    for columns in ("11", "b1", "1h", "bh"):
        for offset in ("", "11", "b1", "1h", "bh"):
            mask = {use: f"rank 3: {rows} {columns} {offset}".strip()}
            check(Problem(B=3, Lq=18, Lk=19, **mask, key_mask=True, fill="nan"), backend)


@pytest.mark.parametrize("rank", RANKS)
def test_ranks(rank, backend):
    for dtype in ("float32", "bfloat16"):
        masks = {"multiplier": f"rank {rank}: b1 11 11", "bias": f"rank {RANKS[-1] // rank}: 1h 11"}
        check(Problem(Lq=65, Lk=50, **masks, dtype=dtype), backend)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_pattern(pattern, backend):
    masks = {"multiplier": "rank 6: b1 11 11", "bias": "rank 3: 1h 1h b1", "fill": "nan,loud"}
    check(Problem(Lq=100, pattern=pattern, **masks), backend)
    check(Problem(Lq=50, Lk=66, pattern=pattern, **masks, dtype="bfloat16"), backend)


@pytest.mark.parametrize("D", HEAD_DIMS[::3])
def test_head_dims(D, backend):
    for dtype in BY_NAME[backend].dtypes:
        check(Problem(B=1, Lq=35, D=D, multiplier="rank 6: 11 11 11", dtype=dtype), backend)


@pytest.mark.parametrize("layout", ["transposed", "sliced", "expanded", "last_strided"])
def test_strides(layout, backend, dtype):
    masks = {"multiplier": "rank 16: b1 11 11", "bias": "rank 3: 1h 1h b1", "mask_layout": layout}
    check(Problem(B=3, Lq=33, Lk=50, **masks, dtype=dtype), backend)


@pytest.mark.parametrize("factors", ["float32", "bfloat16", "float16", "float64"])
def test_factors_have_their_own_dtype(factors, backend, dtype):
    p = Problem(Lq=33, bias="rank 5: b1 11 11", bias_dtype=factors, dtype=dtype)
    if factors == "float64" and dtype != "float64":
        with pytest.raises(TypeError, match=r"bias: LowRankMask\.rows may be float64 only"):
            evaluate(p, backend)
        return
    result = evaluate(p, backend)
    for name in ("bias.rows", "bias.columns", "bias.offset"):
        assert result[name].dtype == getattr(torch, factors)
    assert_accurate(result, p)


@pytest.mark.parametrize("grads", ["", "q", "m", "b", "mb", "v"])
def test_only_wanted_gradients(grads, backend):
    masks = {"multiplier": "rank 6: b1 11 11", "bias": "rank 3: 1h 1h"}
    check(Problem(Lq=34, **masks, grads=grads), backend)


@pytest.mark.parametrize("wanted", ["rows", "columns", "offset"])
def test_one_factor_alone(wanted, backend):
    p = Problem(Lq=66, multiplier="rank 6: b1 1h 11", key_mask=True)
    o = p.operands()
    for name, tensor in o.leaves.items():
        tensor.requires_grad_(name == f"multiplier.{wanted}")
    result = evaluate(p, backend, o)
    assert set(result) == {"out", "lse", f"multiplier.{wanted}"}
    assert_accurate(evaluate(p, backend) | result, p)


def test_factors_of_three_dtypes(backend):
    p = Problem(Lq=33, multiplier="rank 5: b1 11 11")
    o = p.operands()
    factors = [f.detach() for f in o.multiplier.factors()]
    mixed = LowRankMask(factors[0].bfloat16(), factors[1].half(), factors[2])
    same = LowRankMask(factors[0].bfloat16().float(), factors[1].half().float(), factors[2])
    q, k, v = o.query, o.key, o.value
    assert torch.equal(
        masked_attention(q, k, v, multiplier=mixed, backend=backend),
        masked_attention(q, k, v, multiplier=same, backend=backend),
    )
    assert mixed.dense().dtype == torch.float32


# ---- what it must be equal to


@pytest.mark.parametrize("use", ["multiplier", "bias"])
def test_is_its_dense_form(use, backend):
    """The factors' gradients are those that autograd gives through .dense()."""
    dtype = widest(backend)
    p = Problem(B=3, Lq=65, **{use: "rank 5: b1 1h 11"}, lse_grad=True, dtype=dtype)
    one = evaluate(p, backend)
    o = p.operands()
    mask = getattr(o, use)
    names = list(o.leaves)
    out, lse = masked_attention(
        o.query, o.key, o.value, **{use: mask.dense()}, return_lse=True, backend=backend
    )
    gradients = torch.autograd.grad((out, lse), o.leaves.values(), (o.grad_out, o.grad_lse))
    two = {"out": out.detach(), "lse": lse.detach(), **dict(zip(names, gradients, strict=True))}
    assert_accurate(one, p)
    assert_accurate(two, p)


def scaled_heads(o, rows, columns):
    """A rank 1 multiplier without offset is a factor of each query and one of each key."""
    return o.query * rows, o.key * columns


def widened_heads(o, rows, columns):
    """A low-rank bias is a longer head dim."""
    scale = o.query.shape[-1] ** -0.5
    B, H = o.query.shape[:2]
    wide = [
        torch.cat([x, f.expand(B, H, -1, -1)], dim=-1)
        for x, f in ((o.query * scale, rows), (o.key, columns))
    ]
    return wide


IDENTITIES = {
    "rank 1 multiplier": ({"multiplier": "rank 1: b1 1h"}, scaled_heads, None),
    "low-rank bias": ({"bias": "rank 7: b1 1h"}, widened_heads, 1.0),
}


@pytest.mark.parametrize("identity", IDENTITIES)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_identity(identity, backend, dtype):
    """Two forms of one attention. The other form is computed by the same backend without a mask.

    Not in half precision, where the operands of the other form are rounded once more.
    """
    if dtype not in BY_NAME[backend].dtypes:
        pytest.skip(f"{backend} has no {dtype}")
    masks, rewritten, scale = IDENTITIES[identity]
    p = Problem(Lq=65, Lk=50, D=24, **masks, lse_grad=True, dtype=dtype)
    result = evaluate(p, backend)
    o = p.operands()
    mask = o.multiplier or o.bias
    query, key = rewritten(o, mask.rows, mask.columns)
    out, lse = masked_attention(query, key, o.value, scale=scale, return_lse=True, backend=backend)
    leaves = o.leaves
    gradients = torch.autograd.grad((out, lse), leaves.values(), (o.grad_out, o.grad_lse))
    other = {"out": out.detach(), "lse": lse.detach(), **dict(zip(leaves, gradients, strict=True))}
    assert_accurate(result, p)
    assert_accurate(other, p)


def test_lam_attention(backend):
    p = Problem(Lq=33, multiplier="rank 5: b1 11 11")
    o = p.operands()
    q, k, v, mask = o.query, o.key, o.value, o.multiplier
    for fusion, use in (("mul", "multiplier"), ("add", "bias")):
        one = lam_attention(q, k, v, mask, fusion=fusion, backend=backend)
        assert torch.equal(one, masked_attention(q, k, v, **{use: mask}, backend=backend))
    with pytest.raises(ValueError, match=r'fusion="gate", got a LowRankMask'):
        lam_attention(q, k, v, mask, fusion="gate", backend=backend)


# ---- determinism, batch mates, random problems


@pytest.mark.parametrize("threads", [1, 2, 3, 5])
def test_repeats(threads, backend):
    """Bitwise, for every number of threads, whichever way the tasks are cut."""
    torch.set_num_threads(threads)
    shared = {"multiplier": "rank 20: 11 11 11", "bias": "rank 3: 11 1h 11"}
    for problem in (
        Problem(B=1, H=2, Lq=300, D=32, **shared),
        Problem(B=4, H=2, Lq=100, D=32, multiplier="rank 20: b1 11 11"),
        Problem(B=3, H=3, Lq=66, D=32, bias="rank 5: 11 bh", dtype="bfloat16"),
    ):
        check(problem, backend)
        first = evaluate(problem, backend)
        for _ in range(repeats(backend, 10)):
            again = evaluate(problem, backend)
            for name, tensor in first.items():
                assert torch.equal(tensor, again[name]), name


def test_batch_mates(backend):
    p = Problem(B=3, Lq=65, multiplier="rank 5: b1 11", grads="qkv")
    whole = evaluate(p, backend)
    o = p.operands()
    rows = o.multiplier.rows.detach().clone()
    rows[1:] = rows[1:].flip(0) * 3
    o.multiplier = LowRankMask(rows, o.multiplier.columns)
    other = evaluate(p, backend, o)
    mixed = {name: torch.cat([other[name][:1], whole[name][1:]]) for name in whole}
    assert_accurate(mixed, p)


@pytest.mark.parametrize(
    "first",
    [pytest.param(n, marks=[pytest.mark.full] if n >= 60 else []) for n in range(0, 400, 20)],
)
def test_random_problems(first, backend):
    count = 20 if backend != "reference" else 4
    failures = []
    for seed in range(first, first + count):
        problem = random_low_rank_problem(seed)
        if problem.dtype in BY_NAME[backend].dtypes:
            try:
                check(problem, backend)
            except AssertionError as failure:
                failures.append(str(failure))
    assert not failures, "\n".join(failures)


# ---- planted faults: each of these results must fail


def scaled(result, p, name):
    result[name] = result[name] * 1.01


def without_a_head(result, p, name):
    """The gradient lacks what one head adds to it."""
    o = p.operands()
    o.grad_out = o.grad_out.clone()
    o.grad_out[:, 1] = 0
    result[name] = evaluate(p, "reference", o)[name]


def without_a_tile(result, p, name):
    flat = result[name].clone().flatten()
    flat[: flat.numel() // 8] = 0
    result[name] = flat.view_as(result[name])


def shifted(result, p, name):
    axis = -1 if "offset" in name else -2
    result[name] = result[name].roll(1, axis)


def of_raw_scores(result, p, name):
    """G = dZ q . k instead of dZ scale q . k."""
    result[name] = result[name] * p.D**0.5


FAULTS = (scaled, without_a_head, without_a_tile, shifted, of_raw_scores)


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
@pytest.mark.parametrize("factor", ["rows", "columns", "offset"])
def test_planted_fault_is_found(factor, fault):
    for dtype in ("float32", "bfloat16"):
        p = Problem(Lq=130, multiplier="rank 20: b1 11 11", dtype=dtype)
        result = evaluate(p, "reference")
        assert_accurate(result, p)
        fault(result, p, f"multiplier.{factor}")
        with pytest.raises(AssertionError, match=f"multiplier.{factor}"):
            assert_accurate(result, p)


# ---- float64 differences

SMALL = {"B": 2, "H": 2, "Lq": 3, "Lk": 4, "D": 3, "Dv": 2, "dtype": "float64"}
DIFFERENCES = {
    "multiplier": Problem(**SMALL, multiplier="rank 2: bh bh bh"),
    "bias": Problem(**SMALL, bias="rank 2: b1 1h 11"),
    "both": Problem(
        **SMALL, multiplier="rank 3: 11 11 11", bias="rank 1: 1h b1", pattern="Causal()"
    ),
    "beside a dense one": Problem(**SMALL, multiplier="rank 2: b1 11", bias="1hqk", key_mask=True),
    "dropout": Problem(**SMALL, multiplier="rank 2: b1 11 1h", dropout_p=0.4),
}  # fmt: skip


@pytest.mark.parametrize("case", DIFFERENCES)
def test_gradcheck(case, backend):
    problem = DIFFERENCES[case]
    if problem.dtype not in BY_NAME[backend].dtypes:
        pytest.skip(f"{backend} has no float64")
    o = problem.operands()
    names = list(o.leaves)

    def f(*leaves):
        given = dict(zip(names, leaves, strict=True))

        def mask(name):
            if f"{name}.rows" in given:
                return LowRankMask(*(t for n, t in given.items() if n.startswith(f"{name}.")))
            return given.get(name)

        torch.manual_seed(problem.seed)
        masks = o.masks() | {"multiplier": mask("multiplier"), "bias": mask("bias")}
        out, lse = masked_attention(
            *(given[n] for n in ("query", "key", "value")),
            **masks,
            return_lse=True,
            backend=backend,
        )
        return out, lse.masked_fill(lse.isinf(), 0.0)

    assert torch.autograd.gradcheck(f, list(o.leaves.values()))
    if BY_NAME[backend].double_backward:
        assert torch.autograd.gradgradcheck(f, list(o.leaves.values()))
