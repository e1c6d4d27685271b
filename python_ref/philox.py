"""Philox4x32-10, the counter-based generator behind dropout.

The same bits in Python, C++ and Triton, whatever the order in which pairs are visited. Source:
Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011.
"""

from __future__ import annotations

import torch
from torch import Tensor

_ROUNDS = 10
_MULTIPLIER_0, _MULTIPLIER_1 = 0xD2511F53, 0xCD9E8D57
_WEYL_0, _WEYL_1 = 0x9E3779B9, 0xBB67AE85
_LOW = 0xFFFFFFFF


def philox4x32(counter: tuple[Tensor, ...], key: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
    """Four words for each counter; all tensors are int64 with values of 32 bits and broadcast."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(_ROUNDS):
        # the product needs 64 bits: its sign bit is a value bit here, which the mask after >> takes
        # care of
        product_0, product_1 = c0 * _MULTIPLIER_0, c2 * _MULTIPLIER_1
        c0, c1, c2, c3 = (
            ((product_1 >> 32) & _LOW) ^ c1 ^ k0,
            product_1 & _LOW,
            ((product_0 >> 32) & _LOW) ^ c3 ^ k1,
            product_0 & _LOW,
        )
        k0, k1 = (k0 + _WEYL_0) & _LOW, (k1 + _WEYL_1) & _LOW
    return c0, c1, c2, c3


def kept_pairs(
    rng_state: Tensor, dropout_p: float, B: int, H: int, Lq: int, Lk: int, device=None
) -> Tensor:  # [B, H, Lq, Lk]
    """Which pairs dropout keeps.

        key     = (seed low 32 bits, seed high 32 bits)
        counter = (j // 4, i, b * H + h, offset low 32 bits);  the pair takes word j % 4
        kept    = word >= floor(dropout_p * 2^32)

    rng_state: int64 [2] = (seed, offset). i and j are original positions, so patterns and tiles
        change nothing.
    """
    state = rng_state.to(device)
    seed, offset = state[0], state[1]
    groups = torch.arange((Lk + 3) // 4, device=device)  # [Lk / 4]
    i = torch.arange(Lq, device=device)[:, None]  # [Lq, 1]
    bh = torch.arange(B * H, device=device).reshape(B, H, 1, 1)
    key = (seed & _LOW, (seed >> 32) & _LOW)
    words = philox4x32((groups, i, bh, offset & _LOW), key)
    words = [word.expand(B, H, Lq, len(groups)) for word in words]
    drawn = torch.stack(words, dim=-1).reshape(B, H, Lq, 4 * len(groups))[..., :Lk]
    return drawn >= int(dropout_p * 2**32)
