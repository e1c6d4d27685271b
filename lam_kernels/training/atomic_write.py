"""Files that are either complete or not there."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from pathlib import Path

from lam_kernels.user_error import UserError


def check_writable(path: Path) -> None:
    """UserError if atomic_write could not put a file there: asked before the work, not after."""
    path = Path(path)
    if path.is_dir():
        raise UserError(f"{path} is a folder where a file must go: choose another --out")
    folder = next(parent for parent in path.absolute().parents if parent.exists())
    if not (folder.is_dir() and os.access(folder, os.W_OK | os.X_OK)):
        raise UserError(f"{folder} is no folder that can be written to: choose another --out")


def atomic_write(path: Path, content: bytes | str | Callable[[Path], object]) -> None:
    """Writes `content` (or lets it write to the path it is given) beside `path`, then renames it
    into place.

    Whatever happens meanwhile, Ctrl-C and a full disk included, `path` holds the old file or the
    new one.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=path.suffix)
    os.close(handle)
    part = Path(name)
    try:
        if callable(content):
            content(part)
        elif isinstance(content, str):
            part.write_text(content, encoding="utf-8")
        else:
            part.write_bytes(content)
        # mkstemp makes private files; these are as readable as any other output
        mask = os.umask(0)
        os.umask(mask)
        part.chmod(0o666 & ~mask)
        with part.open("rb") as written:
            os.fsync(written.fileno())
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
