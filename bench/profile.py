"""The profile command: a training step before and after the fused ops, where its time goes."""

from __future__ import annotations

import argparse
import contextlib
import importlib
import inspect
import math
import os
import shlex
import subprocess
import sys
import traceback
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from lam_kernels.training.atomic_write import atomic_write
from lam_kernels.user_error import UserError

from . import plots, record, timing
from .measure import one_line
from .report import png
from .trace import CATEGORIES, Profile, Subject, profiled, whole_steps

EPILOG = """\
examples
  python -m bench profile
      the demo's image classifier with a learned mask, one step of 256 digits: plain PyTorch, then
      the fused ops
  python -m bench profile my_model:make --steps 5 --output out/mine
      YOUR training step. my_model.py is looked for as python -m would; from a folder of your own:
      PYTHONPATH=<this checkout> python -m bench profile my_model:make. make() returns
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
  Whole steps are timed without the profiler, before and after in turns; those that other work
  disturbed are dropped, and the ratio has its 20 and 80 percentiles. Parts are the operations' own
  times in the profile, in the forward under the module they ran in, in the backward under what they
  are the gradient of.
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
    notes: list[str] = []
    made = both(args.function, args.device, notes)
    if args.tool == "proton":
        return _under_proton(args, made)
    profiles, written = [], []
    for group in made:
        times = whole_steps(group, args.steps, args.device)
        for name, subject in group.items():
            trace = None if args.no_trace else args.output / f"{name}.json.gz"
            written += [trace] if trace else []
            profiles.append(
                profiled(name, subject, steps=args.steps, device=args.device, trace=trace,
                         times=times[name])
            )  # fmt: skip
    facts = record.facts(args.device)
    print(
        f"{args.function or 'the image classifier of the demo'}: {args.steps} steps, "
        f"{args.threads} threads, {facts.get('gpu') or facts['machine']}, torch {facts['torch']}, "
        f"commit {facts['commit']}"
    )
    print(table(profiles))
    print(timed(profiles, in_turns=len(times) == 2))
    for note in notes:
        print(f"note: {note}")
    atomic_write(args.output / "profile.png", png(plots.parts(profiles, CATEGORIES)))
    written.append(args.output / "profile.png")
    figure = plots.memory_over_time(profiles)
    if figure is not None:
        atomic_write(args.output / "memory.png", png(figure))
        written.append(args.output / "memory.png")
    print(f"{args.output}: " + ", ".join(sorted(path.name for path in written)))
    return 0


def timed(profiles: list[Profile], in_turns: bool) -> str:
    """How the whole steps were timed, and how they compare where they were timed in turns."""
    lines = []
    if len(profiles) == 2:
        before, after = (p.times for p in profiles)
        low, middle, high = timing.ratio(after, before)
        spread = f" ({low:.2f} .. {high:.2f})" if in_turns and math.isfinite(low) else ""
        if not in_turns:
            middle = profiles[1].wall_ms / profiles[0].wall_ms
        lines.append(f"the step takes {middle:.2f}{spread} of what it took before")
    counts = [f"{len(p.times.used)} ({p.name})" for p in profiles]
    text = "whole steps: " + " and ".join(counts) + " samples"
    dropped = sum(len(p.times.disturbed) for p in profiles if p.times.filtered)
    text += f", {dropped} dropped because other work ran" if dropped else ""
    lines.append(text)
    for one in profiles:
        if not one.times.filtered or len(one.times.clean) < timing.LEAST_CLEAN:
            lines.append(f"note: {one.name} has fewer than 3 whole steps without other load: ~")
        if one.waited > timing.DISTURBED_SHARE:
            lines.append(
                f"note: in the profile of {one.name} other work kept our threads waiting, "
                f"{one.waited:.0%} of its time: its parts are too long"
            )
    return "\n".join(lines)


def both(name: str | None, device: str, notes: list[str]) -> Iterator[dict[str, Subject]]:
    """Before and after, in one group to be timed in turns; else "before" alone and a note why.

    A function may return the same model again: "after" is then made when "before" was measured.
    """
    if not name:
        subjects = {}
        for when in ("before", "after"):
            torch.manual_seed(0)
            subjects[when] = image_classifier(when == "after", device)
        yield subjects
        return
    function = load(name)
    fusable = "fused" in _parameters(function)
    plain, fused = ({"fused": False}, {"fused": True}) if fusable else ({}, {})
    group = {"before": _first_step(name, _made(name, function, device, **plain))}
    again = _made(name, function, device, **fused)
    if again.module is not None and again.module is group["before"].module:
        notes.append("the function returns one model each time: before and after were not timed in "
                     "turns")  # fmt: skip
        yield {"before": _made(name, function, device, **plain)}
        again = _made(name, function, device, **fused)
        group = {}
    if not fusable and (why := _swapped(again, notes)):
        notes.append(f"only before: {why}")
    else:
        group["after"] = _first_step(name, again)
    if group:
        yield group


def _swapped(subject: Subject, notes: list[str]) -> str:
    """Puts the fused ops into the subject's model; why it cannot, "" when it could."""
    try:
        swap = importlib.import_module("lam_kernels.swap").swap
    except (ImportError, AttributeError):
        return (
            "the function has no parameter `fused`, and lam_kernels.swap is not part of this "
            "version"
        )
    if subject.module is None:
        return "the function returned a step without a `model` to swap"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that nothing was swapped is a note
        report = swap(subject.module)
    if not report.changed:
        return "swap() found nothing to change in this model"
    notes.append(f"swap() changed {len(report.changed)} modules")
    return ""


@contextlib.contextmanager
def _users_code(what: str) -> Iterator[None]:
    """What a user's own code raises is a sentence that says where."""
    try:
        yield
    except UserError:
        raise
    except (Exception, SystemExit) as error:
        raise UserError(f"{what} raised {one_line(error)}{_where(error)}") from error


def _where(error: BaseException) -> str:
    """The innermost line that is neither this file's nor a package's."""
    if isinstance(error, SyntaxError):  # its text says where
        return ""
    frames = [(frame.filename, frame.lineno) for frame in traceback.extract_tb(error.__traceback__)]
    own = [f for f in frames if f[0] != __file__ and "site-packages" not in f[0] and f[0][0] != "<"]
    return f" ({Path(own[-1][0]).name}, line {own[-1][1]})" if own else ""


def _parameters(function: Callable) -> Collection[str]:
    try:
        return inspect.signature(function).parameters
    except (TypeError, ValueError):  # some functions that are not written in Python have none
        return ()


def _made(name: str, function: Callable, device: str, **options) -> Subject:
    """What the function returns, from the same seed each time."""
    torch.manual_seed(0)
    with _users_code(name):
        return subject(function(**options), device)


def _first_step(name: str, made: Subject) -> Subject:
    with _users_code(f"a step of {name}"):
        made.step()
    return made


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
        with _users_code(f"importing {module_name}"):
            module = importlib.import_module(module_name)
    finally:
        if "" in sys.path:
            sys.path.remove("")
    function = getattr(module, function_name, None)
    if not callable(function):
        raise UserError(f"{name!r}: {module_name} has no function {function_name}")
    return function


def subject(made: object, device: str) -> Subject:
    """What a user's function returned: a step, or (model, batch), or (model, batch, loss).

    batch: a mapping is passed by keyword, a tuple or list in order, anything else alone.
    loss: called with the model's result; without it the result's .loss, else its mean, is used.
    """
    if isinstance(made, Subject):
        return made
    if callable(made) and not isinstance(made, nn.Module):
        model = getattr(made, "model", None)
        return Subject(made, model if isinstance(model, nn.Module) else None)
    if not (isinstance(made, tuple) and len(made) in (2, 3) and isinstance(made[0], nn.Module)):
        raise UserError(
            f"the function returned {type(made).__name__}: expected a step to call, "
            "(model, batch) or (model, batch, loss)"
        )
    model, batch = made[0].to(device).train(), _moved(made[1], device)
    loss_of = made[2] if len(made) == 3 else _loss
    if not callable(loss_of):
        raise UserError(f"the function returned a loss that is no function: {loss_of!r:.60}")
    trained = [p for p in model.parameters() if p.requires_grad]
    if not trained:
        raise UserError("the model that the function returned has no parameter to train")
    optimizer = torch.optim.AdamW(trained)

    def step():
        if isinstance(batch, Mapping):
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
    if isinstance(batch, Mapping):  # a tokenizer's result is one, and no dict
        return {name: _moved(value, device) for name, value in batch.items()}
    if isinstance(batch, tuple | list):
        moved = [_moved(value, device) for value in batch]
        return type(batch)(*moved) if hasattr(batch, "_fields") else type(batch)(moved)
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
    args.output.mkdir(parents=True, exist_ok=True)
    output = args.output / "ncu"
    inner = [sys.executable, "-m", "bench", "profile", "--device", "cuda", "--steps", "1",
             "--threads", str(args.threads), "--no-trace", "--output", str(args.output),
             *([args.function] if args.function else [])]  # fmt: skip
    command = ["ncu", "--nvtx", "--nvtx-include", "regex:bench\\..*/", "--set", "full", "-f", "-o",
               str(output), *inner]  # fmt: skip
    print(shlex.join(command), flush=True)
    try:
        # in the folder that the user's module and the output are relative to
        path = os.pathsep.join(filter(None, [str(record.tree()), os.environ.get("PYTHONPATH")]))
        return subprocess.run(command, env=os.environ | {"PYTHONPATH": path}).returncode
    except FileNotFoundError:
        raise ValueError("--tool ncu: there is no ncu on the PATH (CUDA toolkit)") from None


def _under_proton(args: argparse.Namespace, made: Iterable[dict[str, Subject]]) -> int:
    """Triton's profiler around the steps: args.output/NAME.hatchet, for proton-viewer."""
    from .trace import ranges

    try:
        proton = importlib.import_module("triton.profiler")
    except ImportError:
        raise ValueError("--tool proton: this triton has no profiler") from None
    args.output.mkdir(parents=True, exist_ok=True)
    for name, subject in (item for group in made for item in group.items()):
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
    rows.append(["whole step", *map(_whole, profiles)])
    rows.append(["  20 .. 80 %", *("{0:.2f} .. {2:.2f}".format(*p.spread_ms) for p in profiles)])
    rows.append(["peak of tensors, MiB", *(f"{p.peak_mib:.1f}" for p in profiles)])
    return text_table(head, rows)


def _whole(profile: Profile) -> str:
    return ("~" if len(profile.times.clean) < timing.LEAST_CLEAN else "") + f"{profile.wall_ms:.2f}"


def _share(profile: Profile, kind: str) -> float:
    total = sum(profile.parts_ms.values())
    return profile.parts_ms[kind] / total if total else math.nan
