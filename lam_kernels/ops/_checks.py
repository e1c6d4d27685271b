"""Argument checks that two or more ops share.

Shapes, dtypes and devices only: nothing here reads data or waits for a device.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..low_rank_mask import MAX_RANK, LowRankMask

FLOAT_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
MAX_HEAD_DIM = 256


def cast_under_autocast(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The three as autocast wants them; float64 and what is no float stay as they are."""
    if not (isinstance(query, Tensor) and isinstance(key, Tensor) and isinstance(value, Tensor)):
        for name, tensor in (("query", query), ("key", key), ("value", value)):
            check_tensor(name, tensor)
    device = query.device.type
    if device == "meta" or not torch.is_autocast_enabled(device):  # meta has none to ask about
        return query, key, value
    dtype = torch.get_autocast_dtype(device)
    return tuple(
        tensor
        if tensor.dtype == torch.float64 or not tensor.is_floating_point()
        else tensor.to(dtype)
        for tensor in (query, key, value)
    )


def check_query_key_value(query: Tensor, key: Tensor, value: Tensor, enable_gqa: bool) -> None:
    if query.dim() != 4 or key.dim() != 4 or value.dim() != 4:
        for name, tensor in (("query", query), ("key", key), ("value", value)):
            if tensor.dim() != 4:
                raise ValueError(
                    f"{name} must be [B, heads, L, D] (4 axes), got shape {tuple(tensor.shape)}"
                )
    dtype, device = query.dtype, query.device
    if dtype not in FLOAT_DTYPES:
        raise TypeError(f"query must be float32, bfloat16, float16 or float64, got {dtype}")
    if key.dtype != dtype or value.dtype != dtype:
        raise TypeError(
            f"query, key and value must share one dtype, got {dtype}, {key.dtype}, {value.dtype}"
        )
    if key.device != device or value.device != device:
        raise ValueError(
            f"query, key and value must be on one device, got {device}, {key.device}, "
            f"{value.device}"
        )
    if not (query.layout == key.layout == value.layout == torch.strided):
        raise ValueError(
            f"query, key and value must be dense (torch.strided), got {query.layout}, "
            f"{key.layout}, {value.layout}"
        )
    B, H, _, D = query.shape
    key_B, Hkv, Lk, key_D = key.shape
    value_B, value_heads, value_L, Dv = value.shape
    if key_B != B or key_D != D:
        raise ValueError(
            f"key must be [{B}, Hkv, Lk, {D}] to match query {tuple(query.shape)}, "
            f"got {tuple(key.shape)}"
        )
    if value_B != B or value_heads != Hkv or value_L != Lk:
        raise ValueError(
            f"value must be [{B}, {Hkv}, {Lk}, Dv] to match key {tuple(key.shape)}, "
            f"got {tuple(value.shape)}"
        )
    if not 1 <= D <= MAX_HEAD_DIM:
        raise ValueError(f"query: head dim must be 1 to {MAX_HEAD_DIM}, got {D}")
    if not 1 <= Dv <= MAX_HEAD_DIM:
        raise ValueError(f"value: head dim must be 1 to {MAX_HEAD_DIM}, got {Dv}")
    if Hkv != H:
        if not enable_gqa:
            raise ValueError(
                f"key and value have {Hkv} heads, query has {H}: pass enable_gqa=True to share them"
            )
        if Hkv == 0 or H % Hkv != 0:
            raise ValueError(f"key and value heads ({Hkv}) must divide query heads ({H})")


def check_equal_heads(query: Tensor, key: Tensor) -> None:
    """For ops without shared key/value heads. Says nothing about tensors that are not 4-D."""
    if query.dim() == 4 and key.dim() == 4 and query.shape[1] != key.shape[1]:
        raise ValueError(
            f"key and value must have query's {query.shape[1]} heads, got {key.shape[1]}"
        )


def check_tensor(name: str, value) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a Tensor, got {type(value).__name__}")


def check_pair_shape(name: str, operand: Tensor, shape: tuple[int, int, int, int]) -> Tensor:
    """The operand with 4 axes, each full or 1; [Lq, Lk] is taken as [1, 1, Lq, Lk]."""
    axes = operand.dim()
    if operand.layout != torch.strided:
        raise ValueError(f"{name} must be dense (torch.strided), got {operand.layout}")
    if axes == 2:
        operand = operand[None, None]
    elif axes != 4:
        why = (
            ": [B, Lq, Lk] and [H, Lq, Lk] cannot be told apart, add the axis you mean"
            if axes == 3
            else ""
        )
        raise ValueError(
            f"{name} must have 4 axes or be [Lq, Lk], got {axes} axes, "
            f"shape {tuple(operand.shape)}{why}"
        )
    b, h, i, j = operand.shape
    B, H, Lq, Lk = shape
    if (b != 1 and b != B) or (h != 1 and h != H) or (i != 1 and i != Lq) or (j != 1 and j != Lk):
        raise ValueError(
            f"{name} has shape {tuple(operand.shape)}; each axis must be 1 or that of "
            f"[B, H, Lq, Lk] = [{B}, {H}, {Lq}, {Lk}]"
        )
    return operand


def check_device(name: str, operand: Tensor, query: Tensor) -> None:
    if operand.device != query.device:
        raise ValueError(f"{name} must be on query's device {query.device}, got {operand.device}")


def check_float_operand(
    name: str, operand: Tensor, shape: tuple[int, int, int, int], query: Tensor
) -> Tensor:
    """A dense multiplier or bias, with 4 axes."""
    if not isinstance(operand, Tensor):
        hint = ", which this op does not take: pass its .dense()"
        got = f"a LowRankMask{hint}" if isinstance(operand, LowRankMask) else type(operand).__name__
        raise TypeError(f"{name} must be a Tensor, got {got}")
    dtype = operand.dtype
    if dtype not in FLOAT_DTYPES:
        hint = "; a boolean mask is attn_mask (or key_mask)" if not dtype.is_floating_point else ""
        raise TypeError(f"{name} must be float32, bfloat16, float16 or float64, got {dtype}{hint}")
    if dtype == torch.float64 and query.dtype != torch.float64:
        raise TypeError(f"{name} may be float64 only when query is, query is {query.dtype}")
    if operand.device != query.device:
        check_device(name, operand, query)
    return check_pair_shape(name, operand, shape)


def check_mask(
    name: str, operand: Tensor | LowRankMask | None, shape: tuple[int, int, int, int], query: Tensor
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """A multiplier or bias as the op takes it: (M, None, None) or (rows, columns, offset)."""
    if operand is None:
        return None, None, None
    if isinstance(operand, Tensor):
        return check_float_operand(name, operand, shape, query), None, None
    if not isinstance(operand, LowRankMask):
        raise TypeError(f"{name} must be a Tensor or a LowRankMask, got {type(operand).__name__}")
    B, H, Lq, Lk = shape
    rank = operand.rank
    if rank > MAX_RANK:
        raise ValueError(
            f"{name}: a LowRankMask may have a rank of 1 to {MAX_RANK}, got {rank}: "
            "pass its .dense()"
        )
    for factor, tensor, axes in (
        ("rows", operand.rows, (Lq, rank)),
        ("columns", operand.columns, (Lk, rank)),
        ("offset", operand.offset, (1, Lk)),
    ):
        if tensor is None:
            continue
        if tensor.dtype == torch.float64 and query.dtype != torch.float64:
            raise TypeError(
                f"{name}: LowRankMask.{factor} may be float64 only when query is, "
                f"query is {query.dtype}"
            )
        check_device(f"{name}: LowRankMask.{factor}", tensor, query)
        b, h, *rest = tensor.shape
        if (b != 1 and b != B) or (h != 1 and h != H) or tuple(rest) != axes:
            raise ValueError(
                f"{name}: LowRankMask.{factor} has shape {tuple(tensor.shape)}, expected "
                f"[{B} or 1, {H} or 1, {axes[0]}, {axes[1]}]"
            )
    return operand.rows, operand.columns, operand.offset


def check_attn_mask(attn_mask: Tensor, shape: tuple[int, int, int, int], query: Tensor) -> Tensor:
    check_tensor("attn_mask", attn_mask)
    if attn_mask.dtype != torch.bool:
        hint = (
            "; a float mask is bias (added to the scores)"
            if attn_mask.dtype.is_floating_point
            else ""
        )
        raise TypeError(f"attn_mask must be bool (True = visible), got {attn_mask.dtype}{hint}")
    check_device("attn_mask", attn_mask, query)
    return check_pair_shape("attn_mask", attn_mask, shape)


def check_key_mask(key_mask: Tensor, B: int, Lk: int, query: Tensor) -> None:
    check_tensor("key_mask", key_mask)
    if key_mask.dtype != torch.bool:
        raise TypeError(f"key_mask must be bool (True = visible), got {key_mask.dtype}")
    if key_mask.dim() != 2 or key_mask.shape[0] != B or key_mask.shape[1] != Lk:
        raise ValueError(
            f"key_mask must be [B, Lk] = [{B}, {Lk}], got shape {tuple(key_mask.shape)}"
        )
    check_device("key_mask", key_mask, query)


def check_segment_ids(
    segment_ids: tuple[Tensor, ...], B: int, Lq: int, Lk: int, query: Tensor
) -> None:
    for at, ids in enumerate(segment_ids):
        name, length = ("key_ids", Lk) if at % 2 else ("query_ids", Lq)
        if (ids.shape[0] != 1 and ids.shape[0] != B) or ids.shape[1] != length:
            raise ValueError(
                f"pattern: Segments.{name} must be [{B} or 1, {length}], got {tuple(ids.shape)}"
            )
        check_device(f"pattern: Segments.{name}", ids, query)


def check_scale(scale: float) -> float:
    if isinstance(scale, Tensor):
        raise TypeError(
            "scale must be a float, got a Tensor: a learned scale is a multiplier [1, H, 1, 1]"
        )
    if isinstance(scale, bool) or not isinstance(scale, (int, float)):
        raise TypeError(f"scale must be a float or None, got {type(scale).__name__}")
    try:
        value = float(scale)
    except OverflowError:
        value = math.inf
    if not abs(value) < math.inf:
        raise ValueError(f"scale must be finite, got {value}")
    return value


def check_dropout_p(dropout_p: float) -> None:
    if isinstance(dropout_p, bool) or not isinstance(dropout_p, (int, float)):
        raise TypeError(f"dropout_p must be a float, got {type(dropout_p).__name__}")
    if not 0.0 <= dropout_p < 1.0:
        raise ValueError(f"dropout_p must be at least 0 and below 1, got {dropout_p}")
