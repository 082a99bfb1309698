# make demo: the main jobs on the bundled model and data      make test: everything that must hold
# make real, make pairs: quality on a real pre-trained model (slow)      make bench: memory against pool size

PYTHON ?= python3.11
BIN := .venv/bin
STAMP := .venv/installed

.PHONY: demo test real pairs bench clean

$(STAMP): pyproject.toml constraints.txt
	command -v $(PYTHON) >/dev/null && $(PYTHON) -m venv .venv || python3 -m venv .venv
	$(BIN)/pip install --quiet --constraint constraints.txt torch
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $(STAMP)

demo: $(STAMP)
	$(BIN)/prism demo

test: $(STAMP)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/mkdocs build --quiet --strict
	$(BIN)/pytest

real: $(STAMP)
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev,real]'
	$(BIN)/python benchmarks/real.py --data $(or $(DATA),../shared/data)

pairs: $(STAMP)
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev,real]'
	$(BIN)/python benchmarks/pairs.py --data $(or $(DATA),../shared/data)

bench: $(STAMP)
	$(BIN)/python benchmarks/memory.py

clean:
	rm -rf .venv site prism-demo
