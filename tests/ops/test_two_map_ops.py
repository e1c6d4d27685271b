"""global_local_attention and map_gated_attention as citizens of torch: registration, compilation,
torch.func, autocast, second derivatives, refusals, random problems, determinism, levels.
"""

from __future__ import annotations

import importlib
import sys
import warnings

import levels
import pytest
import torch
from backends import BACKENDS, BY_NAME, widest
from levels import LEVELS
from torch.autograd import gradcheck, gradgradcheck
from torch.utils.flop_counter import FlopCounterMode
from two_maps import KERNELS, Drawn, both, check, evaluate, gated, random_case

import lam_kernels
from lam_kernels.patterns import encode

OPS = ("global_local_attention", "map_gated_attention")
SMALL = {"B": 2, "H": 2, "Lq": 5, "D": 3, "Dv": 2, "dtype": "float64"}
CASES = {
    "both": both(**SMALL, multiplier="b1qk", bias="1h1k", pattern="Toeplitz(1)", key_mask=True),
    "both, plain": both(**SMALL, pattern="BlockDiagonal(2)"),
    "both, dilated": both(**SMALL | {"Lq": 7}, bias="11qk", pattern="DilatedToeplitz(4, 2)"),
    "both, one a head": both(**SMALL, multiplier="1h11", pattern=("Causal()", "Segments(2)")),
    "both, tiles": both(
        **SMALL | {"B": 1, "H": 1, "Lq": 9}, Lk=37, bias="11qk", pattern="Toeplitz(9)", grads="qb"
    ),
    "gated": gated(**SMALL, pattern="Toeplitz(1)"),
    "gated, padded": gated(**SMALL, pattern="Toeplitz(1)", key_mask=True, fill="dead"),
    "gated, renormalised": gated(True, **SMALL, pattern="BlockDiagonal(2)"),
    "gated, one a head": gated(**SMALL, pattern=("Causal()", None)),
}
TWO = ("both", "gated, renormalised")


@pytest.fixture(autouse=True)
def _fresh():
    torch._dynamo.reset()


def loss(results):
    return sum(out.sin().sum() for out in results)


def leaves_of(drawn):
    return [t for t in drawn.tensors() if t is not None]


def function_of(case, backend=None):
    """(f, leaves): results of the tensors that a gradient is wanted of."""
    drawn = Drawn(case)
    names = ("query", "key", "value", "multiplier", "bias")
    wanted = [name for name in names if name in drawn.operands.leaves]

    def f(*leaves):
        given = dict(zip(wanted, leaves, strict=True))
        tensors = [given.get(n, t) for n, t in zip(names, drawn.tensors(), strict=True)]
        return drawn.call(tensors, backend=backend)

    return f, [drawn.operands.leaves[name] for name in wanted]


# ---- gradients by finite differences


@pytest.mark.parametrize("case", CASES)
def test_gradcheck(case, backend):
    if "float64" not in BY_NAME[backend].dtypes:
        pytest.skip(f"{backend} has no float64")
    f, leaves = function_of(CASES[case], backend)
    assert gradcheck(f, leaves)


@pytest.mark.parametrize(
    "backend",
    [
        pytest.param(b.name, marks=pytest.mark.backend(b.name))
        for b in BACKENDS
        if b.double_backward
    ],
)
@pytest.mark.parametrize("case", TWO)
def test_gradgradcheck(case, backend):
    f, leaves = function_of(CASES[case], backend)
    assert gradgradcheck(f, leaves)


@pytest.mark.backend("reference")
@pytest.mark.parametrize("case", CASES)
def test_written_out_backward_of_the_reference(case):
    """The formulas of python_ref's docstring agree with autograd of its forward."""
    drawn = Drawn(CASES[case])
    found = drawn.formulas(lambda x: x)
    expected = evaluate(CASES[case], "reference")
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-9, atol=1e-12)


# ---- random problems, determinism, levels


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("start", range(3))
def test_random_problems(op, start, backend, request):
    count = 200 if request.config.getoption("full") else 6 if backend != "reference" else 2
    failures = []
    for number in range(start * 1000, start * 1000 + count):
        case = random_case(op, number)
        if case.problem.dtype not in BY_NAME[backend].dtypes:
            continue
        try:
            check(case, backend)
        except AssertionError as failure:
            failures.append(str(failure))
    assert not failures, "\n".join(failures)


REPEATED = {
    "both": both(B=3, H=4, Lq=130, D=32, multiplier="11qk", bias="1h1k", pattern="Toeplitz(20)"),
    "gated": gated(B=3, H=5, Lq=100, D=32, pattern="Toeplitz(20)"),
    "gated, one head": gated(B=1, H=1, Lq=200, D=16, pattern="BlockDiagonal(20)"),
}


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("threads", [1, 2, 3, 5])
@pytest.mark.parametrize("case", REPEATED)
def test_same_bits_again(case, threads, backend):
    """Right and repeatable for each number of threads, also above the cores and the work."""
    torch.set_num_threads(threads)
    for dtype in ("float32", "bfloat16"):
        problem = REPEATED[case].but(dtype=dtype)
        first = evaluate(problem, backend)
        check(problem, backend)
        for _ in range(10):
            again = evaluate(problem, backend)
            for name, tensor in first.items():
                assert torch.equal(tensor, again[name]), name


@pytest.mark.backend("cpu")
@pytest.mark.parametrize("level", LEVELS)
def test_level(level):
    levels.assert_silent(__file__, level)


# ---- torch's own machinery


@pytest.mark.parametrize("case", CASES)
def test_opcheck(case, backend):
    drawn = Drawn(CASES[case].but(dtype=widest(backend)))
    o, p = drawn.operands, drawn.case.problem
    flat, ids = encode(drawn.pattern, p.H)
    four = drawn.case.op == "global_local_attention"
    tensors = [
        x if x is None else x.detach()[None, None] if four and x.dim() == 2 else x.detach()
        for x in drawn.tensors()
    ]
    settings = (list(flat), 0.5) if four else (list(flat), 0.5, drawn.case.renormalise)
    arguments = (*tensors, o.key_mask, list(ids))
    forward = getattr(torch.ops.lam_kernels, f"{drawn.case.op}_fwd").default
    backward = getattr(torch.ops.lam_kernels, f"{drawn.case.op}_bwd").default
    torch.library.opcheck(forward, (*arguments, *settings, backend))
    kept = forward(*arguments, *settings, backend) if four else ()
    needs = [x is not None for x in tensors]
    for wanted in (needs, [need and n % 2 == 0 for n, need in enumerate(needs)]):
        torch.library.opcheck(
            backward, (*drawn.grads, *arguments, *kept, *settings, wanted, backend)
        )


@pytest.mark.backend("cpu")
@pytest.mark.parametrize("case", TWO)
def test_compiles_into_one_graph(case):
    f, leaves = function_of(CASES[case])
    compiled = torch.compile(f, fullgraph=True, backend="aot_eager")
    for a, b in zip(f(*leaves), compiled(*leaves), strict=True):
        assert torch.equal(a, b)
    expected = torch.autograd.grad(loss(f(*leaves)), leaves)
    for a, b in zip(expected, torch.autograd.grad(loss(compiled(*leaves)), leaves), strict=True):
        assert torch.equal(a, b)


@pytest.mark.backend("cpu")
@pytest.mark.parametrize("case", TWO)
def test_export_gives_one_op_node(case):
    f, leaves = function_of(CASES[case])

    class Layer(torch.nn.Module):
        def forward(self, *t):
            return f(*t)

    plain = tuple(t.detach() for t in leaves)
    program = torch.export.export(Layer(), plain)
    targets = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    assert sum(f"{CASES[case].op}_fwd" in t for t in targets) == 1
    for a, b in zip(program.module()(*plain), f(*plain), strict=True):
        assert torch.equal(a, b)


@pytest.mark.backend("cpu")
@pytest.mark.parametrize("case", TWO)
def test_func_grad_and_vmap(case):
    f, leaves = function_of(CASES[case])
    plain = [t.detach() for t in leaves]
    every = tuple(range(len(leaves)))
    gradient = torch.func.grad(lambda *t: loss(f(*t)), argnums=every)
    expected = torch.autograd.grad(loss(f(*leaves)), leaves)
    for a, b in zip(gradient(*plain), expected, strict=True):
        torch.testing.assert_close(a, b)
    stacked = [torch.stack([t, 2 * t]) for t in plain]
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*performance drop.*")  # vmap's slow fallback
        mapped = torch.vmap(gradient)(*stacked)
        shared = torch.vmap(f, in_dims=(0, *[None] * (len(plain) - 1)))(stacked[0], *plain[1:])
    for n, factor in enumerate((1, 2)):
        for a, b in zip(mapped, gradient(*(factor * t for t in plain)), strict=True):
            torch.testing.assert_close(a[n], b)
        for a, b in zip(shared, f(factor * plain[0], *plain[1:]), strict=True):
            torch.testing.assert_close(a[n], b)


@pytest.mark.backend("cpu")
@pytest.mark.parametrize("case", TWO)
def test_double_backward_is_refused(case):
    f, leaves = function_of(CASES[case])
    grads = torch.autograd.grad(loss(f(*leaves)), leaves, create_graph=True)
    with pytest.raises(RuntimeError, match=rf'{CASES[case].op}.*no double.*backend="reference"'):
        sum(g.sum() for g in grads).backward()
    plain = [t.detach() for t in leaves]

    def twice(x):
        return torch.func.grad(lambda y: loss(f(y, *plain[1:])))(x).sum()

    with pytest.raises(RuntimeError, match="no double backward"):
        torch.func.grad(twice)(plain[0])


@pytest.mark.backend("cpu")
@pytest.mark.parametrize("case", TWO)
def test_autocast_casts_query_key_value_only(case):
    f, leaves = function_of(CASES[case].but(dtype="float32"))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        results = f(*leaves)
    assert all(out.dtype == torch.bfloat16 for out in results)
    loss(out.float() for out in results).backward()
    assert all(t.grad.dtype == torch.float32 for t in leaves)
    halves = [t.detach().bfloat16() for t in leaves[:3]]
    for a, b in zip(results, f(*halves, *(t.detach() for t in leaves[3:])), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("sizes", [(0, 2, 5, 5), (2, 0, 5, 5), (2, 2, 0, 0), (2, 2, 5, 0)])
def test_nothing_to_attend(sizes, backend):
    B, H, Lq, Lk = sizes
    shapes = ((B, H, Lq, 8), (B, H, Lk, 8), (B, H, Lk, 3))
    query, key, value = (torch.randn(s, requires_grad=True) for s in shapes)
    calls = [lam_kernels.global_local_attention(query, key, value, None, backend=backend)]
    if Lq == Lk:
        gates = [torch.randn(Lq, Lq, requires_grad=True) for _ in range(2)]
        calls.append(
            (lam_kernels.map_gated_attention(query, key, value, *gates, None, backend=backend),)
        )
    for results in calls:
        for out in results:
            assert out.shape == (B, H, Lq, 3)
            assert (out == 0).all()
            for grad in torch.autograd.grad(out.sum(), (query, key, value), retain_graph=True):
                assert (grad == 0).all()


# ---- refusals: ValueError or TypeError, naming the argument, what came and what was expected

x = torch.ones(2, 4, 5, 8)
gate = torch.ones(5, 5)
REFUSED = {
    "both: query is a list": ({"query": [1.0]}, TypeError, "query must be a Tensor, got list"),
    "both: 3-D key": ({"key": x[0]}, ValueError, r"key must be .*\(4, 5, 8\)"),
    "both: other heads": (
        {"key": x[:, :2], "value": x[:, :2]}, ValueError, "query's 4 heads, got 2",
    ),
    "both: wide value": (
        {"value": torch.ones(2, 4, 5, 300)}, ValueError, "value: head dim must be 1 to 256",
    ),
    "both: 3-D bias": ({"bias": torch.ones(2, 5, 5)}, ValueError, "bias must have 4 axes"),
    "both: boolean multiplier": (
        {"multiplier": gate.bool()}, TypeError, "multiplier must be float32",
    ),
    "both: multiplier is a list": (
        {"multiplier": [1.0]}, TypeError, "multiplier must be a Tensor, got list",
    ),
    "both: bias by its factors": (
        {"bias": lam_kernels.LowRankMask(x, x)}, TypeError,
        r"bias must be a Tensor, got a LowRankMask, .*: pass its \.dense\(\)",
    ),
    "both: short key_mask": (
        {"key_mask": torch.ones(2, 4).bool()}, ValueError, r"\[B, Lk\] = \[2, 5\], got",
    ),
    "both: pattern by name": ({"pattern": "local"}, TypeError, "pattern must be a pattern"),
    "both: two patterns": ({"pattern": [None] * 2}, ValueError, "2 entries, expected one .* of 4"),
    "both: tensor scale": ({"scale": torch.tensor(1.0)}, TypeError, "scale must be a float"),
    "both: unknown backend": ({"backend": "fast"}, ValueError, "backend must be one of cpu"),
    "gated: other length": (
        {"key": x[:, :, :4], "value": x[:, :, :4]}, ValueError, "query's length 5, got 4",
    ),
    "gated: too long": (
        {**dict.fromkeys(("query", "key", "value"), torch.ones(1, 1, 513, 2)),
         **dict.fromkeys(("gate_global", "gate_local"), torch.ones(513, 513))},
        ValueError, "at most 512 positions .*got 513",
    ),
    "gated: wide gate": (
        {"gate_local": torch.ones(6, 6)}, ValueError, r"gate_local .*\[(1, 1, )?5, 5\]",
    ),
    "gated: 1-D gate": (
        {"gate_global": torch.ones(5)}, ValueError, r"gate_global must be \[T, T\] = \[5, 5\]",
    ),
    "gated: broadcast gate": (
        {"gate_global": torch.ones(1, 5)}, ValueError, r"\[T, T\] = \[5, 5\], got \(1, 5\)",
    ),
    "gated: no gate": ({"gate_global": None}, TypeError, "gate_global must be a Tensor, got None"),
    "gated: integer gate": ({"gate_local": gate.long()}, TypeError, "gate_local must be float32"),
    "gated: double gate": (
        {"gate_local": gate.double()}, TypeError, "gate_local may be float64 only when query is",
    ),
    "gated: renormalise is a number": (
        {"renormalise": 1}, TypeError, "renormalise must be a bool, got int",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_refusals(case):
    changes, error, words = REFUSED[case]
    names = ("query", "key", "value")
    given = dict.fromkeys(names, x) | {"pattern": lam_kernels.Toeplitz(1), "backend": "reference"}
    op = "global_local_attention"
    if case.startswith("gated"):
        op, given = "map_gated_attention", given | {"gate_global": gate, "gate_local": gate}
    with pytest.raises(error, match=words):
        getattr(lam_kernels, op)(**given | changes)
    with pytest.raises(error, match=words):
        lam_kernels.explain(op, **given | changes)


@pytest.mark.backend("cpu")
@pytest.mark.parametrize("op", OPS)
def test_private_ops_stay_in_bounds(op):
    """Called directly with wrong tensors, the C++ operators refuse."""
    forward = getattr(torch.ops.lam_kernels, f"{op}_cpu_fwd")
    gates = (None, None) if op == "global_local_attention" else (gate, gate)
    settings = ([], 1.0) if op == "global_local_attention" else ([], 1.0, False)
    forward(x, x, x, *gates, None, [], *settings)
    wrong = [
        (x, x[:, :, :4], x, *gates, None),
        (x, x, x[..., :0], *gates, None),
        (x, x[:, :2], x[:, :2], *gates, None),
        (x, x.double(), x, *gates, None),
        (x, x, x, *gates, torch.ones(3, 5).bool()),
        (x, x, x, torch.ones(6, 6), gates[1], None),
        (x, x, x, gates[0], torch.ones(5, 5).long(), None),
    ]
    for tensors in wrong:
        with pytest.raises(RuntimeError):
            forward(*tensors, [], *settings)
    backward = getattr(torch.ops.lam_kernels, f"{op}_cpu_bwd")
    arguments = (x[:1], x, x, x, *gates, None, [], *settings)
    if op == "global_local_attention":
        lse = torch.ones(2, 4, 5)
        arguments = (x, x, x, x, x, *gates, None, [], x, x, lse, lse[:1], *settings)
    with pytest.raises(RuntimeError):
        backward(*arguments, [True] * 5)


# ---- which backend; what it counts


@pytest.mark.backend("cpu")
def test_explain():
    for op, more in (("global_local_attention", ()), ("map_gated_attention", (gate, gate))):
        found = lam_kernels.explain(op, x, x, x, *more, lam_kernels.Toeplitz(1))
        assert (found.op, found.backend) == (op, "cpu")
        assert "runs only when named" in str(found)


@pytest.mark.parametrize("op", OPS)
def test_flops(op):
    page = importlib.import_module(f"lam_kernels.ops.{op}")
    tensors = [torch.ones(2, 3, 7, 4, requires_grad=True) for _ in range(3)]
    gates = [torch.ones(7, 7, requires_grad=True) for _ in range(2)]
    local, whole = 7 + 2 * 6, 49  # pairs of Toeplitz(1), and all
    with FlopCounterMode(display=False) as counter:
        if op == "global_local_attention":
            results = page._call(
                (*tensors, None, None), (None,), (), (encode(lam_kernels.Toeplitz(1), 3)[0], 0.5),
                "reference",
            )  # fmt: skip
            forward, backward = whole * 8 + local * 4, whole * (12 + 8) + local * 8
        else:
            flat = encode(lam_kernels.Toeplitz(1), 3)[0]
            results = page._call((*tensors, *gates), (None,), (), (flat, 0.5, False), "reference")
            forward = whole * 8 + (whole + local) * 7
            backward = whole * (12 + 8 + 3 * 7) + local * 3 * 7
        loss(results).backward()
    assert counter.get_total_flops() == 2 * 6 * (forward + backward)


def cases_of_a_level(level: str):
    dtype = "bfloat16" if level.startswith("amx") else None
    return [random_case(op, number, dtype) for op in OPS for number in range(50_000, 50_005)]


if __name__ == "__main__":
    levels.print_failures(sys.argv[1], cases_of_a_level(sys.argv[1]), check)
