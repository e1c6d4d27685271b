"""serve_sdpa: calls of F.scaled_dot_product_attention, every argument, and what it leaves."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from lam_kernels.swap import serve_sdpa

torch_sdpa = F.scaled_dot_product_attention


def operands(*batch, Lq=5, Lk=7, D=4, Dv=4, kv_heads=None):
    torch.manual_seed(0)
    kv = batch if kv_heads is None else (*batch[:-1], kv_heads)
    shapes = ((*batch, Lq, D), (*kv, Lk, D), (*kv, Lk, Dv))
    return [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]


def visible(*shape):
    keep = torch.rand(shape) < 0.7
    keep[..., 0] = True
    return keep


CASES = {
    "plain": ((2, 3), {}, {}),
    "two axes": ((), {}, {}),
    "three axes": ((2,), {}, {}),
    "five axes": ((2, 2, 3), {}, {}),
    "causal": ((2, 3), {"is_causal": True}, {}),
    "scale": ((2, 3), {"scale": 0.3}, {}),
    "bool mask": ((2, 3), {"attn_mask": visible(5, 7)}, {}),
    "bool mask each": ((2, 3), {"attn_mask": visible(2, 3, 5, 7)}, {}),
    "mask of a 3-D call": ((2,), {"attn_mask": visible(2, 5, 7)}, {}),
    "mask of a 5-D call": ((2, 2, 3), {"attn_mask": visible(2, 2, 1, 5, 7)}, {}),
    "float mask": ((2, 3), {"attn_mask": torch.randn(1, 3, 5, 7).double()}, {}),
    "padding": ((2, 3), {"attn_mask": visible(2, 1, 1, 7)}, {}),
    "gqa": ((2, 4), {"enable_gqa": True}, {"kv_heads": 2}),
    "wide values": ((2, 3), {}, {"Dv": 9}),
}


@pytest.mark.parametrize("case", CASES)
def test_the_same_as_torch(case, spy):
    batch, options, shape = CASES[case]
    tensors = operands(*batch, **shape)
    mask = options.get("attn_mask")
    if mask is not None and mask.is_floating_point():
        mask.requires_grad_()
        tensors.append(mask)
    expected = torch_sdpa(*tensors[:3], **options)
    cotangent = torch.randn_like(expected)
    with serve_sdpa() as served, spy() as seen:
        out = F.scaled_dot_product_attention(*tensors[:3], **options)
    assert (served.calls, dict(served.left), seen.forwards) == (1, {}, 1)
    torch.testing.assert_close(out, expected)
    for ours, theirs in zip(
        torch.autograd.grad(out, tensors, cotangent),
        torch.autograd.grad(expected, tensors, cotangent),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs)


def test_only_within_the_block_and_only_this_function(spy):
    q, k, v = operands(2, 3)
    with spy() as seen:
        F.scaled_dot_product_attention(q, k, v)
        with serve_sdpa() as served:
            F.softmax(q, -1)
    assert (seen.forwards, served.calls) == (0, 0)
    assert F.scaled_dot_product_attention is torch_sdpa


def test_dropout_draws():
    q, k, v = operands(2, 3)
    with serve_sdpa() as served:
        first, second = (F.scaled_dot_product_attention(q, k, v, dropout_p=0.5) for _ in range(2))
    assert served.calls == 2
    assert not torch.equal(first, second)


def test_what_is_left_is_counted_with_its_reason():
    wide = [t.float() for t in operands(1, 1, D=300, Dv=300)]
    q, k, v = operands(2, 3)
    complex_mask = torch.zeros(2, 3, 5, 7)
    with serve_sdpa() as served:
        F.scaled_dot_product_attention(*wide)
        F.scaled_dot_product_attention(q.float(), k.float(), v.float(), complex_mask)
        with pytest.raises(RuntimeError):
            F.scaled_dot_product_attention(q, k[:, :, :, :2], v)
    assert served.calls == 1
    assert sum(served.left.values()) == 2
    text = str(served)
    assert "1 calls served" in text
    assert "head dim 300" in text


def test_a_named_backend_never_falls_back(monkeypatch):
    monkeypatch.setattr("lam_kernels.ops._cuda.unavailable", lambda: "not here")
    q, k, v = (t.float() for t in operands(2, 3))
    with serve_sdpa(backend="reference") as served:
        F.scaled_dot_product_attention(q, k, v)
    assert served.calls == 1
    with (
        serve_sdpa(backend="cuda"),
        pytest.raises(RuntimeError, match='backend="cuda" cannot serve'),
    ):
        F.scaled_dot_product_attention(q, k, v)


@pytest.mark.parametrize("reentrant", [False, True])
def test_with_activation_checkpointing(reentrant):
    """The backward pass computes the call again: served again, where it is called in the block."""
    leaves = operands(2, 3)

    def attention(query, key, value):
        return F.scaled_dot_product_attention(2 * query, key, value)

    expected = torch.autograd.grad(attention(*leaves).square().sum(), leaves)
    with serve_sdpa() as served:
        out = checkpoint(attention, *leaves, use_reentrant=reentrant)
        out.square().sum().backward()
    # torch stops computing again where it has what was saved: within that call
    assert served.calls == (2 if reentrant else 1)
    assert not served.left
    for leaf, wanted in zip(leaves, expected, strict=True):
        torch.testing.assert_close(leaf.grad, wanted)
    with serve_sdpa():
        attention(*leaves).square().sum().backward(inputs=leaves[0], retain_graph=True)
        with pytest.raises(RuntimeError, match="only for scalar outputs"):
            attention(*leaves).backward()
        attention(*leaves).backward(torch.ones(2, 3, 5, 4, dtype=torch.float64))


def test_under_compile(spy):
    torch._dynamo.reset()
    q, k, v = operands(2, 3)

    def model(q, k, v):
        return F.scaled_dot_product_attention(q, k, v, is_causal=True) * 2

    compiled = torch.compile(model, backend="aot_eager")
    expected = model(q, k, v)
    with serve_sdpa():
        torch.testing.assert_close(compiled(q, k, v), expected)
    torch.testing.assert_close(compiled(q, k, v), expected)
    torch._dynamo.reset()


def test_a_model_that_calls_it_directly(spy):
    """transformers' sdpa attention, whole."""
    pytest.importorskip("transformers", reason="transformers is not installed")
    from tiny_models import batch, build

    model, inputs = build("llama", "sdpa").eval(), batch("llama")
    valid = inputs["attention_mask"].bool()
    expected = model(**inputs).logits[valid]
    with serve_sdpa() as served, spy() as seen:
        out = model(**inputs).logits[valid]
    assert (served.calls, seen.forwards) == (2, 2)
    torch.testing.assert_close(out, expected)
