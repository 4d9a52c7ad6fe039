# `make help` says what each target does.

# Any Python 3.9 or newer that can make virtual environments; the set-up finds the 3.12 that the project runs on.
PYTHON ?= python3
RECIPE ?= recipes/tiny_moe.yaml
# More arguments: `make train ARGS="trainer.max_steps=3"`, `make test ARGS="-k objective"`.
ARGS ?=
# Seeds of `make train-agent`.
SEEDS ?= 0 1 2

BIN := .venv/bin
PYTEST := $(BIN)/pytest
# Where a suite needs more than this machine is sure to have, it has a target of its own.
OWN_TARGET := tests/gpu tests/slurm

# Compiled modules are kept: without them every process of a run compiles torch and vLLM again, some 20 s each.
export PYTHONDONTWRITEBYTECODE =

.DEFAULT_GOAL := help
.PHONY: help setup train train-agent study test lint test-slurm parity long-context test-faults test-faults-policy fuzz plan-table test-gpu test-gpu-rollout first-contact bench cuda-dry requirements clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-18s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: ## make .venv with the pinned packages (CUDA stack where there is a GPU; GSPO_STACK=cpu|cuda decides)
	@$(PYTHON) tools/setup_environment.py

train: setup ## run the main job, recipes/tiny_moe.yaml (RECIPE= and ARGS= change it)
	GSPO_VENV=.venv launch/local.sh $(RECIPE) $(ARGS)

train-agent: setup ## train on an agent with a tool, through the OpenAI-compatible endpoint, seeds 0 to 2 (SEEDS= chooses)
	for seed in $(SEEDS); do \
	  GSPO_VENV=.venv launch/local.sh recipes/tiny_agent.yaml run.seed=$$seed run.directory=runs/tiny_agent/seed$$seed $(ARGS) || exit; \
	done
	$(BIN)/python tools/record_result.py tools/results/train_agent.json $(SEEDS:%=runs/tiny_agent/seed%)

study: setup ## the study of GSPO's claims: every cell of recipes/study that is missing, then its tables (hours; resumable)
	$(BIN)/python tools/study.py $(ARGS)
	$(BIN)/python tools/study_tables.py

test: lint ## lint, then every test that requires neither a GPU nor SLURM
	$(PYTEST) $(addprefix --ignore=,$(OWN_TARGET)) $(ARGS)

lint: setup ## ruff and pyright
	$(BIN)/ruff check
	$(BIN)/pyright

test-slurm: setup ## the launcher on a real SLURM in network namespaces; requires root and the packages of .ci/run
	$(PYTEST) -rs tests/slurm $(ARGS)

test-faults: setup ## plant 28 faults in the objective engine, one at a time: each must turn a test red
	$(BIN)/python tools/planted_faults_objective.py

test-faults-policy: setup ## plant 19 faults in the policy, one at a time: each must turn a row of the parity table red
	$(BIN)/python tools/planted_faults_policy.py

parity: setup ## every layout of tests/parallel/layouts.py beside Hugging Face in float64, on 4 and 8 gloo ranks
	$(BIN)/python -m tests.parallel.parity $(ARGS)

long-context: setup ## answers of 100,352 tokens, sampled by vLLM and trained on under CP4, native and YaRN (an hour on 2 cores)
	$(BIN)/python tools/long_context.py $(ARGS)

fuzz: setup ## 10,000 random mutations of the recipes, 1,000 cases of every other property test (make test has a tenth)
	GSPO_FUZZ=10000 $(PYTEST) $$(grep -rl --include=*.py GSPO_FUZZ tests/unit) $(ARGS)

plan-table: setup ## plan runs that were published, beside what was measured
	$(BIN)/python tools/plan_table.py --write

test-gpu: setup ## the policy and the objective on an NVIDIA GPU
	GSPO_REQUIRE_GPU=1 $(PYTEST) tests/gpu/test_objective_gpu.py tests/gpu/test_policy_gpu.py $(ARGS)

test-gpu-rollout: setup ## trainer and vLLM taking turns on one NVIDIA GPU
	GSPO_REQUIRE_GPU=1 $(PYTEST) tests/gpu/test_rollout_gpu.py $(ARGS)

first-contact: setup ## the first hour on GPUs step by step, to tools/results/first_contact.json; without a GPU a dry run
	$(BIN)/python tools/first_contact.py $(ARGS)

bench: setup ## every benchmark that fits 2 cores in 15 minutes, to tools/results/bench.md (ARGS= names some)
	$(BIN)/python tools/bench_all.py $(ARGS)

cuda-dry: setup ## after a change of requirements/cuda.txt: the CUDA packages without a GPU, in .venv-cuda (9 GB)
	$(BIN)/python tools/cuda_dry.py $(ARGS)

# uv is the one that the set-up uses.
UV = $(or $(shell command -v uv),$(CURDIR)/.venv-tools/bin/uv)
RESOLVE = cd requirements && $(UV) pip compile --quiet --python ../$(BIN)/python --override overrides.txt \
	--no-emit-index-url --custom-compile-command "make requirements"

requirements: setup ## resolve requirements/*.in anew (ARGS=--upgrade takes newer versions)
	$(RESOLVE) $(ARGS) cpu.in -o cpu.txt
	$(RESOLVE) $(ARGS) cuda.in -o cuda.txt

clean: ## remove what the set-up made; runs/ stays
	rm -rf .venv .venv-tools .venv.lock .pytest_cache .ruff_cache .hypothesis *.egg-info
