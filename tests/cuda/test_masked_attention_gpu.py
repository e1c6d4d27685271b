"""The kernels on a GPU, against float64: run_on_gpu.py in a process without the emulation."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from compile import ROOT


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_cases(dtype):
    if not torch.cuda.is_available():
        pytest.skip("no GPU: the cases run emulated, in tests/ops")
    command = [sys.executable, str(ROOT / "tests" / "cuda" / "run_on_gpu.py"), dtype]
    env = {**os.environ, "LAM_EMULATE_CUDA": "0"}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-3000:]
