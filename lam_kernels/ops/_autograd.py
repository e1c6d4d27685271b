"""The autograd function of an op whose arguments are laid out in the common order.

    forward(*learned, *unlearned, segment_ids, *settings, backend) -> (*results, *kept)
    backward(*grad_results, *learned, *unlearned, segment_ids, *saved, *settings, needs, backend)

learned tensors get gradients, kept ones are results that only the backward pass reads (no gradient
reaches them); saved are all results and kept ones, or nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ._registration import RegisteredOp, traced_or_transformed, unobserved


def refuse_double_backward(op: str):
    raise RuntimeError(
        f"{op}: the kernels have no double backward. "
        'Use backend="reference", which is plain PyTorch and has it.'
    )


class _Form(NamedTuple):
    op: RegisteredOp
    learned: int  # how many tensors get a gradient
    results: int
    saves_results: bool  # whether the backward pass reads the results and what is kept with them
    segments: bool  # whether the op has segment ids


# Found by name: what a compiler traces may refer to a module's dictionary, not to a closure.
_FORMS: dict[str, _Form] = {}


def differentiable(
    op: RegisteredOp, *, learned: int, results: int, saves_results: bool, segments: bool = True
) -> Callable[[Sequence, Sequence, Sequence, Sequence, str], tuple[Tensor, ...]]:
    """call(learned, unlearned, segment_ids, settings, backend) -> results, with autograd.

    `learned` and `results` are how many there are; segments=False: the op takes no segment ids. A
    result that no loss uses costs a tensor of zeros in the backward pass.
    """
    _FORMS[op.name] = _Form(op, learned, results, saves_results, segments)

    def call(tensors, unlearned, segment_ids, settings, backend):
        counts = (len(tensors), len(unlearned), len(segment_ids))
        plan = (op.name, counts, tuple(settings), backend)
        run = _Forward.apply if traced_or_transformed() else _eager_forward
        return run(plan, *tensors, *unlearned, *segment_ids)[:results]

    return call


def _cut(tensors: Sequence, counts: Sequence[int]) -> list[Sequence]:
    """Consecutive runs of the given lengths."""
    runs, at = [], 0
    for count in counts:
        runs.append(tensors[at : at + count])
        at += count
    return runs


class _Forward(torch.autograd.Function):
    """plan = (op, how many (learned, unlearned, segment ids), settings, backend)"""

    generate_vmap_rule = True

    @staticmethod
    def forward(plan, *tensors):
        name, counts, settings, backend = plan
        learned, unlearned, segment_ids = _cut(tensors, counts)
        lists = (list(segment_ids),) if _FORMS[name].segments else ()
        arguments = (*learned, *unlearned, *lists, *settings)
        if unobserved(*tensors):
            found = _FORMS[name].op.services.kernels(backend).forward(*arguments)
        else:
            found = _FORMS[name].op.forward(*arguments, backend)
        return tuple(found) if isinstance(found, (tuple, list)) else (found,)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.plan, *tensors = inputs
        form = _FORMS[ctx.plan[0]]
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*output[form.results :])
        ctx.shapes = [(one.shape, one.dtype, one.device) for one in output[: form.results]]
        ctx.save_for_backward(*tensors, *(output if form.saves_results else ()))

    @staticmethod
    def backward(ctx, *grads):
        name, counts, settings, backend = ctx.plan
        learned, results = _FORMS[name].learned, _FORMS[name].results
        inputs = 1 + sum(counts)
        grads = grads[:results]
        if all(grad is None for grad in grads):
            return (None,) * inputs
        grads = [
            torch.zeros(shape, dtype=dtype, device=device) if grad is None else grad
            for grad, (shape, dtype, device) in zip(grads, ctx.shapes, strict=True)
        ]
        needs = ctx.needs_input_grad[1 : 1 + learned]
        tensors = ctx.saved_tensors
        saved = len(tensors) - sum(counts)
        plan = (name, (results, *counts, saved), settings, needs, backend)
        # With create_graph (always so under torch.func.grad) the gradients must refuse to be
        # differentiated again: an op without autograd of its own would let those terms vanish.
        run = _Backward.apply if torch.is_grad_enabled() else _Backward.forward
        found = run(plan, *grads, *tensors)
        wanted = [g if need else None for g, need in zip(found, needs, strict=True)]
        return None, *wanted, *([None] * (inputs - 1 - learned))


# Function.apply binds every call to the signature of forward, which only torch.func and
# torch.compile need; this is what it calls.
_eager_forward = super(torch.autograd.Function, _Forward).apply


class _Backward(torch.autograd.Function):
    """The backward op as a function whose own gradient is an error.

    plan = (op, how many (gradients, learned, unlearned, segment ids, saved), settings, needs,
    backend)
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(plan, *tensors):
        name, counts, settings, needs, backend = plan
        grads, learned, unlearned, segment_ids, saved = _cut(tensors, counts)
        lists = (list(segment_ids),) if _FORMS[name].segments else ()
        arguments = (*grads, *learned, *unlearned, *lists, *saved, *settings, list(needs))
        if unobserved(*tensors):
            return tuple(_FORMS[name].op.services.kernels(backend).backward(*arguments))
        return tuple(_FORMS[name].op.backward(*arguments, backend))

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.name = inputs[0][0]

    @staticmethod
    def backward(ctx, *grads):
        refuse_double_backward(ctx.name)
