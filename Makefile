# Set-up, checks and the demo. Needs Python 3.10-3.13, git and make; README.md has the same for Windows.

PYTHON ?= python3
VENV ?= .venv
CONSTRAINTS ?= constraints.txt
# Processes that share the tests; each uses one core.
TEST_JOBS ?= 2
RUN := $(VENV)/bin/python

.PHONY: demo test test-fast test-oldest test-gpu lint format bench model clean setup

demo: setup
	$(RUN) -m engine demo

test: lint
	$(RUN) -m pytest -m "not gpu" -n $(TEST_JOBS) --dist loadfile

test-fast: setup
	$(RUN) -m pytest -m "not gpu and not slow" -n $(TEST_JOBS) --dist loadfile

test-gpu: setup
	$(RUN) -m pytest -m gpu

# The older of the two library stacks that ComfyUI users have.
test-oldest:
	$(MAKE) VENV=.venv-oldest CONSTRAINTS=constraints-oldest.txt setup
	.venv-oldest/bin/python -m pytest -m "not gpu" -n $(TEST_JOBS) --dist loadfile

lint: setup
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m pyright

format: setup
	$(RUN) -m ruff check --fix .
	$(RUN) -m ruff format .

bench: setup
	$(RUN) -m benchmarks.train_step

# Trains the embedded tiny model anew (about half an hour on 2 cores).
model: setup
	$(RUN) -m engine.demo.make

clean:
	rm -rf .venv .venv-oldest demo_output .pytest_cache .ruff_cache

setup: $(VENV)/.installed

$(VENV)/.installed: requirements.txt requirements-dev.txt $(CONSTRAINTS)
	@$(PYTHON) -c "import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 13))" || \
		{ echo "$(PYTHON) is not Python 3.10-3.13; run: make PYTHON=/path/to/python3.12"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --upgrade pip
	$(RUN) -m pip install --quiet -r requirements-dev.txt -c $(CONSTRAINTS)
	@touch $@
