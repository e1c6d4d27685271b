"""Masked attention in Triton: which kernels run, with what, in which order.

Heads whose rows and keys fit in one tile take one kernel each way (masked_attention_short.py), and
the tiles pass below where a mask is shared. Otherwise forward is one kernel, and backward, each
only when somebody wants what it gives:

    delta     rowsum(dO * O) - dlse, which every pass but dV alone reads
    rows      dQ; row sums for masks without columns
    columns   dK, dV; column sums for masks with columns only
    tiles     gradients of masks that several heads or samples share

A mask with its own head and sample gets its gradient from the rows pass (columns pass where only
that one runs), which has dS of every pair in registers anyway. For a shared mask the tiles pass
recomputes S and dP, two products a pair. Fusing it with another pass would save them, but neither
pass has what is needed in one place: the sum runs over heads and samples, which are different
programs of the rows and columns passes, and a program that looped over them itself would have to
hold one dQ (or dK and dV) a sharer. Seven products in rows and columns passes, nine with tiles.
The other way to five, dQ or dM by atomic additions, is not bitwise repeatable.

The gradient of a low-rank mask takes no pass of its own: the rows pass has dM of a head tile by
tile and adds its product with the columns to dRows, the columns pass does the same for dColumns,
and dOffset is a sum along columns like that of a mask with columns only. 2 x rank multiply-adds a
pair and head (more by what masks.fold_gradient says) instead of the 4 x D of two passes that own a
tile of the mask and recompute S and dP of all heads that share it. What is shared is summed
afterwards in a fixed order, from float32 parts of [B, H, L, at most 64 ranks]; a rank above 64 runs
both passes again, for the products they need, for each further 64.

Where a mask has few tiles and many sharers the loop is split over several programs, whose partial
sums (no more elements than query and key have) are added in a fixed order.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from . import autotune, configurations, fitting
from .availability import interpreting
from .factor_gradients import MASKS, any_fold, fold_blocks, make_folds, of_block, sum_parts
from .masked_attention_backward import (
    Backward,
    MaskGradients,
    columns_kernel,
    delta_kernel,
    rows_kernel,
    tiles_kernel,
)
from .masked_attention_forward import forward_kernel
from .masked_attention_short import short_backward_kernel, short_forward_kernel
from .masks import mask_argument
from .patterns import Shape, encoded
from .shared_masks import shared_sums
from .tiles import Operands, rows_argument

if interpreting():
    from .interpreter import install

    install()


def launch(kernel, programs: int, *arguments, **settings) -> None:
    """Every launch of this backend; ahead-of-time compilation replaces it."""
    kernel[(programs,)](*arguments, **settings)


class _Call(NamedTuple):
    """One call's operands as kernels take them, and what all launches share."""

    o: Operands
    shape: Shape
    largest_step: int
    B: int
    H: int
    group: int
    Lq: int
    Lk: int
    D: int
    Dv: int
    scale: float
    dropout: tuple[int, int, int, float]  # seed, offset, threshold, 1 / (1 - p)
    dropout_p: float
    gate: bool
    query: Tensor

    def settings(self, configuration: configurations.Configuration) -> dict:
        """Compile-time constants that all kernels but delta take."""
        even = (
            self.shape.N_TERMS == 0
            and self.Lq % configuration.block_m == 0
            and self.Lk % configuration.block_n == 0
        )
        o = self.o
        return {
            "D": self.D,
            "DV": self.Dv,
            "BLOCK_D": _block_of(self.D),
            "BLOCK_DV": _block_of(self.Dv),
            "BLOCK_M": configuration.block_m,
            "BLOCK_N": configuration.block_n,
            "N_TERMS": self.shape.N_TERMS,
            "CODE": self.shape.CODE,
            "STEPPED": self.shape.STEPPED,
            "GATE": self.gate,
            "DROPOUT": self.dropout_p > 0,
            "HIDES": not even or o.key_mask is not None or o.attn_mask is not None,
            "EVEN": even,
            "PRECISION": "tf32x3" if self.query.dtype == torch.float32 else "ieee",
            "num_warps": configuration.warps,
            "num_stages": configuration.stages,
        }

    def run(
        self,
        kernel: str,
        launched: Callable[[configurations.Configuration], object],
        width: int | None = None,
    ) -> None:
        """Launches a kernel with what the rule of cost, or a measurement, picks from the table.

        width: of what the kernel multiplies, when that is not the operands'.
        """
        problem = configurations.Problem(
            kernel, width or self.query.element_size(), max(self.D, self.Dv), self.Lq, self.Lk,
            self.B * self.H, configurations.ampere(self.query.device), self.low_rank(),
        )  # fmt: skip
        device = self.query.device
        if autotune.enabled():
            chosen = autotune.choose(problem, device, launched)
        else:
            chosen = configurations.choose(problem, device)
        fitting.launch(launched, chosen, lambda: (kernel, device, self.D, self.Dv, self.kinds()))

    def kinds(self) -> tuple:
        """Of the masks: what their tiles take."""
        o = self.o
        return tuple(
            mask and (mask.pointer.dtype, mask.ROWS.value, mask.COLUMNS.value, mask.RANK.value)
            for mask in (o.multiplier, o.bias, o.attn_mask, o.key_mask)
        )

    def low_rank(self) -> bool:
        masks = (self.o.multiplier, self.o.bias)
        return any(mask is not None and mask.RANK.value > 0 for mask in masks)

    def order(self) -> str:
        """By the first mask that has rows and columns, whose tiles are what programs share."""
        masks = (self.o.multiplier, self.o.bias, self.o.attn_mask)
        for mask in masks:
            if mask is not None and mask.ROWS.value and mask.COLUMNS.value and not mask.RANK.value:
                shape = mask.pointer.shape
                return configurations.order((shape[0] == self.B, shape[1] == self.H))
        return configurations.order(None)

    def short(self) -> tuple[int, int]:
        """configurations.short of this call."""
        width = self.query.element_size()
        device, head_dim = self.query.device, max(self.D, self.Dv)
        return configurations.short(device, width, head_dim, self.low_rank())

    def pack(self) -> int:
        """Heads that one tile takes; 0 where a head does not fit in one."""
        block, _ = self.short()
        longest = max(self.Lq, self.Lk)
        if longest > block:
            return 0
        # a table of patterns is read for one head a program
        return 1 if self.shape.CODE < 0 else min(block // longest, 16)

    def short_settings(self, pack: int) -> dict:
        """Compile-time constants of the short kernels."""
        block_m, block_n = (_block_of(pack * length) for length in (self.Lq, self.Lk))
        _, warps = self.short()
        settings = self.settings(configurations.Configuration(block_m, block_n, warps, 1))
        left_out = ("STEPPED", "HIDES", "EVEN")
        settings = {name: value for name, value in settings.items() if name not in left_out}
        return settings | {"PACK": pack}

    def tiles(self, length: int, block: int, step: int | None = None) -> int:
        """Tiles of an axis, those of each residue class on their own."""
        step = self.largest_step if step is None else step
        return step * triton.cdiv(triton.cdiv(length, step), block)


def _block_of(width: int) -> int:
    return max(16, triton.next_power_of_2(width))


def _call(
    query, key, value, multiplier, bias, attn_mask, key_mask, segment_ids, rng_state,
    pattern, scale, dropout_p, gate, multiplier_factors=(), bias_factors=(),
) -> _Call:  # fmt: skip
    """..._factors: columns and offset of a low-rank mask, if it is one."""
    B, H, Lq, D = query.shape
    Lk, Dv = value.shape[2:]
    query, key, value = (_unit_last_stride(x) for x in (query, key, value))
    terms, shape, largest_step = encoded(list(pattern), list(segment_ids), Lq, Lk, query.device)
    if attn_mask is not None:
        attn_mask = attn_mask.view(torch.uint8)
    if key_mask is not None:
        key_mask = key_mask.view(torch.uint8)[:, None, None, :]
    operands = Operands(
        *(rows_argument(x) for x in (query, key, value)),
        mask_argument(multiplier, *multiplier_factors),
        mask_argument(bias, *bias_factors),
        mask_argument(attn_mask),
        mask_argument(key_mask),
        terms,
    )
    dropout = (0, 0, 0, 1.0)
    if dropout_p > 0:
        seed, offset = rng_state.tolist()
        dropout = (seed, offset, int(dropout_p * 2**32), 1 / (1 - dropout_p))
    return _Call(
        operands, shape, largest_step, B, H, H // key.shape[1], Lq, Lk, D, Dv, scale, dropout,
        dropout_p, gate, query,
    )  # fmt: skip


def _unit_last_stride(tensor: Tensor) -> Tensor:
    return tensor if tensor.stride(3) == 1 or tensor.shape[3] == 1 else tensor.contiguous()


def _on_device(tensor: Tensor):
    """Triton launches on the current device."""
    if tensor.device.type == "cuda" and tensor.device.index != torch.cuda.current_device():
        return torch.cuda.device(tensor.device)
    return contextlib.nullcontext()


def masked_attention_fwd(
    query, key, value, multiplier, bias, multiplier_columns, multiplier_offset, bias_columns,
    bias_offset, attn_mask, key_mask, segment_ids, rng_state, pattern, scale, dropout_p, gate,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The op's forward with the op's own arguments."""
    B, H, Lq, _ = query.shape
    Lk, Dv = value.shape[2:]
    out = query.new_empty(B, H, Lq, Dv)
    lse = query.new_empty(B, H, Lq, dtype=torch.float32)
    if lse.numel() == 0 or Lk == 0:
        return out.zero_(), lse.fill_(-torch.inf)
    call = _call(
        query, key, value, multiplier, bias, attn_mask, key_mask, segment_ids, rng_state,
        pattern, scale, dropout_p, gate, (multiplier_columns, multiplier_offset),
        (bias_columns, bias_offset),
    )  # fmt: skip
    pack = call.pack()
    if pack:
        with _on_device(query):
            launch(
                short_forward_kernel, triton.cdiv(B * H, pack),
                call.o, out, lse, scale, *call.dropout, B * H, H, call.group, Lq, Lk,
                **call.short_settings(pack),
            )  # fmt: skip
        return out, lse

    def run(chosen: configurations.Configuration) -> None:
        tiles = call.tiles(Lq, chosen.block_m)
        launch(
            forward_kernel, B * H * tiles,
            call.o, out, lse, scale, *call.dropout, B, H, call.group, Lq, Lk, tiles,
            ORDER=call.order(), **call.settings(chosen),
        )  # fmt: skip

    with _on_device(query):
        call.run("forward", run)
    return out, lse


def masked_attention_bwd(
    grad_out, grad_lse, query, key, value, multiplier, bias, multiplier_columns, multiplier_offset,
    bias_columns, bias_offset, attn_mask, key_mask, segment_ids, rng_state, out, lse, pattern,
    scale, dropout_p, gate, needs,
) -> tuple[Tensor, ...]:  # fmt: skip
    """The op's backward; a gradient that `needs` does not ask for is empty, and not computed."""
    factors = (multiplier_columns, multiplier_offset, bias_columns, bias_offset)
    operands = (query, key, value, multiplier, bias, *factors)
    if lse.numel() == 0 or key.shape[2] == 0:
        return tuple(_zeros(x, query, wanted) for x, wanted in zip(operands, needs, strict=True))
    call = _call(
        query, key, value, multiplier, bias, attn_mask, key_mask, segment_ids, rng_state,
        pattern, scale, dropout_p, gate, factors[:2], factors[2:],
    )  # fmt: skip
    grads = [_empty(x, query, wanted) for x, wanted in zip(operands, needs, strict=True)]
    with _on_device(query):
        _run_backward(call, grads, operands, needs, grad_out, grad_lse, out, lse)
    return tuple(grads)


def _empty(operand: Tensor | None, query: Tensor, wanted: bool) -> Tensor:
    like = query if operand is None else operand
    return query.new_empty(operand.shape if wanted else 0, dtype=like.dtype)


def _zeros(operand: Tensor | None, query: Tensor, wanted: bool) -> Tensor:
    return _empty(operand, query, wanted).zero_()


class _MaskPlan(NamedTuple):
    """Where the gradients of multiplier and bias come from: "own", "rows", "columns", "tiles" or
    "" (not wanted, or folded into those of factors)."""

    multiplier: str
    bias: str

    def has(self, source: str) -> bool:
        return source in self


def _source(mask: Tensor, wanted: bool, call: _Call) -> str:
    if not wanted:
        return ""
    batch, head, row, column = mask.shape
    if row == 1 or column == 1:
        return "columns" if column > 1 else "rows"
    own = batch == call.B and head == call.H
    return "own" if own else "tiles"


def _run_backward(call, grads, operands, needs, grad_out, grad_lse, out, lse) -> None:
    """Fills grads."""
    B, H, Lq = call.B, call.H, call.Lq
    plan = _MaskPlan(
        *(
            _source(operands[mask], needs[mask] and operands[columns] is None, call)
            for mask, columns, _ in MASKS
        )
    )
    if call.shape.N_TERMS:  # tiles that no head sees are never visited
        for at, source in enumerate(plan, start=3):
            if source in ("own", "tiles"):
                grads[at].zero_()
    grad_out = _unit_last_stride(grad_out)
    grad_lse = None if grad_lse is None else grad_lse.contiguous()
    pack = call.pack() if call.group == 1 else 0
    if pack:
        _run_short(call, pack, plan, grads, operands, needs, grad_out, grad_lse, out, lse)
        return
    delta = lse
    if any((*needs[:2], *needs[3:])):
        delta = torch.empty_like(lse)
        block = 64
        launch(
            delta_kernel, B * H * triton.cdiv(Lq, block),
            out, rows_argument(grad_out), grad_lse, delta, H, Lq,
            DV=call.Dv, BLOCK_DV=_block_of(call.Dv), BLOCK_M=block,
        )  # fmt: skip
    g = Backward(rows_argument(grad_out), lse, delta)

    rows_run = needs[0] or plan.has("rows") or any_fold("rows", operands, needs)
    columns_run = needs[1] or needs[2] or plan.has("columns") or needs[6] or needs[8]
    columns_run = columns_run or any_fold("columns", operands, needs)
    rows_run = rows_run or (plan.has("own") and not columns_run)
    if rows_run:
        targets, sums = _targets("rows", Lq, plan, True, call, grads)
        for block, folds in enumerate(fold_blocks("rows", B, H, operands, needs, grads)):
            to = (grads[0] if needs[0] and block == 0 else None, of_block(block, targets, folds))
            call.run("rows", functools.partial(_launch_rows, call, g, *to))
        _reduce(sums, grads)
    if columns_run:
        targets, sums = _column_targets(plan, not rows_run, call, grads, needs)
        for block, folds in enumerate(fold_blocks("columns", B, H, operands, needs, grads)):
            key_value = (grads[at] if needs[at] and block == 0 else None for at in (1, 2))
            to = (*key_value, of_block(block, targets, folds))
            call.run("columns", functools.partial(_launch_columns, call, g, *to))
        _reduce(sums, grads)
    if plan.has("tiles"):
        _run_tiles(call, g, plan, grads)


def _launch_rows(
    call: _Call, g: Backward, grad_query: Tensor | None, targets: MaskGradients,
    chosen: configurations.Configuration,
) -> None:  # fmt: skip
    tiles = call.tiles(call.Lq, chosen.block_m)
    launch(
        rows_kernel, call.B * call.H * tiles,
        call.o, g, grad_query, targets, call.scale, *call.dropout, call.B, call.H, call.group,
        call.Lq, call.Lk, tiles, ORDER=call.order(), **call.settings(chosen),
    )  # fmt: skip


def _launch_columns(
    call: _Call, g: Backward, grad_key: Tensor | None, grad_value: Tensor | None,
    targets: MaskGradients, chosen: configurations.Configuration,
) -> None:  # fmt: skip
    # heads that share keys have tiles of one spacing only when they have one pattern
    stepped = call.shape.STEPPED and (call.group == 1 or call.shape.CODE >= 0)
    tiles = call.tiles(call.Lk, chosen.block_n, None if stepped else 1)
    settings = call.settings(chosen) | {
        "STEPPED": stepped,
        "CHUNK_D": configurations.chunk(call.query.element_size()),
    }
    launch(
        columns_kernel, call.B * (call.H // call.group) * tiles,
        call.o, g, grad_key, grad_value, targets, call.scale, *call.dropout, call.B, call.H,
        call.group, call.Lq, call.Lk, tiles, ORDER=call.order(), **settings,
    )  # fmt: skip


def _run_short(
    call: _Call, pack: int, plan: _MaskPlan, grads, operands, needs, grad_out, grad_lse, out, lse
) -> None:
    """All gradients in one launch, but those of shared masks."""
    delta = torch.empty_like(lse) if plan.has("tiles") else None
    g = Backward(rows_argument(grad_out), lse, delta)
    own, rows_sums = _targets("rows", call.Lq, plan, True, call, grads)
    along, columns_sums = _column_targets(plan, False, call, grads, needs)
    B, H = call.B, call.H
    rows_folds, rows_parts = make_folds("rows", B, H, operands, needs, grads)
    columns_folds, columns_parts = make_folds("columns", B, H, operands, needs, grads)
    wanted = any(one is not None for one in (*own, *along, *rows_folds, *columns_folds))
    if any(needs[:3]) or wanted or delta is not None:
        launch(
            short_backward_kernel, triton.cdiv(call.B * call.H, pack),
            call.o, g, out, grad_lse, *(grads[at] if needs[at] else None for at in range(3)),
            own[:2], own[2:4], along[2:4], tuple(rows_folds), tuple(columns_folds), call.scale,
            *call.dropout, call.B * call.H, call.H, call.group, call.Lq, call.Lk,
            **call.short_settings(pack),
        )  # fmt: skip
    _reduce(rows_sums, grads)
    _reduce(columns_sums, grads)
    sum_parts(rows_parts + columns_parts)
    if plan.has("tiles"):
        _run_tiles(call, g, plan, grads)


def _targets(
    which: str, length: int, plan: _MaskPlan, takes_own: bool, call: _Call, grads: list
) -> tuple[MaskGradients, dict[int, Tensor]]:
    """Where the rows or columns pass puts mask gradients, and the sums to reduce afterwards."""
    own, sums = [None, None], [None, None]
    for at, source in enumerate(plan):
        if source == "own" and takes_own:
            own[at] = mask_argument(grads[3 + at])
        elif source == which:
            sums[at] = call.query.new_empty(call.B, call.H, length, dtype=torch.float32)
    to_reduce = {3 + at: one for at, one in enumerate(sums) if one is not None}
    return MaskGradients(*own, *sums), to_reduce


def _column_targets(
    plan: _MaskPlan, takes_own: bool, call: _Call, grads: list, needs
) -> tuple[MaskGradients, dict[int, Tensor]]:
    """_targets of the columns pass, with the offsets of low-rank masks."""
    targets, sums = _targets("columns", call.Lk, plan, takes_own, call, grads)
    for name, (_, _, offset) in zip(("multiplier_sums", "bias_sums"), MASKS, strict=True):
        if needs[offset]:
            sums[offset] = call.query.new_empty(call.B, call.H, call.Lk, dtype=torch.float32)
            targets = targets._replace(**{name: sums[offset]})
    return targets, sums


def _reduce(sums: dict[int, Tensor], grads: list[Tensor]) -> None:
    """[B, H, L] to the mask's own shape, in a fixed order."""
    for at, total in sums.items():
        shape = grads[at].shape
        total = total[..., None, :] if shape[3] > 1 else total[..., None]
        axes = [axis for axis in range(4) if shape[axis] == 1 and total.shape[axis] > 1]
        grads[at].copy_(total.sum(axes, keepdim=True) if axes else total)


def _run_tiles(
    call: _Call, g, plan: _MaskPlan, grads: list[Tensor], kernel="tiles", launched=None
) -> None:
    """Both masks in one launch when the same heads and samples share them, otherwise one each."""
    shared = [at for at, source in enumerate(plan) if source == "tiles"]
    together = len({grads[3 + at].shape[:2] for at in shared}) == 1
    for group in [shared] if together else [[at] for at in shared]:
        call.run(kernel, functools.partial(launched or _launch_tiles, call, g, group, grads))


def _launch_tiles(
    call: _Call,
    g: Backward,
    which: list[int],
    grads: list[Tensor],
    chosen: configurations.Configuration,
) -> None:
    uniform = call.shape.CODE >= 0
    step = call.largest_step if uniform else 1
    row_tiles = call.tiles(call.Lq, chosen.block_m, step)
    column_tiles = triton.cdiv(triton.cdiv(call.Lk, step), chosen.block_n)
    sums = shared_sums(call, which, grads, row_tiles * column_tiles)
    settings = call.settings(chosen) | {
        "STEPPED": call.shape.STEPPED and uniform,
        "CHUNK_D": configurations.chunk(call.query.element_size()),
    }
    launch(
        tiles_kernel, sums.own * row_tiles * column_tiles * sums.splits,
        call.o, g, sums.targets, sums.stride, call.scale, *call.dropout,
        call.H, call.group, call.Lq, call.Lk, row_tiles, column_tiles, sums.batches, sums.heads,
        sums.splits, **settings,
    )  # fmt: skip
    sums.finish(grads)
