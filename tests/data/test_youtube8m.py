"""TFRecord and SequenceExample without TensorFlow: written, read back, damaged in every way."""

from __future__ import annotations

import contextlib
import struct

import numpy as np
import pytest
import torch

from lam_kernels.data import tfrecord, youtube8m
from lam_kernels.data.crc32c import crc32c, masked_crc32c
from lam_kernels.data.youtube8m import Clip, collate, encode_clip, find_clips, parse_clip
from lam_kernels.user_error import UserError

SIZES = (8, 4, 10)  # visual, audio, classes


def clip(name="a", length=5, labels=(1, 7), seed=0):
    generator = torch.Generator().manual_seed(seed)
    visual, audio = (
        torch.randint(0, 256, (length, width), generator=generator, dtype=torch.uint8)
        for width in SIZES[:2]
    )
    return Clip(name, labels, visual, audio)


def assert_same(one: Clip, other: Clip):
    assert (one.name, one.labels) == (other.name, other.labels)
    assert torch.equal(one.visual, other.visual)
    assert torch.equal(one.audio, other.audio)


@pytest.fixture
def shards(tmp_path):
    """Two files of three clips, of lengths 1 to 6."""
    clips = [clip(f"clip{n}", n + 1, (n,), n) for n in range(6)]
    for shard in range(2):
        chosen = clips[3 * shard : 3 * shard + 3]
        path = tmp_path / f"train{shard}.tfrecord"
        tfrecord.write_records(path, map(encode_clip, chosen))
    return clips, tmp_path


def found(folder, **options):
    return find_clips(str(folder / "*.tfrecord"), *SIZES, **options)


@pytest.mark.parametrize(
    ("data", "crc"),
    [  # RFC 3720, appendix B.4; the last one is the usual check value
        (bytes(32), 0x8A9136AA),
        (b"\xff" * 32, 0x62A8AB43),
        (bytes(range(32)), 0x46DD794E),
        (bytes(range(31, -1, -1)), 0x113FDB5C),
        (b"123456789", 0xE3069283),
        (b"", 0),
    ],
)
def test_known_checksums(data, crc):
    assert crc32c(data) == crc


def test_checksum_of_any_length():
    """Runs combined by shifts are what one byte after another gives."""
    data = np.random.default_rng(0).integers(0, 256, 5000, dtype=np.uint8).tobytes()
    state, table = 0xFFFFFFFF, []
    for n in range(256):
        for _ in range(8):
            n = n >> 1 ^ (0x82F63B78 if n & 1 else 0)
        table.append(n)
    expected = {}
    for at, byte in enumerate(data, 1):
        state = table[(state ^ byte) & 255] ^ state >> 8
        expected[at] = state ^ 0xFFFFFFFF
    for length in (1, 3, 4, 5, 64, 65, 255, 256, 257, 511, 513, 1024, 1025, 4999, 5000):
        assert crc32c(data[:length]) == expected[length], length


def test_masked_checksum():
    crc = crc32c(b"lam")
    assert masked_crc32c(b"lam") == ((crc >> 15 | crc << 17) + 0xA282EAD8) % 2**32


def test_round_trip(shards):
    clips, folder = shards
    read = found(folder)
    assert len(read) == 6
    for n, one in enumerate(clips):
        assert_same(read[n], one)


def feature(kind: int, values: bytes) -> bytes:
    return bytes([kind << 3 | 2, len(values)]) + values


def entry(key: bytes, value: bytes) -> bytes:
    return feature(1, feature(1, key) + feature(2, value))


def test_bytes_as_tensorflow_writes_them():
    """A record by hand: unpacked labels, video_id, fields in another order, an unknown field."""
    labels = feature(3, b"\x08\x07\x08\x01")
    context = entry(b"labels", labels) + entry(b"video_id", feature(1, feature(1, b"xy")))
    frames = lambda rows: b"".join(feature(1, feature(1, feature(1, row))) for row in rows)  # noqa: E731
    lists = entry(b"audio", frames([b"abcd"])) + entry(b"rgb", frames([b"01234567", b"89abcdef"]))
    payload = feature(2, lists) + b"\x48\x05" + feature(1, context)
    read = parse_clip(payload, *SIZES)
    assert (read.name, read.labels) == ("xy", (1, 7))
    assert read.visual.tolist() == [list(b"01234567")]  # the shorter stream decides
    assert read.audio.tolist() == [list(b"abcd")]


def test_dequantisation():
    levels = torch.arange(256, dtype=torch.uint8)
    values = youtube8m.dequantise(levels)
    assert values[0] == pytest.approx(4 / 512 - 2)
    assert values[255] == pytest.approx(4 + 4 / 512 - 2)
    assert torch.equal(youtube8m.quantise(values), levels)


def test_collate_pads_and_cuts():
    visual, audio, frames, labels = collate([clip(length=2), clip(length=9, labels=())], 10, 6)
    assert visual.shape == (2, 6, 8)
    assert audio.shape == (2, 6, 4)
    assert frames.sum(1).tolist() == [2, 6]
    assert (visual[0, 2:] == 0).all()
    assert labels.sum(1).tolist() == [2, 0]


# ---- damage


def damage(folder, how):
    """(file, record that is lost, words of its report)"""
    path = folder / "train0.tfrecord"
    data = bytearray(path.read_bytes())
    first = 12 + struct.unpack("<Q", data[:8])[0] + 4
    if how == "content":
        data[first + 12 + 30] ^= 1
        words = "record 1: the checksum of its content is wrong"
    elif how == "length":
        data[first] ^= 1
        words = "record 1: the checksum of its length is wrong"
    elif how == "header cut":
        data = data[: first + 5]
        words = "record 1: the file ends within its header"
    elif how == "cut":
        data = data[: first + 40]
        words = "record 1: the file ends within it"
    else:  # a length that is far too large, with a right checksum
        length = struct.pack("<Q", 2**40)
        data = data[:first] + length + struct.pack("<I", masked_crc32c(length)) + data[:40]
        words = "record 1: its length of"
    path.write_bytes(data)
    return path, words


@pytest.mark.parametrize("how", ["content", "length", "header cut", "cut", "huge"])
def test_a_damaged_record_is_reported_and_skipped(shards, how, capsys):
    _, folder = shards
    path, words = damage(folder, how)
    read = found(folder)
    kept = read.clips(range(len(read)))
    names = ["clip0", *(["clip2"] if how == "content" else []), "clip3", "clip4", "clip5"]
    assert [one.name for one in kept] == names
    read.clips(range(len(read)))  # a second epoch reports nothing again
    printed = capsys.readouterr().out
    assert printed.count("skipped: ") == 1
    assert f"{path}: {words}" in printed
    assert read.damage.summary() == "1 corrupt records in 1 files were skipped"


@pytest.mark.parametrize("how", ["content", "length", "cut"])
def test_a_damaged_record_is_fatal_by_option(shards, how):
    _, folder = shards
    _, words = damage(folder, how)

    def read_all():
        read = found(folder, fatal=True)
        read.clips(range(len(read)))

    with pytest.raises(UserError, match=words):
        read_all()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"labels": (10,)}, "label 10 is outside of the 10 classes"),
        ({"visual": torch.zeros(5, 9, dtype=torch.uint8)}, "rgb has 9 bytes, expected 8"),
        ({"audio": torch.zeros(5, 3, dtype=torch.uint8)}, "audio has 3 bytes, expected 4"),
    ],
)
def test_a_record_of_other_sizes(tmp_path, change, words, capsys):
    wrong = Clip(**{**vars(clip()), **change})
    tfrecord.write_records(tmp_path / "x.tfrecord", [encode_clip(wrong), encode_clip(clip("ok"))])
    assert [one.name for one in found(tmp_path).clips([0, 1])] == ["ok"]
    assert words in capsys.readouterr().out


FRAME, FLOATS = feature(1, feature(1, b"01234567")), feature(2, feature(1, bytes(8)))
SOUND, LABELS = feature(1, feature(1, b"abcd")), feature(3, feature(1, b"\x01\x07"))
NAME = feature(1, feature(1, b"x"))


def record(name=NAME, labels=LABELS, rgb=(FRAME,) * 3, audio=(SOUND,) * 3):
    """A SequenceExample of encoded Features."""
    context = entry(b"id", name) + entry(b"labels", labels)
    lists = [
        entry(key, b"".join(feature(1, frame) for frame in frames))
        for key, frames in ((b"rgb", rgb), (b"audio", audio))
    ]
    return feature(1, context) + feature(2, b"".join(lists))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"rgb": (FLOATS,) * 3}, "frame 0 of rgb holds floats, expected bytes"),
        ({"audio": (SOUND, LABELS)}, "frame 1 of audio holds int64 values, expected bytes"),
        ({"audio": (SOUND, b"")}, "frame 1 of audio is empty, expected 4 bytes"),
        ({"labels": FLOATS}, "labels holds floats, expected int64 values"),
        ({"labels": feature(1, feature(1, b"7"))}, "labels holds bytes, expected int64 values"),
        ({"name": LABELS}, "id holds int64 values, expected bytes"),
        ({"audio": ()}, "rgb has 3 frames and audio 0, expected some in both"),
    ],
)
def test_a_record_of_other_types_is_corrupt(tmp_path, change, words, capsys):
    """Not a clip without frames or labels."""
    tfrecord.write_records(tmp_path / "x.tfrecord", [record(**change), record()])
    assert [one.labels for one in found(tmp_path).clips([0, 1])] == [(1, 7)]
    assert f"x.tfrecord: record 0: {words}\n" in capsys.readouterr().out


@pytest.mark.parametrize("labels", [b"", feature(3, b"")])
def test_a_clip_may_be_without_frames_and_labels(labels):
    read = parse_clip(record(labels=labels, rgb=(), audio=()), *SIZES)
    assert read.labels == ()
    assert (read.visual.shape, read.audio.shape) == ((0, 8), (0, 4))


def test_a_label_below_0_is_not_written():
    with pytest.raises(ValueError, match="labels of clip 'a' must be 0 or above, got -3"):
        encode_clip(clip(labels=(2, -3)))


@pytest.mark.parametrize("seed", range(200))
def test_garbage_is_refused_and_never_crashes(seed):
    """Valid checksums, broken content: a sentence or a clip, nothing else."""
    generator = np.random.default_rng(seed)
    payload = bytearray(encode_clip(clip(seed=seed)))
    for at in generator.integers(0, len(payload), 4):
        payload[at] = generator.integers(0, 256)
    with contextlib.suppress(ValueError):
        parse_clip(bytes(payload[: generator.integers(1, len(payload) + 1)]), *SIZES)


def test_nothing_to_read(tmp_path):
    with pytest.raises(UserError, match="no file matches"):
        found(tmp_path)
    with pytest.raises(UserError, match=r"there is no \.npz in this folder"):
        find_clips(str(tmp_path), *SIZES)
    (tmp_path / "empty.tfrecord").write_bytes(b"")
    with pytest.raises(UserError, match="no whole record in 1 files"):
        found(tmp_path)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("x.npz", "x.npz is no TFRecord shard: give the folder of the .npz"),
        ("folder", "folder is a folder, expected TFRecord shards"),
        ("gone", "gone is a link to nothing"),
    ],
)
def test_a_glob_that_matches_other_things(shards, name, words):
    _, folder = shards
    path = folder / name
    if name == "folder":
        path.mkdir()
    elif name == "gone":
        path.symlink_to(folder / "nothing")
    else:
        np.savez(path, rgb=[1])
    with pytest.raises(UserError, match=words):
        find_clips(str(folder / "*"), *SIZES)


# ---- a plain folder, worker processes


def test_a_folder_of_npz(tmp_path, capsys):
    one = clip("two", 4, (2,))
    np.savez(tmp_path / "two.npz", rgb=one.visual, audio=one.audio, labels=[2])
    values = youtube8m.dequantise(one.visual).numpy()
    np.savez(tmp_path / "float.npz", rgb=values, audio=one.audio, labels=[2])
    np.savez(tmp_path / "no_audio.npz", rgb=one.visual, labels=[2])
    np.savez(tmp_path / "pickled.npz", rgb=np.array([{}], dtype=object), audio=one.audio, labels=[])
    read = find_clips(str(tmp_path), *SIZES).clips(range(4))
    assert [r.name for r in read] == ["float", "two"]
    for same in read:
        assert torch.equal(same.visual, one.visual)
        assert same.labels == (2,)
    printed = capsys.readouterr().out
    assert "no_audio.npz: record 0: there is no array" in printed
    assert "pickled.npz: record 0: it cannot be read" in printed


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"labels": [1.5]}, "labels are float64, expected integers"),
        ({"labels": [np.inf]}, "labels are float64, expected integers"),
        ({"labels": [True]}, "labels are bool, expected integers"),
        ({"labels": ["x"]}, "expected integers"),
        ({"labels": [0, 1, 0, 0]}, "labels are 4 values of 0 and 1"),
        ({"labels": [10]}, "its labels are outside of the 10 classes"),
        ({"rgb": np.full((5, 8), 200)}, "rgb is int64, expected uint8"),
        ({"rgb": np.full((5, 8), "x")}, "expected uint8"),
        ({"rgb": np.full((5, 8), np.nan)}, "rgb holds NaN or infinity"),
        ({"audio": np.full((5, 4), -np.inf, np.float32)}, "audio holds NaN or infinity"),
        ({"audio": np.zeros((5, 3), np.uint8)}, "audio has shape (5, 3), expected [T, 4]"),
        ({"audio": np.zeros((0, 4), np.uint8)}, "rgb has 5 frames and audio 0"),
        (
            {"rgb": np.linspace(0, 255, 40, dtype=np.float32).reshape(5, 8)},
            "x.npz: record 0: rgb holds floats from 0 to 255, expected uint8 (quantised) or floats "
            "from -2 to 2",
        ),
        ({"audio": np.full((5, 4), -2.1)}, "audio holds floats from -2.1 to -2.1, expected uint8"),
    ],
)
def test_npz_arrays_of_another_meaning_are_not_guessed(tmp_path, capsys, change, words):
    one = clip()
    np.savez(tmp_path / "x.npz", **{"rgb": one.visual, "audio": one.audio, "labels": [2]} | change)
    assert find_clips(str(tmp_path), *SIZES).clips([0]) == []
    assert words in capsys.readouterr().out


def test_npz_of_any_float_in_any_byte_order(tmp_path):
    one = clip()
    values = youtube8m.dequantise(one.visual).numpy()
    values.flat[:2] = -2, 2 + 4 / 512  # the ends of what is written
    one.visual.flatten()[:2] = torch.tensor([0, 255])
    for dtype in (">f4", "<f8"):
        np.savez(tmp_path / "x.npz", rgb=values.astype(dtype), audio=one.audio, labels=[])
        (read,) = find_clips(str(tmp_path), *SIZES).clips([0])
        assert torch.equal(read.visual, one.visual)


@pytest.mark.parametrize("workers", [0, 2])
def test_workers_share_the_records_out(shards, workers):
    """Each clip once an epoch, in an order of the sampler's, whatever the number of processes."""
    _, folder = shards
    damage(folder, "content")
    generator = torch.Generator().manual_seed(0)
    loader = torch.utils.data.DataLoader(
        found(folder), batch_size=2, shuffle=True, num_workers=workers, generator=generator,
        collate_fn=list,
    )  # fmt: skip
    epochs = [[item for batch in loader for item in batch] for _ in range(2)]
    for items in epochs:
        broken = [item for item in items if not isinstance(item, Clip)]
        assert [(error.number, "train0" in error.path) for error in broken] == [(1, True)]
        names = sorted(item.name for item in items if isinstance(item, Clip))
        assert names == ["clip0", "clip2", "clip3", "clip4", "clip5"]
