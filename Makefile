# `make` lists the targets. The first use of each installs what it needs into .venv.
PY := .venv/bin/python
PIP := $(PY) -m pip --disable-pip-version-check -qq install --progress-bar off
WORKERS ?= 2
ARGS ?=

# ruff and pyright say nothing of newer versions: constraints.txt decides.
export PYRIGHT_PYTHON_IGNORE_WARNINGS := 1

# With the compilers and no device, jax must not look for one (it would tell at length that there is
# none), and two processes may compile at once.
ifneq ($(wildcard .venv/.compilers),)
ifeq ($(wildcard /dev/nvidia0 /dev/dxg /dev/accel0 /dev/vfio/0),)
JAX_PLATFORMS ?= cpu
ALLOW_MULTIPLE_LIBTPU_LOAD ?= 1
export JAX_PLATFORMS ALLOW_MULTIPLE_LIBTPU_LOAD
endif
endif

.PHONY: help train generate chat test test-all lint format bench docs docs-site compilers clean
.NOTPARALLEL: # two pips at once would spoil .venv
.DEFAULT_GOAL := help

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-10s %s\n", $$1, $$2}' Makefile

train: .venv/.train ## train a small hybrid model on real text; ARGS="--data my/dir --steps 2000"
	@$(PY) train.py $(ARGS)

generate: .venv/.generate ## continue a text with a real model; ARGS='--prompt "The capital of Italy is"'
	@$(PY) -m models.generate $(if $(ARGS),$(ARGS),--prompt "The capital of Italy is")

chat: .venv/.generate ## talk to a real model; ARGS="--model my-model"
	@$(PY) -m models.chat $(ARGS)

test: .venv/.test ## the test suite; ARGS="-k patterns"
	@$(PY) -m pytest -n $(WORKERS) --dist worksteal $(ARGS)

test-all: .venv/.test ## the same with the slow tests
	@$(PY) -m pytest -n $(WORKERS) --dist worksteal -m "" $(ARGS)

lint: .venv/.dev ## ruff and pyright
	@$(PY) -m ruff check .
	@$(PY) -m ruff format --check .
	@$(PY) -m pyright

format: .venv/.dev ## let ruff rewrite what it can
	@$(PY) -m ruff check --fix .
	@$(PY) -m ruff format .

bench: .venv/.train ## the benchmarks into benchmarks/results/, and their tables into docs/results.md
	$(PY) -m benchmarks.schedules
	$(PY) -m benchmarks.attention $(ARGS)
	@$(PY) -m benchmarks.report

docs: .venv/.train ## what is generated: pictures, the tables of docs/results.md and the README
	@$(PY) -m s2jax.plotting
	@$(PY) -m benchmarks.report

docs-site: .venv/.docs ## the docs site with the API reference, into site/
	@NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs build --strict --quiet
	@echo "wrote site/index.html"

compilers: .venv/.compilers ## the compilers for TPU and NVIDIA, to compile kernels with no device (1.5 GB)

clean: ## remove .venv and caches; runs/ stays
	rm -rf .venv .pytest_cache .ruff_cache .hypothesis build dist site
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# The interpreter is a link: where it dangles, make takes it for missing and makes .venv anew, and
# where the system's Python was upgraded the stamps below are older than it and installing repeats.
$(PY):
	@PYTHON='$(PYTHON)' GOALS='$(MAKECMDGOALS)' sh .ci/make_venv.sh

# One stamp for each extra of pyproject.toml.
.venv/.%: $(PY) pyproject.toml constraints.txt
	@$(PY) -c 'import sys; sys.exit(sys.version_info < (3, 12) and ".venv holds Python %d.%d, too old. This mends it:  make clean" % sys.version_info[:2])'
	@$(PY) -m pip --version >/dev/null 2>&1 || $(PY) -m ensurepip >/dev/null
	@echo "Installing what '$*' needs into .venv (once: 1 to 2 minutes, 1 GB of disk) ..."
	@start=$$(date +%s); $(PIP) -c constraints.txt -e '.[$*]' && echo "... done in $$(($$(date +%s) - start)) s"
	@touch $@

# The CUDA plugin without its dependencies, and of those what compiles alone: ptxas, libdevice and the
# disassembler. The rest would be 3 GB.
.venv/.compilers: .venv/.train
	@echo "Installing the TPU and CUDA compilers into .venv (once: a few minutes, 1.5 GB of disk) ..."
	@start=$$(date +%s); $(PIP) -c constraints.txt -e '.[compilers]' && \
	jax=$$($(PY) -c 'import importlib.metadata as m; print(m.version("jax"))') && \
	$(PIP) --no-deps -c constraints.txt "jax-cuda13-plugin==$$jax" "jax-cuda13-pjrt==$$jax" \
		nvidia-cuda-nvcc nvidia-nvvm nvidia-cuda-nvdisasm && echo "... done in $$(($$(date +%s) - start)) s"
	@touch $@
