# Every target makes its own environment first. Overrides: PYTHON, VENV, VENV_ARGS, TORCH_INSTALL (scripts/bootstrap.sh),
# and of `finetune`: RANKS, MODEL, DS_CONFIG, OUT, FINETUNE_ARGS (examples/finetune.py --help).
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help

PYTHON ?= python3
VENV ?= .venv
VENV_ARGS ?=
TORCH_INSTALL ?=
BIN := $(VENV)/bin
STAMP := $(VENV)/.stamp
RUN := PATH="$(abspath $(BIN)):$$PATH" scripts/isolated.sh

RANKS ?= 2
SMOLLM2 := build/smollm2-135m
MODEL ?= $(SMOLLM2)
OUT ?= build/finetune
ON_GPU := $(shell [ $$(nvidia-smi -L 2>/dev/null | grep -c ^GPU) -ge $(RANKS) ] && echo yes)
DS_CONFIG ?= configs/$(if $(ON_GPU),zero1,cpu)_tp2.json
FINETUNE_ARGS ?=

.PHONY: help setup finetune test test-all lint clean

help:
	@echo 'make finetune   train a small model on $(RANKS) ranks, save it, reload it with plain transformers and compare'
	@echo 'make test       lint, types, import rules and the fast tests'
	@echo 'make test-all   the same with every test'
	@echo 'make lint       ruff, mypy, import-linter'
	@echo 'make setup      only make $(VENV)'
	@echo 'make clean      remove $(VENV), build/ and caches'

setup: $(STAMP)

$(STAMP): setup.cfg pyproject.toml scripts/bootstrap.sh
	PYTHON='$(PYTHON)' VENV='$(VENV)' VENV_ARGS='$(VENV_ARGS)' TORCH_INSTALL='$(TORCH_INSTALL)' scripts/bootstrap.sh

$(SMOLLM2)/config.json: | $(STAMP)
	$(RUN) python examples/prepare_smollm2.py --out '$(SMOLLM2)'

finetune: $(STAMP) $(if $(filter $(SMOLLM2),$(MODEL)),$(SMOLLM2)/config.json)
	port=$$($(BIN)/python -c 'import socket; s = socket.socket(); s.bind(("", 0)); print(s.getsockname()[1])'); \
	$(if $(ON_GPU),,DS_ACCELERATOR=cpu) $(RUN) deepspeed --num_gpus $(RANKS) --master_port $$port examples/finetune.py \
	    --model '$(MODEL)' --deepspeed-config '$(DS_CONFIG)' --out '$(OUT)' $(FINETUNE_ARGS)

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/mypy
	PYTHONPATH=integrations $(BIN)/lint-imports --no-cache --config setup.cfg

test: lint
	$(RUN) python -m pytest -m 'not slow' tests/

test-all: lint
	$(RUN) python -m pytest tests/

clean:
	rm -rf $(VENV) build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
