# Every target sets itself up in .venv; nothing else on the machine changes.
PYTHON ?= python3
VENV := .venv
OLDEST := .venv-oldest
BIN := $(VENV)/bin
# Tests and examples run on the CPU, whatever else the machine has.
CPU := JAX_PLATFORMS=cpu

.PHONY: kv facts ablations test test-all test-oldest parity lm-eval lint format docs clean

# XLA takes and returns its scratch memory at every step; in huge pages that
# costs far fewer page faults. Other C libraries ignore it.
kv facts ablations: export GLIBC_TUNABLES := glibc.malloc.hugetlb=1
kv: $(VENV)/installed
	$(BIN)/python -m calm_jax.train --config=configs/kv.py

# English is read from the folder CALM_SHARED, or else from the hub.
facts: $(VENV)/hf
	$(BIN)/python -m calm_jax.train --config=configs/facts.py

ablations: $(VENV)/installed
	$(BIN)/python -m calm_jax.ablations --config=configs/kv.py:ablations

# Most of the time goes into compiling programs that run for moments.
PYTEST = $(CPU) JAX_DISABLE_MOST_OPTIMIZATIONS=1 \
  $(BIN)/python -m pytest -n auto --dist loadfile --no-loadscope-reorder \
  --ignore=tests/parity

# What a change needs. test-all adds kills, faults, meshes and whole commands.
test: $(VENV)/dev
	$(PYTEST) -m "not slow"

test-all: $(VENV)/dev
	$(PYTEST)

# The same tests as `test`, with the lowest versions that setup.cfg allows.
test-oldest: BIN := $(OLDEST)/bin
test-oldest: $(OLDEST)/installed
	$(PYTEST) -m "not slow"

parity: $(VENV)/parity
	$(CPU) $(BIN)/python -m pytest -n auto tests/parity

# Against lm-evaluation-harness and its own hf model; installs both. The latter
# reads a model of the folder CALM_SHARED.
lm-eval: $(VENV)/lm-eval
	$(CPU) $(BIN)/python -m pytest tests/test_lm_eval.py \
	  tests/parity/test_harness.py

lint: $(VENV)/dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyrefly check --python-interpreter-path=$(BIN)/python \
	  --min-severity=error
	$(BIN)/shellcheck -x launch/*

format: $(VENV)/dev
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# A site of README.md, docs/ and all docstrings: build/docs/index.html.
docs: $(VENV)/docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet

clean:
	rm -rf $(VENV) $(OLDEST) build *.egg-info

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

# A run draws its report.
$(VENV)/installed: setup.cfg pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet --editable '.[report]'
	touch $@

$(VENV)/hf: $(VENV)/installed
	$(BIN)/python -m pip install --quiet --editable '.[hf]'
	touch $@

# What tests and lints need, at once: each call of pip takes seconds.
$(VENV)/dev: setup.cfg pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet --editable '.[test,dev]'
	touch $@ $(VENV)/installed

$(VENV)/parity: $(VENV)/dev
	$(BIN)/python -m pip install --quiet --editable '.[test,parity]'
	touch $@

$(VENV)/lm-eval: $(VENV)/parity
	$(BIN)/python -m pip install --quiet --editable '.[test,parity,eval]'
	touch $@

$(OLDEST)/installed: setup.cfg pyproject.toml
	$(PYTHON) -m venv --clear $(OLDEST)
	$(OLDEST)/bin/python -m pip install --quiet uv
	$(OLDEST)/bin/uv pip install --quiet --python $(OLDEST)/bin/python \
	  --resolution lowest-direct --editable '.[test,hf,wandb]'
	touch $@

$(VENV)/docs: $(VENV)/installed
	$(BIN)/python -m pip install --quiet --editable '.[docs]'
	touch $@
