# Attar's daily commands. Everything happens in .venv, made with Python 3.11 and the exact versions of requirements/.

PYTHON ?= python3.11
VENV := .venv
RUN := $(VENV)/bin/python
INSTALLED := $(VENV)/.installed
PIP := $(RUN) -m pip --disable-pip-version-check -qq
DEMO_HOME := $(CURDIR)/.demo
# Two at a time: half of the tests wait for processes. Threads that spin while they wait would hinder both.
PYTEST := OMP_WAIT_POLICY=PASSIVE $(RUN) -m pytest -q -n 2

.DEFAULT_GOAL := help
.PHONY: help environment demo serve test check test-long lint lock clean

help:
	@echo "make demo       compress a real model through the real service, and see what came out"
	@echo "make serve      run the service on 127.0.0.1:8000 until Ctrl-C"
	@echo "make check      the quick tests: lint, types, imports, units"
	@echo "make test       everything that CI runs"
	@echo "make test-long  what is too long for CI"
	@echo "make lint       lint, types and imports alone"
	@echo "make lock       write requirements/*.lock from the versions in $(VENV)"
	@echo "make clean      remove what these commands made, except $(VENV)"

environment: $(INSTALLED)

# torch first and with its dependencies, as only its own wheel knows which libraries its build needs; then everything
# else, each at its locked version.
$(INSTALLED): requirements/dev.lock pyproject.toml
	@command -v "$(PYTHON)" >/dev/null && "$(PYTHON)" -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' || \
		{ echo "Attar needs Python 3.11; name one with: make PYTHON=/path/to/python3.11 ..." >&2; exit 1; }
	@test -x $(RUN) && $(RUN) -m pip --version >/dev/null 2>&1 || { \
		echo "Making the environment in $(VENV) (once; some minutes)"; \
		"$(PYTHON)" -m venv --clear $(VENV) || \
		{ echo "$(PYTHON) cannot make environments; on Debian and Ubuntu install python3.11-venv" >&2; exit 1; }; }
	@echo "Installing the packages of requirements/dev.lock"
	@$(PIP) install -c requirements/dev.lock torch==2.13.0
	@$(PIP) install --no-deps -r requirements/dev.lock
	@$(PIP) install --no-deps --no-build-isolation --editable .
	@touch $@

demo: $(INSTALLED)
	@ATTAR_HOME="$(DEMO_HOME)" exec $(RUN) -m app.cli demo

serve: $(INSTALLED)
	@exec $(RUN) -m app.cli serve

lint: $(INSTALLED)
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy
	$(VENV)/bin/lint-imports

check: lint
	$(PYTEST) --dist loadfile --no-loadscope-reorder -m "not service and not job and not long"

test: lint
	$(PYTEST) --dist loadfile --no-loadscope-reorder -m "not long"

test-long: $(INSTALLED)
	$(PYTEST) -m long

lock: $(INSTALLED)
	$(RUN) requirements/write_locks.py

clean:
	@if test -x $(RUN) && test -d "$(DEMO_HOME)"; then \
		$(RUN) -c 'import pathlib, sys; from app.local import remove_servers; remove_servers(pathlib.Path(sys.argv[1]))' \
			"$(DEMO_HOME)"; fi
	rm -rf "$(DEMO_HOME)" .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache *.egg-info
	find . -name __pycache__ -type d -not -path "./$(VENV)/*" -prune -exec rm -rf {} +
