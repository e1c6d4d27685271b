"""window_attention for the bench: masked_attention's page with a bias for each head, called by its
own name.

The shifted windows of an image are the pattern "Windows(rows, columns, side, shift)". Its eager and
compiled peers mask the scores as Swin does; every contender is checked as masked_attention is.
"""

from __future__ import annotations

from bench.contender import Peer
from python_ref.inputs import Operands, Problem

from .masked_attention import (
    OUTPUTS,
    arguments,
    draw,
    expected,
    flops,
    grad_outs,
    label,
    least_bytes,
    leaves,
    score_size,
    tiny,
)
from .masked_attention_peers import PEERS as _PEERS

__all__ = [
    "EXAMPLE", "OUTPUTS", "PEERS", "Problem", "arguments", "draw", "expected", "flops", "grad_outs",
    "label", "least_bytes", "leaves", "score_size", "tiny", "usual_peers",
]  # fmt: skip

EXAMPLE = {"B": 64, "H": 6, "Lq": 144, "Lk": 144, "D": 32, "bias": "1hqk"}


def ours(operands: Operands, backend: str):
    """lam_kernels.window_attention on a named backend, which never falls back."""
    from lam_kernels import window_attention

    p = operands.problem
    if p.bias != "1hqk" or p.multiplier or p.key_mask or p.attn_mask:
        raise ValueError("window_attention takes a bias [1,H,L,L] and no other mask")
    ids = operands.pattern.segment_ids if operands.pattern is not None else (None,)

    def call(query, key, value, multiplier, bias):
        return window_attention(
            query, key, value, bias[0], segments=ids[0], scale=p.scale, backend=backend
        )

    return call


_SHARED = ("eager", "compile", "sdpa", "sdpa_nomask", "flex", "ours_1thread")
PEERS: dict[str, Peer] = {
    "ours": Peer("lam_kernels.window_attention", ours),
    **{name: _PEERS[name] for name in _SHARED},
}


def usual_peers(problem: Problem, device: str, direction: str) -> tuple[str, ...]:
    flex = ("flex",) if device != "cpu" or direction == "fwd" else ()
    return ("compile", "eager", "sdpa", *flex)
