"""torch.compile takes a tensor that was allocated and then filled for one without a gradient."""

from __future__ import annotations

import pytest
import torch

import lam_kernels
from lam_kernels import Toeplitz


@pytest.mark.parametrize("op", ["masked_attention", "global_local_attention"])
def test_keys_that_were_filled_in_place_keep_their_gradient(op):
    """As DeepSeek's are."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    x = torch.randn(2, 3, 7, 8, requires_grad=True)
    options = {} if op == "masked_attention" else {"pattern": Toeplitz(2)}

    def attend(x):
        key = x.new_empty(x.shape)
        key[..., :4].copy_(x[..., :4])
        key[..., 4:].copy_(x[..., 4:] * 2)
        out = getattr(lam_kernels, op)(x.detach(), key, x.detach(), **options)
        return sum(one.square().sum() for one in (out if isinstance(out, tuple) else (out,)))

    expected = torch.autograd.grad(attend(x), x)
    compiled = torch.compile(attend, backend="aot_eager")
    torch.testing.assert_close(torch.autograd.grad(compiled(x), x), expected)
    torch._dynamo.reset()
