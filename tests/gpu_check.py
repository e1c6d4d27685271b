"""`make gpu-check`: every check that needs an NVIDIA GPU, in stages; one result, one summary.

    python tests/gpu_check.py                 all stages that have not passed yet
    python tests/gpu_check.py --list          the stages
    python tests/gpu_check.py --stage NAME    this one, again if it has passed
    python tests/gpu_check.py --again         all, from the start

It runs under the Python that calls it, installs nothing and needs no network. A stage is one
command with a time limit; the first is the most telling. Results: out/gpu-check/result.json (every
stage: state, seconds, command, end of its output) and summary.md. A stage that passed stays passed
for as long as the sources, torch and Triton are the same, so a stopped run goes on where it was.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.metadata
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
OUT = ROOT / "out" / "gpu-check"
TAIL = 4000  # characters of a stage's output that are kept
PYTHON = sys.executable
MASKED = "tests/ops/test_masked_attention"


class Stage(NamedTuple):
    name: str
    what: str
    command: list[str]
    minutes: float
    required: bool = True  # False: its failure is reported and is not this run's
    tool: str = ""  # a program it needs; without it the stage is left out, with that reason


def _pytest(*arguments: str) -> list[str]:
    return [
        PYTHON,
        "-m",
        "pytest",
        "-q",
        "-x",
        "--maxfail=20",
        "-p",
        "no:cacheprovider",
        *arguments,
    ]


def _bench(cases: str) -> list[str]:
    """One line a measurement, under bench/results."""
    return [
        PYTHON,
        "-m",
        "bench",
        "run",
        "--set",
        "gpu",
        "--device",
        "cuda",
        "--graph",
        "--case",
        cases,
    ]


STAGES = (
    Stage(
        "ptx",
        "each PTX instruction of the CUDA kernels against its emulation, bit for bit",
        _pytest("tests/cuda/test_conformance.py"),
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
        "cuda",
        "CUDA graphs, streams, 200 bitwise repeats, torch.compile, no host wait, memory",
        _pytest("tests/triton_kernels/test_cuda.py"),
        9,
    ),
    Stage(
        "cuda kernels",
        "every case by backend cuda against float64, bfloat16, float16, float32",
        _pytest("tests/cuda/test_masked_attention_gpu.py"),
        9.5,
        tool="nvcc",
    ),
    Stage(
        "configurations",
        "every entry of the table of tile sizes",
        _pytest("tests/triton_kernels/test_configurations.py"),
        9.5,
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
        _pytest("tests/bench/test_bench_cuda.py"),
        5,
    ),
    Stage("bench-shared", "broadcast masks against every peer", _bench("gpu-shared*"), 9.5),
    Stage("bench-each", "a dense mask a head against every peer", _bench("gpu-each*"), 9.5),
    Stage("bench-patterns", "block, band and dilated patterns", _bench("gpu-[bd]*"), 9.5),
    Stage("bench-models", "short calls of real models", _bench("gpu-W*"), 9.5),
    Stage(
        "memcheck",
        "compute-sanitizer memcheck on one case each way",
        [
            "compute-sanitizer", "--tool", "memcheck", "--error-exitcode", "9",
            *_pytest(f"{MASKED}.py", "-k", "triton and test_case and float16 and gate"),
        ],
        9.5,
        required=False,
        tool="compute-sanitizer",
    ),
)  # fmt: skip


def sources() -> str:
    """A digest of what a result depends on."""
    digest = hashlib.sha256()
    for folder in ("lam_kernels", "python_ref", "tests", "csrc", "bench"):
        for path in sorted((ROOT / folder).rglob("*")):
            if path.suffix in (".py", ".cpp", ".h", ".cu", ".cuh"):
                digest.update(str(path.relative_to(ROOT)).encode() + path.read_bytes())
    for name in ("torch", "triton"):
        digest.update(_version(name).encode())
    return digest.hexdigest()[:16]


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def facts() -> dict[str, str]:
    import torch

    found = {name: _version(name) for name in ("torch", "triton", "numpy", "pytest")}
    found |= {"python": platform.python_version(), "cuda of torch": str(torch.version.cuda)}
    if torch.cuda.is_available():
        major, minor = torch.cuda.get_device_capability()
        found |= {"gpu": torch.cuda.get_device_name(), "compute capability": f"{major}.{minor}"}
        found["gpu memory GiB"] = f"{torch.cuda.get_device_properties(0).total_memory / 2**30:.0f}"
    if shutil.which("nvidia-smi"):
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        asked = subprocess.run(query, capture_output=True, text=True, timeout=60)
        found["driver"] = (asked.stdout or asked.stderr).strip()[:200]
    return found


def run(stage: Stage, bench_run: str) -> dict:
    """Runs a stage; never raises for what the stage does. The bench's stages are one run of it."""
    if stage.tool and not shutil.which(stage.tool):
        return {"state": "left out", "why": f"{stage.tool} is not installed"}
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(
        [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    )
    command = list(stage.command)
    if command[1:4] == ["-m", "bench", "run"]:
        command += ["--run", bench_run]
    started = time.monotonic()
    log = OUT / f"{stage.name}.log"
    with log.open("w") as stream:
        try:
            done = subprocess.run(
                command, cwd=ROOT, env=environment, stdout=stream, stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL, timeout=60 * stage.minutes,
            )  # fmt: skip
            state, why = ("passed", "") if done.returncode == 0 else ("failed", "")
            if done.returncode == 5:  # pytest found no test
                state, why = "failed", "no test was found"
        except subprocess.TimeoutExpired:
            state, why = "failed", f"longer than {stage.minutes} minutes"
    text = log.read_text(errors="replace")
    return {
        "state": state,
        "why": why,
        "seconds": round(time.monotonic() - started, 1),
        "command": " ".join(command).replace(PYTHON, "python"),
        "output": text[-TAIL:],
    }


def write(result: dict) -> None:
    """The result file and the summary, each at once."""
    sys.path.insert(0, str(ROOT))
    from lam_kernels.training.atomic_write import atomic_write

    atomic_write(OUT / "result.json", json.dumps(result, indent=1))
    lines = ["# gpu-check", ""]
    lines += [f"- {name}: {value}" for name, value in result["facts"].items()]
    lines += ["", "| stage | state | seconds | what |", "| --- | --- | --- | --- |"]
    for stage in STAGES:
        found = result["stages"].get(stage.name, {"state": "not run"})
        why = f": {found['why']}" if found.get("why") else ""
        lines.append(
            f"| {stage.name} | {found['state']}{why} | {found.get('seconds', '')} | {stage.what} |"
        )
    for stage in STAGES:
        found = result["stages"].get(stage.name, {})
        if found.get("state") == "failed":
            lines += ["", f"## {stage.name}", "", "```", found.get("output", "")[-1500:], "```"]
    atomic_write(OUT / "summary.md", "\n".join(lines) + "\n")


def load(digest: str) -> dict:
    """Earlier results for the same sources, or none."""
    try:
        found = json.loads((OUT / "result.json").read_text())
        return found if found["sources"] == digest else {}
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def random_problems(count: int) -> int:
    """Checks the first problems of the operator tests' endless list; the number that failed."""
    sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
    from on_gpu import serve_cpu_tensors
    from problems import check, random_problem

    serve_cpu_tensors()
    failed = 0
    for number in range(count):
        problem = random_problem(number)
        if problem.dtype == "float64":
            continue
        try:
            check(problem, "triton")
            print(f"{number}: right", flush=True)
        except Exception as error:  # every one is a finding, and the next problem another
            failed += 1
            print(f"{number}: {type(error).__name__} {error}\n  {problem!r}", flush=True)
    return failed


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    names = [stage.name for stage in STAGES]
    parser.add_argument("--list", action="store_true", help="the stages, and nothing else")
    parser.add_argument("--stage", action="append", choices=names, help="only this one, again")
    parser.add_argument("--again", action="store_true", help="forget what has passed")
    parser.add_argument("--random", type=int, metavar="N", help="check N random problems and stop")
    given = parser.parse_args(arguments)
    if given.random:
        return int(random_problems(given.random) > 0)
    if given.list:
        for stage in STAGES:
            print(f"{stage.name:16} at most {stage.minutes} min   {stage.what}")
        return 0
    import torch

    if not torch.cuda.is_available():
        print(f"gpu-check needs a CUDA device; torch {torch.__version__} sees none")
        return 2
    OUT.mkdir(parents=True, exist_ok=True)
    digest = sources()
    earlier = {} if given.again else load(digest)
    stages = earlier.get("stages", {})
    bench_run = earlier.get("bench_run") or time.strftime("%Y%m%dT%H%M%SZ", time.gmtime())
    result = {"sources": digest, "facts": facts(), "bench_run": bench_run, "stages": stages}
    wanted = [s for s in STAGES if not given.stage or s.name in given.stage]
    for stage in wanted:
        if stages.get(stage.name, {}).get("state") == "passed" and not given.stage:
            print(f"== {stage.name}: passed before", flush=True)
            continue
        print(f"== {stage.name}: {stage.what}", flush=True)
        stages[stage.name] = run(stage, bench_run)
        found = stages[stage.name]
        print(f"== {stage.name}: {found['state']} {found.get('why', '')}", flush=True)
        write(result)
    write(result)
    print((OUT / "summary.md").read_text())
    required = {stage.name for stage in wanted if stage.required}
    return int(any(stages.get(n, {}).get("state") == "failed" for n in required))


if __name__ == "__main__":
    sys.exit(main())
