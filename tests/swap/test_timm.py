"""timm's attention modules, where timm can be imported."""

import pytest
import torch
from compared import assert_same, in_float64, run

from lam_kernels.swap import LearnedMask, swap

pytest.importorskip("timm_models", reason="timm is not installed: its modules not tested")

import timm
from timm_models import MODELS, build, vit

by_name = pytest.mark.parametrize("name", MODELS)


@pytest.mark.parametrize("fused", [False, True])
@by_name
def test_same_outputs_and_gradients(name, fused, spy):
    model, inputs, modules = build(name)
    for module in model.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = fused
    exact, untouched = in_float64(model, inputs), run(model, inputs)
    report = swap(model, strict=True)
    assert len(report.changed) == modules
    with spy() as seen:
        assert_same(run(model, inputs), untouched, exact)
    assert (seen.forwards, seen.backwards) == (modules, modules)
    with torch.no_grad(), spy() as seen:
        model.eval()(**inputs)
    assert seen.forwards == modules
    report.undo()
    for key, value in run(model.train(), inputs).items():
        assert torch.equal(value, untouched[key])


@by_name
def test_same_under_autocast(name, spy):
    model, inputs, modules = build(name)
    exact, untouched = in_float64(model, inputs), run(model, inputs, autocast=True)
    swap(model)
    with spy() as seen:
        assert_same(run(model, inputs, autocast=True), untouched, exact)
    assert seen.forwards == modules


@by_name
def test_same_with_gradient_checkpointing(name, spy):
    model, inputs, modules = build(name)
    exact, untouched = in_float64(model, inputs), run(model, inputs)
    swap(model)
    model.set_grad_checkpointing()
    with spy() as seen:
        found = run(model, inputs, backward=True)
    assert (seen.forwards, seen.backwards) == (2 * modules, modules)  # recomputed
    assert_same(found, untouched, exact)


@by_name
def test_compiles_to_the_same(name):
    torch._dynamo.reset()
    model, inputs, _ = build(name)
    exact, untouched = in_float64(model, inputs), run(model, inputs)
    swap(model)
    found = run(torch.compile(model, backend="aot_eager"), inputs)
    assert_same({n.removeprefix("_orig_mod."): t for n, t in found.items()}, untouched, exact)
    torch._dynamo.reset()


@by_name
@pytest.mark.parametrize("first", ["swap", "peft"])
def test_lora_on_a_swapped_model(name, first):
    peft = pytest.importorskip("peft", reason="peft is not installed: LoRA not tested")

    def with_lora(model):
        torch.manual_seed(5)
        config = peft.LoraConfig(r=2, target_modules=["qkv", "proj"], init_lora_weights=False)
        return peft.get_peft_model(model, config)

    model, inputs, modules = build(name)
    expected = with_lora(model)
    exact, untouched = in_float64(expected, inputs), run(expected, inputs)
    model, inputs, modules = build(name)
    if first == "swap":
        swap(model)
        model = with_lora(model)
    else:
        model = with_lora(model)
        assert len(swap(model).changed) == modules
    got = run(model, inputs)
    assert_same(got, untouched, exact)
    assert any("lora" in n for n in got)


def test_masks_and_a_learned_one():
    torch.manual_seed(0)
    module = timm.layers.Attention(24, 3)
    x, keep = torch.randn(2, 6, 24), torch.rand(6, 6) < 0.7
    keep[:, 0] = True
    negative = torch.zeros(6, 6).masked_fill(~keep, -torch.inf)
    expected = [module(x), module(x, keep[None, None]), module(x, negative), module(x, None, True)]
    swap(module, learned_mask=LearnedMask(8))
    found = [module(x), module(x, keep[None, None]), module(x, negative), module(x, None, True)]
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    assert [n for n in module.state_dict() if n.startswith("lam.")]


def test_an_attention_without_a_norm_of_its_output():
    """Earlier versions of timm have none."""
    model, x = vit(), torch.randn(1, 3, 16, 16)
    expected = model(x)
    for block in model.blocks:
        block.attn._modules.pop("norm", None)
    swap(model)
    torch.testing.assert_close(model(x), expected)


def test_set_fused_attn_does_not_reach_a_built_model(spy):
    """timm reads its switch in constructors: a model that exists is reached by swap() only."""
    model = vit()
    with torch.no_grad(), spy() as seen:
        model(torch.randn(1, 3, 16, 16))
    assert seen.forwards == 0
    swap(model)
    with torch.no_grad(), spy() as seen:
        model(torch.randn(1, 3, 16, 16))
    assert seen.forwards == 2
