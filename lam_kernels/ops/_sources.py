"""What the emulated CUDA kernels are compiled from, as one number. For setup.py too: no torch."""

from __future__ import annotations

import hashlib
from pathlib import Path


def emulation_stamp(root: Path) -> str:
    """Of the sources below root/csrc; "" where there are none, as in an installed package."""
    folder = root / "csrc"
    found = [*folder.glob("*.h"), *folder.glob("cuda/*"), *folder.glob("emulation/*")]
    if not found:
        return ""
    digest = hashlib.sha256()
    for path in sorted([*found, *folder.glob("bind_*.cpp")]):
        digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:16]
