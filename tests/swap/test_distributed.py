"""Two processes on gloo: gradients of our modules and of swapped models, and the documented
torchrun runs of the demos, are those of one process."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny_models import TINY

import lam_kernels.__main__ as command

ROOT = Path(__file__).resolve().parents[2]
WORKER = Path(__file__).with_name("distributed_worker.py")

# CLIP and CLAP mix the samples of a batch in what they return; DETR has only eager attention here,
# whose softmax is float32 in float64
MODELS = [name for name in TINY if name not in ("clip", "clap", "detr")]
RTOL = 1e-7  # torch.testing.assert_close's own for float64

pytestmark = pytest.mark.skipif(
    not torch.distributed.is_available(), reason="this torch has no torch.distributed"
)


def torchrun(*arguments: str) -> str:
    """stdout of a run in two processes."""
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    surroundings = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
         *map(str, arguments)],
        env=surroundings, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def differences():
    out = torchrun(WORKER, ",".join(MODELS))
    return json.loads(out.strip().splitlines()[-1])


@pytest.mark.parametrize("how", ["ddp", "fsdp"])
@pytest.mark.parametrize("scope", ["layer", "global"])
def test_lam_modules(differences, scope, how):
    assert differences[f"LAMEncoder {scope} {how}"] < RTOL


@pytest.mark.parametrize("how", ["ddp", "fsdp"])
@pytest.mark.parametrize("mask", ["plain", "layer", "global"])
def test_swapped_torch_modules(differences, mask, how):
    assert differences[f"nn.TransformerEncoder {mask} {how}"] < RTOL


def test_a_swap_after_ddp(differences):
    assert differences["nn.TransformerEncoder swapped after ddp"] < RTOL


@pytest.mark.parametrize("name", MODELS)
def test_swapped_transformers_models(differences, name):
    pytest.importorskip("transformers", reason="transformers is not installed")
    assert differences[f"{name} ddp"] < RTOL


@pytest.mark.parametrize("name", ["vit", "swin v2"])
def test_swapped_timm_models(differences, name):
    pytest.importorskip("timm_models", reason="timm is not installed")
    assert differences[f"timm {name} ddp"] < RTOL


def test_accelerate_works_unchanged(differences):
    pytest.importorskip("accelerate", reason="accelerate is not installed")
    assert differences["accelerate"] < RTOL


# ---- the documented runs


def losses(path: Path) -> torch.Tensor:
    found = json.loads(path.read_text())
    return torch.tensor(found.get("history", found)["loss"])


# DDP of a demo in an ordinary run: test_image_classification_in_two_processes
@pytest.mark.parametrize("parallel", ["fsdp", pytest.param("ddp", marks=pytest.mark.full)])
def test_swapped_digits_in_two_processes(parallel, tmp_path, capsys):
    pytest.importorskip("sklearn", reason="scikit-learn is not installed")
    options = ["train", "swapped-digits", "--epochs", "1", "--batch-size", "300"]
    assert command.main([*options, "--out", str(tmp_path / "one.json")]) == 0
    assert "learned mask (layer, mul)" in capsys.readouterr().out
    out = torchrun(
        "-m", "lam_kernels", *options, "--parallel", parallel, "--out", tmp_path / "two.json"
    )
    assert f"2 processes, {parallel}" in out
    assert out.count("2 attention modules fused") == 1  # one process speaks
    torch.testing.assert_close(losses(tmp_path / "two.json"), losses(tmp_path / "one.json"))


def test_image_classification_in_two_processes(tmp_path, capsys):
    pytest.importorskip("sklearn", reason="scikit-learn is not installed")
    pytest.importorskip("safetensors", reason="safetensors is not installed")
    options = (
        "train image-classification --variant lam-fused --epochs 1 --width 16 --depth 1 --heads 2 "
        "--patch-size 2 --batch-size 300 --no-pictures --out"
    )
    options = options.split()
    assert command.main([*options, str(tmp_path / "one")]) == 0
    capsys.readouterr()
    torchrun("-m", "lam_kernels", *options, tmp_path / "two")
    files = [tmp_path / count / "lam-fused" / "result.json" for count in ("two", "one")]
    torch.testing.assert_close(*map(losses, files))


def test_the_comparison_refuses_torchrun(monkeypatch, capsys):
    pytest.importorskip("safetensors", reason="safetensors is not installed")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert command.main(["train", "image-classification", "--no-pictures"]) == 2
    assert "under torchrun give --variant" in capsys.readouterr().err


def test_a_task_that_wraps_nothing_refuses_torchrun(monkeypatch):
    """Processes that share batches without sharing gradients would train different models."""
    from lam_kernels.training.loop import LoopOptions, fit, make_optimizer, new_history
    from lam_kernels.user_error import UserError

    model, options = torch.nn.Linear(2, 2), LoopOptions(epochs=1, batch_size=2, lr=0.1)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="under torchrun only image-classification"):
        fit(
            model, make_optimizer(model, options), options, count=2, loss_of=None,
            history=new_history(), first_epoch=0, label="", device="cpu", after_epoch=None,
        )  # fmt: skip


def test_shares_of_a_batch_add_up(monkeypatch):
    """Weights make the mean over processes the mean over samples, also of a last short batch and
    where some samples cannot be read."""
    from lam_kernels.training.distributed import Ranks

    values = torch.arange(7.0)
    monkeypatch.setattr(Ranks, "__init__", lambda self: None)
    for count, unreadable in (
        (7, ()),
        (3, ()),
        (1, ()),
        (7, (1, 2, 3)),
        (7, (0, 3, 6)),
        (2, (0, 1)),
    ):

        def loss_of(indices, unreadable=unreadable):
            read = [n for n in indices.tolist() if n not in unreadable]
            return (values[read].mean() if read else torch.tensor(5.0)), len(read)

        readable = [n for n in range(count) if n not in unreadable]
        monkeypatch.setattr(Ranks, "mean", lambda self, _, ids=readable: len(ids) / self.world)
        total = 0.0
        for rank in range(3):
            ranks = Ranks()
            ranks.rank, ranks.world = rank, 3
            total += float(ranks.mean_loss(loss_of, torch.arange(count))) / 3
        assert total == pytest.approx(float(values[readable].mean()) if readable else 0.0)
