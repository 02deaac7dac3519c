# Python 3.11 or newer, pip and a package registry: nothing else is needed, no compiler either.
PYTHON ?= python3
VENV := .venv
ORACLES := .venv-oracles
RAY := .venv-ray
DEV := .venv-dev
ARM := .venv-arm
# Python compiles the modules that are imported; all of torch would take a minute
PIP_INSTALL := bin/python -m pip install -qq --disable-pip-version-check --no-compile
# every package in the version and with the bytes that a lock file names; this one is built by the locked setuptools
LOCKED := $(PIP_INSTALL) --require-hashes -r
ITSELF := $(PIP_INSTALL) --no-deps --no-build-isolation
COMPILE := bin/uv pip compile --quiet --universal --python-version 3.11 --generate-hashes --annotation-style line \
	--no-header --no-emit-index-url --no-emit-find-links
AUDIT := bin/pip-audit --strict --progress-spinner off --disable-pip
SOURCES := pyproject.toml $(wildcard lockstep/*.py lockstep/*/*.py lockstep/*/*/*.py lockstep/bundled/*)
BIN := $(VENV)/bin
LOCKSTEP := $(BIN)/lockstep

# Tests start hundreds of processes. Where an environment forbids .pyc files, as containers like to, each would compile
# again all that it imports.
TESTS := test test-targets test-formats test-arm soak fuzz attacks speculation test-ray oracles-lm-eval oracles-others
$(TESTS): export PYTHONDONTWRITEBYTECODE :=
$(TESTS): export PYTHONPYCACHEPREFIX := $(CURDIR)/$(VENV)/pycache

.PHONY: help demo test test-targets test-formats test-arm arm soak fuzz attacks speculation test-ray ray test-oracles oracles-lm-eval oracles-others oracles dev lint lock audit clean
.DEFAULT_GOAL := help

help:
	@echo "make demo          install into $(VENV), generate with the bundled model, show parity and the speed-up"
	@echo "make test          run the tests (without torch)"
	@echo "make test-targets  compare with kernels for other CPUs, those with this CPU's own instructions included"
	@echo "make test-formats  layers in groups and scores in every weight format, not in some"
	@echo "make test-arm      the same bits on ARM, emulated by QEMU (on Debian); PARTS=\"linear parity\" and PROBES=20 choose"
	@echo "make soak          random schedules with fresh seeds, for SOAK minutes (10), and 2 minutes of make fuzz"
	@echo "make fuzz          random requests, bytes, templates, grammars and files, for FUZZ minutes (60)"
	@echo "make attacks       the attacks of a review, one by one, and SIGTERM in the middle of them"
	@echo "make speculation   10,000 random requests with drafts of every kind against the same without"
	@echo "make test-ray      replicas as actors of a local Ray cluster (installs Ray into $(RAY))"
	@echo "make test-oracles  compare with transformers, JAX, lm-eval, TICO and tokenizers, live (installs them and torch into $(ORACLES))"
	@echo "make lint          check style, format and types: ruff and basedpyright"
	@echo "make audit         ask whether locked or lowest allowed packages have known holes (needs the network)"
	@echo "make lock          renew the lock files: the newest allowed packages, with the hashes of all their files"
	@echo "make clean         remove the virtual environments and build leftovers"
	@echo "PYTHON=python3.12 and the like choose the interpreter."

define PROMPT
class Queue:
    """A first-in, first-out queue."""

    def __init__(self, maxsize=0):

endef
export PROMPT

demo: $(VENV)/.installed
	@$(LOCKSTEP) generate --echo -p "$$PROMPT" -n 110 --temperature 0.6 --top-p 0.95 --repetition-penalty 1.1 --seed 1
	@echo
	@$(LOCKSTEP) parity
	@echo
	@$(LOCKSTEP) bench --quick
	@echo
	@echo "Next, talk with a model of your own: a folder, a .gguf file, or a name on the Hugging Face hub, as in"
	@echo "    $(LOCKSTEP) chat Qwen/Qwen3-0.6B        (downloads 1.5 GB)"
	@echo "$(LOCKSTEP) list shows the models that are on this disk already."

# A process for each core. In the order of their names, files that take long come early: no process ends long after others.
BUDGET ?= 1320
test: $(VENV)/.test
	@LOCKSTEP_TEST_BUDGET=$(BUDGET) $(BIN)/python -m pytest -q -n auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder

# also instruction sets that are this machine's own
test-targets: $(VENV)/.test
	@LOCKSTEP_ALL_TARGETS=1 $(BIN)/python -m pytest -q tests/promise/test_isa.py tests/ops/linear/test_linear.py \
		tests/ops/attention/test_attention.py tests/ops/attention/test_ragged_paged_attention.py -k target
	@NUMBA_CPU_NAME=haswell NUMBA_CPU_FEATURES= $(BIN)/python -m tests.arm.golden

# layers in groups and scores in every format, whose kernels take a minute to compile
test-formats: $(VENV)/.test
	@LOCKSTEP_ALL_FORMATS=1 $(BIN)/python -m pytest -q tests/ops/sampling/test_score.py tests/ops/linear/test_grouped_linear.py

# this machine compiles, the emulated one runs
PARTS ?=
PROBES ?=
SEED ?=
test-arm: $(ARM)/python $(VENV)/.test
	@$(BIN)/python -m tests.arm $(ARM) $(PARTS) $(PROBES:%=--probes=%) $(SEED:%=--seed=%)
# only the emulated machine, from Debian's and Python's registries, without root
arm: $(ARM)/python

SOAK ?= 10
soak: $(VENV)/.test
	@LOCKSTEP_SOAK=$(SOAK) $(BIN)/python -m pytest -q tests/test_lockstep.py tests/promise/test_traffic.py \
		tests/serve -k soak
	@$(BIN)/python -m tests.fuzz --minutes 2

FUZZ ?= 60
fuzz: $(VENV)/.test
	@$(BIN)/python -m tests.fuzz --minutes $(FUZZ)

attacks: $(VENV)/.test
	@$(BIN)/python -m tests.fuzz --attacks

REQUESTS ?= 10000
speculation: $(VENV)/.test
	@$(BIN)/python -m tests.speculation --requests $(REQUESTS)

# Two processes, with -j2 at the same time: beside JAX, lm-eval's server does not come to an end.
test-ray: $(RAY)/.installed
	@$(RAY)/bin/python -m pytest -q tests/replicas/test_ray.py
ray: $(RAY)/.installed

test-oracles: oracles-lm-eval oracles-others

oracles-lm-eval: $(ORACLES)/.installed
	@$(ORACLES)/bin/python -m pytest -q tests/oracles/test_lm_eval.py

oracles-others: $(ORACLES)/.installed
	@$(ORACLES)/bin/python -m pytest -q tests/oracles --ignore tests/oracles/test_lm_eval.py

# Only the installation: it fails where the registry has no torch for this machine.
oracles: $(ORACLES)/.installed

# Only the installation: it fails where the registry has no basedpyright for this machine.
dev: $(DEV)/.installed

lint: $(DEV)/.installed $(VENV)/.test
	@$(DEV)/bin/ruff check lockstep tests bench training setup.py
	@$(DEV)/bin/ruff format --check --quiet lockstep tests bench training setup.py
	@$(DEV)/bin/basedpyright --pythonpath $(BIN)/python

lock: $(DEV)/.installed
	@echo setuptools | $(DEV)/$(COMPILE) --upgrade pyproject.toml - -o requirements.lock
	@echo setuptools | $(DEV)/$(COMPILE) --upgrade -c requirements.lock --extra test pyproject.toml - \
		-o requirements-test.lock
	@$(DEV)/bin/python -c 'import tomllib; \
		print("\n".join(tomllib.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"]["dev"]))' \
		| $(DEV)/$(COMPILE) --upgrade - -o requirements-dev.lock

# A package that cannot be asked after is a failure, too.
audit: $(DEV)/.installed
	@for lock in requirements.lock requirements-test.lock requirements-dev.lock; do \
		echo "$$lock"; $(DEV)/$(AUDIT) --require-hashes -r $$lock || exit 1; done
	@echo "the lowest versions that pyproject.toml allows"
	@$(DEV)/bin/uv pip compile --quiet --python-version 3.11 --resolution lowest-direct --no-header --extra test \
		--extra plot --extra receipts pyproject.toml -o $(DEV)/lowest.txt
	@$(DEV)/$(AUDIT) --no-deps -r $(DEV)/lowest.txt

clean:
	rm -rf $(VENV) $(ORACLES) $(RAY) $(DEV) $(ARM) build dist *.egg-info

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.12")'
	@echo "making $(VENV)"
	@$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: $(BIN)/python requirements.lock $(SOURCES)
	@echo "installing lockstep into $(VENV)"
	@$(VENV)/$(LOCKED) requirements.lock
	@$(VENV)/$(ITSELF) .
	@touch $@

$(VENV)/.test: $(BIN)/python requirements-test.lock pyproject.toml
	@echo "installing lockstep and its tests' packages into $(VENV)"
	@$(VENV)/$(LOCKED) requirements-test.lock
	@$(VENV)/$(ITSELF) --editable .
	@touch $@

$(DEV)/.installed: requirements-dev.lock
	@echo "installing ruff, basedpyright, pip-audit and uv into $(DEV)"
	@$(PYTHON) -m venv $(DEV)
	@$(DEV)/$(LOCKED) requirements-dev.lock
	@touch $@

$(ARM)/python: $(BIN)/python requirements-test.lock tests/arm/environment.py
	@echo "making an emulated ARM machine in $(ARM)"
	@$(BIN)/python -m tests.arm.environment $(ARM)

$(RAY)/.installed: pyproject.toml
	@echo "installing lockstep and Ray into $(RAY)"
	@$(PYTHON) -m venv $(RAY)
	@$(RAY)/$(PIP_INSTALL) --editable '.[ray]' httpx pytest
	@touch $@

$(ORACLES)/.installed: pyproject.toml
	@echo "installing torch, transformers, jax, lm-eval and tico into $(ORACLES)"
	@$(PYTHON) -m venv $(ORACLES)
	@$(ORACLES)/$(PIP_INSTALL) --editable '.[test]' torch==2.13.0 transformers==5.23.0 jax==0.10.2 \
		'lm-eval[api]==0.4.13' tico==0.3.0 mistral-common==1.13.1 sentencepiece==0.2.3
	@touch $@
