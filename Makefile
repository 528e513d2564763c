# Thin names for the commands of the README. Each makes the virtual environment and installs first.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
SOURCES = pyproject.toml setup.py $(shell find csrc -type f -not -name '*.pyc')

# Without an NVIDIA GPU: the small CPU build of torch, by the one name that no CUDA build answers to, and the torchvision
# that belongs to it (the tests' networks; any other would bring its own torch). Their dependencies come with the
# installation below.
TORCH_CPU = $(BIN)/pip install --no-deps --retries 1 --index-url https://download.pytorch.org/whl/cpu 'torch==2.13.0+cpu' \
    && $(BIN)/pip install --no-deps 'torchvision==0.28.0'

.PHONY: demo test coverage bench gpu kernels model banks operators lint docs
demo: $(VENV)/demo
	$(BIN)/zfcuda demo

test: $(VENV)/dev
	OMP_NUM_THREADS=1 $(BIN)/pytest

coverage: $(VENV)/dev
	OMP_NUM_THREADS=1 $(BIN)/pytest --ignore tests/simt -k simt --simt-coverage 98

bench: $(VENV)/dev # make bench BENCH=--quick
	$(BIN)/zfcuda bench --output build/bench $(BENCH)

# Everything that this machine's GPU can tell, as one archive for an issue; make gpu GPU=--sanitize. A build that fails
# is a part of the report, so it must not end here.
gpu: | $(VENV)/torch
	$(BIN)/pip install -e '.[dev]' --log $(VENV)/build.log || ZFCUDA_CUDA=off $(BIN)/pip install -e '.[dev]'
	$(BIN)/zfcuda gpu-report --output build/gpu-report $(GPU)

kernels: $(VENV)/dev
	$(BIN)/python tests/static/cutlass.py > docs/kernels.md

model: $(VENV)/dev
	$(BIN)/python tests/static/model.py > docs/model.md

banks: $(VENV)/dev
	$(BIN)/python tests/simt/banks.py

operators: $(VENV)/dev
	$(BIN)/python tests/operators.py > docs/operators.md

lint: $(VENV)/dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	git ls-files '*.h' '*.cpp' '*.cu' '*.cuh' | xargs $(BIN)/clang-format --dry-run -Werror

docs: $(VENV)/dev
	$(BIN)/sphinx-build --fail-on-warning --keep-going --quiet -b html docs build/docs

$(VENV)/demo: $(SOURCES) | $(VENV)/torch
	$(BIN)/pip install -e .
	$(BIN)/zfcuda info
	touch $@

# The tests and the linters.
$(VENV)/dev: $(SOURCES) | $(VENV)/torch
	$(BIN)/pip install -e '.[dev]' --log $(VENV)/build.log
	$(BIN)/zfcuda info
	touch $@ $(VENV)/demo

$(VENV)/torch:
	$(PYTHON) -m venv $(VENV)
	nvidia-smi >/dev/null 2>&1 || { $(TORCH_CPU); } || \
	    echo "The index of torch's CPU builds is out of reach: PyPI's build follows, with gigabytes of CUDA libraries"
	touch $@
