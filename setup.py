"""Build the libraries with ninja: `_cpu` (kernels and torch ops) and `_host` (no tensors).

LAM_DEBUG=1         -O0 -g, in a build folder of its own
LAM_CUDA=auto|0|1   1 stops with the reason when no GPU library can be built; this version has none
MAX_JOBS            how many files are compiled at once (default: one a core)
"""

import fcntl
import importlib.util
import json
import os
import platform
import shlex
import shutil
import subprocess
import sysconfig
import time
from importlib.metadata import version
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
DEBUG = os.environ.get("LAM_DEBUG") == "1"
SUFFIX = sysconfig.get_config_var("EXT_SUFFIX")
CXX = os.environ.get("CXX", "g++")
TARGET_TORCH = (
    "2.11"  # the stable ABI of this version: the libraries load in it and in every later one
)
TARGET_VERSION = "0x020b000000000000"

# Never -ffast-math: with it isinf and isnan are compiled to false, and masks live on -inf.
OPT = ["-O0", "-g"] if DEBUG else ["-O3", "-fno-math-errno", "-fno-trapping-math"]
BASE = [
    *OPT,
    "-std=c++17",
    "-fPIC",
    "-fvisibility=hidden",
    "-Wall",
    "-Wno-unknown-pragmas",
    "-Icsrc",
]
# GCC 12 warns inside its own AVX-512 header (bug 105593).
AVX512 = "-mavx512f -mavx512bw -mavx512dq -mavx512vl -mfma -mf16c -mprefer-vector-width=512"
AVX512 = [*AVX512.split(), "-Wno-uninitialized", "-Wno-maybe-uninitialized"]

# level -> (source, flags that only this file may be compiled with)
LEVELS = {"portable": ("csrc/cpu/masked_attention_portable.cpp", [])}
if platform.machine() == "x86_64":
    LEVELS |= {
        "avx2": ("csrc/cpu/masked_attention_avx2.cpp", ["-mavx2", "-mfma", "-mf16c"]),
        "avx512": ("csrc/cpu/masked_attention_avx512.cpp", AVX512),
        "amx_emulated": ("csrc/cpu/masked_attention_amx.cpp", [*AVX512, "-DLAM_EMULATE_AMX"]),
        "amx": (
            "csrc/cpu/masked_attention_amx.cpp",
            [*AVX512, "-mavx512bf16", "-mamx-tile", "-mamx-bf16"],
        ),
    }

# Files that are compiled once for each level, with LAM_LEVEL defined as its name.
BINDINGS = [
    "masked_attention",
    "global_local_attention",
    "map_gated_attention",
    "score_masked_attention",
]
LEVEL_SOURCES = [f"csrc/cpu/{name}.cpp" for name in BINDINGS[1:]]


def package_dir(name):
    """Where a package is, without the seconds that importing torch takes."""
    spec = importlib.util.find_spec(name)
    if spec is None:
        raise SystemExit(
            f"{name} must be installed first: pip install {name}, then --no-build-isolation"
        )
    return Path(spec.origin).parent


def why_no_cuda():
    reason = "this version has no CUDA kernels"
    if os.environ.get("LAM_CUDA", "auto") == "1":
        raise SystemExit(f"LAM_CUDA=1, but {reason}")
    return "LAM_CUDA=0" if os.environ.get("LAM_CUDA") == "0" else reason


def ninja_program():
    """The one of this Python's environment, which need not be on the path."""
    beside = Path(sysconfig.get_path("scripts"), "ninja")
    found = str(beside) if beside.exists() else shutil.which("ninja")
    if found is None:
        raise SystemExit("ninja must be installed first: pip install ninja")
    return found


def write_if_changed(path, text):
    if not path.exists() or path.read_text() != text:
        path.write_text(text)


def ninja_file(out):
    """The build as ninja text: one object a (library, level), so that no two share a path."""
    torch, pybind11 = package_dir("torch"), package_dir("pybind11")
    lines = [
        f"builddir = {out}",
        f"rule cxx\n command = {CXX} -MMD -MF $out.d $flags -c $in -o $out",
        " depfile = $out.d\n deps = gcc\n description = compile $in ($level)",
        f"rule link\n command = {CXX} -shared $objects -o $out $flags\n description = link $out",
    ]

    def obj(library, level, source, flags):
        name = out / library / level / (Path(source).stem + ".o")
        flags = shlex.join([*BASE, *flags])
        lines.append(f"build {name}: cxx {source}\n flags = {flags}\n level = {level}")
        return str(name)

    def link(library, objects, flags, implicit=""):
        name = f"{out / library}{SUFFIX}"
        lines.append(f"build {name}: link {' '.join(objects)} | {implicit}")
        lines.append(f" objects = {' '.join(objects)}\n flags = {' '.join(flags)}")
        return name

    stable = [
        f"-isystem{torch / 'include'}",
        "-DTORCH_STABLE_ONLY",
        f"-DTORCH_TARGET_VERSION={TARGET_VERSION}",
    ]
    objects = [obj("_cpu", level, *LEVELS[level]) for level in LEVELS]
    objects += [
        obj("_cpu", level, source, [*LEVELS[level][1], f"-DLAM_LEVEL={level}"])
        for level in LEVELS
        for source in LEVEL_SOURCES
    ]
    # _host calls into these two
    objects += [
        obj("_cpu", "baseline", f"csrc/cpu/{n}.cpp", ["-fvisibility=default"])
        for n in ("levels", "scratch")
    ]
    objects += [obj("_cpu", "baseline", f"csrc/bind_{name}.cpp", stable) for name in BINDINGS]
    cpu = link("_cpu", objects, [f"-Wl,-soname,_cpu{SUFFIX}", f"-L{torch / 'lib'}", "-ltorch_cpu"])
    python = [
        f"-isystem{pybind11 / 'include'}",
        f"-isystem{sysconfig.get_path('include')}",
        f"-I{out}",
    ]
    host = obj("_host", "baseline", "csrc/bind_python.cpp", python)
    link("_host", [host], [cpu, "-Wl,-rpath,'$$ORIGIN'"], implicit=cpu)
    return "\n".join(lines) + "\n"


class Build(build_ext):
    """One ninja run for both libraries; setuptools only says where they go."""

    def build_extensions(self):
        start = time.monotonic()
        # The same for wheels and editable installs, so that each reuses the other's objects.
        out = Path("build", f"ninja{SUFFIX.removesuffix('.so')}{'-debug' if DEBUG else ''}")
        Path(ROOT, out).mkdir(parents=True, exist_ok=True)
        compiler = subprocess.run(
            [CXX, "--version"], capture_output=True, text=True, check=True
        ).stdout
        stamp = {
            "torch": version("torch"),
            "target_torch": TARGET_TORCH,
            "python": SUFFIX,
            "levels": list(LEVELS),
            "flags": {level: shlex.join([*BASE, *flags]) for level, (_, flags) in LEVELS.items()},
            "compiler": compiler.splitlines()[0],
            "debug": DEBUG,
            "cuda_skipped": why_no_cuda(),
        }
        print(f"lam_kernels: cpu={','.join(LEVELS)} cuda=no ({stamp['cuda_skipped']})", flush=True)
        jobs = os.environ.get("MAX_JOBS") or str(len(os.sched_getaffinity(0)))
        with open(ROOT / out / "lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            text = json.dumps(stamp, indent=1)
            header = f"#define LAM_BUILD_STAMP {json.dumps(text)}\n"  # a JSON string is a C string
            write_if_changed(ROOT / out / "build_stamp.h", header)
            write_if_changed(ROOT / out / "build.ninja", ninja_file(out))
            ninja = [ninja_program(), "-f", f"{out}/build.ninja", "-j", jobs]
            env = {"NINJA_STATUS": "[%f/%t, %es] ", **os.environ}
            if subprocess.run(ninja, cwd=ROOT, env=env).returncode:
                raise SystemExit("lam_kernels: the compiler's message is above")
            for ext in self.extensions:
                target = Path(self.get_ext_fullpath(ext.name))
                target.parent.mkdir(parents=True, exist_ok=True)
                self.copy_file(str(ROOT / out / target.name), str(target))
        (target.parent / "_build.json").write_text(text)
        print(f"lam_kernels: libraries ready after {time.monotonic() - start:.1f} s", flush=True)

    def copy_extensions_to_source(self):  # of in-place and editable builds
        super().copy_extensions_to_source()
        stamp = Path("lam_kernels", "_build.json")
        self.copy_file(str(Path(self.build_lib, stamp)), str(ROOT / stamp))


class Wheel(bdist_wheel):
    """From an empty folder: what an earlier build left there would be packed too."""

    def run(self):
        shutil.rmtree(self.get_finalized_command("build").build_lib, ignore_errors=True)
        super().run()


setup(
    ext_modules=[Extension(f"lam_kernels.{name}", []) for name in ("_cpu", "_host")],
    cmdclass={"build_ext": Build, "bdist_wheel": Wheel},
)
