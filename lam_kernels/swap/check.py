"""report.check(batch): is the swapped model the same function, as exactly as its dtype allows?"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lam_kernels.nn.learnable_attention_mask import LearnableAttentionMask
from lam_kernels.training.text_table import text_table

from .attend import settings_of

# The rule of the test-suite: a result may be off by a rounding step of its largest value plus this
# many times what the model it is compared with loses in the same dtype, both against float64. (A
# float64 model loses what the same model in float32 loses, times the ratio of their roundings.)
_FACTOR = 3
# One run is a poor sample of that loss: where a sum is within rounding of 0, a ReLU is open or shut
# by chance. So it is the largest of the model's own and of this many whose parameters are off by
# half a rounding step.
_PERTURBED = 3


@dataclass(frozen=True)
class Row:
    """The largest error of a module's output, or of the gradients of its parameters."""

    what: str  # "output" or "gradients"
    module: str
    error: float  # of the swapped model, against float64
    noise: float  # what the model it is compared with loses in the same dtype, at most
    largest: float  # value there
    bound: float

    @property
    def ok(self) -> bool:
        return self.error <= self.bound


@dataclass(frozen=True)
class Check:
    """Largest errors per module; ok when all are within their bounds. str() is a table."""

    rows: tuple[Row, ...]
    against: str

    @property
    def ok(self) -> bool:
        return all(row.ok for row in self.rows)

    @property
    def worst(self) -> Row:
        # NaN is neither larger nor smaller than anything
        return max(self.rows, key=lambda row: (not row.ok, row.error / row.bound))

    def __str__(self) -> str:
        rows = [
            [row.module, row.what, f"{row.error:.2g}", f"{row.bound:.2g}", f"{row.largest:.2g}",
             "" if row.ok else "NO"]
            for row in self.rows
        ]  # fmt: skip
        header = ["module", "of", "largest error", "allowed", "largest value", "wrong"]
        verdict = "the same function" if self.ok else "NOT the same function"
        return text_table(header, rows, left=2) + f"\n{verdict} as {self.against}"


@dataclass
class _Run:
    outputs: dict[str, Tensor]  # of modules, "" for the model
    gradients: dict[str, Tensor]  # of parameters


def check(report, batch, against: str) -> Check:
    """Compares outputs and all gradients of report.model on one batch.

    against="untouched": with the model as it was. Only meaningful while both are the same function:
    no patterns, learned masks still at the identity. against="reference": with the same swap on
    plain PyTorch (backend="reference"), which is always the same function.

    batch: a mapping of keyword arguments, a tuple or list of positional ones, or a tensor. The
    model runs in eval mode (no dropout) with gradients; its training flags, gradients and
    parameters stay what they are. Both are measured against a copy in float64, which takes the
    memory of twice the model.
    """
    model = report.model
    if against not in ("untouched", "reference"):
        raise ValueError(f'against must be "untouched" or "reference", got {against!r}')
    _warm_up_exp()
    if against == "untouched":
        _refuse_another_function(report)
        with report.taken_out():
            other = copy.deepcopy(model)
    else:
        other = _on_the_reference(copy.deepcopy(model))
    got = _run(model, batch, report._modules)
    truth = copy.deepcopy(other).double()
    exact = _run(truth, _cast(batch, torch.float64), report._modules)
    if not all(t.isfinite().all() for t in exact.outputs.values()):
        raise ValueError(
            f"the {against} model gives NaN or infinity in float64, so nothing can be measured "
            "against it (transformers' eager attention does for rows that see no key: use "
            'attn_implementation="sdpa", or pad on the right)'
        )
    if next(iter(got.outputs.values())).dtype == torch.float64:
        other, batch = other.float(), _cast(batch, torch.float32)
        factor = _FACTOR * torch.finfo(torch.float64).eps / torch.finfo(torch.float32).eps
    else:
        factor = _FACTOR
    noisy = [_run(other, batch, report._modules)]
    for seed in range(_PERTURBED):
        noisy.append(_run(_perturbed(other, seed), batch, report._modules))
    return Check(tuple(_rows(report, got, noisy, exact, factor)), f"the {against} model")


def _warm_up_exp() -> None:
    # the first large float64 exp of a process is now and then wrong in the ninth digit
    for _ in range(2):
        torch.exp(torch.linspace(-20, 5, 200_000, dtype=torch.float64))


def _on_the_reference(model: nn.Module) -> nn.Module:
    for module in model.modules():
        if "lam_swap" in module.__dict__:
            settings = dataclasses.replace(settings_of(module), backend="reference")
            module.__dict__["lam_swap"] = settings
    return model


def _perturbed(model: nn.Module, seed: int) -> nn.Module:
    found = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in filter(torch.is_floating_point, found.parameters()):
            sign = torch.randint(0, 2, parameter.shape, generator=generator) * 2 - 1
            step = sign.to(parameter.device) * (torch.finfo(parameter.dtype).eps / 2)
            parameter.copy_(parameter.double() * (1 + step))
    return found


def _refuse_another_function(report) -> None:
    for name, module in report._modules.items():
        if settings_of(module).pattern is not None:
            why = "a pattern hides pairs"
        elif settings_of(module).source is not None and not _all_identity(report.model):
            why = "its learned mask is no longer the identity"
        else:
            continue
        raise ValueError(
            f"{name} is another function than before the swap, {why}: compare with "
            'check(batch, against="reference")'
        )


def _all_identity(model: nn.Module) -> bool:
    for module in model.modules():
        if isinstance(module, LearnableAttentionMask):
            fresh = copy.deepcopy(module)
            fresh.reset_parameters()
            last, start = module.layers[-1], fresh.layers[-1]
            if not (torch.equal(last.weight, start.weight) and torch.equal(last.bias, start.bias)):
                return False
    return True


def _run(model: nn.Module, batch, names) -> _Run:
    outputs: dict[str, Tensor] = {}
    modules = dict(model.named_modules())

    def keep(name: str) -> Callable:
        def hook(module, args, kwargs, output):
            found = tensors_of(output)
            if found:
                outputs[name] = found[0].detach()

        return hook

    training = {module: module.training for module in model.modules()}
    handles = [
        modules[name].register_forward_hook(keep(name), with_kwargs=True)
        for name in names
        if name in modules
    ]
    model.eval()
    try:
        with torch.enable_grad():
            result = [t for t in tensors_of(call(model, batch)) if t.requires_grad]
            parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}
            if not result:
                raise ValueError("the model's output has no tensor with a gradient to compare")
            gradients = torch.autograd.grad(
                result, list(parameters.values()), [_cotangent(t) for t in result],
                materialize_grads=True,  # one that was lost is an error, not a missing row
            )  # fmt: skip
    finally:
        for handle in handles:
            handle.remove()
        for module, flag in training.items():
            module.training = flag
    outputs[""] = result[0].detach()
    return _Run(outputs, dict(zip(parameters, gradients, strict=True)))


def call(model: nn.Module, batch):
    if isinstance(batch, Mapping):
        return model(**batch)
    return model(*batch) if isinstance(batch, tuple | list) else model(batch)


def tensors_of(output) -> list[Tensor]:
    """Float tensors of a model's output, in order."""
    if isinstance(output, Tensor):
        return [output] if output.is_floating_point() else []
    if isinstance(output, Mapping):
        output = list(output.values())
    if isinstance(output, tuple | list):
        return [tensor for part in output for tensor in tensors_of(part)]
    return []


def _cotangent(tensor: Tensor) -> Tensor:
    """The same numbers for the same shape in any dtype."""
    generator = torch.Generator().manual_seed(tensor.numel())
    drawn = torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
    return drawn.to(tensor.device, tensor.dtype)


def _cast(batch, dtype: torch.dtype):
    if isinstance(batch, Tensor):
        return batch.to(dtype) if batch.is_floating_point() else batch
    if isinstance(batch, Mapping):
        return {name: _cast(part, dtype) for name, part in batch.items()}
    if isinstance(batch, tuple | list):
        return [_cast(part, dtype) for part in batch]
    return batch


def _rows(report, got: _Run, noisy: list[_Run], exact: _Run, factor: float):
    for name in [*report._modules, ""]:
        if name in got.outputs and name in exact.outputs:
            outputs = [[run.outputs[name]] for run in (got, exact, *noisy)]
            yield _row("output", name or "(model)", *outputs, factor=factor)
        owned = [p for p in exact.gradients if _owner(p, report._modules) == name]
        if owned:
            gradients = [[run.gradients[p] for p in owned] for run in (got, exact, *noisy)]
            yield _row("gradients", name or "(all others)", *gradients, factor=factor)


def _owner(parameter: str, modules) -> str:
    """The swapped module that a parameter belongs to, "" for the rest of the model."""
    return next((name for name in modules if parameter.startswith(f"{name}.")), "")


def _row(what: str, module: str, got, exact, *noisy, factor: float) -> Row:
    largest = max((float(t.abs().max()) for t in exact if t.numel()), default=0.0)
    error = _largest_difference(got, exact)
    noise = max(_largest_difference(one, exact) for one in noisy)
    limits = torch.finfo(got[0].dtype)
    bound = limits.eps * largest + factor * noise + limits.tiny
    return Row(what, module, error, noise, largest, bound)


def _largest_difference(ours: list[Tensor], exact: list[Tensor]) -> float:
    pairs = [(a.double(), b.double()) for a, b in zip(ours, exact, strict=True) if a.numel()]
    # torch's max: Python's passes over a NaN that does not come first
    return float(torch.stack([(a - b).abs().max() for a, b in pairs]).max()) if pairs else 0.0
