# What a newcomer and a contributor type. The environment is made in $(VENV), once, and again when its requirements change;
# `source .venv/bin/activate` makes `lit-rlhf` a command of the shell's.
VENV ?= .venv
PYTHON ?= python3
BIN := $(VENV)/bin
UV := $(shell command -v uv)
REQUIREMENTS := pyproject.toml constraints/cpu.txt

ifdef UV
PIP := uv pip install --python $(BIN)/python
else
PIP := $(BIN)/python -m pip install --disable-pip-version-check
endif

# pip compiles what it installs, uv only if it is told to: else each start of a command may compile torch anew.
export UV_COMPILE_BYTECODE ?= 1

.PHONY: help quickstart test install check docs wheel clean
.DEFAULT_GOAL := help

help: ## this list
	@grep -E '^[a-z]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):.*## (.*)/  make \1|\2/' | column -t -s '|'

quickstart: $(VENV)/user ## set up and run the whole pipeline (ARGS="seed=1" adds settings)
	@$(BIN)/lit-rlhf $(ARGS)

test: $(VENV)/dev ## set up and run all tests (ARGS="tests/functional" runs some)
	@$(BIN)/python -m pytest $(ARGS)

install: $(VENV)/dev ## set up for development, with all that the tests need

check: $(VENV)/dev ## style and types
	$(BIN)/ruff check .
	$(BIN)/mypy

docs: $(VENV)/dev ## the site of docs, into site/ (ARGS="-D nb_execution_mode=force" runs the notebooks for it)
	$(BIN)/sphinx-build -W -q -c docs $(ARGS) . site

wheel: $(VENV)/dev ## build the wheel into dist/
	$(BIN)/python -m build --wheel --no-isolation .

clean: ## remove the environment and what was built; runs stay
	rm -rf $(VENV) dist build site

$(VENV)/user: EXTRAS =
$(VENV)/dev: EXTRAS = [dev]

$(VENV)/user $(VENV)/dev: $(REQUIREMENTS)
	@echo "setting up $(VENV) ..."
	@test -x $(BIN)/python || $(if $(UV),uv venv --quiet --python '>=3.11' $(VENV),$(PYTHON) -m venv $(VENV))
	@$(BIN)/python -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "Python 3.11 or later is needed: make $(MAKECMDGOALS) PYTHON=python3.12, after rm -r $(VENV)"; exit 1; }
	@# On Linux, torch comes with CUDA's libraries unless it is asked for where its CPU build is.
	@if [ "$$(uname)" = Linux ] && ! command -v nvidia-smi > /dev/null; then \
		$(PIP) --no-deps -c constraints/cpu.txt torch --index-url https://download.pytorch.org/whl/cpu 2> /dev/null \
			|| echo "the CPU build of torch cannot be had from download.pytorch.org; taking the usual one"; \
	fi
	@$(PIP) -c constraints/cpu.txt -e ".$(EXTRAS)"
	@touch $@
