# The commands of this project. `make help` lists them. Every one starts from `python3` alone.
SHELL := /bin/bash
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
SETUP_STAMP := $(VENV)/.installed
# Two workers, a file to one of them: a file's tests share their ranks and clusters.
TWO_AT_A_TIME := --numprocesses 2 --dist loadfile --no-loadscope-reorder
SOURCES := megatron_zaya ckpt topology launch tests benchmarks tools setup.py

.DEFAULT_GOAL := help
.PHONY: help setup smoke check format reference docs test test-soak test-mcore-latest bench clean

help:  ## list the commands
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 20

setup: $(SETUP_STAMP)  ## build .venv (quick when nothing changed)

$(SETUP_STAMP): setup.py constraints.txt ckpt/native.c megatron_zaya/model/fused.c
	@$(PYTHON) -c 'import sys; assert (3, 11) <= sys.version_info < (3, 14), f"Python 3.11 to 3.13 is needed, this is {sys.version.split()[0]}; set PYTHON="'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[test]'
	@touch $@

smoke: setup  ## prepare text, train, kill, resume, compare: the whole system in minutes (LAYOUT=tp2, ep2, pp2, cp2)
	$(BIN)/python tools/smoke.py $(LAYOUT)

check: setup  ## format, lint, types, import contracts, shell scripts, spelling
	$(BIN)/ruff format --check --quiet $(SOURCES)
	$(BIN)/ruff check --quiet $(SOURCES)
	$(BIN)/mypy
	PATH=$(BIN):$$PATH $(BIN)/lint-imports
	$(BIN)/shellcheck .ci/run tools/*.sh slurm/*.sbatch slurm/hooks/*.sh
	$(BIN)/codespell

format: setup  ## rewrite the sources in the project's format
	$(BIN)/ruff format --quiet $(SOURCES)
	$(BIN)/ruff check --fix --quiet $(SOURCES)

reference: setup  ## write docs/reference/ and docs/pictures/ from the code
	$(BIN)/python tools/reference.py
	$(BIN)/python tools/pictures.py

docs: reference  ## build the documentation into site/, strictly
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[docs]'
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

test: setup  ## the whole test-suite
	tools/install_apt_packages.sh
	OMP_NUM_THREADS=1 $(BIN)/pytest $(TWO_AT_A_TIME)

test-soak: setup  ## the long tests too: every layout, more resharding pairs, 1,024 Slurm tasks (half an hour)
	tools/install_apt_packages.sh
	OMP_NUM_THREADS=1 $(BIN)/pytest --soak $(TWO_AT_A_TIME)

bench: setup  ## every benchmark, as JSON
	for file in benchmarks/*.py; do $(BIN)/python $$file --json; done

test-mcore-latest:  ## model, parity and training tests on the newest Megatron-Core (needs Python 3.12)
	$(MAKE) setup VENV=.venv-mcore-latest PYTHON="$${PYTHON_LATEST:-$$(tools/find_python.sh 3.12)}"
	OMP_NUM_THREADS=1 .venv-mcore-latest/bin/pytest tests/model tests/train

clean:  ## remove the environment and everything that runs wrote
	rm -rf $(VENV) .venv-mcore-latest runs data site artefacts
