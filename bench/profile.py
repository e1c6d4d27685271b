"""The profile command: a training step before and after the fused ops, where its time goes."""

from __future__ import annotations

import argparse
import functools
import importlib
import inspect
import math
import shlex
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from lam_kernels.training.atomic_write import atomic_write
from lam_kernels.user_error import UserError

from . import plots, record
from .report import png
from .trace import CATEGORIES, Profile, Subject, profiled

EPILOG = """\
examples
  python -m bench profile
      the demo's image classifier with a learned mask, one step of 256 digits: plain PyTorch, then
      the fused ops
  python -m bench profile my_model:make --steps 5 --output out/mine
      YOUR training step. my_model.py is looked for as python -m would. make() returns
        a function without arguments that does one step (a `model` attribute of it gets ranges),
        or (model, batch), or (model, batch, loss): forward, loss, backward and AdamW are then done
        for you; batch is a tensor, a tuple or a dict, loss takes the model's result
      make(fused=False) and make(fused=True) are called if it has such a parameter: before and
      after; otherwise lam_kernels.swap, where this version has it, makes the second
  python -m bench profile --device cuda --tool ncu
      CUDA: kernels under NVTX ranges in Nsight Compute (--tool proton: Triton's own profiler)

what it writes
  a table: milliseconds a step of each part, before and after, and the peak of tensors
  before.json.gz, after.json.gz   Chrome traces: open in https://ui.perfetto.dev
  profile.png                     the table as bars; memory.png: tensors over the step

how to read it
  Whole steps are timed without the profiler. Parts are the operations' own times in the profile, in
  the forward under the module they ran in, in the backward under what they are the gradient of.
  gaps: the step's time in which no operation ran. A share of attention near 0 says that fused
  attention cannot help this model.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("function", nargs="?", metavar="module:function", help="default: the demo's classifier")
    add("--steps", type=int, default=3, help="steps in the profile (default: 3)")
    add("--device", choices=("cpu", "cuda"), default="cpu")
    add("--threads", type=int, default=2, help="default: 2")
    add("--output", type=Path, default=Path("out/profile"), help="folder (default: out/profile)")
    add("--tool", choices=("ncu", "proton"), help="CUDA: another profiler around the same steps")
    add("--no-trace", action="store_true", help="write no Chrome trace")


def profile(args: argparse.Namespace) -> int:
    if args.steps < 1 or args.threads < 1:
        raise ValueError("--steps and --threads must be at least 1")
    if args.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: this torch sees no CUDA device")
    if args.tool and args.device != "cuda":
        raise ValueError(f"--tool {args.tool} needs --device cuda")
    torch.set_num_threads(args.threads)
    if args.tool == "ncu":
        return _under_ncu(args)
    made, notes = both(args.function, args.device)
    if args.tool == "proton":
        return _under_proton(args, made)
    profiles = []
    for name, subject in made.items():
        trace = None if args.no_trace else args.output / f"{name}.json.gz"
        profiles.append(profiled(name, subject, steps=args.steps, device=args.device, trace=trace))
    facts = record.facts(args.device)
    print(
        f"{args.function or 'the image classifier of the demo'}: {args.steps} steps, "
        f"{args.threads} threads, {facts.get('gpu') or facts['machine']}, torch {facts['torch']}, "
        f"commit {facts['commit']}"
    )
    print(table(profiles))
    if len(profiles) == 2:
        before, after = (p.wall_ms for p in profiles)
        print(f"the step takes {after / before:.2f} of what it took before")
    for note in notes:
        print(f"note: {note}")
    atomic_write(args.output / "profile.png", png(plots.parts(profiles, CATEGORIES)))
    figure = plots.memory_over_time(profiles)
    if figure is not None:
        atomic_write(args.output / "memory.png", png(figure))
    print(f"{args.output}: " + ", ".join(sorted(p.name for p in args.output.iterdir())))
    return 0


def both(name: str | None, device: str) -> tuple[dict[str, Subject], list[str]]:
    """({"before": ..., "after": ...}, notes); only "before" where there is no way to fuse."""
    function = load(name) if name else functools.partial(image_classifier, device=device)
    if "fused" in inspect.signature(function).parameters:
        return {
            "before": subject(_made(function, fused=False), device),
            "after": subject(_made(function, fused=True), device),
        }, []
    made = {"before": subject(_made(function), device)}
    try:
        swap = importlib.import_module("lam_kernels.swap").swap
    except (ImportError, AttributeError):
        return made, [
            "only before: the function has no parameter `fused`, and lam_kernels.swap is not part "
            "of this version"
        ]
    again = subject(_made(function), device)
    if again.module is None:
        return made, ["only before: the function returned a step without a `model` to swap"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that nothing was swapped is a note below
        report = swap(again.module)
    if not report.changed:
        return made, ["only before: swap() found nothing to change in this model"]
    return made | {"after": again}, [f"swap() changed {len(report.changed)} modules"]


def _made(function: Callable, **options):
    """What the function returns, from the same seed each time."""
    torch.manual_seed(0)
    return function(**options)


def image_classifier(fused: bool, device: str) -> Subject:
    """One step of the demo: a learned mask in every layer, 256 images of 8 x 8."""
    from lam_kernels.models.image_classifier import ImageClassifier, ImageClassifierConfig

    model = ImageClassifier(
        ImageClassifierConfig(classes=10), backend=None if fused else "reference", device=device
    ).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    images, labels = torch.randn(256, 1, 8, 8).to(device), torch.randint(10, (256,)).to(device)

    def step():
        loss = nn.functional.cross_entropy(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return Subject(step, model)


def load(name: str) -> Callable:
    """The function of `module:function`. UserError when there is none."""
    module_name, _, function_name = name.partition(":")
    if not (module_name and function_name) or module_name.startswith("."):
        raise UserError(f"{name!r}: expected module:function, for example my_model:make")
    sys.path.insert(0, "")  # a module in the current folder, as python -m would find it
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        raise UserError(f"{name!r}: {error}") from None
    finally:
        sys.path.remove("")
    function = getattr(module, function_name, None)
    if not callable(function):
        raise UserError(f"{name!r}: {module_name} has no function {function_name}")
    return function


def subject(made: object, device: str) -> Subject:
    """What a user's function returned: a step, or (model, batch), or (model, batch, loss).

    batch: a dict is passed by keyword, a tuple or list in order, anything else alone.
    loss: called with the model's result; without it the result's .loss, else its mean, is used.
    """
    if isinstance(made, Subject):
        return made
    if callable(made) and not isinstance(made, nn.Module):
        return Subject(made, getattr(made, "model", None))
    if not (isinstance(made, tuple) and len(made) in (2, 3) and isinstance(made[0], nn.Module)):
        raise UserError(
            f"the function returned {type(made).__name__}: expected a step to call, "
            "(model, batch) or (model, batch, loss)"
        )
    model, batch = made[0].to(device).train(), _moved(made[1], device)
    loss_of = made[2] if len(made) == 3 else _loss
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])

    def step():
        if isinstance(batch, dict):
            result = model(**batch)
        else:
            result = model(*batch) if isinstance(batch, tuple | list) else model(batch)
        loss = loss_of(result)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return Subject(step, model)


def _moved(batch, device: str):
    if isinstance(batch, Tensor):
        return batch.to(device)
    if isinstance(batch, dict):
        return {name: _moved(value, device) for name, value in batch.items()}
    if isinstance(batch, tuple | list):
        return type(batch)(_moved(value, device) for value in batch)
    return batch


def _loss(result) -> Tensor:
    loss = getattr(result, "loss", None)
    if loss is None and isinstance(result, tuple | list):
        result = result[0]
    loss = result if loss is None else loss
    if not isinstance(loss, Tensor):
        raise UserError(
            f"the model returned {type(result).__name__} without a loss: return "
            "(model, batch, loss) from your function"
        )
    return loss if loss.dim() == 0 else loss.float().mean()


# ---- other profilers, on CUDA


def _under_ncu(args: argparse.Namespace) -> int:
    """The same command within Nsight Compute, which reads the NVTX ranges."""
    output = args.output / "ncu"
    args.output.mkdir(parents=True, exist_ok=True)
    inner = [sys.executable, "-m", "bench", "profile", "--device", "cuda", "--steps", "1",
             "--no-trace", "--output", str(args.output)]  # fmt: skip
    inner += [args.function] if args.function else []
    command = ["ncu", "--nvtx", "--nvtx-include", "regex:bench\\..*/", "--set", "full", "-f", "-o",
               str(output), *inner]  # fmt: skip
    print(shlex.join(command), flush=True)
    try:
        return subprocess.run(command, cwd=record.tree()).returncode
    except FileNotFoundError:
        raise ValueError("--tool ncu: there is no ncu on the PATH (CUDA toolkit)") from None


def _under_proton(args: argparse.Namespace, made: dict[str, Subject]) -> int:
    """Triton's profiler around the steps: args.output/NAME.hatchet, for proton-viewer."""
    from .trace import ranges

    try:
        proton = importlib.import_module("triton.profiler")
    except ImportError:
        raise ValueError("--tool proton: this triton has no profiler") from None
    args.output.mkdir(parents=True, exist_ok=True)
    for name, subject in made.items():
        subject.step()
        session = proton.start(str(args.output / name), hook="triton")
        with ranges(subject.module, nvtx=True):
            for _ in range(args.steps):
                subject.step()
        torch.cuda.synchronize()
        proton.finalize(session)
        print(args.output / f"{name}.hatchet")
    return 0


# ---- what is printed


def table(profiles: list[Profile]) -> str:
    """A line a category, a column a profile: ms and share of the step."""
    from lam_kernels.training.text_table import text_table

    head = ["ms a step", *(p.name for p in profiles)]
    rows = []
    for kind in CATEGORIES:
        if any(p.parts_ms[kind] > 0 for p in profiles):
            cells = [f"{p.parts_ms[kind]:.2f} ({_share(p, kind):.0%})" for p in profiles]
            rows.append([kind, *cells])
    rows.append(["whole step", *(f"{p.wall_ms:.2f}" for p in profiles)])
    rows.append(["peak of tensors, MiB", *(f"{p.peak_mib:.1f}" for p in profiles)])
    return text_table(head, rows)


def _share(profile: Profile, kind: str) -> float:
    total = sum(profile.parts_ms.values())
    return profile.parts_ms[kind] / total if total else math.nan
