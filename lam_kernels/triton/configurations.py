"""Tile sizes, warps and stages: a table, and a rule of cost that picks from it.

TABLE[kernel][width, head dim] lists what may be used: `width` is the operands' bytes an element,
head dim the larger of D and Dv rounded up to the table's next step. The rule (cost) counts, it has
not been fitted to a measurement: for each entry the waves of programs on the device times the
cycles of one program, padding included. A new GPU is tuned by adding entries, compiling them ahead
of time (tests/triton_kernels/compile_ahead.py prints registers, stack and shared memory) and
measuring them with LAM_TRITON_AUTOTUNE=1 (autotune.py).

In the interpreter tiles are chosen for the tests: several of them in short sequences.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from typing import NamedTuple

import torch


class Configuration(NamedTuple):
    block_m: int  # query rows
    block_n: int  # keys
    warps: int
    stages: int


_C = Configuration
HEAD_DIMS = (32, 64, 128, 256)
# kernel -> (bytes an element, head dim) -> entries, the widest first
TABLE: dict[str, dict[tuple[int, int], tuple[Configuration, ...]]] = {
    "forward": {
        (2, 32): (_C(128, 64, 4, 3), _C(64, 64, 4, 3)),
        (2, 64): (_C(128, 64, 4, 3), _C(64, 64, 4, 3)),
        (2, 128): (_C(128, 64, 8, 2), _C(64, 64, 4, 2)),
        (2, 256): (_C(64, 32, 4, 2),),
        (4, 32): (_C(64, 32, 4, 2),),
        (4, 64): (_C(64, 32, 4, 2),),
        (4, 128): (_C(32, 32, 4, 2),),
        (4, 256): (_C(16, 16, 4, 1),),
    },
    "rows": {
        (2, 32): (_C(64, 64, 4, 3),),
        (2, 64): (_C(64, 64, 4, 3),),
        (2, 128): (_C(64, 64, 8, 2),),
        (2, 256): (_C(32, 32, 4, 2),),
        (4, 32): (_C(32, 32, 4, 2),),
        (4, 64): (_C(32, 32, 4, 2),),
        (4, 128): (_C(16, 32, 4, 1),),
        (4, 256): (_C(16, 16, 8, 1),),
    },
    "columns": {
        (2, 32): (_C(64, 64, 4, 2),),
        (2, 64): (_C(64, 64, 8, 2),),
        (2, 128): (_C(32, 64, 8, 2),),
        (2, 256): (_C(32, 32, 8, 1),),
        (4, 32): (_C(32, 32, 8, 1),),
        (4, 64): (_C(32, 32, 8, 1),),
        (4, 128): (_C(16, 16, 4, 1),),
        (4, 256): (_C(32, 16, 8, 1),),
    },
    "tiles": {
        (2, 32): (_C(128, 64, 8, 2), _C(64, 64, 4, 2)),
        (2, 64): (_C(128, 64, 8, 2), _C(64, 64, 4, 2)),
        (2, 128): (_C(64, 64, 8, 2),),
        (2, 256): (_C(64, 64, 8, 1),),
        (4, 32): (_C(32, 32, 4, 1),),
        (4, 64): (_C(32, 32, 4, 1),),
        (4, 128): (_C(32, 32, 4, 1),),
        (4, 256): (_C(32, 32, 4, 1),),
    },
    "global_local_forward": {
        (2, 32): (_C(128, 64, 8, 2), _C(64, 64, 4, 2)),
        (2, 64): (_C(128, 64, 8, 2), _C(64, 64, 4, 2)),
        (2, 128): (_C(64, 64, 8, 2),),
        (2, 256): (_C(64, 32, 8, 1),),
        (4, 32): (_C(64, 32, 4, 2),),
        (4, 64): (_C(32, 32, 4, 2),),
        (4, 128): (_C(32, 32, 8, 1),),
        (4, 256): (_C(16, 16, 8, 1),),
    },
    "global_local_rows": {
        (2, 32): (_C(64, 64, 4, 2),),
        (2, 64): (_C(64, 64, 8, 2),),
        (2, 128): (_C(64, 32, 8, 2),),
        (2, 256): (_C(32, 32, 8, 1),),
        (4, 32): (_C(32, 32, 4, 1),),
        (4, 64): (_C(32, 32, 8, 1),),
        (4, 128): (_C(16, 16, 4, 1),),
        (4, 256): (_C(16, 16, 8, 1),),
    },
    "global_local_columns": {
        (2, 32): (_C(64, 64, 8, 2),),
        (2, 64): (_C(32, 64, 8, 2),),
        (2, 128): (_C(32, 64, 8, 1),),
        (2, 256): (_C(32, 32, 8, 1),),
        (4, 32): (_C(16, 32, 8, 1),),
        (4, 64): (_C(32, 32, 8, 1),),
        (4, 128): (_C(16, 16, 4, 1),),
        (4, 256): (_C(16, 16, 8, 1),),
    },
    "global_local_tiles": {
        (2, 32): (_C(64, 64, 8, 2),),
        (2, 64): (_C(64, 64, 8, 2),),
        (2, 128): (_C(64, 64, 8, 1),),
        (2, 256): (_C(64, 64, 8, 1),),
        (4, 32): (_C(32, 32, 4, 1),),
        (4, 64): (_C(32, 32, 4, 1),),
        (4, 128): (_C(32, 32, 4, 1),),
        (4, 256): (_C(32, 32, 4, 1),),
    },
    "map_gated_forward": {
        (2, 32): (_C(32, 64, 8, 1),),
        (2, 64): (_C(32, 64, 8, 1),),
        (2, 128): (_C(32, 64, 8, 1),),
        (2, 256): (_C(32, 32, 4, 1),),
        (4, 32): (_C(32, 32, 4, 1),),
        (4, 64): (_C(32, 32, 4, 1),),
        (4, 128): (_C(16, 16, 4, 1),),
        (4, 256): (_C(16, 16, 8, 1),),
    },
    "map_gated_heads": {
        (2, 32): (_C(32, 32, 8, 1),),
        (2, 64): (_C(32, 32, 8, 1),),
        (2, 128): (_C(16, 32, 4, 1),),
        (2, 256): (_C(32, 32, 8, 1),),
        (4, 32): (_C(32, 32, 8, 1),),
        (4, 64): (_C(16, 32, 8, 1),),
        (4, 128): (_C(16, 16, 4, 1),),
        (4, 256): (_C(16, 16, 8, 1),),
    },
    "map_gated_gates": {
        (2, 32): (_C(32, 64, 8, 1),),
        (2, 64): (_C(32, 64, 8, 1),),
        (2, 128): (_C(32, 64, 8, 1),),
        (2, 256): (_C(32, 32, 8, 1),),
        (4, 32): (_C(32, 32, 8, 1),),
        (4, 64): (_C(32, 32, 8, 1),),
        (4, 128): (_C(16, 16, 4, 1),),
        (4, 256): (_C(16, 16, 8, 1),),
    },
}
# The same for chips without products of warp groups (8.x, 12.x), whose operands take registers:
# where the entries above would keep more of them on the stack than the budget allows.
AMPERE: dict[tuple[str, int, int], tuple[Configuration, ...]] = {
    ("columns", 2, 32): (_C(32, 64, 8, 2),),
    ("columns", 2, 64): (_C(32, 64, 8, 2),),
    ("global_local_columns", 2, 128): (_C(32, 32, 8, 1),),
    ("global_local_tiles", 2, 128): (_C(64, 32, 8, 1),),
    ("map_gated_heads", 2, 32): (_C(16, 32, 4, 1),),
    ("map_gated_heads", 2, 64): (_C(16, 32, 4, 1),),
}
# With a low-rank mask, whose factors and their gradients take registers as well.
LOW_RANK: dict[tuple[str, int, int], tuple[Configuration, ...]] = {
    ("rows", 2, 128): (_C(64, 32, 8, 2),),
    ("rows", 4, 32): (_C(16, 32, 4, 2),),
    ("columns", 2, 32): (_C(32, 64, 8, 2),),
    ("columns", 2, 64): (_C(32, 64, 8, 2),),
    ("columns", 2, 128): (_C(32, 32, 8, 2),),
    ("columns", 4, 32): (_C(32, 16, 4, 1),),
}
AMPERE_LOW_RANK: dict[tuple[str, int, int], tuple[Configuration, ...]] = {
    ("forward", 2, 64): (_C(64, 64, 4, 3),),
    ("rows", 2, 64): (_C(64, 32, 4, 3),),
    ("columns", 2, 64): (_C(64, 32, 4, 2),),
}
# (bytes an element, head dim) -> the longest head that one tile takes, and the warps; wider heads
# fit in none
SHORT = {(2, 32): (64, 4), (2, 64): (64, 4), (2, 128): (64, 4), (4, 32): (64, 8), (4, 64): (32, 4)}
AMPERE_SHORT = {(2, 32): (64, 4), (2, 64): (64, 4), (4, 32): (32, 4), (4, 64): (32, 4)}
LOW_RANK_SHORT = {(2, 32): (64, 4), (2, 64): (64, 8), (4, 32): (32, 4), (4, 64): (16, 4)}
_INTERPRETED_SHORT = 32

# Kernels of score_masked_attention -> columns that hold the keys and every layer of the network ->
# entries, the widest first; block_n is those columns. The network is float32 whatever the operands.
SCORE = {
    "score_masked_forward": {
        16: (_C(64, 16, 4, 2), _C(16, 16, 4, 2)),
        32: (_C(64, 32, 4, 2), _C(16, 32, 4, 2)),
        64: (_C(32, 64, 4, 1), _C(16, 64, 4, 1)),
        128: (_C(16, 128, 8, 1),),
    },
    "score_masked_backward": {
        16: (_C(16, 16, 4, 1),),
        32: (_C(16, 32, 4, 1),),
        64: (_C(16, 64, 8, 1),),
        128: (_C(16, 128, 8, 1),),
    },
}
SCORE_CHUNK = 32  # of the head dim, or of the layers, at a time: at most

# bytes of shared memory that one program may use, by compute capability (CUDA programming guide)
SHARED_LIMITS = {(8, 0): 166_912, (8, 6): 101_376, (8, 9): 101_376, (9, 0): 232_448}


def shared_limit(capability: tuple[int, int]) -> int:
    """That of the nearest listed capability below; 10.x has that of 9.0, 12.x that of 8.6."""
    if capability[0] == 12:
        return SHARED_LIMITS[8, 6]
    return SHARED_LIMITS[max(c for c in SHARED_LIMITS if c <= capability)]


class Problem(NamedTuple):
    """What a choice depends on."""

    kernel: str
    width: int  # bytes an element
    head_dim: int  # the larger of D and Dv
    Lq: int
    Lk: int
    pairs: int  # heads of all samples
    ampere: bool = False  # of the device
    low_rank: bool = False  # a mask is


def entries(problem: Problem) -> tuple[Configuration, ...]:
    """What the table has for a problem."""
    step = next(step for step in HEAD_DIMS if problem.head_dim <= step)
    at = (problem.kernel, problem.width, step)
    found = TABLE[problem.kernel][problem.width, step]
    if problem.ampere:
        found = AMPERE.get(at, found)
    if problem.low_rank:
        found = LOW_RANK.get(at, found)
    if problem.ampere and problem.low_rank:
        found = AMPERE_LOW_RANK.get(at, found)
    return found


def leaner(entry: Configuration) -> Iterator[Configuration]:
    """The entry, then what takes less and less shared memory: two stages, tiles of 64 rows, one
    stage (whose wide tiles would spill registers), smaller tiles."""
    while True:
        yield entry
        if entry.stages > 2:
            entry = entry._replace(stages=entry.stages - 1)
        elif entry.block_m > 64:
            entry = entry._replace(block_m=entry.block_m // 2)
        elif entry.stages > 1:
            entry = entry._replace(stages=1)
        elif max(entry[:2]) > 16:
            larger = "block_m" if entry.block_m >= entry.block_n else "block_n"
            entry = entry._replace(**{larger: getattr(entry, larger) // 2})
        else:
            return


@functools.cache
def ampere(device: torch.device) -> bool:
    """Without products of warp groups."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device)[0] not in (9, 10)


def choose(problem: Problem, device: torch.device) -> Configuration:
    """The cheapest entry."""
    if device.type == "cpu":
        longest = max(problem.Lq, problem.Lk)
        block = 16 if longest <= 33 else 32 if longest <= 100 else 64
        return Configuration(block, block, 4, 2)
    return _cheapest(problem, _multiprocessors(device))


@functools.lru_cache(maxsize=4096)
def _cheapest(problem: Problem, multiprocessors: int) -> Configuration:
    return min(entries(problem), key=lambda entry: cost(problem, entry, multiprocessors))


# Cycles: of a matrix product's multiply-add and of an exponential, per pair (sm_90: 1024 and 4 x 4
# a cycle and multiprocessor, half of the former reached), and of a loop iteration's latency.
_FLOP_CYCLES = 1 / 512
_EXP_CYCLES = 1 / 16
_LOOP_CYCLES = 200
_PRODUCTS = {
    "forward": 2, "rows": 3, "columns": 4, "tiles": 2,
    # in tiles that the pattern does not touch, which are most
    "global_local_forward": 2, "global_local_rows": 3, "global_local_columns": 4,
    "global_local_tiles": 2,
    "map_gated_forward": 5, "map_gated_heads": 12, "map_gated_gates": 8,
}  # fmt: skip


def cost(problem: Problem, entry: Configuration, multiprocessors: int) -> float:
    """Cycles of the launch: waves of programs times the cycles of one, padded tiles counted whole.

    8 warps a multiprocessor run at once: that is what the registers of these kernels allow.
    """
    tiles_m, tiles_n = math.ceil(problem.Lq / entry.block_m), math.ceil(problem.Lk / entry.block_n)
    pair_cycles = _PRODUCTS[problem.kernel] * problem.head_dim * _FLOP_CYCLES + _EXP_CYCLES
    tile = entry.block_m * entry.block_n * pair_cycles + _LOOP_CYCLES
    own, loop = (tiles_n, tiles_m) if problem.kernel.endswith("columns") else (tiles_m, tiles_n)
    if problem.kernel.endswith("tiles"):
        own, loop = tiles_m * tiles_n, 1
    at_once = multiprocessors * max(1, 8 // entry.warps)
    programs = own * problem.pairs
    # two programs on one multiprocessor share its units
    return math.ceil(programs / at_once) * loop * tile * max(1, 8 // entry.warps)


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    if device.type == "cpu":
        return 4  # the interpreter: few, so that tests see sums in one and in several parts
    return torch.cuda.get_device_properties(device).multi_processor_count


def short(
    device: torch.device, width: int, head_dim: int, low_rank: bool = False
) -> tuple[int, int]:
    """The longest head that one tile takes (0 for none), and the warps of that tile."""
    if device.type == "cpu":
        return _INTERPRETED_SHORT, 4
    step = next(step for step in HEAD_DIMS if head_dim <= step)
    return short_table(ampere(device), low_rank).get((width, step), (0, 0))


def short_table(ampere: bool, low_rank: bool) -> dict[tuple[int, int], tuple[int, int]]:
    return LOW_RANK_SHORT if low_rank else AMPERE_SHORT if ampere else SHORT


def score(kernel: str, width: int, Lq: int, device: torch.device) -> Configuration:
    """The widest entry that is not mostly padding."""
    entries = SCORE[kernel][width]
    if device.type == "cpu":
        return entries[-1]
    return next((one for one in entries if one.block_m < 2 * Lq), entries[-1])


def score_chunk(block: int) -> int:
    """How much of a head dim, padded to `block`, is multiplied at a time: several chunks, or one
    wider than a tile of 16 rows. Then warps go side by side along the columns; they would share the
    few rows otherwise, each with the whole of the other operand in its registers."""
    return min(block // 2, SCORE_CHUNK) if block > 16 else SCORE_CHUNK


def score_programs(units: int, tiles: int, most: int, device: torch.device) -> tuple[int, int]:
    """(groups, splits) of the backward pass: programs share the units, then each one's tiles.

    As many as give every multiprocessor two, and not more than `most` of which there is scratch.
    """
    programs = max(1, min(2 * _multiprocessors(device), most))
    groups = min(units, programs)
    return groups, max(1, min(tiles, programs // groups))


def chunk(width: int) -> int:
    """How much of the head dim product_of_rows and product_of_tiles multiply at a time."""
    return 64 if width == 4 else 128


def splits(
    programs: int, sharers: int, mask_elements: int, operand_elements: int, device: torch.device
) -> int:
    """Programs that share the sum over one tile's heads and samples.

    As many as give every multiprocessor two programs, but never more partial sums than query and
    key have elements.
    """
    wanted = math.ceil(2 * _multiprocessors(device) / programs)
    return max(1, min(sharers, wanted, operand_elements // mask_elements))


def order(mask_axes: tuple[bool, bool] | None) -> str:
    """How programs follow each other (tiles.program_tile): those that read the same rows of a mask
    side by side, so that these come from memory once.

    mask_axes: (has its own samples, has its own heads) of the mask with rows and columns, or None.
    """
    if mask_axes is None or all(mask_axes):
        return "tiles"
    own_batch, own_head = mask_axes
    if own_batch:
        return "heads"
    return "batches" if own_head else "pairs"
