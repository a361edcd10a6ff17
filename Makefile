PYTHON ?= python3
VENV ?= .venv

BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
# -qq: errors only.
PIP_INSTALL := $(BIN)/python -m pip install -qq --disable-pip-version-check

.PHONY: demo docs test test-first test-rest lint
.DELETE_ON_ERROR:

demo: $(INSTALLED)
	$(BIN)/python train.py fit --config photos.yaml

# Two parts at once, each on one thread and of about the same length.
FIRST_PART := tests/circuits tests/test_configs.py tests/callbacks

test: $(INSTALLED)
	$(MAKE) --jobs=2 --keep-going test-first test-rest

test-first: $(INSTALLED)
	$(BIN)/python -m pytest $(FIRST_PART)

test-rest: $(INSTALLED)
	$(BIN)/python -m pytest $(FIRST_PART:%=--ignore=%)

# What mkdocs says of its own future is no news of ours.
MKDOCS := NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs

docs: $(INSTALLED)
	$(MKDOCS) build --strict
	@echo "open site/index.html, or see it as it changes: $(BIN)/mkdocs serve"

lint: $(INSTALLED)
	$(MKDOCS) build --strict --quiet --site-dir $(VENV)/site
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo

# Made again when the pins or the package's metadata change, not otherwise.
$(INSTALLED): requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("requirements.lock needs Python 3.11 or newer, $(PYTHON) is %d.%d: make PYTHON=/path/to/python3.11" % sys.version_info[:2])'
	$(PYTHON) -m venv $(VENV)
	$(PIP_INSTALL) --requirement requirements.lock
	$(PIP_INSTALL) --no-build-isolation --no-deps --editable .
	@touch $@
