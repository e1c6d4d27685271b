"""A progress bar on a terminal, plain lines anywhere else."""

from __future__ import annotations

import sys
import time


class Progress:
    """Counts `total` steps. A tqdm bar where stderr is a terminal and tqdm is there, else a line an
    epoch; nothing where `silent`.

    Use as a context manager; `step()` after each step, `note(text)` for what belongs on a line of
    its own.
    """

    def __init__(self, total: int, label: str, *, done: int = 0, silent: bool = False):
        self.total, self.label, self.done, self.silent = total, label, done, silent
        self._bar, self._start = None, time.perf_counter()
        if sys.stderr.isatty() and not silent:
            try:
                from tqdm import tqdm
            except ModuleNotFoundError:
                return
            self._bar = tqdm(total=total, initial=done, desc=label, unit="step", leave=True)

    def step(self, text: str = "") -> None:
        self.done += 1
        if self._bar is not None:
            self._bar.set_postfix_str(text, refresh=False)
            self._bar.update()

    def note(self, text: str) -> None:
        if self._bar is not None:
            self._bar.set_postfix_str(text)
            return
        if self.silent:
            return
        seconds = time.perf_counter() - self._start
        line = f"{self.label}: step {self.done}/{self.total}, {text}, {seconds:.0f} s"
        print(line, file=sys.stderr, flush=True)

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *exc) -> None:
        if self._bar is not None:
            self._bar.close()
