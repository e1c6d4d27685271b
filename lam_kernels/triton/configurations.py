"""Tile sizes, warps and stages."""

from __future__ import annotations

from typing import NamedTuple


class Configuration(NamedTuple):
    block_m: int
    block_n: int
    warps: int
    stages: int


def choose(kernel: str, device, dtype, D, Dv, Lq, Lk) -> Configuration:
    longest = max(Lq, Lk)
    block = 16 if longest <= 33 else 32 if longest <= 100 else 64
    return Configuration(block, block, 4, 2)


def splits(programs, sharers, mask_elements, operand_elements, device) -> int:
    return max(1, min(sharers, 2, operand_elements // mask_elements))


def short_block(device, D: int, Dv: int) -> int:
    return 32 if device.type == "cpu" else 64


def short_warps(block_m: int, block_n: int) -> int:
    return 4
