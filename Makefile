# Every target shares one virtual environment, .venv, and sets it up if need be. No root; run any of them again at will.

VENV := .venv
STAMP := $(VENV)/.installed
BIN := $(VENV)/bin
export PYTHON TORCH_INDEX
# more threads than one a process are slower on a busy machine, and spin
export OMP_NUM_THREADS ?= 1
export OMP_WAIT_POLICY ?= passive
# cross-compiler and emulator, where `make cross` unpacked them
export PATH := $(CURDIR)/$(VENV)/cross/bin:$(PATH)

.PHONY: help demo test test-docs test-arm test-gpu test-faults cross check docs web bench bench-compile models claims
.DEFAULT_GOAL := help

help:
	@echo "make demo    the whole flow from the shipped checkpoint: a table, and an HTML report (3 minutes)"
	@echo "make test    every test"
	@echo "make test-docs   every command of the documentation, and the tutorial (5 minutes)"
	@echo "make test-arm   compiled networks for ARM under an emulator, through the C++ runner, against this machine (4 minutes)"
	@echo "make cross   what that needs, unpacked into $(VENV)/cross; the runner for x86_64 and aarch64 in $(VENV)/device"
	@echo "make test-gpu   CUDA artifacts on this machine's GPU, against its processor and ONNX Runtime; skips where there is none"
	@echo "make test-faults   the long fault suites of delivery, into docs/faults.md (an hour and more; FAULTS='--share 0.1' for a part)"
	@echo "make check   ruff check, ruff format --check, mypy"
	@echo "make docs    the documentation as a web site in build/site, warnings as errors"
	@echo "make web     what the server's page for browsers needs and git does not hold; with npm"
	@echo "make bench   the benchmarks of tools/ into docs/numbers/*.json and docs/numbers.md (NUMBERS='swap memory' for some; hours)"
	@echo "make bench-compile   compiled networks beside ONNX Runtime and OpenVINO (BENCH='--data-dir DIR --networks ...')"
	@echo "make claims  the next missing cells of docs/claims.md (CLAIMS='--budget-min 60 --data-dir DIR'; --list shows them)"
	@echo "make models  remake the shipped checkpoint and its card (hours; DATA_DIR=folder of the full dataset)"
	@echo
	@echo "The first of them sets up $(VENV): 2 GB of disk and 1 to 5 minutes with a CPU build of torch; the default"
	@echo "index of Linux on x86 brings a CUDA build, gigabytes more. It needs Python 3.11, 3.12 or 3.13 with venv, and the network."
	@echo "  PYTHON=/path/to/python   the interpreter for $(VENV) (default: the first of 3.11, 3.12, 3.13 that works)"
	@echo "  TORCH_INDEX=URL          one more package index, for instance PyTorch's for CPU builds"

ifneq ($(PYTHON),)
WHICH := -c 'import sys; print(sys.base_prefix, sys.version)'
ifneq ($(shell $(PYTHON) $(WHICH) 2>&1),$(shell $(BIN)/python $(WHICH) 2>&1))
.PHONY: other-python
other-python:
$(STAMP): other-python
endif
endif

$(STAMP): pyproject.toml constraints.txt tools/make_venv.sh
	@sh tools/make_venv.sh $(VENV)
	@touch $@

demo: $(STAMP)
	$(BIN)/qdeploy demo

test: $(STAMP)
	$(BIN)/pytest -q -n 2 --dist loadfile --ignore tests/arm --ignore tests/docs

test-docs: $(STAMP)
	$(BIN)/pytest -q -rs -n 2 tests/docs

# the programs and packages for building and emulating aarch64, and the C++ runner for both architectures
CROSS := $(VENV)/cross/.installed
$(CROSS): $(STAMP) tools/make_cross.sh constraints.txt
	@sh tools/make_cross.sh $(VENV)
	@touch $@

cross: $(CROSS)
	@sh tools/make_runner.sh $(VENV) $(shell uname -m)
	@sh tools/make_runner.sh $(VENV) aarch64

test-arm: cross
	$(BIN)/pytest -q -rs -n 2 --dist loadfile tests/arm

test-gpu: $(STAMP)
	$(BIN)/pytest -q -rs tests/gpu

test-faults: $(STAMP)
	$(BIN)/python tools/fault_report.py $(FAULTS)

check: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# each that has no result of this revision yet, one after the other; Ctrl-C and again goes on
bench: $(VENV)/.bench-installed
	$(BIN)/python tools/numbers_page.py --run $(NUMBERS)

docs: $(VENV)/.docs-installed
	@NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet --site-dir build/site
	@echo "build/site/index.html"

web:
	sh tools/make_web.sh

models: $(STAMP)
	$(BIN)/python tools/model_card.py models/fashion-resnet8.toml $(if $(DATA_DIR),--data-dir $(DATA_DIR))

claims: $(STAMP)
	$(BIN)/python tools/claims.py $(CLAIMS)

# what one target alone needs: OpenVINO to compare with, the generator of the site
$(VENV)/.%-installed: $(STAMP)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[$*]'
	@touch $@

bench-compile: $(VENV)/.bench-installed
	$(BIN)/python tools/bench_compile.py $(BENCH)
