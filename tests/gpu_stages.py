"""The stages of `make gpu-check`, in their order: what each shows, its command, its time limit."""

from __future__ import annotations

import importlib.util
import os
import sys
from typing import NamedTuple

PYTHON = sys.executable
MASKED = "tests/ops/test_masked_attention"


class Stage(NamedTuple):
    name: str
    what: str
    command: list[str]
    minutes: float
    required: bool = True  # False: its failure is reported and is not this run's
    tool: str = ""  # a program it needs; without it the stage is left out, with that reason
    always: bool = False  # also where it has passed: what it makes may be gone


def _pytest(*arguments: str, alone: bool = False) -> list[str]:
    """Some tests, in several processes where pytest-xdist is there (most of their time is Triton's
    compiler's); alone: one after the other."""
    several = not alone and importlib.util.find_spec("xdist") is not None
    jobs = ["-n", str(min(8, os.cpu_count() or 1)), "--dist", "worksteal"] if several else []
    command = [PYTHON, "-m", "pytest", "-q", "-x", "--maxfail=20", "-p", "no:cacheprovider"]
    return [*command, *jobs, *arguments]


def _bench(*cases: str, backend: str = "") -> list[str]:
    """One line a measurement, under bench/results. backend: "ours", where that is not the first of
    all that are there."""
    command = [PYTHON, "-m", "bench", "run", "--set", "gpu", "--device", "cuda", "--graph"]
    command += ["--backend", backend] if backend else []
    return command + [word for case in cases for word in ("--case", case)]


def _sanitizer(tool: str) -> list[str]:
    """compute-sanitizer, with every tensor in memory of its own: torch's allocator packs small ones
    into one block, where an access beyond the end of one hits another."""
    command = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "9"]
    return ["env", "PYTORCH_NO_CUDA_MEMORY_CACHING=1", *command]


STAGES = (
    Stage(
        "ptx",
        "each PTX instruction of the CUDA kernels against its emulation, bit for bit",
        _pytest("tests/cuda/test_conformance.py", alone=True),
        5,
        tool="nvcc",
    ),
    Stage(
        "first",
        "forward and gradients of 40 random problems against float64, without pytest",
        [PYTHON, "tests/gpu_check.py", "--random", "40"],
        9.5,
    ),
    Stage(
        "build",
        "the libraries, in place, the CUDA kernels for this GPU alone",
        [PYTHON, "-W", "ignore", "setup.py", "-q", "build_ext", "--inplace"],
        9.5,
        tool="nvcc",
        always=True,
    ),
    Stage(
        "cuda",
        "both backends: CUDA graphs, streams, 200 bitwise repeats, torch.compile, no host wait",
        _pytest("tests/triton_kernels/test_cuda.py", alone=True),
        9,
    ),
    Stage(
        "cuda kernels",
        "every case by backend cuda against float64, bfloat16, float16, float32",
        _pytest("tests/cuda/test_masked_attention_gpu.py", alone=True),
        9.5,
        tool="nvcc",
    ),
    *(
        Stage(
            name,
            f"every entry of the table of tile sizes: {what}",
            _pytest("tests/triton_kernels/test_configurations.py", "-k", which),
            9.5,
        )
        for name, what, which in (
            ("configurations", "masked attention", "not global_local and not map_gated"),
            ("configurations-maps", "the ops of two maps", "global_local or map_gated"),
        )
    ),
    Stage(
        "cases",
        "every case, bfloat16 and float16",
        _pytest(f"{MASKED}.py", "-k", "triton and test_case and not float32"),
        9.5,
    ),
    Stage(
        "float32",
        "every case, float32",
        _pytest(f"{MASKED}.py", "-k", "triton and test_case and float32"),
        9.5,
    ),
    Stage(
        "broadcasts",
        "every broadcast, pattern, head dim and stride",
        _pytest(f"{MASKED}.py", "-k", "triton and not test_case"),
        9.5,
    ),
    Stage(
        "conventions",
        "one test a row of the conventions table",
        _pytest(f"{MASKED}_conventions.py", "-k", "triton"),
        9.5,
    ),
    Stage(
        "random",
        "random problems",
        _pytest(f"{MASKED}_random.py", "-k", "triton", "--problems", "100"),
        9.5,
    ),
    Stage(
        "low rank",
        "masks given by factors: every case, rank, broadcast and pattern",
        _pytest(f"{MASKED}_low_rank.py", "-k", "triton"),
        9.5,
    ),
    Stage(
        "score network",
        "the mask as a network of the scores",
        _pytest("tests/ops/test_score_masked_attention.py", "-k", "triton"),
        9.5,
    ),
    Stage(
        "determinism",
        "50 bitwise repeats of every case",
        _pytest(f"{MASKED}_determinism.py", "-k", "triton"),
        9.5,
    ),
    Stage(
        "two maps",
        "cases, random problems and repeats of global_local_attention and map_gated_attention",
        _pytest(
            "tests/ops/test_global_local_attention.py",
            "tests/ops/test_map_gated_attention.py",
            "tests/ops/test_two_map_ops.py",
            "tests/triton_kernels/test_two_maps.py",
            "-k",
            "triton",
        ),
        9.5,
    ),
    Stage(
        "bench",
        "the bench's own events, cache flush, CUDA graphs, allocator peaks; a profiled step",
        _pytest("tests/bench/test_bench_cuda.py", alone=True),
        5,
    ),
    *(
        Stage(
            f"bench-shared-{L}",
            f"broadcast masks of {L} keys against every peer",
            _bench(f"gpu-shared-L{L}*", backend="triton"),
            9.5,
        )
        for L in (1024, 4096, 8192)
    ),
    Stage(
        "bench-each",
        "a dense mask a head against every peer",
        _bench("gpu-each*", backend="triton"),
        9.5,
    ),
    Stage(
        "bench-patterns",
        "block, band and dilated patterns",
        _bench("gpu-[bd]*", backend="triton"),
        9.5,
    ),
    Stage("bench-models", "short calls of real models", _bench("gpu-W[156]", "gpu-W12"), 9.5),
    Stage("bench-images", "short calls of image models", _bench("gpu-W8", "gpu-W1[89]*"), 9.5),
    Stage(
        "memcheck",
        "compute-sanitizer memcheck on one case each way",
        [
            *_sanitizer("memcheck"),
            *_pytest(f"{MASKED}.py", "-k", "triton and test_case and float16 and gate", alone=True),
        ],
        9.5,
        required=False,
        tool="compute-sanitizer",
    ),
    *(
        Stage(
            f"{tool}-cuda",
            f"compute-sanitizer {tool} on every case by backend cuda, bfloat16",
            [
                *_sanitizer(tool), PYTHON, "tests/cuda/run_on_gpu.py", "bfloat16",
            ],
            9.5,
            required=False,
            tool="compute-sanitizer",
        )
        for tool in ("memcheck", "racecheck")
    ),
)  # fmt: skip
