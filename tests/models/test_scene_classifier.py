"""SceneClassifier: sizes, padding, batch mates, equal starts, refusals."""

from __future__ import annotations

import pytest
import torch

from lam_kernels.models import SceneClassifier, SceneClassifierConfig
from lam_kernels.models.scene_classifier import SIZES, VARIANTS
from lam_kernels.patterns import BlockDiagonal, DilatedToeplitz, Toeplitz

SMALL = {"classes": 5, "visual_width": 16, "audio_width": 8, "heads": 4, "max_len": 12, "radius": 2}


def made(seed=0, **changes):
    torch.manual_seed(seed)
    model = SceneClassifier(SceneClassifierConfig(**SMALL | changes))
    torch.manual_seed(seed)
    model.reset_parameters()
    return model


def batch(lengths, seed=0):
    generator = torch.Generator().manual_seed(seed)
    T = max(lengths)
    visual, audio = (torch.randn(len(lengths), T, w, generator=generator) for w in (16, 8))
    frames = torch.arange(T) < torch.tensor(lengths)[:, None]
    return visual * frames[..., None], audio * frames[..., None], frames


@pytest.mark.parametrize("pattern", ["block", "toeplitz", "dilated"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_clips_do_not_depend_on_padding_or_batch_mates(variant, pattern):
    model = made(variant=variant, pattern=pattern, block=3)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    visual, audio, frames = batch([9, 4, 12])
    together = model(visual, audio, frames)
    assert together.shape == (3, 5)
    for row, length in enumerate((9, 4, 12)):
        part = (x[row : row + 1, :length] for x in (visual, audio, frames))
        torch.testing.assert_close(model(*part)[0], together[row])


def test_a_clip_without_frames_gives_the_head_bias():
    model = made()
    visual, audio, frames = batch([3, 2])
    logits = model(visual, audio, frames & torch.tensor([[True], [False]]))
    torch.testing.assert_close(logits[1], model.head.bias)


def test_all_variants_start_with_the_same_shared_weights():
    states = [made(variant=variant).state_dict() for variant in VARIANTS]
    for name, tensor in states[0].items():
        for state in states[1:]:
            assert torch.equal(state[name], tensor), name


def parameters(name):
    with torch.device("meta"):
        model = SceneClassifier(SceneClassifierConfig(**SIZES[name]))
    return sum(p.numel() for p in model.parameters())


def test_what_the_variants_add_at_the_size_of_the_paper():
    """1.37 MiB for GateAtt and 12.19 MiB for GateOp, in float32."""
    plain = parameters("baseline")
    kinds = {
        (config.get("variant"), config.get("pattern", "toeplitz")) for config in SIZES.values()
    }
    assert len(kinds) == len(SIZES) == 1 + 3 * 3  # the baseline, and each variant with each pattern
    for name in SIZES:
        added = parameters(name) - plain
        if name.startswith("gateatt"):
            assert added == 2 * 2 * 300**2
            assert added * 4 / 2**20 == pytest.approx(1.37, abs=0.01)
        elif name.startswith("gateop"):
            assert added == 3 * (1024**2 + 128**2)
            assert added * 4 / 2**20 == pytest.approx(12.19, abs=0.01)
        else:
            assert added == 0


def test_patterns():
    for changes, pattern in (
        ({"pattern": "block", "block": 7}, BlockDiagonal(7)),
        ({"radius": 3}, Toeplitz(3)),
        ({"pattern": "dilated", "radius": 8, "dilation": 4}, DilatedToeplitz(8, 4)),
    ):
        config = SceneClassifierConfig(**SMALL | {"variant": "share"} | changes)
        assert config.neighbourhood() == pattern
    assert SceneClassifierConfig(**SMALL).neighbourhood() is None


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"variant": "gate"}, "variant must be one of"),
        ({"pattern": "band"}, "pattern must be one of"),
        ({"max_len": 513}, "max_len must be an integer from 1 to 512, got 513"),
        ({"heads": 3}, "heads must divide visual_width, got 3 and 16"),
        ({"classes": 1.5}, "classes must be an integer"),
        ({"feedforward": 17}, "feedforward must be from 0 to 16"),
    ],
)
def test_refusals(changes, words):
    with pytest.raises(ValueError, match=words):
        SceneClassifierConfig(**SMALL | changes)


def test_refused_input():
    model = made()
    visual, audio, frames = batch([13])
    with pytest.raises(ValueError, match="clips have 13 frames, max_len is 12"):
        model(visual, audio, frames)
    with pytest.raises(ValueError, match=r"audio must be \[1, 13, 8\], got \(1, 13, 16\)"):
        model(visual, visual, frames)
