# `make demo`: the WER table of egs2/mini from nothing.   `make test`: the whole test suite.
# Both need python >= 3.10, bash and make, and install into .venv on the first call (about 5.5 GB).

PYTHON ?= python3
VENV ?= .venv
INSTALLED := $(VENV)/.installed
SHELL := /bin/bash

.PHONY: demo test lint install clean

demo: $(INSTALLED)
	cd egs2/mini/asr1 && PATH="$(abspath $(VENV))/bin:$$PATH" ./run.sh

test: $(INSTALLED) lint
	PATH="$(abspath $(VENV))/bin:$$PATH" OMP_NUM_THREADS=1 python -m pytest -n 2 --dist loadfile \
		--no-loadscope-reorder

lint: $(INSTALLED)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/shellcheck --external-sources $$(git ls-files '*.sh' .ci/run)

install: $(INSTALLED)

$(INSTALLED): setup.py
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
		{ echo "error: $(PYTHON) is $$($(PYTHON) -V 2>&1), but python >= 3.10 is needed;" \
		       "try e.g. 'make $(MAKECMDGOALS) PYTHON=python3.11'" >&2; exit 1; }
	@$(VENV)/bin/python -m pip --version > /dev/null 2>&1 || $(PYTHON) -m venv --clear $(VENV)
	@echo "Installing into $(VENV): about 5.5 GB, some minutes, only this once"
	$(VENV)/bin/python -m pip install --quiet --editable '.[demo,dev]'
	$(VENV)/bin/python -m pip check
	touch $@

clean:
	rm -rf $(VENV) build *.egg-info
