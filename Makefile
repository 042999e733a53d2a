# `make demo` and `make test` do everything from a clean clone; the rest is for development.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

# The versions that the suite runs with, for this Python. `CONSTRAINTS=` installs without them.
VERSION := $(shell $(PYTHON) -c 'import sys; print("%d.%d" % sys.version_info[:2])')
CONSTRAINTS := $(wildcard constraints/python$(VERSION).txt)
INSTALL := -m pip install --quiet $(CONSTRAINTS:%=--constraint %)

.PHONY: demo demo-llm test lint aot aot-gpu docs constraints newest clean

demo: $(VENV)/.core
	$(BIN)/effjax demo

# The same for a language model: converted, compressed, asked what its context told it.
demo-llm: $(VENV)/.core
	$(BIN)/effjax demo --llm

test: $(VENV)/.test lint
	$(BIN)/python -m pytest -q -n 2 --dist loadfile --durations=20

lint: $(VENV)/.test
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright --pythonpath $(BIN)/python

# TPU programs compiled ahead of time; libtpu has its own environment, as JAX would look for a TPU.
aot: $(VENV)-tpu/.aot
	$(VENV)-tpu/bin/python -c "import libtpu"
	$(VENV)-tpu/bin/python -m pytest -q -n 2 -m aot_tpu tests

# GPU programs compiled ahead of time, by JAX's CUDA plugin without CUDA's libraries.
aot-gpu: $(VENV)-gpu/.aot
	$(VENV)-gpu/bin/python -m experiments.kernels.gpu_compile

docs: $(VENV)/.docs
	$(BIN)/python -m experiments.report > docs/benchmarks.md
	$(BIN)/mkdocs build --strict

# Names and versions of what VENV holds: `make newest && make constraints VENV=.venv-newest`.
VERSIONS = $(1)/bin/python -m pip list --format freeze --exclude-editable --exclude pip | sed 's/+.*//'

constraints: $(VENV)/.test
	@echo "# Made by make constraints: the versions that the suite runs with." > constraints/python$(VERSION).txt
	$(call VERSIONS,$(VENV)) >> constraints/python$(VERSION).txt

# The suite with the newest versions inside the bounds of pyproject.toml, and outside of them for
# packages that OVER names (OVER="jax transformers"). Prints what differs from the constraints.
newest:
	rm -rf .venv-newest
	$(MAKE) VENV=.venv-newest CONSTRAINTS= .venv-newest/.test
	$(if $(OVER),.venv-newest/bin/python -m pip install --quiet --upgrade $(OVER))
	@status=0; .venv-newest/bin/python -m pytest -q -n 2 --dist loadfile || status=$$?; \
	echo "constraints (<) and what ran (>):"; \
	$(call VERSIONS,.venv-newest) | diff $(or $(CONSTRAINTS),/dev/null) - | grep '^[<>] [^#]'; exit $$status

$(VENV)/.core: pyproject.toml $(CONSTRAINTS)
	$(unconstrained)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python $(INSTALL) --editable .
	touch $@

# torch and diffusers are parity references; their extra is empty where no CPU build exists.
$(VENV)/.test: $(VENV)/.core
	$(BIN)/python $(INSTALL) --editable ".[torch]"
	$(BIN)/python $(INSTALL) --editable ".[test]"
	touch $@

$(VENV)-tpu/.aot: pyproject.toml $(CONSTRAINTS)
	$(unconstrained)
	$(PYTHON) -m venv $(VENV)-tpu
	$(VENV)-tpu/bin/python -m pip install --quiet --upgrade pip
	$(VENV)-tpu/bin/python $(INSTALL) --editable ".[test,tpu]"
	touch $@

$(VENV)-gpu/.aot: pyproject.toml $(CONSTRAINTS)
	$(unconstrained)
	$(PYTHON) -m venv $(VENV)-gpu
	$(VENV)-gpu/bin/python -m pip install --quiet --upgrade pip
	$(VENV)-gpu/bin/python $(INSTALL) --editable .
	jax=$$($(VENV)-gpu/bin/python -c "import jax; print(jax.__version__)"); \
	$(VENV)-gpu/bin/python -m pip install --quiet --no-deps jax-cuda13-pjrt==$$jax \
	    jax-cuda13-plugin==$$jax nvidia-cuda-nvcc nvidia-nvvm nvidia-nvjitlink
	touch $@

$(VENV)/.docs: $(VENV)/.core
	$(BIN)/python $(INSTALL) --editable ".[docs]"
	touch $@

clean:
	rm -rf $(VENV) $(VENV)-tpu $(VENV)-gpu .venv-newest demo dist .site

define unconstrained
$(if $(CONSTRAINTS),,@echo "no constraints for Python $(VERSION): installing the newest versions")
endef
