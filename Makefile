# `make` shows what there is. Everything runs in an environment of its own, .venv, which is made where it is missing.
PYTHON ?= python3
export CLIPS ?=
BIN := .venv/bin
READY := .venv/.ready
UNFINISHED := .venv/.unfinished
SLURM := slurmctld slurmd slurm-client munge

# An environment that the caller has activated is none of ours.
unexport VIRTUAL_ENV PYTHONHOME PYTHONPATH PIP_REQUIRE_VIRTUALENV
SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.PHONY: help environment quickstart clean-quickstart test test-slurm chaos learn-sync lint format

help:
	@echo "make quickstart               try it: synthetic clips, shards, a tiny model trained on 2 processes, stopped and"
	@echo "                              resumed, losses drawn; 4 minutes on 2 cores; everything lies in quickstart/"
	@echo "make quickstart CLIPS=folder  the same with your own video files"
	@echo "make clean-quickstart         delete quickstart/"
	@echo "make test                     all tests, on the CPU, with real collectives between processes; 12 to 25 minutes"
	@echo "make test-slurm               the launcher on a real SLURM that is started on this machine; 8 minutes; as root on"
	@echo "                              Debian or Ubuntu it installs the packages, else it says what to install"
	@echo "make chaos                    a run killed 54 times and resumed equals the unbroken one; 10 minutes; in chaos/"
	@echo "make learn-sync               proof that synchronization is learned: small models from scratch, scored by what"
	@echo "                              they generate; 1.5 hours on 2 free cores; the same command goes on; in learn-sync/"
	@echo "make lint                     ruff and mypy over all packages; 1 minute"
	@echo "make format                   let ruff repair the formatting"
	@echo "make environment              only make .venv (3 to 10 minutes, 6 GB; the others do it where it is missing)"

environment: $(READY)

# The marker says that an installation was begun and not ended (Ctrl-C, a lost connection): such a .venv is made anew.
$(READY): requirements.lock setup.py pyproject.toml
	@echo "== environment: .venv, with the exact versions of requirements.lock (3 to 10 minutes, once; 6 GB of disk)"
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "error: $(PYTHON) is older than Python 3.11; name another: make PYTHON=python3.12 ..." >&2; exit 1; }
	@if [ -e $(UNFINISHED) ] || ! $(BIN)/python -m pip --version >/dev/null 2>&1; then \
	  $(PYTHON) -m venv --clear .venv || { \
	    echo "error: $(PYTHON) -m venv failed; on Debian and Ubuntu: apt-get install python3-venv" >&2; exit 1; }; \
	fi
	@rm -f $(READY); touch $(UNFINISHED)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.lock
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
	@mv $(UNFINISHED) $(READY)
	@touch $(READY)
	@echo "== environment: done"

quickstart: $(READY)
	@exec $(BIN)/python -m tools.quickstart

clean-quickstart:
	rm -rf quickstart

test: $(READY)
	@echo "== tests, on the CPU (12 to 25 minutes)"
	@$(BIN)/python -m pytest

# Skips nothing: without SLURM it fails, and says what is missing.
test-slurm: $(READY)
	@if ! PATH="$$PATH:/usr/sbin" command -v slurmctld slurmd sbatch munged >/dev/null; then \
	  if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
	    echo "== SLURM: apt-get install $(SLURM)"; \
	    apt-get install -y -qq --no-install-recommends $(SLURM) >/dev/null || { \
	      apt-get update -qq && apt-get install -y -qq --no-install-recommends $(SLURM) >/dev/null; }; \
	  else \
	    echo "error: no SLURM here; install it (Debian, Ubuntu: apt-get install --no-install-recommends $(SLURM))" >&2; \
	    exit 1; \
	  fi; \
	fi
	@[ "$$(id -u)" = 0 ] || { echo "error: make test-slurm needs root: its daemons live in a PID namespace" >&2; exit 1; }
	@echo "== the launcher on a real SLURM (8 minutes)"
	@$(BIN)/python -m pytest -m slurm tests/slurm

chaos: $(READY)
	@echo "== a run killed 54 times (about 10 minutes on 2 free cores; the same command goes on where it was interrupted)"
	@OMP_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1 $(BIN)/python -m tests.train.chaos chaos 54 bench/chaos.md

learn-sync: $(READY)
	@exec $(BIN)/python -m tools.learn_sync

lint: $(READY)
	@echo "== ruff and mypy (1 minute)"
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy model data train launch tools

format: $(READY)
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .
