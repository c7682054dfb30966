# make train: train the byte-level GPT out of RAM and SSD.   make test: all checks of a change.   make test-all: the long
# ones, too (full products, kills, faults), with a CSV of counts.   make docs: the site, in build/site.
# All need only Python 3.11 or 3.12.
PYTHON ?= python3
VENV ?= .venv
# The CPU build of torch; another one: make TORCH=torch==2.13.0 TORCH_INDEX=<index of that build>
TORCH ?= torch==2.13.0+cpu
TORCH_INDEX ?= https://download.pytorch.org/whl/cpu
WORKERS ?= 2
# Where test-all writes what its long tests counted.
TALLY ?= benchmarks/results/test-all-$(shell date +%F).csv
RUN = $(VENV)/bin

.PHONY: train test test-all lint docs clean
.DEFAULT_GOAL := test

$(VENV)/.installed: setup.cfg pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(RUN)/python -m pip install --quiet --retries 1 --timeout 30 --extra-index-url $(TORCH_INDEX) "$(TORCH)"
	$(RUN)/python -m pip install --quiet --editable ".[test]"
	touch $@

train: $(VENV)/.installed
	$(RUN)/offload launch examples/byte_gpt.toml

lint: $(VENV)/.installed
	$(RUN)/ruff check
	$(RUN)/ruff format --check
	$(RUN)/lint-imports
	$(RUN)/mypy

# Two workers with a compute thread each: tests are many and small, and threads of one would wait for each other.
test: lint
	OMP_NUM_THREADS=1 $(RUN)/python -m pytest -m "not long" --numprocesses $(WORKERS) --dist worksteal

# "--tally=": a path on its own would be taken for a folder of tests.
test-all: lint
	OMP_NUM_THREADS=1 $(RUN)/python -m pytest --numprocesses $(WORKERS) --dist worksteal --tally=$(TALLY)

# Nothing in the built pages loads anything from outside.
docs: $(VENV)/.installed
	$(RUN)/python -c "import mkdocs, material, mkdocstrings" || $(RUN)/python -m pip install --quiet --editable ".[docs]"
	$(RUN)/python docs/configuration_reference.py
	NO_MKDOCS_2_WARNING=1 $(RUN)/python -m mkdocs build --strict
	$(RUN)/python docs/check_site.py build/site

clean:
	rm -rf $(VENV) *.egg-info .mypy_cache .pytest_cache .hypothesis .import_linter_cache .ruff_cache
