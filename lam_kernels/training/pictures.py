"""Pictures of a training run: loss curves, learned masks, attention beside an image."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from lam_kernels.low_rank_mask import LowRankMask
from lam_kernels.nn import LAMSelfAttention
from lam_kernels.optional_package import optional_package

from .atomic_write import atomic_write

# one colour a variant, told apart by colour-blind readers too (Okabe and Ito)
_COLOURS = ["#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00"]
_STYLES = ["-", "--", ":", "-.", "-", "--"]


def require_matplotlib() -> None:
    """Fails before hours of training, not after."""
    optional_package("matplotlib.figure", "drawing pictures")


def draw_loss_curves(
    path: Path,
    histories: dict[str, dict],
    *,
    measure: str = "accuracy",
    measure_name: str | None = None,
) -> None:
    """Training loss a step (left) and the measure an epoch (right) of each named history."""
    shown = measure_name or measure
    figure = _figure(10, 4)
    left, right = figure.subplots(1, 2)
    for index, (name, history) in enumerate(histories.items()):
        look = {
            "label": name,
            "color": _COLOURS[index % len(_COLOURS)],
            "linestyle": _STYLES[index % len(_STYLES)],
            "linewidth": 1.8,
        }
        left.plot(range(1, len(history["loss"]) + 1), history["loss"], **look)
        values = [100 * value for value in history[measure]]
        right.plot(range(1, len(values) + 1), values, **look)
    left.set(xlabel="step", ylabel="training loss", title="Training loss", ylim=(0, None))
    right.set(xlabel="epoch", ylabel=f"test {shown} (%)", title=f"Test {shown}")
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.legend(frameon=False)
    _save(figure, path)


def draw_sensitivity(path: Path, profiles: dict[str, Tensor], curves: dict[str, Tensor]) -> None:
    """Attention maps [T, T] of a clip by stream and kind (above), and each model's share of a
    frame's gradient that comes from its neighbours (below).
    """
    figure = _figure(3.6 * len(profiles), 7.5)
    grid = figure.add_gridspec(2, len(profiles), height_ratios=(1.2, 1))
    for column, (name, profile) in enumerate(profiles.items()):
        axes = figure.add_subplot(grid[0, column])
        shown = axes.imshow(profile.numpy(), cmap="viridis", vmin=0)
        title = f"{name} attention, mean of heads"
        axes.set(title=title, xlabel="key frame", ylabel="query frame")
        figure.colorbar(shown, ax=axes, fraction=0.046)
    axes = figure.add_subplot(grid[1, :])
    for index, (name, values) in enumerate(curves.items()):
        axes.plot(
            values.numpy(), label=name, color=_COLOURS[index // 2 % len(_COLOURS)],
            linestyle=_STYLES[index % 2], linewidth=1.4,
        )  # fmt: skip
    axes.axhline(0.5, color="grey", linewidth=0.8)
    axes.set(xlabel="frame", ylabel="sensitivity to neighbours", ylim=(0, 1.02))
    axes.legend(frameon=False, ncols=4, fontsize=8)
    _save(figure, path)


def draw_masks(path: Path, masks: list[Tensor], *, identity: float) -> None:
    """Learned masks [B, H, L, L], one a layer: their mean over the images (top), their spread
    between images (below).

    The colour scale is centred on `identity`, the value that changes nothing.
    """
    columns = len(masks)
    figure = _figure(2.2 + 2.9 * columns, 6.2)
    grid = figure.subplots(2, columns, squeeze=False)
    means = [mask.mean(dim=(0, 1)) for mask in masks]
    spreads = [mask.mean(dim=1).std(dim=0) for mask in masks]
    reach = max(1e-6, max(float((mean - identity).abs().max()) for mean in means))
    top = max(1e-6, max(float(spread.max()) for spread in spreads))
    for layer in range(columns):
        above = grid[0][layer].imshow(
            means[layer].numpy(), cmap="RdBu_r", vmin=identity - reach, vmax=identity + reach
        )
        below = grid[1][layer].imshow(spreads[layer].numpy(), cmap="viridis", vmin=0, vmax=top)
        grid[0][layer].set_title(f"layer {layer + 1}")
        for row in (0, 1):
            grid[row][layer].set(xlabel="key token", ylabel="query token" if layer == 0 else "")
    figure.colorbar(above, ax=list(grid[0]), label=f"mean of M ({identity:g}: no effect)")
    figure.colorbar(below, ax=list(grid[1]), label="spread of M between images")
    figure.suptitle("Learned attention masks")
    _save(figure, path)


def draw_attention(
    path: Path,
    images: Tensor,  # [n, C, S, S] in [-1, 1]
    names: list[str],
    without: list[Tensor],  # a layer: weights [n, H, tokens, tokens]
    with_mask: list[Tensor],
    grid_size: int,
) -> None:
    """For each image: the image, then for each layer how much attention each patch receives,
        without and with LAM.

    Mean over heads and queries, times the number of tokens: 1 is an even share. A class token is
        left out.
    """
    rows, layers = len(images), len(with_mask)
    figure = _figure(1.9 + 3.3 * layers, 0.7 + 1.5 * rows)
    axes = figure.subplots(rows, 1 + 2 * layers, squeeze=False)
    received = [
        [_received(weights, grid_size) for weights in kind] for kind in (without, with_mask)
    ]
    # a few pixels take most of it: the brightest 1 % share the last colour, or nothing else would
    # show
    high = float(torch.stack([torch.stack(kind) for kind in received]).flatten().quantile(0.99))
    for row in range(rows):
        image = ((images[row] + 1) / 2).clamp(0, 1).permute(1, 2, 0).numpy()
        axes[row][0].imshow(
            image if image.shape[-1] == 3 else image[..., 0], cmap="gray", vmin=0, vmax=1
        )
        axes[row][0].set_ylabel(names[row])
        for layer in range(layers):
            for kind in (0, 1):
                cell = axes[row][1 + 2 * layer + kind]
                shown = cell.imshow(
                    received[kind][layer][row].numpy(), cmap="magma", vmin=0, vmax=high
                )
                if row == 0:
                    cell.set_title(
                        f"layer {layer + 1}\n{('without', 'with')[kind]} LAM", fontsize=9
                    )
    axes[0][0].set_title("image", fontsize=9)
    for cell in axes.flat:
        cell.set(xticks=[], yticks=[])
    figure.colorbar(
        shown, ax=axes.ravel().tolist(), label="attention received (1: even share)", extend="max"
    )
    _save(figure, path)


@torch.no_grad()
def attention_maps(
    model: nn.Module, inputs: Tensor, *, masked: bool = True
) -> tuple[list[Tensor], list[Tensor]]:
    """(weights [B, H, L, L], masks [B, 1|H, L, L]) of every LAMSelfAttention while model(inputs)
    runs, in order.

    masked=False: the weights that the same layer, with the same input, would have without its mask.
    """
    weights: list[Tensor] = []
    masks: list[Tensor] = []

    def look(module: LAMSelfAttention, args, kwargs) -> None:
        tokens = kwargs.get("mask_input")
        mask = kwargs.get("mask")
        if mask is None and module.lam is not None:
            mask = module.lam(args[0] if tokens is None else tokens)
        if isinstance(mask, LowRankMask):
            mask = mask.dense()
        if mask is not None:
            masks.append(mask.float().cpu())
        shown = mask if masked else None
        weights.append(module.attention_weights(args[0], shown, kwargs.get("key_mask")).cpu())

    hooks = [
        module.register_forward_pre_hook(look, with_kwargs=True)
        for module in model.modules()
        if isinstance(module, LAMSelfAttention)
    ]
    was_training = model.training
    try:
        model.eval()
        model(inputs)
    finally:
        model.train(was_training)
        for hook in hooks:
            hook.remove()
    return weights, masks


def _received(weights: Tensor, grid_size: int) -> Tensor:  # [n, H, L, L] -> [n, grid, grid]
    received = weights.mean(dim=(1, 2)) * weights.shape[-1]
    return received[:, -(grid_size**2) :].unflatten(1, (grid_size, grid_size))


def _figure(width: float, height: float):
    figure_module = optional_package("matplotlib.figure", "drawing pictures")
    return figure_module.Figure(figsize=(width, height), dpi=130, layout="constrained")


def _save(figure, path: Path) -> None:
    atomic_write(path, lambda part: figure.savefig(part, format="png"))
