"""python -m lam_kernels: info | train | evaluate | analyse TASK | swap MODULE:FUNCTION."""

from __future__ import annotations

import argparse
import errno
import importlib
import os
import pkgutil
import sys

from lam_kernels.training.interruption import EXIT_CODE
from lam_kernels.user_error import UserError

_EPILOG = """\
examples:
  python -m lam_kernels info
      what this installation can run, and why not the rest
  python -m lam_kernels train image-classification
      the demo: a small vision transformer on 1,797 real handwritten digits, with plain attention,
      with a learned mask in plain PyTorch, and with the fused kernels; a table and pictures under
      out/ (about two minutes on two cores)
  python -m lam_kernels train image-classification --data FOLDER --variant lam-fused
      the same model on your images (one sub-folder a class)
  python -m lam_kernels evaluate image-classification --checkpoint FILE
      reads a checkpoint back and measures it
  python -m lam_kernels swap my_project.models:build
      puts the fused ops into your model, checks outputs and gradients, times a training step
  python -m lam_kernels train scene-classification
      tags of video clips: global attention beside global and local, on real sequences
  python -m lam_kernels analyse scene-classification --checkpoint FILE
      how much each frame depends on its neighbours, and a clip's attention maps
"""


def main(argv: list[str] | None = None) -> int:
    """Runs one command; the exit code is 0, 2 (one sentence on stderr says what to put right) or
    130 (Ctrl-C).
    """
    argv = sys.argv[1:] if argv is None else argv
    args = _parser().parse_args(argv)
    args.argv = argv[2:]
    try:
        code = args.run(args)
        sys.stdout.flush()  # a full disk or a closed pipe is found here, where it can be told
        return code
    except UserError as error:
        return _refuse(str(error))
    except KeyboardInterrupt:  # before or after the loop, which has its own answer
        print("\nlam_kernels: interrupted", file=sys.stderr)
        return EXIT_CODE
    except OSError as error:
        if error.filename is not None:
            return _refuse(f"{error.filename}: {error.strerror}")
        if error.errno not in (errno.EPIPE, errno.ENOSPC, errno.EIO):
            raise
        # what is still buffered cannot be written either, and Python would try so at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return _refuse(f"standard output: {error.strerror}")


def info(args: argparse.Namespace) -> int:
    """Prints versions, the instruction set of this CPU and what each backend says."""
    import torch

    import lam_kernels

    print(f"lam_kernels {lam_kernels.__version__}")
    threads = torch.get_num_threads()
    print(f"Python {sys.version.split()[0]}, torch {torch.__version__}, {threads} threads")
    print(f"CPU: {_cpu_level()}")
    if torch.cuda.is_available():
        print(f"GPU: {torch.cuda.get_device_name()}")
    print("backends:")
    for name, reason in lam_kernels.backends().items():
        print(f"  {name:<10} {reason or 'available'}")
    return 0


def _cpu_level() -> str:
    """The instruction set that the kernels use here, or why there is none."""
    from lam_kernels.ops import _native

    if _native.unavailable():
        return f"no kernels ({_native.unavailable()})"
    forced = os.environ.get("LAM_CPU_LEVEL")
    chosen = f"forced by LAM_CPU_LEVEL={forced}" if forced else "picked at run time"
    return f"{_native.level()} ({chosen} of {', '.join(_native.available_levels())})"


def _refuse(sentence: str) -> int:
    print(f"lam_kernels: {sentence}", file=sys.stderr)
    return 2


def _tasks() -> dict[str, object]:
    from lam_kernels.training import tasks

    return {
        module.name.replace("_", "-"): importlib.import_module(f"{tasks.__name__}.{module.name}")
        for module in pkgutil.iter_modules(tasks.__path__)
    }


def _parser() -> argparse.ArgumentParser:
    from lam_kernels.swap import command as swap_command

    parser = argparse.ArgumentParser(
        prog="python -m lam_kernels",
        description="Attention with learned masks: what is installed, and the task models.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    command = commands.add_parser(
        "info", help="what this installation can run", description=info.__doc__
    )
    command.set_defaults(run=info)
    tasks = _tasks()
    for verb, text in (("train", "train a task model"), ("evaluate", "measure a checkpoint")):
        command = commands.add_parser(verb, help=text, description=f"{text.capitalize()}.")
        choices = command.add_subparsers(metavar="TASK", required=True)
        for name, task in tasks.items():
            if not hasattr(task, verb):
                continue  # a demo that writes no checkpoint
            options = choices.add_parser(
                name,
                help=task.SUMMARY,
                description=task.SUMMARY,
                formatter_class=argparse.RawDescriptionHelpFormatter,
            )
            getattr(task, f"add_{verb}_arguments")(options)
            options.set_defaults(run=getattr(task, verb))
    command = commands.add_parser(
        "swap",
        help=swap_command.SUMMARY,
        description=f"{swap_command.SUMMARY.capitalize()}.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    swap_command.add_arguments(command)
    command = commands.add_parser("analyse", help="look into a trained model")
    choices = command.add_subparsers(metavar="TASK", required=True)
    for name, task in tasks.items():
        if hasattr(task, "analyse"):
            options = choices.add_parser(name, help=task.analyse.__doc__)
            task.add_analyse_arguments(options)
            options.set_defaults(run=task.analyse)
    return parser


if __name__ == "__main__":
    sys.exit(main())
