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
BENCH_STAMP := .venv-bench/.installed
DEMO_STAMP := .venv-demo/.installed
DEMO_OUTPUT := demo-output

.PHONY: help demo docs test test-slow lint format bench-env bench demo-env demo-test clean

help: ## list these targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-17s %s\n", $$1, $$2 }' Makefile

demo: $(STAMP) ## explain a bundled photograph with the bundled explainer; writes demo-output/
	@"$(BIN)/hf-aha" explain hf_aha/bundled/photographs/golf-ball.jpg \
		--explainer imagenette-demo --output $(DEMO_OUTPUT)

test: $(STAMP) ## the tests that need neither network, accelerator nor patience
	$(BIN)/python -m pytest $(PYTEST_ARGS)

test-slow: $(STAMP) ## the slow tests as well
	$(BIN)/python -m pytest -m "not gpu and not hub and not bench" $(PYTEST_ARGS)

test-transformers: .venv-oldest/.installed .venv-newest/.installed ## the model on the oldest and newest transformers
	$(call test_model,.venv-oldest)
	$(call test_model,.venv-newest)

lint: $(STAMP) ## ruff: rules and format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(STAMP) ## mend what ruff can mend
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench-env: $(BENCH_STAMP) ## .venv-bench: other libraries' methods and metrics; torch with CUDA takes 6 GB

bench: $(BENCH_STAMP) ## the tests of the baselines and of agreement with other libraries
	.venv-bench/bin/python -m pytest -m bench $(PYTEST_ARGS)

docs: $(DEMO_STAMP) ## the documentation as a site in build/docs; a broken link is an error
	NO_MKDOCS_2_WARNING=1 .venv-demo/bin/python -m mkdocs build --quiet

demo-env: $(DEMO_STAMP) ## .venv-demo: Gradio for hf-aha demo, Playwright for its tests, MkDocs for the documentation

demo-test: $(DEMO_STAMP) ## the tests of the live demo, in a real browser where Chromium is installed
	.venv-demo/bin/python -m pytest -rs $(wildcard tests/test_demo_*.py) tests/test_push_space.py $(PYTEST_ARGS)

clean: ## remove the environments and everything that was made from the sources
	rm -rf .venv .venv-bench .venv-demo .venv-oldest .venv-newest $(DEMO_OUTPUT) build dist *.egg-info .pytest_cache .ruff_cache
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

# The oldest version of transformers that pyproject.toml allows, and the newest.
TRANSFORMERS_5 := $(shell sed -n 's/^ *"transformers\(.*\)",.*/\1/p' pyproject.toml)
TRANSFORMERS_OLDEST := $(shell echo "$(TRANSFORMERS_5)" | sed 's/^>=\([0-9.]*\),.*/\1/')
# What transformers has a say in is not pinned there.
UNPINNED := transformers|huggingface_hub|tokenizers|safetensors|regex|typer|click|hf-xet|httpx2|httpcore2
MODEL_TESTS := $(wildcard tests/test_*_aha.py tests/test_hub_loading.py) tests/test_model_contract.py \
	tests/test_custom_code.py tests/test_pipelines.py tests/test_bundled.py

# $(call make_transformers_venv,FOLDER,VERSIONS): with transformers' own tests, which only its source archive holds.
define make_transformers_venv
	$(call make_venv,$(1))
	@grep -vE '^($(UNPINNED))==' constraints.txt > $(1)/constraints.txt
	@$(1)/bin/python -m pip install --quiet --disable-pip-version-check $(PIP_ARGS) -c $(1)/constraints.txt \
		"transformers$(2)" parameterized -e ".[dev]"
	@rm -rf $(1)/source && mkdir $(1)/source
	@version=$$($(1)/bin/python -c 'import importlib.metadata as m; print(m.version("transformers"))') && \
		$(1)/bin/python -m pip download --quiet --disable-pip-version-check --no-deps --no-binary transformers \
			--dest $(1)/source "transformers==$$version" && \
		tar -xzf $(1)/source/transformers-$$version.tar.gz -C $(1)/source --strip-components 1
	@touch $(1)/.installed
endef

# $(call test_model,FOLDER): our tests of the model, then transformers' own, whose markers and old names ours refuse.
define test_model
	$(1)/bin/python -m pytest $(MODEL_TESTS) $(PYTEST_ARGS)
	TRANSFORMERS_TESTS=$(1)/source/tests $(1)/bin/python -m pytest -o addopts= -o filterwarnings= \
		tests/test_transformers_common.py
endef

.venv-oldest/.installed: pyproject.toml constraints.txt
	$(call make_transformers_venv,.venv-oldest,==$(TRANSFORMERS_OLDEST))

.venv-newest/.installed: pyproject.toml constraints.txt
	$(call make_transformers_venv,.venv-newest,$(TRANSFORMERS_5))

# Both environments are set up again when what they should hold changes.
$(STAMP): pyproject.toml constraints.txt
	$(call make_venv,.venv)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check $(PIP_ARGS) -c constraints.txt -e ".[dev]"
	@touch $@

$(BENCH_STAMP): pyproject.toml constraints-bench.txt
	$(call make_venv,.venv-bench)
	@.venv-bench/bin/python -m pip install --quiet --disable-pip-version-check $(PIP_ARGS) \
		-c constraints-bench.txt -e ".[bench,dev]"
	@touch $@

$(DEMO_STAMP): pyproject.toml constraints-demo.txt
	$(call make_venv,.venv-demo)
	@.venv-demo/bin/python -m pip install --quiet --disable-pip-version-check $(PIP_ARGS) \
		-c constraints-demo.txt -e ".[demo,browser,docs,dev]"
	@touch $@
