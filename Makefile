PYTHON ?= python3
BIN := .venv/bin
# The second variable pins the build backend where pip is too new for the first to do so.
PINS := PIP_CONSTRAINT=constraints.txt PIP_BUILD_CONSTRAINT=constraints.txt
# uv, where it is there, installs the same versions in a fraction of the time; `make UV= install` takes pip.
UV := $(shell command -v uv)
ifdef UV
INSTALL := uv pip install --quiet --python $(BIN)/python --constraint constraints.txt --build-constraint constraints.txt
HASHED := uv pip install --quiet --python $(BIN)/python --require-hashes --no-deps --requirement requirements-hashed.txt
else
INSTALL := $(PINS) $(BIN)/pip install --quiet --disable-pip-version-check
# 23,000 modules, of which few are ever imported, need not be compiled.
HASHED := $(BIN)/pip install --quiet --disable-pip-version-check --no-compile --require-hashes --no-deps --requirement requirements-hashed.txt
endif
# The same files make the same wheel, to the byte, whenever it is built.
export SOURCE_DATE_EPOCH ?= $(shell git log -1 --pretty=%ct 2>/dev/null || echo 315532800)
# A worker for each core, of one thread: PyTorch's default of a thread for each core, in each worker, is slower.
PYTEST ?= OMP_NUM_THREADS=1 $(BIN)/pytest --no-header --numprocesses=logical --maxprocesses=4

.DEFAULT_GOAL := help
.PHONY: help quickstart install test tensorrt faults hostile fuzz mutants cluster crash endurance format lint types
.PHONY: contracts check docs wheel sbom clean

help: ## list the targets
	@sed -n 's/^\([a-z]*\):.*## \(.*\)/\1|\2/p' $(MAKEFILE_LIST) | while IFS='|' read -r name what; do printf '  make %-11s %s\n' "$$name" "$$what"; done

quickstart: .venv/.train ## install, then run the whole pipeline on real images
	@$(BIN)/mae-deploy quickstart

install: .venv/.installed ## make .venv with everything that development needs

test: .venv/.installed ## run all tests
	@$(PYTEST)

tensorrt: .venv/.installed ## read and build every kind of graph with NVIDIA's builder, without a GPU
	@scripts/check_tensorrt_builder.sh

faults: .venv/.installed ## plant every kind of fault into every kind of bundle, and count what verify finds
	@$(BIN)/python -m tests.faults.run --clean 1000 --out faults.json

hostile: .venv/.installed ## give every hostile file to every command that reads such a file
	@OMP_NUM_THREADS=1 $(BIN)/python -m tests.hostile.run

fuzz: .venv/.installed ## change bytes of whole files and read them, for some minutes
	@OMP_NUM_THREADS=1 $(BIN)/python -m tests.hostile.fuzz

# mutmut stands in a folder of its own: it brings another pytest. MUTANTS='mae_deploy.models.mae.*' tries these alone.
mutants: .venv/.installed ## change the code of masks, loss, parity and bundles, and count what the tests find
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --upgrade --target build/mutmut mutmut==3.8.1
	@OMP_NUM_THREADS=1 PYTHONPATH=build/mutmut $(BIN)/python -m mutmut run $(MUTANTS)

cluster: .venv/.installed ## embed on a cluster of two processes that Ray starts here
	@MAE_DEPLOY_TEST_RAY=1 OMP_NUM_THREADS=1 $(BIN)/pytest --no-header -q tests/commands/embed -k cluster

crash: .venv/.installed ## kill and stop every command that writes, fill its disk, and look at what is left
	@OMP_NUM_THREADS=1 $(BIN)/python -m tests.crash.run --out crash.json

endurance: .venv/.installed ## 100,000 calls and 10,000 steps: memory, open files and threads stay flat
	@OMP_NUM_THREADS=1 $(BIN)/python -m scripts.measure_endurance --picture endurance.png

format: .venv/.installed ## rewrite the sources in the house's format
	@$(BIN)/ruff check --quiet --fix-only .
	@$(BIN)/ruff format --quiet .

lint: .venv/.installed ## check style and format
	@$(BIN)/ruff check --quiet .
	@$(BIN)/ruff format --quiet --check .

types: .venv/.installed ## check types with mypy and pyright
	@PYRIGHT_PYTHON_IGNORE_WARNINGS=1 $(BIN)/pyright & \
	$(BIN)/mypy --no-error-summary; mypy=$$?; wait $$! && exit $$mypy

contracts: .venv/.installed ## check which module may import which
	@$(BIN)/lint-imports --no-logo

check: lint types contracts test ## lint, types, contracts and test: what CI runs

# From a copy, so that the pages that are written from the program do not lie among those that somebody wrote.
docs: .venv/.installed ## build the site into build/docs/html, without a network
	@rm -rf build/docs && mkdir -p build/docs && cp -R docs build/docs/source
	@$(BIN)/sphinx-build --quiet --fail-on-warning --keep-going -d build/docs/doctrees build/docs/source build/docs/html

wheel: .venv/.installed ## build dist/*.whl from the source distribution
	@rm -rf dist
	@$(PINS) $(BIN)/python -m build -qq .

sbom: ## list in sbom/ what the wheel in dist/ installs, as CycloneDX
	@PYTHON=$(PYTHON) .ci/sbom

clean: ## remove what was built; .venv stays
	@rm -rf build dist sbom *.egg-info .mypy_cache .ruff_cache .pytest_cache .import_linter_cache
	@find mae_deploy pretrain distill export examples tests scripts -name __pycache__ -prune -exec rm -rf {} +

.venv/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "mae-deploy needs Python 3.10 or later; try: make PYTHON=python3.12")'
	@$(PYTHON) -m venv .venv

.venv/.train: pyproject.toml constraints.txt | .venv/bin/python
	@echo "Installing into .venv (PyTorch and its libraries: several GB) ..."
	@$(INSTALL) --editable '.[train]'
	@touch $@

# What others wrote is checked against its hashes; then there is nothing left to fetch.
.venv/.installed: pyproject.toml requirements-hashed.txt | .venv/bin/python
	@echo "Installing into .venv (PyTorch and its libraries: several GB) ..."
	@$(HASHED)
	@$(INSTALL) --no-deps --no-build-isolation --editable .
	@touch .venv/.train $@
