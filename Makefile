# Sets up an environment, then serves or tests. TORCH is what pip installs first, a build for the machine's device.
VENV ?= .venv
TORCH ?= torch==2.13.0

.PHONY: serve test test-slow lint lock

serve: $(VENV)/installed
	$(VENV)/bin/python -m deployments serve_config.yaml

test: $(VENV)/installed lint
	$(VENV)/bin/pytest

test-slow: $(VENV)/installed
	$(VENV)/bin/pytest -m slow

lint: $(VENV)/installed
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

# To be run where pip finds a CPU build of torch: a vendor's would bring its libraries into the lock.
lock:
	python3 -m venv $(VENV)-lock
	$(VENV)-lock/bin/pip install --quiet pip-tools==7.6.2
	CUSTOM_COMPILE_COMMAND="make lock" $(VENV)-lock/bin/pip-compile --quiet --output-file requirements.lock pyproject.toml
	! grep --extended-regexp '^(nvidia|triton|torch)[a-z0-9-]*==' requirements.lock | grep --invert-match torchao

$(VENV)/installed: pyproject.toml requirements.lock
	python3 -m venv $(VENV)
	$(VENV)/bin/pip install --quiet $(TORCH)
	$(VENV)/bin/pip install --quiet --require-hashes --requirement requirements.lock
	$(VENV)/bin/pip install --quiet --no-deps --no-build-isolation --editable .
	touch $@
