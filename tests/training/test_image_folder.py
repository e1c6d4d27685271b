"""Folders of images: what is read, how it is split, and each refusal with the path in one
sentence.
"""

import struct
import zlib

import pytest
import torch

from lam_kernels.data import image_folder, load_image_folder, split_by_class
from lam_kernels.user_error import UserError

image_module = pytest.importorskip("PIL.Image")


def picture(path, shade, size=(12, 10), mode="RGB"):
    path.parent.mkdir(parents=True, exist_ok=True)
    colour = shade if mode == "L" else (shade,) * len(mode)
    image_module.new(mode, size, colour).save(path)


@pytest.fixture
def tree(tmp_path):
    """Two classes of ten images, dark and bright, in several formats."""
    for i in range(10):
        suffix = (".png", ".jpg", ".bmp", ".gif", ".webp")[i % 5]
        picture(tmp_path / "data" / "dark" / f"{i}{suffix}", 20 + i)
        picture(tmp_path / "data" / "light" / "deeper" / f"{i}{suffix}", 220 + i)
    (tmp_path / "data" / "dark" / "notes.txt").write_text("not an image")
    (tmp_path / "data" / ".hidden").mkdir()
    return tmp_path / "data"


def test_one_tree_is_split_by_class_and_seed(tree):
    train, test = load_image_folder(tree, 4, 1, split_seed=3)
    assert train.classes == ("dark", "light")
    assert (len(train), len(test)) == (16, 4)
    assert test.labels.tolist() == [0, 0, 1, 1]
    images, labels = train.batch(torch.arange(16))
    assert images.shape == (16, 1, 4, 4)
    assert images.dtype == torch.float32
    assert bool(((images.mean(dim=(1, 2, 3)) > 0) == (labels == 1)).all())
    again, _ = load_image_folder(tree, 4, 1, split_seed=3)
    assert torch.equal(again.pixels, train.pixels)


def test_a_large_set_is_read_batch_by_batch_with_the_same_result(tree, monkeypatch):
    kept, _ = load_image_folder(tree, 4, 3)
    monkeypatch.setattr(image_folder, "IN_MEMORY_BYTES", 0)
    read, _ = load_image_folder(tree, 4, 3)
    assert read.pixels is None
    indices = torch.tensor([3, 0, 9])
    assert torch.equal(read.batch(indices)[0], kept.batch(indices)[0])


def test_train_and_val_folders(tmp_path):
    for part, names in (("train", "abc"), ("val", "ac")):
        for name in names:
            picture(tmp_path / part / name / "1.png", 10)
    train, test = load_image_folder(tmp_path, 4, 1)
    assert train.classes == ("a", "b", "c")
    assert test.labels.tolist() == [0, 2]
    picture(tmp_path / "val" / "z" / "1.png", 10)
    with pytest.raises(UserError, match=r"val/z: .*no such class"):
        load_image_folder(tmp_path, 4, 1)


def test_training_on_a_folder_and_evaluating_on_it(tree, lam, tmp_path):
    line = "train image-classification --variant plain --width 16 --heads 2 --depth 1 --epochs 8"
    options = "--lr 0.02 --image-size 8 --patch-size 4 --channels 3 --batch-size 8 --no-pictures"
    code, out, err = lam(f"{line} {options} --data {tree} --out {tmp_path / 'out'}")
    assert code == 0, err
    assert "100.0%" in out
    checkpoint = tmp_path / "out" / "plain" / "checkpoint.safetensors"
    code, out, _ = lam(f"evaluate image-classification --checkpoint {checkpoint}")
    assert code == 0
    assert "4 of 4 images" in out
    code, out, _ = lam(f"evaluate image-classification --checkpoint {checkpoint} --data {tree}")
    assert code == 0
    assert "4 of 4 images" in out


def bomb(path):
    """A PNG whose header claims 60000 x 60000 pixels."""
    header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 0, 0, 0, 0)
    data = b"\x89PNG\r\n\x1a\n"
    for kind, body in ((b"IHDR", header), (b"IDAT", zlib.compress(bytes(1000)))):
        data += (
            struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        )
    path.write_bytes(data)


def cut(path):
    picture(path, 99, size=(60, 60))
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.mark.parametrize(
    ("name", "spoil"),
    [
        ("text.png", lambda path: path.write_text("no image")),
        ("empty.jpg", lambda path: path.write_bytes(b"")),
        ("cut.jpg", cut),
        ("bomb.png", bomb),
        ("other.png", lambda path: image_module.new("L", (4, 4)).save(path, format="TIFF")),
    ],
)
def test_broken_images_are_named_and_nothing_is_written(tree, lam, refused, tmp_path, name, spoil):
    spoil(tree / "dark" / name)
    line = f"train image-classification --variant plain --image-size 8 --data {tree} --no-pictures"
    refused(lam(f"{line} --out {tmp_path / 'out'}"), tree / "dark" / name)
    assert not (tmp_path / "out").exists()


def test_folders_that_are_no_data_set(tree, tmp_path, refused, lam):
    def message(path, **options):
        with pytest.raises(UserError) as error:
            load_image_folder(path, 4, options.get("channels", 1))
        return str(error.value)

    assert "no such folder" in message(tmp_path / "none")
    assert "this is a file" in message(tree / "dark" / "notes.txt")
    (tmp_path / "empty").mkdir()
    assert f"{tmp_path / 'empty'}: there is no sub-folder" in message(tmp_path / "empty")
    (tmp_path / "empty" / "one").mkdir()
    assert "only one class" in message(tmp_path / "empty")
    (tmp_path / "empty" / "two").mkdir()
    assert f"{tmp_path / 'empty' / 'one'}: there is no image" in message(tmp_path / "empty")
    picture(tmp_path / "few" / "a" / "1.png", 1)
    picture(tmp_path / "few" / "b" / "1.png", 1)
    assert "split off a test set" in message(tmp_path / "few")
    (tmp_path / "half" / "train").mkdir(parents=True)
    assert "no folder val or test" in message(tmp_path / "half")
    assert "channels must be 1 or 3" in message(tree, channels=2)


def test_split_keeps_one_image_of_each_class_for_training():
    labels = torch.tensor([0] * 10 + [1] + [2] * 4)
    train, test = split_by_class(labels, 0.2, seed=1)
    assert sorted(train.tolist() + test.tolist()) == list(range(15))
    assert labels[train].unique().tolist() == [0, 1, 2]
    assert labels[test].tolist() == [0, 0, 2]
