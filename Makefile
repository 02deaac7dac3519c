# Python 3.11 or newer, pip and a package registry: nothing else is needed, no compiler either.
PYTHON ?= python3
VENV := .venv
ORACLES := .venv-oracles
PIP_INSTALL := bin/python -m pip install -qq --disable-pip-version-check
SOURCES := pyproject.toml $(wildcard lockstep/*.py lockstep/*/*.py lockstep/bundled/*)
BIN := $(VENV)/bin
LOCKSTEP := $(BIN)/lockstep

.PHONY: help demo test soak test-oracles oracles lint clean
.DEFAULT_GOAL := help

help:
	@echo "make demo          install into $(VENV) and generate with the bundled model"
	@echo "make test          run the tests (without torch)"
	@echo "make soak          random schedules with fresh seeds, for SOAK minutes (10)"
	@echo "make test-oracles  compare with transformers, JAX and lm-eval, live (installs them and torch into $(ORACLES))"
	@echo "make lint          run ruff"
	@echo "make clean         remove the virtual environments and build leftovers"
	@echo "PYTHON=python3.12 and the like choose the interpreter."

define PROMPT
class Queue:
    """A first-in, first-out queue."""

    def __init__(self, maxsize=0):

endef
export PROMPT

demo: $(VENV)/.installed
	@$(LOCKSTEP) generate --echo -p "$$PROMPT" -n 110 --temperature 0.6 --top-p 0.95 --repetition-penalty 1.1 --seed 5
	@if [ -f lockstep/commands/parity.py ]; then echo; $(LOCKSTEP) parity; fi
	@if [ -f lockstep/commands/bench.py ]; then echo; $(LOCKSTEP) bench --quick; fi

test: $(VENV)/.test
	@$(BIN)/python -m pytest -q

SOAK ?= 10
soak: $(VENV)/.test
	@LOCKSTEP_SOAK=$(SOAK) $(BIN)/python -m pytest -q tests/test_lockstep.py tests/promise/test_traffic.py \
		tests/serve/http -k soak

test-oracles: $(ORACLES)/.installed
	@$(ORACLES)/bin/python -m pytest -q tests/oracles --ignore tests/oracles/test_lm_eval.py
	@$(ORACLES)/bin/python -m pytest -q tests/oracles/test_lm_eval.py  # alone: beside JAX, its server does not come to an end

# Only the installation: it fails where the registry has no torch for this machine.
oracles: $(ORACLES)/.installed

lint: $(VENV)/.lint
	@$(BIN)/ruff check lockstep tests bench training

clean:
	rm -rf $(VENV) $(ORACLES) build dist *.egg-info

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.12")'
	@echo "making $(VENV)"
	@$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: $(BIN)/python $(SOURCES)
	@echo "installing lockstep into $(VENV)"
	@$(VENV)/$(PIP_INSTALL) .
	@touch $@

$(VENV)/.test: $(BIN)/python pyproject.toml
	@echo "installing lockstep and its tests' packages into $(VENV)"
	@$(VENV)/$(PIP_INSTALL) --editable '.[test]'
	@touch $@

$(VENV)/.lint: $(BIN)/python pyproject.toml
	@$(VENV)/$(PIP_INSTALL) 'ruff>=0.15'
	@touch $@

$(ORACLES)/.installed: pyproject.toml
	@echo "installing torch, transformers, jax and lm-eval into $(ORACLES)"
	@$(PYTHON) -m venv $(ORACLES)
	@$(ORACLES)/$(PIP_INSTALL) --editable '.[test]' torch==2.13.0 transformers==5.23.0 jax==0.10.2 \
		'lm-eval[api]==0.4.13'
	@touch $@
