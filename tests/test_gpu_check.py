"""gpu-check without a GPU: its stages, what it writes, and that it goes on where it was."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import gpu_check
import pytest
import torch


def stage(name: str, code: str, *words: str, minutes: float = 1, **options) -> gpu_check.Stage:
    """A stage that runs some Python; `words` follow on its command line."""
    return gpu_check.Stage(name, "a test", [sys.executable, "-c", code, *words], minutes, **options)


@pytest.fixture
def stages(monkeypatch, tmp_path):
    """Stages of a test's own, on a GPU that is said to be there."""

    def use(*these: gpu_check.Stage):
        monkeypatch.setattr(gpu_check, "STAGES", these)
        return tmp_path

    monkeypatch.setattr(gpu_check, "OUT", tmp_path)
    monkeypatch.setattr(gpu_check, "facts", lambda: {"gpu": "none", "compute capability": "9.0"})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    return use


THREE = (
    stage("passes", "print('fine')"),
    stage("fails", "raise SystemExit('broken')"),
    stage("absent", "", required=False, tool="no-such-tool"),
)


def found_in(folder) -> dict:
    return json.loads((folder / "result.json").read_text())["stages"]


def test_result_and_summary(stages, capsys):
    folder = stages(*THREE)
    assert gpu_check.main([]) == 1
    found = found_in(folder)
    states = {name: one["state"] for name, one in found.items()}
    assert states == {"passes": "passed", "fails": "failed", "absent": "left out"}
    assert "broken" in found["fails"]["output"]
    summary = (folder / "summary.md").read_text()
    assert "| passes | passed |" in summary
    assert "no-such-tool is not installed" in summary
    assert "broken" in summary


def test_what_has_passed_is_not_run_again(stages, capsys):
    stages(*THREE, stage("makes something", "", always=True))
    gpu_check.main([])
    capsys.readouterr()
    gpu_check.main([])
    printed = capsys.readouterr().out
    assert "passes: passed before" in printed
    assert "makes something: passed before" not in printed
    assert gpu_check.main(["--stage", "passes"]) == 0


@pytest.mark.parametrize(
    "text", ["", "[]", '{"sources": "same"}', '{"sources": "same", "stages": 1}']
)
def test_a_result_file_that_says_nothing_useful_is_empty(text, stages):
    (stages() / "result.json").write_text(text)
    assert gpu_check.load("same") == ({}, "")


def test_another_gpu_starts_anew():
    assert gpu_check.sources("one") == gpu_check.sources("one") != gpu_check.sources("another")


def test_tests_that_were_all_skipped_have_not_passed(stages):
    folder = stages(
        stage("skipped", "print('5 skipped in 1s')", "pytest"),
        stage("some", "print('2 passed, 5 skipped in 1s')", "pytest"),
    )
    gpu_check.main([])
    found = found_in(folder)
    assert (found["skipped"]["state"], found["skipped"]["why"]) == (
        "failed", "every test was skipped",
    )  # fmt: skip
    assert found["some"]["state"] == "passed"


def _ended(pid: int) -> bool:
    try:
        return " Z " in Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return True


def test_a_stage_that_takes_too_long_leaves_nothing_running(stages, tmp_path):
    """What it has started ends with it: the GPU is free for the next stage."""
    child = "import os, time; print(os.getpid(), flush=True); time.sleep(60)"
    code = f"import subprocess, sys; subprocess.run([sys.executable, '-S', '-c', {child!r}])"
    stages(stage("long", code, minutes=0.03))
    gpu_check.main([])
    found = found_in(tmp_path)["long"]
    assert (found["state"], found["why"]) == ("failed", "longer than 0.03 minutes")
    pid = int(found["output"])
    for _ in range(100):  # until whoever inherited it has taken note
        if _ended(pid):
            break
        time.sleep(0.05)
    else:
        pytest.fail(f"process {pid} is still there")


def test_kernels_run_on_the_gpu(stages, monkeypatch, tmp_path):
    """Not interpreted and not emulated, whatever the caller's environment says."""
    for name in ("TRITON_INTERPRET", "LAM_EMULATE_CUDA"):
        monkeypatch.setenv(name, "1")
    monkeypatch.delenv("TORCH_CUDA_ARCH_LIST", raising=False)
    names = ("TRITON_INTERPRET", "LAM_EMULATE_CUDA", "TORCH_CUDA_ARCH_LIST")
    stages(stage("prints", f"import os; print([os.environ.get(n) for n in {names}])"))
    gpu_check.main([])
    assert found_in(tmp_path)["prints"]["output"].strip() == "[None, '0', '9.0']"


def test_targets_of_the_benchmark_are_in_the_summary(stages):
    lines = """
gpu-W1  bf16 both  B32 H12 L50 D64  [default allocator, 2 threads]
  ours                   0.020 ms (0.019 .. 0.021)  7 samples
  flex                   0.090 ms (0.089 .. 0.091)  7 samples  ours/this 0.22  target 0.3333 reached
"""
    folder = stages(stage("bench", f"print({lines!r})", "bench"))
    gpu_check.main([])
    assert "- gpu-W1 bf16 both: flex 0.090 ms" in (folder / "summary.md").read_text()


def test_the_benchs_stages_are_one_run(stages, tmp_path):
    """So that a report shows all of them; after a stop as well."""
    code = "import sys; print(sys.argv[-2:]); sys.exit({})"
    stages(stage("a", code.format(0), "bench"), stage("b", code.format(1), "bench"))
    gpu_check.main([])
    first = {name: one["output"] for name, one in found_in(tmp_path).items()}
    gpu_check.main([])
    again = {name: one["output"] for name, one in found_in(tmp_path).items()}
    assert first == again
    assert first["a"] == first["b"]
    assert "--run" in first["a"]


def test_stages_are_short_and_build_before_they_need_it():
    assert all(one.minutes < 10 for one in gpu_check.STAGES)
    names = [one.name for one in gpu_check.STAGES]
    assert len(set(names)) == len(names)
    assert names.index("build") < min(names.index("cuda"), names.index("cuda kernels"))
    assert names[0] == "ptx"


@pytest.mark.skipif(torch.cuda.is_available(), reason="a CUDA device is there")
def test_without_a_gpu_it_says_so(capsys):
    assert gpu_check.main([]) == 2
    assert "needs a CUDA device" in capsys.readouterr().out
