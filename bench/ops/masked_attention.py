"""masked_attention for the bench: operands, reference, FLOPs and bytes. Peers: the file beside it.

FLOPs: only visible pairs count, and only the matrix products; a multiply and an add are 2 FLOPs.

    forward   S = Q K^T (2 D), O = P V (2 Dv)                            2 D + 2 Dv a pair
    backward  S again, dQ, dK (2 D each), dP = dO V^T, dV (2 Dv each)    6 D + 4 Dv a pair

With D = Dv that is 4 D and 10 D: backward = 2.5 x forward, the convention of FlashAttention (arXiv
2205.14135). A mask of rank r adds 2 r forward and 6 r backward for each pair of one sharing of its
factors: it is built once for the heads and samples that share it, built again, and its gradient
goes to rows and columns. A peer that does more (a mask-free one does not compute dM, a blocked one
also multiplies hidden pairs) is charged for the same useful work, so rates compare like times do.

Bytes: every operand and every saved result is read once, every result written once; nothing in
between touches memory.

Problems of more than 2^24 pairs are checked on slices that still cover every operand's gradient: 64
rows of all heads (out, dquery, the rows of a mask's gradient, which sums over heads and batch), and
one whole head (dkey, dvalue, a column bias' gradient).
"""

from __future__ import annotations

import ast
import math
import re
from functools import lru_cache

import torch
from torch import Tensor

from bench.check import Expected
from lam_kernels import LowRankMask
from lam_kernels.patterns import Segments
from lam_kernels.patterns import visible_pairs as pairs_of_spec
from python_ref.inputs import (
    Operands,
    Problem,
    draw_pattern,
    each_factor,
    factor_axes,
    mask_shape,
    named_factors,
)
from python_ref.masked_attention import masked_attention as reference_attention

from .masked_attention_peers import PEERS, usual_peers

__all__ = ["PEERS", "Problem", "usual_peers"]

OUTPUTS = ("out",)
EXAMPLE = {"B": 1, "H": 8, "Lq": 1024, "Lk": 1024, "D": 64, "multiplier": "b1qk"}
FULL_PAIRS = 2**24
SLICE_ROWS = 64
_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "float64": 8}
_MASKS = (("m", "multiplier"), ("b", "bias"))


# ---- operands


def draw(problem: Problem, device: str = "cpu") -> Operands:
    """The operands without the [B,H,Lq,Lk] booleans that only tests look at.

    Two patterns of real models go beyond what Problem draws: attn_mask "text(n)", where the first n
    positions are words (each sees the words before it and all the rest, nothing else sees them:
    SwinBERT), and pattern "Windows(rows, columns, side, shift)", the shifted windows of Swin.
    """
    text, windows = _text_length(problem), _window_arguments(problem)
    plain = problem.but(pattern=None, **({"attn_mask": None} if text else {}))
    operands = plain.operands(booleans=False)
    if windows:
        operands.pattern = shifted_windows(problem.B, problem.Lq, *windows)
    elif problem.pattern is not None:
        operands.pattern = draw_pattern(problem, torch.Generator().manual_seed(problem.seed))
    if text:
        operands.attn_mask = text_mask(problem.Lq, text)[None, None]
    operands.problem = problem
    return operands if device == "cpu" else _moved(operands, device)


def _text_length(problem: Problem) -> int:
    found = re.fullmatch(r"text\((\d+)\)", problem.attn_mask or "")
    return int(found[1]) if found else 0


def text_mask(length: int, text: int) -> Tensor:
    """[length, length]: words see the words up to themselves and all else; all else never words."""
    seen = torch.ones(length, length, dtype=torch.bool)
    seen[:text, :text].tril_()
    seen[text:, :text] = False
    return seen


def _window_arguments(problem: Problem) -> tuple[int, ...]:
    if not isinstance(problem.pattern, str) or not problem.pattern.startswith("Windows("):
        return ()
    return tuple(ast.literal_eval(a) for a in ast.parse(problem.pattern, mode="eval").body.args)


def shifted_windows(batch: int, length: int, rows: int, columns: int, side: int, shift: int):
    """The Segments of `rows` x `columns` windows of side x side tokens after a cyclic shift."""
    if side * side != length or batch % (rows * columns):
        raise ValueError(
            f"Windows({rows}, {columns}, {side}, {shift}) needs L = {side * side} and B a multiple "
            f"of {rows * columns}, got {length} and {batch}"
        )

    def region(windows: int) -> Tensor:  # 0 before the last window, 1 and 2 within it
        at = torch.arange(windows * side)
        return (at >= (windows - 1) * side).long() + (at >= windows * side - shift).long()

    ids = 3 * region(rows)[:, None] + region(columns)
    ids = ids.view(rows, side, columns, side).transpose(1, 2).reshape(rows * columns, length)
    ids = ids.repeat(batch // (rows * columns), 1)
    return Segments(ids, ids)


def _moved(operands: Operands, device: str) -> Operands:
    def move(value: Tensor) -> Tensor:
        return value.detach().to(device).requires_grad_(value.requires_grad)

    for name, value in vars(operands).items():
        if isinstance(value, Tensor | LowRankMask):
            setattr(operands, name, each_factor(value, move))
    patterns = operands.pattern if isinstance(operands.pattern, list) else [operands.pattern]
    if any(p is not None and p.segment_ids for p in patterns):
        if not isinstance(operands.pattern, Segments):
            raise ValueError("segments joined with other patterns are not moved to a device")
        ids = (i.to(device) for i in operands.pattern.segment_ids)
        operands.pattern = Segments(*ids)
    return operands


def arguments(operands: Operands) -> tuple[Tensor | None, ...]:
    return operands.query, operands.key, operands.value, operands.multiplier, operands.bias


def leaves(operands: Operands) -> dict[str, Tensor]:
    return operands.leaves


def grad_outs(operands: Operands) -> tuple[Tensor]:
    return (operands.grad_out,)


def label(problem: Problem) -> str:
    p = problem
    text = f"B{p.B} H{p.H}" + (f" of {p.Hkv}" if p.Hkv != p.H else "")
    text += f" L{p.Lq}" + (f"x{p.Lk}" if p.Lk != p.Lq else "")
    text += f" D{p.D}" + (f"/{p.Dv}" if p.Dv != p.D else "")
    for letter, name in _MASKS:
        axes = getattr(p, name)
        if found := factor_axes(axes):
            text += f", {name} of rank {found[0]}"
        elif axes:
            sizes = {"b": str(p.B), "h": "H", "q": "L", "k": "L", "1": "1"}
            frozen = "" if letter in p.grads else ", frozen"
            text += f", {name} [{','.join(sizes[a] for a in axes)}]{frozen}"
    if p.pattern:
        text += f", {p.pattern if isinstance(p.pattern, str) else 'a pattern for each head'}"
    text += f", {p.attn_mask} hides" if p.attn_mask else ""
    return text + (", key padding" if p.key_mask else "")


def tiny(problem: Problem) -> Problem:
    """A small problem of the same kind: its call loads libraries and starts threads."""
    if _window_arguments(problem) or _text_length(problem):
        problem = problem.but(pattern=None, attn_mask=None)
    length = 512 if "Dilated" in str(problem.pattern) else 128  # whole blocks of each residue class
    return problem.but(B=1, Lq=length, Lk=length)


# ---- what it costs


def flops(problem: Problem, direction: str) -> int:
    """FLOPs of the visible pairs; direction "fwd" (also "call"), "bwd" or "both"."""
    forward = 2 * problem.D + 2 * problem.Dv
    backward = 6 * problem.D + 4 * problem.Dv
    width = {"fwd": forward, "call": forward, "bwd": backward, "both": forward + backward}
    of_factors = sum(_factor_width(problem, name) for _, name in _MASKS)
    times = {"fwd": 1, "call": 1, "bwd": 3, "both": 4}[direction]
    shared = visible_pairs(problem) // max(1, problem.B * problem.H)
    return visible_pairs(problem) * width[direction] + shared * of_factors * times


def _factor_width(problem: Problem, name: str) -> int:
    """2 r for each sharing of a mask given by its factors, 0 for another one."""
    found = factor_axes(getattr(problem, name))
    if found is None:
        return 0
    rank, axes = found
    by_sample, by_head = (any(a[i] != "1" for a in axes[:2]) for i in (0, 1))
    return 2 * rank * (problem.B if by_sample else 1) * (problem.H if by_head else 1)


@lru_cache(maxsize=64)
def visible_pairs(problem: Problem) -> int:
    """Pairs (i, j) over all B and H that the pattern and the boolean masks keep."""
    if (
        problem.key_mask
        or problem.attn_mask
        or "Segments" in str(problem.pattern)
        or (_window_arguments(problem))
    ):
        return _counted_pairs(problem)
    pattern = draw_pattern(problem, None)
    if pattern is None:
        return problem.B * problem.H * problem.Lq * problem.Lk
    heads = pattern if isinstance(pattern, list) else [pattern] * problem.H
    counts = {}
    for one in heads:
        if one not in counts:
            whole = problem.Lq * problem.Lk
            counts[one] = whole if one is None else pairs_of_spec(one._spec, problem.Lq, problem.Lk)
    return problem.B * sum(counts[one] for one in heads)


def _counted_pairs(problem: Problem) -> int:
    """The same where data hides pairs: sample by sample, head by head where heads differ."""
    operands, p, total = draw(problem), problem, 0
    dense = dense_pattern(operands)  # None or [B|1, H|1, Lq, Lk]
    for b in range(p.B):
        seen = torch.ones(1, p.Lq, p.Lk, dtype=torch.bool)
        for mask in (dense, operands.attn_mask):
            if mask is not None:
                seen = seen & mask[b if mask.shape[0] > 1 else 0]
        if operands.key_mask is not None:
            seen = seen & operands.key_mask[b]
        total += int(seen.sum()) * (p.H if seen.shape[0] == 1 else 1)
    return total


def dense_pattern(operands: Operands) -> Tensor | None:
    """The pattern as booleans [B|1, H|1, Lq, Lk]."""
    p, device = operands.problem, operands.query.device
    if operands.pattern is None:
        return None
    if not isinstance(operands.pattern, list):
        found = operands.pattern.dense(p.Lq, p.Lk, device=device)
        return found.view(-1, 1, p.Lq, p.Lk)
    everything = torch.ones(1, p.Lq, p.Lk, dtype=torch.bool, device=device)
    heads = [
        everything if one is None else one.dense(p.Lq, p.Lk, device=device).view(-1, p.Lq, p.Lk)
        for one in operands.pattern
    ]
    batch = max(head.shape[0] for head in heads)
    return torch.stack([head.expand(batch, p.Lq, p.Lk) for head in heads], dim=1)


def least_bytes(problem: Problem, direction: str) -> int:
    """Bytes that have to move, see above. "bwd": what the forward kept is read, gradients are
    written."""
    p, size = problem, _BYTES[problem.dtype]
    query, out = p.B * p.H * p.Lq * p.D * size, p.B * p.H * p.Lq * p.Dv * size
    key, value = p.B * p.Hkv * p.Lk * p.D * size, p.B * p.Hkv * p.Lk * p.Dv * size
    lse = p.B * p.H * p.Lq * (8 if p.dtype == "float64" else 4)
    masks, mask_grads = 0, 0
    for letter, name in _MASKS:
        if axes := getattr(p, name):
            count = _BYTES[getattr(p, f"{name}_dtype") or p.dtype] * _entries(p, axes)
            kept = _kept_share(p) if axes[-2:] == "qk" else 1.0
            masks += round(count * kept)
            mask_grads += count if letter in p.grads else 0  # hidden zeros are written too
    masks += _boolean_bytes(p)
    operands = query + key + value + masks
    forward = operands + out + lse
    backward = operands + 2 * out + lse + mask_grads  # out and its gradient
    backward += sum(
        n for letter, n in (("q", query), ("k", key), ("v", value)) if letter in p.grads
    )
    return {"fwd": forward, "call": forward, "bwd": backward, "both": forward + backward}[direction]


def _entries(p: Problem, axes: str) -> int:
    """How many numbers a mask has, or the factors of one."""
    found = factor_axes(axes)
    if found is None:
        return math.prod(mask_shape(p, axes))
    rank, factors = found
    lengths = (p.Lq * rank, p.Lk * rank, p.Lk)
    return sum(
        (p.B if b != "1" else 1) * (p.H if h != "1" else 1) * length
        for (b, h), length in zip(factors, lengths, strict=False)
    )


def _boolean_bytes(p: Problem) -> int:
    """key_mask and attn_mask, a byte an entry; segment ids as the op stores them, 8 bytes each."""
    count = p.B * p.Lk if p.key_mask else 0
    if _text_length(p):
        count += p.Lq * p.Lk
    elif p.attn_mask:
        entries = 1
        for axis in mask_shape(p, p.attn_mask):
            entries *= axis
        count += entries
    if _window_arguments(p):
        count += 2 * 8 * p.B * p.Lq
    elif isinstance(p.pattern, str) and "Segments" in p.pattern:
        ids = draw_pattern(p, torch.Generator().manual_seed(p.seed)).segment_ids
        count += sum(8 * i.numel() for i in ids)
    return count


def _kept_share(problem: Problem) -> float:
    pairs = problem.B * problem.H * problem.Lq * problem.Lk
    return visible_pairs(problem) / pairs if pairs else 0.0


# ---- what is right


def score_size(problem: Problem) -> float:
    """Standard deviation of scale * Q K^T, at least 1: check.py's bounds grow with it."""
    scale = problem.D**-0.5 if problem.scale is None else problem.scale
    return max(1.0, scale * problem.D**0.5 * problem.spread)


def expected(problem: Problem, device: str = "cpu") -> list[Expected]:
    """The reference's out and gradients in float64, of the whole problem or its slices."""
    return expected_of(draw(problem, device))


def expected_of(operands: Operands) -> list[Expected]:
    problem = operands.problem
    if problem.B * problem.H * problem.Lq * problem.Lk <= FULL_PAIRS:
        return _reference(operands)
    if problem.Hkv != problem.H:
        raise ValueError("a sliced check needs Hkv == H")
    if factor_axes(problem.multiplier) or factor_axes(problem.bias):
        return _head_by_head(operands)
    step = max(1, problem.Lq // SLICE_ROWS)
    rows = torch.arange(0, problem.Lq, step, device=operands.query.device)
    rows[-1] = problem.Lq - 1  # both ends, where patterns are cut off
    return _reference(operands, rows=rows) + _reference(operands, head=problem.H // 2)


def _head_by_head(operands: Operands) -> list[Expected]:
    """The whole problem, one head at a time, for gradients that no slice knows all of: those of a
    mask's factors, which all heads share."""
    found: dict[str, Tensor] = {}
    shapes = {name: tensor.shape for name, tensor in _named(operands).items()}
    shapes["out"] = operands.grad_out.shape
    for head in range(operands.problem.H):
        for part in _reference(operands, head=head, partial=True):
            if part.name not in found:
                found[part.name] = part.values.new_zeros(shapes[part.name])
            found[part.name][part.index] += part.values
    return [Expected(name, (slice(None),), values) for name, values in found.items()]


def _named(operands: Operands) -> dict[str, Tensor]:
    """Every operand that may have a gradient; a LowRankMask's factors as name.factor."""
    names = Operands.NAMES.values()
    return {k: v for name in names for k, v in named_factors(name, getattr(operands, name)).items()}


def _reference(
    operands: Operands, rows: Tensor | None = None, head: int | None = None, partial: bool = False
) -> list[Expected]:
    """The reference of these rows, or this head; gradients that need other rows or heads as well
    only if `partial`."""
    problem, tensors = operands.problem, _named(operands)
    everything = slice(None)
    at_row = everything if rows is None else rows
    at_head = everything if head is None else slice(head, head + 1)
    has_rows = {"out", "query", "multiplier", "multiplier.rows", "bias", "bias.rows", "attn_mask"}

    def index(name: str, shape: torch.Size) -> tuple:
        return (
            everything,
            at_head if shape[1] == problem.H else everything,
            at_row if name in has_rows and shape[2] == problem.Lq else everything,
        )

    where = {name: index(name, tensor.shape) for name, tensor in tensors.items()}
    parts = {
        name: tensor.detach()[where[name]].double().requires_grad_(tensor.requires_grad)
        for name, tensor in tensors.items()
    }
    masks = {}
    for name in ("multiplier", "bias"):
        factors = [part for key, part in parts.items() if key.startswith(f"{name}.")]
        masks[name] = LowRankMask(*factors) if factors else parts.get(name)
    pattern, attn_mask = operands.pattern, operands.attn_mask
    if isinstance(pattern, list) and head is not None:
        pattern = pattern[head]
    if attn_mask is not None:
        attn_mask = attn_mask[index("attn_mask", attn_mask.shape)]
    if pattern is not None and rows is not None:
        dense = dense_pattern(operands)[:, :, rows]
        pattern, attn_mask = None, dense if attn_mask is None else dense & attn_mask
    out = reference_attention(
        parts["query"], parts["key"], parts["value"], **masks, pattern=pattern, attn_mask=attn_mask,
        key_mask=operands.key_mask, scale=problem.scale, enable_gqa=problem.Hkv != problem.H,
    )  # fmt: skip
    where["out"] = index("out", operands.grad_out.shape)
    found = {"out": out.detach()}
    # A slice knows all of a gradient only if it holds every pair that adds to it.
    complete = {
        name: part
        for name, part in parts.items()
        if part.requires_grad
        and (rows is None or (tensors[name].shape[2] == problem.Lq and name in has_rows))
        and (head is None or partial or tensors[name].shape[1] == problem.H)
    }
    if complete:
        grad_out = operands.grad_out[where["out"]].double()
        found |= dict(
            zip(complete, torch.autograd.grad(out, list(complete.values()), grad_out), strict=True)
        )
    return [Expected(name, where[name], values) for name, values in found.items()]
