# Two commands: make demo, make test. Both set up .venv when it is missing or out of date.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# The one place that pins torch, for set-ups without a GPU. On a GPU machine: make TORCH=torch demo, or install your
# own build of torch into $(VENV) first. Where pip would fetch CUDA packages for a machine without a GPU:
# make TORCH_INDEX=https://download.pytorch.org/whl/cpu demo
TORCH ?= torch==2.13.0
TORCH_INDEX ?=
LAUNCH := $(BIN)/accelerate launch --quiet --config_file configs/cpu.yaml

.PHONY: demo test test-slow check format setup clean

demo: setup
	@test -f runs/patient-model/patient.json || $(BIN)/python -m patient --output runs/patient-model
	@$(LAUNCH) train/run.py recipes/patient.yaml

# What is small, then whole runs, two at a time. One thread to a process: a second one wins little on a tiny model, and
# loses ten times as much where it has to wait for a processor.
SMALL := tests/unit tests/browser tests/end_to_end/test_bad_input.py
test: check
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n auto $(SMALL)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 --dist loadfile tests/distributed tests/end_to_end $(SMALL:%=--ignore=%)

test-slow: setup
	$(BIN)/python -m pytest -q -m slow

check: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/codespell abliteration common configs eval patient recipes train README.md CHANGELOG.md CONTRIBUTING.md
	$(BIN)/mypy
	$(BIN)/lint-imports

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

setup: $(VENV)/.ready

$(VENV)/.ready: pyproject.toml
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "setting up $(VENV) (once)"
	@$(BIN)/python -c "import torch" 2>/dev/null || $(BIN)/pip install --quiet $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) "$(TORCH)"
	@$(BIN)/pip install --quiet -e ".[dev]"
	@# What the pages are checked with for people who cannot see or use a mouse; without it those tests are skipped.
	@if command -v npm >/dev/null; then npm install --silent --no-save --prefix $(VENV) axe-core@4.14.1 >/dev/null \
		|| echo "axe-core could not be installed: its tests will be skipped"; fi
	@touch $@

clean:
	rm -rf runs
