# The two commands that matter: `make demo` and `make test`. Each makes or refreshes .venv by itself.
PYTHON ?= python3
WORKDIR ?= runs/demo

.PHONY: demo test lint

demo: .venv/ready
	.venv/bin/python -m stf_jax.main --config=configs/demo.py --workdir=$(WORKDIR)

test: lint
	.venv/bin/python -m pytest

lint: .venv/ready-dev
	.venv/bin/ruff check --no-cache .
	.venv/bin/ruff format --no-cache --check .

.venv/bin/python:
	$(PYTHON) -m venv .venv

.venv/ready: requirements.txt | .venv/bin/python
	.venv/bin/python -m pip install --quiet --requirement requirements.txt
	touch $@

.venv/ready-dev: requirements-dev.txt requirements-data.txt .venv/ready
	.venv/bin/python -m pip install --quiet --requirement requirements-dev.txt
	.venv/bin/python -m pip install --quiet --no-deps --requirement requirements-data.txt
	touch $@
