# Sets up an environment, then serves or tests. TORCH is what pip installs first, a build for the machine's device.
VENV ?= .venv
TORCH ?= torch==2.13.0
CLIENTS = tests/clients

.PHONY: serve test test-slow lint lock

serve: $(VENV)/installed
	$(VENV)/bin/python -m deployments serve_config.yaml

test: $(VENV)/installed $(CLIENTS)/installed lint
	$(VENV)/bin/pytest

test-slow: $(VENV)/installed
	$(VENV)/bin/pytest -m slow

lint: $(VENV)/installed
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	$(VENV)/bin/lint-imports

# To be run where pip finds a CPU build of torch: a vendor's would bring its libraries into the lock.
lock:
	python3 -m venv $(VENV)-lock
	$(VENV)-lock/bin/pip install --quiet pip-tools==7.6.2
	CUSTOM_COMPILE_COMMAND="make lock" $(VENV)-lock/bin/pip-compile --quiet --output-file requirements.lock pyproject.toml
	CUSTOM_COMPILE_COMMAND="make lock" $(VENV)-lock/bin/pip-compile --quiet --no-config --generate-hashes --strip-extras \
		--no-emit-index-url --no-emit-find-links --no-emit-trusted-host --no-emit-options \
		--output-file $(CLIENTS)/requirements.lock $(CLIENTS)/requirements.in
	! grep --extended-regexp '^(nvidia|triton|torch)[a-z0-9-]*==' requirements.lock | grep --invert-match torchao

$(VENV)/installed: pyproject.toml requirements.lock
	python3 -m venv $(VENV)
	$(VENV)/bin/pip install --quiet $(TORCH)
	$(VENV)/bin/pip install --quiet --require-hashes --requirement requirements.lock
	$(VENV)/bin/pip install --quiet --no-deps --no-build-isolation --editable .
	touch $@

# Clients that tests drive: LiteLLM in an environment of its own, since it needs older releases than ours, and JavaScript
# ones where there is npm.
$(CLIENTS)/installed: $(CLIENTS)/requirements.lock $(CLIENTS)/package-lock.json
	python3 -m venv $(CLIENTS)/.venv
	$(CLIENTS)/.venv/bin/pip install --quiet --require-hashes --requirement $(CLIENTS)/requirements.lock
	! command -v npm || npm ci --silent --prefix $(CLIENTS)
	touch $@
