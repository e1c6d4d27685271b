"""Who serves a call: limits of the CUDA kernels, the measured table, what explain() says."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from compile import ROOT

import lam_kernels
from lam_kernels.ops import _backends, _cuda, _native
from lam_kernels.ops._sources import emulation_stamp
from lam_kernels.ops.masked_attention import KERNELS
from lam_kernels.patterns import Segments, Toeplitz


def operands(Lk=33, D=16, Dv=16, H=2, dtype=torch.float32):
    query = torch.randn(1, H, 20, D, dtype=dtype)
    key, value = torch.randn(1, H, Lk, D, dtype=dtype), torch.randn(1, H, Lk, Dv, dtype=dtype)
    return query, key, value


def reasons(*tensors, **keywords) -> str:
    found = lam_kernels.explain("masked_attention", *tensors, backend="cuda", **keywords)
    return "; ".join(found.reasons["cuda"])


def test_limits_are_those_of_the_kernels():
    text = (ROOT / "csrc" / "cuda" / "masked_attention.h").read_text()
    for name, value in (
        ("kMaxKeys", _cuda.MAX_KEYS),
        ("kMaxHeadDim", _cuda.MAX_HEAD_DIM),
        ("kMaxSpecs", _cuda.MAX_PATTERNS),
        ("kMaxPatternHeads", _cuda.MAX_PATTERN_HEADS),
        ("kMaxSegments", _cuda.MAX_SEGMENTS),
    ):
        assert re.search(rf"\b{name} = {value};", text), name


def test_each_limit_is_named():
    assert "at most 320 keys, there are 321" in reasons(*operands(Lk=321))
    assert "head dims of at most 128, these are 136 and 16" in reasons(*operands(D=136))
    assert "has no float64" in reasons(*operands(dtype=torch.float64))
    each = [Toeplitz(radius) for radius in range(17)]
    assert "at most 16 different patterns" in reasons(*operands(H=17), pattern=each)
    assert reasons(*operands(H=17), pattern=[Toeplitz(k % 16) for k in range(17)]).count("16") == 0
    ids = [torch.zeros(1, 20), torch.zeros(1, 33)]
    many = [Segments(*(n + t.long() for t in ids)) for n in range(5)]
    assert "at most 4 different Segments, there are 5" in reasons(*operands(H=5), pattern=many)


@pytest.mark.backend("cuda")
@pytest.mark.parametrize("arguments", [{"Lk": 321}, {"Dv": 129}])
def test_a_named_backend_never_falls_back(arguments):
    with pytest.raises(RuntimeError, match='backend="cuda" cannot serve this call: serves'):
        lam_kernels.masked_attention(*operands(**arguments), backend="cuda")


@pytest.mark.backend("cuda")
def test_private_op_refuses_what_it_cannot_take():
    query, key, value = operands(Lk=321)
    op = torch.ops.lam_kernels.masked_attention_cuda_fwd
    with pytest.raises(RuntimeError, match="at most 320 keys"):
        op(query, key, value, *[None] * 8, [], None, [], 1.0, 0.0, False)


def test_without_gpu_and_emulation_backends_says_why():
    code = "import lam_kernels; print(lam_kernels.backends()['cuda'])"
    env = {name: value for name, value in os.environ.items() if name != "LAM_EMULATE_CUDA"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=env, cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    if not torch.cuda.is_available():
        assert re.search(r"not built \(.*not a CUDA build|torch sees no GPU", done.stdout)


@pytest.mark.backend("cuda")
def test_emulated_kernels_of_other_sources_are_refused(monkeypatch):
    if not _cuda.emulated():
        pytest.skip("the kernels run on a GPU here")
    library = _native._PACKAGE / f"_cuda_emulation{_native._SUFFIX}"
    assert _cuda._stale(library) == ""
    monkeypatch.setattr(_cuda, "emulation_stamp", lambda root: "another")
    assert "its sources in csrc differ: run `make emulation`" in _cuda._stale(library)
    monkeypatch.setattr(_cuda, "emulation_stamp", lambda root: "")  # installed, without sources
    assert _cuda._stale(library) == ""


def test_the_stamp_changes_with_every_source(tmp_path):
    assert emulation_stamp(tmp_path) == ""
    shutil.copytree(ROOT / "csrc", tmp_path / "csrc")
    before = emulation_stamp(tmp_path)
    assert before == emulation_stamp(ROOT)
    for name in ("lam.h", "cuda/plan.cpp", "emulation/fibers.h", "bind_cuda.h"):
        (tmp_path / "csrc" / name).write_text("other")
        before, last = emulation_stamp(tmp_path), before
        assert before != last, name


def on_gpu(monkeypatch):
    """The choice for CUDA tensors, as a machine with both GPU backends would make it."""
    monkeypatch.setattr(_backends, "unavailable", lambda name: "")
    monkeypatch.setattr(_backends._cuda, "refuses", lambda device: "")
    monkeypatch.setattr(_backends.availability, "refuses", lambda device: "")
    service = _backends.Service(lambda: None)
    monkeypatch.setitem(KERNELS.table, "triton", service)
    monkeypatch.setattr(_cuda, "_gpu", lambda index: "Some GPU")
    fake = [
        SimpleNamespace(shape=t.shape, dtype=t.dtype, device=torch.device("cuda", 0))
        for t in operands()
    ]
    return (*fake, *[None] * 8, (), None, (), 1.0, 0.0, False)


def test_default_and_measured_choice(monkeypatch):
    arguments = on_gpu(monkeypatch)
    assert KERNELS.choose(None, arguments) == "cuda"  # nothing measured: the documented default
    row = _cuda.Measured("Some GPU", (torch.float32,), 64, 64, "triton")
    monkeypatch.setattr(_cuda, "MEASURED", (row,))
    assert KERNELS.choose(None, arguments) == "triton"
    explained = KERNELS.explanation(None, arguments, ())
    assert explained.backend == "triton"
    assert explained.reasons["cuda"] == ("triton was measured to be faster on Some GPU",)
    assert KERNELS.choose("cuda", arguments) == "cuda"  # named
    monkeypatch.setattr(_cuda, "MEASURED", (row._replace(most_keys=32),))
    assert KERNELS.choose(None, arguments) == "cuda"
    monkeypatch.setattr(_cuda, "MEASURED", (row._replace(gpu="Another"),))
    assert KERNELS.choose(None, arguments) == "cuda"
