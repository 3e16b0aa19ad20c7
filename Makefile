# Everything runs inside .venv, which is made on first use from the newest Python of 3.11 to 3.13 that really starts.
VENV ?= .venv
PYTHON ?= $(shell for p in python3.13 python3.12 python3.11 python3 python; do \
	$$p -c 'import sys, venv; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' >/dev/null 2>&1 \
	&& { echo $$p; break; }; done)
PRESET ?= tiny
ARGS ?=
COUNT ?= 20
SEED ?= 0
WORKERS ?= 2
SMOKE = tests/test_brute_force.py tests/test_results.py \
	tests/nsa_jax/test_against_brute_force.py tests/nsa_jax/test_rope.py \
	$(addprefix tests/pallas_kernels/test_ops.py::test_, a_window_of_one_returns_the_values \
		blocks_are_those_of_highest_importance queries_that_see_nothing_give_zero_and_no_gradient) \
	tests/train/data tests/train/model/test_loss.py tests/train/test_config.py tests/train/test_evaluate.py \
	tests/train/test_presets.py tests/train/test_step.py tests/train/checkpoints/test_saved.py
# The tests of a file run in one process: they share what the first of them traces, compiles, trains or saves.
PYTEST = $(VENV)/bin/python -m pytest -n $(WORKERS) --dist loadfile

.PHONY: install train smoke test test-all mutants lint figures docs notebooks wheel clean

install: $(VENV)/installed

$(VENV)/installed: pyproject.toml
	@test -n "$(PYTHON)" || { echo "nsa-jax needs Python 3.11, 3.12 or 3.13 on PATH (or make PYTHON=/path/to/python)"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --upgrade pip
	$(VENV)/bin/python -m pip install --quiet --editable ".[dev]"
	@touch $@

train: install  ## train a preset (default: tiny, on the standard library's source)
	$(VENV)/bin/python -m train $(PRESET) $(ARGS)

smoke: install  ## the fastest checks that touch every package: under two minutes
	$(PYTEST) -m "not exhaustive" $(SMOKE)

test: lint  ## every check except the exhaustive ones: under ten minutes on two cores
	$(PYTEST) -m "not exhaustive"

test-all: lint
	$(PYTEST)

mutants: install  ## which of COUNT random slips in the code, drawn by SEED, do the tests notice?
	$(VENV)/bin/python -m pip install --quiet --editable ".[dev,mutation]"
	$(VENV)/bin/python tests/mutants.py --count $(COUNT) --seed $(SEED) $(ARGS)

lint: install
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

figures: install  ## writes the tables of README.md and docs/ and the pictures in docs/figures, from the recorded results
	$(VENV)/bin/python -m docs.figures

docs: install  ## the pages of docs/ and the API reference, in build/docs
	$(VENV)/bin/python -m mkdocs build --strict --quiet

wheel: install  ## in dist/
	$(VENV)/bin/python -m build --wheel

notebooks: install  ## runs every notebook in full and writes its outputs, in place
	$(VENV)/bin/jupytext --to ipynb notebooks/*.py
	$(VENV)/bin/jupyter execute --inplace notebooks/*.ipynb

clean:
	rm -rf $(VENV) build dist *.egg-info .jax_cache .pytest_cache .mypy_cache .ruff_cache .hypothesis
