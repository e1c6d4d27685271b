"""S_i of functions whose gradients are known."""

from __future__ import annotations

import pytest
import torch

from lam_kernels import Toeplitz
from lam_kernels.training.sensitivity import gradient_norms, sensitivity

T, D = 7, 3
NEAR = Toeplitz(1).dense(T, T)


def mixing(weights):
    return lambda x: weights.to(x) @ x


@pytest.mark.parametrize("norm", ["fro", "hutchinson", "sum"])
def test_uniform_gradients_give_one_half(norm):
    x = torch.randn(T, D, dtype=torch.float64)
    found = sensitivity(mixing(torch.ones(T, T)), x, NEAR, norm=norm)
    torch.testing.assert_close(found, torch.full((T,), 0.5, dtype=torch.float64))


def test_near_only_and_far_only():
    x = torch.randn(T, D, dtype=torch.float64)
    for weights, value in ((NEAR, 1.0), (~NEAR, 0.0)):
        found = sensitivity(mixing(weights.double()), x, NEAR, norm="fro")
        torch.testing.assert_close(found, torch.full((T,), value, dtype=torch.float64))


def test_frobenius_norm_is_the_jacobian():
    W = torch.randn(D, 2, dtype=torch.float64)
    function = lambda x: (x.cumsum(0) ** 2) @ W  # noqa: E731
    x = torch.randn(T, D, dtype=torch.float64)
    jacobian = torch.autograd.functional.jacobian(function, x)  # [T, 2, T, D]
    expected = jacobian.square().sum((1, 3)).sqrt()
    torch.testing.assert_close(gradient_norms(function, x, norm="fro"), expected)
    estimate = gradient_norms(function, x, norm="hutchinson", probes=2000)
    torch.testing.assert_close(estimate, expected, rtol=0.1, atol=1e-9)


def test_padding_and_empty_sets_are_nan():
    x = torch.randn(T, D, dtype=torch.float64)
    frames = torch.arange(T) < 5
    found = sensitivity(mixing(torch.ones(T, T)), x, NEAR, norm="sum", frames=frames)
    assert found.isnan().tolist() == (~frames).tolist()
    everything = torch.ones(T, T, dtype=torch.bool)
    assert sensitivity(mixing(torch.ones(T, T)), x, everything, norm="sum").isnan().all()
    assert sensitivity(lambda x: 0 * x, x, NEAR, norm="sum").isnan().all()


def test_refusals():
    x = torch.randn(T, D)
    with pytest.raises(ValueError, match="norm must be one of"):
        sensitivity(mixing(torch.eye(T)), x, NEAR, norm="max")
    with pytest.raises(ValueError, match=r"near must be \[7, 7\]"):
        sensitivity(mixing(torch.eye(T)), x, NEAR[:3])
    for frames in (torch.ones(T), torch.ones(T - 1, dtype=torch.bool)):
        with pytest.raises(ValueError, match=r"frames must be bool \[7\]"):
            sensitivity(mixing(torch.eye(T)), x, NEAR, frames=frames)
    with pytest.raises(ValueError, match="probes must be at least 1, got 0"):
        sensitivity(mixing(torch.eye(T)), x, NEAR, probes=0)
