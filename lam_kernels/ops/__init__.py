"""One page an op: public function, checks, schema, fake and autograd; all but the kernels."""

from ._backends import backends, explain
from .global_local_attention import global_local_attention
from .map_gated_attention import map_gated_attention
from .masked_attention import lam_attention, masked_attention
from .score_masked_attention import score_masked_attention
from .window_attention import window_attention

__all__ = [
    "backends",
    "explain",
    "global_local_attention",
    "lam_attention",
    "map_gated_attention",
    "masked_attention",
    "score_masked_attention",
    "window_attention",
]
