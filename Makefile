# Each target is a command that a person could type; docker/setup_venv.sh does the set-up they share.
.DEFAULT_GOAL := help
.PHONY: help setup smoke test check format image lock schema plan-table clean

PYTHON :=
JOB := jobs/smoke.yaml
STAGE := cpu
BASE := python:3.12-slim-bookworm
ARGS :=
LOCK := .venv/bin/uv pip compile --quiet --python-version 3.12 --generate-hashes --no-header \
	--overrides docker/overrides.txt

help: ## List the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: ## Make .venv from the lock (every target does); PYTHON=/path/to/python3.12
	@docker/setup_venv.sh $(PYTHON)

smoke: setup ## Run a GRPO job here, without Docker; JOB=jobs/smoke.yaml ARGS="--set steps=3"
	.venv/bin/headroom run $(JOB) --where process $(ARGS)

test: check ## Check, then run all tests; ARGS="-k reward"
	.venv/bin/python -m pytest $(ARGS)

check: setup ## Lint, format, types, imports, spelling, YAML, Dockerfile, shell
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/pyright
	.venv/bin/lint-imports
	.venv/bin/codespell
	.venv/bin/yamllint --strict .
	.venv/bin/hadolint docker/Dockerfile
	.venv/bin/shellcheck docker/*.sh tests/*.sh .ci/run

format: setup ## Format the code and mend what ruff can
	.venv/bin/ruff format .
	.venv/bin/ruff check --fix .

image: ## Build the container image headroom:STAGE; STAGE=cpu|tpu BASE=python:3.12-slim-bookworm
	docker/build_image.sh $(STAGE) $(BASE)

lock: setup ## Make the locks in docker/ again; ARGS=--upgrade takes newer versions
	$(LOCK) docker/dev.in -o docker/dev.txt $(ARGS)
	$(LOCK) docker/trainer.in -o docker/trainer.txt -c docker/dev.txt
	$(LOCK) docker/tpu.in -o docker/tpu.txt -c docker/dev.txt
	$(LOCK) docker/runner.in -o docker/runner.txt -c docker/dev.txt
	$(LOCK) docker/build.in -o docker/build.txt -c docker/dev.txt

schema: setup ## Make jobs/job.schema.json from the job model
	.venv/bin/python -m jobs.schema

plan-table: setup ## Make docs/plan.md's table, predicted against hardware, again (compiles: minutes)
	.venv/bin/python -m benchmarks.plan_table

clean: ## Remove what set-up and tests made (.venv, .cache); runs/ and logs/ stay
	tests/docker_engine.sh stop .cache/engine
	rm -rf .venv .cache .pytest_cache .ruff_cache .hypothesis .import_linter_cache .coverage
