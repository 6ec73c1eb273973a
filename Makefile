PYTHON ?= python3
# Two test processes of one thread each: more threads than cores would spin against each other.
TEST := OMP_NUM_THREADS=1 .venv/bin/pytest -n 2
BIN := .venv/bin
# Packages here go before those of .venv: one other transformers, and nothing in .venv changes.
LOWEST_HF := build/transformers-5.0.0

.PHONY: demo test test-slow test-browser test-hf-versions lint format clean

demo: .venv/ready          ## read a long text, then ask for the facts hidden in it
	$(BIN)/titans demo

test: .venv/ready lint     ## lint, types, and the whole test ladder (under 12 minutes on two cores)
	$(TEST) -m "not slow and not browser" --durations 10

test-slow: .venv/ready     ## the long stability and training tests
	$(TEST) -m slow

test-browser: .venv/ready  ## the page of titans studio in Chromium; installs it, or says why not
	sh tests/studio/browser/install.sh $(BIN)
	OMP_NUM_THREADS=1 $(BIN)/pytest -m browser -rs tests/studio/browser

test-hf-versions: .venv/ready $(LOWEST_HF)  ## tests/hf with the lowest transformers supported
	PYTHONPATH=$(LOWEST_HF) OMP_NUM_THREADS=1 $(BIN)/pytest tests/hf

$(LOWEST_HF):
	$(BIN)/pip install --quiet --no-warn-conflicts --target $@ "transformers==5.0.0" "numpy<3"

lint: .venv/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: .venv/ready
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

.venv/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --constraint constraints.txt --editable ".[dev]"
	touch .venv/ready

clean:
	rm -rf .venv .pytest_cache .mypy_cache .ruff_cache .hypothesis
