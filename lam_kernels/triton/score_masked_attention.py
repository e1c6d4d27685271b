"""Attention masked by a network of its scores, in Triton: what its two kernels are launched with.

Forward keeps scores and activations on chip and stores nothing but the result. Backward computes
them again; the activations of the blocks that are worked on at the moment (all layers, one block a
program) lie in scratch memory, together with each program's own sum of the parameters' gradient at
most SCRATCH_BYTES of it, whatever the operands' sizes: the number of programs is cut down to that.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from . import configurations
from .masked_attention import _block_of, _on_device, _unit_last_stride
from .masked_attention import launch as launch  # ahead-of-time compilation replaces it here
from .masks import mask_argument
from .score_masked_attention_backward import ScoredGradients, score_masked_backward_kernel
from .score_masked_attention_forward import Scored, score_masked_forward_kernel
from .tiles import rows_argument

SCRATCH_BYTES = 2**27


def _operands(query, key, value, parameters, key_mask) -> Scored:
    query, key, value = (rows_argument(_unit_last_stride(x)) for x in (query, key, value))
    if key_mask is not None:
        key_mask = key_mask.view(torch.uint8)[:, None, None, :]
    return Scored(query, key, value, parameters.contiguous(), mask_argument(key_mask))


def _network(widths) -> tuple[int, int, int]:
    """(layers, hidden width, columns of a tile that hold the keys and every layer)."""
    return len(widths) - 1, widths[1], _block_of(max(widths))


def _settings(
    query: Tensor, value: Tensor, W: int, multiply: bool, mean: bool,
    chosen: configurations.Configuration,
) -> dict:  # fmt: skip
    """Compile-time constants of both kernels."""
    D, Dv = query.shape[3], value.shape[3]
    return {
        "D": D,
        "DV": Dv,
        "BLOCK_D": _block_of(D),
        "CHUNK": configurations.score_chunk(_block_of(D)),
        "CHUNK_V": configurations.score_chunk(_block_of(Dv)),
        "BLOCK_M": chosen.block_m,
        "W": W,
        "MULTIPLY": multiply,
        "MEAN": mean,
        "PRECISION": "tf32x3" if query.dtype == torch.float32 else "ieee",
        "num_warps": chosen.warps,
        "num_stages": chosen.stages,
    }


def score_masked_attention_fwd(
    query, key, value, parameters, key_mask, widths, scale, multiply, mean
) -> Tensor:
    """The op's forward with the op's own arguments."""
    B, H, Lq, _ = query.shape
    Lk, Dv = value.shape[2:]
    out = query.new_empty(B, H, Lq, Dv)
    if out.numel() == 0 or Lk == 0:
        return out.zero_()
    layers, hidden, W = _network(widths)
    chosen = configurations.score("score_masked_forward", W, Lq, query.device)
    tiles = triton.cdiv(Lq, chosen.block_m)
    with _on_device(query):
        launch(
            score_masked_forward_kernel, (B if mean else B * H) * tiles,
            _operands(query, key, value, parameters, key_mask), out, scale,
            H, Lq, Lk, tiles, layers, hidden,
            **_settings(query, value, W, multiply, mean, chosen),
        )  # fmt: skip
    return out


def score_masked_attention_bwd(
    grad_out, query, key, value, parameters, key_mask, widths, scale, multiply, mean, needs
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The op's backward; a gradient that `needs` does not ask for is empty, and not computed."""
    operands = (query, key, value, parameters)
    B, H, Lq, _ = query.shape
    Lk = key.shape[2]
    if B * H * Lq * Lk == 0 or not any(needs):
        return tuple(
            x.new_zeros(x.shape if wanted else 0) for x, wanted in zip(operands, needs, strict=True)
        )
    layers, hidden, W = _network(widths)
    chosen = configurations.score("score_masked_backward", W, Lq, query.device)
    tiles, units = triton.cdiv(Lq, chosen.block_m), B if mean else B * H
    kept = (layers + 2) * chosen.block_m * W  # elements of a program's activations
    sums = layers * (W + 1) * W if needs[3] else 0  # of its parameters' gradient
    groups, splits = configurations.score_programs(
        units, tiles, SCRATCH_BYTES // (4 * (kept + sums)), query.device
    )
    programs = groups * splits

    def zeros(wanted: bool, *shape: int) -> Tensor | None:
        return query.new_zeros(shape, dtype=torch.float32) if wanted else None

    grads = ScoredGradients(
        query.new_empty(query.shape) if needs[0] else None,
        zeros(needs[1], splits, *key.shape),
        zeros(needs[2], splits, *value.shape),
        zeros(needs[3], programs, layers, W + 1, W),
    )
    with _on_device(query):
        launch(
            score_masked_backward_kernel, programs,
            _operands(query, key, value, parameters, key_mask),
            rows_argument(_unit_last_stride(grad_out)), grads,
            query.new_empty(programs * kept, dtype=torch.float32), scale,
            B, H, Lq, Lk, tiles, layers, hidden, units, groups, splits,
            BLOCK_DV=_block_of(value.shape[3]),
            CHUNK_W=min(W, configurations.SCORE_CHUNK),
            **_settings(query, value, W, multiply, mean, chosen),
        )  # fmt: skip
    found = [None if x is None else x.sum(0) for x in grads[1:4]]
    if needs[3]:
        found[2] = _unpadded(found[2], widths)
    return tuple(
        operand.new_empty(0) if grad is None else grad.to(operand.dtype)
        for operand, grad in zip(operands, (grads.query, *found), strict=True)
    )


def _unpadded(layers: Tensor, widths) -> Tensor:
    """The vector W_1, b_1, W_2, ... of [layers, W + 1, W]; inner layers have one shape."""
    weights, biases = layers[:, :-1], layers[:, -1:]
    ends = sorted({0, len(widths) - 2})
    parts = [range(end, end + 1) for end in ends]
    if len(widths) > 3:
        parts.insert(1, range(1, len(widths) - 2))
    rows = []
    for part in parts:
        rows_in, out = widths[part[0]], widths[part[0] + 1]
        mine = slice(part[0], part[-1] + 1)
        both = torch.cat((weights[mine, :rows_in, :out], biases[mine, :, :out]), 1)
        rows.append(both.flatten())
    return torch.cat(rows)
