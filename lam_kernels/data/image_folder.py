"""A folder of images, one sub-folder a class."""

from __future__ import annotations

import threading
import warnings
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from lam_kernels.optional_package import optional_package
from lam_kernels.user_error import UserError

from .labelled_images import LabelledImages, split_by_class

# few decoders, the common ones: fewer lines of C that meet an untrusted file
_FORMATS = {
    ".png": "PNG",
    ".jpg": "JPEG",
    ".jpeg": "JPEG",
    ".bmp": "BMP",
    ".webp": "WEBP",
    ".gif": "GIF",
    ".ppm": "PPM",
    ".pgm": "PPM",
}
MAX_PIXELS = 64 * 2**20  # above this an image is taken for a decompression bomb
IN_MEMORY_BYTES = 2**30  # a data set below this is decoded once, at the start
_WARNINGS_LOCK = threading.Lock()  # warnings.catch_warnings is not thread-safe


def load_image_folder(
    root: str | Path, image_size: int, channels: int, *, split_seed: int = 0
) -> tuple[LabelledImages, LabelledImages]:
    """(train, test) of `root`/train and `root`/val (or test), or of one tree split by seed, 20 % of
    each class.

    Class names are sub-folder names in sorted order; images may lie deeper. Hidden files and other
    file types are skipped. Images become `channels` 1 (luma) or 3 (RGB), squares of `image_size` by
    bilinear resampling. A data set that fits in 1 GiB is decoded here, so a broken file is found
    before training; a larger one is read batch by batch.

    UserError (one sentence, naming the path): no folder, no classes, an empty class, one class
    only, a class in val that train has not, an image that does not decode or has more than 64 Mi
    pixels.
    """
    root = Path(root)
    optional_package("PIL.Image", "reading images")
    if channels not in (1, 3):
        raise UserError(f"channels must be 1 or 3, got {channels}")
    if not root.exists():
        raise UserError(f"{root}: there is no such folder")
    if not root.is_dir():
        raise UserError(
            f"{root}: a data set is a folder with one sub-folder a class, this is a file"
        )
    read = partial(read_image, image_size=image_size, channels=channels)
    train_root = root / "train"
    if not train_root.is_dir():
        paths, labels, classes = _scan(root)
        parts = split_by_class(labels, 0.2, split_seed)
        if len(parts[1]) == 0:
            raise UserError(f"{root}: no class has enough images (3) to split off a test set")
        selected = [([paths[i] for i in part.tolist()], labels[part]) for part in parts]
    else:
        names = [name for name in ("val", "test") if (root / name).is_dir()]
        if not names:
            raise UserError(f"{root}: there is a folder train, but no folder val or test beside it")
        paths, labels, classes = _scan(train_root)
        test_root = root / names[0]
        test_paths, test_labels, test_classes = _scan(test_root, at_least=1)
        unknown = sorted(set(test_classes) - set(classes))
        if unknown:
            raise UserError(f"{test_root / unknown[0]}: {train_root} has no such class")
        remap = torch.tensor([classes.index(name) for name in test_classes])
        selected = [(paths, labels), (test_paths, remap[test_labels])]
    count = sum(len(part_paths) for part_paths, _ in selected)
    in_memory = count * channels * image_size**2 <= IN_MEMORY_BYTES
    train, test = (
        _collect(part_paths, part_labels, classes, read, in_memory)
        for part_paths, part_labels in selected
    )
    return train, test


def read_image(path: Path, *, image_size: int, channels: int) -> Tensor:
    """One image as uint8 [channels, image_size, image_size]; a UserError that names the file if it
    cannot be read.
    """
    image_module = optional_package("PIL.Image", "reading images")
    try:
        with _WARNINGS_LOCK, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # pillow's own, softer limit
            image = image_module.open(path, formats=[_FORMATS[path.suffix.lower()]])
        with image:
            if image.width * image.height > MAX_PIXELS:
                raise UserError(
                    f"{path}: {image.width} x {image.height} pixels, the limit is {MAX_PIXELS}"
                )
            square = image.convert("L" if channels == 1 else "RGB").resize(
                (image_size, image_size), image_module.Resampling.BILINEAR
            )
    except UserError:
        raise
    except image_module.DecompressionBombError:
        raise UserError(
            f"{path}: the image has more than the limit of {MAX_PIXELS} pixels"
        ) from None
    except Exception as error:  # decoders raise OSError, SyntaxError, ValueError, struct.error, ...
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise UserError(f"{path}: the image cannot be read ({reason})") from None
    pixels = torch.frombuffer(bytearray(square.tobytes()), dtype=torch.uint8)
    return pixels.view(image_size, image_size, channels).permute(2, 0, 1).contiguous()


def _scan(root: Path, *, at_least: int = 2) -> tuple[list[Path], Tensor, tuple[str, ...]]:
    folders = sorted(p for p in root.iterdir() if p.is_dir() and not p.name.startswith("."))
    if not folders:
        raise UserError(f"{root}: there is no sub-folder (one a class is expected)")
    if len(folders) < at_least:
        raise UserError(f"{root}: there is only one class, {folders[0].name}")
    paths: list[Path] = []
    labels: list[int] = []
    for label, folder in enumerate(folders):
        images = sorted(
            p
            for p in folder.rglob("*")
            if p.suffix.lower() in _FORMATS and not p.name.startswith(".") and p.is_file()
        )
        if not images:
            raise UserError(f"{folder}: there is no image in this folder")
        paths += images
        labels += [label] * len(images)
    return paths, torch.tensor(labels), tuple(folder.name for folder in folders)


def _collect(paths, labels, classes, read, in_memory: bool) -> LabelledImages:
    if not in_memory:
        return LabelledImages(labels, classes, paths=paths, read=read)
    with ThreadPoolExecutor(2) as pool:
        pixels = torch.stack(list(pool.map(read, paths)))
    return LabelledImages(labels, classes, pixels=pixels)
