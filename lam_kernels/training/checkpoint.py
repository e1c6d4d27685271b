"""Checkpoints: one safetensors file that holds everything an exact resume needs, and no pickle.

Tensors: `model/<parameter>`, `optimizer/<parameter>/<slot>`, `rng/torch`. The header's metadata
holds `format`, `version`, `task`, `epoch`, and as JSON `config` (what builds the model and the run)
and `history` (what was measured).
A file is written whole or not at all, and is checked before anything in it is used: header,
version, task, JSON, names, shapes and dtypes of every tensor.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from lam_kernels.optional_package import optional_package
from lam_kernels.user_error import UserError

from .atomic_write import atomic_write

FORMAT = "lam_kernels.checkpoint"
VERSION = 1


@dataclass
class Checkpoint:
    """A file that was read and is well formed. Use `into` to put it in a model."""

    path: Path
    task: str
    epoch: int
    config: dict
    history: dict
    tensors: dict[str, Tensor]

    def shapes(self, prefix: str) -> dict[str, tuple[int, ...]]:
        return {
            name.removeprefix(prefix): tuple(tensor.shape)
            for name, tensor in self.tensors.items()
            if name.startswith(prefix)
        }

    def into(self, model: nn.Module) -> None:
        """Loads the parameters after a check of names, shapes and dtypes."""
        own = model.state_dict()
        self.check_model(own)
        state = {name: self.tensors[f"model/{name}"] for name in own}
        model.load_state_dict(state)

    def check_model(self, own: dict[str, Tensor]) -> None:
        """`own` may live on the meta device: the check needs no memory."""
        given = self.shapes("model/")
        for name, tensor in own.items():
            if name not in given:
                raise UserError(f"{self.path}: the record model/{name} is missing")
            self._check(f"model/{name}", tuple(tensor.shape), tensor.dtype)
        for name in given:
            if name not in own:
                raise UserError(
                    f"{self.path}: the record model/{name} does not belong to this model"
                )

    def into_optimizer(self, optimizer: torch.optim.Optimizer, model: nn.Module) -> None:
        """Loads the optimizer's slots; its options stay those it was built with."""
        names = {parameter: name for name, parameter in model.named_parameters()}
        order = [p for group in optimizer.param_groups for p in group["params"]]
        slots: dict[str, dict[str, Tensor]] = {names[p]: {} for p in order}
        for record, tensor in self.tensors.items():
            if not record.startswith("optimizer/"):
                continue
            name, _, slot = record.removeprefix("optimizer/").rpartition("/")
            if name not in slots:
                raise UserError(f"{self.path}: the record {record} belongs to no parameter")
            slots[name][slot] = tensor
        expected = {"exp_avg", "exp_avg_sq", "step"}
        for parameter in order:
            name = names[parameter]
            if set(slots[name]) != expected:
                raise UserError(
                    f"{self.path}: the records optimizer/{name}/* are {sorted(slots[name])}, "
                    f"expected {sorted(expected)}"
                )
            for slot in expected:
                shape = () if slot == "step" else tuple(parameter.shape)
                dtype = torch.float32 if slot == "step" else parameter.dtype
                self._check(f"optimizer/{name}/{slot}", shape, dtype)
        state = {index: slots[names[p]] for index, p in enumerate(order)}
        groups = optimizer.state_dict()["param_groups"]
        optimizer.load_state_dict({"state": state, "param_groups": groups})

    def into_rng(self) -> None:
        """Sets torch's CPU generator to where it was."""
        self._check("rng/torch", tuple(torch.get_rng_state().shape), torch.uint8)
        try:
            torch.set_rng_state(self.tensors["rng/torch"])
        except RuntimeError:
            raise UserError(f"{self.path}: the record rng/torch is not a generator state") from None

    def _check(self, record: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        tensor = self.tensors.get(record)
        if tensor is None:
            raise UserError(f"{self.path}: the record {record} is missing")
        if tuple(tensor.shape) != shape or tensor.dtype != dtype:
            raise UserError(
                f"{self.path}: the record {record} is {tensor.dtype} {list(tensor.shape)}, "
                f"expected {dtype} {list(shape)}"
            )


def save_checkpoint(
    path: Path,
    *,
    task: str,
    epoch: int,
    config: dict,
    history: dict,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
) -> None:
    """Writes one file that `load_checkpoint` reads; the old file stays until the new one is
    complete.
    """
    safetensors = optional_package("safetensors.torch", "writing a checkpoint")
    names = {parameter: name for name, parameter in model.named_parameters()}
    tensors = {f"model/{name}": tensor for name, tensor in model.state_dict().items()}
    for parameter, slots in optimizer.state.items():
        for slot, value in slots.items():
            tensors[f"optimizer/{names[parameter]}/{slot}"] = value
    tensors["rng/torch"] = torch.get_rng_state()
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    metadata = {
        "format": FORMAT,
        "version": str(VERSION),
        "task": task,
        "epoch": str(epoch),
        "config": json.dumps(config),
        "history": json.dumps(history),
    }
    atomic_write(path, lambda part: safetensors.save_file(tensors, part, metadata))


def load_checkpoint(path: str | Path, task: str) -> Checkpoint:
    """Reads and checks a checkpoint; a UserError of one sentence for anything that is not one."""
    path = Path(path)
    safetensors = optional_package("safetensors", "reading a checkpoint")
    if not path.exists():
        raise UserError(f"{path}: there is no such checkpoint")
    if not path.is_file():
        raise UserError(f"{path}: a checkpoint is a file, this is a folder or a device")
    with path.open("rb") as file:
        start = file.read(9)
    # a header's length may begin with any byte, so the "{" that follows it decides first
    if start[8:9] != b"{" and (start[:2] == b"PK" or start[:1] == b"\x80"):
        raise UserError(
            f"{path}: this is a pickle (torch.save) file, which could run code when read; "
            "only safetensors checkpoints written by this package are read"
        )
    if len(start) < 9 or start[8:9] != b"{":
        raise UserError(f"{path}: this is not a safetensors checkpoint")
    if 8 + int.from_bytes(start[:8], "little") > path.stat().st_size:
        raise UserError(f"{path}: the checkpoint is truncated (its header is longer than the file)")
    try:
        with safetensors.safe_open(path, framework="pt", device="cpu") as file:
            metadata = file.metadata() or {}
            _check_metadata(path, metadata, task)
            # clones: the file may be replaced while its memory map would still be in use
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
    except safetensors.SafetensorError as error:
        reason = str(error).partition("\n")[0]
        raise UserError(f"{path}: the checkpoint is truncated or damaged ({reason})") from None
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise UserError(f"{path}: the record {name} holds NaN or infinity")
    return Checkpoint(
        path,
        task,
        int(metadata["epoch"]),
        _json_object(path, metadata, "config"),
        _json_object(path, metadata, "history"),
        tensors,
    )


def _check_metadata(path: Path, metadata: dict[str, str], task: str) -> None:
    if metadata.get("format") != FORMAT:
        raise UserError(f"{path}: this safetensors file is not a checkpoint of this package")
    if metadata.get("version") != str(VERSION):
        raise UserError(
            f"{path}: the checkpoint has format version {metadata.get('version')!r}, "
            f"this package reads version {VERSION}"
        )
    if metadata.get("task") != task:
        raise UserError(
            f"{path}: the checkpoint is of the task {metadata.get('task')!r}, not {task!r}"
        )
    epoch = metadata.get("epoch", "")
    if not (epoch.isascii() and epoch.isdigit() and len(epoch) < 10):
        raise UserError(f"{path}: the record epoch is {epoch[:20]!r}, expected a number")


def _json_object(path: Path, metadata: dict[str, str], record: str) -> dict:
    def not_a_number(text: str) -> float:
        raise ValueError(text)

    try:
        value = json.loads(metadata.get(record, ""), parse_constant=not_a_number)
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise UserError(f"{path}: the record {record} is not a JSON object")
    return value


def finite_list(checkpoint: Checkpoint, record: str) -> list[float]:
    """A list of finite numbers from the history, checked."""
    value = checkpoint.history.get(record)
    if not isinstance(value, list) or not all(
        isinstance(x, int | float) and math.isfinite(x) for x in value
    ):
        raise UserError(f"{checkpoint.path}: the record history.{record} is not a list of numbers")
    return value
