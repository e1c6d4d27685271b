"""The page of masked attention: public functions, checks, schema, fake, autograd, vmap and FLOPs.

Formulas and their derivation: python_ref/masked_attention.py. Kernels: the KERNELS table.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from ..low_rank_mask import LowRankMask
from ..patterns import Pattern, encode
from . import _backends, _checks
from ._autograd import refuse_double_backward
from ._backends import Explanation, Services
from ._cuda import masked_attention_limits, masked_attention_slower
from ._flops import pair_count
from ._registration import (
    LIBRARY,
    cpu_service,
    cuda_service,
    gradients_like,
    reference_service,
    register,
    traced_or_transformed,
    triton_service,
    unobserved,
)
from ._vmap import fold, mapped_batch, one_by_one

_FUSIONS = ("mul", "add", "gate")


def masked_attention(
    query: Tensor,  # [B, H, Lq, D]
    key: Tensor,  # [B, Hkv, Lk, D]
    value: Tensor,  # [B, Hkv, Lk, Dv]
    *,
    multiplier: Tensor | LowRankMask | None = None,  # [B|1, H|1, Lq|1, Lk|1] or [Lq|1, Lk|1]
    bias: Tensor | LowRankMask | None = None,  # the same
    pattern: Pattern | Sequence[Pattern | None] | None = None,
    attn_mask: Tensor | None = None,  # bool, the same
    key_mask: Tensor | None = None,  # bool [B, Lk]
    scale: float | None = None,
    dropout_p: float = 0.0,
    enable_gqa: bool = False,
    return_lse: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:  # out [B, H, Lq, Dv] (, lse [B, H, Lq])
    """Attention whose scores are multiplied and shifted by learned masks.

        out_i = sum over visible j of  softmax_j(scale * q_i . k_j * multiplier_ij + bias_ij) v_j

    Visible is what pattern, attn_mask and key_mask all keep (True = visible) and where bias is not
    -inf. The order is scale, multiplier, bias, hide, softmax, dropout, value. Gradients go to
    query, key, value, multiplier and bias, each in its operand's dtype and shape, and only those
    that somebody wants are computed.

    Args:
        query, key, value: one dtype of float32, bfloat16, float16, float64 (float64 on "cpu" and
            "reference"), any strides, D and Dv from 1 to 256. Under autocast these three are cast,
            the masks never are.
        multiplier, bias: each axis full or 1, any float dtype (float64 only with a float64 query).
            Three axes are refused: [B, L, L] and [H, L, L] cannot be told apart. A multiplier of 0
            does not hide a pair (its weight is e^bias); a bias of -inf does. A hidden pair's values
            are never used: NaN there changes nothing, and their gradient is exactly 0. Either may
            be a LowRankMask, rank 1 to 256, which is never stored: gradients go to its factors.
        pattern: BlockDiagonal, Toeplitz, DilatedToeplitz, Causal, Segments or several joined by &,
            whose hidden tiles are skipped; or a sequence of H of them, one a head, None meaning
            everything.
        attn_mask: booleans of the same shapes as a multiplier.
        key_mask: booleans [B, Lk], False for padding.
        scale: a float, D ** -0.5 by default. A learned scale is a multiplier [1, H, 1, 1].
        dropout_p: 0 <= p < 1. Seed and offset come from torch's generator; forward and backward
            draw the same.
        enable_gqa: allow fewer key/value heads; query head h then reads head h * Hkv // H.
        return_lse: also return the natural-log sum of exponentials of each row, which is
            differentiable.
        backend: "cpu", "cuda", "triton" or "reference"; a named one never falls back. None: the
            first of the device's table that serves the call (never the reference). See explain().

    Returns:
        out in query's dtype, contiguous; lse in float32 (float64 for float64). A row that sees no
        key: out 0, lse -inf, all gradients 0. A size of 0 in B, H or Lq gives empty results.

    Raises:
        TypeError, ValueError: naming the argument, what came and what was expected.
        RuntimeError: no backend serves the call (with every reason), or on double backward, which
            only backend="reference" has.

    Numerics: sums and softmax in float32 (float64 for float64) whatever the storage dtype; bitwise
    repeatable for a device and thread count, mask gradients included. No [B, H, Lq, Lk]
    intermediate. Gradients are made of exp(S - lse), which is off by |lse| 2^-24 where all that a
    row sees is far from 0 (a bias of -1e9 on every key); "cpu" then works such rows' maxima and
    sums out once more and keeps them apart, "triton" and "cuda" do not: hide keys by key_mask.

    Source: LAM (arXiv 2406.02761): multiplier is its eq. 6, bias its ablation C.1.
    """
    return _attend(
        query, key, value, multiplier, bias, pattern, attn_mask, key_mask, scale, dropout_p,
        enable_gqa, return_lse, backend, False, "multiplier", "bias",
    )  # fmt: skip


def lam_attention(
    query: Tensor,  # [B, H, Lq, D]
    key: Tensor,  # [B, Hkv, Lk, D]
    value: Tensor,  # [B, Hkv, Lk, Dv]
    mask: Tensor | LowRankMask,  # [B|1, H|1, Lq|1, Lk|1] or [Lq|1, Lk|1]
    *,
    fusion: str = "mul",
    pattern: Pattern | Sequence[Pattern | None] | None = None,
    attn_mask: Tensor | None = None,
    key_mask: Tensor | None = None,
    scale: float | None = None,
    dropout_p: float = 0.0,
    enable_gqa: bool = False,
    return_lse: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Learnable attention mask: masked_attention in the paper's words, M = mask.

        fusion="mul"    softmax(scale * Q K^T * M) V        LAM (arXiv 2406.02761) eq. 6
        fusion="add"    softmax(scale * Q K^T + M) V        its ablation C.1
        fusion="gate"   softmax(scale * Q K^T + log M) V    a weight on each pair, not in the paper

    "mul" is a temperature per pair: M = 0 leaves a weight of e^0, it does not hide. "gate"
    multiplies the weight itself: M >= 0, M = 0 hides the pair and still has a finite gradient
    exp(S - lse) (dP - delta + dlse); M < 0 is undefined, and a LowRankMask is refused. All other
    arguments, shapes, dtypes, errors and edge cases: masked_attention.
    """
    multiplier, bias = _operands(mask, fusion)
    return _attend(
        query, key, value, multiplier, bias, pattern, attn_mask, key_mask, scale, dropout_p,
        enable_gqa, return_lse, backend, fusion == "gate", "mask", "mask",
    )  # fmt: skip


def _operands(mask: Tensor | LowRankMask, fusion: str) -> tuple:
    """(multiplier, bias) of a learned mask."""
    if not isinstance(mask, (Tensor, LowRankMask)):
        raise TypeError(f"mask must be a Tensor or a LowRankMask, got {type(mask).__name__}")
    if fusion not in _FUSIONS:
        raise ValueError(f'fusion must be "mul", "add" or "gate", got {fusion!r}')
    if fusion == "gate" and isinstance(mask, LowRankMask):
        raise ValueError(
            'mask must be a Tensor with fusion="gate", got a LowRankMask: nothing keeps the '
            "product of factors from being negative, pass its .dense() if it never is"
        )
    return (mask, None) if fusion == "mul" else (None, mask)


def _attend(
    query, key, value, multiplier, bias, pattern, attn_mask, key_mask, scale, dropout_p,
    enable_gqa, return_lse, backend, gate, multiplier_name, bias_name,
):  # fmt: skip
    arguments = _checked(
        query, key, value, multiplier, bias, pattern, attn_mask, key_mask, scale, dropout_p,
        enable_gqa, gate, multiplier_name, bias_name,
    )  # fmt: skip
    backend = KERNELS.choose(backend, arguments)
    *learned, attn_mask, key_mask, segment_ids, _, flat, scale, dropout_p, gate = arguments
    rng_state = None
    if dropout_p > 0:
        # a tensor, never read here: a draw that is traced, not baked in, and no wait for a device
        rng_state = torch.randint(2**62, (2,), dtype=torch.int64, device="cpu")
    if backend == "reference":
        from python_ref.masked_attention import masked_attention as reference

        # plain autograd, not the Function below: the reference is differentiable more than once
        return reference(
            *learned[:3], multiplier=multiplier, bias=bias, pattern=pattern,
            attn_mask=attn_mask, key_mask=key_mask, scale=scale, dropout_p=dropout_p,
            rng_state=rng_state, enable_gqa=enable_gqa, gate=gate, return_lse=return_lse,
        )  # fmt: skip
    observed = traced_or_transformed()
    if observed and torch.compiler.is_compiling() and not torch.compiler.is_exporting():
        # of a tensor that was allocated and then filled (DeepSeek's keys) dynamo thinks that it has
        # no gradient: _Forward would be traced without it
        learned = [x if x is None else x.view_as(x) for x in learned]
    out, lse = (_Forward.apply if observed else _eager_forward)(
        *learned,
        (attn_mask, key_mask, rng_state, *segment_ids),
        (flat, scale, dropout_p, gate, backend),
    )
    return (out, lse) if return_lse else out


def _checked(
    query, key, value, multiplier, bias, pattern, attn_mask, key_mask, scale, dropout_p,
    enable_gqa, gate, multiplier_name, bias_name,
) -> tuple:  # fmt: skip
    """The op's forward arguments without rng_state (None) and backend, or an error.

    Reads shapes and dtypes only.
    """
    query, key, value = _checks.cast_under_autocast(query, key, value)
    _checks.check_query_key_value(query, key, value, enable_gqa)
    B, H, Lq, D = query.shape
    Lk = key.shape[2]
    shape = (B, H, Lq, Lk)
    multiplier, *multiplier_rest = _checks.check_mask(multiplier_name, multiplier, shape, query)
    bias, *bias_rest = _checks.check_mask(bias_name, bias, shape, query)
    if attn_mask is not None:
        attn_mask = _checks.check_attn_mask(attn_mask, shape, query)
    if key_mask is not None:
        _checks.check_key_mask(key_mask, B, Lk, query)
    flat, segment_ids = encode(pattern, H)
    if segment_ids:
        _checks.check_segment_ids(segment_ids, B, Lq, Lk, query)
    scale = D**-0.5 if scale is None else _checks.check_scale(scale)
    _checks.check_dropout_p(dropout_p)
    return (
        query, key, value, multiplier, bias, *multiplier_rest, *bias_rest, attn_mask, key_mask,
        segment_ids, None, flat, scale, dropout_p, gate,
    )  # fmt: skip


def _explain(
    gate, query, key, value, *, multiplier=None, bias=None, pattern=None, attn_mask=None,
    key_mask=None, scale=None, dropout_p=0.0, enable_gqa=False, return_lse=False, backend=None,
) -> Explanation:  # fmt: skip
    arguments = _checked(
        query, key, value, multiplier, bias, pattern, attn_mask, key_mask, scale, dropout_p,
        enable_gqa, gate, "multiplier", "bias",
    )  # fmt: skip
    notes = ()
    if all(given is None for given in (multiplier, bias, pattern, attn_mask, key_mask)):
        notes = ("no mask at all: plain attention, served by the same kernels",)
    return KERNELS.explanation(backend, arguments, notes)


def _explain_masked_attention(query, key, value, **keywords) -> Explanation:
    return _explain(False, query, key, value, **keywords)


def _explain_lam_attention(query, key, value, mask, *, fusion="mul", **keywords) -> Explanation:
    multiplier, bias = _operands(mask, fusion)
    found = _explain(
        fusion == "gate", query, key, value, multiplier=multiplier, bias=bias, **keywords
    )
    return dataclasses.replace(found, op="lam_attention")


_backends.EXPLAINERS["masked_attention"] = _explain_masked_attention
_backends.EXPLAINERS["lam_attention"] = _explain_lam_attention


# ---- the op: schemas, kernels, fakes

# With columns, the mask of that name is low-rank: the tensor in its place holds the rows.
_OPERANDS = (
    "Tensor query, Tensor key, Tensor value, Tensor? multiplier, Tensor? bias, "
    "Tensor? multiplier_columns, Tensor? multiplier_offset, Tensor? bias_columns, "
    "Tensor? bias_offset, Tensor? attn_mask, Tensor? key_mask, Tensor[] segment_ids, "
    "Tensor? rng_state"
)
_LEARNED = 9  # the operands up to bias_offset: those that may need a gradient
_SETTINGS = "int[] pattern, float scale, float dropout_p, bool gate"


KERNELS = Services(
    "masked_attention",
    {
        "cpu": cpu_service("masked_attention"),
        "cuda": cuda_service("masked_attention", masked_attention_limits, masked_attention_slower),
        "triton": triton_service("masked_attention"),
        "reference": reference_service("masked_attention"),
    },
)


def _fake_forward(query, key, value, *_):
    B, H, Lq, _D = query.shape
    lse_dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
    return query.new_empty(B, H, Lq, value.shape[3]), query.new_empty(B, H, Lq, dtype=lse_dtype)


def _fake_backward(grad_out, grad_lse, query, *rest):
    return gradients_like(query, (query, *rest[: _LEARNED - 1]), rest[-2])


_op = register(
    KERNELS,
    f"({_OPERANDS}, {_SETTINGS}, str backend) -> (Tensor out, Tensor lse)",
    f"(Tensor grad_out, Tensor? grad_lse, {_OPERANDS}, Tensor out, Tensor lse, {_SETTINGS}, "
    f"bool[] needs, str backend) -> ({', '.join(['Tensor'] * _LEARNED)})",
    _fake_forward,
    _fake_backward,
)
_forward_op, _backward_op = _op.forward, _op.backward


# ---- autograd


class _Forward(torch.autograd.Function):
    """The op, differentiable in its learned operands; out and lse as results.

    unlearned = (attn_mask, key_mask, rng_state, *segment_ids)
    settings = (flat pattern, scale, dropout_p, gate, backend)
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(
        query, key, value, multiplier, bias, multiplier_columns, multiplier_offset, bias_columns,
        bias_offset, unlearned, settings,
    ):  # fmt: skip
        learned = (
            query, key, value, multiplier, bias, multiplier_columns, multiplier_offset,
            bias_columns, bias_offset,
        )  # fmt: skip
        attn_mask, key_mask, rng_state, *segment_ids = unlearned
        given = (*learned, attn_mask, key_mask, segment_ids, rng_state, *settings)
        if unobserved(*learned, *unlearned):
            return KERNELS.kernels(settings[-1]).forward(*given[:-1])
        return _forward_op(*given)

    @staticmethod
    def setup_context(ctx, inputs, output):
        *learned, unlearned, ctx.settings = inputs
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*learned, *output, *unlearned)

    @staticmethod
    def backward(ctx, grad_out, grad_lse):
        if grad_out is None and grad_lse is None:
            return (None,) * (_LEARNED + 2)
        saved = ctx.saved_tensors
        *learned, out, lse = saved[: _LEARNED + 2]
        unlearned = saved[_LEARNED + 2 :]
        if grad_out is None:
            grad_out = torch.zeros_like(out)
        needs = ctx.needs_input_grad[:_LEARNED]
        # With create_graph (always so under torch.func.grad) the gradients must refuse to be
        # differentiated again: an op without autograd of its own would let those terms vanish.
        backward = _Backward.apply if torch.is_grad_enabled() else _Backward.forward
        grads = backward(grad_out, grad_lse, *learned, out, lse, unlearned, ctx.settings, needs)
        return *[g if wanted else None for g, wanted in zip(grads, needs, strict=True)], None, None


# Function.apply binds every call to the signature of forward, which takes longer than a small call
# altogether. Only torch.func and torch.compile need that
# layer: this is what it calls.
_eager_forward = super(torch.autograd.Function, _Forward).apply


class _Backward(torch.autograd.Function):
    """The backward op as a function whose own gradient is an error."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        grad_out, grad_lse, query, key, value, multiplier, bias, multiplier_columns,
        multiplier_offset, bias_columns, bias_offset, out, lse, unlearned, settings, needs,
    ):  # fmt: skip
        learned = (
            query, key, value, multiplier, bias, multiplier_columns, multiplier_offset,
            bias_columns, bias_offset,
        )  # fmt: skip
        attn_mask, key_mask, rng_state, *segment_ids = unlearned
        *settings, backend = settings
        given = (
            grad_out, grad_lse, *learned, attn_mask, key_mask, segment_ids, rng_state, out, lse,
            *settings, needs, backend,
        )  # fmt: skip
        if unobserved(grad_out, grad_lse, *learned, *unlearned):
            return KERNELS.kernels(backend).backward(*given[:-1])
        return _backward_op(*given)

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, *grads):
        refuse_double_backward("masked_attention")


# ---- torch.vmap: the mapped axis joins the batch


def _vmap_forward(info, in_dims, *arguments):
    N = info.batch_size
    ids_at, state_at = _LEARNED + 2, _LEARNED + 3
    if arguments[state_at] is not None:
        # dropout counts samples in the batch: a folded call would draw other pairs
        return one_by_one(_forward_op, N, in_dims, arguments)
    B = mapped_batch(arguments[0], in_dims[0])
    # query, key, value and key_mask must have the whole batch
    folded = [
        fold(arguments[at], in_dims[at], N, B, at not in (0, 1, 2, ids_at - 1))
        for at in range(ids_at)
    ]
    ids = _fold_ids(arguments[ids_at], in_dims[ids_at], N, B)
    out, lse = _forward_op(*folded, ids, None, *arguments[state_at + 1 :])
    return (out.unflatten(0, (N, B)), lse.unflatten(0, (N, B))), (0, 0)


def _fold_ids(ids: Sequence[Tensor], axes: Sequence | None, N: int, B: int) -> list[Tensor]:
    axes = axes or [None] * len(ids)
    return [fold(tensor, axis, N, B, True) for tensor, axis in zip(ids, axes, strict=True)]


def _vmap_backward(info, in_dims, *arguments):
    N = info.batch_size
    ids_at, state_at = _LEARNED + 4, _LEARNED + 5
    if arguments[state_at] is not None:
        return one_by_one(_backward_op, N, in_dims, arguments)
    B = mapped_batch(arguments[2], in_dims[2])
    needs = arguments[-2]
    # masks may stay shared when nobody wants a gradient a mapped call
    keep_shared = [False] * 5 + [not wanted for wanted in needs[3:]] + [True, False]
    folded = [
        fold(arguments[at], in_dims[at], N, B, shared) for at, shared in enumerate(keep_shared)
    ]
    ids = _fold_ids(arguments[ids_at], in_dims[ids_at], N, B)
    out, lse = (fold(arguments[state_at + n], in_dims[state_at + n], N, B, False) for n in (1, 2))
    grads = _backward_op(*folded, ids, None, out, lse, *arguments[state_at + 3 :])
    results, out_dims = [], []
    for at, wanted in enumerate(needs):
        grad = grads[at]
        if wanted:
            grad = grad.unflatten(0, (N, B))
            operand, axis = arguments[2 + at], in_dims[2 + at]
            if B != 1 and mapped_batch(operand, axis) == 1:
                grad = grad.sum(1, keepdim=True)
        results.append(grad)
        out_dims.append(0 if wanted else None)
    return tuple(results), tuple(out_dims)


torch.library.register_vmap("lam_kernels::masked_attention_fwd", _vmap_forward, lib=LIBRARY)
torch.library.register_vmap("lam_kernels::masked_attention_bwd", _vmap_backward, lib=LIBRARY)


# ---- FLOPs of the pairs that the pattern keeps; masks and segment ids are data, all visible here


def _factor_flops(query_shape, masks, pairs: int, needs=()) -> int:
    """Products of the low-rank masks: each tile once for the heads and samples that share it."""
    B, H = query_shape[:2]
    multiplier, bias, multiplier_columns, multiplier_offset, bias_columns, bias_offset = masks
    flops = 0
    for at, factors in (
        ((0, 2, 3), (multiplier, multiplier_columns, multiplier_offset)),
        ((1, 4, 5), (bias, bias_columns, bias_offset)),
    ):
        if factors[1] is None:
            continue
        given = [factor for factor in factors if factor is not None]
        slices = max(f[0] for f in given) * max(f[1] for f in given)
        products = 1 + sum(needs[k] for k in at[:2]) if needs else 1
        flops += 2 * pairs * slices // (B * H) * factors[0][3] * products
    return flops


@register_flop_formula(torch.ops.lam_kernels.masked_attention_fwd)
def _forward_flops(query_shape, key_shape, value_shape, *rest, out_shape=None) -> int:
    """Q K^T and P V, and R C^T of a low-rank mask."""
    D, Dv = query_shape[-1], value_shape[-1]
    pairs = pair_count(query_shape, key_shape, rest[_LEARNED + 1])
    return 2 * pairs * (D + Dv) + _factor_flops(query_shape, rest[: _LEARNED - 3], pairs)


@register_flop_formula(torch.ops.lam_kernels.masked_attention_bwd)
def _backward_flops(
    grad_out_shape, grad_lse_shape, query_shape, key_shape, value_shape, *rest, out_shape=None
) -> int:
    """Q K^T again, dO V^T unless only dV is wanted, and one product for each of dQ, dK and dV;
    R C^T again, G C and G^T R of a low-rank mask."""
    D, Dv = query_shape[-1], value_shape[-1]
    flat, needs = rest[_LEARNED + 3], rest[-2]
    pairs = pair_count(query_shape, key_shape, flat)
    grad_query, grad_key, grad_value, *grad_masks = needs
    width = D * (1 + grad_query + grad_key) + Dv * grad_value
    if grad_query or grad_key or any(grad_masks):
        width += Dv
    masks = rest[: _LEARNED - 3]
    return 2 * pairs * width + _factor_flops(query_shape, masks, pairs, grad_masks)
