"""Rows whose scores all lie far from 0 (csrc/cpu/far_rows.h)."""

from __future__ import annotations

import pytest
import torch
from floors import Summands
from tolerance import GRADIENT_FACTOR, violations

from lam_kernels import Toeplitz, global_local_attention, masked_attention


@pytest.mark.parametrize(
    ("dtype", "far"),
    [(torch.float32, -1e9), (torch.float32, None), (torch.bfloat16, -1e9), (torch.float64, -1e17)],
    ids=str,
)
@pytest.mark.parametrize("L", [9, 400])  # in one region, in several
def test_rows_whose_scores_are_all_far_from_0(dtype, far, L):
    """Padded rows of a mask that adds a large negative number: lse has no digits left for the
    logarithm of their sums, and yet their gradients are those of weights that add up to 1."""
    torch.manual_seed(0)
    far = torch.finfo(dtype).min if far is None else far
    bias = torch.zeros(2, 1, L, L, dtype=dtype)
    bias[0, :, :3] = far  # every key alike: 1 / L each
    bias[1, :, :, :4] = far  # in these rows only the keys that bias really hides
    operands = [torch.randn(2, 2, L, 8, dtype=dtype, requires_grad=True) for _ in range(3)]
    seed = torch.randn(2, 2, L, 8, dtype=dtype)

    def both(*tensors, **keywords):
        return global_local_attention(*tensors, pattern=Toeplitz(2), **keywords)

    def gradients(call, backend, bias, tensors):
        out = call(*tensors, bias=bias, backend=backend)
        outs = out if isinstance(out, tuple) else (out,)
        return torch.autograd.grad(outs, tensors, [seed.to(outs[0].dtype)] * len(outs))

    for call in (masked_attention, both):
        got, same = (gradients(call, backend, bias, operands) for backend in ("cpu", "reference"))
        # in float64 it takes more to leave nothing of the scores
        exact_bias = bias.double().masked_fill(bias != 0, -1e300)
        exact = gradients(call, "reference", exact_bias, [x.double() for x in operands])
        for name, *three in zip(("query", "key", "value"), got, exact, same, strict=True):
            summed = three[1].abs().sum(2, keepdim=True).expand_as(three[1])
            floor = Summands(summed, summed)
            assert violations(name, *three, GRADIENT_FACTOR, floor, dtype) == []
