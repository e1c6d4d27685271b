"""info, help, and the pieces that every training command shares."""

import os
import subprocess
import sys

import pytest
import torch

import lam_kernels
import lam_kernels.__main__ as command
from lam_kernels.training.text_table import text_table


def test_info_names_versions_and_every_backend(lam):
    code, out, _ = lam("info")
    assert code == 0
    for part in (lam_kernels.__version__, torch.__version__, *lam_kernels.backends()):
        assert part in out


@pytest.mark.parametrize("line", ["--help", "train image-classification --help", "evaluate --help"])
def test_help_teaches(line, capsys):
    with pytest.raises(SystemExit) as stop:
        command.main(line.split())
    assert stop.value.code == 0
    out = capsys.readouterr().out
    assert "image-classification" in out
    if not line.startswith("evaluate"):
        assert "examples:" in out


@pytest.mark.parametrize("line", ["", "train", "train nothing", "evaluate image-classification"])
def test_wrong_commands_end_with_2(line, capsys):
    with pytest.raises(SystemExit) as stop:
        command.main(line.split())
    assert stop.value.code == 2
    assert capsys.readouterr().err


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="the system has no /dev/full")
def test_a_full_disk_behind_standard_output_is_one_sentence():
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "lam_kernels", "info"],
            stdout=full, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
    assert done.returncode == 2
    assert done.stderr == "lam_kernels: standard output: No space left on device\n"


def test_nothing_optional_is_imported_for_help():
    program = (
        "import sys, lam_kernels.nn, lam_kernels.swap, lam_kernels.__main__ as m; m._parser();"
        "names = ('sklearn', 'matplotlib', 'PIL', 'safetensors', 'transformers', 'peft', 'timm');"
        "print([n for n in names if n in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert result.stdout.strip() == "[]", result.stderr


def test_text_table():
    table = text_table(["name", "n"], [["a", "1"], ["longer", "22"]])
    assert table.splitlines() == [
        "| name   |   n |",
        "| ------ | --: |",
        "| a      |   1 |",
        "| longer |  22 |",
    ]


def test_peak_memory_sees_what_was_freed_again():
    """In a process of its own: in an old one the block may come from memory that is resident."""
    program = (
        "import time, torch\n"
        "from lam_kernels.training.peak_memory import PeakMemory\n"
        "memory = PeakMemory()\n"
        "block = torch.ones(16 * 2**20)\n"  # 64 MiB
        "time.sleep(0.01)\n"
        "del block\n"
        "print(memory.resettable, memory.above_start_mib)\n"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    resettable, above_start_mib = result.stdout.split()
    if resettable != "True":
        pytest.skip("the high-water mark cannot be reset here")
    assert 60 < float(above_start_mib) < 120
