"""Peak memory of this process, measured by the kernel (or by the CUDA allocator)."""

from __future__ import annotations

import sys
from pathlib import Path

import torch

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


class PeakMemory:
    """Highest resident size since construction.

    On Linux the high-water mark VmHWM is reset through /proc/self/clear_refs, so that `peak_mib` is
    the peak since construction and `above_start_mib` what came on top of the size at that moment.
    Where it cannot be reset, it is the peak since the process began (`resettable` is False), and
    for CUDA it is the allocator's own maximum.
    """

    def __init__(self, device: torch.device | str = "cpu"):
        self.device = torch.device(device)
        self.resettable = True
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
            self._start = torch.cuda.memory_allocated(self.device) / 2**20
            return
        try:
            _CLEAR.write_text("5")
        except OSError:
            self.resettable = False
        self._start = _status_mib("VmRSS")

    @property
    def peak_mib(self) -> float:
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device) / 2**20
        return _status_mib("VmHWM")

    @property
    def above_start_mib(self) -> float:
        return max(0.0, self.peak_mib - self._start)


def _status_mib(field: str) -> float:
    try:
        for line in _STATUS.read_text().splitlines():
            if line.startswith(field + ":"):
                return int(line.split()[1]) / 1024
    except OSError:
        pass
    import resource  # not Linux: only the peak since the process began is known

    unit = 2**20 if sys.platform == "darwin" else 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit
