"""Variants of a model beside each other, each trained in a process of its own."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import lam_kernels

from .interruption import EXIT_CODE, further_interrupts_ignored
from .text_table import text_table


def run_process(task: str, options: list[str]) -> int:
    """`train task` with these options in a process of its own; its exit code.

    A Ctrl-C reaches that process once, and this one waits for it to end.
    """
    root = str(Path(lam_kernels.__file__).resolve().parent.parent)
    paths = [root, *filter(None, [os.environ.get("PYTHONPATH")])]
    # threads that spin while another program wants the core would time the other program
    surroundings = {"OMP_WAIT_POLICY": "PASSIVE", **os.environ}
    process = subprocess.Popen(
        [sys.executable, "-m", "lam_kernels", "train", task, *options],
        env={**surroundings, "PYTHONPATH": os.pathsep.join(paths)},
    )
    try:
        code = process.wait()
    except KeyboardInterrupt:
        with further_interrupts_ignored():
            try:
                process.wait(timeout=1)  # Ctrl-C in a terminal reaches both processes
            except subprocess.TimeoutExpired:
                process.send_signal(signal.SIGINT)
                process.wait()
        return EXIT_CODE
    return code if code >= 0 else 128 - code


def results_table(results: list[dict]) -> str:
    """One row a variant; a result holds variant, accuracy, seconds_per_step and the two of
    PeakMemory.
    """
    rows = [
        [
            r["variant"],
            f"{r['accuracy']:.1%}",
            f"{r['seconds_per_step']:.3f}",
            f"{r['peak_mib']:.0f} MiB",
            f"{r['above_start_mib']:.0f} MiB",
        ]
        for r in results
    ]
    header = ["attention", "test accuracy", "s per step", "peak memory", "of it for training"]
    return text_table(header, rows)


def gains(results: list[dict]) -> str:
    """The fused variant (last) beside the reference path and plain attention."""
    plain, reference, fused = results
    lines = []
    for other in (reference, plain):
        speed = other["seconds_per_step"] / fused["seconds_per_step"]
        memory = fused["above_start_mib"] / max(1.0, other["above_start_mib"])
        lines.append(
            f"lam-fused beside {other['variant']}: {speed:.2f} x the speed of a step, "
            f"{memory:.2f} x the memory for training"
        )
    threads = fused["threads"]
    lines.append(f"median seconds per full-batch step, whole model, {threads} threads")
    return "\n".join(lines)
