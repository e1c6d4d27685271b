"""The specification: every op in plain torch, any device, float64 too, differentiable by autograd.

Imports torch and lam_kernels.patterns (pure data) only; no kernel imports it.
"""
