"""timm's attention modules, where timm can be imported."""

import pytest
import torch
from compared import assert_same, in_float64, run

from lam_kernels.swap import LearnedMask, swap

# with a torchvision built for CUDA beside a torch without it, timm imports only after the two
# operators that its import looks up are declared
_library = torch.library.Library("torchvision", "FRAGMENT")
if torch.version.cuda is None:
    for name in ("nms", "qnms"):
        _library.define(f"{name}(Tensor a) -> Tensor")
timm = pytest.importorskip("timm", reason="timm is not installed: its modules not tested")


def vit(**options):
    from timm.models.vision_transformer import VisionTransformer

    return VisionTransformer(
        img_size=16, patch_size=4, embed_dim=24, depth=2, num_heads=3, num_classes=5, **options
    )


def swin(version):
    name = "swin_transformer_v2" if version == 2 else "swin_transformer"
    module = __import__(f"timm.models.{name}", fromlist=["_"])
    kind = module.SwinTransformerV2 if version == 2 else module.SwinTransformer
    return kind(
        img_size=32, patch_size=2, embed_dim=12, depths=(2, 2), num_heads=(2, 3), window_size=4,
        num_classes=5, drop_path_rate=0.0,
    )  # fmt: skip


MODELS = {
    "vit": (vit, 2),
    "vit with normed queries": (lambda: vit(qk_norm=True), 2),
    "swin": (lambda: swin(1), 4),
    "swin v2": (lambda: swin(2), 4),
}


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_same_outputs_and_gradients(name, fused, spy):
    torch.manual_seed(0)
    make, modules = MODELS[name]
    model = make()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.2)
    for module in model.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = fused
    size = 32 if "swin" in name else 16
    inputs = {"x": torch.randn(2, 3, size, size)}
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
