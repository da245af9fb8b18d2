# The only door: everything a person or CI does goes through a target here. `make` lists them.

PYTHON ?= python3
ARGS ?=

BIN := .venv/bin
INSTALLED := .venv/.installed
SHORT_DEMO := build/demo-short
ALONE := $(patsubst %,faults/test_%.py,elastic hang kills nodes preemption strangers) \
	observability containers k8s gpu test_benchmarks.py

VARIANT ?= gpu
IMAGE ?= eagle3-ray:$(shell sed -n 's/^__version__ = "\(.*\)"/\1/p' eagle3_ray/__init__.py)
# torch's wheels for CPUs are not on PyPI: a folder of wheels that pip knows of, or the page that lists them.
TORCH_CPU_WHEELS ?= $(or $(PIP_FIND_LINKS),$(shell $(PYTHON) -m pip config get global.find-links 2>/dev/null),$(TORCH_PAGE))
TORCH_PAGE := https://download.pytorch.org/whl/cpu/torch/
COMPILE_LOCK := $(BIN)/uv pip compile -q -c constraints.txt --python-version 3.11 \
	--python-platform x86_64-manylinux_2_28 --generate-hashes --no-annotate --no-header
YAMLLINT := {extends: default, rules: {document-start: disable, line-length: {max: 120}}}

export PIP_DISABLE_PIP_VERSION_CHECK = 1
export RAY_USAGE_STATS_ENABLED = 0

.DEFAULT_GOAL := help
.PHONY: help install test bench chaos plots demo demo-short check format image image-test k8s-check k8s-rehearsal flags lock constraints clean distclean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))
	@echo "Python 3.11 or newer; name one with PYTHON=python3.12. Flags for a target's command go into ARGS='...'."

install: $(INSTALLED) ## set up .venv; every target below does so by itself

# The stamp is written last: an install that broke off is done again.
$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(None if sys.version_info >= (3, 11) else "Python 3.11 or newer is needed: make PYTHON=python3.12 ...")'
	@echo "setting up .venv: once, a few minutes"
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --no-input --progress-bar off -c constraints.txt -e '.[dev]'
	@touch $@

# What must have the machine to itself, as it goes by the clock, takes nodes away or serves something, comes last.
test: $(INSTALLED) ## run all tests; ARGS='tests/unit -k name' for some
ifeq ($(strip $(ARGS)),)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile $(ALONE:%=--ignore=tests/%)
	$(BIN)/python -m pytest $(ALONE:%=tests/%)
else
	$(BIN)/python -m pytest $(ARGS)
endif

bench: $(INSTALLED) ## run the benchmarks, on a quiet machine; ARGS='--peer peer/bin/python'
	$(BIN)/python -m tests.benchmarks $(ARGS)

chaos: $(INSTALLED) ## kill a run again and again, and compare it with a calm one; some minutes
	$(BIN)/python -m tests.faults.chaos $(ARGS)

plots: $(INSTALLED) ## draw the README's pictures anew from tests/benchmarks/results
	$(BIN)/python -m tests.benchmarks.plots $(ARGS)

demo: $(INSTALLED) ## train a real draft from nothing and show the gain (./demo)
	$(BIN)/eagle3-ray demo $(ARGS)

demo-short: $(INSTALLED) ## the same in small: do all parts work together? (./build)
	rm -rf $(SHORT_DEMO)
	$(BIN)/eagle3-ray demo --short --output-path $(SHORT_DEMO) $(ARGS)

check: $(INSTALLED) ## lint, format and types
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/hadolint docker/Dockerfile
	$(BIN)/yamllint --strict -d '$(YAMLLINT)' docker .github

image: ## build the image with Docker or podman: VARIANT=gpu (default) or cpu
	TORCH_CPU_WHEELS='$(TORCH_CPU_WHEELS)' docker/build.sh $(VARIANT) $(IMAGE)$(if $(filter cpu,$(VARIANT)),-cpu)

image-test: $(INSTALLED) ## build the CPU image and prove it, alone and as a Ray cluster of two containers
	$(MAKE) image VARIANT=cpu
	EAGLE3_IMAGE=$(IMAGE)-cpu $(BIN)/python -m pytest tests/containers -v --durations=0 $(ARGS)

k8s-check: $(INSTALLED) ## render the manifests of k8s/ and check them; needs kubectl, no cluster
	$(BIN)/python -m tests.k8s.check

k8s-rehearsal: $(INSTALLED) ## run the commands that KubeRay makes of k8s/ in namespaces; as root
	EAGLE3_REHEARSAL=1 $(BIN)/python -m pytest tests/k8s/test_operator_commands.py $(ARGS)

format: $(INSTALLED) ## rewrite the code as `make check` wants it
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

flags: $(INSTALLED) ## write the README's tables of flags anew from the schema
	$(BIN)/python -m eagle3_ray.flags README.md

lock: $(INSTALLED) ## write the image's locks anew from pyproject.toml and constraints.txt
	$(COMPILE_LOCK) pyproject.toml -o docker/requirements.gpu.lock $(ARGS)
	$(COMPILE_LOCK) pyproject.toml -o docker/requirements.cpu.lock --find-links '$(TORCH_CPU_WHEELS)' $(ARGS)
	echo uv | $(COMPILE_LOCK) - -o docker/requirements.uv.lock $(ARGS)

constraints: $(INSTALLED) ## pin what .venv holds now
	@{ head -1 constraints.txt; $(BIN)/python -m pip freeze --exclude-editable | sed 's/+cpu$$//'; } > constraints.new
	@mv constraints.new constraints.txt
	@touch $(INSTALLED)

clean: ## remove caches and the short demo
	rm -rf build .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find eagle3_ray tests -name __pycache__ -type d -prune -exec rm -rf {} +

distclean: clean ## remove .venv as well; ./demo and your data stay
	rm -rf .venv eagle3_ray.egg-info
