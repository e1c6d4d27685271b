"""The main job: training, resume, evaluation, Ctrl-C, and every refusal as one sentence with exit
code 2.
"""

import json

import pytest
import torch

from lam_kernels.training import loop
from lam_kernels.training.checkpoint import load_checkpoint
from lam_kernels.training.comparison import run_process
from lam_kernels.training.tasks import image_classification as task

pytest.importorskip("sklearn")
pytest.importorskip("safetensors")

RESUME = "train image-classification --no-pictures --resume"


def losses(folder):
    return load_checkpoint(folder / task.CHECKPOINT, task.TASK).history["loss"]


def test_all_variants_start_with_the_same_loss_and_learn(train, tmp_path):
    first = []
    for variant in task.VARIANTS:
        code, out, err = train("--epochs", 2, "--lr", "1e-2", "--out", tmp_path, variant=variant)
        assert code == 0
        assert "test accuracy" in out
        assert "epoch 2/2" in err
        history = losses(tmp_path / variant)
        assert len(history) == 12
        assert history[-1] < history[0]
        first.append(history[0])
    assert first == pytest.approx([first[0]] * 3, rel=1e-5)
    result = json.loads((tmp_path / "plain" / task.RESULT).read_text())
    assert result["seconds_per_step"] > 0
    assert result["peak_mib"] > 50


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_resume_gives_the_losses_of_an_uninterrupted_run(train, lam, tmp_path, dtype, monkeypatch):
    options = ("--epochs", 3, "--dropout", 0.1, "--dtype", dtype)
    assert train(*options, "--out", tmp_path / "whole")[0] == 0
    stop_after(monkeypatch, epochs=1)
    assert train(*options, "--out", tmp_path / "cut")[0] == 130
    monkeypatch.undo()
    path = tmp_path / "cut/lam-fused" / task.CHECKPOINT
    assert load_checkpoint(path, task.TASK).epoch == 1
    torch.manual_seed(12345)  # the checkpoint brings its own generator
    assert lam(RESUME, path)[0] == 0
    assert losses(path.parent) == losses(tmp_path / "whole/lam-fused")


def stop_after(monkeypatch, epochs):
    """Ctrl-C in the middle of the next epoch."""
    step, steps = torch.optim.AdamW.step, 6 * epochs + 3
    calls = []

    def interrupted(self, *args):
        calls.append(1)
        if len(calls) > steps:
            raise KeyboardInterrupt
        return step(self, *args)

    monkeypatch.setattr(torch.optim.AdamW, "step", interrupted)


def test_ctrl_c_keeps_the_last_checkpoint_and_says_how_to_resume(train, tmp_path, monkeypatch):
    stop_after(monkeypatch, epochs=2)
    code, _, err = train("--epochs", 4, "--out", tmp_path)
    path = tmp_path / "lam-fused" / task.CHECKPOINT
    assert code == 130
    assert f"checkpoint is {path} (epoch 2); resume with" in err
    assert f"--resume {path}" in err
    assert load_checkpoint(path, task.TASK).epoch == 2
    assert [p.name for p in path.parent.iterdir()] == [task.CHECKPOINT]


def test_ctrl_c_before_any_checkpoint(train, tmp_path, monkeypatch):
    stop_after(monkeypatch, epochs=0)
    code, _, err = train("--epochs", 4, "--out", tmp_path)
    assert code == 130
    assert "there is no checkpoint" in err
    assert list(tmp_path.rglob("*")) == []


def test_ctrl_c_while_writing_leaves_the_old_checkpoint(train, tmp_path, monkeypatch):
    import safetensors.torch

    save, calls = safetensors.torch.save_file, []

    def interrupted(tensors, path, metadata):
        save(tensors, path, metadata)
        calls.append(path)
        if len(calls) == 2:
            path.write_bytes(path.read_bytes()[:1000])
            raise KeyboardInterrupt

    monkeypatch.setattr(safetensors.torch, "save_file", interrupted)
    assert train("--epochs", 3, "--out", tmp_path)[0] == 130
    path = tmp_path / "lam-fused" / task.CHECKPOINT
    assert load_checkpoint(path, task.TASK).epoch == 1
    assert [p.name for p in path.parent.iterdir()] == [task.CHECKPOINT]


def test_evaluate_gives_the_accuracy_of_training(train, lam, tmp_path):
    assert train("--epochs", 2, "--lr", "1e-2", "--out", tmp_path)[0] == 0
    path = tmp_path / "lam-fused" / task.CHECKPOINT
    recorded = load_checkpoint(path, task.TASK).history["accuracy"][-1]
    code, out, _ = lam("evaluate image-classification --checkpoint", path)
    assert code == 0
    assert f"test accuracy {recorded:.4f}" in out
    assert f"recorded in training: {recorded:.4f}" in out


def test_pictures_and_scopes(lam, tmp_path):
    pytest.importorskip("matplotlib")
    for options in ("--fusion gate --mask-activation softplus --scope global", "--fusion add"):
        line = "train image-classification --variant lam-fused --width 16 --heads 2 --patch-size 4"
        run = ("--backend", "reference", "--epochs", 1, "--out", tmp_path)
        code, out, err = lam(f"{line} {options}", *run)
        assert code == 0, err
        assert "| lam-fused" in out
    names = {path.name for path in (tmp_path / "lam-fused").iterdir()}
    pictures = {"loss_curves.png", "learned_masks.png", "attention.png"}
    assert names == pictures | {task.CHECKPOINT, task.RESULT}
    for name in pictures:
        assert (tmp_path / "lam-fused" / name).read_bytes()[:4] == b"\x89PNG"


def test_comparison_runs_each_variant_apart_and_draws(lam, tmp_path, monkeypatch):
    """The processes are replaced by calls, which is what they do."""
    pytest.importorskip("matplotlib")
    ran = []

    def call(name, options):
        import lam_kernels.__main__ as command

        ran.append(options[options.index("--variant") + 1])
        return command.main(["train", task.TASK, *options])

    monkeypatch.setattr(task, "run_process", call)
    line = "train image-classification --width 16 --depth 1 --heads 2 --patch-size 2 --epochs 1"
    code, out, _ = lam(line, "--backend", "reference", "--out", tmp_path)
    assert code == 0
    assert tuple(ran) == task.VARIANTS
    for variant in task.VARIANTS:
        assert f"| {variant} " in out
    assert "x the speed of a step" in out
    assert {"results.md", "loss_curves.png", "learned_masks.png", "attention.png"} <= {
        path.name for path in tmp_path.iterdir()
    }


def test_comparison_stops_at_the_first_failure(lam, tmp_path, monkeypatch):
    monkeypatch.setattr(task, "run_process", lambda name, options: 130)
    code, out, _ = lam(
        "train image-classification --backend reference --no-pictures --out", tmp_path
    )
    assert code == 130
    assert "|" not in out
    assert list(tmp_path.iterdir()) == []


def test_a_process_of_its_own_really_runs(lam, tmp_path):
    options = (
        "--width 16 --depth 1 --heads 2 --patch-size 4 --epochs 1 --variant plain --in-comparison"
    )
    assert run_process(task.TASK, [*options.split(), "--out", str(tmp_path)]) == 0
    assert (tmp_path / "plain" / task.RESULT).exists()


@pytest.mark.parametrize(
    ("options", "part"),
    [
        (("--data", "nowhere/at/all"), "nowhere/at/all: there is no such folder"),
        (("--epochs", 0), "epochs must be"),
        (("--lr", "nan"), "lr must be"),
        (("--seed", -1), "seed must be"),
        (("--heads", 3), "heads must divide width"),
        (("--patch-size", 3), "patch_size must divide"),
        (("--fusion", "gate"), "activation must be one of"),
        (("--mask-activation", "sigmoid"), "init='identity'"),
        (("--mask-heads", 5), "mask_heads must be 1 or 2"),
        (("--mask-depth", 65), "mask_depth"),
        (("--image-size", 16), "go with --data"),
        (("--backend", "tpu"), "--backend must be one of"),
        (("--backend", "cuda"), "backend cuda cannot run"),
        (("--threads", 0), "--threads"),
        (("--threads", 10**20), "--threads"),
    ],
)
def test_bad_options_are_refused_before_anything_is_written(
    train, refused, tmp_path, options, part, monkeypatch
):
    monkeypatch.setattr("lam_kernels.ops._cuda.unavailable", lambda: "not here")
    refused(train("--out", tmp_path / "out", *options), part)
    assert not (tmp_path / "out").exists()


def test_a_diverging_run_is_one_sentence(train, refused, tmp_path, monkeypatch):
    monkeypatch.setattr(loop.nn.utils, "clip_grad_norm_", lambda *a: None)
    monkeypatch.setattr(task.F, "cross_entropy", lambda x, y: x.sum() * float("inf"))
    refused(train("--out", tmp_path), "smaller --lr")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_in_the_place_of_the_checkpoint_is_found_before_training(train, refused, tmp_path):
    (tmp_path / "lam-fused" / task.CHECKPOINT).mkdir(parents=True)
    refused(train("--epochs", 1, "--out", tmp_path), "choose another --out")


def test_an_output_folder_that_is_a_file(train, tmp_path):
    (tmp_path / "file").write_text("")
    code, _, err = train("--epochs", 1, "--out", tmp_path / "file")
    assert code == 2
    assert "file" in err.splitlines()[-1]


def test_resume_refuses_what_the_checkpoint_decides(train, lam, refused, tmp_path):
    assert train("--epochs", 1, "--out", tmp_path)[0] == 0
    path = tmp_path / "lam-fused" / task.CHECKPOINT
    refused(lam(f"{RESUME} {path} --lr 0.1"), "--lr cannot be given with --resume")
    refused(lam(f"{RESUME} {path}"), path, "epoch 1 of 1 is done already")
    assert lam(f"{RESUME} {path} --epochs 2")[0] == 0
    assert load_checkpoint(path, task.TASK).epoch == 2


def test_a_missing_package_is_named(train, refused, tmp_path, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "sklearn", None)
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    refused(train("--out", tmp_path / "out"), "pip install scikit-learn")
    assert not (tmp_path / "out").exists()
