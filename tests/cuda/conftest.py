"""The emulator behind backend "cuda", for tests that steer it or read what it counted."""

from __future__ import annotations

import ctypes

import pytest

from lam_kernels.ops import _cuda, _native

SM_90 = 232448  # bytes of shared memory that a block may have


class Emulation:
    def __init__(self):
        name = f"_cuda_emulation{_native._SUFFIX}"
        self.library = ctypes.CDLL(str(_native._PACKAGE / name))
        self.library.lam_emulation_counter.restype = ctypes.c_uint64

    def device(self, processors: int, shared_bytes: int = SM_90) -> None:
        self.library.lam_emulation_device(processors, shared_bytes)

    def schedule(self, seed: int, order: int) -> None:
        self.library.lam_emulation_schedule(ctypes.c_uint64(seed), order)

    def count(self, banks: bool = False) -> None:
        """Counts from zero; bank conflicts of plain accesses only where they are wanted."""
        self.library.lam_emulation_count_banks(int(banks))

    def counted(self, name: str) -> int:
        return self.library.lam_emulation_counter(name.encode())


@pytest.fixture
def emulation():
    if not _cuda.emulated():
        pytest.skip("the kernels run on a GPU here")
    emulation = Emulation()
    yield emulation
    emulation.device(4)
    emulation.schedule(1, 0)
    emulation.count()
