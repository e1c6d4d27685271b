"""The generator of a learned attention mask (LAM): a small MLP on each token."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lam_kernels.low_rank_mask import MAX_RANK, LowRankMask

MAX_DEPTH = 64
MASK_FORMS = ("auto", "dense", "low_rank")


class _Activation(NamedTuple):
    apply: Callable[[Tensor], Tensor]
    preimage: dict[
        int, float
    ]  # mask value -> last bias that gives it with a gradient that is not 0
    non_negative: bool


_ACTIVATIONS = {
    None: _Activation(lambda x: x, {0: 0.0, 1: 1.0}, False),
    # relu(0) is 0, but its gradient there is 0 as well: an additive mask would never leave the
    # start
    "relu": _Activation(F.relu, {1: 1.0}, True),
    "softplus": _Activation(F.softplus, {1: math.log(math.expm1(1.0))}, True),
    # 0 and 1 are limits that sigmoid never reaches, 1 is one for tanh
    "sigmoid": _Activation(torch.sigmoid, {}, True),
    "tanh": _Activation(torch.tanh, {0: 0.0}, False),
}
_IDENTITY = {"mul": 1, "gate": 1, "add": 0}  # mask value that leaves attention as it was


def _exact_preimage(activation: str | None, value: int, dtype: torch.dtype) -> float:
    """The last bias whose activation is exactly `value` in `dtype`; raises where there is none."""
    spec = _ACTIVATIONS[activation]
    if value not in spec.preimage:
        raise ValueError(
            f"init='identity' needs a mask that starts at {value}, which activation={activation!r} "
            "cannot reach (or only where its gradient is 0): use init='paper' or another activation"
        )
    centre = torch.tensor(spec.preimage[value], dtype=dtype, device="cpu")
    candidates = [centre]
    for direction in (-math.inf, math.inf):
        step = centre
        for _ in range(8):
            step = torch.nextafter(step, torch.full_like(step, direction))
            candidates.append(step)
    for bias in candidates:
        # 67 values: vector code and its scalar tail may round differently
        if bool((spec.apply(bias.expand(67).contiguous()) == value).all()):
            return bias.item()
    raise ValueError(f"activation={activation!r} does not give exactly {value} in {dtype}")


class Cost(NamedTuple):
    """Rates of a device, for the choice between the two forms of a mask."""

    flops_per_s: float
    bytes_per_s: float
    cache_bytes: int


# The rates of a product and of a copy that every bench run prints, of two cores with AVX-512.
# `python -m bench run --set low-rank` measures where the two forms meet.
COST = {"cpu": Cost(flops_per_s=200e9, bytes_per_s=20e9, cache_bytes=8 * 2**20)}


class LearnableAttentionMask(nn.Module):
    """Learned attention mask M = X(T) of a token sequence (arXiv 2406.02761, eq. 3 to 5).

        h_1 = relu(T W_1 + b_1);  h_l = relu(h_(l-1) W_l + b_l), l = 2..n-1
        M = act(h_(n-1) W_n + b_n)
        n = 1:  M = act(T W_1 + b_1)

    W_1 is [in_features, hidden], W_l [hidden, hidden], W_n [hidden, heads * max_len]; a sequence of
    L tokens uses, and computes, only the columns 0 .. L-1 of each head. The map acts on each token
    alone: row i of M depends on token i and nothing else. Column j belongs to key position j, so
    sequences are padded on the right, and one longer than max_len is refused.

    Shapes: tokens [B, L, in_features] -> mask [B, 1, L, L], or [B, heads, L, L] (a view of
    [B, L, heads, L], unit last stride), or the LowRankMask of that shape (see mask_form). dtype:
    that of the weights, or autocast's.
    A padded row of tokens gives a row of M that the attention of another row never reads.

    state_dict (stable): `layers.<0..depth-1>.weight` and `.bias`, in the layout of nn.Linear; head
    h owns the rows h * max_len .. (h+1) * max_len - 1 of the last weight.

    Args:
        in_features: width of a token.
        max_len: longest sequence, the number of columns learned.
        depth: number n of linear layers, 1 to 64. The paper's ViT uses 1, its best ablation 32.
        hidden: width of the inner layers (the paper does not state it). Default: in_features.
            Unused at depth 1.
        heads: 1 (one mask for all heads, as in the paper) or the number of attention heads.
        fusion: what the mask is for, and so what its identity is: "mul" (scores times M, eq. 6),
            "add" (scores plus M, appendix C.1), "gate" (weights times M, M >= 0: activation must be
            "relu", "softplus" or "sigmoid").
        init: "identity" starts as plain attention, exactly: inner layers He normal with bias 0,
            last weight 0, last bias such that M is 1 ("mul", "gate") or 0 ("add"). Refused where
            the activation
            cannot reach that value or has no gradient there: sigmoid always, tanh but for "add",
            relu and softplus for "add". "softplus" is exact in the dtype and on the CPU it is built
            on, else within rounding. Since the last weight is 0, the inner layers get their first
            gradient in the second step. "paper" is the library default of nn.Linear: at depth 32 it
            makes M nearly independent of the input.
        activation: of the last layer: None (as in the formulas), "relu", "softplus", "sigmoid",
            "tanh".
        mask_form: "dense" stores M. "low_rank" never does: the last layer's input, weight and bias
            go to the op as a LowRankMask, whose kernels build M tile by tile; needs
            activation=None and a rank (hidden, or in_features at depth 1) of at most 256. "auto"
            takes the cheaper of the two for each call, see `form`. Both have the same state_dict
            and give the same result within rounding.
    """

    def __init__(
        self,
        in_features: int,
        max_len: int,
        depth: int = 1,
        hidden: int | None = None,
        heads: int = 1,
        fusion: str = "mul",
        init: str = "identity",
        activation: str | None = None,
        mask_form: str = "auto",
        *,
        device=None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        hidden = in_features if hidden is None else hidden
        sizes = {"in_features": in_features, "max_len": max_len, "hidden": hidden, "heads": heads}
        for name, size in sizes.items():
            if not isinstance(size, int) or size < 1:
                raise ValueError(f"{name} must be an integer of at least 1, got {size!r}")
        if not isinstance(depth, int) or not 1 <= depth <= MAX_DEPTH:
            raise ValueError(f"depth must be an integer from 1 to {MAX_DEPTH}, got {depth!r}")
        if fusion not in _IDENTITY:
            raise ValueError(f"fusion must be one of {list(_IDENTITY)}, got {fusion!r}")
        if init not in ("identity", "paper"):
            raise ValueError(f"init must be 'identity' or 'paper', got {init!r}")
        if activation not in _ACTIVATIONS:
            raise ValueError(f"activation must be one of {list(_ACTIVATIONS)}, got {activation!r}")
        if mask_form not in MASK_FORMS:
            raise ValueError(f"mask_form must be 'auto', 'dense' or 'low_rank', got {mask_form!r}")
        rank = hidden if depth > 1 else in_features
        if mask_form == "low_rank" and activation is not None:
            raise ValueError(
                "mask_form='low_rank' needs activation=None, got "
                f"{activation!r}: the product of factors is M itself"
            )
        if mask_form == "low_rank" and rank > MAX_RANK:
            raise ValueError(
                f"mask_form='low_rank' needs a rank of at most {MAX_RANK}: "
                f"{'hidden' if depth > 1 else 'in_features'} is {rank}"
            )
        if fusion == "gate" and not _ACTIVATIONS[activation].non_negative:
            allowed = [name for name, spec in _ACTIVATIONS.items() if spec.non_negative]
            raise ValueError(
                f"fusion='gate' needs a mask M >= 0: activation must be one of {allowed}, "
                f"got {activation!r}"
            )
        self.in_features, self.max_len, self.depth, self.hidden = (
            in_features,
            max_len,
            depth,
            hidden,
        )
        self.heads, self.fusion, self.init, self.activation = heads, fusion, init, activation
        self.mask_form, self.rank = mask_form, rank
        widths = [in_features, *[hidden] * (depth - 1), heads * max_len]
        self.layers = nn.ModuleList(
            nn.Linear(a, b, device=device, dtype=dtype) for a, b in pairwise(widths)
        )
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws the weights anew, as `init` says."""
        if self.init == "paper":
            for layer in self.layers:
                layer.reset_parameters()
            return
        *inner, last = self.layers
        bias = _exact_preimage(self.activation, _IDENTITY[self.fusion], last.bias.dtype)
        for layer in inner:
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
            nn.init.zeros_(layer.bias)
        nn.init.zeros_(last.weight)
        nn.init.constant_(last.bias, bias)

    def form(self, tokens: Tensor) -> str:  # [B, L, in_features]
        """ "dense" or "low_rank": what forward gives for these tokens.

        With mask_form "auto" the form that costs less on the tokens' device, where M has
        n = B * heads * L^2 elements of s bytes:

            dense      6 n s bytes more: M and its gradient are each written once and read twice
            low_rank   2 n rank FLOPs more: M is built once more, in the backward pass

        low_rank when its FLOPs take less time than those bytes, at the rates in COST, and M and its
        gradient do not fit in the cache anyway. Only where the op's kernels take a LowRankMask.
        """
        if self.mask_form != "auto":
            return self.mask_form
        cost = COST.get(tokens.device.type)
        if cost is None or self.activation is not None or self.rank > MAX_RANK:
            return "dense"
        elements = tokens.shape[0] * self.heads * tokens.shape[1] ** 2
        item = self.layers[-1].weight.element_size()
        moved, flops = 6 * elements * item, 2 * elements * self.rank
        stays_in_cache = 2 * elements * item <= cost.cache_bytes
        slower = flops / cost.flops_per_s > moved / cost.bytes_per_s
        return "dense" if stays_in_cache or slower else "low_rank"

    def network(self, length: int) -> tuple[list[Tensor], list[Tensor]]:
        """(weights, biases) as score_masked_attention takes them, for rows of `length` scores.

        For a generator of max_len scores: views of the parameters, the weights transposed, the
        first one's rows and the last one's columns cut to `length`.
        """
        if self.in_features != self.max_len or self.heads != 1:
            raise ValueError(
                "only a generator from max_len scores to one mask of max_len values reads scores, "
                f"got in_features {self.in_features}, max_len {self.max_len}, heads {self.heads}"
            )
        if length > self.max_len:
            raise ValueError(
                f"memory has {length} positions, but this mask was built with "
                f"max_len={self.max_len}: its columns are key positions, so there is none beyond"
            )
        weights = [layer.weight.T for layer in self.layers]
        biases = [layer.bias for layer in self.layers]
        weights[0] = weights[0][:length]
        weights[-1], biases[-1] = weights[-1][:, :length], biases[-1][:length]
        return weights, biases

    def forward(
        self,
        tokens: Tensor,  # [B, L, in_features]
    ) -> Tensor | LowRankMask:  # [B, 1 or heads, L, L]
        if tokens.dim() != 3 or tokens.shape[-1] != self.in_features:
            raise ValueError(
                f"tokens must be [B, L, {self.in_features}], got shape {tuple(tokens.shape)}"
            )
        batch, length, _ = tokens.shape
        if length > self.max_len:
            raise ValueError(
                f"tokens has {length} positions, but this mask was built with "
                f"max_len={self.max_len}: its columns are key positions, so there is none beyond"
            )
        hidden = tokens
        for layer in self.layers[:-1]:
            hidden = F.relu(layer(hidden))
        last = self.layers[-1]
        weight = last.weight.unflatten(0, (self.heads, self.max_len))[:, :length]
        bias = last.bias.unflatten(0, (self.heads, self.max_len))[:, :length]
        if self.form(tokens) == "low_rank":
            return LowRankMask(hidden[:, None], weight[None], bias[None, :, None])
        mask = F.linear(hidden, weight.flatten(0, 1), bias.flatten())
        mask = _ACTIVATIONS[self.activation].apply(mask)
        return mask.view(batch, length, self.heads, length).transpose(1, 2)

    def extra_repr(self) -> str:
        text = f"in_features={self.in_features}, max_len={self.max_len}, depth={self.depth}"
        if self.depth > 1:
            text += f", hidden={self.hidden}"
        if self.mask_form != "auto":
            text += f", mask_form={self.mask_form!r}"
        text += f", heads={self.heads}, fusion={self.fusion!r}, init={self.init!r}"
        return text + (f", activation={self.activation!r}" if self.activation else "")
