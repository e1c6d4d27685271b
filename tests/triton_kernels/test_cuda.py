"""What only CUDA tensors can show: choice of the backend, streams, graphs, compilation, memory."""

from __future__ import annotations

import pytest
import torch
from on_gpu import moved
from problems import evaluate
from tolerance import assert_accurate

import lam_kernels
from lam_kernels import Causal, masked_attention
from python_ref.inputs import Problem

pytestmark = [
    pytest.mark.backend("triton"),
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]

LONG = Problem(B=2, H=4, Lq=515, D=64, dtype="bfloat16", multiplier="11qk", bias="b1qk")
SHORT = Problem(B=4, H=4, Lq=50, D=64, dtype="bfloat16", multiplier="b1qk")


def on_cuda(problem: Problem):
    """(query, key, value, keywords) as leaves on the GPU."""
    o = problem.operands()
    leaves = [moved(x, "cuda").requires_grad_() for x in (o.query, o.key, o.value)]
    masks = {
        name: moved(value.detach(), "cuda") if isinstance(value, torch.Tensor) else value
        for name, value in o.masks().items()
    }
    for name in ("multiplier", "bias"):
        if masks[name] is not None:
            masks[name].requires_grad_()
    return leaves, masks


def run(problem, leaves, masks):
    out = masked_attention(*leaves, **masks, backend="triton")
    wanted = [x for x in (*leaves, masks["multiplier"], masks["bias"]) if x is not None]
    return out, torch.autograd.grad(out.float().square().sum(), wanted)


def test_triton_comes_first_where_cuda_does_not_serve():
    leaves, masks = on_cuda(SHORT)
    found = lam_kernels.explain("masked_attention", *leaves, **masks)
    assert found.backend in ("cuda", "triton")
    assert masked_attention(*leaves, **masks).device.type == "cuda"


@pytest.mark.parametrize("problem", [LONG, SHORT], ids=["long", "short"])
def test_200_repeats_are_bitwise_equal(problem):
    leaves, masks = on_cuda(problem)
    first = run(problem, leaves, masks)
    for _ in range(200):
        again = run(problem, leaves, masks)
        assert torch.equal(first[0], again[0])
        assert all(torch.equal(a, b) for a, b in zip(first[1], again[1], strict=True))


@pytest.mark.parametrize("problem", [LONG, SHORT], ids=["long", "short"])
def test_graph_replay(problem):
    leaves, masks = on_cuda(problem)
    out, gradients = run(problem, leaves, masks)
    graph = torch.cuda.CUDAGraph()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run(problem, leaves, masks)
    torch.cuda.current_stream().wait_stream(stream)
    with torch.cuda.graph(graph):
        captured = run(problem, leaves, masks)
    with torch.no_grad():
        leaves[0].mul_(2)
    graph.replay()
    expected = run(problem, leaves, masks)
    assert torch.equal(captured[0], expected[0])
    assert all(torch.equal(a, b) for a, b in zip(captured[1], expected[1], strict=True))
    assert not torch.equal(captured[0], out)
    assert len(gradients) == len(captured[1])


def test_no_wait_for_the_device():
    leaves, masks = on_cuda(LONG)
    run(LONG, leaves, masks)
    torch.cuda.set_sync_debug_mode("error")
    try:
        run(LONG, leaves, masks)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_compiled_is_eager():
    leaves, masks = on_cuda(LONG)

    def call(query, key, value, multiplier):
        return masked_attention(query, key, value, multiplier=multiplier, pattern=Causal())

    compiled = torch.compile(call, fullgraph=True)
    assert torch.equal(compiled(*leaves, masks["multiplier"]), call(*leaves, masks["multiplier"]))


def test_another_stream():
    leaves, masks = on_cuda(LONG)
    expected, _ = run(LONG, leaves, masks)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        out, _ = run(LONG, leaves, masks)
    stream.synchronize()
    assert torch.equal(out, expected)


def test_memory_is_the_gradients_and_vectors():
    """Forward and backward of a shared mask: far below one [B, H, Lq, Lk]."""
    B, H, L, D = 4, 8, 2048, 64
    q, k, v = (
        torch.randn(B, H, L, D, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        for _ in range(3)
    )
    mask = torch.ones(1, 1, L, L, device="cuda", requires_grad=True)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    out = masked_attention(q, k, v, multiplier=mask, backend="triton")
    out.backward(torch.ones_like(out))
    peak_bytes = torch.cuda.max_memory_allocated() - before
    operands_bytes = 4 * q.numel() * q.element_size()
    assert peak_bytes < 3 * operands_bytes + 2 * mask.numel() * mask.element_size()
    assert peak_bytes < B * H * L * L * 2


def test_suite_runs_on_the_gpu():
    """The operator tests' own way: CPU operands, kernels on the GPU."""
    problem = LONG.but(Lq=130)
    result = evaluate(problem, "triton")
    assert_accurate(result, problem)
