"""The measured choice: off by default, of the table only, remembered, robust to its file."""

from __future__ import annotations

import json

import pytest
import torch
from problems import check

from lam_kernels.triton.configurations import Problem as Sizes
from lam_kernels.triton.configurations import entries
from python_ref.inputs import Problem

pytestmark = pytest.mark.backend("triton")
pytest.importorskip("triton")

SIZES = Sizes("forward", 2, 64, 1000, 1000, 8)
CPU = torch.device("cpu")


@pytest.fixture
def autotune(monkeypatch, tmp_path):
    from lam_kernels.triton import autotune

    monkeypatch.setenv("LAM_TRITON_AUTOTUNE", "1")
    monkeypatch.setenv("LAM_TRITON_AUTOTUNE_DIR", str(tmp_path))
    autotune._remembered.cache_clear()
    times = []

    def milliseconds(run):
        run()
        times.append(1.0 / (1 + len(times)))  # the later, the faster
        return times[-1]

    monkeypatch.setattr(autotune, "_milliseconds", milliseconds)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    yield autotune
    autotune._remembered.cache_clear()


def test_off_by_default(monkeypatch):
    from lam_kernels.triton import autotune

    monkeypatch.delenv("LAM_TRITON_AUTOTUNE", raising=False)
    assert not autotune.enabled()


def test_measures_once_and_remembers(autotune):
    ran = []
    assert autotune.choose(SIZES, CPU, ran.append) == entries(SIZES)[-1]
    assert ran == list(entries(SIZES))
    assert autotune.choose(SIZES._replace(Lq=1024), CPU, ran.append) == entries(SIZES)[-1]
    autotune._remembered.cache_clear()  # another process
    assert autotune.choose(SIZES, CPU, ran.append) == entries(SIZES)[-1]
    assert len(ran) == len(entries(SIZES))
    saved = json.loads(autotune.cache_file(CPU).read_text())
    assert saved == {"forward 2 64 1024 1024 8": list(entries(SIZES)[-1])}


@pytest.mark.parametrize(
    "text", ["", "{", "[1]", '{"forward 2 64 1024 1024 8": [1024, 1024, 64, 9]}', '{"x": {}}']
)
def test_a_file_that_says_nothing_useful_is_empty(text, autotune):
    file = autotune.cache_file(CPU)
    file.write_text(text)
    assert autotune.choose(SIZES, CPU, lambda _: None) in entries(SIZES)


def test_nothing_is_measured_while_a_graph_is_captured(autotune, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    ran = []
    assert autotune.choose(SIZES, CPU, ran.append) not in ran
    assert not autotune.cache_file(CPU).exists()


def test_results_stay_right(autotune):
    check(Problem(B=1, Lq=40, D=16, multiplier="11qk", dtype="bfloat16"), "triton")
