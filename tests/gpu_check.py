"""`make gpu-check`: every check that needs an NVIDIA GPU, in stages; one result, one summary.

    python tests/gpu_check.py                 all stages that have not passed yet
    python tests/gpu_check.py --list          the stages
    python tests/gpu_check.py --stage NAME    this one, again if it has passed
    python tests/gpu_check.py --again         all, from the start

It runs under the Python that calls it, installs nothing and needs no network. A stage is one
command with a time limit; the first is the most telling. Results: out/gpu-check/result.json (every
stage: state, seconds, command, end of its output) and summary.md, with the benchmark's targets. A
stage that passed stays passed for as long as the sources, the GPU, torch and Triton are the same,
so a stopped run goes on where it was. A stage whose tests were all skipped has failed.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import importlib.metadata
import json
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

from gpu_stages import PYTHON, STAGES, Stage

ROOT = Path(__file__).resolve().parent.parent
OUT = ROOT / "out" / "gpu-check"
TAIL = 4000  # characters of a stage's output that are kept


def sources(gpu: str = "") -> str:
    """A digest of what a result depends on."""
    digest = hashlib.sha256()
    paths = [ROOT / "setup.py", ROOT / "pyproject.toml"]
    for folder in ("lam_kernels", "python_ref", "tests", "csrc", "bench"):
        found = sorted((ROOT / folder).rglob("*"))
        paths += [path for path in found if path.suffix in (".py", ".cpp", ".h", ".cu", ".cuh")]
    for path in paths:
        digest.update(str(path.relative_to(ROOT)).encode() + path.read_bytes())
    for text in (gpu, _version("torch"), _version("triton"), platform.python_version()):
        digest.update(text.encode())
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
        try:
            asked = subprocess.run(query, capture_output=True, text=True, timeout=60)
            found["driver"] = (asked.stdout or asked.stderr).strip()[:200]
        except (OSError, subprocess.TimeoutExpired) as error:
            found["driver"] = f"unknown ({type(error).__name__})"
    return found


def tool_path() -> str:
    """PATH, with where a CUDA toolkit keeps its programs."""
    homes = filter(None, (os.environ.get("CUDA_HOME"), "/usr/local/cuda"))
    return os.pathsep.join([os.environ.get("PATH", ""), *(f"{home}/bin" for home in homes)])


def environment_of_stages(capability: str = "") -> dict[str, str]:
    """Kernels run on the GPU: neither interpreted nor emulated, and compiled for it alone."""
    given = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    places = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    mine = {"PYTHONPATH": os.pathsep.join(places), "LAM_EMULATE_CUDA": "0", "PATH": tool_path()}
    if capability:
        given.setdefault("TORCH_CUDA_ARCH_LIST", capability)
    return given | mine


def run(stage: Stage, bench_run: str, capability: str = "") -> dict:
    """Runs a stage; never raises for what the stage does. The bench's stages are one run of it."""
    if "bench" in stage.command:
        stage = stage._replace(command=[*stage.command, "--run", bench_run])
    if stage.tool and not shutil.which(stage.tool, path=tool_path()):
        return {"state": "left out", "why": f"{stage.tool} is not installed"}
    started = time.monotonic()
    log = OUT / f"{stage.name}.log"
    with log.open("w") as stream:
        try:
            state, why = _outcome(stage, environment_of_stages(capability), stream)
        except OSError as error:
            state, why = "failed", str(error)
    text = log.read_text(errors="replace")
    # pytest also ends well when it skipped everything
    if state == "passed" and "pytest" in stage.command and not re.search(r"\b\d+ passed\b", text):
        state, why = "failed", "every test was skipped"
    return {
        "state": state,
        "why": why,
        "seconds": round(time.monotonic() - started, 1),
        "command": " ".join(stage.command).replace(PYTHON, "python"),
        "output": text[-TAIL:],
        "targets": targets(text) if "bench" in stage.command else [],
    }


def _outcome(stage: Stage, environment: dict[str, str], stream) -> tuple[str, str]:
    """(state, why). Processes that the stage has started end with it."""
    running = subprocess.Popen(
        stage.command, cwd=ROOT, env=environment, stdout=stream, stderr=subprocess.STDOUT,
        stdin=subprocess.DEVNULL, start_new_session=True,
    )  # fmt: skip
    try:
        code = running.wait(60 * stage.minutes)
    except subprocess.TimeoutExpired:
        return "failed", f"longer than {stage.minutes} minutes"
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(running.pid, signal.SIGKILL)
        running.wait()
    if code == 5 and "pytest" in stage.command:
        return "failed", "no test was found"
    return ("passed", "") if code == 0 else ("failed", f"exit code {code}")


def targets(text: str) -> list[str]:
    """Of a benchmark's output: each contender that we are held to, and how we stand."""
    found, case = [], ""
    for line in text.splitlines():
        if line and not line.startswith(" "):
            case = " ".join(line.split()[:3])  # name, dtype, direction
        elif "target" in line:
            found.append(f"{case}: {' '.join(line.split())}")
    return found


def write(result: dict) -> None:
    """The result file and the summary, each at once."""
    sys.path.insert(0, str(ROOT))
    from lam_kernels.training.atomic_write import atomic_write

    atomic_write(OUT / "result.json", json.dumps(result, indent=1))
    lines = ["# gpu-check", ""]
    lines += [f"- {name}: {value}" for name, value in result["facts"].items()]
    lines += ["", "| stage | state | seconds | what |", "| --- | --- | --- | --- |"]
    for stage in STAGES:
        found = _found(result, stage) or {"state": "not run"}
        why = f": {found['why']}" if found.get("why") else ""
        lines.append(
            f"| {stage.name} | {found['state']}{why} | {found.get('seconds', '')} | {stage.what} |"
        )
    measured = [one for stage in STAGES for one in _found(result, stage).get("targets", ())]
    if measured:
        lines += ["", "## Targets", "", *(f"- {one}" for one in measured)]
    for stage in STAGES:
        found = _found(result, stage)
        if found.get("state") == "failed":
            lines += ["", f"## {stage.name}", "", "```", found.get("output", "")[-1500:], "```"]
    atomic_write(OUT / "summary.md", "\n".join(lines) + "\n")


def _found(result: dict, stage: Stage) -> dict:
    return result["stages"].get(stage.name, {})


def load(digest: str) -> tuple[dict[str, dict], str]:
    """Earlier results of stages for the same sources, and the run of the bench they are of."""
    try:
        found = json.loads((OUT / "result.json").read_text())
        if found["sources"] != digest:
            return {}, ""
        stages = {name: one for name, one in found["stages"].items() if isinstance(one, dict)}
        return stages, str(found["bench_run"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}, ""


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
    if given.random is not None:
        return int(random_problems(given.random) > 0)
    if given.list:
        for stage in STAGES:
            print(f"{stage.name:16} at most {stage.minutes} min   {stage.what}")
        return 0
    try:
        import torch
    except ImportError:
        print(f"gpu-check needs a Python with torch, {PYTHON} has none: make gpu-check PYTHON=...")
        return 2
    if not torch.cuda.is_available():
        print(f"gpu-check needs a CUDA device; torch {torch.__version__} sees none")
        return 2
    OUT.mkdir(parents=True, exist_ok=True)
    known = facts()
    digest = sources(known.get("gpu", ""))
    stages, bench_run = ({}, "") if given.again else load(digest)
    bench_run = bench_run or time.strftime("%Y%m%dT%H%M%SZ", time.gmtime())
    result = {"sources": digest, "facts": known, "bench_run": bench_run, "stages": stages}
    wanted = [s for s in STAGES if not given.stage or s.name in given.stage]
    for stage in wanted:
        passed = stages.get(stage.name, {}).get("state") == "passed"
        if passed and not given.stage and not stage.always:
            print(f"== {stage.name}: passed before", flush=True)
            continue
        print(f"== {stage.name}: {stage.what}", flush=True)
        stages[stage.name] = run(stage, bench_run, known.get("compute capability", ""))
        found = stages[stage.name]
        print(f"== {stage.name}: {found['state']} {found.get('why', '')}", flush=True)
        write(result)
    write(result)
    print((OUT / "summary.md").read_text())
    required = {stage.name for stage in wanted if stage.required}
    return int(any(stages.get(n, {}).get("state") == "failed" for n in required))


if __name__ == "__main__":
    sys.exit(main())
