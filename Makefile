# The two commands of the README are `make train` and `make test`; both start from nothing, and again is quick.
.DEFAULT_GOAL := help
.PHONY: help setup train test check format test-long test-next test-cluster test-nemo-run bench docs clean

VENV := .venv
VENV_NEXT := .venv-next
VENV_BENCH := .venv-bench
VENV_DOCS := .venv-docs
VENV_NEMO := .venv-nemo
RECIPE := examples/recipes/arithmetic_cpu.yaml
BENCH := all --quick
BIN := $(VENV)/bin

# A file of tests at a time on each core, at most four: some hold an engine in a gigabyte of memory.
PYTEST := -m pytest --durations=10 --numprocesses=logical --maxprocesses=4 --dist=loadfile
# Tests reach no network, and one thread a process: several ranks share few cores.
TEST_ENV := OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1 TRANSFORMERS_OFFLINE=1 HF_DATASETS_OFFLINE=1 \
	VLLM_NO_USAGE_STATS=1 DO_NOT_TRACK=1

help: ## what there is to make
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-13s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: ## .venv with the pinned packages and this project (PYTHON=, INSTALLER=pip)
	@echo "[setup] checking $(VENV)"
	@environment/install.sh $(VENV) set-a

train: setup ## train the shipped tiny model on CPU with the arithmetic recipe
	@echo "[train] $(BIN)/klrl train $(RECIPE)"
	@$(BIN)/klrl train $(RECIPE)

test: check ## set-up, static checks, and every test that needs no GPU
	@echo "[test] pytest"
	@$(TEST_ENV) $(BIN)/python $(PYTEST)

check: setup ## format, lint, types and import layers
	@echo "[check] ruff format"
	@$(BIN)/ruff format --check --quiet . || { echo "[check] run: make format" >&2; exit 1; }
	@echo "[check] ruff check"
	@$(BIN)/ruff check --quiet .
	@echo "[check] pyrefly"
	@$(BIN)/pyrefly check --output-format=min-text --summary=none
	@echo "[check] import layers"
	@$(BIN)/lint-imports --no-logo

format: setup ## rewrite the sources as ruff formats them
	@$(BIN)/ruff format .
	@$(BIN)/ruff check --select I --fix .

test-long: setup ## the tests that take longest: probes and layouts of the default recipe, every engine layout
	@echo "[test-long] pytest -m long"
	@$(TEST_ENV) $(BIN)/python $(PYTEST) -m long

test-next: ## the end-to-end tests but the longest on the next versions (.venv-next, set B)
	@echo "[test-next] checking $(VENV_NEXT)"
	@environment/install.sh $(VENV_NEXT) set-b
	@echo "[test-next] pytest tests/e2e"
	@$(TEST_ENV) $(VENV_NEXT)/bin/python $(PYTEST) tests/e2e

test-cluster: setup ## jobs on a real SLURM, nodes in namespaces of this machine (root; installs Debian's packages)
	@tests/cluster/install.sh
	@echo "[test-cluster] pytest -m cluster"
	@$(TEST_ENV) $(BIN)/python -m pytest --durations=10 -m cluster tests/cluster

test-nemo-run: setup ## NeMo-Run's executors, here and on a real SLURM (.venv-nemo, 0.5 GB)
	@tests/cluster/install.sh
	@echo "[test-nemo-run] checking $(VENV_NEMO)"
	@tests/cluster/nemo_venv.sh $(VENV_NEMO) $(VENV)
	@echo "[test-nemo-run] pytest tests/cluster/test_nemo_run.py"
	@PYTHONPATH=. $(TEST_ENV) $(VENV_NEMO)/bin/python -m pytest --durations=10 -m cluster tests/cluster/test_nemo_run.py

bench: ## compare with other libraries in their environment (BENCH="loss_logits --json FILE")
	@echo "[bench] checking $(VENV_BENCH)"
	@environment/install.sh $(VENV_BENCH) bench
	@echo "[bench] benchmarks/run.py $(BENCH)"
	@$(VENV_BENCH)/bin/python benchmarks/run.py $(BENCH)

docs: setup ## the pages of docs/ as a site in build/site, those made from code made anew
	@echo "[docs] checking $(VENV_DOCS)"
	@environment/install.sh $(VENV_DOCS) docs
	@echo "[docs] docs/make_pages.py, mkdocs build --strict"
	@$(BIN)/python docs/make_pages.py
	@NO_MKDOCS_2_WARNING=1 $(VENV_DOCS)/bin/mkdocs build --strict --quiet

clean: ## remove environments, caches and build output; runs stay
	@echo "[clean] environments, caches, build output"
	@rm -rf $(VENV) $(VENV).lock $(VENV_NEXT) $(VENV_NEXT).lock $(VENV_BENCH) $(VENV_BENCH).lock $(VENV_DOCS) $(VENV_DOCS).lock \
		$(VENV_NEMO) build dist \
		megatron_klrl.egg-info .pytest_cache .ruff_cache .import_linter_cache
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +
