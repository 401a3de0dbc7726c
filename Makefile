# Every target sets up what it needs: python3 (3.11 or newer) with its venv module is enough.

PYTHON ?= python3
WORKERS ?= 2
BIN := .venv/bin

# Two busy processes whose OpenMP threads spin are seven times slower than two that sleep (docs/log.md).
export OMP_WAIT_POLICY := PASSIVE
export GOMP_SPINCOUNT := 3000
# What is imported is compiled once, not by every process that a test starts (a quarter of its start), and nothing else is.
export PYTHONDONTWRITEBYTECODE :=
# Nothing here needs the hub; without this a missing file is retried for half a minute.
export HF_HUB_OFFLINE := 1

# A machine with a GPU has its own torch; nothing is installed for it.
GPU_PYTHON = $(shell $(PYTHON) -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' 2>/dev/null && echo $(PYTHON) || ls $(BIN)/python 2>/dev/null || echo $(PYTHON))

.PHONY: help setup demo check format slow kill-test matrix upgrade docs report real people pairwise reuse choices record gpu clean

help:  ## this list
	@awk -F ':.*## ' '/^[a-z -]+:.*## / {printf "make %-9s %s\n", $$1, $$2}' Makefile

setup: .venv/installed  ## .venv with everything; runs again only when pyproject.toml or constraints.txt changed

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --disable-pip-version-check --no-compile -e ".[dev,speech,image,train,lora,data,serve]" -c constraints.txt
	touch $@

demo: setup  ## align a new zip on the built-in corpus and report to runs/demo
	$(BIN)/zipper demo

check: setup  ## the one gate: format, lint, types, tests
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy -n $(WORKERS)
	$(BIN)/python -m pytest -q -n $(WORKERS) --dist worksteal

format: setup  ## rewrite the files as the gate wants them
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

slow: setup  ## the tests that take minutes
	$(BIN)/python -m pytest -m slow

kill-test: setup  ## 100 SIGKILLs of a run of one process, half inside saves; minutes (tools/kill_test.py --ranks 2: of two)
	$(BIN)/python tools/kill_test.py

matrix: setup  ## tests on the lowest and newest versions and every transformers that was tried (ROWS=lowest, TESTS=tests: all)
	$(BIN)/python tools/versions.py matrix $(ROWS) --workers $(WORKERS) $(if $(TESTS),--tests "$(TESTS)")

upgrade: setup  ## constraints.txt from today's versions, then the gate; says what moved (TORCH=2.14.1 moves torch too)
	$(BIN)/python tools/versions.py upgrade $(if $(TORCH),--torch $(TORCH))

docs: setup  ## write docs/cli.md from the commands themselves, docs/towers.md by trying every causal LM
	$(BIN)/python -c "import pathlib, zipper.cli; pathlib.Path('docs/cli.md').write_text(zipper.cli.markdown(), encoding='utf-8')"
	$(BIN)/python -c "import pathlib, zipper.towers.families as f; pathlib.Path('docs/towers.md').write_text(f.markdown(f.survey()), encoding='utf-8')"

report: setup  ## docs/results.md, and beside it results.html with figures, from the recorded run of `zipper reproduce`
	$(BIN)/zipper reproduce --report $(lastword $(sort $(wildcard benchmarks/results/reproduce_cpu_*.json))) --output docs

real: setup  ## zips of real data in DATA beside what they are compared with; hours (SHARE=0.2, SETS="motion digits"), then docs/modalities.md
	$(BIN)/python tools/modalities.py $(SETS) --data $(DATA) $(if $(SHARE),--share $(SHARE))

people pairwise reuse choices: setup  ## studies on people's words and digits, DATA of the originals (people: ENCODER too); an hour each
	$(BIN)/python tools/studies.py $@ --data $(DATA) $(if $(ENCODER),--encoder $(ENCODER)) $(if $(SHARE),--share $(SHARE))

record: setup  ## what `zipper bench` compares a machine with, cut from benchmarks/results
	$(BIN)/python -m zipper_lab.bench.summary $(sort $(wildcard benchmarks/results/*_30m_fp32_2cpu_*.json benchmarks/results/speech_*.json)) > src/zipper_lab/bench/recorded.json

gpu:  ## ten minutes of a GPU, to benchmarks/results or OUT (PYTHON with torch and CUDA, else .venv; SIZE=tiny, ONLY=decode, LIMIT=300)
	PYTHONPATH=src $(GPU_PYTHON) tools/gpu.py

clean:  ## remove the environment and the tools' caches; runs/ and .cache/ stay
	rm -rf .venv build dist .pytest_cache .ruff_cache .mypy_cache .hypothesis
