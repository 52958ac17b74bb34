# Sets up an environment, then serves or tests. TORCH is what pip installs first, a build for the machine's device, and
# TORCH_XLA the last release of PyTorch/XLA, with the only torch that it runs with.
VENV ?= .venv
TORCH ?= torch==2.13.0
TORCH_XLA ?= torch==2.9.1 torch-xla==2.9.0
CLIENTS = tests/clients
GAUDI = cluster/environments/gaudi

.PHONY: serve test test-ray test-others test-slow test-pools environments lint lock audit

serve: $(VENV)/installed
	$(VENV)/bin/python -m deployments serve_config.yaml

# In two processes at once, of which one has all tests that start Ray: no server then runs beside another one.
test: $(VENV)/installed $(CLIENTS)/installed lint
	$(MAKE) --jobs 2 --output-sync test-ray test-others

test-ray test-others: $(VENV)/installed $(CLIENTS)/installed

test-ray:
	$(VENV)/bin/pytest -m 'ray and not slow'

test-others:
	$(VENV)/bin/pytest -m 'not ray and not slow'

# All of them, or what SLOW chooses; 'slow and not long' is what CI has the time for.
SLOW ?= slow
test-slow: $(VENV)/installed
	$(VENV)/bin/pytest -m '$(SLOW)'

# What runs in the environments of other pools, on this machine's processor; in minutes with POOLS='not slow'.
POOLS ?= slow or not slow
test-pools: $(VENV)/installed $(VENV)-xla/installed $(VENV)-gaudi/installed
	PJRT_DEVICE=CPU $(VENV)-xla/bin/python -m pytest -m '$(POOLS)' --backend xla tests/test_backends.py
	GAUDI_PYTHON=$(abspath $(VENV)-gaudi/bin/python) $(VENV)/bin/pytest -m '$(POOLS)' tests/pools

# Sets up what the tests need, two at a time with --jobs 2.
environments: $(VENV)/installed $(CLIENTS)/installed $(VENV)-xla/installed $(VENV)-gaudi/installed

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
	CUSTOM_COMPILE_COMMAND="make lock" $(VENV)-lock/bin/pip-compile --quiet --no-config --generate-hashes --strip-extras \
		--no-emit-index-url --no-emit-find-links --no-emit-trusted-host --no-emit-options --unsafe-package torch \
		--output-file $(GAUDI).lock $(GAUDI).in
	! grep --extended-regexp --no-filename '^(nvidia|triton|torch)[a-z0-9-]*==' requirements.lock $(GAUDI).lock | \
		grep --invert-match torchao

# Asks PyPI whether what is locked has known vulnerabilities; torch is of each device's own build, and not in the locks.
LOCKS = requirements.lock $(CLIENTS)/requirements.lock $(GAUDI).lock
audit:
	python3 -m venv $(VENV)-audit
	$(VENV)-audit/bin/pip install --quiet pip-audit==2.10.1
	for lock in $(LOCKS); do \
		$(VENV)-audit/bin/pip-audit --disable-pip --require-hashes --strict --requirement $$lock || exit 1; \
	done

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

# torchao, of which all of the lock's other packages can do without, has no release for this torch.
$(VENV)-xla/installed: requirements.lock
	python3 -m venv $(VENV)-xla
	$(VENV)-xla/bin/pip install --quiet $(TORCH_XLA)
	$(VENV)-xla/bin/pip install --quiet --require-hashes --requirement requirements.lock
	$(VENV)-xla/bin/pip uninstall --quiet --yes torchao
	touch $@

# Without what the lock's packages depend on, which the lock has: pip finds no hash for a package with an extra.
$(VENV)-gaudi/installed: $(GAUDI).lock
	python3 -m venv $(VENV)-gaudi
	$(VENV)-gaudi/bin/pip install --quiet $(TORCH)
	$(VENV)-gaudi/bin/pip install --quiet --no-deps --require-hashes --requirement $(GAUDI).lock
	$(VENV)-gaudi/bin/pip check
	touch $@
