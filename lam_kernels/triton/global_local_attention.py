"""Global and local attention in Triton: which kernels run, with what, in which order.

Forward is one kernel. Backward takes delta of both halves, then as masked_attention.py's does, and
for its reasons: rows (dQ), columns (dK, dV) and, for masks that heads or samples share, tiles. A
mask with its own head and sample gets its gradient from rows, or from columns where only that runs.

The scores are formed once a pass for both halves: ten products in rows and columns where the
pattern keeps everything, seven where it touches nothing, against fourteen of two calls of
masked_attention. (Seven in all would take rows and columns in one program: dQ by atomics, or one
program a head.) Tiles are of neighbouring rows and keys, also where the pattern is dilated: the
global half, which needs them all, would read a mask in strides.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from . import configurations, masked_attention
from .global_local_attention_backward import (
    BothBackward,
    global_local_columns_kernel,
    global_local_rows_kernel,
    global_local_tiles_kernel,
)
from .global_local_attention_forward import Results, global_local_forward_kernel
from .masked_attention import (
    _block_of,
    _Call,
    _call,
    _empty,
    _MaskPlan,
    _on_device,
    _reduce,
    _run_tiles,
    _source,
    _targets,
    _unit_last_stride,
    _zeros,
)
from .masked_attention_backward import Backward, delta_kernel
from .shared_masks import shared_sums
from .tiles import rows_argument


def two_map_settings(call: _Call, chosen: configurations.Configuration) -> dict:
    """Compile-time constants of these kernels."""
    even = call.Lq % chosen.block_m == 0 and call.Lk % chosen.block_n == 0
    settings = call.settings(chosen) | {
        "CHUNK_D": configurations.chunk(call.query.element_size()),
        "EVEN": even,
        "HIDES": not even or call.o.key_mask is not None,
    }
    return {k: v for k, v in settings.items() if k not in ("STEPPED", "GATE", "DROPOUT")}


def global_local_attention_fwd(
    query, key, value, multiplier, bias, key_mask, segment_ids, pattern, scale
) -> tuple[Tensor, ...]:
    """The op's forward with the op's own arguments."""
    B, H, Lq, _ = query.shape
    Lk, Dv = value.shape[2:]
    whole, near = (
        Results(
            query.new_empty(B, H, Lq, Dv),
            query.new_empty(B, H, Lq, dtype=torch.float32),
        )
        for _ in range(2)
    )
    results = (whole.out, near.out, whole.lse, near.lse)
    if whole.lse.numel() == 0 or Lk == 0:
        return tuple(one.fill_(-torch.inf if one.dim() == 3 else 0) for one in results)
    call = _call(
        query, key, value, multiplier, bias, None, key_mask, segment_ids, None, pattern, scale,
        0.0, False,
    )  # fmt: skip

    def run(chosen: configurations.Configuration) -> None:
        tiles = triton.cdiv(Lq, chosen.block_m)
        masked_attention.launch(
            global_local_forward_kernel, B * H * tiles,
            call.o, whole, near, scale, B, H, Lq, Lk, tiles,
            ORDER=call.order(), **two_map_settings(call, chosen),
        )  # fmt: skip

    with _on_device(query):
        call.run("global_local_forward", run)
    return results


def global_local_attention_bwd(
    grad_global, grad_local, query, key, value, multiplier, bias, key_mask, segment_ids,
    global_out, local_out, global_lse, local_lse, pattern, scale, needs,
) -> tuple[Tensor, ...]:  # fmt: skip
    """The op's backward; a gradient that `needs` does not ask for is empty, and not computed."""
    operands = (query, key, value, multiplier, bias)
    if global_lse.numel() == 0 or key.shape[2] == 0:
        return tuple(_zeros(x, query, wanted) for x, wanted in zip(operands, needs, strict=True))
    call = _call(
        query, key, value, multiplier, bias, None, key_mask, segment_ids, None, pattern, scale,
        0.0, False,
    )  # fmt: skip
    grads = [_empty(x, query, wanted) for x, wanted in zip(operands, needs, strict=True)]
    slopes = any((*needs[:2], *needs[3:]))
    with _on_device(query):
        g = BothBackward(
            _half(call, grad_global, global_out, global_lse, slopes),
            _half(call, grad_local, local_out, local_lse, slopes),
        )
        _run_backward(call, g, grads, operands, needs)
    return tuple(grads)


def _half(call: _Call, grad_out: Tensor, out: Tensor, lse: Tensor, slopes: bool) -> Backward:
    """What the kernels read of one half; delta only where a gradient but dV is wanted."""
    grad_out = rows_argument(_unit_last_stride(grad_out))
    delta = lse
    if slopes:
        delta = torch.empty_like(lse)
        block = 64
        masked_attention.launch(
            delta_kernel, call.B * call.H * triton.cdiv(call.Lq, block),
            out, grad_out, None, delta, call.H, call.Lq,
            DV=call.Dv, BLOCK_DV=_block_of(call.Dv), BLOCK_M=block,
        )  # fmt: skip
    return Backward(grad_out, lse, delta)


def _run_backward(call: _Call, g: BothBackward, grads: list[Tensor], operands, needs) -> None:
    """Fills grads."""
    B, H, Lq, Lk = call.B, call.H, call.Lq, call.Lk
    plan = _MaskPlan(
        *(_source(mask, wanted, call) for mask, wanted in zip(operands[3:], needs[3:], strict=True))
    )
    columns_run = needs[1] or needs[2] or plan.has("columns")
    rows_run = needs[0] or plan.has("rows") or (plan.has("own") and not columns_run)
    passes = []
    if rows_run:
        wanted = (grads[0] if needs[0] else None,)
        passes.append(("rows", global_local_rows_kernel, Lq, wanted, True))
    if columns_run:
        wanted = tuple(grads[at] if needs[at] else None for at in (1, 2))
        passes.append(("columns", global_local_columns_kernel, Lk, wanted, not rows_run))
    for name, kernel, length, wanted, takes_own in passes:
        targets, sums = _targets(name, length, plan, takes_own, call, grads)

        def run(chosen, name=name, kernel=kernel, length=length, outputs=(*wanted, targets)):
            block = chosen.block_m if name == "rows" else chosen.block_n
            tiles = triton.cdiv(length, block)
            masked_attention.launch(
                kernel, B * H * tiles, call.o, g, *outputs, call.scale, B, H, Lq, Lk, tiles,
                ORDER=call.order(), **two_map_settings(call, chosen),
            )  # fmt: skip

        call.run(f"global_local_{name}", run)
        _reduce(sums, grads)
    if plan.has("tiles"):
        _run_tiles(call, g, plan, grads, "global_local_tiles", _launch_tiles)


def _launch_tiles(
    call: _Call,
    g: BothBackward,
    which: list[int],
    grads: list[Tensor],
    chosen: configurations.Configuration,
) -> None:
    row_tiles, column_tiles = (
        triton.cdiv(call.Lq, chosen.block_m),
        triton.cdiv(call.Lk, chosen.block_n),
    )
    sums = shared_sums(call, which, grads, row_tiles * column_tiles)
    masked_attention.launch(
        global_local_tiles_kernel, sums.own * row_tiles * column_tiles * sums.splits,
        call.o, g, sums.targets, sums.stride, call.scale, call.H, call.Lq, call.Lk,
        row_tiles, column_tiles, sums.batches, sums.heads, sums.splits,
        **two_map_settings(call, chosen),
    )  # fmt: skip
    sums.finish(grads)
