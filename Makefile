# The only door: everything a person or CI does goes through a target here. `make` lists them.

PYTHON ?= python3
ARGS ?=

BIN := .venv/bin
INSTALLED := .venv/.installed
SHORT_DEMO := build/demo-short

export PIP_DISABLE_PIP_VERSION_CHECK = 1
export RAY_USAGE_STATS_ENABLED = 0

.DEFAULT_GOAL := help
.PHONY: help install test demo demo-short check k8s-check format flags constraints clean distclean

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

test: $(INSTALLED) ## run all tests
	$(BIN)/python -m pytest $(ARGS)

demo: $(INSTALLED) ## train a real draft from nothing and show the gain (./demo)
	$(BIN)/eagle3-ray demo $(ARGS)

demo-short: $(INSTALLED) ## the same in small: do all parts work together? (./build)
	rm -rf $(SHORT_DEMO)
	$(BIN)/eagle3-ray demo --short --output-path $(SHORT_DEMO) $(ARGS)

check: $(INSTALLED) ## lint, format and types
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

k8s-check: $(INSTALLED) ## render the manifests of k8s/ and check them; needs kubectl, no cluster
	$(BIN)/python -m tests.k8s.check

format: $(INSTALLED) ## rewrite the code as `make check` wants it
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

flags: $(INSTALLED) ## write the README's tables of flags anew from the schema
	$(BIN)/python -m eagle3_ray.flags README.md

constraints: $(INSTALLED) ## pin what .venv holds now
	@{ head -1 constraints.txt; $(BIN)/python -m pip freeze --exclude-editable | sed 's/+cpu$$//'; } > constraints.new
	@mv constraints.new constraints.txt
	@touch $(INSTALLED)

clean: ## remove caches and the short demo
	rm -rf build .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find eagle3_ray tests -name __pycache__ -type d -prune -exec rm -rf {} +

distclean: clean ## remove .venv as well; ./demo and your data stay
	rm -rf .venv eagle3_ray.egg-info
