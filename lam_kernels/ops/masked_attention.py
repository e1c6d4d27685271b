"""The page of masked attention: public functions, checks, schema, fake, autograd, vmap and FLOPs.

Formulas and their derivation: python_ref/masked_attention.py. Kernels: the KERNELS table.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from ..patterns import Pattern, encode
from . import _backends, _checks
from ._autograd import refuse_double_backward
from ._backends import Explanation, Services
from ._flops import pair_count
from ._registration import (
    LIBRARY,
    cpu_service,
    gradients_like,
    reference_service,
    register,
    traced_or_transformed,
    unobserved,
)
from ._vmap import fold, mapped_batch, one_by_one

_FUSIONS = ("mul", "add", "gate")


def masked_attention(
    query: Tensor,  # [B, H, Lq, D]
    key: Tensor,  # [B, Hkv, Lk, D]
    value: Tensor,  # [B, Hkv, Lk, Dv]
    *,
    multiplier: Tensor | None = None,  # [B|1, H|1, Lq|1, Lk|1] or [Lq|1, Lk|1]
    bias: Tensor | None = None,  # the same
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
            are never used: NaN there changes nothing, and their gradient is exactly 0.
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
    intermediate.

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
    mask: Tensor,  # [B|1, H|1, Lq|1, Lk|1] or [Lq|1, Lk|1]
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
    exp(S - lse) (dP - delta + dlse); M < 0 is undefined. All other arguments, shapes, dtypes,
    errors and edge cases: masked_attention.
    """
    multiplier, bias = _operands(mask, fusion)
    return _attend(
        query, key, value, multiplier, bias, pattern, attn_mask, key_mask, scale, dropout_p,
        enable_gqa, return_lse, backend, fusion == "gate", "mask", "mask",
    )  # fmt: skip


def _operands(mask: Tensor, fusion: str) -> tuple[Tensor | None, Tensor | None]:
    """(multiplier, bias) of a learned mask."""
    if not isinstance(mask, Tensor):
        raise TypeError(f"mask must be a Tensor, got {type(mask).__name__}")
    if fusion not in _FUSIONS:
        raise ValueError(f'fusion must be "mul", "add" or "gate", got {fusion!r}')
    return (mask, None) if fusion == "mul" else (None, mask)


def _attend(
    query, key, value, multiplier, bias, pattern, attn_mask, key_mask, scale, dropout_p,
    enable_gqa, return_lse, backend, gate, multiplier_name, bias_name,
):  # fmt: skip
    query, key, value, multiplier, bias, attn_mask, flat, segment_ids, scale = _checked(
        query, key, value, multiplier, bias, pattern, attn_mask, key_mask, scale, dropout_p,
        enable_gqa, multiplier_name, bias_name,
    )  # fmt: skip
    arguments = (
        query, key, value, multiplier, bias, attn_mask, key_mask, segment_ids, None, flat, scale,
        dropout_p, gate,
    )  # fmt: skip
    backend = KERNELS.choose(backend, arguments)
    rng_state = None
    if dropout_p > 0:
        # a tensor, never read here: a draw that is traced, not baked in, and no wait for a device
        rng_state = torch.randint(2**62, (2,), dtype=torch.int64, device="cpu")
    if backend == "reference":
        from python_ref.masked_attention import masked_attention as reference

        # plain autograd, not the Function below: the reference is differentiable more than once
        return reference(
            query, key, value, multiplier=multiplier, bias=bias, pattern=pattern,
            attn_mask=attn_mask, key_mask=key_mask, scale=scale, dropout_p=dropout_p,
            rng_state=rng_state, enable_gqa=enable_gqa, gate=gate, return_lse=return_lse,
        )  # fmt: skip
    out, lse = (_Forward.apply if traced_or_transformed() else _eager_forward)(
        query, key, value, multiplier, bias, (attn_mask, key_mask, rng_state, *segment_ids),
        (flat, scale, dropout_p, gate, backend),
    )  # fmt: skip
    return (out, lse) if return_lse else out


def _checked(
    query, key, value, multiplier, bias, pattern, attn_mask, key_mask, scale, dropout_p,
    enable_gqa, multiplier_name, bias_name,
):  # fmt: skip
    """The arguments as the op takes them, or an error. Reads shapes and dtypes only."""
    query, key, value = _checks.cast_under_autocast(query, key, value)
    _checks.check_query_key_value(query, key, value, enable_gqa)
    B, H, Lq, D = query.shape
    Lk = key.shape[2]
    shape = (B, H, Lq, Lk)
    if multiplier is not None:
        multiplier = _checks.check_float_operand(multiplier_name, multiplier, shape, query)
    if bias is not None:
        bias = _checks.check_float_operand(bias_name, bias, shape, query)
    if attn_mask is not None:
        attn_mask = _checks.check_attn_mask(attn_mask, shape, query)
    if key_mask is not None:
        _checks.check_key_mask(key_mask, B, Lk, query)
    flat, segment_ids = encode(pattern, H)
    if segment_ids:
        _checks.check_segment_ids(segment_ids, B, Lq, Lk, query)
    scale = D**-0.5 if scale is None else _checks.check_scale(scale)
    _checks.check_dropout_p(dropout_p)
    return query, key, value, multiplier, bias, attn_mask, flat, segment_ids, scale


def _explain(
    gate, query, key, value, *, multiplier=None, bias=None, pattern=None, attn_mask=None,
    key_mask=None, scale=None, dropout_p=0.0, enable_gqa=False, return_lse=False, backend=None,
) -> Explanation:  # fmt: skip
    query, key, value, multiplier, bias, attn_mask, flat, segment_ids, scale = _checked(
        query, key, value, multiplier, bias, pattern, attn_mask, key_mask, scale, dropout_p,
        enable_gqa, "multiplier", "bias",
    )  # fmt: skip
    notes = ()
    if all(given is None for given in (multiplier, bias, pattern, attn_mask, key_mask)):
        notes = ("no mask at all: plain attention, served by the same kernels",)
    arguments = (
        query, key, value, multiplier, bias, attn_mask, key_mask, segment_ids, None, flat, scale,
        dropout_p, gate,
    )  # fmt: skip
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

_OPERANDS = (
    "Tensor query, Tensor key, Tensor value, Tensor? multiplier, Tensor? bias, Tensor? attn_mask, "
    "Tensor? key_mask, Tensor[] segment_ids, Tensor? rng_state"
)
_SETTINGS = "int[] pattern, float scale, float dropout_p, bool gate"


KERNELS = Services(
    "masked_attention",
    {"cpu": cpu_service("masked_attention"), "reference": reference_service("masked_attention")},
)


def _fake_forward(query, key, value, *_):
    B, H, Lq, _D = query.shape
    lse_dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
    return query.new_empty(B, H, Lq, value.shape[3]), query.new_empty(B, H, Lq, dtype=lse_dtype)


def _fake_backward(grad_out, grad_lse, query, key, value, multiplier, bias, *rest):
    return gradients_like(query, (query, key, value, multiplier, bias), rest[-2])


_op = register(
    KERNELS,
    f"({_OPERANDS}, {_SETTINGS}, str backend) -> (Tensor out, Tensor lse)",
    f"(Tensor grad_out, Tensor? grad_lse, {_OPERANDS}, Tensor out, Tensor lse, {_SETTINGS}, "
    "bool[] needs, str backend) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _fake_forward,
    _fake_backward,
)
_forward_op, _backward_op = _op.forward, _op.backward


# ---- autograd


class _Forward(torch.autograd.Function):
    """The op, differentiable in query, key, value, multiplier and bias; out and lse as results.

    unlearned = (attn_mask, key_mask, rng_state, *segment_ids)
    settings = (flat pattern, scale, dropout_p, gate, backend)
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(query, key, value, multiplier, bias, unlearned, settings):
        attn_mask, key_mask, rng_state, *segment_ids = unlearned
        flat, scale, dropout_p, gate, backend = settings
        if unobserved(query, key, value, multiplier, bias, *unlearned):
            return KERNELS.kernels(backend).forward(
                query, key, value, multiplier, bias, attn_mask, key_mask, segment_ids, rng_state,
                flat, scale, dropout_p, gate,
            )  # fmt: skip
        return _forward_op(
            query, key, value, multiplier, bias, attn_mask, key_mask, segment_ids, rng_state,
            flat, scale, dropout_p, gate, backend,
        )  # fmt: skip

    @staticmethod
    def setup_context(ctx, inputs, output):
        query, key, value, multiplier, bias, unlearned, ctx.settings = inputs
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(query, key, value, multiplier, bias, *output, *unlearned)

    @staticmethod
    def backward(ctx, grad_out, grad_lse):
        if grad_out is None and grad_lse is None:
            return (None,) * 7
        query, key, value, multiplier, bias, out, lse, *unlearned = ctx.saved_tensors
        if grad_out is None:
            grad_out = torch.zeros_like(out)
        needs = ctx.needs_input_grad[:5]
        # With create_graph (always so under torch.func.grad) the gradients must refuse to be
        # differentiated again: an op without autograd of its own would let those terms vanish.
        backward = _Backward.apply if torch.is_grad_enabled() else _Backward.forward
        grads = backward(
            grad_out, grad_lse, query, key, value, multiplier, bias, out, lse, unlearned,
            ctx.settings, needs,
        )  # fmt: skip
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
        grad_out, grad_lse, query, key, value, multiplier, bias, out, lse, unlearned, settings,
        needs,
    ):  # fmt: skip
        attn_mask, key_mask, rng_state, *segment_ids = unlearned
        flat, scale, dropout_p, gate, backend = settings
        if unobserved(grad_out, grad_lse, query, key, value, multiplier, bias, *unlearned):
            return KERNELS.kernels(backend).backward(
                grad_out, grad_lse, query, key, value, multiplier, bias, attn_mask, key_mask,
                segment_ids, rng_state, out, lse, flat, scale, dropout_p, gate, needs,
            )  # fmt: skip
        return _backward_op(
            grad_out, grad_lse, query, key, value, multiplier, bias, attn_mask, key_mask,
            segment_ids, rng_state, out, lse, flat, scale, dropout_p, gate, needs, backend,
        )  # fmt: skip

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, *grads):
        refuse_double_backward("masked_attention")


# ---- torch.vmap: the mapped axis joins the batch


def _vmap_forward(info, in_dims, *arguments):
    N = info.batch_size
    if arguments[8] is not None:
        # dropout counts samples in the batch: a folded call would draw other pairs
        return one_by_one(_forward_op, N, in_dims, arguments)
    B = mapped_batch(arguments[0], in_dims[0])
    folded = [fold(t, axis, N, B, True) for t, axis in zip(arguments[:7], in_dims[:7], strict=True)]
    for at in range(3):
        folded[at] = fold(arguments[at], in_dims[at], N, B, False)
    folded[6] = fold(arguments[6], in_dims[6], N, B, False)
    ids = [
        fold(t, axis, N, B, True)
        for t, axis in zip(arguments[7], in_dims[7] or [None] * len(arguments[7]), strict=True)
    ]
    out, lse = _forward_op(*folded, ids, None, *arguments[9:])
    return (out.unflatten(0, (N, B)), lse.unflatten(0, (N, B))), (0, 0)


def _vmap_backward(info, in_dims, *arguments):
    N = info.batch_size
    if arguments[10] is not None:
        return one_by_one(_backward_op, N, in_dims, arguments)
    B = mapped_batch(arguments[2], in_dims[2])
    needs = arguments[-2]
    # masks may stay shared when nobody wants a gradient a mapped call
    keep_shared = [False] * 5 + [not needs[3], not needs[4], True, False]
    folded = [
        fold(t, axis, N, B, shared)
        for t, axis, shared in zip(arguments[:9], in_dims[:9], keep_shared, strict=True)
    ]
    ids = [
        fold(t, axis, N, B, True)
        for t, axis in zip(arguments[9], in_dims[9] or [None] * len(arguments[9]), strict=True)
    ]
    out, lse = (fold(arguments[at], in_dims[at], N, B, False) for at in (11, 12))
    grads = _backward_op(*folded, ids, None, out, lse, *arguments[13:])
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


@register_flop_formula(torch.ops.lam_kernels.masked_attention_fwd)
def _forward_flops(query_shape, key_shape, value_shape, *rest, out_shape=None) -> int:
    """Q K^T and P V."""
    D, Dv = query_shape[-1], value_shape[-1]
    return 2 * pair_count(query_shape, key_shape, rest[6]) * (D + Dv)


@register_flop_formula(torch.ops.lam_kernels.masked_attention_bwd)
def _backward_flops(
    grad_out_shape, grad_lse_shape, query_shape, key_shape, value_shape, *rest, out_shape=None
) -> int:
    """Q K^T again, dO V^T unless only dV is wanted, and one product for each of dQ, dK and dV."""
    D, Dv = query_shape[-1], value_shape[-1]
    flat, needs = rest[8], rest[-2]
    grad_query, grad_key, grad_value, grad_multiplier, grad_bias = needs
    width = D * (1 + grad_query + grad_key) + Dv * grad_value
    if grad_query or grad_key or grad_multiplier or grad_bias:
        width += Dv
    return 2 * pair_count(query_shape, key_shape, flat) * width
