# `make demo` and `make test` do everything from a clean clone; the rest is for development.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo demo-llm test lint aot docs clean

demo: $(VENV)/.core
	$(BIN)/effjax demo

# The same for a language model: converted, compressed, asked what its context told it.
demo-llm: $(VENV)/.core
	$(BIN)/effjax demo --llm

test: $(VENV)/.test lint
	$(BIN)/python -m pytest -q -n 2 --dist loadfile

lint: $(VENV)/.test
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright --pythonpath $(BIN)/python

# TPU programs compiled ahead of time; libtpu has its own environment, as JAX would look for a TPU.
aot: $(VENV)-tpu/.aot
	$(VENV)-tpu/bin/python -c "import libtpu"
	$(VENV)-tpu/bin/python -m pytest -q -n 2 -m aot_tpu tests

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

$(VENV)-tpu/.aot: pyproject.toml
	$(PYTHON) -m venv $(VENV)-tpu
	$(VENV)-tpu/bin/python -m pip install --quiet --upgrade pip
	$(VENV)-tpu/bin/python -m pip install --quiet --editable ".[test,tpu]"
	touch $@

$(VENV)/.docs: $(VENV)/.core
	$(BIN)/python -m pip install --quiet --editable ".[docs]"
	touch $@

clean:
	rm -rf $(VENV) $(VENV)-tpu demo dist .site
