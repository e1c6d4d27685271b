"""How much more a frame's output depends on near frames than on far ones (GMSA's S_i)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

NORMS = ("fro", "hutchinson", "sum")


def sensitivity(
    function: Callable[[Tensor], Tensor],  # [T, D] -> [T, Dy]
    x: Tensor,  # [T, D]
    near: Tensor,  # bool [T, T], row i the neighbours of frame i
    *,
    norm: str = "hutchinson",
    probes: int = 4,
    frames: Tensor | None = None,  # bool [T], False for padding
    seed: int = 0,
) -> Tensor:  # S [T]
    """S_i = mean_{near j} G_ij / (mean_{near j} G_ij + mean_{far j} G_ij), G_ij = |dy_i / dx_j|.

    norm="fro"         Frobenius norm of the whole block of the Jacobian: T * Dy backward passes
        "hutchinson"   its estimate from `probes` random signs v: E |v^T J_ij|^2 = |J_ij|_F^2
        "sum"          the gradient of the sum of y_i's components: one pass a frame, may cancel
    Equal gradients give 1/2 however many neighbours there are. Padded frames neither count nor get
    a value (NaN), as a frame without far or without near neighbours, or without any gradient.

    Source: GMSA (arXiv 2110.13992), its analysis; the norm is not fixed there.
    """
    if norm not in NORMS:
        raise ValueError(f"norm must be one of {list(NORMS)}, got {norm!r}")
    T = x.shape[0]
    if tuple(near.shape) != (T, T):
        raise ValueError(f"near must be [{T}, {T}], got {tuple(near.shape)}")
    if frames is not None and (tuple(frames.shape) != (T,) or frames.dtype != torch.bool):
        raise ValueError(f"frames must be bool [{T}], got {frames.dtype} {list(frames.shape)}")
    if probes < 1:
        raise ValueError(f"probes must be at least 1, got {probes}")
    G = gradient_norms(function, x, norm=norm, probes=probes, seed=seed)
    real = torch.ones(T, dtype=torch.bool) if frames is None else frames.cpu()
    near = near.cpu() & real
    far = ~near & real
    inside, outside = _mean_where(G, near), _mean_where(G, far)
    share = inside / (inside + outside)
    return torch.where(real, share, torch.nan)


def gradient_norms(
    function: Callable[[Tensor], Tensor], x: Tensor, *, norm: str, probes: int = 4, seed: int = 0
) -> Tensor:  # G [T, T], float64
    x = x.detach().requires_grad_()
    y = function(x)
    if y.dim() != 2 or len(y) != len(x):
        raise ValueError(f"function must give [{len(x)}, .], gave {tuple(y.shape)}")
    generator = torch.Generator().manual_seed(seed)
    G = torch.zeros(len(x), len(x), dtype=torch.float64)
    for i in range(len(x)):
        if norm == "fro":
            weights = torch.eye(y.shape[1])
        elif norm == "hutchinson":
            weights = torch.randint(0, 2, (probes, y.shape[1]), generator=generator) * 2.0 - 1
        else:
            weights = torch.ones(1, y.shape[1])
        squares = torch.zeros(len(x), dtype=torch.float64)
        for v in weights.to(y):
            (grad,) = torch.autograd.grad(y[i] @ v, x, retain_graph=True)
            squares += grad.double().square().sum(-1).cpu()
        G[i] = (squares / (probes if norm == "hutchinson" else 1)).sqrt()
    return G


def _mean_where(G: Tensor, chosen: Tensor) -> Tensor:
    """Of each row; NaN where nothing is chosen."""
    return (G * chosen).sum(1) / chosen.sum(1)
