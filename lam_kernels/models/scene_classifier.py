"""Multi-label video classifier over frame features with global and local attention (arXiv
2110.13992, YouTube-8M).
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lam_kernels.nn.global_local_attention import GlobalLocalAttention
from lam_kernels.patterns import BlockDiagonal, DilatedToeplitz, Pattern, Toeplitz

# a size that comes from a file is believed only within these bounds
_LIMITS = {
    "classes": 1_000_000,
    "visual_width": 16_384,
    "audio_width": 16_384,
    "heads": 1024,
    "max_len": 512,
    "block": 512,
    "radius": 512,
    "dilation": 512,
}
PATTERNS = ("block", "toeplitz", "dilated")
VARIANTS = ("global", "share", "gate_map", "gate_output")


@dataclass(frozen=True)
class SceneClassifierConfig:
    """Everything that decides the shape of a SceneClassifier. Plain data: it goes into checkpoints
    as JSON.

    variant: "global" (plain attention, the baseline), "share", "gate_map" or "gate_output" of
        GlobalLocalAttention.
    pattern: "block" (frames of one block of `block`), "toeplitz" (frames up to `radius` away) or
        "dilated" (those whose distance is a multiple of `dilation`). The paper's k in TP_k and TD_k
        is the full width: radius = k // 2.
    feedforward: the width of each block's feed-forward layer, in multiples of the stream's width.
    """

    classes: int = 3862
    visual_width: int = 1024
    audio_width: int = 128
    heads: int = 8
    max_len: int = 300
    variant: str = "global"
    pattern: str = "toeplitz"
    block: int = 20
    radius: int = 15
    dilation: int = 4
    feedforward: float = 1.0

    def __post_init__(self):
        for name, limit in _LIMITS.items():
            value = getattr(self, name)
            if type(value) is not int or not 1 <= value <= limit:
                raise ValueError(f"{name} must be an integer from 1 to {limit}, got {value!r}")
        for name, allowed in (("variant", VARIANTS), ("pattern", PATTERNS)):
            value = getattr(self, name)
            if value not in allowed:
                raise ValueError(f"{name} must be one of {list(allowed)}, got {value!r}")
        if type(self.feedforward) not in (int, float) or not 0 <= self.feedforward <= 16:
            raise ValueError(f"feedforward must be from 0 to 16, got {self.feedforward!r}")
        for name in ("visual_width", "audio_width"):
            if getattr(self, name) % self.heads:
                raise ValueError(
                    f"heads must divide {name}, got {self.heads} and {getattr(self, name)}"
                )

    def neighbourhood(self) -> Pattern | None:
        """The local half's pattern; None for the baseline."""
        if self.variant == "global":
            return None
        if self.pattern == "block":
            return BlockDiagonal(self.block)
        if self.pattern == "toeplitz":
            return Toeplitz(self.radius)
        return DilatedToeplitz(self.radius, self.dilation)


# the paper's models by its names, at its sizes; the demo's sizes are those of its task. Of TD80 it
# does not state the dilation: 4, as in its TD60
SIZES = {
    "baseline": {},
    "shareatt-bd10": {"variant": "share", "pattern": "block", "block": 10},
    "shareatt-tp10": {"variant": "share", "radius": 5},
    "shareatt-td80": {"variant": "share", "pattern": "dilated", "radius": 40, "dilation": 4},
    "gateatt-bd10": {"variant": "gate_map", "pattern": "block", "block": 10},
    "gateatt-tp10": {"variant": "gate_map", "radius": 5},
    "gateatt-td80": {"variant": "gate_map", "pattern": "dilated", "radius": 40, "dilation": 4},
    "gateop-bd20": {"variant": "gate_output", "pattern": "block", "block": 20},
    "gateop-tp30": {"variant": "gate_output", "radius": 15},
    "gateop-td60": {"variant": "gate_output", "pattern": "dilated", "radius": 30, "dilation": 4},
}


class SceneBlock(nn.Module):
    """x + attention(norm(x)), then x + feed-forward(norm(x)), at one width."""

    def __init__(self, width: int, config: SceneClassifierConfig, backend: str | None, device=None):
        super().__init__()
        place = {"device": device}
        pattern = config.neighbourhood()
        variant = "share" if config.variant == "global" else config.variant
        max_len = config.max_len if variant == "gate_map" else None
        self.norm = nn.LayerNorm(width, **place)
        self.attention = GlobalLocalAttention(
            width, config.heads, pattern, variant, max_len, backend=backend, **place
        )
        inner = round(width * config.feedforward)
        self.feedforward = None
        if inner:
            self.feedforward = nn.Sequential(
                nn.LayerNorm(width, **place), nn.Linear(width, inner, **place), nn.ReLU(),
                nn.Linear(inner, width, **place),
            )  # fmt: skip

    def forward(self, x: Tensor, key_mask: Tensor | None = None) -> Tensor:  # [B, L, width]
        x = x + self.attention(self.norm(x), key_mask=key_mask)
        return x if self.feedforward is None else x + self.feedforward(x)


class SceneClassifier(nn.Module):
    """Frame features -> one block a stream at its own width -> masked mean -> linear.

        v = SceneBlock(visual);  a = SceneBlock(audio)
        logits = [mean of the clip's frames of v, the same of a] W + b

    visual [B, T, visual_width], audio [B, T, audio_width], frames bool [B, T] (True: a frame of the
    clip, not padding) -> logits [B, classes], for independent labels (sigmoid). T up to max_len. A
    sample without a frame has b as its logits.

    state_dict (stable): `visual.*` and `audio.*` (see SceneBlock), `head.*`.
    """

    def __init__(self, config: SceneClassifierConfig, *, backend: str | None = None, device=None):
        super().__init__()
        self.config = config
        self.visual = SceneBlock(config.visual_width, config, backend, device)
        self.audio = SceneBlock(config.audio_width, config, backend, device)
        width = config.visual_width + config.audio_width
        self.head = nn.Linear(width, config.classes, device=device)

    def reset_parameters(self) -> None:
        """Draws the weights that all variants share first, so that they start alike."""
        rest = []
        for name, module in self.named_modules():
            if not isinstance(module, nn.Linear | nn.LayerNorm):
                continue
            own = name.rpartition(".")[2] in ("out_local", "gate_global", "gate_local")
            rest.append(module) if own else module.reset_parameters()
        for module in rest:
            module.reset_parameters()
        for module in self.modules():
            if isinstance(module, GlobalLocalAttention):
                module.reset_gates()

    def forward(
        self,
        visual: Tensor,  # [B, T, visual_width]
        audio: Tensor,  # [B, T, audio_width]
        frames: Tensor,  # bool [B, T]
    ) -> Tensor:  # [B, classes]
        config = self.config
        B, T = frames.shape
        for name, x, width in (
            ("visual", visual, config.visual_width),
            ("audio", audio, config.audio_width),
        ):
            if tuple(x.shape) != (B, T, width):
                raise ValueError(f"{name} must be [{B}, {T}, {width}], got {tuple(x.shape)}")
        if config.max_len < T:
            raise ValueError(f"clips have {T} frames, max_len is {config.max_len}")
        pooled = []
        for block, x in ((self.visual, visual), (self.audio, audio)):
            features = block(x, frames)
            weights = frames.to(features.dtype)[..., None]
            pooled.append((features * weights).sum(1) / weights.sum(1).clamp(min=1))
        return self.head(torch.cat(pooled, -1))

    def config_dict(self) -> dict:
        """The configuration as plain data."""
        return dataclasses.asdict(self.config)
