# Sets up an environment, then serves or tests. On a machine with an accelerator, install its torch first.
VENV ?= .venv
TORCH ?= torch==2.13.0

.PHONY: serve test lint

serve: $(VENV)/installed
	$(VENV)/bin/serve run serve_config.yaml

test: $(VENV)/installed lint
	$(VENV)/bin/pytest

lint: $(VENV)/installed
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

$(VENV)/installed: pyproject.toml
	python3 -m venv $(VENV)
	$(VENV)/bin/pip install --quiet $(TORCH)
	$(VENV)/bin/pip install --quiet --editable '.[dev,train]'
	touch $@
