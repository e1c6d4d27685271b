"""This tree against a commit, measured in turns by this tree's bench.

The commit is checked out into a temporary worktree and built there (its libraries are copied when
csrc/ and setup.py are the same as here). A folder of links then puts its lam_kernels beside this
tree's bench and specification, so that both are asked the same questions by the same code.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from statistics import median

from . import record

ROOT = record.ROOT.parent
_OWN_OPTIONS = ("--against", "--threshold", "--rounds")


def measure_both(args: argparse.Namespace) -> tuple[list[dict], list[dict]]:
    """(rows of the commit, rows of this tree), the rounds of each pooled."""
    options = _run_options(args.argv if args.argv is not None else sys.argv[1:])
    with _tree_of(args.against) as theirs, record.shared_references():
        runs: dict[str, list[list[dict]]] = {"A": [], "B": []}
        for round_ in range(args.rounds):
            for name, tree in (("A", theirs), ("B", ROOT)):
                print(f"== {name}, round {round_ + 1} of {args.rounds}", flush=True)
                with tempfile.TemporaryDirectory() as folder:
                    path = Path(folder) / "rows.jsonl"
                    command = [
                        sys.executable, "-m", "bench", "run", *options, "--results", str(path),
                    ]  # fmt: skip
                    done = subprocess.run(command, cwd=tree, env=_environment(tree))
                    if done.returncode not in (0, 1) or not path.exists():
                        raise ValueError(f"the measurement of {name} failed")
                    runs[name].append(record.read(path))
    return pooled(runs["A"]), pooled(runs["B"])


def _environment(tree: Path) -> dict[str, str]:
    return dict(os.environ) | {"PYTHONPATH": str(tree)}


def _run_options(argv: list[str]) -> list[str]:
    """The options of `run` among those of `compare`."""
    options, skip = [], False
    for word in argv[1:]:
        if skip or word in ("--all", "--no-save"):  # the rows go to a file of this comparison
            skip = False
        elif word in _OWN_OPTIONS:
            skip = True
        elif not word.startswith(tuple(f"{name}=" for name in _OWN_OPTIONS)):
            options.append(word)
    return options


def pooled(rounds: list[list[dict]]) -> list[dict]:
    """One row a measurement: the median of the rounds' medians, the widest of their spreads."""
    from .compare import _by_key

    by_key: dict[tuple, list[dict]] = {}
    for rows in rounds:
        for key, row in _by_key(rows).items():
            by_key.setdefault(key, []).append(row)
    found = []
    for rows in by_key.values():
        one = dict(rows[-1])
        if all("median_ms" in row for row in rows):
            one |= {
                "median_ms": median(row["median_ms"] for row in rows),
                "p20_ms": min(row["p20_ms"] for row in rows),
                "p80_ms": max(row["p80_ms"] for row in rows),
                "samples": sum(row["samples"] for row in rows),
            }
        if all("peak_mib" in row for row in rows):
            one["peak_mib"] = median(row["peak_mib"] for row in rows)
        found.append(one)
    return found


def _git(*arguments: str, where: Path = ROOT) -> subprocess.CompletedProcess:
    return subprocess.run(["git", "-C", str(where), *arguments], capture_output=True, text=True)


@contextlib.contextmanager
def _tree_of(revision: str) -> Iterator[Path]:
    """A folder from which `python -m bench` measures that revision's lam_kernels."""
    known = _git("rev-parse", "--verify", "--quiet", "--end-of-options", f"{revision}^{{commit}}")
    if known.returncode:
        raise ValueError(f"--against {revision!r}: git knows no such commit here")
    with tempfile.TemporaryDirectory() as folder:
        checkout = Path(folder) / "checkout"
        added = _git("worktree", "add", "--detach", str(checkout), known.stdout.strip())
        if added.returncode:
            raise ValueError(f"--against {revision!r}: {added.stderr.strip().splitlines()[-1]}")
        try:
            _build(checkout, known.stdout.strip())
            links = Path(folder) / "tree"
            links.mkdir()
            (links / "lam_kernels").symlink_to(checkout / "lam_kernels")
            for name in ("bench", "python_ref"):
                (links / name).symlink_to(ROOT / name)
            yield links
        finally:
            _git("worktree", "remove", "--force", str(checkout))


def _build(checkout: Path, commit: str) -> None:
    same = _git("diff", "--quiet", commit, "--", "csrc", "setup.py").returncode == 0
    built = [*(ROOT / "lam_kernels").glob("*.so"), ROOT / "lam_kernels" / "_build.json"]
    if same and len(built) > 1 and all(path.exists() for path in built):
        for path in built:
            shutil.copy2(path, checkout / "lam_kernels" / path.name)
        return
    print(f"== building {commit[:7]}, whose kernels differ from those here", flush=True)
    command = [sys.executable, "-W", "ignore", "setup.py", "-q", "build_ext", "--inplace"]
    done = subprocess.run(command, cwd=checkout, capture_output=True, text=True)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no output"])[-1]
        raise ValueError(f"{commit[:7]} could not be built: {last}")
