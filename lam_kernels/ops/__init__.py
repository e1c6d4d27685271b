"""One page an op: public function, checks, schema, fake and autograd; all but the kernels."""

from ._backends import backends, explain
from .masked_attention import lam_attention, masked_attention

__all__ = ["backends", "explain", "lam_attention", "masked_attention"]
