# Two commands are all a fresh machine needs: `make serve` and `make test`.
# Both build the same environment, .venv, from the lock files, and may be repeated at will.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet

.PHONY: serve test check format generate bench clean

# Starts engine, service and Envoy; ARGS are passed on, e.g. make serve ARGS="--port 3000".
serve: $(VENV)/installed
	exec $(BIN)/tokenwire serve $(ARGS)

# Runs everything; ARGS are pytest's, e.g. make test ARGS="tests/engine -k scheduler".
test: $(VENV)/installed $(VENV)/tgi-client/installed $(VENV)/langchain/installed
	$(BIN)/python -m pytest $(ARGS)

# Lint, types, layers and protos.
check: $(VENV)/installed
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(VENV)/installed
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# After a change of a proto.
generate: $(VENV)/installed
	$(BIN)/python protos/generate.py

# Best on an otherwise idle machine. BENCH is a script of benchmarks/, e.g. make bench BENCH=peers.
BENCH ?= engine_cpu
bench: $(VENV)/installed
	$(BIN)/python -m benchmarks.$(BENCH) $(ARGS)

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis

$(VENV)/installed: requirements.lock pyproject.toml
	$(PYTHON) -m venv $(VENV)
	@echo "Installing into $(VENV); the first time takes a few minutes."
	$(PIP) install -r requirements.lock
	$(PIP) install --no-deps --no-build-isolation --editable .
	@touch $@

# Two clients get directories of their own: text-generation pins an old huggingface_hub, and langchain
# brings a plugin for pytest. Both locks are complete, so nothing of .venv is seen from there.
$(VENV)/tgi-client/installed $(VENV)/langchain/installed: $(VENV)/%/installed: requirements-%.lock $(VENV)/installed
	rm -rf $(@D)
	$(PIP) install --no-deps --target $(@D) -r $<
	@touch $@
