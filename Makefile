# `make demo` and `make test` do everything from a clean clone; the rest is for development.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test lint docs clean

demo: $(VENV)/.core
	$(BIN)/effjax demo

test: $(VENV)/.test lint
	$(BIN)/python -m pytest -q -n 2 --dist loadfile

lint: $(VENV)/.test
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright --pythonpath $(BIN)/python

docs: $(VENV)/.docs
	$(BIN)/python -m effjax.cli methods --markdown > docs/methods.md
	$(BIN)/python -m experiments.report > docs/benchmarks.md
	$(BIN)/mkdocs build --strict

$(VENV)/.core: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable .
	touch $@

# torch and diffusers are parity references; their extra is empty where no CPU build exists.
$(VENV)/.test: $(VENV)/.core
	$(BIN)/python -m pip install --quiet --editable ".[torch]"
	$(BIN)/python -m pip install --quiet --editable ".[test]"
	touch $@

$(VENV)/.docs: $(VENV)/.core
	$(BIN)/python -m pip install --quiet --editable ".[docs]"
	touch $@

clean:
	rm -rf $(VENV) demo dist docs/_build
