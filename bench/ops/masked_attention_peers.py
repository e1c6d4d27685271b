"""The contenders of masked_attention: ours, and what one would use without it, in one table.

A peer is a function operands -> call, and call(query, key, value, multiplier, bias) -> out. The
formulas of the local peers (which keys a block of queries looks at) are written so that autograd
and the compiler see plain batched matrix products; check.py compares all of them with python_ref
before they are timed. A peer that cannot express a problem raises ValueError: that is its row.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from bench.contender import Peer, compiled, with_compiled
from lam_kernels import LowRankMask
from lam_kernels.patterns import BlockDiagonal, DilatedToeplitz, Segments, Toeplitz
from python_ref.inputs import Operands, Problem, dense_mask, factor_axes

Attention = Callable[..., Tensor]


def _scale(operands: Operands) -> float:
    p = operands.problem
    return p.D**-0.5 if p.scale is None else p.scale


def _hidden(operands: Operands) -> Tensor | None:
    """What pattern and boolean masks hide, [B|1, H|1, Lq|1, Lk]; True = hidden."""
    from .masked_attention import dense_pattern

    seen = dense_pattern(operands)
    key_mask = None if operands.key_mask is None else operands.key_mask[:, None, None, :]
    for mask in (operands.attn_mask, key_mask):
        if mask is not None:
            seen = mask if seen is None else seen & mask
    return None if seen is None else ~seen


def ours(operands: Operands, backend: str) -> Attention:
    """lam_kernels.masked_attention on a named backend, which never falls back."""
    from lam_kernels import masked_attention

    p, pattern = operands.problem, operands.pattern
    attn_mask, key_mask = operands.attn_mask, operands.key_mask

    def call(query, key, value, multiplier, bias):
        return masked_attention(
            query, key, value, multiplier=multiplier, bias=bias, pattern=pattern, scale=p.scale,
            attn_mask=attn_mask, key_mask=key_mask, enable_gqa=p.Hkv != p.H, backend=backend,
        )  # fmt: skip

    return call


def ours_product(operands: Operands, backend: str) -> Attention:
    """Ours on the stored mask that a LowRankMask stands for, made and differentiated by torch."""
    call = ours(operands, backend)

    def stored(query, key, value, multiplier, bias):
        return call(query, key, value, dense_mask(multiplier), dense_mask(bias))

    return stored


def eager(operands: Operands, backend: str = "") -> Attention:
    """The formula as one writes it, the [B,H,Lq,Lk] scores in memory."""
    scale, hidden = _scale(operands), _hidden(operands)
    group = operands.problem.H // operands.problem.Hkv

    def call(query, key, value, multiplier, bias):
        if group > 1:
            key, value = (t.repeat_interleave(group, 1) for t in (key, value))
        scores = (query @ key.transpose(-1, -2)) * scale
        if multiplier is not None:
            scores = scores * dense_mask(multiplier)
        if bias is not None:
            scores = scores + dense_mask(bias)
        if hidden is not None:
            scores = scores.masked_fill(hidden, -math.inf)
        return torch.softmax(scores, -1) @ value

    return call


# ---- PyTorch's fused attention


def _unmasked(problem: Problem) -> Problem:
    none = dict.fromkeys(("multiplier", "bias", "pattern", "attn_mask"))
    return problem.but(**none, key_mask=False)


def _added(problem: Problem, gradient: bool) -> Problem:
    """The learned mask as a bias: a float mask of SDPA can only be added."""
    axes = problem.bias or problem.multiplier
    if axes is None:
        raise ValueError("there is no learned mask here: nothing to add")
    if factor_axes(axes):
        axes = _dense_axes(axes)
    grads = problem.grads.replace("m", "").replace("b", "") + ("b" if gradient else "")
    dtype = problem.bias_dtype or problem.multiplier_dtype
    return problem.but(
        multiplier=None, multiplier_dtype=None, bias=axes, bias_dtype=dtype, grads=grads
    )


def _dense_axes(text: str) -> str:
    """The axes of the dense mask that has the shape of these factors' product."""
    _, factors = factor_axes(text)
    letters = ("b" if any(f[0] != "1" for f in factors) else "1",
               "h" if any(f[1] != "1" for f in factors) else "1")  # fmt: skip
    return "".join(letters) + "qk"


def _with_dense_mask(problem: Problem) -> Problem:
    """The same problem with a dense mask of its own instead of factors."""
    given = {name: getattr(problem, name) for name in ("multiplier", "bias")}
    return problem.but(**{n: _dense_axes(t) for n, t in given.items() if factor_axes(t)})


def _sdpa_mask(operands: Operands, bias: Tensor | None, hidden: Tensor | None) -> Tensor | None:
    if bias is None:
        return None if hidden is None else ~hidden
    return bias if hidden is None else bias.masked_fill(hidden, -math.inf)


def sdpa(*kernels: SDPBackend) -> Callable[[Operands, str], Attention]:
    """scaled_dot_product_attention; with `kernels`, only those may serve the call."""

    def build(operands: Operands, backend: str = "") -> Attention:
        if operands.multiplier is not None:
            raise ValueError("scaled_dot_product_attention cannot multiply its scores by a mask")
        if isinstance(operands.bias, LowRankMask):
            raise ValueError("scaled_dot_product_attention knows no mask by its factors")
        scale, hidden = _scale(operands), _hidden(operands)
        options = {"scale": scale, "enable_gqa": operands.problem.Hkv != operands.problem.H}

        def call(query, key, value, multiplier, bias):
            mask = _sdpa_mask(operands, bias, hidden)
            return F.scaled_dot_product_attention(query, key, value, mask, **options)

        def forced(*given):
            with sdpa_kernel(list(kernels)):
                return call(*given)

        return forced if kernels else call

    return build


def sdpa_choice(operands: Operands) -> str:
    """Which of its kernels PyTorch takes for these operands."""
    if isinstance(operands.bias, LowRankMask):
        return ""
    mask = _sdpa_mask(operands, operands.bias, _hidden(operands))
    chosen = torch._fused_sdp_choice(
        operands.query, operands.key, operands.value, mask, scale=_scale(operands),
        enable_gqa=operands.problem.Hkv != operands.problem.H,
    )  # fmt: skip
    names = {int(value): name for name, value in SDPBackend.__members__.items()}
    return f"SDPA chose {names.get(chosen, chosen)}"


# ---- FlexAttention, xFormers, NATTEN


def flex(operands: Operands, backend: str = "") -> Attention:
    """FlexAttention, compiled, with the learned mask read in its score_mod."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    p, scale = operands.problem, _scale(operands)
    pattern, attn_mask, key_mask = operands.pattern, operands.attn_mask, operands.key_mask
    if isinstance(operands.multiplier, LowRankMask) or isinstance(operands.bias, LowRankMask):
        raise ValueError("a score_mod of factors is not written here")
    if isinstance(pattern, list):
        raise ValueError("one mask_mod for each head is not written here")

    def at(mask: Tensor, b, h, i, j) -> Tensor:
        index = zip(mask.shape, (b, h, i, j), strict=True)
        return mask[tuple(x if size > 1 else 0 for size, x in index)]

    def visible(b, h, i, j):
        seen = j >= 0
        for part in () if pattern is None else pattern._parts():
            if isinstance(part, Segments):
                row = b if part.query_ids.shape[0] > 1 else 0
                seen = seen & (part.query_ids[row, i] == part.key_ids[row, j])
            else:
                seen = seen & part._keep(i, j, p.Lq, p.Lk)
        if attn_mask is not None:
            seen = seen & at(attn_mask, b, h, i, j)
        return seen if key_mask is None else seen & key_mask[b, j]

    blocks = None
    if pattern is not None or attn_mask is not None or key_mask is not None:
        by_sample = key_mask is not None or (pattern is not None and pattern.segment_ids)
        blocks = create_block_mask(
            visible, p.B if by_sample else None, None, p.Lq, p.Lk, device=operands.query.device
        )
    # dynamic=False: torch otherwise gives the second shape of a process a slower, general kernel
    # fullgraph=False: the row then has FlexAttention's own words where it refuses
    attend = torch.compile(flex_attention, dynamic=False)

    def call(query, key, value, multiplier, bias):
        def shaped(score, b, h, i, j):
            if multiplier is not None:
                score = score * at(multiplier, b, h, i, j)
            return score if bias is None else score + at(bias, b, h, i, j)

        learned = multiplier is not None or bias is not None
        return attend(
            query, key, value, score_mod=shaped if learned else None, block_mask=blocks,
            scale=scale, enable_gqa=p.Hkv != p.H,
        )  # fmt: skip

    return call


def xformers(operands: Operands, backend: str = "") -> Attention:
    """xformers.ops.memory_efficient_attention; a learned mask can only be added."""
    if operands.multiplier is not None:
        raise ValueError("memory_efficient_attention cannot multiply its scores by a mask")
    attend = importlib.import_module("xformers.ops").memory_efficient_attention
    p, scale, hidden = operands.problem, _scale(operands), _hidden(operands)

    def call(query, key, value, multiplier, bias):
        mask = bias
        if hidden is not None:
            zero = query.new_zeros(()) if bias is None else bias
            mask = torch.where(hidden, -math.inf, zero)
        if mask is not None:
            mask = mask.to(query.dtype).expand(p.B, p.H, p.Lq, p.Lk)
        rows = (t.transpose(1, 2) for t in (query, key, value))
        return attend(*rows, attn_bias=mask, scale=scale).transpose(1, 2)

    return call


def _without_learned_mask(problem: Problem) -> Problem:
    return problem.but(multiplier=None, bias=None)


def natten(operands: Operands, backend: str = "") -> Attention:
    """natten.na1d: the same window, except at both ends, where it moves inward and is not cut."""
    pattern = operands.pattern
    if not isinstance(pattern, Toeplitz | DilatedToeplitz):
        raise ValueError("NATTEN has windows only: this is no Toeplitz pattern")
    dilation = getattr(pattern, "dilation", 1)
    attend = importlib.import_module("natten").na1d
    window, scale = 2 * (pattern.radius // dilation) + 1, _scale(operands)

    def call(query, key, value, multiplier, bias):
        rows = (t.transpose(1, 2).contiguous() for t in (query, key, value))
        out = attend(*rows, kernel_size=window, dilation=dilation, scale=scale)
        return out.transpose(1, 2)

    return call


def natten_expected(problem: Problem, device: str) -> list:
    """What na1d has to give: its own windows as an attn_mask of the reference."""
    from . import masked_attention as page

    operands = page.draw(problem, device)
    pattern, L = operands.pattern, problem.Lq
    dilation = getattr(pattern, "dilation", 1)
    reach = pattern.radius // dilation
    i = torch.arange(L, device=device)[:, None]
    j = torch.arange(L, device=device)[None, :]
    # positions within a residue class, which has `count` of them
    row, column, count = i // dilation, j // dilation, (L - 1 - i % dilation) // dilation + 1
    first = (row - reach).clamp(min=0).minimum((count - 2 * reach - 1).clamp(min=0))
    seen = (i % dilation == j % dilation) & (column >= first) & (column <= first + 2 * reach)
    operands.pattern, operands.attn_mask = None, seen[None, None]
    return page.expected_of(operands)


# ---- local patterns by hand


def _band(operands: Operands, rows: int) -> tuple[int, int, Tensor]:
    """(radius, query blocks, hidden [blocks, rows, rows + 2 radius]) of a Toeplitz pattern."""
    p = operands.problem
    if not isinstance(operands.pattern, Toeplitz) or operands.multiplier is not None:
        raise ValueError("these blocks are written for a Toeplitz pattern without a multiplier")
    if p.bias not in (None, "1h1k") or operands.key_mask is not None:
        raise ValueError("these blocks know a bias [1,H,1,L] and no other mask")
    radius = operands.pattern.radius
    if p.Lq != p.Lk or p.Lq % rows or rows % radius:
        raise ValueError(
            f"blocks of {rows} need Lq = Lk, a multiple of it, and a radius dividing it"
        )
    count = p.Lq // rows
    device = operands.query.device
    i = torch.arange(p.Lq, device=device).view(count, rows, 1)
    first = torch.arange(count, device=device)[:, None, None] * rows - radius
    j = first + torch.arange(rows + 2 * radius, device=device)
    return radius, count, ((i - j).abs() > radius) | (j < 0) | (j >= p.Lk)


def _windowed(
    operands: Operands, rows: int, windows: Callable[[Tensor, int, int, int], Tensor]
) -> Attention:
    """Blocks of `rows` queries against the rows + 2 radius keys around them.

    windows(x [B,h,L,d], radius, blocks, rows) -> [B,h,blocks,rows + 2 radius,d]
    """
    scale = _scale(operands)
    radius, blocks, hidden = _band(operands, rows)

    def call(query, key, value, multiplier, bias):
        B, H, L, D = query.shape
        scores = query.view(B, H, blocks, rows, D) @ windows(key, radius, blocks, rows).transpose(
            -1, -2
        )
        scores = scores * scale
        if bias is not None:  # [1,H,1,L]
            scores = scores + windows(bias.transpose(-1, -2), radius, blocks, rows).transpose(
                -1, -2
            )
        weights = torch.softmax(scores.masked_fill(hidden, -math.inf), -1)
        return (weights @ windows(value, radius, blocks, rows)).reshape(B, H, L, value.shape[-1])

    return call


def _by_shifted_blocks(x: Tensor, radius: int, blocks: int, rows: int) -> Tensor:
    B, h, _, d = x.shape
    step = rows // radius  # a query block is `step` key blocks of one radius
    padded = F.pad(x, (0, 0, radius, radius)).view(B, h, blocks * step + 2, radius, d)
    shifted = [padded[:, :, s : s + (blocks - 1) * step + 1 : step] for s in range(step + 2)]
    return torch.cat(shifted, dim=3)


def _by_unfold(x: Tensor, radius: int, blocks: int, rows: int) -> Tensor:
    padded = F.pad(x, (0, 0, radius, radius))
    return padded.unfold(2, rows + 2 * radius, rows).transpose(-1, -2)


def blocks(rows: int) -> Callable[[Operands, str], Attention]:
    return lambda operands, backend="": _windowed(operands, rows, _by_shifted_blocks)


def windows(rows: int) -> Callable[[Operands, str], Attention]:
    return lambda operands, backend="": _windowed(operands, rows, _by_unfold)


def strided(rows: int) -> Callable[[Operands, str], Attention]:
    """A dilated window as plain windows within each residue class of the positions."""

    def build(operands: Operands, backend: str = "") -> Attention:
        p, pattern = operands.problem, operands.pattern
        if not isinstance(pattern, DilatedToeplitz) or p.multiplier or p.bias not in (None, "1h1k"):
            raise ValueError("written for DilatedToeplitz with no mask or a bias [1,H,1,L]")
        if p.Lq != p.Lk or p.Lq % pattern.dilation:
            raise ValueError("residue classes of one length need Lq = Lk, a multiple of dilation")
        d, L = pattern.dilation, p.Lq // pattern.dilation
        inner = Operands(**vars(operands))
        inner.problem = p.but(Lq=L, Lk=L, scale=_scale(operands))
        inner.pattern = Toeplitz(pattern.radius // d)
        banded = _windowed(inner, rows, _by_shifted_blocks)

        def classes(x: Tensor) -> Tensor:  # [B,H,L,e] -> [B * d, H, L / d, e]
            B, H, _, e = x.shape
            return x.view(B, H, L, d, e).permute(0, 3, 1, 2, 4).reshape(B * d, H, L, e)

        def call(query, key, value, multiplier, bias):
            B, H = query.shape[:2]
            if bias is not None:  # [1,H,1,L] -> [B * d, H, 1, L / d]
                bias = classes(bias.transpose(-1, -2)).transpose(-1, -2).repeat(B, 1, 1, 1)
            out = banded(*map(classes, (query, key, value)), None, bias)
            return out.view(B, d, H, L, -1).permute(0, 2, 3, 1, 4).reshape(B, H, L * d, -1)

        return call

    return build


def _block_of(operands: Operands) -> int:
    p = operands.problem
    if not isinstance(operands.pattern, BlockDiagonal) or operands.multiplier is not None:
        raise ValueError("written for a BlockDiagonal pattern without a multiplier")
    if p.bias not in (None, "1h1k") or p.Lq != p.Lk or p.Lq % operands.pattern.block:
        raise ValueError("written for whole blocks, with no mask or a bias [1,H,1,L]")
    return operands.pattern.block


def reshaped(operands: Operands, backend: str = "") -> Attention:
    """Block-diagonal attention as a batch of small dense ones: two views and nothing copied."""
    scale, block = _scale(operands), _block_of(operands)

    def call(query, key, value, multiplier, bias):
        B, H, L, D = query.shape
        blocked = (B, H, L // block, block)
        scores = (query.view(*blocked, D) @ key.view(*blocked, D).transpose(-1, -2)) * scale
        if bias is not None:  # [1,H,1,L]
            scores = scores + bias.view(1, H, L // block, 1, block)
        return (torch.softmax(scores, -1) @ value.view(*blocked, -1)).view(B, H, L, -1)

    return call


def reshaped_sdpa(operands: Operands, backend: str = "") -> Attention:
    """The same batch through PyTorch's fused attention, which learns no bias."""
    if operands.bias is not None:
        raise ValueError("has no learned bias")
    scale, block = _scale(operands), _block_of(operands)

    def call(query, key, value, multiplier, bias):
        B, H, L = query.shape[:3]
        split = [t.view(B, H * (L // block), block, -1) for t in (query, key, value)]
        return F.scaled_dot_product_attention(*split, scale=scale).view(B, H, L, -1)

    return call


class _Plain(torch.autograd.Function):
    """What any autograd.Function of these operands costs: allocate results, save operands."""

    @staticmethod
    def forward(ctx, query, key, value, multiplier):
        ctx.save_for_backward(query, key, value, multiplier)
        return torch.empty_like(query)

    @staticmethod
    def backward(ctx, grad_out):
        return tuple(torch.empty_like(t) for t in ctx.saved_tensors)


def plain_function(operands: Operands, backend: str = "") -> Attention:
    return lambda query, key, value, multiplier, bias: _Plain.apply(query, key, value, multiplier)


def _sdpa_kernels() -> dict[str, Peer]:
    kernels = {
        "flash": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION,
        "efficient": SDPBackend.EFFICIENT_ATTENTION, "math": SDPBackend.MATH,
    }  # fmt: skip
    return {
        f"sdpa_nomask_{name}": Peer(
            f"sdpa_nomask, no other kernel than {kernel.name}", sdpa(kernel), _unmasked, "no mask"
        )
        for name, kernel in kernels.items()
    }


PEERS: dict[str, Peer] = {
    "ours": Peer("lam_kernels.masked_attention", ours),
    "eager": Peer("the formula in plain PyTorch", eager),
    "compile": Peer("torch.compile of eager", compiled(eager), compiled=True),
    "sdpa": Peer("scaled_dot_product_attention of the same problem", sdpa(), note=sdpa_choice),
    "sdpa_nomask": Peer(
        "the same without any mask: the price when nobody learns one", sdpa(), _unmasked, "no mask",
        note=sdpa_choice,
    ),
    "sdpa_floatmask": Peer(
        "the learned mask as a float mask: added, no gradient", sdpa(),
        lambda problem: _added(problem, False), "mask added, no gradient for it", note=sdpa_choice,
    ),
    "sdpa_floatmask_grad": Peer(
        "the same with its gradient", sdpa(),
        lambda problem: _added(problem, True), "mask added", note=sdpa_choice,
    ),
    **_sdpa_kernels(),
    "flex": Peer("FlexAttention, compiled, mask read in its score_mod", flex, compiled=True),
    "xformers": Peer("xFormers memory_efficient_attention, mask added", xformers,
                     lambda p: _added(p, True) if p.multiplier else p, "mask added"),
    "natten": Peer(
        "NATTEN's na1d: windows that move inward at both ends", natten, _without_learned_mask,
        "no learned mask, windows move inward at both ends", expected=natten_expected,
    ),
    **with_compiled("blocks64", "64 queries x 192 keys, key blocks side by side", blocks(64)),
    **with_compiled("blocks128", "128 queries x 256 keys, the same", blocks(128)),
    **with_compiled("windows64", "64 queries x 192 keys, unfolded windows", windows(64)),
    **with_compiled("strided64", "dilated: blocks64 within each residue class", strided(64)),
    **with_compiled("reshaped", "block-diagonal as a batch of small dense problems", reshaped),
    "reshaped_sdpa": Peer("the same batch through scaled_dot_product_attention", reshaped_sdpa),
    "ours_product": Peer("ours on M = rows columns^T, the product by torch", ours_product),
    "ours_dense": Peer("ours with a dense mask instead of its factors", ours, _with_dense_mask,
                       "dense mask"),
    "ours_d32": Peer("ours with D 32", ours, {"D": 32}, "D 32"),
    "ours_everywhere": Peer("ours without the pattern", ours, {"pattern": None}, "no pattern"),
    "ours_1thread": Peer("ours with one thread", ours, threads=1),
    "plain_function": Peer("a Function that only allocates", plain_function, checked=False),
}  # fmt: skip


def usual_peers(problem: Problem, device: str, direction: str) -> tuple[str, ...]:
    """What somebody with this problem would try instead, the fastest to expect first."""
    pattern, learned = str(problem.pattern), problem.multiplier or problem.bias
    peers = ["compile", "eager", "sdpa_nomask"]
    if factor_axes(problem.multiplier) or factor_axes(problem.bias):
        return (*peers, "ours_dense")
    if problem.multiplier is None:
        peers.append("sdpa")
    elif direction != "fwd" and "m" in problem.grads:
        peers.append("sdpa_floatmask_grad")
    else:
        peers.append("sdpa_floatmask")
    local = problem.multiplier is None and problem.bias in (None, "1h1k")
    if local and pattern.startswith("Toeplitz"):
        peers.append("blocks64_compile")
    if local and pattern.startswith("Dilated"):
        peers.append("strided64_compile")
    if local and pattern.startswith("BlockDiagonal"):
        peers.append("reshaped_compile")
    if learned is None and problem.pattern is None:
        peers.remove("sdpa")  # sdpa_nomask is the same
    if device != "cpu" or direction == "fwd":
        peers.append("flex")
    return tuple(peers)
