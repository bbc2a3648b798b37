# make demo   train the two-stage VAE on the 8x8 digits and show what it does
# make test   lint, types, import order, tests
# make integrations  install other libraries in .venv-integrations and run the balance in them beside their own losses
# make docs   build the documentation site in docs/_build/html, in .venv-docs; every code block is executed
# make release-check  build wheel and sdist twice, install them and each extra in empty environments, and run them
# make claims train and measure everything behind docs/claims.md that is not done yet, and write it (about two hours on two cores; POISE_DATA)
# make torture  try to break the promises of docs/reliability.md (about an hour on two cores; TORTURE="--scale 0.1" is short)
# make torture-versions  test with the oldest and with the newest versions of all dependencies (OLDEST_PYTHON, NEWEST_PYTHON)
#
# All make .venv themselves and need only Python 3.11 or newer. PYTHON chooses the interpreter, TORCH the build of PyTorch:
#   make test TORCH="torch --index-url URL-OF-A-CPU-BUILD"

PYTHON ?= python3
OLDEST_PYTHON ?= python3.11
NEWEST_PYTHON ?= python3.13
TORCH ?= torch
VENV := .venv
BIN := $(VENV)/bin
# Compiling every module of every package takes half of the installation, and few are imported.
PIP := $(BIN)/python -m pip install --no-compile --quiet --disable-pip-version-check

# Each of a hundred processes of the tests would compile the package again.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: demo test integrations docs release-check claims torture torture-versions lint format rules layers types tests clean

demo: $(VENV)/installed
	$(BIN)/poise train digits --out runs/digits
	$(BIN)/poise sample runs/digits --count 64 --out runs/digits/grid.png

# The checker of types uses one core for half a minute, so it runs beside the tests.
test: format rules layers
	@$(MAKE) --no-print-directory --jobs 2 tests types

tests: $(VENV)/installed-tests
	$(BIN)/python -m pytest --numprocesses 2 --dist worksteal

integrations: $(VENV)-integrations/installed
	$(VENV)-integrations/bin/python -m integrations
	$(VENV)-integrations/bin/python -m integrations --page

docs: $(VENV)-docs/installed
	$(VENV)-docs/bin/python docs/blocks.py
	PATH="$(CURDIR)/$(VENV)-docs/bin:$$PATH" $(VENV)-docs/bin/sphinx-build -W --keep-going -q docs docs/_build/html

release-check: $(VENV)/installed-tests
	$(BIN)/python benchmarks/release.py

claims: $(VENV)/installed
	$(PIP) --editable ".[light]"
	$(BIN)/python -m claims run
	$(BIN)/python -m claims page

torture: $(VENV)/installed-tests
	$(BIN)/python -m benchmarks.torture $(TORTURE)
	$(BIN)/python -m benchmarks.torture --page

# A venv of its own for each. What the oldest versions are is what pyproject.toml says.
torture-versions:
	$(OLDEST_PYTHON) -m venv $(VENV)-oldest
	$(OLDEST_PYTHON) benchmarks/torture/versions.py > $(VENV)-oldest/constraints.txt
	$(subst $(BIN),$(VENV)-oldest/bin,$(PIP)) --constraint $(VENV)-oldest/constraints.txt $(FOR_VERSIONS)
	$(NEWEST_PYTHON) -m venv $(VENV)-newest
	$(subst $(BIN),$(VENV)-newest/bin,$(PIP)) --upgrade $(FOR_VERSIONS)
	for each in oldest newest; do $(VENV)-$$each/bin/python -m pytest -W default $(VERSION_TESTS) || exit 1; done

FOR_VERSIONS := --editable ".[plots]" "pytest>=9" beartype jaxtyping hypothesis scipy
VERSION_TESTS := $(addprefix tests/test_,$(addsuffix .py,balance faults kept_run latent objectives oracle pipeline report results sampling vae))

lint: format rules layers types

format: $(VENV)/installed-tests
	$(BIN)/ruff format --check .

rules: $(VENV)/installed-tests
	$(BIN)/ruff check .

layers: $(VENV)/installed-tests
	$(BIN)/lint-imports

types: $(VENV)/installed-tests
	$(BIN)/basedpyright

clean:
	rm -rf $(VENV) $(VENV)-integrations $(VENV)-docs $(VENV)-oldest $(VENV)-newest docs/_build docs/jupyter_execute runs/digits

$(VENV)/bin/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "poise needs Python 3.11 or newer; set PYTHON=...")'
	$(PYTHON) -m venv $(VENV)

$(VENV)/installed: pyproject.toml | $(VENV)/bin/python
	$(PIP) $(TORCH)
	$(PIP) --editable .
	touch $@

# A venv of its own: these libraries are large, and nothing else needs them.
$(VENV)-integrations/installed: integrations/requirements.txt pyproject.toml
	$(PYTHON) -m venv $(VENV)-integrations
	$(subst $(BIN),$(VENV)-integrations/bin,$(PIP)) $(TORCH)
	$(subst $(BIN),$(VENV)-integrations/bin,$(PIP)) --editable . --requirement integrations/requirements.txt
	touch $@

# A venv of its own: the site needs dozens of packages that tests do not.
$(VENV)-docs/installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)-docs
	$(subst $(BIN),$(VENV)-docs/bin,$(PIP)) $(TORCH)
	$(subst $(BIN),$(VENV)-docs/bin,$(PIP)) --editable ".[docs]"
	touch $@

$(VENV)/installed-tests: pyproject.toml | $(VENV)/bin/python
	$(PIP) $(TORCH)
	$(PIP) --editable ".[test]"
	$(PIP) --no-deps "torch-fidelity>=0.4" tqdm  # to compare with; its torchvision would bring gigabytes and is not used
	touch $(VENV)/installed $@
