# Two commands from a fresh clone: `make run` and `make test`.
PYTHON ?= python3
VENV ?= .venv
RUN = $(VENV)/bin/python

.PHONY: run test test-all fuzz lint format clean

run: $(VENV)/installed
	$(RUN) -m fame_jax.main --flagfile=experiments/quickstart.cfg

test: $(VENV)/installed
	$(RUN) -m pytest -n 2 --dist loadfile --no-loadscope-reorder

# The long tests too; those on real data where FAME_JAX_DATA, or a folder next to the clone, has it.
test-all: export FAME_JAX_DATA ?= $(abspath $(firstword $(wildcard ../*/data)))
test-all: $(VENV)/installed
	$(RUN) -m pytest -n 2 --dist loadfile --no-loadscope-reorder -m 'not fuzz' --durations=25

# Thousands of random inputs for readers, runs and serving, new ones each time.
fuzz: $(VENV)/installed
	$(RUN) -m pytest -n 2 --dist loadfile --no-loadscope-reorder -m fuzz --hypothesis-profile=default

lint: $(VENV)/installed
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .

format: $(VENV)/installed
	$(RUN) -m ruff check --fix .
	$(RUN) -m ruff format .

$(VENV)/installed: requirements.txt
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@

clean:
	rm -rf $(VENV) .pytest_cache .ruff_cache .hypothesis .jax_cache build *.egg-info
