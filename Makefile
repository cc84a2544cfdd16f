# make demo   a virtual environment, the engine in it, and one video
# make test   lint, types and tests, as CI runs them
VENV ?= .venv
PYTHON ?= python3
BIN := $(VENV)/bin
# Tests side by side. Each takes a core now and then, and up to 2 GB with the engine that it starts.
WORKERS ?= 3

.PHONY: demo test lint types check chaos gpu-test clean

$(VENV)/.installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check --editable .
	touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(BIN)/pip install --quiet --disable-pip-version-check --editable '.[dev]'
	touch $@

demo: $(VENV)/.installed
	$(BIN)/engine generate "a red circle moves left on a black background" --out demo.mp4

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.installed-dev
	$(BIN)/mypy

# More workers than cores, as tests wait much; one compute thread each: what a test computes is the same whatever runs
# beside it. Then, one at a time,
# the tests whose bounds on time hold on a quiet machine only. Bytecode is written, whatever the machine says: each of
# hundreds of processes would compile the engine anew, in a sixth of a second of a core.
check: $(VENV)/.installed-dev
	PYTHONDONTWRITEBYTECODE= OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not gpu and not alone" -n $(WORKERS) --dist worksteal --durations=10
	PYTHONDONTWRITEBYTECODE= $(BIN)/python -m pytest -m "not gpu and alone" --durations=10

test: lint types check

# Hours: the long versions of what `check` does with random faults.
chaos: $(VENV)/.installed-dev
	$(BIN)/python -m tools.chaos kills --kills 1000 --requests 2000
	$(BIN)/python -m tools.chaos kills --dits 3 --kills 300 --requests 600
	$(BIN)/python -m tools.chaos stops --stops 100
	$(BIN)/python -m tools.chaos restarts --kills 200
	$(BIN)/python -m tools.chaos leaks --requests 10000 --kills 500
	$(BIN)/python -m tools.chaos overload --minutes 10
	$(BIN)/python -m tools.chaos soak --minutes 60
	$(BIN)/python -m tools.chaos reloads --reloads 60 --requests 300
	$(BIN)/python -m tools.neighbours --rounds 8
	$(BIN)/python -m tools.neighbours --rounds 8 --singly
	$(BIN)/python -m tools.fuzz --frames 10000000 --live 1000000

gpu-test: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -m gpu

clean:
	rm -rf $(VENV) build dist .pytest_cache .ruff_cache .mypy_cache .hypothesis
