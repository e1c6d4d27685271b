"""gpu-check without a GPU: its stages, what it writes, and that it goes on where it was."""

from __future__ import annotations

import json
import sys

import gpu_check
import pytest
import torch


@pytest.fixture
def three_stages(monkeypatch, tmp_path):
    """Stages that pass, fail and are left out, on a GPU that is said to be there."""

    def stage(name, code, **options):
        return gpu_check.Stage(name, "a test", [sys.executable, "-c", code], 1, **options)

    stages = (
        stage("passes", "print('fine')"),
        stage("fails", "raise SystemExit('broken')"),
        stage("absent", "", required=False, tool="no-such-tool"),
    )
    monkeypatch.setattr(gpu_check, "STAGES", stages)
    monkeypatch.setattr(gpu_check, "OUT", tmp_path)
    monkeypatch.setattr(gpu_check, "facts", lambda: {"gpu": "none"})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    return tmp_path


def test_result_and_summary(three_stages, capsys):
    assert gpu_check.main([]) == 1
    found = json.loads((three_stages / "result.json").read_text())["stages"]
    states = {name: one["state"] for name, one in found.items()}
    assert states == {"passes": "passed", "fails": "failed", "absent": "left out"}
    assert "broken" in found["fails"]["output"]
    summary = (three_stages / "summary.md").read_text()
    assert "| passes | passed |" in summary
    assert "no-such-tool is not installed" in summary
    assert "broken" in summary


def test_what_has_passed_is_not_run_again(three_stages, capsys):
    gpu_check.main([])
    capsys.readouterr()
    gpu_check.main([])
    assert "passes: passed before" in capsys.readouterr().out
    assert gpu_check.main(["--stage", "passes"]) == 0


def test_the_benchs_stages_are_one_run(three_stages, monkeypatch, capsys):
    """So that a report shows all of them; after a stop as well."""
    made, ran = gpu_check._bench("gpu-x"), []

    def run(command, **options):
        ran.append(command)
        return gpu_check.subprocess.CompletedProcess(command, len(ran) == 2)

    stages = tuple(gpu_check.Stage(name, "", made, 1) for name in ("a", "b"))
    monkeypatch.setattr(gpu_check, "STAGES", stages)
    monkeypatch.setattr(gpu_check.subprocess, "run", run)
    gpu_check.main([])
    gpu_check.main([])
    assert [command[: len(made)] for command in ran] == [made] * 3
    assert len({tuple(command[len(made) :]) for command in ran}) == 1
    assert ran[0][len(made)] == "--run"


def test_stages_are_short():
    assert all(stage.minutes < 10 for stage in gpu_check.STAGES)
    names = [stage.name for stage in gpu_check.STAGES]
    assert len(set(names)) == len(names)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a CUDA device is there")
def test_without_a_gpu_it_says_so(capsys):
    assert gpu_check.main([]) == 2
    assert "needs a CUDA device" in capsys.readouterr().out
