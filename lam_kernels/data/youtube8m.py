"""YouTube-8M frame-level features: SequenceExample records without TensorFlow, or a folder of npz.

A record is a tensorflow.SequenceExample: context feature `id` (older files: `video_id`), one bytes
value, and `labels`, int64 values; feature lists `rgb` and `audio`, one bytes value a frame (one a
second). A byte q stands for q * 4 / 255 + 4 / 512 - 2. Source: the data set's own description and
readers (youtube-8m, Apache-2.0); protocol buffers' wire format.
"""

from __future__ import annotations

import glob
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from lam_kernels.user_error import UserError

from .tfrecord import CorruptRecord, Record, index_records, read_record

_WIDTH = 4 / 255
_BIAS = 4 / 512 - 2
MAX_FRAMES = 100_000  # of one clip, before it is cut to the model's length


@dataclass(frozen=True)
class Clip:
    """One video: quantised frame features and its labels."""

    name: str
    labels: tuple[int, ...]
    visual: Tensor  # uint8 [T, visual width]
    audio: Tensor  # uint8 [T, audio width]


def dequantise(features: Tensor) -> Tensor:
    """uint8 -> float32 in [-2 + 4/512, 2 + 4/512]."""
    return features.float() * _WIDTH + _BIAS


def quantise(features: Tensor) -> Tensor:
    """The nearest byte of each value, clamped."""
    return ((features - _BIAS) / _WIDTH).round().clamp(0, 255).to(torch.uint8)


# ---- protocol buffers: fields of (number, wire type), lengths before bytes


class _Broken(ValueError):
    pass


def _varint(data: memoryview, at: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        if at >= len(data):
            raise _Broken("it ends within a number")
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
    raise _Broken("a number has more than 10 bytes")


def _fields(data: memoryview) -> Iterator[tuple[int, int | memoryview]]:
    """(field number, value) of a message; a value is a number or the bytes of a field."""
    at = 0
    while at < len(data):
        key, at = _varint(data, at)
        number, wire = key >> 3, key & 7
        if wire == 0:
            value, at = _varint(data, at)
            yield number, value
            continue
        if wire == 2:
            length, at = _varint(data, at)
        elif wire in (1, 5):
            length = 8 if wire == 1 else 4
        else:
            raise _Broken(f"a field of the unknown wire type {wire}")
        if length > len(data) - at:
            raise _Broken("it ends within a field")
        yield number, data[at : at + length]
        at += length


def _messages(data: memoryview, number: int) -> list[memoryview]:
    return [v for n, v in _fields(data) if n == number and isinstance(v, memoryview)]


def _entries(data: memoryview) -> dict[str, memoryview]:
    """A map<string, message> in field 1."""
    found = {}
    for entry in _messages(data, 1):
        keys, values = _messages(entry, 1), _messages(entry, 2)
        if keys and values:
            found[bytes(keys[-1]).decode("utf-8", "replace")] = values[-1]
    return found


_KINDS = {1: "bytes", 2: "floats", 3: "int64 values"}  # field numbers of a Feature's lists


def _lists_of(feature: memoryview, kind: int, what: str) -> list[memoryview]:
    """A Feature's list of this kind, empty where nothing is set; another kind is refused: read as
    an empty list, it would make a clip without frames or labels."""
    found = []
    for number, values in _fields(feature):
        if number == kind and isinstance(values, memoryview):
            found.append(values)
        elif number in _KINDS:
            raise _Broken(f"{what} holds {_KINDS[number]}, expected {_KINDS[kind]}")
    return found


def _bytes_of(feature: memoryview, what: str) -> list[memoryview]:
    """Feature.bytes_list (field 1) . value (field 1)"""
    return [value for values in _lists_of(feature, 1, what) for value in _messages(values, 1)]


def _integers_of(feature: memoryview, what: str) -> list[int]:
    """Feature.int64_list (field 3) . value (field 1), packed or not"""
    found = []
    for values in _lists_of(feature, 3, what):
        for number, value in _fields(values):
            if number != 1:
                continue
            if isinstance(value, int):
                found.append(value)
                continue
            at = 0
            while at < len(value):
                one, at = _varint(value, at)
                found.append(one)
    return found


def _as_long_as_each_other(visual: Tensor, audio: Tensor) -> tuple[Tensor, Tensor]:
    """Both streams, cut to the shorter one. One without any frame beside one with some is damage:
    the clip would count as one of no frames."""
    length = min(len(visual), len(audio))
    if length == 0 and len(visual) != len(audio):
        raise _Broken(f"rgb has {len(visual)} frames and audio {len(audio)}, expected some in both")
    return visual[:length], audio[:length]


def parse_clip(payload: bytes, visual_width: int, audio_width: int, classes: int) -> Clip:
    """The clip in a SequenceExample. ValueError with a sentence when it is not one of these sizes.

    Labels are sorted and unique; the shorter stream decides the number of frames, which may be 0
    only where both are empty.
    """
    data = memoryview(payload)
    contexts, lists = _messages(data, 1), _messages(data, 2)
    context = _entries(contexts[-1]) if contexts else {}
    feature_lists = _entries(lists[-1]) if lists else {}
    name = next((context[key] for key in ("id", "video_id") if key in context), None)
    names = _bytes_of(name, "id") if name is not None else []
    if not names:
        raise _Broken("it has no id")
    if "labels" not in context:
        raise _Broken("it has no labels")
    labels = sorted(set(_integers_of(context["labels"], "labels")))
    if labels and not 0 <= labels[0] <= labels[-1] < classes:
        wrong = next(label for label in labels if not 0 <= label < classes)
        raise _Broken(f"label {wrong} is outside of the {classes} classes")
    streams = []
    for key, width in (("rgb", visual_width), ("audio", audio_width)):
        if key not in feature_lists:
            raise _Broken(f"it has no feature list {key}")
        frames = []
        for number, feature in enumerate(_messages(feature_lists[key], 1)):
            values = _bytes_of(feature, f"frame {number} of {key}")
            if not values:
                raise _Broken(f"frame {number} of {key} is empty, expected {width} bytes")
            frames += values
        for number, frame in enumerate(frames):
            if len(frame) != width:
                raise _Broken(f"frame {number} of {key} has {len(frame)} bytes, expected {width}")
        if len(frames) > MAX_FRAMES:
            raise _Broken(f"{key} has {len(frames)} frames, the limit is {MAX_FRAMES}")
        flat = np.frombuffer(b"".join(frames), dtype=np.uint8).copy()
        streams.append(torch.from_numpy(flat).view(-1, width))
    text = bytes(names[-1]).decode("utf-8", "replace")
    return Clip(text, tuple(labels), *_as_long_as_each_other(*streams))


def _number(value: int) -> bytes:
    out = bytearray()
    while value >= 0x80:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*out, value])


def _field(number: int, content: bytes) -> bytes:
    return _number(number << 3 | 2) + _number(len(content)) + content


def _entry(key: str, value: bytes) -> bytes:
    return _field(1, _field(1, key.encode()) + _field(2, value))


def encode_clip(clip: Clip) -> bytes:
    """The SequenceExample of a clip: what parse_clip reads. ValueError for a label below 0."""
    if clip.labels and min(clip.labels) < 0:
        raise ValueError(f"labels of clip {clip.name!r} must be 0 or above, got {min(clip.labels)}")
    labels = _field(1, b"".join(_number(label) for label in clip.labels))
    context = _entry("id", _field(1, _field(1, clip.name.encode())))
    context += _entry("labels", _field(3, labels))
    lists = b""
    for key, stream in (("rgb", clip.visual), ("audio", clip.audio)):
        frames = stream.numpy()
        lists += _entry(
            key, b"".join(_field(1, _field(1, _field(1, frame.tobytes()))) for frame in frames)
        )
    return _field(1, context) + _field(2, lists)


def empty_clip(visual_width: int, audio_width: int) -> Clip:
    """No frame, no label."""
    streams = (torch.zeros(0, width, dtype=torch.uint8) for width in (visual_width, audio_width))
    return Clip("", (), *streams)


# ---- data sets


@dataclass
class Damage:
    """Records that could not be used, each counted once."""

    seen: dict[tuple[str, int], str] = field(default_factory=dict)

    def add(self, error: CorruptRecord) -> bool:
        """Whether it is new."""
        known = (error.path, error.number) in self.seen
        self.seen[error.path, error.number] = error.why
        return not known

    def summary(self) -> str:
        files = len({path for path, _ in self.seen})
        return f"{len(self.seen)} corrupt records in {files} files were skipped"


class Clips(torch.utils.data.Dataset):
    """Clips by number, read when they are asked for; what `find_clips` found.

    Order, shuffling and sharing out among processes belong to whoever asks: a sampler, or indices.
    An item is a Clip, or the CorruptRecord that stands in its place, so that a worker process can
    report it; `clips` leaves those out.
    """

    def __init__(
        self,
        sources: Sequence[Record | Path],
        visual_width: int,
        audio_width: int,
        classes: int,
        damage: Damage,
        fatal: bool = False,
    ):
        self.sources = list(sources)
        self.visual_width, self.audio_width, self.classes = visual_width, audio_width, classes
        self.damage, self.fatal = damage, fatal

    def __len__(self) -> int:
        return len(self.sources)

    def subset(self, indices: Sequence[int]) -> Clips:
        chosen = [self.sources[i] for i in indices]
        return Clips(
            chosen, self.visual_width, self.audio_width, self.classes, self.damage, self.fatal
        )

    def __getitem__(self, index: int) -> Clip | CorruptRecord:
        source = self.sources[index]
        sizes = (self.visual_width, self.audio_width, self.classes)
        try:
            if isinstance(source, Record):
                return parse_clip(read_record(source), *sizes)
            return _read_npz(source, *sizes)
        except CorruptRecord as error:
            return error
        except ValueError as error:
            number = source.number if isinstance(source, Record) else 0
            return CorruptRecord(getattr(source, "path", source), number, str(error))

    def clips(self, indices: Sequence[int]) -> list[Clip]:
        """Those that can be read, in order; the others are reported, or fatal."""
        with ThreadPoolExecutor(2) as pool:
            items = list(pool.map(self.__getitem__, indices))
        found = []
        for item in items:
            if isinstance(item, Clip):
                found.append(item)
            else:
                report(item, self.damage, self.fatal)
        return found


def report(error: CorruptRecord, damage: Damage, fatal: bool, quiet: bool = False) -> None:
    """Says so once (where not quiet), or stops: one sentence that names file and record."""
    if fatal:
        raise UserError(str(error))
    if damage.add(error) and not quiet:
        print(f"skipped: {error}", flush=True)


def _read_npz(path: Path, visual_width: int, audio_width: int, classes: int) -> Clip:
    """rgb uint8 or float (-2 to 2) [T, visual width], audio likewise, labels integers [n], the
    classes."""
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in ("rgb", "audio", "labels")}
    except KeyError as error:
        raise _Broken(f"there is no array {error.args[0].split()[0]}") from None
    except Exception as error:  # zip and npy readers raise many kinds
        raise _Broken(f"it cannot be read ({str(error).splitlines()[0]})") from None
    numbers = arrays["labels"].reshape(-1)
    if len(numbers) and numbers.dtype.kind not in "iu":
        raise _Broken(f"labels are {numbers.dtype}, expected integers")
    labels = sorted({int(label) for label in numbers})
    if labels and not 0 <= labels[0] <= labels[-1] < classes:
        raise _Broken(f"its labels are outside of the {classes} classes")
    if len(numbers) > 2 and labels[-1] <= 1:
        raise _Broken(f"labels are {len(numbers)} values of 0 and 1, expected the classes' numbers")
    streams = []
    for name, width in (("rgb", visual_width), ("audio", audio_width)):
        array = arrays[name]
        if array.ndim != 2 or array.shape[1] != width or len(array) > MAX_FRAMES:
            raise _Broken(f"{name} has shape {array.shape}, expected [T, {width}]")
        if array.dtype == np.uint8:
            streams.append(torch.from_numpy(np.ascontiguousarray(array)))
            continue
        if array.dtype.kind != "f":
            raise _Broken(f"{name} is {array.dtype}, expected uint8 (quantised) or float")
        if not np.isfinite(array).all():
            raise _Broken(f"{name} holds NaN or infinity")
        # a step of slack: what a byte stands for ends at 2 + 4 / 512, and half precision rounds
        low, high = (float(array.min()), float(array.max())) if array.size else (0.0, 0.0)
        if not -2 - _WIDTH <= low <= high <= 2 + _WIDTH:
            raise _Broken(
                f"{name} holds floats from {low:g} to {high:g}, expected uint8 (quantised) or "
                "floats from -2 to 2"
            )
        streams.append(quantise(torch.from_numpy(array.astype(np.float32))))
    return Clip(path.stem, tuple(labels), *_as_long_as_each_other(*streams))


def find_clips(
    pattern: str,
    visual_width: int = 1024,
    audio_width: int = 128,
    classes: int = 3862,
    *,
    fatal: bool = False,
    quiet: bool = False,
) -> Clips:
    """Clips of all files that match a glob (TFRecord shards), or of a folder of .npz.

    UserError when nothing matches, a match is no shard, no record is found, or, with `fatal`, at
    the first corrupt one.
    Only headers are read here; each record is checked when it is read. quiet: a broken header is
    counted and not printed, for all but one of several processes, which read the same headers.
    """
    damage = Damage()
    path = Path(pattern)
    if path.is_dir():
        sources: list[Record | Path] = sorted(path.rglob("*.npz"))
        if not sources:
            raise UserError(f"{pattern}: there is no .npz in this folder (shards need a glob)")
        return Clips(sources, visual_width, audio_width, classes, damage, fatal)
    files = sorted(glob.glob(pattern, recursive=True))
    if not files:
        raise UserError(f"{pattern}: no file matches")
    sources = []
    for name in files:
        if name.endswith(".npz"):
            raise UserError(f"{pattern}: {name} is no TFRecord shard: give the folder of the .npz")
        if not Path(name).is_file():
            what = "a folder" if Path(name).is_dir() else "a link to nothing, or no plain file"
            raise UserError(f"{pattern}: {name} is {what}, expected TFRecord shards: narrow it")
        records, broken = index_records(name)
        sources += records
        if broken is not None:
            report(broken, damage, fatal, quiet)
    if not sources:
        raise UserError(f"{pattern}: there is no whole record in {len(files)} files")
    return Clips(sources, visual_width, audio_width, classes, damage, fatal)


def collate(
    clips: Sequence[Clip], classes: int, max_len: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """visual [B, T, .], audio [B, T, .], frames bool [B, T], labels float [B, classes].

    T is the longest clip's, at most max_len; padding is 0 after dequantisation.
    """
    length = max([1, *(min(max_len, len(clip.visual)) for clip in clips)])
    widths = (clips[0].visual.shape[1], clips[0].audio.shape[1])
    visual, audio = (torch.zeros(len(clips), length, width) for width in widths)
    frames = torch.zeros(len(clips), length, dtype=torch.bool)
    labels = torch.zeros(len(clips), classes)
    for row, clip in enumerate(clips):
        count = min(length, len(clip.visual))
        visual[row, :count] = dequantise(clip.visual[:count])
        audio[row, :count] = dequantise(clip.audio[:count])
        frames[row, :count] = True
        labels[row, list(clip.labels)] = 1.0
    return visual, audio, frames, labels
