"""The tree keeps its promises: every op has all its rooms, README tells the truth, no file grows in
silence."""

from __future__ import annotations

import inspect
import re
import subprocess
from pathlib import Path

import pytest

import lam_kernels

ROOT = Path(__file__).resolve().parent.parent

# op -> the file stem that it has in every room
OPS = {
    "masked_attention": "masked_attention",
    "lam_attention": "masked_attention",
    "window_attention": "masked_attention",
    "global_local_attention": "global_local_attention",
    "map_gated_attention": "map_gated_attention",
    "score_masked_attention": "score_masked_attention",
}
NOT_OPS = {"backends", "explain"}

# folder, suffixes -> the most lines of a file
LIMITS = [
    ("csrc", (".h", ".cpp", ".cu", ".cuh"), 500),
    ("lam_kernels/triton", (".py",), 500),
    ("lam_kernels/ops", (".py",), 250),
    ("tests", (".py",), 400),
]
# file -> (its own limit, why)
LONGER = {
    "lam_kernels/ops/masked_attention.py": (
        560,
        "docstrings that are the manual, schema, fake, autograd, vmap and FLOPs of one op",
    ),
    "tests/ops/test_two_map_ops.py": (
        450,
        "what torch and a caller expect of an op, the same for two ops, on one page",
    ),
    "tests/ops/test_masked_attention_contract.py": (
        1000,
        "opcheck, compile, export, func, vmap, autocast, checkpoint, FLOPs of one op",
    ),
    "tests/ops/test_masked_attention_conventions.py": (
        600,
        "one test a row of the conventions table, kept in its order on one page",
    ),
}


def tracked(*patterns: str) -> list[Path]:
    """Files that git has or would take; without git, everything that is not hidden or built."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "--", *patterns]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode == 0:
        names = done.stdout.splitlines()
    else:
        names = [
            str(p.relative_to(ROOT))
            for p in ROOT.rglob("*")
            if not p.parts[len(ROOT.parts)].startswith(".")
        ]
    return [ROOT / name for name in sorted(set(names)) if (ROOT / name).is_file()]


def test_every_public_function_is_a_known_op():
    public = {n for n in lam_kernels.__all__ if inspect.isfunction(getattr(lam_kernels, n))}
    assert public - NOT_OPS == set(OPS)


@pytest.mark.parametrize("op", OPS)
def test_op_has_every_room(op):
    stem = OPS[op]
    for room in (
        "lam_kernels/ops/{}.py",
        "python_ref/{}.py",
        "tests/ops/test_{}.py",
        "csrc/cpu/{}.h",
    ):
        assert (ROOT / room.format(stem)).exists(), room.format(stem)
    assert any(stem in page.read_text() for page in tracked("bench/*.py")), f"no bench of {stem}"


@pytest.mark.parametrize("op", OPS)
def test_docstring_answers_its_questions(op):
    """Formula, shapes, dtypes and limits, edge cases, numerics, source; or one reference to the op
    that does."""
    function = getattr(lam_kernels, op)
    text = inspect.getdoc(function)
    flat = " ".join(text.split())
    assert re.search(r"^ {4}.*softmax", text, re.M), "no formula"
    assert re.search(r"arXiv \d{4}\.\d{5}", text), "no source"
    if OPS[op] != op:
        assert "masked_attention" in text
    else:
        for word in ("Args:", "Returns:", "Raises:", "Numerics:", "sees no key", "float32", "256"):
            assert word in flat, word
        for name in list(inspect.signature(function).parameters)[3:]:
            assert re.search(rf"\b{name}\b", text), f"{name} is not explained"
    lines = inspect.getsource(function).partition('"""')[0].splitlines()
    for name in ("query", "key", "value"):
        assert any(line.strip().startswith(f"{name}:") and "# [B" in line for line in lines), name


def test_public_names_have_docstrings():
    for name in lam_kernels.__all__:
        if not name.startswith("_"):
            assert inspect.getdoc(getattr(lam_kernels, name)), name


def test_readme_paths_exist():
    """Every path written as code in the Markdown files, and every relative link."""
    for page in tracked("*.md"):
        text = page.read_text()
        paths = re.findall(r"`((?:csrc|lam_kernels|python_ref|tests|bench)/[\w./-]*)`", text)
        paths += [p for p in re.findall(r"\]\(([^)#:\s]+)\)", text) if not p.startswith("#")]
        for path in paths:
            assert (ROOT / path).exists() or (page.parent / path).exists(), f"{page.name}: {path}"


def test_readme_states_every_convention():
    text = (ROOT / "README.md").read_text().lower()
    rows = (
        "order", "boolean masks", "sees no key", "bias of -inf", "hidden pair", "multiplier 0",
        "gate", "lse", "dtypes", "autocast", "rank", "scale", "heads", "determinism", "batch mates",
        "memory", "layout", "sizes", "dropout", "positions", "double backward", "bad input",
        "backend=none", "fork",
    )  # fmt: skip
    missing = [row for row in rows if row not in text]
    assert not missing, f"README.md does not state: {missing}"


@pytest.mark.parametrize(("folder", "suffixes", "limit"), LIMITS, ids=[row[0] for row in LIMITS])
def test_file_sizes(folder, suffixes, limit):
    for path in tracked(folder):
        name = str(path.relative_to(ROOT))
        if path.suffix in suffixes:
            lines = len(path.read_text().splitlines())
            allowed = LONGER.get(name, (limit, ""))[0]
            assert lines <= allowed, f"{name} has {lines} lines, at most {allowed}"


def test_allow_list_is_needed():
    for name, (limit, why) in LONGER.items():
        usual = next(most for folder, _, most in LIMITS if name.startswith(folder))
        assert len(why) > 20
        assert limit > usual
        assert len((ROOT / name).read_text().splitlines()) > usual, (
            f"{name} no longer needs its exception"
        )


def test_no_junk_drawers():
    for path in tracked():
        assert path.stem not in ("utils", "util", "common", "helpers", "misc"), path


def test_no_two_test_files_share_a_name():
    """pytest imports them by name alone: the second one would not be collected."""
    names = [path.name for path in tracked("tests/*.py") if path.name != "conftest.py"]
    assert len(names) == len(set(names)), [n for n in set(names) if names.count(n) > 1]


def test_no_machine_in_tracked_files():
    """No absolute path of somebody's machine, and nothing that only one machine can find."""
    places = re.compile(r"(?<![\w.])/(?:home|root|Users|mnt|work|opt|tmp)/\w+")
    mine = Path(__file__).resolve()
    for path in tracked():
        if path == mine or path.suffix in (".png", ".npz", ".safetensors", ".ico"):
            continue
        for number, line in enumerate(path.read_text(errors="replace").splitlines(), 1):
            found = places.search(line)
            assert not found, f"{path.relative_to(ROOT)}:{number}: {found.group()}"


def test_kernel_files_see_no_torch():
    """A kernel file includes the plain structs only; the binding is the one place that knows
    Tensors."""
    for path in tracked("csrc/cpu", "csrc/cuda"):
        if path.suffix in (".h", ".cpp", ".cu", ".cuh") and not path.name.startswith("bind"):
            text = path.read_text()
            assert not re.search(r'#include\s*[<"](torch|ATen|c10|pybind11|Python)', text), path


def test_import_direction():
    """Kernels and modules never import the reference; the reference imports torch and pure data
    only."""
    for path in tracked("lam_kernels"):
        if path.suffix == ".py" and "python_ref" in path.read_text():
            assert re.search(r"^\s+from python_ref|^[^\n]*python_ref/", path.read_text(), re.M), (
                path
            )
            assert not re.search(r"^(from|import) python_ref", path.read_text(), re.M), path
    for path in tracked("python_ref"):
        if path.suffix == ".py":
            for module in re.findall(
                r"^(?:from|import) (lam_kernels[\w.]*)(?: import (\w+))?", path.read_text(), re.M
            ):
                assert module in (
                    ("lam_kernels.patterns", module[1]),
                    ("lam_kernels", "patterns"),
                    ("lam_kernels.low_rank_mask", module[1]),
                ), path
