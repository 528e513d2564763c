# Thin names for the commands of the README. Each makes the virtual environment and installs first.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
SOURCES = pyproject.toml setup.py $(shell find csrc -type f -not -name '*.pyc')

# Without an NVIDIA GPU: the small CPU build of torch, by the one name that no CUDA build answers to. Its
# dependencies come with the installation below.
TORCH_CPU = $(BIN)/pip install --no-deps --retries 1 --index-url https://download.pytorch.org/whl/cpu 'torch==2.13.0+cpu'

.PHONY: demo test bench lint gpu-tests kernels
demo: $(VENV)/demo
	$(BIN)/zfcuda demo

test: $(VENV)/test
	$(BIN)/pytest

bench: $(VENV)/test
	$(BIN)/pytest benchmarks

gpu-tests: $(VENV)/test
	$(BIN)/zfcuda info
	$(BIN)/pytest -m gpu

kernels: $(VENV)/test
	$(BIN)/python tests/static/report.py > docs/kernels.md

lint: $(VENV)/dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	git ls-files '*.h' '*.cpp' '*.cu' '*.cuh' | xargs $(BIN)/clang-format --dry-run -Werror

$(VENV)/demo: $(VENV)/torch $(SOURCES)
	$(BIN)/pip install -e .
	$(BIN)/zfcuda info
	touch $@

$(VENV)/test: $(VENV)/torch $(SOURCES)
	$(BIN)/pip install -e '.[test]'
	$(BIN)/zfcuda info
	touch $@ $(VENV)/demo

$(VENV)/dev: $(VENV)/test
	$(BIN)/pip install ruff mypy clang-format
	touch $@

$(VENV)/torch:
	$(PYTHON) -m venv $(VENV)
	nvidia-smi >/dev/null 2>&1 || $(TORCH_CPU) || echo "The index of torch's CPU builds is out of reach: PyPI's build follows, with several GB of CUDA libraries"
	touch $@
