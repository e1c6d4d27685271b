"""Swap the fused ops into a model that exists: one call puts them in, one call takes them out."""

from .learned_mask import LearnedMask
from .report import Report
from .sdpa import serve_sdpa
from .swapping import swap
from .transformers_interface import register_transformers

__all__ = ["LearnedMask", "Report", "register_transformers", "serve_sdpa", "swap"]
