"""report.check(): the error of every module, planted faults, other functions."""

import pytest
import torch
from encoder_model import NAMES, Model, inputs
from torch import nn

from lam_kernels import BlockDiagonal
from lam_kernels.swap import LearnedMask, swap


def test_check_passes_and_is_printed(capsys):
    model = Model().train()
    report = swap(model)
    found = report.check(inputs())
    assert found.ok
    assert {row.module for row in found.rows} == {*NAMES, "(model)", "(all others)"}
    out = capsys.readouterr().out
    assert out.strip() == str(found)
    assert "the same function as the untouched model" in out
    assert all(module.training for module in model.modules())
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_check_in_other_dtypes(dtype):
    model, batch = Model().to(dtype), inputs()
    batch["x"] = batch["x"].to(dtype)
    assert swap(model).check(batch).ok


@pytest.mark.parametrize("seed", [17, 23, 35])
def test_check_is_not_misled_by_a_relu_within_rounding_of_zero(seed):
    torch.manual_seed(seed)
    layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True)
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).half()
    assert swap(model).check(torch.randn(2, 9, 32, dtype=torch.float16)).ok


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("fault", ["scale", "padding", "gradient", "lost"])
def test_check_finds_planted_faults(fault, dtype, monkeypatch):
    import lam_kernels

    right = lam_kernels.masked_attention

    def wrong(query, key, value, **options):
        if fault == "scale":
            options["scale"] = 1.001 * query.shape[-1] ** -0.5
        elif fault == "padding":
            options["bias"] = options["bias"].clamp(min=-5)
        elif fault == "gradient":
            value = value.detach() + 0.999 * (value - value.detach())
        elif fault == "lost":
            query, key, value = query.detach(), key.detach(), value.detach()
        return right(query, key, value, **options)

    model, batch = Model().to(dtype), inputs()
    batch["x"] = batch["x"].to(dtype)
    report = swap(model)
    monkeypatch.setattr(lam_kernels, "masked_attention", wrong)
    found = report.check(batch)
    assert not found.ok
    assert "NOT the same function" in str(found)
    assert not found.worst.ok


def test_check_sees_a_nan_in_any_gradient():
    model = Model()
    report = swap(model)
    # the hook stays behind when the model is copied, and this is its module's last gradient
    model.encoder.layers[0].self_attn.out_proj.bias.register_hook(lambda grad: grad * torch.nan)
    found = report.check(inputs())
    assert not found.ok
    assert (found.worst.module, found.worst.what) == (NAMES[0], "gradients")


def test_check_of_another_function_asks_for_the_reference():
    model, batch = Model(), inputs()
    with swap(model, patterns=BlockDiagonal(2)) as report:
        with pytest.raises(ValueError, match="a pattern hides pairs"):
            report.check(batch)
        assert report.check(batch, against="reference").ok
    with swap(model, learned_mask=LearnedMask(8)) as report:
        assert report.check(batch).ok  # still the identity
        nn.init.normal_(model.encoder.layers[0].self_attn.lam.layers[-1].weight)
        with pytest.raises(ValueError, match="no longer the identity"):
            report.check(batch)
        assert report.check(batch, against="reference").ok
        with pytest.raises(ValueError, match="against must be"):
            report.check(batch, against="sdpa")


def test_check_takes_any_kind_of_batch():
    model = Model()
    report = swap(model)
    x = torch.randn(2, 6, 16)
    assert report.check(x).ok
    assert report.check((x,)).ok
    model.requires_grad_(False)
    with pytest.raises(ValueError, match="no tensor with a gradient"):
        report.check(x)
