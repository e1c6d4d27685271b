"""lam_kernels: attention with learned masks, fused forward and backward."""

from ._version import __version__
from .low_rank_mask import LowRankMask
from .ops import (
    backends,
    explain,
    global_local_attention,
    lam_attention,
    map_gated_attention,
    masked_attention,
    score_masked_attention,
    window_attention,
)
from .patterns import BlockDiagonal, Causal, DilatedToeplitz, Segments, Toeplitz

__all__ = [
    "BlockDiagonal",
    "Causal",
    "DilatedToeplitz",
    "LowRankMask",
    "Segments",
    "Toeplitz",
    "__version__",
    "backends",
    "explain",
    "global_local_attention",
    "lam_attention",
    "map_gated_attention",
    "masked_attention",
    "score_masked_attention",
    "window_attention",
]
