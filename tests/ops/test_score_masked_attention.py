"""Forward and gradients of score_masked_attention, every backend and dtype, from one table."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from backends import BY_NAME, repeats, widest
from score_networks import Case, Drawn, assert_accurate, case, check, evaluate, random_case

import lam_kernels
from lam_kernels import explain, score_masked_attention

CASES = {
    "paper": case(Lq=20, Lk=32, D=32, depth=32, hidden=32, key_mask=True),
    "one layer": case(Lq=33, Lk=17, depth=1),
    "two layers": case(Lq=33, Lk=50, depth=2, hidden=7),
    "add": case(Lq=33, Lk=32, fusion="add", key_mask=True),
    "mean": case(B=2, H=3, Lq=33, Lk=32, heads="mean", key_mask=True),
    "mean, add": case(B=2, H=4, Lq=33, Lk=20, D=24, Dv=40, heads="mean", fusion="add"),
    "one key": case(Lq=33, Lk=1, hidden=5),
    "one row": case(Lq=1, Lk=33, hidden=16),
    "narrow": case(Lq=50, Lk=33, hidden=1),
    "wide": case(Lq=18, Lk=33, hidden=300, depth=2),
    "most keys": case(Lq=34, Lk=128, hidden=64),
    "unequal head dims": case(Lq=34, Lk=20, D=80, Dv=3),
    "sample without keys": case(B=3, Lq=33, Lk=20, key_mask=True, fill="dead"),
    "mean without keys": case(B=3, Lq=33, Lk=20, key_mask=True, fill="dead", heads="mean"),
    "loud padding": case(B=2, Lq=33, Lk=40, key_mask=True, fill="loud"),
    "several blocks": case(B=1, H=2, Lq=515, Lk=32, depth=4, hidden=32),
    "several blocks, mean": case(B=1, H=2, Lq=300, Lk=40, heads="mean", hidden=40),
    "negative scale": case(Lq=33, Lk=20, scale=-0.4),
    "many samples": case(B=9, H=3, Lq=10, Lk=20, D=8),
}


@pytest.mark.parametrize("name", CASES)
def test_case(name, backend, dtype):
    check(CASES[name].but(dtype=dtype), backend)


@pytest.mark.parametrize("D", [1, 3, 16, 24, 40, 128, 256])
def test_head_dims(D, backend):
    for dtype in ("float32", "bfloat16"):
        check(case(B=1, Lq=19, Lk=21, D=D, Dv=257 - D, dtype=dtype), backend)


@pytest.mark.parametrize("Lk", [2, 15, 16, 31, 63, 64, 65, 127])
def test_keys(Lk, backend):
    for heads in ("each", "mean"):
        check(case(B=1, Lq=19, Lk=Lk, heads=heads, hidden=Lk), backend)


@pytest.mark.parametrize("layout", ["transposed", "sliced", "expanded", "last_strided"])
@pytest.mark.parametrize("of", ["layout", "mask_layout", "grad_layout"])
def test_strides(of, layout, backend):
    for dtype in ("float32", "bfloat16"):
        check(case(B=3, Lq=33, Lk=20, D=24, Dv=40, dtype=dtype, **{of: layout}), backend)


@pytest.mark.parametrize("grads", ["", "q", "k", "v", "m", "b", "mb", "qm", "qkv"])
def test_only_wanted_gradients(grads, backend, dtype):
    check(case(Lq=34, Lk=20, dtype=dtype, grads=grads), backend)


def test_network_has_its_own_dtype(backend):
    for dtype in ("float32", "bfloat16"):
        for network in ("bfloat16", "float16", "float32"):
            one = case(Lq=33, Lk=20, dtype=dtype, network_dtype=network)
            result = evaluate(one, backend)
            assert result["weight 0"].dtype == getattr(torch, network)
            assert_accurate(result, one)


@pytest.mark.parametrize(
    "first",
    [pytest.param(n, marks=[pytest.mark.full] if n else []) for n in range(0, 120, 20)],
)
def test_random_cases(first, backend):
    failures = []
    for seed in range(first, first + (20 if backend != "reference" else 4)):
        one = random_case(seed)
        if one.problem.dtype in BY_NAME[backend].dtypes:
            try:
                check(one, backend)
            except AssertionError as failure:
                failures.append(str(failure))
    assert not failures, "\n".join(failures)


# ---- what it must be equal to


@pytest.mark.parametrize("fusion", ["mul", "add"])
def test_a_constant_network_is_plain_attention(fusion, backend):
    """Last weight 0: M is the last bias, whatever the scores (the identity start of the LAM)."""
    dtype = widest(backend)
    drawn = Drawn(case(Lq=33, Lk=20, fusion=fusion, dtype=dtype, key_mask=True))
    o, (*_, last), (*_, bias) = drawn.operands, drawn.weights, drawn.biases
    with torch.no_grad():
        last.zero_()
        bias.fill_(1.0 if fusion == "mul" else 0.0)
    out = drawn.call(backend=backend)
    same = lam_kernels.masked_attention(
        o.query, o.key, o.value, key_mask=o.key_mask, backend=backend
    )
    torch.testing.assert_close(out, same)


@pytest.mark.parametrize("heads", ["each", "mean"])
@pytest.mark.parametrize("fusion", ["mul", "add"])
def test_more_keys_are_composed(fusion, heads, backend):
    """Above 128 keys the same formulas from other ops; explain says what it costs."""
    one = case(B=2, H=2, Lq=20, Lk=140, hidden=9, fusion=fusion, heads=heads, key_mask=True)
    for dtype in ("float32", "bfloat16"):
        check(one.but(dtype=dtype), backend)
    drawn = Drawn(one)
    found = drawn.call(lambda *a, **k: explain("score_masked_attention", *a, **k), backend=backend)
    assert found.backend == backend
    assert found.op == "score_masked_attention"
    if backend != "reference":
        assert "Lk = 140 is above 128" in str(found)
        assert "activations of all 3 layers are stored" in str(found)
    at_most = Drawn(case(Lk=128))
    found = at_most.call(
        lambda *a, **k: explain("score_masked_attention", *a, **k), backend=backend
    )
    assert "above" not in str(found)


def test_batch_mates(backend):
    drawn = Drawn(case(B=3, Lq=20, Lk=20, dtype=widest(backend), key_mask=True))
    o = drawn.operands
    everyone = drawn.call(backend=backend)
    for b in range(3):
        alone = score_masked_attention(
            *(x[b : b + 1] for x in (o.query, o.key, o.value)), drawn.weights, drawn.biases,
            key_mask=o.key_mask[b : b + 1], backend=backend,
        )  # fmt: skip
        torch.testing.assert_close(alone[0], everyone[b])


def test_hidden_keys_do_not_reach_the_network(backend):
    """Other keys and values where key_mask hides: not a bit changes."""
    one = case(B=2, Lq=20, Lk=24, key_mask=True)
    first, drawn = evaluate(one, backend), Drawn(one)
    hidden = ~drawn.operands.key_mask[:, None, :, None]
    for name in ("key", "value"):
        tensor = getattr(drawn.operands, name)
        with torch.no_grad():
            tensor.copy_(torch.where(hidden, 7.0, tensor))
    second = evaluate(one, backend, drawn)
    for name in first:
        assert torch.equal(first[name], second[name]), name


@pytest.mark.parametrize("threads", [1, 2, 3, 5])
@pytest.mark.parametrize("heads", ["each", "mean"])
def test_repeats(heads, threads, backend):
    torch.set_num_threads(threads)
    for dtype in ("float32", "bfloat16"):
        one = case(B=3, H=2, Lq=130, Lk=32, heads=heads, hidden=32, dtype=dtype)
        check(one, backend)
        first = evaluate(one, backend)
        for _ in range(repeats(backend, 5)):
            for name, tensor in evaluate(one, backend).items():
                assert torch.equal(first[name], tensor), name


def test_gradcheck(backend):
    if "float64" not in BY_NAME[backend].dtypes:
        pytest.skip(f"{backend} has no float64")
    sizes = {"B": 2, "H": 2, "Lq": 3, "Lk": 4, "D": 3, "Dv": 2, "dtype": "float64"}
    for heads, fusion in (("each", "mul"), ("mean", "add")):
        drawn = Drawn(case(depth=2, hidden=5, heads=heads, fusion=fusion, key_mask=True, **sizes))
        leaves = drawn.leaves

        def f(*tensors, drawn=drawn, leaves=leaves):
            given = dict(zip(leaves, tensors, strict=True))
            n = drawn.case.depth
            return score_masked_attention(
                given["query"], given["key"], given["value"],
                [given[f"weight {layer}"] for layer in range(n)],
                [given[f"bias {layer}"] for layer in range(n)],
                fusion=drawn.case.fusion, heads=drawn.case.heads,
                key_mask=drawn.operands.key_mask, backend=backend,
            )  # fmt: skip

        assert torch.autograd.gradcheck(f, list(leaves.values()))
        if BY_NAME[backend].double_backward:
            assert torch.autograd.gradgradcheck(f, list(leaves.values()))


@pytest.mark.parametrize("sizes", [(0, 2, 5, 6), (2, 0, 5, 6), (2, 2, 0, 6), (2, 2, 5, 0)])
def test_nothing_to_attend(sizes, backend):
    B, H, Lq, Lk = sizes
    q, k, v = (torch.randn(B, H, n, 8, requires_grad=True) for n in (Lq, Lk, Lk))
    weights = [torch.randn(Lk, 3, requires_grad=True), torch.randn(3, Lk, requires_grad=True)]
    biases = [torch.randn(3), torch.randn(Lk)]
    out = score_masked_attention(q, k, v, weights, biases, backend=backend)
    assert out.shape == (B, H, Lq, 8)
    assert (out == 0).all()
    for grad in torch.autograd.grad(out.sum(), [q, k, v, *weights]):
        assert (grad == 0).all()


MEMORY = """
import resource, torch, lam_kernels
torch.set_num_threads(2)
n, B, H, Lq, Lk = 32, 8, 8, 600, 32
weights = [torch.randn(Lk, Lk, requires_grad=True) for _ in range(n)]
biases = [torch.zeros(Lk, requires_grad=True) for _ in range(n)]
def run(Lq):
    q, k, v = (torch.randn(B, H, L, 16, requires_grad=True) for L in (Lq, Lk, Lk))
    lam_kernels.score_masked_attention(q, k, v, weights, biases, backend="cpu").sum().backward()
run(8)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
run(Lq)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)
"""


@pytest.mark.backend("cpu")
def test_activations_are_not_stored():
    """32 activations of [8, 8, 600, 32] would be 150 MiB."""
    done = subprocess.run([sys.executable, "-c", MEMORY], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    stored = 32 * 8 * 8 * 600 * 32 * 4 / 2**20
    assert float(done.stdout) < stored / 5, f"{float(done.stdout):.0f} MiB, {stored:.0f} if stored"


# ---- the check itself: each of these mistakes must be found


def forgotten_mean(one, result):
    """dA is divided by the number of heads."""
    part = evaluate(Case(one.problem, one.depth, one.hidden, one.fusion, "each"), "reference")
    result["query"] = part["query"]


def forgotten_padding(one, result):
    """Hidden keys are left in the network's input."""
    drawn = Drawn(one)
    shown = torch.ones_like(drawn.operands.key_mask)
    attend = lam_kernels.masked_attention
    key_mask, drawn.operands.key_mask = drawn.operands.key_mask, shown

    def leaky(query, key, value, weights, biases, *, key_mask=key_mask, **options):
        scores = query @ key.mT * query.shape[-1] ** -0.5
        for layer, (weight, bias) in enumerate(zip(weights, biases, strict=True)):
            scores = (scores.relu() if layer else scores) @ weight + bias
        return attend(query, key, value, multiplier=scores, key_mask=mask, backend="reference")

    mask = key_mask
    result.update(drawn.with_gradients(drawn.call(leaky)))


def scaled(name, factor):
    def plant(one, result):
        result[name] = result[name] * factor

    return plant


def without_a_head(one, result):
    drawn = Drawn(one)
    drawn.operands.grad_out = drawn.operands.grad_out.clone()
    drawn.operands.grad_out[:, 1] = 0
    result["weight 1"] = evaluate(one, "reference", drawn)["weight 1"]


FAULTS = {
    "mean not divided": (case(heads="mean", Lq=33, Lk=20), forgotten_mean),
    "padding in the input": (case(Lq=33, Lk=20, key_mask=True), forgotten_padding),
    "weight by 1.01": (case(Lq=33, Lk=20), scaled("weight 1", 1.01)),
    "bias by 1.01": (case(Lq=33, Lk=20), scaled("bias 0", 1.01)),
    "out by 1.01": (case(Lq=33, Lk=20), scaled("out", 1.01)),
    "weight without a head": (case(Lq=33, Lk=20), without_a_head),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_planted_fault_is_found(fault):
    one, plant = FAULTS[fault]
    result = evaluate(one, "reference")
    assert_accurate(result, one)
    plant(one, result)
    with pytest.raises(AssertionError):
        assert_accurate(result, one)
