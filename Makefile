# Everything runs inside .venv, which is made on first use from the newest Python of 3.11 to 3.13 that really starts.
VENV ?= .venv
PYTHON ?= $(shell for p in python3.13 python3.12 python3.11 python3 python; do \
	$$p -c 'import sys, venv; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' >/dev/null 2>&1 \
	&& { echo $$p; break; }; done)
PRESET ?= tiny
ARGS ?=
WORKERS ?= 2
DOCUMENTED = nsa_jax nsa_jax.nnx nsa_jax.layer nsa_jax.rope nsa_jax.dense nsa_jax.decoding nsa_jax.sharding nsa_jax.context nsa_jax.remat nsa_jax.testing nsa_jax.visualize nsa_jax.reference nsa_jax.visibility train.config train.presets train.loop train.model train.moe train.sharding train.communication train.plan train.distributed train.corpus train.chat train.tokenizer train.generate train.sampling train.positions train.report

.PHONY: install train test test-all lint docs notebooks clean

install: $(VENV)/installed

$(VENV)/installed: pyproject.toml
	@test -n "$(PYTHON)" || { echo "nsa-jax needs Python 3.11, 3.12 or 3.13 on PATH (or make PYTHON=/path/to/python)"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --upgrade pip
	$(VENV)/bin/python -m pip install --quiet --editable ".[dev]"
	@touch $@

train: install  ## train a preset (default: tiny, on the standard library's source)
	$(VENV)/bin/python -m train $(PRESET) $(ARGS)

test: lint  ## every check but the exhaustive ones
	$(VENV)/bin/python -m pytest -n $(WORKERS) --dist loadgroup -m "not exhaustive"

test-all: lint
	$(VENV)/bin/python -m pytest -n $(WORKERS) --dist loadgroup

lint: install
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

docs: install  ## the API reference, in build/docs
	$(VENV)/bin/python -W error::UserWarning -m pdoc $(DOCUMENTED) --docformat google --output-directory build/docs

notebooks: install  ## runs every notebook in full and writes its outputs, in place
	$(VENV)/bin/jupytext --to ipynb notebooks/*.py
	$(VENV)/bin/jupyter execute --inplace notebooks/*.ipynb

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
