# SPDX-License-Identifier: Apache-2.0
# Every target sets up what it needs, on a fresh machine too, in one virtual environment that all of them share.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
SOURCES := peft_promptmoe tests examples benchmarks docs noxfile.py

.PHONY: demo test test-full test-gpu quick-start matrix faults coverage check docs dist format bench reach bench-full bench-gpu learn-gpu clean

demo: $(VENV)/.installed-examples
	$(BIN)/python examples/advanced/text_classification.py

# One thread for each of the two workers: more threads than cores make small tensors slower, not faster.
test: $(VENV)/.installed-test
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 -m "not slow"

# With the cells that cost more time than they add coverage.
test-full: $(VENV)/.installed-test
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2

# The real kernels, on a CUDA device.
test-gpu: $(VENV)/.installed-test
	PEFT_PROMPTMOE_TEST_GPU=1 $(BIN)/python -m pytest tests/gpu

# README's quick start to the letter: the wheel in a fresh environment, one process to train and one to predict.
quick-start: $(VENV)/.installed-examples
	OMP_NUM_THREADS=1 $(BIN)/python tests/docs/quick_start.py --reuse --packaged

# The promises of the package, method by method and architecture by architecture, with the tests that hold them.
matrix: $(VENV)/.installed-test
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 tests/contract tests/parity --matrix CONTRACT.md

# Mistakes put into a copy of the package, one after the other; some test has to fail of each.
faults: $(VENV)/.installed-test
	$(BIN)/python tests/faults.py

# Of every test, the slow ones too: some of them are all that a branch has.
coverage: $(VENV)/.installed-test
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --cov --cov-report=term-missing --cov-fail-under=95

check: $(VENV)/.installed-dev
	$(BIN)/ruff check $(SOURCES)
	$(BIN)/ruff format --check $(SOURCES)
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --site-dir build/site

# The site, in build/site. A broken link or reference fails.
docs: $(VENV)/.installed-docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --site-dir build/site

# Both archives as they would be published, in dist/.
dist: $(VENV)/.installed-release
	rm -rf dist
	$(BIN)/python -m build
	$(BIN)/python -m twine check --strict dist/*

format: $(VENV)/.installed-dev
	$(BIN)/ruff check --fix $(SOURCES)
	$(BIN)/ruff format $(SOURCES)

# Exact costs, tables and pictures, in some three minutes on one core. It trains and times nothing.
bench: $(VENV)/.installed-benchmarks
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/cost_exact.py
	$(BIN)/python benchmarks/readme_tables.py
	$(BIN)/python benchmarks/plots.py

# Which of today's architectures prompts can join, and whether the result is right: an hour on one core. It goes on where
# it was stopped; delete a record from results/reach.json to run its model again.
reach: $(VENV)/.installed-benchmarks
	OMP_NUM_THREADS=1 CUDA_VISIBLE_DEVICES= HF_HUB_OFFLINE=1 $(BIN)/python benchmarks/reach.py

# Everything: times, which want a quiet machine for an hour, and learning, which on two cores takes a night and a day.
# All of it goes on where it was stopped, and finished cells are kept: to run one again, delete it from its JSON file.
bench-full: $(VENV)/.installed-benchmarks
	$(BIN)/python benchmarks/times.py
	$(BIN)/python benchmarks/learning_text.py
	$(BIN)/python benchmarks/learning_text.py --sizes
	$(BIN)/python benchmarks/learning_text.py --task mixture
	$(BIN)/python benchmarks/learning_text.py --task mixture --pathways mept-centered
	$(BIN)/python benchmarks/learning_vision.py --low-data
	$(BIN)/python benchmarks/learning_vision.py --task mnist --low-data
	$(BIN)/python benchmarks/learning_vision.py --task mnist --of-vapt
	$(BIN)/python benchmarks/learning_vision.py --task mnist --epochs 20 --two-rates
	$(BIN)/python benchmarks/learning_causal.py
	$(BIN)/python benchmarks/learning_mixture.py
	$(BIN)/python benchmarks/learning_mixture.py --sequence
	$(BIN)/python benchmarks/learning_experts.py
	$(BIN)/python benchmarks/learning_dense.py
	$(BIN)/python benchmarks/motion_levels.py
	$(BIN)/python benchmarks/learning_motion.py
	$(BIN)/python benchmarks/learning_motion.py --ablations
	$(BIN)/python benchmarks/learning_motion.py --task depth
	$(BIN)/python benchmarks/learning_motion.py --task depth --transfer
	$(BIN)/python benchmarks/learning_motion.py --transfer
	$(BIN)/python benchmarks/learning_text.py --times
	$(BIN)/python benchmarks/learning_text.py --task mixture --times
	$(BIN)/python benchmarks/learning_vision.py --times
	$(BIN)/python benchmarks/learning_vision.py --task mnist --times
	$(BIN)/python benchmarks/learning_causal.py --times
	$(BIN)/python benchmarks/learning_experts.py --times
	$(MAKE) bench

# On a GPU: steps, memory, decoding, waiting and kernels in under eight minutes. Try it on a CPU with --small.
bench-gpu: $(VENV)/.installed-benchmarks
	$(BIN)/python benchmarks/gpu.py

# On a GPU: what each method learns on CIFAR-10 at 224 pixels, in some seven minutes.
learn-gpu: $(VENV)/.installed-benchmarks
	$(BIN)/python benchmarks/learning_gpu.py

clean:
	rm -rf $(VENV)

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

# One stamp for each extra, renewed when pyproject.toml changes.
$(VENV)/.installed-%: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet --editable ".[$*]"
	touch $@
