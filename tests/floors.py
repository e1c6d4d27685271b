"""How large the error of a right kernel may be where the reference's own error is zero by luck.

Where a true value is zero or cancels, `noise` can be zero by luck (one visible key: P = 1, dP -
delta is 0 in one order of summation and a rounding in another), so right kernels would fail. The
floor is what rounding does to the *summands*, from the formulas of python_ref with absolute values
(`summands`):

    accumulated  in units of the accumulator's eps: first-order error propagation. A sum of n terms
                 costs the sum of their absolute values; errors of different pairs are independent
                 and add as squares; a row's lse and delta are one number each, so their errors move
                 all of a row's summands together
    stored       in units of the operands' eps: P, dS and the `out` inside delta may have been
                 rounded to the operands' dtype for a matrix product, sqrt(sum of summand^2)

Both are elementwise, in float64, and need no assumption about tile sizes or the order of summation.
In float64 the same-dtype reference is the reference, noise is 0 and the floor alone decides.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache, wraps

import torch
from torch import Tensor

from lam_kernels import LowRankMask
from python_ref.inputs import Problem, dense_mask
from python_ref.philox import kept_pairs


@dataclass
class Summands:
    """What the floor of one output is made of, elementwise. See the module docstring."""

    accumulated: Tensor
    stored: Tensor
    stored_gain: Tensor | None = (
        None  # [rows]: what `stored` does along the row; None: elements are independent
    )


def rng_state(problem: Problem) -> Tensor | None:
    """What the front door draws after torch.manual_seed(problem.seed)."""
    if problem.dropout_p == 0:
        return None
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(problem.seed)
        return torch.randint(2**62, (2,))


def one_thread(function):
    """The references' many small operations: two threads that wait for each other on a busy machine
    are slower."""

    @wraps(function)
    def run(*arguments, **keywords):
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            return function(*arguments, **keywords)
        finally:
            torch.set_num_threads(threads)

    return run


@lru_cache(maxsize=128)
@one_thread
def summands(problem: Problem) -> dict[str, Summands]:
    """Sizes of the summands of every output, from the formulas in python_ref's docstring."""
    p = problem
    o = p.operands().to(torch.float64)
    groups = p.H // p.Hkv if p.Hkv else 1
    with torch.no_grad():
        query, grad_out = o.query, o.grad_out
        key, value = (x.repeat_interleave(groups, 1) for x in (o.key, o.value))
        scale = p.D**-0.5 if p.scale is None else p.scale

        # nothing hidden is read; a gate of 0 hides from the softmax but not from its own gradient
        used = o.seen if p.gate else o.visible
        M = torch.where(used, 1.0 if o.multiplier is None else dense_mask(o.multiplier), 0.0)
        bias = torch.where(used, float(p.gate) if o.bias is None else dense_mask(o.bias), 0.0)
        M_error, bias_error = (
            torch.where(o.visible, product_error(mask), 0.0) for mask in (o.multiplier, o.bias)
        )
        S = scale * query @ key.mT
        S_abs = abs(scale) * query.abs() @ key.abs().mT
        bias = bias.log() if p.gate else bias
        Z = torch.where(o.visible, S * M + bias, -math.inf)
        Z_error = S_abs * M.abs() + (S * M).abs() + torch.where(o.visible, bias, 0.0).abs()
        Z_error = Z_error + S.abs() * M_error + bias_error
        lse = Z.logsumexp(-1, keepdim=True)
        shown = lse.masked_fill(lse.isinf(), 0.0)
        P = (Z - shown).exp()
        total = torch.finfo(torch.float64 if p.dtype == "float64" else torch.float32)
        flushed = total.smallest_normal / total.eps  # an exponential below this may be 0
        E_error = torch.where(o.visible, P * (1 + Z_error) + flushed, 0.0)
        row_error = 1 + shown.abs() + E_error.norm(dim=-1, keepdim=True)  # of lse: one for the row

        keep = torch.ones_like(o.visible)
        if p.dropout_p:
            keep = kept_pairs(rng_state(p), p.dropout_p, p.B, p.H, p.Lq, p.Lk)
        keep = keep.double() / (1 - p.dropout_p)
        dropped = P * keep
        out = dropped @ value
        dP, dP_abs = keep * (grad_out @ value.mT), keep * (grad_out.abs() @ value.abs().mT)
        dlse = torch.zeros_like(shown) if o.grad_lse is None else o.grad_lse[..., None]
        slope = dP - (P * dP).sum(-1, keepdim=True) + dlse
        smallest = torch.finfo(
            getattr(torch, p.dtype)
        ).smallest_normal  # below, a step stays the same
        equal = scale == 0 or p.spread == 0  # the scores of all pairs
        P_stored = torch.where(o.visible, dropped + smallest, 0.0)
        out_error = _root(keep * E_error, value) + row_error * out.abs() + dropped @ value.abs()
        delta_error = (grad_out * out_error).norm(dim=-1, keepdim=True)
        delta_error = delta_error + (grad_out * out).abs().sum(-1, keepdim=True)
        # of P in the product that gave out, and of out itself
        delta_stored = (grad_out * out).norm(dim=-1, keepdim=True)
        delta_stored = delta_stored.hypot(
            (P_stored * (grad_out @ value.mT)).norm(dim=-1, keepdim=True)
        )

        def slopes(weight: Tensor, error: Tensor) -> Slopes:
            own = error * slope.abs() + weight * (dP_abs + dlse.abs())
            value = weight * slope
            stored = torch.where(o.seen, value.abs() + smallest, 0.0)
            return Slopes(value, own, stored, weight, row_error, delta_error, delta_stored)

        dZ = slopes(P, E_error)
        dS = dZ.times(M)
        dS.own = dS.own + dZ.value.abs() * M_error

        def by_key_head(x: Tensor) -> Tensor:
            return x.view(p.B, p.Hkv, groups, *x.shape[2:])

        def shared(x: Tensor) -> Tensor:
            return by_key_head(x).sum(2).repeat_interleave(groups, 1)

        found = {
            "out": Summands(out_error, _root(P_stored, value), _gain(P_stored, value, out, equal)),
            "lse": Summands(
                row_error[..., 0] * (lse[..., 0] > -math.inf), torch.zeros_like(lse[..., 0])
            ),
            "query": Summands(
                abs(scale)
                * (
                    _root(dS.own, key)
                    + row_error * (dS.value @ key).abs()
                    + delta_error * (dS.weight @ key).abs()
                    + dS.value.abs() @ key.abs()
                ),
                abs(scale) * _root(dS.stored, key).hypot(delta_stored * (dS.weight @ key).abs()),
                abs(scale)
                * _gain(dS.stored, key, dS.value @ key, equal).hypot(
                    (delta_stored * (dS.weight @ key) * _unit(dS.value @ key)).sum(-1)
                ),
            ),
            "key": Summands(
                abs(scale)
                * (
                    by_key_head(_root(dS.each_error().mT, query)).norm(dim=2)
                    + by_key_head(dS.value.abs().mT @ query.abs()).sum(2)
                ),
                abs(scale) * by_key_head(_root(dS.each_stored().mT, query)).norm(dim=2),
                abs(scale)
                * by_key_head(
                    _gain(dS.each_stored().mT, query, shared(dS.value.mT @ query), equal)
                ).norm(dim=2),
            ),
            "value": Summands(
                by_key_head(_root((keep * E_error + dropped * row_error).mT, grad_out)).norm(dim=2)
                + by_key_head(dropped.mT @ grad_out.abs()).sum(2),
                by_key_head(_root(P_stored.mT, grad_out)).norm(dim=2),
                by_key_head(
                    _gain(P_stored.mT, grad_out, shared(dropped.mT @ grad_out), equal)
                ).norm(dim=2),
            ),
        }
        if o.multiplier is not None:
            dM = dZ.times(S)
            dM.own = dM.own + dZ.value.abs() * S_abs
            found |= mask_summands("multiplier", o.multiplier, dM)
        if o.bias is not None:
            if p.gate:  # its own gradient has no factor M, and is finite where M is 0
                weight = torch.where(o.seen & (lse > -math.inf), (S * M - shown).exp(), 0.0)
                dZ = slopes(weight, weight * (1 + Z_error))
            found |= mask_summands("bias", o.bias, dZ)
    return found


def product_error(mask: Tensor | LowRankMask | None) -> Tensor:
    """Summands of each element of a low-rank mask; 0 for one that is given."""
    if not isinstance(mask, LowRankMask):
        return torch.zeros((), dtype=torch.float64)
    sizes = mask.rows.abs() @ mask.columns.abs().mT
    return sizes if mask.offset is None else sizes + mask.offset.abs()


def mask_summands(name: str, mask: Tensor | LowRankMask, grad: Slopes) -> dict[str, Summands]:
    """Of the gradient of a mask or, factor by factor, of a low-rank one: drows = G columns,
    dcolumns = G^T rows, doffset = sum_i G_ij."""
    if not isinstance(mask, LowRankMask):
        return {name: grad.summed_to(mask.shape)}
    rows, columns = mask.rows, mask.columns

    def over_shared(x: Tensor, factor: Tensor, root: bool = False) -> Tensor:
        axes = [axis for axis in (0, 1) if factor.shape[axis] == 1]
        if not axes:
            return x
        return x.square().sum(axes, keepdim=True).sqrt() if root else x.sum(axes, keepdim=True)

    moved = grad.delta_stored * grad.weight  # by one error a row: that of delta
    error = (
        _root(grad.own, columns)
        + grad.row_error * (grad.value @ columns).abs()
        + grad.delta_error * (grad.weight @ columns).abs()
    )
    along = _unit(over_shared(grad.value @ columns, rows))
    stored = grad.delta_stored * (grad.weight @ columns)
    found = {
        f"{name}.rows": Summands(
            over_shared(error, rows, root=True)
            + over_shared(grad.value.abs() @ columns.abs(), rows),
            over_shared(stored, rows, root=True),
            over_shared((stored * along).sum(-1, keepdim=True), rows, root=True)[..., 0],
        )
    }
    error = _root(grad.each_error().mT, rows)
    along = _unit(over_shared(grad.value.mT @ rows, columns))
    found[f"{name}.columns"] = Summands(
        over_shared(error, columns, root=True)
        + over_shared(grad.value.abs().mT @ rows.abs(), columns),
        over_shared(_root(moved.mT, rows), columns, root=True),
        over_shared((moved.mT * (along @ rows.mT)).norm(dim=-1, keepdim=True), columns, root=True)[
            ..., 0
        ],
    )
    if mask.offset is not None:
        found[f"{name}.offset"] = grad.summed_to(mask.offset.shape)
    return found


def _root(left: Tensor, right: Tensor) -> Tensor:
    """Independent errors of a matrix product's summands."""
    size = _size(left)
    return size * ((left / size).square() @ right.square()).sqrt()


def _unit(rows: Tensor) -> Tensor:
    rows = rows / _size(rows)
    return torch.nn.functional.normalize(rows, dim=-1)


def _size(rows: Tensor) -> Tensor:
    """The largest of each row, to divide by: squares of small float64 weights underflow."""
    smallest = torch.finfo(torch.float64).smallest_normal
    return rows.abs().amax(-1, keepdim=True).clamp_min(smallest)


def _gain(left: Tensor, right: Tensor, product: Tensor, equal: bool) -> Tensor:
    """The part of _root that lies along each row of the product. `equal` factors on the left round
    the same way."""
    return (left * (_unit(product) @ right.mT)).norm(p=1 if equal else 2, dim=-1)


@dataclass
class Slopes:
    """weight * (dP - delta + dlse), [B,H,Lq,Lk], and what is wrong with it in units of eps."""

    value: Tensor
    own: Tensor  # error of each pair, independent of its neighbours
    stored: Tensor  # the value, or the smallest normal number of the operands' dtype
    weight: Tensor  # what an error of the row's delta is multiplied with
    row_error: Tensor  # relative, of all of a row together: its lse
    delta_error: Tensor
    delta_stored: Tensor  # error of delta when `out` was rounded to the operands' dtype

    def times(self, factor: Tensor) -> Slopes:
        return Slopes(
            self.value * factor,
            self.own * factor.abs(),
            self.stored * factor.abs(),
            self.weight * factor,
            self.row_error,
            self.delta_error,
            self.delta_stored,
        )

    def each_error(self) -> Tensor:
        return self.own + self.row_error * self.value.abs() + self.delta_error * self.weight.abs()

    def each_stored(self) -> Tensor:
        return self.stored.hypot(self.delta_stored * self.weight)

    def summed_to(self, shape: torch.Size) -> Summands:
        """The summands of a mask's gradient: this, summed over the axes along which the mask
        broadcasts."""
        axes = [
            axis for axis, size in enumerate((1,) * (4 - len(shape)) + tuple(shape)) if size == 1
        ]
        columns, others = [a for a in axes if a == 3], [a for a in axes if a < 3]

        def total(x: Tensor, over: list[int]) -> Tensor:
            return x.sum(dim=over, keepdim=True) if over else x

        def root(x: Tensor, over: list[int]) -> Tensor:
            return total(x.square(), over).sqrt()

        together = total(self.value, columns).abs() * self.row_error
        moved = total(self.weight, columns).abs()
        error = root(self.own, columns) + together + moved * self.delta_error
        error = root(error, others) + total(self.value.abs(), axes)
        # no matrix product here, so nothing but delta has been rounded on the way
        stored = root(moved * self.delta_stored, others)
        return Summands(error.view(shape), stored.view(shape))
