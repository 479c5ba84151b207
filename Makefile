# `make demo` and `make test` are all the set-up there is: each makes .venv by itself.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP_INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

.PHONY: demo test format lint types check interpreted package pictures gpu-check clean FORCE

demo: $(VENV)/.demo
	$(BIN)/clr-optim demo $(ARGS)

# The two runs of tests take a core each.
test: lint types
	$(MAKE) -j2 --output-sync=target check interpreted
	$(MAKE) package

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.demo: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(PIP_INSTALL) -e ".[demo]"
	@touch $@

$(VENV)/.test: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(PIP_INSTALL) -e ".[test]"
	@touch $@

lint: $(VENV)/.test
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

format: $(VENV)/.test
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# As an installation lays the packages out: mypy does not read the mapping in pyproject.toml.
build/tree: FORCE
	rm -rf build/tree && mkdir -p build/tree
	cp -r clr_optim build/tree/ && cp -r kernels bench build/tree/clr_optim/

types: $(VENV)/.test build/tree
	cd build/tree && ../../$(BIN)/mypy --config-file ../../pyproject.toml -p clr_optim
	cp tests/typed_use.py build/tree/
	cd build/tree && ../../$(BIN)/mypy --config-file ../../pyproject.toml typed_use.py

check: $(VENV)/.test
	$(BIN)/python -m pytest $(ARGS)

# The Triton kernels on the CPU; a process of its own, since Triton decides when it is imported.
interpreted: $(VENV)/.test
	TRITON_INTERPRET=1 $(BIN)/python -m pytest tests/test_triton.py tests/test_triton_graphs.py $(ARGS)

# Wheel and sdist, and a step taken with the wheel alone in an environment that has nothing else.
package: $(VENV)/.test
	rm -rf build dist
	$(BIN)/python -m build --outdir dist . >/dev/null
	rm -rf build/empty && $(PYTHON) -m venv build/empty
	build/empty/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt dist/*.whl
	cd build && empty/bin/python ../tests/installed_step.py

# The pictures in docs/ that the README shows.
pictures: $(VENV)/.demo
	$(BIN)/clr-optim plot --out docs

# On a machine with a GPU: with its own python3, torch and pytest; nothing is installed,
# the packages are only laid out as an installation would.
gpu-check: build/tree
	PYTHONPATH=build/tree $(PYTHON) -m pytest tests/test_gpu.py tests/test_triton.py $(ARGS)

clean:
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
