"""How the CPU kernels read booleans (csrc/cpu/visibility.h)."""

from __future__ import annotations

import torch

from lam_kernels import masked_attention


def test_any_byte_but_zero_is_true():
    """Bool tensors that are views of bytes, 8 of which are looked at together."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 2, 77, 8) for _ in range(3))
    values = torch.tensor([0, 1, 2, 127, 128, 255], dtype=torch.uint8)
    mask = values[torch.randint(6, (2, 1, 77, 77))]
    got = masked_attention(q, k, v, attn_mask=mask.view(torch.bool), backend="cpu")
    assert torch.equal(got, masked_attention(q, k, v, attn_mask=mask != 0, backend="cpu"))
