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


def _remembered(get_np_dtype):
    """It builds a table of all dtypes at every call, of which a tile operation makes several."""
    found = {}

    @functools.wraps(get_np_dtype)
    def remembered(tt_dtype):
        name = tt_dtype.name
        if name not in found:
            found[name] = get_np_dtype(tt_dtype)
        return found[name]

    return remembered


class _Patched:
    """What a launch restores at its end: nothing, see _patch_once."""

    def restore(self) -> None:
        pass


def _patch_once(patch):
    """The interpreter patches triton.language anew for every call of a jitted function, which takes
    longer than the call. In a process that only interprets, once is enough."""
    done = set()

    @functools.wraps(patch)
    def patch_lang(function):
        languages = frozenset(
            id(value) for value in function.__globals__.values() if value is tl or value is tl.core
        )
        if languages not in done:
            patch(function)
            done.add(languages)
        return _Patched()

    return patch_lang


def _quiet(call):
    """numpy warns of inf - inf and log 0, which kernels compute for pairs that they then drop."""

    @functools.wraps(call)
    def run(*arguments, **keywords):
        with np.errstate(all="ignore"):
            return call(*arguments, **keywords)

    return run


@functools.cache
def install() -> None:
    """Correct the interpreter of this process, once."""
    interpreter.InterpreterBuilder.create_dot = _create_dot
    interpreter._convert_float = _rounding(interpreter._convert_float)
    interpreter._get_np_dtype = _remembered(interpreter._get_np_dtype)
    interpreter._patch_lang = _patch_once(interpreter._patch_lang)
    executor = interpreter.GridExecutor
    executor.__call__ = _quiet(executor.__call__)
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


_NOBODY, _MANY = -1, -2
_LARGEST_TRACKED = 2**26  # elements of one storage; above, only bounds are checked


class _Storage:
    """Which program touched each element of the memory that some arguments share."""

    def __init__(self, tensor: torch.Tensor):
        storage = tensor.untyped_storage()
        self.begin, self.bytes = storage.data_ptr(), storage.nbytes()
        self.end = self.begin + self.bytes
        self.writer: np.ndarray | None = None
        self.reader: np.ndarray | None = None

    def touch(self, addresses: np.ndarray, size: int, program: int, writes: bool) -> None:
        if self.bytes // size > _LARGEST_TRACKED:
            return
        if self.reader is None:
            self.reader = np.full(self.bytes // size + 1, _NOBODY, np.int32)
            self.writer = np.full(self.bytes // size + 1, _NOBODY, np.int32)
        at = (addresses - self.begin) // size
        writer, reader = self.writer[at], self.reader[at]
        verb = "writes" if writes else "reads"
        other = (writer != _NOBODY) & (writer != program)
        if other.any():
            raise KernelFault(
                f"program {program} {verb} {int(other.sum())} elements that program "
                f"{int(writer[other][0])} writes"
            )
        if writes:
            other = (reader != _NOBODY) & (reader != program)
            if other.any():
                raise KernelFault(
                    f"program {program} writes {int(other.sum())} elements that another reads"
                )
            self.writer[at] = program
        else:
            self.reader[at] = np.where((reader == _NOBODY) | (reader == program), program, _MANY)


class _Launch:
    """All accesses of one launch."""

    def __init__(self, arguments):
        tensors = list(_tensors(arguments))
        self.spans = sorted({_span(tensor) for tensor in tensors})
        self.storages = list(
            {t.untyped_storage().data_ptr(): _Storage(t) for t in tensors}.values()
        )

    def touch(self, addresses: np.ndarray, size: int, program: int, writes: bool) -> None:
        inside = np.zeros(addresses.shape, bool)
        for begin, end in self.spans:
            inside |= (addresses >= begin) & (addresses + size <= end)
        if not inside.all():
            verb = "writes" if writes else "reads"
            raise KernelFault(
                f"program {program} {verb} {int((~inside).sum())} elements outside every tensor "
                "it was given"
            )
        for storage in self.storages:
            here = addresses[(addresses >= storage.begin) & (addresses < storage.end)]
            if here.size:
                storage.touch(here, size, program, writes)


def _span(tensor: torch.Tensor) -> tuple[int, int]:
    """First and last byte of a tensor's elements."""
    begin, size = tensor.data_ptr(), tensor.element_size()
    if tensor.numel() == 0:
        return begin, begin
    reach = sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
    return begin, begin + (reach + 1) * size


_current: _Launch | None = None  # the launch that is being checked


def _watched(access, writes: bool):
    @functools.wraps(access)
    def run(self, ptrs, *rest):
        if _current is not None:
            mask = rest[1] if writes else rest[0]
            active = np.broadcast_to(mask.data, ptrs.data.shape)
            addresses = ptrs.data[active].astype(np.int64)
            if addresses.size:
                size = interpreter._get_np_dtype(ptrs.get_element_ty()).itemsize
                x, y, z = self.grid_idx
                _, of_y, of_z = self.grid_dim
                _current.touch(addresses, size, (x * of_y + y) * of_z + z, writes)
        return access(self, ptrs, *rest)

    return run


@contextlib.contextmanager
def checked():
    """Within: an access outside the tensors of a launch, and an element that two programs of a
    launch touch and one of them writes, raise KernelFault. Elements of size 0 and gaps between the
    rows of a strided operand count as inside."""
    builder, executor = interpreter.InterpreterBuilder, interpreter.GridExecutor
    before = builder.create_masked_load, builder.create_masked_store, executor.__call__

    def call(self, *arguments, **keywords):
        global _current
        _current = _Launch((arguments, keywords))
        try:
            return before[2](self, *arguments, **keywords)
        except interpreter.InterpreterError as error:
            cause: BaseException | None = error
            while cause is not None and not isinstance(cause, KernelFault):
                cause = cause.__cause__
            if cause is None:
                raise
            raise KernelFault(f"{self.fn.__name__}: {cause}") from error
        finally:
            _current = None

    builder.create_masked_load = _watched(before[0], writes=False)
    builder.create_masked_store = _watched(before[1], writes=True)
    executor.__call__ = call
    try:
        yield
    finally:
        builder.create_masked_load, builder.create_masked_store, executor.__call__ = before
