# Every verb sets up what it needs; "make help" lists them.
PYTHON      ?= python3
VENV        ?= .venv
VENV_OLDEST ?= .venv-oldest
PIP_ARGS    ?=
PYTEST_ARGS ?=
JOBS        ?= $(shell cores=$$(getconf _NPROCESSORS_ONLN 2>/dev/null || echo 1); echo $$((cores < 4 ? cores : 4)))
DEMO_ARGS   ?=
BENCH_ARGS  ?=
AOT_ARGS    ?=
GPU_ARGS    ?=
TORCH       ?= 2.14

READY        := $(VENV)/.coda-fast-ready
READY_OLDEST := $(VENV_OLDEST)/.coda-fast-ready
# NumPy 2.4 refuses what the interpreter of Triton 3.6 does with arrays of one element
OLDEST       := 'torch==2.11.*' 'numpy<2.4'
VERSIONS     := import sys, numpy, torch; \
	print("Python %d.%d.%d," % sys.version_info[:3], "torch", torch.__version__ + ",", "numpy", numpy.__version__)

# a Python in which the package is not installed finds the kernels there
UNINSTALLED  := PYTHONPATH=kernels$(if $(PYTHONPATH),:$(PYTHONPATH))

# a thread for each of JOBS processes: the interpreter of Triton has no use for more
PARALLEL     := -n $(JOBS) --dist worksteal

.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: help demo test test-oldest test-torch lint format bench tables docs dist gpu-smoke gpu-report gpu-gather aot clean

help: ## list the verbs
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-12s %s\n", $$1, $$2 }' Makefile
	@echo
	@echo 'Variables: PYTHON=python3.x  VENV=folder  JOBS=processes  PIP_ARGS="arguments of pip install"  TORCH=release  DEMO_ARGS  PYTEST_ARGS  BENCH_ARGS  GPU_ARGS  AOT_ARGS'
	@echo 'The first run downloads PyTorch. The build for CPUs only is far smaller: PIP_ARGS="--extra-index-url URL", with the URL that'
	@echo 'the installation page of PyTorch names for it.'

demo: $(READY) ## explain example photographs with a network of the package, draw the figure into ./coda_demo
	$(VENV)/bin/coda-fast demo $(DEMO_ARGS)

test: $(READY) ## all tests and doctests, every bench once
	@$(VENV)/bin/python -c '$(VERSIONS)'
	OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest $(PARALLEL) $(PYTEST_ARGS)
	$(VENV)/bin/python -m pytest bench/ -q

test-oldest: $(READY_OLDEST) ## the tests that are not slow, with the oldest supported torch
	@$(VENV_OLDEST)/bin/python -c '$(VERSIONS)'
	OMP_NUM_THREADS=1 $(VENV_OLDEST)/bin/python -m pytest $(PARALLEL) -m "not slow" $(PYTEST_ARGS)
	$(VENV_OLDEST)/bin/python -m pytest bench/ -q -k "not compiled"

test-torch: ## the same with the release TORCH=2.14 (or another), in .venv-torch-2.14; what CI runs in turn with the oldest: .ci/run
	$(MAKE) test-oldest VENV_OLDEST=.venv-torch-$(TORCH) OLDEST="'torch==$(TORCH).*'"

lint: $(READY) ## ruff check, ruff format --check, mypy
	$(VENV)/bin/python -m ruff check .
	$(VENV)/bin/python -m ruff format --check .
	$(VENV)/bin/python -m mypy

format: $(READY) ## apply ruff's fixes and format
	$(VENV)/bin/python -m ruff check --fix-only .
	$(VENV)/bin/python -m ruff format .

bench: $(READY) ## measure everything beside its peers, keep the rows in bench/results (some minutes on a CPU)
	$(VENV)/bin/python -m pytest bench/ --benchmark --rows bench/results $(BENCH_ARGS)

tables: $(READY) ## all tables and plots of measured results in README.md and docs/, from bench/results
	$(VENV)/bin/python -m tools.documents

docs: $(READY) ## the documentation as a site in ./site: strict, links and anchors checked, nothing fetched
	NO_MKDOCS_2_WARNING=1 $(VENV)/bin/python -m mkdocs build --strict --clean

dist: $(READY) ## build wheel and sdist into ./dist, install the wheel away from the sources, run the example of the README there
	tools/check_wheel.sh $(VENV)/bin/python

gpu-smoke: ## on a CUDA GPU, with the Python at hand: does it compile, is it right, how fast, in 2.5 minutes (docs/gpu.md)
	$(UNINSTALLED) $(PYTHON) -m tools.gpu_smoke $(GPU_ARGS)

gpu-report: ## likewise: tests, layers, networks, a training with GPU_ARGS="--data FILE", profile, tuner, in 9 minutes (docs/gpu.md)
	$(UNINSTALLED) $(PYTHON) -m tools.gpu_report $(GPU_ARGS)

aot: $(READY) ## compile all kernels for all architectures, without a GPU (20 to 40 minutes); the tables of docs/kernels.md
	$(VENV)/bin/python -m tools.aot $(AOT_ARGS)
	$(VENV)/bin/python -m tools.documents

gpu-gather: ## into one folder (gpu_run) what the tree lacks for both runs on a GPU without a network; GPU_ARGS="--data FILE"
	$(PYTHON) -m tools.gather $(GPU_ARGS)

clean: ## remove build products and caches; the environments and results stay
	rm -rf build dist site *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis .benchmarks
	find $(wildcard coda_fast kernels tests bench tools experiments) -type d -name __pycache__ -prune -exec rm -rf {} +

# $(call environment,FOLDER,REQUIREMENTS)
define environment
	@command -v "$(PYTHON)" >/dev/null || { echo 'coda-fast: no $(PYTHON) here; name a Python >= 3.10 with make PYTHON=...' >&2; exit 1; }
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
		{ echo 'coda-fast: $(PYTHON) is older than 3.10; name a newer one with make PYTHON=...' >&2; exit 1; }
	@"$(PYTHON)" -c 'import ensurepip, venv' 2>/dev/null || \
		{ echo 'coda-fast: $(PYTHON) has no venv module; install it (Debian, Ubuntu: the package python3-venv) or set PYTHON=...' >&2; exit 1; }
	"$(PYTHON)" -m venv $(1)
	$(1)/bin/python -m pip install --quiet --upgrade pip $(PIP_ARGS)
	$(1)/bin/python -m pip install -e $(2) $(PIP_ARGS)
	@touch $@
endef

$(READY): setup.py coda_fast/_version.py
	$(call environment,$(VENV),'.[dev]')

$(READY_OLDEST): setup.py coda_fast/_version.py
	$(call environment,$(VENV_OLDEST),'.[test]' $(OLDEST))
