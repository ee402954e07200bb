# `make help` lists the words.  Another Python for .venv: make PYTHON=python3.12 test
PYTHON ?= python3
EXAMPLE := examples/hwfuse-acme
EVIDENCE := .venv/evidence.jsonl
AITER := amd-aiter==0.1.7.post2.dev18 pandas==3.1.1 einops==0.8.2 psutil==7.2.2 \
	packaging==26.3 python-dateutil==4.0.0 six==1.17.0

export OMP_NUM_THREADS ?= 1

# Always `-m`: a tool that the outer Python brings has no script in .venv/bin.
RUN := .venv/bin/python -m
LINT_IMPORTS := .venv/bin/python -c 'from importlinter.cli import lint_imports_command as main; main()'

.DEFAULT_GOAL := help
.PHONY: help demo test aiter evidence check lint format clean

help: ## list the words
	@sed -n 's/^\([a-z]*\):.*## /  make \1	/p' Makefile

demo: .venv/example ## run small models with and without hwfuse, on this machine
	PYTHONPATH='$(CURDIR)/.venv/example' $(RUN) hwfuse demo

# No plugins of the outer Python: under `filterwarnings = error` their warnings stop the run.
# Documents in one process: their code blocks go on where the last one ended.
test: .venv/ready ## run all tests, in two processes
	@rm -f $(EVIDENCE)
	EVIDENCE_FILE='$(CURDIR)/$(EVIDENCE)' $(RUN) pytest --disable-plugin-autoload -p xdist -n 2 tests
	$(RUN) pytest --disable-plugin-autoload README.md CONTRIBUTING.md docs

aiter: .venv/aiter/done ## get AMD's wheel, which the tests in tests/amd then look into (40 MB)

# pip's --target, not the venv: hwfuse must not find an aiter that cannot run here.
.venv/aiter/done: .venv/ready
	@rm -rf .venv/aiter
	@$(RUN) pip install --quiet --no-deps --target .venv/aiter $(AITER) >>.venv/pip.log 2>&1 \
		|| { tail -n 20 .venv/pip.log; exit 1; }
	@touch $@

evidence: ## write down in docs/amd.md what the last `make test` proved of the AMD backend
	$(RUN) hwfuse.testing.evidence rocm $(EVIDENCE) docs/amd.md

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
