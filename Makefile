# make demo and make test each set up .venv when it is missing; they need Python 3.10+ and make only.
PYTHON ?= python3
BIN := .venv/bin
export PYTHONHASHSEED := 0

.PHONY: demo test quick lint format notebooks docs bench study clean

.venv/installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt "torch==2.13.0"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev]"
	touch $@

demo: .venv/installed
	$(BIN)/bkdlens demo

test: .venv/installed
	$(BIN)/python -m pytest

# What needs no browser, notebook, documentation or training, and takes a second at most; in two processes.
quick: .venv/installed
	$(BIN)/python -m pytest --quick -n 2 --dist loadfile --ignore=tests/inject --ignore=tests/notebook \
		--ignore=tests/project --ignore=tests/report/test_browser.py

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: .venv/installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# About half an hour on one core; `python -m benchmarks.gpu_7b` is for a GPU.
bench: .venv/benchmarks
	$(BIN)/python -m benchmarks.atp_study
	$(BIN)/python -m benchmarks

.venv/benchmarks: .venv/installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[bench]"
	touch $@

# Plants both embedded models' backdoors three ways, from two seeds, and compares them; it goes on where it
# stopped. About an hour on one core; the figures need a Chrome or Chromium.
study: .venv/installed
	$(BIN)/python -m studies.injection

notebooks: .venv/installed
	$(BIN)/python notebooks/execute.py

# The site, in build/site; a warning is an error. It needs no network, to be made or to be read.
docs: .venv/installed
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict

clean:
	rm -rf .venv demo build/site
