"""Build the libraries with ninja: `_cpu` (kernels and torch ops), `_host` (no tensors), and `_cuda`
where torch is a CUDA build and nvcc is there. `setup.py emulation` builds `_cuda_emulation`: the
CUDA kernels compiled by the C++ compiler (docs/emulation.md).

LAM_DEBUG=1          -O0 -g, in a build folder of its own
LAM_CUDA=auto|0|1    1 stops with the reason when no GPU library can be built
TORCH_CUDA_ARCH_LIST the GPUs that `_cuda` is compiled for, such as "8.0;9.0" (default: 8.0, 9.0,
                     10.0 as machine code, and the last as PTX for later ones)
CUDA_HOME            where nvcc and the CUDA headers are (default: the nvcc on the path)
MAX_JOBS             how many files are compiled at once (default: one a core)
"""

import fcntl
import importlib.util
import json
import os
import platform
import re
import runpy
import shlex
import shutil
import subprocess
import sysconfig
import time
from importlib.metadata import version
from pathlib import Path

from setuptools import Command, Extension, setup
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

# ops with CUDA kernels
CUDA_OPS = ("masked_attention", "global_local_attention", "map_gated_attention")
CUDA_PLANS = ("plan", "map_gated_attention_plan")
CUDA_SOURCES = [
    f"csrc/cuda/{n}.cu"
    for n in ("device", *(f"{op}_{d}" for op in CUDA_OPS for d in ("bf16", "f16", "f32")))
]
DEFAULT_ARCHS = ("8.0", "9.0", "10.0+PTX")
# A spill stops the build: with nvcc 13.0 there is none. LAM_CUDA=0 builds without these kernels.
NVCC = [
    *(["-O0", "-g"] if DEBUG else ["-O3", "-Xptxas=-warn-spills,-Werror"]),
    "-std=c++17",
    "-Icsrc",
    "--threads=4",
    "-Xcompiler=-fPIC,-fvisibility=hidden",
]
# Type punning is what fragments of matrix products are made of.
EMULATION = ["-fno-strict-aliasing", "-x", "c++"]

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


def cuda_home():
    """Where nvcc and the CUDA headers are, or None; nowhere but in CUDA_HOME where that is set."""
    nvcc = shutil.which("nvcc")
    found = [nvcc and Path(nvcc).resolve().parent.parent, "/usr/local/cuda"]
    chosen = os.environ.get("CUDA_HOME")
    for home in [chosen] if chosen else found:
        if home and Path(home, "bin", "nvcc").exists():
            root = Path(home).resolve()
            if (root / "include" / "cuda_runtime.h").exists():
                return root
    return None


def cuda_headers():
    """A folder with cuda_bf16.h and cuda_fp16.h, of the toolkit or of Triton's wheel; or None."""
    places = [cuda_home() and cuda_home() / "include"]
    if importlib.util.find_spec("triton"):
        places.append(package_dir("triton") / "backends" / "nvidia" / "include")
    return next((place for place in places if place and (place / "cuda_bf16.h").exists()), None)


def why_no_cuda():
    """Why `_cuda` is not built, "" when it is."""
    setting = os.environ.get("LAM_CUDA", "auto")
    if setting == "0":
        return "LAM_CUDA=0"
    text = (package_dir("torch") / "version.py").read_text()
    reason = ""
    if not re.search(r"^cuda\b[^=]*= *['\"]", text, re.M):
        reason = f"torch {version('torch')} is not a CUDA build"
    elif cuda_home() is None:
        where = os.environ.get("CUDA_HOME")
        reason = f"CUDA_HOME={where} holds no nvcc with its headers"
        reason = reason if where else "nvcc was not found: set CUDA_HOME"
    if reason and setting == "1":
        raise SystemExit(f"LAM_CUDA=1, but {reason}")
    return reason


def gencode():
    """nvcc's flags for the architectures of TORCH_CUDA_ARCH_LIST."""
    listed = re.split(r"[;,\s]+", os.environ.get("TORCH_CUDA_ARCH_LIST", "").strip())
    archs = []
    for arch in [arch for arch in listed if arch] or DEFAULT_ARCHS:
        match = re.fullmatch(r"(\d+)\.(\d)([af]?)(\+PTX)?", arch)
        if not match or int(match[1]) < 8:
            raise SystemExit(
                f"TORCH_CUDA_ARCH_LIST: {arch} is none of 8.0, 9.0, 10.0, ... with +PTX or not"
            )
        archs.append((int(match[1] + match[2]), bool(match[4])))
    # One source for all: the front end runs once, for the oldest, and ptxas for each.
    base = min(archs)[0]
    flags = [f"-gencode=arch=compute_{base},code=sm_{number}" for number, _ in archs]
    if any(ptx for _, ptx in archs):
        flags.append(f"-gencode=arch=compute_{base},code=compute_{base}")
    return flags


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


class NinjaFile:
    """The build as ninja text: one object a (library, level), so that no two share a path."""

    def __init__(self, out):
        self.out = out
        self.torch = package_dir("torch")
        self.stable = [
            f"-isystem{self.torch / 'include'}",
            "-DTORCH_STABLE_ONLY",
            f"-DTORCH_TARGET_VERSION={TARGET_VERSION}",
        ]
        self.torch_link = [f"-L{self.torch / 'lib'}", "-ltorch_cpu"]
        self.lines = [
            f"builddir = {out}",
            f"rule cxx\n command = {CXX} -MMD -MF $out.d $flags -c $in -o $out",
            " depfile = $out.d\n deps = gcc\n description = compile $in ($level)",
            f"rule nvcc\n command = {cuda_home()}/bin/nvcc -MMD -MF $out.d $flags -c $in -o $out",
            " depfile = $out.d\n deps = gcc\n description = compile $in ($level)",
            f"rule link\n command = {CXX} -shared $objects -o $out $flags",
            " description = link $out",
        ]

    def obj(self, library, level, source, flags, rule="cxx"):
        name = self.out / library / level / (Path(source).stem + ".o")
        flags = shlex.join([*(BASE if rule == "cxx" else NVCC), *flags])
        self.lines.append(f"build {name}: {rule} {source}\n flags = {flags}\n level = {level}")
        return str(name)

    def link(self, library, objects, flags, implicit=""):
        name = f"{self.out / library}{SUFFIX}"
        self.lines.append(f"build {name}: link {' '.join(objects)} | {implicit}")
        self.lines.append(f" objects = {' '.join(objects)}\n flags = {' '.join(flags)}")
        return name

    def cpu(self):
        objects = [self.obj("_cpu", level, *LEVELS[level]) for level in LEVELS]
        objects += [
            self.obj("_cpu", level, source, [*LEVELS[level][1], f"-DLAM_LEVEL={level}"])
            for level in LEVELS
            for source in LEVEL_SOURCES
        ]
        # _host calls into these two
        objects += [
            self.obj("_cpu", "baseline", f"csrc/cpu/{n}.cpp", ["-fvisibility=default"])
            for n in ("levels", "scratch")
        ]
        objects += [
            self.obj("_cpu", "baseline", f"csrc/bind_{name}.cpp", self.stable) for name in BINDINGS
        ]
        cpu = self.link("_cpu", objects, [f"-Wl,-soname,_cpu{SUFFIX}", *self.torch_link])
        python = [
            f"-isystem{package_dir('pybind11') / 'include'}",
            f"-isystem{sysconfig.get_path('include')}",
            f"-I{self.out}",
        ]
        host = self.obj("_host", "baseline", "csrc/bind_python.cpp", python)
        self.link("_host", [host], [cpu, "-Wl,-rpath,'$$ORIGIN'"], implicit=cpu)

    def cuda(self, archs):
        """`_cuda`. It also links and loads where torch is a CPU build, for tests to look at."""
        objects = [self.obj("_cuda", "gpu", source, archs, rule="nvcc") for source in CUDA_SOURCES]
        objects += [self.obj("_cuda", "host", f"csrc/cuda/{n}.cpp", []) for n in CUDA_PLANS]
        on_gpu = [*self.stable, "-DLAM_CUDA_KERNELS", "-DLAM_ON_GPU", "-DUSE_CUDA"]
        objects += [self.obj("_cuda", "host", f"csrc/bind_{op}.cpp", on_gpu) for op in CUDA_OPS]
        library = next(
            (cuda_home() / n for n in ("lib64", "lib") if (cuda_home() / n).exists()), ""
        )
        runtime = [f"-L{library}", "-lcudart_static", "-ldl", "-lrt", "-lpthread"]
        return self.link("_cuda", objects, [*self.torch_link, *runtime])

    def emulation(self):
        """`_cuda_emulation`: the sources of `_cuda` for this machine's CPU."""
        flags = [*EMULATION, f"-isystem{cuda_headers()}"]
        stamp = runpy.run_path("lam_kernels/ops/_sources.py")["emulation_stamp"](ROOT)
        stamped = {CUDA_SOURCES[0]: [f'-DLAM_EMULATION_STAMP="{stamp}"']}
        objects = [
            self.obj("_cuda_emulation", "cpu", source, [*flags, *stamped.get(source, [])])
            for source in CUDA_SOURCES
        ]
        objects += [
            self.obj("_cuda_emulation", "cpu", f"csrc/cuda/{n}.cpp", []) for n in CUDA_PLANS
        ]
        emulated = [*self.stable, "-DLAM_CUDA_KERNELS"]
        objects += [
            self.obj("_cuda_emulation", "cpu", f"csrc/bind_{op}.cpp", emulated) for op in CUDA_OPS
        ]
        return self.link("_cuda_emulation", objects, self.torch_link)

    def text(self):
        return "\n".join(self.lines) + "\n"


def ninja_file(out):
    ninja = NinjaFile(out)
    ninja.cpu()
    if not why_no_cuda():
        ninja.cuda(gencode())
    return ninja.text()


def build_folder():
    # The same for wheels and editable installs, so that each reuses the other's objects.
    out = Path("build", f"ninja{SUFFIX.removesuffix('.so')}{'-debug' if DEBUG else ''}")
    Path(ROOT, out).mkdir(parents=True, exist_ok=True)
    return out


def run_ninja(out, name, text):
    """Build what `text` describes; one at a time in a folder."""
    write_if_changed(ROOT / out / name, text)
    jobs = os.environ.get("MAX_JOBS") or str(len(os.sched_getaffinity(0)))
    ninja = [ninja_program(), "-f", f"{out}/{name}", "-j", jobs]
    env = {"NINJA_STATUS": "[%f/%t, %es] ", **os.environ}
    if subprocess.run(ninja, cwd=ROOT, env=env).returncode:
        raise SystemExit("lam_kernels: the compiler's message is above")


class Build(build_ext):
    """One ninja run for both libraries; setuptools only says where they go."""

    def build_extensions(self):
        start = time.monotonic()
        out = build_folder()
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
            "cuda_archs": [] if why_no_cuda() else gencode(),
        }
        cuda = f"no ({stamp['cuda_skipped']})" if stamp["cuda_skipped"] else "yes"
        print(f"lam_kernels: cpu={','.join(LEVELS)} cuda={cuda}", flush=True)
        with open(ROOT / out / "lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            text = json.dumps(stamp, indent=1)
            header = f"#define LAM_BUILD_STAMP {json.dumps(text)}\n"  # a JSON string is a C string
            write_if_changed(ROOT / out / "build_stamp.h", header)
            run_ninja(out, "build.ninja", ninja_file(out))
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


class Emulation(Command):
    """The CUDA kernels for the CPU, beside the other libraries of the source tree; never packed."""

    user_options: list = []  # noqa: RUF012
    initialize_options = finalize_options = lambda self: None

    def run(self):
        if cuda_headers() is None:
            raise SystemExit(
                "the emulation needs cuda_bf16.h and cuda_fp16.h: install triton, which brings "
                "them, or set CUDA_HOME"
            )
        out = build_folder()
        with open(ROOT / out / "lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            ninja = NinjaFile(out)
            library = Path(ninja.emulation())
            run_ninja(out, "emulation.ninja", ninja.text())
            self.copy_file(str(ROOT / library), str(ROOT / "lam_kernels" / library.name))


class Wheel(bdist_wheel):
    """From an empty folder: what an earlier build left there would be packed too."""

    def run(self):
        shutil.rmtree(self.get_finalized_command("build").build_lib, ignore_errors=True)
        super().run()


LIBRARIES = ("_cpu", "_host") if why_no_cuda() else ("_cpu", "_host", "_cuda")

setup(
    ext_modules=[Extension(f"lam_kernels.{name}", []) for name in LIBRARIES],
    cmdclass={"build_ext": Build, "bdist_wheel": Wheel, "emulation": Emulation},
)
