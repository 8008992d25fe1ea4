# make pretrain and make test set everything up by themselves; `make help` lists the rest.

VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
DATA := data/quickstart
RUN := runs/quickstart

# Python to make .venv with (and to run gpu-check with), if not the first suitable one on the PATH.
PYTHON ?=
# Further flags, e.g. make pretrain ARGS="--train-iters 20", make test ARGS="tests/zero -x".
ARGS ?=

.DELETE_ON_ERROR:
.PHONY: help install pretrain test test-all lint bench gpu-check clean

help:
	@echo 'make pretrain    train a small model on real text (about 5 minutes on 2 CPU cores), into $(RUN)'
	@echo 'make test        the tests (about 15 minutes on 2 CPU cores)'
	@echo 'make test-all    the tests, the slow ones too (8 ranks)'
	@echo 'make lint        style, types, layers'
	@echo 'make bench       the measurements behind the claims, on this machine'
	@echo 'make gpu-check   GPU tests and benchmarks, with the Python of the environment (PYTHON=python3)'
	@echo 'make install     set up .venv alone'
	@echo 'make clean       remove what make built: caches and $(DATA), not .venv and not runs/'

install: $(INSTALLED)
	@echo 'megazero is set up in $(VENV)'

$(INSTALLED): pyproject.toml constraints.txt
	@test -x $(BIN)/python || for python in $(PYTHON) python3 python3.14 python3.13 python3.12 python3.11; do \
		if $$python -c 'import sys, ensurepip, venv; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then \
			echo "Setting up $(VENV) with $$($$python --version); the first time takes some minutes."; \
			exec $$python -m venv $(VENV); \
		fi; \
	done; \
	test -x $(BIN)/python || { \
		echo 'megazero needs Python 3.11 or newer with its venv module. Install one (on Debian: python3-venv too), or name it: make install PYTHON=/path/to/python3'; \
		exit 1; }
	$(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt -e '.[test]'
	@touch $@

# ---- the quickstart: corpus -> tokenizer -> .bin/.idx -> model. Each file is made once; `make clean` starts over.

$(DATA)/corpus.jsonl: | $(INSTALLED)
	@mkdir -p $(DATA)
	$(BIN)/python tools/collect_corpus.py --output $@

$(DATA)/tokenizer/tokenizer.json: $(DATA)/corpus.jsonl
	$(BIN)/python tools/train_tokenizer.py --input $< --vocab-size 4096 --output $(DATA)/tokenizer
	@touch $@

$(DATA)/stdlib_text_document.idx: $(DATA)/corpus.jsonl $(DATA)/tokenizer/tokenizer.json
	$(BIN)/python tools/preprocess_data.py --input $< --json-keys text --tokenizer-type HuggingFaceTokenizer \
		--tokenizer-model $(DATA)/tokenizer --output-prefix $(DATA)/stdlib --workers 2 --append-eod
	@touch $@

# Ranks (2 on the CPU, else one a GPU, up to 2) and CPU threads for each; without the latter torchrun warns.
RANKS_AND_THREADS = $$($(BIN)/python -c 'import torch; from megazero.base.launch import cpu_threads_for; \
	ranks = min(2, torch.cuda.device_count()) or 2; print(ranks, cpu_threads_for(ranks))')

pretrain: $(DATA)/stdlib_text_document.idx
	@set -- $(RANKS_AND_THREADS); set -x; OMP_NUM_THREADS=$$2 $(BIN)/torchrun --standalone --nproc-per-node $$1 \
		pretrain_gpt.py --recipe recipes/quickstart.yaml --output-dir $(RUN) $(ARGS)

# ---- checks

test: $(INSTALLED)
	$(BIN)/python -m pytest -m 'not gpu and not slow' $(ARGS)

test-all: $(INSTALLED)
	$(BIN)/python -m pytest -m 'not gpu' $(ARGS)

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: $(INSTALLED)
	@set -e; for script in benchmarks/*.py; do echo "== $$script"; $(BIN)/python $$script; done

gpu-check: export PYTHONPATH := $(CURDIR)
gpu-check:
	@$(or $(PYTHON),python3) -c 'import sys, torch; torch.cuda.is_available() or sys.exit("gpu-check needs a GPU; torch sees none")'
	$(or $(PYTHON),python3) -m pytest -m gpu $(ARGS)
	@set -e; for script in benchmarks/*.py; do echo "== $$script"; $(or $(PYTHON),python3) $$script; done

clean:
	rm -rf build *.egg-info .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis $(DATA)
	find megazero tests tools benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +
