"""Files that are not checkpoints, or no longer: one sentence that names the file and the record,
exit code 2.
"""

import json
import pickle

import pytest
import torch

from lam_kernels.training.atomic_write import atomic_write
from lam_kernels.training.tasks import image_classification as task

pytest.importorskip("sklearn")
safetensors = pytest.importorskip("safetensors")
safetensors_torch = pytest.importorskip("safetensors.torch")


NO_HISTORY = {"loss": [], "step_seconds": [], "full_batch": [], "accuracy": []}


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    import lam_kernels.__main__ as command

    out = tmp_path_factory.mktemp("run")
    model = "--backend reference --width 16 --depth 1 --heads 2 --patch-size 4 --no-pictures"
    line = f"train {task.TASK} --variant lam-fused --epochs 1 {model} --out {out}"
    assert command.main(line.split()) == 0
    return out / "lam-fused" / task.CHECKPOINT


@pytest.fixture
def altered(good, tmp_path):
    """altered(change) writes a copy of the good checkpoint after change(tensors, metadata)."""

    def make(change):
        with safetensors.safe_open(good, "pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            metadata = file.metadata()
        change(tensors, metadata)
        path = tmp_path / "altered.safetensors"
        safetensors_torch.save_file(tensors, path, metadata)
        return path

    return make


def both_commands(lam, path):
    yield lam("evaluate image-classification --checkpoint", path)
    yield lam("train image-classification --no-pictures --epochs 3 --resume", path)


class Harmful:
    ran = False

    def __reduce__(self):
        return (setattr, (Harmful, "ran", True))


def test_pickles_are_refused_and_never_run(lam, refused, tmp_path):
    torch.save({"model": Harmful()}, tmp_path / "zip.pt")
    (tmp_path / "plain.pkl").write_bytes(pickle.dumps(Harmful()))
    for name in ("zip.pt", "plain.pkl"):
        for result in both_commands(lam, tmp_path / name):
            refused(result, tmp_path / name, "pickle")
    assert not Harmful.ran


def test_files_that_are_no_checkpoint(lam, refused, tmp_path):
    for name, content in (("empty", b""), ("text", b"hello, this is text"), ("zeros", bytes(100))):
        (tmp_path / name).write_bytes(content)
        for result in both_commands(lam, tmp_path / name):
            refused(result, tmp_path / name, "not a safetensors checkpoint")
    refused(
        lam("evaluate image-classification --checkpoint", tmp_path / "none"), "no such checkpoint"
    )
    refused(lam("evaluate image-classification --checkpoint", tmp_path), "folder")
    safetensors_torch.save_file({"a": torch.zeros(3)}, tmp_path / "other")
    refused(
        lam("evaluate image-classification --checkpoint", tmp_path / "other"), "of this package"
    )


@pytest.mark.parametrize("share", [0.001, 0.01, 0.5, 0.999])
def test_truncated_files(lam, refused, good, tmp_path, share):
    content = good.read_bytes()
    path = tmp_path / "cut.safetensors"
    path.write_bytes(content[: max(9, int(len(content) * share))])
    for result in both_commands(lam, path):
        refused(result, path, "truncated")


def test_a_damaged_header(lam, refused, good, tmp_path):
    content = bytearray(good.read_bytes())
    content[40:44] = b"\xff\xff\xff\xff"
    path = tmp_path / "damaged.safetensors"
    path.write_bytes(content)
    for result in both_commands(lam, path):
        refused(result, path, "damaged")


WEIGHT = "model/encoder.layers.0.attention.lam.layers.0.weight"


def config(record, value):
    def change(tensors, metadata):
        parts = json.loads(metadata["config"])
        *parents, last = record.split(".")
        inner = parts
        for parent in parents:
            inner = inner[parent]
        inner[last] = value
        metadata["config"] = json.dumps(parts)

    return change


@pytest.mark.parametrize(
    ("change", "part"),
    [
        (lambda t, m: m.update(version="2"), "format version '2'"),
        (lambda t, m: m.update(task="scene-classification"), "of the task 'scene-classification'"),
        (lambda t, m: m.update(epoch="-1"), "record epoch"),
        (lambda t, m: m.update(config="[1"), "record config is not"),
        (lambda t, m: m.update(config="[" * 100_000), "record config is not"),
        (lambda t, m: m.pop("history"), "record history is not"),
        (lambda t, m: t.pop(WEIGHT), f"record {WEIGHT} is missing"),
        (lambda t, m: t.update({"model/extra": torch.zeros(1)}), "model/extra does not belong"),
        (lambda t, m: t.update({WEIGHT: torch.zeros(3)}), f"record {WEIGHT} is torch.float32 [3]"),
        (lambda t, m: t.update({WEIGHT: t[WEIGHT].double()}), f"record {WEIGHT} is torch.float64"),
        (lambda t, m: t.update({WEIGHT: t[WEIGHT] * torch.nan}), f"record {WEIGHT} holds NaN"),
        (config("model.width", 32), "expected torch.float32"),
        (config("model.width", 10**9), "config.model is not valid (width"),
        (config("model.depth", 40), "is missing"),
        (config("model.depth", "many"), "config.model is not valid (depth"),
        (config("model.surprise", 1), "config.model is not valid"),
        (config("model", None), "config.model is not valid"),
        (config("model.fusion", "gate"), "config.model is not valid"),
        (config("model.attention", "plain"), "does not go with"),
        (config("loop.lr", "fast"), "config.loop is not valid (lr"),
        (config("variant", "huge"), "config.variant"),
        (config("split_seed", None), "config.split_seed"),
        (config("classes", ["a", "b"]), "10 classes, but 2"),
        (config("classes", list("abcdefghij")), "classes are not those"),
    ],
)
def test_altered_files_are_named_with_the_record(lam, refused, altered, change, part):
    path = altered(change)
    for result in both_commands(lam, path):
        refused(result, path, part)


@pytest.mark.parametrize(
    ("change", "part"),
    [
        (lambda t, m: t.pop("rng/torch"), "record rng/torch is missing"),
        (
            lambda t, m: t.update({"rng/torch": t["rng/torch"][:9].clone()}),
            "rng/torch is torch.uint8 [9]",
        ),
        (lambda t, m: t.pop("optimizer/position/exp_avg"), "optimizer/position/*"),
        (lambda t, m: t.update({"optimizer/none/step": torch.zeros(())}), "optimizer/none/step"),
        (lambda t, m: t.update({"optimizer/position/step": torch.zeros(2)}), "position/step is"),
        (lambda t, m: m.update(history='{"loss": ["x"]}'), "history.loss"),
        (lambda t, m: m.update(history=json.dumps({**NO_HISTORY, "loss": [1.0]})), "in length"),
        (config("train_images", 3), "trained on 3"),
    ],
)
def test_what_only_resume_needs(lam, refused, altered, change, part):
    path = altered(change)
    refused(lam("train image-classification --no-pictures --epochs 3 --resume", path), path, part)
    assert sorted(p.name for p in path.parent.iterdir()) == [path.name]


def test_atomic_write_is_all_or_nothing(tmp_path):
    path = tmp_path / "deep" / "file.txt"
    atomic_write(path, "one")

    def fails(part):
        part.write_text("half")
        raise RuntimeError

    with pytest.raises(RuntimeError):
        atomic_write(path, fails)
    assert path.read_text() == "one"
    assert list(path.parent.iterdir()) == [path]
    atomic_write(path, b"two")
    assert path.read_text() == "two"
