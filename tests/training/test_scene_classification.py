"""train, evaluate and analyse scene-classification on small shards in the form of YouTube-8M."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lam_kernels.data import tfrecord
from lam_kernels.data.youtube8m import Clip, encode_clip
from lam_kernels.nn import GlobalLocalAttention
from lam_kernels.training.checkpoint import load_checkpoint
from lam_kernels.training.distributed import Ranks
from lam_kernels.training.tasks import scene_classification
from lam_kernels.user_error import UserError

SIZES = "--classes 4 --visual-width 8 --audio-width 8 --heads 2 --max-len 12 --radius 2"
SMALL = f"{SIZES} --epochs 2 --batch-size 8 --no-pictures --backend reference"
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """Clips whose labels can be read off their features."""
    folder = tmp_path_factory.mktemp("shards")
    generator = torch.Generator().manual_seed(0)
    for shard in range(2):
        clips = []
        for n in range(20):
            length = 3 + n % 9
            labels = tuple(k for k in range(4) if (n + shard) >> k & 1)
            visual = torch.randint(0, 100, (length, 8), generator=generator, dtype=torch.uint8)
            visual[:, list(labels)] += 150
            audio = torch.randint(0, 256, (length, 8), generator=generator, dtype=torch.uint8)
            clips.append(Clip(f"{shard}-{n}", labels, visual, audio))
        tfrecord.write_records(folder / f"{shard}.tfrecord", map(encode_clip, clips))
    return str(folder / "*.tfrecord")


@pytest.fixture
def run(lam, shards, tmp_path):
    def call(*options, variant="share", data=shards):
        line = f"train scene-classification --variant {variant} {SMALL} --out {tmp_path / 'out'}"
        return lam(line, "--data", data, *options)

    return call


def checkpoint_of(tmp_path, variant="share"):
    return tmp_path / "out" / variant / "checkpoint.safetensors"


def losses(path):
    return load_checkpoint(path, "scene-classification").history["loss"]


@pytest.mark.parametrize("variant", ["global", "share", "gate_map", "gate_output"])
def test_trains_and_evaluates(run, lam, tmp_path, variant):
    code, out, err = run("--epochs", "12", "--lr", "0.02", variant=variant)
    assert code == 0, err
    assert "GAP@20" in out
    path = checkpoint_of(tmp_path, variant)
    history = losses(path)
    assert sum(history[-4:]) < 0.7 * sum(history[:4])
    code, out, err = lam(f"evaluate scene-classification --checkpoint {path}")
    assert code == 0, err
    measured = re.search(r"GAP@20 ([\d.]+), MAP", out)[1]
    assert f"recorded in training: GAP@20 {measured}" in out


def test_resumed_training_is_the_same(run, tmp_path):
    assert run("--epochs", "3")[0] == 0
    whole = losses(checkpoint_of(tmp_path))
    first = checkpoint_of(tmp_path)
    first.unlink()
    # the schedule depends on the number of epochs, so the run is stopped, not shortened
    from lam_kernels.training import loop

    original, seen = loop.Ranks.mean_loss, []

    def stop(self, loss_of, indices):
        seen.append(len(indices))
        if len(seen) == 2 * len(whole) // 3:
            raise KeyboardInterrupt
        return original(self, loss_of, indices)

    loop.Ranks.mean_loss = stop
    try:
        code, _, err = run("--epochs", "3")
    finally:
        loop.Ranks.mean_loss = original
    assert code == 130
    assert "resume with:" in err
    line = ["train", "scene-classification", "--resume", str(first), "--no-pictures"]
    import lam_kernels.__main__ as command

    assert command.main(line) == 0
    assert losses(first) == whole


def test_bf16(run):
    assert run("--dtype", "bf16")[0] == 0


@pytest.fixture
def damaged(shards, tmp_path):
    """The same clips but for the first one of the first shard, which cannot be read."""
    folder = tmp_path / "damaged"
    folder.mkdir()
    for source in Path(shards).parent.glob("*.tfrecord"):
        (folder / source.name).write_bytes(source.read_bytes())
    data = bytearray((folder / "0.tfrecord").read_bytes())
    data[60] ^= 1
    (folder / "0.tfrecord").write_bytes(data)
    return str(folder / "*.tfrecord")


def test_corrupt_records(run, damaged):
    code, out, err = run(data=damaged)
    assert code == 0, err
    assert out.count("skipped: ") == 1
    assert "0.tfrecord: record 0: the checksum of its content is wrong" in out
    assert "1 corrupt records in 1 files were skipped" in out
    code, _, err = run("--corrupt", "stop", data=damaged)
    assert code == 2
    assert "record 0: the checksum" in err


def test_a_corrupt_record_is_counted_once_also_without_a_test_of_its_own(run, shards, tmp_path):
    source = Path(shards).parent / "0.tfrecord"
    data = bytearray(source.read_bytes())
    data[60] ^= 1
    (tmp_path / "0.tfrecord").write_bytes(data)
    code, out, err = run(data=str(tmp_path / "*.tfrecord"))
    assert code == 0, err
    assert out.count("1 corrupt records in 1 files were skipped") == 1
    result = json.loads((tmp_path / "out" / "share" / "result.json").read_text())
    assert result["skipped"] == 1


def test_batches_and_data_without_a_readable_clip(run, lam, shards, tmp_path):
    """Batches of 1: one is lost. Another width: every record of the data is."""
    data = bytearray((Path(shards).parent / "0.tfrecord").read_bytes())
    data[60] ^= 1
    (tmp_path / "0.tfrecord").write_bytes(data)
    code, _, err = run("--batch-size", "1", "--epochs", "1", data=str(tmp_path / "0.tfrecord"))
    assert code == 0, err
    code, out, err = run("--visual-width", "16", "--epochs", "1")
    assert (code, err) == (2, f"lam_kernels: {shards}: no training clip can be read\n")
    assert "frame 0 of rgb has 8 bytes, expected 16" in out
    other = str(tmp_path / "other.tfrecord")
    tfrecord.write_records(other, [b"other"])
    line = f"evaluate scene-classification --checkpoint {checkpoint_of(tmp_path)}"
    code, _, err = lam(line, "--data", other)
    assert (code, err) == (2, f"lam_kernels: {other}: no test clip can be read\n")


def test_a_test_without_labels_is_refused(run, tmp_path, refused):
    """Nothing to measure by; a NaN in the checkpoint could not be read back."""
    frames = torch.zeros(3, 8, dtype=torch.uint8)
    tfrecord.write_records(tmp_path / "bare.tfrecord", [encode_clip(Clip("a", (), frames, frames))])
    bare = str(tmp_path / "bare.tfrecord")
    refused(run("--eval-data", bare), f"{bare}: none of 1 test clips has a label")


def test_refusals(run, lam, refused, tmp_path, shards):
    refused(run(data=str(tmp_path / "none*")), "no file matches")
    refused(run("--heads", "3"), "heads must divide visual_width")
    refused(run("--epochs", "0"), "epochs must be an integer")
    assert run()[0] == 0
    path = checkpoint_of(tmp_path)
    again = f"train scene-classification --no-pictures --resume {path}"
    refused(lam(again), "epoch 2 of 2 is done already")
    refused(lam(f"{again} --lr 1"), "--lr cannot be given with --resume")
    refused(lam(f"{again} --variant global"), "--variant cannot be given with --resume")
    refused(lam(f"{again} --out x"), "--out cannot be given with --resume")
    refused(lam(f"{again} --epochs 3 --eval-data none*"), "none*: no file matches")
    demo = "train scene-classification --no-pictures --eval-data x"
    refused(lam(demo), "--eval-data needs --data")
    other = f"evaluate image-classification --checkpoint {path}"
    refused(lam(other), "is of the task 'scene-classification'")


@pytest.fixture
def growing(shards, tmp_path):
    """(glob of a copy of the clips, what adds one more shard to it)"""
    folder = tmp_path / "growing"
    shutil.copytree(Path(shards).parent, folder)
    return str(folder / "*.tfrecord"), lambda: shutil.copy(
        folder / "0.tfrecord", folder / "2.tfrecord"
    )


def test_a_fifth_is_not_drawn_again_from_other_clips(run, lam, refused, tmp_path, shards, growing):
    """It would hold clips that were trained on."""
    data, grow = growing
    assert run("--epochs", "1", "--batch-size", "40", data=data)[0] == 0
    grow()
    path = checkpoint_of(tmp_path)
    changed = f"{data}: the clips changed, 60 are found and {path} was written with 40: give "
    command = f"evaluate scene-classification --checkpoint {path}"
    refused(lam(command), f"{changed}--data with clips that were not trained on")
    code, out, err = lam(command, "--data", shards)
    assert (code, "\n40 clips: " in out) == (0, True), err
    again = f"train scene-classification --no-pictures --epochs 2 --resume {path}"
    words = f"{changed}--eval-data with clips that were not trained on"
    refused(lam(again), words)
    refused(lam(again, "--data", data), words)
    code, _, err = lam(again, "--eval-data", shards)
    assert code == 0, err


def test_resuming_keeps_the_test_of_the_checkpoint(run, lam, refused, tmp_path, shards, growing):
    data, grow = growing
    path = checkpoint_of(tmp_path)

    def config():
        return load_checkpoint(path, "scene-classification").config

    assert run("--epochs", "1", "--batch-size", "40", "--eval-data", data)[0] == 0
    again = f"train scene-classification --no-pictures --resume {path} --epochs"
    one = shards.replace("*", "0")
    assert lam(f"{again} 2 --data {one}")[0] == 0
    assert (config()["data"], config()["train_clips"]) == (one, 20)
    assert (config()["eval_data"], config()["test_clips"]) == (data, 40)
    grow()
    changed = f"{data}: the clips changed, 60 are found and {path} was written with 40: give "
    refused(lam(f"evaluate scene-classification --checkpoint {path}"), f"{changed}--data")
    refused(lam(f"{again} 3"), f"{changed}--eval-data")
    assert lam(f"{again} 3 --eval-data {data} --data {data}")[0] == 0
    Path(data.replace("*", "1")).unlink()
    refused(lam(f"{again} 4 --eval-data {one}"), f"{data}: the clips changed, 40 are found", "60")


def test_counts_in_a_checkpoint_are_checked(run, tmp_path):
    assert run("--epochs", "1")[0] == 0
    checkpoint = load_checkpoint(checkpoint_of(tmp_path), "scene-classification")
    checkpoint.config["test_clips"] = "8"
    with pytest.raises(UserError, match=r"record config\.test_clips is '8', expected a number"):
        scene_classification._checked_run(checkpoint, None, False)


def test_clips_that_were_measured_are_counted(run, lam, tmp_path, damaged):
    assert run("--epochs", "1")[0] == 0
    line = f"evaluate scene-classification --checkpoint {checkpoint_of(tmp_path)}"
    code, out, err = lam(line, "--data", damaged)
    assert code == 0, err
    assert "\n39 clips: GAP@20 " in out


def test_nan_scores_are_not_measured(run, lam, tmp_path, shards, monkeypatch):
    assert run("--epochs", "1")[0] == 0
    nan = lambda self, visual, audio, frames: torch.full((len(visual), 4), torch.nan)  # noqa: E731
    monkeypatch.setattr(scene_classification.SceneClassifier, "forward", nan)
    line = f"evaluate scene-classification --checkpoint {checkpoint_of(tmp_path)}"
    code, _, err = lam(line)
    assert (code, err.count("\n")) == (2, 1)
    assert f"{shards}: the model's scores of test clips are NaN" in err


@pytest.mark.parametrize(
    "content", ["", "{", "[0]", '{"seed": 1}', pytest.param("[" * 10**5, id="deep")]
)
def test_the_demo_prepares_its_data_again(tmp_path, monkeypatch, content):
    written = []
    monkeypatch.setattr(
        "lam_kernels.data.scene_sequences.write_scene_shards",
        lambda folder, seed: written.append(seed) or ("train", "test"),
    )
    done = tmp_path / "data" / "complete.json"
    done.parent.mkdir()
    done.write_text(content)
    assert scene_classification._demo_data(tmp_path, 0) == ("train", "test")
    scene_classification._demo_data(tmp_path, 0)
    assert written == [0]
    assert json.loads(done.read_text()) == {"seed": 0}


def test_analyse_draws_and_prints(run, lam, tmp_path):
    pytest.importorskip("matplotlib")
    assert run(variant="gate_output")[0] == 0
    path = checkpoint_of(tmp_path, "gate_output")
    picture = tmp_path / "picture.png"
    line = f"analyse scene-classification --checkpoint {path} --norm sum --out {picture}"
    code, out, err = lam(line)
    assert code == 0, err
    assert "gate_output, visual: mean sensitivity 0." in out
    assert picture.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(("variant", "kinds"), [("global", 1), ("share", 2)])
def test_analyse_draws_the_maps_that_are_used(run, lam, tmp_path, monkeypatch, variant, kinds):
    """The baseline has no local attention; a head of "share" has one of both."""
    pytest.importorskip("matplotlib")
    assert run("--epochs", "1", variant=variant)[0] == 0
    drawn = {}
    monkeypatch.setattr(
        scene_classification.pictures, "draw_sensitivity",
        lambda path, profiles, curves: drawn.update(profiles),
    )  # fmt: skip
    whole, near = torch.rand(2, 1, 2, 3, 3)
    monkeypatch.setattr(GlobalLocalAttention, "attention_maps", lambda self, x: (whole, near))
    path = checkpoint_of(tmp_path, variant)
    code, _, err = lam(f"analyse scene-classification --checkpoint {path}")
    assert code == 0, err
    names = [
        f"{name}, {kind}" for name in ("visual", "audio") for kind in ("global", "local")[:kinds]
    ]
    assert list(drawn) == names
    heads = whole[0].mean(0) if variant == "global" else whole[0, 0]
    assert torch.equal(drawn["audio, global"], heads)
    if kinds == 2:
        assert torch.equal(drawn["audio, local"], near[0, 1])


def test_what_other_processes_skipped_is_counted(monkeypatch):
    ranks, found = Ranks(), {("a", 0): "cut"}
    ranks.world = 2

    def all_gather(into, own):
        into[:] = [dict(own), {("b", 3): "cut"}]

    monkeypatch.setattr(torch.distributed, "all_gather_object", all_gather)
    ranks.gather(found)
    assert found == {("a", 0): "cut", ("b", 3): "cut"}


@pytest.mark.parametrize("first", [True, False])
def test_a_broken_header_is_told_by_one_process(run, growing, monkeypatch, first):
    data, _ = growing
    path = Path(data.replace("*", "0"))
    path.write_bytes(path.read_bytes()[:-1])
    monkeypatch.setattr(Ranks, "first", first)
    code, out, err = run("--epochs", "1", data=data)
    assert code == 0, err
    assert out.count("record 19: the file ends within it") == int(first)


def test_two_processes_train_what_one_does(run, damaged, tmp_path):
    """torchrun, gloo: the losses of one process, to the rounding of a sum in another order. A batch
    with a record that cannot be read counts by those that can."""
    assert run(data=damaged)[0] == 0
    alone = losses(checkpoint_of(tmp_path))
    out = tmp_path / "two"
    line = f"train scene-classification --variant share {SMALL} --threads 1".split()
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
        "-m", "lam_kernels", *line, "--out", str(out), "--data", damaged,
    ]  # fmt: skip
    paths = [str(ROOT), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(p for p in paths if p), "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("| share") == 1  # one of them speaks
    together = losses(out / "share" / "checkpoint.safetensors")
    torch.testing.assert_close(torch.tensor(together), torch.tensor(alone), rtol=1e-4, atol=1e-5)
    result = json.loads((out / "share" / "result.json").read_text())
    assert result["skipped"] == 1
