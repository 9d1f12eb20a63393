PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.DEFAULT_GOAL := help
.PHONY: help demo test test-slow bench bench-all lint format native clean

help: ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## (.*)/  make \1\t\2/' | expand -t 20

demo: $(READY) ## the whole method on the embedded sandbox world: report and table
	$(BIN)/reprdpo demo

test: $(READY) ## every test but the slow ones
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto -m "not slow and not interpreter"
	OMP_NUM_THREADS=1 TRITON_INTERPRET=1 $(BIN)/python -m pytest -n auto -m "interpreter and not slow"
	test ! -d build/native || $(BIN)/ctest --test-dir build/native --output-on-failure

test-slow: $(READY) ## the tests that take minutes
	$(BIN)/python -m pytest -m slow

bench: ROWS = -m "not secondary"
bench: bench-all ## time the ops beside their peers: build/benchmarks.json and .html

bench-all: $(READY) ## the same at every setting, which takes far longer
	mkdir -p build
	rm -f build/benchmarks.json
	$(BIN)/python -m pytest benchmarks $(ROWS) --continue-on-collection-errors --benchmark-quiet \
	  --benchmark-json build/benchmarks.json; status=$$?; \
	$(BIN)/python -m benchmarks.report build/benchmarks.json --page build/benchmarks.html && exit $$status

lint: $(READY) ## ruff, mypy, import-linter, clang-format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	PYTHONPATH=.:kernels $(BIN)/lint-imports
	git ls-files 'csrc/*' | xargs $(BIN)/clang-format --dry-run -Werror

format: $(READY) ## rewrite the source as the linters want it
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	git ls-files 'csrc/*' | xargs $(BIN)/clang-format -i

native: $(READY) ## rebuild the native library in place
	$(BIN)/cmake --build build/native --target install

clean: ## remove what was built
	rm -rf $(VENV) build dist reprdpo/lib *.egg-info

$(READY): pyproject.toml constraints.txt setup.py CMakeLists.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q -c constraints.txt torch numpy setuptools wheel cmake ninja
	$(BIN)/python -m pip install -q -c constraints.txt --no-build-isolation -e '.[dev]'
	touch $@
