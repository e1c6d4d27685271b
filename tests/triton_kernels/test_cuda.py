"""What only CUDA tensors can show, of backends "triton" and "cuda": choice of the backend, streams,
graphs, compilation, memory.

Backend "cuda" takes part where its kernels were built and LAM_EMULATE_CUDA=0 is in the environment,
as in `make gpu-check`.
"""

from __future__ import annotations

import pytest
import torch
from on_gpu import moved
from problems import evaluate
from score_networks import assert_accurate as assert_network_accurate
from score_networks import case
from score_networks import evaluate as evaluate_network
from tolerance import assert_accurate

import lam_kernels
from lam_kernels import Causal, LowRankMask, masked_attention
from lam_kernels.ops import _cuda
from python_ref.inputs import Problem

pytestmark = [
    pytest.mark.backend("triton"),
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]

LONG = Problem(B=2, H=4, Lq=515, D=64, dtype="bfloat16", multiplier="11qk", bias="b1qk")
SHORT = Problem(B=4, H=4, Lq=50, D=64, dtype="bfloat16", multiplier="b1qk")
LOW_RANK = Problem(
    B=2, H=4, Lq=515, D=64, dtype="bfloat16", multiplier="rank 16: 11 11 11", bias="rank 100: b1 1h"
)
SHORT_LOW_RANK = SHORT.but(multiplier="rank 16: b1 11 11")
EACH = SHORT.but(bias="1hqk", pattern=("Causal()", None, "Toeplitz(9)", "Causal()"))
STREAMED = SHORT.but(Lq=310, D=128, multiplier="11qk", key_mask=True)
IN_TRITON = {
    "long": LONG,
    "short": SHORT,
    "low rank": LOW_RANK,
    "a pattern a head": EACH.but(Lq=130),
}
IN_CUDA = {
    "short": SHORT,
    "low rank": SHORT_LOW_RANK,
    "a pattern a head": EACH,
    "streamed": STREAMED,
    "float32": STREAMED.but(dtype="float32"),
}
not_emulated = pytest.mark.skipif(
    torch.cuda.is_available() and _cuda.emulated(), reason="only with LAM_EMULATE_CUDA=0"
)
BOTH = [
    *(pytest.param("triton", one, id=f"triton-{name}") for name, one in IN_TRITON.items()),
    *(
        pytest.param(
            "cuda", one, id=f"cuda-{name}", marks=(pytest.mark.backend("cuda"), not_emulated)
        )
        for name, one in IN_CUDA.items()
    ),
]
ONE_EACH = [param for param in BOTH if param.id in ("triton-long", "cuda-short")]


def leaf(tensor: torch.Tensor) -> torch.Tensor:
    return moved(tensor.detach(), "cuda").requires_grad_()


def on_cuda(problem: Problem):
    """(query, key, value, keywords) as leaves on the GPU."""
    o = problem.operands()
    leaves = [leaf(x) for x in (o.query, o.key, o.value)]
    masks = {}
    for name, value in o.masks().items():
        if isinstance(value, LowRankMask):
            masks[name] = LowRankMask(*map(leaf, value.factors()))
        elif isinstance(value, torch.Tensor):
            learned = name in ("multiplier", "bias")
            masks[name] = leaf(value) if learned else moved(value, "cuda")
        else:
            masks[name] = value
    return leaves, masks


def learned(masks) -> list[torch.Tensor]:
    found = []
    for mask in (masks["multiplier"], masks["bias"]):
        found += mask.factors() if isinstance(mask, LowRankMask) else [mask]
    return [x for x in found if x is not None]


def run(problem, leaves, masks, backend="triton"):
    out = masked_attention(*leaves, **masks, backend=backend)
    return out, torch.autograd.grad(out.float().square().sum(), [*leaves, *learned(masks)])


def test_triton_comes_first_where_cuda_does_not_serve():
    leaves, masks = on_cuda(SHORT)
    found = lam_kernels.explain("masked_attention", *leaves, **masks)
    assert found.backend in ("cuda", "triton")
    assert masked_attention(*leaves, **masks).device.type == "cuda"


@pytest.mark.parametrize(("backend", "problem"), BOTH)
def test_200_repeats_are_bitwise_equal(backend, problem):
    leaves, masks = on_cuda(problem)
    first = run(problem, leaves, masks, backend)
    for _ in range(200):
        again = run(problem, leaves, masks, backend)
        assert torch.equal(first[0], again[0])
        assert all(torch.equal(a, b) for a, b in zip(first[1], again[1], strict=True))


@pytest.mark.parametrize(("backend", "problem"), BOTH)
def test_graph_replay(backend, problem):
    leaves, masks = on_cuda(problem)
    out, gradients = run(problem, leaves, masks, backend)
    graph = torch.cuda.CUDAGraph()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run(problem, leaves, masks, backend)
    torch.cuda.current_stream().wait_stream(stream)
    with torch.cuda.graph(graph):
        captured = run(problem, leaves, masks, backend)
    with torch.no_grad():
        leaves[0].mul_(2)
    graph.replay()
    expected = run(problem, leaves, masks, backend)
    assert torch.equal(captured[0], expected[0])
    assert all(torch.equal(a, b) for a, b in zip(captured[1], expected[1], strict=True))
    assert not torch.equal(captured[0], out)
    assert len(gradients) == len(captured[1])


@pytest.mark.parametrize(("backend", "problem"), BOTH)
def test_no_wait_for_the_device(backend, problem):
    leaves, masks = on_cuda(problem)
    run(problem, leaves, masks, backend)
    torch.cuda.set_sync_debug_mode("error")
    try:
        run(problem, leaves, masks, backend)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize(("backend", "problem"), ONE_EACH)
def test_compiled_is_eager(backend, problem):
    leaves, masks = on_cuda(problem)

    def call(query, key, value, multiplier):
        return masked_attention(
            query, key, value, multiplier=multiplier, pattern=Causal(), backend=backend
        )

    compiled = torch.compile(call, fullgraph=True)
    assert torch.equal(compiled(*leaves, masks["multiplier"]), call(*leaves, masks["multiplier"]))


@pytest.mark.parametrize(("backend", "problem"), ONE_EACH)
def test_another_stream(backend, problem):
    leaves, masks = on_cuda(problem)
    expected, _ = run(problem, leaves, masks, backend)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        out, _ = run(problem, leaves, masks, backend)
    stream.synchronize()
    assert torch.equal(out, expected)


def peak_bytes(query, key, value, mask) -> int:
    """Above what was there before, of a forward and a backward pass."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    out = masked_attention(query, key, value, multiplier=mask, backend="triton")
    out.backward(torch.ones_like(out))
    return torch.cuda.max_memory_allocated() - before


def random_heads(*shape: int) -> list[torch.Tensor]:
    return [
        torch.randn(shape, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        for _ in range(3)
    ]


def test_memory_is_the_gradients_and_vectors():
    """Forward and backward of a shared mask: far below one [B, H, Lq, Lk]."""
    B, H, L = 4, 8, 2048
    q, k, v = random_heads(B, H, L, 64)
    mask = torch.ones(1, 1, L, L, device="cuda", requires_grad=True)
    peak = peak_bytes(q, k, v, mask)
    operands_bytes = 4 * q.numel() * q.element_size()
    assert peak < 3 * operands_bytes + 2 * mask.numel() * mask.element_size()
    assert peak < B * H * L * L * 2


def test_a_long_low_rank_mask_takes_no_square_of_memory():
    """A dense mask alone would be 2 GiB."""
    L, rank = 32768, 16
    q, k, v = random_heads(1, 8, L, 64)
    factors = (torch.randn(1, 1, L, rank, device="cuda", requires_grad=True) for _ in range(2))
    # the operands' gradients, out and its gradient, one part a head of one factor's
    assert peak_bytes(q, k, v, LowRankMask(*factors)) < 7 * q.numel() * q.element_size()


@pytest.mark.parametrize("problem", [LONG.but(Lq=130), LOW_RANK.but(Lq=130), SHORT_LOW_RANK])
def test_suite_runs_on_the_gpu(problem):
    """The operator tests' own way: CPU operands, kernels on the GPU."""
    result = evaluate(problem, "triton")
    assert_accurate(result, problem)


@pytest.mark.parametrize("heads", ["each", "mean"])
def test_a_network_of_the_scores(heads):
    """The paper's depth, bitwise the same every time: several blocks a program, several parts."""
    one = case(B=9, H=8, Lq=300, Lk=32, D=32, depth=32, hidden=32, heads=heads, dtype="bfloat16")
    first = evaluate_network(one, "triton")
    assert_network_accurate(first, one)
    for _ in range(50):
        for name, tensor in evaluate_network(one, "triton").items():
            assert torch.equal(first[name], tensor), name
