"""Compiles the Triton kernels for GPUs that are not there; one line of JSON a kernel.

    python tests/triton_kernels/compile_ahead.py --arch 90 [--head-dim 64] [--kernel forward]

The op's own host code makes every launch; only the launch itself is replaced by a compilation, so
what is compiled is what would run: the same arguments, specialised by Triton the same way. Each
entry of the configuration table is compiled for its dtype width and head dim, with a multiplier
that all heads share. In a process of its own, without TRITON_INTERPRET. With another Triton in
front of PYTHONPATH it compiles with that.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

os.environ["TRITON_INTERPRET"] = "0"
sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.errors import OutOfResources

from lam_kernels import Causal, DilatedToeplitz, LowRankMask, Segments, Toeplitz
from lam_kernels.patterns import encode
from lam_kernels.triton import (
    configurations,
    global_local_attention,
    map_gated_attention,
    masked_attention,
    score_masked_attention,
)
from lam_kernels.triton.configurations import (
    HEAD_DIMS,
    SCORE,
    TABLE,
    Configuration,
    shared_limit,
    short_table,
)

DTYPES = {2: torch.bfloat16, 4: torch.float32}
INSTRUCTIONS = ("wgmma.mma_async", "tcgen05.mma", "mma.sync", "cp.async")
LONG = 1024
TWO_MAPS = ("global_local", "map_gated")  # how the names of their kernels begin


class AbsentGPU:
    """As much of a driver as a compilation asks for."""

    def __init__(self, arch: int):
        self.arch = arch

    def get_current_target(self):
        return GPUTarget("cuda", self.arch, 32)

    def get_current_device(self):
        return 0

    def get_current_stream(self, _device=None):
        return 0


def resources(compiled) -> dict[str, int]:
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        done = subprocess.run(
            [tool, "-res-usage", file.name], capture_output=True, text=True, check=True
        )
    registers, stack = re.search(r"REG:(\d+) STACK:(\d+)", done.stdout).groups()
    metadata = compiled.metadata
    tensor_memory = getattr(metadata, "tmem_size", None) or 0  # columns, on sm_100
    found = {"shared": metadata.shared, "tensor_memory": tensor_memory}
    return {"registers": int(registers), "stack": int(stack)} | found


def compiled_launches(
    arch: int,
    kernel: str,
    entry: Configuration,
    width: int,
    head_dim: int,
    rank: int,
    heavy: bool = False,
):
    """Records of one kernel with one entry: the op is called, the launch of `kernel` compiled.

    heavy: with more masks than the table is made for, refused as by the chip where that is too
    much: the record's entry is what is launched in the end, "chosen" the table's.
    """
    records = []
    limit = shared_limit((arch // 10, arch % 10))

    def launch(function, _programs, *arguments, **settings):
        name = function.__name__.removesuffix("_kernel")
        if name != kernel:
            return
        compiled = function.warmup(*arguments, grid=(1,), **settings)
        compiled = compiled.result() if hasattr(compiled, "result") else compiled
        if heavy and compiled.metadata.shared > limit:
            raise OutOfResources(compiled.metadata.shared, limit, "shared memory")
        ptx = compiled.asm["ptx"]
        names = ("BLOCK_M", "BLOCK_N", "num_warps", "num_stages")
        records.append(
            {
                "triton": triton.__version__,
                "arch": arch,
                "kernel": kernel,
                "entry": [settings[n] for n in names] if heavy else list(entry),
                "chosen": list(entry),
                "width": width,
                "head_dim": head_dim,
                "rank": rank,
                **resources(compiled),
                "instructions": {
                    name: len(re.findall(re.escape(name), ptx)) for name in INSTRUCTIONS
                },
            }
        )

    short = kernel.startswith("short")
    masked_attention.launch = score_masked_attention.launch = launch
    configurations.choose = configurations.score = lambda *_: entry
    configurations.short = lambda *_: (entry.block_m, entry.warps) if short else (0, 0)
    if kernel in SCORE:
        score_call(entry.block_n, head_dim, DTYPES[width])
        return records
    if kernel.startswith("global_local"):
        global_local_call(head_dim, DTYPES[width], torch.empty(1, 1, LONG, LONG), None)
    elif kernel.startswith("map_gated"):
        map_gated_call(head_dim, DTYPES[width], True)
    elif heavy:
        heavy_call(entry.block_m if short else LONG, head_dim, DTYPES[width])
    else:
        call(entry.block_m if short else LONG, head_dim, DTYPES[width], rank)
    return records


def call(L: int, D: int, dtype: torch.dtype, rank: int) -> None:
    """With a multiplier that all heads share: dense, or of a rank."""
    B, H = 2, 4
    query, key, value = (torch.empty(B, H, L, D, dtype=dtype) for _ in range(3))
    mask, columns, offset = torch.empty(1, 1, L, L, dtype=dtype), None, None
    if rank:
        mask, columns = (torch.empty(1, 1, L, rank, dtype=dtype) for _ in range(2))
        offset = torch.empty(1, 1, 1, L, dtype=dtype)
    operands = (query, key, value, mask, None, columns, offset, *[None] * 4, [], None)
    settings = ([], D**-0.5, 0.0, False)
    out, lse = torch.empty_like(query), torch.empty(B, H, L)
    needs = [x is not None for x in operands[:9]]
    masked_attention.masked_attention_fwd(*operands, *settings)
    masked_attention.masked_attention_bwd(
        torch.empty_like(out), None, *operands, out, lse, *settings, needs
    )


def heavy_call(L: int, D: int, dtype: torch.dtype) -> None:
    """With two float32 masks and both kinds of booleans."""
    x, mask = torch.empty(2, 4, L, D, dtype=dtype), torch.empty(1, 1, L, L)
    seen = torch.ones(2, 1, L, L, dtype=torch.bool)
    both_ways(x, x, x, mask, mask, attn_mask=seen, key_mask=seen[:, 0, 0], dropout_p=0.1)


def score_call(keys: int, D: int, dtype: torch.dtype) -> None:
    """With a network of two layers, as wide as the keys, on the mean of the heads' scores."""
    query, key, value = (torch.empty(2, 4, L, D, dtype=dtype) for L in (LONG, keys, keys))
    seen = torch.ones(2, keys, dtype=torch.bool)
    operands = (query, key, value, torch.empty(2 * (keys + 1) * keys), seen)
    settings = ([keys] * 3, D**-0.5, True, True)
    score_masked_attention.score_masked_attention_fwd(*operands, *settings)
    score_masked_attention.score_masked_attention_bwd(query, *operands, *settings, [True] * 4)


def global_local_call(D: int, dtype: torch.dtype, multiplier, bias, **more) -> None:
    """Forward and all gradients; the same values stand for all that has the shape of query."""
    x = torch.empty(2, 4, LONG, D, dtype=dtype)
    flat, ids = encode(more.get("pattern", Toeplitz(15)), 4)
    masks = (multiplier, bias)
    operands = (x, x, x, *masks, more.get("key_mask"), list(ids))
    settings = (flat, D**-0.5)
    lse = torch.empty(x.shape[:3])
    global_local_attention.global_local_attention_fwd(*operands, *settings)
    global_local_attention.global_local_attention_bwd(
        x, x, *operands, x, x, lse, lse, *settings, [True] * 3 + [m is not None for m in masks]
    )


def map_gated_call(D: int, dtype: torch.dtype, renormalise: bool, **more) -> None:
    x, gate = torch.empty(2, 4, 300, D, dtype=dtype), torch.empty(300, 300)
    flat, ids = encode(more.get("pattern", Toeplitz(15)), 4)
    operands = (x, x, x, gate, gate, more.get("key_mask"), list(ids), flat, D**-0.5, renormalise)
    map_gated_attention.map_gated_attention_fwd(*operands)
    map_gated_attention.map_gated_attention_bwd(x, *operands, [True] * 5)


def feature_calls() -> dict[str, Callable[[], None]]:
    """Calls that between them take every kind of operand, in lengths that fill no tile."""
    B, H, L, D = 2, 4, 100, 16
    query, key, value = (torch.empty(B, n, L, D, dtype=torch.bfloat16) for n in (H, 2, 2))
    seen = torch.ones(B, L, dtype=torch.bool)
    ids = torch.zeros(1, L, dtype=torch.int64)
    every = (Causal(), Segments(ids, ids), None, Toeplitz(9) & DilatedToeplitz(60, 3))
    factors = torch.empty(B, 1, L, 70), torch.empty(1, H, L, 70), torch.empty(1, 1, 1, L)
    few = (torch.empty(1, H, L, 3, dtype=torch.float16) for _ in range(2))
    return {
        "vectors": functools.partial(
            both_ways, query, key, value, torch.empty(1, H, 1, 1), torch.empty(B, 1, 1, L),
            key_mask=seen, pattern=Segments(ids, ids) & Causal(), dropout_p=0.1,
        ),
        "patterns": functools.partial(
            both_ways, query, key, value, torch.empty(B, H, L, 1), torch.empty(1, 1, L, L),
            attn_mask=torch.ones(1, 1, L, L, dtype=torch.bool), pattern=every,
        ),
        "low rank": functools.partial(
            both_ways, query, key, value, LowRankMask(*factors), LowRankMask(*few), key_mask=seen
        ),
        "global and local": functools.partial(
            global_local_call, D, torch.bfloat16, torch.empty(1, H, 1, 1),
            torch.empty(B, H, LONG, LONG), key_mask=torch.ones(B, LONG, dtype=torch.bool),
            pattern=(Causal(), None, DilatedToeplitz(60, 3), Toeplitz(9)),
        ),
        "gated maps": functools.partial(
            map_gated_call, D, torch.float16, False, pattern=None,
            key_mask=torch.ones(B, 300, dtype=torch.bool),
        ),
        "short": functools.partial(
            both_ways, *(torch.empty(B, H, 9, D, dtype=torch.bfloat16) for _ in range(3)),
            LowRankMask(torch.empty(B, 1, 9, 3), torch.empty(1, H, 9, 3)), torch.empty(1, H, 9, 1),
            key_mask=seen[:, :9],
        ),
    }  # fmt: skip


def both_ways(
    query, key, value, multiplier, bias, attn_mask=None, key_mask=None, pattern=None, dropout_p=0.0
) -> None:
    """Forward and all gradients, on tensors whose values nobody reads."""
    flat, segment_ids = encode(pattern, query.shape[1])
    masks, rest = [], []
    for mask in (multiplier, bias):
        low_rank = isinstance(mask, LowRankMask)
        masks.append(mask.rows if low_rank else mask)
        rest += [mask.columns, mask.offset] if low_rank else [None, None]
    rng_state = torch.zeros(2, dtype=torch.int64) if dropout_p else None
    operands = (
        query, key, value, *masks, *rest, attn_mask, key_mask, list(segment_ids), rng_state
    )  # fmt: skip
    settings = (flat, query.shape[3] ** -0.5, dropout_p, False)
    out, lse = torch.empty_like(query), torch.empty(query.shape[:3])
    needs = [x is not None for x in operands[:9]]
    masked_attention.masked_attention_fwd(*operands, *settings)
    masked_attention.masked_attention_bwd(
        torch.empty_like(out), torch.empty_like(lse), *operands, out, lse, *settings, needs
    )


def compiled_features() -> Iterator[dict]:
    """One record a call: what was launched, and compiled."""
    launched: list[str] = []

    def launch(function, _programs, *arguments, **settings):
        compiled = function.warmup(*arguments, grid=(1,), **settings)
        compiled = compiled.result() if hasattr(compiled, "result") else compiled
        launched.append(function.__name__.removesuffix("_kernel"))

    masked_attention.launch = launch
    configurations.choose = lambda *_: Configuration(16, 16, 4, 1)
    for name, call_it in feature_calls().items():
        launched.clear()
        block = 16 if name == "short" else 0
        configurations.short = lambda *_, block=block: (block, 4)
        call_it()
        yield {"triton": triton.__version__, "feature": name, "launched": sorted(set(launched))}


def op_of(kernel: str) -> str:
    """global_local, map_gated, or "" for the other ops, whose kernels share a table."""
    return next((op for op in TWO_MAPS if kernel.startswith(op)), "")


def table_entries(arch: int, rank: int, op: str) -> Iterator[tuple[str, Configuration, int, int]]:
    """(kernel, entry, width, head dim) of everything that may be chosen on an architecture for a
    dense mask, or one of a rank."""
    ampere = arch not in (90, 100)
    for kernel, rows in TABLE.items():
        if op_of(kernel) != op or (rank and kernel == "tiles"):  # of dense masks
            continue
        for width, head_dim in rows:
            sizes = configurations.Problem(kernel, width, head_dim, LONG, LONG, 8, ampere, rank > 0)
            for entry in configurations.entries(sizes):
                yield kernel, entry, width, head_dim
    if op:
        return
    for (width, head_dim), (length, warps) in short_table(ampere, rank > 0).items():
        for kernel in ("short_forward", "short_backward"):
            yield kernel, Configuration(length, length, warps, 1), width, head_dim
    for kernel, columns in SCORE.items() if rank == 0 else ():
        for entries in columns.values():
            for entry in entries:
                yield kernel, entry, 4, 64


def one_a_kernel(listed: list, arch: int) -> list:
    """One entry of every kernel. Neighbours in the table, and the next architecture, get other
    dtype widths and head dims."""
    kernels: dict[str, list] = {}
    for one in listed:
        kernels.setdefault(one[0], []).append(one)
    return [
        entries[(3 * number + arch // 10) % len(entries)]
        for number, entries in enumerate(kernels.values())
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--arch", type=int, required=True, help="80, 86, 90, 100")
    parser.add_argument(
        "--op", choices=(*TWO_MAPS, "all"), default="", help="instead of all other ops"
    )
    parser.add_argument("--one-a-kernel", action="store_true", help="a sample: see one_a_kernel")
    parser.add_argument("--head-dim", type=int, choices=HEAD_DIMS, help="only this one")
    parser.add_argument("--kernel", help="only this one")
    parser.add_argument("--width", type=int, choices=(2, 4), help="only operands of this width")
    parser.add_argument("--rank", type=int, default=0, help="with a low-rank mask; 0: a dense one")
    parser.add_argument("--entry", type=int, nargs=4, help="this instead of the table's entries")
    parser.add_argument("--heavy", action="store_true", help="with as many masks as there can be")
    parser.add_argument("--features", action="store_true", help="calls of every kind instead")
    given = parser.parse_args()
    driver.set_active(AbsentGPU(given.arch))
    torch.set_num_threads(1)
    if given.features:
        for record in compiled_features():
            print(json.dumps(record), flush=True)
        return
    ops = ("", *TWO_MAPS) if given.op == "all" else (given.op,)
    listed = [one for op in ops for one in table_entries(given.arch, given.rank, op)]
    if given.one_a_kernel:
        listed = one_a_kernel(listed, given.arch)
    listed = [
        (kernel, Configuration(*given.entry) if given.entry else entry, width, head_dim)
        for kernel, entry, width, head_dim in listed
        if given.kernel in (None, kernel)
        and given.width in (None, width)
        and given.head_dim in (None, head_dim)
        and not (given.heavy and kernel in SCORE)  # which take no such masks
    ]
    listed = list(dict.fromkeys(listed))
    print(json.dumps({"entries": len(listed)}), flush=True)
    for kernel, entry, width, head_dim in listed:
        which = (given.arch, kernel, entry, width, head_dim, given.rank, given.heavy)
        for record in compiled_launches(*which):
            print(json.dumps(record), flush=True)


if __name__ == "__main__":
    main()
