"""setup.py, the wheel, and the loader with libraries that are missing, broken or not its own."""

from __future__ import annotations

import json
import os
import re
import runpy
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import setuptools
import torch

import lam_kernels
from lam_kernels.ops import _backends, _native

ROOT = Path(__file__).resolve().parents[1]
SUFFIX = _native._SUFFIX


def run(*command: object, cwd: Path = ROOT, **env: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env={**os.environ, **env},
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
    )


# ---- the wheel


@pytest.fixture(scope="session")
def wheel(tmp_path_factory) -> Path:
    """Built once, from the objects of the editable build where there is one."""
    missing = [
        name for name in ("ninja", "pybind11") if shutil.which(name) is None and not _has(name)
    ]
    if missing:
        pytest.skip(f"building needs {', '.join(missing)}")
    out = tmp_path_factory.mktemp("wheel")
    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check")
    built = run(*pip, "wheel", ".", "--no-build-isolation", "--no-deps", "-w", out)
    assert built.returncode == 0, built.stdout[-3000:] + built.stderr[-3000:]
    (path,) = out.glob("*.whl")
    return path


def _has(module: str) -> bool:
    return run(sys.executable, "-c", f"import {module}").returncode == 0


@pytest.fixture(scope="session")
def installed(wheel, tmp_path_factory) -> Path:
    """A folder of its own with the wheel in it, and nothing else."""
    target = tmp_path_factory.mktemp("site")
    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check")
    done = run(*pip, "install", "--no-deps", "--no-index", "--target", target, wheel)
    assert done.returncode == 0, done.stderr
    return target


def python_in(site: Path, cwd: Path, code: str) -> subprocess.CompletedProcess:
    return run(sys.executable, "-c", code, cwd=cwd, PYTHONPATH=str(site))


def test_wheel_carries_what_is_promised_and_nothing_else(wheel):
    packed_files = zipfile.ZipFile(wheel)
    names = set(packed_files.namelist())
    skipped = json.loads(packed_files.read("lam_kernels/_build.json"))["cuda_skipped"]
    sources = {
        str(path.relative_to(ROOT))
        for package in ("lam_kernels", "python_ref")
        for path in (ROOT / package).rglob("*.py")
    }
    extra = {"lam_kernels/py.typed", "lam_kernels/_build.json"}
    built = ["_cpu", "_host"] + ["_cuda"] * (not skipped)
    libraries = {f"lam_kernels/{name}{SUFFIX}" for name in built}
    packed = {name for name in names if ".dist-info/" not in name}
    assert packed == sources | extra | libraries
    assert any(name.endswith("LICENSE") for name in names)
    assert f"lam_kernels-{lam_kernels.__version__}-" in wheel.name
    assert not wheel.name.endswith("-any.whl")


def test_wheel_imports_and_computes_in_an_empty_folder(installed, tmp_path):
    code = (
        "import torch, lam_kernels, python_ref\n"
        "print(lam_kernels.__file__); print(python_ref.__file__); print(lam_kernels.__version__)\n"
        "assert lam_kernels.backends()['cpu'] == '', lam_kernels.backends()\n"
        "x = torch.randn(1, 2, 9, 8, requires_grad=True)\n"
        "op = lam_kernels.masked_attention\n"
        "ours = op(x, x, x, backend='cpu')\n"
        "assert torch.allclose(ours, op(x, x, x, backend='reference'), atol=1e-5)\n"
        "ours.sum().backward()\n"
    )
    done = python_in(installed, tmp_path, code)
    assert done.returncode == 0, done.stderr
    package, reference, version = done.stdout.split()
    assert Path(package).is_relative_to(installed)
    assert Path(reference).is_relative_to(installed)
    assert version == lam_kernels.__version__


def test_wheel_names_what_it_was_built_with(installed):
    stamp = json.loads((installed / "lam_kernels" / "_build.json").read_text())
    assert stamp["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert stamp["target_torch"] == "2.11"
    assert stamp["levels"][0] == "portable"
    assert set(stamp["flags"]) == set(stamp["levels"])
    assert stamp["compiler"]


def test_import_loads_no_library(installed, tmp_path):
    done = python_in(
        installed, tmp_path, "import sys, lam_kernels; print('lam_kernels._host' in sys.modules)"
    )
    assert done.stdout.strip() == "False", done.stderr


# ---- rebuilding


def test_rebuild_without_a_change_compiles_nothing(wheel):
    done = run(sys.executable, "setup.py", "-q", "build_ext", "--inplace")
    assert done.returncode == 0, done.stderr
    assert "no work to do" in done.stdout
    assert re.search(r"libraries ready after [\d.]+ s", done.stdout)


@pytest.fixture
def setup_py(monkeypatch):
    """setup.py's own functions and tables; with keyword arguments as environment variables."""
    monkeypatch.setattr(setuptools, "setup", lambda **_: None)

    def load(**env: str) -> dict:
        for name in ("LAM_CUDA", "LAM_DEBUG"):
            monkeypatch.delenv(name, raising=False)
        for name, value in env.items():
            monkeypatch.setenv(name, value)
        return runpy.run_path(str(ROOT / "setup.py"))

    return load


def test_no_two_objects_share_a_path(setup_py):
    text = setup_py()["ninja_file"](Path("out"))
    outputs = re.findall(r"^build (\S+):", text, re.MULTILINE)
    assert len(outputs) == len(set(outputs)) > 6


def test_only_the_file_of_a_level_gets_its_flags(setup_py):
    built = setup_py()
    levels, base = built["LEVELS"], built["BASE"]
    assert levels["portable"][1] == []
    assert not [flag for flag in base if flag.startswith("-m")]
    for source, flags in levels.values():
        assert (ROOT / source).exists()
        assert not {"-march=native", "-ffast-math", "-Ofast"} & {*base, *flags}


def test_debug_build_is_not_optimised(setup_py):
    assert {"-O0", "-g"} <= set(setup_py(LAM_DEBUG="1")["BASE"])
    assert "-O3" in setup_py()["BASE"]


def test_a_cuda_library_that_is_demanded_and_cannot_be_built_stops_the_build(
    setup_py, monkeypatch, tmp_path
):
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    assert "CUDA" in setup_py()["why_no_cuda"]()
    assert "LAM_CUDA=0" in setup_py(LAM_CUDA="0")["why_no_cuda"]()
    with pytest.raises(SystemExit, match="LAM_CUDA=1, but"):
        setup_py(LAM_CUDA="1")["why_no_cuda"]()


# ---- the three states of the loader


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A package folder that the loader looks into; it starts with a good stamp and no library."""
    caches = (_native.stamp, _native._host, _native.unavailable)
    for cache in caches:
        cache.cache_clear()
    monkeypatch.setattr(_native, "_PACKAGE", tmp_path)
    monkeypatch.setattr(_backends, "_settled", {})
    stamp = {
        "torch": torch.__version__,
        "target_torch": "2.11",
        "python": SUFFIX,
        "levels": ["portable"],
    }

    def write(**changes) -> Path:
        (tmp_path / "_build.json").write_text(json.dumps({**stamp, **changes}))
        return tmp_path

    yield write
    monkeypatch.undo()
    for cache in caches:
        cache.cache_clear()


def assert_broken(sentence: str) -> None:
    """The loader raises; backends() and a call say the same sentence, and nothing falls back."""
    with pytest.raises(ImportError, match=sentence):
        _native.unavailable()
    assert re.search(sentence, lam_kernels.backends()["cpu"])
    x = torch.ones(1, 1, 2, 4)
    for backend in ("cpu", None):
        with pytest.raises(RuntimeError, match=sentence):
            lam_kernels.masked_attention(x, x, x, backend=backend)


def test_not_built(package):
    (package() / "_build.json").unlink()
    assert "make build" in lam_kernels.backends()["cpu"]
    assert _native.available_levels() == []
    assert _native.release_scratch() == 0
    with pytest.raises(RuntimeError, match="not built"):
        _native.level()
    x = torch.ones(1, 1, 2, 4)
    with pytest.raises(RuntimeError, match="not built"):
        lam_kernels.masked_attention(x, x, x, backend="cpu")
    assert lam_kernels.masked_attention(x, x, x, backend="reference").shape == x.shape


def test_built_for_another_python(package):
    package(python=".cpython-39-other.so")
    assert "not built for this Python" in lam_kernels.backends()["cpu"]


def test_torch_is_older_than_what_the_library_needs(package):
    package(target_torch="99.1")
    assert_broken(re.escape(f"torch 99.1 or later, this is torch {torch.__version__}"))


@pytest.mark.parametrize("version", ["2.11.0", "2.13.0+cpu", "3.0.0a0+git123"])
def test_any_later_torch_will_do(package, monkeypatch, version):
    package()
    monkeypatch.setattr(torch, "__version__", version)
    assert _native.stamp()["target_torch"] == "2.11"


def test_stamp_that_cannot_be_read(package):
    (package() / "_build.json").write_text("{")
    assert_broken(r"stamp .* cannot be read.*rebuild")


def test_missing_library(package):
    package()
    assert_broken(r"_cpu.* is missing: rebuild")


def test_broken_library(package):
    (package() / f"_cpu{SUFFIX}").write_bytes(b"not a library")
    assert_broken(r"_cpu.* is broken .*rebuild")


def test_stamp_of_another_build(installed, tmp_path):
    site = tmp_path / "site"
    shutil.copytree(installed, site)
    path = site / "lam_kernels" / "_build.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "compiler": "another one"}))
    done = python_in(
        site, tmp_path, "from lam_kernels.ops import _backends, _native; _native.unavailable()"
    )
    assert done.returncode != 0
    assert (
        "ImportError: lam_kernels: _build.json and the libraries come from different builds"
        in done.stderr
    )
