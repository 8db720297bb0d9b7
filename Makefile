# SPDX-License-Identifier: Apache-2.0
# Every target sets up what it needs, on a fresh machine too, in one virtual environment that all of them share.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
SOURCES := peft_promptmoe tests examples benchmarks noxfile.py

.PHONY: demo test test-full check format bench bench-learning clean

demo: $(VENV)/.installed-examples
	$(BIN)/python examples/text_classification.py

# One thread for each of the two workers: more threads than cores make small tensors slower, not faster.
test: $(VENV)/.installed-test
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 -m "not slow"

# With the cells that cost more time than they add coverage.
test-full: $(VENV)/.installed-test
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2

check: $(VENV)/.installed-dev
	$(BIN)/ruff check $(SOURCES)
	$(BIN)/ruff format --check $(SOURCES)
	$(BIN)/mypy

format: $(VENV)/.installed-dev
	$(BIN)/ruff check --fix $(SOURCES)
	$(BIN)/ruff format $(SOURCES)

# The cost of every method, in a quarter of an hour; bench-learning takes hours and goes on where it was stopped.
bench: $(VENV)/.installed-benchmarks
	$(BIN)/python benchmarks/cost_text.py --output benchmarks/results/cost_text.json
	$(BIN)/python benchmarks/cost_vision.py --output benchmarks/results/cost_vision.json
	$(BIN)/python benchmarks/cost_experts.py --output benchmarks/results/cost_experts.json
	$(BIN)/python benchmarks/readme_tables.py

bench-learning: $(VENV)/.installed-benchmarks
	$(BIN)/python benchmarks/learning_text.py
	$(BIN)/python benchmarks/learning_text.py --task mixture
	$(BIN)/python benchmarks/learning_vision.py
	$(BIN)/python benchmarks/learning_vision.py --task mnist
	$(BIN)/python benchmarks/readme_tables.py

clean:
	rm -rf $(VENV)

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

# One stamp for each extra, renewed when pyproject.toml changes.
$(VENV)/.installed-%: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet --editable ".[$*]"
	touch $@
