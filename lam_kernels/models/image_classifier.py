"""Vision transformer with a multi-layer learned attention mask (arXiv 2406.02761, image
classification).
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lam_kernels.nn import LAMEncoder, LAMSelfAttention, LearnableAttentionMask

# a size that comes from a file is believed only within these bounds
_LIMITS = {
    "classes": 1_000_000,
    "image_size": 4096,
    "patch_size": 4096,
    "channels": 16,
    "width": 16_384,
    "depth": 512,
    "heads": 1024,
    "feedforward": 131_072,
    "mask_depth": 64,
    "mask_heads": 1024,
}


@dataclass(frozen=True)
class ImageClassifierConfig:
    """Everything that decides the shape of an ImageClassifier. Plain data: it goes into checkpoints
    as JSON.

    attention: "lam" (fused with a learned mask) or "plain" (PyTorch's SDPA, no mask).
    scope, fusion, mask_*: see lam_kernels.nn.LAMEncoder; unused when attention is "plain".
    class_token: puts one token without a patch in front; the head still reads the mean of the patch
        tokens.
    position_std: of the position embedding at the start. With one pixel a token it has to be about
        as large as the pixel's own embedding (1.0), or the first LayerNorm hides where a pixel is
        and training stalls for epochs.
    """

    classes: int
    image_size: int = 8
    patch_size: int = 1
    channels: int = 1
    width: int = 64
    depth: int = 3
    heads: int = 8
    feedforward: int = 128
    attention: str = "lam"
    scope: str = "layer"
    fusion: str = "mul"
    mask_depth: int = 1
    mask_heads: int = 1
    mask_init: str = "identity"
    mask_activation: str | None = None
    class_token: bool = False
    position_std: float = 1.0
    dropout: float = 0.0

    def __post_init__(self):
        for name, limit in _LIMITS.items():
            value = getattr(self, name)
            if type(value) is not int or not 1 <= value <= limit:
                raise ValueError(f"{name} must be an integer from 1 to {limit}, got {value!r}")
        choices = {
            "attention": ("lam", "plain"),
            "scope": ("layer", "global"),
            "fusion": ("mul", "add", "gate"),
            "mask_init": ("identity", "paper"),
            "mask_activation": (None, "relu", "softplus", "sigmoid", "tanh"),
            "class_token": (False, True),
        }
        for name, allowed in choices.items():
            value = getattr(self, name)
            if value not in allowed:
                raise ValueError(f"{name} must be one of {list(allowed)}, got {value!r}")
        if type(self.position_std) not in (int, float) or not 0 <= self.position_std <= 100:
            raise ValueError(f"position_std must be from 0 to 100, got {self.position_std!r}")
        if type(self.dropout) not in (int, float) or not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must be at least 0 and below 1, got {self.dropout!r}")
        if self.image_size % self.patch_size:
            raise ValueError(
                f"patch_size must divide image_size, got {self.patch_size} and {self.image_size}"
            )
        if self.width % self.heads:
            raise ValueError(f"heads must divide width, got {self.heads} and {self.width}")
        if self.tokens > 65_536:
            raise ValueError(f"{self.tokens} tokens are too many: use a larger patch_size")

    @property
    def grid(self) -> int:
        """Patches along one side."""
        return self.image_size // self.patch_size

    @property
    def tokens(self) -> int:
        return self.grid**2 + int(self.class_token)


# the sizes of known models; the demo's is the default above
SIZES = {
    "digits": {},
    # with the LAM of arXiv 2406.02761: one linear 768 -> 197 a layer
    "vit-b-16": {
        "image_size": 224,
        "patch_size": 16,
        "channels": 3,
        "width": 768,
        "depth": 12,
        "heads": 12,
        "feedforward": 3072,
        "class_token": True,
        "position_std": 0.02,
    },
}


class SDPASelfAttention(LAMSelfAttention):
    """The same projections around PyTorch's scaled_dot_product_attention: the plain model to
    compare with.
    """

    def attend(self, query, key, value, mask, key_mask) -> Tensor:
        if mask is not None or self.pattern is not None:
            raise ValueError("plain attention takes no learned mask and no pattern")
        visible = None if key_mask is None else key_mask[:, None, None, :]
        dropout = self.dropout if self.training else 0.0
        return F.scaled_dot_product_attention(query, key, value, visible, dropout)


class ImageClassifier(nn.Module):
    """Patches -> linear -> + position -> LAMEncoder -> mean over patch tokens -> linear.

    images [B, channels, image_size, image_size] -> logits [B, classes]. Square images in, any float
    dtype.

    Two classifiers that differ only in `attention` start with the same weights after
    torch.manual_seed(s) and reset_parameters(), and, with mask_init="identity", as the same
    function.

    state_dict (stable): `patch.*`, `position` [tokens, width], `class_token` [width] where there is
    one, `encoder.*` (see LAMEncoder), `head.*`.
    """

    def __init__(self, config: ImageClassifierConfig, *, backend: str | None = None, device=None):
        super().__init__()
        self.config = config
        plain = config.attention == "plain"
        place = {"device": device}
        inputs = config.channels * config.patch_size**2
        self.patch = nn.Linear(inputs, config.width, **place)
        self.position = nn.Parameter(torch.empty(config.tokens, config.width, **place))
        if config.class_token:
            self.class_token = nn.Parameter(torch.empty(config.width, **place))
        self.encoder = LAMEncoder(
            config.depth,
            config.width,
            config.heads,
            None if plain else config.tokens,
            scope=config.scope,
            fusion="mul" if plain else config.fusion,
            mask_depth=config.mask_depth,
            mask_heads=config.mask_heads,
            mask_init=config.mask_init,
            mask_activation=config.mask_activation,
            feedforward=config.feedforward,
            dropout=config.dropout,
            backend=backend,
            attention_type=SDPASelfAttention if plain else LAMSelfAttention,
            **place,
        )
        self.head = nn.Linear(config.width, config.classes, **place)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws all weights anew: first what both kinds of attention share, then the masks."""
        nn.init.normal_(self.position, std=self.config.position_std)
        if self.config.class_token:
            nn.init.normal_(self.class_token, std=0.02)
        generators = [m for m in self.modules() if isinstance(m, LearnableAttentionMask)]
        in_a_mask = {layer for generator in generators for layer in generator.modules()}
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.LayerNorm) and module not in in_a_mask:
                module.reset_parameters()
        for generator in generators:
            generator.reset_parameters()

    def tokens(self, images: Tensor) -> Tensor:  # [B, C, S, S] -> [B, tokens, width]
        config = self.config
        expected = (config.channels, config.image_size, config.image_size)
        if images.dim() != 4 or tuple(images.shape[1:]) != expected:
            raise ValueError(
                f"images must be [B, {', '.join(map(str, expected))}], got {tuple(images.shape)}"
            )
        patches = images.unflatten(3, (config.grid, -1)).unflatten(2, (config.grid, -1))
        # [B, C, rows, p, columns, p] -> [B, rows * columns, C * p * p]
        patches = patches.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)
        tokens = self.patch(patches)
        if config.class_token:
            first = self.class_token.to(tokens.dtype).expand(len(tokens), 1, -1)
            tokens = torch.cat([first, tokens], dim=1)
        return tokens + self.position

    def forward(self, images: Tensor) -> Tensor:  # [B, C, S, S] -> [B, classes]
        features = self.encoder(self.tokens(images))
        if self.config.class_token:
            features = features[:, 1:]
        return self.head(features.mean(dim=1))

    def config_dict(self) -> dict:
        """The configuration as plain data."""
        return dataclasses.asdict(self.config)
