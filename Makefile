# Each target is a command that a person could type; docker/setup_venv.sh does the set-up they share.
.DEFAULT_GOAL := help
.PHONY: help setup smoke sweep sweep-demo test drill test-deploy check audit format image deploy logs lock schema plan-table clean

PYTHON :=
JOB := jobs/smoke.yaml
SWEEP := jobs/oom_sweep.yaml
DEMO := jobs/demo_sweep.yaml
DEMO_RUNS := --only sop_smoke --only prompts_per_step-4_max_completion_tokens-1024 \
	--only prompts_per_step-4_max_completion_tokens-2048 --only prompts_per_step-8_max_completion_tokens-1024
STAGE := cpu
BASE := python:3.12-slim-bookworm
ARGS :=
# A host, a group or a pattern of the inventory (docs/deploy.md); empty: this machine.
HOST :=
INVENTORY := inventory/hosts.yaml
PLAY = cd ansible && ../.venv/bin/ansible-playbook -i $(INVENTORY) --limit '$(HOST)'
LOCK := .venv/bin/uv pip compile --quiet --python-version 3.12 --generate-hashes --no-header \
	--overrides docker/overrides.txt

needs-host = $(if $(HOST),,$(error HOST is empty: make $@ HOST=my-tpu-w0, a host of ansible/$(INVENTORY)))

help: ## List the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-11s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: ## Make .venv from the lock (every target does); PYTHON=/path/to/python3.12
	@docker/setup_venv.sh $(PYTHON)

smoke: setup ## Run a GRPO job here, without Docker, or on HOST=...; JOB=jobs/smoke.yaml ARGS="--set steps=3"
	$(if $(HOST),$(PLAY) smoke.yml $(if $(filter file,$(origin JOB)),,-e 'run_job_file=$(JOB)') $(ARGS),.venv/bin/headroom run $(JOB) --where process $(ARGS))

sweep: setup ## Plan SWEEP=jobs/oom_sweep.yaml here, run it on HOST=..., each host its share; a page of it
	$(needs-host)
	$(PLAY) oom_sweep.yml -e 'sweep_file=$(SWEEP)' $(ARGS)

sweep-demo: setup ## Plan 20 jobs of the 7B for a v4-8 (compiles: minutes), run four on the CPU, make the page
	.venv/bin/headroom sweep plan $(DEMO)
	.venv/bin/headroom sweep run $(DEMO) --no-plan --where process $(DEMO_RUNS)
	.venv/bin/headroom sweep report $(DEMO) --html sweeps/demo_sweep.html

test: check ## Check, then run all tests; ARGS="-k reward"
	.venv/bin/python -m pytest -n 2 --dist loadfile $(ARGS)

drill: setup ## Break things under real runs and print what came of it (docs/reliability.md); ARGS=soak
	.venv/bin/python -m tests.drills $(ARGS)

test-deploy: setup ## Deploy to two stand-in VMs, run on them, break and mend them (part of test)
	.venv/bin/python -m pytest tests/test_deploy_integration.py $(ARGS)

check: setup ## Lint, format, types, imports, spelling, YAML, Dockerfile, shell
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/pyright
	.venv/bin/lint-imports
	.venv/bin/codespell
	.venv/bin/yamllint --strict .
	.venv/bin/hadolint docker/Dockerfile
	.venv/bin/shellcheck docker/*.sh tests/*.sh .ci/run
	@.venv/bin/python docker/audit.py

audit: setup ## Tell which locked packages have known vulnerabilities (part of check; never fails)
	.venv/bin/python docker/audit.py

format: setup ## Format the code and mend what ruff can
	.venv/bin/ruff format .
	.venv/bin/ruff check --fix .

image: ## Build the container image headroom:STAGE; STAGE=cpu|tpu BASE=python:3.12-slim-bookworm
	docker/build_image.sh $(STAGE) $(BASE)

deploy: setup ## Deploy this commit to HOST=... of INVENTORY=inventory/hosts.yaml; ARGS="--check --diff"
	$(needs-host)
	$(PLAY) deploy.yml $(ARGS)

logs: setup ## Fetch the newest job of HOST=..., its log and run directory, into fetched/
	$(needs-host)
	$(PLAY) fetch.yml $(ARGS)

lock: setup ## Make the locks in docker/ again; ARGS=--upgrade takes newer versions
	$(LOCK) docker/dev.in -o docker/dev.txt $(ARGS)
	$(LOCK) docker/trainer.in -o docker/trainer.txt -c docker/dev.txt
	$(LOCK) docker/tpu.in -o docker/tpu.txt -c docker/dev.txt
	$(LOCK) docker/runner.in -o docker/runner.txt -c docker/dev.txt
	$(LOCK) docker/build.in -o docker/build.txt -c docker/dev.txt
	$(LOCK) docker/conda.in -o docker/conda.txt -c docker/dev.txt

schema: setup ## Make jobs/job.schema.json and jobs/sweep.schema.json from the models
	.venv/bin/python -m jobs.schema
	.venv/bin/python -m runner.sweep_schema

plan-table: setup ## Make docs/plan.md's table, predicted against hardware, again (compiles: minutes)
	.venv/bin/python -m benchmarks.plan_table

clean: ## Remove what set-up and tests made (.venv, .cache); runs/ and logs/ stay
	tests/docker_engine.sh stop .cache/engine
	tests/docker_engine.sh stop .cache/drills
	rm -rf .venv .cache .pytest_cache .ruff_cache .hypothesis .import_linter_cache .coverage
