# demo: see it run.  test: everything that must hold before a change lands.  soak: faults at random for ten minutes.
# The rest is parts of these.
# All of it lives in .venv, which is made here, and made anew only if what it is made from has changed.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALL := $(BIN)/python -m pip install -qq --disable-pip-version-check --constraint constraints.txt --editable

export PYRIGHT_PYTHON_IGNORE_WARNINGS := 1

.PHONY: demo test check soak bench clean

demo: $(VENV)/.demo
	$(BIN)/cauce demo

# pytest comes last, and so does its closing line. Many tests wait for servers and processes, so four files are run at a time, on two cores, too.
test: check
	$(BIN)/python -m pytest --numprocesses 4 --dist loadfile --no-loadscope-reorder

check: $(VENV)/.dev
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy --strict
	$(BIN)/pyright

soak: $(VENV)/.dev
	@$(BIN)/python -m tests.soak

bench: $(VENV)/.dev
	$(BIN)/python -m benchmarks

# Not .cauce/: that is somebody's data.
clean:
	rm -rf $(VENV) build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(VENV)/.demo: pyproject.toml constraints.txt | $(VENV)/pyvenv.cfg
	@echo "Installing into $(VENV) ..."
	@$(INSTALL) '.[demo]'
	@touch $@

$(VENV)/.dev: pyproject.toml constraints.txt | $(VENV)/pyvenv.cfg
	@echo "Installing into $(VENV) ..."
	@$(INSTALL) '.[dev,bench]'
	@touch $@ $(VENV)/.demo

$(VENV)/pyvenv.cfg:
	@command -v $(PYTHON) >/dev/null || { \
	  echo "There is no '$(PYTHON)' here. Install Python 3.11 or newer, or name yours: make PYTHON=/path/to/python3" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "Cauce needs Python 3.11 or newer; '$(PYTHON)' is $$($(PYTHON) -V 2>&1). Name a newer one: make PYTHON=python3.12" >&2; exit 1; }
	@$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); \
	  echo "'$(PYTHON) -m venv' failed (on Debian: apt install python3-venv)." >&2; exit 1; }
