# Every target sets up what it needs; PYTHON names the interpreter to build the environment with.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
MERGEKIT := .venv-mergekit

.PHONY: help setup demo encoder pairs test test-slow test-mergekit check bench bench-kernels bench-merge mixed-batch clean

help: ## what there is
	@grep -E '^[a-z-]+:.*##' Makefile | sed 's/:.*## /\t/' | expand -t 16

setup: $(VENV)/.installed ## an environment with everything that is tested

$(VENV)/.installed: setup.cfg constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade "pip>=24"
	$(BIN)/python -m pip install --quiet -c constraints.txt torch numpy
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[dev]"
	touch $@

demo: setup ## the main job, shown on two real fine-tunes; results in demo-out/
	$(BIN)/python examples/demo.py --out demo-out

encoder: setup ## the same with all-MiniLM-L6-v2 on SST-2; ARGS="--data DIR --finetuned DIR"
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[encoder]"
	$(BIN)/python examples/encoder_sst2.py $(ARGS)

pairs: setup ## MiniLM's SST-2, MRPC and CoLA merged in pairs by every method; ARGS as encoder
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[encoder]"
	$(BIN)/python examples/merge_glue_pairs.py $(ARGS)

test: setup check ## everything in tests/
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests -n auto --dist loadscope

test-slow: setup ## what takes minutes
	$(BIN)/python -m pytest tests -m slow

test-mergekit: setup $(if $(MERGEKIT_PYTHON),,$(MERGEKIT)/.installed) ## merges compared with mergekit's
	$(BIN)/python -m pytest tests/mergekit -m mergekit

# mergekit is in an environment of its own; MERGEKIT_PYTHON names the interpreter of another.
$(MERGEKIT)/.installed: constraints.txt
	$(PYTHON) -m venv $(MERGEKIT)
	$(MERGEKIT)/bin/python -m pip install --quiet --upgrade "pip>=24"
	$(MERGEKIT)/bin/python -m pip install --quiet -c constraints.txt torch
	$(MERGEKIT)/bin/python -m pip install --quiet -c constraints.txt "mergekit==0.1.5"
	touch $@

check: setup ## formatting, lint, types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: setup ## the README's table of sizes and speeds
	$(BIN)/python benchmarks/llama_half_billion.py

mixed-batch: setup ## one batch under eight adapters, beside eight LoRAs
	$(BIN)/python benchmarks/mixed_batch.py

bench-kernels: setup ## products from packed deltas, on the GPU if there is one; ARGS="--quick"
	$(BIN)/python benchmarks/kernels.py $(ARGS)

bench-merge: setup $(MERGEKIT)/.installed ## merges beside mergekit's; a quarter of an hour
	$(BIN)/python benchmarks/merge_against_mergekit.py --mergekit $(MERGEKIT)/bin/mergekit-yaml

clean: ## remove the environment and what runs left
	rm -rf $(VENV) $(MERGEKIT) build dist demo-out *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
