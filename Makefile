# The command set, the same for people and for CI. `make` alone lists it.
# Each target makes `.venv` on first use: with uv where it is installed, else with venv and pip.

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
BENCH := .venv-bench
BENCH_STAMP := $(BENCH)/.installed
DEMO := .venv-demo
# Newcomers wait only for the packages that the demo needs; contributors have them already.
DEMO_STAMP := $(or $(wildcard $(STAMP)),$(DEMO)/.installed)
TOOLS := .venv-tools
TOOLS_STAMP := $(TOOLS)/.installed
DOCS := .venv-docs
DOCS_STAMP := $(DOCS)/.installed
ARGS ?=

.PHONY: help demo test test-all chaos cluster fuzz soak capacity bench bench-full bench-quick storage-report lint lint-workflows format lock docs audit release package hooks clean
.DEFAULT_GOAL := help

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-15s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: $(DEMO_STAMP) ## database, simulator, daemon and relay on this machine, live (ARGS="--duration 60 --rate 2000")
	@$(dir $<)bin/python -m ingestor demo $(ARGS)

test: $(STAMP) ## all tests, against a real PostgreSQL that is started for them (ARGS="-k coverage -x")
	@$(BIN)/pytest $(ARGS)

test-all: $(STAMP) $(TOOLS_STAMP) ## the promised versions of Python, PostgreSQL and packages, as far as they are installed (ARGS="-s lowest")
	@PATH="$(CURDIR)/$(TOOLS)/bin:$$PATH" nox $(ARGS)

chaos: $(STAMP) ## faults at random, then an audit (CHAOS_MINUTES=8, shared by the editions; CHAOS_SEED=1; ARGS="--only 'feed mute'")
	@$(BIN)/python -m tests.chaos $(ARGS)

fuzz: $(STAMP) ## hostile input to all that reads from outside (FUZZ_MINUTES=5; FUZZ_SEED=1; FUZZ_CASE=wire:7 repeats one)
	@$(BIN)/python -m tests.fuzz $(ARGS)

cluster: $(STAMP) ## faults of Patroni and NATS under load, then the audit (CLUSTER_FAULTS=30; CLUSTER_SEED=1; ARGS="--only switchover")
	@$(BIN)/python -m tests.cluster $(ARGS)

soak: $(STAMP) ## ten minutes without a database at 5,000 ticks a second (ARGS="--steady --minutes 30 --rate 2000")
	@$(BIN)/python -m tests.chaos.soak $(ARGS)

capacity: $(STAMP) ## processor, memory and disk that the daemon takes at several rates (ARGS="--seconds 20")
	@$(BIN)/python -m tests.chaos.capacity $(ARGS)

bench: $(BENCH_STAMP) ## speed, memory and delay against limits and peers: docs/explanation/performance.md (15 min)
	@$(BENCH)/bin/python -m benchmarks $(ARGS)

bench-full: $(BENCH_STAMP) ## the same with 100 million rows and a spool of ten million (by hand; takes long)
	@$(BENCH)/bin/python -m benchmarks --full $(ARGS)

bench-quick: $(STAMP) ## fails if any benchmark costs over 10 % more than the baseline (ARGS="--commit" writes a new one)
	@$(BIN)/python -m benchmarks.quick $(ARGS)

storage-report: $(STAMP) ## fill an empty database with a year of ticks and measure it (URL=postgresql://… ROWS=20000000)
	@$(BIN)/python -m tests.storage "$(URL)" --rows $(or $(ROWS),20000000)

lint: $(STAMP) ## ruff (rules and format), mypy in strict mode, spelling and language
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BIN)/codespell
	@$(BIN)/python -m tests.language

lint-workflows: $(TOOLS_STAMP) ## actionlint and pre-commit over the files that others' CI and hooks read
	@$(TOOLS)/bin/actionlint
	@$(TOOLS)/bin/pre-commit validate-config .pre-commit-config.yaml

format: $(STAMP) ## rewrite the code in the project's format
	@$(BIN)/ruff check --fix-only .
	@$(BIN)/ruff format .

lock: ## choose the newest versions that pyproject.toml allows (needs uv)
	uv pip compile --upgrade --universal --python-version 3.11 --generate-hashes --no-emit-index-url \
		--no-header --no-annotate --quiet pyproject.toml --output-file requirements.lock
	uv pip compile --upgrade --universal --python-version 3.11 --generate-hashes --no-emit-index-url \
		--no-header --no-annotate --quiet pyproject.toml --all-extras --group dev \
		--output-file requirements-dev.lock
	uv pip compile --upgrade --universal --python-version 3.11 --generate-hashes --no-emit-index-url \
		--no-header --no-annotate --quiet pyproject.toml --extra embedded \
		--constraint requirements-dev.lock --output-file requirements-demo.lock
	uv pip compile --upgrade --universal --python-version 3.11 --generate-hashes --no-emit-index-url \
		--no-header --no-annotate --quiet pyproject.toml --all-extras --group dev --group bench \
		--constraint requirements-dev.lock --output-file benchmarks/requirements.lock
	uv pip compile --upgrade --universal --python-version 3.11 --generate-hashes --no-emit-index-url \
		--no-header --no-annotate --quiet --group tools --output-file requirements-tools.lock
	uv pip compile --upgrade --universal --python-version 3.11 --generate-hashes --no-emit-index-url \
		--no-header --no-annotate --quiet --group docs --output-file requirements-docs.lock
	echo hatchling | uv pip compile --upgrade --universal --python-version 3.11 --generate-hashes --no-emit-index-url \
		--no-header --no-annotate --quiet - --output-file deploy/docker/build.lock

docs: $(STAMP) $(DOCS_STAMP) ## the pages as a site in build/site/index.html, with search; fails on broken links and anchors
	@$(BIN)/python -m scripts.site.pages build/pages
	@$(DOCS)/bin/sphinx-build -q --fail-on-warning --keep-going -c scripts/site -d build/doctrees build/pages build/site
	@echo "The site is in build/site/index.html."

audit: $(TOOLS_STAMP) ## look the locked packages up in PyPI's list of known vulnerabilities; fails without it
	@for lock in requirements.lock requirements-dev.lock; do \
		$(TOOLS)/bin/pip-audit --requirement $$lock --require-hashes --disable-pip --strict --progress-spinner off $(ARGS) || exit; \
	done

release: $(STAMP) $(TOOLS_STAMP) ## check everything that a release needs and build it into dist/; uploads nothing
	@PATH="$(CURDIR)/$(TOOLS)/bin:$$PATH" $(TOOLS)/bin/python -m scripts.release

package: $(STAMP) $(TOOLS_STAMP) ## the part of it that holds for any commit: packages, built and tried
	@PATH="$(CURDIR)/$(TOOLS)/bin:$$PATH" $(TOOLS)/bin/python -m scripts.release --unreleased

hooks: $(TOOLS_STAMP) ## run `make lint` before each commit (pre-commit)
	@$(TOOLS)/bin/pre-commit install

clean: ## remove the environment and everything that was built
	rm -rf $(VENV) $(BENCH) $(DEMO) $(TOOLS) $(DOCS) .nox build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis

$(DEMO)/.installed: requirements-demo.lock
	@scripts/make-venv $(DEMO) requirements-demo.lock packages-only
	@touch $@

$(DOCS_STAMP): requirements-docs.lock
	@scripts/make-venv $(DOCS) requirements-docs.lock packages-only
	@touch $@

$(TOOLS_STAMP): requirements-tools.lock
	@scripts/make-venv $(TOOLS) requirements-tools.lock packages-only
	@touch $@

$(BENCH_STAMP): benchmarks/requirements.lock pyproject.toml
	@scripts/make-venv $(BENCH) benchmarks/requirements.lock
	@touch $@

# Exact versions with hashes; the project itself is installed in place, without fetching anything more.
$(STAMP): requirements-dev.lock pyproject.toml
	@scripts/make-venv $(VENV) requirements-dev.lock
	@touch $@
