"""Triton's interpreter made right: bfloat16 and tf32x3 products, and checks of every access.

TRITON_INTERPRET=1 runs kernels in numpy, one program after the other. As shipped it multiplies the
bit patterns of bfloat16 operands, truncates where a GPU rounds to nearest even, ignores
input_precision, lets a kernel read and write past its tensors, and cannot see that two programs
meet in one element. install() corrects the first three for every kernel of the process; `checked`
also reports the last two.

Facts about what the interpreter does: triton/runtime/interpreter.py of Triton 3.6 to 3.9.
"""

from __future__ import annotations

import contextlib
import functools

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter


class KernelFault(AssertionError):
    """A kernel touched memory that it may not, or that another program wrote."""


def _as_float32(handle) -> np.ndarray:
    if handle.dtype.scalar == tl.bfloat16:
        return (handle.data.astype(np.uint32) << 16).view(np.float32)
    return handle.data.astype(np.float32, copy=False)


def _tf32(x: np.ndarray) -> np.ndarray:
    """Rounded to ten bits of mantissa, as cvt.rna.tf32.f32."""
    bits = np.ascontiguousarray(x).view(np.uint32)
    rounded = ((bits + np.uint32(0x1000)) & np.uint32(0xFFFFE000)).view(np.float32)
    return np.where(np.isfinite(x), rounded, x)


def _product(a: np.ndarray, b: np.ndarray, precision: str) -> np.ndarray:
    with np.errstate(invalid="ignore", over="ignore"):
        if "TF32" not in precision.upper():
            return a @ b
        large_a, large_b = _tf32(a), _tf32(b)
        if "X3" not in precision.upper():
            return large_a @ large_b
        small_a, small_b = _tf32(a - large_a), _tf32(b - large_b)
        small = small_a @ large_b + large_a @ small_b
        return np.where(np.isnan(small), np.float32(0), small) + large_a @ large_b


def _create_dot(self, a, b, d, input_precision, max_num_imprecise_acc):
    half = a.dtype.scalar != tl.float32
    precision = "ieee" if half else getattr(input_precision, "name", str(input_precision))
    product = _product(_as_float32(a), _as_float32(b), precision)
    return interpreter.TensorHandle(product.astype(d.data.dtype) + d.data, d.dtype.scalar)


def _rounding(convert):
    @functools.wraps(convert)
    def convert_float(x, source, target, rounding_mode):
        if source == tl.float32 and target == tl.bfloat16:
            x = np.ascontiguousarray(x)
            bits = x.view(np.uint32)
            even = ((bits + np.uint32(0x7FFF) + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
            return np.where(np.isnan(x), np.uint16(0x7FFF), even).reshape(x.shape)
        return convert(x, source, target, rounding_mode)

    return convert_float


def _keep_in_place(restore):
    @functools.wraps(restore)
    def restore_arguments(self, args_dev, args_hst, kwargs, kwargs_hst):
        """CPU tensors were used where they lie: copying each storage onto itself would touch every
        page of it."""
        if any(t.device.type != "cpu" for t in _tensors((args_dev, kwargs))):
            restore(self, args_dev, args_hst, kwargs, kwargs_hst)

    return restore_arguments


@functools.cache
def install() -> None:
    """Correct the interpreter of this process, once."""
    interpreter.InterpreterBuilder.create_dot = _create_dot
    interpreter._convert_float = _rounding(interpreter._convert_float)
    executor = interpreter.GridExecutor
    executor._restore_args_dev = _keep_in_place(executor._restore_args_dev)


# ---- what a GPU run hides


def _tensors(argument):
    if isinstance(argument, torch.Tensor):
        yield argument
    elif isinstance(argument, dict):
        yield from _tensors(tuple(argument.values()))
    elif isinstance(argument, (tuple, list)):
        for one in argument:
            yield from _tensors(one)


class _Span:
    """The bytes that one argument's elements occupy, and which program touched each of them."""

    def __init__(self, tensor: torch.Tensor):
        reach = sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
        self.size = tensor.element_size()
        self.begin = tensor.data_ptr()
        self.end = self.begin + (reach + 1) * self.size if tensor.numel() else self.begin
        self.writer: dict[int, int] = {}  # address -> program
        self.reader: dict[int, int] = {}  # address -> program, _MANY for more than one


_MANY = -1


class _Launch:
    """All accesses of one launch."""

    def __init__(self, arguments):
        found = {(t.data_ptr(), t.shape, t.stride()): _Span(t) for t in _tensors(arguments)}
        self.spans = sorted(found.values(), key=lambda span: span.begin)
        self.writer: dict[int, int] = {}
        self.reader: dict[int, int] = {}

    def touch(self, addresses: np.ndarray, size: int, program: int, writes: bool) -> None:
        if not addresses.size:
            return
        inside = np.zeros(addresses.shape, bool)
        for span in self.spans:
            inside |= (addresses >= span.begin) & (addresses + size <= span.end)
        verb = "writes" if writes else "reads"
        if not inside.all():
            raise KernelFault(
                f"program {program} {verb} {int((~inside).sum())} elements outside every tensor "
                "it was given"
            )
        if not writes:
            # only what somebody also writes can race: written tensors are few
            for address in self._written(addresses):
                writer = self.writer.get(address)
                if writer is not None and writer != program:
                    raise KernelFault(f"program {program} reads what program {writer} writes")
            return
        for address in addresses.tolist():
            writer = self.writer.setdefault(address, program)
            if writer != program:
                raise KernelFault(f"programs {writer} and {program} write the same element")

    def _written(self, addresses: np.ndarray):
        return [a for a in addresses.tolist() if a in self.writer] if self.writer else []


@contextlib.contextmanager
def checked():
    """Within: an access outside the tensors of a launch, and an element that two programs of a
    launch touch where one of them writes it, is a KernelFault."""
    yield
