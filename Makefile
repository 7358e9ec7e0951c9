# `make demo` and `make test` work on a fresh machine with Python and make; `make help` lists the rest.
# Every path is relative, so the checkout may lie under a path with spaces.

SHELL := /bin/sh
.DEFAULT_GOAL := help

# The Python to build .venv with; the first of these that is new enough when left empty.
PYTHON ?=
PYTHONS := $(PYTHON) $(if $(PYTHON),,python3 python python3.11 python3.12 python3.13 python3.10)
# More words for pip, for instance an index that holds CPU builds of torch.
PIP_ARGS ?=
# More words for pytest, for instance PYTEST_ARGS="-k ranking".
PYTEST_ARGS ?=

BIN := .venv/bin
STAMP := .venv/.installed
DEMO_OUTPUT := demo-output

.PHONY: help demo test test-slow lint format bench clean

help: ## list these targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-10s %s\n", $$1, $$2 }' Makefile

demo: $(STAMP) ## explain a bundled photograph with the bundled explainer; writes demo-output/
	@"$(BIN)/hf-aha" explain hf_aha/bundled/photographs/golf-ball.jpg \
		--explainer imagenette-demo --output $(DEMO_OUTPUT)

test: $(STAMP) ## the tests that need neither network, accelerator nor patience
	$(BIN)/python -m pytest $(PYTEST_ARGS)

test-slow: $(STAMP) ## the slow tests as well
	$(BIN)/python -m pytest -m "not gpu and not hub and not bench" $(PYTEST_ARGS)

lint: $(STAMP) ## ruff: rules and format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(STAMP) ## mend what ruff can mend
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: .venv-bench/.installed ## the tests of the baselines, in an environment of their own
	.venv-bench/bin/python -m pytest -m bench $(PYTEST_ARGS)

clean: ## remove the environments and everything that was made from the sources
	rm -rf .venv .venv-bench $(DEMO_OUTPUT) build dist *.egg-info .pytest_cache .ruff_cache
	find hf_aha tests recipes -name __pycache__ -type d -prune -exec rm -rf {} +

# $(call make_venv,FOLDER): an environment made by the first suitable Python.
define make_venv
	@found=; for candidate in $(PYTHONS); do \
		if "$$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 10))' >/dev/null 2>&1; then \
			found=$$candidate; break; \
		fi; \
	done; \
	if [ -z "$$found" ]; then \
		echo "hf_aha needs Python 3.10 or newer; none was found among: $(strip $(PYTHONS)). Give one with make PYTHON=..." >&2; \
		exit 1; \
	fi; \
	echo "Setting up $(1) with $$("$$found" --version); the first time this takes a few minutes."; \
	"$$found" -m venv $(1) || { \
		echo "$$found could not make an environment; on Debian and Ubuntu install the package python3-venv." >&2; \
		exit 1; \
	}
endef

# Both environments are set up again when what they should hold changes.
$(STAMP): pyproject.toml constraints.txt
	$(call make_venv,.venv)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check $(PIP_ARGS) -c constraints.txt -e ".[dev]"
	@touch $@

.venv-bench/.installed: pyproject.toml $(wildcard constraints-bench.txt)
	$(call make_venv,.venv-bench)
	@.venv-bench/bin/python -m pip install --quiet --disable-pip-version-check $(PIP_ARGS) \
		$(if $(wildcard constraints-bench.txt),-c constraints-bench.txt) -e ".[bench,dev]"
	@touch $@
