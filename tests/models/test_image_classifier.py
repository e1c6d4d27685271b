"""ImageClassifier: starts, parameter counts, shapes, refusals, stable state_dict."""

import dataclasses

import pytest
import torch

from lam_kernels.models import ImageClassifier, ImageClassifierConfig
from lam_kernels.models.image_classifier import SIZES


def build(seed=0, **options):
    settings = {"classes": 4, "width": 16, "depth": 2, "heads": 2, "feedforward": 32, **options}
    backend = None if options.get("attention") == "plain" else "reference"
    torch.manual_seed(seed)
    model = ImageClassifier(ImageClassifierConfig(**settings), backend=backend)
    torch.manual_seed(seed)
    model.reset_parameters()
    return model


@pytest.mark.parametrize("scope", ["layer", "global"])
def test_plain_and_lam_start_as_the_same_function(scope):
    plain, lam = build(attention="plain"), build(scope=scope)
    own = lam.state_dict()
    for name, value in plain.state_dict().items():
        assert torch.equal(value, own[name]), name
    images = torch.randn(3, 1, 8, 8)
    torch.testing.assert_close(plain(images), lam(images))


def test_patches_are_rows_of_squares():
    model = build(image_size=4, patch_size=2, channels=2)
    images = torch.arange(32.0).view(1, 2, 4, 4)
    with torch.no_grad():
        model.patch.weight.zero_()
        model.patch.weight[:8, :8] = torch.eye(8)
        model.patch.bias.zero_()
        model.position.zero_()
        tokens = model.tokens(images)[0, :, :8]
    assert tokens[1].tolist() == images[0, :, :2, 2:].flatten().tolist()
    assert tokens[2].tolist() == images[0, :, 2:, :2].flatten().tolist()


def test_vit_b_16_has_the_papers_mask_parameters():
    config = ImageClassifierConfig(classes=1000, **SIZES["vit-b-16"])
    assert config.tokens == 197
    with_lam = ImageClassifier(config, device="meta")
    plain = ImageClassifier(dataclasses.replace(config, attention="plain"), device="meta")
    count = [sum(p.numel() for p in model.parameters()) for model in (with_lam, plain)]
    assert count[0] - count[1] == 12 * 151_493


def test_class_token_and_gate():
    model = build(
        image_size=8,
        patch_size=4,
        class_token=True,
        fusion="gate",
        mask_activation="relu",
        mask_heads=2,
        mask_depth=2,
    )
    assert model.encoder.layers[0].attention.lam.max_len == 5
    model(torch.randn(2, 1, 8, 8)).square().sum().backward()
    assert model.class_token.grad.abs().sum() > 0


def test_wrong_images_are_named():
    with pytest.raises(ValueError, match=r"images must be \[B, 1, 8, 8\]"):
        build()(torch.randn(2, 1, 8, 9))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"classes": 0}, "classes"),
        ({"width": 10**9}, "width"),
        ({"depth": True}, "depth"),
        ({"patch_size": 3}, "patch_size must divide"),
        ({"heads": 5}, "heads must divide"),
        ({"fusion": "times"}, "fusion"),
        ({"scope": None}, "scope"),
        ({"attention": ["lam"]}, "attention"),
        ({"position_std": float("nan")}, "position_std"),
        ({"dropout": 1}, "dropout"),
        ({"image_size": 4096}, "too many"),
    ],
)
def test_bad_configurations_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        ImageClassifierConfig(**{"classes": 3, **options})


def test_state_dict_is_stable():
    keys = list(build(depth=1, class_token=True).state_dict())
    assert keys[:4] == ["position", "class_token", "patch.weight", "patch.bias"]
    assert keys[-2:] == ["head.weight", "head.bias"]
    assert all(key.startswith("encoder.") for key in keys[4:-2])
    assert "encoder.layers.0.attention.lam.layers.0.weight" in keys
