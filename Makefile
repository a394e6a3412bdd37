# make demo, make check and make test install what they need first.
PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/.installed

.PHONY: install demo check test test-all kernels clean

install: $(INSTALLED)

# torch goes first and alone: with the pinned version in place nothing later pulls another build of it.
$(INSTALLED): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -c constraints.txt torch setuptools
	$(BIN)/python -m pip install -c constraints.txt --no-build-isolation -e '.[dev]'
	touch $@

demo: install
	$(BIN)/autodeploy demo

check: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	$(BIN)/python -m pytest -q tests/test_architecture.py

test: install
	$(BIN)/python -m pytest -m "not slow" -n 2 --dist worksteal

# Every Triton kernel, compiled for GPUs that are not there; also by the version of Triton that older images have.
kernels: install
	$(BIN)/python tools/compile_kernels.py --check
	$(BIN)/python tools/compile_kernels.py --arch 80
	$(BIN)/python tools/compile_kernels.py --arch 100
	test -d build/triton-3.6.0 || $(BIN)/python -m pip install --no-deps --target build/triton-3.6.0 triton==3.6.0
	PYTHONPATH=build/triton-3.6.0 $(BIN)/python tools/compile_kernels.py --no-page

test-all: install
	$(BIN)/python -m pytest

clean:
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
	find autodeploy tests tools -name __pycache__ -type d -prune -exec rm -rf {} +
