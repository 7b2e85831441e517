# Everything starts here: `make train`, `make test`. Each makes .venv first when it is missing.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.installed
.DELETE_ON_ERROR:
.PHONY: train compare test test-all check docs-check format settings lock clean

train: $(READY)
	$(BIN)/python train.py --config yaml_files/sudoku_mini_puma.yaml

# The comparison in README.md: PUMA with and without a threshold and uniform masks on word problems, three seeds, two runs
# at a time. Takes one to two hours and writes runs/results/word_problems/; the same command continues.
compare: $(READY)
	$(BIN)/python -m results.run word_problems --out runs/results

# Files are shared out over two processes of one thread each. `make test WORKERS=8` takes eight.
WORKERS ?= 2
PYTEST := $(BIN)/python -m pytest -n $(WORKERS) --no-loadscope-reorder

test: $(READY)
	$(PYTEST) -m "not slow"

# And a SLURM cluster on this machine, if it can be started, and runs that are killed at random moments.
test-all: $(READY)
	$(PYTEST)

check: $(READY)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

# Runs the commands of README.md and docs/ in small, in a temporary copy.
docs-check: $(READY)
	$(BIN)/python -m tests.docs_check

format: $(READY)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# The table in docs/settings.md.
settings: $(READY)
	$(BIN)/python -m runtime.config_file docs/settings.md

# The stamp is written last, so that an interrupted install is tried again.
$(READY): requirements.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "PUMA needs Python 3.10 or newer; set PYTHON=/path/to/python3")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check --progress-bar off -r requirements.txt
	touch $@

# Pins anew from pyproject.toml. The CUDA libraries are left out: torch pins its own.
lock: $(READY)
	$(BIN)/python -m pip install -q uv
	@{ echo '# Every package that `make train` and `make test` install, pinned (made by `make lock` from pyproject.toml).'; \
	   echo '# The CUDA libraries are left out: torch pins its own.'; \
	   echo 'torch==2.13.0' > $(VENV)/torch-pin.txt; \
	   $(BIN)/uv pip compile -q --universal --python-version 3.10 --extra dev --no-header --no-annotate \
	     -c $(VENV)/torch-pin.txt pyproject.toml | grep -Ev '^(nvidia|cuda|triton|setuptools|colorama)|== .emscripten.'; \
	 } > requirements.new && mv requirements.new requirements.txt

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis
