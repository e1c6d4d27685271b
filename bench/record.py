"""Rows of results/*.jsonl, and the facts about machine and software that each of them carries."""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import os
import platform
import re
import subprocess
import tempfile
from datetime import UTC, datetime
from pathlib import Path

from .cases import DIRECTIONS
from .timing import LEAST_CLEAN

ROOT = Path(__file__).resolve().parent
RESULTS = ROOT / "results"

# glibc gives large blocks back to the system at every free and page-faults them in anew, which is
# half of plain PyTorch's time here. "kept" makes it keep them; both settings are what people run.
ALLOCATORS = {
    "default": {},
    "kept": {
        "MALLOC_MMAP_MAX_": "0",
        "MALLOC_TRIM_THRESHOLD_": str(2**34),
        "MALLOC_TOP_PAD_": str(2**28),
    },
}
_VARIABLES = tuple(ALLOCATORS["kept"])


# Names a folder that a run's processes share: each reference is computed once for all of them.
REFERENCES = "LAM_BENCH_REFERENCES"


@contextlib.contextmanager
def shared_references():
    """That folder while the run lasts; the parent process's where there is one."""
    if REFERENCES in os.environ:
        yield
        return
    with tempfile.TemporaryDirectory() as folder:
        os.environ[REFERENCES] = folder
        try:
            yield
        finally:
            del os.environ[REFERENCES]


def allocator_of(environment=os.environ) -> str:
    """Which of ALLOCATORS this environment is; "custom" when it is none."""
    found = {name: environment[name] for name in _VARIABLES if name in environment}
    for name, wanted in ALLOCATORS.items():
        if found == wanted:
            return name
    return "custom"


def environment_for(allocator: str) -> dict[str, str]:
    """A copy of the environment with that allocator setting."""
    rest = {name: value for name, value in os.environ.items() if name not in _VARIABLES}
    return rest | ALLOCATORS[allocator]


def cpu_model() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.processor() or platform.machine()
    model = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    return model[1].strip() if model else platform.machine()


def cpu_level() -> str:
    """The widest vector level that matters to attention, from the processor's flags."""
    try:
        flags = set(
            re.search(r"^flags\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.M)[1].split()
        )
    except (OSError, TypeError):
        return platform.machine()
    wanted = (
        ("amx", {"amx_tile", "amx_bf16", "avx512f"}),
        ("avx512", {"avx512f", "avx512bw", "avx512dq", "avx512vl"}),
        ("avx2", {"avx2", "fma", "f16c"}),
    )
    return next((name for name, need in wanted if need <= flags), "portable")


def kernel_level() -> str:
    """The level our kernels run at; "none" where they cannot run."""
    from lam_kernels.ops import _native

    return "none" if _native.unavailable() else _native.level()


def machine_slug() -> str:
    """The processor in a file name: no host name, no address."""
    words = re.sub(r"\(R\)|\(TM\)|CPU|Processor|@", " ", cpu_model(), flags=re.IGNORECASE)
    slug = re.sub(r"[^a-z0-9.]+", "-", words.lower()).strip("-")
    return f"{slug}-{cpu_level()}-{os.cpu_count()}cpu"


def tree() -> Path:
    """Where the lam_kernels that is measured lies: this checkout, or the one of `--against`."""
    import lam_kernels

    return Path(lam_kernels.__file__).parent.parent


# what a measurement depends on, and not the words and results beside it
_MEASURED = (":/lam_kernels", ":/csrc", ":/python_ref", ":/setup.py", ":/bench/*.py")


def commit() -> str:
    """Short hash of that checkout, "-dirty" where its sources differ; "none" outside one."""
    import lam_kernels

    git = ["git", "-C", str(Path(lam_kernels.__file__).parent)]
    try:
        head = subprocess.run(
            [*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True
        )
        if head.returncode:
            return "none"
        status = subprocess.run(
            [*git, "status", "--porcelain", "--untracked-files=no", "--", *_MEASURED],
            capture_output=True, text=True,
        )  # fmt: skip
    except OSError:
        return "none"
    return head.stdout.strip() + ("-dirty" if status.stdout.strip() else "")


def gpu_facts() -> dict:
    """Device, driver and compiler of a CUDA machine; {} without one."""
    import torch

    if not torch.cuda.is_available():
        return {}
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        driver = subprocess.run(query, capture_output=True, text=True).stdout.strip()
    except OSError:
        driver = ""
    properties = torch.cuda.get_device_properties(0)
    try:
        triton = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        triton = "none"
    return {
        "gpu": properties.name,
        "gpu_arch": f"sm_{properties.major}{properties.minor}",
        "driver": driver.splitlines()[0] if driver else "unknown",
        "cuda": torch.version.cuda,
        "triton": triton,
    }


def facts(device: str = "cpu") -> dict:
    """What every row of a run has in common; imports torch."""
    import torch

    from lam_kernels import __version__

    now = datetime.now(UTC)
    return (gpu_facts() if device == "cuda" else {}) | {
        "date": now.strftime("%Y-%m-%d"),
        "time": now.strftime("%H:%M:%S"),
        "machine": cpu_model(),
        "cpus": os.cpu_count(),
        "level": cpu_level(),
        "kernel_level": kernel_level(),
        "torch_level": torch.backends.cpu.get_cpu_capability(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "lam_kernels": __version__,
        "commit": commit(),
    }


def default_path(device: str = "cpu") -> Path:
    slug = machine_slug()
    if device == "cuda":
        slug = re.sub(r"[^a-z0-9]+", "-", gpu_facts()["gpu"].lower()).strip("-")
    return RESULTS / f"{datetime.now(UTC):%Y-%m-%d}-{slug}.jsonl"


def check_writable(path: Path) -> None:
    """OSError before anything is measured, if rows cannot be appended to this file."""
    was_there = path.exists()
    append(path, [])
    if not was_there:
        path.unlink()


def append(path: Path, rows: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        for row in rows:
            file.write(json.dumps(row, allow_nan=False) + "\n")


_TEXTS = ("run", "date", "machine", "torch", "commit", "case", "section", "measure", "contender",
          "dtype", "allocator", "python", "lam_kernels", "level", "kernel_level")  # fmt: skip
_TEXTS_OF_A_MEASUREMENT = ("direction", "label")
_OPTIONAL_TEXTS = ("set", "problem", "device", "backend", "error", "missing", "note", "differs",
                   "memory_error", "gpu", "driver")  # fmt: skip
_NUMBERS = ("threads", "cpus", "median_ms", "p20_ms", "p80_ms", "samples", "dropped", "peak_mib",
            "kept_mib", "ours_over_this", "ours_over_this_p20", "ours_over_this_p80", "target",
            "flops", "least_bytes", "tflops", "gbps", "share_of_matmul", "share_of_copy", "length",
            "matmul_tflops", "copy_gbps", "peak_tflops", "peak_gbps", "ours_minus_this_us",
            "first_call_ms")  # fmt: skip
_ABOVE_ZERO = ("median_ms", "length", "matmul_tflops", "copy_gbps", "peak_tflops", "peak_gbps")
_LARGEST = 1e18
_TOGETHER = (("target_met", "target"), ("ours_over_this_p20", "ours_over_this_p80"),
             ("ours_over_this_p20", "ours_over_this"), ("median_ms", "p20_ms"),
             ("median_ms", "p80_ms"), ("median_ms", "samples"), ("median_ms", "disturbed"),
             ("tflops", "flops"), ("tflops", "least_bytes"))  # fmt: skip
_NEEDED = {  # beside texts, by measure, where nothing failed
    "peaks": ("matmul_tflops", "copy_gbps"),
    "time": ("median_ms", "p20_ms", "p80_ms", "samples", "disturbed"),
    "overhead": ("median_ms", "p20_ms", "p80_ms", "samples", "disturbed"),
    "memory": ("peak_mib", "kept_mib"),
}
LARGEST_FILE = 2**28


def read(path: Path) -> list[dict]:
    """All rows of a file. ValueError names the line that is none."""
    if path.stat().st_size > LARGEST_FILE:
        raise ValueError(f"{path} is larger than {LARGEST_FILE} bytes: no results file")
    rows = []
    for number, line in enumerate(path.read_text(errors="replace").splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (json.JSONDecodeError, RecursionError) as error:
            raise ValueError(f"{path}, line {number}: not a row of JSON ({error})") from None
        if wrong := _no_row(row):
            raise ValueError(f"{path}, line {number}: not a measurement of this bench ({wrong})")
        rows.append(row)
    return rows


def _no_row(row: object) -> str:
    """Why this is no row, "" when it is one: what report and compare read is there, has its type
    and can be drawn."""
    if not isinstance(row, dict):
        return "no object"
    texts = _TEXTS + (_TEXTS_OF_A_MEASUREMENT if row.get("measure") != "peaks" else ())
    for name in texts + tuple(name for name in _OPTIONAL_TEXTS if name in row):
        if not isinstance(row.get(name), str):
            return f"{name} is not text"
    if not re.fullmatch(r"[\w-]+", row.get("set", "part")):  # part of a plot's file name
        return "set is no name"
    if row["measure"] not in _NEEDED:
        return f"measure is none of {', '.join(_NEEDED)}"
    if row.get("direction", "both") not in DIRECTIONS:
        return f"direction is none of {', '.join(DIRECTIONS)}"
    for name in _NUMBERS:
        value = row.get(name, 1)
        if isinstance(value, bool) or not isinstance(value, int | float) or value != value:
            return f"{name} is not a number"
        if not abs(value) <= _LARGEST:
            return f"{name} is too large"
        if name in _ABOVE_ZERO and not value > 0:
            return f"{name} is not above 0"
    for name in ("disturbed", "target_met"):
        if not isinstance(row.get(name, False), bool):
            return f"{name} is neither true nor false"
    for name in ("threads", "cpus"):
        if not isinstance(row.get(name), int):
            return f"{name} is missing"
    for name, other in _TOGETHER:
        if name in row and other not in row:
            return f"{other} is missing"
    if "error" in row or "missing" in row:
        return ""
    absent = [name for name in _NEEDED[row["measure"]] if name not in row]
    return f"{absent[0]} is missing" if absent else ""


def uncertain(row: dict) -> bool:
    """Whether a time is from fewer than LEAST_CLEAN samples without other load."""
    return row["disturbed"] or row["samples"] < LEAST_CLEAN


def newest() -> Path:
    """The results file that was written last; FileNotFoundError when there is none."""
    files = [path for path in RESULTS.glob("*.jsonl") if path.stat().st_size]
    files.sort(key=lambda path: (path.name[:10], path.stat().st_mtime))
    if not files:
        raise FileNotFoundError(f"no results in {RESULTS}: `python -m bench run` writes them")
    return files[-1]
