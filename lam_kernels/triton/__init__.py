"""Triton backend: kernels for NVIDIA GPUs from compute capability 8.0 on.

    masked_attention.py            the op: which kernels run, with what, in which order
    masked_attention_forward.py    the forward kernel
    masked_attention_backward.py   the backward kernels
    tiles.py, patterns.py, masks.py, philox.py     what the kernels of every op share
    configurations.py              tile sizes, warps and stages, by architecture and problem
    interpreter.py                 the same kernels on CPU tensors, with TRITON_INTERPRET=1

Nothing here is imported before the first call: importing lam_kernels costs no Triton.
"""
