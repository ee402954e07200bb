# `make help` lists the words.  Another Python for .venv: make PYTHON=python3.12 test
PYTHON ?= python3
EXAMPLE := examples/hwfuse-acme

export OMP_NUM_THREADS ?= 1

# Always `-m`: a tool that the outer Python brings has no script in .venv/bin.
RUN := .venv/bin/python -m
LINT_IMPORTS := .venv/bin/python -c 'from importlinter.cli import lint_imports_command as main; main()'

.DEFAULT_GOAL := help
.PHONY: help demo test check lint format clean

help: ## list the words
	@sed -n 's/^\([a-z]*\):.*## /  make \1	/p' Makefile

demo: .venv/example ## run small models with and without hwfuse, on this machine
	PYTHONPATH='$(CURDIR)/.venv/example' $(RUN) hwfuse demo

# No plugins of the outer Python: under `filterwarnings = error` their warnings stop the run.
test: .venv/ready ## run all tests, in two processes
	$(RUN) pytest --disable-plugin-autoload -p xdist -n 2

check: lint ## lint, and check types, imports and the contents of the wheel
	$(RUN) mypy
	$(LINT_IMPORTS)
	rm -rf .venv/wheel
	$(RUN) pip wheel --quiet --no-deps --no-build-isolation --wheel-dir .venv/wheel .
	$(RUN) check_wheel_contents .venv/wheel/*.whl

lint: .venv/ready ## check rules and format with ruff
	$(RUN) ruff check
	$(RUN) ruff format --check

format: .venv/ready ## rewrite the files as lint wants them
	$(RUN) ruff check --fix-only
	$(RUN) ruff format

clean: ## remove .venv and the caches
	rm -rf .venv .mypy_cache .pytest_cache .ruff_cache .import_linter_cache

# A venv holds its own path: after the checkout has moved, make it again.
ifneq ($(shell cat .venv/ready 2>/dev/null),$(CURDIR))
.PHONY: .venv/ready
endif
.venv/ready: pyproject.toml constraints.txt .ci/setup_venv.py
	@$(PYTHON) -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' || { \
		echo "Wrong Python: hwfuse needs 3.11 or newer, with venv; $(PYTHON) is `$(PYTHON) -V 2>&1`"; \
		echo "Name another one, e.g. make PYTHON=python3.12 (Debian, Ubuntu: apt install python3-venv)"; exit 1; }
	@$(PYTHON) .ci/setup_venv.py
	@echo '$(CURDIR)' >$@

# Not among the venv's packages: the tests expect our own backends and no others.
.venv/example: .venv/ready $(shell find $(EXAMPLE) -type f)
	@rm -rf $@
	@$(RUN) pip install --no-deps --no-build-isolation --target $@ ./$(EXAMPLE) >>.venv/pip.log 2>&1 \
		|| { tail -n 20 .venv/pip.log; exit 1; }
	@touch $@
