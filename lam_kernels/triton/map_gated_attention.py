"""Attention with gated maps in Triton: which kernels run, with what, in which order.

Forward is one kernel, a program a tile of rows. Backward runs it again for the numbers a row that
all others read, then `heads` (dQ, dK, dV) and `gates` (both gates), each only when somebody wants
what it gives. No [B, H, T, T] anywhere: besides the gradients [B, H, 4, BLOCK_M, T] for the rows
that are worked on, and as many partial sums of the gates as query and key have elements.

Maps and gates meet in products of bfloat16 for bfloat16 operands, of tf32 for float16 (whose range
a gate may exceed) and of three tf32 for float32; sums are float32.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import configurations, masked_attention
from .global_local_attention import two_map_settings
from .map_gated_attention_backward import map_gated_gates_kernel, map_gated_heads_kernel
from .map_gated_attention_forward import Gate, Gates, Norms, map_gated_forward_kernel
from .masked_attention import _Call, _call, _empty, _on_device, _unit_last_stride, _zeros
from .tiles import Rows, rows_argument

_PRODUCTS = {
    torch.bfloat16: (tl.bfloat16, "ieee"),
    torch.float16: (tl.float32, "tf32"),
    torch.float32: (tl.float32, "tf32x3"),
}


def _settings(call: _Call, chosen: configurations.Configuration, renormalise: bool) -> dict:
    kind, precision = _PRODUCTS[call.query.dtype]
    return two_map_settings(call, chosen) | {
        "GATE_TYPE": kind,
        "GATE_PRECISION": precision,
        "RENORMALISE": renormalise,
    }


def _operands(
    query, key, value, gate_global, gate_local, key_mask, segment_ids, pattern, scale
) -> tuple[_Call, Gates]:
    call = _call(
        query, key, value, None, None, None, key_mask, segment_ids, None, pattern, scale, 0.0,
        False,
    )  # fmt: skip
    return call, Gates(_gate(gate_global), _gate(gate_local))


def _gate(gate: Tensor) -> Gate:
    if sum(gate.stride()) * gate.shape[0] >= 2**31:  # of a far larger tensor
        gate = gate.contiguous()
    return Gate(gate, *gate.stride())


def _run(call: _Call, kernel: str, launched) -> None:
    kind, _ = _PRODUCTS[call.query.dtype]
    call.run(f"map_gated_{kernel}", launched, width=kind.primitive_bitwidth // 8)


def map_gated_attention_fwd(
    query, key, value, gate_global, gate_local, key_mask, segment_ids, pattern, scale, renormalise
) -> Tensor:
    """The op's forward with the op's own arguments."""
    out = query.new_empty(*query.shape[:3], value.shape[3])
    if out.numel() == 0:
        return out
    call, gates = _operands(
        query, key, value, gate_global, gate_local, key_mask, segment_ids, pattern, scale
    )
    with _on_device(query):
        _run_forward(call, gates, out, None, None, renormalise)
    return out


def _run_forward(
    call: _Call,
    gates: Gates,
    out: Tensor | None,
    norms: Norms | None,
    grad_out: Rows | None,
    renormalise: bool,
) -> None:
    def run(chosen: configurations.Configuration) -> None:
        tiles = triton.cdiv(call.Lq, chosen.block_m)
        masked_attention.launch(
            map_gated_forward_kernel, call.B * call.H * tiles,
            call.o, gates, out, norms, grad_out, call.scale, call.B, call.H, call.Lq, tiles,
            **_settings(call, chosen, renormalise),
        )  # fmt: skip

    _run(call, "forward", run)


def map_gated_attention_bwd(
    grad_out, query, key, value, gate_global, gate_local, key_mask, segment_ids,
    pattern, scale, renormalise, needs,
) -> tuple[Tensor, ...]:  # fmt: skip
    """The op's backward; a gradient that `needs` does not ask for is empty, and not computed."""
    operands = (query, key, value, gate_global, gate_local)
    if query.numel() == 0:
        return tuple(_zeros(x, query, wanted) for x, wanted in zip(operands, needs, strict=True))
    call, gates = _operands(
        query, key, value, gate_global, gate_local, key_mask, segment_ids, pattern, scale
    )
    grads = [_empty(x, query, wanted) for x, wanted in zip(operands, needs, strict=True)]
    vectors = [query.new_empty(query.shape[:3], dtype=torch.float32) for _ in range(6)]
    norms = Norms(*vectors)
    grad_out = rows_argument(_unit_last_stride(grad_out))
    with _on_device(query):
        _run_forward(call, gates, None, norms, grad_out, renormalise)
        if any(needs[:3]):
            _run_heads(call, gates, norms, grad_out, renormalise, grads, needs)
        if any(needs[3:]):
            _run_gates(call, gates, norms, grad_out, renormalise, grads, needs)
    return tuple(grads)


def _run_heads(call: _Call, gates, norms, grad_out, renormalise, grads, needs) -> None:
    def run(chosen: configurations.Configuration) -> None:
        sums = [
            torch.zeros_like(grads[at], dtype=torch.float32) if needs[at] else None for at in (1, 2)
        ]
        room = call.query.new_empty(call.B, call.H, 4, chosen.block_m, call.Lq, dtype=torch.float32)
        masked_attention.launch(
            map_gated_heads_kernel, call.B * call.H,
            call.o, gates, norms, grad_out, grads[0] if needs[0] else None, *sums, room,
            call.scale, call.H, call.Lq, **_settings(call, chosen, renormalise),
        )  # fmt: skip
        for at, total in zip((1, 2), sums, strict=True):
            if total is not None:
                grads[at].copy_(total)

    _run(call, "heads", run)


def _run_gates(call: _Call, gates, norms, grad_out, renormalise, grads, needs) -> None:
    T, pairs = call.Lq, call.B * call.H

    def run(chosen: configurations.Configuration) -> None:
        tiles = triton.cdiv(T, chosen.block_n)
        splits = configurations.splits(
            tiles, pairs, T * T * sum(needs[3:]), 2 * pairs * T * call.D, call.query.device
        )
        sums = [
            call.query.new_zeros(splits, T, T, dtype=torch.float32) if needs[at] else None
            for at in (3, 4)
        ]
        masked_attention.launch(
            map_gated_gates_kernel, tiles * splits,
            call.o, gates, norms, grad_out, *sums, call.scale, pairs, call.H, T, tiles, splits,
            **_settings(call, chosen, renormalise),
        )  # fmt: skip
        for at, total in zip((3, 4), sums, strict=True):
            if total is not None:
                grads[at].copy_(total.sum(0))

    _run(call, "gates", run)
