"""Small models of timm with random weights, each with its attention modules counted."""

import torch

# with a torchvision built for CUDA beside a torch without it, timm imports only after the two
# operators that its import looks up are declared
_library = torch.library.Library("torchvision", "FRAGMENT")
if torch.version.cuda is None:
    for name in ("nms", "qnms"):
        _library.define(f"{name}(Tensor a) -> Tensor")
import timm  # noqa: E402, F401


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


def build(name):
    """(model, batch, how many attention modules)"""
    torch.manual_seed(0)
    make, modules = MODELS[name]
    model = make()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.2)
    size = 32 if "swin" in name else 16
    return model, {"x": torch.randn(2, 3, size, size)}, modules
