"""Two models on one batch: outputs, every parameter's gradient, and how far apart they may be.

The rule is that of tests/tolerance.py for maxima: off by a rounding step of the largest value plus
three times what the untouched model loses in the same dtype, both against float64. What it loses is
taken over the projections of a module together (the gradient of a key bias is 0 by symmetry: what
is there are roundings of the others), and is at least the usual share of the largest value: the one
number of a scalar may be right by luck.
"""

from __future__ import annotations

import contextlib
import copy

import torch
from torch import Tensor

from lam_kernels.nn import LearnableAttentionMask


def run(
    model, batch, *, valid: Tensor | None = None, autocast=False, grad=True, backward=False
) -> dict:
    """name -> tensor: the model's float outputs (rows that are padding left out) and gradients.

    backward=True leaves the gradients in the parameters, for what autograd.grad cannot go through.
    """
    around = torch.autocast("cpu", torch.bfloat16) if autocast else contextlib.nullcontext()
    with torch.set_grad_enabled(grad), around:
        outputs = floats(model(**batch) if isinstance(batch, dict) else model(*batch))
    if valid is not None:
        outputs = [t[valid] if t.shape[:2] == valid.shape else t for t in outputs]
    found = {f"output {at}": t.detach() for at, t in enumerate(outputs)}
    if grad:
        outputs = [t for t in outputs if t.requires_grad]
        generator = torch.Generator().manual_seed(3)
        parts = [
            (t.double() * torch.randn(t.shape, generator=generator, dtype=torch.float64)).sum()
            for t in outputs
        ]
        wanted = {n: p for n, p in model.named_parameters() if p.requires_grad}
        if backward:
            sum(parts).backward()
            grads = [p.grad for p in wanted.values()]
        else:
            grads = torch.autograd.grad(sum(parts), list(wanted.values()), allow_unused=True)
        found |= {n: g for n, g in zip(wanted, grads, strict=True) if g is not None}
    return found


def wake(model):
    """Learned masks that are no longer the identity."""
    torch.manual_seed(7)
    for module in model.modules():
        if isinstance(module, LearnableAttentionMask):
            torch.nn.init.normal_(module.layers[-1].weight, std=0.2)
    return model


def floats(output) -> list[Tensor]:
    if isinstance(output, Tensor):
        return [output] if output.is_floating_point() else []
    parts = output.values() if hasattr(output, "values") else output
    return [t for part in parts if isinstance(part, Tensor | tuple | dict) for t in floats(part)]


def in_float64(model, batch, **options) -> dict:
    double = {
        k: v.double() if isinstance(v, Tensor) and v.is_floating_point() else v
        for k, v in batch.items()
    }
    return run(copy.deepcopy(model).double(), double, **{**options, "autocast": False})


def wrong(got: dict, untouched: dict, exact: dict) -> list[str]:
    """One line for each name that is too far off."""
    lines = []
    if missing := exact.keys() - got.keys():
        lines.append(f"missing: {sorted(missing)}")
    noise: dict[str, float] = {}
    shares = []
    largest = {name: float(truth.abs().max()) for name, truth in exact.items()}
    for name, truth in exact.items():
        lost = float((untouched[name].double() - truth).abs().max())
        noise[_group(name)] = max(lost, noise.get(_group(name), 0.0))
        shares.append(lost / max(largest[name], torch.finfo(torch.float32).tiny))
    usual = sorted(shares)[len(shares) // 2]
    for name in exact.keys() & got.keys():
        error = float((got[name].double() - exact[name]).abs().max())
        lost = max(noise[_group(name)], usual * largest[name])
        bound = torch.finfo(got[name].dtype).eps * largest[name] + 3 * lost
        if not error <= bound + torch.finfo(torch.float32).tiny:
            lines.append(f"{name}: error {error:.3g}, at most {bound:.3g}")
    return lines


def _group(name: str) -> str:
    return name if name.startswith("output") else name.rsplit(".", 2)[0]


def assert_same(got: dict, untouched: dict, exact: dict) -> None:
    found = wrong(got, untouched, exact)
    assert not found, "\n".join(found)
