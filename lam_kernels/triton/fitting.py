"""Launches that ask for more of a chip than it has are made with less.

The table's entries fit chips that give a block 163 KiB of shared memory or more, for one mask in
the operands' dtype. Two masks in float32, or a chip that gives 99 KiB (8.6, 8.9, 12.x), can be too
much. Triton says so before it launches anything; the next entry of configurations.leaner() is tried
then, and what fits is remembered.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable

from triton.runtime.errors import OutOfResources

from .configurations import Configuration, leaner

_fits: dict[tuple[Configuration, Hashable], Configuration] = {}


def launch(
    launched: Callable[[Configuration], object],
    chosen: Configuration,
    kind: Callable[[], Hashable],
) -> None:
    """launched(chosen), or the first leaner entry that fits.

    kind: what the need of a launch depends on beside its entry; only asked where something did not
    fit before, or does not now.
    """
    start = _fits.get((chosen, kind()), chosen) if _fits else chosen
    for entry in leaner(start):
        try:
            launched(entry)
        except OutOfResources as error:
            refused = error
            continue
        if entry != start:
            _fits[chosen, kind()] = entry
        return
    raise refused
