"""Serving calls of F.scaled_dot_product_attention for the length of a block."""

from __future__ import annotations

from collections import Counter

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

import lam_kernels
from lam_kernels.patterns import Causal

from .swapping import check_backend


class serve_sdpa(TorchFunctionMode):
    """Within the block, F.scaled_dot_product_attention runs on our kernels, in this thread.

        with serve_sdpa() as served:
            loss = model(batch).loss
        print(served)

    For code that calls it directly; nothing is patched. The same arguments, shapes and masks; the
    gradient of a float mask is fused too, and dropout draws other random numbers. A call that our
    kernels cannot serve runs as before and is counted with its reason.

    Activation checkpointing computes the calls again in the backward pass: call .backward() inside
    the block too. Outside of it, or by torch.autograd.grad, they would run on PyTorch's own kernels
    (torch raises where it compares what was saved).

    Attributes:
        calls: how many calls were served.
        left: reason -> how many calls were left to PyTorch.
    """

    def __init__(self, backend: str | None = None):
        super().__init__()
        check_backend(backend)
        self.backend = backend
        self.calls = 0
        self.left: Counter[str] = Counter()

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is torch.Tensor.backward:
            with self:  # a mode is off while it handles a call
                return _backward(*args, **(kwargs or {}))
        if function is not F.scaled_dot_product_attention:
            return function(*args, **(kwargs or {}))
        why, out = self._serve(*args, **(kwargs or {}))
        if why:
            self.left[why] += 1
            return function(*args, **(kwargs or {}))
        self.calls += 1
        return out

    def _serve(
        self, query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None,
        enable_gqa=False,
    ) -> tuple[str, Tensor | None]:  # fmt: skip
        for tensor in (query, key, value):
            if tensor.is_nested or tensor.layout != torch.strided:
                return "nested or sparse tensors", None
        if not 2 <= query.dim() == key.dim() == value.dim():
            return f"{query.dim()}-D queries with {key.dim()}-D keys", None
        batch = query.shape[:-3]
        if key.shape[:-3] != batch or value.shape[:-3] != batch:
            return "batches that differ", None
        if not 1 <= query.shape[-1] <= 256 or not 1 <= value.shape[-1] <= 256:
            return f"head dim {query.shape[-1]} or {value.shape[-1]}, ours are 1 to 256", None
        if is_causal and attn_mask is not None:
            return "is_causal beside attn_mask", None  # an error, which is PyTorch's to raise
        four = [_four_axes(tensor) for tensor in (query, key, value)]
        heads = (four[0].shape[1], four[1].shape[1])
        if heads[0] != heads[1] and not enable_gqa:
            return f"{heads[0]} query heads with {heads[1]} key heads", None
        bias = visible = None
        if attn_mask is not None:
            mask = _mask_axes(attn_mask, query)
            if mask is None:
                return f"a mask of shape {tuple(attn_mask.shape)}", None
            bias, visible = (None, mask) if mask.dtype == torch.bool else (mask, None)
        options = {
            "bias": bias, "attn_mask": visible, "scale": scale, "dropout_p": dropout_p,
            "pattern": Causal(alignment="start") if is_causal else None, "enable_gqa": enable_gqa,
            "backend": self.backend,
        }  # fmt: skip
        try:
            out = lam_kernels.masked_attention(*four, **options)
        except (TypeError, ValueError) as error:  # refused at the front door
            return " ".join(str(error).split()), None
        except RuntimeError:
            # a named backend never falls back, and a kernel that fails is no reason to hide it
            found = lam_kernels.explain("masked_attention", *four, **options)
            if self.backend is not None or found.backend:
                raise
            return f"no backend serves {query.dtype} on {query.device.type}", None
        return "", out.reshape(*query.shape[:-1], value.shape[-1])

    def __str__(self) -> str:
        lines = [f"scaled_dot_product_attention: {self.calls} calls served"]
        lines += [f"  {count} left to PyTorch: {why}" for why, count in self.left.items()]
        return "\n".join(lines)


def _four_axes(tensor: Tensor) -> Tensor:
    while tensor.dim() < 4:
        tensor = tensor.unsqueeze(0)
    return tensor.flatten(0, -4)


def _mask_axes(mask: Tensor, query: Tensor) -> Tensor | None:
    """The mask with 4 axes, each full or 1; None where it needs a copy for that."""
    if mask.dim() > query.dim():
        return None
    while mask.dim() < 4:
        mask = mask.unsqueeze(0)
    if mask.dim() == 4:
        return mask
    batch, full = mask.shape[:-3], query.shape[:-3]
    if all(axis == 1 for axis in batch):
        return mask.reshape(1, *mask.shape[-3:])
    return mask.flatten(0, -4) if batch == full else None


def _backward(tensor, gradient=None, retain_graph=None, create_graph=False, inputs=None) -> None:
    """Tensor.backward without the functions of torch.autograd that a mode would take again."""
    if gradient is None:
        if tensor.numel() != 1:
            raise RuntimeError("grad can be implicitly created only for scalar outputs")
        gradient = torch.ones_like(tensor)
    keep = create_graph if retain_graph is None else retain_graph
    wanted = () if inputs is None else (inputs,) if isinstance(inputs, Tensor) else tuple(inputs)
    torch.autograd.Variable._execution_engine.run_backward(
        (tensor,), (gradient,), keep, create_graph, wanted,
        allow_unreachable=True, accumulate_grad=True,
    )  # fmt: skip
