"""Seeded problems for masked_attention: one line of text <-> operands. Shared by the tests and the
bench.

A `Problem` says everything about a call in plain data. Its repr leaves out what is default and can
be pasted back (`Problem.parse`), so a failing random problem is one line. `Problem.operands()`
draws the tensors from its seed.

    Problem(Lq=65, multiplier="b1qk", pattern="Toeplitz(5) & Causal()", dtype="bfloat16", seed=7)

Axes of a mask are four letters, one an axis: `b h q k` where it is full and `1` where it
broadcasts; "qk" is the two-dimensional form; "rank 8: b1 11 1h" is a LowRankMask with the axes B
and H of its rows, columns and, if there is a third word, offset. A pattern is text as well: terms
joined by &, a tuple of H such texts (or None) for one a head; `Segments(n)` stands for n sorted
segments drawn from the seed (`Segments(n, shuffled=True)`: ids in any order, `shared=True`: one row
of ids for the whole batch).
"""

from __future__ import annotations

import ast
import dataclasses
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lam_kernels import patterns
from lam_kernels.low_rank_mask import LowRankMask

LAYOUTS = ("contiguous", "transposed", "sliced", "expanded", "last_strided")  # see lay_out
FILLS = ("neg_inf", "dead", "nan", "loud")
_DEFAULTS_OF = {"Lk": "Lq", "Dv": "D", "Hkv": "H"}  # a size that is None follows another one


@dataclass(frozen=True, repr=False)
class Problem:
    """One call of masked_attention with its loss, as plain data."""

    B: int = 2
    H: int = 2
    Lq: int = 33
    D: int = 16
    Lk: int | None = None  # None: Lq
    Dv: int | None = None  # None: D
    Hkv: int | None = None  # None: H
    dtype: str = "float32"
    multiplier: str | None = None  # axes
    multiplier_dtype: str | None = None  # None: dtype
    bias: str | None = None  # axes
    bias_dtype: str | None = None
    gate: bool = False  # the bias holds M >= 0, an eighth of it 0, and stands for log M
    pattern: str | tuple[str | None, ...] | None = None
    attn_mask: str | None = None  # axes
    key_mask: bool = False
    scale: float | None = None
    dropout_p: float = 0.0
    spread: float = 1.0  # query is this many times wider: rows far from uniform
    layout: str = "contiguous"  # of query, key, value: one of LAYOUTS
    mask_layout: str = "contiguous"  # of multiplier, bias and attn_mask
    grad_layout: str = "contiguous"  # of grad_out and grad_lse
    grads: str = "qkvmb"  # operands that require a gradient
    lse_grad: bool = False  # lse takes part in the loss
    fill: str = ""  # words of FILLS, joined by commas, see Operands
    seed: int = 0

    def __post_init__(self) -> None:
        for name, source in _DEFAULTS_OF.items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, getattr(self, source))
        for name in ("layout", "mask_layout", "grad_layout"):
            if getattr(self, name) not in LAYOUTS:
                raise ValueError(f"{name}={getattr(self, name)!r}: expected one of {LAYOUTS}")
        if not set(self.fill_words) <= set(FILLS):
            raise ValueError(f"fill={self.fill!r}: expected words of {FILLS}")

    @property
    def fill_words(self) -> list[str]:
        return [word for word in self.fill.split(",") if word]

    def __repr__(self) -> str:
        parts = []
        for field in dataclasses.fields(self):
            value, source = getattr(self, field.name), _DEFAULTS_OF.get(field.name)
            if value != (getattr(self, source) if source else field.default):
                parts.append(f"{field.name}={value!r}")
        return f"Problem({', '.join(parts)})"

    @classmethod
    def parse(cls, text: str) -> Problem:
        """The inverse of repr; evaluates literals only."""
        call = ast.parse(text.strip(), mode="eval").body
        if not (isinstance(call, ast.Call) and getattr(call.func, "id", "") == "Problem"):
            raise ValueError(f"expected Problem(...), got {text!r}")
        return cls(**{k.arg: ast.literal_eval(k.value) for k in call.keywords})

    def but(self, **changes) -> Problem:
        """The same problem with some fields changed."""
        given = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        for (
            name,
            source,
        ) in _DEFAULTS_OF.items():  # a size that followed another one still follows it
            if given[name] == given[source]:
                given[name] = None
        return Problem(**{**given, **changes})

    def operands(self, *, booleans: bool = True) -> Operands:
        """booleans=False: without the [B,H,Lq,Lk] tensors visible and seen, for large problems."""
        return Operands.draw(self, booleans)


@dataclass
class Operands:
    """The tensors of a problem. Those in `leaves` require a gradient and are leaves, whatever their
    strides.

    The words of `Problem.fill`:
    neg_inf  3 of 10 bias entries are -inf (not with gate)
    dead     the first and the last row of attn_mask see nothing; sample 0 of key_mask (if B > 1)
             has no key
    nan      multiplier and bias are NaN or inf wherever no pair that uses the entry is visible (of
             a LowRankMask, the offset)
    loud     keys and values that no row sees are 100 times larger
    """

    problem: Problem
    query: Tensor  # [B,H,Lq,D]
    key: Tensor  # [B,Hkv,Lk,D]
    value: Tensor  # [B,Hkv,Lk,Dv]
    multiplier: Tensor | LowRankMask | None
    bias: Tensor | LowRankMask | None
    attn_mask: Tensor | None
    key_mask: Tensor | None  # [B,Lk]
    pattern: object
    grad_out: Tensor  # [B,H,Lq,Dv]
    grad_lse: Tensor | None  # [B,H,Lq]
    visible: Tensor | None  # [B,H,Lq,Lk]: pairs with a weight
    seen: Tensor | None  # the same but for what the bias itself hides

    NAMES: ClassVar = {"q": "query", "k": "key", "v": "value", "m": "multiplier", "b": "bias"}

    @classmethod
    def draw(cls, p: Problem, booleans: bool = True) -> Operands:
        generator = torch.Generator().manual_seed(p.seed)
        dense = {
            "query": p.spread * _normal(generator, p.B, p.H, p.Lq, p.D),
            "key": _normal(generator, p.B, p.Hkv, p.Lk, p.D),
            "value": _normal(generator, p.B, p.Hkv, p.Lk, p.Dv),
        }
        masks = _draw_masks(p, generator)
        pattern = draw_pattern(p, generator)
        seen = visible = None
        if booleans or p.fill_words:
            seen = visible = _seen(p, pattern, masks["attn_mask"], masks["key_mask"])
        if p.bias and seen is not None:
            bias = dense_mask(masks["bias"])
            visible = seen & ((bias > 0) if p.gate else (bias != float("-inf")))
        if "nan" in p.fill_words:
            # a gate's own gradient is finite at M = 0 and reads the multiplier there
            masks["multiplier"] = _poison(masks["multiplier"], seen if p.gate else visible)
            masks["bias"] = _poison(masks["bias"], seen)
        if "loud" in p.fill_words and p.layout != "expanded":
            unseen = ~seen.any(dim=2).view(p.B, p.Hkv, -1, p.Lk).any(dim=2)
            for name in ("key", "value"):
                dense[name] = torch.where(unseen[..., None], 100 * dense[name], dense[name])

        dtype = getattr(torch, p.dtype)
        given = {name: lay_out(tensor.to(dtype), p.layout) for name, tensor in dense.items()}
        for name, mask in masks.items():
            if mask is not None and name != "key_mask":
                if name != "attn_mask":
                    mask_dtype = getattr(torch, getattr(p, f"{name}_dtype") or p.dtype)
                    mask = each_factor(mask, lambda x, dtype=mask_dtype: x.to(dtype))
                if p.mask_layout != "expanded":
                    mask = each_factor(mask, lambda x: lay_out(x, p.mask_layout))
                elif isinstance(mask, LowRankMask):
                    mask = each_factor(mask, lambda x: x.expand(p.B, p.H, -1, -1))
                else:
                    mask = mask.expand(p.B, p.H, p.Lq, p.Lk)
            given[name] = mask
        grad_out = lay_out(_normal(generator, p.B, p.H, p.Lq, p.Dv).to(dtype), p.grad_layout)
        grad_lse = None
        if p.lse_grad:
            grad_lse = _normal(generator, p.B, p.H, p.Lq)
            grad_lse = grad_lse.double() if p.dtype == "float64" else grad_lse
        return cls(
            p,
            pattern=pattern,
            grad_out=grad_out,
            grad_lse=grad_lse,
            visible=visible,
            seen=seen,
            **given,
        )._require()

    def _require(self) -> Operands:
        for letter, name in self.NAMES.items():
            for tensor in named_factors(name, getattr(self, name)).values():
                tensor.requires_grad_(letter in self.problem.grads)
        return self

    @property
    def leaves(self) -> dict[str, Tensor]:
        """The operands that require a gradient, by name; a LowRankMask's factors as name.factor."""
        named: dict[str, Tensor] = {}
        for name in self.NAMES.values():
            named |= named_factors(name, getattr(self, name))
        return {name: tensor for name, tensor in named.items() if tensor.requires_grad}

    def to(self, dtype: torch.dtype) -> Operands:
        """A copy whose float tensors hold exactly the same values in a wider dtype."""
        changed = {}
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, LowRankMask) or (
                isinstance(value, Tensor) and value.is_floating_point()
            ):
                changed[field.name] = each_factor(value, lambda x: x.detach().to(dtype, copy=True))
        return dataclasses.replace(self, **changed)._require()

    def masks(self) -> dict[str, object]:
        """The keyword arguments that public op and reference share."""
        p = self.problem
        return {
            "multiplier": self.multiplier,
            "bias": self.bias,
            "pattern": self.pattern,
            "attn_mask": self.attn_mask,
            "key_mask": self.key_mask,
            "scale": p.scale,
            "dropout_p": p.dropout_p,
            "enable_gqa": p.Hkv != p.H,
        }


def mask_shape(p: Problem, axes: str) -> tuple[int, ...]:
    """The shape that four letters (or "qk") stand for."""
    if axes == "qk":
        return p.Lq, p.Lk
    full = dict(zip("bhqk", (p.B, p.H, p.Lq, p.Lk), strict=True))
    if len(axes) != 4 or any(a not in ("1", f) for a, f in zip(axes, "bhqk", strict=True)):
        raise ValueError(f"axes {axes!r}: expected qk, or bhqk with a 1 where an axis broadcasts")
    return tuple(full.get(a, 1) for a in axes)


def factor_axes(text: str | None) -> tuple[int, list[str]] | None:
    """(rank, the axes of rows, columns and maybe offset) of "rank r: ...", None for other texts."""
    if text is None or not text.startswith("rank"):
        return None
    rank, _, axes = text.removeprefix("rank").partition(":")
    return int(rank), axes.split()


def each_factor(mask: Tensor | LowRankMask, change) -> Tensor | LowRankMask:
    """A dense mask changed, or a LowRankMask with each factor changed."""
    if isinstance(mask, LowRankMask):
        return LowRankMask(*map(change, mask.factors()))
    return change(mask)


def named_factors(name: str, mask: Tensor | LowRankMask | None) -> dict[str, Tensor]:
    """{name: tensor}, or {name.rows: ..., name.columns: ...} of a LowRankMask."""
    if isinstance(mask, LowRankMask):
        factors = zip(("rows", "columns", "offset"), mask.factors(), strict=False)
        return {f"{name}.{factor}": tensor for factor, tensor in factors}
    return {} if mask is None else {name: mask}


def dense_mask(mask: Tensor | LowRankMask | None) -> Tensor | None:
    return mask.dense() if isinstance(mask, LowRankMask) else mask


def lay_out(tensor: Tensor, layout: str) -> Tensor:
    """The same values under other strides; "expanded" repeats the first entry of the first axis
    with stride 0."""
    if layout == "contiguous" or tensor.dim() < 2:
        return tensor.contiguous()
    if layout == "transposed":  # [B,L,H,D] in memory; [L,H] for two axes
        axes = (1, 2) if tensor.dim() > 2 else (0, 1)
        return tensor.transpose(*axes).contiguous().transpose(*axes)
    if layout == "expanded":
        return tensor[:1].expand(tensor.shape)
    pad = [2 * size + 3 for size in tensor.shape]
    room = tensor.new_zeros(pad)
    if layout == "sliced":  # odd offsets, so that no row starts on a vector's boundary
        view = room[tuple(slice(1, 1 + size) for size in tensor.shape)]
    else:
        view = room[..., 1 : 2 * tensor.shape[-1] + 1 : 2]
        view = view[tuple(slice(0, size) for size in tensor.shape[:-1])]
    return view.copy_(tensor)


def draw_pattern(p: Problem, generator: torch.Generator) -> object:
    """The pattern, or the list of one a head, that the text of a problem stands for."""
    if p.pattern is None or isinstance(p.pattern, str):
        return _parse_pattern(p.pattern, p, generator)
    return [_parse_pattern(text, p, generator) for text in p.pattern]


_PATTERNS = ("BlockDiagonal", "Toeplitz", "DilatedToeplitz", "Causal", "Segments")


def _parse_pattern(text: str | None, p: Problem, generator: torch.Generator) -> object:
    whole = None
    for term in (text or "").split("&") if text else []:
        call = ast.parse(term.strip(), mode="eval").body
        if getattr(getattr(call, "func", None), "id", None) not in _PATTERNS:
            raise ValueError(f"pattern {term.strip()!r}: expected one of {', '.join(_PATTERNS)}")
        arguments = [ast.literal_eval(a) for a in call.args]
        options = {k.arg: ast.literal_eval(k.value) for k in call.keywords}
        if call.func.id == "Segments":
            drawn = _draw_segments(p, generator, *arguments, **options)
        else:
            drawn = getattr(patterns, call.func.id)(*arguments, **options)
        whole = drawn if whole is None else whole & drawn
    return whole


def _draw_segments(p, generator, n, shuffled=False, shared=False):
    rows = 1 if shared else p.B
    query_ids = torch.randint(0, n, (rows, p.Lq), generator=generator)
    key_ids = torch.randint(0, n, (rows, p.Lk), generator=generator)
    if not shuffled:
        query_ids, key_ids = query_ids.sort(-1).values, key_ids.sort(-1).values
    return patterns.Segments(query_ids, key_ids)


def _normal(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(shape, generator=generator, dtype=torch.float32)


def _uniform(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.rand(shape, generator=generator, dtype=torch.float32)


def _draw_masks(p: Problem, generator: torch.Generator) -> dict[str, Tensor | None]:
    drawn = dict.fromkeys(("multiplier", "bias", "attn_mask", "key_mask"))
    if factor_axes(p.multiplier):
        drawn["multiplier"] = _draw_factors(p, p.multiplier, 1.0, generator)
    elif p.multiplier:
        drawn["multiplier"] = 1 + 0.5 * _normal(generator, *mask_shape(p, p.multiplier))
    if factor_axes(p.bias):
        drawn["bias"] = _draw_factors(p, p.bias, 0.0, generator)
    elif p.bias:
        bias = _normal(generator, *mask_shape(p, p.bias))
        low = _uniform(generator, *bias.shape)
        if p.gate:
            bias = bias.abs().clamp(min=0.01) * (low > 0.125)
        elif "neg_inf" in p.fill_words:
            bias = bias.masked_fill(low < 0.3, float("-inf"))
        drawn["bias"] = bias
    if p.attn_mask:
        drawn["attn_mask"] = _uniform(generator, *mask_shape(p, p.attn_mask)) < 0.7
        if "dead" in p.fill_words:
            drawn["attn_mask"][..., :1, :] = False
            drawn["attn_mask"][..., -1:, :] = False
    if p.key_mask:
        drawn["key_mask"] = _uniform(generator, p.B, p.Lk) < 0.7
        if "dead" in p.fill_words and p.B > 1:
            drawn["key_mask"][0] = False
    return drawn


def _draw_factors(p: Problem, text: str, mean: float, generator: torch.Generator) -> LowRankMask:
    """M of about the same size whatever the rank; an offset around `mean`."""
    rank, axes = factor_axes(text)
    lead = [(p.B if b != "1" else 1, p.H if h != "1" else 1) for b, h in axes]
    rows = 0.7 * rank**-0.5 * _normal(generator, *lead[0], p.Lq, rank)
    columns = _normal(generator, *lead[1], p.Lk, rank)
    if len(axes) < 3:
        return LowRankMask(rows, columns)
    offset = mean + 0.5 * _normal(generator, *lead[2], 1, p.Lk)
    if "neg_inf" in p.fill_words and mean == 0.0:
        offset = offset.masked_fill(_uniform(generator, *offset.shape) < 0.3, float("-inf"))
    return LowRankMask(rows, columns, offset)


def _seen(p: Problem, pattern, attn_mask: Tensor | None, key_mask: Tensor | None) -> Tensor:
    """Pairs that pattern, attn_mask and key_mask leave, [B,H,Lq,Lk]."""
    seen = torch.ones(p.B, p.H, p.Lq, p.Lk, dtype=torch.bool)
    for h in range(p.H) if p.Lq and p.Lk else ():
        mine = pattern[h] if isinstance(pattern, list) else pattern
        if mine is not None:
            dense = mine.dense(p.Lq, p.Lk)  # [Lq,Lk], or [B|1,...,Lq,Lk] with segments
            seen[:, h] &= dense if dense.dim() == 2 else dense.reshape(-1, p.Lq, p.Lk)
    if attn_mask is not None:
        seen &= attn_mask
    if key_mask is not None:
        seen &= key_mask[:, None, None, :]
    return seen


def _poison(mask: Tensor | None, used: Tensor) -> Tensor | None:
    """NaN and both infinities, in turn, wherever no visible pair reads the entry."""
    if mask is None:
        return None
    if isinstance(mask, LowRankMask):
        offset = _poison(mask.offset, used)
        return LowRankMask(mask.rows, mask.columns, offset)
    shape = (1,) * (4 - mask.dim()) + tuple(mask.shape)
    summed = [axis for axis in range(4) if shape[axis] == 1]
    read = used.sum(dim=summed, keepdim=True) if summed else used
    values = torch.tensor([float("nan"), float("inf"), float("-inf")])
    bad = values[torch.arange(mask.numel()) % 3].view(mask.shape)
    return torch.where(read.bool().view(mask.shape), mask, bad)
