"""The specification: every op in plain torch, any device, float64 too, differentiable by autograd.

Imports torch and the pure data of lam_kernels (patterns, low_rank_mask) only; no kernel imports it.
"""
