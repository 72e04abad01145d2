# Two commands do everything on a fresh machine with Python 3.11+ and a C++ compiler:
#   make demo    the main job on an embedded default
#   make test    the whole test suite
# Kernel work:
#   make build               rebuild the native parts in place (needs `make setup` once)
#   make build KERNELS=stem  only that kernel

PYTHON ?= python3
PY := .venv/bin/python
TORCH ?= torch==2.13.0

.PHONY: demo test setup build

.venv/installed: pyproject.toml setup.py
	$(PYTHON) -m venv .venv
	$(PY) -m pip install -q --disable-pip-version-check "$(TORCH)" "setuptools>=77" wheel "pybind11>=3.0" ninja
	$(PY) -m pip install -q --disable-pip-version-check --no-build-isolation -e ".[dev]"
	touch $@

setup: .venv/installed

build: setup
	PGOLF_KERNELS=$(KERNELS) $(PY) setup.py -q build_ext --inplace

test: setup
	$(MAKE) --no-print-directory build
	$(PY) -m pytest

demo: setup
	$(MAKE) --no-print-directory build
	$(PY) -m pgolf_fast demo
