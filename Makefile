# make demo: the main jobs on the bundled model and data      make test: everything that must hold
# make style: how the source measures up against what is wanted
# make real, make pairs, make curvature: rankings of a real pre-trained model (slow)
# make quality: does the choice help? training on it and on every baseline's choice, a real model and a tiny one (hours)
# make repair: which direction finds the bad rows of a pool, beside probes and other baselines, a real model (an hour)
# make paper: a fine-tune gone wrong, repaired from its answers before and after, as in the paper, a real model (hours)
# make coverage: a choice that serves groups of pairs against the highest scores, a real model and tiny ones (hours)
# make size: memory beyond a model's weights, and what a low rank loses
# make attempts: what was tried where the choice falls short (hours)
# make cascade: how many rows must be scored exactly until most of the best are found?
# make lds: does a score foretell retraining, ours and those of kronfluence and bergson?      make peers: same scores?
# make reselect: choosing again during training against choosing once
# make fuzz: many more odd rows and files than make test tries, then ten minutes of random bytes
# make gpu: engines, batches, few bits and two GPUs on a card (eight minutes; not run so far)
# make scale: thirty kills, odd input, endless lines, a choice among a hundred million rows (two hours, 30 GB of disk)
# make bench: memory against pool size, and what a score costs (on a quiet machine; make bench-cost: beside bergson and
# kronfluence, and whether plans are right and how cost grows)

PYTHON ?= python3.11
BIN := .venv/bin
STAMP := .venv/installed

.PHONY: demo test style fuzz real pairs repair paper quality coverage size attempts curvature cascade reselect lds peers bench bench-cost gpu scale clean

$(STAMP): pyproject.toml constraints.txt
	@echo "installing into .venv/: 2.5 GB, some minutes"
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
	$(BIN)/lint-imports --no-logo
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict
	$(BIN)/pytest --numprocesses logical --maxprocesses 4 --dist loadfile --no-loadscope-reorder

style: $(STAMP)
	$(BIN)/python tests/style.py

fuzz: $(STAMP)
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev,fuzz]'
	FUZZ=10000 $(BIN)/pytest tests/test_fuzz.py
	$(BIN)/python tests/fuzz.py -max_total_time=600

real pairs repair paper quality coverage size attempts curvature cascade: $(STAMP)
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev,real]'
	$(BIN)/python benchmarks/$@.py --data $(or $(DATA),$(error give DATA=folder of the public data: CONTRIBUTING.md names its files))

PEERS := benchmarks/work/peers

$(PEERS)/installed: constraints.txt Makefile | $(STAMP)
	test -d $(PEERS) || $(BIN)/python -m venv $(PEERS)
	$(PEERS)/bin/pip install --quiet --constraint constraints.txt torch
	$(PEERS)/bin/pip install --quiet --constraint constraints.txt bergson==2.5.1 kronfluence==1.0.1 dattri==0.3.0 dattri-llm==0.1.0
	$(PEERS)/bin/pip uninstall --quiet --yes torchvision torchaudio
	touch $@

lds: $(STAMP) $(PEERS)/installed
	$(BIN)/python benchmarks/lds.py

peers: $(STAMP) $(PEERS)/installed
	$(BIN)/python benchmarks/kronfluence_agreement.py
	$(BIN)/python benchmarks/peers_side_by_side.py

reselect: $(STAMP)
	$(BIN)/python benchmarks/reselect.py

bench: $(STAMP) bench-cost
	$(BIN)/python benchmarks/memory.py
	$(BIN)/python benchmarks/threads.py

bench-cost: $(STAMP) $(PEERS)/installed
	$(BIN)/python benchmarks/cost.py
	$(BIN)/python benchmarks/cost_pairs.py
	$(BIN)/python benchmarks/cost_runs.py
	$(BIN)/python benchmarks/plans.py
	$(BIN)/python benchmarks/growth.py

gpu: $(STAMP)
	$(BIN)/python benchmarks/gpu.py

scale: $(STAMP)
	$(BIN)/python benchmarks/scale.py

clean:
	rm -rf .venv site prism-demo
