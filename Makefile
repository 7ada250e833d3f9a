# make quickstart   environment, then the whole pipeline on the embedded default
# make test         environment, then every test
PYTHON ?= python3
VENV := .venv
BIN := $(CURDIR)/$(VENV)/bin

# Threads that spin while they wait take the cores from commands beside them. (OMP_PROC_BIND would put all of these on one core.)
export OMP_WAIT_POLICY ?= passive

.PHONY: help venv quickstart test faults soak lint format docs data bench clean

help:
	@sed -n 's/^# make/make/p' Makefile

venv: $(VENV)/.installed

$(VENV)/.installed: requirements.txt requirements-ray.txt requirements-dev.txt pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "Python 3.11 or newer is needed; set PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)
	@echo "installing into $(VENV): some minutes, about 2 GB"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --editable .
	@touch $@

quickstart: venv
	@PATH="$(BIN):$$PATH" python examples/quickstart.py

# make lint         ruff (lint, format) and mypy
lint: venv
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test: venv
	@PATH="$(BIN):$$PATH" python -m pytest -n 2 --cov --cov-report=term:skip-covered

# make faults       the tests of what happens when a run is killed, its disk is full, its numbers break
faults: venv
	@PATH="$(BIN):$$PATH" python -m pytest tests/faults

# make soak         the same at length: KILLS random kills over all stages, every point of a save in each stage
KILLS ?= 200
soak: venv
	@PATH="$(BIN):$$PATH" FAULTS_RANDOM_KILLS=$(KILLS) python -m pytest -n 2 tests/faults

# make format       let ruff rewrite what it can
format: venv
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# make docs         regenerate the tables of settings and metrics in the documents
docs: venv
	$(BIN)/python docs/tables.py
	$(BIN)/python benchmarks/scaling_plan.py

# make data         regenerate the sample data
data: venv
	$(BIN)/python -m examples.world.make_data

# make bench        PPO beside its peers, in environments of theirs (BENCH_ENVS, 4 GB); BENCH="--size s --eos-hazard 0.04 --only floor,ours"
BENCH_ENVS ?= .bench
BENCH ?=
# Without an exact torch pip would take one for CUDA.
PEERS_new := torch==2.13.0 trl==1.16.0 lightning pytorch-lightning
PEERS_ppo := torch==2.13.0 trl==1.12.0
PEERS_classic := torch==2.13.0 trl==0.11.4 transformers==4.46.3 'accelerate<1.3' 'numpy>=2,<2.3' rich

bench: venv $(foreach peer,new ppo classic,$(BENCH_ENVS)/$(peer)/.installed)
	$(BIN)/python benchmarks/compare.py --envs $(BENCH_ENVS) $(BENCH)

$(BENCH_ENVS)/%/.installed:
	$(PYTHON) -m venv $(@D)
	$(@D)/bin/python -m pip install --quiet --disable-pip-version-check $(PEERS_$*)
	@touch $@

# make clean        remove the environment and caches; runs and results stay
clean:
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis .coverage* build *.egg-info
