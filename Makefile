# `make` shows what there is. Everything runs in an environment of its own, .venv, which is made where it is missing.
PYTHON ?= python3
export CLIPS ?=
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
UNFINISHED := $(VENV)/.unfinished
LEAST := $(shell sed -n 's/.*python_requires=">=\(.*\)".*/\1/p' setup.py)
SLURM := slurmctld slurmd slurm-client munge

# Ignore an environment that the caller has activated.
unexport VIRTUAL_ENV PYTHONHOME PYTHONPATH PIP_REQUIRE_VIRTUALENV
SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.PHONY: help environment quickstart clean-quickstart test test-fast test-long test-slurm test-gpu chaos learn-sync check-clips types lint format docs tables

help:
	@echo "make quickstart               try it: synthetic clips, shards, a tiny model trained on 2 processes, stopped and"
	@echo "                              resumed, a clip and a report page; 3 to 8 minutes on 2 cores; all in quickstart/"
	@echo "make quickstart CLIPS=folder  the same with your own video files"
	@echo "make clean-quickstart         delete quickstart/"
	@echo "make test                     all tests, on the CPU, with real collectives between processes; 22 to 45 minutes"
	@echo "make test-fast                the quick ones, which start no process; for every save of a file"
	@echo "make test-slurm               the launcher on a real SLURM, started on this machine; 8 to 20 minutes; as root on"
	@echo "                              Debian or Ubuntu it installs the packages, otherwise it lists them"
	@echo "make test-gpu                 the first thing to run on a machine with a GPU: attention, a run, blocks, host memory;"
	@echo "                              at most 8 minutes; writes bench/results/gpu-NAME.md (docs/gpu.md)"
	@echo "make test-long                layouts, engines and compiled blocks in all combinations of which make test has some"
	@echo "make chaos                    a run killed 54 times and resumed equals an uninterrupted one; 6 to 10 minutes; in chaos/"
	@echo "make learn-sync               proof that synchronization is learned: small models from scratch, scored by what"
	@echo "                              they generate; 1.5 hours on 2 idle cores; the same command resumes; in learn-sync/"
	@echo "make check-clips CLIPS=folder  check each window of your video files against a linear decode; a line per file"
	@echo "make lint                     ruff and mypy over all packages; 1 minute"
	@echo "make docs                     build the pages of docs/ and the reference from the docstrings, in docs-site/"
	@echo "make tables                   write the tables of README and docs/ that follow from the code"
	@echo "make format                   let ruff fix the formatting"
	@echo "make environment              only make .venv (3 to 10 minutes, 6 GB; the others make it if it is missing)"

environment: $(READY)

# The marker tells that an installation began and did not end (Ctrl-C, a lost connection): then .venv is made again.
$(READY): requirements.lock setup.py pyproject.toml
	@echo "== environment: $(VENV), with the exact versions of requirements.lock (3 to 10 minutes, once; 6 GB of disk)"
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < tuple(map(int, "$(LEAST)".split("."))))' || { \
	  echo "error: $(PYTHON) is older than Python $(LEAST); name another: make PYTHON=python3.13 ..." >&2; exit 1; }
	@if [ -e $(UNFINISHED) ] || ! $(BIN)/python -m pip --version >/dev/null 2>&1; then \
	  $(PYTHON) -m venv --clear $(VENV) || { \
	    echo "error: $(PYTHON) -m venv failed; on Debian and Ubuntu: apt-get install python3-venv" >&2; exit 1; }; \
	fi
	@rm -f $(READY); touch $(UNFINISHED)
# With byte code: where PYTHONDONTWRITEBYTECODE is set, each process would compile torch again (9 s of a core).
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.lock
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
	@mv $(UNFINISHED) $(READY)
	@touch $(READY)
	@echo "== environment: done"

quickstart: $(READY)
	@exec $(BIN)/mova quickstart

clean-quickstart:
	rm -rf quickstart

test: $(READY)
	@echo "== tests, on the CPU, two files at a time (22 to 45 minutes on 2 cores)"
	@exec env OMP_NUM_THREADS=1 $(BIN)/python -m pytest \
	  -n 2 --dist loadfile --no-loadscope-reorder --durations=20 --tb=short

test-fast: $(READY)
	@exec env OMP_NUM_THREADS=1 $(BIN)/python -m pytest --fast -n 2 --dist loadfile --no-loadscope-reorder --durations=5

# Skips nothing: without SLURM it fails, and names what is missing.
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
	@echo "== the launcher on a real SLURM (8 to 20 minutes)"
	@$(BIN)/python -m pytest -m slurm tests/slurm

test-long: $(READY)
	@echo "== all combinations of which make test has some (20 to 50 minutes on 2 cores)"
	@exec env OMP_NUM_THREADS=1 $(BIN)/python -m pytest --long -n 2 --dist loadfile --no-loadscope-reorder --tb=short

test-gpu: $(READY)
	@echo "== one GPU (at most 8 minutes; a failure is recorded, and the rest runs)"
	@exec $(BIN)/mova bench gpu $(if $(NAME),name=$(NAME))

chaos: $(READY)
	@echo "== a run killed 54 times (6 to 10 minutes on 2 idle cores; the same command resumes where it was interrupted)"
	@OMP_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1 $(BIN)/python -m tests.train.chaos chaos 54 bench/results/chaos.md

learn-sync: $(READY)
	@exec $(BIN)/python -m bench.learn_sync

check-clips: $(READY)
	@[ -n "$$CLIPS" ] || { echo "error: name the folder: make check-clips CLIPS=folder" >&2; exit 2; }
	@exec $(BIN)/python -m data.media.check "$$CLIPS"

lint: $(READY)
	@echo "== ruff and mypy (1 minute)"
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(MAKE) --no-print-directory types

types: $(READY)
	@$(BIN)/mypy core model data train launch tools bench

# A separate environment: training does not need the packages that build the pages.
docs: requirements-docs.lock
	@[ -x .venv-docs/bin/mkdocs ] || { $(PYTHON) -m venv --clear .venv-docs && \
	  .venv-docs/bin/python -m pip install --quiet --disable-pip-version-check -r requirements-docs.lock; }
	@NO_MKDOCS_2_WARNING=1 .venv-docs/bin/mkdocs build --strict --quiet
	@echo "docs-site/index.html"

tables: $(READY)
	@$(BIN)/python -m bench.tables

format: $(READY)
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .
