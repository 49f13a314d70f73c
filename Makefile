# For a fresh machine with Python 3.11, 3.12 or 3.13: `make sample`, `make demo` and `make test`.
PYTHON ?= python3
VERSION = $(shell $(PYTHON) --version 2>&1 || true)
VENV ?= .venv
RUN := $(VENV)/bin/python

.PHONY: demo sample test test-gpu test-portable install lint

install: $(VENV)/installed

$(VENV)/installed: requirements.txt requirements-dev.txt
	$(if $(filter 3.11.% 3.12.% 3.13.%,$(VERSION)),,$(error Python 3.11, 3.12 or 3.13 is needed, and \
	  `$(PYTHON) --version` says "$(VERSION)": name another, as in `$(strip make $(MAKECMDGOALS)) PYTHON=python3.12`))
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --upgrade pip
	$(RUN) -m pip install --quiet -r requirements.txt -r requirements-dev.txt
	touch $@

# The improved preset, made small, on the digits that come with scikit-learn; a grid with a row for each digit.
demo: install
	rm -rf result/demo
	$(RUN) -u main.py --dataset_name Digits --preset improved --condition label --guidance 0.5 \
	  --denoiser_channels 96 --denoiser_blocks 3 --epochs 12 --diffusion_epochs 35 \
	  --metrics recognition,mse,ssim,codebook --result_path result/demo
	$(RUN) -u main.py --checkpoint result/demo/Digits/residual-svae --stage sample --labels all

# Ten images of each class, drawn by the trained network that comes with the repository.
sample: install
	$(RUN) -u main.py --checkpoint pretrained/fmnist --stage sample --labels all

.PHONY: format
format: install
	$(RUN) -m ruff check --fix-only .
	$(RUN) -m ruff format .

lint: install
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy

# One thread for each of several processes, and no GPU: the networks of the tests gain nothing from more, and only on a
# CPU are two runs the same, bit for bit.
PYTEST = CUDA_VISIBLE_DEVICES= OMP_NUM_THREADS=1 $(RUN) -m pytest -n auto --maxprocesses 4 --dist loadscope

test: lint
	$(PYTEST)

# What needs a GPU, on a machine that has one.
test-gpu: install
	$(RUN) -m pytest tests/test_gpu.py

# As on a processor with no more than AVX2, which rounds sums otherwise: all tests but those that compute next to nothing.
test-portable: install
	env -u DNNL_DEFAULT_FPMATH_MODE ONEDNN_MAX_CPU_ISA=AVX2 ATEN_CPU_CAPABILITY=avx2 $(PYTEST) \
	  $(patsubst %,--ignore=tests/%.py,pipeline/report/test_report pipeline/test_lineage pipeline/test_start \
	  scripts/test_benchmark scripts/test_documents scripts/test_outputs scripts/test_reproduce \
	  test_arrays test_cli test_datasets test_extending test_image_files test_image_folders test_links test_parts \
	  test_progress)
