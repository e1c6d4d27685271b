"""Triton backend: kernels for NVIDIA GPUs from compute capability 8.0 on.

    OP.py                          the op: which kernels run, with what, in which order
    OP_forward.py, OP_backward.py  its kernels; masked_attention.py is where to start reading
    tiles.py, patterns.py, masks.py, philox.py     what the kernels of every op share
    configurations.py              tile sizes, warps and stages, by architecture and problem
    fitting.py                     less of them where a launch asks for more than a chip has
    interpreter.py                 the same kernels on CPU tensors, with TRITON_INTERPRET=1

Nothing here is imported before the first call: importing lam_kernels costs no Triton.
"""
