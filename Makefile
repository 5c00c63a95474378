# Two commands from a fresh clone: `make run` and `make test`.
PYTHON ?= python3
VENV ?= .venv
RUN = $(VENV)/bin/python

.PHONY: run test test-all lint format clean

run: $(VENV)/installed
	$(RUN) -m fame_jax.main --flagfile=experiments/quickstart.cfg

test: $(VENV)/installed
	$(RUN) -m pytest -n 2

# The tests that take minutes too.
test-all: $(VENV)/installed
	$(RUN) -m pytest -n 2 -m 'slow or not slow'

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
	rm -rf $(VENV) .pytest_cache .ruff_cache .hypothesis
