# `make demo` and `make test` are all the set-up there is: each makes .venv by itself.
PYTHON ?= python3
VENV := .venv
FRAMEWORKS := .venv-frameworks
NEWEST := .venv-newest
BIN := $(VENV)/bin
PIP_INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

# A change of one of these needs a new build of the extension, which an installation makes.
NATIVE := $(wildcard kernels/native/*.cpp kernels/native/*.h) kernels/native/CMakeLists.txt

DISTRIBUTED := tests/distributed tests/test_examples.py

# What runs on a GPU and in Triton's interpreter.
TRITON := tests/backends/triton_backend
ON_TRITON := $(TRITON)/test_triton.py $(TRITON)/test_triton_changes.py \
	$(TRITON)/test_triton_gpu.py $(TRITON)/test_triton_graphs.py \
	$(TRITON)/test_triton_refusals.py $(TRITON)/test_triton_schedule.py \
	$(TRITON)/test_triton_settings.py $(TRITON)/test_triton_skipping.py \
	$(TRITON)/test_triton_averages.py $(TRITON)/test_triton_masters.py \
	$(TRITON)/test_triton_backward.py

INTERPRETED := $(ON_TRITON) $(TRITON)/test_triton_machine.py $(TRITON)/test_triton_memory.py \
	tests/core/test_hostile_checkpoints.py tests/core/test_resume_data.py tests/fuzz/test_fuzz.py

.PHONY: demo test format lint types check interpreted fuzz fuzz-kill fuzz-threads distributed test-frameworks test-newest fake-gpu fake-gpu-host package docs pictures notebook tables errors gpu-check gpu-sanitize gpu-paper clean FORCE

demo: $(VENV)/.demo
	$(BIN)/clr-optim demo $(ARGS)

# The runs of tests take a core each, two at a time.
test: lint types
	$(MAKE) -j2 --output-sync=target check interpreted distributed test-frameworks
	$(MAKE) package docs

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.demo: pyproject.toml constraints.txt $(NATIVE) | $(VENV)/bin/python
	$(PIP_INSTALL) -e ".[demo]"
	@touch $@

$(VENV)/.test: pyproject.toml constraints.txt $(NATIVE) | $(VENV)/bin/python
	$(PIP_INSTALL) -e ".[test]"
	@touch $@

$(VENV)/.docs: pyproject.toml constraints.txt $(NATIVE) | $(VENV)/bin/python
	$(PIP_INSTALL) -e ".[docs]"
	@touch $@

# The frameworks bring dozens of packages: an environment of their own keeps the other one what a
# user of this library alone has. torch stays as pinned.
$(FRAMEWORKS)/.test: pyproject.toml constraints.txt constraints-frameworks.txt $(NATIVE)
	$(PYTHON) -m venv $(FRAMEWORKS)
	$(FRAMEWORKS)/bin/python -m pip install --quiet --disable-pip-version-check \
		-c constraints.txt -c constraints-frameworks.txt -e ".[test,frameworks]"
	@touch $@

lint: $(VENV)/.test
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

format: $(VENV)/.test
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# As an installation lays the packages out: mypy does not read the mapping in pyproject.toml. The
# extension is that of .venv. A machine without .venv, as those with GPUs, builds the extension by
# its own CMake into build/native. If CMake or Python.h is missing there, bring
# build/tree/clr_optim/kernels/native/module.abi3.so along as EXTENSION.
EXTENSION ?=
build/tree: FORCE
	rm -rf build/tree && mkdir -p build/tree
	cp -r clr_optim build/tree/ && cp -r kernels bench build/tree/clr_optim/
	@extension="$(EXTENSION)"; \
	if [ -z "$$extension" ] && [ -e $(VENV)/.test ]; then extension=$$($(BIN)/python -I -c \
		"from clr_optim.kernels.native import load; print(load().__file__)") || exit 1; fi; \
	if [ -z "$$extension" ]; then \
		cmake -S kernels/native -B build/native -DPython_EXECUTABLE="$$(command -v $(PYTHON))" && \
		cmake --build build/native --parallel || exit 1; \
		extension=build/native/module.abi3.so; fi; \
	cp "$$extension" build/tree/clr_optim/kernels/native/

types: $(VENV)/.test build/tree
	cd build/tree && ../../$(BIN)/mypy --config-file ../../pyproject.toml -p clr_optim
	cp tests/typed_use.py build/tree/
	cd build/tree && ../../$(BIN)/mypy --config-file ../../pyproject.toml typed_use.py

check: $(VENV)/.test
	$(BIN)/python -m pytest $(addprefix --ignore=,$(DISTRIBUTED)) $(ARGS)

# What runs on several processes.
distributed: $(VENV)/.test
	$(BIN)/python -m pytest $(DISTRIBUTED) $(ARGS)

# Lightning, accelerate, transformers and others, and optimizers of other packages.
test-frameworks: $(FRAMEWORKS)/.test
	$(FRAMEWORKS)/bin/python -m pytest tests/frameworks $(ARGS)

# The suite with the torch and Triton that users get today: by hand, as it downloads gigabytes.
$(NEWEST)/.test: pyproject.toml $(NATIVE)
	$(PYTHON) -m venv $(NEWEST)
	$(NEWEST)/bin/python -m pip install --quiet --disable-pip-version-check --upgrade -e ".[test]"
	@touch $@

test-newest: $(NEWEST)/.test
	$(NEWEST)/bin/python -c "import torch, triton; print(torch.__version__, triton.__version__)"
	$(NEWEST)/bin/python -m pytest $(ARGS)
	TRITON_INTERPRET=1 $(NEWEST)/bin/python -m pytest $(INTERPRETED) $(ARGS)

# The tests of GPUs on a CPU, by hand: a CUDA device that is none (tests/fake_gpu) under the torch of
# test-newest. Two devices run their streams in a random order that follows from SEED. Then SEEDS
# random courses of events over streams, from FIRST on.
FAKE := build/fake_gpu
FAKE_TESTS := $(TRITON)/test_triton_graphs.py tests/test_gpu.py $(TRITON)/test_triton.py \
	$(TRITON)/test_triton_gpu.py $(TRITON)/test_triton_settings.py \
	$(TRITON)/test_triton_skipping.py $(TRITON)/test_triton_averages.py \
	$(TRITON)/test_triton_masters.py $(TRITON)/test_triton_backward.py tests/fake_gpu
FAKE_PYTHON := LD_PRELOAD=$(CURDIR)/$(FAKE)/libcuda.so.1 $(NEWEST)/bin/python
FIRST ?= 0
SEEDS ?= 20
fake-gpu: export TRITON_LIBCUDA_PATH := $(CURDIR)/$(FAKE)
fake-gpu: export TRITON_CACHE_DIR := $(CURDIR)/$(FAKE)/cache
fake-gpu: export PYTHONPATH := $(CURDIR)/tests
fake-gpu: export FAKE_DEVICES := 2
fake-gpu: export FAKE_ORDER = 2:$(or $(SEED),1)
fake-gpu: $(NEWEST)/.test $(FAKE)/libcuda.so.1
	$(FAKE_PYTHON) -m pytest -p fake_gpu.plugin $(FAKE_TESTS) $(ARGS)
	$(FAKE_PYTHON) -m fake_gpu.fuzz_streams --first $(FIRST) --seeds $(SEEDS)

# The host's time of a step on that device, where nothing runs, beside torch's fused step.
fake-gpu-host: export TRITON_LIBCUDA_PATH := $(CURDIR)/$(FAKE)
fake-gpu-host: export TRITON_CACHE_DIR := $(CURDIR)/$(FAKE)/cache
fake-gpu-host: export PYTHONPATH := $(CURDIR)/tests
fake-gpu-host: $(NEWEST)/.test $(FAKE)/libcuda.so.1
	$(FAKE_PYTHON) -m fake_gpu.host_time $(ARGS)

$(FAKE)/libcuda.so.1: $(wildcard tests/fake_gpu/driver/*) tests/fake_gpu/build.py | $(NEWEST)/.test
	$(NEWEST)/bin/python tests/fake_gpu/build.py $@

# The Triton kernels on the CPU, watched for what they read and write (tests/triton_memory.py); a
# process of its own, since Triton decides when it is imported.
interpreted: $(VENV)/.test
	TRITON_INTERPRET=1 $(BIN)/python -m pytest $(INTERPRETED) $(ARGS)

# Random events beside plain torch, for long: MINUTES, BACKEND (native, torch or triton), SEED (the
# first; without it, on from the last run), REPLAY (a file that was kept of a divergence).
MINUTES ?= 10
BACKEND ?= native
fuzz: $(VENV)/.test
	PYTHONPATH=tests $(BIN)/python -m fuzz --backend $(BACKEND) --minutes $(MINUTES) \
		$(if $(SEED),--seed $(SEED)) $(if $(REPLAY),--replay $(REPLAY)) $(ARGS)

# A trainer killed KILLS times, at random moments, must come to where one that was not killed comes.
KILLS ?= 100
fuzz-kill: $(VENV)/.test
	PYTHONPATH=tests $(BIN)/python -m fuzz.kill_and_resume --kills $(KILLS) $(ARGS)

# Threads that step, save, ask, add groups and fork at once, for so many SECONDS, freed memory filled.
SECONDS ?= 120
fuzz-threads: $(VENV)/.test
	MALLOC_PERTURB_=165 PYTHONPATH=tests $(BIN)/python -m fuzz.threads --seconds $(SECONDS) $(ARGS)

# Wheel and sdist into dist/. On Linux auditwheel gives the wheel its manylinux tag; OpenMP is torch's.
# Then an empty environment, whose PATH has no compiler, takes steps: with the wheel by the kernels of
# every rule, with the sdist by torch's own step, which says why.
BARE := env -i HOME="$(HOME)" PATH="$(CURDIR)/build/package/nothing" \
	$(CURDIR)/build/package/empty/bin/python
BARE_INSTALL := $(BARE) -m pip install --quiet --disable-pip-version-check -c constraints.txt
package: $(VENV)/.test
	rm -rf build/package dist && mkdir -p build/package/nothing
	$(BIN)/python -m build --outdir build/package . >/dev/null
	mkdir dist && mv build/package/*.tar.gz dist/
	if [ "$$(uname)" = Linux ]; then PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python -m auditwheel \
		repair --exclude 'libgomp*' --wheel-dir dist build/package/*.whl; \
	else mv build/package/*.whl dist/; fi
	! $(BIN)/python -m zipfile --list dist/*.whl | grep -iE 'gomp|iomp|libomp'
	$(PYTHON) -m venv build/package/empty
	$(BARE_INSTALL) dist/*.whl
	cd build && $(BARE) ../tests/installed_step.py
	$(BARE_INSTALL) --no-cache-dir --force-reinstall --no-deps dist/*.tar.gz
	cd build && $(BARE) ../tests/installed_step.py --without-kernels

# Pages and reference as HTML. A warning is an error, and so is a page that loads anything from
# elsewhere (links may lead there).
docs: $(VENV)/.docs
	rm -rf build/docs
	$(BIN)/python -m sphinx --fail-on-warning --nitpicky --fresh-env --quiet \
		-d build/doctrees docs build/docs
	@! grep -rnE '<(script|img|link|iframe|source)[^>]*(src|href)="?(https?:)?//' \
		--include=*.html build/docs
	@! grep -rnE '(@import|url\()[^;)]*(https?:)?//' --include=*.css build/docs
	@echo "file://$(CURDIR)/build/docs/index.html"

# The pictures in docs/ that the README shows.
pictures: $(VENV)/.demo
	$(BIN)/clr-optim plot --out docs
	$(BIN)/python docs/draw_gallery.py
	$(BIN)/python docs/draw_range_test.py
	$(BIN)/python docs/draw_masters.py

# The notebook of the docs, with its outputs.
notebook: $(VENV)/.docs $(VENV)/.demo
	$(BIN)/jupyter-execute --inplace docs/five_minutes.ipynb

# The tables of README and docs pages, from the committed results that their marks name.
tables: $(VENV)/.test
	$(BIN)/python -m clr_optim.bench.pages $$(grep -l '<!-- table: ' README.md docs/*.md)

# docs/errors.md: what is said to each wrong input that the tests try.
errors: $(VENV)/.test
	$(BIN)/python tests/wrong_input.py >/dev/null

# On a machine with a GPU: with its own python3, torch and pytest; nothing is installed,
# the packages are only laid out as an installation would (and must not be shadowed by those here).
# In this order: races between streams, the other tests, the benchmark of the cells that matter most,
# what the compiler makes of the kernels for this GPU, and the rest of the benchmark. The results go
# into bench/results, and after each part to $OUT as well if that is set. Each part is done whatever
# became of the one before, and is bounded, so that all of it ends within twelve minutes; sooner with a
# smaller BENCH_S, the seconds after which the last part begins no cell, or, where there is
# pytest-xdist, with ARGS="-n 8".
BENCH_S ?= 180
gpu-check: export PYTHONPATH := $(CURDIR)/build/tree
gpu-check: export PYTHONSAFEPATH := 1
gpu-check: build/tree
	@gpu=$$($(PYTHON) -m clr_optim.bench.gpu) || exit 1; \
	set -- $$gpu; results=bench/results/$$1; target=$$2; failed=; plot=; \
	keep() { for f; do [ -z "$$OUT" ] || [ ! -e "$$f" ] || cp "$$f" "$$OUT/"; done; }; \
	mkdir -p bench/results; \
	timeout -k 10 60 $(PYTHON) -m pytest tests/fake_gpu/test_races.py \
		--junitxml=build/gpu-races.xml || failed="races"; \
	keep build/gpu-races.xml; \
	timeout -k 10 200 $(PYTHON) -m pytest tests/test_gpu.py $(ON_TRITON) \
		tests/bench/test_paper_runs.py -m "gpu or triton" \
		tests/test_docs.py::test_the_captured_step_of_the_docs \
		--junitxml=build/gpu-tests.xml $(ARGS) || failed="$$failed tests"; \
	keep build/gpu-tests.xml; \
	timeout -k 10 150 $(PYTHON) -m clr_optim.bench --device cuda --workloads mlp,resnet50,1b \
		--rules sgd,adam --at-most 110 --json $$results-first.json || failed="$$failed benchmark"; \
	keep $$results-first.json; \
	$(PYTHON) -c "import matplotlib, PIL" 2>/dev/null && plot="--plot $$results.png"; \
	timeout -k 10 70 $(PYTHON) -m clr_optim.kernels.triton.report --target $$target \
		--json $$results-kernels.json || failed="$$failed kernels"; \
	keep $$results-kernels.json; \
	timeout -k 10 $$(($(BENCH_S) + 50)) $(PYTHON) -m clr_optim.bench --device cuda \
		--at-most $(BENCH_S) $(BENCH_ARGS) \
		--json $$results.json $$plot || failed="$$failed benchmark"; \
	keep $$results.json $$results.png; \
	[ -z "$$failed" ] || { echo "gpu-check failed: $$failed" >&2; exit 1; }

# What the kernels read and write there, watched by NVIDIA's compute-sanitizer: out of bounds
# (without torch's caching allocator, that tensors have bounds), and races in shared memory.
SANITIZED := sizes or clipping_nan or contract and cycled and float32
gpu-sanitize: export PYTHONPATH := $(CURDIR)/build/tree
gpu-sanitize: export PYTHONSAFEPATH := 1
gpu-sanitize: export PYTORCH_NO_CUDA_MEMORY_CACHING := 1
gpu-sanitize: build/tree
	for tool in memcheck racecheck; do \
		compute-sanitizer --tool $$tool --error-exitcode 9 \
			$(PYTHON) -m pytest $(TRITON)/test_triton.py -q -k "$(SANITIZED)" $(ARGS) || exit 1; \
	done

# The paper's tables there, at full length, from DATA (CIFAR-10, binary version), each iteration a
# graph; and how many iterations a second that makes. Called again it goes on where it was ended.
gpu-paper: export PYTHONPATH := $(CURDIR)/build/tree
gpu-paper: export PYTHONSAFEPATH := 1
gpu-paper: build/tree
	$(PYTHON) -m clr_optim bench paper --device cuda --data "$(DATA)" --speed 2000 \
		--out bench/results/paper-gpu
	$(PYTHON) -m clr_optim bench paper --device cuda --data "$(DATA)" --table 1,3,beyond --seeds 3 \
		--together 8 --resume $(ARGS) --out bench/results/paper-gpu

clean:
	rm -rf $(VENV) $(FRAMEWORKS) $(NEWEST) build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
