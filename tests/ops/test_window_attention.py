"""window_attention: a thin function over masked_attention, so its own tests are thin too."""

import pytest
import torch
from backends import widest

import lam_kernels
from lam_kernels import window_attention


def windows(B=6, H=3, N=16, D=5, dtype=torch.float64):
    torch.manual_seed(0)
    query, key, value = (torch.randn(B, H, N, D, dtype=dtype).requires_grad_() for _ in range(3))
    bias = torch.randn(H, N, N, dtype=dtype).requires_grad_()
    return query, key, value, bias


def by_hand(query, key, value, bias, segments=None, scale=None):
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    scores = query @ key.transpose(-1, -2) * scale + bias
    if segments is not None:
        hidden = segments[:, :, None] != segments[:, None, :]
        hidden = hidden.repeat(query.shape[0] // segments.shape[0], 1, 1)[:, None]
        scores = scores.masked_fill(hidden, -torch.inf)
    return torch.softmax(scores, dim=-1) @ value


@pytest.mark.parametrize("scale", [None, 1.0])
@pytest.mark.parametrize("cut", [None, 1, 2, 6])
def test_formula_and_gradients(backend, cut, scale):
    operands = windows(dtype=getattr(torch, widest(backend)))
    segments = None if cut is None else torch.randint(0, 3, (cut, 16))
    out = window_attention(*operands, segments=segments, scale=scale, backend=backend)
    expected = by_hand(*operands, segments, scale)
    torch.testing.assert_close(out, expected)
    cotangent = torch.randn(out.shape, dtype=out.dtype)
    for ours, theirs in zip(
        torch.autograd.grad(out, operands, cotangent),
        torch.autograd.grad(expected, operands, cotangent),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs)


def test_a_wrong_order_of_windows_would_be_seen():
    operands, segments = windows(), torch.randint(0, 3, (2, 16))
    out = window_attention(*operands, segments=segments)
    assert not torch.allclose(out, by_hand(*operands, segments.flip(0)))


def test_the_bias_is_never_copied_per_window():
    """What is saved for the gradient: the operands, the result, lse and one id a position."""
    query, key, value, bias = windows(B=64, dtype=torch.float32)
    saved = {}
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: saved.setdefault(t.data_ptr(), t.untyped_storage().nbytes()) and t, lambda t: t
    ):
        window_attention(query, key, value, bias, segments=torch.randint(0, 2, (8, 16)))
    whole = 64 * 3 * 16 * 16 * 4  # [windows, heads, N, N]
    assert bias.untyped_storage().nbytes() in saved.values()
    assert (
        sum(saved.values()) < 4 * query.numel() * 4 + 64 * 3 * 16 * 4 + 2 * 64 * 16 * 8 + whole / 8
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bias": torch.zeros(1, 3, 16, 16)}, r"bias \[heads, N, N\], got shapes"),
        ({"bias": torch.zeros(2, 16, 16)}, "bias has shape"),
        ({"segments": torch.zeros(4, 16, dtype=torch.long)}, "with windows dividing 6"),
        ({"segments": torch.zeros(6, 9, dtype=torch.long)}, r"segments must be \[windows, 16\]"),
        ({"segments": torch.zeros(6, 16)}, "must hold integers"),
        ({"segments": [1]}, "segments must be a Tensor, got list"),
        ({"bias": None}, "bias must be a Tensor, got NoneType"),
    ],
)
def test_bad_arguments_are_named(change, message):
    query, key, value, bias = (t.detach().float() for t in windows())
    given = {"bias": bias, **change}
    with pytest.raises((TypeError, ValueError), match=message):
        window_attention(query, key, value, given.pop("bias"), **given)


def test_explain():
    found = lam_kernels.explain("window_attention", *windows())
    assert (found.op, found.backend) == ("window_attention", "cpu")


def test_compiles_to_one_graph():
    operands, segments = windows(dtype=torch.float32), torch.randint(0, 3, (2, 16))
    compiled = torch.compile(window_attention, fullgraph=True, backend="aot_eager")
    out = compiled(*operands, segments=segments)
    torch.testing.assert_close(out, by_hand(*operands, segments))
    out.sum().backward()
    assert operands[3].grad.shape == (3, 16, 16)
    torch._dynamo.reset()
