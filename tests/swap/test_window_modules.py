"""Window attention of Swinv2 and ClapAudio: segments are the shift masks, whoever calls."""

import pytest
import torch
from compared import assert_same, in_float64, run
from tiny_models import batch, build

from lam_kernels.swap import swap
from lam_kernels.swap.window_modules import shift_segments

transformers = pytest.importorskip(
    "transformers", reason="transformers is not installed: its window attention not tested"
)


def layers(model, name):
    return [m for m in model.modules() if name in type(m).__name__]


@pytest.mark.parametrize(("height", "width", "window", "shift"), [(8, 8, 4, 2), (12, 8, 4, 1)])
def test_segments_hide_what_the_mask_hides(height, width, window, shift):
    layer = layers(build("swinv2"), "Swinv2Layer")[1]
    layer.window_size, layer.shift_size = window, shift
    mask = layer.get_attn_mask(height, width, torch.float32)
    ids = shift_segments(height, width, window, shift)
    assert ids.shape == mask.shape[:2]
    assert torch.equal(ids[:, :, None] == ids[:, None, :], mask == 0)


@pytest.mark.parametrize("name", ["swinv2", "clap"])
def test_a_swapped_layer_hands_over_segments(name, monkeypatch):
    """[windows, N] integers reach the attention, never [windows, N, N]."""
    from lam_kernels.swap import window_modules

    model, seen = build(name), []
    right = window_modules.attend_windows

    def look(module, query, key, value, bias, mask, *rest):
        seen.append(None if mask is None else tuple(mask.shape))
        return right(module, query, key, value, bias, mask, *rest)

    monkeypatch.setattr(window_modules, "attend_windows", look)
    swap(model)
    model(**batch(name))
    assert seen.count(None) >= 2  # windows that are not shifted
    shifted = [shape for shape in seen if shape]
    assert shifted
    assert all(len(shape) == 2 and shape[1] == 16 for shape in shifted)


@pytest.mark.parametrize("kind", ["Swinv2SelfAttention", "ClapAudioSelfAttention"])
def test_an_attention_that_is_called_with_a_mask(kind):
    """A model that takes the block apart (as DG-SCT does) passes transformers' own mask."""
    model = build("swinv2" if kind.startswith("Swin") else "clap").double()
    attention = layers(model, kind)[1]
    layer = layers(model, "Swinv2Layer" if kind.startswith("Swin") else "ClapAudioLayer")[1]
    layer.window_size, layer.shift_size = 4, 2
    mask = layer.get_attn_mask(8, 8, torch.float64, "cpu")
    x = torch.randn(2 * len(mask), 16, attention.all_head_size).double().requires_grad_()

    def results():
        out = attention(x, mask)[0]
        return [out, *torch.autograd.grad(out.square().sum(), [x, *attention.parameters()])]

    expected = results()
    swap(attention, strict=True)
    for ours, theirs in zip(results(), expected, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_the_scale_of_each_head_and_the_bias_learn():
    model = build("swinv2")
    swap(model)
    found = run(model, batch("swinv2"))
    for part in ("logit_scale", "continuous_position_bias_mlp.0.weight"):
        gradients = [g for n, g in found.items() if n.endswith(f"attention.self.{part}")]
        assert len(gradients) == 4
        assert all(g.abs().sum() > 0 for g in gradients)


def test_images_that_are_no_multiple_of_the_window():
    model = build("swinv2")
    inputs = {"pixel_values": torch.randn(2, 3, 28, 36)}
    exact, untouched = in_float64(model, inputs), run(model, inputs)
    swap(model)
    assert_same(run(model, inputs), untouched, exact)


def test_dropout_acts_in_training_only():
    model = build("swinv2")
    for attention in layers(model, "Swinv2SelfAttention"):
        attention.dropout.p = 0.5
    inputs = batch("swinv2")
    swap(model)

    def out():
        return model(**inputs).last_hidden_state

    assert not torch.equal(out(), out())
    model.eval()
    assert torch.equal(out(), out())


def test_attention_weights_are_refused():
    model = build("swinv2")
    swap(model)
    with pytest.raises(ValueError, match="the kernels store no attention weights"):
        model(**batch("swinv2"), output_attentions=True)


def test_undo_gives_layers_their_class_back():
    model = build("swinv2")
    before = [type(m) for m in model.modules()]
    with swap(model):
        assert [type(m) for m in model.modules()] != before
    assert [type(m) for m in model.modules()] == before
