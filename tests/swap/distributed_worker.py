"""One of two processes of test_distributed.py: gradients under DDP, FSDP2 and accelerate beside
those of one process. Prints one JSON line: case -> largest relative difference."""

from __future__ import annotations

import contextlib
import copy
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

import torch
import torch.distributed as dist
from compared import floats, wake
from torch import nn

from lam_kernels.nn import LAMEncoder
from lam_kernels.swap import LearnedMask, swap

WORLD = 2


def gradients(model, batch, share: slice) -> dict[str, torch.Tensor]:
    """Of the mean over samples, of this process's share."""
    torch.manual_seed(3)
    total = next(v.shape[0] for v in batch.values())
    part = {k: v[share] for k, v in batch.items()}
    outputs = [t for t in floats(model(**part)) if t.requires_grad]
    count = next(v.shape[0] for v in part.values())
    per_sample = [t for t in outputs if t.dim() > 1 and t.shape[0] == count]
    loss = sum(t.square().sum() for t in per_sample) / count
    model.zero_grad()
    loss.backward()
    assert total % WORLD == 0
    found = {}
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            gradient = parameter.grad
            gradient = gradient.full_tensor() if hasattr(gradient, "full_tensor") else gradient
            found[name.replace("module.", "")] = gradient.clone()
    return found


def difference(found: dict, expected: dict) -> float:
    """The largest, in units of 1 + the largest value: rtol and atol in one, as torch.testing has
    them (a key bias has gradient 0 by symmetry, its roundings are compared with nothing)."""
    assert found.keys() >= expected.keys()
    return max(
        float((found[name] - value).abs().max() / (1 + value.abs().max()))
        for name, value in expected.items()
    )


def in_two(model, batch, how: str):
    rank = dist.get_rank()
    half = next(v.shape[0] for v in batch.values()) // WORLD
    share = slice(rank * half, (rank + 1) * half)
    if how == "ddp":
        wrapped = nn.parallel.DistributedDataParallel(model, find_unused_parameters=True)
    elif how == "accelerate":
        from accelerate import Accelerator, DistributedDataParallelKwargs

        unused = DistributedDataParallelKwargs(find_unused_parameters=True)
        wrapped = Accelerator(cpu=True, kwargs_handlers=[unused]).prepare(model)
        assert isinstance(wrapped, nn.parallel.DistributedDataParallel)
    else:
        from torch.distributed.fsdp import fully_shard

        mesh = dist.init_device_mesh("cpu", (WORLD,))
        for module in model.modules():
            if isinstance(module, nn.TransformerEncoderLayer):
                fully_shard(module, mesh=mesh)
        wrapped = fully_shard(model, mesh=mesh)
    return gradients(wrapped, batch, share)


def lam_encoder(scope: str):
    torch.manual_seed(0)
    model = wake(LAMEncoder(2, 16, 4, 6, scope=scope, mask_depth=2))
    key_mask = torch.ones(4, 6, dtype=torch.bool)
    key_mask[1, 4:] = False
    return model, {"x": torch.randn(4, 6, 16), "key_mask": key_mask}


def torch_encoder():
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 4, 24, 0.0, batch_first=True)
    padding = torch.zeros(4, 6, dtype=torch.bool)
    padding[1, 4:] = True
    batch = {"src": torch.randn(4, 6, 16), "src_key_padding_mask": padding}
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False), batch


def main() -> None:
    dist.init_process_group("gloo")
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    torch.exp(torch.linspace(-20, 5, 200_000))
    torch.exp(torch.linspace(-20, 5, 200_000))
    everything = slice(None)
    results: dict[str, float] = {}

    for scope in ("layer", "global"):
        for how in ("ddp", "fsdp"):
            model, batch = lam_encoder(scope)
            expected = gradients(copy.deepcopy(model), batch, everything)
            results[f"LAMEncoder {scope} {how}"] = difference(in_two(model, batch, how), expected)

    for mask in (None, LearnedMask(8), LearnedMask(8, scope="global")):
        for how in ("ddp", "fsdp"):
            model, batch = torch_encoder()
            if mask is None:  # against the untouched model
                expected = gradients(copy.deepcopy(model), batch, everything)
                swap(model)
            else:
                swap(model, learned_mask=mask)
                wake(model)
                expected = gradients(copy.deepcopy(model), batch, everything)
            name = f"nn.TransformerEncoder {mask.scope if mask else 'plain'} {how}"
            results[name] = difference(in_two(model, batch, how), expected)
    model, batch = torch_encoder()
    expected = gradients(copy.deepcopy(model), batch, everything)
    wrapped = nn.parallel.DistributedDataParallel(model)
    swap(wrapped)  # after DDP: nothing is added, so nothing is missed
    share = slice(dist.get_rank() * 2, dist.get_rank() * 2 + 2)
    results["nn.TransformerEncoder swapped after ddp"] = difference(
        gradients(wrapped, batch, share), expected
    )

    with contextlib.suppress(ModuleNotFoundError):
        from timm_models import build as timm_model

        for name in ("vit", "swin v2"):
            model, batch, _ = timm_model(name)
            expected = gradients(copy.deepcopy(model), batch, everything)
            swap(model)
            results[f"timm {name} ddp"] = difference(in_two(model, batch, "ddp"), expected)
    with contextlib.suppress(ModuleNotFoundError):
        import transformers  # noqa: F401
        from tiny_models import batch as batch_of
        from tiny_models import build

        for name in sys.argv[1].split(","):
            model, batch = build(name, "sdpa").double().eval(), batch_of(name)
            batch = {
                k: v.double() if v.is_floating_point() else v
                for k, v in batch.items()
                if isinstance(v, torch.Tensor)
            }
            expected = gradients(copy.deepcopy(model), batch, everything)
            swap(model)
            results[f"{name} ddp"] = difference(in_two(model, batch, "ddp"), expected)
    with contextlib.suppress(ModuleNotFoundError):
        import accelerate  # noqa: F401

        model, batch = torch_encoder()
        expected = gradients(copy.deepcopy(model), batch, everything)
        swap(model)
        results["accelerate"] = difference(in_two(model, batch, "accelerate"), expected)

    if dist.get_rank() == 0:
        print(json.dumps(results), flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
