"""Modules with a learned attention mask: thin layers, each one call of the op."""

from .global_local_attention import GlobalLocalAttention
from .lam_attention import LAMSelfAttention
from .lam_cross_attention import LAMCrossAttention
from .lam_encoder import LAMEncoder, LAMEncoderLayer
from .learnable_attention_mask import LearnableAttentionMask

__all__ = [
    "GlobalLocalAttention",
    "LAMCrossAttention",
    "LAMEncoder",
    "LAMEncoderLayer",
    "LAMSelfAttention",
    "LearnableAttentionMask",
]
